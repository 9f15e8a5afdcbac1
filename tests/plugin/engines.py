"""Runs vLLM engines one after another in one process and writes what they said; started by test_engines.py.

Usage: python -m tests.plugin.engines JOBS.json RESULTS.json

A job is {"model", "options", "prompts", "max_tokens"}; its result has the answers, or the error that the engine
ended with. With "digest" it also says what each rank holds. A process of its own keeps vLLM's thread binding and
patches out of the other tests.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# Before vLLM is imported: engines in this process, so that many of them cost one import.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

from vllm import LLM, SamplingParams

OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    # Prompts are longer than this, so prefill must happen in chunks, several prompts sharing one step.
    "max_num_batched_tokens": 64,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 32 << 20,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
    "seed": 0,
}


def answers(llm: LLM, prompts: list[list[int]], **sampling: Any) -> list[dict[str, Any]]:
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    parameters = SamplingParams(temperature=0.0, ignore_eos=True, logprobs=0, **sampling)
    found = []
    for output in llm.generate(requests, parameters, use_tqdm=False):
        tokens = list(output.outputs[0].token_ids)
        answer = {
            "tokens": tokens,
            "logprobs": [c[t].logprob for t, c in zip(tokens, output.outputs[0].logprobs, strict=True)],
            "cached": output.num_cached_tokens,
        }
        if output.prompt_logprobs is not None:
            pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
            answer["prompt_logprobs"] = [chosen[t].logprob for t, chosen in pairs]
        found.append(answer)
    return found


def methods(model: Any) -> dict[str, str]:
    """Layer to the name of its quantization method."""
    return {
        name: type(module.quant_method).__name__
        for name, module in model.named_modules()
        if hasattr(module, "quant_method")
    }


def digests(model: Any) -> dict[str, str]:
    """Parameter of a layer to a digest of its values on this rank; of coefficients those of the first shard."""
    import hashlib

    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "coefficients"):
            first = module.quant_method.part(module, 0, "coefficients")
            parts = {"pivot_weight": module.pivot_weight, "coefficients": first}
            for suffix, tensor in parts.items():
                numbers = tensor.detach().contiguous().numpy().tobytes()
                found[f"{name}.{suffix}"] = hashlib.sha256(numbers).hexdigest()
    return found


def run(job: dict[str, Any], engines: list[LLM]) -> dict[str, Any]:
    try:
        llm = LLM(job["model"], **{**OPTIONS, **job["options"]})
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    # vLLM's engines do not survive that an earlier one in their process is freed.
    engines.append(llm)
    prompts, tokens = job["prompts"], job["max_tokens"]
    found = {"digests": llm.apply_model(digests)} if job.get("digest") else {}
    return {
        **found,
        "methods": llm.apply_model(methods)[0],
        "first": answers(llm, prompts, max_tokens=tokens),
        # The prompts are in the prefix cache by now.
        "again": answers(llm, prompts, max_tokens=tokens),
        "scored": answers(llm, prompts, max_tokens=1, prompt_logprobs=0),
    }


def main() -> None:
    jobs, results = map(Path, sys.argv[1:])
    engines: list[LLM] = []
    found = {name: run(job, engines) for name, job in json.loads(jobs.read_text()).items()}
    results.write_text(json.dumps(found))
    # Engines that share a process cannot all be shut down in order.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
