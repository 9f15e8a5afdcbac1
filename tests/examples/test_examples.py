"""Every example is run, on a tiny model, and has its line in the README."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import pifa_vllm
from pifa_vllm.cli import main

EXAMPLES = Path(pifa_vllm.__file__).with_name("examples")


def run_here(name, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_each_is_in_the_readme_and_short():
    found = {path.name for path in EXAMPLES.iterdir() if path.is_file()} - {"README.md"}
    readme = (EXAMPLES / "README.md").read_text()
    assert set(re.findall(r"^\| \[([\w.]+)\]\(\1\): .* \| `", readme, re.MULTILINE)) == found
    assert all(
        len((EXAMPLES / name).read_text().splitlines()) <= 40 for name in found if name.endswith(".py")
    )


def test_recipe(twins, tmp_path, capsys):
    command = [
        "compress",
        str(twins.original),
        str(tmp_path / "out"),
        "--recipe",
        str(EXAMPLES / "recipe.yaml"),
    ]
    assert main([*command, "--tile", "4", "--length", "64", "--dry-run"]) == 0
    ranks = json.loads(capsys.readouterr().out)["ranks"]
    assert len(ranks) == 7
    assert all(name.startswith("model.layers.1.") for name in ranks)


def test_transformers_generate(twins, monkeypatch, capsys):
    run_here("transformers_generate.py", monkeypatch, twins.pifa, "Low rank")
    assert re.match(r"Low rank.", capsys.readouterr().out, re.DOTALL)


def test_notebook(twins, tmp_path, monkeypatch, capsys):
    """Its cells, one after another; none was saved with its output."""
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    (tmp_path / "checkpoint").symlink_to(twins.pifa)
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
    assert re.match(
        r"12 compressed modules of ranks 16 to 32\nLow-rank matrices are", capsys.readouterr().out
    )


@pytest.mark.vllm
def test_langchain_chat(server, monkeypatch, capsys):
    pytest.importorskip("langchain_openai")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    run_here("langchain_chat.py", monkeypatch, f"{server.url}/v1")
    assert len(capsys.readouterr().out) > 1


@pytest.mark.vllm
def test_vllm_batch(checkpoint, tmp_path):
    pytest.importorskip("vllm")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Low rank\nHigh rank\n")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "vllm_batch.py"), str(checkpoint), str(prompts)],
        # Nothing of such a model is worth compiling.
        env={
            **os.environ,
            "TORCHDYNAMO_DISABLE": "1",
            "VLLM_USE_AOT_COMPILE": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(\w+ rank) -> .", done.stdout, re.MULTILINE) == ["Low rank", "High rank"]
