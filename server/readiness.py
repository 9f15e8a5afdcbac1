"""Is the server worth sending requests to? A token that was generated lately says so."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from typing import TYPE_CHECKING

from pifa_vllm_server.startup import started_at
from vllm.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from pifa_vllm_server.metrics import ServerMetrics, TokenCounter
    from pifa_vllm_server.settings import ServerSettings
    from pifa_vllm_server.slots import Slots
    from vllm.engine.protocol import EngineClient

logger = logging.getLogger("vllm.pifa_vllm_server")

# Any token will do: what matters is that one comes back.
_PROMPT = {"prompt_token_ids": [0]}


class Readiness:
    """Generates one token where users' requests have not done so for a while.

    Attributes:
        reason: why the server is not ready; None if it is.
        first_token: when the first token came, in the seconds of time.time(); None before.
    """

    def __init__(
        self,
        engine: EngineClient,
        settings: ServerSettings,
        metrics: ServerMetrics,
        tokens: TokenCounter | None,
        slots: Slots,
    ) -> None:
        self.first_token: float | None = None
        self._failure: str | None = "no token has been generated yet"
        self._engine = engine
        self._settings = settings
        self._metrics = metrics
        self._tokens = tokens
        self._slots = slots

    @property
    def reason(self) -> str | None:
        """What /ready says."""
        if self._slots.closed:
            return "the server is stopping"
        return "the engine has failed" if self._engine.errored else self._failure

    async def watch(self) -> None:
        """Check again and again until cancelled."""
        seen = 0
        while True:
            generated = self._tokens.generated if self._tokens else 0
            if generated == seen or self._failure is not None:
                await self._check()
            seen = self._tokens.generated if self._tokens else 0
            # While it fails, a recovery should be noticed soon.
            pause = self._settings.ready_interval
            await asyncio.sleep(pause if self._failure is None else min(pause, 1.0))

    async def _check(self) -> None:
        try:
            async with asyncio.timeout(self._settings.ready_timeout):
                await self._generate()
        except TimeoutError:
            self._failure = f"no token was generated within {self._settings.ready_timeout:g} s"
        except Exception as error:  # whatever it is, the server is not ready, and the next check may succeed
            self._failure = f"generating a token failed ({type(error).__name__}: {error})"
        else:
            self._failure = None
            if self.first_token is None:
                self.first_token = time.time()
                seconds = self.first_token - started_at()
                self._metrics.ready_seconds.set(seconds)
                logger.info("ready after %.1f s: the first token is there", seconds)
        self._metrics.probes.labels("ok" if self._failure is None else "failed").inc()
        self._metrics.ready.set(self.reason is None)

    async def _generate(self) -> None:
        if "generate" not in await self._engine.get_supported_tasks():
            await self._engine.check_health()
            return
        sampling = SamplingParams(
            max_tokens=1, temperature=0.0, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
        )
        async for _ in self._engine.generate(_PROMPT, sampling, f"pifa-ready-{uuid.uuid4().hex}"):
            pass
