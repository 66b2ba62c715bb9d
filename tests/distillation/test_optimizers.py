"""Who moves which parameter, and how far: AdamW and Muon side by side."""

import torch
from torch import nn

from actvar_convert.distillation.optimizers import Optimizers, hidden_matrices
from actvar_convert.distillation.stages import trainable_parameters
from actvar_convert.models.model import Model
from actvar_convert.models.split import added, stored_name
from actvar_convert.recipe.schema import JointStage, StageRecipe

MATRICES = {"attn.mat_qkv.weight", "attn.proj.weight", "ffn.fc1.weight", "ffn.fc2.weight", "ada_lin.1.weight"}


def test_muon_gets_the_matrices_that_the_dense_model_has(tiny_sparse: Model) -> None:
    stages = (StageRecipe(), JointStage())
    parameters = {k: p for stage in stages for k, p in trainable_parameters(tiny_sparse.transformer, stage).items()}
    found = hidden_matrices(parameters, added(tiny_sparse.transformer))
    assert {stored_name(name).partition(".")[2].partition(".")[2] for name in found} == MATRICES
    assert any(".gate." in name and p.ndim == 2 for name, p in parameters.items())
    assert any(".router." in name and p.ndim == 2 for name, p in parameters.items())


def test_every_parameter_is_moved_by_its_own_optimizer_alone() -> None:
    torch.manual_seed(0)
    start = {"blocks.0.ffn.fc1.weight": torch.randn(24, 16), "blocks.0.ffn.fc1.bias": torch.randn(24)}
    gradient = {name: torch.randn_like(value) for name, value in start.items()}

    def moved(kind: str, rate: float, steps: int = 3) -> dict[str, torch.Tensor]:
        parameters = {name: nn.Parameter(value.clone()) for name, value in start.items()}
        optimizers = Optimizers(parameters, JointStage(optimizer=kind), ())  # type: ignore[arg-type]
        for _ in range(steps):
            optimizers.zero_grad()
            for name, parameter in parameters.items():
                parameter.grad = gradient[name].clone()
            optimizers.step(rate)
        return {name: parameter.detach() - start[name] for name, parameter in parameters.items()}

    both, adamw = moved("muon", 1e-2), moved("adamw", 1e-2)
    assert torch.equal(both["blocks.0.ffn.fc1.bias"], adamw["blocks.0.ffn.fc1.bias"])
    steps = both["blocks.0.ffn.fc1.weight"]
    # With one gradient all the time every step goes along its nearest orthogonal matrix, in steps as long as AdamW's.
    u, _, v = torch.linalg.svd(gradient["blocks.0.ffn.fc1.weight"], full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(steps.flatten(), -(u @ v).flatten(), dim=0)
    assert cosine > 0.97
    ratio = float(steps.square().mean().sqrt() / (3 * 1e-2))
    assert 0.1 < ratio < 0.4
    assert torch.allclose(moved("muon", 2e-2)["blocks.0.ffn.fc1.weight"], 2 * steps, rtol=1e-3, atol=1e-5)
