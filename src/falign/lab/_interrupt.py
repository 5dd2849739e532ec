"""Ctrl-C, and the signals by which a machine or a closed terminal ends a process, as requests that a run answers."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """A signal that is to end the run at once.

    Args:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__("interrupted")
        self.number = number


class Interrupt:
    """Within this context INT, TERM and HUP raise ``Stopped``.

    Within ``patient`` the first one only sets ``requested``, so that the run can save what it has; the second one
    raises. What the process ignores stays ignored, such as HUP under ``nohup``. Signals reach the main thread only; in
    another thread nothing changes.

    Attributes:
        requested: The number of the first signal that came, or None.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._patience = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # None: a handler that could not be put back
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Answer the first signal later: by ``requested``.

        Raises:
            Stopped: One came already.
        """
        self._patience += 1
        try:
            if self.requested is not None:  # where it was raised, something may have caught it
                raise Stopped(self.requested)
            yield
        finally:
            self._patience -= 1

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Let nothing interrupt the few files that say how a run has ended."""
        self._patience += 1000
        try:
            yield
        finally:
            self._patience -= 1000

    def _note(self, number: int, frame: FrameType | None) -> None:
        patience = self._patience - (self.requested is not None)
        self.requested = self.requested or number
        if patience <= 0:
            raise Stopped(number)
