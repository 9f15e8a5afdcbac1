"""Options for runs on tiny models, and a display that collects what it is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pifa_vllm.compression.allocation import uniform
from pifa_vllm.compression.options import CompressOptions

SENTENCES = (
    "The quick brown fox jumps over the lazy dog. ",
    "Pack my box with five dozen liquor jugs; 12345 of them! ",
    "How vexingly quick daft zebras jump? ",
    "Sphinx of black quartz, judge my vow.\n",
)


def write_text(path: Path, characters: int = 4000) -> Path:
    """Write varied text of at least this many characters."""
    lines = (SENTENCES[i * i % 4] + str(i * 7919 % 1000) for i in range(characters // 20))
    path.write_text(" ".join(lines)[: characters + 100])
    return path


def tiny_options(model: Path, output: Path, text: Path, **overrides: object) -> CompressOptions:
    """Options of a run on a tiny model: a few hundred calibration tokens, tiles of 4."""
    options = CompressOptions(
        model=model,
        output=output,
        density=uniform(0.7),
        calibration=str(text),
        samples=6,
        length=48,
        tile=4,
        chunk_tokens=96,
    )
    return dataclasses.replace(options, **overrides)


class Recorder:
    """A `Progress` that keeps everything."""

    def __init__(self) -> None:
        self.events: list[tuple[str, object]] = []

    def sampling(self, done, total):
        self.events.append(("sampling", done))

    def sensitivity(self, done, total):
        self.events.append(("sensitivity", done))

    def layer_started(self, layer, total):
        self.events.append(("layer", layer))

    def module_done(self, module):
        self.events.append(("module", module))

    def layer_done(self, layer):
        self.events.append(("layer done", layer.layer))

    def message(self, text):
        self.events.append(("message", text))

    def summary(self, report):
        self.events.append(("summary", report))

    def named(self, kind):
        """Everything of one kind, in order."""
        return [value for name, value in self.events if name == kind]
