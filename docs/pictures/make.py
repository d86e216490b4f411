"""Make the gallery's pictures: micrograph, mask and labels of the shipped model side by side.

    python docs/pictures/make.py DATA

DATA holds the datasets `nasa-super1`, `nasa-ebc` and `shale-duvernay`, as `hpddrnet-trt datasets get` writes them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from hpddrnet_trt import load_segmenter, read_micrograph
from hpddrnet_trt.data.check import check_dataset
from hpddrnet_trt.data.labels import overlay, read_mask

HERE = Path(__file__).parent
GAP = 8
PICTURES = {  # name: micrograph, and whether the model knows its material
    "super1-test-1": ("nasa-super1", "test/spot1_0d_1.png", True),
    "super1-test-2": ("nasa-super1", "test/spot1_180d_6.png", True),
    "not-ebc": ("nasa-ebc", "test/070516-1_S1160030.png", False),
    "not-shale": ("shale-duvernay", "test/p7_y3328_x0000_384.png", False),
}


def main(data: Path) -> None:
    with load_segmenter("nasa-super1") as segmenter:
        palette = segmenter.manifest.palette
        for name, (dataset, file, known) in PICTURES.items():
            micrograph = read_micrograph(data / dataset / "images" / file).pixels[:512, :512]
            labels = segmenter.segment(micrograph).labels
            panels = [np.repeat(micrograph[..., None], 3, axis=2)]
            if known:
                mask = read_mask(data / dataset / "masks" / file)[:512, :512]
                panels.append(overlay(micrograph, mask, palette))
            panels.append(overlay(micrograph, labels, palette))
            gap = np.full((len(micrograph), GAP, 3), 255, np.uint8)
            row = np.hstack([part for panel in panels for part in (gap, panel)][1:])
            Image.fromarray(row).save(HERE / f"{name}.jpg", quality=86)
    with TemporaryDirectory() as folder:
        sheet = Path(folder) / "sheet.png"
        check_dataset(data / "nasa-super1", contact_sheet=sheet)
        Image.open(sheet).convert("RGB").save(HERE / "contact-sheet.jpg", quality=82)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
