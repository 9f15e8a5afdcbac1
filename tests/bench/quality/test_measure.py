"""The benchmark of quality, end to end on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pifa_vllm.cli import main
from pifa_vllm.evaluate.perplexity import perplexity
from tests.compression.runs import write_text
from tests.conftest import Twins


def test_rows_are_measured_and_kept(
    twins: Twins, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_text(tmp_path / "text.txt")
    plan = {
        "model": str(twins.original),
        "texts": {"a": str(text)},
        "seqlen": 64,
        "max_windows": 3,
        "densities": [0.7],
        "calibration": {"calibration": str(text), "samples": 4, "length": 32, "tile": 4},
        "against": "mpifa",
        "variants": {
            "mpifa": {"compress": {"method": "mpifa"}},
            "int4": {"rival": "gptq", "bits": 4},
            "twin": {"directory": str(twins.pifa)},
        },
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    output = tmp_path / "out.json"
    command = ["bench", "quality", str(path), "--output", str(output), "--work-dir", str(tmp_path / "runs")]
    assert main([*command, "--only", "int4,twin"]) == 0
    capsys.readouterr()
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert [json.loads(x)["variant"] for x in err.splitlines() if x.startswith('{"variant')] == ["mpifa"]
    results = json.loads(output.read_text())
    dense, twin, int4, mpifa = sorted(
        results["rows"], key=lambda r: "dense twin int4 mpifa".find(r["variant"])
    )
    expected = perplexity(twins.pifa, text.read_text(), seqlen=64, max_windows=3).window_nlls
    assert twin["windows"]["nll"] == pytest.approx(expected, rel=1e-6)
    assert dense["windows"]["kl"] == [0.0] * 3
    assert 0.0 < max(int4["windows"]["kl"]) < min(twin["windows"]["kl"])
    assert (mpifa["density"], mpifa["seed"]) == (0.7, 0)
    assert mpifa["kept_density"] <= 0.7
    assert mpifa["cpu_seconds"] > 0
    assert main(["bench", "table", str(output)]) == 0
    assert capsys.readouterr().out == out

    # Everything is there: nothing is made, nothing is measured.
    monkeypatch.setattr("pifa_vllm.bench.quality.measure.Reference", lambda *_, **__: pytest.fail("measured"))
    assert main(command) == 0
    assert capsys.readouterr() == (out, "")
    # What is of other options by now is measured anew.
    plan["variants"]["int4"]["bits"] = 8
    path.write_text(yaml.safe_dump(plan))
    with pytest.raises(pytest.fail.Exception, match="measured"):
        main(command)
    # Nor are results of another text overwritten.
    other = write_text(tmp_path / "other.txt")
    other.write_text(text.read_text()[::-1])
    changes = ({"max_windows": 2}, "max_windows"), ({"texts": {"a": str(other)}}, "text a")
    for change, named in changes:
        path.write_text(yaml.safe_dump(plan | change))
        capsys.readouterr()
        assert main(command) == 1
        assert f"has results of another measurement ({named} differ)" in capsys.readouterr().err

    # A further text is measured beside what is there.
    monkeypatch.undo()
    plan["variants"]["int4"]["bits"] = 4
    path.write_text(yaml.safe_dump({**plan, "texts": {"b": str(other)}}))
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert err.count('"text": "b"') == 4
    assert out.count("3 windows of 64 tokens") == 2
    assert json.loads(output.read_text())["rows"][:4] == results["rows"]


def test_a_compression_that_fails(twins: Twins, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(tmp_path / "text.txt")
    plan = {"model": str(twins.original), "texts": {"a": str(text)}, "seqlen": 64, "variants": {}}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({**plan, "variants": {"bad": {"compress": {"no-such-option": 1}}}}))
    command = [
        "bench",
        "quality",
        str(path),
        "--output",
        str(tmp_path / "o.json"),
        "--work-dir",
        str(tmp_path),
    ]
    assert main(command) == 1
    assert "ended with exit code 2" in capsys.readouterr().err
    assert main([*command, "--only", "magic"]) == 1
    assert "--only: expected some of bad, found magic" in capsys.readouterr().err
