"""Cleans prompts as OpenCLIP's tokenizer does before it splits them.

Source: `basic_clean` and `whitespace_clean` in tokenizer.py of mlfoundations/open_clip, and the
steps that `fix_text` of ftfy takes. Its guess of text that was decoded in a wrong encoding is left
out: such text stays as it is.
"""

import html
import re
import unicodedata
from html.entities import html5

_ENTITY = re.compile(r"&#?[0-9A-Za-z]{1,24};")
_WINDOWS_1252 = re.compile(r"[\x80-\x9f]")
_TERMINAL = re.compile(r"\x1b\[[\d;]*[a-zA-Z]")
_BREAKS = re.compile(r"\r\n|[\r\u2028\u2029]")
_LIGATURES = "ĲĳŉǱǲǳǄǅǆǇǈǉǊǋǌﬀﬁﬂﬃﬄﬅﬆ"
_LETTERS = "IJ ij ʼn DZ Dz dz DŽ Dž dž LJ Lj lj NJ Nj nj ff fi fl ffi ffl ſt st"
_WIDE = (0x3000, *range(0xFF01, 0xFFF0))  # full and half width
_QUOTES = {**dict.fromkeys("\u02bc‘’‚‛", "'"), **dict.fromkeys("“”„‟", '"')}
_INVISIBLE = (
    *(*range(9), 0x0B, *range(0x0E, 0x20), 0x7F),
    *(*range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)),
)
# In ftfy's order: each table sees what the one before it has made.
_TABLES = (
    str.maketrans(dict(zip(_LIGATURES, _LETTERS.split(), strict=True))),
    {code: unicodedata.normalize("NFKC", chr(code)) for code in _WIDE},
    str.maketrans(_QUOTES),
)


def clean(prompt: str) -> str:
    """Return a prompt in lower case with single spaces, straight quotes and no HTML entities."""
    lines, escaped = [], True
    for line in re.findall(r"[^\n]*\n|[^\n]+", prompt):
        escaped = escaped and "<" not in line  # else it is HTML, as are all lines after it
        lines.append(_fixed(line, escaped=escaped))
    text = html.unescape(html.unescape("".join(lines)))
    return " ".join(text.split()).lower()


def _fixed(text: str, *, escaped: bool) -> str:
    """Return ftfy's repair of a line, which it repeats until nothing changes.

    Args:
        escaped: whether entities stand for characters.
    """
    before = None
    while text != before:
        before = text
        if escaped:
            text = _ENTITY.sub(_character, text)
        text = _WINDOWS_1252.sub(lambda found: html.unescape(f"&#{ord(found[0])};"), text)
        for table in _TABLES:
            text = text.translate(table)
        text = _BREAKS.sub("\n", text)
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        text = _TERMINAL.sub("", text).translate(dict.fromkeys(_INVISIBLE))
        text = unicodedata.normalize("NFC", text)
    return text


def _character(entity: re.Match[str]) -> str:
    """Return the character of an entity; also of &EACUTE;, which HTML does not know."""
    text = entity[0]
    if text[1] == "#":
        found = html.unescape(text)
        return text if ";" in found else found
    name = text[1:]
    if name in html5:
        return html5[name]
    lower = html5.get(name.lower()) if name == name.upper() else None
    return text if lower is None or html.unescape(text) != text else lower.upper()
