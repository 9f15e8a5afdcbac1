"""The benchmark of quality, end to end on a tiny model."""

import json

from pifa_vllm.cli import main
from tests.compression.runs import write_text
from tests.tiny import save_tiny_model


def test_rows_are_measured_and_kept(tmp_path, capsys):
    model = save_tiny_model(tmp_path / "tiny")
    text = write_text(tmp_path / "text.txt")
    output = tmp_path / "out.json"
    command = [
        *("bench", "quality", str(model), "--text", str(text), "--output", str(output)),
        *("--work-dir", str(tmp_path / "runs"), "--variants", "svd-llm,mpifa", "--densities", "0.7"),
        *("--seqlen", "64", "--max-windows", "3"),
        *("--calibration", str(text), "--samples", "4", "--length", "32", "--tile", "4"),
    ]
    assert main(command) == 0
    results = json.loads(output.read_text())
    dense, baseline, ours = results["rows"]
    assert (dense["variant"], baseline["variant"], ours["variant"]) == ("dense", "svd-llm", "mpifa")
    assert dense["windows"] == 3
    assert 1.0 < dense["perplexity"] < baseline["perplexity"] * 10
    assert ours["kept_density"] <= 0.7
    assert ours["cpu_seconds"] > 0
    assert ours["peak_rss_bytes"] > 1e8
    capsys.readouterr()
    assert main(command) == 0  # everything is there: nothing is measured, and nothing said
    assert capsys.readouterr().out == ""
    assert main(["bench", "table", str(output)]) == 0
    assert "| 0.7 |" in capsys.readouterr().out
    assert main([*command[:-2], "--variants", "magic"]) == 1
    assert "found magic" in capsys.readouterr().err
