"""Fixtures: the devices and frameworks of this machine, and how hypothesis runs."""

from __future__ import annotations

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave GPU memory to the other frameworks

import flashcore as fc
import numpy as np
import pytest
from frameworks import KINDS, importable, sees_cuda
from hypothesis import HealthCheck, settings

settings.register_profile(
    "flashcore",
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("flashcore")


def pytest_configure(config):
    config.addinivalue_line("markers", "sanitizer: small cases that touch every kernel, for compute-sanitizer")


def _cuda_frameworks():
    if fc.device_count() == 0:
        return []
    return [name for name in ("torch", "cupy", "jax") if sees_cuda(name)]


DEVICES = ["cpu", *(["cuda"] if _cuda_frameworks() else [])]
FRAMEWORKS = [("numpy", "cpu"), ("torch", "cpu"), ("jax", "cpu"), *((name, "cuda") for name in _cuda_frameworks())]
FRAMEWORKS += [] if _cuda_frameworks() else [("cupy", "cuda")]  # seen as skipped


def make_framework(name: str, device: str):
    if not importable(name):
        pytest.skip(f"{name} is not installed")
    return KINDS[name](device)


def pytest_report_header():
    found = ", ".join(f"{name} on {device}" for name, device in FRAMEWORKS if importable(name))
    return [f"flashcore {fc.__version__}: {fc.device_count()} GPUs; tests on {', '.join(DEVICES)} with {found}"]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture
def place(device):
    """The device, for tensors of torch."""
    torch = pytest.importorskip("torch")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("this torch sees no GPU")
    return device


@pytest.fixture
def xp(device):
    """A framework with arrays on `device`: the one to use where the framework itself does not matter."""
    return KINDS["numpy"]() if device == "cpu" else make_framework(_cuda_frameworks()[0], "cuda")


@pytest.fixture(params=FRAMEWORKS, ids=lambda p: "-".join(p))
def framework(request):
    """Each framework on each of its devices."""
    return make_framework(*request.param)


@pytest.fixture(params=["best", "reference"])
def best_and_reference(request, monkeypatch):
    """Runs a test twice: with the kernels that are chosen, and with the reference kernels."""
    if request.param == "reference":
        monkeypatch.setenv("FLASHCORE_KERNEL", "reference")


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Random numbers that depend on the test's name alone."""
    return np.random.default_rng(list(request.node.name.encode()))


@pytest.fixture
def no_cuda():
    if fc.device_count() > 0:
        pytest.skip("this machine has a GPU")


@pytest.fixture
def bench(capsys):
    """`python -m flashcore bench` in this process: what it prints."""
    from flashcore.__main__ import main

    def command(*words, code=0):
        assert main(["bench", *map(str, words)]) == code
        return "".join(capsys.readouterr())

    return command
