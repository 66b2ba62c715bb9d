"""The published models by name: their shapes, and their files through the Hugging Face hub."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import NamedTuple

from actvar_convert.errors import InputError, explained, os_error_number
from actvar_convert.files.locate import AS_VAE
from actvar_convert.models.config import TokenizerConfig, TransformerConfig
from actvar_convert.models.model import Sampling

REPOSITORY = "FoundationVision/var"
TOKENIZER_FILE = "vae_ch160v4096z32.pth"

SIDES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SIDES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)

_DEPTHS = (16, 20, 24, 30, 36)

_CACHE_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)

_SAMPLING = Sampling(cfg=1.5, top_k=900, top_p=0.96)


class OfficialFiles(NamedTuple):
    """Where the hub's files of a model lie on this machine, and the revision (commit) they are of."""

    transformer: Path
    tokenizer: Path | None
    revision: str


def official_names() -> tuple[str, ...]:
    """Names of the published models."""
    return tuple(f"var-d{depth}" for depth in _DEPTHS)


def official_config(name: str) -> tuple[TransformerConfig, TokenizerConfig]:
    """Shapes of a published model and of its tokenizer; needs neither weights nor network.

    Raises:
        InputError: no published model has this name.
    """
    if name not in official_names():
        raise InputError(f"no published model is called {name!r}; there are {', '.join(official_names())}.")
    depth = int(name.removeprefix("var-d"))
    sides = SIDES_512 if depth == 36 else SIDES_256
    transformer = TransformerConfig(
        depth=depth,
        width=64 * depth,
        heads=depth,
        hidden=4 * 64 * depth,
        sides=sides,
        vocab=4096,
        z_channels=32,
        classes=1000,
        shared_adaln=depth == 36,
    )
    tokenizer = TokenizerConfig(
        ch=160, ch_mult=(1, 1, 2, 2, 4), res_blocks=2, vocab=4096, z_channels=32, sides=sides, residual_ratio=0.5
    )
    return transformer, tokenizer


def official_depth(transformer: TransformerConfig) -> int | None:
    """Depth of the published model that has this width, classes, codebook and pyramid; None when there is none."""
    for name in official_names():
        config, _ = official_config(name)
        same = ("width", "hidden", "sides", "vocab", "z_channels", "classes", "shared_adaln")
        if all(getattr(config, field) == getattr(transformer, field) for field in same):
            return config.depth
    return None


def published_sampling(transformer: TransformerConfig) -> Sampling | None:
    """The sampling of the published figures, for a transformer of a published shape; None for any other."""
    return _SAMPLING if official_depth(transformer) == transformer.depth else None


def fetch_official(name: str, tokenizer: bool = True, revision: str | None = None) -> OfficialFiles:
    """Downloads the files of a published model, or takes them from the cache.

    Args:
        name: one of ``official_names()``.
        tokenizer: whether its tokenizer is wanted too; it is of the same revision.
        revision: commit of the repository; the latest by default.

    Raises:
        InputError: no such model, or the hub cannot be reached and the files are not in the cache.
    """
    official_config(name)
    weights = _fetch(name, name.replace("-", "_") + ".pth", revision)
    revision = weights.parent.name  # the cache keeps files under snapshots/COMMIT
    return OfficialFiles(weights, _fetch(name, TOKENIZER_FILE, revision) if tokenizer else None, revision)


def _fetch(name: str, file: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return Path(huggingface_hub.hf_hub_download(REPOSITORY, file, revision=revision))
    except Exception as error:  # of which class depends on the client's version: of requests, httpx, hf_xet, ...
        of = f" at revision {revision[:12]}" if revision else ""
        needed = f"{name} needs {file} of huggingface.co/{REPOSITORY}{of}"
        cause, place = os_error_number(error), getattr(error, "filename", None)
        network = isinstance(error, OSError) and place is None and cause in (errno.EACCES, errno.EPERM)
        if cause in _CACHE_TROUBLE and not network:
            problem = explained("write", place or huggingface_hub.constants.HF_HUB_CACHE, cause, str(error)).message
            raise InputError(f"{needed}: {problem} The variable HF_HOME names the folder of the cache.") from error
        what = type(error).__name__
        if not isinstance(error, HfHubHTTPError | EntryNotFoundError) and str(error):
            what += f": {str(error).splitlines()[0][:200]}"
        raise InputError(
            f"{needed}, which is not in the cache and cannot be fetched ({what}). Connect to the network (unset "
            f"HF_HUB_OFFLINE if it is set), or download {name.replace('-', '_')}.pth and {TOKENIZER_FILE} elsewhere "
            f"and give their paths, the second {AS_VAE}."
        ) from error
