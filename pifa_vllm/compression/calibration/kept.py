"""The model's own samples, kept in a run's work directory: drawing them again is slow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pifa_vllm.compression.calibration.samples import CalibrationSet
from pifa_vllm.compression.calibration.token_file import write_tokens
from pifa_vllm.compression.decoder import DenseModel
from pifa_vllm.compression.journal import model_fingerprint


def load_kept(
    spec: str,
    load: Callable[[str], CalibrationSet],
    *,
    staging: Path,
    model: DenseModel,
    samples: int,
    length: int,
    seed: int,
) -> CalibrationSet:
    """Load calibration tokens; of "self", those that an earlier attempt has drawn, if it has.

    Args:
        spec: the source.
        load: takes a source, which may be a file of tokens in place of "self".
        staging: the run's work directory.
        model: that samples.
        samples: sequences that are drawn.
        length: tokens per sequence.
        seed: of the sampling.

    Raises:
        CalibrationError: what `load` raises.
        CheckpointError: if the samples cannot be written.
    """
    if spec != "self":
        return load(spec)
    # Everything that the samples depend on is in the name: another model's, left by a run that was killed before it
    # had anything else to resume from, are not taken for this one's.
    kept = staging / f"self-samples-{seed}-{samples}x{length}-{model_fingerprint(model)[:16]}.safetensors"
    if kept.is_file():
        found = load(str(kept))
        # A file of this run's own, which is gone when somebody reads the record.
        found.record.pop("tokens_file", None)
        return found
    found = load(spec)
    write_tokens(kept, found.tokens, found.record)
    return found
