"""What one API server process keeps while it runs."""

from __future__ import annotations

import asyncio
import logging
import time
from argparse import Namespace
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pifa_vllm_server.access import Access
from pifa_vllm_server.exposure import check_exposure, warn_of_what_is_open
from pifa_vllm_server.memory import measure
from pifa_vllm_server.metrics import ServerMetrics, describe
from pifa_vllm_server.model import ModelFacts, gather
from pifa_vllm_server.readiness import Readiness
from pifa_vllm_server.settings import ServerSettings
from pifa_vllm_server.startup import started_at
from vllm import envs

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from fastapi import FastAPI
    from vllm.engine.protocol import EngineClient

logger = logging.getLogger("vllm.pifa_vllm_server")

# Between two questions to the workers, which cost them a moment.
_WORKER_SECONDS = 15.0
# For connections to end after the engine has stopped.
_CLOSE_SECONDS = 5


@dataclass
class ServerState:
    """One API server process.

    Attributes:
        workers: what `PIFAWorkerExtension.pifa_memory` said last, by rank.
    """

    settings: ServerSettings
    engine: EngineClient
    metrics: ServerMetrics
    facts: ModelFacts
    readiness: Readiness
    access: Access
    workers: list[dict[str, Any]]
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _asked: float = field(default_factory=time.monotonic)

    async def refresh(self) -> None:
        """Bring the metrics that change up to date, before they are read."""
        # In a thread: looking at the machine's processes takes milliseconds.
        self.metrics.update(await asyncio.to_thread(measure, self.workers))
        if time.monotonic() - self._asked > _WORKER_SECONDS:
            self._asked = time.monotonic()
            self.start_task(self._ask())

    def start_task(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run something in the background until the server stops."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def stop(self) -> None:
        """End what runs in the background."""
        for task in self._tasks:
            task.cancel()

    async def _ask(self) -> None:
        # Changed in place: readiness looks at it, too.
        self.workers[:] = await ask_workers(self.engine) or self.workers


async def open_state(app: FastAPI) -> ServerState:
    """Build what the server needs around a running engine, when vLLM's app starts.

    Args:
        app: vLLM's, with its state initialised.

    Raises:
        PifaError: if others than this machine would reach a server without a key that is not said to be open.
    """
    args, engine, settings = app.state.args, app.state.engine_client, ServerSettings()
    keys = args.api_key or [envs.VLLM_API_KEY or ""]
    # Bound already: with vLLM's own command, nobody has looked at it before.
    check_exposure(Namespace(host=args.host or "0.0.0.0", uds=args.uds), keys, settings)
    warn_of_what_is_open(any(keys))
    metrics = ServerMetrics()
    workers = await ask_workers(engine)
    facts = gather(engine.vllm_config, workers)
    describe(facts)
    metrics.load_seconds.set(time.time() - started_at())
    config = app.state.server.config
    # uvicorn alone waits for ever for a client that does not read its answer.
    config.timeout_graceful_shutdown = config.timeout_graceful_shutdown or _CLOSE_SECONDS
    readiness = Readiness(engine, settings, metrics, workers)
    state = ServerState(settings, engine, metrics, facts, readiness, Access(keys, settings), workers)
    await state.refresh()
    state.start_task(readiness.watch())
    return state


async def ask_workers(engine: EngineClient) -> list[dict[str, Any]]:
    """Ask every rank of every engine about its memory; no answer where the worker extension is not mixed in."""
    try:
        # No timeout: the answer of a call that was given up would be taken for that of the next one.
        core: Any = getattr(engine, "engine_core", None)
        # From vLLM 0.32 on; `collective_rpc` asks the first engine only.
        if hasattr(core, "call_utility_all_async"):
            engines = await core.call_utility_all_async("collective_rpc", "pifa_memory", None, (), None)
        else:
            engines = [await engine.collective_rpc("pifa_memory")]
    except Exception as error:  # anything the workers raise; the server does not depend on it
        logger.warning("the workers do not tell their memory (%s: %s)", type(error).__name__, error)
        return []
    return [worker for workers in engines for worker in workers]
