"""A function on piece after piece, in this process or spread over several, with the results in the order of the pieces.

Memory stays flat: only a few pieces for each process are under way at a time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

from sentence_classifier.errors import InputError

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class Workers(contextlib.AbstractContextManager["Workers"]):
    """So many processes, which start with the first piece and end with the `with` block.

    Args:
        number: of processes; 1 works in this one.
        make: makes, once in each process, the function that `made` stands for.

    Attributes:
        made: a function for `map` that is costly to make or large, such as one that holds a model.
    """

    def __init__(self, number: int, make: Callable[[], Callable[[Any], Any]] | None = None) -> None:
        self.number = number
        self.made: Callable[[Any], Any] = make() if make and number == 1 else _call_made
        # Processes that start anew, not copies of this one: copying one whose libraries have threads can hang.
        self._pool = (ProcessPoolExecutor(number, multiprocessing.get_context("spawn"), _begin, (make,))
                      if number > 1 else None)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Piece], Result], pieces: Iterable[Piece]) -> Iterator[Result]:
        """`function` of each piece, in order.

        Raises:
            InputError: a process died; and what `function` raises for the first piece that it raises for.
        """
        if self._pool is None:
            yield from map(function, pieces)
            return
        waiting: deque[Future[Result]] = deque()
        try:
            for piece in pieces:
                waiting.append(self._pool.submit(function, piece))
                if len(waiting) > 2 * self.number:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise InputError(f"one of the {self.number} processes of --num_workers died, perhaps for lack of memory; "
                             "take fewer.") from None


_made: Callable[[Any], Any]  # in this process


def _call_made(piece: Any) -> Any:
    return _made(piece)


def _begin(make: Callable[[], Callable[[Any], Any]] | None) -> None:
    """What a process does first."""
    global _made
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started it ends it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if make:
        _made = make()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # a killed one cannot say that it ends
    os._exit(1)
