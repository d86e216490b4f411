"""Work in several threads at once, and what it raised."""

from __future__ import annotations

import threading
from collections.abc import Callable


def in_threads(*works: Callable[[], object], timeout_s: float) -> list[BaseException]:
    """Run all at the same time, each to end within ``timeout_s``; what they raised."""
    raised: list[BaseException] = []
    begin = threading.Barrier(len(works))

    def run(work: Callable[[], object]) -> None:
        begin.wait()
        try:
            work()
        except BaseException as exc:  # handed to the test
            raised.append(exc)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
        assert not thread.is_alive()
    return raised
