"""Healing end to end, on a tiny model: it helps, resumes, publishes nothing worse, and refuses what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pifa_vllm.checkpoint import Checkpoint, Shards
from pifa_vllm.cli import main
from pifa_vllm.compression.allocation import uniform
from pifa_vllm.compression.calibration.token_file import write_tokens
from pifa_vllm.compression.report.schema import HealingReport
from pifa_vllm.errors import CalibrationError, CheckpointError, PifaError, UnsupportedModelError
from pifa_vllm.healing.distillation import Distillation
from pifa_vllm.healing.heal import heal
from pifa_vllm.healing.options import HealOptions
from pifa_vllm.healing.run import Healing
from pifa_vllm.loading import load
from tests.compression.runs import Recorder, tiny_options
from tests.edit import copy_edited
from tests.healing.tiny_heal import Family, make_family, tiny_heal

# The family keeps k_proj dense.
TRAINED = (".pivot_weight", ".coefficients", "norm.weight", "k_proj.weight")


def run(options: HealOptions) -> tuple[HealingReport, list[str]]:
    lines: list[str] = []
    return Healing(options, lines.append).run("pifa-vllm heal ..."), lines


def divergence(model: Path, teacher: Path) -> float:
    """KL(teacher ‖ model) on tokens that no text here has, in nats per token."""
    tokens = torch.randint(0, 256, (4, 48), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        ours, theirs = (load(path)(tokens).logits.log_softmax(-1) for path in (model, teacher))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def test_the_model_comes_closer_to_its_parent(family: Family, tmp_path: Path) -> None:
    report, lines = run(tiny_heal(family, tmp_path / "out"))
    assert report.held_out_after < 0.8 * report.held_out_before
    assert report.history[-1].train < report.history[1].train
    assert divergence(tmp_path / "out", family.dense) < divergence(family.pifa, family.dense)
    assert (report.tokens_seen, report.steps) == (40 * 2 * 48, 40)
    assert [point.step for point in report.history] == [0, 10, 20, 30, 40]
    assert report.cpu_seconds > 0
    assert report.peak_rss_bytes > 0
    assert len([line for line in lines if "held-out loss" in line]) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    assert main(["verify", str(tmp_path / "out")]) == 0
    source, healed = Checkpoint.open(family.pifa), Checkpoint.open(tmp_path / "out")
    assert healed.config.ranks == source.config.ranks
    assert healed.config.density == source.config.density
    assert healed.config.provenance["healing"][0]["held_out_after"] == report.held_out_after
    assert healed.shards.entries.keys() == source.shards.entries.keys()
    for name in source.shards.entries:
        same = torch.equal(source.shards.load(name), healed.shards.load(name))
        assert same == (not name.endswith(TRAINED)), name


def test_killed_anywhere_it_goes_on_to_the_same_result(family: Family, tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_heal.py")
    command = [sys.executable, "-m", f"tests.healing.{script.stem}"]
    command += [str(family.dense), str(family.pifa), str(family.text), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 8
    for place in found:
        assert place["killed"], place
        assert place["resumed"], place
        assert place["tidy"], place
        assert place["output_after_kill"] == place["complete_after_kill"], place
    assert [x["place"] for x in found if x["output_after_kill"]] == ["after call 1 of publish"]


def test_another_run_does_not_go_on_with_its_state(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Healing, "_settle", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_heal(family, tmp_path / "out"))
    with pytest.raises(PifaError, match=r"40 finished steps is here, .*started differently \(options: there"):
        run(tiny_heal(family, tmp_path / "out", lr=2e-3))
    (tmp_path / "out.partial" / "state.safetensors").write_bytes(b"nonsense")
    with pytest.raises(PifaError, match="the state of an earlier attempt cannot be read"):
        run(tiny_heal(family, tmp_path / "out"))


def test_a_run_that_diverges_from_the_start_publishes_nothing(family: Family, tmp_path: Path) -> None:
    expected = r"not published\. Expected a held-out loss below .* \(diverged at step \d+ .*smaller --lr"
    with pytest.raises(PifaError, match=expected):
        run(tiny_heal(family, tmp_path / "out", lr=10.0))
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_diverges_later_keeps_the_last_good_state(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = Distillation.step, iter(range(100))

    def worse(self: Distillation, tokens: torch.Tensor, indices: list[int], scale: float) -> float:
        return step(self, tokens, indices, scale if next(steps) < 25 else 1e5)

    monkeypatch.setattr(Distillation, "step", worse)
    report, lines = run(tiny_heal(family, tmp_path / "out"))
    assert "diverged" in report.stopped
    assert report.best_step == 20
    assert report.steps < 40
    assert report.held_out_after == pytest.approx(report.history[2].held_out)
    assert report.held_out_after < report.held_out_before
    assert any(line.startswith("stopped early, the best state is kept: diverged") for line in lines)
    Checkpoint.open(tmp_path / "out").verify()


def test_a_loss_that_is_not_finite_changes_nothing_and_stops(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = Distillation._loss, iter(range(100))

    def broken(self: Distillation, *args: object, backward: bool) -> float:
        value = loss(self, *args, backward=backward)
        return float("nan") if backward and next(calls) == 15 else value

    monkeypatch.setattr(Distillation, "_loss", broken)
    report, _ = run(tiny_heal(family, tmp_path / "out"))
    assert "diverged at step 16 (training loss nan)" in report.stopped
    assert report.best_step == 10


def test_five_looks_without_a_better_one_end_it(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be worse than the input for longer than that, while it comes back."""
    looks = iter([1.0, 1.9, 1.7, 1.5, 1.4, 1.3, 1.2, 0.9, *[0.95] * 20])
    monkeypatch.setattr(Distillation, "held_out", lambda self, tokens: next(looks))
    report, _ = run(tiny_heal(family, tmp_path / "out", every=2))
    assert report.stopped == "no better on held-out text for 5 looks, at step 24"
    assert (report.best_step, report.held_out_before) == (14, 1.0)


@pytest.mark.parametrize(
    ("architecture", "settings", "options"),
    [
        ("qwen2", {"tie_word_embeddings": False}, {"embeddings": True}),
        ("qwen3", {}, {"embeddings": True, "gradient_checkpointing": False}),
        ("mistral", {"dtype": torch.bfloat16}, {"precision": "bfloat16"}),
    ],
)
def test_architectures_and_options(
    tmp_path: Path, architecture: str, settings: dict[str, object], options: dict[str, object]
) -> None:
    family = make_family(tmp_path / "family", architecture, **settings)
    report, _ = run(tiny_heal(family, tmp_path / "out", lr=3e-4, **options))
    assert report.held_out_after < report.held_out_before
    source, healed = Shards(family.pifa), Checkpoint.open(tmp_path / "out")
    healed.verify()
    assert {n: e.dtype for n, e in healed.shards.entries.items()} == {
        n: e.dtype for n, e in source.entries.items()
    }
    changed = {n for n in source.entries if not torch.equal(source.load(n), healed.shards.load(n))}
    assert ("model.embed_tokens.weight" in changed) == options.get("embeddings", False)
    assert ("lm_head.weight" in changed) == (architecture == "qwen2")
    assert any(name.endswith("q_proj.bias") for name in changed) == (architecture == "qwen2")
    # What healing has trained does not make a stranger of it.
    again, _ = run(tiny_heal(family, tmp_path / "again", model=tmp_path / "out", lr=1e-4, **options))
    assert again.held_out_before == pytest.approx(report.held_out_after, rel=1e-3)
    assert len(Checkpoint.open(tmp_path / "again").config.provenance["healing"]) == 2


def test_what_compress_reported_is_told_on(family: Family, tmp_path: Path) -> None:
    from pifa_vllm.compression.pipeline import Compression
    from pifa_vllm.compression.report.record import read_report
    from pifa_vllm.compression.report.schema import Evaluation

    compressed = tmp_path / "compressed"
    # Low enough that there is something to heal.
    options = tiny_options(family.dense, compressed, family.text, density=uniform(0.4))
    Compression(options, Recorder()).run("test")
    report = read_report(compressed)
    measured = [Evaluation(model=x, value=9.0, data="text") for x in ("dense", report.method)]
    (compressed / "compression_report.json").write_text(
        report.model_copy(update={"evaluation": measured}).model_dump_json()
    )
    healing, _ = run(tiny_heal(family, tmp_path / "out", model=compressed))
    told = read_report(tmp_path / "out")
    assert told.healing == [healing]
    assert (tmp_path / "out" / "recipe.yaml").read_bytes() == (compressed / "recipe.yaml").read_bytes()
    assert told.fingerprint == report.fingerprint
    assert [x.model for x in told.evaluation] == ["dense"], (
        "the compressed model's figure is not the healed one's"
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{healing.held_out_before:.4f} before, {healing.held_out_after:.4f} after" in card
    assert "Embeddings, norms and the output head are untouched" not in card
    assert "Distilled from the dense model" in (tmp_path / "out" / "compression_report.html").read_text()
    provenance = Checkpoint.open(tmp_path / "out").config.provenance
    assert provenance["method"] == report.method
    assert provenance["healing"][0]["tokens_seen"] == 40 * 2 * 48


def test_the_dense_models_own_samples(family: Family, tmp_path: Path) -> None:
    report, lines = run(tiny_heal(family, tmp_path / "out", calibration="self", lr=5e-4))
    assert report.calibration["source"] == "self"
    assert report.tokens_available == 20 * 48, "each is seen four times"
    assert any("sampled" in line for line in lines)


def test_a_file_of_tokens(family: Family, tmp_path: Path) -> None:
    write_tokens(tmp_path / "some.safetensors", torch.randint(0, 256, (9, 48)), {"source": "text"})
    report, _ = run(tiny_heal(family, tmp_path / "out", calibration=str(tmp_path / "some.safetensors")))
    assert (report.tokens_available, report.held_out_tokens) == (7 * 48, 2 * 48)


def test_it_is_the_command(family: Family, tmp_path: Path) -> None:
    given = {"tokens": 960, "calibration": family.text, "lr": 1e-3, "length": 48, "every": 5}
    report = heal(family.pifa, tmp_path / "called", teacher=family.dense, **given)
    command = ["heal", str(family.pifa), str(tmp_path / "typed"), "--teacher", str(family.dense)]
    for name, value in given.items():
        command += [f"--{name}", str(value)]
    assert main(command) == 0
    one, other = Shards(tmp_path / "called"), Shards(tmp_path / "typed")
    assert all(torch.equal(one.load(name), other.load(name)) for name in other.entries)
    assert report.command.startswith(f"pifa_vllm.heal({str(family.pifa)!r}, ")


def test_bad_input(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short.txt"
    short.write_text("hardly anything " * 8)
    (tmp_path / "there").mkdir()
    for changes, error, match in (
        ({"model": family.dense}, CheckpointError, "not a PIFA checkpoint: expected quantization_config"),
        ({"model": tmp_path / "none"}, CheckpointError, "no such file"),
        (
            {"teacher": family.pifa},
            UnsupportedModelError,
            "expected a dense model, found one quantised by 'pifa'",
        ),
        ({"output": tmp_path / "there"}, PifaError, "the output directory exists"),
        ({"calibration": str(short)}, CalibrationError, r"expected 4 sequences of 48 tokens .*, found 2"),
        ({"calibration": str(tmp_path / "no.txt")}, CalibrationError, "no such file"),
        ({"length": 1024, "tokens": 4096}, PifaError, "at most the model's 512 positions"),
    ):
        with pytest.raises(error, match=match):
            run(tiny_heal(family, **({"output": tmp_path / "out"} | changes)))
        assert not (tmp_path / "out").exists()
    assert main(["heal", str(family.pifa), str(tmp_path / "out"), "--teacher", "x", "--tokens", "1"]) == 1
    assert "--tokens: expected one step of 4 x 512 tokens or more, found 1" in capsys.readouterr().err


def test_other_models_are_no_teachers(family: Family, tmp_path: Path) -> None:
    wide, sibling = make_family(tmp_path / "wide", hidden=128), make_family(tmp_path / "sibling", seed=1)
    for teacher, match in (
        (wide, r"head_dim: expected 16 as in .*, found 32\. --teacher is the model it was made from"),
        (sibling, r"tensor .*: expected the values that .* has, since compression leaves them"),
    ):
        with pytest.raises(UnsupportedModelError, match=match):
            run(tiny_heal(family, tmp_path / "out", teacher=teacher.dense))
    renamed = copy_edited(family.dense, tmp_path / "renamed")
    tokenizer = renamed / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"a":', '"\\u4e00":', 1))
    with pytest.raises(UnsupportedModelError, match=r"expected the tokenizer of .* tokens differ"):
        run(tiny_heal(family, tmp_path / "out", teacher=renamed))


def test_options() -> None:
    paths = {"model": Path("a"), "output": Path("b"), "teacher": Path("c"), "tokens": 4096}
    assert HealOptions(**paths).steps == 2
    assert HealOptions(**paths).effective_precision == "float32"
    assert HealOptions(**paths, device="cuda").effective_precision == "bfloat16"
    for changes, match in (
        ({"lr": 0.0}, "--lr: expected a number above 0"),
        ({"lr": float("nan")}, "--lr: expected a number above 0"),
        ({"held_out": 1.0}, "--held-out: expected a share between 0 and 1"),
        ({"warmup": 1.0}, "--warmup: expected a share"),
        ({"weight_decay": -1.0}, "--weight-decay: expected"),
        ({"batch": 0}, "--batch: expected 1 or more"),
        ({"length": 4}, "--length: expected 8 or more"),
    ):
        with pytest.raises(PifaError, match=match):
            HealOptions(**(paths | changes))
