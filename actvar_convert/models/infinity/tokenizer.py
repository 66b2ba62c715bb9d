"""The tokenizer of Infinity: images to pyramids of bits and back, by binary spherical codes (arXiv 2406.07548).

A code is the signs of a feature, divided by sqrt(d), so there is no codebook. Residuals shrink by averages over areas;
codes, and inputs of the next scale, are resized bilinearly. With ``patch`` 2 a token is a square of four codes.

Source: github.com/FoundationVision/Infinity, ``infinity/models/bsq_vae``, and ``bitwise_self_correction.py`` for what
the transformer is given.

Shapes: B images, h and w map of codes, d channels of a code, L tokens, D bits of a token (d patch^2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actvar_convert.errors import InputError
from actvar_convert.models.base import Schedule
from actvar_convert.models.infinity.config import BSQConfig
from actvar_convert.models.infinity.schedules import schedule_of
from actvar_convert.models.var.tokenizer import Decoder, Encoder


class BSQTokenizer(nn.Module):
    """Images in [-1, 1], red first, to bits [B, L, D] and back."""

    def __init__(self, config: BSQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, attention=False)
        self.decoder = Decoder(config, attention=False)

    def _codes(self, schedule: Schedule, scale: int) -> tuple[int, int]:
        """The map (h, w) of the codes of a scale."""
        h, w = schedule.maps[scale]
        return h * self.config.patch, w * self.config.patch

    def features(self, image_B3HW: Tensor) -> Tensor:
        """Unquantised features [B, d, h, w]."""
        out: Tensor = self.encoder(image_B3HW)
        return out

    def contribution(self, tokens: Tensor, scale: int, schedule: Schedule) -> Tensor:
        """What the bits [B, L_s, D] of one scale add to the feature map: [B, d, h, w] of the finest map."""
        signs = (2.0 * tokens - 1) / self.config.z_channels**0.5
        grid = signs.transpose(1, 2).unflatten(2, schedule.maps[scale])
        if self.config.patch > 1:
            grid = F.pixel_shuffle(grid, self.config.patch)
        full = self._codes(schedule, -1)
        return grid if grid.shape[2:] == full else F.interpolate(grid, size=full, mode="bilinear")

    def _row(self, grid_Bdhw: Tensor) -> Tensor:
        """A map of codes [B, d, h, w] as tokens [B, L_s, D]."""
        if self.config.patch > 1:
            grid_Bdhw = F.pixel_unshuffle(grid_Bdhw, self.config.patch)
        return grid_Bdhw.flatten(2).transpose(1, 2)

    def tokens(self, image_B3HW: Tensor, schedule: Schedule) -> Tensor:
        """Bits [B, L, D] int64 of images [B, 3, H, W] in [-1, 1].

        Raises:
            InputError: images of another size than that of the schedule.
        """
        if tuple(image_B3HW.shape[2:]) != self.image_size(schedule):
            raise InputError(
                f"images of {' x '.join(map(str, image_B3HW.shape[2:]))} pixels; these token maps are of "
                f"{' x '.join(map(str, self.image_size(schedule)))} (height x width)"
            )
        features, f_hat = self.features(image_B3HW), None
        found = []
        for scale in range(schedule.num_scales):
            rest = features if f_hat is None else features - f_hat
            if scale + 1 < schedule.num_scales:
                rest = F.interpolate(rest, size=self._codes(schedule, scale), mode="area")
            found.append(self._row((rest > 0).float()).long())
            f_hat = self.accumulate(f_hat, found[-1], scale, schedule)
        return torch.cat(found, dim=1)

    def accumulate(self, f_hat: Tensor | None, tokens: Tensor, scale: int, schedule: Schedule) -> Tensor:
        """The feature map [B, d, h, w] with what the bits [B, L_s, D] of one scale add to it."""
        added = self.contribution(tokens, scale, schedule)
        return added if f_hat is None else f_hat + added

    def next_input(self, f_hat: Tensor, scale: int, schedule: Schedule) -> Tensor:
        """Input [B, L_s, D] of the transformer at a scale."""
        return self._row(F.interpolate(f_hat, size=self._codes(schedule, scale), mode="bilinear"))

    @property
    def decoder_dtype(self) -> torch.dtype:
        """Dtype of the decoder; the encoder decides about tokens and has its own."""
        return self.decoder.conv_in.weight.dtype

    def decode_features(self, f_Bdhw: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of an accumulated feature map [B, d, h, w]."""
        image: Tensor = self.decoder(f_Bdhw.to(self.decoder_dtype))
        return image.clamp(-1, 1)

    def encode(self, image_B3HW: Tensor, schedule: Schedule | Sequence[tuple[int, int]] | str) -> Tensor:
        """The same as ``tokens``; the schedule may be maps [(h, w), ...] or a name."""
        return self.tokens(image_B3HW, schedule_of(schedule))

    def decode(self, tokens: Tensor, schedule: Schedule | Sequence[tuple[int, int]] | str) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of bits [B, L, D]; the schedule as for ``encode``.

        Raises:
            InputError: so many tokens are no pyramid of the schedule.
        """
        schedule = schedule_of(schedule)
        if tokens.shape[1:] != (schedule.total, self.config.bits):
            raise InputError(
                f"bits of {list(tokens.shape[1:])}; a pyramid of this schedule has {[schedule.total, self.config.bits]}"
            )
        f_hat: Tensor | None = None
        for scale, own in enumerate(torch.split(tokens, list(schedule.lengths), dim=1)):
            f_hat = self.accumulate(f_hat, own, scale, schedule)
        assert f_hat is not None
        return self.decode_features(f_hat)

    @property
    def decoder_parts(self) -> list[nn.Module]:
        return [self.decoder]

    def images(self, f_hat: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], fp32, of an accumulated feature map."""
        return self.decode_features(f_hat).float().add_(1).mul_(0.5)

    def image_size(self, schedule: Schedule) -> tuple[int, int]:
        """Pixels (H, W) of an image."""
        h, w = schedule.maps[-1]
        return h * self.config.downsampling, w * self.config.downsampling
