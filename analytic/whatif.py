"""What-if settings: one workload turned into another, from ``KEY=VALUE`` words."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Final, TypeVar

import attrs

from analytic.cost import dtype_name
from analytic.crops import Grid, candidate_grids
from analytic.errors import InputError
from analytic.layers.base import Policy
from analytic.model import ATTENTION_FLOPS, ATTENTIONS
from analytic.routing import PLANS, Plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from analytic.workload import Workload

Word = TypeVar("Word", bound=str)

_NUMBERS: Final = (
    "page_width",
    "page_height",
    "base_size",
    "image_size",
    "text_tokens",
    "seq_len",
    "max_new_tokens",
    "batch_size",
)
_DTYPES: Final = ("bf16", "fp16", "fp32")
#: Every key that a setting may have.
KEYS: Final = (*_NUMBERS, "crop_grid", "crop_mode", "dtype", "attention", "attention_flops", "routing")


@attrs.frozen
class Scenario:
    """What to predict.

    Attributes
    ----------
    workload
        Page, prompt, batch and number of new tokens.
    policy
        How the model runs, and what is counted.
    routing
        How tokens are spread over experts.
    """

    workload: Workload
    policy: Policy
    routing: Plan = "balanced"


def apply_settings(scenario: Scenario, settings: Sequence[str]) -> Scenario:
    """Change a scenario.

    Setting ``crop_grid`` or ``text_tokens`` changes the prompt's length; setting ``seq_len`` fills the prompt up with
    text tokens.

    Parameters
    ----------
    scenario
        What to start from.
    settings
        Words such as ``batch_size=4``, ``crop_grid=2x3``, ``crop_grid=none``, ``dtype=fp32``.

    Raises
    ------
    InputError
        If a word has no ``=``, a key is unknown or given twice, or a value is impossible.
    """
    given: dict[str, str] = {}
    for word in settings:
        key, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"setting {word!r} has no value; write KEY=VALUE, such as batch_size=4, with --set")
        if key not in KEYS:
            nearest = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {nearest[0]}? " if nearest else ""
            raise InputError(f"no setting {key!r}; {hint}choose one of {', '.join(KEYS)} with --set")
        if key in given:
            raise InputError(f"setting {key} is given twice, as {given[key]!r} and {value!r}; give it once with --set")
        given[key] = value
    policy = scenario.policy
    return Scenario(
        workload=_workload(scenario.workload, given),
        policy=Policy(
            dtype=dtype_name(_choice("dtype", given["dtype"], _DTYPES)) if "dtype" in given else policy.dtype,
            attention=_choice("attention", given.get("attention", policy.attention), ATTENTIONS),
            attention_flops=_choice(
                "attention_flops", given.get("attention_flops", policy.attention_flops), ATTENTION_FLOPS
            ),
        ),
        routing=_choice("routing", given.get("routing", scenario.routing), PLANS),
    )


def _workload(workload: Workload, given: dict[str, str]) -> Workload:
    numbers: dict[str, Any] = {key: _number(key, given[key]) for key in _NUMBERS if key in given}
    if "seq_len" in numbers and "text_tokens" in numbers:
        raise InputError("seq_len and text_tokens both set the length of the prompt; give one of them with --set")
    seq_len = numbers.pop("seq_len", None)
    changed = attrs.evolve(workload, **numbers)
    if {"page_width", "page_height"} & numbers.keys():
        # The page's own shape decides again, unless a grid is asked for below.
        changed = attrs.evolve(changed, tile_grid=None)
    if "crop_mode" in given:
        changed = attrs.evolve(changed, crop_mode=_choice("crop_mode", given["crop_mode"], ("true", "false")) == "true")
    if "crop_grid" in given:
        grid = _grid(given["crop_grid"])
        changed = attrs.evolve(changed, crop_mode=grid is not None, tile_grid=grid)
    if seq_len is not None:
        text = seq_len - changed.image_tokens
        if text < 1:
            raise InputError(
                f"seq_len is {seq_len}, the page alone takes {changed.image_tokens} positions; "
                f"give at least {changed.image_tokens + 1} with --set seq_len="
            )
        changed = attrs.evolve(changed, text_tokens=text)
    return changed


def _number(key: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise InputError(f"{key} is {value!r}, it must be a positive whole number without a unit; change it with --set")
    return int(value)


def _choice(key: str, value: str, choices: Sequence[Word]) -> Word:
    for choice in choices:
        if choice == value:
            return choice
    raise InputError(f"{key} is {value!r}, it must be one of {', '.join(choices)}; change it with --set")


def _grid(value: str) -> Grid | None:
    if value == "none":
        return None
    columns, _, rows = value.partition("x")
    grid = (int(columns), int(rows)) if columns.isdecimal() and rows.isdecimal() else None
    if grid not in candidate_grids():
        choices = ", ".join(f"{columns}x{rows}" for columns, rows in candidate_grids())
        raise InputError(f"crop_grid is {value!r}, it must be none or one of {choices}; change it with --set")
    return grid
