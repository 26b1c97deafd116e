"""`demo`: attention on a real sentence: is it right, what ran, how fast, and what the heads look at."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from .. import attention, explain, plan
from . import oracle, picture, sentence
from .machine import Machine, choose

TIMED_SHAPE = (1, 8, 512, 64)  # batch, heads, seqlen, head_dim


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo", help="attention on a real sentence, checked, timed and drawn"
    )
    parser.add_argument("--sentence", default=sentence.DEFAULT, help="1 to 64 words")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--kernel", help="a kernel by name instead of the best")
    parser.add_argument("--png", metavar="FILE", help="draw into a PNG file (needs matplotlib) instead of here")
    return parser


def run(arguments: argparse.Namespace) -> int:
    console = Console(highlight=False)
    machine = choose(arguments.device)
    if machine.note:
        console.print(f"note: {machine.note}", style="yellow")
    embedded = sentence.embed(arguments.sentence)
    console.print(f"flashcore on {machine.device} ({machine.name()})", style="bold")
    console.print(f'sentence: "{" ".join(embedded.words)}"', markup=False)

    weights, checks = _attend(machine, embedded, arguments.kernel)
    checks.append(_timed_check(console, machine, arguments.kernel))
    passed = _report(console, checks)
    _draw(console, machine, embedded.words, weights, arguments.png)
    return 0 if passed else 1


def _attend(machine: Machine, embedded: sentence.Embedded, kernel: str | None) -> tuple[Any, list[tuple[str, Any]]]:
    """The attention weights of the sentence, and how the library's results compare with the oracle's.

    With the identity as values, attention returns its own weights.
    """
    words = len(embedded.words)
    identity = np.broadcast_to(np.eye(words, dtype=np.float16), (1, len(sentence.HEADS), words, words)).copy()
    q, k, v, eye = map(machine.to_device, (embedded.q, embedded.k, embedded.v, identity))
    out = machine.to_host(attention(q, k, v, kernel=kernel))
    weights = machine.to_host(attention(q, k, eye, kernel=kernel))
    checks = [
        ("the sentence, values", oracle.compare(out, oracle.attention(embedded.q, embedded.k, embedded.v))),
        ("the sentence, weights", oracle.compare(weights, oracle.attention(embedded.q, embedded.k, identity))),
    ]
    return weights[0].astype(np.float64), checks


def _timed_check(console: Console, machine: Machine, kernel: str | None) -> tuple[str, Any]:
    rng = np.random.default_rng(42)
    host = [rng.standard_normal(TIMED_SHAPE).astype(np.float16) for _ in range(3)]
    q, k, v = map(machine.to_device, host)
    out = attention(q, k, v, kernel=kernel)
    planned = plan(q, k, v, out=out, kernel=kernel)
    console.print(f"\nwhat runs, on random numbers of shape {TIMED_SHAPE}:")
    for line in explain(q, k, v, kernel=kernel).splitlines()[:4]:
        console.print(f"  {line}", markup=False)
    seconds = machine.median_seconds(lambda: planned(q, k, v, out=out))
    batch, heads, seqlen, head_dim = TIMED_SHAPE
    tera = 4 * batch * heads * seqlen**2 * head_dim / seconds / 1e12
    console.print(f"  median:    {seconds * 1e3:.3f} ms, {tera:.3g} TFLOP/s")
    return "the random numbers", oracle.compare(machine.to_host(out), oracle.attention(*host))


def _report(console: Console, checks: list[tuple[str, Any]]) -> bool:
    table = Table("checked against float64", f"max ≤ {oracle.MAX_ALLOWED:g}", f"mean ≤ {oracle.MEAN_ALLOWED:g}", "")
    for name, comparison in checks:
        verdict = "[green]pass[/]" if comparison.passed else "[bold red]FAIL[/]"
        table.add_row(name, f"{comparison.largest:.2e}", f"{comparison.mean:.2e}", verdict)
    console.print()
    console.print(table)
    return all(comparison.passed for _, comparison in checks)


def _draw(console: Console, machine: Machine, words: list[str], weights: Any, path: str | None) -> None:
    names = [head.name for head in sentence.HEADS]
    if path is not None:
        try:
            picture.save(path, words, names, weights, f"flashcore on {machine.device}: attention weights")
            console.print(f"attention weights, head by head: {path}", markup=False)
            return
        except ImportError:
            console.print("no matplotlib (pip install 'flashcore[plot]'), so here:", style="yellow", markup=False)
    console.print("attention weights, head by head: a row is a word, a column a word it looks at")
    picture.show(console, words, names, weights)
