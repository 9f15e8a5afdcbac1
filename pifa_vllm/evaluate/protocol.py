"""What perplexity means here: which tokens are scored, and what is reported, whatever engine runs the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pifa_vllm.checkpoint.files import reason
from pifa_vllm.errors import EvaluationError


@dataclass(frozen=True)
class Perplexity:
    """The result of one engine on one text.

    Attributes:
        model: the directory.
        engine: "transformers" or "vllm".
        dtype: of the weights and activations, such as "float32". Log-probabilities are float32 in any case.
        seqlen: tokens per window; each window is scored on its last seqlen - 1 tokens.
        special_tokens: whether the tokenizer added its own (a BOS at the start of the text, as a rule).
        text_tokens: tokens of the whole text, of which a last partial window is dropped.
        window_nlls: mean negative log-likelihood per token, in nats, of each window.
    """

    model: str
    engine: str
    dtype: str
    seqlen: int
    special_tokens: bool
    text_tokens: int
    window_nlls: tuple[float, ...]

    @property
    def windows(self) -> int:
        """Number of windows that were scored."""
        return len(self.window_nlls)

    @property
    def scored_tokens(self) -> int:
        """Tokens that were scored: all but each window's first."""
        return self.windows * (self.seqlen - 1)

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood per scored token, in nats."""
        return math.fsum(self.window_nlls) / self.windows

    @property
    def perplexity(self) -> float:
        """exp(nll).

        Raises:
            EvaluationError: if no float holds it.
        """
        try:
            return math.exp(self.nll)
        except OverflowError:
            raise EvaluationError(
                f"{self.model}: the mean negative log-likelihood is {self.nll:.4g} nats per token, of which no "
                "float holds the perplexity; expected at most 709. The weights are probably damaged."
            ) from None

    @property
    def standard_error(self) -> float | None:
        """Standard error of `nll` over windows; None for a single window."""
        return standard_error(self.window_nlls)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, the figures derived from `window_nlls` included, ready for JSON."""
        derived = {
            "perplexity": self.perplexity,
            "nll": self.nll,
            "standard_error": self.standard_error,
            "windows": self.windows,
            "scored_tokens": self.scored_tokens,
        }
        return {**derived, **asdict(self)}


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of independent values; None for fewer than two.

    Of the differences of two models on the same windows it is the paired one: what makes a window hard for both
    drops out, and that is most of the spread.
    """
    count = len(values)
    if count < 2:
        return None
    mean = math.fsum(values) / count
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


@dataclass(frozen=True)
class Windows:
    """A text as non-overlapping windows: `tokens` is int64 [windows, seqlen]."""

    tokens: Tensor
    special_tokens: bool
    text_tokens: int


def cut_windows(
    tokenizer: Any,
    text: str,
    *,
    seqlen: int,
    max_windows: int | None = None,
    special_tokens: bool = False,
) -> Windows:
    """Tokenise a text as one stream and cut it; the last partial window is dropped.

    Args:
        tokenizer: a transformers tokenizer.
        text: the whole text.
        seqlen: tokens per window, at least 2.
        max_windows: keep only the first ones.
        special_tokens: let the tokenizer add its own, once, as it does by default elsewhere.

    Raises:
        EvaluationError: if the text does not fill one window.
    """
    if seqlen < 2 or (max_windows is not None and max_windows < 1):
        raise EvaluationError(
            f"expected windows of at least 2 tokens and at least 1 of them, found seqlen {seqlen} and "
            f"max_windows {max_windows}."
        )
    # verbose=False: the stream is longer than the model's context on purpose.
    encoded = tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"]
    stream = torch.tensor(encoded, dtype=torch.int64)
    count = stream.numel() // seqlen
    if count == 0:
        raise EvaluationError(
            f"the text has {stream.numel()} tokens, expected at least one window of {seqlen}; give more text or "
            "a smaller seqlen."
        )
    count = min(count, max_windows or count)
    return Windows(stream[: count * seqlen].view(count, seqlen), special_tokens, stream.numel())


def check_fit(windows: Windows, config: Any, source: str) -> None:
    """Check that a model takes windows of this length and these tokens.

    Args:
        windows: what is to be scored.
        config: the transformers config of the model.
        source: the model, to be named in errors.

    Raises:
        EvaluationError: naming expected and found.
    """
    text_config = config.get_text_config()
    longest = getattr(text_config, "max_position_embeddings", None)
    seqlen = windows.tokens.shape[1]
    if longest is not None and seqlen > longest:
        raise EvaluationError(
            f"{source}: windows of {seqlen} tokens are asked for, but the model's max_position_embeddings is "
            f"{longest}."
        )
    largest = int(windows.tokens.max())
    if largest >= text_config.vocab_size:
        raise EvaluationError(
            f"{source}: the tokenizer gives token {largest}, but the model's vocab_size is "
            f"{text_config.vocab_size}. Do the tokenizer and the model belong together?"
        )


def load_config(directory: Path) -> Any:
    """Load the transformers config of a local model directory.

    Raises:
        EvaluationError: if transformers does not know such a model.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise EvaluationError(
            f"{directory}: transformers cannot load this model ({reason(error)})."
        ) from error
