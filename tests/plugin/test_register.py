"""The entry point: quick to import, safe to call, and without effect on other models."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest


def run_python(script):
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_importing_the_entry_point_imports_neither_vllm_nor_torch():
    script = """
import sys
import pifa_vllm.plugin
loaded = {name.split(".")[0] for name in sys.modules}
print(sorted(loaded & {"vllm", "torch", "transformers", "numpy", "pydantic"}))
"""
    assert run_python(script).strip() == "[]"


def test_vllm_finds_it():
    (entry,) = entry_points(group="vllm.general_plugins", name="pifa")
    assert entry.value == "pifa_vllm.plugin:register"


def test_it_does_not_raise_where_vllm_is_not_the_one_it_knows():
    script = """
import sys, types
for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
from pifa_vllm.plugin import register
register()
print("went on")
"""
    assert "went on" in run_python(script)


def test_it_registers_once_and_pulls_in_no_layers():
    pytest.importorskip("vllm")
    script = """
import sys
import vllm.model_executor.layers.quantization as quantization
before = set(sys.modules)
methods = list(quantization.QUANTIZATION_METHODS)
from pifa_vllm.plugin import register
register()
config = quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG["pifa"]
register()
assert quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG["pifa"] is config
assert list(quantization.QUANTIZATION_METHODS) == [*methods, "pifa"]
assert config.override_quantization_method({"quant_method": "awq"}, None) is None
new = {name for name in set(sys.modules) - before if name.startswith(("vllm.", "pifa_vllm."))}
print(sorted(new))
"""
    new = run_python(script)
    assert "vllm.model_executor.layers.linear" not in new
    assert not any(f"'pifa_vllm.{part}" in new for part in ("checkpoint", "ops", "compress", "plugin.linear"))
