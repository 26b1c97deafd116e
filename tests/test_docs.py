"""What README.md and docs/ show is true: Python runs as it stands, C++ compiles, links lead somewhere."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
NEEDED = re.compile(r"^(?:import|from) (?:flashcore\.)?(torch|jax|cupy|transformers)\b", flags=re.MULTILINE)


def blocks(language: str, page: Path) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def programs() -> list[object]:
    """Each example of README alone; a page of docs/ from top to bottom."""
    examples = [pytest.param(block, id=f"README-{n}") for n, block in enumerate(blocks("python", README))]
    return examples + [pytest.param("\n".join(blocks("python", page)), id=page.stem) for page in PAGES]


@pytest.mark.parametrize("program", programs())
def test_python_runs(program, tmp_path):
    for module in NEEDED.findall(program):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    if (
        "cupy" in program
        and subprocess.run([sys.executable, "-c", "import cupy; cupy.zeros(1)"], check=False).returncode
    ):
        pytest.skip("CuPy finds no GPU")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "cpp.md"], ids=lambda page: page.stem)
def test_cpp_compiles(page, tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (program,) = blocks("cpp", page)
    source = tmp_path / "example.cpp"
    source.write_text(program)
    command = [compiler, "-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{ROOT / 'include'}", source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_every_linked_file_exists(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\((?!https?://)([^)#]+)", text)
    assert links or page != README
    assert [link for link in links if not (page.parent / link).exists()] == []
