"""Looks at a PIFA checkpoint before transformers or vLLM builds anything from its config.json.

Both build a config, and then a model, from what config.json says before they ask any quantizer; ten million layers
keep them busy for minutes. `PreTrainedConfig.get_config_dict`, which reads the file for both of them, is the last
place where its content is nothing but data. Other models pass through it untouched.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any, Final

# As JSON has it; what spells it otherwise is found once it is decoded.
_NAMED: Final = b'"pifa"'


def guard_configs() -> None:
    """Make transformers check PIFA checkpoints when it reads their config.json. Idempotent."""
    from transformers.configuration_utils import PreTrainedConfig

    original = PreTrainedConfig.get_config_dict.__func__
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def get_config_dict(
        cls: type, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        directory = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")
        check_file(directory)
        config, rest = original(cls, pretrained_model_name_or_path, **kwargs)
        check_config(config, directory)
        return config, rest

    guarded: Any = get_config_dict
    PreTrainedConfig.get_config_dict = classmethod(guarded)


def check_file(directory: Path) -> None:
    """Check a checkpoint whose config.json says that it is a PIFA one, or may say so but cannot be read.

    Raises:
        CheckpointError: naming file, tensor, expected and found.
        UnsupportedModelError: see `check_config`.
    """
    from pifa_vllm.checkpoint.files import MAX_CONFIG, read_file
    from pifa_vllm.checkpoint.schema import read_json

    path = directory / "config.json"
    # What is no regular file, transformers does not take for one either.
    if not path.is_file():
        return
    if path.stat().st_size > MAX_CONFIG:
        with path.open("rb") as file:
            mentions = any(_NAMED in part for part in iter(functools.partial(file.read, 1 << 20), b""))
    else:
        mentions = _NAMED in read_file(path, MAX_CONFIG)
    if mentions:
        check_config(read_json(path, limit=MAX_CONFIG), directory)


def check_config(config: object, directory: Path) -> None:
    """Check a decoded config.json, and the checkpoint around it where that is a local directory with weights.

    Raises:
        CheckpointError: naming file, tensor, expected and found.
        UnsupportedModelError: if it is another kind of model than those that can be compressed.
    """
    section = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(section, dict) or section.get("quant_method") != "pifa":
        return
    from pifa_vllm.checkpoint import Checkpoint
    from pifa_vllm.checkpoint.schema import PIFAConfig
    from pifa_vllm.checkpoint.sizes import read_sizes

    if directory.is_dir() and any(directory.glob("*.safetensors*")):
        Checkpoint.open(directory)
    else:
        # Of a name on a hub, whose weights are not there yet, or a directory with a config and a tokenizer only.
        PIFAConfig.parse(section, f"{directory}: config.json")
        read_sizes(config, f"{directory}: config.json")
