"""What a conversion and a distillation compute, as values that must not move: plans, images, weights.

``python tests/frozen/values.py OUT`` measures them anew, on fp32, seed 0 and one thread.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

import actvar_convert as av

CASES: dict[str, dict[str, Any]] = {
    "static": {"reduction": 0.22, "prefix_share": 1.0},
    "routed": {"reduction": 0.22, "prefix_share": 0.5},
    "folded": {"reduction": 0.6, "prefix_share": 1.0, "guidance": "folded"},
}
PYRAMIDS = {"fashion": 24, "mosaics": 8}
IMAGES = list(range(10))


def recipe(model: str, case: str, folder: Path, *, steps: int = 5) -> Path:
    """A recipe file of one case."""
    count = PYRAMIDS[model]
    stage = {"steps": steps, "batch": 4, "warmup": 2}
    content = {
        "name": f"frozen_{model}_{case}",
        "model": model,
        "device": "cpu",
        "calibration": {"pyramids": count, "batch": 8},
        "experts": {"count": 8},
        "gate": {"rank": 8},
        "budget": {"pyramids": count, "gate_keep": 0.3, "gate_scales": 2, **CASES[case]},
        "data": {"pyramids": 24, "null_share": 0.2, "batch": 12},
        "distill": {"stage1": stage, "stage2": {**stage, "optimizer": "muon", "learning_rate": 0.001}},
    }
    path = folder / f"{model}-{case}-{steps}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def converted(model: str, case: str, folder: Path) -> Any:
    """The sparse model of one case, before any training."""
    return av.convert(av.load(model, device="cpu"), recipe=recipe(model, case, folder))


def plan_of(sparse: Any) -> list[dict[str, Any]]:
    """Experts and keep ratios of every block."""
    names = ("prefix", "routed", "keep")
    return [{name: list(getattr(block, name)) for name in names} for block in sparse.plan.blocks]


def images_of(sparse: Any) -> Tensor:
    """Images of all classes at seed 0, [10, 3, H, W]."""
    made: Tensor = sparse.generate(IMAGES, seed=0)
    return made


def dense_name(name: str) -> str:
    """The name of a tensor as the dense model has it, with or without a wrapper around its block."""
    return name.replace(".block.", ".")


def weights_of(sparse: Any) -> dict[str, list[float]]:
    """Sum, sum of magnitudes and three values of every trained tensor, by name."""
    found = {}
    for name, tensor in sorted(sparse.transformer.state_dict().items()):
        if tensor.is_floating_point() and "attn_bias" not in name and tensor.numel():
            flat = tensor.double().flatten()
            found[dense_name(name)] = [float(flat.sum()), float(flat.abs().sum()), *flat[:3].tolist()]
    return found


def distilled(folder: Path, progress: Any = None) -> Any:
    """``fashion``, routed, after 5 + 5 steps."""
    folder.mkdir(parents=True, exist_ok=True)
    given = recipe("fashion", "routed", folder)
    dense = av.load("fashion", device="cpu")
    sparse = av.convert(dense, recipe=given)
    return av.distill(sparse, teacher=dense, recipe=given, out=folder / "distilled", progress=progress)


def main(out: Path) -> None:
    torch.set_num_threads(1)
    plans: dict[str, Any] = {}
    images: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in PYRAMIDS:
            for case in CASES:
                sparse = converted(model, case, folder)
                plans[f"{model}.{case}"] = plan_of(sparse)
                images[f"{model}.{case}"] = images_of(sparse)[:, 0].contiguous()
                print(model, case, flush=True)
        weights = weights_of(distilled(folder))
    (out / "frozen.json").write_text(json.dumps({"plans": plans, "weights": weights}, indent=None) + "\n")
    save_file(images, out / "frozen.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
