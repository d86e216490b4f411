"""Networks of others: their files get our contract, labels stay theirs, and everything works on them."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch.nn.functional as F
from onnx import TensorProto, helper

from hpddrnet_trt import Stream, cli
from hpddrnet_trt.accuracy.acceptance import AcceptanceCheck, Budget
from hpddrnet_trt.accuracy.build import build_verified
from hpddrnet_trt.accuracy.evaluate import assess
from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.core.manifest import AdoptedNetwork, DataRecord, Manifest, Normalization, read_manifest
from hpddrnet_trt.data.datasets import FolderDataset, find_images
from hpddrnet_trt.data.simulate import simulate
from hpddrnet_trt.export.adopt import adopt
from hpddrnet_trt.export.adopt_settings import AdoptSettings, parse_classes, parse_normalization
from hpddrnet_trt.export.calibrate import CalibrationSettings, calibrate
from hpddrnet_trt.export.convert import convert_precision
from hpddrnet_trt.export.domain import describe_domain
from hpddrnet_trt.inference import load_segmenter
from tests.graph.parsed_rtx import needs_rtx
from tests.stranger import MEAN, STD, Ending, normalized, stranger, write_stranger
from tests.tiny_export import frames
from tests.tiny_onnx import QUIET

pytestmark = pytest.mark.usefixtures("one_thread")
FIXED = (1, 64, 96)
ENDINGS: tuple[tuple[Ending, bool], ...] = (
    ("low", True), ("low", False), ("full", True), ("softmax", True), ("argmax", True), ("binary", True),
    ("sigmoid", True),
)  # fmt: skip


def settings(classes: str = "matrix,pore,grain", **others: Any) -> AdoptSettings:
    return AdoptSettings(parse_classes(classes), parse_normalization(f"{MEAN}/{STD}"), **others)


def true_labels(ending: Ending, grey: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """By PyTorch."""
    scores = stranger(ending)(normalized(grey))
    if ending in ("low", "binary"):
        scores = F.interpolate(scores, size=grey.shape[1:], mode="bilinear")
    if ending in ("binary", "sigmoid"):
        return (scores[:, 0] > (0.5 if ending == "sigmoid" else 0)).numpy()
    return (scores[:, 0] if ending == "argmax" else scores.argmax(1)).numpy()


@pytest.mark.parametrize(("ending", "old"), ENDINGS)
def test_labels_are_the_strangers(tmp_path: Path, ending: Ending, old: bool) -> None:
    size = None if old else (1, 96, 128)  # with dynamic sizes the newer exporter takes seconds
    source = write_stranger(tmp_path / "theirs.onnx", ending, old=old, size=size)
    classes = "matrix,pore" if ending in ("binary", "sigmoid") else "matrix,pore,grain"
    manifest = adopt(source, tmp_path / "ours.onnx", settings(classes))
    assert manifest == read_manifest(tmp_path / "ours.onnx")
    assert manifest.validation[0].values["agreement"] > 0.9999
    grey = frames(2, 96, 128)[:, 0]
    with load_segmenter(tmp_path / "ours.onnx", precision="file", confidence=True, threads=1) as segmenter:
        found = [segmenter.segment(image) for image in grey]
    expected = true_labels(ending, grey)
    assert len(np.unique(expected)) > 1
    assert np.mean([one.labels for one in found] == expected) > 0.999
    assert found[0].confidence is not None  # the scores before the end are found


def test_fixed_sizes_run_in_tiles(tmp_path: Path) -> None:
    source = write_stranger(tmp_path / "theirs.onnx", size=FIXED, channels=1)
    manifest = adopt(source, tmp_path / "ours.onnx", settings(data=DataRecord(name="rock", crop=(512, 512))))
    assert manifest.input is not None
    assert (str(manifest.input.height), str(manifest.input.width), manifest.input.multiple) == ("64", "96", 32)
    with load_segmenter(tmp_path / "ours.onnx", precision="file", threads=1) as segmenter:
        found = segmenter.segment(frames(1, 150, 150)[0, 0])
    assert found.labels.shape == (150, 150)
    assert found.tiling is not None
    assert found.tiling.method == "blended scores"


def test_one_of_several_outputs(tmp_path: Path) -> None:
    source, target = write_stranger(tmp_path / "theirs.onnx", "aux", size=FIXED), tmp_path / "ours.onnx"
    with pytest.raises(UsageError, match=r"several outputs .* out \[1, 3, 16, 24\], aux .*--scores"):
        adopt(source, target, settings())
    with pytest.raises(UsageError, match="no output 'logits'; it has: out"):
        adopt(source, target, settings(scores="logits"))
    assert not target.exists()
    adopt(source, target, settings(scores="aux"))
    (resize,) = [node for node in onnx.load(str(target)).graph.node if node.name == "output.enlarge/Resize"]
    scales = {entry.name: entry for entry in onnx.load(str(target)).graph.initializer}[resize.input[2]]
    assert onnx.numpy_helper.to_array(scales).tolist() == [1, 1, 8, 8]


def test_weights_beside_the_file(tmp_path: Path) -> None:
    source = write_stranger(tmp_path / "theirs.onnx", size=FIXED)
    model = onnx.load(str(source))
    onnx.save(model, str(source), save_as_external_data=True, location="theirs.data", size_threshold=0)
    adopt(source, tmp_path / "ours.onnx", settings())
    (tmp_path / "theirs.data").unlink()
    with pytest.raises(BadInputFile, match=r"weights in another file, which cannot be read .*keep both in one folder"):
        adopt(source, tmp_path / "other.onnx", settings())
    for entry in (model := onnx.load(str(source), load_external_data=False)).graph.initializer:
        entry.external_data[0].value = "../../secret"
    onnx.save(model, str(source))
    with pytest.raises(BadInputFile, match="cannot be read"):
        adopt(source, tmp_path / "other.onnx", settings())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.onnx", "theirs.onnx"]


def test_wrong_files_are_refused_in_a_sentence(tmp_path: Path) -> None:
    source, target = write_stranger(tmp_path / "theirs.onnx", size=FIXED), tmp_path / "ours.onnx"
    original = onnx.load(str(source))

    def refused(why: str, kind: type[UserError] = BadInputFile, **others: Any) -> None:
        with pytest.raises(kind, match=why) as caught:
            adopt(source, target, settings(**others))
        assert "\n" not in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["theirs.onnx"]

    refused("gives no scores of the 2 classes a, b, and no labels: its outputs are result", UsageError, classes="a,b")
    refused("a confidence map goes with labels", UsageError, classes="a,b,c", output="logits", confidence=True)
    model = onnx.ModelProto()
    model.CopyFrom(original)
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1]))
    onnx.save(model, str(source))
    refused("has the inputs input, mask")
    model.CopyFrom(original)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4
    onnx.save(model, str(source))
    refused("4 channels|cannot open|is refused")
    model.CopyFrom(original)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 1 << 20
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 1 << 20
    onnx.save(model, str(source))
    refused("a size that cannot be|cannot open")
    model.CopyFrom(original)
    model.graph.initializer[0].data_type = TensorProto.FLOAT16
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[::2]
    onnx.save(model, str(source))
    refused("FP16 weights")
    model.CopyFrom(original)
    model.graph.node[0].domain = "mmdeploy"
    model.opset_import.append(helper.make_opsetid("mmdeploy", 1))
    onnx.save(model, str(source))
    refused("cannot open|could not be brought")
    source.write_bytes(original.SerializeToString()[:-100])
    refused("damaged|refused")


def test_channels_last_and_whole_numbers_in(tmp_path: Path) -> None:
    """As TensorFlow's networks come, and as those with their own normalization do."""
    source, target = write_stranger(tmp_path / "theirs.onnx", size=FIXED), tmp_path / "ours.onnx"
    grey = frames(1, 64, 96)[:, 0]
    expected = true_labels("low", grey)
    model = onnx.load(str(source))
    graph = model.graph
    (image,), (result,) = graph.input, graph.output
    nodes = [
        helper.make_node("Transpose", ["last"], ["input"], perm=[0, 3, 1, 2]), *graph.node,
        helper.make_node("Transpose", ["result"], ["scores"], perm=[0, 2, 3, 1]),
    ]  # fmt: skip
    image.CopyFrom(helper.make_tensor_value_info("last", TensorProto.FLOAT, [1, 64, 96, 3]))
    result.CopyFrom(helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 16, 24, 3]))
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, str(source))
    adopt(source, target, settings())
    with load_segmenter(target, precision="file", threads=1) as segmenter:
        assert (segmenter.segment(grey[0]).labels == expected[0]).mean() > 0.999

    constants = {"mean": np.float32(255 * MEAN), "std": np.float32(255 * STD)}
    graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    image.CopyFrom(helper.make_tensor_value_info("bytes", TensorProto.UINT8, [1, 64, 96, 3]))
    nodes = [
        helper.make_node("Cast", ["bytes"], ["levels"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["levels", "mean"], ["shifted"]), helper.make_node("Div", ["shifted", "std"], ["last"]),
        *graph.node,
    ]  # fmt: skip
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, str(source))
    adopt(source, target, AdoptSettings(parse_classes("a,b,c"), parse_normalization("none")))
    with load_segmenter(target, precision="file", threads=1) as segmenter:
        assert (segmenter.segment(grey[0]).labels == expected[0]).mean() > 0.999


def test_values_that_are_not_numbers(tmp_path: Path) -> None:
    source = write_stranger(tmp_path / "theirs.onnx", "nan", size=FIXED)
    with pytest.raises(BadInputFile, match="not finite for a micrograph; check --normalization"):
        adopt(source, tmp_path / "ours.onnx", settings())


def test_a_wrong_normalization_is_suspected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_stranger(tmp_path / "theirs.onnx", size=FIXED)
    wrong = AdoptSettings(parse_classes("a,b,c"), parse_normalization("none"))
    with caplog.at_level(logging.WARNING):
        adopt(source, tmp_path / "ours.onnx", wrong)
    assert "is the normalization the one of its training?" in caplog.text


@pytest.mark.parametrize(
    ("text", "mean", "std"),
    [
        ("imagenet", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        ("0.485,0.456,0.406/0.229,0.224,0.225", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        ("123.675,116.28,103.53/58.395,57.12,57.375", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        ("0.5/0.5", (127.5,) * 3, (127.5,) * 3),
        ("unit", (0,) * 3, (255,) * 3),
        ("0/255", (0,) * 3, (255,) * 3),
    ],
)
def test_units_of_a_normalization_are_told_apart(text: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    found = parse_normalization(text)
    assert found.mean == pytest.approx(mean)
    assert found.std == pytest.approx(std)


@pytest.mark.parametrize("text", ["0/1", "0.5/58", "120/0.5", "1,2/3", "x", "5/0", "nan/1", "1/2/3", ""])
def test_ambiguous_or_wrong_normalizations_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"normalization '.*(unit|none)"):
        parse_normalization(text)


def test_channel_order(tmp_path: Path) -> None:
    source = write_stranger(tmp_path / "theirs.onnx", size=FIXED)
    normalization = Normalization(mean=(100, 110, 120), std=(50, 60, 70))
    for order, first in ("rgb", (100, 50)), ("bgr", (120, 70)):
        adopt(source, tmp_path / "m.onnx", AdoptSettings(parse_classes("a,b,c"), normalization, order))  # type: ignore[arg-type]
        constants = {
            entry.name: onnx.numpy_helper.to_array(entry)
            for entry in onnx.load(str(tmp_path / "m.onnx")).graph.initializer
        }
        assert constants["input.factor"].ravel()[0] == pytest.approx(1 / first[1])
        assert constants["input.shift"].ravel()[0] == pytest.approx(-first[0] / first[1])


def test_classes_and_colors() -> None:
    first, second = parse_classes(" matrix, pore=#d55E00")
    assert (first.name, second.name, second.color) == ("matrix", "pore", (0xD5, 0x5E, 0))
    for text in ("a,a", "a,,b", "a=red,b", "a=#12,b"):
        with pytest.raises(UsageError, match="not a name of its own"):
            parse_classes(text)


def test_an_adopted_description() -> None:
    network = AdoptedNetwork(kind="adopted", name="pidnet-s", num_classes=2)
    manifest = Manifest(network=network, classes=parse_classes("a,b"))
    again = Manifest.model_validate_json(manifest.to_json())
    assert again == manifest
    assert isinstance(again.network, AdoptedNetwork)
    with pytest.raises(ValueError, match="2 classes are described but the network has 3"):
        manifest.replace(network=AdoptedNetwork(kind="adopted", num_classes=3))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_stranger(tmp_path / "theirs.onnx", size=FIXED)
    target = tmp_path / "ours.onnx"

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["hpddrnet-trt", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return ended.value.code or 0, said.out + said.err  # type: ignore[return-value]

    adoption = ["adopt", str(source), str(target), "--classes", "a,b,c"]
    code, said = call(*adoption)
    assert (code, "give --normalization" in said) == (2, True)
    code, said = call(*adoption, "--normalization", "unit", "--tile", "99999")
    assert (code, "training data cannot be so" in said) == (2, True)
    assert not target.exists()
    about = ["--normalization", f"{MEAN}/{STD}", "--tile", "512", "--pixel-size", "5nm"]
    code, said = call(*adoption, *about)
    assert (code, "adoption parity" in said) == (0, True)
    data = read_manifest(target).data
    assert data is not None
    assert (data.crop, data.pixel_size_m) == ((512, 512), (5e-9, 5e-9))
    code, said = call("inspect", str(target))
    assert (code, "adopted from theirs.onnx" in said) == (0, True)


@needs_rtx
def test_everything_works_on_it(tmp_path: Path) -> None:
    """Calibration, FP16, an INT8 engine behind the accuracy gate, class scores in tiles, and frames of a stream."""
    dataset = tmp_path / "data"
    for split in ("train", "test"):
        for seed in range(2):
            grey = simulate(96, 128, [seed, len(split)])[0]
            for kind, plane in ("images", grey), ("masks", true_labels("full", grey[None])[0]):
                (dataset / kind / split).mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(dataset / kind / split / f"{seed}.png"), plane.astype(np.uint8))
    classes = [{"index": index, "name": name} for index, name in enumerate(("matrix", "pore", "grain"))]
    (dataset / "dataset.json").write_text(json.dumps({"name": "theirs", "license": "MIT", "classes": classes}))
    ours, int8, half, engine = (tmp_path / name for name in ("m.onnx", "m.int8.onnx", "m.fp16.onnx", "m.engine"))
    adopt(write_stranger(tmp_path / "theirs.onnx", "full", size=(1, 96, 128)), ours, settings())
    calibrated = calibrate(ours, int8, find_images(dataset, "train"), CalibrationSettings(cache=None))
    assert calibrated.validation[-1].values["int8_convolutions"] == 5  # all but that of the global mean
    assert convert_precision(ours, half).validation[-1].values["agreement"] > 0.99
    known = describe_domain(ours, dataset, tmp_path / "known.onnx")
    assert known.domain is not None
    with load_segmenter(tmp_path / "known.onnx", precision="file", threads=1) as segmenter:
        states = [segmenter.segment(image).domain.state for image in (grey, np.zeros_like(grey))]
    assert states == ["familiar", "foreign"]
    check = AcceptanceCheck(dataset, Budget(max_miou_drop=20), reference=ours)
    built = build_verified(
        int8, engine, precision="int8", acceptance=check, calibration_images=None, runtime="tensorrt-rtx", shapes=None,
        settings=QUIET,
    )  # fmt: skip
    assert built.engine is not None
    assert built.network == AdoptedNetwork(kind="adopted", name="theirs", num_classes=3)
    assert built.validation[-1].values["masked_miou"] > 0.8
    with pytest.raises(UserError, match="misses the budget"):
        build_verified(
            int8, tmp_path / "none.engine", precision="int8",
            acceptance=AcceptanceCheck(dataset, Budget(min_agreement=1)), calibration_images=None,
            runtime="tensorrt-rtx", shapes=None, settings=QUIET,
        )  # fmt: skip
    with load_segmenter(half, precision="file", threads=1) as segmenter:
        assert assess(segmenter, FolderDataset.open(dataset), "test", progress=False).scores.miou > 0.95
    with Stream(lambda: load_segmenter(ours, precision="file", threads=1)) as stream:
        stream.submit(simulate(96, 128, 0)[0])
        result = next(stream.results(timeout_s=20))
        assert result.segmentation is not None
        assert result.segmentation.labels.shape == (96, 128)
