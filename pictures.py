"""What people look at: images, label maps, token colors, charts, tables. Needs torch, numpy and pillow; copy it.

    pictures.grid([[image, truth, prediction], ...], ["image", "truth", "prediction"]).save("grid.png")
    before, after = pictures.token_colors(tokens, aligned_tokens, grid=14)   # [B, 14, 14, 3] each
"""

import math
import textwrap
from collections.abc import Callable, Sequence
from itertools import zip_longest

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.Image import Resampling

# The colors of Okabe and Ito, which color-blind readers and a printer can tell apart
LINES = ((95, 95, 95), (213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (230, 159, 0))
Font, Point = ImageFont.ImageFont | ImageFont.FreeTypeFont, tuple[float, float]
GRAY, FAINT = (110, 110, 110), (205, 205, 205)


# --- images -----------------------------------------------------------------------------------------------------------

def grid(rows: Sequence[Sequence[Image.Image | np.ndarray]], titles: Sequence[str] = (), side: int = 0,
         gap: int = 4) -> Image.Image:
    """Rows of images (PIL, or uint8 [H, W, 3] or [H, W]), all resized to side x side if given, with titles on top."""
    cells = [[Image.fromarray(np.asarray(image)).convert("RGB") for image in row] for row in rows]
    if side:
        cells = [[cell.resize((side, side), Resampling.NEAREST) for cell in row] for row in cells]
    font = ImageFont.load_default()
    widths = []
    for title, *column in zip_longest(titles, *cells):
        widths.append(max([math.ceil(font.getlength(title or ""))] + [cell.width for cell in column if cell]))
    heights = [max(cell.height for cell in row) for row in cells]
    lefts = np.cumsum([gap] + [width + gap for width in widths]).tolist()
    tops = np.cumsum([gap + (16 if titles else 0)] + [height + gap for height in heights]).tolist()
    sheet = Image.new("RGB", (lefts[-1], tops[-1]), "white")
    for left, title in zip(lefts, titles):
        ImageDraw.Draw(sheet).text((left, gap), title, "black", font)
    for top, row in zip(tops, cells):
        for left, cell in zip(lefts, row):
            sheet.paste(cell, (left, top))
    return sheet


def token_colors(before: torch.Tensor, after: torch.Tensor, grid: int) -> np.ndarray:
    """Patch tokens [B, N, D] of two models as colors, uint8 [2, B, grid, grid, 3].

    The colors are the three principal components of all tokens together, so equal colors mean the same in both."""
    tokens = torch.stack([before, after]).float().cpu()
    tokens = tokens - tokens.mean((1, 2), keepdim=True)  # each model around its own mean
    flat = tokens.flatten(0, 2).double()
    axes = torch.linalg.eigh(flat.T @ flat)[1][:, -3:].flip(1).float()  # [D, 3], the largest component first
    colors = (tokens @ axes).numpy()  # [2, B, N, 3]
    low, high = np.quantile(colors, (0.02, 0.98), axis=(0, 1, 2))
    colors = ((colors - low) / np.maximum(high - low, 1e-12)).clip(0, 1) * 255
    return colors.astype(np.uint8).reshape(2, -1, grid, grid, 3)


def paint(image: Image.Image, classes: Sequence[int], colors: dict[int, tuple[int, int, int]]) -> Image.Image:
    """A faint gray image with each patch in the color of its class; classes [N], and class 0 stays gray."""
    side = math.isqrt(len(classes))
    cells = np.array([colors.get(c, (0, 0, 0)) for c in classes], np.uint8).reshape(side, side, 3)
    opacity = np.array([160 * (c > 0) for c in classes], np.uint8).reshape(side, side)
    layer, mask = (Image.fromarray(x).resize(image.size, Resampling.NEAREST) for x in (cells, opacity))
    return Image.composite(layer, image.convert("L").point(lambda v: v // 2 + 40).convert("RGB"), mask)


def legend(picture: Image.Image, colors: dict[str, tuple[int, int, int]]) -> Image.Image:
    """A picture with colored squares and their names below it."""
    font = ImageFont.load_default()
    width = 24 + max([math.ceil(font.getlength(name)) for name in colors], default=0)
    columns = max(1, (picture.width - 8) // width)
    height = picture.height + 16 * math.ceil(len(colors) / columns) + 4
    sheet = Image.new("RGB", (max(picture.width, width + 8), height), "white")
    sheet.paste(picture)
    draw = ImageDraw.Draw(sheet)
    for i, (name, color) in enumerate(colors.items()):
        x, y = 4 + i % columns * width, picture.height + i // columns * 16
        draw.rectangle((x, y, x + 11, y + 11), color)
        draw.text((x + 16, y), name, "black", font)
    return sheet


def card(image: Image.Image, lines: Sequence[tuple[str, str]], width: int = 320) -> Image.Image:
    """An image of that width above lines of text of given colors, which are wrapped."""
    font = ImageFont.load_default(13)
    scale = min(width / image.width, 2 * width / image.height)  # at most twice as high as the card is wide
    size = max(1, round(scale * image.width)), max(1, round(scale * image.height))
    paragraphs = [(part, color) for text, color in lines for part in text.split("\n")]
    rows = [(row, color) for part, color in paragraphs for row in textwrap.wrap(part, width // 7)]
    sheet = Image.new("RGB", (width, size[1] + 6 + 17 * len(rows)), "white")
    sheet.paste(image.convert("RGB").resize(size, Resampling.BICUBIC))
    for number, (row, color) in enumerate(rows):
        ImageDraw.Draw(sheet).text((0, size[1] + 4 + 17 * number), row, color, font)
    return sheet


def point(image: Image.Image, places: Sequence[tuple[str | tuple, np.ndarray]], width: int = 320) -> Image.Image:
    """An image of that width with boxes [n, 4] (x1, y1, x2, y2) and masks bool [n, H, W] in colors; all in pixels."""
    size = width, max(1, round(width * image.height / image.width))
    sheet, boxes = image.convert("RGB").resize(size, Resampling.BICUBIC), []
    for color, found in places:
        for one in np.asarray(found):
            if one.ndim == 1:
                boxes.append(([float(side) * width / image.width for side in one], color))
            else:
                mask = Image.fromarray(one.astype(np.uint8) * 255).resize(size)
                sheet.paste(Image.blend(sheet, Image.new("RGB", size, color), 0.6), mask=mask)
    for box, color in boxes:
        ImageDraw.Draw(sheet).rectangle(box, outline=color, width=max(2, width // 130))
    return sheet


# --- charts and tables ------------------------------------------------------------------------------------------------

def scatter(points: dict[str, Point], axes: tuple[str, str], line: tuple[float, float] | None = None,
            side: int = 480) -> Image.Image:
    """Named points (x, y) in a frame with the names of its axes, and the line y = line[0] x + line[1]."""
    font, edge = ImageFont.load_default(), 56
    sheet = Image.new("RGB", (side + 2 * edge, side + 2 * edge), "white")
    draw = ImageDraw.Draw(sheet)
    xs, ys = zip(*points.values())
    spans = [1.4 * max(max(values) - min(values), 1.0) for values in (xs, ys)]
    lows = [(max(values) + min(values) - span) / 2 for values, span in zip((xs, ys), spans)]

    def place(x: float, y: float) -> Point:
        return edge + (x - lows[0]) / spans[0] * side, edge + side - (y - lows[1]) / spans[1] * side

    draw.rectangle((edge, edge, edge + side, edge + side), outline="black")
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = lows[0] + share * spans[0], lows[1] + share * spans[1]
        draw.text((place(x, y)[0], edge + side + 6), f"{x:.1f}", "black", font, anchor="mt")
        draw.text((edge - 6, place(x, y)[1]), f"{y:.1f}", "black", font, anchor="rm")
    draw.text((edge + side / 2, edge + side + 28), axes[0], "black", font, anchor="mt")
    draw.text((edge, edge - 12), axes[1], "black", font, anchor="lb")
    if line:
        ends = [(x, line[0] * x + line[1]) for x in (min(xs), max(xs))]
        draw.line([place(*end) for end in ends], "gray", 1)
    for name, point in points.items():
        x, y = place(*point)
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=(31, 119, 180))
        draw.text((x + 8, y), name, "black", font, anchor="lm")
    return sheet


Places = Callable[[Sequence[float]], list[Point]]  # a value for each axis -> points on the sheet


def radar(axes: Sequence[str], series: dict[str, Sequence[float]], reach: float, radius: int = 360,
          faint: Sequence[str] = ()) -> Image.Image:
    """Named series of one value for each axis, from -reach in the middle to reach at the rim; a ring at each integer.

    The first line of an axis's text is its name; further lines stand below it in gray, and all of those in `faint`."""
    fine = 3  # drawn three times as large, then averaged, for smooth lines
    radius, row = fine * radius, fine * radius / 9  # row: the height of a line of text
    large, small = ImageFont.load_default(radius / 13), ImageFont.load_default(radius / 16)
    angles = [2 * math.pi * i / len(axes) - math.pi / 2 for i in range(len(axes))]  # clockwise from the top
    names = max(map(large.getlength, series))
    beside = [max(map(large.getlength, text.split("\n"))) + 1.15 * radius * abs(math.cos(angle))
              for angle, text in zip(angles, axes)]  # fmt: skip
    x, y = max(*beside, names / 2 + 2 * row), 1.15 * radius + 2 * row  # the center
    bottom = y + 1.15 * radius * max(map(math.sin, angles)) + 2.5 * row
    sheet = Image.new("RGB", (2 * math.ceil(x), math.ceil(bottom + row * (len(series) + 1))), "white")
    draw = ImageDraw.Draw(sheet)

    def places(values: Sequence[float]) -> list[Point]:
        lengths = [radius * min(max(value + reach, 0), 2 * reach) / (2 * reach) for value in values]
        return [(x + length * math.cos(angle), y + length * math.sin(angle)) for length, angle in zip(lengths, angles)]

    rings = range(math.floor(-reach) + 1, math.ceil(reach))
    for value in (*rings, reach):
        draw.polygon(places([value] * len(axes)), outline=FAINT if value else (150, 150, 150), width=fine)
    for angle, text, end in zip(angles, axes, places([reach] * len(axes))):
        draw.line([(x, y), end], FAINT, fine)
        cos, sin = math.cos(angle), math.sin(angle)
        place, color = (x + 1.08 * radius * cos, y + 1.12 * radius * sin), GRAY if text in faint else "black"
        write_axis(draw, text, place, (cos, sin), row, (large, small), color)
    draw_series(sheet, series, places, (x - names / 2 - row, bottom), row, large)
    for value in rings:
        right, middle = places([value] * len(axes))[0]
        draw.text((right - row / 5, middle - row / 4), f"{value:+d}" if value else "0", GRAY, small, "rm")
    return sheet.reduce(fine)


def write_axis(draw: ImageDraw.ImageDraw, text: str, at: Point, direction: Point, row: float, fonts: tuple,
               color: object) -> None:
    """The text of a radar chart's axis, which points in `direction`; its near edge, not its middle, is `at`."""
    lines, (x, y), (cos, sin) = text.split("\n"), at, direction
    anchor = "rm" if cos < -0.1 else "lm" if cos > 0.1 else "mm"
    y -= row * (len(lines) - 1) * (1 - sin) / 2
    for i, line in enumerate(lines):
        draw.text((x, y + row * i), line, GRAY if i else color, fonts[i > 0], anchor)


def draw_series(sheet: Image.Image, series: dict[str, Sequence[float]], places: Places, key: Point, row: float,
                font: Font) -> None:
    """The areas, lines and dots of a radar chart's series, and their names in rows below `key`."""
    draw, colors = ImageDraw.Draw(sheet), LINES * math.ceil(len(series) / len(LINES))
    for values, color in zip(series.values(), colors):  # all areas first, since they would tint the lines
        mask = Image.new("L", sheet.size)
        ImageDraw.Draw(mask).polygon(places(values), 40)
        sheet.paste(color, mask=mask)
    for number, ((name, values), color) in enumerate(zip(series.items(), colors)):
        points, dot = places(values), 15
        draw.line([*points, *points[:2]], color, 9, joint="curve")
        for x, y in points:
            draw.ellipse((x - dot, y - dot, x + dot, y + dot), color)
        left, y = key[0], key[1] + row * (number + 0.5)
        draw.line([(left, y), (left + row, y)], color, 12)
        draw.text((left + 1.5 * row, y), name, "black", font, "lm")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])
