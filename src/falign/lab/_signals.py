"""Ctrl-C, SIGTERM and SIGHUP as requests to stop, which a training and a reproduction answer in an orderly way.

Signals that the process ignores stay ignored, such as SIGHUP under ``nohup``. Python runs handlers in the main thread
only; in another thread both contexts change nothing.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """A signal that ends the command.

    Args:
        number: The signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number

    @property
    def code(self) -> int:
        """Exit code that shells expect: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""
        return 128 + self.number


class _StopSignals:
    """Context manager that handles the signals and puts the handlers back that were there before.

    Attributes:
        requested: Number of the first signal that came; None as long as none came.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Any:  # itself; beartype knows no Self in a class that it does not decorate
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # None: a handler of C code, which could not be put back
                    self._before[number] = before
                    signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        raise NotImplementedError


class GracefulStop(_StopSignals):
    """Context of a training: signals raise ``Stopped``, but within ``first_deferred`` the first one only sets a flag.

    The training loop reads the flag ``requested`` after every step, saves what it has and ends; a second signal raises
    even there.
    """

    def __init__(self) -> None:
        super().__init__()
        self._deferrable = 0  # how many more signals may come before one raises

    @contextmanager
    def first_deferred(self) -> Iterator[None]:
        """Let the first signal only set ``requested``.

        Raises:
            Stopped: A signal came already; where it was raised, code of the user's model may have caught it.
        """
        self._deferrable += 1
        try:
            if self.requested is not None:
                raise Stopped(self.requested)
            yield
        finally:
            self._deferrable -= 1

    @contextmanager
    def all_deferred(self) -> Iterator[None]:
        """Let no signal raise: for the few files that say how a run has ended."""
        self._deferrable += 1000
        try:
            yield
        finally:
            self._deferrable -= 1000

    def _handle(self, number: int, frame: FrameType | None) -> None:
        deferrable = self._deferrable - (self.requested is not None)
        self.requested = self.requested or number
        if deferrable <= 0:
            raise Stopped(number)


class ImmediateStop(_StopSignals):
    """Context of a reproduction: the first signal raises ``Stopped``, the second one ends the process at once.

    What must not be left half done is put into ``deferred``: a signal that comes there raises at the end of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._deferred = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let a signal raise at the end of this context, or at the next ``immediate`` within it."""
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before
        self._raise_requested()

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """Let a signal raise at once within ``deferred``, for example while waiting for a worker."""
        before, self._deferred = self._deferred, False
        try:
            self._raise_requested()
            yield
        finally:
            self._deferred = before

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = number
        for each in self._before:  # the system's own handling ends the process whatever it is doing
            signal.signal(each, signal.SIG_DFL)
        if not self._deferred:
            raise Stopped(number)

    def _raise_requested(self) -> None:
        if self.requested is not None and not self._deferred:
            raise Stopped(self.requested)
