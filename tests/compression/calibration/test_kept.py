"""A model's own samples are drawn once, and only taken for those that they are."""

from __future__ import annotations

from pathlib import Path

import torch

from pifa_vllm.compression.calibration.kept import load_kept
from pifa_vllm.compression.calibration.samples import CalibrationSet
from pifa_vllm.compression.calibration.token_file import read_tokens
from pifa_vllm.compression.decoder import DenseModel


def test_own_samples_are_drawn_once_for_each_model_and_seed(twins, tmp_path):
    asked = []

    def load(spec):
        asked.append(spec)
        if spec == "self":
            return CalibrationSet(torch.full((2, 8), len(asked)), {"source": "self"})
        return CalibrationSet(*read_tokens(Path(spec), 2, 8))

    def kept(seed, model=twins.original, spec="self"):
        return load_kept(
            spec, load, staging=tmp_path, model=DenseModel(model), samples=2, length=8, seed=seed
        )

    first = kept(0)
    again = kept(0)
    assert torch.equal(first.tokens, again.tokens)
    assert "tokens_file" not in again.record
    assert asked.count("self") == 1
    assert not torch.equal(kept(1).tokens, first.tokens)
    assert not torch.equal(kept(0, twins.dense).tokens, first.tokens)
    assert asked.count("self") == 3


def test_other_sources_are_not_kept(twins, tmp_path):
    found = CalibrationSet(torch.zeros(2, 8, dtype=torch.int64), {})
    arguments = {
        "staging": tmp_path,
        "model": DenseModel(twins.original),
        "samples": 2,
        "length": 8,
        "seed": 0,
    }
    assert load_kept("text.txt", lambda _: found, **arguments) is found
    assert not list(tmp_path.iterdir())
