"""What the Triton kernels compile to for NVIDIA GPUs, which needs no GPU: registers, memory, instructions.

Triton's wheel brings ptxas and cuobjdump. The kernels are compiled for every entry of the tables in
`pifa_vllm.ops.triton.configs`, and the machine code is read for what decides their speed: no registers spilled,
shared memory within the chip's limit, 128-bit loads, tensor-core instructions.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from pifa_vllm.checkpoint.atomic import replace_text
from pifa_vllm.errors import PifaError
from pifa_vllm.ops.triton import configs, decode, partials, prefill, quantized

_MODULES = {"decode": decode, "partials": partials, "prefill": prefill, "quantized": quantized}
# What `--factors` makes: the kernel, the kind of its numbers, and how many share a scale.
QUANTIZED = (
    ("pivot_kernel", "int8", 128),
    ("pivot_kernel", "int8", 32),
    ("pivot_kernel", "int4", 32),
    ("pivot_kernel", "fp8", 0),
    ("output_kernel", "int8", 128),
    ("output_kernel", "int8", 32),
    ("output_kernel", "fp8", 0),
)
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Chip:
    """Limits of a multiprocessor, from the CUDA C++ Programming Guide's table of compute capabilities.

    Attributes:
        arch: compute capability times ten.
        shared_per_program: bytes of shared memory that one block can have.
        shared: bytes of shared memory that all blocks share; each takes 1 KiB more than it asks for.
        threads: resident threads.
    """

    arch: int
    shared_per_program: int
    shared: int
    threads: int


CHIPS = {
    "sm_80": Chip(80, 163 * 1024, 164 * 1024, 2048),
    "sm_89": Chip(89, 99 * 1024, 100 * 1024, 1536),
    "sm_90": Chip(90, 227 * 1024, 228 * 1024, 2048),
    "sm_100": Chip(100, 227 * 1024, 228 * 1024, 2048),
}


@dataclass(frozen=True)
class Variant:
    """One kernel as the tables have it compiled; `splits` and `tokens` are those of its plan."""

    family: str
    dtype: str
    module: str
    kernel: str
    tokens: int
    rows: int
    k: int
    splits: int
    options: dict[str, Any]


@dataclass(frozen=True)
class Figures:
    """What the machine code shows.

    Attributes:
        registers: per thread.
        spilled: instructions that move registers to or from local memory.
        shared: bytes per program.
        programs: programs resident on one multiprocessor.
        loads_128: instructions that load 128 bits per thread from global memory.
        tensor_core: instructions per kind.
    """

    registers: int
    spilled: int
    shared: int
    programs: int
    loads_128: int
    tensor_core: dict[str, int]


def variants(family: str, dtype: str) -> Iterator[Variant]:
    """List the kernels that the tables can ask for."""
    bits = 32 if dtype == "float32" else 16
    device = configs.Device(family, 1)

    for tokens, tiles in configs.DECODE[bits].items():
        for tile, splits in itertools.product(tiles, configs.SPLITS):
            plan = configs.DecodePlan(tokens, splits, tile, tile, device.precision, device.overlap)
            shape = (tokens, tile.rows, tile.k, splits)
            # Of the splits the first kernel only sees, by the dtype of its output, whether there are any.
            if splits <= 2:
                yield Variant(family, dtype, "decode", "pivot_kernel", *shape, decode.pivot_options(plan))
            if splits == 1 or plan.sums_while_loading:
                yield Variant(family, dtype, "decode", "output_kernel", *shape, decode.output_options(plan))
    for wide in configs.PREFILL[family][bits]:
        options = prefill.options(wide, device.precision)
        for kernel, splits in (("pivot_kernel", 1), ("pivot_kernel", 2), ("output_kernel", 1)):
            split = {"SPLIT": splits > 1} if kernel == "pivot_kernel" else {}
            shape = (wide.tokens, wide.rows, wide.k, splits)
            yield Variant(family, dtype, "prefill", kernel, *shape, options | split)
    # float16 is left out: nobody has a reason to serve quantized factors in it.
    formats = QUANTIZED if dtype != "float16" else ()
    for (tokens, tile), (kernel, kind, group) in itertools.product(configs.QUANTIZED[bits].items(), formats):
        rounded = configs.QuantizedPlan(tokens, tile, tile, precision=device.precision)
        options = quantized.options(rounded, tile, kind, group)
        for splits in (1, 2) if kernel == "pivot_kernel" else (1,):
            split = {"SPLIT": splits > 1} if kernel == "pivot_kernel" else {}
            shape = (tokens, tile.rows, tile.k, splits)
            yield Variant(family, dtype, "quantized", kernel, *shape, options | split)
    for splits, overlap in itertools.product(configs.SPLITS[1:], sorted({False, device.overlap})):
        options = partials.sum_options(splits, overlap=overlap)
        shape = (options["BLOCK_T"], options["BLOCK_P"], 1, splits)
        yield Variant(family, dtype, "partials", "sum_kernel", *shape, options)


def compile_variant(variant: Variant) -> Figures:
    """Compile one kernel and read its machine code.

    Raises:
        PifaError: if Triton's tools cannot read the machine code.
    """
    chip = CHIPS[variant.family]
    source, options = source_of(getattr(_MODULES[variant.module], variant.kernel), variant)
    compiled = triton.compile(source, target=GPUTarget("cuda", chip.arch, 32), options=options)
    sass, usage = _disassemble(compiled.asm["cubin"])
    registers = int(usage["REG"])
    shared: int = compiled.metadata.shared
    threads = 32 * variant.options["num_warps"]
    programs = min(
        65536 // (-(-registers // 8) * 8 * threads), chip.shared // (shared + 1024), chip.threads // threads
    )
    tensor_core = re.findall(r"\b(HMMA|HGMMA|UTCHMMA|UTCOMMA|UTCQMMA|UTC\w*MMA)\b", sass)
    return Figures(
        registers,
        len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        shared,
        programs,
        len(re.findall(r"\b(?:LDG|LDGSTS)\.[\w.]*128\b", sass)),
        {kind: tensor_core.count(kind) for kind in sorted(set(tensor_core))},
    )


def complaints(variant: Variant, figures: Figures) -> list[str]:
    """Say what of a compiled kernel is not as it should be; nothing if all is."""
    chip, found = CHIPS[variant.family], []
    if figures.spilled:
        found.append(f"{figures.spilled} instructions spill registers")
    if figures.shared > chip.shared_per_program:
        found.append(f"shared memory of {figures.shared} bytes, at most {chip.shared_per_program}")
    if not figures.loads_128:
        found.append("no 128-bit loads")
    if variant.module != "partials" and variant.tokens > 1 and not figures.tensor_core:
        found.append("no tensor-core instructions")
    return found


def source_hash(variant: Variant) -> str:
    """Hash what a variant's figures depend on: the source of its kernel and of what that calls, and its options."""
    kernel = getattr(_MODULES[variant.module], variant.kernel)
    sources: dict[str, str] = {}
    todo = [kernel]
    while todo:
        function = todo.pop()
        sources[function.__name__] = function.src
        names = (function.fn.__globals__.get(name) for name in function.fn.__code__.co_names)
        todo += [x for x in names if isinstance(x, JITFunction) and x.__name__ not in sources]
    parts = [sorted(sources.items()), list(kernel.do_not_specialize), variant]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def cubins(
    output: Path,
    *,
    families: Sequence[str] = tuple(CHIPS),
    dtypes: Sequence[str] = tuple(DTYPES),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Compile the kernels of these families and dtypes and write their figures as JSON.

    Args:
        output: JSON file, written after every kernel; figures of kernels whose source is the same are kept.
        families: keys of `CHIPS`.
        dtypes: keys of `DTYPES`.
        say: receives one line per kernel.

    Raises:
        PifaError: if a kernel spills registers, needs too much memory, or lacks the instructions it should have;
            the figures are written all the same.
    """
    results: dict[str, Any] = {"triton": triton.__version__, "kernels": []}
    if output.exists():
        before = json.loads(output.read_text())
        if before["triton"] == triton.__version__:
            results = before
    every = [v for family, dtype in itertools.product(CHIPS, DTYPES) for v in variants(family, dtype)]
    wanted = {source_hash(variant): variant for variant in every}
    rows = {row["source"]: row for row in results["kernels"] if row["source"] in wanted}
    for hashed, variant in wanted.items():
        if hashed in rows or variant.family not in families or variant.dtype not in dtypes:
            continue
        figures = compile_variant(variant)
        row = {**asdict(variant), **asdict(figures)}
        del row["options"]
        row |= {"warps": variant.options["num_warps"], "complaints": complaints(variant, figures)}
        rows[hashed] = row | {"source": hashed}
        say(" ".join(f"{k}={v}" for k, v in row.items()))
        results["kernels"] = [rows[x] for x in wanted if x in rows]
        # A line per kernel.
        replace_text(output, json.dumps(results).replace('{"family"', '\n{"family"') + "\n")
    bad = [f"{_name(wanted[x])}: {text}" for x in rows for text in rows[x]["complaints"]]
    if bad:
        raise PifaError(f"{output}: the compiled kernels are not as they should be. {'; '.join(bad)}.")
    return results


def _name(variant: Variant) -> str:
    return (
        f"{variant.module}.{variant.kernel} ({variant.family}, {variant.dtype}, {variant.tokens} tokens, "
        f"{variant.rows} x {variant.k}, {variant.splits} splits)"
    )


def source_of(kernel: Any, variant: Variant) -> tuple[ASTSource, dict[str, Any]]:
    """Build what Triton compiles at a launch for three shards whose sizes are multiples of 16, and its options."""
    constants = {name: value for name, value in variant.options.items() if name in kernel.arg_names}
    options = {name: value for name, value in variant.options.items() if name not in constants}
    number = "*" + DTYPES[variant.dtype]
    pointers = dict.fromkeys(("x", "pivot_weight", "coefficients", "bias", "y", "y_p"), number)
    pointers |= {
        "partials": "*fp32",
        "out_rows": "*i32",
        "pivot_scale": "*fp16",
        "coefficient_scale": "*fp16",
    }
    if variant.module == "quantized":
        stored = "*u8" if variant.options["KIND"] == "int4" else "*i8"
        pointers |= {"pivot_weight": stored, "coefficients": stored}
    # Where n was split, y_p stands for its float32 parts, except for the kernel that sums them.
    if variant.splits > 1 and variant.module != "partials":
        pointers["y_p"] = "*fp32"
    aligned = [["tt.divisibility", 16]]
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("ranks", "out_features", "widths", "scale_widths"):
            signature[name] = ("i32",) * 3
            attributes |= {(i, shard): aligned for shard in range(3)}
        else:
            signature[name] = pointers.get(name, "i32")
            if name not in kernel.do_not_specialize:
                attributes[(i,)] = aligned
    return ASTSource(kernel, signature, constants, attributes), options


def _disassemble(cubin: bytes) -> tuple[str, dict[str, str]]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        texts = []
        for option in ("-sass", "-res-usage"):
            try:
                command = [str(tool), option, file.name]
                texts.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            except (OSError, subprocess.CalledProcessError) as error:
                raise PifaError(f"{tool}: expected it to disassemble a kernel, found: {error}.") from error
    return texts[0], dict(re.findall(r"\b([A-Z]+):(\d+)", texts[1]))
