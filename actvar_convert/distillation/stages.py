"""The two stages as data: what trains, and which losses a step adds up.

Stage 1 feeds every FFN the teacher's own inputs, so all blocks train at once and only locally: the output loss reaches
the experts, the regression the router. Stage 2 runs the student end to end against the teacher's
logits and hidden states; gates learn by straight-through selection beside their regression.

A step trains the active plan. Parameters that it does not use get no gradient at all, so AdamW leaves them, and its
averages of their gradients, as they are. Of a parameter that is used in part (some experts of a router) the rest has
gradient 0 and goes on by AdamW's momentum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from actvar_convert.conversion.experts import expert_sizes
from actvar_convert.conversion.gates import relative_update
from actvar_convert.distillation.losses import Total, alone, kl, regression, relative_error
from actvar_convert.distillation.sharding import gathered
from actvar_convert.distillation.traces import Trace, trace
from actvar_convert.models.base import Span
from actvar_convert.models.experts import ExpertFFN
from actvar_convert.models.gate import GatedBlock
from actvar_convert.models.model import Model
from actvar_convert.models.split import added, expert_ffns, gated_blocks, plans_of
from actvar_convert.plan import SparsityPlan
from actvar_convert.recipe.schema import JointStage, PlanTurns, StageRecipe

Losses = dict[str, Tensor]
Objective = Callable[[Model, Model, StageRecipe, Tensor, Any, Total], Losses]


@dataclass(frozen=True)
class Stage:
    """One stage of distillation.

    Attributes:
        name: in logs and run states.
        section: of the recipe, where its settings are.
        task: what it is called while it runs.
        objective: the losses of a step on this process's rows, each already weighted; their sum over all processes is
            minimised.
        joint: whether blocks run as a whole; else FFNs alone, without token gates.
    """

    name: str
    section: str
    task: str
    objective: Objective
    joint: bool

    def plans(self, model: Model, turns: PlanTurns) -> list[str]:
        """Names of the plans that the steps run by turns: the active one, or all that the stage can train."""
        own = plans_of(model)
        if turns == "random":
            able = [name for name, plan in own.named.items() if self.joint or _saves_experts(plan)]
            return able or [own.name]
        return [own.name]


def _saves_experts(plan: SparsityPlan) -> bool:
    """Whether any block of a plan leaves experts out."""
    scales = range(len(plan.blocks[0].keep))
    return any(not plan.runs_all(block, scale) for block in range(len(plan.blocks)) for scale in scales)


def trains_gates(recipe: StageRecipe) -> bool:
    """Whether gates and reconstructions train in a stage: in stage 2, unless they are frozen."""
    return isinstance(recipe, JointStage) and recipe.gate == "train"


def lora_rank(recipe: StageRecipe) -> int | None:
    """Rank of the low-rank updates that a stage trains; None: it trains none."""
    return recipe.lora_rank if isinstance(recipe, JointStage) and recipe.trainable == "lora" else None


def trainable_parameters(transformer: nn.Module, recipe: StageRecipe) -> dict[str, nn.Parameter]:
    """The parameters that a stage changes, by name.

    Stage 1 trains routers and FFNs. In stage 2 routers are frozen, gates and reconstructions train unless they are
    frozen too, and ``recipe.trainable`` chooses among the weights that the dense model had: none, low-rank updates (the
    LoRA pair alone), the FFNs, or all.
    """
    joint = isinstance(recipe, JointStage)
    trainable = recipe.trainable if isinstance(recipe, JointStage) else "experts"
    trains = {
        "router": not joint,
        "gate": trains_gates(recipe),
        "reconstruction": trains_gates(recipe),
        "low-rank update": True,
    }
    role, chosen = added(transformer), {}
    experts = {id(parameter) for ffn in expert_ffns(transformer) for parameter in ffn.parameters()}
    for name, parameter in transformer.named_parameters():
        if name in role:
            train = trains[role[name]]
        elif ".parametrizations." in name:
            train = False
        else:
            train = trainable == "all" or (trainable == "experts" and id(parameter) in experts)
        if train:
            chosen[name] = parameter
    return chosen


def stage1(
    model: Model, teacher: Model, recipe: StageRecipe, tokens: Tensor, condition: Any, total: Total = alone
) -> Losses:
    """Local losses of every FFN on the teacher's inputs; each weighs 1."""
    with torch.no_grad():
        seen = trace(teacher, condition, teacher.teacher_forcing_input(tokens), ffn=True, logits=False)
    schedule, plan = model.schedule, model.plan
    output, router = [], []
    for ffn, x, y in zip(expert_ffns(model.transformer), seen.ffn_input, seen.ffn_output, strict=True):
        first = next((s for s in range(schedule.num_scales) if not plan.runs_all(ffn.index, s)), None)
        if first is None:
            continue
        begin = schedule.begins[first]
        span = Span(first, schedule.lengths[first:])
        output.append(relative_error(ffn(x[:, begin:], span), y[:, begin:], total=total))
        routed = [scale for scale in range(schedule.num_scales) if plan.routes(ffn.index, scale)]
        if routed:
            router.append(torch.stack([_router_regression(ffn, x[:, schedule.slice(s)], total) for s in routed]).mean())
    losses = {"output": output, "router": router}
    return {name: torch.stack(values).mean() for name, values in losses.items() if values}


def _router_regression(ffn: ExpertFFN, x_BLC: Tensor, total: Total) -> Tensor:
    """Router scores against ||f_e(x)||, for tokens of one scale, on detached inputs."""
    assert ffn.router is not None
    x = x_BLC.detach().flatten(0, 1)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False), gathered(ffn):
        target = expert_sizes(ffn, ffn.hidden(x.float()))[:, ffn.experts - ffn.scored :]
    return regression(ffn.router(x), target, total=total)


def stage2(
    model: Model, teacher: Model, recipe: StageRecipe, tokens: Tensor, condition: Any, total: Total = alone
) -> Losses:
    """The losses of ``JOINT`` on one pass of the teacher and one of the student.

    If the student's guidance is folded, its predictions are compared with the teacher's guided ones.
    """
    inputs = teacher.teacher_forcing_input(tokens)
    with torch.no_grad():
        seen = trace(teacher, condition, inputs)
        if model.folded:
            seen.logits = teacher.guided_logits(condition, inputs, seen.logits)
    compared = Compared(model, recipe, seen, trace(model, condition, inputs), total)
    values = {name: (weight, loss(compared)) for name, (weight, loss) in JOINT.items()}
    return {name: weight * value for name, (weight, value) in values.items() if value is not None}


class Compared(NamedTuple):
    """What a step of stage 2 has, for its losses to compare.

    Attributes:
        model: the student.
        recipe: of the stage.
        teacher, student: a pass of each over the same tokens, states and logits.
        total: see ``losses``.
    """

    model: Model
    recipe: StageRecipe
    teacher: Trace
    student: Trace
    total: Total = alone


def _divergence(step: Compared) -> Tensor:
    """KL on the logits, nats per token."""
    assert step.teacher.logits is not None and step.student.logits is not None
    return kl(step.model.alphabet, step.teacher.logits, step.student.logits, total=step.total)


def _hidden_error(step: Compared) -> Tensor | None:
    """Error of the states after every block. None if guidance is folded: the teacher's are of unguided predictions."""
    if step.model.folded:
        return None
    pairs = zip(step.student.hidden[1:], step.teacher.hidden[1:], strict=True)
    return torch.stack([relative_error(own, seen, total=step.total) for own, seen in pairs]).mean()


def _gate_error(step: Compared) -> Tensor | None:
    """The regression of the gates that train."""
    gated = [block for block in gated_blocks(step.model.transformer) if _choosing_scales(block)]
    if not gated or not trains_gates(step.recipe):
        return None
    return torch.stack([gate_regression(block, step.teacher, step.total) for block in gated]).mean()


JOINT: dict[str, tuple[float, Callable[[Compared], Tensor | None]]] = {
    "kl": (1.0, _divergence),
    "hidden": (0.1, _hidden_error),
    "gate": (0.1, _gate_error),
}
"""The losses of stage 2 by name: what each weighs, and a function that gives this process's share, or None if it does
not apply. A new one is a function and a line here; the metrics name it."""


def _choosing_scales(block: GatedBlock) -> list[int]:
    """Scales at which the active plan has a block compute some of the tokens, so that a gate picks them."""
    plan, lengths = block.plans.current.blocks[block.index], block.schedule.lengths
    return [scale for scale, length in enumerate(lengths) if 0 < plan.kept(scale, length) < length]


def gate_regression(block: GatedBlock, seen: Trace, total: Total = alone) -> Tensor:
    """Gate scores against the teacher's relative update norms, at the gated scales; at least one."""
    before, after = seen.hidden[block.index].float(), seen.hidden[block.index + 1].float()
    losses = []
    for scale in _choosing_scales(block):
        part = block.schedule.slice(scale)
        size = relative_update(before[:, part], after[:, part])
        losses.append(regression(block.gate(before[:, part]), size, total=total))
    return torch.stack(losses).mean()


STAGES = {
    "stage1": Stage("stage1", "distill.stage1", "distilling, stage1", stage1, joint=False),
    "stage2": Stage("stage2", "distill.stage2", "distilling, stage2", stage2, joint=True),
}
"""Of a distillation, in order."""
