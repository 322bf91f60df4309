"""Text in a picture: fonts and lines."""

from __future__ import annotations

INK, FAINT = (34, 34, 34), (96, 96, 96)  # of a title and of what stands below it


def typeface(size: int, bold: bool = False):
    """matplotlib's own font, for Pillow's has no letters beyond ASCII; that one where matplotlib is missing."""
    from PIL import ImageFont

    try:
        import matplotlib
    except ImportError:
        return ImageFont.load_default(size)
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans{'-Bold' * bold}.ttf", size)


def wrapped(text: str, font, width: int) -> list[str]:
    """`text` in lines of at most `width` pixels; a longer word has a line of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
