"""The device, the threads, and randomness that is counted instead of carried.

Every random number comes from a generator that was seeded by (seed, purpose, index): the order of
an epoch by (seed, "order", epoch), dropout by (seed, "step", step). So nothing has to be stored for
a run to continue exactly, and nothing leaks from one run of a process into the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mnist_cli import cpu
from mnist_cli.errors import UsageError, one_line


def resolve_device(name: str, precision: str = "float32") -> torch.device:
    """The device that `name` (auto, cpu, cuda, cuda:N) means on this machine.

    Raises:
        UsageError: there is no such CUDA device, or `precision` isn't available on the device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    kind, _, index = name.partition(":")
    if kind == "cuda" and int(index or 0) >= count:
        found = f"{count} CUDA device{'s' if count != 1 else ''}" if count else "no CUDA"
        raise UsageError(f"device={name} is not there: this machine has {found}", "type device=cpu")
    device = torch.device(name)
    is_quick = precision == "float32" or (precision == "bfloat16" and cpu.has_amx())
    if device.type == "cpu" and not is_quick:
        needed = "CUDA or a CPU with AMX" if precision == "bfloat16" else "CUDA"
        raise UsageError(
            f"precision={precision} needs {needed}, and the device is {device}",
            "type precision=float32",
        )
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        _allow_tf32(False)
    return device


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """In the block CUDA may round the factors of products to TensorFloat-32: 10 bits of 23.

    Source: NVIDIA, "A100 Tensor Core GPU Architecture", 2020.
    """
    _allow_tf32(True)
    try:
        yield
    finally:
        _allow_tf32(False)


def _allow_tf32(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


def set_up_cpu() -> None:
    """Two settings of the process without which a CPU is much slower than it could be.

    To be called before torch has started threads of its own, which inherit the second.
    """
    _keep_freed_memory()
    for kind in (np.float32, np.float64):
        np.finfo(kind)  # NumPy below 2.4 warns where it looks for the first time in this mode
    # Numbers below 1e-38 count as 0. The averages that Adam and momentum keep for a unit which has
    # fallen silent pass through that range, where an operation takes a hundred times as long.
    torch.set_flush_denormal(True)


def _keep_freed_memory() -> None:
    """Let the process keep the memory that a step frees, for the next step to use.

    Left to itself glibc gives the large activations of a CNN back to the system after every step
    and asks for them again: thousands of page faults, up to 40 % of a step. The peak stays as it
    is. Other C libraries have no such setting and are left alone.

    Source: mallopt(3).
    """
    trim_threshold, mmap_threshold, largest = -1, -3, 2**31 - 1
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(mmap_threshold, largest):
            mallopt(trim_threshold, largest)


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """In the block nothing comes out of stderr, not even what a library in C writes past Python."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def counted_seed(seed: int, purpose: str, index: int = 0) -> int:
    """63 bits that depend on nothing but the arguments."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def reseed(device: torch.device, value: int) -> None:
    """Seed the default generator of `device`: dropout and initial weights draw from it."""
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(value)
    else:
        torch.default_generator.manual_seed(value)


def permutation(seed: int, epoch: int, length: int) -> Tensor:
    """The order of an epoch: (length,) int64 on the CPU, the same on every device."""
    generator = torch.Generator().manual_seed(counted_seed(seed, "order", epoch))
    return torch.randperm(length, generator=generator)


@dataclass(frozen=True)
class Host:
    """What decides the last bits of a result, besides configuration and data."""

    torch_version: str
    python_version: str
    device: str
    threads: int
    capability: str

    @classmethod
    def of(cls, device: torch.device) -> Host:
        on_gpu = device.type == "cuda"
        return cls(
            torch_version=torch.__version__,
            python_version=platform.python_version(),
            device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
            threads=torch.get_num_threads(),
            capability=torch.backends.cpu.get_cpu_capability(),
        )

    def differences(self, then: Host) -> list[str]:
        """What differs from the machine of an earlier run, in words."""
        return [
            f"the run had {name}={one_line(str(getattr(then, name)), 80)},"
            f" here it is {getattr(self, name)}: last digits may differ"
            for name in ("torch_version", "device", "threads", "capability")
            if getattr(then, name) != getattr(self, name)
        ]
