"""The end-to-end benchmark once on models too small to say anything, and everything around it without a server."""

import json
import os
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from transformers import AutoModelForCausalLM

from pifa_vllm.bench import RESULTS
from pifa_vllm.bench.served import e2e as module
from pifa_vllm.bench.served.e2e import e2e, parse_servers, random_models, real_models
from pifa_vllm.bench.served.load import Workload
from pifa_vllm.bench.served.models import SHAPES, ranks_of, save_random_model, weight_bytes
from pifa_vllm.bench.served.report import memory_table, plot, rate, ratios, speed_table
from pifa_vllm.bench.served.server import Server
from pifa_vllm.checkpoint import Checkpoint, Shards, read_json
from pifa_vllm.cli import main
from pifa_vllm.errors import PifaError

TINY = SHAPES["tiny"]


class StubServer:
    """A server that is ready at once."""

    started: ClassVar[list[tuple[str, dict[str, str], list[str]]]] = []
    up: ClassVar[list[str]] = []
    beside: ClassVar[list[list[str]]] = []

    def __init__(self, name, directory, dtype, log, *, kv_cache_bytes, flags, environment):
        self.name, self.url = name, f"http://{name}"
        self.start = {"seconds": 2.0, "weights_seconds": 0.5}
        self.kv_cache_bytes, self.environment, self.flags = kv_cache_bytes, environment, flags

    def __enter__(self):
        self.started.append((self.name, self.environment, self.flags))
        self.beside.append(list(self.up))
        self.up.append(self.name)
        return self

    def __exit__(self, *_):
        self.up.remove(self.name)

    def wait_until_ready(self):
        pass

    def cpu_seconds(self):
        return 0.0

    def memory(self):
        return {
            "peak_rss_bytes": 3_000_000,
            "engine_peak_rss_bytes": 2_000_000,
            "kv_cache_bytes": self.kv_cache_bytes,
            "kv_cache_tokens": self.kv_cache_bytes // 1000,
        }


class StoppedProcess:
    """A process that has ended."""

    returncode = 0

    def poll(self):
        return 0


@pytest.fixture
def sent(monkeypatch):
    """The rounds that were sent; PIFA answers twice as fast."""
    calls = []

    def send(url, model, workload, vocab_size, seed):
        calls.append((model, seed, workload.output_len))
        seconds = (0.2 if model.startswith("dense") else 0.1) * (1 + 0.1 * seed)
        return {
            "duration": seconds * workload.output_len,
            "input_tokens": workload.input_len * workload.num_prompts,
            "output_tokens": workload.output_len * workload.num_prompts,
            "ttft": [seconds] * workload.num_prompts,
            "tpot": [seconds] * workload.num_prompts if workload.output_len > 1 else [],
        }

    monkeypatch.setattr(module, "send", send)
    monkeypatch.setattr(module, "_SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(module, "Server", StubServer)
    for name in ("started", "up", "beside"):
        monkeypatch.setattr(StubServer, name, [])
    return calls


def measure(tmp_path, workloads, servers="dense-float32,pifa-float32", **options):
    served, model = random_models(parse_servers(servers), "tiny", 0.5, tmp_path)
    settings = {"model": model, "rounds": 3, "starts": 1, "kv_cache_bytes": 10**6, "flags": ["--seed", "1"]}
    output = tmp_path / "results.json"
    parsed = [Workload.parse(x) for x in workloads]
    return e2e(
        served, parsed, output, tmp_path, **{**settings, **options}, command="pifa-vllm bench e2e", say=print
    )


@pytest.mark.parametrize("form", ["dense", "pifa", "lowrank"])
def test_random_models_are_whole_and_load(tmp_path, form):
    save_random_model(tmp_path / form, TINY, form, 0.5, torch.bfloat16)
    found = weight_bytes(tmp_path / form, torch.float32)
    dense = sum(x.m * x.n for x in TINY.linears) * 4
    assert found["dense_linear"] == dense
    # Norms, embedding and lm_head come on top.
    assert found["total"] - found["linear"] == (5 * 128 + 2 * 512 * 128) * 4
    if form == "dense":
        assert found["linear"] == dense
        model = AutoModelForCausalLM.from_pretrained(tmp_path / form)
    else:
        checkpoint = Checkpoint.open(tmp_path / form)
        checkpoint.verify()
        kept = sum(entry.parameters for entry in checkpoint.modules.values())
        assert found["linear"] == kept * 4 + sum(4 * rank for rank in checkpoint.config.ranks.values())
        assert all(rank % 16 == 0 for rank in checkpoint.config.ranks.values())
        assert checkpoint.config.provenance == {"weights": "random"}
        import pifa_vllm  # noqa: F401  # makes transformers know the format

        model = AutoModelForCausalLM.from_pretrained(tmp_path / form)
    logits = model(torch.arange(10, 40)[None]).logits.detach().float()
    assert torch.isfinite(logits).all()
    # Random weights of any form keep the scale of the residual stream, so none is served denormals or overflows.
    assert 0.1 < float(logits.std()) < 10.0


@pytest.mark.parametrize(("form", "bits"), [("pifa-int8", 8.5), ("pifa-int4", 6.2)])
def test_random_quantized_models_load(tmp_path, form, bits):
    save_random_model(tmp_path / form, TINY, form, 0.5, torch.float32)
    checkpoint = Checkpoint.open(tmp_path / form)
    checkpoint.verify()
    numbers = sum(entry.parameters for entry in checkpoint.modules.values())
    linear = weight_bytes(tmp_path / form, torch.float32)["linear"]
    assert 8 * (linear - 4 * sum(checkpoint.config.ranks.values())) < bits * numbers
    import pifa_vllm  # noqa: F401  # makes transformers know the format

    logits = AutoModelForCausalLM.from_pretrained(tmp_path / form)(torch.arange(10, 40)[None]).logits
    assert 0.1 < float(logits.detach().std()) < 10.0


def test_the_dense_integers_are_what_vllm_knows(tmp_path):
    save_random_model(tmp_path / "int8", TINY, "dense-int8", 0.5, torch.float32)
    config = read_json(tmp_path / "int8" / "config.json")
    assert (
        QuantizationConfig.model_validate(config["quantization_config"]).quant_method == "compressed-tensors"
    )
    shards = Shards(tmp_path / "int8")
    assert shards.load("model.layers.0.mlp.up_proj.weight").dtype == torch.int8
    assert shards.load("model.layers.0.mlp.up_proj.weight_scale").shape == (176, 1)
    assert not list(tmp_path.glob("int8.*"))


def test_the_stand_in_for_plain_low_rank_has_its_number_of_parameters():
    shape = SHAPES["1b"]
    pifa, stand_in = (ranks_of(shape, form, 0.5) for form in ("pifa", "lowrank"))
    kept = sum(r * (x.m + x.n) - r * r for x in shape.linears for r in [stand_in[x.name]])
    wanted = sum(pifa[x.name] * (x.m + x.n) for x in shape.linears)
    assert kept == pytest.approx(wanted, rel=1e-3)
    assert kept <= wanted
    dense = sum(x.m * x.n for x in shape.linears)
    assert 0.499 < sum(r * (x.m + x.n) - r * r for x in shape.linears for r in [pifa[x.name]]) / dense <= 0.5
    assert dense + 2 * 32000 * 2048 == pytest.approx(1.1e9, rel=0.01)
    assert ranks_of(shape, "dense", 0.5) == {}


def test_rounds_alternate_and_what_was_measured_is_not_measured_again(tmp_path, sent):
    results = measure(tmp_path, ["16/8/2"])
    pair = ["dense-float32", "pifa-float32"]
    # Warm-ups first, then A B A B; the same prompts for both.
    assert sent == [(name, -1, 2) for name in pair] + [(name, i, 8) for i in range(3) for name in pair]
    flags = ["--max-model-len", "2048", "--seed", "1"]
    assert StubServer.started == [("dense-float32", {"VLLM_PLUGINS": ""}, flags), ("pifa-float32", {}, flags)]
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results["model"]["weights"] == "random"

    sent.clear()
    again = measure(tmp_path, ["16/8/2", "64/1/1"])
    assert len(again["cells"]) == 2
    assert {length for _, _, length in sent} == {1}
    assert len(again["servers"]["dense-float32"]["starts"]) == 2
    sent.clear()
    assert measure(tmp_path, ["16/8/2", "64/1/1"]) == again
    assert sent == []
    # Another set of servers is another measurement; another model starts a new file.
    assert len(measure(tmp_path, ["64/1/1"], servers="pifa-float32,dense-float32")["cells"]) == 3
    assert len(measure(tmp_path, ["64/1/1"], model={"name": "other"})["cells"]) == 1


def test_starts_alternate_with_no_other_server_up(tmp_path, sent, monkeypatch):
    results = measure(tmp_path, ["16/8/2"], starts=3)
    assert [name for name, _, _ in StubServer.started] == ["dense-float32", "pifa-float32"] * 3
    # Those that get the requests stay up together.
    assert StubServer.beside == [[], [], [], [], [], ["dense-float32"]]
    assert StubServer.up == []
    assert [len(server["starts"]) for server in results["servers"].values()] == [3, 3]
    # Starts alone can be asked for more of; memory stays that of servers which answered requests.
    sent.clear()
    measured = [server["memory"] for server in results["servers"].values()]
    monkeypatch.setattr(StubServer, "memory", lambda self: {})
    again = measure(tmp_path, ["16/8/2"], starts=4)
    assert sent == []
    assert [len(server["starts"]) for server in again["servers"].values()] == [4, 4]
    assert [server["memory"] for server in again["servers"].values()] == measured
    assert json.loads((tmp_path / "results.json").read_text()) == again
    assert "16 in" in speed_table(again)
    assert "| pifa-float32 |" in memory_table(again)


def test_a_server_finds_nothing_of_its_weights_in_memory(tmp_path, monkeypatch):
    forgotten = []
    monkeypatch.setattr(
        "os.posix_fadvise", lambda fd, *about: forgotten.append((os.readlink(f"/proc/self/fd/{fd}"), *about))
    )
    monkeypatch.setattr(
        "subprocess.Popen", lambda *_, **__: pytest.fail("started") if not forgotten else StoppedProcess()
    )
    for name in ("a.safetensors", "b.safetensors", "config.json"):
        (tmp_path / name).write_bytes(b"1")
    options = {"kv_cache_bytes": 1, "flags": [], "environment": {}}
    with Server("a", tmp_path, torch.float32, tmp_path / "log", **options):
        pass
    drop = (0, 0, os.POSIX_FADV_DONTNEED)
    assert forgotten == [(str(tmp_path / name), *drop) for name in ("a.safetensors", "b.safetensors")]


def test_eager_servers_compile_nothing(tmp_path, sent):
    measure(tmp_path, ["16/8/2"], servers="pifa-float32,pifa-float32-eager")
    _, (name, environment, _) = StubServer.started
    assert name == "pifa-float32-eager"
    assert environment == {"TORCHDYNAMO_DISABLE": "1", "VLLM_USE_AOT_COMPILE": "0"}
    # The variables are those of the image.
    dockerfile = (Path(__file__).parents[3] / "Dockerfile").read_text()
    assert all(f"{variable}={value}" in dockerfile for variable, value in environment.items())


def test_tables_and_plot(tmp_path, sent):
    results = measure(tmp_path, ["16/8/2", "64/1/1"])
    generation, prefill = results["cells"]
    assert rate(Workload(**generation["workload"]), generation["rounds"][0]) == pytest.approx(2 / 0.2)
    assert rate(Workload(**prefill["workload"]), prefill["rounds"][0]) == pytest.approx(64 / 0.2)
    assert ratios(generation, "pifa-float32") == pytest.approx((2.0, 2.0, 2.0))
    lines = speed_table(results).splitlines()
    assert lines[2] == "| 16 in, 8 out, 2 requests | dense-float32 |  | 9.1 | 220 | 240 | 220 | 240 | 1 |"
    assert (
        lines[5]
        == "| 64 in, 1 out, 1 request | pifa-float32 | 581.8 |  | 110 | 120 |  |  | 2.00x (2.00 to 2.00) |"
    )
    dense, pifa = memory_table(results).splitlines()[2:]
    assert dense == "| dense-float32 | 1 | 1 | 1.0000 | 1000 | 3 | 2.0 | 0.50 |"
    saved = weight_bytes(tmp_path / "random-tiny-dense-float32", torch.float32)["total"]
    saved -= weight_bytes(tmp_path / "random-tiny-pifa-0.5-float32", torch.float32)["total"]
    assert pifa.split("|")[5].strip() == str(round(1000 + saved / 1000))
    # Slower rounds must show.
    next(row for row in prefill["rounds"] if row["server"] == "pifa-float32")["duration"] *= 4
    assert ratios(prefill, "pifa-float32")[1] == pytest.approx(0.5)
    plot(results, tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--servers", "dense"], "--servers: expected different ones of dense, dense-int8, pifa, pifa-int8"),
        (["--servers", "pifa-float32,pifa-float32"], "found 'pifa-float32' in"),
        (["--servers", "pifa-int4"], "found 'pifa-int4'"),
        (["--workloads", "32/32"], "--workloads: expected INPUT/OUTPUT/CONCURRENCY"),
        (["--workloads", "32/0/1"], "found '32/0/1'"),
        (["--rounds", "0"], "--rounds: expected a number above 0, found 0"),
        (["--starts", "0"], "--starts: expected a number above 0, found 0"),
        (["--shape", "7b"], "--shape: expected one of 1b, tiny, found '7b'"),
        (["--density", "1.5"], "--density: expected numbers in (0, 1], found 1.5"),
        (["--dense", "somewhere"], "--dense and --pifa: expected both or neither"),
    ],
)
def test_refusals(options, message, tmp_path, capsys):
    assert main(["bench", "e2e", "--output", "o.json", "--work-dir", str(tmp_path / "w"), *options]) == 1
    assert message in capsys.readouterr().err


def test_real_models_have_no_stand_in(tmp_path):
    with pytest.raises(PifaError, match="found lowrank"):
        real_models(parse_servers("lowrank-float32"), tmp_path, tmp_path)


def test_dense_models_are_served_by_vllm_without_plugins(tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)

    def variables(name):
        (way,) = parse_servers(name)
        options = {"kv_cache_bytes": 1, "flags": [], "environment": way.environment}
        return Server(way.name, tmp_path, way.dtype, tmp_path / "log", **options).environment

    assert variables("dense-float32")["VLLM_PLUGINS"] == ""
    assert "VLLM_PLUGINS" not in variables("pifa-float32")


def test_a_server_that_does_not_start_shows_the_end_of_its_log(tmp_path):
    pytest.importorskip("vllm")
    options = {"kv_cache_bytes": 1, "flags": [], "environment": {}}
    server = Server("a", tmp_path / "no", torch.float32, tmp_path / "log", **options)
    with pytest.raises(PifaError, match="expected a model directory, found none"), server:
        server.wait_until_ready()


@pytest.mark.vllm
def test_real_servers_answer_the_load_generator(tmp_path, capsys):
    pytest.importorskip("vllm")
    output = tmp_path / "results.json"
    flags = ["--shape", "tiny", "--kv-cache-gib", "0.0625", "--enforce-eager", "--rounds", "1"]
    flags += ["--servers", "pifa-float32,dense-float32", "--workloads", "16/4/2"]
    assert main(["bench", "e2e", "--output", str(output), "--work-dir", str(tmp_path), *flags]) == 0
    results = json.loads(output.read_text())
    (cell,) = results["cells"]
    assert [row["server"] for row in cell["rounds"]] == ["pifa-float32", "dense-float32"]
    for row in cell["rounds"]:
        assert (row["input_tokens"], row["output_tokens"]) == (32, 8)
        assert len(row["ttft"]) == len(row["tpot"]) == 2
        assert 0.0 < min(row["ttft"]) < row["duration"]
    for name, server in results["servers"].items():
        assert server["starts"][0]["seconds"] > server["starts"][0]["weights_seconds"] > 0.0
        assert server["memory"]["kv_cache_tokens"] > 1000, name
        assert server["memory"]["peak_rss_bytes"] > server["memory"]["engine_peak_rss_bytes"] > 10**8
        log = (tmp_path / f"{name}.log").read_text()
        assert ("quantization=pifa" in log) == name.startswith("pifa")
    assert "16 in, 4 out, 2 requests" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["e2e-cpu-1b", "e2e-smollm2"])
def test_the_tables_of_the_readme_are_those_of_the_committed_results(name):
    results = json.loads((RESULTS / f"{name}.json").read_text())
    readme = (RESULTS.parent / "README.md").read_text()
    assert speed_table(results) in readme
    assert memory_table(results) in readme
    assert results["commands"]
    assert all(command.startswith("pifa-vllm bench e2e ") for command in results["commands"])
    assert results["machine"]["vllm"]
    for cell in results["cells"]:
        # Real dense and real alternation, or the ratios say nothing.
        order = [row["server"] for row in cell["rounds"]]
        assert order == cell["servers"] * (len(order) // len(cell["servers"]))
