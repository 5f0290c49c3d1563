"""The built-in world: fully annotated pictures of colored shapes, written to disk as ordinary data sets.

    python demo/scenes.py DIR --count 12800 --val 2000 --test 500 --seed 0

images/{train,val,test}  PNG pictures: 2 to 5 overlapping shapes on a dark texture, no two alike in shape and color
labels/{train,val}       PNG label maps: red holds each pixel's shape (1-10), green its color (11-18), 0 is nothing
labels.txt               the classes' names: "3: triangle"
boxes.json               the pictures of each part, with the shape, color and box of each object
conversations.json       a conversation about each training picture, in LLaVA's format
pointing.json            another that points at things; where they are is in "targets" (data.Conversations)
questions.json           single questions about the test pictures in the same format, each with its "kind"
scenes.json              the options, written last

A scene depends on its seed and index alone, so two runs write the same bytes with any number of workers.
"""

import argparse
import json
import math
import os
import shutil
import signal
import sys
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import permutations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm


# --- pictures ---------------------------------------------------------------------------------------------------------

def arc(start: float, stop: float, points: int, radius: float = 0.5, center: float = 0.0) -> list[tuple[float, float]]:
    """Points of a circle around (center, 0), angles in degrees, both ends included."""
    angles = np.radians(np.linspace(start, stop, points))
    return [(center + radius * math.cos(a), radius * math.sin(a)) for a in angles]


# Each shape is one closed outline of about unit width, y pointing down. The ring is a circle and a smaller one run
# backwards, joined by a slit of no width.
CROSS = [(-0.17, -0.51), (0.17, -0.51), (0.17, -0.17), (0.51, -0.17), (0.51, 0.17), (0.17, 0.17)]
OUTLINES = {
    "circle": arc(0, 360, 33),
    "square": [(-0.43, -0.43), (0.43, -0.43), (0.43, 0.43), (-0.43, 0.43)],
    "triangle": [(0, -0.5), (0.52, 0.42), (-0.52, 0.42)],
    "diamond": [(0, -0.58), (0.38, 0), (0, 0.58), (-0.38, 0)],
    "cross": CROSS + [(-x, -y) for x, y in CROSS],
    "ring": arc(0, 360, 33) + arc(360, 0, 25, radius=0.27),
    "star": [point for a in range(-90, 270, 72) for point in arc(a, a, 1, 0.57) + arc(a + 36, a + 36, 1, 0.24)],
    "bar": [(-0.55, -0.16), (0.55, -0.16), (0.55, 0.16), (-0.55, 0.16)],
    "crescent": arc(42, 318, 25) + arc(296.4, 63.6, 17, radius=0.3735, center=0.2055),
    "hexagon": arc(0, 300, 6),
}
PALETTE = {
    "red": (222, 40, 44), "orange": (250, 134, 20), "yellow": (244, 222, 50), "green": (50, 172, 62),
    "cyan": (56, 206, 214), "blue": (52, 88, 232), "purple": (152, 58, 204), "white": (238, 238, 238),
}  # fmt: skip
SHAPES, COLORS = tuple(OUTLINES), tuple(PALETTE)
CLASSES = ("nothing", *SHAPES, *COLORS)  # by their number in the label maps
FINE = 3  # drawn at 3 times the size, then averaged; odd, so that a pixel's center is the center of a fine pixel
SMALLEST, LARGEST, TURN = 0.18, 0.42, 15  # objects, as shares of the picture's side; degrees either way
VISIBLE = 0.45  # every object keeps at least this share of its area


class Object(NamedTuple):
    """One thing in a scene. `box` is [x1, y1, x2, y2] of its visible part, as shares of the picture's side."""

    shape: str
    color: str
    box: list[float]

    @property
    def center(self) -> tuple[float, float]:
        """The middle of the box: x, y."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


class Scene(NamedTuple):
    """A picture with its truth. `objects` are in the order of drawing: later ones cover earlier ones. `seen` is the map
    of which of them each pixel shows, uint8 [S, S]: 0 none, 1 the first."""

    image: Image.Image
    objects: list[Object]
    seen: np.ndarray

    def matching(self, color: str | None, shape: str | None) -> int:
        """How many objects have that color and shape; None matches all."""
        return sum(color in (None, o.color) and shape in (None, o.shape) for o in self.objects)


def make(seed: int, index: int, size: int = 64) -> Scene:
    """The scene of that seed and index, `size` pixels wide and high."""
    rng = np.random.default_rng((zlib.crc32(b"scene"), seed, index))
    wanted, both = int(rng.integers(2, 6)), list(product(SHAPES, COLORS))
    kinds = [both[n] for n in rng.permutation(len(both))[:wanted]]  # all different, so that "the red ring" is one thing
    fine, seen = place([shape for shape, _ in kinds], size, rng)
    objects = []
    for number, (shape, color) in enumerate(kinds, 1):
        rows, columns = np.nonzero(seen == number)
        corners = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        objects.append(Object(shape, color, [float(corner) / size for corner in corners]))
    return Scene(paint(fine, [PALETTE[color] for _, color in kinds], rng), objects, seen)


def place(shapes: Sequence[str], size: int, rng: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
    """Draw the shapes one after the other, each again while too much of one would be hidden. Returns the map of which
    object is seen where, as a fine picture and at pixel centers."""
    fine, areas = Image.new("L", (size * FINE, size * FINE)), np.zeros(1, int)
    while len(areas) <= len(shapes):
        scale, turn, *corner = rng.random(4)
        angle = math.radians(TURN * (2 * turn - 1))
        rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        outline = np.array(OUTLINES[shapes[len(areas) - 1]]) @ rotation * (SMALLEST + (LARGEST - SMALLEST) * scale)
        outline = (outline - outline.min(0) + np.array(corner) * (1 - np.ptp(outline, 0))) * size * FINE
        trial = fine.copy()
        ImageDraw.Draw(trial).polygon(outline.ravel().tolist(), fill=len(areas))
        visible = np.asarray(trial.resize((size, size), Image.Resampling.NEAREST))  # at pixel centers
        pixels = np.bincount(visible.ravel(), minlength=len(areas) + 1)
        if (pixels[1:-1] >= VISIBLE * areas[1:]).all() and pixels[-1] > 0:
            fine, seen, areas = trial, visible, np.append(areas, pixels[-1])
    return fine, seen


def paint(fine: Image.Image, colors: Sequence[tuple[int, int, int]], rng: np.random.Generator) -> Image.Image:
    """Color the fine map, average it down over a soft dark texture, and add a little noise."""
    shades = rng.uniform(0.82, 1.08, len(colors))
    palette = [(0, 0, 0, 0)] + [(*(min(255, round(c * s)) for c in rgb), 255) for rgb, s in zip(colors, shades)]
    fine.putpalette(bytes(np.array(palette, np.uint8)), "RGBA")
    objects = fine.convert("RGBA").reduce(FINE)  # a pixel's alpha is the share of it that objects cover
    texture = rng.uniform(12, 62, 3) + rng.uniform(-22, 22, (6, 6, 3))
    picture = Image.fromarray(texture.clip(0, 255).astype(np.uint8)).resize(objects.size, Image.Resampling.BICUBIC)
    picture.paste(objects, mask=objects)
    pixels = np.asarray(picture) + 4 * rng.standard_normal((objects.height, objects.width, 3), np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


# --- questions --------------------------------------------------------------------------------------------------------

# What a scene leaves unclear is not asked. Instructions, on a line of their own, are those of the benchmarks.
SHORT = "\nAnswer the question using a single word or phrase."
MARGIN = 0.2  # the centers of two things lie so far apart when one is said to be left of the other, or above
EDGE = 0.1  # a center keeps this distance, in thirds, from the lines between the nine places
GRID = 8  # "What is at 3, 5?" counts columns, then rows, of 8 x 8 patches from 0
ON_THINGS = 0.7  # the share of those patches that lie on things


def choose(items: Sequence, rng: np.random.Generator) -> Any:
    """One of the items, each as likely as any other."""
    return items[int(rng.integers(len(items)))]


def noun(color: str | None, shape: str | None, article: str = "") -> str:
    """("red", None, "a") -> "a red object"."""
    words = " ".join(filter(None, (color, shape or "object")))
    return f"{article}{'n' if article == 'a' and words[0] in 'aeiou' else ''} {words}".strip()


def plural(color: str | None, shape: str | None) -> str:
    """("red", None) -> "red objects"."""
    return noun(color, shape) + ("es" if shape == "cross" else "s")


def questions(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str, str]]:
    """At most one question of each kind, as (kind, question, answer). presence: yes and no equally often; color: of a
    shape that occurs once; relation: of two centers; where: one of nine places; at: a patch that one thing covers by
    half or that nothing touches; refer: a thing whose name is unique."""
    present = bool(rng.integers(2))
    by_color, by_shape = choose([(True, False), (False, True), (True, True)], rng)
    kinds = product(COLORS if by_color else [None], SHAPES if by_shape else [None])
    kind = choose([kind for kind in kinds if (scene.matching(*kind) > 0) == present], rng)
    yield "presence", f"Is there {noun(*kind, 'a')} in the image?{SHORT}", "Yes" if present else "No"
    thing = choose(scene.objects, rng)
    kind = choose([(None, None), (thing.color, None), (None, thing.shape), (None, choose(SHAPES, rng))], rng)
    yield "count", f"How many {plural(*kind)} are there?{SHORT}", str(scene.matching(*kind))
    if single := [o for o in scene.objects if scene.matching(None, o.shape) == 1]:
        thing = choose(single, rng)
        yield "color", f"What color is the {thing.shape}?{SHORT}", thing.color
    nouns = [noun(o.color, o.shape, "a") for o in sorted(scene.objects, key=lambda o: o.center[0])]
    yield "caption", "Describe the image.", f"From left to right: {', '.join(nouns[:-1])} and {nouns[-1]}."
    pairs = [(*pair, axis) for pair in permutations(scene.objects, 2) for axis in (0, 1)]
    if pairs := [(a, b, axis) for a, b, axis in pairs if abs(a.center[axis] - b.center[axis]) >= MARGIN]:
        a, b, axis = choose(pairs, rng)
        true, before = bool(rng.integers(2)), a.center[axis] < b.center[axis]
        words = (("to the left of", "to the right of"), ("above", "below"))[axis][before != true]
        statement = f"{noun(a.color, a.shape, 'The')} is {words} {noun(b.color, b.shape, 'the')}."
        question = f'Based on the image, is this statement "True" or "False"? {statement}'
        first, second = (int(GRID * thing.center[axis]) for thing in (a, b))  # their columns, or their rows
        yield "relation", f'{question}\nSay where both are, then "True" or "False".', f"{first} and {second}: {true}"
    if clear := [o for o in scene.objects if all(abs(3 * x - line) >= EDGE for x in o.center for line in (1, 2))]:
        thing = choose(clear, rng)
        column, row = (int(3 * x) for x in thing.center)
        answer = f"{('top', '', 'bottom')[row]} {('left', '', 'right')[column]}".strip() or "center"
        yield "where", f"Where is {noun(thing.color, thing.shape, 'the')}?", answer
    patches = scene.seen.reshape(GRID, len(scene.seen) // GRID, GRID, -1)  # [row, y, column, x]
    shares = [(patches == n).mean((1, 3)) for n in range(1 + len(scene.objects))]  # of a patch: nothing's, each thing's
    number, row, column = np.nonzero([shares[0] == 1, *(share >= 0.5 for share in shares[1:])])
    if len(there := np.flatnonzero((number > 0) == (rng.random() < ON_THINGS))):
        i, names = choose(there, rng), ["nothing", *(noun(o.color, o.shape) for o in scene.objects)]
        yield "at", f"What is at {column[i]}, {row[i]}?", names[number[i]]
    thing = choose(scene.objects, rng)
    kinds = [(thing.color, thing.shape), (thing.color, None), (None, thing.shape)]
    name = noun(*choose([kind for kind in kinds if scene.matching(*kind) == 1], rng), "the")
    question = f'Please provide the bounding box coordinate of the region this sentence describes: "{name}"'
    yield "refer", question, "[" + ", ".join(f"{side:.2f}" for side in thing.box) + "]"


def pointing(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str, str, dict[str, list]]]:
    """Questions that are answered by pointing, or that point: (kind, question, answer, what it points at, in pixels).
    Answers are REF-VLM's triplets: a name, what to point with, and a <REF> for each thing."""

    def triplet(name: str, unit: str, places: list) -> tuple[str, dict[str, list]]:
        refs = "".join(f"[{i}]<REF>" for i in range(len(places)))
        return f"<Phrase>{name}</Phrase>(<Unit>{unit}</Unit>{refs})", {unit: places}

    boxes = [[round(side * len(scene.seen)) for side in o.box] for o in scene.objects]
    places = {"box": boxes, "mask": [run_lengths(scene.seen == n) for n in range(1, 1 + len(boxes))]}
    for unit in places:
        i = int(rng.integers(len(boxes)))
        shape, color, _ = scene.objects[i]
        kinds = [kind for kind in ((color, shape), (color, None), (None, shape)) if scene.matching(*kind) == 1]
        color, shape = choose(kinds, rng)
        question = f"Where is {noun(color, shape, 'the')}? Point with a {unit}."
        yield f"refer-{unit}", question, *triplet(noun(color, shape), unit, [places[unit][i]])
    thing, unit = choose(scene.objects, rng), choose(("box", "mask"), rng)
    color, shape = choose([(thing.color, None), (None, thing.shape)], rng)
    which = [i for i, o in enumerate(scene.objects) if color in (None, o.color) and shape in (None, o.shape)]
    question = f"Where are all {plural(color, shape)}? Point with {unit}{'es' if unit == 'box' else 's'}."
    yield f"all-{unit}", question, *triplet(noun(color, shape), unit, [places[unit][i] for i in which])
    i = int(rng.integers(len(boxes)))
    region = places[choose(("box", "mask"), rng)][i]
    yield "region", "What is in <region>?", noun(scene.objects[i].color, scene.objects[i].shape), {"region": [region]}


def conversation(asked: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """Questions with their answers as the messages of a row in LLaVA's format. As in LLaVA-1.5, the image stands in the
    first message only, and each instruction is given once."""
    turns, given = [], set()
    for question, answer in asked:
        text, _, instruction = question.partition("\n")
        value = "<image>\n" * (not turns) + (text if instruction in given else question)
        turns += [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
        given.add(instruction)
    return turns


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """A mask [H, W] as COCO writes it: how many pixels in a row, column by column, are outside, inside, outside..."""
    changes = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False, append=not mask[-1, -1]))
    return {"size": list(mask.shape), "counts": np.diff(changes, prepend=0).tolist()}


# --- files ------------------------------------------------------------------------------------------------------------

def write_scene(folder: Path, part: str, seed: int, size: int, index: int) -> tuple[dict, list[dict]]:
    """Write one scene's pictures; return its entry in boxes.json, and its rows of questions."""
    rng = np.random.default_rng((zlib.crc32(b"questions"), seed, index))
    scene, name, rows = make(seed, index, size), f"scene-{index:06d}", []
    row = {"id": name, "image": f"images/{part}/{name}.png"}
    scene.image.save(folder / row["image"], compress_level=1)
    if part != "test":
        classes = [(0, 0, 0), *((CLASSES.index(o.shape), CLASSES.index(o.color), 0) for o in scene.objects)]
        labels = Image.fromarray(np.array(classes, np.uint8)[scene.seen])
        labels.save(folder / f"labels/{part}/{name}.png", compress_level=1)
    if part == "train":  # 11 questions, none twice
        asked = {question: answer for _ in range(2) for _, question, answer in questions(scene, rng)}
        rows = [row | {"conversations": conversation(rng.permutation(list(asked.items())).tolist()[:11])}]
        turns = [(*pair, {}) for _, *pair in questions(scene, rng)]
        turns += [turn for _ in range(2) for _, *turn in pointing(scene, rng)]
        asked, targets = {question: (answer, places) for question, answer, places in turns}, {}
        order = [list(asked)[i] for i in rng.permutation(len(asked))[:14]]
        for unit, places in (item for question in order for item in asked[question][1].items()):
            targets[unit] = targets.get(unit, []) + places
        rows.append(row | {"conversations": conversation([(q, asked[q][0]) for q in order]), "targets": targets})
    elif part == "test":
        for kind, question, answer, *targets in (*questions(scene, rng), *pointing(scene, rng)):
            one = row | {"id": f"{name}-{kind}", "kind": kind, "conversations": conversation([(question, answer)])}
            rows.append(one | {"targets": targets[0] for _ in targets})
    return {"image": row["image"], "objects": [thing._asdict() for thing in scene.objects]}, rows


def write(folder: str | Path, count: int = 12800, val: int = 2000, test: int = 500, seed: int = 0, size: int = 64,
          workers: int | None = None) -> Path:  # fmt: skip
    """Write scenes to train on, to validate on and to ask about into a folder, which appears whole or not at all.

    workers: processes; 0: this one alone; None: one for each core. Returns the folder. ValueError: a number makes no
    sense, or the folder holds something else.
    """
    folder, options = Path(folder), {"count": count, "val": val, "test": test, "seed": seed, "size": size}
    for name, least in {"count": 1, "val": 0, "test": 0, "seed": 0, "size": 16}.items():
        if options[name] < least or (name == "size" and size % GRID):
            raise ValueError(f"--{name} {options[name]}: give {least} or more{', a multiple of 8' * (name == 'size')}")
    if (folder / "scenes.json").exists() and json.loads((folder / "scenes.json").read_text()) == options:
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: holds something else; give a new folder, or remove this one")
    new, done = folder.with_name(f".{folder.name}.{os.getpid()}"), {}  # part -> [(entry in boxes.json, rows)]
    pool = ProcessPoolExecutor(workers or None, None, signal.signal, (signal.SIGINT, signal.SIG_IGN))  # Ctrl-C ends us
    try:
        for part, number, first in (("train", count, 0), ("val", val, 1_000_000), ("test", test, 2_000_000)):
            for kind in ("images", "labels")[: 2 - (part == "test")]:
                (new / kind / part).mkdir(parents=True)
            one = partial(write_scene, new, part, seed + first, size)
            scenes = map(one, range(number)) if workers == 0 else pool.map(one, range(number), chunksize=32)
            done[part] = list(tqdm(scenes, f"writing scenes, {part}", number, disable=None))
        kinds = {1: "# shapes\n", 1 + len(SHAPES): "# colors\n"}  # what stands before the first class of each kind
        lines = (f"{kinds.get(number, '')}{number}: {name}\n" for number, name in enumerate(CLASSES))
        (new / "labels.txt").write_text("".join(lines))
        (new / "boxes.json").write_text(json.dumps({part: [entry for entry, _ in each] for part, each in done.items()}))
        train, test = ([row for _, rows in done[part] for row in rows] for part in ("train", "test"))
        for name, rows in (("conversations", train[::2]), ("pointing", train[1::2]), ("questions", test)):
            lines = [json.dumps(row) for row in rows]
            (new / f"{name}.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
        (new / "scenes.json").write_text(json.dumps(options) + "\n")
        os.rename(new, folder)
    finally:
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(new, ignore_errors=True)
    return folder


def ensure(folder: str | Path = "runs/scenes") -> Path:
    """The folder of scenes; the default set is written if there is none."""
    if not (Path(folder) / "scenes.json").exists():
        print(f"writing scenes to {folder}, once", file=sys.stderr)
        write(folder)
    return Path(folder)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where they are written; must be new")
    for name, default in {"count": 12800, "val": 2000, "test": 500, "seed": 0, "size": 64, "workers": None}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    try:
        write(**vars(parser.parse_args(argv)))
    except (ValueError, OSError) as error:
        sys.exit(f"scenes.py: {error}")


if __name__ == "__main__":
    main()
