"""Execute the notebooks and store their outputs: ``python docs/notebooks/execute.py``."""  # noqa: INP001

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


def executed(path: Path, run: str | None = None) -> nbformat.NotebookNode:
    """The notebook with fresh outputs.

    Parameters
    ----------
    path
        Of the notebook, whose folder is the working directory.
    run
        Directory to read instead of the one that its cell with the tag "parameters" names.
    """
    notebook = nbformat.read(path, as_version=4)
    if run is not None:
        (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
        parameters.source = f"RUN = {run!r}"
    NotebookClient(notebook, record_timing=False, resources={"metadata": {"path": path.parent}}).execute()
    return notebook


def main() -> None:
    """Write the notebooks beside this script."""
    for path in HERE.glob("*.ipynb"):
        nbformat.write(executed(path), path)


if __name__ == "__main__":
    main()
