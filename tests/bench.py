"""Benchmarks: `python tests/bench.py align`, or a few of them, `python tests/bench.py align --only data,index`.

Clocks of shared machines wander by tens of percent, so whatever is compared runs in turns within one process, and
what is reported are ratios of medians (`interleave`). Each benchmark is a function that returns lines to print. bf16 on a
processor that does not multiply it itself is left out.
"""

import argparse
import contextlib
import copy
import ctypes
import functools
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import data as pictures  # the name `data` is a benchmark here
import llama
import probe
import train_align
import vit
import vlm

THREADS = 2
PRECISIONS = {"fp32": torch.float32}
if vit.cpu_has_bf16():  # elsewhere it is emulated, and takes minutes where float32 takes seconds
    PRECISIONS["bf16"] = torch.bfloat16


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


def our_update(folder: str, precision: str, *flags: str, images: int = 8) -> Callable[[], object]:
    """train_align.py's own update of ViT-B/16 @224 on so many images with 3 views, random weights."""
    weights = os.path.join(folder, "vit-b.safetensors")
    if not os.path.exists(weights):
        torch.manual_seed(0)
        vit.save(vit.ViT(vit_b16()), weights)
    argv = f"--weights {weights} --out {folder} --scenes {images} --batch {images} --precision {precision}".split()
    run = train_align.Run(train_align.parse([*argv, *flags]))
    run.updates = 10**6
    pixels = torch.randint(0, 256, (images, 3, 224, 224), dtype=torch.uint8)
    return lambda: run.train_update([pixels])


def timm_update(precision: str, device: str = "cpu", images: int = 8) -> Callable[[], object]:
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
    positions = torch.randn(1, 197, 768) * 0.02
    for module in (teacher, encoder, head, decoder):
        module.to(device)
    positions = nn.Parameter(positions.to(device))
    parameters = [*encoder.parameters(), *head.parameters(), *decoder.parameters(), positions]
    optimizer = torch.optim.AdamW(parameters, 3e-4, (0.9, 0.95), weight_decay=0.01, fused=True)
    pixels, u = torch.randn(images, 3, 224, 224, device=device), torch.rand(images, 197, device=device)
    mask = (u[:, 1:] > u[:, :1]).float()
    mask = torch.stack([mask, 1 - mask, torch.ones_like(mask)], 1)  # [B, V, N]

    def step():
        visible = F.interpolate(mask.view(images, 3, 14, 14), scale_factor=16)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            with torch.no_grad():
                target = teacher.forward_features((pixels[:, None] * visible[:, :, None]).flatten(0, 1))
            tokens = head(encoder.forward_features(pixels))
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
    for precision, dtype in PRECISIONS.items():
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


def extra_memory(function: Callable[[], object]) -> float:
    """How far memory rises above what is held before, in MiB, while a function runs."""
    function()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left free is not held
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here
    before = peak_memory()
    function()
    return (peak_memory() - before) / 2**20


def softcap() -> list[str]:
    """Soft-capped attention, forward and backward, 4 x 729 tokens, 16 heads of 72, float32, against its definition."""
    q, k, v = (torch.randn(4, 16, 729, 72, requires_grad=True) for _ in range(3))
    gradient = torch.randn(4, 16, 729, 72)
    ways = {"definition": vit.softcap_attention_plain, "ours": vit.attention, "uncapped, fused": vit.attention}
    functions, memory = {}, {}
    for name, way in ways.items():
        cap = None if name.startswith("uncapped") else 30.0
        functions[name] = lambda way=way, cap=cap: torch.autograd.grad(way(q, k, v, cap), (q, k, v), gradient)
        memory[name] = extra_memory(functions[name])
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


def load_peak(write: str, load: str, name: str) -> list[str]:
    """Run the script `write` once and `load` three times on a path: the most memory a load took, its median seconds."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(THREADS)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        subprocess.run([sys.executable, "-c", write, path], env=environment, check=True)
        size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
        command = [sys.executable, "-c", load, path]
        runs = [subprocess.run(command, env=environment, check=True, capture_output=True).stdout.split() for _ in range(3)]
    memory, took = max(float(run[0]) for run in runs), statistics.median(float(run[1]) for run in runs)
    return [f"{size / 1e9:.2f} GB: peak {memory / size:.3f} x the files, {took:.1f} s from the page cache"]


def load() -> list[str]:
    """vit.load of SigLIP SO400M @384 in timm's layout (random weights): peak memory over the file's size, seconds."""
    return [f"load   {row}" for row in load_peak(WRITE_SO400M, LOAD_SO400M, "so400m.safetensors")]


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
    """5 epochs of probes on a backbone of 24 blocks, as CLIP's ViT-L has, with features made once or for each batch.

    By blocks run per image: with features kept a probe costs 5 x 6 (two blocks, forward and backward) and its backbone
    24 once, else 5 x (24 + 6), so that one transformer head can gain 2.8 at most and two of them, probe.py's default, 3.6.
    """
    rows = []
    calls = {  # flags, and the gain by counting blocks
        "one linear head": ("--tasks local --heads linear", 5 * 24 / 24),
        "one transformer head": ("--tasks local", 5 * 30 / (24 + 30)),
        "two transformer heads, as by default": ("--tasks local,global", 2 * 5 * 30 / (24 + 2 * 30)),
    }
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as silence:
        config = vit.ViTConfig(image_size=64, patch_size=8, embed_dim=384, depth=24, num_heads=6)
        vit.save(vit.ViT(config), os.path.join(folder, "backbone.safetensors"))

        def train(*flags: str) -> None:
            out = tempfile.mkdtemp(dir=folder)
            flags = " ".join(flags) + f" --scenes 64 --val-images 16 --batch 16 --workers 0 --out {out}"
            with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
                probe.main([os.path.join(folder, "backbone.safetensors"), *flags.split()])

        for name, (call, blocks) in calls.items():
            took = interleave({"kept": lambda: train(call), "anew": lambda: train(call, "--no-cache")}, 1)
            rows.append(f"cache  5 epochs, {name}: {took['kept']:.1f} s with features kept, {took['anew']:.1f} s without = "
                        f"{took['anew'] / took['kept']:.1f} times that (by counting blocks {blocks:.1f})")
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The language model, against transformers' of the same shape


def llama_100m() -> llama.LlamaConfig:
    """A model of 100 million parameters with Llama 2's vocabulary."""
    return llama.LlamaConfig(hidden_size=640, intermediate_size=1728, num_hidden_layers=12, num_attention_heads=10)


def both_llamas(
    dtype: torch.dtype = torch.float32, config: llama.LlamaConfig | None = None, device: str = "cpu"
) -> tuple[llama.Llama, nn.Module]:
    """The same weights in our model, of 100 million parameters unless a config is given, and in transformers' LlamaForCausalLM."""
    import transformers

    torch.manual_seed(0)
    config = config or llama_100m()
    with torch.device(device):
        ours = llama.Llama(config).to(dtype)
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_transformers())).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def training() -> list[str]:
    """A step of 8 examples, each 576 image tokens, 60 of text and 12 of answer, forward and backward."""
    rows, (ours, theirs) = [], both_llamas()
    embeds = torch.randn(8, 648, 640) * 0.02
    labels = torch.full((8, 648), -100)
    labels[:, -12:] = torch.randint(0, 32000, (8, 12))

    def step(model: nn.Module, loss: Callable[[], torch.Tensor], bf16: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss().backward()
        model.zero_grad(set_to_none=False)  # the gradients stay allocated, in both

    same = ours.loss(embeds, labels), theirs(inputs_embeds=embeds, labels=labels).loss
    assert torch.allclose(*same, rtol=1e-4), same
    for precision in PRECISIONS:
        functions = {
            "ours": lambda bf16=precision == "bf16": step(ours, lambda: ours.loss(embeds, labels), bf16),
            "theirs": lambda bf16=precision == "bf16": step(theirs, lambda: theirs(inputs_embeds=embeds, labels=labels).loss, bf16),
        }
        memory = {name: extra_memory(function) for name, function in functions.items()}
        took = interleave(functions, 3)
        rows.append(f"training step {precision}: {took['ours']:.2f} s, transformers {took['theirs']:.2f} s = {took['theirs'] / took['ours']:.2f} "
                    f"times that (at least 1.15); extra memory {memory['ours']:.0f} MiB, {memory['ours'] / memory['theirs']:.2f} of its (at most 0.5)")
    return rows


def generation() -> list[str]:
    """64 tokens after prompts of 64, greedily; ours packed for the CPU. At batch 1 each token reads all weights once, which
    no program can be faster than: `floor` is that alone."""
    rows = []
    for precision, dtype in PRECISIONS.items():
        ours, theirs = both_llamas(dtype)
        llama.pack(ours)
        read = [weight for name, weight in theirs.named_parameters() if "embed_tokens" not in name]
        for batch in (1, 8):
            ids = torch.randint(3, 32000, (batch, 64), generator=torch.Generator().manual_seed(0))
            how = dict(max_new_tokens=64, min_new_tokens=64, do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0)
            functions = {"ours": lambda: ours.generate(ids, max_new_tokens=64, stop=None), "theirs": lambda: theirs.generate(ids, **how),
                         "floor": lambda: [weight.view(torch.float32).sum() for _ in range(64) for weight in read]}
            if precision == "fp32":
                assert ours.generate(ids, max_new_tokens=64, stop=None) == theirs.generate(ids, **how)[:, 64:].tolist()
            took = interleave(functions, 5)
            rows.append(f"generation {precision}, batch {batch}: {took['ours']:.2f} s, transformers {took['theirs']:.2f} s = "
                        f"{took['theirs'] / took['ours']:.2f} times that (at least 1.3); reading the weights alone {took['floor']:.2f} s")
    return rows


WRITE_LLAMA = """
import sys, torch, llama
with torch.device("meta"):
    model = llama.Llama(llama.LlamaConfig(hidden_size=1536, intermediate_size=4096, num_hidden_layers=14, num_attention_heads=12))
model.to_empty(device="cpu")
with torch.no_grad():
    for parameter in model.parameters():
        parameter.uniform_(-0.05, 0.05)
llama.save(model, sys.argv[1])
"""
LOAD_LLAMA = LOAD_SO400M.replace("import sys, time, torch, vit", "import sys, time, torch, llama").replace(
    'vit.load(sys.argv[1], "siglip-so400m-384")', "llama.load(sys.argv[1])")


def load_llama() -> list[str]:
    """llama.load of a folder of about 2 GB in float32: peak memory over the files' size, seconds."""
    return [f"load   {row}" for row in load_peak(WRITE_LLAMA, LOAD_LLAMA, "llama")]


def demo_questions(kinds: set[str], count: int = 64) -> tuple[vlm.VLM, list[Image.Image], list[str]]:
    """The demo's model (after `python train_vlm.py`), and images and questions about scenes, those about one scene together, as in eval.py."""
    model, rows, scenes = vlm.load(ROOT / "runs" / "vlm" / "model", pack=True), [], pictures.Scenes(200, 4_000_037)
    for i in range(200):
        scene = scenes[i]
        rows += [(scene.image, row["conversations"][0]["value"]) for row in scene.conversations if row["kind"] in kinds]
    return model, *map(list, zip(*rows[:count]))


def scoring() -> list[str]:
    """64 multiple-choice questions about scenes, in batches or one at a time, with the demo's model."""
    model, images, questions = demo_questions({"relation", "presence"})
    choices = [["True", "False"] if "True" in question else ["Yes", "No"] for question in questions]
    functions = {
        "batches": lambda: [row for i in (0, 32) for row in model.score(images[i : i + 32], questions[i : i + 32], choices[i : i + 32])],
        "single": lambda: [model.score([image], [question], [choice])[0] for image, question, choice in zip(images, questions, choices)],
    }
    assert np.allclose(functions["batches"](), functions["single"](), atol=1e-4)
    took = interleave(functions, 5)
    return [f"scoring 64 questions: {took['batches']:.2f} s in batches of 32, one at a time {took['single']:.2f} s = "
            f"{took['single'] / took['batches']:.1f} times that (at least 3)"]


def answering() -> list[str]:
    """64 questions about scenes answered in text, in batches or one at a time, with the demo's model."""
    model, images, questions = demo_questions({"count", "color", "refer"})
    functions = {
        "batches": lambda: [answer for i in (0, 32) for answer in model.generate(images[i : i + 32], questions[i : i + 32])],
        "single": lambda: [model.generate([image], [question])[0] for image, question in zip(images, questions)],
    }
    assert functions["batches"]() == functions["single"]()
    took = interleave(functions, 5)
    return [f"answering 64 questions: {took['batches']:.2f} s in batches of 32, one at a time {took['single']:.2f} s = "
            f"{took['single'] / took['batches']:.1f} times that (at least 3)"]


# ---------------------------------------------------------------------------------------------------------------------
# The method itself on the built-in scenes: what alignment and its relatives change in what probes find

SEEDS = (1, 2, 3)
OUT = Path("runs") / "locality"


def shell(log: Path, *argv: str) -> None:
    """Run a command of this project on one core, its output in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *argv], env=environment, stdout=file, stderr=file, check=True)


def align_and_probe(job: tuple[str, int]) -> None:
    """Align the demo's teacher by an objective ("teacher": not at all) with a seed, and probe what comes out on scenes
    of the same seed. What an earlier call finished is kept."""
    objective, seed = job
    backbone, out = ROOT / "demo" / "teacher.safetensors", OUT / f"{objective}-{seed}"
    if objective != "teacher":
        backbone, made = out / "align" / "aligned.safetensors", out / "align" / "options.json"
        flags = f"--objective {objective} --seed {seed} --out {out / 'align'} --workers 0".split()
        now = json.loads(json.dumps(asdict(train_align.parse(flags))))
        if not backbone.exists() or {**json.loads(made.read_text()), "weights": now["weights"]} != now:  # of other defaults
            shutil.rmtree(out, ignore_errors=True)
            shell(OUT / "logs" / f"align-{objective}-{seed}.txt", str(ROOT / "train_align.py"), *flags)
    flags = f"--tasks local,global,leakage --heads transformer,linear --seed {seed} --out {out / 'probe'} --workers 0 --resume"
    if objective in ("teacher", "maskembed"):  # as figure 9, right
        flags += " --interventions none,cls-only,anonymous"
    shell(OUT / "logs" / f"probe-{objective}-{seed}.txt", str(ROOT / "probe.py"), str(backbone), *flags.split())


def found_by(objective: str) -> dict[str, np.ndarray]:
    """What the probes found: column -> recall in percent, or leakage, for each seed."""
    columns = {}
    for seed in SEEDS:
        for result in json.loads((OUT / f"{objective}-{seed}" / "probe" / "results.json").read_text())["results"]:
            best = result["best"]
            columns.setdefault(probe.Probe(**result["probe"]).title, []).append(best.get("leakage", 100 * best.get("recall", 0)))
    return {title: np.array(values) for title, values in columns.items()}


def locality() -> list[str]:
    """MaskEmbed and the baselines of its family against the teacher: three paired seeds of alignment, scenes and probes,
    about an hour of two cores. Differences to the teacher: mean and standard error (sd / sqrt 3)."""
    names = ["teacher", *train_align.OBJECTIVES]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(align_and_probe, [(name, seed) for seed in SEEDS for name in names]))
    found = {name: found_by(name) for name in names}

    def cell(name: str, title: str) -> str:
        digits, teacher = 4 if title == "leakage" else 2, found["teacher"][title]
        if title not in found[name]:
            return ""
        if name == "teacher":
            return f"{teacher.mean():.{digits}f}"
        change = found[name][title] - teacher
        return f"{change.mean():+.{digits}f} ± {change.std(ddof=1) / len(SEEDS) ** 0.5:.{digits}f}"

    rows = [[name, *(cell(name, title) for title in found["teacher"])] for name in names]
    return probe.table(["macro recall, %", *found["teacher"]], rows).splitlines()


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU


def on_gpu(function: Callable[[], object]) -> tuple[Callable[[], object], float]:
    """The function, which now waits for the GPU to end, and the memory it takes there above what is held, in MiB."""

    def waiting() -> None:
        function()
        torch.cuda.synchronize()

    waiting()  # compiles, and allocates what stays
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    waiting()
    return waiting, (torch.cuda.max_memory_allocated() - before) / 2**20


def gpu_softcap() -> list[str]:
    """Soft-capped attention, forward and backward, 16 x 729 tokens, 16 heads of 72, bfloat16, against its definition."""
    q, k, v = (torch.randn(16, 16, 729, 72, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    gradient = torch.randn_like(q)
    ways = {"definition": vit.softcap_attention_plain, "ours": vit.attention, "uncapped, fused": vit.attention}
    functions, memory = {}, {}
    for name, way in ways.items():
        cap = None if name.startswith("uncapped") else 30.0
        step = lambda way=way, cap=cap: torch.autograd.grad(way(q, k, v, cap), (q, k, v), gradient)
        functions[name], memory[name] = on_gpu(step)
    median = interleave(functions, 20)
    return [
        f"softcap {name}: {took * 1e3:.2f} ms, {took / median['definition']:.2f} of the definition's time; "
        f"{memory[name]:.0f} MiB, {memory[name] / memory['definition']:.2f} of its memory"
        for name, took in median.items()
    ]


def gpu_update() -> list[str]:
    """A whole update of ViT-B/16 @224, 64 images, 3 views, bf16, 16.1 TFLOP, against the rate of a matrix product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        updates = {"ours": our_update(folder, "bf16", images=64), "ours --compile": our_update(folder, "bf16", "--compile", images=64)}
        if importlib.util.find_spec("timm"):
            updates["timm's modules"] = timm_update("bf16", "cuda", images=64)
        functions, memory = {"product": on_gpu(lambda: [a @ b for _ in range(8)])[0]}, {}
        for name, step in updates.items():
            functions[name], memory[name] = on_gpu(step)
        median = interleave(functions, 10)
    rate = 8 * 2 * 8192**3 / median.pop("product")
    return [f"update bf16, {name}: {64 / took:.0f} images/s, {8 * 2.01e12 / took / rate:.0%} of the product's {rate / 1e12:.0f} TFLOP/s; "
            f"extra memory {memory[name] / 1024:.1f} GiB" for name, took in median.items()]


def gpu_training() -> list[str]:
    """`training` on a GPU, of 1.2 billion parameters (20 layers of width 2048), in bf16 autocast."""
    config = llama.LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=20, num_attention_heads=16)
    ours, theirs = both_llamas(config=config, device="cuda")
    embeds = torch.randn(8, 648, 2048, device="cuda") * 0.02
    labels = torch.full((8, 648), -100, device="cuda")
    labels[:, -12:] = torch.randint(0, 32000, (8, 12), device="cuda")

    def step(model: nn.Module, loss: Callable[[], torch.Tensor]) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss().backward()
        model.zero_grad(set_to_none=False)

    functions, memory = {}, {}
    losses = {"ours": lambda: ours.loss(embeds, labels), "theirs": lambda: theirs(inputs_embeds=embeds, labels=labels).loss}
    for name, model in (("ours", ours), ("theirs", theirs)):
        functions[name], memory[name] = on_gpu(lambda model=model, name=name: step(model, losses[name]))
    took = interleave(functions, 10)
    return [f"training step bf16: {took['ours'] * 1e3:.0f} ms, transformers {took['theirs'] * 1e3:.0f} ms = {took['theirs'] / took['ours']:.2f} "
            f"times that; extra memory {memory['ours']:.0f} MiB, {memory['ours'] / memory['theirs']:.2f} of its"]


def gpu_generation() -> list[str]:
    """64 tokens of Llama 2 7B's shape after prompts of 640, greedily, bf16, eager and with the step compiled; reading the
    weights alone is 64 times their size over the rate of a copy."""
    ours, theirs = both_llamas(torch.bfloat16, llama.LlamaConfig(), "cuda")
    weights, source = sum(p.nbytes for p in ours.parameters()), torch.empty(2**31, dtype=torch.uint8, device="cuda")
    rows, target, step = [], torch.empty_like(source), torch.compile(ours.decode, mode="reduce-overhead")
    for batch in (1, 8):
        ids = torch.randint(3, 32000, (batch, 640), device="cuda")
        how = dict(max_new_tokens=64, min_new_tokens=64, do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0)

        def compiled() -> None:
            ours.decode = step
            ours.generate(ids, max_new_tokens=64, stop=None)
            del ours.decode

        functions = {"ours": lambda: ours.generate(ids, max_new_tokens=64, stop=None), "ours, compiled": compiled,
                     "theirs": lambda: theirs.generate(ids, **how), "copy": lambda: target.copy_(source)}
        took = interleave({name: on_gpu(function)[0] for name, function in functions.items()}, 5)
        floor = 64 * weights * took["copy"] / (2 * source.nbytes)
        rows.append(f"generation 7B bf16, batch {batch}: {took['ours']:.2f} s, compiled {took['ours, compiled']:.2f} s, transformers {took['theirs']:.2f} s "
                    f"= {took['theirs'] / took['ours']:.2f} and {took['theirs'] / took['ours, compiled']:.2f} times that; reading the weights alone {floor:.2f} s")
    return rows


# ---------------------------------------------------------------------------------------------------------------------

SUITES: dict[str, list[Callable[[], list[str]]]] = {
    "align": [softcap, update, load, data, index],
    "probe": [labels, metrics, cache],
    "locality": [locality],
    "vlm": [training, generation, load_llama, scoring],
    "eval": [answering],
    "gpu": [gpu_softcap, gpu_update, gpu_training, gpu_generation],
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
