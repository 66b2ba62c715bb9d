"""The two stages as data: what trains, and which losses a step adds up.

Stage 1 feeds every FFN the teacher's own inputs, so all blocks train at once and only locally: the output loss reaches
the experts and their constants, the regression the router. Stage 2 runs the student end to end against the teacher's
logits and hidden states; gates learn by straight-through selection beside their regression.

A step trains the plan that is in force. Parameters that it does not use get no gradient at all, so AdamW leaves them,
and its averages of their gradients, as they are. Of a parameter that is used in part (the constants of some scales,
some experts of a router) the rest has gradient 0 and goes on by AdamW's momentum and weight decay.

Pyramids may end after any scale: losses then cover the scales that their tokens lead to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actvar_convert.conversion.experts import expert_sizes
from actvar_convert.conversion.gates import relative_update
from actvar_convert.distillation.losses import Total, alone, kl_per_token, regression, relative_error, weighted_mean
from actvar_convert.distillation.sharding import gathered
from actvar_convert.distillation.traces import Trace, trace
from actvar_convert.models.config import TokenPyramid
from actvar_convert.models.model import VARModel, guided_logits
from actvar_convert.models.sparse import SparseBlock, SparseVARModel, SparseVARTransformer
from actvar_convert.models.var import Span
from actvar_convert.plan import SparsityPlan
from actvar_convert.recipe.schema import StageRecipe

Losses = dict[str, Tensor]
Objective = Callable[[SparseVARModel, VARModel, StageRecipe, Tensor, Tensor, Total], Losses]


@dataclass(frozen=True)
class Stage:
    """One stage of distillation.

    Attributes:
        name: in logs and run states.
        section: of the recipe, where its settings are.
        task: what it is called while it runs.
        objective: the losses of a step on this process's rows, each already weighted; their sum over all processes is
            minimised.
        joint: whether blocks run as a whole; else FFNs alone, where token gates play no part.
    """

    name: str
    section: str
    task: str
    objective: Objective
    joint: bool

    def sparse_scales(self, plan: SparsityPlan) -> list[int]:
        """Scales at which a plan differs from the dense model in what the stage runs."""
        found = set()
        for index, block in enumerate(plan.blocks):
            for scale, keep in enumerate(block.keep):
                if not plan.runs_all(index, scale) or (self.joint and keep < 1):
                    found.add(scale)
        return sorted(found)

    def plans(self, model: SparseVARModel, recipe: StageRecipe) -> list[str]:
        """Names of the plans that the steps run by turns: the one in force, or all that the stage can train."""
        if recipe.plans == "random":
            able = [name for name, plan in model.plans.items() if self.joint or self.sparse_scales(plan)]
            return able or [model.plan_name]
        return [model.plan_name]


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


def token_weights(recipe: StageRecipe, pyramid: TokenPyramid, scales: int, device: torch.device) -> Tensor | None:
    """Weights [L] of the tokens of the first scales in losses; None: all count the same."""
    if recipe.scale_weights is None:
        return None
    lengths = torch.tensor(pyramid.lengths[:scales], device=device)
    return torch.tensor(recipe.scale_weights[:scales], device=device).repeat_interleave(lengths)


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
    pyramid, scales = model.transformer.config.pyramid, seen.scales
    weight = token_weights(recipe, pyramid, scales, tokens_BL.device)
    output, router = [], []
    for block, x, y in zip(model.transformer.sparse_layers, seen.ffn_input, seen.ffn_output, strict=True):
        first = next((s for s in range(scales) if not block.plan.runs_all(block.index, s)), None)
        if first is None:
            continue
        begin = pyramid.begins[first]
        span = Span(first, pyramid.lengths[first:scales])
        if recipe.output:
            own_weight = None if weight is None else weight[begin:]
            output.append(relative_error(block.ffn(x[:, begin:], span), y[:, begin:], total, own_weight))
        if recipe.router_loss and _routed_scales(block, scales):
            router.append(_router_regression(block, x, scales, total))
    losses = {}
    if output:
        losses["output"] = recipe.output * torch.stack(output).mean()
    if router:
        losses["router"] = recipe.router_loss * torch.stack(router).mean()
    return losses


def _routed_scales(block: SparseBlock, scales: int) -> list[int]:
    """Those of the first scales at which the plan in force has the router of a block choose."""
    return [scale for scale in range(scales) if block.plan.routes(block.index, scale)]


def _router_regression(block: SparseBlock, x_BLC: Tensor, scales: int, total: Total) -> Tensor:
    """Router scores against ||f_e(x) - m_e|| at those of the first scales that route, on detached inputs."""
    ffn, pyramid, losses = block.ffn, block.config.pyramid, []
    assert ffn.router is not None
    for scale in _routed_scales(block, scales):
        x = x_BLC[:, pyramid.slice(scale)].detach().flatten(0, 1)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False), gathered(ffn):
            hidden = F.gelu(F.linear(x.float(), ffn.fc1.weight, ffn.fc1.bias), approximate="tanh")
            target = expert_sizes(ffn, hidden, ffn.inactive[scale])[:, ffn.experts - ffn.scored :]
        losses.append(regression(ffn.router(x), target, total))
    return torch.stack(losses).mean()


def stage2(
    model: SparseVARModel,
    teacher: VARModel,
    recipe: StageRecipe,
    tokens_BL: Tensor,
    labels_B: Tensor,
    total: Total = alone,
) -> Losses:
    """KL on logits per scale, hidden-state error, and the regression of the gates (and of routers that train).

    Where the student's guidance is folded, its predictions are compared with the teacher's guided ones.
    """
    inputs = teacher.teacher_forcing_input(tokens_BL)
    with torch.no_grad():
        seen = trace(teacher.transformer, labels_B, inputs, ffn=recipe.router == "regress" and bool(recipe.router_loss))
        if model.transformer.rows_per_image == 1:
            seen.logits = guided_logits(teacher, labels_B, inputs, seen.logits)
    own = trace(model.transformer, labels_B, inputs)
    assert seen.logits is not None and own.logits is not None
    layers, scales = model.transformer.sparse_layers, seen.scales
    weight = token_weights(recipe, model.transformer.config.pyramid, scales, tokens_BL.device)
    divergence = kl_per_token(seen.logits, own.logits, recipe.temperature)
    losses = {"kl": recipe.kl * weighted_mean(divergence, weight, total)}
    if recipe.hidden:
        errors = [relative_error(a, b, total, weight) for a, b in zip(own.hidden[1:], seen.hidden[1:], strict=True)]
        losses["hidden"] = recipe.hidden * torch.stack(errors).mean()
    if recipe.gate == "train" and recipe.gate_loss:
        gate = [gate_regression(block, seen, total) for block in layers if _gated_scales(block, scales)]
        if gate:
            losses["gate"] = recipe.gate_loss * torch.stack(gate).mean()
    if seen.ffn_input and recipe.router_loss:
        router = [
            _router_regression(block, x, scales, total)
            for block, x in zip(layers, seen.ffn_input, strict=True)
            if _routed_scales(block, scales)
        ]
        if router:
            losses["router"] = recipe.router_loss * torch.stack(router).mean()
    return losses


def _gated_scales(block: SparseBlock, scales: int) -> list[int]:
    """Those of the first scales at which the plan in force has a block skip tokens."""
    plan, lengths = block.plan.blocks[block.index], block.config.pyramid.lengths[:scales]
    return [scale for scale, length in enumerate(lengths) if plan.kept(scale, length) < length]


def gate_regression(block: SparseBlock, seen: Trace, total: Total = alone) -> Tensor:
    """Gate scores against the teacher's relative update norms, at the gated scales that it saw; at least one."""
    assert block.gate is not None
    before, after = seen.hidden[block.index].float(), seen.hidden[block.index + 1].float()
    losses = []
    for scale in _gated_scales(block, seen.scales):
        part = block.config.pyramid.slice(scale)
        size = relative_update(before[:, part], after[:, part])
        losses.append(regression(block.gate(before[:, part]), size, total))
    return torch.stack(losses).mean()


STAGES = {
    "stage1": Stage("stage1", "distill.stage1", "distilling, stage1", stage1, joint=False),
    "stage2": Stage("stage2", "distill.stage2", "distilling, stage2", stage2, joint=True),
}
"""Of a distillation, in order."""
