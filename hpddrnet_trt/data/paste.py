"""Regions of a rare class from one picture, pasted into another where the same stands around them.

"Simple Copy-Paste" (Ghiasi et al., CVPR 2021; arXiv:2012.07177) pastes anywhere. A micrograph's rare things have their
place, a precipitate in the matrix or a crack in the coating; so a region goes only where all of it, and a rim of
:data:`RIM` pixels, was of the one class that surrounds it where it comes from.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.manifest import IGNORE_INDEX

RIM = 3  # pixels around a region that come with it, and over which it fades into the picture
Grey = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]


def paste(image: Grey, mask: Labels, donor: Grey, donor_mask: Labels, label: int) -> int:
    """Paste every region of ``label`` in ``donor`` that finds its surroundings in ``image``, at the same place.

    All ``[H, W]``: grey levels float32, labels uint8; ``image`` and ``mask`` are changed. A region takes the mean grey
    of its new surroundings. Regions cut by the border stay away: what they are surrounded by is not known. Returns how
    many were pasted.
    """
    _, components, boxes, _ = cv2.connectedComponentsWithStats((donor_mask == label).astype(np.uint8), connectivity=8)
    height, width = mask.shape
    pasted = 0
    for index, (left, top, across, down, _) in enumerate(boxes[1:], 1):
        box = slice(top - RIM, top + down + RIM), slice(left - RIM, left + across + RIM)
        if min(box[0].start, box[1].start) < 0 or box[0].stop > height or box[1].stop > width:
            continue
        region = (components[box] == index).astype(np.uint8)
        inside = cv2.distanceTransform(1 - region, cv2.DIST_L2, 3)  # 0 in the region
        rim = (inside > 0) & (inside <= RIM)
        around = np.unique(donor_mask[box][rim])
        if len(around) != 1 or around[0] in (label, IGNORE_INDEX) or (mask[box][inside <= RIM] != around[0]).any():
            continue
        share = np.clip(1 - inside / (RIM + 1), 0, 1)
        taken = donor[box] + (image[box][rim].mean() - donor[box][rim].mean())
        image[box] += share * (taken - image[box])
        mask[box][region > 0] = label
        pasted += 1
    return pasted
