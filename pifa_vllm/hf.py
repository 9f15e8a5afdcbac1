"""PIFA checkpoints in transformers: `AutoModelForCausalLM.from_pretrained(DIR)` after `import pifa_vllm`.

The model runs PIFA layers, not reconstructed dense weights. Without `import pifa_vllm`, transformers only
warns of an unknown quantization type and leaves every compressed projection at its random initialisation.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pifa_vllm.checkpoint import Checkpoint, ModuleEntry, PIFAConfig, Shards, check_finite
from pifa_vllm.checkpoint.files import reason
from pifa_vllm.checkpoint.validate import check_scale
from pifa_vllm.errors import CheckpointError, UnsupportedModelError
from pifa_vllm.layers import PIFALinear, QuantizedLinear

if TYPE_CHECKING:
    # Not at run time: this module is imported while transformers.modeling_utils is still being executed.
    from transformers.modeling_utils import PreTrainedModel


@register_quantization_config("pifa")
class PIFAQuantizationConfig(QuantizationConfigMixin):
    """`PIFAConfig` in the form that transformers keeps in `model.config.quantization_config`.

    Raises:
        CheckpointError: if the section is not valid.
    """

    quant_method = "pifa"

    def __init__(self, **section: Any) -> None:
        self.pifa = PIFAConfig.parse(section, "config.json")

    def to_dict(self) -> dict[str, Any]:
        """Return the section as config.json holds it."""
        return self.pifa.model_dump()


@register_quantizer("pifa")
class PIFAQuantizer(HfQuantizer):
    """Puts `PIFALinear` where a checkpoint has factors, and lets nothing load that does not fit.

    transformers fills missing tensors at random and, with a quantizer, takes any shape that it finds. Here
    the shards' headers are compared with the model before anything is allocated, and the values are checked
    once they are there.
    """

    # Factors come from the compressor; transformers then refuses to make them on the fly.
    requires_calibration = True
    quantization_config: PIFAQuantizationConfig

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        dtype: torch.dtype | None = None,
        **_: object,
    ) -> None:
        if not checkpoint_files:
            raise CheckpointError(
                "PIFA models load from a directory with safetensors, not from a state_dict."
            )
        self._checkpoint = Checkpoint.open(Path(checkpoint_files[0]).parent)
        if self._checkpoint.config.ranks != self.quantization_config.pifa.ranks:
            raise CheckpointError(
                f"{self._checkpoint.directory / 'config.json'}: the ranks of the config that was passed to "
                "from_pretrained differ from those of the checkpoint."
            )
        insert_pifa_layers(model, self._checkpoint, dtype)
        check_tensors(model, self._checkpoint.shards)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> None:
        directory = self._checkpoint.directory
        for name, module in model.named_modules():
            if isinstance(module, PIFALinear | QuantizedLinear):
                module.finish_loading(f"{directory}: tensor {name}.{module.pivots}")
        if any(parameter.is_meta for parameter in model.parameters()):
            self._checkpoint.verify()  # offloaded to disk
            return
        for name, parameter in model.named_parameters():
            check = check_scale if name.endswith("_scale") else check_finite
            check(parameter, f"{directory}: tensor {name} as {parameter.dtype}")

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        if isinstance(dtype, str):  # save_pretrained leaves config.dtype as a string
            dtype = getattr(torch, dtype)
        for name, module in list(model.named_modules()):
            if isinstance(module, PIFALinear | QuantizedLinear):
                model.set_submodule(name, module.dense().to(dtype))
        return model

    def is_serializable(self) -> bool:
        """save_pretrained writes a PIFA checkpoint."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients flow through the factors and to what comes before them (`pifa_vllm.ops.pifa_linear`)."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the factors are ordinary floating-point parameters, which may be trained without an adapter."""
        return self.quantization_config.pifa.factors is None

    @property
    def is_compileable(self) -> bool:
        """torch.compile may trace through the layer."""
        return True


def check_architecture(checkpoint: Checkpoint) -> str:
    """Compare a checkpoint with the model that its config.json describes, without allocating any of it.

    Returns:
        The name of the model's class.

    Raises:
        CheckpointError: naming the first tensor that is missing, has another shape, or is unexpected.
        UnsupportedModelError: if transformers has no causal language model for this config.
    """
    # Not at the top: see PreTrainedModel there.
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True)
        del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers validates in many places, with as many kinds of error
        raise UnsupportedModelError(
            f"{checkpoint.directory / 'config.json'}: transformers makes no causal language model of it "
            f"({reason(error)})."
        ) from error
    insert_pifa_layers(model, checkpoint)
    check_tensors(model, checkpoint.shards, unexpected=True)
    return type(model).__name__


def insert_pifa_layers(
    model: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype | None = None
) -> None:
    """Replace the linear layers that a checkpoint compresses by empty PIFA layers on the same device.

    Args:
        model: a transformers model, on the meta device as a rule.
        checkpoint: whose `modules` say which layers, and their ranks.
        dtype: of the factors; None takes the replaced layer's.

    Raises:
        CheckpointError: if a module is not in the model, is not linear, or has another shape or bias.
    """
    source, kind = str(checkpoint.directory / "config.json"), checkpoint.config.factors
    for entry in checkpoint.modules.values():
        name = _name_in_model(model, entry.name)
        linear = _replaceable(model, name, entry, source)
        device, dtype_ = linear.weight.device, dtype or linear.weight.dtype
        shape = (entry.n, entry.m, entry.rank)
        options: dict[str, Any] = {"bias": entry.has_bias, "device": device, "dtype": dtype_}
        layer: nn.Module = PIFALinear(*shape, **options)
        if kind is not None:
            layer = QuantizedLinear(*shape, kind, pivots=entry.pivots, **options)
        model.set_submodule(name, layer)
    if kind is None:
        return
    for full_name in checkpoint.linear.keys() - checkpoint.modules.keys():
        name = _name_in_model(model, full_name)
        linear = model.get_submodule(name)
        options = {
            "bias": linear.bias is not None,
            "device": linear.weight.device,
            "dtype": linear.weight.dtype,
        }
        m, n = checkpoint.linear[full_name]
        model.set_submodule(name, QuantizedLinear(n, m, None, kind, **options))


def check_tensors(model: PreTrainedModel, shards: Shards, *, unexpected: bool = False) -> None:
    """Compare a model's names and shapes with what the shards' headers say.

    Args:
        model: a transformers model after `insert_pifa_layers`.
        shards: the checkpoint's tensors.
        unexpected: whether tensors that the model does not have are errors, too.

    Raises:
        CheckpointError: naming the first tensor that is missing, has another shape, or is unexpected.
    """
    stored = {_name_in_model(model, name): entry for name, entry in shards.entries.items()}
    tied: dict[str, str] = model.all_tied_weights_keys
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name in stored:
            found = stored[name]
            if found.shape != tuple(tensor.shape):
                raise CheckpointError(
                    f"{found.file}: tensor {name}: {type(model).__name__} expects {list(tensor.shape)}, "
                    f"found {list(found.shape)}."
                )
        elif tied.get(name) not in stored and not any(t in stored for t, s in tied.items() if s == name):
            raise CheckpointError(
                f"{shards.directory}: tensor {name} is missing; {type(model).__name__} expects it with shape "
                f"{list(tensor.shape)}."
            )
    for name, entry in stored.items():
        # Rotary frequencies were saved by transformers once and are computed today.
        if unexpected and name not in expected and not name.endswith("rotary_emb.inv_freq"):
            raise CheckpointError(
                f"{entry.file}: tensor {name} is unexpected; {type(model).__name__} has none of this name."
            )


def _replaceable(model: PreTrainedModel, name: str, entry: ModuleEntry, source: str) -> nn.Linear:
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear):
        raise CheckpointError(
            f"{source}: quantization_config.ranks names {entry.name}, expected a linear layer of "
            f"{type(model).__name__}, found {'none' if linear is None else type(linear).__name__}."
        )
    found = (entry.m, entry.n, entry.has_bias)
    expected = (linear.out_features, linear.in_features, linear.bias is not None)
    if found != expected:
        raise CheckpointError(
            f"{source}: module {entry.name}: {type(model).__name__} expects (out, in, bias) {expected}, "
            f"the checkpoint's factors make {found}."
        )
    return linear


def _name_in_model(model: PreTrainedModel, name: str) -> str:
    """Drop the prefix of the base model where a checkpoint is loaded into the base model itself."""
    prefix = f"{model.base_model_prefix}."
    return name.removeprefix(prefix) if not hasattr(model, model.base_model_prefix) else name
