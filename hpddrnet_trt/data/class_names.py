"""Which class each label of a foreign source is: names from the person, from the source, or guessed and said so."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.manifest import IGNORE_INDEX, ClassInfo, default_palette
from hpddrnet_trt.data.annotations import UNLABELED, Color, Found

BACKGROUND, IGNORE = "background", "ignore"
_MOST_CLASSES = 32  # values or colours that are still taken for classes
_SHOWN = 8  # of a longer list
_FEW_CLASSES = 5  # more numbers may be those of objects


@dataclass(frozen=True)
class ClassTable:
    """``indices``: the class index or 255 of each label; ``classes`` in their order; ``notes`` for people."""

    indices: dict[str, int]
    classes: list[ClassInfo]
    notes: list[str]


class Rule(NamedTuple):
    """``what`` the source calls something (a label, a value, values ``1-65535``, ``#rrggbb``) is the class ``name``."""

    what: str
    name: str

    def fits(self, label: str) -> bool:
        span = re.fullmatch(r"(\d+)-(\d+)", self.what)
        if span and label.isdigit():
            return int(span[1]) <= int(label) <= int(span[2])
        return label.casefold() == self.what.casefold()


def parse_rule(text: str) -> Rule:
    """``WHAT=NAME``; a colour may be ``255,0,0`` too. Raises :class:`UsageError` for anything else."""
    what, sign, name = (part.strip() for part in text.rpartition("="))
    if not (sign and what and name):
        raise UsageError(f"--class takes WHAT=NAME, such as pore_1=pore, 255=pore or '#ff0000=pore', not {text!r}")
    if color := re.fullmatch(r"\(?(\d{1,3}), *(\d{1,3}), *(\d{1,3})\)?", what):
        what = "#" + "".join(f"{min(255, int(value)):02x}" for value in color.groups())
    return Rule(what, _plain(name))


def class_table(
    counts: Mapping[str, int],
    found: Found,
    rules: Sequence[Rule] = (),
    *,
    nearest: bool = False,
    confirm: Callable[[str], bool] = lambda question: False,
) -> ClassTable:
    """The classes of a source from its labels, with ``counts`` of pixels each.

    A label without a name of its own (a number, a colour) is named by ``rules`` or by the source. Where neither says
    anything, 0, 1, 2, ... and 0/255 are taken as they are, anything else only when ``confirm`` says so. ``nearest``:
    where they name some, the others become the nearest of these.

    Raises :class:`UsageError`, with what was found and how to name it, otherwise.
    """
    named = {label: _name(label, rules, found) for label in counts}
    names = {label: name for label, name in named.items() if name is not None}
    unnamed = sorted(counts.keys() - names.keys(), key=_place)
    notes: list[str] = []
    if unnamed and (rules or found.known):
        names |= _nearest(unnamed, counts, rules, found, nearest, notes)
    elif unnamed:
        names |= _guessed(unnamed, counts, confirm, notes)
    unused = [rule.what for rule in rules if not any(rule.fits(label) for label in counts)]
    if unused:
        notes.append(f"not found in the source: {', '.join(unused)}")
    by_rule, stated = [rule.name for rule in rules], [_plain(found.known.get(label, label)) for label in found.order]
    first = [] if BACKGROUND in by_rule else [BACKGROUND]
    order = dict.fromkeys([*first, *by_rule, *stated, *(names[label] for label in sorted(names, key=_place))])
    classes = [name for name in order if name in names.values() and name != IGNORE]
    if not 2 <= len(classes) <= _MOST_CLASSES:
        listed = _listed(classes) or "none"
        hint = "; name several labels alike with --class LABEL=NAME" if classes[2:] else ""
        raise UsageError(f"2 to {_MOST_CLASSES} classes are needed, the source has {len(classes)} ({listed}){hint}")
    indices = {label: IGNORE_INDEX if name == IGNORE else classes.index(name) for label, name in names.items()}
    for name in [*classes, *([IGNORE] if IGNORE in names.values() else [])]:
        labels = [label for label in sorted(names, key=_place) if names[label] == name]
        share = sum(counts[label] for label in labels) / sum(counts.values())
        title = f"class {classes.index(name)}, {name}" if name != IGNORE else f"{IGNORE_INDEX}, ignored"
        notes.append(f"{title}: {_listed(labels)} ({share:.2%} of the pixels)")
    if len({name.casefold() for name in classes}) < len(classes):
        notes.append("some classes differ only in capitals; --class LABEL=NAME makes them one")
    if absent := [name for name in dict.fromkeys(stated) if name not in {*classes, BACKGROUND, IGNORE, ""}]:
        notes.append(f"named by the source but nowhere drawn: {_listed(absent)}")
    return ClassTable(indices, _colored(classes, names, found), notes)


def _plain(name: str) -> str:
    """``_background_``, ``__ignore__`` and ``Ignore*``, as programs write them, are the two names with a meaning."""
    plain = name.strip("_* ").casefold()
    return plain if plain in (BACKGROUND, IGNORE) else name.strip() or "nameless"


def _name(label: str, rules: Sequence[Rule], found: Found) -> str | None:
    exact = [rule.name for rule in rules if rule.what == label] + [rule.name for rule in rules if rule.fits(label)]
    if exact:
        return exact[0]
    if label in found.known:
        return _plain(found.known[label])
    if label == UNLABELED or (rules and label in ("0", "#000000")):
        return BACKGROUND
    return None if found.values else _plain(label)


def _place(label: str) -> tuple[int, int, str]:
    return (0, int(label), "") if label.lstrip("-").isdigit() else (1, 0, label.casefold())


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels[:_SHOWN]) + (f" and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else "")


def _point(label: str) -> Color | None:
    """A colour, or a grey value as one, to measure how far two are apart; None for a name."""
    if re.fullmatch("#[0-9a-fA-F]{6}", label):
        return int(label[1:3], 16), int(label[3:5], 16), int(label[5:7], 16)
    return (int(label),) * 3 if label.lstrip("-").isdigit() else None


def _nearest(
    unnamed: list[str], counts: Mapping[str, int], rules: Sequence[Rule], found: Found, allowed: bool, notes: list[str]
) -> dict[str, str]:
    share = sum(counts[label] for label in unnamed) / sum(counts.values())
    told = f"{_listed(unnamed)} ({share:.2%} of the pixels)"
    known = {rule.what: rule.name for rule in rules} | {what: _plain(name) for what, name in found.known.items()}
    targets = [(point, name) for what, name in known.items() if (point := _point(what)) is not None]
    if not allowed or not targets:
        raise UsageError(f"nothing names {told}; add --class WHAT=NAME for each, or --nearest")
    notes.append(f"taken as the nearest class: {told}")

    def closest(label: str) -> str:
        own = _point(label) or (0, 0, 0)
        return min(targets, key=lambda target: sum((a - b) ** 2 for a, b in zip(own, target[0], strict=True)))[1]

    return {label: closest(label) for label in unnamed}


def _guessed(
    unnamed: list[str], counts: Mapping[str, int], confirm: Callable[[str], bool], notes: list[str]
) -> dict[str, str]:
    numbers = [label for label in unnamed if not label.startswith("#")]
    kind = "values" if len(numbers) == len(unnamed) else "colours"
    plain = [label for label in numbers if label != "255"]
    if kind == "values" and set(unnamed) <= {"0", "255"} and "255" in unnamed:
        notes.append("0 and 255 are taken as background and foreground; --class 255=NAME names it")
        return {"0": BACKGROUND, "255": "foreground"}
    if kind == "values" and plain == [str(value) for value in range(len(plain))] and len(plain) <= _MOST_CLASSES:
        notes.append(f"the values 0 to {len(plain) - 1} are taken as classes without names; --class 1=NAME names one")
        if len(plain) > _FEW_CLASSES:
            notes.append(f"if they are numbers of objects, --class 0=background --class 1-{plain[-1]}=NAME is right")
        return {label: f"class {label}" for label in plain} | {"255": IGNORE}
    if len(unnamed) > _MOST_CLASSES:
        hint = (
            f"are they numbers of objects? then --class 0=background --class 1-{numbers[-1]}=NAME makes them one class"
            if kind == "values"
            else "are they smoothed, or a JPEG once? then name the true ones with --class '#rrggbb=NAME', and --nearest"
        )
        often = sorted(unnamed, key=lambda label: -counts[label])
        raise UsageError(f"the masks hold {len(unnamed)} different {kind} (most often {_listed(often)}); {hint}")
    dark = min(unnamed, key=lambda label: sum(_point(label) or (0,)))
    first = BACKGROUND if sum(_point(dark) or (0,)) == 0 else "class 0"
    names = {dark: first} | {
        label: f"class {place}" for place, label in enumerate((each for each in unnamed if each != dark), start=1)
    }
    total = sum(counts.values())
    shares = ", ".join(f"{label} ({counts[label] / total:.2%})" for label in names)
    if confirm(f"found the {kind} {shares}; take each as a class"):
        return names
    options = " ".join(f"--class '{label}={name}'" for label, name in names.items())
    raise UsageError(f"found the {kind} {shares}, which nothing names; say what they are: {options}")


def _colored(classes: list[str], names: Mapping[str, str], found: Found) -> list[ClassInfo]:
    """The source's colours, where it has one for each class and no two alike."""
    stated: list[Color | None] = []
    for name in classes:
        labels = [label for label in names if names[label] == name]
        own = [found.colors[label] for label in [name, *labels] if label in found.colors]
        own += [point for label in labels if label.startswith("#") and (point := _point(label)) is not None]
        stated.append(own[0] if own else None)
    palette = default_palette(len(classes))
    colors = [own or other for own, other in zip(stated, palette, strict=True)]
    colors = colors if len(set(colors)) == len(colors) else palette
    return [ClassInfo(name=name, color=color) for name, color in zip(classes, colors, strict=True)]
