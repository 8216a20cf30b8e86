// Products of a few rows with a large kernel: bound by reading it once. Every vector of weights is loaded into a register
// once and multiplied with all rows while it is there. Sums have the order of `product.h`.
#ifndef SPOTJAX_FEW_ROWS_H_
#define SPOTJAX_FEW_ROWS_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "product.h"
#include "vectors.h"
#include "work.h"
#include "xla/ffi/api/ffi.h"

namespace spotjax {

constexpr int kGroup = 4;  // outputs, and rows, of a block of dot products

// Adds `Depth` inputs from `k` to the sums of `kWide` outputs from `column`, `count` of which exist, for all rows.
template <int Depth, bool Whole, typename Weight, typename Out>
inline void add_inputs(const Product<Weight, Out>& p, int64_t k, int64_t column, int64_t count, float* sums,
                       int64_t stride) {
  Vector left[Depth], right[Depth];
  const Weight* from = p.kernel + k * p.width + column;
  for (int step = 0; step < Depth; ++step, from += p.width) {
    if (Whole) {
      __builtin_prefetch(from + Depth * p.width);
      if (sizeof(Weight) * kLanes >= 64) __builtin_prefetch(from + Depth * p.width + kLanes);
      left[step] = load(from);
      right[step] = load(from + kLanes);
    } else {
      left[step] = load_some(from, std::min<int64_t>(count, kLanes));
      right[step] = load_some(from + std::min<int64_t>(count, kLanes), std::max<int64_t>(count - kLanes, 0));
    }
  }
  const float* x = p.x + k;
  for (int64_t row = 0; row < p.rows; ++row, x += p.depth, sums += stride) {
    Vector a = load(sums), b = load(sums + kLanes);
    for (int step = 0; step < Depth; ++step) {
      a += left[step] * x[step];
      b += right[step] * x[step];
    }
    std::memcpy(sums, &a, sizeof a);
    std::memcpy(sums + kLanes, &b, sizeof b);
  }
}

// One part of the outputs `begin` to `end` of a kernel (depth, width); `begin` is a multiple of kWide.
template <typename Weight, typename Out>
void by_columns(const Product<Weight, Out>& p, int64_t part, int64_t begin, int64_t end) {
  constexpr int64_t kSums = 6144;  // as many floats as leave room in a first-level cache
  const int64_t tile = std::max<int64_t>(kWide, kSums / p.rows / kWide * kWide), stop = p.start(part + 1);
  thread_local std::vector<float> sums;
  for (int64_t first = begin; first < end; first += tile) {
    const int64_t last = std::min(end, first + tile), stride = (last - first + kWide - 1) / kWide * kWide;
    sums.assign(p.rows * stride, 0.0f);
    auto add = [&](auto depth, int64_t k) {
      for (int64_t column = first; column < last; column += kWide) {
        float* at = sums.data() + (column - first);
        if (column + kWide <= p.width) {
          add_inputs<decltype(depth)::value, true>(p, k, column, kWide, at, stride);
        } else {
          add_inputs<decltype(depth)::value, false>(p, k, column, p.width - column, at, stride);
        }
      }
    };
    int64_t k = p.start(part);
    for (; k + kDepth <= stop; k += kDepth) add(std::integral_constant<int, kDepth>(), k);
    for (; k < stop; ++k) add(std::integral_constant<int, 1>(), k);
    for (int64_t row = 0; row < p.rows; ++row) {
      const float* from = sums.data() + row * stride;
      if (p.parts > 1) {
        std::copy(from, from + (last - first), p.partial + (part * p.rows + row) * p.width + first);
      } else {
        for (int64_t column = first; column < last; ++column) p.put(row, column, from[column - first]);
      }
    }
  }
}

// Adds up the parts of outputs `begin` to `end`.
template <typename Weight, typename Out>
void add_parts(const Product<Weight, Out>& p, int64_t begin, int64_t end) {
  const int64_t next = p.rows * p.width;
  for (int64_t row = 0; row < p.rows; ++row) {
    float* total = p.partial + row * p.width;
    for (int64_t part = 1; part < p.parts; ++part) {
      const float* from = total + part * next;
      for (int64_t column = begin; column < end; ++column) total[column] += from[column];
    }
    for (int64_t column = begin; column < end; ++column) p.put(row, column, total[column]);
  }
}

// `Outputs` outputs from `output` of a kernel (width, depth) for `Rows` rows from `row`: that many dot products.
template <int Outputs, int Rows, typename Weight, typename Out>
inline void dots(const Product<Weight, Out>& p, int64_t output, int64_t row) {
  Vector sums[Outputs][Rows] = {};
  const Weight* kernel = p.kernel + output * p.depth;
  const float* x = p.x + row * p.depth;
  auto add = [&](auto read, int64_t k) {
    Vector inputs[Rows];
    for (int r = 0; r < Rows; ++r) inputs[r] = read(x + r * p.depth + k);
    for (int o = 0; o < Outputs; ++o) {
      Vector weights = read(kernel + o * p.depth + k);
      for (int r = 0; r < Rows; ++r) sums[o][r] += weights * inputs[r];
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= p.depth; k += kLanes) {
    for (int o = 0; o < Outputs; ++o) __builtin_prefetch(kernel + (o + Outputs) * p.depth + k);
    add([](const auto* from) { return load(from); }, k);
  }
  if (k < p.depth) add([&](const auto* from) { return load_some(from, p.depth - k); }, k);
  constexpr int kSums = Outputs * Rows;
  Vector padded[(kSums + kLanes - 1) / kLanes * kLanes] = {};
  std::copy(&sums[0][0], &sums[0][0] + kSums, padded);
  float totals[sizeof padded / sizeof(Vector)];
  for (int first = 0; first < kSums; first += kLanes) {
    const Vector some = sums_of(padded + first);
    std::memcpy(totals + first, &some, sizeof some);
  }
  for (int n = 0; n < kSums; ++n) p.put(row + n % Rows, output + n / Rows, totals[n]);
}

template <int Outputs, typename Weight, typename Out>
inline void dots_of_rows(const Product<Weight, Out>& p, int64_t output) {
  int64_t row = 0;
  for (; row + kGroup <= p.rows; row += kGroup) dots<Outputs, kGroup>(p, output, row);
  for (; row < p.rows; ++row) dots<Outputs, 1>(p, output, row);
}

// Outputs `begin` to `end` of a kernel (width, depth).
template <typename Weight, typename Out>
void by_rows(const Product<Weight, Out>& p, int64_t begin, int64_t end) {
  int64_t output = begin;
  for (; output + kGroup <= end; output += kGroup) dots_of_rows<kGroup>(p, output);
  for (; output < end; ++output) dots_of_rows<1>(p, output);
}

// A piece of the work: a part of the sums of some outputs of one kernel.
struct FewPiece {
  int kernel, part;
  int64_t begin, end;
  int outputs;  // pieces of the same outputs have the same number
};

// The pieces, and how many parts each number of outputs has.
template <typename Weight, typename Out>
std::pair<std::vector<FewPiece>, std::vector<int>> divide(const std::vector<Product<Weight, Out>>& products,
                                                          int64_t threads) {
  constexpr int64_t kPiecesPerThread = 2;
  int64_t total = 0;
  for (const auto& product : products) total += product.width;
  std::vector<FewPiece> pieces;
  std::vector<int> parts;
  for (size_t kernel = 0; kernel < products.size(); ++kernel) {
    const auto& product = products[kernel];
    const int64_t wanted = (kPiecesPerThread * threads * product.width + total - 1) / total;
    const int64_t ranges = std::max<int64_t>(1, (wanted + product.parts - 1) / product.parts);
    const int64_t share = (product.width / ranges + kWide) / kWide * kWide;
    const int first = static_cast<int>(parts.size());
    for (int64_t begin = 0; begin < product.width; begin += share) parts.push_back(static_cast<int>(product.parts));
    for (int64_t part = 0; part < product.parts; ++part) {
      int outputs = first;
      for (int64_t begin = 0; begin < product.width; begin += share) {
        pieces.push_back({static_cast<int>(kernel), static_cast<int>(part), begin,
                          std::min(product.width, begin + share), outputs++});
      }
    }
  }
  return {std::move(pieces), std::move(parts)};
}

// All products, in pieces. `transposed`: kernels are (width, depth).
template <typename Weight, typename Out>
void multiply_few(xla::ffi::ThreadPool& pool, std::vector<Product<Weight, Out>>& products, bool transposed) {
  thread_local std::vector<float> partial;
  size_t needed = 0;
  for (const auto& product : products) {
    if (product.parts > 1) needed += product.parts * product.rows * product.width;
  }
  if (partial.size() < needed) partial.resize(needed);
  float* free = partial.data();
  for (auto& product : products) {
    product.partial = free;
    if (product.parts > 1) free += product.parts * product.rows * product.width;
  }
  const auto [pieces, parts] = divide(products, threads_of(pool));
  std::vector<std::atomic<int>> missing(parts.size());
  for (size_t outputs = 0; outputs < parts.size(); ++outputs) missing[outputs] = parts[outputs];
  share(pool, static_cast<int>(pieces.size()),
        [products = products.data(), pieces = pieces.data(), missing = missing.data(), transposed](int number) {
          const FewPiece& piece = pieces[number];
          const auto& product = products[piece.kernel];
          if (transposed) {
            by_rows(product, piece.begin, piece.end);
          } else {
            by_columns(product, piece.part, piece.begin, piece.end);
            if (missing[piece.outputs].fetch_sub(1, std::memory_order_acq_rel) == 1 && product.parts > 1) {
              add_parts(product, piece.begin, piece.end);  // whoever computed the last part
            }
          }
        });
}

}  // namespace spotjax

#endif  // SPOTJAX_FEW_ROWS_H_
