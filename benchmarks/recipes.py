"""What changes of a recipe are worth: every row of settings on folds of whole specimens, as they are and under shift.

    python benchmarks/recipes.py benchmarks/recipes.yaml OUT [--set super1=FOLDER ...] [--rows baseline scale]
    python benchmarks/recipes.py benchmarks/recipes.yaml OUT --table     # of what is there, without training

The file names the sets, their recipes and the rows: a row `on-scale` has the settings of row `on`, then its own, and is
compared with it fold by fold; a row that begins with no other is compared with the first. OUT holds the runs,
`results.jsonl` with a line for each fold (rows that are there are not trained again, a run that was stopped is
continued), and `table.md`. What a fold is, how it is trained and judged: `hpddrnet-trt train --folds`. Of enlarged
pictures the middle part is scored.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.files import write_text
from hpddrnet_trt.core.text import plain

Line = dict[str, Any]  # one fold of one row on one set, as it stands in results.jsonl


@dataclass(frozen=True)
class Plan:
    """What the YAML file says; ``parts`` are there for its aliases alone."""

    folds: int
    sets: dict[str, dict[str, Any]]
    rows: dict[str, list[Any] | dict[str, list[Any]]]
    parts: list[Any] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Plan:
        try:
            return cls(**yaml.safe_load(path.read_text(encoding="utf-8")))
        except (OSError, yaml.YAMLError, TypeError) as exc:
            raise UsageError(f"{path} must be a YAML file with the keys folds, sets and rows: {exc}") from exc

    def parent(self, row: str) -> str | None:
        """The row whose settings ``row`` has as well: the longest whose name and a hyphen it begins with, if any."""
        return max((name for name in self.rows if row.startswith(f"{name}-")), key=len, default=None)

    def before(self, row: str) -> str:
        """The row that ``row`` is compared with: its parent, or the first."""
        return self.parent(row) or next(iter(self.rows))

    def settings(self, row: str, name: str) -> list[str] | None:
        """The settings of a row on a set, with those of its parent before them; None where it is not for this set."""
        own = self.rows[row]
        if isinstance(own, dict):
            if name not in own:
                return None
            own = own[name]
        parent = self.parent(row)
        inherited = [] if parent is None else self.settings(parent, name)
        return None if inherited is None else [*inherited, *_flat(own)]


def _flat(settings: list[Any]) -> list[str]:
    """Settings of lists in lists, as YAML's aliases put them together."""
    return [text for part in settings for text in (_flat(part) if isinstance(part, list) else [part])]


# ------------------------------------------------------------------------ training


def run_row(plan: Plan, row: str, name: str, out: Path) -> list[Line]:
    """Train and judge a row on all folds of a set: a line for each."""
    from hpddrnet_trt.accuracy.folds import cross_validate, shifts_at
    from hpddrnet_trt.training import recipe_file
    from hpddrnet_trt.training.plan import plan_run, run_name

    chosen, settings = plan.sets[name], plan.settings(row, name) or []
    of_row = {other: run_name(Path(f"{other}-{name}")) for other in plan.rows}
    given = [*chosen["settings"], *settings]
    for other, run in of_row.items():
        given = [text.replace(f"@{other}}}", f"{json.dumps(str(out / 'runs' / f'{run}-folds'))}}}") for text in given]
    place = [f"run.folder={json.dumps(str(out / 'runs'))}", f"run.name={of_row[row]}"]
    config = plan_run(recipe_file(chosen["recipe"]), Path(chosen["folder"]), [*given, *place])
    shifts = shifts_at((shift, float(value)) for shift, values in chosen["shifts"].items() for value in values)
    fresh = not config.run.path.with_name(f"{config.run.name}-folds").exists()
    began = time.process_time()
    judged = cross_validate(config, plan.folds, shifts)
    seconds = (time.process_time() - began) / plan.folds if fresh else None  # of a run that was continued: not known
    head = {"row": row, "data": name, "recipe": chosen["recipe"], "overrides": given, "cpu_s": seconds}
    folds = enumerate(judged.folds, 1)
    return [{**head, "fold": f"{number}/{plan.folds}", **_scores(fold.figures), "held_out": fold.pictures}
            for number, fold in folds]  # fmt: skip


def _scores(figures: dict[str, float]) -> Line:
    classes = [name.removeprefix("IoU ") for name in figures if name.startswith("IoU ")]
    shifted = {name.removeprefix("mIoU, "): value for name, value in figures.items() if name.startswith("mIoU, ")}
    kinds_of_class = {"iou": "IoU", "boundary_f": "boundary F", "area_error": "area error"}
    home: Line = {"miou": figures["mIoU"], "micro": figures["micro IoU, per picture"]}
    home |= {key: [figures[f"{kind} {name}"] for name in classes] for key, kind in kinds_of_class.items()}
    return {"classes": classes, "home": home, "shift": {name: {"miou": value} for name, value in shifted.items()}}


# -------------------------------------------------------------------------- table

Figure = Callable[[Line], float | None]


def _columns(shown: Sequence[str], settings: Sequence[str]) -> dict[str, Figure]:
    def of_class(key: str, name: str) -> Figure:
        return lambda line: line["home"][key][line["classes"].index(name)]

    kinds = {"IoU": "iou", "boundary F": "boundary_f", "area error": "area_error"}
    return {
        "mIoU": lambda line: line["home"]["miou"],
        "micro-IoU": lambda line: line["home"]["micro"],
        **{f"{kind}, {name}": of_class(key, name) for kind, key in kinds.items() for name in shown},
        "mIoU, magnifications": _under([name for name in settings if name.startswith("magnification")]),
        "mIoU, other shifts": _under([name for name in settings if not name.startswith("magnification")]),
    }


def _under(settings: Sequence[str]) -> Figure:
    """Mean mIoU over settings of the instrument; none where one of them is missing."""

    def figure(line: Line) -> float | None:
        found = [line["shift"].get(name, {}).get("miou") for name in settings]
        return float(np.mean(found)) if found and None not in found else None

    return figure


def cell(lines: Sequence[Line], before: Sequence[Line], figure: Figure) -> str:
    """Mean ± spread over the folds in percent, and in brackets the paired difference to the lines before the
    change ± its spread; bold where three folds or more differ by more than that."""
    values = np.array([figure(line) for line in lines], dtype=float)
    by_fold = {line["fold"]: figure(line) for line in before}
    paired = [(v, by_fold[line["fold"]]) for v, line in zip(values, lines, strict=True) if line["fold"] in by_fold]
    change = np.array([np.subtract(*pair) for pair in np.array(paired, dtype=float).reshape(-1, 2)])
    text = _with_spread(values, "{:.1f}")
    if np.isnan(change).all():
        return text
    sure = np.count_nonzero(~np.isnan(change)) > 2 and abs(np.nanmean(change)) > np.nanstd(change, ddof=1)
    difference = _with_spread(change, "{:+.1f}")
    return f"{text} ({f'**{difference}**' if sure else difference})"


def _with_spread(values: np.ndarray[Any, Any], how: str) -> str:
    present = 100 * values[~np.isnan(values)]
    if not present.size:
        return "–"
    return how.format(present.mean()) + (f" ± {present.std(ddof=1):.1f}" if present.size > 1 else "")


def tables(plan: Plan, lines: Sequence[Line]) -> str:
    """Markdown: a table of the changes and one of the shifts for each set of which there are lines."""
    changes, shifts = ["## Every change", ""], ["## Shifts", ""]
    for name, chosen in plan.sets.items():
        # Other lines are of other trials: without shifts, or of no fold.
        here = [line for line in lines if line["data"] == name and line.get("shift") and line["fold"]]
        order = dict.fromkeys([*plan.rows, *(line["row"] for line in here)])
        by_row = {row: [line for line in here if line["row"] == row] for row in order}
        by_row = {row: found for row, found in by_row.items() if found}
        before = {row: by_row.get(plan.before(row), []) if row != plan.before(row) else [] for row in by_row}
        settings = [f"{shift} {value:g}" for shift, values in chosen["shifts"].items() for value in values]
        columns = _columns(chosen["shown"], settings)
        body = []
        for row, found in by_row.items():
            label = row if len(found) == plan.folds else f"{row} ({len(found)} of {plan.folds} folds)"
            spent = [line["cpu_s"] for line in found if line.get("cpu_s")]
            cells = [cell(found, before[row], figure) for figure in columns.values()]
            body.append([label, *cells, f"{np.mean(spent):.0f}" if spent else "–"])
        if not body:
            continue
        changes += [f"### {name}", "", *_markdown([["", *columns, "CPU s a fold"], *body]), ""]
        grid = [["mIoU at", *by_row]]
        for setting in settings:
            figure = _under([setting])
            grid.append([setting, *(cell(found, before[row], figure) for row, found in by_row.items())])
        shifts += [f"### {name}, under shift", "", *_markdown(grid), ""]
    return "\n".join([*changes, *shifts])


def _markdown(rows: list[list[str]]) -> list[str]:
    written = ["| " + " | ".join(row) + " |" for row in rows]
    return [written[0], "|" + "---|" * len(rows[0]), *written[1:]]


# ------------------------------------------------------------------------- program


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=FOLDER", help="only these sets, found here")
    parser.add_argument("--rows", nargs="*", help="only these, in this order")
    parser.add_argument("--table", action="store_true", help="of the results that are there; nothing is trained")
    options = parser.parse_args(arguments)
    plan, file = Plan.read(options.plan), options.out / "results.jsonl"
    for given in options.set:
        name, _, folder = given.partition("=")
        if name not in plan.sets or not folder:
            raise UsageError(f"--set {given}: give NAME=FOLDER with one of the names {', '.join(plan.sets)}")
        plan.sets[name]["folder"] = folder
    names = [given.partition("=")[0] for given in options.set] or list(plan.sets)
    if unknown := [row for row in options.rows or () if row not in plan.rows]:
        raise UsageError(f"{options.plan} has no row {unknown[0]!r}; it has {', '.join(plan.rows)}")
    lines = [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []
    for row in [] if options.table else options.rows or list(plan.rows):
        for name in names:
            done = sum(line["row"] == row and line["data"] == name for line in lines)
            if done or plan.settings(row, name) is None:
                continue
            print(f"{row} on {name}", flush=True)
            lines += run_row(plan, row, name, options.out)
            write_text(file, "".join(json.dumps(plain(line)) + "\n" for line in lines))
            write_text(options.out / "table.md", tables(plan, lines))
    if options.table:
        print(tables(plan, lines))


if __name__ == "__main__":
    try:
        main()
    except UserError as exc:
        sys.exit(f"error: {exc}")
