// Many tokens: bound by arithmetic. A blocked matrix product (Goto and van de Geijn, 2008) whose vectors run over
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
#include "shares.h"
#include "tile.h"
#include "transpose.h"

namespace pifa {

constexpr int kPanel = 2 * kLanes;    // tokens of a register tile
constexpr int kTileRows = 6;          // weight rows of a register tile: 12 sums
constexpr int kBlockTiles = 8;
constexpr int kBlockRows = kBlockTiles * kTileRows;
constexpr int kFewPanels = 4;
constexpr int kBlockTokens = 16 * kPanel;
constexpr int kUnpackColumns = 16 * kLanes;

inline int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// Pack features [begin, end) of x [tokens, n] into a panel [n, kPanel]; missing tokens become zero.
template <typename X>
void pack_panel(const X* x, int64_t n, int64_t tokens, int64_t begin, int64_t end, float* panel) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes)
    for (int64_t first = 0; first < kPanel; first += kLanes) {
      vfloat rows[kLanes];
      for (int64_t t = 0; t < kLanes; ++t)
        rows[t] = first + t < tokens ? load_floats(x + (first + t) * n + i) : vfloat{};
      transpose(rows);
      for (int64_t f = 0; f < kLanes; ++f) store(panel + (i + f) * kPanel + first, rows[f]);
    }
  for (; i < end; ++i)
    for (int64_t t = 0; t < kPanel; ++t) panel[i * kPanel + t] = t < tokens ? to_float(x[t * n + i]) : 0.0f;
}

// Columns [begin, end) of y [tokens, outputs] from a panel, where column c lies in row slots[c].
template <typename Y>
void unpack_panel(const float* panel, const int64_t* slots, const Y* bias, int64_t tokens, int64_t begin, int64_t end,
                  int64_t outputs, Y* y) {
  int64_t c = begin;
  for (; c + kLanes <= end; c += kLanes) {
    const vfloat shift = bias ? load_floats(bias + c) : vfloat{};
    for (int64_t first = 0; first < std::min<int64_t>(tokens, kPanel); first += kLanes) {
      vfloat rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) rows[i] = load(panel + slots[c + i] * kPanel + first);
      transpose(rows);
      for (int64_t t = 0; t < std::min<int64_t>(tokens - first, kLanes); ++t)
        store_floats(rows[t] + shift, y + (first + t) * outputs + c);
    }
  }
  for (; c < end; ++c)
    for (int64_t t = 0; t < std::min<int64_t>(tokens, kPanel); ++t)
      from_float(panel[slots[c] * kPanel + t] + (bias ? to_float(bias[c]) : 0.0f), y + t * outputs + c);
}

// out [rows, kPanel] of each panel = w [rows, k] times its packed x. The panels of x lie ldx floats apart, those of
// out ldo. Rows are written up to a multiple of kTileRows.
template <typename W>
void multiply_block(const W* w, int64_t rows, int64_t k, const float* x, int64_t ldx, int64_t panels, float* block,
                    float* out, int64_t ldo) {
  constexpr int64_t kTile = kTileRows * kPanel;
  const int64_t tiles = tiles_of(rows);
  for (int64_t p = 0; p < panels; ++p) std::fill_n(out + p * ldo, tiles * kTile, 0.0f);
  for (int64_t begin = 0; begin < k; begin += kBlockDepth) {
    const int64_t depth = std::min(kBlockDepth, k - begin);
    const float* const block_x = x + begin * kPanel;
    if constexpr (std::is_same_v<W, float>) {
      // For few panels a copy of the weights does not pay.
      if (panels <= kFewPanels && rows % kTileRows == 0) {
        for (int64_t tile = 0; tile < tiles; ++tile)
          for (int64_t p = 0; p < panels; ++p)
            multiply_tile<kTileRows, 2>(w + tile * kTileRows * k + begin, k, block_x + p * ldx, depth,
                                        out + p * ldo + tile * kTile);
        continue;
      }
    }
    // Rows of the last tile that do not exist keep what was there; their sums are not used.
    widen(w + begin, k, rows, depth, block);
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t tile = 0; tile < tiles; ++tile)
        multiply_tile<kTileRows, 2>(block + tile * kTileRows * kBlockDepth, kBlockDepth, block_x + p * ldx, depth,
                                    out + p * ldo + tile * kTile);
  }
}

// Rows of a panel of outputs: the pivot rows, then the remaining rows of each shard, each group up to a multiple of
// kTileRows.
template <typename W>
struct Slots {
  std::vector<int64_t> rest;     // first slot of each shard's remaining rows
  std::vector<int64_t> columns;  // slot of each output column
  int64_t count;

  explicit Slots(const Layer<W>& layer) : columns(layer.outputs), count(tiles_of(layer.pivots) * kTileRows) {
    if (layer.pivots_are_outputs)
      for (int64_t i = 0; i < layer.pivots; ++i) columns[layer.column(i)] = i;
    for (const auto& shard : layer.shards) {
      for (int64_t i = 0; i < shard.rest; ++i) columns[layer.column(shard.rest_begin + i)] = count + i;
      rest.push_back(count);
      count += tiles_of(shard.rest) * kTileRows;
    }
  }
};

// y [tokens, outputs] = layer(x [tokens, n]); scratch(floats) gives memory.
template <typename W, typename Scratch>
void prefill(const Layer<W>& layer, const W* x, W* y, int64_t tokens, const Scratch& scratch, int threads) {
  const Slots<W> slots(layer);
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

      const int64_t packs = (layer.n + kBlockDepth - 1) / kBlockDepth;
      for (int64_t piece; (piece = next_pack++) < panels * packs;) {
        const int64_t p = piece / packs, begin = piece % packs * kBlockDepth;
        pack_panel(block_x + p * kPanel * layer.n, layer.n, block_tokens - p * kPanel, begin,
                   std::min(begin + kBlockDepth, layer.n), packed_x + p * ldx);
      }
#pragma omp barrier

      for (Shares::Share t; pivots.take(t);)
        multiply_block(layer.pivot_weight + t.begin * layer.n, t.end - t.begin, layer.n, packed_x,
                       ldx, panels, block, packed_y + t.begin * kPanel, ldo);
#pragma omp barrier

      for (Shares::Share t; rest.take(t);) {
        const auto& shard = layer.shards[t.group];
        multiply_block(shard.coefficients + t.begin * shard.rank, t.end - t.begin, shard.rank,
                       packed_y + shard.pivot_begin * kPanel, ldo, panels, block,
                       packed_y + (slots.rest[t.group] + t.begin) * kPanel, ldo);
      }
#pragma omp barrier

      const int64_t unpacks = (layer.outputs + kUnpackColumns - 1) / kUnpackColumns;
      for (int64_t piece; (piece = next_unpack++) < panels * unpacks;) {
        const int64_t p = piece / unpacks, begin = piece % unpacks * kUnpackColumns;
        unpack_panel(packed_y + p * ldo, slots.columns.data(), layer.bias, block_tokens - p * kPanel, begin,
                     std::min(begin + kUnpackColumns, layer.outputs), layer.outputs,
                     block_y + p * kPanel * layer.outputs);
      }
    }
  }
}

}  // namespace pifa
