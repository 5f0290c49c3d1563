"""The probing benchmark (sections 4.1 and 4.3, appendix B): does a backbone know what is where in an image?

A small head on a frozen backbone says which classes each patch holds (`local`), or the whole image (`global`). The
score is recall at probability 0.5, averaged over classes. `leakage` needs no head: it measures how far the content of a
patch spreads into the features of other patches.

    python probe.py                                                     # the demo: the teacher and its aligned version
    python probe.py clip.safetensors aligned.safetensors --data coco    # COCO-Stuff, ADE20k, or a plain folder
    python probe.py clip-vit-b=model.safetensors --data ADEChallengeData2016 --heads transformer,linear --seeds 3
    torchrun --nproc-per-node 8 probe.py ...                            # the probes are shared among the processes
    python probe.py ... --resume                                        # keep the finished probes, train the others

Writes to --out: results.md, results.json, picture.png (figure 3), scatter.png (figure 9), and a folder for each probe
with its log.jsonl and result.json.

Shapes: B batch, M images of a data set, N patches, P prefix tokens, D width, C classes.
"""

import json
import math
import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import groupby, product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import pictures
import run
import vit

# --- options ----------------------------------------------------------------------------------------------------------

TASKS, HEADS = ("local", "global", "leakage"), ("transformer", "mlp", "linear")
INTERVENTIONS = ("none", "cls-only", "anonymous")
DEMO = (str(Path(__file__).parent / "demo" / "teacher.safetensors"), str(Path("runs", "align", "aligned.safetensors")))
LR_END, WARMUP, WEIGHT_DECAY = 1e-4, 500, 0.01  # table 3, as are the defaults of --epochs, --batch and --lr

Probe = tuple[str, str, str, int]  # task, head ("" for leakage, which has none), intervention, seed


def parse(argv: list[str] | None = None) -> Namespace:
    """The options. A mistake in them exits with status 2."""
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    add, count = parser.add_argument, run.number(1)
    add("backbones", nargs="*", default=DEMO, metavar="BACKBONE", help="files of ours, or NAME=FILE for timm's")
    add("--data", help="a folder of images with label maps; without it the demo's scenes")
    add("--val-images", type=count, help="validate on at most this many images, evenly spaced; default: all")
    add("--out", type=Path, default=Path("runs/probe"))
    add("--resume", action="store_true", help="keep the finished probes in --out, and train the others")

    add("--tasks", default="local,global", help="some of " + ",".join(TASKS))
    add("--heads", default="transformer", help="some of " + ",".join(HEADS))
    add("--interventions", default="none", help="of the local transformer: " + ",".join(INTERVENTIONS))
    add("--labels", choices=("union", "majority"), default="union", help="of a patch: all its classes, or its main one")
    add("--skip-blocks", type=run.number(0), default=0, help="leave out this many of the backbones' last blocks")

    add("--epochs", type=count, default=5)
    add("--batch", type=count, default=32, help="images per update")
    add("--lr", type=run.number(0, float), default=1e-3, help="peak learning rate")
    add("--seeds", type=count, default=1, help="train each probe this many times; report mean and standard error")
    add("--seed", type=run.number(0), default=0, help="the first seed of head and order")

    add("--show", help="validation images for the picture, such as 3,14,15; default: 6, evenly spaced")
    add("--no-cache", dest="cache", action="store_false", help="make the features anew for each batch, not once")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where the device has it")
    add("--workers", type=run.number(0), default=run.workers(), help="data workers of each process")
    o = parser.parse_args(argv)
    for name, known in {"tasks": TASKS, "heads": HEADS, "interventions": INTERVENTIONS}.items():
        if unknown := set(getattr(o, name).split(",")) - set(known):
            parser.error(f"--{name} {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
        setattr(o, name, list(dict.fromkeys(getattr(o, name).split(","))))
    if o.interventions != ["none"] and ("local" not in o.tasks or "transformer" not in o.heads):
        parser.error("--interventions are for the local task and the transformer head")
    if not all(number.isdecimal() for number in (o.show or "0").split(",")):
        parser.error(f"--show {o.show}: give numbers of images, such as 3,14,15")
    o.show = [int(number) for number in o.show.split(",")] if o.show else None
    return o


def probes(o: Namespace) -> list[Probe]:
    """Everything that is measured of each backbone."""
    chosen = []
    for task in o.tasks:
        for head in o.heads if task != "leakage" else [""]:
            able = task == "local" and head == "transformer"
            for intervention in o.interventions if able else ["none"]:
                chosen += [(task, head, intervention, o.seed + i if head else 0) for i in range(o.seeds if head else 1)]
    return chosen


def title(task: str, head: str, intervention: str, seed: int) -> str:
    """The column of the results that a probe belongs to, with those of other seeds."""
    return ", ".join(part for part in (task, head, intervention) if part not in ("", "none"))


def named(backbones: list[str]) -> dict[str, tuple[str, str | None]]:
    """What each backbone is called (like its file, or its folder and file) -> its file, and NAME where the argument is
    NAME=FILE. ValueError: two are called the same."""
    split = [text.split("=", 1)[::-1] if text.split("=")[0] in vit.BACKBONES else (text, None) for text in backbones]
    stems = [Path(path).name if Path(path).is_dir() else Path(path).stem for path, _ in split]
    names = [f"{Path(path).parent.name}-{x}" if stems.count(x) > 1 else x for (path, _), x in zip(split, stems)]
    if len(set(names)) < len(names):
        raise ValueError(f"two backbones are called {max(names, key=names.count)}: rename a file or its folder")
    return {name: tuple(pair) for name, pair in zip(names, split)}


# --- heads (appendix B): each reads the backbone's tokens [B, P + N, D], prefix first ---------------------------------

def summary(tokens: Tensor, prefix: int) -> Tensor:
    """One token for the image: the mean prefix token, or the mean token where there is no prefix. -> [B, D]."""
    return (tokens[:, :prefix] if prefix else tokens).mean(1)


class TokenHead(nn.Module):
    """`linear` and `mlp`: the same layers on each patch token (local), or on the summary token (global)."""

    def __init__(self, config: vit.ViTConfig, classes: int, task: str, hidden: int = 0):
        super().__init__()
        D, self.task, self.prefix = config.embed_dim, task, config.num_prefix
        layers = [nn.Linear(D, hidden), nn.GELU(), nn.Linear(hidden, classes)] if hidden else [nn.Linear(D, classes)]
        self.layers = nn.Sequential(*layers)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, P + N, D] -> logits [B, N, C] (local) or [B, C] (global)."""
        return self.layers(tokens[:, self.prefix :] if self.task == "local" else summary(tokens, self.prefix))


class TransformerHead(nn.Module):
    """Two blocks of the backbone's width over all its tokens.

    Local task: the outputs at the patches are classified; global: the mean output of the prefix (or of all tokens).
    The interventions (figure 9, right) hide where a token stands: with `cls-only` the head sees the class token (or the
    mean token) alone, with `anonymous` all tokens without positions. N learned latent tokens, which know their places,
    are added and make the predictions."""

    def __init__(self, config: vit.ViTConfig, classes: int, task: str, intervention: str = "none"):
        super().__init__()
        D, self.prefix, self.patches = config.embed_dim, config.num_prefix, config.num_patches
        self.task, self.intervention, self.class_token = task, intervention, config.class_token
        self.positions = nn.Parameter(0.02 * torch.randn(1, self.patches + self.prefix * (intervention == "none"), D))
        self.norm_in = nn.LayerNorm(D)
        block = vit.ViTConfig(embed_dim=D, num_heads=config.num_heads, qkv_bias=False, layer_scale=0.01, norm_eps=1e-5)
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
        return self.linear(summary(x, self.prefix) if self.task == "global" else x[:, -self.patches :])


def make_head(task: str, head: str, intervention: str, config: vit.ViTConfig, classes: int) -> nn.Module:
    """A probe's head, with random weights."""
    if head == "transformer":
        return TransformerHead(config, classes, task, intervention)
    return TokenHead(config, classes, task, hidden=1024 if head == "mlp" else 0)


# --- loss and metrics: targets are sets of classes, bool [B, N, C] or [B, C], or single ones (majority), int [B, N] ---


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy for sets of classes, cross-entropy for single ones."""
    if targets.dtype == torch.bool:
        return F.binary_cross_entropy_with_logits(logits.float(), targets.float())
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def tally(logits: Tensor, targets: Tensor) -> Tensor:
    """For each image and class, in how many patches it is found, predicted, and true: int64 [3, B, C]. Predicted: the
    probability is above 0.5 (single classes: is the highest); found: predicted and true."""
    if targets.dtype == torch.bool:
        predicted, true = logits > 0, targets
    else:
        predicted, true = (F.one_hot(x, logits.shape[-1]).bool() for x in (logits.argmax(-1), targets))
    if predicted.ndim == 2:  # an image is one place
        predicted, true = predicted[:, None], true[:, None]
    return torch.stack([x.sum(1) for x in (predicted & true, predicted, true)])


def metrics(counts: Tensor, places: int) -> dict:
    """All metrics from the tallies of a data set [3, M, C], with `places` patches an image (1: the image as a whole).

    Averages are over the classes that occur, but `accuracy`, that of yes-or-no decisions, is over all; precision leaves
    out those that are never predicted (`never_predicted`).
    `recall_by_size`: where the class fills (0, 10%], (10%, 20%], ... of its image's patches (figure 8); None: none."""
    counts = counts.cpu().numpy()
    found, predicted, true = counts.sum(1).astype(float)  # [C] each
    total, occurs = counts.shape[1] * places, true > 0
    size = -(-10 * counts[2] // places).ravel()  # [M * C], rounded up: 0 not in the image, 1 to 10 the bin
    found_in, true_in = (np.bincount(size, counts[i].ravel(), minlength=11)[1:] for i in (0, 2))
    right = (total - predicted - true + 2 * found) / total
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan: nothing to measure
        class_recall, by_size, f1 = found / true, found_in / true_in, 2 * found / (predicted + true)
    said = occurs & (predicted > 0)
    return {
        "recall": float(class_recall[occurs].mean()),
        "accuracy": float(right.mean()),
        "macro_accuracy": float(right[occurs].mean()),
        "precision": float((found[said] / predicted[said]).mean()) if said.any() else None,
        "f1": float(f1[occurs].mean()),
        "classes": int(occurs.sum()),
        "never_predicted": int((occurs & ~said).sum()),
        "class_recall": [None if math.isnan(x) else x for x in class_recall.tolist()],  # JSON has no nan
        "recall_by_size": [None if math.isnan(x) else x for x in by_size.tolist()],
    }


# --- features: the frozen backbone's tokens, which are made once, and how far they leak -------------------------------

Batches = list[list[int]]  # numbers of images
Read = Callable[[Batches, str], Iterator[tuple[Tensor, Tensor]]]  # batches, task -> tokens [B, P + N, D], targets


def features(labels: data.PatchLabels, backbone: vit.ViT, o: Namespace, autocast: torch.autocast, what: str) -> Read:
    """How to read tokens with their targets; bf16 tokens stay in memory if they take less than half of what is free."""
    config, count, classes = backbone.config, len(labels), len(labels.source.names)
    device = next(backbone.parameters()).device

    def make(batches: Batches) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        loader = DataLoader(labels, batch_sampler=batches, num_workers=o.workers, worker_init_fn=run.ignore_signals)
        for pixels, patches, whole in loader:
            with autocast:
                tokens = backbone(vit.normalize(pixels.to(device), config), skip_blocks=o.skip_blocks)
            yield tokens.bfloat16(), patches, whole

    shape = count, config.num_prefix + config.num_patches, config.embed_dim
    keep = o.cache and 2 * math.prod(shape) < free_memory() / 2
    how = f"{2 * math.prod(shape) / 2**30:.2f} GiB, {'kept in memory' if keep else 'made anew for each batch'}"
    tqdm.write(f"{what} of {count:,} images: {how}", file=sys.stderr)
    if keep:
        kept = [torch.empty(shape, dtype=torch.bfloat16)]
        kept += [torch.empty(count, *x.shape, dtype=torch.uint8) for x in labels[0][1:]]
        for numbers, batch in zip(chunks(count), make(progress(chunks(count), what))):
            for everything, part in zip(kept, batch):
                everything[numbers] = part.cpu()

    def read(batches: Batches, task: str) -> Iterator[tuple[Tensor, Tensor]]:
        for tokens, patches, whole in ([x[b] for x in kept] for b in batches) if keep else make(batches):
            packed = (whole if task == "global" else patches).to(device)
            single = task == "local" and o.labels == "majority"
            yield tokens.to(device).float(), packed[..., 0].long() if single else data.unpack(packed, classes)

    return read


def chunks(count: int) -> Batches:
    """The numbers below `count` in order, in equal parts of at most 64."""
    return [part.tolist() for part in np.array_split(np.arange(count), math.ceil(count / 64))]


def free_memory() -> float:
    """This process's share of the machine's free memory, in bytes; infinite where no /proc/meminfo tells."""
    file = Path("/proc/meminfo")
    sizes = dict(line.split()[:2] for line in file.read_text().splitlines()) if file.exists() else {}
    return 1024 * float(sizes.get("MemAvailable:", "inf")) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def progress(batches: Batches, what: str) -> tqdm:
    """The batches, with a bar on the first process."""
    return tqdm(batches, what, unit="batch", leave=False, mininterval=1, disable=os.environ.get("RANK", "0") != "0")


@torch.no_grad()
def leakage(backbone: vit.ViT, labels: data.PatchLabels, o: Namespace) -> dict[str, float]:
    """How much of a patch's content other patches' features tell, in float32; 0: each speaks of its own place only.

    In each image a random block of patches, a quarter to half of the grid a side, is replaced by the same block of the
    next image. `leakage` is the mean squared change of the features at patches outside the block over that inside, with
    the same weight for each image; `leakage_near`: at patches that touch the block, `leakage_far`: at those beyond."""
    config, device, changes = backbone.config, next(backbone.parameters()).device, []
    parts, border = chunks(len(labels)), config.image_size - config.grid * config.patch_size
    bar = progress(parts, "leakage")
    loader = DataLoader(labels, batch_sampler=bar, num_workers=o.workers, worker_init_fn=run.ignore_signals)
    for part, (pixels, *_) in zip(parts, loader):
        block = torch.zeros(len(part), 1, config.grid, config.grid)  # 1 inside, the same every time
        for i, inside in zip(part, block[:, 0]):
            rng = data.generator("leakage", i)
            height, width = rng.integers(max(1, config.grid // 4), max(1, config.grid // 2), 2, endpoint=True)
            top, left = rng.integers(0, (config.grid - height + 1, config.grid - width + 1))
            inside[top : top + height, left : left + width] = 1
        near = F.max_pool2d(block, 3, 1, 1) - block
        pasted = F.pad(F.interpolate(block, scale_factor=config.patch_size), [0, border] * 2).bool()  # [B, 1, S, S]
        pair = pixels, torch.where(pasted, pixels.roll(-1, 0), pixels)
        before, after = (backbone(vit.normalize(x.to(device), config), skip_blocks=o.skip_blocks) for x in pair)
        change = (after - before)[:, config.num_prefix :].double().square().mean(-1).cpu()  # [B, N]
        zones = [zone.flatten(1) for zone in (block, 1 - block, near, 1 - block - near)]
        changes.append(torch.stack([(change * zone).sum(1) / zone.sum(1) for zone in zones]))
    inside, *others = torch.cat(changes, 1)  # [M] each; nan where an image has no patch beyond the near ones
    ratios = [(zone.nansum() / inside[~zone.isnan()].sum()).item() for zone in others]
    return dict(zip(("leakage", "leakage_near", "leakage_far"), ratios))


# --- training a head --------------------------------------------------------------------------------------------------

def learning_rate(update: int, updates: int, peak: float) -> float:
    """Cosine from the peak to LR_END over all updates; the first ones (at most a tenth) rise linearly inside it."""
    warmup = min(WARMUP, updates // 10)
    cosine = LR_END + (peak - LR_END) * (1 + math.cos(math.pi * update / updates)) / 2
    return cosine * min(1.0, (update + 1) / (warmup + 1))


def train(head: nn.Module, probe: Probe, parts: dict, o: Namespace, autocast: torch.autocast, folder: Path) -> dict:
    """Train a head. parts: "train" and "val" -> (labels, read). ValueError: the loss is not finite.

    Returns the metrics of all "epochs" and of the "best" one by macro recall, and for the picture "maps": which classes
    that one predicts for the patches of the validation images "shown"."""
    (train_labels, read), (labels, _), (task, *_, seed) = parts["train"], parts["val"], probe
    name, per_epoch, images = f"{folder.parent.name}: {title(*probe)}", len(train_labels) // o.batch, range(len(labels))
    if not per_epoch:
        raise ValueError(f"--batch {o.batch}: there are only {len(train_labels)} training images")
    shown = o.show or np.linspace(0, len(labels), min(6, len(labels)), endpoint=False).astype(int).tolist()
    if max(shown) not in images:
        raise ValueError(f"--show {max(shown)}: there are {len(images)} validation images, from 0")
    groups, painted = kinds(labels.source)
    optimizer = torch.optim.AdamW(head.parameters(), o.lr, weight_decay=WEIGHT_DECAY, fused=True)
    update, updates, epochs, best, best_maps = 0, per_epoch * o.epochs, [], {"recall": -1.0}, []
    log = run.Log(folder / "log.jsonl", 0, update)
    for epoch in range(1, o.epochs + 1):
        order = torch.randperm(len(train_labels), generator=torch.Generator().manual_seed(seed * 1000 + epoch - 1))
        order, clock = order[: per_epoch * o.batch].view(-1, o.batch).tolist(), time.perf_counter()
        for tokens, targets in read(progress(order, f"{name}, epoch {epoch}"), task):
            optimizer.param_groups[0]["lr"] = learning_rate(update, updates, o.lr)
            with autocast:
                logits = head(tokens)
            loss = loss_of(logits, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            update, train_loss = update + 1, loss.item()
            if not math.isfinite(train_loss):
                raise ValueError(f"{name}: the loss is not finite at update {update}; lower --lr")
            rate, clock = o.batch / (time.perf_counter() - clock), time.perf_counter()
            log.record(update=update, loss=train_loss, images_per_s=round(rate, 1))
        values, maps = evaluate(head, task, *parts["val"], painted, autocast)
        values = {"epoch": epoch, "update": update, "train_loss": train_loss} | values
        for kind, members in groups.items():
            known = [values["class_recall"][c] for c in members if values["class_recall"][c] is not None]
            values[f"recall_{kind}"] = sum(known) / len(known) if known else None
        if values["recall"] > best["recall"]:
            best, best_maps = values, [maps[i].tolist() for i in shown if task == "local"]
        epochs.append({metric: value for metric, value in values.items() if not isinstance(value, list)})
        log.record(**epochs[-1])
        log.say(f"{name}: epoch {epoch}, loss {values['loss']:.4f}, recall {values['recall']:.4f}")
    classes = {"names": labels.source.names, "groups": groups}
    return {"best": best, "epochs": epochs, "maps": best_maps, "shown": shown, "classes": classes}


@torch.no_grad()
def evaluate(head: nn.Module, task: str, labels: data.PatchLabels, read: Read, painted: list[int],
             autocast: torch.autocast) -> tuple[dict, Tensor]:
    """Loss and metrics; and the class to paint each patch with, [M, N]: of those `painted` the most probable one, if
    its probability is at least 0.5 (majority: above that of class 0), else 0."""
    counts, maps, loss = [], [], 0.0
    for tokens, targets in read(chunks(len(labels)), task):
        with autocast:
            logits = head(tokens).float()
        loss += loss_of(logits, targets).item() * len(logits) / len(labels)
        counts.append(tally(logits, targets).cpu())
        value, best = logits[..., painted].max(-1)
        sure = value > (0 if targets.dtype == torch.bool else logits[..., 0])
        maps.append(torch.where(sure.cpu(), torch.tensor(painted)[best.cpu()], 0))
    return {"loss": loss} | metrics(torch.cat(counts, 1), logits.shape[1] if task == "local" else 1), torch.cat(maps)


def kinds(source: data.Segmentation) -> tuple[dict[str, list[int]], list[int]]:
    """The kinds of classes that are reported separately, and the classes that a picture shows: all of them, or, where a
    pixel has several classes (RGB label maps), the first kind."""
    groups = {kind: list(members) for kind, members in source.groups.items()}
    several = groups and len(source[0].labels) > 1
    return groups, next(iter(groups.values())) if several else [*range(1, len(source.names))]


# --- report -----------------------------------------------------------------------------------------------------------

Scores = dict[tuple[str, str], dict[str, np.ndarray]]  # (backbone, column) -> metric -> [seeds] or [seeds, C]


def text_of(metric: str, values: np.ndarray, base: np.ndarray | None = None) -> str:
    """[seeds] -> the mean, of several its standard error, and its difference to `base`: "44.31 ± 0.12 (+1.20)"."""
    raw = {"loss": 4, "leakage": 4, "leakage_near": 4, "leakage_far": 4, "classes": 1, "never_predicted": 1}
    values, digits = (values, raw[metric]) if metric in raw else (100 * values, 2)  # digits of numbers, and of percent
    if np.isnan(values.mean()):
        return "-"
    error = f" ± {values.std(ddof=1) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    change = "" if base is None else f" ({values.mean() - base.mean() * (1 if metric in raw else 100):+.{digits}f})"
    return f"{values.mean():.{digits}f}{error}{change}"


def compare(scores: Scores, names: list[str], corner: str, cells: dict[str, tuple[str, str]]) -> str:
    """A table with a row for each backbone and its differences to the first one. cells: header -> (column, metric)."""
    rows = [[name] for name in names]
    for row, (column, metric) in product(rows, cells.values()):
        base = None if row is rows[0] else scores[names[0], column][metric]
        row.append(text_of(metric, scores[row[0], column][metric], base))
    return pictures.table([corner, *cells], rows)


def most_improved(recalls: list[np.ndarray], names: list[str], classes: dict) -> list[str]:
    """Of each kind of classes the ten whose local recall [C] gains most from first to last backbone (fig. 7)."""
    before, after, gain = recalls[0], recalls[-1], recalls[-1] - recalls[0]
    parts = [f"### Classes that gain most from {names[0]} to {names[-1]}, local"]
    for kind, members in (classes["groups"] or {"classes": range(len(gain))}).items():
        best = sorted((c for c in members if not np.isnan(gain[c])), key=lambda c: -gain[c])[:10]
        rows = [[classes["names"][c], *(f"{100 * x[c]:.2f}" for x in (before, after, gain))] for c in best]
        parts.append(pictures.table([kind, names[0], names[-1], "gain"], rows))
    return parts


def scatter(scores: Scores, names: list[str], columns: list[str], out: Path) -> dict[str, float]:
    """Figure 9, left: local against global recall of each backbone, with the trend line of three or more. Returns how
    far above that line each backbone is, its relative locality."""
    axes = [next((column for column in columns if column.startswith(task)), None) for task in ("global", "local")]
    if None in axes or len(names) < 2:
        return {}
    points = {name: tuple(100 * scores[name, column]["recall"].mean() for column in axes) for name in names}
    xs, ys = np.array(list(points.values())).T
    line = tuple(np.polyfit(xs, ys, 1).tolist()) if len(names) > 2 and np.ptp(xs) > 0 else None
    pictures.scatter(points, tuple(f"{column}, macro recall %" for column in axes), line).save(out / "scatter.png")
    return {name: y - np.polyval(line, x) for name, (x, y) in points.items()} if line else {}


def picture(results: list[dict], labels: data.PatchLabels) -> Image.Image:
    """Figure 3: image, truth and each backbone's prediction, patch by patch. results: of one column and seed."""
    names, sheet = results[0]["classes"]["names"], []
    for place, number in enumerate(results[0]["shown"]):
        image, label = labels.source[int(labels.chosen[number])]
        truth = data.majority(label, labels.patch, len(names), unlabeled=labels.labels == "majority").tolist()
        sheet.append([image.resize((192, 192), Image.Resampling.BICUBIC), truth, *(x["maps"][place] for x in results)])
    classes = sorted({c for _, *row in sheet for cells in row for c in cells} - {0})
    hsv = [f"hsv({360 * i / len(classes):.2f}, {60 + 40 * (i % 2)}%, 100%)" for i in range(len(classes))]
    colors = {c: ImageColor.getrgb(text) for c, text in zip(classes, hsv)}
    painted = [[image, *(pictures.paint(image, cells, colors) for cells in row)] for image, *row in sheet]
    whole = pictures.grid(painted, ["image", "truth", *(x["backbone"] for x in results)])
    return pictures.legend(whole, {names[c]: color for c, color in colors.items()})


def report(o: Namespace, root: str, names: list[str]) -> None:
    """Write results.md, results.json and the pictures of all probes of this call; print the table."""
    results, scores, columns = [], {}, list(dict.fromkeys(title(*probe) for probe in probes(o)))
    for name, probe in product(names, probes(o)):
        results.append({"backbone": name} | json.loads(result_file(o, name, probe).read_text()))
        shares = results[-1]["best"].get("recall_by_size", []) if probe[0] == "local" else []
        bins = {f"{10 * i}-{10 * i + 10}%": recall for i, recall in enumerate(shares)}
        for metric, value in (results[-1]["best"] | bins).items():
            scores.setdefault((name, title(*probe)), {}).setdefault(metric, []).append(value)
    scores = {key: {m: np.array(x, float) for m, x in found.items()} for key, found in scores.items()}  # None: nan
    cells = {column: (column, "leakage" if column == "leakage" else "recall") for column in columns}
    text, locality = compare(scores, names, "macro recall, %", cells), scatter(scores, names, columns, o.out)
    if locality:
        above = ", ".join(f"{name} {value:+.2f}" for name, value in locality.items())
        text += f"\n\nLocal recall above the trend line: {above}"
    parts = ["# Probes", text, "0-10% and so on: recall where a class fills this share of the patches of its image."]
    for column in columns:
        metrics = [metric for metric, values in scores[names[0], column].items() if values.ndim == 1]
        cells = {m.replace("_", " "): (column, m) for m in metrics if m not in ("epoch", "update", "train_loss")}
        parts += [f"### {column}", compare(scores, names, "backbone", cells)]
    first = next((x for x in results if x.get("maps")), None)  # of the first local column
    if first:
        same = [x for x in results if all(x.get(key) == first[key] for key in ("probe", "shown"))]
        size, patch = first["geometry"]
        labels = data.PatchLabels(data.Segmentation(root, "val", size), patch, o.labels, o.val_images)
        picture(same, labels).save(o.out / "picture.png")
        local = next(column for column in columns if column.startswith("local"))
        recalls = [scores[name, local]["class_recall"].mean(0) for name in names]
        parts += most_improved(recalls, names, first["classes"]) if len(names) > 1 else []
    everything = json.dumps({"relative_locality": locality, "results": results})
    run.write(o.out / "results.json", everything)
    run.write(o.out / "results.md", "\n\n".join(parts) + "\n")
    print(f"\n{text}\n\nall metrics and pictures: {', '.join(str(path) for path in sorted(o.out.glob('*.*')))}")


# --- the benchmark, top to bottom -------------------------------------------------------------------------------------

def result_file(o: Namespace, name: str, probe: Probe) -> Path:
    """Where a finished probe's result is written."""
    return o.out / name / f"{title(*probe).replace(', ', '-')}-seed-{probe[-1]}" / "result.json"


def unfinished(o: Namespace, root: str, backbones: dict) -> list[tuple[str, Probe, dict]]:
    """What has no result yet: backbone, probe, and all else that its result depends on. ValueError: there are results
    without --resume, or they depend on other options or on another file."""
    options = {name: getattr(o, name) for name in ("val_images", "labels", "skip_blocks", "epochs", "batch", "lr")}
    todo = []
    for (name, (path, _)), probe in product(backbones.items(), probes(o)):
        status = os.stat(vit.find_weights(Path(path)))
        now = {"data": os.path.realpath(root), **options, "backbone": [status.st_size, status.st_mtime_ns]}
        file = result_file(o, name, probe)
        then = json.loads(file.read_text())["settings"] if file.exists() else {}
        if not then:
            todo.append((name, probe, now))
        elif not o.resume:
            raise ValueError(f"{o.out} holds probes already; keep them with --resume, or choose another --out")
        elif other := [key for key in now if then[key] != now[key]]:
            raise ValueError(f"{file} was made with another {' and '.join(other)}; give the same, or another --out")
    return todo


def main(argv: list[str] | None = None) -> None:
    """The benchmark from start to end."""
    o = parse(argv)
    rank, world, device = run.setup(timeout=timedelta(days=100))  # processes wait for the longest probes
    autocast, backbones = run.autocast(o.precision, device), named(o.backbones)
    if o.backbones == DEMO and not Path(DEMO[1]).exists():
        raise ValueError(f"{DEMO[1]}: is not there yet; make it with python train_align.py")
    root = o.data
    if not root:
        from demo import scenes

        root = str(run.on_first(scenes.ensure))

    # each process takes its share of the probes, those of one backbone together
    todo = run.on_first(lambda: unfinished(o, root, backbones))
    share = todo[rank * len(todo) // world : (rank + 1) * len(todo) // world]
    for name, group in groupby(share, lambda job: job[0]):
        group = list(group)
        backbone = vit.load(*backbones[name]).requires_grad_(False).to(device)
        config = backbone.config
        if o.skip_blocks > config.depth:
            raise ValueError(f"--skip-blocks {o.skip_blocks}: {name} has {config.depth} blocks")
        # images with their labels, and the frozen backbone's tokens
        parts, heads = {}, any(head for _, (_, head, *_), _ in group)
        for part, most in (("train", None), ("val", o.val_images)):
            source = data.Segmentation(root, part, config.image_size)
            labels = data.PatchLabels(source, config.patch_size, o.labels, most)
            read = features(labels, backbone, o, autocast, f"{name}: {part} features") if heads else None
            parts[part] = labels, read
        for _, probe, settings in group:
            file, (task, head, intervention, seed) = result_file(o, name, probe), probe
            result = {"settings": settings, "geometry": [config.image_size, config.patch_size]}
            result["probe"] = {"task": task, "head": head, "intervention": intervention, "seed": seed}
            if task == "leakage":
                result["best"] = leakage(backbone, labels, o)
            else:
                torch.manual_seed(seed)
                model = make_head(task, head, intervention, config, len(source.names)).to(device)
                result |= train(model, probe, parts, o, autocast, file.parent)
            run.write(file, json.dumps(result))

    run.barrier()
    if rank == 0:
        report(o, root, list(backbones))


if __name__ == "__main__":
    with run.ended("probe.py"):
        main()
