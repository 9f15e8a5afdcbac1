"""After a failed call, the next one gets its own replies; nothing waits for ranks that wait for a failed one."""

from collections import deque
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc

from pifa_vllm.plugin.replies import take_all_replies
from tests.pifa_tiny import save_pifa_twin
from tests.plugin.script import run_script
from tests.tiny import save_tiny_model

GOOD, BAD = WorkerProc.ResponseStatus.SUCCESS, WorkerProc.ResponseStatus.FAILURE


class Queue:
    """A rank that has answered so far, and answers no more."""

    def __init__(self, *replies):
        self.replies = deque(replies)
        self.ended = False

    def shutdown(self):
        self.ended = True

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


def test_a_failed_rank_ends_the_call_although_the_first_one_waits():
    made = executor([], [(GOOD, 1)], [(BAD, "third")])
    with pytest.raises(RuntimeError, match="third"):
        made.collective_rpc("warm_up")
    made.response_mqs[0].replies += [(GOOD, "late"), (GOOD, 0)]
    for queue, answer in zip(made.response_mqs[1:], (1, 2), strict=True):
        queue.replies.append((GOOD, answer))
    assert made.collective_rpc("again") == [0, 1, 2]


def test_a_rank_that_owes_a_reply_is_not_waited_for_without_limit():
    made = executor([(BAD, "first"), (GOOD, 0)], [])
    with pytest.raises(RuntimeError, match="first"):
        made.collective_rpc("warm_up")
    with pytest.raises(TimeoutError, match="before this one"):
        made.collective_rpc("execute_model", timeout=0.1, unique_reply_rank=0)


def test_a_call_that_reaches_no_rank_leaves_nothing_to_wait_for():
    made = executor([(GOOD, 1)], [(GOOD, 2)])

    def full(_):
        raise RuntimeError("the queue is gone")

    made.rpc_broadcast_mq, whole = SimpleNamespace(enqueue=full), made.rpc_broadcast_mq
    with pytest.raises(RuntimeError, match="gone"):
        made.collective_rpc("step")
    made.rpc_broadcast_mq = whole
    assert made.collective_rpc("step") == [1, 2]


def test_a_late_reply_to_a_call_that_ran_out_of_time_is_not_the_next_ones():
    made = executor([(GOOD, 1)], [])
    with pytest.raises(TimeoutError):
        made.collective_rpc("step", timeout=0.05)
    made.response_mqs[0].replies.append((GOOD, 3))
    made.response_mqs[1].replies += [(GOOD, 2), (GOOD, 4)]
    assert made.collective_rpc("step") == [3, 4]


def test_the_executor_can_end_a_call():
    """What vLLM's monitor does when a rank's process has died."""
    made = executor([], [])

    class Ends(Queue):
        def dequeue(self, timeout=None):
            for queue in made.response_mqs:
                queue.shutdown()
            raise RuntimeError("cancelled")

    made.response_mqs[0] = Ends()
    with pytest.raises(RuntimeError, match="cancelled"):
        made.collective_rpc("step")
    assert all(queue.ended for queue in made.response_mqs)


def test_what_does_not_fail_is_as_before():
    made = executor([(GOOD, 1), (GOOD, 3)], [(GOOD, 2), (GOOD, 4)])
    assert made.collective_rpc("step", unique_reply_rank=1) == 2
    assert made.collective_rpc("step", non_block=True).result() == [1, 4]
    with pytest.raises(TimeoutError):
        made.collective_rpc("step", timeout=0.1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("replies")
    save_tiny_model(root / "dense", hidden=128, intermediate=176)
    save_pifa_twin(root / "dense", root / "pifa", root / "twin", ranks=lambda _, m, n: min(m, n) // 2)
    return str(root / "pifa")


def engine(model, directory, **job):
    settings = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return run_script("tests.plugin.failing", {"model": model, **job}, directory, **settings)


@pytest.mark.vllm
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("failing", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_rank_that_fails_while_the_other_waits_ends_the_start(model, tmp_path, failing):
    """vLLM by itself was still waiting after 87 s, when it was stopped, where the second one had failed."""
    found = engine(model, tmp_path, start=failing)["start"]
    assert f"rank {failing} fails" in found["raised"]
    assert found["seconds"] < 300


@pytest.mark.vllm
@pytest.mark.timeout(1000)
def test_calls_to_a_real_engine(model, tmp_path):
    found = engine(model, tmp_path, start=None, call=1)
    assert "all refuse" in found["refused"]["raised"]
    assert found["next"]["returned"] == [0, 1]
    assert "rank 1 fails" in found["stuck"]["raised"]
    assert found["stuck"]["seconds"] < 60
    assert "before this one" in found["after"]["raised"]
