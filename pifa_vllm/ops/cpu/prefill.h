// Many tokens: bound by arithmetic. A blocked matrix product (Goto and van de Geijn, 2008) whose vectors run over
// tokens: the activations are packed, which is little work, the weights are only copied block by block into
// the cache, as floats, and the outputs of the pivot rows come out packed as the second product needs them.
#pragma once

#include <omp.h>

#include <type_traits>

#include "layer.h"
#include "tile.h"

namespace pifa {

constexpr int kPanel = 2 * kLanes;    // tokens of a register tile
constexpr int kTileRows = 6;          // weight rows of a register tile: 12 sums
constexpr int kBlockRows = 8 * kTileRows;
constexpr int kFewPanels = 4;
constexpr int kBlockTokens = 16 * kPanel;

// Pack x [tokens, n] into panels [n, kPanel]; missing tokens become zero.
template <typename X>
void pack_panel(const X* x, int64_t n, int64_t tokens, int64_t begin, int64_t end, float* panel) {
  for (int64_t t = 0; t < kPanel; ++t)
    for (int64_t i = begin; i < end; ++i) panel[i * kPanel + t] = t < tokens ? to_float(x[t * n + i]) : 0.0f;
}

// sums [tile, panel, kTileRows, kPanel] = w [rows, k] times the packed x, whose panels lie ldp floats apart.
template <typename W>
void multiply_block(const W* w, int64_t rows, int64_t k, const float* x, int64_t ldp, int64_t panels, float* block,
                    float* sums) {
  constexpr int64_t kTileSums = kTileRows * kPanel;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  std::fill(sums, sums + tiles * panels * kTileSums, 0.0f);
  for (int64_t begin = 0; begin < k; begin += kBlockDepth) {
    const int64_t depth = std::min(kBlockDepth, k - begin);
    const float* const block_x = x + begin * kPanel;
    if constexpr (std::is_same_v<W, float>) {
      // For few panels a copy of the weights does not pay.
      if (panels <= kFewPanels && rows % kTileRows == 0) {
        for (int64_t tile = 0; tile < tiles; ++tile)
          for (int64_t p = 0; p < panels; ++p)
            multiply_tile<kTileRows, 2>(w + tile * kTileRows * k + begin, k, block_x + p * ldp, depth,
                                        sums + (tile * panels + p) * kTileSums);
        continue;
      }
    }
    // Rows of the last tile that do not exist keep what was there; their sums are not used.
    widen(w + begin, k, rows, depth, block);
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t tile = 0; tile < tiles; ++tile)
        multiply_tile<kTileRows, 2>(block + tile * kTileRows * kBlockDepth, kBlockDepth, block_x + p * ldp, depth,
                                    sums + (tile * panels + p) * kTileSums);
  }
}

// Floats of scratch that `prefill` needs for one block of tokens.
template <typename W>
int64_t prefill_scratch(const Layer<W>& layer, int64_t tokens, int threads) {
  const int64_t panels = (std::min<int64_t>(tokens, kBlockTokens) + kPanel - 1) / kPanel;
  return panels * kPanel * (layer.n + layer.pivots + int64_t(kBlockRows) * threads) +
         kBlockRows * kBlockDepth * threads;
}

// y [tokens, outputs] = layer(x [tokens, n]).
template <typename W>
void prefill(const Layer<W>& layer, const W* x, W* y, int64_t tokens, float* scratch, int threads) {
  const int64_t max_panels = (std::min<int64_t>(tokens, kBlockTokens) + kPanel - 1) / kPanel;
  float* const packed_x = scratch;                                         // [panel, n, kPanel]
  float* const packed_y = packed_x + max_panels * kPanel * layer.n;        // [panel, pivots, kPanel]
  float* const private_scratch = packed_y + max_panels * kPanel * layer.pivots;
  const int64_t private_size = max_panels * kPanel * kBlockRows + kBlockRows * kBlockDepth;
  const int64_t ldp_x = layer.n * kPanel, ldp_y = layer.pivots * kPanel;

  const Chunks pivots(layer.pivots, kTileRows, kBlockRows, threads);
  std::vector<Chunks> rests;
  std::vector<int64_t> first{0};
  for (const auto& shard : layer.shards) {
    rests.emplace_back(shard.rest, kTileRows, kBlockRows, threads);
    first.push_back(first.back() + rests.back().count());
  }

  for (int64_t token = 0; token < tokens; token += kBlockTokens) {
    const int64_t block_tokens = std::min<int64_t>(kBlockTokens, tokens - token);
    const int64_t panels = (block_tokens + kPanel - 1) / kPanel;
    const W* const block_x = x + token * layer.n;
    W* const block_y = y + token * layer.outputs;
    std::atomic<int64_t> next_pack{0}, next_pivots{0}, next_rest{0};

    const auto write = [&](int64_t stacked, int64_t rows, const float* sums) {
      for (int64_t t = 0; t < block_tokens; ++t) {
        const float* const column_sums = sums + (t / kPanel) * kTileRows * kPanel + t % kPanel;
        W* const out = block_y + t * layer.outputs;
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t column = layer.column(stacked + r);
          const float bias = layer.bias ? to_float(layer.bias[column]) : 0.0f;
          const int64_t tile = r / kTileRows;
          from_float(column_sums[tile * panels * kTileRows * kPanel + r % kTileRows * kPanel] + bias, out + column);
        }
      }
    };

#pragma omp parallel num_threads(threads)
    {
      float* const block = private_scratch + omp_get_thread_num() * private_size;
      float* const sums = block + kBlockRows * kBlockDepth;

      const int64_t pieces = (layer.n + kBlockDepth - 1) / kBlockDepth;
      for (int64_t piece; (piece = next_pack++) < panels * pieces;) {
        const int64_t p = piece / pieces, begin = piece % pieces * kBlockDepth;
        pack_panel(block_x + p * kPanel * layer.n, layer.n, block_tokens - p * kPanel, begin,
                   std::min(begin + kBlockDepth, layer.n), packed_x + p * ldp_x);
      }
#pragma omp barrier

      for (int64_t chunk; (chunk = next_pivots++) < pivots.count();) {
        const int64_t begin = pivots.begin(chunk), rows = pivots.end(chunk) - begin;
        multiply_block(layer.pivot_weight + begin * layer.n, rows, layer.n, packed_x, ldp_x, panels, block, sums);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t p = 0; p < panels; ++p)
            std::copy_n(sums + ((r / kTileRows * panels + p) * kTileRows + r % kTileRows) * kPanel, kPanel,
                        packed_y + p * ldp_y + (begin + r) * kPanel);
        if (layer.pivots_are_outputs) write(begin, rows, sums);
      }
#pragma omp barrier

      for (int64_t chunk; (chunk = next_rest++) < first.back();) {
        const size_t s = std::upper_bound(first.begin(), first.end(), chunk) - first.begin() - 1;
        const auto& shard = layer.shards[s];
        const int64_t begin = rests[s].begin(chunk - first[s]), rows = rests[s].end(chunk - first[s]) - begin;
        multiply_block(shard.coefficients + begin * shard.rank, rows, shard.rank,
                       packed_y + shard.pivot_begin * kPanel, ldp_y, panels, block, sums);
        write(shard.rest_begin + begin, rows, sums);
      }
    }
  }
}

}  // namespace pifa
