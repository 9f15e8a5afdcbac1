"""Speculative decoding on vLLM's CPU backend: drafted tokens of sampled requests are verified as they must be.

Greedy requests need nothing of this. For sampled ones vLLM 0.32 has two faults there, whoever drafts (a model or
n-grams), which concern every model. They are put right only in engines of PIFA models that speculate, and only
where a trial finds them, by binding anew two names that the rejection sampler looks up in its module:

- Each request's temperature, top-k and top-p are expanded to its tokens by `expand_kernel`. Its CPU stand-in
  (`_expand_kernel_impl` in vllm/utils/cpu_triton_utils.py) writes to an int64 copy of the output, so the tokens are
  verified at the temperature that uninitialised memory holds; also those of greedy requests that share their batch.
  Compare vllm-project/vllm#42638. (`register_kernels`, by which platforms replace kernels, fails once numba is
  loaded, which n-grams need: it asks every object of every module for its attributes.)
- A step that verifies nothing, such as a prefill, has no rows, of which `apply_top_k_only` takes the maximum: the
  first request with a top-k ends the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from vllm.v1.sample import rejection_sampler


def ensure_verification() -> None:
    """Make this process verify sampled requests as vLLM means to. Calling it again changes nothing."""
    if not kernel_expands():
        rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
    if not takes_no_rows():
        rejection_sampler.apply_top_k_top_p = _unless_empty(rejection_sampler.apply_top_k_top_p)


def kernel_expands() -> bool:
    """Try `expand_kernel` on the temperatures of two requests with one and two drafted tokens."""
    output = torch.full((3,), torch.nan)
    ends = torch.tensor([1, 3], dtype=torch.int32)
    rejection_sampler.expand_kernel[(2,)](output, torch.tensor([0.0, 0.7]), ends, 0, 1, MAX_NUM_TOKENS=4)
    return torch.equal(output, torch.tensor([1.0, 0.7, 0.7]))


def takes_no_rows() -> bool:
    """Try `apply_top_k_top_p` on a step without drafted tokens."""
    try:
        rejection_sampler.apply_top_k_top_p(torch.empty(0, 2), torch.empty(0, dtype=torch.int32), None)
    except RuntimeError:
        return False
    return True


def expand_batch_to_tokens(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Tensor:
    """Repeat each request's value for its tokens: vLLM's function of this name.

    Args:
        x: [requests], of any dtype.
        cu_num_tokens: [requests], tokens up to and including each request's.
        num_tokens: the last of them.
        replace_from: the value that becomes `replace_to`.
        replace_to: in its place.

    Returns:
        [num_tokens], in the dtype of x.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(x == replace_from, replace_to, x)
    return torch.repeat_interleave(values, counts, output_size=num_tokens)


def _unless_empty(apply: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(apply)
    def applied(logits: Tensor, k: Tensor | None, p: Tensor | None) -> Tensor:
        return apply(logits, k, p) if len(logits) else logits

    return applied
