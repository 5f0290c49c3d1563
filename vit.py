"""The vision transformer, and the backbones that the paper aligns.

One readable model class covers CLIP, SigLIP, OpenCLIP, DFN, supervised ViT, MAE, DINO, DINOv2, MoCo v3, EVA02, BEiT and
BEiTv2. Parameter names are timm's, so files travel both ways. The file needs torch, numpy, pillow and safetensors, and
nothing else of this project: copy it.

    model = vit.load("model.safetensors", "clip-vit-b")      # timm's, transformers', MoCo's, ours
    tokens = model(images)                                   # [B, 3, H, W] -> [B, P + N, D], prefix tokens first

    python vit.py convert clip-vit-b model.safetensors clip-vit-b.safetensors
    python vit.py export aligned.safetensors out/ --layout transformers
    python vit.py info aligned.safetensors

Shapes: B batch, V views, N patches, P prefix tokens (class token, registers), T = P + N, D width, H heads, d = D / H.
"""

import argparse
import ctypes
import functools
import json
import math
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class WeightsError(ValueError):
    """A weight file that cannot be used as asked; the message names the file and says what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class ViTConfig:
    """All that is needed to build a backbone and to prepare an image for it. JSON-serializable with `asdict`.

    `family` tells apart the three kinds of block: "vit" (the plain one), "beit" (relative position bias in each block,
    no k bias, LayerScale named gamma_1 and gamma_2) and "eva02" (rotary positions, separate q, k and v without k bias,
    a norm inside attention and MLP, SwiGLU).
    """

    image_size: int = 224
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    family: str = "vit"  # vit | beit | eva02
    class_token: bool = True
    registers: int = 0
    pos_embed: str = "tokens"  # tokens: class token and patches | patches: patches alone | none
    pre_norm: bool = False  # a norm before the blocks (CLIP)
    patch_bias: bool = True  # a bias on the patch projection (all but CLIP)
    qkv_bias: bool = True
    act: str = "gelu"  # gelu | quick_gelu
    layer_scale: float | None = None  # initial value; None: no LayerScale
    norm_eps: float = 1e-6
    final_norm: float | None = 1e-6  # epsilon of the norm after the last block; None: no such norm (BEiT)
    softcap: float | None = None  # attention logits are held within +-softcap (section C); None: no cap
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    crop_pct: float = 0.9  # evaluation: the shorter side is resized to image_size / crop_pct, then centre-cropped
    source: str = ""  # where the pre-trained weights are: a repository of huggingface.co, or a URL

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))  # JSON has lists only
        object.__setattr__(self, "std", tuple(self.std))
        if self.family == "beit" and self.softcap is not None:
            raise ValueError("softcap: BEiT's relative position bias has no soft-capped form; leave the cap out")

    @property
    def grid(self) -> int:
        """Patches along each side; pixels beyond the last whole patch belong to no patch."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """N."""
        return self.grid**2

    @property
    def num_prefix(self) -> int:
        """P: class token and registers, which come first."""
        return int(self.class_token) + self.registers


_HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
_IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
_OPENAI = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
_S = dict(embed_dim=384, num_heads=6)
_L = dict(embed_dim=1024, depth=24, num_heads=16)
_SO400M = dict(embed_dim=1152, depth=27, num_heads=16, mlp_ratio=3.7362)
_CLIP = dict(pre_norm=True, patch_bias=False, norm_eps=1e-5, final_norm=1e-5, **_OPENAI)
_QUICK = dict(act="quick_gelu", **_CLIP)  # OpenAI's own CLIP models
_SIGLIP = dict(class_token=False, **_HALF)
_BEIT = dict(family="beit", pos_embed="none", final_norm=None, layer_scale=0.1)
_DINOV2 = dict(patch_size=14, registers=4, pos_embed="patches", layer_scale=1e-5, crop_pct=1.0, **_IMAGENET)

BACKBONES: dict[str, ViTConfig] = {  # table 5, and dinov2-vit-l for feature fusion
    "in1k-vit-t": ViTConfig(embed_dim=192, num_heads=3, source="timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
    "in1k-vit-s": ViTConfig(**_S, source="timm/vit_small_patch16_224.augreg_in21k_ft_in1k"),
    "in1k-vit-b": ViTConfig(source="timm/vit_base_patch16_224.augreg_in21k_ft_in1k"),
    "in1k-vit-l": ViTConfig(**_L, source="timm/vit_large_patch16_224.augreg_in21k_ft_in1k"),
    "moco-vit-b": ViTConfig(
        **_IMAGENET, crop_pct=0.875, source="https://dl.fbaipublicfiles.com/moco-v3/vit-b-300ep/vit-b-300ep.pth.tar"
    ),
    "clip-vit-b": ViTConfig(**_QUICK, source="timm/vit_base_patch16_clip_224.openai"),
    "clip-vit-l": ViTConfig(
        **_L, patch_size=14, **_QUICK, crop_pct=1.0, source="timm/vit_large_patch14_clip_224.openai"
    ),
    "clip-vit-l-336": ViTConfig(
        **_L, image_size=336, patch_size=14, **_QUICK, crop_pct=1.0, source="timm/vit_large_patch14_clip_336.openai"
    ),
    "siglip-vit-b": ViTConfig(**_SIGLIP, source="timm/vit_base_patch16_siglip_224.webli"),
    "siglip-so400m": ViTConfig(**_SO400M, patch_size=14, **_SIGLIP, source="timm/vit_so400m_patch14_siglip_224.webli"),
    "siglip-so400m-384": ViTConfig(
        **_SO400M, image_size=384, patch_size=14, **_SIGLIP, source="timm/vit_so400m_patch14_siglip_384.webli"
    ),
    "openclip-vit-b": ViTConfig(**_CLIP, crop_pct=1.0, source="timm/vit_base_patch16_clip_224.laion2b"),
    "eva02-vit-b": ViTConfig(
        family="eva02", mlp_ratio=8 / 3, **_OPENAI, source="timm/eva02_base_patch16_clip_224.merged2b"
    ),
    "dfn-vit-b": ViTConfig(**_CLIP, crop_pct=1.0, source="timm/vit_base_patch16_clip_224.dfn2b"),
    "mae-vit-b": ViTConfig(**_IMAGENET, source="timm/vit_base_patch16_224.mae"),
    "beit-vit-b": ViTConfig(**_BEIT, **_HALF, source="timm/beit_base_patch16_224.in22k_ft_in22k_in1k"),
    "beitv2-vit-b": ViTConfig(**_BEIT, **_IMAGENET, source="timm/beitv2_base_patch16_224.in1k_ft_in22k_in1k"),
    "dino-vit-b": ViTConfig(**_IMAGENET, source="timm/vit_base_patch16_224.dino"),
    "dinov2-vit-b": ViTConfig(**_DINOV2, source="timm/vit_base_patch14_reg4_dinov2.lvd142m"),
    "dinov2-vit-l": ViTConfig(**_L, **_DINOV2, source="timm/vit_large_patch14_reg4_dinov2.lvd142m"),
}


# ----------------------------------------------------------------------------------------------------------------------
# Attention


def attention(q: Tensor, k: Tensor, v: Tensor, softcap: float | None = None, bias: Tensor | None = None) -> Tensor:
    """Attention with soft-capped logits, or plain with an optional additive bias. q, k, v, result [B, H, T, d]."""
    # On a CPU the loop over tiles is the way to cap, and without a cap it beats the fused kernel in bfloat16. Of few
    # logits it costs more than it saves, and compiled code needs formulas that the compiler can see.
    small = q.shape[:3].numel() * q.shape[2] < 2**16
    tiled = q.device.type == "cpu" and not small and not torch.compiler.is_compiling()
    if bias is None and tiled and (softcap is not None or q.dtype == torch.bfloat16):
        return TiledAttention.apply(q, k, v, softcap)
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
    return (softcap_attention_flex if q.is_cuda else softcap_attention_plain)(q, k, v, softcap)


def softcap_attention_plain(q: Tensor, k: Tensor, v: Tensor, softcap: float) -> Tensor:
    """The definition (section C): softmax(cap * tanh(q k^T / sqrt(d) / cap)) v. All [B, H, T, d]."""
    logits = q @ k.mT / math.sqrt(q.shape[-1])  # [B, H, T, T]
    return (softcap * torch.tanh(logits / softcap)).softmax(-1) @ v


def softcap_attention_flex(q: Tensor, k: Tensor, v: Tensor, softcap: float) -> Tensor:
    """The same by FlexAttention, a fused kernel on CUDA. (On the CPU it has no backward pass.)"""

    def cap(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    from torch.nn.attention.flex_attention import flex_attention  # a slow import, and needed on CUDA only

    if torch.compiler.is_compiling():  # inside a compiled model it is compiled with it
        return flex_attention(q, k, v, score_mod=cap)
    return _compiled(flex_attention)(q, k, v, score_mod=cap)


@functools.cache
def _compiled(flex_attention: Callable) -> Callable:
    """The compiled function. It has a kernel for each cap, each shape, and for training or not; if they were more than the
    limit, the plain formula would run."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex_attention, dynamic=False)


class TiledAttention(torch.autograd.Function):
    """The same on a CPU, with a cap or without, in a fraction of the memory and of the time.

    It takes a few heads at a time, so that their T x T tiles stay in the cache, in scratch memory that is allocated
    once, and saves only q, k and v: the backward pass computes the probabilities again.

    cap * tanh(x) = 2 cap * sigmoid(2x) - cap, softmax ignores the constant, and sigmoid is several times as fast as
    tanh. Tiles are float32 (or float64). Where q, k, v are bfloat16, the logits are still exact float32; only for the
    other matrix products, faster in bfloat16, is a tile rounded, into `low`.
    """

    TILE = 2**20  # numbers in a tile: 4 MiB of float32

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, softcap: float | None) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.softcap, scale = softcap, q.shape[-1] ** -0.5
        out = torch.empty(v.shape, dtype=v.dtype)
        for (q_, k_, v_, out_), (p,), low in TiledAttention.heads(q, k, v, out, tiles=1):
            if softcap is None:
                _matmul(q_.to(p.dtype), k_.to(p.dtype).mT, p, alpha=scale)
            else:
                _matmul(q_.to(p.dtype), k_.to(p.dtype).mT, p, alpha=2 * scale / softcap).sigmoid_().mul_(2 * softcap)
            torch.softmax(p, -1, out=p)
            _matmul(_narrow(p, low), v_, out_)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """The gradients of q, k and v, their probabilities computed again tile by tile."""
        inputs, softcap = ctx.saved_tensors, ctx.softcap
        scale = inputs[0].shape[-1] ** -0.5
        grads = [torch.empty(t.shape, dtype=t.dtype) for t in inputs]
        for (q, k, v, do, dq, dk, dv), (s, p, ds), low in TiledAttention.heads(*inputs, grad, *grads, tiles=3):
            if softcap is None:
                torch.softmax(_matmul(q.to(s.dtype), k.to(s.dtype).mT, s, alpha=scale), -1, out=p)
            else:
                _matmul(
                    q.to(s.dtype), k.to(s.dtype).mT, s, alpha=2 * scale / softcap
                ).sigmoid_()  # s = sigmoid(2x), x = q k^T scale / cap
                torch.softmax(torch.mul(s, 2 * softcap, out=p), -1, out=p)
            _matmul(_narrow(p, low).mT, do, dv)
            _matmul(do, v.mT, ds, low)  # the gradient of p, then of the logits, then (capped) of 2x / (2 cap)
            torch._softmax_backward_data(ds, p, -1, ds.dtype, grad_input=ds)
            if softcap is not None:
                torch.ops.aten.sigmoid_backward.grad_input(ds, s, grad_input=ds)
            ds, alpha = _narrow(ds, low), scale if softcap is None else 4 * scale
            _matmul(ds, k, dq, alpha=alpha)
            _matmul(ds.mT, q, dk, alpha=alpha)
        return *grads, None

    @staticmethod
    def heads(*tensors: Tensor, tiles: int) -> Iterator[tuple[tuple[Tensor, ...], list[Tensor], Tensor | None]]:
        """A few heads at a time: their parts of the tensors [B, H, T, d], the scratch tiles [n, T, T], and `low`."""
        (B, H, T, _), dtype = tensors[0].shape, tensors[0].dtype
        full = torch.promote_types(dtype, torch.float32)
        n = min(B * H, max(1, round(TiledAttention.TILE / T**2)))
        scratch = [torch.empty(n, T, T, dtype=full) for _ in range(tiles)]
        low = torch.empty(n, T, T, dtype=dtype) if dtype != full else None
        for parts in zip(*(t.flatten(0, 1).split(n) for t in tensors)):
            n = len(parts[0])
            yield parts, [tile[:n] for tile in scratch], None if low is None else low[:n]


def _matmul(a: Tensor, b: Tensor, out: Tensor, low: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    """out = alpha * a b, alpha at no cost; through `low` where out is more precise than a and b."""
    to = out if low is None else low
    return out.copy_(torch.baddbmm(to, a, b, beta=0, alpha=alpha, out=to))  # copy_ to itself does nothing


def _narrow(tile: Tensor, low: Tensor | None) -> Tensor:
    return tile if low is None else low.copy_(tile)


class Attention(nn.Module):
    """Multi-head self-attention with timm's names; the three families differ in their projections and positions."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        D, self.family = config.embed_dim, config.family
        self.num_heads, self.softcap = config.num_heads, config.softcap
        if self.family == "eva02":
            self.q_proj, self.k_proj, self.v_proj = nn.Linear(D, D), nn.Linear(D, D, bias=False), nn.Linear(D, D)
            self.norm = nn.LayerNorm(D, config.norm_eps)
        else:
            self.qkv = nn.Linear(D, 3 * D, bias=config.qkv_bias and self.family != "beit")
        if self.family == "beit":
            self.q_bias, self.v_bias = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))
            distances = (2 * config.grid - 1) ** 2 + 3
            self.relative_position_bias_table = nn.Parameter(torch.zeros(distances, config.num_heads))
        self.proj = nn.Linear(D, D)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        B, T, D = x.shape
        bias = None
        if self.family == "eva02":
            q, k, v = (
                f(x).view(B, T, self.num_heads, -1).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
            )
            q, k = rotate(q, positions), rotate(k, positions)
        else:
            if self.family == "beit":  # k has no bias; positions [T, T] holds rows of the table
                qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
                qkv = F.linear(x, self.qkv.weight, qkv_bias)
                bias = self.relative_position_bias_table[positions].permute(2, 0, 1)  # [H, T, T]
            else:
                qkv = self.qkv(x)
            q, k, v = qkv.view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # 3 x [B, H, T, d]
        x = attention(q, k, v, self.softcap, bias)  # [B, H, T, d]
        x = x.transpose(1, 2).reshape(B, T, D)
        return self.proj(self.norm(x) if self.family == "eva02" else x)


def rotary_positions(grid: int, head_dim: int, device: torch.device) -> Tensor:
    """EVA02's 2D rotary embedding: [2, N, d], sines and cosines, on the 16 x 16 grid it was trained on."""
    bands = 10000.0 ** -(torch.arange(head_dim // 4, device=device) / (head_dim // 4))
    place = torch.arange(grid, device=device) / grid * 16
    angle = place[:, None] * bands  # [grid, d / 4]
    angle = torch.cat([angle[:, None].expand(-1, grid, -1), angle[None].expand(grid, -1, -1)], -1)  # row, column
    angle = angle.reshape(grid * grid, -1).repeat_interleave(2, -1)  # [N, d]
    return torch.stack([angle.sin(), angle.cos()])


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Turn each pair of channels of the patch tokens of x [B, H, T, d] by its angle; prefix tokens stay."""
    sin, cos = positions.to(x.dtype)
    prefix, x = x[:, :, : -len(sin)], x[:, :, -len(sin) :]
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return torch.cat([prefix, x * cos + turned * sin], 2)


def relative_positions(grid: int, device: torch.device) -> Tensor:
    """BEiT: for each pair of tokens [T, T] the row of the bias table; last rows: from, to and at the class token."""
    place = torch.cartesian_prod(torch.arange(grid, device=device), torch.arange(grid, device=device))  # [N, 2]
    offset = place[:, None] - place[None] + grid - 1  # [N, N, 2], each 0 .. 2 grid - 2
    rows = (2 * grid - 1) ** 2
    index = offset.new_full((len(place) + 1, len(place) + 1), rows)
    index[1:, 1:] = offset[..., 0] * (2 * grid - 1) + offset[..., 1]
    index[:, 0], index[0, 0] = rows + 1, rows + 2
    return index


# ----------------------------------------------------------------------------------------------------------------------
# The model


def activation(name: str, x: Tensor) -> Tensor:
    """GELU, or OpenAI's QuickGELU x * sigmoid(1.702 x)."""
    return F.gelu(x) if name == "gelu" else F.silu(1.702 * x) / 1.702  # keeps one tensor for the backward pass, not two


class Mlp(nn.Module):
    """Two layers, D -> mlp_ratio * D -> D."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        hidden = int(config.embed_dim * config.mlp_ratio)
        self.act = config.act
        self.fc1, self.fc2 = nn.Linear(config.embed_dim, hidden), nn.Linear(hidden, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(activation(self.act, self.fc1(x)))


class SwiGLU(nn.Module):
    """EVA02's MLP: a gated hidden layer with a norm inside."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        D, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
        self.fc1_g, self.fc1_x = nn.Linear(D, hidden), nn.Linear(D, hidden)
        self.norm = nn.LayerNorm(hidden, config.norm_eps)
        self.fc2 = nn.Linear(hidden, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(F.silu(self.fc1_g(x)) * self.fc1_x(x)))


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch."""

    def __init__(self, dim: int, value: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))


class Block(nn.Module):
    """A pre-norm transformer block: x + attention, x + MLP, each branch scaled by LayerScale where there is one."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        D = config.embed_dim
        self.norm1, self.norm2 = nn.LayerNorm(D, config.norm_eps), nn.LayerNorm(D, config.norm_eps)
        self.attn = Attention(config)
        self.mlp = SwiGLU(config) if config.family == "eva02" else Mlp(config)
        if config.family == "beit":
            self.gamma_1 = nn.Parameter(torch.full((D,), config.layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((D,), config.layer_scale))
        elif config.layer_scale is not None:
            self.ls1, self.ls2 = LayerScale(D, config.layer_scale), LayerScale(D, config.layer_scale)

    def scales(self) -> tuple[Tensor | None, Tensor | None]:
        """LayerScale's two vectors [D], under whichever name the family keeps them."""
        if hasattr(self, "gamma_1"):
            return self.gamma_1, self.gamma_2
        return (self.ls1.gamma, self.ls2.gamma) if hasattr(self, "ls1") else (None, None)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        scale1, scale2 = self.scales()
        y = self.attn(self.norm1(x), positions)
        x = x + (y if scale1 is None else y * scale1)
        y = self.mlp(self.norm2(x))
        return x + (y if scale2 is None else y * scale2)


class PatchEmbed(nn.Module):
    """A linear layer on each patch, kept as the convolution that timm's files hold."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.size, self.grid = config.patch_size, config.grid
        self.proj = nn.Conv2d(3, config.embed_dim, self.size, self.size, bias=config.patch_bias)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """images [B, 3, H, W], mask [B * V, N] (the views of an image adjacent) -> [B * V, N, D].

        The embedding is linear before its bias, so W(image * mask) = (W image) * mask: each image is embedded once,
        however many views there are. Pixels beyond the last whole patch are in no patch, so never seen.
        """
        g, p, D = self.grid, self.size, self.proj.out_channels
        x = images[:, :, : g * p, : g * p].unflatten(3, (g, p)).unflatten(2, (g, p))  # [B, 3, g, p, g, p]
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(len(images), g * g, -1)  # [B, N, 3 p p]
        x = F.linear(x, self.proj.weight.flatten(1))  # [B, N, D]
        if mask is not None:
            x = (x[:, None] * mask.to(x.dtype).view(len(x), -1, g * g, 1)).view(-1, g * g, D)  # [B * V, N, D]
        return x if self.proj.bias is None else x + self.proj.bias


class ViT(nn.Module):
    """The vision transformer of a `ViTConfig`, randomly initialized; `load` gives one with weights."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        D, P, N = config.embed_dim, config.num_prefix, config.num_patches
        self.patch_embed = PatchEmbed(config)
        if config.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        if config.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, config.registers, D))
        if config.pos_embed != "none":
            self.pos_embed = nn.Parameter(torch.zeros(1, N + (P if config.pos_embed == "tokens" else 0), D))
        self.norm_pre = nn.LayerNorm(D, config.norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.Identity() if config.final_norm is None else nn.LayerNorm(D, config.final_norm)
        self.checkpointing = False  # True: keep only the input of each block for the backward pass, and recompute
        self.apply(init_weights)
        for name, parameter in self.named_parameters(recurse=False):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, images: Tensor, mask: Tensor | None = None, skip_blocks: int = 0, norm: bool = True) -> Tensor:
        """Tokens of images, prefix tokens first.

        images: [B, 3, H, W], normalized, H = W = config.image_size.
        mask: [B, N], or [B * V, N] with the views of an image adjacent; 1 = visible, a hidden patch is zero (the mean
            colour). None: all visible.
        skip_blocks: how many of the last blocks are not run. norm: whether the final norm is applied.
        Returns [B, P + N, D] ([B * V, P + N, D] with views).
        """
        if images.shape[2:] != (self.config.image_size, self.config.image_size):
            raise ValueError(
                f"images are {tuple(images.shape)}, the model reads {self.config.image_size} x {self.config.image_size}"
            )
        x = self.embed(images, mask)
        positions = self.positions(x.device)
        x = run_blocks(self.blocks[: self.config.depth - skip_blocks], x, positions, self.checkpointing)
        return self.norm(x) if norm else x

    def embed(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Patch embeddings, prefix tokens and positions: what enters the first block, [B, P + N, D]."""
        x = self.patch_embed(images, mask)
        B, D = len(x), self.config.embed_dim
        if self.config.pos_embed == "patches":
            x = x + self.pos_embed
        prefix = [self.cls_token.expand(B, -1, D)] if self.config.class_token else []
        prefix += [self.reg_token.expand(B, -1, D)] if self.config.registers else []
        x = torch.cat([*prefix, x], 1)
        return self.norm_pre(x + self.pos_embed if self.config.pos_embed == "tokens" else x)

    def positions(self, device: torch.device) -> Tensor | None:
        """What the blocks of EVA02 and BEiT need to know of positions; None for the plain family."""
        if self.config.family == "eva02":
            return rotary_positions(self.config.grid, self.config.embed_dim // self.config.num_heads, device)
        return relative_positions(self.config.grid, device) if self.config.family == "beit" else None


def run_blocks(
    blocks: Iterable[Block], x: Tensor, positions: Tensor | None = None, checkpointing: bool = False
) -> Tensor:
    """x [B, T, D] through the blocks; with `checkpointing` only each block's input is kept for the backward pass."""
    for block in blocks:
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, positions, use_reentrant=False)
        else:
            x = block(x, positions)
    return x


def round_linear_weights(model: nn.Module) -> None:
    """Keep a frozen model's linear layers in bfloat16. Autocast rounds them alike at every use: same result, half the
    memory, and the rounding is paid once."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 natively (AVX512-BF16 or AMX); elsewhere float32 is faster."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for reuse: on a CPU, fresh pages for each activation cost 5 to 10% of an update."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def init_weights(module: nn.Module) -> None:
    """Truncated normal of 0.02 for linear layers, zero for their biases (ViT's usual initialization)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ----------------------------------------------------------------------------------------------------------------------
# Preparing an image


def preprocess(image: Image.Image, config: ViTConfig, square: bool = False) -> Tensor:
    """A PIL image -> [3, H, W], normalized.

    Its shorter side is resized to image_size / crop_pct and the centre cropped; with `square` it is squeezed to the
    square, nothing cut off (the VLM's way).
    """
    return normalize(torch.from_numpy(np.array(fit(image, config, square))).permute(2, 0, 1), config)


def upright(image: Image.Image) -> Image.Image:
    """Any PIL image as RGB, turned as its EXIF data says. 16-bit greys are scaled to 8 bits; Pillow alone clips them."""
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata, which can fail in any way, does not make a picture unreadable
        pass
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")


def fit(image: Image.Image, config: ViTConfig, square: bool = False) -> Image.Image:
    """The resizing and cropping of `preprocess`: any PIL image -> RGB of the model's input size."""
    image, size = upright(image), config.image_size
    if square:
        return image.resize((size, size), Image.Resampling.BICUBIC)
    width, height = image.size
    shorter = int(size / config.crop_pct)
    width, height = (
        (shorter, int(shorter * height / width)) if width <= height else (int(shorter * width / height), shorter)
    )
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def normalize(images: Tensor, config: ViTConfig) -> Tensor:
    """uint8 [..., 3, H, W] -> float32, minus the mean, over the deviation."""
    mean, std = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (config.mean, config.std))
    return (images.float() / 255 - mean) / std


# ----------------------------------------------------------------------------------------------------------------------
# Loading, saving and converting weights

# A foreign layout: parts of our names -> parts of theirs, used in both directions; what is not listed is alike.
# `query|key|value` are three tensors there and one here, joined in this order.
_HF = {  # what ViT, BEiT and DINOv2 of transformers share
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "blocks": "encoder.layer",
    "attn.qkv": "attention.attention.query|key|value",
    "attn.proj": "attention.output.dense",
    "norm": "layernorm",
}
_HF_VIT = _HF | {
    "norm1": "layernorm_before", "norm2": "layernorm_after", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
}  # fmt: skip
LAYOUTS: dict[str, dict[str, str]] = {
    "timm": {},  # timm's names are ours
    "clip": {  # transformers' CLIP and SigLIP
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding.weight",
        "patch_embed.proj": "embeddings.patch_embedding",
        "blocks": "encoder.layers",
        "attn.qkv": "self_attn.q_proj|k_proj|v_proj",
        "attn.proj": "self_attn.out_proj",
        "norm1": "layer_norm1", "norm2": "layer_norm2", "norm_pre": "pre_layrnorm", "norm": "post_layernorm",
    },
    "dinov2": _HF | {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"},
    "beit": _HF_VIT | {
        "attn.q_bias": "attention.attention.query.bias",
        "attn.v_bias": "attention.attention.value.bias",
        "attn.relative_position_bias_table": "attention.attention.relative_position_bias.relative_position_bias_table",
        "gamma_1": "lambda_1", "gamma_2": "lambda_2",
    },
    "vit": _HF_VIT,
}  # fmt: skip
_MARKS = {  # a tensor that tells the layout: the first that a file has; what stands before it stands before every name
    "timm": "patch_embed.proj.weight",
    "clip": "embeddings.patch_embedding.weight",
    "dinov2": "encoder.layer.0.norm1.weight",
    "beit": "encoder.layer.0.lambda_1",
    "vit": "encoder.layer.0.layernorm_before.weight",
}
_LEFT_OUT = frozenset(  # parts of names that no token feature needs: heads, pooling, other towers, buffers
    "head fc_norm attn_pool pooler classifier decoder mask_token text_model visual_projection text_projection "
    "logit_scale logit_bias position_ids relative_position_index momentum_encoder predictor".split()
)


def foreign_names(name: str, layout: str) -> list[str]:
    """A parameter's name (three names for q, k, v) in a layout: blocks.3.gamma_1 -> [encoder.layer.3.lambda_1]."""
    for ours, theirs in LAYOUTS[layout].items():
        name = re.sub(rf"\b{ours}\b", theirs, name)
    joined = next((part for part in name.split(".") if "|" in part), name)
    return [name.replace(joined, part) for part in joined.split("|")]


class WeightFile:
    """A file's tensors by name, each read when it is asked for, so that no second copy of a large file is ever held."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        self.state: dict[str, Tensor] | None = None  # of a .pth file; where the format allows, mapped and not yet read
        try:
            if self.path.suffix == ".safetensors":
                with safe_open(self.path, "pt") as file:
                    self.names, self.metadata = list(file.keys()), file.metadata() or {}
            else:
                self.state = read_pth(self.path)
                self.names = list(self.state)
        except FileNotFoundError:
            raise WeightsError(f"{path}: no such file; give the path of a .safetensors or .pth file") from None
        except Exception as error:  # a damaged file can fail in any way
            found = re.search(r"GLOBAL (\S+)", str(error))  # torch.load names what a pickle would run
            reason = f"it holds {found[1]}, and of a pickle only tensors are read" if found else _first_line(error)
            raise WeightsError(f"{path}: cannot be read as weights ({reason}); download or convert it again") from None

    def __getitem__(self, name: str) -> Tensor:
        if self.state is not None:
            return self.state[name]
        with safe_open(self.path, "pt") as file:  # opened anew each time: closing it gives the mapped pages back
            return file.get_tensor(name)

    def wrong(self, reason: str) -> WeightsError:
        """The error for a file that is whole, but another model's."""
        return WeightsError(f"{self.path}: does not hold this backbone ({reason}); name the one that it holds")


def read_pth(path: Path) -> dict[str, Tensor]:
    """The state dict of a .pth or .pth.tar file. No code is run: tensors, containers and argparse's namespace pass."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        mappable = zipfile.is_zipfile(path)  # files from before torch 1.6 are not
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    if not isinstance(state, dict):
        raise ValueError("it holds no tensors by name")
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state.get(key), dict) else state
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0][:160] or type(error).__name__


def detect_layout(file: WeightFile) -> tuple[str, str]:
    """(layout, what stands before each name) of a file, by its tensors' names; `WeightsError` if it is none we know."""
    for layout, mark in _MARKS.items():
        for name in file.names:
            if name.endswith(mark) and _LEFT_OUT.isdisjoint(name.split(".")):
                return layout, name.removesuffix(mark)
    raise WeightsError(
        f"{file.path}: holds no vision transformer under names of timm, transformers, MoCo v3 or this project "
        f"(its first tensor is {next(iter(file.names), 'missing')}); give a file in one of these layouts"
    )


def load(path: str | Path, config: str | ViTConfig | None = None) -> ViT:
    """A backbone with the weights of a file, on the CPU, float32, in evaluation mode.

    path: a file of ours (an aligned model gives its encoder), or of timm, transformers (CLIP, SigLIP, DINOv2, ViT,
        BEiT), MoCo v3, or the MaskEmbed authors. Strict: what no token feature needs is left out, nothing else may be
        missing or left over.
    config: a name of BACKBONES or a ViTConfig; None for a file of ours, which carries its own. Of a config beside a
        file of ours, the image size counts (position embeddings are resampled), the rest must agree.
    Errors: WeightsError, which names the file and what is wrong with it.
    """
    if isinstance(config, str):
        if config not in BACKBONES:
            raise WeightsError(f"{config}: no such backbone; the known ones are {', '.join(BACKBONES)}")
        config = BACKBONES[config]
    file = WeightFile(path)
    with torch.device("meta"):  # no memory and no time for initial values that the file replaces
        model = ViT(config_for(file, config))
    model.to_empty(device="cpu")
    fill(model, file)
    return model.eval()


def config_for(file: WeightFile, config: ViTConfig | None) -> ViTConfig:
    """The config to build: the file's own where it carries one, else the one asked for."""
    if "config" in file.metadata:
        try:
            own = ViTConfig(**json.loads(file.metadata["config"]))
        except (TypeError, ValueError):
            raise WeightsError(f"{file.path}: its config is another version's; convert the weights again") from None
        if config is None:
            return own
        for key, value in asdict(own).items():  # alignment changes the final norm and the cap
            if key not in ("image_size", "final_norm", "softcap", "source") and value != getattr(config, key):
                raise file.wrong(f"its {key} is {value}, not {getattr(config, key)}")
        return replace(own, image_size=config.image_size)
    if config is None:
        raise WeightsError(f"{file.path}: does not say which backbone it holds; name one of {', '.join(BACKBONES)}")
    if file.state is not None and "encoder.patch_embed.proj.weight" in file.state:  # aligned by the MaskEmbed authors
        fresh = {"encoder.norm.weight", "encoder.head.weight"} <= file.state.keys()  # a new norm comes with the head
        final_norm = 1e-5 if fresh else config.final_norm
        return replace(config, final_norm=final_norm, softcap=30.0 if config.family == "vit" else None)
    return config


@torch.no_grad()
def fill(model: ViT, file: WeightFile) -> None:
    """Copy a file's tensors into a model's parameters, one at a time; `WeightsError` if they are not this model's."""
    config = model.config
    layout, prefix = detect_layout(file)
    sources = {name: [prefix + n for n in foreign_names(name, layout)] for name, _ in model.named_parameters()}
    wanted = set(sum(sources.values(), []))
    there = {name for name in file.names if _LEFT_OUT.isdisjoint(name.split("."))}
    if wanted != there:
        odd = min(wanted - there or there - wanted)
        raise file.wrong(f"tensor {odd} is missing" if odd in wanted else f"tensor {odd} has no place in it")
    for name, parameter in model.named_parameters():
        parts = [file[source].float() for source in sources[name]]
        value = torch.cat(parts) if len(parts) > 1 else parts[0]
        if name == "pos_embed":
            value = value.view(1, -1, value.shape[-1])
            if layout == "dinov2" and config.pos_embed == "patches":  # our class token, filled before, has its inside
                model.cls_token += value[:, :1]
                value = value[:, 1:]
            value = resample_positions(value, config.grid, parameter.shape[1] - config.num_patches)
        elif name.endswith("relative_position_bias_table"):
            value = resample_relative_bias(value, config.grid)
        if value.squeeze().shape != parameter.squeeze().shape:
            raise file.wrong(f"tensor {sources[name][0]} makes {list(value.shape)}, not {list(parameter.shape)}")
        parameter.copy_(value.view_as(parameter))


def resample_positions(value: Tensor, grid: int, prefix: int) -> Tensor:
    """Position embeddings [1, P + n^2, D] at another grid: bicubic, antialiased; those of the P prefix tokens stay."""
    side = math.isqrt(max(value.shape[1] - prefix, 0))
    if side in (0, grid) or prefix + side**2 != value.shape[1]:
        return value  # fits, or is none of this model's, as the caller will see
    patches = value[:, prefix:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [1, D, n, n]
    patches = F.interpolate(patches, (grid, grid), mode="bicubic", antialias=True)
    return torch.cat([value[:, :prefix], patches.flatten(2).transpose(1, 2)], 1)


def resample_relative_bias(table: Tensor, grid: int) -> Tensor:
    """BEiT's bias table [(2n - 1)^2 + 3, H] at another grid, as its authors and timm do it.

    The old offsets 0, 1, 2, 3 are set at 0, 1, 1 + q, 1 + q + q^2, with q such that the last reaches the new last one:
    biases of near patches stay, those of far ones are spread out; linear in between. The class token's rows stay.
    """
    old, new = math.isqrt(max(len(table) - 3, 0)), 2 * grid - 1
    if old in (0, new) or old**2 + 3 != len(table):
        return table
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q ** (old // 2)) / (1 - q) > new // 2 else (q, high)
    places = np.cumsum(q ** np.arange(old // 2))
    places = np.concatenate([-places[::-1], [0], places])
    targets = np.arange(-(new // 2), new // 2 + 1)
    weights = np.stack([np.interp(targets, places, row) for row in np.eye(old)])  # [old, new]
    weights = torch.from_numpy(weights).to(table.dtype)
    square = torch.einsum("abh,ai,bj->ijh", table[:-3].view(old, old, -1), weights, weights)
    return torch.cat([square.flatten(0, 1), table[-3:]])


def save(model: ViT, path: str | Path) -> None:
    """Write a backbone with its config; the file appears whole or not at all (`OSError`)."""
    save_tensors(model.state_dict(), path, {"config": json.dumps(asdict(model.config))})


def save_tensors(state: dict[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """A safetensors file, written under a temporary name and then moved into place."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path}: is no name for a weight file; let it end in .safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask wants; safetensors would let no one but the owner read
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, temporary, {"format": "pt"} | metadata)
        temporary.chmod(mode)
        temporary.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({_first_line(error)})") from None
    finally:
        temporary.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# The command: convert, export, info


def export(model: ViT, path: str | Path, layout: str) -> list[str]:
    """Write a backbone for other people's code; returns what is to be known when it is used there, a sentence each.

    layout "timm": one safetensors file for timm.create_model(..., num_classes=0).load_state_dict(strict=True).
    layout "transformers": a folder with config.json and model.safetensors for from_pretrained.
    """
    config, state, notes = model.config, model.state_dict(), []
    if config.softcap is not None:
        notes.append(f"The soft-cap of {config.softcap:g} is lost: {layout} has none, so large logits change.")
    if config.final_norm not in (None, config.norm_eps):
        notes.append(f"Set the final norm's eps to {config.final_norm:g}: {layout} gives it {config.norm_eps:g}.")
    if layout == "timm":
        if config.family == "beit" and config.final_norm is None:
            state |= _unit_norm("fc_norm", config)
        elif config.family == "beit" or not config.class_token:
            notes.append("Create timm's model with global_pool='': a final norm and no pooling.")
        save_tensors(state, path, {})
    else:
        state, description = to_transformers(model)
        if description["model_type"] == "vit":
            notes.append("Load it with add_pooling_layer=False: there are no weights for a pooling layer.")
        save_tensors(state, Path(path) / "model.safetensors", {})
        (Path(path) / "config.json").write_text(json.dumps(description, indent=2))
    return notes


def to_transformers(model: ViT) -> tuple[dict[str, Tensor], dict[str, object]]:
    """A backbone's tensors under transformers' names, and its config.json."""
    c = model.config
    if c.family == "eva02":
        raise WeightsError("transformers has no EVA02; use --layout timm")
    beit = dict(use_relative_position_bias=True, use_mean_pooling=c.final_norm is None)
    dinov2 = dict(mlp_ratio=int(c.mlp_ratio))
    kinds = (  # the first that applies: layout, model_type, what its config needs beside the common
        (c.family == "beit", "beit", "beit", beit),
        (c.registers, "dinov2", "dinov2_with_registers", dinov2 | dict(num_register_tokens=c.registers)),
        (c.layer_scale, "dinov2", "dinov2", dinov2),
        (c.pre_norm, "clip", "clip_vision_model", {}),
        (not c.class_token, "clip", "siglip_vision_model", dict(vision_use_head=False)),
        (True, "vit", "vit", {}),
    )
    layout, model_type, extra = next(kind[1:] for kind in kinds if kind[0])
    description = dict(
        model_type=model_type, image_size=c.image_size, patch_size=c.patch_size, hidden_size=c.embed_dim,
        num_hidden_layers=c.depth, num_attention_heads=c.num_heads, intermediate_size=int(c.embed_dim * c.mlp_ratio),
        hidden_act=c.act, layer_norm_eps=c.norm_eps, torch_dtype="float32", **extra,
    )  # fmt: skip
    state = {}
    for name, value in model.state_dict().items():
        names = foreign_names(name, layout)
        state.update(zip(names, value.chunk(len(names))))
    zero = torch.zeros(1, 1, c.embed_dim)
    if layout == "clip":  # no batch axis on class token and positions
        state = {f"vision_model.{name}": value.squeeze() for name, value in state.items()}
    elif layout == "dinov2":
        state["embeddings.mask_token"] = zero[0]
        if c.pos_embed == "patches":  # theirs has an entry for the class token, ours has it in the class token
            state["embeddings.position_embeddings"] = torch.cat([zero, model.pos_embed.detach()], 1)
    elif layout == "beit" and c.final_norm is None:
        state |= _unit_norm("pooler.layernorm", c)
    return state, description


def _unit_norm(name: str, config: ViTConfig) -> dict[str, Tensor]:
    """The norm behind BEiT's pooling, which both libraries want and no token passes."""
    return {f"{name}.weight": torch.ones(config.embed_dim), f"{name}.bias": torch.zeros(config.embed_dim)}


def describe(path: str | Path) -> str:
    """What `info` prints: layout, size, metadata."""
    file = WeightFile(path)
    layout, prefix = detect_layout(file)
    count = sum(file[name].numel() for name in file.names)
    lines = [f"{path}: {len(file.names)} tensors, {count:,} numbers, layout {layout}" + (prefix and f" after {prefix}")]
    known = file.metadata | (asdict(config_for(file, None)) if "config" in file.metadata else {})
    return "\n".join(lines + [f"  {key}: {value}" for key, value in known.items() if key not in ("config", "format")])


def main(argv: list[str] | None = None) -> None:
    """The command; its help is `python vit.py --help`."""
    parser = argparse.ArgumentParser(description="Convert, export and inspect backbone files.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("convert", help="any layout -> a file of ours")
    command.add_argument("name", choices=BACKBONES, metavar="NAME", help=", ".join(BACKBONES))
    command.add_argument("source", help="file of timm, transformers, MoCo v3 or the MaskEmbed authors")
    command.add_argument("target", help="the file to write, .safetensors")
    command = commands.add_parser("export", help="a file of ours, also an aligned one -> timm's or transformers'")
    command.add_argument("file", help="file of ours")
    command.add_argument("target", help="timm: the file to write, .safetensors; transformers: a folder")
    command.add_argument("--layout", choices=("timm", "transformers"), required=True)
    command = commands.add_parser("info", help="what a file holds")
    command.add_argument("file")
    args = parser.parse_args(argv)
    try:
        if args.command == "convert":
            name, target = args.name, args.target
            save(load(args.source, name), target)
            print(f"{target}: {name}. Next: python train_align.py --recipe {name} --weights {target} --data DIR")
        elif args.command == "export":
            for note in export(load(args.file), args.target, args.layout):
                print(f"Note: {note}")
            print(f"{args.target}: written in {args.layout}'s layout")
        else:
            print(describe(args.file))
    except (WeightsError, OSError) as error:
        sys.exit(f"vit.py: {error}")


if __name__ == "__main__":
    main()
