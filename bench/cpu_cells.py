"""The sizes that the CPU benchmark measures, and how much work each is. Imports no framework."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flashcore.bench.cases import Case, parse

DTYPE_WORDS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Cell:
    """One call. `work` is "fwd", "bwd" (the gradients alone) or "fwd+bwd" (through the framework's autograd)."""

    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    heads_k: int | None = None
    causal: bool = False
    left: int | None = None  # a window: so many keys before its own position a query sees
    blocks: bool = False  # a boolean mask, half of its blocks false
    work: str = "fwd"

    @property
    def line(self) -> str:
        """The problem line, less its dtype."""
        heads = f"{self.heads}/{self.heads_k}" if self.heads_k else f"{self.heads}"
        words = [
            self.work,
            f"b{self.batch}",
            f"q{self.seqlen_q}",
            f"k{self.seqlen_k}",
            f"h{heads}",
            f"d{self.head_dim}",
        ]
        words += ["causal"] * self.causal
        words += [f"window{self.left},*"] * (self.left is not None)
        words += ["mask"] * self.blocks
        return " ".join(words)

    def case(self, dtype: str = "float32") -> Case:
        """As `flashcore bench` knows it; of "fwd+bwd" the backward call."""
        _, sizes = self.line.split(" ", 1)
        return parse(f"{'fwd' if self.work == 'fwd' else 'bwd'} {DTYPE_WORDS[dtype]} {sizes}")

    @property
    def pairs(self) -> float:
        """Query-key pairs that are seen, of one head of one sequence."""
        return self.case().pairs / self.batch

    @property
    def flops(self) -> float:
        parts = {"fwd": ("fwd",), "bwd": ("bwd",), "fwd+bwd": ("fwd", "bwd")}[self.work]
        return sum(replace(self, work=part).case().flops for part in parts)

    @property
    def is_decode(self) -> bool:
        return self.seqlen_q == 1

    def kv_bytes(self, itemsize: int) -> int:
        return 2 * self.batch * (self.heads_k or self.heads) * self.seqlen_k * self.head_dim * itemsize

    @property
    def whole(self) -> Cell:
        """The same sizes with nothing skipped."""
        return replace(self, heads_k=None, causal=False, left=None, blocks=False)

    @property
    def work_left(self) -> float:
        """Share of the whole cell's work: of the bytes to read in decode, of the pairs elsewhere."""
        if self.is_decode:
            return self.kv_bytes(1) / self.whole.kv_bytes(1)
        return self.pairs / self.whole.pairs


SHAPES = {
    "512": Cell(1, 8, 512, 512, 64),
    "2048": Cell(1, 8, 2048, 2048, 64),
    "1024x32": Cell(1, 32, 1024, 1024, 128),
    "4x256": Cell(4, 8, 256, 256, 64),
    "4096c": Cell(1, 8, 4096, 4096, 128, causal=True),
    "384d80": Cell(2, 12, 384, 384, 80),
}

CELLS = {
    **SHAPES,
    "decode": Cell(1, 32, 1, 8192, 128, heads_k=8),
    "small": Cell(1, 1, 32, 32, 64),
    **{f"bwd {name}": replace(cell, work="bwd") for name, cell in SHAPES.items()},
    **{f"fwd+bwd {name}": replace(cell, work="fwd+bwd") for name, cell in SHAPES.items()},
}

# Measured beside the same sizes with nothing skipped.
SKIPPING_CELLS = {
    "causal 4096": Cell(1, 8, 4096, 4096, 128, causal=True),
    "window 256 of 8192": Cell(1, 8, 8192, 8192, 64, causal=True, left=256),
    "half of the blocks": Cell(1, 8, 2048, 2048, 64, blocks=True),
    "decode GQA 32/4": Cell(1, 32, 1, 8192, 128, heads_k=4),
}
