"""What models are fed from disk: folders of images, augmentation, batches, label maps, conversations. Copy it alone.

    source = ImageFolder("imagenet/train", part="train")
    batches = Batches(len(source), global_batch=1024, epochs=5, seed=0)
    loader = DataLoader(Images(source, Augment(224), seed=0), batch_sampler=batches, collate_fn=collate)

Everything random is a function of a seed and of what is drawn (epoch, sample), never of who draws it (rank, worker).
"""

import json
import math
import os
import pickle
import re
import warnings
import zlib
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

Image.MAX_IMAGE_PIXELS = 2**28  # by default, Pillow refuses images that large data sets do contain
warnings.filterwarnings("ignore", module=r"PIL\.")  # odd metadata in one file of a million is not news

Path = str | os.PathLike
NEAREST, BILINEAR, BICUBIC = Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC


def generator(purpose: str, *key: int) -> np.random.Generator:
    """A random generator that depends on `purpose` and `key` (integers >= 0) alone."""
    return np.random.default_rng((zlib.crc32(purpose.encode()), *key))


def check_unreadable(bad: int, seen: int, what: str = "images", example: str = "") -> None:
    """Raise ValueError when more than 1% of the `seen` samples, with 5 to spare, are `bad`. Sum both over the ranks."""
    if bad > 0.01 * seen + 5:
        such = example and f", such as {example}"
        raise ValueError(f"{bad} of {seen} {what} cannot be used, more than 1%{such}: repair or remove them")


HALVES = r"(?i)\\ud[89ab]..(?!\\ud[c-f])|(?<!\\ud[89ab]..)\\ud[c-f].."  # of an emoji, escaped, without the other half


def read_text(path: Path) -> str:
    """A text file as people save it: UTF-8, with a byte order mark or not, or UTF-16 with one. Other bytes: U+FFFD."""
    with open(path, "rb") as file:
        text = file.read()
    wide = text[:2] in (b"\xff\xfe", b"\xfe\xff")
    return text.decode("utf-16" if wide else "utf-8-sig", "replace").replace("\r\n", "\n")


def read_json(path: Path, rows: bool = False) -> Any:
    """The value in a JSON file. rows: a list of values, which may also stand on a line each. Half an emoji in a string
    becomes U+FFFD. ValueError names the line that is not JSON."""
    text, values = re.sub(HALVES, r"\\ufffd", read_text(path)), []
    lines = rows and text.lstrip()[:1] != "["
    for number, part in enumerate(text.split("\n") if lines else [text]):
        try:
            values += [json.loads(part)] if part.strip() or not lines else []
        except json.JSONDecodeError as error:
            line = number + error.lineno
            raise ValueError(f"{path}, line {line} is not JSON ({error.msg}); repair it or download it again") from None
    return values if lines else values[0]


class Strings:
    """Many byte strings, stored end to end: each data worker would copy millions of Python objects, but not this."""

    def __init__(self, items: list[bytes]):
        self.text, self.ends = b"".join(items), np.cumsum([0, *map(len, items)])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.text[self.ends[index] : self.ends[index + 1]]


# --- folders of images ------------------------------------------------------------------------------------------------

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")  # in lower or upper case


class ImageFolder(Strings):
    """The images below `root` at any depth, by folder, then by name: a source for `Images`. Hidden names are skipped.
    `part` "train" or "val" keeps one side of a fixed split: an image is held out when a hash of its path below `root`
    is in the lowest `val_share` of all values, so it stays there wherever the folder moves and whatever is added."""

    def __init__(self, root: Path, part: str = "all", val_share: float = 0.01):
        self.root = os.fspath(root)
        if not os.path.isdir(self.root):
            raise ValueError(f"{self.root} is not a folder: give the path of a folder of images")
        paths = list_images(self.root)
        if part != "all":  # checksums of numbered names can crowd into a range or miss it, their products do not
            hashes = [zlib.crc32(path) * 2654435769 % 2**32 for path in paths]
            paths = [path for path, h in zip(paths, hashes) if (h < val_share * 2**32) == (part == "val")]
        if not paths:
            which = "images" if part == "all" else f"{part} images at a held-out share of {val_share}"
            raise ValueError(f"{self.root} holds no {which}: files whose names end in {', '.join(EXTENSIONS)}")
        super().__init__(paths)

    def name(self, index: int) -> str:
        """The path of an image below the root."""
        return os.fsdecode(self[index])

    def open(self, index: int) -> Image.Image:
        """An image, its pixels not yet decoded. Raises what Pillow raises when it cannot be read."""
        return Image.open(os.path.join(self.root, self.name(index)))


def list_images(root: str) -> list[bytes]:
    """The path of each image below `root`. Many folders are listed at once, as network storage is slow to answer."""

    def scan(folder: str) -> tuple[str, tuple[int, int], list[bytes], list[str]]:
        """The folder, its identity, its images, and its subfolders."""
        status, start, names, below = os.stat(os.path.join(root, folder)), os.path.join(folder, ""), [], []
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in (entry for entry in entries if not entry.name.startswith(".")):
                if entry.name.lower().endswith(EXTENSIONS) and not entry.is_dir(follow_symlinks=False):
                    names.append(entry.name)  # as the directory itself says: no file is touched
                    continue
                with suppress(OSError):  # of a link to itself
                    below += [start + entry.name] * entry.is_dir()
        return folder, (status.st_dev, status.st_ino), [os.fsencode(start + name) for name in sorted(names)], below

    found, known, level = {}, set(), [""]
    with ThreadPoolExecutor(16) as pool:
        while level:
            listings, level = list(pool.map(scan, sorted(level))), []
            for folder, identity, paths, below in listings:
                if identity not in known:  # links can lead to a folder in several ways, also to one above
                    known.add(identity), level.extend(below)
                    found[folder] = paths
    return [path for _, paths in sorted(found.items()) for path in paths]


# --- from a file to an augmented crop (appendix B.1) ------------------------------------------------------------------

# As in vit.py (either file stands alone): EXIF orientations from 2 on, and what turns the stored picture upright
TURNS = dict(enumerate(map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), 2))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB, without transparency: the color stored under it shows. Grays that Pillow would clip are scaled:
    16 bits to 8; floats from 0 to 1 by 255; any other range from its least value to its greatest."""
    if image.mode[0] in "IF":
        gray = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0, neginf=0)
        most = 1 if image.mode == "F" else 65535
        low, high = (0, most) if 0 <= gray.min() and gray.max() <= most else (gray.min(), gray.max())
        image = Image.fromarray(((gray - low) * (255.999 / (high - low or 1))).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def turn(image: Image.Image) -> Image.Transpose | None:
    """What turns a stored picture upright, by its EXIF orientation. Damaged metadata says nothing."""
    with suppress(Exception):
        return TURNS.get(image.getexif().get(0x0112))


def upright(image: Image.Image) -> Image.Image:
    """Any image as RGB, turned upright."""
    image.load()  # some formats store the EXIF data after the pixels
    how, image = turn(image), to_rgb(image)
    if how is not None:
        image = image.transpose(how)
        image.info = {}  # so that nobody turns it again
    return image


def open_image(path: Path, convert: Callable[[Image.Image], Image.Image] = upright) -> Image.Image:
    """The picture in a file, as every part of the project sees it. convert: `to_rgb` where annotations, which are drawn
    over the pixels as stored, go with it. ValueError: it cannot be read."""
    try:
        with Image.open(path) as image:
            image.load()
            image = convert(image).copy()  # the file's own object remembers its orientation
            image.info = {}  # so that nobody turns it again
            return image
    except Exception as error:  # Pillow raises nearly every kind for damaged files
        raise ValueError(f"{path}: cannot be read ({type(error).__name__})") from None


def resized_crop(image: Image.Image, size: int, scale: tuple[float, float], resample: int) -> Image.Image:
    """Resize the shorter side to `size`, then width and height by the factors `scale`; return the center crop of
    size x size in RGB, reflect-padded where the image falls short. One resize of the crop's box does all of it, and a
    JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that still has every pixel of the whole resized image."""
    if image.format not in ("JPEG", "MPO"):
        image.load()  # other formats may store the EXIF orientation after the pixels
    sideways = turn(image) in (TURNS[n] for n in (5, 6, 7, 8))
    width, height = image.size[::-1] if sideways else image.size
    ratio = min(width, height) / size
    width, height = max(1, round(width * scale[0] / ratio)), max(1, round(height * scale[1] / ratio))
    image.draft("RGB", (height, width) if sideways else (width, height))  # does nothing to other formats
    image = upright(image)
    crop = min(width, size), min(height, size)
    left, top = round((width - crop[0]) / 2), round((height - crop[1]) / 2)
    across, down = image.width / width, image.height / height  # decoded pixels to one resized pixel
    right, bottom = min((left + crop[0]) * across, image.width), min((top + crop[1]) * down, image.height)
    # reducing_gap: an image more than 6 times too large is first averaged over whole blocks of pixels
    image = image.resize(crop, resample, (left * across, top * down, right, bottom), reducing_gap=3.0)
    across, down = (((size - side) // 2, (size - side + 1) // 2) for side in crop)
    return Image.fromarray(np.pad(np.asarray(image), (down, across, (0, 0)), mode="reflect"))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class Augment:
    """The paper's training augmentation: (image, rng) -> uint8 [3, size, size].
    Shorter side to `size`; with probability 1/2 zoomed in, so that a uniform share (8% to 100%) of the area fills the
    frame; with probability 1/2 stretched by a log-uniform aspect ratio (3/4 to 4/3); center crop; bilinear or bicubic
    at random; mirrored or not. That is timm's ResizeKeepRatio and CenterCropOrPad ("rkrc" there), with its rounding."""

    def __init__(self, size: int, randaugment: bool = False):
        self.size, self.randaugment = size, randaugment

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        zooms, area, stretches, aspect, cubic, flips = rng.random(6)
        area = 0.08 + (1.0 - 0.08) * area if zooms < 0.5 else 1.0
        low, high = math.log(3 / 4), math.log(4 / 3)
        aspect = math.exp(low + (high - low) * aspect) if stretches < 0.5 else 1.0
        scale = math.sqrt(aspect / area), math.sqrt(1 / (aspect * area))
        image = resized_crop(image, self.size, scale, BICUBIC if cubic < 0.5 else BILINEAR)
        if self.randaugment:  # timm mirrors first; as its operations lean to either side alike, that is the same
            image = randaugment(image, rng)
        return to_tensor(ImageOps.mirror(image) if flips < 0.5 else image)


def randaugment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """RandAugment m9-mstd0.5-inc1: twice, with probability 1/2, a random operation at a level of about 9 in 10."""
    for name in rng.choice(list(OPERATIONS), size=2):
        applies, positive, cubic = rng.random(3) < 0.5
        level = min(max(rng.normal(9, 0.5), 0), 10) / 10
        if applies:
            image = OPERATIONS[name](image, level if positive else -level, BICUBIC if cubic else BILINEAR)
    return image


GRAY, AFFINE = (128, 128, 128), Image.Transform.AFFINE
# timm's "increasing" operations on an image i at a level v in [-1, 1], whose sign is a direction where there is one
OPERATIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "AutoContrast": lambda i, v, r: ImageOps.autocontrast(i),
    "Equalize": lambda i, v, r: ImageOps.equalize(i),
    "Invert": lambda i, v, r: ImageOps.invert(i),
    "Rotate": lambda i, v, r: i.rotate(30 * v, r, fillcolor=GRAY),
    "Posterize": lambda i, v, r: ImageOps.posterize(i, max(1, 4 - int(4 * abs(v)))),
    "Solarize": lambda i, v, r: ImageOps.solarize(i, 256 - int(256 * abs(v))),
    "SolarizeAdd": lambda i, v, r: i.point([x + int(110 * abs(v)) * (x < 128) for x in range(256)] * 3),
    "Color": lambda i, v, r: ImageEnhance.Color(i).enhance(max(0.1, 1 + 0.9 * v)),
    "Contrast": lambda i, v, r: ImageEnhance.Contrast(i).enhance(max(0.1, 1 + 0.9 * v)),
    "Brightness": lambda i, v, r: ImageEnhance.Brightness(i).enhance(max(0.1, 1 + 0.9 * v)),
    "Sharpness": lambda i, v, r: ImageEnhance.Sharpness(i).enhance(max(0.1, 1 + 0.9 * v)),
    "ShearX": lambda i, v, r: i.transform(i.size, AFFINE, (1, 0.3 * v, 0, 0, 1, 0), r, fillcolor=GRAY),
    "ShearY": lambda i, v, r: i.transform(i.size, AFFINE, (1, 0, 0, 0.3 * v, 1, 0), r, fillcolor=GRAY),
    "TranslateXRel": lambda i, v, r: i.transform(i.size, AFFINE, (1, 0, 0.45 * v * i.width, 0, 1, 0), r, 1, GRAY),
    "TranslateYRel": lambda i, v, r: i.transform(i.size, AFFINE, (1, 0, 0, 0, 1, 0.45 * v * i.height), r, 1, GRAY),
}


def mix(images: Tensor, kind: str, seed: int, update: int, first: int = 0) -> Tensor:
    """Mixup (alpha 0.5) or CutMix (alpha 1) of neighbors: float [B, 3, H, W] -> the same shape.
    Images 2i and 2i + 1 of the global batch are mixed with each other, as (seed, update, i) alone decide; `first` is
    the position of images[0] in it. There are no labels to mix: the teacher sees the mixed image."""
    if first % 2 or len(images) % 2:
        raise ValueError(f"{kind} pairs neighbors, but a micro-batch has {len(images)} images: choose an even number")
    pairs = images.unflatten(0, (-1, 2))  # [B/2, 2, 3, H, W]
    mixed, partners, (height, width) = pairs.clone(), pairs.flip(1), images.shape[-2:]
    for i in range(len(pairs)):
        rng = generator(kind, seed, update, first // 2 + i)
        if kind == "mixup":
            mixed[i] = pairs[i].lerp(partners[i], rng.beta(0.5, 0.5))
        else:  # a box over a Beta(1, 1) share of the area, uniform center, cut off at the border
            side, y, x = math.sqrt(rng.beta(1, 1)) / 2, *rng.random(2)
            rows = slice(max(round((y - side) * height), 0), round((y + side) * height))
            columns = slice(max(round((x - side) * width), 0), round((x + side) * width))
            mixed[i, ..., rows, columns] = partners[i, ..., rows, columns]
    return mixed.flatten(0, 1)


# --- samples and batches ----------------------------------------------------------------------------------------------

class Images(Dataset):
    """Images of a source, prepared, by (epoch, index): the result depends on (seed, epoch, index) alone.
    `prepare(image, rng)` turns an image into a tensor, as `Augment` does, and takes all its randomness from `rng`."""

    def __init__(self, source: ImageFolder, prepare: Callable[[Image.Image, np.random.Generator], Tensor], seed: int):
        self.source, self.prepare, self.seed = source, prepare, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, list[str]]:
        """The prepared image, and the names of the unreadable files that it replaces; ValueError at 20 in a row."""
        unreadable = []
        for attempt in range(20):
            rng = generator("sample", self.seed, *key, attempt)
            chosen = int(rng.integers(len(self.source))) if attempt else key[1]
            try:
                with self.source.open(chosen) as image:
                    return self.prepare(image, rng), unreadable
            except Exception as error:  # Pillow raises nearly every kind for damaged files
                unreadable.append(self.source.name(chosen))
                last = f"{unreadable[-1]} ({type(error).__name__}: {error})"
        raise ValueError(f"20 images in a row cannot be read, the last one {last}: check the image files")


def collate(samples: list[tuple[Tensor, list[str]]]) -> tuple[Tensor, list[str]]:
    """Samples of `Images` -> [B, 3, S, S], and the names of all unreadable files among them."""
    return torch.stack([image for image, _ in samples]), [name for _, names in samples for name in names]


class Batches(Sampler):
    """The (epoch, index) keys of a whole run, as one rank's micro-batches in order: a DataLoader's `batch_sampler`.
    Each epoch is a random order of all `count` samples, cut into global batches; an incomplete last one is dropped.
    Rank r takes the r-th of `world` equal slices of each, cut into micro-batches (one, when None), so that an update is
    the same samples on any number of ranks. start_update: skip what a resumed run has done. updates: cap the total."""

    def __init__(self, count: int, global_batch: int, epochs: int, seed: int, rank: int = 0, world: int = 1,
                 micro_batch: int | None = None, start_update: int = 0, updates: int | None = None):  # fmt: skip
        self.count, self.global_batch, self.seed, self.rank, self.world = count, global_batch, seed, rank, world
        self.share = global_batch // world
        self.micro_batch = micro_batch or self.share
        if count < global_batch or global_batch % world or self.share % self.micro_batch:
            how = f"from {count} samples by {world} ranks in micro-batches of {self.micro_batch}"
            raise ValueError(f"a global batch of {global_batch} cannot be drawn {how}: use a smaller one they divide")
        self.updates_per_epoch, self.start_update = count // global_batch, start_update
        self.updates = min(self.updates_per_epoch * epochs, math.inf if updates is None else updates)

    def __len__(self) -> int:
        return max(0, self.updates - self.start_update) * (self.share // self.micro_batch)

    def order(self, epoch: int) -> Tensor:
        """The order of all samples in an epoch, int64 [count]."""
        seed = int(generator("order", self.seed, epoch).integers(2**62))
        return torch.randperm(self.count, generator=torch.Generator().manual_seed(seed))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for update in range(self.start_update, self.updates):
            epoch, step = divmod(update, self.updates_per_epoch)
            if step == 0 or update == self.start_update:
                order = self.order(epoch)
            first = step * self.global_batch + self.rank * self.share
            for micro in order[first : first + self.share].split(self.micro_batch):
                yield [(epoch, index) for index in micro.tolist()]


# --- segmentation: a class for every pixel (section 4.1) --------------------------------------------------------------

COCO_GROUPS = {"things": range(1, 92), "stuff": range(92, 183)}
LAYOUTS = (  # images and label maps; class names; what is added to a stored class, modulo 256; kinds of classes
    ("{0}2017", "stuffthingmaps_trainval2017/{0}2017", "labels.txt", 1, COCO_GROUPS),  # {0}: train or val
    ("images/{1}", "annotations/{1}", "objectInfo150.txt", 0, {}),  # ADE20k; {1}: training or validation
    ("images/{0}", "labels/{0}", "labels.txt", 0, {}),  # a plain folder
)
Labeled = namedtuple("Labeled", "image labels")  # a square RGB image, and its pixels' classes: uint8 [maps, S, S]


class Segmentation:
    """One part ("train" or "val") of a data set with label maps, each image at size x size: a sequence of `Labeled`.
    root: a folder as COCO-Stuff and ADE20k distribute theirs, or one with images/train, images/val, labels/train,
    labels/val and labels.txt (a line "3: sky" for each class). A label map is a PNG file with one byte a pixel; an RGB
    file holds three maps, for pixels that have several classes.
    `names` are those of the classes, `groups` the kinds of classes: {"things": range(1, 92), ...}, {} where unknown."""

    def __init__(self, root: Path, part: str, size: int):
        self.size, parts = size, (part, {"train": "training", "val": "validation"}[part])
        for images, maps, names, shift, groups in LAYOUTS:
            images, maps = (os.path.join(root, folder.format(*parts)) for folder in (images, maps))
            if os.path.isdir(images) and os.path.isdir(maps):
                break
        else:
            wanted = "; ".join(" and ".join(layout[:2]).format(*parts) for layout in LAYOUTS)
            raise ValueError(f"{root} holds no {part} images with label maps; it should hold {wanted}")
        self.maps, self.shift = maps, shift
        self.images, (self.names, found) = ImageFolder(images), read_class_names(os.path.join(root, names))
        self.groups = groups or found

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Labeled:
        name = self.images.name(index)
        path = os.path.join(self.maps, os.path.splitext(name)[0] + ".png")
        # neither is turned upright by its EXIF data: maps are drawn over the stored pixels
        image, labels = open_image(os.path.join(self.images.root, name), to_rgb), open_image(path, lambda image: image)
        (width, height), (across, down) = image.size, labels.size
        if abs(width * down - height * across) > max(width, height, across, down):  # beyond rounding
            raise ValueError(f"{path} is {across} x {down}, but its image {width} x {height}: another shape")
        labels = np.asarray(center_square(labels, self.size, NEAREST)) + np.uint8(self.shift)
        if labels.max() >= len(self.names):
            raise ValueError(f"{path} holds class {labels.max()}, but the named classes end at {len(self.names) - 1}")
        labels = labels.reshape(self.size, self.size, -1).transpose(2, 0, 1)
        return Labeled(center_square(image, self.size, BILINEAR), labels)


def center_square(image: Image.Image, size: int, resample: int) -> Image.Image:
    """The largest square at the center, resized to size x size."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), resample, (left, top, left + side, top + side))


def read_class_names(path: Path) -> tuple[list[str], dict[str, list[int]]]:
    """Class names by number, and the kinds of classes where the file tells: from a labels.txt as COCO-Stuff's (lines
    "1: person"; below a line "# things" they are of that kind) or ADE20k's objectInfo150.txt (a table: its numbers
    start at 1, its names come last; 0 is unlabeled)."""
    lines, groups = [line.strip() for line in read_text(path).split("\n") if line.strip()], {}
    try:
        if lines[0].startswith("Idx"):
            rows = [line.split(maxsplit=len(lines[0].split()) - 1) for line in lines[1:]]
            names = {0: "unlabeled"} | {int(row[0]): row[-1] for row in rows}
            stuff = [int(row[0]) for row in rows if "Stuff" in lines[0] and row[-2] == "1"]
            groups = {"things": sorted(names.keys() - {0, *stuff}), "stuff": stuff} if stuff else {}
        else:
            names, members = {}, []
            for line in lines:
                if line.startswith("#"):
                    members = groups.setdefault(line[1:].strip(), [])
                else:
                    number, name = line.split(":", 1)
                    names[int(number)] = name.strip()
                    members.append(int(number))
    except (ValueError, IndexError):
        raise ValueError(f'{path} is not a list of classes, with lines such as "3: sky"') from None
    return [names.get(number, f"class {number}") for number in range(max(names) + 1)], groups


def _count(labels: np.ndarray, patch: int, classes: int) -> np.ndarray:
    """How many pixels of each patch have each class: int64 [N, classes]. Those beyond the last patch are left out."""
    grid = labels.shape[-1] // patch
    row = np.arange(grid * patch) // patch
    slots = (row[:, None] * grid + row) * classes + labels[:, : grid * patch, : grid * patch]
    return np.bincount(slots.ravel(), minlength=grid**2 * classes).reshape(grid**2, classes)


def union(labels: np.ndarray, patch: int, classes: int) -> np.ndarray:
    """The classes of a patch's pixels, 0 ("unlabeled") only where it is alone: [maps, S, S] -> bool [N, classes]."""
    there = _count(labels, patch, classes) > 0
    there[:, 0] &= ~there[:, 1:].any(1)
    return there


def majority(labels: np.ndarray, patch: int, classes: int, unlabeled: bool = True) -> np.ndarray:
    """The most common class (ties: the smallest) in the first map: uint8 [N]. unlabeled=False: 0 only where alone."""
    counts = _count(labels[:1], patch, classes)
    if not unlabeled:
        counts[:, 0] = counts[:, 0] == patch**2
    return counts.argmax(1).astype(np.uint8)


def global_union(labels: np.ndarray, classes: int) -> np.ndarray:
    """The classes of an image's pixels, 0 among them: [maps, S, S] -> bool [classes]."""
    return np.bincount(labels.ravel(), minlength=classes) > 0


class PatchLabels(Dataset):
    """For probes: index -> pixels uint8 [3, S, S], labels of the patches, labels of the image. A set of classes is one
    bit a class (`unpack`): uint8 [N, C / 8] and [C / 8]. With labels="majority" each patch has one class: uint8 [N, 1].
    most: use only this many images of the source, evenly spaced."""

    def __init__(self, source: Segmentation, patch: int, labels: str = "union", most: int | None = None):
        self.source, self.patch, self.labels = source, patch, labels
        self.chosen = np.linspace(0, len(source), min(most or len(source), len(source)), endpoint=False).astype(int)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        (image, labels), classes = self.source[int(self.chosen[index])], len(self.source.names)
        sets = union(labels, self.patch, classes), global_union(labels, classes)
        patches, whole = (np.packbits(members, -1, "little") for members in sets)
        if self.labels == "majority":
            patches = majority(labels, self.patch, classes)[:, None]
        return to_tensor(image), torch.from_numpy(patches), torch.from_numpy(whole)


def unpack(packed: Tensor, classes: int) -> Tensor:
    """uint8 [..., C / 8] -> bool [..., C]."""
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[..., None] >> bits & 1).flatten(-2)[..., :classes].bool()


# --- conversations about images (section 5, appendix D) ---------------------------------------------------------------

# lists of ids and of labels (-100: not learned), the image (a tensor or None), what is wrong with it, what it points at
Example = namedtuple("Example", "ids labels image bad places", defaults=[None, None])


class Conversations(Dataset):
    """The conversations of files in LLaVA's format, JSON lists or JSON lines, in order: (epoch, index) -> `Example`.
    A row has "conversations" (questions and answers in turn; a last question without an answer is dropped) and, where
    it is about an image, "image", a path below `image_root` (one folder for all files, or one for each).
    encode: messages -> ids and labels; prepare: an image -> a tensor; both picklable. workers: to measure the rows.
    `lengths` [n] is how many ids each row has, `has_image` [n] whether it has an image. A row of length 0 cannot be
    used, as `describe` explains; it is in `left_out` and in no batch. ValueError: these are more than 1%.
    `features` [n, ...]: where it is set, an example has its row in place of what `prepare` makes of the image.
    point: for rows with "targets", in pixels of the image as stored: {"box": [[x1, y1, x2, y2], ...], "mask": [...],
        "region": [...]}; masks and regions: see `read_mask`, decode.region: messages, these, (W, H) -> `places`."""

    def __init__(self, files: Sequence[Path], image_root: Path | Sequence[Path], encode: Callable[[list], tuple],
                 prepare: Callable[[Image.Image], Tensor], workers: int = 0, point: Callable | None = None):
        self.files, self.encode, self.prepare, self.point = list(files), encode, prepare, point
        self.features, roots = None, [image_root] if isinstance(image_root, Path) else list(image_root)
        self.roots = roots * len(files) if len(roots) == 1 else roots
        if len(self.roots) != len(files) or not all(map(os.path.isdir, roots)):
            raise ValueError(f"{', '.join(map(str, roots))}: give one folder of images for all files, or one for each")
        rows = ((i, n, row) for i, file in enumerate(files) for n, row in enumerate(read_json(file, True) or [None], 1))
        self._rows = Strings([json.dumps(row).encode() for row in rows])  # each with its file, and its number there
        blocks = DataLoader(range(len(self)), 256, num_workers=workers, collate_fn=self._measure)
        blocks = tqdm(blocks, "measuring conversations", leave=False, delay=2, disable=None)
        self.lengths, has_image = np.concatenate(list(blocks), axis=1)
        self.has_image, self.left_out = has_image > 0, np.flatnonzero(self.lengths == 0)
        if bad := len(self.left_out):
            example = self.describe(self.left_out[0])
            check_unreadable(bad, len(self), "conversations", example)
            if bad == len(self):
                raise ValueError(f"no conversation can be used; for example, {example}")

    def _measure(self, rows: list[int]) -> np.ndarray:
        """How many ids each row has (0: it cannot be used), and whether it has an image: int32 [2, rows]."""
        measures = np.zeros((2, len(rows)), np.int32)
        for i, (row, *_) in enumerate(map(self.row, rows)):
            if not fault(row):
                ids, labels = self._encode(row)
                measures[:, i] = len(ids) * any(label != -100 for label in labels), bool(row.get("image"))
        return measures

    def _encode(self, row: dict) -> tuple[list[int], list[int]]:
        return self.encode(row["conversations"][: len(row["conversations"]) // 2 * 2])

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> tuple[dict, str, Path]:
        """A row as it is in its file, what it is called (the file, and its number there), and its images' folder."""
        file, number, row = json.loads(self._rows[index])
        return row, f"{self.files[file]}, row {number}", self.roots[file]

    def describe(self, index: int) -> str:
        """A row that cannot be used, and why not."""
        row, name, _ = self.row(index)
        return f"{name}: {fault(row) or 'the text is cut off before its first answer, a <REF> or a <region>'}"

    def __getitem__(self, key: tuple[int, int]) -> Example:
        _, index = key  # an example is the same in every epoch
        row, name, root = self.row(index)
        ids, labels = self._encode(row)
        if not self.has_image[index]:
            return Example(ids, labels, None)
        path = os.path.join(root, row["image"])
        try:
            places = None
            if self.point and row.get("targets"):
                image = open_image(path, to_rgb)
                targets = {unit: [read_mask(one, image.size, root) if unit == "mask" or isinstance(one, (dict, str))
                                  else one for one in each] for unit, each in row["targets"].items()}  # fmt: skip
                places = self.point(row["conversations"][: len(row["conversations"]) // 2 * 2], targets, image.size)
            elif self.features is None:
                image = open_image(path)
            image = self.prepare(image) if self.features is None else self.features[index]
            return Example(ids, labels, image, None, places)
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # the last three: targets of another form
            blank = self.prepare(Image.new("RGB", (8, 8))) if self.features is None else self.features[index]
            return Example(ids, [-100] * len(ids), blank, f"{name}: {error}")  # of the batch's shape and modality


def read_mask(mask: str | dict | list, size: tuple[int, int], root: Path = "") -> np.ndarray:
    """A mask, bool [H, W]: the path of a picture below `root` (0 is outside); COCO's run lengths (how many pixels in
    turn, column by column, are outside, inside, outside...; a list, or a string of them); or COCO's polygons, of the
    pixels whose centers lie inside. ValueError: it is of another size than its image, `size` = (W, H)."""
    if isinstance(mask, str):
        inside = np.asarray(open_image(os.path.join(root, mask), to_rgb)).any(2)
    elif isinstance(mask, list):
        inside = np.zeros(size[::-1], bool)
        for points in (np.reshape(polygon, (-1, 2)).clip(0, size) for polygon in mask):
            (left, top), (right, bottom) = np.floor(points.min(0)).astype(int), np.ceil(points.max(0)).astype(int)
            fine = Image.new("1", (9 * (right - left), 9 * (bottom - top)))  # a pixel's center is that of a fine pixel
            ImageDraw.Draw(fine).polygon((9 * (points - (left, top))).ravel().tolist(), fill=1)
            inside[top:bottom, left:right] |= np.asarray(fine)[4::9, 4::9][: size[1] - top, : size[0] - left]
    else:
        lengths, (height, width) = mask["counts"], mask["size"]
        lengths = expand(lengths) if isinstance(lengths, str) else lengths
        inside = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
        inside = inside.reshape(width, height).T if len(inside) == width * height else inside[None]
    if inside.shape != (size[1], size[0]):
        raise ValueError(f"a mask is {inside.shape[1]} x {inside.shape[0]}, but its image {size[0]} x {size[1]}")
    return inside


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """A mask [H, W] as COCO's run lengths."""
    changes = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False, append=not mask[-1, -1]))
    return {"size": list(mask.shape), "counts": np.diff(changes, prepend=0).tolist()}


def expand(text: str) -> list[int]:
    """COCO's run lengths from a string: 5 bits a character, the lowest first, and a sixth that says whether more
    follow; from the fourth on, a number is the difference from the one before the last."""
    lengths, value, shift = [], 0, 0
    for code in text.encode():
        value |= (code - 48 & 31) << shift
        shift += 5
        if not code - 48 & 32:
            value -= (code - 48 >> 4 & 1) << shift  # the highest bit is the sign
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value, shift = 0, 0
    return lengths


class PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, strings and numbers. A pickle that names a class or function could run any code."""

    def find_class(self, module: str, name: str) -> object:
        """Refuse."""
        raise pickle.UnpicklingError(f"the pickle names {module}.{name}, but only plain lists and dicts are safe")


# An image's file name and size; box [x1, y1, x2, y2] and mask of the thing; sentences that refer to it, with their ids
Reference = namedtuple("Reference", "split image size box mask sentences")


def refs(file: Path) -> Iterator[Reference]:
    """RefCOCO, RefCOCO+ or RefCOCOg as distributed: refs(unc).p or refs(umd).p, with instances.json beside it."""
    instances = read_json(os.path.join(os.path.dirname(file), "instances.json"))
    sizes = {image["id"]: (image["width"], image["height"]) for image in instances["images"]}
    things = {thing["id"]: thing for thing in instances["annotations"]}
    try:
        with open(file, "rb") as opened:
            rows = PlainUnpickler(opened, encoding="utf-8", errors="replace").load()  # Python 2 wrote it
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); download it again") from None
    for row in rows:
        (x, y, width, height), mask = things[row["ann_id"]]["bbox"], things[row["ann_id"]].get("segmentation")
        sentences = {sentence["sent_id"]: sentence["sent"] for sentence in row["sentences"]}
        image, size = f"COCO_train2014_{row['image_id']:012d}.jpg", sizes[row["image_id"]]
        yield Reference(row["split"], image, size, [x, y, x + width, y + height], mask, sentences)


def fault(row: object) -> str | None:
    """Why a row cannot be used; None where it can."""
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or len(turns) < 2:
        return "it has no conversation, which takes a question and an answer"
    for number, turn in enumerate(turns):
        role = "gpt" if number % 2 else "human"
        text = turn.get("value") if isinstance(turn, dict) and turn.get("from") == role else None
        if not isinstance(text, str):
            return f'message {number + 1} is not {{"from": "{role}", "value": "some text"}}'
    return None if isinstance(row.get("image") or "", str) else "its image is not a path"


class ConversationBatches(Batches):
    """`Batches` of `Conversations`: the rows of a global batch have similar lengths, and all have images or none has.
    In each epoch a random order of either kind is cut into pools of 50 global batches; a pool is sorted by length and
    cut into its batches; the batches of all pools are shuffled. Rows of a kind that fill no batch are dropped."""

    def __init__(self, source: Conversations, global_batch: int, *more: int, **named: int):
        self.lengths, usable = source.lengths, source.lengths > 0
        self.kinds = [np.flatnonzero(usable & kind) for kind in (source.has_image, ~source.has_image)]
        if not (whole := sum(len(kind) // global_batch for kind in self.kinds)):
            counts = " and ".join(f"{len(kind)} {how} images" for kind, how in zip(self.kinds, ("with", "without")))
            raise ValueError(f"{counts}: neither kind of conversations fills a global batch of {global_batch}")
        super().__init__(whole * global_batch, global_batch, *more, **named)

    def order(self, epoch: int) -> Tensor:
        """The rows of an epoch, batch after batch, int64 [count]."""
        rng, size, batches = generator("conversations", self.seed, epoch), self.global_batch, []
        for kind in self.kinds:
            order = rng.permutation(kind)[: len(kind) // size * size]
            for pool in np.split(order, range(50 * size, len(order), 50 * size)):
                batches.append(pool[np.argsort(self.lengths[pool], kind="stable")].reshape(-1, size))
        batches = torch.from_numpy(rng.permutation(np.concatenate(batches)))  # [updates, global batch]
        # the shortest rows go to the first micro-batch of every rank, so that ranks have equal work at each moment
        return batches.view(len(batches), -1, self.world, self.micro_batch).transpose(1, 2).flatten()


def collate_conversations(examples: Sequence[Example]) -> tuple[dict[str, Tensor | None], list[str]]:
    """Examples -> ids and labels [B, T], padded on the right with 0 and -100, images [B', ...] (None: there are none),
    rows [B'], the examples that the images belong to (None: all of them, or none), and places, what each of them points
    at (empty: none does); and what is bad in them."""
    ids = pad_sequence([torch.tensor(example.ids) for example in examples], True)
    labels = pad_sequence([torch.tensor(example.labels) for example in examples], True, -100)
    rows = [i for i, example in enumerate(examples) if example.image is not None]
    images = torch.stack([examples[i].image for i in rows]) if rows else None
    rows = torch.tensor(rows) if 0 < len(rows) < len(examples) else None
    places = [example.places for example in examples]
    batch = dict(ids=ids, labels=labels, images=images, rows=rows, places=places if any(places) else [])
    return batch, [example.bad for example in examples if example.bad]
