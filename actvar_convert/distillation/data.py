"""Token pyramids for calibration and distillation: sampled from the teacher or made from images, stored once.

Shapes: N pyramids, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actvar_convert.errors import InputError
from actvar_convert.files.run_state import fingerprint_of
from actvar_convert.models.model import Model
from actvar_convert.system.atomic import write_whole
from actvar_convert.system.images import IMAGE_ENDINGS, list_images, read_image
from actvar_convert.system.processes import ALONE, Processes
from actvar_convert.system.progress import Progress

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
    condition = teacher.family.balanced(teacher.config, count)
    parts = [condition.rows(slice(begin, begin + batch)) for begin in range(0, count, batch)]

    def sample(index: int) -> Tensor:
        return teacher.generate_tokens(parts[index], seed=seed + 7_919 * (index + 1), chunk=batch, sampling=sampling)

    lengths = [len(part) for part in parts]
    tokens = _collect(teacher, lengths, sample, "sampling from the teacher", making)
    return TokenStore(teacher, tokens, condition)


def store_from_images(teacher: Model, folder: Path, count: int, making: Making) -> TokenStore:
    """Pyramids of the images of a class-per-folder tree (``folder/class/image.png``), classes in sorted order.

    Images are centre-cropped and resized to the model's size; ``count`` of them are chosen without replacement, or all
    if there are fewer. Those made are kept in a file named after the path and the images that it is of.
    """
    files, labels = labelled_images(folder, teacher.family.classes(teacher.config))
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(making.seed))[:count]
    chosen = [files[i] for i in order.tolist()]
    size = teacher.tokenizer.image_size(teacher.schedule)[0]
    if making.path is not None:
        which = fingerprint_of(*(file.relative_to(folder).as_posix() for file in chosen))
        own = making.path.with_name(f"{making.path.stem}-{which[:12]}{making.path.suffix}")
        making = replace(making, path=own)
    parts = [chosen[i : i + making.batch] for i in range(0, len(chosen), making.batch)]

    def encode(index: int) -> Tensor:
        images = torch.stack([read_image(file, size) for file in parts[index]]).to(teacher.device)
        with torch.inference_mode():
            tokens: Tensor = teacher.tokenizer.tokens(images * 2 - 1, teacher.schedule)
            return tokens

    lengths = [len(part) for part in parts]
    tokens = _collect(teacher, lengths, encode, "tokenising images", making)
    return TokenStore(teacher, tokens, labels[order])


def labelled_images(folder: Path, classes: int | None) -> tuple[list[Path], Tensor]:
    """Image files of a class-per-folder tree and the class index of each.

    Raises:
        InputError: no such folder, no image in it, or another number of classes than the model has.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the root of a class-per-folder tree of images")
    if classes is None:
        raise InputError(f"{folder}: images of classes given, and the model is conditioned on no classes")
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


def _collect(model: Model, lengths: list[int], make: _Maker, description: str, making: Making) -> Tensor:
    """Tokens [N, L, ...] of all parts, appended to the path as they are made; parts already there are not made again.

    Processes make neighbouring parts at the same time; the main one writes them in order.
    """
    path, processes = making.path, making.processes
    alphabet, width = model.alphabet, model.schedule.total * model.alphabet.stored_bytes
    rows = np.zeros((0, width), np.uint8)
    if processes.main and path is not None and path.exists():
        flat = np.fromfile(path, np.uint8)
        rows = flat[: len(flat) // width * width].reshape(-1, width)
    rows = processes.from_main(rows)
    ends = np.cumsum([0, *lengths])
    done = int(np.searchsorted(ends, len(rows), side="right")) - 1
    pieces = [rows[: ends[done]]]
    written = path if processes.main else None
    with making.progress.task(description, int(ends[-1])) as task, _appending(written, pieces[0]) as append:
        task.advance(int(ends[done]))
        for first in range(done, len(lengths), processes.count):
            own = first + processes.rank
            made = alphabet.pack(make(own)).flatten(1).numpy() if own < len(lengths) else rows[:0]
            for part in processes.gather(made):
                append(part)
                pieces.append(part)
                task.advance(len(part))
    packed = torch.from_numpy(np.concatenate(pieces))
    return alphabet.unpack(packed.view(len(packed), model.schedule.total, -1))


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
