"""What the attacks do to a copy of a good checkpoint, and how they are written down."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

SHARD, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
# A compressed module of every base.
Q = "model.layers.1.self_attn.q_proj"

Spoil = Callable[[Path], object]


@dataclass(frozen=True)
class Attack:
    """One hostile checkpoint.

    Attributes:
        name: of the attack.
        kind: the group that it belongs to in the table.
        spoil: changes a copy of the base in place.
        names: what every refusal must name: the file, and the tensor or field.
        base: which good checkpoint is spoilt, see `bases`.
        theirs: loaders that refuse with an error of their own before they read the file at all, such as
            transformers where config.json is a FIFO; it need not name the field.
        foreign: loaders that see a model of another kind in it, which is not this project's to judge.
    """

    name: str
    kind: str
    spoil: Spoil
    names: tuple[str, ...]
    base: str = "llama"
    theirs: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()


class Kind:
    """Collects the attacks of one group."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.attacks: list[Attack] = []

    def add(
        self,
        name: str,
        spoil: Spoil,
        *names: str,
        base: str = "llama",
        theirs: str = "",
        foreign: str = "",
    ) -> None:
        self.attacks.append(
            Attack(name, self.kind, spoil, names, base, tuple(theirs.split()), tuple(foreign.split()))
        )


def tensors(edit: Callable[[dict[str, Tensor]], object]) -> Spoil:
    """Change the tensors, and let the index name what there is then."""

    def spoil(directory: Path) -> None:
        held = load_file(directory / SHARD)
        edit(held)
        save_file(held, directory / SHARD, metadata={"format": "pt"})
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(held, SHARD)}))

    return spoil


def put(name: str, tensor: Tensor) -> Spoil:
    return tensors(lambda held: held.update({name: tensor.contiguous()}))


def drop(name: str) -> Spoil:
    return tensors(lambda held: held.pop(name))


def value(name: str, number: float, place: int = 0) -> Spoil:
    def edit(held: dict[str, Tensor]) -> None:
        held[name].view(-1)[place] = number

    return tensors(edit)


def config(**fields: Any) -> Spoil:
    return edited(lambda settings: settings.update(fields))


def section(**fields: Any) -> Spoil:
    return edited(lambda settings: settings["quantization_config"].update(fields))


def rank(number: Any, module: str = Q) -> Spoil:
    return edited(lambda settings: settings["quantization_config"]["ranks"].update({module: number}))


def edited(edit: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(directory: Path) -> None:
        settings = json.loads((directory / CONFIG).read_text())
        edit(settings)
        (directory / CONFIG).write_text(json.dumps(settings))

    return spoil


def text(change: Callable[[str], str | bytes], file: str = CONFIG) -> Spoil:
    """Change a file as text; bytes are written as they are."""

    def spoil(directory: Path) -> None:
        changed = change((directory / file).read_text())
        (directory / file).write_bytes(changed if isinstance(changed, bytes) else changed.encode())

    return spoil


def instead(old: str, new: str, file: str = CONFIG) -> Spoil:
    def change(content: str) -> str:
        assert content.count(old) >= 1, old
        return content.replace(old, new, 1)

    return text(change, file)


def split_shard(path: Path) -> tuple[bytes, bytes]:
    """A shard's header and data."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], content[end:]


def join_shard(path: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    """Write a shard whose header claims some length, its own by default."""
    claimed = len(header) if length is None else length
    path.write_bytes(claimed.to_bytes(8, "little") + header + data)


def header(change: Callable[[bytes], bytes], length: int | None = None) -> Spoil:
    """Change the header's bytes, leaving the data where it was."""

    def spoil(directory: Path) -> None:
        old, data = split_shard(directory / SHARD)
        join_shard(directory / SHARD, change(old), data, length)

    return spoil


def described(name: str, **fields: Any) -> Spoil:
    """Change what the header says of one tensor."""

    def change(old: bytes) -> bytes:
        found = json.loads(old)
        found[name].update(fields)
        return json.dumps(found).encode()

    return header(change)


def both(*spoils: Spoil) -> Spoil:
    def spoil(directory: Path) -> None:
        for one in spoils:
            one(directory)

    return spoil


def file(name: str, content: str | bytes = "") -> Spoil:
    def spoil(directory: Path) -> None:
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def sparse(name: str, size: int) -> Spoil:
    """Blow a file up to a size that takes no space on the disk."""

    def spoil(directory: Path) -> None:
        with (directory / name).open("ab") as opened:
            opened.truncate(size)

    return spoil


def replaced(name: str, make: Callable[[Path], object]) -> Spoil:
    """Put something else in the place of a file."""

    def spoil(directory: Path) -> None:
        path = directory / name
        path.unlink(missing_ok=True)
        make(path)

    return spoil


def moved_out(name: str) -> Spoil:
    """Move a file out of the directory, and leave a link to it."""

    def spoil(directory: Path) -> None:
        outside = directory.with_name(f"{directory.name}-outside-{name}")
        shutil.move(directory / name, outside)
        (directory / name).symlink_to(outside)

    return spoil
