// Float vectors of the width that the machine has, and weights read as floats.
#pragma once

#include <cstdint>
#include <cstring>

namespace pifa {

#if defined(PIFA_LANES)  // tests
#elif defined(__AVX512F__)
#define PIFA_LANES 16
#else
#define PIFA_LANES 8
#endif
constexpr int kLanes = PIFA_LANES;

// The compiler lowers these to whatever the target has; aligned(4) allows unaligned loads.
typedef float vfloat __attribute__((vector_size(kLanes * 4)));
typedef float vfloat_unaligned __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef uint32_t vuint __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vuint_unaligned __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));

struct bfloat16 {
  uint16_t bits;
};

inline vfloat load(const float* p) { return *reinterpret_cast<const vfloat_unaligned*>(p); }
inline void store(float* p, vfloat v) { *reinterpret_cast<vfloat_unaligned*>(p) = v; }

inline vfloat splat(float v) { return v - vfloat{}; }

inline float to_float(float v) { return v; }
inline float to_float(bfloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline void from_float(float v, float* p) { *p = v; }
inline void from_float(float v, bfloat16* p) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) {
    p->bits = uint16_t(bits >> 16) | 0x40;  // rounding could turn a NaN into an infinity
  } else {
    p->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
  }
}

inline float sum(vfloat v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// A group of weights is what one load of a vector register brings: kLanes floats, or 2 * kLanes bfloat16. The
// even elements of a bfloat16 group become floats by a shift and the odd ones by a mask, without any shuffle;
// what they are multiplied with is staged in the same order, evens first (see `place`).
template <typename W>
constexpr int kGroup = kLanes * int(4 / sizeof(W));

// Where element i of a row goes in the staged order.
template <typename W>
inline int64_t place(int64_t i) {
  if (sizeof(W) == 4) return i;
  const int64_t within = i % kGroup<W>;
  return i - within + within / 2 + (within % 2) * kLanes;
}

inline void expand(const float* p, vfloat (&out)[1]) { out[0] = load(p); }
inline void expand(const bfloat16* p, vfloat (&out)[2]) {
  const vuint raw = *reinterpret_cast<const vuint_unaligned*>(p);
  out[0] = (vfloat)(raw << 16);
  out[1] = (vfloat)(raw & 0xffff0000u);
}

}  // namespace pifa
