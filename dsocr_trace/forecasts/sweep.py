"""Scaling tables: what a range of workloads costs at least, by the rooflines of some devices. Needs no torch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import attrs
import numpy as np
import pandas as pd

from analytic.config import DEFAULT_VARIANT, variant_config
from analytic.crops import Grid, candidate_grids
from analytic.errors import InputError
from analytic.hardware import load_hardware
from analytic.layers.base import Policy
from analytic.model import deepseek_ocr
from analytic.sweep import Points, evaluate
from analytic.whatif import Scenario, apply_settings
from analytic.workload import Workload, load_workload, profile_names
from dsocr_trace.forecasts.sweep_columns import check_exact, costs, judged, parameters, times

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from analytic.hardware import Hardware
    from analytic.model import Model

Kind: TypeAlias = Literal["vision", "sequence", "decode", "profiles"]

DEFAULT_WORKLOAD: Final = "dsocr-standard-v1"
#: Batch sizes of each kind of sweep, unless others are asked for.
BATCHES: Final[Mapping[str, tuple[int, ...]]] = {
    "vision": (1,),
    "sequence": (1, 4, 16, 64),
    "decode": (1, 4, 16, 64, 256),
    "profiles": (1, 8, 64),
}
KINDS: Final = tuple(BATCHES)
#: Settings that a sweep itself varies, or that would contradict what it varies.
_VARIED: Final = {
    "vision": {"crop_grid", "crop_mode", "base_size", "image_size", "page_width", "page_height", "seq_len"},
    "sequence": {"seq_len", "text_tokens"},
    "decode": {"max_new_tokens"},
    "profiles": set[str](),
}
BASE_SIZES_PX: Final = (512, 640, 768, 1024, 1280)
IMAGE_SIZES_PX: Final = (512, 640, 768, 1024)
#: Grids of more tiles than the crop rule ever cuts.
BEYOND_CROP_RULE: Final[tuple[Grid, ...]] = ((2, 5), (3, 4), (3, 5), (4, 4), (4, 5), (5, 5), (5, 6), (6, 6))
_LENGTHS: Final = 25

#: Round figures to plan with: a second until the first token, then 20 tokens per second and page.
TTFT_TARGET_MS: Final = 1000.0
TPOT_TARGET_MS: Final = 50.0

_NS_PER_MS: Final = 1e6


@attrs.frozen(eq=False)
class Sweep:
    """A finished sweep.

    Attributes
    ----------
    kind
        What was varied.
    scenario
        What was held; of `profiles`, the first of them.
    hardware
        Devices.
    max_positions
        Positions that the model was made for.
    ttft_target_ms, tpot_target_ms
        Longest time to the first token, and for each further one, that is asked for.
    table
        One row per workload and device; docs/sweeps.md explains the columns.
    """

    kind: Kind
    scenario: Scenario
    hardware: Sequence[Hardware]
    max_positions: int
    ttft_target_ms: float
    tpot_target_ms: float
    table: pd.DataFrame


def sweep(
    kind: Kind,
    hardware: Sequence[str],
    *,
    workload: str | None = None,
    variant: str | None = None,
    settings: Mapping[str, object] | None = None,
    batch: Sequence[int] = (),
    ttft_ms: float = TTFT_TARGET_MS,
    tpot_ms: float = TPOT_TARGET_MS,
) -> pd.DataFrame:
    """Rooflines of a range of workloads on some devices, without running them.

    Times are lower bounds: `dsocr_trace.predict` adds launches, the host and what operators take above their roof.

    Parameters
    ----------
    kind
        What varies: ``vision`` crop grids and view sizes, ``sequence`` the prompt's length, ``decode`` the number of
        new tokens, ``profiles`` the built-in workloads; and the batch size in all of them.
    hardware
        Hardware entries or TOML files.
    workload
        Profile id or TOML file that says what does not vary; not for ``profiles``.
    variant
        Size of the model; the workload names the default.
    settings
        What-if changes by key (`analytic.whatif.KEYS`).
    batch
        Batch sizes; `BATCHES` of this kind if none are given.
    ttft_ms, tpot_ms
        Targets for the time to the first token, and for the time of each further token.

    Returns
    -------
    pandas.DataFrame
        One row per workload and device.

    Raises
    ------
    InputError
        If a name is unknown, a setting impossible or varied by the sweep itself, or a target not positive.
    """
    words = [f"{key}={value}" for key, value in (settings or {}).items()]
    found = sweep_words(
        kind,
        hardware,
        workload=workload,
        variant=variant,
        settings=words,
        batch=batch,
        ttft_ms=ttft_ms,
        tpot_ms=tpot_ms,
    )
    return found.table


def sweep_words(
    kind: Kind,
    hardware: Sequence[str],
    *,
    workload: str | None,
    variant: str | None,
    settings: Sequence[str],
    batch: Sequence[int],
    ttft_ms: float,
    tpot_ms: float,
) -> Sweep:
    """Sweep as `sweep` does, with what-if changes as ``KEY=VALUE`` words."""
    _check(kind, workload, settings, batch, {"ttft-ms": ttft_ms, "tpot-ms": tpot_ms})
    devices = _devices(hardware)
    profiles = [load_workload(name) for name in _profiles(kind, workload)]
    variant = variant or (DEFAULT_VARIANT if kind == "profiles" else profiles[0].variant)
    config = variant_config(variant)
    model = deepseek_ocr(config)
    policy = Policy(dtype=config.torch_dtype)
    scenarios = [apply_settings(Scenario(profile, policy), settings) for profile in profiles]
    bases = (scenario.workload for scenario in scenarios)
    workloads = [
        attrs.evolve(each, batch_size=size, variant=variant)
        for base in bases
        for each in _axis(kind, base, config.max_positions)
        for size in sorted(set(batch or BATCHES[kind]))
    ]
    targets = ttft_ms * _NS_PER_MS, tpot_ms * _NS_PER_MS
    table = _table(model, workloads, scenarios[0], devices, targets)
    return Sweep(kind, scenarios[0], devices, config.max_positions, ttft_ms, tpot_ms, table)


def _check(
    kind: str, workload: str | None, settings: Iterable[str], batch: Iterable[int], targets: Mapping[str, float]
) -> None:
    if kind not in KINDS:
        raise InputError(f"no sweep {kind!r}; choose one of {', '.join(KINDS)}")
    if kind == "profiles" and workload is not None:
        raise InputError("sweep profiles takes every built-in profile; leave --workload out")
    varied = _VARIED[kind] | {"batch_size"}
    for word in settings:
        key = word.partition("=")[0]
        if key == "batch_size":
            raise InputError("batch sizes vary in a sweep; give them with --batch instead of --set batch_size=")
        if key in varied:
            raise InputError(f"sweep {kind} itself decides on {key}; leave --set {key}= out")
    for size in batch:
        if size < 1:
            raise InputError(f"batch size is {size}, it must be positive; change it with --batch")
    for option, target in targets.items():
        if not 0 < target < np.inf:
            raise InputError(f"target is {target:g} ms, it must be positive; change it with --{option}")


def _devices(names: Sequence[str]) -> list[Hardware]:
    if not names:
        raise InputError("a sweep needs a device; give one or several with --hardware")
    for name in names:
        if Path(name).suffix == ".parquet":
            raise InputError(
                f"{name} is a calibration, and sweeps are rooflines of datasheets; name a hardware entry with "
                "--hardware, or give the calibration to dsocr-trace predict"
            )
    devices = [load_hardware(name) for name in names]
    for one, other in itertools.combinations(devices, 2):
        if one.name == other.name:
            raise InputError(f"hardware {one.name} is given twice; give each device once with --hardware")
    return devices


def _profiles(kind: Kind, workload: str | None) -> list[str]:
    return profile_names() if kind == "profiles" else [workload or DEFAULT_WORKLOAD]


def _axis(kind: Kind, base: Workload, most: int) -> Iterator[Workload]:
    """The workloads of a sweep, of one batch size."""
    if kind == "vision":
        yield from _pages(base)
    elif kind == "sequence":
        for length in _lengths(base.image_tokens + 1, most, "sequence"):
            yield attrs.evolve(base, text_tokens=length - base.image_tokens)
    elif kind == "decode":
        for tokens in _lengths(2, most - base.seq_len + 1, "decode"):
            yield attrs.evolve(base, max_new_tokens=tokens)
    else:
        yield base


def _pages(base: Workload) -> Iterator[Workload]:
    for base_size in BASE_SIZES_PX:
        whole = attrs.evolve(base, base_size=base_size, crop_mode=False, tile_grid=None)
        yield whole
        for grid, image_size in itertools.product((*candidate_grids(), *BEYOND_CROP_RULE), IMAGE_SIZES_PX):
            yield attrs.evolve(whole, crop_mode=True, tile_grid=grid, image_size=image_size)


def _lengths(first: int, last: int, kind: str) -> list[int]:
    """Both ends, powers of two, and numbers between them at equal ratios."""
    if first > last:
        raise InputError(
            f"sweep {kind} has no room: the page and prompt leave no position of the model's; "
            "choose a smaller page with --workload or --set"
        )
    ratios = np.geomspace(first, last, _LENGTHS).round().astype(int).tolist()
    powers = [2**power for power in range(last.bit_length()) if first <= 2**power <= last]
    return sorted({first, last, *ratios, *powers})


def _table(
    model: Model,
    workloads: Sequence[Workload],
    scenario: Scenario,
    devices: Sequence[Hardware],
    targets: tuple[float, float],
) -> pd.DataFrame:
    layouts = [workload.layout for workload in workloads]
    pages = list(dict.fromkeys(layouts))
    numbers = {page: number for number, page in enumerate(pages)}
    points = Points(
        pages=pages,
        page=np.array([numbers[layout] for layout in layouts]),
        seq_len=np.array([workload.seq_len for workload in workloads]),
        new_tokens=np.array([workload.max_new_tokens for workload in workloads]),
        batch=np.array([workload.batch_size for workload in workloads]),
    )
    found = evaluate(model, points, hardware=devices, policy=scenario.policy, routing=scenario.routing)
    check_exact(found)
    shared = pd.DataFrame([parameters(workload, model.config.max_positions) for workload in workloads]).assign(
        dtype=scenario.policy.dtype,
        attention=scenario.policy.attention,
        attention_flops=scenario.policy.attention_flops,
        routing=scenario.routing,
    )
    shared = pd.concat([shared, pd.DataFrame(costs(found))], axis="columns")
    frames = []
    for device in devices:
        frame = pd.concat([shared, pd.DataFrame(times(found, device.name))], axis="columns")
        frame.insert(1, "hardware", device.name)
        frames.append(judged(frame, device, *targets))
    return pd.concat(frames, ignore_index=True)
