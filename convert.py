"""Other projects' weights, in and out. Needs vit.py, llama.py, maskembed.py and data.py beside it.

    python convert.py vit clip-vit-b model.safetensors clip-vit-b.safetensors  # timm's, transformers', MoCo's, ...
    python convert.py llama llama-2-7b/ Llama-2-7b-hf/                         # Meta's layout -> transformers', or back
    python convert.py export aligned.safetensors out/ --layout transformers    # ours -> timm's or transformers'
    python convert.py conversations filter_cap.json lrv.json                   # LRV-Instruct's -> train_vlm.py --data
    python convert.py info aligned.safetensors

A foreign layout is one table of names, used in both directions.
"""

import argparse
import itertools
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import data
import llama
import maskembed
import vit
from llama import LlamaConfig
from maskembed import Student
from vit import ViT, ViTConfig

# --- vision transformers: names ---------------------------------------------------------------------------------------

# Parts of our names -> parts of theirs; what is not listed is alike. `query|key|value` are three tensors there and one
# here, joined in this order.
HF = {  # what ViT, BEiT and DINOv2 of transformers share
    "cls_token": "embeddings.cls_token", "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings", "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "attn.qkv": "attention.attention.query|key|value", "attn.proj": "attention.output.dense",
    "blocks": "encoder.layer", "norm": "layernorm",
}
HF_VIT = HF | {"norm1": "layernorm_before", "norm2": "layernorm_after"}
HF_VIT |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
LAYOUTS: dict[str, dict[str, str]] = {
    "dinov2-own": {"reg_token": "register_tokens"},
    "timm": {},  # timm's names are ours; DINO, MoCo v3, MaskEmbed and towers of open_clip have a prefix before them
    "open_clip": {  # and OpenAI's
        "cls_token": "class_embedding", "pos_embed": "positional_embedding", "patch_embed.proj": "conv1",
        "norm_pre": "ln_pre", "norm": "ln_post", "norm1": "ln_1", "norm2": "ln_2", "attn.qkv.": "attn.in_proj_",
        "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "blocks": "transformer.resblocks",
    },
    "clip": {  # transformers' CLIP and SigLIP
        "cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding.weight",
        "patch_embed.proj": "embeddings.patch_embedding", "blocks": "encoder.layers",
        "attn.qkv": "self_attn.q_proj|k_proj|v_proj", "attn.proj": "self_attn.out_proj",
        "norm1": "layer_norm1", "norm2": "layer_norm2", "norm_pre": "pre_layrnorm", "norm": "post_layernorm",
    },
    "dinov2": HF | {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"},
    "beit": HF_VIT | {
        "attn.q_bias": "attention.attention.query.bias", "attn.v_bias": "attention.attention.value.bias",
        "attn.relative_position_bias_table": "attention.attention.relative_position_bias.relative_position_bias_table",
        "gamma_1": "lambda_1", "gamma_2": "lambda_2",
    },
    "vit": HF_VIT,
}  # fmt: skip
MARKS = {  # a tensor that tells the layout: the first one found; what stands before it stands before every name
    "dinov2": "encoder.layer.0.norm1.weight",
    "dinov2-own": "register_tokens",
    "timm": "patch_embed.proj.weight",
    "clip": "embeddings.patch_embedding.weight",
    "beit": "encoder.layer.0.lambda_1",
    "vit": "encoder.layer.0.layernorm_before.weight",
    "open_clip": "ln_pre.weight",
}
LEFT_OUT = vit.LEFT_OUT | set(  # heads and pooling; so is all before which the prefix does not stand: other towers
    "pooler classifier decoder visual_projection text_projection logit_scale logit_bias position_ids "
    "text_model momentum_encoder predictor".split()
)


def detect_layout(names: list[str], path: str | Path) -> tuple[str, str]:
    """(layout, prefix of every name) of the tensors with these names. ValueError: it is none that is known."""
    for layout, mark in MARKS.items():
        for name in names:
            if name.endswith(mark) and LEFT_OUT.isdisjoint(name.split(".")):
                return layout, name.removesuffix(mark)
    first = next(iter(names), "missing")
    raise ValueError(f"{path}: its first tensor, {first}, is in no known layout; give a ViT of timm, transformers, "
                     "open_clip, MoCo v3, MAE, DINO, DINOv2 or this project")


def foreign_names(name: str, layout: str) -> list[str]:
    """A parameter's name (three for q, k, v) in a layout: blocks.3.gamma_1 -> [encoder.layer.3.lambda_1]."""
    for ours, theirs in LAYOUTS[layout].items():
        name = re.sub(rf"\b{ours}\b", theirs, name)
    joined = next((part for part in name.split(".") if "|" in part), name)
    return [name.replace(joined, part) for part in joined.split("|")]


# --- vision transformers: in ------------------------------------------------------------------------------------------

def convert_vit(name: str, source: str | Path, target: str | Path, image_size: int | None = None) -> str:
    """Any layout -> a file of ours, of the backbone's image size or another. Returns the line to print."""
    config = vit.BACKBONES[name]
    if image_size is not None and image_size < config.patch_size:
        raise ValueError(f"--image-size {image_size}: holds no patch of {config.patch_size} pixels; give more")
    model = read_vit(source, replace(config, image_size=image_size or config.image_size))
    if isinstance(model, Student):
        maskembed.save(model, target)
        return f"{target}: {name}, aligned. Next: python probe.py {target} --data DIR"
    vit.save(model, target)
    return f"{target}: {name}. Next: python train_align.py --recipe {name} --weights {target} --data DIR"


def read_vit(path: str | Path, config: ViTConfig) -> ViT | Student:
    """A backbone, or a whole aligned model, from a file in any known layout. ValueError: it has none."""
    tensors, metadata = vit.read_tensors(path)
    if "config" in metadata:  # ours already
        return (maskembed.load if "maskembed" in metadata else vit.load)(path, config)
    config = vit.confirm(path, config)
    tensors = {re.sub(r"\bblocks\.\d+\.(\d)", r"blocks.\1", name): value for name, value in tensors.items()}  # DINOv2's
    layout, prefix = detect_layout(list(tensors), path)
    if prefix == "encoder.":
        return read_aligned(config, tensors, path)
    if extra := {name.removeprefix(prefix).split(".")[0] for name in tensors if is_left_out(name, prefix)}:
        print(f"{path}: leaves out {', '.join(sorted(extra))}")
    return fill(config, tensors, layout, prefix, path)


def is_left_out(name: str, prefix: str) -> bool:
    """Whether a foreign tensor is not the vision tower's, or not needed for token features."""
    own = name.removeprefix(prefix)
    return not name.startswith(prefix) or not LEFT_OUT.isdisjoint(own.split(".")) or own == "proj"  # CLIP's last layer


def fill(config: ViTConfig, tensors: dict[str, Tensor], layout: str, prefix: str, path: str | Path) -> ViT:
    """A model with a foreign layout's tensors. ValueError: they are not this model's."""
    with torch.device("meta"):  # no memory and no time for initial values that the file replaces
        model = ViT(config)
    state, rest = {}, {name: value for name, value in tensors.items() if not is_left_out(name, prefix)}
    for name, _ in model.named_parameters():
        parts = [prefix + part for part in foreign_names(name, layout)]
        if rest.keys() >= set(parts):
            state[name] = torch.cat([rest.pop(part) for part in parts]) if len(parts) > 1 else rest.pop(parts[0])
    for name in {"cls_token", "pos_embed"} & state.keys():  # CLIP has no batch axis on them
        state[name] = state[name].view(1, -1, state[name].shape[-1])
    if layout.startswith("dinov2") and config.pos_embed == "patches":  # the class token's position goes into the token
        state["cls_token"] = state["cls_token"].float() + state["pos_embed"][:, :1].float()
        state["pos_embed"] = state["pos_embed"][:, 1:]
    model.to_empty(device="cpu")
    vit.fill(model, state | rest, path)  # which refuses what is missing or left over
    return model.eval()


def read_aligned(config: ViTConfig, tensors: dict[str, Tensor], path: str | Path) -> ViT | Student:
    """A checkpoint of the MaskEmbed authors: the whole aligned model, or the encoder if it has no decoder."""
    fresh = {"encoder.norm.weight", "encoder.head.weight"} <= tensors.keys()  # a new final norm comes with the head
    softcap = 30.0 if config.family == "vit" else None
    config = replace(config, final_norm=1e-5 if fresh else config.final_norm, softcap=softcap)
    encoder = fill(config, tensors, "timm", "encoder.", path)
    if "decoder.pos_embed" not in tensors:
        return encoder
    own = {name.replace("encoder.head.", "head."): value.float() for name, value in tensors.items()}
    own = {name: value for name, value in own.items() if name.startswith(("head.", "decoder."))}
    depth = len({name.split(".")[2] for name in own if name.startswith("decoder.blocks.")})
    width = own["decoder.pos_embed"].shape[-1]
    head = nn.Linear(config.embed_dim, width)  # the authors keep it in the encoder
    student = Student(encoder, head, maskembed.Decoder(config, depth, width), "penultimate")
    own["decoder.pos_embed"] = vit.resample_positions(own["decoder.pos_embed"], config.grid, config.num_prefix)
    try:
        student.load_state_dict(own | {f"encoder.{k}": v for k, v in encoder.state_dict().items()})
    except RuntimeError as error:
        raise ValueError(f"{path}: its decoder is incomplete ({str(error).splitlines()[1].strip()})") from None
    return student.eval()


# --- vision transformers: out -----------------------------------------------------------------------------------------

def export_vit(source: str | Path, target: str | Path, layout: str) -> list[str]:
    """Write the backbone in a file of ours for other people's code; returns what its user must know, a sentence each.

    layout "timm": a file for timm.create_model(..., num_classes=0); "transformers": a folder for from_pretrained."""
    model = vit.load(source)
    config, state, notes = model.config, model.state_dict(), []
    if config.softcap is not None:
        notes.append(f"The soft-cap of {config.softcap:g} is lost: {layout} has none, so large logits change.")
    if config.final_norm not in (None, config.norm_eps):
        notes.append(f"Set the final norm's eps to {config.final_norm:g}: {layout} gives it {config.norm_eps:g}.")
    if layout == "timm":
        if config.act != "gelu":
            notes.append(f"Create timm's model with act_layer='{config.act}'.")
        if config.family == "beit" and config.final_norm is None:
            state |= unit_norm("fc_norm", config)
        elif config.family == "beit" or not config.class_token:
            notes.append("Create timm's model with global_pool='': a final norm and no pooling.")
        vit.save_tensors(state, target, {})
        return notes
    state, description = to_transformers(model)
    if description["model_type"] == "vit":
        notes.append("Load it with add_pooling_layer=False: there are no weights for a pooling layer.")
    with llama.new_folder(target) as folder:
        vit.save_tensors(state, folder / "model.safetensors", {})
        (folder / "config.json").write_text(json.dumps(description, indent=2))
        steps = dict.fromkeys("do_convert_rgb do_resize do_center_crop do_rescale do_normalize".split(), True)
        sizes = dict(size={"shortest_edge": int(config.image_size / config.crop_pct)}, crop_size=config.image_size)
        norm = dict(image_processor_type="CLIPImageProcessor", resample=3, image_mean=config.mean, image_std=config.std)
        (folder / "preprocessor_config.json").write_text(json.dumps(norm | sizes | steps, indent=2))
    return notes


def to_transformers(model: ViT) -> tuple[dict[str, Tensor], dict[str, object]]:
    """A backbone's tensors under transformers' names, and its config.json. ValueError: there is no such class there."""
    c = model.config
    if c.family == "eva02":
        raise ValueError("transformers has no EVA02; use --layout timm")
    beit = dict(use_relative_position_bias=True, use_mean_pooling=c.final_norm is None)
    dinov2 = dict(mlp_ratio=int(c.mlp_ratio))
    kinds = [  # the first one that applies: layout, model_type, what its config needs in addition
        (c.family == "beit", "beit", "beit", beit),
        (c.registers, "dinov2", "dinov2_with_registers", dinov2 | dict(num_register_tokens=c.registers)),
        (c.layer_scale, "dinov2", "dinov2", dinov2),
        (c.pre_norm, "clip", "clip_vision_model", {}),
        (not c.class_token, "clip", "siglip_vision_model", dict(vision_use_head=False)),
        (True, "vit", "vit", {}),
    ]
    layout, model_type, extra = next(kind[1:] for kind in kinds if kind[0])
    hidden = int(c.embed_dim * c.mlp_ratio)
    description = dict(model_type=model_type, image_size=c.image_size, patch_size=c.patch_size)
    description |= dict(hidden_act=c.act.replace("_tanh", "_pytorch_tanh"))
    description |= dict(hidden_size=c.embed_dim, num_hidden_layers=c.depth, num_attention_heads=c.num_heads)
    description |= dict(intermediate_size=hidden, layer_norm_eps=c.norm_eps, torch_dtype="float32") | extra
    state = {}
    for name, value in model.state_dict().items():
        names = foreign_names(name, layout)
        state |= zip(names, value.chunk(len(names)))
    zero = torch.zeros(1, 1, c.embed_dim)
    if layout == "clip":  # no batch axis on class token and positions
        state = {f"vision_model.{name}": value.squeeze() for name, value in state.items()}
    elif layout == "dinov2":
        state["embeddings.mask_token"] = zero[0]
        if c.pos_embed == "patches":  # theirs has an entry for the class token, ours has it in the class token
            state["embeddings.position_embeddings"] = torch.cat([zero, model.pos_embed.detach()], 1)
    elif layout == "beit" and c.final_norm is None:
        state |= unit_norm("pooler.layernorm", c)
    return state, description


def unit_norm(name: str, config: ViTConfig) -> dict[str, Tensor]:
    """The norm after BEiT's pooling, which both libraries require and no token passes."""
    return {f"{name}.weight": torch.ones(config.embed_dim), f"{name}.bias": torch.zeros(config.embed_dim)}


# --- language models --------------------------------------------------------------------------------------------------

# The last part of our names (transformers'): Meta's, and the dimension that its shards split (None: each has it whole).
META: dict[str, tuple[str, int | None]] = {
    "embed_tokens": ("tok_embeddings", 1), "lm_head": ("output", 0), "norm": ("norm", None),
    "q_proj": ("attention.wq", 0), "k_proj": ("attention.wk", 0), "v_proj": ("attention.wv", 0),
    "o_proj": ("attention.wo", 1),
    "gate_proj": ("feed_forward.w1", 0), "up_proj": ("feed_forward.w3", 0), "down_proj": ("feed_forward.w2", 1),
    "input_layernorm": ("attention_norm", None), "post_attention_layernorm": ("ffn_norm", None),
}  # fmt: skip


def meta_name(name: str) -> tuple[str, int | None]:
    """Meta's name, and the dimension that its shards split: model.norm.weight -> (norm.weight, None)."""
    part, dim = META[name.split(".")[-2]]
    layer = re.match(r"model\.(layers\.\d+\.)", name)
    return f"{layer[1] if layer else ''}{part}.weight", dim


def pairs(weight: Tensor, d: int, meta: bool) -> Tensor:
    """A q or k projection [H * d, D] in the other layout: Meta has the two channels of each rotated pair side by side,
    transformers all first ones of a head before all second ones. meta: it is in Meta's."""
    split = weight.view(-1, d // 2, 2, weight.shape[1]) if meta else weight.view(-1, 2, d // 2, weight.shape[1])
    return split.transpose(1, 2).reshape(weight.shape)


def from_meta(source: Path, target: Path) -> None:
    """A folder of Meta's (params.json, consolidated.00.pth, ...) -> transformers' layout, in a folder that exists."""
    files = sorted(source.glob("consolidated.*.pth"))
    for i in range(max(1, len(files))):
        if source / f"consolidated.{i:02d}.pth" not in files:
            raise ValueError(f"{source / f'consolidated.{i:02d}.pth'}: is missing; download it")
    shards = [vit.read_tensors(file)[0] for file in files]
    config = meta_config(llama.read_json(source / "params.json"), shards, source / "params.json")
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in llama.Llama(config).named_parameters()}
    sources, other = {meta_name(name)[0] for name in shapes}, "a file is missing, or one is another model's"
    for file, shard in zip(files, shards):
        if odd := sources ^ (shard.keys() - {"rope.freqs"}):
            what = "is missing" if min(odd) in sources else "has no place in the model"
            raise ValueError(f"{file}: tensor {min(odd)} {what}; {other}")

    def get(name: str) -> Tensor:
        theirs, dim = meta_name(name)
        value = shards[0][theirs] if dim is None else torch.cat([shard[theirs] for shard in shards], dim)
        if value.shape != shapes[name]:
            raise ValueError(f"{source}: tensor {theirs} is {list(value.shape)}, not {list(shapes[name])}; {other}")
        return pairs(value, config.head_size, meta=True) if name.endswith(("q_proj.weight", "k_proj.weight")) else value

    llama.write(target, config, list(shapes), get)


def meta_config(values: dict, shards: list[dict[str, Tensor]], file: Path) -> LlamaConfig:
    """A config from the contents of params.json, which leave two sizes to the tensors."""
    if values.get("use_scaled_rope"):
        raise ValueError(f"{file}: scales the rotary embedding, which Llama 2 does not; give a Llama 2 model")
    rows = {name: sum(len(shard[name]) for shard in shards if name in shard) for name in shards[0]}
    try:
        sizes = dict(vocab_size=rows["output.weight"], intermediate_size=rows["layers.0.feed_forward.w1.weight"])
        heads = dict(num_attention_heads=values["n_heads"], num_key_value_heads=values.get("n_kv_heads"))
        other = dict(rms_norm_eps=values["norm_eps"], rope_theta=values.get("rope_theta") or 10000.0)
        return LlamaConfig(hidden_size=values["dim"], num_hidden_layers=values["n_layers"], **sizes, **heads, **other)
    except KeyError as error:
        raise ValueError(f"{file}: it or the weights lack {error.args[0]}; download them again") from None


def to_meta(source: Path, target: Path) -> None:
    """A folder of transformers' -> params.json and one consolidated.00.pth, which is in memory as a whole."""
    values = llama.read_json(source / "config.json")
    model = llama.load(source, getattr(torch, values.get("dtype") or values.get("torch_dtype") or "float32"))
    config, state = model.config, {}
    for name, value in model.named_parameters():
        turned = name.endswith(("q_proj.weight", "k_proj.weight"))
        state[meta_name(name)[0]] = pairs(value.detach(), config.head_size, meta=False) if turned else value.detach()
    state.setdefault("output.weight", state["tok_embeddings.weight"])  # tied embeddings
    (target / "params.json").write_text(json.dumps(meta_params(config)))
    torch.save(state, target / "consolidated.00.pth")


def meta_params(config: LlamaConfig) -> dict[str, object]:
    """The contents of Meta's params.json. ValueError for a shape that Meta's code does not know."""
    if config.head_size * config.num_attention_heads != config.hidden_size:
        raise ValueError("Meta's layout only has heads of hidden_size / heads channels; keep transformers' layout")
    values = dict(dim=config.hidden_size, n_layers=config.num_hidden_layers, n_heads=config.num_attention_heads)
    values |= dict(n_kv_heads=config.kv_heads, norm_eps=config.rms_norm_eps, vocab_size=config.vocab_size)
    usual, size, values["multiple_of"] = 8 * config.hidden_size // 3, config.intermediate_size, 256
    if -(-usual // 256) * 256 != size:  # not 8/3 of the width, rounded up
        values["multiple_of"] = size  # rounds up to exactly this, once the number before is no larger
        values |= dict(ffn_dim_multiplier=(size + 0.5) / usual) if usual > size else {}
    return values | (dict(rope_theta=config.rope_theta) if config.rope_theta != 10000.0 else {})


def convert_llama(source: str | Path, target: str | Path) -> str:
    """Meta's layout -> transformers', or back, in a new folder; the dtype stays. Returns the line to print."""
    source, meta = Path(source), (Path(source) / "params.json").is_file()
    with llama.new_folder(target) as temporary:
        (from_meta if meta else to_meta)(source, temporary)
        for folder in (source, source.resolve().parent)[: 2 if meta else 1]:  # Meta's download has it one level up
            if (folder / "tokenizer.model").is_file() and not (temporary / "tokenizer.model").exists():
                add_tokenizer(temporary, folder / "tokenizer.model")
    return f"{target}: written in the layout of {'transformers' if meta else 'Meta'}"


def add_tokenizer(folder: Path, file: Path) -> list[str]:
    """Copy a tokenizer into a model's folder; tell transformers to put <s> before a text, and which ids end it. Returns
    what differs there."""
    shutil.copyfile(file, folder / "tokenizer.model")
    if not (folder / "config.json").is_file():  # Meta's layout
        return []
    tokenizer, config = llama.Tokenizer(file), llama.read_json(folder / "config.json")
    config |= dict(bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eos)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    bos, eos = map(tokenizer.pieces.id_to_piece, (tokenizer.bos, tokenizer.eos))
    about = dict(tokenizer_class="LlamaTokenizer", bos_token=bos, eos_token=eos, add_bos_token=True, legacy=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(about | dict(add_eos_token=False), indent=2))
    return ["In transformers, <s> and </s> inside a text are special tokens; a space before a text and user-defined "
            "symbols of a tokenizer (as of the demo's) are lost. Encode such texts with llama.Tokenizer."]


def export_language(folder: str | Path, target: str | Path, layout: str) -> list[str]:
    """The language model of a VLM's folder, with its tokenizer, in transformers' layout. Returns notes."""
    language = llama.read_json(Path(folder) / "config.json").get("language")
    if language is None or layout != "transformers":
        raise ValueError(f"{folder}: give a file, or a VLM's folder (train_vlm.py writes it) and --layout transformers")
    tensors, prefix = vit.read_tensors(Path(folder) / "model.safetensors")[0], "language."
    names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    with llama.new_folder(target) as temporary:
        llama.write(temporary, LlamaConfig(**language), names, lambda name: tensors[prefix + name])
        return add_tokenizer(temporary, Path(folder) / "tokenizer.model")


# --- conversations ----------------------------------------------------------------------------------------------------

def convert_conversations(source: str | Path, target: str | Path) -> str:
    """Files as distributed -> rows for train_vlm.py --data: LRV-Instruct (image_id, question, answer),
    LVIS-Instruct-4V; with --units, RefCOCO's refs(...).p and COCO's instances. ValueError: a row is none of these."""
    pickled, rows = Path(source).suffix == ".p", []
    found = [] if pickled else data.read_json(source, rows=True)
    if pickled or found and isinstance(found[0], dict) and "annotations" in found[0]:
        try:
            rows = [pointing_row(*each) for each in (references(source) if pickled else instances(*found))]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{source}: is not as RefCOCO or COCO distribute it ({error!r})") from None
        found = []
    for number, row in enumerate(found, 1):
        if isinstance(row, dict) and {"image_id", "question", "answer"} <= row.keys():
            turns = {"human": f"<image>\n{row['question']}", "gpt": str(row["answer"])}
            turns = [{"from": who, "value": text} for who, text in turns.items()]
            row = {"id": f"lrv-{number}", "image": f"{row['image_id']}.jpg", "conversations": turns}
        if what := data.fault(row):
            raise ValueError(f"{source}, row {number}: is neither LRV-Instruct's nor LVIS-Instruct-4V's ({what})")
        rows.append(row)
    with open(target, "x", encoding="utf-8") as file:
        json.dump(rows, file)
    return f"{target}: {len(rows):,} conversations; the paths of their images start from --images"


def references(file: str | Path) -> Iterator[tuple[str, list]]:
    """RefCOCO's training part as arguments of `pointing_row`: a thing's sentences ask in turn for a box and a mask."""
    for ref in (ref for ref in data.refs(file) if ref.split == "train"):
        asked = zip(ref.sentences.values(), itertools.cycle(("box", "mask")))
        yield ref.image, [(f"Where is {s}? Point with a {unit}.", s, unit, [getattr(ref, unit)]) for s, unit in asked]


def instances(content: dict, most: int = 20) -> Iterator[tuple[str, list]]:
    """COCO's instances: of each image the classes with at most `most` things and no crowd, in turn boxes and masks."""
    names, images = {one["id"]: one["name"] for one in content["categories"]}, {}
    for one in content["annotations"]:
        images.setdefault(one["image_id"], {}).setdefault(names[one["category_id"]], []).append(one)
    for image in (image for image in content["images"] if image["id"] in images):
        asked = []
        for name, things in images[image["id"]].items():
            if len(things) <= most and not any(one["iscrowd"] for one in things):
                unit = ("box", "mask")[len(asked) % 2]
                boxes = [[x, y, x + width, y + height] for x, y, width, height in (one["bbox"] for one in things)]
                places = boxes if unit == "box" else [one["segmentation"] for one in things]
                question = f"Where is every {name}? Point with {unit}{'es' if unit == 'box' else 's'}."
                asked.append((question, name, unit, places))
        if asked:
            yield image["file_name"], asked


def pointing_row(image: str, asked: list[tuple[str, str, str, list]]) -> dict:
    """A row for train_vlm.py --units. asked: question; name, unit and places of its answer, a triplet (decode.py)."""
    turns, targets = [], {}
    for question, name, unit, places in asked:
        refs = "".join(f"[{i}]<REF>" for i in range(len(places)))
        answer = f"<Phrase>{name}</Phrase>(<Unit>{unit}</Unit>{refs})"
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        targets[unit] = targets.get(unit, []) + places
    return {"id": Path(image).stem, "image": image, "conversations": turns, "targets": targets}


# --- the command ------------------------------------------------------------------------------------------------------

def describe(path: str | Path) -> str:
    """What `info` prints: layout, size, metadata."""
    tensors, metadata = vit.read_tensors(path)
    layout, prefix = detect_layout(list(tensors), path)
    count = sum(value.numel() for value in tensors.values())
    lines = [f"{path}: {len(tensors)} tensors, {count:,} numbers, layout {layout}" + (prefix and f" after {prefix}")]
    config = vit.read_config(metadata, path)
    known = metadata | (asdict(config) if config else {})
    return "\n".join(lines + [f"  {key}: {value}" for key, value in known.items() if key not in ("config", "format")])


def main(argv: list[str] | None = None) -> None:
    """The command; its help is `python convert.py --help`."""
    parser = argparse.ArgumentParser(description="Convert weights of vision transformers and Llama 2.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("vit", help="a file in any layout -> a file of ours")
    command.add_argument("name", choices=vit.BACKBONES, metavar="NAME", help=", ".join(vit.BACKBONES))
    command.add_argument("source", help="a file or its folder, of timm, transformers, open_clip, the authors")
    command.add_argument("target", help="the file to write, .safetensors")
    command.add_argument("--image-size", type=int, help="resample position embeddings to this input size")
    command = commands.add_parser("llama", help="Meta's layout -> transformers', or back; the folder says which it is")
    command.add_argument("source", help="folder with params.json (Meta) or config.json (transformers)")
    command.add_argument("target", help="the folder to make")
    command = commands.add_parser("export", help="a file of ours, or a VLM's folder -> timm's or transformers' layout")
    command.add_argument("file", help="file of ours, also an aligned one; or a VLM's folder, for its language model")
    command.add_argument("target", help="timm: the file to write, .safetensors; transformers: the folder to make")
    command.add_argument("--layout", choices=("timm", "transformers"), required=True)
    command = commands.add_parser("conversations", help="other data sets' rows -> train_vlm.py's format")
    command.add_argument("source", help="as distributed: LRV-Instruct's or LVIS-Instruct-4V's .json; to learn to "
                         "point, COCO's instances_train2017.json, or RefCOCO's refs(unc).p beside its instances.json")
    command.add_argument("target", help="the .json file to write; must be new")
    command = commands.add_parser("info", help="what a file of a vision transformer holds")
    command.add_argument("file")
    args = parser.parse_args(argv)
    hasattr(sys.stdout, "reconfigure") and sys.stdout.reconfigure(errors="backslashreplace")  # for any terminal
    try:
        if args.command == "vit":
            print(convert_vit(args.name, args.source, args.target, args.image_size))
        elif args.command == "llama":
            print(convert_llama(args.source, args.target))
        elif args.command == "conversations":
            print(convert_conversations(args.source, args.target))
        elif args.command == "export":
            how = export_language if (Path(args.file) / "config.json").is_file() else export_vit
            for note in how(args.file, args.target, args.layout):
                print(f"Note: {note}")
            print(f"{args.target}: written in the layout of {args.layout}")
        else:
            print(describe(args.file))
    except (ValueError, OSError) as error:
        sys.exit(f"convert.py: {error}")


if __name__ == "__main__":
    main()
