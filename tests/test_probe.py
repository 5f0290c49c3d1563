"""probe.py: heads and metrics against the reference, training written out, whole runs, two processes, refusals."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, launch, refusal
from safetensors import safe_open

import data
import probe
import vit

CONFIG = vit.ViTConfig(**TINY)


def tiny(path: Path, seed: int = 0, **changes) -> Path:
    """A file with a tiny backbone of ordinary random weights."""
    torch.manual_seed(seed)
    model = vit.ViT(replace(CONFIG, **changes))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    vit.save(model, path)
    return path


def flags(folder: Path, out: Path, *more: object) -> list[str]:
    """12 updates on the scenes, on one core."""
    common = "--val-images 10 --batch 8 --epochs 2 --workers 0 --precision fp32"
    return ["--data", str(folder), "--out", str(out), *common.split(), *map(str, more)]


def measure(*argv: object) -> None:
    probe.main([str(a) for a in argv])


def results(out: Path) -> dict[str, dict]:
    """"backbone/probe" -> result.json."""
    return {str(path.parent.relative_to(out)): json.loads(path.read_text()) for path in out.glob("*/*/result.json")}


def learned(out: Path) -> dict[str, list]:
    """What must not depend on the machine."""
    return {name: [x.get(key) for key in ("epochs", "best", "maps")] for name, x in sorted(results(out).items())}


def numbers(value: object) -> list:
    """All numbers of nested lists and dicts, None as -1."""
    if isinstance(value, (list, dict)):
        return [n for part in (value if isinstance(value, list) else value.values()) for n in numbers(part)]
    return [-1 if value is None else value]


def test_metrics_are_the_references():
    file = safe_open(ROOT / "tests/data/probe/patchseg.safetensors", "pt")
    facts, tensor = json.loads(file.metadata()["fixture"]), file.get_tensor
    local = probe.tally(tensor("metric.logits"), tensor("metric.union_targets").flatten(1, 2).bool())
    whole = probe.tally(tensor("metric.global_logits")[:, 0], tensor("metric.global_targets").bool())
    for name, values in (("union", probe.metrics(local, 25)), ("global", probe.metrics(whole, 1))):
        for metric, expected in facts["metrics"][name].items():
            ours = metric if metric.endswith("accuracy") else metric.removeprefix("macro_")
            assert values[ours] == pytest.approx(expected, abs=1e-6), (name, metric)
    for metric in ("class_recall", "recall_by_size"):
        ours = np.array(probe.metrics(local, 25)[metric], float)
        np.testing.assert_allclose(ours, tensor(f"metric.{metric}").numpy(), atol=1e-6, equal_nan=True)


def test_tally_and_metrics_by_definition():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 9, 5), torch.randint(0, 4, (6, 9))  # class 4 never occurs
    counts, predicted = probe.tally(logits, targets), logits.argmax(-1)
    for c in range(5):
        assert counts[0, :, c].tolist() == ((predicted == c) & (targets == c)).sum(1).tolist()
        assert counts[1, :, c].tolist() == (predicted == c).sum(1).tolist()
    values = probe.metrics(counts, 9)
    assert values["classes"] == 4 and values["class_recall"][4] is None
    recalls = [((predicted == c) & (targets == c)).sum().item() / (targets == c).sum().item() for c in range(4)]
    assert values["recall"] == pytest.approx(np.mean(recalls))
    silent = probe.metrics(probe.tally(torch.full((2, 3), -1.0), torch.ones(2, 3, dtype=torch.bool)), 1)
    assert silent["never_predicted"] == 3 and silent["precision"] is None and silent["recall"] == 0


@pytest.mark.parametrize("prefix", [dict(registers=2), dict(class_token=False)], ids=("registers", "no class token"))
@pytest.mark.parametrize("head", probe.HEADS)
def test_heads_read_what_they_should(head: str, prefix: dict):
    config = replace(CONFIG, **prefix)
    P, N = config.num_prefix, config.num_patches
    tokens = torch.randn(2, P + N, 32)
    local, whole = (probe.make_head(task, head, "none", config, 7) for task in ("local", "global"))
    with torch.no_grad():
        assert local(tokens).shape == (2, N, 7) and whole(tokens).shape == (2, 7)
        if head == "transformer":
            assert (local(tokens) - local(tokens.flip(1)).flip(1)).abs().max() > 1e-4  # it knows positions
        else:  # each patch by itself; the image by its mean prefix token, or mean token
            other = tokens.clone()
            other[:, P] += 1
            assert torch.equal(local(other)[:, 1:], local(tokens)[:, 1:])
            assert torch.allclose(whole(tokens), whole.layers((tokens[:, :P] if P else tokens).mean(1)), atol=1e-6)


@pytest.mark.parametrize("class_token", [True, False])
def test_interventions_hide_places(class_token: bool):
    config = replace(CONFIG, class_token=class_token)
    tokens = torch.randn(2, config.num_prefix + 16, 32)
    shuffled = torch.cat([tokens[:, : config.num_prefix], tokens[:, config.num_prefix :][:, torch.randperm(16)]], 1)
    changed = torch.cat([tokens[:, :1], torch.randn_like(tokens[:, 1:])], 1)
    with torch.no_grad():
        for intervention in ("cls-only", "anonymous"):
            head = probe.make_head("local", "transformer", intervention, config, 7)
            assert torch.allclose(head(tokens), head(shuffled), atol=1e-6)  # places are not told
            assert (head(tokens)[:, 0] - head(tokens)[:, 1]).abs().max() > 1e-4  # but its answers have places
            blind = intervention == "cls-only" and class_token
            assert torch.equal(head(tokens), head(changed)) == blind


def test_the_transformer_head_is_the_papers():
    config = vit.BACKBONES["eva02-vit-b"]
    head = probe.make_head("local", "transformer", "none", config, 183)
    assert head.positions.shape == (1, 197, 768) and 0.019 < head.positions.std() < 0.021
    assert len(head.blocks) == 2 and head.blocks[0].attn.qkv.bias is None and head.blocks[0].attn.num_heads == 12
    assert head.blocks[1].ls2.gamma.eq(0.01).all() and head.blocks[0].mlp.fc1.out_features == 4 * 768
    assert probe.make_head("local", "mlp", "none", config, 183).layers[0].out_features == 1024


def test_learning_rate():
    """1e-3 to 1e-4 by cosine over all updates, the first 500 or a tenth of them rising inside it."""
    rates = [probe.learning_rate(u, 10000, 1e-3) for u in range(10001)]
    assert rates[0] == pytest.approx(1e-3 / 501) and rates[10000] == pytest.approx(1e-4)
    assert rates[500] == pytest.approx(1e-4 + 9e-4 * (1 + np.cos(np.pi / 20)) / 2) and np.argmax(rates) == 500
    assert np.argmax([probe.learning_rate(u, 100, 1e-3) for u in range(100)]) == 10


@pytest.mark.parametrize("task, labels", [("local", "union"), ("local", "majority"), ("global", "union")])
def test_training_written_out(task: str, labels: str, tiny_weights: Path, scenes: Path, tmp_path: Path):
    """A linear probe's logged losses, from the pictures and label maps on."""
    choice = ("--tasks", task, "--heads", "linear", "--labels", labels, "--seed", 3)
    measure(tiny_weights, *flags(scenes, tmp_path, *choice))
    lines = (tmp_path / f"tiny/{task}-linear-seed-3/log.jsonl").read_text().splitlines()
    logged = [line["loss"] for line in map(json.loads, lines) if "epoch" not in line]

    source, backbone = data.Segmentation(scenes, "train", 32), vit.load(tiny_weights)
    items = [source[i] for i in range(48)]
    pixels = torch.stack([data.to_tensor(item.image) for item in items])
    function = data.majority if labels == "majority" else data.union
    per_image = [data.global_union(x.labels, 19) if task == "global" else function(x.labels, 8, 19) for x in items]
    truth = torch.from_numpy(np.stack(per_image))
    with torch.no_grad():
        tokens = backbone(vit.normalize(pixels, CONFIG)).bfloat16().float()
    torch.manual_seed(3)
    head, losses = torch.nn.Linear(32, 19), []
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=0.01)
    for epoch in range(2):
        order = torch.randperm(48, generator=torch.Generator().manual_seed(3000 + epoch))
        for chosen in order.split(8):
            rate = 1e-4 + 9e-4 * (1 + math.cos(math.pi * len(losses) / 12)) / 2
            optimizer.param_groups[0]["lr"] = rate * min(1, (len(losses) + 1) / 2)  # a tenth of 12 updates: 1
            logits = head(tokens[chosen, 0] if task == "global" else tokens[chosen, 1:])
            if labels == "majority":
                loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), truth[chosen].long())
            else:
                loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth[chosen].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert logged == pytest.approx(losses, rel=1e-5)


def test_a_run_from_start_to_end(tiny_weights: Path, scenes: Path, tmp_path: Path, capsys):
    """Two backbones, three tasks, two seeds; then again with --resume and more to measure."""
    out, backbones = tmp_path / "out", (tiny_weights, tiny(tmp_path / "other.safetensors", 1, class_token=False))
    measure(*backbones, *flags(scenes, out, "--tasks", "local,global,leakage", "--seeds", 2, "--show", "3,4"))
    printed = capsys.readouterr().out
    assert "| macro recall, % | local, transformer | global, transformer | leakage |" in printed and "±" in printed
    made = results(out)
    assert len(made) == 2 * (2 + 2 + 1)
    local = made["tiny/local-transformer-seed-1"]
    assert [epoch["epoch"] for epoch in local["epochs"]] == [1, 2] and np.shape(local["maps"]) == (2, 16)
    assert {"loss", "recall", "accuracy", "precision", "f1", "recall_shapes", "recall_colors"} <= local["best"].keys()
    assert local["best"]["recall"] == max(epoch["recall"] for epoch in local["epochs"])
    assert len(local["best"]["class_recall"]) == 19 and len(local["best"]["recall_by_size"]) == 10
    assert np.max(local["maps"]) <= 10  # the picture shows shapes
    assert {path.name for path in out.glob("*.*")} == {"results.json", "results.md", "picture.png", "scatter.png"}
    report = (out / "results.md").read_text()
    assert "| 0-10% |" in report and " tiny | other | gain |" in report and "never predicted" in report
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*/result.json")}
    with pytest.raises(ValueError, match="--resume"):
        measure(*backbones, *flags(scenes, out))
    with pytest.raises(ValueError, match="another lr"):
        measure(*backbones, *flags(scenes, out, "--resume", "--lr", 0.01))
    measure(*backbones, *flags(scenes, out, "--resume", "--heads", "linear,transformer"))
    assert len(results(out)) == 10 + 4 and before == {path: path.stat().st_mtime_ns for path in before}


def test_each_choice(scenes: Path, tmp_path: Path, monkeypatch):
    weights = tiny(tmp_path / "b.safetensors", registers=1)
    choice = "--heads transformer,mlp --interventions none,cls-only,anonymous --skip-blocks 1 --precision bf16"
    monkeypatch.setattr("demo.scenes.ensure", lambda: scenes)  # the demo's data
    argv = flags(scenes, tmp_path / "out", *choice.split())[2:]
    measure(weights, *argv)
    made = results(tmp_path / "out")
    assert len(made) == 6 and all(math.isfinite(result["best"]["loss"]) for result in made.values())


def test_kept_and_recomputed_features_train_alike(tiny_weights, scenes, tmp_path: Path, monkeypatch, capsys):
    measure(tiny_weights, *flags(scenes, tmp_path / "kept", "--heads", "linear"))
    assert "kept in memory" in capsys.readouterr().err
    measure(tiny_weights, *flags(scenes, tmp_path / "anew", "--heads", "linear", "--no-cache", "--workers", 1))
    monkeypatch.setattr(probe, "free_memory", lambda: 100.0)
    measure(tiny_weights, *flags(scenes, tmp_path / "full", "--heads", "linear"))
    assert "made anew" in capsys.readouterr().err and learned(tmp_path / "full") == learned(tmp_path / "anew")
    assert numbers(learned(tmp_path / "kept")) == pytest.approx(numbers(learned(tmp_path / "anew")), rel=1e-4)


def test_two_processes_and_an_interrupted_run_make_the_same(tiny_weights, scenes, tmp_path: Path, monkeypatch):
    choice = ("--tasks", "local,global,leakage", "--epochs", 1)
    two = launch("probe.py", tiny_weights, *flags(scenes, tmp_path / "two", *choice), ranks=2)
    measure(tiny_weights, *flags(scenes, tmp_path / "one", *choice))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        evaluate = probe.evaluate  # Ctrl-C arrives during the second probe

        def interrupted(head, task, *more):
            if task == "global":
                raise KeyboardInterrupt
            return evaluate(head, task, *more)

        patch.setattr(probe, "evaluate", interrupted)
        measure(tiny_weights, *flags(scenes, tmp_path / "cut", *choice))
    assert len(results(tmp_path / "cut")) == 1
    measure(tiny_weights, *flags(scenes, tmp_path / "cut", *choice, "--resume"))
    assert learned(tmp_path / "cut") == learned(tmp_path / "one")
    printed, errors = two.communicate()
    assert two.returncode == 0, errors
    assert printed.count("| tiny |") == 1
    one, other = learned(tmp_path / "one"), learned(tmp_path / "two")
    assert one.keys() == other.keys() and numbers(one) == pytest.approx(numbers(other), rel=1e-4)


def leakage(path: Path, scenes: Path, out: Path) -> dict:
    measure(path, *flags(scenes, out, "--tasks", "leakage"))
    return results(out)[f"{path.stem}/leakage-seed-0"]["best"]


def test_leakage_is_zero_without_attention_and_one_without_places(scenes: Path, tmp_path: Path):
    alone = leakage(tiny(tmp_path / "alone.safetensors", depth=0), scenes, tmp_path / "a")
    assert alone["leakage"] == alone["leakage_near"] == alone["leakage_far"] == 0
    usual = leakage(tiny(tmp_path / "usual.safetensors"), scenes, tmp_path / "b")
    assert 0 < usual["leakage"] < 1 and min(usual["leakage_near"], usual["leakage_far"]) <= usual["leakage"]
    model = vit.load(tmp_path / "usual.safetensors")
    for block in model.blocks:  # each token becomes the mean of all: all change alike
        block.attn.qkv.weight.data[:64] = 0
        block.attn.qkv.bias.data[:64] = 0
        block.attn.proj.weight.data *= 1e4
        block.mlp.fc2.weight.data *= 0
    vit.save(model, tmp_path / "mixed.safetensors")
    mixed = leakage(tmp_path / "mixed.safetensors", scenes, tmp_path / "c")
    assert mixed["leakage"] == pytest.approx(1, abs=0.01)


def test_cells_and_names_of_tables():
    assert probe.named(["clip-vit-b=x/m.bin", "a.pth"]) == {"m": ("x/m.bin", "clip-vit-b"), "a": ("a.pth", None)}
    assert list(probe.named(["x/a.safetensors", "y/a.safetensors"])) == ["x-a", "y-a"]
    assert probe.text_of("recall", np.array([0.1, 0.2, 0.3]), np.array([0.1])) == "20.00 ± 5.77 (+10.00)"
    assert probe.text_of("leakage", np.array([0.5])) == "0.5000" and probe.text_of("recall", np.array([np.nan])) == "-"


def test_trend_line(tmp_path: Path):
    names, scores = ["b0", "b1", "b2"], {}
    for name, x, above in zip(names, (0.3, 0.4, 0.5), (0, 0.03, 0)):
        scores[name, "global"], scores[name, "local"] = {"recall": np.array([x])}, {"recall": np.array([x + above])}
    found = probe.scatter(scores, names, ["local", "global"], tmp_path)
    assert found == pytest.approx({"b0": -1, "b1": 2, "b2": -1})
    assert (tmp_path / "scatter.png").exists()

@pytest.mark.parametrize(
    "mistake, told",
    [
        ("--tasks lokal", "lokal"),
        ("--interventions cls-only --tasks global", "local"),
        ("--epochs 0", "--epochs: 0 must be at least 1"),
        ("--show 1,b", "--show 1,b: give numbers"),
        ("--labels mean", "invalid choice: 'mean'"),
    ],
)
def test_mistakes_in_flags_are_usage_errors(mistake: str, told: str, capsys):
    with pytest.raises(SystemExit) as caught:
        measure(*mistake.split())
    assert caught.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize(
    "files, more, told",
    [
        ("none.safetensors", "", "none.safetensors"),
        ("TINY TINY", "", "two backbones are called"),
        ("clip-vit-b=TINY", "", "its patch_size is 8, not 16"),
        ("TINY", "--batch 80", "--batch 80"),
        ("TINY", "--show 10", "--show 10"),
        ("TINY", "--skip-blocks 3", "--skip-blocks 3"),
        ("", "", "python train_align.py"),
    ],
)
def test_other_mistakes_are_one_sentence(files: str, more: str, told: str, tiny_weights, scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backbones = files.replace("TINY", str(tiny_weights)).split()
    assert told in refusal(measure, *backbones, *flags(scenes, tmp_path / "out", *more.split()))
