"""Check a finished run, and print each check as PASS, FAIL or SKIP with its figure.

Exits with 1 if any check failed, after all have run.
"""

# ruff: noqa: T201  what it prints is the result
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from verdicts import SkippedError, all_hold, checked

import dsocr_trace
from analytic.config import variant_config
from analytic.workload import Workload
from dsocr_trace.runs.gap import PREDICTED_PARTS
from dsocr_trace.runs.invariants import check_run
from stage_runners.devices import DTYPES
from stage_runners.generate import Generation
from stage_runners.inputs import build_inputs
from stage_runners.loading import load_model
from stage_runners.pages import synthetic_page

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd

FULL_SIZE = "deepseek-ocr-v1-base"
#: Of all kernel time; and of each stage's, and of the time of matrix kernels.
COVERAGE = 0.995
STAGE_COVERAGE = 0.99
#: Forward calls of one decode step of the full-size model: 195, and 5 for each of 6 experts in 11 layers.
CALLS_PER_STEP = 525
#: Classes whose own forward multiplies matrices: layers, and attention by products of activations.
MULTIPLYING = {
    "Linear",
    "Conv2d",
    "MoEGate",
    "Attention",
    "NoTPAttention",
    "LlamaAttention",
    "LlamaRotaryEmbedding",
}
MATRIX_CATEGORIES = {"linear", "conv"}
#: Two passes of the same work differ by this much.
NOISE = 0.05


def coverage(run: dsocr_trace.Run) -> str:
    """At least 99.5 % of the device time stands in named modules, and 99 % of each stage's."""
    shares = run.manifest["coverage"]
    figure = ", ".join(f"{stage} {share:.4%}" for stage, share in shares.items())
    if run.manifest["variant"] != FULL_SIZE:
        raise SkippedError(f"{figure}; the small model is outweighed by the choice of tokens")
    return checked(shares["all"] >= COVERAGE and min(shares.values()) >= STAGE_COVERAGE, figure)


def invariants(run: dsocr_trace.Run) -> str:
    """The reloaded tables conserve what the manifest says."""
    flops = {stage: sums["flops"] for stage, sums in run.manifest["conserved"].items() if "flops" in sums}
    tables = {name: run.table(name) for name in ("attribution", "kernels", "gap", "pages")}
    found = check_run(tables, flops or None)
    sums = ", ".join(f"{stage} {entry['events']} events {entry['event_ns']} ns" for stage, entry in found.items())
    return checked(found == run.manifest["conserved"], sums)


def one_place(run: dsocr_trace.Run) -> str:
    """Every event has a call or a reason, and the call is there and is its module's."""
    kernels = run.kernels
    both_or_neither = int((kernels["call_id"].notna() == kernels["unclassified_reason"].notna()).sum())
    named = kernels[kernels["call_id"].notna()]
    joined = named.merge(run.calls, on="call_id", how="left", suffixes=("", "_call"))
    strange = int(
        (joined["module_path"] != joined["module_path_call"]).sum() + (joined["pass_call"] != "profiled").sum()
    )
    figure = f"{len(kernels)} events, {both_or_neither} with both or neither, {strange} with a call that is not theirs"
    return checked(len(kernels) > 0 and not both_or_neither and not strange, figure)


def launches(run: dsocr_trace.Run) -> str:
    """Every event has its launch, on a traced thread."""
    found = run.kernels["unclassified_reason"].value_counts()
    lost = {reason: int(found.get(reason, 0)) for reason in ("no_launch_record", "thread_not_traced")}
    kinds = run.kernels["kind"].value_counts().to_dict()
    return checked(not any(lost.values()), f"{kinds}, {lost}")


def clocks(run: dsocr_trace.Run) -> str:
    """The clocks agree within the tolerance."""
    clock = run.manifest["clock"]
    figure = "residual {residual_ns} ns, drift {drift_ns} ns, tolerance {tolerance_ns} ns".format(**clock)
    return checked(clock["residual_ns"] <= clock["tolerance_ns"], figure)


def linear_calls_launch(run: dsocr_trace.Run) -> str:
    """Every profiled call of a linear layer launched something."""
    linear = run.modules.loc[run.modules["module_class"] == "Linear", "module_path"]
    calls = run.calls[(run.calls["pass"] == "profiled") & run.calls["module_path"].isin(linear)]
    idle = int((~calls["call_id"].isin(run.kernels["call_id"].dropna())).sum())
    return checked(len(calls) > 0 and not idle, f"{len(calls)} calls, {idle} without an event")


def matrix_kernels(run: dsocr_trace.Run) -> str:
    """Matrix kernels lie in modules that multiply matrices: a shifted clock would put them elsewhere."""
    kernels = run.kernels[run.kernels["operator_category"].isin(MATRIX_CATEGORIES)]
    classes = kernels["module_path"].map(run.modules.set_index("module_path")["module_class"])
    by_class = kernels.groupby(classes.fillna("unclassified"))["duration_ns"].sum()
    right = by_class[by_class.index.isin(MULTIPLYING)].sum()
    others = by_class[~by_class.index.isin(MULTIPLYING)].to_dict()
    return checked(
        right >= STAGE_COVERAGE * by_class.sum(), f"{right / by_class.sum():.4%} of their time; elsewhere: {others}"
    )


def calls_as_predicted(run: dsocr_trace.Run) -> str:
    """Every module was called as often as the measured routing implies."""
    key = ["stage", "module_path"]
    called = run.attribution[run.attribution["calls"] > 0].set_index(key)["calls"]
    predicted = run.predictions.set_index(key)["calls"]
    both = predicted.to_frame("predicted").join(called.rename("called"), how="outer").fillna(0)
    wrong = both[both["predicted"] != both["called"]]
    figure = f"{len(both)} modules and stages, {int(called.sum())} calls, {len(wrong)} wrong"
    return checked(len(both) > 0 and not len(wrong), figure)


def decode_calls(run: dsocr_trace.Run) -> str:
    """A decode step of the full-size model is 525 calls."""
    decode = run.attribution[run.attribution["stage"] == "decode"]
    steps = sum(len(page["tokens"]) - 1 for page in run.manifest["pages"])
    found = int(decode["calls"].sum())
    if run.manifest["variant"] != FULL_SIZE:
        raise SkippedError(f"{found} calls in {steps} steps; the number holds for the full-size model")
    return checked(found == steps * CALLS_PER_STEP, f"{found} calls, {steps} x {CALLS_PER_STEP} expected")


def tokens(run: dsocr_trace.Run) -> str:
    """A generation that is never traced or profiled chooses the same tokens."""
    manifest = run.manifest
    page = manifest["pages"][0]
    if manifest["model"] != "builtin" or not page["source"].startswith("synthetic"):
        raise SkippedError("only runs of the built-in model on a synthetic page are repeated")
    workload = Workload(**manifest["workload"])
    decoder = variant_config(manifest["variant"]).decoder
    dtype = next(found for found in DTYPES.values() if str(found) == f"torch.{manifest['dtype']}")
    device = torch.device(manifest["device"]["device"])
    model = load_model(
        "builtin",
        variant=manifest["variant"],
        dtype=dtype,
        device=device,
        attention=manifest["attention"],
        seed=manifest["seed"],
    )
    inputs = build_inputs(synthetic_page(workload, seed=manifest["seed"]), workload, decoder, seed=manifest["seed"])
    generation = Generation(model, inputs.to(device, dtype))
    generation.start()
    while len(generation.tokens) < workload.max_new_tokens:
        generation.advance()
    expected = page["tokens"]
    pairs = enumerate(zip(generation.tokens, expected, strict=False))
    first = next((step for step, (mine, theirs) in pairs if mine != theirs), None)
    return checked(generation.tokens == expected, f"{len(expected)} tokens, first difference at step {first}")


def wall_covers_device(run: dsocr_trace.Run) -> str:
    """One stream cannot be busy for longer than the stage took."""
    totals = run.pages[run.pages["page"] == "total"].set_index("stage")
    pairs = {stage: (int(row["wall_ns"]), int(row["scaled_ns"])) for stage, row in totals.iterrows()}
    figure = ", ".join(
        f"{stage} wall {wall / 1e6:.1f} ms device {own / 1e6:.1f} ms" for stage, (wall, own) in pairs.items()
    )
    if run.manifest["device"]["device"] == "cpu":
        raise SkippedError(f"{figure}; on a CPU the profiler slows the operators themselves")
    return checked(all(own <= wall * (1 + NOISE) for wall, own in pairs.values()), figure)


def device_state(run: dsocr_trace.Run) -> str:
    """The driver told clocks, power and throttling before, during and after the run."""
    if run.manifest["device"]["device"] == "cpu":
        raise SkippedError("only a GPU has it")
    state = run.manifest["device_state"]
    if state is None:
        raise AssertionError(f"nothing was sampled: {run.manifest['notes']}")
    during = {name: spread and spread["median"] for name, spread in state["during"].items()}
    figure = f"{state['samples']} samples, median {during}, throttle reasons {state['throttle_reasons']}"
    return checked(state["samples"] > 0 and state["before"]["sm_clock_mhz"] is not None, figure)


def memory_pass(run: dsocr_trace.Run) -> str:
    """The allocator's peak is known of every module that was called in a stage."""
    if run.manifest["device"]["device"] == "cpu":
        raise SkippedError("only a GPU's allocator is read")
    peaks = run.memory["measured_activation_peak_bytes"]
    ratios = (run.memory["predicted_activation_peak_bytes"] / peaks.where(peaks > 0)).quantile([0.25, 0.5, 0.75])
    figure = f"{int(peaks.notna().sum())} of {len(peaks)} peaks, largest {peaks.max()} bytes, "
    figure += f"predicted / measured quartiles {ratios.round(3).tolist()}"
    return checked(peaks.notna().any() and peaks.max() <= run.manifest["peak_device_bytes"], figure)


def stage2(run: dsocr_trace.Run) -> str:
    """Under Nsight Systems every module was called as often, and its kernels stood in the same modules."""
    found = run.manifest["stage2"]
    if found is None:
        raise SkippedError("the run has no stage 2")
    if "failure" in found:
        raise SkippedError(found["failure"])
    if run.manifest["device"]["device"] == "cpu":
        return checked(not found["agreement"]["modules_differing"], str(found["agreement"]))
    events = found.get("events_agreement", {"withheld": "no device work was recorded"})
    measured = len(run.counters) if (run.path / "counters.parquet").exists() else 0
    figure = f"{found['agreement']}, {events}, {measured} launches with counters"
    return checked(not found["agreement"]["modules_differing"] and events["withheld"] is None, figure)


def figures(run: dsocr_trace.Run) -> dict[str, Any]:
    """What is printed without judgement."""
    cost, totals = run.manifest["overhead"], run.pages[run.pages["page"] == "total"]
    peak = run.manifest["hardware"]["tensor_flops_per_s"]
    mfu = {row["stage"]: f"{row['tensor_flops'] * 1e9 / (row['wall_ns'] * peak):.4f}" for _, row in totals.iterrows()}
    categories = run.kernels.groupby("operator_category")["duration_ns"].sum()
    walls = {row["stage"]: f"{row['predicted_ns'] / row['wall_ns']:.3f}" for _, row in totals.iterrows()}
    gap = run.gap.groupby("stage")[[*PREDICTED_PARTS, "unexplained_ns", "host_gap_ns"]].sum() / 1e6
    return {
        "overhead ratio": f"{cost['ratio']} over {cost['pairs']} pairs, quartiles {cost['quartiles']}",
        "mfu": mfu,
        "predicted over measured wall": walls,
        "gap in ms": gap.round(3).to_dict("index"),
        "predicted from": run.manifest["prediction"]["source"],
        "peak device bytes": run.manifest["peak_device_bytes"],
        "weight bytes": int(run.modules["weight_bytes"].sum()),
        "unclassified": {reason: entry["ns"] for reason, entry in run.manifest["unclassified"].items()},
        "share of category other": f"{categories.get('other', 0) / categories.sum():.4f}",
        "notes": run.manifest["notes"],
    }


CHECKS: tuple[Callable[[dsocr_trace.Run], str], ...] = (
    coverage,
    invariants,
    one_place,
    launches,
    clocks,
    linear_calls_launch,
    matrix_kernels,
    calls_as_predicted,
    decode_calls,
    tokens,
    wall_covers_device,
    device_state,
    memory_pass,
    stage2,
)


def by_name(run: dsocr_trace.Run) -> pd.DataFrame:
    """Events summed by stage, module class, kind, category and name: small enough to carry away."""
    classes = run.kernels["module_path"].map(run.modules.set_index("module_path")["module_class"])
    keyed = run.kernels.assign(module_class=classes.fillna("unclassified"))
    groups = keyed.groupby(["stage", "module_class", "kind", "operator_category", "name"])["duration_ns"]
    return groups.agg(event_count="size", duration_ns="sum", min_ns="min", max_ns="max").reset_index()


def main() -> int:
    """Check one run, or aggregate its events."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--aggregate", type=Path, metavar="FILE", help="write events by name to FILE instead")
    given = parser.parse_args()
    run = dsocr_trace.load(given.run)
    if given.aggregate:
        by_name(run).to_parquet(given.aggregate, compression="zstd", index=False)
        return 0
    hold = all_hold(given.run.name, CHECKS, run)
    for name, value in figures(run).items():
        print(f"INFO {name}: {value}")
    return 0 if hold else 1


if __name__ == "__main__":
    sys.exit(main())
