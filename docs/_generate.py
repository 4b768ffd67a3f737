# ruff: noqa: INP001  MkDocs loads it by its path
"""MkDocs hook: the pages of operators and layers, generated from the code at build time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

from dsocr_trace.report.formulas import latex
from dsocr_trace.report.reference import chapters

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files


def mathml(expression: Any) -> str:
    """A sympy expression as MathML. Names are identifiers: browsers take text for space, and move operators' gaps."""
    found: str = convert(latex(expression))
    return found.replace("<mtext>", '<mi mathvariant="normal">').replace("</mtext>", "</mi>")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and their chapters behind the last section of the navigation."""
    reference: list[dict[str, Any]] = []
    for chapter in chapters(mathml):
        for path, text in chapter.pages.items():
            files.append(File.generated(config, path, content=text))
        reference.append({chapter.title: [{name: path} for path, name in chapter.names.items()]})
    config.nav = [*(config.nav or []), {"Reference": reference}]
    return files
