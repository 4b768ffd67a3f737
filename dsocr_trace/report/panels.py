"""Axes of a sweep's pictures, and what is drawn on them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from analytic.crops import MAX_TILES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pandas as pd
    from matplotlib.axes import Axes

    from dsocr_trace.forecasts.sweep import Sweep

#: Source: Okabe and Ito, "Color Universal Design", 2008; told apart with any kind of colour vision.
COLOURS: Final = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
_MARKERS: Final = {"weight-bound": "o", "KV-bound": "s", "activation-bound": "D", "compute-bound": "^"}
#: For sizes, which have an order.
SIZE_COLOURS: Final = ("#9ECAE1", "#4292C6", "#2171B5", "#08306B")
_COLUMNS: Final = 3
STYLE: Final[dict[Any, Any]] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.75,
    "axes.titlelocation": "left",
    "svg.hashsalt": "dsocr-trace",
    "svg.fonttype": "none",
}
VEIL: Final[dict[str, Any]] = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1}
#: Numbers from here on are written without decimals.
_LARGE: Final = 100


def on_first(sweep: Sweep) -> pd.DataFrame:
    """Rows of the first device: costs are the same on all of them."""
    return sweep.table[sweep.table.hardware == sweep.hardware[0].name]


def smallest_batch(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of the smallest batch."""
    return table[table.batch_size == table.batch_size.min()]


def by_tiles(table: pd.DataFrame, image_size: int) -> pd.DataFrame:
    """Pages without tiles and with tiles of this size; of grids with as many tiles, the one with the longest prompt."""
    mine = table[(table.tiles == 0) | (table.image_size_px == image_size)]
    return mine.sort_values(["tiles", "seq_len"]).drop_duplicates("tiles", keep="last")


def tile_sizes(table: pd.DataFrame) -> list[int]:
    """Sizes of tiles that occur, in pixels."""
    sizes: list[int] = sorted(table[table.tiles > 0].image_size_px.unique())
    return sizes


def mean_cached(table: pd.DataFrame) -> pd.Series:
    """Cached positions of the mean decode forward, whose cost is the mean cost."""
    return table.seq_len + table.max_new_tokens / 2


def panels(
    titles: Sequence[str], xlabel: str, ylabel: str, *, logx: bool = False, logy: bool = False, rows: bool = False
) -> tuple[Figure, list[Axes]]:
    """Axes of one scale, side by side; `rows` stacks them and leaves the vertical axis to names."""
    columns = 1 if rows else min(len(titles), 2 if len(titles) == 4 else _COLUMNS)
    lines = math.ceil(len(titles) / columns)
    size = (8.0, 0.9 + 1.9 * lines) if rows else (max(2.4 + 2.9 * columns, 7.0), 1.2 + 2.5 * lines)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(lines, columns, sharex=not rows, sharey=True, squeeze=False).flat)
    for unused in axes[len(titles) :]:
        unused.set_visible(False)
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title)
        if logx:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(FuncFormatter(plain))
        if logy:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(FuncFormatter(plain))
            axis.yaxis.set_minor_formatter(FuncFormatter(plain_between))
        axis.xaxis.set_tick_params(labelbottom=True)
    figure.supxlabel(xlabel, fontsize=9)
    figure.supylabel(ylabel, fontsize=9)
    return figure, axes[: len(titles)]


def plain(value: float, _: int) -> str:
    """Number of a tick, without exponent."""
    return f"{value:,.10g}"


def plain_between(value: float, _: int) -> str:
    """Number of a tick between powers of ten, of which only some have room."""
    return f"{value:,.10g}" if f"{value:e}"[0] in "25" else ""


def line(  # noqa: PLR0917  what is drawn, then how
    axis: Axes, group: pd.DataFrame, x: str, y: str, unit: float, colour: str, label: str, *,
    hollow: pd.Series | None = None,
) -> None:  # fmt: skip
    """One line; what is hollow (by default what the crop rule never cuts) has open markers."""
    open_ones = group.beyond_crop_rule if hollow is None else hollow
    values = group[y] / unit
    axis.plot(group[x], values, color=colour, label=label)
    faces = [("white" if each else colour) for each in open_ones]
    axis.scatter(group[x], values, s=14, facecolors=faces, edgecolors=[colour], zorder=3, linewidths=1)


def by_batch(
    axis: Axes, table: pd.DataFrame, x: str, y: str, unit: float, *, hollow: bool = True, markers: str | None = None
) -> None:
    """One line per batch size, darker for smaller ones."""
    batches = sorted(table.batch_size.unique())
    shades = mpl.colormaps["viridis"](np.linspace(0, 0.88, len(batches)))
    for shade, batch in zip(shades, batches, strict=True):
        group = table[table.batch_size == batch].sort_values(x)
        axis.plot(group[x], group[y] / unit, color=shade, label=f"batch {batch}")
        kinds = group.groupby(markers) if markers else [("weight-bound", group)]
        for kind, members in kinds:
            faces = ["white" if hollow and not fits else shade for fits in members.fits_device_memory]
            axis.scatter(
                members[x], members[y] / unit, s=14, facecolors=faces, edgecolors=[shade], marker=_MARKERS[kind],
                zorder=3, linewidths=1,
            )  # fmt: skip


def shares(axis: Axes, group: pd.DataFrame, x: str, parts: Mapping[str, str], whole: str) -> None:
    """Stacked shares of a whole."""
    shares = [group[column] / group[whole] for column in parts.values()]
    axis.stackplot(group[x], shares, labels=list(parts), colors=COLOURS, linewidth=0)
    axis.set_ylim(0, 1)
    axis.set_xlim(group[x].min(), group[x].max())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axis.grid(visible=False)


def bars(axis: Axes, frame: pd.DataFrame, parts: Mapping[str, pd.Series]) -> None:
    """Stacked bars, one per profile, with their sum behind them."""
    left = np.zeros(len(frame))
    for colour, (label, values) in zip(COLOURS, parts.items(), strict=False):
        axis.barh(frame.workload, values, left=left, color=colour, label=label, height=0.65)
        left += values.to_numpy()
    for name, total in zip(frame.workload, left, strict=True):
        axis.annotate(
            f"{total:,.0f}" if total >= _LARGE else f"{total:.3g}",
            (total, name),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.margins(x=0.1)


def crop_rule(axis: Axes) -> None:
    """Mark where the crop rule ends."""
    axis.axvline(MAX_TILES + 0.5, color="#777777", linewidth=1, linestyle=(0, (1, 2)))
    place = (MAX_TILES + 0.7, 0.03)
    axis.annotate("crop rule ends", place, xycoords=("data", "axes fraction"), fontsize=7, color="#555555", bbox=VEIL)


def target(axis: Axes, target_ms: float, *, vertical: bool = False) -> None:
    """Line of a target, with its value."""
    style: dict[str, Any] = {"color": "#B00020", "linewidth": 1, "linestyle": (0, (4, 3))}
    text: dict[str, Any] = {"color": "#B00020", "fontsize": 8, "textcoords": "offset points", "bbox": VEIL}
    label = f"target {target_ms:g} ms"
    if vertical:
        axis.axvline(target_ms, **style)
        axis.annotate(label, (target_ms, 0.02), xycoords=("data", "axes fraction"), xytext=(-3, 0), ha="right", **text)
    else:
        axis.axhline(target_ms, **style)
        axis.annotate(label, (0.02, target_ms), xycoords=("axes fraction", "data"), xytext=(0, 2), **text)


def legend(figure: Figure, axis: Axes, *, hollow: str | None = None, markers: Iterable[str] = ()) -> None:
    """One legend for all panels, beside them."""
    handles, labels = axis.get_legend_handles_labels()
    grey: dict[str, Any] = {"color": "#555555", "linestyle": "none", "markersize": 4}
    for regime in markers:
        handles.append(Line2D([], [], marker=_MARKERS.get(regime, "o"), **grey))
        labels.append(regime)
    if hollow:
        handles.append(Line2D([], [], marker="o", markerfacecolor="white", **grey))
        labels.append(hollow)
    figure.legend(handles, labels, loc="outside right upper")
