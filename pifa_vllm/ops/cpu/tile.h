// The register tile of everything but dot products: rows of weights times vectors of tokens.
#pragma once

#include "vec.h"

namespace pifa {

constexpr int64_t kBlockDepth = 256;  // of the inner dimension: a block of activations fits in the first cache

struct Nothing {
  void operator()(int64_t) const {}
};

// sums [R, V * kLanes] += w [R, depth] (rows ldw apart) times x [depth, V * kLanes]. Weights are broadcast from where
// they lie. ahead(i) is called before the elements from i on, to prefetch what comes after this tile.
template <int R, int V, typename Ahead = Nothing>
inline void multiply_tile(const float* w, int64_t ldw, const float* x, int64_t depth, float* sums,
                          const Ahead& ahead = {}) {
  constexpr int64_t kWidth = V * kLanes;
  // With one vector of tokens, two sums for each row: a multiply-add has to wait for the last one's result otherwise.
  constexpr int kSums = V == 1 ? 2 : 1;
  vfloat acc[kSums][R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      acc[0][r][v] = load(sums + r * kWidth + v * kLanes);
      if (kSums == 2) acc[kSums - 1][r][v] = vfloat{};
    }
  const int64_t whole = depth - depth % kSums;
  for (int64_t i = 0; i < whole; i += kSums) {
    ahead(i);
    for (int s = 0; s < kSums; ++s)
      for (int r = 0; r < R; ++r) {
        const vfloat wide = splat(w[r * ldw + i + s]);
        for (int v = 0; v < V; ++v) acc[s][r][v] += wide * load(x + (i + s) * kWidth + v * kLanes);
      }
  }
  for (int64_t i = whole; i < depth; ++i)
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) acc[0][r][v] += splat(w[r * ldw + i]) * load(x + i * kWidth + v * kLanes);
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      if (kSums == 2) acc[0][r][v] += acc[kSums - 1][r][v];
      store(sums + r * kWidth + v * kLanes, acc[0][r][v]);
    }
}

// Copy w [rows, depth] (rows ldw apart) to floats, rows kBlockDepth apart.
template <typename W>
inline void widen(const W* w, int64_t ldw, int64_t rows, int64_t depth, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < depth; ++i) out[r * kBlockDepth + i] = to_float(w[r * ldw + i]);
  }
}

}  // namespace pifa
