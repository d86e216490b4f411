"""Every command with bad input: one readable sentence, the right exit code, nothing left behind."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

from hpddrnet_trt import cli
from hpddrnet_trt.benchmark.result import load_result
from hpddrnet_trt.cli.options import SegmentOptions, parse_kinds
from hpddrnet_trt.cli.program import GONE, OLD_SPELLINGS, _colored
from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.inference.rank import read_ranking
from hpddrnet_trt.models.checkpoints import save_checkpoint
from hpddrnet_trt.weights import locate
from tests.hostile_models import write_engine
from tests.tiny_network import tiny_manifest, tiny_network

Run = Callable[..., tuple[int, str, str]]
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Call the program in an empty folder; gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    for name in ("HPDDRNET_DEBUG", "HPDDRNET_QUIET"):
        monkeypatch.setenv(name, "")  # what a command sets is taken back

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hpddrnet-trt", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        output = capfd.readouterr()
        code = exit_.value.code
        assert code is None or isinstance(code, int)
        return code or 0, output.out, output.err

    return call


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = tiny_network(detail=True)  # what tests/export/test_onnx.py ships, too
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny.safetensors", network, tiny_manifest(network))


def prepare(folder: Path) -> None:
    """Files that are not what they are taken for."""
    (folder / "empty").mkdir()
    for name in ("bad.onnx", "bad.safetensors", "bad.engine", "bad.pth", "bad.png"):
        (folder / name).write_bytes(b"\x00\x01 not a model at all")
    (folder / "bad.yaml").write_text("run: {nam: x}\n")
    for split in ("train", "val", "test"):
        for kind, value in (("images", 90), ("masks", 7)):
            path = folder / "outside" / kind / split / "a.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(np.full((16, 16), value, np.uint8)).save(path)
    classes = [{"index": i, "name": f"phase {i}", "color": [i, i, i]} for i in range(3)]
    (folder / "outside" / "dataset.json").write_text(json.dumps({"name": "outside", "classes": classes}))


BAD = [
    (["mosaic", "none.zarr"], "none.zarr does not exist"),
    (["mosaic", "bad.png", "--dry-run"], "bad.png"),
    (["mosaic", "empty", "--scheduler", "tcp://a:1", "--workers", "2"], "a number or an address"),
    (["train", "--config", "none.yaml"], "none.yaml"),
    (["train", "--config", "bad.yaml"], "train FOLDER"),
    (["train", "outside", "--config", "bad.yaml"], "run.nam; did you mean run.name?"),
    (["train", "--config", "{repo}/train/configs/demo.yaml", "data.path=empty"], "empty"),
    (["train", "--config", "{repo}/train/configs/demo.yaml", "data.path=outside"], "outside"),
    (["train", "outside", "--folds", "1"], "number of folds from 2 on"),
    (["train", "outside", "--config", "{repo}/train/configs/nasa_super1.yaml", "--folds", "9"], "hold 1: a;"),
    (["adapt", "bad.onnx", "--data", "outside", "--out", "x.safetensors"], "bad.onnx"),
    (["adapt", "{checkpoint}", "--data", "outside", "--out", "x.safetensors"], "shows next to nothing"),
    (["evaluate", "none.onnx", "--data", "outside"], "none.onnx"),
    (["evaluate", "{checkpoint}", "--data", "outside", "--split", "tets"], "tets"),
    (["evaluate", "{checkpoint}", "--data", "outside", "--report", "page.pdf"], "ends in .html"),
    (["export", "bad.safetensors", "x.onnx"], "bad.safetensors"),
    (["export", "{checkpoint}", "x.onnx", "--height", "250", "--width", "256"], "250"),
    (["calibrate", "bad.onnx", "x.onnx", "--data", "outside"], "bad.onnx"),
    (["build", "bad.onnx"], "bad.onnx"),
    (["build", "bad.onnx", "--max-miou-drop", "0.3"], "--verify DATA"),
    (["build", "bad.onnx", "--verify", "outside"], "needs a limit"),
    (["build", "bad.onnx", "--precision", "auto"], "needs a budget"),
    (["inspect", "none.engine", "--layer-times", "x.json"], "none.engine"),
    (["export", "none.onnx", "x.onnx", "--precision", "fp16"], "none.onnx"),
    (["export", "bad.onnx", "x.onnx"], "exported already"),
    (["export", "bad.onnx", "x.onnx", "--precision", "bf16", "--height", "64"], "exported already"),
    (["export", "{checkpoint}", "x.onnx", "--half-weights", "--precision", "fp16"], "a form of its own"),
    (["export", "{checkpoint}", "x", "--half-weights"], "x.onnx"),
    (["choose-precision", "bad.onnx", "--study", "--data", "outside"], "bad.onnx"),
    (["choose-precision", "bad.onnx", "--study", "--data", "outside", "--plot", "x.svg"], "x.png"),
    (["choose-precision", "bad.onnx", "x.onnx", "--study", "--data", "outside"], "leave x.onnx"),
    (["choose-precision", "bad.onnx", "--data", "outside"], "--study"),
    (["choose-precision", "nasa-super1", "x.onnx", "--data", "outside"], "needs a limit"),
    (["choose-precision", "nasa-super1", "x.onnx", "--data", "outside", "--max-miou-drop", "1"], "phase 0"),
    (["choose-precision", "none.onnx", "x", "--data", "outside", "--max-miou-drop", "1"], "must end with .onnx"),
    (["choose-precision", "bad.onnx", "bad.onnx", "--data", "outside", "--max-miou-drop", "1"], "would overwrite"),
    (["choose-precision", "bad.onnx", "empty", "--data", "outside", "--max-miou-drop", "1"], "empty"),
    (["choose-precision", "bad.onnx", "bad.png/x.onnx", "--data", "outside", "--max-miou-drop", "1"], "bad.png"),
    (["choose-precision", "bad.onnx", "x.onnx", "--data", "outside", "--max-miou-drop", "1", "--precision", "fp8",
      "--device", "agx-orin"], "has no FP8"),
    (["choose-precision", "bad.onnx", "--study", "--data", "outside", "--json", "empty"], "empty is a folder"),
    (["export", "bad.onnx", "x", "--precision", "fp16"], "must end with .onnx"),
    (["export", "bad.onnx", "bad.onnx", "--precision", "fp16"], "would overwrite"),
    (["calibrate", "nasa-super1", "x", "--data", "outside"], "x.onnx"),
    (["build", "nasa-super1", "--precision", "int8"], "calibrat"),
    (["compare", "nasa-super1", "none.onnx", "--images", "outside"], "none.onnx"),
    (["compare", "nasa-super1", "nasa-super1"], "--images"),
    (["compare", "nasa-super1", "{checkpoint}", "--images", "outside"], "phase 0"),
    (["compare", "outside/masks/test", "empty"], "no label map of the same name"),
    (["inspect", "bad.engine"], "bad.engine"),
    (["inspect", "bad.onnx"], "bad.onnx"),
    (["segment", "empty", "--output", "out", "--model", "{checkpoint}"], "empty"),
    (["segment", "outside/images/test", "--output", "out", "--model", "bad.onnx"], "bad.onnx"),
    (["segment", "outside/images/test", "--output", "out", "--model", "bad.engine"], "bad.engine"),
    (["segment", "outside/images/test", "--model", "{checkpoint}", "--engine", "onnxruntime"], "onnx"),
    (["segment", "outside/images/test", "--model", "nasa-super9"], "nasa-super1"),
    (["segment", "outside/images/test", "--write", "png,jpg"], "'jpg'"),
    (["segment", "outside/images/test", "--write", ",", "--no-overlay"], "nothing is to be written"),
    (["segment", "outside/images/test", "--background", "cheese"], "matrix, secondary, tertiary"),
    (["segment", "outside/images/test", "--pixel-size", "5"], "'5' is no length"),
    (["segment", "outside/images/test", "--tile", "large"], "'large'"),
    (["segment", "outside/images/test", "--info-bar", "-3"], "'-3'"),
    (["segment", "outside/images/test", "--intensity-range", "9", "3"], "black < white"),
    (["segment", "outside/images/test", "--percentiles", "9", "3"], "percentiles"),
    (["segment", "outside/images/test", "--window", "1", "9", "--percentiles", "1", "99"], "not both"),
    (["benchmark", "empty", "--data", "outside"], "empty"),
    (["benchmark", "{checkpoint}", "--data", "outside", "--size", "10x10"], "10"),
    (["benchmark", "{checkpoint}", "--data", "outside", "--measure", "layers", "--latency-only"], "--latency-only"),
    (["benchmark", "bad.onnx", "--data", "outside/images/test", "--baselines"], "--baselines needs a checkpoint"),
    (["benchmark", "{checkpoint}", "--data", "outside", "--against", "none.json"], "none.json"),
    (["benchmark", "report", "none.json"], "none.json"),
    (["benchmark", "report", "bad.yaml"], "bad.yaml"),
    (["datasets", "check", "none"], "none"),
    (["datasets", "list", "nosuch"], "nosuch"),
    (["datasets", "get", "mudrocknet", "new"], "digitalrocksportal"),
    (["datasets", "get", "nasa-super1", "outside"], "outside"),
    (["datasets", "convert", "nasa-super1", "empty", "new"], "empty"),
    (["convert-checkpoint", "bad.pth", "x.safetensors"], "bad.pth"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD, ids=[" ".join(args) for args, _ in BAD])
def test_bad_input_is_one_sentence(
    run: Run, checkpoint: Path, tmp_path: Path, arguments: list[str], named: str
) -> None:
    prepare(tmp_path)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    code, _, err = run(*(part.format(repo=REPOSITORY, checkpoint=checkpoint) for part in arguments))
    assert code in (1, 2), err
    message = err.strip().splitlines()[-1]
    assert message.startswith("error: "), err
    assert named in message
    assert "Traceback" not in err
    left = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert not left, f"left behind: {left}"


def test_unknown_options_and_choices_are_usage_errors(run: Run) -> None:
    for arguments in (["trian"], ["build", "x.onnx", "--precision", "int4"], ["segment"], ["export", "--what"]):
        code, _, err = run(*arguments)
        assert code == 2
        assert "Error" in err
        assert "Traceback" not in err


def test_dataset_with_faults_is_reported_and_refused(run: Run, tmp_path: Path) -> None:
    prepare(tmp_path)
    code, out, _ = run("datasets", "check", "outside", "--contact-sheet", "sheet.png")
    assert code == 1
    assert "7" in out
    assert (tmp_path / "sheet.png").stat().st_size > 0


def test_one_bad_micrograph_does_not_stop_the_others(run: Run, tmp_path: Path) -> None:
    """With the model that is used when none is named; where nothing could be segmented, nothing is written."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 84), dtype=np.uint8)).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n truncated")
    code, out, _ = run("segment", "broken.png")
    assert (code, "written to" in out, (tmp_path / "labels").exists()) == (1, False, False)
    code, out, _ = run("segment", "good.png", "broken.png")
    assert code == 1
    for words in ("1 segmented", "broken.png", "written to labels"):
        assert words in out
    with Image.open(tmp_path / "labels" / "good.png") as labels:
        assert (labels.size, labels.mode) == ((84, 60), "P")
        assert set(np.unique(np.asarray(labels))) <= {0, 1, 2}


def test_segment_writes_other_kinds_and_ends_with_a_summary(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    image = np.random.default_rng(0).integers(0, 256, (40, 200), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    command = ("segment", "a.png", "--model", checkpoint, "--write", "ome-tiff,regions,grains", "--pixel-size",
               "2.5 nm", "--separate", "phase 1",
               "--percentiles", "1", "99", "--background", "phase 0", "--smallest", "2", "--tile", "whole")  # fmt: skip
    code, out, err = run(*command)
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert out.startswith("1 segmented, 0 already done, 0 failed")
    assert "overall, by area: phase 0 " in out
    assert ["regions", "NAME.regions.csv"] in lines
    written = sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "labels").rglob("*") if path.is_file())
    names = ("a.grains.csv", "a.ome.tif", "a.regions.csv", "fractions.csv", "overlays/a.png", "segmentations.jsonl")
    assert written == [f"labels/{name}" for name in names]
    entry = json.loads((tmp_path / "labels" / "segmentations.jsonl").read_text())
    assert (entry["pixel_size_m"], entry["job"]["tile"]) == (2.5e-9, "whole")
    assert entry["settings"]["grains"] == {"background": ["phase 0"], "smallest": 2, "separate": ["phase 1"]}
    assert 0 < entry["window"][0] < entry["window"][1] < 255
    code, out, _ = run(*command)
    assert (code, out.splitlines()[0]) == (0, "0 segmented, 1 already done, 0 failed")
    pytest.importorskip("matplotlib")
    code, out, err = run("grains", "labels", "--output", "sizes")
    assert code == 0, err
    assert out.endswith(f"written to {Path('sizes', 'grains.csv')} and {Path('sizes', 'grains.png')}\n")
    assert run("grains", "sizes")[0] == 2


def test_rank_writes_the_order_of_pictures(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    for seed in range(3):
        image = np.random.default_rng(seed).integers(0, 60 + 90 * seed, (40, 48), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / f"{seed}.png")
    code, out, err = run("rank", "1.png", "2.png", "--labeled", "0.png", "--model", checkpoint, "-o", "order.csv")
    assert code == 0, err
    assert out.startswith("2 ranked, 0 failed\n")
    assert out.endswith("written to order.csv\n")
    assert sorted(path.name for path in read_ranking(tmp_path / "order.csv")) == ["1.png", "2.png"]
    code, _, err = run("rank", "0.png", "--labeled", "0.png", "--model", checkpoint)
    assert code == 2
    assert "give some that are not labeled" in err


def test_all_kinds_are_named_with_others() -> None:
    every = ["png", "tiff", "ome-tiff", "ome-zarr", "rois", "regions", "grains"]
    assert parse_kinds("rois, png") == ["png", "rois"]
    assert SegmentOptions(write=parse_kinds("all"), confidence=True).settings().write == [*every, "confidence"]
    with pytest.raises(UsageError, match="not 'jpg'"):
        parse_kinds("all,jpg")


def test_a_figure_that_does_not_exist_is_null_in_json(run: Run, tmp_path: Path) -> None:
    for folder in ("masks", "labels"):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.full((8, 8), 255 if folder == "masks" else 0, np.uint8)).save(tmp_path / folder / "a.png")
    code, _, err = run("compare", "masks", "labels", "--json", "figures.json")
    assert code == 0, err
    assert json.loads((tmp_path / "figures.json").read_text(), parse_constant=pytest.fail)["agreement"] is None


def test_an_interrupt_ends_with_one_line_and_segment_says_how_far_it_came(
    run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path)
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "a.png")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hpddrnet_trt.inference.Segmenter.segment_many", interrupted)
    code, out, err = run("segment", "a.png", "--model", checkpoint)
    assert (code, err.strip().splitlines()[-1]) == (130, "error: interrupted")
    assert out.startswith("0 segmented, 0 already done, 0 failed, interrupted: run again to continue")
    assert not list(tmp_path.glob("labels/*"))
    monkeypatch.setattr("hpddrnet_trt.accuracy.assess", interrupted)
    code, _, err = run("evaluate", checkpoint, "--data", "outside")
    assert (code, err.strip().splitlines()[-1]) == (130, "error: interrupted")


def test_sigterm_ends_segment_with_its_summary(tmp_path: Path, checkpoint: Path) -> None:
    for index in range(300):
        Image.fromarray(np.full((64, 64), index % 200, np.uint8)).save(tmp_path / f"{index}.png")
    command = [sys.executable, "-m", "hpddrnet_trt", "segment", tmp_path, "--model", checkpoint, "--output", "out"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        journal = tmp_path / "out" / "segmentations.jsonl"
        deadline = time.monotonic() + 60
        while not journal.is_file() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.terminate()
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    done = len(journal.read_text().splitlines())
    assert 0 < done < 300
    assert out.startswith(f"{done} segmented, 0 already done, 0 failed, interrupted: run again to continue")
    assert len(list((tmp_path / "out").glob("*.png"))) == done
    assert "%|" not in err  # no bar where there is no terminal


def test_segment_tells_scripts_and_keeps_quiet(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((48, 64), 90, np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    code, out, err = run("segment", "a.png", "b.png", "--model", checkpoint, "--json", "--no-overlay")
    told = json.loads(out)
    assert (code, told["output"], [Path(path).name for path in told["written"]]) == (1, "labels", ["a.png"])
    assert told["failed"][0]["file"].endswith("b.png")
    assert sum(told["fractions"].values()) == pytest.approx(1)
    assert "b.png" in err
    command = [sys.executable, "-m", "hpddrnet_trt", "segment", "a.png", "b.png", "--model", checkpoint, "--no-overlay"]
    quiet = subprocess.run([*command, "--quiet"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (quiet.returncode, quiet.stderr) == (1, "")
    assert quiet.stdout.startswith("0 segmented, 1 already done, 1 failed")
    lines = run("watch", tmp_path, "--model", checkpoint, "--output", "labels", "--json", "--stop-after", "0",
                "--settle", "0", "--patience", "0", "-q", "--no-overlay")[1].splitlines()  # fmt: skip
    told = {Path(line["file"]).name: line["event"] for line in map(json.loads, lines)}
    assert told == {"a.png": "already done", "b.png": "failed"}
    code, _, err = run("segment", "a.png", "-v", "-q")
    assert (code, err) == (2, "error: give either --verbose or --quiet, not both\n")
    code, out, _ = run("inspect", checkpoint, "-v")  # after the command
    assert code == 0, out


def test_messages_have_colour_on_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert _colored("error", "red") == "error"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert _colored("error", "red") != "error"
    monkeypatch.setenv("NO_COLOR", "1")
    assert _colored("error", "red") == "error"


def test_inspect_prints_the_description(run: Run, checkpoint: Path) -> None:
    code, out, _ = run("inspect", checkpoint)
    assert code == 0
    assert "checkpoint" in out.splitlines()[0]
    assert "phase 0, phase 1, phase 2" in out
    code, out, _ = run("inspect", "--json", checkpoint)
    assert code == 0
    assert read_manifest(checkpoint).to_json() in out
    code, out, _ = run("inspect", "--json", "nasa-super1")
    assert code == 0
    assert [entry["name"] for entry in json.loads(out)["classes"]] == ["matrix", "secondary", "tertiary"]


def test_inspect_says_that_an_engine_is_not_what_its_description_says(run: Run, tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "a.engine", locate("nasa-super1", ".onnx"))
    code, out, err = run("inspect", engine)
    assert code == 0, err
    assert "engine of tensorrt 10.9" in out
    os.truncate(engine, 1000)
    code, _, err = run("inspect", engine)
    assert code == 1
    assert "a.engine is truncated (1000 of 2800 bytes)" in err


def commands(group: Any, *before: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the words it is called by."""
    for name, command in group.commands.items():
        words = (*before, *name.split())
        if hasattr(command, "commands"):
            yield from commands(command, *words)
        else:
            yield words, command


COMMANDS = dict(commands(typer.main.get_command(cli.app)))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_is_the_docstring_with_every_option_explained_and_an_example_that_works(
    run: Run, words: tuple[str, ...]
) -> None:
    command = COMMANDS[words]
    code, out, _ = run(*words, "--help")
    assert code == 0
    first_line = (command.callback.__doc__ or "").strip().splitlines()[0]
    assert " ".join(first_line.split()) in " ".join(out.split())
    unexplained = [parameter.name for parameter in command.params if not (parameter.help or parameter.name == "help")]
    assert not unexplained
    line = command.epilog.strip("\b\n")
    program, *example = shlex.split(line.removeprefix("Example: "))
    assert [program, *example[: len(words)]] == ["hpddrnet-trt", *words]
    assert line in out
    command.make_context("example", example[len(words) :])  # these arguments exist


def test_the_list_of_commands(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for words in COMMANDS:
        assert f"  {words[0]} " in out
    assert [line for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")] == [
        "Options:", "Segment micrographs:", "Train and score:", "Make model files:", "Measure:",
    ]  # fmt: skip


@pytest.mark.parametrize("name", GONE)
def test_commands_that_have_gone_name_what_to_use(run: Run, name: str) -> None:
    code, _, err = run(*(["datasets"] if name == "show" else []), name, "some", "--arguments")
    assert code == 2
    assert err == f"error: the command `{name}` has gone; use {GONE[name]}\n"
    used = GONE[name].split("`")[1].split()
    assert any(tuple(used[: len(words)]) == words for words in COMMANDS)


@pytest.mark.parametrize(("old", "new"), OLD_SPELLINGS.items())
def test_old_spellings_of_options_still_work(old: str, new: str) -> None:
    users = [command for command in COMMANDS.values() if any(f"--{new}" in entry.opts for entry in command.params)]
    assert users
    for command in users:
        parent = typer.main.get_command(cli.app).make_context("hpddrnet-trt", ["engines"])
        required = [value for entry in command.params if entry.required for value in _given(entry)]
        entry = next(entry for entry in command.params if f"--{new}" in entry.opts)
        values = [entry.default if isinstance(entry.default, str) else "1"] * max(entry.nargs, 1)
        option = [f"--{old}", *([] if getattr(entry, "is_flag", False) else values)]
        context = command.make_context("command", [*option, *required], parent=parent)
        assert context.params[new.replace("-", "_")]


def _given(parameter: Any) -> list[str]:
    return ["x"] if parameter.param_type_name == "argument" else [parameter.opts[0], "x"]


@pytest.mark.parametrize(
    "recipe",
    ["train/train.py", "train/evaluate.py", "export/export_onnx.py", "export/calibrate.py", "export/build_engine.py",
     "export/choose_precision.py", "benchmarks/benchmark.py", "benchmarks/gpu_check.py",
     "benchmarks/live.py"],
)  # fmt: skip
def test_recipes_explain_themselves(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [recipe, "--help"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(REPOSITORY / recipe), run_name="__main__")
    assert not exit_.value.code
    assert "usage" in capfd.readouterr().out.lower()


def test_catalog_is_listed_and_shown(run: Run) -> None:
    for name, words in (([], ("nasa-super1", "10.1038/s41524-022-00878-5")), (["nasa-super1"], ("MIT", "not fetched"))):
        code, out, _ = run("datasets", "list", *name)
        assert code == 0
        assert all(word in out for word in words)


def test_a_checkpoint_is_shipped_in_two_files(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    code, out, err = run("export", checkpoint, "out/mine.onnx", "--half-weights")
    assert code == 0, err
    assert out.count("written: ") == 2
    for suffix in (".safetensors", ".onnx"):
        assert read_manifest(tmp_path / "out" / f"mine{suffix}").name == "mine"


def test_reports_of_a_saved_result(run: Run, tmp_path: Path) -> None:
    (saved,) = (REPOSITORY / "benchmarks" / "results").glob("amd-epyc-*.json")
    code, out, err = run("benchmark", "report", saved, "-o", "again", "--publish", "published", "--against", saved)
    assert code == 0, err
    assert "end-to-end latency" in out
    assert out.splitlines()[-1] == f"report: {Path('again') / 'report.html'}"
    assert (tmp_path / "again" / "report.html").read_text().startswith("<!")
    assert load_result(tmp_path / "again" / "result.json") == load_result(saved)
    assert {path.suffix for path in (tmp_path / "published").iterdir()} == {".json", ".html"}
    changes = out.partition("\nsince ")[2]
    assert "no difference" in changes
    assert not any(word in changes for word in ("faster", "slower"))


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("seg", ["segment"]), ("segment --eng", ["--engine"]), ("segment --engine openv", ["openvino"]),
     ("datasets ch", ["check"])],
)  # fmt: skip
def test_shells_complete_commands_options_and_values(
    run: Run, monkeypatch: pytest.MonkeyPatch, typed: str, offered: list[str]
) -> None:
    words = ["hpddrnet-trt", *typed.split()]
    monkeypatch.setenv("_HPDDRNET_TRT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    code, out, _ = run()
    assert (code, out.split()) == (0, offered)
