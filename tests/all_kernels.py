"""Every kernel of this build: the tests of features run each one that takes the problem, not the chosen one alone."""

from __future__ import annotations

from functools import cache

import flashcore as fc

LINES = [f"{phase} fp16 b1 q1 k64 h1 d64" for phase in ("fwd", "bwd", "decode")]


@cache
def names(device: str) -> tuple[str, ...]:
    """The names of a device's kernels, in the order they are asked, as explain() lists them."""
    found = {}
    for line in LINES:
        text = fc.explain(line, device=device)
        found[text.partition("kernel:")[2].split()[0]] = None
        for other in text.partition("others:\n")[2].splitlines():
            found[other.strip().partition(":")[0]] = None
    return tuple(found)


def each(device: str, call):
    """(name, call(kernel=name)) for each kernel that takes the problem. At least one must."""
    answers = []
    for name in names(device):
        try:
            answers.append((name, call(kernel=name)))
        except fc.Unsupported:
            continue
    assert answers, f"none of {', '.join(names(device))} takes the problem"
    return answers
