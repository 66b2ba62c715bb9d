"""Trains the bundled model from the data's own files: classifier, VQVAE, then VAR, on Fashion-MNIST.

    python tools/train_fashion.py --data DIR --work DIR

``--data`` holds the four files of Fashion-MNIST (``train-images-idx3-ubyte.gz`` and so on). ``--work`` receives one
checkpoint and one log per stage; the same command goes on where it stopped. ``tools/bundle_fashion.py`` then measures
the result and writes the files that the package carries.

The bundled weights took, on 2 cores of a server CPU with AVX-512 and bf16 but no AMX (seconds per step with nothing
else running): classifier 0.1 h; VQVAE 0.5 h (0.33 s a step); transformer 4,000 steps of 64 (``--var-steps 4000
--grow-at 1400 --batch 64 --compile``, 4.4 passes over the data): 1,400 at half depth (1.1 s) and 2,600 at full depth
(2.1 s), 2.0 h. They were run in parts, with two shorter schedules before this one (docs/experiments.md). The defaults
are meant for a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from stages import fit_var, fit_vqvae
from torch import Tensor, nn
from training import Log, cosine, epoch_index, load_split, save, set_rate, to_float

from actvar_convert.models.classifier import FashionClassifier
from actvar_convert.models.var.config import TokenizerConfig, TransformerConfig
from actvar_convert.models.var.tokenizer import VQVAE

SIDES = (1, 2, 3, 4, 6, 8)
TOKENIZER = TokenizerConfig(ch=32, ch_mult=(1, 2, 2), res_blocks=1, vocab=512, z_channels=16, sides=SIDES)
TRANSFORMER = TransformerConfig(
    depth=8, width=256, heads=4, hidden=1024, sides=SIDES, vocab=512, z_channels=16, classes=10
)
HELD_OUT = 2000
"""Training images kept back for the validation loss; the test images are for the final figures alone."""


def train_classifier(data: Path, work: Path, device: torch.device, epochs: int) -> None:
    """Cross-entropy with label smoothing, random shifts by up to two pixels and horizontal flips."""
    path, log = work / "classifier.pt", Log(work / "classifier.jsonl")
    images, labels = load_split(data, "train")
    test_images, test_labels = load_split(data, "t10k")
    torch.manual_seed(0)
    model = FashionClassifier().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=5e-2)
    begin, per_epoch = 0, len(images) // 128
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begin = state["step"]
    generator = torch.Generator()
    for step in range(begin, epochs * per_epoch):
        index = epoch_index(step, len(images), 128, 1)
        generator.manual_seed(step)
        torch.manual_seed(step)
        x = images[index]
        dy, dx = torch.randint(-2, 3, (2,), generator=generator).tolist()
        x = torch.roll(x, (dy, dx), (2, 3))
        flip = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
        model.train()
        set_rate([optimizer], cosine(step, epochs * per_epoch))
        with torch.autocast(device.type, torch.bfloat16):
            features = model.features(to_float(x).to(device))
            logits = model.classify(features, dropout=0.2)
        loss = F.cross_entropy(logits.float(), labels[index].to(device), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % per_epoch == 0:
            model.eval()
            with torch.inference_mode():
                found = [model(to_float(x).to(device)).argmax(1).cpu() for x in torch.split(test_images, 500)]
            accuracy = float((torch.cat(found) == test_labels).double().mean())
            log(stage="classifier", step=step + 1, loss=float(loss.detach()), test_accuracy=accuracy)
            save(path, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)


def train_vqvae(data: Path, work: Path, device: torch.device, epochs: int) -> None:
    """The tokenizer from nothing, measured on held-out images after every epoch; see ``fit_vqvae``."""
    images, _ = load_split(data, "train")
    held, images = images[-HELD_OUT:], images[:-HELD_OUT]
    torch.manual_seed(0)
    vae = VQVAE(TOKENIZER)
    nn.init.normal_(vae.quantize.embedding.weight, std=0.2)
    batch = 64
    per_epoch = len(images) // batch
    fit_vqvae(
        vae,
        work / "vqvae.pt",
        Log(work / "vqvae.jsonl"),
        images=lambda step: images[epoch_index(step, len(images), batch, 2)],
        held_out=held,
        steps=epochs * per_epoch,
        every=per_epoch,
        device=device,
    )


def tokenise(data: Path, work: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens [60000, L] uint16 and labels of the training images, stored once under ``work``."""
    path = work / "tokens.pt"
    images, labels = load_split(data, "train")
    if not path.exists():
        vae = VQVAE(TOKENIZER).to(device).eval()
        vae.load_state_dict(torch.load(work / "vqvae.pt", weights_only=True, map_location=device)["model"])
        with torch.inference_mode():
            parts = (to_float(x).mul(2).sub(1).to(device) for x in torch.split(images, 500))
            rows = [torch.cat(vae.encode(x), 1).cpu() for x in parts]
        save(path, tokens=torch.cat(rows).to(torch.uint16))
    return torch.load(path, weights_only=True)["tokens"], labels


def train_var(
    data: Path, work: Path, device: torch.device, steps: int, batch: int, grow_at: int, compiled: bool
) -> None:
    """The transformer on the tokens of the training images; see ``fit_var``."""
    tokens, labels = tokenise(data, work, device)
    held = tokens[-HELD_OUT:], labels[-HELD_OUT:]
    tokens, labels = tokens[:-HELD_OUT], labels[:-HELD_OUT]
    vae = VQVAE(TOKENIZER).to(device).eval().requires_grad_(False)
    vae.load_state_dict(torch.load(work / "vqvae.pt", weights_only=True, map_location=device)["model"])

    def pyramids(step: int) -> tuple[Tensor, Tensor]:
        index = epoch_index(step, len(tokens), batch, 3)
        return tokens[index], labels[index]

    fit_var(
        TRANSFORMER,
        vae,
        work / "var.pt",
        Log(work / "var.jsonl"),
        pyramids=pyramids,
        held_out=held,
        steps=steps,
        grow_at=grow_at,
        compiled=compiled,
        device=device,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four files of Fashion-MNIST")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stage", choices=["classifier", "vqvae", "var"], action="append", help="only these stages")
    parser.add_argument("--classifier-epochs", type=int, default=8)
    parser.add_argument("--vqvae-epochs", type=int, default=5)
    parser.add_argument("--var-steps", type=int, default=6000)
    parser.add_argument("--grow-at", type=int, default=2500, help="step at which half the depth becomes all of it")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--compile", action="store_true", help="compile the blocks (needs a C++ compiler on a CPU)")
    args = parser.parse_args(arguments)
    args.work.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    stages = args.stage or ["classifier", "vqvae", "var"]
    if "classifier" in stages:
        train_classifier(args.data, args.work, device, args.classifier_epochs)
    if "vqvae" in stages:
        train_vqvae(args.data, args.work, device, args.vqvae_epochs)
    if "var" in stages:
        train_var(args.data, args.work, device, args.var_steps, args.batch, args.grow_at, args.compile)


if __name__ == "__main__":
    main()
