"""PNG files that Pillow cannot write: 16 bits a channel, chunks behind the pixels."""

from __future__ import annotations

import struct
import zlib


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(pixels: bytes, width: int, height: int, colour: int, bits: int = 8, *, before=b"", after=b"") -> bytes:
    """A PNG of raw rows; `colour`: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA; `before`, `after`: more chunks."""
    row = len(pixels) // height
    rows = b"".join(b"\0" + pixels[i * row : (i + 1) * row] for i in range(height))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", zlib.compress(rows)) + after + chunk(b"IEND", b"")
