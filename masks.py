"""The mask distributions of MaskEmbed (section 4.2, appendix B.1). Needs only torch; copy it.

A mask is float [batch, patches], 1 = visible, 0 = hidden, patches row by row. The random ones take a CPU generator, or
one for each mask: their states give the same masks on every machine.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

Random = Generator | Sequence[Generator] | None


def rand(batch: int, count: int, generator: Random) -> Tensor:
    """Uniform numbers from 0 to 1, float64 [batch, count]."""
    if not isinstance(generator, Sequence):
        return torch.rand(batch, count, generator=generator, dtype=torch.float64)
    return torch.stack([torch.rand(count, generator=one, dtype=torch.float64) for one in generator])


def uniform(batch: int, patches: int, generator: Random = None) -> Tensor:
    """The paper's choice: the number of visible patches is uniform on {0, ..., N}, and the set uniform given its size.

    p(m) = 1 / (C(N, |m|) (N + 1)). Of N + 1 uniform random numbers u_0, ..., u_N, patch i is visible if u_i > u_0: the
    rank of u_0 is uniform, and so is the set of those above it."""
    u = rand(batch, patches + 1, generator)
    return (u[:, 1:] > u[:, :1]).float()


def bernoulli(batch: int, patches: int, visible: float, generator: Random = None) -> Tensor:
    """Each patch is visible with probability `visible`, independently of the others."""
    return (rand(batch, patches, generator) < visible).float()


def block(batch: int, grid: int, visible: float = 0.4, generator: Random = None) -> Tensor:
    """BEiT's block masks, inverted: random rectangles are revealed until at least a fraction `visible` is visible.

    With A = max(2, int(visible * N)), a rectangle's area is an integer from 16 (or A, if that is less) to A - 1, its
    aspect ratio uniform in [0.3, 1/0.3]; its sides are cut to the grid. grid: patches along each side."""
    if not 0 < visible <= 1:
        raise ValueError(f"visible is {visible}; a block mask needs a fraction in (0, 1]")
    masks, wanted, todo = torch.zeros(batch, grid**2, dtype=torch.bool), visible * grid**2, torch.arange(batch)
    most = max(2, int(wanted))
    least = min(16, most)
    while len(todo):  # a rectangle for each mask that needs more
        mine = [generator[i] for i in todo.tolist()] if isinstance(generator, Sequence) else generator
        u = rand(len(todo), 4, mine).T  # [4, todo]
        area, aspect = least + (u[0] * (most - least)).floor(), 0.3 + (1 / 0.3 - 0.3) * u[1]
        height, width = ((area * x).sqrt().floor().clamp(1, grid) for x in (aspect, 1 / aspect))
        top, left = (u[2] * (grid - height + 1)).floor(), (u[3] * (grid - width + 1)).floor()
        masks[todo] |= from_windows(torch.stack([top, left, height, width], 1), grid).bool()
        todo = todo[masks[todo].sum(1) < wanted]
    return masks.float()


def windows(batch: int, grid: int, generator: Random = None) -> Tensor:
    """CLIPSelf's crops (appendix B.3), 3 to 14 patches on each side: top, left, height and width, [batch, 4]."""
    u = rand(batch, 4, generator)
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
