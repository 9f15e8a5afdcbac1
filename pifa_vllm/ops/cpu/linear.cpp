// pifa::linear on the CPU: checks, then the kernel for the number of tokens.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <optional>

#include "decode.h"
#include "dot_blocks.h"
#include "prefill.h"

namespace pifa {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Processors that multiply bfloat16 by themselves: oneDNN is then the better choice wherever arithmetic counts. With
// AVX2 it has no bfloat16 product, and torch falls back to one that is many times slower than ours.
#if defined(__AVX512BF16__) || defined(__AMX_BF16__) || defined(PIFA_NATIVE_BFLOAT16)
constexpr bool kNativeBfloat16 = true;
#else
constexpr bool kNativeBfloat16 = false;
#endif

void check(const at::Tensor& tensor, const char* name, at::ScalarType dtype, at::IntArrayRef shape, const at::Tensor& x) {
  TORCH_CHECK_VALUE(tensor.scalar_type() == dtype, "pifa::linear: ", name, ": expected ", dtype, ", found ",
                    tensor.scalar_type(), ".");
  TORCH_CHECK_VALUE(tensor.sizes() == shape, "pifa::linear: ", name, ": expected shape ", shape, ", found ",
                    tensor.sizes(), ".");
  TORCH_CHECK_VALUE(tensor.device() == x.device(), "pifa::linear: ", name, ": expected on ", x.device(),
                    " like x, found ", tensor.device(), ".");
  TORCH_CHECK_VALUE(tensor.is_contiguous(), "pifa::linear: ", name, ": expected a contiguous tensor, found strides ",
                    tensor.strides(), ".");
}

template <typename T>
const T* data(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// x [.., n] to y, contiguous both, y not empty. The number of tokens at which one kernel overtakes the next does not
// depend on the layer: it is where vectors over tokens are full enough, and where bytes stop to matter.
template <typename W>
void run(const Layer<W>& layer, const at::Tensor& x, at::Tensor& y) {
  const int64_t tokens = y.numel() / layer.outputs;
  const int threads = at::get_num_threads();
  const W* const in = data<W>(x);
  W* const out = static_cast<W*>(y.mutable_data_ptr());
  at::Tensor buffer;
  const auto scratch = [&](int64_t floats) {
    buffer = at::empty({floats}, x.options().dtype(at::kFloat));
    return static_cast<float*>(buffer.mutable_data_ptr());
  };
  const auto few = [&](auto rows) {
    using Rows = decltype(rows);
    decode<Rows>(layer, in, out, int(tokens), scratch(decode_scratch<Rows>(layer)), threads);
  };
  if (tokens == 1) few(DotRows<W, 1>{});
  else if (tokens == 2) few(DotRows<W, 2>{});
  else if (tokens == 3) few(DotRows<W, 3>{});
  else if (tokens == 4) few(DotRows<W, 4>{});
  else if (tokens > kLanes) prefill<2>(layer, in, out, tokens, scratch, threads);
  // Between them, floats are best broadcast from where they lie; bfloat16 would have to be copied first.
  else if (sizeof(W) == sizeof(bfloat16)) few(DotBlocks<W>{});
  else prefill<1>(layer, in, out, tokens, scratch, threads);
}

template <typename W>
Layer<W> layer_of(const at::Tensor& pivot_weight, const at::Tensor& coefficients, at::IntArrayRef ranks,
                  at::IntArrayRef out_features) {
  Layer<W> layer{};
  layer.n = pivot_weight.size(1);
  layer.pivots = pivot_weight.size(0);
  layer.pivot_weight = data<W>(pivot_weight);
  const W* next = data<W>(coefficients);
  int64_t pivot = 0, rest = layer.pivots;
  for (size_t i = 0; i < ranks.size(); ++i) {
    const Shard<W> shard{ranks[i], out_features[i] - ranks[i], next, pivot, rest};
    layer.shards.push_back(shard);
    next += shard.rest * shard.rank;
    pivot += shard.rank;
    rest += shard.rest;
  }
  layer.outputs = rest;
  return layer;
}

// Many bfloat16 tokens by the library's matrix product; x [.., n] and y are contiguous.
void run_library(const at::Tensor& x, const at::Tensor& pivot_weight, const at::Tensor& coefficients,
                 const OptionalTensor& out_rows, at::IntArrayRef ranks, at::IntArrayRef out_features,
                 const OptionalTensor& bias, at::Tensor& y) {
  const at::Tensor flat = y.view({-1, y.size(-1)});
  const at::Tensor y_p = at::linear(x.view({-1, x.size(-1)}), pivot_weight);  // [tokens, Σr]
  const auto place = [&](int64_t stacked, const at::Tensor& values) {
    if (out_rows) flat.index_copy_(1, out_rows->narrow(0, stacked, values.size(1)).to(at::kLong), values);
    else flat.narrow(1, stacked, values.size(1)).copy_(values);
  };
  place(0, y_p);
  int64_t pivot = 0, stacked = y_p.size(1), number = 0;
  for (size_t i = 0; i < ranks.size(); ++i) {
    const int64_t rank = ranks[i], rest = out_features[i] - rank;
    const at::Tensor c = coefficients.narrow(0, number, rest * rank).view({rest, rank});
    if (rest > 0) place(stacked, at::linear(y_p.narrow(1, pivot, rank), c));
    pivot += rank;
    stacked += rest;
    number += rest * rank;
  }
  if (bias) flat.add_(*bias);
}

at::Tensor linear(const at::Tensor& any_x, const at::Tensor& pivot_weight, const at::Tensor& coefficients,
                  const OptionalTensor& out_rows, at::IntArrayRef ranks, at::IntArrayRef out_features,
                  const OptionalTensor& bias) {
  const auto dtype = any_x.scalar_type();
  TORCH_CHECK_VALUE(any_x.dim() >= 1, "pifa::linear: x: expected [..., features], found a scalar.");
  TORCH_CHECK_VALUE(ranks.size() == out_features.size(), "pifa::linear: expected as many ranks as out_features, found ",
                    ranks.size(), " and ", out_features.size(), ".");
  int64_t pivots = 0, outputs = 0, numbers = 0;
  for (size_t i = 0; i < ranks.size(); ++i) {
    TORCH_CHECK_VALUE(0 <= ranks[i] && ranks[i] <= out_features[i], "pifa::linear: ranks[", i, "]: expected 0 to ",
                      out_features[i], ", found ", ranks[i], ".");
    pivots += ranks[i];
    outputs += out_features[i];
    numbers += (out_features[i] - ranks[i]) * ranks[i];
  }
  check(pivot_weight, "pivot_weight", dtype, {pivots, any_x.size(-1)}, any_x);
  check(coefficients, "coefficients", dtype, {numbers}, any_x);
  if (out_rows) check(*out_rows, "out_rows", at::kInt, {outputs}, any_x);
  if (bias) check(*bias, "bias", dtype, {outputs}, any_x);
  if (dtype == at::kHalf) {
    // No CPU serves float16; this is for a look at such a model.
    const auto wide = [](const at::Tensor& tensor) { return tensor.to(at::kFloat); };
    const OptionalTensor wide_bias = bias ? OptionalTensor(wide(*bias)) : std::nullopt;
    return linear(wide(any_x), wide(pivot_weight), wide(coefficients), out_rows, ranks, out_features, wide_bias)
        .to(at::kHalf);
  }
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16,
                    "pifa::linear: x: expected float32, bfloat16 or float16, found ", dtype, ".");

  const at::Tensor x = any_x.contiguous();
  auto shape = x.sizes().vec();
  shape.back() = outputs;
  at::Tensor y = at::empty(shape, x.options());
  if (y.numel() == 0) return y;
  if (kNativeBfloat16 && dtype == at::kBFloat16 && y.numel() / outputs > 2 * kLanes) {
    run_library(x, pivot_weight, coefficients, out_rows, ranks, out_features, bias, y);
    return y;
  }
  const auto typed = [&](auto zero) {
    using W = decltype(zero);
    Layer<W> layer = layer_of<W>(pivot_weight, coefficients, ranks, out_features);
    layer.out_rows = out_rows ? data<int32_t>(*out_rows) : nullptr;
    layer.bias = bias ? data<W>(*bias) : nullptr;
    run(layer, x, y);
  };
  if (dtype == at::kFloat) typed(float{});
  else typed(bfloat16{});
  return y;
}

// y = (x Vᵀ) Uᵀ for V [r, n], U [m, r]: plain low rank by the same kernels, to compare with.
at::Tensor lowrank(const at::Tensor& x, const at::Tensor& v, const at::Tensor& u) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16,
                    "pifa::lowrank: x: expected float32 or bfloat16, found ", dtype, ".");
  check(v, "v", dtype, {v.size(0), x.size(-1)}, x);
  check(u, "u", dtype, {u.size(0), v.size(0)}, x);
  auto shape = x.sizes().vec();
  shape.back() = u.size(0);
  at::Tensor y = at::empty(shape, x.options());
  if (y.numel() == 0) return y;
  const auto typed = [&](auto zero) {
    using W = decltype(zero);
    Layer<W> layer{};
    layer.n = v.size(1);
    layer.pivots = v.size(0);
    layer.outputs = u.size(0);
    layer.pivot_weight = data<W>(v);
    layer.shards.push_back({v.size(0), u.size(0), data<W>(u), 0, 0});
    layer.pivots_are_outputs = false;
    run(layer, x.contiguous(), y);
  };
  if (dtype == at::kFloat) typed(float{});
  else typed(bfloat16{});
  return y;
}

}  // namespace
}  // namespace pifa

TORCH_LIBRARY_FRAGMENT(pifa, m) { m.def("lowrank(Tensor x, Tensor v, Tensor u) -> Tensor"); }
TORCH_LIBRARY_IMPL(pifa, CPU, m) {
  m.impl("linear", &pifa::linear);
  m.impl("lowrank", &pifa::lowrank);
}
