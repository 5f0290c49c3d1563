"""llama.py against transformers' and Meta's outputs (tests/data/llama), its own definitions, and wrong input."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import error, refusal
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

import convert
import llama
from llama import Llama, LlamaConfig, Tokenizer

DATA = Path(__file__).parent / "data" / "llama"
TINY = LlamaConfig(96, 48, 80, 2, 6, num_key_value_heads=2, max_position_embeddings=128)
PROMPTS = [[3 + (7 * n + 5 * i * i + i) % 93 for i in range(n)] for n in (5, 1, 12, 7, 3, 12, 9)]
LEFT, RIGHT = Tokenizer.pad(PROMPTS), Tokenizer.pad(PROMPTS, left=False)
TWO = torch.tensor([PROMPTS[2], PROMPTS[5][::-1]])


def tiny(**changes) -> Llama:
    """A small model with values of ordinary size everywhere, so that its choices differ clearly."""
    torch.manual_seed(0)
    model = Llama(replace(TINY, **changes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, *((0, 0.3) if parameter.ndim == 2 else (1, 0.2)))
    return model


def same(a: Llama, b: Llama) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture(scope="module", params=["mha", "gqa"])
def reference(request, tmp_path_factory) -> tuple[Llama, dict[str, Tensor]]:
    """A model, in transformers' layout or (with grouped queries) in Meta's, and what its own program makes of it."""
    folder = DATA / "mha" if request.param == "mha" else tmp_path_factory.mktemp("gqa")
    if request.param == "gqa":
        convert.convert_llama(DATA / "gqa" / "meta", folder)
    return llama.load(folder), load_file(DATA / request.param / "expected.safetensors")


def test_exact(reference):
    model, expected = reference
    assert error(model(expected["ids"]), expected["logits"]) < 1e-5
    assert error(model(embeds=expected["inputs_embeds"]), expected["embeds_logits"]) < 1e-5
    mask = expected["left_pad_mask"]
    logits = model(expected["ids"], mask=mask)
    assert error(logits[mask.bool()], expected["left_pad_logits"][mask.bool()]) < 1e-5
    assert logits.isfinite().all()  # also where there is padding alone
    prompt = expected["ids"][:1]
    assert model.generate(prompt, max_new_tokens=24, stop=None) == expected["greedy"][:, prompt.shape[1] :].tolist()
    loss = model.loss(model.embed(expected["ids"]), expected["labels"])
    loss.backward()
    assert error(loss[None], expected["loss"]) < 1e-5
    assert error(model.model.embed_tokens.weight.grad, expected["grad.embed"]) < 1e-5
    assert error(model.model.layers[0].self_attn.q_proj.weight.grad, expected["grad.q0"]) < 1e-5


@torch.no_grad()
def test_against_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, (ids, mask) = tiny(head_dim=10, rope_theta=5000.0), LEFT  # heads wider than hidden_size / heads
    llama.save(model, tmp_path / "saved")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert theirs.config.rope_parameters["rope_theta"] == 5000.0
    theirs = theirs(ids, attention_mask=mask).logits
    assert error(model(ids, mask=mask)[mask.bool()], theirs[mask.bool()]) < 1e-5


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_is_the_formula(kv_heads):
    """softmax(q k^T / sqrt(d)) v, causal, each group of heads with one head of keys and values."""
    attention, x = tiny(num_key_value_heads=kv_heads).model.layers[0].self_attn, torch.randn(2, 7, 48)
    cos, sin = llama.rotary(torch.arange(7)[None], TINY)
    q, k, v = (f(x).view(2, 7, -1, 8).transpose(1, 2) for f in (attention.q_proj, attention.k_proj, attention.v_proj))
    k, v = (t.repeat_interleave(6 // kv_heads, 1) for t in (llama.rotate(k, cos, sin), v))
    logits, causal = llama.rotate(q, cos, sin) @ k.mT / 8**0.5, torch.ones(7, 7, dtype=torch.bool).tril()
    values = logits.masked_fill(~causal, -torch.inf).softmax(-1) @ v
    expected = attention.o_proj(values.transpose(1, 2).flatten(2))
    assert error(attention(x, cos, sin, None, None), expected) < 1e-6
    assert error(attention(x, cos, sin, causal.expand(2, 1, 7, 7), None), expected) < 1e-6
    half = llama.rotate(q.bfloat16(), cos, sin)  # float32 inside: rounded once, at the end
    assert half.dtype == torch.bfloat16 and torch.equal(half, llama.rotate(q.bfloat16().float(), cos, sin).bfloat16())


@torch.no_grad()
@pytest.mark.parametrize("padded", [LEFT, RIGHT], ids=["left", "right"])
def test_cached_with_padding(padded):
    """Each prompt of a padded batch, read at once, or in two parts and continued, gets the logits it gets alone."""
    model, (ids, mask), cache = tiny(), padded, llama.Cache(TINY, len(PROMPTS), 16, torch.float32, "cpu")
    whole = model(ids, mask=mask)
    logits = torch.cat([model(ids[:, a:b], mask=mask[:, a:b], cache=cache) for a, b in ((0, 6), (6, 12))], 1)
    more = model(torch.full((len(PROMPTS), 1), 5), cache=cache)
    for i, text in enumerate(PROMPTS):
        alone = model(torch.tensor([[*text, 5]]))[0]
        assert error(whole[i, mask[i].bool()], alone[:-1]) < 1e-5
        assert error(torch.cat([logits[i, mask[i].bool()], more[i]]), alone) < 1e-5
    if padded is RIGHT:  # needs no mask
        assert error(model(ids)[mask.bool()], whole[mask.bool()]) < 1e-6
    places = torch.tensor([[0, 11, 3], [2, 2, 7]])
    assert error(model(ids[:2], mask=mask[:2], positions=places), whole[torch.tensor([[0], [1]]), places]) < 1e-6


@pytest.mark.parametrize("checkpointing, tied", [(False, False), (True, False), (True, True)])
def test_loss_is_that_of_all_logits(monkeypatch, checkpointing, tied):
    """Also with left padding; it is computed in chunks, of which no logits are kept for the backward pass."""
    monkeypatch.setattr(llama, "CHUNK", 7)
    model, (ids, mask), kept = tiny(tie_word_embeddings=tied).double(), LEFT, []
    labels = ids.masked_fill((mask == 0) | (ids % 3 == 0), llama.IGNORE)
    logits = model(ids, mask=mask)[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    model.checkpointing = checkpointing
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = model.loss(model.embed(ids), labels, mask)
    assert kept and not any(x.shape[-1] == 96 and x.shape[0] <= 7 for x in kept if x.ndim == 2)
    assert error(loss.detach(), expected.detach()) < 1e-6  # the loss itself is float32
    for ours, theirs in zip(torch.autograd.grad(loss, list(model.parameters())), gradients):
        assert error(ours, theirs) < 1e-6


def test_logits_are_computed_where_labels_are():
    """And no matrix product twice but theirs; with checkpointing, each layer's forward pass once more."""
    model, labels, flops = tiny(), TWO.clone(), []
    labels[:, :8] = llama.IGNORE
    embeds = torch.randn(2, 12, 48, requires_grad=True)
    for model.checkpointing in (False, True):
        with FlopCounterMode(display=False) as counter:
            model.loss(embeds, labels).backward()
        flops.append(counter.get_flop_counts()["Global"][torch.ops.aten.mm])
    layers = 2 * 24 * 2 * (48 * (48 + 16 + 16 + 48) + 3 * 48 * 80)
    assert flops[0] == 3 * layers + 4 * 2 * 8 * 48 * 96  # forward and two backward; 8 labels
    assert 1.15 < flops[1] / flops[0] < 1.34
    loss = model.loss(embeds, torch.full((2, 12), llama.IGNORE))
    assert loss == 0 and torch.autograd.grad(loss, embeds)[0].abs().max() == 0


def test_autocast():
    """bf16 autocast over float32 weights: the loss, its gradients and text, but for rounding."""
    model, gradients = tiny(), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model.loss(model.embed(TWO), TWO)
            assert len(model.generate(TWO, max_new_tokens=4, stop=None)[0]) == 4
        gradients.append(torch.autograd.grad(loss, model.model.layers[0].mlp.up_proj.weight)[0])
    assert loss.dtype == torch.float32 and 0 < error(*gradients) < 0.1


@pytest.fixture
def shard():
    """Shards a model as one rank among several that are not there (backend fake), or as the only one (gloo)."""

    def shard(model: Llama, backend: str, world: int, **how) -> Llama:
        store = FakeStore() if backend == "fake" else dist.HashStore()
        dist.init_process_group(backend, store=store, rank=world - 1, world_size=world)
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=dist.init_device_mesh("cpu", (world,)), **how)
        return model

    yield shard
    dist.destroy_process_group()


def test_fill_sharded_parameters(shard, tmp_path):
    """The last of 5 processes gets its rows, fewer than the others' or none, without their help."""
    llama.save(tiny(), tmp_path / "model")
    model = shard(tiny().to("meta"), "fake", 5).to_empty(device="cpu")
    llama.fill(model, tmp_path / "model")
    for name, whole in tiny().named_parameters():
        rows, ours = whole.chunk(5), model.get_parameter(name).to_local()
        assert torch.equal(ours, rows[4]) if len(rows) == 5 else ours.numel() == 0


def test_fsdp_in_bf16(shard, tmp_path):
    """bf16 weights and embeddings, tied ones, too; the cosines stay float32."""
    model, seen = tiny(tie_word_embeddings=True), []
    llama.save(model, tmp_path / "model")
    expected = model.loss(model.embed(TWO), TWO).item()
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    llama.fill(shard(model.to("meta"), "gloo", 1, mp_policy=policy).to_empty(device="cpu"), tmp_path / "model")
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.extend(x.dtype for x in inputs[:3]))
    model.forward = lambda ids: model.loss(model.embed(ids), ids)  # FSDP hooks the call of the whole model
    (loss := model(TWO)).backward()
    assert seen == [torch.bfloat16, torch.float32, torch.float32] and loss.item() == pytest.approx(expected, rel=0.05)
    assert all(p.grad.dtype == torch.float32 and p.grad.to_local().isfinite().all() for p in model.parameters())


def test_batch_equals_single_calls():
    """With padding on either side, from ids or embeddings; </s> ends each text in its own time, and fills it."""
    model, (ids, mask), options = tiny(), LEFT, dict(max_new_tokens=20, stop=11)
    alone = [model.generate(torch.tensor([text]), **options)[0] for text in PROMPTS]
    assert len(set(map(len, alone))) > 2 and any(len(text) < 20 for text in alone)
    assert model.generate(ids, mask=mask, **options) == model.generate(RIGHT[0], mask=RIGHT[1], **options) == alone
    assert model.generate(embeds=model.embed(ids), mask=mask, **options) == alone
    steps = torch.stack(list(model.stream(ids, mask=mask, **options)), 1).tolist()
    assert len(steps[0]) == min(20, max(map(len, alone)) + 1)
    assert all(step == (text + [11] * 20)[: len(step)] for text, step in zip(alone, steps))


def test_sampling():
    def draw(seed: int, rows: int = 3, steps: int = 8, temperature: float = 1.0) -> list[list[int]]:
        how = dict(max_new_tokens=steps, stop=None, generator=torch.Generator().manual_seed(seed))
        return tiny().generate(torch.full((rows, 1), 5), temperature=temperature, **how)

    assert draw(1) == draw(1) != draw(2) and draw(1)[0] != draw(1)[1]
    assert draw(1, temperature=1e-4) == draw(2, temperature=0)
    share = torch.tensor(draw(3, 4000, 1, 5.0)).flatten().bincount(minlength=96) / 4000
    assert (share - (tiny()(torch.tensor([[5]]))[0, -1] / 5).softmax(0)).abs().max() < 0.02


def test_context_ends_generation():
    model, twice = tiny(max_position_embeddings=20), TWO.repeat(1, 2)
    assert len(model.generate(TWO, max_new_tokens=50, stop=None)[0]) == 8
    assert "24 tokens leave no room for 256 new ones in the context of 20" in refusal(model.generate, twice)
    assert "24 tokens exceed the context of 20" in refusal(model, twice)


def test_decode_compiles_once():
    """One graph for all steps of prompts of any length, however full the cache is."""
    model, (ids, mask), how = tiny(num_hidden_layers=1), LEFT, dict(max_new_tokens=12, stop=None)
    expected = [model.generate(ids[:, skip:], mask=mask[:, skip:], **how) for skip in (0, 3)]
    model.decode = torch.compile(model.decode, backend="eager", fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert expected == [model.generate(ids[:, skip:], mask=mask[:, skip:], **how) for skip in (0, 3)]


TEXT = "In: What color is the big ring?\nOut: It is deep blue, and the 12 bars beside it not.\n  def f(x):\n\treturn x"


def train(path: Path, **changes) -> Path:
    """A sentencepiece model trained as Llama's: byte-pair encoding, nothing normalized, every space kept, bytes."""
    how = dict(model_type="bpe", byte_fallback=True, split_digits=True, normalization_rule_name="identity")
    how |= dict(remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2, vocab_size=330)
    lines, prefix = iter(TEXT.split("\n") * 50), str(path.with_suffix(""))
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=prefix, **how | changes)
    return path


def test_tokenizer_encodes_as_sentencepiece(tmp_path):
    tokenizer = Tokenizer(train(tmp_path / "tokenizer.model"))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in ("", " ", "a", " a", "  two  spaces ", "\n", "a\nb", TEXT, "<s></s>", "naïve 漢字 🙂", "x\n\n"):
        ids = tokenizer.encode(text, bos=True, eos=True)
        assert tokenizer.encode(text) == ids[1:-1] and {1, 2}.isdisjoint(ids[1:-1])
        assert ids == pieces.encode(text, add_bos=True, add_eos=True)
        parts = list(tokenizer.stream(ids))
        assert tokenizer.decode(ids) == "".join(parts) == text and not any("\ufffd" in part for part in parts)
        assert len(parts) > 5 or text != TEXT
    cut = tokenizer.encode("ok 漢")[:-1]  # in the middle of a character
    assert "".join(tokenizer.stream(cut)) == tokenizer.decode(cut)
    assert Tokenizer(tmp_path, len(pieces)).vocab_size == len(pieces) and (tokenizer.bos, tokenizer.eos) == (1, 2)
    assert "none: is missing or not a sentencepiece model" in refusal(Tokenizer, tmp_path / "none")
    assert "tokens, the model only 99; use the tokenizer.model" in refusal(Tokenizer, tmp_path, 99)
    padded = Tokenizer(tmp_path, 32064)  # rows without a word are usual, and say nothing
    assert padded.decode([*ids, 32001]) == padded.decode(ids)
    train(tmp_path / "tokenizer.model", vocab_size=300, eos_id=-1)
    assert "has no <s> or no </s>" in refusal(Tokenizer, tmp_path)


def test_configs():
    old = dict(vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6)
    config = LlamaConfig.from_transformers(old)
    assert (config.kv_heads, config.head_size, config.rope_theta, config.rms_norm_eps) == (6, 8, 10000.0, 1e-6)
    assert LlamaConfig.from_transformers(old | dict(rope_theta=5e5, rope_scaling=None)).rope_theta == 5e5
    new = old | dict(rope_parameters=dict(rope_type="default", rope_theta=5e5), head_dim=10, tie_word_embeddings=True)
    config = LlamaConfig.from_transformers(new)
    assert (config.rope_theta, config.head_size, config.tie_word_embeddings) == (5e5, 10, True)
    assert LlamaConfig.from_transformers(config.to_transformers()) == replace(config, num_key_value_heads=6)
    assert LlamaConfig(**json.loads(json.dumps(asdict(config)))) == config
    with torch.device("meta"):  # 7B and 70B
        models = Llama(LlamaConfig()), Llama(LlamaConfig(32000, 8192, 28672, 80, 64, num_key_value_heads=8))
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [6738415616, 68976648192]


CONFIGS = {
    "its model_type is 'mistral'": dict(model_type="mistral"),
    "its rope_type is 'linear'": dict(rope_scaling=dict(type="linear", factor=2.0)),
    "its rope_type is 'llama3'": dict(rope_parameters=dict(rope_type="llama3", rope_theta=5e5)),
    "its num_hidden_layers is 0": dict(num_hidden_layers=0),
    "hidden_size 48, 6 heads of 8 channels, 4 heads of keys": dict(num_key_value_heads=4, head_dim=None),
}


@pytest.mark.parametrize("message", CONFIGS)
def test_wrong_configs(message):
    assert message in refusal(LlamaConfig.from_transformers, TINY.to_transformers() | CONFIGS[message])


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:  # a small model in five files
    monkeypatch.setattr(llama, "SHARD", 40_000)
    llama.save(tiny(), tmp_path / "model")
    return tmp_path / "model"


def test_save_and_load(folder, tmp_path, monkeypatch):
    """A failed write leaves nothing behind."""
    files = sorted(folder.glob("model-0000?-of-00005.safetensors"))
    assert len(files) == 5 and all(file.stat().st_size < 45_000 for file in files)
    assert same(llama.load(folder), tiny()) and not llama.load(folder).training
    index = json.loads((folder / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in tiny().parameters())
    assert "exists already" in refusal(llama.save, tiny(), folder)
    monkeypatch.setattr(llama, "save_file", lambda *_: (_ for _ in ()).throw(llama.SafetensorError("No space left")))
    assert "new: cannot be written (No space left); is the disk full?" in refusal(llama.save, tiny(), tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    (folder / "config.json").write_text("\ufeff" + (folder / "config.json").read_text())  # as Windows' editors do
    assert llama.read_config(folder) == replace(TINY, head_dim=8)


def test_tied_and_half(tmp_path):
    tied = tiny(tie_word_embeddings=True)
    llama.save(tied, tmp_path / "tied")
    assert sorted(file.name for file in (tmp_path / "tied").iterdir()) == ["config.json", "model.safetensors"]
    half = llama.load(tmp_path / "tied", torch.bfloat16)
    assert half.lm_head.weight is half.model.embed_tokens.weight and same(half, tied.bfloat16())
    llama.save(half, tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert same(llama.load(tmp_path / "half", torch.bfloat16), half)


def test_a_weight_that_is_not_a_number_is_named(tmp_path):
    model = tiny()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    llama.save(model, tmp_path / "model")
    assert "tensor model.layers.1.mlp.up_proj.weight holds a NaN" in refusal(llama.load, tmp_path / "model")


def test_pickled_shards(folder):
    """pytorch_model.bin, as older repositories (Vicuna's) have it, with the tables that they carry along."""
    index = (folder / INDEX).rename(folder / "pytorch_model.bin.index.json")
    index.write_text(index.read_text().replace(".safetensors", ".bin"))
    for file in folder.glob("*.safetensors"):
        torch.save(load_file(file) | {"model.layers.0.rotary_emb.inv_freq": torch.ones(4)}, file.with_suffix(".bin"))
        file.unlink()
    assert same(llama.load(folder), tiny())


INDEX, SECOND = "model.safetensors.index.json", "model-00002-of-00005.safetensors"
DAMAGE = {
    f"{SECOND}: cannot be read as weights (FileNotFound": lambda f: (f / SECOND).unlink(),
    f"{SECOND}: cannot be read as weights (Safetensor": lambda f: (f / SECOND).write_bytes(b"12345678"),
    f"{SECOND}: tensor a is [3], the model has no": lambda f: save_file({"a": torch.ones(3)}, f / SECOND),
    "is [3], the model has [96, 48];": lambda f: save_file({"lm_head.weight": torch.ones(3)}, f / SECOND),
    "model: tensor model.layers.0.mlp": lambda f: save_file({}, f / SECOND),
    "model.safetensors: cannot be read as weights": lambda f: (f / INDEX).unlink(),
    "index.json: cannot be read as a JSON object": lambda f: (f / INDEX).write_text("{"),
    "config.json: cannot be read as a JSON object": lambda f: (f / "config.json").unlink(),
    "first run: python convert.py llama ": lambda f: (f / "config.json").rename(f / "params.json"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_folders(folder, message):
    DAMAGE[message](folder)
    assert message in refusal(llama.load, folder)
