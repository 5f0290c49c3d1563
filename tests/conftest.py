"""What the tests share: the path to the project, a tiny backbone, a folder of scenes, and a launcher of commands."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
torch.set_num_threads(1)  # as in the processes that `launch` starts: the same roundings, and no waiting for each other
TINY = dict(image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, crop_pct=1.0)


def launch(script: str, *argv: object, ranks: int = 0, **how: object) -> subprocess.Popen:
    """A command in a process of its own, or in `ranks` processes under torchrun."""
    launcher = [sys.executable]
    if ranks:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | how.pop("env", {})
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | how
    return subprocess.Popen([*launcher, str(ROOT / script), *map(str, argv)], env=environment, **how)


def refusal(function: Callable, *args: object, **how: object) -> str:
    """The sentence with which a call is refused."""
    with pytest.raises((ValueError, OSError)) as caught:
        function(*args, **how)
    message = str(caught.value)
    assert "\n" not in message
    return message


def log_of(out: Path) -> list[dict]:
    """The lines of a run's log.jsonl."""
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path, key: str = "loss") -> list[float]:
    """A value of each line that has it."""
    return [line[key] for line in log_of(out) if key in line]


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The difference, relative to the norm."""
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch) -> None:
    """Each test runs in a folder of its own, whatever lies in runs/."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory) -> Path:
    """A file with a tiny backbone of ordinary random weights."""
    import vit

    torch.manual_seed(0)
    model = vit.ViT(vit.ViTConfig(**TINY))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    vit.save(model, path)
    return path


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """A small folder of scenes: 48 to train on, 24 to validate on, 12 to ask about, of 32 pixels."""
    from demo import scenes

    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    scenes.write(folder, count=48, val=24, test=12, seed=0, size=32, workers=0)
    return folder
