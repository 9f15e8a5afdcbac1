"""Speculative decoding: a dense model with its compressed forms as drafts, against the dense model alone.

Per draft, one process holds the dense model alone, the draft alone and the dense model with the draft at every K,
and each round goes over all of them, so whatever else the machine does hits all of them alike. Counted is processor
time, which on one thread is the time that an idle machine takes. One request at a time, greedy, real prompts:
acceptance depends on the text.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from pifa_vllm.bench.machine import describe_machine
from pifa_vllm.checkpoint import load_tokenizer, read_config, read_json
from pifa_vllm.checkpoint.atomic import replace_text
from pifa_vllm.errors import PifaError

QUESTIONS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short letter to a friend who has moved to another city.",
    "How do I make a simple tomato soup?",
)
TEXT_PROMPTS = 3
PROMPT_TOKENS = 64
_COUNTERS = {
    "drafts": "vllm:spec_decode_num_drafts",
    "drafted": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
}
_BY_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"


class Job(TypedDict):
    """What the measuring process is told."""

    dense: str
    draft: str
    draft_tokens: list[int]
    prompts: list[list[int]]
    output_tokens: int
    rounds: int
    eager: bool


def speculative(
    dense: Path,
    drafts: list[Path],
    text: Path,
    output: Path,
    *,
    draft_tokens: list[int],
    output_tokens: int,
    rounds: int,
    eager: bool,
    command: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measure every draft that `output` does not have yet, and write after each.

    Args:
        dense: the model that is served.
        drafts: PIFA checkpoints of it.
        text: held-out text, for half of the prompts; the others are questions in the model's chat format.
        output: JSON file of results; another measurement's file is replaced.
        draft_tokens: values of K, tokens drafted per step.
        output_tokens: generated per prompt.
        rounds: of each engine over all prompts.
        eager: without torch.compile, which starts sooner and decodes slower.
        command: the command line, for the record.
        say: told of each draft.

    Raises:
        PifaError: if a measuring process fails.
        CheckpointError: if a directory is damaged.
    """
    prompts = make_prompts(dense, text)
    dtype = read_json(dense / "config.json").get("dtype")
    subject = {
        "dense": dense.name,
        "text": text.name,
        "prompts": len(prompts),
        "prompt_tokens": sorted(map(len, prompts)),
        "output_tokens": output_tokens,
        "draft_tokens": draft_tokens,
        "rounds": rounds,
        "eager": eager,
        "dtype": dtype,
    }
    results: dict[str, Any] = {"kind": "speculative", "subject": subject, "rows": []}
    if output.is_file():
        found = read_json(output)
        if found.get("kind") == "speculative" and found.get("subject") == subject:
            results = found
    results |= {"command": command, "machine": describe_machine()}
    for draft in drafts:
        density = read_config(draft).density
        if any(row["checkpoint"] == draft.name for row in results["rows"]):
            continue
        job = Job(
            dense=str(dense),
            draft=str(draft),
            draft_tokens=draft_tokens,
            prompts=prompts,
            output_tokens=output_tokens,
            rounds=rounds,
            eager=eager,
        )
        row = {"checkpoint": draft.name, "density": density, **_measure_apart(job)}
        results["rows"].append(row)
        results["rows"].sort(key=lambda row: row["density"])
        replace_text(output, json.dumps(results, indent=1) + "\n")
        say(f"{draft.name} (density {density:.2f}): measured")
    replace_text(output, json.dumps(results, indent=1) + "\n")
    return results


def make_prompts(model: Path, text: Path) -> list[list[int]]:
    """Cut prompts from a text, evenly spread, and put questions into the model's chat format.

    Returns:
        Token ids; questions only if the tokenizer has a chat template.

    Raises:
        PifaError: if the text is too short or unreadable.
    """
    tokenizer = load_tokenizer(model)
    try:
        ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    except (OSError, UnicodeDecodeError) as error:
        raise PifaError(f"{text}: cannot be read as UTF-8 text ({error}).") from error
    if len(ids) < TEXT_PROMPTS * PROMPT_TOKENS:
        raise PifaError(
            f"{text}: expected at least {TEXT_PROMPTS * PROMPT_TOKENS} tokens for {TEXT_PROMPTS} prompts, found "
            f"{len(ids)}."
        )
    stride = len(ids) // TEXT_PROMPTS
    prompts = [list(ids[i * stride : i * stride + PROMPT_TOKENS]) for i in range(TEXT_PROMPTS)]
    if tokenizer.chat_template:
        for question in QUESTIONS:
            message = [{"role": "user", "content": question}]
            rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            prompts.append(list(tokenizer(rendered, add_special_tokens=False)["input_ids"]))
    return prompts


def measure(job: Job) -> dict[str, Any]:
    """Run the engines of one draft in this process, in turn.

    Returns:
        "dense" and "draft": ms per decoded token of either alone, per round; "speculative": the same for each K,
        with vLLM's counters over one round and how many answers are the dense model's, token by token.
    """
    # Before vLLM is imported: engines in this process, which take no processor time while another one runs.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM

    dtype = read_json(Path(job["dense"]) / "config.json").get("dtype") or "auto"
    longest = max(map(len, job["prompts"])) + job["output_tokens"] + max(job["draft_tokens"])

    def start(model: str, tokens: int | None = None) -> Any:
        draft = {"method": "draft_model", "model": job["draft"], "num_speculative_tokens": tokens}
        return LLM(
            model,
            speculative_config=draft if tokens else None,
            dtype=dtype,
            max_model_len=longest,
            max_num_seqs=1,
            max_num_batched_tokens=max(longest, 512),
            kv_cache_memory_bytes=128 << 20,
            enable_prefix_caching=False,
            enforce_eager=job["eager"],
            disable_log_stats=False,
            seed=0,
        )

    engines = {"dense": start(job["dense"]), "draft": start(job["draft"])}
    # The first answers of an engine pay for allocations, so they are not timed.
    wanted, _ = generate(engines["dense"], job)
    generate(engines["draft"], job)
    speculative = {}
    for k in map(str, job["draft_tokens"]):
        engines[k] = start(job["dense"], int(k))
        answers, _ = generate(engines[k], job)
        # vLLM shows the counters of the latest engine only. Later answers are the same ones again.
        speculative[k] = counters(engines[k])
        speculative[k]["identical"] = sum(a == b for a, b in zip(answers, wanted, strict=True))
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(job["rounds"]):
        for name, engine in engines.items():
            times[name].append(generate(engine, job)[1])
    for k, found in speculative.items():
        found["ms_per_token"] = times.pop(k)
    return {**times, "speculative": speculative}


def generate(engine: Any, job: Job) -> tuple[list[list[int]], float]:
    """Answer the prompts one by one.

    Returns:
        Token ids, and milliseconds of processor time per token after each answer's first one.
    """
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=0.0, max_tokens=job["output_tokens"], ignore_eos=True, detokenize=False
    )
    core = engine.llm_engine
    answers, tokens, seconds = [], 0, 0.0
    for index, prompt in enumerate(job["prompts"]):
        core.add_request(str(index), {"prompt_token_ids": prompt}, parameters)
        answer: list[int] = []
        while core.has_unfinished_requests():
            begin, known = time.process_time(), len(answer)
            for output in core.step():
                answer = list(output.outputs[0].token_ids)
            if known:
                tokens += len(answer) - known
                seconds += time.process_time() - begin
        answers.append(answer)
    return answers, seconds * 1e3 / tokens


def counters(engine: Any) -> dict[str, Any]:
    """Read vLLM's counters `vllm:spec_decode_*` of the engine that was started last."""
    metrics = {metric.name: metric for metric in engine.get_metrics()}
    found: dict[str, Any] = {key: metrics[name].value for key, name in _COUNTERS.items()}
    return found | {"accepted_by_position": list(metrics[_BY_POSITION].values)}


def _measure_apart(job: Job) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        told, answer = Path(directory) / "job.json", Path(directory) / "row.json"
        told.write_text(json.dumps(job))
        done = subprocess.run(
            [sys.executable, "-m", "pifa_vllm.bench.served.speculative", str(told), str(answer)], check=False
        )
        if done.returncode != 0 or not answer.is_file():
            raise PifaError(
                f"{job['draft']}: the process that measures it ended with exit code {done.returncode}; its own "
                "message stands above."
            )
        row: dict[str, Any] = json.loads(answer.read_text())
        return row


def _main() -> None:
    told, answer = map(Path, sys.argv[1:])
    answer.write_text(json.dumps(measure(json.loads(told.read_text()))))
    # Engines that share a process cannot all be shut down in order.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _main()
