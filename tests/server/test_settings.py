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
    monkeypatch.setenv("PIFA_SERVER_MAX_VALUES", "7")
    monkeypatch.setenv("PIFA_SERVER_ADMIN_ROUTES", "true")
    assert (read().max_values, read().admin_routes) == (7, True)
    settings = read("--server.max-values", "3", "--no-server.admin-routes", "--server.hang-timeout", "1.5")
    assert (settings.max_values, settings.admin_routes, settings.hang_timeout) == (3, False, 1.5)


def test_another_process_reads_the_same(monkeypatch):
    hosts = ("--server.allowed-hosts", "a.example", "--server.allowed-hosts", "b.example")
    settings = read(
        "--server.max-values", "3", "--server.public-metrics", "--server.log-format", "json", *hosts
    )
    assert settings.allowed_hosts == ["a.example", "b.example"]
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert ServerSettings() == settings


@pytest.mark.parametrize(
    "flags",
    [
        ("--server.max-values", "0"),
        ("--server.token-timeout", "soon"),
        ("--server.hang-timeout", "inf"),
        ("--server.probe-interval", "nan"),
        ("--server.log-format", "xml"),
    ],
)
def test_wrong_values_are_named(flags):
    with pytest.raises(PifaError, match=rf"{flags[0]} or PIFA_SERVER_.*found '{flags[1]}'"):
        read(*flags)


def test_wrong_variables_are_named(monkeypatch):
    monkeypatch.setenv("PIFA_SERVER_MAX_VALUES", "many")
    with pytest.raises(PifaError, match=r"PIFA_SERVER_MAX_VALUES: .*found 'many'"):
        read()


def test_json_logs_are_vllms():
    assert read().flags() == []
    assert read("--server.log-format", "json").flags() == ["--logging-config.formatter", "json"]
