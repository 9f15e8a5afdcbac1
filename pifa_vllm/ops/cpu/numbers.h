// Quantized weights, read as 16-bit integers, and products of those, exact in 32 bits. See `pifa_vllm.quantization` for
// how they are stored.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include <c10/util/Half.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "vec.h"

namespace pifa {

// kLanes sums, or as many pairs of neighbouring 16-bit numbers.
typedef int32_t vint __attribute__((vector_size(kLanes * 4)));
typedef int16_t vshort __attribute__((vector_size(kLanes * 4)));
typedef int16_t vshort_unaligned __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));
typedef int8_t vbyte_unaligned __attribute__((vector_size(kLanes * 2), aligned(1), may_alias));
typedef int32_t vint_unaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

constexpr int kShorts = 2 * kLanes;       // 16-bit numbers of a vector
constexpr int kBlock = 32;                // numbers of a row that are read at once
constexpr int kParts = kBlock / kShorts;  // vectors of them

// Activations share a scale over so many features: what a sum holds of them, times weights of up to 127, stays below
// 2^31 (256 * 127 * 32767), and one large activation spoils no more than its neighbours.
constexpr int64_t kChunk = 256;
constexpr float kLargest = 32767.0f;

// sums + a b, neighbours added.
inline vint add_products(vint sums, vint a, vint b) {
#if PIFA_LANES == 16 && defined(__AVX512VNNI__)
  return (vint)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif PIFA_LANES == 16 && defined(__AVX512BW__)
  return sums + (vint)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif PIFA_LANES == 8 && defined(__AVX2__)
  return sums + (vint)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  // Shifts keep the sign.
  return sums + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

inline vint load_pairs(const int16_t* p) { return (vint)(vshort)*reinterpret_cast<const vshort_unaligned*>(p); }
inline vfloat to_floats(vint v) { return __builtin_convertvector(v, vfloat); }
inline vint splat(int32_t v) { return v - vint{}; }

// To nearest, of numbers below 2^22: they end up in the lowest bits of a float as large as this.
inline vint round(vfloat v) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  return (vint)(v + kMagic) - 0x4b400000;
}

inline float to_float(c10::Half v) {
#if defined(__F16C__)
  return _cvtsh_ss(v.x);
#else
  return float(v);
#endif
}

// How a row of numbers of 8 bits is stored: as it is.
struct Int8 {
  static int64_t width(int64_t k) { return k; }

  // Numbers 32 b to 32 b + 31 of a row.
  static void read(const uint8_t* row, int64_t b, vint (&out)[kParts]) {
    for (int i = 0; i < kParts; ++i)
      out[i] = (vint)__builtin_convertvector(
          *reinterpret_cast<const vbyte_unaligned*>(row + b * kBlock + i * kShorts), vshort);
  }
};

// Of 4 bits: the halves of a block share bytes. What lies beyond k is zero where it was packed.
struct Int4 {
  static int64_t width(int64_t k) { return (k + kBlock - 1) / kBlock * (kBlock / 2); }

  static void read(const uint8_t* row, int64_t b, vint (&out)[kParts]) {
    typedef uint8_t bytes __attribute__((vector_size(kBlock / 2)));
    typedef uint8_t block __attribute__((vector_size(kBlock)));
    typedef int16_t wide __attribute__((vector_size(2 * kBlock)));
    bytes packed;
    std::memcpy(&packed, row + b * (kBlock / 2), sizeof packed);
    // In one piece: what is stored in two and read as one vector has to wait for both.
    const bytes low = packed & 15, high = packed >> 4;
    const block whole = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17,
                                                18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
    const wide numbers = __builtin_convertvector(whole, wide) - int16_t(8);
    static_assert(sizeof numbers == sizeof out);
    std::memcpy(&out, &numbers, sizeof numbers);
  }
};

// One matrix [rows, k] of quantized numbers.
struct Quantized {
  const uint8_t* numbers;   // [rows, width]
  const c10::Half* scales;  // [rows, groups]
  bool four;                // bits, or eight
  int64_t k, width, groups;
  int64_t segment;          // blocks of a row that share a scale, as many as a chunk of activations has at most

  const uint8_t* row(int64_t r) const { return numbers + r * width; }
  // Of the group that segment i of row r is in.
  float scale(int64_t r, int64_t i) const { return to_float(scales[r * groups + (groups > 1 ? i : 0)]); }
};

// The last numbers of a row that ends within a block, zero beyond it.
template <typename Q>
inline void read_last(const uint8_t* row, int64_t k, vint (&out)[kParts]) {
  const int64_t b = k / kBlock, bytes = Q::width(k) - Q::width(b * kBlock);
  uint8_t padded[kBlock] = {};
  std::memcpy(padded, row + Q::width(b * kBlock), bytes);
  Q::read(padded, 0, out);
}

// Write up to kChunk numbers as integers, and zeros up to a whole block, times the scale that is returned: NaN where one
// of them is not finite.
template <typename X>
float quantize(const X* x, int64_t count, int16_t* out) {
  float values[kChunk] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = to_float(x[i]);
  const int64_t end = (count + kBlock - 1) / kBlock * kBlock;
  vfloat peaks{};
  vint odd{};
  for (int64_t i = 0; i < end; i += kLanes) {
    const vfloat v = load(values + i), size = v < 0.0f ? -v : v;
    peaks = size > peaks ? size : peaks;
    odd |= v - v != vfloat{};
  }
  float peak = 0.0f;
  bool finite = true;
  for (int i = 0; i < kLanes; ++i) {
    peak = std::max(peak, peaks[i]);
    finite &= odd[i] == 0;
  }
  const float factor = kLargest / peak;
  if (!finite || !(factor <= std::numeric_limits<float>::max())) {
    std::fill_n(out, end, int16_t(0));
    return finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  for (int64_t i = 0; i < end; i += kLanes) {
    const vint rounded = round(load(values + i) * splat(factor));
    for (int j = 0; j < kLanes; ++j) out[i + j] = int16_t(rounded[j]);
  }
  return peak / kLargest;
}

}  // namespace pifa
