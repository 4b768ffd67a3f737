"""Ceilings of the devices that times are predicted for, each with the source of its figure."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs

from analytic.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

_CPU_SOURCE = "{cores} cores x {ghz} GHz x {per_cycle} FLOP per cycle and core"


def _positive(_instance: Figure, _attribute: attrs.Attribute[float], value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"the figure {value!r} is not a positive number")


@attrs.frozen
class Figure:
    """One ceiling and where it is from."""

    value: float = attrs.field(validator=_positive)
    source: str


@attrs.frozen
class Hardware:
    """Ceilings of one device.

    Attributes
    ----------
    name
        How users call it.
    kind
        cpu or cuda.
    tensor_flops_per_s
        Peak of dense matrix products, by dtype.
    vector_flops_per_s
        Peak of other arithmetic, by dtype.
    memory_bytes_per_s
        Peak bandwidth of the device's memory.
    memory_bytes
        Size of the device's memory.
    provenance
        Where the ceilings are from: a datasheet, or an estimate from the processor's make-up.
    device_names
        What the driver calls such devices.
    """

    name: str
    kind: Literal["cpu", "cuda"]
    tensor_flops_per_s: Mapping[str, Figure]
    vector_flops_per_s: Mapping[str, Figure]
    memory_bytes_per_s: Figure
    memory_bytes: Figure
    provenance: Literal["datasheet", "estimated"] = "datasheet"
    device_names: tuple[str, ...] = ()

    def tensor_peak(self, dtype: str) -> float:
        """FLOP/s of matrix products in `dtype`."""
        return self._peak(self.tensor_flops_per_s, dtype)

    def vector_peak(self, dtype: str) -> float:
        """FLOP/s of other arithmetic in `dtype`."""
        return self._peak(self.vector_flops_per_s, dtype)

    def _peak(self, figures: Mapping[str, Figure], dtype: str) -> float:
        if dtype not in figures:
            raise InputError(
                f"hardware {self.name} has no peak for {dtype}; choose one of {', '.join(figures)} with --dtype"
            )
        return figures[dtype].value


def cpu_hardware(
    name: str,
    *,
    cores: int,
    ghz: float,
    fp32_per_cycle: int,
    bf16_per_cycle: int,
    gb_per_s_per_core: float,
    memory_gb: float,
) -> Hardware:
    """Ceilings of a processor from its cores and clock.

    Parameters
    ----------
    name
        How users call it.
    cores
        Physical cores.
    ghz
        Sustained clock.
    fp32_per_cycle, bf16_per_cycle
        FLOPs of one core in one cycle: lanes times 2 per fused multiply-add unit.
    gb_per_s_per_core
        Memory bandwidth that one core can draw, in 10^9 bytes per second.
    memory_gb
        Memory in 10^9 bytes.
    """

    def peak(per_cycle: int) -> Figure:
        source = _CPU_SOURCE.format(cores=cores, ghz=ghz, per_cycle=per_cycle)
        return Figure(cores * ghz * 1e9 * per_cycle, source)

    vector = peak(fp32_per_cycle)  # elementwise operators compute in fp32, whatever their dtype
    return Hardware(
        name=name,
        kind="cpu",
        tensor_flops_per_s={"bfloat16": peak(bf16_per_cycle), "float32": peak(fp32_per_cycle)},
        vector_flops_per_s={"bfloat16": vector, "float32": vector},
        memory_bytes_per_s=Figure(cores * gb_per_s_per_core * 1e9, f"{cores} cores x {gb_per_s_per_core} GB/s"),
        memory_bytes=Figure(memory_gb * 1e9, f"{memory_gb:.4g} GB"),
        provenance="estimated",
    )


def hardware_names() -> list[str]:
    """Names of the built-in devices."""
    folder = resources.files("analytic") / "data" / "hardware"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_hardware(name_or_path: str) -> Hardware:
    """Load a built-in device by its name, or a custom one from a TOML file.

    Parameters
    ----------
    name_or_path
        Name, or the path of a ``.toml`` file with the fields of `Hardware` (or, for a processor, a ``[cpu]`` table
        with the parameters of `cpu_hardware`).

    Raises
    ------
    InputError
        If there is no such device or file, or the file does not describe a device.
    """
    if name_or_path in hardware_names():
        text = (resources.files("analytic") / "data" / "hardware" / f"{name_or_path}.toml").read_text("utf-8")
        return _from_toml(text, name_or_path)
    path = Path(name_or_path)
    if path.suffix == ".toml":
        try:
            return _from_toml(path.read_text(encoding="utf-8"), path.stem)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"hardware file {name_or_path} cannot be read: {error}; give one with --hardware"
            ) from error
    choices = ", ".join(hardware_names())
    raise InputError(f"no hardware {name_or_path!r}; choose one of {choices}, or a .toml file, with --hardware")


def _from_toml(text: str, name: str) -> Hardware:
    try:
        raw = tomllib.loads(text)
        if "cpu" in raw:
            return cpu_hardware(name, **raw["cpu"])
        return _from_figures(raw, name)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"hardware {name} is not described correctly ({reason}); give one with --hardware") from error


def _from_figures(raw: dict[str, Any], name: str) -> Hardware:
    if raw["kind"] not in ("cpu", "cuda"):
        raise ValueError(f"kind is {raw['kind']!r}, it must be cpu or cuda")
    return Hardware(
        name=name,
        kind=raw["kind"],
        tensor_flops_per_s={dtype: Figure(**figure) for dtype, figure in raw["tensor_flops_per_s"].items()},
        vector_flops_per_s={dtype: Figure(**figure) for dtype, figure in raw["vector_flops_per_s"].items()},
        memory_bytes_per_s=Figure(**raw["memory_bytes_per_s"]),
        memory_bytes=Figure(**raw["memory_bytes"]),
        device_names=tuple(raw.get("device_names", ())),
    )
