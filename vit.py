"""The vision transformer, and the backbones that the paper aligns. Needs torch, numpy, pillow and safetensors; copy it.

One class covers CLIP, SigLIP, OpenCLIP, DFN, ViT, MAE, DINO, DINOv2, MoCo v3, EVA02, BEiT and BEiTv2, with timm's names
of parameters. Shapes: B batch, N patches, P prefix tokens, T = P + N, D width, H heads, d = D / H channels.

    model = vit.load("model.safetensors", "clip-vit-b")      # timm's file, or ours (convert.py reads other layouts)
    tokens = model(images)                                   # [B, 3, H, W] -> [B, P + N, D], prefix tokens first
"""

import argparse
import contextlib
import functools
import json
import math
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Image.MAX_IMAGE_PIXELS = 2**28  # by default, Pillow mistakes a photo of 100 megapixels for an attack

# --- configuration ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ViTConfig:
    """Everything needed to build a backbone and to prepare an image for it. JSON-serializable with `asdict`."""

    image_size: int = 224
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    family: str = "vit"  # vit | beit (relative position bias) | eva02 (rotary positions, SwiGLU): three kinds of block
    class_token: bool = True
    registers: int = 0
    pos_embed: str = "tokens"  # tokens: class token and patches | patches: patches only | none
    pre_norm: bool = False  # a norm before the blocks (CLIP)
    patch_bias: bool = True  # a bias on the patch projection (all but CLIP)
    qkv_bias: bool = True
    act: str = "gelu"  # gelu | gelu_tanh (SigLIP in transformers) | quick_gelu (OpenAI) | swiglu (EVA02's decoder)
    layer_scale: float | None = None  # initial value; None: no LayerScale
    norm_eps: float = 1e-6
    final_norm: float | None = 1e-6  # epsilon of the norm after the last block; None: no such norm (BEiT)
    softcap: float | None = None  # bound of the attention logits (appendix C); None: no cap
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    crop_pct: float = 0.9  # evaluation: the shorter side is resized to image_size / crop_pct, then center-cropped
    source: str = ""  # where the pre-trained weights are: a repository of huggingface.co, or a URL

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))  # JSON has only lists
        object.__setattr__(self, "std", tuple(self.std))
        if self.family == "beit" and self.softcap is not None:
            raise ValueError("softcap: BEiT's relative position bias has no soft-capped form; leave the cap out")

    @property
    def grid(self) -> int:
        """Patches along each side. Pixels beyond the last whole patch belong to no patch."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """N."""
        return self.grid**2

    @property
    def num_prefix(self) -> int:
        """P: the class token and the registers, which come first."""
        return int(self.class_token) + self.registers


_IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
_OPENAI = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
_L = dict(embed_dim=1024, depth=24, num_heads=16)
_CLIP = dict(pre_norm=True, patch_bias=False, norm_eps=1e-5, final_norm=1e-5, **_OPENAI)
_CLIP_L = dict(**_L, patch_size=14, act="quick_gelu", crop_pct=1.0, **_CLIP)
_SO400M = dict(embed_dim=1152, depth=27, num_heads=16, mlp_ratio=3.7362, patch_size=14, class_token=False)
_BEIT = dict(family="beit", pos_embed="none", final_norm=None, layer_scale=0.1)
_DINOV2 = dict(patch_size=14, registers=4, pos_embed="patches", layer_scale=1e-5, crop_pct=1.0, **_IMAGENET)
_EVA02 = dict(family="eva02", mlp_ratio=8 / 3, **_OPENAI)
_MOCO_FILE = "https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar"

BACKBONES: dict[str, ViTConfig] = {  # table 5, and dinov2-vit-l for feature fusion
    "in1k-vit-t": ViTConfig(embed_dim=192, num_heads=3, source="timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
    "in1k-vit-s": ViTConfig(embed_dim=384, num_heads=6, source="timm/vit_small_patch16_224.augreg_in21k_ft_in1k"),
    "in1k-vit-b": ViTConfig(source="timm/vit_base_patch16_224.augreg_in21k_ft_in1k"),
    "in1k-vit-l": ViTConfig(**_L, source="timm/vit_large_patch16_224.augreg_in21k_ft_in1k"),
    "moco-vit-b": ViTConfig(**_IMAGENET, crop_pct=0.875, source=_MOCO_FILE),
    "clip-vit-b": ViTConfig(**_CLIP, act="quick_gelu", source="timm/vit_base_patch16_clip_224.openai"),
    "clip-vit-l": ViTConfig(**_CLIP_L, source="timm/vit_large_patch14_clip_224.openai"),
    "clip-vit-l-336": ViTConfig(**_CLIP_L, image_size=336, source="timm/vit_large_patch14_clip_336.openai"),
    "siglip-vit-b": ViTConfig(class_token=False, source="timm/vit_base_patch16_siglip_224.webli"),
    "siglip-so400m": ViTConfig(**_SO400M, source="timm/vit_so400m_patch14_siglip_224.webli"),
    "siglip-so400m-384": ViTConfig(**_SO400M, image_size=384, source="timm/vit_so400m_patch14_siglip_384.webli"),
    "openclip-vit-b": ViTConfig(**_CLIP, crop_pct=1.0, source="timm/vit_base_patch16_clip_224.laion2b"),
    "eva02-vit-b": ViTConfig(**_EVA02, source="timm/eva02_base_patch16_clip_224.merged2b"),
    "dfn-vit-b": ViTConfig(**_CLIP, crop_pct=1.0, source="timm/vit_base_patch16_clip_224.dfn2b"),
    "mae-vit-b": ViTConfig(**_IMAGENET, source="timm/vit_base_patch16_224.mae"),
    "beit-vit-b": ViTConfig(**_BEIT, source="timm/beit_base_patch16_224.in22k_ft_in22k_in1k"),
    "beitv2-vit-b": ViTConfig(**_BEIT, **_IMAGENET, source="timm/beitv2_base_patch16_224.in1k_ft_in22k_in1k"),
    "dino-vit-b": ViTConfig(**_IMAGENET, source="timm/vit_base_patch16_224.dino"),
    "dinov2-vit-b": ViTConfig(**_DINOV2, source="timm/vit_base_patch14_reg4_dinov2.lvd142m"),
    "dinov2-vit-l": ViTConfig(**_L, **_DINOV2, source="timm/vit_large_patch14_reg4_dinov2.lvd142m"),
}


# --- attention --------------------------------------------------------------------------------------------------------

def attention(q: Tensor, k: Tensor, v: Tensor, softcap: float | None = None, bias: Tensor | None = None) -> Tensor:
    """Soft-capped attention (appendix C), or plain with an additive bias [H, T, T]. q, k, v, result: [B, H, T, d]."""
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, None if bias is None else bias.to(q.dtype))
    if q.is_cuda and torch.cuda.get_device_properties(q.device).major >= 8:  # A100 or newer
        return flex_softcap(q, k, v, softcap)  # what follows in one fused kernel
    logits = q @ k.mT / math.sqrt(q.shape[-1])  # [B, H, T, T]
    return (softcap * torch.tanh(logits / softcap)).softmax(-1) @ v


def flex_softcap(q: Tensor, k: Tensor, v: Tensor, softcap: float) -> Tensor:
    """Soft-capped attention as one fused kernel, on CUDA (on a CPU it has no backward pass)."""
    from torch.nn.attention.flex_attention import flex_attention  # a slow import, needed only here

    def cap(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    inside = torch.compiler.is_compiling()  # a compiled model compiles this function too
    return (flex_attention if inside else _compiled(flex_attention))(q, k, v, score_mod=cap)


@functools.cache
def _compiled(function: Callable) -> Callable:
    """One kernel for each cap and shape, with and without gradients; beyond its limit torch runs the slow formula."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(function, dynamic=False)


class Attention(nn.Module):
    """Multi-head self-attention. The three families differ in their projections and positions."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        D, self.family = config.embed_dim, config.family
        self.num_heads, self.softcap = config.num_heads, config.softcap
        if self.family == "eva02":
            self.q_proj, self.k_proj, self.v_proj = nn.Linear(D, D), nn.Linear(D, D, bias=False), nn.Linear(D, D)
        else:
            self.qkv = nn.Linear(D, 3 * D, bias=config.qkv_bias and self.family != "beit")
        if self.family == "beit":
            self.q_bias, self.v_bias = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))
            table = torch.zeros((2 * config.grid - 1) ** 2 + 3, config.num_heads)  # each offset, and the class token
            self.relative_position_bias_table = nn.Parameter(table)
        self.norm = nn.LayerNorm(D, config.norm_eps) if self.family == "eva02" else nn.Identity()
        self.proj = nn.Linear(D, D)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]. positions: from `block_positions`."""
        if self.family == "eva02":
            qkv = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        elif self.family == "beit":  # k has no bias
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
            qkv = F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        else:
            qkv = self.qkv(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in qkv)  # [B, H, T, d]
        if self.family == "eva02":
            q, k = rotate(q, positions), rotate(k, positions)
        bias = self.relative_position_bias_table[positions].permute(2, 0, 1) if self.family == "beit" else None
        x = attention(q, k, v, self.softcap, bias).transpose(1, 2).flatten(2)  # [B, T, D]
        return self.proj(self.norm(x))


def rotary_positions(grid: int, head_dim: int, device: torch.device) -> Tensor:
    """EVA02's 2D rotary embedding on the 16 x 16 grid of its pre-training: sines and cosines, [2, N, d]."""
    bands = 10000.0 ** -(torch.arange(head_dim // 4, device=device) / (head_dim // 4))
    place = torch.arange(grid, device=device) / grid * 16
    angle = torch.cartesian_prod(place, place)[:, :, None] * bands  # [N, 2, d / 4]: by row, by column
    angle = angle.flatten(1).repeat_interleave(2, -1)  # [N, d]
    return torch.stack([angle.sin(), angle.cos()])


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate each pair of channels of the patch tokens of x [B, H, T, d] by its angle; prefix tokens stay."""
    sin, cos = positions  # float32, also under autocast
    prefix, x = x[:, :, : -len(sin)], x[:, :, -len(sin) :]
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return torch.cat([prefix, (x * cos + turned * sin).to(x.dtype)], 2)


def relative_positions(grid: int, device: torch.device) -> Tensor:
    """BEiT: each pair's row in the bias table, [T, T]; the last rows are from, to, and within the class token."""
    place = torch.cartesian_prod(*torch.arange(grid, device=device).expand(2, -1))  # [N, 2], row and column
    offset, side = place[:, None] - place[None] + grid - 1, 2 * grid - 1  # [N, N, 2], each 0 .. side - 1
    index = F.pad(offset[..., 0] * side + offset[..., 1], (1, 0, 1, 0), value=side**2)
    index[:, 0], index[0, 0] = side**2 + 1, side**2 + 2
    return index


# --- the model --------------------------------------------------------------------------------------------------------

class Mlp(nn.Module):
    """Two linear layers, D -> mlp_ratio * D -> D, with a kind of GELU between them."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        D, hidden, self.act = config.embed_dim, int(config.embed_dim * config.mlp_ratio), config.act
        self.fc1, self.fc2 = nn.Linear(D, hidden), nn.Linear(hidden, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.act == "quick_gelu":
            return self.fc2(x * torch.sigmoid(1.702 * x))
        return self.fc2(F.gelu(x, approximate="tanh" if self.act == "gelu_tanh" else "none"))


class SwiGLU(nn.Module):
    """EVA02's MLP: a gated hidden layer with a norm inside (its decoder's has no norm)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        D, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
        self.fc1_g, self.fc1_x, self.fc2 = nn.Linear(D, hidden), nn.Linear(D, hidden), nn.Linear(hidden, D)
        self.norm = nn.LayerNorm(hidden, config.norm_eps) if config.family == "eva02" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(F.silu(self.fc1_g(x)) * self.fc1_x(x)))


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch."""

    def __init__(self, dim: int, value: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block; each branch passes LayerScale where the backbone has it."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        D, value, self.beit = config.embed_dim, config.layer_scale, config.family == "beit"
        self.norm1, self.norm2 = nn.LayerNorm(D, config.norm_eps), nn.LayerNorm(D, config.norm_eps)
        self.attn = Attention(config)
        self.mlp = SwiGLU(config) if config.family == "eva02" or config.act == "swiglu" else Mlp(config)
        if self.beit:
            self.gamma_1, self.gamma_2 = nn.Parameter(torch.full((D,), value)), nn.Parameter(torch.full((D,), value))
        else:
            self.ls1, self.ls2 = (nn.Identity() if value is None else LayerScale(D, value) for _ in range(2))

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]. positions: from `block_positions`."""
        if self.beit:
            x = x + self.gamma_1 * self.attn(self.norm1(x), positions)
            return x + self.gamma_2 * self.mlp(self.norm2(x))
        x = x + self.ls1(self.attn(self.norm1(x), positions))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """A linear layer on each patch: a convolution whose stride is its size. Pixels beyond the last patch are unread."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.proj = nn.Conv2d(3, config.embed_dim, config.patch_size, config.patch_size, bias=config.patch_bias)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] -> [B, N, D], row by row."""
        return self.proj(images).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """The vision transformer of a `ViTConfig`, randomly initialized; `load` returns one with weights."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        D, P, N = config.embed_dim, config.num_prefix, config.num_patches
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D)) if config.class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, config.registers, D)) if config.registers else None
        if config.pos_embed != "none":
            self.pos_embed = nn.Parameter(torch.zeros(1, N + (P if config.pos_embed == "tokens" else 0), D))
        self.norm_pre = nn.LayerNorm(D, config.norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.Identity() if config.final_norm is None else nn.LayerNorm(D, config.final_norm)
        self.checkpointing = False  # True: keep only each block's input for the backward pass, and recompute the rest
        for layer in (module for module in self.modules() if isinstance(module, nn.Linear)):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        for parameter in self.parameters(recurse=False):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, images: Tensor, skip_blocks: int = 0, norm: bool = True) -> Tensor:
        """Normalized images [B, 3, H, W] -> tokens [B, P + N, D]. The last `skip_blocks` blocks are not run."""
        size = self.config.image_size
        if images.shape[2:] != (size, size):
            raise ValueError(f"images are {tuple(images.shape)}, the model reads {size} x {size}")
        x = self.patch_embed(images)  # [B, N, D]
        if self.config.pos_embed == "patches":
            x = x + self.pos_embed
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        x = torch.cat([*prefix, x], 1)  # [B, P + N, D]
        if self.config.pos_embed == "tokens":
            x = x + self.pos_embed
        blocks = self.blocks[: self.config.depth - skip_blocks]
        x = run_blocks(blocks, self.norm_pre(x), block_positions(self.config, x.device), self.checkpointing)
        return self.norm(x) if norm else x


def block_positions(config: ViTConfig, device: torch.device) -> Tensor | None:
    """What the blocks of EVA02 and BEiT need to know about positions; None for the plain family."""
    if config.family == "eva02":
        return rotary_positions(config.grid, config.embed_dim // config.num_heads, device)
    return relative_positions(config.grid, device) if config.family == "beit" else None


def run_blocks(blocks: Iterable, x: Tensor, positions: Tensor | None = None, checkpointing: bool = False) -> Tensor:
    """x [B, T, D] through the blocks; with `checkpointing` only each block's input is kept for the backward pass."""
    recompute = checkpointing and torch.is_grad_enabled()
    for block in blocks:
        x = checkpoint(block, x, positions, use_reentrant=False) if recompute else block(x, positions)
    return x


def round_linear_weights(model: nn.Module) -> None:
    """Keep a frozen model's linear layers in bfloat16: autocast rounds them anyway, and this takes half the memory."""
    for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
        layer.to(torch.bfloat16)


# --- preparing an image -----------------------------------------------------------------------------------------------

def preprocess(image: Image.Image, config: ViTConfig, square: bool = False) -> Tensor:
    """A PIL image -> [3, H, W], resized and cropped as in `fit`, then normalized."""
    return normalize(torch.from_numpy(np.array(fit(image, config, square))).permute(2, 0, 1), config)


def fit(image: Image.Image, config: ViTConfig, square: bool = False) -> Image.Image:
    """Any PIL image -> RGB of the model's input size: resized and center-cropped, or (`square`) resized as a whole."""
    image, size = upright(image), config.image_size
    if square:
        return image.resize((size, size), Image.Resampling.BICUBIC)
    if max(image.size) > 8 * min(image.size):  # of a long strip, only the middle is resized
        x, y = (max(0, side - 8 * min(image.size)) // 2 for side in image.size)
        image = image.crop((x, y, image.width - x, image.height - y))
    width, height = (int(int(size / config.crop_pct) * side / min(image.size)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


# EXIF orientations from 2 on (1 is upright), and what turns the stored picture upright
TURNS = dict(enumerate(map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), 2))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB, without transparency: the color stored under it shows. Grays that Pillow would clip are scaled:
    16 bits to 8; floats from 0 to 1 by 255; any other range from its least value to its greatest."""
    if image.mode[0] in "IF":
        gray = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0, neginf=0)
        most = 1 if image.mode == "F" else 65535
        low, high = (0, most) if 0 <= gray.min() and gray.max() <= most else (gray.min(), gray.max())
        image = Image.fromarray(((gray - low) * (255.999 / (high - low or 1))).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def turn(image: Image.Image) -> Image.Transpose | None:
    """What turns a stored picture upright, by its EXIF orientation. Damaged metadata says nothing."""
    with contextlib.suppress(Exception):
        return TURNS.get(image.getexif().get(0x0112))


def upright(image: Image.Image) -> Image.Image:
    """Any image as RGB, turned upright."""
    image.load()  # some formats store the EXIF data after the pixels
    how, image = turn(image), to_rgb(image)
    if how is not None:
        image = image.transpose(how)
        image.info = {}  # so that nobody turns it again
    return image


def normalize(images: Tensor, config: ViTConfig) -> Tensor:
    """uint8 [..., 3, H, W] -> float32, minus the mean, divided by the standard deviation."""
    return (images.float() / 255 - constant(config.mean, images.device)) / constant(config.std, images.device)


@functools.cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The channels' values [3, 1, 1], moved to a device once."""
    return torch.tensor(values, device=device).view(3, 1, 1)


# --- files ------------------------------------------------------------------------------------------------------------

LEFT_OUT = set(  # not needed for token features: heads, pooling, buffers, MAE's decoder
    "head fc_norm attn_pool mask_token relative_position_index decoder_embed decoder_pos_embed decoder_blocks "
    "decoder_norm decoder_pred".split())


def load(path: str | Path, config: str | ViTConfig | None = None) -> ViT:
    """The backbone in a file of ours (an aligned model gives its encoder) or of timm, on the CPU, float32, eval mode.

    config: a name of BACKBONES or a ViTConfig, to whose image size positions are resampled. A file of ours carries its
        own config: None is enough, a name is checked, a ViTConfig sets the image size. ValueError: what is wrong."""
    if isinstance(config, str) and config not in BACKBONES:
        raise ValueError(f"{config}: no such backbone; the known ones are {', '.join(BACKBONES)}")
    asked = BACKBONES[config] if isinstance(config, str) else config  # None: whatever the file holds
    tensors, metadata = read_tensors(path)
    own = read_config(metadata, path)  # None: not a file of ours
    prefix = "encoder." if own and "encoder.patch_embed.proj.weight" in tensors else ""
    name = next((name for name, known in BACKBONES.items() if known == asked), "NAME")
    how = f"python convert.py vit {name} {path} {'NEW' if name == 'NAME' else name}.safetensors"
    if prefix + "patch_embed.proj.weight" not in tensors:
        raise ValueError(f"{path}: its tensors have neither our names nor timm's; if it is a ViT, run `{how}` first")
    if own is None and asked is None:
        raise ValueError(f"{path}: does not say which backbone it holds; name one of {', '.join(BACKBONES)}")
    for key, value in asdict(own).items() if own and asked else ():  # alignment changes the final norm and the cap
        if key not in ("image_size", "final_norm", "softcap", "source") and value != getattr(asked, key):
            raise ValueError(f"{path}: its {key} is {value}, not {getattr(asked, key)}; name the one it holds")
    built = own or confirm(path, asked)
    if own and isinstance(config, ViTConfig):
        built = replace(own, image_size=config.image_size)
    with torch.device("meta"):  # no memory and no time for initial values that the file replaces
        model = ViT(built)
    model.to_empty(device="cpu")
    tensors = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    try:
        fill(model, tensors, path)
    except ValueError as error:
        raise ValueError(f"{error}" + (own is None) * f"; a file in another layout is read by `{how}`") from None
    return model.eval()


def confirm(path: str | Path, config: ViTConfig) -> ViTConfig:
    """The config, with the activation that a config.json of timm or transformers beside the weight file gives; where
    there is none, as it is. ValueError: that file names another kind of model, or is damaged."""
    file, act = (Path(path) if Path(path).is_dir() else Path(path).parent) / "config.json", config.act
    try:
        about = dict(json.loads(file.read_text(encoding="utf-8-sig"))) if file.is_file() else {}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: is not a JSON object ({error}); download it again, or remove it") from None
    known = any(replace(row, image_size=config.image_size) == config for row in BACKBONES.values())
    if "architecture" in about and known and config.source.startswith("timm/"):  # the size in a name may be another
        names = about["architecture"], config.source[5:].split(".")[0]
        tag = about.get("pretrained_cfg", {}).get("tag")
        theirs, *kinds = (re.sub(r"_quickgelu|_\d+$", "", name) for name in names)
        if config.pre_norm and (tag or "quickgelu" in names[0]):  # OpenAI's CLIP, or one of the others
            act = "quick_gelu" if "quickgelu" in names[0] or tag == "openai" else "gelu"
    elif "model_type" in about:  # transformers'
        theirs, vision = about["model_type"].removesuffix("_vision_model"), about.get("vision_config", about)
        traits = {"siglip": not config.class_token, "clip": config.pre_norm, "beit": config.family == "beit",
                  "dinov2_with_registers": config.registers, "dinov2": config.layer_scale, "vit": True}  # fmt: skip
        kinds = [next(kind for kind, applies in traits.items() if applies)]
        usual = {"clip": "quick_gelu", "siglip": "gelu_pytorch_tanh"}.get(theirs, "gelu")  # where it does not say
        act = vision.get("hidden_act", usual).replace("_pytorch", "").replace("gelu_new", "gelu_tanh")
    else:
        return config
    if theirs.removesuffix("_mae") not in kinds:
        raise ValueError(f"{file}: says that {Path(path).name} is a {theirs}, not a {kinds[0]}; name what it is")
    if act != config.act:
        print(f"{path}: its activation is {act}, as config.json says", file=sys.stderr)
    return replace(config, act=act)


def read_config(metadata: dict[str, str], path: str | Path) -> ViTConfig | None:
    """The config in the metadata of a file of ours; None for another file."""
    try:
        return ViTConfig(**json.loads(metadata["config"])) if "config" in metadata else None
    except (TypeError, ValueError):
        raise ValueError(f"{path}: its config is another version's; convert the weights again") from None


@torch.no_grad()
def fill(model: ViT, tensors: dict[str, Tensor], path: str | Path) -> None:
    """Move tensors under our names from a dict into a model, resampling positions. ValueError: they are not its own."""
    parameters, other = dict(model.named_parameters()), f"{path}: does not hold the expected backbone"
    if odd := parameters.keys() ^ {name for name in tensors if LEFT_OUT.isdisjoint(name.split("."))}:
        raise ValueError(f"{other} (tensor {min(odd)} {'is missing' if min(odd) in parameters else 'is unexpected'})")
    for name, parameter in parameters.items():
        value = tensors.pop(name).float()  # frees the one before: no second copy of the file
        if name == "pos_embed":
            value = resample_positions(value, model.config.grid, parameter.shape[1] - model.config.num_patches)
        elif name.endswith("relative_position_bias_table"):
            value = resample_relative_bias(value, model.config.grid)
        if value.shape != parameter.shape:
            raise ValueError(f"{other} (tensor {name} is {list(value.shape)}, not {list(parameter.shape)})")
        parameter.copy_(value)


def resample_positions(value: Tensor, grid: int, prefix: int) -> Tensor:
    """Position embeddings [1, P + n^2, D] at another grid: bicubic, antialiased; those of the P prefix tokens stay."""
    side = math.isqrt(max(value.shape[1] - prefix, 0))
    if side in (0, grid) or prefix + side**2 != value.shape[1]:
        return value  # it fits, or it is another model's, as the caller will see
    x = F.interpolate(value[:, prefix:].mT.unflatten(2, (side, side)), (grid, grid), mode="bicubic", antialias=True)
    return torch.cat([value[:, :prefix], x.flatten(2).mT], 1)


def resample_relative_bias(table: Tensor, grid: int) -> Tensor:
    """BEiT's bias table [(2n - 1)^2 + 3, H] at another grid, as its authors and timm do it.

    Offsets 1, 2, 3 move to 1, 1 + q, 1 + q + q^2, where q takes the last to the new last one; linear between."""
    old, new = math.isqrt(max(len(table) - 3, 0)), 2 * grid - 1
    if old in (0, new) or old**2 + 3 != len(table):
        return table
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q ** (old // 2)) / (1 - q) > new // 2 else (q, high)
    places = np.cumsum(q ** np.arange(old // 2))
    places = np.concatenate([-places[::-1], [0], places])
    weights = torch.tensor([np.interp(np.arange(new) - new // 2, places, row).tolist() for row in np.eye(old)])
    square = torch.einsum("abh,ai,bj->ijh", table[:-3].view(old, old, -1), weights, weights)
    return torch.cat([square.flatten(0, 1), table[-3:]])


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a .safetensors file or a pickle by name, mapped, and its metadata. No code in a pickle is run.
    path: the file, or a folder with one (a download, an export). ValueError: what is wrong, such as a NaN."""
    path = find_weights(Path(path))
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                names, metadata = list(file.keys()), file.metadata() or {}
            tensors = {name: safe_open(path, "pt").get_tensor(name) for name in names}  # mapped one by one
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # training scripts save their options, too
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            metadata = state.get("metadata", {}) if "student" in state else {}  # of our own checkpoints
            for key in ("state_dict", "model", "teacher", "student"):  # of two models, DINO's teacher
                state = state[key] if isinstance(state.get(key), dict) else state
            tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    except Exception as error:  # a damaged file can fail in any way
        reason = str(error).strip().partition("\n")[0][:160] or type(error).__name__
        raise ValueError(f"{path}: cannot be read as weights ({reason}); download or convert it again") from None
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{path}: tensor {name} holds a NaN or an infinity; download or convert it again")
    return tensors, metadata


def find_weights(path: Path) -> Path:
    """A file itself; of a folder, the one .safetensors file, or else the one pickle in it."""
    if not path.is_dir():
        return path
    files = sorted(path.glob("[!.]*"))
    found = [file for file in files if file.suffix == ".safetensors"]
    found = found or [file for file in files if file.suffix in (".bin", ".pt", ".pth", ".tar")]
    if len(found) == 1:
        return found[0]
    raise ValueError(f"{path}: give one of the weight files in it: {', '.join(file.name for file in found) or 'none'}")


def save(model: ViT, path: str | Path) -> None:
    """Write a backbone with its config; the file appears whole or not at all. OSError: it cannot be written."""
    save_tensors(model.state_dict(), path, {"config": json.dumps(asdict(model.config))})


def save_tensors(state: dict[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file under a temporary name, then move it into place. OSError: it cannot be written."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: is not a valid name for a weight file; it must end in .safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # the umask's; safetensors makes files that only their owner can read
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, temporary, {"format": "pt"} | metadata)
        temporary.chmod(mode)
        temporary.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error}); is the disk full?") from None
    finally:
        temporary.unlink(missing_ok=True)
