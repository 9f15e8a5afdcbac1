"""The demo's steps, each kept in the work directory and skipped when it is there."""

from __future__ import annotations

import gc
import json
import signal
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from pifa_vllm.checkpoint import FactorFormat, load_tokenizer, read_config
from pifa_vllm.checkpoint.atomic import replace_text
from pifa_vllm.compression.allocation import Recipe, uniform
from pifa_vllm.compression.calibration.samples import load_samples
from pifa_vllm.compression.calibration.token_file import write_tokens
from pifa_vllm.compression.options import FACTORS, CompressOptions
from pifa_vllm.compression.pipeline import Compression
from pifa_vllm.compression.progress import make_progress
from pifa_vllm.compression.report.schema import Method, Representation
from pifa_vllm.demo.chat import Server, ask
from pifa_vllm.demo.smollm2 import save_dense_model
from pifa_vllm.evaluate.perplexity import perplexity

_SEED = 0
_SEQLEN = 2048
_WINDOWS = 4


class Demo:
    """Compress, compare, serve.

    Args:
        work_dir: every step's result is kept here.
        density: kept / dense parameters of the linear modules.
        samples: calibration sequences, the model's own.
        length: tokens per sequence.
        text: file for the perplexities; None takes the Python language reference of this interpreter.
        factors: key of `FACTORS`: the served model is quantized.
    """

    def __init__(
        self,
        work_dir: Path,
        density: float,
        samples: int,
        length: int,
        text: Path | None,
        factors: str | None = None,
    ) -> None:
        self.work_dir = work_dir
        self.factors = factors
        self.density: Recipe = uniform(density)
        self.samples, self.length = samples, length
        self.text = text
        self.dense = work_dir / "smollm2-135m-instruct"
        self.log = work_dir / "server.log"
        # Paths and numbers are not to be coloured one by one.
        self.console = Console(highlight=False)
        work_dir.mkdir(parents=True, exist_ok=True)
        logging.disable_progress_bar()

    def compress(self) -> Path:
        """Make the dense model, the calibration tokens and the compressed checkpoints; return the served one."""
        self._heading("the dense model, SmolLM2-135M-Instruct", self.dense)
        if not self.dense.exists():
            save_dense_model(self.dense)
        tokens = self._calibration_tokens()
        self._compress_by("svd-llm", "lowrank", tokens)
        directory = self._compress_by("mpifa-exact", "pifa", tokens)
        if self.factors is None:
            return directory
        return self._compress_by("quantize", "pifa", tokens, directory, FACTORS[self.factors])

    def compare(self) -> None:
        """Print the perplexities of the dense model and the compressed ones, side by side."""
        table = Table(title=f"perplexity on {self._text_name()}, {_WINDOWS} windows of {_SEQLEN} tokens")
        for column in ("model", "kept parameters", "perplexity"):
            table.add_column(column, justify="left" if column == "model" else "right")
        kept = f"{self.density.density:.0%} of the linear modules"
        rows = [
            ("dense", "all", self.dense),
            ("svd-llm, plain low rank", kept, self._directory("svd-llm")),
            ("MPIFA", kept, self._directory("mpifa-exact")),
        ]
        if self.factors is not None:
            rows.append((f"MPIFA, {self.factors}", kept, self._directory("quantize")))
        for name, share, directory in rows:
            table.add_row(name, share, f"{self._perplexity(directory):.2f}")
        self.console.print(table)

    def server(self, directory: Path, port: int) -> Server:
        """Return a server on the checkpoint, to be entered; it starts while the models are compared."""
        self.console.print(
            f"\n[b]== a vLLM server[/b] starts on {directory}, log in {self.log}", soft_wrap=True
        )
        # SIGTERM ends the process without a word to the server, unless it is made an exception.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        return Server(directory, port, log=self.log)

    def chat(self, server: Server, prompt: str, *, forever: bool) -> None:
        """Send a chat request when the server is ready; with `forever`, return when Ctrl-C is pressed."""
        server.wait_until_ready()
        self.console.print(f"\nready at {server.url}; asking: [b]{prompt}[/b]")
        answer = ask(server.url, server.model, prompt)
        self.console.print(answer.text, markup=False)
        self.console.print(
            f"{answer.tokens} tokens, {answer.tokens_per_second:.1f} tokens/s, first token after "
            f"{answer.seconds_to_first_token:.2f} s"
        )
        if forever:
            self.console.print(f"the server goes on at {server.url}/v1 (Ctrl-C stops it)")
            server.wait()

    def _compress_by(
        self,
        method: Method,
        representation: Representation,
        tokens: Path,
        model: Path | None = None,
        factors: FactorFormat | None = None,
    ) -> Path:
        """Compress the dense model, or quantize another one at the density that it has."""
        directory = self._directory(method)
        to = "" if factors is None else f" to {self.factors}"
        self._heading(f"{method}{to} at density {self.density.density:g}", directory)
        if not directory.exists():
            options = CompressOptions(
                model=model or self.dense,
                density=self.density if model is None else uniform(read_config(model).density),
                factors=factors,
                output=directory,
                method=method,
                representation=representation,
                calibration=str(tokens),
                samples=self.samples,
                length=self.length,
                seed=_SEED,
            )
            Compression(options, make_progress(directory)).run(command="pifa-vllm demo")
        return directory

    def _calibration_tokens(self) -> Path:
        path = self.work_dir / f"self-{self.samples}x{self.length}.safetensors"
        self._heading(f"{self.samples} x {self.length} calibration tokens, the model's own samples", path)
        if not path.exists():
            calibration = load_samples(
                "self",
                load_tokenizer(self.dense),
                samples=self.samples,
                length=self.length,
                seed=_SEED,
                model_dir=self.dense,
                on_progress=make_progress().sampling,
            )
            write_tokens(path, calibration.tokens, calibration.record)
        return path

    def _directory(self, method: Method) -> Path:
        name = self.factors if method == "quantize" else method
        return self.work_dir / f"smollm2-{name}-{self.density.density:g}-{self.samples}x{self.length}"

    def _perplexity(self, directory: Path) -> float:
        cache = self.work_dir / "perplexity.json"
        figures: dict[str, Any] = json.loads(cache.read_text(encoding="utf-8")) if cache.is_file() else {}
        key = f"{directory.name} on {self._text_name()}"
        if key not in figures:
            result = perplexity(directory, self._text(), seqlen=_SEQLEN, max_windows=_WINDOWS)
            gc.collect()
            figures[key] = result.to_dict()
            replace_text(cache, json.dumps(figures, indent=1))
        return float(figures[key]["perplexity"])

    def _text_name(self) -> str:
        return self.text.name if self.text is not None else "the Python language reference"

    def _text(self) -> str:
        if self.text is not None:
            return self.text.read_text(encoding="utf-8")
        from pydoc_data import topics

        return "\n\n".join(topics.topics.values())

    def _heading(self, what: str, where: Path) -> None:
        state = "already in" if where.exists() else "making"
        self.console.print(f"\n[b]== {what}[/b], {state} {where}", soft_wrap=True)
