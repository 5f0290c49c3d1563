"""vlm.py against the authors' adapters (tests/data/vlm), its own definitions, and wrong input. All models are tiny."""

import functools
import io
import json
import math
import os
import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, TINY, error, launch, refusal
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import llama
import maskembed
import vit
import vlm
from llama import IGNORE, Tokenizer
from vlm import VLM

DATA, TOKENIZER = ROOT / "tests" / "data", Tokenizer(ROOT / "demo" / "language")
AUTHORS = replace(vit.BACKBONES["clip-vit-b"], image_size=40, patch_size=8, embed_dim=64, depth=3, num_heads=2)
FIRST = vit.ViTConfig(**TINY | dict(image_size=24, depth=4))  # 9 patches, a class token
SMALL = dict(image_size=24, patch_size=8, embed_dim=48, depth=3, num_heads=3)
SECOND = replace(vit.BACKBONES["dinov2-vit-b"], **SMALL)
LANGUAGE = llama.LlamaConfig(TOKENIZER.vocab_size, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
                             num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256)
QUESTIONS = ["What is it?", "Is the ring blue?", "What color?", "the", "Is it left of 2 red bars? " * 2, "", "1 2 3"]
WITH_IMAGE = [True, False, True, True, False, True, True]
ANSWERS = ["blue", "the ring", "red, not 2 bars.", "", "It is", "True", "bars left of the ring"]
LLAMA, VICUNA = vlm.TEMPLATES["llama"], vlm.TEMPLATES["vicuna"]
CASES = [("mlp", False), ("transformer", False), ("truncated", False), ("fused-mlp", False),
         ("mlp", True), ("decoder", True), ("transformer", True), ("truncated", True)]


def vivid(model: torch.nn.Module) -> torch.nn.Module:
    """The model with values of ordinary size everywhere, also where it begins with zeros."""
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in name and "bias" not in name and parameter.ndim == 1 else 0.0
        parameter.data.normal_(mean, parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2)
    return model.eval()


def backbone(aligned: bool = False, config: vit.ViTConfig = FIRST) -> vit.ViT | maskembed.Student:
    plain = vivid(vit.ViT(config))
    return vivid(maskembed.make_student(plain, decoder_depth=1, decoder_width=64)) if aligned else plain


def build(whole: vit.ViT | maskembed.Student, adapter: str, second: vit.ViT | None = None, **changes) -> VLM:
    return vlm.build(whole, vivid(llama.Llama(replace(LANGUAGE, **changes))), TOKENIZER, adapter, second)


def tiny(adapter: str = "mlp", aligned: bool = False, **changes) -> VLM:
    """A model whose choices differ clearly; its adapter is no longer at its start."""
    torch.manual_seed(0)
    model = build(backbone(aligned), adapter, backbone(config=SECOND) if adapter == "fused-mlp" else None, **changes)
    vivid(model.adapter)
    return model


def pictures() -> list[Image.Image | None]:
    """One or none for each question, of different sizes."""
    draw = np.random.default_rng(0).integers(0, 256, (7, 40, 40, 3), dtype=np.uint8)
    return [Image.fromarray(draw[i, : 20 + i, i:]) if there else None for i, there in enumerate(WITH_IMAGE)]


def encode(*messages: str, template: vlm.Template = LLAMA) -> tuple[list[int], list[int]]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": message} for i, message in enumerate(messages)]
    return vlm.encode(TOKENIZER, template, turns)


@torch.no_grad()
@pytest.mark.parametrize("adapter, file, trained", [
    ("mlp", "mlp", ""), ("fused-mlp", "fused_mlp", ""),
    ("decoder", "decoder_adapter", "decoder.head."), ("truncated", "truncated", "head."),
])
def test_adapter_is_the_authors(adapter, file, trained):
    """On features of their aligned checkpoint; `decoder` and `truncated` start from it, with a last layer of zeros."""
    config, reference = replace(AUTHORS, final_norm=1e-5, softcap=30.0), load_file(DATA / "vlm/adapters.safetensors")
    student = maskembed.Student(vit.ViT(config), torch.nn.Linear(64, 64), maskembed.Decoder(config))
    state, _ = vit.read_tensors(DATA / "maskembed" / "authors-checkpoint.pth.tar")
    student.load_state_dict({name.replace("encoder.head.", "head."): value for name, value in state.items()})
    model = build(student.eval(), adapter, vit.ViT(AUTHORS) if adapter == "fused-mlp" else None, hidden_size=96)
    features = reference["truncated.features" if adapter == "truncated" else "features"]
    assert error(model.vision(reference["images"]), features) < 1e-5
    if adapter == "fused-mlp":
        features = torch.cat([features, features.flip(1)], -1)
    assert (model.adapter(features).abs().max() == 0) == (adapter in ("decoder", "truncated"))
    for name, weight in reference.items():
        if name.startswith(prefix := f"{file}.{trained.removeprefix('decoder.') or 'projector.'}"):
            model.adapter.get_parameter(trained + name.removeprefix(prefix)).copy_(weight)
    assert error(model.adapter(features), reference[f"{file}.output"]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("adapter, aligned, family", [(*case, None) for case in CASES] + [
    ("truncated", aligned, name) for name in ("beit", "eva02", "dinov2", "siglip") for aligned in (False, True)])
def test_features(tmp_path, adapter, aligned, family):
    """Which tokens of which block each adapter reads (for `truncated`: its last layer), and what is trained."""
    config = replace(vit.BACKBONES[f"{family}-vit-b"], **SMALL) if family else FIRST
    whole, second = backbone(aligned, config), backbone(config=SECOND) if adapter == "fused-mlp" else None
    (maskembed if aligned else vit).save(whole, tmp_path / "backbone.safetensors")
    model = build(vlm.load_vision(tmp_path / "backbone.safetensors"), adapter, second)
    pixels = torch.stack([vlm.prepare(picture, config) for picture in pictures() if picture])
    expected, read, last = [], [], model.adapter.head if adapter == "truncated" else model.adapter
    for plain in filter(None, (second, whole.encoder if aligned else whole)):  # DINOv2 first, a baseline in any case
        full = aligned and plain is not second
        x = plain(vit.normalize(pixels, plain.config), skip_blocks=int(not full), norm=full)
        prefix = adapter in ("transformer", "truncated", "decoder") or adapter == "mlp" and aligned
        expected.append(x if prefix else x[:, plain.config.num_prefix :])
    last.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    assert model.encode_images(model.features(pixels)).shape == (5, model.config.image_tokens, 48)
    assert error(read[0], torch.cat(expected, -1)) < 1e-6
    assert len(model.vision.blocks) == config.depth - 2 * (adapter == "truncated") - (not aligned)
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    assert trained == {*model.adapter.parameters(), *model.language.parameters()}


@torch.no_grad()
def test_transformer_is_from_scratch():
    """With LayerScale at 1e-6 and a last layer of the default size; unlike the decoder, it sees prefix tokens."""
    scratch, x = build(backbone(), "transformer").adapter, torch.randn(2, 10, 32)
    assert len(scratch.decoder.blocks) == 2 and torch.all(scratch.decoder.blocks[1].ls2.gamma == 1e-6)
    assert 0.5 < scratch.decoder.head.weight.abs().max() * 32**0.5 <= 1
    other = torch.cat([torch.randn(2, 1, 32), x[:, 1:]], 1)
    for adapter, hides in ((vivid(scratch), False), (tiny("decoder", True).adapter, True)):
        assert torch.equal(adapter(x), adapter(other)) == hides


def test_encode():
    ids, labels = encode("<image>\nWhat color is the ring?", " blue\n", "What is\n2?", "It is, and 3 bars.")
    pieces = ["In: What color is the ring?\nOut:", "blue", "In: What is\n2?\nOut:", "It is, and 3 bars."]
    tokens = [TOKENIZER.encode(piece, bos=i == 0, eos=i % 2 == 1) for i, piece in enumerate(pieces)]
    assert ids == sum(tokens, []) and ids[0] == TOKENIZER.bos and ids[-1] == TOKENIZER.eos
    assert labels == sum([[i if turn % 2 else IGNORE for i in piece] for turn, piece in enumerate(tokens)], [])
    ids, labels = encode("</s> {answer}", "<s> {question} </s>")
    assert ids.count(TOKENIZER.bos) == 1 and ids.count(TOKENIZER.eos) == 1  # these come from the template alone
    assert TOKENIZER.decode([i for i in labels if i != IGNORE]) == "<s> {question} </s>"
    ids, labels = encode("What is it?", "blue ring", "It?", "12", template=VICUNA)
    first = TOKENIZER.encode(f"{VICUNA.system}USER: What is it? ASSISTANT: blue ring", bos=True, eos=True)
    assert ids == first + TOKENIZER.encode("USER: It? ASSISTANT: 12", eos=True)  # as if encoded as a whole
    assert labels[: len(first)] == [IGNORE] * (len(first) - 3) + first[-3:]
    model = tiny()
    for model.config in (model.config, replace(model.config, template=VICUNA)):  # a choice is worded as an answer
        assert model.first_tokens(["True", " blue ring"]) == TOKENIZER.encode("True") + TOKENIZER.encode("blue")


def test_what_data_workers_call():
    """`encode` cuts long text, `prepare` squeezes an image; both can be pickled."""
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "blue " * 99}]
    short = pickle.loads(pickle.dumps(functools.partial(vlm.encode, TOKENIZER, LLAMA, max_text=20)))
    assert short(talk) == tuple(values[:20] for values in vlm.encode(TOKENIZER, LLAMA, talk))
    assert tiny().config.max_text == 247  # 256 tokens of context, 9 of them an image's
    image, prepare = pictures()[2], pickle.loads(pickle.dumps(functools.partial(vlm.prepare, config=FIRST)))
    assert torch.equal(vit.normalize(prepare(image), FIRST), vit.preprocess(image, FIRST, square=True))
    assert prepare(image.convert("L")).shape == (3, 24, 24) and prepare(image).dtype == torch.uint8


def samples() -> list[tuple[list[int], list[int], Tensor | None]]:
    """Ids, labels and pixels of seven samples, one of them with two turns, one with a label on every token."""
    encoded = [encode(*pair) for pair in zip(QUESTIONS, ANSWERS)]
    encoded[2], encoded[4] = encode("What?", "blue", "Is it?", "It is not."), (encoded[4][0], encoded[4][0])
    return [(*pair, image and vlm.prepare(image, FIRST)) for pair, image in zip(encoded, pictures())]


def collate(batch: list[tuple[list[int], list[int], Tensor | None]]) -> dict[str, Tensor | None]:
    """Arguments of `VLM.forward`."""
    ids, labels, images = zip(*batch)
    ids, mask = Tokenizer.pad(ids, left=False)
    labels = Tokenizer.pad(labels, left=False)[0].masked_fill(mask == 0, IGNORE)
    rows = torch.tensor([i for i, image in enumerate(images) if image is not None])
    images = torch.stack([images[i] for i in rows]) if len(rows) else None
    return dict(ids=ids, labels=labels, images=images, rows=None if len(rows) in (0, len(ids)) else rows)


def logits_of(model: VLM, ids: list[int], pixels: Tensor | None) -> Tensor:
    """All logits of one sample, [S, W]: <s>, image, text, without padding; the definition."""
    x = model.language.embed(torch.tensor([ids]))
    x = x if pixels is None else torch.cat([x[:, :1], model.encode_images(model.features(pixels[None])), x[:, 1:]], 1)
    return model.language(embeds=x)[0]


@pytest.mark.parametrize("adapter, aligned", CASES)
def test_mixed_batch_is_its_samples(adapter, aligned):
    """Loss and gradients against the definition and against batches of one; images in any order."""
    model, batch, expected = tiny(adapter, aligned), samples(), 0
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for ids, labels, pixels in batch:
        logits = logits_of(model, ids, pixels)[:-1]
        target = torch.tensor([IGNORE] * (len(logits) - len(labels) + 1) + labels[1:])
        expected = expected + F.cross_entropy(logits, target, reduction="sum")
    reference = torch.autograd.grad(expected, weights)
    mixed, order = collate(batch), torch.tensor([3, 0, 4, 1, 2])
    turned = mixed | dict(images=mixed["images"][order], rows=mixed["rows"][order])
    for loss in (model(**mixed), model(**turned), sum(model(**collate([sample])) for sample in batch)):
        assert loss.dtype == torch.float32 and abs(loss.item() / expected.item() - 1) < 1e-6
        grads = torch.autograd.grad(loss, weights)
        assert error(*(torch.cat([grad.flatten() for grad in some]) for some in (grads, reference))) < 1e-5
    assert abs(model(**mixed | dict(images=mixed["images"][order])).item() / expected.item() - 1) > 1e-6
    model(**collate(batch[1:2])).backward()  # text alone reaches every parameter, so that DDP's ranks communicate alike
    assert all(parameter.grad is not None for parameter in weights)
    assert all(parameter.grad.abs().max() == 0 for parameter in model.adapter.parameters())


@pytest.mark.parametrize("adapter, aligned", [("mlp", False), ("decoder", True), ("truncated", True)])
def test_bfloat16(tmp_path, adapter, aligned):
    """Weights in bfloat16, and autocast without and with FSDP, which gathers them so, come close to float32."""
    model, half = tiny(adapter, aligned), tiny(adapter, aligned).bfloat16()
    batch, text = collate(samples()), collate(samples()[1:2])
    exact, autocast = model(**batch).item(), torch.autocast("cpu", torch.bfloat16)
    with autocast:
        assert abs(model(**batch).item() / exact - 1) < 3e-2
    assert abs(half(**batch).item() / exact - 1) < 5e-2
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for part in (*model.language.model.layers, model):
        fully_shard(part, mp_policy=policy, ignored_params={p for p in model.parameters() if not p.requires_grad})
    for inputs in (text, batch):
        with autocast:
            loss = model(**inputs)
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert loss.dtype == torch.float32 and abs(loss.item() / exact - 1) < 3e-2
    dist.destroy_process_group()


def greedy(model: VLM, image: Image.Image | None, prompt: str, count: int, stop: int = -1) -> list[int]:
    """The definition, without cache or batch."""
    ids, pixels, answer = encode(prompt)[0], image and vlm.prepare(image, FIRST), []
    room = model.config.language.max_position_embeddings - len(ids) - 9 * (image is not None)
    while len(answer) < min(count, room):
        answer.append(logits_of(model, ids + answer, pixels)[-1].argmax().item())
        if answer[-1] == stop:
            return answer[:-1]
    return answer


@torch.no_grad()
@pytest.mark.parametrize("adapter, context, count", [("mlp", 256, 12), ("fused-mlp", 64, 50)])
def test_generate_in_a_batch_alone_and_uncached(monkeypatch, adapter, context, count):
    """Token for token, of 7 lengths, with and without an image; near the context's end, each gets its own room."""
    model, images = tiny(adapter, max_position_embeddings=context), pictures()
    stop = greedy(model, images[0], QUESTIONS[0], 6)[-1] if context > 64 else -1  # a word that the model does say
    monkeypatch.setattr(TOKENIZER, "eos", stop)
    monkeypatch.setattr(TOKENIZER, "decode", str)
    together = model.generate(images, QUESTIONS, count)
    assert together == [model.generate([image], [prompt], count)[0] for image, prompt in zip(images, QUESTIONS)]
    assert together == [str(greedy(model, image, prompt, count, stop)) for image, prompt in zip(images, QUESTIONS)]
    assert len(set(together)) == 7 and len({len(json.loads(ids)) for ids in together}) > 1


@torch.no_grad()
def test_stream_sampling_turns_and_shared_images(monkeypatch):
    model, (image, other, *_), seen = tiny(), [image for image in pictures() if image], []
    parts = list(model.stream(image, QUESTIONS[0], 20))
    assert len(parts) > 1 and "".join(parts).strip() == model.generate([image], QUESTIONS[:1], 20)[0]
    draw = lambda seed: model.generate([image] * 3, QUESTIONS[:1] * 3, 12, 1.0, torch.Generator().manual_seed(seed))
    assert draw(1) == draw(1) != draw(2) and len(set(draw(1))) > 1
    turns = [{"from": "human", "value": "<image>A"}, {"from": "gpt", "value": "No"}, {"from": "human", "value": "1"}]
    (embeds, mask), text = model.read([image], [turns]), torch.tensor([encode("A", "No", "1")[0][1:]])
    assert torch.equal(embeds[:, 10:], model.language.embed(text)) and mask.all()  # a conversation, as in training
    images, real = [other, image, None, other, image, image, other], model.encode_images
    alone = [model.generate([image], [prompt], 8)[0] for image, prompt in zip(images, QUESTIONS)]
    monkeypatch.setattr(model, "encode_images", lambda pixels: seen.append(len(pixels)) or real(pixels))
    assert model.generate(images, QUESTIONS, 8) == alone and seen == [2]  # each image once


@torch.no_grad()
def test_score():
    """In a batch, alone, and by the definition."""
    model, images = tiny("transformer"), pictures()
    choices = [["True", "False"], ["1", "2", "3"], ["blue"], ["is", "red"], ["the", "It"], ["Yes", "No"], ["1 ", "is"]]
    for i, scores in enumerate(model.score(images, QUESTIONS, choices)):
        logits = logits_of(model, encode(QUESTIONS[i])[0], images[i] and vlm.prepare(images[i], FIRST))[-1]
        expected = logits.softmax(0)[[TOKENIZER.encode(choice)[0] for choice in choices[i]]]
        assert np.allclose(scores, expected / expected.sum(), atol=1e-5) and abs(sum(scores) - 1) < 1e-6
        assert np.allclose(scores, model.score([images[i]], [QUESTIONS[i]], [choices[i]])[0], atol=1e-5)


@pytest.mark.parametrize("adapter, aligned", [("decoder", True), ("truncated", True), ("fused-mlp", False)])
def test_save_and_load(tmp_path, adapter, aligned):
    model, folder = tiny(adapter, aligned, tie_word_embeddings=aligned), tmp_path / "model"
    vlm.save(model, folder)
    if adapter == "decoder":  # folders from before this version have a soft-cap there
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | dict(decoder=dict(depth=1, width=64, softcap=None))))
    loaded, batch = vlm.load(folder), collate(samples())
    assert replace(loaded.config, decoder=None) == replace(model.config, decoder=None)
    assert torch.equal(loaded(**batch), model(**batch))
    assert {p.dtype for p in vlm.load(folder, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_save_replaces_a_vlm_and_nothing_else(tmp_path):
    model, folder = tiny(), tmp_path / "model"
    old, new = model.language.lm_head.weight.detach(), {name: 2 * value for name, value in model.state_dict().items()}
    (folder / ".new").mkdir(parents=True)  # what a killed process leaves is in no one's way
    vlm.save(model, folder)
    with pytest.raises(AttributeError):
        vlm.save(model, folder, dict.fromkeys(new))  # nothing that can be written
    assert torch.equal(vlm.load(folder).language.lm_head.weight, old)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "tokenizer.model"]
    vlm.save(model, folder, new)  # as gathered from shards
    assert torch.equal(vlm.load(folder).language.lm_head.weight, 2 * old)
    llama.save(model.language, tmp_path / "llama")
    assert "config.json: is not a VLM's" in refusal(vlm.save, model, tmp_path / "llama")
    assert "exists and is not a VLM" in refusal(vlm.save, model, tmp_path)


def test_command(tmp_path, capsys, monkeypatch):
    model, image, missing = tiny("decoder", True), tmp_path / "image.png", tmp_path / "none.png"
    vlm.save(model, tmp_path / "model")
    pictures()[0].save(image)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, picture in ((image, pictures()[0]), ("-", None)):
        vlm.main([str(tmp_path / "model"), str(name), "What is it?", "--max-new-tokens", "9"])
        assert capsys.readouterr().out.strip() == model.generate([picture], ["What is it?"], 9)[0] != ""
    with launch("vlm.py", tmp_path / "model", missing, "What?") as wrong:
        said = wrong.stderr.read()
        assert said.startswith("vlm.py: ") and str(missing) in said and wrong.wait() == 1


def test_parts_that_do_not_fit_and_wrong_prompts(tmp_path):
    plain, larger = backbone(), backbone(config=replace(SECOND, image_size=32))
    pooled = maskembed.make_student(plain, maskembed.OBJECTIVES["average"])
    assert "this one is not aligned; give" in refusal(build, plain, "decoder")
    assert "this one was aligned without a decoder; give" in refusal(build, pooled, "decoder")
    assert "adapter 'linear': choose one of mlp, decoder" in refusal(build, plain, "linear")
    assert "give a second backbone with fused-mlp" in refusal(build, plain, "fused-mlp")
    assert "3^2 patches of 24^2 pixels and 4^2 patches of 32^2 pixels" in refusal(build, plain, "fused-mlp", larger)
    assert "9 image tokens leave no room" in refusal(build, plain, "mlp", max_position_embeddings=10)

    model, image, cut, long = tiny(), pictures()[0], tmp_path / "cut.png", "blue " * 245
    image.save(cut)
    cut.write_bytes(cut.read_bytes()[:900])
    assert model.score([None], [long], [["1", "2"]])  # with an image it is too long
    assert "prompt 'blue blue" in refusal(model.score, [None, image], ["What", long], [["1"]] * 2)
    assert "no room for an answer in the context of 256" in refusal(lambda: next(model.stream(image, long)))
    assert "1 images for 2 prompts" in refusal(model.generate, [image], ["A", "B"])
    assert "turn 1 of a conversation is not text from human" in refusal(model.generate, [None], [[{"from": "gpt"}]])
    assert "cut.png: cannot be read as an image" in refusal(model.generate, [Image.open(cut)], ["What?"])
    assert "or one of them is" in refusal(model.score, [image], ["A"], [["A", ""]])
    assert "['blue ring', 'blue'] begin with" in refusal(model.score, [image], ["A"], [["blue ring", "red", "blue"]])


@pytest.mark.parametrize("file, change, message", [
    ("config.json", os.remove, "model: holds no VLM (no config.json); give a folder"),
    ("config.json", lambda p: p.write_text("{}"), "config.json: is not a VLM's config; give"),
    ("config.json", lambda p: p.write_text(p.read_text().replace("mlp", "linear", 1)), "config.json: adapter 'linear'"),
    ("model.safetensors", os.remove, "model.safetensors: "),
    ("model.safetensors", lambda p: save_file(load_file(p) | {"vision.cls_token": torch.ones(2)}, p),
     "tensor vision.cls_token is missing, unknown or of another shape"),
    ("tokenizer.model", os.remove, "tokenizer.model: "),
])
def test_damaged_folders(tmp_path, file, change, message):
    vlm.save(tiny(), tmp_path / "model")
    change(tmp_path / "model" / file)
    assert message in refusal(vlm.load, tmp_path / "model")


def test_no_answer_follows_from_what_is_not_a_number():
    model = tiny()
    model.language.lm_head.weight.data[5] = math.nan
    for ask in (lambda: model.generate([None], ["What?"]), lambda: model.score([None], ["What?"], [("What", "Out")])):
        assert "outputs are not finite" in refusal(ask)


def test_any_number_of_images_has_few_shapes(monkeypatch):
    """A compiled backbone is one kernel for each: here, of 1, 2, 4 and 8 images."""
    model, shapes = tiny(), []
    encode = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda images: shapes.append(len(images)) or encode(images))
    images = [Image.new("RGB", (8, 8), (25 * i, 0, 0)) for i in range(8)]
    alone = [model.read([image], ["What?"])[0] for image in images]
    for count in range(1, 9):
        together, _ = model.read(images[:count], ["What?"] * count)
        assert torch.allclose(together, torch.cat(alone[:count]), atol=1e-5)
    assert set(shapes) == {1, 2, 4, 8}


def test_transparency_is_told_and_any_terminal_will_do(tmp_path, capsys, monkeypatch):
    model, image = tiny(), tmp_path / "clear.png"
    vlm.save(model, tmp_path / "vlm")
    Image.new("RGBA", (9, 9), (255, 0, 0, 0)).save(image)
    monkeypatch.setattr(VLM, "stream", lambda self, image, *more: iter([f"{image.convert('RGB').getpixel((0, 0))} é"]))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    vlm.main([str(tmp_path / "vlm"), str(image), "What?"])
    sys.stdout.seek(0)
    assert sys.stdout.read() == "(255, 0, 0) \\xe9\n"
    assert f"{image}: is transparent in places" in capsys.readouterr().err
