"""Two runs side by side. The times are drawn from a seed: what a machine does while it is tested must not matter."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

from analytic.errors import InputError
from dsocr_trace.comparison.compare import DRIFTED, FASTER, GONE, NEW, SLOWER, UNKNOWN, WITHIN, compare
from dsocr_trace.comparison.spread import CONFIDENCE, Samples, differences, drifts, traced_walls, wall_samples
from dsocr_trace.report.comparison import RENDERERS, comparison_json, sections
from dsocr_trace.runs.store import Run

if TYPE_CHECKING:
    from pathlib import Path

SLOWED = "model.layers.1.mlp.gate"
STAGES = ("vision", "prefill", "decode")
#: Of the drawn times.
SPREAD = 0.02


def drawn(first: pd.DataFrame, rng: np.random.Generator, slowed: float, load: float) -> pd.Series:
    """Own time of each call: a tenth of a millisecond, more for lower modules, and noise.

    A loaded machine slows all modules in common, each a little more or less, and each repeat differently.
    """
    usual = 1e5 * (1 + first["module_path"].str.count(r"\."))
    busy = 1.0
    if load != 1:
        paths = pd.Index(first["module_path"].unique())
        stray = pd.Series(np.random.default_rng(99).lognormal(0, 0.05, len(paths)), paths)
        busy = load * rng.lognormal(0, 0.03) * first["module_path"].map(stray)
    return usual * busy * np.where(first["module_path"] == SLOWED, slowed, 1.0) * rng.lognormal(0, SPREAD, len(first))


def with_children(rows: pd.DataFrame, own: pd.Series) -> pd.Series:
    """Time of each call with all calls that it made."""
    whole = dict(zip(rows["call_id"], own, strict=True))
    parents = dict(zip(rows["call_id"], rows["parent_call_id"], strict=True))
    for call in sorted(whole, reverse=True):
        if pd.notna(parents[call]):
            whole[parents[call]] += whole[call]
    return rows["call_id"].map(whole)


@pytest.fixture
def timed(finished, tmp_path):
    """Copy the small run with other times: so many repeats, and one module slower than it was."""
    source = finished[0]
    first = source.calls[source.calls["pass"] == "traced"]

    def make(name: str, *, seed: int, repeats: int = 5, slowed: float = 1.0, load: float = 1.0) -> Path:
        rng = np.random.default_rng(seed)
        path = shutil.copytree(source.path, tmp_path / name)
        passes, walls = [], []
        for repeat in range(repeats):
            own = drawn(first, rng, slowed, load)
            ends = with_children(first, own)
            shift = repeat * (first["call_id"].max() + 1)
            passes.append(
                first.assign(
                    call_id=first["call_id"] + shift, parent_call_id=first["parent_call_id"] + shift, start_ns=0,
                    end_ns=ends.round().astype("int64"),
                    **{"pass": "traced" if repeat == 0 else f"traced-{repeat + 1}"},
                )
            )  # fmt: skip
            sums = own.groupby(first["stage"]).sum()
            walls.append({f"{stage}_ns": int(sums[stage]) for stage in STAGES})
        pd.concat(passes).to_parquet(path / "calls.parquet")
        edit(path, lambda manifest: manifest["pages"][0].update(repeats=walls))
        return path

    return make


def edit(path: Path, change) -> None:
    file = path / "run.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def rewrite(path: Path, table: str, change) -> None:
    frame = pd.read_parquet(path / f"{table}.parquet")
    change(frame).to_parquet(path / f"{table}.parquet")


def test_own_time_is_what_the_calls_within_did_not_take():
    calls = pd.DataFrame(
        {
            "call_id": [0, 1, 2, 3], "parent_call_id": [None, 0, 1, 0], "pass": ["traced"] * 3 + ["profiled"],
            "start_ns": [0, 10, 20, 0], "end_ns": [100, 70, 50, 1000],
        }
    )  # fmt: skip
    assert traced_walls(calls)["wall_self_ns"].tolist() == [40, 30, 30]


def test_repeats_stand_in_their_order():
    passes = ["traced", *(f"traced-{repeat}" for repeat in range(2, 12))]
    calls = pd.DataFrame(
        {
            "call_id": range(11), "parent_call_id": None, "pass": passes, "page": 0, "step": 0, "stage": "prefill",
            "module_path": "m", "start_ns": 0, "end_ns": range(11),
        }
    )  # fmt: skip
    assert wall_samples(traced_walls(calls), forwards=0).repeats.loc[("prefill", "m")].tolist() == list(range(11))


def test_a_call_that_the_machine_disturbed_does_not_count_in_decode():
    calls = pd.DataFrame(
        {
            "call_id": range(10), "parent_call_id": None, "pass": ["traced"] * 5 + ["traced-2"] * 5, "page": 0,
            "step": [1, 2, 3, 4, 5] * 2, "stage": "decode", "module_path": "m", "start_ns": 0,
            "end_ns": [10, 11, 12, 13, 9000, 20, 21, 22, 23, 24],
        }
    )  # fmt: skip
    found = wall_samples(traced_walls(calls), forwards=5)
    assert found.repeats.loc[("decode", "m")].tolist() == [5 * 12, 5 * 22]
    assert found.steps.loc[("decode", "m")].tolist() == [15, 16, 17, 18, (9000 + 24) / 2]


def noise(seed: int, rows: int, ratio: float = 1.0) -> Samples:
    values = np.random.default_rng(seed).lognormal(14, 0.1, (rows, 5)) * ratio
    keys = pd.MultiIndex.from_product([["prefill"], [f"m{row}" for row in range(rows)]], names=["stage", "module_path"])
    return Samples(pd.DataFrame(values, index=keys), pd.DataFrame(index=keys), 0)


def test_intervals_hold_the_true_ratio_as_often_as_they_say():
    rows = 4000
    a, b = noise(1, rows), noise(2, rows, 1.3)
    found = differences(a, b, {"prefill": 1.0}, a.repeats.index, {})
    held = ((found["low"] < 1.3) & (found["high"] > 1.3)).mean()
    # Three standard errors of a share of 4000.
    assert held == pytest.approx(CONFIDENCE, abs=3 * (CONFIDENCE * (1 - CONFIDENCE) / rows) ** 0.5)


def test_among_many_alike_none_is_named():
    a, b = noise(3, 800), noise(4, 800)
    found = differences(a, b, {"prefill": 1.0}, a.repeats.index, {})
    assert (found["low"] > 1).any()  # Some are apart by chance,
    assert (found["p"] >= 1 - CONFIDENCE).all()  # and the correction knows.


def loaded(rows: int, *, stray: float, slowed: int = 0) -> tuple[Samples, Samples]:
    """A quiet run, and one on a machine that is half as fast, on which modules stray; the last ones were slowed."""
    a, b = noise(5, rows), noise(6, rows, 2.0)
    odd = np.random.default_rng(7).lognormal(0, stray, rows) if stray else np.ones(rows)
    odd[rows - slowed :] *= 5
    return a, Samples(b.repeats.mul(odd, axis=0), b.steps, 0)


@pytest.mark.parametrize("stray", [0.0, 0.2])
def test_drift_is_what_all_modules_share(stray):
    a, b = loaded(800, stray=stray, slowed=40)
    found = drifts(a, b, ["prefill", "decode"])
    assert set(found) == {"prefill"}
    drift = found["prefill"]
    assert drift.factor == pytest.approx(2, rel=0.1)
    assert drift.stray == pytest.approx(stray, abs=0.05)
    tested = differences(a, b, {"prefill": 1.0}, a.repeats.index, found)
    named = tested.index[tested["p"] < 1 - CONFIDENCE]
    # Without it most modules would be named.
    assert (differences(a, b, {"prefill": 1.0}, a.repeats.index, {})["p"] < 1 - CONFIDENCE).mean() > 0.5
    assert set(named) >= set(a.repeats.index[-40:])
    # Of what is named, one in a hundred is expected to be chance.
    assert len(named) <= 42


def test_one_module_that_takes_most_of_the_time_is_no_drift():
    a, b = loaded(40, stray=0.0, slowed=1)
    heavy = np.ones(40)
    heavy[-1] = 100
    a, b = (Samples(side.repeats.mul(heavy, axis=0), side.steps, 0) for side in (a, b))
    assert drifts(a, b, ["prefill"])["prefill"].factor == pytest.approx(2, rel=0.1)


def test_few_modules_tell_no_drift():
    assert drifts(*loaded(9, stray=0.0), ["prefill"]) == {}


@pytest.mark.parametrize("seed", [1, 3, 5])
def test_the_same_again_is_no_change(timed, seed):
    found = compare(Run(timed("a", seed=seed)), Run(timed("b", seed=seed + 1)))
    assert set(found.stages["verdict"]) == {WITHIN}
    assert set(found.modules["wall_verdict"]) == {WITHIN, "negligible"}
    assert (found.modules["presence"] == "both").all()
    assert not found.modules["work_changed"].any()
    assert found.slower(0) == []


def test_the_same_again_on_a_busier_machine_is_no_change(timed, invoke):
    a, b = timed("a", seed=1), timed("b", seed=2, load=1.5)
    found = compare(Run(a), Run(b))
    assert set(found.stages["verdict"]) == {DRIFTED}
    assert set(found.modules["wall_verdict"]) == {WITHIN, "negligible"}
    stages = found.stages.set_index("stage")
    assert stages["drift"].drop("total").to_numpy() == pytest.approx(1.5, rel=0.1)
    assert not stages["modules_ns"].any()
    assert found.slower(0) == []
    assert invoke("compare", a, b, "--fail-over", "5").exit_code == 0
    for render in RENDERERS.values():
        assert "vision, prefill, decode, total drifted" in render(found)


def test_a_slowed_module_is_named_first_and_alone_on_a_busier_machine(timed):
    a, b = timed("a", seed=1), timed("b", seed=2, slowed=3, load=1.5)
    found = compare(Run(a), Run(b))
    rows = found.changes("wall")
    named = rows[rows["wall_verdict"].isin([SLOWER, FASTER])]
    assert set(named["module_path"]) == {SLOWED}
    assert rows.iloc[0]["module_path"] == SLOWED
    # What is left without the machine's share is what the module lost.
    lost = named["wall_difference_ns"] / named["wall_self_ns_a"]
    assert lost.to_numpy() == pytest.approx(2, rel=0.3)
    stages = found.stages.set_index("stage")
    assert stages.loc["vision", "verdict"] == DRIFTED
    assert stages.loc["decode", ["verdict", "modules_ns"]].tolist() == [
        SLOWER, named.loc[named["stage"] == "decode", "wall_difference_ns"].sum()
    ]  # fmt: skip
    # Half as long again in all, but the module's share is small.
    assert stages.loc["decode", "wall_ns_b"] > 1.4 * stages.loc["decode", "wall_ns_a"]
    assert found.slower(0) == ["prefill", "decode", "total"]
    assert found.slower(20) == []


def test_what_may_change_every_module_is_no_drift(timed):
    a, b = timed("a", seed=1), timed("b", seed=2, load=1.5)
    edit(b, lambda manifest: manifest["versions"].update(torch="9.9"))
    found = compare(Run(a), Run(b))
    assert set(found.stages["verdict"]) == {SLOWER}
    assert found.stages["drift"].isna().all()
    assert found.slower(5) == list(found.stages["stage"])
    edit(b, lambda manifest: manifest.update(versions=Run(a).manifest["versions"], git_commit="another"))
    assert set(compare(Run(a), Run(b)).stages["verdict"]) == {DRIFTED}
    edit(b, lambda manifest: manifest["device"].update(torch_threads=1))
    found = compare(Run(a), Run(b))
    assert "device torch_threads" in found.differs
    assert set(found.stages["verdict"]) == {SLOWER}


@pytest.mark.parametrize("repeats", [3, 5])
def test_a_slowed_module_is_named_first_and_alone(timed, repeats):
    a, b = timed("a", seed=1, repeats=repeats), timed("b", seed=2, repeats=repeats, slowed=3)
    rows = compare(Run(a), Run(b)).changes("wall")
    named = rows[rows["wall_verdict"] == "slower"]
    assert rows.iloc[0]["module_path"] == SLOWED
    assert set(named["module_path"]) == {SLOWED}
    assert set(named["stage"]) == {"prefill", "decode"}
    assert ((named["wall_low"] < 3) & (named["wall_high"] > 3)).all()
    assert (compare(Run(b), Run(a)).changes("wall")["wall_verdict"].head(2) == "faster").all()


def test_one_repeat_leaves_only_decode_to_judge(timed):
    found = compare(Run(timed("a", seed=1, repeats=1)), Run(timed("b", seed=2, repeats=1, slowed=3)))
    verdicts = found.modules[found.modules["module_path"] == SLOWED].set_index("stage")["wall_verdict"]
    assert verdicts.to_dict() == {"prefill": UNKNOWN, "decode": "slower"}
    stages = found.stages.set_index("stage")
    assert stages["verdict"].drop("decode").unique().tolist() == [UNKNOWN]
    assert stages.loc["decode", "evidence"] == "steps"
    assert "significance unknown for vision, prefill, total" in RENDERERS["text"](found)


def test_figures_are_those_of_the_tables(timed):
    a, b = Run(timed("a", seed=1)), Run(timed("b", seed=2))
    found = compare(a, b)
    assert found.modules["measured_self_ns_a"].sum() == a.attribution["measured_self_ns"].sum()
    assert found.modules["tensor_flops_b"].sum() == b.attribution["tensor_flops"].sum()
    stages = found.stages.set_index("stage")
    walls = [sum(repeat.values()) for repeat in a.manifest["pages"][0]["repeats"]]
    assert stages.loc["total", "wall_ns_a"] == np.median(walls)
    assert stages.loc["decode", "device_ns_b"] == b.attribution.query("stage == 'decode'")["scaled_self_ns"].sum()
    # Own times of all modules are the stage's, as far as medians can be added up.
    vision = found.modules.loc[found.modules["stage"] == "vision", "wall_self_ns_a"].sum()
    assert vision == pytest.approx(stages.loc["vision", "wall_ns_a"], rel=SPREAD)


def test_new_and_gone_modules_and_other_work(timed):
    a, b = timed("a", seed=1), timed("b", seed=2)
    rewrite(b, "attribution", lambda rows: rows.replace({"module_path": {SLOWED: "model.layers.1.mlp.router"}}))
    rewrite(b, "attribution", lambda rows: rows.assign(calls=rows["calls"] + (rows["module_path"] == "lm_head")))
    found = compare(Run(a), Run(b))
    verdicts = found.modules.set_index(["stage", "module_path"])["wall_verdict"]
    assert verdicts["decode", SLOWED] == GONE
    assert verdicts["decode", "model.layers.1.mlp.router"] == NEW
    work = found.modules[found.modules["work_changed"] & (found.modules["presence"] == "both")]
    assert set(work["module_path"]) == {"lm_head"}
    titles = [section.title for section in sections(found, 8)]
    assert [title for title in titles if "2 modules" in title] == [
        "New in B: 2 modules", "Gone in B: 2 modules", "Other work than before, A → B: 2 modules",
    ]  # fmt: skip


def test_other_work_is_compared_per_unit(timed):
    a, b = timed("a", seed=1), timed("b", seed=2)
    rewrite(b, "pages", lambda rows: rows.assign(seq_len=rows["seq_len"] * 2))
    edit(b, lambda manifest: manifest["hardware"].update(name="h200"))
    found = compare(Run(a), Run(b))
    stages = found.stages.set_index("stage")
    assert list(stages.index) == list(STAGES)  # No total.
    assert stages.loc["prefill", "wall_ns_b"] == pytest.approx(stages.loc["prefill", "wall_ns_a"] / 2, rel=3 * SPREAD)
    assert stages.loc["prefill", "verdict"] == "faster"
    assert stages.loc["vision", "verdict"] == WITHIN
    assert found.caveats[0] == (
        "prefill: A did 512 prompt tokens, B 1,024; compared per prompt token: figures of B are for 512"
    )
    assert [line.partition(":")[0] for line in found.caveats] == ["prefill", "total", "predictions"]
    assert found.differs["predicted for"][1] == "h200"


def test_a_stage_that_one_run_has_not_is_not_compared(timed):
    a, b = timed("a", seed=1), timed("b", seed=2)
    rewrite(b, "pages", lambda rows: rows.assign(forwards=rows["forwards"].where(rows["stage"] != "decode", 0)))
    found = compare(Run(a), Run(b))
    assert list(found.stages["stage"]) == ["vision", "prefill"]
    assert found.caveats[0] == "decode: A did 7 steps, B 0; not compared"
    assert set(found.modules.loc[found.modules["stage"] == "decode", "wall_verdict"]) == {UNKNOWN}


def test_a_processor_and_a_gpu_are_compared_by_device_time(timed):
    a, b = timed("a", seed=1), timed("b", seed=2)
    edit(b, lambda manifest: manifest["device"].update(device="cuda:0", name="NVIDIA H200"))
    found = compare(Run(a), Run(b))
    assert found.clocks == ("device",)
    assert found.differs["device"][1] == "NVIDIA H200"
    # Copies of one profile: the same to the nanosecond.
    assert not found.modules["device_difference_ns"].any()
    edit(a, lambda manifest: manifest["device"].update(device="cuda:0"))
    assert compare(Run(a), Run(b)).clocks == ("device", "wall")


def test_fail_over(timed, invoke):
    a, same = timed("a", seed=1), timed("same", seed=2)
    slow, once = timed("slow", seed=3, slowed=40), timed("once", seed=4, repeats=1, slowed=40)
    assert invoke("compare", a, same, "--fail-over", "0").exit_code == 0
    assert invoke("compare", slow, a, "--fail-over", "5%").exit_code == 0
    result = invoke("compare", a, slow, "--fail-over", "5%")
    assert result.exit_code == 3
    assert result.stderr == "slower by more than 5%: prefill, decode, total\n"
    assert invoke("compare", a, slow, "--fail-over", "100000").exit_code == 0
    assert invoke("compare", a, slow).exit_code == 0
    assert invoke("compare", a, once, "--fail-over", "5").exit_code == 3


def test_json_holds_everything(timed, invoke):
    a, b = timed("a", seed=1), timed("b", seed=2, slowed=40)
    result = invoke("compare", a, b, "--json", "--fail-over", "5")
    found = json.loads(result.stdout)
    expected = compare(Run(a), Run(b))
    assert found == json.loads(json.dumps(comparison_json(expected, ["prefill", "decode", "total"])))
    assert len(found["modules"]) == len(expected.modules)
    assert found["failed"] == ["prefill", "decode", "total"]


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        del attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.found.append(data)


def test_every_format_shows_the_same(timed):
    found = compare(Run(timed("a", seed=1)), Run(timed("b<1>", seed=2, slowed=40)))
    text, markdown, page = (RENDERERS[name](found) for name in ("text", "md", "html"))
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) < 60
    assert "\x1b" not in text
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in tables if SLOWED in line}) == 1
    cells = Cells()
    cells.feed(page)
    assert cells.open == []
    assert SLOWED in cells.found
    assert "b<1>" not in page
    assert "http" not in page.partition("</style>")[2]
    change = sections(found, 8)[0].rows[-1][4]
    assert all(change in rendered for rendered in (text, markdown)) and change in cells.found  # noqa: PT018


def test_output_goes_to_a_new_file(timed, invoke, tmp_path):
    a, b, file = timed("a", seed=1), timed("b", seed=2), tmp_path / "compare.md"
    result = invoke("compare", a, b, "--format", "md", "--output", file)
    assert (result.exit_code, result.stdout) == (0, "")
    assert file.read_text().startswith("## Comparison: a and b\n")
    result = invoke("compare", a, b, "--output", file)
    assert result.exit_code == 2
    assert "exists and is left as it is" in result.stderr
    assert invoke("compare", a, b, "--format", "html", "--output", file, "--force").exit_code == 0
    assert file.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("percent", ["much", "-1", "nan", "inf"])
def test_what_is_no_percentage_is_refused(invoke, percent):
    result = invoke("compare", "a", "b", "--fail-over", percent)
    assert result.exit_code == 2
    assert "is no percentage; give one like 5 or 5%" in result.stderr


def test_bad_input_is_one_line(timed, invoke, tmp_path):
    a, b = timed("a", seed=1), timed("b", seed=2)

    def message() -> str:
        result = invoke("compare", a, b)
        assert result.exit_code == 2
        (line,) = result.stderr.splitlines()
        return line

    assert "are the same run; name two different ones" in invoke("compare", a, tmp_path / "b" / ".." / "a").stderr
    assert "is not a run directory" in invoke("compare", a, tmp_path).stderr
    edit(b, lambda manifest: manifest.update(schema_version=99))
    assert "b has schema version 99, this dsocr-trace reads" in message()
    (b / "run.json").write_text("{")
    assert "the manifest of" in message()
    shutil.copy(a / "run.json", b / "run.json")
    (b / "kernels.parquet").unlink()
    assert "kernels.parquet is missing or damaged" in message()
    with pytest.raises(InputError):
        compare(Run(a), Run(a))
