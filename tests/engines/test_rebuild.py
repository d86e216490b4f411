"""An engine that does not fit this machine any more, built again from the ONNX file beside it, on simulated CUDA."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from hpddrnet_trt import load_segmenter, rebuild_engine
from hpddrnet_trt.core.errors import BadInputFile, EngineDoesNotFit, NoGpu, UserError
from hpddrnet_trt.core.manifest import read_manifest, sidecar_path
from hpddrnet_trt.engines import cuda
from hpddrnet_trt.export import build_settings, rebuild
from hpddrnet_trt.export.build_settings import BuildSettings
from tests.engines.conftest import Bench, noise
from tests.engines.simulated_cuda import SimulatedCuda
from tests.tiny_onnx import tiny_model

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec(name) is None, reason=f"{name}, which this test uses without a GPU, is missing"
    )
    for name in ("tensorrt_rtx", "cuda.bindings")
]


def _changed(path: Path, **record: Any) -> Path:
    content = json.loads(sidecar_path(path).read_text())
    content["engine"].update(record)
    sidecar_path(path).write_text(json.dumps(content))
    return path


@pytest.fixture
def outdated(bench: Callable[..., Bench], models: dict[str, Path]) -> Bench:
    """An engine of another version, with its ONNX file."""
    job = bench()
    job.path.with_suffix(".onnx").write_bytes(models["labels"].with_suffix(".onnx").read_bytes())
    _changed(job.path, version="1.0.0.1")
    return job


def test_who_says_so_once_gets_an_engine_for_this_machine(outdated: Bench, caplog: pytest.LogCaptureFixture) -> None:
    path, before = outdated.path, read_manifest(outdated.path)
    with pytest.raises(EngineDoesNotFit, match=r"built with tensorrt-rtx 1\.0\.0\.1, .*\(--rebuild does that\)"):
        load_segmenter(path)
    assert read_manifest(path) == before
    with caplog.at_level(logging.WARNING), load_segmenter(path, rebuild=True) as segmenter:
        image = noise(64, 128)
        np.testing.assert_array_equal(segmenter.segment(image).labels, outdated.truth(image[None, None])[0])
    assert "its accuracy was not verified again" in caplog.text
    found = read_manifest(path)
    assert found.engine is not None
    assert before.engine is not None
    assert found.engine.version == outdated.library.api.version
    assert (found.engine.profiles, found.precision) == (before.engine.profiles, before.precision)
    assert found.engine.source == "labels.onnx"
    times = path.stat().st_mtime_ns
    load_segmenter(path, rebuild=True).close()  # fits now
    assert path.stat().st_mtime_ns == times
    assert not [entry for entry in path.parent.iterdir() if ".tmp" in entry.name]


def test_settings_and_targets_are_those_of_before(outdated: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(rebuild, "build_engine", lambda *files, **options: asked.append({"files": files, **options}))
    _changed(outdated.path, settings={"sparsity": True, "of_a_later_version": 1}, compute_capabilities=["12.0"])
    rebuild_engine(outdated.path)
    _changed(outdated.path, compute_capabilities=["portable"])
    rebuild_engine(outdated.path, progress=False)
    _changed(outdated.path, runtime="tensorrt", compute_capabilities=["8.6"])
    rebuild_engine(outdated.path)
    assert [entry["settings"].compute_capabilities for entry in asked] == [["12.0", "8.9"], None, None]
    assert [entry["settings"].progress for entry in asked] == [True, False, True]
    assert all(entry["settings"].sparsity for entry in asked)
    assert [entry["runtime"] for entry in asked] == ["tensorrt-rtx", "tensorrt-rtx", "tensorrt"]
    assert BuildSettings(sparsity=True, progress=False).record() == {"sparsity": True}


def test_what_cannot_be_built_again_stays(outdated: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    path, source = outdated.path, outdated.path.with_suffix(".onnx")
    for settings in ({"workspace_mib": "all"}, {"tiling": 3}):
        with pytest.raises(BadInputFile, match="settings in the description"):
            rebuild_engine(_changed(path, settings=settings))
    _changed(path, settings={})
    before = path.read_bytes(), sidecar_path(path).read_bytes()
    content = source.read_bytes()
    source.unlink()
    with pytest.raises(BadInputFile, match=r"the ONNX file that it was built from \(labels\.onnx\) is not beside it"):
        rebuild_engine(path)
    tiny_model(source, checkpoint_sha256="other")
    with pytest.raises(BadInputFile, match="is not the model that"):
        rebuild_engine(path)
    source.write_bytes(content[:-400])
    with pytest.raises(UserError):
        rebuild_engine(path)
    source.write_bytes(content)
    nobody = SimulatedCuda(cuda.cudart())
    nobody.count = 0
    monkeypatch.setattr(cuda, "cudart", lambda: nobody)
    with pytest.raises(NoGpu):
        load_segmenter(path, rebuild=True)
    assert (path.read_bytes(), sidecar_path(path).read_bytes()) == before


def test_files_of_older_versions_are_found_by_name(outdated: Bench) -> None:
    """They say nothing of their source; the default name of an engine has the precision in it."""
    source = outdated.path.with_suffix(".onnx")
    old = outdated.path.rename(outdated.path.with_name("labels.fp32.engine"))
    sidecar_path(outdated.path).rename(sidecar_path(old))
    _changed(old, source=None)
    assert rebuild_engine(old, progress=False).engine is not None
    source.rename(source.with_name("labels.fp32.onnx"))
    _changed(old, source=None)
    assert rebuild_engine(old, progress=False).engine.source == "labels.fp32.onnx"  # type: ignore[union-attr]
    _changed(old, source="../labels.fp32.onnx")  # only beside the engine, whatever a stranger's file says
    assert rebuild_engine(old, progress=False).engine.source == "labels.fp32.onnx"  # type: ignore[union-attr]


def test_kernel_timings_are_kept_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By GPU and version, read by the next build; a file of another one is not used."""

    class Config:
        """A builder's configuration, as far as timings go."""

        given: ClassVar[list[bytes]] = []

        def create_timing_cache(self, content: bytes) -> Any:
            return type("Timings", (), {"content": content, "serialize": lambda self: content or b"timings"})()

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            self.given.append(cache.content)
            self.cache = cache
            return bool(cache.content != b"foreign")

        def get_timing_cache(self) -> Any:
            return self.cache

    monkeypatch.setenv("HPDDRNET_CACHE", str(tmp_path))
    monkeypatch.setattr(build_settings, "gpu_or_none", lambda device: cuda.Gpu(0, "NVIDIA RTX 4000 (Ada)", "8.9"))
    api: Any = type("Api", (), {"is_rtx": False, "version": "11.4.0.106", "label": "TensorRT"})()
    settings, file = BuildSettings(), tmp_path / "timings" / "NVIDIA-RTX-4000-Ada-11.4.0.106.cache"
    for stored in (None, b"timings", b"foreign"):
        if stored is not None:
            file.write_bytes(stored)
        config = Config()
        settings._load_timings(api, config)
        settings.keep_timings(api, config)
        assert file.read_bytes() == b"timings"
    assert Config.given == [b"", b"timings", b"foreign", b""]
    assert "is of another GPU or version" in caplog.text
    file.unlink()
    file.mkdir()
    settings.keep_timings(api, config)
    assert "kernel timings are not kept" in caplog.text
    Config.given.clear()
    BuildSettings(timing_cache=None)._load_timings(api, config)
    BuildSettings(timing_cache=tmp_path / "mine")._load_timings(api, config)
    assert Config.given == [b""]
