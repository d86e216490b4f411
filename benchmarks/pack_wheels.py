"""Carry this project to a GPU machine that reaches no package index: what is missing there, in slices to copy.

Here, PRESENT being what ``python3 -m pip list --format=freeze`` says there (names alone will do, a line each):

    python benchmarks/pack_wheels.py pack .carry --present PRESENT --python 3.12

There, once the files of all folders ``slice-*`` lie in one; it takes Python alone:

    python3 pack_wheels.py join FOLDER
    python3 -m pip install --no-index --no-deps --target SITE FOLDER/wheels/*.whl && export PYTHONPATH=SITE
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from email import message_from_bytes
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
EXTRAS = "tensorrt-rtx,benchmark,export"  # what `make gpu` uses where PyTorch is
SLICE_MIB = 44
ARCHIVE = "wheels.tar.xz"
_GLIBC = (39, 35, 34, 31, 28, 27, 24, 17)  # in wheels' names: pip takes those that are listed, not older ones as well

Fetch = Callable[[str, Path], Path]  # a requirement and a folder to the wheel, put there


class NotPacked(Exception):
    """What cannot be packed or joined, in a sentence."""


def needed(wheel: Path, extras: str, present: Mapping[str, str], fetch: Fetch, python: str) -> list[Path]:
    """``wheel`` and all it requires that is not ``present``, fetched beside it.

    ``present``: versions by name, "" where only the name is known, which is then taken to suit. Raises
    :class:`NotPacked` where a version that is there, or was fetched before, is not one of those required.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    linux = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": "x86_64",
             "platform_system": "Linux", "sys_platform": "linux", "os_name": "posix"}  # fmt: skip
    have = {canonicalize_name(name): version for name, version in present.items()}
    wheels, waiting = [wheel], [(wheel, extras.split(","))]
    while waiting:
        origin, wanted = waiting.pop()
        with zipfile.ZipFile(origin) as archive:
            (place,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
            written = message_from_bytes(archive.read(place)).get_all("Requires-Dist") or []
        for requirement in map(Requirement, written):
            name, marker = canonicalize_name(requirement.name), requirement.marker
            if marker is not None and not any(marker.evaluate({**linux, "extra": extra}) for extra in [*wanted, ""]):
                continue
            if name not in have:
                found = fetch(f"{requirement.name}{requirement.specifier}", wheel.parent)
                have[name] = found.name.split("-")[1]
                wheels.append(found)
                waiting.append((found, list(requirement.extras)))
            elif have[name] and not requirement.specifier.contains(have[name], prereleases=True):
                raise NotPacked(
                    f"{origin.name} needs {requirement}, but {name} {have[name]} is there, or is packed already; "
                    "take it off the list of what is there to bring another"
                )
    return wheels


def fetch_with_pip(python: str) -> Fetch:
    """Wheels for CPython ``python`` on Linux (x86-64) from the package index; pure Python is built where need be.

    Versions are those of ``constraints.txt``, with which the tests were run.
    """
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in _GLIBC] + ["manylinux2014_x86_64", "any"]
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    target += [part for platform in platforms for part in ("--platform", platform)]

    def fetch(requirement: str, folder: Path) -> Path:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            for command in (["download", *target, "-d", name], ["wheel", "-w", name]):
                constraints = ["-c", str(REPOSITORY / "constraints.txt")]
                pip = [sys.executable, "-m", "pip", *command, "-q", "--no-deps", *constraints, requirement]
                answer = subprocess.run(pip, capture_output=True, text=True, check=False)
                wheels = list(Path(name).glob("*.whl"))
                if wheels and ("download" in command or wheels[0].name.endswith("-none-any.whl")):
                    return Path(shutil.move(wheels[0], folder))
        raise NotPacked(f"there is no wheel of {requirement} for Python {python} ({answer.stderr.strip()[-300:]})")

    return fetch


def slices(wheels: list[Path], folder: Path, mib: int) -> list[Path]:
    """Write ``folder/slice-01`` ...: part of an archive, of at most ``mib`` MiB, the sum of the whole, and this file.

    Wheels are deflated; as plain archives inside one that xz packs, the large libraries take about half.
    """
    archive = folder / ARCHIVE
    with tarfile.open(archive, "w:xz") as tar, tempfile.TemporaryDirectory(dir=folder) as name:
        for wheel in sorted(wheels):
            plain = Path(name, wheel.name)
            with zipfile.ZipFile(wheel) as packed, zipfile.ZipFile(plain, "w", zipfile.ZIP_STORED) as unpacked:
                for entry in packed.infolist():
                    content = packed.read(entry)
                    entry.compress_type = zipfile.ZIP_STORED
                    unpacked.writestr(entry, content)
            tar.add(plain, plain.name)
            plain.unlink()
    content = archive.read_bytes()
    archive.unlink()
    made = []
    for number, start in enumerate(range(0, len(content), mib << 20), 1):
        made.append(folder / f"slice-{number:02}")
        made[-1].mkdir()
        (made[-1] / f"part-{number:02}").write_bytes(content[start : start + (mib << 20)])
        (made[-1] / "SHA256").write_text(f"{hashlib.sha256(content).hexdigest()}\n")
        shutil.copy(__file__, made[-1])
    return made


def join(folder: Path) -> list[Path]:
    """Put the parts in ``folder`` together and unpack the wheels into ``folder/wheels``.

    Raises :class:`NotPacked` when a part is missing or damaged.
    """
    content = b"".join(part.read_bytes() for part in sorted(folder.glob("part-*")))
    stated = folder / "SHA256"
    if not stated.is_file() or hashlib.sha256(content).hexdigest() != stated.read_text().strip():
        raise NotPacked(f"the parts in {folder} are not all of one archive; copy the files of every slice there")
    with tempfile.TemporaryFile() as stream:
        stream.write(content)
        stream.seek(0)
        with tarfile.open(fileobj=stream, mode="r:xz") as tar:
            # Python 3.11 has filters since 3.11.4 only; what is unpacked was just compared with its checksum.
            safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            tar.extractall(folder / "wheels", **safely)
    return sorted((folder / "wheels").glob("*.whl"))


def read_present(path: Path | None) -> dict[str, str]:
    """Versions by name of a list of packages, ``name==version`` or ``name`` a line."""
    lines = [] if path is None else path.read_text(encoding="utf-8").splitlines()
    entries = [re.split(r"==| @ ", line.partition("#")[0].strip(), maxsplit=1) for line in lines]
    return {entry[0]: entry[1] if len(entry) > 1 and entry[1][:1].isdigit() else "" for entry in entries if entry[0]}


def pack(out: Path, present: Path | None, python: str, extras: str, mib: int) -> list[Path]:
    """This project and what it lacks beside ``present``, as slices in the new folder ``out``."""
    if out.exists():
        raise NotPacked(f"{out} exists; choose a new folder")
    (out / "wheels").mkdir(parents=True)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out / "wheels"), str(REPOSITORY)]
    subprocess.run(build, check=True)
    (own,) = (out / "wheels").glob("*.whl")
    wheels = needed(own, extras, read_present(present), fetch_with_pip(python), python)
    made = slices(wheels, out, mib)
    for wheel in sorted(wheels):
        print(f"{wheel.stat().st_size / 2**20:8.1f} MiB  {wheel.name}")
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packer = commands.add_parser("pack", help="download what is missing there and cut it into slices")
    packer.add_argument("out", type=Path, help="a new folder")
    packer.add_argument("--present", type=Path, help="list of the packages there; without it everything is packed")
    packer.add_argument("--python", default="3.12", help="the Python there (default 3.12)")
    packer.add_argument("--extras", default=EXTRAS, help=f"extras of this project (default {EXTRAS})")
    packer.add_argument("--slice-mib", type=int, default=SLICE_MIB, help=f"size of a slice (default {SLICE_MIB})")
    joiner = commands.add_parser("join", help="there: put the slices together")
    joiner.add_argument("folder", type=Path, help="the folder with all parts")
    given = parser.parse_args()
    try:
        if given.command == "join":
            print(*join(given.folder), sep="\n")
        else:
            print(*pack(given.out, given.present, given.python, given.extras, given.slice_mib), sep="\n")
    except NotPacked as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
