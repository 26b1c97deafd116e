"""The C interface of XLA as the extension declares it is that of the headers which come with JAX."""

import shutil
import subprocess
from pathlib import Path

import pytest

jax = pytest.importorskip("jax")

CORE = Path(__file__).resolve().parent.parent / "python" / "core"
#: the last member of each struct that is used, in XLA's words and in ours: those before it cannot have moved either
SAME = {
    "XLA_FFI_InternalExtension.next": "Extension.next",
    "XLA_FFI_Api_Version.minor_version": "Version.minor",
    "XLA_FFI_Metadata.traits": "Metadata.traits",
    "XLA_FFI_Metadata_Extension.metadata": "MetadataExtension.metadata",
    "XLA_FFI_Buffer.dims": "Buffer.dims",
    "XLA_FFI_Args.args": "Buffers.items",
    "XLA_FFI_Rets.rets": "Buffers.items",
    "XLA_FFI_ByteSpan.len": "Text.size",
    "XLA_FFI_Scalar.value": "Scalar.value",
    "XLA_FFI_Attrs.attrs": "Attributes.values",
    "XLA_FFI_CallFrame.ctx": "Frame.context",
    "XLA_FFI_CallFrame.stage": "Frame.stage",
    "XLA_FFI_CallFrame.args": "Frame.operands",
    "XLA_FFI_CallFrame.rets": "Frame.results",
    "XLA_FFI_CallFrame.attrs": "Frame.attributes",
    "XLA_FFI_Error_Create_Args.errc": "CreateError.code",
    "XLA_FFI_Error_GetDetails_Args.message": "GetDetails.message",
    "XLA_FFI_Error_Destroy_Args.error": "DestroyError.error",
    "XLA_FFI_Stream_Get_Args.stream": "GetStream.stream",
    "XLA_FFI_DeviceMemory_Allocate_Args.data": "AllocateMemory.data",
    "XLA_FFI_DeviceMemory_Free_Args.data": "FreeMemory.data",
    "XLA_FFI_DeviceOrdinal_Get_Args.device_ordinal": "GetDevice.ordinal",
    "XLA_FFI_Api.XLA_FFI_Error_Create": "Api.create_error",
    "XLA_FFI_Api.XLA_FFI_Error_GetDetails": "Api.get_details",
    "XLA_FFI_Api.XLA_FFI_Error_Destroy": "Api.destroy_error",
    "XLA_FFI_Api.XLA_FFI_Stream_Get": "Api.get_stream",
    "XLA_FFI_Api.XLA_FFI_DeviceMemory_Allocate": "Api.allocate_memory",
    "XLA_FFI_Api.XLA_FFI_DeviceMemory_Free": "Api.free_memory",
    "XLA_FFI_Api.XLA_FFI_DeviceOrdinal_Get": "Api.get_device",
}
#: what API 0.4 named anew
OLDER_NAMES = {
    "XLA_FFI_InternalExtension": "XLA_FFI_Extension_Base",
    "XLA_FFI_Error_GetDetails": "XLA_FFI_Error_GetMessage",
}
NUMBERS = {
    "XLA_FFI_Extension_Metadata": "kMetadata",
    "XLA_FFI_DataType_PRED": "kPred",
    "XLA_FFI_DataType_S32": "kS32",
    "XLA_FFI_DataType_S64": "kS64",
    "XLA_FFI_DataType_F16": "kF16",
    "XLA_FFI_DataType_F32": "kF32",
    "XLA_FFI_DataType_F64": "kF64",
    "XLA_FFI_DataType_BF16": "kBF16",
    "XLA_FFI_DataType_F8E4M3FN": "kF8E4M3FN",
    "XLA_FFI_AttrType_SCALAR": "kScalar",
    "XLA_FFI_AttrType_STRING": "kString",
    "XLA_FFI_ExecutionStage_EXECUTE": "kExecute",
    "XLA_FFI_Error_Code_INVALID_ARGUMENT": "int(Code::invalid_argument)",
    "XLA_FFI_Error_Code_RESOURCE_EXHAUSTED": "int(Code::resource_exhausted)",
    "XLA_FFI_Error_Code_UNIMPLEMENTED": "int(Code::unimplemented)",
    "XLA_FFI_Error_Code_INTERNAL": "int(Code::internal)",
}


def test_is_that_of_the_headers(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++")
    headers = Path(jax.ffi.include_dir())
    if compiler is None or not (headers / "xla" / "ffi" / "api" / "c_api.h").is_file():
        pytest.skip("needs a C++ compiler, and a JAX that brings its headers")
    lines = ["#include <xla/ffi/api/c_api.h>", '#include "xla_abi.h"', "using namespace flashcore::python::xla;"]
    for theirs, mine in SAME.items():
        (a, x), (b, y) = theirs.split("."), mine.split(".")
        lines.append(f'static_assert(offsetof({a}, {x}) == offsetof({b}, {y}), "{theirs} lies elsewhere");')
        lines.append(f'static_assert(sizeof((({a}*)0)->{x}) == sizeof((({b}*)0)->{y}), "{theirs} has another size");')
    lines += [f'static_assert(int({theirs}) == int({mine}), "{theirs}");' for theirs, mine in NUMBERS.items()]
    text = "\n".join(lines) + "\n"
    declared = (headers / "xla" / "ffi" / "api" / "c_api.h").read_text()
    for now, before in OLDER_NAMES.items():
        if now not in declared:
            text = text.replace(now, before)
    source = tmp_path / "same.cpp"
    source.write_text(text)
    command = [compiler, "-std=c++20", "-fsyntax-only", f"-I{headers}", f"-I{CORE}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
