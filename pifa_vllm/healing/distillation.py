"""The compressed model, its dense teacher, and the step by which the one comes closer to the other.

The loss is the Kullback-Leibler divergence from the teacher's next-token distribution to the model's, at every
position (knowledge distillation, arXiv 1503.02531, at temperature 1), in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from pifa_vllm.healing.options import HealOptions
from pifa_vllm.layers import PIFALinear
from pifa_vllm.loading import load, positions_at_once

# The teacher's hidden states of sequences that come again, in memory; what does not fit is computed again.
_KEPT_BYTES = 4 << 30


class Distillation:
    """A compressed model in training.

    Args:
        options: of the run.

    Attributes:
        parameters: what is trained, float32, by name.
        optimizer: AdamW over them.

    Raises:
        CheckpointError: if one of the models cannot be loaded.
    """

    def __init__(self, options: HealOptions) -> None:
        self._options = options
        self._student: Any = load(options.model, dtype="float32", device=options.device)
        self._teacher: Any = load(options.teacher, dtype=options.effective_precision, device=options.device)
        self._teacher.requires_grad_(False)
        self._states: dict[tuple[str, int], Tensor] = {}
        self._states_bytes = 0
        self.parameters = trained_parameters(self._student, embeddings=options.embeddings)
        if options.gradient_checkpointing:
            self._student.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        matrices = [x for x in self.parameters.values() if x.ndim > 1]
        vectors = [x for x in self.parameters.values() if x.ndim == 1]
        groups = [{"params": matrices, "weight_decay": options.weight_decay}]
        groups += [{"params": vectors, "weight_decay": 0.0}] if vectors else []
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True)

    def step(self, tokens: Tensor, indices: Sequence[int], scale: float) -> float:
        """Train on a batch.

        Args:
            tokens: int64 [sequences, length], all of them.
            indices: the batch's.
            scale: of the learning rate, in [0, 1].

        Returns:
            The batch's loss before the step; where it is not finite, or its gradient is not, nothing is changed.
        """
        self._student.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(tokens, indices, "train", backward=True)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        if not math.isfinite(loss) or not bool(torch.isfinite(norm)):
            return math.nan
        for group in self.optimizer.param_groups:
            group["lr"] = self._options.lr * scale
        self.optimizer.step()
        return loss

    @torch.no_grad()
    def held_out(self, tokens: Tensor) -> float:
        """Measure the mean loss over all of these sequences, int64 [sequences, length]."""
        self._student.eval()
        size = self._options.batch
        batches = [range(first, min(first + size, len(tokens))) for first in range(0, len(tokens), size)]
        losses = [self._loss(tokens, x, "held out", backward=False) * len(x) for x in batches]
        return math.fsum(losses) / len(tokens)

    @torch.no_grad()
    def replace(self, tensors: dict[str, Tensor]) -> None:
        """Give the trained parameters these values, whatever their dtype."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])

    def _loss(self, tokens: Tensor, indices: Sequence[int], part: str, *, backward: bool) -> float:
        """Mean loss over a batch's tokens; adds its gradients where asked to."""
        device = self._student.device
        batch = tokens[list(indices)].to(device)
        with self._autocast():
            output = self._student.base_model(input_ids=batch, use_cache=False)
        states = output.last_hidden_state.flatten(0, 1)  # [tokens, hidden]
        wanted = torch.cat([self._teacher_states(tokens, i, part) for i in indices])  # likewise
        total, gradients = 0.0, torch.empty_like(states) if backward else None
        # The head's part of the graph is built and dropped in pieces.
        head, teacher_head = self._student.get_output_embeddings(), self._teacher.get_output_embeddings()
        size = positions_at_once(head.weight.shape[0])
        for first in range(0, len(states), size):
            leaf = states[first : first + size].detach().requires_grad_(backward)
            target = wanted[first : first + size].to(device)
            with self._autocast():
                logits = head(leaf)
                with torch.no_grad():
                    goal = teacher_head(target)
            loss, gradient = divergence(logits.detach(), goal)
            total += loss / len(states)
            if gradients is not None:
                logits.backward(gradient.div_(len(states)).to(logits.dtype))
                gradients[first : first + size] = leaf.grad
        if gradients is not None:
            states.backward(gradients)
        return total

    def _teacher_states(self, tokens: Tensor, index: int, part: str) -> Tensor:
        """The teacher's last hidden states of one sequence: [length, hidden]."""
        if (part, index) in self._states:
            return self._states[part, index]
        with torch.no_grad():
            ids = tokens[index : index + 1].to(self._teacher.device)
            states: Tensor = (
                self._teacher.base_model(input_ids=ids, use_cache=False).last_hidden_state[0].cpu()
            )
        if self._states_bytes + states.nbytes <= _KEPT_BYTES:
            self._states[part, index] = states
            self._states_bytes += states.nbytes
        return states

    def _autocast(self) -> torch.autocast:
        enabled = self._options.effective_precision == "bfloat16"
        return torch.autocast(self._student.device.type, dtype=torch.bfloat16, enabled=enabled)


def divergence(logits: Tensor, goal: Tensor) -> tuple[float, Tensor]:
    """Sum over tokens of KL(teacher ‖ student), in nats, and its gradient with respect to the student's logits.

    The gradient is a difference of probabilities; autograd would take three more passes over the logits for it.

    Args:
        logits: [tokens, vocabulary], the student's.
        goal: [tokens, vocabulary], the teacher's.

    Returns:
        The sum, and float32 [tokens, vocabulary].
    """
    ours, theirs = log_softmax(logits.float(), dim=-1), log_softmax(goal.float(), dim=-1)
    probabilities = theirs.exp()
    loss = float(theirs.sub_(ours).mul_(probabilities).sum())
    return loss, ours.exp_().sub_(probabilities)


def trained_parameters(model: Any, *, embeddings: bool) -> dict[str, nn.Parameter]:
    """Choose what is trained, by name, and freeze the rest: the decoder's linear layers, PIFA or dense, and norms.

    Args:
        model: a transformers model with PIFA layers.
        embeddings: whether the embedding and the output head are, too.
    """
    heads = (model.get_input_embeddings(), model.get_output_embeddings()) if embeddings else ()
    linears = [x for x in model.base_model.modules() if isinstance(x, PIFALinear | nn.Linear)]
    ids = {id(x) for module in linears for x in module.parameters()}
    ids |= {id(x) for head in heads for x in head.parameters()}
    chosen = {}
    for name, parameter in model.named_parameters():
        # Modules of rank 0 have factors without numbers.
        trained = parameter.numel() > 0 and (id(parameter) in ids or name.endswith("norm.weight"))
        parameter.requires_grad_(trained)
        if trained:
            chosen[name] = parameter
    return chosen


def rate(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at a step: a linear rise over `warmup` of the steps, then a cosine to 0."""
    rise = max(1, round(steps * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1.0 + math.cos(math.pi * (step - rise + 1) / (steps - rise + 1)))
