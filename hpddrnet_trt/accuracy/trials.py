"""Candidates of one network in mixed precision, measured once each.

Sensitivity analysis and the mixed-precision search both ask for the same thing: with these
convolutions quantised and those not, how accurate is the network? Answers are kept in a journal on
disk, so that either can be interrupted and continued, and the search reuses what the analysis found.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpddrnet_trt.accuracy.judge import Accuracy, Judge
from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.files import write_text
from hpddrnet_trt.core.manifest import Manifest
from hpddrnet_trt.core.precisions import LowPrecision
from hpddrnet_trt.core.runtimes import load_onnxruntime
from hpddrnet_trt.graph import qdq

if TYPE_CHECKING:
    import onnx


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Everything but the choice of layers: the FP32 graph, what could be quantised, and its ranges.

    ``model`` has named nodes; ``plan`` is the full placement, ``ranges`` hold every tensor of it.
    """

    model: onnx.ModelProto
    manifest: Manifest  # of the FP32 file
    plan: qdq.Plan
    ranges: Mapping[str, qdq.Range]
    precision: LowPrecision = "int8"

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the convolutions that can be quantised, in the graph's order."""
        return self.plan.nodes

    def graph(self, layers: Collection[str], *, half: bool) -> onnx.ModelProto:
        """The graph with ``layers`` quantised for TensorRT; ``half``: the rest typed FP16, else FP32."""
        from hpddrnet_trt.graph.fp8 import to_fp8
        from hpddrnet_trt.graph.precision import to_half

        if unknown := set(layers) - set(self.layers):
            raise UsageError(f"the network has no convolution to quantise called {', '.join(sorted(unknown))}")
        model = self.model
        if layers:
            chosen = qdq.subset(self.model, "tensorrt", layers)
            model = qdq.quantise(self.model, "tensorrt", chosen, self.ranges)
            if self.precision == "fp8":
                model = to_fp8(model, self.model)
        return to_half(model) if half else model

    def described(self, layers: Collection[str], *, half: bool) -> Manifest:
        """The description that goes with :meth:`graph`."""
        if layers:
            return self.manifest.replace(precision=self.precision, quantized_for="tensorrt")
        return self.manifest.replace(precision="fp16" if half else "fp32")

    def digest(self) -> str:
        """Checksum of graph, weights, placement, ranges and precision."""
        found = hashlib.sha256(self.model.SerializeToString(deterministic=True))
        ranges = sorted((name, list(pair)) for name, pair in self.ranges.items())
        found.update(json.dumps([self.precision, asdict(self.plan), ranges]).encode())
        return found.hexdigest()


class Trials:
    """Accuracy by choice of layers; each choice is measured once.

    ``journal``: a JSON file that holds the answers between runs; one of another network, of other
    data or versions is started anew, and one that cannot be written gives a warning. None keeps them in memory.
    """

    def __init__(self, recipe: Recipe, judge: Judge, *, journal: Path | None = None) -> None:
        self.recipe, self.judge = recipe, judge
        self._journal = journal
        self._identity = "" if journal is None else _identity(recipe, judge)
        self._answers = _read(journal, self._identity)

    def measure(self, layers: Collection[str], *, half: bool = False) -> Accuracy:
        """Accuracy with ``layers`` quantised and the rest FP32, or FP16 where ``half``."""
        order = [name for name in self.recipe.layers if name in set(layers)]
        key = hashlib.sha256(json.dumps([order, half]).encode()).hexdigest()
        if key not in self._answers:
            graph = self.recipe.graph(layers, half=half)
            found = self.judge.score_graph(graph, self.recipe.described(layers, half=half))
            self._answers[key] = asdict(found)
            self._write()
        return Accuracy(**self._answers[key])

    def _write(self) -> None:
        if self._journal is None:
            return
        content = {"identity": self._identity, "answers": self._answers}
        try:
            write_text(self._journal, json.dumps(content, indent=1) + "\n")
        except (OSError, UserError) as exc:
            logger.warning("what was measured is not kept for the next run: %s", exc)
            self._journal = None


def _identity(recipe: Recipe, judge: Judge) -> str:
    """Of all that an answer follows from, the passes that make and round the graphs included."""
    from hpddrnet_trt.graph.rounding import simulate_rounding

    onnxruntime = load_onnxruntime("search for the fastest precision")

    run = simulate_rounding(recipe.graph(recipe.layers, half=True)).SerializeToString(deterministic=True)
    graph = hashlib.sha256(run).hexdigest()
    return f"{recipe.digest()} {graph} {judge.digest} onnxruntime {onnxruntime.__version__}"


def _read(journal: Path | None, identity: str) -> dict[str, dict[str, Any]]:
    if journal is None:
        return {}
    try:
        content = json.loads(journal.read_text(encoding="utf-8"))
        if content["identity"] != identity:
            return {}
        answers: dict[str, dict[str, Any]] = content["answers"]
        for entry in answers.values():
            Accuracy(**entry)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # not there, cut off or foreign: measure again
    return answers
