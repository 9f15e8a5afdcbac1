"""vLLM's figure is transformers' figure."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pifa_vllm.errors import CheckpointError, EvaluationError
from pifa_vllm.evaluate import served
from pifa_vllm.evaluate.served import served_perplexity
from tests.conftest import Twins
from tests.edit import copy_edited
from tests.pifa_tiny import save_pifa_twin
from tests.tiny import save_tiny_model

TEXT = "".join(chr(32 + (7 * i * i + i) % 90) for i in range(600))


@pytest.mark.vllm
def test_both_engines_agree_up_to_the_last_position(tmp_path: Path) -> None:
    # vLLM's attention on the CPU wants heads of at least 32.
    save_tiny_model(tmp_path / "original", hidden=128, intermediate=160, max_position_embeddings=128)
    save_pifa_twin(
        tmp_path / "original", tmp_path / "pifa", tmp_path / "dense", ranks=lambda name, m, n: min(m, n) // 2
    )
    (tmp_path / "text").write_text(TEXT)
    # 128 is the model's whole context: there is no room for a token after the window.
    options = ["--text", str(tmp_path / "text"), "--seqlen", "128", "--engine", "both", "--eager", "--json"]
    # In a process of its own: vLLM binds threads to cores and sets up process groups for good.
    code = f"from pifa_vllm.cli import main; raise SystemExit(main({['eval', str(tmp_path / 'pifa'), *options]}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    transformers, vllm = found["results"]
    assert (transformers["engine"], vllm["engine"]) == ("transformers", "vllm")
    assert vllm["dtype"] == "float32"
    assert len(vllm["window_nlls"]) == 4
    assert vllm["window_nlls"] == pytest.approx(transformers["window_nlls"], abs=1e-4)
    assert found["nll_difference"] == pytest.approx(vllm["nll"] - transformers["nll"], abs=1e-12)


class Engine:
    """Gives token t the log-probability -t, and counts what it is asked for."""

    def __init__(self, broken: dict[int, float]) -> None:
        self.broken = broken

    def generate(self, prompt: dict[str, list[int]], sampling: Any, use_tqdm: bool) -> list[Any]:
        tokens = [*prompt["prompt_token_ids"], *sampling.allowed_token_ids]
        rows: list[Any] = [{t: SimpleNamespace(logprob=self.broken.get(t, -float(t)))} for t in tokens]
        assert (sampling.max_tokens, sampling.prompt_logprobs, sampling.logprobs) == (1, 0, 0)
        return [
            SimpleNamespace(
                prompt_logprobs=[None, *rows[1:-1]], outputs=[SimpleNamespace(logprobs=rows[-1:])]
            )
        ]


@pytest.mark.vllm
def test_every_token_but_the_first_counts_once() -> None:
    assert served._window_nll(Engine({}), [3, 1, 4, 1, 5], "here") == pytest.approx((1 + 4 + 1 + 5) / 4)


@pytest.mark.vllm
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_log_probabilities_that_are_not_finite_are_an_error(value: float) -> None:
    with pytest.raises(EvaluationError, match=r"^here, position 1: vLLM gives token 4 the log-probability"):
        served._window_nll(Engine({4: value}), [3, 1, 4, 1, 5], "here")


def test_without_vllm(twins: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EvaluationError, match=r"vLLM cannot be imported .*install pifa-vllm\[cpu\]"):
        served_perplexity(twins.pifa, TEXT, seqlen=64)


def test_damage_is_found_before_an_engine_starts(
    twins: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    spoiled = copy_edited(
        twins.pifa, tmp_path / "spoiled", config=lambda c: c["quantization_config"].update(format_version=3)
    )
    with pytest.raises(CheckpointError, match="format_version 3"):
        served_perplexity(spoiled, TEXT, seqlen=64)
    with pytest.raises(EvaluationError, match="max_position_embeddings is 512"):
        served_perplexity(twins.dense, TEXT, seqlen=513)
    unknown = copy_edited(twins.dense, tmp_path / "unknown", config=lambda c: c.update(model_type="mystery"))
    with pytest.raises(EvaluationError, match=r"transformers cannot load this model .*mystery"):
        served_perplexity(unknown, TEXT, seqlen=64)


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    with served.engine_environment():
        assert served.os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
        assert served.os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert served.os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in served.os.environ
