"""Grids of images, and figures of matplotlib without a display."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from itarflow.runtime.files import atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def balanced_columns(count: int) -> int:
    """Columns of a grid of so many images: from as many as rows to twice as many, with the fewest holes."""
    least = math.ceil(math.sqrt(count))
    return min(range(least, 2 * least + 1), key=lambda columns: (-count % columns, columns))


def check_picture(path: Path, size: tuple[int, int], mode: str) -> None:
    """Refuse an image file that could not be written, or not in this size, by writing an empty one in memory.

    Args:
        path: whose suffix is the format.
        size: (width, height) in pixels.
        mode: Pillow's, "L" or "RGB".

    Raises:
        ValueError: the format is unknown, or it can't hold such an image.
    """
    name = Image.registered_extensions().get(path.suffix.lower())
    wide = f"{size[0]} x {size[1]} pixels"
    if name not in Image.SAVE:
        raise ValueError(f"{path} has an unknown image format; use .png, or a folder name without a suffix.")
    try:
        file = io.BytesIO(_encoded(Image.new(mode, size), path, {}))
    except Exception as error:  # each format has its own
        raise ValueError(f"{path} can't be written as {name}, with {wide}: {error}; use .png.") from error
    if name not in Image.OPEN:  # of a document, such as a PDF
        return
    try:
        with Image.open(file, formats=(name,)) as image:
            found = image.size
    except Image.DecompressionBombError:
        return
    if found != size:
        raise ValueError(f"{path} would have {found[0]} x {found[1]} pixels as {name} in place of {wide}; use .png.")


def save_picture(image: Image.Image, path: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write an image file, whole or not at all.

    Args:
        image: of any mode that the format knows.
        path: whose suffix is the format.
        facts: texts that a PNG carries, such as its seed; other formats do without.

    Raises:
        OSError: it can't be written.
    """
    encoded = _encoded(image, path, facts or {})  # in memory: Pillow does not notice all that a full disk loses
    with atomically(path) as partial:
        partial.write_bytes(encoded)


def _encoded(image: Image.Image, path: Path, facts: Mapping[str, Any]) -> bytes:
    name, file, options = Image.registered_extensions()[path.suffix.lower()], io.BytesIO(), {}
    if name == "PNG" and facts:
        options["pnginfo"] = PngInfo()
        for key, value in facts.items():
            options["pnginfo"].add_text(key, str(value))
    image.save(file, format=name, **options)
    return file.getvalue()


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure of matplotlib by its suffix, whole or not at all; raises OSError if it can't be written."""
    file = io.BytesIO()
    figure.savefig(file, format=path.suffix[1:].lower(), dpi=dpi)
    with atomically(path) as partial:
        partial.write_bytes(file.getvalue())


def grid_size(
    width: int, height: int, count: int, columns: int, smallest: int = 48, titles: int = 0, captions: int = 0
) -> tuple[int, int]:
    """(width, height) in pixels of a grid.

    Args:
        width: of an image.
        height: of an image.
        count: of images.
        columns: images a row.
        smallest: as for `image_grid`; at least 96 with titles or captions.
        titles: lines of text above the columns.
        captions: lines of text above each image.
    """
    factor = max(1, -(-max(smallest, 96 if titles or captions else 0) // width))
    rows, gap = -(-count // columns), 0 if captions else _GAP
    inner = rows * (height * factor + gap) - gap + rows * _text_height(captions)
    return columns * (width * factor + _GAP) - _GAP, inner + _text_height(titles)


def image_grid(images: Sequence[Image.Image], columns: int, smallest: int = 48) -> Image.Image:
    """Images of one size side by side with a thin gap, row by row; tiny ones are enlarged without smoothing.

    Args:
        images: all of one size and mode.
        columns: images a row.
        smallest: side in pixels up to which small images are enlarged, by a whole factor.
    """
    factor = max(1, -(-smallest // images[0].width))
    width, height = images[0].width * factor, images[0].height * factor
    grid = Image.new(images[0].mode, grid_size(*images[0].size, len(images), columns, smallest), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        enlarged = image.resize((width, height), Image.Resampling.NEAREST)
        grid.paste(enlarged, (column * (width + _GAP), row * (height + _GAP)))
    return grid


_GAP = 2


def _text_height(lines: int) -> int:
    return 17 * lines + 4 if lines else 0


def titled_grid(images: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """A grid with a title above each column.

    Args:
        images: all of one size and mode, row by row.
        titles: one a column, of one line or several, cut off where a line is too long; a column is at least 96 pixels
            wide.
    """
    grid = image_grid(images, len(titles), smallest=96)
    font, top = ImageFont.load_default(13), _text_height(max(title.count("\n") + 1 for title in titles))
    page = Image.new(grid.mode, (grid.width, grid.height + top), "white")
    page.paste(grid, (0, top))
    draw, width = ImageDraw.Draw(page), (grid.width + _GAP) / len(titles)
    for column, title in enumerate(titles):
        middle = (column + 0.5) * width - 1
        text = "\n".join(_fitting(line, draw, font, width - 2 * _GAP) for line in title.split("\n"))
        draw.multiline_text((middle, top / 2), text, "black", font, anchor="mm", align="center", spacing=4)
    return page


def _fitting(
    text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float
) -> str:
    """As much of a line as is not wider."""
    if draw.textlength(text, font) <= width:
        return text
    return next(cut for end in range(len(text), -1, -1) if draw.textlength(cut := text[:end] + "...", font) <= width)


def wrapped(texts: Sequence[str], width: int, most_lines: int = 3) -> list[str]:
    """Texts as captions for `captioned_grid`, all of as many lines; what does not fit is left out behind dots.

    Args:
        texts: of one line each.
        width: of an image in pixels.
        most_lines: of a caption.
    """
    letters = max(width, 96) // 7  # of the grids' font, on average
    parts = [textwrap.wrap(text, letters, max_lines=most_lines, placeholder=" ...") for text in texts]
    height = max(map(len, parts), default=1)
    return ["\n".join([*lines, *[""] * (height - len(lines))]) for lines in parts]


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


class Grid(NamedTuple):
    """The layout of a grid of images.

    Attributes:
        columns: images a row.
        names: a caption for each image; None = no captions.
    """

    columns: int
    names: Sequence[str] | None

    @property
    def one_a_column(self) -> bool:
        """Whether a name holds for all of its column."""
        names = self.names or ()
        return all(name == names[index % self.columns] for index, name in enumerate(names))

    def size(self, width: int, height: int, count: int) -> tuple[int, int]:
        """(width, height) in pixels of so many images of a size."""
        lines = {} if self.names is None else {"titles": 1} if self.one_a_column else {"captions": 1}
        return grid_size(width, height, count, self.columns, **lines)

    def drawn(self, images: Sequence[Image.Image]) -> Image.Image:
        """The grid."""
        if self.names is None:
            return image_grid(images, self.columns)
        if self.one_a_column:
            return titled_grid(images, self.names[: self.columns])
        return captioned_grid(images, self.names, self.columns)


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
                if index == 0:
                    axis.text(0.5, 0.5, "does not\napply", ha="center", va="center", fontsize=7, color="0.5")
    for column, axis in zip(columns, axes[0], strict=True):
        axis.set_title(column.replace(": ", ":\n"), fontsize=8)
    for (generator, index), line in zip(rows, axes, strict=True):
        line[0].set_ylabel(generator if index == 0 else "", fontsize=8)  # once for all of its rows
    save_figure(figure, path, 150)
