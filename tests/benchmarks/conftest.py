"""Makes the benchmarks importable as they import each other, from their own folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from actvar_convert.measure.extractors import ClassifierExtractor
from actvar_convert.models.classifier import FashionClassifier
from actvar_convert.recipe.schema import (
    BudgetRecipe,
    CalibrationRecipe,
    DataRecipe,
    DistillRecipe,
    EvaluateRecipe,
    ExpertsRecipe,
    GateRecipe,
    JointStage,
    Recipe,
    StageRecipe,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture
def tiny_recipe() -> Recipe:
    """A comparison of seconds on the tiny model."""
    short = {"batch": 8, "warmup": 1, "learning_rate": 3e-4}
    return Recipe(
        name="tiny",
        model="tiny",
        experts=ExpertsRecipe(count=8),
        calibration=CalibrationRecipe(pyramids=16, batch=8),
        budget=BudgetRecipe(reduction=0.2, gate_keep=0.75),
        gate=GateRecipe(rank=4),
        data=DataRecipe(pyramids=16, batch=16),
        distill=DistillRecipe(stage1=StageRecipe(steps=2, **short), stage2=JointStage(steps=3, **short)),
        evaluate=EvaluateRecipe(images=20, held_out=8, batch=20),
    )


@pytest.fixture(scope="session")
def tiny_extractor() -> ClassifierExtractor:
    """A classifier with random weights, and its features of random images."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        classifier = FashionClassifier(classes=5).eval()
        images = torch.rand(60, 3, 8, 8)
    with torch.inference_mode():
        features = classifier.features(images)
    return ClassifierExtractor(classifier, features, name="tiny", image_size=8)
