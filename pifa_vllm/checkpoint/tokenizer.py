"""The tokenizer that lies beside a model's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pifa_vllm.checkpoint.files import printable
from pifa_vllm.errors import CheckpointError


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of a local model directory, dense or PIFA, running no code from it.

    Raises:
        CheckpointError: if there is none that can be loaded.
    """
    if not directory.is_dir():
        # transformers would take it for a name on the Hub.
        raise CheckpointError(f"{directory}: no such directory; expected a model with its tokenizer.")
    # Most of what reads checkpoints needs no tokenizer, and this import takes seconds.
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # several libraries parse these files, and some raise bare Exception
        raise CheckpointError(
            f"{directory}: the tokenizer cannot be loaded ({type(error).__name__}: "
            f"{printable(' '.join(str(error).split())[:200])}). Expected tokenizer.json or tokenizer.model."
        ) from error
