"""train_vlm.py as a user runs it: whole runs on tiny models, sameness over processes, resuming, wrong input."""

import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import data
import llama
import maskembed
import train_vlm
import vit
import vlm

ROOT = Path(train_vlm.__file__).parent
TINY = dict(image_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, crop_pct=1.0)
TINY_LANGUAGE = llama.LlamaConfig(
    vocab_size=640, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=512,
)  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A folder with a tiny backbone, its aligned version, a second one, a language model, and conversations in two
    files: 40 about 8 scenes, 20 without an image."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    teacher = vit.ViT(vit.ViTConfig(**TINY))
    student = maskembed.make_student(teacher)
    for model in (teacher, student):
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    vit.save(teacher, folder / "teacher.safetensors")
    vit.save(vit.ViT(vit.ViTConfig(**TINY | {"embed_dim": 48, "registers": 2})), folder / "second.safetensors")
    maskembed.save(student, folder / "aligned.safetensors")
    llama.save(llama.Llama(TINY_LANGUAGE), folder / "llama")
    train_vlm.train_tokenizer(folder / "llama" / "tokenizer.model")
    scenes, rows, texts = data.Scenes(8, 0, 32), [], []
    (folder / "images").mkdir()
    for i in range(8):
        scenes[i].image.save(folder / "images" / scenes.name(i))
        rows += scenes[i].conversations[:5]
        for row in scenes[i].conversations[:3]:
            texts.append({"conversations": [dict(turn) for turn in row["conversations"]] * (1 + i % 2)})
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, texts[:20])))
    return folder


@pytest.fixture(scope="module")
def default(parts: Path, tmp_path_factory) -> Path:
    """The output of ten updates of the default flags."""
    out = tmp_path_factory.mktemp("default")
    run(*flags(parts, out))
    return out


@pytest.fixture(autouse=True)
def no_group():
    """A test that makes a Run by itself leaves its process group to this."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
        signal.signal(number, handler)


def flags(parts: Path, out: Path, *more: object) -> list[str]:
    """Ten updates of 8 conversations (five epochs of five batches of images and two of texts are there), each logged."""
    text = f"--recipe own --weights {parts / 'aligned.safetensors'} --language {parts / 'llama'} --out {out} --batch 8"
    text += f" --data {parts / 'rows.json'} {parts / 'texts.jsonl'} --images {parts / 'images'} --epochs 5 --updates 10"
    return [*text.split(), *"--lr 1e-3 --log-every 1 --workers 0 --precision fp32".split(), *map(str, more)]


def run(*argv: object) -> None:
    train_vlm.main([str(a) for a in argv])


def process(*argv: object, ranks: int = 1) -> subprocess.Popen:
    """The command in a process of its own, or several under torchrun."""
    launcher = [sys.executable]
    if ranks > 1:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
    return subprocess.Popen(
        [*launcher, str(ROOT / "train_vlm.py"), *map(str, argv)], env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def log_lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> dict[int, float]:
    """update -> training loss."""
    return {line["update"]: line["loss"] for line in log_lines(out)}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return vlm.load(out / "model").state_dict()


def same(a: Path, b: Path) -> bool:
    """Whether two runs ended with the same losses and weights, to the last bit."""
    ours, theirs = weights(a), weights(b)
    return losses(a) == losses(b) and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def fails(*argv: object) -> str:
    """What a run that must fail says: one sentence, exit status 1."""
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    message = str(caught.value)
    assert message.startswith("train_vlm.py: ") and "\n" not in message
    return message


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs


def test_a_run_from_start_to_end(parts: Path, default: Path):
    log = log_lines(default)
    assert [line["update"] for line in log] == list(range(1, 11)) and log[-1]["loss"] < log[0]["loss"]
    assert {"epoch", "lr", "grad_norm", "labels", "skipped", "bad_rows", "conversations_per_s"} <= log[0].keys()
    assert sorted(p.name for p in (default / "model").iterdir()) == ["config.json", "model.safetensors", "tokenizer.model"]
    assert [p.name for p in (default / "checkpoints").iterdir()] == ["update-00000010"]
    model = vlm.load(default / "model")
    assert model.config.adapter == "decoder" and model.config.aligned and model.config.max_text == 512 - 17
    frozen, start = maskembed.load(parts / "aligned.safetensors"), llama.load(parts / "llama").state_dict()
    assert all(torch.equal(value, frozen.encoder.state_dict()[name]) for name, value in model.vision.state_dict().items())
    assert not any(torch.equal(value, start[name]) for name, value in model.language.state_dict().items() if value.ndim > 1)
    assert not torch.equal(model.adapter.head.weight, frozen.head.weight) and model.adapter.decoder.head.weight.abs().sum() > 0
    answers = model.generate([Image.open(parts / "images" / "scene-0-000000.png"), None], ["Is there a ring?"] * 2, 5)
    assert all(isinstance(answer, str) for answer in answers)


def test_the_demo_ends_with_answers(parts: Path, tmp_path: Path, capfd, monkeypatch):
    """No data: scenes, a language model from scratch, and questions about other scenes."""
    monkeypatch.setattr(train_vlm, "DEMO_LANGUAGE", TINY_LANGUAGE)
    base = ("--weights", parts / "aligned.safetensors", "--batch", 8, "--scenes", 16, "--val-scenes", 10, "--updates", 2)
    run(*base, "--out", tmp_path / "demo", "--precision", "fp32", "--workers", 1)
    printed = capfd.readouterr()
    assert "trainer" not in printed.err and "sentencepiece" not in printed.err
    for kind in ("caption", "color", "count", "list", "presence", "refer", "relation", "tally"):
        assert f"| {kind} |" in printed.out
    assert printed.out.count("    truth ") == 8 and "next            python eval.py" in printed.out
    rows = json.loads((tmp_path / "demo" / "answers.json").read_text())
    short = [row for row in rows if row["image"] == rows[0]["image"]]  # one question alone of most kinds
    assert train_vlm.report(short).count("    truth ") == len({row["kind"] for row in short})
    asked = [row for i in range(10) for row in data.Scenes(10, 10**6, 32)[i].conversations]
    assert len(rows) == len(asked) and {row["truth"] for row in rows} == {row["conversations"][1]["value"] for row in asked}
    assert rows[0].keys() == {"kind", "image", "question", "truth", "answer", "right"}
    monkeypatch.chdir(tmp_path)
    assert "runs/align/aligned.safetensors: no such file; run python train_align.py first" in fails("--out", tmp_path / "x")


def test_answers_are_judged():
    assert train_vlm.right("count", "2", "2") and not train_vlm.right("count", "2.", "2")
    box = "[0.10, 0.10, 0.50, 0.50]"
    for answer, share in ((box, 1), ("[0.1, 0.1, 0.5, 0.34]", 0.6), ("[0.3, 0.1, 0.5, 0.3]", 0.25), ("[0.6, 0.6, 0.9, 0.9]", 0)):
        assert train_vlm.iou(answer, box) == pytest.approx(share)
        assert train_vlm.right("refer", answer, box) == (share >= 0.5)
    for unreadable in ("", "[0.1, 0.1]", "left", "[0.1, 0.1, 0.5, 0.5, 0.5]", "[0.5, 0.5, 0.1, 0.1]", "[0.1, 0.1, 0.1, 0.1]"):
        assert not train_vlm.right("refer", unreadable, box)


def test_the_tokenizer_of_the_demo(parts: Path, tmp_path: Path):
    """Answer words are one symbol; training it again gives the same file; unknown characters become bytes."""
    path = parts / "llama" / "tokenizer.model"
    tokenizer = llama.Tokenizer(path, train_vlm.DEMO_LANGUAGE.vocab_size)
    answers = [*data.Scenes.SHAPES, *data.Scenes.COLORS, "Yes", "No", "True", "False", *"012345"]
    assert all(len(tokenizer.encode(answer)) == 1 for answer in answers)
    assert len(tokenizer.encode("[0.33, 0.48, 0.50, 0.70]")) < 22
    for text in ("[0.33, 0.48, 0.50, 0.70]", "two\nlines", "é 漢  😀"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    train_vlm.train_tokenizer(tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("variant", train_vlm.VARIANTS)
def test_each_variant_of_the_paper(variant: str, parts: Path, tmp_path: Path):
    adapter, aligned = train_vlm.VARIANTS[variant]
    more = ["--second", parts / "second.safetensors"] if adapter == "fused-mlp" else []
    file = parts / ("aligned.safetensors" if aligned else "teacher.safetensors")
    other = parts / ("teacher.safetensors" if aligned else "aligned.safetensors")
    base = flags(parts, tmp_path, "--updates", 3, "--variant", variant, *more)
    assert f"is the wrong kind of backbone; --variant {variant} wants" in fails(*base, "--weights", other)
    run(*base, "--weights", file)
    model, values = vlm.load(tmp_path / "model"), losses(tmp_path)
    assert (model.config.adapter, model.config.aligned) == (adapter, aligned) and len(values) == 3
    backbone = vit.load(file).state_dict()
    assert all(torch.equal(value, backbone[name]) for name, value in model.vision.state_dict().items())
    if adapter == "truncated":
        assert not torch.equal(model.adapter.blocks[0].mlp.fc1.weight, backbone[f"blocks.{0 + aligned}.mlp.fc1.weight"])


def test_recipes_are_the_papers():
    """Table 7, for both backbones and all variants of figures 5, 11, 12 and 13."""
    kinds = {
        "baseline-mlp": ("mlp", False), "aligned-mlp": ("mlp", True), "aligned-decoder": ("decoder", True),
        "baseline-transformer": ("transformer", False), "baseline-truncated": ("truncated", False),
        "aligned-truncated": ("truncated", True), "dinov2-fusion": ("fused-mlp", False),
    }  # fmt: skip
    assert train_vlm.VARIANTS == kinds
    for recipe in ("clip-vit-l-336", "siglip-so400m-384"):
        assert recipe in vit.BACKBONES
        for variant in kinds:
            second = ["--second", "s"] if variant == "dinov2-fusion" else []
            argv = ["--recipe", recipe, "--variant", variant, "--weights", "w", "--language", "l", "--data", "a", "b", *second]
            o = train_vlm.parse(argv)
            assert (o.epochs, o.batch, o.lr, o.pretrained_lr, o.warmup) == (2, 128, 2e-5, 1.0, 0.03)
            assert (o.weight_decay, o.clip) == (0.1, 1.0)
            assert (o.max_text, o.template) == (2048, "llama")


@pytest.mark.parametrize("variant, names", [
    ("aligned-decoder", {"head", "decoder.blocks", "decoder.norm", "decoder.pos_embed"}), ("aligned-truncated", {"blocks", "norm"}),
    ("aligned-mlp", set()),
])  # fmt: skip
def test_pretrained_layers_of_the_adapter_have_their_own_rate(variant: str, names: set[str], parts: Path, tmp_path: Path):
    r = train_vlm.Run(train_vlm.parse(flags(parts, tmp_path, "--variant", variant, "--pretrained-lr", 0.25, "--warmup", 0)))
    r.train_update([data.collate_conversations([r.source[0, 0]])[0]])
    rates = {p: group["lr"] for group in r.optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(r.trained) and set(rates.values()) <= {1e-3, 0.25e-3}
    slow = {name for name, p in r.trained.items() if rates[p] == 0.25e-3}
    assert slow == {name for name in r.trained if any(name.startswith(f"adapter.{part}") for part in names)}
    assert all(any(name.startswith(f"adapter.{part}") for name in slow) for part in names)


def test_first_weights_of_the_demo(parts: Path, tmp_path: Path, monkeypatch):
    """A language model from scratch that hears single tokens, and an adapter that shows the image at once."""
    monkeypatch.setattr(train_vlm, "DEMO_LANGUAGE", replace(TINY_LANGUAGE, hidden_size=128, intermediate_size=256))
    argv = f"--weights {parts / 'aligned.safetensors'} --out {tmp_path} --scenes 16 --batch 8 --workers 0"
    model = train_vlm.Run(train_vlm.parse(argv.split())).vlm
    sizes = {"embed_tokens": 1.0, "lm_head": 128**-0.5, "q_proj": 128**-0.5, "v_proj": 3 * 128**-0.5, "o_proj": 3 * 128**-0.5}
    for part, size in sizes.items():
        found = [p for name, p in model.language.named_parameters() if part in name]
        assert found and all(p.std().item() == pytest.approx(size, rel=0.05) for p in found)
    aligned = maskembed.load(parts / "aligned.safetensors")
    assert torch.equal(model.adapter.head.weight, aligned.head.weight)
    last = model.adapter.decoder.head
    assert last.weight.std().item() == pytest.approx(last.in_features**-0.5, rel=0.1) and not last.bias.any()


def test_learning_rate():
    """A rise over 3% of the updates from 0, then a cosine to 0."""
    o = train_vlm.parse(["--lr", "1"])
    rates = [train_vlm.learning_rate(u, 200, o) for u in range(201)]
    assert rates[0] == 0 and rates[3] == pytest.approx(0.5) and rates[6] == 1 and max(rates) == 1
    assert rates[6 + 97] == pytest.approx(0.5) and rates[200] == pytest.approx(0)
    assert train_vlm.learning_rate(0, 200, replace(o, warmup=0)) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Sameness


def test_an_update_is_written_out(parts: Path, tmp_path: Path):
    """Four updates against the same by hand, one conversation at a time: each label weighs alike, in whatever
    micro-batch; AdamW decays matrices only; schedule and clipping."""
    o = train_vlm.parse(flags(parts, tmp_path, "--micro-batch", 2, "--clip", 0.5, "--weight-decay", 0.3, "--warmup", 0.3))
    r = train_vlm.Run(o)
    model = copy.deepcopy(r.vlm)
    trained = dict(model.trainable())
    assert not any(name.startswith("vision.") for name in trained)
    decayed = [p for p in trained.values() if p.ndim > 1]
    others = [p for p in trained.values() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], weight_decay=0.3)
    assert (optimizer.defaults["betas"], r.optimizer.defaults["betas"]) == ((0.9, 0.999),) * 2
    keys, kinds = iter(r.batches(0)), []
    for update in range(4):
        micro_batches = [[r.source[key] for key in next(keys)] for _ in range(4)]
        values = r.train_update([data.collate_conversations(examples)[0] for examples in micro_batches])
        examples = [example for examples in micro_batches for example in examples]
        kinds.append(examples[0].image is None)
        labels = sum(label != -100 for example in examples for label in example.labels)
        loss = 0
        for example in examples:
            batch, _ = data.collate_conversations([example])
            loss = loss + model(**batch) / labels
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in trained.values()]).norm()
        for p in trained.values():
            p.grad *= min(1, 0.5 / (norm.item() + 1e-6))
        rate = update / 3 if update < 3 else 1.0  # 3 of the 10 updates warm up
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rate
        optimizer.step()
        assert values["loss"] == pytest.approx(loss.item(), rel=1e-5) and values["labels"] == labels
        assert values["lr"] == pytest.approx(1e-3 * rate) and values["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert set(kinds) == {True, False}  # both modalities were among them
    for (name, ours), by_hand in zip(r.vlm.trainable(), trained.values(), strict=True):
        assert torch.allclose(ours, by_hand, rtol=1e-4, atol=2e-6), name


def close(out: Path, expected: Path) -> None:
    """Losses to 1e-5; weights, on which AdamW leaves the rounding of tiny gradients, to 1e-3 of the norm."""
    theirs = losses(expected)
    assert losses(out) == {update: pytest.approx(loss, rel=1e-5) for update, loss in theirs.items()} and len(theirs) == 10
    for (name, a), b in zip(weights(out).items(), weights(expected).values(), strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6, name


def test_processes_accumulation_and_sharding_change_nothing(parts: Path, default: Path, tmp_path: Path):
    """Ten updates in float32: two processes with DDP, with FSDP, in micro-batches, with checkpointing, equal one; and
    what two processes with FSDP saved is continued by one, with FSDP or without, and by two with DDP."""
    ddp = process(*flags(parts, tmp_path / "ddp", "--micro-batch", 2, "--workers", 1), ranks=2)
    fsdp = process(*flags(parts, tmp_path / "fsdp", "--fsdp", "--save-every", 5, "--micro-batch", 2), ranks=2)
    run(*flags(parts, tmp_path / "accumulated", "--micro-batch", 1, "--checkpointing"))
    close(tmp_path / "accumulated", default)
    run(*flags(parts, tmp_path / "alone", "--fsdp", "--micro-batch", 4, "--checkpointing"))
    close(tmp_path / "alone", default)
    for name, popen in (("ddp", ddp), ("fsdp", fsdp)):
        _, said = popen.communicate()
        assert popen.returncode == 0, said
        close(tmp_path / name, default)
    assert len(list((tmp_path / "fsdp" / "checkpoints" / "update-00000005").glob("*.safetensors"))) == 2
    for name, more in (("one", []), ("one-fsdp", ["--fsdp"])):
        out = tmp_path / name
        shutil.copytree(tmp_path / "fsdp", out)
        shutil.rmtree(out / "checkpoints" / "update-00000010")
        run(*flags(parts, out, "--resume", *more))
        close(out, default)


@pytest.mark.parametrize("variant", train_vlm.VARIANTS)
def test_bf16_with_and_without_sharding(variant: str, parts: Path, tmp_path: Path):
    """Two updates in bfloat16, the precision of the paper's runs: FSDP, which keeps weights and optimizer in float32,
    and plain autocast lose about the same."""
    more = ["--second", parts / "second.safetensors"] if variant == "dinov2-fusion" else []
    kind = "aligned" if train_vlm.VARIANTS[variant][1] else "teacher"
    argv = ["--variant", variant, "--weights", parts / f"{kind}.safetensors", "--updates", 2, "--precision", "bf16", *more]
    for name, how in (("plain", []), ("sharded", ["--fsdp"])):
        run(*flags(parts, tmp_path / name, *argv, *how))
    ours, theirs = losses(tmp_path / "sharded"), losses(tmp_path / "plain")
    assert ours == {update: pytest.approx(loss, rel=0.01) for update, loss in theirs.items()} and len(ours) == 2


def stop_at(update: int, monkeypatch) -> None:
    """Send this process SIGTERM during an update."""
    real = train_vlm.Run.train_update

    def train_update(self: train_vlm.Run, batches: list) -> dict:
        if self.update == update - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batches)

    monkeypatch.setattr(train_vlm.Run, "train_update", train_update)


@pytest.mark.parametrize("more", [[], ["--fsdp"]])
def test_a_stopped_run_resumes_exactly(more: list[str], parts: Path, default: Path, tmp_path: Path, capsys, monkeypatch):
    """SIGTERM lets the update end and saves; the rest equals a run that was never stopped, bit for bit."""
    whole = default
    if more:
        whole = tmp_path / "whole"
        run(*flags(parts, whole, *more))
    with monkeypatch.context() as context:
        stop_at(4, context)
        with pytest.raises(SystemExit) as caught:
            run(*flags(parts, tmp_path / "run", *more))
    assert caught.value.code == 128 + signal.SIGTERM
    assert "stopped at update 4 of 10, saved; go on with the same command and --resume" in capsys.readouterr().err
    assert max(losses(tmp_path / "run")) == 4 and not (tmp_path / "run" / "model").exists()
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write('{"update": 5, "loss": 0}\n{"upd')  # of an update that no checkpoint knows, and of a line cut short
    run(*flags(parts, tmp_path / "run", "--resume", *more))
    assert same(tmp_path / "run", whole)


def test_going_back_gives_up_what_came_later(parts: Path, default: Path, tmp_path: Path, capsys):
    """An older checkpoint continued leaves none of the course it came from; the rate may then be another."""
    run(*flags(parts, tmp_path, "--save-every", 6))
    older = tmp_path / "checkpoints" / "update-00000006"
    run(*flags(parts, tmp_path, "--resume", older))
    assert same(tmp_path, default)
    run(*flags(parts, tmp_path, "--resume", older, "--lr", 5e-4))
    assert "continuing with --lr 0.0005, until now it was 0.001" in capsys.readouterr().err
    after, before = losses(tmp_path), losses(default)
    assert [after[u] == before[u] for u in (6, 7, 8)] == [True, True, False] and len(after) == 10
    run(*flags(parts, tmp_path, "--resume"))  # a run that is at its end writes its model again
    assert losses(tmp_path) == after


# ----------------------------------------------------------------------------------------------------------------------
# What goes wrong


def test_non_finite_updates_are_skipped_and_end_the_run(parts: Path, tmp_path: Path, monkeypatch):
    real, count, bad = vlm.VLM.forward, iter(range(10**6)), {1}

    def forward(self: vlm.VLM, **batch: torch.Tensor) -> torch.Tensor:
        return real(self, **batch) * (float("nan") if next(count) in bad else 1)

    monkeypatch.setattr(vlm.VLM, "forward", forward)
    with monkeypatch.context() as context:
        stop_at(6, context)
        with pytest.raises(SystemExit):
            run(*flags(parts, tmp_path / "one"))
    run(*flags(parts, tmp_path / "one", "--resume"))  # the number of steps that AdamW took comes back, too
    count, bad = iter(range(10**6)), {1}
    run(*flags(parts, tmp_path / "whole"))
    assert [line["skipped"] for line in log_lines(tmp_path / "one")] == [0] + 9 * [1]
    assert same(tmp_path / "one", tmp_path / "whole") and all(value.isfinite().all() for value in weights(tmp_path / "one").values())
    count, bad = iter(range(10**6)), range(3, 10**6)
    with pytest.raises(SystemExit, match="update 23: the loss or gradient was not finite for 20 updates in a row"):
        run(*flags(parts, tmp_path / "many", "--updates", 30, "--save-every", 10))
    assert train_vlm.checkpoints(tmp_path / "many" / "checkpoints")


def test_bad_rows(parts: Path, tmp_path: Path, capsys):
    """Rows that cannot be used are named at the start, missing images when they come; too many end the run."""
    rows = json.loads((parts / "rows.json").read_text())
    rows[3]["image"] = "none.png"
    rows[7] = {"id": "odd", "conversations": []}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data_flags = ["--data", tmp_path / "rows.json", "--images", parts / "images"]
    run(*flags(parts, tmp_path / "out", *data_flags))
    said = capsys.readouterr().err
    assert "left out: " + str(tmp_path / "rows.json, row 8: it has no conversation") in said
    assert said.count("row 4: none.png is missing") == 1  # in either epoch, and named once
    assert log_lines(tmp_path / "out")[-1]["bad_rows"] == 2
    for row in rows[10:25]:
        row["image"] = "none.png"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    message = fails(*flags(parts, tmp_path / "many", *data_flags))
    assert "conversations could not be read (such as" in message and "repair or remove them" in message


def test_wrong_input(parts: Path, tmp_path: Path):
    """Each mistake gets one sentence that names what is wrong."""
    base = flags(parts, tmp_path / "out")
    empty, broken = tmp_path / "empty.json", tmp_path / "broken.json"
    empty.write_text("[]")
    broken.write_text('[{"id": 1},\n {"id": 2')
    assert "empty.json: holds no conversations" in fails(*base, "--data", empty)
    assert "broken.json, line 2: is no JSON" in fails(*base, "--data", broken)
    assert "none.json: cannot be read" in fails(*base, "--data", "none.json")
    assert "nowhere is not a folder" in fails(*base, "--images", "nowhere")
    assert "none.safetensors: no such file" in fails(*base, "--weights", "none.safetensors")
    assert "no such file, nor a folder with model.safetensors" in fails(*base, "--language", tmp_path / "none")
    assert "neither fills a global batch of 64" in fails(*base, "--batch", 64)
    assert "cannot be split" in fails(*base, "--micro-batch", 3)
    shutil.copytree(parts / "llama", tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer.model").unlink()
    assert "give the tokenizer.model that came with the weights" in fails(*base, "--language", tmp_path / "llama")
    clip = [*base, "--recipe", "clip-vit-l-336"]
    assert "aligned.safetensors: does not hold this backbone" in fails(*clip)
    torch.manual_seed(0)
    student = maskembed.make_student(vit.ViT(vit.ViTConfig(**TINY)), maskembed.OBJECTIVES["crop"])
    maskembed.save(student, tmp_path / "crop.safetensors")
    assert "adapter decoder: needs an aligned backbone with its head" in fails(*base, "--weights", tmp_path / "crop.safetensors")
    assert not (tmp_path / "out" / "model").exists()


def test_usage_errors_exit_with_2(capsys):
    own = ["--recipe", "own", "--weights", "w", "--language", "l", "--data", "d"]
    for argv, text in (
        (["--recipe", "resnet-50"], "invalid choice"),
        (["--variant", "aligned"], "invalid choice"),
        (["--recipe", "clip-vit-l-336"], "needs --weights (an aligned backbone), --language (Llama's folder) and --data"),
        (["--recipe", "own", "--variant", "baseline-mlp"], "needs --weights (a pre-trained backbone)"),
        (["--data", "d"], "--data and --language go with --recipe clip-vit-l-336, siglip-so400m-384 or own"),
        (["--variant", "dinov2-fusion"], "--second, the weights of DINOv2, goes with --variant dinov2-fusion"),
        ([*own, "--second", "s"], "--second, the weights of DINOv2, goes with --variant dinov2-fusion"),
        (["--images", "i"], "--images goes with --data"),
        ([*own, "--images", "i", "j"], "--images: 2 folders for 1 files; give one for all, or one for each"),
        (["--lr", "nan"], "--lr nan: must be a number from 0 up"),
        (["--warmup", "1"], "--warmup 1.0: must be below 1"),
        (["--batch", "0"], "--batch 0: must be a number from 1 up"),
        (["--batch", "many"], "invalid int value"),
        (["--seed", "-1"], "--seed -1: must be a number from 0 up"),
        (["--max-text", "1"], "--max-text 1: must be a number from 2 up"),
        (["--precision", "fp16"], "invalid choice"),
    ):
        with pytest.raises(SystemExit) as caught:
            run(*argv)
        assert caught.value.code == 2 and text in capsys.readouterr().err, argv


def test_checkpoints_that_cannot_be_continued(parts: Path, tmp_path: Path):
    out = tmp_path / "run"
    base = flags(parts, out, "--save-every", 5)
    assert "holds no checkpoint; leave --resume out" in fails(*base, "--resume")
    run(*base)
    assert "continue it with --resume, or choose another --out" in fails(*base)
    assert "was made with --batch 8, not 4" in fails(*base, "--resume", "--batch", 4)
    assert "was made with --variant aligned-decoder, not aligned-mlp" in fails(*base, "--resume", "--variant", "aligned-mlp")
    assert "was made with 60 conversations, not 40" in fails(*base, "--resume", "--data", parts / "rows.json")
    student = maskembed.load(parts / "aligned.safetensors")
    student.encoder.norm.weight.data += 1
    maskembed.save(student, tmp_path / "other.safetensors")
    assert "another backbone than" in fails(*base, "--resume", "--weights", tmp_path / "other.safetensors")
    assert "no such checkpoint" in fails(*base, "--resume", out / "checkpoints" / "update-00000009")
    last = out / "checkpoints" / "update-00000010"
    (file,) = last.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    for damage in (lambda: None, file.unlink, (last / "run.json").unlink):
        damage()
        message = fails(*base, "--resume")
        assert "update-00000010: damaged or of another version" in message
        assert f"continue with --resume {out / 'checkpoints' / 'update-00000005'}" in message
    run(*base, "--resume", out / "checkpoints" / "update-00000005")
    assert len(losses(out)) == 10 and (out / "model" / "config.json").exists()


def test_nobody_waits_for_a_process_that_failed_on_the_data(parts: Path, tmp_path: Path, monkeypatch):
    """The first reads the files while the others wait for it; it lets them go on where it fails, too."""
    waited = []
    monkeypatch.setattr(dist, "barrier", lambda: waited.append(True))
    (tmp_path / "empty.json").write_text("[]")
    assert "empty.json: holds no conversations" in fails(*flags(parts, tmp_path / "out", "--data", tmp_path / "empty.json"))
    assert waited == [True]


def test_no_process_leaves_before_the_model_is_written(parts: Path, tmp_path: Path, monkeypatch):
    """With or without success: they wait for one another at the end."""
    events, save, barrier = [], vlm.save, dist.barrier
    monkeypatch.setattr(dist, "barrier", lambda: (events.append("barrier"), barrier()))
    monkeypatch.setattr(vlm, "save", lambda *args: (events.append("save"), save(*args)))
    run(*flags(parts, tmp_path / "whole", "--updates", 1))
    assert events[-2:] == ["save", "barrier"]

    def full(*_: object) -> None:
        events.append("full")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vlm, "save", full)
    assert "No space left on device" in fails(*flags(parts, tmp_path / "full", "--updates", 1))
    assert events[-2:] == ["full", "barrier"]


def test_a_full_disk_loses_nothing(parts: Path, default: Path, tmp_path: Path, monkeypatch):
    real = train_vlm.HuggingFaceStorageWriter.write_data

    def full(self: object, *args: object) -> object:
        if "00000006" in str(self.path):
            raise OSError(28, "No space left on device")
        return real(self, *args)

    with monkeypatch.context() as context:
        context.setattr(train_vlm.HuggingFaceStorageWriter, "write_data", full)
        message = fails(*flags(parts, tmp_path, "--save-every", 3))
    assert "update-00000006: cannot be written ([Errno 28] No space left on device); is the disk full?" in message
    assert [p.name for p in train_vlm.checkpoints(tmp_path / "checkpoints")] == ["update-00000003"]
    run(*flags(parts, tmp_path, "--save-every", 3, "--resume"))
    assert same(tmp_path, default)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["update-00000009", "update-00000010"]
