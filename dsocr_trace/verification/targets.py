"""What can be verified: for each target the modules that it covers, and the workloads that they run."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Final

import attrs

from analytic.crops import Grid, PageLayout, candidate_grids
from analytic.errors import InputError
from analytic.model import STAGES, Stage
from analytic.workload import Workload, load_workload

if TYPE_CHECKING:
    from collections.abc import Sequence

EVERYTHING: Final = "all"

_TILE: Final = 640
#: The smallest view that there is: one patch, after both strided convolutions, of 4 x 4.
_SMALLEST: Final = 64


@attrs.frozen
class Case:
    """A prefill, and single decode forwards.

    Attributes
    ----------
    workload
        Page, prompt and batch size.
    kv_lengths
        Cached positions after each decode forward.
    """

    workload: Workload
    kv_lengths: tuple[int, ...] = ()


@attrs.frozen
class Target:
    """A part of the model that is verified by itself.

    Attributes
    ----------
    modules
        Pattern of the paths of its modules.
    stages
        Stages that are compared.
    cases
        What runs.
    by_class
        Whether rows stand for a module class each, or for a module path without its numbers.
    subtrees
        Whether a module's figure includes the modules below it.
    """

    cases: tuple[Case, ...]
    modules: str = ".*"
    stages: tuple[Stage, ...] = STAGES
    by_class: bool = True
    subtrees: bool = False

    def covers(self, stage: str, path: str) -> bool:
        """Whether the figure of this module in this stage belongs to the target."""
        return stage in self.stages and re.fullmatch(self.modules, path) is not None


def _page(  # a page of exactly the tiles asked for
    grid: Grid | None, *, base_size: int = 1024, image_size: int = _TILE, text_tokens: int = 6, batch_size: int = 1
) -> Workload:
    columns, rows = grid or (1, 1)
    views = f"{base_size}" if grid is None else f"{base_size}+{columns}x{rows}x{image_size}"
    return Workload(
        id=f"{views}, {text_tokens} text tokens, batch {batch_size}",
        page_width=_TILE * columns,
        page_height=_TILE * rows,
        text_tokens=text_tokens,
        max_new_tokens=1,
        crop_mode=grid is not None,
        base_size=base_size,
        image_size=image_size,
        batch_size=batch_size,
    )


def _prompt(length: int, *, batch_size: int = 1) -> Workload:
    """A prompt of `length` positions, with the smallest image."""
    text_tokens = length - PageLayout(None, base_size=_SMALLEST, image_size=_SMALLEST).image_tokens
    return _page(None, base_size=_SMALLEST, text_tokens=text_tokens, batch_size=batch_size)


def _profile(name: str) -> Case:
    """A built-in profile, with its first, middle and last decode forward."""
    workload = load_workload(name)
    last = workload.max_new_tokens - 1
    return Case(workload, tuple(workload.seq_len + step for step in (1, last // 2, last)))


#: Six tiles and a prompt of 909 positions.
_TYPICAL: Final = Case(_page((2, 3)), (910,))
#: Published view sizes, and one whose patches divide neither into windows nor by the strides.
_WHOLE: Final = tuple(Case(_page(None, base_size=side)) for side in (512, 640, 1008, 1024, 1280))
_GRIDS: Final = tuple(_TYPICAL if grid == (2, 3) else Case(_page(grid)) for grid in candidate_grids())
_SIZES: Final = (Case(_page((1, 2), base_size=640, image_size=512)), Case(_page((3, 1), base_size=512, image_size=336)))
_PROFILES: Final = tuple(map(_profile, ("dsocr-standard-v1", "dsocr-a4-v1", "dsocr-nocrop-v1", "dsocr-dense-v1")))
_LENGTHS: Final = (
    Case(_prompt(4), (5, 6, 64, 1024, 8192)),
    Case(_prompt(129), (130,)),
    Case(_prompt(2048), (2049, 4096)),
    Case(_prompt(100, batch_size=3), (101, 1000)),
)
_BATCH: Final = (Case(_page((2, 1), base_size=512, batch_size=2), (600,)),)
_DECODER: Final = r"model\.layers\.\d+(\..*)?"

TARGETS: Final = {
    "vision": Target(
        (_TYPICAL, _WHOLE[0]),
        modules=r"model\.(sam_model|vision_model|projector)(\..*)?",
        stages=("vision",),
        by_class=False,
    ),
    "decoder": Target((_TYPICAL,), modules=_DECODER, stages=("prefill", "decode"), by_class=False),
    "llama": Target(
        _LENGTHS[:2],
        modules=r"model\.layers\.\d+\.(self_attn(\..*)?|\w+_layernorm)|model\.norm",
        stages=("prefill", "decode"),
        by_class=False,
    ),
    "core": Target((_TYPICAL,), modules=r"(model|model\.(embed_tokens|norm)|lm_head|)", by_class=False, subtrees=True),
    "prefill-decode": Target(_LENGTHS, modules=_DECODER, stages=("prefill", "decode"), by_class=False),
    "end2end-vision-nocrop": Target(_WHOLE, stages=("vision",)),
    "end2end-vision": Target((*_GRIDS, *_SIZES), stages=("vision",)),
    "end2end-prefill-decode": Target((*_PROFILES, *_LENGTHS), stages=("prefill", "decode")),
    "end2end": Target((*_GRIDS, *_WHOLE, *_SIZES, *_PROFILES, *_LENGTHS, *_BATCH)),
}


def chosen_targets(names: Sequence[str]) -> dict[str, Target]:
    """Targets by name, in their own order; all of them for no name at all or for ``all``.

    Raises
    ------
    InputError
        If there is no such target.
    """
    choices = [*TARGETS, EVERYTHING]
    for name in names:
        if name not in choices:
            near = difflib.get_close_matches(name, choices, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(f"no target {name!r}; {hint}choose from {', '.join(choices)}")
    if not names or EVERYTHING in names:
        return TARGETS
    return {name: target for name, target in TARGETS.items() if name in names}
