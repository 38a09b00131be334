"""Shards: memory-mapped Arrow files of packed sequences. Writer and reader side by side; no torch, no datasets."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from engine.data.manifest import COMMAND, Manifest, ShardEntry
from engine.errors import UserError
from engine.records.files import sync_folder, write_whole

COLUMN = "input_ids"
AGAIN = f"start {COMMAND} again with the same settings, it redoes only what is missing"
MOST_MAPPED = 32_768
"""Most shards that are mapped at once: half of the 65,530 areas that Linux gives a process (vm.max_map_count)."""


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.arrow"


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """The sidecar shard-00000.json: proof that the shard beside it is complete, and made from what `key` hashes."""

    key: str
    sequences: int
    tokens: int
    dropped: int
    size: int
    sha256: str
    cut: int = 0


def id_type(vocab_size: int) -> pa.DataType:
    return pa.uint16() if vocab_size <= 1 << 16 else pa.int32()


def write_shard(
    folder: Path,
    index: int,
    key: str,
    sequences: Sequence[npt.NDArray[Any]],
    *,
    dtype: pa.DataType,
    dropped: int,
    cut: int = 0,
) -> ShardInfo:
    """Writes the shard, then its sidecar, each whole or not at all."""
    path = folder / shard_name(index)
    sidecar = path.with_suffix(".json")
    if sidecar.exists():  # it must not vouch for the new bytes if we are killed between the two files
        sidecar.unlink()
        sync_folder(folder)
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = np.concatenate(sequences) if len(sequences) else np.zeros(0, np.int32)
    column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.astype(dtype.to_pandas_dtype()), type=dtype))
    batch = pa.record_batch([column], names=[COLUMN])  # one batch a shard: opening it costs the same at any size
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data = sink.getvalue()
    write_whole(path, data)
    info = ShardInfo(
        key=key,
        sequences=len(sequences),
        tokens=int(lengths.sum()),
        dropped=dropped,
        cut=cut,
        size=data.size,
        sha256=hashlib.sha256(data).hexdigest(),
    )
    write_whole(sidecar, (json.dumps(asdict(info)) + "\n").encode())
    return info


def finished_shard(folder: Path, index: int, key: str) -> ShardInfo | None:
    """Returns the sidecar of shard `index` if it was made from the same text and settings and its file is there."""
    path = folder / shard_name(index)
    try:
        info = ShardInfo(**json.loads(path.with_suffix(".json").read_bytes()))
        return info if info.key == key and path.stat().st_size == info.size else None
    except (FileNotFoundError, ValueError, TypeError):
        return None


def remove_strays(folder: Path, shards: int) -> None:
    """Removes what earlier runs left: half-written files, and shards from number `shards` on."""
    for path in folder.glob("shard-*"):
        number = path.name.removeprefix("shard-").split(".")[0]
        if ".tmp-" in path.name or (number.isdigit() and path.suffix in (".arrow", ".json") and int(number) >= shards):
            path.unlink()
    for path in folder.glob("manifest.json.tmp-*"):
        path.unlink()


def check_size(path: Path, entry: ShardEntry) -> None:
    """Raises UserError for a shard that is missing, or not as long as recorded."""
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        raise UserError(f"{path}: missing shard; {AGAIN}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if size != entry.size:
        raise UserError(f"{path}: has {size} bytes, the manifest says {entry.size} (incomplete copy?); {AGAIN}")


class SequenceStore:
    """Random access to all sequences of a corpus, in the order of its shards.

    Opening touches no shard. One is looked at and mapped when it is first used; a row is one copy of its ids.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._entries = folder, manifest.shards
        self._starts = np.concatenate([[0], np.cumsum([entry.sequences for entry in manifest.shards])])
        self._open: dict[int, tuple[npt.NDArray[np.int32], npt.NDArray[Any]]] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[npt.NDArray[Any]]:
        """Returns the (tokens,) ids of each sequence, as views of the mapped file. Raises UserError, naming the shard,
        for one that is missing or torn."""
        return [values[start:end] for values, start, end in self._places(indices)]

    def lengths(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns the number of ids of each sequence, without reading them. Raises like `rows`."""
        return np.array([end - start for _, start, end in self._places(indices)], dtype=np.int64)

    def _places(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Iterator[tuple[npt.NDArray[Any], int, int]]:
        """Yields, for each sequence, the ids of its shard, and where its own begin and end among them."""
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        for index, shard in zip(indices, shards, strict=True):
            offsets, values = self._open.get(shard) or self._map(int(shard))
            row = int(index) - int(self._starts[shard])
            yield values, int(offsets[row]), int(offsets[row + 1])

    def _map(self, shard: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any]]:
        entry = self._entries[shard]
        path = self._folder / entry.file
        check_size(path, entry)
        try:
            with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
                batch = stream.read_next_batch()
        except (pa.ArrowException, StopIteration, OSError) as error:
            raise UserError(f"{path}: unreadable shard ({error}); delete it and {AGAIN}") from error
        column = batch.column(0)
        if len(column) != entry.sequences:
            raise UserError(f"{path}: {len(column)} sequences, the manifest says {entry.sequences}; {AGAIN}")
        if len(self._open) >= MOST_MAPPED:
            del self._open[next(iter(self._open))]
        # closing the map's file handle is fine (the buffers keep the mapping), and thousands of shards need no handles
        self._open[shard] = column.offsets.to_numpy(), column.values.to_numpy()
        return self._open[shard]
