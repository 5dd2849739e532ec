"""Ctrl-C as a request that the training loop answers when it can."""

import signal
import threading
from types import FrameType, TracebackType


class Interrupt:
    """Within this context the first Ctrl-C sets ``requested``; the second one stops at once, as usual.

    Signals reach the main thread only; in another thread nothing changes.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "Interrupt":
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
