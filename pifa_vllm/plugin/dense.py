"""The dense layers of a PIFA checkpoint on vLLM's CPU backend: modules kept dense, and lm_head.

vLLM packs a second copy of a dense weight for oneDNN. The native kernel of `pifa::linear` streams the weight as it
is, which for the few tokens of a decoding step is faster, and it spares the copy.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import Module
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from pifa_vllm.ops import Matrix, dense
from pifa_vllm.ops.cpu import ask_for_large_pages, load


class _Streamed:
    """What both methods do with a weight [m, n] that stays where vLLM loaded it."""

    streamed = False

    def process_weights_after_loading(self, layer: Module) -> None:
        """Leave the weight as it is, if the native kernel is there to read it."""
        self.streamed = load()
        if self.streamed:
            weight: Tensor = layer.weight  # type: ignore[assignment]  # modules are not annotated
            ask_for_large_pages(weight)
        else:
            super().process_weights_after_loading(layer)  # type: ignore[misc]  # of vLLM's method beside it

    def apply(self, layer: Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply x [..., n] to [..., m]."""
        if self.streamed:
            weight: Tensor = layer.weight  # type: ignore[assignment]  # modules are not annotated
            return dense(x, Matrix(weight), bias)
        y: Tensor = super().apply(layer, x, bias)  # type: ignore[misc]  # of vLLM's method beside it
        return y


class StreamedLinearMethod(_Streamed, UnquantizedLinearMethod):
    """A dense linear layer."""


class StreamedEmbeddingMethod(_Streamed, UnquantizedEmbeddingMethod):
    """An lm_head, with or without weights of its own."""
