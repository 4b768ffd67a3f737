"""Workload profiles: what page goes in, and how many tokens come out."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import attrs

from analytic.config import DEFAULT_VARIANT
from analytic.crops import PATCH_SIZE, Grid, PageLayout, View, crop_grid
from analytic.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence


def _positive(instance: Workload, attribute: attrs.Attribute[int], value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"workload {instance.id}: {attribute.name} is {value!r}, it must be a positive whole number")


def _patch_multiple(instance: Workload, attribute: attrs.Attribute[int], value: int) -> None:
    _positive(instance, attribute, value)
    if value % PATCH_SIZE:
        raise InputError(
            f"workload {instance.id}: {attribute.name} is {value} px, "
            f"it must be a multiple of the {PATCH_SIZE} px patch"
        )


def _as_grid(value: Sequence[int] | None) -> Grid | None:
    # How many there are is for the validator to check.
    return None if value is None else cast("Grid", tuple(value))


def _positive_grid(instance: Workload, attribute: attrs.Attribute[Grid | None], value: Grid | None) -> None:
    if value is None:
        return
    if len(value) != 2:
        raise InputError(f"workload {instance.id}: {attribute.name} is {value!r}, it must be two numbers")
    for side in value:
        if isinstance(side, bool) or not isinstance(side, int) or side < 1:
            raise InputError(f"workload {instance.id}: {attribute.name} is {value!r}, both numbers must be positive")


@attrs.frozen
class Workload:
    """One page, one prompt, one greedy generation.

    Attributes
    ----------
    page_width, page_height
        Page size in pixels; the crop rule turns it into a tile grid.
    crop_mode
        Whether pages larger than 640 px are also cut into tiles.
    base_size, image_size
        Side of the global view and of a tile, in pixels.
    text_tokens
        Prompt tokens that are not image tokens, the begin-of-sequence token included.
    max_new_tokens
        Tokens to generate: one prefill, and one decode forward for each token after the first.
    no_repeat_ngram_size
        Length of the n-gram that may not repeat (the published interactive setting is 20, its evaluation uses 35).
    tile_grid
        Columns and rows to cut into, whatever the page's shape; None for what the crop rule gives.
    """

    id: str
    page_width: int = attrs.field(validator=_positive)
    page_height: int = attrs.field(validator=_positive)
    text_tokens: int = attrs.field(validator=_positive)
    max_new_tokens: int = attrs.field(validator=_positive)
    crop_mode: bool = True
    base_size: int = attrs.field(default=1024, validator=_patch_multiple)
    image_size: int = attrs.field(default=640, validator=_patch_multiple)
    batch_size: int = attrs.field(default=1, validator=_positive)
    no_repeat_ngram_size: int = attrs.field(default=20, validator=_positive)
    tile_grid: Grid | None = attrs.field(default=None, converter=_as_grid, validator=_positive_grid)
    variant: str = DEFAULT_VARIANT

    @property
    def grid(self) -> Grid | None:
        """Tile grid (columns, rows), or None where no tiles are cut."""
        if not self.crop_mode:
            return None
        return self.tile_grid or crop_grid(self.page_width, self.page_height)

    @property
    def layout(self) -> PageLayout:
        """How the page is shown to the model."""
        return PageLayout(self.grid, self.base_size, self.image_size)

    @property
    def views(self) -> tuple[View, ...]:
        """The batches that go through the vision encoders, in their order."""
        return self.layout.views

    @property
    def image_tokens(self) -> int:
        """Positions of the prompt that hold image features."""
        return self.layout.image_tokens

    @property
    def seq_len(self) -> int:
        """Positions of the prompt."""
        return self.image_tokens + self.text_tokens

    @property
    def positions(self) -> int:
        """Positions that the cache holds in the end; the last new token is never fed back."""
        return self.seq_len + self.max_new_tokens - 1


def profile_names() -> list[str]:
    """Ids of the built-in profiles."""
    folder = resources.files("analytic") / "data" / "workloads"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_workload(name: str) -> Workload:
    """A built-in profile by its id, or a custom one from a TOML file.

    Parameters
    ----------
    name
        Profile id, or the path of a ``.toml`` file with the fields of `Workload` (``id`` defaults to the file's name).

    Raises
    ------
    InputError
        If there is no such profile or file, or a field is unknown, missing or impossible.
    """
    if name in profile_names():
        text = (resources.files("analytic") / "data" / "workloads" / f"{name}.toml").read_text(encoding="utf-8")
        return _from_toml(text, name)
    path = Path(name)
    if path.suffix == ".toml":
        try:
            return _from_toml(path.read_text(encoding="utf-8"), path.stem)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"workload file {name} cannot be read: {error}") from error
    choices = ", ".join(profile_names())
    raise InputError(f"no workload {name!r}; choose one of {choices}, or a .toml file, with --workload")


def _from_toml(text: str, default_id: str) -> Workload:
    try:
        fields: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"workload {default_id} is not valid TOML: {error}") from error
    known = [field.name for field in attrs.fields(Workload)]
    for key in fields:
        if key not in known:
            raise InputError(f"workload {default_id} has no field {key!r}; the fields are {', '.join(known)}")
    try:
        return Workload(**{"id": default_id} | fields)
    except TypeError as error:
        raise InputError(f"workload {default_id} is incomplete: {error}") from error
