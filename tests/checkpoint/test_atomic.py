from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pifa_vllm.checkpoint.atomic import replace_file, replace_text
from pifa_vllm.errors import CheckpointError


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    replace_text(path, "çà")
    replace_text(path, "là\n")
    assert path.read_bytes() == "là\n".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["some.txt"]


def test_files_are_for_whom_the_umask_lets_read(tmp_path: Path) -> None:
    """A server in a container runs as another user; safetensors alone would keep the file to its owner."""
    path, usual = tmp_path / "model.safetensors", tmp_path / "usual"
    replace_file(path, lambda scratch: save_file({"x": torch.zeros(1)}, scratch))
    usual.touch()
    assert path.stat().st_mode == usual.stat().st_mode


@pytest.mark.parametrize(
    ("error", "expected"), [(OSError("no"), CheckpointError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_what_interrupts_the_writing_leaves_the_old_file_and_no_other(
    tmp_path: Path, error: BaseException, expected: type[BaseException]
) -> None:
    path = tmp_path / "some.txt"
    path.write_text("old")

    def write(scratch: Path) -> None:
        scratch.write_text("half")
        raise error

    with pytest.raises(expected):
        replace_file(path, write)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["some.txt"]


def test_a_place_where_no_file_can_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "x.json", tmp_path / "nowhere" / "x.json"):
        with pytest.raises(CheckpointError, match=rf"{path}: cannot be written"):
            replace_text(path, "{}")
