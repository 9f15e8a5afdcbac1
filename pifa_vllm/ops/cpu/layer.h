// What both kernels compute on.
#pragma once

#include <algorithm>
#include <atomic>
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

// Rows handed to threads by a counter: a core that another process delays gets fewer.
class Chunks {
 public:
  // At most max_rows in a chunk, a multiple of `multiple`, and enough chunks to share them evenly.
  Chunks(int64_t rows, int64_t multiple, int64_t max_rows, int threads) : rows_(rows) {
    size_ = std::max<int64_t>(std::min(rows / (8 * threads), max_rows) / multiple, 1) * multiple;
  }
  int64_t count() const { return (rows_ + size_ - 1) / size_; }
  int64_t begin(int64_t chunk) const { return chunk * size_; }
  int64_t end(int64_t chunk) const { return std::min(rows_, (chunk + 1) * size_); }

 private:
  int64_t rows_, size_;
};

}  // namespace pifa
