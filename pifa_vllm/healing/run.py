"""A whole healing run: checked, trained, resumable, published atomically."""

from __future__ import annotations

import hashlib
import math
import shutil
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime

import pifa_vllm
from pifa_vllm.checkpoint import Checkpoint
from pifa_vllm.checkpoint.atomic import make_directory
from pifa_vllm.compression.decoder import DenseModel
from pifa_vllm.compression.journal import Clock, check_output, lock, model_fingerprint
from pifa_vllm.compression.report.figures import duration
from pifa_vllm.compression.report.schema import HealingPoint, HealingReport
from pifa_vllm.errors import PifaError
from pifa_vllm.healing.distillation import Distillation, rate
from pifa_vllm.healing.options import HealOptions
from pifa_vllm.healing.parent import check_parent
from pifa_vllm.healing.publishing import publish
from pifa_vllm.healing.state import State, StateFiles
from pifa_vllm.healing.text import Text, batch_indices, load_text

# A loss this many times the input's is no bad batch but a learning rate that the model does not bear.
_DIVERGED = 3.0
# Steps whose median tells a run that diverges.
_RECENT = 5
# Looks at the held-out text, none better than an earlier one of the trained model, before a run ends early; but not
# while they get better from one to the next. Where little is lost, the rate's peak costs more than its fall gives
# back for many looks, and for the same reason the input does not count.
_PATIENCE = 5
# Seconds without a line, where looks are far apart.
_SILENCE = 60.0


class Healing:
    """One run from a PIFA directory to a better one with the same ranks and pivots.

    While it runs, everything lies in `OUTPUT.partial`. The same command resumes there at the last look at the
    held-out text; the output appears by one rename at the end.

    Args:
        options: of the run.
        say: told of what happens, a line at a time.

    Raises:
        CheckpointError: at once, if one of the models is damaged, or `model` is no PIFA checkpoint.
        UnsupportedModelError: if the teacher is not the model that the checkpoint was made from.
        PifaError: if the output directory exists, or a sequence is longer than the model takes.
    """

    def __init__(self, options: HealOptions, say: Callable[[str], None]) -> None:
        self.options = options
        self.say = say
        self.staging = options.output.parent / (options.output.name + ".partial")
        check_output(options.output)
        self.checkpoint = Checkpoint.open(options.model)
        if self.checkpoint.config.factors is not None:
            raise PifaError(
                f"{options.model}: expected a checkpoint with factors in floating point, found quantized ones. "
                "Heal the one that it was made from, and quantize that (`pifa-vllm quantize`)."
            )
        self.teacher = DenseModel(options.teacher)
        if options.length > self.teacher.max_length:
            raise PifaError(
                f"--length: expected at most the model's {self.teacher.max_length} positions, "
                f"found {options.length}."
            )
        check_parent(self.checkpoint, self.teacher)

    def run(self, command: str) -> HealingReport:
        """Heal, or go on healing, and publish the checkpoint.

        Args:
            command: the command line, for the record.

        Raises:
            PifaError: with what was expected and found. If the held-out text is not predicted better than by the
                input, nothing is published.
        """
        clock = Clock()
        make_directory(self.staging)
        with lock(self.staging):
            check_output(self.options.output)
            text = load_text(self.options, self.teacher, self.staging, self._sampling)
            distillation, files = Distillation(self.options), StateFiles(self.staging)
            inputs = self._inputs(text)
            state = files.load(inputs, distillation.parameters, distillation.optimizer)
            if state is None:
                state = State(inputs=inputs)
            else:
                self.say(f"resuming in {self.staging} at step {state.step} of {self.options.steps}")
            self._train(distillation, files, state, text, clock)
            after = self._settle(distillation, files, state, text)
            clock.record(state)
            report = self._report(state, text, after, command)
            publish(self.checkpoint, self.options.output, self.staging, files.load_best(), report)
            shutil.rmtree(self.staging, ignore_errors=True)
        self.say(
            f"held-out divergence {report.held_out_before:.4f} -> {report.held_out_after:.4f} nats per token, "
            f"{report.tokens_seen:,} tokens seen in {duration(report.seconds)}: {self.options.output}"
        )
        return report

    def _sampling(self, done: int, total: int) -> None:
        if done >= total:
            self.say(f"sampled {total:,} tokens from the dense model")

    def _inputs(self, text: Text) -> dict[str, object]:
        """Everything that the result depends on."""
        tokens = [hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in (text.train, text.held_out)]
        return {
            "pifa_vllm": pifa_vllm.__version__,
            "model": model_fingerprint(self.checkpoint),
            "teacher": model_fingerprint(self.teacher),
            "train": tokens[0],
            "held_out": tokens[1],
            "options": self.options.record(),
        }

    def _train(
        self, distillation: Distillation, files: StateFiles, state: State, text: Text, clock: Clock
    ) -> None:
        """Train to the last step, or to where it makes no sense to go on."""
        options, started, first = self.options, time.perf_counter(), state.step
        losses: list[float] = []
        if not state.history:
            # The model as it is: what everything later is measured by.
            self._look(distillation, state, text, 0, losses, files)
            self.say(_line(state, options.steps))
        said = time.perf_counter()
        for step in range(first, options.steps):
            if state.stopped is not None:
                break
            indices = batch_indices(step, options.batch, len(text.train), options.seed)
            losses.append(distillation.step(text.train, indices, rate(step, options.steps, options.warmup)))
            done = step + 1
            # One sequence may well lose three times the mean, several in a row do not.
            level = statistics.median(losses[-_RECENT:]) if math.isfinite(losses[-1]) else losses[-1]
            if (len(losses) >= _RECENT or not math.isfinite(level)) and _risen(level, state):
                state.stopped = f"diverged at step {done} (training loss {level:.3g}); try a smaller --lr"
            elif done % options.interval == 0 or done == options.steps:
                self._look(distillation, state, text, done, losses, files)
                losses.clear()
            else:
                if time.perf_counter() - said > _SILENCE:
                    said = time.perf_counter()
                    self.say(f"step {done}/{options.steps}: training loss {losses[-1]:.4f}")
                continue
            # Together with the parameters of this moment; the best ones are on the disk before.
            clock.record(state)
            files.save(state, distillation.parameters, distillation.optimizer)
            left = (time.perf_counter() - started) / (done - first) * (options.steps - done)
            self.say(_line(state, options.steps) + f", {duration(left)} left")
            said = time.perf_counter()
        if state.stopped is not None:
            self.say(f"stopped early, the best state is kept: {state.stopped}")

    def _look(
        self,
        distillation: Distillation,
        state: State,
        text: Text,
        step: int,
        losses: list[float],
        files: StateFiles,
    ) -> None:
        """Judge by the held-out text, and keep the parameters if they are the best."""
        held_out = distillation.held_out(text.held_out)
        if not state.history and not math.isfinite(held_out):
            raise PifaError(
                f"{self.options.model}: expected a model with a finite loss, found {held_out} on the held-out text."
            )
        if state.history and _risen(held_out, state):
            state.stopped = f"diverged by step {step} (held-out loss {held_out:.3g}); try a smaller --lr"
            return
        if not state.history or held_out < state.best.held_out:
            files.save_best(distillation.parameters)
        tokens = step * self.options.batch * self.options.length
        train = math.fsum(losses) / len(losses) if losses else None
        state.history.append(HealingPoint(step=step, tokens=tokens, train=train, held_out=held_out))
        trained = [point.held_out for point in state.history[1:]]
        late = bool(trained) and trained.index(min(trained)) < len(trained) - _PATIENCE
        if late and trained[-1] >= trained[-2]:
            state.stopped = f"no better on held-out text for {_PATIENCE} looks, at step {step}"

    def _settle(self, distillation: Distillation, files: StateFiles, state: State, text: Text) -> float:
        """Measure the best parameters, rounded as they will be stored, on the held-out text.

        Raises:
            PifaError: if that is no better than the input. There is nothing to resume then.
        """
        shards = self.checkpoint.shards
        distillation.replace({x: tensor.to(shards.entry(x).dtype) for x, tensor in files.load_best().items()})
        before, after = state.history[0].held_out, distillation.held_out(text.held_out)
        if state.best.step == 0 or not after < before:
            shutil.rmtree(self.staging, ignore_errors=True)
            found = after if state.best.step else state.history[-1].held_out
            why = f" ({state.stopped})" if state.stopped else ""
            raise PifaError(
                f"{self.options.output}: not published. Expected a held-out loss below the input's {before:.4f}, "
                f"found {found:.4f}{why}. Another --lr, more text or more --tokens may help."
            )
        return after

    def _report(self, state: State, text: Text, after: float, command: str) -> HealingReport:
        options = self.options
        return HealingReport(
            teacher=options.teacher.name,
            tokens_seen=state.history[-1].tokens,
            tokens_available=text.train.numel(),
            held_out_tokens=text.held_out.numel(),
            held_out_before=state.history[0].held_out,
            held_out_after=after,
            best_step=state.best.step,
            steps=state.step,
            stopped=state.stopped,
            history=state.history,
            calibration=text.record,
            options=options.record(),
            seconds=state.seconds,
            cpu_seconds=state.cpu_seconds,
            peak_rss_bytes=state.peak_rss_bytes,
            command=command,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def _risen(loss: float, state: State) -> bool:
    # Not a number compares as False.
    return not loss < _DIVERGED * state.history[0].held_out


def _line(state: State, steps: int) -> str:
    point = state.history[-1]
    train = "" if point.train is None else f"training loss {point.train:.4f}, "
    return f"step {point.step}/{steps}: {train}held-out loss {point.held_out:.4f} (best {state.best.held_out:.4f})"
