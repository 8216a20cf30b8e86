// A product, and in which order the elements of its result are summed: that is the same for all kernels.
#ifndef SPOTJAX_PRODUCT_H_
#define SPOTJAX_PRODUCT_H_

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace spotjax {

constexpr int kDepth = 8;          // weights of one output that are in registers at once where rows are few
constexpr int kWide = 2 * kLanes;  // outputs whose weights are in registers at once
constexpr int64_t kPart = 128;     // inputs that are summed by themselves, at least,
constexpr int64_t kMostParts = 8;  // in so many parts at most,
constexpr int64_t kNarrow = 8192;  // where there are fewer outputs: see `parts_of`

// Memory is read fastest in one piece. Kernels (depth, width) with short rows are therefore divided by depth, too: what
// a thread reads then lies together. The parts depend on the kernel only. Each is summed input by input, from zero on,
// and they are added up in order.
inline int64_t parts_of(int64_t depth, int64_t width) {
  return width >= kNarrow ? 1 : std::clamp<int64_t>(depth / kPart, 1, kMostParts);
}

// x (rows, depth) times a kernel, into y (rows, width).
template <typename Weight, typename Out>
struct Product {
  const Out* given;  // x
  const float* x;    // x in float32, or null where there are many rows
  const Weight* kernel;
  const float* scale;  // of every output, or null
  Out* y;
  int64_t rows, depth, width;
  int64_t parts;   // of the depth
  float* partial;  // (parts, rows, width) where there are several

  void put(int64_t row, int64_t output, float value) const {
    store(y + row * width + output, scale == nullptr ? value : value * scale[output]);
  }

  // Where a part begins.
  int64_t start(int64_t part) const {
    return part == parts ? depth : depth / kDepth * part / parts * kDepth;
  }
};

}  // namespace spotjax

#endif  // SPOTJAX_PRODUCT_H_
