"""Images on disk: which files of a folder are images, whether they can be read, and how one becomes a tensor."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from actvar_convert.errors import InputError, counted, explain_os_errors
from actvar_convert.system.progress import Progress, SilentProgress

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

_KINDS = ("PNG", "JPEG", "WEBP", "BMP")
"""What may be in such a file, whichever of the endings it has: nothing in 32 bits, whose white is not known."""

MAX_PIXELS = 2**26
"""Of an image; a file of a few kilobytes can claim any number. About half a gigabyte in memory."""

_LONGEST = 64
"""Longer side over shorter: of a longer strip the middle is taken before it is resized, which saves memory."""

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets an image upright, by the orientation that its EXIF data name."""


def list_images(folder: Path) -> list[Path]:
    """All image files below a folder, in sorted order; hidden ones, and those in hidden folders, are none.

    Links are followed, to files and to folders; one that leads back to a folder that it stands in is not.

    Raises:
        InputError: a folder cannot be read.
    """
    found: list[Path] = []
    waiting: list[tuple[Path, frozenset[tuple[int, int]]]] = [(folder, frozenset())]
    while waiting:
        here, above = waiting.pop()
        with explain_os_errors("read", here):
            status = here.stat()
            itself = (status.st_dev, status.st_ino)
            if itself in above:
                continue
            with os.scandir(here) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    path = here / entry.name
                    if path.is_dir() if entry.is_symlink() else entry.is_dir():
                        waiting.append((path, above | {itself}))
                    elif path.suffix.lower() in IMAGE_ENDINGS:
                        found.append(path)
    return sorted(found)


def check_images(paths: Sequence[Path], progress: Progress | None = None) -> tuple[dict[Path, str], dict[Path, str]]:
    """Reads and decodes image files, several at a time.

    Returns:
        SHA-256 of the content of those that can be read; what is wrong with each of the others.
    """
    digests: dict[Path, str] = {}
    faults: dict[Path, str] = {}
    pool = ThreadPoolExecutor()
    try:
        with (progress or SilentProgress()).task("checking images", len(paths)) as task:
            for path, (digest, fault) in zip(paths, pool.map(_check, paths), strict=True):
                if fault is None:
                    digests[path] = digest
                else:
                    faults[path] = fault
                task.advance()
    finally:
        pool.shutdown(cancel_futures=True)
    return digests, faults


def unreadable(folder: Path, looked_at: Sequence[Path], faults: dict[Path, str]) -> InputError:
    """The error that names every unreadable image below a folder, with a count for each folder directly in it."""
    seen, bad = (Counter(_part(folder, path) for path in paths) for paths in (looked_at, faults))
    counts = ", ".join(f"{name}: {bad[name]} of {seen[name]}" for name in sorted(bad))
    return InputError(
        f"{folder}: {len(faults)} of {counted(len(looked_at), 'image')} cannot be read ({counts}); remove or replace",
        [f"{path}: {faults[path]}" for path in sorted(faults)],
    )


def _part(folder: Path, path: Path) -> str:
    parts = path.relative_to(folder).parts
    return parts[0] if len(parts) > 1 else "in the folder itself"


def read_image(path: Path, size: int, digest: str | None = None) -> Tensor:
    """One image [3, size, size] in [0, 1], fp32: the shorter side resized, the centre cropped.

    It is what a viewer shows on a white page: 16-bit grey is scaled to 8 bits (65,535 is white), a transparent image is
    laid over white, CMYK is converted without a colour profile, an image turned by its EXIF orientation stands
    upright (data loaders for ImageNet leave it lying), and of an animation the first frame counts.

    Args:
        digest: SHA-256 of the content that is expected, as ``check_images`` gave it.

    Raises:
        InputError: the file is no readable image, or its content is not the expected one.
    """
    try:
        content = _content(path)
        if digest is not None and hashlib.sha256(content).hexdigest() != digest:
            raise InputError(
                f"{path}: the image was changed while it was in use; run the command again when nothing changes the "
                "images any more"
            )
        image = _decode(content)
    except _Unreadable as fault:
        raise InputError(f"{path}: cannot be read as an image ({fault}); remove it or replace it") from fault
    short = min(image.size)
    image = _centre(image, *(min(side, _LONGEST * short) for side in image.size))
    width, height = (max(size, round(side * size / short)) for side in image.size)
    image = _centre(image.resize((width, height), Image.Resampling.LANCZOS), size, size)
    return torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


class _Unreadable(Exception):
    """Why a file is no image that can be used."""


def _check(path: Path) -> tuple[str, str | None]:
    """The hash of a file's content, and what is wrong with it, if anything."""
    try:
        content = _content(path)
        _decode(content, small=True)
    except _Unreadable as fault:
        return "", str(fault)
    return hashlib.sha256(content).hexdigest(), None


def _content(path: Path) -> bytes:
    """The bytes of a file as they were at one moment."""
    try:
        for _ in range(2):
            if not stat.S_ISREG(path.stat().st_mode):
                raise _Unreadable("it is no file but a pipe, a device or the like")
            with path.open("rb") as file:
                before, content, after = os.fstat(file.fileno()), file.read(), os.fstat(file.fileno())
            if (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, len(content)):
                return content
    except OSError as error:
        raise _Unreadable(error.strerror or str(error)) from error
    raise _Unreadable("something is writing to it")


def _decode(content: bytes, *, small: bool = False) -> Image.Image:
    """The image in a file in 8-bit RGB, upright; ``small``: at whatever size is decoded fastest, with all data read."""
    if not content:
        raise _Unreadable("it is empty")
    try:
        with Image.open(io.BytesIO(content), formats=_KINDS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise _Unreadable(f"{opened.width} x {opened.height} pixels are more than {MAX_PIXELS:,}")
            if small:
                opened.draft(None, (8, 8))
            opened.load()
            orientation = _orientation(opened)
            image = _rgb(opened)
    except _Unreadable:
        raise
    except UnidentifiedImageError as error:
        raise _Unreadable("its content is neither PNG, JPEG, WebP nor BMP") from error
    except Exception as error:  # of a damaged file Pillow raises whatever its parser stumbles over
        raise _Unreadable(str(error) or type(error).__name__) from error
    turn = _UPRIGHT.get(orientation)
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """The orientation that an image's EXIF data name; damaged data name none."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # the same parsers; the pixels are fine all the same
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        value = np.asarray(image).astype(np.int64)
        if "transparency" in image.info:
            value[value == image.info["transparency"]] = 65_535
        return Image.fromarray(((value * 255 + 32_767) // 65_535).clip(0, 255).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
