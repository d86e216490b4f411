"""Which pictures belong to one specimen, by folders or names, and a split that keeps specimens together."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.data.annotations import PICTURE_FOLDER, split_of

_SHARE = 0.15  # of the pictures, for val and for test
_NOTHING_SAID = re.compile(rf"{PICTURE_FOLDER}|obj_.*", re.I)


def specimens(paths: Sequence[str], rule: str | None = None) -> tuple[dict[str, str], str]:
    """The specimen of each picture, by its path in the source, and how it was found; none of them when nothing tells.

    ``rule``: a regular expression that is searched in the path and whose first group (or all of it) is the specimen;
    ``none``: each picture by itself. Otherwise sub-folders tell, else the shortest leading part of the names that makes
    three specimens or, failing that, two; there must be two pictures a specimen on average.
    """
    if rule == "none":
        return {}, "by picture, as told"
    if rule is not None:
        return _by_rule(paths, rule), f"by specimen, as --specimen {rule} finds it"
    folders = {path: "/".join(_saying(PurePosixPath(path).parts[:-1])) for path in paths}
    if _tells(folders, 2):
        return folders, f"by specimen, told by the folders ({some(folders)})"
    beginnings = {path: _beginnings(PurePosixPath(path).stem) for path in paths}
    for least in (3, 2):
        for length in range(max(map(len, beginnings.values()), default=0)):
            groups = {path: f"{folders[path]}/{each[: length + 1][-1]}".strip("/") for path, each in beginnings.items()}
            if _tells(groups, least):
                return groups, f"by specimen, told by how the names begin ({some(groups)})"
    return {}, "by picture: neither folders nor names tell specimens (if there are several, say how with --specimen)"


def _by_rule(paths: Sequence[str], rule: str) -> dict[str, str]:
    try:
        pattern = re.compile(rule)
    except re.error as exc:
        raise UsageError(f"--specimen {rule!r} is no regular expression ({exc}); for example '^(S[0-9]+)_'") from exc
    groups: dict[str, str] = {}
    for path in paths:
        match = pattern.search(path)
        if match is None:
            raise UsageError(f"--specimen {rule!r} finds nothing in {path}; give an expression that fits every picture")
        groups[path] = match[1] if pattern.groups and match[1] is not None else match[0]
    return groups


def _saying(folders: Sequence[str]) -> list[str]:
    return [folder for folder in folders if not _NOTHING_SAID.fullmatch(folder) and split_of(folder) is None]


def _beginnings(stem: str) -> list[str]:
    """``S1_02`` begins with S, S1 and S1_02: each run of letters or digits ends one."""
    return [stem[: word.end()] for word in re.finditer(r"[^\W\d_]+|\d+", stem)] or [stem]


def _tells(groups: Mapping[str, str], least: int) -> bool:
    return least <= len(set(groups.values())) <= len(groups) / 2


def some(groups: Mapping[str, str]) -> str:
    """How many groups, and the first three, of ``groups`` by picture."""
    names = sorted(set(groups.values()))
    return f"{len(names)}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def deal(groups: Mapping[str, str], folds: int) -> dict[str, int]:
    """The fold, 0 to ``folds - 1``, of each picture, of about as many pictures each; those of one group stay together.

    The groups with the most pictures come first, among equals by name, each to the fold that has the fewest.
    """
    sizes = Counter(groups.values())
    filled = [0] * folds
    fold_of: dict[str, int] = {}
    for group in sorted(sizes, key=lambda group: (-sizes[group], group)):
        fold_of[group] = filled.index(min(filled))
        filled[fold_of[group]] += sizes[group]
    return {picture: fold_of[group] for picture, group in groups.items()}


def split_pictures(groups: Mapping[str, str]) -> dict[str, str]:
    """``train``, ``val`` or ``test`` for each picture; pictures of one group stay together.

    The groups with the fewest pictures, among equals in the order of the SHA-256 of their names, become test until it
    has about 15 % of the pictures, the next ones val. Two groups become train and val, a single one train.
    """
    sizes = Counter(groups.values())
    hashes = {group: hashlib.sha256(group.encode("utf-8", "replace")).hexdigest() for group in sizes}
    ordered = sorted(sizes, key=lambda group: (sizes[group], hashes[group]))
    splits: dict[str, str] = {}
    for split, kept in (("test", 2), ("val", 1)):  # groups that must be left for the others
        taken = 0
        while len(ordered) > kept and (not taken or taken + sizes[ordered[0]] / 2 <= _SHARE * len(groups)):
            group = ordered.pop(0)
            splits[group] = split
            taken += sizes[group]
    return {picture: splits.get(group, "train") for picture, group in groups.items()}
