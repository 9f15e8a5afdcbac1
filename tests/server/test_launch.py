"""The server as a user starts it: flags, readiness, chat, stopping, and what a broken checkpoint says."""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from safetensors.torch import load_file, save_file

from tests.pifa_tiny import save_pifa_twin
from tests.tiny import save_tiny_model

pytest.importorskip("vllm")

from pifa_vllm_server import launch
from pifa_vllm_server.launch import check_shared_memory, server_url, set_cpu_defaults

from pifa_vllm.errors import PifaError

START_SECONDS = 240


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    # vLLM's CPU attention takes head sizes from 32 on.
    save_tiny_model(root / "dense", hidden=128, intermediate=176)
    save_pifa_twin(root / "dense", root / "pifa", root / "twin", ranks=lambda _, m, n: min(m, n) // 2)
    return root / "pifa"


def start(directory, log, *flags):
    return subprocess.Popen(
        [sys.executable, "-m", "pifa_vllm", "serve", str(directory), "--host", "127.0.0.1", *flags],
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
    )


def wait_for(log, text, process):
    deadline = time.monotonic() + START_SECONDS
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.25)


@pytest.mark.vllm
def test_serves_chats_and_stops_cleanly(checkpoint, tmp_path, capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "server.log"
    flags = ("--port", str(port), "--enforce-eager", "--max-model-len", "128", "--served-model-name", "tiny")
    process = start(checkpoint, log, *flags)
    try:
        wait_for(log, "pifa-vllm: tiny is served at", process)
        url = f"http://127.0.0.1:{port}"
        banner = log.read_text()
        assert f"{url}/v1/chat/completions" in banner
        assert f"pifa-vllm chat --url {url}" in banner

        from openai import OpenAI

        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        request = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
        answers = {
            client.chat.completions.create(**request, temperature=0.0, extra_body={"ignore_eos": True})
            .choices[0]
            .message.content
            for _ in range(2)
        }
        assert len(answers) == 1

        from pifa_vllm.cli import main

        lines = iter(["hello", ""])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("builtins.input", lambda _: next(lines))
            assert main(["chat", "--url", url, "--max-tokens", "4"]) == 0
        assert f"tiny at {url}" in capsys.readouterr().err

        family = psutil.Process(process.pid).children(recursive=True)
        assert family  # vLLM's engine runs in processes of its own
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive
    finally:
        process.kill()


@pytest.mark.vllm
def test_values_that_only_the_engine_sees_end_with_one_paragraph(checkpoint, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.coefficients"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    log = tmp_path / "server.log"
    process = start(broken, log, "--port", "0", "--enforce-eager", "--max-model-len", "128")
    assert process.wait(START_SECONDS) == 1
    last = log.read_text().rstrip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "model.layers.1.mlp.up_proj.coefficients" in last
    assert "expected finite values, found 1 NaN" in last


@pytest.mark.vllm
def test_wrong_flags_are_refused_before_the_engine_starts(checkpoint, tmp_path):
    log = tmp_path / "server.log"
    assert start(checkpoint, log, "--tensor-parallel-size", "3").wait(START_SECONDS) == 1
    assert "cannot be shared out to 3 ranks" in log.read_text().rstrip().splitlines()[-1]
    assert start(checkpoint, log, "--no-such-flag").wait(START_SECONDS) == 2
    assert "unrecognized arguments: --no-such-flag" in log.read_text()


def test_url_is_one_that_this_machine_reaches():
    def url(**settings):
        return server_url(argparse.Namespace(**{"host": None, "port": 8000, "root_path": None, **settings}))

    assert url() == url(host="0.0.0.0") == url(host="::") == "http://localhost:8000"
    assert url(host="10.0.0.3", port=9, root_path="/x/") == "http://10.0.0.3:9/x"
    assert url(host="::1") == "http://[::1]:8000"
    assert url(ssl_certfile="cert.pem") == "https://localhost:8000"


def test_a_containers_little_shared_memory_is_found_before_loading(monkeypatch):
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("one GPU needs no queues")
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(launch.shutil, "disk_usage", lambda _: usage._replace(free=410 << 20))
    check_shared_memory(1)
    with pytest.raises(PifaError, match=r"/dev/shm: expected 640 MiB free .* found 410\. .*--shm-size 1g"):
        check_shared_memory(2)


def test_cpu_defaults_yield_to_the_user(monkeypatch):
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("defaults for CPUs only")
    for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert "VLLM_CPU_KVCACHE_SPACE" not in set_cpu_defaults(["--kv_cache_memory_bytes", "1G"])
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    chosen = set_cpu_defaults([])
    assert int(chosen.pop("VLLM_CPU_KVCACHE_SPACE")) >= 1
    assert chosen == {}
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "0"
