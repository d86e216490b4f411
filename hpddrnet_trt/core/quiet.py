"""What libraries say and is known to be harmless, held back."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def quiet(*loggers: str, hints: Sequence[str] = (), module: str = "") -> Iterator[None]:
    """Within, these loggers report errors only, and warnings of ``module`` that match a hint are not shown.

    ``loggers``: names, "" for all that have no level of their own. ``hints`` and ``module``: regular expressions.
    """
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in hints:
                warnings.filterwarnings("ignore", message=message, module=module)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
