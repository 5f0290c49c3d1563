"""Pictures for training: folders of images, augmentation, batches that do not depend on the machine, built-in scenes.

    source = ImageFolder("imagenet/train", part="train")              # or Scenes(20_000, seed=0)
    dataset = Images(source, prepare=Augment(224), seed=0)
    batches = Batches(len(source), global_batch=1024, epochs=5, seed=0)
    for images, unreadable in DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=8):
        ...                                                            # images: uint8 [B, 3, 224, 224]

Everything random here is a function of a seed and of *what* is drawn (which epoch, which sample), never of *who* draws
it (which rank, which worker, how often the run was interrupted). `generator` is the only source of randomness.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import pickle
import re
import sys
import time
import uuid
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations, product, zip_longest
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps
from PIL.Image import Resampling, Transpose
from tqdm import tqdm

# Pillow refuses 179 million pixels, to guard servers; large data sets hold honest pictures beyond that. Here the limit
# is 2 x 2^28 pixels (2 GiB in memory), and a larger picture counts as unreadable.
Image.MAX_IMAGE_PIXELS = 2**28
warnings.filterwarnings("ignore", module=r"PIL\.")  # odd metadata in one file of a million is no news


class DataError(ValueError):
    """A mistake in what the user gave: one sentence that names the file or folder and says what to do."""

    def __str__(self) -> str:
        return super().__str__().rsplit("DataError: ")[-1].strip()  # drops the traceback that a worker process adds


def generator(purpose: str, *key: int) -> np.random.Generator:
    """A random generator that depends on `purpose` and `key` (integers >= 0) alone."""
    return np.random.default_rng((zlib.crc32(purpose.encode()), *key))


# ---------------------------------------------------------------------------------------------------------------------
# Folders of images, indexed once

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")  # in lower or upper case

# What is known of a folder: its modification time in ns (-1: list it again next time), and its images in order, each
# name followed by a slash: "a.jpg/b.jpg/". Kept end to end, since 13 million Python strings would fill a gigabyte.
Folder = tuple[int, str]


class ImageFolder:
    """The images below `root` at any depth, in the order of their paths: a source for `Images`.

    `part` "train" or "val" keeps one side of a fixed split: an image is held out when a hash of its path below `root`
    is in the lowest `val_share` of all values, so it stays on its side wherever the folder moves and whatever is added.
    Names that start with a dot are passed over.

    The index is kept in `root/.image-index` (in the user's cache folder when `root` cannot be written). Adding or
    removing a file changes its folder's modification time, so the next run asks for those times only and lists what
    changed.

    Raises DataError when `root` is not a folder or cannot be listed, holds no images, or the part is empty.
    """

    def __init__(self, root: str | os.PathLike, part: str = "all", val_share: float = 0.01):
        self.root = os.fspath(root)
        if not os.path.isdir(self.root):
            raise DataError(f"{self.root} is not a folder: give the path of a folder of images")
        folders = {path: os.fsencode(names) for path, (_, names) in sorted(_index(self.root).items()) if names}
        if not folders:
            found = sorted(name for name in os.listdir(self.root) if not name.startswith("."))
            what = f"it holds {len(found)} entries such as {found[0]}" if found else "it is empty"
            raise DataError(f"no images in {self.root}: {what}; images are files that end in {', '.join(EXTENSIONS)}")
        self._folders = list(folders)
        self._first = np.cumsum([0] + [names.count(b"/") for names in folders.values()])  # the first image of each
        self._names = b"".join(folders.values())
        self._ends = np.flatnonzero(np.frombuffer(self._names, np.uint8) == ord("/"))
        self._kept = None
        if part != "all":
            held_out = _hashes(folders) < val_share * 2**32
            self._kept = np.flatnonzero({"train": ~held_out, "val": held_out}[part])
        if not len(self):
            raise DataError(f"a held-out share of {val_share} of the {len(self._ends)} images in {self.root} leaves "
                            f"none for {part}: choose another share, or give a validation folder of its own")

    def __len__(self) -> int:
        return len(self._ends) if self._kept is None else len(self._kept)

    def name(self, index: int) -> str:
        """The path of an image below the root."""
        number = index if self._kept is None else self._kept[index]
        start = self._ends[number - 1] + 1 if number else 0
        folder = self._folders[np.searchsorted(self._first, number, side="right") - 1]
        return os.path.join(folder, os.fsdecode(self._names[start : self._ends[number]]))

    def open(self, index: int) -> Image.Image:
        """An image, its pixels not yet decoded. Raises what Pillow raises when it cannot be read."""
        return Image.open(os.path.join(self.root, self.name(index)))


def _hashes(folders: dict[str, bytes]) -> np.ndarray:
    """A hash of each image's path, uint32 [images]: the same in every run, machine and folder above the root."""
    checksums = []
    for folder, names in folders.items():
        start = zlib.crc32(os.fsencode(folder) + b"/")
        checksums.append(np.array([zlib.crc32(name, start) for name in names.split(b"/")[:-1]], np.uint32))
    # A checksum is linear, so that numbered names can crowd or miss a range of values; the product is not.
    return np.concatenate(checksums) * np.uint32(2654435769)


def _index(root: str) -> dict[str, Folder]:
    """The folders below `root`, by path: known ones from the cache, which is then brought up to date.

    Several processes may do this at once: each reads a whole cache or none, and replaces it by a whole one.
    """
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    place = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:24]
    # in a folder of its own, so that writing the cache does not change the root's modification time each time
    caches = [os.path.join(root, ".image-index", "v1.json"), os.path.join(user, "image-index", place + "-v1.json")]
    known = next(filter(None, map(_read_cache, caches)), {})
    folders = _scan(root, known)
    if folders != known:
        any(_write_cache(file, folders) for file in caches)  # stops at the first that can be written
    return folders


def _scan(root: str, known: dict[str, Folder]) -> dict[str, Folder]:
    """Visits all folders, and lists those whose modification time is not the known one."""
    known_below = {}
    for path in filter(None, known):
        known_below.setdefault(os.path.dirname(path), []).append(path)
    folders, visited, waiting = {}, set(), [""]
    while waiting:
        path = waiting.pop()
        try:
            # A change just after this one may carry the same time, as clocks tick up to 2 s apart: trust none so fresh.
            recent = time.time_ns() - 2_000_000_000
            status = os.stat(os.path.join(root, path))
            if (status.st_dev, status.st_ino) in visited:  # links can make a folder its own ancestor
                continue
            visited.add((status.st_dev, status.st_ino))
            if path in known and known[path][0] == status.st_mtime_ns:
                folders[path], below = known[path], known_below.get(path, [])
            else:
                names, below = _list(root, path)
                folders[path] = (status.st_mtime_ns if status.st_mtime_ns < recent else -1), names
        except FileNotFoundError:  # removed meanwhile
            continue
        except OSError as error:
            where = os.path.join(root, path)
            raise DataError(f"cannot list folder {where} ({error.strerror}): make it readable or move it") from error
        waiting.extend(sorted(below, reverse=True))
    return folders


def _list(root: str, path: str) -> tuple[str, list[str]]:
    """A folder's images and subfolders. The directory itself tells which is which: no file is touched."""
    names, below = [], []
    with os.scandir(os.path.join(root, path)) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.name.lower().endswith(EXTENSIONS) and not entry.is_dir(follow_symlinks=False):
                names.append(entry.name + "/")
            elif entry.is_dir():
                below.append(os.path.join(path, entry.name))
    return "".join(sorted(names)), below


def _read_cache(file: str) -> dict[str, Folder]:
    """The folders of a cached index; empty when there is none or it is damaged."""
    try:
        with open(file, "rb") as source:
            checksum, text = source.read().split(b"\n", 1)
        folders = json.loads(text) if int(checksum) == zlib.crc32(text) else []
        return {path: (modified, names) for path, modified, names in folders}
    except (OSError, ValueError, TypeError):
        return {}


def _write_cache(file: str, folders: dict[str, Folder]) -> bool:
    """Writes a cached index as a whole. False where the place cannot be written."""
    text = json.dumps([(path, *folder) for path, folder in folders.items()]).encode()
    unfinished = f"{file}.{uuid.uuid4().hex}"
    try:
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(unfinished, "xb") as target:
            target.write(b"%d\n" % zlib.crc32(text) + text)
        os.replace(unfinished, file)
        return True
    except OSError:
        if os.path.exists(unfinished):
            os.remove(unfinished)
        return False


# ---------------------------------------------------------------------------------------------------------------------
# From a file to the pixels of a crop

# EXIF orientation -> what makes the picture upright
TURNS = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
         6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1-8 (1: upright). Decodes all formats but JPEG, the one that has it ahead of its pixels."""
    if image.format not in ("JPEG", "MPO"):
        image.load()
    try:
        turn = image.getexif().get(0x0112, 1)
        return turn if turn in TURNS else 1
    except Exception:  # damaged metadata does not make a picture unreadable
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB. 16-bit greys are scaled to 8 bits (Pillow alone would clip them). Transparency is dropped, as in
    torchvision's and timm's folders: such a pixel shows the color stored under it."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def resized_crop(image: Image.Image, size: int, scale: tuple[float, float], resample: Resampling) -> Image.Image:
    """Resizes the shorter side to `size` and then width and height by the factors `scale`; returns the RGB centre crop
    of size x size, reflect-padded where the picture falls short.

    All in one resize of the crop's place in the original, so that what lies outside costs nothing. A JPEG is decoded at
    1/2, 1/4 or 1/8 of its size where that still has every pixel that the whole resized picture would have.
    """
    turn = orientation(image)
    width, height = image.size if turn < 5 else image.size[::-1]
    ratio = min(width, height) / size
    width, height = max(1, round(width * scale[0] / ratio)), max(1, round(height * scale[1] / ratio))
    image.draft("RGB", (width, height) if turn < 5 else (height, width))  # does nothing to other formats
    image = to_rgb(image)
    image = image.transpose(TURNS[turn]) if turn in TURNS else image

    crop = min(width, size), min(height, size)
    left, top = round((width - crop[0]) / 2), round((height - crop[1]) / 2)
    across, down = image.width / width, image.height / height  # decoded pixels to one resized pixel
    right, bottom = min((left + crop[0]) * across, image.width), min((top + crop[1]) * down, image.height)
    # reducing_gap: a picture more than 6 times too large is first averaged over whole blocks of pixels
    image = image.resize(crop, resample, (left * across, top * down, right, bottom), reducing_gap=3.0)
    if crop == (size, size):
        return image
    across, down = [((size - side) // 2, (size - side + 1) // 2) for side in crop]
    return Image.fromarray(np.pad(np.asarray(image), (down, across, (0, 0)), mode="reflect"))


def to_tensor(image: Image.Image, flip: bool = False) -> torch.Tensor:
    """An RGB picture, mirrored if `flip`, as uint8 [3, H, W]."""
    pixels = np.asarray(image)  # [H, W, 3]
    pixels = pixels[:, ::-1] if flip else pixels
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation (appendix C)


@dataclass
class Augment:
    """The paper's training augmentation: (image, rng) -> uint8 [3, size, size].

    Shorter side to `size`; with probability 1/2 zoomed in, so that a uniform share of the area fills the frame; with
    probability 1/2 stretched by a log-uniform aspect; centre crop; bilinear or bicubic at random; mirrored or not.
    That is timm's ResizeKeepRatio and CenterCropOrPad ("rkrc" there), with the same rounding.
    """

    size: int
    randaugment: bool = False
    zoom: tuple[float, float] = (0.08, 1.0)
    zoom_probability: float = 0.5
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    aspect_probability: float = 0.5
    flip_probability: float = 0.5

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        scale, resample, flip = self.draw(rng)
        image = resized_crop(image, self.size, scale, resample)
        if self.randaugment:
            image = randaugment(image, rng)
        # timm mirrors first; as its operations lean to either side alike, the order makes no difference
        return to_tensor(image, flip)

    def draw(self, rng: np.random.Generator) -> tuple[tuple[float, float], Resampling, bool]:
        """Factors of width and height (1: the shorter side has the right size), the filter, whether to mirror."""
        zooms, area, stretches, aspect, cubic, flips = rng.random(6)
        area = self.zoom[0] + (self.zoom[1] - self.zoom[0]) * area if zooms < self.zoom_probability else 1.0
        low, high = map(math.log, self.aspect)
        aspect = math.exp(low + (high - low) * aspect) if stretches < self.aspect_probability else 1.0
        scale = math.sqrt(aspect / area), math.sqrt(1 / (aspect * area))
        return scale, Resampling.BICUBIC if cubic < 0.5 else Resampling.BILINEAR, bool(flips < self.flip_probability)


def randaugment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """RandAugment m9-mstd0.5-inc1: twice, with probability 1/2, a random operation at a level of about 9 in 10."""
    for name in rng.choice(OPERATIONS, size=2):
        applies, positive, cubic = rng.random(3) < 0.5
        level = min(max(rng.normal(9, 0.5), 0), 10) / 10
        if applies:
            image = operation(str(name), image, level if positive else -level, cubic)
    return image


OPERATIONS = ("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color",
              "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


def operation(name: str, image: Image.Image, level: float, cubic: bool) -> Image.Image:
    """One of timm's "increasing" operations at a level in [-1, 1]; its sign is a direction, where there is one."""
    resample, grey, size = Resampling.BICUBIC if cubic else Resampling.BILINEAR, (128, 128, 128), abs(level)

    def affine(*matrix: float) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=grey)

    match name:
        case "AutoContrast": return ImageOps.autocontrast(image)
        case "Equalize": return ImageOps.equalize(image)
        case "Invert": return ImageOps.invert(image)
        case "Rotate": return image.rotate(30 * level, resample, fillcolor=grey)
        case "Posterize": return ImageOps.posterize(image, max(1, 4 - int(4 * size)))
        case "Solarize": return ImageOps.solarize(image, 256 - int(256 * size))
        case "SolarizeAdd": return image.point([v + int(110 * size) * (v < 128) for v in range(256)] * 3)
        case "ShearX": return affine(1, 0.3 * level, 0, 0, 1, 0)
        case "ShearY": return affine(1, 0, 0, 0.3 * level, 1, 0)
        case "TranslateXRel": return affine(1, 0, 0.45 * level * image.width, 0, 1, 0)
        case "TranslateYRel": return affine(1, 0, 0, 0, 1, 0.45 * level * image.height)
        case _: return getattr(ImageEnhance, name)(image).enhance(max(0.1, 1 + 0.9 * level))  # Color ... Sharpness


def mix(images: torch.Tensor, kind: str, seed: int, update: int, first: int = 0) -> torch.Tensor:
    """Mixup (alpha 0.5) or CutMix (alpha 1) of neighbours: float [B, 3, H, W] -> the same shape.

    `first` is the place of images[0] in the global batch. Its images 2i and 2i + 1 are mixed with each other, in a way
    that depends on (seed, update, i) alone: slices of a batch are mixed as the whole is. There are no labels to mix:
    the teacher sees the mixed picture. Raises DataError for an unknown kind or where a slice tears a pair apart.
    """
    if kind not in ("mixup", "cutmix"):
        raise DataError(f"unknown mixing {kind!r}: use mixup or cutmix")
    if first % 2 or len(images) % 2:
        raise DataError(f"{kind} pairs neighbours, but a micro-batch has {len(images)} images: choose an even number")
    pairs = images.unflatten(0, (-1, 2))  # [B/2, 2, 3, H, W]
    partners = pairs.flip(1)
    rngs = [generator(kind, seed, update, first // 2 + i) for i in range(len(pairs))]
    if kind == "mixup":
        share = images.new_tensor([rng.beta(0.5, 0.5) for rng in rngs])
        return pairs.lerp(partners, share.view(-1, 1, 1, 1, 1)).flatten(0, 1)
    mixed, (height, width) = pairs.clone(), images.shape[-2:]
    for i, rng in enumerate(rngs):  # a box over a Beta(1, 1) share of the area, uniform centre, cut off at the border
        side, y, x = math.sqrt(rng.beta(1, 1)) / 2, *rng.random(2)
        rows = slice(max(round((y - side) * height), 0), round((y + side) * height))
        columns = slice(max(round((x - side) * width), 0), round((x + side) * width))
        mixed[i, ..., rows, columns] = partners[i, ..., rows, columns]
    return mixed.flatten(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Datasets and batches


class Images(torch.utils.data.Dataset):
    """Prepared pictures of a source, addressed by (epoch, index): what comes out depends on (seed, epoch, index) alone.

    A source is anything with a length, `open(index)` -> PIL picture, and `name(index)`. `prepare(image, rng)` turns a
    picture into a tensor, as `Augment` does, with all its randomness from `rng`.
    """

    ATTEMPTS = 20

    def __init__(self, source: ImageFolder | Scenes,
                 prepare: Callable[[Image.Image, np.random.Generator], torch.Tensor], seed: int):
        self.source, self.prepare, self.seed = source, prepare, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, list[str]]:
        """The picture, and the names of unreadable ones met on the way, for which another one of the source stands in.

        Raises DataError when 20 pictures in a row could not be read.
        """
        epoch, index = key
        unreadable = []
        for attempt in range(self.ATTEMPTS):
            rng = generator("sample", self.seed, epoch, index, attempt)
            chosen = index if attempt == 0 else int(rng.integers(len(self.source)))
            try:
                with self.source.open(chosen) as image:
                    return self.prepare(image, rng), unreadable
            except Exception as error:  # on damaged files Pillow raises nearly every kind
                if not isinstance(error, OSError) and self._readable(chosen):
                    raise  # the file is fine, so the fault is elsewhere, and must not pass for the file's
                unreadable.append(self.source.name(chosen))
                cause = error
        raise DataError(f"{self.ATTEMPTS} pictures in a row could not be read, the last one {unreadable[-1]} "
                        f"({type(cause).__name__}: {cause}): check the image files") from cause

    def _readable(self, index: int) -> bool:
        try:
            with self.source.open(index) as image:
                to_rgb(image)
            return True
        except Exception:
            return False


def collate(samples: list[tuple[torch.Tensor, list[str]]]) -> tuple[torch.Tensor, list[str]]:
    """Samples of `Images` -> ([B, 3, S, S], names of all the unreadable files met)."""
    return torch.stack([image for image, _ in samples]), [name for _, names in samples for name in names]


class Batches(torch.utils.data.Sampler):
    """The (epoch, index) keys of a whole run, as one rank's micro-batches in order: a DataLoader's `batch_sampler`.

    Each epoch is a random order of all `count` samples, cut into global batches; an incomplete last one is dropped.
    Rank r takes the r-th of `world` equal slices of each, cut into micro-batches (one, when None), so that an update is
    the same samples on any number of ranks. `start_update` skips what a resumed run has done; `updates` caps the total.

    Raises DataError when `count` is smaller than a global batch, or ranks and micro-batches do not divide it.
    """

    def __init__(self, count: int, global_batch: int, epochs: int, seed: int, rank: int = 0, world: int = 1,
                 micro_batch: int | None = None, start_update: int = 0, updates: int | None = None):
        if count < global_batch:
            raise DataError(f"only {count} images, fewer than one global batch of {global_batch}: use a smaller batch")
        self.share, self.rank = global_batch // world, rank
        self.micro_batch = self.share if micro_batch is None else micro_batch
        if global_batch % world or self.micro_batch < 1 or self.share % self.micro_batch:
            raise DataError(f"a global batch of {global_batch} cannot be split over {world} ranks into micro-batches "
                            f"of {self.micro_batch}: choose sizes that divide it")
        self.count, self.global_batch, self.seed = count, global_batch, seed
        self.start_update, self.updates = start_update, self.updates_per_epoch * epochs
        if updates is not None:
            self.updates = min(updates, self.updates)

    @property
    def updates_per_epoch(self) -> int:
        """Whole global batches in an epoch."""
        return self.count // self.global_batch

    def __len__(self) -> int:
        """Micro-batches from `start_update` to the end."""
        return max(0, self.updates - self.start_update) * (self.share // self.micro_batch)

    def order(self, epoch: int) -> torch.Tensor:
        """The order of all samples in an epoch, int64 [count]."""
        seed = int(generator("order", self.seed, epoch).integers(2**62))
        return torch.randperm(self.count, generator=torch.Generator().manual_seed(seed))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        current = None
        for update in range(self.start_update, self.updates):
            epoch, step = divmod(update, self.updates_per_epoch)
            if epoch != current:
                order, current = self.order(epoch), epoch
            first = step * self.global_batch + self.rank * self.share
            for start in range(first, first + self.share, self.micro_batch):
                yield [(epoch, index) for index in order[start : start + self.micro_batch].tolist()]


class Unreadable:
    """Keeps count of unreadable files: each is named once, and too many of them end the run.

    Too many is more than 1% of all samples seen, with 5 to spare: two bad files among the first hundred do not stop a
    good data set, while a small folder of half-broken images stops within a few batches.
    """

    LIMIT, SPARE = 0.01, 5
    WHAT, NOTE = "images", "unreadable, replaced by another image"

    def __init__(self, output: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)):
        self.output, self.seen, self.count = output, 0, 0
        self._named = set()

    def add(self, names: Sequence[str], seen: int) -> None:
        """Takes the unreadable names met among `seen` more samples. Raises DataError when there are too many."""
        self.seen, self.count = self.seen + seen, self.count + len(names)
        for name in names:
            if name not in self._named:
                self._named.add(name)
                self.output(f"{self.NOTE}: {name}")
        if self.count > self.LIMIT * self.seen + self.SPARE:
            example = f" (such as {min(self._named)})" if self._named else ""
            raise DataError(f"{self.count} {self.WHAT} could not be read{example} in {self.seen} samples, more than "
                            f"{self.LIMIT:.0%}: repair or remove them")

    def state_dict(self) -> dict[str, int]:
        """The counts. A resumed run names a file once more when it meets it again."""
        return {"seen": self.seen, "count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from counts that `state_dict` gave."""
        self.seen, self.count = state["seen"], state["count"]


# ---------------------------------------------------------------------------------------------------------------------
# Segmentation: pictures with a class for every pixel (section 4.1)


@dataclass(frozen=True)
class Layout:
    """Where a data set keeps each part's images, their annotations (the same names, .png), and its class names."""

    images: str
    annotations: str
    parts: dict[str, str]  # "train" and "val" -> what stands for {} in the two folders
    names: str
    shift: int = 0  # an annotated v means class (v + shift) mod 256
    groups: dict[str, range] = field(default_factory=dict)  # kinds of classes that are reported apart


PARTS = {"train": "train", "val": "val"}
LAYOUTS = {
    "COCO-Stuff": Layout("{}2017", "stuffthingmaps_trainval2017/{}2017", PARTS, "labels.txt", 1,
                         {"things": range(1, 92), "stuff": range(92, 183)}),
    "ADE20k": Layout("images/{}", "annotations/{}", {"train": "training", "val": "validation"}, "objectInfo150.txt"),
    "a plain folder": Layout("images/{}", "labels/{}", PARTS, "labels.txt"),
}


class Labelled(NamedTuple):
    """A square RGB picture and the class of each of its pixels: uint8 [1, S, S], maps first as in `Scene.labels`."""

    image: Image.Image
    labels: np.ndarray


class Segmentation:
    """One part ("train" or "val") of a data set with label maps, each picture at size x size: a sequence of `Labelled`.

    root: a folder as COCO-Stuff and ADE20k distribute theirs, or one with images/train, images/val, labels/train,
    labels/val (PNG files, one value a pixel) and labels.txt (a line "3: sky" for each class).
    `names` are those of the classes, `groups` the kinds of classes: {"things": range(1, 92), ...}, {} where unknown;
    the first label map holds classes below `first_map`.

    Raises DataError when a folder, an annotation or the names are missing; an item does when a file cannot be read,
    an annotation has another shape than its image, or it holds a value that has no name.
    """

    def __init__(self, root: str | os.PathLike, part: str, size: int):
        root, self.size = os.fspath(root), size
        for self.layout in LAYOUTS.values():
            of_part = self.layout.parts[part]
            images, self.annotations = (os.path.join(root, *folder.format(of_part).split("/"))
                                        for folder in (self.layout.images, self.layout.annotations))
            if os.path.isdir(images) and os.path.isdir(self.annotations):
                break
        else:
            wanted = "; ".join(f"{name}: {layout.images.format(layout.parts[part])}, "
                               f"{layout.annotations.format(layout.parts[part])}, {layout.names}"
                               for name, layout in LAYOUTS.items())
            raise DataError(f"{root}: holds no {part} images with label maps; it should hold, for {wanted}")
        self.names, groups = read_class_names(os.path.join(root, self.layout.names))
        self.groups, self.first_map = self.layout.groups or groups, len(self.names)
        self.images = ImageFolder(images)
        there = {os.path.join(folder, name) for folder, _, names in os.walk(self.annotations) for name in names}
        missing = [i for i in range(len(self)) if self._annotation(i) not in there]
        if missing:
            raise DataError(f"{self._annotation(missing[0])}: is missing, the annotation of an image ({len(missing)} of "
                            f"{len(self)} images have none): add it, or remove the image")

    def __len__(self) -> int:
        return len(self.images)

    def _annotation(self, index: int) -> str:
        return os.path.join(self.annotations, os.path.splitext(self.images.name(index))[0] + ".png")

    def __getitem__(self, index: int) -> Labelled:
        paths = os.path.join(self.images.root, self.images.name(index)), self._annotation(index)
        opened = []
        for path in paths:
            try:
                opened.append(Image.open(path))
                opened[-1].load()
            except Exception as error:  # on damaged files Pillow raises nearly every kind
                raise DataError(f"{path}: cannot be read ({type(error).__name__}): repair it, or remove it and its "
                                "counterpart") from None
        image, annotation = opened  # neither is turned upright by its EXIF data: maps are drawn over the stored pixels
        if annotation.mode not in ("L", "P"):
            raise DataError(f"{paths[1]}: is of mode {annotation.mode}; a label map has one byte a pixel")
        (width, height), (across, down) = image.size, annotation.size
        if abs(width * down - height * across) > max(width, height, across, down):  # beyond rounding
            raise DataError(f"{paths[1]}: is {across} x {down}, but its image {width} x {height}: another shape")
        labels = np.asarray(centre_square(annotation, self.size, Resampling.NEAREST)) + np.uint8(self.layout.shift)
        if labels.max() >= len(self.names):
            raise DataError(f"{paths[1]}: holds class {labels.max()}, but {self.layout.names} ends at "
                            f"{len(self.names) - 1}")
        return Labelled(centre_square(to_rgb(image), self.size, Resampling.BILINEAR), labels[None])


def centre_square(image: Image.Image, size: int, resample: Resampling) -> Image.Image:
    """The largest centre square, resized to size x size."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), resample, (left, top, left + side, top + side))


def read_class_names(path: str) -> tuple[list[str], dict[str, range | list[int]]]:
    """Class names by number, and the kinds of classes where the file tells: from COCO-Stuff's labels.txt ("1: person")
    or ADE20k's objectInfo150.txt (a table: its numbers start at 1, its names come last; 0 is unlabeled)."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file if line.strip()]
        if lines[0].startswith("Idx"):
            columns = lines[0].split()
            rows = [dict(zip(columns, line.split(maxsplit=len(columns) - 1))) for line in lines[1:]]
            names = {0: "unlabeled"} | {int(row["Idx"]): row["Name"] for row in rows}
            stuff = {number for number, row in enumerate(rows, 1) if row.get("Stuff") == "1"}
            groups = {"things": sorted(names.keys() - stuff - {0}), "stuff": sorted(stuff)} if stuff else {}
        else:
            names = {int(number): name.strip() for number, name in (line.split(":", 1) for line in lines)}
            groups = {}
    except OSError:
        raise DataError(f"{path}: is missing; this file has the names of the classes") from None
    except (ValueError, KeyError, IndexError):
        raise DataError(f'{path}: is no list of classes, lines such as "3: sky"') from None
    if not 0 <= min(names) <= max(names) < 256:
        raise DataError(f"{path}: has classes {min(names)} to {max(names)}; label maps hold 0 to 255")
    return [names.get(number, f"class {number}") for number in range(max(names) + 1)], groups


@functools.cache
def _slots(grid: int, patch: int, classes: int) -> np.ndarray:
    """For each pixel of grid x grid patches the first of its patch's slots in a flat [N * classes]: [S, S]."""
    row = np.arange(grid * patch) // patch
    return (row[:, None] * grid + row) * classes


def union(labels: np.ndarray, patch: int, classes: int) -> np.ndarray:
    """Label of a patch: the set of classes of its pixels. "Unlabeled" (0) counts only where it is the only one.

    labels: uint8 [maps, S, S], below `classes` -> bool [N, classes]. Pixels beyond the last whole patch are left out.
    """
    grid = labels.shape[-1] // patch
    there = np.zeros(grid**2 * classes, bool)
    for pixels in labels[:, : grid * patch, : grid * patch]:
        new = np.ones(pixels.shape, bool)  # False where a pixel repeats its left neighbour, which most do
        np.not_equal(pixels[:, 1:], pixels[:, :-1], out=new[:, 1:])
        new[:, ::patch] = True  # a patch's first column has no neighbour in the patch
        new = np.flatnonzero(new)
        there[_slots(grid, patch, classes).ravel()[new] + pixels.ravel()[new]] = True  # ticks its class in its patch
    there = there.reshape(grid**2, classes)
    there[:, 0] &= ~there[:, 1:].any(1)
    return there


def majority(labels: np.ndarray, patch: int, classes: int, unlabeled: bool = True) -> np.ndarray:
    """Label of a patch: the most common class of its pixels (ties: the smallest) in the first map. uint8 [N].

    unlabeled=False: class 0 only where it is the only one.
    """
    grid = labels.shape[-1] // patch
    slots = _slots(grid, patch, classes) + labels[0, : grid * patch, : grid * patch]
    counts = np.bincount(slots.ravel(), minlength=grid**2 * classes).reshape(grid**2, classes)
    if not unlabeled:
        counts[:, 0] = counts[:, 0] == patch**2
    return counts.argmax(1).astype(np.uint8)


def global_union(labels: np.ndarray, classes: int) -> np.ndarray:
    """Label of an image: the set of classes of its pixels, 0 among them. uint8 [maps, S, S] -> bool [classes]."""
    return np.bincount(labels.ravel(), minlength=classes) > 0


class PatchLabels(torch.utils.data.Dataset):
    """Of `Segmentation` or `Scenes`, index -> pixels uint8 [3, S, S], labels of its patches, labels of the image.

    A set of classes is packed 8 a byte (`unpack`): uint8 [N, C / 8] and [C / 8]; with labels="majority" patches have
    one class each: uint8 [N, 1]. `most`: so many images, evenly spaced.
    """

    def __init__(self, source: Segmentation | Scenes, patch: int, labels: str = "union", most: int | None = None):
        self.source, self.patch, self.labels = source, patch, labels
        self.chosen = np.linspace(0, len(source), min(most or len(source), len(source)), endpoint=False).astype(int)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        item, classes = self.source[int(self.chosen[index])], len(self.source.names)
        if self.labels == "majority":
            patches = majority(item.labels, self.patch, classes)[:, None]
        else:
            patches = np.packbits(union(item.labels, self.patch, classes), -1, "little")
        whole = np.packbits(global_union(item.labels, classes), -1, "little")
        return to_tensor(item.image), torch.from_numpy(patches), torch.from_numpy(whole)


def unpack(packed: torch.Tensor, classes: int) -> torch.Tensor:
    """uint8 [..., C / 8] -> bool [..., C]."""
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[..., None] >> bits & 1).flatten(-2)[..., :classes].bool()


# ---------------------------------------------------------------------------------------------------------------------
# Scenes: procedural pictures of which everything is known


def _arc(start: float, stop: float, points: int, radius: float = 0.5, center: float = 0.0) -> list[tuple[float, float]]:
    """Points of a circle around (center, 0), angles in degrees, both ends included."""
    angles = np.radians(np.linspace(start, stop, points))
    return [(center + radius * math.cos(a), radius * math.sin(a)) for a in angles]


# Each shape is one closed outline of about unit width, y pointing down. The ring is a circle and a smaller one run
# backwards, joined by a slit of no width.
OUTLINES = {shape: np.array(points) for shape, points in {
    "circle": _arc(0, 360, 33),
    "square": [(-0.43, -0.43), (0.43, -0.43), (0.43, 0.43), (-0.43, 0.43)],
    "triangle": [(0, -0.5), (0.52, 0.42), (-0.52, 0.42)],
    "diamond": [(0, -0.58), (0.38, 0), (0, 0.58), (-0.38, 0)],
    "cross": [(-0.17, -0.51), (0.17, -0.51), (0.17, -0.17), (0.51, -0.17), (0.51, 0.17), (0.17, 0.17),
              (0.17, 0.51), (-0.17, 0.51), (-0.17, 0.17), (-0.51, 0.17), (-0.51, -0.17), (-0.17, -0.17)],
    "ring": _arc(0, 360, 33) + _arc(360, 0, 25, radius=0.27),
    "star": [point for a in range(-90, 270, 72) for point in (_arc(a, a, 1, 0.57) + _arc(a + 36, a + 36, 1, 0.24))],
    "bar": [(-0.55, -0.16), (0.55, -0.16), (0.55, 0.16), (-0.55, 0.16)],
    "crescent": _arc(42, 318, 25) + _arc(296.4, 63.6, 17, radius=0.3735, center=0.2055),
    "hexagon": _arc(0, 300, 6),
}.items()}
PALETTE = {"red": (222, 40, 44), "orange": (250, 134, 20), "yellow": (244, 222, 50), "green": (50, 172, 62),
           "cyan": (56, 206, 214), "blue": (52, 88, 232), "purple": (152, 58, 204), "white": (238, 238, 238)}


@dataclass
class Object:
    """One thing in a scene; `box` is [x1, y1, x2, y2] of its visible part, in shares of the picture's side."""

    shape: str
    color: str
    box: list[float]


@dataclass
class Scene:
    """A picture with its truth. `labels` is uint8 [2, H, W]: each pixel's shape (0 nothing, 1-10) and color (0 nothing,
    11-18). `objects` are in the order of drawing: later ones cover earlier ones. `key` is (seed, index)."""

    image: Image.Image
    labels: np.ndarray
    objects: list[Object]
    name: str
    key: tuple[int, int]

    @property
    def conversations(self) -> list[dict]:
        """Questions with true answers, as rows of a LLaVA conversation file; "kind" is caption, count, color, refer,
        relation, presence (one yes, one no), list or tally. What the scene does not allow is left out: the color of a
        shape that occurs twice, the relation of things that lie too close."""
        rng, rows = generator("questions", *self.key), []
        for ask in (_about, _relation, _presence, _lists):
            for kind, question, answer in ask(self.objects, rng):
                turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
                identity = f"{self.name}-{len(rows)}"
                rows.append({"id": identity, "image": self.name, "conversations": turns, "kind": kind})
        return rows


class Scenes:
    """`count` procedural pictures, each 2 to 5 overlapping shapes on a dark texture, from (seed, index) alone; a source
    for `Images`. Label values 1-10 are SHAPES, 11-18 COLORS. Another seed gives other scenes."""

    SHAPES, COLORS = tuple(OUTLINES), tuple(PALETTE)
    names = ["nothing", *SHAPES, *COLORS]  # and `groups`: as in `Segmentation`
    groups = {"shapes": range(1, 1 + len(SHAPES)), "colors": range(1 + len(SHAPES), 1 + len(SHAPES) + len(COLORS))}
    first_map = 1 + len(SHAPES)
    FINE = 3  # drawn at 3 times the size, then averaged; odd, so that a pixel's centre is the centre of a fine pixel
    SMALLEST, LARGEST = 0.18, 0.42  # objects, in shares of the picture's side
    TURN = 15  # degrees, at most
    VISIBLE = 0.45  # every object keeps at least this share of its area

    def __init__(self, count: int, seed: int, size: int = 64):
        self.count, self.seed, self.size = count, seed, size

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        """What a scene is called."""
        return f"scene-{self.seed}-{index:06d}.png"

    def open(self, index: int) -> Image.Image:
        """The picture alone."""
        return self[index].image

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        rng = generator("scene", self.seed, index)
        wanted = int(rng.integers(2, 6))
        # no two objects agree in shape and color, so that "the red ring" is one thing
        combinations = rng.permutation(len(self.SHAPES) * len(self.COLORS))[:wanted]
        kinds = [divmod(int(number), len(self.COLORS)) for number in combinations]
        fine, seen = self._place([self.SHAPES[shape] for shape, _ in kinds], rng)
        labels, objects = np.zeros((2, self.size, self.size), np.uint8), []
        for number, (shape, color) in enumerate(kinds, 1):
            rows, columns = np.nonzero(seen == number)
            labels[:, rows, columns] = [[1 + shape], [1 + len(self.SHAPES) + color]]
            corners = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            objects.append(Object(self.SHAPES[shape], self.COLORS[color], [float(c) / self.size for c in corners]))
        image = self._paint(fine, [PALETTE[thing.color] for thing in objects], rng)
        return Scene(image, labels, objects, self.name(index), (self.seed, index))

    def _place(self, shapes: list[str], rng: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
        """Draws object after object, trying another place where too much of one would be hidden.

        Returns the map of which object is seen where (0 none, 1 the first...), as a fine picture and at pixel centres.
        """
        side = self.size * self.FINE
        fine, areas = Image.new("L", (side, side)), np.zeros(1, int)
        while len(areas) <= len(shapes):
            outline = self._outline(shapes[len(areas) - 1], rng) * side
            trial = fine.copy()
            ImageDraw.Draw(trial).polygon(outline.ravel().tolist(), fill=len(areas))
            visible = np.asarray(trial.resize((self.size, self.size), Resampling.NEAREST))  # at pixel centres
            pixels = np.bincount(visible.ravel(), minlength=len(areas) + 1)
            if (pixels[1:-1] >= self.VISIBLE * areas[1:]).all() and pixels[-1] > 0:
                fine, seen, areas = trial, visible, np.append(areas, pixels[-1])
        return fine, seen

    def _outline(self, shape: str, rng: np.random.Generator) -> np.ndarray:
        """A shape's outline [points, 2], scaled, turned and moved to a random place inside the unit square."""
        size, angle, *place = rng.random(4)
        angle = math.radians(self.TURN * (2 * angle - 1))
        rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        outline = OUTLINES[shape] @ rotation * (self.SMALLEST + (self.LARGEST - self.SMALLEST) * size)
        low, high = outline.min(0), outline.max(0)
        return outline - low + np.array(place) * (1 - (high - low))

    def _paint(self, fine: Image.Image, colors: list[tuple[int, int, int]], rng: np.random.Generator) -> Image.Image:
        """Colors the fine map, averages it down over a soft dark texture, and adds a little noise."""
        shades = rng.uniform(0.82, 1.08, len(colors))
        palette = [(0, 0, 0, 0)] + [(*(min(255, round(c * s)) for c in rgb), 255) for rgb, s in zip(colors, shades)]
        fine.putpalette(bytes(np.array(palette, np.uint8)), "RGBA")
        objects = fine.convert("RGBA").reduce(self.FINE)  # a pixel's alpha is the share of it that objects cover
        texture = rng.uniform(12, 62, 3) + rng.uniform(-22, 22, (6, 6, 3))
        picture = Image.fromarray(texture.clip(0, 255).astype(np.uint8)).resize(objects.size, Resampling.BICUBIC)
        picture.paste(objects, mask=objects)
        pixels = np.asarray(picture) + 4 * rng.standard_normal((self.size, self.size, 3), np.float32)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


# Questions about a scene: (objects, rng) -> (kind, question, answer). The instructions that follow a question are those
# of the benchmarks (figure 5). A kind of thing is a pair (color, shape), None where it does not matter.
SHORT = "\nAnswer the question using a single word or phrase."
Rows = Iterator[tuple[str, str, str]]


def _noun(color: str | None, shape: str | None, article: str = "") -> str:
    """("red", None, "a") -> "a red object"."""
    noun = " ".join(filter(None, (color, shape or "object")))
    return f"{article}{'n' if article == 'a' and noun[0] in 'aeiou' else ''} {noun}".strip()


def _matching(objects: list[Object], color: str | None, shape: str | None) -> int:
    return sum(color in (None, thing.color) and shape in (None, thing.shape) for thing in objects)


def _one(items: Sequence, rng: np.random.Generator):
    return items[int(rng.integers(len(items)))]


def _from_left(objects: list[Object]) -> list[Object]:
    return sorted(objects, key=lambda o: o.box[0] + o.box[2])


def _about(objects: list[Object], rng: np.random.Generator) -> Rows:
    nouns = [_noun(o.color, o.shape, "a") for o in _from_left(objects)]
    yield "caption", "Describe the image.", f"From left to right: {', '.join(nouns[:-1])} and {nouns[-1]}."

    thing = _one(objects, rng)
    kind = _one([(None, None), (thing.color, None), (None, thing.shape), (None, _one(Scenes.SHAPES, rng))], rng)
    plural = _noun(*kind) + ("es" if kind[1] == "cross" else "s")
    yield "count", f"How many {plural} are there?{SHORT}", str(_matching(objects, *kind))

    single = [o for o in objects if _matching(objects, None, o.shape) == 1]
    if single:
        thing = _one(single, rng)
        yield "color", f"What color is the {thing.shape}?{SHORT}", thing.color

    thing = _one(objects, rng)
    kinds = [(thing.color, thing.shape), (thing.color, None), (None, thing.shape)]
    noun = _noun(*_one([kind for kind in kinds if _matching(objects, *kind) == 1], rng), "the")
    question = f'Please provide the bounding box coordinate of the region this sentence describes: "{noun}"'
    yield "refer", question, "[" + ", ".join(f"{side:.2f}" for side in thing.box) + "]"


def _relation(objects: list[Object], rng: np.random.Generator, margin: float = 0.2) -> Rows:
    """About two things whose centres lie at least `margin` apart along the axis in question."""
    pairs = [(a, b, axis) for a, b in permutations(objects, 2) for axis in (0, 1)
             if (b.box[axis] + b.box[axis + 2] - a.box[axis] - a.box[axis + 2]) / 2 >= margin]
    if pairs:
        a, b, axis = _one(pairs, rng)
        words = [("to the left of", "to the right of"), ("above", "below")][axis]
        swapped, true = rng.integers(2, size=2)
        first, second = (b, a) if swapped else (a, b)
        relation = words[swapped if true else 1 - swapped]
        subject, other = _noun(first.color, first.shape, "The"), _noun(second.color, second.shape, "the")
        statement = f"{subject} is {relation} {other}."
        yield "relation", (f'Based on the image, is this statement "True" or "False"? {statement}\n'
                           'Respond with "True" or "False" directly.'), str(bool(true))


def _presence(objects: list[Object], rng: np.random.Generator) -> Rows:
    for answer in ("Yes", "No"):
        by_color, by_shape = _one([(True, False), (False, True), (True, True)], rng)
        kinds = product(Scenes.COLORS if by_color else [None], Scenes.SHAPES if by_shape else [None])
        kind = _one([kind for kind in kinds if (_matching(objects, *kind) > 0) == (answer == "Yes")], rng)
        yield "presence", f"Is there {_noun(*kind, 'a')} in the image?{SHORT}", answer


def _lists(objects: list[Object], rng: np.random.Generator) -> Rows:
    """Answers in which each word to be found out stands right behind the one that it is about."""
    pairs = ", ".join(f"{o.shape} {o.color}" for o in _from_left(objects))
    yield "list", "List the objects and their colors from left to right.", pairs
    counts = [(word, _matching(objects, word, None)) for word in Scenes.COLORS]
    counts += [(word, _matching(objects, None, word)) for word in Scenes.SHAPES]
    yield "tally", "Count each color and shape.", ", ".join(f"{word} {count}" for word, count in counts)


# ---------------------------------------------------------------------------------------------------------------------
# Conversations about pictures (sections 5, D): LLaVA's files, or questions about the scenes

Messages = list[dict[str, str]]  # [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
Encode = Callable[[Messages], tuple[list[int], list[int]]]  # -> ids, labels
PLACE = np.dtype([("start", "i8"), ("size", "i8")])  # of a row in its file, in bytes
MEASURE = np.dtype([("tokens", "i4"), ("image", "?")])  # of a row: its length (0: it cannot be used), its modality


class Example(NamedTuple):
    """A conversation, encoded. `bad` says what is wrong with its picture: then there is a blank one, and no label."""

    ids: list[int]
    labels: list[int]  # -100 where nothing is learned
    image: torch.Tensor | None
    bad: str | None = None


class Conversations(torch.utils.data.Dataset):
    """The conversations of files in LLaVA's format, JSON lists or JSON lines, end to end: (epoch, index) -> `Example`.

    A row has "conversations" (`Messages`: questions and answers in turn; a last question without an answer is dropped)
    and, where it is about a picture, "image", a path below its file's root.

    files: their paths. image_root: a folder for all, or one for each. encode: messages -> ids and labels; prepare: a
    picture -> a tensor; both must be picklable, for data processes. workers: so many of these index the files.

    `lengths` [n] is how many ids each row has, `has_image` [n] whether it has a picture, `stage` [n] when in an epoch it
    comes: a lower stage before a higher one; here all are 0. A row of length 0 cannot be used, as `describe` explains; no
    batch has it. A picture that turns out to be missing or damaged makes the example `bad`. A file is read as a whole
    once; what that shows is kept beside it, or in the user's cache folder, for as long as neither the file nor what
    `encode` is made of changes.

    Raises DataError for a file that is missing, empty or no JSON, and when more than 1% of the rows cannot be used.
    """

    def __init__(self, files: Sequence[str | os.PathLike], image_root: str | os.PathLike | Sequence[str | os.PathLike],
                 encode: Encode, prepare: Callable[[Image.Image], torch.Tensor], workers: int = 0):
        self.files, self.encode, self.prepare = [os.fspath(file) for file in files], encode, prepare
        roots = [image_root] if isinstance(image_root, (str, os.PathLike)) else list(image_root)
        if len(roots) not in (1, len(files)):
            raise DataError(f"{len(roots)} image folders for {len(files)} files: give one for all, or one for each")
        self.roots = roots * (len(files) // len(roots))
        for root in roots:
            if not os.path.isdir(root):
                raise DataError(f"{root} is not a folder: give the one from which the paths of images start")
        places, measures = zip(*(_index_rows(file, encode, workers) for file in self.files))
        self._first = np.cumsum([0] + [len(rows) for rows in places])  # the first row of each file
        self._places = np.concatenate(places)
        self._take(np.concatenate(measures))

    def _take(self, measures: np.ndarray) -> None:
        """Notes what is known of the rows, and checks that enough can be used."""
        self.lengths, self.has_image = measures["tokens"], measures["image"]
        self.stage = np.zeros(len(measures), int)
        self.left_out = np.flatnonzero(self.lengths == 0)
        bad, count = len(self.left_out), len(self.lengths)
        if bad == count or bad > BadRows.LIMIT * count + BadRows.SPARE:
            raise DataError(f"{bad} of {count} conversations cannot be used, such as {self.describe(self.left_out[0])}")

    def __len__(self) -> int:
        return len(self.lengths)

    def _file(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def name(self, index: int) -> str:
        """What a row is called: its file, and its number there, from 1."""
        file = self._file(index)
        return f"{self.files[file]}, row {index - self._first[file] + 1}"

    def row(self, index: int, epoch: int = 0) -> dict:
        """A row as it stands in its file."""
        return _read_row(self.files[self._file(index)], self._places[index])

    def open(self, index: int, row: dict) -> Image.Image:
        """The picture of a row, its pixels not yet decoded. Raises what Pillow raises when it cannot be read."""
        return Image.open(os.path.join(self.roots[self._file(index)], row["image"]))

    def describe(self, index: int) -> str:
        """A row that cannot be used, and why not."""
        return f"{self.name(index)}: {fault(self.row(index)) or 'the text is cut off before its first answer'}"

    def __getitem__(self, key: int | tuple[int, int]) -> Example:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        row = self.row(index, epoch)
        ids, labels = self.encode(answered(row))
        if not self.has_image[index]:
            return Example(ids, labels, None)
        try:
            with self.open(index, row) as picture:
                picture.load()
                picture = to_rgb(picture)
        except Exception as error:  # on damaged files Pillow raises nearly every kind
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({type(error).__name__})"
            blank = self.prepare(Image.new("RGB", (8, 8)))  # keeps the batch's shape and modality
            return Example(ids, [-100] * len(ids), blank, f"{self.name(index)}: {row['image']} {reason}")
        return Example(ids, labels, self.prepare(picture))


class SceneConversations(Conversations):
    """Conversations about `Scenes`, with the same interface, three about each: what is there, lists, and what is where.

    Questions about a picture are joined as LLaVA-1.5 joins them: several in one conversation, how to answer said once.
    What is asked first must not give away what comes next, or that is learned and not to look. So "The red ring is above
    the blue bar." stands apart from questions for colors, and of the two questions for presence that `Scene` makes (one
    yes, one no) there is one. The order changes from epoch to epoch. `Scene.conversations` has each question alone.

    Lists and tallies are for learning. To answer "What color is the ring?" takes two steps, from where the answer begins
    to the question's noun and from there to the picture, and neither is of use, or learned, without the other. In "ring
    red" there is one: the noun stands right before the answer. That is learned soon, and afterwards the other step is, so
    the lists of the first scenes come before all else (`stage`); a run that ends within 15% of an epoch sees nothing else.
    The two share a conversation though each tells some of the other: whichever comes first, in random order, must be
    looked up, and that suffices here.
    """

    LISTS = ("list", "tally")
    # The kinds of question of each conversation, and how often they are drawn.
    PARTS = (
        (("presence", "count", "color"), 4),
        (LISTS, 1),
        (("relation", "refer", "caption"), 1),
    )
    FIRST = 0.45  # the share of the scenes whose lists come first

    def __init__(self, scenes: Scenes, encode: Encode, prepare: Callable[[Image.Image], torch.Tensor], workers: int = 0):
        self.scenes, self.encode, self.prepare = scenes, encode, prepare
        self._take(_measure(len(self.PARTS) * len(scenes), self.row, encode, workers))
        scene, part = np.divmod(np.arange(len(self)), len(self.PARTS))
        lists = [kinds for kinds, _ in self.PARTS].index(self.LISTS)
        self.stage = np.where((part == lists) & (scene < self.FIRST * len(scenes)), 0, 1)

    def name(self, index: int) -> str:
        """What a scene is called."""
        return self.scenes.name(index // len(self.PARTS))

    def row(self, index: int, epoch: int = 0) -> dict:
        """A row about a scene, with its picture."""
        scene, (kinds, draws) = self.scenes[index // len(self.PARTS)], self.PARTS[index % len(self.PARTS)]
        answers: dict[str, str] = {}  # by question: each once
        for draw in range(draws):
            answers |= self.ask(scene, kinds, draw)
        asked = list(answers.items())
        order, turns = generator("turns", self.scenes.seed, epoch, index).permutation(len(asked)), []
        for question, answer in (asked[i] for i in order):
            if turns:  # the image and the way to answer are given once
                question = question.removeprefix("<image>\n").removesuffix(SHORT)
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"id": scene.name, "image": scene.name, "conversations": turns, "picture": scene.image}

    def ask(self, scene: Scene, kinds: Sequence[str], draw: int) -> list[tuple[str, str]]:
        """Questions of some kinds with their answers, as they are drawn for the n-th time; of presence only one."""
        key = *scene.key, draw
        rows = [row for row in replace(scene, key=key).conversations if row["kind"] in kinds]
        presence = [row for row in rows if row["kind"] == "presence"]
        if presence:
            rows.remove(presence[generator("presence", *key).integers(2)])
        return [tuple(turn["value"] for turn in row["conversations"]) for row in rows]

    def open(self, index: int, row: dict) -> Image.Image:
        """The picture of a row."""
        return row["picture"]


def fault(row: object) -> str | None:
    """Why a row cannot be used; None where it can."""
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or len(turns) < 2:
        return "it has no conversation, which takes a question and an answer"
    for number, turn in enumerate(turns):
        role = "gpt" if number % 2 else "human"
        if not isinstance(turn, dict) or turn.get("from") != role or not isinstance(turn.get("value"), str):
            return f'message {number + 1} is not {{"from": "{role}", "value": "some text"}}'
        if re.search("[\ud800-\udfff]", turn["value"]):  # half of a character, which no tokenizer takes
            return f"message {number + 1} is no valid Unicode"
    if not isinstance(row.get("image") or "", str):
        return "its image is no path"
    return None


def answered(row: dict) -> Messages:
    """The messages of a row without a last question that has no answer."""
    return row["conversations"][: len(row["conversations"]) // 2 * 2]


def _index_rows(path: str, encode: Encode, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Place and measure of each row of a file, from the cache where it is there. Raises DataError."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a JSON file of conversations") from None
    key = hashlib.sha256(pickle.dumps((1, status.st_size, status.st_mtime_ns, encode))).hexdigest()[:16]
    folder, name = os.path.split(os.path.realpath(path))
    user = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "conversation-index")
    caches = [os.path.join(place, f".{name}.{key}.index.npz") for place in (folder, user)]
    for cache in caches:
        try:
            with np.load(cache) as known:
                return known["places"], known["measures"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # not there, or damaged
            pass
    places = _places(path)
    measures = _measure(len(places), functools.partial(_nth_row, path, places), encode, workers)
    for cache in caches:
        unfinished = f"{cache}.{uuid.uuid4().hex}.tmp"
        try:
            os.makedirs(os.path.dirname(cache), exist_ok=True)
            with open(unfinished, "xb") as target:
                np.savez_compressed(target, places=places, measures=measures)
            os.replace(unfinished, cache)
            break
        except OSError:
            if os.path.exists(unfinished):
                os.remove(unfinished)
    return places, measures


def _places(path: str) -> np.ndarray:
    """Where each row of a JSON list, or of JSON lines, lies in its file. Raises DataError, which names the line."""
    with open(path, encoding="latin-1", newline="") as file:  # a byte is a character: JSON's own signs are ASCII
        text = file.read()
    skip, decode, places = re.compile(r"[ \t\r\n]*").match, json.JSONDecoder().raw_decode, []
    at = skip(text).end()
    listed = text[at : at + 1] == "["
    at = skip(text, at + listed).end()
    try:
        while at < len(text) and not (listed and text[at] == "]"):
            end = decode(text, at)[1]
            places.append((at, end - at))
            at = skip(text, end).end()
            if listed and text[at : at + 1] != "]":
                if text[at : at + 1] != ",":
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
                at = skip(text, at + 1).end()
        if listed and at == len(text):
            raise json.JSONDecodeError("The list does not end", text, at)
        if listed and (at := skip(text, at + 1).end()) < len(text):
            raise json.JSONDecodeError("Extra data", text, at)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: is no JSON ({error.msg}); repair or download it again") from None
    if not places:
        raise DataError(f"{path}: holds no conversations; give a JSON list of them, or one on each line")
    return np.array(places, PLACE)


def _read_row(path: str, place: np.void) -> object:
    """A row from its place."""
    with open(path, "rb") as file:
        file.seek(place["start"])
        return json.loads(file.read(place["size"]).decode("utf-8", errors="replace"))


def _nth_row(path: str, places: np.ndarray, number: int) -> object:
    return _read_row(path, places[number])


class _Measures(torch.utils.data.Dataset):
    """The measures of rows, a block of them at a time, for data processes."""

    BLOCK = 256

    def __init__(self, count: int, row: Callable[[int], object], encode: Encode):
        self.count, self.row, self.encode = count, row, encode

    def __len__(self) -> int:
        return -(-self.count // self.BLOCK)

    def __getitem__(self, block: int) -> np.ndarray:
        numbers = range(block * self.BLOCK, min(self.count, (block + 1) * self.BLOCK))
        return np.array([self.measure(self.row(number)) for number in numbers], MEASURE)

    def measure(self, row: object) -> tuple[int, bool]:
        """How many ids a row has (0: it cannot be used), whether there is a picture."""
        if fault(row):
            return 0, False
        ids, labels = self.encode(answered(row))
        return len(ids) * any(label != -100 for label in labels), bool(row.get("image"))


def _measure(count: int, row: Callable[[int], object], encode: Encode, workers: int) -> np.ndarray:
    """The measure of each of `count` rows."""
    blocks = torch.utils.data.DataLoader(_Measures(count, row, encode), batch_size=None, num_workers=workers,
                                         collate_fn=np.asarray)
    shown = tqdm(blocks, "measuring conversations", leave=False, delay=2, disable=not sys.stderr.isatty())
    return np.concatenate(list(shown))


class ConversationBatches(Batches):
    """`Batches` of `Conversations`: each global batch has either pictures in all its rows or in none, and similar lengths.

    In each epoch a random order of either kind is cut into pools of 50 global batches; a pool is sorted by length and
    cut into its batches; the batches of all pools are shuffled. So it is done for each of the source's stages, one after
    the other. What is left of a kind in a stage and fills no batch is dropped.
    """

    POOL = 50

    def __init__(self, source: Conversations, global_batch: int, epochs: int, seed: int, rank: int = 0, world: int = 1,
                 micro_batch: int | None = None, start_update: int = 0, updates: int | None = None):
        usable, pictures = source.lengths > 0, source.has_image
        self.lengths, self.world = source.lengths, world
        self.stages = [[np.flatnonzero(usable & (source.stage == stage) & kind) for kind in (pictures, ~pictures)]
                       for stage in np.unique(source.stage)]
        whole = sum(len(kind) // global_batch for kinds in self.stages for kind in kinds) * global_batch
        if not whole:
            counts = np.sum([[len(kind) for kind in kinds] for kinds in self.stages], axis=0)
            stages = " in any stage" if len(self.stages) > 1 else ""
            raise DataError(f"{counts[0]} conversations about images and {counts[1]} without: neither fills a global batch "
                            f"of {global_batch}{stages}, use a smaller one")
        super().__init__(whole, global_batch, epochs, seed, rank, world, micro_batch, start_update, updates)

    def order(self, epoch: int) -> torch.Tensor:
        """The rows of an epoch, batch after batch, int64 [count]."""
        rng, stages, size = generator("conversations", self.seed, epoch), [], self.global_batch
        for kinds in self.stages:
            batches = []
            for kind in kinds:
                order = rng.permutation(kind)[: len(kind) // size * size]
                for pool in np.split(order, range(self.POOL * size, len(order), self.POOL * size)):
                    batches.append(pool[np.argsort(self.lengths[pool], kind="stable")].reshape(-1, size))
            stages.append(rng.permutation(np.concatenate(batches)))
        batches = np.concatenate(stages)  # [updates, global batch]
        # the shortest rows go to the first micro-batch of every rank, so that ranks have equal work at each moment
        return torch.from_numpy(batches).view(len(batches), -1, self.world, self.micro_batch).transpose(1, 2).flatten()


class BadRows(Unreadable):
    """The same count of conversations whose picture cannot be read; they are in their batches without a label."""

    WHAT, NOTE = "conversations", "left out"


def collate_conversations(examples: Sequence[Example]) -> tuple[dict[str, torch.Tensor | None], list[str]]:
    """Examples -> ids and labels [B, T], padded on the right by 0 and -100, images [B', ...], rows [B'], which of the
    batch have them (None: all; images too is None where there are none); and what is bad."""
    B, T = len(examples), max(len(example.ids) for example in examples)
    ids, labels = torch.zeros(B, T, dtype=torch.long), torch.full((B, T), -100)
    for i, example in enumerate(examples):
        ids[i, : len(example.ids)], labels[i, : len(example.ids)] = torch.tensor(example.ids), torch.tensor(example.labels)
    rows = [i for i, example in enumerate(examples) if example.image is not None]
    images = torch.stack([examples[i].image for i in rows]) if rows else None
    batch = dict(ids=ids, labels=labels, images=images, rows=torch.tensor(rows) if 0 < len(rows) < B else None)
    return batch, [example.bad for example in examples if example.bad]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of results


def grid(images: Sequence[Sequence[Image.Image | np.ndarray]], titles: Sequence[str] | None = None, scale: int = 1,
         gap: int = 4) -> Image.Image:
    """A sheet of rows of pictures (PIL, or uint8 [H, W, 3] or [H, W]), enlarged `scale` times, with column titles."""
    cells = [[Image.fromarray(np.asarray(image)).convert("RGB") for image in row] for row in images]
    cells = [[cell.resize((cell.width * scale, cell.height * scale), Resampling.NEAREST) for cell in row]
             for row in cells]
    font, titles = ImageFont.load_default(), list(titles or [])
    widths = [max([cell.width for cell in column if cell] + [math.ceil(font.getlength(title))])
              for *column, title in zip_longest(*cells, titles, fillvalue="")]
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


def paint(image: Image.Image, classes: Sequence[int], colors: dict[int, tuple[int, int, int]]) -> Image.Image:
    """A faint grey picture under the colors of its patches' classes [N]; class 0 stays grey."""
    side = math.isqrt(len(classes))
    cells = np.array([colors.get(c, (0, 0, 0)) for c in classes], np.uint8).reshape(side, side, 3)
    there = np.array([160 * (c > 0) for c in classes], np.uint8).reshape(side, side)
    layer, there = (Image.fromarray(x).resize(image.size, Resampling.NEAREST) for x in (cells, there))
    return Image.composite(layer, image.convert("L").point(lambda v: v // 2 + 40).convert("RGB"), there)


def legend(picture: Image.Image, colors: dict[str, tuple[int, int, int]]) -> Image.Image:
    """A picture with colored squares and their names below it."""
    font = ImageFont.load_default()
    width = 24 + max([math.ceil(font.getlength(name)) for name in colors], default=0)
    columns = max(1, (picture.width - 8) // width)
    sheet = Image.new("RGB", (max(picture.width, width + 8), picture.height + 16 * -(-len(colors) // columns) + 4), "white")
    sheet.paste(picture)
    draw = ImageDraw.Draw(sheet)
    for i, (name, color) in enumerate(colors.items()):
        x, y = 4 + i % columns * width, picture.height + i // columns * 16
        draw.rectangle((x, y, x + 11, y + 11), color)
        draw.text((x + 16, y), name, "black", font)
    return sheet


def scatter(points: dict[str, tuple[float, float]], axes: tuple[str, str], line: tuple[float, float] | None = None,
            side: int = 480) -> Image.Image:
    """Named points (x, y) in a frame with the axes' names, and a line y = line[0] x + line[1]."""
    font, edge = ImageFont.load_default(), 56
    sheet = Image.new("RGB", (side + 2 * edge, side + 2 * edge), "white")
    draw = ImageDraw.Draw(sheet)
    xs, ys = zip(*points.values())
    spans = [1.4 * max(max(values) - min(values), 1.0) for values in (xs, ys)]
    lows = [(max(values) + min(values) - span) / 2 for values, span in zip((xs, ys), spans)]

    def place(x: float, y: float) -> tuple[float, float]:
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
        draw.line([place(*end) for end in ends], "grey", 1)
    for name, point in points.items():
        x, y = place(*point)
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=(31, 119, 180))
        draw.text((x + 8, y), name, "black", font, anchor="lm")
    return sheet


def card(image: Image.Image, lines: Sequence[tuple[str, str]], boxes: Sequence[tuple[Sequence[float], str]] = (),
         width: int = 320) -> Image.Image:
    """A picture of that width, the boxes (x1, y1, x2, y2 in shares of the sides) drawn in their colors, and below it
    the colored lines of text, wrapped."""
    turn, font = orientation(image), ImageFont.load_default(13)
    image = image.transpose(TURNS[turn]) if turn in TURNS else image
    height = round(width * image.height / image.width)
    wrapped = []
    for text, color in lines:
        for paragraph in text.split("\n"):
            row = ""
            for word in paragraph.split():
                longer = f"{row} {word}".strip()
                if row and font.getlength(longer) > width:
                    wrapped.append((row, color))
                    longer = word
                row = longer
            wrapped.append((row, color))
    sheet = Image.new("RGB", (width, height + 6 + 17 * len(wrapped)), "white")
    sheet.paste(image.convert("RGB").resize((width, height), Resampling.BICUBIC))
    draw = ImageDraw.Draw(sheet)
    for box, color in boxes:
        draw.rectangle([side * (width - 1, height - 1)[i % 2] for i, side in enumerate(box)], outline=color, width=3)
    for number, (row, color) in enumerate(wrapped):
        draw.text((0, height + 4 + 17 * number), row, color, font)
    return sheet


# Of Okabe and Ito: told apart by eyes of all kinds, and in print
LINES = ((95, 95, 95), (213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (230, 159, 0))


def radar(axes: Sequence[str], series: dict[str, Sequence[float]], reach: float, radius: int = 360) -> Image.Image:
    """Named series of one value an axis, from -reach in the middle to reach at the rim, with a ring at each whole number.

    An axis is called by the first line of its text; further lines stand below it in grey. All is drawn three times as
    large and then averaged, for smooth lines.
    """
    fine, black, grey, faint = 3, (0, 0, 0), (110, 110, 110), (205, 205, 205)
    radius, row = fine * radius, fine * radius / 9  # row: the height of a line of text
    large, small = ImageFont.load_default(radius / 13), ImageFont.load_default(radius / 16)
    angles = [2 * math.pi * i / len(axes) - math.pi / 2 for i in range(len(axes))]  # clockwise from the top
    wide = max(1.15 * radius * abs(math.cos(angle)) + large.getlength(line) for angle, text in zip(angles, axes)
               for line in text.split("\n"))
    of_names, tall = max(map(large.getlength, series)), 1.15 * radius + 2 * row
    wide, low = max(wide, of_names / 2 + 2 * row), 1.15 * radius * max(map(math.sin, angles)) + 2.5 * row  # from the centre
    sheet = Image.new("RGB", (2 * math.ceil(wide), math.ceil(tall + low + row * (len(series) + 1))), "white")
    draw = ImageDraw.Draw(sheet)

    def places(values: Sequence[float]) -> list[tuple[float, float]]:
        shares = [radius * min(max(value + reach, 0), 2 * reach) / (2 * reach) for value in values]
        return [(wide + share * math.cos(angle), tall + share * math.sin(angle)) for share, angle in zip(shares, angles)]

    rings = [value for value in range(-math.ceil(reach), math.ceil(reach) + 1) if abs(value) < reach]
    for value in (*rings, reach):
        draw.polygon(places([value] * len(axes)), outline=faint if value else (150, 150, 150), width=fine)
    for angle, text, end in zip(angles, axes, places([reach] * len(axes))):
        draw.line([(wide, tall), end], faint, fine)
        lines = text.split("\n")
        anchor = "r" if math.cos(angle) < -0.1 else "l" if math.cos(angle) > 0.1 else "m"
        x, y = wide + 1.08 * radius * math.cos(angle), tall + 1.12 * radius * math.sin(angle)
        y -= row * (len(lines) - 1) * (1 - math.sin(angle)) / 2  # the near edge of the text, not its middle, is there
        for i, line in enumerate(lines):
            draw.text((x, y + row * i), line, black if line is lines[0] else grey, large if line is lines[0] else small, anchor + "m")
    shades = list(zip(series.items(), LINES * len(series)))
    for (_, values), color in shades:  # all areas first, for they would tint the lines
        mask = Image.new("L", sheet.size)
        ImageDraw.Draw(mask).polygon(places(values), 40)
        sheet.paste(color, mask=mask)
    for number, ((name, values), color) in enumerate(shades):
        points, dot = places(values), fine * 5
        draw.line([*points, *points[:2]], color, fine * 3, joint="curve")
        for x, y in points:
            draw.ellipse((x - dot, y - dot, x + dot, y + dot), color)
        left, y = wide - of_names / 2 - row, tall + low + row * (number + 0.5)
        draw.line([(left, y), (left + row, y)], color, fine * 4)
        draw.text((left + 1.5 * row, y), name, black, large, "lm")
    for value in rings:
        x, y = places([value] * len(axes))[0]
        draw.text((x - row / 5, y - row / 4), f"{value:+d}" if value else "0", grey, small, "rm")
    return sheet.reduce(fine)
