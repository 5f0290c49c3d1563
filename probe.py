"""The probing benchmark (section 4.1): what does a backbone know of the classes in an image?

This is its image-level part: a head on the backbone's tokens predicts which classes an image holds (`global-union`
labels, binary cross-entropy, macro-averaged recall at 0.5). With --finetune the backbone is trained as well, from a
file or from scratch, which is how the demo's teacher was made: with image-level labels alone.

    python probe.py BACKBONE.safetensors --task global --head linear
    python probe.py --init '{"image_size": 64, ...}' --task global --head linear --finetune --save teacher.safetensors
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
import vit
from vit import ViT, ViTConfig


@dataclass
class Options:
    """Each field is a flag; the defaults are the paper's (section B)."""

    backbone: str = ""  # a file that vit.load reads
    init: str = ""  # instead of a file: a name of vit.BACKBONES or a JSON object of ViTConfig's fields, random weights
    save: str = ""  # --finetune: where the trained backbone goes
    task: str = "global"
    head: str = "linear"
    finetune: bool = False
    scenes: int = 20000  # training scenes; another 2,000 are held out
    epochs: int = 5
    batch: int = 32
    lr: float = 1e-3
    lr_end: float = 1e-4
    warmup: int = 500  # updates; a tenth of all at most
    weight_decay: float = 0.01
    flip: bool = False  # mirror half of the training images
    precision: str = "auto"  # bf16 | fp32; auto: bf16 where the processor has instructions for it
    compile: bool = False
    seed: int = 0
    workers: int = 2
    out: str = "runs/probe"


# ----------------------------------------------------------------------------------------------------------------------
# The head and the metrics


class LinearHead(nn.Module):
    """Global task: a linear layer on the mean prefix token, or on the mean token where there is no prefix."""

    def __init__(self, config: ViTConfig, classes: int):
        super().__init__()
        self.num_prefix = config.num_prefix
        self.linear = nn.Linear(config.embed_dim, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, P + N, D] -> logits [B, classes]."""
        return self.linear((tokens[:, : self.num_prefix] if self.num_prefix else tokens).mean(1))


def global_union(labels: Tensor, classes: int) -> Tensor:
    """The set of classes of each image. labels: [B, ...] integers below `classes` -> float [B, classes] of 0 and 1."""
    present = torch.zeros(len(labels), classes)
    return present.scatter_(1, labels.flatten(1).long(), 1.0)


def class_recall(logits: Tensor, targets: Tensor) -> Tensor:
    """Recall at probability 0.5 of each class. [M, classes] both -> [classes]; nan where a class never occurs."""
    hits = ((logits > 0) & (targets > 0.5)).sum(0)
    return hits / targets.sum(0).where(targets.sum(0) > 0, torch.nan)


# ----------------------------------------------------------------------------------------------------------------------
# Training


class _Pictures(torch.utils.data.Dataset):
    """Picture and label set of each scene, as tensors."""

    def __init__(self, scenes: data.Scenes, classes: int):
        self.scenes, self.classes = scenes, classes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        scene = self.scenes[index]
        labels = global_union(torch.from_numpy(scene.labels)[None], self.classes)[0]
        return data.to_tensor(scene.image), labels


def draw(scenes: data.Scenes, classes: int, workers: int) -> tuple[Tensor, Tensor]:
    """All pictures uint8 [M, 3, S, S] and label sets [M, classes]: scenes are small, so they are drawn once and kept."""
    loader = torch.utils.data.DataLoader(_Pictures(scenes, classes), batch_size=256, num_workers=workers)
    parts = list(tqdm(loader, desc="drawing scenes", leave=False, disable=None))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def learning_rate(update: int, updates: int, options: Options) -> float:
    """Cosine from lr to lr_end over all updates; the first ones rise linearly inside it."""
    warmup = min(options.warmup, updates // 10)
    cosine = options.lr_end + (options.lr - options.lr_end) * (1 + math.cos(math.pi * update / updates)) / 2
    return cosine * min(1.0, (update + 1) / (warmup + 1))


class Model(nn.Module):
    """A backbone and its head; the backbone is frozen unless `finetune`."""

    def __init__(self, backbone: ViT, head: nn.Module, finetune: bool):
        super().__init__()
        self.backbone, self.head, self.finetune = backbone, head, finetune
        backbone.requires_grad_(finetune)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> logits [B, classes]."""
        with torch.set_grad_enabled(self.finetune and torch.is_grad_enabled()):
            tokens = self.backbone(vit.normalize(images, self.backbone.config))
        return self.head(tokens)


@torch.no_grad()
def evaluate(model: Model, images: Tensor, targets: Tensor, autocast: torch.autocast) -> dict[str, float]:
    """Loss and macro recall over a held-out set, and the recall of shapes and of colours apart."""
    with autocast:
        logits = torch.cat([model(batch) for batch in images.split(500)]).float()
    recall = class_recall(logits, targets)
    shapes, colors = recall[1:11], recall[11:19]
    return {
        "loss": F.binary_cross_entropy_with_logits(logits, targets).item(),
        "recall": recall.nanmean().item(),
        "recall_shapes": shapes.nanmean().item(),
        "recall_colors": colors.nanmean().item(),
    }


def train(options: Options) -> dict[str, float]:
    """Train head (and backbone); returns the best epoch's metrics, and saves the backbone of that epoch."""
    torch.manual_seed(options.seed)
    backbone = build(options)
    classes = 1 + len(data.Scenes.SHAPES) + len(data.Scenes.COLORS)
    size = backbone.config.image_size
    images, targets = draw(data.Scenes(options.scenes, options.seed, size), classes, options.workers)
    held_out = draw(data.Scenes(2000, options.seed + 1_000_003, size), classes, options.workers)
    model = Model(backbone, LinearHead(backbone.config, classes), options.finetune)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay, fused=True)
    bf16 = options.precision == "bf16" or (options.precision == "auto" and torch.cpu._is_avx512_bf16_supported())
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    step_model = torch.compile(model) if options.compile else model

    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    log = open(out / "log.jsonl", "a")
    per_epoch, best = len(images) // options.batch, {"recall": 0.0}
    updates = per_epoch * options.epochs
    bar = tqdm(total=updates, desc="training", unit="update", disable=None)
    for epoch in range(options.epochs):
        generator = torch.Generator().manual_seed(options.seed * 1000 + epoch)
        order = torch.randperm(len(images), generator=generator)
        for step in range(per_epoch):
            update = epoch * per_epoch + step
            chosen = order[step * options.batch : (step + 1) * options.batch]
            batch = images[chosen]
            if options.flip:
                mirrored = torch.rand(len(batch), generator=generator) < 0.5
                batch[mirrored] = batch[mirrored].flip(-1)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(update, updates, options)
            with autocast:
                loss = F.binary_cross_entropy_with_logits(step_model(batch), targets[chosen])
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}")
        metrics = {"epoch": epoch + 1, "train_loss": loss.item()} | evaluate(model.eval(), *held_out, autocast)
        model.train(options.finetune)
        print(json.dumps(metrics), file=log, flush=True)
        bar.write(", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
        if metrics["recall"] > best["recall"]:
            best = metrics
            if options.save:
                vit.save(backbone, options.save)
    bar.close()
    return best


def build(options: Options) -> ViT:
    """The backbone: from a file, or with random weights."""
    if options.backbone:
        return vit.load(options.backbone)
    if options.init in vit.BACKBONES:
        return ViT(vit.BACKBONES[options.init])
    return ViT(ViTConfig(**json.loads(options.init)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, value in vars(Options()).items():
        if isinstance(value, bool):
            parser.add_argument(f"--{name.replace('_','-')}", action="store_true")
        else:
            parser.add_argument(f"--{name.replace('_','-')}", type=type(value), default=value)
    print(train(Options(**vars(parser.parse_args()))))
