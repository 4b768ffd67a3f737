from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest

from analytic.crops import PageLayout, View, candidate_grids, crop_grid, tokens_per_side
from analytic.errors import InputError
from analytic.workload import Workload, load_workload, profile_names

if TYPE_CHECKING:
    from pathlib import Path

    from analytic.crops import Grid

GRIDS = [(c, r) for c in range(1, 10) for r in range(1, 10) if 2 <= c * r <= 9]

#: id -> page, grid, image tokens, text tokens, prompt, new tokens
PROFILES = {
    "dsocr-standard-v1": ((640, 1280), (1, 2), 493, 19, 512, 512),
    "dsocr-a4-v1": ((1654, 2339), (2, 3), 903, 9, 912, 512),
    "dsocr-nocrop-v1": ((1024, 1024), None, 273, 19, 292, 512),
    "dsocr-dense-v1": ((1920, 1920), (3, 3), 1203, 19, 1222, 1024),
    "dsocr-smoke-v1": ((640, 1280), (1, 2), 493, 19, 512, 8),
}


def expected_grid(width: int, height: int) -> Grid | None:
    """The rule told the other way round: all nearest grids first, then the last of them that the page half fills."""
    if max(width, height) <= 640:
        return None
    distances = {(c, r): abs(width / height - c / r) for c, r in GRIDS}
    nearest = sorted((g for g in GRIDS if distances[g] == min(distances.values())), key=lambda g: g[0] * g[1])
    half_filled = [g for g in nearest[1:] if 2 * width * height > 640 * 640 * g[0] * g[1]]
    return half_filled[-1] if half_filled else nearest[0]


def test_candidates_are_the_22_grids_fewest_tiles_first() -> None:
    grids = candidate_grids()
    assert len(grids) == 22
    assert sorted(grids) == sorted(GRIDS)
    assert all(a[0] * a[1] <= b[0] * b[1] for a, b in pairwise(grids))


def test_order_within_a_tile_count_never_decides() -> None:
    # The published code takes that order from a Python set; it matters only if grids of equal count can tie.
    ratios = sorted({c / r for c, r in GRIDS})
    counts = [{c * r for c, r in GRIDS if c / r == ratio} for ratio in ratios]
    assert all(left.isdisjoint(right) for left, right in pairwise(counts))
    assert sum(map(len, counts)) == len(GRIDS)


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_is_reached_by_the_page_that_fills_it(grid: Grid) -> None:
    assert crop_grid(640 * grid[0], 640 * grid[1]) == grid


@pytest.mark.parametrize(
    ("page", "grid"),
    [
        ((1654, 2339), (2, 3)),
        ((1000, 1000), (2, 2)),
        ((1920, 1080), (4, 2)),
        ((640, 1280), (1, 2)),
        ((640, 640), None),
        ((1, 1), None),
        ((641, 640), (2, 2)),
        ((1, 100_000), (1, 9)),
        ((100_000, 1), (9, 1)),
    ],
)
def test_known_pages(page: tuple[int, int], grid: Grid | None) -> None:
    assert crop_grid(*page) == grid


@pytest.mark.parametrize(
    ("page", "grid"),
    [
        ((1357, 1357), (2, 2)),
        ((1358, 1358), (3, 3)),
        ((905, 1810), (1, 2)),
        ((906, 1812), (2, 4)),
        ((1810, 905), (2, 1)),
        ((1812, 906), (4, 2)),
        # 1.25 lies halfway between 1 and 1.5
        ((1000, 800), (2, 2)),
        ((1250, 1000), (3, 2)),
        ((2500, 2000), (3, 3)),
    ],
)
def test_ties_go_to_more_tiles_when_the_page_fills_half_of_them(page: tuple[int, int], grid: Grid) -> None:
    assert crop_grid(*page) == grid


def test_rule_against_brute_force() -> None:
    pages = [(width, height) for width, height in np.random.default_rng(0).integers(1, 4000, size=(3000, 2)).tolist()]
    ties = [(side * a // b, side) for side in range(200, 4000, 20) for a, b in ((1, 1), (1, 2), (2, 1), (5, 4), (7, 4))]
    for page in pages + ties:
        assert crop_grid(*page) == expected_grid(*page), page


@pytest.mark.parametrize("page", [(0, 10), (10, 0), (-1, 5)])
def test_a_page_without_pixels_is_refused(page: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="no pixels"):
        crop_grid(*page)


@pytest.mark.parametrize(("size", "tokens"), [(512, 73), (640, 111), (1024, 273), (1280, 421)])
def test_tokens_of_a_page_without_tiles(size: int, tokens: int) -> None:
    assert PageLayout(None, base_size=size, image_size=640).image_tokens == tokens


@pytest.mark.parametrize(("grid", "tokens"), [((2, 3), 903), ((2, 1), 483), ((1, 2), 493), ((1, 9), 1263)])
def test_tokens_of_a_page_with_tiles(grid: Grid, tokens: int) -> None:
    assert PageLayout(grid, base_size=1024, image_size=640).image_tokens == tokens


def test_token_range_over_all_grids() -> None:
    tokens = [PageLayout(grid, base_size=1024, image_size=640).image_tokens for grid in candidate_grids()]
    assert (min(tokens), max(tokens)) == (483, 1263)


def test_sides_that_the_downsampling_does_not_divide_are_rounded_up() -> None:
    assert [tokens_per_side(size) for size in (16, 64, 80, 656, 1024)] == [1, 1, 2, 11, 16]


def test_there_are_five_profiles() -> None:
    assert sorted(profile_names()) == sorted(PROFILES)


@pytest.mark.parametrize("name", PROFILES)
def test_profile(name: str) -> None:
    workload = load_workload(name)
    page, grid, tokens, text, prompt, new = PROFILES[name]
    assert workload.id == name
    assert (workload.page_width, workload.page_height) == page
    assert workload.grid == grid
    assert (workload.image_tokens, workload.text_tokens, workload.seq_len) == (tokens, text, prompt)
    assert workload.max_new_tokens == new
    assert (workload.base_size, workload.image_size, workload.batch_size) == (1024, 640, 1)
    assert workload.variant == ("deepseek-ocr-v1-tiny" if "smoke" in name else "deepseek-ocr-v1-base")


def test_views_stand_in_the_order_of_the_encoders() -> None:
    assert load_workload("dsocr-a4-v1").views == (View("crops", 6, 640), View("global", 1, 1024))
    assert load_workload("dsocr-nocrop-v1").views == (View("global", 1, 1024),)


def test_custom_profile_is_named_after_its_file(tmp_path: Path) -> None:
    file = tmp_path / "receipts.toml"
    file.write_text("page_width = 600\npage_height = 600\ntext_tokens = 5\nmax_new_tokens = 3\n")
    assert load_workload(str(file)) == Workload("receipts", 600, 600, 5, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("page_width = ", "not valid TOML"),
        ("page_width = 600", "incomplete"),
        ("pages = 2", "no field 'pages'; the fields are id, page_width"),
        ("page_width = 0\npage_height = 1\ntext_tokens = 1\nmax_new_tokens = 1", "page_width is 0"),
        ("page_width = true\npage_height = 1\ntext_tokens = 1\nmax_new_tokens = 1", "page_width is True"),
        ("page_width = 1.5\npage_height = 1\ntext_tokens = 1\nmax_new_tokens = 1", r"page_width is 1\.5"),
        (
            "page_width = 1\npage_height = 1\ntext_tokens = 1\nmax_new_tokens = 1\nbase_size = 1000",
            "multiple of the 16",
        ),
    ],
)
def test_bad_custom_profile(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        load_workload(str(file))


def test_unknown_profile_lists_the_choices(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dsocr-a4-v1, .*--workload"):
        load_workload("dsocr-none")
    with pytest.raises(InputError, match="cannot be read"):
        load_workload(str(tmp_path / "missing.toml"))
