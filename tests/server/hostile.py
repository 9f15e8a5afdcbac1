"""Hostile clients, against a real server behind a real nginx: `python -m tests.server.hostile --output FILE`.

Each attack is sent while an honest client asks, too: what matters is what both get, and that memory comes back.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import statistics
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from pifa_vllm.served import ServerProcess, free_port
from tests.server.serving import Server, save_tiny_checkpoint

# vLLM's own API server, without this package's.
BARE = ("vllm.entrypoints.launchers.api_server.entry", "--model")
_MB = 1 << 20
CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
_HI = [{"role": "user", "content": "Hi"}]


class Attack(NamedTuple):
    """One request's body."""

    path: str
    body: bytes


def chat(**fields: Any) -> Attack:
    """A chat request with something in it."""
    return Attack(CHAT, json.dumps({"model": "tiny", "messages": _HI, "max_tokens": 2, **fields}).encode())


def filled(path: str, field: str, item: bytes, size: int = 3 * _MB) -> Attack:
    """A list that fills the body."""
    items = b",".join([item] * (size // (len(item) + 1)))
    return Attack(path, b'{"model": "tiny", "max_tokens": 1, "%s": [%s]}' % (field.encode(), items))


def tool(parameters: Any) -> Attack:
    """A tool that must be called, whose parameters are compiled into a grammar."""
    function = {"name": "f", "parameters": parameters}
    return chat(tools=[{"type": "function", "function": function}], tool_choice="required")


def string(pattern: str) -> dict[str, Any]:
    """A schema of a string."""
    return {"type": "object", "properties": {"a": {"type": "string", "pattern": pattern}}}


def nested(levels: int) -> dict[str, Any]:
    """A schema in a schema."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


_DRAFT4 = "http://json-schema.org/draft-04/schema#"
ATTACKS: dict[str, Attack] = {
    "deep lists": Attack(CHAT, b"[" * (3 * _MB)),
    "deep objects": Attack(TEXT, b'{"a":' * (_MB // 2)),
    "deep lists in a field": Attack(CHAT, b'{"model": "tiny", "messages": ' + b"[" * 900 + b"]" * 900 + b"}"),
    "empty lists for messages": filled(CHAT, "messages", b"[]"),
    "empty objects for messages": filled(CHAT, "messages", b"{}"),
    "as many empty objects as may be": filled(CHAT, "messages", b"{}", 3 * 16000),
    "numbers for messages": filled(CHAT, "messages", b"1"),
    "empty objects for parts": Attack(
        CHAT,
        b'{"model": "tiny", "messages": [{"role": "user", "content": [%s]}]}' % b",".join([b"{}"] * 16000),
    ),
    "empty objects for input": filled(RESPONSES, "input", b"{}"),
    "as much input as may be": filled(RESPONSES, "input", b"{}", 3 * 500),
    "empty objects for Anthropic": filled(MESSAGES, "messages", b"{}"),
    "empty lists for prompts": filled(TEXT, "prompt", b"[]"),
    "a million prompts": filled(TEXT, "prompt", b'"a"'),
    "a million inputs": filled("/v1/embeddings", "input", b'"a"'),
    "a million token ids": filled(TEXT, "prompt", b"1"),
    "a million token ids that are none": filled(TEXT, "prompt", b"-1"),
    "nulls for token ids": filled(TEXT, "prompt", b"null"),
    "tokens to turn into text": filled("/detokenize", "tokens", b"1"),
    "a prompt of 3 MB": Attack(TEXT, json.dumps({"model": "tiny", "prompt": "word " * (_MB // 2)}).encode()),
    "a body of 5 MB": Attack(TEXT, b'{"model": "tiny", "prompt": "' + b"a" * (5 * _MB) + b'"}'),
    "a number of a million digits": Attack(CHAT, b'{"max_tokens": ' + b"9" * 1_000_000 + b"}"),
    "a number of 4,000 digits": Attack(
        TEXT, b'{"model": "tiny", "prompt": "a", "max_tokens": ' + b"9" * 4000 + b"}"
    ),
    "a seed beyond 64 bits": chat(seed=2**80),
    "NaN": Attack(TEXT, b'{"model": "tiny", "prompt": "a", "temperature": NaN}'),
    "infinity": Attack(TEXT, b'{"model": "tiny", "prompt": "a", "temperature": Infinity}'),
    "1e999": Attack(TEXT, b'{"model": "tiny", "prompt": "a", "top_p": 1e999}'),
    "a lone surrogate": Attack(TEXT, b'{"model": "tiny", "prompt": "\\ud800", "max_tokens": 2}'),
    "a lone surrogate for a model": Attack(TEXT, b'{"model": "\\udfff", "prompt": "a"}'),
    "zero bytes": Attack(TEXT, b'{"model": "tiny", "prompt": "\\u0000\\u0000", "max_tokens": 2}'),
    "not UTF-8": Attack(TEXT, b'{"model": "tiny", "prompt": "\xc3\x28"}'),
    "10,000 tools": chat(tools=[{"type": "function", "function": {"name": f"f{i}"}} for i in range(10_000)]),
    "1,000 tools": chat(tools=[{"type": "function", "function": {"name": f"f{i}"}} for i in range(1000)]),
    "an enum of 17,000": tool({"$schema": _DRAFT4, "enum": [*range(17_000), "a"]}),
    "an enum of 4,000": tool({"$schema": _DRAFT4, "enum": [*range(4000), "a"]}),
    "a pattern of 3,000 parentheses": tool(string("(" * 3000 + ")" * 3000)),
    "a pattern repeated without end": tool(string("a{99999999999999}")),
    "a pattern of nested repeats": tool(string("(((a{1,99}){1,99}){1,99}){1,99}")),
    "a draft that is a list": tool({"$schema": [], "type": "object"}),
    "a schema of 200 levels": tool(nested(200)),
    "a schema that refers to itself": tool({"$ref": "#"}),
    "a schema elsewhere": tool({"$ref": "http://127.0.0.1:1/schema"}),
    "a grammar without end": chat(structured_outputs={"grammar": "root ::= root root"}),
    "a regular expression": chat(structured_outputs={"regex": "(a|a)*" * 500 + "b"}),
    "300,000 biases": chat(logit_bias={str(i): 1 for i in range(300_000)}),
    "a bias for no token": chat(logit_bias={"99999999": 1}),
    "300,000 stops": chat(stop=["a"] * 300_000),
    "a stop of 1 MB": chat(stop="a" * _MB),
    "n beyond all": Attack(TEXT, b'{"model": "tiny", "prompt": "a", "n": 1000000}'),
    "a template of its own": chat(chat_template="{% for i in range(10**9) %}a{% endfor %}"),
    "arguments for the template": chat(chat_template_kwargs={"messages": 1, "tokenize": "no"}),
    "an image elsewhere": chat(
        messages=[
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1"}}]}
        ]
    ),
}


def honest(url: str, timeout: float = 120.0) -> tuple[int, float]:
    """A good request: status and seconds."""
    began = time.monotonic()
    request = {"model": "tiny", "prompt": "Hi", "max_tokens": 1}
    status = httpx.post(f"{url}{TEXT}", json=request, timeout=timeout).status_code
    return status, round(time.monotonic() - began, 2)


def send(url: str, attack: Attack) -> tuple[int, str]:
    """The status and the beginning of the answer; 0 where there was none."""
    headers = {"Content-Type": "application/json"}
    try:
        response = httpx.post(f"{url}{attack.path}", content=attack.body, headers=headers, timeout=120)
    except httpx.HTTPError as error:
        return 0, type(error).__name__
    return response.status_code, response.text[:160]


def ask(method: str, url: str, **request: Any) -> int:
    """The status of an answer; 0 where there was none."""
    try:
        return httpx.request(method, url, timeout=60, **request).status_code
    except httpx.HTTPError:
        return 0


def attacked(url: str, attack: Attack) -> dict[str, Any]:
    """Send an attack, and an honest request into it."""
    found: list[tuple[int, str]] = []
    attacker = threading.Thread(target=lambda: found.append(send(url, attack)))
    attacker.start()
    time.sleep(0.1)
    status, seconds = honest(url)
    attacker.join()
    return {"status": found[0][0], "answer": found[0][1], "honest status": status, "honest seconds": seconds}


def slow_clients(port: int, url: str, clients: int = 200) -> dict[str, Any]:
    """Clients that send half of a request and then nothing."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    body = head + b'Content-Length: 9999\r\n\r\n{"'
    halves = (b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-A: ", body, b"")
    with ExitStack() as stack:
        for i in range(clients):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            connection.sendall(halves[i % len(halves)])
        status, seconds = honest(url)
    return {"clients": clients, "honest status": status, "honest seconds": seconds}


def fuzzed(url: str, requests: int) -> dict[str, Any]:
    """Requests that schemathesis makes of the server's own OpenAPI schema.

    Returns:
        How many, the statuses, and what was answered with 500 or more.
    """
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, seed, settings

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    statuses: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    replay: dict[str, Any] = {}
    quiet = settings(
        max_examples=max(1, min(40, requests // len(operations))),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    def one(case: Any) -> None:
        try:
            response = case.call(base_url=url, timeout=60)
        except Exception as error:  # what the client cannot send is no answer of the server
            statuses[type(error).__name__] += 1
            return
        statuses[str(response.status_code)] += 1
        if response.status_code >= 500:
            text = f"{case.method} {case.path} {response.status_code} {response.text[:120]}"
            failures[text] += 1
            sent = response.request
            replay.setdefault(text, (sent.method, sent.path_url, dict(sent.headers), sent.body))

    for turn in count():
        for operation in operations:

            @seed(turn)
            @quiet
            @given(case=operation.as_strategy())
            def fuzz(case: Any) -> None:
                one(case)

            fuzz()
        if statuses.total() >= requests:
            break
    return {
        "requests": statuses.total(),
        "operations": len(operations),
        "statuses": statuses,
        "failures": failures,
        "replay": replay,
    }


def own_failures(log: str) -> list[str]:
    """The files of this package in which exceptions of the log were raised."""
    raised = [re.findall(r'File "([^"]+)"', block)[-1:] for block in log.split("Traceback ")[1:]]
    return [file for files in raised for file in files if "/server/" in file and "site-packages" not in file]


def main() -> None:
    """Attack a server of a tiny model, and write what became of it."""
    from tests.deploy.test_proxy import nginx

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=2000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder)
        save_tiny_checkpoint(root)
        flags = ("--max-model-len", "256", "--enable-auto-tool-choice", "--tool-call-parser", "hermes")
        server = Server(root / "pifa", root / "server.log", *flags)
        stack.callback(server.process.kill)
        server.wait()
        (root / "proxy").mkdir()
        port = stack.enter_context(
            nginx(root / "proxy", server.port, PROXY_TIMEOUT="30s", PROXY_CONNECTIONS="1000")
        )
        url = f"http://127.0.0.1:{port}"
        fuzzed(server.url, 100)  # what grows with the first requests stays
        before = server.resident()
        attacks = {}
        for name, attack in ATTACKS.items():
            attacks[name] = attacked(url, attack)
            print(name, json.dumps(attacks[name]), flush=True)
        attacks["200 slow clients"] = slow_clients(port, url)
        between = server.resident()
        fuzz = fuzzed(url, args.requests)
        at_last = honest(url)
        after = server.resident()
        log = server.log.read_text()
        server.stop()
        # What is answered with an error of the server must be one of vLLM's alone.
        failing = [name for name, found in attacks.items() if found.get("status", 200) >= 500]
        with ServerProcess(
            root / "pifa",
            free_port(),
            root / "bare.log",
            ["--served-model-name", "tiny", "--enforce-eager", *flags],
            environment={"VLLM_CPU_KVCACHE_SPACE": "1"},
            module=BARE,
        ) as bare:
            bare.wait_until_ready()
            for name in failing:
                attacks[name]["bare vLLM's status"] = send(bare.url, ATTACKS[name])[0]
            for text, (method, path, headers, body) in fuzz.pop("replay").items():
                status = ask(method, f"{bare.url}{path}", headers=headers, content=body)
                fuzz["failures"][text] = {"times": fuzz["failures"][text], "bare": status}
        report = {
            "command": "python -m tests.server.hostile",
            "honest seconds": {
                "median": statistics.median(a["honest seconds"] for a in attacks.values()),
                "largest": max(a["honest seconds"] for a in attacks.values()),
            },
            "resident MB": {
                "before": before >> 20,
                "after the attacks": between >> 20,
                "after the fuzzing": after >> 20,
            },
            "tracebacks in the log": log.count("Traceback"),
            "attacks": attacks,
            "fuzzing": {**fuzz, "honest status": at_last[0], "honest seconds": at_last[1]},
        }
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "attacks"}, indent=1))


if __name__ == "__main__":
    main()
