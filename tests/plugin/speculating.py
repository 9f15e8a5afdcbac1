"""Runs vLLM engines with and without drafts in one process; started by test_speculative.py.

Usage: python -m tests.plugin.speculating JOBS.json RESULTS.json

A job is {"model", "speculative_config", "options", "prompts"}. Without a draft it says what the others
are compared with.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# First: it sets what vLLM reads when it is imported.
from tests.plugin.engines import OPTIONS, methods

from vllm import LLM, SamplingParams  # isort: skip

TOKENS = 20
# The lowest that vLLM takes.
COLD = 0.01


def tokens(llm: LLM, prompts: list[list[int]], parameters: Any) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def gaps(llm: LLM, prompts: list[list[int]]) -> list[list[float]]:
    """Find by how much each greedy token's log-probability exceeds the second best."""
    parameters = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=2)
    found = []
    for output in llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False):
        best = [sorted((x.logprob for x in row.values()), reverse=True) for row in output.outputs[0].logprobs]
        found.append([first - second for first, second, *_ in best])
    return found


def draft_methods(worker: Any) -> dict[str, str]:
    drafter = getattr(worker.model_runner, "drafter", None)
    return methods(drafter.model) if hasattr(drafter, "model") else {}


def run(job: dict[str, Any], engines: list[LLM]) -> dict[str, Any]:
    # All prompts in one step: a seeded request whose prefill is cut ends vLLM 0.32's engine on CPUs, speculating or
    # not (GPUModelRunner._bookkeeping_sync winds its generator back, which CPU generators cannot).
    options = {**OPTIONS, "max_num_batched_tokens": 256, "disable_log_stats": False, **job["options"]}
    try:
        llm = LLM(job["model"], speculative_config=job["speculative_config"], **options)
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    # vLLM's engines do not survive that an earlier one in their process is freed.
    engines.append(llm)
    prompts = job["prompts"]

    def sampled(**settings: Any) -> SamplingParams:
        return SamplingParams(**{"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True, **settings})

    found: dict[str, Any] = {"greedy": tokens(llm, prompts, sampled())}
    if job["speculative_config"] is None:
        return {**found, "gaps": gaps(llm, prompts)}
    counters = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    found["drafts"] = counters.get("vllm:spec_decode_num_drafts")
    found["drafted"] = counters.get("vllm:spec_decode_num_draft_tokens")
    found["accepted"] = counters.get("vllm:spec_decode_num_accepted_tokens")
    # The prompts are in the prefix cache by now.
    found["again"] = tokens(llm, prompts, sampled())
    found["cold"] = tokens(llm, prompts, sampled(temperature=COLD, seed=1))
    found["top_k"] = tokens(llm, prompts, sampled(temperature=1.0, top_k=1, seed=1))
    found["top_p"] = tokens(llm, prompts, sampled(temperature=1.0, top_p=1e-6, seed=1))
    hot = sampled(temperature=0.9, seed=2)
    found["seeded"] = [tokens(llm, prompts, hot) for _ in range(2)]
    # Greedy requests that share their steps with sampled ones.
    found["mixed"] = tokens(llm, prompts, [hot if i % 2 else sampled() for i in range(len(prompts))])[::2]
    found["methods"] = llm.apply_model(methods)[0]
    found["draft_methods"] = llm.collective_rpc(draft_methods)[0]
    return found


def main() -> None:
    jobs, results = map(Path, sys.argv[1:])
    engines: list[LLM] = []
    results.write_text(json.dumps({k: run(job, engines) for k, job in json.loads(jobs.read_text()).items()}))
    # Engines that share a process cannot all be shut down in order.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
