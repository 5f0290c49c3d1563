"""train_align.py as a user runs it: whole runs on tiny models, sameness over processes, resuming, wrong input."""

import copy
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import maskembed
import train_align
import vit

ROOT = Path(train_align.__file__).parent
TINY = dict(image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, crop_pct=1.0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A tiny backbone with ordinary random weights."""
    torch.manual_seed(0)
    model = vit.ViT(vit.ViTConfig(**TINY))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    vit.save(model, path)
    return path


@pytest.fixture(scope="module")
def default_losses(weights: Path, tmp_path_factory) -> dict[int, float]:
    """What three updates without any choice give."""
    out = tmp_path_factory.mktemp("default")
    run(*flags(weights, out, "--updates", 3))
    return losses(out)


def flags(weights: Path, out: Path, *more: object) -> list[str]:
    """Six updates of 8 scenes, each logged."""
    common = f"--weights {weights} --out {out} --scenes 24 --batch 8 --epochs 2 --lr 1e-3 --val-images 8 --log-every 1"
    return [*common.split(), "--workers", "0", "--precision", "fp32", *map(str, more)]


def run(*argv: object) -> None:
    train_align.main([str(a) for a in argv])


def process(*argv: object, ranks: int = 1, **how) -> subprocess.Popen:
    """The command in a process of its own, or several under torchrun."""
    launcher = [sys.executable]
    if ranks > 1:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
    return subprocess.Popen(
        [*launcher, str(ROOT / "train_align.py"), *map(str, argv)], env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how,
    )  # fmt: skip


def losses(out: Path) -> dict[int, float]:
    """update -> training loss."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["update"]: line["loss"] for line in lines if "loss" in line}


def fails(capsys, *argv: object) -> str:
    """What a run that must fail says: one sentence, exit status 1."""
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    message = str(caught.value)
    assert message.startswith("train_align.py: ") and "\n" not in message
    return message


# ----------------------------------------------------------------------------------------------------------------------
# A whole run


def test_a_run_from_start_to_end(weights: Path, tmp_path: Path, capsys):
    out = tmp_path / "run"
    run(*flags(weights, out))
    printed = capsys.readouterr().out
    assert "| validation loss |" in printed and "python probe.py" in printed
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    validation = [line["val_loss"] for line in log if "val_loss" in line]
    assert len(validation) == 3 and validation[-1] < 0.9 * validation[0]
    assert [line["update"] for line in log if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert {"lr", "grad_norm", "images_per_s", "skipped", "unreadable"} <= log[1].keys()
    student, encoder = maskembed.load(out / "aligned.safetensors"), vit.load(out / "aligned.safetensors")
    assert encoder.config.softcap == 30 and student.target_scale != 1
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(student.encoder(images), encoder(images))
    assert not torch.allclose(encoder(images), vit.load(weights)(images))
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [
        "best.pt",
        "update-00000003.pt",
        "update-00000006.pt",
    ]
    picture = Image.open(out / "pictures" / "update-00000006.png")
    assert picture.width > 4 * 96 and np.asarray(picture).std() > 20


def test_targets_have_unit_variance_and_validation_repeats(weights: Path, tmp_path: Path):
    options = train_align.parse(flags(weights, tmp_path, "--val-images", 40))
    r = train_align.Run(options)
    r.student.target_scale = r.validate(scale_only=True)
    scale = maskembed.TargetScale()
    images = torch.stack([r.validation[i][0] for i in range(40)])
    mask, _ = train_align.draw_masks(options, 40, 4, 0, 2**40)
    scale.add(r.targets(vit.normalize(images, r.config), mask, None))
    assert scale.value == pytest.approx(1, abs=1e-5)
    assert r.validate() == r.validate()


@pytest.mark.parametrize(
    "choice",
    [
        "--objective additive", "--objective average", "--objective crop", "--target last", "--target cls", "--loss mae",
        "--loss cosine", "--loss mse-hidden", "--loss mse-visible", "--masks bernoulli --visible 0.25", "--masks block",
        "--views 1", "--views 2", "--views 2 --full-view", "--softcap 0", "--decoder-depth 1 --decoder-width 48",
        "--decoder-softcap 20", "--reinit-last-block", "--mix mixup", "--mix cutmix", "--randaugment", "--image-size 48",
        "--checkpointing --precision bf16",
    ],
)  # fmt: skip
def test_each_ablation_of_the_paper(choice: str, weights: Path, default_losses: dict[int, float], tmp_path: Path):
    run(*flags(weights, tmp_path, "--updates", 3, *choice.split()))
    values = losses(tmp_path)
    assert len(values) == 3 and all(np.isfinite(v) for v in values.values())
    if "--softcap" not in choice and "--decoder-softcap" not in choice:  # tiny logits stay far below any cap
        assert any(abs(values[u] / default_losses[u] - 1) > 1e-5 for u in values)  # the flag changes what is learned
    encoder = vit.load(tmp_path / "aligned.safetensors")
    assert encoder.config.image_size == (48 if "image-size" in choice else 32)
    assert encoder.config.softcap == (None if choice == "--softcap 0" else 30)


def test_views_are_those_asked_for(weights: Path, tmp_path: Path):
    def first(*choice: object) -> torch.Tensor:
        options = train_align.parse(flags(weights, tmp_path, *choice))
        return train_align.draw_masks(options, 4, 4, 0)[0].view(4, -1, 16)

    three, two, other = first(), first("--views", 2), first("--views", 2, "--full-view")
    assert torch.equal(three[:, 1], 1 - three[:, 0]) and three[:, 2].eq(1).all()
    assert torch.equal(two, three[:, :2]) and torch.equal(other, three[:, [0, 2]])
    assert torch.equal(first("--views", 1), three[:, :1])


def test_recipes_are_the_papers():
    """Table 6: peak 2e-4 for large models, else 3e-4; 5 epochs without warm-up, or on ImageNet-1k 25 (50) with one."""
    for name in vit.BACKBONES:
        wide = vit.BACKBONES[name].embed_dim > 768
        o = train_align.parse(["--recipe", name, "--weights", "w", "--data", "d"])
        assert (o.epochs, o.batch, o.lr, o.warmup_epochs) == (5, 1024, 2e-4 if wide else 3e-4, 0)
        assert (o.beta1, o.beta2, o.weight_decay, o.clip, o.softcap) == (0.9, 0.95, 0.01, 1.0, 30)
        assert (o.target, o.loss, o.masks, o.views, o.decoder_depth) == ("penultimate", "mse", "uniform", 3, 2)
        o = train_align.parse(["--recipe", name, "--weights", "w", "--data", "d", "--in1k"])
        assert (o.epochs, o.warmup_epochs) == (50 if name in ("moco-vit-b", "mae-vit-b", "dino-vit-b") else 25, 1)


def test_learning_rate():
    """Cosine to a tenth, stepped every update; the warm-up is inside it and does not shift it."""
    options = train_align.parse(["--lr", "1"])
    rates = [train_align.learning_rate(u, 100, 10, options) for u in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[5] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    assert rates[50] == pytest.approx(0.55) and rates[10] == pytest.approx(0.1 + 0.9 * (1 + np.cos(np.pi / 10)) / 2)
    assert train_align.learning_rate(0, 100, 0, options) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Sameness


def validation_losses(out: Path) -> list[float]:
    """The validation losses in their order."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["val_loss"] for line in lines if "val_loss" in line]


def test_an_update_is_written_out(weights: Path, tmp_path: Path):
    """Four updates of train_align against the same by hand: schedule, masks, loss, accumulation, clipping, AdamW."""
    options = train_align.parse(flags(weights, tmp_path, "--micro-batch", 4, "--weight-decay", 0.1, "--clip", 0.5))
    r = train_align.Run(options)
    r.student.target_scale = 2.0
    student, teacher = copy.deepcopy(r.student), r.teacher
    optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = vit.normalize(pixels, r.config)
    for update in range(4):
        values = r.train_update(list(pixels.split(4)))
        mask, _ = train_align.draw_masks(options, 8, 4, options.seed, update)
        target = 2 * maskembed.teacher_targets(teacher, images, mask)
        loss = (student(images, mask) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm()
        for p in student.parameters():
            p.grad *= min(1, 0.5 / (norm.item() + 1e-6))
        # 3 updates an epoch, 6 in all: one epoch of warm-up from a tenth, then the cosine, not shifted
        rate = 0.1 + 0.9 * update / 3 if update < 3 else 0.1 + 0.9 * (1 + np.cos(np.pi * update / 6)) / 2
        optimizer.param_groups[0]["lr"] = 1e-3 * rate
        optimizer.step()
        assert values["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert values["lr"] == pytest.approx(1e-3 * rate) and values["grad_norm"] == pytest.approx(
            norm.item(), rel=1e-4
        )
    for ours, by_hand in zip(r.student.parameters(), student.parameters(), strict=True):
        assert torch.allclose(ours, by_hand, rtol=1e-4, atol=2e-6)


def test_processes_workers_and_accumulation_change_nothing(weights: Path, tmp_path: Path):
    """20 updates in float32: one process, the same in micro-batches of 2, and 2 processes with and without them."""
    common = ("--updates", 20, "--epochs", 9, "--mix", "mixup", "--val-images", 7)  # 7 share out unevenly
    runs = {
        "two": process(*flags(weights, tmp_path / "two", *common), ranks=2),
        "two-accumulated": process(
            *flags(weights, tmp_path / "two-accumulated", *common, "--micro-batch", 2, "--workers", 1), ranks=2
        ),
    }
    run(*flags(weights, tmp_path / "one", *common))
    run(*flags(weights, tmp_path / "accumulated", *common, "--micro-batch", 2, "--workers", 2))
    for name, popen in runs.items():
        assert popen.wait() == 0, f"{name}: {popen.stderr.read()}"
    expected = losses(tmp_path / "one")
    assert len(expected) == 20
    for name in ("accumulated", *runs):
        for update, loss in losses(tmp_path / name).items():
            assert loss == pytest.approx(expected[update], rel=1e-5), (name, update)
        assert validation_losses(tmp_path / name) == pytest.approx(validation_losses(tmp_path / "one"), rel=1e-5)


def test_a_signal_to_one_process_stops_all(weights: Path, tmp_path: Path):
    """torchrun passes SIGTERM on; every process ends after the same update, saved."""
    popen = process(*flags(weights, tmp_path, "--epochs", 4000), ranks=2)
    wait_for(lambda: len(losses(tmp_path)) >= 2, popen)
    popen.send_signal(signal.SIGTERM)
    popen.communicate(timeout=60)
    assert popen.returncode != 0
    saved = train_align.checkpoints(tmp_path / "checkpoints")[-1]
    assert int(saved.stem[7:]) >= max(losses(tmp_path)) - 1


def test_a_killed_run_resumes_exactly(weights: Path, tmp_path: Path):
    """SIGKILL after a few updates; what follows --resume equals a run that was never killed, bit for bit."""
    common = ("--epochs", 16, "--save-every", 2, "--workers", 2)
    popen = process(*flags(weights, tmp_path / "killed", *common))
    wait_for(lambda: len(losses(tmp_path / "killed")) >= 7, popen)
    popen.send_signal(signal.SIGKILL)
    popen.wait()
    assert not (tmp_path / "killed" / "aligned.safetensors").exists()
    resumed = process(*flags(weights, tmp_path / "killed", *common, "--resume"))
    whole = process(*flags(weights, tmp_path / "whole", *common))
    for popen in (resumed, whole):
        assert popen.wait() == 0, popen.stderr.read()
    assert len(losses(tmp_path / "whole")) == 48
    assert (tmp_path / "killed" / "log.jsonl").read_text().count("\n") == (
        tmp_path / "whole" / "log.jsonl"
    ).read_text().count("\n")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    ours, theirs = (
        maskembed.load(tmp_path / name / "aligned.safetensors").state_dict() for name in ("killed", "whole")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_stop(number: signal.Signals, weights: Path, tmp_path: Path):
    popen = process(*flags(weights, tmp_path, "--epochs", 4000, "--workers", 1), start_new_session=True)
    wait_for(lambda: len(losses(tmp_path)) >= 2, popen)
    os.killpg(popen.pid, number)  # as a terminal's Ctrl-C does: the data processes get it too
    assert popen.wait(30) == 128 + number
    assert "go on with the same command and --resume" in popen.stderr.read()
    saved = train_align.checkpoints(tmp_path / "checkpoints")[-1]
    assert int(saved.stem[7:]) == max(losses(tmp_path))


def wait_for(condition, popen: subprocess.Popen) -> None:
    """Until a condition on the files of a running process holds."""
    for _ in range(1200):
        assert popen.poll() is None, popen.stderr.read()
        try:
            if condition():
                return
        except (FileNotFoundError, json.JSONDecodeError):
            pass
        time.sleep(0.05)
    raise AssertionError("the process does not get there")


def test_compiled_blocks_give_the_same(weights: Path, tmp_path: Path):
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("torch.compile needs a C++ compiler here")
    run(*flags(weights, tmp_path / "plain", "--updates", 2))
    run(*flags(weights, tmp_path / "compiled", "--updates", 2, "--compile"))
    plain, compiled = losses(tmp_path / "plain"), losses(tmp_path / "compiled")
    assert all(compiled[u] == pytest.approx(plain[u], rel=1e-4) for u in plain)


# ----------------------------------------------------------------------------------------------------------------------
# What goes wrong


def test_non_finite_updates_are_skipped_and_end_the_run(weights: Path, tmp_path: Path, monkeypatch):
    real = maskembed.reconstruction_loss
    bad_updates = {1}

    def loss(*args, **kwargs):
        value = real(*args, **kwargs)
        return value * float("nan") if value.requires_grad and next(counter) in bad_updates else value

    counter = iter(range(10**6))
    monkeypatch.setattr(maskembed, "reconstruction_loss", loss)
    run(*flags(weights, tmp_path / "one"))
    log = [json.loads(line) for line in (tmp_path / "one" / "log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in log if "loss" in line] == [0, 1, 1, 1, 1, 1]
    student = maskembed.load(tmp_path / "one" / "aligned.safetensors")
    assert all(p.isfinite().all() for p in student.parameters())
    counter, bad_updates = iter(range(10**6)), range(3, 10**6)
    monkeypatch.setattr(maskembed, "reconstruction_loss", loss)
    with pytest.raises(SystemExit, match="update 23: the loss or gradient was not finite for 20 updates in a row"):
        run(*flags(weights, tmp_path / "many", "--epochs", 20))
    assert train_align.checkpoints(tmp_path / "many" / "checkpoints")


def photographs(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (6, 5, 3), np.uint8)
        Image.fromarray(pixels).resize((70, 50), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.jpg")
    return folder


def test_images_from_folders(weights: Path, tmp_path: Path):
    photographs(tmp_path / "train" / "a", 9), photographs(tmp_path / "train" / "b", 8), photographs(tmp_path / "val", 3)
    own = ["--recipe", "own", "--data", tmp_path / "train"]
    run(*flags(weights, tmp_path / "run", *own, "--val", tmp_path / "val"))
    assert len(losses(tmp_path / "run")) == 4  # two epochs of 17 images, the odd one left out
    run(*flags(weights, tmp_path / "split", *own, "--val-share", 0.4))
    assert (tmp_path / "split" / "aligned.safetensors").exists()


def test_validation_sees_photographs_upright(tmp_path: Path):
    """As training does: EXIF orientation 6 is turned by 90 degrees."""
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20] = 255  # the upper half, which belongs to the right
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    seen = train_align.ValidationImages(data.ImageFolder(tmp_path), vit.ViTConfig(**TINY), 1)[0][0].float()
    assert seen[:, :, 20:].mean() > 240 and seen[:, :, :12].mean() < 15


def test_wrong_input(weights: Path, tmp_path: Path, capsys):
    """Each mistake gets one sentence that names what is wrong."""
    base = flags(weights, tmp_path / "out")
    assert "no such file" in fails(capsys, *base, "--weights", tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:5000])
    assert "cut.safetensors: cannot be read" in fails(capsys, *base, "--weights", tmp_path / "cut.safetensors")
    photographs(tmp_path / "photos", 20)
    clip = [*base, "--recipe", "clip-vit-b", "--data", tmp_path / "photos"]
    base += ["--recipe", "own"]
    assert "does not hold this backbone" in fails(capsys, *clip)
    (tmp_path / "empty").mkdir()
    assert "no images in" in fails(capsys, *base, "--data", tmp_path / "empty")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    assert "a.txt" in fails(capsys, *base, "--data", tmp_path / "texts")
    assert "is not a folder" in fails(capsys, *base, "--data", tmp_path / "nowhere")
    base += ["--data", tmp_path / "photos", "--val-share", 0.3]
    assert "not a multiple" in fails(capsys, *base, "--image-size", 50)
    assert "fewer than one global batch" in fails(capsys, *base, "--batch", 64)
    assert "cannot be split" in fails(capsys, *base, "--micro-batch", 3)
    assert "decoder width 50: must be a multiple" in fails(capsys, *base, "--decoder-width", 50)
    for i in range(0, 20, 2):
        (tmp_path / "photos" / f"{i:03d}.jpg").write_bytes(b"not an image")
    broken = [*base, "--epochs", 50]
    assert "images could not be read" in fails(capsys, *broken)
    assert not (tmp_path / "out" / "aligned.safetensors").exists()


def test_every_process_says_what_is_wrong_with_the_data(weights: Path, tmp_path: Path):
    """In one sentence, though the first reads the folder while the others wait for it."""
    (tmp_path / "empty").mkdir()
    popen = process(*flags(weights, tmp_path / "out", "--recipe", "own", "--data", tmp_path / "empty"), ranks=2)
    _, said = popen.communicate()
    assert popen.returncode == 1 and "no images in" in said
    assert "train_align.py\", line" not in said  # no traceback of a process; torchrun adds one of its own


def test_no_process_leaves_before_a_checkpoint_is_written(tmp_path: Path, monkeypatch):
    """Whatever ends the run afterwards, the processes wait for one another here, also where it cannot be written."""
    waited = []
    monkeypatch.setattr(train_align.dist, "barrier", lambda: waited.append(True))
    unreadable = SimpleNamespace(seen=8, count=0)
    machine = SimpleNamespace(rank=1, world=2, sum=lambda *values: values)
    train_align.Run.save_checkpoint(SimpleNamespace(machine=machine, unreadable=unreadable))
    assert waited == [True]
    (tmp_path / "out").write_text("no folder")
    machine.rank, options = 0, SimpleNamespace(out=tmp_path / "out")
    with pytest.raises(OSError):
        train_align.Run.save_checkpoint(SimpleNamespace(machine=machine, unreadable=unreadable, options=options))
    assert waited == [True, True]


def test_usage_errors_exit_with_2(weights: Path, capsys):
    for argv, text in (
        (["--recipe", "resnet-50"], "unknown; choose demo, own or one of in1k-vit-t"),
        (["--recipe", "clip-vit-b"], "needs --weights: a file with that backbone, from timm/vit_base_patch16_clip_224"),
        (["--recipe", "clip-vit-b", "--weights", "w"], "--data and --recipe go together"),
        (["--data", "d"], "--data and --recipe go together"),
        (["--recipe", "own", "--data", "d"], "a backbone that vit.save wrote"),
        (["--views", "4"], "invalid choice"),
        (["--full-view"], "--full-view goes with --views 2"),
        (["--lr", "nan"], "--lr nan: must be a number from 0 up"),
        (["--masks", "block", "--visible", "0"], "--visible 0.0: must be a number from 0.01 up"),
        (["--masks", "bernoulli", "--visible", "2"], "--visible 2.0: must be below 1"),
        (["--workers", "-1"], "--workers -1: must be a number from 0 up"),
        (["--seed", "-1"], "--seed -1"),
        (["--beta2", "1.5"], "--beta2 1.5: must be below 1"),
        (["--updates", "0"], "--updates 0: must be a number from 1 up"),
        (["--objective", "crop", "--views", "3"], "one view"),
        (["--objective", "average", "--masks", "uniform"], "needs --masks block"),
        (["--masks", "crop"], "go together"),
        (["--batch", "0"], "--batch 0: must be a number from 1 up"),
        (["--batch", "many"], "invalid int value"),
        (["--loss", "l4"], "invalid choice"),
    ):
        with pytest.raises(SystemExit) as caught:
            run(*argv)
        assert caught.value.code == 2 and text in capsys.readouterr().err, argv


def test_a_backbone_without_class_token_has_no_class_target(tmp_path: Path, capsys):
    vit.save(vit.ViT(replace(vit.BACKBONES["siglip-vit-b"], **TINY)), tmp_path / "siglip.safetensors")
    base = flags(tmp_path / "siglip.safetensors", tmp_path / "out")
    assert "has no class token; choose --target penultimate or last" in fails(capsys, *base, "--target", "cls")
    run(*base, "--updates", 1)


def test_checkpoints_that_cannot_be_continued(weights: Path, tmp_path: Path, capsys):
    out = tmp_path / "run"
    base = flags(weights, out)
    assert "holds no checkpoint; leave --resume out" in fails(capsys, *base, "--resume")
    run(*base)
    assert "continue it with --resume, or choose another --out" in fails(capsys, *base)
    assert "was made with --batch 8, not 12" in fails(capsys, *base, "--resume", "--batch", 12)
    assert "was made with --seed 0, not 1" in fails(capsys, *base, "--resume", "--seed", 1)
    torch.manual_seed(1)
    vit.save(vit.ViT(vit.ViTConfig(**TINY | {"embed_dim": 64})), tmp_path / "other.safetensors")
    assert "another backbone" in fails(capsys, *base, "--resume", "--weights", tmp_path / "other.safetensors")
    last = out / "checkpoints" / "update-00000006.pt"
    last.write_bytes(last.read_bytes()[:20000])
    message = fails(capsys, *base, "--resume")
    assert "update-00000006.pt: damaged or of another version" in message and (
        before := re.search(r"--resume (\S+)", message)
    )
    run(*base, "--resume", before[1])  # the one before still loads
    assert len(losses(out)) == 6 and (out / "aligned.safetensors").exists()


def test_going_back_gives_up_what_came_later(weights: Path, tmp_path: Path, capsys):
    """An older checkpoint continued leaves none of the course it came from; the rate may then be another."""
    base = flags(weights, tmp_path, "--save-every", 2, "--epochs", 4)  # 12 updates; the last two checkpoints: 10, 12
    run(*base)
    shutil.copy(tmp_path / "checkpoints" / "update-00000010.pt", tmp_path / "older.pt")
    before = losses(tmp_path)
    run(*base, "--resume", tmp_path / "older.pt", "--lr", 5e-4)
    assert "continuing with --lr 0.0005, until now it was 0.001" in capsys.readouterr().err
    after = losses(tmp_path)
    assert [after[u] == before[u] for u in (10, 11, 12)] == [True, True, False]
    assert not any(int(p.stem[7:]) > 12 for p in train_align.checkpoints(tmp_path / "checkpoints"))


def test_a_full_disk_loses_nothing(weights: Path, tmp_path: Path, capsys, monkeypatch):
    real = torch.save

    def full(state: dict, path: Path) -> None:
        if state["update"] == 6:
            path.write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
        real(state, path)

    monkeypatch.setattr(torch, "save", full)
    assert "is the disk full?" in fails(capsys, *flags(weights, tmp_path / "run"))
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["best.pt", "update-00000000.pt", "update-00000003.pt"]
    monkeypatch.setattr(torch, "save", real)
    run(*flags(weights, tmp_path / "run", "--resume"))
    assert len(losses(tmp_path / "run")) == 6
