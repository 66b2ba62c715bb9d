"""Measures a trained model: rounding to half precision, the better weights, every figure, the best guidance.

Everything is measured on the weights rounded to half precision, as they are stored. Features of generated images are
kept under the work folder: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from stages import HELD_OUT_PART, grow, var_loss
from torch import Tensor, nn
from training import to_float

from actvar_convert.measure.extractors import ClassifierExtractor
from actvar_convert.measure.fid import frechet_inception_distance, precision_recall
from actvar_convert.measure.image_features import ImageSet, generated_features
from actvar_convert.models.base import Sampling
from actvar_convert.models.fingerprint import state_fingerprint
from actvar_convert.models.model import Model
from actvar_convert.models.sampling import balanced_labels
from actvar_convert.models.var.config import TransformerConfig
from actvar_convert.models.var.network import VARTransformer
from actvar_convert.models.var.tokenizer import VQVAE
from actvar_convert.system.progress import Progress

CHUNK = 64
PART = 250
"""Real images that are measured at once."""

Figures = dict[str, object]


@dataclass(frozen=True)
class Generated:
    """What one guidance strength gives."""

    cfg: float
    images: int
    fid: float
    label_agreement: float
    precision: float
    recall: float


@dataclass(frozen=True)
class Measured:
    """A model's figures for its card and config.json, and the features of the real images in half precision."""

    figures: Figures
    chosen: Generated
    grid: list[Generated]
    reference: Tensor


def choose_guidance(grid: list[Generated], least: float) -> Generated:
    """The lowest FID among the strengths that reach ``least`` label agreement, among all where none does."""
    reached = [each for each in grid if each.label_agreement >= least]
    return min(reached or grid, key=lambda each: each.fid)


def half(module: nn.Module) -> nn.Module:
    """The module with every floating-point value rounded to half precision, computing in fp32."""
    state = {name: v.half().float() if v.is_floating_point() else v for name, v in module.state_dict().items()}
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


def load_model(
    config: TransformerConfig, vae: VQVAE, work: Path, held_out: tuple[Tensor, Tensor], device: torch.device
) -> tuple[Model, Figures]:
    """The trained model with the better of its two sets of weights, and what was learnt while choosing.

    Args:
        config: shape of the transformer.
        vae: the tokenizer as it will be stored, on ``device``.
        work: folder with var.pt.
        held_out: tokens [N, L] and labels [N].
        device: where to compute.
    """
    state = torch.load(work / "var.pt", weights_only=True, map_location="cpu")
    if not state.get("deep", True):
        print("var.pt is at half depth still: grown to full depth as training would, fit for trials only")
        state["model"], state["average"] = grow(state["model"]), grow(state["average"])
    tokens, labels = held_out
    parts = list(zip(torch.split(tokens, HELD_OUT_PART), torch.split(labels, HELD_OUT_PART), strict=True))
    losses: dict[str, float] = {}
    transformers: dict[str, VARTransformer] = {}
    for name in ("average", "model"):
        transformer = VARTransformer(config)
        transformer.load_state_dict({**state["model"], **state[name]})
        half(transformer).to(device)
        with torch.inference_mode():
            rows = [var_loss(transformer, vae, x.long().to(device), y.to(device)) * len(x) for x, y in parts]
        losses[name] = float(torch.stack(rows).sum(0).mean()) / len(tokens)
        transformers[name] = transformer
    best = min(losses, key=lambda name: losses[name])
    print(f"held-out loss: average {losses['average']:.4f}, last {losses['model']:.4f}; {best} it is")
    facts: Figures = {
        "weights": "running average" if best == "average" else "last step",
        "held_out_loss": losses[best],
        "steps": state["step"],
    }
    return Model(transformers[best], vae), facts


def measured(extractor: ClassifierExtractor, images: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """Features and logits of batches of images."""
    pairs = [extractor(image) for image in images]
    return torch.cat([pair[0].cpu() for pair in pairs]), torch.cat([pair[1].cpu() for pair in pairs])


def batches(images: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Images [N, 1, H, W] uint8 as batches [B, 3, H, W] in [0, 1]."""
    return (to_float(part).to(device) for part in torch.split(images, PART))


@torch.inference_mode()
def reconstructions(vae: VQVAE, images: Tensor, device: torch.device) -> Iterator[Tensor]:
    """What the tokenizer makes of images [N, 1, H, W] uint8, as batches [B, 3, H, W] in [0, 1]."""
    for image in batches(images, device):
        yield vae.decode(vae.encode(image.mul(2).sub(1))).add(1).mul(0.5)


def generate(
    model: Model, extractor: ClassifierExtractor, cfg: float, images: int, cache: Path, progress: Progress
) -> Generated:
    """Generates balanced images with one guidance strength and measures them."""
    with progress.task(f"{images} images, guidance {cfg:g}", images) as task:
        wanted = ImageSet(images, seed=0, chunk=CHUNK, sampling=Sampling(cfg=cfg))
        made = generated_features(model, extractor, wanted, task, cache=cache)
    reference = extractor.reference()
    assert reference.features_NF is not None
    right = made.logits_NK.argmax(1) == balanced_labels(images, model.config.classes)
    near = precision_recall(made.features_NF, reference.features_NF)
    return Generated(
        cfg=cfg,
        images=images,
        fid=frechet_inception_distance(made.features_NF, reference),
        label_agreement=float(right.double().mean()),
        precision=near.precision,
        recall=near.recall,
    )


def training_seconds(log: Path) -> float:
    """Seconds of one stage over all its starts: the clock of a log begins anew at every start."""
    seconds, total = 0.0, 0.0
    for line in log.read_text().splitlines():
        now = float(json.loads(line)["seconds"])
        total, seconds = (total + seconds, now) if now < seconds else (total, now)
    return total + seconds


def measure(
    model: Model,
    facts: Figures,
    make_extractor: Callable[[Tensor], ClassifierExtractor],
    *,
    test: tuple[Tensor, Tensor],
    floor: Tensor,
    work: Path,
    stages: Sequence[str],
    least: float,
    args: argparse.Namespace,
    progress: Progress,
) -> Measured:
    """Every figure of a model: classifier, tokenizer, floor, and a grid of guidance strengths whose best is repeated.

    Args:
        model: rounded to half precision.
        facts: figures that are known already.
        make_extractor: what judges images, given the features of real ones.
        test: real images [N, 1, H, W] uint8 that are the reference, and their classes [N].
        floor: other real images [M, 1, H, W] uint8, whose distance is the least that can be expected.
        work: folder of the training; features of generated images are kept in it.
        stages: those with a log in ``work``.
        least: label agreement that the chosen guidance should reach.
        args: of ``add_options``.
        progress: told about the images.
    """
    vae, device = model.tokenizer, model.device
    images, classes = test
    features, logits = measured(make_extractor(torch.zeros(2, 2)), batches(images, device))
    reference = features.half()
    extractor = make_extractor(reference.float())
    accuracy = float((logits.argmax(1) == classes).double().mean())
    print(f"classifier: {accuracy:.4f} of the test images right")

    again, _ = measured(extractor, reconstructions(vae, images, device))
    error = sum(
        float((made - image).mul(2).square().mean()) * len(image)
        for made, image in zip(reconstructions(vae, images, device), batches(images, device), strict=True)
    )
    floor_features, _ = measured(extractor, batches(floor, device))
    figures: Figures = {
        **facts,
        "machine": args.machine,
        "test_images": len(images),
        "floor_images": len(floor),
        "classifier_test_accuracy": accuracy,
        "vqvae_test_mse": error / len(images),
        "fid_tokenizer": frechet_inception_distance(again, extractor.reference()),
        "fid_floor": frechet_inception_distance(floor_features, extractor.reference()),
        "tokenizer_fingerprint": state_fingerprint(vae),
        "transformer_parameters": sum(p.numel() for p in model.transformer.parameters()),
        "tokenizer_parameters": sum(p.numel() for p in vae.parameters()),
        "classifier_parameters": sum(p.numel() for p in extractor.classifier.parameters()),
        **{f"{name}_seconds": training_seconds(work / f"{name}.jsonl") for name in stages},
    }
    print(f"FID: floor {figures['fid_floor']:.4f}, reconstructions {figures['fid_tokenizer']:.4f}")

    cache, grid = work / "features", []
    for cfg in args.guidance:
        grid.append(generate(model, extractor, cfg, args.grid_images, cache, progress))
        print(json.dumps(asdict(grid[-1])), flush=True)
    chosen = generate(model, extractor, choose_guidance(grid, least).cfg, args.images, cache, progress)
    print(json.dumps(asdict(chosen)), flush=True)
    figures["generated"] = asdict(chosen)
    figures["guidance"] = [asdict(each) for each in grid]
    return Measured(figures, chosen, grid, reference)
