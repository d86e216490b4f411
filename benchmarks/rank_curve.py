"""mIoU against the number of labeled pictures, chosen by `hpddrnet-trt rank` or drawn at random.

    python benchmarks/rank_curve.py DATASET --edge 384 --seeds 10

The training pictures of DATASET are cut into squares, the pool. What is trained on labeled squares is the classifier
alone, a softmax regression on the features of the shipped network, which saw none of these pictures: it takes a second
and has one optimum, so that a curve shows which squares were labeled and not the luck of a training. For each seed one
square is drawn; the next ones are either drawn as well, or taken in the order of `rank` with the classifier of the
squares so far. The mIoU is over all pictures of val and test.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from hpddrnet_trt.core.manifest import AxisRange, InputContract, Manifest, OutputContract
from hpddrnet_trt.core.metrics import LabelComparison, arg_max
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.data.labels import write_pair
from hpddrnet_trt.engines.base import EngineBase, Prediction
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.inference.rank import rank_pictures
from hpddrnet_trt.models.checkpoints import load_checkpoint
from hpddrnet_trt.weights import CHECKPOINT, DEFAULT, locate

Grey8 = npt.NDArray[np.uint8]
STRIDE, SAMPLES, PENALTY = 4, 3000, 1e-3  # pixels a feature; pixels of a square that are trained on; of the weights


class Backbone:
    """The shipped network's features, float32 ``[224, H / 4, W / 4]``, kept for each picture."""

    def __init__(self) -> None:
        self.network, self.manifest = load_checkpoint(locate(DEFAULT, CHECKPOINT))
        self.network.eval()
        self._kept: dict[int, torch.Tensor] = {}

    def __call__(self, grey: Grey8) -> torch.Tensor:
        key = hash((grey.shape, grey.tobytes()))
        if key not in self._kept:
            norm = self.manifest.normalization
            rgb = torch.from_numpy(np.repeat(grey[None].astype(np.float32), 3, axis=0))
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in (norm.mean, norm.std))
            with torch.inference_mode():
                found = self.network.backbone(((rgb - mean) / std)[None])
                maps = [F.interpolate(one, size=found.fine.shape[2:], mode="bilinear") for one in found]
            self._kept[key] = torch.cat(maps, dim=1)[0].half()
        return self._kept[key].float()


class Classifier(EngineBase):
    """Softmax regression on the backbone's features, trained on squares with masks; runs as any engine."""

    def __init__(
        self, backbone: Backbone, dataset: FolderDataset, squares: list[tuple[Grey8, Grey8]], seed: int
    ) -> None:
        axis = AxisRange(minimum=8)
        self.backbone = backbone
        self.manifest = Manifest(
            name="classifier", network=backbone.manifest.network.model_copy(
                update={"num_classes": len(dataset.classes)}
            ), classes=dataset.classes, precision="fp32",
            input=InputContract(height=axis, width=axis), output=OutputContract(kind="logits"),
        )  # fmt: skip
        rng, inputs, targets = np.random.default_rng(seed), [], []
        for grey, mask in squares:
            features, labels = backbone(grey).flatten(1).T, mask[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE].ravel()
            chosen = rng.permutation(np.flatnonzero(labels != 255))[:SAMPLES]
            inputs.append(features[chosen])
            targets.append(torch.from_numpy(labels[chosen].astype(np.int64)))
        x, y = torch.cat(inputs), torch.cat(targets)
        self.mean, self.std = x.mean(dim=0), x.std(dim=0) + 1e-6
        x = (x - self.mean) / self.std
        self.weight = torch.zeros(len(dataset.classes), x.shape[1], requires_grad=True)
        self.bias = torch.zeros(len(dataset.classes), requires_grad=True)
        optimizer = torch.optim.LBFGS([self.weight, self.bias], max_iter=60, line_search_fn="strong_wolfe")

        def closure() -> float:
            optimizer.zero_grad()
            loss = F.cross_entropy(x @ self.weight.T + self.bias, y) + PENALTY * self.weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.item()

        optimizer.step(closure)  # type: ignore[no-untyped-call]

    @property
    def runtime(self) -> str:
        return "PyTorch"

    def infer(self, images: npt.NDArray[Any]) -> Prediction:
        scores = []
        for image in images[:, 0]:
            features = (self.backbone(image) - self.mean[:, None, None]) / self.std[:, None, None]
            with torch.inference_mode():
                coarse = torch.einsum("kf,fhw->khw", self.weight, features) + self.bias[:, None, None]
                scores.append(F.interpolate(coarse[None], size=image.shape, mode="bilinear")[0].numpy())
        logits = np.stack(scores)
        return Prediction(arg_max(logits), logits=logits)

    def close(self) -> None:
        pass


def cut(dataset: FolderDataset, edge: int, folder: Path) -> dict[str, tuple[Grey8, Grey8]]:
    """Squares of the training pictures by name, also written to ``folder``."""
    squares = {}
    for sample in dataset.split("train"):
        grey, mask = dataset.load(sample)
        for top in range(0, grey.shape[0] - edge + 1, edge):
            for left in range(0, grey.shape[1] - edge + 1, edge):
                name, part = f"{sample.name}_{top}_{left}", np.s_[top : top + edge, left : left + edge]
                squares[name] = np.ascontiguousarray(grey[part]), np.ascontiguousarray(mask[part])
                write_pair(folder, "train", name, *squares[name], dataset.palette)
    return squares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--edge", type=int, default=256, help="of the squares, in pixels; a multiple of 8")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="of labeled squares")
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    dataset, backbone = FolderDataset.open(arguments.dataset), Backbone()
    held_out = [dataset.load(sample) for split in ("val", "test") for sample in dataset.split(split)]
    print("way,seed,pictures,miou")
    with tempfile.TemporaryDirectory() as folder:
        squares = cut(dataset, arguments.edge, Path(folder))
        for seed in range(arguments.seeds):
            drawn = np.random.default_rng(seed).permutation(sorted(squares)).tolist()
            for way in ("random", "ranked"):
                names: list[str] = drawn[:1]
                segmenter: Segmenter | None = None
                for count in arguments.counts:
                    if way == "random":
                        names = drawn[:count]
                    elif segmenter is not None:
                        ranking = rank_pictures(
                            segmenter, Path(folder), progress=False,
                            labeled=[Path(folder, "images", "train", f"{name}.png") for name in names],
                        )  # fmt: skip
                        names = names + [one.image.stem for one in ranking.order][: count - len(names)]
                    engine: Any = Classifier(backbone, dataset, [squares[name] for name in names], seed)
                    segmenter, total = Segmenter(engine, confidence=True), LabelComparison(len(dataset.classes))
                    for grey, mask in held_out:
                        total.update(segmenter.segment(grey).labels, mask)
                    print(f"{way},{seed},{count},{total.scores().miou:.4f}", flush=True)


if __name__ == "__main__":
    main()
