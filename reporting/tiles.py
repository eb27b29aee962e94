"""Pictures in rows and columns, each under its title."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reporting.gradcam import overlay
from reporting.lettering import literal, style, wrap
from reporting.screen import new_figure, styled

WIDEST = 9.5  # inches, so that no notebook shrinks the titles


def gallery(images: np.ndarray, titles: Sequence[str], title: str, note: str = "") -> Figure:
    """Images in rows of five, or seven, each under its title; no images at all is a figure too.

    At most 10 inches wide, so that no notebook shrinks the titles.

    Args:
        note: a sentence below them all.
    """
    columns, inches = (5, 1.65) if len(images) <= 20 else (7, 1.4)
    rows = max(1, -(-len(images) // columns))
    titles = [wrap(name, inches) for name in titles]
    with styled(style("".join(titles))):
        height = inches + 0.08 + 0.15 * max((1 + name.count("\n") for name in titles), default=0)
        size = (inches * columns, height * rows + 0.4 * bool(title) + 0.4 * bool(note))
        figure = new_figure(figsize=size, layout="constrained")
        figure.suptitle(title, fontsize=11)
        figure.supxlabel(textwrap.fill(note, 100), fontsize=8)
        cells = figure.subplots(rows, columns, squeeze=False).ravel()
        for cell in cells:
            cell.set_axis_off()
        for cell, image, name in zip(cells, images, titles, strict=False):
            cell.imshow(image)
            cell.set_title(name, fontsize=9, pad=3)
    return figure


def picture_rows(
    rows: Sequence[Sequence[np.ndarray] | np.ndarray],
    names: Sequence[str],
    heads: Sequence[str] = (),
    *,
    title: str,
    note: str = "",
) -> Figure:
    """Pictures in rows, each with its name to the left; a row may be shorter than others.

    Args:
        heads: above the columns.
        note: a sentence below them all.
    """
    columns = max([1, *map(len, rows)])
    side = min(1.1, (WIDEST - 1.5) / columns)
    with styled(style("".join([*names, *heads]))):
        lines = textwrap.fill(note, 120)
        height = (
            side * max(1, len(rows))
            + 0.5
            + 0.25 * bool(heads)
            + 0.17 * (lines.count("\n") + 2) * bool(note)
        )
        figure = new_figure(figsize=(side * columns + 1.5, height), layout="constrained")
        figure.suptitle(title, fontsize=11)
        figure.supxlabel(lines, fontsize=8)
        cells = figure.subplots(max(1, len(rows)), columns, squeeze=False)
        for cell in cells.ravel():
            cell.set(xticks=[], yticks=[])
            cell.grid(False)
            cell.spines[:].set_visible(False)
        for line, row, name in zip(cells, rows, names, strict=False):
            line[0].set_ylabel(wrap(name, 1.2), rotation=0, ha="right", va="center", fontsize=9)
            for cell, picture in zip(line, row, strict=False):
                cell.imshow(picture)
        for cell, head in zip(cells[0], heads, strict=False):
            cell.set_title(literal(head), fontsize=9, pad=3)
    return figure


def cam_grid(head: str, titles: list[list[str]], notes: list[str]) -> tuple[Figure, list[list[Axes]]]:
    """Two mistakes a row, each of three tiles and a bar, in inches: all tiles are equally large."""
    tile, bar, gap = 1.22, 0.1, 0.08
    heading = 0.14 * max(title.count("\n") + 1 for trio in titles for title in trio) + 0.14
    lines = [line for note in notes for line in textwrap.wrap(note, 140)]
    rows, foot = -(-len(titles) // 2), 0.16 * len(lines) + 0.12
    width, height = 9.5, rows * (tile + heading) + 0.3 + foot
    figure = new_figure(figsize=(width, height))
    figure.suptitle(head, fontsize=11, y=1 - 0.08 / height, va="top")
    figure.text(0.1 / width, 0.06 / height, "\n".join(lines), fontsize=8, va="bottom", linespacing=1.3)
    cells = []
    for place, trio in enumerate(titles):
        left = 0.1 + (place % 2) * width / 2
        low = height - 0.3 - (place // 2 + 1) * (tile + heading)
        lefts = [left + k * (tile + gap) for k in range(4)]
        boxes = [(x, low, tile if k < 3 else bar, tile) for k, x in enumerate(lefts)]
        row = [figure.add_axes((x / width, y / height, w / width, h / height)) for x, y, w, h in boxes]
        for cell, title in zip(row, trio, strict=False):
            cell.set_title(title, fontsize=8.5, pad=3)
        cells.append(row)
    return figure, cells


def draw_cams(cells: Sequence[Axes], image: np.ndarray, maps: Sequence[np.ndarray]) -> None:
    """One mistake: the image, and in grey under the map of each of two classes, with their scale."""
    top = float(max(heat.max() for heat in maps))
    for cell, picture in zip(
        cells, [image, *(overlay(image, heat, top=top) for heat in maps)], strict=False
    ):
        cell.imshow(picture)
        cell.set_axis_off()
    for cell, heat in zip(cells[1:], maps, strict=False):
        if not heat.any():
            box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 2}
            cell.text(
                0.5, 0.5, "no evidence", transform=cell.transAxes, ha="center", fontsize=8.5, bbox=box
            )
    bar = cells[3]
    if not top:
        bar.set_axis_off()
        return
    ramp = np.linspace(1, 0, 64, dtype=np.float32)[:, None]
    bar.imshow(overlay(np.full((64, 1, 3), 128, np.uint8), ramp), aspect="auto", extent=(0, 1, 0, top))
    bar.yaxis.tick_right()
    bar.set_yticks([0, top], ["0", f"{top:.2g}"], fontsize=8)
    bar.set_xticks([])
    bar.grid(False)
