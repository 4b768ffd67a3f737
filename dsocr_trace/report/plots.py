"""Pictures of a sweep: small multiples, one axis for all of them."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from dsocr_trace.report.panels import (
    COLOURS,
    SIZE_COLOURS,
    STYLE,
    VEIL,
    bars,
    by_batch,
    by_tiles,
    crop_rule,
    legend,
    line,
    mean_cached,
    on_first,
    panels,
    plain,
    plain_between,
    shares,
    smallest_batch,
    target,
    tile_sizes,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from dsocr_trace.forecasts.sweep import Sweep

#: Of a title, per inch of a picture's width but for that of its legend.
_CHARACTERS: Final = 12
_LEGEND: Final = 2.2
_MS, _GB, _TFLOP = 1e6, 1e9, 1e12


def save_plots(sweep: Sweep, folder: Path) -> dict[str, str]:
    """Draw all pictures of a sweep into a folder, each as SVG and PNG.

    Returns
    -------
    dict of str to str
        What each picture shows, by the name of its files without their suffix.
    """
    drawn = {}
    with mpl.rc_context(STYLE):
        for name, draw in _PICTURES[sweep.kind].items():
            figure, caption = draw(sweep)
            title = textwrap.fill(caption, int(_CHARACTERS * (figure.get_figwidth() - _LEGEND)))
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            figure.savefig(folder / f"{name}.png", dpi=150)
            drawn[name] = caption
    return drawn


def _vision_work(sweep: Sweep) -> tuple[Figure, str]:
    table, base = smallest_batch(on_first(sweep)), sweep.scenario.workload.base_size
    figure = Figure(figsize=(8.2, 3.5), layout="constrained")
    whole, tiled = figure.subplots(1, 2)
    frame = table[table.tiles == 0].sort_values("base_size_px")
    parts = {"SAM": "sam", "CLIP": "clip", "projector": "projector"}
    left = np.zeros(len(frame))
    for colour, (label, part) in zip(COLOURS, parts.items(), strict=False):
        values = frame[f"vision_{part}_tensor_flops"].to_numpy() / _TFLOP
        whole.bar(frame.base_size_px.astype(str), values, bottom=left, color=colour, label=label)
        left += values
    whole.set(title="no tiles", xlabel="global view, px", ylabel="vision work, TFLOP")
    whole.legend(loc="upper left")
    for colour, size in zip(SIZE_COLOURS, tile_sizes(table), strict=False):
        group = by_tiles(table[table.base_size_px == base], size)
        line(tiled, group, "tiles", "vision_tensor_flops", _TFLOP, colour, f"{size} px tiles")
    tiled.set(title=f"tiles and a global view of {base} px", xlabel="tiles", ylabel="vision work, TFLOP")
    tiled.legend(loc="upper left")
    crop_rule(tiled)
    return figure, "Vision work by size of the global view, and by number and size of tiles"


def _vision_ttft(sweep: Sweep) -> tuple[Figure, str]:
    names = [device.name for device in sweep.hardware]
    figure, axes = panels(names, "tiles", "time to first token, ms", logy=True)
    base = sweep.scenario.workload.base_size
    for axis, name in zip(axes, names, strict=True):
        frame = smallest_batch(sweep.table[(sweep.table.hardware == name) & (sweep.table.base_size_px == base)])
        for colour, size in zip(SIZE_COLOURS, tile_sizes(frame), strict=False):
            line(axis, by_tiles(frame, size), "tiles", "ttft_ns", _MS, colour, f"{size} px tiles")
        crop_rule(axis)
        target(axis, sweep.ttft_target_ms)
    legend(figure, axes[0], hollow="beyond the crop rule")
    return figure, f"Time to the first token by number of tiles, with a global view of {base} px"


def _vision_parts(sweep: Sweep) -> tuple[Figure, str]:
    base, name = sweep.scenario.workload.base_size, sweep.hardware[0].name
    table = smallest_batch(on_first(sweep))
    table = table[table.base_size_px == base]
    sizes = tile_sizes(table)
    figure, axes = panels([f"tiles of {size} px" for size in sizes], "tiles", f"share of time to first token on {name}")
    parts = {
        "SAM": "vision_sam_ns",
        "CLIP": "vision_clip_ns",
        "projector": "vision_projector_ns",
        "prefill": "prefill_ns",
    }
    for axis, size in zip(axes, sizes, strict=True):
        shares(axis, by_tiles(table, size), "tiles", parts, "ttft_ns")
        crop_rule(axis)
    legend(figure, axes[0])
    return figure, f"What the time to the first token is made of on {name}, with a global view of {base} px"


def _sequence_ttft(sweep: Sweep) -> tuple[Figure, str]:
    names = [device.name for device in sweep.hardware]
    figure, axes = panels(names, "prompt, positions", "time to first token, ms", logx=True, logy=True)
    for axis, name in zip(axes, names, strict=True):
        by_batch(axis, sweep.table[sweep.table.hardware == name], "seq_len", "ttft_ns", _MS)
        target(axis, sweep.ttft_target_ms)
    legend(figure, axes[0], hollow="does not fit into memory")
    return figure, "Time to the first token by length of the prompt, for each batch size"


def _sequence_parts(sweep: Sweep) -> tuple[Figure, str]:
    table, name = on_first(sweep), sweep.hardware[0].name
    batches = sorted(table.batch_size.unique())
    titles = [f"batch {batch}" for batch in batches]
    figure, axes = panels(titles, "prompt, positions", f"share of time to first token on {name}", logx=True)
    parts = {
        "vision": "vision_ns",
        "prefill: attention": "prefill_attention_ns",
        "prefill: experts": "prefill_experts_ns",
        "prefill: language head": "prefill_language_head_ns",
        "prefill: rest": "prefill_other_ns",
    }
    for axis, batch in zip(axes, batches, strict=True):
        shares(axis, table[table.batch_size == batch].sort_values("seq_len"), "seq_len", parts, "ttft_ns")
    legend(figure, axes[0])
    return figure, f"What the time to the first token is made of on {name}, for each batch size"


def _memory(sweep: Sweep) -> tuple[Figure, str]:
    figure, axes = panels([""], "cached positions at the end", "memory needed, GB", logx=True, logy=True)
    by_batch(axes[0], on_first(sweep), "positions", "memory_needed_bytes", _GB, hollow=False)
    for device in sweep.hardware:
        size = device.memory_bytes.value / _GB
        axes[0].axhline(size, color="#555555", linewidth=1, linestyle=(0, (4, 3)))
        axes[0].annotate(
            device.name, (0.01, size), xycoords=("axes fraction", "data"), va="center", fontsize=8, bbox=VEIL
        )
    legend(figure, axes[0])
    return figure, "Memory needed, beside what the devices have (dashed)"


def _decode_tpot(sweep: Sweep) -> tuple[Figure, str]:
    names = [device.name for device in sweep.hardware]
    figure, axes = panels(
        names, "cached positions, mean over the generation", "time per token, ms", logx=True, logy=True
    )
    for axis, name in zip(axes, names, strict=True):
        frame = sweep.table[sweep.table.hardware == name]
        by_batch(axis, frame.assign(cached=mean_cached(frame)), "cached", "tpot_ns", _MS, markers="decode_regime")
        target(axis, sweep.tpot_target_ms)
    met = sorted(set(sweep.table.decode_regime))
    legend(figure, axes[0], hollow="does not fit into memory", markers=met)
    return figure, "Time per further token by cached positions, for each batch size; the shape tells the regime"


def _decode_traffic(sweep: Sweep) -> tuple[Figure, str]:
    table = on_first(sweep)
    batches = sorted(table.batch_size.unique())
    titles = [f"batch {batch}" for batch in batches]
    figure, axes = panels(titles, "cached positions", "traffic of one decode forward, GB", logx=True, logy=True)
    for axis, batch in zip(axes, batches, strict=True):
        frame = table[table.batch_size == batch].sort_values("max_new_tokens")
        steps, cached = frame.max_new_tokens - 1, mean_cached(frame)
        rest = frame.decode_bytes_read + frame.decode_bytes_written - frame.decode_weight_bytes - frame.kv_traffic_bytes
        for colour, label, moved in zip(
            COLOURS,
            ("weights", "KV cache", "activations"),
            (frame.decode_weight_bytes, frame.kv_traffic_bytes, rest),
            strict=False,
        ):
            axis.plot(cached, moved / steps / _GB, color=colour, label=label)
        crossing = frame.kv_overtakes_weights_at_positions.iloc[0]
        if cached.min() <= crossing <= cached.max():
            axis.axvline(crossing, color="#555555", linewidth=1, linestyle=(0, (4, 3)))
            axis.annotate(
                f"{crossing:,.0f}",
                (crossing, 0.02),
                xycoords=("data", "axes fraction"),
                fontsize=8,
                xytext=(3, 0),
                textcoords="offset points",
            )
    legend(figure, axes[0])
    return figure, "Traffic of one decode forward; dashed where KV traffic overtakes that of the weights"


def _decode_throughput(sweep: Sweep) -> tuple[Figure, str]:
    names = [device.name for device in sweep.hardware]
    figure, axes = panels(names, "time per token, ms", "tokens per second, all pages", logy=True)
    lengths = sorted(sweep.table.max_new_tokens.unique())
    shown = [lengths[round(share * (len(lengths) - 1))] for share in (0, 0.6, 0.8, 1)]
    for axis, name in zip(axes, names, strict=True):
        frame = sweep.table[sweep.table.hardware == name].assign(tpot_ms=sweep.table.tpot_ns / _MS)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(plain))
        axis.xaxis.set_minor_formatter(FuncFormatter(plain_between))
        for colour, tokens in zip(SIZE_COLOURS, shown, strict=True):
            group = frame[frame.max_new_tokens == tokens].sort_values("batch_size")
            hollow = ~group.fits_device_memory
            label = f"{tokens:,} new tokens"
            line(axis, group, "tpot_ms", "decode_tokens_per_second", 1, colour, label, hollow=hollow)
        for point in frame[frame.max_new_tokens == shown[0]].itertuples():
            place = point.tpot_ms, point.decode_tokens_per_second
            axis.annotate(
                f"{point.batch_size}", place, xytext=(-4, 3), textcoords="offset points", ha="right", fontsize=7
            )
        target(axis, sweep.tpot_target_ms, vertical=True)
    legend(figure, axes[0], hollow="does not fit into memory")
    return figure, "Throughput against latency of decode: each point is a batch size, written beside it"


def _profiles_time(sweep: Sweep) -> tuple[Figure, str]:
    names = [device.name for device in sweep.hardware]
    figure, axes = panels(names, "time per batch, ms", "", rows=True)
    table = smallest_batch(sweep.table)
    for axis, name in zip(axes, names, strict=True):
        frame = table[table.hardware == name]
        bars(axis, frame, {stage: frame[f"{stage}_ns"] / _MS for stage in ("vision", "prefill", "decode")})
    legend(figure, axes[0])
    return figure, f"Time of each profile by stage, batch {table.batch_size.iloc[0]}"


def _profiles_work(sweep: Sweep) -> tuple[Figure, str]:
    figure, axes = panels([""], "matrix work per batch, TFLOP", "", rows=True)
    frame = smallest_batch(on_first(sweep))
    bars(axes[0], frame, {stage: frame[f"{stage}_tensor_flops"] / _TFLOP for stage in ("vision", "prefill", "decode")})
    legend(figure, axes[0])
    return figure, f"Matrix work of each profile by stage, batch {frame.batch_size.iloc[0]}"


def _profiles_throughput(sweep: Sweep) -> tuple[Figure, str]:
    names = [device.name for device in sweep.hardware]
    figure, axes = panels(names, "batch", "tokens per second, all pages", logx=True, logy=True)
    for axis, name in zip(axes, names, strict=True):
        frame = sweep.table[sweep.table.hardware == name]
        for colour, (profile, group) in zip(COLOURS, frame.groupby("workload"), strict=False):
            line(
                axis,
                group.sort_values("batch_size"),
                "batch_size",
                "tokens_per_second",
                1,
                colour,
                str(profile),
                hollow=~group.fits_device_memory,
            )
    legend(figure, axes[0], hollow="does not fit into memory")
    return figure, "Tokens per second of each profile, its first token included, by batch size"


_PICTURES: Final[Mapping[str, Mapping[str, Any]]] = {
    "vision": {"vision-work": _vision_work, "vision-ttft": _vision_ttft, "vision-parts": _vision_parts},
    "sequence": {"sequence-ttft": _sequence_ttft, "sequence-parts": _sequence_parts, "sequence-memory": _memory},
    "decode": {
        "decode-tpot": _decode_tpot,
        "decode-traffic": _decode_traffic,
        "decode-throughput": _decode_throughput,
        "decode-memory": _memory,
    },
    "profiles": {
        "profiles-time": _profiles_time,
        "profiles-work": _profiles_work,
        "profiles-throughput": _profiles_throughput,
    },
}
