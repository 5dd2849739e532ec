"""Being asked to stop: Ctrl-C, SIGTERM and SIGHUP end a reproduction in the same orderly way."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_HEARD = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """A signal asked for the end.

    Args:
        number: Which.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number

    @property
    def code(self) -> int:
        """The exit code that shells expect: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""
        return 128 + self.number


class Stop:
    """Within this context the first signal raises ``Stopped``; the second one ends the process at once, as usual.

    What must not be left half done is put into :meth:`held`: a signal that comes there waits until the end of it. A
    signal that is ignored stays so, as SIGHUP under nohup. Signals reach the main thread only; in another one nothing
    changes.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._held = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in _HEARD:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._asked)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within this context a signal waits for the end of the context, or for :meth:`heard` within it."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before
        self._answer()

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Within this context, which is in :meth:`held`, a signal is answered at once."""
        before, self._held = self._held, False
        try:
            self._answer()
            yield
        finally:
            self._held = before

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        for each in self._before:  # the second one ends the process, whatever it is at
            signal.signal(each, signal.SIG_DFL)
        if not self._held:
            raise Stopped(number)

    def _answer(self) -> None:
        if self._number is not None and not self._held:
            raise Stopped(self._number)
