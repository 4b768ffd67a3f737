"""A page and a workload become the tensors that the model's forward takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch
from PIL import Image, ImageOps

from analytic.errors import InputError

if TYPE_CHECKING:
    from analytic.config import DecoderConfig
    from analytic.crops import Grid
    from analytic.workload import Workload
    from stage_runners.pages import Page

#: Grey around a page that is not square.
PAD_COLOUR = (127, 127, 127)
#: Without tiles, the published code stretches a page to a view of at most this side instead of padding it.
STRETCH_LIMIT = 640
#: The model skips a view whose values sum to zero; they are summed in the dtype of the run.
_SUM_DTYPES = (torch.float32, torch.bfloat16)


@attrs.frozen(eq=False)
class ModelInputs:
    """What one generation starts from.

    Attributes
    ----------
    input_ids
        (B, T) int64: begin of sequence, image placeholders, text.
    images
        B pairs of tiles (n, 3, image_size, image_size) and global view (1, 3, base_size, base_size). Without tiles
        the former is (1, 3, base_size, base_size) zeros, which the model takes as "none".
    images_seq_mask
        (B, T) bool: true where an image placeholder stands.
    images_spatial_crop
        (B, 2) int64, always on the CPU: columns and rows of the tile grid, 1 and 1 without tiles.
    workload
        The workload, with the page's size.
    """

    input_ids: torch.Tensor
    images: list[tuple[torch.Tensor, torch.Tensor]]
    images_seq_mask: torch.Tensor
    images_spatial_crop: torch.Tensor
    workload: Workload

    def to(self, device: torch.device | str, dtype: torch.dtype) -> ModelInputs:
        """Move to `device`, images as `dtype` too.

        `images_spatial_crop` stays where it is: the model reads its elements one by one on the host.
        """
        return attrs.evolve(
            self,
            input_ids=self.input_ids.to(device),
            images=[(tiles.to(device, dtype), view.to(device, dtype)) for tiles, view in self.images],
            images_seq_mask=self.images_seq_mask.to(device),
        )

    def forward_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the model's ``forward`` (and ``generate``)."""
        return {
            "input_ids": self.input_ids,
            "images": self.images,
            "images_seq_mask": self.images_seq_mask,
            "images_spatial_crop": self.images_spatial_crop,
        }


def workload_for_page(workload: Workload, page: Page) -> Workload:
    """Give the workload the page's real size, which decides the tile grid and with it the prompt's length."""
    return attrs.evolve(workload, page_width=page.image.width, page_height=page.image.height)


def build_inputs(page: Page, workload: Workload, decoder: DecoderConfig, *, seed: int) -> ModelInputs:
    """Cut a page into views and write the prompt around it; every row of a batch has the page, and a text of its own.

    Parameters
    ----------
    page
        The page; its own size replaces the workload's.
    workload
        View sizes, crop mode, number of text tokens, and batch size.
    decoder
        Vocabulary, special ids and longest sequence.
    seed
        Of the text ids: cost does not depend on what they say.

    Returns
    -------
    ModelInputs
        On the CPU, images in float32.

    Raises
    ------
    InputError
        If the sequence is longer than the model's, or the published model would skip one of the views.
    """
    workload = workload_for_page(workload, page)
    _check_fits(workload, decoder)
    grid = workload.grid
    view = _normalised([_global_view(page.image, workload)])
    _check_seen(page, "the global view", view)
    if grid is None:
        tiles = torch.zeros_like(view)
    else:
        tiles = _normalised(_cut(page.image, grid, workload.image_size))
        _check_seen(page, "the tiles", tiles)
    mask = torch.zeros((workload.batch_size, workload.seq_len), dtype=torch.bool)
    mask[:, 1 : 1 + workload.image_tokens] = True
    return ModelInputs(
        input_ids=_prompt(workload, decoder, seed),
        images=[(tiles, view)] * workload.batch_size,
        images_seq_mask=mask,
        images_spatial_crop=torch.tensor([grid or (1, 1)] * workload.batch_size, dtype=torch.int64),
        workload=workload,
    )


def _check_fits(workload: Workload, decoder: DecoderConfig) -> None:
    if workload.positions > decoder.max_position_embeddings:
        raise InputError(
            f"workload {workload.id} needs {workload.positions} positions ({workload.seq_len} of the prompt and "
            f"{workload.max_new_tokens} new tokens less one), the model has {decoder.max_position_embeddings}; "
            "lower it with --max-new-tokens"
        )


def _global_view(image: Image.Image, workload: Workload) -> Image.Image:
    size = (workload.base_size, workload.base_size)
    if not workload.crop_mode and workload.base_size <= STRETCH_LIMIT:
        return image.resize(size)
    return ImageOps.pad(image, size, color=PAD_COLOUR)


def _cut(image: Image.Image, grid: Grid, size: int) -> list[Image.Image]:
    """Tiles in row-major order; the page is stretched to the grid's shape."""
    columns, rows = grid
    sheet = image.resize((columns * size, rows * size))
    corners = [(column * size, row * size) for row in range(rows) for column in range(columns)]
    return [sheet.crop((left, top, left + size, top + size)) for left, top in corners]


def _normalised(images: list[Image.Image]) -> torch.Tensor:
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return (pixels.permute(0, 3, 1, 2).contiguous().float() / 255 - 0.5) / 0.5


def _check_seen(page: Page, what: str, values: torch.Tensor) -> None:
    if any(not values.to(dtype).sum().item() for dtype in _SUM_DTYPES):
        raise InputError(
            f"{page.name}: the normalised values of {what} sum to zero, which the model takes for no image; "
            "give another page with --image"
        )


def _prompt(workload: Workload, decoder: DecoderConfig, seed: int) -> torch.Tensor:
    special = [decoder.bos_token_id, decoder.eos_token_id, decoder.image_token_id]
    words = np.setdiff1d(np.arange(decoder.vocab_size), special)
    texts = np.random.default_rng(seed).choice(words, size=(workload.batch_size, workload.text_tokens - 1))
    head = [decoder.bos_token_id, *[decoder.image_token_id] * workload.image_tokens]
    return torch.tensor([[*head, *text] for text in texts.tolist()], dtype=torch.int64)
