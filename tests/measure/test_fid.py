"""The measures on feature vectors, against formulas written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from actvar_convert.measure.extractors import Reference
from actvar_convert.measure.fid import (
    _Distance,
    _Moments,
    frechet_inception_distance,
    inception_score,
    paired_jackknife_error,
    precision_recall,
)


def draw(count: int, width: int, seed: int, shift: float = 0.0, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99))
    return (torch.randn(count, width, generator=generator) @ mixing * spread + shift).float()


def direct_fid(generated: Tensor, real: Tensor) -> float:
    a, b = generated.double().numpy(), real.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root.real))


@pytest.mark.parametrize("statistics_only", [False, True])
def test_fid_is_the_formula(statistics_only: bool) -> None:
    generated, real = draw(300, 12, 0, shift=0.3, spread=1.2), draw(500, 12, 1)
    reference = Reference.of(real)
    if statistics_only:
        reference = Reference(reference.mean_F, reference.covariance_FF)
    found = frechet_inception_distance(generated, reference)
    assert found == pytest.approx(direct_fid(generated, real), rel=1e-9)
    assert frechet_inception_distance(real, reference) == pytest.approx(0, abs=1e-6)


def test_fast_distance_of_the_jackknife_is_the_fid() -> None:
    generated, real = draw(60, 100, 0, shift=0.1), draw(400, 100, 1)
    whole, part = _Moments(generated), _Moments(generated[:20])
    distance = _Distance(Reference.of(real))
    assert distance(*whole.without(part)) == pytest.approx(
        frechet_inception_distance(generated[20:], Reference.of(real)), rel=1e-6
    )


def test_jackknife_error_matches_the_spread_over_fresh_samples() -> None:
    reference = Reference.of(draw(4000, 4, 0))
    errors, differences = [], []
    for seed in range(40):
        base = draw(400, 4, 100 + seed, spread=1.1)
        other = base * 1.05 + 0.1 * draw(400, 4, 900 + seed)
        errors.append(paired_jackknife_error(base, other, reference))
        dense, sparse = (frechet_inception_distance(side, reference) for side in (base, other))
        differences.append((sparse - dense) / dense)
    spread = float(np.std(differences, ddof=1))
    assert 0.7 * spread < float(np.mean(errors)) < 1.4 * spread
    same = draw(100, 4, 5)
    assert paired_jackknife_error(same, same, reference) == 0.0


def test_inception_score_is_the_formula_and_leaves_the_random_state() -> None:
    logits = 3 * torch.randn(400, 10, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    found = inception_score(logits)
    assert inception_score(logits) == found
    assert torch.equal(torch.get_rng_state(), state)
    p = logits.double().softmax(1)
    whole = math.exp(float((p * (p / p.mean(0)).log()).sum(1).mean()))
    assert found == pytest.approx(whole, rel=0.08)
    confident = 1000.0 * torch.eye(10).repeat(200, 1)
    assert inception_score(confident) == pytest.approx(10, rel=0.05)


def test_precision_and_recall_are_the_definition() -> None:
    generated, real, k = draw(70, 3, 0, shift=0.8), draw(90, 3, 1), 3

    def covered(points: Tensor, manifold: Tensor) -> float:
        hits = 0
        for point in points:
            for i, centre in enumerate(manifold):
                others = torch.cat((manifold[:i], manifold[i + 1 :]))
                radius = (others - centre).norm(dim=1).sort().values[k - 1]
                if (point - centre).norm() <= radius:
                    hits += 1
                    break
        return hits / len(points)

    found = precision_recall(generated, real, k)
    assert found.precision == pytest.approx(covered(generated, real), abs=1e-9)
    assert found.recall == pytest.approx(covered(real, generated), abs=1e-9)
    assert 0 < found.precision < 1


def test_precision_and_recall_at_the_extremes_and_on_a_subset() -> None:
    real = draw(200, 3, 1)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real + 1000, real) == (0.0, 0.0)
    generated = draw(200, 3, 2)
    assert precision_recall(generated, real, limit=50) == precision_recall(generated, real, limit=50)
    one_place = real[:1].repeat(100, 1) + 1e-3 * draw(100, 3, 3)
    found = precision_recall(one_place, real)
    assert found.precision == 1.0 and found.recall < 0.1
