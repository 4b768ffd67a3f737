# ruff: noqa: INP001  MkDocs loads it by its path
"""MkDocs hook: what the code says better than a hand could, generated at build time.

A page asks for the columns of a table with ``<!-- columns: NAME -->``, for a command with ``<!-- command: NAME -->``.
Pages of operators and layers, and those of notebooks, are generated as a whole.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
from latex2mathml.converter import convert
from mkdocs.structure.files import File

from dsocr_trace.cli import cli
from dsocr_trace.report.command_pages import command_reference
from dsocr_trace.report.formulas import latex
from dsocr_trace.report.reference import chapters
from dsocr_trace.report.schema_pages import column_table
from dsocr_trace.runs.schemas import STAGE2_TABLES, TABLES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

_MARK = re.compile(r"^<!-- (columns|command): (\S+) -->$", re.MULTILINE)
_NOTEBOOK = ".ipynb"
#: What pandas brings for notebooks; here its tables look like all others.
_OWN_STYLE = re.compile(r"<style scoped>.*?</style>\n| border=\"1\" class=\"dataframe\"", re.DOTALL)


def mathml(expression: Any) -> str:
    """A sympy expression as MathML. Names are identifiers: browsers take text for space, and move operators' gaps."""
    found: str = convert(latex(expression))
    return found.replace("<mtext>", '<mi mathvariant="normal">').replace("</mtext>", "</mi>")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, and the chapters of the reference behind the last section of the navigation."""
    reference: list[dict[str, Any]] = []
    for chapter in chapters(mathml):
        for path, text in chapter.pages.items():
            files.append(File.generated(config, path, content=text))
        reference.append({chapter.title: [{name: path} for path, name in chapter.names.items()]})
    config.nav = [*(config.nav or []), {"Reference": reference}]
    for notebook in [file for file in files if file.src_uri.endswith(_NOTEBOOK)]:
        for path, content in _pages_of(notebook):
            files.append(File.generated(config, path, content=content))
    return files


def _pages_of(notebook: File) -> Iterator[tuple[str, str | bytes]]:
    """A notebook as a page, with its pictures beside it; the outputs are those that are stored in it."""
    path = Path(notebook.src_uri).with_suffix("")
    parts: list[str] = []
    for number, cell in enumerate(nbformat.read(notebook.abs_src_path, as_version=4).cells):
        parts.append(cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.name}-{number}.png"
                yield str(path.with_name(name)), base64.b64decode(data["image/png"])
                parts.append(f"![Output of the cell above]({name})")
            elif "text/html" in data:
                parts.append(_OWN_STYLE.sub("", data["text/html"]))
            else:
                parts.append(f"```text\n{data.get('text/plain', output.get('text', ''))}\n```")
    yield f"{path}.md", "\n\n".join(parts)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the generated parts where the page asks for them."""
    return _MARK.sub(lambda mark: _part(mark[1], mark[2]), markdown)


def _part(kind: str, name: str) -> str:
    if kind == "columns":
        return column_table((TABLES | STAGE2_TABLES)[name])
    return command_reference(name, cli.commands[name])
