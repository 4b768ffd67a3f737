"""The documentation names every table, column, option, page and picture, and quotes errors that exist."""

from __future__ import annotations

import ast
import html
import importlib.util
import re
from pathlib import Path

import click
import pyarrow as pa
import pytest

from analytic.hardware import hardware_names
from analytic.workload import load_workload, profile_names
from dsocr_trace.cli import cli
from dsocr_trace.report.schema_pages import meaning, unit
from dsocr_trace.report.verification import verification_json
from dsocr_trace.runs.schemas import RECORDED_KERNELS, STAGE2_TABLES, TABLES
from dsocr_trace.verification.targets import EVERYTHING, TARGETS
from dsocr_trace.verification.verify import Verification
from hooks.attribution import REASONS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

PACKAGES = ("analytic", "dsocr_trace", "hooks", "stage_runners")
#: All tables that have a page, by name; and one that is described in words.
DOCUMENTED = TABLES | STAGE2_TABLES
SCHEMAS = DOCUMENTED | {"recorded kernels": RECORDED_KERNELS}

#: Endings of column names to their units; the first match counts.
UNITS = {
    "_flops_per_s": "FLOP/s",
    "_bytes_per_s": "bytes/s",
    "share_of_module_flops": "ratio",
    "ratio_predicted_to_measured": "ratio",
    "share_of_time": "ratio",
    "share_of_peak": "ratio",
    "occupancy": "ratio",
    "flops": "FLOP",
    "_ns": "ns",
    "bytes": "bytes",
    "bytes_read": "bytes",
    "bytes_written": "bytes",
    "bytes_total": "bytes",
    "_px": "px",
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


def quoted_messages() -> list[str]:
    return re.findall(r"^``` \{ \.text \.wrap \}\n(.*?)\n```$", page("troubleshooting.md"), re.MULTILINE)


def texts_of_the_code() -> set[str]:
    """Every text in the packages, with an ellipsis for each value that is put into it."""
    found = set()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


@pytest.fixture(scope="module")
def generate():
    """The hook that makes what the pages ask for."""
    for package in ("mkdocs", "latex2mathml", "nbformat"):
        pytest.importorskip(package, reason="the documentation's packages are not installed")
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "_generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_column_says_what_it_holds_and_in_what_unit(name: str) -> None:
    for field in SCHEMAS[name]:
        assert meaning(field), f"{name}.{field.name} has no description"
        expected = next((known for ending, known in UNITS.items() if field.name.endswith(ending)), "")
        assert unit(field) == expected, field.name


def test_a_column_without_a_description_is_found() -> None:
    assert not meaning(pa.field("nameless_ns", pa.int64()))


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_table_has_its_section_with_its_columns(generate, name: str) -> None:
    path, level = ("nsight.md", "###") if name in STAGE2_TABLES else ("run-directory.md", "##")
    marked = re.search(
        rf"^{level} `{name}(\.parquet)?`\n((?!^#).*\n)*?<!-- columns: {name} -->$", page(path), re.MULTILINE
    )
    assert marked, f"{path} has no section {name} with its columns"
    documented = rows(generate.on_page_markdown(marked[0]))
    assert list(documented) == DOCUMENTED[name].names
    assert {column: cells[1] for column, cells in documented.items()} == {f.name: unit(f) for f in DOCUMENTED[name]}


def test_no_table_is_documented_that_does_not_exist() -> None:
    headings = re.findall(r"^## `(\w+)`$", page("run-directory.md"), re.MULTILINE)
    assert sorted(headings) == sorted(TABLES)


def test_every_command_is_documented() -> None:
    headings = re.findall(r"^## `(\w+)`\n\n<!-- command: (\w+) -->$", page("cli.md"), re.MULTILINE)
    assert headings == [(name, name) for name, _ in headings]
    assert {name for name, _ in headings} == set(cli.commands)


@pytest.mark.parametrize("name", cli.commands)
def test_every_option_says_what_it_does(name: str) -> None:
    command = cli.commands[name]
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts[0]} has no help text"
        else:
            assert str(parameter.name).split("_")[0] in command.help.lower() or isinstance(parameter.type, click.Choice)


@pytest.mark.parametrize("name", cli.commands)
def test_every_option_is_in_the_reference_with_its_default(generate, name: str) -> None:
    command = cli.commands[name]
    text = generate.on_page_markdown(f"<!-- command: {name} -->")
    assert text.startswith((command.help or "").splitlines()[0])
    for option in (parameter for parameter in command.params if isinstance(parameter, click.Option)):
        (line,) = [line for line in text.splitlines() if re.match(rf"\| <code>{option.opts[0]}[ <]", line)]
        _, default, told = (html.unescape(cell.strip()) for cell in line.strip("|").split("|"))
        assert told in str(option.help)
        assert told
        if option.show_default is True:
            assert str(option.default) in default
        assert ("required" in default) == option.required


def test_no_request_is_left_in_a_page(generate) -> None:
    for path in DOCS.rglob("*.md"):
        assert not re.search(r"<!-- \w+: ", generate.on_page_markdown(path.read_text(encoding="utf-8"))), path


def test_every_quoted_error_is_one_of_the_code() -> None:
    quoted, known = quoted_messages(), texts_of_the_code()
    assert len(quoted) >= 25
    assert [message for message in quoted if message not in known] == []


def test_every_picture_is_small_and_shown() -> None:
    pictures = {path for path in (DOCS / "images").iterdir() if path.suffix != ".py"}
    shown = {
        (path.parent / link).resolve()
        for path in DOCS.rglob("*.md")
        for link in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", path.read_text(encoding="utf-8"))
    }
    assert pictures
    assert {picture for picture in pictures if picture.is_file()} == shown
    assert all(picture.stat().st_size < 200_000 for picture in shown)


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
    written = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    converted = {str(path.relative_to(DOCS).with_suffix(".md")) for path in DOCS.rglob("*.ipynb")}
    assert sorted(re.findall(r"([\w/-]+\.md)$", nav, re.MULTILINE)) == sorted(written | converted)


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
