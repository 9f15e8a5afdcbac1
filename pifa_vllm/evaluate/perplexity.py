"""Perplexity by transformers: of PIFA checkpoints, which run as PIFA layers, and of ordinary dense models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pifa_vllm.checkpoint import load_tokenizer
from pifa_vllm.errors import EvaluationError
from pifa_vllm.evaluate.protocol import Perplexity, check_fit, cut_windows
from pifa_vllm.loading import load, positions_at_once

Head = Callable[[Tensor], Tensor]


def perplexity(
    model: PreTrainedModel | Path | str,
    text: str,
    *,
    seqlen: int = 2048,
    max_windows: int | None = None,
    special_tokens: bool = False,
    dtype: str = "auto",
    device: str = "cpu",
    tokenizer: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Measure the mean token negative log-likelihood over non-overlapping windows.

    The text is tokenised as one stream; within a window the first token has no context and is not scored. The
    log-softmax is taken in float32 whatever the model's dtype.

    Args:
        model: a causal language model, or the directory of one (PIFA or dense).
        text: the text; what does not fill a last window is dropped.
        seqlen: tokens per window.
        max_windows: score only the first ones.
        special_tokens: let the tokenizer add its own to the stream.
        dtype: of a model that is loaded here: "auto" (the checkpoint's), "float32", "bfloat16", "float16".
        device: of a model that is loaded here.
        tokenizer: None takes the one in the model's directory.
        progress: called with (windows done, windows) after each window.

    Raises:
        EvaluationError: if the text is too short, the windows are too long for the model, or a logit is not
            finite (naming window and position: a broken model has no perplexity, and skipping would flatter it).
        CheckpointError: if the directory is damaged.
    """
    source = model.config.name_or_path if isinstance(model, PreTrainedModel) else str(model)
    windows = cut_windows(
        tokenizer or load_tokenizer(Path(source)),
        text,
        seqlen=seqlen,
        max_windows=max_windows,
        special_tokens=special_tokens,
    )
    loaded = model if isinstance(model, PreTrainedModel) else load(source, dtype=dtype, device=device)
    check_fit(windows, loaded.config, source)
    loaded.eval()
    nlls = []
    for index, tokens in enumerate(windows.tokens):
        nlls.append(_window_nll(loaded, tokens, f"{source}: window {index}"))
        if progress is not None:
            progress(index + 1, len(windows.tokens))
    return Perplexity(
        model=source,
        engine="transformers",
        dtype=str(loaded.dtype).removeprefix("torch."),
        seqlen=seqlen,
        special_tokens=special_tokens,
        text_tokens=windows.text_tokens,
        window_nlls=tuple(nlls),
    )


@torch.inference_mode()
def _window_nll(model: PreTrainedModel, tokens: Tensor, source: str) -> float:
    """Mean NLL of tokens[1:] given what precedes each, tokens int64 [seqlen]."""
    inputs, head = head_inputs(model, tokens)
    total, position = 0.0, 0
    for logits in logit_chunks(inputs, head, model.config.get_text_config().vocab_size, source):
        expected = tokens[1:][position : position + len(logits)].to(logits.device)
        nlls = torch.logsumexp(logits, dim=1) - logits.gather(1, expected[:, None])[:, 0]
        total += float(nlls.double().sum())
        position += len(logits)
    return total / position


def head_inputs(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Head]:
    """Run a model on a window up to its head, so that the head can be applied to a few positions at a time.

    Args:
        model: a causal language model in evaluation mode.
        tokens: int64 [seqlen].

    Returns:
        What predicts tokens[1:], [seqlen - 1, width], on the model's device, and what makes logits
        [.., vocabulary] of it: for a model that changes its logits after the head those are there already.
    """
    tokens = tokens[None].to(model.device)
    if _head_is_last(model):
        states = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        return states[0, :-1], model.get_output_embeddings()
    return model(input_ids=tokens, use_cache=False).logits[0, :-1], lambda logits: logits


def logit_chunks(inputs: Tensor, head: Head, vocabulary: int, source: str) -> Iterator[Tensor]:
    """Yield the logits of what `head_inputs` gave, float32 [positions, vocabulary], some 64 MiB at a time.

    Raises:
        EvaluationError: if one is not finite, naming `source` and the position.
    """
    position = 0
    for chunk in torch.split(inputs, positions_at_once(vocabulary)):
        logits = head(chunk).float()
        finite = torch.isfinite(logits).all(dim=1)
        if not bool(finite.all()):
            bad = position + int((~finite).nonzero()[0])
            raise EvaluationError(f"{source}, position {bad}: the logits contain NaN or infinity.")
        yield logits
        position += len(logits)


def _head_is_last(model: PreTrainedModel) -> bool:
    """Tell whether logits are the head's plain output, so that the head can be applied to a few positions.

    Gemma caps its logits, Granite and Cohere scale them, after the head.
    """
    config = model.config.get_text_config()
    after_head = ("final_logit_softcapping", "logits_scaling", "logit_scale")
    return all(getattr(config, name, None) in (None, 1, 1.0) for name in after_head)
