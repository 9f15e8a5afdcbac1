"""Attacks by what surrounds the tensors: safetensors headers and the index."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from tests.attacks.spoiling import (
    INDEX,
    SHARD,
    Kind,
    Q,
    Spoil,
    described,
    header,
    join_shard,
    replaced,
    sparse,
    split_shard,
    text,
)

NORM = "model.norm.weight"
WEIGHT = f"{Q}.pivot_weight"


def cut(keep: Any) -> Spoil:
    """Keep the first bytes of the shard: as many as `keep` says of (length of the header, of the file)."""

    def spoil(directory: Path) -> None:
        content = (directory / SHARD).read_bytes()
        size = int.from_bytes(content[:8], "little")
        (directory / SHARD).write_bytes(content[: keep(size, len(content))])

    return spoil


def overlapping(old: bytes) -> bytes:
    """Let two tensors of one shape share their bytes, and the rest move up."""
    found = json.loads(old)
    found["model.layers.1.input_layernorm.weight"]["data_offsets"] = found[NORM]["data_offsets"]
    return json.dumps(found).encode()


def twice(directory: Path) -> None:
    """Describe one tensor twice, first as itself, then as its neighbour's bytes."""
    old, data = split_shard(directory / SHARD)
    found = json.loads(old)
    first = json.dumps({NORM: found[NORM]})[1:-1]
    join_shard(directory / SHARD, b"{" + first.encode() + b"," + old.strip()[1:], data)


def added(directory: Path, name: str, shape: list[int]) -> None:
    """Describe one more tensor that takes no bytes."""
    old, data = split_shard(directory / SHARD)
    found = json.loads(old)
    found[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data)]}
    join_shard(directory / SHARD, json.dumps(found).encode(), data)


headers = Kind("safetensors header")
headers.add("empty file", cut(lambda header, size: 0), SHARD)
headers.add("cut off in the length", cut(lambda header, size: 5), SHARD)
headers.add("cut off in the header", cut(lambda header, size: 8 + header // 2), SHARD)
headers.add("cut off in the data", cut(lambda header, size: 8 + header + 1), SHARD)
headers.add("last byte missing", cut(lambda header, size: size - 1), SHARD)
headers.add("bytes after the data", lambda d: (d / SHARD).open("ab").write(b"more"), SHARD)
headers.add("header of 2^63 bytes", header(lambda old: old, 2**63), SHARD, str(2**63))
headers.add("header of 99 MB in a short file", header(lambda old: old, 99_000_000), SHARD, "99000000")
headers.add("header one byte too long", header(lambda old: old, 2**24 + 1), SHARD, str(2**24 + 1))
headers.add("header of 90 MB", header(lambda old: old + b" " * 90_000_000), SHARD, "header")
headers.add("header that is no JSON", header(lambda old: b"\x80\x05pickle"), SHARD)
headers.add("header that is a list", header(lambda old: b"[]"), SHARD)
headers.add("header nested deeply", header(lambda old: b'{"a":' * 100_000), SHARD)
headers.add("header that is not UTF-8", header(lambda old: old[:9] + b"\xff" + old[10:]), SHARD)
headers.add("overlapping tensors", header(overlapping), SHARD, "offset")
headers.add("bytes of no tensor", described(NORM, shape=[64], data_offsets=[0, 256]), SHARD)
headers.add("tensor described twice", twice, SHARD, NORM, "twice")
headers.add(
    "field twice", header(lambda old: old.replace(b'"dtype":', b'"dtype":"F64","dtype":', 1)), SHARD, "dtype"
)
headers.add("shape larger than its bytes", described(WEIGHT, shape=[2**20, 2**20]), SHARD)
headers.add("shape that overflows", described(WEIGHT, shape=[2**62, 2**62]), SHARD)
headers.add("negative extent", described(WEIGHT, shape=[-32, -128]), SHARD)
headers.add("offsets the wrong way round", described(NORM, data_offsets=[512, 0]), SHARD)
headers.add("offsets beyond the file", described(NORM, data_offsets=[2**40, 2**40 + 512]), SHARD)
headers.add("unknown dtype", described(NORM, dtype="F33"), SHARD)
headers.add(
    "empty tensor of 2^62 columns",
    lambda d: added(d, "model.layers.2.x", [0, 2**62]),
    SHARD,
    "model.layers.2.x",
)
headers.add(
    "dtype that clears the screen", described(NORM, dtype="\x1b[2J\x00" + "9" * 5000), SHARD, r"\x1b[2J"
)
headers.add("metadata that is no object", header(lambda o: o.replace(b'{"format":"pt"}', b'["pt"]')), SHARD)
headers.add("shard of 2 TB of nothing", sparse(SHARD, 2 << 40), SHARD)

index = Kind("index")


def weight_map(**places: Any) -> Spoil:
    def change(content: str) -> str:
        found = json.loads(content)
        found["weight_map"].update({NORM: places["norm"]})
        return json.dumps(found)

    return text(change, INDEX)


def unnamed(places: dict[str, str]) -> dict[str, str]:
    return {name: place for name, place in places.items() if name != NORM}


index.add("path to a parent", weight_map(norm="../stolen.safetensors"), INDEX, "../stolen")
index.add("absolute path", weight_map(norm="/etc/passwd"), INDEX, "/etc/passwd")
index.add("path to a subdirectory", weight_map(norm="sub/model.safetensors"), INDEX, "sub/model")
index.add("name with a NUL", weight_map(norm="a\0.safetensors"), INDEX, r"a\x00")
index.add("name of a pickle", weight_map(norm="pytorch_model.bin"), INDEX, "pytorch_model.bin")
index.add("number for a name", weight_map(norm=7), INDEX, "weight_map")
index.add("shard that is not there", weight_map(norm="model-9.safetensors"), "model-9.safetensors", "missing")
index.add("no weight map", text(lambda old: "{}", INDEX), INDEX, "weight_map")
index.add("no JSON", text(lambda old: old[:-9], INDEX), INDEX, "JSON")
index.add("key twice", text(lambda old: '{"weight_map": {},' + old[1:], INDEX), INDEX, "weight_map")
index.add("nested deeply", text(lambda old: '{"a":' * 100_000, INDEX), INDEX, "JSON")
index.add("3 GB", sparse(INDEX, 3 << 30), INDEX, str(3 << 30))
index.add("a directory", replaced(INDEX, Path.mkdir), INDEX, "directory")
index.add(
    "tensor that it does not name",
    text(lambda old: json.dumps({"weight_map": unnamed(json.loads(old)["weight_map"])}), INDEX),
    NORM,
)
index.add(
    "tensor that is not there",
    text(lambda old: old.replace('"weight_map": {', '"weight_map": {"ghost": "model.safetensors", '), INDEX),
    SHARD,
    "ghost",
)


def second_shard(directory: Path) -> None:
    """A shard that no index names, with other values: without an index, vLLM loads it, too."""
    (directory / INDEX).unlink()
    content = json.dumps({NORM: {"dtype": "F32", "shape": [128], "data_offsets": [0, 512]}}).encode()
    join_shard(directory / "more.safetensors", content, struct.pack("<128f", *[1e6] * 128))


index.add("second shard without an index", second_shard, "more.safetensors")
index.add(
    "consolidated shard beside it",
    lambda d: (d / "consolidated.safetensors").write_bytes((d / SHARD).read_bytes()),
    "consolidated.safetensors",
)


def single_beside_index(directory: Path) -> None:
    """transformers prefers model.safetensors, whatever the index names."""
    (directory / SHARD).rename(directory / "other.safetensors")
    (directory / INDEX).write_text((directory / INDEX).read_text().replace(SHARD, "other.safetensors"))
    content = json.dumps({NORM: {"dtype": "F32", "shape": [128], "data_offsets": [0, 512]}}).encode()
    join_shard(directory / SHARD, content, bytes(512))


index.add("single file beside it", single_beside_index, SHARD, INDEX)
