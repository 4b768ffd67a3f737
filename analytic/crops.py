"""How a page is cut into views, and how many image tokens they give.

Source of every rule here: the image path of the published DeepSeek-OCR inference code.
"""

from __future__ import annotations

import math

import attrs

from analytic.errors import InputError

#: Tiles are always cut at this size, whatever image_size a caller asks for.
TILE_RULE_SIZE = 640
MIN_TILES = 2
MAX_TILES = 9
PATCH_SIZE = 16
DOWNSAMPLE = 4

Grid = tuple[int, int]


def candidate_grids() -> tuple[Grid, ...]:
    """All (columns, rows) grids of 2 to 9 tiles, fewest tiles first: 22 of them.

    The order decides ties in `crop_grid`. Grids of equal tile count follow ascending columns.
    """
    grids = {
        (columns, rows)
        for columns in range(1, MAX_TILES + 1)
        for rows in range(1, MAX_TILES + 1)
        if MIN_TILES <= columns * rows <= MAX_TILES
    }
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)))


def crop_grid(width: int, height: int) -> Grid | None:
    """Tile grid of a page, or None where the page is small enough to need no tiles.

    Pages of at most 640 x 640 px are not cut. Otherwise the candidate whose aspect ratio is nearest wins; of
    equally near ones a larger grid replaces a smaller one only if the page's area exceeds half of the larger
    grid's pixels.

    Parameters
    ----------
    width, height
        Page size in pixels.

    Raises
    ------
    InputError
        If a side is not positive.
    """
    if width < 1 or height < 1:
        raise InputError(f"a page of {width} x {height} px has no pixels")
    if width <= TILE_RULE_SIZE and height <= TILE_RULE_SIZE:
        return None
    aspect = width / height
    best, best_distance = (1, 1), math.inf
    for grid in candidate_grids():
        columns, rows = grid
        distance = abs(aspect - columns / rows)
        fills = width * height > 0.5 * TILE_RULE_SIZE**2 * columns * rows
        if distance < best_distance or (distance == best_distance and fills):
            best, best_distance = grid, distance
    return best


def tokens_per_side(size: int) -> int:
    """Image tokens along one side of a square view of `size` pixels."""
    return math.ceil(size // PATCH_SIZE / DOWNSAMPLE)


@attrs.frozen
class View:
    """Square images that go through the vision encoders as one batch."""

    kind: str
    count: int
    size: int


@attrs.frozen
class PageLayout:
    """How one page is shown to the model.

    Attributes
    ----------
    grid
        Tile grid (columns, rows), None without tiles.
    base_size, image_size
        Side of the global view and of a tile, in pixels.
    """

    grid: Grid | None
    base_size: int
    image_size: int

    @property
    def tiles(self) -> int:
        """Tiles that the page is cut into."""
        return self.grid[0] * self.grid[1] if self.grid else 0

    @property
    def views(self) -> tuple[View, ...]:
        """The batches that go through the vision encoders, in their order."""
        overview = View("global", 1, self.base_size)
        return (View("crops", self.tiles, self.image_size), overview) if self.grid else (overview,)

    @property
    def image_tokens(self) -> int:
        """Positions of the page: the global view, its row ends and the separator, then the tiles and their row ends."""
        base = tokens_per_side(self.base_size)
        total = base * (base + 1) + 1
        if self.grid is not None:
            columns, rows = self.grid
            tile = tokens_per_side(self.image_size)
            total += (tile * columns + 1) * tile * rows
        return total
