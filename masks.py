"""The mask distributions of MaskEmbed (section 3.2, appendix B.1). Needs only torch; copy it.

A mask is float [batch, patches], 1 = visible, 0 = hidden, patches row by row. The random ones take a CPU generator: its
state gives the same masks on every machine.
"""

import math

import torch
from torch import Tensor


def uniform(batch: int, patches: int, generator: torch.Generator | None = None) -> Tensor:
    """The paper's choice: the number of visible patches is uniform on {0, ..., N}, and the set uniform given its size.

    p(m) = 1 / (C(N, |m|) (N + 1)). Of N + 1 uniform random numbers u_0, ..., u_N, patch i is visible if u_i > u_0: the
    rank of u_0 is uniform, and so is the set of those above it.
    """
    u = torch.rand(batch, patches + 1, generator=generator, dtype=torch.float64)
    return (u[:, 1:] > u[:, :1]).float()


def bernoulli(batch: int, patches: int, visible: float, generator: torch.Generator | None = None) -> Tensor:
    """Each patch is visible with probability `visible`, independently of the others."""
    return (torch.rand(batch, patches, generator=generator, dtype=torch.float64) < visible).float()


def block(batch: int, grid: int, visible: float = 0.4, generator: torch.Generator | None = None) -> Tensor:
    """BEiT's block masks, inverted: random rectangles are revealed until at least a fraction `visible` is visible.

    The area of a rectangle is uniform between 16 and visible * N patches, its aspect ratio uniform in [0.3, 1/0.3]. A
    mask is never empty. grid: patches along each side.
    """
    if not 0 < visible <= 1:
        raise ValueError(f"visible is {visible}; a block mask needs a fraction in (0, 1]")
    target = visible * grid**2
    masks = torch.zeros(batch, grid, grid)
    for mask in masks:
        while mask.sum() < target:
            top, left, height, width = _rectangle(grid, target, generator)
            mask[top : top + height, left : left + width] = 1
    return masks.flatten(1)


def _rectangle(grid: int, largest: float, generator: torch.Generator | None) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random rectangle; a shape that does not fit is drawn again."""
    smallest = min(16.0, largest)  # a grid of fewer than 40 patches has no room for 16
    while True:
        u = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        area, aspect = smallest + (largest - smallest) * u[0], 0.3 + (1 / 0.3 - 0.3) * u[1]
        height, width = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
        if height <= grid and width <= grid:
            return int(u[2] * (grid - height + 1)), int(u[3] * (grid - width + 1)), height, width


def windows(batch: int, grid: int, generator: torch.Generator | None = None) -> Tensor:
    """CLIPSelf's crops (appendix B.3), 3 to 14 patches on each side: top, left, height and width, [batch, 4]."""
    u = torch.rand(batch, 4, generator=generator, dtype=torch.float64)
    smallest, largest = min(3, grid), min(14, grid)
    size = smallest + (u[:, :2] * (largest - smallest + 1)).long()  # height, width
    return torch.cat([(u[:, 2:] * (grid - size + 1)).long(), size], 1)


def from_windows(boxes: Tensor, grid: int) -> Tensor:
    """Masks in which only the windows are visible: [batch, 4] -> [batch, grid * grid]."""
    (top, left, height, width), place = boxes.T[..., None], torch.arange(grid)  # [batch, 1] each, [grid]
    rows = (place >= top) & (place < top + height)  # [batch, grid]
    columns = (place >= left) & (place < left + width)
    return (rows[:, :, None] & columns[:, None]).flatten(1).float()


def views(m: Tensor, complement: bool = True, full: bool = True) -> Tensor:
    """The V views of each image, adjacent: m, its complement 1 - m, all ones. [batch, N] -> [batch * V, N]."""
    parts = [m] + [1 - m] * complement + [torch.ones_like(m)] * full
    return torch.stack(parts, 1).flatten(0, 1)
