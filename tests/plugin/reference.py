"""What transformers says, token by token: the answers that served models are compared with."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

# Where the two best tokens are closer than this, either is a right answer.
TIE = 1e-3
TOLERANCE = 1e-3


class Answer(NamedTuple):
    tokens: list[int]
    logprobs: list[float]
    # Tokens before the first tie.
    certain: int


def make_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[256, *(draw.randrange(256) for _ in range(length))] for length in lengths]


@torch.inference_mode()
def answers_of(model: PreTrainedModel, prompts: list[list[int]], tokens: int) -> list[Answer]:
    """Greedy answers of a float32 model."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        full = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=None
        )
        logprobs = model(full).logits[0, len(prompt) - 1 : -1].log_softmax(-1)  # [tokens, vocabulary]
        best = logprobs.topk(2).values
        ties = (best[:, 0] - best[:, 1] < TIE).nonzero()
        said = full[0, len(prompt) :]
        found.append(
            Answer(
                said.tolist(),
                logprobs.gather(1, said[:, None]).squeeze(1).tolist(),
                int(ties[0]) if len(ties) else tokens,
            )
        )
    return found


def check(answers: list[dict[str, Any]], expected: list[Answer]) -> None:
    """Compare what an engine said, as `tests.plugin.engines.answers` returns it."""
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer["tokens"][: wanted.certain] == wanted.tokens[: wanted.certain]
        torch.testing.assert_close(
            torch.tensor(answer["logprobs"][: wanted.certain]),
            torch.tensor(wanted.logprobs[: wanted.certain]),
            rtol=0,
            atol=TOLERANCE,
        )
    # The comparison is worth something only if most answers were compared to their end.
    assert sum(wanted.certain == len(wanted.tokens) for wanted in expected) >= 0.8 * len(expected)
