"""The checkpoint format: a Hugging Face model directory with PIFA tensors in its safetensors shards.

Per compressed module NAME of rank r and full shape [m, n]:

    NAME.pivot_weight   [r, n]       the pivot rows
    NAME.coefficients   [m - r, r]   the remaining rows, ascending, as combinations of the pivot rows
    NAME.pivot_rows     int32 [r]    strictly increasing
    NAME.bias           [m]          if the dense module had one

and `quantization_config` in config.json (`PIFAConfig`). Quantized factors (version 2) have scales beside their
numbers. Everything else is as in the dense model.
"""

from pifa_vllm.checkpoint.densify import densify
from pifa_vllm.checkpoint.schema import FactorFormat, PIFAConfig, is_pifa, read_config, read_json
from pifa_vllm.checkpoint.shards import Shards, TensorEntry
from pifa_vllm.checkpoint.tokenizer import load_tokenizer
from pifa_vllm.checkpoint.validate import Checkpoint, ModuleEntry, check_finite, check_pivots
from pifa_vllm.checkpoint.writer import CheckpointWriter

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "FactorFormat",
    "ModuleEntry",
    "PIFAConfig",
    "Shards",
    "TensorEntry",
    "check_finite",
    "check_pivots",
    "densify",
    "is_pifa",
    "load_tokenizer",
    "read_config",
    "read_json",
]
