"""vlm.py against the authors' adapters (tests/data/vlm), its own definitions, and wrong input.

tests/data/vlm/adapters.safetensors: what the authors' VLM code makes of the features of the aligned checkpoint in
tests/data/maskembed, with each adapter. All models here are tiny and in float32.
"""

import functools
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import llama
import maskembed
import vit
import vlm
from llama import IGNORE, Llama, LlamaConfig, LlamaError, Tokenizer
from vlm import VLM, VLMError

DATA = Path(__file__).parent / "data"
AUTHORS = replace(vit.BACKBONES["clip-vit-b"], image_size=40, patch_size=8, embed_dim=64, depth=3, num_heads=2)
TINY = replace(AUTHORS, image_size=24, embed_dim=32, depth=4)  # 9 patches, a class token
SECOND = replace(
    vit.BACKBONES["dinov2-vit-b"], image_size=24, patch_size=8, embed_dim=48, depth=3, num_heads=3, registers=2
)
WORDS = "In: Out: USER: ASSISTANT: What colour is the big ring ? It deep blue , and 12 bars beside not . True False A B"
LONG = "It is not blue, and 12 bars. " * 3
QUESTIONS = ["What is it?", "Is the big ring blue?", "What colour?", "the", LONG, "", "A B A"]
WITH_IMAGE = [True, False, True, True, False, True, True]
RESPONSES = ["blue", "the big ring", "deep blue, not 12 bars.", "", "It is", "True", "bars beside the ring"]


def error(ours: Tensor, reference: Tensor) -> float:
    """Relative error, of the norm."""
    assert ours.shape == reference.shape
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """A sentencepiece model trained as Llama's, with whole words for the ones above."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    draw = random.Random(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(draw.sample(WORDS.split(), 8)) for _ in range(400)]),
        model_prefix=str(path.with_suffix("")), vocab_size=420, model_type="bpe", byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return Tokenizer(path)


def vivid(model: torch.nn.Module) -> torch.nn.Module:
    """The model with values of ordinary size everywhere, also where it begins with zeros."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            elif "norm" in name and "bias" not in name:
                parameter.normal_(1, 0.2)
            else:
                parameter.normal_(0, 0.2)
    return model


def backbone(aligned: bool = False, config: vit.ViTConfig = TINY) -> vit.ViT | maskembed.Student:
    plain = vivid(vit.ViT(config)).eval()
    return vivid(maskembed.make_student(plain)).eval() if aligned else plain


def language(tokenizer: Tokenizer, **changes) -> Llama:
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    return vivid(Llama(replace(config, **changes)))


def tiny(tokenizer: Tokenizer, adapter: str = "mlp", aligned: bool = False, seed: int = 0, **changes) -> VLM:
    """A model whose choices differ clearly; its adapter is no longer at its start."""
    torch.manual_seed(seed)
    second = backbone(config=SECOND) if adapter == "fused-mlp" else None
    model = vlm.build(backbone(aligned), language(tokenizer, **changes), tokenizer, adapter, second)
    vivid(model.adapter)
    return model


def pictures(seed: int = 0) -> list[Image.Image | None]:
    """For each question one or none, of different sizes."""
    draw = np.random.default_rng(seed)
    noise = lambda i: Image.fromarray(draw.integers(0, 256, (20 + i, 40 - i, 3), dtype=np.uint8))
    return [noise(i) if there else None for i, there in enumerate(WITH_IMAGE)]


def conversation(*messages: str) -> vlm.Conversation:
    return [{"from": ("human", "gpt")[i % 2], "value": message} for i, message in enumerate(messages)]


CASES = [
    ("mlp", False), ("transformer", False), ("truncated", False), ("fused-mlp", False),
    ("mlp", True), ("decoder", True), ("transformer", True), ("truncated", True),
]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The authors' adapters


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return load_file(DATA / "vlm" / "adapters.safetensors")


def aligned_by_authors(tokenizer: Tokenizer, adapter: str, **changes) -> VLM:
    student = maskembed.load(DATA / "maskembed" / "authors-checkpoint.pth.tar", AUTHORS)
    return vlm.build(student, language(tokenizer, hidden_size=96), tokenizer, adapter, **changes)


def fill(layer: torch.nn.Module, reference: dict[str, Tensor], prefix: str) -> None:
    layer.load_state_dict({k.removeprefix(prefix): v for k, v in reference.items() if k.startswith(prefix)})


@torch.no_grad()
def test_mlp_is_the_authors(tokenizer, reference):
    model = aligned_by_authors(tokenizer, "mlp")
    assert error(model.vision(reference["images"]), reference["features"]) < 1e-5
    fill(model.adapter.projector, reference, "mlp.projector.")
    assert error(model.adapter(reference["features"]), reference["mlp.output"]) < 1e-5


@torch.no_grad()
def test_fused_mlp_is_the_authors(tokenizer, reference):
    model = aligned_by_authors(tokenizer, "fused-mlp", second=vit.ViT(AUTHORS))
    fill(model.adapter.projector, reference, "fused_mlp.projector.")
    both = torch.cat([reference["features"], reference["features"].flip(1)], -1)
    assert error(model.adapter(both), reference["fused_mlp.output"]) < 1e-5


@torch.no_grad()
def test_decoder_is_the_authors(tokenizer, reference):
    model = aligned_by_authors(tokenizer, "decoder")
    assert error(model.vision(reference["images"]), reference["features"]) < 1e-5
    assert model.adapter(reference["features"]).abs().max() == 0  # before training
    fill(model.adapter.decoder.head, reference, "decoder_adapter.head.")
    assert error(model.adapter(reference["features"]), reference["decoder_adapter.output"]) < 1e-5


@torch.no_grad()
def test_truncated_is_the_authors(tokenizer, reference):
    model = aligned_by_authors(tokenizer, "truncated")
    assert error(model.vision(reference["images"]), reference["truncated.features"]) < 1e-5
    assert model.adapter(reference["truncated.features"]).abs().max() == 0
    fill(model.adapter.head, reference, "truncated.head.")
    assert error(model.adapter(reference["truncated.features"]), reference["truncated.output"]) < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# Features and adapters


def expected_features(whole: vit.ViT | maskembed.Student, pixels: Tensor, prefix: bool) -> Tensor:
    """The definition, from the whole backbone."""
    if isinstance(whole, maskembed.Student):
        return whole.encoder(vit.normalize(pixels, whole.encoder.config))
    x = whole(vit.normalize(pixels, whole.config), skip_blocks=1, norm=False)
    return x if prefix else x[:, whole.config.num_prefix :]


@torch.no_grad()
@pytest.mark.parametrize("adapter, aligned", CASES)
def test_features(tokenizer, adapter, aligned):
    """Which tokens of which block each adapter reads; of `truncated`, those that its own blocks make."""
    whole, second = backbone(aligned), backbone(config=SECOND) if adapter == "fused-mlp" else None
    model = vlm.build(whole, language(tokenizer), tokenizer, adapter, second)
    pixels = torch.stack([model.prepare(picture) for picture in pictures() if picture])
    expected = expected_features(whole, pixels, prefix=adapter not in ("mlp", "fused-mlp"))
    if second:  # DINOv2 first; each backbone has its own mean and deviation
        expected = torch.cat([expected_features(second, pixels, prefix=False), expected], -1)
    if adapter == "truncated":
        model.adapter.head = torch.nn.Identity()
    else:
        model.adapter = torch.nn.Identity()
    assert error(model.see(pixels), expected) < 1e-6
    assert model.config.image_tokens == expected.shape[1] == (10 if aligned or adapter[0] == "t" else 9)
    depth = {(False, False): 3, (False, True): 1, (True, False): 4, (True, True): 2}[aligned, adapter == "truncated"]
    assert len(model.vision.blocks) == depth


@torch.no_grad()
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("name", ["beit-vit-b", "eva02-vit-b", "dinov2-vit-b", "siglip-vit-b"])
def test_truncated_of_all_families(tokenizer, name, aligned):
    config = replace(vit.BACKBONES[name], image_size=24, patch_size=8, embed_dim=48, depth=3, num_heads=3)
    whole = backbone(aligned, config)
    model = vlm.build(whole, language(tokenizer), tokenizer, "truncated")
    model.adapter.head = torch.nn.Identity()
    pixels = model.prepare(pictures()[0])[None]
    assert error(model.see(pixels), expected_features(whole, pixels, prefix=True)) < 1e-6


@torch.no_grad()
def test_adapters_at_their_start(tokenizer):
    student, words = backbone(aligned=True), language(tokenizer)
    decoder = vlm.build(student, words, tokenizer, "decoder").adapter
    theirs = student.decoder.state_dict() | {"head.weight": torch.zeros(48, 32), "head.bias": torch.zeros(48)}
    ours = decoder.decoder.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert torch.equal(decoder.head.weight, student.head.weight) and torch.equal(decoder.head.bias, student.head.bias)
    decoder.head.weight.zero_(), decoder.decoder.pos_embed.zero_()
    assert student.head.weight.abs().max() > 0 and student.decoder.pos_embed.abs().max() > 0  # they were copied

    scratch = vlm.build(backbone(), words, tokenizer, "transformer").adapter
    assert len(scratch.decoder.blocks) == 2 and scratch.decoder.blocks[0].attn.qkv.bias is not None
    assert all(torch.all(scale == 1e-6) for block in scratch.decoder.blocks for scale in block.scales())
    assert 0.5 < scratch.decoder.head.weight.abs().max() * 32**0.5 <= 1  # torch's default
    assert scratch.decoder.head.weight.shape == (48, 32)

    truncated = vlm.build(backbone(), words, tokenizer, "truncated").adapter
    assert truncated.head.weight.abs().max() == 0 and truncated.head.bias.abs().max() == 0


@torch.no_grad()
def test_only_the_decoder_hides_prefix_tokens(tokenizer):
    for adapter, hides in (("decoder", True), ("transformer", False)):
        model, x = tiny(tokenizer, adapter, aligned=True), torch.randn(2, 10, 32)
        other = torch.cat([torch.randn(2, 1, 32), x[:, 1:]], 1)
        assert torch.equal(model.adapter(x), model.adapter(other)) == hides


def test_decoder_keeps_its_shape(tokenizer, tmp_path):
    """Another depth, width and soft-cap than the paper's travel with the model."""
    student = vivid(maskembed.make_student(vit.ViT(TINY), decoder_depth=1, decoder_width=64, decoder_softcap=5.0))
    model = vlm.build(student, language(tokenizer), tokenizer, "decoder")
    vivid(model.adapter.decoder.head)
    vlm.save(model, tmp_path / "model")
    x = torch.randn(1, 10, 32)
    assert torch.equal(vlm.load(tmp_path / "model").adapter(x), model.adapter(x))
    assert model.config.decoder == {"depth": 1, "width": 64, "softcap": 5.0}


@pytest.mark.parametrize("adapter, aligned", CASES)
def test_what_is_trained(tokenizer, adapter, aligned):
    model = tiny(tokenizer, adapter, aligned)
    names = [name for name, _ in model.trainable()]
    assert all(name.startswith(("adapter.", "language.")) for name in names)
    assert len(names) == len(list(model.adapter.parameters())) + len(list(model.language.parameters()))
    frozen = [p for part in (model.vision, model.second) if part for p in part.parameters()]
    assert frozen and not any(parameter.requires_grad for parameter in frozen)


# ----------------------------------------------------------------------------------------------------------------------
# Encoding


def pieces(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of pieces, written with spaces between them."""
    return [tokenizer.pieces.piece_to_id(piece) for piece in text.split(" ")]


def test_encode(tokenizer):
    ids, labels = vlm.encode(
        tokenizer, vlm.TEMPLATES["llama"],
        conversation("<image>\nWhat colour is the big ring?", " deep blue\n", "What is\n12?", "It is, and 12 bars."),
    )  # fmt: skip
    nothing = lambda text: [IGNORE] * len(text.split(" "))
    question = "<s> ▁In : ▁What ▁colour ▁is ▁the ▁big ▁ring ? <0x0A> Out :"
    answer = "▁deep ▁blue </s>"
    second = "▁In : ▁What ▁is <0x0A> 1 2 ? <0x0A> Out :"
    last = "▁It ▁is , ▁and ▁ 1 2 ▁bars . </s>"
    assert [tokenizer.pieces.id_to_piece(i) for i in ids] == " ".join([question, answer, second, last]).split(" ")
    assert labels == [*nothing(question), *pieces(tokenizer, answer), *nothing(second), *pieces(tokenizer, last)]


def test_encode_for_vicuna(tokenizer):
    """The ids are those of the whole text: the space before an answer is there once."""
    template = vlm.TEMPLATES["vicuna"]
    ids, labels = vlm.encode(tokenizer, template, conversation("What is it?", "deep blue", "It?", "12"))
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    first = tokenizer.encode(f"{system} USER: What is it? ASSISTANT: deep blue", bos=True, eos=True)
    assert ids == first + tokenizer.encode("USER: It? ASSISTANT: 12", eos=True)
    assert labels[: len(first)] == [IGNORE] * (len(first) - 3) + first[-3:]


def test_special_tokens_come_from_the_template_alone(tokenizer):
    ids, labels = vlm.encode(tokenizer, vlm.Template(), conversation("</s> {answer}", "<s> {question} </s>"))
    assert ids.count(tokenizer.bos) == 1 and ids.count(tokenizer.eos) == 1 and ids[0] == 1 and ids[-1] == 2
    assert tokenizer.decode([i for i in labels if i != IGNORE]) == "<s> {question} </s>"
    ids, labels = vlm.encode(tokenizer, vlm.Template(), conversation("What?", ""))
    assert [i for i in labels if i != IGNORE] == [tokenizer.eos]


def test_long_text_is_cut(tokenizer):
    talk = conversation("What is it?", "blue " * 3000)
    ids, labels = vlm.encode(tokenizer, vlm.Template(), talk, 2048)
    assert len(ids) == len(labels) == 2048
    assert ids == vlm.encode(tokenizer, vlm.Template(), talk)[0][:2048] and tokenizer.eos not in ids
    model = tiny(tokenizer)  # 256 tokens of context, 9 of them an image's
    assert model.config.max_text == 247 and len(model.encode(talk)[0]) == 247
    assert tiny(tokenizer, max_position_embeddings=4096).config.max_text == 2048


def test_data_processes_can_have_both_functions(tokenizer):
    encode = functools.partial(vlm.encode, tokenizer, vlm.Template(), max_text=9)
    prepare = functools.partial(vlm.prepare, config=TINY)
    talk, image = conversation("What is it?", "blue"), pictures()[0]
    assert pickle.loads(pickle.dumps(encode))(talk) == encode(talk)
    assert torch.equal(pickle.loads(pickle.dumps(prepare))(image), prepare(image))


def test_prepare_squeezes():
    image = pictures()[2]
    pixels = vlm.prepare(image, TINY)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 24, 24)
    assert torch.equal(vit.normalize(pixels, TINY), vit.preprocess(image, TINY, square=True))
    grey = vlm.prepare(image.convert("L"), TINY)
    assert grey.shape == (3, 24, 24) and torch.equal(grey[0], grey[2])


# ----------------------------------------------------------------------------------------------------------------------
# Training


def examples(model: VLM) -> list[tuple[list[int], list[int], Tensor | None]]:
    """Ids, labels and pixels, seven examples, one of them with two turns, one with a label on every token."""
    encoded = [model.encode(conversation(*pair)) for pair in zip(QUESTIONS, RESPONSES)]
    encoded[2] = model.encode(conversation("What?", "blue", "Is it?", "It is not."))
    encoded[4] = (encoded[4][0], encoded[4][0])
    pixels = [picture and model.prepare(picture) for picture in pictures()]
    return [(ids, labels, image) for (ids, labels), image in zip(encoded, pixels)]


def collate(batch: list[tuple[list[int], list[int], Tensor | None]]) -> dict[str, Tensor | None]:
    """Arguments of `VLM.forward`."""
    ids, mask = Tokenizer.pad([example[0] for example in batch], left=False)
    labels = Tokenizer.pad([example[1] for example in batch], left=False)[0].masked_fill(mask == 0, IGNORE)
    rows = [i for i, example in enumerate(batch) if example[2] is not None]
    images = torch.stack([batch[i][2] for i in rows]) if rows else None
    return dict(ids=ids, labels=labels, images=images, rows=None if len(rows) == len(batch) else torch.tensor(rows))


def embeds_of(model: VLM, ids: list[int], image: Tensor | None) -> Tensor:
    """<s>, image, text: the definition."""
    x = model.language.embed(torch.tensor([ids]))
    return x if image is None else torch.cat([x[:, :1], model.see(image[None]), x[:, 1:]], 1)


def loss_of(model: VLM, ids: list[int], labels: list[int], image: Tensor | None) -> Tensor:
    """The summed loss of one example, from all logits: the definition."""
    M = 0 if image is None else model.config.image_tokens
    labels = torch.tensor([labels[0]] + [IGNORE] * M + labels[1:])
    logits = model.language(embeds=embeds_of(model, ids, image))[0]
    return F.cross_entropy(logits[:-1], labels[1:], reduction="sum")


def gradients(model: VLM, loss: Tensor) -> dict[str, Tensor]:
    """Of adapter and language model, each in one vector."""
    parameters = model.trainable()
    grads = torch.autograd.grad(loss, [p for _, p in parameters], allow_unused=True, materialize_grads=True)
    parts = {"adapter": [], "language": []}
    for (name, _), grad in zip(parameters, grads):
        parts[name.split(".")[0]].append(grad.flatten())
    return {part: torch.cat(grads) for part, grads in parts.items()}


@pytest.mark.parametrize("adapter, aligned", CASES)
def test_mixed_batch_is_its_examples(tokenizer, adapter, aligned):
    """Loss and gradients, weighted by label tokens, against the definition and against batches of one."""
    model = tiny(tokenizer, adapter, aligned)
    batch = examples(model)
    count = sum(label != IGNORE for example in batch for label in example[1])
    loss = model(**collate(batch)) / count
    expected = sum(loss_of(model, *example) for example in batch) / count
    alone = sum(model(**collate([example])) for example in batch) / count
    assert loss.dtype == torch.float32 and abs(loss.item() / expected.item() - 1) < 1e-6
    assert abs(alone.item() / expected.item() - 1) < 1e-6
    reference = gradients(model, expected)
    for ours in (gradients(model, loss), gradients(model, alone)):
        assert all(error(ours[part], reference[part]) < 1e-5 for part in reference)


def test_rows(tokenizer):
    """Images go to the rows that are named, in any order."""
    model = tiny(tokenizer)
    batch = collate(examples(model))
    order = torch.tensor([3, 0, 4, 1, 2])
    turned = batch | dict(images=batch["images"][order], rows=batch["rows"][order])
    assert error(model(**turned).detach(), model(**batch).detach()) < 1e-6
    swapped = batch | dict(images=batch["images"][order])
    assert error(model(**swapped).detach(), model(**batch).detach()) > 1e-4
    pictured = collate([example for example in examples(model) if example[2] is not None])
    assert pictured["rows"] is None
    everyone = torch.arange(len(pictured["ids"]))
    assert error(model(**pictured | dict(rows=everyone)).detach(), model(**pictured).detach()) < 1e-6


def test_text_alone_reaches_every_parameter(tokenizer):
    """With gradients of zero in the adapter, so that processes with and without images do the same exchanges."""
    model = tiny(tokenizer, "decoder", aligned=True)
    model(**collate([examples(model)[1]])).backward()
    assert all(parameter.grad is not None for _, parameter in model.trainable())
    assert all(parameter.grad.abs().max() == 0 for parameter in model.adapter.parameters())


def test_training_lowers_the_loss(tokenizer):
    """Every adapter learns to tell two pictures apart, from its own start."""
    torch.manual_seed(0)
    draw = [Image.new("RGB", (30, 30), colour) for colour in ("navy", "yellow")]
    for adapter, aligned in CASES:
        second = backbone(config=SECOND) if adapter == "fused-mlp" else None
        model = vlm.build(backbone(aligned), language(tokenizer), tokenizer, adapter, second)
        talks = [model.encode(conversation("What colour?", answer)) for answer in ("deep blue", "not blue")]
        batch = collate([(*talk, model.prepare(image)) for talk, image in zip(talks, draw)])
        optimizer = torch.optim.AdamW([p for _, p in model.trainable()], lr=3e-3)
        for _ in range(40):
            optimizer.zero_grad()
            (loss := model(**batch) / 6).backward()
            optimizer.step()
        assert loss < 0.2, adapter  # ln 2 / 3 = 0.23 where the pictures are not told apart
        assert model.generate(draw, ["What colour?"] * 2, 8) == ["deep blue", "not blue"], adapter


def test_bfloat16(tokenizer):
    """Autocast and whole bfloat16 both run and come close."""
    model = tiny(tokenizer, "decoder", aligned=True)
    batch = collate(examples(model))
    exact = model(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch)
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss / exact - 1) < 2e-2
    assert abs(model.bfloat16()(**batch) / exact - 1) < 5e-2


# ----------------------------------------------------------------------------------------------------------------------
# Answers


def greedy(model: VLM, image: Image.Image | None, prompt: str, count: int, stop: int) -> list[int]:
    """The definition, without cache or batch."""
    ids = vlm.encode(model.tokenizer, model.config.template, conversation(prompt))[0]
    pixels, length = image and model.prepare(image), len(ids)
    while len(ids) < length + count:
        ids.append(model.language(embeds=embeds_of(model, ids, pixels))[0, -1].argmax().item())
        if ids[-1] == stop:
            return ids[length:-1]
    return ids[length:]


@torch.no_grad()
@pytest.mark.parametrize("adapter, aligned", [("mlp", False), ("decoder", True), ("fused-mlp", False)])
def test_generate_in_a_batch_alone_and_uncached(tokenizer, monkeypatch, adapter, aligned):
    """Token for token, of 7 lengths with and without an image."""
    model, images = tiny(tokenizer, adapter, aligned), pictures()
    stop = greedy(model, images[0], QUESTIONS[0], 6, -1)[-1]  # a word that the model does say
    monkeypatch.setattr(tokenizer, "eos", stop)
    monkeypatch.setattr(tokenizer, "decode", lambda ids: str(list(ids)))
    together = model.generate(images, QUESTIONS, 20)
    alone = [model.generate([image], [prompt], 20)[0] for image, prompt in zip(images, QUESTIONS)]
    assert together == alone
    assert together == [str(greedy(model, image, prompt, 20, stop)) for image, prompt in zip(images, QUESTIONS)]
    assert len(set(together)) == 7 and len(set(map(len, map(json.loads, together)))) > 1
    assert model.generate([], []) == []


@torch.no_grad()
def test_an_image_of_several_prompts_is_read_once(tokenizer, monkeypatch):
    """By the backbone always, by the language model where it is worth it, and each prompt has its own: shared ones in any
    order, with prompts that have none between them."""
    model, images = tiny(tokenizer, "mlp", False), [image for image in pictures() if image][:3]
    seen, see, prefilled, hidden = [], model.see, [], model.language.hidden
    monkeypatch.setattr(model, "see", lambda pixels: seen.append(len(pixels)) or see(pixels))
    monkeypatch.setattr(model.language, "hidden", lambda x, *rest: prefilled.append(tuple(x.shape[:2])) or hidden(x, *rest))
    choices = [["deep", "blue"]] * 7
    M, lengths = model.config.image_tokens, [len(model.prompt_ids(question)) for question in QUESTIONS]
    for order, shared in (
        ([1, 0, None, 1, 0, 0, 1], True),
        ([0] * 7, True),
        ([1, 0, None, 1, None, 0, 1], False),  # the longest text has no image: with places for one it might not fit
        ([1, 0, 2, 1, 0, None, 1], False),  # too few for each
        ([None] * 7, False),
    ):
        seen.clear(), prefilled.clear()
        several = [None if i is None else images[i] for i in order]
        together = model.generate(several, QUESTIONS, 20), model.score(several, QUESTIONS, choices)
        count = len(set(order) - {None})
        assert seen == [count, count] * (count > 0)
        whole = max(length + M * (i is not None) for i, length in zip(order, lengths))
        assert prefilled == 2 * ([(len(set(order)), 1 + M), (7, max(lengths) - 1)] if shared else [(7, whole)])
        alone = [model.generate([image], [prompt], 20)[0] for image, prompt in zip(several, QUESTIONS)]
        scores = [model.score([image], [prompt], choices[:1])[0] for image, prompt in zip(several, QUESTIONS)]
        assert together[0] == alone and np.allclose(together[1], scores, atol=1e-5)

    images = [images[0], images[1], None, images[1], images[0], images[0], images[1]]
    alone = [model.generate([image], [prompt], 20)[0] for image, prompt in zip(images, QUESTIONS)]

    class Fresh(list):  # as a data set that opens its images when they are asked for
        def __getitem__(self, i: int) -> Image.Image | None:
            return super().__getitem__(i) and super().__getitem__(i).copy()

        def __iter__(self) -> Iterator[Image.Image | None]:
            return (self[i] for i in range(len(self)))

    assert model.generate(Fresh(images), QUESTIONS, 20) == alone


@torch.no_grad()
def test_generate_near_the_end_of_the_context(tokenizer, monkeypatch):
    """A batch whose longest prompt nearly fills the context gives the shorter ones as much room as they have alone."""
    model, images = tiny(tokenizer, max_position_embeddings=64), pictures()
    monkeypatch.setattr(tokenizer, "eos", -1)
    monkeypatch.setattr(tokenizer, "decode", lambda ids: str(list(ids)))
    together = model.generate(images, QUESTIONS, 50)
    assert together == [model.generate([image], [prompt], 50)[0] for image, prompt in zip(images, QUESTIONS)]
    assert len({len(json.loads(ids)) for ids in together}) > 2


@torch.no_grad()
def test_prompts_about_one_image(tokenizer, monkeypatch):
    """Near the end of the context, and where a prompt is <s> alone, as an empty template makes it."""
    model, image = tiny(tokenizer, max_position_embeddings=64), pictures()[0]
    monkeypatch.setattr(tokenizer, "eos", -1)
    monkeypatch.setattr(tokenizer, "decode", lambda ids: str(list(ids)))
    together = model.generate([image] * 7, QUESTIONS, 50)
    assert together == [model.generate([image], [prompt], 50)[0] for prompt in QUESTIONS]
    assert len({len(json.loads(ids)) for ids in together}) > 2
    model.config = replace(model.config, template=vlm.Template(question="{question}"))
    for prompts in (["", "What is it?", "the"], [""] * 3):
        alone = [model.generate([image], [prompt], 8)[0] for prompt in prompts]
        assert model.generate([image] * 3, prompts, 8) == alone


@torch.no_grad()
def test_stream(tokenizer):
    model, image = tiny(tokenizer), pictures()[0]
    parts = list(model.stream(image, QUESTIONS[0], 20))
    assert len(parts) > 1 and "".join(parts).strip() == model.generate([image], QUESTIONS[:1], 20)[0]
    assert "".join(model.stream(None, "What?", 20)).strip() == model.generate([None], ["What?"], 20)[0]


def test_sampling(tokenizer):
    model, images = tiny(tokenizer), pictures()[:1] * 3
    draw = lambda seed: model.generate(images, QUESTIONS[:1] * 3, 12, 1.0, torch.Generator().manual_seed(seed))
    assert draw(1) == draw(1) != draw(2) and len(set(draw(1))) > 1


@torch.no_grad()
def test_conversations_go_on(tokenizer, monkeypatch):
    """A prompt of several turns is what training sees of them."""
    model, image = tiny(tokenizer), pictures()[0]
    talk = conversation("<image>What is it?", "blue", "Is it deep?")
    ids, labels = vlm.encode(tokenizer, model.config.template, [*talk, {"from": "gpt", "value": "not deep"}])
    assert model.prompt_ids(talk) == ids[: -len(tokenizer.encode("not deep", eos=True))]
    assert model.prompt_ids("What is it?") == model.prompt_ids(talk[:1])
    assert model.generate([image], [talk], 5) != model.generate([image], ["Is it deep?"], 5)


@torch.no_grad()
def test_score(tokenizer):
    """In a batch, alone, and by the definition."""
    model, images = tiny(tokenizer, "transformer"), pictures()
    choices = [["True", "False"], ["A", "B", "12"], ["blue"], ["deep", "big ring"], ["It", "not"], ["A", "B "]]
    choices.insert(3, ["is", "A"])
    together = model.score(images, QUESTIONS, choices)
    alone = [model.score([i], [q], [c])[0] for i, q, c in zip(images, QUESTIONS, choices)]
    for i, scores in enumerate(together):
        ids = vlm.encode(tokenizer, model.config.template, conversation(QUESTIONS[i]))[0]
        pixels = images[i] and model.prepare(images[i])
        everything = model.language(embeds=embeds_of(model, ids, pixels))[0, -1].softmax(0)
        firsts = torch.tensor([tokenizer.encode(choice)[0] for choice in choices[i]])
        expected = everything[firsts] / everything[firsts].sum()
        assert (torch.tensor(scores) - expected).abs().max() < 1e-5
        assert (torch.tensor(scores) - torch.tensor(alone[i])).abs().max() < 1e-5
        assert abs(sum(scores) - 1) < 1e-6
    assert together[2] == [1.0] and model.score([], [], []) == []


def test_a_choice_is_worded_as_an_answer(tokenizer):
    """Its first token is the one that the model would have to say, whatever the template."""
    for name in vlm.TEMPLATES:
        model = tiny(tokenizer)
        model.config = replace(model.config, template=vlm.TEMPLATES[name])
        assert model.first_tokens(["True", "big ring"]) == pieces(tokenizer, "▁True ▁big")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_packed(tokenizer, tmp_path):
    model, images = tiny(tokenizer), pictures()
    vlm.save(model, tmp_path / "model")
    packed = vlm.load(tmp_path / "model", pack=True)
    assert isinstance(packed.language.lm_head, llama.Packed)
    assert packed.generate(images, QUESTIONS, 12) == model.generate(images, QUESTIONS, 12)


# ----------------------------------------------------------------------------------------------------------------------
# Files and the command


@pytest.mark.parametrize("adapter, aligned", CASES)
def test_save_and_load(tokenizer, tmp_path, adapter, aligned):
    model = tiny(tokenizer, adapter, aligned, tie_word_embeddings=aligned)
    vlm.save(model, tmp_path / "model")
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.safetensors", "tokenizer.model"]
    loaded = vlm.load(tmp_path / "model")
    assert loaded.config == model.config
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    batch = collate(examples(model))
    assert torch.equal(loaded(**batch), model(**batch))
    assert [name for name, _ in loaded.trainable()] == [name for name, _ in model.trainable()]
    assert loaded.encode(conversation("What?", "blue")) == model.encode(conversation("What?", "blue"))
    half = vlm.load(tmp_path / "model", torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_config_is_json(tokenizer):
    model = tiny(tokenizer, "fused-mlp")
    config = replace(model.config, template=vlm.TEMPLATES["vicuna"])
    assert vlm.VLMConfig.from_json(json.loads(json.dumps(asdict(config)))) == config


def test_save_replaces_a_vlm_and_nothing_else(tokenizer, tmp_path, monkeypatch):
    old, new = tiny(tokenizer), tiny(tokenizer, seed=1)
    vlm.save(old, tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(vit, "save_tensors", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            vlm.save(new, tmp_path / "model")
    assert torch.equal(vlm.load(tmp_path / "model").language.lm_head.weight, old.language.lm_head.weight)
    assert len(os.listdir(tmp_path / "model")) == 3
    state = {name: value.clone() for name, value in new.state_dict().items()}
    vlm.save(old, tmp_path / "model", state)  # values from elsewhere, as those of sharded parameters are
    assert torch.equal(vlm.load(tmp_path / "model").language.lm_head.weight, new.language.lm_head.weight)
    llama.save(new.language, tmp_path / "llama")
    with pytest.raises(VLMError, match="config.json: is no VLM's"):
        vlm.save(new, tmp_path / "llama")
    with pytest.raises(VLMError, match="is there already and no VLM"):
        vlm.save(new, tmp_path)
    llama.load(tmp_path / "llama")  # it is whole
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".new.config.json").write_text("{")  # what a killed process leaves is in no one's way
    vlm.save(new, tmp_path / "killed")
    assert sorted(os.listdir(tmp_path / "killed")) == ["config.json", "model.safetensors", "tokenizer.model"]


def test_language_model_is_exported(tokenizer, tmp_path, capsys):
    model = tiny(tokenizer)
    vlm.save(model.half(), tmp_path / "model")
    vlm.main([str(tmp_path / "model"), "--export", str(tmp_path / "llama")])
    assert "in transformers' layout" in capsys.readouterr().out
    exported = llama.load(tmp_path / "llama", torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(exported.parameters(), model.language.parameters()))
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["dtype"] == "float16"
    assert Tokenizer(tmp_path / "llama").encode("big ring") == tokenizer.encode("big ring")


def test_load_vision(tokenizer, tmp_path):
    student = backbone(aligned=True)
    maskembed.save(student, tmp_path / "aligned.safetensors")
    vit.save(student.encoder, tmp_path / "plain.safetensors")
    assert isinstance(vlm.load_vision(tmp_path / "aligned.safetensors"), maskembed.Student)
    assert isinstance(vlm.load_vision(tmp_path / "plain.safetensors"), vit.ViT)
    authors = vlm.load_vision(DATA / "maskembed" / "authors-checkpoint.pth.tar", AUTHORS)
    assert isinstance(authors, maskembed.Student)


def test_works_with_its_three_files_alone(tokenizer, tmp_path):
    """The command as a whole: with an image, without one, and with a wrong one."""
    model, alone = tiny(tokenizer, "decoder", aligned=True), tmp_path / "alone"
    alone.mkdir()
    for module in (vlm, vit, maskembed, llama):
        shutil.copy(module.__file__, alone)
    vlm.save(model, alone / "model")
    pictures()[0].save(alone / "image.png")
    environment = dict(os.environ, PYTHONPATH=str(alone), CUDA_VISIBLE_DEVICES="")
    run = lambda *words: subprocess.run(
        [sys.executable, "vlm.py", "model", *words, "--max-new-tokens", "9"], cwd=alone, capture_output=True,
        env=environment,
    )  # fmt: skip
    done = run("image.png", "What is it?")
    assert done.returncode == 0, done.stderr.decode()
    answer = model.generate([pictures()[0]], ["What is it?"], 9)[0]
    assert answer and done.stdout.decode().strip() == answer
    done = run("model/config.json", "What is it?")
    assert done.returncode == 1 and done.stderr.decode().count("\n") == 1
    assert "vlm.py: model/config.json: cannot be read as an image" in done.stderr.decode()


# ----------------------------------------------------------------------------------------------------------------------
# Wrong input


def test_parts_that_do_not_fit(tokenizer):
    plain, student, words = backbone(), backbone(aligned=True), language(tokenizer)
    pooled = maskembed.make_student(plain, maskembed.OBJECTIVES["average"])
    larger = backbone(config=replace(SECOND, image_size=32))
    long = conversation("What?", "blue")[::-1]
    cases = [
        (lambda: vlm.build(plain, words, tokenizer, "decoder"), "needs an aligned backbone .* a plain one; give what"),
        (lambda: vlm.build(pooled, words, tokenizer, "decoder"), "needs an aligned backbone .* without them"),
        (lambda: vlm.build(plain, words, tokenizer, "linear"), "adapter 'linear': choose one of mlp, decoder"),
        (lambda: vlm.build(plain, words, tokenizer, "fused-mlp"), "a second backbone goes with fused-mlp"),
        (lambda: vlm.build(plain, words, tokenizer, "mlp", plain), "a second backbone goes with fused-mlp"),
        (
            lambda: vlm.build(plain, words, tokenizer, "fused-mlp", larger),
            r"3\^2 patches of 24\^2 pixels and 4\^2 patches of 32\^2 pixels; load",
        ),
        (
            lambda: vlm.build(backbone(config=replace(TINY, depth=2)), words, tokenizer, "truncated"),
            "a backbone of 2 blocks is too shallow",
        ),
        (
            lambda: vlm.build(plain, language(tokenizer, vocab_size=96), tokenizer, "mlp"),
            "the tokenizer has 420 words, the language model 96; give",
        ),
        (
            lambda: vlm.build(plain, language(tokenizer, max_position_embeddings=10), tokenizer, "mlp"),
            "9 image tokens leave no room for text in the language model's context of 10",
        ),
        (lambda: vlm.Template("In: {q}"), "a template needs a question with {question}"),
        (lambda: vlm.Template(answer="{answer}"), "a template needs .* ends in {answer}</s>"),
        (lambda: vlm.encode(tokenizer, vlm.Template(), long), "turn 1 of a conversation is no text from human"),
        (lambda: vlm.encode(tokenizer, vlm.Template(), [{"from": "human"}]), "turn 1 of a conversation is no text"),
    ]
    for call, message in cases:
        with pytest.raises(VLMError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_wrong_prompts(tokenizer, tmp_path):
    model, image = tiny(tokenizer), pictures()[0]
    image.save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:900])
    cut = vlm.open_image(tmp_path / "cut.png")
    long = "blue " * 245  # 251 tokens: without an image they fit
    pixels = torch.zeros(1, 3, 24, 24)
    ids = torch.ones(1, 5, dtype=torch.long)
    assert model.score([None], [long], [["A", "B"]])
    cases = [
        (lambda: model.generate([image], [long]), r"prompt 'blue .*\.\.\. takes 2\d\d tokens, 9 of them the image"),
        (lambda: model.score([None, image], ["What", long], [["A"]] * 2), r"prompt 'blue .* takes 2\d\d tokens, 9 of"),
        (lambda: model.generate([None], [2 * long]), r"takes \d+ tokens, which leaves no room .* of 256; shorten it"),
        (lambda: next(model.stream(image, long)), "leaves no room for an answer"),
        (lambda: model.generate([image], ["A", "B"]), "1 images for 2 prompts; give one, or None, for each"),
        (lambda: model.generate([None], [conversation("A", "B")]), "must end with a question"),
        (lambda: model.generate([cut], ["What?"]), "cut.png: cannot be read as an image"),
        (lambda: vlm.open_image(tmp_path / "none.png"), "none.png: no such image; give"),
        (lambda: vlm.open_image(tmp_path), "cannot be read as an image"),
        (lambda: model.score([image], ["A"], []), "0 lists of choices for 1 prompts"),
        (lambda: model.score([image], ["A"], [[]]), "a prompt has no choices"),
        (lambda: model.score([image], ["A"], [["A", ""]]), "a choice is empty"),
        (lambda: model.score([image], ["A"], [["big ring", "deep", "big"]]), "'big ring' and 'big' begin with"),
        (lambda: model(ids, ids, pixels), "the images are torch.float32; give pixels in uint8"),
    ]
    for call, message in cases:
        with pytest.raises(VLMError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def damage(folder: Path, kind: str) -> None:
    """What goes wrong with a VLM's folder."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    state, values = load_file(weights), json.loads(config.read_text())
    match kind:
        case "no folder":
            shutil.rmtree(folder)
        case "no weights":
            weights.unlink()
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "lacks one":
            save_file({name: value for name, value in state.items() if name != "adapter.projector.0.bias"}, weights)
        case "one too many":
            save_file(state | {"adapter.projector.4.bias": torch.ones(2)}, weights)
        case "another shape":
            save_file(state | {"vision.cls_token": torch.ones(2)}, weights)
        case "no config":
            config.unlink()
        case "no json":
            config.write_text("{")
        case "another's config":
            config.write_text(json.dumps(values["language"]))
        case "unknown adapter":
            config.write_text(json.dumps(values | dict(adapter="linear")))
        case "no tokenizer":
            (folder / "tokenizer.model").unlink()
        case "another tokenizer":
            values["language"]["vocab_size"] = 96
            config.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "kind, message",
    [
        ("no folder", r"model: holds no VLM \(no config.json\); give a folder"),
        ("no weights", "model.safetensors: is missing; copy the whole folder"),
        ("truncated", "model.safetensors: cannot be read as weights"),
        ("lacks one", "tensor adapter.projector.0.bias is missing; the file or the config.json is another"),
        ("one too many", "tensor adapter.projector.4.bias has no place in the model; the file or"),
        ("another shape", r"tensor vision.cls_token is \[2\], not \[1, 1, 32\]; the file or"),
        ("no config", "holds no VLM"),
        ("no json", "config.json: is no JSON"),
        ("another's config", "config.json: is no VLM's, or another version's; give"),
        ("unknown adapter", "adapter 'linear': choose one of"),
        ("no tokenizer", "tokenizer.model: no such file"),
        ("another tokenizer", "tokenizer.model: has 420 words, the model 96"),
    ],
)
def test_damaged_folders(tokenizer, tmp_path, kind, message):
    vlm.save(tiny(tokenizer), tmp_path / "model")
    damage(tmp_path / "model", kind)
    with pytest.raises((VLMError, LlamaError, vit.WeightsError), match=message) as caught:
        vlm.load(tmp_path / "model")
    assert "\n" not in str(caught.value)
    with pytest.raises(SystemExit, match=f"vlm.py: .*{message}"):
        vlm.main([str(tmp_path / "model"), "-", "What?"])


def test_command_says_what_is_wrong(tokenizer, tmp_path, capsys):
    vlm.save(tiny(tokenizer), tmp_path / "model")
    model = str(tmp_path / "model")
    for arguments in ([model], [model, "image.png"], [model, "-", "What?", "--export", "x"]):
        with pytest.raises(SystemExit) as caught:
            vlm.main(arguments)
        assert caught.value.code == 2 and "give an image and a question, or --export" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        vlm.main([model, "-", "What?", "--max-new-tokens", "0"])
    assert caught.value.code == 2
    with pytest.raises(SystemExit, match="vlm.py: nowhere.png: no such image"):
        vlm.main([model, "nowhere.png", "What?"])
    with pytest.raises(SystemExit, match="vlm.py: the prompt 'blue .* leaves no room for an answer"):
        vlm.main([model, "-", "blue " * 300])
    with pytest.raises(SystemExit, match="vlm.py: .*model: is there already; name a new folder"):
        vlm.main([model, "--export", model])
    vlm.main([model, "-", "What?", "--max-new-tokens", "4"])
    assert capsys.readouterr().out.strip()
