"""docs/torch.md is true: its examples run, one after the other."""

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

PAGE = Path(__file__).resolve().parent.parent / "docs" / "torch.md"


def test_the_examples_run(capsys):
    torch.manual_seed(0)
    names: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)  # noqa: S102
    assert "torch.Size([5, 2, 8, 64, 32])" in capsys.readouterr().out
    torch.testing.assert_close(
        names["same"], torch.nn.functional.scaled_dot_product_attention(*(names[x] for x in "qkv"), is_causal=True)
    )
    assert names["cache"].seqlens.tolist() == [11, 8]
