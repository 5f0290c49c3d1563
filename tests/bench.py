"""Benchmarks: `python tests/bench.py align`, or a few of them, `python tests/bench.py align --only data,index`.

Clocks of shared machines wander by tens of percent, so whatever is compared runs in turns within one process, and
what is reported are ratios of medians (`interleave`). Each benchmark is a function that returns lines to print.
"""

import argparse
import contextlib
import copy
import ctypes
import functools
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import data as pictures  # the name `data` is a benchmark here
import probe
import train_align
import vit

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
# Alignment: a whole update, attention, loading


def vit_b16() -> vit.ViTConfig:
    """The plain ViT-B/16 @224."""
    return vit.BACKBONES["in1k-vit-b"]


def our_update(folder: str, precision: str, *flags: str) -> Callable[[], object]:
    """train_align.py's own update of ViT-B/16 @224 on 8 images with 3 views, random weights."""
    weights = os.path.join(folder, "vit-b.safetensors")
    if not os.path.exists(weights):
        torch.manual_seed(0)
        vit.save(vit.ViT(vit_b16()), weights)
    argv = f"--weights {weights} --out {folder} --scenes 8 --batch 8 --precision {precision}".split()
    run = train_align.Run(train_align.parse([*argv, *flags]))
    run.updates = 10**6
    pixels = torch.randint(0, 256, (8, 3, 224, 224), dtype=torch.uint8)
    return lambda: run.train_update([pixels])


def timm_update(precision: str) -> Callable[[], object]:
    """The same update written with timm's modules, as the method's authors have it."""
    import timm
    from timm.models.vision_transformer import Attention, Block

    class Capped(Attention):
        def forward(self, x, *_, **__):
            B, T, D = x.shape
            q, k, v = self.qkv(x).reshape(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            logits = 30 * torch.tanh(q * self.scale @ k.mT / 30)
            return self.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(B, T, D))

    torch.manual_seed(0)
    teacher = timm.create_model("vit_base_patch16_224.augreg_in21k_ft_in1k", num_classes=0)
    encoder = copy.deepcopy(teacher)
    encoder.norm = nn.LayerNorm(768, eps=1e-5)
    for block in encoder.blocks:
        block.attn.__class__ = Capped
    teacher.blocks = teacher.blocks[:-1]
    teacher.eval().requires_grad_(False)
    head, norm = nn.Linear(768, 768), functools.partial(nn.LayerNorm, eps=1e-5)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    blocks = [Block(768, 12, qkv_bias=True, init_values=1e-6, norm_layer=norm) for _ in range(2)]
    decoder = nn.Sequential(*blocks, norm(768), nn.Linear(768, 768))
    positions = nn.Parameter(torch.randn(1, 197, 768) * 0.02)
    parameters = [*encoder.parameters(), *head.parameters(), *decoder.parameters(), positions]
    optimizer = torch.optim.AdamW(parameters, 3e-4, (0.9, 0.95), weight_decay=0.01, fused=True)
    images, u = torch.randn(8, 3, 224, 224), torch.rand(8, 197)
    mask = (u[:, 1:] > u[:, :1]).float()
    mask = torch.stack([mask, 1 - mask, torch.ones_like(mask)], 1)  # [B, V, N]

    def step():
        visible = F.interpolate(mask.view(8, 3, 14, 14), scale_factor=16)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            with torch.no_grad():
                target = teacher.forward_features((images[:, None] * visible[:, :, None]).flatten(0, 1))
            tokens = head(encoder.forward_features(images))
            tokens = (tokens[:, None] * F.pad(mask, (1, 0))[..., None]).flatten(0, 1)
            prediction = decoder(tokens + positions)
            loss = F.mse_loss(prediction.float(), target.float())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def update() -> list[str]:
    """A whole update of ViT-B/16 @224, 8 images, 3 views, 2.01 TFLOP, against the rate of a matrix product."""
    rows = []
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
        with tempfile.TemporaryDirectory() as folder:
            functions = {"product": lambda: [a @ b for _ in range(8)], "ours": our_update(folder, precision)}
            if shutil.which("g++"):
                functions["ours --compile"] = our_update(folder, precision, "--compile")
            if importlib.util.find_spec("timm"):
                functions["timm's modules"] = timm_update(precision)
            median = interleave(functions, 5)
        rate = 8 * 2 * 2048**3 / median.pop("product")
        for name, took in median.items():
            rows.append(f"update {precision}, {name}: {took:.2f} s, {2.01e12 / took / rate:.0%} of the product's rate")
    return rows


def peak_memory() -> int:
    """The most memory this process has had since it was last asked to forget, in bytes."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024


def softcap() -> list[str]:
    """Soft-capped attention, forward and backward, 4 x 729 tokens, 16 heads of 72, float32, against its definition."""
    q, k, v = (torch.randn(4, 16, 729, 72, requires_grad=True) for _ in range(3))
    gradient = torch.randn(4, 16, 729, 72)
    ways = {"definition": vit.softcap_attention_plain, "ours": vit.attention, "uncapped, fused": vit.attention}
    functions, memory = {}, {}
    for name, way in ways.items():
        cap = None if name.startswith("uncapped") else 30.0
        functions[name] = lambda way=way, cap=cap: torch.autograd.grad(way(q, k, v, cap), (q, k, v), gradient)
        functions[name]()
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left free is not held
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here
        before = peak_memory()
        functions[name]()
        memory[name] = (peak_memory() - before) / 2**20
    median = interleave(functions, 7)
    return [
        f"softcap {name}: {took * 1e3:.0f} ms, {took / median['definition']:.2f} of the definition's time; "
        f"{memory[name]:.0f} MiB, {memory[name] / memory['definition']:.2f} of its memory"
        for name, took in median.items()
    ]


# Each runs in a process of its own, so that the peak is its own.
WRITE_SO400M = """
import sys, torch, vit
with torch.device("meta"):
    model = vit.ViT(vit.BACKBONES["siglip-so400m-384"])
model.to_empty(device="cpu")
with torch.no_grad():
    for parameter in model.parameters():
        parameter.uniform_(-0.05, 0.05)
vit.save_tensors(model.state_dict(), sys.argv[1], {})
"""
LOAD_SO400M = """
import sys, time, torch, vit
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
torch.ones(256, 256) @ torch.ones(256, 256)  # the matrix library is there before the count begins
before, start = peak(), time.perf_counter()
model = vit.load(sys.argv[1], "siglip-so400m-384")
print(peak() - before, time.perf_counter() - start)
"""


def load() -> list[str]:
    """vit.load of SigLIP SO400M @384 in timm's layout (random weights): peak memory over the file's size, seconds."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(THREADS)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "so400m.safetensors"
        subprocess.run([sys.executable, "-c", WRITE_SO400M, path], env=environment, check=True)
        size = path.stat().st_size
        command = [sys.executable, "-c", LOAD_SO400M, path]
        runs = [subprocess.run(command, env=environment, check=True, capture_output=True).stdout.split() for _ in range(3)]
    memory, took = max(float(run[0]) for run in runs), statistics.median(float(run[1]) for run in runs)
    return [f"load   file of {size / 1e9:.2f} GB: peak {memory / size:.3f} x the file, {took:.1f} s from the page cache"]


# ---------------------------------------------------------------------------------------------------------------------
# Probing: labels, metrics, cached features


def labels() -> list[str]:
    """Union labels of one image: 336 pixels, patches of 14, 183 classes; against torch.unique for each patch."""
    coarse = np.random.default_rng(0).integers(0, 183, (24, 24))
    maps = np.kron(coarse, np.ones((14, 14), np.uint8)).astype(np.uint8)[None, :, ::-1].copy()
    maps[:, ::3] = 7

    def patch_by_patch() -> torch.Tensor:
        patches, there = torch.from_numpy(maps[0]).unfold(0, 14, 14).unfold(1, 14, 14).flatten(2).flatten(0, 1), torch.zeros(576, 183)
        for n, pixels in enumerate(patches):
            there[n, pixels.unique().long()] = 1
        there[:, 0] *= there[:, 1:].sum(1) == 0
        return there

    assert np.array_equal(pictures.union(maps, 14, 183), patch_by_patch().bool().numpy())
    median = interleave({"ours": lambda: pictures.union(maps, 14, 183), "loop": patch_by_patch}, 15)
    return [f"labels union of 336 pixels, 183 classes: {1e3 * median['ours']:.2f} ms, torch.unique for each patch "
            f"{1e3 * median['loop']:.1f} ms = {median['loop'] / median['ours']:.0f} times that (at least 30)"]


def metrics() -> list[str]:
    """Tally and metrics of a batch of 32 x 576 x 183, against a loop over classes."""
    logits, targets = torch.randn(32, 576, 183), torch.rand(32, 576, 183) < 0.02

    def class_by_class() -> list[tuple[float, ...]]:
        rows = []
        for c in range(183):
            said, true = logits[..., c] > 0, targets[..., c]
            found, false, missed = (said & true).sum(), (said & ~true).sum(), (~said & true).sum()
            right, size = (said == true).float().mean(), (true.sum(1) * 10 + 575) // 576  # the bin of each image's object
            by_size = [torch.bincount(size, x.sum(1).float(), minlength=11) for x in (said & true, true)]
            rows.append((found / (found + missed), right, found / (found + false), 2 * found / (2 * found + false + missed), *by_size))
        return rows

    ours = lambda: probe.metrics(probe.tally(logits, targets), 576)
    rows = torch.tensor([row[:4] for row in class_by_class()])
    for i, name in enumerate(("recall", "accuracy", "precision", "f1")):
        assert abs(ours()[name] - rows[:, i].mean().item()) < 1e-5
    median = interleave({"ours": ours, "loop": class_by_class}, 9)
    return [f"metrics of 32 x 576 x 183: {1e3 * median['ours']:.1f} ms, a loop over classes {1e3 * median['loop']:.0f} ms = "
            f"{median['loop'] / median['ours']:.0f} times that (at least 20)"]


def cache() -> list[str]:
    """5 epochs of probes of a ViT-S with 65 tokens, features made once or for each batch."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as silence:
        config = vit.ViTConfig(image_size=64, patch_size=8, embed_dim=384, depth=12, num_heads=6)
        vit.save(vit.ViT(config), os.path.join(folder, "backbone.safetensors"))

        def train(head: str, *flags: str) -> None:
            out = tempfile.mkdtemp(dir=folder)
            with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
                probe.main([os.path.join(folder, "backbone.safetensors"), *f"--tasks local --heads {head} --scenes 256 --val-images 32 --workers 0 --out {out}".split(), *flags])

        train("linear", "--epochs", "1")  # warms up
        for head in ("linear", "transformer"):
            took = {name: seconds(lambda: train(head, *flags)) for name, flags in (("kept", ()), ("anew", ("--no-cache",)))}
            rows.append(f"cache  5 epochs, {head} head: {took['kept']:.1f} s with features kept, {took['anew']:.1f} s without = "
                        f"{took['anew'] / took['kept']:.1f} times that (at least 3)")
    return rows


# ---------------------------------------------------------------------------------------------------------------------

SUITES: dict[str, list[Callable[[], list[str]]]] = {
    "align": [softcap, update, load, data, index],
    "probe": [labels, metrics, cache],
}


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
