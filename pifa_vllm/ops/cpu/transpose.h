// Blocks of kLanes tokens by kLanes features, turned about in registers.
#pragma once

#include <utility>

#include "vec.h"

namespace pifa {

// Lanes of a and, from kLanes on, of b.
template <int... kFrom>
inline vfloat shuffle(vfloat a, vfloat b) {
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, kFrom...);
#else
  typedef int32_t vint __attribute__((vector_size(kLanes * 4)));
  return __builtin_shuffle(a, b, vint{kFrom...});
#endif
}

// Of each pair of 2 x 2 blocks of kSize numbers, exchange what lies off the diagonal.
template <int kSize, int... kLane>
inline void exchange(vfloat (&rows)[kLanes], std::integer_sequence<int, kLane...>) {
  for (int i = 0; i < kLanes; ++i) {
    if (i & kSize) continue;
    const vfloat a = rows[i], b = rows[i + kSize];
    rows[i] = shuffle<(kLane & kSize ? kLane - kSize + kLanes : kLane)...>(a, b);
    rows[i + kSize] = shuffle<(kLane & kSize ? kLane + kLanes : kLane + kSize)...>(a, b);
  }
}

template <int kSize = 1>
inline void transpose(vfloat (&rows)[kLanes]) {
  exchange<kSize>(rows, std::make_integer_sequence<int, kLanes>{});
  if constexpr (2 * kSize < kLanes) transpose<2 * kSize>(rows);
}

template <typename X>
inline vfloat load_floats(const X* p) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = to_float(p[i]);
  return load(lanes);
}

template <typename X>
inline void store_floats(vfloat v, X* p) {
  float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) from_float(lanes[i], p + i);
}

}  // namespace pifa
