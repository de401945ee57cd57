"""Grids of images, and figures of matplotlib without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def image_grid(images: Sequence[Image.Image], columns: int, smallest: int = 48) -> Image.Image:
    """Images of one size side by side with a thin gap, row by row; tiny ones are enlarged without smoothing.

    Args:
        images: all of one size and mode.
        columns: images a row.
        smallest: side in pixels up to which small images are enlarged, by a whole factor.
    """
    factor = max(1, -(-smallest // images[0].width))
    width, height = images[0].width * factor, images[0].height * factor
    rows, gap = -(-len(images) // columns), 2
    grid = Image.new(images[0].mode, (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        enlarged = image.resize((width, height), Image.Resampling.NEAREST)
        grid.paste(enlarged, (column * (width + gap), row * (height + gap)))
    return grid


def titled_grid(images: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """A grid with a title above each column.

    Args:
        images: all of one size and mode, row by row.
        titles: one a column, of one line or several; a column is at least 96 pixels wide.
    """
    grid = image_grid(images, len(titles), smallest=96)
    font, lines = ImageFont.load_default(13), max(title.count("\n") + 1 for title in titles)
    top = 17 * lines + 4
    page = Image.new(grid.mode, (grid.width, grid.height + top), "white")
    page.paste(grid, (0, top))
    draw, width = ImageDraw.Draw(page), (grid.width + 2) / len(titles)
    for column, title in enumerate(titles):
        middle = (column + 0.5) * width - 1
        draw.multiline_text((middle, top / 2), title, "black", font, anchor="mm", align="center", spacing=4)
    return page


def captioned_grid(images: Sequence[Image.Image], captions: Sequence[str], columns: int) -> Image.Image:
    """A grid with a caption above each image; see `titled_grid`.

    Args:
        images: all of one size and mode, row by row.
        captions: one an image, all of as many lines.
        columns: images a row.
    """
    empty = Image.new(images[0].mode, images[0].size, "white")
    rows = []
    for start in range(0, len(images), columns):
        row, titles = images[start : start + columns], captions[start : start + columns]
        missing = columns - len(row) if start else 0
        rows.append(titled_grid([*row, *[empty] * missing], [*titles, *[""] * missing]))
    page = Image.new(rows[0].mode, (rows[0].width, sum(row.height for row in rows)), "white")
    for number, part in enumerate(rows):
        page.paste(part, (0, sum(above.height for above in rows[:number])))
    return page


def blank_figure(width: float, height: float) -> Figure:
    """A figure of so many inches for files only, independent of pyplot's state.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "itarflow[plot]"') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_comparison(
    images: Mapping[tuple[str, str], Sequence[Image.Image]], columns: Sequence[str], path: Path
) -> None:
    """Draw images into a file: a row for each image of a generator, a column for each denoising variant.

    Args:
        images: by (generator, variant); pairs may be missing.
        columns: the variants, in order.
        path: of the image file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    generators = list(dict.fromkeys(generator for generator, _ in images))
    height = {generator: max(len(of) for (by, _), of in images.items() if by == generator) for generator in generators}
    rows = [(generator, index) for generator in generators for index in range(height[generator])]
    figure = blank_figure(1.6 * len(columns) + 0.6, 1.6 * len(rows) + 0.6)
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for (generator, index), line in zip(rows, axes, strict=True):
        for column, axis in zip(columns, line, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            if (generator, column) in images:
                image = images[generator, column][index]
                axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            else:
                axis.set_frame_on(False)
    for column, axis in zip(columns, axes[0], strict=True):
        axis.set_title(column.replace(": ", ":\n"), fontsize=8)
    for (generator, _), line in zip(rows, axes, strict=True):
        line[0].set_ylabel(generator, fontsize=8)
    figure.savefig(path, dpi=150)
