"""Every rank's reply to a call is taken, also where one says that the call failed.

vLLM's executor of several processes raises at the first rank that reports an error, and leaves the replies of the
ranks after it in their queues: the next call then takes them for its own (vllm-project/vllm#57846; vLLM 0.30 to
0.32). A refused adapter, or a refused reload, would make the next one fail with the same words. It is put right
only in engines that serve a PIFA model.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

_MARK = "_pifa_takes_all_replies"


class _Replies:
    """One rank's queue during one call."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self.taken = False

    def dequeue(self, *args: Any, **options: Any) -> Any:
        reply = self._queue.dequeue(*args, **options)
        self.taken = True
        return reply


def take_all_replies() -> None:
    """Mend the executor of this process. Idempotent; engines of other models keep vLLM's behaviour."""
    call = MultiprocExecutor.collective_rpc
    if hasattr(call, _MARK):
        return

    @wraps(call)
    def collective_rpc(self: MultiprocExecutor, *args: Any, **options: Any) -> Any:
        queues = self.response_mqs
        # A call that does not wait, or asks one rank only, is a step of the model: if that fails, the engine ends.
        waits = not options.get("non_block") and options.get("unique_reply_rank") is None
        if not waits or len(queues) < 2 or self.vllm_config.model_config.quantization != "pifa":
            return call(self, *args, **options)
        replies = [_Replies(queue) for queue in queues]
        self.response_mqs = replies
        try:
            return call(self, *args, **options)
        except RuntimeError:
            # All ranks were asked the same thing and answer about as soon.
            for reply in replies if any(reply.taken for reply in replies) else ():
                if not reply.taken:
                    reply.dequeue()
            raise
        finally:
            if self.response_mqs is replies:  # else the engine has been shut down
                self.response_mqs = queues

    setattr(collective_rpc, _MARK, True)
    MultiprocExecutor.collective_rpc = collective_rpc
