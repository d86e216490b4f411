"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hpddrnet_trt.engines import ENGINES

if TYPE_CHECKING:
    EngineName = str
else:
    EngineName = Literal[("auto", *ENGINES)]

ModelFile = Annotated[
    Path, typer.Argument(help="Model file (.safetensors, .onnx, .engine), or a shipped model's name.")
]
Checkpoint = Annotated[Path, typer.Argument(help="Checkpoint (.safetensors), or a shipped model's name.")]
OnnxFile = Annotated[Path, typer.Argument(help="ONNX file written by export, or a shipped model's name.")]
Engine = Annotated[
    EngineName,
    typer.Option(help="Runtime; auto chooses by the file's ending."),
]
Mode = Annotated[
    Literal["single", "flip", "multiscale"],
    typer.Option(help="One view, its mirror image too, or both at six scales (TensorRT engines need logits for it)."),
]
Data = Annotated[Path, typer.Option(help="Dataset folder (images|masks/{train,val,test} or {split}/{imgs,labels}).")]
Split = Annotated[str, typer.Option(help="Split of the dataset.")]
