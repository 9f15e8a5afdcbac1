// One to four tokens: each weight row is multiplied with all of them as dot products, while it is in registers.
#pragma once

#include "layer.h"
#include "vec.h"

namespace pifa {

// out[r][t] = w[r] . x[t] over k elements. x in the staged order of W, zero beyond k up to the whole group.
template <int R, int T, typename W>
inline void dot_tile(const W* w, int64_t k, const float* x, int64_t ldx, float (*out)[4]) {
  constexpr int kParts = kGroup<W> / kLanes;
  vfloat acc[R][T] = {};
  const int64_t whole = k - k % kGroup<W>;
  for (int64_t i = 0; i < whole; i += kGroup<W>) {
    vfloat wide[R][kParts];
    for (int r = 0; r < R; ++r) {
      expand(w + r * k + i, wide[r]);
    }
    for (int part = 0; part < kParts; ++part)
      for (int t = 0; t < T; ++t) {
        const vfloat xv = load(x + t * ldx + i + part * kLanes);
        for (int r = 0; r < R; ++r) acc[r][t] += wide[r][part] * xv;
      }
  }
  for (int r = 0; r < R && whole < k; ++r) {
    W padded[kGroup<W>] = {};
    std::memcpy(padded, w + r * k + whole, (k - whole) * sizeof(W));
    vfloat wide[kParts];
    expand(padded, wide);
    for (int part = 0; part < kParts; ++part)
      for (int t = 0; t < T; ++t) acc[r][t] += wide[part] * load(x + t * ldx + whole + part * kLanes);
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) out[r][t] = sum(acc[r][t]);
}

// Of a row, in bytes. Shorter ones end before the prefetchers have caught up with many of them side by side; one after
// the other they are a single long stream.
constexpr int64_t kShortRow = 2560;

// w . x over k elements: one row and one token. Prefetches reach into the rows that follow.
template <typename W>
inline float dot_row(const W* w, int64_t k, const float* x) {
  constexpr int kParts = kGroup<W> / kLanes, kGroups = 4;
  constexpr int64_t kStep = kGroups * kGroup<W>, kAhead = 1024;  // elements; bytes
  vfloat acc[kGroups * kParts] = {};
  const auto add = [&](const W* group, const float* staged, int into) {
    vfloat wide[kParts];
    expand(group, wide);
    for (int part = 0; part < kParts; ++part) acc[into * kParts + part] += wide[part] * load(staged + part * kLanes);
  };
  int64_t i = 0;
  for (; i + kStep <= k; i += kStep) {
    for (int64_t byte = 0; byte < kStep * int64_t(sizeof(W)); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(w + i) + kAhead + byte);
    for (int group = 0; group < kGroups; ++group) add(w + i + group * kGroup<W>, x + i + group * kGroup<W>, group);
  }
  for (; i + kGroup<W> <= k; i += kGroup<W>) add(w + i, x + i, 0);
  if (i < k) {
    W padded[kGroup<W>] = {};
    std::memcpy(padded, w + i, (k - i) * sizeof(W));
    add(padded, x + i, 0);
  }
  for (int j = 1; j < kGroups * kParts; ++j) acc[0] += acc[j];
  return sum(acc[0]);
}

// Staged activations are [token][feature], features in the staged order of W.
template <typename W, int T>
struct DotRows {
  static_assert(T <= 4);
  // Many rows are many streams from memory at once, but rows by tokens are sums, of which sixteen registers hold twelve
  // beside the operands. The hardware's prefetchers follow long streams better alone than with prefetches from here.
  static constexpr int kRows = T == 1 ? 8 : 12 / T;
  static constexpr int kTokens = T;

  // Between two tokens: whole groups, and no power of two, so that the tokens do not fall into the same sets of
  // the cache.
  static int64_t stride(int64_t features) {
    constexpr int64_t kLine = 64 / sizeof(float);
    return (((features + kGroup<W> - 1) / kGroup<W> * kGroup<W> / kLine + 1) | 1) * kLine;
  }
  static int64_t floats(int64_t features) { return stride(features) * T; }
  static int64_t offset(int64_t feature, int t, int64_t features) { return t * stride(features) + place<W>(feature); }

  // Rows [begin, end) of w [.., k]; emit(row, outputs of the tokens) is called for each.
  template <typename Emit>
  static void stream(const W* w, int64_t begin, int64_t end, int64_t k, const float* x, const Emit& emit) {
    float out[kRows][4];
    int64_t row = begin;
    if (T == 1 && k * int64_t(sizeof(W)) <= kShortRow) {
      for (; row < end; ++row) {
        out[0][0] = dot_row(w + row * k, k, x);
        emit(row, out[0]);
      }
      return;
    }
    for (; row + kRows <= end; row += kRows) {
      dot_tile<kRows, T>(w + row * k, k, x, stride(k), out);
      for (int r = 0; r < kRows; ++r) emit(row + r, out[r]);
    }
    for (; row < end; ++row) {
      dot_tile<1, T>(w + row * k, k, x, stride(k), out);
      emit(row, out[0]);
    }
  }
};

}  // namespace pifa
