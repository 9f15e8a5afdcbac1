"""The tokenizer that lies beside a model's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pifa_vllm.checkpoint.files import printable
from pifa_vllm.errors import CheckpointError, UnsupportedModelError


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of a local model directory, dense or PIFA, running no code from it.

    Raises:
        CheckpointError: if there is none that can be loaded, or the checkpoint around it is damaged.
    """
    if not directory.is_dir():
        # transformers would take it for a name on the Hub.
        raise CheckpointError(f"{directory}: no such directory; expected a model with its tokenizer.")
    # Most of what reads checkpoints needs no tokenizer, and this import takes seconds.
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except CheckpointError:  # of the configuration beside it, which transformers reads first
        raise
    except Exception as error:  # several libraries parse these files, and some raise bare Exception
        raise CheckpointError(
            f"{directory}: the tokenizer cannot be loaded ({type(error).__name__}: "
            f"{printable(' '.join(str(error).split())[:200])}). Expected tokenizer.json or tokenizer.model."
        ) from error


def check_same_tokenizer(expected: Path, directory: Path) -> None:
    """Check that two directories' tokenizers give every token the same id.

    Raises:
        CheckpointError: if one of them has none that can be loaded.
        UnsupportedModelError: naming the first token that differs.
    """
    wanted, found = (load_tokenizer(path).get_vocab() for path in (expected, directory))
    # A tokenizer may leave ids of the embedding unused, but those that it uses must be the same.
    different = sorted(
        token for token in wanted.keys() | found.keys() if wanted.get(token) != found.get(token)
    )
    if different:
        token = different[0]
        raise UnsupportedModelError(
            f"{directory}: expected the tokenizer of {expected}, found another one: {len(different)} tokens "
            f"differ, first {token!r}: expected id {wanted.get(token)}, found {found.get(token)}."
        )
