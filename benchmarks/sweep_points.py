"""What a million predictions cost: time and peak memory, beside predicting them one by one.

Once as 83,334 workloads on 12 GPUs, once as a million workloads on one. Each is evaluated in a process of its own, so
that its peak memory is its own. The alternative, one prediction per workload and device, is sampled between the rounds
and extrapolated. Run it as ``python benchmarks/sweep_points.py``.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import attrs
import numpy as np

from analytic.config import variant_config
from analytic.crops import PageLayout, candidate_grids
from analytic.hardware import Hardware, hardware_names, load_hardware
from analytic.layers.base import Policy
from analytic.model import Model, deepseek_ocr
from analytic.predict import predict
from analytic.sweep import Points, evaluate
from analytic.timing.datasheet import from_datasheet
from analytic.workload import Workload

SHAPES = {"83,334 x 12": (83_334, 12), "1,000,000 x 1": (1_000_000, 1)}
ROUNDS = 3
#: Predictions between two rounds.
SAMPLES = 5
MEGABYTE = 1_000_000


def model() -> Model:
    """The model of full size."""
    return deepseek_ocr(variant_config("deepseek-ocr-v1-base"))


def gpus(count: int) -> list[Hardware]:
    """Built-in GPUs."""
    devices = [load_hardware(name) for name in hardware_names()]
    return [device for device in devices if device.kind == "cuda"][:count]


def random_points(count: int, seed: int = 0) -> Points:
    """Workloads drawn at random: 92 pages, prompts to 3,000 text tokens, generations to 2,000, batches to 64."""
    random = np.random.default_rng(seed)
    pages = [
        PageLayout(grid, base_size, image_size)
        for grid in (None, *candidate_grids())
        for base_size in (1024, 1280)
        for image_size in (512, 640)
    ]
    page = random.integers(len(pages), size=count)
    image_tokens = np.array([each.image_tokens for each in pages])[page]
    return Points(
        pages=pages,
        page=page,
        seq_len=image_tokens + random.integers(1, 3000, size=count),
        new_tokens=random.integers(1, 2000, size=count),
        batch=random.integers(1, 65, size=count),
    )


def measure(shape: str) -> tuple[float, float, float]:
    """Evaluate in a process of its own.

    Returns
    -------
    tuple of float
        Seconds, of them seconds of the processor, and peak memory in MB.
    """
    command = [sys.executable, __file__, "--evaluate", shape]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - this very file
    seconds, processor, peak = json.loads(done.stdout)
    return seconds, processor, peak


def report_evaluation(shape: str) -> None:
    """Evaluate in this process and print seconds, processor seconds and peak memory in MB."""
    count, devices = SHAPES[shape]
    points = random_points(count)
    start, processor = time.perf_counter(), time.process_time()
    found = evaluate(model(), points, hardware=gpus(devices), policy=Policy())
    seconds = time.perf_counter() - start, time.process_time() - processor
    if not all(np.isfinite(found.time(device.name, "decode")).all() for device in gpus(devices)):
        raise SystemExit("some times are not finite")
    print(json.dumps([*seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGABYTE]))


def predict_some(seed: int) -> list[float]:
    """Seconds of single predictions of random workloads."""
    points, device, whole = random_points(SAMPLES, seed), gpus(1)[0], model()
    seconds = []
    for index in range(SAMPLES):
        page = points.pages[points.page[index]]
        workload = Workload(
            "point",
            page_width=640,
            page_height=640,
            text_tokens=int(points.seq_len[index]) - page.image_tokens,
            max_new_tokens=int(points.new_tokens[index]),
            batch_size=int(points.batch[index]),
        )
        workload = attrs.evolve(
            workload,
            crop_mode=page.grid is not None,
            tile_grid=page.grid,
            base_size=page.base_size,
            image_size=page.image_size,
        )
        start = time.perf_counter()
        predict(whole, workload, device=from_datasheet(device), policy=Policy())
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evaluate", metavar="SHAPE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.evaluate:
        report_evaluation(options.evaluate)
        return
    found: dict[str, list[tuple[float, float, float]]] = {shape: [] for shape in SHAPES}
    single: list[float] = []
    for number in range(ROUNDS):
        for shape, measured in found.items():
            measured.append(measure(shape))
            single += predict_some(number)
    print(f"{'points':<16}{'time':>9}{'processor':>12}{'peak memory':>14}{'one by one':>14}{'faster':>10}")
    one_by_one = statistics.median(single)
    for shape, measured in found.items():
        count = SHAPES[shape][0] * SHAPES[shape][1]
        seconds, processor, peak = (statistics.median(column) for column in zip(*measured, strict=True))
        alone = one_by_one * count
        print(
            f"{shape:<16}{seconds:>7.1f} s{processor:>10.1f} s{peak:>11.0f} MB{alone / 3600:>12.0f} h"
            f"{alone / seconds:>9,.0f}x"
        )


if __name__ == "__main__":
    main()
