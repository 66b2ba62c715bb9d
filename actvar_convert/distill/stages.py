"""The two stages as data: what trains, and which losses a step adds up.

Stage 1 feeds every FFN the teacher's own inputs, so all blocks train at once and only locally: the output loss reaches
the experts and their constants, the regression the router. Stage 2 runs the student end to end against the teacher's
logits and hidden states; gates learn by straight-through selection beside their regression.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actvar_convert.convert.experts import expert_sizes
from actvar_convert.convert.gates import relative_update
from actvar_convert.distill.losses import Total, alone, kl_per_token, regression, relative_error, weighted_mean
from actvar_convert.distill.sharding import gathered
from actvar_convert.distill.traces import Trace, trace
from actvar_convert.models.config import TokenPyramid
from actvar_convert.models.model import VARModel
from actvar_convert.models.sparse import SparseBlock, SparseVARModel, SparseVARTransformer
from actvar_convert.models.var import Span
from actvar_convert.recipe.schema import StageRecipe

Losses = dict[str, Tensor]
Objective = Callable[[SparseVARModel, VARModel, StageRecipe, Tensor, Tensor, Total], Losses]


@dataclass(frozen=True)
class Stage:
    """One stage of distillation.

    Attributes:
        name: in logs and run states.
        objective: the losses of a step on this process's rows, each already weighted; their sum over all processes is
            minimised.
    """

    name: str
    objective: Objective


def trainable_parameters(transformer: SparseVARTransformer, recipe: StageRecipe) -> dict[str, nn.Parameter]:
    """The parameters that a stage changes, by name.

    ``recipe.trainable`` chooses among the weights that the dense model had: none, low-rank updates (the LoRA pair
    alone), the FFNs, or all. Constants of inactive experts and reconstructions train whenever a loss reaches them;
    routers unless frozen; gates unless frozen.
    """
    chosen = {}
    for name, parameter in transformer.named_parameters():
        part = name.split(".")
        if "router" in part:
            train = recipe.router == "regress"
        elif "gate" in part:
            train = recipe.gate == "train"
        elif part[-1] in ("inactive", "lora_down", "lora_up") or "reconstruction" in part:
            train = True
        elif "parametrizations" in part:
            train = False
        else:
            train = recipe.trainable == "all" or (recipe.trainable == "experts" and ".ffn." in name)
        if train:
            chosen[name] = parameter
    return chosen


def sparse_scales(block: SparseBlock) -> list[int]:
    """Scales at which some expert of a block rests."""
    return [s for s in range(len(block.config.sides)) if not block.plan.runs_all(block.index, s)]


def stage1(
    model: SparseVARModel,
    teacher: VARModel,
    recipe: StageRecipe,
    tokens_BL: Tensor,
    labels_B: Tensor,
    total: Total = alone,
) -> Losses:
    """Local losses of every FFN on the teacher's inputs."""
    with torch.no_grad():
        seen = trace(teacher.transformer, labels_B, teacher.teacher_forcing_input(tokens_BL), ffn=True, logits=False)
    pyramid = model.transformer.config.pyramid
    output, router = [], []
    for block, x, y in zip(model.transformer.sparse_layers, seen.ffn_input, seen.ffn_output, strict=True):
        scales = sparse_scales(block)
        if not scales:
            continue
        first = scales[0]
        begin = pyramid.begins[first]
        span = Span(first, pyramid.lengths[first:])
        if recipe.output:
            output.append(relative_error(block.ffn(x[:, begin:], span), y[:, begin:], total))
        if recipe.router_loss and block.ffn.router is not None:
            router.append(_router_regression(block, x, pyramid, total))
    losses = {}
    if output:
        losses["output"] = recipe.output * torch.stack(output).mean()
    if router:
        losses["router"] = recipe.router_loss * torch.stack(router).mean()
    return losses


def _router_regression(block: SparseBlock, x_BLC: Tensor, pyramid: TokenPyramid, total: Total) -> Tensor:
    """Router scores against ||f_e(x) - m_e|| at the scales that route, on detached inputs."""
    ffn, losses = block.ffn, []
    assert ffn.router is not None
    for scale in range(pyramid.num_scales):
        if not block.plan.routes(block.index, scale):
            continue
        x = x_BLC[:, pyramid.slice(scale)].detach().flatten(0, 1)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False), gathered(ffn):
            hidden = F.gelu(F.linear(x.float(), ffn.fc1.weight, ffn.fc1.bias), approximate="tanh")
            target = expert_sizes(ffn, hidden, ffn.inactive[scale])[:, ffn.experts - ffn.scored :]
        losses.append(regression(ffn.router(x), target, total))
    return torch.stack(losses).mean() if losses else x_BLC.new_zeros(())


def stage2(
    model: SparseVARModel,
    teacher: VARModel,
    recipe: StageRecipe,
    tokens_BL: Tensor,
    labels_B: Tensor,
    total: Total = alone,
) -> Losses:
    """KL on logits per scale, hidden-state error, and the regression of the gates (and of routers that train)."""
    inputs = teacher.teacher_forcing_input(tokens_BL)
    pyramid = model.transformer.config.pyramid
    with torch.no_grad():
        seen = trace(
            teacher.transformer, labels_B, inputs, ffn=recipe.router == "regress" and bool(recipe.router_loss)
        )
    for block in model.transformer.sparse_layers:
        block.straight_through = recipe.gate == "train"
    own = trace(model.transformer, labels_B, inputs)
    assert seen.logits is not None and own.logits is not None
    weight = None
    if recipe.scale_weights is not None:
        weights = torch.tensor(recipe.scale_weights, device=tokens_BL.device)
        weight = weights.repeat_interleave(torch.tensor(pyramid.lengths, device=tokens_BL.device))
    divergence = kl_per_token(seen.logits, own.logits, recipe.temperature)
    losses = {"kl": recipe.kl * weighted_mean(divergence, weight, total)}
    if recipe.hidden:
        errors = [relative_error(a, b, total) for a, b in zip(own.hidden[1:], seen.hidden[1:], strict=True)]
        losses["hidden"] = recipe.hidden * torch.stack(errors).mean()
    if recipe.gate == "train" and recipe.gate_loss:
        gate = [
            gate_regression(block, seen, pyramid, total)
            for block in model.transformer.sparse_layers
            if block.gate is not None
        ]
        if gate:
            losses["gate"] = recipe.gate_loss * torch.stack(gate).mean()
    if seen.ffn_input and recipe.router_loss:
        router = [
            _router_regression(block, x, pyramid, total)
            for block, x in zip(model.transformer.sparse_layers, seen.ffn_input, strict=True)
            if block.ffn.router is not None
        ]
        if router:
            losses["router"] = recipe.router_loss * torch.stack(router).mean()
    return losses


def gate_regression(block: SparseBlock, seen: Trace, pyramid: TokenPyramid, total: Total = alone) -> Tensor:
    """Gate scores against the teacher's relative update norms, at the gated scales."""
    assert block.gate is not None
    before, after = seen.hidden[block.index].float(), seen.hidden[block.index + 1].float()
    losses = []
    for scale, keep in enumerate(block.plan.blocks[block.index].keep):
        if keep < 1:
            part = pyramid.slice(scale)
            size = relative_update(before[:, part], after[:, part])
            losses.append(regression(block.gate(before[:, part]), size, total))
    return torch.stack(losses).mean() if losses else before.new_zeros(())


STAGES = {"stage1": Stage("stage1", stage1), "stage2": Stage("stage2", stage2)}
