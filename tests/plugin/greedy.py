"""Asking an engine in this process; for the scripts beside the tests. Import it before vLLM."""

from __future__ import annotations

import os
from typing import Any

# Engines in this process, so that many of them cost one import.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

from vllm import LLM, SamplingParams

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 32 << 20,
    "seed": 0,
}
# vLLM's engines do not survive that an earlier one in their process is freed.
_engines: list[LLM] = []


def start(model: str, **options: Any) -> LLM:
    """Start an engine that stays."""
    _engines.append(LLM(model, **{**OPTIONS, **options}))
    return _engines[-1]


def greedy(llm: LLM, prompts: list[list[int]], tokens: int, **options: Any) -> list[dict[str, Any]]:
    """Greedy tokens and their log-probabilities; `options` are those of LLM.generate."""
    parameters = SamplingParams(temperature=0.0, ignore_eos=True, logprobs=0, max_tokens=tokens)
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    found = []
    for output in llm.generate(requests, parameters, use_tqdm=False, **options):
        said = list(output.outputs[0].token_ids)
        logprobs = [c[t].logprob for t, c in zip(said, output.outputs[0].logprobs, strict=True)]
        found.append({"tokens": said, "logprobs": logprobs, "cached": output.num_cached_tokens})
    return found
