"""Uses features of vLLM on several models and writes what they said; started by test_features.py.

Usage: python -m tests.plugin.featured_engines JOB.json RESULT.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.plugin.greedy import greedy, start  # isort: skip  # sets vLLM's environment
from vllm import LLM, SamplingParams

NGRAMS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


def top_logprobs(llm: LLM, prompts: list[list[int]], count: int) -> list[list[dict[str, float]]]:
    """Per prompt and token the log-probabilities of the best tokens."""
    parameters = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, logprobs=count)
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [
        [{str(t): p.logprob for t, p in step.items()} for step in output.outputs[0].logprobs]
        for output in llm.generate(requests, parameters, use_tqdm=False)
    ]


def use(model: str, job: dict[str, Any]) -> dict[str, Any]:
    """What is compared with the dense model."""
    prompts, tokens = job["prompts"], job["tokens"]
    plain = start(model, enable_prefix_caching=True)
    return {
        "plain": greedy(plain, prompts, tokens),
        "cached": greedy(plain, prompts, tokens),
        "logprobs": top_logprobs(plain, prompts, 5),
    }


def draft(model: str, job: dict[str, Any]) -> dict[str, Any]:
    """With n-grams as drafts."""
    drafting = start(model, speculative_config=NGRAMS, disable_log_stats=False)
    return {
        "drafting": greedy(drafting, job["prompts"], job["tokens"]),
        "accepted": sum(
            metric.value
            for metric in drafting.get_metrics()
            if metric.name == "vllm:spec_decode_num_accepted_tokens"
        ),
    }


def embed(model: str, job: dict[str, Any]) -> list[list[float]]:
    requests = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    llm = start(model, runner="pooling", convert="embed")
    return [output.outputs.embedding for output in llm.embed(requests, use_tqdm=False)]


def refusals(model: str, options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for name, chosen in options.items():
        try:
            start(model, **chosen)
        except Exception as error:
            found[name] = [type(error).__name__, str(error)]
    return found


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    found = {name: use(model, job) for name, model in job["models"].items()}
    pifa = job["models"]["pifa"]
    for name, options in job["ways"].items():
        found["pifa"][name] = greedy(start(pifa, **options), job["prompts"], job["tokens"])
    found["pifa"]["embeddings"] = embed(pifa, job)
    found["refused"] = refusals(pifa, job["refused"])
    # N-grams load numba, after which vLLM starts no further engine in a process without a GPU.
    if job["drafts"]:
        found["pifa"] |= draft(pifa, job)
    Path(sys.argv[2]).write_text(json.dumps(found))
    sys.stdout.flush()
    # Engines that share a process cannot all be shut down in order.
    os._exit(0)


if __name__ == "__main__":
    main()
