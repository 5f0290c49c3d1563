"""train_vlm.py as a user runs it: whole runs of tiny models, an update written out, sameness, resuming, wrong input."""

import functools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import data
import llama
import maskembed
import run
import train_vlm
import vit
import vlm
from conftest import TINY, launch, log_of, losses, refusal

DEEP = TINY | {"depth": 3}  # a baseline's last block is not used, and `truncated` takes two of the others
STOP = functools.partial(os.kill, os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def parts(scenes: Path, tmp_path_factory) -> Path:
    """A backbone, its aligned version, a second one, a language model, 40 conversations with images and 20 without."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    teacher = vit.ViT(vit.ViTConfig(**DEEP))
    student = maskembed.make_student(teacher)
    for parameter in (*teacher.parameters(), *student.parameters()):
        parameter.data += 0.05 * torch.randn_like(parameter)
    vit.save(teacher, folder / "teacher.safetensors")
    vit.save(vit.ViT(vit.ViTConfig(**DEEP | {"embed_dim": 48, "registers": 2})), folder / "second.safetensors")
    maskembed.save(student, folder / "aligned.safetensors")
    rows = json.loads((scenes / "conversations.json").read_text())[:40]
    rows = [row | {"conversations": row["conversations"][: 2 + 2 * (i % 2)]} for i, row in enumerate(rows)]
    texts = [{"conversations": row["conversations"]} for row in rows[:20]]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    tokenizer = llama.Tokenizer(train_vlm.HERE / "demo" / "language")
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = llama.LlamaConfig(tokenizer.vocab_size, max_position_embeddings=1024, **small)
    llama.save(llama.Llama(config), folder / "llama")
    (folder / "llama" / "tokenizer.model").write_bytes(tokenizer.pieces.serialized_model_proto())
    return folder


@pytest.fixture(scope="module")
def base(parts: Path, scenes: Path) -> list[str]:
    """Ten updates of 8 conversations; an epoch has five batches with images and two without."""
    models = f"--recipe own --weights {parts / 'aligned.safetensors'} --language {parts / 'llama'}"
    files = f"--data {parts / 'rows.json'} {parts / 'texts.jsonl'} --images {scenes}"
    return f"{models} {files} --batch 8 --epochs 5 --updates 10 --lr 1e-3 --workers 0 --precision fp32".split()


@pytest.fixture(scope="module")
def whole(base: list[str], tmp_path_factory) -> Path:
    """The output of that run."""
    train(*base, "--out", out := tmp_path_factory.mktemp("whole"))
    return out


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one, so that --fsdp shards here as well."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train(*argv: object) -> None:
    train_vlm.main([str(a) for a in argv])


def weights(out: Path) -> dict[str, torch.Tensor]:
    return vlm.load(out / "model").state_dict()


def close(out: Path, expected: Path, loss: float = 1e-5, weight: float = 1e-3) -> None:
    """Losses, and weights relative to the norm: AdamW leaves the rounding of tiny gradients on them."""
    assert losses(out) == pytest.approx(losses(expected), rel=loss, abs=0) and len(losses(out)) == 10
    for (name, a), b in zip(weights(out).items(), weights(expected).values(), strict=True):
        assert (a - b).norm() <= weight * (b.norm() + 1e-3), name


def at_each_pass(monkeypatch, act: Callable[[int], float | None]) -> None:
    """Call act(n) in the n-th forward pass; the loss is multiplied by what it returns."""
    real, count = vlm.VLM.forward, iter(range(1, 10**6))

    def forward(self: vlm.VLM, **batch: torch.Tensor) -> torch.Tensor:
        return real(self, **batch) * (act(next(count)) or 1.0)

    monkeypatch.setattr(vlm.VLM, "forward", forward)


def test_a_run_from_start_to_end(parts: Path, whole: Path):
    log = log_of(whole)
    assert [line["update"] for line in log] == list(range(1, 11)) and log[-1]["loss"] < log[0]["loss"]
    assert {"epoch", "lr", "grad_norm", "labels", "skipped", "bad_rows", "conversations_per_s"} <= log[0].keys()
    assert sorted(os.listdir(whole / "model")) == ["config.json", "model.safetensors", "tokenizer.model"]
    assert os.listdir(whole / "checkpoints") == ["update-00000010.pt"]
    assert json.loads((whole / "options.json").read_text())["weight_decay"] == 0.1
    model, aligned = vlm.load(whole / "model"), maskembed.load(parts / "aligned.safetensors")
    assert (model.config.adapter, model.config.aligned, model.config.max_text) == ("decoder", True, 1024 - 17)
    backbone, language = aligned.encoder.state_dict(), llama.load(parts / "llama").state_dict()
    assert all(torch.equal(value, backbone[name]) for name, value in model.vision.state_dict().items())
    assert not any(torch.equal(value, language[name]) for name, value in model.language.state_dict().items())
    assert not torch.equal(model.adapter.head.weight, aligned.head.weight) and model.adapter.decoder.head.weight.any()


def test_the_demo_takes_the_scenes(parts: Path, scenes: Path, tmp_path: Path, monkeypatch, capsys):
    """Without --data: what demo/scenes.py wrote, and the numbers of the demo's recipe."""
    from demo import scenes as world

    monkeypatch.setattr(world, "ensure", lambda: scenes)
    monkeypatch.chdir(tmp_path)
    assert "runs/align/aligned.safetensors: no such file; run train_align.py first" in refusal(train_vlm.main, [])
    train("--weights", parts / "aligned.safetensors", "--language", parts / "llama", "--updates", 1, "--workers", 1)
    assert capsys.readouterr().out.endswith("next: python eval.py runs/vlm\n")
    assert vlm.load("runs/vlm/model").config.adapter == "decoder"
    kept = json.loads(Path("runs/vlm/options.json").read_text())
    assert [kept[name] for name in ("batch", "epochs", "lr", "warmup", "weight_decay")] == [32, 3, 1.5e-3, 0.03, 0.1]


@pytest.mark.parametrize("variant", train_vlm.VARIANTS)
def test_each_variant_of_the_paper(variant: str, parts: Path, base: list[str], tmp_path: Path, alone):
    """In float32, and in bf16 as the paper's runs, in which FSDP and plain autocast lose about the same."""
    adapter, aligned = train_vlm.VARIANTS[variant]
    file, other = (parts / f"{kind}.safetensors" for kind in ("aligned", "teacher")[:: 1 if aligned else -1])
    argv = [*base, "--updates", 2, "--variant", variant, "--warmup", 0]
    argv += ["--second", parts / "second.safetensors"] if adapter == "fused-mlp" else []
    assert "is the wrong kind of backbone" in refusal(train, *argv, "--out", tmp_path / "x", "--weights", other)
    for name, how in (("fp32", []), ("bf16", ["--precision", "bf16"]), ("fsdp", ["--precision", "bf16", "--fsdp"])):
        train(*argv, "--out", tmp_path / name, "--weights", file, *how)
    model, backbone = vlm.load(tmp_path / "fp32" / "model"), vit.load(file).state_dict()
    assert (model.config.adapter, model.config.aligned) == (adapter, aligned)
    assert all(torch.equal(value, backbone[name]) for name, value in model.vision.state_dict().items())
    if adapter == "truncated":  # it trains blocks of its own, which start as the backbone's
        assert not torch.equal(model.adapter.blocks[0].mlp.fc1.weight, backbone[f"blocks.{0 + aligned}.mlp.fc1.weight"])
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.01)
    assert losses(tmp_path / "fsdp") == pytest.approx(losses(tmp_path / "bf16"), rel=0.01)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "fp32")
    for name in ("bf16", "fsdp"):  # the frozen backbone is rounded once, in training as in evaluation
        saved = vit.read_tensors(tmp_path / name / "model/model.safetensors")[0]
        assert saved["vision.patch_embed.proj.weight"].dtype == torch.bfloat16


def test_numbers_are_the_papers():
    """Table 7 for both backbones; the rate rises from 0 over 3% of the updates, then a cosine goes to 0."""
    for recipe in ("clip-vit-l-336", "siglip-so400m-384"):
        o, _ = train_vlm.options(f"--recipe {recipe} --weights w --language l --data a b".split())
        assert (o.epochs, o.batch, o.lr, o.warmup, o.weight_decay, train_vlm.MAX_NORM) == (2, 128, 2e-5, 0.03, 0.1, 1.0)
        assert (o.variant, o.max_text, o.template) == ("aligned-decoder", 2048, "llama")
    rates = [train_vlm.learning_rate(update, 200, 0.03, 1.0) for update in (0, 3, 6, 6 + 97, 200)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_an_update_is_written_out(base: list[str], scenes: Path, tmp_path: Path, monkeypatch):
    """Four updates against the same by hand, one conversation at a time: loss, schedule, clipping, AdamW."""
    monkeypatch.setattr(train_vlm, "MAX_NORM", 0.5)
    argv = [*base, "--updates", 4, "--micro-batch", 2, "--weight-decay", 0.3, "--warmup", 0.5, "--seed", 2]
    train(*argv, "--out", tmp_path / "run")
    o, _ = train_vlm.options([str(a) for a in (*argv, "--out", tmp_path / "other")])
    model = train_vlm.build_model(o, empty=False)
    encode = functools.partial(vlm.encode, model.tokenizer, model.config.template, max_text=model.config.max_text)
    source = data.Conversations(o.data, scenes, encode, functools.partial(vlm.prepare, config=model.config.vision))
    keys = [key for keys in data.ConversationBatches(source, 8, 5, seed=2, micro_batch=2, updates=4) for key in keys]
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith("vision.") for name in trained)
    groups = [{"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": 0.3}]
    groups += [{"params": [p for p in trained.values() if p.ndim == 1], "weight_decay": 0.0}]
    optimizer, kinds = torch.optim.AdamW(groups, betas=(0.9, 0.999)), set()
    for line, rate in zip(log_of(tmp_path / "run"), (0, 0.5, 1, 0.5)):  # two updates rise, two fall
        examples, keys = [source[key] for key in keys[:8]], keys[8:]
        kinds.add(examples[0].image is None)
        labels = sum(label != llama.IGNORE for example in examples for label in example.labels)
        loss = sum(model(**data.collate_conversations([example])[0]) for example in examples) / labels
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in trained.values()]).norm().item()
        for p in trained.values():
            p.grad *= 0.5 / (norm + 1e-6)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rate
        optimizer.step()
        by_hand = {"loss": loss.item(), "lr": 1e-3 * rate, "grad_norm": norm, "labels": labels}
        assert {name: line[name] for name in by_hand} == pytest.approx(by_hand, rel=1e-5) and norm > 0.5
    assert kinds == {True, False} and not keys  # with images and without
    for name, ours in weights(tmp_path / "run").items():
        assert name not in trained or torch.allclose(ours, trained[name], rtol=1e-4, atol=2e-6), name


def test_processes_micro_batches_and_sharding_change_nothing(base: list[str], whole: Path, tmp_path: Path, alone):
    """Two processes, with DDP or FSDP, equal one; and one, with FSDP or without, continues from what two wrote."""
    more = ["--micro-batch", 2, "--workers", 1, "--cache-features"]
    ddp = launch("train_vlm.py", *base, "--out", tmp_path / "ddp", *more, ranks=2)
    fsdp = launch("train_vlm.py", *base, "--out", tmp_path / "fsdp", "--fsdp", "--save-every", 5, ranks=2)
    train(*base, "--out", tmp_path / "accumulated", "--micro-batch", 1, "--checkpointing")
    close(tmp_path / "accumulated", whole)
    for name, process in (("ddp", ddp), ("fsdp", fsdp)):
        said = process.communicate()[1]
        assert process.returncode == 0, said
        close(tmp_path / name, whole)
    (tmp_path / "fsdp" / "checkpoints" / "update-00000010.pt").unlink()
    for name, how in (("one", ["--no-fsdp"]), ("one-fsdp", [])):
        shutil.copytree(tmp_path / "fsdp", tmp_path / name)
        train("--out", tmp_path / name, "--resume", *how)  # with the run's own options
        close(tmp_path / name, whole)


def test_features_that_are_made_once_change_nothing(base: list[str], whole: Path, tmp_path: Path, monkeypatch):
    """The backbone sees each image once, and the losses are those of a run in which it sees them in each epoch."""
    seen, real = [], vlm.VLM.features
    monkeypatch.setattr(vlm.VLM, "features", lambda self, images: seen.extend(images) or real(self, images))
    train(*base, "--out", tmp_path / "kept", "--cache-features")
    close(tmp_path / "kept", whole)
    assert len(seen) <= 1 + 40 + 4 and not (tmp_path / "kept" / "features.bin").exists()  # 1 for its size, 4 for texts
    rows = json.loads((Path(base[base.index("--data") + 1])).read_text())
    (tmp_path / "rows.json").write_text(json.dumps([rows[0] | {"image": "none.png"}, *rows[1:]]))
    argv = (*base, "--data", tmp_path / "rows.json", "--out", tmp_path / "bad", "--cache-features")
    assert "row 1: " in (said := refusal(train, *argv)) and "leave the row out" in said


def test_a_stopped_run_resumes_exactly(base: list[str], whole: Path, tmp_path: Path, capsys, monkeypatch):
    """SIGTERM lets the update end and saves; the rest equals a run that was never stopped, bit for bit."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        at_each_pass(patch, lambda n: STOP() if n == 4 else None)
        train(*base, "--out", tmp_path / "run")
    assert caught.value.code == 128 + signal.SIGTERM and "stopped at update 4 of 10" in capsys.readouterr().err
    assert len(losses(tmp_path / "run")) == 4 and not (tmp_path / "run" / "model").exists()
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write('{"update": 5, "loss": 0}\n{"upd')  # of an update that no checkpoint knows, and of a line cut short
    train(*base, "--out", tmp_path / "run", "--resume")
    close(tmp_path / "run", whole, 0, 0)
    train("--out", tmp_path / "run", "--resume")  # a run that is at its end writes its model again
    close(tmp_path / "run", whole, 0, 0)


def test_a_killed_run_resumes_exactly(base: list[str], whole: Path, tmp_path: Path):
    process = launch("train_vlm.py", *base, "--out", tmp_path, "--save-every", 2)
    while process.poll() is None and not run.checkpoints(tmp_path / "checkpoints"):
        time.sleep(0.01)
    process.kill(), process.communicate()
    train(*base, "--out", tmp_path, "--save-every", 2, "--resume")
    close(tmp_path, whole, 0, 0)
    assert [path.name[-5:-3] for path in run.checkpoints(tmp_path / "checkpoints")] == ["08", "10"]


def test_non_finite_updates_are_skipped_and_end_the_run(base: list[str], tmp_path: Path, monkeypatch):
    """A skipped update is no step of AdamW, also not after a resume from a checkpoint that no step precedes."""
    for name, last in (("whole", 10), ("run", 1)):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            at_each_pass(patch, lambda n: (n == last and STOP(), float("nan") if n == 1 else 1.0)[1])
            train(*base, "--out", tmp_path / name)
        train(*base, "--out", tmp_path / name, "--resume")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") and log_of(tmp_path / "run")[-1]["skipped"] == 1
    at_each_pass(monkeypatch, lambda n: float("nan") if n == 1 or n > 3 else 1.0)
    with pytest.raises(ValueError, match="update 23: the loss or gradient was not finite for 20"):
        train(*base, "--out", tmp_path / "many", "--updates", 30, "--save-every", 10)
    assert len(run.checkpoints(tmp_path / "many" / "checkpoints")) == 2


def test_bad_rows(base: list[str], parts: Path, scenes: Path, tmp_path: Path, capsys):
    """Rows that cannot be used are named at the start, missing images when they come; too many end the run."""
    argv = [*base, "--data", tmp_path / "rows.json", "--batch", 13, "--updates", 6]  # two epochs of all 39 rows
    rows = json.loads((parts / "rows.json").read_text())
    rows[3]["image"], rows[7] = "none.png", {"id": "odd", "conversations": []}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    train(*argv, "--out", tmp_path / "out")
    said = capsys.readouterr().err
    assert f"left out: {tmp_path / 'rows.json'}, row 8: " in said
    assert said.count("row 4: ") == said.count("none.png") == 1 and log_of(tmp_path / "out")[-1]["bad_rows"] == 2
    (tmp_path / "rows.json").write_text(json.dumps([row | {"image": "none.png"} for row in rows]))
    assert "conversations cannot be used" in refusal(train, *argv, "--out", tmp_path / "many")


def test_wrong_input_gets_one_sentence(base: list[str], parts: Path, tmp_path: Path):
    shutil.copytree(parts / "llama", tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer.model").unlink()
    for flag, value, text in (
        ("--data", "none.json", "none.json"),
        ("--weights", "none.safetensors", "none.safetensors: cannot be read as weights"),
        ("--language", tmp_path / "llama", "tokenizer.model: is missing"),
        ("--batch", 64, "a global batch of 64"),
    ):
        assert text in refusal(train, *base, "--out", tmp_path / "out", flag, value)
    assert not (tmp_path / "out").exists()


def test_usage_errors_exit_with_2(base: list[str], whole: Path, parts: Path, tmp_path: Path, capsys):
    own = ["--recipe", "own", "--weights", "w", "--language", "l", "--data", "d"]
    for argv, text in (
        (["--recipe", "resnet-50"], "invalid choice"),
        (["--recipe", "clip-vit-l-336"], "needs --weights (backbone: aligned), --language (Llama's folder) and --data"),
        (["--variant", "dinov2-fusion"], "--second, the weights of DINOv2, goes with --variant dinov2-fusion"),
        (["--images", "i"], "--images: goes with --data"),
        ([*own, "--images", "i", "j"], "give one folder for all of its files, or one for each"),
        (["--warmup", "1"], "1 must be at least 0 and below 1"),
        (["--out", whole, "--resume", "--variant", "aligned-mlp"], f"--variant: the run in {whole} has aligned-dec"),
    ):
        with pytest.raises(SystemExit) as caught:
            train("--out", tmp_path, *argv)
        assert caught.value.code == 2 and text in capsys.readouterr().err, argv
    with pytest.raises(ValueError, match="continue it with --resume, or choose another --out"):
        train(*base, "--out", whole)
    assert "40 conversations, not 60" in refusal(train, "--out", whole, "--resume", "--data", parts / "rows.json")


def test_a_full_disk_ends_every_process_with_one_sentence(base: list[str], whole: Path, tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".update-00000006.pt.tmp").symlink_to("/dev/full")
    process = launch("train_vlm.py", *base, "--out", tmp_path, "--save-every", 3, ranks=2)
    said = process.communicate()[1]
    assert process.returncode == 1 and said.count("train_vlm.py: ") == 2 == said.count("00006.pt: cannot be written")
    assert os.listdir(tmp_path / "checkpoints") == ["update-00000003.pt"]
    train(*base, "--out", tmp_path, "--resume")
    close(tmp_path, whole)
