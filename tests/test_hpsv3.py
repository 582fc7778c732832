"""HPSv3: equal to transformers' own Qwen2-VL and a head, asked the published question."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_open_clip import in_hub_cache
from tiny_hpsv3 import FILE, SECTIONS, TEXT, write_tiny_hpsv3
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from sfumato.clip import ImageSettings, preprocess
from sfumato.clip.preprocessing import CLIP_MEAN, CLIP_STD
from sfumato.config import Hpsv3RewardConfig
from sfumato.rewards import hpsv3
from sfumato.rewards.build import build_reward
from sfumato.rewards.hpsv3 import resized, to_patches

PROMPTS = ["a red star", "ring", "a small blue ring on a yellow ground"]
IMAGES = torch.rand(3, 3, 40, 57, generator=torch.Generator().manual_seed(0))
PIXELS = 200_704
QUESTION = (Path(hpsv3.__file__).parent / "hpsv3.txt").read_text()
# What Qwen2-VL's chat template makes of a message with an image and a text.
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{picture}<|vision_end|>{text}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "hpsv3"
    write_tiny_hpsv3(made)
    return made


def build(folder: Path, **settings: Any) -> Any:
    named = {"pretrained": str(folder), "processor": str(folder), "dtype": "float32", **settings}
    return build_reward(Hpsv3RewardConfig(**named))


def reference(folder: Path, state: dict[str, Tensor], images: Tensor) -> Tensor:
    """Return mu of PROMPTS by transformers' whole Qwen2-VL, as inference.py asks it."""
    tokenizer = Qwen2Tokenizer.from_pretrained(folder, padding_side="right")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    config: Any = Qwen2VLConfig.from_pretrained(folder)
    config.text_config.vocab_size = len(tokenizer)
    config.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    model: Any = Qwen2VLModel(config).float().eval()
    inner = {k: t for k, t in state.items() if not k.startswith(("rm_head", "lm_head"))}
    model.load_state_dict({re.sub("^model", "language_model", k): t for k, t in inner.items()})
    for rotary in (model.visual.rotary_pos_emb, model.language_model.rotary_emb):
        rotary.inv_freq = rotary.inv_freq.bfloat16().float()
    height, width = smart_resize(*images.shape[-2:], min_pixels=PIXELS, max_pixels=PIXELS)
    rows, columns = height // 14, width // 14
    sized = nn.functional.interpolate(images, (height, width), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (CLIP_MEAN, CLIP_STD))
    patches = ((sized - mean) / std).unflatten(2, (rows // 2, 2, 14))
    patches = patches.unflatten(-1, (columns // 2, 2, 14)).permute(0, 2, 5, 3, 6, 1, 4, 7)
    patches = torch.stack([patches, patches], 6).reshape(len(images) * rows * columns, -1)
    question = f"{QUESTION}\n\nEND\n"
    text = [
        CHAT.format(
            picture="<|image_pad|>" * (rows * columns // 4), text=question.format(prompt=prompt)
        )
        for prompt in PROMPTS
    ]
    batch = tokenizer(text, padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    states = model(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=patches,
        image_grid_thw=torch.tensor([[1, rows, columns]] * len(images)),
        # The published code leaves positions to the text tower, which counts tokens.
        position_ids=torch.arange(ids.shape[1]).expand(3, len(ids), -1),
    ).last_hidden_state
    x = states[ids == tokenizer.convert_tokens_to_ids("<|Reward|>")]
    for place in (0, 3, 5):
        x = x @ state[f"rm_head.{place}.weight"].T + state[f"rm_head.{place}.bias"]
        x = x if place == 5 else x.relu()
    return x[:, 0]


def test_the_question_is_the_published_one():
    """Compare with INSTRUCTION + prompt_with_special_token of hpsv3 1.0.0."""
    published = QUESTION.replace("{prompt}", "{text_prompt}") + "\n\nEND\n"
    assert hashlib.sha256(published.encode()).hexdigest() == (
        "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"
    )


@pytest.mark.parametrize("form", ["folder", "file", "pickle", "hub"])
def test_score_and_gradient_equal_transformers(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
):
    state = write_tiny_hpsv3(tmp_path / "own")
    home = tmp_path / "own"
    places = {"file": str(home / FILE), "hub": "someone/tiny"}
    if form == "pickle":
        torch.save({"model": state}, home / "HPSv3.pt")
        (home / FILE).unlink()
    if form == "hub":
        in_hub_cache(home, tmp_path / "cache", monkeypatch)
    reward = build(home, pretrained=places.get(form, str(home)))
    images = IMAGES.clone().requires_grad_()
    found, expected = reward(images, PROMPTS), reference(home, state, images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.02
    gradients = [torch.autograd.grad(each.sum(), images)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-4 * float(gradients[1].abs().max()), rtol=1e-4)


class Exact(TorchFunctionMode):
    """Keep float64 where transformers rounds to float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kept = isinstance(args[0], Tensor) and args[0].dtype == torch.float64 if args else False
        if kept and (func is Tensor.float or (func is Tensor.to and torch.float32 in args)):
            return args[0]
        return func(*args, **(kwargs or {}))


def test_gradient_equals_finite_differences(folder: Path):
    reward = build(folder).double()
    images = IMAGES[:2].double().requires_grad_()
    with Exact():
        assert torch.autograd.gradcheck(lambda x: reward(x, PROMPTS[:2]), images, fast_mode=True)


def test_rows_do_not_see_each_other(folder: Path):
    reward = build(folder)
    together = reward(IMAGES, PROMPTS)
    alone = torch.cat([reward(IMAGES[i : i + 1], [PROMPTS[i]]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    same = IMAGES[:1].expand(2, -1, -1, -1)
    assert reward(same, PROMPTS[:2]).diff().abs() > 1e-3
    assert reward(IMAGES[:2], [PROMPTS[0]] * 2).diff().abs() > 1e-3
    with pytest.raises(ValueError, match="3 images came with 1 prompts"):
        reward(IMAGES, PROMPTS[:1])


def test_a_prompt_is_made_tokens_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    reward, asked = build(folder), []
    monkeypatch.setattr(
        reward, "tokenizer", lambda text, **_: asked.append(text) or {"input_ids": [3, 9]}
    )
    reward.tokenizer.convert_tokens_to_ids = {"<|Reward|>": 9, "<|image_pad|>": 5}.get
    for _ in range(2):
        reward.tokens("a new star")
        reward.tokens("{braces} and %s")
    assert len(asked) == 2
    assert "Textual prompt - {braces} and %s\n\n" in asked[1]


@pytest.mark.parametrize("token", ["<|Reward|>", "<|image_pad|>"])
def test_a_prompt_with_a_token_of_the_question_is_refused(folder: Path, token: str):
    with pytest.raises(ValueError, match=re.escape(f"'a {token}' has {token}")):
        build(folder)(IMAGES[:1], [f"a {token}"])


@pytest.mark.parametrize(
    ("height", "width"), [(512, 512), (448, 448), (48, 111), (640, 96), (9, 7), (1, 150)]
)
def test_preprocessing_equals_transformers(height: int, width: int):
    # PIL rounds to 8 bits after each of its two passes; values of 64..191 do not overshoot.
    array = np.random.default_rng(0).integers(64, 192, (height, width, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": PIXELS, "longest_edge": PIXELS}, do_convert_rgb=False
    )
    expected = processor(images=[array], input_data_format="channels_last", return_tensors="pt")
    size = resized(height, width)
    assert expected["image_grid_thw"].tolist() == [[1, size[0] // 14, size[1] // 14]]
    images = torch.from_numpy(array).permute(2, 0, 1)[None] / 255
    found = to_patches(preprocess(images, ImageSettings(size, None)))
    assert found.shape == expected["pixel_values"].shape
    difference = (found - expected["pixel_values"]).unflatten(1, (3, -1)).abs().amax((0, 2))
    assert (difference * torch.tensor(CLIP_STD)).max() < 1.5 / 255


def test_sizes_equal_transformers():
    rng = np.random.default_rng(0)
    for height, width in np.exp(rng.uniform(0, 8, (500, 2))).astype(int).clip(1).tolist():
        if max(height, width) <= 200 * min(height, width) and min(height, width) >= 14:
            expected = smart_resize(height, width, min_pixels=PIXELS, max_pixels=PIXELS)
            assert resized(height, width) == expected, (height, width)
    assert resized(448, 448) == (448, 448)
    assert min(resized(1, 100_000)) >= 28


def test_it_is_frozen_and_the_same_in_training_mode_and_under_autocast(folder: Path):
    reward = build(folder)
    expected = reward(IMAGES, PROMPTS)
    nn.Sequential(reward).train()
    assert torch.equal(reward(IMAGES, PROMPTS), expected)
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reward(IMAGES, PROMPTS), expected)
    assert reward.scale == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_changes_little(folder: Path, dtype: str):
    reward, half = build(folder), build(folder, dtype=dtype)
    assert half.text.layers[0].mlp.up_proj.weight.dtype == getattr(torch, dtype)
    assert half.head[0].weight.dtype == torch.float32
    for part in ("vision.rotary_pos_emb", "text.rotary_emb"):
        frequencies = [each.get_submodule(part).inv_freq for each in (reward, half)]
        assert torch.equal(*frequencies)
    found = half(IMAGES, PROMPTS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, reward(IMAGES, PROMPTS), atol=0.05, rtol=0)


def test_checkpointed_layers_give_the_same_gradient(folder: Path):
    gradients = []
    for checkpointing in (False, True):
        images = IMAGES[:1].clone().requires_grad_()
        reward = build(folder, gradient_checkpointing=checkpointing)
        gradients.append(torch.autograd.grad(reward(images, PROMPTS[:1]).sum(), images)[0])
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-5)


def test_a_plan_reads_no_weights(folder: Path, tmp_path: Path):
    home = Path(shutil.copytree(folder, tmp_path / "copy"))
    (home / FILE).unlink()
    with torch.device("meta"):
        reward = build(home, dtype="bfloat16")
    assert {each.device.type for each in reward.parameters()} == {"meta"}
    score = reward(torch.empty(2, 3, 64, 64, device="meta", requires_grad=True), ["a", "star"])
    assert score.shape == (2,)
    assert score.requires_grad


def test_the_published_sizes_are_read(folder: Path, tmp_path: Path):
    """Count the weights of Qwen2-VL-7B-Instruct's settings, which are 8,291,375,616."""
    home = Path(shutil.copytree(folder, tmp_path / "copy"))
    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4}
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    vision = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": 3584}
    change(home, **sizes, **heads, **rope, vision_config=vision)
    with torch.device("meta"):
        reward = build(home, dtype="bfloat16")
    assert reward.vision.merger.mlp[2].weight.shape == (3584, 5120)
    assert reward.text.layers[0].self_attn.k_proj.weight.shape == (512, 3584)
    towers = (reward.vision, reward.text)
    count = sum(each.numel() for tower in towers for each in tower.parameters())
    words = 2 * 152_064 - reward.text.embed_tokens.weight.shape[0]  # lm_head's, and those cut off
    assert count + words * 3584 == 8_291_375_616


# --- Bad files


def change(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code ran",))


QUERY = "model.layers.1.self_attn.q_proj.weight"
CHANGES: dict[str, Any] = {
    "other": lambda s: {"logit_scale": torch.ones(())},
    "no head": lambda s: {k: t for k, t in s.items() if not k.startswith("rm_head")},
    "no vision": lambda s: {k: t for k, t in s.items() if not k.startswith("visual")},
    "width": lambda s: {**s, QUERY: torch.ones(48, 40)},
    "words": lambda s: {**s, "model.embed_tokens.weight": torch.ones(4096, 48)},
    "one output": lambda s: {**s, "rm_head.5.weight": torch.ones(1, 16)},
    "nan": lambda s: {**s, QUERY: torch.full((48, 48), torch.nan)},
    "infinity": lambda s: {**s, "rm_head.5.bias": torch.full((2,), torch.inf)},
    "more": lambda s: {**s, "rm_head.7.bias": torch.ones(2)},
}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("other", "weights are missing (visual.patch_embed.proj.weight"),
        ("no head", "6 weights are missing (rm_head.0.weight, rm_head.0.bias, rm_head.3.weight"),
        ("no vision", "weights are missing (visual.patch_embed.proj.weight"),
        ("width", f"{QUERY}: (48, 40) in the file, (48, 48) in the network"),
        ("words", "model.embed_tokens.weight: (4096, 48) in the file"),
        ("one output", "rm_head.5.weight: (1, 16) in the file, (2, 16) in the network"),
        ("nan", "1 weights with NaN or infinity"),
        ("infinity", "1 weights with NaN or infinity"),
        ("more", "unexpected (rm_head.7.bias)"),
    ],
)
def test_other_weights_are_refused(folder: Path, tmp_path: Path, fault: str, said: str):
    save_file(CHANGES[fault](load_file(folder / FILE)), tmp_path / FILE)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        build(folder, pretrained=str(tmp_path))
    assert FILE in str(caught.value)


@pytest.mark.parametrize("form", [FILE, "HPSv3.pt"])
@pytest.mark.parametrize("fault", ["half", "code", "empty", "text", "missing", "list"])
def test_damaged_files_are_refused(
    folder: Path, tmp_path: Path, form: str, fault: str, capsys: pytest.CaptureFixture[str]
):
    file, state = tmp_path / form, load_file(folder / FILE)
    save_file(state, file) if form == FILE else torch.save(state, file)
    match fault:
        case "half":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        case "code":
            torch.save({**state, "hook": Harmful()}, file)
        case "empty":
            file.write_bytes(b"")
        case "text":
            file.write_text("version https://git-lfs.github.com/spec/v1")
        case "missing":
            file.unlink()
        case "list":
            torch.save([1, 2, 3], file)
    with pytest.raises(ValueError, match=r"HPSv3\.(pt|safetensors)") as caught:
        build(folder, pretrained=str(tmp_path))
    assert "reward.pretrained" in str(caught.value)
    assert "code ran" not in capsys.readouterr().out


def break_base(folder: Path, fault: str) -> None:
    match fault:
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
        case "no config":
            (folder / "config.json").unlink()
        case "other model":
            change(folder, model_type="clip")
        case "damaged":
            (folder / "config.json").write_text('{"model_type": ')
        case "text":
            change(folder, hidden_size="wide")
        case "no heads":
            change(folder, num_attention_heads=0)
        case "sections":
            change(folder, rope_scaling={"type": "mrope", "mrope_section": [*SECTIONS, 9]})
        case "patches":
            stated = json.loads((folder / "config.json").read_text())["vision_config"]
            change(folder, vision_config={**stated, "patch_size": 10})
        case "layers":
            change(folder, num_hidden_layers=TEXT["num_hidden_layers"] + 1)
        case "tokens":
            Qwen2Tokenizer(vocab={"a": 0}, merges=[]).save_pretrained(folder)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("no tokenizer", "Qwen/Qwen2-VL-7B-Instruct"),
        ("no config", "has no config.json"),
        ("other model", "has model_type 'clip', and HPSv3 is a Qwen2-VL"),
        ("damaged", "config.json"),
        ("text", "config.json of reward.processor"),
        ("no heads", "config.json of reward.processor"),
        ("sections", "states no network that can be computed"),
        ("patches", "states no network that can be computed"),
        ("layers", "weights are missing (model.layers.2."),
        ("tokens", "has no token <|im_start|>"),
    ],
)
def test_a_base_that_does_not_fit_is_refused(folder: Path, tmp_path: Path, fault: str, said: str):
    home = Path(shutil.copytree(folder, tmp_path / "copy"))
    break_base(home, fault)
    with pytest.raises(ValueError, match=re.escape(said)):
        build(folder, processor=str(home))
