"""How much the dense model's loss feels a change of each module's outputs.

One forward and one backward pass of the dense model over some of the calibration tokens, a decoder layer in memory
at a time, give per module

    S = E[g gᵀ]   [m, m], g the gradient of the loss with respect to the module's outputs at a token; where m > n,
                  as for gate and up, its diagonal [m], which says as much there
    G = E[x xᵀ]   [n, n], of its inputs

The loss is -log p of a token that the model itself draws at every position, so that E[g gᵀ] is the Fisher
information: a change δ of the outputs moves the model's predictions by KL ≈ ½ E[(gᵀ δ)²] nats, and a change Δ of
the weight by ½ tr(S Δ G Δᵀ) where inputs and gradients are taken for independent (K-FAC, arXiv 1503.05671). S is
the metric in which weights are cut, and the loss at every rank is what ranks are allocated by.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pifa_vllm.checkpoint.atomic import make_directory, replace_file
from pifa_vllm.checkpoint.files import reason
from pifa_vllm.compression.decoder import GROUPS, MODULES, DenseModel, StagedLayer, layer_name
from pifa_vllm.compression.flows import FlowShape, map_activations
from pifa_vllm.compression.lowrank import tail_losses
from pifa_vllm.compression.moments import Moments
from pifa_vllm.errors import PifaError
from pifa_vllm.loading import positions_at_once


class Sensitivity:
    """Metrics and losses of every module, made once and kept in files.

    A killed pass goes on at the last finished layer: states and gradients between layers are files, too.

    Args:
        model: the dense model.
        directory: for the files.
        tokens: int64 [samples, length].
        dtype: storage dtype of states and gradients.
        ridge: of the inputs' metric, see `lowrank.tail_losses`.
        seed: of the tokens that the model draws.
        device: where to compute.
        keep_outputs: whether S is kept, which takes up to 4 m² bytes a module.

    Raises:
        CheckpointError: if the directory cannot be created.
    """

    def __init__(
        self,
        model: DenseModel,
        directory: Path,
        tokens: Tensor,
        *,
        dtype: torch.dtype,
        ridge: float,
        seed: int,
        device: torch.device,
        keep_outputs: bool,
    ) -> None:
        self._model = model
        self._directory = directory
        self._tokens = tokens
        self._shape = FlowShape(tokens.shape[0], tokens.shape[1], model.hidden_size, dtype)
        self._ridge = ridge
        self._seed = seed
        self._device = device
        self._keep_outputs = keep_outputs
        make_directory(directory)

    def outputs(self, layer: int) -> dict[str, Tensor]:
        """S [m, m] or [m], float32, by path in the layer; of a pass that keeps it.

        Raises:
            PifaError: if its file cannot be read.
        """
        return self._load(layer, "outputs")

    def losses(self) -> dict[str, Tensor]:
        """By full module name: float64 [min(m, n) + 1], nats per token that are lost at every rank.

        Raises:
            PifaError: if a layer's file cannot be read.
        """
        losses: dict[str, Tensor] = {}
        for layer in range(self._model.layers):
            found = self._load(layer, "losses")
            losses |= {layer_name(layer, module): x for module, x in found.items()}
        return losses

    def measure(self, on_layer: Callable[[int, int], None]) -> None:
        """Make what is not there yet.

        Args:
            on_layer: called with layers passed and layers to pass, forward and backward.

        Raises:
            CheckpointError: if a file cannot be written or a weight cannot be read.
            PifaError: if a gradient is not finite.
        """
        layers = self._model.layers
        done = next((x for x in range(layers) if self._result(x).is_file()), layers)
        # In inference mode, where the rest of a run is, nothing could be differentiated.
        with torch.inference_mode(False), torch.enable_grad():
            if done == layers:
                self._forward(on_layer)
            for layer in reversed(range(done)):
                self._backward(layer)
                on_layer(2 * layers - layer, 2 * layers)
        self._file("gradients", 0).unlink(missing_ok=True)

    def _forward(self, on_layer: Callable[[int, int], None]) -> None:
        """Write the states that enter each layer, and the gradients of what leaves the last one."""
        layers = self._model.layers
        above = self._file("gradients", layers)
        if above.is_file():
            return
        for layer in range(layers + 1):
            target = self._file("states", layer)
            if not target.is_file():
                replace_file(target, partial(self._write_states, layer))
            on_layer(layer, 2 * layers)
        replace_file(above, self._write_head_gradients)
        self._file("states", layers).unlink(missing_ok=True)

    def _write_states(self, layer: int, path: Path) -> None:
        states = map_activations(path, self._shape)
        with torch.no_grad():
            if layer == 0:
                for sample, tokens in enumerate(self._tokens):
                    states[sample] = self._model.embed(tokens)
                return
            before = self._read("states", layer - 1)
            staged = self._model.staged_layer(layer - 1, self._device)
            for sample, hidden in enumerate(before):
                states[sample] = _through(staged, hidden[None].to(self._device, torch.float32))[0]

    def _write_head_gradients(self, path: Path) -> None:
        """Gradients with respect to the states that leave the last layer."""
        gradients, states = map_activations(path, self._shape), self._read("states", self._model.layers)
        norm, matrix = self._model.head(self._device)
        size = positions_at_once(matrix.shape[0])
        for sample, hidden in enumerate(states):
            # Of its own for each sample, so that a pass which is killed draws the same.
            generator = torch.Generator(self._device).manual_seed(self._seed * 1_000_003 + sample)
            for start in range(0, hidden.shape[0], size):
                part = hidden[start : start + size].to(self._device, torch.float32).requires_grad_()
                normed = norm(part)
                with torch.no_grad():
                    # The gradient of -log p at the logits: probabilities less what was drawn.
                    slope = (normed @ matrix.T).softmax(dim=-1)  # [tokens, vocabulary]
                    drawn = draw(slope, generator)
                    slope.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=slope.dtype))
                    back = slope @ matrix
                gradients[sample, start : start + size] = torch.autograd.grad(normed, part, back)[0]

    def _backward(self, layer: int) -> None:
        """Take the gradients through one layer, and write what they say of its modules."""
        staged = self._model.staged_layer(layer, self._device)
        observed = _Observed(staged, self._device)
        replace_file(self._file("gradients", layer), partial(self._write_gradients, staged, layer))
        results = {}
        for group, modules in GROUPS.items():
            gram = observed.inputs[group].gram()
            for module in modules:
                outputs = observed.outputs[module].gram()
                for what, moments in (("calibration inputs", gram), ("gradients at its outputs", outputs)):
                    if not bool(torch.isfinite(moments).all()):
                        raise PifaError(
                            f"{layer_name(layer, module)}: its {what} overflow float32, expected finite ones. Does "
                            "the model work on this text (`pifa-vllm eval`)?"
                        )
                losses = tail_losses(staged.linears[module].weight, gram, self._ridge, outputs)
                if self._keep_outputs:
                    results[f"{module}.outputs"] = outputs.float().cpu()
                results[f"{module}.losses"] = losses.cpu()
        replace_file(self._result(layer), partial(save_file, results))
        # Nothing is deleted before what is made of it is on the disk.
        self._file("gradients", layer + 1).unlink(missing_ok=True)
        self._file("states", layer).unlink(missing_ok=True)

    def _write_gradients(self, staged: StagedLayer, layer: int, path: Path) -> None:
        gradients = map_activations(path, self._shape)
        pairs = zip(self._read("states", layer), self._read("gradients", layer + 1), strict=True)
        for sample, (hidden, above) in enumerate(pairs):
            entering = hidden[None].to(self._device, torch.float32).requires_grad_()
            leaving = _through(staged, entering)
            above = above[None].to(self._device, torch.float32)
            gradients[sample] = torch.autograd.grad(leaving, entering, above)[0][0]

    def _load(self, layer: int, what: str) -> dict[str, Tensor]:
        """One kind of result by path in the layer: S may take gigabytes, the losses next to nothing."""
        path = self._result(layer)
        try:
            with safe_open(path, framework="pt") as file:
                return {module: file.get_tensor(f"{module}.{what}") for module in MODULES}
        except (OSError, SafetensorError) as error:
            raise PifaError(
                f"{path}: cannot be read ({reason(error)}). Remove {self._directory} to have it made again."
            ) from error

    def _read(self, what: str, layer: int) -> Tensor:
        path = self._file(what, layer)
        size = path.stat().st_size if path.is_file() else 0
        if size != self._shape.nbytes:
            raise PifaError(
                f"{path}: expected {self._shape.nbytes} bytes, found {size}. Remove {self._directory.parent} to "
                "start over."
            )
        return map_activations(path, self._shape)

    def _file(self, what: str, layer: int) -> Path:
        return self._directory / f"{what}-{layer:05d}.bin"

    def _result(self, layer: int) -> Path:
        return self._directory / f"layer-{layer:05d}.safetensors"


class _Observed:
    """Second moments of what enters a layer's modules, and of the gradients at what leaves them.

    Attributes:
        inputs: by group.
        outputs: by path in the layer.
    """

    def __init__(self, staged: StagedLayer, device: torch.device) -> None:
        self.inputs: dict[str, Moments] = {}
        self.outputs: dict[str, Moments | _Squares] = {}
        for group, modules in GROUPS.items():
            for module in modules:
                linear = staged.linears[module]
                m, wide = linear.out_features, linear.out_features > linear.in_features
                self.outputs[module] = _Squares(m, device) if wide else Moments(m, device, dense_gram=True)
                linear.register_forward_hook(self._watch(self.outputs[module]))
            self.inputs[group] = Moments(linear.in_features, device, dense_gram=True)
            linear.register_forward_pre_hook(self._enter(self.inputs[group]))

    @staticmethod
    def _enter(moments: Moments) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor]) -> None:
            x = arguments[0].detach()
            moments.add(x, x)

        return hook

    @staticmethod
    def _watch(moments: Moments | _Squares) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def hook(_: nn.Module, __: tuple[Tensor], outputs: Tensor) -> None:
            outputs.register_hook(lambda gradient: moments.add(gradient, gradient))  # type: ignore[no-untyped-call]  # torch's

        return hook


class _Squares:
    """The diagonal of what `Moments` has."""

    def __init__(self, features: int, device: torch.device) -> None:
        self._sum = torch.zeros(features, device=device)
        self._tokens = 0

    def add(self, gradient: Tensor, _: Tensor) -> None:
        rows = gradient.reshape(-1, gradient.shape[-1]).float()
        self._sum += rows.square().sum(dim=0)
        self._tokens += len(rows)

    def gram(self) -> Tensor:
        return self._sum.double() / max(self._tokens, 1)


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one index per row of [tokens, vocabulary]: [tokens, 1].

    torch.multinomial, which draws a number for each probability, takes some 18 times as long on two cores.
    """
    below = probabilities.cumsum(dim=-1)
    level = torch.rand(len(below), 1, generator=generator, device=below.device) * below[:, -1:]
    return torch.searchsorted(below, level, right=True).clamp_(max=below.shape[1] - 1)


def _through(staged: StagedLayer, hidden: Tensor) -> Tensor:
    """A whole decoder layer."""
    hidden = staged.attention_output(hidden, staged.attention(hidden))
    return staged.mlp_output(hidden, staged.mlp(hidden))
