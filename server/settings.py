"""What the server can be told, by flags of `pifa-vllm serve` or by the environment."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict

from pifa_vllm.errors import PifaError

ENV_PREFIX = "PIFA_SERVER_"


class ServerSettings(BaseSettings):
    """Settings beside vLLM's own flags, which stay as they are.

    A field such as `hang_timeout` is the flag `--server.hang-timeout` and the environment variable
    `PIFA_SERVER_HANG_TIMEOUT`; the flag wins.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, allow_inf_nan=False)

    open: bool = Field(False, description="without an API key, serve whoever reaches the port")
    allowed_hosts: list[str] = Field([], description="names of this server, where it has no API key")
    public_metrics: bool = Field(False, description="leave /metrics open where an API key is set")
    admin_routes: bool = Field(False, description="open vLLM's routes that change or inspect the engine")
    dashboard: bool = Field(True, description="serve /dashboard")
    max_body_bytes: int = Field(4 << 20, ge=1, description="largest request body, uploads of files apart")
    max_values: int = Field(
        16384, ge=1, description="values in a body of JSON, at all levels, token ids apart"
    )
    probe_interval: float = Field(15.0, gt=0, description="seconds without tokens until one is generated")
    hang_timeout: float = Field(
        30.0, gt=0, description="seconds in which the engine must then use a processor"
    )
    token_timeout: float = Field(600.0, gt=0, description="seconds in which a token must then come")
    log_format: Literal["text", "json"] = Field(
        "text", description="of all log lines; json from vLLM 0.32 on"
    )

    def environment(self) -> dict[str, str]:
        """The variables from which another process reads the same settings."""
        values = self.model_dump()
        return {
            f"{ENV_PREFIX}{n.upper()}": v if isinstance(v, str) else json.dumps(v) for n, v in values.items()
        }

    def flags(self) -> list[str]:
        """What vLLM is told for them."""
        return ["--logging-config.formatter", "json"] if self.log_format == "json" else []


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
