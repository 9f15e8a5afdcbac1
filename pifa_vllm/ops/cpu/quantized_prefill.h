// Quantized factors, more tokens: the blocked matrix product of prefill.h in integers. A lane is a token and holds two
// neighbouring features; the weights are widened block by block, and a pair of them is broadcast. Sums leave the integers
// wherever a scale ends.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>

#include "numbers.h"
#include "prefill.h"

namespace pifa {

// Activations of a panel of tokens: integers [feature / 2][token][2], and scales [chunk][token].
template <int kPanel>
struct PanelPairs {
  int32_t* pairs;
  float* scales;

  static int64_t chunks(int64_t features) { return (features + kChunk - 1) / kChunk; }
  // 4-byte words that `features` of a panel take.
  static int64_t words(int64_t features) { return chunks(features) * (kChunk / 2 + 1) * kPanel; }
  static PanelPairs at(float* memory, int64_t features) {
    return {reinterpret_cast<int32_t*>(memory), memory + chunks(features) * (kChunk / 2) * kPanel};
  }

  // From floats [count][kPanel], which are the features of a chunk.
  void put(const float* values, int64_t chunk, int64_t count) const {
    int32_t* const out = pairs + chunk * (kChunk / 2) * kPanel;
    for (int64_t first = 0; first < kPanel; first += kLanes) {
      vfloat peak{};
      vint odd{};
      for (int64_t i = 0; i < count; ++i) {
        const vfloat v = load(values + i * kPanel + first), size = v < 0.0f ? -v : v;
        peak = size > peak ? size : peak;
        odd |= v - v != vfloat{};
      }
      const vfloat factor = kLargest / peak;
      const vint none = (factor <= std::numeric_limits<float>::max() ? vint{} : ~vint{}) | odd;
      const auto integer = [&](int64_t i) {
        return i < count ? none ? vint{} : round(load(values + i * kPanel + first) * factor) : vint{};
      };
      for (int64_t i = 0; i < count; i += 2) {
        const vint pair = (integer(i) & 0xffff) | (integer(i + 1) << 16);
        *reinterpret_cast<vint_unaligned*>(out + i / 2 * kPanel + first) = pair;
      }
      const vfloat nan = splat(std::numeric_limits<float>::quiet_NaN());
      store(scales + chunk * kPanel + first, odd ? nan : none ? vfloat{} : peak / kLargest);
    }
  }
};

// Blocks of at most kBlockRows rows and a chunk of features, as 16-bit integers, and the scales of their segments.
struct WideBlock {
  int32_t pairs[kBlockRows][kChunk / 2];
  float scales[kBlockRows][kChunk / kBlock];
};

template <typename Q>
inline void widen(const Quantized& w, int64_t row, int64_t rows, int64_t chunk, WideBlock& out) {
  const int64_t first = chunk * (kChunk / kBlock);
  const int64_t blocks = std::min((w.k + kBlock - 1) / kBlock - first, kChunk / kBlock);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t b = 0; b < blocks; ++b) {
      vint wide[kParts];
      if ((first + b + 1) * kBlock <= w.k) Q::read(w.row(row + r), first + b, wide);
      else read_last<Q>(w.row(row + r), w.k, wide);
      std::memcpy(&out.pairs[r][b * (kBlock / 2)], wide, sizeof wide);
    }
    w.read_scales(row + r, chunk, out.scales[r]);
  }
}

// sums [R, V * kLanes] += rows of a block, from r on, times x, features of its chunk; `segment` pairs share a scale.
template <int R, int V>
inline void multiply_pairs(const WideBlock& w, int64_t r0, const int32_t* x, const float* x_scales, int64_t pairs,
                           int64_t segment, float* sums) {
  constexpr int64_t kWidth = V * kLanes;
  vfloat scale[V];
  for (int v = 0; v < V; ++v) scale[v] = load(x_scales + v * kLanes);
  for (int64_t begin = 0, s = 0; begin < pairs; begin += segment, ++s) {
    vint acc[R][V] = {};
    const int64_t end = std::min(pairs, begin + segment);
    for (int64_t i = begin; i < end; ++i)
      for (int r = 0; r < R; ++r) {
        const vint wide = splat(w.pairs[r0 + r][i]);
        for (int v = 0; v < V; ++v)
          acc[r][v] = add_products(acc[r][v], wide,
                                   *reinterpret_cast<const vint_unaligned*>(x + i * kWidth + v * kLanes));
      }
    for (int r = 0; r < R; ++r) {
      const vfloat ws = splat(w.scales[r0 + r][s]);
      for (int v = 0; v < V; ++v) {
        float* const at = sums + r * kWidth + v * kLanes;
        store(at, load(at) + to_floats(acc[r][v]) * (ws * scale[v]));
      }
    }
  }
}

// out [rows, kPanel] of each panel = rows of w from `row` on times its x. Panels of x lie ldx words apart, those of out
// ldo floats.
template <int V>
__attribute__((noinline)) void multiply_block(const Quantized& w, int64_t row, int64_t rows, float* x, int64_t ldx, int64_t panels,
                    WideBlock& block, float* out, int64_t ldo) {
  constexpr int64_t kPanel = V * kLanes, kTile = kTileRows * kPanel;
  const int64_t tiles = tiles_of(rows), segment = w.segment * (kBlock / 2);
  for (int64_t p = 0; p < panels; ++p) std::fill_n(out + p * ldo, tiles * kTile, 0.0f);
  for (int64_t chunk = 0; chunk * kChunk < w.k; ++chunk) {
    const int64_t pairs = (std::min(kChunk, w.k - chunk * kChunk) + 1) / 2;
    if (w.four) widen<Int4>(w, row, rows, chunk, block);
    else widen<Int8>(w, row, rows, chunk, block);
    for (int64_t p = 0; p < panels; ++p) {
      const auto panel = PanelPairs<kPanel>::at(x + p * ldx, w.k);
      const int32_t* const chunk_x = panel.pairs + chunk * (kChunk / 2) * kPanel;
      const float* const scales = panel.scales + chunk * kPanel;
      for (int64_t r = 0; r < rows; r += kTileRows) {
        float* const sums = out + p * ldo + r * kPanel;
        if (r + kTileRows <= rows) multiply_pairs<kTileRows, V>(block, r, chunk_x, scales, pairs, segment, sums);
        else
          for (int64_t i = r; i < rows; ++i)
            multiply_pairs<1, V>(block, i, chunk_x, scales, pairs, segment, sums + (i - r) * kPanel);
      }
    }
  }
}

// y [tokens, outputs] = layer(x [tokens, n]) in panels of V vectors of tokens; scratch(floats) gives memory.
template <int V, typename X, typename Scratch>
void quantized_prefill(const Layer<X, Quantized>& layer, const X* x, X* y, int64_t tokens, const Scratch& scratch,
                       int threads) {
  constexpr int64_t kPanel = V * kLanes, kBlockTokens = kBlockPanels * kPanel;
  using Pairs = PanelPairs<kPanel>;
  Slots slots(layer);
  const int64_t ldx = Pairs::words(layer.n), ldo = slots.count * kPanel;
  std::vector<int64_t> place;  // of each shard's pivot outputs in a panel of them
  int64_t ldp = 0;
  for (const auto& shard : layer.shards) {
    place.push_back(ldp);
    ldp += Pairs::words(shard.rank);
  }
  constexpr int64_t kBlockWords = sizeof(WideBlock) / sizeof(float), kChunkFloats = kChunk * kPanel;
  const int64_t most = (std::min<int64_t>(tokens, kBlockTokens) + kPanel - 1) / kPanel;
  float* const pairs_x = scratch(most * (ldx + ldo + ldp) + threads * (kBlockWords + kChunkFloats));
  float* const pairs_p = pairs_x + most * ldx;
  float* const packed_y = pairs_p + most * ldp;  // [panel, slot, kPanel]
  float* const own = packed_y + most * ldo;

  Shares pivots(threads), rest(threads);
  pivots.add(layer.pivots, kTileRows, kBlockTiles);
  for (const auto& shard : layer.shards) rest.add(shard.rest, kTileRows, kBlockTiles);

  for (int64_t token = 0; token < tokens; token += kBlockTokens) {
    const int64_t block_tokens = std::min<int64_t>(kBlockTokens, tokens - token);
    const int64_t panels = (block_tokens + kPanel - 1) / kPanel;
    const X* const block_x = x + token * layer.n;
    X* const block_y = y + token * layer.outputs;
    std::atomic<int64_t> next_unpack{0};
    pivots.restart();
    rest.restart();

#pragma omp parallel num_threads(threads)
    {
      float* const floats = own + omp_get_thread_num() * (kBlockWords + kChunkFloats);
      WideBlock& block = *reinterpret_cast<WideBlock*>(floats + kChunkFloats);
      if (token == 0) slots.fill(layer);
      const int64_t chunks = Pairs::chunks(layer.n);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < panels * chunks; ++i) {
        const int64_t p = i / chunks, begin = i % chunks * kChunk, count = std::min(kChunk, layer.n - begin);
        pack_panel<kPanel>(block_x + p * kPanel * layer.n + begin, layer.n, block_tokens - p * kPanel, 0, count, floats);
        Pairs::at(pairs_x + p * ldx, layer.n).put(floats, i % chunks, count);
      }

      for (Shares::Share t; pivots.take(t);)
        multiply_block<V>(layer.pivot_weight, t.begin, t.end - t.begin, pairs_x, ldx, panels, block,
                          packed_y + t.begin * kPanel, ldo);
#pragma omp barrier

      for (size_t s = 0; s < place.size(); ++s) {
        const auto& shard = layer.shards[s];
        const int64_t parts = Pairs::chunks(shard.rank);
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < panels * parts; ++i) {
          const int64_t p = i / parts, begin = i % parts * kChunk;
          Pairs::at(pairs_p + p * ldp + place[s], shard.rank)
              .put(packed_y + p * ldo + (shard.pivot_begin + begin) * kPanel, i % parts,
                   std::min(kChunk, shard.rank - begin));
        }
      }
#pragma omp barrier

      for (Shares::Share t; rest.take(t);)
        multiply_block<V>(layer.shards[t.group].coefficients, t.begin, t.end - t.begin, pairs_p + place[t.group], ldp,
                          panels, block, packed_y + (slots.rest[t.group] + t.begin) * kPanel, ldo);
#pragma omp barrier

      const int64_t unpacks = (layer.outputs + kUnpackColumns - 1) / kUnpackColumns;
      for (int64_t piece; (piece = next_unpack++) < panels * unpacks;) {
        const int64_t p = piece / unpacks, begin = piece % unpacks * kUnpackColumns;
        unpack_panel<kPanel>(packed_y + p * ldo, [&](int64_t c) { return slots.columns[c]; }, layer.bias,
                             block_tokens - p * kPanel, begin, std::min(begin + kUnpackColumns, layer.outputs),
                             layer.outputs, block_y + p * kPanel * layer.outputs);
      }
    }
  }
}

}  // namespace pifa
