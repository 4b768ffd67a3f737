"""Finding NVIDIA's profilers, with programs that only say a version; and the real Nsight Systems where it is."""

from __future__ import annotations

import pytest

from hooks import nsight
from hooks.errors import TraceError
from hooks.nsight import find_tool, probe_ranges, require_tool, scrubbed, silent_nvtx


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Put a program that says something on PATH, and nothing else anywhere."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(nsight, "_FOLDERS", ())

    def make(name: str, says: str, exit_code: int = 0) -> None:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\necho '{says}'\nexit {exit_code}\n")
        path.chmod(0o755)

    return make


def test_a_tool_on_the_path_is_found_with_its_version(program, tmp_path):
    program("nsys", "NVIDIA Nsight Systems version 2024.2.3.38-242334140272v0")
    found = require_tool("nsys")
    assert (found.path, found.version, found.too_old) == (tmp_path / "nsys", "2024.2.3.38", None)


def test_the_folder_of_the_checkout_comes_last(program, tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    monkeypatch.setattr(nsight, "_FOLDERS", (str(tmp_path / "own"),))
    program("own/nsys", "version 2022.4.2.1")
    assert find_tool("nsys").version == "2022.4.2.1"
    program("nsys", "version 2025.1.1")
    assert find_tool("nsys").version == "2025.1.1"


@pytest.mark.usefixtures("program")
def test_a_missing_tool_is_refused_with_the_command_that_installs_it():
    assert find_tool("nsys") is None
    with pytest.raises(TraceError, match="make nsys"):
        require_tool("nsys")


def test_a_tool_that_does_not_run_is_none(program):
    program("ncu", "cannot open shared object file", exit_code=127)
    assert find_tool("ncu") is None


def test_an_old_tool_is_refused(program):
    program("nsys", "NVIDIA Nsight Systems version 2021.3.2.4-027534f")
    with pytest.raises(TraceError, match=r"2021.3.2.4 .*too old: 2022.4 or newer"):
        require_tool("nsys")


@pytest.mark.parametrize(
    ("nvtx", "nsys", "silent"),
    [("0.2.11", "2022.4.2.1", False), ("0.2.12", "2023.4.4", True), ("0.2.13", "2024.2.3", False)],
)
def test_which_versions_are_silent(program, monkeypatch, nvtx, nsys, silent):
    program("nsys", f"version {nsys}")
    monkeypatch.setattr(nsight.metadata, "version", lambda name: {"nvtx": nvtx}[name])
    assert (silent_nvtx(find_tool("nsys")) is not None) == silent


def test_a_recorded_program_gets_no_secret_and_nothing_unknown():
    kept = {
        "PATH": "/bin",
        "HOME": "/h",
        "LC_ALL": "C",
        "CUDA_VISIBLE_DEVICES": "1",
        "PYTHONPATH": "p",
        "OMP_NUM_THREADS": "2",
    }
    dropped = {
        "AWS_SECRET_ACCESS_KEY": "a", "HF_TOKEN": "b", "DATABASE_URL": "c", "SSH_AUTH_SOCK": "d", "PATHOLOGY": "e",
        "CUDA_API_KEY": "f", "PYTHON_TOKEN": "g", "HTTPS_PROXY": "http://user:word@host",
    }  # fmt: skip
    assert scrubbed(kept | dropped) == kept


def test_the_real_one_records_the_installed_nvtx():
    nsys = find_tool("nsys")
    if nsys is None:
        pytest.skip("Nsight Systems is not here: make nsys")
    assert silent_nvtx(nsys) is None
    assert probe_ranges(nsys) == 1
