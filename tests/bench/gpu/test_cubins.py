"""The kernels compile for GPUs that are not here, and the committed figures are those of their source."""

import json

import pytest
import triton

from pifa_vllm.bench import RESULTS
from pifa_vllm.bench.gpu import cubins
from pifa_vllm.errors import PifaError
from pifa_vllm.ops.triton import decode, prefill

COMMITTED = json.loads((RESULTS / "cubins.json").read_text())


@pytest.mark.parametrize("family", cubins.CHIPS)
@pytest.mark.parametrize("dtype", cubins.DTYPES)
def test_committed_figures_are_complete_and_without_complaints(family, dtype):
    rows = [row for row in COMMITTED["kernels"] if (row["family"], row["dtype"]) == (family, dtype)]
    wanted = [cubins.source_hash(variant) for variant in cubins.variants(family, dtype)]
    assert [row["source"] for row in rows] == wanted, "run `pifa-vllm bench cubins`"
    for row in rows:
        assert row["spilled"] == 0
        assert row["shared"] <= cubins.CHIPS[family].shared_per_program
        assert row["programs"] >= 1
        assert row["loads_128"] > 0
        assert not row["complaints"]
        assert row["tensor_core"] or row["tokens"] == 1 or row["module"] == "partials"


def variant(family, dtype, module, kernel, tokens, splits=1):
    return next(
        v
        for v in cubins.variants(family, dtype)
        if (v.module, v.kernel, v.tokens, v.splits) == (module, kernel, tokens, splits)
    )


@pytest.mark.parametrize(
    ("family", "dtype", "module", "kernel", "tokens", "splits", "instruction"),
    [
        ("sm_80", "bfloat16", "decode", "pivot_kernel", 1, 2, None),
        ("sm_80", "float16", "prefill", "pivot_kernel", 64, 2, "HMMA"),
        ("sm_89", "bfloat16", "decode", "output_kernel", 1, 8, None),
        ("sm_89", "float32", "prefill", "output_kernel", 64, 1, "HMMA"),
        ("sm_90", "bfloat16", "decode", "output_kernel", 16, 1, "HMMA"),
        ("sm_90", "bfloat16", "partials", "sum_kernel", 8, 4, None),
        ("sm_90", "bfloat16", "prefill", "output_kernel", 128, 1, "HGMMA"),
        ("sm_100", "bfloat16", "decode", "output_kernel", 64, 1, "UTC"),
        ("sm_100", "float16", "prefill", "pivot_kernel", 128, 1, "UTC"),
    ],
)
def test_compiles_without_spills(family, dtype, module, kernel, tokens, splits, instruction):
    chosen = variant(family, dtype, module, kernel, tokens, splits)
    figures = cubins.compile_variant(chosen)
    assert cubins.complaints(chosen, figures) == []
    if instruction:
        assert any(kind.startswith(instruction) for kind in figures.tensor_core)


@pytest.mark.parametrize(
    ("module", "kernel", "tokens"), [("decode", "output_kernel", 1), ("prefill", "pivot_kernel", 128)]
)
def test_compiles_for_amd(module, kernel, tokens):
    chosen = variant("hip", "bfloat16", module, kernel, tokens)
    function = getattr({"decode": decode, "prefill": prefill}[module], kernel)
    source, options = cubins.source_of(function, chosen)
    compiled = triton.compile(source, target=cubins.GPUTarget("hip", "gfx942", 64), options=options)
    assert compiled.metadata.shared <= 64 * 1024
    assert ".vgpr_spill_count: 0" in compiled.asm["amdgcn"]


def test_complaints_name_what_is_wrong():
    chosen = variant("sm_89", "bfloat16", "prefill", "pivot_kernel", 128)
    figures = cubins.Figures(255, 3, 120_000, 0, 0, {})
    assert len(cubins.complaints(chosen, figures)) == 4


def test_bad_kernels_are_written_and_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        cubins, "compile_variant", lambda variant: cubins.Figures(255, 3, 1000, 1, 5, {"HMMA": 1})
    )
    output = tmp_path / "cubins.json"
    with pytest.raises(PifaError, match="3 instructions spill registers"):
        cubins.cubins(output, families=["sm_89"], dtypes=["float16"], say=lambda line: None)
    with pytest.raises(PifaError, match="sm_80"):
        cubins.cubins(output, families=["sm_80"], dtypes=["float16"], say=lambda line: None)
    # Figures of the same source are kept, and not made again.
    assert {row["family"] for row in json.loads(output.read_text())["kernels"]} == {"sm_80", "sm_89"}
