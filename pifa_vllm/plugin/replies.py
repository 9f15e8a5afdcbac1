"""Every call to the ranks gets its own replies, also after one that failed.

vLLM's executor of several processes asks the ranks in turn for their replies to a call, and raises at the first
that reports an error. The replies of the ranks after it stay in their queues, and the next call takes them for its
own (vllm-project/vllm#57846; vLLM 0.30 to 0.32): after a refused adapter or a refused reload, the next one would
fail with the same words. And where a later rank fails while the first waits for it in a collective, so does vLLM.

Replaced is one method of one class of vLLM's, `MultiprocExecutor.collective_rpc`, in every process that imports it.
Unless the model's quantization is "pifa", the replacement only calls vLLM's. What vLLM does with one rank, by way
of Ray, or in the ranks themselves is left alone. In engines of PIFA models:

- A call raises as soon as any rank has failed, whichever it is, and waits for no other. So an engine of which a
  rank fails while it starts ends, as vLLM ends it.
- What ranks then still owe is taken before the next call is made. A rank that never answers, because it waits in a
  collective for the one that failed, lets that next call fail after the call's own time limit, or else after that
  of a step of the model (`VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS`, 300). If it is a step, vLLM then ends the engine.
"""

from __future__ import annotations

import time
from contextlib import suppress
from functools import wraps
from typing import Any

from vllm import envs
from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc

_MARK = "_pifa_takes_all_replies"
_OWED = "_pifa_owed_replies"
# How long one rank is waited for before the others are looked at, and how long those are.
_TURN_SECONDS, _GLANCE_SECONDS = 0.5, 0.01


class _Replies:
    """One rank's queue during one call, which knows the others'."""

    def __init__(self, queue: Any, all_ranks: list[_Replies]) -> None:
        self.queue = queue
        self.asked = False
        self.taken: Any = None
        self._all = all_ranks

    @property
    def _failed(self) -> bool:
        return self.taken is not None and self.taken[0] != WorkerProc.ResponseStatus.SUCCESS

    def take(self, seconds: float) -> None:
        """Wait for this rank's reply, unless it is there."""
        if self.taken is None:
            with suppress(TimeoutError):
                self.taken = self.queue.dequeue(timeout=seconds)

    def dequeue(self, timeout: float | None = None) -> Any:
        """What vLLM asks for: this rank's reply, or that of another one which has failed."""
        self.asked = True
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = _TURN_SECONDS if deadline is None else deadline - time.monotonic()
            self.take(max(_GLANCE_SECONDS, min(left, _TURN_SECONDS)))
            if self.taken is not None:
                return self.taken
            for other in self._all:
                other.take(_GLANCE_SECONDS)
                if other._failed:
                    return other.taken
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError

    def shutdown(self) -> None:
        """End the wait; the executor does so when a rank's process has died."""
        self.queue.shutdown()


def take_all_replies() -> None:
    """Mend the executor of this process. Idempotent; engines of other models keep vLLM's behaviour."""
    call = MultiprocExecutor.collective_rpc
    if hasattr(call, _MARK):
        return

    @wraps(call)
    def collective_rpc(
        self: MultiprocExecutor, method: Any, timeout: float | None = None, *args: Any, **options: Any
    ) -> Any:
        queues = self.response_mqs
        if len(queues) < 2 or self.vllm_config.model_config.quantization != "pifa":
            return call(self, method, timeout, *args, **options)
        owed: list[Any] = vars(self).setdefault(_OWED, [])
        while owed and not self.is_failed:
            try:
                owed[0].dequeue(timeout=timeout or envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)
            except TimeoutError as error:
                raise TimeoutError("a rank has not answered the call before this one") from error
            del owed[0]
        # A call that does not wait, or asks one rank only, is a step of the model: if that fails, the engine ends.
        if options.get("non_block") or options.get("unique_reply_rank") is not None:
            return call(self, method, timeout, *args, **options)
        replies: list[_Replies] = []
        replies += [_Replies(queue, replies) for queue in queues]
        self.response_mqs = replies
        try:
            return call(self, method, timeout, *args, **options)
        except (RuntimeError, TimeoutError):
            # Otherwise the ranks were not told of the call.
            if replies[0].asked:
                owed += [reply.queue for reply in replies if reply.taken is None]
            raise
        finally:
            if self.response_mqs is replies:  # else the engine has been shut down
                self.response_mqs = queues

    setattr(collective_rpc, _MARK, True)
    MultiprocExecutor.collective_rpc = collective_rpc
