"""The speculative benchmark: its formula, its tables, and a run on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pifa_vllm.plugin
from pifa_vllm.bench import RESULTS
from pifa_vllm.bench.served.speculative import PROMPT_TOKENS, QUESTIONS, TEXT_PROMPTS, make_prompts
from pifa_vllm.bench.served.speculative_report import (
    acceptance_length,
    break_even,
    break_even_table,
    speculative_table,
    speed_up,
)
from pifa_vllm.checkpoint import load_tokenizer
from pifa_vllm.cli import main
from pifa_vllm.errors import PifaError
from tests.pifa_tiny import save_pifa_twin
from tests.tiny import save_tiny_model

README = Path(pifa_vllm.plugin.__file__).parent / "README.md"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("speculative")
    save_tiny_model(root / "dense", hidden=128, intermediate=176)
    save_pifa_twin(root / "dense", root / "pifa", root / "twin", ranks=lambda _, m, n: min(m, n) // 2)
    (root / "text.txt").write_text("It was a dark and stormy night; the rain fell in torrents. " * 20)
    return root


@pytest.mark.parametrize(("a", "k"), [(0.3, 1), (0.8, 2), (0.55, 4)])
def test_acceptance_length_is_the_closed_form(a, k):
    assert acceptance_length(a, k) == pytest.approx((1 - a ** (k + 1)) / (1 - a))
    assert acceptance_length(1.0, k) == k + 1


def test_one_drafted_token_pays_from_the_cost_ratio_on():
    for c in (0.1, 0.5, 0.9):
        assert break_even(1, c) == pytest.approx(c)
        # More of them never pay at a lower rate.
        assert break_even(4, c) > break_even(2, c) > break_even(1, c)
        assert speed_up(acceptance_length(break_even(4, c), 4), 4, c) == pytest.approx(1.0)
    assert break_even(2, 1.0) is None


@pytest.mark.parametrize("name", ["speculative-smollm2.json", "speculative-healed.json"])
def test_the_tables_of_the_readme_are_the_generated_ones(name):
    results = json.loads((RESULTS / name).read_text())
    assert results["command"].startswith("pifa-vllm bench speculative ")
    assert results["machine"]["cpu"]
    assert speculative_table(results) in README.read_text()
    assert break_even_table() in README.read_text()


def test_the_table_is_sorted_and_compares_round_by_round():
    def row(density, times):
        found = {
            "drafts": 10,
            "drafted": 20,
            "accepted": 12,
            "accepted_by_position": [8, 4],
            "identical": 6,
            "ms_per_token": times,
        }
        return {
            "density": density,
            "dense": [10.0, 20.0, 10.0],
            "draft": [5.0] * 3,
            "speculative": {"2": found},
        }

    results = {"subject": {"prompts": 6}, "rows": [row(0.8, [8.0, 25.0, 8.0]), row(0.5, [10.0] * 3)]}
    first, second = speculative_table(results).splitlines()[2:]
    assert first.startswith("| 0.50 | 2 | 0.80 | 2.20 | 0.50 | 1.10x | 1.00x (1.00 to 2.00) | 10.0 |")
    assert second.endswith("| 1.25x (0.80 to 1.25) | 10.0 | 8.0 | 6 of 6 |")


def test_prompts_are_text_and_questions(models, tmp_path):
    prompts = make_prompts(models / "dense", models / "text.txt")
    assert [len(prompt) for prompt in prompts[:TEXT_PROMPTS]] == [PROMPT_TOKENS] * TEXT_PROMPTS
    assert len(prompts) == TEXT_PROMPTS + len(QUESTIONS)
    decode = load_tokenizer(models / "dense").decode
    assert decode(prompts[TEXT_PROMPTS]) == f"user: {QUESTIONS[0]}\nassistant:"
    assert decode(prompts[0]).startswith("It was a dark and stormy night")
    short = tmp_path / "short.txt"
    short.write_text("short")
    with pytest.raises(PifaError, match="expected at least 192 tokens for 3 prompts, found 5"):
        make_prompts(models / "dense", short)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--draft-tokens", "2,0"], "--draft-tokens: expected numbers of 1 or more and commas, found '2,0'"),
        (["--rounds", "0"], "--rounds: expected 1 or more, found 0"),
        (["--output-tokens", "1"], "--output-tokens: expected 2 or more, found 1"),
    ],
)
def test_refusals(options, message, capsys):
    assert main(["bench", "speculative", "d", "p", "--text", "t", "--output", "o.json", *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.vllm
def test_a_run(models, tmp_path):
    pytest.importorskip("vllm")
    output = tmp_path / "results.json"
    command = [sys.executable, "-m", "pifa_vllm", "bench", "speculative", models / "dense", models / "pifa"]
    command += ["--text", models / "text.txt", "--output", output, "--enforce-eager", "--draft-tokens", "2"]
    command += ["--output-tokens", "8", "--rounds", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    # It would win over the size of the KV cache that the benchmark asks for.
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    done = [
        subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
        )
        # The second time there is nothing left to measure.
        for _ in range(2)
    ]
    assert [process.returncode for process in done] == [0, 0], done[0].stderr[-3000:]
    assert "measured" in done[0].stdout
    results = json.loads(output.read_text())
    (row,) = results["rows"]
    assert row["checkpoint"] == "pifa"
    found = row["speculative"]["2"]
    assert len(row["dense"]) == len(row["draft"]) == len(found["ms_per_token"]) == 2
    assert found["identical"] == results["subject"]["prompts"]
    assert 0 < found["accepted"] == sum(found["accepted_by_position"]) < found["drafted"]
    assert speculative_table(results) in done[0].stdout
    assert "measured\n" not in done[1].stdout
    assert speculative_table(results) in done[1].stdout
