"""pictures.py: what is drawn is where it should be."""

import numpy as np
import pytest
import torch
from PIL import Image

import pictures


def test_grid():
    rows = [[Image.new("L", (4, 3), 9), np.full((2, 5, 3), 7, np.uint8)], [np.zeros((6, 2), np.uint8)]]
    plain = np.asarray(pictures.grid(rows))
    assert plain.shape == (4 + 3 + 4 + 6 + 4, 4 + 4 + 4 + 5 + 4, 3)
    assert (plain[4:7, 4:8] == 9).all() and (plain[4:6, 12:17] == 7).all() and (plain[11:17, 4:6] == 0).all()
    titled = pictures.grid(rows, ["a", "a very long title"], side=8, gap=1)
    assert titled.width > 60 and titled.height == 1 + 16 + 8 + 1 + 8 + 1
    assert (np.asarray(titled)[17:25, 1:9] == 9).all()


def test_token_colors_are_principal_components_on_common_axes():
    draw = torch.Generator().manual_seed(0)
    before, mixing = torch.randn(2, 9, 5, generator=draw), torch.tensor([9.0, 4.0, 2.0, 0.1, 0.1])
    before = before * mixing  # the largest components are the first three channels
    before, after = before - before.mean((0, 1)), (before - before.mean((0, 1))).roll(1, 1)
    colors = pictures.token_colors(before, after + 3, grid=3)  # a shift of all tokens changes nothing
    assert colors.shape == (2, 2, 3, 3, 3) and colors.dtype == np.uint8
    assert (colors[1] == np.roll(colors[0].reshape(2, 9, 3), 1, 1).reshape(2, 3, 3, 3)).all()
    for channel in range(3):
        r = np.corrcoef(colors[0, ..., channel].ravel(), before[..., channel].ravel())[0, 1]
        assert abs(r) > 0.9


def test_paint_and_legend():
    image = pictures.paint(Image.new("RGB", (40, 40), "white"), [0, 1, 1, 2], {1: (255, 0, 0), 2: (0, 0, 255)})
    top_left, top_right, bottom_right = (np.asarray(image)[y, x].astype(int) for y, x in ((9, 9), (9, 29), (29, 29)))
    assert np.ptp(top_left) == 0 and top_right.argmax() == 0 and bottom_right.argmax() == 2
    sheet = pictures.legend(image, {"sky": (0, 0, 255), "grass": (0, 255, 0)})
    assert sheet.height >= 56 and sheet.getpixel((8, 45)) == (0, 0, 255)


def test_scatter_places_points():
    sheet = np.asarray(pictures.scatter({"a": (0, 0), "b": (10, 5)}, ("x", "y"), (0.5, 0))).astype(int)
    dots = np.argwhere(abs(sheet - (31, 119, 180)).sum(-1) == 0)
    left, right = dots[dots[:, 1] < 296], dots[dots[:, 1] > 296]
    assert left[:, 0].mean() > right[:, 0].mean()  # y points upward
    assert abs(right[:, 1].mean() - left[:, 1].mean() - 480 / 1.4) < 2


def test_a_card_shows_an_image_with_boxes_and_wrapped_text():
    lines = [("one two three " * 8 + "end", "black"), ("x\ny", "red")]
    image = pictures.point(Image.new("RGBA", (40, 20), "blue"), [("lime", [np.array([10, 10, 29.8, 19.8])])], 200)
    card = pictures.card(image, lines, 200)
    pixels = np.asarray(card)
    assert card.width == 200 and 100 + 9 * 17 > card.height > 100 + 5 * 17
    rows, columns = np.nonzero((pixels == (0, 255, 0)).all(-1))
    assert np.allclose((columns.min(), columns.max(), rows.min(), rows.max()), (50, 149, 50, 99), atol=1)
    assert (pixels[-34:-17, :, 0] > 200).all() and (pixels[-34:, :, 1] < 128).any()  # the last two lines are red


@pytest.mark.parametrize("size, drawn", [((1000, 1), (40, 1)), ((1, 1000), (1, 80)), ((20, 30), (40, 60))])
def test_a_card_shows_strips(size, drawn):
    card = np.asarray(pictures.card(Image.new("RGB", size, "red"), [], width=40))
    assert (card == (255, 0, 0)).all(-1).sum() == drawn[0] * drawn[1] and len(card) == drawn[1] + 6


def test_a_radar_chart_has_its_lines_where_the_values_are():
    series = {"gray, as text": [0] * 4, "one": [1] * 4, "two": [-1, 0, -1, 9]}
    axes = ["north\nof all", "east", "south", "west"]
    black, gray = ((np.asarray(pictures.radar(axes, series, 2, 200, names)) < 40).all(-1).sum() for names in ([], axes))
    assert black > gray > 0  # the names of faint axes are gray, those of the series stay black
    chart = np.asarray(pictures.radar(axes, series, 2, radius=200)).astype(int)
    one, two = (np.argwhere(abs(chart - color).sum(-1) < 30) for color in pictures.LINES[1:3])
    top = one[:, 0].min()
    one, two = (points[points[:, 0] < top + 310] for points in (one, two))  # without the names below
    middle = (one.min(0) + one.max(0)) / 2
    left, top, right = middle[1] - two[:, 1].min(), middle[0] - two[:, 0].min(), two[:, 1].max() - middle[1]
    assert np.allclose([*(one.max(0) - middle), left, right, top], [150, 150, 200, 100, 50], atol=8)
