"""Hostile files for every reader: damaged and made-up weights, configurations, recipes, images, statistics, states.

    python tools/hostile.py --cases 100000

A case is one file, or one file of a folder. It may be read, or refused by a message of ours. Anything else is a fault:
another exception, a file opened for writing, a program started, a pickle that looks up a name, code compiled from the
file, more memory than the file's size accounts for, more than a few seconds. Faults are counted, and --keep takes the
smallest file of each. Cases are made by hypothesis of valid files: by bytes, and by values within their structure.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from actvar_convert.errors import ActvarError
from actvar_convert.files.inspection import inspect_file
from actvar_convert.files.run_state import RunState, load_run_state, save_run_state
from actvar_convert.files.sparse_folder import load_sparse, save_sparse
from actvar_convert.files.tensors import digest_of, read_tensors, write_tensors, write_weights
from actvar_convert.measure.extractors import read_statistics
from actvar_convert.models.model import Model, fresh_sparse
from actvar_convert.models.var.config import TokenizerConfig, TransformerConfig
from actvar_convert.models.var.network import VARTransformer
from actvar_convert.models.var.tokenizer import VQVAE
from actvar_convert.plan import BlockPlan, SparsityPlan
from actvar_convert.recipe.load import dump_recipe, load_recipe
from actvar_convert.recipe.yaml_text import read_yaml
from actvar_convert.system.atomic import finish_commit
from actvar_convert.system.images import read_image

SECONDS = 5.0
"""For one case; the slowest honest one takes a tenth of it."""
MEMORY = 64 * 2**20
"""Bytes that a reader may take beside eight times the file's size: Python's own objects, and one picture."""
MARK = "hostile_payload"
"""Stands in everything that a file asks to be run."""

MUTANTS = 4
"""Cases that differ in a few bytes from each that hypothesis makes, which takes longer than reading it."""

FEATURES = 4
Draw = Callable[..., Any]


class Target(NamedTuple):
    """One reader.

    Attributes:
        seeds: valid files.
        place: where a case is written, within a folder of its own.
        read: reads it.
        made: strategies of whole files, beside bytes changed in the seeds.
        beside: a folder whose files stand beside the case.
        memory: bytes that it may take beside eight times the file's size.
    """

    seeds: list[bytes]
    place: str
    read: Callable[[Path], object]
    made: list[st.SearchStrategy[bytes]]
    beside: Path | None = None
    memory: int = MEMORY


# what files are made of

NUMBERS = [0, 1, -1, 2, 127, 128, 255, 256, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1]
NUMBERS += [2**63, 2**64 - 1, 2**64, -(2**31), -(2**63), 10**30]
WORDS = ["", "a", ".", "..", "../x", "/etc/passwd", "/tmp/x", "a/b", "a\\b", "C:\\x", "\0", "a\0b", "\ud800", "é" * 200]
WORDS += [
    "x" * 300,
    "nan",
    "null",
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "~",
    "$HOME",
    "%s{}",
]
WORDS += [
    "var",
    "F32",
    "F64",
    "BF16",
    "F16",
    "I64",
    "U8",
    "BOOL",
    "F8_E4M3",
    "C64",
    "F4",
    "folded",
    "__class__",
    "__proto__",
]
LEAVES: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(
        [*NUMBERS, *WORDS, None, True, False, 0.0, -0.0, 1e-320, 1e308, float("inf"), float("nan"), [], {}]
    ),
    st.integers(-(2**70), 2**70),
    st.text(max_size=8),
    st.lists(st.sampled_from(NUMBERS), max_size=4),
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


def damaged(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """A valid file with some of its bytes changed."""
    return st.builds(lambda data, number: changed(data, seeds, random.Random(number)), st.sampled_from(seeds), DICE)


DICE = st.integers(0, 2**32)


def changed(file: bytes, seeds: list[bytes], dice: random.Random) -> bytes:
    """A file with one to four changes: bits flipped, bytes cut, inserted, repeated or taken from another, counts."""
    data = bytearray(file)
    for _ in range(dice.randint(1, 4)):
        end = len(data)
        at = dice.choice([dice.randint(0, min(end, 256)), dice.randint(0, end), dice.randint(max(0, end - 256), end)])
        kind = dice.randrange(8)
        if kind == 0 and at < end:
            data[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = dice.randbytes(dice.randrange(16))
        elif kind == 3:
            del data[at : at + dice.randint(1, 64)]
        elif kind == 4:
            data[at:at] = data[at : at + dice.randint(1, 256)] * dice.randint(1, 20)
        elif kind == 5:
            other = dice.choice(seeds)
            data[at : at + 64] = other[dice.randrange(len(other)) :][: dice.randint(1, 512)]
        elif kind == 6:
            size = dice.choice([2, 4, 8])
            number = (dice.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(size, dice.choice(["little", "big"]))
            data[at : at + size] = number
        else:
            data[at : at + 1] = dice.randbytes(1)
    return bytes(data)


@st.composite
def tree(draw: Draw, value: Any) -> Any:
    """A value of JSON with some of its parts replaced, removed, renamed or added."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        node, steps = value, draw(st.integers(1, 5))
        for _ in range(steps):
            children = [key for key, child in _items(node) if isinstance(child, dict | list) and child]
            if not children or draw(st.integers(0, 3)) == 0:
                break
            node = node[draw(st.sampled_from(children))]
        keys = [key for key, _ in _items(node)]
        kind = draw(st.integers(0, 5))
        if not keys or kind == 5:
            if isinstance(node, dict):
                node[draw(st.sampled_from(WORDS) | st.text(max_size=5))] = draw(VALUES)
            else:
                node.append(draw(VALUES))
            continue
        key = draw(st.sampled_from(keys))
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[draw(st.sampled_from(WORDS))] = node.pop(key)
        elif kind == 2 and isinstance(node[key], list):
            node[key] = node[key] * draw(st.integers(0, 30))
        else:
            node[key] = draw(VALUES)
    return value if draw(st.integers(0, 19)) else draw(VALUES)


def _items(node: Any) -> list[tuple[Any, Any]]:
    return list(node.items()) if isinstance(node, dict) else list(enumerate(node))


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


DEEP = st.integers(10, 200_000).flatmap(
    lambda depth: st.sampled_from(
        [b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth, b"- " * min(depth, 5000)]
    )
)
LONG = st.sampled_from(
    [b"9" * 5000, b'{"format_version": ' + b"9" * 5000 + b"}", b'{"a": 1e99999}', b'"' + b"a" * 10**6, b"\xff"]
)


@st.composite
def safetensors_file(draw: Draw, seed_file: bytes) -> bytes:
    """A safetensors file whose header was changed in its structure, with a length that is right or made up."""
    size = int.from_bytes(seed_file[:8], "little")
    header, body = json.loads(seed_file[8 : 8 + size]), seed_file[8 + size :]
    text = draw(tree(header).map(_json) | DEEP.map(lambda inner: b'{"__metadata__": {"a": ' + inner))
    claimed = len(text) if draw(st.integers(0, 4)) else draw(st.sampled_from(NUMBERS)) % 2**64
    return claimed.to_bytes(8, "little") + text + body[: draw(st.sampled_from([len(body), 0, 1, len(body) // 2]))]


PAYLOADS = [
    ("os", "system", f"touch {MARK}"),
    ("posix", "system", f"touch {MARK}"),
    ("builtins", "eval", f"open('{MARK}', 'w')"),
    ("builtins", "exec", f"open('{MARK}', 'w')"),
    ("__builtin__", "eval", f"open('{MARK}', 'w')"),
    ("subprocess", "check_output", f"touch {MARK}"),
    ("torch", "load", MARK),
    ("torch.serialization", "load", MARK),
    ("torch._utils", "_rebuild_tensor_v2", MARK),
    ("torch.hub", "load", MARK),
    ("numpy", "load", MARK),
    ("importlib", "import_module", MARK),
    ("collections", "OrderedDict", MARK),
    ("actvar_convert.files.tensors", "write_tensors", MARK),
]


@st.composite
def pickled(draw: Draw) -> bytes:
    """A pickle that asks for a call, in any of the ways and protocols that there are."""
    module, name, argument = draw(st.sampled_from(PAYLOADS))
    protocol, way = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    text = f"X{''}".encode() + struct.pack("<I", len(argument)) + argument.encode()
    head = bytes([0x80, protocol]) if protocol > 1 else b""
    if way == 0:
        return head + f"c{module}\n{name}\n".encode() + b"(" + text + b"tR."
    if way == 1:
        return head + b"(" + f"S'{argument}'\ni{module}\n{name}\n.".encode()
    if way == 2:
        parts = (b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name))
        return b"\x80\x04" + b"".join(parts) + b"\x93(" + text + b"tR."
    if way == 3:
        return head + b"}" + b"X\x01\x00\x00\x00a" + f"c{module}\n{name}\n".encode() + b"(" + text + b"tRs."
    if way == 4:
        return head + f"c{module}\n{name}\n".encode() + b")\x81}b."
    return head + b"(" * draw(st.integers(1, 100_000)) + b"]" * draw(st.integers(0, 10_000)) + b"."


@st.composite
def torch_file(draw: Draw, seed_file: bytes) -> bytes:
    """A PyTorch file of which one record was replaced, removed, repeated, renamed or compressed."""
    with zipfile.ZipFile(io.BytesIO(seed_file)) as archive:
        records = [(record.filename, archive.read(record)) for record in archive.infolist()]
    graph = next(content for name, content in records if name.endswith("data.pkl"))
    chosen = draw(st.integers(0, len(records) - 1)) if draw(st.booleans()) else 0
    name, content = records[chosen]
    kind, method = draw(st.integers(0, 6)), zipfile.ZIP_STORED
    if kind <= 2:
        chosen = next(index for index, (own, _) in enumerate(records) if own.endswith("data.pkl"))
        name, content = records[chosen][0], draw(pickled() | damaged([graph]))
        records[chosen] = name, content
    elif kind == 3:
        method = draw(st.sampled_from([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
        records[chosen] = name, bytes(draw(st.sampled_from([10, 10**5, 10**7])))
    elif kind == 4:
        del records[chosen]
    elif kind == 5:
        records[chosen] = draw(st.sampled_from(["../x", "/x", "archive/../../x", "data.pkl", "x" * 200])), content
    else:
        records += [records[chosen]] * draw(st.integers(1, 3))
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as archive:
        warnings.simplefilter("ignore")  # about names that are there twice
        for name, content in records:
            archive.writestr(name, content, compress_type=method)
    return out.getvalue()


MUCH = bytes(5 * 10**7)


@st.composite
def npz_file(draw: Draw) -> bytes:
    """Statistics of images with odd headers, dtypes, shapes, pickled objects, or compressed to almost nothing."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, shape in (("mu.npy", (FEATURES,)), ("sigma.npy", (FEATURES, FEATURES))):
            kind = draw(st.integers(0, 5))
            claimed: Any = draw(st.lists(st.sampled_from(NUMBERS), max_size=4).map(tuple)) if kind == 1 else shape
            descr: Any = draw(
                st.sampled_from(["<f8", "<f4", "|O", "<U9", "<c16", "|V8", "<M8[s]", "<f2", "|b1", ">f8", "x", 3])
            )
            header = {"descr": descr if kind == 2 else "<f8", "fortran_order": False, "shape": claimed}
            text = (
                repr(header)
                if kind != 3
                else draw(st.sampled_from([f"open('{MARK}','w')", "{}", "[" * 9999, "(" * 90]))
            )
            text = text.ljust(118) + "\n"
            version = (
                draw(st.sampled_from([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"]))
                if kind == 4
                else b"\x01\x00"
            )
            size = struct.pack("<H" if version == b"\x01\x00" else "<I", len(text) % 2**16)
            values = np.eye(FEATURES).tobytes() if kind != 5 else draw(st.sampled_from([b"", b"1234567", MUCH]))
            if kind == 2 and draw(st.booleans()):
                values = draw(pickled())
            archive.writestr(name, b"\x93NUMPY" + version + size + text.encode("latin1") + values)
    return out.getvalue()


FLAT = [zlib.compress(bytes(size), 1) for size in (0, 100, 10**6, 5 * 10**7)]


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@st.composite
def png_file(draw: Draw) -> bytes:
    """A PNG that claims any size, depth and colours, with text, profiles and animation that unpack to much."""
    side = st.sampled_from([0, 1, 2, 16, 300, 5000, 20_000, 50_000, 2**31 - 1, 2**32 - 1])
    depth, colours = draw(st.sampled_from([1, 2, 4, 8, 16, 7])), draw(st.sampled_from([0, 2, 3, 4, 6, 5]))
    header = struct.pack(">IIBBBBB", draw(side), draw(side), depth, colours, 0, 0, draw(st.integers(0, 2)))
    much = draw(st.sampled_from(FLAT))
    extra = [(b"zTXt", b"a\0\0" + much), (b"iCCP", b"a\0\0" + much), (b"iTXt", b"a\0\1\0\0\0" + much)]
    extra += [
        (b"PLTE", bytes(draw(st.sampled_from([0, 3, 768, 769])))),
        (b"tRNS", b"\0" * 300),
        (b"acTL", b"\0\0\1\0" * 2),
    ]
    extra += [(b"eXIf", draw(st.binary(max_size=32))), (b"tEXt", b"a" * 100), (b"fcTL", b"\0" * 26)]
    chosen = draw(st.lists(st.sampled_from(extra), max_size=2))
    chunks = [(b"IHDR", header), *chosen, (b"IDAT", much), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


TAGS = [
    "!!python/object/apply:os.system",
    "!!python/object/new:os.system",
    "!!python/name:os.system",
    "!!python/module:os",
]
TAGS += [
    "!!int",
    "!!float",
    "!!bool",
    "!!null",
    "!!timestamp",
    "!!binary",
    "!!omap",
    "!!pairs",
    "!!set",
    "!!str",
    "!!map",
]
TAGS += ["!!seq", "!!merge", "!!value", "!x", "!<tag:yaml.org,2002:python/object/apply:eval>", "!"]
SCALARS = [
    "",
    "~",
    "x",
    "1",
    "1e-4",
    "0x10",
    "1_000",
    "9" * 5000,
    ".inf",
    "2001-01-01",
    "2001-99-99T99:99:99Z",
    "=",
    "<<",
]
SCALARS += [
    f"['touch {MARK}']",
    "{a: b}",
    "[1, 2]",
    "|\n    x",
    ">-\n    y",
    "'a",
    '"\\ud800"',
    '"\\x00"',
    "*a",
    "&a [*a]",
    "? x",
]
BILLION = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{','.join(['*' + a] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@st.composite
def yaml_file(draw: Draw, text: str) -> bytes:
    """A recipe with values changed, or lines whose values are tagged, aliased, folded or endless."""
    if draw(st.booleans()):
        return yaml.safe_dump(draw(tree(yaml.safe_load(text))), allow_unicode=True).encode(errors="surrogatepass")
    lines = text.splitlines()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(lines) - 1))
        key = lines[at].partition(":")[0]
        lines[at] = (
            f"{key}: {draw(st.sampled_from(['', '&a ', *(tag + ' ' for tag in TAGS)]))}{draw(st.sampled_from(SCALARS))}"
        )
    return "\n".join(lines).encode()


# the readers

STATE = "fingerprint of the run"


def targets(folder: Path) -> dict[str, Target]:
    """Every reader with valid files, which are made in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = TransformerConfig(depth=2, width=16, heads=2, hidden=32, sides=(1, 2), vocab=8, z_channels=4, classes=3)
    shape = TokenizerConfig(ch=32, ch_mult=(1,), res_blocks=1, vocab=8, z_channels=4, sides=(1, 2))
    dense = Model(VARTransformer(config), VQVAE(shape)).eval().requires_grad_(False)
    block = BlockPlan(prefix=(4, 1), routed=(0, 2), keep=(1.0, 0.5))
    plan = SparsityPlan(experts=4, blocks=(block,) * 2, reconstruction_rank=2)
    sparse = fresh_sparse(config, dense.tokenizer, {"default": plan}, "default", dense.sampling).eval()
    for weight in sparse.parameters():
        weight.data.zero_()
    weights = {name: tensor.contiguous() for name, tensor in dense.transformer.state_dict().items()}
    few = {name: weights[name] for name in list(weights)[:6]} | {"count": torch.arange(4)}
    write_tensors(folder / "var.safetensors", weights, {"note": "x"})
    write_tensors(folder / "few.safetensors", few)
    recipe = dump_recipe(load_recipe("ci"))
    save_sparse(sparse, folder / "sparse", provenance={}, recipe_text=recipe)
    (folder / "shards").mkdir()
    write_weights(folder / "shards", "model", few, 300)
    save_run_state(folder / "state.safetensors", RunState(few, {"step": 3, "losses": [1.0, None]}, STATE))
    saved = {}
    for name, content in {"var": weights, "few": {"model": few, "step": 3}}.items():
        torch.save(content, folder / f"{name}.pth")
        saved[name] = (folder / f"{name}.pth").read_bytes()
    bare = [pickle.dumps({"a": [1, 2]}, protocol) for protocol in range(6)]
    picture, images = Image.fromarray(np.arange(20 * 24 * 3, dtype=np.uint8).reshape(20, 24, 3)), []
    for form in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        buffer = io.BytesIO()
        picture.save(buffer, form)
        images.append(buffer.getvalue())
    statistics = io.BytesIO()
    np.savez(statistics, mu=np.zeros(FEATURES), sigma=np.eye(FEATURES))
    manifest = _json({"files": ["recipe.yaml"], "stale": ["eval.json"]})
    index = (folder / "shards" / "model.safetensors.index.json").read_bytes()
    settings_file = (folder / "sparse" / "config.json").read_bytes()
    few_file = (folder / "few.safetensors").read_bytes()
    state = (folder / "state.safetensors").read_bytes()
    return {
        "safetensors": Target([few_file], "few.safetensors", _values, [safetensors_file(few_file)]),
        "inspect safetensors": Target(
            [(folder / "var.safetensors").read_bytes()],
            "var.safetensors",
            partial(inspect_file, values=True),
            [safetensors_file((folder / "var.safetensors").read_bytes())],
        ),
        "pth": Target([saved["few"]], "few.pth", _values, [torch_file(saved["few"])]),
        "inspect pth": Target([saved["var"], *bare], "var.pth", partial(inspect_file, values=True), [pickled()]),
        "index.json": Target(
            [index], "model.safetensors.index.json", _indexed, [_trees(index), DEEP, LONG], folder / "shards"
        ),
        "config.json": Target(
            [settings_file], "config.json", lambda path: load_sparse(path.parent),
            [_trees(settings_file), DEEP, LONG], folder / "sparse",
        ),
        "manifest.json": Target(
            [manifest], ".commit/manifest.json", lambda path: finish_commit(path.parents[1]),
            [_trees(manifest), DEEP, LONG], folder / "sparse",
        ),
        "recipe.yaml": Target(
            [recipe.encode(), BILLION.encode(), MERGES.encode()], "own.yaml", load_recipe,
            [yaml_file(recipe), yaml_file(recipe), DEEP],
        ),
        "yaml": Target([BILLION.encode(), MERGES.encode()], "x.yaml", _yaml, [yaml_file("a: 1\nb:\n  c: 2\n"), DEEP]),
        "image": Target(images, "x.png", partial(read_image, size=8), [png_file()], memory=2**30),
        "npz": Target([statistics.getvalue()], "x.npz", lambda path: read_statistics(path, FEATURES), [npz_file()]),
        "run state": Target([state], "state", lambda path: load_run_state(path, STATE), [_states(state)]),
    }  # fmt: skip


def _trees(seed_file: bytes) -> st.SearchStrategy[bytes]:
    return tree(json.loads(seed_file)).map(_json)


def _states(seed_file: bytes) -> st.SearchStrategy[bytes]:
    """States whose scalars were changed, or nest without end."""
    size = int.from_bytes(seed_file[:8], "little")
    header, body = json.loads(seed_file[8 : 8 + size]), seed_file[8 + size :]
    scalars = json.loads(header["__metadata__"]["scalars"])

    def file(text: bytes) -> bytes:
        own = header | {"__metadata__": header["__metadata__"] | {"scalars": text.decode("latin1")}}
        return len(_json(own)).to_bytes(8, "little") + _json(own) + body

    return (tree(scalars).map(_json) | DEEP | LONG).map(file) | safetensors_file(seed_file)


def _values(path: Path) -> None:
    for tensor in read_tensors(path).values():
        tensor.clone()


def _indexed(path: Path) -> None:
    _values(path)
    digest_of(path)


def _yaml(path: Path) -> None:
    try:
        read_yaml(path.read_bytes().decode())
    except ValueError as error:
        raise ActvarError from error  # what the function promises


# what is watched

_watched: Path | None = None
_seen: list[str] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Notes what no reader may do while a case is read: sys.addaudithook."""
    if _watched is None:
        return
    if event == "open":
        path, _, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if writes and not str(path).startswith(str(_watched)):
            _seen.append(f"open {path!r} to write")
    elif event in (
        "os.rename",
        "os.remove",
        "os.mkdir",
        "os.rmdir",
        "os.symlink",
        "os.link",
        "os.truncate",
        "os.chmod",
    ):
        outside = [part for part in arguments if isinstance(part, str) and part and not part.startswith(str(_watched))]
        if outside:
            _seen.append(f"{event} {outside[0]!r}")
    elif event == "exec" and MARK in str(arguments[0].co_consts):
        _seen.append("exec of the payload")
    elif event.startswith(
        ("os.system", "subprocess", "os.exec", "os.posix_spawn", "os.fork", "socket.", "pickle.find_class")
    ):
        _seen.append(f"{event} {str(arguments)[:80]}")


class Late(BaseException):
    """A case took too long."""


def _late(signum: int, frame: object) -> None:
    raise Late


def _memory(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def fault_of(target: Target, data: bytes, folder: Path) -> str | None:
    """Reads one case; what is wrong with how that ended, or None.

    Args:
        target: the reader.
        data: the file.
        folder: an empty or absent folder for it; absent again afterwards.
    """
    global _watched
    if target.beside is not None:
        shutil.copytree(target.beside, folder)
    path = folder / target.place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before, fault = _memory("VmRSS"), None
    _seen.clear()
    _watched = folder
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        target.read(path)
    except ActvarError:
        pass
    except Late:
        fault = f"more than {SECONDS:g} seconds"
    except BaseException as error:
        at = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in at if "actvar_convert" in frame.filename] or at
        fault = f"{type(error).__name__} at {Path(ours[-1].filename).name}: {ours[-1].name}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _watched = None
    took = _memory("VmHWM") - before
    if took > target.memory + 8 * len(data):
        fault = fault or "memory beyond the file's size"
    if _seen:
        fault = _seen[0]
    if Path(MARK).exists():
        Path(MARK).unlink()
        fault = "the payload ran"
    shutil.rmtree(folder)
    return fault


@contextmanager
def watching() -> Iterator[None]:
    """Meanwhile late cases are stopped, and this process gets no more than a few gigabytes."""
    if not _hooked:
        sys.addaudithook(_audit)
        _hooked.append(True)
    before, limits = signal.signal(signal.SIGALRM, _late), resource.getrlimit(resource.RLIMIT_AS)
    most = _memory("VmSize") + 4 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (most if limits[1] < 0 else min(most, limits[1]), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


_hooked: list[bool] = []


def run(target: Target, cases: int, number: int, folder: Path) -> tuple[Counter[str], dict[str, bytes]]:
    """Faults of so many cases with their numbers, and the smallest file of each; without faults both are empty.

    ``number`` seeds the cases: the same number, the same cases.
    """
    faults: Counter[str] = Counter()
    kept: dict[str, bytes] = {}
    strategy = st.one_of(damaged(target.seeds), *target.made)

    @seed(number)
    @settings(
        max_examples=max(1, cases // (MUTANTS + 1)),
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy, DICE)
    def each(made: bytes, number: int) -> None:
        dice = random.Random(number)
        more = [changed(made, target.seeds, dice) for _ in range(MUTANTS if len(made) < 2**16 else 0)]
        for data in (made, *more)[: cases - counts["cases"]]:
            counts["cases"] += 1
            fault = fault_of(target, data, folder)
            if fault is not None:
                faults[fault] += 1
                if len(data) < len(kept.get(fault, data + b" ")):
                    kept[fault] = data

    counts: Counter[str] = Counter()
    with watching():
        while counts["cases"] < cases:
            each()
    return faults, kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="files to try, shared by all readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="readers, by name")
    parser.add_argument("--keep", type=Path, help="folder for the smallest file of each fault")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    broken, keep = 0, asked.keep.absolute() if asked.keep else None
    memory = Path("/dev/shm")  # where files cost least
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as work:
        readers = targets(Path(work) / "seeds")
        chosen: Mapping[str, Target] = {name: readers[name] for name in asked.only} if asked.only else readers
        os.chdir(work)
        for index, (name, target) in enumerate(chosen.items()):
            began, cases = time.monotonic(), asked.cases // len(chosen) + (index < asked.cases % len(chosen))
            faults, kept = run(target, cases, asked.seed, Path(work) / "case")
            broken += faults.total()
            print(f"{name}: {cases} cases, {faults.total()} faults, {time.monotonic() - began:.0f} s", flush=True)
            for fault, count in faults.most_common():
                print(f"  {count} times: {fault}", flush=True)
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    file = keep / re.sub(r"[^\w.]+", "-", f"{name}-{fault}")[:100]
                    file.write_bytes(kept[fault])
    print(f"{asked.cases} cases, {broken} faults")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
