"""Balanced partitions of neurons that look at no activation, each a ``conversion.clustering.Clustering``.

Shapes: T calibration tokens, C width, H neurons.
"""

from __future__ import annotations

import numpy as np

from actvar_convert.conversion.clustering import IntArray, Measured, balanced_kmeans


def by_weights(activations_TH: Measured, weights_HC: Measured, experts: int, seed: int) -> IntArray:
    """Neurons that look alike: k-means on the normalised rows of the first layer."""
    rows = weights_HC.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True) + 1e-8
    return balanced_kmeans(rows, experts, seed)


def by_chance(activations_TH: Measured, weights_HC: Measured, experts: int, seed: int) -> IntArray:
    """Neurons dealt out at random."""
    label = np.repeat(np.arange(experts), len(weights_HC) // experts)
    return np.random.default_rng(seed).permutation(label).astype(np.int64)
