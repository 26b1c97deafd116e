"""Queries, keys and values of a real sentence, made without training: hashed spelling and sinusoidal positions."""

from __future__ import annotations

import re
import zlib
from typing import Any, NamedTuple

import numpy as np

DEFAULT = "The animal did not cross the street because the animal was too tired"
HALF = 32  # features of the spelling, and as many of the position
HEAD_DIM = 2 * HALF


class Head(NamedTuple):
    """What one head compares: its weights on spelling and position, and how many words ahead it looks."""

    name: str
    spelling: float
    position: float
    ahead: int


HEADS = (
    Head("alike words", 9.0, 0.0, 0),
    Head("the word before", 0.0, 60.0, -1),
    Head("the word after", 0.0, 60.0, 1),
    Head("near words", 0.0, 12.0, 0),
    Head("alike and before", 6.0, 20.0, -3),
    Head("everything a little", 1.0, 1.0, 0),
)


class Embedded(NamedTuple):
    words: list[str]
    q: Any  #: (1, heads, words, HEAD_DIM), float16
    k: Any
    v: Any


def split(text: str) -> list[str]:
    words = re.findall(r"\w+|[^\w\s]", text)
    if not 1 <= len(words) <= 64:
        raise ValueError(f"a sentence of {len(words)} words given; 1 to 64 are allowed")
    return words


def spelling_features(words: list[str]) -> Any:
    """Unit vectors: the signed, hashed counts of each word's letter pairs and triples."""
    features = np.zeros((len(words), HALF))
    for row, word in zip(features, words, strict=True):
        padded = f"<{word.lower()}>"
        for size in (2, 3, len(padded)):
            for start in range(len(padded) - size + 1):
                code = zlib.crc32(padded[start : start + size].encode())
                row[code % HALF] += 1.0 if code >> 16 & 1 else -1.0
        if not row.any():
            row[0] = 1.0
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def position_features(positions: Any) -> Any:
    """Unit vectors: sines and cosines of slowing frequencies (Vaswani et al. 2017)."""
    frequencies = 2.0 ** (-np.arange(HALF // 2) / 3.0)
    angles = np.asarray(positions, dtype=np.float64)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1) / np.sqrt(HALF // 2)


def embed(text: str) -> Embedded:
    words = split(text)
    places = np.arange(len(words))
    spelling, position = spelling_features(words), position_features(places)
    queries = [
        np.concatenate([head.spelling * spelling, head.position * position_features(places + head.ahead)], 1)
        for head in HEADS
    ]
    keys = np.concatenate([spelling, position], axis=1)
    q = np.stack(queries)[None] * np.sqrt(HEAD_DIM)  # attention divides by the root
    k = v = np.broadcast_to(keys, (1, len(HEADS), *keys.shape))
    return Embedded(words, *(np.ascontiguousarray(x, dtype=np.float16) for x in (q, k, v)))
