"""Wheels for a machine without a package index: what is missing there, nothing else, and whole."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks import pack_wheels
from benchmarks.pack_wheels import NotPacked, join, needed, read_present, slices

REQUIRES = {
    "own": ["a>=1,<3", "b; python_version < '3'", "c; extra == 'gpu'", "d; extra == 'other'", "there>=2"],
    "a": ["e[fast]"],
    "c": ["a>=1.5"],
    "e": ["f; extra == 'fast'", "g; sys_platform == 'win32'", "a"],
    "f": [],
}


def wheel(folder: Path, name: str, version: str = "2.0") -> Path:
    """A wheel that pip installs, with one module of its name."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    about = "".join(f"Requires-Dist: {entry}\n" for entry in REQUIRES[name])
    entries = {
        f"{name}.py": f"VERSION = {version!r}\n" * 1000,
        f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{about}",
        f"{name}-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for place, text in entries.items():
            archive.writestr(place, text)
        record = "".join(f"{place},,\n" for place in [*entries, f"{name}-{version}.dist-info/RECORD"])
        archive.writestr(f"{name}-{version}.dist-info/RECORD", record)
    return path


def gathered(folder: Path, **present: str) -> list[str]:
    def fetch(requirement: str, place: Path) -> Path:
        return wheel(place, re.split("[<>]", requirement)[0])

    wheels = needed(wheel(folder, "own"), "gpu", present, fetch, "3.12")
    return sorted(path.name.partition("-")[0] for path in wheels)


def test_what_is_missing_is_gathered_and_nothing_else(tmp_path: Path) -> None:
    assert gathered(tmp_path, there="2.1+cu130", b="1") == ["a", "c", "e", "f", "own"]
    assert gathered(tmp_path, there="", A="") == ["c", "own"]
    with pytest.raises(NotPacked, match=r"own-2\.0.* needs there>=2, but there 1\.9 is there"):
        gathered(tmp_path, there="1.9")


def test_slices_become_wheels_that_install_without_an_index(tmp_path: Path) -> None:
    wheels = [wheel(tmp_path / "wheels", name) for name in ("a", "e", "f")]
    made = slices(wheels, tmp_path, 1)
    assert [path.name for path in made] == ["slice-01"]
    # As many as it takes: the same archive in smaller parts.
    content = (made[0] / "part-01").read_bytes()
    there = tmp_path / "there"
    there.mkdir()
    (there / "SHA256").write_bytes((made[0] / "SHA256").read_bytes())
    (there / "part-01").write_bytes(content[:100])
    with pytest.raises(NotPacked, match="copy the files of every slice"):
        join(there)
    (there / "part-02").write_bytes(content[100:])
    subprocess.run([sys.executable, made[0] / "pack_wheels.py", "join", there], check=True, capture_output=True)
    joined = sorted((there / "wheels").glob("*.whl"))
    assert [path.name for path in joined] == [path.name for path in wheels]
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", there / "site"]
    subprocess.run([*install, *joined], check=True, capture_output=True)
    assert (there / "site/e.py").read_text().startswith("VERSION = '2.0'")


def test_lists_of_packages(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("torch==2.11.0+cu130\nnumpy\n\n# a remark\nlocal @ file:///x\n")
    assert read_present(tmp_path / "list") == {"torch": "2.11.0+cu130", "numpy": "", "local": ""}
    assert read_present(None) == {}


def test_a_folder_is_not_packed_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sys_argv = ["pack_wheels.py", "pack", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", sys_argv)
        assert pack_wheels.main() == 1
    assert capsys.readouterr().err == f"error: {tmp_path} exists; choose a new folder\n"
