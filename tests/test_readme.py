"""What README.md and docs/ show is true: Python examples run as they stand, C++ compiles, links lead somewhere."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str, page: Path = PAGES[0]) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def heading(block: str) -> str:
    return ",".join(dict.fromkeys(re.findall(r"^import (\w+)", block, flags=re.MULTILINE)))


@pytest.mark.parametrize("block", [block for page in PAGES for block in blocks("python", page)], ids=heading)
def test_python_example_runs(block, tmp_path):
    for module in re.findall(r"^import (\w+)", block, flags=re.MULTILINE):
        if module != "flashcore" and importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    if "cupy" in block and subprocess.run([sys.executable, "-c", "import cupy; cupy.zeros(1)"], check=False).returncode:
        pytest.skip("CuPy finds no GPU")
    result = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_cpp_example_compiles(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (example,) = blocks("cpp")
    source = tmp_path / "example.cpp"
    source.write_text(example)
    command = [compiler, "-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{ROOT / 'include'}", source]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_linked_file_exists(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\((?!https?://)([^)#]+)", text)
    assert links or page != PAGES[0]
    assert [link for link in links if not (page.parent / link).exists()] == []
