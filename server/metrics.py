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


def _gauge(name: str, text: str, labels: tuple[str, ...] = (), mode: str = "mostrecent") -> Gauge:
    return Gauge(name, text, labels, multiprocess_mode=mode)  # type: ignore[arg-type]  # a Literal there


class ServerMetrics:
    """The metrics of one API server process. One instance per process: the registry refuses a second."""

    def __init__(self) -> None:
        self.build = _gauge(
            "pifa_build_info", "Versions, always 1.", ("version", "vllm", "torch", "transformers", "python")
        )
        self.model = _gauge(
            "pifa_model_info",
            "The model, always 1: the kernel of its linear layers and the dtype it computes in.",
            ("model_name", "quantization", "backend", "dtype"),
        )
        self.weight_bytes = _gauge(
            "pifa_weight_bytes",
            "Bytes of the model's weights in the served dtype: form=compressed as served, form=dense what the "
            "dense model it was made from would take. Copies that tensor-parallel ranks keep are not counted.",
            ("form",),
        )
        self.density = _gauge(
            "pifa_density_ratio", "Kept / dense parameters of the compressible linear modules, 1 if dense."
        )
        self.modules = _gauge("pifa_modules", "Linear modules of the decoder layers.", ("kind", "form"))
        self.kv_bytes = _gauge("pifa_kv_cache_bytes", "Bytes of the KV cache, over all engines and ranks.")
        self.kv_tokens = _gauge("pifa_kv_cache_tokens", "Tokens that fit into the KV cache.")
        self.kv_gained_bytes = _gauge(
            "pifa_kv_cache_gained_bytes",
            "Bytes that the compression frees for the KV cache: dense weights less compressed ones.",
        )
        self.kv_gained_tokens = _gauge(
            "pifa_kv_cache_gained_tokens",
            "Tokens that fit into the freed bytes, more than with the dense model in the same memory.",
        )
        self.resident = _gauge(
            "pifa_process_resident_bytes",
            "Resident memory of the server's processes, summed by role; shared pages count in each.",
            ("role",),
        )
        self.device = _gauge(
            "pifa_device_memory_bytes",
            "Memory by engine and rank. part=total is the device's, or on a CPU the machine's (or the container's "
            "limit); part=weights and part=kv_cache are the rank's tensors; part=other is what else is in use on "
            "that device, by whatever process.",
            ("engine", "rank", "part"),
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

    def describe(self, facts: ModelFacts) -> None:
        """Set what stays as it is while the server runs."""
        self.build.labels(**facts.versions).set(1)
        self.model.labels(facts.name, facts.quantization, facts.backend, facts.dtype).set(1)
        if facts.weights is not None:
            self.weight_bytes.labels("compressed").set(facts.weights.compressed_bytes)
            self.weight_bytes.labels("dense").set(facts.weights.dense_bytes)
            self.density.set(facts.weights.density)
            for (kind, form), count in facts.weights.modules_by_kind().items():
                self.modules.labels(kind, form).set(count)
        self.kv_bytes.set(facts.kv_cache_bytes)
        self.kv_tokens.set(facts.kv_cache_tokens)
        self.kv_gained_bytes.set(facts.kv_gained_bytes)
        self.kv_gained_tokens.set(facts.kv_gained_tokens)

    def update(self, memory: Memory) -> None:
        """Set what changes."""
        for role, nbytes in memory.resident.items():
            self.resident.labels(role).set(nbytes)
        for (engine, rank), parts in memory.ranks.items():
            for part, nbytes in parts.items():
                self.device.labels(str(engine), str(rank), part).set(nbytes)
