"""Names in figures: drawn in any installed font that has their letters, or replaced by a number."""

import contextlib
import functools
import textwrap
import unicodedata
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

from utils import plain

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.dpi": 110,
    "figure.constrained_layout.h_pad": 0.06,  # inches
}
# Characters that only change how their neighbours look; matplotlib would draw each as a box.
INVISIBLE = dict.fromkeys(map(ord, "\u200c\u200d\ufe0e\ufe0f"))
FONT_HINT = (
    "No installed font has all letters of some names ({}): class and number stand there. Install a "
    "font, as by: apt install fonts-noto-cjk fonts-symbola"
)


def wrap(text: str, inches: float) -> str:
    """Break a small title into lines that are not wider than the picture below it.

    Args:
        inches: width of the picture.
    """
    lines = []
    for line in text.splitlines():
        wide = any(unicodedata.east_asian_width(letter) in "WF" for letter in line)
        lines.append(textwrap.fill(line, int(inches * (6.5 if wide else 13))))  # letters an inch at 9 pt
    return literal("\n".join(lines))


def style(text: str) -> dict[Any, Any]:
    """matplotlib's settings for a figure with this text: `STYLE`, and the fonts that the text needs."""
    return STYLE | {"font.family": [*matplotlib.rcParams["font.family"], *fonts_for(text)[0]]}


def fonts_for(text: str) -> tuple[list[str], set[str]]:
    """Installed fonts for the characters of a text that matplotlib's own font lacks.

    Returns:
        Names of the fonts, as few as possible; and the characters that no installed font has.
    """
    fonts: list[str] = []
    missing = {letter for letter in text if not letter.isspace()}
    missing -= characters_of(font_manager.findfont(font_manager.FontProperties()))
    if missing:
        note_new_fonts()
    entries = [font for font in font_manager.fontManager.ttflist if font.style == "normal"]
    while missing:
        counts = [len(missing & characters_of(font.fname)) for font in entries]
        best = int(np.argmax(counts)) if counts else 0
        if not counts or not counts[best]:
            break
        fonts.append(entries[best].name)
        missing -= characters_of(entries[best].fname)
    return fonts, missing


def note_new_fonts() -> None:
    """Add fonts to matplotlib's list that were installed after it made that list, once for all runs."""
    known = {font.fname for font in font_manager.fontManager.ttflist}
    for path in font_manager.findSystemFonts():
        if path not in known:
            with contextlib.suppress(OSError, RuntimeError, KeyError):  # the file is not a usable font
                font_manager.fontManager.addfont(path)


@functools.cache
def characters_of(path: str) -> frozenset[str]:
    """The characters that a font file can draw; none if its letters are pictures of one size."""
    if "LastResort" in path:  # this font draws a box for every character
        return frozenset()
    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):  # the file is gone, or of a kind that matplotlib cannot use
        return frozenset()
    return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()


def legible(names: Sequence[str], kind: str = "class") -> list[str]:
    """Names as figures show them; one that no installed font can draw becomes, say, "class 3"."""
    names = [plain(name).translate(INVISIBLE) for name in names]
    missing = fonts_for("".join(names))[1]
    return [f"{kind} {k}" if missing & set(name) else name for k, name in enumerate(names)]


def font_note(names: Sequence[str]) -> str:
    """A note that some names were replaced by numbers, and what to install; "" if none was."""
    count = sum(name == f"class {k}" != names[k] for k, name in enumerate(legible(names)))
    return FONT_HINT.format(count) if count else ""


def literal(text: str) -> str:
    """A text with its dollar signs escaped, as matplotlib reads what is between two as mathematics."""
    return text.replace("$", r"\$")
