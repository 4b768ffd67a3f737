"""The reference part of the documentation: a page for every operator and every layer, made from the code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from analytic.operators import OPERATORS
from dsocr_trace.report.layer_pages import layer_index, layer_page
from dsocr_trace.report.operator_pages import operator_index, operator_page
from dsocr_trace.report.usage import standard_usage

if TYPE_CHECKING:
    from collections.abc import Callable


@attrs.frozen
class Chapter:
    """One part of the reference.

    Attributes
    ----------
    title
        How the navigation calls it.
    pages
        Markdown by path within the documentation; the index first.
    names
        How the navigation calls each page.
    """

    title: str
    pages: dict[str, str]
    names: dict[str, str]


def chapters(math: Callable[[Any], str]) -> tuple[Chapter, ...]:
    """All pages of the reference.

    Parameters
    ----------
    math
        Renders a sympy expression, such as `dsocr_trace.report.formulas.plain`.
    """
    usage = standard_usage()
    operators = {f"operators/{name}.md": operator_page(found, usage, math) for name, found in OPERATORS.items()}
    kinds = [layer for layers in usage.model.family.layers.values() for layer in layers]
    layers = {f"layers/{layer.__name__}.md": layer_page(layer, usage) for layer in kinds}
    return (
        _chapter("Operators", "operators", operator_index(), operators),
        _chapter("Layers", "layers", layer_index(usage), layers),
    )


def _chapter(title: str, folder: str, index: str, pages: dict[str, str]) -> Chapter:
    names = {path: path.removeprefix(f"{folder}/").removesuffix(".md") for path in pages}
    return Chapter(title, {f"{folder}/index.md": index} | pages, {f"{folder}/index.md": "Overview"} | names)
