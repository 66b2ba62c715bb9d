"""Distances between feature vectors of generated and of real images: FID, inception score, precision, recall.

FID and inception score are torchmetrics' own, fed with features that are computed once for all measures; everything
runs in float64. Shapes: N generated images, M real images, F features, J groups of the jackknife.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from actvar_convert.measure.extractors import Reference

SUBSET_SEED = 7
"""Seed of the subsets and shuffles inside the measures, so that equal features give equal figures."""


class _Given(nn.Module):
    """The feature network of torchmetrics' measures when the features are already there."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features_NF: Tensor) -> Tensor:
        return features_NF


def frechet_inception_distance(features_NF: Tensor, reference: Reference) -> float:
    """FID of generated images against the real ones, by torchmetrics: |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2))."""
    from torchmetrics.image.fid import FrechetInceptionDistance  # takes seconds to import, and few commands need it

    metric = FrechetInceptionDistance(feature=_Given(features_NF.shape[1]))
    # Any count above one gives back exactly the stated mean and covariance; a small one loses the fewest digits.
    count, mean = 2, reference.mean_F
    metric.real_features_sum = mean * count
    metric.real_features_cov_sum = reference.covariance_FF * (count - 1) + count * torch.outer(mean, mean)
    metric.real_features_num_samples = torch.tensor(count)
    metric.update(features_NF.double().cpu(), real=False)
    return float(metric.compute())


def inception_score(logits_NK: Tensor, splits: int = 10) -> float:
    """Inception score of class logits [N, classes], by torchmetrics: exp(mean KL(p(y|x) || p(y))) over splits."""
    from torchmetrics.image.inception import InceptionScore

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="Metric `InceptionScore` will save all extracted features")
        metric = InceptionScore(feature=_Given(logits_NK.shape[1]), splits=min(splits, len(logits_NK) // 2))
        metric.update(logits_NK.double().cpu())
        torch.manual_seed(SUBSET_SEED)
        return float(metric.compute()[0])


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


def precision_recall(generated_NF: Tensor, real_MF: Tensor, neighbours: int = 3, limit: int = 5000) -> PrecisionRecall:
    """Share of generated images near the real ones, and of real images near the generated ones.

    An image is near a set if it lies within the distance of any member of the set to that member's k-th nearest
    neighbour in the set (Kynkäänniemi et al., arXiv 1904.06991).

    Args:
        generated_NF, real_MF: feature vectors.
        neighbours: k.
        limit: at most so many vectors of each side are used, a subset chosen with a fixed seed.
    """
    generated, real = (_subset(side, limit).cpu() for side in (generated_NF, real_MF))
    return PrecisionRecall(_covered(generated, real, neighbours), _covered(real, generated, neighbours))


def _subset(features_NF: Tensor, limit: int) -> Tensor:
    if len(features_NF) <= limit:
        return features_NF
    order = torch.randperm(len(features_NF), generator=torch.Generator().manual_seed(SUBSET_SEED))
    return features_NF[order[:limit]]


def _covered(points_NF: Tensor, manifold_MF: Tensor, neighbours: int) -> float:
    """Share of the points inside any ball of the manifold."""
    from sklearn.neighbors import NearestNeighbors

    points, centres = points_NF.double(), manifold_MF.double()
    index = NearestNeighbors(n_neighbors=neighbours, algorithm="brute").fit(centres.numpy())
    radii = torch.from_numpy(index.kneighbors()[0][:, -1])
    inside = [(torch.cdist(part, centres) <= radii).any(1) for part in torch.split(points, 500)]
    return float(torch.cat(inside).double().mean())


class _Moments:
    """Count, sum and outer-product sum of feature vectors; differences of them leave out a part of the images."""

    def __init__(self, features_NF: Tensor) -> None:
        features = features_NF.double().cpu()
        self.count, self.total, self.outer = len(features), features.sum(0), features.T @ features

    def without(self, part: _Moments) -> tuple[Tensor, Tensor]:
        """Mean and unbiased covariance of what remains."""
        count = self.count - part.count
        mean = (self.total - part.total) / count
        return mean, (self.outer - part.outer - count * torch.outer(mean, mean)) / (count - 1)


class _Distance:
    """FID to one reference many times over: its square root is taken once, so one symmetric problem per call is left.

    tr (S S')^(1/2) = tr (R S' R)^(1/2) with R = S^(1/2).
    """

    def __init__(self, reference: Reference) -> None:
        value, vector = torch.linalg.eigh(reference.covariance_FF)
        self.root = (vector * value.clamp_min(0).sqrt()) @ vector.T
        self.mean, self.trace = reference.mean_F, reference.covariance_FF.trace()

    def __call__(self, mean_F: Tensor, covariance_FF: Tensor) -> float:
        cross = torch.linalg.eigvalsh(self.root @ covariance_FF @ self.root).clamp_min(0).sqrt().sum()
        return float((mean_F - self.mean).square().sum() + self.trace + covariance_FF.trace() - 2 * cross)


def relative_difference(dense: float, sparse: float) -> float:
    """Increase as a fraction of the dense value."""
    return (sparse - dense) / max(dense, 1e-12)


def paired_jackknife_error(dense_NF: Tensor, sparse_NF: Tensor, reference: Reference, groups: int = 20) -> float:
    """Standard error of the relative FID difference within one run, by the delete-a-group jackknife.

    Image i of both sides has the same label and the same random numbers, so the same images are left out of both: with
    d_j the relative difference without group j of J, the variance is (J - 1) / J * sum_j (d_j - mean d)^2. It measures
    the noise of the finite number of generated images; the real images are the same in every run and add none.
    """
    distance = _Distance(reference)
    groups = min(groups, len(dense_NF))
    values = []
    sides = [(_Moments(side), side.tensor_split(groups)) for side in (dense_NF, sparse_NF)]
    for j in range(groups):
        dense, sparse = (distance(*whole.without(_Moments(parts[j]))) for whole, parts in sides)
        values.append(relative_difference(dense, sparse))
    spread = torch.tensor(values, dtype=torch.float64)
    return float(((groups - 1) / groups * (spread - spread.mean()).square().sum()).sqrt())
