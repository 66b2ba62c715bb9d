"""Token pyramids for calibration and distillation: sampled from the teacher or made from images, stored once.

Shapes: N pyramids, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from actvar_convert.errors import InputError
from actvar_convert.files.run_state import fingerprint_of
from actvar_convert.models.model import VARModel
from actvar_convert.models.sampling import balanced_labels
from actvar_convert.system.atomic import write_whole
from actvar_convert.system.images import IMAGE_ENDINGS, list_images, read_image
from actvar_convert.system.processes import ALONE, Processes
from actvar_convert.system.progress import Progress

MOST_CODES = 2**16
"""Codes that two bytes tell apart."""

_Maker = Callable[[int], Tensor]
"""Makes the rows of one part, from its index."""


class TokenStore:
    """Token pyramids and labels in memory, two bytes a token, replayed in an order that depends on the seed alone."""

    def __init__(self, tokens_NL: Tensor, labels_N: Tensor) -> None:
        self.tokens = tokens_NL.to(torch.uint16)
        self.labels = labels_N.to(torch.int64)

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Pyramids [B, L] int64 and labels [B] of one step; every epoch is a permutation of the store."""
        size = min(size, len(self))
        per_epoch = len(self) // size
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
        index = order[place * size : (place + 1) * size]
        return self.tokens[index].long(), self.labels[index]


def store_from_teacher(
    teacher: VARModel,
    count: int,
    *,
    path: Path | None,
    batch: int,
    seed: int,
    cfg: float | None,
    progress: Progress,
    processes: Processes = ALONE,
) -> TokenStore:
    """Pyramids that the teacher samples itself, labels balanced.

    Sampled batch by batch, each from a seed of its own, and appended to ``path``: an interrupted call goes on where it
    stopped and ends with the same tokens, as does one whose ``processes`` share the batches.
    """
    pyramid = teacher.transformer.config.pyramid
    labels = balanced_labels(count, teacher.transformer.config.classes)
    parts = list(torch.split(labels, batch))

    def sample(index: int) -> Tensor:
        return teacher.generate_tokens(parts[index], seed=seed + 7_919 * (index + 1), chunk=batch, cfg=cfg).cpu()

    lengths = [len(part) for part in parts]
    tokens = _collect(path, lengths, pyramid.total, sample, progress, "sampling from the teacher", processes)
    return TokenStore(tokens, labels)


def store_from_images(
    teacher: VARModel,
    folder: Path,
    count: int,
    *,
    path: Path | None,
    batch: int,
    seed: int,
    progress: Progress,
    processes: Processes = ALONE,
) -> TokenStore:
    """Pyramids of the images of a class-per-folder tree (``folder/class/image.png``), classes in sorted order.

    Images are centre-cropped and resized to the model's size; ``count`` of them are chosen without replacement, or all
    if there are fewer. Those made are kept in a file named after ``path`` and the images that it is of.
    """
    files, labels = labelled_images(folder, teacher.transformer.config.classes)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:count]
    chosen = [files[i] for i in order.tolist()]
    size = teacher.tokenizer.config.image_size
    if path is not None:
        which = fingerprint_of(*(file.relative_to(folder).as_posix() for file in chosen))
        path = path.with_name(f"{path.stem}-{which[:12]}{path.suffix}")
    parts = [chosen[i : i + batch] for i in range(0, len(chosen), batch)]

    def encode(index: int) -> Tensor:
        images = torch.stack([read_image(file, size) for file in parts[index]]).to(teacher.device)
        with torch.inference_mode():
            return torch.cat(teacher.tokenizer.encode(images * 2 - 1), dim=1).cpu()

    lengths, width = [len(part) for part in parts], teacher.transformer.config.pyramid.total
    tokens = _collect(path, lengths, width, encode, progress, "tokenising images", processes)
    return TokenStore(tokens, labels[order])


def labelled_images(folder: Path, classes: int) -> tuple[list[Path], Tensor]:
    """Image files of a class-per-folder tree and the class index of each.

    Raises:
        InputError: no such folder, no image in it, or another number of classes than the model has.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the root of a class-per-folder tree of images")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(names) != classes:
        raise InputError(f"{folder}: holds {len(names)} class folders, the model has {classes} classes")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = list_images(folder / name)
        files += found
        labels += [label] * len(found)
    if not files:
        raise InputError(f"{folder}: no image below it; looked for {', '.join(IMAGE_ENDINGS)}")
    return files, torch.tensor(labels)


def _collect(
    path: Path | None,
    lengths: list[int],
    width: int,
    make: _Maker,
    progress: Progress,
    description: str,
    processes: Processes,
) -> Tensor:
    """Rows [N, width] of all parts, appended to ``path`` as they are made; parts already there are not made again.

    Processes make neighbouring parts at the same time; the main one writes them in order.
    """
    rows = np.zeros((0, width), np.uint16)
    if processes.main and path is not None and path.exists():
        flat = np.fromfile(path, np.uint16)
        rows = flat[: len(flat) // width * width].reshape(-1, width)
    rows = processes.from_main(rows)
    ends = np.cumsum([0, *lengths])
    done = int(np.searchsorted(ends, len(rows), side="right")) - 1
    pieces = [rows[: ends[done]]]
    written = path if processes.main else None
    with progress.task(description, int(ends[-1])) as task, _appending(written, pieces[0]) as append:
        task.advance(int(ends[done]))
        for first in range(done, len(lengths), processes.count):
            own = first + processes.rank
            made = make(own).numpy().astype(np.uint16) if own < len(lengths) else rows[:0]
            for part in processes.gather(made):
                append(part)
                pieces.append(part)
                task.advance(len(part))
    return torch.from_numpy(np.concatenate(pieces))


@contextmanager
def _appending(path: Path | None, kept: np.ndarray) -> Iterator[Callable[[np.ndarray], None]]:
    """What appends rows to a file that holds ``kept`` and nothing else before; without a path it does nothing."""
    if path is None:
        yield lambda rows: None
        return
    if not path.exists() or path.stat().st_size != kept.nbytes:
        write_whole(path, kept.tobytes())
    with path.open("ab") as file:

        def append(rows: np.ndarray) -> None:
            file.write(rows.tobytes())
            file.flush()

        yield append
