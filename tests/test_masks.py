"""masks.py: the distributions are the paper's."""

import pytest
import torch

import masks


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_uniform_is_uniform_in_number_and_place():
    """p(m) = 1 / (C(N, |m|) (N + 1)): each of the 2^N masks has its exact probability."""
    N, draws = 4, 200_000
    m = masks.uniform(draws, N, generator())
    code = (m * 2 ** torch.arange(N)).sum(1).long()
    counts = torch.bincount(code, minlength=2**N).double()
    size = torch.tensor([bin(i).count("1") for i in range(2**N)])
    binomial = torch.tensor([1, 4, 6, 4, 1])[size]
    expected = draws / (binomial * (N + 1))
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 37.7  # the 99.9% point of chi-squared with 15 degrees of freedom


@pytest.mark.parametrize("visible", [0.25, 0.5, 0.75])
def test_bernoulli(visible: float):
    m = masks.bernoulli(2000, 100, visible, generator())
    assert abs(m.mean().item() - visible) < 0.005
    assert abs(m.sum(1).var().item() / (100 * visible * (1 - visible)) - 1) < 0.1  # patches are independent


@pytest.mark.parametrize("grid", [14, 27, 4, 1])
def test_block_reveals_rectangles_up_to_the_share(grid):
    m = masks.block(200, grid, 0.4, generator())
    share = m.mean(1)
    assert m.shape == (200, grid**2) and set(m.unique().tolist()) <= {0.0, 1.0}
    assert share.min() >= 0.4 and (share.max() <= 0.95 or grid == 1)
    image = m.view(-1, grid, grid)
    inside = (image[:, 1:, :] == image[:, :-1, :]).float().mean()  # neighbors agree more often than by chance
    assert grid <= 4 or inside > 0.8
    with pytest.raises(ValueError, match="visible is 0"):
        masks.block(1, grid, 0.0)


def test_block_draws_the_authors_rectangles():
    """One after the other, from the same numbers: integer areas from 16 to A - 1, sides cut off after the point."""
    draws = [torch.rand(400, dtype=torch.float64, generator=generator(i)).view(100, 4).tolist() for i in range(20)]
    for mask, u in zip(masks.block(20, 14, 0.4, [generator(i) for i in range(20)]).view(20, 14, 14), draws):
        expected, most = torch.zeros(14, 14), int(0.4 * 196)
        while expected.sum() < 0.4 * 196:
            (a, b, c, d), *u = u
            area, aspect = 16 + int(a * (most - 16)), 0.3 + (1 / 0.3 - 0.3) * b
            height, width = (min(14, max(1, int((area * x) ** 0.5))) for x in (aspect, 1 / aspect))
            top, left = int(c * (15 - height)), int(d * (15 - width))
            expected[top : top + height, left : left + width] = 1
        assert torch.equal(mask, expected)


@pytest.mark.parametrize("draw", [
    lambda n, g: masks.uniform(n, 49, g), lambda n, g: masks.bernoulli(n, 49, 0.5, g),
    lambda n, g: masks.block(n, 7, 0.9, g), lambda n, g: masks.windows(n, 7, g),
])  # fmt: skip
def test_a_mask_depends_on_its_own_generator_alone(draw):
    whole = draw(6, [generator(i) for i in range(6)])
    assert torch.equal(whole[2:5], draw(3, [generator(i) for i in range(2, 5)])) and not torch.equal(whole[0], whole[1])


def test_windows_are_rectangles_of_3_to_14_patches():
    boxes = masks.windows(5000, 16, generator())
    top, left, height, width = boxes.T
    assert height.min() == 3 and height.max() == 14 and width.min() == 3 and width.max() == 14
    assert top.min() == 0 and left.min() == 0 and (top + height).max() == 16 and (left + width).max() == 16
    m = masks.from_windows(boxes, 16).view(-1, 16, 16)
    assert torch.equal(m.sum((1, 2)).long(), height * width)
    i = 17
    assert m[i, top[i] : top[i] + height[i], left[i] : left[i] + width[i]].all()
    assert masks.windows(100, 2, generator())[:, 2:].eq(2).all()  # a small grid: the whole of it


def test_views_are_adjacent():
    m = masks.uniform(3, 5, generator())
    v = masks.views(m).view(3, 3, 5)
    assert torch.equal(v[:, 0], m) and torch.equal(v[:, 1], 1 - m) and v[:, 2].eq(1).all()
    assert masks.views(m, complement=False).shape == (6, 5) and masks.views(m, False, False).equal(m)
    assert masks.views(m, full=False).view(3, 2, 5).sum(1).eq(1).all()
