// Five tokens to a few more: vectors run over tokens, and the sums of a row stay in registers while it is streamed.
#pragma once

#include <type_traits>

#include "layer.h"
#include "tile.h"

namespace pifa {

// Staged activations are [feature][token], tokens rounded up to V vectors.
template <typename W, int V>
struct PanelRows {
  static constexpr int kRows = 6;
  static constexpr int kTokens = V * kLanes;

  static int64_t floats(int64_t features) { return features * kTokens; }
  static int64_t offset(int64_t feature, int t, int64_t) { return feature * kTokens + t; }

  // Rows [begin, end) of w [.., k]; emit(row, outputs of the tokens) is called for each.
  template <typename Emit>
  static void stream(const W* w, int64_t begin, int64_t end, int64_t k, const float* x, const Emit& emit) {
    float out[kRows * kTokens];
    int64_t row = begin;
    for (; row + kRows <= end; row += kRows) {
      multiply<kRows>(w + row * k, k, x, out);
      for (int r = 0; r < kRows; ++r) emit(row + r, out + r * kTokens);
    }
    for (; row < end; ++row) {
      multiply<1>(w + row * k, k, x, out);
      emit(row, out);
    }
  }

 private:
  template <int R>
  static void multiply(const W* w, int64_t k, const float* x, float* out) {
    std::fill(out, out + R * kTokens, 0.0f);
    if constexpr (std::is_same_v<W, float>) {
      multiply_tile<R, V>(w, k, x, k, out);
    } else {
      float wide[R * kBlockDepth];
      for (int64_t i = 0; i < k; i += kBlockDepth) {
        const int64_t depth = std::min(kBlockDepth, k - i);
        widen(w + i, k, R, depth, wide);
        multiply_tile<R, V>(wide, kBlockDepth, x + i * kTokens, depth, out);
      }
    }
  }
};

}  // namespace pifa
