"""How `demo` reads its arguments and what it refuses; its steps are tests/demo's."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pifa_vllm.cli import main
from pifa_vllm.demo import steps


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What the demo was told to do, in place of doing it."""
    calls: list[tuple[str, Any]] = []

    class Demo:
        def __init__(self, **options: Any) -> None:
            calls.append(("demo", options))

        def compress(self) -> Path:
            calls.append(("compress", None))
            return Path("compressed")

        def compare(self) -> None:
            calls.append(("compare", None))

        @contextmanager
        def server(self, directory: Path, port: int) -> Iterator[str]:
            calls.append(("server", (directory, port)))
            yield "the server"
            calls.append(("stopped", None))

        def chat(self, server: str, prompt: str, *, forever: bool) -> None:
            calls.append(("chat", (server, prompt, forever)))

    monkeypatch.setattr(steps, "Demo", Demo)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    return calls


def test_the_steps_in_their_order(told: list[tuple[str, Any]], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("x")
    options = ["--density", "0.8", "--work-dir", "w", "--samples", "2", "--length", "64", "--text", str(text)]
    assert main(["demo", *options, "--port", "9", "--prompt", "Hi", "--no-serve-forever"]) == 0
    # The server starts while the models are compared.
    assert [name for name, _ in told] == ["demo", "compress", "server", "compare", "chat", "stopped"]
    assert told[0][1] == {
        "work_dir": Path("w"),
        "density": 0.8,
        "samples": 2,
        "length": 64,
        "text": text,
        "factors": None,
    }
    assert told[2][1] == (Path("compressed"), 9)
    assert told[4][1] == ("the server", "Hi", False)


def test_left_alone_it_serves_until_stopped(told: list[tuple[str, Any]]) -> None:
    main(["demo"])
    assert told[0][1]["text"] is None
    assert told[4][1][2] is True


def test_missing_packages_are_named_before_anything_is_made(
    told: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("gguf", "vllm") else object()
    )
    assert main(["demo"]) == 1
    assert "found no gguf, vllm. `make demo` installs them." in capsys.readouterr().err
    assert told == []


def test_a_text_that_is_not_there(
    told: list[tuple[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--text", str(tmp_path)]) == 1
    assert f"--text: expected a text file, found none at {tmp_path}" in capsys.readouterr().err
    assert told == []


def test_a_density_out_of_range_leaves_no_work_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    assert main(["demo", "--density", "1.5", "--work-dir", str(tmp_path / "w")]) == 1
    assert "density: expected a number in (0, 1], found 1.5" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()
