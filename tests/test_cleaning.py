"""Prompts of OpenCLIP's models: cleaned as its tokenizer does. Expected texts are ftfy 6.3.1's."""

from pathlib import Path

import pytest
import torch
from tiny_clip import write_tiny_clip
from tiny_hps import write_tiny_hps
from tiny_open_clip import write_tiny_open_clip

from sfumato.clip import clean
from sfumato.config import ClipRewardConfig, HpsRewardConfig, RewardConfig
from sfumato.rewards.build import build_learner, build_reward

IMAGES = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
# Curly quotes, an entity that is escaped twice, and white space; and what that is.
ODD, PLAIN = "“A fox’s”\u3000den &amp;amp;\n\tRED", '"a fox\'s" den & red'


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", ""),
        (" \n\t ", ""),
        ("A  Red\n\n Star ", "a red star"),
        ("line\r\nline\rline\u2028line\x85line", "line line line line…line"),
        ("“It’s” ‘a’ ‚b‛ „c‟ O\u02bcNeil", "\"it's\" 'a' 'b' \"c\" o'neil"),
        ("salt &amp; pepper", "salt & pepper"),
        ("salt &amp;amp; pepper &amp;lt;", "salt & pepper <"),
        ("&eacute; &EACUTE; &SZLIG; &nEACUTE; &;", "é é ss &neacute; &;"),
        ("&copy 2020 &#39;x&#39; &#x2019;y &#128; &#0;", "© 2020 'x' 'y € \ufffd"),
        ("<b> &rsquo;\n&rsquo;", "<b> ’ ’"),  # HTML: entities are resolved last, and stay curly
        ("&rsquo;\n<b> &rsquo;", "' <b> ’"),
        ("ＬＯＵＤ　Ｕﾀｰﾝ ￠", "loud uターン ¢"),
        ("ﬂuﬃeﬆ Ǆ ŉ ﬅ", "fluffiest dž 'n ſt"),
        ("a\x00b\x0b\x1f\x7f\ufeff\ufff9c\u200bd\u206a", "abc\u200bd"),
        ("\x1b[36;44mblue\x1b[0m \x1b[", "blue ["),
        ("cafe\u0301 \ufb01\u0301", "café fí"),
        ("\ud83d\udca9 \udca9\ud83d \ud800x", "💩 \ufffd\ufffd \ufffdx"),
        ("a\x93b\x94 \x81", 'a"b" \x81'),
        ("ΟΔΟΣ İ STRASSE ẞ", "οδος i̇ strasse ß"),
        ("a\u00a0b\u1680c\u2003d\x1ce", "a b c de"),
    ],
)
def test_a_prompt_is_cleaned_as_open_clip_does(prompt: str, expected: str):
    assert clean(prompt) == expected


def settings_of(folder: Path, kind: str) -> RewardConfig:
    place = str(folder)
    if kind == "hpsv2":
        write_tiny_hps(folder)
        return HpsRewardConfig(pretrained=place, processor=place)
    if kind == "open_clip":
        write_tiny_open_clip(folder)
        return ClipRewardConfig(pretrained=place)
    write_tiny_clip(folder)
    return ClipRewardConfig(pretrained=place)


@pytest.mark.parametrize(
    ("kind", "cleans"), [("hpsv2", True), ("open_clip", True), ("transformers", False)]
)
def test_the_rewards_of_open_clip_read_cleaned_prompts(tmp_path: Path, kind: str, cleans: bool):
    reward = build_reward(settings_of(tmp_path, kind))
    plain, odd, other = (float(reward(IMAGES, [each])) for each in (PLAIN, ODD, "a red star"))
    assert abs(plain - other) > 1e-4
    assert (abs(plain - odd) < 1e-7) == cleans


def test_what_is_trained_reads_prompts_as_its_export_does(tmp_path: Path):
    write_tiny_open_clip(tmp_path / "start")
    config = ClipRewardConfig(pretrained=str(tmp_path / "start"))
    learner = build_learner(config, start_scale=None)
    learner.save(tmp_path / "export")
    exported = build_reward(ClipRewardConfig(pretrained=str(tmp_path / "export")))
    found = learner.compare(IMAGES, [ODD])[0]
    torch.testing.assert_close(found, exported(IMAGES, [ODD]), atol=1e-4, rtol=0)
    assert not torch.allclose(found, exported(IMAGES, [PLAIN]), atol=1e-2, rtol=0)
