"""What a module tree consists of, and which of its modules can be traced."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pyarrow as pa
import torch
from torch.nn.parameter import is_lazy

from hooks.tables import MODULES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: Path and module, each module once, in the order of ``named_modules``; the root, "", is first.
NamedModule = tuple[str, torch.nn.Module]


def parent_of(path: str) -> str | None:
    """Give the path of a module's parent: None for the root."""
    return path.rpartition(".")[0] if path else None


def is_within(path: str, subtree: str) -> bool:
    """Say whether ``path`` is ``subtree`` itself or lies below it."""
    return not subtree or path == subtree or path.startswith(subtree + ".")


def modules_table(named: Sequence[NamedModule]) -> pa.Table:
    """Describe each module of a tree.

    A parameter counts for the module that owns it directly, and once: one that two modules share counts for the first.

    Parameters
    ----------
    named
        The tree's modules.

    Returns
    -------
    pyarrow.Table
        With the schema `hooks.tables.MODULES`.
    """
    counted: set[int] = set()
    rows = []
    for path, module in named:
        own = [
            parameter
            for parameter in module.parameters(recurse=False)
            if id(parameter) not in counted and not is_lazy(parameter)
        ]
        counted.update(map(id, own))
        rows.append(
            {
                "module_path": path,
                "module_class": type(module).__name__,
                "qualified_class": f"{type(module).__module__}.{type(module).__qualname__}",
                "parent_path": parent_of(path),
                "depth": path.count(".") + 1 if path else 0,
                "is_leaf": next(module.children(), None) is None,
                "parameter_count": sum(parameter.numel() for parameter in own),
                "weight_bytes": sum(parameter.numel() * parameter.element_size() for parameter in own),
            }
        )
    return pa.Table.from_pylist(rows, schema=MODULES)


def alias_notes(named: Sequence[NamedModule]) -> Iterator[str]:
    """Yield a note for each further name of a shared module; what lies below it is not repeated."""
    path_of = {id(module): path for path, module in named}
    for path, module in named:
        for name, child in module._modules.items():  # noqa: SLF001 - named_children() hides what occurs twice
            alias = f"{path}.{name}" if path else name
            if child is not None and path_of[id(child)] != alias:
                yield f"{alias!r} is the same module as {path_of[id(child)]!r} and recorded under that path"


def traceable(named: Sequence[NamedModule], notes: list[str]) -> Iterator[tuple[int, str]]:
    """Yield index and attribute of each callable to wrap; append a note for each module that hides something.

    A compiled module is recorded as a whole, from outside of what the compiler made: a wrapper inside would change the
    graph. A script module runs outside Python and keeps its ``forward``.
    """
    hidden_below: str | None = None
    for index, (path, module) in enumerate(named):
        if hidden_below is not None and is_within(path, hidden_below):
            continue
        name = path or type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            hidden_below = path
            notes.append(f"{name!r} is a ScriptModule: neither it nor what it contains is recorded")
        elif module._compiled_call_impl is not None:  # noqa: SLF001 - the only trace that Module.compile() leaves
            hidden_below = path
            notes.append(f"{name!r} is compiled: recorded as a whole, without what it contains or direct forward calls")
            yield index, "_compiled_call_impl"
        elif _is_optimized(module):
            hidden_below = path
            notes.append(f"{name!r} is compiled: recorded as a whole, without what it contains")
            yield index, "forward"
        else:
            yield index, "forward"


def _is_optimized(module: torch.nn.Module) -> bool:
    """Say whether torch.compile() made this module; the compiler is not imported to find out."""
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    return eval_frame is not None and isinstance(module, eval_frame.OptimizedModule)
