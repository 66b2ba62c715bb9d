"""What the files of a VAR look like: names of its tensors, its configuration by their shapes, the published models.

No other module here knows a family's names. Modules are named as in the reference (FoundationVision/VAR), so the map is
short: wrappers and nesting are removed, and the tokenizer's phi convolutions, which the reference stores in three ways,
become one list. Every number of a configuration is taken from several tensors and decided by majority, so that one
mis-shaped tensor is reported as such and does not change the reading of all others.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from actvar_convert.errors import CheckpointError, InputError
from actvar_convert.models.base import Sampling, Schedule
from actvar_convert.models.var.config import MAX_BLOCKS, MAX_TOKENS, TokenizerConfig, TransformerConfig
from actvar_convert.recipe.shape import Shape

SIDES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SIDES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)

_DEPTHS = (16, 20, 24, 30, 36)
_SAMPLING = Sampling(cfg=1.5, top_k=900, top_p=0.96)

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of names that data parallelism, torch.compile, FSDP and activation checkpointing leave behind."""

OPTIONAL_SUFFIXES = ("attn_bias_for_masking", "lvl_1L", "zero_k_bias", "ema_vocab_hit_SV")
"""Buffers that follow from the configuration or are statistics of training; files may leave them out."""

DERIVED_SUFFIXES = ("attn_bias_for_masking", "lvl_1L")
"""Buffers that are always made from the configuration."""

_BOOKKEEPING = re.compile(
    r"(?:^|\.)(?:n_averaged|num_updates|decay|initted|step|global_step|epoch|iteration|num_batches_tracked"
    r"|total_ops|total_params)$|(?:^|[._])cached?(?:[._]|$)"
)
"""Names of what averaging, training loops and profilers leave beside weights, and of caches; no model needs them."""

_TRANSFORMER = re.compile(
    r"^(?P<prefix>(?:.*\.)?)(?P<name>word_embed\.weight|class_emb\.weight|pos_start|pos_1LC|lvl_embed\.weight"
    r"|blocks\.0\.attn\.mat_qkv\.weight|blocks\.0\.ffn\.fc1\.weight|head_nm\.ada_lin\.1\.weight)$"
)
_TOKENIZER = re.compile(
    r"^(?P<prefix>(?:.*\.)?)(?P<name>quantize\.embedding\.weight|post_quant_conv\.weight|quant_conv\.weight"
    r"|encoder\.conv_in\.weight|decoder\.conv_out\.weight|quantize\.ema_vocab_hit_SV)$"
)


class Names(NamedTuple):
    """By which names a family's models are found in files.

    Attributes:
        family: its name.
        transformer, tokenizer: telling names with the prefix in front of them (groups ``prefix``, ``name``).
    """

    family: str
    transformer: re.Pattern[str]
    tokenizer: re.Pattern[str]


VAR_NAMES = Names("var", _TRANSFORMER, _TOKENIZER)

_PHI = re.compile(r"^quantize\.quant_resi\.(?:qresi_ls\.)?(?P<index>\d+)\.(?P<leaf>weight|bias)$")
_ENOUGH = 4


class Parts(NamedTuple):
    """Transformer and tokenizer of a checkpoint, each None if the checkpoint has none.

    Attributes:
        rest: names that belong to neither.
        notes: what was chosen if there was a choice, one sentence each.
        family: whose names they have.
    """

    transformer: dict[str, Tensor] | None
    tokenizer: dict[str, Tensor] | None
    rest: list[str]
    notes: list[str]
    family: str = "var"


def strip_wrappers(name: str) -> str:
    """A name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def split_parts(tensors: Mapping[str, Tensor], weights: str | None = None, names: Names = VAR_NAMES) -> Parts:
    """Finds the transformer and the tokenizer among the tensors of a checkpoint, at any depth of nesting.

    Args:
        tensors: by name; meta tensors will do.
        weights: which transformer if there are several, and which tokenizer: the prefix of its names, or a part of it
            ("ema"). Whatever has just one kind of this name is meant.
        names: of the family that is looked for.

    Raises:
        CheckpointError: two tensors have the same name once wrappers are removed.
        InputError: no weights, or several, have the name that is given.
    """
    clean: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = strip_wrappers(name)
        if short in clean:
            raise CheckpointError(f"the checkpoint has two tensors for {short}. Save the model's state_dict alone.")
        clean[short] = tensor
    notes: list[str] = []
    found = {"transformer": _prefixes(names.transformer, clean), "tokenizer": _prefixes(names.tokenizer, clean)}
    prefixes = {kind: _choose(there, f"{kind}s", notes) for kind, there in found.items()}
    if weights is not None:
        chosen = {kind: _named(there, weights) for kind, there in found.items()}
        asked = "transformer" if found["transformer"] else "tokenizer"
        if len(chosen[asked]) != 1:
            there = ", ".join(map(_shown, chosen[asked] or found[asked])) or "none"
            how_many = "several" if chosen[asked] else "no"
            raise InputError(
                f"there are {how_many} weights called {weights!r}; give one of these with --weights: {there}."
            )
        notes.clear()
        for kind, matching in chosen.items():
            if len(matching) == 1:
                prefixes[kind] = matching[0]
            else:
                _choose(found[kind], f"{kind}s", notes)
    owners = sorted({prefix for there in found.values() for prefix in there}, key=len, reverse=True)
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
    extra = [name for part in (transformer, tokenizer) for name in part or {} if _BOOKKEEPING.search(name)]
    if extra:
        notes.append(f"left out, since no model needs it: {', '.join(extra[:3])}{', ...' if len(extra) > 3 else ''}")
    for part in (transformer, tokenizer):
        for name in extra:
            if part is not None:
                part.pop(name, None)
    return Parts(transformer, None if tokenizer is None else _unify_phis(tokenizer), rest, notes, names.family)


def _shown(prefix: str) -> str:
    """A prefix as people give it; what is at the top of a file is called "."."""
    return prefix.rstrip(".") or "."


def _named(prefixes: list[str], name: str) -> list[str]:
    """The prefixes that a name means: the one that it is, else those with it as a part, else as a word of a part."""
    wanted = name.strip(".").lower()
    whole = [prefix for prefix in prefixes if prefix.strip(".").lower() == wanted]
    parts = [prefix for prefix in prefixes if wanted in prefix.lower().split(".")]
    words = [prefix for prefix in prefixes if wanted in re.split(r"[._]", prefix.lower())]
    return whole or (parts or words if wanted else [])


def _prefixes(pattern: re.Pattern[str], names: Iterable[str]) -> list[str]:
    """Prefixes under which enough of the telling names of a model occur."""
    hits: dict[str, int] = {}
    for name in names:
        match = pattern.match(name)
        if match:
            hits[match["prefix"]] = hits.get(match["prefix"], 0) + 1
    return sorted(prefix for prefix, count in hits.items() if count >= _ENOUGH)


def _choose(prefixes: list[str], what: str, notes: list[str]) -> str | None:
    """The model that was trained, not an average of it: the shortest prefix without "ema"."""
    if not prefixes:
        return None
    ordered = sorted(prefixes, key=lambda prefix: ("ema" in prefix.lower(), len(prefix), prefix))
    if len(ordered) > 1:
        others = ", ".join(map(_shown, ordered[1:]))
        notes.append(
            f"of {len(ordered)} {what} in the file {_shown(ordered[0])!r} was taken; --weights (in a recipe "
            f"shape.weights) chooses another: {others}"
        )
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


def reference_tokenizer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tokenizer's tensors as the reference names them: a single phi convolution is no list there."""
    lists = {match["index"] for match in map(_PHI.match, tensors) if match}
    if len(lists) != 1:
        return dict(tensors)
    return {name.replace(".qresi_ls.0.", ".qresi."): tensor for name, tensor in tensors.items()}


DEFAULT_RESIDUAL_RATIO = 0.5
_HEAD_DIM = 64

_USUAL_CLASSES = 1000
"""Of the published models; taken for a file that lacks the only tensor that tells, to look at the rest of it."""

GIVE_HEADS = 'give them with --shape heads=N (shape in a recipe), or in a config.json beside the file: {"heads": N}'
GIVE_SIDES = (
    "give the side of every scale with --shape sides=1-2-3-... (shape in a recipe), or in a config.json beside the "
    'file: {"sides": [1, 2, 3, ...]}'
)


class Told(NamedTuple):
    """What no tensor of a tokenizer tells; None: nobody said."""

    residual_ratio: float | None = None
    using_znorm: bool | None = None


class TokenizerShape(NamedTuple):
    """What the tensors of a VQVAE tell; the pyramid is known to its transformer alone.

    Attributes:
        phis: phi convolutions; 0: none, the reference's ``quant_resi=0``.
        quant_kernel: of the convolutions around the code, the reference's ``quant_conv_ks``.
        scales: number of scales; None if the file does not say.
    """

    ch: int
    ch_mult: tuple[int, ...]
    res_blocks: int
    vocab: int
    z_channels: int
    phis: int
    quant_kernel: int
    scales: int | None

    @property
    def downsampling(self) -> int:
        """Pixels per side of a token of the finest scale."""
        return int(2 ** (len(self.ch_mult) - 1))

    def config(self, sides: Sequence[int], told: Told) -> TokenizerConfig:
        """The configuration with the pyramid of a transformer.

        Raises:
            CheckpointError: the values do not make a tokenizer, or contradict what was told.
        """
        if told.residual_ratio and not self.phis:
            raise CheckpointError(
                f"the tokenizer has no phi convolutions (quantize.quant_resi), and their share, residual_ratio, was "
                f"given as {told.residual_ratio}. Get the file from its source again, or leave residual_ratio out."
            )
        usual = DEFAULT_RESIDUAL_RATIO if self.phis else 0.0
        try:
            return TokenizerConfig(
                ch=self.ch,
                ch_mult=self.ch_mult,
                res_blocks=self.res_blocks,
                vocab=self.vocab,
                z_channels=self.z_channels,
                sides=tuple(sides),
                residual_ratio=usual if told.residual_ratio is None else told.residual_ratio,
                phis=self.phis,
                quant_kernel=self.quant_kernel,
                using_znorm=bool(told.using_znorm),
            )
        except ValidationError as error:
            raise CheckpointError("the tokenizer's shapes contradict each other:", messages(error)) from error


def messages(error: ValidationError) -> list[str]:
    """The problems that pydantic found, one sentence each."""
    return [
        ": ".join(filter(None, (".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, "))))
        for item in error.errors()
    ]


def infer_transformer(
    tensors: Mapping[str, Tensor], given: Shape, hints: Mapping[str, Any] | None = None
) -> TransformerConfig:
    """Configuration of a VAR transformer from its tensors (values are read of ``lvl_1L`` alone).

    Args:
        tensors: by their names in the reference; meta tensors will do.
        given: what is known of the shape.
        hints: the config.json beside the file, as the reference's hub mixin writes it, for what tensors do not tell.

    Raises:
        CheckpointError: something cannot be read from the file or contradicts what is given.
    """
    hints = hints or {}
    depth = count(tensors, r"blocks\.(\d+)\.", "blocks", MAX_BLOCKS)
    block = [f"blocks.{index}" for index in range(depth)]
    vote = Votes(tensors)
    width = vote(
        "width", ("class_emb.weight", 1), ("lvl_embed.weight", 1), ("pos_start", 2), ("pos_1LC", 2), ("head.weight", 1),
        *((f"{name}.attn.proj.weight", 0) for name in block),
    )  # fmt: skip
    hidden = vote("FFN hidden neurons", *((f"{b}.ffn.fc1.{leaf}", 0) for b in block for leaf in ("weight", "bias")))
    vocab = vote("codebook size", ("head.bias", 0), ("head.weight", 0))
    z_channels = _other_side(vote, "word_embed.weight", width)
    classes = vote("classes", ("class_emb.weight", 0)) - 1
    scales = vote("scales", ("lvl_embed.weight", 0))
    total = vote("tokens", ("pos_1LC", 1), ("lvl_1L", 1))
    normalised = vote.any(f"{name}.attn.scale_mul_1H11" for name in block)
    vote.finish()
    read_heads = vote("heads", *((f"{name}.attn.scale_mul_1H11", 1) for name in block)) if normalised else None
    vote.finish()
    try:
        return TransformerConfig(
            depth=depth,
            width=width,
            heads=_heads(width, read_heads, given, hints),
            hidden=hidden,
            sides=_sides(total, scales, tensors.get("lvl_1L"), given, hints),
            vocab=vocab,
            z_channels=z_channels,
            classes=classes,
            shared_adaln="shared_ada_lin.1.weight" in tensors or vote.any(f"{name}.ada_gss" for name in block),
            l2_attention=normalised,
            norm_eps=hints.get("norm_eps", 1e-6),
        )
    except ValidationError as error:
        raise CheckpointError("the transformer's shapes contradict each other:", messages(error)) from error


def infer_incomplete(
    tensors: Mapping[str, Tensor], given: Shape, hints: Mapping[str, Any]
) -> tuple[TransformerConfig, list[str]]:
    """The configuration, even without the only tensor that tells the classes; and what was assumed, a sentence each."""
    notes = []
    if "class_emb.weight" not in tensors:
        tensors = {**tensors, "class_emb.weight": torch.empty(_USUAL_CLASSES + 1, device="meta")}
        notes.append(f"class_emb.weight is missing, and nothing else tells the classes; {_USUAL_CLASSES} is a guess")
    config = infer_transformer(tensors, given, hints)
    return config, notes + assumed_of_transformer(config, tensors, given, hints)


def assumed_of_transformer(
    config: TransformerConfig, tensors: Mapping[str, Tensor], given: Shape, hints: Mapping[str, Any]
) -> list[str]:
    """What neither tensors nor anybody told of a transformer, and was assumed, a sentence each."""
    notes = []
    if "lvl_1L" not in tensors and given.sides is None and _hint(hints, "sides", "patch_nums")[1] is None:
        notes.append(f"the pyramid {_list(config.sides)} was inferred from its size (lvl_1L is absent)")
    if not config.l2_attention and given.heads is None and _hint(hints, "heads", "num_heads")[1] is None:
        notes.append(f"{config.heads} heads follow the rule width / {_HEAD_DIM}; if they are others, {GIVE_HEADS}")
    return notes


def assumed_of_tokenizer(tokenizer: TokenizerConfig, told: Told, transformer: TransformerConfig) -> list[str]:
    """The same of a tokenizer; of the published models everything is known."""
    if told.residual_ratio is not None:
        return []
    if not tokenizer.phis:
        return [
            "the tokenizer has no phi convolutions, as with quant_resi=0 in the reference; if it should, get it again"
        ]
    if official_depth(transformer) is not None:
        return []
    ratio = f"{tokenizer.residual_ratio:g}"
    return [
        f"no tensor tells residual_ratio; {ratio}, the reference's, was taken (--shape residual_ratio=N gives another)"
    ]


def missing_blocks(config: TransformerConfig, hints: Mapping[str, Any]) -> tuple[int, str] | None:
    """The blocks that a model should have if its file ends before the last one, and a clause on what says so.

    The tensors cannot tell: a file whose last blocks are missing looks like one of fewer blocks. The config.json beside
    it does, and comes before the published model of the same width, classes, codebook and pyramid. None: nothing does.
    """
    said = hints.get("depth")
    if said is not None and type(said) is not int:
        raise CheckpointError(f"config.json gives {said!r} as depth; a whole number was expected. Correct it.")
    if said is not None and said <= MAX_BLOCKS:
        return (said, f"its config.json says {said}") if said > config.depth else None
    published = official_depth(config)
    if published is None or published <= config.depth:
        return None
    return published, f"VAR-d{published}, which is of this width and equal in all else, has {published}"


class Levels(NamedTuple):
    """The resolutions of a tokenizer's convolutions, which both families have alike.

    Attributes:
        ch: base channels.
        widths: channels of every resolution.
        blocks: residual blocks at each.
    """

    ch: int
    widths: list[int]
    blocks: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], vote: Votes) -> Levels:
        """By the shapes of convolutions and norms; what does not agree is said by ``vote.finish``."""
        levels = count(tensors, r"encoder\.down\.(\d+)\.", "resolutions of the encoder", 16)
        blocks = count(tensors, r"encoder\.down\.\d+\.block\.(\d+)\.", "residual blocks of the encoder", 64)
        ch = vote(
            "base channels", ("encoder.conv_in.bias", 0), ("encoder.conv_in.weight", 0), ("decoder.conv_out.weight", 1)
        )
        widths = [
            vote(
                f"channels at resolution {level}",
                *(
                    (f"{side}.{level}.block.{index}.{leaf}", 0)
                    for side in ("encoder.down", "decoder.up")
                    for index in range(blocks)
                    for leaf in ("norm2.weight", "conv2.bias")
                ),
            )
            for level in range(levels)
        ]
        return cls(ch, widths, blocks)

    @property
    def multipliers(self) -> tuple[int, ...]:
        """Channels of every resolution as multiples of the base channels.

        Raises:
            CheckpointError: they are none.
        """
        if any(width % self.ch for width in self.widths):
            raise CheckpointError(
                f"the tokenizer's channels {self.widths} are not multiples of its base channels {self.ch}."
            )
        return tuple(width // self.ch for width in self.widths)


def infer_tokenizer(tensors: Mapping[str, Tensor]) -> TokenizerShape:
    """Shape of a VAR VQVAE from its tensors; meta tensors will do.

    Raises:
        CheckpointError: something cannot be read from the file.
    """
    vote = Votes(tensors)
    phi = r"quantize\.quant_resi\.qresi_ls\.(\d+)\."
    phis = count(tensors, phi, "phi convolutions", 64) if any(re.match(phi, name) for name in tensors) else 0
    levels = Levels.of(tensors, vote)
    vocab = vote("codebook size", ("quantize.embedding.weight", 0), ("quantize.ema_vocab_hit_SV", 1))
    z_channels = vote(
        "code channels", ("quantize.embedding.weight", 1), ("quant_conv.bias", 0), ("encoder.conv_out.bias", 0),
        ("post_quant_conv.bias", 0), ("decoder.conv_in.weight", 1),
    )  # fmt: skip
    kernel = vote("kernel of the convolutions around the code", *(
        (f"{name}.weight", side) for name in ("quant_conv", "post_quant_conv") for side in (2, 3)
    ))  # fmt: skip
    vote.finish()
    hits = tensors.get("quantize.ema_vocab_hit_SV")
    scales = None if hits is None else hits.shape[0]
    return TokenizerShape(levels.ch, levels.multipliers, levels.blocks, vocab, z_channels, phis, kernel, scales)


def told_of_tokenizer(given: Shape, hints: Mapping[str, Any]) -> Told:
    """What is known of a tokenizer beside its tensors: as given, else as a config.json says by our name or, among
    ``vae_kwargs``, by the reference's.

    Raises:
        CheckpointError: the config.json gives something of another kind.
    """
    arguments = hints.get("vae_kwargs")
    reference = arguments if isinstance(arguments, Mapping) else {}
    ratio: Any = given.residual_ratio
    if ratio is None:
        for name, said in (("residual_ratio", hints), ("quant_resi", reference)):
            ratio = said.get(name) if ratio is None else ratio
            if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, int | float)):
                raise CheckpointError(f"config.json gives {ratio!r} as {name}; a number was expected. Correct it.")
    znorm: Any = given.using_znorm
    for said in (hints, reference):
        znorm = said.get("using_znorm") if znorm is None else znorm
    if znorm not in (None, True, False) or (isinstance(znorm, int) and not isinstance(znorm, bool)):
        raise CheckpointError(f"config.json gives {znorm!r} as using_znorm; true or false was expected. Correct it.")
    return Told(None if ratio is None else abs(float(ratio)), znorm)


def agreement_problems(config: TransformerConfig, shape: TokenizerShape) -> list[str]:
    """Where transformer and tokenizer contradict each other, with both values."""
    pairs = (
        ("codebook size", config.vocab, shape.vocab),
        ("code channels", config.z_channels, shape.z_channels),
        ("scales", len(config.sides), len(config.sides) if shape.scales is None else shape.scales),
    )
    return [f"{what}: transformer {ours}, tokenizer {theirs}" for what, ours, theirs in pairs if ours != theirs]


class Votes:
    """Sizes of tensors by majority; collects what nothing tells, to be raised by ``finish`` all at once."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.problems: list[str] = []

    def __call__(self, what: str, *places: tuple[str, int]) -> int:
        """The commonest size at the given (name, dimension) places; -1 when there is none."""
        sizes = [self.shapes[n][d] for n, d in places if n in self.shapes and d < len(self.shapes[n])]
        if not sizes:
            names = list(dict.fromkeys(name for name, _ in places))
            self.problems.append(f"{what}: {' and '.join(names[:3])} would tell, and are missing")
            return -1
        return Counter(sizes).most_common(1)[0][0]

    def any(self, names: Iterable[str]) -> bool:
        return any(name in self.shapes for name in names)

    def finish(self) -> None:
        if self.problems:
            raise CheckpointError("the shape of the model cannot be read from its tensors:", self.problems)


def _other_side(vote: Votes, name: str, known: int) -> int:
    """Input size of a linear layer whose output size is known, even if its weight is stored transposed."""
    shape = vote.shapes.get(name, ())
    if len(shape) == 2 and shape[0] != known and shape[1] == known:
        return shape[0]
    return vote(f"columns of {name}", (name, 1))


def count(tensors: Mapping[str, Tensor], pattern: str, what: str, limit: int) -> int:
    """One more than the largest index that occurs in names of this pattern."""
    found = {int(match[1][:9]) for match in map(re.compile(pattern).match, tensors) if match}
    if not found:
        raise CheckpointError(f"the file has no {what}: it is incomplete. Get it from its source again.")
    count = max(found) + 1
    if count > limit or len(found) < count / 2:
        raise CheckpointError(
            f"the file has {len(found)} {what}, the last of index {count - 1}: most are missing. Get it again."
        )
    return count


def _hint(hints: Mapping[str, Any], *names: str) -> tuple[str, Any]:
    """The first of several names that a config.json has, and its value there; of none the first, and None."""
    name = next((name for name in names if hints.get(name) is not None), names[0])
    return name, hints.get(name)


def _heads(width: int, read: int | None, given: Shape, hints: Mapping[str, Any]) -> int:
    if read is not None:
        if given.heads not in (None, read):
            raise CheckpointError(f"heads was given as {given.heads}, the file has {read}. Leave it out.")
        return read
    name, said = _hint(hints, "heads", "num_heads")
    heads = said if given.heads is None else given.heads
    if heads is not None:
        if type(heads) is not int:
            raise CheckpointError(f"config.json gives {heads!r} as {name}; a whole number was expected. Correct it.")
        return heads
    if width % _HEAD_DIM:
        raise CheckpointError(
            f"the number of attention heads cannot be read from the file (attention is not L2-normalised, and width "
            f"{width} is not a multiple of {_HEAD_DIM}); {GIVE_HEADS}."
        )
    return width // _HEAD_DIM


def _sides(total: int, scales: int, level: Tensor | None, shape: Shape, hints: Mapping[str, Any]) -> tuple[int, ...]:
    if total > MAX_TOKENS:
        raise CheckpointError(f"the file claims pyramids of {total:,} tokens; at most {MAX_TOKENS:,} are supported.")
    read = _read_levels(level, total, scales)
    name, said = _hint(hints, "sides", "patch_nums")
    given = shape.sides or (None if read else said)
    if given is not None:
        if not isinstance(given, Sequence) or not all(type(side) is int for side in given):
            raise CheckpointError(
                f"config.json gives {given!r} as {name}; a list of whole numbers was expected. Correct it."
            )
        sides = tuple(given)
        if len(sides) != scales or sum(side * side for side in sides) != total or (read and sides != read):
            raise CheckpointError(
                f"the pyramid was given as {_list(sides)} ({len(sides)} scales, {sum(s * s for s in sides)} tokens); "
                f"the file has {scales} scales and {total} tokens{f', {_list(read)}' if read else ''}."
            )
        return sides
    if read:
        return read
    for standard in (SIDES_256, SIDES_512):
        if (Schedule.of_sides(standard).total, len(standard)) == (total, scales):
            return standard
    raise CheckpointError(
        f"the token pyramid cannot be read from the file: lvl_1L is absent, and {scales} scales with {total} tokens "
        f"are none of the published pyramids; {GIVE_SIDES}."
    )


def _read_levels(level: Tensor | None, total: int, scales: int) -> tuple[int, ...]:
    """Sides of the scales from the level of every token; empty when there are no values to read."""
    if level is None or level.is_meta or level.numel() != total:
        return ()
    counts = torch.bincount(level.flatten().long().clamp(0, MAX_TOKENS), minlength=scales).tolist()
    sides = tuple(math.isqrt(count) for count in counts)
    sorted_levels = bool((level.flatten().diff() >= 0).all())
    if (
        len(counts) != scales
        or any(side * side != n for side, n in zip(sides, counts, strict=True))
        or not sorted_levels
    ):
        raise CheckpointError(
            f"lvl_1L does not describe square token maps: {_list(counts[:32])} tokens per scale. The file is damaged."
        )
    return sides


def _list(values: Iterable[int]) -> str:
    return ",".join(map(str, values))


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
