"""Our metrics are there, beside vLLM's, and say what is true."""

from __future__ import annotations

import re
import time
from pathlib import Path

import httpx
import psutil
import pytest

pytest.importorskip("vllm")

from pifa_vllm_server.memory import resident_by_role

from pifa_vllm.checkpoint import Checkpoint, Shards, read_json
from tests.server.serving import Metrics, chat

pytestmark = pytest.mark.vllm

README = Path(__file__).parents[2] / "server" / "README.md"


@pytest.fixture(scope="module")
def metrics(server):
    return server.metrics()


def test_names_have_base_units_and_help(metrics):
    ours = [family for name, family in metrics.families.items() if name.startswith("pifa_")]
    assert len(ours) >= 18
    for family in ours:
        assert family.documentation, family.name
        assert not re.search(r"_(ms|milliseconds|kb|mb|gb|mib|gib|percent|minutes)(_|$)", family.name)
    assert any(name.startswith("vllm:") for name in metrics.families)


def test_readme_names_every_metric_and_its_labels(metrics):
    documented = {}
    for line in README.read_text().splitlines():
        if found := re.match(r"\| `(pifa_\w+)`(?: \(([^)]*)\))? \|", line):
            documented[found[1]] = set(re.findall(r"`(\w+)`", found[2] or ""))
    found = {}
    for sample in metrics.samples:
        if sample.name.startswith("pifa_") and not sample.name.endswith("_created"):
            found.setdefault(sample.name, set()).update(sample.labels)
    assert documented == found


def test_weights_are_the_checkpoints(metrics, checkpoint):
    opened = Checkpoint.open(checkpoint)
    assert metrics.total("pifa_density_ratio") == opened.config.density
    served = sum(entry.nbytes for entry in opened.shards.entries.values())
    assert metrics.total("pifa_weight_bytes", form="compressed") == served
    dense = sum(entry.nbytes for entry in Shards(checkpoint.parent / "dense").entries.values())
    assert metrics.total("pifa_weight_bytes", form="dense") == dense
    assert metrics.total("pifa_kv_cache_gained_bytes") == dense - served
    # What the worker holds: the same, and tables such as the rows of outputs and rotary angles.
    held = metrics.total("pifa_device_memory_bytes", part="weights")
    assert served <= held < 1.2 * served


def test_modules_are_counted_by_kind(metrics):
    assert metrics.total("pifa_modules", kind="k_proj", form="dense") == 2
    assert metrics.total("pifa_modules", form="compressed") == 12
    assert {"kind": "k_proj", "form": "compressed"} not in metrics.labels("pifa_modules")


def test_kv_cache_is_vllms(metrics, checkpoint):
    (labels,) = metrics.labels("vllm:cache_config_info")
    tokens = int(labels["num_gpu_blocks"]) * int(labels["block_size"])
    assert metrics.total("pifa_kv_cache_tokens") == tokens
    config = read_json(checkpoint / "config.json")
    heads, size, layers = (config[k] for k in ("num_key_value_heads", "head_dim", "num_hidden_layers"))
    per_token = 2 * heads * size * 4 * layers
    assert metrics.total("pifa_kv_cache_bytes") == tokens * per_token
    gained = metrics.total("pifa_kv_cache_gained_bytes") // per_token
    assert metrics.total("pifa_kv_cache_gained_tokens") == gained


def test_model_and_versions(metrics):
    import torch
    import vllm

    (model,) = metrics.labels("pifa_model_info")
    assert model["model_name"] == "tiny"
    assert (model["quantization"], model["dtype"]) == ("pifa", "float32")
    assert model["backend"] in ("cpu-native", "torch")
    (build,) = metrics.labels("pifa_build_info")
    assert (build["vllm"], build["torch"]) == (vllm.__version__, torch.__version__)


def test_memory_is_that_of_the_processes(server):
    metrics = server.metrics()
    measured = server.resident()
    assert metrics.total("pifa_process_resident_bytes") == pytest.approx(measured, rel=0.1)
    assert metrics.total("pifa_process_resident_bytes", role="api") > 100e6
    # With few cores the engine's process is the worker.
    computing = sum(metrics.total("pifa_process_resident_bytes", role=r) for r in ("engine", "worker"))
    assert computing > 100e6
    total = metrics.total("pifa_device_memory_bytes", part="total")
    assert total <= psutil.virtual_memory().total
    parts = [metrics.total("pifa_device_memory_bytes", part=p) for p in ("weights", "kv_cache", "other")]
    assert computing / 2 < sum(parts) <= total
    assert parts[1] <= 1 << 30


def test_tokens_are_those_that_were_asked_for(server):
    def tokens(metrics: Metrics) -> tuple[float, float]:
        # A probe is one prompt token and one generated token.
        probes = metrics.total("pifa_readiness_probes_total")
        names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
        prompt, generated = (metrics.total(name) - probes for name in names)
        return prompt, generated

    before = tokens(server.metrics())
    usage = [chat(server.url, max_tokens=n, ignore_eos=True).json()["usage"] for n in (1, 5, 9)]
    after = tokens(server.metrics())
    assert sum(u["completion_tokens"] for u in usage) == 15
    # A probe may be between its tokens and its count.
    assert after[0] - before[0] == pytest.approx(sum(u["prompt_tokens"] for u in usage), abs=1)
    assert after[1] - before[1] == pytest.approx(15, abs=1)


def test_vllms_metrics_are_unchanged(metrics):
    for name in ("vllm:num_requests_running", "vllm:time_to_first_token_seconds", "vllm:generation_tokens"):
        assert name in metrics.families


def test_seconds_are_those_since_the_start(server):
    metrics = server.metrics()
    age = time.time() - psutil.Process(server.process.pid).create_time()
    load, ready = metrics.total("pifa_load_seconds"), metrics.total("pifa_ready_seconds")
    assert 1 < load <= ready < age


def test_roles_of_processes():
    resident = resident_by_role(set())
    assert set(resident) == {"api", "engine", "worker", "other"}
    assert resident["api"] > 0


def test_info_tells_model_ranks_provenance_and_versions(server, checkpoint):
    info = httpx.get(f"{server.url}/pifa/info").json()
    ranks = {m["name"]: m["rank"] for m in info["modules"] if m["rank"] is not None}
    assert ranks == Checkpoint.open(checkpoint).config.ranks
    assert len(info["modules"]) == 14
    assert info["model"] == "tiny"
    assert {"version", "vllm", "torch"} <= set(info["versions"])
    assert info["settings"]["probe_interval"] == 2
    assert info["provenance"] == {}
    assert str(checkpoint) not in str(info)


def test_readme_names_every_setting_and_its_default():
    from pifa_vllm_server.settings import ServerSettings

    documented = {}
    for line in README.read_text().splitlines():
        if found := re.match(r"\| `(\w+)` \| (\S+) \| (.*) \|$", line):
            documented[found[1]] = (found[2], found[3])
    fields = ServerSettings.model_fields
    assert documented == {name: (str(f.default), f.description) for name, f in fields.items()}


def test_help_names_the_defaults_that_vllm_gets(capsys):
    from pifa_vllm_server.launch import DEFAULTS, MAX_N, QUEUE

    from pifa_vllm.cli import main

    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name, value in DEFAULTS.items():
        flag = f"--{name.replace('_', '-')}"
        assert (flag if value is True else f"{flag} {value}") in said
    assert "=".join(MAX_N) in said
    assert QUEUE == 2
    assert "--max-num-queued-reqs of twice what runs at most" in said
