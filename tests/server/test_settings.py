"""Flags and environment variables become settings, and settings reach other processes."""

from __future__ import annotations

import argparse

import pytest

pytest.importorskip("pydantic_settings")

from pifa_vllm_server.settings import ServerSettings, add_flags

from pifa_vllm.errors import PifaError


def read(*flags):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    settings = add_flags(parser)
    arguments, extra = parser.parse_known_args(flags)
    assert not extra
    return settings(arguments)


def test_flags_win_over_the_environment(monkeypatch):
    monkeypatch.setenv("PIFA_SERVER_MAX_N", "7")
    monkeypatch.setenv("PIFA_SERVER_ADMIN_ROUTES", "true")
    assert (read().max_n, read().admin_routes) == (7, True)
    settings = read("--server.max-n", "3", "--no-server.admin-routes", "--server.request-timeout", "1.5")
    assert (settings.max_n, settings.admin_routes, settings.request_timeout) == (3, False, 1.5)


def test_another_process_reads_the_same(monkeypatch):
    settings = read("--server.max-n", "3", "--server.public-metrics", "--server.drain-timeout", "0")
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert ServerSettings() == settings


@pytest.mark.parametrize("flags", [("--server.max-n", "0"), ("--server.request-timeout", "soon")])
def test_wrong_values_are_named(flags):
    with pytest.raises(PifaError, match=rf"{flags[0]} or PIFA_SERVER_.*found '{flags[1]}'"):
        read(*flags)


def test_wrong_variables_are_named(monkeypatch):
    monkeypatch.setenv("PIFA_SERVER_MAX_N", "many")
    with pytest.raises(PifaError, match=r"PIFA_SERVER_MAX_N: .*found 'many'"):
        read()
