"""What changes a picture's look: profiles, gamma, colour keys, transparency, notes."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_files import gradient
from PIL import Image, ImageCms

from sfumato.data.decode import Bounds, RefusedImageError, read_header, read_rgb
from sfumato.data.entries import FileBlob

ADOBE = (0.3127, 0.329, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
P3 = (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)
SRGB = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
PICTURE = gradient(32, 32, 90)


@pytest.fixture
def blob(tmp_path: Path) -> FileBlob:
    return FileBlob(tmp_path / "picture.bin")


def decoded(blob: FileBlob) -> np.ndarray:
    return np.asarray(read_rgb(blob, Bounds())).astype(int)


def remark(blob: FileBlob) -> str:
    return read_header(blob, Bounds())[1]


def profile(primaries: tuple[float, ...], gamma: float, grey: bool = False) -> bytes:
    """Return a matrix profile of version 2, adapted to D50 by Bradford."""

    def colour(values: np.ndarray) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    pairs = list(zip(primaries[::2], primaries[1::2], strict=True))
    white, *rgb = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in pairs)
    m = np.array(rgb).T
    m = m * np.linalg.solve(m, white)
    b = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    d50 = np.array([0.9642, 1, 0.8249])
    m = np.linalg.inv(b) @ np.diag((b @ d50) / (b @ white)) @ b @ m
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, int(gamma * 256)) + b"\0\0"
    desc = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"case\0" + bytes(78)
    tags = [(b"desc", desc + bytes(-len(desc) % 4)), (b"wtpt", colour(d50)),
            (b"cprt", b"text\0\0\0\0none\0\0\0\0")]  # fmt: skip
    if grey:
        tags.append((b"kTRC", curve))
    else:
        tags += [(b"%cXYZ" % c, colour(m[:, i])) for i, c in enumerate(b"rgb")]
        tags += [(b"%cTRC" % c, curve) for c in b"rgb"]
    start, table, data = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, value in tags:
        table += name + struct.pack(">II", start + len(data), len(value))
        data += value
    head = struct.pack(">I4sI", start + len(data), b"", 0x02400000)
    head += (b"mntrGRAY" if grey else b"mntrRGB ") + b"XYZ " + bytes(12) + b"acsp" + bytes(28)
    return head + colour(d50)[8:] + bytes(48) + table + data


def by_littlecms(picture: Image.Image, icc: bytes) -> np.ndarray:
    source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(picture, source, srgb, outputMode="RGB")
    assert converted is not None
    return np.asarray(converted).astype(int)


def with_chunks(data: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG with further chunks after its header."""
    new = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return data[:33] + new + data[33:]


def png_of(array: np.ndarray = PICTURE) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def gama(gamma: float) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", round(gamma * 100_000))


def chrm(primaries: tuple[float, ...]) -> tuple[bytes, bytes]:
    return b"cHRM", struct.pack(">8I", *(round(each * 100_000) for each in primaries))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "icc",
    [profile(ADOBE, 2.2), profile(P3, 2.2), profile(SRGB, 1.0), profile(SRGB, 1.8)],
    ids=["Adobe", "P3", "linear", "1.8"],
)
def test_profiles_are_converted_as_littlecms_does(blob: FileBlob, kind: str, icc: bytes) -> None:
    Image.fromarray(PICTURE).save(blob.path, kind, icc_profile=icc)
    with Image.open(blob.path) as picture:
        expected, plain = by_littlecms(picture, icc), np.asarray(picture).astype(int)
    assert np.array_equal(decoded(blob), expected) and abs(expected - plain).max() > 3
    assert remark(blob) == "colours converted to sRGB (ICC profile)"


def test_profiles_of_grey_palettes_and_alpha(blob: FileBlob) -> None:
    grey, icc = Image.fromarray(PICTURE[..., 0]), profile(SRGB, 1.0, grey=True)
    grey.save(blob.path, "PNG", icc_profile=icc)
    assert np.array_equal(decoded(blob), by_littlecms(grey, icc))
    icc = profile(ADOBE, 2.2)
    palette = Image.fromarray(PICTURE).quantize(64)
    palette.save(blob.path, "PNG", icc_profile=icc)
    assert np.array_equal(decoded(blob), by_littlecms(palette.convert("RGB"), icc))
    rgba = np.dstack([PICTURE, np.full((32, 32), 255, np.uint8)])
    rgba[:8, :, 3] = 0
    Image.fromarray(rgba).save(blob.path, "PNG", icc_profile=icc)
    expected = by_littlecms(Image.fromarray(PICTURE), icc)
    expected[:8] = 255
    assert np.array_equal(decoded(blob), expected)


SRGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
UNCHANGED = {
    "sRGB": SRGB_PROFILE,
    "damaged": profile(ADOBE, 2.2)[:200],
    "noise": b"no profile",
    "of grey": profile(SRGB, 1.0, grey=True),
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("icc", UNCHANGED.values(), ids=UNCHANGED)
def test_other_profiles_change_no_bit(blob: FileBlob, kind: str, icc: bytes) -> None:
    Image.fromarray(PICTURE).save(blob.path, kind, icc_profile=icc)
    with Image.open(blob.path) as picture:
        assert np.array_equal(decoded(blob), np.asarray(picture))
    assert remark(blob) == ""


@pytest.mark.parametrize(
    "chunks",
    [[], [gama(1 / 2.2)], [gama(1 / 2.2), chrm(SRGB)], [(b"sRGB", b"\0"), gama(1.0)],
     [gama(0.0)], [chrm((0.0,) * 8)], [chrm((0.3127, 0.329) * 4)]],
)  # fmt: skip
def test_a_png_of_srgb_changes_no_bit(blob: FileBlob, chunks: list[tuple[bytes, bytes]]) -> None:
    blob.path.write_bytes(with_chunks(png_of(), *chunks))
    assert np.array_equal(decoded(blob), PICTURE) and remark(blob) == ""


@pytest.mark.parametrize("gamma", [1.0, 1 / 1.8, 0.7])
@pytest.mark.parametrize("grey", [False, True])
def test_gamma_of_a_png_is_applied(blob: FileBlob, gamma: float, grey: bool) -> None:
    array = PICTURE[..., 0] if grey else PICTURE
    blob.path.write_bytes(with_chunks(png_of(array), gama(gamma)))
    linear = (array / 255) ** (1 / gamma)
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    expected = curve * 255 if array.ndim == 3 else np.dstack([curve * 255] * 3)
    assert abs(decoded(blob) - expected).max() <= 1.5
    assert remark(blob) == "colours converted to sRGB (PNG gamma)"


def test_primaries_of_a_png_are_those_of_a_profile(blob: FileBlob) -> None:
    blob.path.write_bytes(with_chunks(png_of(), gama(1 / 1.8), chrm(P3)))
    expected = by_littlecms(Image.fromarray(PICTURE), profile(P3, 1.8))
    assert abs(decoded(blob) - expected).max() <= 2


def grey_png(bits: int, value: int, key: int, channels: int = 1) -> bytes:
    """Return a picture of 8 x 8 whose upper half has another value than the lower half."""
    rows = []
    for row in range(8):
        number = 0 if row < 4 else value
        if bits == 16:
            rows.append(b"\0" + struct.pack(">H", number) * 8 * channels)
        else:
            packed = sum(number << shift for shift in range(0, 8, bits))
            rows.append(b"\0" + bytes([packed]) * bits)
    kind = 0 if channels == 1 else 2
    header = struct.pack(">IIBBBBB", 8, 8, bits, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", struct.pack(">H", key) * channels),
              (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


@pytest.mark.parametrize(
    ("bits", "channels", "value", "shown"),
    [(1, 1, 1, 255), (2, 1, 2, 170), (4, 1, 5, 85), (16, 1, 25700, 100), (16, 3, 25600, 100)],
)
def test_colour_keys_of_every_depth(
    blob: FileBlob, bits: int, channels: int, value: int, shown: int
) -> None:
    blob.path.write_bytes(grey_png(bits, value, 0, channels))
    assert (decoded(blob)[:4] == 255).all() and (decoded(blob)[4:] == shown).all()
    blob.path.write_bytes(grey_png(bits, value, value, channels))
    assert (decoded(blob)[:4] == 0).all() and (decoded(blob)[4:] == 255).all()


def test_wholly_transparent_pictures_are_refused(blob: FileBlob) -> None:
    rgba = np.dstack([PICTURE, np.zeros((32, 32), np.uint8)])
    for data in (png_of(rgba), png_of(rgba[..., [0, 3]]), grey_png(16, 0, 0), grey_png(4, 0, 0)):
        blob.path.write_bytes(data)
        with pytest.raises(RefusedImageError, match="wholly transparent picture"):
            read_rgb(blob, Bounds())
    rgba[0, 0, 3] = 1
    blob.path.write_bytes(png_of(rgba))
    assert decoded(blob).min() >= 254


@pytest.mark.parametrize("size", [2, 60])
@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"tEXt", b"iCCP"])
def test_long_notes_and_profiles_are_read(blob: FileBlob, kind: bytes, size: int) -> None:
    body = bytes(size * 2**20)
    heads = {b"zTXt": b"w\0\0", b"iTXt": b"w\0\1\0\0\0", b"tEXt": b"w\0", b"iCCP": b"p\0\0"}
    body = heads[kind] + (body if kind == b"tEXt" else zlib.compress(body, 1))
    blob.path.write_bytes(with_chunks(png_of(), (kind, body)))
    assert np.array_equal(decoded(blob), PICTURE)


def test_notes_above_the_bound_are_refused_for_what_they_are(blob: FileBlob) -> None:
    notes = b"w\0\0" + zlib.compress(bytes(65 * 2**20), 1)
    blob.path.write_bytes(with_chunks(png_of(), (b"zTXt", notes)))
    with pytest.raises(RefusedImageError, match="notes or profile of a PNG above 64 MB"):
        read_rgb(blob, Bounds())
