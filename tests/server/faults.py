"""Faults done to a running server, and what became of it: `python -m tests.server.faults --output FILE`.

Each returns what was seen: how long until /ready told the truth, what requests in flight got, and how it ended.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.server.serving import Server, save_tiny_checkpoint

LONG = {"model": "tiny", "prompt": "Hi", "max_tokens": 400, "ignore_eos": True, "stream": True}


def process_named(server: Server, name: str) -> psutil.Process:
    """One of the server's processes: "EngineCore" or "Worker"."""
    root = psutil.Process(server.process.pid)
    return next(p for p in root.children(recursive=True) if name in p.name())


def ready(server: Server) -> int:
    """The status of /ready; 0 where nothing listens any more."""
    try:
        return httpx.get(f"{server.url}/ready", timeout=5).status_code
    except httpx.HTTPError:
        return 0


def seconds_until(condition: Callable[[], bool], limit: float = 120.0) -> float:
    """How long it takes."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit, "it never came true"
        time.sleep(0.1)
    return round(time.monotonic() - began, 1)


def stream(server: Server, outcomes: Counter[str], begun: threading.Semaphore, **fields: Any) -> None:
    """One streamed request, and how it ended."""
    try:
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json={**LONG, **fields}, timeout=60
        ) as response:
            begun.release()
            text = "".join(response.iter_text())
        if response.status_code != 200:
            outcomes[str(response.status_code)] += 1
        else:
            outcomes["finished" if "[DONE]" in text and '"error"' not in text else "error in the stream"] += 1
    except httpx.HTTPError as error:
        outcomes[type(error).__name__] += 1


@contextmanager
def load(server: Server, clients: int = 4, **fields: Any) -> Iterator[Counter[str]]:
    """Requests in flight while something is done; all have ended when this does."""
    outcomes: Counter[str] = Counter()
    begun = threading.Semaphore(0)
    threads = [
        threading.Thread(target=stream, args=(server, outcomes, begun), kwargs=fields) for _ in range(clients)
    ]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert begun.acquire(timeout=60), "a request is not answered"
    yield outcomes
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a request hangs"


def hung_engine(server: Server) -> dict[str, Any]:
    """The engine's process is halted, idle, and goes on after /health has told so."""
    engine = process_named(server, "EngineCore")
    engine.suspend()
    try:
        found = seconds_until(lambda: httpx.get(f"{server.url}/health", timeout=5).status_code == 503)
        reason = httpx.get(f"{server.url}/ready", timeout=5).json()["reason"]
    finally:
        engine.resume()
    healed = seconds_until(lambda: ready(server) == 200)
    return {"health 503 after s": found, "ready says": reason, "ready again after s": healed, "lost": 0}


def full_kv_cache(server: Server, clients: int = 24) -> dict[str, Any]:
    """More tokens are asked for than the cache holds: requests wait or are preempted."""
    preempted = server.metrics().total("vllm:num_preemptions_total")
    with load(server, clients, max_tokens=450) as outcomes:
        told = ready(server)
    return {
        "requests": clients,
        "preemptions": server.metrics().total("vllm:num_preemptions_total") - preempted,
        "ready": told,
        "outcomes": dict(outcomes),
        "lost": clients - outcomes["finished"],
    }


def unread_answer(server: Server) -> socket.socket:
    """A client that asks for a stream and reads nothing of it."""
    body = json.dumps({**LONG, "n": 8, "logprobs": 5}).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
    connection.sendall("\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body)
    return connection


def sigterm_under_load(server: Server) -> dict[str, Any]:
    """SIGTERM while requests run, with a client that does not read its answer."""
    late: Counter[str] = Counter()
    with unread_answer(server), load(server, max_tokens=200) as outcomes:
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        told = seconds_until(lambda: ready(server) != 200)
        with suppress(httpx.HTTPError):
            response = httpx.post(f"{server.url}/v1/completions", json={**LONG, "max_tokens": 1}, timeout=30)
            late[str(response.status_code)] += 1
    code = server.process.wait(120)
    return {
        "ready false after s": told,
        "outcomes": dict(outcomes),
        "late requests": dict(late),
        "ended after s": round(time.monotonic() - began, 1),
        "exit code": code,
        "lost": sum(outcomes.values()) - outcomes["finished"],
    }


def killed(server: Server, name: str) -> dict[str, Any]:
    """kill -9 of the engine's or of one rank's process, with requests in flight."""
    with load(server) as outcomes:
        process_named(server, name).kill()
        told = seconds_until(lambda: ready(server) != 200)
    began = time.monotonic()
    code = server.process.wait(120)
    return {
        "ready false after s": told,
        "outcomes": dict(outcomes),
        "ended after s": round(time.monotonic() - began, 1),
        "exit code": code,
        # Answered with an error, none with silence: what a killed process computed is gone.
        "lost": sum(outcomes.values()) - outcomes["finished"],
    }


def full_log_disk(server: Server) -> dict[str, Any]:
    """Nothing that is written to a file finds room any more."""
    size = server.log.stat().st_size
    root = psutil.Process(server.process.pid)
    for process in [root, *root.children(recursive=True)]:
        process.rlimit(psutil.RLIMIT_FSIZE, (size, size))
    with load(server, 4, max_tokens=50) as outcomes:
        told = ready(server)
    return {
        "outcomes": dict(outcomes),
        "bytes logged since": server.log.stat().st_size - size,
        "ready": told,
        "lost": 4 - outcomes["finished"],
    }


def port_in_use(checkpoint: Path, log: Path) -> dict[str, Any]:
    """Another server holds the port."""
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as held, log.open("w") as output:
        port = str(held.getsockname()[1])
        command = [sys.executable, "-m", "pifa_vllm", "serve", str(checkpoint), "--port", port]
        process = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=300, check=False)
    last = log.read_text().rstrip().splitlines()[-1]
    return {
        "exit code": process.returncode,
        "last line": last,
        "ended after s": round(time.monotonic() - began, 1),
    }


def main() -> None:
    """Do them all to servers of a tiny model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        save_tiny_checkpoint(root)

        def do(faults: dict[str, Callable[[Server], dict[str, Any]]], *flags: str) -> None:
            server = Server(root / "pifa", root / "server.log", *FLAGS, *flags)
            try:
                server.wait()
                for name, fault in faults.items():
                    found[name] = fault(server)
                    print(name, json.dumps(found[name]), flush=True)
            finally:
                with suppress(psutil.NoSuchProcess):
                    for child in psutil.Process(server.process.pid).children(recursive=True):
                        child.kill()
                server.process.kill()

        do(
            {
                "engine halted (SIGSTOP)": hung_engine,
                "KV cache exhausted": full_kv_cache,
                "SIGTERM under load": sigterm_under_load,
            },
            *SMALL_CACHE,
        )
        do({"log disk full": full_log_disk, "engine process killed": lambda s: killed(s, "EngineCore")})
        do({"worker killed, two ranks": lambda s: killed(s, "Worker")}, "--tensor-parallel-size", "2")
        found["port in use"] = port_in_use(root / "pifa", root / "port.log")
    args.output.write_text(
        json.dumps({"command": "python -m tests.server.faults", "faults": found}, indent=1) + "\n"
    )


FLAGS = ("--max-model-len", "512", "--max-num-seqs", "16", "--shutdown-timeout", "30")
# 512 tokens of 16 requests do not fit.
SMALL_CACHE = ("--num-gpu-blocks-override", "40", "--block-size", "32")

if __name__ == "__main__":
    main()
