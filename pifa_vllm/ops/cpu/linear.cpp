// pifa::linear on the CPU: checks, then the kernel for the number of tokens.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/repeat_interleave.h>
#include <torch/library.h>

#include <optional>
#include <type_traits>
#include <utility>

#include "decode.h"
#include "dot_blocks.h"
#include "prefill.h"
#include "quantized_decode.h"
#include "quantized_prefill.h"

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

struct Scratch {
  at::TensorOptions options;
  mutable at::Tensor buffer = {};

  float* operator()(int64_t floats) const {
    buffer = at::empty({floats}, options.dtype(at::kFloat));
    return static_cast<float*>(buffer.mutable_data_ptr());
  }
};

// x [.., n] to y, contiguous both, y not empty. The number of tokens at which one kernel overtakes the next does not
// depend on the layer: it is where vectors over tokens are full enough, and where bytes stop to matter.
template <typename W>
void run(const Layer<W>& layer, const at::Tensor& x, at::Tensor& y) {
  const int64_t tokens = y.numel() / layer.outputs;
  const int threads = at::get_num_threads();
  const W* const in = data<W>(x);
  W* const out = static_cast<W*>(y.mutable_data_ptr());
  const Scratch scratch{x.options()};
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

template <typename X>
void run(const Layer<X, Quantized>& layer, const at::Tensor& x, at::Tensor& y) {
  const int64_t tokens = y.numel() / layer.outputs;
  const int threads = at::get_num_threads();
  const X* const in = data<X>(x);
  X* const out = static_cast<X*>(y.mutable_data_ptr());
  const Scratch scratch{x.options()};
  const auto few = [&](auto t) {
    constexpr int kTokens = decltype(t)::value;
    float* const memory = scratch(quantized_decode_scratch<kTokens>(layer, threads));
    quantized_decode<kTokens>(layer, in, out, int(tokens), memory, threads);
  };
  if (tokens == 1) few(std::integral_constant<int, 1>{});
  else if (tokens == 2) few(std::integral_constant<int, 2>{});
  else if (tokens == 3) few(std::integral_constant<int, 3>{});
  else if (tokens == 4) few(std::integral_constant<int, 4>{});
  // Half of a vector over tokens would be empty.
  else if (kLanes > 8 && tokens <= 8) few(std::integral_constant<int, 8>{});
  else if (tokens > kLanes) quantized_prefill<2>(layer, in, out, tokens, scratch, threads);
  else quantized_prefill<1>(layer, in, out, tokens, scratch, threads);
}

// next(rows, k) gives the shards' coefficients, one matrix after another.
template <typename X, typename M, typename Next>
Layer<X, M> layer_of(int64_t n, int64_t pivots, const M& pivot_weight, at::IntArrayRef ranks,
                     at::IntArrayRef out_features, const Next& next) {
  Layer<X, M> layer{};
  layer.n = n;
  layer.pivots = pivots;
  layer.pivot_weight = pivot_weight;
  int64_t pivot = 0, rest = pivots;
  for (size_t i = 0; i < ranks.size(); ++i) {
    const int64_t rows = out_features[i] - ranks[i];
    layer.shards.push_back({ranks[i], rows, next(rows, ranks[i]), pivot, rest});
    pivot += ranks[i];
    rest += rows;
  }
  layer.outputs = rest;
  return layer;
}

// Many bfloat16 tokens by the library's matrix product; x [.., n] and y are contiguous.
void run_library(const at::Tensor& x, const at::Tensor& pivot_weight, const at::Tensor& coefficients,
                 const OptionalTensor& out_rows, at::IntArrayRef ranks, at::IntArrayRef out_features,
                 const OptionalTensor& bias, at::Tensor& y) {
  const int64_t tokens = y.numel() / y.size(-1), outputs = y.size(-1);
  const at::Tensor y_p = at::linear(x.view({tokens, x.size(-1)}), pivot_weight);  // [tokens, Σr]
  bfloat16* const out = static_cast<bfloat16*>(y.mutable_data_ptr());
  // index_copy_ goes through all tokens for each column, and takes longer than the products.
  const auto place = [&](int64_t stacked, const at::Tensor& values) {  // [tokens, count], contiguous
    const int64_t count = values.size(1);
    const bfloat16* const from = data<bfloat16>(values);
    const int32_t* const columns = out_rows ? data<int32_t>(*out_rows) + stacked : nullptr;
    at::parallel_for(0, tokens, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const bfloat16* const row = from + t * count;
        bfloat16* const to = out + t * outputs;
        if (columns) for (int64_t i = 0; i < count; ++i) to[columns[i]] = row[i];
        else std::copy_n(row, count, to + stacked);
      }
    });
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
  if (bias) y.add_(*bias);
}

// bfloat16 [rows, k] of quantized numbers, for the library.
template <typename Q>
void narrow_rows(const Quantized& w, bfloat16* out) {
  constexpr int64_t kBlocks = kChunk / kBlock;
  at::parallel_for(0, w.rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float scales[kBlocks];
      for (int64_t b = 0; b * kBlock < w.k; ++b) {
        if (b % kBlocks == 0) w.read_scales(r, b / kBlocks, scales);
        vint wide[kParts];
        const int64_t count = std::min<int64_t>(kBlock, w.k - b * kBlock);
        if (count == kBlock) Q::read(w.row(r), b, wide);
        else read_last<Q>(w.row(r), w.k, wide);
        int16_t numbers[kBlock];
        std::memcpy(numbers, wide, sizeof numbers);
        const float scale = scales[b % kBlocks / w.segment];
        for (int64_t i = 0; i < count; ++i) from_float(float(numbers[i]) * scale, out + r * w.k + b * kBlock + i);
      }
    }
  });
}

// The factors of a layer as the library takes them: pivot rows, and coefficients one matrix after another.
std::pair<at::Tensor, at::Tensor> narrow(const Layer<bfloat16, Quantized>& layer, const at::TensorOptions& options) {
  int64_t numbers = 0;
  for (const auto& shard : layer.shards) numbers += shard.rest * shard.rank;
  const at::Tensor pivots = at::empty({layer.pivots, layer.n}, options), rest = at::empty({numbers}, options);
  const auto write = [](const Quantized& w, bfloat16* out) {
    if (w.four) narrow_rows<Int4>(w, out);
    else narrow_rows<Int8>(w, out);
  };
  write(layer.pivot_weight, static_cast<bfloat16*>(pivots.mutable_data_ptr()));
  bfloat16* next = static_cast<bfloat16*>(rest.mutable_data_ptr());
  for (const auto& shard : layer.shards) write(shard.coefficients, std::exchange(next, next + shard.rest * shard.rank));
  return {pivots, rest};
}

int64_t width(at::ScalarType stored, int64_t k) { return stored == at::kByte ? Int4::width(k) : k; }
int64_t groups(int64_t k, int64_t group_size) {
  return group_size > 0 ? (k + group_size - 1) / group_size : std::min<int64_t>(k, 1);
}

void check_quantized(const at::Tensor& tensor, const char* name) {
  const auto stored = tensor.scalar_type();
  TORCH_CHECK_VALUE(stored == at::kChar || stored == at::kByte || stored == at::kFloat8_e4m3fn, "pifa::linear: ", name,
                    ": expected int8, uint8 or float8_e4m3fn with scales, found ", stored, ".");
}

at::Tensor linear(const at::Tensor& any_x, const at::Tensor& pivot_weight, const at::Tensor& coefficients,
                  const OptionalTensor& out_rows, at::IntArrayRef ranks, at::IntArrayRef out_features,
                  const OptionalTensor& bias, const OptionalTensor& pivot_scale, const OptionalTensor& coefficient_scale,
                  int64_t group_size);

// With numbers of 8-bit floats, which no CPU is made for.
at::Tensor linear_by_float(const at::Tensor& x, const at::Tensor& pivot_weight, const at::Tensor& coefficients,
                           const OptionalTensor& out_rows, at::IntArrayRef ranks, at::IntArrayRef out_features,
                           const OptionalTensor& bias, const at::Tensor& pivot_scale,
                           const at::Tensor& coefficient_scale, int64_t group_size) {
  const auto wide = [&](const at::Tensor& numbers, const at::Tensor& scale, int64_t rows, int64_t k) {
    const int64_t size = group_size > 0 ? group_size : std::max<int64_t>(k, 1);
    const at::Tensor spread = at::repeat_interleave(scale.view({rows, groups(k, group_size)}).to(at::kFloat), size, 1);
    return numbers.view({rows, k}).to(at::kFloat).mul_(spread.narrow(1, 0, k));
  };
  std::vector<at::Tensor> matrices{at::empty({0}, x.options().dtype(at::kFloat))};
  int64_t number = 0, scale = 0;
  for (size_t i = 0; i < ranks.size(); ++i) {
    const int64_t rest = out_features[i] - ranks[i], scales = rest * groups(ranks[i], group_size);
    matrices.push_back(wide(coefficients.narrow(0, number, rest * ranks[i]),
                            coefficient_scale.narrow(0, scale, scales), rest, ranks[i])
                           .flatten());
    number += rest * ranks[i];
    scale += scales;
  }
  const OptionalTensor wide_bias = bias ? OptionalTensor(bias->to(at::kFloat)) : std::nullopt;
  const at::Tensor weight = wide(pivot_weight, pivot_scale, pivot_weight.size(0), x.size(-1));
  return linear(x.to(at::kFloat), weight, at::cat(matrices), out_rows, ranks, out_features, wide_bias, {}, {}, 0)
      .to(x.scalar_type());
}

at::Tensor linear(const at::Tensor& any_x, const at::Tensor& pivot_weight, const at::Tensor& coefficients,
                  const OptionalTensor& out_rows, at::IntArrayRef ranks, at::IntArrayRef out_features,
                  const OptionalTensor& bias, const OptionalTensor& pivot_scale, const OptionalTensor& coefficient_scale,
                  int64_t group_size) {
  const auto dtype = any_x.scalar_type();
  TORCH_CHECK_VALUE(any_x.dim() >= 1, "pifa::linear: x: expected [..., features], found a scalar.");
  TORCH_CHECK_VALUE(ranks.size() == out_features.size(), "pifa::linear: expected as many ranks as out_features, found ",
                    ranks.size(), " and ", out_features.size(), ".");
  TORCH_CHECK_VALUE(pivot_scale.has_value() == coefficient_scale.has_value(),
                    "pifa::linear: expected scales of both factors or of none, found those of one.");
  const bool quantized = pivot_scale.has_value();
  if (quantized) {
    check_quantized(pivot_weight, "pivot_weight");
    check_quantized(coefficients, "coefficients");
    TORCH_CHECK_VALUE((pivot_weight.scalar_type() == at::kFloat8_e4m3fn) ==
                          (coefficients.scalar_type() == at::kFloat8_e4m3fn),
                      "pifa::linear: expected float8_e4m3fn of both factors or of none, found ",
                      pivot_weight.scalar_type(), " and ", coefficients.scalar_type(), ".");
    TORCH_CHECK_VALUE(group_size == 0 || group_size == 32 || group_size == 64 || group_size == 128 || group_size == 256,
                      "pifa::linear: group_size: expected 0, 32, 64, 128 or 256, found ", group_size, ".");
  }
  const auto of_weight = quantized ? pivot_weight.scalar_type() : dtype;
  const auto of_coefficients = quantized ? coefficients.scalar_type() : dtype;
  const int64_t n = any_x.size(-1);
  int64_t pivots = 0, outputs = 0, numbers = 0, scales = 0;
  for (size_t i = 0; i < ranks.size(); ++i) {
    TORCH_CHECK_VALUE(0 <= ranks[i] && ranks[i] <= out_features[i], "pifa::linear: ranks[", i, "]: expected 0 to ",
                      out_features[i], ", found ", ranks[i], ".");
    const int64_t rest = out_features[i] - ranks[i];
    pivots += ranks[i];
    outputs += out_features[i];
    numbers += rest * width(of_coefficients, ranks[i]);
    scales += rest * groups(ranks[i], group_size);
  }
  check(pivot_weight, "pivot_weight", of_weight, {pivots, width(of_weight, n)}, any_x);
  check(coefficients, "coefficients", of_coefficients, {numbers}, any_x);
  if (out_rows) check(*out_rows, "out_rows", at::kInt, {outputs}, any_x);
  if (bias) check(*bias, "bias", dtype, {outputs}, any_x);
  if (quantized) {
    check(*pivot_scale, "pivot_scale", at::kHalf, {pivots, groups(n, group_size)}, any_x);
    check(*coefficient_scale, "coefficient_scale", at::kHalf, {scales}, any_x);
  }
  if (of_weight == at::kFloat8_e4m3fn)
    return linear_by_float(any_x, pivot_weight, coefficients, out_rows, ranks, out_features, bias, *pivot_scale,
                           *coefficient_scale, group_size);
  if (dtype == at::kHalf) {
    // No CPU serves float16; this is for a look at such a model.
    const auto wide = [](const at::Tensor& tensor) { return tensor.to(at::kFloat); };
    const auto factor = [&](const at::Tensor& tensor) { return quantized ? tensor : wide(tensor); };
    const OptionalTensor wide_bias = bias ? OptionalTensor(wide(*bias)) : std::nullopt;
    return linear(wide(any_x), factor(pivot_weight), factor(coefficients), out_rows, ranks, out_features, wide_bias,
                  pivot_scale, coefficient_scale, group_size)
        .to(at::kHalf);
  }
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16,
                    "pifa::linear: x: expected float32, bfloat16 or float16, found ", dtype, ".");

  const at::Tensor x = any_x.contiguous();
  auto shape = x.sizes().vec();
  shape.back() = outputs;
  at::Tensor y = at::empty(shape, x.options());
  if (y.numel() == 0) return y;
  // Calling the library costs what small layers take.
  const int64_t tokens = y.numel() / outputs;
  const int64_t most = pivot_weight.numel() + coefficients.numel() > 1 << 20 ? 4 : 2 * kLanes;
  if (!quantized && kNativeBfloat16 && dtype == at::kBFloat16 && tokens > most) {
    run_library(x, pivot_weight, coefficients, out_rows, ranks, out_features, bias, y);
    return y;
  }
  const auto finish = [&](auto layer, auto zero) {
    using X = decltype(zero);
    layer.out_rows = out_rows ? data<int32_t>(*out_rows) : nullptr;
    layer.bias = bias ? data<X>(*bias) : nullptr;
    run(layer, x, y);
  };
  const auto floats = [&](auto zero) {
    using X = decltype(zero);
    const X* next = data<X>(coefficients);
    const auto matrix = [&](int64_t rows, int64_t k) { return std::exchange(next, next + rows * k); };
    finish(layer_of<X>(n, pivots, data<X>(pivot_weight), ranks, out_features, matrix), zero);
  };
  const auto integers = [&](auto zero) {
    using X = decltype(zero);
    const auto matrix = [&](const at::Tensor& numbers, const at::Tensor& scale, int64_t rows, int64_t k) {
      const auto stored = numbers.scalar_type();
      return Quantized{static_cast<const uint8_t*>(numbers.const_data_ptr()), data<at::Half>(scale), stored == at::kByte,
                       rows, k, width(stored, k), groups(k, group_size), (group_size > 0 ? group_size : kChunk) / kBlock};
    };
    int64_t number = 0, group = 0;
    const auto shard = [&](int64_t rows, int64_t k) {
      Quantized found = matrix(coefficients, *coefficient_scale, rows, k);
      found.numbers += std::exchange(number, number + rows * found.width);
      found.scales += std::exchange(group, group + rows * found.groups);
      return found;
    };
    const auto layer = layer_of<X>(n, pivots, matrix(pivot_weight, *pivot_scale, pivots, n), ranks, out_features, shard);
    if constexpr (kNativeBfloat16 && std::is_same_v<X, bfloat16>) {
      // So many that the library's products win more than widening all weights costs.
      if (tokens > 8 * kLanes) {
        const auto [wide, rest] = narrow(layer, x.options());
        run_library(x, wide, rest, out_rows, ranks, out_features, bias, y);
        return;
      }
    }
    finish(layer, zero);
  };
  const auto typed = [&](auto zero) {
    if (quantized) integers(zero);
    else floats(zero);
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
