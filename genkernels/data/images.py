"""Encoded images (files, or cells of a table) to data sets: one survey of the headers, then decoding.

Every picture of a data set must come out alike, uint8 ``[C, H, W]`` with 256 grey levels:

- C is 1 when all are greyscale, else 3 and the grey ones are spread over R, G, B; transparency is dropped;
- pictures are turned as their EXIF orientation says;
- without ``size`` all must have one size; with it each is scaled, its shorter side to ``size``, and cut to
  the centre.

What fits in memory is decoded once, at load; the rest is decoded at each access.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from genkernels.data.bundle import TensorPairs
from genkernels.data.spec import DataError, reason, require

IN_MEMORY = 512 * 2**20  # bytes of decoded pixels, both parts together; CIFAR-10 takes 176 MiB

_GREY = {"1", "L", "LA", "La"}
_COLOUR = {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}
_ORIENTED = {"JPEG", "MPO", "WEBP"}  # asking a PNG for its EXIF block decodes all of it
_ORIENTATION, _QUARTER_TURNS = 0x0112, (5, 6, 7, 8)


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


class EncodedImages(Dataset):
    """Images decoded when asked for; gives ``(uint8 [C, H, W], label)``."""

    def __init__(self, source: Source, labels: Tensor, form: ImageForm):
        self.source, self.labels, self.form = source, labels, form

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = int(self.labels[index])  # first, because it raises the IndexError that ends an iteration
        return decode(self.source, range(len(self))[index], self.form), label


def survey(spec: str, sources: Sequence[Source], size: int | None) -> ImageForm:
    """Read every header, in order, and settle the common form.

    Raises:
        DataError: an unreadable image, a kind of pixel that is not 8 bits, or (without `size`) the first
            image whose size is not that of the first of all.
    """
    colour, first = False, None
    for source in sources:
        for i in range(len(source)):
            with _opened(spec, source, i) as image:
                mode, (width, height) = image.mode, image.size
                if _orientation(image) in _QUARTER_TURNS:
                    width, height = height, width
            if mode not in _GREY | _COLOUR:
                raise DataError(
                    f"{spec}: pixels must be 8 bits, grey or colour, but {source.name(i)!r} has mode {mode!r}"
                )
            colour = colour or mode in _COLOUR
            first = first or (source.name(i), width, height)
            if size is None and (width, height) != first[1:]:
                raise DataError(
                    f"{spec}: all images must have one size, but {source.name(i)!r} is {width}x{height} and "
                    f"{first[0]!r} is {first[1]}x{first[2]} (end the spec with ?size=S to bring all to SxS)"
                )
    assert first is not None, "callers refuse empty sources"
    width, height = (size, size) if size else first[1:]
    return ImageForm(spec, 3 if colour else 1, height, width, resize=size is not None)


def build(sources: Sequence[Source], labels: Sequence[Tensor], form: ImageForm) -> list[Dataset]:
    """One data set for each source, in memory where all of them fit."""
    count = sum(len(source) for source in sources)
    pairs = zip(sources, labels, strict=True)
    if count * form.channels * form.height * form.width > IN_MEMORY:
        return [EncodedImages(source, y, form) for source, y in pairs]
    parts: list[Dataset] = []
    for source, y in pairs:
        x = torch.empty((len(source), *form.shape), dtype=torch.uint8)
        for i in range(len(source)):
            x[i] = decode(source, i, form)
        parts.append(TensorPairs(x, y))
    return parts


def decode(source: Source, index: int, form: ImageForm) -> Tensor:
    """One image, uint8 ``[C, H, W]``."""
    with _opened(form.spec, source, index) as image:
        imageops = require(form.spec, "PIL.ImageOps", "pillow")
        bicubic = require(form.spec, "PIL.Image", "pillow").Resampling.BICUBIC
        if _orientation(image) not in (None, 1):
            image = imageops.exif_transpose(image)
        # Convert before scaling: a palette's indices cannot be averaged.
        image = image.convert("L" if form.channels == 1 else "RGB")
        if form.resize:
            image = imageops.fit(image, (form.width, form.height), method=bicubic)
        pixels = torch.from_numpy(np.array(image)).reshape(image.height, image.width, form.channels)
    if pixels.shape[:2] != (form.height, form.width):
        raise DataError(
            f"{form.spec}: {source.name(index)!r} was {form.width}x{form.height} at load and is now "
            f"{pixels.shape[1]}x{pixels.shape[0]}"
        )
    return pixels.permute(2, 0, 1).contiguous()


@contextmanager
def _opened(spec: str, source: Source, index: int) -> Iterator[Any]:
    """The image, its header read; whatever goes wrong while it is open becomes a sentence that names it."""
    library = require(spec, "PIL.Image", "pillow")
    try:
        with library.open(source.encoded(index)) as image:
            yield image
    except DataError:
        raise
    except Exception as error:  # a broken file makes Pillow raise nearly anything, even SyntaxError
        raise DataError(f"{spec}: {source.name(index)!r} cannot be read as an image ({reason(error)})") from error


def _orientation(image: Any) -> int | None:
    return image.getexif().get(_ORIENTATION) if image.format in _ORIENTED else None
