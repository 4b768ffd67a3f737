"""The module classes of a live model beside the layers that stand for them, and what changed since a snapshot."""

from __future__ import annotations

import json
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from analytic.config import DEFAULT_VARIANT, variant_config, variant_names
from analytic.errors import DsocrTraceError, InputError
from analytic.families.deepseek_ocr import DeepseekOcr
from analytic.families.registry import read_checkpoint
from hooks.modules import modules_table
from stage_runners.loading import BUILTIN, check_loadable, default_attention
from stage_runners.reference_flops import sketch_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from analytic.families.base import FamilyConfig, ModelFamily


@attrs.frozen
class ClassShape:
    """What a snapshot keeps of a module class.

    Attributes
    ----------
    instances
        Modules of this class.
    parameters
        Parameters that they own themselves.
    children
        Number of their direct children by class.
    """

    instances: int
    parameters: int
    children: dict[str, int]


@attrs.frozen
class LiveClass:
    """One module class of a live model.

    Attributes
    ----------
    layers
        The layers that stand for its instances, or ``other``, with the parameters of those instances.
    """

    module_class: str
    shape: ClassShape
    layers: dict[str, int]


@attrs.frozen
class LiveModel:
    """The module classes of a live model.

    Attributes
    ----------
    classes
        In the order of their first instance.
    variant
        Built-in variant of whose snapshot the classes should be; None where there is none of this family.
    """

    classes: tuple[LiveClass, ...]
    variant: str | None

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return sum(row.shape.parameters for row in self.classes)

    def differences(self) -> list[str]:
        """What changed since the snapshot, one line each; nothing where there is no snapshot."""
        if self.variant is None:
            return []
        return differences(read_snapshot(self.variant), self.shapes())

    def shapes(self) -> dict[str, ClassShape]:
        """What a snapshot keeps of the model."""
        return {row.module_class: row.shape for row in self.classes}


def live_model(source: str, *, variant: str | None = None, trust_remote_code: bool = False) -> LiveModel:
    """Build a model on the meta device, and map its classes to layers.

    Parameters
    ----------
    source
        ``"builtin"``, or a checkpoint directory, of which only ``config.json`` and code are read.
    variant
        Which built-in variant; only with ``"builtin"``.
    trust_remote_code
        Build the checkpoint's own classes instead of the built-in ones.

    Raises
    ------
    InputError
        If the source has no usable configuration, or its code cannot be built.
    """
    attention = default_attention(trust_remote_code=trust_remote_code)
    check_loadable(source, variant=variant, attention=attention, trust_remote_code=trust_remote_code)
    family, config = _family(source, variant or DEFAULT_VARIANT)
    model = sketch_model(
        source, variant=variant or DEFAULT_VARIANT, attention=attention, trust_remote_code=trust_remote_code
    )
    return LiveModel(live_classes(model, family, config), _nearest_variant(family, config))


def _family(source: str, variant: str) -> tuple[ModelFamily, FamilyConfig]:
    return (DeepseekOcr(), variant_config(variant)) if source == BUILTIN else read_checkpoint(Path(source))


def _nearest_variant(family: ModelFamily, config: FamilyConfig) -> str | None:
    """The built-in variant of these dimensions; the default one for others of the same family."""
    if not isinstance(family, DeepseekOcr):
        return None
    return next((name for name in variant_names() if variant_config(name) == config), DEFAULT_VARIANT)


def live_classes(model: nn.Module, family: ModelFamily, config: FamilyConfig) -> tuple[LiveClass, ...]:
    """Module classes of `model`, in the order of their first instance."""
    rows = modules_table(list(model.named_modules())).to_pylist()
    class_of = {row["module_path"]: row["module_class"] for row in rows}
    layer_of = family.mapped(config, class_of)
    children = Counter(
        (class_of[row["parent_path"]], row["module_class"]) for row in rows if row["parent_path"] is not None
    )
    found = []
    for name in dict.fromkeys(class_of.values()):
        mine = [row for row in rows if row["module_class"] == name]
        layers: Counter[str] = Counter()
        for row in mine:
            layers[layer_of[row["module_path"]]] += row["parameter_count"]
        shape = ClassShape(
            instances=len(mine),
            parameters=sum(row["parameter_count"] for row in mine),
            children={child: count for (parent, child), count in children.items() if parent == name},
        )
        found.append(LiveClass(name, shape, dict(layers)))
    return tuple(found)


def _snapshot_file(variant: str) -> Path:
    return Path(str(resources.files("analytic") / "data" / "layers" / f"{variant}.json"))


def read_snapshot(variant: str) -> dict[str, ClassShape]:
    """The committed classes of a built-in variant.

    Raises
    ------
    DsocrTraceError
        If there are none.
    """
    path = _snapshot_file(variant)
    if not path.is_file():
        raise DsocrTraceError(
            f"there is no snapshot of {variant}; write one with list layers --model builtin --refresh"
        )
    raw: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return {name: ClassShape(**shape) for name, shape in raw.items()}


def write_snapshot(variant: str, shapes: Mapping[str, ClassShape]) -> Path:
    """Replace the committed classes of a built-in variant.

    Raises
    ------
    DsocrTraceError
        If this installation cannot be written to.
    """
    path = _snapshot_file(variant)
    text = json.dumps({name: attrs.asdict(shape) for name, shape in shapes.items()}, indent=2)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise DsocrTraceError(
            f"the snapshot {path} cannot be written: {error.strerror}; leave --refresh out, or refresh it in a checkout"
        ) from error
    return path


def check_refreshable(source: str | None) -> None:
    """Refuse to take a snapshot of anything but a built-in variant.

    Raises
    ------
    InputError
        If the source is another model, or none.
    """
    if source != BUILTIN:
        raise InputError("--refresh writes the snapshot of a built-in variant; give it with --model builtin")


def differences(before: Mapping[str, ClassShape], now: Mapping[str, ClassShape]) -> list[str]:
    """Say what is new, gone or changed, one line per class."""
    lines = [f"new: {_described(name, now[name])}" for name in now.keys() - before.keys()]
    lines += [f"gone: {_described(name, before[name])}" for name in before.keys() - now.keys()]
    for name in before.keys() & now.keys():
        changes = _changes(_figures(before[name]), _figures(now[name]))
        if changes:
            lines.append(f"changed: {name}: {', '.join(changes)}")
    return sorted(lines)


def _described(name: str, shape: ClassShape) -> str:
    return f"{name}: {shape.instances:,} instances, {shape.parameters:,} parameters"


def _figures(shape: ClassShape) -> dict[str, int]:
    own = {"instances": shape.instances, "parameters": shape.parameters}
    return own | {f"{child} children": count for child, count in shape.children.items()}


def _changes(before: Mapping[str, int], now: Mapping[str, int]) -> list[str]:
    figures = ((name, before.get(name, 0), now.get(name, 0)) for name in dict.fromkeys((*before, *now)))
    return [f"{name} {old:,} -> {new:,}" for name, old, new in figures if old != new]
