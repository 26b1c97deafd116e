"""The form of a result file, and the first thing in a file that is not of this form."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .cases import parse


@dataclass(frozen=True)
class Kind:
    """A single value."""

    words: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Each:
    """An object of any names, whose values are of one form."""

    form: Any


@dataclass(frozen=True)
class Maybe:
    """A form, or null."""

    form: Any


def _is_number(value: Any) -> bool:
    is_small = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return is_small or isinstance(value, float)


def _is_line(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(parse(value))
    except ValueError:
        return False


ANY = Kind("anything", lambda _: True)
TEXT = Kind("text", lambda value: isinstance(value, str))
LINE = Kind("a problem line", _is_line)
NUMBER = Kind("a number", _is_number)
ABOVE_0 = Kind("a number above 0", lambda value: _is_number(value) and 0 < value <= sys.float_info.max)

#: a name with a ? may be missing; names that are not told may be there
RESULT: dict[str, Any] = {"us": ABOVE_0} | {f"us_{name}?": ABOVE_0 for name in ("low", "high", "min", "max")}
RESULT |= {f"us_{name}?": NUMBER for name in ("mean", "std", "p50", "p90", "p95", "p99")}
RESULT |= {"kernel?": TEXT, "error?": Maybe(NUMBER), "host_us?": Maybe(NUMBER)}
CASE: dict[str, Any] = {
    "line": LINE,
    "kernel?": TEXT,
    "best_peer?": TEXT,
    "ratio_to_best_peer?": Maybe(ABOVE_0),
    "results": Each(RESULT),
    "failures?": Each(TEXT),
}
FILE: dict[str, Any] = {
    "machine": Each(ANY),
    "settings": Each(ANY),
    "ceilings": Maybe({"matmul_tflops": Each(ABOVE_0), "copy_gbs": ABOVE_0}),
    "cases": [CASE],
}


def check(value: Any, form: Any = FILE, where: str = "") -> None:
    """Raises ValueError for the first thing that is not of the form: where it stands, what it is, what it should be."""
    if isinstance(form, Maybe):
        if value is not None:
            check(value, form.form, where)
    elif isinstance(form, Kind):
        _expect(form.holds(value), value, form.words, where)
    elif isinstance(form, list):
        _expect(isinstance(value, list), value, "a list", where)
        for index, item in enumerate(value):
            check(item, form[0], f"{where}[{index}]")
    else:
        _expect(isinstance(value, dict), value, "an object", where)
        parts = {name: form.form for name in value} if isinstance(form, Each) else _present(form, value, where)
        for name, part in parts.items():
            check(value[name], part, f"{where}.{name}" if where else name)


def _present(form: dict[str, Any], value: dict[str, Any], where: str) -> dict[str, Any]:
    """The forms of the names that are there. Raises ValueError for one that may not be missing."""
    for name in form:
        if not name.endswith("?") and name not in value:
            raise ValueError(f'{where or "it"} has no "{name}"')
    return {name.removesuffix("?"): part for name, part in form.items() if name.removesuffix("?") in value}


def _expect(holds: bool, value: Any, words: str, where: str) -> None:
    if not holds:
        text = json.dumps(value)
        raise ValueError(f"{where or 'it'} is {text if len(text) <= 60 else text[:60] + '…'}, not {words}")
