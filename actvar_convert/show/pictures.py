"""Pictures of generated images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from torch import Tensor

from actvar_convert.errors import InputError

CELL_INCHES = 0.85
MARGIN_INCHES = 0.75
DOTS_PER_INCH = 120


def samples_picture(dense_N3HW: Tensor, sparse_N3HW: Tensor, class_names: Sequence[str]) -> bytes:
    """Dense and sparse images under each other, one column per class; a PNG.

    Args:
        dense_N3HW, sparse_N3HW: images in [0, 1], of equal labels and seed. Image i is of class i modulo the number of
            names, so N images make N / classes rows of each model.
        class_names: a heading for every column.

    Raises:
        InputError: the images do not fill the rows, or the two sides differ in number.
    """
    return picture({"dense": dense_N3HW, "sparse": sparse_N3HW}, class_names)


def picture(sides: Mapping[str, Tensor], class_names: Sequence[str]) -> bytes:
    """Images of one or several models under each other, a column per class; a PNG.

    Args:
        sides: images [N, 3, H, W] in [0, 1] of every model by name, equally many. Image i is of class i modulo the
            number of class names. Rows of the models alternate.
        class_names: a heading for every column.

    Raises:
        InputError: the images do not fill the rows, or the models differ in their number.
    """
    from matplotlib.figure import Figure  # takes a second to import, and few commands need it

    columns, counts = len(class_names), [len(images) for images in sides.values()]
    if not columns or not counts or not counts[0] or counts[0] % columns or len(set(counts)) > 1:
        raise InputError(
            f"a picture of {columns} classes needs whole rows, equally many of each model; images given: {counts}"
        )
    rows, models = counts[0] // columns, list(sides.items())
    margin = MARGIN_INCHES if any(sides) else 0.1
    width, height = margin + columns * CELL_INCHES, MARGIN_INCHES + len(models) * rows * CELL_INCHES
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH)
    cell_width, cell_height = CELL_INCHES / width, CELL_INCHES / height
    for row in range(len(models) * rows):
        name, images = models[row % len(models)]
        bottom = (len(models) * rows - 1 - row) * cell_height
        figure.text(0.9 * margin / width, bottom + cell_height / 2, name, ha="right", va="center", size=9)
        for column in range(columns):
            left = margin / width + column * cell_width
            axes = figure.add_axes((left, bottom, 0.95 * cell_width, 0.95 * cell_height))
            pixels = images[row // len(models) * columns + column].float().clamp(0, 1).permute(1, 2, 0)
            axes.imshow(pixels.cpu().numpy(), interpolation="nearest")
            axes.set_axis_off()
            if row == 0:
                axes.set_title(class_names[column], fontsize=7, rotation=30, ha="left", x=0.1)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "actvar-convert"})
    return buffer.getvalue()
