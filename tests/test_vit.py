"""vit.py against timm's and transformers' outputs, its own definitions, and wrong input.

tests/data/timm holds tiny models of timm with what every block gives; tests/data/backbones.json the tensors of the real
ones. Tests that need timm or transformers themselves are skipped where those are not installed.
"""

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import vit

DATA = Path(__file__).parent / "data"
FIXTURES = {  # a tiny model's file -> the backbone that it is a small sibling of
    "vit": "in1k-vit-b",
    "clip": "clip-vit-b",
    "openclip": "openclip-vit-b",
    "siglip": "siglip-so400m-384",
    "dinov2": "dinov2-vit-b",
    "eva02": "eva02-vit-b",
    "beit": "beit-vit-b",
}
TINY = dict(image_size=40, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=4.0)


def error(ours: Tensor, reference: Tensor) -> float:
    """Relative error, of the norm."""
    assert ours.shape == reference.shape
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()


def tiny(name: str, **changes) -> vit.ViTConfig:
    """A small sibling of a backbone."""
    config = replace(vit.BACKBONES[name], **TINY)
    return replace(config, **({"mlp_ratio": 8 / 3} if config.family == "eva02" else {}) | changes)


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Values of ordinary size everywhere, biases and norms included, so that no part of a model goes unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.normal_(0, 0.15, generator=generator)
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter += 1
    return model.eval()


def pictures(config: vit.ViTConfig, count: int = 2) -> Tensor:
    return torch.randn(count, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(1))


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether two models hold the same bits under the same names."""
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def refusal(function, *args) -> str:
    """The message of a WeightsError: one line, one sentence or two."""
    with pytest.raises(vit.WeightsError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message and 20 < len(message) < 600
    return message


# ----------------------------------------------------------------------------------------------------------------------
# The model


@pytest.fixture(scope="module", params=FIXTURES)
def reference(request, tmp_path_factory) -> tuple[vit.ViT, dict[str, Tensor]]:
    """A tiny model of timm, loaded into ours, and what timm computed with it."""
    path = DATA / "timm" / f"{request.param}.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        kwargs = json.loads(file.metadata()["fixture"])["kwargs"]
    kwargs["image_size"] = kwargs.pop("img_size")
    weights = tmp_path_factory.mktemp("timm") / "weights.safetensors"
    save_file({k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}, weights)
    return vit.load(weights, replace(vit.BACKBONES[FIXTURES[request.param]], **kwargs)), tensors


@torch.no_grad()
def test_features_and_every_block(reference):
    model, tensors = reference
    depth, images = model.config.depth, tensors["input"]
    assert error(model(images), tensors["features"]) < 1e-5
    for i in range(depth):
        tokens = model(images, skip_blocks=depth - 1 - i, norm=False)
        assert error(tokens, tensors[f"block.{i}"]) < 1e-5
        assert error(model(images, skip_blocks=depth - 1 - i), model.norm(tensors[f"block.{i}"])) < 1e-5


@torch.no_grad()
def test_masks_act_on_pixels_and_pixels_of_no_patch_count_for_nothing(reference):
    model, tensors = reference
    images, size, grid = tensors["input"].clone(), model.config.patch_size, model.config.grid
    masks = (torch.rand(6, grid * grid, generator=torch.Generator().manual_seed(2)) > 0.5).float()  # 3 views an image
    masks[2], masks[5] = 1, 0
    pixels = masks.view(6, 1, grid, grid).repeat_interleave(size, 2).repeat_interleave(size, 3)
    border = images.shape[-1] - grid * size
    masked = images.repeat_interleave(3, 0) * torch.nn.functional.pad(pixels, (0, border, 0, border))
    expected = model(masked)
    if border:  # whatever is there
        images[..., grid * size :] = torch.nan
        images[..., grid * size :, :] = 1e9
    assert error(model(images, masks), expected) < 1e-5
    assert error(model(images, masks[::3]), expected[::3]) < 1e-5  # one view an image
    assert error(model(images, masks, skip_blocks=1, norm=False), model(masked, skip_blocks=1, norm=False)) < 1e-5
    assert error(model(images), tensors["features"]) < 1e-5


def gradients(model: vit.ViT, images: Tensor, masks: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(images, masks).square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


def test_checkpointing_gives_the_same_gradients(reference):
    model, tensors = reference
    masks = torch.ones(2, model.config.num_patches)
    plain = gradients(model, tensors["input"], masks)
    model.checkpointing = True
    again = gradients(model, tensors["input"], masks)
    model.checkpointing = False
    assert len(plain) == len(again) and all(torch.equal(a, b) for a, b in zip(plain, again))


def test_bf16_autocast(reference):
    model, tensors = reference
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model(tensors["input"], torch.ones(4, model.config.num_patches))
        tokens.float().square().mean().backward()
    assert error(tokens[::2].detach(), tensors["features"]) < 0.05
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_images_of_another_size_are_refused():
    config = tiny("in1k-vit-b")
    with pytest.raises(ValueError, match="48.*reads 40 x 40"):
        vit.ViT(config)(torch.zeros(1, 3, 48, 48))


def test_soft_cap_is_not_for_beit():
    with pytest.raises(ValueError, match="softcap"):
        replace(vit.BACKBONES["beit-vit-b"], softcap=30.0)


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
    assert (config.depth, config.num_heads, config.patch_size) == (real["depth"], real["num_heads"], real["patch_size"])
    assert (config.num_prefix, config.crop_pct) == (real["num_prefix_tokens"], real["crop_pct"])
    assert (list(config.mean), list(config.std)) == (real["mean"], real["std"]) and real["interpolation"] == "bicubic"
    assert config.norm_eps == real["norm_eps"]
    assert config.final_norm == (real["norm_eps"] if real["final_norm"] == "LayerNorm" else None)
    act = "SiLU" if config.family == "eva02" else {"gelu": "GELU", "quick_gelu": "QuickGELU"}[config.act]
    assert act == real["act"]


SHAPES = [(1, 1, 1, 8), (2, 3, 50, 16), (1, 2, 257, 24), (2, 2, 300, 72), (1, 5, 729, 8)]  # [B, H, T, d]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [30.0, 2.0])
def test_soft_capped_attention_is_its_definition(shape, dtype, softcap):
    generator = torch.Generator().manual_seed(3)
    q, k, v, grad = (2 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    q, k, v, grad = (x.to(dtype).double() for x in (q, k, v, grad))  # both functions get the same numbers
    results = []
    for function, kind in ((vit.attention, dtype), (vit.softcap_attention_plain, torch.float64)):
        inputs = [x.to(kind).requires_grad_() for x in (q, k, v)]
        y = function(*inputs, softcap)
        results.append([y.detach(), *torch.autograd.grad(y, inputs, grad.to(kind))])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for ours, plain in zip(*results):
        assert ours.dtype == dtype
        assert (ours - plain).norm() <= tolerance * max(plain.norm(), 1e-3)


def test_soft_capped_model_with_strided_inputs():
    """As the model calls it: q, k and v are views into one tensor."""
    config = tiny("clip-vit-b", softcap=5.0)
    model, images = randomize(vit.ViT(config)), pictures(config)
    block, x = model.blocks[0], model.embed(images)
    q, k, v = block.attn.qkv(block.norm1(x)).view(2, 26, 3, 2, 16).permute(2, 0, 3, 1, 4)
    attended = vit.softcap_attention_plain(q, k, v, 5.0).transpose(1, 2).reshape(2, 26, 32)
    x = x + block.attn.proj(attended)
    expected = x + block.mlp(block.norm2(x))
    assert error(model(images, skip_blocks=1, norm=False), expected) < 1e-5
    uncapped = randomize(vit.ViT(replace(config, softcap=None)))
    assert error(uncapped(images, skip_blocks=1, norm=False), expected) > 1e-3


# ----------------------------------------------------------------------------------------------------------------------
# Preparing an image


SIZES = [(640, 480), (333, 500), (225, 224), (97, 31), (224, 224), (1, 7)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["in1k-vit-b", "clip-vit-l-336", "moco-vit-b", "siglip-so400m-384"])
def test_preprocess_is_timms(size, name):
    pytest.importorskip("timm")
    from timm.data import create_transform

    config = vit.BACKBONES[name]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    common = dict(input_size=config.image_size, interpolation="bicubic", mean=config.mean, std=config.std)
    expected = create_transform(**common, crop_pct=config.crop_pct)(image)
    assert torch.allclose(vit.preprocess(image, config), expected, rtol=0, atol=1e-6)
    expected = create_transform(**common, crop_pct=1.0, crop_mode="squash")(image)
    assert torch.allclose(vit.preprocess(image, config, square=True), expected, rtol=0, atol=1e-6)


def test_preprocess_crops_the_centre():
    config = tiny("clip-vit-b")  # 40 pixels of 44
    pixels = np.random.default_rng(0).integers(0, 256, (60, 44, 3), np.uint8)
    x = torch.from_numpy(pixels[10:50, 2:42]).permute(2, 0, 1).double() / 255
    expected = (x - torch.tensor(config.mean)[:, None, None]) / torch.tensor(config.std)[:, None, None]
    assert error(vit.preprocess(Image.fromarray(pixels), config), expected) < 1e-6


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_preprocess_takes_any_kind_of_image(mode):
    image = Image.new("L", (50, 70), 255)
    image = image.convert("I").convert(mode) if mode == "I;16" else image.convert("RGB").convert(mode)
    for square in (False, True):
        x = vit.preprocess(image, tiny("clip-vit-b"), square)
        assert x.shape == (3, 40, 40) and x.dtype == torch.float32 and x.isfinite().all()


def test_16_bit_greys_are_scaled():
    image = Image.fromarray(np.full((40, 40), 0x8040, np.uint16))
    assert np.asarray(vit.upright(image)).min() == np.asarray(vit.upright(image)).max() == 0x80


def test_exif_turns_an_image_and_its_damage_does_not_matter(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = 6
    assert np.array_equal(np.asarray(vit.upright(image)), np.rot90(pixels, -1))

    def damaged(_):
        raise struct.error("unpack requires a buffer of 12 bytes")

    monkeypatch.setattr(ImageOps, "exif_transpose", damaged)
    assert np.array_equal(np.asarray(vit.upright(image)), pixels)


# ----------------------------------------------------------------------------------------------------------------------
# Files of transformers, under the names that they have on the hub


def hf_models() -> dict[str, tuple]:
    """Name -> (transformers' class and its config, the part whose tokens are compared, our config)."""
    T = pytest.importorskip("transformers")
    sizes = dict(image_size=40, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = dict(vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    text |= dict(bos_token_id=0, eos_token_id=1, pad_token_id=2, max_position_embeddings=8)
    mlp, quick, gelu = dict(intermediate_size=128), dict(hidden_act="quick_gelu"), dict(hidden_act="gelu")
    clip, siglip = sizes | mlp | quick, sizes | mlp | gelu
    beit = sizes | mlp | dict(use_relative_position_bias=True, layer_norm_eps=1e-6)
    plain = sizes | mlp | dict(layer_norm_eps=1e-6)
    whole, vision = (lambda m: m), (lambda m: m.vision_model)
    no_registers = dict(registers=0, pos_embed="tokens")
    return {
        "CLIPVisionModel": (T.CLIPVisionConfig(**clip), whole, tiny("clip-vit-b")),
        "CLIPModel": (T.CLIPConfig(text_config=text, vision_config=clip), vision, tiny("clip-vit-b")),
        "SiglipVisionModel": (T.SiglipVisionConfig(**siglip), whole, tiny("siglip-vit-b")),
        "SiglipModel": (T.SiglipConfig(text_config=text, vision_config=siglip), vision, tiny("siglip-vit-b")),
        "Dinov2Model": (T.Dinov2Config(**sizes), whole, tiny("dinov2-vit-b", **no_registers)),
        "Dinov2WithRegistersModel": (T.Dinov2WithRegistersConfig(**sizes), whole, tiny("dinov2-vit-b")),
        "ViTModel": (T.ViTConfig(**plain), whole, tiny("in1k-vit-b")),
        "ViTForImageClassification": (T.ViTConfig(**plain), lambda m: m.vit, tiny("in1k-vit-b")),
        "BeitModel": (T.BeitConfig(**beit, use_mask_token=True), whole, tiny("beit-vit-b")),
        "BeitForImageClassification": (T.BeitConfig(**beit), lambda m: m.beit, tiny("beit-vit-b")),
    }


HF_CLASSES = [
    "CLIPVisionModel", "CLIPModel", "SiglipVisionModel", "SiglipModel", "Dinov2Model", "Dinov2WithRegistersModel",
    "ViTModel", "ViTForImageClassification", "BeitModel", "BeitForImageClassification",
]  # fmt: skip


def hub_state(state: dict[str, Tensor], class_name: str) -> dict[str, Tensor]:
    """A file of today's transformers as older versions wrote those that are on the hub: more prefixes, more buffers."""
    if class_name in ("CLIPVisionModel", "SiglipVisionModel") and "embeddings.patch_embedding.weight" in state:
        state = {f"vision_model.{name}": value for name, value in state.items()}
    if class_name.startswith(("CLIP", "Siglip")):
        state["vision_model.embeddings.position_ids"] = torch.arange(26)[None]
    if class_name == "CLIPModel":
        state["text_model.embeddings.position_ids"] = torch.arange(8)[None]
    if class_name.startswith("Beit"):
        for name in [name for name in state if name.endswith("relative_position_bias_table")]:
            state[name.replace("bias_table", "index")] = torch.zeros(26, 26, dtype=torch.long)
    return {name: value.contiguous() for name, value in state.items()}


HUB_NAMES = {  # of google/vit-base-patch16-224, facebook/dinov2-base, microsoft/beit-base-patch16-224, ...
    "CLIPVisionModel": "vision_model.encoder.layers.0.self_attn.q_proj.weight",
    "CLIPModel": "vision_model.pre_layrnorm.weight text_model.embeddings.position_ids visual_projection.weight",
    "SiglipVisionModel": "vision_model.head.probe vision_model.post_layernorm.weight",
    "SiglipModel": "vision_model.head.attention.in_proj_weight text_model.head.weight logit_bias",
    "Dinov2Model": "encoder.layer.0.attention.attention.query.weight embeddings.mask_token layernorm.weight",
    "Dinov2WithRegistersModel": "encoder.layer.0.layer_scale1.lambda1 embeddings.register_tokens",
    "ViTModel": "encoder.layer.0.attention.attention.query.weight pooler.dense.weight",
    "ViTForImageClassification": "vit.encoder.layer.0.attention.output.dense.weight vit.layernorm.bias classifier.bias",
    "BeitModel": "encoder.layer.0.lambda_1 pooler.layernorm.weight embeddings.mask_token",
    "BeitForImageClassification": "beit.pooler.layernorm.weight classifier.weight "
    "beit.encoder.layer.0.attention.attention.relative_position_bias.relative_position_bias_table "
    "beit.encoder.layer.0.attention.attention.relative_position_bias.relative_position_index",
}


@pytest.mark.parametrize("class_name", HF_CLASSES)
@torch.no_grad()
def test_files_of_transformers(class_name, tmp_path):
    transformers = pytest.importorskip("transformers")
    hf_config, part, config = hf_models()[class_name]
    theirs = randomize(getattr(transformers, class_name)(hf_config))
    theirs.save_pretrained(tmp_path)
    images = pictures(config)
    tower = part(theirs)
    expected = tower(images).last_hidden_state
    if class_name.startswith("CLIP"):  # which leaves its final norm to the class token
        expected = getattr(tower, "vision_model", tower).post_layernorm(expected)
    assert error(vit.load(tmp_path / "model.safetensors", config)(images), expected) < 1e-5  # as saved today

    state = hub_state(load_file(tmp_path / "model.safetensors"), class_name)
    assert set(HUB_NAMES[class_name].split()) <= set(state)
    save_file(state, tmp_path / "hub.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    for name in ("hub.safetensors", "pytorch_model.bin"):
        assert error(vit.load(tmp_path / name, config)(images), expected) < 1e-5
    if class_name.startswith("Dinov2"):  # the class token's position, inside the token
        folded = replace(config, pos_embed="patches")
        assert error(vit.load(tmp_path / "hub.safetensors", folded)(images), expected) < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# Exports

PLAIN = ["in1k-vit-b", "clip-vit-b", "openclip-vit-b", "siglip-vit-b", "dinov2-vit-b", "beit-vit-b", "eva02-vit-b"]
EXPORTED = {name: tiny(name) for name in PLAIN} | {  # as they are, and as alignment leaves them (a fresh norm, a cap)
    "dinov2, no registers": tiny("dinov2-vit-b", registers=0, pos_embed="tokens"),
    "aligned in1k-vit-b": tiny("in1k-vit-b", final_norm=1e-5, softcap=30.0),
    "aligned siglip-vit-b": tiny("siglip-vit-b", final_norm=1e-5, softcap=30.0),
    "aligned beit-vit-b": tiny("beit-vit-b", final_norm=1e-5),
}
TIMM_NAMES = {
    "in1k-vit-b": "vit_base_patch16_224", "clip-vit-b": "vit_base_patch16_clip_quickgelu_224",
    "openclip-vit-b": "vit_base_patch16_clip_224", "siglip-vit-b": "vit_base_patch16_siglip_224",
    "dinov2-vit-b": "vit_base_patch14_reg4_dinov2", "dinov2, no registers": "vit_base_patch14_dinov2",
    "beit-vit-b": "beit_base_patch16_224", "eva02-vit-b": "eva02_base_patch16_clip_224",
}  # fmt: skip


def timm_model(name: str, config: vit.ViTConfig, **kwargs) -> torch.nn.Module:
    """timm's tiny model, made as the notes of `export` say."""
    timm = pytest.importorskip("timm")
    name = name.removeprefix("aligned ")
    if not config.class_token or (config.family == "beit" and config.final_norm):
        kwargs["global_pool"] = ""
    sizes = dict(embed_dim=config.embed_dim, depth=config.depth, num_heads=config.num_heads)
    kwargs |= sizes | dict(patch_size=config.patch_size, img_size=config.image_size, num_classes=0)
    model = timm.create_model(TIMM_NAMES[name], **kwargs).eval()
    if config.final_norm not in (None, config.norm_eps):
        model.norm.eps = config.final_norm
    return model


def uncapped(model: vit.ViT) -> vit.ViT:
    for block in model.blocks:
        block.attn.softcap = None
    return model


@pytest.mark.parametrize("name", EXPORTED)
@torch.no_grad()
def test_exports_come_back(name, tmp_path):
    config = EXPORTED[name]
    model = randomize(vit.ViT(config))
    notes = " ".join(vit.export(model, tmp_path / "timm.safetensors", "timm"))
    assert same(vit.load(tmp_path / "timm.safetensors", config), model)
    assert ("soft-cap of 30 is lost" in notes) == (config.softcap is not None)
    assert ("eps to 1e-05" in notes) == (name in ("aligned in1k-vit-b", "aligned siglip-vit-b", "aligned beit-vit-b"))
    if config.family != "eva02":
        notes = " ".join(vit.export(model, tmp_path / "hf", "transformers"))
        assert same(vit.load(tmp_path / "hf" / "model.safetensors", config), model)
        assert ("soft-cap of 30 is lost" in notes) == (config.softcap is not None)


@pytest.mark.parametrize("name", EXPORTED)
@torch.no_grad()
def test_exports_load_strictly_in_timm(name, tmp_path):
    config = EXPORTED[name]
    theirs = timm_model(name, config)
    model = randomize(vit.ViT(config))
    vit.export(model, tmp_path / "timm.safetensors", "timm")
    theirs.load_state_dict(load_file(tmp_path / "timm.safetensors"), strict=True)
    images = pictures(config)
    assert error(uncapped(model)(images), theirs.forward_features(images)) < 1e-5


@pytest.mark.parametrize("name", EXPORTED)
@torch.no_grad()
def test_exports_load_strictly_in_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = EXPORTED[name]
    model = randomize(vit.ViT(config))
    if config.family == "eva02":
        assert "use --layout timm" in refusal(vit.export, model, tmp_path, "transformers")
        return
    notes = vit.export(model, tmp_path, "transformers")
    kwargs = dict(add_pooling_layer=False) if "add_pooling_layer=False" in " ".join(notes) else {}
    theirs, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True, **kwargs)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    if config.final_norm not in (None, config.norm_eps):
        getattr(theirs, "post_layernorm" if "siglip" in name else "layernorm").eps = config.final_norm
    images = pictures(config)
    tokens = theirs.eval()(images).last_hidden_state
    if config.pre_norm:
        tokens = getattr(theirs, "vision_model", theirs).post_layernorm(tokens)
    assert error(uncapped(model)(images), tokens) < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# Another image size


@pytest.mark.parametrize("size", [24, 56, 120])
@pytest.mark.parametrize("name", ["in1k-vit-b", "siglip-vit-b", "dinov2-vit-b", "eva02-vit-b", "beit-vit-b"])
@torch.no_grad()
def test_another_image_size_is_what_timm_makes_of_it(name, size, tmp_path):
    pytest.importorskip("timm")
    from timm.models import beit, eva, vision_transformer

    filters = {"eva02-vit-b": eva, "beit-vit-b": beit}
    config = tiny(name)
    state = randomize(timm_model(name, config)).state_dict()
    save_file(state, tmp_path / "timm.safetensors")
    larger = replace(config, image_size=size)
    theirs = timm_model(name, larger)
    theirs.load_state_dict(filters.get(name, vision_transformer).checkpoint_filter_fn(state, theirs))
    images = pictures(larger)
    ours = vit.load(tmp_path / "timm.safetensors", larger)
    assert error(ours(images), theirs.forward_features(images)) < 1e-5

    vit.save(vit.load(tmp_path / "timm.safetensors", config), tmp_path / "ours.safetensors")
    again = vit.load(tmp_path / "ours.safetensors", larger)  # a file of ours, asked for at another size
    assert again.config == larger and same(again, ours)


@pytest.mark.parametrize("grid", [3, 5, 8])
def test_resampling_keeps_prefix_tokens_and_what_is_alike_everywhere(grid):
    prefix, patch = torch.randn(2, 1, 7), torch.randn(7)
    value = torch.cat([prefix.view(1, 2, 7), patch.expand(1, 25, 7)], 1)
    expected = torch.cat([prefix.view(1, 2, 7), patch.expand(1, grid**2, 7)], 1)
    assert error(vit.resample_positions(value, grid, 2), expected) < 1e-6
    table = torch.cat([patch.expand(81, 7), torch.randn(3, 7)])
    expected = torch.cat([patch.expand((2 * grid - 1) ** 2, 7), table[-3:]])
    assert error(vit.resample_relative_bias(table, grid), expected) < 1e-6
    offset = torch.arange(-4.0, 5).view(9, 1).expand(9, 9).reshape(81, 1)  # a bias that grows from row to row
    rows = vit.resample_relative_bias(torch.cat([offset, torch.zeros(3, 1)]), grid)[:-3].view(2 * grid - 1, -1)
    assert (rows.diff(dim=0) > 0).all()
    assert error(-rows.flip(0), rows) < 1e-6 and error(rows.mean(1, True).expand_as(rows), rows) < 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# Python's own format: MoCo v3, the MaskEmbed authors


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_moco_checkpoint(zipped, tmp_path):
    config = tiny("moco-vit-b")
    model, momentum = randomize(vit.ViT(config)), randomize(vit.ViT(config), seed=1)
    state = {f"module.momentum_encoder.{k}": v for k, v in momentum.state_dict().items()}
    state |= {f"module.base_encoder.{k}": v for k, v in model.state_dict().items()}
    for encoder in ("base_encoder", "momentum_encoder"):
        state |= {f"module.{encoder}.head.0.weight": torch.zeros(64, 32)}
    state |= {"module.predictor.0.weight": torch.zeros(8, 8), "module.predictor.1.num_batches_tracked": torch.tensor(3)}
    checkpoint = {"epoch": 300, "arch": "vit_base", "state_dict": state, "args": argparse.Namespace(lr=0.1, model="x")}
    checkpoint |= {"optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1.5e-4}]}}
    torch.save(checkpoint, tmp_path / "moco.pth.tar", _use_new_zipfile_serialization=zipped)
    assert same(vit.load(tmp_path / "moco.pth.tar", config), model)


def test_the_authors_checkpoint():
    path = DATA / "maskembed" / "authors-checkpoint.pth.tar"
    sizes = dict(image_size=40, patch_size=8, embed_dim=64, depth=3, num_heads=2)
    model = vit.load(path, replace(vit.BACKBONES["clip-vit-l-336"], **sizes))
    assert model.config.softcap == 30.0 and model.blocks[0].attn.softcap == 30.0 and model.norm.eps == 1e-5
    state = torch.load(path, weights_only=False)["state_dict"]
    assert all(torch.equal(value, state[f"encoder.{name}"]) for name, value in model.state_dict().items())
    assert len(model.state_dict()) == sum(k.startswith("encoder.") for k in state) - 2  # all but the encoder's head


def test_the_authors_models_without_a_head_keep_their_norm(tmp_path):
    config = tiny("siglip-vit-b")
    state = {f"encoder.{name}": value for name, value in vit.ViT(config).state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "average.pth.tar")
    assert vit.load(tmp_path / "average.pth.tar", config).config == replace(config, softcap=30.0)


class Malicious:
    """Unpickling it would write a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pickle_is_refused_and_not_run(zipped, tmp_path):
    trap = tmp_path / "trap"
    checkpoint = {"state_dict": vit.ViT(tiny("in1k-vit-t")).state_dict(), "extra": Malicious(trap)}
    torch.save(checkpoint, tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped)
    message = refusal(vit.load, tmp_path / "bad.pth", tiny("in1k-vit-t"))
    assert "bad.pth" in message and "system" in message and "only tensors" in message
    assert not trap.exists()


# ----------------------------------------------------------------------------------------------------------------------
# Our own files


@pytest.mark.parametrize("name", vit.BACKBONES)
def test_saved_and_loaded_bit_by_bit(name, tmp_path):
    config = tiny(name, softcap=30.0 if vit.BACKBONES[name].family == "vit" else None)
    model = randomize(vit.ViT(config))
    vit.save(model, tmp_path / "new" / "folder" / "model.safetensors")
    again = vit.load(tmp_path / "new" / "folder" / "model.safetensors")
    assert again.config == config and same(again, model) and not again.training
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["model.safetensors"]


def test_the_encoder_of_an_aligned_file(tmp_path):
    model = randomize(vit.ViT(tiny("clip-vit-b", softcap=30.0)))
    plain = tmp_path / "plain.safetensors"
    vit.save(model, plain)
    state = {f"encoder.{name}": value for name, value in load_file(plain).items()}
    state |= {"head.weight": torch.zeros(32, 32), "decoder.blocks.0.attn.qkv.weight": torch.zeros(96, 32)}
    with safe_open(plain, "pt") as file:
        vit.save_tensors(state, tmp_path / "aligned.safetensors", file.metadata() | {"scale": "0.5"})
    again = vit.load(tmp_path / "aligned.safetensors")
    assert again.config == model.config and same(again, model)


def test_files_are_readable_as_the_umask_says(tmp_path):
    vit.save(vit.ViT(tiny("in1k-vit-t")), tmp_path / "model.safetensors")
    (tmp_path / "other").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("failure", [OSError(28, "No space left"), SafetensorError("No space left")], ids=repr)
def test_a_full_disk_leaves_the_old_file(failure, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    vit.save(vit.ViT(tiny("in1k-vit-t")), path)
    before = path.read_bytes()

    def full(state, target, metadata):
        Path(target).write_bytes(b"half")
        raise failure

    monkeypatch.setattr(vit, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        vit.save(vit.ViT(tiny("in1k-vit-t", depth=1)), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_files_of_other_precisions_become_float32(dtype, tmp_path):
    config = tiny("dinov2-vit-b")
    state = {name: value.to(dtype) for name, value in randomize(vit.ViT(config)).state_dict().items()}
    save_file(state, tmp_path / "half.safetensors")
    for name, value in vit.load(tmp_path / "half.safetensors", config).state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, state[name].float())


# ----------------------------------------------------------------------------------------------------------------------
# Wrong input


def save_changed(path: Path, config: vit.ViTConfig, **changes: Tensor | None) -> Path:
    """A file in timm's layout with some tensors replaced, added, or (None) taken out."""
    state = vit.ViT(config).state_dict() | changes
    save_file({name: value for name, value in state.items() if value is not None}, path)
    return path


def test_files_that_cannot_be_read(tmp_path):
    config = tiny("in1k-vit-t")
    for suffix in ("safetensors", "pth"):
        assert "no such file" in refusal(vit.load, tmp_path / f"none.{suffix}", config)
        (tmp_path / f"text.{suffix}").write_text("These are not the weights that you are looking for.\n" * 9)
        (tmp_path / f"empty.{suffix}").touch()
        for kind in ("text", "empty"):
            message = refusal(vit.load, tmp_path / f"{kind}.{suffix}", config)
            assert f"{kind}.{suffix}: cannot be read" in message and "download or convert it again" in message
    assert "cannot be read" in refusal(vit.load, tmp_path, config)  # a folder


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_truncated_files(kind, tmp_path):
    config = tiny("in1k-vit-t")
    state = vit.ViT(config).state_dict()
    whole, part = tmp_path / f"whole.{kind}", tmp_path / ("part.safetensors" if kind == "safetensors" else "part.pth")
    if kind == "safetensors":
        save_file(state, whole)
    else:
        torch.save(state, whole, _use_new_zipfile_serialization=kind == "zip")
    content = whole.read_bytes()
    for size in (len(content) - 1, len(content) // 2, 100, 5):
        part.write_bytes(content[:size])
        assert f"{part}: cannot be read" in refusal(vit.load, part, config)


def test_files_that_hold_no_such_thing(tmp_path):
    for name, content in (("list.pth", [1, 2]), ("tensor.pth", torch.zeros(3)), ("module.pth", torch.nn.Linear(2, 2))):
        torch.save(content, tmp_path / name)
        assert f"{name}: cannot be read" in refusal(vit.load, tmp_path / name, tiny("in1k-vit-t"))
    torch.save({}, tmp_path / "nothing.pth")
    save_file({"model.layers.0.weight": torch.zeros(2)}, tmp_path / "llama.safetensors")
    for name in ("nothing.pth", "llama.safetensors"):
        assert f"{name}: holds no vision transformer" in refusal(vit.load, tmp_path / name, tiny("in1k-vit-t"))


def test_weights_of_another_backbone(tmp_path):
    config, turned = tiny("in1k-vit-t"), torch.zeros(128, 32)
    cases = {
        "tensor blocks.1.mlp.fc2.bias is missing": {"blocks.1.mlp.fc2.bias": None},
        "tensor norm_pre.weight has no place": {"norm_pre.weight": torch.zeros(32)},
        "tensor blocks.2.norm1.bias has no place": {"blocks.2.norm1.bias": torch.zeros(32)},
        "tensor norm.weight makes [33], not [32]": {"norm.weight": torch.zeros(33)},
        "tensor blocks.0.mlp.fc2.weight makes [128, 32], not [32, 128]": {"blocks.0.mlp.fc2.weight": turned},
        "tensor pos_embed makes [1, 20, 32], not [1, 26, 32]": {"pos_embed": torch.zeros(1, 20, 32)},
        "tensor pos_embed makes [1, 1, 32], not [1, 26, 32]": {"pos_embed": torch.zeros(1, 1, 32)},
        "tensor pos_embed makes [1, 26, 48], not [1, 26, 32]": {"pos_embed": torch.zeros(1, 17, 48)},
    }
    for expected, change in cases.items():
        path = save_changed(tmp_path / "changed.safetensors", config, **change)
        message = refusal(vit.load, path, config)
        assert message.startswith(f"{path}: does not hold this backbone ({expected}"), message
        assert "name the one that it holds" in message
    for name in ("siglip-vit-b", "clip-vit-b", "dinov2-vit-b", "beit-vit-b", "eva02-vit-b"):
        path = save_changed(tmp_path / "other.safetensors", tiny(name))
        for asked in ("in1k-vit-t", "siglip-vit-b", "clip-vit-b", "dinov2-vit-b", "beit-vit-b", "eva02-vit-b"):
            if asked != name:
                assert "does not hold this backbone" in refusal(vit.load, path, tiny(asked))
    table = {f"blocks.{i}.attn.relative_position_bias_table": torch.zeros(50, 2) for i in range(2)}
    path = save_changed(tmp_path / "table.safetensors", tiny("beit-vit-b"), **table)
    assert "relative_position_bias_table makes [50, 2], not [84, 2]" in refusal(vit.load, path, tiny("beit-vit-b"))


def test_a_backbone_has_to_be_named_and_known(tmp_path):
    path = save_changed(tmp_path / "timm.safetensors", tiny("in1k-vit-t"))
    assert "name one of in1k-vit-t, " in refusal(vit.load, path)
    assert "vit-b-clip: no such backbone" in refusal(vit.load, path, "vit-b-clip")


def test_a_file_of_ours_asked_for_as_something_else(tmp_path):
    path, config = tmp_path / "ours.safetensors", tiny("clip-vit-b", softcap=30.0)
    vit.save(vit.ViT(config), path)
    assert vit.load(path, replace(config, softcap=None)).config == config  # aligned, asked for by the backbone's name
    for key, value in dict(act="gelu", depth=3, embed_dim=64, registers=4, mean=(0.5, 0.5, 0.5)).items():
        message = refusal(vit.load, path, replace(config, **{key: value}))
        assert f"its {key} is" in message and "ours.safetensors" in message
    vit.save_tensors(vit.ViT(config).state_dict(), path, {"config": '{"window_size": 7}'})
    assert "another version" in refusal(vit.load, path)


def test_the_name_of_a_new_file_has_to_end_in_safetensors(tmp_path):
    assert "end in .safetensors" in refusal(vit.save, vit.ViT(tiny("in1k-vit-t")), tmp_path / "model.pth")


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_convert_export_and_info(tmp_path, capsys):
    name, config = "in1k-vit-t", vit.BACKBONES["in1k-vit-t"]
    model = vit.ViT(config)
    source, ours = str(tmp_path / "timm.safetensors"), str(tmp_path / "ours.safetensors")
    save_file(model.state_dict() | {"head.weight": torch.zeros(1000, 192), "head.bias": torch.zeros(1000)}, source)
    vit.main(["convert", name, source, ours])
    assert f"Next: python train_align.py --recipe {name} --weights {ours}" in capsys.readouterr().out
    assert vit.load(ours).config == config and same(vit.load(ours), model)
    vit.main(["export", ours, str(tmp_path / "back.safetensors"), "--layout", "timm"])
    vit.main(["export", ours, str(tmp_path / "hf"), "--layout", "transformers"])
    assert "Note: Load it with add_pooling_layer=False" in capsys.readouterr().out
    for path in (tmp_path / "back.safetensors", tmp_path / "hf" / "model.safetensors"):
        assert same(vit.load(path, name), model)
    vit.main(["info", ours])
    out = capsys.readouterr().out
    assert "150 tensors, 5,524,416 numbers, layout timm" in out and "embed_dim: 192" in out
    vit.main(["info", str(tmp_path / "hf" / "model.safetensors")])
    assert "layout vit" in capsys.readouterr().out


def test_errors_of_the_command(tmp_path):
    (tmp_path / "text.safetensors").write_text("no weights")
    source, taken = str(tmp_path / "text.safetensors"), tmp_path / "taken"
    taken.touch()
    ours = str(tmp_path / "ours.safetensors")
    vit.save(vit.ViT(tiny("in1k-vit-t")), ours)
    for argv in (
        ["info", "none.safetensors"],
        ["convert", "clip-vit-b", source, str(tmp_path / "out.safetensors")],
        ["convert", "clip-vit-b", ours, str(tmp_path / "out.safetensors")],
        ["export", ours, str(tmp_path), "--layout", "timm"],
        ["export", ours, str(taken), "--layout", "transformers"],
        ["export", ours, str(taken / "below.safetensors"), "--layout", "timm"],
    ):
        with pytest.raises(SystemExit) as caught:
            vit.main(argv)
        assert str(caught.value).startswith("vit.py: ") and "\n" not in str(caught.value)  # exit status 1
    for argv in ([], ["convert", "clip", "a", "b"], ["export", ours, "out", "--layout", "jax"], ["info"]):
        with pytest.raises(SystemExit) as caught:
            vit.main(argv)
        assert caught.value.code == 2


def test_alone_in_an_empty_folder(tmp_path):
    shutil.copy(vit.__file__, tmp_path)
    vit.save(vit.ViT(tiny("clip-vit-b")), tmp_path / "ours.safetensors")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    code = """
import torch, vit
print(vit.__file__, vit.load("ours.safetensors")(torch.zeros(1, 3, 40, 40)).shape, flush=True)
vit.main(["info", "none.safetensors"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path}/vit.py torch.Size([1, 26, 32])\n"
    assert done.returncode == 1 and "no such file" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_the_definition(monkeypatch):
    """What CUDA runs compiled, here uncompiled: the same score function, forward only."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(vit, "_compiled", lambda flex_attention: flex_attention)
    q, k, v = (3 * torch.randn(2, 2, 33, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    assert error(vit.softcap_attention_flex(q, k, v, 5.0), vit.softcap_attention_plain(q, k, v, 5.0)) < 1e-5
