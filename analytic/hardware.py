"""Ceilings of the devices that times are predicted for, each with the source of its figure."""

from __future__ import annotations

import difflib
import math
import reprlib
import tomllib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import attrs

from analytic.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

_NEEDED_DTYPES: Final = ("bfloat16", "float32")
#: Types that a run computes in.
_RUN_DTYPES: Final = (*_NEEDED_DTYPES, "float16")
#: tf32 and fp8 are matrix peaks only, for planning.
_DTYPES: Final = (*_RUN_DTYPES, "tf32", "fp8")

#: Datasheets round: a sparse figure to four digits, a dense one to three.
_ROUNDING: Final = 0.005
#: And a peak may be stated at a clock that is rounded too.
_CLOCK_ROUNDING: Final = 1.02

_CPU_SOURCE: Final = "{cores} cores x {ghz} GHz x {per_cycle} FLOP per cycle and core"
_CPU_FIELDS: Final = {
    "cores": (1, 4096, "cores"),
    "ghz": (0.5, 10, "GHz"),
    "fp32_per_cycle": (2, 1e5, "FLOP per cycle and core"),
    "bf16_per_cycle": (2, 1e5, "FLOP per cycle and core"),
    "gb_per_s_per_core": (1, 1000, "GB/s per core"),
    "memory_gb": (1, 1e5, "GB"),
    "l2_mib_per_core": (0.1, 100, "MiB per core"),
}


def _brief(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else reprlib.repr(value)


def _check_number(field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{field} is {_brief(value)}, it must be a positive number")


def _check_range(field: str, value: float, low: float, high: float, unit: str) -> None:
    if not low <= value <= high:
        raise ValueError(f"{field} is {_brief(value)}, it must be between {low:g} and {high:g} {unit}")


def _check_source(field: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{field} is {_brief(value)}, it must say where the figures are from")


def _positive(_instance: Figure, attribute: attrs.Attribute[Any], value: float | None) -> None:
    if value is not None:
        _check_number(attribute.name, value)


def _stated(_instance: Figure, attribute: attrs.Attribute[str], value: str) -> None:
    _check_source(attribute.name, value)


def _twice_the_dense(instance: Figure, _attribute: attrs.Attribute[Any], sparse: float | None) -> None:
    if sparse is not None and not math.isclose(2 * instance.value, sparse, rel_tol=_ROUNDING):
        raise ValueError(
            f"value is {_brief(instance.value)} where sparse_value is {_brief(sparse)}, "
            f"it must be the dense figure, {sparse / 2:g}"
        )


@attrs.frozen
class Figure:
    """One ceiling and where it is from.

    Attributes
    ----------
    value
        The ceiling; of a matrix peak, the dense one.
    source
        Datasheet or other origin, with the arithmetic where the figure is derived.
    sparse_value
        What the datasheet says with 2:4 sparsity, as evidence that `value` is the dense figure.
    flops_per_cycle
        Dense FLOPs of one multiprocessor in one cycle, as further evidence.
    """

    value: float = attrs.field(validator=_positive)
    source: str = attrs.field(validator=_stated)
    sparse_value: float | None = attrs.field(default=None, validator=[_positive, _twice_the_dense])
    flops_per_cycle: float | None = attrs.field(default=None, validator=_positive)


def _between(low: float, high: float, unit: str) -> Callable[[Hardware, attrs.Attribute[Any], Any], None]:
    """Validator that finds figures given in the wrong unit."""

    def check(
        _instance: Hardware, attribute: attrs.Attribute[Any], given: Mapping[str, Figure] | Figure | None
    ) -> None:
        if given is None:
            return
        named = {"": given} if isinstance(given, Figure) else {f".{dtype}": figure for dtype, figure in given.items()}
        for suffix, figure in named.items():
            _check_range(f"{attribute.name}{suffix}.value", figure.value, low, high, unit)

    return check


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
    l2_bytes
        Size of the second-level cache, over the whole device.
    multiprocessors
        Streaming multiprocessors of a GPU.
    clock_hz
        Boost clock of a GPU.
    provenance
        Where the ceilings are from: a datasheet, or an estimate from the processor's make-up.
    device_names
        What the driver calls such devices.
    """

    name: str
    kind: Literal["cpu", "cuda"]
    tensor_flops_per_s: Mapping[str, Figure] = attrs.field(validator=_between(1e9, 1e18, "FLOP/s (1 TFLOP/s is 1e12)"))
    vector_flops_per_s: Mapping[str, Figure] = attrs.field(validator=_between(1e9, 1e18, "FLOP/s (1 TFLOP/s is 1e12)"))
    memory_bytes_per_s: Figure = attrs.field(validator=_between(1e9, 1e15, "bytes/s (1 TB/s is 1e12)"))
    memory_bytes: Figure = attrs.field(validator=_between(1e9, 1e14, "bytes (1 GB is 1e9)"))
    l2_bytes: Figure | None = attrs.field(default=None, validator=_between(2.5e5, 1e10, "bytes (1 MiB is 1048576)"))
    multiprocessors: Figure | None = attrs.field(default=None, validator=_between(1, 1e4, "multiprocessors"))
    clock_hz: Figure | None = attrs.field(default=None, validator=_between(1e8, 1e10, "Hz (1 GHz is 1e9)"))
    provenance: Literal["datasheet", "estimated"] = "datasheet"
    device_names: tuple[str, ...] = ()

    def __attrs_post_init__(self) -> None:
        if self.multiprocessors is None or self.clock_hz is None:
            return
        count, clock = self.multiprocessors.value, self.clock_hz.value
        for dtype, figure in self.tensor_flops_per_s.items():
            most = count * clock * (figure.flops_per_cycle or math.inf)
            if figure.value > most * _CLOCK_ROUNDING:
                raise ValueError(
                    f"tensor_flops_per_s.{dtype}.value is {_brief(figure.value)}, it must be the dense figure: "
                    f"{count} multiprocessors x {clock:g} Hz x {figure.flops_per_cycle} FLOP per cycle are {most:g}"
                )

    def tensor_peak(self, dtype: str) -> float:
        """FLOP/s of matrix products in `dtype`."""
        return self._peak(self.tensor_flops_per_s, dtype)

    def vector_peak(self, dtype: str) -> float:
        """FLOP/s of other arithmetic in `dtype`."""
        return self._peak(self.vector_flops_per_s, dtype)

    def _peak(self, figures: Mapping[str, Figure], dtype: str) -> float:
        if dtype not in figures:
            choices = ", ".join(self.vector_flops_per_s)
            raise InputError(f"hardware {self.name} has no peak for {dtype}; choose one of {choices} with --dtype")
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
    l2_mib_per_core: float | None = None,
    source: str = "the processor that runs",
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
    l2_mib_per_core
        Second-level cache of one core, in 2^20 bytes.
    source
        Where these are from.
    """

    def figure(value: float, arithmetic: str) -> Figure:
        return Figure(value, f"{arithmetic}; {source}")

    def peak(per_cycle: int) -> Figure:
        return figure(cores * ghz * 1e9 * per_cycle, _CPU_SOURCE.format(cores=cores, ghz=ghz, per_cycle=per_cycle))

    l2 = None
    if l2_mib_per_core is not None:
        l2 = figure(cores * l2_mib_per_core * 2**20, f"{cores} cores x {l2_mib_per_core} MiB")
    vector = peak(fp32_per_cycle)  # elementwise operators compute in fp32, whatever their dtype
    return Hardware(
        name=name,
        kind="cpu",
        tensor_flops_per_s={"bfloat16": peak(bf16_per_cycle), "float32": peak(fp32_per_cycle)},
        vector_flops_per_s={"bfloat16": vector, "float32": vector},
        memory_bytes_per_s=figure(cores * gb_per_s_per_core * 1e9, f"{cores} cores x {gb_per_s_per_core} GB/s"),
        memory_bytes=figure(memory_gb * 1e9, f"{memory_gb:.4g} GB"),
        l2_bytes=l2,
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
        return _from_toml(text, name_or_path, name_or_path)
    path = Path(name_or_path)
    if path.suffix == ".toml":
        try:
            return _from_toml(path.read_text(encoding="utf-8"), path.stem, name_or_path)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"hardware file {name_or_path} cannot be read: {error}; give one with --hardware"
            ) from error
    choices = ", ".join(hardware_names())
    raise InputError(f"no hardware {name_or_path!r}; choose one of {choices}, or a .toml file, with --hardware")


def _from_toml(text: str, name: str, origin: str) -> Hardware:
    try:
        raw = tomllib.loads(text)
        if "cpu" in raw:
            return _from_cpu(raw, name)
        return _from_figures(raw, name)
    except tomllib.TOMLDecodeError as error:
        raise InputError(
            f"hardware file {origin} is not valid TOML: {error}; correct it or choose another with --hardware"
        ) from error
    except ValueError as error:
        raise InputError(f"hardware file {origin}: {error}; correct it or choose another with --hardware") from error


def _table(raw: Any, where: str, known: Collection[str], needed: Collection[str]) -> dict[str, Any]:
    """`raw`, once it is a table with all keys that are needed and no others than are known."""
    if not isinstance(raw, dict):
        raise ValueError(  # noqa: TRY004  what the user gave is wrong, not the caller
            f"{where} is {_brief(raw)}, it must be a table with {', '.join(needed)}"
        )
    prefix = f"{where}." if where else ""
    for key, value in raw.items():
        if key not in known:
            # Options say fp32 where files say float32.
            nearest = difflib.get_close_matches(key.replace("fp", "float"), known, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]}? " if nearest else ""
            choices = ", ".join(known)
            raise ValueError(
                f"{prefix}{key} is {_brief(value)}, but no such field is known; {hint}It is one of {choices}"
            )
    for key in needed:
        if key not in raw:
            raise ValueError(f"{prefix}{key} is missing; needed are {', '.join(needed)}")
    return raw


def _from_cpu(raw: dict[str, Any], name: str) -> Hardware:
    _table(raw, "", ["cpu"], ["cpu"])
    known = [*_CPU_FIELDS, "source"]
    fields = _table(raw["cpu"], "cpu", known, [key for key in known if key != "l2_mib_per_core"])
    _check_source("cpu.source", fields["source"])
    for key, (low, high, unit) in _CPU_FIELDS.items():
        if key in fields:
            _check_number(f"cpu.{key}", fields[key])
            _check_range(f"cpu.{key}", fields[key], low, high, unit)
    return cpu_hardware(name, **fields)


def _figure(raw: Any, where: str) -> Figure:
    fields = _table(raw, where, [field.name for field in attrs.fields(Figure)], ["value", "source"])
    try:
        return Figure(**fields)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from error


def _from_figures(raw: dict[str, Any], name: str) -> Hardware:
    fields = [field for field in attrs.fields(Hardware) if field.name not in ("name", "provenance")]
    needed = [field.name for field in fields if field.default is attrs.NOTHING]
    _table(raw, "", [field.name for field in fields], needed)
    if raw["kind"] not in ("cpu", "cuda"):
        raise ValueError(f"kind is {_brief(raw['kind'])}, it must be cpu or cuda")
    names = raw.get("device_names", [])
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        raise ValueError(f"device_names is {_brief(names)}, it must be a list of names as the driver reports them")
    peaks = _table(raw["tensor_flops_per_s"], "tensor_flops_per_s", _DTYPES, _NEEDED_DTYPES)
    tensor = {dtype: _figure(peak, f"tensor_flops_per_s.{dtype}") for dtype, peak in peaks.items()}
    others = ("kind", "device_names", "tensor_flops_per_s")
    single = {key: _figure(figure, key) for key, figure in raw.items() if key not in others}
    # Elementwise kernels compute in fp32, whatever they read and write, so one figure is for all.
    vector = single["vector_flops_per_s"]
    return Hardware(
        name=name,
        kind=raw["kind"],
        tensor_flops_per_s=tensor,
        vector_flops_per_s={dtype: vector for dtype in tensor if dtype in _RUN_DTYPES},
        memory_bytes_per_s=single["memory_bytes_per_s"],
        memory_bytes=single["memory_bytes"],
        l2_bytes=single.get("l2_bytes"),
        multiprocessors=single.get("multiprocessors"),
        clock_hz=single.get("clock_hz"),
        device_names=tuple(names),
    )
