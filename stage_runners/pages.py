"""Where the pages of a run come from: drawn from a seed, or read from PNG, JPEG and PDF files."""

from __future__ import annotations

import contextlib
import itertools
import math
import struct
import warnings
import zlib
from typing import TYPE_CHECKING

import attrs
import numpy as np
import pypdfium2
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from analytic.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from analytic.workload import Workload

#: An A4 page becomes 1191 x 1684 px: body text stays legible, and each pixel of a PDF point is a whole one (scale 2).
PDF_DPI = 144
#: Pillow's own limit against decompression bombs, applied to PDF and synthetic pages too.
MAX_PIXELS = 89_478_485

_POINTS_PER_INCH = 72
_PDF_MAGIC = b"%PDF-"
#: The PDF header may stand anywhere in the first kilobyte.
_PDF_MAGIC_WINDOW = 1024
#: What Pillow raises on damaged files, beside its own UnidentifiedImageError (an OSError).
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


@attrs.frozen
class Page:
    """One page to read.

    Attributes
    ----------
    name
        File name (``file.pdf#1`` for the first page of a PDF), or the id of the workload that it was drawn for.
    image
        Pixels, mode RGB.
    source
        Path of the file, or the seed of the drawing.
    """

    name: str
    image: Image.Image
    source: str


def load_pages(paths: Sequence[Path]) -> list[Page]:
    """Read PNG and JPEG images, and every page of PDF files.

    The content decides what a file is, not its name. As in the published inference code, EXIF orientation is
    applied and an alpha channel is dropped. PDF pages are rendered at `PDF_DPI`.

    Parameters
    ----------
    paths
        Files, in the order of the pages.

    Raises
    ------
    InputError
        If a file is missing, unreadable, damaged, encrypted, too large, or a page is entirely black.
    """
    return [_checked(page) for path in paths for page in _pages_of(path)]


def _pages_of(path: Path) -> Iterator[Page]:
    try:
        if not path.is_file():
            raise InputError(_advice(path, "is a directory" if path.is_dir() else "does not exist"))
        with path.open("rb") as file:
            head = file.read(_PDF_MAGIC_WINDOW)
    except OSError as error:
        raise InputError(_advice(path, f"cannot be read ({error.strerror})")) from error
    if not head:
        raise InputError(_advice(path, "is empty (0 bytes)"))
    if _PDF_MAGIC in head:
        yield from _pdf_pages(path)
    else:
        yield Page(path.name, _read_image(path), str(path))


def _read_image(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow only warns from its limit up to twice that.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=("PNG", "JPEG")) as image:
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise InputError(_advice(path, f"has more than {MAX_PIXELS:,} pixels")) from error
        except UnidentifiedImageError as error:
            raise InputError(_advice(path, "is not an image")) from error
        except _DAMAGED as error:
            raise InputError(_advice(path, f"is damaged ({error})")) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's conversion of 16-bit grey saturates: the upper byte keeps the picture.
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        # Otherwise Pillow warns that transparency is lost, and losing it is meant.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _pdf_pages(path: Path) -> Iterator[Page]:
    try:
        with contextlib.closing(pypdfium2.PdfDocument(path)) as document:
            for index in range(len(document)):
                yield Page(f"{path.name}#{index + 1}", _render(document[index], path), str(path))
    except pypdfium2.PdfiumError as error:
        # A document without pages is reported with the code of whatever failed before it, so the code is not enough.
        encrypted = "password" in str(error).lower() and b"/Encrypt" in path.read_bytes()
        fact = "is an encrypted PDF" if encrypted else "is a broken PDF, or one with no pages"
        raise InputError(_advice(path, fact)) from error


def _render(page: pypdfium2.PdfPage, path: Path) -> Image.Image:
    scale = PDF_DPI / _POINTS_PER_INCH
    width, height = page.get_size()
    if math.ceil(width * scale) * math.ceil(height * scale) > MAX_PIXELS:
        raise InputError(_advice(path, f"has a page of more than {MAX_PIXELS:,} pixels at {PDF_DPI} dpi"))
    image: Image.Image = page.render(scale=scale).to_pil()
    return image.convert("RGB")


def _checked(page: Page) -> Page:
    if page.image.getbbox() is None:
        raise InputError(f"{page.source}: all pixels of {page.name} are zero (black); give another page with --image")
    return page


def _advice(path: Path, fact: str) -> str:
    return f"{path} {fact}; give a readable PNG, JPEG or PDF file with --image"


def synthetic_page(workload: Workload, *, seed: int) -> Page:
    """Draw a page of text, tables and simple graphics at the workload's page size.

    Parameters
    ----------
    workload
        Gives the page size, and the page its name.
    seed
        Same seed, same pixels (given the same Pillow).

    Raises
    ------
    InputError
        If the page has more than `MAX_PIXELS` pixels.
    """
    width, height = workload.page_width, workload.page_height
    if width * height > MAX_PIXELS:
        raise InputError(
            f"workload {workload.id}: a page of {width} x {height} px has more than {MAX_PIXELS:,} pixels; "
            "choose a smaller page_width or page_height with --workload"
        )
    image = Image.new("RGB", (width, height), "white")
    line = max(_MIN_LINE, min(width, height) // _LINES_PER_SIDE)
    sheet = _Sheet(ImageDraw.Draw(image), np.random.default_rng(seed), line)
    margin = min(width, height) // 16
    top = margin
    for block, lines in itertools.chain([(_draw_title, 3)], itertools.cycle(_BLOCKS)):
        bottom = min(top + lines * line, height - margin)
        if bottom - top < line:
            break
        block(sheet, (margin, top, width - margin, bottom))
        top = bottom + line
    return Page(workload.id, image, f"synthetic, seed {seed}")


_Box = tuple[int, int, int, int]
_INK = (32, 32, 36)
_PALE = (222, 228, 236)
_COLOURS = ((52, 101, 164), (204, 92, 44), (78, 141, 62), (150, 82, 146))
_MIN_LINE = 8
_LINES_PER_SIDE = 45
_TABLE_COLUMNS = 4


@attrs.frozen
class _Sheet:
    """What the drawing functions share: the canvas, the generator, and the height of a text line in pixels."""

    draw: ImageDraw.ImageDraw
    rng: np.random.Generator
    line: int

    def word(self) -> str:
        letters = self.rng.integers(ord("a"), ord("z") + 1, size=self.rng.integers(2, 10))
        return "".join(map(chr, letters))

    def text(self, left: int, top: int, width: int, *, size: float) -> None:
        """One line of random words that fills `width`."""
        font = ImageFont.load_default(size=size)
        words = ""
        while font.getlength(longer := f"{words} {self.word()}".strip()) <= width:
            words = longer
        self.draw.text((left, top), words, fill=_INK, font=font)


def _draw_title(sheet: _Sheet, box: _Box) -> None:
    left, top, right, _ = box
    sheet.text(left, top, (right - left) * 3 // 4, size=1.6 * sheet.line)


def _draw_paragraph(sheet: _Sheet, box: _Box) -> None:
    left, top, right, bottom = box
    tops = range(top, bottom - sheet.line + 1, sheet.line)
    for line_top in tops:
        width = right - left if line_top != tops[-1] else (right - left) // 2
        sheet.text(left, line_top, width, size=0.75 * sheet.line)


def _draw_table(sheet: _Sheet, box: _Box) -> None:
    left, top, right, bottom = box
    columns = [left + (right - left) * column // _TABLE_COLUMNS for column in range(_TABLE_COLUMNS + 1)]
    sheet.draw.rectangle((left, top, right, min(top + sheet.line, bottom)), fill=_PALE)
    for row_top in range(top, bottom - sheet.line + 1, sheet.line):
        for cell_left, cell_right in itertools.pairwise(columns):
            sheet.text(cell_left + sheet.line // 4, row_top, cell_right - cell_left - sheet.line, size=0.7 * sheet.line)
        sheet.draw.line((left, row_top, right, row_top), fill=_INK)
    for column in columns:
        sheet.draw.line((column, top, column, bottom), fill=_INK)
    sheet.draw.line((left, bottom, right, bottom), fill=_INK)


def _draw_chart(sheet: _Sheet, box: _Box) -> None:
    left, top, right, bottom = box
    bars = 8
    for bar, share in enumerate(sheet.rng.uniform(0.2, 1.0, size=bars)):
        bar_left = left + (right - left) * (2 * bar + 1) // (2 * bars + 1)
        bar_right = left + (right - left) * (2 * bar + 2) // (2 * bars + 1)
        bar_top = bottom - int((bottom - top) * share)
        sheet.draw.rectangle((bar_left, bar_top, bar_right, bottom), fill=_COLOURS[bar % len(_COLOURS)])
    sheet.draw.line((left, top, left, bottom, right, bottom), fill=_INK, width=max(1, sheet.line // 10))


def _draw_figure(sheet: _Sheet, box: _Box) -> None:
    left, top, right, bottom = box
    frame_bottom = max(top, bottom - sheet.line)
    sheet.draw.rectangle((left, top, right, frame_bottom), fill=_PALE, outline=_INK)
    curve = sheet.rng.uniform(0.1, 0.9, size=24)
    points = [
        (left + (right - left) * step / (len(curve) - 1), top + (frame_bottom - top) * level)
        for step, level in enumerate(curve)
    ]
    sheet.draw.line(points, fill=_COLOURS[0], width=max(1, sheet.line // 8))
    for (x, y), colour in zip(points[::4], itertools.cycle(_COLOURS), strict=False):
        sheet.draw.ellipse(
            (x - sheet.line / 3, y - sheet.line / 3, x + sheet.line / 3, y + sheet.line / 3), fill=colour
        )
    sheet.text(left, frame_bottom, right - left, size=0.7 * sheet.line)


#: What a page repeats below its title until it is full, with the height of each in lines.
_BLOCKS = (
    (_draw_paragraph, 7),
    (_draw_table, 6),
    (_draw_paragraph, 6),
    (_draw_chart, 10),
    (_draw_paragraph, 5),
    (_draw_figure, 10),
)
