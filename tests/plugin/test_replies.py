"""After a failed call, the next one gets its own replies."""

from collections import deque
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc

from pifa_vllm.plugin.replies import take_all_replies

GOOD, BAD = WorkerProc.ResponseStatus.SUCCESS, WorkerProc.ResponseStatus.FAILURE


class Queue:
    def __init__(self, *replies):
        self.replies = deque(replies)

    def dequeue(self, timeout=None):
        if not self.replies:
            raise TimeoutError
        return self.replies.popleft()


@pytest.fixture(autouse=True)
def mended(monkeypatch):
    monkeypatch.setattr(MultiprocExecutor, "collective_rpc", MultiprocExecutor.collective_rpc)
    take_all_replies()
    take_all_replies()


def executor(*ranks, quantization="pifa"):
    made = MultiprocExecutor.__new__(MultiprocExecutor)
    made.vllm_config = SimpleNamespace(model_config=SimpleNamespace(quantization=quantization))
    made.rpc_broadcast_mq = SimpleNamespace(enqueue=lambda _: None)
    made.response_mqs = [Queue(*replies) for replies in ranks]
    made.futures_queue = deque()
    made.is_failed = False
    return made


@pytest.mark.parametrize("failing", [(0,), (1,), (0, 1, 2)])
def test_the_next_call_gets_its_own_replies(failing):
    ranks = [[(BAD if rank in failing else GOOD, "first"), (GOOD, f"second-{rank}")] for rank in range(3)]
    made = executor(*ranks)
    queues = made.response_mqs
    with pytest.raises(RuntimeError, match="first"):
        made.collective_rpc("add_lora")
    assert made.response_mqs is queues
    assert made.collective_rpc("add_lora") == ["second-0", "second-1", "second-2"]


def test_other_models_keep_vllms_behaviour():
    made = executor([(BAD, "first"), (GOOD, "second")], [(GOOD, "old"), (GOOD, "new")], quantization="fp8")
    with pytest.raises(RuntimeError):
        made.collective_rpc("add_lora")
    assert made.collective_rpc("add_lora") == ["second", "old"]


def test_what_does_not_fail_is_as_before():
    made = executor([(GOOD, 1), (GOOD, 3)], [(GOOD, 2), (GOOD, 4)])
    assert made.collective_rpc("step", unique_reply_rank=1) == 2
    assert made.collective_rpc("step", non_block=True).result() == [1, 4]
    with pytest.raises(TimeoutError):
        made.collective_rpc("step", timeout=0.1)
