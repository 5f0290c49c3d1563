"""vit.py against timm's outputs (of tiny models in tests/data/timm), its own definitions, and wrong input."""

import json
import math
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import error, refusal
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import vit

DATA = Path(__file__).parent / "data"
FIXTURES = {  # a tiny model's file -> the backbone that it is a small sibling of
    "vit": "in1k-vit-b", "clip": "clip-vit-b", "openclip": "openclip-vit-b", "siglip": "siglip-so400m-384",
    "dinov2": "dinov2-vit-b", "eva02": "eva02-vit-b", "beit": "beit-vit-b",
}  # fmt: skip
FAMILIES = ["dinov2-vit-b", "eva02-vit-b", "beit-vit-b"]


def tiny(name: str, **changes) -> vit.ViTConfig:
    """A small sibling of a backbone."""
    sizes = dict(image_size=40, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=4.0)
    return replace(vit.BACKBONES[name], **sizes | ({"mlp_ratio": 8 / 3} if "eva02" in name else {}) | changes)


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Values of ordinary size everywhere, biases and norms included, so that no part of a model goes unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.normal_(0, 0.15, generator=generator)
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter += 1
    return model.eval()


def pictures(config: vit.ViTConfig) -> Tensor:
    """Two images of noise."""
    return torch.randn(2, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(1))


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether two models hold the same bits under the same names."""
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(params=FIXTURES)
def reference(request, tmp_path) -> tuple[vit.ViT, dict[str, Tensor]]:
    """A tiny model of timm, loaded into ours, and what timm computed with it."""
    path = DATA / "timm" / f"{request.param}.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        kwargs = json.loads(file.metadata()["fixture"])["kwargs"]
    kwargs["image_size"] = kwargs.pop("img_size")
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
    save_file(weights, tmp_path / "timm.safetensors")
    return vit.load(tmp_path / "timm.safetensors", replace(vit.BACKBONES[FIXTURES[request.param]], **kwargs)), tensors


@torch.no_grad()
def test_features_and_every_block(reference):
    model, tensors = reference
    depth, images = model.config.depth, tensors["input"].clone()
    used = model.config.grid * model.config.patch_size
    images[..., used:], images[..., used:, :] = torch.nan, 1e9  # pixels of no patch count for nothing
    assert error(model(images), tensors["features"]) < 1e-5
    for i in range(depth):
        tokens = model(images, skip_blocks=depth - 1 - i, norm=False)
        assert error(tokens, tensors[f"block.{i}"]) < 1e-5
        assert error(model(images, skip_blocks=depth - 1 - i), model.norm(tensors[f"block.{i}"])) < 1e-5


def test_gradients_with_checkpointing_and_in_bf16(reference):
    model, tensors = reference
    gradients = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        model(tensors["input"]).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    model.checkpointing = False
    assert all(a.abs().sum() > 0 and torch.equal(a, b) for a, b in zip(*gradients))
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model(tensors["input"])
        tokens.float().square().mean().backward()
    assert error(tokens.detach(), tensors["features"]) < 0.05
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    vit.round_linear_weights(model)  # changes nothing under autocast
    assert {p.dtype for p in model.blocks.parameters()} == {torch.float32, torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(tensors["input"]), tokens)


@pytest.mark.parametrize("name", vit.BACKBONES)
def test_backbones_have_the_tensors_and_numbers_of_the_real_ones(name):
    real = json.loads((DATA / "backbones.json").read_text())[name]
    config = replace(vit.BACKBONES[name], image_size=real["input_size"][1])  # DINOv2's file is for 518 pixels
    expected = {}
    for key, shape in real["tensors"].items():  # "blocks.*" stands for all blocks
        for i in range(real["depth"] if "*" in key else 1):
            if not key.startswith(("head", "attn_pool.", "fc_norm.")):
                expected[key.replace("*", str(i))] = shape
    with torch.device("meta"):
        model = vit.ViT(config)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected
    act = "SiLU" if config.family == "eva02" else {"gelu": "GELU", "quick_gelu": "QuickGELU"}[config.act]
    ours = [config.depth, config.num_heads, config.patch_size, config.num_prefix, config.norm_eps, act, config.crop_pct]
    keys = "depth num_heads patch_size num_prefix_tokens norm_eps act crop_pct".split()
    assert ours == [real[key] for key in keys] and real["interpolation"] == "bicubic"
    assert (list(config.mean), list(config.std)) == (real["mean"], real["std"])
    assert config.final_norm == (real["norm_eps"] if real["final_norm"] == "LayerNorm" else None)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_soft_capped_attention_is_its_definition(monkeypatch):
    """softmax(cap * tanh(q k^T / sqrt(d) / cap)) v; FlexAttention, here uncompiled, has the same score function."""
    q, k, v = (3 * torch.randn(2, 3, 33, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    logits = torch.einsum("bhid,bhjd->bhij", q.double(), k.double()) / 4
    expected = (5 * torch.tanh(logits / 5)).exp() @ v.double() / (5 * torch.tanh(logits / 5)).exp().sum(-1, True)
    assert error(vit.attention(q, k, v, 5.0), expected) < 1e-6
    assert error(vit.attention(q, k, v), expected) > 0.1
    monkeypatch.setattr(vit, "_compiled", lambda flex_attention: flex_attention)
    assert error(vit.flex_softcap(q, k, v, 5.0), expected) < 1e-6


@torch.no_grad()
def test_a_block_caps_its_attention():
    config = tiny("clip-vit-b", softcap=5.0)
    block, x = randomize(vit.Block(config)), torch.randn(2, 26, 32, generator=torch.Generator().manual_seed(1))
    q, k, v = block.attn.qkv(block.norm1(x)).view(2, 26, 3, 2, 16).permute(2, 0, 3, 1, 4)
    expected = x + block.attn.proj(vit.attention(q, k, v, 5.0).transpose(1, 2).reshape(2, 26, 32))
    assert error(block(x), expected + block.mlp(block.norm2(expected))) < 1e-6
    assert error(randomize(vit.Block(replace(config, softcap=None)))(x), block(x)) > 1e-3


@pytest.mark.parametrize("name", ["in1k-vit-b", "clip-vit-l-336", "moco-vit-b", "siglip-so400m-384"])
def test_preprocess_is_timms(name):
    create_transform = pytest.importorskip("timm.data").create_transform
    config = vit.BACKBONES[name]
    common = dict(input_size=config.image_size, interpolation="bicubic", mean=config.mean, std=config.std)
    for width, height in [(640, 480), (333, 500), (225, 224), (97, 31), (224, 224), (1, 7)]:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
        expected = create_transform(**common, crop_pct=config.crop_pct)(image)
        assert torch.allclose(vit.preprocess(image, config), expected, rtol=0, atol=1e-6)
        expected = create_transform(**common, crop_pct=1.0, crop_mode="squash")(image)
        assert torch.allclose(vit.preprocess(image, config, square=True), expected, rtol=0, atol=1e-6)


def test_preprocess_crops_the_center_of_any_kind_of_image():
    config = tiny("clip-vit-b")  # 40 pixels of 44
    pixels = np.random.default_rng(0).integers(0, 256, (60, 44, 3), np.uint8)
    x = torch.from_numpy(pixels[10:50, 2:42]).permute(2, 0, 1).double() / 255
    expected = (x - torch.tensor(config.mean)[:, None, None]) / torch.tensor(config.std)[:, None, None]
    assert error(vit.preprocess(Image.fromarray(pixels), config), expected) < 1e-6
    for mode in ("RGBA", "L", "LA", "P", "1", "CMYK"):
        for square in (False, True):
            x = vit.preprocess(Image.new("RGB", (50, 70)).convert(mode), config, square)
            assert x.shape == (3, 40, 40) and x.dtype == torch.float32 and x.isfinite().all()
    image = Image.fromarray(np.full((40, 40), 0x8040, np.uint16))
    assert set(np.asarray(vit.upright(image)).flat) == {0x80}  # 16-bit grays are scaled


@pytest.mark.parametrize("name", ["clip-vit-b", *FAMILIES])
def test_saved_and_loaded_bit_by_bit_plain_or_aligned(name, tmp_path):
    config = tiny(name, softcap=30.0 if vit.BACKBONES[name].family == "vit" else None)
    model, path = randomize(vit.ViT(config)), tmp_path / "new" / "folder" / "model.safetensors"
    vit.save(model, path)
    again = vit.load(path)
    assert again.config == config and same(again, model) and not again.training
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode  # readable as the umask says

    state = {f"encoder.{key}": value for key, value in load_file(path).items()}
    state |= {"head.weight": torch.zeros(32, 32), "decoder.blocks.0.attn.qkv.weight": torch.zeros(96, 32)}
    vit.save_tensors(state, path, vit.read_tensors(path)[1] | {"maskembed": "{}"})
    assert same(vit.load(path, tiny(name)), model) and vit.load(path).config == config


def test_timms_file_in_another_precision_with_its_head(tmp_path):
    config = tiny("dinov2-vit-b")
    state = {key: value.half() for key, value in randomize(vit.ViT(config)).state_dict().items()}
    torch.save({"model": state | {"head.weight": torch.zeros(9, 32)}}, tmp_path / "timm.bin")
    save_file(state | {"mask_token": torch.zeros(1, 32)}, tmp_path / "timm.safetensors")
    for file in ("timm.bin", "timm.safetensors"):
        for key, value in vit.load(tmp_path / file, config).state_dict().items():
            assert value.dtype == torch.float32 and torch.equal(value, state[key].float())


@pytest.mark.parametrize("failure", [OSError(28, "No space left"), SafetensorError("No space left")], ids=repr)
def test_a_full_disk_leaves_the_old_file(failure, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    vit.save(vit.ViT(tiny("in1k-vit-t")), path)
    before = path.read_bytes()
    monkeypatch.setattr(vit, "save_file", Mock(side_effect=failure))
    assert "No space left" in refusal(vit.save, vit.ViT(tiny("in1k-vit-t", depth=1)), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]  # and no temporary file
    assert "end in .safetensors" in refusal(vit.save, vit.ViT(tiny("in1k-vit-t")), tmp_path / "model.pth")


@pytest.mark.parametrize("name", ["in1k-vit-b", "siglip-vit-b", *FAMILIES])
@torch.no_grad()
def test_another_image_size_is_what_timm_makes_of_it(name, tmp_path):
    pytest.importorskip("timm")
    from test_convert import timm_model
    from timm.models import beit, eva, vision_transformer

    module = {"eva02-vit-b": eva, "beit-vit-b": beit}.get(name, vision_transformer)
    config, path = tiny(name), tmp_path / "timm.safetensors"
    state = randomize(timm_model(name, config)).state_dict()
    save_file(state, path)
    for size in (24, 56, 120):
        larger = replace(config, image_size=size)
        theirs = timm_model(name, larger)
        theirs.load_state_dict(module.checkpoint_filter_fn(state, theirs))
        assert error(vit.load(path, larger)(pictures(larger)), theirs.forward_features(pictures(larger))) < 1e-5


@pytest.mark.parametrize("grid", [3, 8])
def test_resampling_keeps_prefix_tokens_and_what_is_alike_everywhere(grid):
    prefix, patch = torch.randn(2, 1, 7), torch.randn(7)
    value = torch.cat([prefix.view(1, 2, 7), patch.expand(1, 25, 7)], 1)
    expected = torch.cat([value[:, :2], patch.expand(1, grid**2, 7)], 1)
    assert error(vit.resample_positions(value, grid, 2), expected) < 1e-6
    table = torch.cat([patch.expand(81, 7), torch.randn(3, 7)])
    expected = torch.cat([patch.expand((2 * grid - 1) ** 2, 7), table[-3:]])
    assert error(vit.resample_relative_bias(table, grid), expected) < 1e-6
    offset = torch.arange(-4.0, 5).view(9, 1).expand(9, 9).reshape(81, 1)  # a bias that grows from row to row
    rows = vit.resample_relative_bias(torch.cat([offset, torch.zeros(3, 1)]), grid)[:-3].view(2 * grid - 1, -1)
    assert (rows.diff(dim=0) > 0).all()
    assert error(-rows.flip(0), rows) < 1e-6 and error(rows.mean(1, True).expand_as(rows), rows) < 1e-6


class Malicious:
    """Unpickling it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("trap",)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_files_that_cannot_be_read(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, path = tiny("in1k-vit-t"), tmp_path / f"x.{kind}"
    assert f"{path}: cannot be read as weights (" in refusal(vit.load, path, config)
    if kind == "safetensors":
        save_file(vit.ViT(config).state_dict(), path)
    else:
        torch.save({"state_dict": vit.ViT(config).state_dict()}, path, _use_new_zipfile_serialization=kind == "zip")
    vit.load(path, config)
    content = path.read_bytes()
    for damaged in (content[:-1], content[: len(content) // 2], content[:5], b"", b"no weights\n" * 99):
        path.write_bytes(damaged)
        assert f"{path}: cannot be read as weights (" in refusal(vit.load, path, config)
    if kind != "safetensors":  # code in a pickle is not run
        torch.save({"x": Malicious()}, path, _use_new_zipfile_serialization=kind == "zip")
        assert "cannot be read as weights (Weights only load failed" in refusal(vit.load, path, config)
    assert not Path("trap").exists()


def test_files_in_another_layout_name_the_command_that_converts_them(tmp_path):
    clip, moco = tmp_path / "clip.safetensors", tmp_path / "moco.pth.tar"
    save_file({"vision_model.embeddings.patch_embedding.weight": torch.zeros(2)}, clip)
    torch.save({"state_dict": {"module.base_encoder.patch_embed.proj.weight": torch.zeros(2)}}, moco)
    command = f"run `python convert.py vit clip-vit-b {clip} clip-vit-b.safetensors` first"
    assert all(command in refusal(vit.load, clip, asked) for asked in ("clip-vit-b", vit.BACKBONES["clip-vit-b"]))
    assert f"python convert.py vit NAME {moco} NEW.safetensors" in refusal(vit.load, moco)
    aligned = DATA / "maskembed" / "authors-checkpoint.pth.tar"
    assert f"python convert.py vit clip-vit-l {aligned} " in refusal(vit.load, aligned, "clip-vit-l")


def test_weights_of_another_backbone(tmp_path):
    config, path = tiny("in1k-vit-t"), tmp_path / "changed.safetensors"
    for expected, change in {
        "tensor blocks.1.mlp.fc2.bias is missing": {"blocks.1.mlp.fc2.bias": None},
        "tensor norm_pre.weight is unexpected": {"norm_pre.weight": torch.zeros(32)},
        "tensor blocks.2.norm1.bias is unexpected": {"blocks.2.norm1.bias": torch.zeros(32)},
        "tensor blocks.0.mlp.fc2.weight is [128, 32], not [32, 128]": {"blocks.0.mlp.fc2.weight": torch.zeros(128, 32)},
        "tensor pos_embed is [1, 20, 32], not [1, 26, 32]": {"pos_embed": torch.zeros(1, 20, 32)},
        "tensor pos_embed is [1, 26, 48], not [1, 26, 32]": {"pos_embed": torch.zeros(1, 17, 48)},
    }.items():
        state = vit.ViT(config).state_dict() | change
        save_file({name: value for name, value in state.items() if value is not None}, path)
        assert refusal(vit.load, path, config).startswith(f"{path}: does not hold the expected backbone ({expected})")
    names = ("in1k-vit-t", "siglip-vit-b", "clip-vit-b", *FAMILIES)
    for name in names:
        save_file(vit.ViT(tiny(name)).state_dict(), path)
        for asked in set(names) - {name}:
            assert "does not hold the expected backbone" in refusal(vit.load, path, tiny(asked))
    assert "name one of in1k-vit-t, " in refusal(vit.load, path)
    assert "vit-b-clip: no such backbone" in refusal(vit.load, path, "vit-b-clip")


def test_a_file_of_ours_asked_for_as_something_else(tmp_path):
    path, config = tmp_path / "ours.safetensors", tiny("clip-vit-b", softcap=30.0)
    vit.save(vit.ViT(config), path)
    assert vit.load(path, replace(config, softcap=None)).config == config  # aligned, asked for by the backbone's name
    assert vit.load(path, replace(config, image_size=56)).config.image_size == 56
    for key, value in dict(act="gelu", depth=3, embed_dim=64, registers=4, mean=(0.5, 0.5, 0.5)).items():
        assert f"{path}: its {key} is " in refusal(vit.load, path, replace(config, **{key: value}))
    vit.save_tensors(vit.ViT(config).state_dict(), path, {"config": '{"window_size": 7}'})
    assert "another version" in refusal(vit.load, path)
    assert "reads 40 x 40" in refusal(vit.ViT(config), torch.zeros(1, 3, 46, 46))
    assert "softcap" in refusal(tiny, "beit-vit-b", softcap=30.0)


BESIDE = {  # what lies beside a weight file: the row asked for, config.json -> the activation, or a refusal
    "SigLIP of transformers": ("siglip-vit-b", {"model_type": "siglip", "vision_config": {}}, "gelu_tanh"),
    "SigLIP's tower": ("siglip-vit-b", {"model_type": "siglip_vision_model", "hidden_act": "gelu"}, "gelu"),
    "OpenAI's CLIP": ("openclip-vit-b", {"model_type": "clip", "vision_config": {}}, "quick_gelu"),
    "LAION's CLIP": ("clip-vit-b", {"model_type": "clip", "vision_config": {"hidden_act": "gelu"}}, "gelu"),
    "timm's CLIP": ("clip-vit-b", {"architecture": "vit_base_patch16_clip_224"}, "quick_gelu"),
    "timm's QuickGELU": ("openclip-vit-b", {"architecture": "vit_base_patch16_clip_quickgelu_384"}, "quick_gelu"),
    "Perception Encoder": ("clip-vit-b", {"architecture": "vit_pe_core_base_patch16_224"}, "is a vit_pe_core_base"),
    "timm's LAION": ("clip-vit-b", {"architecture": "vit_base_patch16_clip_224", "pretrained_cfg": {"tag": "laion2b"}},
                     "gelu"),
    "DINOv2": ("in1k-vit-b", {"model_type": "dinov2"}, "is a dinov2, not a vit"),
    "a VLM": ("clip-vit-b", {"adapter": "mlp"}, "quick_gelu"),
}


@pytest.mark.parametrize("name", BESIDE)
def test_no_file_is_read_as_what_it_is_not(name, tmp_path, capsys):
    row, beside, expected = BESIDE[name]
    config, file = vit.BACKBONES[row], tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text(json.dumps(beside), encoding="utf-8-sig")
    if " " in expected:
        assert f"config.json: says that model.safetensors {expected}" in refusal(vit.confirm, file, config)
        return
    assert vit.confirm(file, config) == vit.confirm(tmp_path, config) == replace(config, act=expected)
    assert ("its activation is" in capsys.readouterr().err) == (expected != config.act)
    assert vit.confirm(tmp_path / "elsewhere" / "model.safetensors", config) == config
    (tmp_path / "config.json").write_text("{")
    assert "config.json: is not a JSON object" in refusal(vit.confirm, file, config)


def test_the_activations_are_torchs():
    x = torch.randn(5, 32)
    for act, function in dict(gelu=F.gelu, gelu_tanh=partial(F.gelu, approximate="tanh"),
                              quick_gelu=lambda x: x * (1.702 * x).sigmoid()).items():  # fmt: skip
        mlp = vit.Mlp(tiny("in1k-vit-b", act=act))
        assert torch.equal(mlp(x), mlp.fc2(function(mlp.fc1(x))))


def test_weights_in_a_folder_and_not_a_number(tmp_path):
    model, folder = randomize(vit.ViT(tiny("in1k-vit-t"))), tmp_path / "download"
    vit.save(model, folder / "model.safetensors")
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "._model.safetensors").write_bytes(b"Mac OS X")
    assert same(vit.load(folder), model)
    vit.save(model, folder / "other.safetensors")
    assert "give one of the weight files in it: model.safetensors, other.safetensors" in refusal(vit.load, folder)
    (tmp_path / "empty").mkdir()
    assert "weight files in it: none" in refusal(vit.load, tmp_path / "empty")
    for value in (math.nan, math.inf):
        model.blocks[1].mlp.fc1.bias.data[3] = value
        vit.save(model, folder / "other.safetensors")
        said = refusal(vit.load, folder / "other.safetensors")
        assert "other.safetensors: tensor blocks.1.mlp.fc1.bias holds a NaN or an infinity" in said


def test_a_strip_is_its_middle():
    config, strip = vit.BACKBONES["clip-vit-b"], np.zeros((1, 20001, 3), np.uint8)
    strip[:, 9990:10011] = 200
    for image in (strip, strip.transpose(1, 0, 2)):
        assert (np.asarray(vit.fit(Image.fromarray(image), config)) == 200).all()


def test_rotary_positions_stay_in_float32():
    x, positions = torch.randn(1, 2, 17, 8).bfloat16(), vit.rotary_positions(4, 8, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        turned = vit.rotate(x, positions)
    assert turned.dtype == torch.bfloat16 and torch.equal(turned, vit.rotate(x.float(), positions).bfloat16())
