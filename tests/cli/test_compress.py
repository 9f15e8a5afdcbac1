"""The compress command as a user runs it."""

import json

import pytest

from pifa_vllm.cli import main
from pifa_vllm.cli.compress import command_line
from pifa_vllm.compression.allocation import uniform
from tests.compression.runs import write_text
from tests.tiny import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama")


def arguments(model, output, *more):
    return [
        *(
            "compress",
            str(model),
            str(output),
            "--samples",
            "4",
            "--length",
            "32",
            "--tile",
            "4",
            "--threads",
            "1",
        ),
        *more,
    ]


def test_compresses_and_prints_where_it_is(model, tmp_path, capsys):
    text = write_text(tmp_path / "text.txt")
    output = tmp_path / "out"
    assert main(arguments(model, output, "--density", "0.7", "--calibration", str(text))) == 0
    shown = capsys.readouterr().err
    assert "estimate:" in shown
    assert "layer 2/2" in shown
    assert str(output) in shown.replace("\n", "")
    report = json.loads((output / "compression_report.json").read_text())
    assert report["method"] == "mpifa-exact"
    assert report["calibration"]["source"] == "text"


def test_dry_run_prints_the_plan_and_writes_nothing(model, tmp_path, capsys):
    assert main(arguments(model, tmp_path / "out", "--density", "0.5", "--dry-run")) == 0
    shown = capsys.readouterr()
    assert "ranks: chosen by the dense model's gradients" in shown.err
    plan = json.loads(shown.out)
    assert plan["estimate"]["memory_bytes"] > 0
    assert plan["ranks"] is None
    assert plan["density"] <= 0.5
    even = arguments(model, tmp_path / "out", "--density", "0.5", "--allocation", "uniform", "--dry-run")
    assert main(even) == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["ranks"]) == 14
    assert plan["density"] <= 0.5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "--density: expected a number"),
        (("--density", "1.5"), "density: expected a number in (0, 1], found 1.5"),
        (("--density", "0"), "density: expected a number in (0, 1], found 0.0"),
        (("--density", "0.5", "--recipe", "x.yaml"), "--recipe: holds all densities itself"),
        (("--recipe", "missing.yaml"), "missing.yaml: cannot be read"),
        (("--attention-density", "0.5"), "--density: expected"),
        (("--density", "0.5", "--mix", "2"), "--mix: expected a number in [0, 1]"),
        (("--density", "0.5", "--calibration", "missing.txt"), "missing.txt"),
    ],
)
def test_bad_options_are_one_paragraph_and_exit_1(model, tmp_path, capsys, more, message):
    assert main(arguments(model, tmp_path / "out", *more)) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists()


def test_both_part_densities_replace_the_common_one(model, tmp_path, capsys):
    more = ("--attention-density", "0.9", "--mlp-density", "0.5", "--dry-run")
    assert main(arguments(model, tmp_path / "out", *more)) == 0
    ranks = json.loads(capsys.readouterr().out)["ranks"]
    by_hand = uniform(0.9, attention=0.9, mlp=0.5)
    assert by_hand.density == 0.9
    assert ranks["model.layers.0.self_attn.q_proj"] > ranks["model.layers.0.mlp.up_proj"] / 2
    assert {len(ranks)} <= {12, 14}


def test_missing_model_directory(tmp_path, capsys):
    assert main(arguments(tmp_path / "nowhere", tmp_path / "out", "--density", "0.5")) == 1
    assert "nowhere" in capsys.readouterr().err


def test_the_recorded_command_is_what_a_user_types():
    argv = ["/somewhere/pifa_vllm/__main__.py", "compress", "a model", "out", "--seed", "3"]
    assert command_line(argv) == "pifa-vllm compress 'a model' out --seed 3"
