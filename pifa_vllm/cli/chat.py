"""`pifa-vllm chat`: talk to a running server in the terminal."""

from __future__ import annotations

import argparse
import sys


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser("chat", description="Talk to a running OpenAI-compatible server.")
    parser.add_argument("--url", default="http://localhost:8000", help="of the server (default: %(default)s)")
    parser.add_argument("--model", help="served name (default: the server's first model)")
    parser.add_argument("--api-key", default="none", help="if the server asks for one")
    parser.add_argument("--max-tokens", type=int, default=512, help="per answer (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read lines, stream answers; end at the end of the input."""
    from pifa_vllm.errors import PifaError

    try:
        from httpx import HTTPError
        from openai import APIConnectionError, OpenAI, OpenAIError
    except ModuleNotFoundError as error:
        raise PifaError(
            "openai: expected the client library, found none. Install it with: pip install openai"
        ) from error

    client = OpenAI(base_url=f"{args.url.rstrip('/')}/v1", api_key=args.api_key, max_retries=0)
    history: list[dict[str, str]] = []
    try:
        model = args.model or next((x.id for x in client.models.list().data), None)
        if model is None:
            raise PifaError(
                f"{args.url}: expected a server of at least one model, found none; name one by --model."
            )
        print(f"{model} at {args.url}; an empty line or Ctrl-D ends the chat", file=sys.stderr)
        while line := _read_line():
            history.append({"role": "user", "content": line})
            answer = []
            stream = client.chat.completions.create(
                model=model, messages=history, max_tokens=args.max_tokens, stream=True
            )
            for event in stream:
                piece = event.choices[0].delta.content if event.choices else None
                if piece:
                    answer.append(piece)
                    print(piece, end="", flush=True)
            print()
            history.append({"role": "assistant", "content": "".join(answer)})
    except (APIConnectionError, HTTPError) as error:
        # Not every version of the client wraps the connection that breaks in the middle of an answer.
        what = "the connection broke off" if history else "no server answers there"
        raise PifaError(f"{args.url}: {what} ({error}). Start one with `pifa-vllm serve DIR`.") from error
    except OpenAIError as error:
        raise PifaError(f"{args.url}: the server refused the request ({error}).") from error
    return 0


def _read_line() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
