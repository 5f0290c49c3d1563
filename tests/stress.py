"""Long kill-and-resume runs: `python tests/stress.py align` or `vlm` (about five minutes each on two cores).

Each trial starts a run of train_align.py or train_vlm.py, kills it with SIGKILL at random moments (one to four times, now
and then while it is saving), resumes it until it ends, and compares every loss and every weight with a run that was
never killed.
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
import data
import llama
import maskembed
import train_vlm
import vit
import vlm as vision_language


def losses(folder: Path) -> list[str]:
    """The log's lines, without the rates, which clocks make differ."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [json.dumps({k: v for k, v in line.items() if not k.endswith("_per_s")}) for line in lines]


def trial(command: list[str], out: Path, chance: random.Random) -> int:
    """Kill and resume until the run ends; returns how often it was killed."""
    kills, planned = 0, chance.randint(1, 4)
    while True:
        resume = ["--resume"] if list((out / "checkpoints").glob("update-*")) else []
        popen = subprocess.Popen([*command, *resume], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if kills < planned:
            lines = len(written(out)) + chance.randint(0, 12)
            while popen.poll() is None and len(written(out)) < lines:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.3))
            popen.kill()
        _, printed = popen.communicate()
        if popen.returncode == 0:
            return kills
        assert popen.returncode == -signal.SIGKILL, printed
        kills += 1


def written(folder: Path) -> list[str]:
    """The lines of a log that may not be there yet."""
    return (folder / "log.jsonl").read_text().splitlines() if (folder / "log.jsonl").exists() else []


def compare(command: list[str], weights: Callable[[Path], dict[str, torch.Tensor]], what: str, chance: random.Random) -> None:
    """Ten trials of a command, which gets its --out here, against a whole run."""
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        subprocess.run([*command, "--out", str(whole)], check=True, capture_output=True)
        expected, theirs = losses(whole), weights(whole)
        for i in range(10):
            out = Path(name) / f"killed-{i}"
            kills, ours = trial([*command, "--out", str(out)], out, chance), weights(out)
            same = losses(out) == expected and all(torch.equal(ours[key], theirs[key]) for key in theirs)
            print(f"{what}, trial {i + 1}: killed {kills} times, {'same' if same else 'DIFFERENT'}", flush=True)
            if not same:
                sys.exit(1)


def command(script: str, flags: str) -> list[str]:
    return [sys.executable, str(ROOT / script), *flags.split()]


def align() -> None:
    """Ten trials with no data process, and ten with two."""
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        tiny = Path(name) / "tiny.safetensors"
        torch.manual_seed(0)
        vit.save(vit.ViT(vit.ViTConfig(image_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2)), tiny)
        flags = f"--weights {tiny} --scenes 96 --batch 16 --epochs 4 --lr 1e-3 --val-images 16 --log-every 1"
        flags += " --save-every 2 --precision fp32 --workers"
        for workers in (0, 2):
            weights = lambda out: maskembed.load(out / "aligned.safetensors").state_dict()
            compare(command("train_align.py", f"{flags} {workers}"), weights, f"{workers} data processes", chance)


def vlm() -> None:
    """Ten trials as a single process does it, and ten with FSDP; images and texts mixed, in micro-batches."""
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), []
        torch.manual_seed(0)
        backbone = vit.ViT(vit.ViTConfig(image_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=2))
        maskembed.save(maskembed.make_student(backbone), folder / "aligned.safetensors")
        config = llama.LlamaConfig(640, 64, 128, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=512)
        llama.save(llama.Llama(config), folder / "llama")
        train_vlm.train_tokenizer(folder / "llama" / "tokenizer.model")
        scenes = data.Scenes(24, 0, 32)
        for i in range(24):
            scenes[i].image.save(folder / scenes.name(i))
            rows += scenes[i].conversations[:5]
        rows += [{"conversations": row["conversations"]} for row in rows[:60]]
        (folder / "rows.json").write_text(json.dumps(rows))
        flags = f"--recipe own --weights {folder / 'aligned.safetensors'} --language {folder / 'llama'} --batch 8 --lr 1e-3"
        flags += f" --data {folder / 'rows.json'} --micro-batch 4 --log-every 1 --save-every 2 --precision fp32"
        for what in ("--workers 0", "--workers 1 --fsdp"):
            weights = lambda out: vision_language.load(out / "model").state_dict()
            compare(command("train_vlm.py", f"{flags} {what}"), weights, what, chance)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=["align", "vlm"])
    os.environ["OMP_NUM_THREADS"] = "1"
    globals()[parser.parse_args().suite]()
