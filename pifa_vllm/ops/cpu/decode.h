// Few tokens: bound by the bytes of the weights. Each is read once, in the layout of the checkpoint.
#pragma once

#include <omp.h>

#include <algorithm>

#include "dot.h"
#include "panel.h"
#include "shares.h"

namespace pifa {

// Of weights, that a thread takes at once: long enough a stream for the hardware's prefetchers.
constexpr int64_t kShareBytes = 64 * 1024;

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
  const auto most = [](int64_t k) { return kShareBytes / (k * int64_t(sizeof(W)) * Rows::kRows + 1); };
  Shares pivots(threads), rest(threads);
  pivots.add(layer.pivots, Rows::kRows, most(layer.n));
  float* next = scratch + Rows::floats(layer.n);
  for (const auto& shard : layer.shards) {
    staged_y.push_back(next);
    next += Rows::floats(shard.rank);
    rest.add(shard.rest, Rows::kRows, most(shard.rank));
  }
  std::fill(scratch, next, 0.0f);

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

    Shares::Share share;
    while (pivots.take(share)) {
      size_t s = 0;
      Rows::stream(layer.pivot_weight, share.begin, share.end, layer.n, staged_x,
                   [&](int64_t row, const float* values) {
                     while (row >= layer.shards[s].pivot_begin + layer.shards[s].rank) ++s;
                     const auto& shard = layer.shards[s];
                     for (int t = 0; t < tokens; ++t)
                       staged_y[s][Rows::offset(row - shard.pivot_begin, t, shard.rank)] = values[t];
                     if (layer.pivots_are_outputs) write(row, values);
                   });
    }
#pragma omp barrier

    while (rest.take(share)) {
      const auto& shard = layer.shards[share.group];
      Rows::stream(shard.coefficients, share.begin, share.end, shard.rank, staged_y[share.group],
                   [&](int64_t row, const float* values) { write(shard.rest_begin + row, values); });
    }
  }
}

}  // namespace pifa
