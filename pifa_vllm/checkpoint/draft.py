"""What two local checkpoints must share so that one can draft for the other (speculative decoding)."""

from __future__ import annotations

from pathlib import Path

from pifa_vllm.checkpoint.schema import read_json
from pifa_vllm.checkpoint.tokenizer import check_same_tokenizer
from pifa_vllm.errors import UnsupportedModelError


def check_draft(target: Path, draft: Path) -> None:
    """Check that the draft's tokens mean what the target's do, and that it reaches as far.

    The answers are the target's whatever the draft is; one of another vocabulary drafts nonsense, and one with
    fewer positions stops drafting where they end.

    Args:
        target: directory of the model that is served.
        draft: directory of the model that drafts.

    Raises:
        CheckpointError: if one of them is missing or has no tokenizer that can be loaded.
        UnsupportedModelError: naming what differs.
    """
    configs = {directory: read_json(directory / "config.json") for directory in (target, draft)}
    if target.resolve() == draft.resolve():
        raise UnsupportedModelError(
            f"{draft}: expected a draft other than the model that it drafts for, found the same directory twice."
        )
    for field in ("vocab_size", "max_position_embeddings"):
        wanted, found = (config.get(field) for config in configs.values())
        if wanted != found:
            raise UnsupportedModelError(
                f"{draft / 'config.json'}: {field}: expected {wanted} as in {target}, found {found}. A draft must "
                "have been compressed from the model that it drafts for."
            )
    check_same_tokenizer(target, draft)
