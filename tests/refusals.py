"""What every refusal must say: the key, the value, and what to do."""

import re

REMEDY = re.compile(
    r"\b(give|choose|set|use|write|leave|add|correct|name|save|download|remove|did you mean"
    r"|run with|restore|train|check|convert|copy|merge|is [\d.]+$)\b"
)


def assert_explained(message: str, key: str, value: object = None, *more: str) -> None:
    """Assert that a message has a key, a value, a remedy, and more texts; in one line."""
    missing = [text for text in (key, *more) if text not in message]
    assert not missing, f"{message!r} lacks {missing}"
    if value is not None:
        assert any(text in message for text in (str(value), repr(value))), f"{message!r}: {value!r}"
    assert REMEDY.search(message), f"{message!r} does not say what to do"
    assert "\n" not in message
