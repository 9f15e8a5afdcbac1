"""The `quantization_config` section: what is taken and what is refused, and how the refusal reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pifa_vllm.checkpoint import PIFAConfig, is_pifa, read_config, read_json
from pifa_vllm.errors import CheckpointError
from tests.checkpoint.sample import Sample

FACTORS = {
    "bits": 4,
    "coefficient_bits": 8,
    "type": "int",
    "group_size": 32,
    "symmetric": True,
    "pivot_columns": ["gate_proj", "up_proj"],
}


@pytest.mark.parametrize("more", [{}, {"format_version": 2, "factors": FACTORS}])
def test_a_good_section_round_trips(more: dict[str, Any]) -> None:
    section = Sample().section | more
    assert PIFAConfig.parse(section, "config.json").model_dump() == section


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, r"format_version 3, expected at most 2\. Update pifa-vllm"),
        ({"format_version": 2}, r"quantization_config: .*format_version 2 has factors"),
        ({"factors": FACTORS}, r"quantization_config: .*version 1 has none"),
        ({"format_version": 2, "factors": None}, r"quantization_config: .*format_version 2 has factors"),
        ({"format_version": 2, "factors": FACTORS | {"bits": 5}}, r"factors\.bits: .*found 5"),
        ({"format_version": 2, "factors": FACTORS | {"bits": True}}, r"factors\.bits: .*found True"),
        ({"format_version": 2, "factors": FACTORS | {"group_size": 48}}, r"factors\.group_size: .*found 48"),
        (
            {"format_version": 2, "factors": FACTORS | {"symmetric": False}},
            r"factors\.symmetric: .*found False",
        ),
        ({"format_version": 2, "factors": FACTORS | {"zero": 1}}, r"factors\.zero: Extra inputs.*found 1"),
        ({"format_version": 2, "factors": FACTORS | {"type": "float"}}, r"factors: .*floats have 8 bits"),
        ({"format_version": 0}, r"quantization_config\.format_version: .*found 0"),
        ({"format_version": True}, r"format_version: expected 1 to 2, found True"),
        ({"format_version": 1.0}, r"format_version: expected 1 to 2, found 1\.0"),
        ({"format_version": "1"}, r"format_version: expected 1 to 2, found '1'"),
        ({"format_version": None}, r"format_version: expected 1 to 2, found None"),
        ({"quant_method": "gptq"}, r"quantization_config\.quant_method: .*found 'gptq'"),
        ({"density": 0}, r"quantization_config\.density: .*greater than 0.*found 0"),
        ({"density": 1.01}, r"quantization_config\.density: .*found 1\.01"),
        ({"density": math.nan}, r"quantization_config\.density: .*found nan"),
        ({"density": "0.5"}, r"quantization_config\.density: .*found '0\.5'"),
        ({"density": None}, r"quantization_config\.density: .*found None"),
        ({"ranks": {"a": 3.0}}, r"quantization_config\.ranks\.a: .*integer.*found 3\.0"),
        ({"ranks": {"a": True}}, r"quantization_config\.ranks\.a: .*integer.*found True"),
        ({"ranks": {"a": "3"}}, r"quantization_config\.ranks\.a: .*found '3'"),
        ({"ranks": {"a": -1}}, r"quantization_config\.ranks\['a'\]: expected 0 or more, .*found -1"),
        ({"ranks": ["a"]}, r"quantization_config\.ranks: .*dictionary.*found \['a'\]"),
        ({"provenance": "me"}, r"quantization_config\.provenance: .*found 'me'"),
        ({"group_size": 128}, r"quantization_config\.group_size: Extra inputs.*found 128"),
    ],
)
def test_violations_name_field_and_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^config\.json: .*{message}"):
        PIFAConfig.parse(Sample().section | change, "config.json")


@pytest.mark.parametrize("field", ["density", "ranks", "format_version"])
def test_missing_fields_are_named(field: str) -> None:
    section = Sample().section
    del section[field]
    with pytest.raises(CheckpointError, match=rf"quantization_config\.{field}"):
        PIFAConfig.parse(section, "config.json")


@pytest.mark.parametrize("section", [None, [], "pifa", 1])
def test_a_section_that_is_no_object_is_refused(section: object) -> None:
    with pytest.raises(CheckpointError, match=r"^config\.json: quantization_config"):
        PIFAConfig.parse(section, "config.json")


def test_the_default_version_is_for_writers_only() -> None:
    assert PIFAConfig(density=0.5, ranks={}).model_dump()["format_version"] == 1


def test_directories_that_are_no_pifa_checkpoints(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        read_config(tmp_path)
    for text, found in (("{}", "None"), ('{"quantization_config": {"quant_method": "awq"}}', "'awq'")):
        config.write_text(text)
        assert not is_pifa(tmp_path)
        with pytest.raises(
            CheckpointError, match=rf'not a PIFA checkpoint: expected .*"pifa", found {found}'
        ):
            read_config(tmp_path)
    config.write_text('{"quantization_config": {"quant_method": "pifa"}}')
    assert is_pifa(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe\x00", "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[1]", "expected a JSON object, found list"),
    ],
)
def test_files_that_are_no_json_objects(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value)
