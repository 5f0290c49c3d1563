"""Benchmarks: `python tests/bench.py align`, or a few of them, `python tests/bench.py align --only data,index`.

Clocks of shared machines wander by tens of percent, so whatever is compared runs in turns within one process, and
what is reported are ratios of medians (`interleave`). Each benchmark is a function that returns lines to print.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import data as pictures  # the name `data` is a benchmark here

THREADS = 2


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleave(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median seconds of each function, all called in turns `repeats` times after one call to warm up."""
    for function in functions.values():
        function()
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return {name: statistics.median(values) for name, values in times.items()}


# ---------------------------------------------------------------------------------------------------------------------
# data.py


def photographs(folder: str, width: int, height: int) -> list[str]:
    """Four JPEG files of quality 90: scikit-learn's two photographs (smooth random pictures where it is not installed),
    each with and without some grain."""
    try:
        from sklearn.datasets import load_sample_images
        originals = load_sample_images().images
    except ImportError:
        originals = [np.random.default_rng(i).integers(0, 256, (48, 64, 3), np.uint8) for i in range(2)]
    files = []
    for original in originals:
        for grain in (0, 2):
            image = np.asarray(Image.fromarray(original).resize((width, height), Image.Resampling.BICUBIC))
            image = image + np.random.default_rng(0).normal(0, grain, (height, width, 1))
            files.append(os.path.join(folder, f"{width}-{len(files)}.jpg"))
            Image.fromarray(image.clip(0, 255).round().astype(np.uint8)).save(files[-1], quality=90)
    return files


def torchvision_pipeline(size: int) -> Callable[[Image.Image], torch.Tensor] | None:
    """RandomResizedCrop, flip and tensor as torchvision has them, where it is installed."""
    try:
        from torchvision import transforms
    except ImportError:
        return None
    steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    return transforms.Compose(steps + [transforms.Normalize([0.5] * 3, [0.5] * 3)])


def data() -> list[str]:
    """From a JPEG file, by the paper's augmentation, to a uint8 tensor, against bare decoding; both in one process."""
    rows = []
    for width, height, draws, repeats, target in ((500, 375, 12, 15, 0.35), (2000, 1500, 6, 5, 1.5)):
        with tempfile.TemporaryDirectory() as folder:
            files = draws * photographs(folder, width, height)
            images = pictures.Images(pictures.ImageFolder(folder), pictures.Augment(224), seed=0)
            functions = {
                "bare": lambda: [Image.open(file).convert("RGB") for file in files],
                "ours": lambda: [images[epoch, i] for epoch in range(draws) for i in range(len(images))],
            }
            if theirs := torchvision_pipeline(224):
                functions["torchvision"] = lambda: [theirs(Image.open(file).convert("RGB")) for file in files]
            rate = {name: len(files) / median for name, median in interleave(functions, repeats).items()}
        row = f"data   {width} x {height}: bare decoding {rate['bare']:.0f} images/s, ours {rate['ours']:.0f}"
        row += f" = {rate['ours'] / rate['bare']:.2f} of it (at least {target})"
        rows.append(row + (f", torchvision {rate['torchvision'] / rate['bare']:.2f}" if theirs else ""))
    scenes = pictures.Scenes(10_000, seed=0)
    rows.append(f"data   scenes with labels: {100 / seconds(lambda: [scenes[i] for i in range(100)]):.0f}/s")
    return rows


def index() -> list[str]:
    """Indexing 200,000 files in 1,000 folders: the first time, the next, and after one file was added."""
    with tempfile.TemporaryDirectory() as root:
        for f in range(1000):
            os.makedirs(os.path.join(root, f"n{f:08d}"))
            for i in range(200):
                os.close(os.open(os.path.join(root, f"n{f:08d}", f"n{f:08d}_{i}.JPEG"), os.O_CREAT))
        time.sleep(2.1)  # a folder that changed within the last 2 seconds is listed again each time
        rows, counts = [], []
        for when in ("first time", "next time", "a file added"):
            if when == "a file added":
                open(os.path.join(root, "n00000500", "new.jpg"), "w").close()
            took = seconds(lambda: counts.append(len(pictures.ImageFolder(root, "train"))))
            rows.append(f"index  {when}: {took:.2f} s, {counts[-1]} files of the training part")
        assert "n00000500/new.jpg" in map(pictures.ImageFolder(root).name, range(100_000, 100_202))
        return rows


# ---------------------------------------------------------------------------------------------------------------------

SUITES: dict[str, list[Callable[[], list[str]]]] = {"align": [data, index]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--only", help="names of benchmarks, separated by commas")
    options = parser.parse_args()
    benchmarks = {function.__name__: function for function in SUITES[options.suite]}
    wanted = options.only.split(",") if options.only else list(benchmarks)
    if unknown := set(wanted) - set(benchmarks):
        parser.error(f"no benchmark {', '.join(unknown)} in {options.suite}: choose from {', '.join(benchmarks)}")
    torch.set_num_threads(THREADS)
    for name in wanted:
        for row in benchmarks[name]():
            print(row, flush=True)


if __name__ == "__main__":
    main()
