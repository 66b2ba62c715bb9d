"""Names of tensors: finding a transformer and a tokenizer in a checkpoint, and the names this package uses for them.

The names of the modules are those of the reference (FoundationVision/VAR), so the map is short: wrappers and nesting
are removed, and the tokenizer's phi convolutions, which the reference stores in three ways, become one list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from actvar_convert.errors import CheckpointError

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of names that data parallelism, torch.compile, FSDP and activation checkpointing leave behind."""

OPTIONAL_SUFFIXES = ("attn_bias_for_masking", "lvl_1L", "zero_k_bias", "ema_vocab_hit_SV")
"""Buffers that follow from the configuration or are statistics of training; files may leave them out."""

DERIVED_SUFFIXES = ("attn_bias_for_masking", "lvl_1L")
"""Buffers that are always made from the configuration."""

_TRANSFORMER = re.compile(
    r"^(?P<prefix>(?:.*\.)?)(?P<name>word_embed\.weight|class_emb\.weight|pos_start|pos_1LC|lvl_embed\.weight"
    r"|blocks\.0\.attn\.mat_qkv\.weight|blocks\.0\.ffn\.fc1\.weight|head_nm\.ada_lin\.1\.weight)$"
)
_TOKENIZER = re.compile(
    r"^(?P<prefix>(?:.*\.)?)(?P<name>quantize\.embedding\.weight|post_quant_conv\.weight|quant_conv\.weight"
    r"|encoder\.conv_in\.weight|decoder\.conv_out\.weight|quantize\.ema_vocab_hit_SV)$"
)
_PHI = re.compile(r"^quantize\.quant_resi\.(?:qresi_ls\.)?(?P<index>\d+)\.(?P<leaf>weight|bias)$")
_ENOUGH = 4

_ADDITIONS = {
    "ffn.permutation": "order of neurons",
    "ffn.inactive": "constants of inactive experts",
    "ffn.router": "routers",
    "gate": "token gates",
    "reconstruction": "reconstructions of skipped tokens",
}
"""What a sparse block has beside the dense one, by the beginning of its tensors' names."""


class Parts(NamedTuple):
    """Transformer and tokenizer of a checkpoint, each None where the checkpoint has none.

    Attributes:
        rest: names that belong to neither.
        notes: what was chosen where there was a choice, one sentence each.
    """

    transformer: dict[str, Tensor] | None
    tokenizer: dict[str, Tensor] | None
    rest: list[str]
    notes: list[str]


def strip_wrappers(name: str) -> str:
    """A name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def split_parts(tensors: Mapping[str, Tensor]) -> Parts:
    """Finds the transformer and the tokenizer among the tensors of a checkpoint, at any depth of nesting.

    Raises:
        CheckpointError: two tensors have the same name once wrappers are removed.
    """
    clean: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = strip_wrappers(name)
        if short in clean:
            raise CheckpointError(f"the checkpoint has two tensors for {short}. Save the model's state_dict alone.")
        clean[short] = tensor
    notes: list[str] = []
    prefixes = {
        "transformer": _choose(_prefixes(_TRANSFORMER, clean), "transformers", notes),
        "tokenizer": _choose(_prefixes(_TOKENIZER, clean), "tokenizers", notes),
    }
    owners = sorted({prefix for prefix in prefixes.values() if prefix is not None}, key=len, reverse=True)
    owned: dict[str, dict[str, Tensor]] = {owner: {} for owner in owners}
    rest = []
    for name, tensor in clean.items():
        owner = next((owner for owner in owners if name.startswith(owner)), None)
        if owner is None:
            rest.append(name)
        else:
            owned[owner][name.removeprefix(owner)] = tensor
    pick = {kind: None if prefix is None else owned[prefix] for kind, prefix in prefixes.items()}
    transformer, tokenizer = pick["transformer"], pick["tokenizer"]
    if transformer is not None and transformer is tokenizer:  # both at the top of one dictionary
        tokenizer = {n: t for n, t in transformer.items() if re.match(r"(encoder|decoder|quant|post_quant)", n)}
        transformer = {n: t for n, t in transformer.items() if n not in tokenizer}
    return Parts(transformer, None if tokenizer is None else _unify_phis(tokenizer), rest, notes)


def _prefixes(pattern: re.Pattern[str], names: Iterable[str]) -> list[str]:
    """Prefixes under which enough of the telling names of a model occur."""
    hits: dict[str, int] = {}
    for name in names:
        match = pattern.match(name)
        if match:
            hits[match["prefix"]] = hits.get(match["prefix"], 0) + 1
    return [prefix for prefix, count in hits.items() if count >= _ENOUGH]


def _choose(prefixes: list[str], what: str, notes: list[str]) -> str | None:
    """The model that was trained, not an average of it: the shortest prefix without "ema"."""
    if not prefixes:
        return None
    ordered = sorted(prefixes, key=lambda prefix: ("ema" in prefix, len(prefix), prefix))
    if len(ordered) > 1:
        others = ", ".join(repr(prefix) for prefix in ordered[1:])
        notes.append(f"of {len(ordered)} {what} in the file, {ordered[0]!r} was taken (the others: {others})")
    return ordered[0]


def _unify_phis(tokenizer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Phi convolutions as ``quantize.quant_resi.qresi_ls.N``; one that all scales share becomes a list of one."""
    renamed = {}
    for name, tensor in tokenizer.items():
        match = _PHI.match(name)
        if match:
            name = f"quantize.quant_resi.qresi_ls.{match['index']}.{match['leaf']}"
        elif name.startswith("quantize.quant_resi.qresi."):
            name = name.replace(".qresi.", ".qresi_ls.0.")
        renamed[name] = tensor
    return renamed


def sparse_addition(name: str) -> str | None:
    """What a tensor of a sparse transformer belongs to that a dense one does not have; None: the dense one has it."""
    match = re.match(r"blocks\.\d+\.(.+)$", name)
    if match is None:
        return None
    return next((what for start, what in _ADDITIONS.items() if f"{match[1]}.".startswith(f"{start}.")), None)


def reference_tokenizer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tokenizer's tensors as the reference names them: a single phi convolution is no list there."""
    lists = {match["index"] for match in map(_PHI.match, tensors) if match}
    if len(lists) != 1:
        return dict(tensors)
    return {name.replace(".qresi_ls.0.", ".qresi."): tensor for name, tensor in tensors.items()}


_GUESSES: tuple[tuple[str, str], ...] = (
    (r"blocks\.0\.ffn\.permutation", "the weights of an actvar-sparse folder; give the folder itself"),
    (r"body\.0\.weight\n(.*\n)*head\.weight", "the image classifier that measures generations"),
    (r"(model\.)?diffusion_model\.|cond_stage_model\.", "a latent diffusion model (Stable Diffusion)"),
    (r"down_blocks\.\d|up_blocks\.\d|time_embedding\.linear", "a diffusers U-Net or autoencoder"),
    (r"(single_)?transformer_blocks\.\d|x_embedder\.|t_embedder\.", "a diffusion transformer (DiT)"),
    (r".*lora_(A|B|up|down)", "a LoRA adapter, not a whole model"),
    (r"text_proj_for_sos|unregistered_blocks|cfg_uncond", "an Infinity model (text to image), a relative of VAR"),
    (r"(model\.)?(embed_tokens|layers\.\d+\.self_attn)|lm_head\.|transformer\.h\.\d|transformer\.wte", "an LLM"),
    (r"text_model\.|vision_model\.|visual\.", "a CLIP model"),
    (r"(bert\.|roberta\.)?encoder\.layer\.\d|shared\.weight", "a BERT or T5 model"),
    (r"cls_token|patch_embed\.proj", "a vision transformer (ViT)"),
    (r"layer1\.0\.conv1|layer1\.0\.bn1", "a ResNet"),
    (r"loss\.discriminator|encoder\.mid\.attn_1\.q\.", "a VQGAN (taming transformers), another kind of tokenizer"),
    (r"(.*\.)?exp_avg(_sq)?(\.|$)|state\.\d", "the state of an optimiser"),
)


def guess_model(names: Iterable[str]) -> str | None:
    """What kind of model the names of tensors belong to, in words; None when nothing is recognised."""
    text = "\n".join(sorted(strip_wrappers(name) for name in names))
    for pattern, what in _GUESSES:
        if re.search(rf"^{pattern}", text, flags=re.MULTILINE):
            return what
    return None
