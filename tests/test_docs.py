"""The documentation names every table, column, option and page."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from analytic.hardware import hardware_names
from analytic.workload import load_workload, profile_names
from dsocr_trace.cli import cli
from dsocr_trace.report.verification import verification_json
from dsocr_trace.schemas import TABLES
from dsocr_trace.verify import Verification
from dsocr_trace.verify_targets import EVERYTHING, TARGETS
from hooks.attribution import REASONS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

#: Endings of column names to the units that they may stand for; the first match counts.
UNITS = {
    "_flops_per_s": {"FLOP/s"},
    "_bytes_per_s": {"bytes/s"},
    "share_of_module_flops": {"ratio"},
    "_flops": {"FLOP"},
    "_ns": {"ns"},
    "_bytes": {"bytes"},
    "_px": {"px"},
}


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """What stands below a second-level heading."""
    match = re.search(rf"^## `?{re.escape(heading)}`?\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert match, f"no section {heading}"
    return match[1]


def rows(text: str) -> dict[str, list[str]]:
    """First cell, without backticks, to the other cells of each table row."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {first.strip("`"): rest for first, *rest in cells}


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def options(command: click.Command) -> set[str]:
    return {
        name
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for name in (*parameter.opts, *parameter.secondary_opts)
    }


@pytest.mark.parametrize("name", TABLES)
def test_every_column_is_documented_in_order_with_its_unit(name: str) -> None:
    documented = rows(section(page("run-directory.md"), name))
    assert list(documented) == TABLES[name].names
    for column, (unit, meaning) in documented.items():
        assert meaning, column
        expected = next((known for suffix, known in UNITS.items() if column.endswith(suffix)), None)
        assert expected is None or unit in expected, column


def test_no_table_is_documented_that_does_not_exist() -> None:
    headings = re.findall(r"^## `(\w+)`$", page("run-directory.md"), re.MULTILINE)
    assert sorted(headings) == sorted(TABLES)


@pytest.mark.parametrize("command", cli.commands)
def test_every_option_is_documented_and_no_other(command: str) -> None:
    documented = set(re.findall(r"--[a-z][a-z-]*", " ".join(rows(section(page("cli.md"), command)))))
    assert documented == options(cli.commands[command])


def test_every_command_is_documented() -> None:
    assert set(re.findall(r"^## `(\w+)`$", page("cli.md"), re.MULTILINE)) == set(cli.commands)


@pytest.mark.parametrize("command", cli.commands)
def test_every_default_is_documented(command: str) -> None:
    documented = rows(section(page("cli.md"), command))
    for parameter in cli.commands[command].params:
        if isinstance(parameter, click.Option) and parameter.show_default is True:
            (cells,) = [cells for first, cells in documented.items() if f"{parameter.opts[0]} " in f"{first} "]
            assert cells[0] == f"`{parameter.default}`", parameter.name


def test_every_workload_is_documented_with_its_numbers() -> None:
    documented = rows(page("workloads.md"))
    for name in profile_names():
        workload, cells = load_workload(name), documented[name]
        expected = [workload.image_tokens, workload.text_tokens, workload.seq_len, workload.max_new_tokens]
        assert cells[2:] == [str(number) for number in expected], name
        assert numbers(cells[0]) == [workload.page_width, workload.page_height]
        assert numbers(cells[1]) == list(workload.grid or [])


def test_every_device_and_reason_is_documented() -> None:
    assert set(hardware_names()) <= set(rows(section(page("cost-model.md"), "Hardware")))
    assert set(rows(section(page("how-it-works.md"), "Attribution"))) == set(REASONS)


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    assert sorted(re.findall(r": ([\w-]+\.md)$", nav, re.MULTILINE)) == sorted(path.name for path in DOCS.glob("*.md"))


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "results/README.md", "tests/manual/README.md"])
def test_links_outside_the_site_lead_somewhere(name: str) -> None:
    path = ROOT / name
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_every_target_of_verify_is_documented() -> None:
    assert list(rows(section(page("verify.md"), "Targets"))) == [*TARGETS, EVERYTHING]
    assert all(name in (cli.commands["verify"].help or "") for name in (*TARGETS, EVERYTHING))


def test_every_key_of_a_verification_is_documented() -> None:
    nothing = Verification(workloads={}, rows=(), differences=(), operators_without_reference=())
    assert list(rows(section(page("verify.md"), "--json"))) == list(verification_json(nothing))
