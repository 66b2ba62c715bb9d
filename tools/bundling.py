"""What the bundling tools share: their options, tables of the card, and the files that the package carries."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from measuring import Figures, Measured

from actvar_convert.files import bundled as zoo
from actvar_convert.models.base import Sampling
from actvar_convert.models.classifier import FashionClassifier
from actvar_convert.models.fingerprint import state_fingerprint
from actvar_convert.models.model import Model
from actvar_convert.system.atomic import write_whole

CLASS_NAMES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
LARGEST_FILE, LARGEST_BUNDLE = 16_000_000, 28_000_000
ASSETS = Path(__file__).parents[1] / "actvar_convert" / "assets"


def require_stages(parser: argparse.ArgumentParser, work: Path, stages: Sequence[str], tool: str) -> None:
    """Ends the program where a stage has left no checkpoint."""
    missing = [f"{name}.pt" for name in stages if not (work / f"{name}.pt").is_file()]
    if missing:
        parser.error(f"{work} lacks {', '.join(missing)}: run {tool} to its end first")


def hours(figures: Figures, stage: str) -> str:
    """Time of a stage for the card."""
    return f"{float(str(figures[f'{stage}_seconds'])) / 3600:.2f} h"


def guidance_table(of: Measured) -> list[str]:
    """Lines of the card: every strength that was tried, and the chosen one on all images."""
    return [
        "| guidance | images | FID | label agreement | precision | recall |",
        "|---|---|---|---|---|---|",
        *(
            f"| {e.cfg:g} | {e.images:,} | {e.fid:.3f} | {e.label_agreement:.3f} | {e.precision:.3f} | {e.recall:.3f} |"
            for e in [*of.grid, of.chosen]
        ),
    ]


def write(
    folder: Path,
    model: Model,
    classifier: FashionClassifier,
    of: Measured,
    text: str,
    **config: object,
) -> None:
    """Writes the bundle, and reads it back: what was measured is what is stored.

    Args:
        folder: receives the files.
        model, classifier: on the CPU.
        of: their figures.
        text: the card.
        config: further entries of config.json.
    """
    content = {
        "sampling": Sampling(cfg=of.chosen.cfg)._asdict(),
        "classes": list(CLASS_NAMES),
        **config,
        "figures": of.figures,
    }
    zoo.write_bundle(folder, model.transformer, model.tokenizer, classifier, of.reference, content)
    write_whole(folder / "README.md", text)
    stored = zoo.load_bundled(folder)
    pairs = [
        (stored.transformer, model.transformer),
        (stored.tokenizer, model.tokenizer),
        (zoo.load_bundled_classifier(folder), classifier),
    ]
    for found, given in pairs:
        if state_fingerprint(found) != state_fingerprint(given):
            raise SystemExit(f"{folder}: the stored {type(found).__name__} is not the one that was measured")
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    for name, size in sorted(sizes.items()):
        print(f"{size / 1e6:8.2f} MB  {name}")
    print(f"{sum(sizes.values()) / 1e6:8.2f} MB  in {folder}")
    if max(sizes.values()) > LARGEST_FILE or sum(sizes.values()) > LARGEST_BUNDLE:
        raise SystemExit(f"{folder}: a file passes {LARGEST_FILE:,} bytes, or all of them {LARGEST_BUNDLE:,}")


def add_options(parser: argparse.ArgumentParser, name: str, tool: str, real_images: int) -> None:
    """The options of every bundling tool.

    Args:
        name: of the model, and of its folder in the package.
        tool: what trains it.
        real_images: default of that option.
    """
    parser.add_argument("--data", type=Path, required=True, help="folder with the four files of Fashion-MNIST")
    parser.add_argument("--work", type=Path, required=True, help=f"work folder of {tool}")
    parser.add_argument("--machine", required=True, help="what the training ran on, for the card")
    parser.add_argument("--out", type=Path, default=ASSETS / name, help="folder to write; the package's own by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--guidance", type=float, nargs="+", default=[0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--grid-images", type=int, default=2500, help="images per guidance strength")
    parser.add_argument("--images", type=int, default=10000, help="images of the chosen strength")
    parser.add_argument(
        "--real-images", type=int, default=real_images, help="test images, and training images of the floor"
    )
