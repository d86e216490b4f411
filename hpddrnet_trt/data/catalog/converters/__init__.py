"""One function per dataset: from the authors' files to labelled micrographs."""

from __future__ import annotations

from functools import partial

from hpddrnet_trt.data.catalog.converters.axons import axondeepseg
from hpddrnet_trt.data.catalog.converters.nasa import ebc, superalloy
from hpddrnet_trt.data.catalog.converters.rocks import mudrocknet, shale_duvernay
from hpddrnet_trt.data.catalog.converters.steel import metaldam, uhcs
from hpddrnet_trt.data.catalog.labelled import Converter

CONVERTERS: dict[str, Converter] = {
    **{f"nasa-super{number}": partial(superalloy, subset=f"Super{number}") for number in (1, 2, 3, 4)},
    **{f"nasa-ebc{number}": partial(ebc, subset=f"EBC{number}") for number in (1, 2, 3)},
    "mudrocknet": mudrocknet,
    "shale-duvernay": shale_duvernay,
    "uhcs": uhcs,
    "metaldam": metaldam,
    "axondeepseg-sem": axondeepseg,
}
