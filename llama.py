"""Llama 2: the model, its tokenizer, its cache, text generation, and its weights in both layouts.

7B, 13B, 70B and any other size. Parameter names are transformers', so files travel both ways; Meta's own are read and
written too. The file needs torch, safetensors and sentencepiece, and nothing else of this project: copy it.

    model, tokenizer = llama.load("Llama-2-7b-hf", torch.bfloat16), llama.Tokenizer("Llama-2-7b-hf")
    ids, mask = tokenizer.pad([tokenizer.encode(text, bos=True) for text in texts])
    answers = [tokenizer.decode(answer) for answer in model.generate(ids, mask=mask)]

    python llama.py convert llama-2-7b/ Llama-2-7b-hf/       # Meta's layout -> transformers', or the other way round

Shapes: B batch, T new tokens, S places in the cache, D width, H heads, K heads of keys and values, d = D / H, W words.
"""

import argparse
import json
import math
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # a label that is none
CHUNK = 1024  # labels whose logits exist at one time: 131 MB of them at 32,000 words
SHARD = 5_000_000_000  # bytes of a file of weights, at most, as transformers' own are split


class LlamaError(ValueError):
    """Input, a file or a folder that cannot be used as asked; one sentence says why and what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a model, named as in transformers' config.json. JSON-serializable with `asdict`."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # fewer than the heads: grouped queries; None: as many
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False  # the output layer is the word embedding (small models from scratch)

    def __post_init__(self) -> None:
        optional = {"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False}
        for name, value in asdict(self).items():
            if not (isinstance(value, (int, float)) and value > 0 or name in optional and value is optional[name]):
                raise LlamaError(f"{name} is {value!r}; it must be a positive number")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise LlamaError(f"hidden_size {self.hidden_size} is no multiple of the {self.num_attention_heads} heads")
        if self.num_attention_heads % self.kv_heads:
            raise LlamaError(f"{self.num_attention_heads} heads cannot share {self.kv_heads} heads of keys evenly")
        if self.head_size % 2:
            raise LlamaError(f"heads of {self.head_size} channels cannot be rotated in pairs; make it an even number")

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """d."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @classmethod
    def from_transformers(cls, values: dict, file: str | Path = "config.json") -> "LlamaConfig":
        """From the contents of a config.json of transformers, old or new; `LlamaError` where it is no plain Llama."""
        ropes = [values.get(key) or {} for key in ("rope_scaling", "rope_parameters")]  # the old key and the new one
        kinds = [rope.get("rope_type", rope.get("type", "default")) for rope in ropes]
        traits = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
        found = {key: values.get(key, plain) for key, plain in traits.items()}
        found["rope_type"] = next((kind for kind in kinds if kind != "default"), "default")
        for key, plain in (traits | {"rope_type": "default"}).items():
            if found[key] != plain:
                raise LlamaError(f"{file}: its {key} is {found[key]!r}; this model has {plain!r} and nothing else")
        theta = ropes[1].get("rope_theta", values.get("rope_theta", 10000.0))
        defaults = dict(rms_norm_eps=1e-6, max_position_embeddings=2048)  # where transformers' differ from ours
        known = {key: values[key] for key in cls.__dataclass_fields__ if key in values}
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if key not in known:
                raise LlamaError(f"{file}: has no {key}; give the config.json that came with the weights")
        return cls(**defaults | known | {"rope_theta": theta})

    def to_transformers(self, dtype: torch.dtype = torch.float32) -> dict[str, object]:
        """The contents of a config.json that every version of transformers reads."""
        values = asdict(self) | dict(num_key_value_heads=self.kv_heads, head_dim=self.head_size)
        name = str(dtype).removeprefix("torch.")
        return values | dict(
            architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", attention_bias=False,
            mlp_bias=False, bos_token_id=1, eos_token_id=2, dtype=name, torch_dtype=name,
            rope_parameters=dict(rope_type="default", rope_theta=self.rope_theta),
        )  # fmt: skip

    def to_meta(self) -> dict[str, object]:
        """The contents of Meta's params.json. `LlamaError` for a shape that Meta's code does not know."""
        if self.head_size * self.num_attention_heads != self.hidden_size:
            raise LlamaError("Meta's layout has heads of hidden_size / heads channels only; keep transformers' layout")
        values = dict(
            dim=self.hidden_size, n_layers=self.num_hidden_layers, n_heads=self.num_attention_heads,
            n_kv_heads=self.kv_heads, norm_eps=self.rms_norm_eps, vocab_size=self.vocab_size, multiple_of=256,
        )  # fmt: skip
        usual, size = 8 * self.hidden_size // 3, self.intermediate_size  # Meta: 8/3 of the width, rounded up
        if -(-usual // 256) * 256 != size:
            values["multiple_of"] = size  # rounds up to exactly this, once the number before is no larger
            values |= dict(ffn_dim_multiplier=(size + 0.5) / usual) if usual > size else {}
        return values | (dict(rope_theta=self.rope_theta) if self.rope_theta != 10000.0 else {})


LLAMAS: dict[str, LlamaConfig] = {
    "llama2-7b": LlamaConfig(),
    "llama2-13b": LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
    "llama2-70b": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    ),
}


# ----------------------------------------------------------------------------------------------------------------------
# Layers


class Cache:
    """Keys and values of the tokens read so far: S places for each of B sequences, allocated once.

    k, v: a tensor [B, K, S, d] for each layer. mask: [B, S], which places hold tokens (padding takes a place, too).
    place: [1], the next free place, on the device, so that a compiled step does not depend on a number of Python's;
    used: the same for Python.
    """

    def __init__(
        self, config: LlamaConfig, batch: int, size: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ):
        self.config, self.size, self.used = config, size, 0
        shape = (batch, config.kv_heads, size, config.head_size)  # zeros: what is masked must still be finite
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.mask = torch.zeros(batch, size, dtype=torch.bool, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        if self.place.is_cuda and "torch._dynamo" in sys.modules:  # a compiled step, as a CUDA graph, writes where they lie
            for tensor in (*self.k, *self.v, self.mask, self.place):
                torch._dynamo.mark_static_address(tensor, guard=False)

    def reserve(self, tokens: int) -> None:
        """Take the next places. `LlamaError` if there are not so many left."""
        if self.used + tokens > self.size:
            raise LlamaError(
                f"{tokens} tokens more do not fit: {self.used} of {self.size} places are taken; make a larger cache"
            )
        self.used += tokens

    def take(self, rows: Tensor, size: int) -> "Cache":
        """A new cache of `size` places for sequences [B'] that each go on from one of these: `rows`, [B'], says from which."""
        new = Cache(self.config, len(rows), size, self.k[0].dtype, self.place.device)
        new.reserve(self.used)
        new.place += self.used
        for ours, theirs in zip((*new.k, *new.v), (*self.k, *self.v)):
            ours[:, :, : self.used] = theirs[rows, :, : self.used]
        new.mask[:, : self.used] = self.mask[rows, : self.used]
        return new


@dataclass
class Shared:
    """What all layers of one pass use, computed once. (An object, since FSDP rounds tensors among a layer's arguments,
    as the cosines would be, to bfloat16.)"""

    cos: Tensor  # [B or 1, T, 1, d], float32
    sin: Tensor
    mask: Tensor | None  # [B, 1, T, T or S], 0 or -inf; None: causal
    cache: Cache | None
    places: Tensor  # [T], where in the cache the new keys and values go
    fresh: bool  # nothing was in the cache before: attention needs to look at the new tokens only


def rope_tables(positions: Tensor, config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """What `rotate` needs for positions [B, T]: cosines, and sines with their signs, [B, T, 1, d] each, float32."""
    d = config.head_size
    bands = config.rope_theta ** -(torch.arange(0, d, 2, device=positions.device, dtype=torch.float32) / d)
    angles = positions[:, :, None, None].float() * bands  # [B, T, 1, d / 2]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, T, H, d]: channels i and i + d / 2 are a pair, turned in float32 by their angle."""
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention, causal without a mask. q [B, H, T, d], k and v [B, K, S, d], mask [B, 1, T, S] -> [B, H, T, d]."""
    (B, H, T, d), K = q.shape, k.shape[1]
    if mask is None and H == K and T <= 512 and q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # the plain formula: backwards the CPU's kernel for bfloat16 is so slow that it takes two to three times as long
        ahead = torch.full((T, T), -math.inf, dtype=q.dtype).triu_(1)
        logits = torch.baddbmm(ahead, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=d**-0.5)  # [B H, T, T]
        return (logits.softmax(-1).to(v.dtype) @ v.flatten(0, 1)).view(B, H, T, d)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != K)
    if T == 1:  # the plain formula: kernels are made for many queries; a group of heads is so many queries of one head
        logits = mask.add((q.reshape(B, K, H // K, d) @ k.mT).float(), alpha=d**-0.5)  # [B, K, H / K, S]
        return (logits.softmax(-1).to(v.dtype) @ v).view(B, H, 1, d)
    mask = mask.to(q.dtype)
    if H != K:  # no fast kernel has both a mask and groups
        k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
    return F.scaled_dot_product_attention(q, k, v, mask)


def lean(function: Callable[..., Tensor], *inputs: object) -> Tensor:
    """function(*inputs), of which only the inputs are kept for the backward pass, and the rest is computed again. That
    stops short of a last matrix product, whose result it does not need: only what is cheap is computed twice."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def project(x: Tensor, norm: RMSNorm, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """layer(norm(x)) for each layer: x [B, T, D] -> [B, T, ...] each."""
    if isinstance(layers[0], Packed):
        return layers[0](norm(x)).split(layers[0].sizes, -1)
    if torch.is_grad_enabled():
        return Projection.apply(x, norm.weight, norm.eps, *(layer.weight for layer in layers))
    x = norm(x)
    return tuple(layer(x) for layer in layers)


class Packed(nn.Module):
    """Linear layers of one input in one matrix, in the blocked layout of oneDNN, which a few rows pass fastest. CPU."""

    def __init__(self, *layers: nn.Linear):
        super().__init__()
        self.sizes = [layer.out_features for layer in layers]
        weight = torch.cat([layer.weight.detach() for layer in layers])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 32)  # made for about so many rows

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


class Projection(torch.autograd.Function):
    """The same for training: for the backward pass it keeps x alone, which is there anyway, not the norm of it."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, eps: float, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, scale, *weights)
        ctx.eps = eps
        x = F.rms_norm(x, scale.shape, scale, eps)
        return tuple(F.linear(x, weight) for weight in weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, the norm's scale and the weights; the normed x is computed again."""
        x, scale, *weights = ctx.saved_tensors
        low, full = grads[0].dtype, torch.promote_types(x.dtype, torch.float32)  # autocast: x may be float32, grads not
        inverse = (x.to(full).square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        normed = x.to(full) * inverse
        y, grads = (normed * scale).to(low).flatten(0, -2), [grad.flatten(0, -2) for grad in grads]
        needed = ctx.needs_input_grad[3:]
        of_weights = [(g.T @ y).to(w.dtype) if need else None for g, w, need in zip(grads, weights, needed)]
        of_y = grads[0] @ weights[0].to(low)
        for grad, weight in zip(grads[1:], weights[1:]):
            of_y = torch.addmm(of_y, grad, weight.to(low))
        of_y = of_y.view_as(x).to(full)
        of_scale = (of_y * normed).flatten(0, -2).sum(0).to(scale.dtype)
        of_y = of_y * scale
        of_x = inverse * (of_y - normed * (of_y * normed).mean(-1, keepdim=True))
        return of_x.to(x.dtype), of_scale, None, *of_weights


class Attention(nn.Module):
    """Causal self-attention with rotary positions and, where there are fewer heads of keys than of queries, groups."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, H, K, self.d = config.hidden_size, config.num_attention_heads, config.kv_heads, config.head_size
        self.q_proj, self.o_proj = nn.Linear(D, H * self.d, bias=False), nn.Linear(H * self.d, D, bias=False)
        self.k_proj, self.v_proj = nn.Linear(D, K * self.d, bias=False), nn.Linear(D, K * self.d, bias=False)

    def forward(self, x: Tensor, norm: RMSNorm, shared: Shared, layer: int) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, -1, self.d) for y in project(x, norm, self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, shared.cos, shared.sin), rotate(k, shared.cos, shared.sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, T, d], [B, K, T, d] twice
        if (cache := shared.cache) is not None:
            cache.k[layer].index_copy_(2, shared.places, k.to(cache.k[layer].dtype))
            cache.v[layer].index_copy_(2, shared.places, v.to(cache.v[layer].dtype))
            if not shared.fresh:
                k, v = (t[layer][:, :, : shared.mask.shape[-1]] for t in (cache.k, cache.v))  # [B, K, S, d]
        x = attend(q, k, v, shared.mask)  # [B, H, T, d]
        return self.o_proj(x.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: D -> intermediate_size -> D."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = nn.Linear(D, hidden, bias=False), nn.Linear(D, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, D, bias=False)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        return lean(self.down, *project(x, norm, self.gate_proj, self.up_proj))

    def down(self, gate: Tensor, up: Tensor) -> Tensor:
        """What follows the first two products, [B, T, intermediate_size] twice -> [B, T, D]."""
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, shared: Shared, layer: int) -> Tensor:
        x = x + self.self_attn(x, self.input_layernorm, shared, layer)
        return x + self.mlp(x, self.post_attention_layernorm)


# ----------------------------------------------------------------------------------------------------------------------
# The model


class Llama(nn.Module):
    """The language model of a `LlamaConfig`, randomly initialized; `load` gives one with weights.

    checkpointing: set it to True to keep only each layer's input for the backward pass, and compute the rest again.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config, self.checkpointing = config, False
        self.model = nn.ModuleDict(
            dict(
                embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
                layers=nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers)),
                norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
            )
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def tie(self) -> None:
        """Make the output layer and the word embedding one parameter, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def embed(self, ids: Tensor | None = None, embeds: Tensor | None = None) -> Tensor:
        """Word embeddings of ids [B, T], or, given those, embeds -> [B, T, D]. LlamaError: both or neither."""
        if (ids is None) == (embeds is None):
            raise LlamaError("give either ids or embeds")
        return self.model.embed_tokens(ids) if embeds is None else embeds

    def head(self, x: Tensor) -> Tensor:
        """Final norm and output layer: [..., D] -> logits [..., W]."""
        return self.lm_head(self.model.norm(x))

    def forward(
        self, ids: Tensor | None = None, embeds: Tensor | None = None, mask: Tensor | None = None,
        cache: Cache | None = None, positions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits of the next word after each token, or after some.

        ids [B, T] or embeds [B, T, D]: the tokens, one or the other.
        mask: [B, T], 1 = token, 0 = padding, on either side; None: no padding. On the right it needs no mask, since no
            token looks ahead, unless a cache is filled.
        cache: what was read before; the new tokens are added to it.
        positions: [B, n], the places among the T tokens whose logits are wanted, n in each sequence; None: all T.
        Returns [B, n, W] (those of padding mean nothing). LlamaError: both or neither of ids and embeds, another mask's
        shape, more tokens than the context or the cache has room for.
        """
        x = self.hidden(self.embed(ids, embeds), mask, cache)
        if positions is not None:
            x = x[torch.arange(len(x), device=x.device)[:, None], positions]
        return self.head(x)

    def hidden(self, x: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Embeddings [B, T, D] through all layers -> [B, T, D], the final norm not yet applied. See `forward`."""
        B, T, _ = x.shape
        if mask is not None and mask.shape != (B, T):
            raise LlamaError(f"the mask is {list(mask.shape)}, the tokens are {[B, T]}; give one number for each token")
        fresh, total = cache is None or cache.used == 0, T + (cache.used if cache else 0)
        if total > self.config.max_position_embeddings:
            raise LlamaError(
                f"{total} tokens exceed the context of {self.config.max_position_embeddings}; shorten the text"
            )
        right = mask is None or bool((mask[:, 1:] <= mask[:, :-1]).all())  # padding, if any, comes after all tokens
        if cache is not None:
            cache.reserve(T)
        return self.run(x, self.share(x, mask, cache, fresh, causal=fresh and right))

    def decode(self, ids: Tensor, cache: Cache) -> Tensor:
        """One more token of each sequence: ids [B, 1] -> logits [B, W]. The caller has reserved its place.

        Nothing in it depends on how full the cache is, shapes least of all. To have it compiled once for all steps:
        `model.decode = torch.compile(model.decode)`, on a GPU with mode="reduce-overhead" as a CUDA graph, which is recorded
        anew in each `generate`, whose cache is a new one.
        """
        x = self.embed(ids)
        return self.head(self.run(x, self.share(x, None, cache, fresh=False, causal=False)))[:, 0]

    def run(self, x: Tensor, shared: Shared) -> Tensor:
        """x [B, T, D] through the layers."""
        for i, layer in enumerate(self.model.layers):
            x = lean(layer, x, shared, i) if self.checkpointing else layer(x, shared, i)
        return x

    def share(self, x: Tensor, mask: Tensor | None, cache: Cache | None, fresh: bool, causal: bool) -> Shared:
        """Positions, attention mask and places in the cache of new tokens x [B, T, D].

        A token's position is the number of tokens before it: padding does not count. A token sees the tokens up to
        itself; padding sees itself as well, only so that its values stay finite.
        """
        (B, T, _), device = x.shape, x.device
        places = torch.arange(T, device=device)
        real = None if mask is None else mask.bool()
        positions = places[None] if real is None else (real.cumsum(1) - 1).clamp(min=0)  # [B or 1, T]
        if cache is not None:
            positions = positions + cache.mask.sum(1, keepdim=True)  # [B, T]
            places = places + cache.place
            there = torch.ones(B, T, dtype=torch.bool, device=device) if real is None else real
            cache.mask.index_copy_(1, places, there)
            cache.place += T
        cos, sin = rope_tables(positions, self.config)
        bias = None
        if not causal:
            if not fresh:  # the used places, or, where shapes must not change, all
                used = cache.size if torch.compiler.is_compiling() else cache.used
                real = cache.mask[:, :used]
            keys = torch.arange(real.shape[1], device=device)
            seen = real[:, None] & (keys <= places[:, None]) | (keys == places[:, None])  # [B, T, T or S]
            bias = torch.zeros(seen.shape, dtype=x.dtype, device=device).masked_fill_(~seen, -math.inf)[:, None]
        return Shared(cos, sin, bias, cache, places, fresh)

    def loss(self, embeds: Tensor, labels: Tensor, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """Cross-entropy of the labels, with the output layer computed only where there is one, a few at a time.

        embeds: [B, T, D]. labels: [B, T], the ids of the tokens themselves (each is predicted from those before it),
        -100 where none is to be learned. mask: as in `forward`; none is needed for padding on the right.
        reduction: "mean" over the labels or "sum". Returns a scalar, float32; 0 where there is no label.
        """
        if labels.shape != embeds.shape[:2]:
            raise LlamaError(
                f"the labels are {list(labels.shape)}, the tokens {list(embeds.shape[:2])}; give one for each"
            )
        wanted = labels[:, 1:] != IGNORE
        x, labels = self.hidden(embeds, mask)[:, :-1][wanted], labels[:, 1:][wanted]  # [n, D], [n]
        total = x.new_zeros((), dtype=torch.float32)
        for part, answers in zip(x.split(CHUNK), labels.split(CHUNK)):  # logits [1024, W], gone before the next ones
            total = total + lean(self.loss_of, part, answers)
        return total / max(1, len(labels)) if reduction == "mean" else total

    def loss_of(self, x: Tensor, labels: Tensor) -> Tensor:
        """The summed cross-entropy of labels [n] after the tokens x [n, D]."""
        return F.cross_entropy(self.head(x).float(), labels, reduction="sum")

    # Text

    @torch.no_grad()
    def stream(
        self, ids: Tensor | None = None, embeds: Tensor | None = None, mask: Tensor | None = None,
        max_new_tokens: int = 256, temperature: float = 0.0, generator: torch.Generator | None = None,
        stop: int | None = 2, prefix: tuple[Cache, Tensor] | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Continue B prompts (see `forward`; pad them on the left): yields ids [B], one of each sequence at a time.

        prefix: what was read before, once for prompts that share it: a cache, and which of its sequences each of the
            prompts goes on from, [B]. The cache stays as it is.
        temperature: 0 takes the most likely word; else words are drawn from softmax(logits / temperature).
        stop: the id that ends a sequence (</s>), and goes on filling it; all ended: the end. None: never.
        max_new_tokens: at most so many, and never more than the context has room for.
        LlamaError: a prompt as long as the context, no token asked for.
        """
        x = self.embed(ids, embeds)
        (B, T, _), device = x.shape, x.device
        context, total = self.config.max_position_embeddings, T + (prefix[0].used if prefix else 0)
        n = min(max_new_tokens, context - total)
        if total >= context:
            raise LlamaError(f"a prompt of {total} tokens leaves no room in the context of {context}; shorten it")
        if n < 1:
            raise LlamaError(f"max_new_tokens is {max_new_tokens}; ask for at least one")
        size = math.ceil((total + n) / 64) * 64  # few different sizes, for a compiled step
        if prefix:
            cache = prefix[0].take(prefix[1], size)
        else:
            cache = Cache(self.config, B, size, self.model.embed_tokens.weight.dtype, device)
        last = torch.full((B, 1), T - 1, device=device)
        if mask is not None:
            last = (mask.bool() * torch.arange(T, device=device)).amax(1, keepdim=True)
        logits = self(embeds=x, mask=mask, cache=cache, positions=last)[:, 0]  # [B, W]
        done = torch.zeros(B, dtype=torch.bool, device=device)
        while True:
            token = choose(logits, temperature, generator)
            if stop is not None:
                token = token.masked_fill(done, stop)
                done = token == stop
            yield token
            n -= 1
            if n == 0 or stop is not None and done.all():
                return
            cache.reserve(1)
            logits = self.decode(token[:, None], cache)

    def generate(self, *args: Tensor, stop: int | None = 2, **options: object) -> list[list[int]]:
        """The ids that continue each of the B prompts, without the `stop` that ends them. Arguments: see `stream`."""
        steps = [token.tolist() for token in self.stream(*args, stop=stop, **options)]
        texts = [list(text) for text in zip(*steps)]
        return [text[: text.index(stop)] if stop in text else text for text in texts]


def pack(model: Llama) -> Llama:
    """Make a model on the CPU generate faster: float32, or bfloat16 where the processor has that.

    Afterwards it can be neither trained nor saved, moved or compiled. Layers are replaced one after the other, so that
    there is no second copy of the weights. Returns the model.
    LlamaError: it is on another device, or packed already.
    """
    if isinstance(model.lm_head, Packed) or model.lm_head.weight.device.type != "cpu":
        raise LlamaError("only a model on the CPU can be packed, and only once")
    for layer in model.model.layers:
        a, m = layer.self_attn, layer.mlp
        a.q_proj = a.k_proj = a.v_proj = Packed(a.q_proj, a.k_proj, a.v_proj)
        m.gate_proj = m.up_proj = Packed(m.gate_proj, m.up_proj)
        a.o_proj, m.down_proj = Packed(a.o_proj), Packed(m.down_proj)
    model.lm_head = Packed(model.lm_head)
    return model


def choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """The next word: the most likely one, or one drawn at a temperature. logits [B, W] -> [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / noise).argmax(-1)  # a draw, as torch.multinomial does it, without waiting for the device


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer


class Tokenizer:
    """Llama's tokenizer: a sentencepiece model, and the special ids around a text.

    sentencepiece itself puts the space before the first word, keeps every space, and spells what it has no piece for,
    new lines among it, in bytes. A text that reads "</s>" is five characters, never the special token.
    """

    def __init__(self, path: str | Path, vocab_size: int | None = None):
        """path: tokenizer.model or the folder with it. vocab_size: the model's, to be checked against.

        LlamaError: no such file, no sentencepiece model, no <s> or </s> in it, a vocabulary of another size.
        """
        path = Path(path) / "tokenizer.model" if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise LlamaError(f"{path}: no such file; give the tokenizer.model that came with the weights")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise LlamaError(f"{path}: is no sentencepiece model; give the weights' own tokenizer.model") from None
        self.vocab_size, self.bos, self.eos = self.pieces.vocab_size(), self.pieces.bos_id(), self.pieces.eos_id()
        if min(self.bos, self.eos) < 0:
            raise LlamaError(f"{path}: has no <s> or no </s>; give a tokenizer trained for Llama")
        if vocab_size not in (None, self.vocab_size):
            raise LlamaError(
                f"{path}: has {self.vocab_size} words, the model {vocab_size}; give the weights' own tokenizer.model"
            )

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of a text, with <s> before and </s> behind where asked for."""
        return [self.bos] * bos + self.pieces.encode(text) + [self.eos] * eos

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special ones left out, without the space before the first word."""
        return self.pieces.decode([i for i in ids if i >= 0 and not self.pieces.is_control(i)])

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they come, in pieces; a character of several bytes comes when it is whole."""
        so_far, shown = [], 0
        for i in ids:
            so_far.append(i)
            text = self.decode(so_far)
            if not text.endswith("\ufffd"):
                yield text[shown:]
                shown = len(text)
        if text := self.decode(so_far)[shown:]:
            yield text

    @staticmethod
    def pad(texts: Sequence[Sequence[int]], left: bool = True) -> tuple[Tensor, Tensor]:
        """Lists of ids -> ids [B, T] and mask [B, T], 1 = token. Left for generation, right for training. (Llama has no
        padding token: id 0 stands there, and the mask hides it.)"""
        T = max(map(len, texts), default=0)
        ids, mask = torch.zeros(len(texts), T, dtype=torch.long), torch.zeros(len(texts), T, dtype=torch.long)
        for row, text in enumerate(texts):
            place = slice(T - len(text), T) if left else slice(0, len(text))
            ids[row, place], mask[row, place] = torch.tensor(text, dtype=torch.long), 1
        return ids, mask


# ----------------------------------------------------------------------------------------------------------------------
# Loading, saving and converting weights

# The last part of our names (transformers'): Meta's, and the dimension that its shards split (None: each has it whole).
META: dict[str, tuple[str, int | None]] = {
    "embed_tokens": ("tok_embeddings", 1),
    "q_proj": ("attention.wq", 0), "k_proj": ("attention.wk", 0), "v_proj": ("attention.wv", 0),
    "o_proj": ("attention.wo", 1),
    "gate_proj": ("feed_forward.w1", 0), "up_proj": ("feed_forward.w3", 0), "down_proj": ("feed_forward.w2", 1),
    "input_layernorm": ("attention_norm", None), "post_attention_layernorm": ("ffn_norm", None),
    "norm": ("norm", None),
    "lm_head": ("output", 0),
}  # fmt: skip
_LEFT_OUT = ("rope.freqs", "rotary_emb.inv_freq")  # tables that some files carry along
_OTHER = "a file is missing, or a file or the config is another model's"


def meta_name(name: str) -> tuple[str, int | None]:
    """Meta's name of a parameter, and the dimension its shards split: model.layers.3.mlp.up_proj.weight ->
    layers.3.feed_forward.w3.weight, 0."""
    part, dim = META[name.split(".")[-2]]
    layer = re.match(r"model\.(layers\.\d+\.)", name)
    return f"{layer[1] if layer else ''}{part}.weight", dim


def pairs(weight: Tensor, d: int, meta: bool) -> Tensor:
    """A q or k projection [H * d, D] as [H, d / 2, 2, D], the two channels of each rotated pair side by side: so they
    are in Meta's layout, while in transformers' all first ones of a head come before all second ones."""
    D = weight.shape[1]
    return weight.view(-1, d // 2, 2, D) if meta else weight.view(-1, 2, d // 2, D).transpose(1, 2)


class Weights:
    """The tensors of a model's files under our names, whatever the layout, each read when it is asked for.

    Files are mapped, and opened anew for each tensor: closing gives the mapped pages back, so that no second copy of a
    large model builds up. Strict: all the model's tensors must be there, with its shapes, and nothing else.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.folder = self.path if self.path.is_dir() else self.path.parent
        self.files, index = find_files(self.path)
        # by a tensor's name: the files with it, or with a shard of it, and its shape there
        self.parts: dict[str, dict[Path, list[int]]] = {}
        for file in self.files:
            for name, value in read_tensors(file).items():
                if not name.endswith(_LEFT_OUT):
                    self.parts.setdefault(name, {})[file] = list(value.shape)
        for name, file in index.items():
            if self.folder / file not in self.parts.get(name, {}) and not name.endswith(_LEFT_OUT):
                raise LlamaError(
                    f"{self.folder / file}: lacks tensor {name}, against its index; it is another model's file"
                )
        self.meta = "tok_embeddings.weight" in self.parts
        file = self.folder / ("params.json" if self.meta else "config.json")
        values = read_json(file)
        self.config = self.meta_config(values, file) if self.meta else LlamaConfig.from_transformers(values, file)
        with torch.device("meta"):
            self.shapes = {name: parameter.shape for name, parameter in Llama(self.config).named_parameters()}
        self.check()

    def meta_config(self, values: dict, file: Path) -> LlamaConfig:
        """From the contents of params.json, which leave two sizes to the tensors."""
        if values.get("use_scaled_rope"):
            raise LlamaError(f"{file}: scales the rotary embedding, as Llama 2 does not; give a Llama 2 model")
        rows = {name: len(self.files) * max(parts.values())[0] for name, parts in self.parts.items()}
        try:
            return LlamaConfig(
                vocab_size=rows["output.weight"], hidden_size=values["dim"],
                intermediate_size=rows["layers.0.feed_forward.w1.weight"], num_hidden_layers=values["n_layers"],
                num_attention_heads=values["n_heads"], num_key_value_heads=values.get("n_kv_heads"),
                rms_norm_eps=values["norm_eps"], rope_theta=values.get("rope_theta") or 10000.0,
            )  # fmt: skip
        except KeyError as error:
            raise LlamaError(f"{file}: it or the weights lack {error.args[0]}; download them again") from None

    def source(self, name: str) -> tuple[str, int | None]:
        """The name in the files of one of our parameters, and the dimension that its shards split."""
        return meta_name(name) if self.meta else (name, None)

    def check(self) -> None:
        """That the files hold this model's tensors and no others."""
        left_over = set(self.parts) - ({"lm_head.weight"} if self.config.tie_word_embeddings else set())
        for name, shape in self.shapes.items():
            source, dim = self.source(name)
            parts = self.parts.get(source, {})
            for file in self.files if self.meta else list(parts) or [self.path]:
                if file not in parts:
                    raise LlamaError(f"{file}: lacks tensor {source}; {_OTHER}")
                want = [n // (len(self.files) if i == dim else 1) for i, n in enumerate(shape)]
                if parts[file] != want:
                    raise LlamaError(f"{file}: tensor {source} is {parts[file]}, not {want}; {_OTHER}")
            if not self.meta and len(parts) > 1:
                raise LlamaError(f"{max(parts)}: holds tensor {source} a second time; {_OTHER}")
            left_over.discard(source)
        if left_over:
            name = min(left_over)
            raise LlamaError(f"{min(self.parts[name])}: tensor {name} has no place in the model; {_OTHER}")

    def copy(self, name: str, target: Tensor) -> None:
        """A parameter's values into `target`, of its shape, any dtype and device."""
        source, dim = self.source(name)
        turned = self.meta and name.endswith(("q_proj.weight", "k_proj.weight"))
        target = pairs(target, self.config.head_size, meta=False) if turned else target
        files = sorted(self.parts[source])[: None if dim is not None else 1]
        for file, place in zip(files, target.chunk(len(files), dim or 0)):
            value = read_tensors(file)[source]
            place.copy_(pairs(value, self.config.head_size, meta=True) if turned else value)

    def __getitem__(self, name: str) -> Tensor:
        """A parameter as a new tensor, in the files' dtype."""
        source = self.source(name)[0]
        value = torch.empty(self.shapes[name], dtype=read_tensors(min(self.parts[source]))[source].dtype)
        self.copy(name, value)
        return value


def find_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of weights in a folder (or the one file), and what an index says is where."""
    if path.is_file():
        return [path], {}
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (index := path / f"{single}.index.json").exists():
            places = read_json(index).get("weight_map", {})
            return [path / name for name in sorted(set(places.values()))], places
        if (path / single).exists():
            return [path / single], {}
    files = sorted(path.glob("consolidated.*.pth"))
    if not files:
        raise LlamaError(f"{path}: no such file, nor a folder with model.safetensors, its index or consolidated.00.pth")
    if lacking := {path / f"consolidated.{i:02d}.pth" for i in range(len(files))} - set(files):
        raise LlamaError(f"{min(lacking)}: is missing, while later ones are there; download it again")
    return files, {}


def read_tensors(file: Path) -> dict[str, Tensor]:
    """A file's tensors by name, mapped and not yet read, if its format allows that. No code in a pickle is run."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}
    except FileNotFoundError:
        raise LlamaError(f"{file}: is missing; download it again") from None
    except Exception as error:  # a damaged file can fail in any way
        reason = str(error).strip().split("\n")[0].split(". ")[0][:160] or type(error).__name__
        raise LlamaError(f"{file}: cannot be read as weights ({reason}); download it again") from None


def read_json(file: Path) -> dict:
    """The object in a JSON file."""
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise LlamaError(f"{file}: no such file; it must lie beside the weights") from None
    except ValueError as error:
        raise LlamaError(f"{file}: is no JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise LlamaError(f"{file}: holds no JSON object; download it again")
    return values


@torch.no_grad()
def load(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Llama:
    """A model with the weights of a folder or file, in evaluation mode.

    path: a folder of transformers (config.json with model.safetensors, its shards and index, or pytorch_model.bin) or
        of Meta (params.json with consolidated.00.pth and so on), or one such file with its JSON beside it.
    Errors: LlamaError, which names the file and what is wrong with it.
    """
    weights = Weights(path)
    with torch.device("meta"):  # no memory and no time for initial values that the files replace
        model = Llama(weights.config).to(dtype)
    model.to_empty(device=device).tie()
    for name, parameter in sorted(model.named_parameters(), key=lambda item: -item[1].numel()):
        weights.copy(name, parameter)  # the largest first: little is mapped when the most is read
    return model.eval()


def save(model: Llama, folder: str | Path) -> None:
    """Write a model to a new folder in transformers' layout. The folder appears whole or not at all.

    LlamaError: there is something under this name. OSError: it cannot be written.
    """
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with new_folder(folder) as temporary:
        write_transformers(temporary, model.config, list(state), state.__getitem__)


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """A folder under a temporary name, moved into place once it is complete."""
    target = Path(target).resolve()
    if target.is_file() or target.is_dir() and any(target.iterdir()):
        raise LlamaError(f"{target}: is there already; name a new folder")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(target)
    except SafetensorError as error:
        raise OSError(f"{target}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_transformers(folder: Path, config: LlamaConfig, names: list[str], get: Callable[[str], Tensor]) -> None:
    """config.json and the tensors that `get` gives, in files of SHARD bytes at most, one in memory at a time."""
    with torch.device("meta"):
        sizes = {name: parameter.numel() for name, parameter in Llama(config).named_parameters()}
    dtype = get(names[-1]).dtype
    (folder / "config.json").write_text(json.dumps(config.to_transformers(dtype), indent=2))
    shards, filled = [[]], 0
    for name in names:
        if filled and filled + sizes[name] * dtype.itemsize > SHARD:
            shards, filled = [*shards, []], 0
        shards[-1].append(name)
        filled += sizes[name] * dtype.itemsize
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else ["model.safetensors"]
    for file, shard in zip(files, shards):
        save_file({name: get(name).cpu().contiguous() for name in shard}, folder / file, {"format": "pt"})
        (folder / file).chmod((folder / "config.json").stat().st_mode)  # safetensors lets no one but the owner read
    if len(shards) > 1:
        index = dict(metadata=dict(total_size=sum(sizes.values()) * dtype.itemsize))
        index["weight_map"] = {name: file for file, shard in zip(files, shards) for name in shard}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_meta(folder: Path, weights: Weights) -> None:
    """params.json and one consolidated.00.pth, which Meta's code reads on one GPU; it is in memory as a whole."""
    config, state = weights.config, {}
    (folder / "params.json").write_text(json.dumps(config.to_meta()))
    for name in weights.shapes:
        value = weights[name]
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            value = pairs(value, config.head_size, meta=False).reshape(value.shape)
        state[meta_name(name)[0]] = value
    if config.tie_word_embeddings:
        state["output.weight"] = state["tok_embeddings.weight"]
    torch.save(state, folder / "consolidated.00.pth")


def convert(source: str | Path, target: str | Path) -> str:
    """Meta's layout -> transformers', or the other way round, in a new folder; the dtype stays. Returns a sentence."""
    weights = Weights(source)
    with new_folder(target) as temporary:
        if weights.meta:
            write_transformers(temporary, weights.config, list(weights.shapes), weights.__getitem__)
        else:
            write_meta(temporary, weights)
        for folder in (weights.folder, weights.folder.parent)[: 2 if weights.meta else 1]:  # Meta has it one level up
            if (folder / "tokenizer.model").is_file() and not (temporary / "tokenizer.model").exists():
                shutil.copyfile(folder / "tokenizer.model", temporary / "tokenizer.model")
    count = sum(shape.numel() for shape in weights.shapes.values())
    return f"{target}: {count:,} parameters, in {'transformers' if weights.meta else 'Meta'}'s layout"


def main(argv: list[str] | None = None) -> None:
    """The command; its help is `python llama.py --help`."""
    parser = argparse.ArgumentParser(description="Convert weights of Llama 2 between Meta's layout and transformers'.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("convert", help="from either layout to the other; the folder says which it is")
    command.add_argument("source", help="folder (or file) with the weights and params.json or config.json")
    command.add_argument("target", help="the folder to make")
    args = parser.parse_args(argv)
    try:
        print(convert(args.source, args.target))
    except (LlamaError, OSError) as error:
        sys.exit(f"llama.py: {error}")


if __name__ == "__main__":
    main()
