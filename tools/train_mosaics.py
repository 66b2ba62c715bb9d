"""Trains the second teacher: 2 x 2 mosaics of Fashion-MNIST, 64 x 64 pixels, a token map of 16 x 16, ten scales.

    python tools/train_mosaics.py --data DIR --work DIR [--device cuda] [--preset gpu]

``--data`` holds the four files of Fashion-MNIST. ``--work`` receives one checkpoint and one log per stage; the same
command goes on where it stopped. ``tools/bundle_mosaics.py`` then measures the result and writes the files that the
package carries. ``tools/mosaics.py`` says what a mosaic is. Every step of the VQVAE draws new ones; the transformer
goes round a pool.

The VQVAE starts from that of the bundled model ``fashion``: the quadrants are images that it knows, and only its
pyramid is new. The classifier that judges the quadrants is that of ``fashion`` as it is.

Presets, by the device unless named:

gpu   8 blocks of width 256, the shape of ``fashion``; 4,000 steps of 128 mosaics. Some 20 PFLOP by count: minutes on
      a data-centre GPU; not timed yet.
cpu   6 blocks of width 192; 2,440 steps of 32 mosaics, the first 1,800 of the first eight scales alone (a third of
      the tokens), the first 1,300 of half the blocks. For the background: about two hours on one core (AVX-512 with
      bf16, ``OMP_NUM_THREADS=1``, ``--compile``), 1.7 s a step of the VQVAE, 5 s a step of the whole transformer on
      all scales.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from mosaics import LABELS, Mosaics
from stages import fit_var, fit_vqvae
from torch import Tensor
from train_fashion import HELD_OUT
from train_fashion import TOKENIZER as SINGLE_TOKENIZER
from training import Log, load_split, to_float

from actvar_convert.files import bundled as zoo
from actvar_convert.models.var.config import TransformerConfig
from actvar_convert.models.var.tokenizer import VQVAE
from actvar_convert.system.atomic import write_whole

SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
"""The pyramid of the published models of 256 x 256 pixels."""

TOKENIZER = SINGLE_TOKENIZER.model_copy(update={"sides": SIDES})
HELD_OUT_MOSAICS = HELD_OUT // 4
"""Mosaics of held-out images for the validation losses."""

POOL = 600
"""Batches of mosaics that the transformer sees again and again: to encode one takes as long as a tenth of a step of
the whole transformer, or half a step at the beginning."""

COARSE_SCALES = 8
"""Scales that are trained first: up to 10 x 10, 255 of 680 tokens."""

VQVAE_SEED, VAR_SEED, HELD_OUT_SEED = 1_000_000_000, 2_000_000_000, 3_000_000_000
"""Where the seeds of each stage begin; a step adds its number."""


@dataclass(frozen=True)
class Preset:
    """Shape and length of a training."""

    transformer: TransformerConfig
    vqvae_steps: int
    vqvae_batch: int
    var_steps: int
    grow_at: int
    batch: int
    coarse_until: int = 0


def shape(depth: int, width: int) -> TransformerConfig:
    """A transformer with heads of 64 channels and FFNs of four times the width."""
    return TransformerConfig(
        depth=depth,
        width=width,
        heads=width // 64,
        hidden=4 * width,
        sides=SIDES,
        vocab=TOKENIZER.vocab,
        z_channels=TOKENIZER.z_channels,
        classes=LABELS,
    )


PRESETS = {
    "gpu": Preset(shape(8, 256), vqvae_steps=4000, vqvae_batch=64, var_steps=4000, grow_at=0, batch=128),
    "cpu": Preset(
        shape(6, 192), vqvae_steps=500, vqvae_batch=32, var_steps=2440, grow_at=1300, batch=32, coarse_until=1800
    ),
}


def preset_of(work: Path, given: str | None, default: str = "cpu") -> str:
    """Name of the preset that a work folder belongs to; a fresh folder takes the given one, else the default.

    Raises:
        ValueError: the folder belongs to another preset than the given one.
    """
    path = work / "preset.json"
    if not path.exists():
        chosen = given or default
        write_whole(path, json.dumps({"preset": chosen}) + "\n")
        return chosen
    stored = str(json.loads(path.read_text())["preset"])
    if given not in (None, stored):
        raise ValueError(f"{work} holds a training with --preset {stored}; leave {given} out, or choose another --work")
    return stored


def train_and_held_out(data: Path) -> tuple[Mosaics, Mosaics]:
    """Mosaics of the training images, and of those kept back."""
    images, labels = load_split(data, "train")
    return Mosaics(images[:-HELD_OUT], labels[:-HELD_OUT]), Mosaics(images[-HELD_OUT:], labels[-HELD_OUT:])


def take_over(vae: VQVAE, source: VQVAE) -> list[str]:
    """Copies every tensor of ``source`` that has its equal in name and shape; returns the names of the others."""
    own, given = vae.state_dict(), source.state_dict()
    fitting = {name: given[name] for name in own if name in given and given[name].shape == own[name].shape}
    vae.load_state_dict({**own, **fitting})
    return [name for name in own if name not in fitting]


@torch.no_grad()
def tokens_of(vae: VQVAE, images: Tensor, device: torch.device) -> Tensor:
    """Tokens [B, L] int64 of images [B, 1, H, W] uint8, on ``device``."""
    return torch.cat(vae.encode(to_float(images).mul(2).sub(1).to(device)), 1)


def held_out_tokens(mosaics: Mosaics, vae: VQVAE, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and classes of the held-out mosaics, on the CPU."""
    images, classes = mosaics.balanced(HELD_OUT_MOSAICS, HELD_OUT_SEED)
    return torch.cat([tokens_of(vae, part, device).cpu() for part in torch.split(images, 50)]), classes


def load_vae(work: Path, device: torch.device) -> VQVAE:
    """The trained tokenizer, frozen."""
    vae = VQVAE(TOKENIZER)
    vae.load_state_dict(torch.load(work / "vqvae.pt", weights_only=True, map_location="cpu")["model"])
    return vae.to(device).eval().requires_grad_(False)


def train_vqvae(data: Path, work: Path, device: torch.device, steps: int, batch: int, every: int) -> None:
    """The tokenizer, from that of the bundled model of single images; see ``fit_vqvae``."""
    train, held_out = train_and_held_out(data)
    torch.manual_seed(0)
    vae = VQVAE(TOKENIZER)
    fresh = take_over(vae, zoo.load_bundled("fashion").tokenizer)
    print(f"VQVAE: starts from that of fashion but for {', '.join(fresh) or 'nothing'}", flush=True)
    fit_vqvae(
        vae,
        work / "vqvae.pt",
        Log(work / "vqvae.jsonl"),
        images=lambda step: train.draw(batch, VQVAE_SEED + step)[0],
        held_out=held_out.balanced(HELD_OUT_MOSAICS, HELD_OUT_SEED)[0],
        steps=steps,
        every=every,
        device=device,
    )


def train_var(
    data: Path,
    work: Path,
    device: torch.device,
    config: TransformerConfig,
    *,
    steps: int,
    batch: int,
    grow_at: int,
    coarse_until: int,
    every: int,
    compiled: bool,
) -> None:
    """The transformer, on a pool of mosaics; see ``fit_var``."""
    train, held_out = train_and_held_out(data)
    vae = load_vae(work, device)

    @cache
    def stored(number: int) -> tuple[Tensor, Tensor]:
        images, classes = train.draw(batch, VAR_SEED + number)
        return tokens_of(vae, images, device).to(torch.int16), classes

    def pyramids(step: int) -> tuple[Tensor, Tensor]:
        return stored(step % POOL)

    fit_var(
        config,
        vae,
        work / "var.pt",
        Log(work / "var.jsonl"),
        pyramids=pyramids,
        held_out=held_out_tokens(held_out, vae, device),
        steps=steps,
        grow_at=grow_at,
        compiled=compiled,
        device=device,
        every=every,
        coarse_until=coarse_until,
        coarse_scales=COARSE_SCALES,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four files of Fashion-MNIST")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=list(PRESETS), help="shape and length; that of --work, else by the device")
    parser.add_argument("--stage", choices=["vqvae", "var"], action="append", help="only these stages")
    parser.add_argument("--vqvae-steps", type=int, help="instead of the preset's")
    parser.add_argument("--vqvae-batch", type=int, help="instead of the preset's")
    parser.add_argument("--var-steps", type=int, help="instead of the preset's")
    parser.add_argument("--batch", type=int, help="mosaics in a step of the transformer, instead of the preset's")
    parser.add_argument("--grow-at", type=int, help="step at which half the depth becomes all of it; 0: at once")
    parser.add_argument("--coarse-until", type=int, help="steps that train the first eight scales alone")
    parser.add_argument("--every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--compile", action="store_true", help="compile the blocks (needs a C++ compiler on a CPU)")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    try:
        name = preset_of(args.work, args.preset, "cpu" if device.type == "cpu" else "gpu")
    except ValueError as error:
        parser.error(str(error))
    preset = PRESETS[name]

    def chosen(option: str) -> int:
        given = getattr(args, option)
        return int(getattr(preset, option) if given is None else given)

    stages = args.stage or ["vqvae", "var"]
    if "vqvae" in stages:
        train_vqvae(args.data, args.work, device, chosen("vqvae_steps"), chosen("vqvae_batch"), args.every)
    if "var" in stages:
        train_var(
            args.data,
            args.work,
            device,
            preset.transformer,
            steps=chosen("var_steps"),
            batch=chosen("batch"),
            grow_at=chosen("grow_at"),
            coarse_until=chosen("coarse_until"),
            every=args.every,
            compiled=args.compile,
        )


if __name__ == "__main__":
    main()
