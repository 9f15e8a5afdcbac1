"""Calibration without data: the dense model samples its own text.

The idea is LLM-QAT's (arXiv 2305.17888) and self-calibration's (arXiv 2410.17170): text that a model samples at
temperature 1 follows the distribution that it was trained on. What it samples is decided by how a text starts, so
rows start in up to three ways that take turns:

    a random token  anything of the vocabulary, LLM-QAT's way to diversity
    a document      the tokens that the tokenizer puts before every text; where it puts none, the token that is
                    called bos has another use in training, and texts that start with it are poor
    a chat          the chat template up to where the user speaks, so that the model asks its own question and
                    then answers it (Magpie, arXiv 2406.08464); if there is a template

At the end-of-sequence token a row goes on with its next start, so that every row is full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

from pifa_vllm.errors import CalibrationError

# Many short pieces are sampled side by side and joined, as text calibration joins documents: a step for 64 rows
# costs twice as much as one for 16 (SmolLM2-135M, two cores), and the cache holds rows x piece tokens at a time.
ROWS = 64
PIECE = 96
# Stands where the user's message does while the chat template is taken apart.
_MARK = "\u2063user message\u2063"


def sample_from_model(
    model_dir: Path,
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int,
    device: str | torch.device = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Sample calibration sequences from a dense model at temperature 1.

    The model is loaded by transformers in its stored dtype and freed again. The same seed gives the same tokens
    on the same machine with the same number of threads; elsewhere rounding may tip a draw.

    Args:
        model_dir: dense Hugging Face model directory.
        tokenizer: its tokenizer.
        samples: number of sequences.
        length: tokens per sequence.
        seed: of all draws.
        device: where the model runs.
        on_progress: called with tokens done and tokens in all.

    Returns:
        int64 [samples, length] on the CPU, and a record of how they were drawn.

    Raises:
        CalibrationError: if the model cannot be loaded, its logits are not finite, or the tokenizer is not its own.
    """
    model = _load(model_dir, device)
    generator = torch.Generator(device=device).manual_seed(seed)
    starts = _Starts(tokenizer, model, torch.Generator().manual_seed(seed), model_dir)

    total = samples * length
    pieces = -(-total // PIECE)
    drawn: list[Tensor] = []
    for indices in torch.arange(pieces).tensor_split(-(-pieces // ROWS)):
        done = int(indices[0]) * PIECE

        def report(step: int, rows: int = len(indices), done: int = done) -> None:
            if on_progress is not None:
                on_progress(min(done + step * rows, total), total)

        rows = [starts.row(index) for index in indices.tolist()]
        drawn.append(_sample_rows(model, rows, generator, report))
    tokens = torch.cat(drawn).reshape(-1)[:total].reshape(samples, length)
    how = {
        "temperature": 1.0,
        "piece": PIECE,
        "starts": starts.kinds,
        "dtype": str(model.dtype).split(".")[-1],
    }
    return tokens, how


class _Row:
    """One row's text: openings are fed as they are, everything else is the model's draw."""

    def __init__(self, openings: Iterator[list[int]], ends: frozenset[int]) -> None:
        self._openings = openings
        self._ends = ends
        self._pending = list(next(openings))

    def take(self, drawn: int) -> int:
        """Return the row's next token, given the one that the model drew."""
        if self._pending:
            return self._pending.pop(0)
        if drawn in self._ends:
            self._pending = list(next(self._openings))
        return drawn


class _Starts:
    """Hands out rows whose starts take turns over the kinds that tokenizer and model allow.

    Attributes:
        kinds: names of the kinds, for the record.
    """

    def __init__(self, tokenizer: Any, model: Any, generator: torch.Generator, model_dir: Path) -> None:
        self._vocabulary = min(len(tokenizer), int(model.config.vocab_size))
        self._generator = generator
        self._ends = _end_tokens(tokenizer, model)
        # What the tokenizer puts before every text, which some do and some don't.
        self._prefix = [x for x in tokenizer("")["input_ids"] if x not in self._ends]
        self._openings: dict[str, Callable[[], Iterator[list[int]]]] = {"random token": self._random_tokens}
        if self._prefix:
            self._openings["document"] = lambda: cycle([self._prefix])
        turns = _chat_turns(tokenizer, self._ends)
        if turns is not None:
            self._openings["chat"] = lambda: cycle(turns)
        self.kinds = list(self._openings)
        largest = max(self._prefix + [token for turn in turns or () for token in turn], default=0)
        if largest >= model.config.vocab_size:
            raise CalibrationError(
                f"{model_dir}: the tokenizer gave token id {largest} (it knows {len(tokenizer)} tokens), expected "
                f"ids below the model's vocab_size, found vocab_size {model.config.vocab_size}. Tokenizer and "
                "model do not belong together."
            )

    def row(self, index: int) -> _Row:
        """Start row number `index`."""
        return _Row(self._openings[self.kinds[index % len(self.kinds)]](), self._ends)

    def _random_tokens(self) -> Iterator[list[int]]:
        while True:
            drawn: list[int] = torch.randint(0, self._vocabulary, (1,), generator=self._generator).tolist()
            yield self._prefix + drawn


def _end_tokens(tokenizer: Any, model: Any) -> frozenset[int]:
    """Collect the ids that end a text or a turn."""
    ends: set[int] = set()
    for source in (tokenizer, model.config, model.generation_config):
        value = getattr(source, "eos_token_id", None)
        ends.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(ends)


def _chat_turns(tokenizer: Any, ends: frozenset[int]) -> list[list[int]] | None:
    """Take the chat template apart: the tokens before a user's message, and those from it to the answer."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
        )
    except Exception:  # a template is a program that can fail in any way; the other starts remain
        return None
    parts = str(text).split(_MARK)
    if len(parts) != 2:
        return None
    before, between = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
    # The model's own end of turn stands for the template's.
    between = between[1:] if between and between[0] in ends else between
    return [before, between] if before and between else None


class _Buffer(DynamicLayer):  # type: ignore[misc]  # transformers is not followed by mypy
    """A layer's keys and values in one allocation; growing by concatenation would copy all of it every step."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append [rows, heads, new, head_dim]; returns everything so far, as views."""
        used = self.get_seq_length()
        if not self.is_initialized:
            rows, heads, _new, head_dim = key_states.shape
            self.lazy_initialization(key_states, value_states)
            self._keys = key_states.new_empty(rows, heads, self._capacity, head_dim)
            self._values = value_states.new_empty(rows, heads, self._capacity, value_states.shape[-1])
        end = used + key_states.shape[-2]
        self._keys[:, :, used:end] = key_states
        self._values[:, :, used:end] = value_states
        self.keys, self.values = self._keys[:, :, :end], self._values[:, :, :end]
        return self.keys, self.values


@torch.inference_mode()
def _sample_rows(
    model: Any, rows: list[_Row], generator: torch.Generator, report: Callable[[int], None]
) -> Tensor:
    """Sample PIECE tokens for every row: int64 [rows, PIECE] on the CPU."""
    cache = Cache(layers=[_Buffer(PIECE) for _ in range(model.config.num_hidden_layers)])
    tokens = torch.empty(len(rows), PIECE, dtype=torch.int64)
    drawn = [-1] * len(rows)
    for step in range(PIECE):
        tokens[:, step] = torch.tensor([row.take(token) for row, token in zip(rows, drawn, strict=True)])
        if step + 1 < PIECE:
            ids = tokens[:, step : step + 1].to(model.device)
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[
                :, -1
            ]  # [rows, vocabulary]
            drawn = _draw(logits, generator).tolist()
        report(step + 1)
    return tokens


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token a row by inverting the cumulative distribution: int64 [rows].

    torch.multinomial would draw a random number for every token of the vocabulary, which costs as much as the
    model's own step on a small model.
    """
    cumulative = torch.softmax(logits, dim=-1, dtype=torch.float32).cumsum_(dim=-1)
    total = cumulative[:, -1:]
    if not bool(torch.isfinite(total).all()):
        raise CalibrationError(
            "--calibration self: the model's logits are NaN or infinite; its weights are probably damaged."
        )
    uniform = torch.rand(total.shape, generator=generator, device=logits.device) * total
    picked = torch.searchsorted(cumulative, uniform, right=True)
    return picked.squeeze(1).clamp_(max=logits.shape[-1] - 1)


def _load(model_dir: Path, device: str | torch.device) -> Any:
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype="auto", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # configuration, weights and code are read by several libraries
        raise CalibrationError(
            f"{model_dir}: the model cannot be loaded to sample from ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]})."
        ) from error
    return model.to(device).eval()
