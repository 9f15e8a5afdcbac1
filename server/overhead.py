"""What our layer costs: the same checkpoint behind `pifa-vllm serve` and behind bare vLLM, in one run.

    python -m pifa_vllm_server.overhead DIR --output overhead.json

Both servers are started before anything is measured and stay up; requests go to them in turn, so that whatever else
slows the machine slows both. Bare vLLM is its own API server module with the same flags. Times tell little where
the machine is shared: the CPU time that the API server's process takes for the same requests is what our layer adds
to, and it hardly depends on what else runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
from pifa_vllm_server.cpu import set_cpu_defaults
from pifa_vllm_server.launch import parse_arguments
from pifa_vllm_server.model import versions

from pifa_vllm.bench.quality import describe_machine
from pifa_vllm.served import ServerProcess, free_port

_SERVERS = ("pifa-vllm", "vllm")
_MEASURED = ("ttft_seconds", "request_cpu_seconds", "tokens_per_second", "round_cpu_seconds")
# In its first second without a request, vLLM's processes still look for the next one all the time.
_SETTLE_SECONDS = 1.5


def server(name: str, directory: Path, flags: list[str], log: Path) -> ServerProcess:
    """Return one of the two, to be entered."""
    module = ["pifa_vllm", "serve"]
    if name == "vllm":
        module = ["vllm.entrypoints.launchers.api_server.entry", "--model"]
    return ServerProcess(
        directory, free_port(), log, ["--served-model-name", "model", *flags], name=name, module=module
    )


async def first_token(client: httpx.AsyncClient, url: str, prompt: str) -> float:
    """Seconds until the first piece of a streamed answer arrives."""
    request = {"model": "model", "prompt": prompt, "max_tokens": 4, "stream": True, "ignore_eos": True}
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


async def throughput(client: httpx.AsyncClient, url: str, at_once: int, tokens: int, seed: int) -> float:
    """Generated tokens per second of streamed answers, `at_once` of them together."""

    async def one(i: int) -> None:
        prompt = f"Request {seed}.{i}: once upon a time there was"
        request = {
            "model": "model",
            "prompt": prompt,
            "max_tokens": tokens,
            "stream": True,
            "ignore_eos": True,
        }
        async with client.stream("POST", f"{url}/v1/completions", json=request) as response:
            response.raise_for_status()
            async for _ in response.aiter_lines():
                pass

    began = time.perf_counter()
    await asyncio.gather(*(one(i) for i in range(at_once)))
    return at_once * tokens / (time.perf_counter() - began)


def cpu_seconds(process: psutil.Process) -> float:
    """CPU time of a process so far, in steps of the kernel's clock, 10 ms as a rule."""
    times = process.cpu_times()
    return float(times.user + times.system)


async def measure(
    urls: dict[str, str],
    processes: dict[str, psutil.Process],
    rounds: int,
    requests: int,
    at_once: int,
    tokens: int,
) -> dict[str, dict[str, list[float]]]:
    """Ask the servers in turn.

    Args:
        urls: by name of the server.
        processes: the API servers', by name.
        rounds: of throughput.
        requests: for the first token.
        at_once: requests together, for throughput.
        tokens: of each of those.

    Returns:
        By name: ttft_seconds and request_cpu_seconds, one per request, tokens_per_second and round_cpu_seconds, one
        per round; the same index was measured at about the same time.
    """
    found: dict[str, dict[str, list[float]]] = {name: {key: [] for key in _MEASURED} for name in urls}
    # A connection for each request: servers close idle ones after some seconds, as a request may be on its way.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        for url in urls.values():  # warm
            await throughput(client, url, at_once, tokens, -1)
        for i in range(requests):
            # Each goes first as often as the other.
            for name in sorted(urls, reverse=bool(i % 2)):
                await asyncio.sleep(_SETTLE_SECONDS)
                before = cpu_seconds(processes[name])
                seconds = await first_token(client, urls[name], f"Question {i}: what is the capital of")
                found[name]["request_cpu_seconds"].append(cpu_seconds(processes[name]) - before)
                found[name]["ttft_seconds"].append(seconds)
        for i in range(rounds):
            for name in sorted(urls, reverse=bool(i % 2)):
                await asyncio.sleep(_SETTLE_SECONDS)
                before = cpu_seconds(processes[name])
                rate = await throughput(client, urls[name], at_once, tokens, i)
                found[name]["round_cpu_seconds"].append(cpu_seconds(processes[name]) - before)
                found[name]["tokens_per_second"].append(rate)
    return found


def summarize(found: dict[str, dict[str, list[float]]], tokens_per_round: int) -> dict[str, Any]:
    """Compare in pairs: medians of the differences between neighbours in time. CPU times, whose clock is coarse, by
    their means.

    Returns:
        ttft_added_seconds; throughput_ratio, ours / bare; each with the quartiles of its pairs.
        cpu_added_seconds_per_request and _per_token, and cpu_added_share: of the time of one core while the rounds
        ran.
    """
    ours, bare = (found[name] for name in _SERVERS)
    spent = {
        name: {key: statistics.mean(found[name][f"{key}_cpu_seconds"]) for key in ("request", "round")}
        for name in _SERVERS
    }
    more = {key: spent[_SERVERS[0]][key] - spent[_SERVERS[1]][key] for key in ("request", "round")}
    round_seconds = statistics.mean(tokens_per_round / rate for rate in ours["tokens_per_second"])
    added = [a - b for a, b in zip(ours["ttft_seconds"], bare["ttft_seconds"], strict=True)]
    ratios = [a / b for a, b in zip(ours["tokens_per_second"], bare["tokens_per_second"], strict=True)]
    return {
        "ttft_added_seconds": statistics.median(added),
        "ttft_added_quartiles": statistics.quantiles(added, n=4),
        "ttft_seconds": {name: statistics.median(found[name]["ttft_seconds"]) for name in _SERVERS},
        "throughput_ratio": statistics.median(ratios),
        "throughput_ratio_quartiles": statistics.quantiles(ratios, n=4),
        "tokens_per_second": {name: statistics.median(found[name]["tokens_per_second"]) for name in _SERVERS},
        "cpu_added_seconds_per_request": more["request"],
        "cpu_added_seconds_per_token": more["round"] / tokens_per_round,
        "cpu_added_share": more["round"] / round_seconds,
        "cpu_seconds_per_request": {name: spent[name]["request"] for name in _SERVERS},
        "cpu_seconds_per_token": {name: spent[name]["round"] / tokens_per_round for name in _SERVERS},
    }


def main() -> None:
    """Run the comparison and write its JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="DIR", help="checkpoint directory")
    parser.add_argument("--name", help="of the model in the result (default: the directory's)")
    parser.add_argument("--requests", type=int, default=60, help="for the first token (default: 60)")
    parser.add_argument("--rounds", type=int, default=10, help="of throughput (default: 10)")
    parser.add_argument("--at-once", type=int, default=8, help="requests together (default: 8)")
    parser.add_argument("--tokens", type=int, default=32, help="of each of those (default: 32)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args, flags = parser.parse_known_args()  # the rest goes to both servers

    set_cpu_defaults(parse_arguments(str(args.model), flags), flags)
    with tempfile.TemporaryDirectory() as folder:
        logs = {name: Path(folder) / f"{name}.log" for name in _SERVERS}
        with ExitStack() as stack:
            urls, processes = {}, {}
            for name in _SERVERS:
                running = stack.enter_context(server(name, args.model, flags, logs[name]))
                running.wait_until_ready()
                urls[name], processes[name] = running.url, psutil.Process(running.pid)
            found = asyncio.run(
                measure(urls, processes, args.rounds, args.requests, args.at_once, args.tokens)
            )
    report = {
        "model": args.name or args.model.name,
        "flags": flags,
        "at_once": args.at_once,
        "tokens": args.tokens,
        "machine": describe_machine(),
        "versions": versions(),
        "summary": summarize(found, args.at_once * args.tokens),
        "measured": found,
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["summary"], indent=1))


if __name__ == "__main__":
    main()
