"""How bench/compare.py judges our error beside that of the peers."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("torch")
import torch
from compare import error_of, error_ratio, print_table, too_inexact


def results(ours, **peers):
    return {name: {"error": error, "us": 30.0, "tflops": 1.0} for name, error in {"flashcore": ours, **peers}.items()}


@pytest.mark.parametrize(
    ("ours", "ratio", "inexact"), [(1.0e-3, 0.5, False), (2.4e-3, 1.2, False), (2.5e-3, 1.25, True), (0.0, 0.0, False)]
)
def test_our_error_is_compared_with_the_most_exact_peer(ours, ratio, inexact):
    found = error_ratio(results(ours, cudnn=2e-3, flash=9e-3))
    assert found == pytest.approx(ratio)
    assert too_inexact({"error_to_best_peer": found}) is inexact


def test_nan_of_ours_is_inexact_and_that_of_a_peer_is_no_yardstick():
    assert too_inexact({"error_to_best_peer": error_ratio(results(math.nan, cudnn=2e-3))})
    assert error_ratio(results(2e-3, cudnn=math.nan, flash=1e-3)) == 2


@pytest.mark.parametrize("given", [results(1e-3), {"cudnn": {"error": 1e-3}}, {}], ids=["alone", "not run", "none"])
def test_without_two_sides_there_is_no_ratio(given):
    assert error_ratio(given) is None and not too_inexact({"error_to_best_peer": None})


@pytest.mark.parametrize("causal", [False, True])
def test_the_error_is_relative_to_the_exact_result(causal):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 10, 4, 16, generator=generator)
    k, v = (torch.randn(2, 13, 2, 16, generator=generator) for _ in range(2))
    keys = torch.arange(13)
    visible = keys <= torch.arange(10)[:, None] + 3 if causal else None
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(t.double().transpose(1, 2) for t in (q, k, v)), attn_mask=visible, enable_gqa=True
    ).transpose(1, 2)
    assert error_of(exact, q, k, v, causal) < 1e-12
    assert error_of(1.01 * exact, q, k, v, causal) == pytest.approx(0.01)


def test_the_table_marks_what_is_too_inexact(capsys):
    cases = [
        {"line": line, "ratio_to_best_peer": 1.1, "results": r, "error_to_best_peer": error_ratio(r)}
        for line, r in (("good", results(2e-3, cudnn=2e-3)), ("bad", results(4e-3, cudnn=2e-3)))
    ]
    print_table(cases)
    printed = capsys.readouterr().out
    assert "2.00 > 1.2" in printed and "1.00" in printed and "1.00 >" not in printed
