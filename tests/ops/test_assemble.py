"""`pifa::assemble` as an op of torch: its schema, its fake, and what Inductor makes of what follows it."""

import pytest
import torch
from torch import Tensor

from pifa_vllm.ops import assemble


@pytest.mark.parametrize("with_bias", [False, True])
def test_op_is_what_it_says(with_bias):
    y_p, y_np = torch.randn(3, 5), [torch.randn(3, 4), torch.randn(3, 0)]
    bias = torch.randn(9) if with_bias else None
    torch.library.opcheck(
        torch.ops.pifa.assemble.default,
        (y_p, y_np, torch.randperm(9), bias),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@torch.library.custom_op("pifa_test::negate_", mutates_args=("a", "b"))
def negate_(a: Tensor, b: Tensor) -> None:
    """Like vLLM's rotary embedding: in place, on two slices of the same tensor."""
    a.neg_()
    b.neg_()


@pytest.mark.parametrize("with_bias", [False, True])
def test_an_in_place_op_on_slices_of_the_output_survives_inductor(with_bias):
    order = torch.randperm(32)
    bias = torch.randn(32) if with_bias else None

    def attend(y_p, y_np):
        y = assemble(y_p, [y_np], order, bias)
        q, k, v = y.split([16, 8, 8], dim=-1)
        negate_(q, k)
        return q * 2.0, k + 1.0, v

    y_p, y_np = torch.randn(6, 20), torch.randn(6, 12)
    # vLLM compiles with this setting. With it, Inductor reads a fused slice by the strides of the whole tensor.
    with torch.inference_mode(), torch._inductor.config.patch(enable_auto_functionalized_v2=False):
        expected = attend(y_p, y_np)
        actual = torch.compile(attend, fullgraph=True, dynamic=True)(y_p, y_np)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
