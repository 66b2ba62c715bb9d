"""The fine-tune for sparser activations: what it measures, what it changes, and that it goes on where it stopped."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from actvar_convert import verbs
from actvar_convert.conversion import conversion_memory as memory
from actvar_convert.distillation import loop
from actvar_convert.distillation.data import TokenStore
from actvar_convert.distillation.loop import StageRun
from actvar_convert.distillation.sparsify import (
    mean_used_share,
    one_expert,
    sparse_activations,
    sparsify_model,
    stage_recipe,
    used_share,
)
from actvar_convert.distillation.training_memory import estimate_sparsify
from actvar_convert.errors import InputError, Interrupted
from actvar_convert.files.layout import official_config
from actvar_convert.models.config import TokenizerConfig, TransformerConfig
from actvar_convert.models.model import VARModel
from actvar_convert.models.sparse import SparseVARModel
from actvar_convert.models.var import VARTransformer
from actvar_convert.models.vqvae import VQVAE
from actvar_convert.recipe.load import load_recipe
from actvar_convert.recipe.schema import (
    BudgetRecipe,
    CalibrationRecipe,
    DataRecipe,
    ExpertsRecipe,
    Recipe,
    SparsifyRecipe,
)
from actvar_convert.system.device import autocast_dtype
from actvar_convert.system.processes import ALONE
from actvar_convert.system.progress import SilentProgress


def recipe(**settings: Any) -> Recipe:
    return Recipe(
        name="tiny",
        model="tiny",
        calibration=CalibrationRecipe(pyramids=16, batch=8),
        experts=ExpertsRecipe(count=8),
        budget=BudgetRecipe(search="uniform", reduction=0.2),
        data=DataRecipe(pyramids=24, batch=12),
        sparsify=SparsifyRecipe(**({"steps": 20, "batch": 8, "warmup": 2, "learning_rate": 2e-3} | settings)),
    )


@pytest.fixture
def store(tiny_model: VARModel) -> TokenStore:
    labels = torch.arange(24) % 5
    return TokenStore(tiny_model.generate_tokens(labels, seed=1), labels)


def sparser(dense: VARModel, chosen: Recipe, store: TokenStore, state: Path | None = None) -> VARModel:
    return sparsify_model(
        dense, chosen, store, state_path=state, fingerprint="run", progress=SilentProgress(), processes=ALONE
    )


def test_the_share_of_neurons_that_a_token_uses() -> None:
    hidden = torch.tensor([[0.0, 0.0, -3.0, 0.0], [1.0, -1.0, 1.0, 1.0], [2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(used_share(hidden), torch.tensor([0.25, 1.0, 0.5, 0.0]))
    torch.testing.assert_close(used_share(7 * hidden), used_share(hidden))


def test_fewer_neurons_are_used_and_predictions_stay_near(tiny_model: VARModel, store: TokenStore) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    tokens, labels = store.tokens.long(), store.labels
    inputs = tiny_model.teacher_forcing_input(tokens)

    def figures(model: VARModel) -> tuple[float, float]:
        with torch.no_grad():
            wanted, own = (each.transformer(labels, inputs).log_softmax(-1) for each in (tiny_model, model))
        kl = F.kl_div(own, wanted, reduction="none", log_target=True).sum(-1).mean()
        return mean_used_share(model, tokens, labels), float(kl)

    dense, little, much = (
        figures(model)
        for model in (
            tiny_model,
            sparser(tiny_model, recipe(weight=0.1), store),
            sparser(tiny_model, recipe(weight=30.0), store),
        )
    )
    assert much[0] < little[0] and much[0] < 0.9 * dense[0]
    assert dense[1] == 0 < little[1] < much[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.state_dict().items())


def test_no_steps_give_the_model_itself(tiny_model: VARModel, store: TokenStore) -> None:
    assert sparser(tiny_model, recipe(steps=0), store) is tiny_model


def test_the_copy_as_one_expert_is_the_dense_model(tiny_model: VARModel, store: TokenStore) -> None:
    tokens, labels = store.tokens.long(), store.labels
    inputs = tiny_model.teacher_forcing_input(tokens)
    with torch.no_grad():
        copied = one_expert(tiny_model.transformer).eval()(labels, inputs)
        assert torch.equal(copied, tiny_model.transformer(labels, inputs))


def test_an_interrupted_training_ends_the_same(
    tiny_model: VARModel, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = recipe()
    whole = sparser(tiny_model, chosen, store).transformer.state_dict()

    asked: list[loop.StopRequest] = []
    original = StageRun.train_step

    class Stop(loop.StopRequest):
        def __init__(self) -> None:
            super().__init__()
            asked[:] = [self]

    def train_step(self: StageRun, *args: Any) -> dict[str, float]:
        values = original(self, *args)
        asked[0].asked = self.step == 7
        return values

    with monkeypatch.context() as patch:
        patch.setattr(loop, "StopRequest", Stop)
        patch.setattr(StageRun, "train_step", train_step)
        with pytest.raises(Interrupted, match="stopped in sparsify after step 7 of 20; all of it is kept"):
            sparser(tiny_model, chosen, store, tmp_path / "state")
        with pytest.raises(Interrupted, match="nothing of it is kept"):
            sparser(tiny_model, chosen, store)
    resumed = sparser(tiny_model, chosen, store, tmp_path / "state").transformer.state_dict()
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_conversion_starts_from_the_sparser_model(tiny_model: VARModel, tmp_path: Path) -> None:
    said: list[str] = []

    class Told(SilentProgress):
        def say(self, text: str) -> None:
            said.append(text)

    plain = verbs.convert(tiny_model, recipe=recipe(steps=0))
    sparse = verbs.convert(tiny_model, recipe=recipe(), work=tmp_path / "work", progress=Told())
    again = verbs.convert(tiny_model, recipe=recipe())
    attention = "blocks.0.attn.mat_qkv.weight"
    assert torch.equal(plain.transformer.state_dict()[attention], tiny_model.transformer.state_dict()[attention])
    assert not torch.equal(sparse.transformer.state_dict()[attention], tiny_model.transformer.state_dict()[attention])
    for name, tensor in again.transformer.state_dict().items():
        assert torch.equal(tensor, sparse.transformer.state_dict()[name]), name
    assert any(text.startswith("neurons that a token uses: ") for text in said)


def test_a_model_in_half_precision_stays_in_it(tiny_model: VARModel, store: TokenStore) -> None:
    half = VARModel(tiny_model.transformer.to(torch.bfloat16), tiny_model.tokenizer, tiny_model.sampling).eval()
    found = sparser(half, recipe(steps=2), store)
    assert found.dtype == torch.bfloat16 and not found.training


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_takes_what_was_estimated(memory_watch: Any, dtype: str) -> None:
    sides = (1, 2, 3, 4, 6, 8)
    config = TransformerConfig(depth=4, width=64, heads=4, hidden=256, sides=sides, vocab=256, z_channels=8, classes=10)
    tokenizer = TokenizerConfig(ch=32, ch_mult=(1,), res_blocks=1, vocab=256, z_channels=8, sides=sides)
    chosen = recipe(steps=9, batch=8).model_copy(update={"dtype": dtype})
    torch.manual_seed(0)
    dense = VARTransformer(config)
    dense.initialise(torch.Generator().manual_seed(0))
    teacher = VARModel(dense, VQVAE(tokenizer)).eval().requires_grad_(False)
    student = SparseVARModel(one_expert(dense), teacher.tokenizer).eval()
    run = StageRun(student, sparse_activations(1.0), stage_recipe(chosen.sparsify), 0)
    tokens, labels = torch.randint(0, 256, (8, config.pyramid.total)), torch.arange(8)

    def step() -> None:
        wanted = autocast_dtype(chosen.dtype)
        run.train_step(teacher, tokens, labels, torch.autocast("cpu", wanted) if wanted else nullcontext())

    step()
    with memory_watch:
        step()
    estimate = estimate_sparsify(config, tokenizer, chosen)
    assert estimate.phase == "sparsify"
    before = estimate.parts["program"] + estimate.parts["weights of teacher and student"]
    expected = estimate.total - before - 2 * estimate.parts["gradients"]
    assert 0.6 * expected < memory_watch.peak < expected


def test_too_little_memory_is_said_before_any_work(tiny_model: VARModel, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tokenizer = official_config("var-d16")
    assert estimate_sparsify(config, tokenizer, load_recipe("var_d16")).total == 0
    large = load_recipe("var_d16", ["sparsify.steps=100"])
    assert estimate_sparsify(config, tokenizer, large).lower == ("sparsify.batch",)
    monkeypatch.setattr(memory, "free_memory_bytes", lambda device: 460_000_000)
    with pytest.raises(InputError, match=r"sparsify.*Lower sparsify.batch"):
        verbs.convert(tiny_model, recipe=recipe(batch=4096))
