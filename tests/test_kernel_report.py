"""What bench/kernel_report.py reads out of the tools' output."""

from __future__ import annotations

import pytest

pytest.importorskip("rich")
from kernel_report import TRAITS, compile_seconds, resource_usage, short

CUOBJDUMP = """
Fatbin elf code:
================
arch = sm_90a
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _Z3fwdv:
  REG:168 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:2160 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_80
 Function _Z3addv:
  REG:28 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:528 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_usage_is_read_by_function_and_architecture():
    assert resource_usage(CUOBJDUMP) == [("sm_90a", "_Z3fwdv", [168, 16, 1024, 0]), ("sm_80", "_Z3addv", [28, 0, 0, 0])]


FORWARD = (
    "void flashcore::sm90::fwd<flashcore::sm90::FwdTraits<flashcore::detail::BFloat16, 128, "
    "(flashcore::sm90::FwdKind)1> >(CUtensorMap_st, flashcore::sm90::FwdArgs)"
)


def test_names_are_short_and_traits_are_found():
    assert short(FORWARD) == "sm90::fwd<sm90::FwdTraits<BFloat16, 128, positional> >"
    assert TRAITS.match(FORWARD.removeprefix("void "))[1] == (
        "flashcore::sm90::FwdTraits<flashcore::detail::BFloat16, 128, (flashcore::sm90::FwdKind)1>"
    )
    assert short("void flashcore::tile::(anonymous namespace)::repair<float>(int)") == "tile::repair<float>"


def test_seconds_are_those_of_the_last_compilation_slowest_first(tmp_path):
    (tmp_path / ".ninja_log").write_text(
        "# ninja log v5\n"
        "0\t900\t0\tCMakeFiles/k.dir/src/kernels/a.cu.o\tab\n"
        "0\t1500\t0\tCMakeFiles/k.dir/src/kernels/b.cu.o\tcd\n"
        "10\t5010\t0\tCMakeFiles/k.dir/src/kernels/a.cu.o\tab\n"
        "0\t9000\t0\tCMakeFiles/k.dir/src/plan.cpp.o\tef\n"
    )
    assert list(compile_seconds(tmp_path).items()) == [("src/kernels/a.cu", 5.0), ("src/kernels/b.cu", 1.5)]


def test_without_a_log_there_are_no_seconds(tmp_path):
    assert compile_seconds(tmp_path) == {}
