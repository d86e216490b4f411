"""The one bar that shows how far a long piece of work is."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

QUIET = "HPDDRNET_QUIET"  # set in the environment: no bars, also in processes that this one starts


def progress_bar(steps: Iterable[Any] | None = None, *, show: bool = True, **options: Any) -> tqdm[Any]:
    """A tqdm bar over ``steps``, or moved by hand, on stderr: only where that is a terminal, and ``show`` and nobody
    asked for quiet. ``options`` are tqdm's (``total``, ``desc``, ``unit``, ``delay``)."""
    return tqdm(steps, disable=None if show and not os.environ.get(QUIET) else True, dynamic_ncols=True, **options)
