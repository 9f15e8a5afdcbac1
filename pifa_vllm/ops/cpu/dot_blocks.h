// Five to eight tokens: dot products of a row with all tokens at once, block by block of the inner dimension, so that
// the activations of a block stay in the first cache while many rows pass by. Of each vector of weights eight
// multiply-adds take their other operand from there: two loads a cycle feed two multiply-adds.
#pragma once

#include <algorithm>

#include "dot.h"
#include "transpose.h"

namespace pifa {

// Staged activations are [block][token][kDepth], features within a block in the staged order of W.
template <typename W>
struct DotBlocks {
  static constexpr int kRows = 8;  // handed out together at least
  static constexpr int kTokens = kLanes;

  static int64_t floats(int64_t features) { return (features + kDepth - 1) / kDepth * kDepth * kTokens; }
  static int64_t offset(int64_t feature, int t, int64_t) {
    const int64_t within = feature % kDepth;
    return (feature - within) * kTokens + t * kDepth + place<W>(within);
  }

  // Rows [begin, end) of w [.., k]; emit(row, outputs of the tokens) is called for each.
  template <typename Emit>
  static void stream(const W* w, int64_t begin, int64_t end, int64_t k, const float* x, const Emit& emit) {
    vfloat sums[kChunk][kTokens];
    for (; begin < end; begin += kChunk) {
      const int64_t rows = std::min(kChunk, end - begin);
      for (int64_t r = 0; r < rows; ++r) std::fill_n(sums[r], kTokens, vfloat{});
      for (int64_t i = 0; i < k; i += kDepth) {
        const W* const block = w + begin * k + i;
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t next = r + kAhead;
          add(block + r * k, std::min(kDepth, k - i), x + i * kTokens,
              block + (next < rows ? next * k : (next - rows) * k + kDepth), sums[r]);
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        transpose(sums[r]);
        for (int i = 1; i < kLanes; ++i) sums[r][0] += sums[r][i];
        float out[kTokens];
        store(out, sums[r][0]);
        emit(begin + r, out);
      }
    }
  }

 private:
  static constexpr int64_t kDepth = 512;
  static constexpr int64_t kChunk = 32;  // rows whose sums are in the first cache, too
  // Rows. The hardware's prefetchers do not see where a row goes on after its neighbours' blocks.
  static constexpr int kAhead = 2;

  static void add(const W* w, int64_t depth, const float* x, const W* next, vfloat (&sums)[kTokens]) {
    vfloat acc[kTokens];
    std::copy_n(sums, kTokens, acc);
    const auto multiply = [&](const W* group, const float* staged) {
      constexpr int kParts = kGroup<W> / kLanes;
      vfloat wide[kParts];
      expand(group, wide);
      for (int part = 0; part < kParts; ++part)
        for (int t = 0; t < kTokens; ++t) acc[t] += wide[part] * load(staged + t * kDepth + part * kLanes);
    };
    int64_t i = 0;
    for (; i + kGroup<W> <= depth; i += kGroup<W>) {
      __builtin_prefetch(next + i);
      multiply(w + i, x + i);
    }
    if (i < depth) {
      W padded[kGroup<W>] = {};
      std::memcpy(padded, w + i, (depth - i) * sizeof(W));
      multiply(padded, x + i);
    }
    std::copy_n(acc, kTokens, sums);
  }
};

}  // namespace pifa
