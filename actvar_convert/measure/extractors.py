"""Feature extractors: networks whose features and class probabilities generated images are measured in.

The bundled classifiers know the images of the bundled models. The Inception network is for all others; it comes by
torch-fidelity, an optional extra, since that brings torchvision.

Shapes: B images, N reference images, F features (2048 of Inception), K classes.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from actvar_convert.errors import InputError
from actvar_convert.files import bundled as zoo
from actvar_convert.files.run_state import fingerprint_of
from actvar_convert.models.classifier import FashionClassifier
from actvar_convert.models.fingerprint import state_fingerprint
from actvar_convert.models.model import Model
from actvar_convert.models.var.config import TokenizerConfig
from actvar_convert.system.images import IMAGE_ENDINGS, check_images, list_images, read_image, unreadable


@dataclass(frozen=True)
class Reference:
    """What real images look like in the features of an extractor.

    Attributes:
        mean_F: mean feature vector, float64.
        covariance_FF: unbiased covariance of the features, float64.
        features_NF: the feature vectors themselves, or None if only mean and covariance are known; precision and
            recall need them.
        images: identifies the images, if the features were computed here; their last digits depend on the device.
    """

    mean_F: Tensor
    covariance_FF: Tensor
    features_NF: Tensor | None = None
    images: str | None = None

    @classmethod
    def of(cls, features_NF: Tensor, images: str | None = None) -> Reference:
        """Mean and covariance of feature vectors [N, F], which are kept."""
        features = features_NF.double().cpu()
        return cls(features.mean(0), torch.cov(features.T), features, images)

    @property
    def fingerprint(self) -> str:
        """Identifies what the statistics were made of, the same on every machine; 16 hexadecimal digits."""
        if self.images is not None:
            return self.images[:16]
        given = (self.mean_F, self.covariance_FF) if self.features_NF is None else (self.features_NF,)
        return hashlib.sha256(b"".join(each.numpy().tobytes() for each in given)).hexdigest()[:16]


class FeatureExtractor(Protocol):
    """What evaluation needs to know about a feature network.

    Attributes:
        name: what reports call it.
        feature_dim: length F of a feature vector.
        predicts_labels: whether its classes are the labels of the models, so that label agreement means something.
        fingerprint: identifies its weights; stored features of other weights are not reused.
    """

    name: str
    feature_dim: int
    predicts_labels: bool
    fingerprint: str

    def __call__(self, image_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, F] and class logits [B, K], fp32, of images [B, 3, H, W] in [0, 1].

        If K is one more than the classes of the models, the last is none of them.
        """

    def reference(self) -> Reference:
        """Statistics of the real images."""

    def problems(self, model: Model) -> list[str]:
        """Why images of this model cannot be measured with this extractor; empty when they can."""

    def tokenizer_distance(self, tokenizer: nn.Module) -> float | None:
        """FID of what the tokenizer makes of the real images, if that is known: what no transformer can pass."""


class ClassifierExtractor:
    """A small classifier of the very classes that the models generate, and features of real images."""

    predicts_labels = True

    def __init__(
        self,
        classifier: FashionClassifier,
        reference_NF: Tensor,
        *,
        name: str,
        image_size: int = 32,
        tokenizer_distances: dict[str, float] | None = None,
    ) -> None:
        """
        Args:
            classifier: the network; put into eval mode.
            reference_NF: features of real images [N, F].
            name: what reports call it.
            image_size: pixels per side of the images that it was trained on.
            tokenizer_distances: FID of the reconstructions of a tokenizer, by the tokenizer's fingerprint.
        """
        # channels_last: a third less time on a CPU.
        self.classifier = classifier.eval().requires_grad_(False)
        self.classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.name, self.image_size = name, image_size
        self.feature_dim, self.classes = classifier.feature_dim, classifier.head.out_features
        self.fingerprint = state_fingerprint(classifier)
        self._reference = Reference.of(reference_NF)
        self._tokenizer_distances = dict(tokenizer_distances or {})

    @torch.no_grad()
    def __call__(self, image_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        self.classifier.to(image_B3HW.device)
        features = self.classifier.features(image_B3HW.float().contiguous(memory_format=torch.channels_last))
        return features, self.classifier.classify(features)

    def reference(self) -> Reference:
        return self._reference

    def problems(self, model: Model) -> list[str]:
        found = []
        side, classes = model.tokenizer.image_size(model.schedule)[0], model.family.classes(model.config)
        if side != self.image_size:
            found.append(f"images of {side} x {side} pixels; {self.name} knows {self.image_size} x {self.image_size}")
        if classes != self.classes:
            found.append(f"{classes} classes; {self.name} knows {self.classes}")
        return found

    def tokenizer_distance(self, tokenizer: nn.Module) -> float | None:
        return self._tokenizer_distances.get(state_fingerprint(tokenizer))


class QuadrantExtractor(ClassifierExtractor):
    """A classifier of single images on 2 x 2 mosaics of them: it looks at every quadrant on its own.

    The four feature vectors of a mosaic stand one behind the other: top left, top right, bottom left, bottom right.
    Their mean would be shorter, but it would hide what a token gate may do: spend its tokens on some quadrants and
    starve the others. In a mean the error of one quadrant counts a quarter, and opposite errors of two cancel.

    A class k fixes the label of each quadrant, l(k, q). With p_q the classifier's probabilities of quadrant q, its
    probability is prod_q p_q[l(k, q)]; what the classes leave of 1 is the probability of none of them, the last
    logit. So a mosaic counts as its class if that is likelier than all else together.
    """

    def __init__(
        self,
        classifier: FashionClassifier,
        reference_NF: Tensor,
        *,
        quadrants: Sequence[Sequence[int]],
        name: str,
        image_size: int = 64,
        tokenizer_distances: dict[str, float] | None = None,
    ) -> None:
        """
        Args:
            classifier: of single images; put into eval mode.
            reference_NF: features of real mosaics [N, 4 times those of the classifier].
            quadrants: labels of the four quadrants of every class.
            name: what reports call it.
            image_size: pixels per side of a mosaic.
            tokenizer_distances: FID of the reconstructions of a tokenizer, by the tokenizer's fingerprint.
        """
        super().__init__(
            classifier, reference_NF, name=name, image_size=image_size, tokenizer_distances=tokenizer_distances
        )
        self.labels_K4 = torch.tensor(quadrants)
        self.feature_dim, self.classes = 4 * classifier.feature_dim, len(self.labels_K4)
        self.fingerprint = state_fingerprint(classifier, quadrants=self.labels_K4.tolist())

    @torch.no_grad()
    def __call__(self, image_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        B, C, H, W = image_B3HW.shape
        tiles = image_B3HW.reshape(B, C, 2, H // 2, 2, W // 2).permute(0, 2, 4, 1, 3, 5)
        features, logits = super().__call__(tiles.reshape(4 * B, C, H // 2, W // 2))
        log_p_B4L = logits.log_softmax(-1).view(B, 4, -1)
        quadrant = torch.arange(4, device=logits.device)
        log_p_BK = log_p_B4L[:, quadrant, self.labels_K4.to(logits.device)].sum(-1)
        none_B1 = (1 - log_p_BK.exp().sum(-1, keepdim=True)).clamp_min(1e-12).log()
        return features.view(B, -1), torch.cat((log_p_BK, none_B1), -1)


def bundled_extractor(name: str) -> ClassifierExtractor:
    """The classifier that comes with a bundled model, and its features of the real test images.

    If config.json has ``quadrants`` (labels of the four quadrants of every class), the model makes mosaics.

    Raises:
        InputError: no bundled model has this name.
        CheckpointError: its files are damaged.
    """
    config = zoo.bundled_config(name)
    figures = config.get("figures", {})
    distances = {}
    if "tokenizer_fingerprint" in figures:
        distances[figures["tokenizer_fingerprint"]] = float(figures["fid_tokenizer"])
    classifier, features = zoo.load_bundled_classifier(name), zoo.bundled_reference_features(name)
    size, title = TokenizerConfig(**config["tokenizer"]).image_size, f"{name} classifier"
    if "quadrants" in config:
        return QuadrantExtractor(
            classifier,
            features,
            quadrants=config["quadrants"],
            name=title,
            image_size=size,
            tokenizer_distances=distances,
        )
    return ClassifierExtractor(classifier, features, name=title, image_size=size, tokenizer_distances=distances)


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
            device: that computes the features of the folder's images.

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
            digests = real_images(reference)
            rows = [self(image.to(device or "cpu"))[0].cpu() for image in folder_images(digests, image_size)]
            self._reference = Reference.of(torch.cat(rows), fingerprint_of(str(image_size), *digests.values()))
        else:
            self._reference = read_statistics(reference, self.feature_dim)

    @torch.no_grad()
    def __call__(self, image_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        self.network.to(image_B3HW.device)
        features, logits = self.network(image_B3HW.mul(255).round().clamp(0, 255).to(torch.uint8))
        return features, logits

    def reference(self) -> Reference:
        return self._reference

    def problems(self, model: Model) -> list[str]:
        return []

    def tokenizer_distance(self, tokenizer: nn.Module) -> float | None:
        return None


def require_reference(reference: Path) -> None:
    """Raises InputError if real images can be read from a path neither as a folder nor as an .npz."""
    if reference.is_dir():
        real_images(reference)
    elif reference.is_file() and reference.suffix == ".npz":
        read_statistics(reference, InceptionExtractor.feature_dim)
    else:
        raise InputError(f"{reference}: no folder of images and no .npz file with mu and sigma")


def read_statistics(path: Path, feature_dim: int) -> Reference:
    """Mean and covariance from an .npz with ``mu`` and ``sigma``.

    Raises:
        InputError: the file is missing, is no such archive, has other shapes, or holds no finite numbers.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
            mean = _array(archive, "mu", (feature_dim,))
            covariance = _array(archive, "sigma", (feature_dim, feature_dim))
    except Exception as error:  # of a damaged file the readers of archives and headers raise whatever they stumble over
        raise InputError(f"{path}: no readable .npz with the arrays mu and sigma ({error})") from error
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise InputError(f"{path}: mu or sigma holds values that are infinite or no numbers; make the file anew")
    return Reference(mean, covariance)


def _array(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...]) -> Tensor:
    """One array of an .npz in fp64. Its header has to say this shape, and no more than that is unpacked.

    Raises:
        ValueError: another shape, or no real numbers.
    """
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        found, by_columns, dtype = read_header(file)
        if found != shape:
            raise ValueError(f"{name} has shape {found}, {shape} is needed")
        if dtype.kind not in "fiu":
            raise ValueError(f"{name} holds {dtype}, real numbers are needed")
        values = np.frombuffer(file.read(math.prod(shape) * dtype.itemsize), dtype)
    return torch.from_numpy(values.reshape(shape, order="F" if by_columns else "C").astype(np.float64))


def real_images(folder: Path) -> dict[Path, str]:
    """SHA-256 of the content of every image below a folder, in their order.

    Raises:
        InputError: there are fewer than two images, or some cannot be read, each of which is named.
    """
    paths = list_images(folder)
    if len(paths) < 2:
        raise InputError(f"{folder}: {len(paths)} images found ({', '.join(IMAGE_ENDINGS)}), two needed")
    digests, faults = check_images(paths)
    if faults:
        raise unreadable(folder, paths, faults)
    return {path: digests[path] for path in paths}


def folder_images(digests: Mapping[Path, str], size: int, batch: int = 64) -> Iterator[Tensor]:
    """Batches [B, 3, size, size] in [0, 1] of images, their shorter sides resized, centre-cropped.

    Args:
        digests: the images, as ``real_images`` found them.

    Raises:
        InputError: an image was changed since.
    """
    files = list(digests.items())
    for begin in range(0, len(files), batch):
        yield torch.stack([read_image(path, size, digest) for path, digest in files[begin : begin + batch]])
