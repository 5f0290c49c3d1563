"""Pointing: boxes and masks decoded from a language model's hidden states (REF-VLM, arXiv 2503.07413).

    In: Where are all red objects? Point with boxes.
    Out: <Phrase>red object</Phrase>(<Unit>box</Unit>[0]<REF>[1]<REF>)

The language model writes triplets: what it means, what it points with, and a <REF> for each thing. Its last hidden
states at the <REF>s are queries to a small decoder, which looks at the image's patches and finds the places. The other
way round, a region of the image stands in a question as `<region>`: ten tokens made of the patches inside. Needs only
torch, numpy and pillow; copy it.

Shapes: G triplets, n <REF>s of each, padded; B images, N patches, D the backbone's width, E the language model's,
W the decoder's. Places are shares of the image's sides, x before y.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

# --- text -------------------------------------------------------------------------------------------------------------

REF, REGION = "<REF>", "<region>"
ADDED = ("<Task>", "</Task>", "<Unit>", "</Unit>", "<Phrase>", "</Phrase>", REF, REGION)  # tokens new to the vocabulary
UNITS = ("box", "mask")
TRIPLET = re.compile(r"<Phrase>(.*?)</Phrase>\(<Unit>(.*?)</Unit>((?:\[\d+\]<REF>)+)\)", re.DOTALL)
PARTS = 3  # a region is cut into 3 x 3 parts
TOKENS = PARTS**2 + 1  # that stand for a region: one of each part, one of its shape


class Triplet(NamedTuple):
    """What is meant, what to point with, and which <REF>s of the text stand for the things. `places`, once found, are
    boxes [n, 4] (x1, y1, x2, y2) or masks bool [n, H, W]."""

    name: str
    unit: str
    refs: range
    places: Tensor | None = None


def write(name: str, unit: str, count: int) -> str:
    """A triplet as text."""
    return f"<Phrase>{name}</Phrase>(<Unit>{unit}</Unit>{''.join(f'[{i}]{REF}' for i in range(count))})"


def read(text: str) -> list[Triplet]:
    """The triplets in a text."""
    triplets = []
    for match in TRIPLET.finditer(text):
        first, (name, unit, refs) = text[: match.start()].count(REF), match.groups()
        triplets.append(Triplet(name, unit, range(first, first + refs.count(REF))))
    return triplets


def plan(text: str) -> str:
    """An answer with REF-VLM's announcement of its triplets before it."""
    lines = [f"- Name: {name} Unit: {unit} Num: {len(refs)}\n" for name, unit, refs, _ in read(text)]
    what = f"(True). Class name, target unit and number:\n{''.join(lines)}" if lines else "(False).\n"
    return f"<Task>\nUnit decode {what}</Task>\n{text}"


# --- what a conversation points at ------------------------------------------------------------------------------------

class Places(NamedTuple):
    """What a conversation points at: unit and places of each triplet, and the regions in its questions."""

    triplets: list[tuple[str, Tensor]]  # boxes [n, 4] as center and size; masks [n, side, side]
    regions: Tensor  # [r, N], the share of each patch that is inside


def encode(conversation: Sequence[dict[str, str]], targets: dict[str, list], size: tuple[int, int],
           config: "PointerConfig") -> Places:  # fmt: skip
    """What a conversation about an image `size` = (W, H) points at. targets: of each unit in the order of the <REF>s,
    and regions in the order of the <region>s (see `place` and `region`). ValueError: they do not fit the texts."""
    texts, left, triplets = [turn["value"] for turn in conversation], dict(targets), []
    regions = [region(one, size, config.grid) for one in left.pop("region", [])]
    if len(regions) != sum(text.count(REGION) for text in texts) or any(REGION in text for text in texts[1::2]):
        raise ValueError(f"it has {len(regions)} regions; it needs one for each {REGION} in questions, none in answers")
    for name, unit, refs, _ in (triplet for text in texts[1::2] for triplet in read(text)):
        if unit not in config.units:
            raise ValueError(f"{name!r} has the unit {unit!r}, which is not one of {', '.join(config.units)}")
        mine, left[unit] = left.get(unit, [])[: len(refs)], left.get(unit, [])[len(refs) :]
        if len(mine) < len(refs):
            raise ValueError(f"it has fewer {unit} targets than {REF}s")
        triplets.append((unit, torch.stack([place(unit, one, size, config) for one in mine])))
    if more := [unit for unit, places in left.items() if places]:
        raise ValueError(f"it has more {more[0]} targets than {REF}s")
    if sum(len(places) for _, places in triplets) != sum(text.count(REF) for text in texts):
        raise ValueError(f"a {REF} stands outside of <Phrase>name</Phrase>(<Unit>unit</Unit>[0]{REF})")
    return Places(triplets, torch.stack(regions) if regions else torch.zeros(0, config.grid**2))


def place(unit: str, value: Sequence[float] | np.ndarray, size: tuple[int, int], config: "PointerConfig") -> Tensor:
    """A box [x1, y1, x2, y2] or a mask bool [H, W] in pixels, as a target for the decoder (see `Places`).
    ValueError: the box is empty or not inside the image."""
    if unit == "mask":
        return (shares(value, config.side) >= 0.5).float()
    x1, y1, x2, y2 = value
    if not (-1 <= x1 < x2 <= size[0] + 1 and -1 <= y1 < y2 <= size[1] + 1):  # some data sets' pass the edge by a pixel
        raise ValueError(f"the box {value} is empty or not inside its image, {size[0]} x {size[1]}")
    x1, y1, x2, y2 = (min(max(side / full, 0), 1) for side, full in zip(value, (*size, *size)))
    return torch.tensor([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])


def shares(mask: np.ndarray, side: int) -> Tensor:
    """Which share of each cell a mask [H, W] covers, [side, side]."""
    picture = Image.fromarray(mask.astype(np.float32)).resize((side, side), Image.Resampling.BOX)
    return torch.from_numpy(np.array(picture))


def region(value: Sequence | np.ndarray, size: tuple[int, int], grid: int) -> Tensor:
    """A region as the share of each patch that is inside, [N]. value: a mask bool [H, W], or in pixels a box
    [x1, y1, x2, y2], a point [x, y] or a scribble [[x, y], [x, y], ...]. ValueError: it is empty."""
    mask = value
    if not isinstance(value, np.ndarray):
        picture, points = Image.new("1", size), np.array(value, float).round().astype(int).reshape(-1, 2)
        if np.ndim(value) == 1 and len(points) == 2:
            ImageDraw.Draw(picture).rectangle([*points[0], *np.maximum(points[1] - 1, points[0])], 1)
        else:
            ImageDraw.Draw(picture).line([tuple(point) for point in (*points, points[-1])], 1, width=3)
        mask = np.asarray(picture)
    if not mask.any():
        raise ValueError("a region is empty or outside of its image")
    return shares(mask, grid).flatten()


# --- the model --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class PointerConfig:
    """Everything needed to build a `Pointer`."""

    units: Sequence[str]  # some of UNITS
    vision: int  # D
    language: int  # E
    grid: int  # patches along each side
    width: int = 256
    depth: int = 3

    def __post_init__(self) -> None:
        if self.width % 32:
            raise ValueError(f"a decoder of width {self.width}: give a multiple of 32, the width of its heads")

    @property
    def side(self) -> int:
        """Of a mask: four times finer than the patches."""
        return 4 * self.grid


def sine_positions(grid: int, width: int) -> Tensor:
    """Sines and cosines of each patch's row and column, [N, W]."""
    place = (torch.arange(grid) + 0.5) / grid
    angles = place[:, None] * torch.pi * 2 ** torch.linspace(0, np.log2(grid), width // 4)
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # [grid, W / 2]
    rows, columns = waves[:, None].expand(-1, grid, -1), waves[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)


class Block(nn.Module):
    """Pre-norm. The queries of a triplet attend to each other and to the patches."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, width // 32, batch_first=True)
        self.mlp = mlp(width, 4 * width, width)

    def forward(self, x: Tensor, patches: Tensor, hidden: Tensor) -> Tensor:
        """x [G, n, W], patches [G, N, W]; hidden [G, n + N], true where padding is -> [G, n, W]."""
        q = self.norm1(x)
        seen = torch.cat([q, patches], 1)
        x = x + self.attn(q, seen, seen, key_padding_mask=hidden, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with GELU between them."""
    layers = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.GELU())]
    return nn.Sequential(*layers[:-1])


class Pointer(nn.Module):
    """Finds places in an image from hidden states, and turns regions of an image into tokens."""

    def __init__(self, config: PointerConfig):
        super().__init__()
        self.config, D, E, W = config, config.vision, config.language, config.width
        self.patches = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, W))
        self.query = nn.Linear(E, W)
        self.blocks = nn.ModuleList(Block(W) for _ in range(config.depth))
        self.norm = nn.LayerNorm(W)
        if "box" in config.units:
            self.box = mlp(W, W, W, 4)
        if "mask" in config.units:
            self.mask, self.pixels = mlp(W, W, W // 4), nn.Linear(W, 16 * (W // 4))
        self.region, self.outline = nn.Linear(D, E), nn.Linear(config.grid**2, E)
        self.order = nn.Parameter(0.02 * torch.randn(TOKENS, E))

    def forward(self, states: Sequence[Tensor], features: Tensor, image: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Queries [G, n, W] and patches [G, N, W]. states: of each triplet [n, E]. features: [B, N, D] of the images;
        image: of each triplet, its image."""
        x = self.query(pad_sequence(list(states), True))
        counts = torch.tensor([len(one) for one in states], device=x.device)
        positions = sine_positions(self.config.grid, self.config.width).to(x)
        patches = (self.patches(features) + positions)[list(image)]
        hidden = torch.arange(x.shape[1], device=x.device) >= counts[:, None]
        hidden = F.pad(hidden, (0, patches.shape[1]))  # patches are all there
        for block in self.blocks:
            x = block(x, patches, hidden)
        return self.norm(x), patches

    def places(self, unit: str, x: Tensor, patches: Tensor) -> Tensor:
        """Places of one unit, float32: boxes [G, n, 4] as center and size, or logits of masks [G, n, side, side]."""
        if unit == "box":
            return self.box(x).float().sigmoid()
        grid = self.config.grid
        pixels = self.pixels(patches).mT.unflatten(2, (grid, grid))  # [G, 16 W / 4, grid, grid]
        return torch.einsum("gnc,gcyx->gnyx", self.mask(x), F.pixel_shuffle(pixels, 4)).float()

    def find(self, triplet: Triplet, states: Tensor, features: Tensor, size: tuple[int, int]) -> Tensor | None:
        """The places of a triplet in pixels of an image `size` = (W, H), as `Triplet` holds them; None if the model has
        no decoder for its unit. states: of all <REF>s of the text, [R, E]; features: of its image, [N, D]."""
        if triplet.unit not in self.config.units or triplet.refs.stop > len(states):
            return None
        states = states[triplet.refs.start : triplet.refs.stop]
        found = self.places(triplet.unit, *self([states], features[None], [0]))[0]
        if triplet.unit == "box":
            return corners(found).clamp(0, 1) * found.new_tensor([*size, *size])
        return F.interpolate(found[None], size[::-1], mode="bilinear")[0] > 0

    def loss(self, states: Sequence[Tensor], features: Tensor, image: Sequence[int], units: Sequence[str],
             places: Sequence[Tensor]) -> Tensor:  # fmt: skip
        """The summed loss of each unit's places, float32 [units]. units and places of each triplet: see `Places`."""
        x, patches = self(states, features, image)
        total = torch.zeros(len(self.config.units), device=x.device)
        for number, unit in enumerate(self.config.units):
            if of := [g for g, other in enumerate(units) if other == unit]:
                true = pad_sequence([places[g].to(x.device, non_blocking=True) for g in of], True)
                costs = COSTS[unit](self.places(unit, x[of], patches[of]), true)  # [G, n, n]
                for g, cost, copy in zip(of, costs, costs.detach().cpu()):
                    n = len(places[g])  # the rest is padding
                    total[number] += cost[range(n), match(copy[:n, :n])].sum()
        return total

    def prompts(self, regions: Tensor, features: Tensor) -> Tensor:
        """Regions [r, N] of images with features [r, N, D] -> the tokens that stand for them, [r, 10, E]. A part's
        token is the mean of its patches, zero where the region has none there."""
        r, grid = len(regions), self.config.grid
        maps = regions.view(r, grid, grid)
        parts = [third(maps.sum(axis) > 0) for axis in (2, 1)]  # [r, 3, grid]: rows, columns
        weights = torch.einsum("ray,rbx,ryx->rabyx", *parts, maps).flatten(3).flatten(1, 2)  # [r, 9, N]
        means = weights @ features.float() / weights.sum(2, keepdim=True).clamp(min=1e-6)
        tokens = torch.cat([self.region(means.to(features)), self.outline(regions.to(features))[:, None]], 1)
        return tokens + self.order


def third(inside: Tensor) -> Tensor:
    """Lines [r, grid] that a region touches -> [r, 3, grid], the first, second and last third of their extent."""
    first, count = inside.int().argmax(1, keepdim=True), inside.shape[1]
    last = count - inside.flip(1).int().argmax(1, keepdim=True)
    part = (torch.arange(count, device=inside.device) + 0.5 - first) * PARTS / (last - first)
    return torch.stack([(part >= i) & (part < i + 1) for i in range(PARTS)], 1).float()


# --- losses -----------------------------------------------------------------------------------------------------------

# Each gives the costs [G, n, n] of all pairs of places found and true ones, both [G, n, ...]: the order of the things
# in a triplet is free, so the loss is the least sum over one-to-one pairs.


def box_cost(found: Tensor, true: Tensor) -> Tensor:
    """5 L1 + 2 (1 - GIoU) of boxes given by center and size."""
    a, b = found[:, :, None], true[:, None]
    return 5 * (a - b).abs().sum(-1) + 2 * (1 - giou(corners(a), corners(b)))


def corners(boxes: Tensor) -> Tensor:
    """Center and size -> x1, y1, x2, y2."""
    center, size = boxes.chunk(2, -1)
    return torch.cat([center - size / 2, center + size / 2], -1)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalized IoU of boxes x1, y1, x2, y2 (Rezatofighi et al., 2019): IoU - (hull - union) / hull."""
    area = lambda box: (box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1)
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    both = area(torch.cat([torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])], -1))
    union, hull = area(a) + area(b) - both, area(torch.cat([low, high], -1))
    return both / union.clamp(min=1e-9) - (hull - union) / hull.clamp(min=1e-9)


def mask_cost(logits: Tensor, true: Tensor) -> Tensor:
    """20 focal loss (alpha 0.25, gamma 2; the mean over pixels) + dice loss. Both are sums over pixels of products of
    something found and something true."""
    x, t = logits.flatten(2), true.flatten(2)  # [G, n, side^2]
    p = x.sigmoid()
    inside, outside = 0.25 * (1 - p) ** 2 * F.softplus(-x), 0.75 * p**2 * F.softplus(x)
    focal = (inside @ t.mT + outside @ (1 - t).mT) / x.shape[2]
    dice = 1 - (2 * p @ t.mT + 1) / (p.sum(2)[:, :, None] + t.sum(2)[:, None] + 1)
    return 20 * focal + dice


COSTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"box": box_cost, "mask": mask_cost}


def match(cost: Tensor) -> list[int]:
    """The column for each row of costs [n, n] with the least sum (the Hungarian method, shortest augmenting paths)."""
    n, cost = len(cost), cost.numpy()
    u, v, row_of = np.zeros(n + 1), np.zeros(n + 1), np.full(n + 1, -1)  # potentials; column n is where a path starts
    for row in range(n):
        row_of[n], column = row, n
        least, came, done = np.full(n, np.inf), np.full(n, n), np.zeros(n + 1, bool)
        while row_of[column] >= 0:
            done[column] = True
            slack = cost[row_of[column]] - u[row_of[column]] - v[:n]
            nearer = ~done[:n] & (slack < least)
            least[nearer], came[nearer] = slack[nearer], column
            step = np.where(done[:n], np.inf, least).min()
            u[row_of[done]] += step
            v[done] -= step
            least[~done[:n]] -= step
            column = int(np.where(done[:n], np.inf, least).argmin())
        while column != n:  # turn the path around
            row_of[column], column = row_of[came[column]], came[column]
    order = np.empty(n, int)
    order[row_of[:n]] = np.arange(n)
    return order.tolist()
