from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache

from pifa_vllm.checkpoint import load_tokenizer
from pifa_vllm.compression.calibration import self_sampling
from pifa_vllm.compression.calibration.samples import load_samples
from pifa_vllm.compression.calibration.self_sampling import (
    _Buffer,
    _chat_turns,
    _draw,
    _Row,
    _Starts,
    sample_from_model,
)
from pifa_vllm.errors import CalibrationError
from tests.tiny import ARCHITECTURES, save_byte_tokenizer, save_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("self") / "model")


@pytest.fixture(autouse=True)
def _short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_sampling, "ROWS", 4)
    monkeypatch.setattr(self_sampling, "PIECE", 16)


def test_samples_fill_every_sequence(tiny: Path) -> None:
    told: list[tuple[int, int]] = []
    drawn = load_samples(
        "self",
        load_tokenizer(tiny),
        samples=3,
        length=50,
        seed=0,
        model_dir=tiny,
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert drawn.tokens.shape == (3, 50)
    assert drawn.tokens.dtype == torch.int64
    assert int(drawn.tokens.min()) >= 0
    assert int(drawn.tokens.max()) < 258
    assert told == sorted(told)
    assert told[-1] == (150, 150)
    assert drawn.record["source"] == "self"
    assert drawn.record["starts"] == ["random token", "chat"]
    json.dumps(drawn.record)


def test_the_seed_decides(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    first, again, other = (
        sample_from_model(tiny, tokenizer, samples=4, length=32, seed=seed)[0] for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert (first != other).float().mean() > 0.5
    assert len(first.unique()) > 40


def test_a_row_goes_on_with_its_next_opening_at_the_end_of_a_text() -> None:
    row = _Row(cycle([[10, 11], [20]]), frozenset({2}))
    drawn = [0, 0, 5, 2, 0, 6, 2, 0, 0, 7]
    assert [row.take(token) for token in drawn] == [10, 11, 5, 2, 20, 6, 2, 10, 11, 7]


def test_a_chat_opens_with_the_user_and_goes_on_with_the_answer(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    turns = _chat_turns(tokenizer, frozenset({257}))
    assert turns is not None
    assert [tokenizer.decode(turn) for turn in turns] == ["user: ", "\nassistant:"]


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "no messages here"])
def test_an_unusable_chat_template_leaves_the_other_starts(tmp_path: Path, template: str | None) -> None:
    save_byte_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.chat_template = template
    assert _chat_turns(tokenizer, frozenset()) is None


def test_rows_take_turns_over_the_kinds_of_start(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer = load_tokenizer(tiny)
    plain = _Starts(tokenizer, model, torch.Generator().manual_seed(0), tiny)
    assert plain.kinds == ["random token", "chat"]
    firsts = [plain.row(i).take(-1) for i in range(12)]
    assert len(set(firsts[0::2])) > 1
    assert tokenizer.decode(firsts[1::2]) == "u" * 6

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    prefixed = _Starts(tokenizer, model, torch.Generator().manual_seed(0), tiny)
    assert prefixed.kinds == ["random token", "document", "chat"]
    rows = [[row.take(-1), row.take(-1)] for row in map(prefixed.row, range(12))]
    assert all(row[0] == 256 for kind in (0, 1) for row in rows[kind::3])
    assert len({row[1] for row in rows[0::3]}) > 1
    assert all(row[1] == -1 for row in rows[1::3])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_buffer_gives_the_logits_of_a_pass_without_cache(architecture: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, architecture)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = model(input_ids=ids).logits
        cache = Cache(layers=[_Buffer(12) for _ in range(model.config.num_hidden_layers)])
        steps = [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(12)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-3, atol=1e-3)


def test_draws_follow_the_distribution() -> None:
    share = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    drawn = _draw(share.log().expand(20_000, 5), torch.Generator().manual_seed(0))
    found = torch.bincount(drawn, minlength=5) / 20_000
    assert found[1] == found[4] == 0
    torch.testing.assert_close(found, share, atol=0.02, rtol=0)


def test_damaged_weights_are_noticed(tiny: Path, tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    shard = tmp_path / "model.safetensors"
    tensors = load_file(shard)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CalibrationError, match="logits are NaN or infinite"):
        sample_from_model(tmp_path, load_tokenizer(tmp_path), samples=1, length=8, seed=0)


def test_a_model_that_cannot_be_loaded_is_named(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    with pytest.raises(CalibrationError, match="cannot be loaded to sample from") as caught:
        sample_from_model(tmp_path, load_tokenizer(tiny), samples=1, length=8, seed=0)
    assert str(tmp_path) in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, vocab_size=200, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    with pytest.raises(CalibrationError, match=r"token id \d+ \(it knows 258 tokens\).*found vocab_size 200"):
        sample_from_model(tmp_path, load_tokenizer(tmp_path), samples=1, length=8, seed=0)
