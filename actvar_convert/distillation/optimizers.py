"""What takes the steps of a stage: AdamW, or Muon for the weight matrices of the blocks and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from actvar_convert.recipe.schema import StageRecipe
from actvar_convert.system.processes import is_split

BETAS = (0.9, 0.95)


class Optimizers:
    """The optimisers of one stage, one after another over disjoint parameters, all at the same learning rate.

    Muon (Jordan et al., 2024) moves a matrix along its gradient's nearest orthogonal matrix. Its steps have the size of
    AdamW's (``match_rms_adamw``; Liu et al., arXiv 2502.16982), so a learning rate means the same to both.

    Args:
        parameters: those that the stage trains, by name.
        added: names of what the method has added to the dense model.
        recipe: which optimiser.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], recipe: StageRecipe, added: Collection[str]) -> None:
        matrices = hidden_matrices(parameters, added) if recipe.optimizer == "muon" else {}
        rest = [p for name, p in parameters.items() if name not in matrices]
        kinds = [[p for p in rest if is_split(p) is split] for split in (False, True)]
        groups = [{"params": kind} for kind in kinds if kind] or [{"params": []}]
        rate = recipe.learning_rate
        self.members: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=rate, betas=BETAS, weight_decay=0.0)]
        if matrices:
            self.members.append(
                torch.optim.Muon(matrices.values(), lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            )
        self._of = {p: self.members[name in matrices] for name, p in parameters.items()}

    def zero_grad(self) -> None:
        """Forgets all gradients."""
        for member in self.members:
            member.zero_grad()

    def step(self, learning_rate: float) -> None:
        """Moves all parameters that have a gradient."""
        for member in self.members:
            for group in member.param_groups:
                group["lr"] = learning_rate
            member.step()

    def state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What is remembered about a parameter, by its optimiser's own names; empty before its first step."""
        state: dict[str, Tensor] = self._of[parameter].state.get(parameter, {})
        return state

    def restore(self, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        """Takes up what ``state`` gave."""
        self._of[parameter].state[parameter] = dict(state)


def hidden_matrices(parameters: Mapping[str, nn.Parameter], added: Collection[str]) -> dict[str, nn.Parameter]:
    """The weight matrices of the blocks that the dense model has too: what Muon is made for.

    Not what the method ``added`` (routers, gates, reconstructions and low-rank updates are small and start at or near
    zero), nor embeddings and head.
    """
    return {
        name: parameter
        for name, parameter in parameters.items()
        if name.startswith("blocks.") and parameter.ndim == 2 and name not in added
    }
