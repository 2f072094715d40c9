"""Packed files: gzip, Zstandard and xz, read as a stream of what is in them."""

import gzip
import io
import lzma
import zlib
from typing import BinaryIO

SUFFIXES = (".gz", ".zst", ".xz")
ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)


def decompress(raw: io.BufferedReader, suffix: str) -> BinaryIO | gzip.GzipFile | lzma.LZMAFile:
    """The bytes of a file whose name ends in `suffix`.

    Raises:
        ERRORS: one of them, while they are read.
    """
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".zst":
        return io.BufferedReader(_ZstdFile(raw), buffer_size=1 << 20)
    if suffix == ".xz" and raw.peek(1):  # like the others, a file of nothing has no lines
        return lzma.LZMAFile(raw)
    return raw


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of a .zst file of one or more frames.

    Differs from zstandard's stream_reader in that a file cut short raises EOFError: losing the
    rest of a corpus silently is the one thing this must not do.
    """

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw = raw
        # Archives packed with `zstd --long=31` need the largest window.
        self._context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._error = zstandard.ZstdError
        self._frame = self._context.decompressobj()
        self._in_frame = False
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[override]
        while not self._ready:
            packed = self._packed or self._raw.read(1 << 17)
            if not packed:
                if self._in_frame:
                    raise EOFError("Zstandard file ended before its last frame was complete")
                return 0
            try:
                self._ready = memoryview(self._frame.decompress(packed))
            except self._error as error:
                raise OSError(f"not a valid Zstandard file ({error})") from error
            self._in_frame, self._packed = True, b""
            if self._frame.eof:
                self._packed = self._frame.unused_data
                self._frame = self._context.decompressobj()
                self._in_frame = False
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
