"""Generates the Grafana dashboards: `python deploy/grafana/dashboards.py [DIRECTORY]`.

What the panels ask for, by name of a metric, is exported by vLLM (`vllm:*`), by the server (`pifa_*`), or recorded
from these by prometheus/rules.yml (`pifa:*`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models
from panels import SOURCE, WHERE, graph, lamp, listing, number, percentiles, rate

OUTPUT = Path(__file__).parent / "dashboards"


def page(title: str, uid: str, text: str, panels: Sequence[object]) -> dashboard.Dashboard:
    """Put panels under the two choices that all dashboards share: data source and servers."""
    built = dashboard.Dashboard(title).uid(uid).description(text).tags(["pifa"]).editable()
    built.refresh("10s").time("now-30m", "now").timezone("browser").tooltip(
        models.DashboardCursorSync.CROSSHAIR
    )
    built.with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    servers = dashboard.QueryVariable("instance").label("Server").datasource(SOURCE)
    servers.query("label_values(pifa_ready, instance)").refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
    servers.multi(True).include_all(True).all_value(".*")
    servers.current(models.VariableOption(selected=True, text="All", value="$__all"))
    built.with_variable(servers)
    others = dashboard.DashboardLink("Other PIFA dashboards").type(models.DashboardLinkType.DASHBOARDS)
    built.link(others.tags(["pifa"]).keep_time(True).include_vars(True).as_dropdown(True))
    for panel in panels:
        built.with_panel(panel)  # type: ignore[arg-type]  # every panel builder is one
    return built


def overview() -> dashboard.Dashboard:
    """Throughput, latency, queue, errors."""
    return page(
        "PIFA: Overview",
        "pifa-overview",
        "Is it up, how much does it do, how long does that take?",
        [
            lamp(
                "Ready", f"min(pifa_ready{{{WHERE}}})", text="A token was generated lately, on every server."
            ),
            number("Requests", "reqps", f"sum({rate('pifa_responses_total')})", decimals=2),
            number(
                "Generation", "cps", f"sum({rate('vllm:generation_tokens_total')})", text="Tokens per second."
            ),
            number("Running", "none", f"sum(vllm:num_requests_running{{{WHERE}}})"),
            number("Waiting", "none", f"sum(vllm:num_requests_waiting{{{WHERE}}})"),
            number(
                "Errors",
                "percentunit",
                f"max(pifa:request_errors:ratio_rate5m{{{WHERE}}}) or vector(0)",
                text="Share of 5xx answers, 503 apart, over 5 minutes, of the worst server.",
            ),
            graph(
                "Tokens per second",
                "cps",
                [
                    (f"sum({rate('vllm:prompt_tokens_total')})", "prompt"),
                    (f"sum({rate('vllm:generation_tokens_total')})", "generation"),
                ],
                text="Readiness probes included: one token every 15 s on an idle server.",
            ),
            graph(
                "Requests by answer",
                "reqps",
                [(f"sum by (status) ({rate('pifa_responses_total')})", "{{status}}")],
                stacked=True,
            ),
            graph(
                "Time to first token",
                "s",
                percentiles("vllm:time_to_first_token_seconds"),
                text="From arrival, waiting included.",
                width=8,
            ),
            graph(
                "Time per output token",
                "s",
                percentiles("vllm:request_time_per_output_token_seconds"),
                text="Mean of each request after its first token.",
                width=8,
            ),
            graph("Request latency", "s", percentiles("vllm:e2e_request_latency_seconds"), width=8),
            graph(
                "Queue",
                "none",
                [
                    (f"sum(vllm:num_requests_running{{{WHERE}}})", "running"),
                    (f"sum(vllm:num_requests_waiting{{{WHERE}}})", "waiting"),
                ],
                text="In the engine. At --max-num-queued-reqs of both together, requests are turned away.",
                width=8,
            ),
            graph("Time in the queue", "s", percentiles("vllm:request_queue_time_seconds"), width=8),
            graph(
                "Turned away, by limit",
                "reqps",
                [(f"sum by (reason) ({rate('vllm:admission_rejections_total')})", "{{reason}}")],
                width=8,
                stacked=True,
            ),
        ],
    )


def memory() -> dashboard.Dashboard:
    """Weights, KV cache, resident memory."""
    parts = f'part!="total", {WHERE}'
    hits, queries = (f"sum({rate(f'vllm:prefix_cache_{what}_total')})" for what in ("hits", "queries"))
    return page(
        "PIFA: Memory",
        "pifa-memory",
        "Where the memory goes: weights, KV cache, everything else.",
        [
            number(
                "Fullest device",
                "percentunit",
                f"max(pifa:device_memory_used:ratio{{{WHERE}}})",
                text="Used share of the device's memory, or of the machine's (or container's) on a CPU.",
            ),
            number("Weights", "bytes", f'sum(pifa_device_memory_bytes{{part="weights", {WHERE}}})'),
            number("KV cache", "bytes", f"sum(pifa_kv_cache_bytes{{{WHERE}}})"),
            number("KV cache holds", "none", f"sum(pifa_kv_cache_tokens{{{WHERE}}})", text="Tokens."),
            number("KV cache used", "percentunit", f"max(pifa:kv_cache_used:ratio{{{WHERE}}})"),
            number(
                "Resident", "bytes", f"sum(pifa_process_resident_bytes{{{WHERE}}})", text="All processes."
            ),
            graph(
                "Memory of a device",
                "bytes",
                [(f"avg by (part) (pifa_device_memory_bytes{{{parts}}})", "{{part}}")],
                text="Mean over all ranks. Other is what else is in use there, by whatever process.",
                stacked=True,
            ),
            graph(
                "Used share by device",
                "percentunit",
                [
                    (
                        f"pifa:device_memory_used:ratio{{{WHERE}}}",
                        "{{instance}} engine {{engine}} rank {{rank}}",
                    )
                ],
            ),
            graph(
                "Resident memory by role",
                "bytes",
                [(f"sum by (role) (pifa_process_resident_bytes{{{WHERE}}})", "{{role}}")],
                text="Pages that processes share count in each.",
                stacked=True,
            ),
            graph(
                "KV cache in use",
                "percentunit",
                [(f"pifa:kv_cache_used:ratio{{{WHERE}}}", "{{instance}}")],
            ),
            graph(
                "Preemptions",
                "cps",
                [(f"sum by (instance) ({rate('vllm:num_preemptions_total')})", "{{instance}}")],
                text="Requests that lost their place in a full KV cache and must be computed again.",
            ),
            graph(
                "Prompt tokens found in the cache",
                "percentunit",
                [(f"{hits} / {queries}", "prefix cache")],
            ),
        ],
    )


def compression() -> dashboard.Dashboard:
    """Dense against PIFA."""
    dense, compressed = (
        f'sum(pifa_weight_bytes{{form="{form}", {WHERE}}})' for form in ("dense", "compressed")
    )
    return page(
        "PIFA: Compression",
        "pifa-compression",
        "What the compressed model saves against the dense one that it was made from.",
        [
            number(
                "Density",
                "percentunit",
                f"avg(pifa_density_ratio{{{WHERE}}})",
                text="Kept share of the parameters of the linear modules.",
                decimals=1,
            ),
            number("Dense weights", "bytes", dense, text="In the dtype that is served."),
            number("Served weights", "bytes", compressed),
            number("Saved", "percentunit", f"1 - {compressed} / {dense}", text="Of all weights.", decimals=1),
            number(
                "KV tokens gained",
                "none",
                f"sum(pifa_kv_cache_gained_tokens{{{WHERE}}})",
                text="They fit into what the weights leave free, beside those that fit with the dense model.",
            ),
            number("Start to first token", "s", f"max(pifa_ready_seconds{{{WHERE}}})"),
            graph(
                "Weights, dense and as served",
                "bytes",
                [(f"sum by (form) (pifa_weight_bytes{{{WHERE}}})", "{{form}}")],
            ),
            graph(
                "KV cache, with and without what compression freed",
                "none",
                [
                    (f"sum(pifa_kv_cache_tokens{{{WHERE}}})", "tokens"),
                    (
                        f"sum(pifa_kv_cache_tokens{{{WHERE}}}) - sum(pifa_kv_cache_gained_tokens{{{WHERE}}})",
                        "tokens beside the dense model",
                    ),
                ],
            ),
            graph(
                "Linear modules",
                "none",
                [(f"sum by (kind, form) (pifa_modules{{{WHERE}}})", "{{kind}} {{form}}")],
                text="By kind, compressed and left dense.",
                stacked=True,
            ),
            graph(
                "Seconds to load and to the first token",
                "s",
                [
                    (f"pifa_load_seconds{{{WHERE}}}", "{{instance}} engine up"),
                    (f"pifa_ready_seconds{{{WHERE}}}", "{{instance}} first token"),
                ],
            ),
            listing(
                "Model",
                f"pifa_model_info{{{WHERE}}}",
                text="Kernel and dtype of the linear layers.",
                width=12,
            ),
            listing("Versions", f"pifa_build_info{{{WHERE}}}", text="Of what is running.", width=12),
        ],
    )


def main() -> None:
    """Write one JSON file per dashboard."""
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT
    for name, built in {"overview": overview(), "memory": memory(), "compression": compression()}.items():
        text = json.dumps(built.build(), cls=JSONEncoder, sort_keys=True, indent=1) + "\n"
        (output / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
