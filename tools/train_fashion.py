"""Trains the bundled model from the data's own files: classifier, VQVAE, then VAR, on Fashion-MNIST.

    python tools/train_fashion.py --data DIR --work DIR

``--data`` holds the four files of Fashion-MNIST (``train-images-idx3-ubyte.gz`` and so on). ``--work`` receives one
checkpoint and one log per stage; the same command goes on where it stopped. ``tools/bundle_fashion.py`` then measures
the result and writes the files that the package carries.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actvar_convert.models.classifier import FashionClassifier
from actvar_convert.models.config import TokenizerConfig, TransformerConfig
from actvar_convert.models.var import VARTransformer
from actvar_convert.models.vqvae import VQVAE

SIDES = (1, 2, 3, 4, 6, 8)
TOKENIZER = TokenizerConfig(ch=32, ch_mult=(1, 2, 2), res_blocks=1, vocab=512, z_channels=16, sides=SIDES)
TRANSFORMER = TransformerConfig(
    depth=8, width=256, heads=4, hidden=1024, sides=SIDES, vocab=512, z_channels=16, classes=10
)
HELD_OUT = 2000
"""Training images kept back for the validation loss; the test images are for the final figures alone."""


def read_idx(path: Path) -> np.ndarray:
    """The array in one file of the MNIST family."""
    with gzip.open(path) as file:
        header = file.read(4)
        shape = [int.from_bytes(file.read(4), "big") for _ in range(header[3])]
        return np.frombuffer(file.read(), np.uint8).reshape(shape)


def load_split(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 32, 32] uint8 (28 x 28, padded with black) and labels [N] int64; split is train or t10k."""
    images = torch.from_numpy(read_idx(data / f"{split}-images-idx3-ubyte.gz").copy())
    labels = torch.from_numpy(read_idx(data / f"{split}-labels-idx1-ubyte.gz").copy()).long()
    return F.pad(images, (2, 2, 2, 2)).unsqueeze(1), labels


def to_float(images: Tensor) -> Tensor:
    """uint8 [B, 1, H, W] to [B, 3, H, W] in [0, 1]."""
    return images.float().div(255).expand(-1, 3, -1, -1)


class Log:
    """Prints a line and keeps it as JSON."""

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, time.time()

    def __call__(self, **values: float | int | str) -> None:
        line = {"seconds": round(time.time() - self.start, 1), **values}
        print(json.dumps(line), flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def batches(count: int, batch: int, seed: int, begin: int) -> Iterator[tuple[int, Tensor]]:
    """Endless (step, indices) from step ``begin`` on; every epoch is a permutation that depends on the seed alone."""
    per_epoch = count // batch
    step = begin
    while True:
        epoch = step // per_epoch
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1000 + epoch))
        for i in range(step % per_epoch, per_epoch):
            yield step, order[i * batch : (i + 1) * batch]
            step += 1


def save(path: Path, **state: object) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def cosine(step: int, steps: int, warmup: int = 100) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def plateau(step: int, steps: int, warmup: int = 200, decay: float = 0.4) -> float:
    """Learning-rate factor: linear warm-up, constant, then a linear fall to zero over the last ``decay`` of steps."""
    return min((step + 1) / warmup, 1.0, max(0.0, (steps - step) / (decay * steps)))


def set_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("base_lr", group["lr"]) * factor


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
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begin = state["step"]
    generator = torch.Generator()
    for step, index in batches(len(images), 128, 1, begin):
        if step >= epochs * per_epoch:
            break
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
        loss.backward()
        optimizer.step()
        if (step + 1) % per_epoch == 0:
            model.eval()
            with torch.inference_mode():
                right = sum(
                    int((model(to_float(x).to(device)).argmax(1).cpu() == y).sum())
                    for x, y in zip(test_images.split(500), test_labels.split(500), strict=True)
                )
            log(stage="classifier", step=step + 1, loss=float(loss.detach()), test_accuracy=right / len(test_images))
            save(path, model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)


def quantise_with_loss(vae: VQVAE, f: Tensor, hits: Tensor) -> tuple[Tensor, Tensor]:
    """Straight-through features and the codebook loss of the reference; counts the codes used in ``hits`` [V]."""
    quantizer, num_scales = vae.quantize, vae.config.pyramid.num_scales
    rest, f_hat, loss = f.detach().clone(), torch.zeros_like(f), f.new_zeros(())
    for scale in range(num_scales):
        z = quantizer.downsample(rest, scale).permute(0, 2, 3, 1).reshape(-1, f.shape[1])
        index = quantizer.nearest(z.detach())
        hits += torch.bincount(index, minlength=len(hits))
        h = quantizer.contribution(scale, index.view(len(f), -1))
        f_hat = f_hat + h
        rest = rest - h.detach()
        loss = loss + F.mse_loss(f_hat.detach(), f) * 0.25 + F.mse_loss(f_hat, f.detach())
    return (f_hat - f).detach() + f, loss / num_scales


def train_vqvae(data: Path, work: Path, device: torch.device, epochs: int) -> None:
    """Squared plus absolute reconstruction error and the codebook loss; unused codes restart at encoder outputs."""
    path, log = work / "vqvae.pt", Log(work / "vqvae.jsonl")
    images, _ = load_split(data, "train")
    held, images = images[-HELD_OUT:], images[:-HELD_OUT]
    torch.manual_seed(0)
    vae = VQVAE(TOKENIZER).to(device)
    nn.init.normal_(vae.quantize.embedding.weight, std=0.2)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    batch = 64
    per_epoch, begin = len(images) // batch, 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begin = state["step"]
    steps = epochs * per_epoch
    hits = torch.zeros(TOKENIZER.vocab, device=device)
    for step, index in batches(len(images), batch, 2, begin):
        if step >= steps:
            break
        set_rate([optimizer], cosine(step, steps))
        x = to_float(images[index]).to(device).mul(2).sub(1)
        with torch.autocast(device.type, torch.bfloat16):
            f = vae.features(x).float()
        f_q, codebook_loss = quantise_with_loss(vae, f, hits)
        with torch.autocast(device.type, torch.bfloat16):
            reconstruction = vae.decoder(vae.post_quant_conv(f_q)).float()
        error = F.mse_loss(reconstruction, x)
        loss = error + 0.2 * F.l1_loss(reconstruction, x) + codebook_loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        every = 50 if step < 500 else 200
        if (step + 1) % every == 0:
            used = float((hits > 0).float().mean())
            if step < 0.6 * steps:
                rows = f.detach().permute(0, 2, 3, 1).reshape(-1, f.shape[1])
                scale = torch.rand(len(hits), 1, device=device)
                dead = hits < 0.03 * hits.mean()
                pick = torch.randint(len(rows), (len(hits),), device=device)
                vae.quantize.embedding.weight.data[dead] = (rows[pick] * scale)[dead]
            hits.zero_()
            values = {"mse": float(error.detach()), "codebook": float(codebook_loss.detach())}
            log(stage="vqvae", step=step + 1, used=used, **values)
        if (step + 1) % per_epoch == 0:
            with torch.inference_mode():
                errors = [
                    float(F.mse_loss(vae.decode(vae.encode(y)), y))
                    for y in to_float(held).mul(2).sub(1).to(device).split(250)
                ]
            log(stage="vqvae", step=step + 1, held_out_mse=sum(errors) / len(errors))
            save(path, model=vae.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)


def tokenise(data: Path, work: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens [60000, L] uint16 and labels of the training images, stored once under ``work``."""
    path = work / "tokens.pt"
    images, labels = load_split(data, "train")
    if not path.exists():
        vae = VQVAE(TOKENIZER).to(device).eval()
        vae.load_state_dict(torch.load(work / "vqvae.pt", weights_only=True)["model"])
        with torch.inference_mode():
            rows = [torch.cat(vae.encode(to_float(x).mul(2).sub(1).to(device)), 1).cpu() for x in images.split(500)]
        save(path, tokens=torch.cat(rows).to(torch.uint16))
    return torch.load(path, weights_only=True)["tokens"], labels


def grow(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a transformer twice as deep that does nearly the same: every block twice, its gates halved.

    Training half the depth first and growing it is cheaper than full depth from the start (progressive stacking).
    """
    grown = {}
    for name, tensor in state.items():
        if not name.startswith("blocks."):
            grown[name] = tensor
            continue
        _, index, rest = name.split(".", 2)
        if rest.startswith("ada_lin."):
            tensor = tensor.clone()
            tensor[: 2 * TRANSFORMER.width] *= 0.5
        for copy in (0, 1):
            grown[f"blocks.{2 * int(index) + copy}.{rest}"] = tensor.clone()
    return grown


def make_optimizers(model: VARTransformer) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def var_loss(
    model: Callable[[Tensor, Tensor], Tensor], vae: VQVAE, tokens_BL: Tensor, labels: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy [L] of every position, in nats, teacher forcing."""
    pieces = list(tokens_BL.split(list(vae.config.pyramid.lengths), 1))
    with torch.no_grad():
        inputs = vae.quantize.teacher_forcing_input(pieces)
    logits = model(labels, inputs)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens_BL.flatten(), reduction="none", label_smoothing=smoothing)
    return loss.view(tokens_BL.shape).mean(0)


class VarRun:
    """The transformer in training: model, averaged weights, optimisers, at half depth before step ``grow_at``."""

    def __init__(self, device: torch.device, path: Path, grow_at: int, compiled: bool) -> None:
        self.device, self.path, self.grow_at, self.compiled = device, path, grow_at, compiled
        state = torch.load(path, weights_only=True, map_location=device) if path.exists() else None
        self.step = state["step"] if state else 0
        self.build(deep=self.step >= grow_at and (self.step > 0 or grow_at == 0))
        if state is not None and self.deep != state["deep"]:
            state["model"], state["average"] = grow(state["model"]), grow(state["average"])
            state["optimizers"] = None
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.average = state["average"]
            for optimizer, saved in zip(self.optimizers, state["optimizers"] or (), strict=False):
                optimizer.load_state_dict(saved)

    def build(self, deep: bool) -> None:
        """A fresh model of full or half depth."""
        self.deep = deep
        depth = TRANSFORMER.depth if deep else TRANSFORMER.depth // 2
        self.model = VARTransformer(TRANSFORMER.model_copy(update={"depth": depth}))
        self.model.initialise(torch.Generator().manual_seed(0))
        self.model.to(self.device)
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.optimizers = make_optimizers(self.model)
        if self.compiled:
            for block in self.model.blocks:
                block.compile()

    def grow(self) -> None:
        """Doubles the depth; the optimisers start anew."""
        state, average = self.model.state_dict(), self.average
        self.build(deep=True)
        self.model.load_state_dict(grow(state))
        self.average = grow(average)

    def follow(self) -> None:
        """Moves the averaged weights a little towards the current ones."""
        weight = min(0.998, (self.step + 1) / (self.step + 10))
        for name, parameter in self.model.named_parameters():
            self.average[name].lerp_(parameter.detach(), 1 - weight)

    def save(self) -> None:
        save(
            self.path,
            model=self.model.state_dict(),
            average=self.average,
            optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
            step=self.step,
            deep=self.deep,
        )


@torch.inference_mode()
def held_out_loss(run: VarRun, vae: VQVAE, tokens: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean loss in nats per token of the current and of the averaged weights."""
    losses = []
    current = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for weights in (current, run.average):
        run.model.load_state_dict(weights, strict=False)
        with torch.autocast(run.device.type, torch.bfloat16):
            parts = [
                var_loss(run.model, vae, x.long().to(run.device), y.to(run.device)).mean()
                for x, y in zip(tokens.split(250), labels.split(250), strict=True)
            ]
        losses.append(float(torch.stack(parts).mean()))
    run.model.load_state_dict(current, strict=False)
    return losses[0], losses[1]


def train_var(
    data: Path, work: Path, device: torch.device, steps: int, batch: int, grow_at: int, compiled: bool
) -> None:
    """Cross-entropy over all scales; one label in ten is the null class; an average of the weights is kept."""
    log = Log(work / "var.jsonl")
    tokens, labels = tokenise(data, work, device)
    held = tokens[-HELD_OUT:], labels[-HELD_OUT:]
    tokens, labels = tokens[:-HELD_OUT], labels[:-HELD_OUT]
    vae = VQVAE(TOKENIZER).to(device).eval().requires_grad_(False)
    vae.load_state_dict(torch.load(work / "vqvae.pt", weights_only=True)["model"])
    run = VarRun(device, work / "var.pt", grow_at, compiled)
    generator, null = torch.Generator(), TRANSFORMER.classes
    for step, index in batches(len(tokens), batch, 3, run.step):
        if step >= steps:
            break
        if step >= grow_at and not run.deep:
            run.grow()
        generator.manual_seed(step)
        set_rate(run.optimizers, plateau(step, steps))
        x, y = tokens[index].long().to(device), labels[index]
        y = torch.where(torch.rand(len(y), generator=generator) < 0.1, null, y).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = var_loss(run.model, vae, x, y).mean()
        for optimizer in run.optimizers:
            optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        for optimizer in run.optimizers:
            optimizer.step()
        run.follow()
        run.step = step + 1
        if run.step % 20 == 0:
            log(stage="var", step=run.step, loss=float(loss.detach()), gradient=float(norm))
        if run.step % 200 == 0 or run.step == steps:
            now, averaged = held_out_loss(run, vae, *held)
            log(stage="var", step=run.step, held_out_loss=now, averaged_held_out_loss=averaged)
            run.save()


def main() -> None:
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
    args = parser.parse_args()
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
