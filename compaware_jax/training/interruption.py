"""Ctrl-C at a moment that suits: what runs is finished first."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_LOG = logging.getLogger(__name__)


class Interruption:
    """While this context lasts, and once told to, holds back the first Ctrl-C; the second one interrupts.

    Python raises it anywhere: inside a callback of the compiled program that runs, which then fails with the
    state it took, or between two files of a checkpoint. Where Ctrl-C means something else already, or in
    another thread than the main one, which gets none, nothing changes.

    Attributes:
      came: whether one was held back.
    """

    def __init__(self) -> None:
        self.came = False
        self._before: Any = None

    def hold(self) -> None:
        """Hold it back from now on."""
        main = threading.current_thread() is threading.main_thread()
        if main and not self.came and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        self._restore()
        _LOG.warning("interrupted: the steps that run are finished and saved. Ctrl-C again stops at once.")

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if self.came and kind is None:
            raise KeyboardInterrupt
