// Products of many rows with a kernel (depth, width): bound by arithmetic. Weights are copied into panels of `kWide`
// outputs, which stay in a cache while one block of rows after another, whose sums are all in registers, goes through
// them (Goto and van de Geijn 2008). Sums have the order of `product.h`.
#ifndef SPOTJAX_MANY_ROWS_H_
#define SPOTJAX_MANY_ROWS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "product.h"
#include "vectors.h"
#include "work.h"
#include "xla/ffi/api/ffi.h"

namespace spotjax {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTall = 14;  // rows of a block: with 32 registers,
#else
constexpr int kTall = 6;  // or with 16
#endif
constexpr int64_t kChunk = 512;      // inputs of a panel, where they are not divided into parts
constexpr int64_t kPanels = 1 << 17;  // weights in panels, at most, unless these are of one panel

// A piece of the work that threads share has, if there is as much:
constexpr int64_t kMostBlocks = 36, kLeastBlocks = 4;  // so many blocks of rows,
constexpr int64_t kMostWidth = 512, kLeastWidth = 64;  // and so many outputs, about; from
constexpr int64_t kGoodWidth = 256;                    // on, what is done once for all of them hardly counts

// Rows that follow each other.
struct Block {
  int64_t row, count;
};

// Rows as blocks of at most `kTall`, all about as high.
inline void add_blocks(std::vector<Block>& blocks, int64_t row, int64_t count) {
  const int64_t number = (count + kTall - 1) / kTall;
  for (int64_t block = 0; block < number; ++block) {
    const int64_t begin = count * block / number, end = count * (block + 1) / number;
    blocks.push_back({row + begin, end - begin});
  }
}

// Memory that begins where a line of a cache does.
class Scratch {
 public:
  float* of(int64_t size) {
    const size_t lines = (size + 15) / 16;
    if (lines_.size() < lines) lines_.resize(lines);
    return lines_.data()->values;
  }

 private:
  struct alignas(64) Line {
    float values[16];
  };
  std::vector<Line> lines_;
};

// How a chunk of the inputs goes into the sums.
enum class Begin { kAnew, kBehind, kPart };  // as the first; each sum goes on; as a sum of its own, added at the end

// A block of rows, `stride` apart, times a panel (depth, kWide), into sums that are `width` apart.
template <int Rows>
inline void multiply_panel(const float* x, int64_t stride, const float* panel, int64_t depth, float* sums,
                           int64_t width, Begin begin) {
  Vector left[Rows] = {}, right[Rows] = {};
  if (begin == Begin::kBehind) {
    for (int row = 0; row < Rows; ++row) {
      left[row] = load(sums + row * width);
      right[row] = load(sums + row * width + kLanes);
    }
  }
  for (int64_t k = 0; k < depth; ++k, panel += kWide) {
    const Vector some = load(panel), others = load(panel + kLanes);
    for (int row = 0; row < Rows; ++row) {
      left[row] += some * x[row * stride + k];
      right[row] += others * x[row * stride + k];
    }
  }
  for (int row = 0; row < Rows; ++row) {
    float* to = sums + row * width;
    if (begin == Begin::kPart) {
      left[row] = load(to) + left[row];
      right[row] = load(to + kLanes) + right[row];
    }
    std::memcpy(to, &left[row], sizeof(Vector));
    std::memcpy(to + kLanes, &right[row], sizeof(Vector));
  }
}

// The same for `count` rows and all panels.
template <int Rows = kTall>
void multiply_panels(int64_t count, const float* x, int64_t stride, const float* panels, int64_t depth, float* sums,
                     int64_t width, Begin begin) {
  if (count == Rows) {
    for (int64_t column = 0; column < width; column += kWide) {
      multiply_panel<Rows>(x, stride, panels + column * depth, depth, sums + column, width, begin);
    }
  } else if constexpr (Rows > 1) {
    multiply_panels<Rows - 1>(count, x, stride, panels, depth, sums, width, begin);
  }
}

template <typename From>
inline void widen(const From* from, int64_t count, float* to) {
  for (int64_t n = 0; n < count; ++n) to[n] = widened(from[n]);
}

inline float widened(int8_t value) { return value; }

// Weights of the inputs `k` to `stop` for the outputs `begin` to `end` as panels; zeros for outputs that do not exist.
template <typename Weight, typename Out>
void pack(const Product<Weight, Out>& p, int64_t k, int64_t stop, int64_t begin, int64_t end, float* panels) {
  const int64_t depth = stop - k;
  for (; k < stop; ++k, panels += kWide) {
    float* to = panels;
    for (int64_t column = begin; column < end; column += kWide, to += depth * kWide) {
      const Weight* from = p.kernel + k * p.width + column;
      if (column + kWide <= end) {
        const Vector left = load(from), right = load(from + kLanes);
        std::memcpy(to, &left, sizeof left);
        std::memcpy(to + kLanes, &right, sizeof right);
      } else {
        std::fill(to, to + kWide, 0.0f);
        widen(from, end - column, to);
      }
    }
  }
}

// Outputs `begin` to `end` of some blocks of rows; `begin` is a multiple of kWide.
template <typename Weight, typename Out>
void multiply_blocks(const Product<Weight, Out>& p, const Block* blocks, int64_t number, int64_t begin, int64_t end) {
  thread_local Scratch panel_space, sum_space, input_space;
  int64_t rows = 0;
  for (int64_t block = 0; block < number; ++block) rows += blocks[block].count;
  const int64_t chunk = p.parts == 1 ? kChunk : p.depth / p.parts + kDepth;  // at most
  const int64_t columns = std::max<int64_t>(kWide, kPanels / chunk / kWide * kWide);
  const int64_t stride = (chunk + kLanes - 1) / kLanes * kLanes + kLanes;  // no power of two: those share a set
  float* inputs = input_space.of(kTall * stride);
  for (int64_t first = begin; first < end; first += columns) {
    const int64_t last = std::min(end, first + columns), width = (last - first + kWide - 1) / kWide * kWide;
    float *panels = panel_space.of(chunk * width), *sums = sum_space.of(rows * width);
    for (int64_t part = 0; part < p.parts; ++part) {
      const int64_t from = p.start(part), to = p.start(part + 1);
      for (int64_t k = from, stop; k < to; k = stop) {
        stop = p.parts == 1 ? std::min(to, k + chunk) : to;
        pack(p, k, stop, first, last, panels);
        const Begin how = k > from ? Begin::kBehind : part == 0 ? Begin::kAnew : Begin::kPart;
        float* into = sums;
        for (int64_t block = 0; block < number; into += blocks[block].count * width, ++block) {
          const auto [row, count] = blocks[block];
          for (int64_t n = 0; n < count; ++n) widen(p.given + (row + n) * p.depth + k, stop - k, inputs + n * stride);
          multiply_panels(count, inputs, stride, panels, stop - k, into, width, how);
        }
      }
    }
    for (int64_t block = 0; block < number; ++block) {
      for (int64_t n = 0; n < blocks[block].count; ++n, sums += width) {
        for (int64_t column = first; column < last; ++column) p.put(blocks[block].row + n, column, sums[column - first]);
      }
    }
  }
}

// All products, in pieces: some outputs of some blocks of rows.
template <typename Weight, typename Out>
void multiply_many(xla::ffi::ThreadPool& pool, const std::vector<Product<Weight, Out>>& products,
                   const std::vector<Block>& blocks) {
  struct Piece {
    const Product<Weight, Out>* product;
    int64_t block, blocks, begin, end;
  };
  int64_t total = 0, width = kMostWidth;
  const int64_t most = blocks.size(), threads = threads_of(pool);
  for (const auto& product : products) total += product.width;
  int64_t groups = (most + kMostBlocks - 1) / kMostBlocks;
  while (groups * total < 2 * threads * width && width > kGoodWidth) width /= 2;
  while (groups * total < threads * width && (groups + 1) * kLeastBlocks <= most) ++groups;
  while (groups * total < threads * width && width > kLeastWidth) width /= 2;
  std::vector<Piece> pieces;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t block = most * group / groups, number = most * (group + 1) / groups - block;
    for (const auto& product : products) {
      const int64_t panels = (product.width + kWide - 1) / kWide;
      const int64_t shares = std::clamp<int64_t>((product.width + width / 2) / width, 1, panels);
      for (int64_t share = 0; share < shares; ++share) {  // about equal ones, so that threads end together
        const int64_t begin = panels * share / shares * kWide, end = panels * (share + 1) / shares * kWide;
        pieces.push_back({&product, block, number, begin, std::min(product.width, end)});
      }
    }
  }
  spotjax::share(pool, static_cast<int>(pieces.size()), [pieces = pieces.data(), blocks = blocks.data()](int number) {
    const Piece& piece = pieces[number];
    multiply_blocks(*piece.product, blocks + piece.block, piece.blocks, piece.begin, piece.end);
  });
}

}  // namespace spotjax

#endif  // SPOTJAX_MANY_ROWS_H_
