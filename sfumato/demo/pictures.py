"""Pictures of the demo: emoji in four styles, rendered with captions from npm packages.

A picture shows one emoji on a plain background: once large in the middle of white, else with
size, place, side and background drawn at random from the emoji's own stream. So the same packages
give the same bytes.
"""

import io
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from sfumato.demo.packages import Package, read_package
from sfumato.files import new_folder

IMAGE_SIZE = 64
DRAWN_SIZE = 256  # pixels of the drawing that is shrunk into a picture
VARIANTS = 6  # pictures of each emoji in each style
SIZES = (40, 60)  # pixels of an emoji; the first variant has PORTRAIT
PORTRAIT = 58  # pixels of an emoji in the middle
JITTER = 8  # of 255, of a background's color
TWICE = 2  # centred pictures of each emoji on each background
Color = tuple[int, int, int]
Picture = tuple[bytes, dict[str, str]]  # PNG, and captions with what they name
BACKGROUNDS: dict[str, Color] = {
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
# What the base model draws, by kind: labels of ImageNet that a classifier tells in a style or two.
# fmt: off
KINDS: dict[str, tuple[str, ...]] = {
    "animal": (
        "ant", "badger", "flamingo", "gorilla", "jellyfish", "lady-beetle", "leopard", "panda",
        "pig", "tiger", "zebra",
    ),
    "snack": (
        "bagel", "banana", "bell-pepper", "hot-dog", "ice-cream", "lemon", "pineapple", "pretzel",
    ),
    "vehicle": (
        "ambulance", "articulated-lorry", "fire-engine", "minibus", "motor-scooter",
        "pickup-truck", "racing-car", "speedboat", "tractor", "tram", "trolleybus",
    ),
    "instrument": (
        "accordion", "banjo", "bell", "drum", "flute", "saxophone", "trumpet", "violin",
    ),
    "device": ("desktop-computer", "joystick", "laptop", "printer", "radio", "television"),
    "tool": ("broom", "bucket", "hammer", "paintbrush", "screwdriver", "syringe"),
    "toy": ("balloon", "baseball", "basketball", "soccer-ball", "teddy-bear"),
    "object": (
        "abacus", "backpack", "candle", "castle", "kimono", "lipstick", "mosque", "parachute",
        "running-shoe", "shield", "shopping-cart", "sunglasses", "teapot", "umbrella",
    ),
}
# fmt: on
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}
THINGS = tuple(KIND_OF)
# Folders of pictures anywhere, and those of centred ones of the same emoji.
SPLITS = {"train": "things", "held_style": "held_things", "held_names": "new_things"}
HELD_STYLE, HELD_STYLE_NAMES, HELD_NAMES = "fluent", 150, 60


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
    """A drawing: its style, its name ("red-apple"), two or more keywords, its SVG and its kind."""

    style: str
    name: str
    keywords: tuple[str, ...]
    svg: str
    kind: str = ""  # one of KINDS, if the base model draws it


def write_pictures(out: Path, *, workers: int | None = None) -> Counter[str]:
    """Write six folders of out/pictures, each of PNG files and metadata.jsonl.

    An emoji of train, held_style and held_names has any size and place. held_names has 60 names
    that train has in no style; held_style has 150 names that train has in the three other styles.
    things, held_things and new_things have emoji of these three, large and in the middle, on
    each background: of the first two those of THINGS. Captions: `text`
    says all, `short` leaves some of it open, `words` adds keywords, and `kind` says what kind of
    thing one of THINGS is. SOURCES.json says where
    the drawings come from, and what was left out.

    Args:
        out: a new folder, but for out/packages, where the packages lie or are fetched to.

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
        lines: dict[str, list[str]] = {name: [] for both in SPLITS.items() for name in both}
        for split in lines:
            (folder / split).mkdir()
        homes = [splits.get((one.style, one.name), "train") for one in emoji]
        centred = [
            home == "held_names" or bool(one.kind) for one, home in zip(emoji, homes, strict=True)
        ]
        drawn = pool.map(draw, emoji, centred, chunksize=16)
        for one, home, groups in zip(emoji, homes, drawn, strict=True):
            if not groups:
                counts["not drawn"] += 1
            for split, pictures in zip((home, SPLITS[home]), groups, strict=False):
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
            tags = tuple(word.replace("_", " ").lower() for word in words)
            yield Emoji(style, name, tags, svg, KIND_OF.get(name, ""))


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


def draw(emoji: Emoji, centred: bool) -> list[list[Picture]]:
    """Return pictures of any size and place, then centred ones; nothing if the SVG fails."""
    drawn = _rasterize(emoji)
    if drawn is None:
        return []
    rng = random.Random(f"{emoji.style}/{emoji.name}")
    groups = [[_anywhere(emoji, drawn, rng, portrait=i == 0) for i in range(VARIANTS)]]
    if centred:
        rng = random.Random(f"centred {emoji.style}/{emoji.name}")
        groups.append([_centred(emoji, drawn, rng, each) for each in [*BACKGROUNDS] * TWICE])
    return groups


def _rasterize(emoji: Emoji) -> Image.Image | None:
    """Return a square of premultiplied colors, or None if the SVG fails or shows nothing."""
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
    return square


def _anywhere(emoji: Emoji, drawn: Image.Image, rng: random.Random, *, portrait: bool) -> Picture:
    background, size = "white", PORTRAIT
    x = y = (IMAGE_SIZE - size) // 2
    color = BACKGROUNDS[background]
    if not portrait:
        background, size = rng.choice(list(BACKGROUNDS)), rng.randint(*SIZES)
        x, y = rng.randint(0, IMAGE_SIZE - size), rng.randint(0, IMAGE_SIZE - size)
        color = _shade(background, rng)
        if rng.random() < 0.5:
            drawn = ImageOps.mirror(drawn)
    return _picture(emoji, drawn, rng, background, size, (x, y), color)


def _centred(emoji: Emoji, drawn: Image.Image, rng: random.Random, background: str) -> Picture:
    x = y = (IMAGE_SIZE - PORTRAIT) // 2
    return _picture(emoji, drawn, rng, background, PORTRAIT, (x, y), _shade(background, rng))


def _shade(background: str, rng: random.Random) -> Color:
    red, green, blue = (
        min(max(value + rng.randint(-JITTER, JITTER), 0), 255) for value in BACKGROUNDS[background]
    )
    return red, green, blue


def _picture(
    emoji: Emoji,
    drawn: Image.Image,
    rng: random.Random,
    background: str,
    size: int,
    place: tuple[int, int],
    color: Color,
) -> Picture:
    """Return one picture as PNG bytes, and its captions."""
    small = drawn.resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")
    canvas = Image.new("RGBA", (IMAGE_SIZE, IMAGE_SIZE), (*color, 255))
    canvas.alpha_composite(small, place)
    stream = io.BytesIO()
    canvas.convert("RGB").save(stream, "PNG")
    return stream.getvalue(), caption(emoji, background, rng)


def caption(emoji: Emoji, background: str, rng: random.Random) -> dict[str, str]:
    """Return captions (all of it, some of it, its name with keywords), and what it shows.

    A thing of KINDS has a fourth caption, of its kind alone: "an animal".
    """
    name = phrase(emoji.name)
    style, place = f"{emoji.style} style", f"on {article(background)} {background} background"
    kept = rng.choice([(), (), (style,), (place,)])
    words = rng.sample(emoji.keywords, min(2, len(emoji.keywords)))
    return {
        "text": ", ".join((name, style, place)),
        "short": ", ".join((name, *kept)),
        "words": ", ".join((name, *words)),
        **({"kind": ", ".join((phrase(emoji.kind), *kept))} if emoji.kind else {}),
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
