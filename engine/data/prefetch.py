"""Making batches ahead of their consumer, in one thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")

_AHEAD = 2


def prefetch(
    make: Callable[[int], T], start: int, *, name: str, on_wait: Callable[[float], None]
) -> Generator[T, None, None]:
    """Yields make(start), make(start + 1), … without end, made ahead by one thread called `name`, which ends when the
    iterator is closed. An error of `make` is raised where its item would have come. `on_wait` gets the seconds that the
    consumer had to wait for each item."""
    ready: queue.Queue[T | BaseException] = queue.Queue(_AHEAD)
    closed = threading.Event()
    worker = threading.Thread(target=_produce, args=(make, start, ready, closed), name=name, daemon=True)
    worker.start()
    try:
        while True:
            began = time.perf_counter()
            item = ready.get()
            on_wait(time.perf_counter() - began)
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        worker.join()


def _produce(
    make: Callable[[int], T], start: int, ready: queue.Queue[T | BaseException], closed: threading.Event
) -> None:
    number = start
    while not closed.is_set():
        item: T | BaseException
        try:
            item = make(number)
        except BaseException as error:  # whatever it is, the consumer must see it and not wait for ever
            item = error
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return
        number += 1
