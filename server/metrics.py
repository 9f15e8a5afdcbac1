"""Our Prometheus metrics, beside vLLM's own in the same registry, so that vLLM's /metrics shows both.

Gauges and counters are prometheus_client's, which write to files that all API server processes share where vLLM
sets PROMETHEUS_MULTIPROC_DIR: `mostrecent` for what is the same in every process, `livemin` and `max` for what is
not, and counters are summed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge

if TYPE_CHECKING:
    from pifa_vllm_server.memory import Memory
    from pifa_vllm_server.model import ModelFacts


def _gauge(name: str, text: str, *labels: str, mode: str = "mostrecent") -> Gauge:
    return Gauge(name, text, labels, multiprocess_mode=mode)  # type: ignore[arg-type]  # a Literal there


class ServerMetrics:
    """The metrics of one API server process. One instance per process: the registry refuses a second."""

    def __init__(self) -> None:
        self.resident = _gauge(
            "pifa_process_resident_bytes",
            "Resident memory of the server's processes, summed by role; shared pages count in each.",
            "role",
        )
        self.device = _gauge(
            "pifa_device_memory_bytes",
            "Memory by engine and rank. part=total is the device's, or on a CPU the machine's (or the container's "
            "limit); part=weights and part=kv_cache are the rank's tensors; part=other is what else is in use on "
            "that device, by whatever process.",
            *("engine", "rank", "part"),
        )
        self.load_seconds = _gauge(
            "pifa_load_seconds", "Seconds from the start of the server until the engine was up.", mode="max"
        )
        self.ready_seconds = _gauge(
            "pifa_ready_seconds", "Seconds from the start of the server until the first token.", mode="max"
        )
        self.ready = _gauge(
            "pifa_ready", "1 while /ready answers 200 in all API server processes.", mode="livemin"
        )
        self.probes = Counter(
            "pifa_readiness_probes", "Tokens generated to see that the engine still works.", ["outcome"]
        )
        self.responses = Counter(
            "pifa_responses",
            "Answers as their clients saw them, by HTTP status: 499 if the client left before the end, 500 also "
            "for an error inside a stream. Probes, /metrics and /pifa/info are not counted.",
            ["status"],
        )
        # Series exist from the start, so that rates over them have a beginning.
        for outcome in ("ok", "failed"):
            self.probes.labels(outcome)
        for status in ("200", "401", "500", "503"):
            self.responses.labels(status)
        self.ready.set(0)

    def update(self, memory: Memory) -> None:
        """Set what changes."""
        for role, nbytes in memory.resident.items():
            self.resident.labels(role).set(nbytes)
        for (engine, rank), parts in memory.ranks.items():
            for part, nbytes in parts.items():
                self.device.labels(str(engine), str(rank), part).set(nbytes)


def describe(facts: ModelFacts) -> None:
    """Set what stays as it is while the server runs; once per process."""
    text = "Versions, always 1."
    _gauge("pifa_build_info", text, *facts.versions).labels(*facts.versions.values()).set(1)
    text = "The model, always 1: the kernel of its linear layers and the dtype it computes in."
    model = _gauge("pifa_model_info", text, "model_name", "quantization", "backend", "dtype")
    model.labels(facts.name, facts.quantization, facts.backend, facts.dtype).set(1)
    text = "Bytes of the KV cache, over all engines and ranks."
    _gauge("pifa_kv_cache_bytes", text).set(facts.kv_cache_bytes)
    text = "Tokens that fit into the KV cache."
    _gauge("pifa_kv_cache_tokens", text).set(facts.kv_cache_tokens)
    text = "Bytes that the compression frees for the KV cache: dense weights less compressed ones."
    _gauge("pifa_kv_cache_gained_bytes", text).set(facts.kv_gained_bytes)
    text = "Tokens that fit into the freed bytes, more than with the dense model in the same memory."
    _gauge("pifa_kv_cache_gained_tokens", text).set(facts.kv_gained_tokens)
    if (weights := facts.weights) is None:
        return
    text = "Kept / dense parameters of the compressible linear modules, 1 if dense."
    _gauge("pifa_density_ratio", text).set(weights.density)
    text = (
        "Bytes of the model's weights in the served dtype: form=compressed as served, form=dense what the dense "
        "model it was made from would take. Copies that tensor-parallel ranks keep are not counted."
    )
    nbytes = _gauge("pifa_weight_bytes", text, "form")
    nbytes.labels("compressed").set(weights.compressed_bytes)
    nbytes.labels("dense").set(weights.dense_bytes)
    modules = _gauge("pifa_modules", "Linear modules of the decoder layers.", "kind", "form")
    for (kind, form), count in weights.modules_by_kind().items():
        modules.labels(kind, form).set(count)
