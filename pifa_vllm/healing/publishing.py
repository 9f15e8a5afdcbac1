"""The end of a healing run: the input's shards with new numbers in them, published in one rename."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from pifa_vllm.checkpoint import Checkpoint, CheckpointWriter, PIFAConfig, check_finite, read_json
from pifa_vllm.checkpoint.schema import COEFFICIENTS
from pifa_vllm.compression.allocation import RECIPE_NAME
from pifa_vllm.compression.report.record import read_report
from pifa_vllm.compression.report.render import render_files
from pifa_vllm.compression.report.schema import CARD_NAME, REPORT_NAME, HealingReport


def publish(
    checkpoint: Checkpoint, output: Path, staging: Path, trained: dict[str, Tensor], healing: HealingReport
) -> None:
    """Write the healed checkpoint, and make it appear as the output directory.

    Everything is written anew, so that a run which was killed in the middle of this only does it again. What is
    neither trained nor told here is the input's, shard by shard.

    Args:
        checkpoint: the input.
        output: directory to create.
        staging: the run's work directory.
        trained: new values by tensor name.
        healing: what was done, for provenance, report and model card.

    Raises:
        CheckpointError: if a tensor is not finite in its storage dtype, a file cannot be written, or the output
            directory exists by now.
    """
    source = checkpoint.directory
    raw = read_json(source / "config.json")
    if raw.get("tie_word_embeddings") and "model.embed_tokens.weight" in trained:
        # Some checkpoints store both.
        trained = {**trained, "lm_head.weight": trained["model.embed_tokens.weight"]}
    writer = CheckpointWriter(output, staging / "checkpoint")
    shards: dict[str, list[str]] = {}
    for name, entry in checkpoint.shards.entries.items():
        shards.setdefault(entry.file.name, []).append(name)
    for file, names in shards.items():
        tensors = {}
        for name in names:
            entry = checkpoint.shards.entry(name)
            tensor = trained[name].to(entry.dtype) if name in trained else checkpoint.shards.load(name)
            check_finite(tensor, f"healed tensor {name} as {entry.dtype}")
            tensors[name] = tensor
        writer.write_shard(file, tensors)
    writer.copy_companions(source)
    if (source / REPORT_NAME).is_file():
        _tell(writer, source, trained, healing)
    config = checkpoint.config
    earlier = config.provenance.get("healing") or []
    told = healing.model_dump(mode="json", exclude={"history"})
    provenance = {**config.provenance, "healing": [*earlier, told]}
    writer.publish(raw, PIFAConfig(density=config.density, ranks=config.ranks, provenance=provenance))


def _tell(writer: CheckpointWriter, source: Path, trained: dict[str, Tensor], healing: HealingReport) -> None:
    """Write the input's report with this run in it, and its pages."""
    report = read_report(source)
    modules = []
    for module in report.modules:
        coefficients = trained.get(f"{module.name}.{COEFFICIENTS}")
        largest = module.max_coefficient if coefficients is None else float(coefficients.abs().max())
        modules.append(module.model_copy(update={"max_coefficient": largest}))
    healed = report.model_copy(
        update={
            "modules": modules,
            "healing": [*report.healing, healing],
            # Measured on what the input was.
            "evaluation": [x for x in report.evaluation if x.model == "dense"],
        }
    )
    if (recipe := source / RECIPE_NAME).is_file():
        # The ranks stay, and the card speaks of it.
        writer.write_text(RECIPE_NAME, recipe.read_text(encoding="utf-8"))
    card = source / CARD_NAME
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    for file, content in render_files(healed, text).items():
        writer.write_text(file, content)
