"""The vision-language model: an image becomes tokens that Llama reads as words (section 5, appendix D).

    image ---> vision (frozen) ---> adapter ------------+
                                                        v
    "In: {question}\\nOut:" ---> word embeddings ---> <s> image text ---> language ---> "{answer}</s>"

LLaVA's way: the image's tokens stand right behind <s>, the text follows; an example without an image has none. Adapter
and language model are trained, in one stage, on the answers. The file needs vit.py, maskembed.py and llama.py beside
it and nothing else of ours.

    model = vlm.load("runs/vlm/model")
    model.generate([image, None], ["What is left of the ring?", "What is a ring?"])

    python vlm.py MODEL IMAGE "What is left of the ring?"       # the answer, as it comes
    python vlm.py MODEL --export FOLDER                         # its language model, in transformers' layout

Shapes: B batch, T text length, N patches, P prefix tokens, M image tokens (N or P + N), S = M + T, D the backbone's
width, E the language model's.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import llama
import maskembed
import vit
from llama import IGNORE, Llama, LlamaConfig, LlamaError, Tokenizer
from maskembed import Student
from vit import Block, ViT, ViTConfig, WeightsError

Conversation = list[dict[str, str]]  # LLaVA's: {"from": "human" or "gpt", "value": text}, in turns
Prompt = str | Conversation  # the question alone (the template is put around it), or a conversation that ends with one
Images = Sequence[Image.Image | None]  # for each prompt one or none


class VLMError(ValueError):
    """Input, a file or a folder that cannot be used as asked; one sentence says why and what to do."""

    def __str__(self) -> str:
        return super().__str__().rsplit("VLMError: ")[-1].strip()  # drops the traceback that a data process adds


# ----------------------------------------------------------------------------------------------------------------------
# Template and encoding


@dataclass(frozen=True)
class Template:
    """What is written around questions and answers. `</s>` is the special token, and stands at an answer's end only."""

    question: str = "In: {question}\nOut:"
    answer: str = "{answer}</s>"
    system: str = ""  # before the first question

    def __post_init__(self) -> None:
        if "{question}" not in self.question or not self.answer.endswith("{answer}</s>"):
            raise VLMError("a template needs a question with {question} in it and an answer that ends in {answer}</s>")

    def piece(self, message: str, turn: int) -> str:
        """The text around a message: a question where `turn`, counted from 0, is even, else an answer without its </s>.

        The tokenizer begins each piece with a space, so one that the template has there is that very space.
        """
        if turn % 2:
            text = self.answer.removesuffix("</s>").replace("{answer}", message)
        else:
            text = (self.system if turn == 0 else "") + self.question.replace("{question}", message)
        return text.removeprefix(" ")


TEMPLATES: dict[str, Template] = {
    "llama": Template(),  # the base model's, which the paper uses
    "vicuna": Template(  # v1.5's
        question="USER: {question} ASSISTANT:",
        answer=" {answer}</s>",
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
    ),
}


def encode(
    tokenizer: Tokenizer, template: Template, conversation: Conversation, max_text: int | None = None
) -> tuple[list[int], list[int]]:
    """A conversation as ids, <s> first, and labels: the ids themselves in answers and their </s>, elsewhere -100.

    "<image>" is removed from the messages, which are then stripped. The pieces that the template makes of them are
    tokenized one by one, so an answer starts with its own word-initial token. max_text: the ids are cut there.
    VLMError: turns that do not alternate, human first.
    """
    ids, labels = [tokenizer.bos], [IGNORE]
    for turn, message in enumerate(conversation):
        answer = turn % 2 == 1
        role = "gpt" if answer else "human"
        if message.get("from") != role or not isinstance(message.get("value"), str):
            raise VLMError(f"turn {turn + 1} of a conversation is no text from {role}; human and gpt take turns")
        text = message["value"].replace("<image>", "").strip()
        piece = tokenizer.encode(template.piece(text, turn), eos=answer)
        ids += piece
        labels += piece if answer else [IGNORE] * len(piece)
    return ids[:max_text], labels[:max_text]


def prepare(image: Image.Image, config: ViTConfig) -> Tensor:
    """Any PIL image, squeezed to the square that the backbone reads -> pixels, uint8 [3, H, W].

    VLMError: its file cannot be read.
    """
    try:
        pixels = np.array(vit.fit(image, config, square=True))
    except Exception as error:  # Pillow reads a file when its pixels are needed, and a damaged one can fail in any way
        raise unreadable(getattr(image, "filename", "") or "an image", error) from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def open_image(path: str | Path) -> Image.Image:
    """An image file. VLMError: no such file, or none that Pillow reads."""
    try:
        return Image.open(path)
    except FileNotFoundError:
        raise VLMError(f"{path}: no such image; give the path of an image file") from None
    except Exception as error:
        raise unreadable(path, error) from None


def unreadable(name: str | Path, error: Exception) -> VLMError:
    """The error for a damaged image file."""
    reason = str(error).strip().split("\n")[0][:160] or type(error).__name__
    return VLMError(f"{name}: cannot be read as an image ({reason}); give another file")


# ----------------------------------------------------------------------------------------------------------------------
# Adapters


class Adapter(nn.Module):
    """From the vision features [B, M, D] to what the language model reads, [B, M, E].

    prefix: whether it reads prefix tokens, of a baseline and of an aligned backbone. own_blocks: how many blocks of the
    backbone it takes over and trains. new: what the names of parameters from scratch begin with; the others `start` sets.
    """

    prefix: tuple[bool, bool] = (True, True)
    own_blocks: int = 0
    new: str = ""

    def start(self, source: ViT | Student) -> None:
        """Begin with pre-trained layers of the backbone; most adapters have none."""


class MLP(Adapter):
    """`mlp`: linear D -> E, GELU, linear E -> E."""

    prefix = (False, True)

    def __init__(self, config: "VLMConfig"):
        super().__init__()
        layers: list[nn.Module] = []
        widths = self.widths(config)
        for before, after in zip(widths, widths[1:]):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.projector = nn.Sequential(*layers[:-1])

    def widths(self, config: "VLMConfig") -> list[int]:
        """From the features' width to E."""
        E = config.language.hidden_size
        return [config.vision.embed_dim, E, E]

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(x)


class FusedMLP(MLP):
    """`fused-mlp`: the patch tokens of a second backbone (D1) and of the first (D2) side by side, and three layers."""

    prefix = (False, False)  # the backbones have different ones

    def widths(self, config: "VLMConfig") -> list[int]:
        """D1 + D2, four times that, E, E."""
        D, E = config.second.embed_dim + config.vision.embed_dim, config.language.hidden_size
        return [D, 4 * D, E, E]


class Transformer(Adapter):
    """`transformer`: the layers of MaskEmbed's encoder head and decoder, from scratch."""

    def __init__(self, config: "VLMConfig"):
        super().__init__()
        self.decoder = maskembed.Decoder(config.vision, **config.decoder or {})
        width = self.decoder.options["width"]
        self.head = nn.Linear(config.vision.embed_dim, width)
        self.decoder.head = nn.Linear(width, config.language.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.head(x))


class Decoder(Transformer):
    """`decoder` (the paper's, for aligned backbones): the trained encoder head and decoder, a new last layer of zeros.

    Prefix tokens are hidden from the decoder, as they were when it was trained.
    """

    new = "decoder.head."

    def __init__(self, config: "VLMConfig"):
        super().__init__(config)
        self.num_prefix = config.vision.num_prefix
        zero(self.decoder.head)

    def start(self, source: ViT | Student) -> None:
        """The aligned model's head, and all of its decoder but the last layer."""
        self.head.load_state_dict(source.head.state_dict())
        last = self.decoder.head.state_dict(prefix="head.")
        self.decoder.load_state_dict(source.decoder.state_dict() | last)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x[:, self.num_prefix :])  # [B, N, W]
        return self.decoder(F.pad(x, (0, 0, self.num_prefix, 0)))


class Truncated(Adapter):
    """`truncated`: the last two blocks that the features pass (and the final norm, if they pass it), and a linear layer
    of zeros."""

    own_blocks, new = 2, "head."
    positions = ViT.positions  # what the blocks of EVA02 and BEiT need to know

    def __init__(self, config: "VLMConfig"):
        super().__init__()
        self.config, self.first, self.checkpointing = config.vision, config.front.depth, False
        self.blocks = nn.ModuleList(Block(config.vision) for _ in range(self.own_blocks))
        norm = config.vision.final_norm if config.aligned else None
        self.norm = nn.Identity() if norm is None else nn.LayerNorm(config.vision.embed_dim, norm)
        self.head = zero(nn.Linear(config.vision.embed_dim, config.language.hidden_size))

    def start(self, source: ViT | Student) -> None:
        """The backbone's own blocks and norm."""
        backbone = source.encoder if isinstance(source, Student) else source
        for ours, theirs in zip(self.blocks, backbone.blocks[self.first :]):
            ours.load_state_dict(theirs.state_dict())
        if isinstance(self.norm, nn.LayerNorm):
            self.norm.load_state_dict(backbone.norm.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.blocks[0].norm1.weight.dtype)  # FSDP brings the weights in bf16, the frozen part is float32
        x = vit.run_blocks(self.blocks, x, self.positions(x.device), self.checkpointing)
        return self.head(self.norm(x))


def zero(layer: nn.Linear) -> nn.Linear:
    """The layer, all zeros: the image says nothing at first."""
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    return layer


ADAPTERS: dict[str, type[Adapter]] = {
    "mlp": MLP,
    "decoder": Decoder,
    "transformer": Transformer,
    "truncated": Truncated,
    "fused-mlp": FusedMLP,
}


# ----------------------------------------------------------------------------------------------------------------------
# The model


@dataclass(frozen=True)
class VLMConfig:
    """All that is needed to build the model. JSON-serializable with `asdict`; `from_json` reads that.

    Vision features: an aligned backbone's are its tokens after all blocks and the final norm, prefix tokens included. A
    baseline's are those before the last block, without the norm; of its prefix tokens each adapter knows.
    """

    adapter: str  # one of ADAPTERS
    aligned: bool
    vision: ViTConfig  # the whole backbone's; `front` is the part that stays frozen
    language: LlamaConfig
    second: ViTConfig | None = None  # of `fused-mlp`
    decoder: dict[str, object] | None = None  # depth, width and soft-cap of the aligned model's decoder
    template: Template = TEMPLATES["llama"]
    max_text: int = 2048  # ids of an example in training; image tokens come on top

    def __post_init__(self) -> None:
        if self.adapter not in ADAPTERS:
            raise VLMError(f"adapter {self.adapter!r}: choose one of {', '.join(ADAPTERS)}")
        if (self.second is not None) != (self.adapter == "fused-mlp"):
            raise VLMError(f"adapter {self.adapter}: a second backbone goes with fused-mlp, and only with it")
        if self.second and (self.second.image_size, self.second.grid) != (self.vision.image_size, self.vision.grid):
            first, second = (f"{c.grid}^2 patches of {c.image_size}^2 pixels" for c in (self.vision, self.second))
            raise VLMError(f"the backbones read {first} and {second}; load them at one image size with equal patches")
        if self.front.depth < 0:
            raise VLMError(f"adapter {self.adapter}: a backbone of {self.vision.depth} blocks is too shallow for it")
        if self.image_tokens + 1 >= self.language.max_position_embeddings:
            raise VLMError(
                f"{self.image_tokens} image tokens leave no room for text in the language model's context of "
                f"{self.language.max_position_embeddings}; take a longer context or a smaller image"
            )

    @property
    def front(self) -> ViTConfig:
        """The backbone as far as it is frozen."""
        own = ADAPTERS[self.adapter].own_blocks
        return cut(self.vision, int(not self.aligned) + own, norm=self.aligned and not own)

    @property
    def prefix(self) -> bool:
        """Whether the features include prefix tokens."""
        return ADAPTERS[self.adapter].prefix[self.aligned]

    @property
    def image_tokens(self) -> int:
        """M."""
        return self.vision.num_patches + self.prefix * self.vision.num_prefix

    @classmethod
    def from_json(cls, values: dict) -> "VLMConfig":
        """From what `asdict` gave and JSON may have stored. TypeError or KeyError: it is something else."""
        parts = dict(vision=ViTConfig, language=LlamaConfig, second=ViTConfig, template=Template)
        return cls(**values | {key: kind(**values[key]) for key, kind in parts.items() if values[key] is not None})


def cut(config: ViTConfig, blocks: int, norm: bool) -> ViTConfig:
    """A backbone without its last blocks, and with or without its final norm."""
    return replace(config, depth=config.depth - blocks, final_norm=config.final_norm if norm else None)


class VLM(nn.Module):
    """The model of a `VLMConfig`, randomly initialized; `build` makes one of pre-trained parts, `load` reads one.

    vision, second: the frozen part of the backbones. adapter. language: Llama.
    """

    def __init__(self, config: VLMConfig, tokenizer: Tokenizer):
        super().__init__()
        if tokenizer.vocab_size != config.language.vocab_size:
            raise VLMError(
                f"the tokenizer has {tokenizer.vocab_size} words, the language model {config.language.vocab_size}; "
                f"give the tokenizer.model that came with its weights"
            )
        self.config, self.tokenizer = config, tokenizer
        self.vision = ViT(config.front).requires_grad_(False)
        self.second = None
        if config.second:
            self.second = ViT(cut(config.second, 1, norm=False)).requires_grad_(False)  # always a baseline
        self.adapter = ADAPTERS[config.adapter](config)
        self.language = Llama(config.language)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that are trained, by name: the adapter's and the language model's."""
        return [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]

    def encode(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """Ids and labels for training, see the function `encode`. (Give data processes that one, not this method.)"""
        return encode(self.tokenizer, self.config.template, conversation, self.config.max_text)

    def prepare(self, image: Image.Image) -> Tensor:
        """Pixels, uint8 [3, H, W], see the function `prepare`."""
        return prepare(image, self.config.vision)

    # Training

    def forward(
        self, ids: Tensor, labels: Tensor, images: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """The summed loss of all labels, a float32 scalar; the caller divides by their number in the global batch.

        ids, labels: [B, T], padded on the right; a label of -100 is none.
        images: pixels, uint8 [B', 3, H, W]; None: the batch has none.
        rows: [B'], which of the B examples have the images, in their order; None: all.
        """
        if images is None:
            # A pass of an empty image, at weight 0: whatever other processes have in their batches, all do the same
            # exchanges with each other, and no parameter is without a gradient.
            nothing = self.see(ids.new_zeros(1, 3, *2 * [self.config.vision.image_size], dtype=torch.uint8))
            return self.language.loss(self.language.embed(ids), labels, reduction="sum") + 0 * nothing.float().sum()
        embeds, mask = self.join(ids, torch.ones_like(ids), self.see(images), rows)
        labels = insert(labels, labels.new_full((len(ids), self.config.image_tokens), IGNORE))
        if rows is not None:  # all padding to the right, where attention needs no mask
            embeds, labels = align(mask, False, embeds, labels)
        return self.language.loss(embeds, labels, reduction="sum")

    def see(self, images: Tensor) -> Tensor:
        """Pixels, uint8 [B, 3, H, W] -> image tokens for the language model, [B, M, E]."""
        with torch.no_grad():
            x = self.features(self.vision, images)  # [B, M, D]
            if self.second is not None:
                x = torch.cat([self.features(self.second, images), x], -1)  # [B, N, D1 + D2]
        return self.adapter(x)

    def features(self, backbone: ViT, images: Tensor) -> Tensor:
        """What a backbone makes of pixels: [B, M, D], with or without prefix tokens."""
        if images.dtype != torch.uint8:
            raise VLMError(f"the images are {images.dtype}; give pixels in uint8, as `prepare` makes them")
        x = backbone(vit.normalize(images, backbone.config).to(backbone.patch_embed.proj.weight.dtype))
        return x if self.config.prefix else x[:, backbone.config.num_prefix :]

    def join(self, ids: Tensor, mask: Tensor, image: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embeddings [B, S, E] of <s>, M places for an image, and the text, and the mask [B, S].

        ids, mask: [B, T], <s> in the first column. image: the image tokens [B', M, E] of the examples `rows` (see
        `forward`). Examples without an image have padding in its places.
        """
        x, B, M = self.language.embed(ids), len(ids), self.config.image_tokens
        rows = torch.arange(B, device=ids.device) if rows is None else rows
        image = x.new_zeros(B, M, x.shape[-1]).index_copy(0, rows, image.to(x.dtype))
        return insert(x, image), insert(mask, mask.new_zeros(B, M).index_fill(0, rows, 1))

    # Answers

    @torch.no_grad()
    def generate(
        self, images: Images, prompts: Sequence[Prompt], max_new_tokens: int = 128, temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> list[str]:  # fmt: skip
        """Answers to B prompts of any lengths, stripped; in float32 each is what the prompt gets alone.

        temperature: 0 takes the most likely word; else words are drawn, by the generator.
        VLMError: as many images as prompts are needed; a prompt longer than the context; an unreadable image.
        """
        if not prompts:
            return []
        embeds, mask, prefix = self.read(images, prompts)
        options = dict(max_new_tokens=max_new_tokens, temperature=temperature, generator=generator)
        texts = self.language.generate(embeds=embeds, mask=mask, stop=self.tokenizer.eos, prefix=prefix, **options)
        answers = [self.tokenizer.decode(text).strip() for text in texts]
        room = self.config.language.max_position_embeddings - embeds.shape[1] - (prefix[0].used if prefix else 0)
        for i, text in enumerate(texts):
            if len(text) == room < max_new_tokens and len(texts) > 1:  # the context ended it, behind the longest prompt
                answers[i] = self.generate([images[i]], [prompts[i]], **options)[0]
        return answers

    def stream(
        self, image: Image.Image | None, prompt: Prompt, max_new_tokens: int = 128, temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Iterator[str]:  # fmt: skip
        """The answer to one prompt in pieces, as they come. Arguments: see `generate`."""
        with torch.no_grad():
            embeds, mask, _ = self.read([image], [prompt])
        steps = self.language.stream(
            embeds=embeds, mask=mask, max_new_tokens=max_new_tokens, temperature=temperature, generator=generator,
            stop=self.tokenizer.eos,
        )  # fmt: skip
        yield from self.tokenizer.stream(step.item() for step in steps)

    @torch.no_grad()
    def score(
        self, images: Images, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """The probabilities of each prompt's choices, which sum to 1.

        A choice's probability is that of its first token as the next one, renormalized over the choices. Arguments and
        errors: see `generate`; also VLMError where choices are none, empty or begin with the same token.
        """
        if len(choices) != len(prompts):
            raise VLMError(f"{len(choices)} lists of choices for {len(prompts)} prompts; give one for each")
        firsts = [self.first_tokens(options) for options in choices]
        if not prompts:
            return []
        embeds, mask, prefix = self.read(images, prompts)
        cache = prefix and prefix[0].take(prefix[1], prefix[0].used + embeds.shape[1])
        last = torch.full((len(prompts), 1), embeds.shape[1] - 1, device=embeds.device)
        logits = self.language(embeds=embeds, mask=mask, cache=cache, positions=last)[:, 0].float().cpu()  # [B, W]
        return [row[first].softmax(0).tolist() for row, first in zip(logits, firsts)]

    def first_tokens(self, choices: Sequence[str]) -> list[int]:
        """The id that each choice begins with as an answer."""
        ids: dict[int, str] = {}
        for choice in choices:
            encoded = self.tokenizer.encode(self.config.template.piece(choice.strip(), turn=1))
            if not encoded:
                raise VLMError("a choice is empty; give each at least one word")
            if encoded[0] in ids:
                raise VLMError(
                    f"the choices {ids[encoded[0]]!r} and {choice!r} begin with the same token; word them differently"
                )
            ids[encoded[0]] = choice
        if not ids:
            raise VLMError("a prompt has no choices; give at least one")
        return list(ids)

    def read(
        self, images: Images, prompts: Sequence[Prompt]
    ) -> tuple[Tensor, Tensor, tuple[llama.Cache, Tensor] | None]:
        """Embeddings [B, S, E] of prompts with their images, padded on the left, the mask [B, S], and a prefix.

        An image that several prompts have (the same object) is seen once. Where there are two prompts or more for each, the
        language model, too, reads it once: it and <s> are the prefix then, see `Llama.stream`, and the embeddings are the
        text alone.
        """
        images = list(images)  # each taken out once, so that the same one is the same object
        if len(images) != len(prompts):
            raise VLMError(f"{len(images)} images for {len(prompts)} prompts; give one, or None, for each")
        context, M = self.config.language.max_position_embeddings, self.config.image_tokens
        texts = [self.prompt_ids(prompt) for prompt in prompts]
        lengths = [len(text) + (M if image else 0) for image, text in zip(images, texts)]
        for image, prompt, length in zip(images, prompts, lengths):
            if length >= context:
                raise VLMError(
                    f"the prompt {prompt!r:.40}... takes {length} tokens{f', {M} of them the image' if image else ''}, "
                    f"which leaves no room for an answer in the context of {context}; shorten it"
                )
        device = self.language.model.embed_tokens.weight.device
        distinct = {id(image): image for image in images}
        number = {key: n for n, key in enumerate(distinct)}
        which = torch.tensor([number[id(image)] for image in images], device=device)  # [B], of the D distinct ones
        begins, seen = self.begin(list(distinct.values()), device)
        ids, mask = (tensor.to(device) for tensor in Tokenizer.pad([text[1:] for text in texts]))
        text = self.language.embed(ids)
        longest, shortest = max(map(len, texts)), min(map(len, texts))
        if 2 * len(distinct) <= len(images) and M + longest == max(lengths) and shortest > 1:  # no row gets longer by it
            cache = llama.Cache(self.config.language, len(distinct), begins.shape[1], begins.dtype, device)
            self.language.hidden(begins, seen, cache)
            return text, mask, (cache, which)
        embeds, mask = torch.cat([begins[which], text], 1), torch.cat([seen[which], mask], 1)
        embeds, mask = align(mask, True, embeds, mask)
        return embeds[:, -max(lengths) :], mask[:, -max(lengths) :], None  # without columns of padding alone

    def begin(self, images: Images, device: torch.device) -> tuple[Tensor, Tensor]:
        """<s> and an image: embeddings [D, 1 + M, E] and mask, with padding for None; [D, 1, E] if there is no image."""
        ids = torch.full((len(images), 1), self.tokenizer.bos, device=device)
        rows = [i for i, image in enumerate(images) if image is not None]
        if not rows:
            return self.language.embed(ids), torch.ones_like(ids)
        tokens = self.see(torch.stack([self.prepare(images[i]) for i in rows]).to(device))
        return self.join(ids, torch.ones_like(ids), tokens, torch.tensor(rows, device=device))

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """<s> and the prompt in its template, up to where the answer begins."""
        turns = [{"from": "human", "value": prompt}] if isinstance(prompt, str) else prompt
        if len(turns) % 2 == 0:
            raise VLMError("a prompt must end with a question from human")
        return encode(self.tokenizer, self.config.template, turns)[0]


def insert(text: Tensor, image: Tensor) -> Tensor:
    """[B, T, ...] and [B, M, ...] -> [B, S, ...]: the image behind the first token, which is <s>."""
    return torch.cat([text[:, :1], image, text[:, 1:]], 1)


def align(mask: Tensor, left: bool, *tensors: Tensor) -> list[Tensor]:
    """Tensors [B, S] or [B, S, E] with each example's padding (where the mask is 0) moved to the left or the right."""
    order = mask.argsort(dim=1, descending=not left, stable=True)  # [B, S]
    rows = torch.arange(len(mask), device=mask.device)[:, None]
    return [tensor[rows, order] for tensor in tensors]


# ----------------------------------------------------------------------------------------------------------------------
# From pre-trained parts


def load_vision(path: str | Path, config: str | ViTConfig | None = None) -> ViT | Student:
    """A backbone for `build`: a whole aligned model where the file holds one, else what `vit.load` makes of it.

    Errors: vit.WeightsError.
    """
    file = vit.WeightFile(path)
    aligned = "maskembed" in file.metadata or "decoder.pos_embed" in file.names
    return (maskembed.load if aligned else vit.load)(path, config)


def build(
    vision: ViT | Student, language: Llama, tokenizer: Tokenizer, adapter: str, second: ViT | None = None,
    template: Template = TEMPLATES["llama"], max_text: int = 2048,
) -> VLM:  # fmt: skip
    """A model of pre-trained parts, with the adapter as it is before training.

    vision: an aligned model (`maskembed.load`), or a plain backbone as a baseline (`vit.load`). Its frozen part and the
        language model become parts of the VLM as they are, what the adapter takes over is copied.
    second: `fused-mlp`'s, DINOv2 in the paper, loaded at the image size of the first.
    max_text: lowered to what the language model's context has room for beside an image.
    VLMError: parts that do not fit together.
    """
    aligned = isinstance(vision, Student)
    whole = aligned and isinstance(vision.decoder, maskembed.Decoder) and isinstance(vision.head, nn.Linear)
    if adapter == "decoder" and not whole:
        what = "this one was aligned without them" if aligned else "this is a plain one"
        raise VLMError(
            f"adapter decoder: needs an aligned backbone with its head and decoder, and {what}; "
            f"give what train_align.py wrote, or take another adapter"
        )
    backbone = vision.encoder if aligned else vision
    config = VLMConfig(
        adapter, aligned, backbone.config, language.config, second.config if second else None,
        vision.decoder.options if adapter == "decoder" else None, template,
    )  # fmt: skip
    room = language.config.max_position_embeddings - config.image_tokens
    with torch.device("meta"):  # no memory and no time for values that are replaced
        model = VLM(replace(config, max_text=min(max_text, room)), tokenizer)
    for ours, theirs in ((model.vision, backbone), (model.second, second)):
        if ours is not None:
            state = theirs.state_dict()
            ours.load_state_dict({name: state[name] for name in ours.state_dict()}, assign=True)
    model.language = language
    model.adapter = ADAPTERS[adapter](model.config)
    model.adapter.start(vision)
    return model.eval()


# ----------------------------------------------------------------------------------------------------------------------
# Files


def save(model: VLM, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
    """Write config.json, model.safetensors and tokenizer.model. A VLM that is there already is replaced.

    All three are complete under temporary names before the first is moved into place.
    state: the parameters by name, where those of the model itself are spread over processes.
    VLMError: the folder holds something else. OSError: it cannot be written.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        read_config(folder)
    elif folder.exists() and (not folder.is_dir() or any(folder.glob("[!.]*"))):  # a killed run leaves hidden files
        raise VLMError(f"{folder}: is there already and no VLM; name a new folder")
    own = dict(model.named_parameters())
    state = {name: (own if state is None else state)[name] for name in own}  # tied layers once
    contents = {
        "config.json": json.dumps(asdict(model.config), indent=2).encode(),
        "tokenizer.model": model.tokenizer.pieces.serialized_model_proto(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f".new.{name}" for name in (*contents, "model.safetensors")}
    try:
        for name, content in contents.items():
            temporary[name].write_bytes(content)
        vit.save_tensors(state, temporary["model.safetensors"], {})
        for name, file in temporary.items():
            file.replace(folder / name)
    finally:
        for file in temporary.values():
            file.unlink(missing_ok=True)


def read_config(folder: str | Path) -> VLMConfig:
    """The config of a VLM's folder. VLMError: it is none."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise VLMError(f"{folder}: holds no VLM (no config.json); give a folder that vlm.save or train_vlm.py wrote")
    values = llama.read_json(folder / "config.json")
    try:
        return VLMConfig.from_json(values)
    except (TypeError, KeyError):
        raise VLMError(
            f"{folder / 'config.json'}: is no VLM's, or another version's; give a folder that train_vlm.py wrote"
        ) from None


@torch.no_grad()
def load(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", pack: bool = False
) -> VLM:
    """A model with the weights of a folder, in evaluation mode. The file is mapped: there is no second copy.

    pack: arrange the language model for fast answers on a CPU (`llama.pack`; needs oneDNN, else nothing is done); it can
        no longer be trained or saved.
    Errors: VLMError, llama.LlamaError and vit.WeightsError, which name the file and what is wrong with it.
    """
    folder = Path(folder)
    config = read_config(folder)
    tokenizer = Tokenizer(folder, config.language.vocab_size)
    with torch.device("meta"):
        model = VLM(config, tokenizer).to(dtype)
    model.to_empty(device=device).language.tie()
    fill(model, open_weights(folder))
    if pack and torch.backends.mkldnn.is_available():
        llama.pack(model.language)
    return model.eval()


def open_weights(folder: Path) -> vit.WeightFile:
    """The weights in a VLM's folder."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise VLMError(f"{path}: is missing; copy the whole folder that train_vlm.py wrote")
    return vit.WeightFile(path)


def fill(model: VLM, file: vit.WeightFile) -> None:
    """Copy a file's tensors into a model's parameters; VLMError if they are not this model's."""
    parameters, other = dict(model.named_parameters()), "the file or the config.json is another model's"
    if odd := parameters.keys() ^ set(file.names):
        what = "is missing" if min(odd) in parameters else "has no place in the model"
        raise VLMError(f"{file.path}: tensor {min(odd)} {what}; {other}")
    for name, parameter in sorted(parameters.items(), key=lambda item: -item[1].numel()):
        value = file[name]  # the largest first: little is mapped when the most is read
        if value.shape != parameter.shape:
            raise VLMError(
                f"{file.path}: tensor {name} is {list(value.shape)}, not {list(parameter.shape)}; {other}"
            )
        parameter.copy_(value)


def export(folder: str | Path, target: str | Path) -> None:
    """The language model of a VLM's folder, in a new folder in transformers' layout, with its tokenizer.

    The dtype stays. Errors: as in `load`; LlamaError: the target is there already.
    """
    folder = Path(folder)
    config, file = read_config(folder), open_weights(folder)
    prefix = "language."
    names = [name.removeprefix(prefix) for name in file.names if name.startswith(prefix)]
    with llama.new_folder(target) as temporary:
        llama.write_transformers(temporary, config.language, names, lambda name: file[prefix + name])
        shutil.copyfile(folder / "tokenizer.model", temporary / "tokenizer.model")


# ----------------------------------------------------------------------------------------------------------------------
# The command


def main(argv: list[str] | None = None) -> None:
    """The command; its help is `python vlm.py --help`."""
    parser = argparse.ArgumentParser(description="Ask a vision-language model about an image.")
    parser.add_argument("model", help="folder of a VLM")
    parser.add_argument("image", nargs="?", help="image file; - for a question without an image")
    parser.add_argument("question", nargs="?")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="the longest answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the most likely word")
    parser.add_argument("--seed", type=int, default=0, help="of the words drawn at a temperature")
    parser.add_argument("--export", metavar="FOLDER", help="write the language model in transformers' layout instead")
    args = parser.parse_args(argv)
    if (args.export is None) == (args.question is None) or args.export and args.image:
        parser.error("give an image and a question, or --export and neither")
    if args.max_new_tokens < 1 or args.temperature < 0:
        parser.error("--max-new-tokens must be at least 1, --temperature at least 0")
    try:
        if args.export:
            export(args.model, args.export)
            print(f"{args.export}: the language model, in transformers' layout")
        else:
            answer(args)
    except (VLMError, LlamaError, WeightsError, OSError) as error:
        sys.exit(f"vlm.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def answer(args: argparse.Namespace) -> None:
    """Print the answer as it comes."""
    image = None if args.image == "-" else open_image(args.image)
    if torch.cuda.is_available():
        model = load(args.model, torch.bfloat16, "cuda")
    else:
        model = load(args.model, pack=True)
    generator = torch.Generator(model.language.model.embed_tokens.weight.device).manual_seed(args.seed)
    for piece in model.stream(image, args.question, args.max_new_tokens, args.temperature, generator):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
