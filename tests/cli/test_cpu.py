"""What `serve` chooses on a CPU, where the user says nothing."""

import argparse
import os
import shutil

import pytest

pytest.importorskip("vllm")

from pifa_vllm_server.memory import Usage
from vllm.platforms import current_platform

from pifa_vllm.cli import cpu
from pifa_vllm.cli.cpu import check_shared_memory, set_cpu_defaults
from pifa_vllm.errors import PifaError

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="defaults for CPUs only")

CACHE, BIND, MULTI = "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_ENABLE_V1_MULTIPROCESSING"


def ranks(tensor=1, pipeline=1, replicas=1, executor=None):
    return argparse.Namespace(
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        data_parallel_size=replicas,
        distributed_executor_backend=executor,
    )


@pytest.fixture(autouse=True)
def untouched(monkeypatch):
    """No variables of the user's, 4 cores, and shared memory for everyone."""
    for name in (CACHE, BIND, MULTI, "OMP_NUM_THREADS", "VLLM_MQ_MAX_CHUNK_BYTES_MB"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    give(monkeypatch, cores=4, shared_mib=8 << 10)


def give(monkeypatch, cores=None, shared_mib=None):
    if cores is not None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    if shared_mib is not None:
        free = shutil.disk_usage("/")._replace(free=shared_mib << 20)
        monkeypatch.setattr(cpu.shutil, "disk_usage", lambda _: free)


def chosen(arguments, flags=("--kv-cache-memory-bytes", "1G")):
    return set_cpu_defaults(arguments, list(flags))


def test_with_few_cores_the_engines_process_computes():
    assert chosen(ranks()) == {MULTI: "0", "OMP_NUM_THREADS": "4"}
    assert os.environ[MULTI] == "0"


def test_replicas_share_the_cores(monkeypatch):
    assert chosen(ranks(replicas=2)) == {MULTI: "0", "OMP_NUM_THREADS": "2"}
    for name in (MULTI, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name)
    assert chosen(ranks(tensor=2, replicas=2)) == {BIND: "nobind", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("arguments", "threads"), [(ranks(tensor=2), "0,1|2,3"), (ranks(tensor=2, pipeline=2), "0|1|2|3")]
)
def test_ranks_have_cores_of_their_own(arguments, threads):
    assert chosen(arguments) == {BIND: threads}


def test_more_ranks_than_cores_share_them():
    assert chosen(ranks(tensor=8)) == {BIND: "nobind", "OMP_NUM_THREADS": "1"}


def test_with_many_cores_binding_is_vllms(monkeypatch):
    give(monkeypatch, cores=32)
    assert chosen(ranks()) == {}
    # Where its queues have no room, as in a container, there is one process less.
    give(monkeypatch, shared_mib=64)
    monkeypatch.setattr(cpu.psutil, "cpu_count", lambda logical: 16)
    assert chosen(ranks()) == {MULTI: "0", "OMP_NUM_THREADS": "16"}


def test_room_for_one_replicas_queues_is_not_enough_for_two(monkeypatch):
    give(monkeypatch, cores=32, shared_mib=500)
    monkeypatch.setattr(cpu.psutil, "cpu_count", lambda logical: 16)
    assert chosen(ranks()) == {}
    assert chosen(ranks(replicas=2)) == {MULTI: "0", "OMP_NUM_THREADS": "8"}
    check_shared_memory(ranks(replicas=2))


@pytest.mark.parametrize("variable", [BIND, MULTI])
def test_the_user_has_the_last_word(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    assert chosen(ranks()) == {}
    assert os.environ[variable] == "1"
    monkeypatch.delenv(variable)
    assert chosen(ranks(executor="mp")) == {}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert chosen(ranks()) == {MULTI: "0"}
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_the_default_cache_is_a_quarter_of_what_is_free(monkeypatch):
    monkeypatch.setenv(BIND, "0")
    for free, cache in ((32, "8"), (2, "1"), (400, "100")):
        monkeypatch.delenv(CACHE, raising=False)
        monkeypatch.setattr(cpu, "main_memory", lambda free=free: Usage((8 + free) << 30, 8 << 30))
        assert chosen(ranks(), flags=()) == {CACHE: cache}
    assert chosen(ranks(), flags=()) == {}
    monkeypatch.delenv(CACHE)
    assert chosen(ranks(), flags=["--kv_cache_memory_bytes", "1G"]) == {}


def test_little_shared_memory_is_found_before_loading(monkeypatch):
    give(monkeypatch, shared_mib=410)
    check_shared_memory(ranks())
    with pytest.raises(PifaError, match=r"/dev/shm: expected 640 MiB free .* found 410\. .*--shm-size 1g"):
        check_shared_memory(ranks(tensor=2))
    give(monkeypatch, shared_mib=250)
    with pytest.raises(PifaError, match="expected 400 MiB"):
        check_shared_memory(ranks())
    monkeypatch.setenv("VLLM_MQ_MAX_CHUNK_BYTES_MB", "1")
    check_shared_memory(ranks())


def test_one_process_needs_no_shared_memory(monkeypatch):
    give(monkeypatch, shared_mib=64)
    chosen(ranks())
    check_shared_memory(ranks())
    with pytest.raises(PifaError, match="expected 640 MiB"):
        check_shared_memory(ranks(tensor=2))
