"""Changes of a recipe on folds: what is trained, what is compared with what, and that nothing is trained twice."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.data.simulate import write_dataset
from tests.training.conftest import TINY

REPOSITORY = Path(__file__).parents[2]


def _script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", REPOSITORY / f"benchmarks/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipes() -> Any:
    return _script("recipes")


def _line(row: str, fold: int, miou: float, **values: Any) -> dict[str, Any]:
    home = {"miou": miou, "micro": 0.5, "iou": [0.5, 0.25], "boundary_f": [0.5, None], "area_error": [0.01, 0.02]}
    shift = {"contrast 0.4": {"miou": miou - 0.2}, "contrast 2": {"miou": miou - 0.1}, "tilt 5": {"miou": 0.0}}
    return {"row": row, "data": "one", "fold": f"{fold}/3", "classes": ["matrix", "dot"], "home": home, "shift": shift,
            "cpu_s": 100.0, **values}  # fmt: skip


def test_the_committed_plan_is_one_that_training_takes(recipes: Any) -> None:
    from hpddrnet_trt.training import recipe_file
    from hpddrnet_trt.training.config import load_config

    plan = recipes.Plan.read(REPOSITORY / "benchmarks/recipes.yaml")
    for row in plan.rows:
        of_sets = {name: plan.settings(row, name) for name in plan.sets}
        assert any(settings is not None for settings in of_sets.values()), row
        for name, settings in of_sets.items():
            if settings is None:
                continue
            given = [text for text in (*plan.sets[name]["settings"], *settings) if "@" not in text]
            # Without the dataset and machine that decide the rest.
            config = load_config(
                recipe_file(plan.sets[name]["recipe"]),
                ["loss.class_weights=balanced", *given, "data.path=x", "run.threads=1"],
            )
            assert config.optimization.max_steps <= 450
    assert plan.before("on-scale") == "on"
    assert plan.before("on") == plan.before("start random") == "baseline"
    assert plan.settings("long-more-cldice", "super1") is None
    assert plan.settings("long-more-cldice", "ebc")[-1] == "loss.overlap=cldice"
    assert plan.settings("long-more-cldice", "ebc")[:-1] == plan.settings("long-more", "ebc")
    assert plan.before("long-more-cldice") == "long-more"


def test_differences_are_of_the_same_folds(recipes: Any) -> None:
    one = {"shown": ["dot"], "shifts": {"contrast": [0.4, 2]}}
    plan = recipes.Plan(3, {"one": one}, {"baseline": [], "on": [], "on-wide": []})
    lines = [
        *(_line("baseline", fold, miou) for fold, miou in ((1, 0.5), (2, 0.7), (3, 0.9))),
        *(_line("on", fold, miou) for fold, miou in ((3, 0.93), (1, 0.52), (2, 0.71))),
        _line("on-wide", 2, 0.61),
        {**_line("other trial", 1, 0.9), "shift": {}},
        {**_line("other trial", 1, 0.9), "fold": ""},
    ]
    table = recipes.tables(plan, lines).splitlines()
    rows = {line.split(" | ")[0].strip("| "): line for line in table if line.startswith("| ")}
    assert "| 70.0 ± 20.0 |" in rows["baseline"]
    assert "| 72.0 ± 20.5 (**+2.0 ± 1.0**) |" in rows["on"]
    assert "| 61.0 (-10.0) |" in rows["on-wide (1 of 3 folds)"]  # of row "on", in fold 2
    assert rows["on"].endswith("| – | 57.0 ± 20.5 (**+2.0 ± 1.0**) | 100 |")
    assert "tilt" not in "".join(table)
    assert "other trial" not in "".join(table)
    assert "| 52.0 ± 20.5 (**+2.0 ± 1.0**) |" in rows["contrast 0.4"]


def test_rows_are_trained_on_every_fold_and_once(recipes: Any, tmp_path: Path, monkeypatch: Any) -> None:
    write_dataset(tmp_path / "data", train=1, val=1, test=1, size=64, seed=1, progress=False)
    settings = [text for text in TINY if not text.startswith(("data.", "network."))]
    network = "network={channels: 4, ppm_channels: 8, head_channels: 8, detail: true, pool_border: ignored}"
    chosen = {"folder": "elsewhere", "recipe": "nasa-super1", "shown": ["pore"], "shifts": {"gamma": [2]},
              "settings": [*settings, network, "optimization.max_steps=1", "optimization.warmup_steps=0"]}  # fmt: skip
    rows = {"baseline": [], "on": ["network={initial: @baseline}", "augmentation.paste_probability=1"]}
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump({"folds": 2, "sets": {"one": chosen}, "rows": rows}, sort_keys=False))
    command = [str(plan), str(tmp_path / "out"), "--set", f"one={tmp_path / 'data'}"]
    recipes.main(command)
    lines = [json.loads(text) for text in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [(line["row"], line["fold"]) for line in lines] == [(row, fold) for row in rows for fold in ("1/2", "2/2")]
    assert {tuple(line["shift"]) for line in lines} == {("gamma 2",)}
    assert all(line["cpu_s"] > 0 for line in lines)
    started = [read_manifest(path).remarks[-1] for path in sorted(tmp_path.rglob("on-one-folds/*/*.safetensors"))]
    assert "from fold-1-of-2.safetensors" in started[0]  # each fold from that fold's model
    assert "from fold-2-of-2.safetensors" in started[1]
    assert "| on |" in (tmp_path / "out/table.md").read_text()

    monkeypatch.setattr(recipes, "run_row", lambda *_: pytest.fail("trained again"))
    recipes.main(command)
    with pytest.raises(UsageError, match="has no row 'wide'; it has baseline, on"):
        recipes.main([*command, "--rows", "wide"])
    with pytest.raises(UsageError, match="with one of the names one"):
        recipes.main([*command, "--set", "two=x"])
    plan.write_text("rows: 1")
    with pytest.raises(UsageError, match="YAML file with the keys"):
        recipes.main(command)


def test_models_beside_each_other_at_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    write_dataset(tmp_path / "data", train=1, val=1, test=1, size=64, progress=False)
    description = tmp_path / "data/dataset.json"
    content = description.read_text()
    for simulated, known in (("grain", "matrix"), ("pore", "secondary"), ("clay", "tertiary")):
        content = content.replace(f'"{simulated}"', f'"{known}"')
    description.write_text(content)
    record = tmp_path / "shifts.json"
    _script("shifts").main(
        [str(tmp_path / "data"), "nasa-super1", "nasa-super1", "--splits", "val", "test", "--json", str(record),
         "--shift", "gamma=0.5", "magnification=2"]
    )  # fmt: skip
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.endswith("| nasa-super1 | nasa-super1 |")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["as they are", "gamma 0.5", "magnification 2"]
    assert all(row[1] == row[2] for row in cells)
    assert len({row[1] for row in cells}) == 3
    assert json.loads(record.read_text())["nasa-super1"]["gamma 0.5"]["images"] == 2
