"""Which tokens are scored, and the figures that are derived from the windows' means."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from transformers import AutoConfig, logging
from transformers.testing_utils import CaptureLogger

from pifa_vllm.checkpoint import load_tokenizer
from pifa_vllm.errors import EvaluationError
from pifa_vllm.evaluate.protocol import Perplexity, check_fit, cut_windows
from tests.conftest import Twins


def result(*nlls: float) -> Perplexity:
    return Perplexity("dir", "transformers", "float32", 8, False, 100, nlls)


class Letters:
    """A tokenizer of one token per character, with a BOS 0 if it may."""

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [ord(c) for c in text]}


def test_windows_follow_one_another_and_a_partial_one_is_dropped() -> None:
    windows = cut_windows(Letters(), "abcdefgh", seqlen=3)
    assert ["".join(map(chr, window)) for window in windows.tokens.tolist()] == ["abc", "def"]
    assert windows.tokens.dtype == torch.int64
    assert windows.text_tokens == 8
    assert cut_windows(Letters(), "abcdefgh", seqlen=3, max_windows=1).tokens.tolist() == [[97, 98, 99]]
    assert len(cut_windows(Letters(), "abcdefgh", seqlen=3, max_windows=9).tokens) == 2


def test_special_tokens_only_when_asked_for() -> None:
    assert cut_windows(Letters(), "ab", seqlen=2).tokens.tolist() == [[97, 98]]
    windows = cut_windows(Letters(), "ab", seqlen=2, special_tokens=True)
    assert windows.tokens.tolist() == [[0, 97]]
    assert windows.special_tokens


def test_too_short_a_text() -> None:
    with pytest.raises(EvaluationError, match="the text has 2 tokens, expected at least one window of 3"):
        cut_windows(Letters(), "ab", seqlen=3)
    with pytest.raises(EvaluationError, match="the text has 0 tokens"):
        cut_windows(Letters(), "", seqlen=2)


@pytest.mark.parametrize("options", [{"seqlen": 1}, {"seqlen": 0}, {"seqlen": 2, "max_windows": 0}])
def test_impossible_windows(options: dict[str, Any]) -> None:
    with pytest.raises(EvaluationError, match="expected windows of at least 2 tokens and at least 1 of them"):
        cut_windows(Letters(), "abc", **options)


def test_a_long_stream_is_no_reason_to_warn(twins: Twins) -> None:
    tokenizer = load_tokenizer(twins.pifa)
    tokenizer.model_max_length = 4
    with CaptureLogger(logging.get_logger("transformers.tokenization_utils_base")) as log:
        cut_windows(tokenizer, "a long text", seqlen=4)
        assert log.io.getvalue() == ""
        tokenizer("a long text")
    assert "longer than" in log.out, "the warning that must not show was not even there"


def test_windows_must_fit_the_model(twins: Twins) -> None:
    config = AutoConfig.from_pretrained(twins.original)
    check_fit(cut_windows(Letters(), "a" * 512, seqlen=512), config, "here")
    with pytest.raises(
        EvaluationError, match=r"^here: windows of 513 tokens .* max_position_embeddings is 512"
    ):
        check_fit(cut_windows(Letters(), "a" * 513, seqlen=513), config, "here")
    with pytest.raises(
        EvaluationError, match=r"^here: the tokenizer gives token 960, but .* vocab_size is 258"
    ):
        check_fit(cut_windows(Letters(), "aπ", seqlen=2), config, "here")


def test_derived_figures() -> None:
    nlls = (1.0, 2.0, 4.0)
    found = result(*nlls)
    assert found.nll == pytest.approx(7 / 3)
    assert found.perplexity == pytest.approx(math.exp(7 / 3))
    assert found.standard_error == pytest.approx(float(torch.tensor(nlls).std() / math.sqrt(3)))
    assert found.windows == 3
    assert result(1.0).standard_error is None
    with pytest.raises(EvaluationError, match=r"is 1000 nats per token.* expected at most 709"):
        result(1000.0).to_dict()


def test_everything_goes_to_json() -> None:
    found = json.loads(json.dumps(result(1.0, 3.0).to_dict(), allow_nan=False))
    assert found["nll"] == 2.0
    assert found["scored_tokens"] == 14
    assert found["window_nlls"] == [1.0, 3.0]
    assert found["special_tokens"] is False
