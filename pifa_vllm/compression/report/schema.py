"""What compression_report.json holds."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

REPORT_NAME = "compression_report.json"
HTML_NAME = "compression_report.html"
CARD_NAME = "README.md"

Method = Literal["svd", "svd-llm", "mpifa", "mpifa-exact", "quantize"]
Representation = Literal["pifa", "lowrank"]
Allocation = Literal["uniform", "sensitivity"]
Metric = Literal["inputs", "outputs"]


class _Entry(BaseModel):
    # NaN and infinity are refused here: JSON cannot hold them, and a report must not hide them.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ModuleReport(_Entry):
    """How one linear module [m, n] came out.

    Attributes:
        name: full module name, "model.layers.0.self_attn.q_proj".
        layer: index of its decoder layer.
        kind: last part of the name, "q_proj".
        rank: kept rank; min(m, n) for a module that stays dense.
        density: kept / dense parameters.
        output_error: relative Frobenius error of its output against the dense weights' on the same inputs,
            ‖(W - W')X‖ / ‖WX‖; with M part of it is meant, since W' also corrects for the drift of X.
        weight_error: relative Frobenius error of the stored form, in its storage dtype, against the low-rank
            product it stands for; of quantized factors with what they correct in their inputs.
        max_coefficient: max |C| of the pivoting form; 0 for plain low rank and dense modules.
        seconds: wall time spent on it.
        expected_loss: nats per token that its rank costs the model by the dense model's gradients, in itself; None
            where they were not asked.
        dense: True if it stays dense, under its usual tensor name.
    """

    name: str
    layer: int = Field(ge=0)
    kind: str
    m: int = Field(gt=0)
    n: int = Field(gt=0)
    rank: int = Field(ge=0)
    density: float = Field(ge=0.0)
    output_error: float = Field(ge=0.0)
    weight_error: float = Field(ge=0.0)
    max_coefficient: float = Field(ge=0.0)
    seconds: float = Field(ge=0.0)
    expected_loss: float | None = None
    dense: bool = False


class LayerReport(_Entry):
    """How far the compressed flow has moved away from the dense flow after one decoder layer.

    Attributes:
        layer: index of the decoder layer.
        flow_error: ‖h_compressed - h_dense‖ / ‖h_dense‖ of the layer's output on the calibration tokens.
        seconds: wall time of the whole layer.
    """

    layer: int = Field(ge=0)
    flow_error: float = Field(ge=0.0)
    seconds: float = Field(ge=0.0)


class Evaluation(_Entry):
    """One measured figure.

    Attributes:
        model: what was measured, "dense", "svd-llm", "mpifa", ...
        metric: "perplexity" unless said otherwise.
        value: the figure.
        data: on which text or task, "heldout.txt".
        tokens: number of scored tokens, if known.
        nll: mean negative log-likelihood per scored token, in nats.
        windows: number of windows that the text was cut into.
        seqlen: tokens per window.
        special_tokens: whether the tokenizer added its own to the text.
        engine: what ran the model, "transformers" or "vllm".
        dtype: of weights and activations, "float32".
        text_sha256: of the text as UTF-8.
    """

    model: str
    metric: str = "perplexity"
    value: float
    data: str
    tokens: int | None = None
    nll: float | None = None
    windows: int | None = None
    seqlen: int | None = None
    special_tokens: bool | None = None
    engine: str | None = None
    dtype: str | None = None
    text_sha256: str | None = None

    @property
    def source(self) -> str:
        """What was scored, in words."""
        return self.data + (f", {self.windows} windows of {self.seqlen} tokens" if self.windows else "")

    @property
    def setting(self) -> str:
        """What ran the model, and how."""
        bos = "with special tokens" if self.special_tokens else None
        return ", ".join(x for x in (self.engine, self.dtype, bos) if x)


class HealingPoint(_Entry):
    """One look at the held-out text during healing.

    Attributes:
        step: steps done.
        tokens: training tokens seen.
        train: mean training loss since the look before; None at the first.
        held_out: mean loss on the held-out text. Both are KL divergences from the dense model's predictions, in
            nats per token.
    """

    step: int = Field(ge=0)
    tokens: int = Field(ge=0)
    train: float | None = None
    held_out: float


class HealingReport(_Entry):
    """One healing run.

    Attributes:
        teacher: name of the dense model's directory.
        tokens_seen: training tokens, passes over the same text counted each time.
        tokens_available: training tokens of one pass.
        held_out_tokens: tokens that judged and were not trained on.
        held_out_before: the input's held-out loss, see `HealingPoint`.
        held_out_after: the published parameters', rounded as they are stored.
        best_step: after which the published parameters were taken.
        steps: done in all.
        stopped: why the run ended early, or None.
        history: every look at the held-out text.
        calibration: record of the text.
        options: every option that bears on the result.
        seconds: wall time; a resumed run's is the sum over its parts.
        peak_rss_bytes: highest resident memory of the process.
        command: the command line.
        created: ISO 8601 date and time, UTC.
    """

    teacher: str
    tokens_seen: int
    tokens_available: int
    held_out_tokens: int
    held_out_before: float
    held_out_after: float
    best_step: int
    steps: int
    stopped: str | None = None
    history: list[HealingPoint]
    calibration: dict[str, Any] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    command: str
    created: str | None = None


class CompressionReport(_Entry):
    """One compression run.

    Parameters and bytes are of the compressible linear modules (all seven kinds of every layer); only
    the two `model_*_bytes` are of all tensors, embeddings included.

    Attributes:
        model: the source, as the user named it.
        architecture: "LlamaForCausalLM".
        density_target: what was asked for; recipes give the parameter-weighted mean of their targets.
        density: kept_parameters / dense_parameters.
        dtype: storage dtype, "float32", "bfloat16", "float16".
        calibration: record of `CalibrationSet`; empty for methods that use no data.
        options: every other option that bears on the result.
        fingerprint: of model, data and options.
        seconds: wall time; a resumed run's is the sum over its parts.
        peak_rss_bytes: highest resident memory of the process.
        versions: package name to version.
        command: the command line that reproduces the run.
        created: ISO 8601 date and time, UTC.
        healing: runs of `pifa-vllm heal` after it, in their order; the modules' errors are those before them.
    """

    format_version: Literal[1] = 1
    model: str
    architecture: str
    method: Method
    representation: Representation
    density_target: float
    density: float
    dense_parameters: int
    kept_parameters: int
    dense_bytes: int
    kept_bytes: int
    model_dense_bytes: int | None = None
    model_kept_bytes: int | None = None
    dtype: str
    calibration: dict[str, Any] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)
    fingerprint: str
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    versions: dict[str, str] = Field(default_factory=dict)
    command: str
    created: str | None = None
    modules: list[ModuleReport]
    layers: list[LayerReport]
    evaluation: list[Evaluation] = Field(default_factory=list)
    healing: list[HealingReport] = Field(default_factory=list)
