"""Which of the kernels that are built is the fastest for a problem: all that take it, in each of their settings, are
checked against the usual one and timed in turn with it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from numpy.linalg import norm

from .. import _core
from ..bench import exact
from ..bench.arrays import Arrays, decode, make
from ..bench.calls import first, ours
from ..bench.cases import Case, parse
from ..bench.stage import Stage
from ..bench.statistics import ratio
from ..bench.timing import FEWEST_ROUNDS, Contender, Plan, take_rounds
from .files import Entry, key_of

#: of larger problems the reference kernels are never the fastest, and not worth waiting for
REFERENCE_FLOPS = 1e9
#: more than so many times the usual kernel's time: not worth more rounds
HOPELESS = 3.0
#: how much nearer to float64 the usual kernel may be
LEAST_ERROR, MOST_ERRORS = 1e-5, 2.0
#: how far two right results may lie apart, by dtype: what rounding makes of them, and some more
APART = {"float64": 1e-9, "float32": 1e-4, "float16": 5e-3}
APART_COARSE = 4e-2
#: a gain that counts
LEAST_GAIN = 1.01


@dataclass
class Finding:
    """What was found for one problem."""

    line: str  #: canonical, without a seed
    device_name: str
    usual: str  #: the kernel that runs where nothing is tuned
    kernel: str  #: the fastest, as `kernel=` takes it; the usual one where none beats it by more than the noise
    gain: float = 1.0  #: the usual kernel's time over this one's: the median over rounds
    seconds: dict[str, float] = field(default_factory=dict)  #: median time of a call, by kernel
    refused: dict[str, str] = field(default_factory=dict)  #: kernels that were not timed, and why

    @property
    def entry(self) -> Entry | None:
        """The line of a file of tuned kernels; None where the usual kernel is the best."""
        if self.kernel == self.usual:
            return None
        note = f"{self.gain:.2f} times as fast as {self.usual}: {self.seconds[self.kernel] * 1e6:.4g} us"
        return Entry(self.device_name, self.line, self.kernel, note)


def tune(line: str, stage: Stage, seconds: float, tell: Callable[[str], None] = lambda kernel: None) -> Finding:
    """`seconds` are those of the timing; `tell` hears which kernel is tried. Raises ValueError for a line that cannot
    be read or that no inputs are made for, Unsupported where no kernel takes it."""
    case = parse(line)
    words = _core.kernel_choices(case.line, stage.cuda, stage.index)
    if not words:
        raise _core.Unsupported(_core.explain_line(case.line, stage.cuda, stage.index))
    finding = Finding(key_of(case.line), stage.info.name, words[0], words[0])
    try:
        with stage.current():
            _compare(finding, case, words, stage, seconds, tell)
    finally:
        gc.collect()
        stage.forget()
    return finding


def _compare(
    finding: Finding, case: Case, words: list[str], stage: Stage, seconds: float, tell: Callable[[str], None]
) -> None:
    sets = [make(case, stage.maker, results=True) for _ in range(stage.copies(case.bytes))]
    judge = _Judge(case, sets[0], stage)
    contenders: list[Contender] = []
    for word in words:
        if word.endswith(".reference") and word != words[0] and case.flops > REFERENCE_FLOPS:
            finding.refused[word] = "a reference kernel, and the problem is large"
            continue
        tell(word)
        try:
            calls = [ours(case, arrays, stage.stream, word) for arrays in sets]
            why = judge.objection(calls[0])
            for call in calls[1:]:
                call()
            stage.wait()
            contender = stage.contender(word, calls, torchs=False)
        except (RuntimeError, MemoryError, ValueError) as error:
            why = str(error).splitlines()[0]
        if why:
            finding.refused[word] = why
        else:
            contenders.append(contender)
    if not contenders:
        raise RuntimeError(f'"{case.line}": no kernel gave a right result: {finding.refused}')
    _time(finding, contenders, stage, seconds)


class _Judge:
    """Whether a kernel's results are right: as near to float64 as those of the first that it sees."""

    def __init__(self, case: Case, arrays: Arrays, stage: Stage) -> None:
        self._sample = exact.sample(case, arrays, stage.maker)
        self._stage = stage
        self._first: Any = None

    def objection(self, call: Callable[[], Any]) -> str:
        result = first(call())
        self._stage.wait()
        if self._sample:
            error = self._sample.error(result, "bhsd")
            limit = error if self._first is None else max(self._first * MOST_ERRORS, LEAST_ERROR)
            self._first = error if self._first is None else self._first
        else:  # for words that are not done again exactly
            values = decode(self._stage.maker.host(result), result.dtype).ravel()
            self._first = values if self._first is None else self._first
            error = float(norm(values - self._first) / max(norm(self._first), 1e-30))
            limit = APART.get(result.dtype, APART_COARSE)
        return "" if error <= limit else f"wrong: its error is {error:.1e}, at most {limit:.1e} is allowed"


def _time(finding: Finding, contenders: list[Contender], stage: Stage, seconds: float) -> None:
    usual = contenders[0]
    take_rounds(contenders, stage.clock, Plan(1, FEWEST_ROUNDS, 0.0))
    limit = HOPELESS * min(min(contender.samples) for contender in contenders)
    for slow in [c for c in contenders if c is not usual and min(c.samples) > limit]:
        finding.seconds[slow.name] = min(slow.samples)
        contenders.remove(slow)
    take_rounds(contenders, stage.clock, Plan(2, 1000, seconds))
    gains = {contender.name: ratio(usual.samples, contender.samples) for contender in contenders}
    for contender in contenders:
        finding.seconds[contender.name] = sorted(contender.samples)[len(contender.samples) // 2]
    best = max(contenders, key=lambda contender: gains[contender.name]["median"])
    finding.usual = usual.name
    finding.kernel = usual.name
    if gains[best.name]["low"] > 1 and gains[best.name]["median"] >= LEAST_GAIN:
        finding.kernel, finding.gain = best.name, gains[best.name]["median"]
