"""The server as a user starts it: flags, readiness, chat, stopping, and what a broken checkpoint says."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm")

from pifa_vllm_server import launch
from pifa_vllm_server.launch import server_url

from pifa_vllm.cli import main
from tests.release import vllm_before

START_SECONDS = 240


def start(directory, log, *flags):
    return subprocess.Popen(
        [sys.executable, "-m", "pifa_vllm", "serve", str(directory), "--host", "127.0.0.1", *flags],
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
    )


@pytest.mark.vllm
def test_says_how_to_try_it_and_chats(server, capsys):
    said, deadline = f"pifa-vllm: tiny is served at {server.url}", time.monotonic() + 30
    while said not in (banner := server.log.read_text()):
        assert time.monotonic() < deadline, banner[-3000:]
        time.sleep(0.1)
    assert f"{server.url}/v1/chat/completions" in banner
    assert f"pifa-vllm chat --url {server.url}" in banner

    from openai import OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    request = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
    answers = {
        client.chat.completions.create(**request, temperature=0.0, extra_body={"ignore_eos": True})
        .choices[0]
        .message.content
        for _ in range(2)
    }
    assert len(answers) == 1

    lines = iter(["hello", ""])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.input", lambda _: next(lines))
        assert main(["chat", "--url", server.url, "--max-tokens", "4"]) == 0
    assert f"tiny at {server.url}" in capsys.readouterr().err


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
    # Older ones put the process' name before what it prints.
    assert re.match(r"(\(\w+ pid=\d+\) )?error: " if vllm_before("0.32") else "error: ", last)
    assert "model.layers.1.mlp.up_proj.coefficients" in last
    assert "expected finite values, found 1 NaN" in last


def test_wrong_flags_are_refused_before_the_engine_starts(checkpoint, capsys, monkeypatch):
    # What it would set for its own process.
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    monkeypatch.setattr(launch, "serve", lambda *_: pytest.fail("the engine starts"))
    assert main(["serve", str(checkpoint), "--port", "0", "--tensor-parallel-size", "3"]) == 1
    assert "cannot be shared out to 3 ranks" in capsys.readouterr().err.rstrip().splitlines()[-1]
    with pytest.raises(SystemExit) as ended:
        main(["serve", str(checkpoint), "--no-such-flag"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --no-such-flag" in capsys.readouterr().err


def test_url_is_one_that_this_machine_reaches():
    def url(**settings):
        return server_url(argparse.Namespace(**{"host": None, "port": 8000, "root_path": None, **settings}))

    assert url() == url(host="0.0.0.0") == url(host="::") == "http://localhost:8000"
    assert url(host="10.0.0.3", port=9, root_path="/x/") == "http://10.0.0.3:9/x"
    assert url(host="::1") == "http://[::1]:8000"
    assert url(ssl_certfile="cert.pem") == "https://localhost:8000"
