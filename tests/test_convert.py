"""convert.py: what others' programs say of files that come in and go out. Skipped where those are not installed."""

import argparse
import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import error, refusal
from PIL import Image
from safetensors.torch import load_file, save_file
from test_llama import train
from test_vit import pictures, randomize, same, tiny
from torch import Tensor

import convert
import llama
import maskembed
import vit
from llama import Llama, LlamaConfig

DATA = Path(__file__).parent / "data"
LLAMA = LlamaConfig(96, 48, 80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2)


def small_llama(**changes) -> Llama:
    return randomize(Llama(replace(LLAMA, **changes)))


CLASSES = {  # of transformers -> the backbone that it is a class for
    "CLIPVisionModel": "clip-vit-b", "SiglipVisionModel": "siglip-vit-b",
    "Dinov2Model": "dinov2-vit-b", "Dinov2WithRegistersModel": "dinov2-vit-b",
    "ViTModel": "in1k-vit-b", "ViTForImageClassification": "in1k-vit-b",
    "BeitModel": "beit-vit-b", "BeitForImageClassification": "beit-vit-b",
}  # fmt: skip


def hf_model(class_name: str) -> torch.nn.Module:
    """A tiny model of transformers."""
    T = pytest.importorskip("transformers")
    sizes = dict(image_size=40, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    sizes |= dict(hidden_act="quick_gelu") if "CLIP" in class_name else dict(hidden_act="gelu", layer_norm_eps=1e-6)
    sizes |= {} if "Dinov2" in class_name else dict(intermediate_size=128)
    sizes |= dict(use_relative_position_bias=True, use_mask_token="Model" in class_name) if "Beit" in class_name else {}
    config = getattr(T, re.sub("Model|ForImageClassification", "Config", class_name))(**sizes)
    return randomize(getattr(T, class_name)(config))


@pytest.mark.parametrize("class_name", CLASSES)
def test_files_of_transformers(class_name, tmp_path):
    theirs, name = hf_model(class_name), CLASSES[class_name]
    config = tiny(name, registers=0, pos_embed="tokens") if class_name == "Dinov2Model" else tiny(name)
    theirs.save_pretrained(tmp_path)
    images = pictures(config)
    tower = getattr(theirs, {"V": "vit", "B": "beit"}[class_name[0]]) if "ForImage" in class_name else theirs
    expected = tower(images).last_hidden_state
    if class_name.startswith("CLIP"):  # which leaves its final norm to the class token
        expected = getattr(tower, "vision_model", tower).post_layernorm(expected)
    state = load_file(tmp_path / "model.safetensors")
    if "Vision" in class_name:  # the files on the hub hold more
        state = {f"vision_model.{name.removeprefix('vision_model.')}": value for name, value in state.items()}
        others = "vision_model.embeddings.position_ids text_model.final_layer_norm.weight visual_projection.weight"
        state |= dict.fromkeys([*others.split(), "logit_scale", "logit_bias"], torch.ones(3))
    torch.save(state, tmp_path / "hub.bin")
    for file in ("model.safetensors", "hub.bin"):
        assert error(convert.read_vit(tmp_path / file, config)(images), expected) < 1e-5
    if class_name == "Dinov2Model":  # the class token's position, inside the token
        folded = convert.read_vit(tmp_path / "hub.bin", replace(config, pos_embed="patches"))
        assert error(folded(images), expected) < 1e-5


def test_moco_checkpoint(tmp_path):
    config, path = tiny("moco-vit-b"), tmp_path / "moco.pth.tar"
    model = randomize(vit.ViT(config))
    state = {f"module.momentum_encoder.{name}": value + 1 for name, value in model.state_dict().items()}
    state |= {f"module.base_encoder.{name}": value for name, value in model.state_dict().items()}
    state |= {f"module.{name}_encoder.head.0.weight": torch.zeros(64, 32) for name in ("base", "momentum")}
    state |= {"module.predictor.0.weight": torch.zeros(8, 8), "module.predictor.1.num_batches_tracked": torch.tensor(3)}
    torch.save({"epoch": 9, "state_dict": state, "args": argparse.Namespace(lr=0.1), "optimizer": {"state": {}}}, path)
    assert same(convert.read_vit(path, config), model)


def rename(state: dict[str, Tensor], layout: str, prefix: str = "") -> dict[str, Tensor]:
    return {prefix + convert.foreign_names(name, layout)[0]: value for name, value in state.items()}


OTHERS = {  # files as their authors distribute them: backbone, how they are nested, the tensors, what is left out
    "MAE with its decoder": ("mae-vit-b", "model", lambda s: s | {"mask_token": 0, "decoder_pos_embed": 0,
        "decoder_blocks.0.norm1.bias": 0}, "decoder_blocks, decoder_pos_embed, mask_token"),
    "DINO's teacher": ("dino-vit-b", "teacher", lambda s: {f"backbone.{n}": v for n, v in s.items()} | {
        "head.mlp.0.weight": 0}, "head"),
    "DINOv2's": ("dinov2-vit-b", None, lambda s: rename(s, "dinov2-own") | {"mask_token": 0}, "mask_token"),
    "DINOv2's training": ("dinov2-vit-b", "teacher", lambda s: rename({n.replace("blocks.", "blocks.0."): v
        for n, v in s.items()}, "dinov2-own", "backbone.") | {"dino_head.mlp.0.weight": 0}, "dino_head"),
    "open_clip": ("clip-vit-b", None, lambda s: rename(s, "open_clip", "visual.") | {"visual.proj": 0, "logit_scale": 0,
        "transformer.resblocks.0.ln_1.weight": 0, "ln_final.weight": 0}, "ln_final, logit_scale, proj, transformer"),
    "open_clip of timm": ("siglip-vit-b", "state_dict", lambda s: {f"visual.trunk.{n}": v for n, v in s.items()} | {
        "visual.trunk.attn_pool.latent": 0, "text.cls_emb": 0}, "attn_pool, text"),
    "a distributed run": ("in1k-vit-b", "model", lambda s: {f"module.{n}": v for n, v in s.items()}, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_a_backbones_authors(name, tmp_path, capsys):
    backbone, key, change, left_out = OTHERS[name]
    config, model = tiny(backbone), randomize(vit.ViT(tiny(backbone)))
    state = change(dict(model.state_dict()))
    if name.startswith("DINOv2's"):  # whose class token has a position, too
        token, position = ("backbone." * ("training" in name) + end for end in ("cls_token", "pos_embed"))
        state[position] = torch.cat([torch.ones(1, 1, config.embed_dim), state[position]], 1)
        state[token] = state[token] - 1
    if name == "open_clip":  # without batch axes
        state |= {f"visual.{n}": state[f"visual.{n}"].squeeze() for n in ("class_embedding", "positional_embedding")}
    state = {n: value if isinstance(value, Tensor) else torch.zeros(2) for n, value in state.items()}
    torch.save({key: state, "epoch": 3, "student": {}} if key else state, tmp_path / "weights.pth")
    loaded = convert.read_vit(tmp_path, config)
    assert error(loaded(pictures(config)), model(pictures(config))) < 1e-5
    assert capsys.readouterr().out == (f"{tmp_path}: leaves out {left_out}\n" if left_out else "")


def test_the_authors_checkpoint_becomes_a_whole_aligned_file(tmp_path, monkeypatch):
    path, target = DATA / "maskembed" / "authors-checkpoint.pth.tar", tmp_path / "aligned.safetensors"
    config = replace(vit.BACKBONES["clip-vit-b"], image_size=40, patch_size=8, embed_dim=64, depth=3, num_heads=2)
    monkeypatch.setitem(vit.BACKBONES, "clip-vit-b", config)
    convert.main(["vit", "clip-vit-b", str(path), str(target)])
    student, state = maskembed.load(target), torch.load(path, weights_only=False)["state_dict"]
    assert student.encoder.config == replace(config, softcap=30.0)
    ours = {name.replace("encoder.head.", "head."): value for name, value in state.items()}
    assert student.state_dict().keys() == ours.keys() and len(student.decoder.blocks) == 2
    assert all(torch.equal(value, ours[name]) for name, value in student.state_dict().items())
    larger, image = replace(config, image_size=64), torch.randn(1, 3, 64, 64)
    theirs, our = (convert.read_vit(file, larger)(image, torch.ones(1, 64)) for file in (path, target))
    assert theirs.shape == (1, 65, 64) and torch.equal(theirs, our)
    del state["decoder.norm.weight"]
    torch.save(state, tmp_path / "damaged.pth")
    assert "its decoder is incomplete" in refusal(convert.read_vit, tmp_path / "damaged.pth", config)
    encoder = {name: value for name, value in state.items() if name.startswith("encoder.") and ".head." not in name}
    torch.save(encoder, tmp_path / "average.pth")  # an encoder alone keeps its pre-trained norm
    assert convert.read_vit(tmp_path / "average.pth", replace(config, final_norm=2e-5)).norm.eps == 2e-5


EXPORTED = {  # as they are, and as alignment leaves them (a fresh norm, a cap) -> timm's name, what differs
    "in1k-vit-b": ("vit_base_patch16_224", {}), "clip-vit-b": ("vit_base_patch16_clip_quickgelu_224", {}),
    "openclip-vit-b": ("vit_base_patch16_clip_224", {}), "siglip-vit-b": ("vit_base_patch16_siglip_224", {}),
    "dinov2-vit-b": ("vit_base_patch14_reg4_dinov2", {}), "eva02-vit-b": ("eva02_base_patch16_clip_224", {}),
    "dinov2-vit-b, no registers": ("vit_base_patch14_dinov2", dict(registers=0, pos_embed="tokens")),
    "in1k-vit-b, aligned": ("vit_base_patch16_224", dict(final_norm=1e-5, softcap=30.0)),
    "siglip-vit-b, aligned": ("vit_base_patch16_siglip_224", dict(final_norm=1e-5, softcap=30.0)),
    "beit-vit-b": ("beit_base_patch16_224", {}),
    "beit-vit-b, aligned": ("beit_base_patch16_224", dict(final_norm=1e-5)),
}  # fmt: skip


def timm_model(name: str, config: vit.ViTConfig) -> torch.nn.Module:
    """timm's tiny model, made as the notes of the export say."""
    timm = pytest.importorskip("timm")
    sizes = dict(embed_dim=config.embed_dim, depth=config.depth, num_heads=config.num_heads)
    sizes |= dict(patch_size=config.patch_size, img_size=config.image_size, num_classes=0)
    sizes |= dict(global_pool="") if not config.class_token or (config.family == "beit" and config.final_norm) else {}
    model = timm.create_model(EXPORTED[name][0], **sizes).eval()
    if config.final_norm not in (None, config.norm_eps):
        model.norm.eps = config.final_norm
    return model


def hf_tokens(folder: Path, config: vit.ViTConfig, notes: str) -> Tensor:
    """What transformers computes with an exported folder, loaded as the notes of the export say."""
    transformers = pytest.importorskip("transformers")
    kwargs = dict(add_pooling_layer=False) if "add_pooling_layer=False" in notes else {}
    theirs, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    if config.final_norm not in (None, config.norm_eps):
        getattr(theirs, "layernorm" if config.class_token else "post_layernorm").eps = config.final_norm
    tokens = theirs.eval()(pictures(config)).last_hidden_state
    return getattr(theirs, "vision_model", theirs).post_layernorm(tokens) if config.pre_norm else tokens


@pytest.mark.parametrize("layout", ["timm", "transformers"])
@pytest.mark.parametrize("name", EXPORTED)
def test_exports_come_back_and_load_strictly(name, layout, tmp_path):
    config, ours, out = tiny(name.split(",")[0], **EXPORTED[name][1]), tmp_path / "x.safetensors", tmp_path / "out"
    file = out / "model.safetensors"
    model = randomize(vit.ViT(config))
    vit.save(model, ours)
    if config.family == "eva02" and layout == "transformers":
        assert "use --layout timm" in refusal(convert.export_vit, ours, out, layout)
        return
    notes = " ".join(convert.export_vit(ours, file if layout == "timm" else out, layout))
    assert same(convert.read_vit(file, config), model)
    assert ("soft-cap of 30 is lost" in notes) == (config.softcap is not None)
    assert ("eps to 1e-05" in notes) == name.endswith("aligned")
    for block in model.blocks:
        block.attn.softcap = None
    if layout == "timm":
        theirs = timm_model(name, config)
        theirs.load_state_dict(load_file(file), strict=True)
        tokens = theirs.forward_features(pictures(config))
    else:
        tokens = hf_tokens(out, config, notes)
        T, picture = pytest.importorskip("transformers"), Image.effect_noise((70, 50), 90).convert("RGB")
        theirs = T.AutoImageProcessor.from_pretrained(out, use_fast=False)(picture, return_tensors="pt").pixel_values[0]
        assert (theirs - vit.preprocess(picture, config)).abs().max() < 0.05  # a step of 8 bits is up to 0.02
    assert error(model(pictures(config)), tokens) < 1e-5


def split_meta(folder: Path, shards: int) -> Path:
    """A folder in Meta's layout with one shard -> another with several, as Meta's model parallelism splits them."""
    state, target = torch.load(folder / "consolidated.00.pth"), folder.with_name(f"{folder.name}-{shards}")
    names = dict(convert.meta_name(name) for name in small_llama().state_dict())
    target.mkdir()
    shutil.copy(folder / "params.json", target)
    for i in range(shards):
        part = {n: state[n] if dim is None else state[n].chunk(shards, dim)[i].clone() for n, dim in names.items()}
        torch.save(part | {"rope.freqs": torch.ones(4)}, target / f"consolidated.{i:02d}.pth")
    return target


def test_both_layouts_of_the_reference_programs(tmp_path):
    for source, target, expected in (
        ("mha", "consolidated.00.pth", "mha/meta-q-k.safetensors"),
        ("gqa/meta", "model.safetensors", "gqa/transformers-q-k.safetensors"),
    ):
        convert.convert_llama(DATA / "llama" / source, tmp_path / source)
        written, expected = vit.read_tensors(tmp_path / source / target)[0], load_file(DATA / "llama" / expected)
        assert expected and all(torch.equal(written[name], value) for name, value in expected.items())


@pytest.mark.parametrize("shards, dtype", [(1, torch.float32), (2, torch.float16)])
def test_llama_there_and_back(shards, dtype, tmp_path):
    model = small_llama(tie_word_embeddings=shards == 1).to(dtype)
    llama.save(model, tmp_path / "model")
    train(tmp_path / "model" / "tokenizer.model")
    assert "the layout of Meta" in convert.convert_llama(tmp_path / "model", tmp_path / "meta")
    shutil.move(tmp_path / "meta" / "tokenizer.model", tmp_path)  # where Meta's download has it: one level up
    convert.convert_llama(split_meta(tmp_path / "meta", shards), tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.model").exists()
    state, back = model.state_dict(), load_file(tmp_path / "back" / "model.safetensors")  # Meta has no tied layers
    assert back.keys() == state.keys() and all(torch.equal(back[name], value) for name, value in state.items())
    assert not list(tmp_path.glob(".*"))


def test_params_give_metas_code_the_same_sizes():
    real = llama.LlamaConfig(), llama.LlamaConfig(32000, 8192, 28672, 80, 64, num_key_value_heads=8)  # 7B and 70B
    for config in [*real, *(replace(LLAMA, intermediate_size=n) for n in (1, 80, 127, 128, 500))]:
        values = convert.meta_params(config)
        size = int(values.get("ffn_dim_multiplier", 1) * int(8 * values["dim"] / 3))  # as Meta's code finds it
        assert -(-size // values["multiple_of"]) * values["multiple_of"] == config.intermediate_size
    assert "Meta's layout only has heads of" in refusal(convert.meta_params, replace(LLAMA, head_dim=10))


def test_damaged_folders_of_meta(tmp_path):
    llama.save(small_llama(num_attention_heads=4, num_key_value_heads=4), tmp_path / "model")
    convert.convert_llama(tmp_path / "model", tmp_path / "meta")
    whole = split_meta(tmp_path / "meta", 4)
    values, second = json.loads((whole / "params.json").read_text()), (whole / "consolidated.01.pth").read_bytes()
    cases = {
        "consolidated.01.pth: is missing": ("consolidated.01.pth", None),
        "is [96, 36], not [72, 48]": ("consolidated.03.pth", None),
        "consolidated.01.pth: cannot be read as weights": ("consolidated.01.pth", second[:-500]),
        "lack n_heads": ("params.json", json.dumps(values | dict(n_heads=None)).replace("n_heads", "heads").encode()),
        "scales the rotary embedding": ("params.json", json.dumps(values | dict(use_scaled_rope=True)).encode()),
    }
    for i, (message, (name, content)) in enumerate(cases.items()):
        folder = shutil.copytree(whole, tmp_path / f"damaged-{i}")
        (folder / name).write_bytes(content) if content else (folder / name).unlink()
        assert message in refusal(convert.convert_llama, folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, monkeypatch, capsys):
    name, config, ours = "in1k-vit-t", tiny("in1k-vit-t"), str(tmp_path / "ours.safetensors")
    monkeypatch.setitem(vit.BACKBONES, name, config)
    model, source = vit.ViT(config), str(tmp_path / "timm.safetensors")
    save_file(model.state_dict() | {"head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)}, source)
    convert.main(["vit", name, source, ours])
    assert f"Next: python train_align.py --recipe {name} --weights {ours}" in capsys.readouterr().out
    assert vit.load(ours).config == config and same(vit.load(ours), model)
    convert.main(["export", ours, str(tmp_path / "hf"), "--layout", "transformers"])
    assert "Note: Load it with add_pooling_layer=False" in capsys.readouterr().out
    convert.main(["vit", name, str(tmp_path / "hf" / "model.safetensors"), ours, "--image-size", "64"])
    resampled = vit.load(source, replace(config, image_size=64))
    assert same(vit.load(ours), resampled) and same(vit.load(ours, name), resampled)  # the name leaves the size
    convert.main(["info", ours])
    out = capsys.readouterr().out
    assert "30 tensors, 33,760 numbers, layout timm" in out and "embed_dim: 32" in out and "image_size: 64" in out


def test_the_language_model_of_a_vlm(tmp_path):
    model, folder = small_llama().bfloat16(), tmp_path / "vlm"
    vit.save_tensors({f"language.{k}": v for k, v in model.state_dict().items()}, folder / "model.safetensors", {})
    (folder / "config.json").write_text(json.dumps({"adapter": "mlp", "language": asdict(model.config)}))
    train(folder / "tokenizer.model", bos_id=7)
    convert.main(["export", str(folder), str(tmp_path / "out"), "--layout", "transformers"])
    assert same(llama.load(tmp_path / "out", torch.bfloat16), model)
    assert llama.read_json(tmp_path / "out" / "config.json")["bos_token_id"] == 7
    ours, theirs = (folder / "tokenizer.model").read_bytes(), (tmp_path / "out" / "tokenizer.model").read_bytes()
    assert ours == theirs
    assert "--layout transformers" in refusal(convert.export_language, folder, tmp_path / "x", "timm")


def test_errors_of_the_command(tmp_path):
    save_file({"model.layers.0.weight": torch.zeros(2)}, tmp_path / "llama.safetensors")
    save_file({"x.encoder.layer.0.layernorm_before.weight": torch.zeros(2)}, tmp_path / "vit.safetensors")
    vit.save(vit.ViT(tiny("in1k-vit-t")), tmp_path / "ours.safetensors")
    ours, out = str(tmp_path / "ours.safetensors"), str(tmp_path / "out.safetensors")
    for argv, message in (
        (["info", "none.safetensors"], "none.safetensors: cannot be read"),
        (["vit", "clip-vit-b", str(tmp_path / "llama.safetensors"), out], "layers.0.weight, is in no known layout"),
        (["vit", "in1k-vit-b", str(tmp_path / "vit.safetensors"), out], "is missing)"),
        (["vit", "clip-vit-b", ours, out], "its patch_size is 8, not 16"),
        (["vit", "clip-vit-b", ours, out, "--image-size", "9"], "--image-size 9: "),
        (["export", ours, str(tmp_path), "--layout", "timm"], "end in .safetensors"),
        (["llama", "nowhere", out], "nowhere/config.json"),
        (["llama", str(tmp_path), ours], "ours.safetensors: exists already"),
    ):
        with pytest.raises(SystemExit, match=f"^convert.py: .*{re.escape(message)}.*$"):
            convert.main(argv)


def test_conversations_of_lrv_and_lvis(tmp_path):
    lvis = {"id": 1, "image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\nQ"}]}
    lvis["conversations"].append({"from": "gpt", "value": "A"})
    lrv = {"image_id": "2366", "question": "What?", "answer": "A ring."}
    (tmp_path / "a.json").write_text(json.dumps([lvis, lrv]), encoding="utf-8-sig")
    convert.main(["conversations", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A ring."}]
    rows = json.loads((tmp_path / "b.json").read_text())
    assert rows == [lvis, {"id": "lrv-2", "image": "2366.jpg", "conversations": turns}]
    (tmp_path / "a.json").write_text(json.dumps([lrv, {"question": "What?"}]))
    said = refusal(convert.convert_conversations, tmp_path / "a.json", tmp_path / "c.json")
    assert "a.json, row 2: is neither" in said and not (tmp_path / "c.json").exists()
    for name, content, message in (("a.p", b"\x80\x02]q", "a.p: cannot be read"),
                                   ("a.json", b'[{"annotations": [1]}]', "a.json: is not as RefCOCO or COCO")):
        (tmp_path / name).write_bytes(content)
        (tmp_path / "instances.json").write_text('{"images": [], "annotations": []}')
        assert message in refusal(convert.convert_conversations, tmp_path / name, tmp_path / "c.json")
