"""Long kill-and-resume runs: `python tests/stress.py align` (about five minutes on two cores).

Each trial starts a run of train_align.py, kills it with SIGKILL at random moments (one to four times, now and then while
it is saving), resumes it until it ends, and compares every loss and every weight with a run that was never killed.
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
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import maskembed
import train_align
import vit


def command(folder: Path, name: str, workers: int, *more: str) -> list[str]:
    flags = f"--weights {folder / 'tiny.safetensors'} --out {folder / name} --scenes 96 --batch 16 --epochs 4 --lr 1e-3"
    flags += f" --val-images 16 --log-every 1 --save-every 2 --precision fp32 --workers {workers}"
    return [sys.executable, str(ROOT / "train_align.py"), *flags.split(), *more]


def losses(folder: Path) -> list[str]:
    """The log's lines, without the rates, which clocks make differ."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [json.dumps({k: v for k, v in line.items() if k != "images_per_s"}) for line in lines]


def trial(folder: Path, name: str, workers: int, chance: random.Random) -> int:
    """Kill and resume until the run ends; returns how often it was killed."""
    kills, planned = 0, chance.randint(1, 4)
    while True:
        resume = ["--resume"] if train_align.checkpoints(folder / name / "checkpoints") else []
        argv = command(folder, name, workers, *resume)
        popen = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if kills < planned:
            lines = len(written(folder / name)) + chance.randint(0, 12)
            while popen.poll() is None and len(written(folder / name)) < lines:
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


def align() -> None:
    """Ten trials with no data process, and ten with two."""
    os.environ["OMP_NUM_THREADS"] = "1"
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        vit.save(
            vit.ViT(vit.ViTConfig(image_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2)),
            folder / "tiny.safetensors",
        )
        for workers in (0, 2):
            subprocess.run(command(folder, f"whole-{workers}", workers), check=True, capture_output=True)
            expected = losses(folder / f"whole-{workers}")
            weights = maskembed.load(folder / f"whole-{workers}" / "aligned.safetensors").state_dict()
            for i in range(10):
                name = f"killed-{workers}-{i}"
                kills = trial(folder, name, workers, chance)
                ours = maskembed.load(folder / name / "aligned.safetensors").state_dict()
                same = losses(folder / name) == expected and all(torch.equal(ours[k], weights[k]) for k in weights)
                print(
                    f"{workers} data processes, trial {i + 1}: killed {kills} times, {'same' if same else 'DIFFERENT'}",
                    flush=True,
                )
                if not same:
                    sys.exit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=["align"])
    globals()[parser.parse_args().suite]()
