"""Images are read as people see them, or named in one line; and what is checked before training."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from PIL import Image

from exitkit.data import decoding
from exitkit.data.decoding import check_files, read_image
from exitkit.errors import UserError


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings(action="error"):
        yield


def halves(size, first, second, mode="RGB"):
    """An image whose left half has the first colour, and its right half the second one."""
    image = Image.new(mode, size, first)
    image.paste(second, (size[0] // 2, 0, *size))
    return image


@pytest.mark.parametrize(
    ("orientation", "size", "red"),
    [
        (1, (48, 24), "left"),
        (2, (48, 24), "right"),
        (3, (48, 24), "right"),
        (6, (24, 48), "top"),
        (8, (24, 48), "bottom"),
    ],
)
def test_the_orientation_of_a_photograph_is_applied(tmp_path, orientation, size, red):
    exif = Image.Exif()
    exif[0x0112] = orientation
    halves((48, 24), "red", "blue").save(tmp_path / "photo.jpg", exif=exif, quality=95)
    image = read_image(str(tmp_path / "photo.jpg"))
    assert image.size == size
    where = {"left": (2, 12), "right": (45, 12), "top": (12, 2), "bottom": (12, 45)}[red]
    assert image.getpixel(where)[0] > 200


def test_transparent_pixels_are_white_and_what_lies_below_them_is_not_seen(tmp_path):
    random = np.random.default_rng(0).integers(0, 256, (8, 8, 4)).astype(np.uint8)
    random[..., 3] = 0
    Image.fromarray(random, "RGBA").save(tmp_path / "hidden.png")
    assert np.asarray(read_image(str(tmp_path / "hidden.png"))).min() == 255
    random[..., 3] = 255
    Image.fromarray(random, "RGBA").save(tmp_path / "opaque.png")
    np.testing.assert_array_equal(np.asarray(read_image(str(tmp_path / "opaque.png"))), random[..., :3])
    random[..., 3] = 128
    Image.fromarray(random, "RGBA").save(tmp_path / "half.png")
    expected = random[..., :3] * (128 / 255) + 255 * (127 / 255)
    np.testing.assert_allclose(np.asarray(read_image(str(tmp_path / "half.png"))), expected, atol=1)


def test_palettes_with_transparency_are_read_without_pillows_warning(tmp_path):
    image = halves((8, 8), 0, 1, "P")
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.save(tmp_path / "palette.png", transparency=bytes([0, 255]))
    read = read_image(str(tmp_path / "palette.png"))
    assert read.getpixel((1, 1)) == (255, 255, 255) and read.getpixel((6, 1)) == (0, 255, 0)
    image.save(tmp_path / "palette.gif", transparency=0)
    assert read_image(str(tmp_path / "palette.gif")).getpixel((1, 1)) == (255, 255, 255)


def test_of_an_animation_the_first_image_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert read_image(str(tmp_path / "moving.gif")).getpixel((1, 1)) == (255, 0, 0)


@pytest.mark.parametrize("megapixels", [110, 210])
def test_a_very_large_image_is_read_or_said_to_be_too_large(tmp_path, megapixels, monkeypatch):
    """Pillow's limits are lowered, so that no large image has to be written."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("1", (megapixels, 1)).save(tmp_path / "large.png")
    if megapixels == 110:
        assert read_image(str(tmp_path / "large.png")).size == (110, 1)
    else:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(UserError, match=r"large\.png has more than 0 million pixels; scale it down"):
            read_image(str(tmp_path / "large.png"))


def test_damaged_exif_data_is_ignored(tmp_path):
    halves((48, 24), "red", "blue").save(
        tmp_path / "photo.jpg", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x01"
    )
    assert read_image(str(tmp_path / "photo.jpg")).size == (48, 24)


def written(folder, count):
    paths = []
    for number in range(count):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number:03}.png")
        paths.append(str(folder / f"{number:03}.png"))
    return paths


def test_all_files_of_a_small_set_are_decoded(tmp_path):
    paths = written(tmp_path, 150)
    assert check_files(paths, threads=2).startswith("150 images checked in ")
    for number in (3, 70, 80, 149):
        (tmp_path / f"{number:03}.png").write_bytes(b"no image")
    (tmp_path / "020.png").unlink()
    with pytest.raises(UserError, match=r"020\.png does not exist; image .*; and \d more$") as caught:
        check_files(paths, threads=2)
    assert "\n" not in str(caught.value)


def test_of_a_large_set_a_sample_is_decoded_and_all_headers_are_read(tmp_path, monkeypatch):
    paths = written(tmp_path, 200)
    monkeypatch.setattr(decoding, "_whole", set())
    begun = iter(range(1000))
    monkeypatch.setattr(decoding.time, "perf_counter", lambda: float(next(begun)))
    assert check_files(paths, 0, seconds=0.5).startswith(
        "a sample of 64 of 200 images and the headers of 64 others checked in "
    )
    assert check_files(paths, 0, seconds=2.5).startswith(
        "a sample of 192 of 200 images and the headers of all others checked in "
    )


def test_a_file_is_decoded_once_by_a_process_unless_it_has_changed(tmp_path, monkeypatch):
    paths = written(tmp_path, 5)
    check_files(paths, 0)
    decoded = []
    monkeypatch.setattr(decoding, "_decode", decoded.append)
    Image.new("RGB", (9, 9)).save(paths[2])
    check_files(paths, 0)
    assert decoded == [paths[2]]
