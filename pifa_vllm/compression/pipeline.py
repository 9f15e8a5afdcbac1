"""A whole compression run: layer by layer, resumable, published atomically."""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pifa_vllm
from pifa_vllm.checkpoint import Checkpoint, CheckpointWriter, load_tokenizer
from pifa_vllm.checkpoint.atomic import make_directory
from pifa_vllm.compression.allocation import allocate, kept_parameters
from pifa_vllm.compression.calibration.kept import load_kept
from pifa_vllm.compression.calibration.samples import CalibrationSet, load_samples
from pifa_vllm.compression.decoder import DenseModel
from pifa_vllm.compression.estimate import Estimate, estimate
from pifa_vllm.compression.flows import Flows, FlowShape
from pifa_vllm.compression.journal import Clock, Journal, check_output, lock, model_fingerprint
from pifa_vllm.compression.knapsack import allocate_by_loss, recipe_of
from pifa_vllm.compression.options import CompressOptions
from pifa_vllm.compression.progress import Progress
from pifa_vllm.compression.publishing import publish
from pifa_vllm.compression.reconstruction import LayerActivations, reconstruct_layer
from pifa_vllm.compression.report.schema import CompressionReport, LayerReport
from pifa_vllm.compression.sensitivity import Sensitivity
from pifa_vllm.compression.solver import LayerSolver
from pifa_vllm.errors import PifaError


class Compression:
    """One run from a dense model directory to a checkpoint.

    While it runs, everything lies in `OUTPUT.partial`: the journal, the flows and the finished shards. The same
    command resumes there at the first unfinished layer; the output appears by one rename at the end.

    Args:
        options: of the run.
        progress: told of everything that happens.

    Raises:
        PifaError: at once, if the options, the model or the output directory rule the run out.
    """

    def __init__(self, options: CompressOptions, progress: Progress) -> None:
        self.options = options
        self.progress = progress
        self.staging = options.output.parent / (options.output.name + ".partial")
        check_output(options.output)
        _check_device(options.device)
        # The one whose factors are quantized.
        self.given = Checkpoint.open(options.model) if options.method == "quantize" else None
        if self.given is not None and self.given.config.factors is not None:
            raise PifaError(
                f"{options.model}: expected a checkpoint with factors in floating point, found quantized ones. "
                "Quantize the one that it was made from."
            )
        self.model = DenseModel(options.model, self.given)
        if options.length > self.model.max_length:
            raise PifaError(
                f"--length: expected at most the model's {self.model.max_length} positions, "
                f"found {options.length}."
            )
        self.dtype: torch.dtype = getattr(torch, options.dtype) if options.dtype else self.model.dtype
        self.linears = self.model.linears()
        options.density.check(self.linears)
        # Where the gradients decide, it is these that the estimate goes by, and the first to be refused.
        self.ranks = (
            allocate(self.linears, options.density, options.representation, options.tile)
            if self.given is None
            else dict(self.given.config.ranks)
        )
        self._expected: dict[str, float] = {}

    @property
    def kept(self) -> int:
        """Parameters that the compressible modules keep by the allocated ranks."""
        return kept_parameters(self.linears, self.ranks, self.options.representation)

    def describe_ranks(self) -> str:
        """One line for people, before the run or after its allocation."""
        dense = sum(x.m * x.n for x in self.linears)
        share = f"{self.kept:,} of {dense:,} parameters kept (density {self.kept / dense:.4f})"
        if self.options.effective_allocation == "sensitivity" and not self._expected:
            return f"ranks: chosen by the dense model's gradients, about {share}"
        line = f"ranks: {len(self.ranks)} of {len(self.linears)} modules compressed, {share}"
        if self._expected:
            line += f", {math.fsum(self._expected.values()):.3f} nats per token lost as the gradients see it"
        return line

    def estimate(self) -> Estimate:
        """Estimate memory, disk and time without starting."""
        return estimate(self.model, self.options, self.kept)

    @torch.inference_mode()
    def run(self, command: str) -> CompressionReport:
        """Compress, or go on compressing, and publish the checkpoint.

        Args:
            command: the command line, for the record.

        Raises:
            PifaError: with what was expected and found; finished layers are kept.
        """
        clock = Clock()
        make_directory(self.staging)
        with lock(self.staging):
            check_output(self.options.output)
            self._check_disk()
            self.model.check_finite()
            calibration = self._calibration()
            journal = self._journal(self._inputs(calibration.tokens))
            sensitivity = self._sensitivity(calibration.tokens, self._sensitivity_path(journal))
            clock.record(journal)
            self._compress_layers(calibration.tokens, sensitivity, journal, clock)
            clock.record(journal)
            writer = CheckpointWriter(self.options.output, self.staging / "checkpoint")
            recipe = recipe_of(self.linears, self.ranks, self.options.representation)
            report = publish(
                writer,
                self.model,
                self.options,
                self.dtype,
                journal,
                calibration.record,
                command,
                recipe,
                {} if self.given is None else self.given.config.provenance,
            )
            shutil.rmtree(self.staging, ignore_errors=True)
        self.progress.summary(report)
        return report

    def _check_disk(self) -> None:
        parent = self.options.output.parent
        taken = sum(p.stat().st_size for p in self.staging.rglob("*") if p.is_file())
        free = shutil.disk_usage(parent).free + taken
        needed = self.estimate().disk_bytes
        if free < needed:
            raise PifaError(
                f"{parent}: this run needs {needed / 2**30:.1f} GiB of disk, but {free / 2**30:.1f} GiB are free. "
                "Fewer --samples, --activation-dtype bfloat16 or --metric inputs need less."
            )

    def _calibration(self) -> CalibrationSet:
        """Draw the calibration tokens; the model's own samples are kept, since drawing them again is slow."""
        options = self.options
        drawn = {"samples": options.samples, "length": options.length, "seed": options.seed}

        def load(spec: str) -> CalibrationSet:
            return load_samples(
                spec,
                load_tokenizer(options.model),
                **drawn,
                model_dir=options.model,
                field=options.text_field,
                device=options.device,
                on_progress=self.progress.sampling,
            )

        return load_kept(options.calibration, load, staging=self.staging, model=self.model, **drawn)

    def _inputs(self, tokens: Tensor) -> dict[str, Any]:
        """Everything that the result depends on."""
        return {
            "pifa_vllm": pifa_vllm.__version__,
            "model": model_fingerprint(self.model),
            "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
            **self.options.record(),
        }

    def _journal(self, inputs: dict[str, Any]) -> Journal:
        """Take up the journal of an earlier attempt if everything that it speaks of is there."""
        path, checkpoint = self._journal_path, self.staging / "checkpoint"
        journal = Journal.load(path, inputs)
        if journal is None:
            return Journal(inputs=inputs)
        if journal.layers and not checkpoint.exists():
            # Left by a run that published its output and was killed while it tidied up.
            path.unlink()
            shutil.rmtree(self._sensitivity_path(journal), ignore_errors=True)
            return Journal(inputs=inputs)
        for layer in journal.layers:
            shard = checkpoint / shard_name(layer.layer)
            if not shard.is_file():
                raise PifaError(
                    f"{shard}: the shard of a finished layer is missing. Remove {self.staging} to start over."
                )
        return journal

    @property
    def _journal_path(self) -> Path:
        return self.staging / "journal.json"

    def _sensitivity_path(self, journal: Journal) -> Path:
        # Everything that it depends on is in the name: what was made of other inputs is not taken for this run's.
        return self.staging / f"sensitivity-{journal.fingerprint[:16]}"

    def _sensitivity(self, tokens: Tensor, directory: Path) -> Sensitivity | None:
        """Ask the dense model's gradients, where the options want them, and allocate by them."""
        options = self.options
        if not options.uses_gradients:
            return None
        for other in set(self.staging.glob("sensitivity-*")) - {directory}:
            shutil.rmtree(other, ignore_errors=True)
        sensitivity = Sensitivity(
            self.model,
            directory,
            tokens[: options.effective_gradient_samples],
            dtype=getattr(torch, options.activation_dtype),
            ridge=options.effective_ridge,
            seed=options.seed,
            device=torch.device(options.device),
            keep_outputs=options.effective_metric == "outputs",
        )
        sensitivity.measure(self.progress.sensitivity)
        losses = sensitivity.losses()
        if options.effective_allocation == "sensitivity":
            density = options.density.density
            self.ranks = allocate_by_loss(self.linears, losses, density, options.representation, options.tile)
        # The end of a curve for those that stay dense.
        self._expected = {name: float(x[self.ranks.get(name, -1)]) for name, x in losses.items()}
        self.progress.message(self.describe_ranks())
        return sensitivity

    def _compress_layers(
        self, calibration: Tensor, sensitivity: Sensitivity | None, journal: Journal, clock: Clock
    ) -> None:
        options, model = self.options, self.model
        samples, length = calibration.shape
        shape = FlowShape(samples, length, model.hidden_size, getattr(torch, options.activation_dtype))
        flows = Flows(self.staging / "flows", shape)
        writer = CheckpointWriter(options.output, self.staging / "checkpoint")

        first = len(journal.layers)
        if first and first < model.layers and not flows.complete(first):
            raise PifaError(
                f"{flows.directory}: the activations entering layer {first} are missing or incomplete, expected "
                f"{shape.nbytes} bytes per flow. Remove {self.staging} to start over."
            )
        if first:
            self.progress.message(f"resuming in {self.staging} at layer {first} of {model.layers}")
        else:
            dense, compressed = flows.entering(0)
            for sample, tokens in enumerate(calibration):
                dense[sample] = compressed[sample] = model.embed(tokens)

        for layer in range(first, model.layers):
            self.progress.layer_started(layer, model.layers)
            started = time.perf_counter()
            solver, flow_error = self._compress_layer(layer, flows, sensitivity)
            # The order is what makes a kill at any line harmless: the shard and the states are on the disk before
            # the journal says that this layer is finished, and nothing it resumes from is deleted before that.
            writer.write_shard(shard_name(layer), solver.tensors)
            flows.commit(layer + 1)
            done = LayerReport(layer=layer, flow_error=flow_error, seconds=time.perf_counter() - started)
            journal.modules += solver.reports
            journal.layers.append(done)
            clock.record(journal)
            journal.save(self._journal_path)
            flows.discard(layer)
            self.progress.layer_done(done)

    def _compress_layer(
        self, layer: int, flows: Flows, sensitivity: Sensitivity | None
    ) -> tuple[LayerSolver, float]:
        options, model = self.options, self.model
        device = torch.device(options.device)
        dense, compressed = model.layer_twice(layer, device)
        outputs = None
        if sensitivity is not None and options.effective_metric == "outputs":
            outputs = sensitivity.outputs(layer)
        solver = LayerSolver(
            options,
            layer,
            dense,
            self.ranks,
            outputs,
            self.dtype,
            self._expected,
            self.given,
            self.progress.module_done,
        )
        for name in model.norm_tensors(layer):
            solver.tensors[name] = model.load_as(name, self.dtype)
        dense_in, compressed_in = flows.entering(layer)
        dense_out, compressed_out = flows.entering(layer + 1)
        states = LayerActivations(
            dense_in,
            compressed_in,
            dense_out,
            compressed_out,
            context=flows.scratch(dense.linears["self_attn.o_proj"].in_features),
            intermediate=flows.scratch(dense.linears["mlp.down_proj"].in_features),
        )
        flow_error = reconstruct_layer(
            dense,
            compressed,
            states,
            solver,
            # Folds take turns by chunks: in one chunk of all samples, the second fold would be empty.
            chunk=max(1, min(options.chunk_tokens // options.length, options.samples // options.folds)),
            device=device,
            dense_gram=not options.uses_compressed_inputs,
            drift=options.uses_drift,
            folds=options.folds,
        )
        return solver, flow_error


def shard_name(layer: int) -> str:
    """File that holds a decoder layer's tensors."""
    return f"layer-{layer:05d}.safetensors"


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise PifaError(
            f"--device: expected a device that torch can use, found {device!r} ({reason})."
        ) from error
