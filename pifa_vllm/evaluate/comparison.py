"""How far a model is from the dense one it was made of, token by token: loss, KL divergence, same first choice."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pifa_vllm.checkpoint import load_tokenizer
from pifa_vllm.checkpoint.atomic import replace_file
from pifa_vllm.errors import EvaluationError
from pifa_vllm.evaluate.perplexity import head_inputs, logit_chunks
from pifa_vllm.evaluate.protocol import Windows, check_fit, cut_windows
from pifa_vllm.loading import load


@dataclass(frozen=True)
class Comparison:
    """Means over the scored tokens of each window: all but its first.

    Attributes:
        nll: negative log-likelihood, in nats.
        kl: divergence of the model's next-token distribution from the dense model's, KL(dense || model), in nats.
        top1: share of tokens where both find the same one most likely.
    """

    nll: tuple[float, ...]
    kl: tuple[float, ...]
    top1: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        """exp of the mean NLL; infinity where no float holds it."""
        mean = math.fsum(self.nll) / len(self.nll)
        return math.exp(mean) if mean < 709 else math.inf


class Reference:
    """What the dense model says about the windows of a text.

    The inputs of its head are kept on disk, a file per window: [seqlen - 1, hidden] in the model's dtype, 2.4 MB
    for 1,024 tokens of a hidden size of 576 in float32, where logits would take 200 MB. (A model that changes its
    logits after the head, such as Gemma, has those kept.) So the dense model runs once, however many others are
    compared, and neither memory nor disk depends on the vocabulary.

    Args:
        dense: directory of the dense model.
        text: the text.
        seqlen: tokens per window, at least 2.
        max_windows: only the first ones.
        cache: folder for the files; what is there of the same model and windows is used.
        device: where models run.
        say: told how far it is.

    Raises:
        EvaluationError: as `perplexity`.
        CheckpointError: if the model is damaged, or a file cannot be written.
    """

    def __init__(
        self,
        dense: Path,
        text: str,
        *,
        seqlen: int,
        max_windows: int | None,
        cache: Path,
        device: str = "cpu",
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.dense = dense
        self.device = device
        self.windows: Windows = cut_windows(
            load_tokenizer(dense), text, seqlen=seqlen, max_windows=max_windows
        )
        self._model = load(dense, device=device)
        check_fit(self.windows, self._model.config, str(dense))
        self.vocabulary: int = self._model.config.get_text_config().vocab_size
        # The weights' time is part of it: a model that was written anew says other things.
        made = [(path.name, path.stat().st_mtime_ns) for path in sorted(dense.glob("*.safetensors"))]
        key = hashlib.sha256(repr((str(dense.resolve()), made, seqlen)).encode())
        key.update(self.windows.tokens.numpy().tobytes())
        self._cache = cache / f"dense-{key.hexdigest()[:12]}"
        self._cache.mkdir(parents=True, exist_ok=True)
        for index, tokens in enumerate(self.windows.tokens):
            if not self._file(index).exists():
                self._keep(index, tokens)
                say(f"{dense}: window {index + 1} of {len(self.windows.tokens)}")
        # Of the model only this is used from now on; of one whose logits are kept nothing.
        self._head = head_inputs(self._model, self.windows.tokens[0, :2])[1]
        del self._model

    def _file(self, index: int) -> Path:
        return self._cache / f"window-{index}.safetensors"

    @torch.inference_mode()
    def _keep(self, index: int, tokens: Tensor) -> None:
        inputs = head_inputs(self._model, tokens)[0].cpu().contiguous()
        replace_file(self._file(index), lambda path: save_file({"inputs": inputs}, path))

    def inputs(self, index: int) -> Tensor:
        """What the head gets for a window, [seqlen - 1, width]."""
        return load_file(self._file(index), device=self.device)["inputs"]

    def compare(self, directory: Path | None) -> Comparison:
        """Compare a model with the dense one; None compares the latter with itself, without running it again.

        Args:
            directory: a PIFA or dense checkpoint with the dense model's vocabulary.

        Raises:
            EvaluationError: if a logit is not finite, or the vocabulary is another one.
            CheckpointError: if the directory is damaged.
        """
        source = directory or self.dense
        model = None
        if directory is not None:
            model = load(directory, device=self.device)
            size = model.config.get_text_config().vocab_size
            if size != self.vocabulary:
                raise EvaluationError(
                    f"{directory}: expected the vocabulary of {self.dense}, {self.vocabulary} tokens, found {size}."
                )
            check_fit(self.windows, model.config, str(directory))
        rows = []
        with torch.inference_mode():
            for index, tokens in enumerate(self.windows.tokens):
                where = f"window {index}"
                dense = (self.inputs(index), self._head)
                inputs, head = dense if model is None else head_inputs(model, tokens)
                mine = logit_chunks(inputs, head, self.vocabulary, f"{source}: {where}")
                theirs = logit_chunks(*dense, self.vocabulary, f"{self.dense}: {where}")
                rows.append(_distances(mine, theirs, tokens[1:]))
        nll, kl, top1 = zip(*rows, strict=True)
        return Comparison(nll, kl, top1)


def _distances(
    mine: Iterator[Tensor], theirs: Iterator[Tensor], targets: Tensor
) -> tuple[float, float, float]:
    """Means of NLL, KL(theirs || mine) and same first choice, from chunks of logits [positions, vocabulary]."""
    nll, kl, same, position = 0.0, 0.0, 0, 0
    for logits, dense_logits in zip(mine, theirs, strict=True):
        expected = targets[position : position + len(logits)].to(logits.device)
        log_q, log_p = logits.log_softmax(dim=1), dense_logits.log_softmax(dim=1)
        nll -= float(log_q.gather(1, expected[:, None]).double().sum())
        kl += float((log_p.exp() * (log_p - log_q)).sum(dim=1).double().sum())
        same += int((logits.argmax(dim=1) == dense_logits.argmax(dim=1)).sum())
        position += len(logits)
    return nll / position, kl / position, same / position
