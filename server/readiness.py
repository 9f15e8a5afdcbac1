"""Is the server worth sending requests to, and does its engine move? Tokens that are generated say so."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import psutil
from pifa_vllm_server.startup import started_at
from prometheus_client import REGISTRY
from vllm.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from pifa_vllm_server.metrics import ServerMetrics
    from pifa_vllm_server.settings import ServerSettings
    from vllm.engine.protocol import EngineClient

logger = logging.getLogger("vllm.pifa_vllm_server")

# Any token will do: what matters is that one comes back.
_PROMPT = {"prompt_token_ids": [0]}
_TICK_SECONDS = 1.0
# Of a processor, in one tick: less than that is no work.
_WORKING_SECONDS = 0.02
# After SIGTERM: what has been let in reaches the engine.
_ADMISSION_SECONDS = 1.0
_POLL_SECONDS = 0.05
# The engine's processes get this long to end by themselves.
_ENGINE_SECONDS = 5.0


class Readiness:
    """Watches tokens go by, and generates one where users' requests have not done so for a while.

    An engine that neither generates what it was asked for nor uses a processor hangs. While it computes, as over a
    long prompt on a CPU, it has until `token_timeout`.

    Attributes:
        stopping: set for good when the server is asked to stop.

    Args:
        engine: vLLM's.
        settings: probe_interval, hang_timeout, token_timeout.
        metrics: ready, ready_seconds, probes.
        workers: what `PIFAWorkerExtension.pifa_memory` said of every rank: engine and pid.
    """

    def __init__(
        self,
        engine: EngineClient,
        settings: ServerSettings,
        metrics: ServerMetrics,
        workers: Sequence[dict[str, Any]],
    ) -> None:
        self.stopping = False
        self._engine = engine
        self._settings = settings
        self._metrics = metrics
        self._workers = workers
        self._ranks = _of_this_machine({worker["pid"] for worker in workers})
        self._first = True
        self._failure: str | None = "no token has been generated yet"
        self._generated = 0.0
        self._last_token = self._last_work = time.monotonic()
        self._cpu_seconds: dict[int, float] = {}
        self._probe: asyncio.Task[None] | None = None
        self._drain_before_stop()

    @property
    def reason(self) -> str | None:
        """What keeps /ready from answering 200."""
        return "the server is stopping" if self.stopping else self.fatal or self._failure

    @property
    def fatal(self) -> str | None:
        """What keeps /health from answering 200: only a new start mends it."""
        if self._engine.errored:
            return "the engine has failed"
        if any(map(_ended, self._ranks)):  # vLLM tells some ten seconds later
            return "the process of a rank has ended"
        now, interval = time.monotonic(), self._settings.probe_interval
        quiet = now - self._last_token - interval
        if quiet > self._settings.token_timeout:
            return f"the engine has generated nothing for {quiet + interval:.0f} s"
        if quiet > self._settings.hang_timeout < now - self._last_work:
            return f"the engine hangs: for {now - self._last_work:.0f} s no token and no use of a processor"
        return None

    async def watch(self) -> None:
        """Look again and again until cancelled."""
        while True:
            now = time.monotonic()
            if (generated := _tokens_generated()) != self._generated:
                self._generated = generated
                self._token_came()
            quiet = now - self._last_token > self._settings.probe_interval
            if (quiet or self._first) and (self._probe is None or self._probe.done()):
                self._probe = asyncio.create_task(self._generate())
            if not quiet or self._working():
                self._last_work = now
            self._metrics.ready.set(self.reason is None)
            await asyncio.sleep(_TICK_SECONDS)

    def _token_came(self) -> None:
        self._last_token = time.monotonic()
        self._failure = None
        if self._first:
            self._first = False
            seconds = time.time() - started_at()
            self._metrics.ready_seconds.set(seconds)
            logger.info("ready after %.1f s: the first token is there", seconds)

    def _working(self) -> bool:
        """Whether all ranks of an engine have used a processor since the last look."""
        before, self._cpu_seconds = self._cpu_seconds, {}
        engines: dict[int, list[bool]] = defaultdict(list)
        for worker in self._workers:
            pid = worker["pid"]
            try:
                times = psutil.Process(pid).cpu_times()
            except psutil.Error:
                continue  # on another machine, or gone, which the engine's monitor will tell
            self._cpu_seconds[pid] = times.user + times.system
            used = self._cpu_seconds[pid] - before.get(pid, 0.0)
            engines[worker["engine"]].append(used > _WORKING_SECONDS)
        return not engines or any(map(all, engines.values()))

    async def _generate(self) -> None:
        try:
            if "generate" in await self._engine.get_supported_tasks():
                sampling = SamplingParams(
                    max_tokens=1, temperature=0.0, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
                )
                async for _ in self._engine.generate(_PROMPT, sampling, f"pifa-ready-{uuid.uuid4().hex}"):
                    pass
            else:
                await self._engine.check_health()
        except Exception as error:  # whatever it is, the server is not ready, and the next token may come
            self._metrics.probes.labels("failed").inc()
            if (
                getattr(error, "http_status", None) != HTTPStatus.SERVICE_UNAVAILABLE
            ):  # a full queue is not ill
                self._failure = f"generating a token failed ({type(error).__name__}: {error})"
        else:
            self._metrics.probes.labels("ok").inc()
            self._token_came()

    def _drain_before_stop(self) -> None:
        """Have running requests finish, and no new ones begin, before vLLM stops the engine.

        vLLM calls `shutdown` in a thread when it gets SIGTERM, and again at the end. By itself it tells nobody,
        answers what comes later with an internal error, and with several API server processes cuts off what runs.
        """
        stop = self._engine.shutdown

        def shutdown(timeout: float | None = None) -> None:
            deadline = time.monotonic() + (timeout or 0.0)
            if not self.stopping:
                self.stopping = True
                self._metrics.ready.set(0)
                time.sleep(min(timeout or 0.0, _ADMISSION_SECONDS))
                running = self._engine.output_processor.has_unfinished_requests
                while running() and time.monotonic() < deadline:
                    time.sleep(_POLL_SECONDS)
            stop(timeout=max(deadline - time.monotonic(), _ENGINE_SECONDS))

        self._engine.shutdown = shutdown


def _tokens_generated() -> float:
    """By this process's requests, as vLLM counts them; 0 with --disable-log-stats."""
    families = REGISTRY.restricted_registry(("vllm:generation_tokens_total",)).collect()
    return sum(s.value for family in families for s in family.samples if s.name.endswith("_total"))


def _of_this_machine(pids: set[int]) -> list[psutil.Process]:
    """Another machine's ranks may have any number, so they must be relatives."""
    family = (psutil.Process().parent() or psutil.Process()).children(recursive=True)
    return [process for process in family if process.pid in pids]


def _ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
