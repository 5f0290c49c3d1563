"""llama.py against transformers' and Meta's outputs, its own definitions, and wrong input.

tests/data/llama holds two tiny models with what the reference programs make of them: `mha` in transformers' layout, in
three files, `gqa` (grouped queries) in Meta's; of each the q and k projections in the other layout, too. Tests that
need transformers itself are skipped where it is not installed.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import llama
from llama import Llama, LlamaConfig, LlamaError

DATA = Path(__file__).parent / "data" / "llama"
FOLDERS = {"mha": DATA / "mha", "gqa": DATA / "gqa" / "meta"}
TINY = LlamaConfig(
    vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip
LENGTHS = (5, 1, 12, 7, 3, 12, 9)


def error(ours: Tensor, reference: Tensor) -> float:
    """Relative error, of the norm."""
    assert ours.shape == reference.shape
    return ((ours.double() - reference.double()).norm() / reference.double().norm()).item()


def tiny(seed: int = 0, **changes) -> Llama:
    """A small model with values of ordinary size everywhere, so that its choices differ clearly."""
    torch.manual_seed(seed)
    model = Llama(replace(TINY, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3) if parameter.ndim == 2 else parameter.normal_(1, 0.2)
    return model


def prompts(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 96, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module", params=FOLDERS)
def reference(request) -> tuple[Llama, dict[str, Tensor]]:
    """A reference model, and what the reference programs make of it."""
    return llama.load(FOLDERS[request.param]), load_file(DATA / request.param / "expected.safetensors")


# ----------------------------------------------------------------------------------------------------------------------
# The reference programs


@torch.no_grad()
def test_logits(reference):
    model, expected = reference
    assert error(model(expected["ids"]), expected["logits"]) < 1e-5
    assert error(model(embeds=expected["inputs_embeds"]), expected["embeds_logits"]) < 1e-5


@torch.no_grad()
def test_left_padding(reference):
    model, expected = reference
    mask = expected["left_pad_mask"]
    logits = model(expected["ids"], mask=mask)
    assert error(logits[mask.bool()], expected["left_pad_logits"][mask.bool()]) < 1e-5
    assert logits.isfinite().all()  # also where there is padding alone


def test_greedy(reference):
    model, expected = reference
    prompt = expected["ids"][:1]
    assert model.generate(prompt, max_new_tokens=24, stop=None) == expected["greedy"][:, prompt.shape[1] :].tolist()


def test_loss_and_gradients(reference):
    model, expected = reference
    model.zero_grad()
    loss = model.loss(model.embed(expected["ids"]), expected["labels"])
    loss.backward()
    assert error(loss[None], expected["loss"]) < 1e-5
    assert error(model.model.embed_tokens.weight.grad, expected["grad.embed"]) < 1e-5
    assert error(model.model.layers[0].self_attn.q_proj.weight.grad, expected["grad.q0"]) < 1e-5


def test_layouts_hold_the_same(tmp_path):
    """Rows of q and k change places between the layouts: as the reference programs have it, both ways."""
    q_k = load_file(DATA / "gqa" / "transformers-q-k.safetensors")
    model = llama.load(FOLDERS["gqa"])
    assert all(torch.equal(model.get_parameter(name), value) for name, value in q_k.items())
    llama.convert(FOLDERS["mha"], tmp_path / "meta")
    written = torch.load(tmp_path / "meta" / "consolidated.00.pth")
    for name, value in load_file(DATA / "mha" / "meta-q-k.safetensors").items():
        assert torch.equal(written[name], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_transformers(tmp_path, dtype):
    transformers = pytest.importorskip("transformers")
    model = tiny(head_dim=10, rope_theta=5000.0).to(dtype)  # heads wider than hidden_size / heads
    llama.save(model, tmp_path / "saved")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype).eval()
    assert theirs.config.rope_parameters["rope_theta"] == 5000.0
    ids, mask = llama.Tokenizer.pad(prompts())
    with torch.no_grad():
        ours, theirs = model(ids, mask=mask), theirs(ids, attention_mask=mask).logits
    assert error(ours[mask.bool()], theirs[mask.bool()]) < (1e-5 if dtype == torch.float32 else 1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Attention, cache, positions


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition: causal, each group of heads with one head of keys and values."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    logits = q @ k.mT / q.shape[-1] ** 0.5
    later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return logits.masked_fill(later, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("T", [1, 7])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attend(T, kv_heads):
    q, k, v = torch.randn(2, 6, T, 8), torch.randn(2, kv_heads, T, 8), torch.randn(2, kv_heads, T, 8)
    expected = plain_attention(q, k, v)
    assert error(llama.attend(q, k, v, None), expected) < 1e-6
    bias = torch.zeros(T, T).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    assert error(llama.attend(q, k, v, bias.expand(2, 1, T, T)), expected) < 1e-6


@pytest.mark.parametrize("T", [40, 520])
def test_attend_in_training_in_bfloat16(T):
    """Short or long: the result and its gradients are float32's but for bfloat16's rounding."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, T, 16).bfloat16().requires_grad_() for _ in range(3)]
    exact = [x.detach().float().requires_grad_() for x in inputs]
    weights = torch.randn(2, 3, T, 16).bfloat16()
    ours, theirs = llama.attend(*inputs, None), plain_attention(*exact)
    assert ours.dtype == torch.bfloat16 and error(ours.float(), theirs) < 0.02
    ours.backward(weights), theirs.backward(weights.float())
    assert all(error(a.grad.float(), b.grad) < 0.02 for a, b in zip(inputs, exact))


def test_rotate_is_a_rotation_of_pairs():
    x, positions = torch.randn(2, 5, 3, 8), torch.tensor([[0, 1, 2, 3, 4], [0, 0, 7, 8, 90]])
    pair = torch.complex(x[..., :4], x[..., 4:])
    angle = positions[:, :, None, None] * TINY.rope_theta ** -(torch.arange(0, 8, 2) / 8)
    turned = pair * torch.polar(torch.ones_like(angle), angle)
    ours = llama.rotate(x, *llama.rope_tables(positions, TINY))
    assert error(ours, torch.cat([turned.real, turned.imag], -1)) < 1e-6
    half = llama.rotate(x.bfloat16(), *llama.rope_tables(positions, TINY))  # float32 inside: rounded once, at the end
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, llama.rotate(x.bfloat16().float(), *llama.rope_tables(positions, TINY)).bfloat16())


def test_norm_and_projection():
    """`project` and its gradients are those of the plain formula; what is frozen gets none."""
    torch.manual_seed(0)
    norm, layers = llama.RMSNorm(48, 1e-5), [torch.nn.Linear(48, n, bias=False) for n in (8, 16, 8)]
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 48, requires_grad=True)
    expected = [layer(x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight) for layer in layers]
    inputs = [x, norm.weight, layers[0].weight, layers[2].weight]
    weighted = lambda ys: sum((y * torch.arange(y.numel()).view_as(y).cos()).sum() for y in ys)
    gradients = torch.autograd.grad(weighted(expected), inputs)
    layers[1].requires_grad_(False)
    for ours, theirs in zip(torch.autograd.grad(weighted(llama.project(x, norm, *layers)), inputs), gradients):
        assert error(ours, theirs) < 1e-5
    with torch.no_grad():
        for ours, theirs in zip(llama.project(x, norm, *layers), expected):
            assert error(ours, theirs) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        ys = llama.project(x, norm, *layers)
    assert {y.dtype for y in ys} == {torch.bfloat16}
    for ours, theirs in zip(torch.autograd.grad(weighted(y.float() for y in ys), inputs), gradients):
        assert ours.dtype == torch.float32 and error(ours, theirs) < 1e-2


@torch.no_grad()
def test_cached_equals_uncached():
    model, ids = tiny(), torch.tensor([prompts()[2], prompts()[5]])
    cache = llama.Cache(TINY, 2, 20, torch.float32)
    parts = [model(part, cache=cache) for part in ids.split([4, 1, 3, 1, 1, 2], 1)]
    assert error(torch.cat(parts, 1), model(ids)) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("left", [True, False])
def test_cached_with_padding(left):
    """Each prompt of a padded batch, read in two parts and continued, gets the logits it gets alone."""
    model, texts = tiny(), prompts()
    ids, mask = llama.Tokenizer.pad(texts, left)
    cache = llama.Cache(TINY, len(texts), 16, torch.float32)
    logits = torch.cat([model(ids[:, a:b], mask=mask[:, a:b], cache=cache) for a, b in ((0, 6), (6, 12))], 1)
    more = model(torch.full((len(texts), 1), 5), cache=cache)
    for i, text in enumerate(texts):
        alone = model(torch.tensor([[*text, 5]]))[0]
        assert error(logits[i, mask[i].bool()], alone[:-1]) < 1e-5
        assert error(more[i, 0], alone[-1]) < 1e-5


@torch.no_grad()
def test_padding_on_either_side_and_none():
    model, texts = tiny(), prompts()
    for left in (True, False):
        ids, mask = llama.Tokenizer.pad(texts, left)
        logits = model(ids, mask=mask)
        for i, text in enumerate(texts):
            assert error(logits[i, mask[i].bool()], model(torch.tensor([text]))[0]) < 1e-5
    assert error(model(ids)[mask.bool()], logits[mask.bool()]) < 1e-6  # on the right, no mask is needed


@torch.no_grad()
def test_positions():
    model, ids = tiny(), torch.tensor([prompts()[2], prompts()[5]])
    positions = torch.tensor([[0, 11, 3], [2, 2, 7]])
    logits = model(ids)
    chosen = torch.stack([logits[0, positions[0]], logits[1, positions[1]]])
    assert error(model(ids, positions=positions), chosen) < 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# Loss and memory


def full_loss(model: Llama, embeds: Tensor, labels: Tensor, mask: Tensor | None = None, **options) -> Tensor:
    """The definition, from all logits."""
    logits = model(embeds=embeds, mask=mask)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), **options)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_is_that_of_all_logits(monkeypatch, checkpointing, reduction, tied):
    monkeypatch.setattr(llama, "CHUNK", 7)
    model = tiny(tie_word_embeddings=tied).double()
    ids, mask = llama.Tokenizer.pad(prompts())
    labels = ids.masked_fill((mask == 0) | (ids % 3 == 0), llama.IGNORE)
    expected = full_loss(model, model.embed(ids), labels, mask, reduction=reduction)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    model.checkpointing = checkpointing
    loss = model.loss(model.embed(ids), labels, mask, reduction)
    assert error(loss.detach(), expected.detach()) < 1e-6  # the loss itself is float32
    for ours, theirs in zip(torch.autograd.grad(loss, list(model.parameters())), gradients):
        assert error(ours, theirs) < 1e-6


def test_no_label_no_loss():
    model = tiny()
    embeds = torch.randn(2, 5, 48, requires_grad=True)
    loss = model.loss(embeds, torch.full((2, 5), llama.IGNORE))
    loss.backward()
    assert loss == 0 and embeds.grad.abs().max() == 0


def test_output_layer_runs_where_labels_are_and_no_product_twice():
    """What `lean` computes again is cheap: of matrix products only the logits, which are not kept."""
    model, ids = tiny(num_key_value_heads=6), torch.tensor([prompts()[2], prompts()[5]])
    labels = ids.clone()
    labels[:, :8] = llama.IGNORE
    with FlopCounterMode(display=False) as counter:
        model.loss(torch.randn(2, 12, 48, requires_grad=True), labels).backward()
    layers = 2 * (4 * 48 * 48 + 3 * 48 * 80)
    products = 3 * 2 * 24 * layers + 4 * 2 * 8 * 48 * 96  # forward and two backward; 8 labels
    flops = counter.get_flop_counts()["Global"]
    assert flops[torch.ops.aten.mm] + flops[torch.ops.aten.addmm] == products


def test_kept_for_the_backward_pass():
    """Of each layer: what enters both parts, q, k, v, attention's result, gate and up. Of the loss: what has labels."""
    model, embeds = tiny(num_key_value_heads=6), torch.randn(4, 32, 48, requires_grad=True)
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    labels = torch.full((4, 32), llama.IGNORE)
    labels[:, -2:] = 5
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.loss(embeds, labels)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    numbers = sum(storage.nbytes() for address, storage in kept.items() if address not in weights) / 4
    assert loss.requires_grad and 1 < numbers / (2 * 4 * 32 * (6 * 48 + 2 * 80)) < 1.06


def test_checkpointing_keeps_only_inputs():
    model, ids = tiny(), torch.tensor([prompts()[2]])
    with FlopCounterMode(display=False) as plain:
        model(ids).sum().backward()
    model.checkpointing = True
    with FlopCounterMode(display=False) as again:
        model(ids).sum().backward()
    assert 1.15 < again.get_total_flops() / plain.get_total_flops() < 1.34


# ----------------------------------------------------------------------------------------------------------------------
# Generation


def test_batch_equals_single_calls():
    model = tiny()
    ids, mask = llama.Tokenizer.pad(prompts())
    together = model.generate(ids, mask=mask, max_new_tokens=30, stop=11)
    alone = [model.generate(torch.tensor([text]), max_new_tokens=30, stop=11)[0] for text in prompts()]
    assert together == alone
    assert len(set(map(len, alone))) > 2 and any(len(text) < 30 for text in alone)  # they do stop, each in its own time
    right, right_mask = llama.Tokenizer.pad(prompts(), left=False)
    assert model.generate(right, mask=right_mask, max_new_tokens=30, stop=11) == alone
    assert model.generate(embeds=model.embed(ids), mask=mask, max_new_tokens=30, stop=11) == alone


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
@pytest.mark.parametrize("tied", [False, True])
def test_packed(tied):
    """A packed model computes the same, of one row or many, and holds no other copy of its layers."""
    model, packed = tiny(tie_word_embeddings=tied), llama.pack(tiny(tie_word_embeddings=tied))
    ids, mask = llama.Tokenizer.pad(prompts())
    assert error(packed(ids, mask=mask)[mask.bool()].detach(), model(ids, mask=mask)[mask.bool()].detach()) < 1e-5
    options = dict(mask=mask, max_new_tokens=20, stop=None)
    assert packed.generate(ids, **options) == model.generate(ids, **options)
    assert all(
        parameter.ndim == 1 or name.endswith("embed_tokens.weight") for name, parameter in packed.named_parameters()
    )
    with pytest.raises(LlamaError, match="only a model on the CPU can be packed, and only once"):
        llama.pack(packed)


@torch.no_grad()
def test_greedy_is_argmax_of_all_logits():
    model, ids = tiny(), torch.tensor([prompts()[0]])
    for token in model.generate(ids, max_new_tokens=10, stop=None)[0]:
        assert token == model(ids)[0, -1].argmax()
        ids = torch.cat([ids, torch.tensor([[token]])], 1)


@torch.no_grad()
def test_prompts_that_share_a_prefix():
    """It is read once, with or without padding in it; each continues it as if it had read the whole, and it can be used again."""
    model, texts = tiny(), [text[:4] for text in prompts()]
    starts, which = [[1, 7, 9], [1], [1, 4]], torch.tensor([2, 0, 1, 0, 0, 1, 2][: len(texts)])
    whole = [starts[i] + text for i, text in zip(which, texts)]
    alone = [model.generate(torch.tensor([text]), max_new_tokens=12, stop=None)[0] for text in whole]
    cache = llama.Cache(TINY, 3, 3, torch.float32)
    ids, mask = llama.Tokenizer.pad(starts, left=False)
    model(ids, mask=mask, cache=cache)
    kept = [tensor.clone() for tensor in (*cache.k, *cache.v, cache.mask, cache.place)]
    ids, mask = llama.Tokenizer.pad(texts)
    for _ in range(2):
        assert model.generate(ids, mask=mask, max_new_tokens=12, stop=None, prefix=(cache, which)) == alone
    assert cache.used == 3 and all(map(torch.equal, kept, (*cache.k, *cache.v, cache.mask, cache.place)))
    taken = cache.take(which, 9)
    logits = model(ids, mask=mask, cache=taken, positions=torch.full((len(texts), 1), ids.shape[1] - 1))
    for i, text in enumerate(whole):
        assert error(logits[i, 0], model(torch.tensor([text]))[0, -1]) < 1e-5
    with pytest.raises(LlamaError, match="do not fit"):
        cache.take(which, 2)
    room = TINY.max_position_embeddings - 3
    with pytest.raises(LlamaError, match=f"a prompt of {room + 3} tokens leaves no room"):
        model.generate(torch.full((1, room), 5), prefix=(cache, which[:1]))
    assert len(model.generate(torch.full((1, room - 1), 5), stop=None, prefix=(cache, which[:1]))[0]) == 1


def test_stop_fills_and_ends():
    model = tiny()
    ids, mask = llama.Tokenizer.pad(prompts())
    texts = model.generate(ids, mask=mask, max_new_tokens=30, stop=11)
    steps = torch.stack(list(model.stream(ids, mask=mask, max_new_tokens=30, stop=11)), 1).tolist()
    assert len(steps[0]) == min(30, max(map(len, texts)) + 1)
    for text, step in zip(texts, steps):
        assert step == (text + [11] * 30)[: len(step)]


def test_sampling():
    model, ids = tiny(), torch.tensor([prompts()[0]] * 3)
    draw = lambda seed: model.generate(
        ids, max_new_tokens=8, temperature=1.0, stop=None, generator=torch.Generator().manual_seed(seed)
    )
    assert draw(1) == draw(1) != draw(2)
    assert draw(1)[0] != draw(1)[1]
    cold = model.generate(ids, max_new_tokens=8, temperature=1e-4, stop=None)
    assert cold == model.generate(ids, max_new_tokens=8, stop=None)
    logits = torch.tensor([[0.0, 2.0, 4.0]]).repeat(20000, 1)
    drawn = llama.choose(logits, 2.0, torch.Generator().manual_seed(0)).bincount() / 20000
    assert (drawn - (logits[0] / 2).softmax(0)).abs().max() < 0.01


def test_context_ends_generation():
    model = tiny(max_position_embeddings=20)
    ids = torch.tensor([prompts()[2]])
    assert len(model.generate(ids, max_new_tokens=50, stop=None)[0]) == 8
    with pytest.raises(LlamaError, match="max_new_tokens is 0; ask for at least one"):
        model.generate(ids, max_new_tokens=0)
    with pytest.raises(LlamaError, match="a prompt of 24 tokens leaves no room in the context of 20"):
        model.generate(ids.repeat(1, 2))
    with pytest.raises(LlamaError, match="24 tokens exceed the context of 20"):
        model(ids.repeat(1, 2))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_compiled_step():
    """One graph, compiled once, for all steps of all prompts of a batch size."""
    model = tiny(num_hidden_layers=1)
    ids, mask = llama.Tokenizer.pad(prompts())
    expected = [model.generate(ids[:, skip:], mask=mask[:, skip:], max_new_tokens=12, stop=None) for skip in (0, 3)]
    torch._dynamo.reset()
    model.decode = torch.compile(model.decode, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for skip, texts in zip((0, 3), expected):
            assert model.generate(ids[:, skip:], mask=mask[:, skip:], max_new_tokens=12, stop=None) == texts


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer

TEXT = "In: What colour is the big ring?\nOut: It is deep blue, and the 12 bars beside it not.\n  def f(x):\n\treturn x"


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory) -> Path:
    """A sentencepiece model trained as Llama's: byte-pair encoding, nothing normalized, every space kept, bytes."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n") * 50), model_prefix=str(path.with_suffix("")), vocab_size=330,
        model_type="bpe", byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return path


def test_tokenizer_encodes_as_sentencepiece(vocabulary):
    tokenizer = llama.Tokenizer(vocabulary)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    texts = [
        "",
        " ",
        "a",
        " a",
        "  two  spaces ",
        "\n",
        "a\nb",
        TEXT,
        "</s>",
        "<s>In: x",
        "naïve 漢字 🙂",
        "the ring\n\n",
    ]
    for text in texts:
        assert tokenizer.encode(text) == pieces.encode(text)
        assert tokenizer.encode(text, bos=True, eos=True) == pieces.encode(text, add_bos=True, add_eos=True)
        assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text
        assert tokenizer.bos not in tokenizer.encode(text) and tokenizer.eos not in tokenizer.encode(text)
    assert (tokenizer.bos, tokenizer.eos) == (1, 2) and tokenizer.encode("\n")[-1] == pieces.piece_to_id("<0x0A>")
    answer = tokenizer.encode("blue", eos=True)  # on its own: a word of its own
    assert pieces.id_to_piece(answer[0]).startswith("▁") and tokenizer.decode(answer) == "blue"
    assert llama.Tokenizer(vocabulary.parent, len(pieces)).vocab_size == len(pieces)


def test_tokenizer_of_a_real_model():
    """Mistral 7B's, of Llama's kind, which the package mistral-common carries: a sentence's published ids, and as
    sentencepiece encodes."""
    package = importlib.util.find_spec("mistral_common")
    if package is None:
        pytest.skip("needs mistral-common (pip install --no-deps mistral-common is enough)")
    path = Path(package.origin).parent / "data" / "tokenizer.model.v1"
    tokenizer, pieces = llama.Tokenizer(path, 32000), sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert tokenizer.encode("Hello, how are you?", bos=True, eos=True) == [1, 22557, 28725, 910, 460, 368, 28804, 2]
    for text in ("", "  two  spaces ", "a\nb\n\n", TEXT, "<s>naïve 漢字 🙂</s>"):
        ids = tokenizer.encode(text, bos=True, eos=True)
        assert ids == pieces.encode(text, add_bos=True, add_eos=True) and tokenizer.decode(ids) == text
        assert {1, 2}.isdisjoint(ids[1:-1])  # special tokens stand at the ends only


def test_tokenizer_streams(vocabulary):
    tokenizer = llama.Tokenizer(vocabulary)
    for text in (TEXT, "naïve 漢字 🙂 x"):
        parts = list(tokenizer.stream(tokenizer.encode(text, bos=True, eos=True)))
        assert "".join(parts) == text and not any("\ufffd" in part for part in parts) and len(parts) > 5
    cut = tokenizer.encode("ok 漢")[:-1]
    assert "".join(tokenizer.stream(cut)) == tokenizer.decode(cut)
    assert list(tokenizer.stream([])) == []


def test_pad():
    ids, mask = llama.Tokenizer.pad([[5, 6], [7], []])
    assert ids.tolist() == [[5, 6], [0, 7], [0, 0]] and mask.tolist() == [[1, 1], [0, 1], [0, 0]]
    ids, mask = llama.Tokenizer.pad([[5, 6], [7], []], left=False)
    assert ids.tolist() == [[5, 6], [7, 0], [0, 0]] and mask.tolist() == [[1, 1], [1, 0], [0, 0]]
    assert llama.Tokenizer.pad([])[0].shape == (0, 0)


def test_wrong_tokenizers(vocabulary, tmp_path):
    size = llama.Tokenizer(vocabulary).vocab_size
    with pytest.raises(LlamaError, match=f"has {size} words, the model 32000"):
        llama.Tokenizer(vocabulary, 32000)
    with pytest.raises(LlamaError, match="tokenizer.model: no such file"):
        llama.Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(LlamaError, match="is no sentencepiece model"):
        llama.Tokenizer(tmp_path)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n") * 9), model_prefix=str(tmp_path / "tokenizer"), vocab_size=60,
        eos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(LlamaError, match="has no <s> or no </s>"):
        llama.Tokenizer(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Configuration


def test_sizes_of_the_presets():
    counts = {}
    with torch.device("meta"):
        for name, config in llama.LLAMAS.items():
            layer = Llama(replace(config, num_hidden_layers=1))
            rest = 2 * config.vocab_size * config.hidden_size + config.hidden_size
            one = sum(parameter.numel() for parameter in layer.parameters()) - rest
            counts[name] = rest + one * config.num_hidden_layers
    assert counts == {"llama2-7b": 6738415616, "llama2-13b": 13015864320, "llama2-70b": 68976648192}


def test_old_and_new_config_keys():
    old = dict(vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6)
    config = LlamaConfig.from_transformers(old)
    assert (config.kv_heads, config.head_size, config.rope_theta, config.rms_norm_eps) == (6, 8, 10000.0, 1e-6)
    assert LlamaConfig.from_transformers(old | dict(rope_theta=5e5, rope_scaling=None)).rope_theta == 5e5
    new = old | dict(rope_parameters=dict(rope_type="default", rope_theta=5e5), head_dim=10, tie_word_embeddings=True)
    config = LlamaConfig.from_transformers(new)
    assert (config.rope_theta, config.head_size, config.tie_word_embeddings) == (5e5, 10, True)
    assert LlamaConfig.from_transformers(config.to_transformers()) == replace(config, num_key_value_heads=6)
    assert LlamaConfig(**json.loads(json.dumps(asdict(config)))) == config
    sibling = replace(llama.LLAMAS["llama2-7b"], hidden_size=64, num_attention_heads=4)
    assert (sibling.kv_heads, sibling.head_size) == (4, 16)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model_type="mistral"), "model_type is 'mistral'"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (dict(attention_bias=True), "attention_bias is True"),
        (dict(rope_scaling=dict(type="linear", factor=2.0)), "rope_type is 'linear'"),
        (dict(rope_parameters=dict(rope_type="llama3", rope_theta=5e5)), "rope_type is 'llama3'"),
        (dict(num_key_value_heads=4), "6 heads cannot share 4 heads"),
        (dict(hidden_size=50), "hidden_size 50 is no multiple of the 6 heads"),
        (dict(head_dim=7), "heads of 7 channels"),
        (dict(num_hidden_layers=0), "num_hidden_layers is 0"),
        (dict(vocab_size="many"), "vocab_size is 'many'"),
    ],
)
def test_wrong_configs(change, message):
    with pytest.raises(LlamaError, match=message):
        LlamaConfig.from_transformers(TINY.to_transformers() | dict(num_key_value_heads=2, head_dim=None) | change)


def test_config_lacks_a_size():
    with pytest.raises(LlamaError, match="has no hidden_size"):
        LlamaConfig.from_transformers(dict(vocab_size=96))


def meta_size(values: dict) -> int:
    """intermediate_size, as Meta's code finds it from params.json."""
    size = int(2 * (4 * values["dim"]) / 3)
    if values.get("ffn_dim_multiplier") is not None:
        size = int(values["ffn_dim_multiplier"] * size)
    return values["multiple_of"] * ((size + values["multiple_of"] - 1) // values["multiple_of"])


def test_params_give_metas_code_the_same_sizes():
    configs = list(llama.LLAMAS.values()) + [replace(TINY, intermediate_size=size) for size in (1, 80, 127, 128, 500)]
    for config in configs:
        assert meta_size(config.to_meta()) == config.intermediate_size
    with pytest.raises(LlamaError, match="Meta's layout has heads of"):
        replace(TINY, head_dim=10).to_meta()


# ----------------------------------------------------------------------------------------------------------------------
# Files


def split_meta(folder: Path, shards: int) -> Path:
    """A folder in Meta's layout with one shard -> another with several, as Meta's model parallelism splits them."""
    state = torch.load(folder / "consolidated.00.pth")
    dims = {name: dim for name, dim in llama.META.values()}
    target = folder.with_name(f"{folder.name}-{shards}")
    target.mkdir()
    shutil.copy(folder / "params.json", target)
    for i in range(shards):
        part = {}
        for name, value in state.items():
            key = name.removesuffix(".weight").split(".", 2 * name.startswith("layers."))[-1]
            part[name] = value if dims[key] is None else value.chunk(shards, dims[key])[i].clone()
        torch.save(part | {"rope.freqs": torch.ones(4)}, target / f"consolidated.{i:02d}.pth")
    return target


def same(a: Llama, b: Llama) -> bool:
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A small model in transformers' layout, in five files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama, "SHARD", 40_000)
        llama.save(tiny(), tmp_path / "model")
    return tmp_path / "model"


def test_save_and_load(folder, tmp_path):
    assert len(list(folder.glob("model-0000?-of-00005.safetensors"))) == 5
    assert all(file.stat().st_size < 45_000 for file in folder.glob("*.safetensors"))
    assert same(llama.load(folder), tiny())
    tied = tiny(tie_word_embeddings=True)
    llama.save(tied, tmp_path / "tied")
    loaded = llama.load(tmp_path / "tied")
    assert same(loaded, tied) and loaded.lm_head.weight is loaded.model.embed_tokens.weight
    half = llama.load(tmp_path / "tied" / "model.safetensors", torch.bfloat16)  # a file, its config beside it
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert same(half, tied.bfloat16())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in tiny().parameters())
    with pytest.raises(LlamaError, match="is there already"):
        llama.save(tied, folder)
    with pytest.raises(LlamaError, match="is there already"):
        llama.save(tied, folder / "config.json")


def test_pickled_shards_of_transformers(folder, tmp_path):
    """pytorch_model.bin, as older repositories (Vicuna's) have it, with the tables that they carry along."""
    target = tmp_path / "old"
    target.mkdir()
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"], config["head_dim"], config["dtype"]
    (target / "config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: file.replace("safetensors", "bin") for name, file in index["weight_map"].items()}
    for file in folder.glob("*.safetensors"):
        tables = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        torch.save(load_file(file) | tables, target / f"{file.stem}.bin")
    (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert same(llama.load(target), tiny())


@pytest.mark.parametrize("shards", [1, 2])
def test_conversion_round_trip(folder, tmp_path, shards):
    (folder / "tokenizer.model").write_bytes(b"pieces")
    llama.convert(folder, tmp_path / "meta")
    meta = split_meta(tmp_path / "meta", shards)
    assert same(llama.load(meta), tiny())
    shutil.copy(tmp_path / "meta" / "tokenizer.model", tmp_path)  # where Meta's download has it: one level up
    llama.convert(meta, tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == b"pieces"
    state = {}
    for file in folder.glob("*.safetensors"):
        state |= load_file(file)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    ids = torch.tensor([prompts()[2]])
    assert torch.equal(llama.load(tmp_path / "back")(ids), tiny()(ids))
    assert not list(tmp_path.glob(".*"))


def test_conversion_keeps_the_dtype(tmp_path):
    llama.save(tiny(tie_word_embeddings=True).half(), tmp_path / "half")
    llama.convert(tmp_path / "half", tmp_path / "meta")
    llama.convert(tmp_path / "meta", tmp_path / "back")
    state = load_file(tmp_path / "back" / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])  # Meta has no tied ones
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float16"


def test_failed_write_leaves_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(llama, "save_file", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        llama.save(tiny(), tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def damage(folder: Path, kind: str) -> None:
    """What goes wrong with folders of weights."""
    second = folder / "model-00002-of-00005.safetensors"
    index = folder / "model.safetensors.index.json"
    match kind:
        case "missing":
            second.unlink()
        case "truncated":
            second.write_bytes(second.read_bytes()[:-100])
        case "empty":
            second.write_bytes(b"")
        case "another's":
            save_file({"model.layers.7.mlp.up_proj.weight": torch.ones(2)}, second)
        case "another's shapes":
            save_file({name: torch.ones(3, 3) for name in load_file(second)}, second)
        case "one too many":
            save_file(load_file(second) | {"model.layers.2.mlp.up_proj.weight": torch.ones(2)}, second)
        case "twice":
            save_file(load_file(second) | {"model.norm.weight": torch.ones(48)}, second)
        case "index":
            index.write_text(index.read_text()[:-20])
        case "no index":
            index.unlink()
        case "no config":
            (folder / "config.json").unlink()
        case "config":
            (folder / "config.json").write_text("[]")
        case "layers":
            values = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(values | dict(num_hidden_layers=3)))


@pytest.mark.parametrize(
    "kind, message",
    [
        ("missing", "model-00002-of-00005.safetensors: is missing"),
        ("truncated", "model-00002-of-00005.safetensors: cannot be read as weights"),
        ("empty", "model-00002-of-00005.safetensors: cannot be read as weights"),
        ("another's", r"model-00002-of-00005.safetensors: lacks tensor model\..*, against its index"),
        ("another's shapes", r"model-00002-of-00005.safetensors: tensor .* is \[3, 3\], not \["),
        ("one too many", "00002-of-00005.safetensors: tensor model.layers.2.mlp.up_proj.weight has no place"),
        ("twice", "model.norm.weight a second time"),
        ("index", "index.json: is no JSON"),
        ("no index", "no such file, nor a folder with model.safetensors, its index or consolidated"),
        ("no config", "config.json: no such file"),
        ("config", "config.json: holds no JSON object"),
        ("layers", r"lacks tensor model.layers.2\."),
    ],
)
def test_damaged_folders(folder, kind, message):
    damage(folder, kind)
    with pytest.raises(LlamaError, match=message) as caught:
        llama.load(folder)
    assert "\n" not in str(caught.value)


def damage_meta(folder: Path, kind: str) -> None:
    """The same in Meta's layout, of four shards."""
    params, second, last = folder / "params.json", folder / "consolidated.01.pth", folder / "consolidated.03.pth"
    values = json.loads(params.read_text())
    match kind:
        case "gap":
            second.unlink()
        case "last":
            last.unlink()
        case "truncated":
            second.write_bytes(second.read_bytes()[:-500])
        case "another's":
            torch.save({"layers.0.attention.wq.weight": torch.ones(2)}, second)
        case "code":
            torch.save({"layers.0.attention.wq.weight": Path("x")}, second)
        case "no params":
            params.unlink()
        case "params":
            params.write_text(json.dumps({k: v for k, v in values.items() if k != "n_heads"}))
        case "scaled":
            params.write_text(json.dumps(values | dict(use_scaled_rope=True)))


@pytest.mark.parametrize(
    "kind, message",
    [
        ("gap", "consolidated.01.pth: is missing, while later ones are there"),
        ("last", r"consolidated.00.pth: tensor .* is \[.*\], not \["),
        ("truncated", "consolidated.01.pth: cannot be read as weights"),
        ("another's", "consolidated.01.pth: lacks tensor tok_embeddings.weight"),
        ("code", "consolidated.01.pth: cannot be read as weights"),
        ("no params", "params.json: no such file"),
        ("params", "lack n_heads"),
        ("scaled", "scales the rotary embedding"),
    ],
)
def test_damaged_folders_of_meta(tmp_path, kind, message):
    model = tiny(num_key_value_heads=4, num_attention_heads=4)
    llama.save(model, tmp_path / "model")
    llama.convert(tmp_path / "model", tmp_path / "meta")
    folder = split_meta(tmp_path / "meta", 4)
    assert same(llama.load(folder), model)
    damage_meta(folder, kind)
    with pytest.raises(LlamaError, match=message) as caught:
        llama.load(folder)
    assert "\n" not in str(caught.value)


def test_wrong_input():
    model, ids = tiny(), torch.tensor([prompts()[2]])
    cases = [
        (lambda: model(), "give either ids or embeds"),
        (lambda: model(ids, embeds=model.embed(ids)), "give either ids or embeds"),
        (lambda: model(ids, mask=torch.ones(1, 5)), r"the mask is \[1, 5\], the tokens are \[1, 12\]"),
        (lambda: model.loss(model.embed(ids), ids[:, 1:]), r"the labels are \[1, 11\], the tokens \[1, 12\]"),
        (lambda: model(ids, cache=llama.Cache(TINY, 1, 10, torch.float32)), "12 tokens more do not fit"),
        (lambda: model.generate(), "give either ids or embeds"),
    ]
    for call, message in cases:
        with pytest.raises(LlamaError, match=message):
            call()


def test_works_when_copied_alone(folder, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(llama.__file__, alone)
    environment = dict(os.environ, PYTHONPATH=str(alone))
    command = [sys.executable, "llama.py", "convert", str(folder), "meta"]
    done = subprocess.run(command, cwd=alone, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "in Meta's layout" in done.stdout, done.stderr
    assert same(llama.load(alone / "meta"), tiny())


def test_command_says_what_is_wrong(folder, tmp_path):
    for source, target, message in (("nowhere", "out", "nowhere: no such file"), (folder, folder, "is there already")):
        with pytest.raises(SystemExit, match=f"llama.py: .*{message}"):
            llama.main(["convert", str(source), str(target)])
