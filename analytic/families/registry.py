"""Families by name and by configuration: our own, and those that installed packages announce."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Final

from analytic.config import read_config_json
from analytic.errors import DsocrTraceError, InputError
from analytic.families.base import ModelFamily

if TYPE_CHECKING:
    from pathlib import Path

    from analytic.families.base import FamilyConfig

#: Group of entry points; each names a `ModelFamily` class. Our own family is announced like any other.
ENTRY_POINTS: Final = "dsocr_trace.models"


def families() -> dict[str, ModelFamily]:
    """Every family by name.

    Raises
    ------
    DsocrTraceError
        If a package announces something that cannot be loaded or is no family, or two announce the same name.
    """
    found: dict[str, ModelFamily] = {}
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        package = entry.dist.name if entry.dist else entry.value
        try:
            loaded = entry.load()
        except Exception as error:  # what somebody else's package raises is not known
            raise DsocrTraceError(
                f"package {package} announces the model family {entry.name!r}, which cannot be loaded: "
                f"{type(error).__name__}: {error}; repair or uninstall the package"
            ) from error
        if not (isinstance(loaded, type) and issubclass(loaded, ModelFamily)):
            raise DsocrTraceError(
                f"package {package} announces {entry.value} as a model family, it must be a subclass of ModelFamily"
            )
        if loaded.name in found and type(found[loaded.name]) is not loaded:
            raise DsocrTraceError(f"two packages announce the model family {loaded.name!r}; uninstall one of them")
        found[loaded.name] = loaded()
    return found


def read_checkpoint(directory: Path) -> tuple[ModelFamily, FamilyConfig]:
    """Family and dimensions of the checkpoint in `directory`; its ``config.json`` is enough.

    Raises
    ------
    InputError
        If the file is missing or not JSON, or no family knows the architecture.
    """
    raw = read_config_json(directory)
    path = directory / "config.json"
    architectures = raw.get("architectures") or ["(none)"]
    known = families()
    for family in known.values():
        if set(family.architectures) & set(architectures):
            return family, family.read_config(raw, str(path))
    choices = ", ".join(name for family in known.values() for name in family.architectures)
    raise InputError(
        f"{path} has the architecture {architectures[0]}, for which there are no formulas; the known ones are "
        f"{choices}; give another checkpoint with --model DIR, or install a package that adds the family"
    )
