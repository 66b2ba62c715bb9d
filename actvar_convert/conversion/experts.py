"""Partition, order and router start of one FFN's experts.

Shapes: T tokens, C width, H neurons, E experts of N neurons, F experts that the router scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from actvar_convert.conversion.clustering import METHODS, Clustering
from actvar_convert.conversion.least_squares import CHUNK, Moments
from actvar_convert.models.experts import ExpertFFN
from actvar_convert.recipe.schema import ExpertsRecipe


@dataclass
class Partition:
    """Order of the neurons of one FFN: expert e owns ``permutation[e N : (e + 1) N]``, most important experts first."""

    permutation: Tensor


def activations(ffn: Any, x_TC: Tensor) -> Tensor:
    """Hidden activations [T, H] of a dense FFN."""
    hidden = x_TC.new_empty(len(x_TC), ffn.fc1.out_features)
    for x, out in zip(torch.split(x_TC, CHUNK), torch.split(hidden, CHUNK), strict=True):
        out.copy_(F.gelu(F.linear(x, ffn.fc1.weight, ffn.fc1.bias), approximate="tanh"))
    return hidden


def neuron_importance(ffn: Any, hidden_TH: Tensor, root_CC: Tensor | None = None) -> Tensor:
    """Root mean square [H] of what each neuron adds to the output: rms activation times norm of its output weights.

    With ``root_CC`` the norm is that of R' w: how much the addition matters to the loss (``fisher.OutputMetric``).
    """
    size: Tensor = torch.linalg.vector_norm(hidden_TH, dim=0) * output_norms(ffn, root_CC)
    return size / math.sqrt(len(hidden_TH))


def output_norms(ffn: Any, root_CC: Tensor | None = None) -> Tensor:
    """Norms [H] of the neurons' output weights w, or of R' w; see ``neuron_importance``."""
    w2_CH = ffn.fc2.weight if root_CC is None else root_CC.T @ ffn.fc2.weight.float()
    norms: Tensor = torch.linalg.vector_norm(w2_CH, dim=0)
    return norms


def partition_neurons(
    ffn: Any,
    x_TC: Tensor,
    recipe: ExpertsRecipe,
    shared: int,
    seed: int,
    root_CC: Tensor | None = None,
    clustering: Clustering | None = None,
) -> Partition:
    """Splits an FFN's neurons into experts.

    Args:
        ffn: the dense FFN.
        x_TC: calibration inputs, from the scales that will be sparse.
        recipe: number of experts and method.
        shared: experts that every scale runs. They are the most important neurons, one by one; only the others are
            clustered.
        seed: of the clustering.
        root_CC: see ``neuron_importance``; also what clustering by ``gradient`` weighs activations with.
        clustering: groups the neurons in place of the recipe's method.
    """
    hidden = activations(ffn, x_TC)
    importance = neuron_importance(ffn, hidden, root_CC)
    neurons = ffn.fc1.out_features
    size = neurons // recipe.count
    ranked = importance.argsort(descending=True, stable=True)
    head = ranked[: shared * size]
    tail = ranked[len(head) :].sort().values
    groups = [head.view(-1, size)] if len(head) else []
    if len(tail):
        measured = hidden[:, tail]
        del hidden
        if recipe.clustering == "gradient":
            measured *= output_norms(ffn, root_CC)[tail]
        weights = _array(ffn.fc1.weight.detach()[tail])
        group = clustering or METHODS[recipe.clustering]
        label = group(_array(measured), weights, len(tail) // size, seed)
        members = tail[torch.from_numpy(np.argsort(label, kind="stable")).to(tail.device)].view(-1, size)
        energy = importance.square()[members].sum(1)
        groups.append(members[energy.argsort(descending=True, stable=True)])
    return Partition(torch.cat(groups).flatten())


def _array(x: Tensor) -> npt.NDArray[np.float32]:
    return x.float().cpu().numpy()


def install_experts(sparse: ExpertFFN, ffn: Any, partition: Partition) -> None:
    """Gives an expert FFN its own copy of the dense weights, neurons in expert order; it may have no memory yet."""
    order = partition.permutation
    weights = {
        "fc1.weight": ffn.fc1.weight.detach().index_select(0, order),
        "fc2.weight": ffn.fc2.weight.detach().index_select(1, order),
        "permutation": order.clone(),
    }
    if ffn.fc1.bias is not None:
        weights |= {"fc1.bias": ffn.fc1.bias.detach()[order], "fc2.bias": ffn.fc2.bias.detach().clone()}
    sparse.load_state_dict(weights, strict=False, assign=True)


def squared_sizes(hidden_TEN: Tensor, w2_ENC: Tensor) -> Tensor:
    """Squared norms [T, E] of f_e(x), from hidden activations and output weights by expert; rounding may go below 0."""
    return torch.einsum("ten,enm,tem->te", hidden_TEN, w2_ENC @ w2_ENC.transpose(1, 2), hidden_TEN)


def expert_sizes(ffn: ExpertFFN, hidden_TH: Tensor) -> Tensor:
    """Norms [T, E] of f_e(x) from hidden activations in expert order.

    ||W_e h||^2 = h' W_e' W_e h, so no [T, E, C] tensor is made.
    """
    h = hidden_TH.view(-1, ffn.experts, hidden_TH.shape[1] // ffn.experts)
    w = ffn.fc2.weight.T.reshape(*h.shape[1:], -1)
    return squared_sizes(h, w).clamp_min(0).sqrt()


@torch.no_grad()
def start_router(ffn: ExpertFFN, x_TC: Tensor) -> None:
    """Least-squares start of the router: predicts ||f_e(x)|| of the experts that it scores."""
    if ffn.router is None:
        return
    moments = Moments(x_TC.shape[1], ffn.scored, x_TC.device)
    for x in torch.split(x_TC, CHUNK):
        target = expert_sizes(ffn, F.gelu(ffn.fc1(x), approximate="tanh"))
        moments.add(x, target[:, ffn.experts - ffn.scored :])
    weight, bias = moments.ridge()
    ffn.router.linear.weight.data.copy_(weight)
    ffn.router.linear.bias.data.copy_(bias)


def active_neurons(ffn: ExpertFFN, x_BLC: Tensor, scale: int) -> tuple[Tensor, Tensor]:
    """Hidden activations [B, L, E, N] of all experts in fp32, and which of these the active plan runs, [B, L, E]."""
    hidden = ffn.hidden(x_BLC).float().view(*x_BLC.shape[:2], ffn.experts, -1)
    return hidden, ffn.active(x_BLC, scale)
