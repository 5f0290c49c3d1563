"""data.py: folders of images, crops and augmentation, batches, label maps, conversations."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, refusal
from PIL import Image
from safetensors import safe_open
from torch.utils.data import DataLoader

import data
import vit
from data import BICUBIC, Augment, Batches, ImageFolder, Images

pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:PIL\.")  # pytest undoes what data.py sets on import


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), BICUBIC)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(float)


def names(folder: ImageFolder) -> list[str]:
    return [folder.name(i) for i in range(len(folder))]


def touch(root: Path, *files: str) -> Path:
    for path in (root / name for name in files):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def test_images_are_found_at_any_depth_in_order(tmp_path):
    """Links are followed, a folder counts once, where the fewest folders lead to it; hidden names are skipped."""
    odd = os.fsdecode("b/ü é".encode() + b"\xff.jpg")
    tree = ["top.png", "a/y.jpg", "a/y.jpg.tif", "a b/x.jpg", "a/deep/er/x.webp", "b/1.jpg", "b/2.JPEG", odd]
    root = touch(tmp_path / "root", *reversed(tree), ".hid/z.jpg", "a/._y.tif", "b/note.txt")
    assert names(ImageFolder(root)) == names(ImageFolder(f"{root}/")) == tree
    touch(tmp_path / "elsewhere", "e.jpg")
    for link in ("linked elsewhere", "a/loop root", "link.jpg elsewhere/e.jpg", "a/to-b root/b"):
        os.symlink(tmp_path / link.split()[1], root / link.split()[0])
    folder = pickle.loads(pickle.dumps(ImageFolder(root)))
    assert names(folder) == ["link.jpg", *tree, "linked/e.jpg"]
    assert not any(isinstance(value, (list, tuple)) for value in vars(folder).values())  # millions of Python objects


def test_the_split_is_complete_and_stable_and_no_part_is_empty(tmp_path):
    one = touch(tmp_path / "one", *(f"{'ab'[i % 2]}/{i:03d}.jpg" for i in range(60)))
    everything, train, val = (names(ImageFolder(one, part, 0.1)) for part in ("all", "train", "val"))
    assert sorted(train + val) == sorted(everything) and not set(train) & set(val)
    assert val == [f"{name}.jpg" for name in "a/012 a/034 a/054 a/058 b/013 b/023 b/035 b/051".split()]  # fixed
    assert "nowhere is not a folder" in refusal(ImageFolder, tmp_path / "nowhere")
    assert "a.txt is not a folder" in refusal(ImageFolder, touch(tmp_path, "texts/a.txt") / "texts" / "a.txt")
    assert "texts holds no images: files whose names end in .jpg" in refusal(ImageFolder, tmp_path / "texts")
    assert "no val images at a held-out share of 0" in refusal(ImageFolder, touch(tmp_path, "1.jpg"), "val", 0)


def test_links_to_themselves_upwards_and_nowhere(tmp_path):
    touch(tmp_path, "a/1.jpg", "a/.2.jpg", ".hidden/3.jpg")
    for name, target in {"self": "self", "a/up": "..", "gone": "nowhere", "b": "a"}.items():
        (tmp_path / name).symlink_to(target)
    assert list(ImageFolder(tmp_path)) == [b"a/1.jpg"]


def two_steps(image: Image.Image, size: int, scale: tuple[float, float], resample: int = BICUBIC) -> np.ndarray:
    """The definition: resize the whole image, pad by reflection where it is short, cut out the center."""
    width, height = (round(side * factor / (min(image.size) / size)) for side, factor in zip(image.size, scale))
    resized = pixels(image.convert("RGB").resize((width, height), resample))
    padding = [(max(0, size - side) // 2, (max(0, size - side) + 1) // 2) for side in (height, width)]
    resized = np.pad(resized, [*padding, (0, 0)], mode="reflect")
    top, left = (round((side - size) / 2) for side in resized.shape[:2])
    return resized[top : top + size, left : left + size]


@pytest.mark.parametrize("width, height", [(500, 375), (90, 61), (400, 30), (1, 7), (1600, 1300)])
def test_a_crop_is_that_of_the_whole_image_resized(width, height):
    image = smooth(width, height)
    for scale in ((1, 1), (3.5, 3.5), (1.15, 0.87), (0.87, 1.15), (1.9, 1.5)):
        for size, resample in ((96, BICUBIC), (81, data.BILINEAR)):
            crop = pixels(data.resized_crop(image, size, scale, resample))
            error = abs(crop - two_steps(image, size, scale, resample))
            assert error.max() <= 2 and error.mean() < 0.2  # ties, rounded either way in each of two passes


def test_a_jpeg_is_decoded_at_the_least_size_that_has_all_pixels(tmp_path, monkeypatch):
    upright, exif, decoded = smooth(1000, 752), Image.Exif(), []
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.jpg", quality=95, exif=exif)
    monkeypatch.setattr(data, "to_rgb", lambda image: decoded.append(image.height) or image)
    for scale in ((1, 1), (1.2, 0.9), (4, 4), (0.5, 0.5)):
        crop = data.resized_crop(Image.open(tmp_path / "a.jpg"), 160, scale, BICUBIC)
        assert abs(pixels(crop) - two_steps(upright, 160, scale)).mean() < 1.5
    assert decoded == [250, 500, 1000, 125]


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
def test_exif_orientation(name, tmp_path):
    upright, exif = smooth(300, 200), Image.Exif()
    for orientation, undo in enumerate((None, None, 0, 3, 1, 5, 2, 6, 4, None)):  # Pillow's number of a transposition
        exif[0x0112] = orientation
        stored = upright if undo is None else upright.transpose(undo)
        stored.save(tmp_path / name, exif=exif, **({} if name == "a.tif" else {"quality": 95}))
        crop = data.resized_crop(Image.open(tmp_path / name), 48, (1.2, 1.1), BICUBIC)
        assert abs(pixels(crop) - two_steps(upright, 48, (1.2, 1.1))).mean() < 1.5, orientation
    upright.save(tmp_path / "damaged.jpg", exif=b"Exif\x00\x00MM\x00\x2a\x00\x00\xff\xff\x01\x12garbage")
    assert data.resized_crop(Image.open(tmp_path / "damaged.jpg"), 32, (1, 1), BICUBIC).size == (32, 32)


RAMP = np.linspace(0, 1, 64 * 80).reshape(64, 80)
SPOTS = {(0, 0): np.nan, (1, 1): np.inf}
MODES = {  # file: the image, and what it looks like, from 0 to 255
    "deep.png": (Image.fromarray((RAMP * 65535).astype(np.uint16)), RAMP * 255),
    "deep.tif": (Image.fromarray((RAMP * 65535).astype(">u2")), RAMP * 255),
    "int.tif": (Image.fromarray((RAMP * 65535).astype(np.int32)), RAMP * 255),
    "long.tif": (Image.fromarray((RAMP * 1e9 - 4e8).astype(np.int32)), RAMP * 255),
    "depth.tif": (Image.fromarray((RAMP / 2).astype(np.float32)), RAMP * 127.5),
    "meters.tif": (Image.fromarray((RAMP * 30 - 5).astype(np.float32)), RAMP * 255),
    "flat.tif": (Image.new("F", (80, 64), 7.0), np.zeros((64, 80))),
    "holes.tif": (Image.fromarray(np.where(RAMP < 0.1, np.nan, RAMP).astype(np.float32)), RAMP * 255 * (RAMP >= 0.1)),
} | {
    f"{mode}.{kind}": (smooth(80, 64).convert(mode), pixels(smooth(80, 64).convert(mode).convert("RGB")))
    for mode, kind in [(mode, "png") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")] + [("CMYK", "tif")]
}  # fmt: skip


@pytest.mark.parametrize("name", MODES)
def test_any_file_has_the_same_pixels_on_every_path(name, tmp_path):
    """As the one before, also with an orientation, and beside a damaged tag."""
    stored, expected = MODES[name]
    expected, exif, path = expected.reshape(64, 80, -1) + np.zeros(3), Image.Exif(), tmp_path / name
    for orientation in (1,) if name in ("deep.tif", "CMYK.tif") else (1, 6):  # Pillow 13 mixes up turned files of these
        exif[0x0112] = orientation
        stored.save(path, exif=exif)
        seen = np.rot90(expected, -1) if orientation == 6 else expected
        assert abs(pixels(data.open_image(path)) - seen).max() <= 1
        assert np.array_equal(vit.upright(Image.open(path)), data.open_image(path))  # asking, evaluation, conversations
        assert np.array_equal(vit.upright(data.open_image(path)), data.open_image(path))  # not turned twice
        if name.endswith("png"):  # Pillow itself turns TIFF files
            assert abs(pixels(data.open_image(path, data.to_rgb)) - expected).max() <= 1  # beside annotations
        crop = data.resized_crop(Image.open(path), 64, (1, 1), data.BILINEAR)
        assert np.array_equal(crop, data.center_square(data.open_image(path), 64, data.BILINEAR))  # training


def test_a_damaged_tag_does_not_hide_the_orientation(tmp_path):
    image, exif = smooth(30, 20), Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72
    raw = exif.tobytes()
    broken = raw.replace(b"\x01\x1a\x00\x05\x00\x00\x00\x01", b"\x01\x1a\x00\x05\xff\xff\xff\x01")
    broken = broken.replace(b"\x1a\x01\x05\x00\x01\x00\x00\x00", b"\x1a\x01\x05\x00\x01\xff\xff\xff")
    assert broken != raw
    for exif in (broken, b"Exif\x00\x00MM\x00\x2a\x00\x00\xff\xff\x01\x12garbage"):
        image.save(tmp_path / "a.png", exif=exif)
        size = (20, 30) if exif is broken else (30, 20)
        assert data.open_image(tmp_path / "a.png").size == vit.upright(Image.open(tmp_path / "a.png")).size == size
        crop = data.resized_crop(Image.open(tmp_path / "a.png"), 20, (1, 1), data.BILINEAR)
        assert np.array_equal(crop, data.center_square(data.open_image(tmp_path / "a.png"), 20, data.BILINEAR))


def test_augment_draws_the_papers_distribution(monkeypatch):
    draws, image = [], Image.fromarray(np.uint8([[[255] * 3, [0] * 3]]))
    monkeypatch.setattr(data, "resized_crop", lambda image, size, *drawn: draws.append(drawn) or image)
    flips = sum(Augment(2)(image, data.generator("test", i))[0, 0, 1].item() > 0 for i in range(1000))
    scale, filters = np.array([scale for scale, _ in draws]), [resample for _, resample in draws]
    area, aspect = 1 / scale.prod(1), np.log(scale[:, 0] / scale[:, 1]) / np.log(4 / 3)
    quarters = [np.quantile(drawn[abs(drawn - still) > 1e-9], [0, 0.5, 1]) for drawn, still in ((area, 1), (aspect, 0))]
    assert np.allclose(quarters, [[0.08, 0.54, 1], [-1, 0, 1]], atol=0.05)
    assert np.allclose(scale.mean(0), [1.28676975, 1.28551853]) and (filters.count(BICUBIC), flips) == (494, 502)


def test_randaugment():
    image = smooth(64, 48)
    means = [pixels(apply(image, 0.9, BICUBIC))[:, :32].mean() for apply in data.OPERATIONS.values()]
    timms = "135.51 138.69 118.95 131.38 73.47 110.68 178.22 131.01 133.6 203.52 135.78 135.73 134.18 134.71 140.63"
    assert means == pytest.approx([float(mean) for mean in timms.split()], abs=0.02)
    changed = torch.stack([Augment(32, True)(image, data.generator("test", i)) for i in range(30)]).double()
    assert changed.mean((0, 2, 3)).tolist() == pytest.approx([116.358, 136.496, 119.604], abs=0.02)  # fixed


@pytest.mark.parametrize("kind, means", [("mixup", (0.7080, 0.2920, 2.3728)), ("cutmix", (0.4688, 0.5312, 2.3906))])
def test_slices_of_a_batch_are_mixed_as_the_whole_is(kind, means):
    images = torch.arange(12.0).view(12, 1, 1, 1).repeat(1, 3, 8, 8)
    whole = data.mix(images, kind, seed=3, update=5)
    parts = [data.mix(images[first : first + 4], kind, seed=3, update=5, first=first) for first in (0, 4, 8)]
    assert torch.equal(torch.cat(parts), whole) and not torch.equal(data.mix(images, kind, seed=3, update=6), whole)
    assert whole[:3].mean((1, 2, 3)).tolist() == pytest.approx(means, abs=1e-4)  # fixed
    for first, count in ((1, 4), (0, 3)):
        assert f"a micro-batch has {count} images" in refusal(data.mix, images[:count], kind, 0, 0, first)


@pytest.fixture
def images(tmp_path) -> Images:
    bad = {"half.jpg", "half.png", "half.tif", "half.webp", "text.jpg", "empty.jpg", "gone.jpg"}
    for i, path in enumerate(tmp_path / name for name in [f"{i:02d}.jpg" for i in range(30)] + sorted(bad)):
        smooth(90 + i, 60, seed=i).save(path)
        if path.name in bad:
            contents = {"half": path.read_bytes()[: path.stat().st_size // 2], "text": b"text"}
            path.write_bytes(contents.get(path.stem, b""))
    images = Images(ImageFolder(tmp_path), Augment(32, randaugment=True), seed=1)
    (tmp_path / "gone.jpg").unlink()
    images.bad = bad
    return images


def test_unreadable_files_are_replaced_and_named(images):
    assert {images.source.name(i) for i in range(37) if images[0, i][1]} == images.bad
    replaced = [images[epoch, 36] for epoch in range(40)]
    assert all(names[0] == "text.jpg" and set(names) <= images.bad for _, names in replaced)
    assert any(len(names) > 1 for _, names in replaced)  # the replacement was unreadable too
    assert all(torch.equal(image, images[epoch, 36][0]) for epoch, (image, _) in enumerate(replaced))
    others = images[1, 6], images[2, 8], Images(images.source, images.prepare, seed=2)[2, 6]
    assert not any(torch.equal(other[0], images[2, 6][0]) for other in others)
    data.check_unreadable(105, 10_000)
    assert "6 of 99 images cannot be used, more than 1%: repair" in refusal(data.check_unreadable, 6, 99)
    images.source.root = "nowhere"
    assert "20 images in a row cannot be read, the last one" in refusal(images.__getitem__, (0, 0))


def test_workers_change_nothing(images):
    how = dict(batch_sampler=Batches(37, global_batch=12, epochs=2, seed=0), collate_fn=data.collate)
    alone, together = list(DataLoader(images, **how)), list(DataLoader(images, num_workers=2, **how))
    assert len(alone) == 6 and any(unreadable for _, unreadable in alone)
    for (batch, unreadable), (other, also) in zip(alone, together, strict=True):
        assert batch.shape == (12, 3, 32, 32) and torch.equal(batch, other) and unreadable == also


def test_batches_are_epochs_in_random_order():
    keys = [key for batch in Batches(103, global_batch=10, epochs=3, seed=0) for key in batch]
    epochs = [[index for epoch, index in keys if epoch == e] for e in range(3)]
    assert len(set(keys)) == 300 and all(len(epoch) == 100 and set(epoch) < set(range(103)) for epoch in epochs)
    expected = [[(0, 2), (0, 5)], [(0, 4), (0, 7)], [(1, 2), (1, 0)], [(1, 5), (1, 6)]]  # fixed
    assert list(Batches(10, 4, 2, seed=0, rank=1, world=2)) == expected
    assert list(Batches(50, 12, 3, 0, start_update=3, updates=5)) == list(Batches(50, 12, 3, seed=0))[3:5]
    for count, world, micro_batch in ((7, 1, None), (99, 3, None), (99, 16, None), (99, 2, 3)):
        told = refusal(Batches, count, 8, 1, 0, world=world, micro_batch=micro_batch)
        assert f"8 cannot be drawn from {count} samples by {world} ranks in micro-batches of" in told


@pytest.mark.parametrize("world, micro_batch", [(1, 2), (2, None), (2, 3), (3, 4)])
def test_global_batches_are_the_same_for_any_ranks_and_micro_batches(world, micro_batch):
    every = [key for batch in Batches(50, global_batch=12, epochs=2, seed=0) for key in batch]
    for start in (0, 1, 4, 7):
        ranks = [list(Batches(50, 12, 2, 0, rank, world, micro_batch, start)) for rank in range(world)]
        assert len(ranks[0]) == len(Batches(50, 12, 2, 0, 0, world, micro_batch, start))
        keys = np.array(ranks).reshape(world, 8 - start, -1, 2).swapaxes(0, 1).reshape(-1, 2)
        assert list(map(tuple, keys.tolist())) == every[12 * start :]


@pytest.mark.parametrize("number", range(3))
def test_labels_are_the_references(number):
    with safe_open(ROOT / "tests/data/probe/patchseg.safetensors", "np") as file:
        facts = json.loads(file.metadata()["fixture"])
        wanted = ("annotation", "pixels", "union", "majority", "global-union")
        annotation, expected, union, majority, whole = (file.get_tensor(f"{name}.{number}") for name in wanted)
    size, patch, classes = (facts[key] for key in ("size", "patch", "classes"))
    labels = np.asarray(data.center_square(Image.fromarray(annotation), size, data.NEAREST)) + np.uint8(1)  # COCO's
    assert np.array_equal(labels, expected)
    assert np.array_equal(data.union(labels[None], patch, classes), union.reshape(-1, classes))
    assert np.array_equal(data.majority(labels[None], patch, classes), majority.ravel())
    assert np.array_equal(data.global_union(labels[None], classes), whole)


def test_labels_by_definition():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, (3, 22, 22), np.uint8) * rng.integers(0, 2, (3, 22, 22), np.uint8)
    labels[:, :5, :5] = 0
    cells = [labels[:, row : row + 5, column : column + 5] for row in range(0, 20, 5) for column in range(0, 20, 5)]
    sets = [set(cell.ravel().tolist()) - {0} or {0} for cell in cells]
    assert [set(np.flatnonzero(members)) for members in data.union(labels, 5, 6)] == sets
    assert data.majority(labels, 5, 6).tolist() == [np.bincount(cell[0].ravel()).argmax() for cell in cells]
    assert (data.majority(labels, 5, 6, unlabeled=False) > 0).tolist() == [cell[0].any() for cell in cells]
    assert data.global_union(labels, 6).tolist() == [c in labels for c in range(6)]


def write_part(images: Path, maps: Path, values: list[int], mode: str = "L") -> None:
    """Three images, upright and wide, gray among color, with label maps; one map has half the size of its image."""
    for i, (size, shape) in enumerate((((60, 40), (40, 60)), ((40, 50), (50, 40)), ((64, 64), (32, 32)))):
        smooth(*size, seed=i).convert("L" if i == 1 else "RGB").save(touch(images, f"{i}.jpg") / f"{i}.jpg")
        labels = np.random.default_rng(i).choice(values, shape if mode == "L" else (*shape, 3)).astype(np.uint8)
        Image.fromarray(labels).save(touch(maps, f"{i}.png") / f"{i}.png")


def test_coco_stuff_and_its_faults(tmp_path):
    maps = tmp_path / "stuffthingmaps_trainval2017" / "val2017"
    write_part(tmp_path / "val2017", maps, [0, 1, 90, 91, 181, 255])
    assert "labels.txt" in refusal(data.Segmentation, tmp_path, "val", 32)
    (tmp_path / "labels.txt").write_text("person\n")
    assert 'not a list of classes, with lines such as "3: sky"' in refusal(data.Segmentation, tmp_path, "val", 32)
    (tmp_path / "labels.txt").write_text("".join(f"{i}: {f'name {i}' if i else 'unlabeled'}\n" for i in range(183)))
    assert "no train images" in refusal(data.Segmentation, tmp_path, "train", 32)
    source = data.Segmentation(tmp_path, "val", 32)
    assert len(source) == 3 and source.names[:2] == ["unlabeled", "name 1"] and len(source.names) == 183
    assert source.groups == {"things": range(1, 92), "stuff": range(92, 183)}
    for image, labels in (source[i] for i in range(3)):
        assert image.size == (32, 32) and image.mode == "RGB" and labels.shape == (1, 32, 32)
        assert set(np.unique(labels)) == {1, 2, 91, 92, 182, 0}
    assert np.array_equal(source[2].labels[0], np.asarray(Image.open(maps / "2.png")) + np.uint8(1))
    (maps / "0.png").unlink()
    assert "0.png: cannot be read (FileNotFoundError" in refusal(source.__getitem__, 0)
    for size, told in (((40, 60), "is 40 x 60, but its image 60 x 40"), ((60, 40), "holds class 201")):
        Image.new("L", size, 200).save(maps / "0.png")
        assert f"0.png {told}" in refusal(source.__getitem__, 0)


def test_ade20k_and_a_plain_folder_with_a_map_a_channel(tmp_path):
    write_part(tmp_path / "images/validation", tmp_path / "annotations/validation", [0, 1, 2])
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tStuff\tName\n1\t0.1\t1\twall\n2\t0.1\t0\tdoor, double\n")
    source = data.Segmentation(tmp_path, "val", 32)
    assert source.names == ["unlabeled", "wall", "door, double"] and source.groups == {"things": [2], "stuff": [1]}
    assert source[0].labels.max() == 2
    write_part(tmp_path / "images/train", tmp_path / "labels/train", [0, 0, 3, 18], "RGB")
    (tmp_path / "labels.txt").write_text("0: none\n# above\n3: sky\n# below\n18: sea\n")
    source = data.Segmentation(tmp_path, "train", 32)
    assert source.names[:4] == ["none", "class 1", "class 2", "sky"] and source.groups == {"above": [3], "below": [18]}
    labels = np.asarray(Image.open(tmp_path / "labels/train/2.png")).transpose(2, 0, 1)
    sets, single = data.PatchLabels(source, 8), data.PatchLabels(source, 8, "majority", most=2)
    assert len(sets) == 3 and single.chosen.tolist() == [0, 1] and np.array_equal(source[2].labels, labels)
    image, patches, whole = sets[2]
    assert image.shape == (3, 32, 32) and patches.shape == (16, 3)
    assert np.array_equal(data.unpack(patches, 19).numpy(), data.union(labels, 8, 19))
    assert np.array_equal(data.unpack(whole, 19).numpy(), data.global_union(labels, 19))
    assert np.array_equal(single[1][1][:, 0].numpy(), data.majority(source[1].labels, 8, 19))


def encode(turns: list[dict]) -> tuple[list[int], list[int]]:
    marked = [(0, False)] + [(ord(sign), turn["from"] == "gpt") for turn in turns for sign in turn["value"]]
    return [sign for sign, _ in marked][:300], [sign if answer else -100 for sign, answer in marked][:300]


def prepare(image: Image.Image) -> torch.Tensor:
    return data.to_tensor(image.convert("RGB").resize((8, 8)))


def row(question: str, answer: str = "A", image: object = None) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": question, "conversations": turns} | ({"image": image} if image else {})


def read(root: Path, rows: object, **how: object) -> data.Conversations:
    (root / "a.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
    Image.new("RGB", (20, 10), "red").save(root / "a.png")
    return data.Conversations([root / "a.json"], root, encode, prepare, **how)


def test_rows_are_found_however_they_are_written(tmp_path):
    rows = [row(f"{i} é 漢 😀 \u2028 \\ [", f"answer\n{i}", "a.png" if i % 3 else None) for i in range(300)]
    rows[4]["conversations"].append({"from": "human", "value": "without an answer, which is dropped"})
    files, roots = [tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.jsonl"], [tmp_path / "1", tmp_path / "2"]
    for root, color in zip(roots, ("red", "blue")):
        Image.new("RGB", (20, 10), color).save(touch(root, "a.png") / "a.png")
    files[0].write_text(json.dumps(rows))
    files[1].write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    files[2].write_bytes(("\n" + "\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n").encode())
    source = pickle.loads(pickle.dumps(data.Conversations(files, [*roots, roots[0]], encode, prepare, workers=2)))
    assert len(source) == 900 and not any(isinstance(v, list) and len(v) > 3 for v in vars(source).values())
    for i in (0, 4, 299, 300, 599, 600, 899):
        expected = encode(rows[i % 300]["conversations"][:2])
        assert source.row(i) == (rows[i % 300], f"{files[i // 300]}, row {i % 300 + 1}", roots[i // 300 % 2])
        assert source.lengths[i] == len(expected[0]) and source.has_image[i] == (i % 3 > 0)
        assert source[0, i][:2] == expected and source[0, i].bad is None
    assert source[0, 1].image[0].min() == source[0, 301].image[2].min() == 255  # red, and in the other folder blue


def test_files_that_cannot_be_used(tmp_path):
    for text, told in (
        ('[{"a": 1},\n\n {"b": "cut', "a.json, line 3 is not JSON (Unterminated string"),
        ('{"a": 1}\n\nnot JSON\n', "line 3 is not JSON (Expecting value)"),
        (" [ ] ", "no conversation can be used; for example,"),
        ('{"questions": []}', "no conversation can be used; for example,"),
    ):
        assert told in refusal(read, tmp_path, text)
    files = [tmp_path / "a.json", tmp_path / "none.json"]
    assert "none.json" in refusal(data.Conversations, files[1:], tmp_path, encode, prepare)
    for wrong in ("nowhere", [tmp_path] * 3):
        assert "give one folder of images for all files" in refusal(data.Conversations, files, wrong, encode, prepare)


@pytest.mark.parametrize("save", [
    lambda text: text.encode("utf-8-sig"), lambda text: text.encode("utf-16"), lambda text: text.encode(),
    lambda text: text.replace("\n", "\r\n").encode(), lambda text: text.encode() + b"\n\n",
])  # fmt: skip
@pytest.mark.parametrize("lines", [False, True])
def test_text_as_people_save_it(save, lines, tmp_path):
    values = [{"a": "é 漢 😀"}, {"b": "half \ud83d, whole 😀"}]  # json.dumps writes both as halves
    text = "\n".join(map(json.dumps, values)) if lines else json.dumps(values, indent=1)
    (tmp_path / "rows.json").write_bytes(save(text))
    for rows in {True, lines}:  # a list of rows is read either way
        assert data.read_json(tmp_path / "rows.json", rows) == [values[0], {"b": "half \ufffd, whole 😀"}]
    (tmp_path / "labels.txt").write_bytes(save("# things\n1: café\n\n2: sky\n"))
    assert data.read_class_names(tmp_path / "labels.txt") == (["class 0", "café", "sky"], {"things": [1, 2]})


def test_rows_that_cannot_be_used_are_left_out(tmp_path):
    bad = [
        ({"id": 1}, "has no conversation"),
        ({"conversations": row("Q")["conversations"][:1]}, "has no conversation"),
        ({"conversations": row("Q")["conversations"][::-1]}, 'message 1 is not {"from": "human"'),
        ({"conversations": [*row("Q")["conversations"], {"from": "human", "value": 5}]}, "message 3"),
        (row("Q", image=["a.png"]), "its image is not a path"),
        (row("Q" * 400), "cut off before its first answer"),
    ]
    rows = [row("Q") for _ in range(1000)]
    rows[7:607:100] = [wrong for wrong, _ in bad]
    source = read(tmp_path, rows)
    assert source.left_out.tolist() == list(range(7, 607, 100))
    for i, (_, reason) in zip(source.left_out, bad):
        assert reason in source.describe(i) and f"a.json, row {i + 1}:" in source.describe(i)
    order = data.ConversationBatches(source, 4, 1, 0).order(0).tolist()
    assert len(order) == 992 and not set(order) & set(source.left_out.tolist())
    told = refusal(read, tmp_path, [row("Q")] * 100 + [bad[0][0]] * 7)  # more than 1%, and 5 to spare
    assert "7 of 107 conversations" in told and "row 101: it has no conversation" in told


def test_collation_and_images_that_cannot_be_read(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    source = read(tmp_path, [row("long"), *(row("Q", image=name) for name in ("a.png", "none.png", "broken.png"))])
    batch, bad = data.collate_conversations([source[0, i] for i in range(4)])
    assert batch["ids"].tolist() == [ids + [0] * (6 - len(ids)) for ids in (source[0, i].ids for i in range(4))]
    assert batch["labels"].tolist() == [[-100] * 5 + [65], [-100, -100, 65, *[-100] * 3], [-100] * 6, [-100] * 6]
    assert batch["rows"].tolist() == [1, 2, 3] and batch["images"].amax((1, 2, 3)).tolist() == [255, 0, 0]
    assert len(bad) == 2 and "a.json, row 3: " in bad[0] and "none.png" in bad[0] and "broken.png" in bad[1]
    assert data.collate_conversations([source[0, 1], source[0, 2]])[0]["rows"] is None
    assert data.collate_conversations([source[0, 0]])[0]["images"] is None
    source.features = torch.rand(4, 3, 5)  # kept: a row that fails keeps their shape
    source.point = lambda *_: {}["places"]
    source.row = lambda i, row=source.row: (row(i)[0] | {"targets": {"box": []}}, *row(i)[1:])
    batch, bad = data.collate_conversations([source[0, 1]])
    assert torch.equal(batch["images"], source.features[1:2]) and len(bad) == 1


def test_conversation_batches_have_one_modality_and_similar_lengths_on_any_ranks(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 201, 600)
    mixed = read(tmp_path, [row("Q" * int(n), image="a.png" if i % 4 else None) for i, n in enumerate(lengths)])
    batches = data.ConversationBatches(mixed, 16, 2, 0)
    order = batches.order(0).view(-1, 16).numpy()
    assert len(order) == batches.updates_per_epoch == 28 + 9 and len(set(order.ravel())) == order.size  # each row once
    with_image, spread = mixed.has_image[order], np.ptp(mixed.lengths[order], axis=1)
    assert (with_image.all(1) | ~with_image.any(1)).all() and spread.max() < 40 and spread.mean() < 12  # of 200
    assert "neither kind of conversations fills" in refusal(data.ConversationBatches, mixed, 451, 1, 0)

    def updates(world: int, micro: int, start: int = 0) -> np.ndarray:
        """[updates, ranks, micro-batches, micro, (epoch, index)]"""
        ranks = [list(data.ConversationBatches(mixed, 16, 2, 0, rank, world, micro, start)) for rank in range(world)]
        return np.array(ranks).reshape(world, 74 - start, -1, micro, 2).swapaxes(0, 1)

    whole = updates(1, 16)
    assert np.array_equal(whole[[0, -1], 0, 0, 0, 0], [0, 1])
    for world, micro in ((1, 4), (2, 8), (2, 2), (8, 1)):
        got = updates(world, micro)
        assert np.array_equal(np.sort(got.reshape(74, 16, 2), 1), np.sort(whole.reshape(74, 16, 2), 1))
        assert np.array_equal(updates(world, micro, 29), got[29:])
        longest = mixed.lengths[got[..., 1]].max(-1)  # [updates, ranks, micro-batches]: ranks have equal work
        assert (longest.max(1)[:, :-1] <= longest.min(1)[:, 1:]).all()
    mixed.lengths, mixed.has_image = np.arange(1, 21) * 7 % 13, np.arange(20) % 3 > 0
    assert data.ConversationBatches(mixed, 4, 1, 0, micro_batch=2).order(0)[:8].tolist() == [3, 9, 0, 6, 4, 19, 8, 10]
