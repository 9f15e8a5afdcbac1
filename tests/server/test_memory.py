"""Main memory is the machine's, or the container's where that is less."""

import psutil
import pytest
from pifa_vllm_server.memory import Usage, main_memory

GIB = 1 << 30


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    found = psutil.virtual_memory()._replace(total=64 * GIB, available=40 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)


def version_1(root, limit, used, cached):
    root = root / "memory"
    root.mkdir()
    (root / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (root / "memory.usage_in_bytes").write_text(f"{used}\n")
    (root / "memory.stat").write_text(f"cache 1\ninactive_file 7\ntotal_inactive_file {cached}\n")


def version_2(root, limit, used, cached):
    (root / "memory.max").write_text(f"{limit}\n")
    (root / "memory.current").write_text(f"{used}\n")
    (root / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")


@pytest.mark.parametrize("write", [version_1, version_2])
def test_a_containers_limit(tmp_path, write):
    write(tmp_path, 8 * GIB, 3 * GIB, GIB)
    assert main_memory(tmp_path) == Usage(8 * GIB, 2 * GIB)


@pytest.mark.parametrize(
    ("write", "limit"), [(version_2, "max"), (version_1, (1 << 63) - 4096), (version_2, 64 * GIB)]
)
def test_no_limit_is_the_machines(tmp_path, write, limit):
    write(tmp_path, limit, 3 * GIB, GIB)
    assert main_memory(tmp_path) == Usage(64 * GIB, 24 * GIB)


def test_what_cannot_be_read_is_the_machines(tmp_path):
    (tmp_path / "memory.max").write_text(f"{8 * GIB}\n")
    assert main_memory(tmp_path) == Usage(64 * GIB, 24 * GIB)
    (tmp_path / "memory.current").write_text("something else\n")
    (tmp_path / "memory.stat").write_text("")
    assert main_memory(tmp_path) == Usage(64 * GIB, 24 * GIB)
    assert main_memory(tmp_path / "no cgroups here") == Usage(64 * GIB, 24 * GIB)
