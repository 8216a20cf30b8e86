// Vectors of a CPU's natural size, by the extensions of GCC and Clang, and the types of elements that go through them.
#ifndef SPOTJAX_VECTORS_H_
#define SPOTJAX_VECTORS_H_

#include <cstdint>
#include <cstring>

namespace spotjax {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef int32_t Integers __attribute__((vector_size(kLanes * 4)));
typedef int16_t Shorts __attribute__((vector_size(kLanes * 2)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));

struct BFloat16 {
  uint16_t bits;
};

inline Vector load(const float* from) {
  Vector loaded;
  std::memcpy(&loaded, from, sizeof loaded);
  return loaded;
}

inline Vector load(const BFloat16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return reinterpret_cast<Vector>(__builtin_convertvector(halves, Words) << 16);
}

inline Vector load(const int8_t* from) {
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  // by way of 16 bits: GCC 12 widens each element alone otherwise
  return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(bytes, Shorts), Integers), Vector);
}

// The first `count` elements, zeros behind them.
template <typename T>
inline Vector load_some(const T* from, int64_t count) {
  T padded[kLanes] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return load(padded);
}

inline float widened(float value) { return value; }

inline float widened(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void store(float* to, float value) { *to = value; }

inline void store(BFloat16* to, float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = value != value ? 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  to->bits = static_cast<uint16_t>(bits >> 16);
}

inline Words lane_numbers() {
  Words numbers;
  for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = lane;
  return numbers;
}

inline Vector shuffle(Vector first, Vector second, Words lanes) {
#if defined(__clang__)
  Vector shuffled;
  for (int lane = 0; lane < kLanes; ++lane) {
    shuffled[lane] = lanes[lane] < kLanes ? first[lanes[lane]] : second[lanes[lane] - kLanes];
  }
  return shuffled;
#else
  return __builtin_shuffle(first, second, lanes);
#endif
}

// Lane i of the result is the sum of all lanes of vectors[i], for Count vectors; all are summed in the same order.
template <int Count = kLanes>
inline Vector sums_of(const Vector* vectors) {
  if constexpr (Count == 1) {
    return vectors[0];
  } else {
    constexpr int kStride = Count / 2;
    const Words lanes = lane_numbers(), odd = (lanes & kStride) * (kLanes / kStride);
    const Vector first = sums_of<kStride>(vectors), second = sums_of<kStride>(vectors + kStride);
    return shuffle(first, second, lanes + odd) + shuffle(first, second, (lanes ^ kStride) + odd);
  }
}

}  // namespace spotjax

#endif  // SPOTJAX_VECTORS_H_
