"""Locality alignment, start to finish (section 3, appendix C).

    python train_align.py                                                       # the demo, minutes on a laptop
    python train_align.py --recipe clip-vit-l-336 --weights FILE --data DIR     # the paper's recipe of that backbone
    torchrun --nproc-per-node 4 train_align.py --recipe clip-vit-l-336 --weights FILE --data DIR
    python train_align.py ... --resume                                          # continue, exactly

Writes to --out: aligned.safetensors (encoder, head, decoder), log.jsonl, pictures/, checkpoints/. The file reads from
top to bottom: options, recipes, set-up, one update, validation, picture, checkpoints, the loop.

What an update sees depends on the seed and the update's number alone: samples and masks are drawn for the global batch
and sliced by rank and micro-batch, so any number of processes trains the same model.
"""

import argparse
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TextIO, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import data
import maskembed
import masks
import vit
from maskembed import OBJECTIVES, Student
from vit import ViT


class RunError(RuntimeError):
    """The run cannot start or go on; the message says why and what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# Options and recipes


def option(default: object, text: str, least: float | None = None, free: bool = False, choices: tuple = ()) -> object:
    """A field of Options: its default and help, the least value allowed, whether a resumed run may change it."""
    return field(default=default, metadata={"help": text, "least": least, "free": free, "choices": choices})


@dataclass
class Options:
    """Each field is a flag. What is None comes from the recipe or, of the method's choices, from the objective."""

    recipe: str = option("demo", f"demo; a backbone's: {', '.join(vit.BACKBONES)}; own: a backbone not among these")
    weights: str | None = option(None, "the pre-trained backbone; vit.load says what it reads", free=True)
    data: str | None = option(None, "a folder of images, any depth; without it the built-in scenes", free=True)
    val: str | None = option(None, "a folder of validation images; without it a held-out share of --data", free=True)
    val_share: float = option(0.01, "the share of --data held out where there is no --val", least=0)
    val_images: int = option(10000, "validate on at most so many images", least=1)
    scenes: int = option(12800, "how many built-in scenes make an epoch", least=1)
    out: str = option("runs/align", "where everything is written", free=True)
    resume: str | None = option(None, "continue from --out's newest checkpoint, or from the file given", free=True)

    objective: str = option("maskembed", "the method, or a baseline of its family", choices=tuple(OBJECTIVES))
    target: str | None = option(None, "what the student reconstructs", choices=maskembed.TARGETS)
    loss: str | None = option(None, "the reconstruction loss", choices=maskembed.LOSSES)
    masks: str | None = option(None, "the mask distribution", choices=("uniform", "bernoulli", "block", "crop"))
    visible: float | None = option(
        None, "visible share of bernoulli (0.5 if not given) and block masks (0.4)", least=0.01
    )
    views: int | None = option(None, "1: the mask; 2: and its complement; 3: and all-ones", choices=(1, 2, 3))
    full_view: bool = option(False, "with --views 2: the mask and all-ones, without the complement")
    softcap: float = option(
        30.0, "bound of the encoder's attention logits; 0: none (BEiT, EVA02 never have one)", least=0
    )
    decoder_depth: int = option(2, "blocks of the decoder", least=0)
    decoder_width: int | None = option(None, "width of the decoder; the encoder's if not given", least=1)
    decoder_softcap: float = option(0.0, "the same bound in the decoder; 0: none", least=0)
    reinit_last_block: bool = option(False, "start the encoder's last block from random weights")
    image_size: int | None = option(None, "another input size: position embeddings are resampled", least=1)

    epochs: int | None = option(None, "passes over the data; the recipe's if not given", least=1)
    updates: int | None = option(None, "end the schedule after at most so many updates", least=1)
    batch: int | None = option(None, "images per update, over all processes; the recipe's if not given", least=1)
    lr: float | None = option(None, "peak learning rate; the recipe's if not given", least=0, free=True)
    lr_end: float = option(0.1, "the cosine ends at this share of the peak", least=0)
    warmup_epochs: float | None = option(None, "linear warm-up inside the cosine; the recipe's if not given", least=0)
    warmup_start: float = option(0.1, "the warm-up begins at this share of the peak", least=0)
    beta1: float = option(0.9, "AdamW", least=0)
    beta2: float = option(0.95, "AdamW", least=0)
    weight_decay: float = option(0.01, "AdamW, on every parameter", least=0)
    clip: float = option(1.0, "largest norm of the gradient", least=1e-9, free=True)
    mix: str | None = option(None, "mix neighbouring images", choices=("mixup", "cutmix"))
    randaugment: bool = option(False, "RandAugment on the training images")
    in1k: bool = option(False, "the recipe for ImageNet-1k (25 or 50 epochs, warm-up) instead of ImageNet-21k's")
    seed: int = option(0, "of samples, masks, augmentation and new weights", least=0)

    micro_batch: int | None = option(
        None, "images at once on a process; if not given, the largest divisor of its share up to 64", least=1, free=True
    )
    precision: str = option("auto", "auto: bf16 where the device has it", free=True, choices=("auto", "bf16", "fp32"))
    compile: bool = option(False, "torch.compile each block", free=True)
    checkpointing: bool = option(False, "recompute activations instead of keeping them", free=True)
    workers: int | None = option(
        None, "data processes of each rank; if not given, a core each, up to 8", least=0, free=True
    )
    save_every: int = option(1000, "updates between checkpoints; each epoch's end has one too", least=1, free=True)
    log_every: int = option(10, "updates between lines of log.jsonl", least=1, free=True)


def flag(name: str) -> str:
    """How a field of Options is written on the command line."""
    return "--" + name.replace("_", "-")


def recipe(name: str, in1k: bool) -> dict[str, object]:
    """The numbers of table 6 and section B.1 for a backbone."""
    if name == "demo":  # built-in scenes and a small teacher: departs from the paper where the scale demands it
        return {"epochs": 4, "batch": 64, "lr": 1e-3, "warmup_epochs": 1.0}
    large = name in vit.BACKBONES and vit.BACKBONES[name].embed_dim > 768
    long = name in ("moco-vit-b", "mae-vit-b", "dino-vit-b")
    return {
        "epochs": (50 if long else 25) if in1k else 5,
        "batch": 1024,
        "lr": 2e-4 if large else 3e-4,
        "warmup_epochs": 1.0 if in1k else 0.0,
    }


def parse(argv: list[str] | None = None) -> Options:
    """Flags -> Options, complete and checked. A mistake in the flags exits with status 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for f in fields(Options):
        text = f.metadata["help"] + ("" if f.default in (None, False) else f" (default: {f.default})")
        kind = get_args(f.type)[0] if get_args(f.type) else f.type  # int | None -> int
        if kind is bool:
            parser.add_argument(flag(f.name), action="store_true", help=text)
        elif f.name == "resume":
            parser.add_argument(flag(f.name), nargs="?", const="newest", help=text)
        else:
            choices = f.metadata["choices"] or None
            parser.add_argument(flag(f.name), type=kind, default=f.default, choices=choices, help=text)
    options = Options(**vars(parser.parse_args(argv)))
    try:
        return complete(options)
    except ValueError as error:
        parser.error(str(error))


def complete(options: Options) -> Options:
    """Fill in recipe and objective, and check what can be checked before anything is read. Raises ValueError."""
    o = replace(options)
    if o.recipe not in ("demo", "own", *vit.BACKBONES):
        raise ValueError(f"--recipe {o.recipe}: unknown; choose demo, own or one of {', '.join(vit.BACKBONES)}")
    if o.recipe != "demo" and not o.weights:
        known = vit.BACKBONES.get(o.recipe)
        what = f"that backbone, from {known.source}" if known else "a backbone that vit.save wrote"
        raise ValueError(f"--recipe {o.recipe} needs --weights: a file with {what}")
    if (o.recipe != "demo") != (o.data is not None):
        raise ValueError("--data and --recipe go together: a folder of images, and a backbone's recipe or own")
    for f in fields(Options):
        value, least = getattr(o, f.name), f.metadata["least"]
        if value is not None and least is not None and not least <= value < math.inf:
            raise ValueError(f"{flag(f.name)} {value}: must be a number from {least:g} up")
    for name in ("val_share", "visible", "beta1", "beta2"):
        if (getattr(o, name) or 0) >= 1:
            raise ValueError(f"{flag(name)} {getattr(o, name)}: must be below 1")
    if o.full_view and o.views != 2:
        raise ValueError("--full-view goes with --views 2")
    o.weights = o.weights or str(Path(__file__).parent / "demo" / "teacher.safetensors")
    objective = OBJECTIVES[o.objective]
    defaults = recipe(o.recipe, o.in1k) | {n: getattr(objective, n) for n in ("target", "loss", "masks", "views")}
    for name, value in defaults.items():
        if getattr(o, name) is None:
            setattr(o, name, value)
    if o.visible is None:
        o.visible = 0.4 if o.masks == "block" else 0.5
    if o.objective != "maskembed" and (o.views != 1 or o.target != "cls"):
        raise ValueError(f"--objective {o.objective} has one view and the target cls; leave --views and --target out")
    if (o.masks == "crop") != (o.objective == "crop"):
        raise ValueError("--masks crop and --objective crop go together")
    if o.objective == "average" and o.masks != "block":
        raise ValueError("--objective average needs --masks block: another mask may be empty, which has no average")
    return o


# ----------------------------------------------------------------------------------------------------------------------
# Set-up


class Machine:
    """This process among the others, its device and precision."""

    def __init__(self, options: Options):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32
        else:
            vit.keep_freed_memory()
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo", device_id=self.device if cuda else None)
        has_bf16 = torch.cuda.is_bf16_supported() if cuda else vit.cpu_has_bf16()
        self.bf16 = options.precision == "bf16" or (options.precision == "auto" and has_bf16)

    def autocast(self) -> torch.autocast:
        """bf16 autocast, or nothing."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def sum(self, *values: float) -> list[float]:
        """The sums of numbers over all processes, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def memory(self) -> float:
        """The most memory this process has held, in GiB: of the GPU, or of the whole process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)

    def agree(self, what: str, *values: float) -> None:
        """Raise RunError unless all processes have the same values."""
        same = self.sum(*values) == [value * self.world for value in values]
        if self.sum(float(same))[0] != self.world:
            raise RunError(f"the processes do not see the same {what}; all need one --out and one --data")


def load_teacher(options: Options, machine: Machine) -> ViT:
    """The frozen pre-trained model."""
    config, size = vit.BACKBONES.get(options.recipe), options.image_size
    if size:
        config = config or vit.load(options.weights).config
        if size % config.patch_size and size != config.image_size:
            raise RunError(
                f"--image-size {size}: not a multiple of the backbone's patches of {config.patch_size} pixels"
            )
        config = replace(config, image_size=size)
    teacher = vit.load(options.weights, config).requires_grad_(False)
    if options.target == "cls" and not teacher.config.class_token:
        raise RunError(f"the target cls: {options.weights} has no class token; choose --target penultimate or last")
    return teacher


def sources(options: Options, size: int) -> tuple[data.ImageFolder | data.Scenes, data.ImageFolder | data.Scenes]:
    """Where training and validation images come from."""
    if not options.data:
        return data.Scenes(options.scenes, options.seed, size), data.Scenes(
            min(options.val_images, 512), 10**6 + options.seed, size
        )
    if options.val:
        return data.ImageFolder(options.data), data.ImageFolder(options.val)
    return tuple(data.ImageFolder(options.data, part, options.val_share) for part in ("train", "val"))


class ValidationImages(torch.utils.data.Dataset):
    """Validation images, evenly spaced among those of a source: i -> (uint8 [3, S, S], names that were unreadable)."""

    def __init__(self, source: data.ImageFolder | data.Scenes, config: vit.ViTConfig, most: int):
        self.config, self.images = config, data.Images(source, self.prepare, seed=0)
        self.chosen = np.linspace(0, len(source), min(most, len(source)), endpoint=False).astype(int)

    def prepare(self, image: Image.Image, _: np.random.Generator) -> Tensor:
        """Resized and centre-cropped as the backbone expects."""
        return data.to_tensor(vit.fit(data.to_rgb(image), self.config))

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> tuple[Tensor, list[str]]:
        return self.images[0, int(self.chosen[i])]


def draw_masks(options: Options, batch: int, grid: int, *key: int) -> tuple[Tensor, Tensor | None]:
    """Masks of a batch [batch * V, N], and for the crop baseline its windows [batch, 4]; `key` seeds them."""
    generator = torch.Generator().manual_seed(int(data.generator("masks", *key).integers(2**62)))
    if options.masks == "crop":
        windows = masks.windows(batch, grid, generator)
        return masks.from_windows(windows, grid), windows
    draw = {
        "uniform": lambda: masks.uniform(batch, grid**2, generator),
        "bernoulli": lambda: masks.bernoulli(batch, grid**2, options.visible, generator),
        "block": lambda: masks.block(batch, grid, options.visible, generator),
    }
    complement = options.views == 3 or (options.views == 2 and not options.full_view)
    full = options.views == 3 or (options.views == 2 and options.full_view)
    return masks.views(draw[options.masks](), complement, full), None


def micro_batch(share: int, pairs: bool) -> int:
    """The largest divisor of a process's share of the batch up to 64; an even one where images are mixed in pairs."""
    fitting = [d for d in range(1, min(64, share) + 1) if share % d == 0 and (d % 2 == 0 or not pairs)]
    return max(fitting, default=share)


def ignore_signals(_: int) -> None:
    """In a data process: it is the trainer that answers Ctrl-C and SIGTERM, and that ends its data processes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def learning_rate(update: int, updates: int, warmup: int, options: Options) -> float:
    """Cosine from the peak to a tenth of it; a warm-up rises linearly from a tenth, inside the cosine (not shifted)."""
    if update < warmup:
        return options.lr * (options.warmup_start + (1 - options.warmup_start) * update / warmup)
    return options.lr * (options.lr_end + (1 - options.lr_end) * (1 + math.cos(math.pi * update / updates)) / 2)


# ----------------------------------------------------------------------------------------------------------------------
# The run

COUNTED = ("update", "skipped", "skipped_in_row", "validated", "first", "best", "last")  # of a Run, in its checkpoints


class Run:
    """All that a run holds between updates: models, optimizer, data, counters."""

    def __init__(self, options: Options):
        self.options, self.machine = options, Machine(options)
        o, m = options, self.machine
        torch.manual_seed(o.seed)  # new weights: the same on every rank
        self.teacher = load_teacher(o, m)
        self.config = self.teacher.config
        self.fingerprint = sum(p.double().abs().sum().item() for p in self.teacher.parameters())
        try:
            self.student = self.new_student().to(m.device)
        except ValueError as error:  # a decoder width that the heads do not divide
            raise RunError(str(error)) from None
        if m.bf16:
            vit.round_linear_weights(self.teacher)
        self.teacher.to(m.device)

        if m.world > 1 and m.rank > 0:
            dist.barrier()  # the first process indexes the folder, the others read its index
        try:
            self.train_source, val_source = sources(o, self.config.image_size)
        finally:  # what is wrong with the folder, the others find as well
            if m.world > 1 and m.rank == 0:
                dist.barrier()
        self.validation = ValidationImages(val_source, self.config, o.val_images)
        self.micro = o.micro_batch or micro_batch(o.batch // m.world, pairs=o.mix is not None)
        plan = self.batches(0)
        self.per_epoch, self.updates = plan.updates_per_epoch, plan.updates
        self.unreadable = data.Unreadable(lambda line: self.say(line))

        self.student.encoder.checkpointing = o.checkpointing
        if self.student.decoder:
            self.student.decoder.checkpointing = o.checkpointing
        if o.compile:  # one code for all blocks, compiled anew for each model, batch size and gradient mode
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
            for model in (self.teacher, self.student):
                for block in [b for b in model.modules() if isinstance(b, vit.Block)]:
                    block.compile(dynamic=False)
        self.model: nn.Module = self.student
        if m.world > 1:
            devices = [m.device] if m.device.type == "cuda" else None
            self.model = DistributedDataParallel(self.student, devices, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), o.lr, (o.beta1, o.beta2), weight_decay=o.weight_decay, fused=True
        )
        self.update, self.skipped, self.skipped_in_row = 0, 0, 0
        self.validated = -1  # the update of the last validation
        self.best = self.first = self.last = math.inf  # validation losses
        self.start_tokens: Tensor | None = None  # for the picture
        self.saved = False  # nothing is lost by leaving now
        self.received = self.stop_signal = 0  # a signal that came to this process; one that all processes know of
        self.log: TextIO | None = None
        self.bar: tqdm | None = None

    def new_student(self) -> Student:
        """A student before its first update."""
        o = self.options
        return maskembed.make_student(
            self.teacher, replace(OBJECTIVES[o.objective], target=o.target), o.softcap or None,
            o.decoder_depth, o.decoder_width, o.decoder_softcap or None, o.reinit_last_block,
        )  # fmt: skip

    def batches(self, start: int) -> data.Batches:
        """The sampler of the run from an update on."""
        o, m = self.options, self.machine
        count = len(self.train_source)
        return data.Batches(count, o.batch, o.epochs, o.seed, m.rank, m.world, self.micro, start, o.updates)

    def loader(self, dataset: torch.utils.data.Dataset, **how: object) -> DataLoader:
        """A loader with this machine's processes."""
        workers = self.options.workers
        if workers is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            workers = min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        return DataLoader(
            dataset, num_workers=workers, collate_fn=data.collate, worker_init_fn=ignore_signals,
            pin_memory=self.machine.device.type == "cuda", **how,
        )  # fmt: skip

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.bar.write(text, file=sys.stderr) if self.bar else print(text, file=sys.stderr, flush=True)

    def record(self, **values: object) -> None:
        """A line of log.jsonl, on the first process."""
        if self.log:
            known = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in values.items()}
            print(json.dumps({"update": self.update, **known}), file=self.log)

    def targets(self, images: Tensor, masks: Tensor, windows: Tensor | None) -> Tensor:
        """The teacher's answer, scaled."""
        if windows is not None:
            return maskembed.crop_targets(self.teacher, images, windows) * self.student.target_scale
        return maskembed.teacher_targets(self.teacher, images, masks, self.options.target) * self.student.target_scale

    def train_update(self, micro_batches: list[Tensor]) -> dict[str, float]:
        """One update (equation 1) from this rank's micro-batches, uint8 [b, 3, S, S] each."""
        o, m = self.options, self.machine
        device, count = m.device, len(micro_batches)
        all_masks, all_windows = draw_masks(o, o.batch, self.config.grid, o.seed, self.update)
        lr = learning_rate(self.update, self.updates, round(o.warmup_epochs * self.per_epoch), o)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=device)
        for i, pixels in enumerate(micro_batches):
            first = m.rank * (o.batch // m.world) + i * len(pixels)  # this micro-batch's place in the global batch
            part = slice(first, first + len(pixels))
            mask = all_masks.view(o.batch, -1, all_masks.shape[1])[part].flatten(0, 1).to(device, non_blocking=True)
            windows = None if all_windows is None else all_windows[part]
            images = vit.normalize(pixels.to(device, non_blocking=True), self.config)
            if o.mix:
                images = data.mix(images, o.mix, o.seed, self.update, first)
            last = i == count - 1
            with nullcontext() if m.world == 1 or last else self.model.no_sync():  # gradients travel once an update
                with m.autocast():
                    target = self.targets(images, mask, windows)
                    loss = maskembed.reconstruction_loss(self.model(images, mask), target, mask, o.loss)
                (loss / count).backward()
            total += loss.detach() / count
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), o.clip).item()
        loss, stop, unreadable = m.sum(total.item() / m.world, self.received, self.unreadable.count)
        if stop:
            self.stop_signal = self.received or signal.SIGTERM
        if math.isfinite(norm) and math.isfinite(loss):
            self.optimizer.step()
            self.skipped_in_row = 0
        else:  # the same on every rank: the gradient and the loss are sums over all
            self.skipped, self.skipped_in_row = self.skipped + 1, self.skipped_in_row + 1
        self.optimizer.zero_grad(set_to_none=True)
        self.update += 1
        if self.skipped_in_row == 20:
            raise RunError(
                f"update {self.update}: the loss or gradient was not finite for 20 updates in a row; "
                f"resume from an earlier checkpoint with a lower --lr"
            )
        return {"loss": loss, "lr": lr, "grad_norm": norm, "skipped": self.skipped, "unreadable": int(unreadable)}

    @torch.no_grad()
    def validate(self, scale_only: bool = False) -> float:
        """Mean loss over the validation images on masks that are the same every time.

        scale_only: measure the targets' scale instead, once, before the first update.
        """
        o, m = self.options, self.machine
        mine = range(m.rank, len(self.validation), m.world)
        fixed, windows = draw_masks(o, len(self.validation), self.config.grid, 0, 2**40)
        fixed = fixed.view(len(self.validation), -1, fixed.shape[1])
        scale, total, count, start = maskembed.TargetScale(), 0.0, 0, 0
        loader = self.loader(Subset(self.validation, mine), batch_size=self.micro)
        for pixels, names in tqdm(loader, "validating", leave=False, disable=m.rank > 0 or not sys.stderr.isatty()):
            self.unreadable.add(names, len(pixels))
            chosen = torch.tensor(mine[start : start + len(pixels)])
            start += len(pixels)
            images = vit.normalize(pixels.to(m.device), self.config)
            mask = fixed[chosen].flatten(0, 1).to(m.device)
            with m.autocast():
                target = self.targets(images, mask, None if windows is None else windows[chosen])
                if scale_only:
                    scale.add(target)
                    continue
                loss = maskembed.reconstruction_loss(self.student(images, mask), target, mask, o.loss)
            total, count = total + loss.item() * len(pixels), count + len(pixels)
        if scale_only:
            scale.sums = torch.tensor(m.sum(*scale.sums.tolist()), dtype=torch.float64)
            return scale.value
        total, count = m.sum(total, count)
        return total / count

    def knows(self, line: dict[str, object]) -> bool:
        """Whether a line of log.jsonl was written before the checkpoint that was loaded."""
        return line["update"] <= (self.validated if "val_loss" in line else self.update)

    def check(self) -> None:
        """Save a checkpoint, validate, draw the picture, save what came out."""
        if self.update:
            self.save_checkpoint()  # first: a signal may end the process during the validation
        with self.leaving():
            loss = self.validate()
        self.validated, self.last = self.update, loss
        self.first = loss if self.update == 0 else self.first
        better, self.best = loss < self.best, min(loss, self.best)
        self.record(epoch=self.update / self.per_epoch, val_loss=loss)
        if self.machine.rank == 0:
            since = f" (at the start {self.first:.4f})" if self.update else ""
            self.say(f"update {self.update}: validation loss {loss:.4f}{since}")
            self.picture(Path(self.options.out) / "pictures" / f"update-{self.update:08d}.png")
        self.save_checkpoint(better)

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """While this lasts nothing is lost by leaving, so a signal ends the process at once."""
        self.saved = True
        if self.received:
            self.leave()
        yield
        self.saved = False

    def leave(self) -> None:
        """End after a signal; everything is saved."""
        done = f"stopped at update {self.update} of {self.updates}, saved; go on with the same command and --resume"
        if self.bar:
            self.bar.close()
        if self.machine.rank == 0:
            print(done if self.update else "stopped before the first update", file=sys.stderr, flush=True)
        sys.exit(128 + (self.stop_signal or self.received))

    # The picture ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def picture(self, path: Path, count: int = 6) -> None:
        """Input, masked input, and the tokens before and after alignment as colours: three principal components, the
        same axes for both."""
        chosen = np.linspace(0, len(self.validation), min(count, len(self.validation)), endpoint=False).astype(int)
        pixels = torch.stack([self.validation[i][0] for i in chosen])
        images = vit.normalize(pixels.to(self.machine.device), self.config)
        g, p, P = self.config.grid, self.config.patch_size, self.config.num_prefix
        mask, _ = draw_masks(replace(self.options, masks="uniform", views=1), len(pixels), g, 0, 2**40)
        with self.machine.autocast():
            if self.start_tokens is None:
                start = maskembed.make_student(
                    self.teacher, OBJECTIVES[self.options.objective], self.options.softcap or None
                )
                self.start_tokens = start.encoder.to(images.device)(images)[:, P:].float()
            tokens = torch.stack([self.start_tokens, self.student.encoder(images)[:, P:].float()])
        tokens = (tokens - tokens.mean((1, 2), keepdim=True)).cpu()  # [2, B, N, D], each around its own mean
        flat = tokens.flatten(0, 2).double()
        axes = torch.linalg.eigh(flat.T @ flat)[1][:, -3:].flip(1).float()  # [D, 3]
        colors = (tokens @ axes).numpy()  # [2, B, N, 3]
        low, high = np.quantile(colors, (0.02, 0.98), axis=(0, 1, 2))
        colors = (((colors - low) / (high - low)).clip(0, 1) * 255).astype(np.uint8).reshape(2, -1, g, g, 3)
        hidden = F.interpolate(mask.view(-1, 1, g, g), scale_factor=p)  # [B, 1, g p, g p]
        side, smooth, sharp = max(96, min(pixels.shape[-1], 224)), Image.Resampling.BICUBIC, Image.Resampling.NEAREST
        rows = []
        for i, image in enumerate(pixels):
            whole = image.permute(1, 2, 0).numpy()
            seen = np.full_like(whole, 128)
            seen[: g * p, : g * p] = np.where(hidden[i, 0, ..., None].numpy() > 0, whole[: g * p, : g * p], 128)
            cells = [(whole, smooth), (seen, sharp), (colors[0, i], sharp), (colors[1, i], sharp)]
            rows.append([Image.fromarray(array).resize((side, side), how) for array, how in cells])
        path.parent.mkdir(parents=True, exist_ok=True)
        data.grid(rows, ["image", "a mask", "before", "after"]).save(path)

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def save_checkpoint(self, best: bool = False) -> None:
        """Write checkpoints/update-N.pt whole or not at all; keep the last two, and best.pt beside them."""
        seen, unreadable = self.machine.sum(self.unreadable.seen, self.unreadable.count)
        try:
            if self.machine.rank == 0:
                folder = Path(self.options.out) / "checkpoints"
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / f"update-{self.update:08d}.pt"
                state = {
                    "options": asdict(self.options), "images": len(self.train_source), "fingerprint": self.fingerprint,
                    "student": self.student.state_dict(), "optimizer": self.optimizer.state_dict(),
                    "target_scale": self.student.target_scale, "unreadable": {"seen": int(seen), "count": int(unreadable)},
                    "random_state": torch.get_rng_state(), **{name: getattr(self, name) for name in COUNTED},
                }  # fmt: skip
                write_atomically(path, lambda temporary: torch.save(state, temporary))
                if best:
                    link_atomically(path, folder / "best.pt")
                for old in checkpoints(folder)[:-2]:
                    old.unlink()
        finally:
            if self.machine.world > 1:
                # Nobody leaves before it is written: gloo's threads let go of a sum's numbers a moment after it is there,
                # and Python, when it ends meanwhile, aborts ("terminate called without an active exception").
                dist.barrier()

    def load_checkpoint(self, path: Path) -> None:
        """Continue from a checkpoint; RunError when it is damaged or of another configuration."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            theirs, counted = state["options"], {name: state[name] for name in COUNTED}
        except FileNotFoundError:
            raise RunError(f"{path}: no such checkpoint") from None
        except Exception as error:  # whatever a damaged file leads to
            others = [other for other in checkpoints(path.parent) if other != path]
            hint = f"continue with --resume {others[-1]}" if others else "start again in another --out"
            raise RunError(f"{path}: damaged or of another version ({type(error).__name__}); {hint}") from None
        for f in fields(Options):
            now, then = getattr(self.options, f.name), theirs.get(f.name)
            if now != then and not f.metadata["free"]:
                raise RunError(
                    f"{path}: was made with {flag(f.name)} {then}, not {now}; give the same, or another --out"
                )
            if now != then and f.name in ("lr", "clip", "precision") and self.machine.rank == 0:
                self.say(f"continuing with {flag(f.name)} {now}, until now it was {then}")
        count = len(self.train_source)
        if state["images"] != count:
            raise RunError(
                f"{path}: was made with {state['images']} training images, not {count}; give the same --data"
            )
        if not math.isclose(state["fingerprint"], self.fingerprint, rel_tol=1e-9):
            raise RunError(
                f"{path}: was made from another backbone than {self.options.weights}; give the same --weights"
            )
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.machine.rank == 0:  # it keeps the sums over all processes
            self.unreadable.load_state_dict(state["unreadable"])
        self.student.target_scale = state["target_scale"]
        for name, value in counted.items():
            setattr(self, name, value)
        torch.set_rng_state(state["random_state"])


def checkpoints(folder: Path) -> list[Path]:
    """The numbered checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("update-*.pt") if re.fullmatch(r"update-\d{8,}\.pt", path.name))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), then move the file into place: it appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # a machine that goes down must not leave a file with a name and no content
        os.replace(temporary, path)
    except RuntimeError as error:  # torch.save turns a full disk into this
        raise OSError(f"{path}: cannot be written ({str(error).splitlines()[0]}); is the disk full?") from None
    finally:
        temporary.unlink(missing_ok=True)


def link_atomically(path: Path, target: Path) -> None:
    """Give a file a second name that replaces an older one."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # not every file system has links
        shutil.copyfile(path, temporary)
    os.replace(temporary, target)


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def start_or_resume(run: Run) -> None:
    """Find out where to begin, and open log.jsonl, cut to what the checkpoint knows of."""
    o, out = run.options, Path(run.options.out)
    saved, log = checkpoints(out / "checkpoints"), out / "log.jsonl"
    kept = ""
    if o.resume:
        if o.resume == "newest" and not saved:
            raise RunError(f"--resume: {out / 'checkpoints'} holds no checkpoint; leave --resume out to start")
        run.load_checkpoint(saved[-1] if o.resume == "newest" else Path(o.resume))
        run.machine.agree("checkpoints", run.update)
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        kept = "".join(line for line in lines if line.endswith("}\n") and run.knows(json.loads(line)))
    elif saved:
        done = int(saved[-1].stem.removeprefix("update-"))
        raise RunError(f"{out} holds a run at update {done}; continue it with --resume, or choose another --out")
    run.machine.agree("images", len(run.train_source), len(run.validation))
    if run.machine.rank == 0:
        for path in saved:
            if int(path.stem.removeprefix("update-")) > run.update:
                path.unlink()  # of a course that was given up by going back
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "options.json", lambda temporary: temporary.write_text(json.dumps(asdict(o), indent=2)))
        write_atomically(log, lambda temporary: temporary.write_text(kept))
        run.log = open(log, "a", buffering=1)


def catch_signals(run: Run) -> None:
    """Ctrl-C and SIGTERM let the current update end and be saved; the second one ends the process at once."""

    def remember(number: int, _: object) -> None:
        run.received = number
        signal.signal(number, signal.SIG_DFL)
        if run.saved:
            run.leave()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, remember)


def train(options: Options) -> Run:
    """The whole procedure: set up, measure the targets' scale, update, validate."""
    run = Run(options)
    o, m = options, run.machine
    start_or_resume(run)
    catch_signals(run)
    if m.rank == 0:
        count = sum(p.numel() for p in run.student.parameters()) / 1e6
        what = f"{count:.1f}M parameters, {len(run.train_source):,} images, {run.updates:,} updates of {o.batch}"
        how = f"{run.micro} at once, {m.world} processes, lr {o.lr:g}, {'bf16' if m.bf16 else 'fp32'} on {m.device}"
        run.say(f"{o.recipe}: {what} ({how}), into {o.out}")
    run.bar = tqdm(
        total=run.updates, initial=run.update, desc="aligning", unit="update", disable=m.rank > 0,
        smoothing=0.05, mininterval=0.5 if sys.stderr.isatty() else 30,
    )  # fmt: skip
    if not o.resume:
        with run.leaving():
            run.student.target_scale = 1.0 if o.loss == "cosine" else run.validate(scale_only=True)
    if run.validated < run.update and (run.update % run.per_epoch == 0 or run.update == run.updates):
        run.check()
    images = data.Images(run.train_source, data.Augment(run.config.image_size, o.randaugment), o.seed)
    loader = iter(run.loader(images, batch_sampler=run.batches(run.update)))
    share, clock = o.batch // m.world, time.perf_counter()
    while run.update < run.updates and not run.stop_signal:
        batches = [next(loader) for _ in range(share // run.micro)]
        run.unreadable.add([name for _, names in batches for name in names], share)
        values = run.train_update([pixels for pixels, _ in batches])
        rate = o.batch / (time.perf_counter() - clock)
        skipped = f", {run.skipped} skipped" if run.skipped else ""
        state = f"loss {values['loss']:.4f}, {rate:.0f} images/s, {m.memory():.1f} GiB{skipped}"
        run.bar.set_postfix_str(state, refresh=False)
        run.bar.update()
        if run.update % o.log_every == 0 or run.update == run.updates:
            run.record(**values, images_per_s=round(rate, 1))
        if run.update % run.per_epoch == 0 or run.update == run.updates:
            run.check()
        elif run.update % o.save_every == 0 or run.stop_signal:
            run.save_checkpoint()
        clock = time.perf_counter()  # validating and saving do not count
    run.bar.close()
    return run


def finish(run: Run) -> None:
    """Write the aligned model and say what came out."""
    o, path = run.options, Path(run.options.out) / "aligned.safetensors"
    maskembed.save(run.student, path, recipe=o.recipe, objective=o.objective, updates=run.update)
    weights = os.path.relpath(o.weights)
    print(f"""
| validation loss | start | end | end / start |
| --- | --- | --- | --- |
| {o.objective}, {o.loss} | {run.first:.4f} | {run.last:.4f} | {run.last / run.first:.3f} |

aligned model   {path}
pictures        {Path(o.out) / "pictures"}
next            python probe.py {weights} {path}""")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    options = parse(argv)
    try:
        run = train(options)
        if run.stop_signal:
            run.leave()
        if run.machine.rank == 0:
            finish(run)
    except (RunError, vit.WeightsError, data.DataError, OSError) as error:
        sys.exit(f"train_align.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit("train_align.py: the GPU's memory is full; give a smaller --micro-batch, or --checkpointing")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
