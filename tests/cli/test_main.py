"""The frame of the command line: exit codes, errors, and commands that load only when they are invoked."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from pifa_vllm import __version__, cli
from pifa_vllm.errors import CheckpointError
from tests.conftest import Twins

Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a command `probe` in place of all others."""

    def put(run: Callable[[argparse.Namespace], int], **defaults: object) -> None:
        def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
            parser = subparsers.add_parser("probe")
            parser.add_argument("where", nargs="?")
            parser.set_defaults(run=run, **defaults)

        module = ModuleType("pifa_vllm.cli.probe")
        module.add_parser = add_parser
        monkeypatch.setitem(sys.modules, "pifa_vllm.cli.probe", module)
        monkeypatch.setattr(cli, "COMMANDS", {"probe": "test", "absent": "never imported"})

    return put


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") == 0
    listed = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"\n    {name} " in listed


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_its_own_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(name, "--help") == 0
    assert f"usage: pifa-vllm {name}" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from pifa_vllm.cli import COMMANDS, main\n"
        "heavy = {'torch', 'numpy', 'transformers', 'vllm', 'rich'}\n"
        "others = [name for name in COMMANDS if name != 'serve']\n"
        "for arguments in [['--help'], *([name, '--help'] for name in [*others, 'serve'])]:\n"
        "    try:\n"
        "        main(arguments)\n"
        "    except SystemExit as left:\n"
        "        assert left.code == 0\n"
        # The flags of the server are a pydantic model's: only `serve` itself may pay for that.
        "    found = (heavy | ({'pydantic'} if arguments[0] != 'serve' else set())) & set(sys.modules)\n"
        "    assert not found, (arguments, found)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"pifa-vllm {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["mystery"], ["--mystery"], ["inspect"], ["inspect", "a", "b"]])
def test_wrong_usage_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*arguments) == 2
    assert "usage: pifa-vllm" in capsys.readouterr().err


def test_the_code_of_the_command_is_that_of_the_program(install: Install) -> None:
    install(lambda args: 7 if args.where == "here" and args.extra == [] else 1)
    assert cli.main(["probe", "here"]) == 7


def test_unknown_arguments_are_an_error(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install(lambda _: 0)
    assert exit_code("probe", "--max-num-seqs", "4") == 2
    message = capsys.readouterr().err
    assert "usage: pifa-vllm probe" in message
    assert "unrecognized arguments: --max-num-seqs" in message


def test_unless_the_command_takes_them(install: Install) -> None:
    seen: list[list[str]] = []
    install(lambda args: seen.append(args.extra) or 0, accepts_extra=True)
    assert cli.main(["probe", "dir", "--max-num-seqs", "4", "--flag", "-x"]) == 0
    assert seen == [["--max-num-seqs", "4", "--flag", "-x"]]


def test_errors_for_the_user_are_one_paragraph(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: argparse.Namespace) -> int:
        raise CheckpointError("file: tensor: expected 1, found 2.")

    install(fail)
    assert cli.main(["probe"]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: file: tensor: expected 1, found 2.\n")


def test_packages_that_only_benchmarks_need(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise ModuleNotFoundError(f"No module named {args.where!r}", name=args.where)

    install(fail)
    assert cli.main(["probe", "triton"]) == 1
    assert capsys.readouterr().err == "error: this needs triton (pip install 'pifa-vllm[bench]').\n"
    with pytest.raises(ModuleNotFoundError):
        cli.main(["probe", "torch"])


def test_ctrl_c_is_130(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    install(interrupt)
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_bugs_keep_their_traceback(install: Install) -> None:
    install(lambda _: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["probe"])


def test_a_reader_who_leaves_is_no_bug(twins: Twins) -> None:
    code = f"import sys; from pifa_vllm.cli import main; sys.exit(main(['inspect', {str(twins.pifa)!r}, '--json']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate()
    assert (process.returncode, err) == (141, b"")
