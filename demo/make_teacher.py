"""Train the demo's teacher: a small ViT that is told what is in each picture, and never where.

    python demo/make_teacher.py demo/teacher.safetensors

An MLP names the shapes and colors that are present, from the mean of all tokens. In the last two epochs the tokens of
an image are also pulled together, so that each describes the whole image, as those of large models are suspected to;
by themselves the tokens of so small a model stay local. Recall on unseen scenes is printed after each epoch. The
backbone is written without the MLP.
"""

import argparse
import math
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import run
import vit
from demo import scenes

CONFIG = vit.ViTConfig(image_size=64, patch_size=8, embed_dim=96, depth=6, num_heads=3, crop_pct=1.0)
LR, LR_END, WARMUP, MAX_NORM = 1e-3, 1e-4, 500, 1.0
PULLED, PULL = 2, 0.3  # epochs at the end in which an image's tokens are pulled together, and the weight of that loss
UNSEEN_SEED = 1_000_003  # of the scenes that measure recall, which neither training nor the default scenes have


def read_scene(seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """A scene's pixels, uint8 [3, S, S], and which classes are in it, bool [18]: 10 shapes and 8 colors."""
    scene = scenes.make(seed, index, CONFIG.image_size)
    there = {name for thing in scene.objects for name in (thing.shape, thing.color)}
    return np.asarray(scene.image).transpose(2, 0, 1), np.array([name in there for name in scenes.CLASSES[1:]])


def make_scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scenes in memory: images uint8 [count, 3, S, S] and labels bool [count, 18]."""
    images = np.empty((count, 3, CONFIG.image_size, CONFIG.image_size), np.uint8)
    labels = np.empty((count, len(scenes.CLASSES) - 1), bool)
    with ProcessPoolExecutor() as pool:
        made = pool.map(partial(read_scene, seed), range(count), chunksize=64)
        for i, (image, there) in enumerate(tqdm(made, "making scenes", count, disable=None)):
            images[i], labels[i] = image, there
    return torch.from_numpy(images), torch.from_numpy(labels)


def sine_positions(grid: int, width: int) -> Tensor:
    """Position embeddings as MAE and MoCo v3 have them, sines and cosines of row and column: [1, grid^2, width]."""
    bands = 100.0 ** -torch.linspace(0, 1, width // 4)
    place = torch.cartesian_prod(*2 * [torch.arange(grid)])[:, :, None] * bands  # [N, 2, width / 4]
    return torch.cat([place.sin(), place.cos()], 2).flatten(1)[None]


def predict(backbone: vit.ViT, head: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images uint8 [B, 3, S, S] -> logits [B, 18], from the mean token; and all tokens [B, T, D]."""
    with run.autocast("auto", images.device):
        tokens = backbone(vit.normalize(images, CONFIG))
        return head(tokens.mean(1)).float(), tokens.float()


@torch.no_grad()
def recall(backbone: vit.ViT, head: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """The mean over shapes, and over colors, of the share of a class's images in which it is named."""
    said = torch.cat([predict(backbone, head, part)[0] > 0 for part in images.split(500)])
    each = (said & labels).sum(0) / labels.sum(0)
    return each[: len(scenes.SHAPES)].mean().item(), each[len(scenes.SHAPES) :].mean().item()


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="where the backbone is written")
    parser.add_argument("--count", type=int, default=90_000, help="scenes to train on")
    parser.add_argument("--unseen", type=int, default=2000, help="scenes to measure recall on")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of scenes, weights and order")
    o = parser.parse_args(argv)
    if o.file.suffix != ".safetensors":
        parser.error(f"{o.file}: must end in .safetensors")

    torch.manual_seed(o.seed)
    images, labels = make_scenes(o.count, o.seed)
    unseen = make_scenes(o.unseen, o.seed + UNSEEN_SEED)
    backbone, width = vit.ViT(CONFIG), CONFIG.embed_dim
    head = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, labels.shape[1]))
    with torch.no_grad():  # small random ones would fade, as the mean token does not need to know where things are
        backbone.pos_embed[:, CONFIG.num_prefix :] = sine_positions(CONFIG.grid, CONFIG.embed_dim)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, LR, weight_decay=0.01)
    updates = o.count // o.batch * o.epochs
    warmup = min(WARMUP, updates // 5)
    update, bar = 0, tqdm(total=updates, unit=" updates", disable=None)
    for epoch in range(o.epochs):
        for rows in torch.randperm(o.count)[: o.count // o.batch * o.batch].view(-1, o.batch):
            rate = LR_END + (LR - LR_END) * (1 + math.cos(math.pi * update / updates)) / 2
            optimizer.param_groups[0]["lr"] = rate * min(1, (update + 1) / (warmup + 1))
            mirrored = torch.rand(o.batch, 1, 1, 1) < 0.5
            x = torch.where(mirrored, images[rows].flip(-1), images[rows])
            logits, tokens = predict(backbone, head, x)
            loss = F.binary_cross_entropy_with_logits(logits, labels[rows].float())
            if epoch >= o.epochs - PULLED:  # the share of the tokens' variance that lies within images
                loss = loss + PULL * tokens.var(1).mean() / tokens.flatten(0, 1).var(0).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
            update += 1
            bar.update()
            bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
        shapes, colors = recall(backbone, head, *unseen)
        tqdm.write(f"epoch {epoch + 1}: loss {loss.item():.4f}, recall of shapes {shapes:.1%}, of colors {colors:.1%}")
        vit.save(backbone, o.file)


if __name__ == "__main__":
    main()
