"""Tasks of local files through lm-eval itself, on the tiny model in its two forms."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pifa_vllm.errors import CheckpointError, EvaluationError
from pifa_vllm.evaluate.tasks import check_known, run_tasks
from tests.conftest import Twins
from tests.pifa_tiny import save_pifa_twin
from tests.tiny import save_tiny_model

KNOWN = ["hellaswag", "piqa", "arc_easy"]
ITEMS = [
    {"query": f"{i} and {i + 1} are", "choices": [f"{i}", "both of them", "no zebra"], "label": i % 3}
    for i in range(6)
]


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks: one whose data is beside it, and one whose data is nowhere."""
    pytest.importorskip("lm_eval")
    directory = tmp_path_factory.mktemp("tasks")
    items = directory / "items.jsonl"
    items.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    task = {
        "task": "numbers",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(items)}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_target": "label",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    lost = {**task, "task": "lost", "dataset_kwargs": {"data_files": {"validation": str(directory / "no")}}}
    for definition in (task, lost):
        (directory / f"{definition['task']}.yaml").write_text(yaml.safe_dump(definition))
    return directory


def test_both_forms_of_a_model_answer_alike(twins: Twins, task_dir: Path) -> None:
    by_layers, by_weights = (
        run_tasks(model, ["numbers"], task_dir=task_dir, batch_size=4) for model in (twins.pifa, twins.dense)
    )
    assert [(x.task, x.metric, x.samples, x.fewshot) for x in by_layers] == [
        ("numbers", "acc", 6, 0),
        ("numbers", "acc_norm", 6, 0),
    ]
    assert [x.value for x in by_layers] == [x.value for x in by_weights]
    assert by_layers[0].value * 6 == pytest.approx(round(by_layers[0].value * 6))
    assert by_layers[0].to_dict()["engine"] == "transformers"
    for figure in by_layers:
        assert set(figure.items) <= {0.0, 1.0}
        assert sum(figure.items) / 6 == pytest.approx(figure.value)
    (first, _) = run_tasks(twins.dense, ["numbers"], task_dir=task_dir, limit=2)
    assert first.samples == 2


def test_refusals(twins: Twins, task_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"task lost or its data cannot be loaded \(.*--task-dir"):
        run_tasks(twins.dense, ["lost"], task_dir=task_dir)
    with pytest.raises(EvaluationError, match=r"nowhere: no such folder"):
        run_tasks(twins.dense, ["numbers"], task_dir=tmp_path / "nowhere")


def test_names_that_nobody_knows() -> None:
    check_known(["piqa", "hellaswag"], KNOWN)
    with pytest.raises(EvaluationError, match=r"the 3 tasks .*\(closest: hellaswag\), found 'hellswag'"):
        check_known(["piqa", "hellswag"], KNOWN)
    with pytest.raises(EvaluationError, match=r"\(such as hellaswag, .*\), found 'zz'"):
        check_known(["zz"], KNOWN)


def test_what_shows_before_lm_eval_is_asked(
    twins: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EvaluationError, match="a limit of 1 item or more, found 0"):
        run_tasks(twins.dense, ["piqa"], limit=0)
    with pytest.raises(CheckpointError):
        run_tasks(tmp_path, ["piqa"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvaluationError, match=r"lm-eval cannot be imported .*pifa-vllm\[tasks\]"):
        run_tasks(twins.dense, ["piqa"])


@pytest.mark.vllm
def test_vllm_answers_as_transformers_does(task_dir: Path, tmp_path: Path) -> None:
    # vLLM's attention on the CPU wants heads of at least 32.
    save_tiny_model(tmp_path / "original", hidden=128, intermediate=160, max_position_embeddings=128)
    save_pifa_twin(
        tmp_path / "original", tmp_path / "pifa", tmp_path / "dense", ranks=lambda name, m, n: min(m, n) // 2
    )
    options = ["--tasks", "numbers", "--task-dir", str(task_dir), "--engine", "both", "--eager", "--json"]
    # In a process of its own: vLLM binds threads to cores and sets up process groups for good.
    code = f"from pifa_vllm.cli import main; raise SystemExit(main({['eval', str(tmp_path / 'pifa'), *options]}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    by_transformers, _, by_vllm, _ = found = json.loads(done.stdout)
    assert [x["engine"] for x in found] == ["transformers", "transformers", "vllm", "vllm"]
    assert [x["metric"] for x in found] == ["acc", "acc_norm"] * 2
    assert (by_vllm["dtype"], by_vllm["samples"]) == ("float32", 6)
    assert by_vllm["value"] == by_transformers["value"]
