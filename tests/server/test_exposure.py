"""Without an API key a server is this machine's alone, unless it is said to be open."""

from __future__ import annotations

import argparse

import pytest

pytest.importorskip("pydantic_settings")

from pifa_vllm_server.exposure import check_exposure
from pifa_vllm_server.settings import ServerSettings

from pifa_vllm.errors import PifaError


def exposed(host, *, keys=(), uds=None, **settings):
    arguments = argparse.Namespace(host=host, uds=uds)
    check_exposure(arguments, keys, ServerSettings(**settings))
    return arguments.host


def test_without_a_key_this_machine_only():
    assert exposed(None) == "127.0.0.1"
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        assert exposed(host) == host
    for host in ("0.0.0.0", "::", "10.0.0.1", "gpu-box"):
        with pytest.raises(PifaError, match=rf"--host {host}: expected an API key.*--server\.open"):
            exposed(host)
        with pytest.raises(PifaError):
            exposed(host, keys=[""])
        assert exposed(host, open=True) == host
        assert exposed(host, keys=["k"]) == host
    assert exposed(None, keys=["k"]) is None
    assert exposed(None, open=True) is None
    assert exposed(None, uds="/run/a.sock") is None
