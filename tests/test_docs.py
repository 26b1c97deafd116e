"""What the pages under docs/ show is true: their Python runs as it stands, their links lead somewhere."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).resolve().parent.parent / "docs").glob("*.md"))


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


SHOWN = [(page, n, block) for page in PAGES for n, block in enumerate(blocks(page))]


@pytest.mark.parametrize("block", [pytest.param(b, id=f"{page.stem}-{n}") for page, n, b in SHOWN])
def test_python_runs(block, tmp_path):
    for module in set(re.findall(r"^(?:import|from) (torch|jax|cupy|transformers)\b", block, flags=re.MULTILINE)):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    if "torch" not in block and "flashcore.compat" in block and importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_linked_file_exists(page):
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
