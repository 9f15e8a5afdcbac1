"""`pifa-vllm bench e2e`: checkpoints of one model, served by vLLM side by side."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from pifa_vllm.cli.bench_options import densities_of, plot_file


def add_e2e(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add its parser to those of `bench`."""
    e2e = kinds.add_parser(
        "e2e",
        help="dense and PIFA checkpoints served by vLLM side by side, under the same requests in turn",
        description="Serve checkpoints of one model by vLLM and send the same requests to each in turn. Without "
        "--dense and --pifa, the model is a LLaMA of random weights.",
        epilog="Options that `bench e2e` does not know go to every server, such as --enforce-eager.",
    )
    add = e2e.add_argument
    add(
        "--output",
        type=Path,
        required=True,
        metavar="JSON",
        help="results; what they have is not measured again",
    )
    add("--work-dir", type=Path, required=True, metavar="DIR", help="for random checkpoints, and logs")
    add(
        "--servers",
        default="dense-float32,pifa-float32,pifa-bfloat16",
        metavar="FORM-DTYPE,...",
        help="dense, dense-int8 (vLLM's W8A8), pifa, pifa-int8, pifa-int4, or lowrank (a PIFA checkpoint as large "
        "as plain low rank of PIFA's rank), each with a dtype, and -eager to serve it as the CPU image does; all "
        "are up at once, and compared with the first (default: %(default)s)",
    )
    add(
        "--workloads",
        default="32/32/1,32/32/8,1024/1/1",
        metavar="IN/OUT/CONCURRENCY,...",
        help="tokens per prompt, generated tokens, requests in flight (default: %(default)s)",
    )
    add("--num-prompts", type=int, metavar="N", help="requests per round (default: those in flight)")
    add("--rounds", type=int, default=5, help="(default: %(default)s)")
    add("--starts", type=int, default=1, help="of every server, to time loading (default: %(default)s)")
    add("--shape", default="1b", help="of the random model: 1b (TinyLlama's) or tiny (default: %(default)s)")
    add("--density", type=float, default=0.5, help="of the random PIFA model (default: %(default)s)")
    add("--dense", type=Path, metavar="DIR", help="a real dense model, in place of a random one")
    add("--pifa", type=Path, metavar="DIR", help="its PIFA checkpoint")
    add("--kv-cache-gib", type=float, default=1.0, help="for each server (default: %(default)s)")
    add("--plot", type=plot_file, metavar="SVG", help="draw the ratios")
    e2e.set_defaults(run=run, accepts_extra=True)


def run(args: argparse.Namespace) -> int:
    """Serve, measure and write."""
    from pifa_vllm.bench.served.e2e import e2e, parse_servers, random_models, real_models
    from pifa_vllm.bench.served.load import Workload
    from pifa_vllm.bench.served.report import memory_table, plot, speed_table
    from pifa_vllm.cli.compress import command_line
    from pifa_vllm.errors import PifaError

    servers = parse_servers(args.servers)
    workloads = [Workload.parse(x, args.num_prompts) for x in args.workloads.split(",")]
    for option in ("rounds", "starts", "num_prompts", "kv_cache_gib"):
        if (value := getattr(args, option)) is not None and value <= 0:
            raise PifaError(f"--{option.replace('_', '-')}: expected a number above 0, found {value:g}.")
    if (args.dense is None) != (args.pifa is None):
        raise PifaError("--dense and --pifa: expected both or neither, found one of them.")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    # SIGTERM ends the process without a word to the servers, unless it is made an exception.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if args.dense:
        served, model = real_models(servers, args.dense, args.pifa)
    else:
        (density,) = densities_of("--density", str(args.density))
        served, model = random_models(servers, args.shape, density, args.work_dir)
    results = e2e(
        served,
        workloads,
        args.output,
        args.work_dir,
        model=model,
        rounds=args.rounds,
        starts=args.starts,
        kv_cache_bytes=int(args.kv_cache_gib * 2**30),
        flags=args.extra,
        command=command_line(sys.argv),
        say=lambda line: print(line, flush=True),
    )
    if args.plot:
        plot(results, args.plot)
    print(speed_table(results), memory_table(results), sep="\n\n")
    return 0
