"""The models that the package carries, in ``actvar_convert/assets/NAME/``.

config.json                     sampling defaults, names of the classes, shapes, figures; quadrants: labels of the four
                                quadrants of every class, if the model makes 2 x 2 mosaics
var*.safetensors, vae*.safetensors      transformer and tokenizer in half precision, sharded with an index
classifier.safetensors          the classifier whose features measure generations
reference_features.safetensors  its features of the test images
README.md                       the card
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actvar_convert.errors import CheckpointError, InputError
from actvar_convert.files.dense import build_dense, read_dense
from actvar_convert.files.skeleton import compare
from actvar_convert.files.tensors import read_json, read_tensors, weight_file, write_weights
from actvar_convert.models.base import Sampling
from actvar_convert.models.classifier import FashionClassifier
from actvar_convert.models.model import Model
from actvar_convert.models.var.config import TokenizerConfig, TransformerConfig
from actvar_convert.models.var.network import VARTransformer
from actvar_convert.models.var.tokenizer import VQVAE
from actvar_convert.recipe.shape import Shape
from actvar_convert.system.atomic import replacing_files

BUNDLE_SHARD_BYTES = 15_900_000
"""Values per file, so that with its header no file passes 16 MB."""

_OMITTED = ("attn_bias_for_masking", "zero_k_bias")


def assets_folder() -> Path:
    """Where the folders of the bundled models lie."""
    return Path(str(files("actvar_convert"))) / "assets"


def bundled_names() -> list[str]:
    """Names of the models that come with the package."""
    assets = assets_folder()
    return (
        sorted(entry.name for entry in assets.iterdir() if (entry / "config.json").is_file()) if assets.is_dir() else []
    )


def bundled_folder(bundle: str | Path) -> Path:
    """Where the files of a bundled model lie.

    Args:
        bundle: its name, or a folder that ``write_bundle`` made; here and in all that reads one.

    Raises:
        InputError: no bundled model has this name.
    """
    if isinstance(bundle, Path):
        return bundle
    if bundle not in bundled_names():
        raise InputError(f"no bundled model is called {bundle!r}; there are: {', '.join(bundled_names()) or 'none'}.")
    return assets_folder() / bundle


def bundled_config(bundle: str | Path) -> dict[str, Any]:
    """The config.json of a bundled model: sampling, classes (names), transformer, tokenizer, figures."""
    return read_json(bundled_folder(bundle) / "config.json")


def load_bundled(bundle: str | Path) -> Model:
    """A bundled model in float32 with the sampling that it was measured with.

    Raises:
        InputError: no bundled model has this name.
        CheckpointError: its files are damaged.
    """
    folder, config = bundled_folder(bundle), bundled_config(bundle)
    transformer, tokenizer = TransformerConfig(**config["transformer"]), TokenizerConfig(**config["tokenizer"])
    known = Shape(heads=transformer.heads, sides=transformer.sides, residual_ratio=tokenizer.residual_ratio)
    dense = read_dense(folder, None)._replace(hints={"norm_eps": transformer.norm_eps}, notes=[])
    model = build_dense(dense, known, sampling=Sampling(**config["sampling"]))
    if (model.config, model.tokenizer.config) != (transformer, tokenizer):
        raise CheckpointError(f"the weights in {folder} are not those that its config.json describes. Install again.")
    if isinstance(bundle, str):
        model.origin = {"name": bundle, **model.origin}
    return model


def load_bundled_classifier(bundle: str | Path) -> FashionClassifier:
    """The classifier that measures the generations of a bundled model, in float32."""
    tensors = _read(bundle, "classifier")
    classifier = FashionClassifier(len(tensors.get("head.bias", torch.empty(1))))
    problems = compare(classifier, tensors).problems()
    if problems:
        raise CheckpointError(
            f"the classifier in {bundled_folder(bundle)} is damaged. Install the package again:", problems
        )
    classifier.load_state_dict({n: t.float() if t.is_floating_point() else t.clone() for n, t in tensors.items()})
    return classifier.eval()


def bundled_reference_features(bundle: str | Path) -> Tensor:
    """The classifier's features of the real test images, [N, F] fp32: F 128, for mosaics four times as many."""
    return _read(bundle, "reference_features")["features"].float()


def write_bundle(
    folder: Path,
    transformer: VARTransformer,
    tokenizer: VQVAE,
    classifier: FashionClassifier,
    features: Tensor,
    config: Mapping[str, Any],
    max_shard_bytes: int = BUNDLE_SHARD_BYTES,
) -> None:
    """Writes the folder of a bundled model in half precision; a README.md that is there stays.

    Args:
        folder: the files appear in it together or not at all.
        transformer, tokenizer, classifier: trained modules.
        features: [N, F] of the test images.
        config: ``sampling`` {cfg, top_k, top_p}, and whatever the card wants to state (class names, figures); the
            shapes of transformer and tokenizer are added.
        max_shard_bytes: of values per file.

    Raises:
        InputError: a value does not fit half precision, or the folder cannot be written.
    """
    content = {
        **config,
        "sampling": Sampling(**config["sampling"]).settings,
        "transformer": transformer.config.model_dump(),
        "tokenizer": tokenizer.config.model_dump(),
    }
    weights = {
        "var": _halved(transformer),
        "vae": _halved(tokenizer),
        "classifier": _halved(classifier),
        "reference_features": {"features": features.half()},
    }
    lost = [
        f"{stem}: {name}"
        for stem, tensors in weights.items()
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    if lost:
        raise InputError("these tensors are not finite in half precision:", lost)
    owned = ["config.json", *(f"{stem}*.safetensors*" for stem in weights)]
    with replacing_files(folder, owned) as staging:
        for stem, tensors in weights.items():
            write_weights(staging, stem, tensors, max_shard_bytes)
        (staging / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def _read(bundle: str | Path, stem: str) -> dict[str, Tensor]:
    folder = bundled_folder(bundle)
    file = weight_file(folder, stem)
    if file is None:
        raise CheckpointError(f"{folder} has no {stem}.safetensors. Install the package again.")
    return read_tensors(file)


def _halved(module: torch.nn.Module) -> dict[str, Tensor]:
    """Tensors in half precision; statistics of training and whole numbers as they are."""
    return {
        name: tensor.half() if tensor.is_floating_point() and not name.endswith("ema_vocab_hit_SV") else tensor
        for name, tensor in module.state_dict().items()
        if not name.endswith(_OMITTED)
    }
