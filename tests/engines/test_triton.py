"""A model on a server: addresses, versions, faults, and the same results as here."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hpddrnet_trt.core.errors import BadInputFile, ContractError, ModelReplaced, UsageError, UserError
from hpddrnet_trt.core.manifest import ClassInfo
from hpddrnet_trt.engines import load_engine, opening_of
from hpddrnet_trt.engines.triton_service import TOKEN, parse_address
from hpddrnet_trt.inference import load_segmenter
from hpddrnet_trt.stream import Stream
from tests.threads import in_threads
from tests.toy import CLASSES, grey_image, manifest, write_toy_onnx

pytest.importorskip("tritonclient.grpc")
if TYPE_CHECKING:
    from tests.triton_server import Server

PROTOCOLS = pytest.mark.parametrize("http", [False, True], ids=["grpc", "http"])
IMAGE = grey_image(64, 64, 1)[None, None]


@pytest.fixture
def server(triton_server: Server, tmp_path: Path) -> Server:
    """With one version of the toy model, which gives labels and their confidence."""
    triton_server.add(write_toy_onnx(tmp_path / "toy.onnx", manifest(confidence=True, checkpoint_sha256="c")))
    triton_server.start_http()
    return triton_server


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpddrnet_trt.engines.triton.FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr("hpddrnet_trt.engines.triton.OPENING_S", 1.0)
    monkeypatch.setattr("hpddrnet_trt.engines.triton.LOOK_S", 0.0)


def _raise(code: str, text: str = "as the test wants") -> Callable[[Any], None]:
    def fault(outputs: Any) -> None:
        from tests.triton_server import Fault

        raise Fault(code, text)

    return fault


def _regions() -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith("hpddrnet-")]


# --- addresses and options


@pytest.mark.parametrize(
    ("text", "server", "model", "version"),
    [
        ("triton://lab/steel", "lab:8001", "steel", None),
        ("triton:/lab/steel/", "lab:8001", "steel", None),  # as a Path has it
        ("tritons://lab:9/steel/3", "lab:9", "steel", "3"),
        ("triton+http://[::1]/st.eel-int8.onnx", "[::1]:8000", "st.eel-int8.onnx", None),
        ("triton+https://10.0.0.7:443/steel/12?timeout=5", "10.0.0.7:443", "steel", "12"),
    ],
)
def test_addresses(text: str, server: str, model: str, version: str | None) -> None:
    for given in (text, Path(text)):
        address = parse_address(given)
        assert (address.server, address.model, address.version) == (server, model, version)
        assert (address.http, address.tls) == ("http" in text, text.split(":")[0].endswith("s"))
        assert parse_address(str(address)).server == server
        assert opening_of(given).engine == "triton"


@pytest.mark.parametrize("text", ["triton://lab", "triton://lab:0/x", "triton://lab:x/m", "triton://:8001/m",
                                  "triton://lab/m/latest", "triton:///m", "triton://lab/m/3/4"])  # fmt: skip
def test_what_is_no_address_is_said(text: str) -> None:
    with pytest.raises(UsageError, match="is no address of a model on a Triton server; write triton://host:8001/model"):
        load_engine(text)


def test_secrets_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=f"put a token into {TOKEN}") as caught:
        load_engine("triton://me:secret@lab/steel")
    with pytest.raises(UsageError, match="no option key") as other:
        load_engine("triton://lab/steel?key=secret")
    monkeypatch.setenv(TOKEN, "secret\n")
    with pytest.raises(UsageError, match="a sign that no token has") as last:
        load_engine("triton://lab/steel")
    assert not any("secret" in str(one.value) for one in (caught, other, last))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "cuda"}, "the triton engine has no option device"),
        ({"threads": 2}, "has no option threads; it has: timeout, patience, shared_memory"),
        ({"precision": "int8"}, "in which precision, is its server's"),
        ({"engine": "openvino"}, "what computes triton:/lab/steel"),
        ({"timeout": 0}, "timeout is a number of seconds from 0.001"),
        ({"patience": float("nan")}, "patience is a number of seconds from 0 "),
    ],
)
def test_options_that_make_no_sense_there(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_segmenter("triton://lab/steel", **options)


def test_files_are_no_addresses(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the triton engine runs triton:// and .* addresses, not .*m\.onnx"):
        load_engine(tmp_path / "m.onnx", "triton")


# --- the same results as here


@PROTOCOLS
@pytest.mark.parametrize("shared", [False, True], ids=["sent", "shared"])
def test_a_picture_whole_and_in_tiles_is_as_here(server: Server, tmp_path: Path, http: bool, shared: bool) -> None:
    """Labels, tiles blended from class scores, probabilities, and what is said of them."""
    logits = write_toy_onnx(tmp_path / "logits.onnx", manifest("logits", checkpoint_sha256="c"))
    server.add(server.models["toy"]["1"].path, version=3)
    server.add(logits, "toy-scores", 3)
    address = f"{server.address(http=http)}?shared-memory={int(shared)}"
    pictures = [grey_image(200, 130, 2), grey_image(64, 64, 3), grey_image(64, 64, 4)]
    options: dict[str, Any] = {"tile": 64}
    with (
        load_segmenter(logits, engine="onnxruntime", threads=1, **options) as here,
        load_segmenter(Path(address), **options) as there,
    ):
        pairs = [*zip(here.segment_many(pictures), there.segment_many(pictures), strict=True)]
        pairs += [(here.segment(one), there.segment(one)) for one in pictures]
        np.testing.assert_array_equal(here.class_scores(pictures[0]), there.class_scores(pictures[0]))
    for local, remote in pairs:
        assert isinstance(local, type(remote))
        np.testing.assert_array_equal(local.labels, remote.labels)
        assert remote.labels.flags.writeable
        assert local.tiling == remote.tiling
        assert remote.provenance.as_dict() == {
            **local.provenance.as_dict(), "time": remote.provenance.time,
            "model_sha256": server.models["toy"]["3"].sha256,
            "engine": f"Triton 2.51.0 at {parse_address(address).server} (model toy, version 3)",
        }  # fmt: skip
    assert pairs[0][1].tiling.method == "blended scores"
    assert {asked["version"] for asked in server.asked} == {"3"}
    assert bool(server.registered) == shared
    assert _regions() == []


def test_without_class_scores_tiles_are_cut_and_other_scores_are_refused(server: Server, tmp_path: Path) -> None:
    with load_segmenter(server.address(), tile=64) as segmenter:
        assert segmenter.segment(grey_image(100, 100, 1)).tiling.method == "cut labels"  # type: ignore[union-attr]
    server.add(write_toy_onnx(tmp_path / "s.onnx", manifest("logits", checkpoint_sha256="other")), "toy-scores")
    with load_segmenter(server.address(), tile=64) as segmenter, pytest.raises(UserError, match="have the class"):
        segmenter.segment(grey_image(100, 100, 1))


# --- the server's memory


def test_memory_is_shared_only_where_the_server_takes_it(server: Server) -> None:
    server.shares = False
    with load_engine(server.address()) as engine:
        assert engine.infer(IMAGE).labels.shape == (1, 64, 64)
    with load_engine(server.address(), shared_memory=True) as engine, pytest.raises(UserError, match="leave shared"):
        engine.infer(IMAGE)
    assert _regions() == []


def test_a_server_that_forgot_the_memory_gets_it_again(server: Server) -> None:
    with load_engine(server.address()) as engine:
        expected = engine.infer(IMAGE).labels
        for name in list(server.regions):
            server.share(name, None)
        for _ in range(2):
            np.testing.assert_array_equal(engine.infer(IMAGE).labels, expected)
        assert len(server.regions) == 1
    assert _regions() == []


def test_an_answer_that_was_not_written_is_no_answer(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what an earlier request left there, nor zeros: it is sent instead."""
    with load_engine(server.address()) as engine:
        engine.infer(IMAGE[:, :, ::-1])
        expected = engine.infer(IMAGE)
        monkeypatch.setattr(server, "write", lambda *arguments: None)
        found = engine.infer(IMAGE)
        np.testing.assert_array_equal(found.labels, expected.labels)
        np.testing.assert_array_equal(found.confidence, expected.confidence)


def test_a_client_that_is_killed_leaves_no_memory(server: Server) -> None:
    code = (
        "import numpy as np, sys, time; from hpddrnet_trt.engines import load_engine\n"
        f"load_engine({server.address()!r}).infer(np.zeros((1, 1, 64, 64), np.uint8)); print('done', flush=True)\n"
        "time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "done\n"
    (name,) = _regions()
    child.kill()
    child.wait()
    child.stdout.close()
    end = time.monotonic() + 20
    while name in _regions() and time.monotonic() < end:
        time.sleep(0.02)
    assert _regions() == []
    server.share(name, None)  # what the server holds of it goes with the server


# --- faults


@PROTOCOLS
def test_what_passes_is_asked_again(server: Server, http: bool, caplog: pytest.LogCaptureFixture) -> None:
    with load_engine(server.address(http=http)) as engine:
        expected = engine.infer(IMAGE).labels
        server.faults += [_raise("UNAVAILABLE", "Exceeds maximum queue size")] * 3
        np.testing.assert_array_equal(engine.infer(IMAGE).labels, expected)
        server.faults += [_raise("UNAVAILABLE")] * 5
        for prediction in engine.infer_many([IMAGE] * 6):
            np.testing.assert_array_equal(prediction.labels, expected)
    assert "Exceeds maximum queue size; asking again for up to 60 s" in caplog.text
    assert len(server.asked) == 1 + 4 + 11


@PROTOCOLS
def test_what_is_refused_is_asked_once(server: Server, http: bool) -> None:
    """Twice with shared memory, which may have been the reason."""
    with load_engine(server.address(http=http), shared_memory=False) as engine:
        for code, kind in (("INVALID_ARGUMENT", ContractError), ("INTERNAL", UserError)):
            server.asked.clear()
            server.faults.append(_raise(code, "more than 4 megapixels"))
            with pytest.raises(kind, match=r"triton.*/toy/1: more than 4 megapixels"):
                engine.infer(IMAGE)
            assert len(server.asked) == 1
        assert engine.infer(IMAGE).labels.shape == (1, 64, 64)


@PROTOCOLS
def test_a_server_that_stalls(server: Server, http: bool) -> None:
    """Once: another try; always: a sentence, and nothing is left."""
    released = threading.Event()

    def stall(outputs: Any) -> None:
        released.wait(20)

    with load_engine(server.address(http=http), timeout=0.3, patience=1) as engine:
        expected = engine.infer(IMAGE).labels
        server.faults.append(stall)
        np.testing.assert_array_equal(engine.infer(IMAGE).labels, expected)
        server.faults += [stall] * 20
        started = time.monotonic()
        with pytest.raises(UserError, match=r"/toy/1: no answer in 1 s .*; try again later, or ask whoever"):
            engine.infer(IMAGE)
        assert time.monotonic() - started < 5
        server.faults.clear()
        released.set()
        np.testing.assert_array_equal(engine.infer(IMAGE).labels, expected)
    assert _regions() == []


@PROTOCOLS
def test_a_server_that_dies_and_comes_back(server: Server, http: bool) -> None:
    with load_segmenter(server.address(http=http)) as segmenter:
        expected = segmenter.segment(IMAGE[0, 0]).labels
        results = iter(segmenter.segment_many([IMAGE[0, 0]] * 12))
        found = [next(results)]
        server.stop()
        back = threading.Timer(0.5, lambda: (server.start(), server.start_http()))
        back.start()
        found += results
        back.join()
        for one in found:
            assert not isinstance(one, Exception), one
            np.testing.assert_array_equal(one.labels, expected)
    assert server.regions == {}


def test_a_server_that_is_not_there() -> None:
    started = time.monotonic()
    for scheme in ("triton", "triton+http", "tritons", "triton+https"):
        with pytest.raises(UserError, match=r"127.0.0.1:1/toy: no answer in 0.2 s .*ask whoever runs the server"):
            load_segmenter(f"{scheme}://127.0.0.1:1/toy?patience=0.2")
    assert time.monotonic() - started < 10


@PROTOCOLS
@pytest.mark.parametrize(
    ("garbage", "says"),
    [
        (lambda o: {**o, "labels": o["labels"][:, :32]}, r"shape|labels is"),
        (lambda o: {**o, "labels": o["labels"].astype(np.int64)}, "is of type int64|labels is INT64|size"),
        (lambda o: {**o, "labels": o["labels"] + 3}, "it gave the label [345], and has the classes 0 to 2"),
        (lambda o: {"labels": o["labels"]}, "there is no confidence in it"),
    ],
)
@pytest.mark.parametrize("shared", [0, 1], ids=["sent", "shared"])
def test_garbage_is_refused(server: Server, http: bool, shared: int, garbage: Any, says: str) -> None:
    with load_engine(f"{server.address(http=http)}?shared-memory={shared}") as engine:
        server.faults += [garbage] * (1 + shared)
        with pytest.raises(UserError, match=rf"triton.*/toy/1: .*({says})"):
            engine.infer(IMAGE)
        server.faults.clear()
        assert engine.infer(IMAGE).labels.shape == (1, 64, 64)
    assert _regions() == []


@PROTOCOLS
def test_answers_of_another_version_and_short_ones(server: Server, http: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with load_engine(f"{server.address(http=http)}?shared-memory=0") as engine:
        monkeypatch.setattr(server, "answers_as", "2")
        with pytest.raises(UserError, match="it is of version 2"):
            engine.infer(IMAGE)
        monkeypatch.setattr(server, "answers_as", None)

        class Short(np.ndarray):  # type: ignore[type-arg]
            def tobytes(self, *_: Any) -> bytes:
                return super().tobytes()[:-5]

        server.faults.append(lambda outputs: {**outputs, "labels": outputs["labels"].view(Short)})
        with pytest.raises(UserError, match="not what was asked for"):
            engine.infer(IMAGE)


@PROTOCOLS
def test_the_token_goes_in_the_header(
    server: Server, http: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.token = "secret"
    address = server.address(http=http)
    with pytest.raises(UserError, match=f"who is there\\?; it wants a token, or another one, in {TOKEN}"):
        load_engine(address)
    monkeypatch.setenv(TOKEN, "secret")
    with load_segmenter(address) as segmenter:
        said = json.dumps(segmenter.segment(IMAGE[0, 0]).record())
    assert "secret" not in said + caplog.text


# --- descriptions and versions


@PROTOCOLS
def test_models_without_a_description_or_with_another_are_refused(server: Server, http: bool) -> None:
    with pytest.raises(UserError, match="the server has no such model"):
        load_engine(server.address("iron", http=http))
    with pytest.raises(UserError, match=r"the server has no such model|no answer in"):
        load_engine(server.address("toy/7?patience=0.2", http=http))
    described = server.models["toy"]["1"].manifest
    for said, says in (
        ({}, "the server has no description of version 1 .*hpddrnet-trt export-triton"),
        ({"description.1": "{"}, "the description in triton.*/toy/1 is not valid"),
        ({"description.1": described.replace(output={"kind": "logits"}).to_json()}, "has no output logits"),
        ({"description.1": described.replace(input=None).to_json()}, "has no input contract"),
        ({"description.1": described.replace(input={"dtype": "float32", "channels": 3}).to_json()}, "takes UINT8, and"),
    ):
        server.settings["toy"] = said
        with pytest.raises((BadInputFile, ContractError), match=says):
            load_engine(server.address(http=http))


def _next(server: Server, folder: Path, version: int, **changes: Any) -> None:
    """The toy model again, with other weights as far as anybody can see."""
    described = manifest(confidence=True, **{"checkpoint_sha256": f"c{version}", **changes})
    server.add(write_toy_onnx(folder / f"{version}.onnx", described), version=version)


def test_the_newest_version_is_taken_and_told(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture = IMAGE[0, 0]
    with load_segmenter(server.address()) as segmenter, load_segmenter(server.address("toy/1")) as pinned:
        _next(server, tmp_path, 2, name="younger")
        result = segmenter.segment(picture)
        assert result.provenance is not None
        assert (result.provenance.model, result.provenance.checkpoint_sha256) == ("younger", "c2")
        assert result.provenance.engine.endswith("(model toy, version 2)")
        assert "/toy/1: version 2 of the model from now on" in caplog.text
        del server.models["toy"]["1"]
        _next(server, tmp_path, 3)
        assert segmenter.with_mode("single").segment(picture).provenance.checkpoint_sha256 == "c3"  # type: ignore[union-attr]
        assert [one.provenance.checkpoint_sha256 for one in segmenter.segment_batch([picture] * 2)] == ["c3", "c3"]  # type: ignore[union-attr]
        with pytest.raises(ModelReplaced, match=r"/toy/1: the server has no such version any more, but 2, 3; open it"):
            pinned.segment(picture)
    assert server.regions == {}


def test_a_version_that_goes_in_the_middle_of_a_row(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No picture is lost, and each is of the version that its provenance names."""
    monkeypatch.setattr("hpddrnet_trt.engines.triton.LOOK_S", 60.0)
    with load_segmenter(server.address()) as segmenter:
        found = []
        for number, one in enumerate(segmenter.segment_many([IMAGE[0, 0]] * 20)):
            assert not isinstance(one, Exception), one
            found.append(one.provenance.checkpoint_sha256)  # type: ignore[union-attr]
            if number == 5:
                _next(server, tmp_path, 2)
                del server.models["toy"]["1"]
    assert len(found) == 20
    assert found == sorted(found)
    assert (found[0], found[-1]) == ("c", "c2")


def test_a_version_of_another_contract_is_not_taken(server: Server, tmp_path: Path) -> None:
    others = [*CLASSES[:2], ClassInfo(name="mica", color=(0, 90, 200))]
    with load_segmenter(server.address()) as segmenter:
        _next(server, tmp_path, 2, classes=others)
        for _ in range(2):
            with pytest.raises(UserError, match=r"version 2 of .* now, with another input, outputs or"):
                segmenter.segment(IMAGE[0, 0])
        errors = list(segmenter.segment_many([IMAGE[0, 0]] * 3))
        assert [type(one) for one in errors] == [UserError] * 3
    with load_segmenter(server.address()) as segmenter:
        assert segmenter.segment(IMAGE[0, 0]).classes[2].name == "mica"


def test_back_and_forth(server: Server, tmp_path: Path) -> None:
    """What follows a version is not closed with what nobody needs of it any more; in the end everything is."""
    first = server.models["toy"].pop("1")
    picture = grey_image(100, 100, 1)
    for number in "123":
        server.models["toy"][number] = first
        server.add(write_toy_onnx(tmp_path / f"s{number}.onnx", manifest("logits", checkpoint_sha256="c")),
                   "toy-scores", int(number))  # fmt: skip
    with load_segmenter(server.address(), tile=64) as segmenter, load_segmenter(server.address(), mode="flip") as other:
        for gone in ("3", "2"):
            for one in (segmenter, segmenter.with_mode("single"), other):
                assert one.segment(picture).provenance is not None
            gc.collect()
            del server.models["toy"][gone], server.models["toy-scores"][gone]
        for one in (segmenter, segmenter.with_mode("single"), other):
            assert "version 1)" in one.segment(picture).provenance.engine  # type: ignore[union-attr]
        engines = [one.engine for one in (segmenter, other)]
    for engine in engines:
        with pytest.raises(UsageError, match="closed"):
            engine.infer(IMAGE)
    assert server.regions == {}


def test_tiles_of_one_picture_are_of_one_version(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpddrnet_trt.engines.triton.LOOK_S", 60.0)
    picture = grey_image(300, 300, 1)

    def replaced(outputs: Any) -> None:
        _next(server, tmp_path, 2)
        del server.models["toy"]["1"]

    with load_segmenter(server.address(), tile=64) as segmenter:
        server.faults += [lambda outputs: None] * 8 + [replaced]
        result = segmenter.segment(picture)
        assert result.provenance is not None
        assert result.provenance.checkpoint_sha256 == "c2"
        tiles = result.tiling.tiles  # type: ignore[union-attr]
    assert [asked["version"] for asked in server.asked[-tiles:]] == ["2"] * tiles


# --- cancelling


@PROTOCOLS
def test_closing_and_leaving_cancel_what_is_under_way(server: Server, http: bool) -> None:
    armed, released, begun = threading.Event(), threading.Event(), threading.Semaphore(0)

    def stall(outputs: Any) -> None:
        if armed.is_set():
            begun.release()
            released.wait(20)

    server.faults += [stall] * 99
    engine = load_engine(server.address(http=http))
    row = iter(engine.infer_many([IMAGE] * 8))
    next(row)
    armed.set()
    started = time.monotonic()
    del row
    calls: list[Callable[[], object]] = [
        lambda: engine.infer(IMAGE), lambda: list(engine.infer_many([IMAGE] * 8)),
    ]  # fmt: skip
    while begun.acquire(blocking=False):
        pass

    def close() -> None:
        for _ in range(5):
            begun.acquire(timeout=10)
        engine.close()

    raised = in_threads(*calls, close, timeout_s=15)
    assert ["is closed; load it again" in str(exc) for exc in raised] == [True, True]
    assert time.monotonic() - started < 5
    released.set()
    assert _regions() == []


@PROTOCOLS
def test_ctrl_c_ends_a_wait(server: Server, http: bool) -> None:
    released = threading.Event()
    server.faults += [lambda outputs: released.wait(20) and None] * 4
    with load_engine(server.address(http=http)) as engine:
        timer = threading.Timer(0.3, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT))
        timer.start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            list(engine.infer_many([IMAGE] * 4))
        timer.join()
        assert time.monotonic() - started < 3
        server.faults.clear()
        released.set()
        assert engine.infer(IMAGE).labels.shape == (1, 64, 64)


# --- what runs on it


def test_a_stream_goes_on_over_a_server_that_restarts(server: Server) -> None:
    with Stream(lambda: load_segmenter(server.address()), policy="block", capacity=6) as stream:
        stream.wait_ready(20)
        for number in range(6):
            stream.submit(IMAGE[0, 0])
            if number == 2:
                server.stop()
                server.start()
        results = [one for _, one in zip(range(6), stream.results(20), strict=False)]
    assert [one.error for one in results] == [None] * 6


def test_the_command_takes_an_address(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tifffile
    from PIL import Image

    from hpddrnet_trt.cli import main

    tifffile.imwrite(tmp_path / "a.tif", IMAGE[0, 0])
    arguments = ["segment", str(tmp_path / "a.tif"), "--model", server.address(), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["hpddrnet-trt", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    with load_segmenter(server.models["toy"]["1"].path, engine="onnxruntime") as here:
        expected = here.segment(IMAGE[0, 0]).labels
    with Image.open(tmp_path / "out" / "a.png") as written:
        np.testing.assert_array_equal(np.asarray(written), expected)
