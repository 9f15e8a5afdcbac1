"""Many prompts at once, without a server: `python vllm_batch.py CHECKPOINT [PROMPTS.txt]`, a prompt a line.

vLLM needs no flag and no import of ours: it finds the plugin by itself, and the checkpoint says that it needs it.
"""

import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main() -> None:
    """Print each prompt and what the model makes of it."""
    prompts = ["The capital of France is", "Low-rank matrices are", "Once upon a time"]
    if len(sys.argv) > 2:
        prompts = Path(sys.argv[2]).read_text(encoding="utf-8").splitlines()
    # For a CPU, where vLLM would take most of the memory for its KV cache. On a GPU leave the last one out.
    llm = LLM(sys.argv[1], max_model_len=256, kv_cache_memory_bytes=256 << 20)
    for output in llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=32)):
        print(output.prompt, "->", output.outputs[0].text)


# vLLM starts processes that import this file again.
if __name__ == "__main__":
    main()
