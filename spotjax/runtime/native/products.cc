// Products with large matrices, as calls from XLA programs on CPUs: y[n] = x times kernel[n].
//
// Weights are float32, bfloat16, or int8 with a scale for each output; sums are float32. Every element of a result is
// summed in an order that depends on nothing but the matrix: it is the same whatever other rows or threads there are.
// Rows that are padding are not computed; what they give is zero.

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "few_rows.h"
#include "many_rows.h"
#include "product.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using spotjax::BFloat16;
using spotjax::Block;
using spotjax::Product;
using Lengths = ffi::Buffer<ffi::S32>;  // (B,) valid positions of rows (B, T)

constexpr int64_t kFewRows = 32;  // up to so many rows are bound by reading weights

// The rows that are no padding.
struct Rows {
  std::vector<Block> blocks;
  int64_t last;  // the row behind the last of them
};

// Of each of `spans` spans the first `lengths`.
Rows valid_rows(const int32_t* lengths, int64_t spans, int64_t rows) {
  const int64_t span = rows / spans;
  Rows found{{}, 0};
  for (int64_t number = 0; number < spans; ++number) {
    const int64_t count = std::min<int64_t>(lengths[number], span);
    if (count == 0) continue;
    spotjax::add_blocks(found.blocks, number * span, count);
    found.last = number * span + count;
  }
  return found;
}

// Zeros between the blocks and behind them.
template <typename Weight, typename Out>
void clear_padding(const Product<Weight, Out>& product, const std::vector<Block>& blocks, int64_t rows) {
  int64_t row = 0;
  for (const Block& block : blocks) {
    std::fill(product.y + row * product.width, product.y + block.row * product.width, Out{});
    row = block.row + block.count;
  }
  std::fill(product.y + row * product.width, product.y + rows * product.width, Out{});
}

// `transposed`: kernels are (width, depth). Arguments are x (B * T, depth), lengths (B,), kernels, and where they are
// int8 their scales.
template <typename Weight, typename Out>
ffi::Error multiply(ffi::ThreadPool& pool, ffi::AnyBuffer x, Lengths lengths, ffi::RemainingArgs rest,
                    ffi::RemainingRets results, bool transposed) {
  const int64_t all = x.dimensions()[0], depth = x.dimensions()[1];
  const Rows rows = valid_rows(lengths.typed_data(), lengths.element_count(), all);
  const bool few = transposed || rows.last <= kFewRows;
  const Out* given = static_cast<const Out*>(x.untyped_data());
  std::vector<float> widened;
  const float* inputs = nullptr;
  if constexpr (std::is_same_v<Out, float>) {
    inputs = given;
  } else if (few) {
    widened.resize(rows.last * depth);
    spotjax::widen(given, rows.last * depth, widened.data());
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
    const int64_t width = (*result)->dimensions()[1], parts = transposed ? 1 : spotjax::parts_of(depth, width);
    auto* y = static_cast<Out*>((*result)->untyped_data());
    products.push_back({given, inputs, static_cast<const Weight*>(kernel->untyped_data()), scale, y, rows.last, depth,
                        width, parts, nullptr});
  }
  if (!few) {
    spotjax::multiply_many(pool, products, rows.blocks);
  } else if (rows.last > 0) {
    spotjax::multiply_few(pool, products, transposed);
  }
  for (const auto& product : products) clear_padding(product, rows.blocks, all);
  return ffi::Error::Success();
}

ffi::Error products(ffi::ThreadPool pool, ffi::AnyBuffer x, Lengths lengths, ffi::RemainingArgs rest,
                    ffi::RemainingRets results, bool transposed) {
  auto kernel = rest.get<ffi::AnyBuffer>(0);
  if (kernel.has_error()) return ffi::Error::InvalidArgument("no kernel");
  const bool narrow = x.element_type() == ffi::BF16;
  switch (kernel->element_type()) {
    case ffi::F32:
      if (!narrow) return multiply<float, float>(pool, x, lengths, rest, results, transposed);
      break;
    case ffi::BF16:
      if (narrow) return multiply<BFloat16, BFloat16>(pool, x, lengths, rest, results, transposed);
      break;
    case ffi::S8:
      if (narrow) return multiply<int8_t, BFloat16>(pool, x, lengths, rest, results, transposed);
      return multiply<int8_t, float>(pool, x, lengths, rest, results, transposed);
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
                                  .Arg<Lengths>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("transposed"));
