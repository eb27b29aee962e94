"""Pieces of the web page as HTML that needs no other file; app.css, at the root, says how they look."""

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from reporting.gradcam import overlay
from utils import Predictions

# Depth of a cell's colour, 0 to 1, above which its number is white instead of black. At this depth both
# have a contrast of 4.5 to 1, the least that the WCAG allow for text.
DEEP = 0.78


def figure(image: np.ndarray, caption: str) -> str:
    """An image uint8 (H, W, 3) over its caption."""
    text = f"<figcaption>{html.escape(caption)}</figcaption>"
    return f"<figure>{picture_tag(image, caption)}{text}</figure>"


def legend(opacity: float = 0.75, about: str = "") -> str:
    """A bar that explains the colours of Grad-CAM, drawn as `overlay` draws them on a grey picture."""
    grey = np.full((16, 256, 3), 128, np.uint8)
    ramp = overlay(grey, np.tile(np.linspace(0, 1, 256, dtype=np.float32), (16, 1)), opacity)
    bar = picture_tag(ramp, "to")
    return f'<p class="legend">no evidence {bar} most evidence<span>{about}</span></p>'


def picture_tag(image: np.ndarray, alternative: str) -> str:
    """An image uint8 (H, W, 3) as an HTML tag that holds its pixels; a small image loses no detail."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", lossless=len(image) <= 64, quality=90)
    return tag(buffer, alternative)


def tag(buffer: io.BytesIO, alternative: str) -> str:
    """A picture encoded as WebP, as an HTML tag that holds it."""
    content = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/webp;base64,{content}" alt="{html.escape(alternative)}">'


def note(text: str, role: str = "note") -> str:
    """A line of text where something cannot be shown; with role "alert" it is read out at once."""
    return f'<p class="note" role="{role}">{text}</p>'


def wide(name: str, content: str, style: str = "", about: str = "") -> str:
    """A section whose content may be wider than a phone, and is scrolled by finger or by keyboard."""
    region = f'<div class="plot" role="region" aria-label="{name}" tabindex="0" style="{style}">'
    hint = '<p class="hint">Swipe sideways to see all of it.</p>'
    return f"<section><h2>{name}</h2><p>{about}</p>{hint}{region}{content}</div></section>"


def matrix(predictions: Predictions, classes: Sequence[str]) -> str:
    """The confusion matrix as a table, coloured so that even a rare mistake differs from none."""
    counts = np.zeros((len(classes), len(classes)), int)
    np.add.at(counts, (predictions.labels, predictions.predicted), 1)
    # The root makes rare mistakes visible: 1 % of a row has a tenth of the full colour.
    depths = np.sqrt(counts / np.maximum(counts.sum(1, keepdims=True), 1))
    names = [html.escape(name) for name in classes]
    heads = (f'<th scope="col"><span>{name}</span></th>' for name in names)
    rows = [f"<tr><td></td>{''.join(heads)}</tr>"]
    for name, numbers, row in zip(names, counts, depths, strict=True):
        cells = "".join(cell(number, depth) for number, depth in zip(numbers, row, strict=True))
        rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    about = "Rows are the true classes, columns the predicted ones. A number counts test images; "
    about += "the deeper its colour, the larger its share of the row."
    return wide("Confusion matrix", f"<table>{''.join(rows)}</table>", about=about)


def cell(number: int, depth: float) -> str:
    """A cell of the confusion matrix: a number on a colour whose depth is 0 to 1."""
    if not number:
        return "<td>0</td>"
    deep = ' class="deep"' if depth > DEEP else ""
    return f'<td{deep} style="--depth: {depth:.0%}">{number:,}</td>'
