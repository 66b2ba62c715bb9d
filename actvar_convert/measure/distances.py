"""Distance of each picture to the dense model's picture of the same seed: what can be measured without any data.

Shapes: N pairs of images, B pairs of a chunk, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from actvar_convert.measure.image_features import ImageSet, chunks, model_fingerprint, remembered
from actvar_convert.measure.quality_report import QUANTILES, DistanceSpread, PairDistances, WorstPair
from actvar_convert.models.model import Model
from actvar_convert.models.sampling import balanced_labels
from actvar_convert.system.progress import Task

PAIRS = 256
"""Pairs that are compared, rounded down to whole chunks: a standard error of a sixteenth of the spread."""

WORST = 8
"""Pairs that a report names because they lie farthest apart."""


def pairs_of(images: int, chunk: int) -> int:
    """N: the first chunks of a set of images, about ``PAIRS`` of them; part of a chunk would be other images."""
    return min(images, max(1, PAIRS // chunk) * chunk)


def pixel_distances(model: Model, teacher: Model, wanted: ImageSet, task: Task, cache: Path | None = None) -> Tensor:
    """Root mean squared error [N] of pixels in [0, 1] between the first N images of a set by both models, fp32.

    Only the images of one chunk are held at once.

    Args:
        task: advanced by the number of pairs.
        cache: folder in which the distances are kept and found again.
    """
    count = pairs_of(wanted.images, wanted.chunk)
    condition = teacher.balanced(wanted.images).rows(slice(0, count))

    def measure() -> dict[str, Tensor]:
        found = []
        for own, seed in chunks(condition, wanted.seed, wanted.chunk):
            dense, sparse = (
                each.generate(own, sampling=wanted.sampling, seed=seed, chunk=wanted.chunk).to(teacher.device)
                for each in (teacher, model)
            )
            found.append((dense - sparse).square().mean((1, 2, 3)).sqrt().cpu())
            task.advance(len(own))
        return {"pixel": torch.cat(found)}

    prints = [] if cache is None else [model_fingerprint(each) for each in (teacher, model)]
    return remembered(cache, {**wanted.key(teacher), "pairs": count, "models": prints}, measure, count, task)["pixel"]


def feature_distances(dense_NF: Tensor, sparse_NF: Tensor) -> Tensor:
    """Cosine distance 1 - cos [N] of feature vectors, float64.

    Computed as |u - v|^2 / 2 of unit vectors: equal ones are at exactly 0.
    """
    return (normalize(dense_NF.double()) - normalize(sparse_NF.double())).square().sum(1) / 2


def summarise(
    pixel_N: Tensor, feature_N: Tensor | None, *, seed: int, labels: Sequence[int] | None = None
) -> PairDistances:
    """The distribution of distances, and the pairs with the largest pixel distance, farthest first.

    Args:
        pixel_N: of two pairs or more.
        feature_N: of the same pairs.
        seed: of the set of images.
        labels: of the pairs, if labels condition the images.
    """
    order = pixel_N.argsort(descending=True, stable=True)[:WORST].tolist()
    worst = tuple(
        WorstPair(
            seed=seed,
            index=index,
            label=None if labels is None else labels[index],
            pixel=float(pixel_N[index]),
            feature=None if feature_N is None else float(feature_N[index]),
        )
        for index in order
    )
    feature = None if feature_N is None else _spread(feature_N)
    return PairDistances(pairs=len(pixel_N), pixel=_spread(pixel_N), feature=feature, worst=worst)


def labels_of(model: Model, images: int) -> list[int] | None:
    """Labels of a set of images of a model; None if something else conditions them."""
    classes = model.family.classes(model.config)
    return None if classes is None else balanced_labels(images, classes).tolist()


def _spread(value_N: Tensor) -> DistanceSpread:
    values = value_N.double()
    return DistanceSpread(
        mean=float(values.mean()),
        standard_error=float(values.std() / len(values) ** 0.5),
        quantiles=tuple(values.quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()),
    )
