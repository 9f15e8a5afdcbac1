"""What else a dense model can be made into at the same cost: fewer bits, or two of every four weights.

Each is written as an ordinary dense checkpoint that holds the values which such a format stands for. They are the
published methods in their plain form, but for GPTQ, which is what this package quantizes dense modules with. The
inputs that GPTQ, SparseGPT and Wanda look at are those of the model as far as it is compressed, layer by layer.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pifa_vllm.checkpoint import CheckpointWriter, FactorFormat, Shards, load_tokenizer, read_json
from pifa_vllm.checkpoint.summary import dense_weights
from pifa_vllm.compression.calibration.samples import load_samples
from pifa_vllm.compression.quantize import round_matrix
from pifa_vllm.loading import load

# A weight [m, n] and the Gram matrix [n, n] of its inputs, to the weight in its place.
Change = Callable[[Tensor, Tensor | None], Tensor]


def round_to_nearest(bits: int, group: int) -> Change:
    """Symmetric integers of `bits` bits, a scale for every `group` neighbours in a row."""
    return lambda weight, _: _rounded(weight, _scales(weight, bits, group), bits)


def magnitude(weight: Tensor, gram: Tensor | None) -> Tensor:
    """Keep the two largest of every four neighbours in a row."""
    return weight * _two_of_four(weight.abs())


def wanda(weight: Tensor, gram: Tensor | None) -> Tensor:
    """The same by |weight| times the norm of its input (arXiv 2306.11695)."""
    return weight * _two_of_four(weight.abs() * _known(gram).diagonal().sqrt())


def gptq(bits: int, group: int) -> Change:
    """Round column by column, each column's error made good by those after it (arXiv 2210.17323)."""
    kind = FactorFormat.model_validate({"bits": bits, "coefficient_bits": bits, "group_size": group})
    return lambda weight, gram: round_matrix(weight, _known(gram), kind.dtype, group).values()


def sparsegpt(weight: Tensor, gram: Tensor | None) -> Tensor:
    """Two of every four, the error of those that go made good by the columns after (arXiv 2301.00774)."""
    kept = weight

    def settle(column: int, rest: Tensor, diagonal: Tensor) -> Tensor:
        nonlocal kept
        if column % 4 == 0:
            kept = _two_of_four((rest[:, :4] / diagonal[:4]).abs())
        return rest[:, 0] * kept[:, column % 4]

    return _by_columns(weight, _known(gram), settle)


def make_rival(
    dense: Path, output: Path, change: Change, calibration: Mapping[str, object] | None, seed: int = 0
) -> None:
    """Write the dense model with its linear modules changed; appears whole or not at all.

    Args:
        dense: model directory.
        output: the directory to create.
        change: what is done to each weight.
        calibration: options of `pifa-vllm compress` for the text; None where the inputs are not looked at.
        seed: of the sampling.

    Raises:
        CheckpointError: if the model is damaged or the output cannot be written.
        CalibrationError: if there is too little text.
    """
    shards = Shards(dense)
    linear = {name for name, _ in dense_weights(shards)}
    changed = {} if calibration is None else _changed(dense, linear, change, calibration, seed)
    staging = output.with_name(f".{output.name}.rival")
    shutil.rmtree(staging, ignore_errors=True)
    files: dict[str, list[str]] = {}
    for name, entry in shards.entries.items():
        files.setdefault(entry.file.name, []).append(name)
    try:
        writer = CheckpointWriter(output, staging)
        writer.copy_companions(dense)
        for file, names in files.items():
            tensors = {name: shards.load(name) for name in names}
            for name in sorted(linear.intersection(names)):
                new = changed[name] if changed else change(tensors[name].float(), None)
                tensors[name] = new.to(tensors[name].dtype)
            writer.write_shard(file, tensors)
        writer.publish(read_json(dense / "config.json"), None)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


class _Reached(Exception):  # noqa: N818  # no error
    """The inputs of the first layer are known."""


@torch.inference_mode()
def _changed(
    dense: Path, linear: set[str], change: Change, calibration: Mapping[str, object], seed: int
) -> dict[str, Tensor]:
    """Change the weights in `linear` layer by layer, each by the inputs that the layers before now give it."""
    samples = load_samples(
        str(calibration.get("calibration", "self")),
        load_tokenizer(dense),
        samples=int(str(calibration.get("samples", 128))),
        length=int(str(calibration.get("length", 2048))),
        seed=seed,
        model_dir=dense,
    )
    model = load(dense)
    layers = model.base_model.layers
    entering: list[tuple[Tensor, dict[str, Any]]] = []

    def reached(_: object, inputs: tuple[Tensor, ...], others: dict[str, Any]) -> None:
        entering.append((inputs[0], others))
        raise _Reached

    hook = layers[0].register_forward_pre_hook(reached, with_kwargs=True)
    for tokens in samples.tokens:
        with suppress(_Reached):
            model.base_model(input_ids=tokens[None], use_cache=False)
    hook.remove()
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    for layer in layers:
        modules = [module for module in layer.modules() if names[module] in linear]
        grams = _grams(layer, modules, entering, samples.tokens.numel())
        for module in modules:
            module.weight.copy_(change(module.weight.float(), grams[module]))
        entering = [(layer(hidden, **others), others) for hidden, others in entering]
    return {name: module.weight.clone() for module, name in names.items() if name in linear}


def _grams(
    layer: nn.Module,
    modules: Sequence[nn.Module],
    entering: Sequence[tuple[Tensor, dict[str, Any]]],
    tokens: int,
) -> dict[nn.Module, Tensor]:
    """The mean of x xᵀ of the inputs of each module, float32 [n, n]."""
    grams: dict[nn.Module, Tensor] = {}

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).float()
        grams[module] = grams.get(module, 0.0) + x.T @ x / tokens

    hooks = [module.register_forward_pre_hook(watch) for module in modules]
    for hidden, others in entering:
        layer(hidden, **others)
    for hook in hooks:
        hook.remove()
    return grams


def _by_columns(weight: Tensor, gram: Tensor, settle: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
    """Settle columns from left to right; what each loses is spread over the rest so that outputs change least.

    `settle(column, weights from it on [m, n - column], diagonal of the inverse's factor from it on)` returns the
    column's final values [m].
    """
    n = len(gram)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(n)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    weight = weight.clone()
    for column in range(n):
        rest = weight[:, column:]
        settled = settle(column, rest, factor.diagonal()[column:])
        error = (rest[:, 0] - settled) / factor[column, column]
        rest[:, 1:] -= error[:, None] * factor[column, column + 1 :]
        rest[:, 0] = settled
    return weight


def _scales(weight: Tensor, bits: int, group: int) -> Tensor:
    """What one step of the integers stands for, [m, n]: the largest weight of a group is the largest integer."""
    m, n = weight.shape
    padded = torch.nn.functional.pad(weight.abs(), (0, -n % group)).view(m, -1, group)
    largest = padded.amax(dim=2).clamp_min(torch.finfo(torch.float32).tiny * 1e6)
    scales = largest / (2 ** (bits - 1) - 1)
    return torch.repeat_interleave(scales, group, dim=1)[:, :n]


def _rounded(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    top = 2 ** (bits - 1) - 1
    return (weight / scales).round().clamp(-top - 1, top) * scales


def _two_of_four(scores: Tensor) -> Tensor:
    """1 where a score is among the two largest of its four neighbours, else 0; [m, n] with n a multiple of 4."""
    fours = scores.view(len(scores), -1, 4)
    kept: Tensor = torch.zeros_like(fours).scatter_(2, fours.topk(2, dim=2).indices, 1.0)
    return kept.view(scores.shape)


def _known(gram: Tensor | None) -> Tensor:
    if gram is None:
        raise TypeError("this needs the inputs' Gram matrix")
    return gram
