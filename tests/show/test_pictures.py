"""The picture of dense beside sparse samples."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from actvar_convert.errors import InputError
from actvar_convert.show.pictures import samples_picture


def colours(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def test_every_image_is_where_it_belongs() -> None:
    dense = torch.zeros(4, 3, 8, 8)
    sparse = torch.zeros(4, 3, 8, 8)
    dense[1, 0], sparse[2, 1] = 1.0, 1.0
    picture = colours(samples_picture(dense, sparse, ["left", "right"]))
    height, width, _ = picture.shape
    red = np.argwhere((picture == (255, 0, 0)).all(-1))
    green = np.argwhere((picture == (0, 255, 0)).all(-1))
    black = np.argwhere((picture == 0).all(-1))
    assert len(red) == pytest.approx(len(green), rel=0.05) and len(black) > 5 * len(red)
    assert red[:, 1].min() > green[:, 1].max(), "image 1 is in the second column, image 2 in the first"
    assert red[:, 0].max() < height / 2 < green[:, 0].min(), "dense is the first row, image 2 of sparse is the fourth"
    assert (picture[:, : width // 20] == 255).all(), "nothing runs over the edge"


def test_equal_images_give_equal_bytes() -> None:
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert samples_picture(images, images, ["a", "b", "c"]) == samples_picture(images, images, ["a", "b", "c"])


@pytest.mark.parametrize(("dense", "sparse"), [(3, 3), (4, 2), (0, 0)])
def test_rows_have_to_be_whole(dense: int, sparse: int) -> None:
    with pytest.raises(InputError, match="whole rows"):
        samples_picture(torch.rand(dense, 3, 8, 8), torch.rand(sparse, 3, 8, 8), ["a", "b"])
