"""The HTML report of a compression run and the model card of its output directory.

Model names, file names and the command line come from outside: the page is rendered with HTML escaping, the card
with Markdown escaping, and neither refers to anything outside itself but the papers' addresses in the card.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from pifa_vllm.compression.report.charts import HEIGHT, LEFT, RIGHT, WIDTH, line_chart, rank_columns
from pifa_vllm.compression.report.figures import (
    by_kind,
    describe_calibration,
    describe_healing,
    duration,
    size,
    summarize,
)
from pifa_vllm.compression.report.findings import findings
from pifa_vllm.compression.report.schema import CARD_NAME, HTML_NAME, REPORT_NAME, CompressionReport

# One line each, so that neither page can tell a different story of what was done.
METHODS = {
    "svd": "Truncated singular value decomposition of the weights; no calibration data.",
    "svd-llm": "Singular value decomposition after whitening by the inputs' second moments, as in SVD-LLM "
    "(arXiv 2403.07378); all modules are solved on the dense model's activations.",
    "mpifa": "MPIFA (arXiv 2501.19090): whitened singular value decomposition, then the paper's update M of both "
    "factors towards a mix of the dense and the compressed model's activations.",
    "mpifa-exact": "MPIFA (arXiv 2501.19090) with its update M solved exactly, as reduced-rank regression "
    "towards the dense model's activations, cross-fitted between two halves of the samples; with feedback, o and "
    "down are also asked to undo the error that the residual stream has by then.",
    "quantize": "The factors of a PIFA checkpoint, quantized; ranks are as they were, and gate and up "
    "are stored by pivot columns. Errors that rounding brings to later modules are corrected there.",
}
# What was added to it, by option and value.
ADDITIONS = {
    "metric": {
        "outputs": "Weights are cut in the metric of their outputs, too: what the gradients of the dense model's "
        "loss make of an error there.",
    },
    "allocation": {
        "sensitivity": "Ranks are divided among the modules by what each is worth to that loss (recipe.yaml has "
        "them); some modules stay dense.",
    },
}
# What a derived model's card takes over from its source's.
_KEPT_FRONT_MATTER = ("license", "license_name", "license_link", "language")
_HUB_CACHE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")


def render_files(report: CompressionReport, source_card: str | None = None) -> dict[str, str]:
    """Render everything that a checkpoint directory tells of its making: text by file name.

    The JSON, which the others are made from, comes last: while it is old, none of the others is relied on.

    Args:
        report: the run.
        source_card: see `render_model_card`.
    """
    return {
        CARD_NAME: render_model_card(report, source_card),
        HTML_NAME: render_html(report),
        REPORT_NAME: report.model_dump_json(indent=1) + "\n",
    }


def render_html(report: CompressionReport) -> str:
    """Render the self-contained HTML page: no scripts, no external resources."""
    environment = _environment(autoescape=True)
    environment.filters |= {"size": size, "duration": duration}
    kinds = by_kind(report)
    worst_error = max((x.output_error for x in report.modules), default=0.0)
    attention = [x for x in report.modules if ".self_attn." in x.name]
    return environment.get_template("report.html").render(
        report=report,
        method=describe_method(report),
        calibration=describe_calibration(report),
        healing=[describe_healing(x) for x in report.healing],
        findings=findings(report),
        kinds=kinds,
        total=summarize("all", report.modules) if report.modules else None,
        ranks=[
            (
                row,
                rank_columns(
                    [(x.layer, x.rank, x.density) for x in report.modules if x.kind == row.kind],
                    max(min(x.m, x.n) for x in report.modules if x.kind == row.kind),
                    200.0,
                    64.0,
                ),
            )
            for row in kinds
        ],
        error_charts=[
            (title, line_chart(_by_layer((x.kind, x.layer, x.output_error) for x in modules), worst_error))
            for title, modules in (
                ("Attention", attention),
                ("MLP", [x for x in report.modules if x not in attention]),
            )
            if modules
        ],
        flow_chart=line_chart({"flow": [(x.layer, x.flow_error) for x in report.layers]}),
        byte_bars=_byte_bars(report),
        canvas={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT},
    )


def render_model_card(report: CompressionReport, source_card: str | None = None) -> str:
    """Render README.md of the output directory, with the front matter that the Hugging Face Hub reads.

    Args:
        report: the run.
        source_card: README.md of the source directory; its licence and language are taken over.
    """
    environment = _environment(autoescape=False)
    environment.filters |= {
        "size": size,
        "duration": duration,
        "md": _escape_markdown,
        "code": _inline_code,
        "code_cell": lambda value: _inline_code(value).replace("|", "\\|"),
        "fence": _fenced,
    }
    front = _front_matter(report, source_card)
    return environment.get_template("model_card.md").render(
        report=report,
        front_matter=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        name=Path(report.model).name or report.model,
        base_model=front.get("base_model"),
        license=front.get("license"),
        method=describe_method(report),
        calibration=describe_calibration(report),
        healing=[describe_healing(x) for x in report.healing],
        findings=findings(report),
        total=summarize("all", report.modules) if report.modules else None,
    )


def describe_method(report: CompressionReport) -> str:
    """Say what was done to the weights."""
    added = [words.get(str(report.options.get(option)), "") for option, words in ADDITIONS.items()]
    if factors := report.options.get("factors"):
        kind = "floats" if factors["type"] == "float" else "integers"
        shared = f"{factors['group_size']} neighbours" if factors["group_size"] else "a row"
        added.append(
            f"The linear modules are quantized to {kind} of {factors['bits']} bits, their coefficients to "
            f"{factors['coefficient_bits']}, with a scale for {shared}; errors of rounding are fed back to what is "
            "rounded later, as in GPTQ (arXiv 2210.17323)."
        )
    return " ".join(x for x in (METHODS[report.method], *added) if x)


def _environment(autoescape: bool) -> Environment:
    return Environment(
        loader=PackageLoader("pifa_vllm.compression.report"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _by_layer(values: Iterable[tuple[str, int, float]]) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    for kind, layer, value in values:
        series.setdefault(kind, []).append((layer, value))
    return series


@dataclass(frozen=True)
class _ByteBar:
    """Bytes dense and kept of a part of the model; `share` is its dense size's, of the largest part's."""

    name: str
    dense: float
    kept: float
    share: float


def _byte_bars(report: CompressionReport) -> list[_ByteBar]:
    per_number = report.dense_bytes / max(1, report.dense_parameters)
    parts: list[tuple[str, float, float]] = []
    for row in by_kind(report):
        dense = sum(x.m * x.n for x in report.modules if x.kind == row.kind) * per_number
        parts.append((row.kind, dense, dense * row.density))
    if report.model_dense_bytes is not None and report.model_kept_bytes is not None:
        rest = report.model_kept_bytes - report.kept_bytes
        parts.append(("all else", report.model_dense_bytes - report.dense_bytes, rest))
    longest = max((dense for _, dense, _ in parts), default=0.0) or 1.0
    return [_ByteBar(name, dense, kept, dense / longest) for name, dense, kept in parts]


def _front_matter(report: CompressionReport, source_card: str | None) -> dict[str, Any]:
    source = _read_front_matter(source_card)
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    # A path says nothing reliable about the Hub, unless it lies in the Hub's own cache.
    cached = _HUB_CACHE.search(report.model.replace("\\", "/") + "/")
    if cached:
        front |= {"base_model": f"{cached[1]}/{cached[2]}", "base_model_relation": "quantized"}
    front |= {key: source[key] for key in _KEPT_FRONT_MATTER if key in source}
    form = ["pifa", "vllm"] if report.representation == "pifa" else []
    front["tags"] = [*form, "low-rank", "compressed", report.method]
    return front


def _read_front_matter(card: str | None) -> dict[str, Any]:
    match = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", card or "", re.DOTALL)
    if not match:
        return {}
    try:
        front = yaml.safe_load(match[1])
    except yaml.YAMLError:
        # Somebody else's card: a broken one costs us its licence line, not the whole run.
        return {}
    # Plain JSON types only: dates and the like would not survive into the new card as they were.
    return json.loads(json.dumps(front, default=str)) if isinstance(front, dict) else {}


def _escape_markdown(value: object) -> str:
    """Write text so that Markdown shows it as it is, on one line."""
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)


def _inline_code(value: object) -> str:
    """Write text as a code span whose fence is longer than any run of backticks in it."""
    text = " ".join(str(value).split()) or " "
    ticks = "`" * (_longest_run(text) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _fenced(value: object, language: str = "") -> str:
    """Write text as a code block whose fence is longer than any run of backticks in it."""
    text = str(value)
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
