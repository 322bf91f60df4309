"""Results as a table: rules above, below and between, as in print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from genkernels.pictures._text import FAINT, INK, typeface, wrapped

_SIZE, _GAP, _STEP = 26, 28, 50  # pixels: of a letter, between columns and at the edges, from row to row


def table(
    header: Sequence[str],
    blocks: Mapping[str, Sequence[Sequence[str]]],
    *,
    spans: Sequence[tuple[str, int]] = (),
    title: str = "",
    note: str = "",
) -> np.ndarray:
    """Draws a table.

    Args:
        header: a word for each column. The first column stands left, the others in the middle of theirs.
        blocks: rows of cells, under words of their own.
        spans: above the header: ``(words, how many columns)``, from the left.
        title: a line above the table.
        note: smaller lines below it.

    Returns:
        ``[height, width, 3]`` bytes.

    Raises:
        ValueError: a row or `spans` has not as many cells as there are columns.
    """
    from PIL import Image, ImageDraw

    rows = [row for block in blocks.values() for row in block]
    counts = [("a row", len(row)) for row in rows] + ([("spans", sum(n for _, n in spans))] if spans else [])
    for what, count in counts:
        if count != len(header):
            raise ValueError(f"table: {what} must be of {len(header)} columns, as the header, got {count}")
    plain, bold, small = typeface(_SIZE), typeface(_SIZE, bold=True), typeface(round(0.8 * _SIZE))
    widths = [max(plain.getlength(row[i]) for row in (header, *rows)) + _GAP for i in range(len(header))]
    first = 0
    for words, count in spans:
        lacking = bold.getlength(words) + _GAP - sum(widths[first : first + count])
        for i in range(first, first + count):
            widths[i] += max(0.0, lacking) / count
        first += count
    left = [_GAP + sum(widths[:i]) for i in range(len(widths) + 1)]
    right = round(left[-1])
    titles, notes = wrapped(title, bold, right - _GAP), wrapped(note, small, right - _GAP)
    heads = [wrapped(words, small, right - _GAP) for words in blocks]
    lines = bool(spans) + 1 + len(rows) + len(blocks)
    more = round(0.68 * _STEP) * (len(notes) + sum(max(0, len(head) - 1) for head in heads))
    height = _STEP * (len(titles) + lines) + more + (3 if notes else 2) * _GAP
    page = Image.new("RGB", (right + _GAP, height), "white")
    pen, y = ImageDraw.Draw(page), _GAP

    def rule(y: float, thick: int, a: float = left[0], b: float = right) -> None:
        pen.line([(a, y), (b, y)], fill=INK, width=thick)

    def row(cells: Sequence[str], y: float, font) -> None:
        for i, cell in enumerate(cells):
            x, anchor = (left[0], "lm") if i == 0 else ((left[i] + left[i + 1]) / 2, "mm")
            pen.text((x, y + _STEP / 2), cell, font=font, fill=INK, anchor=anchor)

    for line in titles:
        pen.text((left[0], y + _STEP / 2), line, font=bold, fill=INK, anchor="lm")
        y += _STEP
    rule(y, 3)
    if spans:
        first = 0
        for words, count in spans:
            a, b = left[first], left[first + count]
            pen.text(((a + b) / 2, y + _STEP / 2), words, font=bold, fill=INK, anchor="mm")
            if words and count > 1:
                rule(y + _STEP - 3, 1, a + _GAP / 2, b - _GAP / 2)
            first += count
        y += _STEP
    row(header, y, plain)
    y += _STEP
    for head, block in zip(heads, blocks.values(), strict=True):
        rule(y, 2)
        for i, line in enumerate(head):
            y += round(0.68 * _STEP) if i else 0
            pen.text((left[0], y + _STEP / 2), line, font=small, fill=FAINT, anchor="lm")
        y += _STEP
        for cells in block:
            row(cells, y, plain)
            y += _STEP
    rule(y, 3)
    y += _GAP
    for line in notes:
        pen.text((left[0], y), line, font=small, fill=FAINT)
        y += round(0.68 * _STEP)
    return np.asarray(page)
