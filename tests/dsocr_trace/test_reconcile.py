"""Two accounts of the same forwards, small enough to compare by hand."""

from __future__ import annotations

import pandas as pd
import pytest

from dsocr_trace.recordings.reconciliation import reconcile

COLUMNS = ["stage", "step", "module_path", "duration_ns"]
OURS = pd.DataFrame(
    [
        ("prefill", 0, "a", 10),
        ("prefill", 0, "a", 20),
        ("prefill", 0, "unclassified", 5),
        ("decode", 1, "b", 30),
        ("decode", 2, "b", 35),
    ],
    columns=COLUMNS,
)


def changed(row: int, **values: object) -> pd.DataFrame:
    frame = OURS.copy()
    for column, value in values.items():
        frame.loc[row, column] = value
    return frame


def test_equal_accounts_agree_in_any_order():
    found = reconcile(OURS, OURS.iloc[::-1])
    assert (found.event_share, found.time_share, found.withheld) == (1.0, 1.0, None)
    assert found.modules["agrees"].all()
    rows = found.modules.set_index(["stage", "module_path"])
    assert rows.loc[("decode", "b")].tolist() == [2, 2, 65, 65, True]
    assert rows[["our_events", "our_ns"]].sum().tolist() == [5, 100]


def test_an_account_that_is_slower_throughout_agrees():
    found = reconcile(OURS, OURS.assign(duration_ns=OURS["duration_ns"] * 3))
    assert found.time_share == pytest.approx(1.0)
    assert found.withheld is None


def test_one_event_elsewhere_withholds_the_verdict_with_the_figure():
    found = reconcile(OURS, changed(1, module_path="c"))
    assert found.event_share == pytest.approx(4 / 5)
    assert found.time_share == pytest.approx(80 / 100)
    assert found.withheld == (
        "80.00% of the events in the same place, 99% needed, 80.00% of the time in the same place, 95% needed"
    )
    assert set(found.modules.loc[~found.modules["agrees"], "module_path"]) == {"a", "c"}


def test_a_step_is_a_place_although_the_modules_sums_are_equal():
    found = reconcile(OURS, changed(3, step=2))
    row = found.modules.set_index(["stage", "module_path"]).loc[("decode", "b")]
    assert (row["our_events"], row["their_events"], row["agrees"]) == (2, 2, False)
    assert found.event_share == pytest.approx(4 / 5)


def test_a_page_is_a_place_where_both_tell_it():
    ours, theirs = OURS.assign(page=0), OURS.assign(page=1)
    assert reconcile(ours, theirs).event_share == 0.0
    assert reconcile(ours, OURS).event_share == 1.0


def test_a_missing_event_counts_against_the_larger_account():
    assert reconcile(OURS, OURS.iloc[:4]).event_share == reconcile(OURS.iloc[:4], OURS).event_share == 4 / 5


def test_time_alone_can_withhold_the_verdict():
    found = reconcile(OURS, changed(0, duration_ns=110))
    assert found.event_share == 1.0
    assert found.time_share == pytest.approx(1 - (130 / 200 - 30 / 100))
    assert found.withheld == "65.00% of the time in the same place, 95% needed"
    assert reconcile(OURS, changed(0, duration_ns=110), least_time=0.64).withheld is None


def test_calls_are_compared_without_times():
    calls = OURS.drop(columns="duration_ns")
    found = reconcile(calls, calls.iloc[1:], least_events=1.0, what="calls")
    assert found.time_share is None
    assert found.withheld == "80.00% of the calls in the same place, 100% needed"
    assert list(found.modules) == ["stage", "module_path", "our_events", "their_events", "agrees"]


def test_nothing_is_no_agreement():
    nothing = OURS.iloc[:0]
    assert reconcile(nothing, nothing).withheld == "there is nothing to compare"
    assert reconcile(OURS, nothing).event_share == 0.0


def test_events_without_a_step_have_a_place_too():
    loose = OURS.assign(step=pd.array([0, 0, None, 1, 2], "Int64"))
    assert reconcile(loose, loose).event_share == 1.0
