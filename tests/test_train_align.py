"""train_align.py as a user runs it: whole runs, an update written out, sameness, resuming, wrong input."""

import json
import math
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import maskembed
import masks
import run
import train_align
import vit
from conftest import TINY, launch, log_of, losses


@pytest.fixture
def base(tiny_weights: Path, scenes: Path) -> list[str]:
    """Six updates of 8 images in two epochs."""
    images = f"--data {scenes / 'images' / 'train'} --val {scenes / 'images' / 'val'} --val-images 7"
    numbers = "--batch 8 --epochs 2 --updates 6 --lr 1e-3 --workers 0 --precision fp32"
    return f"--recipe own --weights {tiny_weights} {images} {numbers}".split()


def train(*argv: object) -> None:
    train_align.main(list(map(str, argv)))


def fails(*argv: object) -> str:
    """What a run that must fail says, and its exit status."""
    with pytest.raises(SystemExit) as caught, run.ended("train_align.py"):
        train(*argv)
    return str(caught.value)


def test_a_run_from_start_to_end(base: list[str], tmp_path: Path, capsys):
    train(*base, "--out", tmp_path, "--updates", 12, "--lr", 3e-3, "--epochs", 3, "--warmup-epochs", 1)
    printed = capsys.readouterr().out
    assert "| validation loss |" in printed and "python probe.py" in printed
    validation = losses(tmp_path, "val_loss")
    assert len(validation) == 3 and validation[-1] < 0.9 * validation[0]  # the start, an epoch of 6 updates, the end
    log = [line for line in log_of(tmp_path) if "loss" in line]
    assert [line["update"] for line in log] == list(range(1, 13))
    assert {"lr", "grad_norm", "images_per_s", "skipped", "unreadable"} <= log[0].keys()
    student, encoder = maskembed.load(tmp_path / "aligned.safetensors"), vit.load(tmp_path / "aligned.safetensors")
    assert encoder.config.softcap == 30 and student.target_scale != 1
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(student.encoder(images), encoder(images))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["update-00000006.pt", "update-00000012.pt"]
    picture = Image.open(tmp_path / "pictures" / "update-00000012.png")
    assert picture.width > 4 * 96 and np.asarray(picture).std() > 20
    assert json.loads((tmp_path / "options.json").read_text())["batch"] == 8


def test_an_update_is_written_out(base: list[str], tiny_weights: Path, scenes: Path, tmp_path: Path):
    """The run against the same by hand: scale, order, augmentation, masks, loss, schedule, clipping, AdamW."""
    train(*base, "--out", tmp_path, "--micro-batch", 4, "--warmup-epochs", 0.5, "--seed", 3)
    torch.manual_seed(3)
    teacher = vit.load(tiny_weights)
    student = maskembed.make_student(teacher)
    train_set, val_set = (data.ImageFolder(scenes / "images" / part) for part in ("train", "val"))

    def draw(count: int, *key: int) -> torch.Tensor:
        seeds = data.generator("masks", *key).integers(2**62, size=count)
        u = [torch.rand(17, generator=torch.Generator().manual_seed(int(seed)), dtype=torch.float64) for seed in seeds]
        return masks.views(torch.stack([(row[1:] > row[0]).float() for row in u]))

    chosen = [val_set.open(int(i)) for i in np.linspace(0, 24, 7, endpoint=False)]
    images, mask = torch.stack([vit.preprocess(image, teacher.config) for image in chosen]), draw(7, 0, 2**40)
    scale = 1 / maskembed.teacher_targets(teacher, images, mask).std(correction=0).item()
    assert maskembed.load(tmp_path / "aligned.safetensors").target_scale == pytest.approx(scale, rel=1e-5)
    optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    keys = [key for batch in data.Batches(48, 8, 2, seed=3) for key in batch]
    sample = data.Images(train_set, data.Augment(32), seed=3)
    for update, line in enumerate(line for line in log_of(tmp_path) if "loss" in line):
        pixels = torch.stack([sample[key][0] for key in keys[8 * update : 8 * update + 8]])
        x, m = vit.normalize(pixels, teacher.config), draw(8, 3, update)
        masked = x.repeat_interleave(3, 0) * m.view(-1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
        target = scale * teacher(masked, skip_blocks=1).detach()
        loss = (student(x, m) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm().item()
        for p in student.parameters():
            p.grad *= min(1, 1.0 / (norm + 1e-6))
        # half an epoch, 3 updates, of warm-up from a tenth; then the cosine over all 6, not shifted
        rate = 0.1 + 0.9 * update / 3 if update < 3 else 0.1 + 0.9 * (1 + math.cos(math.pi * update / 6)) / 2
        optimizer.param_groups[0]["lr"] = 1e-3 * rate
        optimizer.step()
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5) and line["lr"] == pytest.approx(1e-3 * rate)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    ours = maskembed.load(tmp_path / "aligned.safetensors")
    for name, parameter in student.named_parameters():
        assert torch.allclose(ours.get_parameter(name), parameter, rtol=1e-4, atol=2e-6), name


@pytest.mark.parametrize(
    "choice",
    [
        "--objective additive", "--objective average", "--objective crop", "--target last", "--target cls",
        "--loss mae", "--loss cosine", "--loss mse-hidden", "--loss mse-visible", "--masks bernoulli --visible 0.25",
        "--masks block", "--views 1", "--views 2", "--views 2-full", "--decoder-depth 1 --decoder-width 48",
        "--reinit-last-block", "--mix mixup", "--mix cutmix", "--randaugment", "--checkpointing --precision bf16",
        "--softcap 0",
    ],
)  # fmt: skip
def test_each_ablation_of_the_paper(choice: str, base: list[str], default_loss: float, tmp_path: Path):
    """Two updates; the first loss is that of the zero head, the second differs from that of the default."""
    train(*base, "--out", tmp_path, "--updates", 2, *choice.split())
    values = losses(tmp_path)
    assert len(values) == 2 and np.isfinite(values).all()
    assert (values[1] == pytest.approx(default_loss, rel=1e-5)) == ("--softcap" in choice)  # tiny logits need no cap
    assert vit.load(tmp_path / "aligned.safetensors").config.softcap == (None if choice == "--softcap 0" else 30)


@pytest.fixture
def default_loss(base: list[str], tmp_path_factory, request) -> float:
    """The second loss of a run without any choice, computed once."""
    if not hasattr(train_align, "default_loss"):
        out = tmp_path_factory.mktemp("default")
        train(*base, "--out", out, "--updates", 2)
        train_align.default_loss = losses(out)[1]
    return train_align.default_loss


def test_recipes_are_the_papers():
    """Table 6: peak 2e-4 for large models, else 3e-4; 5 epochs without warm-up, or on ImageNet-1k 25 (50) with one."""
    for name in vit.BACKBONES:
        wide = vit.BACKBONES[name].embed_dim > 768
        o, _ = train_align.options(["--recipe", name, "--weights", "w", "--data", "d"])
        assert (o.epochs, o.batch, o.lr, o.warmup_epochs) == (5, 1024, 2e-4 if wide else 3e-4, 0)
        assert (o.target, o.loss, o.masks, o.views, o.decoder_depth) == ("penultimate", "mse", "uniform", "3", 2)
        assert o.micro_batch == {"clip-vit-l-336": 32, "siglip-so400m-384": 16}.get(name, 64)  # in 80 GB
        o, _ = train_align.options(["--recipe", name, "--weights", "w", "--data", "d", "--in1k"])
        assert (o.epochs, o.warmup_epochs) == (50 if name in ("moco-vit-b", "mae-vit-b", "dino-vit-b") else 25, 1)
    constants = train_align.BETAS, train_align.WEIGHT_DECAY, train_align.MAX_NORM
    assert constants == ((0.9, 0.95), 0.01, 1.0) and o.softcap == 30


def test_processes_workers_and_accumulation_change_nothing(base: list[str], tmp_path: Path):
    """20 updates in float32: in micro-batches of 2 with workers, on 2 processes, and on 2 from update 10 on."""
    base += ["--updates", "20", "--epochs", "9", "--mix", "mixup", "--save-every", "10"]
    two = launch("train_align.py", *base, "--out", tmp_path / "two", "--micro-batch", 2, "--workers", 1, ranks=2)
    train(*base, "--out", tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "resumed")
    run.checkpoints(tmp_path / "resumed" / "checkpoints")[-1].unlink()
    resumed = launch("train_align.py", *base, "--out", tmp_path / "resumed", "--resume", ranks=2)
    train(*base, "--out", tmp_path / "accumulated", "--micro-batch", 2, "--workers", 2)
    assert two.wait() == resumed.wait() == 0, two.stderr.read() + resumed.stderr.read()
    assert len(losses(tmp_path / "one")) == 20
    for name in ("accumulated", "two", "resumed"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
        assert losses(tmp_path / name, "val_loss") == pytest.approx(losses(tmp_path / "one", "val_loss"), rel=1e-5)


def test_a_stopped_run_resumes_exactly(base: list[str], tmp_path: Path):
    """SIGKILL, then SIGTERM to all; what follows --resume equals a run that was never stopped, bit for bit."""
    base += ["--updates", "24", "--epochs", "9", "--save-every", "2", "--workers", "1"]
    whole, again = launch("train_align.py", *base, "--out", tmp_path / "whole"), []
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = launch("train_align.py", *base, "--out", tmp_path / "stopped", *again, start_new_session=True)
        before = len(losses(tmp_path / "stopped")) if again else 0
        while len(losses(tmp_path / "stopped") if (tmp_path / "stopped" / "log.jsonl").exists() else []) < before + 4:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        os.killpg(process.pid, number)  # as a terminal's Ctrl-C does: the data workers get it too
        assert process.wait(30) == (-number if number == signal.SIGKILL else 128 + number)
        again = ["--resume"]
    resumed = launch("train_align.py", *base, "--out", tmp_path / "stopped", "--resume")
    assert whole.wait() == resumed.wait() == 0, resumed.stderr.read()
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert losses(tmp_path / "stopped", "val_loss") == losses(tmp_path / "whole", "val_loss")
    ours, theirs = (maskembed.load(tmp_path / name / "aligned.safetensors") for name in ("stopped", "whole"))
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def test_compiled_blocks_give_the_same(base: list[str], tmp_path: Path):
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("torch.compile needs a C++ compiler here")
    for name, choice in (("plain", []), ("compiled", ["--compile"])):
        train(*base, "--out", tmp_path / name, "--updates", 2, *choice)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


def test_non_finite_updates_are_skipped_and_end_the_run(base: list[str], tmp_path: Path, monkeypatch):
    real, count = maskembed.reconstruction_loss, iter(range(10**6))

    def loss(*args, **kwargs):
        value = real(*args, **kwargs)
        return value * float("nan") if value.requires_grad and next(count) in bad else value

    monkeypatch.setattr(maskembed, "reconstruction_loss", loss)
    bad = {1}
    train(*base, "--out", tmp_path / "one")
    assert losses(tmp_path / "one", "skipped") == [0, 1, 1, 1, 1, 1]
    student = maskembed.load(tmp_path / "one" / "aligned.safetensors")
    assert all(p.isfinite().all() for p in student.parameters())
    count, bad = iter(range(10**6)), range(3, 10**6)
    base += ["--epochs", "20", "--updates", "100"]
    message = fails(*base, "--out", tmp_path / "many", "--batch", 2, "--save-every", 3)
    assert "update 23: the loss or gradient was not finite for 20 updates in a row" in message
    assert run.checkpoints(tmp_path / "many" / "checkpoints")


def test_broken_images_are_replaced_named_and_counted(tiny_weights: Path, scenes: Path, tmp_path: Path):
    """One of 48 is replaced; 16 of 48 end every process with the same sentence."""
    shutil.copytree(scenes / "images" / "train", tmp_path / "images")
    files = f"--weights {tiny_weights} --data {tmp_path / 'images'} --out {tmp_path / 'out'}"
    base = f"--recipe own {files} --val {scenes / 'images' / 'val'} --batch 8 --precision fp32 --workers 0".split()
    for count in (1, 16):
        for image in sorted((tmp_path / "images").iterdir())[:count]:
            image.write_bytes(b"not an image")
        if count == 1:
            train(*base, "--epochs", 1)
            assert max(losses(tmp_path / "out", "unreadable")) == 1
    process = launch("train_align.py", *base, "--epochs", 90, "--out", tmp_path / "two", ranks=2)
    _, said = process.communicate()
    assert process.returncode == 1 and said.count("images cannot be used") == 2
    assert "unreadable, replaced by another image: " in said and 'train_align.py", line' not in said


def test_wrong_input_is_one_sentence(base: list[str], tiny_weights: Path, tmp_path: Path):
    (tmp_path / "cut.safetensors").write_bytes(tiny_weights.read_bytes()[:5000])
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    vit.save(vit.ViT(replace(vit.BACKBONES["siglip-vit-b"], **TINY)), tmp_path / "siglip.safetensors")
    for argv, text in (
        (["--weights", tmp_path / "none.safetensors"], "none.safetensors: "),
        (["--weights", tmp_path / "cut.safetensors"], "cut.safetensors: cannot be read"),
        (["--weights", tmp_path / "siglip.safetensors", "--target", "cls"], "no class token; choose the target"),
        (["--data", tmp_path / "texts"], "texts holds no images"),
        (["--data", tmp_path / "nowhere"], "nowhere"),
        (["--batch", 64], "cannot be drawn from 48 samples"),
        (["--decoder-width", 50], "decoder width 50: must be a multiple"),
        (["--resume"], "holds no checkpoint; leave --resume out"),
    ):
        message = fails(*base, "--out", tmp_path / "out", *argv)
        assert message.startswith("train_align.py: ") and text in message and "\n" not in message
    assert not (tmp_path / "out" / "aligned.safetensors").exists()


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ("--recipe resnet-50", "invalid choice"),
        ("--recipe clip-vit-b", "needs --weights (a file from timm/vit_base_patch16_clip_224"),
        ("--views 4", "invalid choice"),
        ("--masks bernoulli --visible 2", "--visible: 2 must be at least 0.01 and below 1"),
        ("--updates 0", "--updates: 0 must be at least 1"),
        ("--objective crop --views 3", "has the views 1; leave --views out"),
        ("--objective average --masks uniform", "has the masks block; leave --masks out"),
    ],
)
def test_usage_errors_exit_with_2(argv: str, text: str, capsys):
    with pytest.raises(SystemExit) as caught:
        train_align.options(argv.split())
    assert caught.value.code == 2 and text in capsys.readouterr().err


def test_imagenets_layout_and_a_checkpoint_as_weights(base: list[str], scenes: Path, tmp_path: Path, capsys):
    """train/ and val/ are these two, whatever else lies beside them; a checkpoint is a file with an aligned model."""
    for part, source in (("train", "train"), ("val", "val"), ("test", "test")):
        shutil.copytree(scenes / "images" / source, tmp_path / "in1k" / part)
    argv = list(map(str, base))
    argv[argv.index("--data") + 1] = str(tmp_path / "in1k")
    del argv[argv.index("--val") : argv.index("--val") + 2]
    train(*argv, "--out", tmp_path / "out", "--updates", 2)
    said = capsys.readouterr().err
    assert f"training images: {tmp_path / 'in1k/train'}, 48; 7 to validate on, of {tmp_path / 'in1k/val'}" in said
    checkpoint, = (tmp_path / "out/checkpoints").glob("update-*.pt")
    ours, loaded = maskembed.load(tmp_path / "out/aligned.safetensors"), maskembed.load(checkpoint)
    assert ours.target_scale == loaded.target_scale and ours.encoder.config == vit.load(checkpoint).config
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in ours.state_dict().items())


def test_all_batches_have_one_shape(base: list[str], tmp_path: Path, monkeypatch):
    """A compiled block is one kernel for each: the last batch of a validation, 3 of 7 images, is filled up, too."""
    shapes, targets = set(), maskembed.teacher_targets
    seen = lambda f, x, m, t: shapes.add((len(x), len(m))) or targets(f, x, m, t)
    monkeypatch.setattr(maskembed, "teacher_targets", seen)
    train(*base, "--micro-batch", 4, "--out", tmp_path)
    assert shapes == {(4, 12)}
