"""What is measured: problem lines, by name, from a file or as they stand, and how much work each of them is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .. import _core

EXAMPLE = "fwd bf16 b2 q4096 k4096 h32/8 d128 causal"
MISSION = "fwd fp16 b1 q512 k512 h8 d64"
#: batch, heads, seqlen, head_dim: small calls, where the launch counts as much as the work
SMALL = ((1, 1, 32, 64), (1, 2, 64, 64), (1, 4, 128, 64), (4, 8, 256, 64))
TOKENS = 16384
HIDDEN = 2048
#: the side of the blocks of a boolean mask: every second one is false, as on a chessboard
MASK_BLOCK = 256
PHASES = ("fwd", "bwd", "decode")
ITEM_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8, "e4m3": 1}
MASKS = ("", " causal")


def _square(phase: str, dtype: str, batch: int, seqlen: int, heads: int, dim: int, mask: str = "") -> str:
    return f"{phase} {dtype} b{batch} q{seqlen} k{seqlen} h{heads} d{dim}{mask}"


def _sweep(phase: str) -> list[str]:
    """So many tokens of so wide a model, from many short sequences to one long one."""
    return [
        _square(phase, "bf16", TOKENS // seqlen, seqlen, HIDDEN // dim, dim, mask)
        for dim in (64, 128, 256)
        for seqlen in (512, 2048, 8192, 16384)
        for mask in MASKS
    ]


_small = [_square("fwd", "fp16", batch, seqlen, heads, dim) for batch, heads, seqlen, dim in SMALL]
_gqa = "fwd bf16 b2 q8192 k8192 h32/8 d128 causal"
_gpu_decode = [
    f"decode bf16 b{batch} q1 k{keys} h{heads} d128{page}"
    for batch, keys in ((1, 8192), (16, 8192), (64, 8192), (1, 131072))
    for heads in ("32/8", "64/8")
    for page in ("", " page64")
]
#: by kind of device: the names, and the problem lines that each stands for
CASES: dict[str, dict[str, list[str]]] = {
    "cuda": {
        "mission": [MISSION],
        "small": _small,
        "training": _sweep("fwd") + _sweep("bwd"),
        "prefill": [f"fwd bf16 b1 q{s} k{s} h32/8 d128 causal" for s in (2048, 8192, 32768)]
        + ["fwd bf16 b1 q512 k8192 h32/8 d128 causal_br", "fwd bf16 b4 q4096 k4096 h32/8 d128 causal window1024,*"],
        "decode": _gpu_decode,
        "forward": [*_sweep("fwd"), _gqa, MISSION, *_small],
    },
    "cpu": {
        "mission": [MISSION],
        "small": _small,
        "training": [
            _square(phase, dtype, 1, seqlen, 8, 64, mask)
            for phase in ("fwd", "bwd")
            for dtype in ("fp32", "bf16")
            for seqlen in (512, 2048)
            for mask in MASKS
        ],
        "prefill": [f"fwd bf16 b1 q{s} k{s} h32/8 d128 causal" for s in (512, 2048)]
        + ["fwd bf16 b1 q64 k2048 h32/8 d128 causal_br"],
        "decode": [
            f"decode {dtype} b1 q1 k8192 h32/8 d128{page}" for dtype in ("fp32", "bf16") for page in ("", " page64")
        ],
        "forward": [
            _square("fwd", dtype, 1, s, 8, 64) for dtype in ("fp32", "bf16", "fp16") for s in (512, 1024, 2048)
        ],
    },
}
ALL = "all"


def names(kind: str) -> list[str]:
    return [*CASES[kind], ALL]


@dataclass(frozen=True)
class Case:
    """A problem line taken apart. Sizes as in the line; `words` are its other words and their values as text."""

    line: str
    phase: str
    dtype: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads_q: int
    heads_k: int
    head_dim: int
    head_dim_v: int
    words: dict[str, str] = field(compare=False)

    @property
    def decode(self) -> bool:
        return self.phase == "decode"

    @property
    def causal(self) -> str:
        """ "", "top_left" or "bottom_right": for square calls, where all are one, "top_left"."""
        if "causal" in self.words:
            return "bottom_right" if self.decode else "top_left"
        return "top_left" if "causal_tl" in self.words else "bottom_right" if "causal_br" in self.words else ""

    @property
    def window(self) -> tuple[int | None, int | None]:
        left, right = self.words.get("window", "*,*").split(",")
        return (None if left == "*" else int(left), None if right == "*" else int(right))

    def integer(self, word: str) -> int:
        return int(self.words.get(word, "0").rstrip("i"))

    def real(self, word: str) -> float:
        return float(self.words.get(word, "0"))

    @property
    def scale(self) -> float:
        return float(self.words["scale"]) if "scale" in self.words else self.head_dim**-0.5

    def lengths(self, letter: str) -> list[int]:
        """Rows of each sequence: of packed ones the first is the longest, and the others share the rest evenly."""
        longest = self.seqlen_q if letter == "q" else self.seqlen_k
        if "varlen" not in self.words:
            return [longest] * self.batch
        total = self.rows(letter)
        rest = max(self.batch - 1, 1)
        others = [(total - longest) // rest + (i < (total - longest) % rest) for i in range(self.batch - 1)]
        return [longest, *others][: self.batch]

    def rows(self, letter: str) -> int:
        """Those of all sequences."""
        if "varlen" in self.words:
            return int(self.words["varlen"].split("/")[0 if letter == "q" else -1])
        return self.batch * (self.seqlen_q if letter == "q" else self.seqlen_k)

    def check_memory(self, most: int) -> None:
        """Raises MemoryError where q, k, v and out alone are larger than that, and counting them would be, too."""
        heads = {"q": self.heads_q, "k": self.heads_k}
        numbers = sum(self.rows(x) * heads[x] * (self.head_dim + self.head_dim_v) for x in heads)
        if (needed := ITEM_BYTES[self.dtype] * numbers) > most:
            gib = (round(size / 2**30) for size in (needed, most))
            raise MemoryError("out of memory: q, k, v and out take {} GiB, the device has {}".format(*gib))

    def check_lengths(self) -> None:
        """Raises ValueError for totals that sequences of the longest length and shorter ones do not have."""
        for letter, longest in (("q", self.seqlen_q), ("k", self.seqlen_k)) if "varlen" in self.words else ():
            total, least, most = self.rows(letter), min(self.batch, 1) * longest, self.batch * longest
            if not least <= total <= most:
                raise ValueError(
                    f'"{self.line}": b{self.batch} {letter}{longest} are {least} to {most} rows together, not {total}'
                )

    @cached_property
    def pairs(self) -> int:
        """Query-key pairs that are seen, of one head, over the whole batch."""
        return sum(self._pairs(q, k) for q, k in zip(self.lengths("q"), self.lengths("k"), strict=True))

    def keys_of_rows(self, rows: Any, seqlen_q: int, seqlen_k: int) -> tuple[Any, Any]:
        """First and last key + 1 that each of these rows sees, by causal rule and window."""
        diagonal = rows + (0 if self.causal == "top_left" else seqlen_k - seqlen_q)
        left, right = self.window
        first = np.maximum(diagonal - left, 0) if left is not None else np.zeros_like(rows)
        reach = 0 if self.causal else right
        last = np.minimum(diagonal + reach + 1, seqlen_k) if reach is not None else np.full_like(rows, seqlen_k)
        return np.minimum(first, seqlen_k), np.maximum(last, np.minimum(first, seqlen_k))

    def _pairs(self, seqlen_q: int, seqlen_k: int) -> int:
        rows = np.arange(seqlen_q)
        first, last = self.keys_of_rows(rows, seqlen_q, seqlen_k)
        if "mask" not in self.words:
            return int((last - first).sum())
        even = np.concatenate([[0], np.cumsum(np.arange(seqlen_k) // MASK_BLOCK % 2 == 0)])
        seen = even[last] - even[first]
        return int(np.where(rows // MASK_BLOCK % 2 == 0, seen, last - first - seen).sum())

    @property
    def flops(self) -> float:
        """Two for each multiply-add of the products: q kᵀ and p v; backward those of the five products."""
        each = 3 * self.head_dim + 2 * self.head_dim_v if self.phase == "bwd" else self.head_dim + self.head_dim_v
        return 2.0 * self.heads_q * self.pairs * each

    @property
    def bytes(self) -> float:
        """The least that has to be moved: every input and output once, of keys and values those that are seen."""
        item, rows_q = ITEM_BYTES[self.dtype], self.rows("q")
        keys = 0
        for seqlen_q, seqlen_k in zip(self.lengths("q"), self.lengths("k"), strict=True):
            if seqlen_q:
                first, last = self.keys_of_rows(np.array([0, seqlen_q - 1]), seqlen_q, seqlen_k)
                keys += max(0, int(last[1] - first[0]))
        q, out = rows_q * self.heads_q * self.head_dim, rows_q * self.heads_q * self.head_dim_v
        kv = keys * self.heads_k * (self.head_dim + self.head_dim_v)
        if self.phase == "bwd":  # reads q, k, v, out, dout and lse; writes the gradients
            return float(item * (2 * q + 2 * out + 2 * kv) + 4 * rows_q * self.heads_q)
        out_item = 2 if self.dtype == "e4m3" else item
        return float(item * (q + kv) + out_item * out)


def parse(line: str) -> Case:
    """Raises ValueError: says which word cannot be read, and shows a line that can."""
    canonical = _core.canonical_problem_line(line)
    phase, dtype, *words = canonical.split()
    sizes: dict[str, int] = {}
    others: dict[str, str] = {}
    for word in words:
        match = re.fullmatch(r"([bqkhd])(\d+)(?:/(\d+))?", word)
        if match:
            name, first, second = match.groups()
            sizes[name], sizes[name + "2"] = int(first), int(second or first)
        else:
            name = re.match(r"out_\w+|[a-z_]+?(?=[\d*.-]|$)", word)
            key = name[0] if name else word
            others[key] = word[len(key) :]
    heads, dims = (sizes["h"], sizes["h2"]), (sizes["d"], sizes["d2"])
    return Case(canonical, phase, dtype, sizes["b"], sizes["q"], sizes["k"], *heads, *dims, others)


def lines_of(words: Sequence[str], kind: str) -> list[str]:
    """Canonical problem lines for the words of a command line: names of cases, lines, and @files of either.

    A line is one word, in quotes, or several that are a line together. The order is kept, doubles go. Raises
    ValueError.
    """
    return list(dict.fromkeys(line for text in _split(words, kind) for line in _lines(text, kind)))


def _split(words: Sequence[str], kind: str) -> Iterator[str]:
    """The cases among the words of a command line: a line may be one word, in quotes, or several."""
    stands_alone = [" " in word or word.startswith("@") or word in PHASES or word in names(kind) for word in words]
    at = 0
    while at < len(words):
        end = at + 1
        if words[at] in PHASES:  # "decode" is a name, too, if no line goes on behind it
            while end < len(words) and not stands_alone[end]:
                end += 1
        yield " ".join(words[at:end])
        at = end


def _lines(text: str, kind: str, inside: tuple[Path, ...] = ()) -> Iterator[str]:
    """`inside`: the files that the text stands in."""
    if text.startswith("@"):
        yield from _lines_of_file(Path(text[1:]), kind, inside)
    elif text == ALL:
        for lines in CASES[kind].values():
            yield from (parse(line).line for line in lines)
    elif text in CASES[kind]:
        yield from (parse(line).line for line in CASES[kind][text])
    elif " " not in text:
        raise ValueError(f'no case "{text}"; allowed: {", ".join(names(kind))}, @FILE, or a line such as "{EXAMPLE}"')
    else:
        yield parse(text).line


def _lines_of_file(path: Path, kind: str, inside: tuple[Path, ...]) -> Iterator[str]:
    """A case in each line; empty lines and what follows a # do not count."""
    if path.resolve() in inside:
        raise ValueError(f"@{path}: the file includes itself")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"@{path}: cannot be read: {error}") from None
    lines = [raw.partition("#")[0].strip() for raw in text.splitlines()]
    if not any(lines):
        raise ValueError(f"@{path}: there is no case in it")
    for number, line in enumerate(lines, start=1):
        if line:
            try:
                yield from _lines(line, kind, (*inside, path.resolve()))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
