"""Guidance folded into the predictions: one row per image, at the strength that the model was trained for."""

from __future__ import annotations

import pytest
import torch

from actvar_convert.cost import macs as costs
from actvar_convert.cost.flops import count_flops
from actvar_convert.distillation.stages import STAGES
from actvar_convert.errors import InputError, RecipeError
from actvar_convert.measure.agreement import compare_logits
from actvar_convert.models.base import Sampling, guided
from actvar_convert.models.generation import Generation
from actvar_convert.models.model import Model, fresh_sparse
from actvar_convert.models.split import ffn_of
from actvar_convert.plan import SparsityPlan
from actvar_convert.recipe.schema import JointStage
from actvar_convert.system.progress import SilentProgress

LABELS = torch.tensor([0, 3, 5, 1])


def test_it_samples_what_both_rows_would_without_guidance(tiny_sparse: Model, tiny_folded: Model) -> None:
    unguided = tiny_sparse.generate_tokens(LABELS, sampling=tiny_sparse.sampling_with(cfg=0.0), seed=3)
    assert torch.equal(tiny_folded.generate_tokens(LABELS, seed=3), unguided)
    assert not torch.equal(tiny_sparse.generate_tokens(LABELS, seed=3), unguided)
    assert torch.equal(
        tiny_folded.generate([2], seed=3),
        tiny_sparse.generate([2], sampling=tiny_sparse.sampling_with(cfg=0.0), seed=3),
    )


def test_a_scale_runs_one_row_per_image(tiny_sparse: Model, tiny_folded: Model) -> None:
    def rows(model: Model) -> list[int]:
        seen: list[int] = []
        ffn = ffn_of(model.transformer.blocks[0])
        handle = ffn.register_forward_hook(lambda _, args, out: seen.append(len(out)))
        under_way = Generation(model, model.family.condition(model.config, LABELS), model.sampling)
        for scale, length in enumerate(model.config.schedule.lengths):
            under_way.step(scale, torch.ones(len(LABELS), length, model.config.vocab))
        handle.remove()
        return seen

    with torch.inference_mode():
        assert (rows(tiny_sparse), rows(tiny_folded)) == ([8] * 4, [4] * 4)


def test_its_strength_is_fixed(tiny_folded: Model) -> None:
    with pytest.raises(InputError, match=r"strength 1\.5 is folded into .* cfg 3 is out of reach"):
        tiny_folded.generate(LABELS, sampling=tiny_folded.sampling_with(cfg=3.0))
    assert tiny_folded.generate_tokens(LABELS, sampling=tiny_folded.sampling_with(cfg=1.5)).shape == (4, 30)


def test_plans_of_one_model_agree(tiny_model: Model) -> None:
    config = tiny_model.config
    paired = SparsityPlan.dense(config, 8)
    folded = paired.model_copy(update={"guidance": "folded"})
    with pytest.raises(RecipeError, match="agree on guidance") as error:
        fresh_sparse(config, tiny_model.tokenizer, {"a": paired, "b": folded}, "a")
    assert "'a': 'paired', 'b': 'folded'" in str(error.value)


def test_it_is_priced_by_one_row(tiny_sparse: Model, tiny_folded: Model) -> None:
    config = tiny_sparse.config
    unguided = costs.transformer_macs(config, tiny_sparse.plan, guidance=False)
    assert costs.transformer_macs(config, tiny_folded.plan) == unguided
    assert costs.transformer_macs(config, tiny_folded.plan, guidance=False) == unguided
    report = count_flops(config, plans={"p": tiny_folded.plan})
    assert report.sparse is not None and report.sparse.transformer.macs == unguided
    assert sum(cost.macs for cost in report.sparse.components.values()) == unguided
    assert report.dense.transformer.macs == costs.transformer_macs(config, None)


def test_guided_predictions_are_those_of_sampling(tiny_model: Model) -> None:
    """Scale by scale, from a generation under way, and under teacher forcing."""
    sampling = Sampling(cfg=2.5)
    model = Model(tiny_model.transformer, tiny_model.tokenizer, sampling)
    tokens = model.generate_tokens(LABELS, seed=3, chunk=4).clone()
    lengths = model.config.schedule.lengths
    labels = model.family.condition(model.config, LABELS)
    with torch.no_grad():
        forced = model.guided_logits(labels, model.teacher_forcing_input(tokens)).split(list(lengths), dim=1)
        known = model.transformer(labels, model.teacher_forcing_input(tokens))
        again = model.guided_logits(labels, model.teacher_forcing_input(tokens), known)
    torch.testing.assert_close(again, torch.cat(forced, 1))
    for scale, part in enumerate(forced):
        strength = 2.5 * scale / 3
        with torch.no_grad():
            null = torch.full_like(LABELS, model.transformer.null_class)
            inputs = model.teacher_forcing_input(tokens)
            pair = torch.cat((model.transformer(LABELS, inputs), model.transformer(null, inputs)))
        own = model.config.schedule.slice(scale)
        torch.testing.assert_close(part, guided(pair[:, own], strength))
        torch.testing.assert_close(part, pair[:4, own] + strength * (pair[:4, own] - pair[4:, own]))


def test_it_learns_and_is_judged_by_guided_predictions(tiny_model: Model, tiny_folded: Model) -> None:
    tokens = tiny_model.generate_tokens(LABELS, seed=3).clone()
    labels, kl = tiny_model.family.condition(tiny_model.config, LABELS), tiny_model.alphabet.divergence
    with torch.no_grad():
        inputs = tiny_model.teacher_forcing_input(tokens)
        found = kl(tiny_model.guided_logits(labels, inputs), tiny_folded.transformer(labels, inputs))
        losses = STAGES["stage2"].objective(tiny_folded, tiny_model, JointStage(), tokens, labels)
        null = labels.null()
        plain = STAGES["stage2"].objective(tiny_folded, tiny_model, JointStage(), tokens, null)
        unconditional = kl(tiny_model.transformer(null, inputs), tiny_folded.transformer(null, inputs))
    assert found.mean() > 0
    torch.testing.assert_close(losses["kl"], found.mean())
    assert losses.keys() == {"kl", "gate"}, "states of unguided predictions are nothing to learn from"
    torch.testing.assert_close(plain["kl"], unconditional.mean())
    with SilentProgress().task("x", 4) as task:
        agreement = compare_logits(tiny_folded, tiny_model, tokens, LABELS, task)
    torch.testing.assert_close(agreement.per_token(agreement.kl_NS).mean().float(), found.mean())
