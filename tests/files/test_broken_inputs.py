"""Inputs that cannot work: each ends in one message that names the cause and the way out, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from actvar_convert.errors import InputError
from actvar_convert.files.layout import official_config
from actvar_convert.files.skeleton import NoWeights
from actvar_convert.files.source import load_any
from actvar_convert.files.tensors import wanted_globals, write_weights
from actvar_convert.models.var.network import VARTransformer
from actvar_convert_cli.main import app

Tensors = dict[str, Tensor]
Case = Callable[[Path, Tensors, Tensors], Path]


class Evil:
    """Unpickling this runs a command."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch PWNED",)


def _pair(folder: Path, transformer: object, tokenizer: object) -> Path:
    torch.save(transformer, folder / "var.pth")
    torch.save(tokenizer, folder / "vae.pth")
    return folder / "var.pth"


def _file(content: bytes, name: str = "var.pth") -> Case:
    def make(folder: Path, transformer: Tensors, tokenizer: Tensors) -> Path:
        _pair(folder, transformer, tokenizer)
        (folder / name).write_bytes(content)
        return folder / name

    return make


def _change(edit: Callable[[Tensors, Tensors], Any]) -> Case:
    def make(folder: Path, transformer: Tensors, tokenizer: Tensors) -> Path:
        edit(transformer, tokenizer)
        return _pair(folder, transformer, tokenizer)

    return make


def _cut(share: float, name: str = "var.pth") -> Case:
    def make(folder: Path, transformer: Tensors, tokenizer: Tensors) -> Path:
        source = _pair(folder, transformer, tokenizer)
        save_file(transformer, folder / "var.safetensors")
        path = folder / name
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        return source if name == "vae.pth" else path

    return make


def _rewritten_zip(change: Callable[[str, bytes], tuple[bytes, int]]) -> Case:
    """A PyTorch file whose records were changed: ``change(name, content)`` gives content and compression."""

    def make(folder: Path, transformer: Tensors, tokenizer: Tensors) -> Path:
        source = _pair(folder, transformer, tokenizer)
        with zipfile.ZipFile(source) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(source, "w") as archive:
            for name, content in records.items():
                content, compression = change(name, content)
                archive.writestr(name, content, compress_type=compression)
        return source

    return make


def _bomb(name: str, content: bytes) -> tuple[bytes, int]:
    return (bytes(10**8), zipfile.ZIP_DEFLATED) if name.endswith("data.pkl") else (content, zipfile.ZIP_STORED)


def _overlapping_zip(folder: Path, transformer: Tensors, tokenizer: Tensors) -> Path:
    """Every entry of the directory points at the same, large record."""
    source = _pair(folder, transformer, tokenizer)
    with zipfile.ZipFile(source) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    data = bytearray(source.read_bytes())
    position = data.find(b"PK\x01\x02")
    while position >= 0:
        struct.pack_into("<II", data, position + 20, largest.file_size, largest.file_size)
        struct.pack_into("<I", data, position + 42, largest.header_offset)
        position = data.find(b"PK\x01\x02", position + 4)
    source.write_bytes(data)
    return source


def _huge_claim(folder: Path, transformer: Tensors, tokenizer: Tensors) -> Path:
    """One element that pretends to be a matrix of a terabyte."""
    return _pair(folder, {**transformer, "head.weight": torch.zeros(1).expand(500_000, 500_000)}, tokenizer)


def _endless(folder: Path, transformer: Tensors, tokenizer: Tensors) -> Path:
    loop: dict[str, object] = {}
    loop["again"] = loop
    return _pair(folder, loop, tokenizer)


def _recent_pickle(folder: Path, transformer: Tensors, tokenizer: Tensors) -> Path:
    return _of_protocol_4(folder, {**transformer, "hook": Evil()})


def _of_protocol_4(folder: Path, content: object) -> Path:
    torch.save(content, folder / "var.pth", pickle_protocol=4)
    return folder / "var.pth"


def _folder(*names: str, **contents: str) -> Case:
    def make(folder: Path, transformer: Tensors, tokenizer: Tensors) -> Path:
        inside = folder / "model"
        inside.mkdir()
        for name in names:
            save_file({"x": torch.zeros(1)}, inside / name)
        for name, text in contents.items():
            (inside / name.replace("_json", ".json").replace("_txt", ".txt")).write_text(text)
        return inside

    return make


def _sharded(damage: Callable[[Path], object]) -> Case:
    def make(folder: Path, transformer: Tensors, tokenizer: Tensors) -> Path:
        inside = folder / "model"
        inside.mkdir()
        write_weights(inside, "model", transformer, 200_000)
        write_weights(inside, "vae", tokenizer, 1_000_000_000)
        damage(inside)
        return inside

    return make


def _edit_index(folder: Path, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": change(json.loads(path.read_text())["weight_map"])}))


def _only_transformer(folder: Path, transformer: Tensors, tokenizer: Tensors) -> Path:
    torch.save(transformer, folder / "var.pth")
    return folder / "var.pth"


def _vae_is_transformer(folder: Path, transformer: Tensors, tokenizer: Tensors) -> Path:
    return _pair(folder, transformer, transformer)


def _wrong_tokenizer(transformer: Tensors, tokenizer: Tensors) -> None:
    tokenizer["quantize.embedding.weight"] = torch.zeros(64, 8)
    tokenizer["quantize.ema_vocab_hit_SV"] = torch.zeros(6, 64)


def _pickled(content: object, protocol: int) -> Case:
    return _file(pickle.dumps(content, protocol))


def _to_float8(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float8_e4m3fn)


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.T.clone()


def _set(part: int, name: str, value: Callable[[Tensor], Tensor]) -> Case:
    def edit(transformer: Tensors, tokenizer: Tensors) -> None:
        tensors = (transformer, tokenizer)[part]
        tensors[name] = value(tensors[name])

    return _change(edit)


def _evil_checkpoint(folder: Path, transformer: Tensors, tokenizer: Tensors) -> Path:
    return _pair(folder, {**transformer, "hook": Evil()}, tokenizer)


def _legacy(folder: Path, transformer: Tensors, tokenizer: Tensors) -> Path:
    source = _pair(folder, transformer, tokenizer)
    torch.save(transformer, source, _use_new_zipfile_serialization=False)
    return source


def _drop(transformer: Tensors, tokenizer: Tensors) -> None:
    for name in [name for name in transformer if name.startswith("blocks.0.")]:
        del transformer[name]


def _cut_short(folder: Path, transformer: Tensors, tokenizer: Tensors) -> Path:
    """The first two blocks of VAR-d16: a header, and values that are a hole in the file."""
    config, _ = official_config("var-d16")
    with NoWeights():
        tensors = VARTransformer(config.model_copy(update={"depth": 2})).state_dict()
    header, end = {}, 0
    for name, tensor in tensors.items():
        if not name.endswith(("lvl_1L", "attn_bias_for_masking")):
            begin, end = end, end + 2 * tensor.numel()
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header)
    path = folder / "var.safetensors"
    path.write_bytes(_header(len(text), text))
    os.truncate(path, 8 + len(text) + end)
    torch.save(tokenizer, folder / "vae.pth")
    return path


def _config_of_more(folder: Path, transformer: Tensors, tokenizer: Tensors) -> Path:
    (folder / "config.json").write_text('{"depth": 3}')
    return _pair(folder, transformer, tokenizer)


def _unreadable(folder: Path, transformer: Tensors, tokenizer: Tensors) -> Path:
    source = _pair(folder, transformer, tokenizer)
    source.chmod(0)
    return source


def _header(claim: int, text: str) -> bytes:
    return struct.pack("<Q", claim) + text.encode()


def _absent(folder: Path, transformer: Tensors, tokenizer: Tensors) -> Path:
    return _pair(folder, transformer, tokenizer).with_name("vra.pth")


def _flip(pattern: bytes, replacement: bytes) -> Case:
    """Bytes of the object graph changed in place, so that its checksum is wrong too."""

    def make(folder: Path, transformer: Tensors, tokenizer: Tensors) -> Path:
        source = _pair(folder, transformer, tokenizer)
        data, changes = re.subn(pattern, lambda _: replacement, source.read_bytes(), count=1)
        assert changes and len(data) == source.stat().st_size
        source.write_bytes(data)
        return source

    return make


def _many_disks(folder: Path, transformer: Tensors, tokenizer: Tensors) -> Path:
    """A zip file whose 64-bit locator says that it goes on elsewhere."""
    source = _pair(folder, transformer, tokenizer)
    data = source.read_bytes()
    end = data.rindex(b"PK\x05\x06")
    source.write_bytes(data[:end] + struct.pack("<4sLQL", b"PK\x06\x07", 0, 0, 3) + data[end:])
    return source


ODD = '{"a":{"dtype":"F6_E2M3","shape":[8],"data_offsets":[0,6]}}'
UNET = {"down_blocks.0.conv.weight": torch.zeros(2), "up_blocks.0.conv.weight": torch.zeros(2)}
LLM = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2), "lm_head.weight": torch.zeros(2, 2)}
CLAIM = '{"a":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"

CASES: dict[str, tuple[Case, str]] = {
    "no such file": (_absent, r"vra\.pth does not exist\. Did you mean .*var\.pth"),
    "empty file": (_file(b""), "an empty file, not weights. The download or copy did not happen"),
    "truncated pth": (_cut(0.5), "truncated zip file.*cut short. Download"),
    "pth cut at the end": (_cut(0.999), "truncated zip file.*Download"),
    "truncated safetensors": (_cut(0.5, "var.safetensors"), "damaged or truncated safetensors.*Download"),
    "safetensors cut in the header": (_cut(0.01, "var.safetensors"), "damaged or truncated safetensors.*Download"),
    "truncated tokenizer": (_cut(0.7, "vae.pth"), r"vae\.pth is a truncated zip file"),
    "safetensors that claims terabytes": (_file(_header(len(CLAIM), CLAIM), "x.safetensors"), "damaged or truncated"),
    "safetensors with an endless header": (_file(_header(99_000_000, '{"a":'), "x.safetensors"), "damaged"),
    "zip bomb": (_rewritten_zip(_bomb), "may be a zip bomb. Get the file"),
    "zip bomb of overlapping records": (_overlapping_zip, "zip bomb|damaged zip file"),
    "compressed pth": (_rewritten_zip(lambda n, c: (c, zipfile.ZIP_DEFLATED)), "PyTorch never compresses"),
    "endless object graph": (
        _rewritten_zip(lambda n, c: (bytes(70 * 2**20) if n.endswith("data.pkl") else c, zipfile.ZIP_STORED)),
        "object graphs of 73 MB; a model has one of a few MB",
    ),
    "nonsense object graph": (
        _rewritten_zip(lambda n, c: (b"\x80\x02nonsense." if n.endswith("data.pkl") else c, zipfile.ZIP_STORED)),
        "asks for more than tensors|is damaged",
    ),
    "records shorter than claimed": (
        _rewritten_zip(lambda n, c: (c[:4] if "/data/" in n else c, zipfile.ZIP_STORED)), "is damaged.*again"
    ),
    "huge claim in a small file": (_huge_claim, "claims 1000.0 GB of values in .*made up. Save each tensor on its own"),
    "dictionaries without end": (_endless, "nests dictionaries without end. Save only"),
    "pickle that wants os.system, inside a checkpoint": (_evil_checkpoint, r"asks for posix\.system\), which is never"),
    "tensors in a new protocol": (
        lambda f, t, v: _of_protocol_4(f, t), "saved with pickle protocol 4, which cannot be read safely. Load"
    ),
    "the same in a new protocol": (_recent_pickle, r"asks for posix\.system"),
    "bare pickle that wants os.system": (_pickled({"a": Evil()}, 2), r"asks for posix\.system\), which is never"),
    "bare pickle of a new protocol": (_pickled([Evil()], 4), r"asks for posix\.system\), which is never"),
    "bare pickle of numbers": (_pickled({"a": 1}, 3), "bare pickle or in the format that PyTorch wrote before"),
    "old PyTorch format": (_legacy, "before version 1.6, which cannot be read in pieces.*save its state_dict again"),
    "one tensor": (lambda f, t, v: _pair(f, torch.zeros(3), v), "holds one tensor, not a dictionary"),
    "a list": (lambda f, t, v: _pair(f, [t], v), "holds a list, not a dictionary.*Save the model's state_dict"),
    "no tensors": (lambda f, t, v: _pair(f, {"epoch": 3}, v), "not a VAR: it holds no named tensors. Give a VAR"),
    "one name twice": (
        _change(lambda t, v: t.update({"module.head.bias": t["head.bias"]})), r"two tensors for head\.bias\. Save"
    ),
    "quantised tensors": (
        lambda f, t, v: _pair(f, {**t, "x": torch.zeros(2, 2).to_sparse()}, v), "sparse, quantised.*Save plain dense"
    ),
    "float8 weights": (_set(0, "head.weight", _to_float8), "torch.float8_e4m3fn in the file, fp16, bf16"),
    "int8 weights": (_set(0, "head.weight", lambda t: t.to(torch.int8)), "torch.int8 in the file, fp16, bf16"),
    "missing last block": (_cut_short, r"ends after 2 blocks; VAR-d16, .* has 16\. It is incomplete: get it from its"),
    "missing last block of the config": (_config_of_more, r"ends after 2 blocks; its config\.json says 3\. It is inc"),
    "missing block": (_change(_drop), r"blocks\.0\.attn\.mat_qkv\.weight is missing"),
    "missing tensor of the tokenizer": (
        _change(lambda t, v: v.pop("decoder.conv_out.bias")), r"vae\.pth: decoder\.conv_out\.bias is missing"
    ),
    "nothing tells the classes": (_change(lambda t, v: t.pop("class_emb.weight")), "classes: class_emb.weight would"),
    "unknown tensor": (_change(lambda t, v: t.update(rotary=torch.zeros(2))), "rotary is unknown"),
    "swapped shapes": (_set(0, "blocks.1.ffn.fc2.weight", _transposed), r"fc2\.weight: \[128, 64\] in the file"),
    "shapes of another tensor": (_set(0, "pos_start", lambda t: t[0]), r"pos_start: \[1, 64\] in the file, \[1, 1"),
    "NaN": (_set(0, "pos_1LC", lambda t: t / 0 * 0), "pos_1LC has 1,920 NaN or infinite values"),
    "Inf": (_set(1, "quant_conv.bias", lambda t: t / 0), r"vae\.pth: quant_conv\.bias has 8 NaN or infinite"),
    "levels of no pyramid": (_set(0, "lvl_1L", lambda t: t.flip(1)), "lvl_1L does not describe square token maps"),
    "wrong tokenizer": (
        _change(_wrong_tokenizer),
        r"(?s)do not belong together.*codebook size: transformer 32, tokenizer 64.*scales: transformer 4, tokenizer 6",
    ),
    "no tokenizer": (_only_transformer, "no tokenizer in it, and .* lies beside it. Give the VQVAE file with --vae "),
    "transformer as tokenizer": (_vae_is_transformer, "no VAR tokenizer in it: it is a VAR transformer. Give"),
    "tokenizer as transformer": (lambda f, t, v: _pair(f, v, v), "a VQVAE and no transformer. Give the VAR"),
    "diffusers model": (lambda f, t, v: _pair(f, UNET, v), "not a VAR: it looks like a diffusers U-Net"),
    "diffusers folder": (_folder(config_json='{"_class_name": "UNet2DModel"}'), r"a diffusers model \(UNet2DModel\)"),
    "diffusers pipeline": (_folder(model_index_json="{}"), "a diffusers pipeline, not a VAR. Give"),
    "language model": (lambda f, t, v: _pair(f, LLM, v), "looks like an LLM. Give a VAR file or folder"),
    "transformers folder": (_folder(config_json='{"architectures": ["X"]}'), "a transformers model"),
    "text file": (_file(b"hello\n"), "is a text file, not weights. Give the .pth"),
    "html page": (_file(b"<!doctype html>\n<title>404</title>"), "is an HTML page .*Download the weights themselves"),
    "git-lfs pointer": (_file(POINTER), "is a Git LFS pointer.*git lfs pull"),
    "picture": (_file(b"\x89PNG\r\n\x1a\n" + bytes(99)), "a PNG picture, not weights"),
    "empty folder": (_folder(), "is empty: no weights .* in it. Give the folder that has them"),
    "folder without weights": (_folder(notes_txt="x"), r"holds notes\.txt: no weights"),
    "folder with several models": (_folder("a.safetensors", "b.safetensors"), "several files of weights.*Name one"),
    "config that is no JSON": (_folder("model.safetensors", config_json='{"depth": 1'), "not valid JSON.*Restore"),
    "missing shard": (
        _sharded(lambda f: (f / "model-00001-of-00003.safetensors").unlink()), "(?s)files that are missing.*-00001-of"
    ),
    "shards of another model": (
        _sharded(lambda f: _edit_index(f, lambda m: {**m, "lost": "model-00001-of-00003.safetensors"})),
        "lack 1 of the .* tensors it lists, lost for one",
    ),
    "index that leaves its folder": (
        _sharded(lambda f: _edit_index(f, lambda m: {**m, "head.bias": "../../etc/passwd"})), "points outside"
    ),
    "index that lists itself": (
        _sharded(lambda f: _edit_index(f, lambda m: dict.fromkeys(m, "model.safetensors.index.json"))), "an index and"
    ),
    "dtype of nobody": (
        _file(_header(len(ODD), ODD) + bytes(6), "x.safetensors"), "numbers in a format that cannot be read here.*fp32"
    ),
    "one wrong byte in the object graph": (_flip(rb"collections", b"kollections"), "is damaged: Bad CRC"),
    "object graph that ends early": (
        _rewritten_zip(lambda n, c: (b"\x80\x02X\5" if n.endswith("data.pkl") else c, zipfile.ZIP_STORED)), "is damaged"
    ),
    "directory of many disks": (_many_disks, "a damaged zip file.*Download"),
    "index without a map": (_sharded(lambda f: _edit_index(f, lambda m: {})), "no weight_map"),
    "no permission": (_unreadable, r"cannot read .*var\.pth: no permission\. Change its permissions, or"),
    "file in the way of a folder": (lambda f, t, v: _pair(f, t, v) / "deeper", "does not exist"),
}  # fmt: skip


def _everything(folder: Path) -> dict[str, bytes]:
    """Files by name, with contents if they can be read; of a large one the size, and whether it has been written."""

    def content(path: Path) -> bytes:
        about = path.stat()
        if not path.is_file() or not about.st_mode & 0o400 or about.st_size > 10**7:
            return repr((about.st_size, about.st_mode, about.st_mtime_ns)).encode() if path.is_file() else b""
        return path.read_bytes()

    return {str(path.relative_to(folder)): content(path) for path in folder.rglob("*")}


@pytest.fixture
def permissions_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets nobody open a file without permission: the superuser, as whom tests may run, is asked for none."""
    original = Path.open

    def opened(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.exists() and not self.stat().st_mode & 0o400:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)


@pytest.mark.usefixtures("permissions_hold")
@pytest.mark.parametrize("case", CASES)
def test_broken_input(
    case: str, tmp_path: Path, parts: tuple[Tensors, Tensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, expected = CASES[case]
    source = make(tmp_path, *parts)
    monkeypatch.chdir(tmp_path)
    before = _everything(tmp_path)
    with pytest.raises(InputError, match=expected) as caught:
        load_any(source)
    assert caught.value.exit_code == 2
    assert str(source) in str(caught.value) or str(source.parent) in str(caught.value)
    assert "\n" not in caught.value.message and len(caught.value.message) < 700
    assert _everything(tmp_path) == before
    ended = CliRunner().invoke(app, ["convert", str(source), "--out", "X"], prog_name="actvar")
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert ended.stderr == f"actvar: {caught.value}\n"
    assert _everything(tmp_path) == before


@pytest.mark.parametrize(
    ("number", "cause"),
    [(errno.EACCES, "no permission. Change"), (errno.EIO, "Input/output error. Check"), (errno.EISDIR, "is a folder")],
)
@pytest.mark.parametrize("place", ["open", "stat", "exists"])
def test_operating_system_that_refuses(
    official_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, number: int, cause: str, place: str
) -> None:
    original = getattr(Path, place)

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == official_pair[0]:
            raise OSError(number, os.strerror(number))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, place, refuse)
    with pytest.raises(InputError, match=cause):
        load_any(official_pair[0])


def test_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = Path.iterdir

    def refuse(self: Path) -> Any:
        if self == tmp_path / "model":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return listing(self)

    (tmp_path / "model").mkdir()
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match="no permission"):
        load_any(tmp_path / "model")


TINY = (
    "experts.count=8",
    "gate.rank=4",
    "budget={reduction: 0.1, pyramids: 4}",
    "calibration={pyramids: 4, batch: 4}",
)


@pytest.mark.parametrize(
    ("owner", "function", "number", "expected"),
    [
        (os, "fsync", errno.ENOSPC, "the disk is full. Free some space, or"),
        (os, "fsync", errno.EDQUOT, "the disk is full. Free some space, or"),
        (os, "mkdir", errno.EACCES, "no permission. Change its permissions, or"),
        (os, "mkdir", errno.EROFS, "the file system is read-only. Choose a folder"),
        (Path, "rename", errno.EIO, "Input/output error. Check the path and the disk."),
    ],
    ids=["full disk", "spent quota", "no permission", "read-only", "failing disk"],
)
def test_result_that_cannot_be_written(
    official_pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    function: str,
    number: int,
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = _everything(tmp_path)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(owner, function, refuse)
    settings = [part for setting in TINY for part in ("--set", setting)]
    command = ["convert", str(official_pair[0]), "--out", "deep/X", *settings]
    ended = CliRunner().invoke(app, command, prog_name="actvar")
    *progress, said = (line for line in ended.stderr.splitlines() if "was taken" not in line)
    assert (ended.exit_code, ended.stdout) == (2, "")
    place = r"deep/X\S*(?: \(--work names another place\))?"
    assert re.fullmatch(rf"actvar: cannot write {place}: {re.escape(expected)}.*", said)
    assert bool(progress) == (function == "rename"), "what can be known to fail is tried before any work"
    assert _everything(tmp_path) == before


def test_wanted_globals_are_named_without_running_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol in range(6):
        assert wanted_globals(pickle.dumps([Evil(), Evil(), Path], protocol)) == ["pathlib.Path", "posix.system"]
    assert wanted_globals(b"\x80\x04garbage") == []
    assert not list(tmp_path.iterdir())
