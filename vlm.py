"""The vision-language model: a language model reads an image's tokens as if they were words (section 5, appendix D).

    image ---> vision (frozen) ---> adapter ------------+
                                                        v
    "In: {question}\\nOut:" ---> word embeddings ---> <s> image text ---> language ---> "{answer}</s>"

The design is LLaVA's. The image tokens follow <s>, then comes the text; a sample without an image has none. The adapter
and the language model are trained on the answers, in one stage. This file needs vit, maskembed, llama and decode.py.

    model = vlm.load("runs/vlm/model")
    model.generate([image, None], ["What is left of the ring?", "What is a ring?"])

    python vlm.py MODEL IMAGE "What is left of the ring?"       # prints the answer as it is generated

A model that was trained to point (decode.py) answers with triplets, and `ground` finds the places they mean.

Shapes: B batch, T text length, N patches, P prefix tokens, M image tokens (N or P + N), S = M + T, D the backbone's
width, E the language model's width, W the vocabulary size.
"""

import argparse
import json
import math
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

import decode
import llama
import maskembed
import vit
from decode import Pointer, PointerConfig, Triplet
from llama import IGNORE, Llama, LlamaConfig, Tokenizer
from maskembed import Student
from vit import Block, ViT, ViTConfig

Conversation = list[dict[str, str]]  # LLaVA's format: {"from": "human" or "gpt", "value": text}, taking turns
Prompt = str | Conversation  # a question, which the template wraps, or a conversation that ends with a question
Images = Sequence[Image.Image | None]  # an image or None for each prompt
Regions = Sequence[Sequence] | None  # for each prompt, one for each <region> in it, in pixels (decode.region)


# --- prompts and images -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Template:
    """The text around questions and answers. `</s>` is the special token, and only ends an answer."""

    question: str = "In: {question}\nOut:"
    answer: str = "{answer}</s>"
    system: str = ""  # before the first question

    def piece(self, message: str, turn: int) -> str:
        """A message with the text around it, without </s>: a question where `turn` (from 0) is even, else an answer."""
        question = (self.system if turn == 0 else "") + self.question.replace("{question}", message)
        text = self.answer.removesuffix("</s>").replace("{answer}", message) if turn % 2 else question
        return text.removeprefix(" ")  # the tokenizer begins each piece with a space of its own


TEMPLATES: dict[str, Template] = {
    "llama": Template(),  # the paper's, for the Llama 2 base model
    "vicuna": Template(  # v1.5
        "USER: {question} ASSISTANT:", " {answer}</s>",
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
    ),
}


def encode(tokenizer: Tokenizer, template: Template, conversation: Conversation,
           max_text: int | None = None, plan: bool = False) -> tuple[list[int], list[int]]:
    """A conversation as ids, <s> first, and labels: the ids themselves in answers and their </s>, elsewhere -100.

    "<image>" is removed from each message, which is then stripped. The pieces that the template makes of them are
    tokenized one by one, so an answer starts with its own word-initial token. Both lists are cut to `max_text` ids, and
    empty where that cuts off a <REF> or <region> (which takes ten). plan: answers begin with decode.plan.
    ValueError: the turns do not alternate, human first."""
    ids, labels = [tokenizer.bos], [IGNORE]
    for turn, message in enumerate(conversation):
        answer = turn % 2 == 1
        role = "gpt" if answer else "human"
        if message.get("from") != role or not isinstance(message.get("value"), str):
            raise ValueError(f"turn {turn + 1} of a conversation is not text from {role}; they take turns, human first")
        text = message["value"].replace("<image>", "").strip()
        piece = template.piece(decode.plan(text) if plan and answer else text, turn)
        if decode.REGION in tokenizer.added:
            piece = piece.replace(decode.REGION, decode.REGION * decode.TOKENS)
        piece = tokenizer.encode(piece, eos=answer)
        ids += piece
        labels += piece if answer else [IGNORE] * len(piece)
    if {tokenizer.added.get(decode.REF), tokenizer.added.get(decode.REGION)} & set(ids[len(ids[:max_text]) :]):
        return [], []
    return ids[:max_text], labels[:max_text]


def prepare(image: Image.Image, config: ViTConfig) -> Tensor:
    """Any PIL image, squeezed to the square that the backbone reads -> uint8 [3, H, W]. ValueError: it is damaged."""
    try:  # Pillow reads a file only when its pixels are needed
        pixels = np.array(vit.fit(image, config, square=True))
    except Exception as error:  # a damaged file can fail in any way
        name = getattr(image, "filename", "") or "an image"
        raise ValueError(f"{name}: cannot be read as an image ({error or type(error)}); give another file") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


# --- adapters (figure 11): from vision features [B, M, D] to image tokens [B, M, E] -----------------------------------
#
# Features:     of an aligned backbone,                of a baseline,
#               after all blocks and the final norm    before the last block, without the norm
# mlp           prefix tokens and patches              patches
# decoder       prefix tokens and patches              -
# transformer   prefix tokens and patches              prefix tokens and patches
# truncated     prefix tokens and patches              prefix tokens and patches; it owns the last two blocks they pass
# fused-mlp     patches                                patches; both after those of a second backbone, a baseline


class MLP(nn.Sequential):
    """`mlp`, the usual adapter: linear D -> E, GELU, linear E -> E."""

    def __init__(self, config: "VLMConfig"):
        D, E = config.vision.embed_dim, config.language.hidden_size
        super().__init__(nn.Linear(D, E), nn.GELU(), nn.Linear(E, E))


class FusedMLP(nn.Sequential):
    """`fused-mlp` (figure 13): features of two backbones side by side, D = D1 + D2 channels, three linear layers."""

    def __init__(self, config: "VLMConfig"):
        D, E = config.second.embed_dim + config.vision.embed_dim, config.language.hidden_size
        super().__init__(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, E), nn.GELU(), nn.Linear(E, E))


class TransformerAdapter(nn.Module):
    """`transformer`: the layers of MaskEmbed's encoder head and decoder, from scratch."""

    def __init__(self, config: "VLMConfig"):
        super().__init__()
        options = config.decoder or {}
        self.decoder = maskembed.Decoder(config.vision, options.get("depth", 2), options.get("width"))
        width = self.decoder.options["width"]
        self.head = nn.Linear(config.vision.embed_dim, width)
        self.decoder.head = nn.Linear(width, config.language.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.head(x))


class DecoderAdapter(TransformerAdapter):
    """`decoder` (section 5.1): an aligned model's own encoder head and decoder, with a new last layer of zeros. Prefix
    tokens are hidden from the decoder, as in its training."""

    def __init__(self, config: "VLMConfig"):
        super().__init__(config)
        self.num_prefix = config.vision.num_prefix
        for parameter in self.decoder.head.parameters():
            nn.init.zeros_(parameter)

    def start(self, student: Student) -> None:
        """Copy the aligned model's head, and its decoder but for the last layer."""
        self.head.load_state_dict(student.head.state_dict())
        new = self.decoder.head.state_dict(prefix="head.")
        self.decoder.load_state_dict(student.decoder.state_dict() | new)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x[:, self.num_prefix :])  # [B, N, width]
        return self.decoder(F.pad(x, (0, 0, self.num_prefix, 0)))


class Truncated(nn.Module):
    """`truncated`: the last two blocks that the features pass, the norm if they pass it, a linear layer of zeros."""

    def __init__(self, config: "VLMConfig"):
        super().__init__()
        self.config, self.first, self.checkpointing = config.vision, config.frozen.depth, False
        D, eps = config.vision.embed_dim, config.vision.final_norm if config.aligned else None
        self.blocks = nn.ModuleList([Block(config.vision), Block(config.vision)])
        self.norm = nn.Identity() if eps is None else nn.LayerNorm(D, eps)
        self.head = nn.Linear(D, config.language.hidden_size)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def start(self, backbone: ViT) -> None:
        """Copy the backbone's own blocks and norm."""
        for ours, theirs in zip(self.blocks, backbone.blocks[self.first :]):
            ours.load_state_dict(theirs.state_dict())
        if isinstance(self.norm, nn.LayerNorm):
            self.norm.load_state_dict(backbone.norm.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        x = vit.run_blocks(self.blocks, x, vit.block_positions(self.config, x.device), self.checkpointing)
        return self.head(self.norm(x))


ADAPTERS: dict[str, type[nn.Module]] = {
    "mlp": MLP, "decoder": DecoderAdapter, "transformer": TransformerAdapter, "truncated": Truncated,
    "fused-mlp": FusedMLP}


# --- the model --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class VLMConfig:
    """Everything needed to build the model; config.json holds it. ValueError: the parts do not fit together."""

    adapter: str  # one of ADAPTERS
    aligned: bool  # whether the backbone is aligned
    vision: ViTConfig  # of the whole backbone; `frozen` is the part that stays frozen
    language: LlamaConfig
    second: ViTConfig | None = None  # the second backbone of `fused-mlp`
    decoder: dict[str, object] | None = None  # the options of the aligned model's decoder, for `decoder`
    template: Template = TEMPLATES["llama"]
    max_text: int = 2048  # ids of a sample in training; image tokens come on top
    feature_scale: float = 1.0  # multiplies the vision features; 1 in the paper
    pointer: PointerConfig | None = None  # for a model that points
    added: Sequence[str] = ()  # tokens behind those of tokenizer.model: decode.ADDED of a model that points

    def __post_init__(self) -> None:
        first, second, context = self.vision, self.second, self.language.max_position_embeddings
        if self.adapter not in ADAPTERS:
            raise ValueError(f"adapter {self.adapter!r}: choose one of {', '.join(ADAPTERS)}")
        if (second is not None) != (self.adapter == "fused-mlp"):
            raise ValueError(f"adapter {self.adapter}: give a second backbone with fused-mlp, and only with it")
        if second and (first.image_size, first.grid) != (second.image_size, second.grid):
            sizes = " and ".join(f"{c.grid}^2 patches of {c.image_size}^2 pixels" for c in (first, second))
            raise ValueError(f"the backbones read {sizes}; give two with equal image sizes and grids")
        if self.image_tokens + 1 >= context:
            raise ValueError(f"{self.image_tokens} image tokens leave no room for text in the language model's context "
                             f"of {context}; give a longer context or a smaller image")

    @property
    def frozen(self) -> ViTConfig:
        """The frozen part of the backbone: all of an aligned one, a baseline without its last block and final norm;
        `truncated` takes the last two of these blocks, and the norm."""
        own = 2 if self.adapter == "truncated" else 0
        norm = self.vision.final_norm if self.aligned and not own else None
        return replace(self.vision, depth=self.vision.depth - own - (not self.aligned), final_norm=norm)

    @property
    def prefix(self) -> bool:
        """Whether the features include prefix tokens."""
        return {"mlp": self.aligned, "fused-mlp": False}.get(self.adapter, True)

    @property
    def image_tokens(self) -> int:
        """M."""
        return self.vision.num_patches + self.prefix * self.vision.num_prefix


class VLM(nn.Module):
    """The model of a `VLMConfig`, randomly initialized. `vision` and `second` are frozen, the rest is trained."""

    def __init__(self, config: VLMConfig, tokenizer: Tokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.vision = ViT(config.frozen).requires_grad_(False)
        self.second = None
        if config.second:  # a baseline: without its last block and final norm
            second = replace(config.second, depth=config.second.depth - 1, final_norm=None)
            self.second = ViT(second).requires_grad_(False)
        self.adapter = ADAPTERS[config.adapter](config)
        self.language = Llama(config.language)
        self.pointer = Pointer(config.pointer) if config.pointer else None

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """What the frozen backbone says of pixels: uint8 [B, 3, H, W] -> [B, M, D]."""
        features = []
        for backbone in filter(None, (self.second, self.vision)):
            x = backbone(vit.normalize(images, backbone.config).to(backbone.patch_embed.proj.weight.dtype))
            features.append(x if self.config.prefix else x[:, backbone.config.num_prefix :])  # of [B, P + N, D]
        return self.config.feature_scale * torch.cat(features, -1)

    def encode_images(self, features: Tensor) -> Tensor:
        """`features` of images -> image tokens for the language model: [B, M, D] -> [B, M, E]."""
        return self.adapter(features.to(next(self.adapter.parameters()).dtype))  # bf16 where FSDP gathers weights in it

    def patches(self, features: Tensor) -> Tensor:
        """Those of the patches, without prefix tokens, for the decoder: [B, M, D] -> [B, N, D]."""
        return features[:, -self.config.vision.num_patches :].to(next(self.adapter.parameters()).dtype)

    def embed(self, ids: Tensor, rows: Sequence[int] = (), regions: Sequence[Tensor] = (),
              patches: Tensor | None = None) -> Tensor:
        """Token embeddings [B, T, E]. rows: the samples whose <region>s are more than text. regions: for each of these
        <region>s the share of each patch inside, [N]; patches: of its image, [r, N, D]."""
        x = self.language.embed(ids)
        if len(regions):
            inside = torch.zeros_like(ids, dtype=torch.bool)
            inside[rows] = ids[rows] == self.tokenizer.added[decode.REGION]
            tokens = self.pointer.prompts(torch.stack(list(regions)).to(x.device), patches)  # [r, 10, E]
            x = x.masked_scatter(inside[..., None], tokens.to(x.dtype))
        return x

    def join(self, x: Tensor, mask: Tensor, tokens: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embeddings [B, S, E] of <s>, M places for an image, and the text; and their mask [B, S].

        x, mask: [B, T, E] and [B, T], <s> in the first column. tokens: [B', M, E], the image tokens of the samples
        `rows` (see `forward`). The other samples have padding in these places."""
        B, M = len(x), self.config.image_tokens
        rows = torch.arange(B, device=x.device) if rows is None else rows
        image = x.new_zeros(B, M, x.shape[-1]).index_copy(0, rows, tokens.to(x.dtype))
        return insert(x, image), insert(mask, mask.new_zeros(B, M).index_fill(0, rows, 1))

    def forward(self, ids: Tensor, labels: Tensor, images: Tensor | None = None, rows: Tensor | None = None,
                places: Sequence[decode.Places | None] = ()) -> Tensor:
        """The summed losses, float32 [1 + units]: of all labels, and of the places of each unit (decode.py). The caller
        divides each by its number in the global batch.

        ids, labels: [B, T], padded on the right; labels of -100 do not count.
        images: pixels, uint8 [B', 3, H, W], or their features; None: the batch has no image.
        rows: [B'], the samples that the images belong to, in the order of the images; None: all B, in order.
        places: what each sample points at; empty: none does."""
        if images is not None and images.dtype == torch.uint8:
            images = self.features(images)
        pointing = [(row, one) for row, one in enumerate(places) if one]
        refs = torch.zeros_like(ids, dtype=torch.bool)  # the <REF>s whose hidden states are queries to the decoder
        if not pointing:
            x = self.embed(ids)
        else:
            image_of = {row: i for i, row in enumerate(range(len(ids)) if rows is None else rows.tolist())}
            patches = self.patches(images)
            regions = [(image_of[row], region) for row, one in pointing for region in one.regions]
            mine = [row for row, _ in pointing]  # in other samples, <REF> and <region> are mere text
            x = self.embed(ids, mine, [region for _, region in regions], patches[[i for i, _ in regions]])
            refs[mine] = ids[mine] == self.tokenizer.added[decode.REF]
        if images is not None:
            x, mask = self.join(x, torch.ones_like(ids), self.encode_images(images), rows)
            blank = labels.new_full((len(ids), self.config.image_tokens), IGNORE)
            labels, refs = insert(labels, blank), insert(refs, blank == 0)
            if rows is not None:  # all padding moves to the right, where attention needs no mask
                x, labels, refs = move_padding(mask, False, x, labels, refs)
        x = self.language.hidden(x)
        losses = torch.stack([self.language.summed_loss(x, labels)])
        if targets := [(image_of[row], *triplet) for row, one in pointing for triplet in one.triplets]:
            of, units, places = zip(*targets)
            states = x[refs].split(list(map(len, places)))  # of the <REF>s of each triplet, [n, E]
            losses = torch.cat([losses, self.pointer.loss(states, patches, of, units, places)])
        elif self.pointer:
            losses = F.pad(losses, (0, len(self.config.pointer.units)))
        unused = [self.adapter] if images is None else []
        for part in unused + ([self.pointer] if self.pointer else []):
            losses = losses + 0 * sum(p.sum() for p in part.parameters())  # each has a gradient, on all processes alike
        return losses

    def read(self, images: Images, prompts: Sequence[Prompt], regions: Regions = None,
             answers: Sequence[list[int]] | None = None) -> tuple[Tensor, Tensor]:
        """Embeddings [B, S, E] of prompts with their images, and ids of answers, padded on the left, and their mask
        [B, S]. An image that several prompts share (the same object) is encoded once."""
        images = list(images)  # one look at each: a sequence that opens its files would give new objects the next time
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images for {len(prompts)} prompts; give one image, or None, for each")
        turns = [[{"from": "human", "value": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
        texts = [encode(self.tokenizer, self.config.template, conversation)[0] for conversation in turns]
        regions = regions or [()] * len(texts)
        for text, inside in zip(texts, regions):
            if (count := text.count(self.tokenizer.added.get(decode.REGION, -1)) // decode.TOKENS) != len(inside):
                raise ValueError(f"{len(inside)} regions for {count} {decode.REGION}; give one for each in the prompt")
        texts = [text + answer for text, answer in zip(texts, answers or [[]] * len(texts))]
        lengths = [len(text) + self.config.image_tokens * (image is not None) for image, text in zip(images, texts)]
        longest, context = max(lengths), self.config.language.max_position_embeddings
        if longest >= context and not answers:
            prompt = f"the prompt {prompts[lengths.index(longest)]!r:.40}... takes {longest} tokens with its image"
            raise ValueError(f"{prompt}, which leaves no room for an answer in the context of {context}; shorten it")
        device = self.language.model.embed_tokens.weight.device
        ids, mask = (tensor.to(device) for tensor in Tokenizer.pad(texts, left=False))
        rows = [i for i, image in enumerate(images) if image is not None]
        if rows:
            distinct = {id(images[i]): images[i] for i in rows}
            which = [list(distinct).index(id(images[i])) for i in rows]
            pixels = [prepare(image, self.config.vision) for image in distinct.values()]
            size = 2 ** math.ceil(math.log2(len(pixels)))  # of the batch: few shapes to compile
            pixels += pixels[:1] * (size - len(pixels))
            features = self.features(torch.stack(pixels).to(device))
            inside = [decode.region(region, vit.upright(images[i]).size, self.config.vision.grid)
                      for i in rows for region in regions[i]]
            of = [n for n, i in zip(which, rows) for _ in regions[i]]
            embeds = self.embed(ids, rows, inside, self.patches(features)[of])
            tokens = self.encode_images(features)[which]  # [B', M, E]
            embeds, mask = self.join(embeds, mask, tokens, torch.tensor(rows, device=device))
        else:
            embeds = self.language.embed(ids)
        embeds, mask = move_padding(mask, True, embeds, mask)
        return embeds[:, -longest:], mask[:, -longest:]  # without columns that are all padding

    def generate(self, images: Images, prompts: Sequence[Prompt], max_new_tokens: int = 128, temperature: float = 0.0,
                 generator: torch.Generator | None = None, regions: Regions = None) -> list[str]:
        """Answers to B prompts of any lengths, stripped. In float32 each answer is the one that the prompt gets alone.

        temperature: 0 takes the most likely token; otherwise tokens are sampled with the generator.
        ValueError: not one image (or None) for each prompt; a prompt longer than the context; an unreadable image."""
        texts = self.answer(images, prompts, regions, max_new_tokens, temperature, generator)
        return [self.tokenizer.decode(text).strip() for text in texts]

    @torch.no_grad()
    def answer(self, images: Images, prompts: Sequence[Prompt], regions: Regions, max_new_tokens: int,
               temperature: float = 0.0, generator: torch.Generator | None = None) -> list[list[int]]:
        """The ids of the answers. Arguments: see `generate`."""
        embeds, mask = self.read(images, prompts, regions)
        options = dict(max_new_tokens=max_new_tokens, temperature=temperature, generator=generator)
        texts = self.language.generate(embeds=embeds, mask=mask, stop=self.tokenizer.eos, **options)
        room = self.config.language.max_position_embeddings - embeds.shape[1]
        for i, text in enumerate(texts):
            if len(text) == room < max_new_tokens and len(texts) > 1:  # the context ended it, behind the longest prompt
                texts[i] = self.answer([images[i]], [prompts[i]], regions and [regions[i]], **options)[0]
        return texts

    @torch.no_grad()
    def ground(self, images: Images, prompts: Sequence[Prompt], max_new_tokens: int = 256,
               regions: Regions = None) -> list[tuple[str, list[Triplet]]]:
        """Answers, each with the triplets in it and their places in pixels of the image (which is turned upright).

        An answer that points is read once more with its prompt, as in training, for its states at the <REF>s.
        Arguments and errors: see `generate`. ValueError: the model was not trained to point."""
        if not self.pointer:
            raise ValueError("this model has no decoders for places; train one with train_vlm.py --units box,mask")
        ids, ref = self.answer(images, prompts, regions, max_new_tokens), self.tokenizer.added[decode.REF]
        found = [(text := self.tokenizer.decode(answer).strip(), decode.read(text)) for answer in ids]
        if not (pointing := [i for i, (_, triplets) in enumerate(found) if triplets and images[i]]):
            return found
        pick = lambda each: each and [each[i] for i in pointing]
        x = self.language.hidden(*self.read(pick(images), pick(prompts), pick(regions), pick(ids)))  # [B', S, E]
        pixels = torch.stack([prepare(images[i], self.config.vision) for i in pointing])
        patches = self.patches(self.features(pixels.to(x.device)))
        for n, i in enumerate(pointing):
            states = x[n, -len(ids[i]) :][torch.tensor(ids[i], device=x.device) == ref]
            found[i] = found[i][0], [
                triplet._replace(places=self.pointer.find(triplet, states, patches[n], vit.upright(images[i]).size))
                for triplet in found[i][1]
            ]
        return found

    def stream(self, image: Image.Image | None, prompt: Prompt, max_new_tokens: int = 128, temperature: float = 0.0,
               generator: torch.Generator | None = None) -> Iterator[str]:
        """The answer to one prompt in pieces, as they are generated. Arguments and errors: see `generate`."""
        with torch.no_grad():
            embeds, mask = self.read([image], [prompt])
        options = dict(max_new_tokens=max_new_tokens, temperature=temperature, generator=generator)
        steps = self.language.stream(embeds=embeds, mask=mask, stop=self.tokenizer.eos, **options)
        yield from self.tokenizer.stream(step.item() for step in steps)

    @torch.no_grad()
    def score(self, images: Images, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]]) -> list[list[float]]:
        """The probabilities of each prompt's choices, which sum to 1.

        A choice's probability is that of its first token as the next token, renormalized over the choices. Arguments
        and errors: see `generate` and `first_tokens`."""
        firsts = [self.first_tokens(options) for options in choices]
        embeds, mask = self.read(images, prompts)
        last = torch.full((len(prompts), 1), embeds.shape[1] - 1, device=embeds.device)
        logits = self.language(embeds=embeds, mask=mask, positions=last)[:, 0].float().cpu()  # [B, W]
        llama.check_finite(logits)
        return [row[first].softmax(0).tolist() for row, first in zip(logits, firsts, strict=True)]

    def first_tokens(self, choices: Sequence[str]) -> list[int]:
        """The id that each choice begins with as an answer. ValueError: one is empty, or two begin with the same id."""
        words = [self.config.template.piece(choice.strip(), turn=1) for choice in choices]
        firsts = [self.tokenizer.encode(word)[:1] for word in words]
        if not words or [] in firsts:
            raise ValueError(f"the choices {list(choices)} are empty, or one of them is; give each at least one word")
        if same := [choice for choice, first in zip(choices, firsts) if firsts.count(first) > 1]:
            raise ValueError(f"the choices {same} begin with the same token; word them differently")
        return sum(firsts, [])


def insert(text: Tensor, image: Tensor) -> Tensor:
    """[B, T, ...] and [B, M, ...] -> [B, S, ...]: the image after the first token, which is <s>."""
    return torch.cat([text[:, :1], image, text[:, 1:]], 1)


def move_padding(mask: Tensor, left: bool, *tensors: Tensor) -> list[Tensor]:
    """Tensors [B, S] or [B, S, E] with each sample's padding (where the mask is 0) moved to the left or the right."""
    order = mask.argsort(dim=1, descending=not left, stable=True)  # [B, S]
    rows = torch.arange(len(mask), device=mask.device)[:, None]
    return [tensor[rows, order] for tensor in tensors]


# --- building from pre-trained parts ----------------------------------------------------------------------------------

def load_vision(path: str | Path, config: str | ViTConfig | None = None) -> ViT | Student:
    """A backbone for `build`: the whole aligned model if the file holds one, else the backbone alone."""
    aligned = "maskembed" in vit.read_tensors(path)[1]
    return (maskembed.load if aligned else vit.load)(path, config)


def build(vision: ViT | Student, language: Llama, tokenizer: Tokenizer, adapter: str, second: ViT | None = None,
          template: Template = TEMPLATES["llama"], max_text: int = 2048, feature_scale: float = 1.0,
          units: Sequence[str] = (), **pointer: int) -> VLM:
    """A model of pre-trained parts, with the adapter as it is before training.

    vision: an aligned model (`maskembed.load`), or a plain backbone as a baseline (`vit.load`). Its frozen part and the
        language model become parts of the VLM, uncopied; the adapter copies what it starts from.
    second: the second backbone of `fused-mlp` (DINOv2 in the paper). ValueError: the parts do not fit together.
    max_text: lowered to what an image leaves of the language model's context.
    units: what the model learns to point with (decode.UNITS). pointer: more options of decode.PointerConfig."""
    aligned = isinstance(vision, Student)
    backbone = vision.encoder if aligned else vision
    if adapter == "decoder" and not (aligned and isinstance(vision.decoder, maskembed.Decoder)):
        what = "was aligned without a decoder" if aligned else "is not aligned"
        raise ValueError(f"adapter decoder: needs an aligned backbone with its decoder, and this one {what}; give a "
                         "file that train_align.py wrote, or choose another adapter")
    D = backbone.config.embed_dim + (second.config.embed_dim if second else 0)
    shape = dict(vision=D, language=language.config.hidden_size, grid=backbone.config.grid)
    config = VLMConfig(adapter, aligned, backbone.config, language.config, second.config if second else None,
                       vision.decoder.options if adapter == "decoder" else None, template,
                       pointer=PointerConfig(units, **shape, **pointer) if units else None, added=[*tokenizer.added])
    room = language.config.max_position_embeddings - config.image_tokens
    with torch.device("meta"):  # no memory and no time for values that are replaced
        model = VLM(replace(config, max_text=min(max_text, room), feature_scale=feature_scale), tokenizer)
    for ours, theirs in ((model.vision, backbone), (model.second, second)):
        if ours is not None:
            state = theirs.state_dict()
            ours.load_state_dict({name: state[name] for name in ours.state_dict()}, assign=True)
    model.language = language
    model.adapter = ADAPTERS[adapter](model.config)
    model.pointer = Pointer(model.config.pointer) if units else None
    if adapter in ("decoder", "truncated"):
        model.adapter.start(vision if adapter == "decoder" else backbone)
    return model.eval()


# --- files ------------------------------------------------------------------------------------------------------------

def save(model: VLM, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
    """Write config.json, model.safetensors and tokenizer.model. A VLM that is in the folder already is replaced.

    All three are complete in a hidden folder before the first is moved into place.
    state: the parameters by name, where the model's own are sharded over processes.
    ValueError: the folder holds something else. OSError: it cannot be written."""
    folder, own = Path(folder), dict(model.named_parameters())  # a tied layer once
    if (folder / "config.json").exists():
        read_config(folder)
    elif folder.exists() and (not folder.is_dir() or any(folder.glob("[!.]*"))):  # a killed run leaves hidden files
        raise ValueError(f"{folder}: exists and is not a VLM; name a new folder")
    new = folder / ".new"
    new.mkdir(parents=True, exist_ok=True)
    try:
        (new / "config.json").write_text(json.dumps(asdict(model.config), indent=2))
        (new / "tokenizer.model").write_bytes(model.tokenizer.pieces.serialized_model_proto())
        vit.save_tensors({name: (state or own)[name] for name in own}, new / "model.safetensors", {})
        for file in ("config.json", "tokenizer.model", "model.safetensors"):
            (new / file).replace(folder / file)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def read_config(folder: str | Path) -> VLMConfig:
    """The config of a VLM's folder. ValueError: the folder holds no VLM."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder}: holds no VLM (no config.json); give a folder that train_vlm.py wrote")
    parts = dict(vision=ViTConfig, language=LlamaConfig, second=ViTConfig, template=Template, pointer=PointerConfig)
    values = llama.read_json(file)
    try:
        return VLMConfig(**values | {k: kind(**values[k]) for k, kind in parts.items() if values.get(k) is not None})
    except (TypeError, KeyError):
        raise ValueError(f"{file}: is not a VLM's config; give a folder that train_vlm.py wrote") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


@torch.no_grad()
def load(folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> VLM:
    """A model with the weights of a folder, in evaluation mode. ValueError: names the file and what is wrong."""
    config, path = read_config(folder), Path(folder) / "model.safetensors"
    tokenizer = Tokenizer(Path(folder), config.language.vocab_size, config.added)
    tensors = vit.read_tensors(path)[0]
    with torch.device("meta"):  # no memory and no time for values that the file replaces
        model = VLM(config, tokenizer).to(dtype)
    model.to_empty(device=device).language.tie()
    parameters = dict(model.named_parameters())
    for name in sorted({*parameters, *tensors}):
        if name not in parameters or name not in tensors or tensors[name].shape != parameters[name].shape:
            raise ValueError(f"{path}: tensor {name} is missing, unknown or of another shape than config.json asks "
                             "for; copy the whole folder that train_vlm.py wrote")
        parameters[name].copy_(tensors[name])
    return model.eval()


# --- the command ------------------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> None:
    """Ask a model a question about an image, and print the answer as it is generated."""
    parser = argparse.ArgumentParser(description="Ask a vision-language model about an image.")
    parser.add_argument("model", help="a VLM's folder, as train_vlm.py writes it")
    parser.add_argument("image", help="an image file; - to ask without an image")
    parser.add_argument("question")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="length of the longest answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the most likely token")
    parser.add_argument("--seed", type=int, default=0, help="for sampling at a temperature above 0")
    parser.add_argument("--picture", help="draw what the answer points at, and write it to this file")
    o = parser.parse_args(argv)
    hasattr(sys.stdout, "reconfigure") and sys.stdout.reconfigure(errors="backslashreplace")  # for any terminal
    image = None if o.image == "-" else Image.open(o.image)
    if image and image.convert("RGBA").getextrema()[3][0] < 255:
        print(f"{o.image}: is transparent in places; the model sees the colors stored there", file=sys.stderr)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    model = load(o.model, torch.bfloat16 if native else torch.float32, device)
    generator = torch.Generator(device).manual_seed(o.seed)
    if o.picture:
        import pictures

        text, triplets = model.ground([image], [o.question], o.max_new_tokens)[0]
        places = [(color, t.places) for color, t in zip(9 * pictures.LINES[1:], triplets) if t.places is not None]
        pictures.point(vit.upright(image), places, max(320, image.width)).save(o.picture)
        return print(text)
    for piece in model.stream(image, o.question, o.max_new_tokens, o.temperature, generator):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"vlm.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
