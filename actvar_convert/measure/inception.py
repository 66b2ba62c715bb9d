"""Inception features for ImageNet models, by torch-fidelity: an optional extra, since it brings torchvision.

Shapes: B images in hand, F = 2048 features, 1008 classes.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from actvar_convert.errors import InputError
from actvar_convert.files.run_state import fingerprint_of
from actvar_convert.files.tensors import sha256_of
from actvar_convert.measure.features import Reference
from actvar_convert.models.fingerprint import state_fingerprint
from actvar_convert.models.model import VARModel
from actvar_convert.system.images import IMAGE_ENDINGS, list_images, read_image


class InceptionExtractor:
    """The Inception network of published FID figures (TensorFlow weights of 2015), in fp32."""

    name = "inception-v3-compat"
    feature_dim = 2048
    predicts_labels = False

    def __init__(
        self, reference: Path, *, weights: Path | None = None, image_size: int = 256, device: str | None = None
    ) -> None:
        """
        Args:
            reference: the real images: a folder (searched in depth), or an .npz with ``mu`` [2048] and ``sigma``
                [2048, 2048] as published beside ImageNet models.
            weights: the network's weights as torch-fidelity names them; downloaded by it if not given.
            image_size: pixels per side that images of a folder are cropped and resized to.
            device: where features of the folder's images are computed.

        Raises:
            InputError: torch-fidelity is not installed, or the reference cannot be read.
        """
        require_reference(reference)
        try:
            fidelity = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        except ModuleNotFoundError as error:
            raise InputError(
                "Inception features need torch-fidelity, not installed here: pip install torch-fidelity"
            ) from error
        self.network: nn.Module = fidelity.FeatureExtractorInceptionV3(
            self.name, ["2048", "logits_unbiased"], None if weights is None else str(weights)
        )
        self.fingerprint = state_fingerprint(self.network)
        if reference.is_dir():
            self.network.to(device or "cpu")
            rows = [self(image.to(device or "cpu"))[0].cpu() for image in folder_images(reference, image_size)]
            self._reference = Reference.of(torch.cat(rows), images_fingerprint(reference, image_size))
        else:
            self._reference = read_statistics(reference, self.feature_dim)

    @torch.inference_mode()
    def __call__(self, image_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        self.network.to(image_B3HW.device)
        features, logits = self.network(image_B3HW.mul(255).round().clamp(0, 255).to(torch.uint8))
        return features, logits

    def reference(self) -> Reference:
        return self._reference

    def problems(self, model: VARModel) -> list[str]:
        return []

    def tokenizer_distance(self, tokenizer: nn.Module) -> float | None:
        return None


def require_reference(reference: Path) -> None:
    """Raises InputError where real images can be read from a path neither as a folder nor as an .npz."""
    if not reference.is_dir() and not (reference.is_file() and reference.suffix == ".npz"):
        raise InputError(f"{reference}: no folder of images and no .npz file with mu and sigma")


def read_statistics(path: Path, feature_dim: int) -> Reference:
    """Mean and covariance from an .npz with ``mu`` and ``sigma``.

    Raises:
        InputError: the file is missing, is no such archive, or has other shapes.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            mean, covariance = torch.from_numpy(archive["mu"]).double(), torch.from_numpy(archive["sigma"]).double()
    except (OSError, KeyError, ValueError, EOFError, TypeError) as error:
        raise InputError(f"{path}: no readable .npz with the arrays mu and sigma ({error})") from error
    if mean.shape != (feature_dim,) or covariance.shape != (feature_dim, feature_dim):
        raise InputError(
            f"{path}: mu of shape {tuple(mean.shape)} and sigma of shape {tuple(covariance.shape)}; "
            f"{feature_dim} features need [{feature_dim}] and [{feature_dim}, {feature_dim}]"
        )
    return Reference(mean, covariance)


def images_fingerprint(folder: Path, size: int) -> str:
    """Identifies the images below a folder, in their order, at ``size`` pixels per side."""
    return fingerprint_of(str(size), *(sha256_of(path) for path in list_images(folder)))


def folder_images(folder: Path, size: int, batch: int = 64) -> Iterator[Tensor]:
    """Batches [B, 3, size, size] in [0, 1] of all images below a folder, their shorter sides resized, centre-cropped.

    Raises:
        InputError: there are fewer than two images, or one cannot be read.
    """
    paths = list_images(folder)
    if len(paths) < 2:
        raise InputError(f"{folder}: {len(paths)} images found ({', '.join(IMAGE_ENDINGS)}), two needed")
    for begin in range(0, len(paths), batch):
        yield torch.stack([read_image(path, size) for path in paths[begin : begin + batch]])
