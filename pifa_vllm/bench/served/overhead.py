"""What our layer costs: the same checkpoint behind `pifa-vllm serve` and behind bare vLLM, in one run.

Both servers are started before anything is measured. Requests go to them in turn, so that whatever else slows the
machine slows both, and the one that is not asked is halted. Bare vLLM is its own API server module with the same
flags. Two starts of one and the same server differ, too, so both are started several times, and how the result
varies from start to start tells how far it can be trusted. The CPU time that the API server's process takes for the
same requests is what our layer adds to; it depends less on what else runs.
"""

from __future__ import annotations

import asyncio
import json
import math
import operator
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from pifa_vllm_server.model import versions

from pifa_vllm.bench.machine import describe_machine
from pifa_vllm.checkpoint.atomic import replace_text
from pifa_vllm.served import ServerProcess, free_port

_SERVERS = ("pifa-vllm", "vllm")
# What the server does for a request after its client has the last byte, such as logging it, belongs to it.
_AFTERWARDS_SECONDS = 0.02
# Of a request of which the first token counts.
_FEW_TOKENS = 4
_MEASURED = ("ttft_seconds", "request_cpu_seconds", "tokens_per_second", "token_cpu_seconds")


class Amounts(NamedTuple):
    """How often the servers are asked after each start, and for how much.

    Attributes:
        turns: of single requests, one after another.
        requests: in each turn.
        rounds: of throughput.
        at_once: requests together, for throughput.
        tokens: of each of those.
    """

    turns: int
    requests: int
    rounds: int
    at_once: int
    tokens: int


def server(name: str, directory: Path, flags: list[str], log: Path) -> ServerProcess:
    """Return one of the two, to be entered."""
    module = ["pifa_vllm", "serve"]
    if name == "vllm":
        module = ["vllm.entrypoints.launchers.api_server.entry", "--model"]
    return ServerProcess(
        directory, free_port(), log, ["--served-model-name", "model", *flags], name=name, module=module
    )


async def ask(client: httpx.AsyncClient, url: str, prompt: str, tokens: int) -> float:
    """Stream a whole answer; returns the seconds until its first piece arrived."""
    request = {"model": "model", "prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True}
    began = time.perf_counter()
    async with client.stream("POST", f"{url}/v1/completions", json=request) as response:
        response.raise_for_status()
        lines = response.aiter_lines()
        while not (await anext(lines)).startswith("data: {"):
            pass
        seconds = time.perf_counter() - began
        async for _ in lines:
            pass
    return seconds


def cpu_seconds(pid: int) -> float:
    """CPU time of a process's threads so far, to the nanosecond, as Linux's scheduler counts it."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


@contextmanager
def both_started(directory: Path, flags: list[str], ours_first: bool) -> Iterator[dict[str, ServerProcess]]:
    """Start the two servers, one after the other, and halt them."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        running = {}
        for name in sorted(_SERVERS, reverse=not ours_first):
            running[name] = stack.enter_context(server(name, directory, flags, Path(folder) / f"{name}.log"))
            running[name].wait_until_ready()
            running[name].suspend()
        yield running


async def measure(servers: dict[str, ServerProcess], amounts: Amounts) -> dict[str, dict[str, list[float]]]:
    """Ask the servers in turn.

    Args:
        servers: by name, started and halted.
        amounts: how often, and how much.

    Returns:
        By name: ttft_seconds (a turn's median) and request_cpu_seconds (its mean), one per turn; tokens_per_second
        and token_cpu_seconds, one per round. The same index was measured at about the same time.
    """
    found: dict[str, dict[str, list[float]]] = {name: {key: [] for key in _MEASURED} for name in servers}
    # A connection for each request: servers close idle ones after some seconds, as a request may be on its way.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        for i in range(amounts.turns):
            for name in _order(i):
                async with _alone(servers[name], client):
                    before = cpu_seconds(servers[name].pid)
                    prompts = [f"Question {i}.{j}: what is the capital of" for j in range(amounts.requests)]
                    seconds = [
                        await ask(client, servers[name].url, prompt, _FEW_TOKENS) for prompt in prompts
                    ]
                    await asyncio.sleep(_AFTERWARDS_SECONDS)
                    spent = cpu_seconds(servers[name].pid) - before
                found[name]["ttft_seconds"].append(statistics.median(seconds))
                found[name]["request_cpu_seconds"].append(spent / amounts.requests)
        for i in range(amounts.rounds):
            for name in _order(i):
                async with _alone(servers[name], client):
                    before = cpu_seconds(servers[name].pid)
                    prompts = [f"Request {i}.{j}: once upon a time there was" for j in range(amounts.at_once)]
                    began = time.perf_counter()
                    answers = (ask(client, servers[name].url, prompt, amounts.tokens) for prompt in prompts)
                    await asyncio.gather(*answers)
                    rate = amounts.at_once * amounts.tokens / (time.perf_counter() - began)
                    await asyncio.sleep(_AFTERWARDS_SECONDS)
                    spent = cpu_seconds(servers[name].pid) - before
                found[name]["tokens_per_second"].append(rate)
                found[name]["token_cpu_seconds"].append(spent / (amounts.at_once * amounts.tokens))
    return found


def _order(i: int) -> list[str]:
    """Each goes first as often as the other."""
    return sorted(_SERVERS, reverse=bool(i % 2))


@asynccontextmanager
async def _alone(running: ServerProcess, client: httpx.AsyncClient) -> AsyncIterator[None]:
    """Let one server go on, and halt it again."""
    running.resume()
    # Not counted: nothing of this server is in the processor's caches yet.
    await ask(client, running.url, "Once more", _FEW_TOKENS)
    yield
    running.suspend()


def summarize(starts: list[dict[str, dict[str, list[float]]]]) -> dict[str, Any]:
    """Compare neighbours in time: by their median within a start, and by the mean of those over all starts.

    Args:
        starts: what `measure` returned after each start of the servers.

    Returns:
        ttft_added_seconds, throughput_ratio (ours / bare), cpu_added_seconds_per_request and _per_token: each with
        the list of the starts' medians (_by_start) and, with several starts, the mean's standard error. Then the
        medians of both servers themselves.
    """
    summary: dict[str, Any] = {}
    for title, key, compare in (
        ("ttft_added_seconds", "ttft_seconds", operator.sub),
        ("throughput_ratio", "tokens_per_second", operator.truediv),
        ("cpu_added_seconds_per_request", "request_cpu_seconds", operator.sub),
        ("cpu_added_seconds_per_token", "token_cpu_seconds", operator.sub),
    ):
        pairs = [[found[name][key] for name in _SERVERS] for found in starts]
        medians = [statistics.median(map(compare, *pair)) for pair in pairs]
        summary[title] = statistics.mean(medians)
        summary[f"{title}_by_start"] = medians
        if len(medians) > 1:
            summary[f"{title}_standard_error"] = statistics.stdev(medians) / math.sqrt(len(medians))
    for key in _MEASURED:
        summary[key] = {
            name: statistics.median(value for found in starts for value in found[name][key])
            for name in _SERVERS
        }
    return summary


def overhead(
    directory: Path, output: Path, amounts: Amounts, *, starts: int, name: str, flags: list[str]
) -> dict[str, Any]:
    """Start both servers several times, measure them, and write the results after each start.

    Args:
        directory: checkpoint.
        output: JSON file of results.
        amounts: how often both are asked after each start, and for how much.
        starts: of both servers, each the first as often as the other.
        name: of the model in the results.
        flags: of `vllm serve`, for both servers.

    Returns:
        What `summarize` does.

    Raises:
        PifaError: if a server does not start.
    """
    measured = []
    for i in range(starts):
        with both_started(directory, flags, ours_first=i % 2 == 0) as servers:
            measured.append(asyncio.run(measure(servers, amounts)))
        report = {
            "model": name,
            "flags": flags,
            "requests": amounts.requests,
            "at_once": amounts.at_once,
            "tokens": amounts.tokens,
            "machine": describe_machine(),
            "versions": versions(),
            "summary": summarize(measured),
            "measured": measured,
        }
        # After each start: an end before the last one loses nothing.
        replace_text(output, json.dumps(report, indent=1) + "\n")
    return summarize(measured)
