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
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.plugins.text.metadata import create_summary_metadata

from engine.records.files import AppendFile
from engine.records.run_dir import EVENT_FILES

_NUMBERS = itertools.count()
"""Numbers in the names of a process's files: TensorBoard reads those of one second in the order of their names."""


class EventFile:
    def __init__(
        self, folder: Path, *, purge_step: int | None = None, suffix: str = "", tell: Callable[[str], None]
    ) -> None:
        """purge_step: TensorBoard then leaves out what earlier files of the folder have from that step on. suffix: end
        of its name. tell: is told when events cannot be written, and when they can again. The file is made with its
        first event."""
        self._folder, self._suffix, self._tell = folder, suffix, tell
        self._file: AppendFile | None = None
        self._lost = 0
        self._head = _tfrecord(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
        """What must be in the file before any event."""
        if purge_step is not None:
            restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._head += _tfrecord(event_pb2.Event(wall_time=time.time(), step=purge_step, session_log=restart))

    def scalars(self, points: Mapping[str, float], step: int, *, when: float | None = None) -> None:
        """Writes all of them as one event. when: seconds since 1970; None: now."""
        values = [summary_pb2.Summary.Value(tag=tag, simple_value=value) for tag, value in points.items()]
        self._add(values, step, when)

    def texts(self, texts: Mapping[str, str], step: int) -> None:
        """Writes Markdown by name."""
        self._add([_text(name, markdown) for name, markdown in texts.items()], step)

    def hparam_columns(self, hparams: Iterable[api_pb2.HParamInfo], metrics: Iterable[api_pb2.MetricInfo]) -> None:
        """Writes what the HPARAMS page shows of each session."""
        shown = api_pb2.Experiment(hparam_infos=hparams, metric_infos=metrics, time_created_secs=time.time())
        self._add([_hparams(metadata.EXPERIMENT_TAG, experiment=shown)], 0)

    def hparam_session(
        self, hparams: Mapping[str, float | str], metrics: Mapping[str, float], *, group: str = "", when: float
    ) -> None:
        """Writes a row of the HPARAMS page: hyper-parameters, and metrics as scalars; none: it has failed. when: it
        ended, in seconds since 1970."""
        start = plugin_data_pb2.SessionStartInfo(group_name=group, start_time_secs=when)
        for name, value in hparams.items():
            setattr(start.hparams[name], "string_value" if isinstance(value, str) else "number_value", value)
        status = api_pb2.STATUS_SUCCESS if metrics else api_pb2.STATUS_FAILURE
        end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=when)
        sides = [
            _hparams(metadata.SESSION_START_INFO_TAG, session_start_info=start),
            _hparams(metadata.SESSION_END_INFO_TAG, session_end_info=end),
        ]
        self._add(sides, 0, when)
        self.scalars(metrics, 0, when=when)

    def _add(self, values: list[Any], step: int, when: float | None = None) -> None:
        when = time.time() if when is None else when
        event = event_pb2.Event(wall_time=when, step=step, summary=summary_pb2.Summary(value=values))
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                name = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS):06d}"
                self._file = AppendFile(self._folder / f"{EVENT_FILES}{name}{self._suffix}")
            self._file.append(self._head + _tfrecord(event))
        except OSError as error:
            if not self._lost:
                self._tell(f"warning: {self._folder} cannot be written ({error.strerror}); going on without curves")
            self._lost += 1
            return
        self._head = b""
        if self._lost:
            self._tell(f"{self._folder} can be written again; events missing in between: {self._lost}")
            self._lost = 0

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _hparams(tag: str, **data: Any) -> Any:
    """Returns one of the messages of TensorBoard's hparams plugin."""
    known = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**data))
    return summary_pb2.Summary.Value(tag=tag, metadata=known, tensor=metadata.NULL_TENSOR)


def _text(name: str, markdown: str) -> Any:
    """Returns a value of TensorBoard's text plugin, as torch's SummaryWriter.add_text writes it."""
    shape = tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=1)])
    return summary_pb2.Summary.Value(
        tag=f"{name}/text_summary",
        metadata=create_summary_metadata(display_name="", description=""),
        tensor=tensor_pb2.TensorProto(dtype="DT_STRING", string_val=[markdown.encode()], tensor_shape=shape),
    )


def _tfrecord(event: Any) -> bytes:
    """Returns a TFRecord: length, its checksum, the event, its checksum."""
    data: bytes = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
