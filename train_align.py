"""Locality alignment, start to finish (section 3, appendix C).

    python train_align.py                                                       # the demo, minutes on a laptop
    python train_align.py --recipe clip-vit-l-336 --weights FILE --data DIR     # the paper's recipe for that backbone
    torchrun --nproc-per-node 4 train_align.py --recipe clip-vit-l-336 --weights FILE --data DIR
    python train_align.py ... --resume                                          # continue exactly, on any GPUs

Writes to --out: aligned.safetensors (encoder, head, decoder), options.json, log.jsonl, pictures/, checkpoints/. What an
update sees depends on the seed and its number alone, so in float32 any number of processes trains the same model, up
to rounding.
"""

import argparse
import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

import data
import maskembed
import masks
import pictures
import run
import vit

# --- options: the paper's numbers are the defaults --------------------------------------------------------------------

BETAS, WEIGHT_DECAY, MAX_NORM, END = (0.9, 0.95), 0.01, 1.0, 0.1  # table 6: AdamW, gradient norm, end of the cosine
FREE = "weights data val lr micro_batch precision compile checkpointing workers save_every".split()  # on --resume


def recipe(name: str, in1k: bool) -> dict[str, object]:
    """The numbers of table 6 and appendix B.1 for a backbone; the demo departs from them where its scale demands it."""
    if name == "demo":
        return {"epochs": 1, "batch": 16, "lr": 5e-3, "warmup_epochs": 0.2, "val_images": 512, "micro_batch": 64}
    large = name in vit.BACKBONES and vit.BACKBONES[name].embed_dim > 768
    epochs = (50 if name in ("moco-vit-b", "mae-vit-b", "dino-vit-b") else 25) if in1k else 5
    numbers = {"epochs": epochs, "batch": 1024, "lr": 2e-4 if large else 3e-4, "warmup_epochs": 1.0 if in1k else 0.0}
    return numbers | {"val_images": 10000, "micro_batch": {"clip-vit-l-336": 32, "siglip-so400m-384": 16}.get(name, 64)}


def flags() -> argparse.ArgumentParser:
    """The command line. What has no default here comes from the objective or the recipe."""
    parser = argparse.ArgumentParser(description="Align a pre-trained vision transformer with MaskEmbed.")
    add, count, rate = parser.add_argument, run.number(1), run.number(0, float)
    switch = {"action": argparse.BooleanOptionalAction, "default": False}
    add("--recipe", default="demo", choices=("demo", "own", *vit.BACKBONES), metavar="NAME",
        help=f"whose numbers: demo; {', '.join(vit.BACKBONES)}; own: another backbone, at 3e-4")
    add("--weights", help="the pre-trained backbone, timm's file or one that convert.py wrote")
    add("--data", help="a folder of images at any depth; without it the demo's scenes")
    add("--val", help="a folder of validation images; without it a share of --data is held out")
    add("--val-share", type=run.number(0, float, below=1), default=0.01, help="that share")
    add("--val-images", type=count, help="validate on at most this many images")
    add("--out", type=Path, default=Path("runs/align"), help="where everything is written")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --out with its options")
    # the method and its ablations (table 4, appendix B.1); the defaults are the objective's
    add("--objective", default="maskembed", choices=maskembed.OBJECTIVES, help="the method or a baseline (table 1)")
    add("--target", choices=maskembed.TARGETS, help="what the student reconstructs")
    add("--loss", choices=maskembed.LOSSES, help="the reconstruction loss")
    add("--masks", choices=("uniform", "bernoulli", "block"), help="the distribution of masks")
    add("--visible", type=run.number(0.01, float, below=1), help="share of bernoulli (0.5) and block (0.4) masks")
    add("--views", choices=("1", "2", "2-full", "3"),
        help="1: the mask; 2: and its complement; 2-full: the mask and all-ones; 3: all three")
    add("--softcap", type=rate, default=30.0, help="bound of the encoder's attention logits; 0: none")
    add("--decoder-depth", type=run.number(0), default=2, help="blocks of the decoder")
    add("--decoder-width", type=count, help="width of the decoder; default: the encoder's")
    add("--reinit-last-block", action="store_true", help="start the encoder's last block from random weights")
    add("--mix", choices=("mixup", "cutmix"), help="mix neighboring images")
    add("--randaugment", action="store_true", help="RandAugment on the training images")
    # the numbers of training; the defaults are the recipe's
    add("--in1k", action="store_true", help="the recipe for ImageNet-1k (25 or 50 epochs, warm-up), not ImageNet-21k")
    add("--epochs", type=count)
    add("--updates", type=count, help="end the schedule after at most this many updates")
    add("--batch", type=count, help="images per update, over all processes")
    add("--lr", type=rate, help="peak learning rate")
    add("--warmup-epochs", type=rate, help="linear warm-up inside the cosine")
    add("--seed", type=run.number(0), default=0, help="of samples, masks, augmentation and new weights")
    # the machine
    add("--micro-batch", type=count, help="images at a time on a process, at most; default: what fits 80 GB")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where the device has it")
    add("--compile", **switch, help="torch.compile each block")
    add("--checkpointing", **switch, help="recompute activations instead of keeping them")
    add("--workers", type=run.number(0), default=run.workers(), help="data workers of each process")
    add("--save-every", type=count, default=1000, help="updates between checkpoints; each epoch ends with one")
    return parser


def options(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict | None]:
    """The options, complete, and with --resume the newest checkpoint. A mistake in the flags exits with status 2."""
    parser = flags()
    o, state = run.parse(parser, argv, FREE)
    objective = maskembed.OBJECTIVES[o.objective]
    if o.recipe != "demo" and not (o.weights and o.data):
        source = vit.BACKBONES[o.recipe].source if o.recipe in vit.BACKBONES else "vit.save"
        parser.error(f"--recipe {o.recipe} needs --weights (a file from {source}) and --data (a folder of images)")
    for name in ("target", "masks", "views") if o.objective != "maskembed" else ():
        if getattr(o, name) not in (None, getattr(objective, name)):
            parser.error(f"--objective {o.objective} has the {name} {getattr(objective, name)}; leave --{name} out")
    o.weights = o.weights or str(Path(__file__).parent / "demo" / "teacher.safetensors")
    defaults = {name: getattr(objective, name) for name in ("target", "loss", "masks", "views")}
    for name, value in (defaults | recipe(o.recipe, o.in1k)).items():
        if getattr(o, name) is None:
            setattr(o, name, value)
    o.visible = o.visible or (0.4 if o.masks == "block" else 0.5)
    return o, state


def learning_rate(update: int, updates: int, warmup: int, peak: float) -> float:
    """Cosine from the peak to a tenth of it; a warm-up rises linearly from a tenth, inside the cosine (not shifted)."""
    share = update / warmup if update < warmup else (1 + math.cos(math.pi * update / updates)) / 2
    return peak * (END + (1 - END) * share)


def draw_masks(o: argparse.Namespace, grid: int, seed: int, update: int, samples: range) -> Tensor:
    """The views of some samples of a batch, [samples * V, N], 1 = visible (section 4.2). Each has its own generator, so
    a process draws its share alone."""
    seeds = data.generator("masks", seed, update).integers(2**62, size=samples.stop)[samples.start :: samples.step]
    count, generators = len(samples), [torch.Generator().manual_seed(one) for one in seeds.tolist()]
    if o.masks == "uniform":
        m = masks.uniform(count, grid**2, generators)
    elif o.masks == "bernoulli":
        m = masks.bernoulli(count, grid**2, o.visible, generators)
    elif o.masks == "block":
        m = masks.block(count, grid, o.visible, generators)
    else:
        m = masks.from_windows(masks.windows(count, grid, generators), grid)
    return masks.views(m, complement=o.views in ("2", "3"), full=o.views in ("2-full", "3"))


# --- images and validation --------------------------------------------------------------------------------------------

def prepare(config: vit.ViTConfig, image: Image.Image, _: np.random.Generator) -> Tensor:
    """A validation image, resized and center-cropped as the backbone expects, uint8 [3, S, S]."""
    return data.to_tensor(vit.fit(image, config))


def open_images(o: argparse.Namespace, config: vit.ViTConfig) -> tuple[data.ImageFolder, Subset]:
    """Training images, and evenly spaced validation images; without --data those of the demo's scenes."""
    if not o.data:
        from demo import scenes

        folder = run.on_first(scenes.ensure) / "images"
        parts = [(folder / "train", "all"), (o.val or folder / "val", "all")]
    elif o.val:
        parts = [(o.data, "all"), (o.val, "all")]
    elif all((Path(o.data) / part).is_dir() for part in ("train", "val")):  # ImageNet's layout
        parts = [(Path(o.data) / part, "all") for part in ("train", "val")]
    else:  # a share is held out
        parts = [(o.data, "train"), (o.data, "val")]
    train, val = run.on_first(lambda: [data.ImageFolder(*part, o.val_share) for part in parts])  # listed once for all
    chosen = np.linspace(0, len(val), min(o.val_images, len(val)), endpoint=False).astype(int).tolist()
    return train, Subset(data.Images(val, partial(prepare, config), seed=0), [(0, i) for i in chosen])


@torch.no_grad()
def validate(o: argparse.Namespace, rank: int, world: int, log: run.Log, teacher: vit.ViT, student: maskembed.Student,
             images: Subset, scale: float | None = None) -> float:
    """Before training, without `scale`: the constant that gives the targets unit variance. Later: the mean loss. The
    masks are the same every time."""
    device, config, mine = next(student.parameters()).device, teacher.config, range(rank, len(images), world)
    how = {"num_workers": o.workers, "collate_fn": data.collate, "worker_init_fn": run.ignore_signals}
    loader, step = DataLoader(Subset(images, mine), o.micro_batch, **how), o.micro_batch * world
    sums, total, bad = torch.zeros(3, dtype=torch.float64), 0.0, 0
    for first, (pixels, names) in zip(range(rank, len(images), step), loader):
        m = draw_masks(o, config.grid, 0, 2**40, range(first, first + step, world)).to(device)
        here, count = len(pixels), len(m) // o.micro_batch * len(pixels)  # the last batch is filled up: one shape
        pixels = torch.cat([pixels, pixels[:1].expand(o.micro_batch - here, -1, -1, -1)])
        x = vit.normalize(pixels.to(device), config)
        with run.autocast(o.precision, device):
            target = maskembed.teacher_targets(teacher, x, m, o.target)[:count]
            if scale is None:
                sums += maskembed.moments(target).cpu()
            else:
                loss = maskembed.reconstruction_loss(student(x, m)[:count], target * scale, m[:count], o.loss)
                total += loss.item() * here
        log.once("unreadable, replaced by another image", names)
        bad += len(names)
    total, bad, *sums = run.all_sum(total, bad, *sums.tolist())
    data.check_unreadable(int(bad), len(images))
    return maskembed.target_scale(*sums) if scale is None else total / len(images)


@torch.no_grad()
def draw_picture(path: Path, teacher: vit.ViT, encoder: vit.ViT, images: Subset, precision: str) -> None:
    """Six images, masked, and their patch tokens before and after alignment as colors on the same axes."""
    config, device = encoder.config, next(encoder.parameters()).device
    pixels = torch.stack([images[i * len(images) // 6][0] for i in range(6)])
    mask = masks.uniform(6, config.num_patches, torch.Generator().manual_seed(0))
    masked = maskembed.mask_images(pixels - 128.0, mask, config.patch_size) + 128  # hidden patches are gray
    x, tokens = vit.normalize(pixels.to(device), config), []
    for model in (teacher, encoder):
        with run.autocast(precision, device):
            last = model(x, norm=False)[:, config.num_prefix :].float()  # [6, N, D]
        tokens.append(F.layer_norm(last, last.shape[2:]))  # the two models' final norms have different scales
    whole, masked = (part.byte().permute(0, 2, 3, 1).numpy() for part in (pixels, masked))
    rows = list(zip(whole, masked, *pictures.token_colors(*tokens, config.grid)))
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures.grid(rows, ["image", "a mask", "before", "after"], side=128).save(path)


# --- the run, top to bottom -------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> None:
    """Options, models, data, begin or continue, the loop, save."""
    (o, state), (rank, world, device) = options(argv), run.setup()
    kept = run.plain(o)  # for checkpoints, without what is chosen below for this machine
    torch.manual_seed(o.seed)  # new weights: the same on every process

    # models: the teacher f is frozen; the encoder g and the decoder h are trained
    teacher = vit.load(o.weights, o.recipe if o.recipe in vit.BACKBONES else None).requires_grad_(False)
    objective = replace(maskembed.OBJECTIVES[o.objective], target=o.target)
    student = maskembed.make_student(teacher, objective, o.softcap or None, o.decoder_depth, o.decoder_width,
                                     o.reinit_last_block).to(device)
    if bf16 := run.use_bf16(o.precision, device):
        vit.round_linear_weights(teacher)
    for part in filter(None, (student.encoder, student.decoder)):
        part.checkpointing = o.checkpointing
    teacher, config = teacher.to(device), teacher.config
    optimizer = torch.optim.AdamW(student.parameters(), o.lr, BETAS, weight_decay=WEIGHT_DECAY, fused=True)

    # data: what an update sees depends on the seed and its number alone
    train, val = open_images(o, config)
    share, update = o.batch // world, state["update"] if state else 0
    o.micro_batch = run.micro_batch(share, o.micro_batch, multiple=2 if o.mix else 1)
    batches = data.Batches(len(train), o.batch, o.epochs, o.seed, rank, world, o.micro_batch, update, o.updates)
    images = data.Images(train, data.Augment(config.image_size, o.randaugment), o.seed)
    loader = iter(DataLoader(images, batch_sampler=batches, num_workers=o.workers, collate_fn=data.collate,
                             worker_init_fn=run.ignore_signals, pin_memory=device.type == "cuda"))
    updates, per_epoch = batches.updates, batches.updates_per_epoch

    # begin, or continue where the checkpoint was
    log = run.Log(o.out / "log.jsonl", rank, update)
    skipped = unreadable = in_row = 0
    if state:
        if state["images"] != len(train) or state["backbone"] != asdict(config):
            raise ValueError(f"--data or --weights: other images or another backbone than in {o.out}; give the same")
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        scale, first, last = state["scale"], state["first"], state["last"]
        skipped, in_row, unreadable = state["skipped"], state["in_row"], state["unreadable"]
    else:
        run.on_first(lambda: run.write(o.out / "options.json", json.dumps(kept, indent=2)))
        scale = 1.0 if o.loss == "cosine" else validate(o, rank, world, log, teacher, student, val)
        first = last = validate(o, rank, world, log, teacher, student, val, scale)
        log.record(update=0, epoch=0.0, val_loss=first)
    student.target_scale = scale
    if o.compile:
        torch._dynamo.config.recompile_limit = 64  # blocks are compiled for each model, batch size and gradient mode
        for block in (m for m in [*teacher.modules(), *student.modules()] if isinstance(m, vit.Block)):
            block.compile(dynamic=False)
    model = DistributedDataParallel(student, gradient_as_bucket_view=True) if world > 1 else student
    log.say(f"training images: {train.root}, {len(train):,}; {len(val):,} to validate on, of {val.dataset.source.root}")
    log.say(f"{o.recipe}: {updates:,} updates of {o.batch} ({world} x {o.micro_batch} at once), "
            f"{'bf16' if bf16 else 'fp32'} on {device.type}; validation loss {last:.4f}; into {o.out}")
    stop, bar = run.CatchSignals(), run.bar("aligning", updates, rank, update)

    while update < updates:
        # one update: the gradients of all micro-batches of all processes
        clock, lr = time.perf_counter(), learning_rate(update, updates, round(o.warmup_epochs * per_epoch), o.lr)
        optimizer.param_groups[0]["lr"] = lr
        total, bad = torch.zeros((), device=device), 0
        for i in range(share // o.micro_batch):
            pixels, names = next(loader)
            place = rank * share + i * o.micro_batch  # of this micro-batch in the global batch
            x = vit.normalize(pixels.to(device, non_blocking=True), config)
            x = data.mix(x, o.mix, o.seed, update, place) if o.mix else x
            m = draw_masks(o, config.grid, o.seed, update, range(place, place + len(x)))  # [B * V, N]
            m = (m.pin_memory() if device.type == "cuda" else m).to(device, non_blocking=True)
            last_one = i == share // o.micro_batch - 1  # gradients travel once an update
            with nullcontext() if world == 1 or last_one else model.no_sync():
                with run.autocast(o.precision, device):
                    target = maskembed.teacher_targets(teacher, x, m, o.target) * scale  # f(m(x))
                    prediction = model(x, m)  # h(m(g(x)))
                    loss = maskembed.reconstruction_loss(prediction, target, m, o.loss)  # equation 1
                (loss * len(x) / share).backward()
            total += loss.detach() * len(x) / share
            log.once("unreadable, replaced by another image", names)
            bad += len(names)
        norm = nn.utils.clip_grad_norm_(student.parameters(), MAX_NORM).item()
        loss, stopped, bad = run.all_sum(total.item() / world, stop.asked, bad)
        finite = math.isfinite(norm) and math.isfinite(loss)  # the same on every process
        if finite:
            optimizer.step()
        skipped, in_row = skipped + (not finite), 0 if finite else in_row + 1
        optimizer.zero_grad(set_to_none=True)
        update, unreadable = update + 1, unreadable + int(bad)

        rate = o.batch / (time.perf_counter() - clock)
        log.record(update=update, loss=loss, lr=lr, grad_norm=norm, skipped=skipped, unreadable=unreadable,
                   images_per_s=round(rate, 1))
        bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s", refresh=False)
        bar.update()
        run.check_finite(in_row, update)
        data.check_unreadable(unreadable, update * o.batch)

        # validate at the end of an epoch, keep a checkpoint, leave if asked to
        epoch_ends = update % per_epoch == 0 or update == updates
        if epoch_ends:
            last = validate(o, rank, world, log, teacher, student, val, scale)
            log.record(update=update, epoch=update / per_epoch, val_loss=last)
            log.say(f"update {update}: validation loss {last:.4f} (at the start {first:.4f})")
            if rank == 0:
                draw_picture(o.out / f"pictures/update-{update:08d}.png", teacher, student.encoder, val, o.precision)
        if epoch_ends or stopped or update % o.save_every == 0:
            run.save(o.out / "checkpoints", update, {
                "options": kept, "update": update, "images": len(train), "backbone": asdict(config),
                "student": student.state_dict(), "metadata": maskembed.describe(student),
                "optimizer": optimizer.state_dict(), "scale": scale, "first": first, "last": last,
                "skipped": skipped, "in_row": in_row, "unreadable": unreadable,
            })
        if stopped:
            run.leave(update, updates, stop.asked)
    bar.close()

    path = o.out / "aligned.safetensors"
    run.on_first(lambda: maskembed.save(student, path, recipe=o.recipe, objective=o.objective, updates=update))
    if rank == 0:
        print(f"""
| validation loss | start | end | end / start |
| --- | --- | --- | --- |
| {o.objective}, {o.loss} | {first:.4f} | {last:.4f} | {last / first:.3f} |

aligned model   {path}, pictures in {o.out / "pictures"}
next            python probe.py {o.weights} {path}""")


if __name__ == "__main__":
    with run.ended("train_align.py"):
        main()
