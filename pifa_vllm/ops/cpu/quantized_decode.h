// Quantized factors, few tokens: bound by the bytes of the weights. Each is read once, and multiplied with all tokens as
// integers. Activations become 16-bit numbers for it, which costs next to nothing and no accuracy that 8 bits would have.
#pragma once

#include <omp.h>

#include <algorithm>

#include "layer.h"
#include "numbers.h"
#include "shares.h"

namespace pifa {

// Activations [tokens][features] as integers, with a scale for each chunk of features.
struct Staged {
  int16_t* numbers;
  float* scales;
  int64_t features;

  int64_t stride() const { return (features + kBlock - 1) / kBlock * kBlock; }
  int64_t chunks() const { return (features + kChunk - 1) / kChunk; }
  // Floats that they take, in the order above.
  static int64_t floats(int64_t features, int tokens) {
    const Staged one{nullptr, nullptr, features};
    return tokens * (one.stride() / 2 + one.chunks());
  }
  static Staged at(float*& scratch, int64_t features, int tokens) {
    Staged staged{reinterpret_cast<int16_t*>(scratch), nullptr, features};
    staged.scales = scratch + tokens * staged.stride() / 2;
    scratch += floats(features, tokens);
    return staged;
  }

  template <typename X>
  void put(const X* token, int t, int64_t chunk) const {
    const int64_t begin = chunk * kChunk, count = std::min(kChunk, features - begin);
    scales[t * chunks() + chunk] = quantize(token + begin, count, numbers + t * stride() + begin);
  }
};

// out[r][t] = rows[r] . x[t], of rows that may be read up to a whole block: what is beyond k is multiplied by zeros.
template <int R, int T, typename Q>
inline void dot_quantized(const Quantized& w, const uint8_t* const (&rows)[R], int64_t row, const Staged& x, float* out) {
  const int64_t blocks = x.stride() / kBlock, stride = x.stride(), chunks = x.chunks();
  vfloat sums[R][T] = {};
  for (int64_t chunk = 0, block = 0; chunk < chunks; ++chunk) {
    const int64_t end = std::min(blocks, (chunk + 1) * (kChunk / kBlock));
    float scales[R][kChunk / kBlock] = {};
    for (int r = 0; r < R; ++r) w.read_scales(row + r, chunk, scales[r]);
    vfloat part[R][T] = {};
    for (int64_t segment = 0; block < end; ++segment) {
      vint products[R][T] = {};
      for (const int64_t stop = std::min(end, block + w.segment); block < stop; ++block) {
        const int16_t* const at = x.numbers + block * kBlock;
        vint wide[R][kParts];
        for (int r = 0; r < R; ++r) {
          // Of the rows that come next: those of these end before the hardware's prefetchers have caught up with them.
          __builtin_prefetch(rows[r] + R * w.width + Q::width(block * kBlock));
          Q::read(rows[r], block, wide[r]);
        }
        for (int i = 0; i < kParts; ++i)
          for (int t = 0; t < T; ++t) {
            const vint xv = load_pairs(at + t * stride + i * kShorts);
            for (int r = 0; r < R; ++r) products[r][t] = add_products(products[r][t], wide[r][i], xv);
          }
      }
      for (int r = 0; r < R; ++r) {
        const vfloat scale = splat(scales[r][segment]);
        for (int t = 0; t < T; ++t) part[r][t] += to_floats(products[r][t]) * scale;
      }
    }
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < R; ++r) sums[r][t] += part[r][t] * splat(x.scales[t * chunks + chunk]);
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) out[r * T + t] = sum(sums[r][t]);
}

// out [end - begin, T] = rows [begin, end) of w times the tokens.
template <int T, typename Q>
__attribute__((noinline)) void dot_rows(const Quantized& w, int64_t begin, int64_t end, const Staged& x, float* out) {
  constexpr int kRows = T == 1 ? 4 : 2;
  const int64_t whole = Q::width(x.stride());
  // The blocks of the last rows may reach beyond the matrix.
  const auto reaches = [&](int64_t row) { return (w.rows - row) * w.width < whole; };
  for (; begin + kRows <= end && !reaches(begin + kRows - 1); begin += kRows, out += kRows * T) {
    const uint8_t* rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = w.row(begin + r);
    dot_quantized<kRows, T, Q>(w, rows, begin, x, out);
  }
  std::vector<uint8_t> copy;
  for (; begin < end; ++begin, out += T) {
    const uint8_t* rows[1] = {w.row(begin)};
    if (reaches(begin)) {
      copy.assign(rows[0], rows[0] + w.width);
      copy.resize(whole);
      rows[0] = copy.data();
    }
    dot_quantized<1, T, Q>(w, rows, begin, x, out);
  }
}

constexpr int64_t kShareRows = 64;  // at most, that a thread takes at once

template <int T, typename L>
int64_t quantized_decode_scratch(const L& layer, int threads) {
  int64_t floats = Staged::floats(layer.n, T) + layer.pivots * T + threads * kShareRows * T;
  for (const auto& shard : layer.shards) floats += Staged::floats(shard.rank, T);
  return floats;
}

// y [tokens, outputs] = layer(x [tokens, n]) of at most T tokens; the others are multiplied as they are, for nothing.
template <int T, typename X>
void quantized_decode(const Layer<X, Quantized>& layer, const X* x, X* y, int tokens, float* scratch, int threads) {
  constexpr int64_t kTile = 4;
  const Staged staged_x = Staged::at(scratch, layer.n, T);
  std::vector<Staged> staged_y;
  Shares pivots(threads), rest(threads);
  pivots.add(layer.pivots, kTile, kShareRows / kTile);
  for (const auto& shard : layer.shards) {
    staged_y.push_back(Staged::at(scratch, shard.rank, T));
    rest.add(shard.rest, kTile, kShareRows / kTile);
  }
  float* const y_p = scratch;  // [T, pivots]

#pragma omp parallel num_threads(threads)
  {
    float* const out = y_p + T * layer.pivots + omp_get_thread_num() * kShareRows * T;
    const auto multiply = [&](const Quantized& w, int64_t begin, int64_t end, const Staged& tokens) {
      if (w.four) dot_rows<T, Int4>(w, begin, end, tokens, out);
      else dot_rows<T, Int8>(w, begin, end, tokens, out);
    };
    const auto write = [&](int64_t stacked, int64_t rows) {
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t column = layer.column(stacked + r);
        const float shift = layer.bias ? to_float(layer.bias[column]) : 0.0f;
        for (int t = 0; t < tokens; ++t) from_float(out[r * T + t] + shift, y + t * layer.outputs + column);
      }
    };

#pragma omp for schedule(static)
    for (int64_t i = 0; i < tokens * staged_x.chunks(); ++i)
      staged_x.put(x + i % tokens * layer.n, int(i % tokens), i / tokens);

    Shares::Share share;
    while (pivots.take(share)) {
      multiply(layer.pivot_weight, share.begin, share.end, staged_x);
      for (int64_t r = share.begin; r < share.end; ++r)
        for (int t = 0; t < tokens; ++t) y_p[t * layer.pivots + r] = out[(r - share.begin) * T + t];
      write(share.begin, share.end - share.begin);
    }
#pragma omp barrier

    for (size_t s = 0; s < staged_y.size(); ++s) {
      const float* const own = y_p + layer.shards[s].pivot_begin;
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < tokens * staged_y[s].chunks(); ++i)
        staged_y[s].put(own + i % tokens * layer.pivots, int(i % tokens), i / tokens);
    }
#pragma omp barrier

    while (rest.take(share)) {
      const auto& shard = layer.shards[share.group];
      multiply(shard.coefficients, share.begin, share.end, staged_y[share.group]);
      write(shard.rest_begin + share.begin, share.end - share.begin);
    }
  }
}

}  // namespace pifa
