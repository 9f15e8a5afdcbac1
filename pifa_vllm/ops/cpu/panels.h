// Panels: the activations of a few tokens, [feature][token], and their way there and back.
#pragma once

#include <algorithm>

#include "transpose.h"

namespace pifa {

// Pack features [begin, end) of x [tokens, n] into a panel [n, kPanel]; missing tokens become zero.
template <int kPanel, typename X>
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

// Columns [begin, end) of y [tokens, outputs] from a panel, where column c lies in row slot(c).
template <int kPanel, typename Y, typename Slot>
void unpack_panel(const float* panel, const Slot& slot, const Y* bias, int64_t tokens, int64_t begin, int64_t end,
                  int64_t outputs, Y* y) {
  int64_t c = begin;
  if constexpr (kPanel % kLanes == 0) {
    for (; c + kLanes <= end; c += kLanes) {
      const vfloat shift = bias ? load_floats(bias + c) : vfloat{};
      for (int64_t first = 0; first < std::min<int64_t>(tokens, kPanel); first += kLanes) {
        vfloat rows[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) rows[i] = load(panel + slot(c + i) * kPanel + first);
        transpose(rows);
        for (int64_t t = 0; t < std::min<int64_t>(tokens - first, kLanes); ++t)
          store_floats(rows[t] + shift, y + (first + t) * outputs + c);
      }
    }
  }
  for (; c < end; ++c)
    for (int64_t t = 0; t < std::min<int64_t>(tokens, kPanel); ++t)
      from_float(panel[slot(c) * kPanel + t] + (bias ? to_float(bias[c]) : 0.0f), y + t * outputs + c);
}

}  // namespace pifa
