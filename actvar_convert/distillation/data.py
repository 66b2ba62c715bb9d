"""Token pyramids for calibration and distillation: sampled from the teacher or made from images, stored once.

Shapes: N pyramids, L tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actvar_convert.errors import InputError, explain_os_errors
from actvar_convert.files.run_state import fingerprint_of
from actvar_convert.models.model import Model
from actvar_convert.system.atomic import CHECKSUM_BYTES, checksum
from actvar_convert.system.images import IMAGE_ENDINGS, check_images, list_images, read_image, unreadable
from actvar_convert.system.processes import ALONE, Processes
from actvar_convert.system.progress import Progress

CHECKED = 20_000
"""Files of a tree that are all checked before work; of a larger tree those are that a recipe chooses."""

_Maker = Callable[[int], Tensor]
"""Makes the rows of one part, from its index."""


@dataclass(frozen=True)
class Making:
    """How pyramids are made.

    Attributes:
        batch: pyramids at a time.
        seed: of what is sampled or chosen.
        progress: told about the pyramids.
        path: file that keeps them as they come, so that an interrupted call goes on; None: nothing is kept.
        processes: those that share the batches.
    """

    batch: int
    seed: int
    progress: Progress
    path: Path | None = None
    processes: Processes = ALONE


class TokenStore:
    """Token pyramids and their conditions in memory, packed, replayed in an order that depends on the seed alone.

    Args:
        model: whose tokens they are.
        tokens: [N, L, ...] int64.
        condition: of each, as the model's family takes it.
    """

    def __init__(self, model: Model, tokens: Tensor, condition: Any) -> None:
        self.alphabet = model.alphabet
        self.packed = self.alphabet.pack(tokens)
        self.condition = model.family.condition(model.config, condition)

    def __len__(self) -> int:
        return len(self.packed)

    @property
    def tokens(self) -> Tensor:
        """All pyramids [N, L, ...] int64."""
        return self.alphabet.unpack(self.packed)

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Any]:
        """Pyramids [B, L, ...] int64 and conditions of one step; every epoch is a permutation of the store."""
        size = min(size, len(self))
        per_epoch = len(self) // size
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
        index = order[place * size : (place + 1) * size]
        return self.alphabet.unpack(self.packed[index]), self.condition.rows(index)


def store_from_teacher(teacher: Model, count: int, making: Making, *, cfg: float | None = None) -> TokenStore:
    """Pyramids that the teacher samples itself, labels balanced; ``cfg`` is the guidance, its own by default.

    Sampled batch by batch, each from a seed of its own, and appended to the path: an interrupted call goes on where it
    stopped and ends with the same tokens, as does one whose processes share the batches.
    """
    sampling, batch, seed = teacher.sampling_with(cfg=cfg), making.batch, making.seed
    condition = teacher.balanced(count)
    parts = [condition.rows(slice(begin, begin + batch)) for begin in range(0, count, batch)]

    def sample(index: int) -> Tensor:
        return teacher.generate_tokens(parts[index], seed=seed + 7_919 * (index + 1), chunk=batch, sampling=sampling)

    lengths = [len(part) for part in parts]
    tokens = _collect(teacher, lengths, sample, "sampling from the teacher", making)
    return TokenStore(teacher, tokens, condition)


@dataclass(frozen=True)
class ChosenImages:
    """Images of a class-per-folder tree, chosen at random and found readable.

    Attributes:
        files: N of them.
        digests: SHA-256 of the content of each.
        labels: the class of each.
    """

    files: list[Path]
    digests: list[str]
    labels: list[int]

    @property
    def fingerprint(self) -> str:
        """Identifies the images by their content, with their classes, in their order."""
        return fingerprint_of(*self.digests, json.dumps(self.labels))


def chosen_images(
    folder: Path, classes: int | None, choices: Sequence[tuple[int, int]], progress: Progress
) -> list[ChosenImages]:
    """Choices of images of a class-per-folder tree, all of them checked before any work.

    Of a tree of up to ``CHECKED`` files every file is checked, of a larger one those that are chosen, and in each class
    others until one can be read.

    Args:
        choices: (count, seed) of each choice; ``count`` images without replacement, or all if there are fewer.

    Raises:
        InputError: see ``labelled_images``; or images that cannot be read, each named, with a count per class.
    """
    files, labels = labelled_images(folder, classes)
    orders = [
        torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:count].tolist()
        for count, seed in choices
    ]
    looked_at = [files[i] for i in (range(len(files)) if len(files) <= CHECKED else sorted(set().union(*orders)))]
    digests, faults = check_images(looked_at, progress)
    by_class = list(zip(files, labels, strict=True))
    served = {label for file, label in by_class if file in digests}
    tried: dict[Path, str] = {}
    for file, label in by_class:
        if label not in served and file not in faults:
            good, bad = check_images([file])
            served |= {label} if good else set()
            tried |= bad
    hopeless = {file: tried[file] for file, label in by_class if file in tried and label not in served}
    looked_at, faults = looked_at + list(hopeless), faults | hopeless
    if faults:
        raise unreadable(folder, looked_at, faults)
    return [
        ChosenImages([files[i] for i in order], [digests[files[i]] for i in order], [labels[i] for i in order])
        for order in orders
    ]


def store_from_images(teacher: Model, chosen: ChosenImages, making: Making) -> TokenStore:
    """Pyramids of images, centre-cropped and resized to the model's size.

    Those made are kept in a file named after the path and the content of the images that it is of.

    Raises:
        InputError: an image was changed since it was chosen.
    """
    chosen = making.processes.from_main(chosen)
    size = teacher.tokenizer.image_size(teacher.schedule)[0]
    if making.path is not None:
        own = making.path.with_name(f"{making.path.stem}-{chosen.fingerprint[:12]}{making.path.suffix}")
        making = replace(making, path=own)
    begins = range(0, len(chosen.files), making.batch)

    def encode(index: int) -> Tensor:
        part = slice(begins[index], begins[index] + making.batch)
        files = zip(chosen.files[part], chosen.digests[part], strict=True)
        images = torch.stack([read_image(file, size, digest) for file, digest in files]).to(teacher.device)
        with torch.inference_mode():
            tokens: Tensor = teacher.tokenizer.tokens(images * 2 - 1, teacher.schedule)
            return tokens

    lengths = [min(making.batch, len(chosen.files) - begin) for begin in begins]
    tokens = _collect(teacher, lengths, encode, "tokenising images", making)
    return TokenStore(teacher, tokens, torch.tensor(chosen.labels))


def labelled_images(folder: Path, classes: int | None) -> tuple[list[Path], list[int]]:
    """Image files of a class-per-folder tree (``folder/class/image.png``) and the class of each, in sorted order.

    Raises:
        InputError: no such folder, another number of classes than the model has, or classes without an image.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if classes is None:
        raise InputError(f"{folder}: images of classes given, and the model is conditioned on no classes")
    with explain_os_errors("read", folder):
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        folders = [entry for entry in entries if entry.is_dir()]
        nowhere = [entry.name for entry in entries if entry.is_symlink() and not entry.exists()]
    if len(folders) != classes:
        broken = f"; links that lead nowhere: {', '.join(nowhere)}" if nowhere else ""
        raise InputError(f"{folder}: holds {len(folders)} class folders, the model has {classes} classes{broken}")
    found = [list_images(each) for each in folders]
    empty = [each for each, own in zip(folders, found, strict=True) if not own]
    if empty:
        raise InputError(
            f"{folder}: no image in {len(empty)} of {classes} class folders; looked for {', '.join(IMAGE_ENDINGS)}",
            [f"{each}: {_instead(each)}" for each in empty],
        )
    return [file for own in found for file in own], [label for label, own in enumerate(found) for _ in own]


def _instead(folder: Path) -> str:
    """What a folder without images holds."""
    kinds = Counter(entry.suffix or "without an ending" for entry in folder.iterdir() if not entry.is_dir())
    return "holds other files: " + ", ".join(f"{kinds[kind]} {kind}" for kind in sorted(kinds)) if kinds else "empty"


def _collect(model: Model, lengths: list[int], make: _Maker, description: str, making: Making) -> Tensor:
    """Tokens [N, L, ...] of all parts, appended to the path as they are made; parts already there are not made again.

    Processes make neighbouring parts at the same time; the main one writes them in order.
    """
    path, processes = making.path, making.processes
    alphabet, width = model.alphabet, model.schedule.total * model.alphabet.stored_bytes
    kept = _whole_parts(path, lengths, width) if processes.main and path is not None else []
    pieces = processes.from_main(kept)
    done, nothing = len(pieces), np.zeros((0, width), np.uint8)
    written = path if processes.main else None
    with making.progress.task(description, sum(lengths)) as task, _appending(written, pieces) as append:
        task.advance(sum(lengths[:done]))
        for first in range(done, len(lengths), processes.count):
            own = first + processes.rank
            made = alphabet.pack(make(own)).flatten(1).numpy() if own < len(lengths) else nothing
            for part in processes.gather(made):
                if len(part):
                    append(part)
                    pieces.append(part)
                    task.advance(len(part))
    packed = torch.from_numpy(np.concatenate([nothing, *pieces]))
    return alphabet.unpack(packed.view(len(packed), model.schedule.total, -1))


def _whole_parts(path: Path, lengths: list[int], width: int) -> list[np.ndarray]:
    """The parts [n, width] that a file holds, up to the first that is missing, damaged, or of another file."""
    parts: list[np.ndarray] = []
    if path.exists():
        with path.open("rb") as file:
            for number, length in enumerate(lengths):
                expected, content = file.read(CHECKSUM_BYTES), file.read(length * width)
                if len(content) < length * width or checksum(path, content, number) != expected:
                    break
                parts.append(np.frombuffer(content, np.uint8).reshape(length, width))
    return parts


@contextmanager
def _appending(path: Path | None, kept: list[np.ndarray]) -> Iterator[Callable[[np.ndarray], None]]:
    """What appends a part to a file that holds those ``kept`` and nothing else before; without a path it does nothing.

    Before each part stands the checksum of the file's name and the part, so that no other bytes are taken for it.
    """
    if path is None:
        yield lambda rows: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    number = len(kept)
    with path.open("ab") as file:
        file.truncate(sum(CHECKSUM_BYTES + part.nbytes for part in kept))

        def append(rows: np.ndarray) -> None:
            nonlocal number
            content = rows.tobytes()
            file.write(checksum(path, content, number) + content)
            file.flush()
            number += 1

        yield append
