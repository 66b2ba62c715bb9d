"""The sparse transformer: identity with the dense one, agreement of generation and teacher forcing, plans."""

import copy

import pytest
import torch

from actvar_convert.errors import InputError, RecipeError
from actvar_convert.models.base import Call, Span, inner
from actvar_convert.models.model import Model, fresh_sparse
from actvar_convert.models.split import ffn_of, take_dense
from actvar_convert.plan import BlockPlan, SparsityPlan


def block(**changes: object) -> BlockPlan:
    return BlockPlan(**({"prefix": (8, 8, 2, 2), "routed": (0, 0, 2, 3), "keep": (1, 1, 0.5, 0.6)} | changes))


def sparse_from(dense: Model, plans: dict[str, SparsityPlan], default: str) -> Model:
    """A sparse model with the dense weights and random routers and gates."""
    sparse = fresh_sparse(dense.config, dense.tokenizer, plans, default)
    missing = take_dense(sparse.transformer, dense.transformer.state_dict())
    generator = torch.Generator().manual_seed(5)
    for name, parameter in sparse.transformer.named_parameters():
        if name in missing:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return sparse.eval().requires_grad_(False)


@pytest.fixture
def pyramids(tiny_model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.tensor([0, 3, 5])
    return labels, tiny_model.teacher_forcing_input(tiny_model.generate_tokens(labels, seed=3)).clone()


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@torch.no_grad()
def test_everything_on_is_the_dense_model(tiny_model: Model, pyramids: tuple[torch.Tensor, torch.Tensor]) -> None:
    config = tiny_model.config
    sparse = sparse_from(tiny_model, {"all": SparsityPlan.dense(config, 8)}, "all")
    assert relative_error(sparse.transformer(*pyramids), tiny_model.transformer(*pyramids)) <= 1e-5


@torch.no_grad()
def test_all_experts_routed_is_the_dense_model(tiny_model: Model, pyramids: tuple[torch.Tensor, torch.Tensor]) -> None:
    everything = block(prefix=(0, 1, 2, 3), routed=(8, 7, 6, 5), keep=(1, 1, 1, 1))
    plans = {"routed": SparsityPlan(experts=8, blocks=(everything,) * 2)}
    sparse = sparse_from(tiny_model, plans, "routed")
    assert relative_error(sparse.transformer(*pyramids), tiny_model.transformer(*pyramids)) <= 1e-5


@torch.no_grad()
def test_permuting_neurons_of_the_dense_model_changes_nothing(
    tiny_model: Model, pyramids: tuple[torch.Tensor, torch.Tensor]
) -> None:
    expected = tiny_model.transformer(*pyramids)
    for index, each in enumerate(tiny_model.transformer.blocks):
        order = torch.randperm(len(each.ffn.fc1.bias), generator=torch.Generator().manual_seed(index))
        each.ffn.fc1.weight.copy_(each.ffn.fc1.weight[order])
        each.ffn.fc1.bias.copy_(each.ffn.fc1.bias[order])
        each.ffn.fc2.weight.copy_(each.ffn.fc2.weight[:, order])
    assert relative_error(tiny_model.transformer(*pyramids), expected) <= 1e-5


@pytest.mark.parametrize("rank", [0, 16])
def test_generation_equals_teacher_forcing(
    tiny_model: Model,
    pyramids: tuple[torch.Tensor, torch.Tensor],
    rank: int,
) -> None:
    plan = SparsityPlan(
        experts=8,
        blocks=(block(), block(keep=(1, 0.75, 0, 0.6))),
        reconstruction_rank=rank,
    )
    sparse = sparse_from(tiny_model, {"sparse": plan}, "sparse")
    labels, inputs = pyramids
    schedule, backbone = sparse.schedule, sparse.transformer
    with torch.no_grad():
        expected = backbone(labels, inputs)
        prepared = backbone.prepare(sparse.family.condition(sparse.config, labels))
        slots, logits = backbone.slots(len(labels), schedule), []
        for scale, length in enumerate(schedule.lengths):
            begin, end = schedule.begins[scale] - 1, schedule.ends[scale] - 1
            given = inputs[:, begin:end] if scale else None
            x = backbone.next_states(prepared, given, scale, schedule)
            for each, slot in zip(backbone.blocks, slots, strict=True):
                x = each(x, inner(each).context(prepared), Call(Span(scale, (length,)), None, slot))
            logits.append(backbone.logits(x, prepared))
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-5)
    training_form = backbone.requires_grad_(True)(labels, inputs)
    torch.testing.assert_close(training_form.detach(), expected, rtol=1e-4, atol=1e-5)


def test_straight_through_keeps_the_value_and_reaches_the_gate(
    tiny_model: Model, pyramids: tuple[torch.Tensor, torch.Tensor]
) -> None:
    plan = SparsityPlan(experts=8, blocks=(block(),) * 2)
    sparse = sparse_from(tiny_model, {"sparse": plan}, "sparse").requires_grad_(True)
    expected = sparse.transformer(*pyramids)
    expected.square().mean().backward()
    assert all(each.gate.linear.weight.grad is None for each in sparse.transformer.blocks)
    for each in sparse.transformer.blocks:
        each.straight_through = True
    sparse.zero_grad()
    logits = sparse.transformer(*pyramids)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    logits.square().mean().backward()
    for each in sparse.transformer.blocks:
        assert each.gate.linear.weight.grad.abs().sum() > 0
        assert each.reconstruction.up.weight.grad.abs().sum() > 0


def test_reconstruction_of_skipped_tokens_by_hand(tiny_model: Model) -> None:
    keep = (1.0, 1.0, 1.0, 0.5)
    whole = block(prefix=(8,) * 4, routed=(0,) * 4, keep=keep)
    plan = SparsityPlan(experts=8, blocks=(whole,) * 2)
    sparse = sparse_from(tiny_model, {"sparse": plan}, "sparse")
    each, config = sparse.transformer.blocks[0], sparse.config
    with torch.no_grad():
        prepared = sparse.transformer.prepare(sparse.family.condition(config, [1]))
        context = each.block.context(prepared)
        x = torch.randn(1, config.schedule.total, config.width, generator=torch.Generator().manual_seed(0))
        y = each(x, context, Call(config.schedule.span()))
        part = config.schedule.slice(3)
        score = each.gate(x[:, part])[0]
        kept = score.topk(8).indices.sort().values.tolist()
        update = (y - x)[:, config.schedule.slice(2)]
        grid = update.transpose(1, 2).reshape(1, -1, 3, 3)
        up = torch.nn.functional.interpolate(grid, size=(4, 4), mode="bilinear").flatten(2).transpose(1, 2)
        rows = [*range(part.start), *(part.start + token for token in kept)]
        dense = tiny_model.transformer.blocks[0](x[:, rows], context, Call(Span(0, (1, 4, 9, 8))))
        for token in range(16):
            own, got = x[0, part][token], y[0, part][token]
            r = each.reconstruction
            filled = own + r.alpha[3] * up[0, token] + r.up(r.down(own))
            expected = dense[0, part.start + kept.index(token)] if token in kept else filled
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_plans_switch_without_copies(tiny_model: Model, pyramids: tuple[torch.Tensor, torch.Tensor]) -> None:
    config = tiny_model.config
    plans = {"all": SparsityPlan.dense(config, 8), "some": SparsityPlan(experts=8, blocks=(block(),) * 2)}
    sparse = sparse_from(tiny_model, plans, "some")
    with torch.no_grad():
        first = sparse.transformer(*pyramids)
        sparse.use_plan("all")
        assert relative_error(sparse.transformer(*pyramids), tiny_model.transformer(*pyramids)) <= 1e-5
        sparse.use_plan("some")
        assert torch.equal(sparse.transformer(*pyramids), first)
    with pytest.raises(InputError, match="all, some"):
        sparse.use_plan("none")


def test_plans_that_do_not_fit_are_named_together(tiny_model: Model) -> None:
    config = tiny_model.config
    wrong = SparsityPlan(experts=7, blocks=(block(keep=(1, 1, 1)), block(prefix=(8, 8, 7, 2)), block()))
    with pytest.raises(RecipeError) as caught:
        fresh_sparse(config, tiny_model.tokenizer, {"wrong": wrong}, "wrong")
    text = str(caught.value)
    assert "7 does not divide the 128 hidden neurons" in text
    assert "3 blocks given, the model has 2" in text
    assert "blocks[0].keep: 3 given, the model has 4 scales" in text
    assert "prefix 8 + routed 0 at scale 0" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_static_plan_keeps_no_copy_of_a_weight(tiny_sparse: Model, dtype: torch.dtype) -> None:
    static = {"prefix": (8, 6, 4, 2), "routed": (0,) * 4}
    blocks = tuple(each.model_copy(update=static) for each in tiny_sparse.plan.blocks)
    plan = tiny_sparse.plan.model_copy(update={"blocks": blocks})
    model = fresh_sparse(tiny_sparse.config, tiny_sparse.tokenizer, {"static": plan}, "static").eval()
    model.transformer.load_state_dict(tiny_sparse.transformer.state_dict(), strict=False)
    model.requires_grad_(False).transformer.to(dtype)
    drawn = model.generate_tokens([0, 1, 2], seed=1)
    ffn = ffn_of(model.transformer.blocks[0])
    assert ffn._derived._kept is None
    ffn.fc2.weight.mul_(-3)
    fresh = copy.deepcopy(model)
    changed = model.generate_tokens([0, 1, 2], seed=1)
    assert torch.equal(changed, fresh.generate_tokens([0, 1, 2], seed=1)) and not torch.equal(changed, drawn)
