"""Compressed files as streams of bytes."""

from __future__ import annotations

import gzip
import io
import lzma
from collections.abc import Callable
from typing import Any, BinaryIO, cast

COMPRESSIONS = (".gz", ".xz", ".zst")
BUFFER = 1 << 20


class CountedFile(io.RawIOBase):
    """Passes a raw file's bytes on and shows each block to `seen`."""

    def __init__(self, raw: io.RawIOBase | BinaryIO, seen: Callable[[memoryview | bytes], None]) -> None:
        self._raw = cast(io.RawIOBase, raw)
        self._seen = seen

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer) or 0
        self._seen(memoryview(buffer)[:count])
        return count


class _ZstdStream(io.RawIOBase):
    """Decompresses zstd frames. zstandard's own stream_reader takes a torn file for a complete one."""

    _CHUNK = 8192  # small: one block of 4 bytes may unpack to 128 KiB

    def __init__(self, raw: io.RawIOBase) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj
        self._raw = raw
        self._frame: Any = None
        self._packed = b""
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            packed = self._packed or self._raw.read(self._CHUNK) or b""
            if not packed:
                if self._frame is not None:
                    raise EOFError("the zstd data ends before its end marker")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._text = memoryview(self._frame.decompress(packed))
            except self._error as error:
                raise OSError(str(error)) from error
            self._packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._text))
        buffer[:count] = self._text[:count]
        self._text = self._text[count:]
        return count


def decompressed(raw: io.RawIOBase, suffix: str) -> io.BufferedReader | gzip.GzipFile | lzma.LZMAFile:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=io.BufferedReader(raw, BUFFER))
    if suffix == ".xz":
        return lzma.LZMAFile(io.BufferedReader(raw, BUFFER))
    if suffix == ".zst":
        return io.BufferedReader(_ZstdStream(raw), BUFFER)
    return io.BufferedReader(raw, BUFFER)
