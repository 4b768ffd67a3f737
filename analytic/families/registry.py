"""Families by name and by configuration: our own, and those that installed packages announce."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from analytic.config import read_config_json
from analytic.errors import DsocrTraceError, InputError
from analytic.families.base import ModelFamily

if TYPE_CHECKING:
    from importlib import metadata
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
    from importlib import metadata  # noqa: PLC0415  takes its time to load

    found: dict[str, ModelFamily] = {}
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        family = _loaded(entry)
        if family.name in found and type(found[family.name]) is not type(family):
            raise DsocrTraceError(f"two packages announce the model family {family.name!r}; uninstall one of them")
        found[family.name] = family
    return found


def _loaded(entry: metadata.EntryPoint) -> ModelFamily:
    package = entry.dist.name if entry.dist else entry.value
    try:
        loaded = entry.load()
        family = loaded() if isinstance(loaded, type) and issubclass(loaded, ModelFamily) else None
    except Exception as error:  # what somebody else's package raises is not known
        raise DsocrTraceError(
            f"package {package} announces the model family {entry.name!r}, which cannot be loaded: "
            f"{type(error).__name__}: {' '.join(str(error).split())}; repair or uninstall the package"
        ) from error
    if family is None:
        raise DsocrTraceError(
            f"package {package} announces {entry.value} as a model family, it must be a subclass of ModelFamily"
        )
    missing = [name for name in ("name", "architectures", "layers") if not hasattr(family, name)]
    if missing:
        raise DsocrTraceError(f"the model family {entry.value} of package {package} does not say its {missing[0]}")
    return family


def read_checkpoint(directory: Path) -> tuple[ModelFamily, FamilyConfig]:
    """Family and dimensions of the checkpoint in `directory`; its ``config.json`` is enough.

    Raises
    ------
    InputError
        If the file is missing or not JSON, or no family knows the architecture.
    DsocrTraceError
        If several families know it.
    """
    raw = read_config_json(directory)
    path = directory / "config.json"
    named = raw.get("architectures")
    architectures = named if isinstance(named, list) and named else ["(none)"]
    known = families()
    fitting = [family for family in known.values() if any(name in architectures for name in family.architectures)]
    if not fitting:
        choices = ", ".join(name for family in known.values() for name in family.architectures)
        raise InputError(
            f"{path} has the architecture {architectures[0]}, for which there are no formulas; the known ones are "
            f"{choices}; give another checkpoint with --model DIR, or install a package that adds the family"
        )
    if len(fitting) > 1:
        both = " and ".join(repr(family.name) for family in fitting)
        raise DsocrTraceError(
            f"{path} has the architecture {architectures[0]}, which the model families {both} claim; "
            "uninstall the package of one of them"
        )
    return fitting[0], fitting[0].read_config(raw, str(path))
