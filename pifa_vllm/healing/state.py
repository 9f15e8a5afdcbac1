"""What a healing run keeps on the disk so that it can be killed at any moment: no pickles, two safetensors files.

state.safetensors   parameters and AdamW's moments after the last look at the held-out text, and how far it is
best.safetensors    parameters as they were when the held-out text was predicted best
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pifa_vllm.checkpoint.atomic import replace_file
from pifa_vllm.compression.journal import Costs, check_inputs
from pifa_vllm.compression.report.schema import HealingPoint
from pifa_vllm.errors import PifaError

_MOMENTS = ("exp_avg", "exp_avg_sq")


class State(Costs):
    """How far a run is.

    Attributes:
        inputs: everything that the result depends on; a run resumes only with the very same.
        history: the looks at the held-out text so far; the first is at the input.
        stopped: why it has ended early, or None.
    """

    model_config = ConfigDict(extra="forbid")

    inputs: dict[str, Any]
    history: list[HealingPoint] = Field(default_factory=list)
    stopped: str | None = None

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.history[-1].step if self.history else 0

    @property
    def best(self) -> HealingPoint:
        """The look at which the held-out loss was least."""
        return min(self.history, key=lambda point: point.held_out)


class StateFiles:
    """The two files in a run's work directory."""

    def __init__(self, directory: Path) -> None:
        self._state = directory / "state.safetensors"
        self._best = directory / "best.safetensors"

    def save(
        self, state: State, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        """Write where the run is, whole or not at all.

        Raises:
            CheckpointError: if it cannot be written.
        """
        tensors = {f"parameter.{name}": parameter.detach().cpu() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            for moment in _MOMENTS:
                if moment in optimizer.state[parameter]:
                    tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment].cpu()
        metadata = {"state": state.model_dump_json()}
        replace_file(self._state, lambda path: save_file(tensors, path, metadata=metadata))

    def load(
        self, inputs: dict[str, Any], parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> State | None:
        """Take up an earlier attempt: its state, with parameters and optimizer set; None if there is none.

        Raises:
            PifaError: if it was made from other inputs, naming what differs, or cannot be read.
        """
        if not self._state.is_file():
            return None
        directory = self._state.parent
        try:
            with safe_open(self._state, framework="pt") as file:
                state = State.model_validate(json.loads((file.metadata() or {})["state"]))
            tensors = load_file(self._state)
        except (OSError, SafetensorError, KeyError, ValueError, ValidationError) as error:
            reason = " ".join(str(error).split())[:300]
            raise PifaError(
                f"{self._state}: the state of an earlier attempt cannot be read ({reason}). Remove {directory} to "
                "start over."
            ) from error
        check_inputs(directory, state.inputs, inputs, f"{state.step} finished steps")
        for name, parameter in parameters.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"parameter.{name}"])
            if f"{_MOMENTS[0]}.{name}" in tensors:
                moments = {x: tensors[f"{x}.{name}"].to(parameter.device) for x in _MOMENTS}
                step = torch.tensor(float(state.step), device=parameter.device)
                optimizer.state[parameter] = {"step": step, **moments}
        return state

    def save_best(self, parameters: dict[str, nn.Parameter]) -> None:
        """Write the parameters that are the best so far, whole or not at all."""
        tensors = {name: parameter.detach().cpu() for name, parameter in parameters.items()}
        replace_file(self._best, lambda path: save_file(tensors, path))

    def load_best(self) -> dict[str, Tensor]:
        """Read the best parameters.

        Raises:
            PifaError: if the file is missing or damaged.
        """
        try:
            return load_file(self._best)
        except (OSError, SafetensorError) as error:
            raise PifaError(
                f"{self._best}: cannot be read ({error}). Remove {self._best.parent} to start over."
            ) from error
