"""Pictures of generated images."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from actvar_convert.errors import InputError

SMALLEST_CELL = 96
"""Pixels per side that an image is shown with at least; smaller ones are enlarged by a whole factor."""

GAP, HEADING, MARGIN = 4, 52, 56
"""Pixels between images, above them for the class names, and left of them for the names of the models."""


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
    columns, counts = len(class_names), [len(images) for images in sides.values()]
    if not columns or not counts or not counts[0] or counts[0] % columns or len(set(counts)) > 1:
        raise InputError(
            f"a picture of {columns} classes needs whole rows, equally many of each model; images given: {counts}"
        )
    models = list(sides.items())
    rows, margin = len(models) * counts[0] // columns, MARGIN if any(sides) else GAP
    side = models[0][1].shape[-1] * -(-SMALLEST_CELL // models[0][1].shape[-1])
    tall = side * models[0][1].shape[-2] // models[0][1].shape[-1]
    step, down = side + GAP, tall + GAP
    canvas = Image.new("RGB", (margin + columns * step, HEADING + rows * down), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for column, name in enumerate(class_names):
        heading = "\n".join(textwrap.wrap(name, side // 7)[:3])
        draw.text((margin + column * step + side / 2, HEADING - 3), heading, "black", font, "md", align="center")
    for row in range(rows):
        name, images = models[row % len(models)]
        top = HEADING + row * down
        draw.text((margin - GAP, top + tall / 2), name, "black", font, "rm")
        for column in range(columns):
            pixels = images[row // len(models) * columns + column].float().clamp(0, 1).permute(1, 2, 0)
            image = Image.fromarray(pixels.mul(255).round().byte().cpu().numpy())
            canvas.paste(image.resize((side, tall), Image.Resampling.NEAREST), (margin + column * step, top))
    buffer = io.BytesIO()
    canvas.save(buffer, format="png")
    return buffer.getvalue()
