"""Fuzzes config.json, the index and the safetensors header of good checkpoints.

    python -m tests.attacks.fuzz --inputs 10000 --output tests/attacks/results/fuzz.json

An input is a good checkpoint with one of these files changed at random. It must be refused with an error of this
project, or be accepted and mean what the original means: the same tensors, bit for bit, under the same names; the
same architecture, sizes, ranks and format. Other fields of config.json may differ, because nothing in a checkpoint
vouches for them; but then transformers must build the model from them, or be said not to. Anything else is a
finding: a crash, a hang, another exception, too much memory, or such a checkpoint with another meaning.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import shutil
import signal
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pifa_vllm.checkpoint import Checkpoint, read_json
from pifa_vllm.checkpoint.sizes import Sizes, read_sizes
from pifa_vllm.errors import PifaError
from pifa_vllm.hf import check_architecture
from tests.attacks.bases import save_bases
from tests.attacks.isolation import isolated
from tests.attacks.loaders import loader
from tests.attacks.mutations import mutate
from tests.attacks.spoiling import CONFIG, INDEX, SHARD, join_shard, split_shard

TARGETS = (CONFIG, CONFIG, SHARD, SHARD, INDEX)
_BASES = ("llama", "qwen2", "qwen3", "untied")
_BATCH = 100
# Of one input; a batch has as many times more.
_SECONDS = 10


@dataclass(frozen=True)
class Finding:
    """An input that was neither refused nor harmless; `mutate` makes it again from seed and number."""

    number: int
    target: str
    what: str


@dataclass(frozen=True)
class Meaning:
    """What an accepted checkpoint must have in common with the original."""

    sizes: Sizes
    ranks: dict[str, int]
    tensors: dict[str, torch.Tensor]

    @classmethod
    def of(cls, directory: Path) -> Meaning:
        checkpoint = Checkpoint.open(directory)
        checkpoint.verify()
        sizes = read_sizes(read_json(directory / CONFIG), CONFIG)
        tensors = {name: checkpoint.shards.load(name) for name in checkpoint.shards.entries}
        return cls(sizes, checkpoint.config.ranks, tensors)

    def differs(self, other: Meaning) -> str | None:
        """Say what of the other is not the same."""
        if self.sizes != other.sizes:
            return f"sizes {other.sizes}"
        if self.ranks != other.ranks:
            return "ranks"
        if self.tensors.keys() != other.tensors.keys():
            return f"names {sorted(self.tensors.keys() ^ other.tensors.keys())[:3]}"
        for name, tensor in self.tensors.items():
            found = other.tensors[name]
            same = found.dtype == tensor.dtype and found.shape == tensor.shape
            if not same or not torch.equal(found, tensor):
                return f"tensor {name}"
        return None


class Fuzzer:
    """Makes inputs from a seed, and tries them in processes of their own.

    Args:
        root: a directory to work in.
        seed: of the inputs.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.seed = root, seed
        self.bases = save_bases(root)
        loader("transformers", self.bases["llama"])
        self.originals = {name: Meaning.of(self.bases[name]) for name in _BASES}
        self.counts: collections.Counter[str] = collections.Counter()
        self.findings: list[Finding] = []

    def run(self, inputs: int) -> None:
        number = 0
        while number < inputs:
            number = self._run_batch(number, min(number + _BATCH, inputs))

    def _run_batch(self, start: int, end: int) -> int:
        """Try some inputs; return the number of the next one, which comes early after a crash."""
        scratch, progress = self.root / "fuzzed", self.root / "progress"
        shutil.rmtree(scratch, ignore_errors=True)
        for name in _BASES:
            shutil.copytree(self.bases[name], scratch / name)
        progress.write_text("")

        def batch() -> None:
            with progress.open("a") as told:
                for number in range(start, end):
                    # Its default action ends the process, whatever code it is in.
                    signal.alarm(_SECONDS)
                    told.write(json.dumps(self._try(number, scratch)) + "\n")
                    told.flush()
            signal.alarm(0)

        ending = isolated(batch, seconds=_SECONDS * (end - start))
        lines = progress.read_text().splitlines()
        for number, (target, outcome, what) in enumerate(map(json.loads, lines), start=start):
            self.counts[f"{target}: {outcome}"] += 1
            if outcome == "finding":
                self.findings.append(Finding(number, target, what))
        if ending.outcome == "accepted":
            return end
        culprit = start + len(lines)
        target = self._draw(culprit).choice(TARGETS)
        self.counts[f"{target}: finding"] += 1
        self.findings.append(Finding(culprit, target, f"{ending.outcome}: {ending.message}"))
        return culprit + 1

    def _draw(self, number: int) -> random.Random:
        return random.Random(f"{self.seed} {number}")

    def _try(self, number: int, scratch: Path) -> tuple[str, str, str]:
        draw = self._draw(number)
        target, base = draw.choice(TARGETS), _BASES[number % len(_BASES)]
        path, original = scratch / base / target, self.bases[base] / target
        if target == SHARD:
            header, data = split_shard(original)
            changed = mutate(header, draw)
            join_shard(path, changed, data, draw.choice((None, None, len(header))))
        else:
            path.write_bytes(mutate(original.read_bytes(), draw))
        try:
            return (target, *self._judge(scratch / base, base))
        finally:
            shutil.copyfile(original, path)

    def _judge(self, directory: Path, base: str) -> tuple[str, str]:
        try:
            found = Meaning.of(directory)
        except PifaError as error:
            text = str(error)
            bad = not text.isprintable() or len(text) > 2000 or str(directory) not in text
            return ("finding", f"message {text[:300]!r}") if bad else ("refused", "")
        except Exception as error:
            return "finding", f"{type(error).__name__}: {str(error)[:300]}"
        if (what := self.originals[base].differs(found)) is not None:
            return "finding", f"accepted with another meaning: {what}"
        if (directory / CONFIG).read_bytes() == (self.bases[base] / CONFIG).read_bytes():
            return "accepted", ""
        try:
            check_architecture(Checkpoint.open(directory))
        except PifaError:
            return "refused", ""
        except Exception as error:
            return "finding", f"{type(error).__name__}: {str(error)[:300]}"
        return "accepted", ""


def fuzz(inputs: int, seed: int, root: Path) -> dict[str, Any]:
    """Try so many inputs and count how they ended."""
    torch.set_num_threads(1)
    started = time.monotonic()
    fuzzer = Fuzzer(root, seed)
    fuzzer.run(inputs)
    return {
        "inputs": inputs,
        "seed": seed,
        "outcomes": dict(sorted(fuzzer.counts.items())),
        "findings": [asdict(finding) for finding in fuzzer.findings],
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        found = fuzz(args.inputs, args.seed, Path(root))
    print(json.dumps(found, indent=2))
    if args.output is not None:
        args.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
