"""Balanced partitions of an FFN's neurons into experts of equal size.

Every method has the signature of ``Clustering``; adding one adds a function here and a name in the recipe's schema.
Shapes: T calibration tokens, H neurons, E experts of N = H / E neurons.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Measured = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.int64]

EXACT_LIMIT = 1024
"""Neurons up to which the assignment is solved exactly; the solver's time grows about tenfold per doubling."""
PROJECTION = 64
"""Dimensions that a random projection keeps of an activation profile."""

PROFILES = 256
"""Neurons whose activation profiles are standardised in fp64 at once."""


class Clustering(Protocol):
    """A balanced partition: expert index [H] of every neuron, each expert holding H / E neurons."""

    def __call__(self, activations_TH: Measured, weights_HC: Measured, experts: int, seed: int) -> IntArray: ...


def kmeans(activations_TH: Measured, weights_HC: Measured, experts: int, seed: int) -> IntArray:
    """Neurons that fire together: k-means on standardised activation profiles, projected to ``PROJECTION`` numbers."""
    return balanced_kmeans(_profiles(activations_TH, seed, standard=True), experts, seed)


def contributions(activations_TH: Measured, weights_HC: Measured, experts: int, seed: int) -> IntArray:
    """Neurons that matter together: the same on profiles as large as they are given, so that large ones decide.

    Activations are to be given times what one unit of them moves the predictions.
    """
    return balanced_kmeans(_profiles(activations_TH, seed, standard=False), experts, seed)


def _profiles(activations_TH: Measured, seed: int, *, standard: bool) -> FloatArray:
    """Centred activation profiles [H, min(PROJECTION, T)] by a random projection; ``standard``: each of variance 1."""
    tokens, neurons = activations_TH.shape
    random: FloatArray | None = None
    if tokens > PROJECTION:
        random = np.random.default_rng(seed).standard_normal((tokens, PROJECTION)) / np.sqrt(PROJECTION)
    pieces = []
    for first in range(0, neurons, PROFILES):
        profile = activations_TH[:, first : first + PROFILES].astype(np.float64)
        profile -= profile.mean(0)
        if standard:
            profile /= profile.std(0) + 1e-8
        pieces.append(profile.T if random is None else profile.T @ random)
    return np.concatenate(pieces)


METHODS: dict[str, Clustering] = {
    "kmeans": kmeans,
    "gradient": contributions,
}


def balanced_kmeans(points_HD: FloatArray, experts: int, seed: int, rounds: int = 4) -> IntArray:
    """k-means, then rounds of balanced assignment and new centres until the assignment stands still."""
    if experts == 1:
        return np.zeros(len(points_HD), np.int64)
    from sklearn.cluster import KMeans  # takes a second to import, and most commands cluster nothing

    centres = KMeans(experts, n_init=2, random_state=seed).fit(points_HD).cluster_centers_
    label: IntArray | None = None
    for _ in range(rounds):
        cost = (points_HD**2).sum(1)[:, None] - 2 * points_HD @ centres.T + (centres**2).sum(1)[None]
        new = balanced_assignment(cost)
        if label is not None and (new == label).all():
            break
        label = new
        centres = np.stack([points_HD[label == e].mean(0) for e in range(experts)])
    assert label is not None
    return label


def balanced_assignment(cost_HE: FloatArray, exact_limit: int = EXACT_LIMIT) -> IntArray:
    """Expert [H] of every neuron with equal sizes and a small total cost: exact when small, greedy with swaps else."""
    neurons, experts = cost_HE.shape
    if neurons <= exact_limit:
        from scipy.optimize import linear_sum_assignment  # see balanced_kmeans

        size = neurons // experts
        _, slot = linear_sum_assignment(np.repeat(cost_HE, size, axis=1))
        label: IntArray = (slot // size).astype(np.int64)
        return label
    return improve_by_swaps(cost_HE, greedy_assignment(cost_HE))


def greedy_assignment(cost_HE: FloatArray) -> IntArray:
    """Neurons with the most to lose choose first; each takes the cheapest expert that has room."""
    neurons, experts = cost_HE.shape
    room = np.full(experts, neurons // experts)
    label = np.full(neurons, -1, np.int64)
    open_cost = cost_HE.copy()
    waiting = np.arange(neurons)
    while len(waiting):
        # Everyone waiting names its cheapest open expert; each expert takes those with the largest regret.
        sub = open_cost[waiting]
        best = sub.argmin(1)
        two = np.partition(sub, 1, axis=1)[:, :2] if experts > 1 else np.repeat(sub, 2, axis=1)
        regret = np.where(np.isfinite(two[:, 1]), two[:, 1] - two[:, 0], np.inf)
        order = np.argsort(-regret, kind="stable")
        taken = np.zeros(len(waiting), bool)
        for expert in range(experts):
            mine = order[best[order] == expert][: room[expert]]
            label[waiting[mine]] = expert
            taken[mine] = True
            room[expert] -= len(mine)
        open_cost[:, room == 0] = np.inf
        waiting = waiting[~taken]
    return label


def improve_by_swaps(cost_HE: FloatArray, label_H: IntArray, limit: int = 20_000) -> IntArray:
    """Exchanges the best pair of neurons of any two experts until none lowers the total cost."""
    neurons, experts = cost_HE.shape
    label = label_H.copy()
    gain = cost_HE[np.arange(neurons), label][:, None] - cost_HE
    best = np.full((experts, experts), -np.inf)
    who = np.zeros((experts, experts), np.int64)

    def refresh(expert: int) -> None:
        members = np.flatnonzero(label == expert)
        top = gain[members].argmax(0)
        who[expert] = members[top]
        best[expert] = gain[who[expert], np.arange(experts)]

    for expert in range(experts):
        refresh(expert)
    for _ in range(limit):
        total = best + best.T
        np.fill_diagonal(total, -np.inf)
        a, b = np.unravel_index(total.argmax(), total.shape)
        if total[a, b] <= 1e-9:
            break
        i, j = who[a, b], who[b, a]
        label[i], label[j] = b, a
        for neuron in (i, j):
            gain[neuron] = cost_HE[neuron, label[neuron]] - cost_HE[neuron]
        refresh(int(a))
        refresh(int(b))
    return label
