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
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TextIO

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


def option(default: object, text: str, machine: bool = False, choices: tuple[str, ...] | None = None) -> object:
    """A field of Options: its default and its help. `machine`: it does not change what is learned."""
    return field(default=default, metadata={"help": text, "machine": machine, "choices": choices})


@dataclass
class Options:
    """Each field is a flag. What is None comes from the recipe or, of the method's choices, from the objective."""

    recipe: str = option("demo", f"demo; a backbone's: {', '.join(vit.BACKBONES)}; own: a backbone not among these")
    weights: str | None = option(None, "the pre-trained backbone; vit.load says what it reads", machine=True)
    data: str | None = option(None, "a folder of images, any depth; without it the built-in scenes", machine=True)
    val: str | None = option(None, "a folder of validation images; without it a held-out share of --data", machine=True)
    val_share: float = option(0.01, "the share of --data held out where there is no --val")
    val_images: int = option(10000, "validate on at most so many images")
    scenes: int = option(6400, "how many built-in scenes make an epoch")
    out: str = option("runs/align", "where everything is written", machine=True)
    resume: str | None = option(
        None, "continue from the newest checkpoint in --out, or from the file given", machine=True
    )

    objective: str = option("maskembed", "the method, or a baseline of its family", choices=tuple(OBJECTIVES))
    target: str | None = option(None, "what the student reconstructs", choices=maskembed.TARGETS)
    loss: str | None = option(None, "the reconstruction loss", choices=maskembed.LOSSES)
    masks: str | None = option(None, "the mask distribution", choices=("uniform", "bernoulli", "block", "crop"))
    visible: float | None = option(None, "visible share of bernoulli (default 0.5) and block masks (default 0.4)")
    views: int | None = option(None, "1: the mask; 2: and its complement; 3: and all-ones")
    full_view: bool = option(False, "with --views 2: the mask and all-ones, without the complement")
    softcap: float = option(30.0, "bound of the encoder's attention logits; 0: none (BEiT, EVA02 never have one)")
    decoder_depth: int = option(2, "blocks of the decoder")
    decoder_width: int | None = option(None, "width of the decoder; default: the encoder's")
    decoder_softcap: float = option(0.0, "the same bound in the decoder; 0: none")
    reinit_last_block: bool = option(False, "start the encoder's last block from random weights")
    image_size: int | None = option(None, "another input size: position embeddings are resampled")

    epochs: int | None = option(None, "passes over the data")
    updates: int | None = option(None, "stop the schedule after so many updates, whatever --epochs says")
    batch: int | None = option(None, "images per update, over all processes")
    lr: float | None = option(None, "peak learning rate; the cosine ends at a tenth of it")
    warmup_epochs: float | None = option(None, "linear warm-up from a tenth of the peak, inside the cosine")
    beta1: float = option(0.9, "AdamW")
    beta2: float = option(0.95, "AdamW")
    weight_decay: float = option(0.01, "AdamW, on every parameter")
    clip: float = option(1.0, "largest norm of the gradient")
    mix: str | None = option(None, "mix neighbouring images", choices=("mixup", "cutmix"))
    randaugment: bool = option(False, "RandAugment on the training images")
    in1k: bool = option(
        False, "the recipe for ImageNet-1k (25 or 50 epochs, warm-up) instead of ImageNet-21k's 5 epochs"
    )
    seed: int = option(0, "of samples, masks, augmentation and new weights")

    micro_batch: int | None = option(
        None, "images at once on a process; default: the largest that fits 64", machine=True
    )
    precision: str = option("auto", "auto: bf16 where the device has it", choices=("auto", "bf16", "fp32"))
    compile: bool = option(False, "torch.compile each block", machine=True)
    checkpointing: bool = option(False, "recompute activations instead of keeping them", machine=True)
    workers: int | None = option(None, "data processes of each rank; default: a core each, at most 8", machine=True)
    save_every: int = option(1000, "updates between checkpoints; one is also written at each epoch's end", machine=True)
    log_every: int = option(10, "updates between lines of log.jsonl", machine=True)


def recipe(name: str, in1k: bool) -> dict[str, object]:
    """The numbers of table 6 and section B.1 for a backbone."""
    if name == "demo":  # built-in scenes and a small teacher: departs from the paper where the scale demands it
        return {"epochs": 4, "batch": 64, "lr": 1e-3, "warmup_epochs": 1.0}
    large = name.endswith(("vit-l", "vit-l-336")) or "so400m" in name
    long = name in ("moco-vit-b", "mae-vit-b", "dino-vit-b")
    return {
        "epochs": (50 if long else 25) if in1k else 5,
        "batch": 1024,
        "lr": 2e-4 if large else 3e-4,
        "warmup_epochs": 1.0 if in1k else 0.0,
    }


def parse(argv: list[str] | None = None) -> Options:
    """Flags -> Options, complete and checked. A mistake in the flags exits with status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for f in fields(Options):
        flag, kind = (
            "--" + f.name.replace("_", "-"),
            str(f.type).split(" |")[0].removeprefix("<class '").removesuffix("'>"),
        )
        if kind == "bool":
            parser.add_argument(flag, action="store_true", help=f.metadata["help"])
        elif f.name == "resume":
            parser.add_argument(flag, nargs="?", const="newest", help=f.metadata["help"])
        else:
            convert = {"int": int, "float": float, "str": str}[kind]
            parser.add_argument(
                flag, type=convert, default=f.default, choices=f.metadata["choices"], help=f.metadata["help"]
            )
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
        where = (
            f"that backbone, from {vit.BACKBONES[o.recipe].source}"
            if o.recipe != "own"
            else "a backbone that vit.save wrote"
        )
        raise ValueError(f"--recipe {o.recipe} needs --weights: a file with {where}")
    if o.recipe != "demo" and not o.data:
        raise ValueError(f"--recipe {o.recipe} needs --data: a folder of images")
    o.weights = o.weights or str(Path(__file__).parent / "demo" / "teacher.safetensors")
    for name, value in recipe(o.recipe, o.in1k).items():
        if getattr(o, name) is None:
            setattr(o, name, value)
    objective = OBJECTIVES[o.objective]
    for name in ("target", "loss", "masks", "views"):
        if getattr(o, name) is None:
            setattr(o, name, getattr(objective, name))
    if o.objective != "maskembed" and (o.views != 1 or o.target != "cls"):
        raise ValueError(f"--objective {o.objective} has one view and the target cls; leave --views and --target out")
    if (o.masks == "crop") != (o.objective == "crop"):
        raise ValueError("--masks crop and --objective crop go together")
    if o.objective == "average" and o.masks != "block":
        raise ValueError("--objective average needs --masks block: another mask may be empty, which has no average")
    if o.views not in (1, 2, 3):
        raise ValueError(f"--views {o.views}: choose 1, 2 or 3")
    if o.visible is None:
        o.visible = 0.4 if o.masks == "block" else 0.5
    for name in ("epochs", "batch", "lr", "scenes", "val_images", "save_every", "log_every"):
        if getattr(o, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(o, name)}: must be above 0")
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
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


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


def learning_rate(update: int, updates: int, warmup: int, peak: float) -> float:
    """Cosine from the peak to a tenth of it; a warm-up rises linearly from a tenth, inside the cosine (not shifted)."""
    if update < warmup:
        return peak * (0.1 + 0.9 * update / warmup)
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * update / updates)) / 2)


# ----------------------------------------------------------------------------------------------------------------------
# The run


class Run:
    """All that a run holds between updates: models, optimizer, data, counters."""

    def __init__(self, options: Options):
        self.options, self.machine = options, Machine(options)
        o, m = options, self.machine
        torch.manual_seed(o.seed)  # new weights: the same on every rank
        self.teacher = load_teacher(o, m)
        self.config = self.teacher.config
        self.fingerprint = sum(p.double().abs().sum().item() for p in self.teacher.parameters())
        self.student = self.new_student().to(m.device)
        if m.bf16:
            vit.round_linear_weights(self.teacher)
        self.teacher.to(m.device)

        self.train_source, val_source = sources(o, self.config.image_size)
        self.validation = ValidationImages(val_source, self.config, o.val_images)
        self.micro = o.micro_batch or micro_batch(o.batch // m.world, pairs=o.mix is not None)
        plan = self.batches(0)
        self.per_epoch, self.updates = plan.updates_per_epoch, plan.updates
        self.unreadable = data.Unreadable(lambda line: self.say(line))

        self.student.encoder.checkpointing = o.checkpointing
        if self.student.decoder:
            self.student.decoder.checkpointing = o.checkpointing
        if o.compile:  # one code for all blocks, compiled anew for each model, batch size and gradient mode
            torch._dynamo.config.recompile_limit = 64
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
        self.best = self.first = self.last = math.inf  # validation losses
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
            workers = min(8, max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
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
            print(json.dumps({"update": self.update, **values}), file=self.log)

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
        lr = learning_rate(self.update, self.updates, round(o.warmup_epochs * self.per_epoch), o.lr)
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

    def check(self) -> None:
        """Validate, draw the picture, save a checkpoint."""
        self.last = self.validate()
        self.first = self.last if self.update == 0 else self.first
        better, self.best = self.last < self.best, min(self.last, self.best)
        self.record(epoch=self.update / self.per_epoch, val_loss=self.last)
        if self.machine.rank == 0:
            since = f" (at the start {self.first:.4f})" if self.update else ""
            self.say(f"update {self.update}: validation loss {self.last:.4f}{since}")
            self.picture(Path(self.options.out) / "pictures" / f"update-{self.update:08d}.png")
        self.save_checkpoint(better)

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
        before = maskembed.make_student(self.teacher, OBJECTIVES[self.options.objective], self.options.softcap or None)
        encoders = before.encoder.to(images.device), self.student.encoder
        with self.machine.autocast():
            tokens = torch.stack([model(images)[:, P:].float() for model in encoders])
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
        if self.machine.rank == 0:
            folder = Path(self.options.out) / "checkpoints"
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"update-{self.update:08d}.pt"
            state = {
                "options": asdict(self.options), "images": len(self.train_source), "fingerprint": self.fingerprint,
                "student": self.student.state_dict(), "optimizer": self.optimizer.state_dict(),
                "target_scale": self.student.target_scale, "unreadable": self.unreadable.state_dict(),
                "random_state": torch.get_rng_state(), **{name: getattr(self, name) for name in COUNTED},
            }  # fmt: skip
            write_atomically(path, lambda temporary: torch.save(state, temporary))
            if best:
                link_atomically(path, folder / "best.pt")
            for old in checkpoints(folder)[:-2]:
                old.unlink()

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
            if not f.metadata["machine"] and now != then:
                flag = f"--{f.name.replace('_', '-')}"
                raise RunError(f"{path}: was made with {flag} {then}, not {now}; give the same, or another --out")
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
        self.unreadable.load_state_dict(state["unreadable"])
        self.student.target_scale = state["target_scale"]
        for name, value in counted.items():
            setattr(self, name, value)
        torch.set_rng_state(state["random_state"])


COUNTED = ("update", "skipped", "skipped_in_row", "first", "best", "last")  # what else a checkpoint keeps of a Run


def checkpoints(folder: Path) -> list[Path]:
    """The numbered checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("update-*.pt") if re.fullmatch(r"update-\d{8,}\.pt", path.name))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), then move the file into place: it appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except RuntimeError as error:  # torch.save turns a full disk into this
        raise OSError(f"{path}: cannot be written ({str(error).splitlines()[0]}); is the disk full?") from None
    finally:
        temporary.unlink(missing_ok=True)


def link_atomically(path: Path, target: Path) -> None:
    """Give a file a second name that replaces an older one."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    os.link(path, temporary)
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
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        kept = "".join(line for line in lines if line.endswith("}\n") and json.loads(line)["update"] <= run.update)
    elif saved:
        done = int(saved[-1].stem.removeprefix("update-"))
        raise RunError(f"{out} holds a run at update {done}; continue it with --resume, or choose another --out")
    if run.machine.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(log, lambda temporary: temporary.write_text(kept))
        run.log = open(log, "a", buffering=1)


def catch_signals(run: Run) -> None:
    """Ctrl-C and SIGTERM let the current update end; the second one ends the process at once."""

    def remember(number: int, _: object) -> None:
        run.received = number
        signal.signal(number, signal.SIG_DFL)

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
        run.say(
            f"{o.recipe}: {count:.1f}M parameters, {len(run.train_source):,} images, {run.updates:,} updates of "
            f"{o.batch} ({run.micro} at once, {m.world} processes), {'bf16' if m.bf16 else 'fp32'} on {m.device}, out {o.out}"
        )
    run.bar = tqdm(
        total=run.updates, initial=run.update, desc="aligning", unit="update", disable=m.rank > 0,
        smoothing=0.05, mininterval=0.5 if sys.stderr.isatty() else 30,
    )  # fmt: skip
    if not o.resume:
        run.student.target_scale = 1.0 if o.loss == "cosine" else run.validate(scale_only=True)
        run.check()
    images = data.Images(run.train_source, data.Augment(run.config.image_size, o.randaugment), o.seed)
    loader = iter(run.loader(images, batch_sampler=run.batches(run.update)))
    share, clock = o.batch // m.world, time.perf_counter()
    while run.update < run.updates and not run.stop_signal:
        batches = [next(loader) for _ in range(share // run.micro)]
        run.unreadable.add([name for _, names in batches for name in names], share)
        values = run.train_update([pixels for pixels, _ in batches])
        rate, clock = o.batch / (time.perf_counter() - clock), time.perf_counter()
        run.bar.update()
        skipped = f", {run.skipped} skipped" if run.skipped else ""
        run.bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate:.0f} images/s, {m.memory():.1f} GiB{skipped}")
        if run.update % o.log_every == 0 or run.update == run.updates:
            run.record(**values, images_per_s=round(rate, 1))
        if run.update % run.per_epoch == 0 or run.update == run.updates:
            run.check()
        elif run.update % o.save_every == 0 or run.stop_signal:
            run.save_checkpoint()
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
            run.say(f"stopped at update {run.update} of {run.updates}, saved; go on with the same command and --resume")
            sys.exit(128 + run.stop_signal)
        if run.machine.rank == 0:
            finish(run)
    except (RunError, vit.WeightsError, data.DataError, OSError) as error:
        sys.exit(f"train_align.py: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
