// Products of a few rows with large matrices, as calls from XLA programs on CPUs: y[n] = x times kernel[n].
//
// A decode step is bound by reading the weights once. Here every vector of weights is loaded into a register once and
// multiplied with all rows while it is there. Weights are float32, bfloat16, or int8 with a scale for each output;
// sums are float32. Every element of a result is summed in an order that depends on nothing but the matrix: it is the
// same whatever other rows or threads there are.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "vectors.h"
#include "work.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using spotjax::BFloat16;
using spotjax::kLanes;
using spotjax::load;
using spotjax::load_some;
using spotjax::store;
using spotjax::sums_of;
using spotjax::Vector;

constexpr int kDepth = 8;          // weights of one output that are in registers at once
constexpr int kWide = 2 * kLanes;  // outputs whose weights are in registers at once
constexpr int kGroup = 4;          // outputs, and rows, of a block of dot products
constexpr int64_t kPart = 128;     // inputs that are summed by themselves, at least,
constexpr int64_t kMostParts = 8;  // in so many parts at most,
constexpr int64_t kNarrow = 8192;  // where there are fewer outputs: see `parts_of`

// x (rows, depth) times a kernel, into y (rows, width).
template <typename Weight, typename Out>
struct Product {
  const float* x;
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

// Memory is read fastest in one piece. Kernels (depth, width) with short rows are therefore divided by depth, too: what
// a thread reads then lies together. The parts depend on the kernel only, and are added up in order.
inline int64_t parts_of(int64_t depth, int64_t width) {
  return width >= kNarrow ? 1 : std::clamp<int64_t>(depth / kPart, 1, kMostParts);
}

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
struct Piece {
  int kernel, part;
  int64_t begin, end;
  int outputs;  // pieces of the same outputs have the same number
};

// The pieces, and how many parts each number of outputs has.
template <typename Weight, typename Out>
std::pair<std::vector<Piece>, std::vector<int>> divide(const std::vector<Product<Weight, Out>>& products,
                                                       int64_t threads) {
  constexpr int64_t kPiecesPerThread = 2;
  int64_t total = 0;
  for (const auto& product : products) total += product.width;
  std::vector<Piece> pieces;
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

template <typename Weight, typename Out>
void compute(ffi::ThreadPool& pool, std::vector<Product<Weight, Out>> products, bool transposed) {
  thread_local std::vector<float> partial;
  size_t needed = 0;
  for (auto& product : products) {
    product.parts = transposed ? 1 : parts_of(product.depth, product.width);
    if (product.parts > 1) needed += product.parts * product.rows * product.width;
  }
  if (partial.size() < needed) partial.resize(needed);
  float* free = partial.data();
  for (auto& product : products) {
    product.partial = free;
    if (product.parts > 1) free += product.parts * product.rows * product.width;
  }
  const auto [pieces, parts] = divide(products, spotjax::threads_of(pool));
  std::vector<std::atomic<int>> missing(parts.size());
  for (size_t outputs = 0; outputs < parts.size(); ++outputs) missing[outputs] = parts[outputs];
  spotjax::share(pool, static_cast<int>(pieces.size()),
                 [products = products.data(), pieces = pieces.data(), missing = missing.data(), transposed](int number) {
                   const Piece& piece = pieces[number];
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

// `transposed`: kernels are (width, depth). Arguments are x, kernels, and where they are int8 their scales.
template <typename Weight, typename Out>
ffi::Error multiply(ffi::ThreadPool& pool, ffi::AnyBuffer x, ffi::RemainingArgs rest, ffi::RemainingRets results,
                    bool transposed) {
  const int64_t rows = x.dimensions()[0], depth = x.dimensions()[1];
  std::vector<float> widened;
  const float* inputs = nullptr;
  if constexpr (std::is_same_v<Out, float>) {
    inputs = x.typed_data<float>();
  } else {
    const auto* from = static_cast<const BFloat16*>(x.untyped_data());
    widened.resize(rows * depth);
    for (int64_t n = 0; n < rows * depth; ++n) widened[n] = spotjax::widened(from[n]);
    inputs = widened.data();
  }
  std::vector<Product<Weight, Out>> products;
  for (size_t number = 0; number < results.size(); ++number) {
    auto kernel = rest.get<ffi::AnyBuffer>(number);
    auto result = results.get<ffi::AnyBuffer>(number);
    if (kernel.has_error() || result.has_error()) return ffi::Error::InvalidArgument("a kernel is missing");
    const float* scale = nullptr;
    if constexpr (std::is_same_v<Weight, int8_t>) {
      auto scales = rest.get<ffi::AnyBuffer>(results.size() + number);
      if (scales.has_error()) return ffi::Error::InvalidArgument("scales are missing");
      scale = scales->typed_data<float>();
    }
    products.push_back({inputs, static_cast<const Weight*>(kernel->untyped_data()), scale,
                        static_cast<Out*>((*result)->untyped_data()), rows, depth, (*result)->dimensions()[1], 1, nullptr});
  }
  compute(pool, std::move(products), transposed);
  return ffi::Error::Success();
}

ffi::Error products(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs rest, ffi::RemainingRets results,
                    bool transposed) {
  auto kernel = rest.get<ffi::AnyBuffer>(0);
  if (kernel.has_error()) return ffi::Error::InvalidArgument("no kernel");
  const bool narrow = x.element_type() == ffi::BF16;
  switch (kernel->element_type()) {
    case ffi::F32:
      if (!narrow) return multiply<float, float>(pool, x, rest, results, transposed);
      break;
    case ffi::BF16:
      if (narrow) return multiply<BFloat16, BFloat16>(pool, x, rest, results, transposed);
      break;
    case ffi::S8:
      if (narrow) return multiply<int8_t, BFloat16>(pool, x, rest, results, transposed);
      return multiply<int8_t, float>(pool, x, rest, results, transposed);
    default:
      break;
  }
  return ffi::Error(ffi::ErrorCode::kUnimplemented, "no product of these types");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(spotjax_products, products,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("transposed"));
