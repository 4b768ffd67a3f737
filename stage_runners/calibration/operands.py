"""Operands of any size without a copy: views of one buffer of random numbers."""

from __future__ import annotations

import math
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

#: Beginnings of operands are multiples of this, as those of torch's allocators are or exceed.
_ALIGNMENT_BYTES: Final = 512
#: Numbers that are drawn; the buffer repeats them.
_DRAWN: Final = 1 << 22
#: Like weights of a model, so that no result overflows.
_DEVIATION: Final = 0.02
#: How often a walk through cold operands exceeds the last-level cache.
CACHES: Final = 2
#: Most tensors of a walk.
_MAX_COLD: Final = 1024
#: Where Linux tells the sizes of the caches of the first core.
_CACHES_OF_A_CPU: Final = Path("/sys/devices/system/cpu/cpu0/cache")
#: Caches of a CPU that does not tell: larger than most.
_UNKNOWN_CACHES: Final = {2: 2 << 20, 3: 64 << 20}
#: Features of the product that streams memory through the caches.
_STREAMED_WIDTH: Final = 2048


class OperandsTooLargeError(Exception):
    """An operator needs more memory than the calibration may take."""


def last_level_cache_bytes(device: torch.device) -> int:
    """Size of the largest cache of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return max(_caches().values())


def _caches() -> dict[int, int]:
    """Bytes of the caches of a CPU's first core, by level."""
    told = {
        int((cache / "level").read_text(encoding="ascii")): (cache / "size").read_text(encoding="ascii").strip()
        for cache in _CACHES_OF_A_CPU.glob("index*")
        if (cache / "size").is_file()
    }
    return {level: int(size[:-1]) << 10 for level, size in told.items() if size.endswith("K")} or _UNKNOWN_CACHES


class Buffer:
    """Random numbers that operands are views of.

    Parameters
    ----------
    device
        Where they lie.
    size
        How many bytes.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        generator = torch.Generator(device).manual_seed(0)
        # A pair of bf16 numbers read as fp32 is a number of the same size, so one buffer serves both.
        drawn = torch.empty(_DRAWN, dtype=torch.bfloat16, device=device).normal_(0, _DEVIATION, generator=generator)
        repeats = max(1, size // drawn.nbytes)
        self._bytes = drawn.repeat(repeats).view(torch.uint8)
        self.device = device
        self.cold_bytes = CACHES * last_level_cache_bytes(device)

    def view(self, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Contiguous tensor that begins `start` bytes into the buffer.

        Raises
        ------
        OperandsTooLargeError
            If it ends beyond the buffer.
        """
        end = start + math.prod(shape) * dtype.itemsize
        if end > self._bytes.numel():
            raise OperandsTooLargeError
        return self._bytes[start:end].view(dtype).view(shape)

    @property
    def size(self) -> int:
        """Bytes of the buffer."""
        return self._bytes.numel()


class Eviction:
    """Drives everything out of the inner caches of a CPU: multiplies a vector by weights that no cache holds.

    This is also what runs before most operators of a model, so threads and code are in the state that it leaves.

    Parameters
    ----------
    buffer
        What the weights are views of; another part of it each time.
    dtype
        Of the product.
    """

    def __init__(self, buffer: Buffer, dtype: torch.dtype) -> None:
        # Each thread reads twice the second cache of its core.
        wanted = CACHES * _caches().get(2, _UNKNOWN_CACHES[2]) * torch.get_num_threads()
        size = min(wanted, buffer.size)
        shape = (size // (_STREAMED_WIDTH * dtype.itemsize), _STREAMED_WIDTH)
        self._weights = cycle(buffer.view(start, dtype, shape) for start in range(0, buffer.size - size + 1, size))
        self._vector = torch.ones(1, _STREAMED_WIDTH, dtype=dtype)

    def __call__(self) -> Tensor:
        """Do it."""
        return F.linear(self._vector, next(self._weights))


class Operands:
    """The operands of one operator, one after the other in the buffer.

    Parameters
    ----------
    buffer
        What they are views of.

    Attributes
    ----------
    warm
        All that are not cold.
    """

    def __init__(self, buffer: Buffer) -> None:
        self.device = buffer.device
        self.warm: list[Tensor] = []
        self._buffer = buffer
        self._used = 0

    def tensor(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Contiguous random tensor, always the same: what fits into a cache stays there from call to call."""
        found = self._buffer.view(self._used, dtype, shape)
        self._used += _aligned(found.nbytes)
        self.warm.append(found)
        return found

    def cold(self, dtype: torch.dtype, *shape: int) -> list[Tensor]:
        """Contiguous random tensors to be used in turn: so many that each has left every cache when its turn comes.

        Of very small ones there are not so many; what is read of them takes no time anywhere.

        Raises
        ------
        OperandsTooLargeError
            If the rest of the buffer does not hold enough of them.
        """
        stride = _aligned(math.prod(shape) * dtype.itemsize)
        count = min(-(-self._buffer.cold_bytes // stride), _MAX_COLD)
        found = [self._buffer.view(self._used + number * stride, dtype, shape) for number in range(count)]
        self._used += count * stride
        return found

    def indices(self, below: int, *shape: int) -> Tensor:
        """Random whole numbers from 0 to below `below`, int64."""
        generator = torch.Generator(self.device).manual_seed(0)
        found = torch.randint(below, shape, device=self.device, generator=generator)
        self.warm.append(found)
        return found

    def module(self, module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
        """A module on the device, in a dtype."""
        return module.to(self.device, dtype)


def _aligned(size: int) -> int:
    return max(1, -(-size // _ALIGNMENT_BYTES)) * _ALIGNMENT_BYTES
