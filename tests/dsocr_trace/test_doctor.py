"""The examination of the machine, as it is and with parts taken away."""

from __future__ import annotations

import json
import subprocess
import sys

import pynvml
import pytest
import torch

from dsocr_trace.machine import doctor
from dsocr_trace.machine.doctor import Check, counters_restricted, examine, is_ready
from hooks import nsight

PARTS = {
    "python", "results", "driver", "torch", "device", "hardware", "memory", "flash-attn", "nsys", "nvtx", "ncu",
}  # fmt: skip


def by_part(checks):
    return {check.part: check for check in checks}


def test_this_machine_can_run(invoke, tmp_path):
    result = invoke("doctor", "--output", tmp_path / "new" / "results", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["ready"]
    parts = {check["part"]: check for check in found["checks"]}
    assert set(parts) == PARTS
    assert torch.__version__ in parts["torch"]["found"]
    assert all((check["fix"] is None) == (check["state"] == "ok") for check in parts.values())
    assert not (tmp_path / "new").exists()


def test_every_fix_is_printed_in_full(invoke, tmp_path):
    printed = invoke("doctor", "--output", tmp_path).stdout
    for check in examine(tmp_path):
        assert check.part in printed
        assert check.fix is None or f"{check.part}: {check.fix}\n" in printed


def test_without_torch_it_works_and_says_so(tmp_path):
    program = "import sys; sys.modules['torch'] = None; from dsocr_trace.cli import main; main()"
    command = [sys.executable, "-c", program, "doctor", "--json", "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert result.returncode == 1, result.stderr
    found = json.loads(result.stdout)
    assert not found["ready"]
    missing = [check for check in found["checks"] if check["state"] == "missing"]
    assert [(check["part"], check["fix"]) for check in missing] == [("torch", "pip install torch")]


def test_a_torch_that_does_not_load_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dsocr_trace.machine.doctor_torch", None)
    torch_check = by_part(examine(tmp_path))["torch"]
    assert torch_check.state == "missing"
    assert torch_check.found.startswith("does not load: ")


def test_a_folder_that_cannot_be_made_is_missing(tmp_path):
    (tmp_path / "file").touch()
    checks = by_part(examine(tmp_path / "file" / "results"))
    assert checks["results"].state == "missing"
    assert "--output" in checks["results"].fix
    assert not is_ready(list(checks.values()))


def test_missing_profilers_come_with_the_command_that_installs_them(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(nsight, "_FOLDERS", ())
    checks = by_part(examine(tmp_path))
    assert "make nsys" in checks["nsys"].fix
    assert "apt-get install nsight-compute" in checks["ncu"].fix
    assert is_ready(list(checks.values()))


def test_a_silent_nvtx_is_found_by_version_and_by_probing(tmp_path, monkeypatch):
    program = tmp_path / "nsys"
    program.write_text("#!/bin/sh\necho version 2022.4.2\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(nsight, "_FOLDERS", ())
    monkeypatch.setattr(doctor, "probe_ranges", lambda _: 0)
    assert by_part(examine(tmp_path))["nvtx"].state == "ok"
    assert by_part(examine(tmp_path, probe=True))["nvtx"].state == "limited"
    real = nsight.metadata.version
    monkeypatch.setattr(nsight.metadata, "version", lambda name: "0.2.13" if name == "nvtx" else real(name))
    assert "nvtx==0.2.11" in by_part(examine(tmp_path))["nvtx"].fix


@pytest.mark.parametrize(("setting", "user", "restricted"), [(1, 1000, True), (1, 0, False), (0, 1000, False)])
def test_who_may_read_counters(tmp_path, monkeypatch, setting, user, restricted):
    parameters = tmp_path / "params"
    parameters.write_text(f"ResmanDebugLevel: 4294967295\nRmProfilingAdminOnly: {setting}\nDmaRemapPeerMmio: 1\n")
    monkeypatch.setattr(doctor.os, "geteuid", lambda: user)
    assert counters_restricted(parameters) == restricted
    assert not counters_restricted(tmp_path / "none")


def test_a_gpu_that_torch_cannot_use_is_pointed_out(tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU here")
    for name, value in {"Init": None, "Shutdown": None, "DeviceGetCount": 1, "SystemGetDriverVersion": "580.1"}.items():
        monkeypatch.setattr(pynvml, f"nvml{name}", lambda value=value: value)
    checks = by_part(examine(tmp_path))
    assert checks["driver"].found == "NVIDIA 580.1, 1 GPUs"
    assert "download.pytorch.org" in checks["device"].fix


def test_states():
    assert Check("a", "b").state == "ok"
    assert Check("a", "b", "c").state == "limited"
    assert Check("a", "b", "c", required=True).state == "missing"
