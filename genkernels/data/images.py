"""Encoded images (files, or cells of a table) to data sets: one survey of the headers, then decoding.

Every picture of a data set must come out alike, uint8 ``[C, H, W]`` with 256 grey levels:

- C is 1 when all are greyscale, else 3: grey ones are then spread over R, G, B, CMYK and palettes become RGB. More than
  8 bits a channel are refused, fewer are stretched to 0 to 255.
- Transparency (an alpha channel, a transparent colour) is dropped: the colours beneath it are kept. Of several frames
  the first is taken.
- Pictures are turned as their EXIF orientation says, whatever their format.
- Without ``?size=S`` all must have one size; with it each is scaled, its shorter side to S, and cut to the centre.

What a picture loses that way, and grey pictures that fill three equal channels, are told once, before training
(`DataBundle.notes`). What fits in memory is decoded once, at load; the rest is decoded at each access.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from genkernels.data.bundle import TensorPairs
from genkernels.data.spec import DataError, reason, require
from genkernels.data.split import hash64

IN_MEMORY = 512 * 2**20  # bytes of decoded pixels, both parts together; CIFAR-10 takes 176 MiB

_GREY = {"1", "L", "LA", "La"}
_COLOUR = {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}
_ALPHA = {"LA", "La", "PA", "RGBA", "RGBa"}
_ORIENTED = {"JPEG", "MPO", "WEBP", "PNG"}  # Pillow turns a TIFF by itself; the others know no EXIF
_ORIENTATION, _QUARTER_TURNS = 0x0112, (5, 6, 7, 8)
_EXIF = (b"eXIf", b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # the chunks of a PNG that may tell of a turn
_END = 4096  # bytes at either end by which a file is known again: a PNG's checksum of its pixels is at the end


#: Is told what is being done, how much of it is done, and of how much: ``progress("decoding", 64, 1000)``.
Progress = Callable[[str, int, int], None]


class Source(Protocol):
    """A list of encoded images; picklable, so that workers can have it."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """How an error names this image."""

    def encoded(self, index: int) -> Path | BytesIO:
        """Where the bytes are; may raise whatever reading raises."""


@dataclass(frozen=True)
class ImageForm:
    """What every image of a data set is brought to."""

    spec: str
    channels: int
    height: int
    width: int
    resize: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width


class Survey(NamedTuple):
    """What the headers say: the common form, for each source a hash of each file, and sentences."""

    form: ImageForm
    contents: list[np.ndarray]
    notes: list[str]


class Header(NamedTuple):
    """What one file says of itself; `bits` of a channel, `content` a hash of its size and its ends."""

    mode: str
    width: int
    height: int
    bits: int
    transparent: bool
    animated: bool
    content: int


class EncodedImages(Dataset):
    """Images decoded when asked for; gives ``(uint8 [C, H, W], label)``."""

    def __init__(self, source: Source, labels: Tensor, form: ImageForm):
        self.source, self.labels, self.form = source, labels, form

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = int(self.labels[index])  # first, because it raises the IndexError that ends an iteration
        return decode(self.source, range(len(self))[index], self.form), label


def counted(sources: Sequence[Source], what: str, progress: Progress | None) -> Iterator[tuple[int, Source, int]]:
    """``(number of the source, source, index)`` of every image in turn; now and then tells how far that is."""
    done, total = 0, sum(map(len, sources))
    for number, source in enumerate(sources):
        for i in range(len(source)):
            if progress is not None and done % 32 == 0:
                progress(what, done, total)
            yield number, source, i
            done += 1


def survey(spec: str, sources: Sequence[Source], size: int | None, progress: Progress | None = None) -> Survey:
    """Read every header, in order, and settle the common form.

    Raises:
        DataError: an unreadable image, a kind of pixel that is not 8 bits, or (without `size`) the first
            image whose size is not that of the first of all.
    """
    first, told = None, Counter()
    contents = [np.empty(len(source), dtype=np.uint64) for source in sources]
    for number, source, i in counted(sources, "looking at", progress):
        header = _header(spec, source, i)
        contents[number][i] = header.content
        if header.mode not in _GREY | _COLOUR or header.bits > 8:
            bits = f" at {header.bits} bits" if header.bits > 8 else ""
            raise DataError(
                f"{spec}: pixels must be 8 bits, grey or colour, but {source.name(i)!r} has mode {header.mode!r}{bits}"
            )
        first = first or (source.name(i), header.width, header.height)
        if size is None and (header.width, header.height) != first[1:]:
            raise DataError(
                f"{spec}: all images must have one size, but {source.name(i)!r} is "
                f"{header.width}x{header.height} and {first[0]!r} is {first[1]}x{first[2]} "
                "(end the spec with ?size=S to bring all to SxS)"
            )
        told["colour"] += header.mode in _COLOUR
        told["transparent"] += header.transparent
        told["animated"] += header.animated
        told["coarse"] += header.mode in _GREY and header.bits < 8
        told["small"] += size is not None and min(header.width, header.height) < size
    assert first is not None, "callers refuse empty sources"
    width, height = (size, size) if size else first[1:]
    form = ImageForm(spec, 3 if told["colour"] else 1, height, width, resize=size is not None)
    words = {
        "transparent": "an alpha channel or a transparent colour, which is dropped: the colours beneath are kept",
        "animated": "several frames: the first is taken",
        "coarse": "fewer than 8 bits a pixel: bits/dim count 256 grey levels all the same",
        "small": f"less than {size} pixels a side and are enlarged: bits/dim do not compare with those of real ones",
    }
    total = sum(map(len, sources))
    notes = [f"{told[key]:,} of {total:,} pictures have {text}" for key, text in words.items() if told[key]]
    return Survey(form, contents, notes)


def build(
    sources: Sequence[Source], labels: Sequence[Tensor], form: ImageForm, progress: Progress | None = None
) -> list[Dataset]:
    """One data set for each source, in memory where all of them fit."""
    count = sum(len(source) for source in sources)
    if count * form.channels * form.height * form.width > IN_MEMORY:
        return [EncodedImages(source, y, form) for source, y in zip(sources, labels, strict=True)]
    parts = [torch.empty((len(source), *form.shape), dtype=torch.uint8) for source in sources]
    for number, source, i in counted(sources, "decoding", progress):
        parts[number][i] = decode(source, i, form)
    return [TensorPairs(x, y) for x, y in zip(parts, labels, strict=True)]


def decode(source: Source, index: int, form: ImageForm) -> Tensor:
    """One image, uint8 ``[C, H, W]``."""
    library = require(form.spec, "PIL.Image", "pillow")
    with _bytes(form.spec, source, index) as file, library.open(file) as image:
        imageops = require(form.spec, "PIL.ImageOps", "pillow")
        if _orientation(image) not in (None, 1):
            image = imageops.exif_transpose(image)
        # Convert before scaling: a palette's indices cannot be averaged.
        image = image.convert("L" if form.channels == 1 else "RGB")
        if form.resize:
            image = imageops.fit(image, (form.width, form.height), method=library.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).reshape(image.height, image.width, form.channels)
    if pixels.shape[:2] != (form.height, form.width):
        raise DataError(
            f"{form.spec}: {source.name(index)!r} was {form.width}x{form.height} at load and is now "
            f"{pixels.shape[1]}x{pixels.shape[0]}"
        )
    return pixels.permute(2, 0, 1).contiguous()


def _header(spec: str, source: Source, index: int) -> Header:
    library = require(spec, "PIL.Image", "pillow")
    with _bytes(spec, source, index) as file:
        head, size = file.read(_END), file.seek(0, 2)
        file.seek(max(_END, size - _END))
        content = hash64(b"%d " % size + head + file.read())
        turned = head.startswith(b"\x89PNG") and _may_be_turned(file)
        file.seek(0)
        with library.open(file) as image:
            mode, (width, height) = image.mode, image.size
            # asking a PNG for its EXIF block decodes all of it
            if (turned or image.format != "PNG") and _orientation(image) in _QUARTER_TURNS:
                width, height = height, width
            # Pillow's mode hides how deep the channels of a file were
            depths = head[24:25] if image.format == "PNG" else getattr(image, "tag_v2", {}).get(258, (8,))
            bits = 1 if mode == "1" else max(depths)
            transparent = mode in _ALPHA or "transparency" in image.info
            return Header(mode, width, height, bits, transparent, getattr(image, "is_animated", False), content)


def _may_be_turned(file: BinaryIO) -> bool:
    """Whether a PNG has a chunk that may tell of its orientation, from the heads of its chunks."""
    place = 8
    while True:
        file.seek(place)
        head = file.read(8 + 22)
        if len(head) < 8 or head[4:8] == b"IEND":
            return False
        if head[4:].startswith(_EXIF) or head[8:].startswith(_EXIF):
            return True
        place += 12 + int.from_bytes(head[:4], "big")


@contextmanager
def _bytes(spec: str, source: Source, index: int) -> Iterator[BinaryIO]:
    """The encoded image; whatever goes wrong while it is open becomes a sentence that names it."""
    library = require(spec, "PIL.Image", "pillow")
    try:
        encoded = source.encoded(index)
        with encoded.open("rb", buffering=0) if isinstance(encoded, Path) else encoded as file:
            yield file
    except DataError:
        raise
    except Exception as error:  # a broken file makes Pillow raise nearly anything, even SyntaxError
        unknown = isinstance(error, library.UnidentifiedImageError)
        why = "no format that Pillow knows, or cut short" if unknown else reason(error)
        raise DataError(f"{spec}: {source.name(index)!r} cannot be read as an image ({why})") from error


def _orientation(image: Any) -> int | None:
    return image.getexif().get(_ORIENTATION) if image.format in _ORIENTED else None
