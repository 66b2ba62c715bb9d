"""Measures the model that ``tools/train_mosaics.py`` made and writes the files that the package carries.

    python tools/bundle_mosaics.py --data DIR --work DIR --machine "one H100"

As ``tools/bundle_fashion.py``, and with the classifier of the bundled model ``fashion``, which looks at every quadrant:
the features of a mosaic are those of its four quadrants, and it counts as its class where that is likelier than all
else together. Guidance: the lowest FID among the strengths whose mosaics count as their class as often as four
quadrants that are right nine times in ten each.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from bundling import CLASS_NAMES, add_options, guidance_table, hours, require_stages, write
from measuring import Measured, batches, half, load_model, measure
from mosaics import QUADRANTS, Mosaics
from torch import Tensor
from train_fashion import HELD_OUT
from train_mosaics import (
    PRESETS,
    SIDES,
    TOKENIZER,
    held_out_tokens,
    load_vae,
    preset_of,
    train_and_held_out,
)
from training import load_split

from actvar_convert.files import bundled as zoo
from actvar_convert.measure.extractors import QuadrantExtractor
from actvar_convert.models.classifier import FashionClassifier
from actvar_convert.models.var.config import TransformerConfig
from actvar_convert.models.var.tokenizer import VQVAE
from actvar_convert.system.device import limit_threads
from actvar_convert.system.progress import TerminalProgress

LABEL_AGREEMENT = round(0.9**4, 3)
"""Least share of mosaics that count as their class that a guidance strength should reach."""

STAGES = ("vqvae", "var")
TEST_SEED, FLOOR_SEED = 1, 2
SCALE_IMAGES = 200
"""Test mosaics on which the error after each scale is measured."""


def real_mosaics(data: Path, split: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Balanced mosaics of a split, with classes."""
    return Mosaics(*load_split(data, split)).balanced(count, seed)


@torch.inference_mode()
def error_after_scales(vae: VQVAE, images: Tensor, device: torch.device) -> list[float]:
    """Squared error in [-1, 1] of what the tokens up to each scale decode to: what every scale still adds."""
    total = torch.zeros(len(vae.config.sides), dtype=torch.float64)
    for image in batches(images, device):
        x = image.mul(2).sub(1)
        tokens = vae.encode(x)
        for scale in range(len(total)):
            total[scale] += float(F.mse_loss(vae.decode(tokens[: scale + 1]), x)) * len(x)
    return [float(value) for value in total / len(images)]


def card(of: Measured, config: TransformerConfig, errors: Sequence[float], machine: str) -> str:
    """The README of the bundle; every figure comes from this run."""
    f, chosen = of.figures, of.chosen
    rows = [f"| {', '.join(CLASS_NAMES[label] for label in labels)} |" for labels in QUADRANTS]
    lines = [
        "# mosaics: a dense VAR trained on 2 x 2 mosaics of Fashion-MNIST",
        "",
        "A class-conditional next-scale image generator, 64 x 64 pixels, three equal channels: four pictures of four",
        "kinds of clothing in every image, on the ten-scale pyramid of the published models. It is there to measure",
        "token sparsity on a map of 16 x 16 tokens.",
        "",
        f"- Transformer: {config.depth} blocks of width {config.width}, {config.heads} heads, FFN hidden "
        f"{config.hidden}; pyramid {', '.join(map(str, SIDES))}; {f['transformer_parameters']:,} parameters.",
        f"- Tokenizer: VQVAE with {TOKENIZER.vocab} codes of {TOKENIZER.z_channels} channels, 4 x down; "
        f"{f['tokenizer_parameters']:,} parameters.",
        f"- Classifier: that of `fashion`, {f['classifier_parameters']:,} parameters, applied to every quadrant. Its "
        f"{4 * FashionClassifier.feature_dim} features, {FashionClassifier.feature_dim} of each quadrant, are what "
        "FID, precision and recall are measured in.",
        f"- `reference_features.safetensors`: its features of {f['test_images']:,} mosaics of test images, so that "
        "evaluation needs no data set.",
        "",
        "Weights are stored in half precision under the key names of the VAR reference implementation.",
        "",
        "## Classes",
        "",
        "A class says what stands in each quadrant and is named after the top left picture; the pictures are drawn",
        "independently. Top left, top right, bottom left, bottom right:",
        "",
        "| class |",
        "|---|",
        *rows,
        "",
        "## Training",
        "",
        f"`tools/train_mosaics.py --preset {f['preset']}` on random mosaics of the 60,000 training images, of which",
        f"{HELD_OUT:,} were held out. On {machine}.",
        "",
        "| stage | time | result |",
        "|---|---|---|",
        f"| VQVAE, from that of `fashion` | {hours(f, 'vqvae')} | squared error {f['vqvae_test_mse']:.5f} on mosaics "
        "of test images in [-1, 1] |",
        f"| VAR, {f['steps']} steps | {hours(f, 'var')} | {f['held_out_loss']:.4f} nats per token on mosaics of "
        f"held-out images ({f['weights']} of the weights) |",
        "",
        f"What each scale adds: squared error of mosaics of test images (at most {SCALE_IMAGES}) decoded from the",
        "tokens up to the scale of that side.",
        "",
        f"| {' | '.join(map(str, SIDES))} |",
        f"|{'---|' * len(SIDES)}",
        f"| {' | '.join(f'{error:.4f}' for error in errors)} |",
        "",
        "## Quality",
        "",
        "FID in the classifier's features against the mosaics of test images; it compares neither to figures in",
        "Inception features nor to those of `fashion`.",
        "",
        "| images | FID |",
        "|---|---|",
        f"| {f['floor_images']:,} mosaics of training images: the floor | {f['fid_floor']:.3f} |",
        f"| the mosaics of test images through the VQVAE | {f['fid_tokenizer']:.3f} |",
        f"| {chosen.images:,} generated, guidance {chosen.cfg:g} | {chosen.fid:.3f} |",
        "",
        "The classifier has seen the training images and is surer of them, which the floor includes.",
        "",
        "Label agreement: the share of mosaics whose class is likelier than all else together, by the product of the",
        f"four quadrants' probabilities; {f['classifier_test_accuracy']:.3f} of the mosaics of test images.",
        "",
        "No top-k, no top-p; balanced classes, seed 0, chunk 64; precision and recall with three neighbours on at most",
        f"5,000 vectors of each side. Chosen: the lowest FID among strengths with a label agreement of "
        f"{LABEL_AGREEMENT:g} (0.9 in each quadrant) or more"
        + (", which none reached: the lowest of all." if chosen.label_agreement < LABEL_AGREEMENT else "."),
        "",
        *guidance_table(of),
        "",
        "## Data",
        "",
        "Fashion-MNIST: Xiao, Rasul, Vollgraf, arXiv 1708.07747, MIT licence, copyright Zalando SE.",
        "",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "mosaics", "tools/train_mosaics.py", real_images=5000)
    args = parser.parse_args(arguments)
    require_stages(parser, args.work, STAGES, "tools/train_mosaics.py")
    limit_threads()
    device, preset = torch.device(args.device), preset_of(args.work, None)
    config = PRESETS[preset].transformer

    classifier = zoo.load_bundled_classifier("fashion").to(device)
    vae = load_vae(args.work, device)
    half(vae)
    _, held_out = train_and_held_out(args.data)
    model, facts = load_model(config, vae, args.work, held_out_tokens(held_out, vae, device), device)
    test = real_mosaics(args.data, "t10k", args.real_images, TEST_SEED)
    errors = error_after_scales(vae, test[0][:SCALE_IMAGES], device)
    of = measure(
        model,
        {**facts, "preset": preset, "vqvae_test_mse_after_scales": errors},
        lambda reference: QuadrantExtractor(classifier, reference, quadrants=QUADRANTS, name="classifier"),
        test=test,
        floor=real_mosaics(args.data, "train", args.real_images, FLOOR_SEED)[0],
        work=args.work,
        stages=STAGES,
        least=LABEL_AGREEMENT,
        args=args,
        progress=TerminalProgress(),
    )
    write(args.out, model.cpu(), classifier.cpu(), of, card(of, config, errors, args.machine), quadrants=QUADRANTS)


if __name__ == "__main__":
    main()
