from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from analytic.config import variant_config
from analytic.errors import InputError
from analytic.workload import Workload, load_workload
from stage_runners.inputs import ModelInputs, build_inputs, workload_for_page
from stage_runners.pages import Page, synthetic_page

if TYPE_CHECKING:
    from analytic.config import DecoderConfig
    from analytic.crops import Grid

BASE = variant_config("deepseek-ocr-v1-base").decoder
TINY = variant_config("deepseek-ocr-v1-tiny").decoder


def page_of(image: Image.Image) -> Page:
    return Page("page.png", image, "page.png")


def plain(width: int, height: int, colour: tuple[int, int, int] = (250, 240, 230)) -> Page:
    return page_of(Image.new("RGB", (width, height), colour))


def workload_of(page: Page, **changes: Any) -> Workload:
    return attrs.evolve(Workload("w", *page.image.size, text_tokens=5, max_new_tokens=4), **changes)


def normalised(image: Image.Image) -> torch.Tensor:
    return torch.tensor(np.asarray(image).transpose(2, 0, 1) / 127.5 - 1, dtype=torch.float32)


def to_bytes(inputs: ModelInputs) -> list[bytes]:
    tiles, view = inputs.images[0]
    tensors = (inputs.input_ids, tiles, view, inputs.images_seq_mask, inputs.images_spatial_crop)
    return [tensor.numpy().tobytes() for tensor in tensors]


@pytest.mark.parametrize(
    ("name", "grid", "tiles", "tokens"),
    [
        ("dsocr-standard-v1", (1, 2), (2, 3, 640, 640), 493),
        ("dsocr-a4-v1", (2, 3), (6, 3, 640, 640), 903),
        ("dsocr-nocrop-v1", (1, 1), (1, 3, 1024, 1024), 273),
        ("dsocr-dense-v1", (3, 3), (9, 3, 640, 640), 1203),
    ],
)
def test_profile_shapes(name: str, grid: Grid, tiles: tuple[int, ...], tokens: int) -> None:
    workload = load_workload(name)
    inputs = build_inputs(synthetic_page(workload, seed=0), workload, BASE, seed=0)
    assert inputs.workload == workload
    assert inputs.input_ids.shape == inputs.images_seq_mask.shape == (1, workload.seq_len)
    assert (inputs.input_ids.dtype, inputs.images_seq_mask.dtype) == (torch.int64, torch.bool)
    ((crops, view),) = inputs.images
    assert (tuple(crops.shape), tuple(view.shape)) == (tiles, (1, 3, 1024, 1024))
    assert crops.dtype == view.dtype == torch.float32
    assert inputs.images_spatial_crop.tolist() == [list(grid)]
    assert inputs.images_spatial_crop.dtype == torch.int64
    assert int(inputs.images_seq_mask.sum()) == tokens


@pytest.mark.parametrize("decoder", [BASE, TINY])
def test_prompt_is_begin_image_text(decoder: DecoderConfig) -> None:
    workload = load_workload("dsocr-standard-v1")
    inputs = build_inputs(plain(640, 1280), workload, decoder, seed=0)
    mask, ids = inputs.images_seq_mask[0].tolist(), inputs.input_ids[0].tolist()
    assert mask == [False] + [True] * 493 + [False] * 18
    assert ids[0] == decoder.bos_token_id
    assert set(ids[1:494]) == {decoder.image_token_id}
    assert not {decoder.bos_token_id, decoder.eos_token_id, decoder.image_token_id} & set(ids[494:])
    assert all(0 <= token < decoder.vocab_size for token in ids)


def test_text_ids_cover_the_vocabulary_but_the_special_ids() -> None:
    decoder = attrs.evolve(TINY, vocab_size=8)
    inputs = build_inputs(plain(64, 64), workload_of(plain(64, 64), text_tokens=500), decoder, seed=0)
    assert set(inputs.input_ids[0, 274:].tolist()) == {2, 3, 4, 5, 6}


def test_a_prompt_of_the_begin_token_only() -> None:
    page = plain(64, 64)
    inputs = build_inputs(page, workload_of(page, text_tokens=1), BASE, seed=0)
    assert inputs.input_ids.shape == (1, 274)
    assert inputs.images_seq_mask[0].tolist() == [False] + [True] * 273


def test_same_seed_same_inputs() -> None:
    workload = load_workload("dsocr-standard-v1")
    first, again = (
        build_inputs(synthetic_page(workload, seed=4), workload, BASE, seed=4),
        build_inputs(synthetic_page(workload, seed=4), workload, BASE, seed=4),
    )
    assert to_bytes(first) == to_bytes(again)
    other = build_inputs(synthetic_page(workload, seed=4), workload, BASE, seed=5)
    assert not torch.equal(first.input_ids, other.input_ids)
    assert torch.equal(first.images[0][0], other.images[0][0])


@pytest.mark.parametrize("size", [640, 320])
def test_tiles_run_row_by_row(size: int) -> None:
    colours = [(40 * index, 255 - 40 * index, 90 + 20 * index) for index in range(6)]
    page = Image.new("RGB", (1400, 2100))
    for index, colour in enumerate(colours):
        left, top = index % 2 * 700, index // 2 * 700
        page.paste(colour, (left, top, left + 700, top + 700))
    inputs = build_inputs(page_of(page), workload_of(page_of(page), image_size=size), BASE, seed=0)
    assert inputs.images_spatial_crop.tolist() == [[2, 3]]
    tiles = inputs.images[0][0]
    assert tuple(tiles.shape) == (6, 3, size, size)
    for tile, colour in zip(tiles, colours, strict=True):
        # Away from the seams, where resizing mixes neighbours.
        inner = (tile[:, 8:-8, 8:-8] + 1) * 127.5
        assert torch.allclose(inner, torch.tensor(colour).float()[:, None, None].expand_as(inner), atol=1e-3)


def test_tiles_are_the_stretched_page() -> None:
    workload = load_workload("dsocr-a4-v1")
    page = synthetic_page(workload, seed=1)
    tiles = build_inputs(page, workload, BASE, seed=0).images[0][0]
    sheet = normalised(page.image.resize((1280, 1920), Image.Resampling.BICUBIC))
    joined = torch.cat([torch.cat([tiles[2 * row], tiles[2 * row + 1]], dim=2) for row in range(3)], dim=1)
    assert torch.allclose(joined, sheet, atol=1e-6)


def test_global_view_is_padded_with_grey() -> None:
    page = synthetic_page(load_workload("dsocr-standard-v1"), seed=1)
    view = build_inputs(page, load_workload("dsocr-standard-v1"), BASE, seed=0).images[0][1][0]
    grey = 127 / 127.5 - 1
    assert torch.allclose(view[:, :, :256], torch.tensor(grey), atol=1e-6)
    assert torch.allclose(view[:, :, 768:], torch.tensor(grey), atol=1e-6)
    assert torch.allclose(view[:, :, 256:768], normalised(page.image.resize((512, 1024))), atol=1e-6)


def test_values_lie_between_minus_one_and_one() -> None:
    image = Image.new("RGB", (64, 64), "white")
    image.paste("black", (0, 0, 20, 64))
    view = build_inputs(page_of(image), workload_of(page_of(image)), BASE, seed=0).images[0][1]
    assert (view.min().item(), view.max().item()) == (-1.0, 1.0)


def test_small_page_has_no_tiles() -> None:
    page = plain(640, 640)
    inputs = build_inputs(page, workload_of(page), BASE, seed=0)
    tiles, view = inputs.images[0]
    assert tuple(tiles.shape) == (1, 3, 1024, 1024)
    assert not tiles.any()
    assert view.sum() != 0
    assert inputs.images_spatial_crop.tolist() == [[1, 1]]
    assert int(inputs.images_seq_mask.sum()) == 273


@pytest.mark.parametrize(("base_size", "tokens"), [(512, 73), (640, 111), (1024, 273), (1280, 421)])
def test_without_crops_there_is_one_view_of_the_base_size(base_size: int, tokens: int) -> None:
    page = synthetic_page(load_workload("dsocr-a4-v1"), seed=0)
    workload = workload_of(page, crop_mode=False, base_size=base_size)
    inputs = build_inputs(page, workload, BASE, seed=0)
    tiles, view = inputs.images[0]
    assert tuple(view.shape) == tuple(tiles.shape) == (1, 3, base_size, base_size)
    assert not tiles.any()
    assert int(inputs.images_seq_mask.sum()) == tokens
    stretched = base_size <= 640
    size = (base_size, base_size)
    image = page.image.resize(size) if stretched else ImageOps.pad(page.image, size, color=(127, 127, 127))
    assert torch.allclose(view[0], normalised(image), atol=1e-6)


def test_the_page_decides_the_geometry() -> None:
    workload = load_workload("dsocr-standard-v1")
    page = plain(1654, 2339)
    fitted = workload_for_page(workload, page)
    assert (fitted.id, fitted.grid, fitted.seq_len) == (workload.id, (2, 3), 922)
    inputs = build_inputs(page, workload, BASE, seed=0)
    assert inputs.workload == fitted
    assert inputs.input_ids.shape == (1, 922)


def test_images_move_in_the_dtype_of_the_model() -> None:
    page = plain(640, 1280)
    inputs = build_inputs(page, workload_of(page), BASE, seed=0)
    moved = inputs.to("meta", torch.bfloat16)
    for image in moved.images[0]:
        assert (image.device.type, image.dtype) == ("meta", torch.bfloat16)
    assert (moved.input_ids.device.type, moved.input_ids.dtype) == ("meta", torch.int64)
    assert (moved.images_seq_mask.device.type, moved.images_seq_mask.dtype) == ("meta", torch.bool)
    assert moved.images_spatial_crop.device.type == "cpu"
    assert inputs.images[0][0].dtype == torch.float32


def test_forward_kwargs_are_the_vendors() -> None:
    page = plain(64, 64)
    inputs = build_inputs(page, workload_of(page), BASE, seed=0)
    kwargs = inputs.forward_kwargs()
    assert list(kwargs) == ["input_ids", "images", "images_seq_mask", "images_spatial_crop"]
    assert all(kwargs[name] is getattr(inputs, name) for name in kwargs)


def test_longest_sequence() -> None:
    page = plain(64, 64)
    decoder = attrs.evolve(BASE, max_position_embeddings=300)
    # 273 image and 5 text tokens leave 22 positions; the last new token needs none.
    build_inputs(page, workload_of(page, max_new_tokens=23), decoder, seed=0)
    with pytest.raises(InputError, match=r"301 positions \(278 .* 24 .* has 300; .*--max-new-tokens"):
        build_inputs(page, workload_of(page, max_new_tokens=24), decoder, seed=0)


def test_every_row_of_a_batch_has_the_page_and_a_text_of_its_own() -> None:
    page = plain(64, 64)
    alone = build_inputs(page, workload_of(page), BASE, seed=0)
    inputs = build_inputs(page, workload_of(page, batch_size=3), BASE, seed=0)
    assert inputs.input_ids.shape == inputs.images_seq_mask.shape == (3, alone.workload.seq_len)
    assert torch.equal(inputs.images_seq_mask, alone.images_seq_mask.expand(3, -1))
    assert len(inputs.images) == 3
    assert all(torch.equal(view, alone.images[0][1]) for _, view in inputs.images)
    assert inputs.images_spatial_crop.tolist() == [[1, 1]] * 3
    placed = torch.where(inputs.images_seq_mask, inputs.input_ids, -1)
    assert torch.equal(placed[0], placed[1])
    assert len({tuple(row) for row in inputs.input_ids.tolist()}) == 3


def balanced(width: int, height: int) -> Image.Image:
    """Half black and half white: the normalised values cancel."""
    image = Image.new("RGB", (width, height), "white")
    image.paste("black", (0, 0, width // 2, height))
    return image


def test_a_view_that_the_model_would_skip_is_refused() -> None:
    page = page_of(balanced(512, 512))
    workload = workload_of(page, crop_mode=False, base_size=512)
    with pytest.raises(InputError, match=r"page\.png: .* the global view sum to zero.*--image"):
        build_inputs(page, workload, BASE, seed=0)


def test_tiles_that_the_model_would_skip_are_refused() -> None:
    # The grey beside the page keeps the sum of the global view from zero.
    page = page_of(balanced(640, 1280))
    with pytest.raises(InputError, match="the tiles sum to zero"):
        build_inputs(page, workload_of(page), BASE, seed=0)
