"""Partition and router start of one FFN."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from actvar_convert.conversion.clustering import METHODS
from actvar_convert.conversion.experts import (
    expert_sizes,
    install_experts,
    neuron_importance,
    output_norms,
    partition_neurons,
    start_router,
)
from actvar_convert.conversion.least_squares import reduced_rank, ridge
from actvar_convert.models.base import Span
from actvar_convert.models.experts import ExpertFFN
from actvar_convert.models.model import Model
from actvar_convert.models.var.network import FFN
from actvar_convert.plan import BlockPlan, Plans, SparsityPlan
from actvar_convert.recipe.schema import ExpertsRecipe

EXPERTS = 8


def make(tiny_model: Model, recipe: ExpertsRecipe, shared: int = 2) -> tuple[FFN, ExpertFFN, torch.Tensor]:
    config = tiny_model.config
    block = BlockPlan(prefix=(8, 8, 2, 2), routed=(0, 0, 3, 3), keep=(1, 1, 1, 1))
    plan = SparsityPlan(experts=EXPERTS, blocks=(block,) * config.depth)
    dense = tiny_model.transformer.blocks[0].ffn
    sparse = ExpertFFN(config.width, config.hidden, True, 0, Plans({"plan": plan}, "plan"))
    x = torch.randn(600, config.width, generator=torch.Generator().manual_seed(0)) @ torch.randn(
        config.width, config.width, generator=torch.Generator().manual_seed(1)
    ).div(config.width**0.5)
    with torch.no_grad():
        partition = partition_neurons(dense, x, recipe, shared, seed=0)
        install_experts(sparse, dense, partition)
    return dense, sparse, x


@pytest.mark.parametrize("clustering", ["kmeans", "gradient"])
@torch.no_grad()
def test_partition_is_a_permutation_that_keeps_the_function(tiny_model: Model, clustering: str) -> None:
    dense, sparse, x = make(tiny_model, ExpertsRecipe(count=EXPERTS, clustering=clustering))
    assert sorted(sparse.permutation.tolist()) == list(range(dense.fc1.out_features))
    everything = sparse.fc2(F.gelu(sparse.fc1(x), approximate="tanh"))
    expected = dense(x.unsqueeze(0), Span(3, (len(x),)))[0]
    torch.testing.assert_close(everything, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_clustering_by_gradient_weighs_activations_with_what_they_move(tiny_model: Model) -> None:
    dense, _, x = make(tiny_model, ExpertsRecipe(count=EXPERTS))
    hidden = F.gelu(dense.fc1(x), approximate="tanh")
    recipe = ExpertsRecipe(count=EXPERTS, clustering="gradient")
    width = dense.fc2.out_features
    root = torch.randn(width, width, generator=torch.Generator().manual_seed(2))
    norms = output_norms(dense, root)
    torch.testing.assert_close(norms, torch.stack([(root.T @ w).norm() for w in dense.fc2.weight.T]))
    found = partition_neurons(dense, x, recipe, 0, seed=1, root_CC=root)
    label = METHODS["gradient"]((hidden * norms).numpy(), dense.fc1.weight.numpy(), EXPERTS, 1)
    groups = {frozenset(np.flatnonzero(label == expert).tolist()) for expert in range(EXPERTS)}
    size = dense.fc1.out_features // EXPERTS
    assert {frozenset(part.tolist()) for part in found.permutation.split(size)} == groups


@torch.no_grad()
def test_shared_prefix_holds_the_most_important_neurons(tiny_model: Model) -> None:
    dense, sparse, x = make(tiny_model, ExpertsRecipe(count=EXPERTS), shared=2)
    importance = neuron_importance(dense, F.gelu(dense.fc1(x), approximate="tanh"))
    size = dense.fc1.out_features // EXPERTS
    head, tail = sparse.permutation[: 2 * size], sparse.permutation[2 * size :]
    assert importance[head].min() >= importance[tail].max()


@torch.no_grad()
def test_expert_sizes_are_the_norms_of_expert_outputs(tiny_model: Model) -> None:
    _, sparse, x = make(tiny_model, ExpertsRecipe(count=EXPERTS))
    hidden = F.gelu(sparse.fc1(x), approximate="tanh")
    size = hidden.shape[1] // EXPERTS
    sizes = expert_sizes(sparse, hidden)
    for e in range(EXPERTS):
        own = slice(e * size, (e + 1) * size)
        expected = (hidden[:, own] @ sparse.fc2.weight[:, own].T).norm(dim=1)
        torch.testing.assert_close(sizes[:, e], expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_expert_sizes_make_no_tensor_of_all_outputs(tiny_model: Model, memory_watch: Any) -> None:
    _, sparse, x = make(tiny_model, ExpertsRecipe(count=EXPERTS))
    hidden = F.gelu(sparse.fc1(x), approximate="tanh")
    with memory_watch, torch.backends.opt_einsum.flags(enabled=False):
        expert_sizes(sparse, hidden)
    assert memory_watch.peak < 4 * len(x) * EXPERTS * x.shape[1]


@torch.no_grad()
def test_started_router_beats_a_fixed_choice(tiny_model: Model) -> None:
    _, sparse, x = make(tiny_model, ExpertsRecipe(count=EXPERTS))
    start_router(sparse, x)
    sizes = expert_sizes(sparse, F.gelu(sparse.fc1(x), approximate="tanh"))[:, 2:]
    routed = sparse.route(x.unsqueeze(0), 3)[0]
    fixed = torch.zeros_like(routed)
    fixed[:, sizes.mean(0).topk(3).indices] = True
    caught, caught_fixed = (sizes * routed).sum(), (sizes * fixed).sum()
    best = sizes.topk(3, dim=1).values.sum()
    assert caught_fixed < caught <= best


def test_ridge_recovers_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=generator)
    weight, bias = torch.randn(3, 6, generator=generator), torch.randn(3, generator=generator)
    got_weight, got_bias = ridge(x, x @ weight.T + bias, strength=1e-8)
    torch.testing.assert_close(got_weight, weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got_bias, bias, rtol=1e-3, atol=1e-4)


def test_reduced_rank_recovers_a_low_rank_map() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=generator)
    truth = torch.randn(8, 2, generator=generator) @ torch.randn(2, 8, generator=generator)
    down, up = reduced_rank(x, x @ truth.T, 2)
    assert down.shape == (2, 8) and up.shape == (8, 2)
    torch.testing.assert_close(up @ down, truth, rtol=2e-2, atol=2e-2)
