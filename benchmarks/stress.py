"""Long kill-and-resume runs: `python benchmarks/stress.py align` or `vlm`, about five minutes each on two cores.

Each of twenty trials starts a run of train_align.py or train_vlm.py, kills it with SIGKILL at random moments (one to
four times, now and then while it saves), resumes it until it ends, and compares every loss and every weight with a run
that was never killed.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import llama
import maskembed
import vit
import vlm
from demo import scenes


def log_of(folder: Path) -> list[str]:
    """The log's lines without the rates, which differ from run to run; none where there is no log yet."""
    path = folder / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return [json.dumps({k: v for k, v in line.items() if not k.endswith("_per_s")}) for line in lines]


def trial(command: list[str], out: Path, chance: random.Random) -> int:
    """Kill and resume until the run ends; returns how often it was killed."""
    kills, planned = 0, chance.randint(1, 4)
    while True:
        resume = ["--resume"] if list((out / "checkpoints").glob("update-*")) else []
        process = subprocess.Popen([*command, *resume], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if kills < planned:
            lines = len(log_of(out)) + chance.randint(0, 12)
            while process.poll() is None and len(log_of(out)) < lines:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.3))
            process.kill()
        _, said = process.communicate()
        if process.returncode == 0:
            return kills
        assert process.returncode == -signal.SIGKILL, said
        kills += 1


def compare(script: str, flags: str, weights: Callable[[Path], dict[str, torch.Tensor]], what: str) -> None:
    """Ten trials against a run that nobody killed."""
    command, chance = [sys.executable, str(ROOT / script), *flags.split()], random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        subprocess.run([*command, "--out", str(whole)], check=True, capture_output=True)
        theirs = weights(whole)
        for i in range(10):
            out = Path(name) / f"killed-{i}"
            kills, ours = trial([*command, "--out", str(out)], out, chance), weights(out)
            same = log_of(out) == log_of(whole) and all(torch.equal(ours[key], theirs[key]) for key in theirs)
            print(f"{what}, trial {i + 1}: killed {kills} times, {'same' if same else 'DIFFERENT'}", flush=True)
            if not same:
                sys.exit(1)


def align(folder: Path) -> None:
    """Ten trials without data workers, and ten with two."""
    torch.manual_seed(0)
    backbone = vit.ViT(vit.ViTConfig(image_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2))
    vit.save(backbone, folder / "vit.safetensors")
    flags = f"--recipe own --weights {folder}/vit.safetensors --data {folder}/scenes/images/train --batch 16 --epochs 4"
    flags += f" --lr 1e-3 --val {folder}/scenes/images/val --save-every 2 --precision fp32 --workers"
    for workers in (0, 2):
        weights = lambda out: maskembed.load(out / "aligned.safetensors").state_dict()  # noqa: E731
        compare("train_align.py", f"{flags} {workers}", weights, f"{workers} data workers")


def train_vlm(folder: Path) -> None:
    """Ten trials as a single process trains, and ten with FSDP; rows with and without images, in micro-batches."""
    torch.manual_seed(0)
    backbone = vit.ViT(vit.ViTConfig(image_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=2))
    maskembed.save(maskembed.make_student(backbone), folder / "aligned.safetensors")
    config = llama.read_config(ROOT / "demo/language")
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    llama.save(llama.Llama(llama.LlamaConfig(vocab_size=config.vocab_size, **sizes)), folder / "llama")
    (folder / "llama/tokenizer.model").write_bytes((ROOT / "demo/language/tokenizer.model").read_bytes())
    rows = json.loads((folder / "scenes/conversations.json").read_text())
    rows += [{"conversations": row["conversations"]} for row in rows[:48]]
    (folder / "rows.json").write_text(json.dumps(rows))
    flags = f"--recipe own --weights {folder}/aligned.safetensors --language {folder}/llama --data {folder}/rows.json"
    flags += f" --images {folder}/scenes --batch 8 --micro-batch 4 --epochs 2 --lr 1e-3 --save-every 2 --precision fp32"
    for what in ("--workers 0", "--workers 1 --fsdp"):
        compare("train_vlm.py", f"{flags} {what}", lambda out: vlm.load(out / "model").state_dict(), what)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=["align", "vlm"])
    suite = parser.parse_args().suite
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        scenes.write(Path(name) / "scenes", count=96, val=16, test=1, seed=0, size=32, workers=0)
        (align if suite == "align" else train_vlm)(Path(name))
