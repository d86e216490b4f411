"""What :mod:`hpddrnet_trt.graph.domain` adds to an ONNX file, in PyTorch: features pooled over cells of the image."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from hpddrnet_trt.core.domain import CELL, FINE
from hpddrnet_trt.core.manifest import Normalization
from hpddrnet_trt.models.network import HPDDRNet, resize


def pooled_features(fine: Tensor) -> Tensor:
    """``domain_features`` float32 ``[N, 2 C, rows, columns]`` of :class:`~.network.Features` ``fine``."""
    window = CELL // (2 * FINE)
    values = F.interpolate(fine.float(), scale_factor=0.5, mode="bilinear", align_corners=False)
    mean, square = (
        F.avg_pool2d(each, window, window, window // 2, count_include_pad=False) for each in (values, values * values)
    )
    return torch.cat([mean, square.sqrt()], dim=1)


def predict_with_domain(network: HPDDRNet, x: Tensor) -> tuple[Tensor, Tensor]:
    """The network's :meth:`~.network.HPDDRNet.predict_logits` and the :func:`pooled_features` of the same input."""
    features = network.backbone(x)
    logits = network.decode_head(features)
    return resize(logits, x.shape[-2], x.shape[-1]), pooled_features(features.fine)


def domain_features(
    network: HPDDRNet, image: npt.NDArray[np.uint8], normalization: Normalization
) -> npt.NDArray[np.float32]:
    """``[2 C, rows, columns]`` of a grey image ``[H, W]``; computes no more of the network than that needs."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (normalization.mean, normalization.std))
    with torch.inference_mode():
        grey = torch.from_numpy(image.astype(np.float32))
        features = pooled_features(network.backbone.stem[:4]((grey - mean) / std))[0]
    return np.asarray(features.numpy(), dtype=np.float32)
