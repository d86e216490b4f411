"""Several fields of view of one specimen: its mean area fractions with their intervals."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.uncertainty import MeanFraction, mean_fraction
from hpddrnet_trt.data.specimens import specimens
from hpddrnet_trt.results.tables import number, write_rows

SPECIMENS = "specimens.csv"
COLUMNS = (
    "specimen", "class", "pictures", "fraction", "fraction_low", "fraction_high", "relative_accuracy_percent",
    "standard_deviation", "model_error", "more_pictures_to_halve",
)  # fmt: skip
_MOST_IN_WORDS = 5


@dataclass(frozen=True)
class SpecimenFraction:
    """A class of a specimen. ``complete``: the model's error is known of all pictures, and is in the interval."""

    specimen: str
    name: str
    mean: MeanFraction
    complete: bool

    def as_dict(self) -> dict[str, Any]:
        return {"specimen": self.specimen, "class": self.name, **asdict(self.mean), "complete": self.complete}


def specimens_of(sources: Sequence[Path], rule: str) -> tuple[dict[str, str], str]:
    """The specimen of each picture, and how it was found, for people.

    ``rule``: ``auto``, ``all``, or a regular expression for the path below the pictures' common folder, as
    :func:`hpddrnet_trt.data.specimens.specimens` takes it. Raises :class:`UsageError` where pictures are not told
    apart.
    """
    if rule == "all":
        return {str(source): "all" for source in sources}, "all pictures show one"
    root = os.path.commonpath([source.parent for source in sources])
    paths = {str(source): source.relative_to(root).as_posix() for source in sources}
    groups, told = specimens(list(paths.values()), None if rule == "auto" else rule)
    if not groups:
        raise UsageError(
            "neither folders nor names tell which pictures show one specimen; say how with --specimen and a regular "
            "expression, such as '^(S[0-9]+)_', or --specimen all where all show one"
        )
    return {source: groups[path] for source, path in paths.items()}, told


def specimen_fractions(entries: Sequence[Mapping[str, Any]], groups: Mapping[str, str]) -> list[SpecimenFraction]:
    """Each class of each specimen, from lines of the journal. Slices of a stack, which lie beside each other, are no
    independent fields of view: they are left out."""
    members: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        if (group := groups.get(entry["source"])) is not None and not entry.get("stack") and entry.get("fractions"):
            members.setdefault(group, []).append(entry)
    found = []
    for group in sorted(members):
        known = [entry["intervals"] for entry in members[group] if entry.get("intervals")]
        complete = len(known) == len(members[group])
        for name in members[group][0]["fractions"]:
            shared = sum(each[name]["half"] for each in known) / len(known) if complete else None
            fractions = [entry["fractions"][name] for entry in members[group]]
            found.append(SpecimenFraction(group, name, mean_fraction(fractions, shared), complete))
    return found


def write_specimens(path: Path, found: Sequence[SpecimenFraction]) -> Path:
    """Write a row for each class of each specimen; columns :data:`COLUMNS`, fractions from 0 to 1."""
    rows = (
        [entry.specimen, entry.name, entry.mean.pictures, number(entry.mean.value), number(entry.mean.low),
         number(entry.mean.high), number(entry.mean.relative_accuracy), number(entry.mean.deviation),
         number(entry.mean.shared), "" if entry.mean.more is None else entry.mean.more]
        for entry in found
    )  # fmt: skip
    return write_rows(path, COLUMNS, rows)


def specimens_in_words(found: Sequence[SpecimenFraction]) -> list[str]:
    """A line for each of the first specimens."""
    by_name: dict[str, list[SpecimenFraction]] = {}
    for entry in found:
        by_name.setdefault(entry.specimen, []).append(entry)
    lines = [_line(name, entries) for name, entries in list(by_name.items())[:_MOST_IN_WORDS]]
    rest = len(by_name) - len(lines)
    return [*lines, f"  and {rest} more in {SPECIMENS}"] if rest > 0 else lines


def _line(specimen: str, entries: Sequence[SpecimenFraction]) -> str:
    pictures = entries[0].mean.pictures
    shares = []
    for entry in entries:
        text = f"{entry.name} {100 * entry.mean.value:.1f} %"
        if entry.mean.low is not None and entry.mean.high is not None:
            text += f" [{100 * entry.mean.low:.1f}, {100 * entry.mean.high:.1f}]"
        shares.append(text)
    line = f"  {specimen} ({pictures} picture{'s' * (pictures > 1)}): {', '.join(shares)}"
    if pictures < 2:
        return f"{line}; one picture does not tell how others vary, so there is no interval"
    if not entries[0].complete:
        line += "; without the model's own error, which is not known of all pictures"
    most = [entry.mean.more for entry in entries]
    if None in most:
        return f"{line}; the model's own error keeps more pictures from halving it"
    more = max(number for number in most if number is not None)
    return f"{line}; {more} more picture{'s' * (more != 1)} would halve it"
