"""``make nsys`` where it cannot be had, and where there is one already; getting it takes a network."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from dsocr_trace.machine import install_nsys
from hooks import nsight


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """No profiler anywhere, and no program on PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(nsight, "_FOLDERS", ())
    monkeypatch.setattr(install_nsys, "TOOLS", tmp_path / "tools")
    return tmp_path


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(("arguments", "exit_code"), [([], 1), (["--optional"], 0)])
def test_without_apt_one_line_says_so(arguments, exit_code):
    result = CliRunner().invoke(install_nsys.main, arguments)
    assert result.exit_code == exit_code
    assert result.stderr.startswith("no Nsight Systems: ")
    assert result.stderr.count("\n") == 1
    assert "apt-get" in result.stderr


def test_one_that_is_here_is_left_alone(bare):
    program = bare / "nsys"
    program.write_text("#!/bin/sh\necho version 2024.1.1\n")
    program.chmod(0o755)
    result = CliRunner().invoke(install_nsys.main, [])
    assert (result.exit_code, result.output) == (0, f"Nsight Systems 2024.1.1: {program}\n")
    assert not (bare / "tools").exists()


def test_a_failed_download_leaves_one_line_and_no_program(bare, monkeypatch):
    keyring = bare / "keyring.gpg"
    keyring.touch()
    monkeypatch.setattr(install_nsys, "_KEYRING", keyring)
    monkeypatch.setattr(install_nsys.platform, "machine", lambda: "x86_64")
    for name in ("apt-get", "dpkg"):
        (bare / name).write_text(
            "#!/bin/sh\necho 'W: something' >&2\necho 'E: Could not resolve deb.debian.org' >&2\nexit 100\n"
        )
        (bare / name).chmod(0o755)
    result = CliRunner().invoke(install_nsys.main, [])
    assert result.exit_code == 1
    assert "apt-get failed (Could not resolve deb.debian.org)" in result.stderr
    assert not (bare / "tools" / "nsys").exists()
