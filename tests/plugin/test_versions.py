"""Which vLLM releases are served with, and what is said about the others."""

import importlib.util
import logging
import sys
from types import ModuleType

import pytest

from pifa_vllm.cli import main
from pifa_vllm.errors import PifaError
from pifa_vllm.plugin import versions
from pifa_vllm.plugin.versions import NEWEST, OLDEST, check_vllm, supported
from tests.tiny import save_tiny_model

NEXT = f"{NEWEST[0]}.{NEWEST[1] + 1}"
PREVIOUS = f"{OLDEST[0]}.{OLDEST[1] - 1}"


@pytest.fixture(autouse=True)
def not_warned_yet():
    versions._warn.cache_clear()


@pytest.mark.parametrize("release", [OLDEST, NEWEST])
@pytest.mark.parametrize("rest", [".0", ".1.post2", ".0+cpu", ".3rc1", ".1.dev5+gabcdef"])
def test_releases_of_the_range_pass_without_a_word(release, rest, caplog):
    check_vllm(f"{release[0]}.{release[1]}{rest}")
    assert not caplog.records


@pytest.mark.parametrize("found", [f"{PREVIOUS}.1", "0.8.5.post1", "0.1.0"])
def test_older_ones_are_refused(found):
    with pytest.raises(PifaError) as refusal:
        check_vllm(found)
    message = str(refusal.value)
    assert f"expected {supported()}" in message
    assert f"found {found}" in message
    assert "pifa-vllm[cuda]" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "found", [f"{NEXT}.0", f"{NEXT}.0rc1", "1.0.0", "dev", "0.1.dev12+g1234567", "unknown"]
)
def test_newer_ones_and_unknown_ones_are_warned_about_once(found, caplog):
    with caplog.at_level(logging.WARNING, "vllm"):
        check_vllm(found)
        check_vllm(found)
    (record,) = caplog.records
    assert record.name == "vllm.pifa_vllm"
    assert found in record.message
    assert supported() in record.message


def test_vllm_hears_of_it_with_the_first_pifa_checkpoint(monkeypatch, caplog):
    vllm = pytest.importorskip("vllm")
    from pifa_vllm.plugin import register
    from pifa_vllm.plugin.config import PIFAQuantizationConfig

    monkeypatch.setattr(vllm, "__version__", f"{PREVIOUS}.0")
    register()
    assert not caplog.records
    with pytest.raises(PifaError, match=f"found {PREVIOUS}.0, which is too old"):
        PIFAQuantizationConfig.from_config(
            {"quant_method": "pifa", "format_version": 1, "density": 0.5, "ranks": {}}
        )


def test_serve_refuses_before_it_starts_anything(tmp_path, monkeypatch, capsys):
    old = ModuleType("vllm")
    old.__version__ = f"{PREVIOUS}.0"
    monkeypatch.setitem(sys.modules, "vllm", old)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    assert main(["serve", str(save_tiny_model(tmp_path / "dense"))]) == 1
    shown = capsys.readouterr().err
    assert f"found {PREVIOUS}.0, which is too old" in shown
    assert "Traceback" not in shown
