"""The generated pages: one for every operator and every layer, complete, and with the numbers of a prediction."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from analytic.cost import MODEL_DTYPES, Cost, Size
from analytic.model import STAGES
from analytic.operators import OPERATORS, Operator
from analytic.predict import module_rows
from dsocr_trace.forecasts.forecast import predict_words
from dsocr_trace.report import operator_pages, reference
from dsocr_trace.report.formulas import formulas, of_call, plain, quantities, values
from dsocr_trace.report.reference import chapters
from dsocr_trace.report.usage import WORKLOAD, standard_usage

ROOT = Path(__file__).resolve().parent.parent
OPERATOR_SECTIONS = [
    "Parameters", "Forward", "Backward", "Derivation", "Assumptions", "Worked number", "Where it runs",
]  # fmt: skip
LAYER_SECTIONS = ["Fields", "Weights", "Children", "What it runs"]


@pytest.fixture(scope="module")
def usage():
    return standard_usage()


@pytest.fixture(scope="module")
def pages():
    return {path: text for chapter in chapters(plain) for path, text in chapter.pages.items()}


@pytest.fixture(scope="module")
def predicted():
    found = predict_words(WORKLOAD, "h200", variant=None, settings=[])
    return {(row.stage, row.module_path): row for row in module_rows(found.prediction)}


def layers(usage) -> list[str]:
    return [layer.__name__ for kinds in usage.model.family.layers.values() for layer in kinds]


def section(text: str, heading: str, level: str = "##") -> str:
    match = re.search(
        rf"^{level} {re.escape(heading)}\n(.*?)(?=^#{{2,{len(level)}}} |\Z)", text, re.MULTILINE | re.DOTALL
    )
    assert match, f"no section {heading}"
    return match[1]


def cells(text: str) -> list[list[str]]:
    """Cells of a table's rows, without its head."""
    lines = [line.removeprefix("| ").removesuffix(" |") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip("`*") for cell in line.split(" | ")] for line in lines[2:]]


def number(cell: str) -> int:
    return int(cell.replace(",", ""))


def test_every_operator_and_every_layer_has_its_page(pages, usage):
    expected = {f"operators/{name}.md" for name in OPERATORS} | {f"layers/{name}.md" for name in layers(usage)}
    assert set(pages) == expected | {"operators/index.md", "layers/index.md"}
    for path in expected:
        folder, name = path.split("/")
        assert f"({name})" in pages[f"{folder}/index.md"], f"{path} is not in its index"


@pytest.mark.parametrize("name", OPERATORS)
def test_a_page_of_an_operator_is_complete(pages, name):
    text = pages[f"operators/{name}.md"]
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == OPERATOR_SECTIONS
    assert all(section(text, heading).strip() for heading in OPERATOR_SECTIONS)
    documented = cells(section(text, "Parameters"))
    assert [row[0] for row in documented] == list(OPERATORS[name].signature.parameters)
    assert all(row[2] for row in documented), "a parameter says nothing"


def test_a_page_of_a_layer_is_complete(pages, usage):
    for name in layers(usage):
        text = pages[f"layers/{name}.md"]
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == LAYER_SECTIONS, name
        assert all(section(text, heading).strip() for heading in LAYER_SECTIONS), name
        assert "It stands for the class `" in text


def test_a_new_operator_without_page_or_words_is_found(pages, usage, monkeypatch):
    @Operator
    def unheard_of(rows: Size) -> Cost:
        return Cost(vector_flops=rows)

    monkeypatch.setitem(OPERATORS, "unheard_of", unheard_of)
    with pytest.raises(AssertionError):
        test_every_operator_and_every_layer_has_its_page(pages, usage)
    text = operator_pages.operator_page(unheard_of, usage, plain)
    with pytest.raises(AssertionError, match="a parameter says nothing"):
        test_a_page_of_an_operator_is_complete({"operators/unheard_of.md": text}, "unheard_of")


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_worked_numbers_follow_from_the_formulas_on_the_page(pages, usage, name, backward):
    worked = usage.worked(OPERATORS[name])
    text = pages[f"operators/{name}.md"]
    cost = worked.backward_cost if backward else worked.cost
    printed = {row[0]: number(row[2 if backward else 1]) for row in cells(section(text, "Worked number"))}
    columns = cost.columns()
    assert {key: size for key, size in columns.items() if size} == {key: size for key, size in printed.items() if size}
    stand_for = values(worked.operator, worked.arguments)
    shown = section(text, "Backward" if backward else "Forward")
    holding = [formula for formula in formulas(worked.operator, backward=backward) if holds(formula.when, worked)]
    for formula in {formula.quantity: formula for formula in reversed(holding)}.values():
        assert plain(formula.expression) in shown
        if formula.quantity in columns:
            assert formula.expression.subs(stand_for) == columns[formula.quantity], formula
    listed = {formula.quantity for formula in holding}
    assert {key for key, size in columns.items() if size} <= listed


def holds(when, worked) -> bool:
    return all(worked.arguments[name] == value for name, value in when.items())


def test_formulas_of_a_call_give_its_cost(usage):
    for name, calls in usage.lines.items():
        for _, _, line in calls[:: max(len(calls) // 5, 1)]:
            cost = line.operator(**line.arguments).cost.columns()
            stand_for = {symbol: last(size) for symbol, size in values(line.operator, line.arguments).items()}
            found = of_call(line.operator, line.arguments)
            for column, size in cost.items():
                expression = found.get(column)
                assert (0 if expression is None else expression.subs(stand_for)) == last(size), (name, column)


def last(size):
    return int(size[-1]) if isinstance(size, np.ndarray) else size


def test_worked_calls_are_in_the_model(usage):
    for name, operator in OPERATORS.items():
        worked = usage.worked(operator)
        if worked.operation is None:
            continue
        lines = [line for _, operation, line in usage.lines[name] if operation is worked.operation]
        for column, size in worked.cost.columns().items():
            assert size <= sum(line.cost.columns()[column] for line in lines)


def test_sums_of_layers_are_rows_of_the_prediction(pages, predicted, usage):
    compared = 0
    for name in layers(usage):
        text = pages[f"layers/{name}.md"]
        path = usage.example(name).module_path
        for stage in STAGES:
            row = predicted.get((stage, path))
            heading = f"### {stage.capitalize()}\n"
            assert (row is not None) == (heading in text), (name, stage)
            if row is None:
                continue
            shown = section(text, stage.capitalize(), "###")
            assert shown.strip().startswith(f"{row.calls:,} call")
            tabled = cells(shown)
            expected = [row.tensor_flops, row.vector_flops, row.bytes_read + row.bytes_written]
            sums = [number(cell) for cell in tabled[-1][-3:]] if tabled else [0, 0, 0]
            assert sums == expected, (name, stage)
            columns = [[number(cell) for cell in line[-3:]] for line in tabled[:-1]]
            assert [sum(column) for column in zip(*columns, strict=True)] == (expected if columns else [])
            compared += bool(tabled)
    assert compared > 20


def test_links_lead_to_pages(pages):
    for path, text in pages.items():
        folder = Path(path).parent
        for target in re.findall(r"\]\(([^)#]+\.md)\)", text):
            joined = (ROOT / "docs" / folder / target).resolve().relative_to((ROOT / "docs").resolve())
            assert str(joined) in pages or (ROOT / "docs" / joined).exists(), f"{path}: {target}"


def test_quantities_split_bytes_by_dtype():
    cost = OPERATORS["gather"](3, 5, MODEL_DTYPES["bfloat16"]).cost
    found = quantities(cost)
    assert found["bytes_read"] == found["bytes_read, int64"] + found["bytes_read, bfloat16"] == 3 * 8 + 15 * 2
    assert "bytes_written, bfloat16" not in found


def test_the_site_builds_strictly_without_torch(tmp_path):
    pytest.importorskip("material", reason="the documentation's packages are not installed")
    pytest.importorskip("latex2mathml", reason="the documentation's packages are not installed")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from mkdocs.__main__ import cli\n"
        f"cli(['build', '--strict', '--quiet', '--config-file', {str(ROOT / 'mkdocs.yml')!r}, "
        f"'--site-dir', {str(tmp_path)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr + done.stdout
    page = (tmp_path / "operators" / "linear" / "index.html").read_text(encoding="utf-8")
    assert "<math" in page
    assert '<script src="http' not in page
    assert not (tmp_path / "_generate.py").exists()


def test_a_chapter_begins_with_its_index():
    for chapter in reference.chapters(plain):
        assert list(chapter.pages) == list(chapter.names)
        assert next(iter(chapter.names.values())) == "Overview"
