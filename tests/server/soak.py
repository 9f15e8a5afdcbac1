"""Mixed load for half an hour, with clients that leave and requests that are wrong.

    python -m tests.server.soak --output FILE [--minutes 30]

What the server's processes hold is written down every half minute. After the warm-up it must not grow, and a fixed
prompt must give at the end what it gave at the start.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.server.serving import Server, save_tiny_checkpoint

CLIENTS = 6
FLAGS = ("--max-model-len", "256", "--max-num-seqs", "16")
# vLLM keeps compiled grammars of every schema, up to 512 MB: more than half an hour fills.
ENVIRONMENT = {"VLLM_XGRAMMAR_CACHE_MB": "8"}
_EVERY_SECONDS = 30.0
_FIXED = {
    "model": "tiny",
    "prompt": "a fixed prompt",
    "max_tokens": 48,
    "temperature": 0.0,
    "ignore_eos": True,
}
_CHAT, _TEXT = "/v1/chat/completions", "/v1/completions"


def one_request(client: httpx.Client, draw: random.Random) -> str:
    """Something that a client may do, drawn at random; what came of it in a word."""
    words = " ".join(draw.choice(("one", "two", "three")) for _ in range(draw.randrange(1, 30)))
    text = {"model": "tiny", "prompt": words, "max_tokens": draw.randrange(1, 64), "ignore_eos": True}
    messages = [{"role": "user", "content": words}]
    kind = draw.randrange(10)
    if kind < 4:
        return str(client.post(_TEXT, json={**text, "n": draw.randrange(1, 4), "seed": kind}).status_code)
    if kind < 6:
        with client.stream("POST", _TEXT, json={**text, "stream": True}) as response:
            return "streamed" if "[DONE]" in "".join(response.iter_text()) else "stream without end"
    if kind == 6:
        with client.stream("POST", _TEXT, json={**text, "max_tokens": 200, "stream": True}) as response:
            next(response.iter_lines())
        return "left"
    if kind == 7:
        schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"enum": [words, "b"]}}}
        request = {"model": "tiny", "messages": messages, "max_tokens": 8, "response_format": schema}
        return str(client.post(_CHAT, json=request).status_code)
    if kind == 8:
        wrong = draw.choice(
            ({"model": "another"}, {"max_tokens": -1}, {"messages": [{}] * 50}, {"temperature": "x"})
        )
        return str(client.post(_CHAT, json={"model": "tiny", "messages": messages, **wrong}).status_code)
    path = draw.choice(("/metrics", "/ready", "/pifa/info", "/dashboard", "/v1/models", "/nothing"))
    return str(client.get(path).status_code)


def held(server: Server) -> dict[str, float]:
    """What the server's processes hold now."""
    root = psutil.Process(server.process.pid)
    found: Counter[str] = Counter()
    for process in [root, *root.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            found["resident MB"] += process.memory_info().rss / 2**20
            found["file descriptors"] += process.num_fds()
            found["threads"] += process.num_threads()
    return {name: round(value, 1) for name, value in found.items()}


def soak(server: Server, seconds: float) -> dict[str, Any]:
    """Ask for so long, and measure."""
    outcomes: Counter[str] = Counter()
    over = threading.Event()

    def client(seed: int) -> None:
        draw = random.Random(seed)
        with httpx.Client(base_url=server.url, timeout=120) as connection:
            while not over.is_set():
                try:
                    outcomes[one_request(connection, draw)] += 1
                except httpx.HTTPError as error:
                    outcomes[type(error).__name__] += 1

    def fixed() -> str:
        answer = httpx.post(f"{server.url}{_TEXT}", json=_FIXED, timeout=120).json()
        text: str = answer["choices"][0]["text"]
        return text

    first = fixed()
    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(CLIENTS)]
    for thread in clients:
        thread.start()
    samples, began = [], time.monotonic()
    while time.monotonic() - began < seconds:
        over.wait(min(_EVERY_SECONDS, seconds / 12))
        samples.append({"seconds": round(time.monotonic() - began), **held(server)})
    over.set()
    for thread in clients:
        thread.join()
    # A third is warm-up; what grows steadily shows between the middle and the end.
    rest = samples[len(samples) // 3 :]
    half = len(rest) // 2
    growth = {
        name: round(
            statistics.median(s[name] for s in rest[half:]) - statistics.median(s[name] for s in rest[:half]),
            1,
        )
        for name in ("resident MB", "file descriptors", "threads")
    }
    return {
        "command": "python -m tests.server.soak",
        "minutes": seconds / 60,
        "clients": CLIENTS,
        "outcomes": dict(outcomes),
        "growth after the warm-up": growth,
        "the fixed prompt's output is the same": fixed() == first,
        "samples": samples,
    }


def main() -> None:
    """Soak a server of a tiny model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        save_tiny_checkpoint(root)
        server = Server(root / "pifa", root / "server.log", *FLAGS, **ENVIRONMENT)
        try:
            server.wait()
            report = soak(server, args.minutes * 60)
            report["exit code"] = server.stop()
            report["tracebacks in the log"] = (root / "server.log").read_text().count("Traceback")
        finally:
            server.process.kill()
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({name: value for name, value in report.items() if name != "samples"}, indent=1))


if __name__ == "__main__":
    main()
