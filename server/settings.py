"""What the server can be told, by flags of `pifa-vllm serve` or by the environment."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict

from pifa_vllm.errors import PifaError

ENV_PREFIX = "PIFA_SERVER_"


class ServerSettings(BaseSettings):
    """Settings beside vLLM's own flags, which stay as they are.

    A field such as `max_n` is the flag `--server.max-n` and the environment variable `PIFA_SERVER_MAX_N`; the
    flag wins. Limits hold for each request. Where several API server processes run, `max_concurrent_requests`
    is shared out among them.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX)

    max_body_bytes: int = Field(4 << 20, ge=1, description="largest request body")
    max_header_bytes: int = Field(32 << 10, ge=1, description="request line and headers together")
    max_prompt_chars: int = Field(1 << 20, ge=1, description="characters of all prompts or messages")
    max_prompts: int = Field(64, ge=1, description="prompts in one completion request")
    max_n: int = Field(16, ge=1, description="answers per prompt (n, best_of)")
    max_concurrent_requests: int = Field(256, ge=1, description="requests that are worked on at once")
    request_timeout: float = Field(
        600.0, gt=0, allow_inf_nan=False, description="seconds until a request is given up"
    )
    body_timeout: float = Field(
        30.0, gt=0, allow_inf_nan=False, description="seconds in which headers and body must arrive"
    )
    send_timeout: float = Field(
        30.0, gt=0, allow_inf_nan=False, description="seconds in which a client must read something"
    )
    drain_timeout: int = Field(
        30, ge=0, description="seconds for running requests after SIGTERM (vLLM's --shutdown-timeout wins)"
    )
    ready_interval: float = Field(
        30.0, gt=0, allow_inf_nan=False, description="seconds without tokens until one is generated"
    )
    ready_timeout: float = Field(
        30.0, gt=0, allow_inf_nan=False, description="seconds in which that token must come"
    )
    public_metrics: bool = Field(False, description="leave /metrics open where an API key is set")
    admin_routes: bool = Field(False, description="open vLLM's routes that change or inspect the engine")
    dashboard: bool = Field(True, description="serve /dashboard")

    def environment(self) -> dict[str, str]:
        """The variables from which another process reads the same settings."""
        return {f"{ENV_PREFIX}{name.upper()}": str(value) for name, value in self}


def add_flags(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], ServerSettings]:
    """Add the flags `--server.*`.

    Returns:
        What makes the settings out of the parsed arguments and the environment. It raises PifaError, naming
        the flag or variable, what was expected and what was found.
    """
    source: CliSettingsSource[ServerSettings] = CliSettingsSource(
        ServerSettings,
        root_parser=parser,
        cli_prefix="server",
        cli_kebab_case=True,
        cli_implicit_flags=True,
    )

    def read(arguments: argparse.Namespace) -> ServerSettings:
        try:
            return ServerSettings(_cli_settings_source=source(parsed_args=arguments))  # type: ignore[call-arg]
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            raise PifaError(
                f"--server.{name.replace('_', '-')} or {ENV_PREFIX}{name.upper()}: {first['msg']}, "
                f"found {first['input']!r}."
            ) from error

    return read
