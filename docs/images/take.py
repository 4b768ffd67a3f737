"""Take the pictures of the documentation anew: ``python docs/images/take.py``. Needs playwright and chromium."""  # noqa: INP001

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).resolve().parent
RUN = HERE.parents[1] / "results" / "reference-standard-cpu"
#: Which part of the page each picture shows.
PARTS = {
    "report-top": "section.top",
    "report-stages": "section:has(#stages)",
    "report-tree": "section:has(#tree)",
    "report-first": "section:has(#first)",
    "report-memory": "section:has(#memory)",
}
#: Around each part, in CSS pixels.
MARGIN = 16
#: Lossy, but without a visible trace on text of this size.
QUALITY = 80


def main() -> None:
    """Write the pictures beside this script."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as started:
        _command("report", str(RUN), "--output", f"{folder}/report.html")
        _command("sweep", "vision", "--hardware", "h200", "--output", f"{folder}/sweep")
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1200}, device_scale_factor=1.25)
        page.goto(Path(folder, "report.html").as_uri())
        page.wait_for_function("document.documentElement.dataset.ready")
        # The bar that stays in sight would lie over the parts.
        page.add_style_tag(content="header.bar { position: static }")
        for name, selector in PARTS.items():
            _save(name, _shot(page, selector))
        _save("sweep-vision-ttft", Path(folder, "sweep", "vision-ttft.png").read_bytes())


def _command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dsocr_trace", *arguments], check=True, stdout=subprocess.DEVNULL)  # noqa: S603


def _shot(page: Page, selector: str) -> bytes:
    box = page.locator(selector).bounding_box()
    if box is None:
        raise SystemExit(f"the page has no {selector}")
    x, y, width, height = box["x"] - MARGIN, box["y"] - MARGIN, box["width"] + 2 * MARGIN, box["height"] + 2 * MARGIN
    return page.screenshot(full_page=True, clip={"x": x, "y": y, "width": width, "height": height})


def _save(name: str, picture: bytes) -> None:
    Image.open(io.BytesIO(picture)).convert("RGB").save(HERE / f"{name}.webp", quality=QUALITY, method=6)


if __name__ == "__main__":
    main()
