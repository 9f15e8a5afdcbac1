"""PIFA checkpoints in transformers: `AutoModelForCausalLM.from_pretrained(DIR)` after `import pifa_vllm`.

The model runs PIFA layers, not reconstructed dense weights. Without `import pifa_vllm`, transformers only
warns of an unknown quantization type and leaves every compressed projection at its random initialisation.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pifa_vllm.checkpoint import Checkpoint, ModuleEntry, PIFAConfig, Shards, check_finite, check_pivot_rows
from pifa_vllm.checkpoint.files import reason
from pifa_vllm.errors import CheckpointError, UnsupportedModelError
from pifa_vllm.factorization import PIFA
from pifa_vllm.ops import pifa_linear, stacked_rows
from pifa_vllm.ops.cpu import load
from pifa_vllm.ops.reference import pifa_linear_reference

if TYPE_CHECKING:
    # Not at run time: this module is imported while transformers.modeling_utils is still being executed.
    from transformers.modeling_utils import PreTrainedModel


class PIFALinear(nn.Module):
    """A linear layer [m, n] of rank r in pivoting form, y = x Wᵀ + b (see `pifa_vllm.factorization`).

    Attributes:
        pivot_weight: parameter [r, n].
        coefficients: parameter [m - r, r].
        pivot_rows: int32 buffer [r].
        bias: parameter [m] or None.
        out_rows: int32 buffer [m], derived from `pivot_rows` by `finish_loading`, not saved.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pivot_weight = nn.Parameter(torch.empty(rank, in_features, **kind))
        self.coefficients = nn.Parameter(torch.empty(out_features - rank, rank, **kind))
        self.bias = nn.Parameter(torch.empty(out_features, **kind)) if bias else None
        self.pivot_rows: Tensor
        self.out_rows: Tensor
        self.register_buffer("pivot_rows", torch.empty(rank, device=device, dtype=torch.int32))
        rows = torch.empty(out_features, device=device, dtype=torch.int32)
        self.register_buffer("out_rows", rows, persistent=False)
        # Other pivot rows with the old outputs would give wrong outputs without a word.
        self.register_load_state_dict_post_hook(_finish_state_dict)  # type: ignore[no-untyped-call]  # torch's

    def finish_loading(self, source: str) -> None:
        """Check the pivot rows and derive the rows of the outputs from them.

        Raises:
            CheckpointError: naming `source`, if they are not strictly increasing rows in [0, m).
        """
        check_pivot_rows(self.pivot_rows, self.rank, self.out_features, source)
        self.out_rows = stacked_rows([self.pivot_rows], [self.out_features])
        if self.out_rows.device.type == "cpu":
            load()

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., n] to [..., m], in the dtype of the factors, or of torch.autocast where that is on."""
        if self.training and torch.is_grad_enabled() and self.pivot_weight.requires_grad:
            return linear(x, self._assembled(), self.bias)
        ranks, out_features = [self.rank], [self.out_features]
        coefficients = self.coefficients.flatten()
        # Autocast casts for torch's own ops only; the kernels take one dtype.
        autocast = torch.is_autocast_enabled(x.device.type)
        layer = pifa_linear_reference if autocast else pifa_linear
        return layer(x, self.pivot_weight, coefficients, self.out_rows, ranks, out_features, self.bias)

    def _assembled(self) -> Tensor:
        """W [m, n], differentiable, in the dtype of the factors.

        Where factors are trained, on many tokens at a time, making W and one product with it are faster than two
        products with activations between them, which are put in order forth and back.
        """
        with torch.autocast(self.pivot_weight.device.type, enabled=False):
            rows = torch.cat([self.pivot_weight, self.coefficients @ self.pivot_weight])  # [m, n], stacked
        return torch.zeros_like(rows).index_copy(0, self.out_rows.long(), rows)

    def dense(self) -> nn.Linear:
        """Rebuild the ordinary layer, multiplied in float64 and rounded to the dtype of the factors."""
        factors = PIFA(self.pivot_weight.detach(), self.coefficients.detach(), self.pivot_rows)
        weight = factors.to(torch.float64).dense().to(self.pivot_weight.dtype)
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight)
        linear.register_parameter("bias", self.bias)
        return linear

    def extra_repr(self) -> str:
        """Show the shape as torch.nn.Linear does."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


def _finish_state_dict(module: PIFALinear, _: object) -> None:
    module.finish_loading("state dict: tensor pivot_rows")


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
            if isinstance(module, PIFALinear):
                module.finish_loading(f"{directory}: tensor {name}.pivot_rows")
        if any(parameter.is_meta for parameter in model.parameters()):
            self._checkpoint.verify()  # offloaded to disk
            return
        for name, parameter in model.named_parameters():
            check_finite(parameter, f"{directory}: tensor {name} as {parameter.dtype}")

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        if isinstance(dtype, str):  # save_pretrained leaves config.dtype as a string
            dtype = getattr(torch, dtype)
        for name, module in list(model.named_modules()):
            if isinstance(module, PIFALinear):
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
        """The factors are ordinary floating-point parameters: they may be trained without an adapter."""
        return True

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
    for entry in checkpoint.modules.values():
        name = _name_in_model(model, entry.name)
        linear = _replaceable(model, name, entry, str(checkpoint.directory / "config.json"))
        device, dtype_ = linear.weight.device, dtype or linear.weight.dtype
        layer = PIFALinear(entry.n, entry.m, entry.rank, bias=entry.has_bias, device=device, dtype=dtype_)
        model.set_submodule(name, layer)


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
