// Attention over KV pages, as a call from XLA programs on CPUs: writes a step's keys and values into the pages, in
// place, and mixes for every query the values that it sees. Reads no more pages than a row's context has.
//
// No row may read what another row of the same step writes. Sums and weights are float32; what a query gives depends
// on nothing but its own context.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "vectors.h"
#include "work.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using spotjax::BFloat16;
using spotjax::Integers;
using spotjax::kLanes;
using spotjax::load;
using spotjax::load_some;
using spotjax::store;
using spotjax::Vector;

constexpr int kMostQueries = 4;  // of one kv head that are computed at once
constexpr int kBlock = 16;       // positions of a chunk of prompt that a thread takes at once

// One layer's attention. Letters as everywhere: B rows, T positions of a row, N query heads, K kv heads, H head size,
// G page size.
template <typename Element>
struct Attention {
  const Element *query, *new_keys, *new_values;  // (B, T, N, H), twice (B, T, K, H)
  const int32_t *rows, *table;                   // (B, 2 + T): first position, valid positions; (B, pages of a row)
  Element *keys, *values, *mixed;                // (pages, K, H, G), (pages, K, G, H), (B, T, N, H)
  int64_t batch, span, heads, kv_heads, size, page_size, row_pages;
  float scale, softcap;  // a cap of 0 is none
  int64_t window;        // 0 for none

  int64_t start(int64_t row) const { return rows[row * (2 + span)]; }
  int64_t length(int64_t row) const { return rows[row * (2 + span) + 1]; }

  // Where a page of a row begins, of one kv head; the same in keys and values.
  int64_t place(int64_t row, int64_t number, int64_t head) const {
    return (table[row * row_pages + number] * kv_heads + head) * size * page_size;
  }
};

// e to the x, for x of 0 and less: to the power of two next to it, and a polynomial for the rest (Cephes, Moshier).
inline Vector exponential(Vector x) {
  const Vector turns = x * 1.44269504088896341f + 12582912.0f;  // the sum has no bits below 1
  const Vector whole = turns - 12582912.0f;
  const Vector rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vector sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  const Integers power = (__builtin_convertvector(whole, Integers) + 127) << 23;
  return x < -87.0f ? Vector{} : sum * reinterpret_cast<Vector>(power);
}

// Keys and values of the step at the `position`-th position of a row.
template <typename Element>
void write(const Attention<Element>& a, int64_t row, int64_t head, int64_t position) {
  const int64_t at = a.start(row) + position, slot = at % a.page_size;
  const int64_t page = a.place(row, at / a.page_size, head);
  const int64_t from = ((row * a.span + position) * a.kv_heads + head) * a.size;
  for (int64_t h = 0; h < a.size; ++h) a.keys[page + h * a.page_size + slot] = a.new_keys[from + h];
  std::copy(a.new_values + from, a.new_values + from + a.size, a.values + page + slot * a.size);
}

// Scores of `Queries` queries (Queries, H) for the positions of one page, into `scores`, `stride` apart. Has the page's
// values and the next page's keys fetched meanwhile: pages lie anywhere, and the machine does not guess where.
template <int Queries, typename Element>
inline void score(const Attention<Element>& a, const float* queries, int64_t page, int64_t next, float* scores,
                  int64_t stride) {
  const Element *keys = a.keys + page, *values = a.values + page, *next_keys = a.keys + next;
  for (int64_t slot = 0; slot < a.page_size; slot += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, a.page_size - slot);
    Vector even[Queries] = {}, odd[Queries] = {};
    auto add = [&](Vector* sums, int64_t h) {
      const int64_t offset = h * a.page_size + slot;
      const Element* from = keys + offset;
      __builtin_prefetch(next_keys + offset);
      __builtin_prefetch(values + offset, 0, 2);
      const Vector key = count == kLanes ? load(from) : load_some(from, count);
      for (int q = 0; q < Queries; ++q) sums[q] += key * queries[q * a.size + h];
    };
    int64_t h = 0;
    for (; h + 1 < a.size; h += 2) {
      add(even, h);
      add(odd, h + 1);
    }
    if (h < a.size) add(even, h);
    for (int q = 0; q < Queries; ++q) {
      const Vector sum = (even[q] + odd[q]) * a.scale;
      std::memcpy(scores + q * stride + slot, &sum, count * sizeof(float));
    }
  }
}

// Turns scores `first` to `last` of `count` into weights, zeros elsewhere; returns what they are to be multiplied with.
template <typename Element>
inline float weigh(const Attention<Element>& a, float* scores, int64_t first, int64_t last, int64_t count) {
  if (a.softcap != 0) {
    for (int64_t n = first; n < last; ++n) scores[n] = a.softcap * std::tanh(scores[n] / a.softcap);
  }
  std::fill(scores, scores + first, -std::numeric_limits<float>::infinity());
  std::fill(scores + last, scores + count, -std::numeric_limits<float>::infinity());
  Vector most = load(scores), total = {};
  for (int64_t n = kLanes; n < count; n += kLanes) {
    const Vector some = load(scores + n);
    most = some > most ? some : most;
  }
  float lanes[kLanes];
  std::memcpy(lanes, &most, sizeof most);
  const float greatest = *std::max_element(lanes, lanes + kLanes);
  for (int64_t n = 0; n < count; n += kLanes) {
    const Vector weights = exponential(load(scores + n) - greatest);
    std::memcpy(scores + n, &weights, sizeof weights);
    total += weights;
  }
  std::memcpy(lanes, &total, sizeof total);
  float sum = 0;
  for (float lane : lanes) sum += lane;
  return 1 / sum;
}

// Adds up `Wide` vectors of weighted values from `h`, for positions `first` to `last` of a row.
template <int Queries, int Wide, typename Element>
inline void mix(const Attention<Element>& a, int64_t row, int64_t head, int64_t h, const float* weights, int64_t stride,
                int64_t before, int64_t first, int64_t last, const float* factors, Element* mixed) {
  Vector sums[Queries][Wide] = {};
  const int64_t count = std::min<int64_t>(Wide * kLanes, a.size - h);
  for (int64_t at = first; at < last;) {
    const int64_t number = at / a.page_size, stop = std::min(last, (number + 1) * a.page_size);
    const Element* values = a.values + a.place(row, number, head) + h;
    for (; at < stop; ++at) {
      const Element* from = values + at % a.page_size * a.size;
      Vector some[Wide];
      for (int v = 0; v < Wide; ++v) some[v] = count == Wide * kLanes ? load(from + v * kLanes) : load_some(from, count);
      for (int q = 0; q < Queries; ++q) {
        const float weight = weights[q * stride + at - before];
        for (int v = 0; v < Wide; ++v) sums[q][v] += some[v] * weight;
      }
    }
  }
  for (int q = 0; q < Queries; ++q) {
    float out[Wide * kLanes];
    std::memcpy(out, sums[q], sizeof out);
    for (int64_t n = 0; n < count; ++n) store(mixed + q * a.size + h + n, out[n] * factors[q]);
  }
}

// `Queries` query heads from `number` of a kv head, at one position.
template <int Queries, typename Element>
void attend(const Attention<Element>& a, int64_t row, int64_t position, int64_t head, int64_t number) {
  const int64_t last = a.start(row) + position + 1, first = a.window ? std::max<int64_t>(0, last - a.window) : 0;
  const int64_t begin = first / a.page_size, end = (last + a.page_size - 1) / a.page_size;
  const int64_t before = begin * a.page_size, context = (end - begin) * a.page_size;
  const int64_t stride = (context + kLanes - 1) / kLanes * kLanes;
  const int64_t from = ((row * a.span + position) * a.heads + number) * a.size;
  thread_local std::vector<float> scratch;
  scratch.resize(Queries * (stride + a.size));
  float *queries = scratch.data(), *scores = queries + Queries * a.size, factors[Queries];
  for (int64_t n = 0; n < Queries * a.size; ++n) queries[n] = spotjax::widened(a.query[from + n]);
  for (int64_t page = begin; page < end; ++page) {
    float* into = scores + (page - begin) * a.page_size;
    const int64_t next = std::min(page + 1, end - 1);
    score<Queries>(a, queries, a.place(row, page, head), a.place(row, next, head), into, stride);
  }
  for (int q = 0; q < Queries; ++q) factors[q] = weigh(a, scores + q * stride, first - before, last - before, stride);
  int64_t h = 0;
  for (; h + 4 * kLanes <= a.size; h += 4 * kLanes) {
    mix<Queries, 4>(a, row, head, h, scores, stride, before, first, last, factors, a.mixed + from);
  }
  for (; h < a.size; h += kLanes) {
    mix<Queries, 1>(a, row, head, h, scores, stride, before, first, last, factors, a.mixed + from);
  }
}

// All queries of a kv head at one position.
template <typename Element>
void attend_all(const Attention<Element>& a, int64_t row, int64_t position, int64_t head) {
  const int64_t group = a.heads / a.kv_heads, stop = (head + 1) * group;
  if (position >= a.length(row)) {
    Element* mixed = a.mixed + ((row * a.span + position) * a.heads + head * group) * a.size;
    std::fill(mixed, mixed + group * a.size, Element{});
    return;
  }
  int64_t number = head * group;
  for (; number + kMostQueries <= stop; number += kMostQueries) {
    attend<kMostQueries>(a, row, position, head, number);
  }
  switch (stop - number) {
    case 3:
      return attend<3>(a, row, position, head, number);
    case 2:
      return attend<2>(a, row, position, head, number);
    case 1:
      return attend<1>(a, row, position, head, number);
    default:
      return;
  }
}

template <typename Element>
void run(ffi::ThreadPool& pool, const Attention<Element>& a) {
  const int64_t blocks = (a.span + kBlock - 1) / kBlock;
  const auto write_all = [](const Attention<Element>& a, int64_t row, int64_t head) {
    for (int64_t position = 0; position < a.length(row); ++position) write(a, row, head, position);
  };
  if (a.span > 1) {  // all of a row's keys and values before the first block of its queries
    spotjax::share(pool, static_cast<int>(a.batch * a.kv_heads), [&a, write_all](int piece) {
      write_all(a, piece / a.kv_heads, piece % a.kv_heads);
    });
  }
  spotjax::share(pool, static_cast<int>(a.batch * a.kv_heads * blocks), [&a, blocks, write_all](int piece) {
    const int64_t block = piece % blocks, head = piece / blocks % a.kv_heads, row = piece / blocks / a.kv_heads;
    if (a.span == 1) write_all(a, row, head);
    for (int64_t position = block * kBlock; position < std::min(a.span, (block + 1) * kBlock); ++position) {
      attend_all(a, row, position, head);
    }
  });
}

template <typename Element>
ffi::Error attention_of(ffi::ThreadPool& pool, ffi::AnyBuffer query, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                        ffi::AnyBuffer rows, ffi::AnyBuffer table, ffi::Result<ffi::AnyBuffer> mixed,
                        ffi::Result<ffi::AnyBuffer> key_pages, ffi::Result<ffi::AnyBuffer> value_pages, float scale,
                        float softcap, int64_t window) {
  auto data = [](auto& buffer) { return static_cast<Element*>(buffer.untyped_data()); };
  const auto shape = query.dimensions();
  run(pool, Attention<Element>{data(query), data(keys), data(values), rows.typed_data<int32_t>(),
                               table.typed_data<int32_t>(), data(*key_pages), data(*value_pages), data(*mixed),
                               shape[0], shape[1], shape[2], keys.dimensions()[2], shape[3],
                               key_pages->dimensions()[3], table.dimensions()[1], scale, softcap, window});
  return ffi::Error::Success();
}

// The pages are given and returned in the same memory.
ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer query, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                     ffi::AnyBuffer rows, ffi::AnyBuffer table, ffi::AnyBuffer given_keys, ffi::AnyBuffer given_values,
                     ffi::Result<ffi::AnyBuffer> mixed, ffi::Result<ffi::AnyBuffer> key_pages,
                     ffi::Result<ffi::AnyBuffer> value_pages, float scale, float softcap, int64_t window) {
  if (given_keys.untyped_data() != key_pages->untyped_data() ||
      given_values.untyped_data() != value_pages->untyped_data()) {
    return ffi::Error::Internal("pages were copied");
  }
  switch (query.element_type()) {
    case ffi::F32:
      return attention_of<float>(pool, query, keys, values, rows, table, mixed, key_pages, value_pages, scale, softcap,
                                 window);
    case ffi::BF16:
      return attention_of<BFloat16>(pool, query, keys, values, rows, table, mixed, key_pages, value_pages, scale,
                                    softcap, window);
    default:
      return ffi::Error(ffi::ErrorCode::kUnimplemented, "no attention of this type");
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(spotjax_attention, attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()   // query
                                  .Arg<ffi::AnyBuffer>()   // keys
                                  .Arg<ffi::AnyBuffer>()   // values
                                  .Arg<ffi::AnyBuffer>()   // rows
                                  .Arg<ffi::AnyBuffer>()   // table
                                  .Arg<ffi::AnyBuffer>()   // key pages
                                  .Arg<ffi::AnyBuffer>()   // value pages
                                  .Ret<ffi::AnyBuffer>()   // mixed
                                  .Ret<ffi::AnyBuffer>()   // key pages
                                  .Ret<ffi::AnyBuffer>()   // value pages
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window"));
