// What both kernels compute on.
#pragma once

#include <cstdint>
#include <vector>

namespace pifa {

// One matrix [rank + rest, n] of a layer. Stacked rows are numbered as in `Layer::out_rows`.
template <typename W>
struct Shard {
  int64_t rank, rest;
  const W* coefficients;   // [rest, rank]
  int64_t pivot_begin;     // stacked row of its first pivot row
  int64_t rest_begin;      // stacked row of its first remaining row
};

template <typename W>
struct Layer {
  int64_t n;               // input features
  int64_t pivots;          // Σ rank
  int64_t outputs;         // Σ (rank + rest)
  const W* pivot_weight;   // [pivots, n]
  const int32_t* out_rows; // [outputs]: stacked row -> output column; nullptr where that is the same
  const W* bias;           // [outputs] or nullptr
  std::vector<Shard<W>> shards;
  bool pivots_are_outputs = true;  // false in a plain low-rank layer

  int64_t column(int64_t stacked) const { return out_rows ? out_rows[stacked] : stacked; }
};

}  // namespace pifa
