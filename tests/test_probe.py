"""probe.py and the segmentation labels of data.py: against the reference, whole runs on tiny backbones, wrong input."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import data
import probe
import vit
from probe import Probe

ROOT = Path(probe.__file__).parent
TINY = vit.ViTConfig(image_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, crop_pct=1.0)


def tiny(path: Path, seed: int = 0, **changes) -> Path:
    """A file with a tiny backbone of ordinary random weights."""
    torch.manual_seed(seed)
    model = vit.ViT(replace(TINY, **changes))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    vit.save(model, path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


def flags(out: Path, *more: object) -> list[str]:
    """12 updates on scenes, on a single core."""
    common = f"--out {out} --scenes 48 --val-images 10 --batch 8 --epochs 2 --workers 0 --precision fp32 --log-every 1"
    return [*common.split(), *map(str, more)]


def run(*argv: object) -> None:
    probe.main([str(a) for a in argv])


def results(out: Path) -> dict[str, dict]:
    """"backbone/probe" -> result.json."""
    return {str(path.parent.relative_to(out)): json.loads(path.read_text()) for path in sorted(out.glob("*/*/result.json"))}


def learned(out: Path) -> dict[str, list]:
    """What must not depend on the machine."""
    return {name: [result["epochs"], result["best"], result["maps"]] for name, result in results(out).items()}


def numbers(value: object) -> list:
    """All numbers of nested lists and dicts, None as -1."""
    if isinstance(value, (list, dict)):
        return [n for part in (value if isinstance(value, list) else value.values()) for n in numbers(part)]
    return [-1 if value is None else value]


def fails(*argv: object) -> str:
    """What a run that must fail says: one sentence, exit status 1."""
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    message = str(caught.value)
    assert message.startswith("probe.py: ") and "\n" not in message
    return message


# ----------------------------------------------------------------------------------------------------------------------
# Labels and metrics


class Reference:
    """The fixture: label maps and metrics of the reference program."""

    def __init__(self):
        self.file = safe_open(ROOT / "tests/data/probe/patchseg.safetensors", "pt")
        self.facts = json.loads(self.file.metadata()["fixture"])

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.file.get_tensor(name)


@pytest.mark.parametrize("number", range(3))
def test_labels_are_the_references(number: int):
    reference = Reference()
    size, patch, classes = (reference.facts[key] for key in ("size", "patch", "classes"))
    annotation = Image.fromarray(reference[f"annotation.{number}"].numpy())
    pixels = np.asarray(data.centre_square(annotation, size, Image.Resampling.NEAREST)) + np.uint8(1)  # COCO's shift
    assert np.array_equal(pixels, reference[f"pixels.{number}"].numpy())
    grid = (size // patch, size // patch)
    assert np.array_equal(data.union(pixels[None], patch, classes).reshape(*grid, -1), reference[f"union.{number}"].numpy())
    assert np.array_equal(data.majority(pixels[None], patch, classes).reshape(grid), reference[f"majority.{number}"].numpy())
    assert np.array_equal(data.global_union(pixels[None], classes), reference[f"global-union.{number}"].numpy())


def test_metrics_are_the_references():
    reference = Reference()
    local = probe.tally(reference["metric.logits"], reference["metric.union_targets"].flatten(1, 2).bool())
    whole = probe.tally(reference["metric.global_logits"][:, 0], reference["metric.global_targets"].bool())
    for name, values in (("union", probe.metrics(local, 25)), ("global", probe.metrics(whole, 1))):
        for metric, expected in reference.facts["metrics"][name].items():
            ours = metric if metric.endswith("accuracy") else metric.removeprefix("macro_")
            assert values[ours] == pytest.approx(expected, abs=1e-6), (name, metric)
    for metric in ("class_recall", "recall_by_size"):
        ours = np.array(probe.metrics(local, 25)[metric], float)
        np.testing.assert_allclose(ours, reference[f"metric.{metric}"].numpy(), atol=1e-6, equal_nan=True)


def plain_labels(labels: np.ndarray, patch: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """union and majority by their definitions, patch by patch."""
    grid = labels.shape[-1] // patch
    union, majority = np.zeros((grid**2, classes), bool), np.zeros(grid**2, int)
    for n in range(grid**2):
        row, column = n // grid * patch, n % grid * patch
        pixels = labels[:, row : row + patch, column : column + patch]
        here = set(pixels.ravel().tolist())
        union[n, list(here - {0} or {0})] = True
        majority[n] = min(here, key=lambda c: (-(pixels[0] == c).sum(), c))
    return union, majority


@pytest.mark.parametrize("size, patch, maps", [(16, 4, 1), (22, 5, 2), (7, 7, 1)])
def test_labels_by_definition(size: int, patch: int, maps: int):
    """With ties, empty patches, pixels beyond the last whole patch, several maps."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, (maps, size, size), np.uint8) * rng.integers(0, 2, (maps, size, size), np.uint8)
    labels[:, :patch, :patch] = 0
    union, majority = plain_labels(labels, patch, 6)
    assert np.array_equal(data.union(labels, patch, 6), union)
    assert np.array_equal(data.majority(labels, patch, 6), majority)
    first = data.majority(labels, patch, 6, unlabeled=False)
    assert np.array_equal(first > 0, plain_labels(labels[:1], patch, 6)[0][:, 1:].any(1))
    assert data.global_union(labels, 6).tolist() == [c in labels for c in range(6)]


def test_packed_labels_are_the_labels():
    source = data.Scenes(4, 0, 32)
    sets, single = data.PatchLabels(source, 8), data.PatchLabels(source, 8, "majority", most=2)
    assert len(sets) == 4 and single.chosen.tolist() == [0, 2]
    pixels, patches, whole = sets[2]
    assert pixels.shape == (3, 32, 32) and patches.shape == (16, 3)
    assert np.array_equal(data.unpack(patches, 19).numpy(), data.union(source[2].labels, 8, 19))
    assert np.array_equal(data.unpack(whole, 19).numpy(), data.global_union(source[2].labels, 19))
    assert np.array_equal(single[1][1][:, 0].numpy(), data.majority(source[2].labels, 8, 19))


def test_tally_and_metrics_by_definition():
    torch.manual_seed(0)
    for places in (1, 5, 16, 49, 257):
        bits = torch.rand(3, places, 7) < 0.7
        assert torch.equal(probe.sum_places(bits), bits.sum(1))
    logits, targets = torch.randn(6, 9, 5), torch.randint(0, 4, (6, 9))  # class 4 never occurs
    counts = probe.tally(logits, targets)
    said = logits.argmax(-1)
    for c in range(5):
        assert counts[0, :, c].tolist() == ((said == c) & (targets == c)).sum(1).tolist()
        assert counts[1, :, c].tolist() == (said == c).sum(1).tolist()
    values = probe.metrics(counts, 9)
    assert values["classes"] == 4 and values["class_recall"][4] is None
    recalls = [((said == c) & (targets == c)).sum().item() / (targets == c).sum().item() for c in range(4)]
    assert values["recall"] == pytest.approx(np.mean(recalls))
    silent = probe.metrics(probe.tally(torch.full((2, 3), -1.0), torch.ones(2, 3, dtype=torch.bool)), 1)
    assert silent["never_predicted"] == 3 and silent["precision"] is None and silent["recall"] == 0


def test_losses():
    logits, sets = torch.randn(2, 4, 3), torch.rand(2, 4, 3) < 0.5
    p = logits.sigmoid()
    assert probe.loss_of(logits, sets).item() == pytest.approx(-(sets * p.log() + ~sets * (1 - p).log()).mean().item(), rel=1e-5)
    single = sets.int().argmax(-1)
    expected = -logits.log_softmax(-1).gather(-1, single[..., None]).mean().item()
    assert probe.loss_of(logits, single).item() == pytest.approx(expected, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Heads


@pytest.mark.parametrize("prefix", [dict(), dict(registers=2), dict(class_token=False)])
@pytest.mark.parametrize("head", probe.HEADS)
def test_heads_read_what_they_should(head: str, prefix: dict):
    config = replace(TINY, **prefix)
    P, N = config.num_prefix, config.num_patches
    tokens = torch.randn(2, P + N, 16)
    local, whole = (probe.make_head(Probe(task, head), config, 7).eval() for task in ("local", "global"))
    with torch.no_grad():
        assert local(tokens).shape == (2, N, 7) and whole(tokens).shape == (2, 7)
        if head == "transformer":
            assert (local(tokens) - local(tokens.flip(1)).flip(1)).abs().max() > 1e-4  # it knows positions
        else:  # each patch by itself; the image by its mean prefix token, or mean token
            other = tokens.clone()
            other[:, P] += 1
            assert torch.equal(local(other)[:, 1:], local(tokens)[:, 1:])
            assert torch.allclose(whole(tokens), whole.layers((tokens[:, :P] if P else tokens).mean(1)))


@pytest.mark.parametrize("class_token", [True, False])
def test_interventions_take_places_away(class_token: bool):
    config = replace(TINY, class_token=class_token)
    tokens = torch.randn(2, config.num_prefix + 16, 16)
    shuffled = torch.cat([tokens[:, : config.num_prefix], tokens[:, config.num_prefix :][:, torch.randperm(16)]], 1)
    changed = torch.cat([tokens[:, :1], torch.randn_like(tokens[:, 1:])], 1)
    with torch.no_grad():
        for intervention in ("cls-only", "anonymous"):
            head = probe.make_head(Probe("local", "transformer", intervention), config, 7)
            assert head(tokens).shape == (2, 16, 7)
            assert torch.allclose(head(tokens), head(shuffled), atol=1e-6)  # who stands where is not told
            assert (head(tokens)[:, 0] - head(tokens)[:, 1]).abs().max() > 1e-4  # but the answers have places
            blind = intervention == "cls-only" and class_token
            assert torch.equal(head(tokens), head(changed)) == blind


def test_the_transformer_head_is_the_papers():
    config = vit.BACKBONES["clip-vit-b"]
    head = probe.make_head(Probe("local", "transformer"), config, 183)
    assert head.positions.shape == (1, 197, 768) and 0.019 < head.positions.std() < 0.021
    assert len(head.blocks) == 2 and head.blocks[0].attn.qkv.bias is None and head.blocks[0].attn.num_heads == 12
    assert head.blocks[1].ls2.gamma.eq(0.01).all() and head.blocks[0].mlp.fc1.out_features == 4 * 768
    assert probe.make_head(Probe("local", "mlp"), config, 183).layers[0].out_features == 1024


def test_learning_rate():
    """1e-3 to 1e-4 by cosine over all updates, 500 or a tenth of them warming up inside it."""
    options = probe.Options()
    rates = [probe.learning_rate(u, 10000, options) for u in range(10001)]
    assert rates[0] == pytest.approx(1e-3 / 501) and rates[10000] == pytest.approx(1e-4)
    assert rates[500] == pytest.approx(1e-4 + 9e-4 * (1 + np.cos(np.pi / 20)) / 2) and np.argmax(rates) == 500
    assert np.argmax([probe.learning_rate(u, 100, options) for u in range(100)]) == 10
    assert (options.epochs, options.batch, options.weight_decay) == (5, 32, 0.01)


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs


def test_a_run_from_start_to_end(weights: Path, tmp_path: Path, capsys):
    """Two backbones, three tasks, two seeds; then again with --resume and more to measure."""
    out, other = tmp_path / "out", tiny(tmp_path / "other.safetensors", 1, class_token=False)
    run(weights, other, *flags(out, "--tasks", "local,global,leakage", "--seeds", 2, "--show", "3,4"))
    printed = capsys.readouterr().out
    assert "| macro recall, % | local, transformer | global, transformer | leakage |" in printed and "±" in printed
    made = results(out)
    assert len(made) == 2 * (2 + 2 + 1)
    local = made["tiny/local-transformer-seed-1"]
    assert [epoch["epoch"] for epoch in local["epochs"]] == [1, 2] and len(local["maps"]) == 2 and len(local["maps"][0]) == 16
    assert {"loss", "recall", "accuracy", "precision", "f1", "recall_shapes", "recall_colors"} <= local["best"].keys()
    assert local["best"]["recall"] == max(epoch["recall"] for epoch in local["epochs"])
    assert len(local["best"]["class_recall"]) == 19 and len(local["best"]["recall_by_size"]) == 10
    log = [json.loads(line) for line in (out / "tiny/local-transformer-seed-0/log.jsonl").read_text().splitlines()]
    assert [line["update"] for line in log if "epoch" not in line] == list(range(1, 13))
    assert {path.name for path in out.iterdir()} == {"tiny", "other", "results.json", "results.md", "picture.png", "scatter.png"}
    report = (out / "results.md").read_text()
    assert "| backbone | 0-10% |" in report and "| shapes | tiny | other | gain |" in report and "never predicted" in report
    mean = 100 * np.mean([made[f"other/global-transformer-seed-{i}"]["best"]["recall"] for i in (0, 1)])
    assert f"{mean:.2f} ± " in printed
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*/result.json")}
    assert "--resume" in fails(weights, other, *flags(out))
    run(weights, other, *flags(out, "--resume", "--heads", "linear,transformer", "--show", "3,4"))
    assert len(results(out)) == 10 + 4 and before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize(
    "choice",
    [
        "--heads mlp,linear", "--labels majority --tasks local --heads transformer,linear", "--skip-blocks 1 --heads linear",
        "--interventions none,cls-only,anonymous --tasks local", "--finetune --tasks local --heads linear",
        "--precision bf16 --heads transformer --tasks local",
    ],
)  # fmt: skip
def test_each_choice(choice: str, weights: Path, tmp_path: Path):
    run(weights, *flags(tmp_path / "out", "--epochs", 1, *choice.split()))
    made = results(tmp_path / "out")
    assert len(made) == {"mlp": 4, "maj": 2, "ski": 2, "int": 3, "fin": 1, "pre": 1}[choice.split("--")[1].replace("heads ", "").replace("labels ", "")[:3]]
    assert all(0 <= result["best"]["recall"] <= 1 and np.isfinite(result["best"]["loss"]) for result in made.values())


def test_a_probe_learns_what_is_there(tmp_path: Path):
    """Colors can be read off random patch embeddings: recall climbs far above that of the first epoch."""
    path = tiny(tmp_path / "b.safetensors", depth=1, embed_dim=32)
    run(path, *flags(tmp_path / "out", "--tasks", "local", "--heads", "mlp", "--scenes", 160, "--epochs", 8, "--lr", 1e-2))
    epochs = results(tmp_path / "out")["b/local-mlp-seed-0"]["epochs"]
    assert epochs[-1]["loss"] < 0.8 * epochs[0]["loss"] and epochs[-1]["recall_colors"] > 0.15


def test_kept_mapped_and_recomputed_features_train_alike(weights: Path, tmp_path: Path, monkeypatch):
    choice = ("--tasks", "local,global", "--heads", "linear")
    run(weights, *flags(tmp_path / "kept", *choice))
    run(weights, *flags(tmp_path / "anew", *choice, "--no-cache", "--workers", 1))
    monkeypatch.setattr(probe.os, "sysconf", lambda name: 0)  # no memory is free
    run(weights, *flags(tmp_path / "mapped", *choice))
    assert learned(tmp_path / "kept") == learned(tmp_path / "mapped")
    assert numbers(learned(tmp_path / "kept")) == pytest.approx(numbers(learned(tmp_path / "anew")), rel=1e-4)
    assert not list((tmp_path / "mapped").glob(".*"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(probe.os, "posix_fallocate", full)
    assert "no room for the features" in fails(weights, *flags(tmp_path / "full", *choice))
    assert not list((tmp_path / "full").glob(".*"))


def interrupt(monkeypatch, at: int) -> None:
    """A SIGTERM arrives during update `at`."""
    original = probe.Training.train_update

    def update(self, *args):
        if self.update + 1 == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(probe.Training, "train_update", update)


@pytest.mark.parametrize("at", [4, 6, 9])
def test_a_resumed_run_is_the_uninterrupted_one(at: int, weights: Path, tmp_path: Path, monkeypatch):
    """Stopped within an epoch or at its end; an epoch has 6 updates. The backbone is trained too."""
    choice = ("--tasks", "global", "--heads", "linear", "--finetune", "--flip", "--save")
    run(weights, *flags(tmp_path / "whole", *choice, tmp_path / "whole.safetensors"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        interrupt(patch, at)
        run(weights, *flags(tmp_path / "cut", *choice, tmp_path / "cut.safetensors"))
    assert caught.value.code == 128 + signal.SIGTERM
    folder = tmp_path / "cut/tiny/global-linear-seed-0"
    assert (folder / "checkpoint.pt").exists() and not (folder / "result.json").exists()
    assert "--lr 0.001, not 0.01" in fails(weights, *flags(tmp_path / "cut", *choice, tmp_path / "x.safetensors", "--resume", "--lr", 0.01))
    run(weights, *flags(tmp_path / "cut", *choice, tmp_path / "cut.safetensors", "--resume"))
    assert learned(tmp_path / "cut") == learned(tmp_path / "whole") and not (folder / "checkpoint.pt").exists()
    assert [json.loads(line)["update"] for line in (folder / "log.jsonl").read_text().splitlines()] == [*range(1, 7), 6, *range(7, 13), 12]
    a, b = (vit.load(tmp_path / f"{name}.safetensors").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_processes_share_the_probes_and_change_nothing(weights: Path, tmp_path: Path):
    choice = ("--tasks", "local,global,leakage", "--epochs", 1)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    two = subprocess.Popen([*launcher, str(ROOT / "probe.py"), str(weights), *flags(tmp_path / "two", *choice)],
                           env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    run(weights, *flags(tmp_path / "one", *choice))
    printed, errors = two.communicate()
    assert two.returncode == 0, errors
    assert printed.count("| tiny |") == 1 and not list((tmp_path / "two").glob(".*"))
    one, other = results(tmp_path / "one"), results(tmp_path / "two")
    assert one.keys() == other.keys()
    for name in one:
        assert numbers(one[name]["best"]) == pytest.approx(numbers(other[name]["best"]), rel=1e-4), name


def test_finetuning_from_random_weights_and_saving(tmp_path: Path):
    config = json.dumps({"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "crop_pct": 1.0})
    saved = tmp_path / "teacher.safetensors"
    run("--init", config, "--task", "global", "--head", "linear", "--finetune", "--flip", "--save", saved, *flags(tmp_path / "out"))
    torch.manual_seed(0)
    start, backbone = vit.ViT(vit.ViTConfig(**json.loads(config))), vit.load(saved)
    assert backbone.config == start.config
    assert not torch.equal(backbone.blocks[0].attn.qkv.weight, start.blocks[0].attn.qkv.weight)
    made = results(tmp_path / "out")["init/global-linear-seed-0"]
    assert {"recall_shapes", "recall_colors"} <= made["best"].keys()


# ----------------------------------------------------------------------------------------------------------------------
# Leakage, report


def leakage(path: Path, out: Path) -> dict:
    run(path, *flags(out, "--tasks", "leakage", "--val-images", 65))
    return results(out)[f"{path.stem}/leakage-seed-0"]["best"]


def test_leakage_is_zero_without_attention_and_one_without_places(tmp_path: Path):
    alone = leakage(tiny(tmp_path / "alone.safetensors", depth=0), tmp_path / "a")
    assert alone["leakage"] == alone["leakage_near"] == alone["leakage_far"] == 0
    usual = leakage(tiny(tmp_path / "usual.safetensors"), tmp_path / "b")
    assert 0 < usual["leakage"] < 1 and min(usual["leakage_near"], usual["leakage_far"]) <= usual["leakage"]
    model = vit.load(tmp_path / "usual.safetensors")
    for block in model.blocks:  # each token becomes the mean of all: all change alike
        block.attn.qkv.weight.data[:32] = 0
        block.attn.qkv.bias.data[:32] = 0
        block.attn.proj.weight.data *= 1e4
        block.mlp.fc2.weight.data *= 0
    vit.save(model, tmp_path / "mixed.safetensors")
    assert leakage(tmp_path / "mixed.safetensors", tmp_path / "c")["leakage"] == pytest.approx(1, abs=0.01)


def test_mean_and_standard_error():
    assert probe.text_of(np.array([0.1, 0.2, 0.3])) == "20.00 ± 5.77" and probe.text_of(np.array([0.5]), percent=False) == "0.5000"
    assert probe.text_of(np.array([np.nan])) == "-"


def test_trend_line_and_picture_helpers(tmp_path: Path):
    columns = [{"local": x + bump, "global": x} for x, bump in ((0.3, 0), (0.4, 0.03), (0.5, 0))]
    scores = {f"b{i}": {t: {"recall": np.array([v])} for t, v in column.items()} for i, column in enumerate(columns)}
    above = probe.scatter(scores, tmp_path / "scatter.png")
    assert above == pytest.approx({"b0": -1, "b1": 2, "b2": -1})
    sheet = np.asarray(Image.open(tmp_path / "scatter.png"))
    assert (sheet == (31, 119, 180)).all(-1).sum() > 100
    image = data.paint(Image.new("RGB", (40, 40), "white"), [0, 1, 1, 2], {1: (255, 0, 0), 2: (0, 0, 255)})
    corner = [np.asarray(image)[y, x].tolist() for y, x in ((5, 5), (5, 35), (35, 35))]
    assert len(set(corner[0])) == 1 and corner[1][0] > 200 > corner[1][2] and corner[2][2] > 200
    assert data.legend(image, {"sky": (0, 0, 255), "grass": (0, 255, 0)}).height >= 56


# ----------------------------------------------------------------------------------------------------------------------
# Data sets on disk


def write_images(folder: Path, names: dict[str, tuple[str, tuple[int, int]]]) -> None:
    """name -> (mode, size), with random pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, (mode, (width, height))) in enumerate(names.items()):
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / name)


def write_labels(folder: Path, names: dict[str, tuple[int, int]], values: list[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, (width, height)) in enumerate(names.items()):
        Image.fromarray(np.random.default_rng(seed).choice(values, (height, width)).astype(np.uint8)).save(folder / name)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """As COCO-Stuff is distributed: greyscale among color, upright and wide, an annotation at half the size."""
    root = tmp_path / "coco"
    for part in ("train2017", "val2017"):
        write_images(root / part, {"000000000009.jpg": ("RGB", (60, 40)), "000000000025.jpg": ("L", (40, 50)), "000000000030.jpg": ("RGB", (64, 64))})
        maps = {"000000000009.png": (60, 40), "000000000025.png": (40, 50), "000000000030.png": (32, 32)}
        write_labels(root / "stuffthingmaps_trainval2017" / part, maps, [0, 1, 90, 91, 181, 255])
    (root / "labels.txt").write_text("".join(f"{i}: {'unlabeled' if i == 0 else f'name {i}'}\n" for i in range(183)))
    return root


@pytest.fixture
def ade20k(tmp_path: Path) -> Path:
    root = tmp_path / "ADEChallengeData2016"
    for part in ("training", "validation"):
        write_images(root / "images" / part, {"ADE_1.jpg": ("RGB", (50, 40)), "ADE_2.jpg": ("RGB", (40, 40))})
        write_labels(root / "annotations" / part, {"ADE_1.png": (50, 40), "ADE_2.png": (40, 40)}, [0, 1, 2, 150])
    rows = "".join(f"{i}\t0.1\t11\t 12\tthing {i}, entity\n" for i in range(1, 151))
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + rows)
    return root


def test_coco_stuff(coco: Path):
    source = data.Segmentation(coco, "train", 32)
    assert len(source) == 3 and len(source.names) == 183 and source.names[:2] == ["unlabeled", "name 1"]
    assert source.groups == {"things": range(1, 92), "stuff": range(92, 183)}
    for i in range(3):
        assert source[i].image.size == (32, 32) and source[i].image.mode == "RGB" and source[i].labels.shape == (1, 32, 32)
        assert set(np.unique(source[i].labels)) == {1, 2, 91, 92, 182, 0}
    whole = Image.open(coco / "stuffthingmaps_trainval2017/train2017/000000000030.png")
    assert np.array_equal(source[2].labels[0], np.asarray(whole) + np.uint8(1))


def test_ade20k_and_a_plain_folder(ade20k: Path, tmp_path: Path):
    source = data.Segmentation(ade20k, "val", 32)
    assert len(source.names) == 151 and source.names[0] == "unlabeled" and source.names[150] == "thing 150, entity"
    assert source.groups == {} and source[0].labels.max() == 150
    table = "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t1\t1\t1\twall\n2\t0.1\t1\t1\t0\tdoor\n"
    (ade20k / "objectInfo150.txt").write_text(table)
    assert data.read_class_names(str(ade20k / "objectInfo150.txt"))[1] == {"things": [2], "stuff": [1]}
    for part in ("train", "val"):
        write_images(tmp_path / "own" / "images" / part, {"a.png": ("RGB", (20, 20))})
        write_labels(tmp_path / "own" / "labels" / part, {"a.png": (20, 20)}, [0, 2])
    (tmp_path / "own" / "labels.txt").write_text("0: none\n2: sky\n")
    assert data.Segmentation(tmp_path / "own", "train", 16).names == ["none", "class 1", "sky"]


def test_a_run_on_coco(coco: Path, weights: Path, tmp_path: Path, capsys):
    run(weights, *flags(tmp_path / "out", "--data", coco, "--batch", 2, "--heads", "linear", "--tasks", "global,local"))
    best = results(tmp_path / "out")["tiny/local-linear-seed-0"]["best"]
    assert {"recall_things", "recall_stuff"} <= best.keys() and best["classes"] in (5, 6)
    assert "--data" in capsys.readouterr().out and (tmp_path / "out" / "picture.png").exists()


def test_faults_of_a_data_set_are_told(coco: Path, weights: Path, tmp_path: Path):
    def told(*what: str) -> None:
        message = fails(weights, *flags(tmp_path / "out", "--data", coco, "--batch", 2, "--workers", 1))
        assert all(part in message for part in what), message

    maps, image = coco / "stuffthingmaps_trainval2017", coco / "val2017" / "000000000009.jpg"
    annotation = maps / "val2017" / "000000000009.png"
    annotation.rename(tmp_path / "kept.png")
    told("val2017/000000000009.png", "missing", "1 of 3")
    write_labels(annotation.parent, {annotation.name: (40, 60)}, [1])
    told("000000000009.png", "40 x 60", "60 x 40")
    write_labels(annotation.parent, {annotation.name: (60, 40)}, [200])
    told("000000000009.png", "class 201", "182")
    Image.new("RGB", (60, 40)).save(annotation)
    told("000000000009.png", "RGB")
    (tmp_path / "kept.png").rename(annotation)
    image.write_bytes(image.read_bytes()[:300])
    told("000000000009.jpg", "cannot be read")
    (coco / "labels.txt").write_text("person\n")
    told("labels.txt", "3: sky")
    (coco / "labels.txt").unlink()
    told("labels.txt", "missing")
    maps.rename(coco / "elsewhere")
    told("holds no train images with label maps", "stuffthingmaps_trainval2017/train2017", "annotations/training")


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    "mistake, told",
    [
        ("--tasks lokal", "lokal"), ("--heads cnn", "transformer, mlp, linear"), ("--interventions none,blind", "blind"),
        ("--interventions cls-only --tasks global", "local"), ("--finetune --tasks leakage", "leakage"),
        ("--save x.safetensors", "--finetune"), ("--finetune --flip", "global"), ("--epochs 0", "--epochs 0"),
        ("--init nothing", "vit.BACKBONES"), ('--init {"width":3}', "width"), ("--init clip-vit-b a.safetensors", "exclude"),
        ("--finetune --save x.safetensors a.safetensors", "one backbone"), ("--show 1,b", "--show"), ("--labels mean", "majority"),
    ],
)  # fmt: skip
def test_mistakes_in_flags_are_usage_errors(mistake: str, told: str, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*mistake.split())
    assert caught.value.code == 2 and told in capsys.readouterr().err


def test_other_mistakes_are_one_sentence(weights: Path, tmp_path: Path, monkeypatch):
    out = tmp_path / "out"
    assert "no such file" in fails(tmp_path / "none.safetensors", *flags(out))
    assert "two backbones are called" in fails(weights, weights, *flags(out))
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    assert "bad.safetensors" in fails(tmp_path / "bad.safetensors", *flags(out))
    assert "its patch_size is 8, not 16" in fails(f"clip-vit-b={weights}", *flags(out))
    assert "--batch 80" in fails(weights, *flags(out, "--batch", 80, "--heads", "linear"))
    assert "--show 10" in fails(weights, *flags(out, "--show", 10, "--heads", "linear", "--tasks", "local"))
    assert "--skip-blocks 3" in fails(weights, *flags(out, "--skip-blocks", 3))
    checkpoint = next(out.glob("*/*/checkpoint.pt"), out / "tiny/local-linear-seed-0/checkpoint.pt")
    checkpoint.write_bytes(b"torn")
    assert "damaged" in fails(weights, *flags(out, "--resume", "--heads", "linear"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "DEMO", (str(weights), probe.DEMO[1]))
    assert "python train_align.py" in fails()
