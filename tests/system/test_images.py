"""Images on disk: which files they are, what their pixels become, and what cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from actvar_convert.errors import InputError
from actvar_convert.system.images import check_images, list_images, read_image, unreadable

RAMP = np.arange(65_536, dtype=np.uint16).reshape(256, 256)


def pixels(path: Path, size: int = 2) -> list[list[int]]:
    """The first two pixels of an image, in 8 bits."""
    rows = (read_image(path, size) * 255).round().int().permute(1, 2, 0).reshape(-1, 3)
    return [row.tolist() for row in rows[:2]]


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_a_ramp_of_16_bits_keeps_its_grey(tmp_path: Path, mode: str) -> None:
    dtype = {"I;16": "<u2", "I;16B": ">u2"}[mode]
    image = Image.frombytes(mode, (256, 256), RAMP.astype(dtype).tobytes())
    image.save(tmp_path / "ramp.png")
    found = read_image(tmp_path / "ramp.png", 256)
    exact = torch.from_numpy(RAMP.astype(np.float64) / 65_535)
    assert float(found.mean()) == pytest.approx(0.5, abs=1e-4)
    assert float((found.double() - exact).abs().max()) <= 0.5 / 255 + 1e-7
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_grey_of_16_bits_that_stands_for_transparent_is_white(tmp_path: Path) -> None:
    values = np.array([[300, 257], [0, 65_535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png", transparency=300)
    assert pixels(tmp_path / "a.png") == [[255] * 3, [1] * 3]


RED, CLEAR, HALF = (255, 0, 0, 255), (255, 0, 0, 0), (255, 0, 0, 128)


def drawn(mode: str, *values: object) -> Image.Image:
    image = Image.new(mode, (2, 2))
    for x, value in enumerate(values):
        for y in range(2):
            image.putpixel((x, y), value)  # type: ignore[arg-type]
    return image


def palette(**options: object) -> Image.Image:
    image = drawn("P", 0, 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.info |= options
    return image


@pytest.mark.parametrize(
    ("ending", "image", "expected"),
    [
        ("png", drawn("1", 0, 1), [[0, 0, 0], [255, 255, 255]]),
        ("png", drawn("L", 7, 200), [[7, 7, 7], [200, 200, 200]]),
        ("png", drawn("LA", (10, 255), (10, 0)), [[10, 10, 10], [255, 255, 255]]),
        ("png", palette(), [[255, 0, 0], [0, 0, 255]]),
        ("png", palette(transparency=0), [[255, 255, 255], [0, 0, 255]]),
        ("png", palette(transparency=b"\x80\x00"), [[255, 127, 127], [255, 255, 255]]),
        ("png", drawn("RGBA", RED, CLEAR), [[255, 0, 0], [255, 255, 255]]),
        ("png", drawn("RGBA", RED, HALF), [[255, 0, 0], [255, 127, 127]]),
        ("webp", drawn("RGBA", RED, CLEAR), [[255, 0, 0], [255, 255, 255]]),
        ("jpg", drawn("CMYK", (0, 0, 0, 0), (0, 0, 0, 255)), [[255, 255, 255], [0, 0, 0]]),
        ("bmp", drawn("RGB", (1, 2, 3), (4, 5, 6)), [[1, 2, 3], [4, 5, 6]]),
    ],
)
def test_a_mode_becomes_the_colours_that_it_shows_on_white(
    tmp_path: Path, ending: str, image: Image.Image, expected: list[list[int]]
) -> None:
    path = tmp_path / f"a.{ending}"
    exact = {"webp": {"lossless": True, "exact": True}, "jpg": {"quality": 100}}.get(ending, {})
    image.save(path, **exact)
    assert np.abs(np.array(pixels(path)) - np.array(expected)).max() <= (2 if ending == "jpg" else 0)


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_a_colour_that_stands_for_transparent_is_white(tmp_path: Path, mode: str) -> None:
    black, other = {"1": (0, 1), "L": (0, 9), "RGB": ((0, 0, 0), (9, 9, 9))}[mode]
    drawn(mode, black, other).save(tmp_path / "a.png", transparency=black)
    assert pixels(tmp_path / "a.png") == [[255] * 3, [255 if mode == "1" else 9] * 3]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_of_a_turned_camera_stands_upright(tmp_path: Path, orientation: int) -> None:
    upright = Image.fromarray(np.array([[0, 80], [160, 240]], np.uint8))
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(back[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    found = (read_image(tmp_path / "a.png", 2)[0] * 255).round().int()
    assert found.tolist() == [[0, 80], [160, 240]]


def test_of_a_long_strip_the_middle_is_taken_in_little_memory(tmp_path: Path) -> None:
    strip = np.full((1, 200_001, 3), 9, np.uint8)
    strip[0, 100_000] = 200
    Image.fromarray(strip).save(tmp_path / "a.png")
    found = (read_image(tmp_path / "a.png", 256) * 255).round().int()
    assert found.shape == (3, 256, 256) and found[0].max() > 180 and found[0].min() < 20


def test_damaged_exif_data_turn_nothing(tmp_path: Path) -> None:
    drawn("RGB", (1, 2, 3), (4, 5, 6)).save(tmp_path / "a.png", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert pixels(tmp_path / "a.png") == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_of_an_animation_the_first_frame_counts(tmp_path: Path, ending: str) -> None:
    first, second = drawn("RGB", (9, 9, 9), (9, 9, 9)), drawn("RGB", (200, 0, 0), (200, 0, 0))
    first.save(tmp_path / f"a.{ending}", save_all=True, append_images=[second], lossless=True)
    with Image.open(tmp_path / f"a.{ending}") as opened:
        assert getattr(opened, "n_frames", 1) == 2
    assert pixels(tmp_path / f"a.{ending}") == [[9, 9, 9], [9, 9, 9]]


def test_what_is_no_image_is_told_with_the_reason(tmp_path: Path) -> None:
    good = tmp_path / "good.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(good)
    cut, empty, text, tiff = (tmp_path / f"{name}.jpg" for name in ("cut", "empty", "text", "tiff"))
    cut.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    empty.write_bytes(b"")
    text.write_text("no image")
    Image.new("F", (4, 4)).save(tiff, format="TIFF")  # modes F and I have no other home
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "itself.jpg").symlink_to(tmp_path / "itself.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    paths = list_images(tmp_path)
    digests, faults = check_images(paths)
    assert list(digests) == [good] and check_images([good])[0] == digests
    reasons = {path.stem: fault for path, fault in faults.items()}
    assert "truncated" in reasons.pop("cut")
    assert reasons == {
        "empty": "it is empty",
        "text": "its content is neither PNG, JPEG, WebP nor BMP",
        "tiff": "its content is neither PNG, JPEG, WebP nor BMP",
        "gone": "No such file or directory",
        "itself": "Too many levels of symbolic links",
        "pipe": "it is no file but a pipe, a device or the like",
    }
    for path in faults:
        with pytest.raises(InputError, match=f"{path.name}: cannot be read as an image"):
            read_image(path, 4)


def test_one_message_counts_the_unreadable_of_each_folder(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "0.png", tmp_path / "a" / "b" / "1.png", tmp_path / "c" / "2.png", tmp_path / "3.png"]
    text = str(unreadable(tmp_path, paths, {path: "it is empty" for path in paths[1:]}))
    assert "3 of 4 images cannot be read (a: 1 of 2, c: 1 of 1, in the folder itself: 1 of 1)" in text
    assert all(f"  - {path}: it is empty" in text for path in paths[1:]) and f"{paths[0]}:" not in text


def test_links_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    tree, elsewhere = tmp_path / "tree", tmp_path / "elsewhere"
    for folder in (tree / "a", elsewhere / "deep"):
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(b"")
    (tree / "b").symlink_to(elsewhere)
    (tree / "c").symlink_to(elsewhere)
    (tree / "a" / "up").symlink_to(tree)
    (elsewhere / "deep" / "circle").symlink_to(elsewhere)
    (tree / "a" / "1.png").symlink_to(tree / "a" / "0.png")
    (tree / "a" / "away").symlink_to(tmp_path / "nowhere")
    found = [path.relative_to(tree).as_posix() for path in list_images(tree)]
    assert found == ["a/0.png", "a/1.png", "b/deep/0.png", "c/deep/0.png"]


def test_a_name_in_any_encoding_is_read_and_can_be_printed(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    good, bad = (folder / os.fsdecode(name) for name in (b"\xe4.png", b"\xf6.png"))
    drawn("RGB", (1, 2, 3), (4, 5, 6)).save(good)
    bad.write_bytes(b"broken")
    assert list_images(tmp_path) == [good, bad] and pixels(good) == [[1, 2, 3], [4, 5, 6]]
    digests, faults = check_images([good, bad])
    assert list(digests) == [good]
    for error in (unreadable(tmp_path, [good, bad], faults), InputError(f"{bad}: is broken", [str(bad)])):
        assert "caf\\udce9" in str(error).encode("utf-8").decode()


def test_an_image_that_was_replaced_is_seen_whatever_its_name_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "a.bmp"
    drawn("RGB", (1, 2, 3), (4, 5, 6)).save(path)
    before, times = check_images([path])[0][path], (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    assert pixels(path) == [[1, 2, 3], [4, 5, 6]]
    drawn("RGB", (6, 5, 4), (3, 2, 1)).save(path)
    os.utime(path, ns=times)
    after = check_images([path])[0][path]
    assert before != after
    read_image(path, 2, after)
    with pytest.raises(InputError, match=r"a\.bmp: the image was changed while it was in use; run the command again"):
        read_image(path, 2, before)


def test_a_file_that_is_being_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    drawn("RGB", (1, 2, 3), (4, 5, 6)).save(path)
    really, seen = os.fstat, []

    def growing(handle: int) -> os.stat_result:
        status = really(handle)
        if len(seen) < 4:
            seen.append(handle)
            with path.open("ab") as file:
                file.write(b"more")
        return status

    monkeypatch.setattr(os, "fstat", growing)
    assert check_images([path])[1] == {path: "something is writing to it"}
    assert list(check_images([path])[0]) == [path], "when it is over"


def test_images_that_would_fill_the_memory_are_refused(tmp_path: Path) -> None:
    huge = tmp_path / "huge.png"
    Image.new("1", (9_000, 9_000)).save(huge)
    with pytest.raises(InputError, match="9000 x 9000 pixels are more than 67,108,864"):
        read_image(huge, 8)
    assert "pixels are more" in check_images([huge])[1][huge]
