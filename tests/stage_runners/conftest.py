from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import torch
from safetensors.torch import load_file

from analytic.config import variant_config
from analytic.workload import Workload
from hooks.tracer import INSTALLED
from stage_runners.inputs import build_inputs
from stage_runners.loading import load_model
from stage_runners.pages import synthetic_page

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stage_runners.inputs import ModelInputs

SHARED = Path(__file__).parents[2].parent / "shared"
TINY = "deepseek-ocr-v1-tiny"

#: Two tiles of 128 px and a global view of 256 px: 33 image positions, and all branches of the vision encoders.
SMALL = Workload("small", 640, 1280, text_tokens=7, max_new_tokens=8, base_size=256, image_size=128, variant=TINY)


@attrs.frozen
class Parity:
    """A tiny checkpoint, and what the published code answered to its inputs."""

    directory: Path
    inputs: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]

    def forward_kwargs(self) -> dict[str, Any]:
        return {
            "input_ids": self.inputs["input_ids"],
            "images": [(self.inputs["images_crop"], self.inputs["image_global"])],
            "images_seq_mask": self.inputs["images_seq_mask"],
            "images_spatial_crop": self.inputs["images_spatial_crop"],
        }


@pytest.fixture(autouse=True)
def no_wrapper_left() -> Iterator[None]:
    INSTALLED.clear()
    yield
    assert not INSTALLED, "a tracer was not removed"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The tiny model gains nothing from more, and waits for them where cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Path of something in the shared folder; skips where it is absent."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"{path} is not on this machine")
        return path

    return find


@pytest.fixture(scope="session")
def parity(shared: Callable[[str], Path]) -> Parity:
    directory = shared("data/parity_dev")
    return Parity(directory, load_file(directory / "inputs.safetensors"), load_file(directory / "expected.safetensors"))


@pytest.fixture(scope="session")
def small() -> Workload:
    return SMALL


@pytest.fixture
def tiny_model() -> Callable[..., torch.nn.Module]:
    """A tiny built-in model in fp32."""

    def build(**options: Any) -> torch.nn.Module:
        return load_model("builtin", **{"variant": TINY, "dtype": torch.float32} | options)

    return build


@pytest.fixture(scope="session")
def inputs_of() -> Callable[..., ModelInputs]:
    """Inputs in fp32 for a drawn page."""

    def build(workload: Workload = SMALL, seed: int = 0, **changes: Any) -> ModelInputs:
        workload = attrs.evolve(workload, **changes)
        return build_inputs(synthetic_page(workload, seed=seed), workload, variant_config(TINY).decoder, seed=seed)

    return build
