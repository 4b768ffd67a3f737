"""The vectorised conversion of logs against a plain stack machine, and its speed."""

from __future__ import annotations

import random
import time
from typing import Any

import pyarrow as pa
import pytest

from hooks.calls import Label, calls_table
from hooks.tables import CALLS
from hooks.wrappers import ThreadLog

PATHS = ["", *(f"block.{index}" for index in range(40))]
OWN_STAGES = [None if index % 5 else "vision" for index in range(len(PATHS))]
OWN_STAGES[0] = None


def random_log(rng: random.Random, thread: int, calls: int, *, deepest: int = 9) -> ThreadLog:
    """A thread's log of `calls` calls; some are open at its end."""
    log, stack, now, made = ThreadLog(thread, thread), [], rng.randrange(1000), 0
    while made < calls:
        now += rng.randrange(3)
        if stack and (len(stack) == deepest or rng.random() < 0.5):
            log.entries += (~stack.pop(), now)
            continue
        module = rng.randrange(len(PATHS))
        mark = module
        if module == 0:
            log.contexts.append((rng.choice(["prefill", "decode"]), rng.choice([None, 0, 7])))
            mark = len(PATHS) + len(log.contexts) - 1
        log.entries += (mark, now)
        stack.append(module)
        made += 1
    return log


def naive(logs: list[ThreadLog], labels: list[tuple[int, Label]]) -> list[dict[str, Any]]:
    """The same rows one by one; `id` is a call's place in the logs."""
    done: list[dict[str, Any]] = []
    for log in logs:
        stack: list[dict[str, Any]] = []
        for mark, now in zip(log.entries[::2], log.entries[1::2], strict=True):
            if mark < 0:
                stack.pop()["end_ns"] = now
                continue
            above = stack[-1] if stack else None
            module = mark if mark < len(PATHS) else 0
            if mark >= len(PATHS) or above is None:
                label = [name for since, name in labels if since <= now][-1]
                around = log.contexts[mark - len(PATHS)] if mark >= len(PATHS) else ("other", None)
                inherited = label, *around
            else:
                inherited = above["inherited"]
            row = {"thread": log.thread, "start_ns": now, "module_path": PATHS[module], "above": above}
            row |= {"inherited": inherited, "own": OWN_STAGES[module], "end_ns": None}
            stack.append(row)
            done.append(row)
    done = sorted((row for row in done if row["end_ns"] is not None), key=lambda row: row["start_ns"])
    for call_id, row in enumerate(done):
        row["call_id"] = call_id
    return [
        {
            "call_id": row["call_id"],
            "parent_call_id": row["above"].get("call_id") if row["above"] else None,
            "pass": row["inherited"][0].pass_name,
            "page": row["inherited"][0].page,
            "stage": row["own"] or row["inherited"][1],
            "step": row["inherited"][2],
            **{name: row[name] for name in ("module_path", "thread", "start_ns", "end_ns")},
        }
        for row in done
    ]


@pytest.mark.parametrize("seed", range(30))
def test_random_logs_equal_the_stack_machine(seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311
    logs = [random_log(rng, thread, rng.randrange(200)) for thread in range(rng.randrange(4))]
    labels = [(0, Label("first", 0)), (200, Label("second", 1)), (201, Label("third", 2))]
    table, unclosed = calls_table(logs, PATHS, OWN_STAGES, labels)
    assert table.to_pylist() == naive(logs, labels)
    assert table.num_rows + unclosed == sum(mark >= 0 for log in logs for mark in log.entries[::2])


def test_300_000_calls() -> None:
    rng = random.Random(1)  # noqa: S311
    logs = [random_log(rng, 1, 200_000), random_log(rng, 2, 100_000, deepest=60)]
    labels = [(0, Label("first", 0)), (50_000, Label("second", 1))]
    start = time.perf_counter()
    table, _ = calls_table(logs, PATHS, OWN_STAGES, labels)
    seconds = time.perf_counter() - start
    assert table.equals(pa.Table.from_pylist(naive(logs, labels), CALLS))
    assert seconds < 2
