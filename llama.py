"""Llama 2: the model, its KV cache, text generation, its tokenizer, and its weights in transformers' layout.

    model, tokenizer = llama.load("Llama-2-7b-hf", torch.bfloat16), llama.Tokenizer("Llama-2-7b-hf")
    ids, mask = tokenizer.pad([tokenizer.encode(text, bos=True) for text in texts])
    answers = [tokenizer.decode(answer) for answer in model.generate(ids, mask=mask)]

Parameter names are transformers'; convert.py translates Meta's. The file needs no other one of the project: copy it.
Shapes: B batch, T new tokens, S cache size, D width, H heads, K heads of keys and values, d = D / H, W vocabulary size.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # the label of a token that is not to be learned
CHUNK = 1024  # labels whose logits exist at one time: 131 MB at 32,000 words
SHARD = 5_000_000_000  # bytes of a weight file, at most


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
    tie_word_embeddings: bool = False  # the output layer shares the weights of the token embedding

    def __post_init__(self) -> None:
        D, H, K = self.hidden_size, self.num_attention_heads, self.kv_heads
        if (self.head_dim is None and D % H) or H % K or self.head_size % 2:
            raise ValueError(f"hidden_size {D}, {H} heads of {self.head_size} channels, {K} heads of keys: do not fit")

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
        """From the contents of a transformers config.json, old or new. ValueError: it is not a plain Llama's."""
        old, new = (values.get(key) or {} for key in ("rope_scaling", "rope_parameters"))
        kinds = {rope.get("rope_type", rope.get("type", "default")) for rope in (old, new)} - {"default"}
        found = values | {"rope_type": min(kinds, default="default")}
        traits = dict(model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False, rope_type="default")
        for key, plain in traits.items():
            if found.get(key, plain) != plain:
                raise ValueError(f"{file}: its {key} is {found[key]!r}; only {plain!r} is supported")
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if not (isinstance(values.get(key), int) and values[key] > 0):
                raise ValueError(f"{file}: its {key} is {values.get(key)!r}; use the file that came with the weights")
        known = dict(rms_norm_eps=1e-6, max_position_embeddings=2048) | values  # transformers' defaults
        known["rope_theta"] = new.get("rope_theta", values.get("rope_theta", 10000.0))
        return cls(**{key: known[key] for key in cls.__dataclass_fields__ if key in known})

    def to_transformers(self, dtype: torch.dtype = torch.float32) -> dict[str, object]:
        """The contents of a config.json that every version of transformers reads."""
        name = str(dtype).removeprefix("torch.")
        values = asdict(self) | dict(num_key_value_heads=self.kv_heads, head_dim=self.head_size, hidden_act="silu")
        values |= dict(architectures=["LlamaForCausalLM"], model_type="llama", attention_bias=False, mlp_bias=False)
        values |= dict(rope_parameters=dict(rope_type="default", rope_theta=self.rope_theta))
        return values | dict(bos_token_id=1, eos_token_id=2, dtype=name, torch_dtype=name)


# --- layers -----------------------------------------------------------------------------------------------------------

class Cache:
    """Keys and values of the tokens read so far: S places for each of B sequences, allocated once.
    layers: keys and values [B, K, S, d] of each. mask: [B, S], which places hold tokens (padding takes places, too).
    place: [1], the first free place, on the device, so that a compiled step does not depend on it."""

    def __init__(self, config: LlamaConfig, batch: int, size: int, dtype: torch.dtype, device: torch.device | str):
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        self.mask = torch.zeros(batch, size, dtype=torch.bool, device=device)
        keys = torch.zeros(batch, config.kv_heads, size, config.head_size, dtype=dtype, device=device)
        self.layers = [(torch.zeros_like(keys), torch.zeros_like(keys)) for _ in range(config.num_hidden_layers)]
        if self.place.is_cuda:  # so that a step recorded as a CUDA graph writes here, not into a copy
            for tensor in (self.place, self.mask, *sum(self.layers, ())):
                torch._dynamo.mark_static_address(tensor, guard=False)


def rotary(positions: Tensor, config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation at positions [B, T]: [B, 1, T, d / 2] each, float32."""
    channels = torch.arange(0, config.head_size, 2, device=positions.device, dtype=torch.float32)
    angles = positions[:, None, :, None].float() * config.rope_theta ** -(channels / config.head_size)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, T, d]: channels i and i + d / 2 are a pair, turned in float32 by their angle."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; several heads of queries may share one of keys and values."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, H, K, self.d = config.hidden_size, config.num_attention_heads, config.kv_heads, config.head_size
        self.q_proj, self.o_proj = nn.Linear(D, H * self.d, bias=False), nn.Linear(H * self.d, D, bias=False)
        self.k_proj, self.v_proj = nn.Linear(D, K * self.d, bias=False), nn.Linear(D, K * self.d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: tuple | None) -> Tensor:
        """x [B, T, D] -> [B, T, D]. cos, sin: see `rotary`. mask: [B, 1, T, T or S], True = seen; None: causal.
        cache: keys and values [B, K, S, d], and the places [T] where the new ones go; a mask is over all S."""
        B, T, _ = x.shape
        q, k, v = (f(x).view(B, T, -1, self.d).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # [B, H, T, d]; k and v: [B, K, T, d]
        if cache:
            keys, values, places = cache
            keys.index_copy_(2, places, k.to(keys.dtype))
            values.index_copy_(2, places, v.to(values.dtype))
            k, v = keys, values
        x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=k.shape[1] < q.shape[1])
        return self.o_proj(x.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: D -> intermediate_size -> D."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = nn.Linear(D, hidden, bias=False), nn.Linear(D, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: tuple | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


# --- the model --------------------------------------------------------------------------------------------------------

class Llama(nn.Module):
    """The language model, randomly initialized. `checkpointing`: keep only the layers' inputs for the backward pass."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config, self.checkpointing = config, False
        W, D = config.vocab_size, config.hidden_size
        layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        parts = dict(embed_tokens=nn.Embedding(W, D), layers=layers, norm=nn.RMSNorm(D, config.rms_norm_eps))
        self.model, self.lm_head = nn.ModuleDict(parts), nn.Linear(D, W, bias=False)
        self.tie()
        for matrix in (parameter for parameter in self.parameters() if parameter.ndim == 2):
            nn.init.normal_(matrix, std=0.02)

    def tie(self) -> None:
        """Make the output layer and the token embedding one parameter, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings: ids [B, T] -> [B, T, D]."""
        return self.model.embed_tokens(ids)

    def forward(
        self, ids: Tensor | None = None, embeds: Tensor | None = None, mask: Tensor | None = None,
        cache: Cache | None = None, positions: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token after each token, or after some: [B, n, W]. (Those after padding mean nothing.)
        ids [B, T] or embeds [B, T, D]: the tokens, one or the other.
        mask: [B, T], 1 = token, 0 = padding, on either side. None: no padding (or, without a cache, on the right).
        cache: the tokens read before, to which these are added.
        positions: [B, n], the places among the T tokens whose logits are wanted; None: all T."""
        x = self.hidden(self.embed(ids) if embeds is None else embeds, mask, cache)
        if positions is not None:
            x = x[torch.arange(len(x), device=x.device)[:, None], positions]
        return self.lm_head(x)

    def hidden(self, x: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Embeddings [B, T, D] through all layers and the final norm. ValueError: they exceed the context.
        A token's position counts the tokens before it; it sees those and itself. Padding sees itself to stay finite."""
        (B, T, _), context = x.shape, self.config.max_position_embeddings
        if T > context:
            raise ValueError(f"{T} tokens exceed the context of {context}; shorten the text")
        real = torch.ones(B, T, dtype=torch.bool, device=x.device) if mask is None else mask.bool()
        causal = cache is None and (mask is None or bool((real[:, 1:] <= real[:, :-1]).all()))  # any padding comes last
        positions, places = (real.cumsum(1) - 1).clamp(min=0), torch.arange(T, device=x.device)
        if cache is not None:
            positions, places = positions + cache.mask.sum(1, keepdim=True), places + cache.place
            cache.mask.index_copy_(1, places, real)
            cache.place.add_(T)
            real = cache.mask
        (cos, sin), mask = rotary(positions, self.config), None
        if not causal:
            keys = torch.arange(real.shape[1], device=x.device)
            mask = (real[:, None] & (keys <= places[:, None]) | (keys == places[:, None]))[:, None]  # [B, 1, T, T or S]
        for i, layer in enumerate(self.model.layers):
            inputs = (x, cos, sin, mask, None if cache is None else (*cache.layers[i], places))
            x = checkpoint(layer, *inputs, use_reentrant=False) if self.checkpointing else layer(*inputs)
        return self.model.norm(x)

    def decode(self, ids: Tensor, cache: Cache) -> Tensor:
        """One more token of each sequence: ids [B, 1] -> logits [B, W]. Compile it once, for a cache however full."""
        return self(ids, cache=cache)[:, 0]

    def loss(self, embeds: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mean cross-entropy of the labels, float32; 0 if there is none. Never holds the logits of all of them.
        embeds: [B, T, D]. labels: [B, T], the ids of the tokens themselves (each is predicted from those before it),
        -100 where none is to be learned. mask: see `forward`."""
        return self.summed_loss(self.hidden(embeds, mask), labels) / (labels[:, 1:] != IGNORE).sum().clamp(min=1)

    def summed_loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """The sum in place of the mean, from the `hidden` states [B, T, D]."""
        wanted = labels[:, 1:] != IGNORE
        x, labels = x[:, :-1][wanted], labels[:, 1:][wanted]  # [n, D], [n]
        total = x.new_zeros((), dtype=torch.float32)
        for chunk in zip(x.split(CHUNK), labels.split(CHUNK)):  # logits [1024, W], gone before the next ones
            summed = lambda x, labels: F.cross_entropy(self.lm_head(x).float(), labels, reduction="sum")
            total = total + checkpoint(summed, *chunk, use_reentrant=False)
        return total

    @torch.no_grad()
    def stream(
        self, ids: Tensor | None = None, embeds: Tensor | None = None, mask: Tensor | None = None, stop: int | None = 2,
        max_new_tokens: int = 256, temperature: float = 0.0, generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Continue B prompts (see `forward`): yields ids [B], one of each sequence at a time.
        stop: the id that ends a sequence (</s>) and then fills it until all have ended; None: no id does.
        max_new_tokens: at most this many, and no more than the context has room for. ValueError: none at all.
        temperature: 0 takes the most likely token; otherwise tokens are drawn from softmax(logits / temperature)."""
        x = self.embed(ids) if embeds is None else embeds
        (B, T, _), context = x.shape, self.config.max_position_embeddings
        steps = min(max_new_tokens, context - T)
        if steps < 1:
            raise ValueError(f"{T} tokens leave no room for {max_new_tokens} new ones in the context of {context}")
        size = (T + steps + 63) // 64 * 64  # few different sizes, for a compiled step
        cache = Cache(self.config, B, size, self.model.embed_tokens.weight.dtype, x.device)
        mask = torch.ones(B, T, dtype=torch.bool, device=x.device) if mask is None else mask.bool()
        last = (mask * torch.arange(T, device=x.device)).amax(1, keepdim=True)
        logits = self(embeds=x, mask=mask, cache=cache, positions=last)[:, 0]  # [B, W]
        done = torch.zeros(B, dtype=torch.bool, device=x.device)
        for step in range(steps):
            if step > 0:
                logits = self.decode(token[:, None], cache)
            check_finite(logits)
            token = logits.argmax(-1)
            if temperature > 0:
                token = torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]
            if stop is not None:
                token = token.masked_fill(done, stop)
                done = token == stop
            yield token
            if done.all():
                return

    def generate(self, *args: Tensor, stop: int | None = 2, **options: object) -> list[list[int]]:
        """The ids that continue each of the B prompts, without the `stop` that ends them. Arguments: see `stream`."""
        steps = [token.tolist() for token in self.stream(*args, stop=stop, **options)]
        return [list(text[: text.index(stop)] if stop in text else text) for text in zip(*steps)]


def check_finite(logits: Tensor) -> None:
    """ValueError: the logits are not all finite, and no answer or score follows from them."""
    if not logits.isfinite().all():
        raise ValueError("the model's outputs are not finite numbers: its weights are damaged or training diverged")


# --- the tokenizer ----------------------------------------------------------------------------------------------------

class Tokenizer:
    """Llama's tokenizer: a sentencepiece model, and <s> and </s> around a text. (Inside, they are mere characters.)
    `added`: the ids of more tokens, behind the others, by their text."""

    def __init__(self, path: str | Path, vocab_size: int | None = None, added: Sequence[str] = ()):
        """path: tokenizer.model or the folder with it. vocab_size: the model's. ValueError: the model has fewer."""
        path = Path(path) / "tokenizer.model" if Path(path).is_dir() else Path(path)
        advice = "use the tokenizer.model that came with the weights"
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise ValueError(f"{path}: is missing or not a sentencepiece model; {advice}") from None
        self.vocab_size, self.bos, self.eos = self.pieces.vocab_size(), self.pieces.bos_id(), self.pieces.eos_id()
        if min(self.bos, self.eos) < 0:
            raise ValueError(f"{path}: has no <s> or no </s>; {advice}")
        self.added = {text: self.vocab_size + i for i, text in enumerate(added)}
        needed = self.vocab_size + len(added)
        if vocab_size is not None and vocab_size < needed:  # more rows than words are padding
            raise ValueError(f"{path}: has {needed} tokens, the model only {vocab_size}; {advice}")

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of a text, with <s> before it and </s> after it if asked for."""
        parts = re.split(f"({'|'.join(map(re.escape, self.added))})", text) if self.added else [text]
        ids = ([self.added[part]] if part in self.added else self.pieces.encode(part) for part in parts)
        return [self.bos] * bos + sum(ids, []) + [self.eos] * eos

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens and the space before the first word."""
        names, text, words = {i: name for name, i in self.added.items()}, "", []
        for i in ids:
            if i in names:
                text, words = text + self.pieces.decode(words) + names[i], []
            elif 0 <= i < self.vocab_size and not self.pieces.is_control(i):
                words.append(i)
        return text + self.pieces.decode(words)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids piece by piece, as they come; a character of several bytes comes when it is whole."""
        so_far, shown = [], 0
        for i in ids:
            so_far.append(i)
            text = self.decode(so_far)
            if not text.endswith("\ufffd"):
                yield text[shown:]
                shown = len(text)
        yield self.decode(so_far)[shown:]

    @staticmethod
    def pad(texts: Sequence[Sequence[int]], left: bool = True) -> tuple[Tensor, Tensor]:
        """Lists of ids -> ids and mask [B, T] each, 1 = token. Left padding is for generation, right for training."""
        T = max(map(len, texts), default=0)
        ids, mask = torch.zeros(2, len(texts), T, dtype=torch.long)
        for row, text in enumerate(texts):
            place = slice(T - len(text), T) if left else slice(0, len(text))
            ids[row, place], mask[row, place] = torch.tensor(text, dtype=torch.long), 1
        return ids, mask


# --- weights ----------------------------------------------------------------------------------------------------------

def read_json(file: Path) -> dict:
    """The object in a JSON file. ValueError: there is none."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8-sig")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file}: cannot be read as a JSON object ({error}); download it again") from None


def read_config(folder: str | Path, least: int = 0) -> LlamaConfig:
    """The config of a folder in transformers' layout, with `least` tokens or more. ValueError: it is in Meta's, or not
    a plain Llama's."""
    file = Path(folder) / "config.json"
    if not file.is_file() and file.with_name("params.json").is_file():
        raise ValueError(f"{folder}: is in Meta's layout; first run: python convert.py llama {folder} {folder}-hf")
    config = LlamaConfig.from_transformers(read_json(file), file)
    return replace(config, vocab_size=max(config.vocab_size, least))


def read_tensors(folder: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """File, name and value of each tensor in a folder, one after the other. ValueError: a file cannot be read."""
    kinds = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
    first = next((kind for kind in kinds if (folder / kind).is_file()), "model.safetensors")
    index = read_json(folder / first).get("weight_map", {}) if first.endswith(".json") else {"": first}
    for file in sorted(folder / name for name in set(index.values())):
        try:
            pickled = file.suffix == ".bin"  # in older folders, such as Vicuna's; no code in it is run
            tensors = torch.load(file, "cpu", weights_only=True, mmap=True) if pickled else safe_open(file, "pt")
            for name in list(tensors.keys()):  # each is mapped by itself: no second copy of the file builds up
                yield file, name, tensors[name] if pickled else safe_open(file, "pt").get_tensor(name)
        except Exception as error:  # a damaged file can fail in any way
            raise ValueError(f"{file}: cannot be read as weights ({error!r:.160}); download it again") from None


@torch.no_grad()
def fill(model: Llama, folder: str | Path) -> None:
    """Copy a folder's weights one by one into a model, sharded by FSDP2 or not. ValueError: they do not fit it.
    Where the model has more tokens than the folder, these start as the mean of the others."""
    model.tie()  # `to_empty` makes two parameters of one
    parameters, other = dict(model.named_parameters()), "a file or config.json is missing or another model's"
    ignored = ("rotary_emb.inv_freq", *["lm_head.weight"] * model.config.tie_word_embeddings)  # some files carry them
    lacking = {name: list(parameter.shape) for name, parameter in parameters.items()}
    added = model.config.vocab_size - read_config(folder).vocab_size
    for file, name, value in read_tensors(Path(folder)):
        if name.endswith(ignored):
            continue
        shape = lacking.pop(name, "no such tensor, or has it already")
        if added > 0 and name in ("model.embed_tokens.weight", "lm_head.weight"):
            value = torch.cat([value.float(), value.float().mean(0, keepdim=True).expand(added, -1)])
        if list(value.shape) != shape:
            raise ValueError(f"{file}: tensor {name} is {list(value.shape)}, the model has {shape}; {other}")
        if not value.isfinite().all():
            raise ValueError(f"{file}: tensor {name} holds a NaN or an infinity; download it again")
        p = parameters[name]
        if hasattr(p, "placements"):  # a DTensor: each process keeps its own part, without communication
            value = torch.distributed.tensor.distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
        p.copy_(value)
    if lacking:
        raise ValueError(f"{folder}: tensor {min(lacking)} is missing; {other}")


def load(folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
         least: int = 0) -> Llama:
    """A model with a folder's config and weights, in evaluation mode. The rest: see `read_config` and `fill`."""
    with torch.device("meta"):  # no memory and no time for initial values that the files replace
        model = Llama(read_config(folder, least)).to(dtype)
    fill(model.to_empty(device=device), folder)
    return model.eval()


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """A folder under a temporary name, moved into place once it is complete. ValueError: the target exists."""
    target = Path(target).resolve()
    if target.is_file() or target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target}: exists already; name a new folder")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(target)
    except (SafetensorError, RuntimeError) as error:  # what they make of a full disk
        raise OSError(f"{target}: cannot be written ({str(error).splitlines()[0]}); is the disk full?") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write(folder: Path, config: LlamaConfig, names: Sequence[str], get: Callable[[str], Tensor]) -> None:
    """Write a model into a folder in transformers' layout: config.json and files of at most SHARD bytes.
    get: gives the tensor of a name; those of one file are in memory at a time."""
    dtype = get(names[-1]).dtype
    with torch.device("meta"):
        size = {name: p.numel() * dtype.itemsize for name, p in Llama(config).named_parameters()}
    shards, filled = [[]], 0
    for name in names:
        filled += size[name]
        if filled > SHARD and shards[-1]:
            shards, filled = [*shards, []], size[name]
        shards[-1].append(name)
    form = "model-{:05d}-of-{:05d}.safetensors" if len(shards) > 1 else "model.safetensors"
    files = {form.format(i, len(shards)): shard for i, shard in enumerate(shards, 1)}
    index = {"weight_map": {name: file for file, shard in files.items() for name in shard}}
    (folder / "config.json").write_text(json.dumps(config.to_transformers(dtype), indent=2))
    if len(shards) > 1:
        index["metadata"] = {"total_size": sum(size.values())}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for file, shard in files.items():
        save_file({name: get(name).cpu().contiguous() for name in shard}, folder / file, {"format": "pt"})
        (folder / file).chmod((folder / "config.json").stat().st_mode)  # safetensors lets only the owner read


def save(model: Llama, folder: str | Path) -> None:
    """Write a model to a new folder in transformers' layout, whole or not at all. Errors: see `new_folder`."""
    with new_folder(folder) as temporary:
        write(temporary, model.config, [name for name, _ in model.named_parameters()], model.get_parameter)
