"""Balanced partitions: sizes, optimality, and finding groups that are there."""

import numpy as np
import pytest

from actvar_convert.conversion.clustering import (
    METHODS,
    balanced_assignment,
    balanced_kmeans,
    greedy_assignment,
    improve_by_swaps,
)


def total(cost: np.ndarray, label: np.ndarray) -> float:
    return float(cost[np.arange(len(label)), label].sum())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_balanced_and_repeatable(method: str) -> None:
    random = np.random.default_rng(0)
    activations, weights = random.standard_normal((50, 24)), random.standard_normal((24, 8))
    label = METHODS[method](activations, weights, 6, seed=3)
    assert np.bincount(label, minlength=6).tolist() == [4] * 6
    assert (METHODS[method](activations, weights, 6, seed=3) == label).all()


def test_exact_assignment_beats_every_exchange() -> None:
    cost = np.random.default_rng(1).random((12, 3))
    label = balanced_assignment(cost)
    for i in range(12):
        for j in range(12):
            swapped = label.copy()
            swapped[i], swapped[j] = label[j], label[i]
            assert total(cost, swapped) >= total(cost, label) - 1e-12


@pytest.mark.parametrize(("neurons", "experts"), [(64, 4), (120, 8), (96, 12), (30, 1)])
def test_greedy_with_swaps_is_balanced_and_near_the_exact_cost(neurons: int, experts: int) -> None:
    points = np.random.default_rng(2).standard_normal((neurons, 5))
    centres = np.random.default_rng(3).standard_normal((experts, 5))
    cost = ((points[:, None] - centres[None]) ** 2).sum(-1)
    exact = balanced_assignment(cost)
    greedy = greedy_assignment(cost)
    swapped = improve_by_swaps(cost, greedy)
    for label in (greedy, swapped):
        assert np.bincount(label, minlength=experts).tolist() == [neurons // experts] * experts
    assert total(cost, swapped) <= total(cost, greedy) + 1e-9
    assert total(cost, swapped) <= 1.03 * total(cost, exact)


def test_neurons_that_fire_together_end_together() -> None:
    random = np.random.default_rng(4)
    truth = random.permutation(np.repeat(np.arange(4), 6))
    drivers = random.standard_normal((200, 4))
    activations = drivers[:, truth] * (0.5 + random.random(24)) + 0.05 * random.standard_normal((200, 24))
    label = METHODS["kmeans"](activations, random.standard_normal((24, 3)), 4, seed=0)
    for group in range(4):
        assert len(set(label[truth == group])) == 1


def test_one_expert_needs_no_clustering() -> None:
    assert balanced_kmeans(np.zeros((5, 2)), 1, seed=0).tolist() == [0] * 5


def test_large_contributions_decide_where_they_count() -> None:
    """Two strong pairs of neurons, and weak ones that would rather follow other drivers: each pair stays together."""
    random = np.random.default_rng(5)
    drivers = random.standard_normal((400, 2))
    strong = 100 * drivers[:, [0, 0, 1, 1]]
    weak = random.standard_normal((400, 4))
    activations = np.concatenate([strong, weak], axis=1)
    label = METHODS["gradient"](activations, random.standard_normal((8, 3)), 2, seed=0)
    assert label[0] == label[1] != label[2] == label[3]
    scaled = activations / activations.std(0)
    equal = METHODS["kmeans"](activations, np.ones((8, 3)), 2, seed=0)
    assert (METHODS["gradient"](scaled, np.ones((8, 3)), 2, seed=0) == equal).all()
