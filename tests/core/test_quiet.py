"""What libraries say is held back while they work, and only then."""

from __future__ import annotations

import logging
import warnings

import pytest

from hpddrnet_trt.core.quiet import quiet


def test_loggers_and_warnings(caplog: pytest.LogCaptureFixture) -> None:
    library = logging.getLogger("some.library")
    library.setLevel(logging.INFO)
    with quiet("some.library", hints=["known to be .*"]):
        library.warning("a remark")
        library.error("an error")
        warnings.warn("known to be harmless", UserWarning, stacklevel=1)
        with pytest.warns(UserWarning, match="unknown"):
            warnings.warn("unknown", UserWarning, stacklevel=1)
    library.info("another remark")
    assert caplog.messages == ["an error", "another remark"]
    with pytest.warns(UserWarning, match="harmless"):
        warnings.warn("known to be harmless", UserWarning, stacklevel=1)
