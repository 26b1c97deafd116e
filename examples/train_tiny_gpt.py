#!/usr/bin/env python3
"""Train a small character GPT twice, with flashcore's attention and with torch's, and compare the loss curves.

    pip install flashcore torch matplotlib
    python examples/train_tiny_gpt.py

The text is Python's own language reference, what `help("topics")` shows, which comes with every Python; `--text` takes
another. Both models start from the same numbers and see the same batches, so that nothing but the attention differs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

try:
    import flashcore.torch
    import torch
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
    from torch import nn
    from torch.nn import functional as F
except ImportError as error:
    sys.exit(f"train_tiny_gpt: {error}\nit needs: pip install flashcore torch matplotlib")

CONTEXT, WIDTH, HEADS, LAYERS = 128, 128, 4, 4
APART, AVERAGED = 0.02, 20  # how far the two curves may part, averaged over so many steps: rounding grows in training

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
ATTENTION: dict[str, Attend] = {
    "flashcore": lambda q, k, v: flashcore.torch.attention(q, k, v, causal=True),
    "torch": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
}


class Block(nn.Module):
    """Attention, then a perceptron, each with a normalisation before it and a way around it."""

    def __init__(self, attend: Attend):
        super().__init__()
        self.attend = attend
        self.before_attention, self.before_perceptron = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.perceptron = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.before_attention(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.perceptron(self.before_perceptron(x))


class TinyGPT(nn.Module):
    """Characters to the scores of the next one: (batch, seqlen) to (batch, seqlen, characters)."""

    def __init__(self, characters: int, attend: Attend):
        super().__init__()
        self.character, self.place = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block(attend) for _ in range(LAYERS)))
        self.last = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters))
        for embedding in (self.character, self.place):
            nn.init.normal_(embedding.weight, std=0.05)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        return self.last(self.blocks(self.character(x) + self.place(places)))

    @torch.no_grad()
    def write(self, start: torch.Tensor, count: int) -> torch.Tensor:
        """`start` (seqlen) and `count` characters after it."""
        text = start
        for _ in range(count):
            scores = self(text[None, -CONTEXT:])[0, -1]
            text = torch.cat((text, torch.multinomial(F.softmax(scores / 0.8, dim=0), 1)))
        return text


@dataclass
class Text:
    """A text as the numbers of its characters."""

    alphabet: str
    numbers: torch.Tensor

    @classmethod
    def read(cls, file: Path | None) -> Text:
        if file is None:
            from pydoc_data.topics import topics

            text = "\n\n".join(topics.values())
        else:
            text = file.read_text(encoding="utf-8")
        alphabet = "".join(sorted(set(text)))
        return cls(alphabet, torch.tensor([*map({c: i for i, c in enumerate(alphabet)}.get, text)]))

    def batch(self, size: int, generator: torch.Generator) -> torch.Tensor:
        """(size, CONTEXT + 1) pieces from anywhere in the text."""
        starts = torch.randint(len(self.numbers) - CONTEXT, (size, 1), generator=generator)
        return self.numbers[starts + torch.arange(CONTEXT + 1)]

    def spell(self, numbers: torch.Tensor) -> str:
        return "".join(self.alphabet[i] for i in numbers.tolist())


def train(name: str, text: Text, chosen: argparse.Namespace, console: Console) -> tuple[TinyGPT, list[float], float]:
    """The trained model, its loss at every step, and the seconds it took."""
    torch.manual_seed(chosen.seed)
    model = TinyGPT(len(text.alphabet), ATTENTION[name]).to(chosen.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(chosen.seed)
    losses = []
    begin = time.perf_counter()
    for _ in track(range(chosen.steps), f"{name:9}", console=console, disable=not console.is_terminal):
        pieces = text.batch(chosen.batch, generator).to(chosen.device)
        loss = F.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    losses = torch.stack(losses).tolist()  # waits for the device
    return model, losses, time.perf_counter() - begin


def parted(curves: dict[str, list[float]]) -> float:
    """The most that the averaged curves are apart."""
    mine, theirs = map(torch.tensor, curves.values())
    return (mine - theirs).unfold(0, min(AVERAGED, len(mine)), 1).mean(1).abs().max().item()


def draw(curves: dict[str, list[float]], file: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit("train_tiny_gpt: --plot needs matplotlib: pip install matplotlib")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, losses), style in zip(
        curves.items(), ({"linewidth": 3, "alpha": 0.5}, {"linestyle": "--"}), strict=True
    ):
        axes.plot(losses, label=name, **style)
    axes.set(xlabel="step", ylabel="loss (nats a character)", title="A character GPT, trained with each attention")
    axes.legend()
    figure.savefig(file, dpi=150)


def show_curves(console: Console, curves: dict[str, list[float]]) -> None:
    table = Table("step", *curves, "apart")
    steps = len(curves["torch"])
    for step in sorted({*range(0, steps, max(1, steps // 8)), steps - 1}):
        mine, theirs = curves["flashcore"][step], curves["torch"][step]
        table.add_row(str(step), f"{mine:.4f}", f"{theirs:.4f}", f"{abs(mine - theirs):.1e}")
    console.print(table)


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="default: 300")
    parser.add_argument("--batch", type=int, default=16, help=f"pieces of {CONTEXT} characters a step (default: 16)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--text", type=Path, metavar="FILE", help="a text to learn instead of Python's reference")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw both loss curves into this picture")
    parser.add_argument("--sample", type=int, default=200, help="characters to write at the end (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(words)
    if chosen.steps < 1 or chosen.batch < 1 or chosen.sample < 0:
        parser.error("--steps and --batch are at least 1, --sample at least 0")
    if chosen.text is not None and not chosen.text.is_file():
        parser.error(f"--text {chosen.text}: no such file")
    if chosen.device == "auto":
        chosen.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU")
    return chosen


def main(words: list[str] | None = None) -> int:
    chosen = parse(words)
    console = Console(highlight=False)
    text = Text.read(chosen.text)
    if len(text.numbers) <= CONTEXT:
        sys.exit(f"train_tiny_gpt: the text has {len(text.numbers)} characters; more than {CONTEXT} are needed")

    curves, models = {}, {}
    for name in ATTENTION:
        models[name], curves[name], seconds = train(name, text, chosen, console)
        console.print(f"{name}: {chosen.steps} steps in {seconds:.1f} s on {chosen.device}")
    show_curves(console, curves)
    if chosen.plot is not None:
        draw(curves, chosen.plot)
        console.print(f"drawn: {chosen.plot}", markup=False)
    if chosen.sample:
        start = text.numbers[:16].to(chosen.device)
        written = text.spell(models["flashcore"].write(start, chosen.sample))
        console.print(f"\nwhat it writes now:\n{written}", markup=False)

    apart = parted(curves)
    verdict = "the same curve" if apart <= APART else f"NOT the same curve: at most {APART} is allowed"
    console.print(f"\nthe losses, averaged over {AVERAGED} steps, are at most {apart:.1e} apart: {verdict}")
    return 0 if apart <= APART else 1


if __name__ == "__main__":
    sys.exit(main())
