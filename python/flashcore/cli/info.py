"""`info`: the version, the build, the devices and their kernels."""

from __future__ import annotations

import argparse
import platform
from typing import Any

from rich.console import Console
from rich.table import Table

from .. import __version__, _core, device_count, device_info, explain


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser("info", help="version, build, devices, kernels")
    return parser


def run(arguments: argparse.Namespace) -> int:
    console = Console(highlight=False)
    console.print(f"flashcore {__version__}, Python {platform.python_version()}, {platform.platform()}")
    console.print("build: with CUDA kernels" if _core.built_with_cuda() else "build: CPU only")
    devices = ["cpu", *(f"cuda:{index}" for index in range(device_count()))]
    table = Table("device", "name", "units", "compute", "memory", "kernels")
    for device in devices:
        properties = device_info(device)
        compute = "{}.{}".format(*properties.compute_capability) if device != "cpu" else "-"
        table.add_row(
            device,
            properties.name,
            str(properties.multiprocessors),
            compute,
            f"{properties.memory_bytes / 2**30:.1f} GiB",
            ", ".join(kernels(device)),
        )
    console.print(table)
    for device in devices[1:]:
        console.print(f"{device}: {', '.join(f'{name} {value}' for name, value in details(device_info(device)))}")
    if len(devices) == 1:
        console.print(f"no CUDA device: {_core.no_device_reason()}")
    return 0


def details(gpu: Any) -> list[tuple[str, str]]:
    """What else there is to know of a GPU (a DeviceInfo), in words."""
    bytes_per_second = 2e3 * gpu.memory_clock_khz * gpu.memory_bus_bits / 8  # two transfers a clock
    return [
        ("warp size", str(gpu.warp_size)),
        ("SM clock up to", f"{gpu.clock_khz / 1e6:.2f} GHz"),
        ("memory clock", f"{gpu.memory_clock_khz / 1e6:.2f} GHz × {gpu.memory_bus_bits} bits"),
        ("memory up to", f"{bytes_per_second / 1e9:.0f} GB/s"),
        ("L2", f"{gpu.l2_bytes / 2**20:.1f} MiB"),
        ("shared memory", f"{gpu.shared_bytes_per_sm / 2**10:.0f} KiB a multiprocessor"),
        ("of which a block", f"{gpu.shared_bytes_per_block / 2**10:.0f} KiB"),
        ("driver CUDA", _version(gpu.driver_version)),
        ("runtime CUDA", _version(gpu.runtime_version)),
    ]


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def kernels(device: str) -> list[str]:
    """Names of a device's kernels: those that the explanation of some problem speaks of."""
    names: list[str] = []
    for line in explain("fwd fp16 b1 q64 k64 h1 d64", device=device).splitlines():
        name = line.removeprefix("kernel:").strip() if line.startswith("kernel:") else line.strip().partition(":")[0]
        if (line.startswith(("kernel:", "  "))) and name not in names:
            names.append(name)
    return names
