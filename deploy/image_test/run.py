"""Builds the CPU image from scratch and runs it: `make image-test`. Needs root, podman, runc and debootstrap.

The base is made of Debian's packages (base.sh), in place of the one that the Dockerfile names. The `cuda` target is
built on the CPU image's first stage, which stands in for vLLM's image: that shows that its instructions work, not
that they do on the real one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # for tests/, which is not installed

from pifa_vllm.bench.machine import describe_machine  # noqa: E402
from tests.pifa_tiny import save_pifa_twin  # noqa: E402
from tests.tiny import save_tiny_model  # noqa: E402

IMAGE = "pifa-vllm:cpu"
BASE = "localhost/pifa-base"
CONTAINER = "pifa-image-test"
# What has been seen to work where there is neither systemd nor a network namespace to be had.
BUILD = ["podman", "build", "--isolation=chroot", "--network=host", "--format=docker", "--pull=never"]
RUN = ["podman", "--runtime=runc", "run", "--network=host", "--ulimit=nofile=1024:1024"]
RUN += ["--ulimit=nproc=1024:1024"]
# What a container has unless it is started with more.
SHARED = "--shm-size=64m"
START_SECONDS = 900

# What was seen, in order; with seconds where they were taken.
seen: list[dict[str, object]] = []


def note(what: str, seconds: float | None = None) -> None:
    """Print what was seen, and keep it for `--output`."""
    seen.append({"seen": what} if seconds is None else {"seen": what, "seconds": round(seconds, 1)})
    print(f"== {what}" if seconds is None else f"== {what}: {seconds:.0f} s", flush=True)


def output(*command: str, check: bool = True) -> str:
    """Run a command and return what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        sys.exit(
            f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
    return (done.stdout + done.stderr if not check else done.stdout).strip()


def expect(condition: object, what: str) -> None:
    """Note what was seen to be so, or end."""
    if not condition:
        logs = output("podman", "logs", "--tail", "40", CONTAINER, check=False)
        sys.exit(f"== FAILED: {what}\n{logs}")
    note(what)


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Note how long it took."""
    started = time.monotonic()
    yield
    note(what, time.monotonic() - started)


def build() -> None:
    """Make base, CPU image and the CUDA image's stand-in."""
    with timed("base by debootstrap"):
        mounts = output("bash", str(Path(__file__).with_name("base.sh")), BASE).split()
    stand_in = f"{IMAGE}-build"
    build_target("cpu-build", stand_in, "--no-cache", *mounts)
    build_target("cpu", IMAGE, *mounts)
    build_target("cuda", "pifa-vllm:cuda", f"--build-arg=CUDA_BASE={stand_in}", *mounts)
    size = int(output("podman", "image", "inspect", "--format={{.Size}}", IMAGE))
    note(f"{IMAGE}: {size / 1e9:.2f} GB")


def build_target(target: str, image: str, *arguments: str) -> None:
    """Build one target; the build looks for the plugin by itself."""
    command = [
        *BUILD,
        f"--build-arg=CPU_BASE={BASE}",
        f"--target={target}",
        f"--tag={image}",
        *arguments,
        str(ROOT),
    ]
    with timed(f"podman build --target {target}"):
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    if done.returncode != 0:
        sys.exit(f"podman build failed:\n{done.stdout[-6000:]}")
    registered = re.search(r"^vLLM serves quant_method pifa by .*$", done.stdout, re.MULTILINE)
    if target != "cpu":  # whose layers were built with cpu-build
        expect(registered, f"{target}: {registered[0] if registered else 'the plugin is registered'}")


def inspect_image() -> None:
    """Look at what is in the image without starting the server."""
    who = [output(*RUN, "--rm", "--entrypoint=id", IMAGE, option) for option in ("-u", "-g")]
    expect(who == ["10001", "10001"], "neither user nor group is root")
    tools = "for t in cc gcc g++ clang make cmake nvcc; do command -v $t; done; true"
    expect(not output(*RUN, "--rm", "--entrypoint=sh", IMAGE, "-c", tools), "no compiler, no make")
    expect("--density" in output(*RUN, "--rm", IMAGE, "demo", "--help"), "`IMAGE demo` is the demo")
    empty = output(*RUN, SHARED, "--rm", IMAGE, check=False).splitlines()[-1]
    expect("mount one: -v" in empty, f"without a model: {empty[:150]}")


def too_many_ranks(model: Path) -> None:
    """Two ranks talk through shared memory, of which a container has little."""
    command = [*RUN, SHARED, "--rm", f"--volume={model}:/model:ro", IMAGE, "serve", "/model"]
    said = output(*command, "--tensor-parallel-size=2", check=False).splitlines()[-1]
    expect("--shm-size 1g" in said, f"two ranks with little shared memory: {said[:150]}")


def start(model: Path, *arguments: str) -> None:
    """Start the server's container in the background."""
    output("podman", "rm", "--force", "--time=0", CONTAINER, check=False)
    command = [*RUN, "--detach", f"--name={CONTAINER}", "--env=VLLM_CPU_KVCACHE_SPACE=1"]
    output(*command, SHARED, f"--volume={model}:/model:ro", IMAGE, *arguments)


def stop() -> int:
    """Send SIGTERM and return the exit code."""
    output("podman", "kill", "--signal=TERM", CONTAINER)
    return int(output("podman", "wait", CONTAINER))


def serve(model: Path, port: int) -> None:
    """Chat, look at metrics and health, stop."""
    url = f"http://127.0.0.1:{port}"
    start(model, *(() if port == 8000 else ("serve", "/model", f"--port={port}")))
    with timed("from `podman run` to ready"):
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                    break
            running = output("podman", "inspect", "--format={{.State.Running}}", CONTAINER) == "true"
            if not running or time.monotonic() > deadline:
                expect(False, "the server becomes ready")
            time.sleep(0.5)
    logs = output("podman", "logs", CONTAINER, check=False)
    kernel = re.search(r"the CPU kernel is the portable (\S+)", logs)
    expect("plain torch ops" not in logs, f"the prebuilt kernel runs{': ' + kernel[1] if kernel else ''}")

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    ask = {"model": "/model", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16}
    answer = client.chat.completions.create(**ask, temperature=0)
    expect(answer.usage.completion_tokens > 0, f"chat: {answer.usage.completion_tokens} tokens")
    pieces = list(client.chat.completions.create(**ask, stream=True))
    expect(len(pieces) > 2, f"streamed chat: {len(pieces)} pieces")
    # What vLLM compiles on first use where it can.
    scored = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3, temperature=0.8, top_p=0.9)
    expect(scored.choices[0].logprobs.content, "sampled, with log-probabilities")
    # xgrammar's kernels for CPUs; it asks for triton, which the image leaves out.
    answers = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": answers}}
    constrained = client.chat.completions.create(**{**ask, "max_tokens": 60}, response_format=form)
    text = constrained.choices[0].message.content
    expect(text.startswith("{"), f"constrained by a JSON schema: {text[:40]!r}")
    metrics = httpx.get(f"{url}/metrics", timeout=10).text
    for name in (
        "pifa_ready 1.0",
        "pifa_weight_bytes",
        "pifa_device_memory_bytes",
        "vllm:generation_tokens_total",
    ):
        expect(name in metrics, f"/metrics has {name}")
    if port == 8000:
        output("podman", "healthcheck", "run", CONTAINER)
        expect(True, "podman healthcheck run: healthy")
    with timed("SIGTERM to the end"):
        code = stop()
    expect(code == 0, f"exit code after SIGTERM: {code}")


def stop_while_starting(model: Path, port: int) -> None:
    """A process 1 without a handler would ignore SIGTERM here."""
    start(model, "serve", "/model", f"--port={port}")
    time.sleep(2)
    with timed("SIGTERM two seconds after the start, to the end"):
        code = stop()
    expect(code in (0, 143), f"exit code: {code}")


def demo() -> None:
    """Run the demo, with less calibration than it takes by itself."""
    arguments = ["demo", "--no-serve-forever", "--samples=2", "--length=128"]
    with timed("`IMAGE demo`, little calibration"):
        printed = output(*RUN, SHARED, "--rm", "--env=VLLM_CPU_KVCACHE_SPACE=1", IMAGE, *arguments)
    for line in printed.splitlines()[-12:]:
        note(f"   {line}")


def main() -> None:
    """Do everything, in order; the exit code is 0 if all of it was as expected."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="host port; the health check is tried on 8000 only"
    )
    parser.add_argument("--no-build", action="store_true", help="test the image that there is")
    parser.add_argument("--output", type=Path, help="JSON file for what was seen")
    arguments = parser.parse_args()
    if not arguments.no_build:
        build()
    inspect_image()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        root.chmod(0o755)  # the container's user reads it
        save_tiny_model(root / "dense", hidden=128, intermediate=176)
        save_pifa_twin(root / "dense", root / "pifa", root / "twin", ranks=lambda _, m, n: min(m, n) // 2)
        too_many_ranks(root / "pifa")
        try:
            serve(root / "pifa", arguments.port)
            stop_while_starting(root / "pifa", arguments.port)
        finally:
            output("podman", "rm", "--force", "--time=0", CONTAINER, check=False)
    demo()
    note("image test passed")
    if arguments.output:
        report = {
            "command": sys.argv[1:],
            "machine": describe_machine(),
            "podman": output("podman", "--version"),
        }
        arguments.output.write_text(json.dumps({**report, "seen": seen}, indent=1) + "\n")


if __name__ == "__main__":
    main()
