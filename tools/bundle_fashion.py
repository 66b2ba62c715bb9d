"""Measures the model that ``tools/train_fashion.py`` made and writes the files that the package carries.

    python tools/bundle_fashion.py --data DIR --work DIR --machine "2 cores of a server CPU"

Everything is measured on the weights rounded to half precision, as they are stored. Features of generated images are
kept under ``--work``: the same command goes on where it stopped.

Which weights: the running average of training or the last ones, whichever has the lower held-out loss. Which guidance:
every strength of ``--guidance`` generates ``--grid-images`` images; among those whose images are classified as their
label at least nine times in ten, the lowest FID wins (among all, where none reaches that). The winner is measured again
on ``--images`` images. FID is measured in the features of the classifier against the test images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from bundling import add_options, guidance_table, hours, require_stages, write
from measuring import Measured, half, load_model, measure
from torch import Tensor
from train_fashion import HELD_OUT, TOKENIZER, TRANSFORMER, tokenise
from training import load_split

from actvar_convert.measure.extractors import ClassifierExtractor
from actvar_convert.models.classifier import FashionClassifier
from actvar_convert.models.var.tokenizer import VQVAE
from actvar_convert.system.device import limit_threads
from actvar_convert.system.progress import TerminalProgress

LABEL_AGREEMENT = 0.9
"""Least share of images classified as their label that a guidance strength should reach."""

STAGES = ("classifier", "vqvae", "var")


def load_classifier(work: Path) -> FashionClassifier:
    classifier = FashionClassifier()
    classifier.load_state_dict(torch.load(work / "classifier.pt", weights_only=True, map_location="cpu")["model"])
    half(classifier)
    return classifier


def load_vae(work: Path) -> VQVAE:
    vae = VQVAE(TOKENIZER)
    vae.load_state_dict(torch.load(work / "vqvae.pt", weights_only=True, map_location="cpu")["model"])
    half(vae)
    return vae


def images_of(data: Path, split: str, limit: int) -> tuple[Tensor, Tensor]:
    """The last ``limit`` images of a split, with labels."""
    images, labels = load_split(data, split)
    return images[-limit:], labels[-limit:]


def card(of: Measured, machine: str) -> str:
    """The README of the bundle; every figure comes from this run."""
    f, chosen = of.figures, of.chosen
    lines = [
        "# fashion: a dense VAR trained on Fashion-MNIST",
        "",
        "A class-conditional next-scale image generator of ten kinds of clothing, 32 x 32 pixels (28 x 28 padded with",
        "black), three equal channels. It is small enough to convert, distil and measure on a laptop.",
        "",
        f"- Transformer: {TRANSFORMER.depth} blocks of width {TRANSFORMER.width}, {TRANSFORMER.heads} heads, FFN "
        f"hidden {TRANSFORMER.hidden}; pyramid {', '.join(map(str, TRANSFORMER.sides))}; "
        f"{f['transformer_parameters']:,} parameters.",
        f"- Tokenizer: VQVAE with {TOKENIZER.vocab} codes of {TOKENIZER.z_channels} channels, 4 x down; "
        f"{f['tokenizer_parameters']:,} parameters.",
        f"- Classifier: six convolutions; {f['classifier_parameters']:,} parameters. Its "
        f"{FashionClassifier.feature_dim} features are what FID, precision and recall are measured in.",
        "- `reference_features.safetensors`: its features of the test images, so that evaluation needs no data set.",
        "",
        "Weights are stored in half precision under the key names of the VAR reference implementation.",
        "",
        "## Training",
        "",
        f"`tools/train_fashion.py` on the 60,000 training images, of which {HELD_OUT:,} were held out; on {machine}.",
        "",
        "| stage | time | result |",
        "|---|---|---|",
        f"| classifier | {hours(f, 'classifier')} | {f['classifier_test_accuracy']:.4f} of the test images right |",
        f"| VQVAE | {hours(f, 'vqvae')} | squared error {f['vqvae_test_mse']:.5f} on test images in [-1, 1] |",
        f"| VAR, {f['steps']} steps | {hours(f, 'var')} | {f['held_out_loss']:.4f} nats per token on held-out images "
        f"({f['weights']} of the weights) |",
        "",
        "## Quality",
        "",
        f"FID in the classifier's features against the {f['test_images']:,} test images; it does not compare to",
        "figures in Inception features.",
        "",
        "| images | FID |",
        "|---|---|",
        f"| {f['floor_images']:,} training images: the floor | {f['fid_floor']:.3f} |",
        f"| the test images through the VQVAE | {f['fid_tokenizer']:.3f} |",
        f"| {chosen.images:,} generated, guidance {chosen.cfg:g} | {chosen.fid:.3f} |",
        "",
        "The classifier has seen the training images and is surer of them, which the floor includes.",
        "",
        "No top-k, no top-p; balanced labels, seed 0, chunk 64; precision and recall with three neighbours on at most",
        f"5,000 vectors of each side. Chosen: the lowest FID among strengths with at least {LABEL_AGREEMENT:g} of the",
        "images classified as their label.",
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
    add_options(parser, "fashion", "tools/train_fashion.py", real_images=10000)
    args = parser.parse_args(arguments)
    require_stages(parser, args.work, STAGES, "tools/train_fashion.py")
    limit_threads()
    device = torch.device(args.device)

    classifier, vae = load_classifier(args.work).to(device), load_vae(args.work).to(device)
    tokens, labels = tokenise(args.data, args.work, device)
    model, facts = load_model(TRANSFORMER, vae, args.work, (tokens[-HELD_OUT:], labels[-HELD_OUT:]), device)
    of = measure(
        model,
        facts,
        lambda reference: ClassifierExtractor(classifier, reference, name="classifier"),
        test=images_of(args.data, "t10k", args.real_images),
        floor=images_of(args.data, "train", args.real_images)[0],
        work=args.work,
        stages=STAGES,
        least=LABEL_AGREEMENT,
        args=args,
        progress=TerminalProgress(),
    )
    write(args.out, model.cpu(), classifier.cpu(), of, card(of, args.machine))


if __name__ == "__main__":
    main()
