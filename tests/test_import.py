"""What `import flashcore` brings along, where it works, and what its names look like."""

import importlib.util
import inspect
import os
import subprocess
import sys
from importlib.resources import files

import flashcore as fc
import pytest

CALLS = (
    "attention",
    "attention_varlen",
    "attention_decode",
    "attention_backward",
    "merge_states",
    "vector_add",
    "reduce",
)


def run(program: str, **environment) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_framework_is_imported():
    loaded = run("import sys, flashcore; print(*sys.modules)").split()
    assert "flashcore" in loaded
    assert not {"numpy", "torch", "jax", "cupy", "ml_dtypes", "matplotlib", "rich"} & set(loaded)


def test_calls_do_not_import_other_frameworks():
    program = (
        "import sys, numpy as np, flashcore as fc\n"
        "x = np.zeros((1, 1, 2, 8), np.float32); fc.attention(x, x, x); fc.explain(x, x, x)\n"
        "print(*sys.modules)"
    )
    assert not {"torch", "jax", "cupy"} & set(run(program).split())


def test_works_where_no_gpu_is_visible():
    program = (
        "import numpy as np, flashcore as fc\n"
        "assert fc.device_count() == 0\n"
        "x = np.ones((1, 1, 2, 8), np.float32); assert (fc.attention(x, x, x) == 1).all()\n"
        "print(fc.device_info('cpu').name)"
    )
    assert run(program, CUDA_VISIBLE_DEVICES="").strip()


def test_every_name_of_the_contract_is_there():
    names = {
        *CALLS,
        "supports",
        "explain",
        "plan",
        "device_count",
        "device_info",
        "memory_stats",
        "empty_cache",
        "Unsupported",
        "CudaError",
        "__version__",
    }
    assert names <= set(dir(fc))
    assert names <= set(fc.__all__)
    assert all(hasattr(fc, name) for name in fc.__all__)


def test_version_is_that_of_the_package():
    from importlib.metadata import version

    assert fc.__version__ == version("flashcore")


@pytest.mark.parametrize("name", [*CALLS, "supports", "explain", "plan", "device_info", "memory_stats", "empty_cache"])
def test_public_functions_are_documented(name):
    assert inspect.getdoc(getattr(fc, name))


@pytest.mark.parametrize("name", CALLS)
def test_options_are_keywords_only(name):
    """Positional arguments are the arrays alone (and reduce's op and axis): a new option breaks no caller."""
    parameters = inspect.signature(getattr(fc, name)).parameters.values()
    positional = {p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY}
    options = {"causal", "window", "scale", "softcap", "layout", "return_lse", "out", "kernel", "stream", "dropout_p"}
    if name == "attention_backward":
        options -= {"out"}  # the forward's result
    assert not positional & options


@pytest.mark.parametrize("name", CALLS)
def test_public_functions_are_annotated(name):
    signature = inspect.signature(getattr(fc, name))
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


def test_type_hints_are_shipped():
    package = files("flashcore")
    assert (package / "py.typed").is_file()
    assert (package / "_core.pyi").is_file()


def test_device_info_of_the_cpu():
    info = fc.device_info("cpu")
    assert info.name
    assert info.memory_bytes > 2**20
    assert info.multiprocessors >= 1


def test_device_info_of_a_gpu():
    if fc.device_count() == 0:
        pytest.skip("no GPU")
    info = fc.device_info()
    assert info.name
    assert info.compute_capability >= (7, 0)
    assert info.memory_bytes > 2**30


def test_a_missing_gpu_is_explained(no_cuda):
    with pytest.raises(ValueError, match=r"0.*(CUDA|driver|GPU|device)"):
        fc.device_info(0)


def refused_import(before, module):
    """What importing the module says after this preparation."""
    program = (
        f"{before}\n"
        "try:\n"
        f"    import {module}\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "else:\n"
        "    raise SystemExit('imported')"
    )
    return run(program)


@pytest.mark.parametrize(
    ("module", "needs"),
    [("torch", "torch"), ("jax", "jax"), ("compat.flash_attn", "torch"), ("transformers", "torch")],
)
def test_modules_for_a_framework_say_what_they_need(module, needs):
    told = refused_import(f"import sys; sys.modules['{needs}'] = None", f"flashcore.{module}")
    assert f"flashcore.{module} needs" in told
    assert f"pip install {needs}" in told


@pytest.mark.parametrize(
    ("module", "framework", "ageing", "told"),
    [
        ("torch", "torch", "import torch; del torch.library.register_vmap", "PyTorch 2.5 or newer, this is"),
        (
            "transformers",
            "transformers",
            "import transformers.masking_utils as m; m.sdpa_mask = lambda attention_mask: None",
            "transformers 5.5 or newer, this is",
        ),
    ],
)
def test_frameworks_that_are_too_old_are_told_so(module, framework, ageing, told):
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")
    message = refused_import(ageing, f"flashcore.{module}")
    assert f"flashcore.{module} needs {told}" in message
    assert f"pip install -U {framework}" in message
