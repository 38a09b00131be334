"""Compressed files as streams of bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, cast

from engine.errors import UserError, first_line

COMPRESSIONS = {
    ".gz": re.compile(rb"\x1f\x8b\x08"),
    ".bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P)"),
    ".xz": re.compile(rb"\xfd7zXZ\x00"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # a frame; a frame to skip, as pzstd writes
}
"""Usual ending of each compression, and how its files begin."""
UNREADABLE = (EOFError, lzma.LZMAError, zlib.error, OSError)
"""What reading a file, and unpacking it, can raise."""
BUFFER = 1 << 20
_COMMON_WINDOW = 1 << 27  # what the zstd program unpacks without being told --long=31
_LARGEST_WINDOW = 1 << 31  # what --long=31 packs, the most that zstd can unpack


class CountedFile(io.RawIOBase):
    """A raw file whose bytes are passed on, each block also to `seen`."""

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
    """The bytes of zstd frames, decompressed."""

    # until zstandard > 0.25: its own stream_reader takes a torn file for a complete one

    _CHUNK = 8192  # small: one block of 4 bytes may unpack to 128 KiB

    def __init__(self, raw: io.RawIOBase) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._new = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj
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


def compression_of(head: bytes) -> str | None:
    """Returns the usual ending of files that are compressed like the one that begins with `head`."""
    return next((ending for ending, magic in COMPRESSIONS.items() if magic.match(head)), None)


def decompressed(
    raw: io.RawIOBase | BinaryIO, compression: str | None
) -> io.BufferedReader | gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile:
    """Returns the unpacked bytes of `raw`, all members of a compressed file after one another."""
    packed = cast(io.RawIOBase, raw)
    if compression == ".gz":
        return gzip.GzipFile(fileobj=io.BufferedReader(packed, BUFFER))
    if compression == ".bz2":
        return bz2.BZ2File(io.BufferedReader(packed, BUFFER))
    if compression == ".xz":
        return lzma.LZMAFile(io.BufferedReader(packed, BUFFER))
    if compression == ".zst":
        return io.BufferedReader(_ZstdStream(packed), BUFFER)
    return io.BufferedReader(packed, BUFFER)


def long_window(head: bytes) -> int:
    """Returns the bytes of memory that unpacking the zstd data takes, or 0 where they are not worth a word."""
    import zstandard

    try:
        window = zstandard.get_frame_parameters(head).window_size
    except zstandard.ZstdError:  # torn, which reading it says better
        return 0
    return window if window > _COMMON_WINDOW else 0


def unreadable(place: str, error: BaseException) -> UserError:
    """Words one of the errors `UNREADABLE`."""
    remedy = "unpack it first (zstd -d --long=31 FILE)" if "memory" in str(error) else "replace the file"
    return UserError(f"{place}: cannot be read from here on ({first_line(error)}); {remedy}")
