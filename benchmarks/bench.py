"""What the code costs, as ratios within one run: `python benchmarks/bench.py`, or parts of it: `... update load`.

Clocks of shared machines wander by tens of percent, so whatever is compared runs in turns within one process, and what
is printed are ratios of medians. Each benchmark is a function that returns lines. bf16 is left out on processors that
only emulate it.
"""

import argparse
import copy
import functools
import importlib.util
import json
import os
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
import data
import llama
import maskembed
import masks
import run
import vit
import vlm


def interleave(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median seconds of each function, all called in turns after one call to warm up; on a GPU until it is idle."""
    times = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


# --- alignment --------------------------------------------------------------------------------------------------------

def our_update(
    config: vit.ViTConfig, images: int, bf16: bool, device: str, compiled: bool = False
) -> Callable[[], object]:
    """An update as in train_align.py: `images` images, 3 views, random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        teacher = vit.ViT(config).requires_grad_(False)
        student = maskembed.make_student(teacher)
    if bf16:
        vit.round_linear_weights(teacher)
    for block in [b for b in [*teacher.modules(), *student.modules()] if isinstance(b, vit.Block) and compiled]:
        block.compile(dynamic=False)
    optimizer = torch.optim.AdamW(student.parameters(), 3e-4, (0.9, 0.95), weight_decay=0.01, fused=True)
    x = torch.randn(images, 3, config.image_size, config.image_size, device=device)

    def update() -> None:
        m = masks.views(masks.uniform(images, config.num_patches)).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            target = maskembed.teacher_targets(teacher, x, m)
            loss = maskembed.reconstruction_loss(student(x, m), target, m)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def timm_update(config: vit.ViTConfig, images: int, bf16: bool, device: str) -> Callable[[], object]:
    """The same update written with timm's modules, as the method's authors have it; the cap is the plain formula."""
    from timm.models.vision_transformer import Attention, Block, VisionTransformer

    class Capped(Attention):
        def forward(self, x, *_, **__):
            B, T, D = x.shape
            q, k, v = self.qkv(x).reshape(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            logits = 30 * torch.tanh(q * self.scale @ k.mT / 30)
            return self.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(B, T, D))

    torch.manual_seed(0)
    D, norm = config.embed_dim, functools.partial(nn.LayerNorm, eps=1e-5)
    sizes = dict(img_size=config.image_size, patch_size=config.patch_size, embed_dim=D, depth=config.depth)
    with torch.device(device):
        teacher = VisionTransformer(**sizes, num_heads=config.num_heads, num_classes=0)
        encoder, head = copy.deepcopy(teacher), nn.Linear(D, D)
        encoder.norm = norm(D)
        blocks = [Block(D, config.num_heads, qkv_bias=True, init_values=1e-6, norm_layer=norm) for _ in range(2)]
        decoder = nn.Sequential(*blocks, norm(D), nn.Linear(D, D))
        positions = nn.Parameter(torch.randn(1, config.num_patches + 1, D) * 0.02)
    for block in encoder.blocks:
        block.attn.__class__ = Capped
    teacher.blocks = teacher.blocks[:-1]
    teacher.eval().requires_grad_(False)
    parameters = [*encoder.parameters(), *head.parameters(), *decoder.parameters(), positions]
    optimizer = torch.optim.AdamW(parameters, 3e-4, (0.9, 0.95), weight_decay=0.01, fused=True)
    x, g = torch.randn(images, 3, config.image_size, config.image_size, device=device), config.grid

    def update() -> None:
        m = masks.views(masks.uniform(images, g * g)).view(images, 3, -1).to(device)
        visible = F.interpolate(m.view(images, 3, g, g), scale_factor=config.patch_size)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                target = teacher.forward_features((x[:, None] * visible[:, :, None]).flatten(0, 1))
            tokens = head(encoder.forward_features(x))
            prediction = decoder((tokens[:, None] * F.pad(m, (1, 0))[..., None]).flatten(0, 1) + positions)
            loss = F.mse_loss(prediction.float(), target.float())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def update_flop(config: vit.ViTConfig) -> float:
    """Floating-point operations of an image's share of an update: 3 views of the teacher forward, the encoder and 3
    views of a decoder of 2 blocks forward and backward."""
    D, T = config.embed_dim, config.num_patches + config.num_prefix
    block = 2 * T * D * (4 * D + 2 * D * config.mlp_ratio) + 4 * T * T * D
    return block * (3 * (config.depth - 1) + 3 * config.depth + 3 * 3 * 2)


def compare_updates(
    config: vit.ViTConfig, images: int, bf16: bool, device: str, product: int, repeats: int
) -> list[str]:
    """Our update, eager and compiled, and timm's where it is installed, against the rate of a matrix product."""
    dtype, flop = torch.bfloat16 if bf16 else torch.float32, images * update_flop(config)
    a, b = (torch.randn(product, product, device=device).to(dtype) for _ in range(2))
    functions = {"product": lambda: [a @ b for _ in range(8)], "ours": our_update(config, images, bf16, device)}
    functions["ours --compile"] = our_update(config, images, bf16, device, compiled=True)
    if importlib.util.find_spec("timm"):
        functions["timm's modules"] = timm_update(config, images, bf16, device)
    took = interleave(functions, repeats)
    rate = 8 * 2 * product**3 / took.pop("product")
    what = f"ViT {config.embed_dim} @{config.image_size}, {images} images, {'bf16' if bf16 else 'fp32'}"
    rows = [f"{name}: {images / seconds:.1f} images/s, {flop / seconds / rate:.0%}" for name, seconds in took.items()]
    return [f"update {what}, {row} of the product's rate of {rate / 1e12:.2f} TFLOP/s" for row in rows]


def bench_update() -> list[str]:
    """A whole update of ViT-B/16 @224 on 8 images."""
    kinds = [False, True] if run.use_bf16("auto", torch.device("cpu")) else [False]
    return [row for bf16 in kinds for row in compare_updates(vit.BACKBONES["in1k-vit-b"], 8, bf16, "cpu", 2048, 3)]


# --- data and files ---------------------------------------------------------------------------------------------------

def bench_data() -> list[str]:
    """From a JPEG file, by the paper's augmentation, to a tensor, against bare decoding of the same files."""
    rows = []
    for width, height, draws in ((500, 375, 12), (2000, 1500, 4)):
        with tempfile.TemporaryDirectory() as folder:
            for i in range(4):
                pixels = np.random.default_rng(i).integers(0, 256, (48, 64, 3), np.uint8)
                image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
                image.save(Path(folder) / f"{i}.jpg", quality=90)
            images = data.Images(data.ImageFolder(folder), data.Augment(224), seed=0)
            took = interleave({
                "bare": lambda: [images.source.open(i).convert("RGB") for _ in range(draws) for i in range(4)],
                "augmented": lambda: [images[epoch, i] for epoch in range(draws) for i in range(4)],
            }, 7)
        share = took["bare"] / took["augmented"]
        rows.append(f"data {width} x {height}: the augmented tensor at {share:.2f} of the bare decoding rate")
    with tempfile.TemporaryDirectory() as root:
        for f in range(1000):
            (Path(root) / f"n{f:08d}").mkdir()
            for i in range(200):
                (Path(root) / f"n{f:08d}" / f"{i}.JPEG").touch()
        start = time.perf_counter()
        count = len(data.ImageFolder(root, "train"))
        seconds = time.perf_counter() - start
        rows.append(f"data listing {count:,} training images of 200,000 files in 1,000 folders: {seconds:.1f} s")
    return rows


PEAK = """
import sys, time, torch, vit, llama
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
torch.ones(256, 256) @ torch.ones(256, 256)  # the matrix library is loaded before the count begins
before, start = peak(), time.perf_counter()
model = {load}
print(peak() - before, time.perf_counter() - start)
"""


def bench_load() -> list[str]:
    """vit.load of SigLIP SO400M @384 and llama.load of about 2 GB, random weights: peak memory over the files' size."""
    sizes = dict(hidden_size=1536, intermediate_size=4096, num_hidden_layers=14, num_attention_heads=12)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        vit.save_tensors(vit.ViT(vit.BACKBONES["siglip-so400m-384"]).state_dict(), Path(folder) / "vit.safetensors", {})
        llama.save(llama.Llama(llama.LlamaConfig(**sizes)), Path(folder) / "llama")
        calls = {"vit.safetensors": "vit.load(sys.argv[1], 'siglip-so400m-384')", "llama": "llama.load(sys.argv[1])"}
        for name, call in calls.items():
            path = Path(folder) / name
            size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
            command = [sys.executable, "-c", PEAK.replace("{load}", call), str(path)]
            done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
            memory, seconds = map(float, done.stdout.split())
            what = f"load {call.split('(')[0]}: {size / 1e9:.2f} GB"
            rows.append(f"{what}, peak memory {memory / size:.3f} x the files, {seconds:.1f} s")
    return rows


# --- probing and answering --------------------------------------------------------------------------------------------

def bench_probe() -> list[str]:
    """probe.py's default two tasks on a backbone of 24 blocks, with features kept or made anew for each batch."""
    from demo import scenes

    with tempfile.TemporaryDirectory() as folder:
        scenes.write(Path(folder) / "scenes", count=64, val=16, test=1, seed=0, size=64, workers=0)
        config = vit.ViTConfig(image_size=64, patch_size=8, embed_dim=384, depth=24, num_heads=6)
        vit.save(vit.ViT(config), Path(folder) / "backbone.safetensors")

        def train(*flags: str) -> None:
            files = f"{folder}/backbone.safetensors --data {folder}/scenes --out {tempfile.mkdtemp(dir=folder)}"
            more = ["--batch", "16", "--workers", "0", *flags]
            command = [sys.executable, str(ROOT / "probe.py"), *files.split(), *more]
            subprocess.run(command, check=True, capture_output=True)

        took = interleave({"kept": train, "anew": lambda: train("--no-cache")}, 1)
    return [f"probe with features kept: {took['anew'] / took['kept']:.1f} times as fast as with features made anew"]


def bench_answers() -> list[str]:
    """64 questions about scenes, in batches of 32 or one at a time, with the model that `python train_vlm.py` makes."""
    model, folder = vlm.load(ROOT / "runs/vlm/model"), ROOT / "runs/scenes"
    rows = json.loads((folder / "questions.json").read_text())

    def asked(*kinds: str) -> tuple[list[Image.Image], list[str]]:
        chosen = [row for row in rows if row["kind"] in kinds][:64]
        opened = {row["image"]: Image.open(folder / row["image"]) for row in chosen}  # shared by an image's questions
        return [opened[row["image"]] for row in chosen], [row["conversations"][0]["value"] for row in chosen]

    lines = []
    images, questions = asked("presence")
    score = lambda i, n: model.score(images[i : i + n], questions[i : i + n], [["Yes", "No"]] * n)  # noqa: E731
    took = interleave({n: lambda n=n: [score(i, n) for i in range(0, 64, n)] for n in (1, 32)}, 5)
    lines.append(f"answers scored in batches of 32: {took[1] / took[32]:.1f} times as fast as one at a time")
    images, questions = asked("count", "color", "refer")
    write = lambda i, n: model.generate(images[i : i + n], questions[i : i + n])  # noqa: E731
    took = interleave({n: lambda n=n: [write(i, n) for i in range(0, 64, n)] for n in (1, 32)}, 3)
    lines.append(f"answers generated in batches of 32: {took[1] / took[32]:.1f} times as fast as one at a time")
    return lines


PARTS = (bench_update, bench_data, bench_load, bench_probe, bench_answers)
BENCHMARKS = {part.__name__.removeprefix("bench_"): part for part in PARTS}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", nargs="*", help=f"of {', '.join(BENCHMARKS)}; all but answers if not given")
    torch.set_num_threads(2)
    for name in parser.parse_args().benchmarks or [name for name in BENCHMARKS if name != "answers"]:
        for row in BENCHMARKS[name]():
            print(row, flush=True)
