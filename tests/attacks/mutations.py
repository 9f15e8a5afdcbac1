"""Random changes to the bytes of a JSON file; each follows from a seed alone."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_STRING = re.compile(rb'"[^"\\]{1,80}"')
_VALUES = (
    *(
        b"null",
        b"true",
        b"false",
        b"{}",
        b"[]",
        b'""',
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"1e999",
        b"-0",
        b"0",
    ),
    *(
        b"-1",
        b"1",
        b"2",
        b"3",
        b"0.5",
        b"1e9",
        b"2147483647",
        b"2147483648",
        b"4294967296",
        b"9223372036854775808",
    ),
    *(
        b"10000000",
        b"1" + b"0" * 100,
        b"9" * 5000,
        b'"\\ud800"',
        b'"a\\u0000b"',
        b"[" * 300,
        b'{"a":' * 300,
        b"//",
    ),
)


def mutate(content: bytes, draw: random.Random) -> bytes:
    """Change something one to three times."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        content = draw.choice(_MUTATIONS)(content, draw)
    return content


def _span(content: bytes, draw: random.Random, most: int = 64) -> tuple[int, int]:
    start = draw.randrange(len(content) + 1)
    return start, min(len(content), start + draw.randint(1, most))


def _flip(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(max(1, len(content)))
    return (
        content[:place]
        + bytes(b ^ 1 << draw.randrange(8) for b in content[place : place + 1])
        + content[place + 1 :]
    )


def _set(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(max(1, len(content)))
    return content[:place] + draw.randbytes(1) + content[place + 1 :]


def _delete(content: bytes, draw: random.Random) -> bytes:
    start, end = _span(content, draw)
    return content[:start] + content[end:]


def _insert(content: bytes, draw: random.Random) -> bytes:
    start, _ = _span(content, draw)
    return content[:start] + draw.choice((draw.randbytes(draw.randint(1, 8)), *_VALUES)) + content[start:]


def _repeat(content: bytes, draw: random.Random) -> bytes:
    start, end = _span(content, draw, 200)
    return content[:end] + content[start:end] * draw.choice((1, 1, 50)) + content[end:]


def _move(content: bytes, draw: random.Random) -> bytes:
    start, end = _span(content, draw)
    rest = content[:start] + content[end:]
    to = draw.randrange(len(rest) + 1)
    return rest[:to] + content[start:end] + rest[to:]


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content) + 1)]


def _replace(pattern: re.Pattern[bytes]) -> Callable[[bytes, random.Random], bytes]:
    """Put another value, or another of the file's own, in the place of one."""

    def replace(content: bytes, draw: random.Random) -> bytes:
        found = list(pattern.finditer(content))
        if not found:
            return content
        one, other = draw.choice(found), draw.choice(found)
        new = draw.choice((draw.choice(_VALUES), other[0]))
        return content[: one.start()] + new + content[one.end() :]

    return replace


def _field(content: bytes, draw: random.Random) -> bytes:
    """Replace, remove or rename a field anywhere in the JSON, which stays JSON."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return content
    places: list[tuple[Any, Any]] = []
    level = [value]
    while level:
        outer = level.pop()
        inner = (
            outer.items() if isinstance(outer, dict) else enumerate(outer) if isinstance(outer, list) else ()
        )
        places += [(outer, key) for key, _ in inner]
        level += [found for _, found in inner]
    if not places:
        return content
    # Fields on top are fewer than those below, and matter as much.
    outer, key = draw.choice(draw.choice((places, [place for place in places if place[0] is value])))
    new = draw.choice((*_PLAIN, draw.choice(places)[1], _other(outer[key], draw), _other(outer[key], draw)))
    if isinstance(outer, dict) and draw.random() < 0.3:
        old = outer.pop(key)
        if draw.random() < 0.5:
            outer[f"{key}{draw.choice('x_0.')}" if draw.random() < 0.5 else str(draw.choice(places)[1])] = old
    else:
        outer[key] = new
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _other(value: Any, draw: random.Random) -> Any:
    """A value of the same type nearby."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return draw.choice((value + 1, value - 1, value * 2, -value, value // 2, float(value), value * 10**6))
    if isinstance(value, str):
        return draw.choice((value[:-1], f"{value}x", value.upper(), value * 2, ""))
    return draw.choice(([value], type(value)(), list(value)))


_PLAIN = (
    None,
    True,
    0,
    -1,
    1,
    2,
    7,
    0.5,
    2**31,
    10**7,
    10**18,
    1e300,
    "",
    "x",
    "model.safetensors",
    [],
    {},
    [1],
    {"a": 1},
)
_MUTATIONS = (
    *(_flip, _set, _delete, _insert, _repeat, _move, _cut),
    *(_field, _field, _field, _field, _field),
    *(_replace(_NUMBER), _replace(_NUMBER), _replace(_NUMBER), _replace(_STRING), _replace(_STRING)),
)
