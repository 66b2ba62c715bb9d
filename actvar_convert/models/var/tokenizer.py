"""The multi-scale VQVAE of VAR: image to residual token maps and back.

Parameter names are those of the reference (github.com/FoundationVision/VAR, ``models/vqvae.py``, ``basic_vae.py``,
``quant.py``), so official files load unchanged.

Shapes: B images, c channels of the code (z), h and w token map, V codebook size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actvar_convert.models.base import Schedule
from actvar_convert.models.var.config import TokenizerConfig

CHANNELS_LAST: tuple[str, ...] = ("cuda",)
"""Kinds of device whose convolutions read channels-last in 16-bit formats; on a CPU it was measured to gain nothing."""

FAST_DECODERS = {"cpu": (torch.bfloat16,), "cuda": (torch.bfloat16, torch.float16)}
"""Dtypes in which a decoder is taken to be faster than in fp32, by kind of device: on a CPU by a sixth, as
measured on ``fashion``; on a GPU not measured."""


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class Conv2d(nn.Conv2d):
    """A convolution in the memory layout that suits the device; parameters keep theirs."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if x.device.type in CHANNELS_LAST and x.element_size() == 2:
            weight = weight.contiguous(memory_format=torch.channels_last)  # the input follows the weight
        out: Tensor = self._conv_forward(x, weight, self.bias)
        return out


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions around a skip connection."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _group_norm(in_channels)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _group_norm(out_channels)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut: nn.Module = (
            Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return torch.add(self.nin_shortcut(x), h)


class AttnBlock(nn.Module):
    """Single-head self-attention over the positions of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _group_norm(channels)
        self.qkv = Conv2d(channels, 3 * channels, 1)
        self.proj_out = Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, C, H * W).transpose(-1, -2)
        q, k, v = qkv.contiguous().unbind(1)
        h = F.scaled_dot_product_attention(q, k, v, scale=C**-0.5)
        return torch.add(x, self.proj_out(h.transpose(-1, -2).reshape(B, C, H, W)))


class Downsample(nn.Module):
    """Halves the map with a strided convolution, padded on the right and below."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Doubles the map by nearest neighbours, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class _Level(nn.Module):
    """One resolution: residual blocks, attention at the coarsest, and the change of resolution."""

    def __init__(self, channels: Sequence[int], attention: bool) -> None:
        super().__init__()
        pairs = list(pairwise(channels))
        self.block = nn.ModuleList(ResnetBlock(a, b) for a, b in pairs)
        self.attn = nn.ModuleList(AttnBlock(b) for _, b in pairs) if attention else nn.ModuleList()

    downsample: Downsample
    upsample: Upsample

    def forward(self, h: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            h = block(h)
            if len(self.attn) > 0:
                h = self.attn[i](h)
        return h


class _Middle(nn.Module):
    def __init__(self, channels: int, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels) if attention else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(h)))
        return out


class Channels(Protocol):
    """Shape of a convolutional autoencoder, as ``TokenizerConfig`` states it."""

    @property
    def ch(self) -> int: ...

    @property
    def ch_mult(self) -> tuple[int, ...]: ...

    @property
    def res_blocks(self) -> int: ...

    @property
    def z_channels(self) -> int: ...


class Encoder(nn.Module):
    """Image [B, 3, H, W] to features [B, z, h, w]; with attention at the coarsest resolution, or without."""

    def __init__(self, config: Channels, attention: bool = True) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        last = len(widths) - 1
        self.conv_in = Conv2d(3, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[i - 1] if i else config.ch
            level = _Level([before] + [width] * config.res_blocks, attention=attention and i == last)
            if i != last:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = _Middle(widths[-1], attention)
        self.norm_out = _group_norm(widths[-1])
        self.conv_out = Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
            if hasattr(level, "downsample"):
                h = cast(_Level, level).downsample(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(h))))
        return out


class Decoder(nn.Module):
    """Features [B, z, h, w] to image [B, 3, H, W]; the way back of an ``Encoder``."""

    def __init__(self, config: Channels, attention: bool = True) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        last = len(widths) - 1
        self.conv_in = Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1], attention)
        levels: list[nn.Module] = []
        for i, width in enumerate(widths):
            before = widths[min(i + 1, last)]
            level = _Level([before] + [width] * (config.res_blocks + 1), attention=attention and i == last)
            if i:
                level.upsample = Upsample(width)
            levels.append(level)
        self.up = nn.ModuleList(levels)
        self.norm_out = _group_norm(widths[0])
        self.conv_out = Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
            if hasattr(level, "upsample"):
                h = cast(_Level, level).upsample(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class Phi(Conv2d):
    """Blend of a map with its 3x3 convolution: (1 - r) h + r conv(h), r the residual ratio."""

    def __init__(self, channels: int, residual_ratio: float) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.residual_ratio = residual_ratio

    def forward(self, h: Tensor) -> Tensor:
        return h * (1 - self.residual_ratio) + super().forward(h) * self.residual_ratio


class _SharedPhi(nn.Module):
    """A few phi convolutions shared among all scales: a scale uses the one whose tick is nearest to s / (S - 1).

    Without any a map stays as it is.
    """

    def __init__(self, channels: int, residual_ratio: float, phis: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(Phi(channels, residual_ratio) for _ in range(phis))
        margin = 1 / 3 / phis if phis == 4 else 1 / 2 / max(1, phis)
        self.ticks = torch.linspace(margin, 1 - margin, phis, dtype=torch.float64, device="cpu").tolist()

    def forward(self, h: Tensor, at: float) -> Tensor:
        if not self.ticks:
            return h
        nearest = min(range(len(self.ticks)), key=lambda i: abs(self.ticks[i] - at))
        out: Tensor = self.qresi_ls[nearest](h)
        return out


class MultiScaleQuantizer(nn.Module):
    """Residual quantisation of a feature map, scale by scale, with one codebook."""

    ema_vocab_hit_SV: Tensor

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.schedule, self.using_znorm = config.schedule, config.using_znorm
        self.embedding = nn.Embedding(config.vocab, config.z_channels)
        self.quant_resi = _SharedPhi(config.z_channels, config.residual_ratio, config.phis)
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(self.schedule.num_scales, config.vocab))

    def _at(self, scale: int) -> float:
        last = self.schedule.num_scales - 1
        return scale / last if last else 0.0

    def nearest(self, z_NC: Tensor) -> Tensor:
        """Index [N] of the codebook vector nearest to each row of ``z_NC``, by Euclidean distance or by direction."""
        weight = self.embedding.weight
        if self.using_znorm:
            return (F.normalize(z_NC, dim=-1) @ F.normalize(weight, dim=-1).T).argmax(1)
        distance = z_NC.square().sum(1, keepdim=True) + weight.square().sum(1)
        return torch.addmm(distance, z_NC, weight.T, alpha=-2).argmin(1)

    def contribution(self, scale: int, index_BL: Tensor) -> Tensor:
        """What the tokens [B, L_s] of one scale add to the feature map: [B, z, h, w] at the finest resolution."""
        side, full = self.schedule.maps[scale][0], self.schedule.maps[-1][0]
        h = self.embedding(index_BL).transpose(1, 2).reshape(len(index_BL), -1, side, side)
        if scale != self.schedule.num_scales - 1:
            h = F.interpolate(h, size=(full, full), mode="bicubic")
        out: Tensor = self.quant_resi(h, self._at(scale))
        return out

    def downsample(self, f_Bchw: Tensor, scale: int) -> Tensor:
        """The feature map [B, z, h, w] averaged to the map of one scale."""
        if scale == self.schedule.num_scales - 1:
            return f_Bchw
        side = self.schedule.maps[scale][0]
        return F.interpolate(f_Bchw, size=(side, side), mode="area")

    def encode(self, f_Bchw: Tensor) -> list[Tensor]:
        """Tokens of every scale, each [B, L_s] int64, of a feature map [B, z, h, w]."""
        rest = f_Bchw.detach().clone()
        tokens = []
        for scale in range(self.schedule.num_scales):
            z = self.downsample(rest, scale).permute(0, 2, 3, 1)
            index = self.nearest(z.reshape(-1, z.shape[-1])).view(len(z), -1)
            rest -= self.contribution(scale, index)
            tokens.append(index)
        return tokens

    def next_input(self, f_Bchw: Tensor, scale: int) -> Tensor:
        """Input [B, L_s, z] of the transformer at ``scale``, from the map accumulated over the earlier scales."""
        return self.downsample(f_Bchw, scale).flatten(2).transpose(1, 2)

    def accumulate(self, tokens: Sequence[Tensor]) -> Tensor:
        """The feature map [B, z, h, w] that the tokens of all scales add up to."""
        out = self.contribution(0, tokens[0])
        for scale in range(1, len(tokens)):
            out = out + self.contribution(scale, tokens[scale])
        return out


class VQVAE(nn.Module):
    """Tokenizer of VAR: images in [-1, 1] to token pyramids and back."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = MultiScaleQuantizer(config)
        side = config.quant_kernel
        self.quant_conv = Conv2d(config.z_channels, config.z_channels, side, padding=side // 2)
        self.post_quant_conv = Conv2d(config.z_channels, config.z_channels, side, padding=side // 2)

    @property
    def decoder_dtype(self) -> torch.dtype:
        """Dtype of the decoder and the convolution before it; all else decides about tokens and has its own."""
        return self.post_quant_conv.weight.dtype

    def features(self, image_B3HW: Tensor) -> Tensor:
        """Unquantised features [B, z, h, w] of images [B, 3, H, W] in [-1, 1]."""
        out: Tensor = self.quant_conv(self.encoder(image_B3HW))
        return out

    def encode(self, image_B3HW: Tensor) -> list[Tensor]:
        """Tokens of every scale, each [B, L_s] int64, of images [B, 3, H, W] in [-1, 1]."""
        return self.quantize.encode(self.features(image_B3HW))

    def decode_features(self, f_Bchw: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of an accumulated feature map [B, z, h, w]."""
        image: Tensor = self.decoder(self.post_quant_conv(f_Bchw.to(self.decoder_dtype)))
        return image.clamp(-1, 1)

    def decode(self, tokens: Sequence[Tensor]) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of tokens [B, L_s] of every scale."""
        return self.decode_features(self.quantize.accumulate(tokens))

    @property
    def decoder_parts(self) -> list[nn.Module]:
        return [self.decoder, self.post_quant_conv]

    def tokens(self, image_B3HW: Tensor, schedule: Schedule) -> Tensor:
        """Pyramids [B, L] int64 of images [B, 3, H, W] in [-1, 1]."""
        return torch.cat(self.encode(image_B3HW), dim=1)

    def accumulate(self, f_hat: Tensor | None, tokens: Tensor, scale: int, schedule: Schedule) -> Tensor:
        """The feature map [B, z, h, w] with what the tokens [B, L_s] of one scale add to it."""
        added = self.quantize.contribution(scale, tokens)
        return added if f_hat is None else f_hat + added

    def next_input(self, f_hat: Tensor, scale: int, schedule: Schedule) -> Tensor:
        """Input [B, L_s, z] of the transformer at a scale."""
        return self.quantize.next_input(f_hat, scale)

    def images(self, f_hat: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], fp32, of an accumulated feature map [B, z, h, w]."""
        return self.decode_features(f_hat).float().add_(1).mul_(0.5)

    def image_size(self, schedule: Schedule) -> tuple[int, int]:
        """Pixels (H, W) of an image."""
        return self.config.image_size, self.config.image_size
