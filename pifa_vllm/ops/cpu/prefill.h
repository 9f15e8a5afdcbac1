// More tokens: bound by arithmetic. A blocked matrix product (Goto and van de Geijn, 2008) whose vectors run over
// tokens: the activations are packed, which is little work, the weights are only copied block by block into
// the cache, as floats, and the outputs of the pivot rows come out packed as the second product needs them. All outputs
// stay packed until they are complete: the rows of one output column after another are then whole vectors to fetch,
// wherever they lie, and what is written is contiguous.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "layer.h"
#include "panels.h"
#include "shares.h"
#include "tile.h"

namespace pifa {

constexpr int kTileRows = 6;          // weight rows of a register tile: 12 sums
constexpr int kBlockTiles = 8;
constexpr int kBlockRows = kBlockTiles * kTileRows;
constexpr int kFewPanels = 4;
constexpr int kBlockPanels = 16;
constexpr int kUnpackColumns = 16 * kLanes;

inline int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// sums [kTileRows, kPanel] of each panel += w [rows, depth] (rows k apart) times its packed x, while the weights are in
// the first cache. Rows that do not exist leave sums that are not used. `next` is the tile that comes after this one.
template <int V>
void multiply_few(const float* w, int64_t rows, int64_t k, int64_t depth, const float*, const float* x, int64_t ldx,
                  int64_t panels, float*, float* sums, int64_t ldo) {
  for (int64_t p = 0; p < panels; ++p, x += ldx, sums += ldo) {
    if (rows == kTileRows) {
      multiply_tile<kTileRows, V>(w, k, x, depth, sums);
    } else {
      for (int64_t r = 0; r < rows; ++r) multiply_tile<1, V>(w + r * k, k, x, depth, sums + r * V * kLanes);
    }
  }
}
template <int V>
void multiply_few(const bfloat16* w, int64_t rows, int64_t k, int64_t depth, const bfloat16* next, const float* x,
                  int64_t ldx, int64_t panels, float* block, float* sums, int64_t ldo) {
  // The hardware's prefetchers do not see where a row goes on after its neighbours' blocks.
  const auto ahead = [&](int64_t i) {
    if (i % (64 / int64_t(sizeof(bfloat16))) == 0)
      for (int r = 0; r < kTileRows; ++r) __builtin_prefetch(next + r * k + i);
  };
  widen(w, k, rows, depth, block);
  multiply_tile<kTileRows, V>(block, kBlockDepth, x, depth, sums, ahead);
  for (int64_t p = 1; p < panels; ++p)
    multiply_tile<kTileRows, V>(block, kBlockDepth, x + p * ldx, depth, sums + p * ldo);
}

// out [rows, kPanel] of each panel = w [rows, k] times its packed x. The panels of x lie ldx floats apart, those of
// out ldo. Rows are written up to a multiple of kTileRows.
template <int V, typename W>
void multiply_block(const W* w, int64_t rows, int64_t k, const float* x, int64_t ldx, int64_t panels, float* block,
                    float* out, int64_t ldo) {
  constexpr int64_t kPanel = V * kLanes, kTile = kTileRows * kPanel;
  const int64_t tiles = tiles_of(rows);
  for (int64_t p = 0; p < panels; ++p) std::fill_n(out + p * ldo, tiles * kTile, 0.0f);
  // One panel of activations is not used again before the next tile, and whole rows are better streams.
  const int64_t most = panels == 1 && std::is_same_v<W, float> ? k : kBlockDepth;
  for (int64_t begin = 0; begin < k; begin += most) {
    const int64_t depth = std::min(most, k - begin);
    const float* const block_x = x + begin * kPanel;
    if (panels <= kFewPanels) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const W* const tile_w = w + tile * kTileRows * k + begin;
        multiply_few<V>(tile_w, std::min<int64_t>(kTileRows, rows - tile * kTileRows), k, depth,
                        tile + 1 < tiles ? tile_w + kTileRows * k : w + begin + kBlockDepth, block_x, ldx, panels,
                        block, out + tile * kTile, ldo);
      }
      continue;
    }
    widen(w + begin, k, rows, depth, block);
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t tile = 0; tile < tiles; ++tile)
        multiply_tile<kTileRows, V>(block + tile * kTileRows * kBlockDepth, kBlockDepth, block_x + p * ldx, depth,
                                    out + p * ldo + tile * kTile);
  }
}

// Rows of a panel of outputs: the pivot rows, then the remaining rows of each shard, each group up to a multiple of
// kTileRows.
struct Slots {
  std::vector<int64_t> rest;     // first slot of each shard's remaining rows
  std::vector<int32_t> columns;  // slot of each output column
  int64_t count;

  template <typename L>
  explicit Slots(const L& layer) : columns(layer.outputs), count(tiles_of(layer.pivots) * kTileRows) {
    for (const auto& shard : layer.shards) {
      rest.push_back(count);
      count += tiles_of(shard.rest) * kTileRows;
    }
  }

  // By all threads of a team.
  template <typename L>
  void fill(const L& layer) {
    if (layer.pivots_are_outputs) {
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < layer.pivots; ++i) columns[layer.column(i)] = int32_t(i);
    }
    for (size_t s = 0; s < rest.size(); ++s) {
      const auto& shard = layer.shards[s];
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < shard.rest; ++i) columns[layer.column(shard.rest_begin + i)] = int32_t(rest[s] + i);
    }
  }
};

// y [tokens, outputs] = layer(x [tokens, n]) in panels of V vectors of tokens; scratch(floats) gives memory.
template <int V, typename W, typename Scratch>
void prefill(const Layer<W>& layer, const W* x, W* y, int64_t tokens, const Scratch& scratch, int threads) {
  constexpr int64_t kPanel = V * kLanes, kBlockTokens = kBlockPanels * kPanel;
  Slots slots(layer);
  const int64_t ldx = layer.n * kPanel, ldo = slots.count * kPanel;
  const int64_t max_panels = (std::min<int64_t>(tokens, kBlockTokens) + kPanel - 1) / kPanel;
  float* const packed_x = scratch(max_panels * (ldx + ldo) + kBlockRows * kBlockDepth * threads);  // [panel, n, kPanel]
  float* const packed_y = packed_x + max_panels * ldx;                                             // [panel, slot, kPanel]
  float* const blocks = packed_y + max_panels * ldo;

  Shares pivots(threads), rest(threads);
  pivots.add(layer.pivots, kTileRows, kBlockTiles);
  for (const auto& shard : layer.shards) rest.add(shard.rest, kTileRows, kBlockTiles);

  for (int64_t token = 0; token < tokens; token += kBlockTokens) {
    const int64_t block_tokens = std::min<int64_t>(kBlockTokens, tokens - token);
    const int64_t panels = (block_tokens + kPanel - 1) / kPanel;
    const W* const block_x = x + token * layer.n;
    W* const block_y = y + token * layer.outputs;
    std::atomic<int64_t> next_pack{0}, next_unpack{0};
    pivots.restart();
    rest.restart();

#pragma omp parallel num_threads(threads)
    {
      float* const block = blocks + omp_get_thread_num() * kBlockRows * kBlockDepth;

      if (token == 0) slots.fill(layer);
      const int64_t packs = (layer.n + kBlockDepth - 1) / kBlockDepth;
      for (int64_t piece; (piece = next_pack++) < panels * packs;) {
        const int64_t p = piece / packs, begin = piece % packs * kBlockDepth;
        pack_panel<kPanel>(block_x + p * kPanel * layer.n, layer.n, block_tokens - p * kPanel, begin,
                   std::min(begin + kBlockDepth, layer.n), packed_x + p * ldx);
      }
#pragma omp barrier

      for (Shares::Share t; pivots.take(t);)
        multiply_block<V>(layer.pivot_weight + t.begin * layer.n, t.end - t.begin, layer.n, packed_x,
                       ldx, panels, block, packed_y + t.begin * kPanel, ldo);
#pragma omp barrier

      for (Shares::Share t; rest.take(t);) {
        const auto& shard = layer.shards[t.group];
        multiply_block<V>(shard.coefficients + t.begin * shard.rank, t.end - t.begin, shard.rank,
                       packed_y + shard.pivot_begin * kPanel, ldo, panels, block,
                       packed_y + (slots.rest[t.group] + t.begin) * kPanel, ldo);
      }
#pragma omp barrier

      const int64_t unpacks = (layer.outputs + kUnpackColumns - 1) / kUnpackColumns;
      for (int64_t piece; (piece = next_unpack++) < panels * unpacks;) {
        const int64_t p = piece / unpacks, begin = piece % unpacks * kUnpackColumns;
        unpack_panel<kPanel>(packed_y + p * ldo, [&](int64_t c) { return slots.columns[c]; }, layer.bias, block_tokens - p * kPanel, begin,
                     std::min(begin + kUnpackColumns, layer.outputs), layer.outputs,
                     block_y + p * kPanel * layer.outputs);
      }
    }
  }
}

}  // namespace pifa
