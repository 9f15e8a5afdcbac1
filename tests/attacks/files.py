"""Attacks by what kind of file lies in the directory, and where its links lead."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from tests.attacks.spoiling import CONFIG, INDEX, SHARD, Kind, both, file, moved_out, replaced, sparse


def bind(path: Path) -> None:
    """Leave a socket: by a relative path, because those of sockets must be short."""
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(before)


def secret(path: Path) -> None:
    """A link to a file that the server's user can read, and its clients should not."""
    path.symlink_to("/etc/passwd")


links = Kind("links")
links.add("config.json to outside", moved_out(CONFIG), CONFIG, "link")
links.add("shard to outside", moved_out(SHARD), SHARD, "link")
links.add("index to outside", moved_out(INDEX), INDEX, "link")
links.add("tokenizer to outside", moved_out("tokenizer.json"), "tokenizer.json", "link")
links.add(
    "chat template to /etc/passwd",
    replaced("chat_template.jinja", secret),
    "chat_template.jinja",
    "/etc/passwd",
)
links.add("extra file to /etc/passwd", replaced("NOTICE", secret), "NOTICE", "/etc/passwd")
links.add("extra directory to /etc", replaced("more", lambda p: p.symlink_to("/etc")), "more", "/etc")
links.add("link to itself", replaced("tokenizer.json", lambda p: p.symlink_to(p.name)), "tokenizer.json")
links.add("link to nothing", replaced("merges.txt", lambda p: p.symlink_to("gone")), "merges.txt", "gone")
links.add(
    "config.json to /dev/zero",
    replaced(CONFIG, lambda p: p.symlink_to("/dev/zero")),
    CONFIG,
    theirs="transformers vllm",
)
links.add("shard to /dev/zero", replaced(SHARD, lambda p: p.symlink_to("/dev/zero")), SHARD, "/dev/zero")
links.add(
    "config.json to /dev/stdin",
    replaced(CONFIG, lambda p: p.symlink_to("/dev/stdin")),
    CONFIG,
    theirs="transformers vllm",
)

special = Kind("special files")
for name in (
    CONFIG,
    INDEX,
    SHARD,
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "extra",
):
    special.add(
        f"FIFO in place of {name}",
        replaced(name, os.mkfifo),
        name,
        "FIFO",
        theirs="transformers vllm" if name == CONFIG else "",
    )
special.add("socket", replaced("extra.sock", bind), "extra.sock", "socket")
special.add("directory in place of the shard", replaced(SHARD, Path.mkdir), SHARD)
special.add("tokenizer.json of 3 GB", sparse("tokenizer.json", 3 << 30), "tokenizer.json", "bytes")
special.add(
    "tokenizer_config.json of 3 GB", sparse("tokenizer_config.json", 3 << 30), "tokenizer_config.json"
)
special.add(
    "generation_config.json of 3 GB",
    both(file("generation_config.json", "{}"), sparse("generation_config.json", 3 << 30)),
    "generation_config.json",
)
special.add("chat template of 3 GB", sparse("chat_template.jinja", 3 << 30), "chat_template.jinja", "bytes")
special.add(
    "generation_config.json of 100,000 levels",
    file("generation_config.json", '{"a":' * 100_000),
    "generation_config.json",
    "JSON",
)
