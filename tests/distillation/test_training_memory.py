"""The estimate of a distillation against what a step takes."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from actvar_convert.conversion.budget import recipe_plans
from actvar_convert.distillation.loop import StageRun
from actvar_convert.distillation.stages import STAGES
from actvar_convert.distillation.training_memory import estimate_distill
from actvar_convert.files.layout import official_config
from actvar_convert.models.model import Model, fresh_sparse, images_at_once
from actvar_convert.models.split import take_dense
from actvar_convert.models.var.config import TokenizerConfig, TransformerConfig
from actvar_convert.models.var.labels import Labels
from actvar_convert.models.var.network import VARTransformer
from actvar_convert.models.var.tokenizer import VQVAE
from actvar_convert.recipe import shipped_recipes
from actvar_convert.recipe.load import load_recipe
from actvar_convert.recipe.schema import Recipe
from actvar_convert.system.device import autocast_dtype

SIDES = (1, 2, 3, 4, 6, 8)
CONFIG = TransformerConfig(depth=4, width=64, heads=4, hidden=256, sides=SIDES, vocab=256, z_channels=8, classes=10)
TOKENIZER = TokenizerConfig(ch=32, ch_mult=(1,), res_blocks=1, vocab=256, z_channels=8, sides=SIDES)


def recipe(stage: str, dtype: str, trainable: str, optimizer: str = "adamw") -> Recipe:
    stages: dict[str, dict[str, object]] = {name: {"steps": 0, "batch": 8} for name in STAGES}
    stages[stage] = {"steps": 9, "batch": 8, "optimizer": optimizer}
    if stage == "stage2":
        stages[stage]["trainable"] = trainable
    return Recipe.model_validate(
        {
            "name": "x",
            "model": "x",
            "dtype": dtype,
            "experts": {"count": 8},
            "budget": {"reduction": 0.2, "gate_keep": 0.8},
            "data": {"batch": 1},
            "distill": stages,
        }
    )


@pytest.mark.parametrize(
    ("stage", "dtype", "trainable", "optimizer"),
    [
        ("stage1", "fp32", "experts", "adamw"),
        ("stage1", "bf16", "experts", "adamw"),
        ("stage2", "fp32", "all", "adamw"),
        ("stage2", "bf16", "all", "adamw"),
        ("stage2", "bf16", "all", "muon"),
        ("stage2", "bf16", "lora", "adamw"),
    ],
)
def test_a_step_takes_what_was_estimated(
    memory_watch: Any, stage: str, dtype: str, trainable: str, optimizer: str
) -> None:
    chosen = recipe(stage, dtype, trainable, optimizer)
    torch.manual_seed(0)
    dense = VARTransformer(CONFIG)
    dense.initialise(torch.Generator().manual_seed(0))
    teacher = Model(dense, VQVAE(TOKENIZER)).eval().requires_grad_(False)
    student = fresh_sparse(CONFIG, teacher.tokenizer, *recipe_plans(CONFIG, chosen)).eval()
    take_dense(student.transformer, dense.state_dict())
    run = StageRun(student, STAGES[stage], getattr(chosen.distill, stage), 0)
    tokens, labels = torch.randint(0, 256, (8, CONFIG.schedule.total)), Labels.of(torch.arange(8), CONFIG.classes)

    def step() -> None:
        wanted = autocast_dtype(dtype)
        run.train_step(teacher, tokens, labels, torch.autocast("cpu", wanted) if wanted else nullcontext())

    step()
    with memory_watch:
        step()
    estimate = estimate_distill(CONFIG, TOKENIZER, chosen)
    assert estimate.phase == stage
    # Weights, and what the optimiser remembers, were there before the step that is watched.
    before = estimate.parts["program"] + estimate.parts["weights of teacher and student"]
    held = [value for each in run.parameters.values() for value in run.optimizers.state(each).values()]
    expected = estimate.total - before - sum(value.nbytes for value in held)
    assert 0.6 * expected < memory_watch.peak < expected


@pytest.mark.parametrize("depth", [16, 20, 24, 30, 36])
def test_the_shipped_recipes_fit_gpus_of_80_gb(depth: int) -> None:
    config, tokenizer = official_config(f"var-d{depth}")
    chosen, gpus = load_recipe(f"var_d{depth}"), 8 if depth == 36 else 1
    estimate = estimate_distill(config, tokenizer, chosen, processes=gpus)
    assert estimate.phase in ("stage1", "stage2") and 0.5 * 80e9 < estimate.total < 0.85 * 80e9
    whole = load_recipe(f"var_d{depth}", ["distill.stage2.trainable=all"])
    assert estimate_distill(config, tokenizer, whole, processes=gpus).total >= estimate.total
    text = shipped_recipes()[f"var_d{depth}"].read_text()
    assert f"{'eight GPUs' if gpus == 8 else 'one GPU'} of 80 GB" in chosen.description
    assert (f"{estimate.total / 1e9:.1f} GB on each of eight" in text) == (gpus == 8)


@pytest.mark.parametrize("depth", [16, 20, 24, 30, 36])
def test_every_process_that_a_published_recipe_is_meant_for_gets_a_pyramid(depth: int) -> None:
    """As many processes as the recipe or the README starts with it, at least one."""
    chosen = load_recipe(f"var_d{depth}")
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    lines = [
        *(line for line in readme.splitlines() if f"d{depth}" in line),
        *shipped_recipes()[f"var_d{depth}"].read_text().splitlines(),
    ]
    started = [int(number) for line in lines for number in re.findall(r"--nproc-per-node (\d+)", line)]
    assert bool(started) == (depth >= 30), "d30 and d36 are those that one GPU is slow for"
    for stage in (chosen.distill.stage1, chosen.distill.stage2):
        assert stage.batch >= max(started, default=1)


def test_d36_on_one_gpu_as_its_recipe_says() -> None:
    text = shipped_recipes()["var_d36"].read_text()
    settings = re.findall(r"--set (distill\.\S+)", text)
    assert len(settings) == 4
    estimate = estimate_distill(*official_config("var-d36"), load_recipe("var_d36", settings))
    assert f"{estimate.total / 1e9:.1f} GB on one" in text and estimate.total < 0.85 * 80e9


@pytest.mark.parametrize(("dtype", "itemsize"), [("fp32", 4), ("bf16", 2)])
def test_large_batches_of_samples_cost_what_is_under_way_at_once(dtype: str, itemsize: int) -> None:
    config, tokenizer = official_config("var-d36")
    settings = ["data.batch=64", f"dtype={dtype}", "distill.stage1.steps=0"]
    settings += [f"distill.stage2.{setting}" for setting in ("steps=1", "batch=1", "trainable=none")]
    estimate = estimate_distill(config, tokenizer, load_recipe("var_d36", settings), device="cuda")
    assert estimate.phase == "sampling from the teacher" and estimate.lower == ("data.batch",)
    under_way = images_at_once(config, tokenizer, itemsize, "cuda")
    assert under_way < 64
    assert estimate.parts["keys and values"] == 2 * 36 * 2 * under_way * 2240 * 2304 * itemsize
    copied = estimate.parts["weights in half precision"]
    assert copied == (0 if itemsize == 4 else (estimate.parts["weights of teacher and student"] // 4))


def test_no_pyramids_are_sampled_if_nothing_is_trained() -> None:
    settings = ["distill.stage1.steps=0", "distill.stage2.steps=0"]
    estimate = estimate_distill(CONFIG, TOKENIZER, load_recipe(recipe("stage1", "fp32", "experts"), settings))
    assert estimate.parts.keys() == {"program", "weights of teacher and student"} and estimate.lower == ()


def test_muon_remembers_less_than_adamw() -> None:
    config, tokenizer = official_config("var-d30")
    settings = ["distill.stage2.trainable=all", "distill.stage2.optimizer="]
    adamw, muon = (
        estimate_distill(config, tokenizer, load_recipe("var_d30", [settings[0], settings[1] + name]))
        for name in ("adamw", "muon")
    )
    saved = adamw.parts["optimiser"] - muon.parts["optimiser"]
    assert adamw.phase == muon.phase == "stage2" and saved == adamw.total - muon.total
    matrices = 12 * config.width * config.width * config.depth  # queries, keys, values, output, FFN; AdaLN beside them
    assert saved > 8 * matrices - 12 * 6 * config.width * config.width
    assert saved < 8 * adamw.parts["gradients"] // 4
