"""Is a picture like those of the training? What the network saw of it decides, however it went through."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from hpddrnet_trt import cli
from hpddrnet_trt.core.domain import NOT_KNOWN, Domain
from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.manifest import AxisRange, InputContract
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.inference.files import ResultSettings
from hpddrnet_trt.inference.folder import SegmentSummary, segment_paths
from hpddrnet_trt.inference.result import Segmentation
from hpddrnet_trt.inference.watch import Happened, WatchEvent, WatchSettings, watch_folder
from hpddrnet_trt.results.caption import _WARNING
from hpddrnet_trt.stream import Stream
from tests.toy import ToyEngine, grey_image, manifest, write_toy_onnx


def grey(level: int, height: int = 64, width: int = 96) -> npt.NDArray[np.uint8]:
    return np.full((height, width), level, np.uint8)


def ramp(height: int = 64, width: int = 96) -> npt.NDArray[np.uint8]:
    """From the toy's middle grey at the left to 20 levels more for every 8 pixels."""
    return np.tile((120 + 2.5 * np.arange(width)).clip(0, 255).astype(np.uint8), (height, 1))


def toy(output: str = "logits", engine: type[ToyEngine] = ToyEngine, **options: Any) -> Segmenter:
    description = {name: options.pop(name) for name in ("size", "input") if name in options}
    return Segmenter(engine(manifest(output, domain=True, **description)), **options)


@pytest.mark.parametrize(
    ("level", "state", "distance"),
    [(120, "familiar", 0), (150, "familiar", 1.5), (170, "unusual", 2.5), (220, "foreign", 5), (0, "foreign", 6)],
)
def test_the_distance_of_the_features_is_the_pictures(level: int, state: str, distance: float) -> None:
    domain = toy().segment(grey(level)).domain
    assert (domain.state, domain.distance) == (state, pytest.approx(distance, abs=1e-4))
    assert [cells.shape for cells in domain.cells] == [(8, 12)]


def test_a_model_without_statistics_does_not_know() -> None:
    assert Segmenter(ToyEngine()).segment(grey(0)).domain is NOT_KNOWN
    silent = manifest("logits", domain=True).replace(output={"kind": "logits"})  # statistics, and no features
    assert Segmenter(ToyEngine(silent)).segment(grey(0)).domain is NOT_KNOWN


def _many(segmenter: Segmenter, *images: npt.NDArray[np.uint8]) -> list[Domain]:
    results = list(segmenter.segment_many(images))
    return [result.domain for result in results if isinstance(result, Segmentation)]


@pytest.mark.parametrize("output", ["labels", "logits"])
def test_whole_in_tiles_in_batches_and_in_rows(output: str) -> None:
    """Tiles overlap, so a ramp, which is in no tile as a whole, keeps its median only about."""
    image, level = ramp(), grey(170)
    whole = toy(output).segment(image).domain
    assert whole.distance is not None
    tiled = toy(output, tile=32).segment(image)
    assert tiled.tiling is not None
    assert len(tiled.domain.cells) == tiled.tiling.tiles
    assert tiled.domain.distance == pytest.approx(whole.distance, abs=0.3)
    for segmenter in (toy(output), toy(output, tile=32), toy(output, confidence=output == "logits")):
        for domains in (
            [result.domain for result in segmenter.segment_batch([level, image, level])], _many(segmenter, level, image)
        ):  # fmt: skip
            assert [domain.state for domain in domains[:2]] == ["unusual", "foreign"]
            assert domains[0].distance == pytest.approx(2.5, abs=1e-4)


@pytest.mark.parametrize("mode", ["flip", "multiscale"])
def test_averaged_views_do_not_count(mode: Any) -> None:
    """Smaller and larger views are no pictures of the magnification that the model was trained at."""
    single, averaged = (toy(mode=views).segment(ramp()).domain for views in ("single", mode))
    assert averaged == single
    assert np.array_equal(averaged.cells[0], single.cells[0])
    (one, other) = (toy(mode=views, tile=32).segment(ramp()).domain for views in ("single", mode))
    assert one == other
    assert _many(toy(mode=mode), ramp(), ramp()) == [single, single]


def test_the_guard_sees_what_the_network_sees() -> None:
    """A picture that is resized first is judged in that size, one with a grey window in its levels."""
    assert toy(resize=(48, 32)).segment(ramp()).domain.cells[0].shape == (4, 6)
    assert toy(window=(0.0, 510.0)).segment(grey(240)).domain.distance == pytest.approx(0, abs=0.05)


def test_what_pads_a_picture_is_not_judged() -> None:
    """A fixed input shows mirror images beside a small picture, and in a batch copies of the last one."""
    expected = toy().segment(ramp(24, 40)).domain
    fixed = toy(size=64).segment(ramp(24, 40)).domain
    assert [cells.shape for cells in fixed.cells] == [(3, 5)]
    assert fixed.distance == pytest.approx(expected.distance, abs=1e-5)
    contract = InputContract(batch=AxisRange(minimum=4, maximum=4))
    batch = toy(input=contract)
    assert [domain.distance for domain in _many(batch, grey(140), grey(160), grey(180))] == pytest.approx([1, 2, 3])
    assert toy(size=64).segment(grey(160, 1, 1)).domain.distance == pytest.approx(2, abs=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_features_that_are_no_numbers_are_foreign(value: float) -> None:
    class Overflowed(ToyEngine):
        def infer(self, images: npt.NDArray[Any]) -> Any:
            found = super().infer(images)
            assert found.domain_features is not None
            found.domain_features[:] = value
            return found

    result = toy(engine=Overflowed).segment(grey(120))
    assert result.domain.state == "foreign"
    json.dumps(result.record(), allow_nan=False)


# --- files


PICTURES = {"home": 120, "near": 170, "far": 220}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A picture of each state, called after it, large enough for a caption."""
    source = tmp_path / "in"
    source.mkdir()
    for name, level in PICTURES.items():
        Image.fromarray(grey(level, 96, 256)).save(source / f"{name}.png")
    return source


def _run(segmenter: Segmenter, folder: Path, **options: Any) -> SegmentSummary:
    return segment_paths(segmenter, folder, folder.parent / "out", ResultSettings(**options), progress=False)


def _table(folder: Path) -> dict[str, tuple[str, str]]:
    with (folder.parent / "out" / "fractions.csv").open(encoding="utf-8", newline="") as stream:
        return {row["image"]: (row["domain"], row["domain_distance"]) for row in csv.DictReader(stream)}


def test_a_folder_says_which_pictures_are_unlike_the_training(folder: Path) -> None:
    for _ in range(2):  # and again when they are done already
        summary = _run(toy(), folder)
        assert (summary.exit_code, summary.unusual, summary.foreign) == (0, ["near"], ["far"])
        (line,) = [line for line in str(summary).splitlines() if "unlike" in line]
        assert line == (
            "unlike the pictures of the training: 1 foreign to the model (far), 1 unusual for it (near); look at their "
            "overlays before their figures"
        )
        assert (summary.record()["unusual"], summary.record()["foreign"]) == (["near"], ["far"])
    assert _table(folder) == {"home": ("familiar", "0"), "near": ("unusual", "2.5"), "far": ("foreign", "5")}
    out = folder.parent / "out"
    entries = [json.loads(line) for line in (out / "segmentations.jsonl").read_text().splitlines()]
    assert {entry["name"]: entry["domain"]["state"] for entry in entries} == {
        "home": "familiar", "near": "unusual", "far": "foreign"
    }  # fmt: skip
    for name in PICTURES:
        with Image.open(out / "overlays" / f"{name}.png") as picture:
            warned = (np.asarray(picture.convert("RGB"))[96:] == _WARNING).all(axis=2).any()
        assert warned == (name != "home")


def test_an_old_model_and_an_old_journal_do_not_know_and_do_not_nag(folder: Path) -> None:
    summary = _run(Segmenter(ToyEngine()), folder)
    assert (summary.unusual, summary.foreign) == ([], [])
    assert "training" not in str(summary)
    assert set(_table(folder).values()) == {("not known", "")}
    journal = folder.parent / "out" / "segmentations.jsonl"
    old = [json.loads(line) for line in journal.read_text().splitlines()]
    assert {str(entry.pop("domain")["state"]) for entry in old} == {"not known"}
    journal.write_text("".join(f"{json.dumps(entry)}\n" for entry in old))
    assert len(_run(Segmenter(ToyEngine()), folder).skipped) == 3
    assert set(_table(folder).values()) == {("not known", "")}


def test_foreign_pictures_can_be_refused(folder: Path) -> None:
    for wanted in (["far.png"], ["far.png"]):  # also when the others are done
        summary = _run(toy(), folder, refuse_foreign=True)
        assert [path.name for path, _ in summary.failed] == wanted
        assert (summary.exit_code, summary.foreign, summary.unusual) == (1, [], ["near"])
        assert summary.failed[0][1] == (
            f"{folder / 'far.png'} is foreign to the model, at distance 5, and nothing is written of it; "
            "without --refuse-foreign it is"
        )
    assert len(summary.skipped) == 2
    assert set(_table(folder)) == {"home", "near"}
    assert not list((folder.parent / "out").rglob("far*"))
    assert _run(toy(), folder).exit_code == 0
    again = _run(toy(), folder, refuse_foreign=True)  # what was written before does not make it done
    assert ([path.name for path, _ in again.failed], len(again.skipped)) == (["far.png"], 2)
    assert "far" not in str(again.fractions)


def test_only_a_model_that_knows_can_refuse(folder: Path) -> None:
    silent = manifest("logits", domain=True).replace(output={"kind": "logits"})
    for description in (manifest("logits"), silent):
        with pytest.raises(UsageError, match=r"'toy' does not know which pictures are foreign .* describe-domain"):
            _run(Segmenter(ToyEngine(description)), folder, refuse_foreign=True)


def test_a_watched_folder_says_it_too_and_refuses_at_once(folder: Path) -> None:
    def watched(**options: Any) -> dict[str, WatchEvent]:
        events: list[WatchEvent] = []
        settings = WatchSettings(settle_s=0, patience_s=60, poll_s=0.01, stop_after_s=0)
        out = folder.parent / f"out{len(options)}"
        watch_folder(toy(), folder, out, ResultSettings(overlay=False, **options), settings, on_event=events.append)
        return {event.path.stem: event for event in events}

    events = watched()
    assert [events[name].record()["domain"]["state"] for name in PICTURES] == ["familiar", "unusual", "foreign"]
    events = watched(refuse_foreign=True)
    assert (events["near"].happened, events["far"].happened) == (Happened.SEGMENTED, Happened.FAILED)
    assert "far.png is foreign to the model" in str(events["far"].reason)
    assert not list((folder.parent / "out1").rglob("far*"))


@pytest.mark.parametrize("command", [["segment"], ["watch", "--stop-after", "0", "--settle", "0"]])
def test_the_commands(
    folder: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    model = write_toy_onnx(folder.parent / "toy.onnx", manifest(domain=True))
    name, *options = command

    def run(*more: str) -> tuple[Any, str]:
        arguments = [name, str(folder), *options, "--model", str(model), "--engine", "onnxruntime", *more]
        monkeypatch.setattr(sys, "argv", ["hpddrnet-trt", *arguments])
        monkeypatch.chdir(folder.parent)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, capfd.readouterr().out

    code, said = run("--output", "out")
    assert code == 0
    assert ("1 foreign to the model (far)" if name == "segment" else "(foreign to the model, at distance 5)") in said
    code, said = run("--output", "refused", "--refuse-foreign")
    assert code == 1
    assert "far.png is foreign to the model" in said
    assert not list((folder.parent / "refused").rglob("far*"))


def test_results_say_it_wherever_they_go() -> None:
    far, home = toy().segment(grey(220)), toy().segment(grey(120))
    assert str(far).splitlines()[-1].strip() == "foreign to the model, at distance 5"
    assert "model, at" not in str(home)
    assert far.record()["domain"] == {"state": "foreign", "distance": pytest.approx(5, abs=1e-4)}
    assert Segmenter(ToyEngine()).segment(grey(0)).record()["domain"] == {"state": "not known", "distance": None}


def test_streams_count_their_frames_by_state() -> None:
    frames = [grey(level) for level in (120, 125, 170, 220, 0)] + [grey_image(3, 4)[None]]  # the last is no picture
    with Stream(toy, policy="block", capacity=8) as stream:
        for frame in frames:
            stream.submit(frame)
        results = [result for _, result in zip(frames, stream.results(20), strict=False)]
        counts = stream.statistics()
    found = [result.segmentation.domain.state for result in results if result.segmentation is not None]
    assert found == ["familiar", "familiar", "unusual", "foreign", "foreign"]
    assert counts.domains == {"familiar": 2, "unusual": 1, "foreign": 2}
    assert json.loads(json.dumps(counts.as_dict()))["domains"] == counts.domains
