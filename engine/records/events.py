"""TensorBoard event files that survive a full disk.

torch's SummaryWriter hands its events to a thread, which dies at the first OSError with a traceback; every later call
raises that error. Here an event is one write of the caller's; what does not fit is lost, and counted.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.plugins.text.metadata import create_summary_metadata

from engine.records.files import AppendFile

_NUMBERS = itertools.count()


class EventFile:
    def __init__(self, folder: Path, *, purge_step: int | None = None, tell: Callable[[str], None]) -> None:
        """purge_step: TensorBoard then leaves out what earlier files of the folder have from that step on. tell: is
        told when events cannot be written, and when they can again. The file is made with its first event."""
        self._folder, self._tell = folder, tell
        self._file: AppendFile | None = None
        self._lost = 0
        self._head = _framed(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
        """What must be in the file before any event."""
        if purge_step is not None:
            restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._head += _framed(event_pb2.Event(wall_time=time.time(), step=purge_step, session_log=restart))

    def scalars(self, points: Mapping[str, float], step: int) -> None:
        """All of them in one event."""
        self._add([summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in points.items()], step)

    def texts(self, texts: Mapping[str, str], step: int) -> None:
        """Markdown."""
        self._add([_text(name, markdown) for name, markdown in texts.items()], step)

    def _add(self, values: list[Any], step: int) -> None:
        event = event_pb2.Event(wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=values))
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                name = (
                    f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
                )
                self._file = AppendFile(self._folder / name)
            self._file.append(self._head + _framed(event))
        except OSError as error:
            if not self._lost:
                self._tell(
                    f"warning: {self._folder} cannot be written ({error.strerror}); training continues without curves"
                )
            self._lost += 1
            return
        self._head = b""
        if self._lost:
            self._tell(f"{self._folder} is written again; the points of {self._lost} log steps are missing")
            self._lost = 0

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _text(name: str, markdown: str) -> Any:
    """A value of TensorBoard's text plugin, as torch's SummaryWriter.add_text writes it."""
    shape = tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=1)])
    return summary_pb2.Summary.Value(
        tag=f"{name}/text_summary",
        metadata=create_summary_metadata(display_name="", description=""),
        tensor=tensor_pb2.TensorProto(dtype="DT_STRING", string_val=[markdown.encode()], tensor_shape=shape),
    )


def _framed(event: Any) -> bytes:
    """TFRecord: length, its checksum, the event, its checksum."""
    data: bytes = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
