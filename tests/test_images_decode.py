"""Bytes to training examples: every kind of picture, and every kind of damage."""

import io
import os
import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import encode, gradient, png
from PIL import Image, ImageFile, ImageOps

from sfumato.data.decode import Bounds, RefusedImageError, read_rgb, read_size
from sfumato.data.entries import FileBlob, SpanBlob
from sfumato.data.sample import Choices, Placement, Sample, covering, resize_and_crop, to_tensor


@pytest.fixture
def blob(tmp_path: Path) -> FileBlob:
    return FileBlob(tmp_path / "picture.bin")


def decoded(blob: FileBlob, data: bytes) -> np.ndarray:
    blob.path.write_bytes(data)
    picture = read_rgb(blob, Bounds())
    assert picture.mode == "RGB"
    assert read_size(blob, Bounds()) == (picture.height, picture.width)
    return np.array(picture)


def refusal(blob: FileBlob, bounds: Bounds | None = None) -> str:
    """Return the reason for which the pixels are refused."""
    with pytest.raises(RefusedImageError) as caught:
        read_rgb(blob, bounds or Bounds())
    return str(caught.value)


def header_refusal(blob: FileBlob, bounds: Bounds | None = None) -> str:
    with pytest.raises(RefusedImageError) as caught:
        read_size(blob, bounds or Bounds())
    return str(caught.value)


# Kinds of pictures


@pytest.mark.parametrize("kind", ["PNG", "BMP", "JPEG", "WEBP"])
def test_rgb_is_what_pillow_reads(blob: FileBlob, kind: str) -> None:
    data = encode(Image.fromarray(gradient(13, 7)), kind)
    with Image.open(io.BytesIO(data)) as expected:
        assert np.array_equal(decoded(blob, data), np.array(expected.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(blob: FileBlob, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(gradient(16, 40)), kind, exif)
    with Image.open(io.BytesIO(data)) as picture:
        upright = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    found = decoded(blob, data)
    assert np.array_equal(found, upright)
    assert found.shape == ((40, 16, 3) if orientation >= 5 else (16, 40, 3))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_leaves_the_picture_as_it_is(blob: FileBlob) -> None:
    file = io.BytesIO()
    Image.fromarray(gradient(8, 8)).save(file, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert np.array_equal(decoded(blob, file.getvalue()), gradient(8, 8))


def test_cmyk_is_pillows_conversion(blob: FileBlob) -> None:
    data = encode(Image.fromarray(gradient(16, 16)).convert("CMYK"), "JPEG")
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.mode == "CMYK"
        expected = np.array(picture.convert("RGB"))
    assert np.array_equal(decoded(blob, data), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_over_white(blob: FileBlob, mode: str) -> None:
    alpha = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
    picture = Image.fromarray(gradient(8, 8)).convert(mode)
    picture.putalpha(Image.fromarray(alpha))
    colour = np.array(picture.convert("RGBA"))[..., :3].astype(float)
    share = alpha[..., None] / 255
    expected = share * colour + (1 - share) * 255
    found = decoded(blob, encode(picture))
    assert np.abs(found - expected).max() <= 1
    assert (found[0, 0] == 255).all() and (found[-1, -1] == colour[-1, -1]).all()


def test_palettes_with_and_without_transparency(blob: FileBlob) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putpixel((1, 0), 1)
    assert decoded(blob, encode(picture)).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    picture.info["transparency"] = 0
    assert decoded(blob, encode(picture)).tolist() == [[[255, 255, 255], [200, 100, 50]]]


def test_colour_key_is_transparent(blob: FileBlob) -> None:
    picture = Image.new("RGB", (2, 1), (1, 2, 3))
    picture.putpixel((1, 0), (9, 9, 9))
    picture.info["transparency"] = (1, 2, 3)
    assert decoded(blob, encode(picture)).tolist() == [[[255, 255, 255], [9, 9, 9]]]


def test_grey_of_one_eight_and_sixteen_bits(blob: FileBlob) -> None:
    grey = np.array([[0, 1, 128, 255]], dtype=np.uint8)
    assert decoded(blob, encode(Image.fromarray(grey)))[0, :, 2].tolist() == [0, 1, 128, 255]
    deep = np.array([[0, 257 * 7, 257 * 7 + 128, 257 * 7 + 129, 65535]], dtype=np.uint16)
    found = decoded(blob, encode(Image.fromarray(deep)))
    assert found[0, :, 0].tolist() == [0, 7, 7, 8, 255]
    assert (found == found[..., :1]).all()
    assert decoded(blob, encode(Image.fromarray(grey > 1)))[0, :, 0].tolist() == [0, 0, 255, 255]


def test_a_span_is_read_where_it_lies(tmp_path: Path) -> None:
    data = encode(Image.fromarray(gradient(9, 5)), "JPEG")
    (tmp_path / "many").write_bytes(b"\xff\xd8before" + data + b"behind")
    span = SpanBlob(tmp_path / "many", 8, len(data))
    assert read_size(span, Bounds()) == (9, 5)
    with Image.open(io.BytesIO(data)) as expected:
        assert np.array_equal(np.array(read_rgb(span, Bounds())), np.array(expected))


# Damage


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def empty_png(height: int, width: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero-byte file"),
        (b"a text called .jpg\n" * 100, r"not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (encode(Image.new("RGB", (4, 4)), "TIFF"), "not an image"),
        (png()[:20], "truncated or damaged image"),
        (empty_png(0, 5), "not an image"),
    ],
)
def test_no_pictures_are_refused_by_their_header(blob: FileBlob, data: bytes, reason: str) -> None:
    blob.path.write_bytes(data)
    assert reason in header_refusal(blob)
    assert reason in refusal(blob)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_truncated_pixels_are_refused(blob: FileBlob, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), kind)
    blob.path.write_bytes(data[: len(data) // 2])
    assert refusal(blob) == "truncated or damaged image"


def test_headers_are_read_without_pixels(blob: FileBlob, monkeypatch: pytest.MonkeyPatch) -> None:
    blob.path.write_bytes(png(64, 32)[:60])
    monkeypatch.setattr(ImageFile.ImageFile, "load", pytest.fail)
    assert read_size(blob, Bounds()) == (64, 32)


def test_what_is_no_file_is_refused(blob: FileBlob, tmp_path: Path) -> None:
    assert header_refusal(blob) == "missing file"
    assert header_refusal(FileBlob(tmp_path)) == "unreadable file"
    os.mkfifo(tmp_path / "pipe.jpg")
    assert header_refusal(FileBlob(tmp_path / "pipe.jpg")) == "unreadable file"
    blob.path.symlink_to(blob.path)
    assert header_refusal(blob) == "unreadable file"


@pytest.mark.parametrize("side", [14_000, 16_000, 60_000])
def test_gigapixels_are_refused_without_allocating(blob: FileBlob, side: int) -> None:
    blob.path.write_bytes(empty_png(side, side))
    tracemalloc.start()
    assert header_refusal(blob) == refusal(blob) == "more than max_pixels=178956970 pixels"
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_bounds_are_those_of_the_settings(blob: FileBlob) -> None:
    blob.path.write_bytes(png(10, 12))
    assert read_size(blob, Bounds(smallest=10, pixels=120)) == (10, 12)
    assert header_refusal(blob, Bounds(pixels=119)) == "more than max_pixels=119 pixels"
    assert header_refusal(blob, Bounds(smallest=11)) == "shorter side below min_size=11"


@pytest.mark.filterwarnings("ignore")  # Pillow's, on what it meets
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_any_damage_gives_a_picture_or_a_refusal(blob: FileBlob, kind: str) -> None:
    rng = random.Random(kind)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encode(Image.fromarray(gradient(24, 17)), kind, None if kind == "BMP" else exif)
    refused = 0
    for _ in range(400):
        data = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        for _ in range(rng.randrange(1, 6)):
            if data:
                data[rng.randrange(min(len(data), rng.choice([64, 10**6])))] = rng.randrange(256)
        blob.path.write_bytes(data)
        try:
            read_size(blob, Bounds(pixels=10**6))
            assert read_rgb(blob, Bounds(pixels=10**6)).mode == "RGB"
        except RefusedImageError:
            refused += 1
    assert 100 < refused <= 400


# Resizing and cropping


def test_a_crop_at_the_same_scale_is_exact() -> None:
    pixels = gradient(20, 32)
    picture = Image.fromarray(pixels)
    array, crop = resize_and_crop(picture, (20, 16), Placement(left=0.5))
    assert crop == (0, 8) and np.array_equal(array, pixels[:, 8:24])
    array, crop = resize_and_crop(picture, (20, 16), Placement(left=0.999))
    assert crop == (0, 16) and np.array_equal(array, pixels[:, 16:])
    array, crop = resize_and_crop(picture, (20, 16), Placement(left=0.0, mirrored=True))
    mirrored = pixels[:, ::-1]
    assert crop == (0, 0) and np.array_equal(array, mirrored[:, :16])


@pytest.mark.parametrize("size", [(37, 90), (90, 37), (300, 211), (9, 10)])
@pytest.mark.parametrize("placement", [Placement(), Placement(0.1, 0.8), Placement(0.7, 0.3, True)])
def test_resizing_and_cropping_at_once_is_one_after_the_other(
    size: tuple[int, int], placement: Placement
) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    picture, target = Image.fromarray(noise), (32, 24)
    array, (top, left) = resize_and_crop(picture, target, placement)
    height, width = covering(size, target)
    assert height == 32 or width == 24
    assert height >= 32 and width >= 24
    if placement.mirrored:
        picture = ImageOps.mirror(picture)
    whole = np.array(picture.resize((width, height), Image.Resampling.LANCZOS))
    difference = array.astype(int) - whole[top : top + 32, left : left + 24].astype(int)
    assert np.abs(difference).max() <= 1


def test_an_extremely_long_picture_is_cropped_in_little_memory() -> None:
    picture = Image.new("RGB", (200_000, 2), "red")
    array, (top, left) = resize_and_crop(picture, (512, 512), Placement())
    assert top == 0 and left > 10**7
    assert (array == [255, 0, 0]).all()


def test_random_crops_are_uniform_and_central_ones_central() -> None:
    picture = Image.new("RGB", (11, 8))
    lefts = [
        resize_and_crop(picture, (8, 8), Choices((), random_crop=True).placement(seed))[1][1]
        for seed in range(4000)
    ]
    counts = np.bincount(lefts)
    assert counts.shape == (4,) and np.abs(counts - 1000).max() < 120
    flips = [Choices((), flip=True).placement(seed) for seed in range(4000)]
    assert {(f.top, f.left) for f in flips} == {(0.5, 0.5)}
    assert abs(sum(f.mirrored for f in flips) - 2000) < 150
    assert Choices(()).placement(5) == Placement()


def test_tensors_span_minus_one_to_one() -> None:
    pixels = np.array([[[0, 51, 255]]], dtype=np.uint8)
    tensor = to_tensor(pixels)
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 1, 1)
    assert torch.allclose(tensor.flatten(), torch.tensor([-1.0, -0.6, 1.0]))
    assert tensor.flatten()[[0, 2]].tolist() == [-1.0, 1.0]


def test_a_sample_names_itself() -> None:
    sample = Sample(torch.zeros(3, 8, 8), "x" * 100, (8, 8), (0, 0), "folder a.png")
    assert str(sample) == f"folder a.png ({'x' * 79}…)"


@pytest.mark.parametrize("mode", ["I;16", "RGBA", "LA", "P", "CMYK", "L", "RGB"])
def test_large_pictures_are_converted_as_small_ones(
    blob: FileBlob, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    if mode == "I;16":
        deep = np.arange(37 * 23, dtype=np.uint16).reshape(37, 23) * 77
        data = encode(Image.fromarray(deep))
    else:
        picture = Image.fromarray(gradient(37, 23)).convert(mode)
        data = encode(picture, "JPEG" if mode == "CMYK" else "PNG")
    expected = decoded(blob, data)
    monkeypatch.setattr("sfumato.data.decode._LARGE", 100)
    assert np.array_equal(decoded(blob, data), expected)


def test_a_file_larger_than_any_picture_is_refused(blob: FileBlob) -> None:
    blob.path.write_bytes(png())
    os.truncate(blob.path, 2**31 + 1)
    assert refusal(blob) == header_refusal(blob) == "file above 2 GiB"
