"""Bad input: one clear line, the right exit code, nothing half-written, nothing of the user's touched."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import resources

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dsocr_trace.interrupt import noticed
from dsocr_trace.report.terminal import ProgressDisplay
from stage_runners import devices
from stage_runners.loading import load_model

RUN = ("run", "--workload", "dsocr-smoke-v1", "--max-new-tokens", 2, "--device", "cpu", "--quiet")


@pytest.fixture
def refused(invoke, tmp_path):
    """Run with these extra arguments, expect a refusal, and give back its one line."""

    def run(*arguments: object, exit_code: int = 2, output: object = None) -> str:
        root = tmp_path / "results" if output is None else output
        before = sorted(tmp_path.rglob("*"))
        result = invoke(*RUN, "--output", root, *arguments)
        assert result.exit_code == exit_code, result.output
        assert result.stdout == ""
        line = result.stderr.strip().splitlines()[-1]
        after = [path for path in sorted(tmp_path.rglob("*")) if path not in before and path != root]
        assert after == []
        return line

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small checkpoint in the published layout, two shards and an index."""
    directory = tmp_path_factory.mktemp("checkpoint")
    raw = (resources.files("analytic") / "data" / "variants" / "deepseek-ocr-v1-tiny.json").read_text()
    (directory / "config.json").write_text(raw)
    state = dict(load_model("builtin", variant="deepseek-ocr-v1-tiny").named_parameters())
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: state[name].data for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.fixture
def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "checkpoint")


def test_a_sound_checkpoint_runs(invoke, checkpoint, tmp_path):
    result = invoke(*RUN, "--model", checkpoint, "--output", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["tokens"]) == 2


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--workload", "nope"), ["no workload 'nope'", "dsocr-standard-v1", "--workload"]),
        (("--variant", "nope"), ["no variant 'nope'", "deepseek-ocr-v1-base", "--variant"]),
        (("--hardware", "nope"), ["no hardware 'nope'", "rtx-5090", "--hardware"]),
        (("--device", "tpu"), ["no device 'tpu'", "auto, cpu or cuda:N", "--device"]),
        (("--attention", "magic"), ["no attention implementation 'magic'", "sdpa, eager", "--attention"]),
        (("--max-new-tokens", 0), ["--max-new-tokens", "0 is not in the range"]),
        (("--max-new-tokens", 9_000), ["9511 positions", "the model has 8192", "--max-new-tokens"]),
        (("--model", "no/such/dir"), ["no/such/dir is not a checkpoint directory", "--model"]),
        (("--model", ".", "--variant", "deepseek-ocr-v1-tiny"), ["--variant", "--model"]),
        (("--trust-remote-code",), ["--trust-remote-code", "--model DIR"]),
        (("--image", "missing.png"), ["missing.png", "--image"]),
        (("--run-id", "a/b"), ["run id 'a/b'", "--run-id"]),
        (("--profile-steps", "some"), ["--profile-steps"]),
    ],
)
def test_options_that_name_nothing(refused, arguments, parts):
    line = refused(*arguments)
    for part in parts:
        assert part in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_where_there_is_none(refused):
    line = refused("--device", "cuda:3")
    assert "device cuda:3 is not here" in line
    assert "--device cpu" in line


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("empty.png", b"", "empty.png"),
        ("truncated.png", None, "truncated.png"),
        ("text.png", b"not an image", "text.png"),
        ("empty.pdf", b"", "empty.pdf"),
        ("broken.pdf", b"%PDF-1.7\nnothing\n%%EOF\n", "broken.pdf"),
    ],
)
def test_files_that_are_no_pages(refused, tmp_path, name, content, part):
    path = tmp_path / name
    if content is None:
        Image.effect_noise((640, 640), 90).convert("RGB").save(path)
        content = path.read_bytes()[:2_000]
    path.write_bytes(content)
    line = refused("--image", path)
    assert part in line
    assert "--image" in line
    assert path.read_bytes() == content


def test_a_black_page(refused, tmp_path):
    Image.new("RGB", (640, 1280)).save(tmp_path / "black.png")
    line = refused("--image", tmp_path / "black.png")
    assert "black.png" in line
    assert "--image" in line


def test_one_bad_page_among_good_ones_stops_the_run(refused, page_files, tmp_path):
    line = refused("--image", page_files[0], "--image", tmp_path / "gone.jpg")
    assert "gone.jpg" in line


def test_a_missing_shard(refused, copied):
    (copied / "model-1.safetensors").unlink()
    assert "lacks 1 of its 2 shards: model-1.safetensors" in refused("--model", copied)


def test_a_wrong_shape(refused, copied):
    tensors = load_file(copied / "model-0.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, copied / "model-0.safetensors")
    line = refused("--model", copied)
    assert f"{name} has shape" in line
    assert "--model DIR" in line


def test_a_pickle_instead_of_safetensors(refused, copied):
    for path in copied.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, copied / "pytorch_model.bin")
    line = refused("--model", copied)
    assert "only pickle files (pytorch_model.bin)" in line
    assert "--model builtin" in line


def test_an_existing_run(refused, tmp_path):
    old = tmp_path / "results" / "mine"
    old.mkdir(parents=True)
    (old / "precious").write_text("kept")
    assert "exists and is left as it is" in refused("--run-id", "mine")
    assert (old / "precious").read_text() == "kept"


def test_an_output_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("kept")
    assert "--output" in refused(output=tmp_path / "file" / "results")
    assert (tmp_path / "file").read_text() == "kept"


def test_too_little_memory_is_refused_before_loading(refused, monkeypatch):
    monkeypatch.setattr(devices, "available_bytes", lambda _: 2_000_000_000)
    line = refused("--variant", "deepseek-ocr-v1-base", exit_code=1)
    assert "the run needs about 9." in line
    assert "2.0 GB are available" in line
    assert "dsocr-smoke-v1" in line


@pytest.fixture
def small_disk(tmp_path):
    """A disk with room to start but not to finish."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", mount], capture_output=True, check=False)  # noqa: S603, S607
    if done.returncode:
        pytest.skip("mounting a small disk needs root")
    yield mount
    subprocess.run(["umount", mount], check=True)  # noqa: S603, S607


def test_a_nearly_full_disk_is_refused_at_once(invoke, small_disk):
    result = invoke(*RUN, "--output", small_disk)
    assert result.exit_code == 1
    assert "left, a run may take" in result.stderr
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_while_writing(invoke, small_disk, monkeypatch):
    monkeypatch.setattr("dsocr_trace.runs.store._ROOM_BYTES", 0)
    result = invoke(*RUN, "--output", small_disk, "--run-id", "mine")
    assert result.exit_code == 1
    assert result.stderr.strip().count("\n") == 0
    assert "No space left on device" in result.stderr
    assert "--output" in result.stderr
    assert list(small_disk.iterdir()) == []


def test_an_interrupt_in_the_middle(tmp_path):
    command = [
        sys.executable,
        "-m",
        "dsocr_trace",
        *map(str, RUN[:-1]),
        "--max-new-tokens",
        "4000",
        "--output",
        str(tmp_path),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("decode"):
            break
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert err.strip() == "dsocr-trace: interrupted; nothing was written"
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_that_python_drops():
    """It drops those that are raised in a finaliser."""
    with noticed(), ProgressDisplay(quiet=True) as progress:
        progress("decode", 1, 3)
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            progress("decode", 2, 3)
    with ProgressDisplay(quiet=True) as progress:
        progress("decode", 1, 3)


def test_debug_shows_the_traceback(tmp_path):
    command = [
        sys.executable,
        "-m",
        "dsocr_trace",
        *map(str, RUN),
        "--hardware",
        "nope",
        "--debug",
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert "Traceback" in done.stderr
    assert "InputError: no hardware 'nope'" in done.stderr


def test_a_batch_of_pages(refused, tmp_path) -> None:
    folder = resources.files("analytic") / "data" / "workloads"
    text = (folder / "dsocr-smoke-v1.toml").read_text(encoding="utf-8")
    workload = tmp_path / "batch.toml"
    workload.write_text(f"batch_size = 4\n{text}", encoding="utf-8")
    line = refused("--workload", workload)
    assert "batch_size 4" in line
    assert "--workload" in line
