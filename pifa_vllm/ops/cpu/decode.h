// Few tokens: bound by the bytes of the weights. Each is read once, in the layout of the checkpoint.
#pragma once

#include <omp.h>

#include <algorithm>

#include "dot.h"
#include "panels.h"
#include "shares.h"

namespace pifa {

// Of weights, that a thread takes at once: long enough a stream for the hardware's prefetchers.
constexpr int64_t kShareBytes = 64 * 1024;

// Floats of scratch that `decode` needs: staged inputs, staged pivot outputs of each shard, and a panel of outputs.
template <typename Rows, typename W>
int64_t decode_scratch(const Layer<W>& layer) {
  int64_t floats = Rows::floats(layer.n) + layer.outputs * Rows::kTokens;
  for (const auto& shard : layer.shards) floats += Rows::floats(shard.rank);
  return floats;
}

// Features [begin, end) of x [tokens, n], from the start of a group on, to where Rows expects them. Missing tokens and
// features become zero.
template <typename Rows, typename W>
void stage(const W* x, int64_t n, int tokens, int64_t begin, int64_t end, float* staged) {
  constexpr int kParts = kGroup<W> / kLanes;
  for (int64_t i = begin; i < end; i += kGroup<W>)
    for (int t = 0; t < Rows::kTokens; ++t) {
      vfloat wide[kParts] = {};
      if (t < tokens && i + kGroup<W> <= end) {
        expand(x + t * n + i, wide);
      } else if (t < tokens) {
        W padded[kGroup<W>] = {};
        std::memcpy(padded, x + t * n + i, (end - i) * sizeof(W));
        expand(padded, wide);
      }
      for (int part = 0; part < kParts; ++part) store(staged + Rows::offset(i, t, n) + part * kLanes, wide[part]);
    }
}

// y [tokens, outputs] = layer(x [tokens, n]), tokens <= Rows::kTokens.
template <typename Rows, typename W>
void decode(const Layer<W>& layer, const W* x, W* y, int tokens, float* scratch, int threads) {
  constexpr int64_t kStageFeatures = 256, kUnpackColumns = 16 * kLanes;
  constexpr int kTokens = Rows::kTokens;
  float* const staged_x = scratch;
  float* const panel = staged_x + Rows::floats(layer.n);
  std::vector<float*> staged_y;
  const auto most = [](int64_t k) { return kShareBytes / (k * int64_t(sizeof(W)) * Rows::kRows + 1); };
  Shares pivots(threads), rest(threads);
  pivots.add(layer.pivots, Rows::kRows, most(layer.n));
  float* next = panel + layer.outputs * kTokens;
  for (const auto& shard : layer.shards) {
    staged_y.push_back(next);
    next += Rows::floats(shard.rank);
    rest.add(shard.rest, Rows::kRows, most(shard.rank));
    // The last group of pivot outputs may not be a whole one.
    const int64_t end = (shard.rank + kGroup<W> - 1) / kGroup<W> * kGroup<W>;
    for (int64_t i = shard.rank; i < end; ++i)
      for (int t = 0; t < kTokens; ++t) staged_y.back()[Rows::offset(i, t, shard.rank)] = 0.0f;
  }

  const auto write = [&](int64_t stacked, const float* values) {
    const int64_t column = layer.column(stacked);
    if constexpr (kTokens == 1) {
      from_float(values[0] + (layer.bias ? to_float(layer.bias[column]) : 0.0f), y + column);
    } else {
      std::copy_n(values, kTokens, panel + column * kTokens);
    }
  };

#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < layer.n; i += kStageFeatures)
      stage<Rows>(x, layer.n, tokens, i, std::min(i + kStageFeatures, layer.n), staged_x);

    Shares::Share share;
    while (pivots.take(share)) {
      size_t s = 0;
      Rows::stream(layer.pivot_weight, share.begin, share.end, layer.n, staged_x,
                   [&](int64_t row, const float* values) {
                     while (row >= layer.shards[s].pivot_begin + layer.shards[s].rank) ++s;
                     const auto& shard = layer.shards[s];
                     for (int t = 0; t < kTokens; ++t)
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

    if constexpr (kTokens > 1) {
#pragma omp barrier
#pragma omp for schedule(static)
      for (int64_t c = 0; c < layer.outputs; c += kUnpackColumns)
        unpack_panel<kTokens>(panel, [](int64_t column) { return column; }, layer.bias, tokens, c,
                              std::min(c + kUnpackColumns, layer.outputs), layer.outputs, y);
    }
  }
}

}  // namespace pifa
