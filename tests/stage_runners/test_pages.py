from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from analytic.errors import InputError
from analytic.workload import Workload, load_workload
from stage_runners.pages import Page, load_pages, synthetic_page

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

RED, BLUE = (200, 30, 40), (20, 60, 210)


def pdf_bytes(*objects: str, trailer: str = "") -> bytes:
    """A PDF of these objects, numbered from 1; the first is the catalog."""
    body, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        offsets.append(len(body))
        body += f"{number} 0 obj\n{content}\nendobj\n".encode()
    entries = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    table = f"xref\n0 {size}\n0000000000 65535 f \n{entries}trailer\n<< /Size {size} /Root 1 0 R {trailer} >>\n"
    return body + f"{table}startxref\n{len(body)}\n%%EOF\n".encode()


CATALOG = "<< /Type /Catalog /Pages 2 0 R >>"
ONE_PAGE = "<< /Type /Pages /Kids [3 0 R] /Count 1 >>"


def pdf_page(width: int, height: int) -> str:
    return f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {width} {height}] >>"


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def saved(folder: Path, name: str, image: Image.Image, **options: Any) -> Path:
    path = folder / name
    image.save(path, **options)
    return path


# --- drawn pages ---


@pytest.mark.parametrize("name", ["dsocr-standard-v1", "dsocr-a4-v1"])
def test_synthetic_page_has_the_size_of_the_workload(name: str) -> None:
    workload = load_workload(name)
    page = synthetic_page(workload, seed=3)
    assert page.image.size == (workload.page_width, workload.page_height)
    assert page.image.mode == "RGB"
    assert (page.name, page.source) == (name, "synthetic, seed 3")


def test_synthetic_page_follows_its_seed() -> None:
    workload = load_workload("dsocr-standard-v1")
    first, again, other = (synthetic_page(workload, seed=seed).image.tobytes() for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_synthetic_page_mixes_text_and_graphics_from_top_to_bottom() -> None:
    pixels = np.asarray(synthetic_page(load_workload("dsocr-standard-v1"), seed=0).image)
    inked_rows = (pixels < 128).any(axis=(1, 2))
    assert all(band.any() for band in np.array_split(inked_rows, 12))
    grey = pixels.max(axis=2) == pixels.min(axis=2)
    assert 0.02 < (~grey).mean() < 0.5
    assert 0.5 < (pixels == 255).mean() < 0.95


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (7, 2000), (2000, 7), (40, 900), (900, 40)])
def test_synthetic_page_of_any_shape(size: tuple[int, int]) -> None:
    assert synthetic_page(Workload("odd", *size, 1, 1), seed=0).image.size == size


def test_synthetic_page_too_large() -> None:
    with pytest.raises(InputError, match=r"100000 x 100000 px has more than .*--workload"):
        synthetic_page(Workload("vast", 100_000, 100_000, 1, 1), seed=0)


# --- images ---


@pytest.mark.parametrize("name", ["page.png", "page.jpg"])
def test_image_file(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, name, Image.new("RGB", (30, 20), RED))
    (page,) = load_pages([path])
    assert (page.name, page.source, page.image.mode, page.image.size) == (name, str(path), "RGB", (30, 20))
    assert np.abs(np.asarray(page.image).astype(int) - RED).max() <= 2


def test_order_of_the_files_is_kept(tmp_path: Path) -> None:
    paths = [saved(tmp_path, f"{name}.png", Image.new("RGB", (4, 4), RED)) for name in "cab"]
    assert [page.name for page in load_pages(paths)] == ["c.png", "a.png", "b.png"]
    assert load_pages([]) == []


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    image = Image.new("RGB", (72, 72), RED)
    image.save(tmp_path / "scan.pdf", format="PNG")
    image.save(tmp_path / "scan.png", format="PDF")
    assert [page.name for page in load_pages([tmp_path / "scan.pdf", tmp_path / "scan.png"])] == [
        "scan.pdf",
        "scan.png#1",
    ]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.new("RGB", (64, 32), RED)
    stored.paste(BLUE, (0, 0, 32, 32))
    path = saved(tmp_path, "photo.jpg", stored, exif=exif, quality=95)
    (page,) = load_pages([path])
    assert page.image.size == ((64, 32) if orientation <= 4 else (32, 64))
    # Where the blue half of the stored picture is seen: left, right, top or bottom.
    x, y = {1: (8, 16), 2: (56, 16), 3: (56, 16), 4: (8, 16), 5: (16, 8), 6: (16, 8), 7: (16, 56), 8: (16, 56)}[
        orientation
    ]
    assert np.abs(np.array(page.image.getpixel((x, y))) - BLUE).max() <= 8


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    colour = Image.new("RGB", (8, 8), RED)
    palette = colour.quantize(4)
    transparent = palette.copy()
    transparent.info["transparency"] = bytes([0, 128, 255, 255])
    images = {
        "1.png": (Image.new("1", (8, 8), 1), (255, 255, 255)),
        "l.png": (Image.new("L", (8, 8), 77), (77, 77, 77)),
        "la.png": (Image.new("LA", (8, 8), (77, 10)), (77, 77, 77)),
        "p.png": (palette, RED),
        "p-transparent.png": (transparent, RED),
        "rgba.png": (Image.new("RGBA", (8, 8), (*RED, 0)), RED),
        "i16.png": (Image.fromarray(np.full((8, 8), 0x4D12, np.uint16)), (77, 77, 77)),
        "cmyk.jpg": (Image.new("CMYK", (8, 8), (0, 0, 0, 178)), (77, 77, 77)),
    }
    paths = [saved(tmp_path, name, image) for name, (image, _) in images.items()]
    for page in load_pages(paths):
        assert page.image.mode == "RGB"
        assert np.abs(np.array(page.image.getpixel((4, 4))) - images[page.name][1]).max() <= 2, page.name


# --- PDF ---


def test_every_page_of_a_pdf(tmp_path: Path) -> None:
    # 72 points per inch: one pixel is one point, so 144 dpi doubles it.
    pages = [Image.new("RGB", (100, 60), RED), Image.new("RGB", (50, 80), BLUE)]
    path = saved(tmp_path, "two.pdf", pages[0], save_all=True, append_images=pages[1:], resolution=72)
    first, second = load_pages([path])
    assert (first.name, second.name) == ("two.pdf#1", "two.pdf#2")
    assert (first.image.size, second.image.size) == ((200, 120), (100, 160))
    assert (first.image.mode, first.source) == ("RGB", str(path))
    for page, colour in ((first, RED), (second, BLUE)):
        assert np.abs(np.array(page.image.getpixel((50, 50))) - colour).max() <= 3


def test_hand_written_pdf_is_read(tmp_path: Path) -> None:
    # The fixture that the bad PDFs below are variations of.
    path = tmp_path / "blank.pdf"
    path.write_bytes(pdf_bytes(CATALOG, ONE_PAGE, pdf_page(100, 50)))
    (page,) = load_pages([path])
    assert page == Page("blank.pdf#1", Image.new("RGB", (200, 100), "white"), str(path))


ENCRYPTION = f"<< /Filter /Standard /V 1 /R 2 /P -4 /O <{'5a' * 32}> /U <{'a5' * 32}> >>"
BAD_PDFS = {
    "encrypted": (
        pdf_bytes(CATALOG, ONE_PAGE, pdf_page(9, 9), ENCRYPTION, trailer="/Encrypt 4 0 R /ID [<00> <00>]"),
        "is an encrypted PDF",
    ),
    "no pages": (pdf_bytes(CATALOG, "<< /Type /Pages /Kids [] /Count 0 >>"), "is a broken PDF, or one with no pages"),
    "only a header": (b"%PDF-1.4\n", "is a broken PDF"),
    "page is missing": (pdf_bytes(CATALOG, "<< /Type /Pages /Kids [9 0 R] /Count 1 >>"), "is a broken PDF"),
    "giant page": (pdf_bytes(CATALOG, ONE_PAGE, pdf_page(14_400, 14_400)), "has a page of more than 89,478,485 pixels"),
}


@pytest.mark.parametrize("case", BAD_PDFS)
def test_bad_pdf(tmp_path: Path, case: str) -> None:
    content, message = BAD_PDFS[case]
    path = tmp_path / "bad.pdf"
    path.write_bytes(content)
    refused(path, message)


def test_a_pdf_without_pages_is_not_taken_for_the_encrypted_one_before_it(tmp_path: Path) -> None:
    # PDFium keeps the error code of the last failure.
    for case in ("encrypted", "no pages"):
        content, message = BAD_PDFS[case]
        path = tmp_path / f"{case}.pdf"
        path.write_bytes(content)
        refused(path, message)


# --- bad files ---


def refused(path: Path, message: str) -> None:
    """One line: the file, the fact, and the flag that fixes it."""
    with pytest.raises(InputError, match=message) as caught:
        load_pages([path])
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    assert text.endswith("with --image")
    assert caught.value.exit_code == 2


def test_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.png", "does not exist; give a readable PNG, JPEG or PDF file")


def test_directory(tmp_path: Path) -> None:
    refused(tmp_path, "is a directory")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, "page.png", Image.new("RGB", (4, 4), RED))

    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", forbidden)
    refused(path, r"cannot be read \(Permission denied\)")


def corrupt_checksum(png: bytes) -> bytes:
    return png[:29] + bytes([png[29] ^ 0xFF]) + png[30:]


BAD_FILES: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "empty": ("PNG", lambda _: b"", "is empty"),
    "text": ("PNG", lambda _: b"a page of text\n", "is not an image"),
    "half of a PNG": ("PNG", lambda data: data[: len(data) // 2], "is damaged"),
    "half of a JPEG": ("JPEG", lambda data: data[: len(data) // 2], "is damaged"),
    "signature of a PNG": ("PNG", lambda data: data[:8], "is (damaged|not an image)"),
    "checksum of a PNG": ("PNG", corrupt_checksum, "is (damaged|not an image)"),
    "another format": ("BMP", lambda data: data, "is not an image"),
    "bomb": ("PNG", lambda _: png_of_size(30_000, 30_000), "has more than 89,478,485 pixels"),
    "half a bomb": ("PNG", lambda _: png_of_size(10_000, 10_000), "has more than 89,478,485 pixels"),
    "claims more than it holds": ("PNG", lambda _: png_of_size(100, 100), "is damaged"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_image(tmp_path: Path, case: str) -> None:
    image_format, spoil, message = BAD_FILES[case]
    path = tmp_path / "page.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, format=image_format)
    path.write_bytes(spoil(path.read_bytes()))
    refused(path, message)


def test_black_page(tmp_path: Path) -> None:
    black = Image.new("RGB", (20, 20))
    refused(saved(tmp_path, "black.png", black), r"all pixels of black\.png are zero")
    refused(saved(tmp_path, "clear.png", Image.new("RGBA", (20, 20))), r"all pixels of clear\.png are zero")
    pages = saved(tmp_path, "last.pdf", Image.new("RGB", (20, 20), RED), save_all=True, append_images=[black])
    refused(pages, r"all pixels of last\.pdf#2 are zero")
    black.putpixel((3, 3), (0, 0, 1))
    assert len(load_pages([saved(tmp_path, "nearly.png", black)])) == 1
