"""What a sweep's table says, in sentences; every number is computed from its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from dsocr_trace.report.units import duration, percent, quantity

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

    from dsocr_trace.forecasts.sweep import Sweep


def findings(sweep: Sweep) -> list[str]:
    """Sentences about where regimes change, how costs grow, what is most expensive, what fits and meets the targets."""
    return [*_FINDINGS[sweep.kind](sweep), *_flags(sweep.table)]


def _vision(sweep: Sweep) -> Iterator[str]:
    table = _smallest(sweep.table)
    shared = table[table.hardware == sweep.hardware[0].name]
    base, tile = sweep.scenario.workload.base_size, sweep.scenario.workload.image_size
    own = shared[(shared.base_size_px == base) & ((shared.image_size_px == tile) | (shared.tiles == 0))]
    slope = _slope(own.tiles, own.vision_tensor_flops)
    alone = own[own.tiles == 0].iloc[0]
    yield (
        f"Vision work grows in proportion to the tiles: {_flop(slope)} for each tile of {tile} px, on top of "
        f"{_flop(alone.vision_tensor_flops)} for a global view of {base} px."
    )
    cut = shared[~shared.beyond_crop_rule]
    for which, word in ((cut.vision_tensor_flops.idxmax(), "most"), (cut.vision_tensor_flops.idxmin(), "least")):
        row = cut.loc[which]
        yield f"The {word} expensive page within the crop rule is {_page(row)}: {_flop(row.vision_tensor_flops)}."
    for name, frame in table.groupby("hardware", sort=False):
        inside = frame[~frame.beyond_crop_rule]
        yield (
            f"On {name}, the first token takes {duration(inside.ttft_ns.min())} to {duration(inside.ttft_ns.max())} "
            f"within the crop rule, and up to {duration(frame.ttft_ns.max())} beyond it. {_first_token(frame)}"
        )
        yield _meets(frame, "meets_ttft", f"a first token within {sweep.ttft_target_ms:g} ms", str(name))


def _first_token(frame: pd.DataFrame) -> str:
    """Which part takes longest before the first token, and where others do."""
    counts = frame.ttft_regime.value_counts()
    if len(counts) == 1:
        return f"{counts.index[0]} takes the longest in all of them."
    text = f"{counts.index[0]} takes the longest in {percent(counts.iloc[0] / len(frame))} of the points"
    others = [
        f"{regime} in {count} of them, such as {_page(frame[frame.ttft_regime == regime].iloc[0])}"
        for regime, count in counts.iloc[1:].items()
    ]
    return f"{text}; {'; '.join(others)}."


def _sequence(sweep: Sweep) -> Iterator[str]:
    shared = _smallest(sweep.table[sweep.table.hardware == sweep.hardware[0].name]).sort_values("seq_len")
    low, high = shared.iloc[0], shared.iloc[-1]
    growth = np.log(high.prefill_tensor_flops / low.prefill_tensor_flops) / np.log(high.seq_len / low.seq_len)
    yield (
        f"Prefill work grows from {_flop(low.prefill_tensor_flops)} at {low.seq_len:,} positions to "
        f"{_flop(high.prefill_tensor_flops)} at {high.seq_len:,}, as the power {growth:.2f} of the length: "
        f"attention's share of it rises from {percent(_attention(low))} to {percent(_attention(high))}."
    )
    for name, frame in sweep.table.groupby("hardware", sort=False):
        for batch, rows in frame.sort_values("seq_len").groupby("batch_size"):
            yield f"On {name} with batch {batch}, {_prompt_limits(rows, sweep)}."


def _prompt_limits(rows: pd.DataFrame, sweep: Sweep) -> str:
    prefill = rows[rows.prefill_ns > rows.vision_ns]
    first = rows.iloc[0]
    parts = [
        f"prefill takes longer than vision from {prefill.seq_len.min():,} positions on"
        if len(prefill)
        else "vision takes longer than prefill throughout",
        f"the first token takes {duration(first.ttft_ns)} to {duration(rows.ttft_ns.max())}",
        _limit(rows, "meets_ttft", "seq_len", f"stays within {sweep.ttft_target_ms:g} ms", "{:,} positions"),
        _limit(rows, "fits_device_memory", "seq_len", "memory is enough", "{:,} positions"),
    ]
    return "; ".join(parts)


def _attention(row: pd.Series) -> float:
    return float(row.prefill_attention_tensor_flops / row.prefill_tensor_flops)


def _decode(sweep: Sweep) -> Iterator[str]:
    shared = sweep.table[sweep.table.hardware == sweep.hardware[0].name]
    seen = shared.groupby("batch_size").first()
    crossings = ", ".join(
        f"{length:,.0f} (batch {batch})" for batch, length in seen.kv_overtakes_weights_at_positions.items()
    )
    yield f"KV traffic overtakes that of the weights at these cached positions: {crossings}."
    steps = shared.max_new_tokens - 1
    moved = shared.kv_traffic_bytes / (steps * shared.batch_size * (shared.seq_len + shared.max_new_tokens / 2))
    growth = seen.kv_cache_bytes.iloc[0] / (seen.positions.iloc[0] * seen.index[0])
    yield (
        f"Each cached position takes {quantity(growth, 'B')} of memory, and each step moves "
        f"{quantity(moved.iloc[0], 'B')} for it: {moved.iloc[0] / growth:.0f} times as much, because the cache is "
        "copied when it grows."
    )
    for name, frame in sweep.table.groupby("hardware", sort=False):
        yield f"On {name}, {_per_token(frame)}."
        yield f"On {name}, {_batches(frame, sweep)}."


def _per_token(frame: pd.DataFrame) -> str:
    small = _smallest(frame).sort_values("max_new_tokens")
    slope = _slope(small.seq_len + small.max_new_tokens / 2, small.tpot_ns)
    text = (
        f"a token takes {duration(small.tpot_ns.iloc[0])} with batch {small.batch_size.iloc[0]} and "
        f"{small.max_new_tokens.iloc[0]} new tokens, and {duration(slope * 1000)} more for every 1,000 cached positions"
    )
    fitting = frame[frame.fits_device_memory].groupby("batch_size").decode_tokens_per_second.max()
    if len(fitting) < 2:
        return text
    return (
        f"{text}; batch {fitting.index[-1]}, the largest that fits into memory, gives up to "
        f"{fitting.iloc[-1] / fitting.iloc[0]:.1f} times the tokens per second of batch {fitting.index[0]}"
    )


def _batches(frame: pd.DataFrame, sweep: Sweep) -> str:
    longest = frame[frame.max_new_tokens == frame.max_new_tokens.max()].sort_values("batch_size")
    tokens = longest.max_new_tokens.iloc[0]
    latency = _limit(
        longest, "meets_tpot", "batch_size", f"a token stays within {sweep.tpot_target_ms:g} ms", "batch {}"
    )
    memory = _limit(longest, "fits_device_memory", "batch_size", "memory is enough", "batch {}")
    return f"with {tokens:,} new tokens, {latency}; {memory}"


def _profiles(sweep: Sweep) -> Iterator[str]:
    for name, frame in sweep.table.groupby("hardware", sort=False):
        small = _smallest(frame)
        slow = small.loc[small.total_ns.idxmax()]
        late = small[small.dominant_stage == "first token"].workload
        where = f"is the larger part in {', '.join(late)}" if len(late) else "is the smaller part everywhere"
        yield (
            f"On {name} with batch {slow.batch_size}, {slow.workload} takes longest, {duration(slow.total_ns)}: "
            f"{duration(slow.vision_ns)} vision, {duration(slow.prefill_ns)} prefill, "
            f"{duration(slow.decode_ns)} decode. "
            f"The time to the first token {where}."
        )
        best = frame[frame.fits_device_memory]
        if len(best):
            row = best.loc[best.tokens_per_second.idxmax()]
            yield (
                f"On {name}, the most tokens per second that fit into memory are {row.tokens_per_second:,.0f}, "
                f"with {row.workload} in batches of {row.batch_size}."
            )
        yield _meets(frame, "meets_ttft", f"a first token within {sweep.ttft_target_ms:g} ms", str(name))
        yield _meets(frame, "meets_tpot", f"further tokens within {sweep.tpot_target_ms:g} ms", str(name))


def _flags(table: pd.DataFrame) -> Iterator[str]:
    """What the reader should know before using some of the points."""
    shared = table[table.hardware == table.hardware.iloc[0]]
    long = int(shared.exceeds_max_positions.sum())
    if long:
        yield f"{long} of {len(shared)} workloads grow beyond the model's positions; they are flagged."
    beyond = int(shared.beyond_crop_rule.sum())
    if beyond:
        yield f"{beyond} of {len(shared)} workloads have more tiles than the crop rule cuts; they are flagged."


def _meets(frame: pd.DataFrame, column: str, target: str, name: str) -> str:
    met = int(frame[column].sum())
    return f"On {name}, {met} of {len(frame)} points reach {target}."


def _limit(rows: pd.DataFrame, column: str, along: str, fact: str, words: str) -> str:
    """Up to where along rows in order something holds."""
    holds = rows[column].to_numpy(dtype=bool)
    if holds.all():
        return f"{fact} throughout"
    if not holds[0]:
        return f"{fact} nowhere"
    last = int(np.argmin(holds)) - 1
    return f"{fact} up to {words.format(rows[along].iloc[last])}"


def _smallest(table: pd.DataFrame) -> pd.DataFrame:
    return table[table.batch_size == table.batch_size.min()]


def _flop(value: float) -> str:
    return quantity(value, "FLOP")


def _slope(x: pd.Series, y: pd.Series) -> float:
    return float(np.polyfit(x.to_numpy(dtype=float), y.to_numpy(dtype=float), 1)[0])


def _page(row: pd.Series) -> str:
    if not row.tiles:
        return f"a global view of {row.base_size_px} px without tiles"
    return f"grid {row.crop_grid} with tiles of {row.image_size_px} px and a global view of {row.base_size_px} px"


_FINDINGS: Final = {"vision": _vision, "sequence": _sequence, "decode": _decode, "profiles": _profiles}
