"""`pifa-vllm eval`: perplexity on a text file, or zero-shot tasks."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pifa_vllm.cli import eval_tasks

if TYPE_CHECKING:
    from pifa_vllm.compression.report.schema import Evaluation
    from pifa_vllm.evaluate.protocol import Perplexity

_EPILOG = """\
The text is tokenised as one stream and cut into windows that do not overlap; a last partial window is dropped. The
figure is the mean negative log-likelihood per token, in float32, each window's first token not scored. Logits that
are not finite are an error.

--tasks runs tasks of EleutherAI's lm-eval (pip install 'pifa-vllm[tasks]'), such as hellaswag,arc_easy,piqa. Their
data comes from the Hugging Face hub. Tasks of a local file, without a network: a YAML file in --task-dir,

    task: hellaswag_local
    dataset_path: json
    dataset_kwargs: {data_files: {validation: /data/hellaswag.jsonl}}
    validation_split: validation
    output_type: multiple_choice
    doc_to_text: "{{query}}"
    doc_to_target: label                     # which of the choices is right, from 0
    doc_to_choice: choices
    metric_list: [{metric: acc}, {metric: acc_norm}]

for lines such as {"query": "...", "choices": ["...", "..."], "label": 0}.

--record adds the figure to the reports that `pifa-vllm compress` wrote there.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "eval",
        description="Measure the perplexity of a PIFA or dense model on a text, or run tasks.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, help="model directory, PIFA or dense")
    what = parser.add_mutually_exclusive_group(required=True).add_argument
    what("--text", type=Path, metavar="FILE", help="UTF-8 text file: measure perplexity")
    what("--tasks", metavar="TASK,...", help="run these tasks of lm-eval")
    add("--seqlen", type=int, default=2048, help="tokens per window (default: %(default)s)")
    add("--max-windows", type=int, metavar="N", help="score only the first N windows")
    add(
        "--engine",
        choices=("transformers", "vllm", "both"),
        default="transformers",
        help="what runs the model; both shows the difference (default: %(default)s)",
    )
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of weights and activations (default: the checkpoint's)",
    )
    add(
        "--special-tokens",
        action="store_true",
        help="let the tokenizer add its own, such as a BOS at the start of the text",
    )
    add(
        "--device",
        default="cpu",
        help="where transformers runs the model: cpu, cuda, ... (default: %(default)s)",
    )
    add("--eager", action="store_true", help="vLLM without torch.compile, which starts sooner")
    add("--threads", type=int, metavar="N", help="torch threads (vLLM binds its own)")
    add(
        "--record",
        action="store_true",
        help="add the result to the directory's compression report, its HTML page and its model card",
    )
    add("--json", action="store_true", help="print JSON, with the figure of every window or item")
    eval_tasks.add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    from pifa_vllm.cli.threads import use_threads

    method = None
    if args.record:
        from pifa_vllm.compression.report.record import read_report

        method = read_report(args.model).method  # before minutes go into a result that has no place to go
    use_threads(args.threads)
    evaluations = _perplexities(args) if args.tasks is None else eval_tasks.run(args)
    if method is not None:
        _record(args.model, [x.model_copy(update={"model": method}) for x in evaluations])
    return 0


def _perplexities(args: argparse.Namespace) -> list[Evaluation]:
    """Measure and print; the figures as a compression report has them."""
    from pifa_vllm.errors import EvaluationError

    try:
        text = args.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{args.text}: cannot be read as UTF-8 text ({error}).") from error
    results = []
    if args.engine != "vllm":
        results.append(_by_transformers(args, text))
    if args.engine != "transformers":
        from pifa_vllm.evaluate.served import served_perplexity

        results.append(
            served_perplexity(
                args.model,
                text,
                seqlen=args.seqlen,
                max_windows=args.max_windows,
                special_tokens=args.special_tokens,
                dtype=args.dtype,
                eager=args.eager,
            )
        )
    difference = results[1].nll - results[0].nll if len(results) == 2 else None
    if args.json:
        _print_json(results, difference)
    else:
        for result in results:
            print(_line(result))
        if difference is not None:
            print(f"difference of the mean NLLs (vllm - transformers): {difference:+.2e}")
    return _evaluations(args.text.name, text, results)


def _by_transformers(args: argparse.Namespace, text: str) -> Perplexity:
    from rich.console import Console
    from rich.progress import Progress

    from pifa_vllm.evaluate.perplexity import perplexity

    console = Console(file=sys.stderr)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("windows", total=None)
        return perplexity(
            args.model,
            text,
            seqlen=args.seqlen,
            max_windows=args.max_windows,
            special_tokens=args.special_tokens,
            dtype=args.dtype,
            device=args.device,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _evaluations(name: str, text: str, results: list[Perplexity]) -> list[Evaluation]:
    import hashlib

    from pifa_vllm.compression.report.schema import Evaluation

    digest = hashlib.sha256(text.encode()).hexdigest()
    return [
        Evaluation(
            model="",
            value=result.perplexity,
            data=name,
            tokens=result.scored_tokens,
            nll=result.nll,
            windows=result.windows,
            seqlen=result.seqlen,
            special_tokens=result.special_tokens,
            engine=result.engine,
            dtype=result.dtype,
            text_sha256=digest,
        )
        for result in results
    ]


def _record(directory: Path, evaluations: list[Evaluation]) -> None:
    from pifa_vllm.compression.report.record import record
    from pifa_vllm.compression.report.schema import CARD_NAME

    written = record(directory, evaluations)
    print(f"recorded in {', '.join(str(directory / file) for file in written)}", file=sys.stderr)
    if CARD_NAME not in written:
        print(f"{directory / CARD_NAME} was changed by hand and is left as it is", file=sys.stderr)


def _line(result: Perplexity) -> str:
    spread = "" if result.standard_error is None else f" ± {result.standard_error:.4f}"
    return (
        f"perplexity {result.perplexity:.4f}  (NLL {result.nll:.5f}{spread}; {result.windows} windows of "
        f"{result.seqlen} tokens; {result.engine}, {result.dtype})"
    )


def _print_json(results: list[Perplexity], difference: float | None) -> None:
    if difference is None:
        value = results[0].to_dict()
    else:
        value = {"results": [result.to_dict() for result in results], "nll_difference": difference}
    print(json.dumps(value, indent=2, allow_nan=False))
