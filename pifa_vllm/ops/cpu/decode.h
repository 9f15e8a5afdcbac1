// Few tokens: bound by the bytes of the weights. Each is read once, in the layout of the checkpoint.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>

#include "dot.h"
#include "panel.h"

namespace pifa {

// Of weights, per chunk: long enough a stream for the hardware's prefetchers.
constexpr int64_t kChunkBytes = 64 * 1024;

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

// Floats of scratch that `decode` needs: staged inputs, and staged pivot outputs of each shard.
template <typename Rows, typename W>
int64_t decode_scratch(const Layer<W>& layer) {
  int64_t floats = Rows::floats(layer.n);
  for (const auto& shard : layer.shards) floats += Rows::floats(shard.rank);
  return floats;
}

// y [tokens, outputs] = layer(x [tokens, n]), tokens <= Rows::kTokens.
template <typename Rows, typename W>
void decode(const Layer<W>& layer, const W* x, W* y, int tokens, float* scratch, int threads) {
  float* const staged_x = scratch;
  std::vector<float*> staged_y;
  const Chunks pivots(layer.pivots, Rows::kRows, kChunkBytes / (layer.n * sizeof(W) + 1), threads);
  std::vector<Chunks> rests;
  std::vector<int64_t> first{0};
  float* next = scratch + Rows::floats(layer.n);
  for (const auto& shard : layer.shards) {
    staged_y.push_back(next);
    next += Rows::floats(shard.rank);
    rests.emplace_back(shard.rest, Rows::kRows, kChunkBytes / (shard.rank * sizeof(W) + 1), threads);
    first.push_back(first.back() + rests.back().count());
  }
  std::fill(scratch, next, 0.0f);
  std::atomic<int64_t> next_pivots{0}, next_rest{0};

  const auto write = [&](int64_t stacked, const float* values) {
    const int64_t column = layer.column(stacked);
    const float bias = layer.bias ? to_float(layer.bias[column]) : 0.0f;
    for (int t = 0; t < tokens; ++t) from_float(values[t] + bias, y + t * layer.outputs + column);
  };

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < layer.n; ++i)
      for (int t = 0; t < tokens; ++t) staged_x[Rows::offset(i, t, layer.n)] = to_float(x[t * layer.n + i]);

    for (int64_t chunk; (chunk = next_pivots++) < pivots.count();) {
      size_t s = 0;
      Rows::stream(layer.pivot_weight, pivots.begin(chunk), pivots.end(chunk), layer.n, staged_x,
                   [&](int64_t row, const float* values) {
                     while (row >= layer.shards[s].pivot_begin + layer.shards[s].rank) ++s;
                     const auto& shard = layer.shards[s];
                     for (int t = 0; t < tokens; ++t)
                       staged_y[s][Rows::offset(row - shard.pivot_begin, t, shard.rank)] = values[t];
                     if (layer.pivots_are_outputs) write(row, values);
                   });
    }
#pragma omp barrier

    for (int64_t chunk; (chunk = next_rest++) < first.back();) {
      const size_t s = std::upper_bound(first.begin(), first.end(), chunk) - first.begin() - 1;
      const auto& shard = layer.shards[s];
      Rows::stream(shard.coefficients, rests[s].begin(chunk - first[s]), rests[s].end(chunk - first[s]), shard.rank,
                   staged_y[s], [&](int64_t row, const float* values) { write(shard.rest_begin + row, values); });
    }
  }
}

}  // namespace pifa
