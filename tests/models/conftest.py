"""The reference networks, and a small random one that needs no reference data."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from hpddrnet_trt.models.checkpoints import load_any_checkpoint
from hpddrnet_trt.models.network import HPDDRNet
from tests.tiny_network import tiny_network


@dataclass(frozen=True)
class Reference:
    """One network of the reference data: checkpoint, inputs and what the authors' code made of them."""

    folder: Path

    @cached_property
    def info(self) -> dict[str, Any]:
        return json.loads((self.folder / "info.json").read_text())

    @cached_property
    def inputs(self) -> dict[str, npt.NDArray[Any]]:
        return dict(np.load(self.folder.parent / "inputs.npz"))

    def network(self) -> HPDDRNet:
        """A fresh copy in evaluation mode."""
        return copy.deepcopy(self._network)

    @cached_property
    def _network(self) -> HPDDRNet:
        return load_any_checkpoint(self.folder / "checkpoint.pth")[0]

    def image(self, size: str) -> Tensor:
        """Input named like ``1x136x200``; the large ones are the 256x256 one continued by reflection."""
        key = f"x_{size}"
        if key in self.inputs:
            return torch.from_numpy(self.inputs[key]).float()
        _, height, width = (int(part) for part in size.split("x"))
        base = self.inputs["x_1x256x256"]
        padding = ((0, 0), (0, 0), (0, height - 256), (0, width - 256))
        return torch.from_numpy(np.pad(base, padding, mode="symmetric")).float()

    def arrays(self, file: str) -> dict[str, npt.NDArray[Any]]:
        return dict(np.load(self.folder / file))


@pytest.fixture(scope="session", params=["hpddrnet", "ddrnet23slim"])
def reference(request: pytest.FixtureRequest, golden: Path) -> Reference:
    return Reference(golden / request.param)


@pytest.fixture(scope="session")
def hpddrnet(golden: Path) -> Reference:
    return Reference(golden / "hpddrnet")


@pytest.fixture(autouse=True)
def every_test_on_one_thread(one_thread: None) -> None:
    """These networks are small."""


@pytest.fixture
def network() -> HPDDRNet:
    return tiny_network()
