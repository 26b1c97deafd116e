"""The picture of attention weights, head by head: in the terminal, or as a PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

_SHADES = " ░▒▓█"


def _cell(weight: float) -> tuple[str, str]:
    """Two characters and their colour: the shade tells the weight where there are no colours."""
    shade = _SHADES[min(int(weight * len(_SHADES)), len(_SHADES) - 1)]
    level = min(max(weight, 0.0), 1.0) ** 0.5
    red, green, blue = int(30 + 225 * level), int(34 + 170 * level), int(70 + 20 * level)
    colour = f"rgb({red},{green},{blue})"
    return shade * 2, f"{colour} on {colour}"


def _head(name: str, words: Sequence[str], weights: Any) -> Panel:
    width = min(max(map(len, words)), 12)
    text = Text(no_wrap=True)
    for word, row in zip(words, weights, strict=True):
        text.append(f"{word[:width]:>{width}} ")
        for weight in row:
            text.append(*_cell(float(weight)))
        text.append("\n")
    text.append(" " * (width + 1) + " ".join(word[0] for word in words), style="dim")
    return Panel(text, title=name, expand=False, padding=(0, 1))


def show(console: Console, words: Sequence[str], names: Sequence[str], weights: Any) -> None:
    """One panel per head: rows look, columns are looked at, darker to brighter from 0 to 1."""
    console.print(Columns([_head(name, words, head) for name, head in zip(names, weights, strict=True)]))


def save(path: str, words: Sequence[str], names: Sequence[str], weights: Any, title: str) -> None:
    """Writes the PNG. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    side = 2.2 + 0.17 * len(words)
    figure = Figure(figsize=(columns * side, rows * side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, name, head in zip(axes, names, weights, strict=False):
        image = axis.imshow(head, vmin=0, vmax=1, cmap="magma")
        axis.set_title(name, fontsize=10)
        axis.set_xticks(range(len(words)), words, rotation=90, fontsize=7)
        axis.set_yticks(range(len(words)), words, fontsize=7)
    figure.colorbar(image, ax=figure.axes, shrink=0.6, label="attention weight")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)
