"""How the bench judges our error beside that of the other libraries."""

from __future__ import annotations

import math
from typing import Any

import pytest
from flashcore.bench.report import notes
from flashcore.bench.results import error_ratio, is_too_inexact


def entry(ours: float | None, **peers: float) -> dict[str, Any]:
    results = {name: {"error": error, "us": 30.0} for name, error in {"flashcore": ours, **peers}.items()}
    return {"line": "fwd fp16 b1 q8 k8 h1 d64", "results": results}


@pytest.mark.parametrize(
    ("ours", "ratio", "inexact"), [(1.0e-3, 0.5, False), (2.4e-3, 1.2, False), (2.5e-3, 1.25, True), (0.0, 0.0, False)]
)
def test_our_error_is_compared_with_the_most_exact_library(ours, ratio, inexact):
    assert error_ratio(entry(ours, cudnn=2e-3, flash=9e-3)) == pytest.approx(ratio)
    assert is_too_inexact(entry(ours, cudnn=2e-3, flash=9e-3)) is inexact


def test_nan_of_ours_is_inexact_and_that_of_a_peer_is_no_yardstick():
    assert is_too_inexact(entry(math.nan, cudnn=2e-3))
    assert error_ratio(entry(2e-3, cudnn=math.nan, flash=1e-3)) == 2


@pytest.mark.parametrize("given", [entry(1e-3), entry(None, cudnn=2e-3)], ids=["alone", "not known"])
def test_without_two_sides_there_is_no_ratio(given):
    assert error_ratio(given) is None and not is_too_inexact(given)


def test_the_report_names_what_is_too_inexact():
    said = notes({"cases": [entry(2e-3, cudnn=2e-3), entry(4e-3, cudnn=2e-3)]})
    assert sum("2.00 times" in line for line in said) == 1 and not any("1.00 times" in line for line in said)
