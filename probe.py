"""The probing benchmark (sections 4.1, 4.3 and B): does a backbone know what is where in an image?

A small head on a frozen backbone says which classes each patch holds (`local`) or the whole image (`global`). The score
is recall at probability 0.5, averaged over classes. `leakage` needs no head: it measures how far a patch's content
spreads into the features of other patches.

    python probe.py                                                     # the demo: teacher against aligned, minutes
    python probe.py clip.safetensors aligned.safetensors --data coco    # a folder: COCO-Stuff, ADE20k, or a plain one
    python probe.py clip-vit-b=model.safetensors --data ADEChallengeData2016 --heads transformer,linear --seeds 3
    torchrun --nproc-per-node 8 probe.py ...                            # the probes are shared out
    python probe.py ... --resume                                        # continue, exactly
    python probe.py --init '{"depth": 6, ...}' --task global --head linear --finetune --save teacher.safetensors

Writes to --out: results.json, results.md, picture.png (figure 3), scatter.png (figure 9), and a folder for each probe
with its log.jsonl. The file reads from top to bottom: options, heads, metrics, set-up, features, training, leakage,
report, the command.

Shapes: B batch, M images of a data set, N patches, P prefix tokens, D width, C classes.
"""

import argparse
import colorsys
import json
import math
import os
import random
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import vit
from vit import ViT, ViTConfig

Source = data.Scenes | data.Segmentation


class RunError(RuntimeError):
    """The run cannot start or go on; the message says why and what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# Options

TASKS = ("local", "global", "leakage")
HEADS = ("transformer", "mlp", "linear")
INTERVENTIONS = ("none", "cls-only", "anonymous")
DEMO = str(Path(__file__).parent / "demo" / "teacher.safetensors"), str(Path("runs") / "align" / "aligned.safetensors")


def option(default: object, text: str, machine: bool = False, choices: tuple[str, ...] | None = None) -> object:
    """A field of Options: its default and its help. `machine`: it does not change what one probe measures."""
    return field(default=default, metadata={"help": text, "machine": machine, "choices": choices})


@dataclass
class Options:
    """Each field is a flag, `backbones` the arguments without one. The defaults are the paper's (section B, table 3)."""

    backbones: tuple[str, ...] = option((), "files that vit.load reads; NAME=FILE for one that does not say which of "
                                        "vit.BACKBONES it holds", machine=True)  # fmt: skip
    init: str | None = option(None, "instead of files random weights: a name of vit.BACKBONES, or ViTConfig's fields as JSON")
    data: str | None = option(None, "a folder of images with label maps; without it the built-in scenes")
    scenes: int = option(16000, "how many built-in scenes to train on")
    val_images: int | None = option(None, "validate on at most so many images; default: all, or 2,000 scenes")
    out: str = option("runs/probe", "where everything is written", machine=True)
    resume: bool = option(False, "continue in --out; what is finished there is kept", machine=True)

    tasks: str = option("local,global", f"of {', '.join(TASKS)}", machine=True)
    heads: str = option("transformer", f"of {', '.join(HEADS)}", machine=True)
    interventions: str = option("none", f"what is kept from the transformer head in the local task: of {', '.join(INTERVENTIONS)}", machine=True)
    labels: str = option("union", "of a patch: the set of its classes, or its most common one", choices=("union", "majority"))
    skip_blocks: int = option(0, "do not run the last blocks of the backbones")
    finetune: bool = option(False, "train the backbone as well")
    save: str | None = option(None, "--finetune: where the backbone of the best epoch goes", machine=True)
    flip: bool = option(False, "--finetune on the global task: mirror half of the training images")

    epochs: int = option(5, "passes over the training images")
    batch: int = option(32, "images per update")
    lr: float = option(1e-3, "peak learning rate")
    lr_end: float = option(1e-4, "where the cosine ends")
    warmup: int = option(500, "updates of linear warm-up inside the cosine; at most a tenth of all")
    weight_decay: float = option(0.01, "AdamW")
    seeds: int = option(1, "repeat with so many seeds of head and order, and report mean and standard error", machine=True)
    seed: int = option(0, "of the scenes, and the first seed of head and order")

    show: str | None = option(None, "numbers of validation images for the picture, as 3,14,15; default: 6 at random", machine=True)
    cache: bool = option(True, "make features anew for each batch, rather than once", machine=True)
    precision: str = option("auto", "auto: bf16 where the device has it", choices=("auto", "bf16", "fp32"))
    workers: int | None = option(None, "data processes of each rank; default: a core each, at most 8", machine=True)
    save_every: int = option(1000, "updates between checkpoints; one is also written at each epoch's end", machine=True)
    log_every: int = option(50, "updates between lines of log.jsonl", machine=True)


@dataclass(frozen=True)
class Probe:
    """What is measured of a backbone."""

    task: str
    head: str = ""  # none for leakage
    intervention: str = "none"
    seed: int = 0

    @property
    def title(self) -> str:
        """What its column is called: all but the seed."""
        return ", ".join(part for part in (self.task, self.head, self.intervention) if part not in ("", "none"))

    @property
    def folder(self) -> str:
        """Where it is written, below its backbone's folder."""
        return f"{self.title.replace(', ', '-')}-seed-{self.seed}"


def parse(argv: list[str] | None = None) -> Options:
    """Flags -> Options, complete and checked. A mistake in the flags exits with status 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for f in fields(Options):
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
        kind = get_args(f.type)[0] if get_args(f.type) else f.type  # int | None -> int
        if f.name == "backbones":
            parser.add_argument("backbones", nargs="*", metavar="BACKBONE", help=text)
        elif kind is bool:
            flag, action = (f"--no-{f.name}", "store_false") if f.default else (flag, "store_true")
            parser.add_argument(flag, dest=f.name, action=action, help=text)
        else:
            text += "" if f.default is None else f" (default: {f.default})"
            parser.add_argument(flag, type=kind, default=f.default, choices=f.metadata["choices"], help=text)
    options = Options(**vars(parser.parse_args(argv)))
    try:
        return complete(options)
    except ValueError as error:
        parser.error(str(error))


def complete(options: Options) -> Options:
    """Fill in the demo's backbones, and check what can be checked before anything is read. Raises ValueError."""
    o = replace(options)
    if o.init and o.backbones:
        raise ValueError("--init and backbone files exclude each other")
    if o.init:
        random_config(o.init)
    o.backbones = ("init",) if o.init else tuple(o.backbones) or DEMO
    for name, known in (("tasks", TASKS), ("heads", HEADS), ("interventions", INTERVENTIONS)):
        if unknown := set(getattr(o, name).split(",")) - set(known):
            raise ValueError(f"--{name} {', '.join(sorted(unknown))}: choose of {', '.join(known)}")
    if o.interventions != "none" and ("local" not in o.tasks or "transformer" not in o.heads):
        raise ValueError("--interventions: are for the local task and the transformer head")
    if o.finetune and "leakage" in o.tasks:
        raise ValueError("--finetune: leakage trains nothing; save the backbone and measure its file")
    if (o.save or o.flip) and not o.finetune:
        raise ValueError("--save and --flip: are for --finetune")
    if o.flip and o.tasks != "global":
        raise ValueError("--flip: is for the global task; it would move the labels of patches")
    if o.save and len(o.backbones) * len(probes(o)) > 1:
        raise ValueError("--save: give one backbone, task, head and seed")
    if not re.fullmatch(r"\d+(,\d+)*", o.show or "0"):
        raise ValueError(f"--show {o.show}: give numbers of images, as 3,14,15")
    for name in ("scenes", "val_images", "epochs", "batch", "lr", "seeds", "save_every", "log_every"):
        if getattr(o, name) is not None and getattr(o, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(o, name)}: must be above 0")
    return o


def probes(options: Options) -> list[Probe]:
    """All that is measured of each backbone, seeds together."""
    chosen = []
    for task in dict.fromkeys(options.tasks.split(",")):
        if task == "leakage":
            chosen.append(Probe(task))
            continue
        for head in dict.fromkeys(options.heads.split(",")):
            able = task == "local" and head == "transformer"
            for intervention in dict.fromkeys(options.interventions.split(",")) if able else ["none"]:
                chosen += [Probe(task, head, intervention, options.seed + i) for i in range(options.seeds)]
    return chosen


def random_config(text: str) -> ViTConfig:
    """--init: a name of vit.BACKBONES, or a JSON object of ViTConfig's fields. Raises ValueError."""
    try:
        return vit.BACKBONES[text] if text in vit.BACKBONES else ViTConfig(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(f"--init {text}: neither a name of vit.BACKBONES nor ViTConfig's fields as JSON ({error})") from None


# ----------------------------------------------------------------------------------------------------------------------
# Heads (section B). Each reads the backbone's tokens [B, P + N, D], prefix first.


def summary(tokens: Tensor, prefix: int) -> Tensor:
    """One token for the image: the mean prefix token, or the mean token where there is no prefix. -> [B, D]."""
    return (tokens[:, :prefix] if prefix else tokens).mean(1)


class TokenHead(nn.Module):
    """`linear` and `mlp`: the same layers on each patch token (local), or on the summary token (global)."""

    def __init__(self, config: ViTConfig, classes: int, task: str, hidden: int = 0):
        super().__init__()
        D, self.task, self.prefix = config.embed_dim, task, config.num_prefix
        if hidden:
            self.layers = nn.Sequential(nn.Linear(D, hidden), nn.GELU(), nn.Linear(hidden, classes))
        else:
            self.layers = nn.Linear(D, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, P + N, D] -> logits [B, N, C] (local) or [B, C] (global)."""
        return self.layers(tokens[:, self.prefix :] if self.task == "local" else summary(tokens, self.prefix))


class TransformerHead(nn.Module):
    """Two blocks of the backbone's width over all its tokens.

    Local task: the outputs at the patches are classified; global: the mean output of the prefix (or of all). The
    interventions (figure 9, right) take away what the tokens say by their places: there, N learned latent tokens, which
    alone know where they are, are added and make the predictions, and the head sees
    `cls-only`: one token, the class token (or the mean), `anonymous`: all tokens, without positions.
    """

    def __init__(self, config: ViTConfig, classes: int, task: str, intervention: str = "none"):
        super().__init__()
        D, self.prefix, self.patches = config.embed_dim, config.num_prefix, config.num_patches
        self.task, self.intervention, self.class_token = task, intervention, config.class_token
        self.positions = nn.Parameter(0.02 * torch.randn(1, self.patches + self.prefix * (intervention == "none"), D))
        self.norm_in = nn.LayerNorm(D)
        block = replace(config, family="vit", mlp_ratio=4.0, act="gelu", qkv_bias=False, layer_scale=0.01, norm_eps=1e-5, softcap=None)
        self.blocks = nn.ModuleList(vit.Block(block) for _ in range(2))
        self.norm = nn.LayerNorm(D)
        self.linear = nn.Linear(D, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, P + N, D] -> logits [B, N, C] (local) or [B, C] (global)."""
        if self.intervention == "none":
            x = tokens + self.positions  # [B, P + N, D]
        else:
            if self.intervention == "cls-only":
                tokens = tokens[:, :1] if self.class_token else tokens.mean(1, keepdim=True)
            x = torch.cat([tokens, self.positions.expand(len(tokens), -1, -1)], 1)  # the last N are the latent tokens
        x = self.norm(vit.run_blocks(self.blocks, self.norm_in(x)))
        if self.task == "global":
            return self.linear(summary(x, self.prefix))
        return self.linear(x[:, -self.patches :])


def make_head(probe: Probe, config: ViTConfig, classes: int) -> nn.Module:
    """The head of a probe, with random weights."""
    if probe.head == "transformer":
        return TransformerHead(config, classes, probe.task, probe.intervention)
    return TokenHead(config, classes, probe.task, hidden=1024 if probe.head == "mlp" else 0)


# ----------------------------------------------------------------------------------------------------------------------
# Loss and metrics. Targets are sets of classes [B, N, C] or [B, C], bool; for `majority` labels one class, int [B, N].


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy for sets of classes, cross-entropy for single ones."""
    if targets.dtype == torch.bool:
        return F.binary_cross_entropy_with_logits(logits.float(), targets.float())
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def tally(logits: Tensor, targets: Tensor) -> Tensor:
    """For each image and class, the number of patches where it is found, said, and true: int64 [3, B, C].

    Said means a probability of at least 0.5 (single classes: the most probable one); found means said and true.
    """
    if targets.dtype == torch.bool:
        said, true = logits > 0, targets
    else:
        said, true = (F.one_hot(x, logits.shape[-1]).bool() for x in (logits.argmax(-1), targets))
    if said.ndim == 2:  # an image is one place
        said, true = said[:, None], true[:, None]
    return torch.stack([sum_places(x) for x in (said & true, said, true)])


def sum_places(x: Tensor) -> Tensor:
    """bool [B, N, C] -> its sum over N, int64 [B, C]. Halves are added in bytes, over and over, as long as no byte can
    overflow: many times faster than x.sum(1), which makes an int64 of each element first."""
    x = x.view(torch.uint8)
    for _ in range(6):
        half = x.shape[1] // 2
        if half < 4:
            break
        rest, x = x[:, 2 * half :], x[:, :half] + x[:, half : 2 * half]
        x[:, : rest.shape[1]] += rest
    return x.sum(1)


def metrics(counts: Tensor, places: int) -> dict:
    """All metrics from the tallies of a data set [3, M, C], with `places` patches an image (1: the image as a whole).

    Averages are over the classes that occur; precision leaves out those that are never predicted, and says how many.
    `recall_by_size`: over objects whose class fills (0, 10%], (10%, 20%], ... of its image's patches (figure 8). None
    stands where there is nothing to measure.
    """
    counts = counts.cpu().numpy()
    found, said, true = counts.sum(1).astype(float)  # [C] each
    total, occurs = counts.shape[1] * places, true > 0
    size = -(-10 * counts[2] // places).ravel()  # [M * C], rounded up: 0 not in the image, 1 to 10 the bin
    in_bin = [np.bincount(size, counts[i].ravel(), minlength=11)[1:] for i in (0, 2)]  # found, true
    right = (total - said - true + 2 * found) / total
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan, and means nothing to measure
        class_recall, by_size, f1 = found / true, in_bin[0] / in_bin[1], 2 * found / (said + true)
    predicted = occurs & (said > 0)
    return {
        "recall": float(class_recall[occurs].mean()),
        "accuracy": float(right.mean()),
        "macro_accuracy": float(right[occurs].mean()),
        "precision": float((found[predicted] / said[predicted]).mean()) if predicted.any() else None,
        "f1": float(f1[occurs].mean()),
        "classes": int(occurs.sum()),
        "never_predicted": int((occurs & ~predicted).sum()),
        "class_recall": numbers(class_recall),
        "recall_by_size": numbers(by_size),
    }


def numbers(values: np.ndarray) -> list[float | None]:
    """Nan becomes None: JSON has no nan."""
    return [None if math.isnan(v) else v for v in values.tolist()]


# ----------------------------------------------------------------------------------------------------------------------
# Set-up


class Run:
    """This process among the others, its device and precision, and how it speaks."""

    def __init__(self, options: Options):
        self.options, self.out = options, Path(options.out)
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32
        if self.world > 1 and not dist.is_initialized():
            # nothing but barriers, which wait for the longest probe: each is trained by one process
            dist.init_process_group("gloo", timeout=timedelta(days=100))
        has_bf16 = torch.cuda.is_bf16_supported() if cuda else vit.cpu_has_bf16()
        self.bf16 = options.precision == "bf16" or (options.precision == "auto" and has_bf16)
        self.stop_signal = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)

    def stop(self, received: int, _: object) -> None:
        """The first signal asks to save and end, a second one ends at once."""
        self.stop_signal = received
        signal.signal(received, signal.SIG_DFL)

    def check_stop(self, where: str) -> None:
        """End here after a signal."""
        if self.stop_signal:
            self.say(f"stopped {where}; continue with the same command and --resume", every_rank=True)
            sys.exit(128 + self.stop_signal)

    def autocast(self) -> torch.autocast:
        """bf16 autocast, or nothing."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()

    def progress(self, total: int, what: str, unit: str, initial: int = 0) -> tqdm:
        """A bar, on rank 0."""
        return tqdm(total=total, initial=initial, desc=what, unit=unit, disable=self.rank > 0, leave=False,
                    mininterval=0.5 if sys.stderr.isatty() else 30)  # fmt: skip

    def say(self, text: str, every_rank: bool = False) -> None:
        """Print a line above the bar, on rank 0."""
        if self.rank == 0 or every_rank:
            tqdm.write(text, file=sys.stderr)


def named(backbones: tuple[str, ...]) -> dict[str, tuple[str, str | None]]:
    """What each backbone is called -> its file, and its name in vit.BACKBONES where the argument is NAME=FILE.

    It is called as its file, with the folder's name before it where two files share one. RunError if that is not enough.
    """
    split = [text.split("=", 1)[::-1] if text.split("=")[0] in vit.BACKBONES else (text, None) for text in backbones]
    names = [Path(path).stem for path, _ in split]
    names = [f"{Path(path).parent.name}-{name}" if names.count(name) > 1 else name for (path, _), name in zip(split, names)]
    if len(set(names)) < len(names):
        raise RunError(f"two backbones are called {max(names, key=names.count)}: rename a file or its folder")
    return {name: tuple(pair) for name, pair in zip(names, split)}


def load_backbone(path: str, config: str | None, options: Options) -> ViT:
    """A backbone from its file, or --init's random one."""
    if options.init:
        return ViT(random_config(options.init))
    backbone = vit.load(path, config)
    if not 0 <= options.skip_blocks <= backbone.config.depth:
        raise RunError(f"--skip-blocks {options.skip_blocks}: {path} has {backbone.config.depth} blocks")
    return backbone


def sources(options: Options, size: int) -> tuple[Source, Source]:
    """Training and validation images with their labels, at the backbone's input size."""
    if options.data:
        return data.Segmentation(options.data, "train", size), data.Segmentation(options.data, "val", size)
    held_out = options.seed + 1_000_003  # scenes that neither a teacher nor an alignment has seen
    return data.Scenes(options.scenes, options.seed, size), data.Scenes(options.val_images or 2000, held_out, size)


# ----------------------------------------------------------------------------------------------------------------------
# What the trained part reads: a frozen backbone's tokens, made once; pixels where the backbone itself is trained


class Inputs:
    """The images of a source as the trained part reads them: batches of (x, labels of patches, labels of images).

    x: tokens bf16 [B, P + N, D] where `backbone` is given (frozen), or else pixels uint8 [B, 3, S, S].
    `cache` makes all of them at once, which is right because neither changes between epochs.
    """

    def __init__(self, pairs: data.PatchLabels, config: ViTConfig, backbone: ViT | None, run: Run):
        self.pairs, self.config, self.backbone, self.run = pairs, config, backbone, run
        self.kept: list[Tensor] = []

    def stream(self, batches: list[list[int]]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches made anew."""
        o, cuda = self.run.options, self.run.device.type == "cuda"
        workers = o.workers
        if workers is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            workers = min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        loader = DataLoader(self.pairs, batch_sampler=batches, num_workers=workers, worker_init_fn=ignore_signals, pin_memory=cuda)
        for pixels, patches, whole in loader:
            yield (self.tokens(pixels) if self.backbone else pixels), patches, whole

    @torch.no_grad()
    def tokens(self, pixels: Tensor) -> Tensor:
        """The frozen backbone's tokens, in bf16 whether they are kept or not, so that both ways train alike."""
        images = vit.normalize(pixels.to(self.run.device), self.config)
        with self.run.autocast():
            return self.backbone(images, skip_blocks=self.run.options.skip_blocks).bfloat16()

    def cache(self, what: str) -> None:
        """Make all, each process its share, and keep them: in memory, or in a file where they take more than half of
        what is free, or where several processes share them. Says the size beforehand."""
        c, run, count = self.config, self.run, len(self.pairs)
        example = self.pairs[0][1:]
        x = (c.num_prefix + c.num_patches, c.embed_dim) if self.backbone else (3, c.image_size, c.image_size)
        shapes = [(count, *shape) for shape in (x, *(label.shape for label in example))]
        dtypes = [torch.bfloat16 if self.backbone else torch.uint8, torch.uint8, torch.uint8]
        size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes))
        in_memory = run.world == 1 and size < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
        run.say(f"{what} of {count:,} images: {size / 2**30:.2f} GiB, kept in {'memory' if in_memory else f'a file in {run.out}'}")
        self.kept = [torch.empty(s, dtype=d) if in_memory else shared(s, d, run) for s, d in zip(shapes, dtypes)]
        mine = chunks(count)[run.rank :: run.world]
        with run.progress(len(mine), what, "batch") as bar:
            for chunk, made in zip(mine, self.stream(mine)):
                for kept, part in zip(self.kept, made):
                    kept[chunk] = part.to(kept.device)
                bar.update()
                run.check_stop(f"while making {what}")
        run.barrier()

    def batches(self, batches: list[list[int]]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of the given images, from what is kept or made anew."""
        return ([kept[chunk] for kept in self.kept] for chunk in batches) if self.kept else self.stream(batches)


def shared(shape: tuple[int, ...], dtype: torch.dtype, run: Run) -> Tensor:
    """A tensor in a file that all processes map. The file loses its name at once, so nothing is left behind. RunError
    when the disk is full."""
    path, size = run.out / ".features.tmp", math.prod(shape)
    if run.rank == 0:
        try:
            with open(path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)  # a full disk shows here, not as a crash later
        except OSError as error:
            path.unlink(missing_ok=True)
            raise RunError(f"{run.out}: has no room for the features ({error.strerror}); choose another --out, or --no-cache") from None
    run.barrier()
    tensor = torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)
    run.barrier()
    if run.rank == 0:
        path.unlink()
    return tensor


def chunks(count: int, most: int = 64) -> list[list[int]]:
    """The numbers below `count` in order, in equal parts of at most 64."""
    return [part.tolist() for part in np.array_split(np.arange(count), -(-count // most))]


def ignore_signals(_: int) -> None:
    """In a data process: it is the main process that answers Ctrl-C and SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


# ----------------------------------------------------------------------------------------------------------------------
# Training a probe


class Model(nn.Module):
    """A head, behind a backbone where that is trained too."""

    def __init__(self, head: nn.Module, backbone: ViT | None, skip_blocks: int):
        super().__init__()
        self.backbone, self.head, self.skip_blocks = backbone, head, skip_blocks

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, P + N, D], or pixels uint8 [B, 3, S, S] -> logits."""
        if self.backbone:
            x = self.backbone(vit.normalize(x, self.backbone.config), skip_blocks=self.skip_blocks)
        return self.head(x.float())


def learning_rate(update: int, updates: int, options: Options) -> float:
    """Cosine from lr to lr_end over all updates; the first ones rise linearly inside it."""
    warmup = min(options.warmup, updates // 10)
    cosine = options.lr_end + (options.lr - options.lr_end) * (1 + math.cos(math.pi * update / updates)) / 2
    return cosine * min(1.0, (update + 1) / (warmup + 1))


class Training:
    """One head on one backbone: updates, evaluations, checkpoints, result."""

    def __init__(self, run: Run, probe: Probe, file: tuple[str, str | None], folder: Path, inputs: tuple[Inputs, Inputs]):
        o = run.options
        self.run, self.probe, self.folder, (self.train, self.val) = run, probe, folder, inputs
        self.source, config = self.val.pairs.source, self.val.config
        self.classes, self.settings = len(self.source.names), settings(o, file[0])
        torch.manual_seed(probe.seed)
        backbone = load_backbone(*file, o) if o.finetune else None
        self.model = Model(make_head(probe, config, self.classes), backbone, o.skip_blocks).to(run.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=o.lr, weight_decay=o.weight_decay, fused=True)
        self.per_epoch = len(self.train.pairs) // o.batch
        if not self.per_epoch:
            raise RunError(f"--batch {o.batch}: there are only {len(self.train.pairs)} training images")
        self.updates = self.per_epoch * o.epochs
        self.shown = shown_images(o, len(self.val.pairs))
        self.update, self.epochs, self.best, self.maps = 0, [], {"recall": -1.0}, []

    def targets(self, patches: Tensor, whole: Tensor) -> Tensor:
        """What the head should say: bool [B, N, C], int64 [B, N] (majority), or bool [B, C] (global)."""
        if self.probe.task == "local" and self.run.options.labels == "majority":
            return patches[..., 0].long().to(self.run.device)
        packed = patches if self.probe.task == "local" else whole
        return data.unpack(packed.to(self.run.device), self.classes)

    def order(self, epoch: int) -> tuple[list[list[int]], list[Tensor]]:
        """The images of each update of an epoch, and which of them are mirrored (none without --flip)."""
        o, generator = self.run.options, torch.Generator().manual_seed(self.probe.seed * 1000 + epoch)
        order = torch.randperm(len(self.train.pairs), generator=generator)[: self.per_epoch * o.batch]
        mirrored = [torch.rand(o.batch, generator=generator) < 0.5 for _ in range(self.per_epoch if o.flip else 0)]
        return order.view(-1, o.batch).tolist(), mirrored

    def train_update(self, x: Tensor, targets: Tensor) -> float:
        """One update; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.update, self.updates, self.run.options)
        with self.run.autocast():
            logits = self.model(x)
        loss = loss_of(logits, targets)
        loss.backward()
        if self.run.options.finetune:  # deep networks from scratch need it; heads are trained without, as in the paper
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.update += 1
        return loss.item()

    def fit(self) -> None:
        """All epochs, then the result."""
        run, o = self.run, self.run.options
        log = open(self.folder / "log.jsonl", "a", buffering=1)
        title = f"{self.folder.parent.name}: {self.probe.title}"
        started, first = time.perf_counter(), self.update
        bar = run.progress(self.updates, title, "update", self.update)
        for epoch in range(self.update // self.per_epoch, o.epochs):
            order, mirrored = self.order(epoch)
            done = self.update - epoch * self.per_epoch
            for step, (x, *labels) in enumerate(self.train.batches(order[done:]), done):
                x = x.to(run.device, non_blocking=True)
                if o.flip:
                    x[mirrored[step]] = x[mirrored[step]].flip(-1)
                loss = self.train_update(x, self.targets(*labels))
                if not math.isfinite(loss):
                    raise RunError(f"{title}: the loss is not finite at update {self.update}; lower --lr")
                bar.update()
                if self.update % o.log_every == 0:
                    rate = (self.update - first) * o.batch / (time.perf_counter() - started)
                    bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s", refresh=False)
                    print(json.dumps({"update": self.update, "loss": loss, "images_per_s": round(rate, 1)}), file=log)
                if step + 1 < self.per_epoch and (run.stop_signal or self.update % o.save_every == 0):
                    self.save_checkpoint()
            self.end_epoch({"epoch": epoch + 1, "update": self.update, "train_loss": loss}, log)
        bar.close()
        config, groups = self.val.config, {kind: list(members) for kind, members in self.source.groups.items()}
        write_result(self.folder, {
            "settings": self.settings, "probe": asdict(self.probe), "best": self.best, "epochs": self.epochs, "maps": self.maps,
            "geometry": [config.image_size, config.patch_size], "classes": {"names": self.source.names, "groups": groups},
        })  # fmt: skip
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)

    def end_epoch(self, values: dict, log: object) -> None:
        """Evaluate, keep the best epoch by macro recall, save."""
        values |= self.evaluate()
        scalars = {name: value for name, value in values.items() if not isinstance(value, list)}
        self.epochs.append(scalars)
        print(json.dumps(scalars), file=log)
        shown = ("epoch", "train_loss", "loss", *(name for name in scalars if name.startswith("recall") and scalars[name] is not None))
        self.run.say(f"{self.folder.parent.name}: {self.probe.title}: " + ", ".join(f"{k} {scalars[k]:.4g}" for k in shown))
        if values["recall"] > self.best["recall"]:
            self.best = values
            if self.probe.task == "local":
                self.maps = self.predict(self.shown)
            if self.run.options.save:
                vit.save(self.model.backbone, self.run.options.save)
        self.save_checkpoint()

    @torch.no_grad()
    def evaluate(self) -> dict:
        """Loss and metrics on the validation images, and the recall of each kind of classes."""
        counts, loss = [], 0.0
        parts = chunks(len(self.val.pairs))
        for part, (x, *labels) in zip(parts, self.val.batches(parts)):
            with self.run.autocast():
                logits = self.model(x.to(self.run.device))
            targets = self.targets(*labels)
            loss += loss_of(logits, targets).item() * len(part) / len(self.val.pairs)
            counts.append(tally(logits, targets).cpu())
        places = self.val.config.num_patches if self.probe.task == "local" else 1
        values = {"loss": loss} | metrics(torch.cat(counts, 1), places)
        for kind, members in self.source.groups.items():
            there = [values["class_recall"][c] for c in members if values["class_recall"][c] is not None]
            values[f"recall_{kind}"] = sum(there) / len(there) if there else None
        return values

    @torch.no_grad()
    def predict(self, images: list[int]) -> list[list[int]]:
        """The class to paint each patch with, 0 for none: of the classes in the first label map, the most probable one
        if its probability is at least 0.5. -> lists of N."""
        maps = []
        for x, *_ in self.val.batches([[i] for i in images]):
            with self.run.autocast():
                logits = self.model(x.to(self.run.device))[0, :, : self.source.first_map].float()  # [N, classes]
            value, best = logits[:, 1:].max(-1)
            said = value > (logits[:, 0] if self.run.options.labels == "majority" else 0)
            maps.append(torch.where(said, best + 1, 0).tolist())
        return maps

    def save_checkpoint(self) -> None:
        """Write checkpoint.pt whole or not at all; end here after a signal."""
        state = {
            "settings": self.settings, "update": self.update, "epochs": self.epochs, "best": self.best, "maps": self.maps,
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        write_atomically(self.folder / "checkpoint.pt", lambda temporary: torch.save(state, temporary))
        self.run.check_stop(f"in {self.folder} at update {self.update} of {self.updates}, saved")

    def load_checkpoint(self) -> None:
        """Continue where the checkpoint was written, if there is one; the log is cut to what it knows."""
        path, log = self.folder / "checkpoint.pt", self.folder / "log.jsonl"
        if not path.exists():
            log.unlink(missing_ok=True)
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged file leads to
            raise RunError(f"{path}: damaged, it cannot be read ({type(error).__name__}); remove it to train this probe again") from None
        same_settings(path, state["settings"], self.settings)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("update", "epochs", "best", "maps"):
            setattr(self, name, state[name])
        kept = [line for line in log.read_text().splitlines() if json.loads(line)["update"] <= self.update]
        write_atomically(log, lambda temporary: temporary.write_text("".join(line + "\n" for line in kept)))


def settings(options: Options, path: str) -> dict:
    """What a result depends on, beside the probe: options, and the backbone file (its size and time)."""
    kept = {f.name: getattr(options, f.name) for f in fields(Options) if not f.metadata["machine"]}
    if options.init:
        return kept
    status = os.stat(path)
    return kept | {"backbone": [status.st_size, status.st_mtime_ns]}


def same_settings(path: Path, then: dict, now: dict) -> None:
    """RunError if a file of --out was made with other settings."""
    for name in now | then:
        if then.get(name) != now.get(name):
            what = "another file" if name == "backbone" else f"--{name.replace('_', '-')} {then.get(name)}, not {now.get(name)}"
            raise RunError(f"{path}: was made with {what}; give the same, or another --out")


def write_atomically(path: Path, write: object) -> None:
    """Call write(temporary path), then move the file into place: it appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except RuntimeError as error:  # torch.save turns a full disk into this
        raise OSError(f"{path}: cannot be written ({str(error).splitlines()[0]}); is the disk full?") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_result(folder: Path, result: dict) -> None:
    """A probe's result.json."""
    write_atomically(folder / "result.json", lambda temporary: temporary.write_text(json.dumps(result)))


def shown_images(options: Options, count: int) -> list[int]:
    """The validation images in the picture: --show's, or 6 at random."""
    if options.show:
        chosen = [int(number) for number in options.show.split(",")]
        if max(chosen) >= count:
            raise RunError(f"--show {max(chosen)}: there are {count} validation images, from 0")
        return chosen
    return sorted(random.Random(options.seed).sample(range(count), min(6, count)))


# ----------------------------------------------------------------------------------------------------------------------
# Leakage


@torch.no_grad()
def measure_leakage(backbone: ViT, inputs: Inputs, run: Run) -> dict[str, float]:
    """How much of a patch's content is told by other patches' features, in float32; 0: each speaks of its own place only.

    In each image a random block of patches, a quarter to half of the grid a side, is replaced by the same block of the
    next image. `leakage` is the mean squared change of the features at patches outside the block over that inside, each
    image counting alike; `leakage_near` at the patches that touch the block, `leakage_far` at those further away.
    """
    config, device, changes = backbone.config, run.device, []
    g, p, parts = config.grid, config.patch_size, chunks(len(inputs.pairs))
    with run.progress(len(parts), "leakage", "batch") as bar:
        for part, (pixels, *_) in zip(parts, inputs.stream(parts)):
            block = torch.stack([random_block(g, i) for i in part])[:, None]  # [B, 1, g, g]
            near = F.max_pool2d(block, 3, 1, 1) - block
            pasted = F.pad(F.interpolate(block, scale_factor=p), [0, config.image_size - g * p] * 2).bool()  # [B, 1, S, S]
            pair = pixels, torch.where(pasted, pixels.roll(-1, 0), pixels)
            before, after = (backbone(vit.normalize(x.to(device), config), skip_blocks=run.options.skip_blocks) for x in pair)
            change = (after - before)[:, config.num_prefix :].double().square().mean(-1).cpu()  # [B, N]
            zones = [zone.flatten(1) for zone in (block, 1 - block, near, 1 - block - near)]
            changes.append(torch.stack([(change * zone).sum(1) / zone.sum(1) for zone in zones]))
            bar.update()
            run.check_stop("while measuring leakage")
    inside, *others = torch.cat(changes, 1)  # [M] each; nan where an image has no patch further away
    ratios = [(zone.nansum() / inside[~zone.isnan()].sum()).item() for zone in others]
    return dict(zip(("leakage", "leakage_near", "leakage_far"), ratios))


def random_block(grid: int, index: int) -> Tensor:
    """The block of patches that is replaced in an image, the same every time: 1 inside, [grid, grid]."""
    rng, block = data.generator("leakage", index), torch.zeros(grid, grid)
    height, width = rng.integers(max(1, grid // 4), max(1, grid // 2), 2, endpoint=True)
    top, left = rng.integers(0, (grid - height + 1, grid - width + 1))
    block[top : top + height, left : left + width] = 1
    return block


# ----------------------------------------------------------------------------------------------------------------------
# Report

Scores = dict[str, dict[str, dict[str, np.ndarray]]]  # backbone -> column -> metric -> [seeds] or [seeds, ...]


def collect(run: Run) -> tuple[list[dict], Scores]:
    """What the result.json files of this call hold, and the metrics of the best epochs, seeds together."""
    results, scores = [], {}
    for name in named(run.options.backbones):
        columns = scores.setdefault(name, {})
        for probe in probes(run.options):
            results.append({"backbone": name} | json.loads((run.out / name / probe.folder / "result.json").read_text()))
            for metric, value in results[-1]["best"].items():
                columns.setdefault(probe.title, {}).setdefault(metric, []).append(value)
        for column in columns.values():
            column.update({metric: np.array(values, float) for metric, values in column.items()})  # None becomes nan
    return results, scores


def text_of(values: np.ndarray, percent: bool = True) -> str:
    """[seeds] -> their mean and, of several, its standard error: "44.31 ± 0.12"."""
    scale, digits, count = *((100, 2) if percent else (1, 4)), len(values)
    if np.isnan(values.mean()):
        return "-"
    error = f" ± {values.std(ddof=1) / count**0.5 * scale:.{digits}f}" if count > 1 else ""
    return f"{values.mean() * scale:.{digits}f}{error}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def main_table(scores: Scores) -> str:
    """Macro recall in percent (and leakage) of each backbone, and in brackets how far it is from the first one's."""
    first, rows = next(iter(scores.values())), []
    for name, columns in scores.items():
        rows.append([name])
        for title, column in columns.items():
            metric, scale, digits = ("leakage", 1, 4) if title == "leakage" else ("recall", 100, 2)
            change = (column[metric].mean() - first[title][metric].mean()) * scale
            rows[-1].append(text_of(column[metric], scale == 100) + ("" if columns is first else f" ({change:+.{digits}f})"))
    return table(["macro recall, %", *first], rows)


def details(scores: Scores, classes: dict) -> str:
    """The other metrics of each column, recall by size (figure 8), and the classes that gain most (figure 7)."""
    parts = []
    for title, column in next(iter(scores.values())).items():
        shown = [m for m in column if column[m].ndim == 1 and m not in ("epoch", "update", "train_loss", "classes", "never_predicted")]
        raw = {"loss", "leakage", "leakage_near", "leakage_far"}  # not in percent
        rows = [[name, *(text_of(columns[title][m], m not in raw) for m in shown)] for name, columns in scores.items()]
        parts += [f"### {title}", table(["backbone", *(m.replace("_", " ") for m in shown)], rows)]
        if "never_predicted" in column:
            silent = ", ".join(f"{columns[title]['never_predicted'].mean():g} ({name})" for name, columns in scores.items())
            parts.append(f"Of {column['classes'][0]:g} classes that occur, never predicted, and left out of precision: {silent}.")
        if title.startswith("local"):
            rows = [[name, *map(text_of, columns[title]["recall_by_size"].T)] for name, columns in scores.items()]
            parts.append("Recall by the share of its image's patches that a class fills:")
            parts.append(table(["backbone", *(f"{b}-{b + 10}%" for b in range(0, 100, 10))], rows))
    titles = [title for title in column_titles(scores) if title.startswith("local")]
    if len(scores) > 1 and titles:
        before, after = (scores[name][titles[0]]["class_recall"].mean(0) for name in (list(scores)[0], list(scores)[-1]))
        parts += most_improved(before, after, [list(scores)[0], list(scores)[-1]], classes)
    return "\n\n".join(parts)


def most_improved(before: np.ndarray, after: np.ndarray, names: list[str], classes: dict, most: int = 10) -> list[str]:
    """Of each kind of classes those whose local recall [C] gains most from one backbone to another (figure 7)."""
    parts, gain = [f"### Classes that gain most from {names[0]} to {names[1]}, local"], after - before
    for kind, members in (classes["groups"] or {"classes": range(len(gain))}).items():
        best = sorted((c for c in members if not np.isnan(gain[c])), key=lambda c: -gain[c])[:most]
        rows = [[classes["names"][c], *(f"{100 * v[c]:.2f}" for v in (before, after)), f"{100 * gain[c]:+.2f}"] for c in best]
        parts.append(table([kind, *names, "gain"], rows))
    return parts


def column_titles(scores: Scores) -> list[str]:
    """The columns, which all backbones share."""
    return list(next(iter(scores.values())))


def scatter(scores: Scores, path: Path) -> dict[str, float]:
    """Figure 9, left: local against global recall of each backbone, with the trend line of three or more. Returns how
    far above that line each backbone is, its relative locality."""
    titles = [next((t for t in column_titles(scores) if t.startswith(task)), None) for task in ("global", "local")]
    if None in titles or len(scores) < 2:
        return {}
    points = {name: tuple(100 * columns[t]["recall"].mean() for t in titles) for name, columns in scores.items()}
    xs, ys = np.array(list(points.values())).T
    line = tuple(np.polyfit(xs, ys, 1).tolist()) if len(points) > 2 and np.ptp(xs) > 0 else None
    data.scatter(points, tuple(f"{title}, macro recall %" for title in titles), line).save(path)
    return {} if line is None else {name: y - np.polyval(line, x) for name, (x, y) in points.items()}


def picture(results: list[dict], run: Run, path: Path) -> None:
    """Figure 3: image, truth and each backbone's prediction, patch by patch, with a legend: of the first local column."""
    local = [result for result in results if result.get("maps")]
    if not local:
        return
    title, (size, patch), names = Probe(**local[0]["probe"]).title, local[0]["geometry"], local[0]["classes"]["names"]
    maps = {r["backbone"]: r["maps"] for r in reversed(local) if Probe(**r["probe"]).title == title}  # the first seed's
    source = sources(run.options, size)[1]
    pairs = data.PatchLabels(source, patch, most=run.options.val_images)
    sheet = []
    for place, i in enumerate(shown_images(run.options, len(pairs))):
        item = source[int(pairs.chosen[i])]
        truth = data.majority(item.labels, patch, len(names), unlabeled=run.options.labels == "majority")
        sheet.append([item.image.resize((192, 192), Image.Resampling.BICUBIC), truth.tolist()]
                     + [maps[name][place] for name in reversed(maps)])  # fmt: skip
    classes = sorted({c for _, *row in sheet for cells in row for c in cells} - {0})
    hue = {c: colorsys.hsv_to_rgb(i / len(classes), 0.6 + 0.4 * (i % 2), 1) for i, c in enumerate(classes)}
    colors = {c: tuple(round(255 * v) for v in rgb) for c, rgb in hue.items()}
    painted = [[image, *(data.paint(image, cells, colors) for cells in row)] for image, *row in sheet]
    whole = data.grid(painted, ["image", "truth", *reversed(maps)])
    data.legend(whole, {names[c]: color for c, color in colors.items()}).save(path)


def finish(run: Run) -> None:
    """Write results.json, results.md and the pictures; print the table and what comes next."""
    o, out, (results, scores) = run.options, run.out, collect(run)
    picture(results, run, out / "picture.png")
    locality, text = scatter(scores, out / "scatter.png"), main_table(scores)
    if locality:
        text += "\n\n" + table(["backbone", "local recall above the trend line"], [[k, f"{v:+.2f}"] for k, v in locality.items()])
    classes = next((result["classes"] for result in results if "classes" in result), {})
    report = f"# Probes\n\n{text}\n\n{details(scores, classes)}\n"
    write_atomically(out / "results.md", lambda path: path.write_text(report))
    everything = json.dumps({"relative_locality": locality, "results": results})
    write_atomically(out / "results.json", lambda path: path.write_text(everything))
    pictures = [str(out / name) for name in ("picture.png", "scatter.png") if (out / name).exists()]
    print(f"\n{text}\n\nall metrics     {out / 'results.md'}, {out / 'results.json'}\npictures        {', '.join(pictures) or 'none'}")
    if "leakage" not in o.tasks and not o.init:
        again = [*(os.path.relpath(file) for file in o.backbones), *(["--data", o.data] if o.data else [])]
        print(f"next            python probe.py {' '.join(again)} --tasks leakage --out {out}-leakage")


# ----------------------------------------------------------------------------------------------------------------------
# The command


def measure(run: Run) -> None:
    """All probes of all backbones that have no result yet."""
    o, out, todo = run.options, run.out, {}
    backbones = named(o.backbones)
    for name, (path, _) in backbones.items():
        if not o.init and not Path(path).exists():
            raise RunError(f"{path}: is not there yet; make it with: python train_align.py" if path == DEMO[1] else f"{path}: no such file")
        for probe in probes(o):
            result = out / name / probe.folder / "result.json"
            if (result.exists() or result.with_name("checkpoint.pt").exists()) and not o.resume:
                raise RunError(f"{out} holds probes already; continue them with --resume, or choose another --out")
            if result.exists():
                same_settings(result, json.loads(result.read_text())["settings"], settings(o, path))
            else:
                todo.setdefault(name, []).append(probe)
    out.mkdir(parents=True, exist_ok=True)
    run.barrier()  # every process has looked before any writes
    count = sum(map(len, todo.values()))
    run.say(f"{count} probes of {', '.join(todo) or 'nothing new'}, {'bf16' if run.bf16 else 'fp32'} on {run.device}, writing to {out}")
    for name in todo:
        measure_backbone(run, name, backbones[name], todo[name])
        run.barrier()


def measure_backbone(run: Run, name: str, file: tuple[str, str | None], todo: list[Probe]) -> None:
    """The probes of one backbone: its features once for all of them, then each probe by one process."""
    o = run.options
    torch.manual_seed(o.seed)  # for --init
    backbone = load_backbone(*file, o).requires_grad_(False)
    config = backbone.config
    pairs = [data.PatchLabels(source, config.patch_size, o.labels, most)
             for source, most in zip(sources(o, config.image_size), (None, o.val_images))]  # fmt: skip
    frozen = None if o.finetune else backbone.to(run.device)
    inputs = tuple(Inputs(part, config, frozen, run) for part in pairs)
    if o.cache and any(probe.task != "leakage" for probe in todo):
        for part, what in zip(inputs, ("training", "validation")):
            part.cache(f"{name}: {what} {'features' if frozen else 'pixels'}")
    for probe in todo[run.rank :: run.world]:
        folder = run.out / name / probe.folder
        folder.mkdir(parents=True, exist_ok=True)
        if probe.task == "leakage":
            best = measure_leakage(backbone, Inputs(pairs[1], config, None, run), run)
            write_result(folder, {"settings": settings(o, file[0]), "probe": asdict(probe), "best": best})
        else:
            training = Training(run, probe, file, folder, inputs)
            training.load_checkpoint()
            training.fit()


def main(argv: list[str] | None = None) -> None:
    """The command."""
    options = parse(argv)
    try:
        run = Run(options)
        measure(run)
        if run.rank == 0:
            finish(run)
    except (RunError, vit.WeightsError, data.DataError, OSError) as error:
        sys.exit(f"probe.py: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
