"""Features of generated images, made chunk by chunk, kept on disk so that a stopped evaluation goes on.

Images themselves are dropped as soon as their features are there. Shapes: N images, F features, K classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from actvar_convert._version import __version__
from actvar_convert.measure.extractors import FeatureExtractor
from actvar_convert.models.base import Sampling
from actvar_convert.models.fingerprint import state_fingerprint
from actvar_convert.models.model import Model, chunk_seed
from actvar_convert.system.atomic import read_checked, write_checked
from actvar_convert.system.progress import Task

GROUP = 256
"""Images, rounded down to whole chunks, between two writes to disk: what an interruption can cost."""


@dataclass(frozen=True)
class Features:
    """Features [N, F] and class logits [N, K] of images, fp32, on the CPU."""

    features_NF: Tensor
    logits_NK: Tensor


def model_fingerprint(model: Model) -> str:
    """Identifies the weights, the shapes and the plan in use, and the arithmetic that equal images depend on."""
    plan = model.plan.model_dump(mode="json") if model.is_sparse else None
    config = [part.config.model_dump(mode="json") for part in (model.transformer, model.tokenizer)]
    machine = (model.device.type, str(model.dtype), torch.__version__, __version__)
    return state_fingerprint(model, config=config, plan=plan, machine=machine)


def chunks(condition: Any, seed: int, chunk: int) -> Iterator[tuple[Any, int]]:
    """Condition and seed of each chunk: calls of ``generate`` with these give the images of one call over all."""
    for index, begin in enumerate(range(0, len(condition), chunk)):
        yield condition.rows(slice(begin, begin + chunk)), chunk_seed(seed, index)


@dataclass(frozen=True)
class ImageSet:
    """Which images: those that ``generate`` gives for balanced conditions, one seed and one chunk."""

    images: int
    seed: int
    chunk: int
    sampling: Sampling

    def key(self, model: Model) -> dict[str, object]:
        """What the first images of the set depend on beside the weights of a model."""
        few = self.images < (model.family.classes(model.config) or 0)  # their labels depend on how many there are
        return {
            "sampling": self.sampling.settings,
            "seed": self.seed,
            "chunk": self.chunk,
            **({"spread over": self.images} if few else {}),
            **model.drawn_on,
            **({"noise": "cuda"} if model.device.type == "cuda" else {}),
        }


def generated_features(
    model: Model,
    extractor: FeatureExtractor,
    wanted: ImageSet,
    task: Task,
    *,
    cache: Path | None = None,
    fingerprint: str | None = None,
) -> Features:
    """Features of a set of images.

    Args:
        task: advanced by the number of images, those read from the cache included.
        cache: folder of stored features; parts that match model, sampling, seed, chunk and extractor are reused.
        fingerprint: ``model_fingerprint(model)``, if it is known already.
    """
    chunk, sampling = wanted.chunk, wanted.sampling
    parts = list(chunks(model.balanced(wanted.images), wanted.seed, chunk))
    group = max(1, GROUP // chunk)
    key = {
        "model": fingerprint or (model_fingerprint(model) if cache else ""),
        "extractor": extractor.fingerprint,
        **wanted.key(model),
    }
    features, logits = [], []
    for first in range(0, len(parts), group):
        members = parts[first : first + group]
        count = sum(len(labels) for labels, _ in members)

        def make(members: list[tuple[Any, int]] = members) -> dict[str, Tensor]:
            features, logits = [], []
            for labels, own_seed in members:
                image = model.generate(labels, sampling=sampling, seed=own_seed, chunk=chunk)
                feature_BF, logit_BK = extractor(image)
                features.append(feature_BF.float().cpu())
                logits.append(logit_BK.float().cpu())
                task.advance(len(labels))
            return {"features": torch.cat(features), "logits": torch.cat(logits)}

        stored = remembered(cache, {**key, "first": first * chunk, "count": count}, make, count, task)
        features.append(stored["features"])
        logits.append(stored["logits"])
    return Features(torch.cat(features), torch.cat(logits))


def remembered(
    cache: Path | None, key: dict[str, object], make: Callable[[], dict[str, Tensor]], count: int, task: Task
) -> dict[str, Tensor]:
    """Tensors stored under ``key`` in the cache, else what ``make`` returns, stored whole or not at all.

    A file that was damaged, or put under this name by hand, is made anew.

    ``task`` advances by ``count`` if the tensors come from the cache; ``make`` advances it itself.
    """
    if cache is None:
        return make()
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:40]
    path = cache / f"{name}.kept"
    content = read_checked(path)
    if content is not None:
        task.advance(count)
        return safetensors.torch.load(content)
    stored = {name: value.contiguous() for name, value in make().items()}
    write_checked(path, safetensors.torch.save(stored))
    return stored
