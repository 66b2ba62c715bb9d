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
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from train_fashion import HELD_OUT, TOKENIZER, TRANSFORMER, grow, load_split, to_float, tokenise, var_loss

from actvar_convert.checkpoint import zoo
from actvar_convert.files import write_whole
from actvar_convert.models.classifier import FashionClassifier
from actvar_convert.models.model import Sampling, VARModel
from actvar_convert.models.var import VARTransformer
from actvar_convert.models.vqvae import VQVAE
from actvar_convert.progress import Progress, TerminalProgress
from actvar_convert.report.features import ClassifierExtractor, state_fingerprint
from actvar_convert.report.fid import frechet_inception_distance, precision_recall
from actvar_convert.report.generation import balanced_labels, generated_features
from actvar_convert.runtime import limit_threads

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
LABEL_AGREEMENT = 0.9
"""Least share of images classified as their label that a guidance strength should reach."""

CHUNK = 64
LARGEST_FILE, LARGEST_BUNDLE = 16_000_000, 28_000_000
ASSETS = Path(__file__).parents[1] / "actvar_convert" / "assets" / "fashion"


@dataclass(frozen=True)
class Generated:
    """What one guidance strength gives."""

    cfg: float
    images: int
    fid: float
    label_agreement: float
    precision: float
    recall: float


def choose_guidance(grid: list[Generated]) -> Generated:
    """The lowest FID among the strengths that reach LABEL_AGREEMENT, among all where none does."""
    reached = [each for each in grid if each.label_agreement >= LABEL_AGREEMENT]
    return min(reached or grid, key=lambda each: each.fid)


def half(module: nn.Module) -> nn.Module:
    """The module with every floating-point value rounded to half precision, computing in fp32."""
    state = {name: v.half().float() if v.is_floating_point() else v for name, v in module.state_dict().items()}
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


def load_classifier(work: Path) -> FashionClassifier:
    classifier = FashionClassifier()
    classifier.load_state_dict(torch.load(work / "classifier.pt", weights_only=True, map_location="cpu")["model"])
    half(classifier)
    return classifier


def load_model(data: Path, work: Path, device: torch.device) -> tuple[VARModel, dict[str, float | str | int]]:
    """The trained model with the better of its two sets of weights, and what was learnt while choosing."""
    vae = VQVAE(TOKENIZER)
    vae.load_state_dict(torch.load(work / "vqvae.pt", weights_only=True, map_location="cpu")["model"])
    half(vae).to(device)
    state = torch.load(work / "var.pt", weights_only=True, map_location="cpu")
    if not state.get("deep", True):
        print("var.pt is at half depth still: grown to full depth as training would, fit for trials only")
        state["model"], state["average"] = grow(state["model"]), grow(state["average"])
    tokens, labels = tokenise(data, work, device)
    held_out = list(zip(torch.split(tokens[-HELD_OUT:], 250), torch.split(labels[-HELD_OUT:], 250), strict=True))
    losses: dict[str, float] = {}
    transformers: dict[str, VARTransformer] = {}
    for name in ("average", "model"):
        transformer = VARTransformer(TRANSFORMER)
        transformer.load_state_dict({**state["model"], **state[name]})
        half(transformer).to(device)
        with torch.inference_mode():
            rows = [var_loss(transformer, vae, x.long().to(device), y.to(device)) * len(x) for x, y in held_out]
        losses[name] = float(torch.stack(rows).sum(0).mean()) / HELD_OUT
        transformers[name] = transformer
    best = min(losses, key=lambda name: losses[name])
    print(f"held-out loss: average {losses['average']:.4f}, last {losses['model']:.4f}; {best} it is")
    facts: dict[str, float | str | int] = {
        "weights": "running average" if best == "average" else "last step",
        "held_out_loss": losses[best],
        "steps": state["step"],
    }
    return VARModel(transformers[best], vae), facts


def images_of(data: Path, split: str, limit: int) -> tuple[Tensor, Tensor]:
    """The last ``limit`` images of a split, with labels."""
    images, labels = load_split(data, split)
    return images[-limit:], labels[-limit:]


def measured(extractor: ClassifierExtractor, images: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """Features and logits of batches of images."""
    pairs = [extractor(image) for image in images]
    return torch.cat([pair[0].cpu() for pair in pairs]), torch.cat([pair[1].cpu() for pair in pairs])


def batches(images: Tensor, device: torch.device) -> Iterator[Tensor]:
    return (to_float(part).to(device) for part in torch.split(images, 250))


@torch.inference_mode()
def reconstructions(vae: VQVAE, images: Tensor, device: torch.device) -> Iterator[Tensor]:
    for image in batches(images, device):
        yield vae.decode(vae.encode(image.mul(2).sub(1))).add(1).mul(0.5)


def generate(
    model: VARModel, extractor: ClassifierExtractor, cfg: float, images: int, cache: Path, progress: Progress
) -> Generated:
    """Generates balanced images with one guidance strength and measures them."""
    with progress.task(f"{images} images, guidance {cfg:g}", images) as task:
        made = generated_features(
            model,
            extractor,
            images=images,
            seed=0,
            chunk=CHUNK,
            sampling=Sampling(cfg=cfg),
            task=task,
            cache=cache,
        )
    reference = extractor.reference()
    assert reference.features_NF is not None
    right = made.logits_NK.argmax(1) == balanced_labels(images, TRANSFORMER.classes)
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


def card(figures: dict[str, object], chosen: Generated, grid: list[Generated], machine: str) -> str:
    """The README of the bundle; every figure comes from this run."""
    f = figures
    hours = {name: f"{float(str(f[f'{name}_seconds'])) / 3600:.2f} h" for name in ("classifier", "vqvae", "var")}
    rows = [
        f"| {e.cfg:g} | {e.images:,} | {e.fid:.3f} | {e.label_agreement:.3f} | {e.precision:.3f} | {e.recall:.3f} |"
        for e in [*grid, chosen]
    ]
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
        f"| classifier | {hours['classifier']} | {f['classifier_test_accuracy']:.4f} of the test images right |",
        f"| VQVAE | {hours['vqvae']} | squared error {f['vqvae_test_mse']:.5f} on test images in [-1, 1] |",
        f"| VAR, {f['steps']} steps | {hours['var']} | {f['held_out_loss']:.4f} nats per token on held-out images "
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
        "| guidance | images | FID | label agreement | precision | recall |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        "## Data",
        "",
        "Fashion-MNIST: Xiao, Rasul, Vollgraf, arXiv 1708.07747, MIT licence, copyright Zalando SE.",
        "",
    ]
    return "\n".join(lines)


def write(
    folder: Path,
    model: VARModel,
    classifier: FashionClassifier,
    reference: Tensor,
    figures: dict[str, object],
    text: str,
    cfg: float,
) -> None:
    """Writes the bundle, and reads it back: what was measured is what is stored."""
    config = {"sampling": Sampling(cfg=cfg)._asdict(), "classes": list(CLASS_NAMES), "figures": figures}
    zoo.write_bundle(folder, model.transformer, model.tokenizer, classifier, reference, config)
    write_whole(folder / "README.md", text)
    stored = zoo.load_bundle(folder)
    pairs = [
        (stored.transformer, model.transformer),
        (stored.tokenizer, model.tokenizer),
        (zoo.load_bundle_classifier(folder), classifier),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four files of Fashion-MNIST")
    parser.add_argument("--work", type=Path, required=True, help="work folder of tools/train_fashion.py")
    parser.add_argument("--machine", required=True, help="what the training ran on, for the card")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write; the package's own by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--guidance", type=float, nargs="+", default=[0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--grid-images", type=int, default=2500, help="images per guidance strength")
    parser.add_argument("--images", type=int, default=10000, help="images of the chosen strength")
    parser.add_argument("--real-images", type=int, default=10000, help="test images, and training images of the floor")
    args = parser.parse_args()
    missing = [name for name in ("classifier.pt", "vqvae.pt", "var.pt") if not (args.work / name).is_file()]
    if missing:
        parser.error(f"{args.work} lacks {', '.join(missing)}: run tools/train_fashion.py to its end first")
    limit_threads()
    progress, device = TerminalProgress(), torch.device(args.device)

    classifier = load_classifier(args.work).to(device)
    test_images, test_labels = images_of(args.data, "t10k", args.real_images)
    blank = ClassifierExtractor(classifier, torch.zeros(2, classifier.feature_dim), name="classifier")
    features, logits = measured(blank, batches(test_images, device))
    reference = features.half()
    extractor = ClassifierExtractor(classifier, reference.float(), name="classifier")
    accuracy = float((logits.argmax(1) == test_labels).double().mean())
    print(f"classifier: {accuracy:.4f} of the test images right")

    model, facts = load_model(args.data, args.work, device)
    vae = model.tokenizer
    again, _ = measured(extractor, reconstructions(vae, test_images, device))
    error = sum(
        float((made - image).mul(2).square().mean()) * len(image)
        for made, image in zip(reconstructions(vae, test_images, device), batches(test_images, device), strict=True)
    )
    floor, _ = measured(extractor, batches(images_of(args.data, "train", args.real_images)[0], device))
    figures: dict[str, object] = {
        **facts,
        "machine": args.machine,
        "test_images": len(test_images),
        "floor_images": len(floor),
        "classifier_test_accuracy": accuracy,
        "vqvae_test_mse": error / len(test_images),
        "fid_tokenizer": frechet_inception_distance(again, extractor.reference()),
        "fid_floor": frechet_inception_distance(floor, extractor.reference()),
        "tokenizer_fingerprint": state_fingerprint(vae),
        "transformer_parameters": sum(p.numel() for p in model.transformer.parameters()),
        "tokenizer_parameters": sum(p.numel() for p in vae.parameters()),
        "classifier_parameters": sum(p.numel() for p in classifier.parameters()),
        **{f"{name}_seconds": training_seconds(args.work / f"{name}.jsonl") for name in ("classifier", "vqvae", "var")},
    }
    print(f"FID: floor {figures['fid_floor']:.4f}, reconstructions {figures['fid_tokenizer']:.4f}")

    cache = args.work / "features"
    grid = []
    for cfg in args.guidance:
        grid.append(generate(model, extractor, cfg, args.grid_images, cache, progress))
        print(json.dumps(asdict(grid[-1])), flush=True)
    chosen = generate(model, extractor, choose_guidance(grid).cfg, args.images, cache, progress)
    print(json.dumps(asdict(chosen)), flush=True)
    figures["generated"] = asdict(chosen)
    figures["guidance"] = [asdict(each) for each in grid]
    text = card(figures, chosen, grid, args.machine)
    write(args.out, model.cpu(), classifier.cpu(), reference, figures, text, chosen.cfg)


if __name__ == "__main__":
    main()
