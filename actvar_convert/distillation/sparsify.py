"""The optional first step of a conversion: the dense model is trained for a short while to use fewer neurons per token.

Experts that a token skips cost quality by what their neurons would have added. Activations that are few and large leave
less to skip (D2DMoE, arXiv 2310.04361, which regularises by the squared Hoyer measure; here it is divided by the number
of neurons, so that it is the share of them that a token uses).
Shapes: B pyramids, L tokens, C width, H hidden neurons.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from actvar_convert.distillation.data import TokenStore
from actvar_convert.distillation.loop import distill_model
from actvar_convert.distillation.losses import Total, alone, kl_per_token, weighted_mean
from actvar_convert.distillation.stages import Losses, Stage
from actvar_convert.distillation.traces import Trace, trace
from actvar_convert.files.skeleton import NoWeights
from actvar_convert.models.config import TransformerConfig
from actvar_convert.models.experts import ExpertFFN
from actvar_convert.models.model import VARModel
from actvar_convert.models.sparse import SparseVARModel, SparseVARTransformer
from actvar_convert.models.var import FFN, VARTransformer
from actvar_convert.plan import SparsityPlan
from actvar_convert.recipe.schema import JointStage, Recipe, SparsifyRecipe, StageRecipe
from actvar_convert.system.processes import Processes
from actvar_convert.system.progress import Progress

PLAN = "dense"


def used_share(hidden_BLH: Tensor) -> Tensor:
    """Share [B, L] of its neurons that a token uses: (sum |a|)^2 / (H sum a^2), 1/H for one neuron and 1 for all alike.

    The squared Hoyer measure over the number of neurons; 0 for a token all of whose activations are 0.
    """
    size = hidden_BLH.float()
    return size.abs().sum(-1).square() / (size.shape[-1] * size.square().sum(-1)).clamp_min(1e-12)


def sparse_activations(weight: float) -> Stage:
    """The stage: KL to the model before, and ``weight`` times the share of neurons that a token uses, mean of all FFNs.

    The student is the dense model as a sparse one whose every token runs all of one expert.
    """

    def objective(
        model: SparseVARModel,
        teacher: VARModel,
        recipe: StageRecipe,
        tokens_BL: Tensor,
        labels_B: Tensor,
        total: Total = alone,
    ) -> Losses:
        inputs = teacher.teacher_forcing_input(tokens_BL)
        with torch.no_grad():
            wanted = teacher.transformer(labels_B, inputs)
        own = trace(model.transformer, labels_B, inputs, ffn=True)
        assert own.logits is not None
        shares = [weighted_mean(share, None, total) for share in _used_shares(model, own)]
        return {
            "kl": weighted_mean(kl_per_token(wanted, own.logits), None, total),
            "used": weight * torch.stack(shares).mean(),
        }

    return Stage("sparsify", "sparsify", "training for sparse activations", objective, joint=True)


def stage_recipe(recipe: SparsifyRecipe) -> JointStage:
    """The settings of the step as those of a stage, in which all weights train."""
    return JointStage(**recipe.model_dump(exclude={"weight"}), trainable="all", gate="frozen")


def sparsify_model(
    dense: VARModel,
    recipe: Recipe,
    store: TokenStore,
    *,
    state_path: Path | None,
    fingerprint: str,
    progress: Progress,
    processes: Processes,
) -> VARModel:
    """A dense model whose tokens use fewer neurons, and which predicts nearly the same; ``dense`` is left as it is.

    Args:
        dense: what it is trained from, and compared with.
        recipe: with its ``sparsify``; at 0 steps ``dense`` itself is returned.
        store: pyramids to train on.
        state_path: file that keeps what is done; a call that finds it goes on from there, to the same result. None:
            nothing is kept.
        fingerprint: of the run that the state belongs to.
        processes: those that share every batch; each keeps a whole copy.

    Raises:
        Interrupted: after Ctrl-C, with everything done so far on disk.
    """
    chosen = recipe.sparsify
    if not chosen.steps:
        return dense
    student = SparseVARModel(one_expert(dense.transformer), dense.tokenizer, dense.sampling).to(dense.device).eval()
    distill_model(
        student,
        dense,
        recipe,
        store,
        state_path=state_path,
        fingerprint=fingerprint,
        log=None,
        progress=progress,
        processes=replace(processes, shard=False),
        stages=[(sparse_activations(chosen.weight), stage_recipe(chosen))],
    )
    with NoWeights():
        transformer = VARTransformer(dense.transformer.config)
    trained, dtype = student.transformer.state_dict(), dense.dtype
    own = {
        name: trained[name].to(dtype) if trained[name].is_floating_point() else trained[name]
        for name in transformer.state_dict()
    }
    transformer.load_state_dict(own, assign=True)
    transformer.requires_grad_(False)
    result = VARModel(transformer, dense.tokenizer, dense.sampling).train(dense.training)
    result.origin = dense.origin
    return result


@torch.no_grad()
def mean_used_share(model: VARModel, tokens_BL: Tensor, labels_B: Tensor) -> float:
    """Mean of ``used_share`` over the tokens of pyramids and the FFNs of a dense model."""
    inputs = model.teacher_forcing_input(tokens_BL.to(model.device))
    seen = trace(model.transformer, labels_B.to(model.device), inputs, ffn=True, logits=False)
    return float(torch.stack([share.mean() for share in _used_shares(model, seen)]).mean())


def _used_shares(model: VARModel, seen: Trace) -> Iterator[Tensor]:
    """``used_share`` [B, L] of every FFN, dense or of one expert, on the inputs that a pass has seen."""
    for block, x in zip(model.transformer.layers, seen.ffn_input, strict=True):
        assert isinstance(block.ffn, FFN | ExpertFFN)
        yield used_share(F.gelu(block.ffn.fc1(x), approximate="tanh"))


def one_expert(dense: VARTransformer) -> SparseVARTransformer:
    """A copy of a dense transformer, in fp32, each FFN of which is one expert that every token runs."""
    transformer = SparseVARTransformer(dense.config, *one_expert_plans(dense.config)).to(dense.pos_start.device)
    transformer.load_state_dict(dense.state_dict(), strict=False)
    return transformer


def one_expert_plans(config: TransformerConfig) -> tuple[dict[str, SparsityPlan], str]:
    """Its plans, and the one in force."""
    return {PLAN: SparsityPlan.dense(config)}, PLAN
