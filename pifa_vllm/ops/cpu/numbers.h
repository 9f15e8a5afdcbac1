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
typedef int8_t vbyte __attribute__((vector_size(kLanes * 2)));
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

inline vint widen_bytes(vbyte v) {
#if PIFA_LANES == 16 && defined(__AVX512BW__)
  return (vint)_mm512_cvtepi8_epi16((__m256i)v);
#elif PIFA_LANES == 8 && defined(__AVX2__)
  return (vint)_mm256_cvtepi8_epi16((__m128i)v);
#else
  return (vint)__builtin_convertvector(v, vshort);
#endif
}

// How a row of numbers of 8 bits is stored: as it is.
struct Int8 {
  static int64_t width(int64_t k) { return k; }

  // Numbers 32 b to 32 b + 31 of a row.
  static void read(const uint8_t* row, int64_t b, vint (&out)[kParts]) {
    for (int i = 0; i < kParts; ++i)
      out[i] = widen_bytes(*reinterpret_cast<const vbyte_unaligned*>(row + b * kBlock + i * kShorts));
  }
};

// Of 4 bits: the halves of a block share bytes. What lies beyond k is zero where it was packed.
struct Int4 {
  static int64_t width(int64_t k) { return (k + kBlock - 1) / kBlock * (kBlock / 2); }

  static void read(const uint8_t* row, int64_t b, vint (&out)[kParts]) {
#if PIFA_LANES == 16 && defined(__AVX512BW__)
    const __m256i packed = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + b * (kBlock / 2))));
    const __m256i low = _mm256_and_si256(packed, _mm256_set1_epi16(15)), high = _mm256_srli_epi16(packed, 4);
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    out[0] = (vint)_mm512_sub_epi16(both, _mm512_set1_epi16(8));
#else
    typedef uint8_t half __attribute__((vector_size(kBlock / 2)));
    half packed;
    std::memcpy(&packed, row + b * (kBlock / 2), sizeof packed);
    const half low = (packed & 15) - 8, high = (packed >> 4) - 8;
#if PIFA_LANES == 16
    // In registers: what is stored in two pieces and loaded as one has to wait for both.
    out[0] = widen_bytes((vbyte)__builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
                                                        16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31));
#else
    out[0] = widen_bytes((vbyte)low);
    out[1] = widen_bytes((vbyte)high);
#endif
#endif
  }
};

// One matrix [rows, k] of quantized numbers.
struct Quantized {
  const uint8_t* numbers;   // [rows, width]
  const c10::Half* scales;  // [rows, groups]
  bool four;                // bits, or eight
  int64_t rows, k, width, groups;
  int64_t segment;          // blocks of a row that share a scale, as many as a chunk of activations has at most

  const uint8_t* row(int64_t r) const { return numbers + r * width; }

  // Scales of the segments of row r in a chunk of its numbers.
  void read_scales(int64_t r, int64_t chunk, float (&out)[kChunk / kBlock]) const {
    const int64_t of_chunk = kChunk / kBlock / segment, first = groups > 1 ? chunk * of_chunk : 0;
    const c10::Half* const from = scales + r * groups + first;
    const int64_t count = std::min(of_chunk, groups - first);
#if defined(__F16C__)
    if (count == 8) {
      _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
      return;
    }
#endif
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(from[i]);
  }
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
