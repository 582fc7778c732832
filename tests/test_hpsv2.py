"""HPSv2: equal to OpenCLIP's own towers, letterboxed as published; other files are refused."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from test_open_clip import PROMPTS, in_hub_cache, tokens_of
from tiny_hps import FILE, OLDER, save, write_tiny_hps
from torch import Tensor

from sfumato.clip import ImageSettings, preprocess
from sfumato.clip.preprocessing import CLIP_MEAN, CLIP_STD
from sfumato.config import HpsRewardConfig, TrainConfig
from sfumato.rewards.build import build_reward
from sfumato.run.identity import contents_of

IMAGES = torch.rand(2, 3, 33, 48, generator=torch.Generator().manual_seed(0))
MEAN, STD = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
BOX = ImageSettings(32, 32, rounds=True, letterbox=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "hps"
    write_tiny_hps(made)
    return made


def settings(folder: Path, **changes: Any) -> HpsRewardConfig:
    return HpsRewardConfig(**{"pretrained": str(folder), "processor": str(folder), **changes})


def build(folder: Path, **changes: Any) -> Any:
    return build_reward(settings(folder, **changes))


def pixels_of(images: Tensor, preprocessing: str) -> Tensor:
    """Return what the image tower gets, for IMAGES' size: 33 x 48 becomes 22 x 32, or 32 x 46."""
    if preprocessing == "letterbox":
        images = F.interpolate(images, (22, 32), mode="bicubic", antialias=True)
        images = F.pad(images, (0, 0, 5, 5))
    else:
        images = F.interpolate(images, (32, 46), mode="bicubic", antialias=True)[..., 7:39]
    return (images - MEAN.to(images.dtype)) / STD.to(images.dtype)


@pytest.mark.parametrize("form", ["folder", "file", "safetensors"])
@pytest.mark.parametrize("preprocessing", ["letterbox", "crop"])
def test_score_and_gradient_equal_open_clips(tmp_path: Path, form: str, preprocessing: str):
    text, vision = write_tiny_hps(tmp_path)
    if form == "safetensors":
        content = torch.load(tmp_path / FILE, weights_only=True)
        save_file(content["state_dict"], tmp_path / FILE.replace(".pt", ".safetensors"))
        (tmp_path / FILE).unlink()
    place = tmp_path / FILE if form == "file" else tmp_path
    reward = build(tmp_path, pretrained=str(place), preprocessing=preprocessing)
    images = IMAGES.clone().requires_grad_()
    prompts = text.embed(tokens_of(tmp_path)).detach()
    expected = (vision.embed(pixels_of(images, preprocessing)) * prompts).sum(1)
    found = reward(images, PROMPTS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.01
    gradients = [torch.autograd.grad(each.sum(), images)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-4 * float(gradients[1].abs().max()), rtol=1e-4)
    assert reward.scale == 1
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_gradient_equals_finite_differences(folder: Path):
    reward = build(folder).double()
    images = IMAGES.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reward(x, PROMPTS), images, fast_mode=True)


def test_weights_in_half_precision_change_little(folder: Path):
    reward, half = build(folder), build(folder, dtype="bfloat16")
    assert half(IMAGES, PROMPTS).dtype == torch.float32
    torch.testing.assert_close(half(IMAGES, PROMPTS), reward(IMAGES, PROMPTS), atol=0.05, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reward(IMAGES, PROMPTS), reward.train()(IMAGES, PROMPTS))


# --- Letterbox


@pytest.mark.parametrize(
    ("height", "width"), [(64, 64), (32, 32), (32, 20), (40, 111), (97, 41), (9, 7), (3, 90)]
)
def test_letterbox_equals_pils(height: int, width: int):
    # PIL rounds to 8 bits after each of its two passes; values of 64..191 do not overshoot.
    array = np.random.default_rng(0).integers(64, 192, (height, width, 3), dtype=np.uint8)
    scale = 32 / max(height, width)
    rows, columns = round(height * scale), round(width * scale)
    picture = Image.fromarray(array).resize((columns, rows), Image.Resampling.BICUBIC)
    expected = Image.new("RGB", (32, 32))
    expected.paste(picture, ((32 - columns) // 2, (32 - rows) // 2))
    found = preprocess(torch.from_numpy(array).permute(2, 0, 1)[None] / 255, BOX)[0] * STD + MEAN
    difference = found - torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 255
    assert difference.abs().max() < 1.5 / 255
    black = torch.from_numpy(np.array(expected)).permute(2, 0, 1) == 0
    assert black.float().mean() == pytest.approx(1 - rows * columns / 32**2)
    assert found[black].abs().max() < 1e-6 if black.any() else True


def test_a_thin_image_keeps_a_row():
    found = preprocess(torch.ones(1, 3, 1, 200), BOX)[0] * STD + MEAN
    assert found.sum() == pytest.approx(3 * 32, rel=1e-4)  # one row of white


def test_letterbox_gradient_equals_finite_differences():
    images = torch.rand(1, 3, 5, 9, dtype=torch.float64).requires_grad_()
    box = ImageSettings(6, 6, letterbox=True)
    assert torch.autograd.gradcheck(lambda x: preprocess(x, box), images)


# --- Which file


def test_versions_are_told_apart_by_name(folder: Path, tmp_path: Path):
    home = Path(shutil.copytree(folder, tmp_path / "both"))
    content = torch.load(home / FILE, weights_only=True)
    content["state_dict"]["visual.ln_post.bias"] += 1
    torch.save(content, home / OLDER)
    new, old = build(home), build(home, version="2.0")
    assert not torch.equal(new(IMAGES, PROMPTS), old(IMAGES, PROMPTS))
    named = build(folder, pretrained=str(home / OLDER), version="2.0")
    assert torch.equal(named(IMAGES, PROMPTS), old(IMAGES, PROMPTS))
    for file, version, right in ((OLDER, "2.1", "2.0"), (FILE, "2.0", "2.1")):
        with pytest.raises(ValueError, match=rf"is version {right} by its name.*version={right}"):
            build(folder, pretrained=str(home / file), version=version)
    renamed = (home / OLDER).rename(home / "mine.pt")
    with pytest.warns(UserWarning, match=r"mine\.pt is taken for version 2\.1"):
        mine = build(home, pretrained=str(renamed))
    assert torch.equal(mine(IMAGES, PROMPTS), old(IMAGES, PROMPTS))
    with pytest.raises(ValueError, match=r"has no HPS_v2_compressed\.safetensors or .*\.pt; give"):
        build(home, version="2.0")


@pytest.mark.parametrize(
    ("link", "given"), [(FILE, f"links/{FILE}"), (FILE, "links"), ("mine.pt", "links/mine.pt")]
)
def test_a_link_hides_no_version(folder: Path, tmp_path: Path, link: str, given: str):
    shutil.copy(folder / FILE, tmp_path / OLDER)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / link).symlink_to(tmp_path / OLDER)
    with pytest.raises(ValueError, match=rf"{link} is version 2\.0 by its name"):
        build(folder, pretrained=str(tmp_path / given))


@pytest.mark.parametrize("room", ["reward", "validation.rewards.a"])
def test_a_run_knows_the_file_that_it_reads(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: str
):
    key = f"{room}.pretrained"

    def digest_of(place: str | Path, version: str = "2.1") -> dict[str, str]:
        config = settings(folder, pretrained=str(place), version=version)
        run = TrainConfig(reward=config)
        if room != "reward":
            run = TrainConfig()
            run.validation.rewards = {"a": config}
        found = contents_of(run, tmp_path, sections=["reward", "validation.rewards"])
        return {name: each for name, each in found.items() if name == key}

    home = Path(shutil.copytree(folder, tmp_path / "copy"))
    before = digest_of(home)
    assert before.keys() == {key}
    assert digest_of(folder) == before
    shutil.copy(home / FILE, home / OLDER)  # the other version, downloaded later
    (home / "notes.txt").write_text("not read")
    assert digest_of(home) == before
    in_hub_cache(home, tmp_path / "cache", monkeypatch)
    assert digest_of("someone/tiny").keys() == before.keys()
    monkeypatch.chdir(tmp_path)
    assert digest_of("someone/other") == {}
    assert digest_of("../../nothing") == {}
    torch.save(torch.load(home / FILE, weights_only=True) | {"epoch": 4}, home / FILE)
    assert digest_of(home) != before
    assert digest_of(home, "2.0") != digest_of(home)


def test_a_hub_id_is_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    in_hub_cache(folder, tmp_path, monkeypatch)
    found = build(folder, pretrained="someone/tiny")(IMAGES, PROMPTS)
    assert torch.equal(found, build(folder)(IMAGES, PROMPTS))
    with pytest.raises(ValueError, match=r"reward\.pretrained = 'someone/other' is no folder here"):
        build(folder, pretrained="someone/other")
    with pytest.raises(ValueError, match=r"reward\.processor = 'someone/other' is no folder here"):
        build(folder, processor="someone/other")


def test_a_plan_reads_no_weights(folder: Path, tmp_path: Path):
    home = Path(shutil.copytree(folder, tmp_path / "copy"))
    (home / FILE).unlink()
    with torch.device("meta"):
        reward = build(home)
        published = build(home, pretrained="xswu/HPSv2")
    assert {each.device.type for each in reward.parameters()} == {"meta"}
    # OpenCLIP's ViT-H-14 has as many parameters.
    assert sum(each.numel() for each in published.parameters()) == 986_109_441


# --- Bad files


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code ran",))


def fault_in(file: Path, fault: str) -> None:
    content = torch.load(file, weights_only=True)
    state, name = content["state_dict"], "visual.transformer.resblocks.0.attn.in_proj_weight"
    match fault:
        case "other":
            save({"mlp.layers.0.weight": torch.ones(1024, 768)}, file)
        case "part":
            save({k: t for k, t in state.items() if not k.startswith("visual.")}, file)
        case "width":
            save({**state, "visual.proj": torch.ones(50, 24)}, file)
        case "nan":
            save({**state, name: torch.full_like(state[name], torch.nan)}, file)
        case "infinity":
            save({**state, "logit_scale": torch.tensor(torch.inf)}, file)
        case "half":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        case "code":
            torch.save({**content, "optimizer": Harmful()}, file)
        case "list":
            torch.save([1, 2], file)
        case "text":
            file.write_text("version https://git-lfs.github.com/spec/v1")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("other", "weights are missing (logit_scale"),
        ("part", "weights are missing (visual.class_embedding"),
        ("width", "visual.proj: (24, 50) in the file, (24, 48) in the network"),
        ("nan", "3 weights with NaN or infinity"),
        ("infinity", "1 weights with NaN or infinity (logit_scale)"),
        ("half", "cannot be read"),
        ("code", "cannot be read"),
        ("list", "holds no named tensors"),
        ("text", "cannot be read"),
    ],
)
def test_other_files_are_refused(
    folder: Path, tmp_path: Path, fault: str, said: str, capsys: pytest.CaptureFixture[str]
):
    home = Path(shutil.copytree(folder, tmp_path / "copy"))
    fault_in(home / FILE, fault)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        build(home)
    assert FILE in str(caught.value)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["missing", "damaged"])
def test_a_tokenizer_that_cannot_be_read_is_named(folder: Path, tmp_path: Path, fault: str):
    if fault == "damaged":
        (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer") as caught:
        build(folder, processor=str(tmp_path))
    assert fault == "damaged" or "laion/CLIP-ViT-H-14-laion2B-s32B-b79K" in str(caught.value)
