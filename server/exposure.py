"""Whom a server without an API key listens to."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterable
from ipaddress import ip_address

from pifa_vllm_server.settings import ServerSettings

from pifa_vllm.errors import PifaError

logger = logging.getLogger("vllm.pifa_vllm_server")


def check_exposure(arguments: argparse.Namespace, keys: Iterable[str], settings: ServerSettings) -> None:
    """Without a key, listen to this machine only, unless the command line says that the server is open.

    Args:
        arguments: of `vllm serve`; `host` is set where nothing was said.
        keys: API keys.
        settings: `open`.

    Raises:
        PifaError: if it would listen to others.
    """
    if any(keys) or settings.open or arguments.uds:
        return
    arguments.host = arguments.host or "127.0.0.1"
    try:
        local = ip_address(arguments.host).is_loopback
    except ValueError:
        local = arguments.host == "localhost"
    if not local:
        raise PifaError(
            f"--host {arguments.host}: expected an API key (--api-key or VLLM_API_KEY) where others than this "
            "machine can reach the server, found none. --server.open serves everybody without one."
        )


def warn_of_what_is_open(has_key: bool) -> None:
    """Say at the start what nobody guards here."""
    if not has_key:
        logger.warning("no API key: whoever reaches the port may use the model and read the metrics")
    if "FORWARDED_ALLOW_IPS" not in os.environ:
        logger.info(
            "no reverse proxy was declared (FORWARDED_ALLOW_IPS): sizes of headers and bodies, slow clients and "
            "the time that a request may take are not limited. deploy/proxy has one that does."
        )
