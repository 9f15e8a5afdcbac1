// What both kernels compute on.
#pragma once

#include <cstdint>
#include <vector>

namespace pifa {

// One matrix [rank + rest, n] of a layer. Stacked rows are numbered as in `Layer::out_rows`.
template <typename M>
struct Shard {
  int64_t rank, rest;
  M coefficients;          // [rest, rank]
  int64_t pivot_begin;     // stacked row of its first pivot row
  int64_t rest_begin;      // stacked row of its first remaining row
};

// Activations are X; a matrix is as many of them, or what M says.
template <typename X, typename M = const X*>
struct Layer {
  int64_t n;               // input features
  int64_t pivots;          // Σ rank
  int64_t outputs;         // Σ (rank + rest)
  M pivot_weight;          // [pivots, n]
  const int32_t* out_rows; // [outputs]: stacked row -> output column; nullptr where that is the same
  const X* bias;           // [outputs] or nullptr
  std::vector<Shard<M>> shards;
  bool pivots_are_outputs = true;  // false in a plain low-rank layer

  int64_t column(int64_t stacked) const { return out_rows ? out_rows[stacked] : stacked; }
};

}  // namespace pifa
