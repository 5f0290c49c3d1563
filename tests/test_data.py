"""Tests of data.py. They draw their own pictures; nothing is downloaded."""

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
from data import Augment, Batches, DataError, ImageFolder, Images, Scenes, Unreadable, collate

BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth colorful picture without symmetry."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), BICUBIC)


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(float)


def names(folder: ImageFolder) -> list[str]:
    return [folder.name(i) for i in range(len(folder))]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder of empty files with image names, its folders' modification times long past."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "images"
    hidden = [".hid/z.jpg", "a/._y.tif"]
    for name in ["top.png", "b/2.JPEG", "b/1.jpg", "a/deep/er/x.webp", "a/y.tif", "b/note.txt", *hidden]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    age(root)
    return root


def age(root: Path) -> None:
    for folder in [root, *(p for p in root.rglob("*") if p.is_dir())]:
        os.utime(folder, (1e9, 1e9))


TREE = ["top.png", "a/y.tif", "a/deep/er/x.webp", "b/1.jpg", "b/2.JPEG"]


# ---------------------------------------------------------------------------------------------------------------------
# The index


def listed(root: Path, monkeypatch) -> tuple[list[str], list[str]]:
    """The names in a folder, and the folders that had to be listed for that."""
    calls, listing = [], data._list
    with monkeypatch.context() as patch:
        patch.setattr(data, "_list", lambda root, path: calls.append(path) or listing(root, path))
        return names(ImageFolder(root)), calls


def test_index_finds_images_at_any_depth_in_order(tree):
    assert names(ImageFolder(tree)) == TREE
    assert names(ImageFolder(str(tree) + "/")) == TREE


def test_index_lists_only_what_changed(tree, monkeypatch):
    assert listed(tree, monkeypatch)[1] == ["", "a", "a/deep", "a/deep/er", "b"]
    age(tree)  # the root changed when the cache's folder was made
    listed(tree, monkeypatch)
    assert listed(tree, monkeypatch) == (TREE, [])

    (tree / "b/3.png").touch()
    assert listed(tree, monkeypatch) == (TREE + ["b/3.png"], ["b"])
    (tree / "b/3.png").unlink()
    (tree / "a/deep/new").mkdir()
    (tree / "a/deep/new/n.bmp").touch()
    found, calls = listed(tree, monkeypatch)
    assert found == TREE[:2] + ["a/deep/er/x.webp", "a/deep/new/n.bmp"] + TREE[3:]
    assert calls == ["a/deep", "a/deep/new", "b"]
    shutil.rmtree(tree / "a/deep")
    assert names(ImageFolder(tree)) == ["top.png", "a/y.tif", "b/1.jpg", "b/2.JPEG"]


def test_index_of_a_flat_folder_settles(tmp_path, monkeypatch):
    """Writing the cache must not make the root look changed for ever."""
    (tmp_path / "1.jpg").touch()
    ImageFolder(tmp_path)
    os.utime(tmp_path, (1e9, 1e9))
    ImageFolder(tmp_path)
    before = (tmp_path / ".image-index/v1.json").stat().st_mtime_ns
    assert listed(tmp_path, monkeypatch) == (["1.jpg"], [])
    assert (tmp_path / ".image-index/v1.json").stat().st_mtime_ns == before


def test_index_trusts_no_folder_that_changed_just_before(tree):
    os.utime(tree / "b")
    status = os.stat(tree / "b")
    ImageFolder(tree)
    (tree / "b/late.jpg").touch()
    os.utime(tree / "b", ns=(status.st_atime_ns, status.st_mtime_ns))  # as if within one tick of the clock
    assert "b/late.jpg" in names(ImageFolder(tree))


@pytest.mark.parametrize("damage", [
    lambda content: b"",
    lambda content: content[: len(content) // 2],
    lambda content: b"\x00" * 100,
    lambda content: content.replace(b"1.jpg", b"7.jpg"),
    lambda content: b"%d\n7" % zlib.crc32(b"7"),
    lambda content: b"%d\n[[1]]" % zlib.crc32(b"[[1]]"),
])
def test_damaged_cache_is_rebuilt(tree, damage):
    ImageFolder(tree)
    cache = tree / ".image-index/v1.json"
    whole = cache.read_bytes()
    cache.write_bytes(damage(whole))
    assert names(ImageFolder(tree)) == TREE
    assert json.loads(cache.read_bytes().split(b"\n", 1)[1])[-1][-1] == "1.jpg/2.JPEG/"


def test_cache_goes_elsewhere_when_root_cannot_be_written(tree, monkeypatch):
    (tree / ".image-index").touch()  # a file, so that no folder of that name can be made
    age(tree)
    assert names(ImageFolder(tree)) == TREE
    assert len(list((tree.parent / "cache/image-index").iterdir())) == 1
    assert listed(tree, monkeypatch) == (TREE, [])
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert listed(tree, monkeypatch) == (TREE, ["", "a", "a/deep", "a/deep/er", "b"])


def test_many_processes_index_at_once(tree):
    with ThreadPoolExecutor(8) as pool:
        assert all(found == TREE for found in pool.map(lambda _: names(ImageFolder(tree)), range(32)))
    assert os.listdir(tree / ".image-index") == ["v1.json"]


def test_links(tree, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/e.jpg").touch()
    os.symlink(tmp_path / "elsewhere", tree / "linked")
    os.symlink(tree, tree / "a/loop")
    os.symlink(tmp_path / "elsewhere/e.jpg", tree / "link.jpg")
    assert names(ImageFolder(tree)) == ["link.jpg"] + TREE[:3] + TREE[3:] + ["linked/e.jpg"]


def test_names_of_any_bytes(tree):
    (tree / "b/ü é.jpg").touch()
    with open(os.fsencode(tree) + b"/b/\xff.jpg", "wb"):
        pass
    for _ in range(2):  # from the disk, from the cache
        found = names(ImageFolder(tree))
        assert {"b/ü é.jpg", os.fsdecode(b"b/\xff.jpg")} <= set(found)
        assert all(os.path.exists(tree / name) for name in found)
        ImageFolder(tree, "train", 0.0)


def test_folder_errors(tmp_path):
    (tmp_path / "texts").mkdir()
    for make, message in [
        (lambda: None, "nowhere is not a folder: give"),
        (lambda: (tmp_path / "nowhere").mkdir(), "no images in .*nowhere: it is empty; images are .* end in .jpg"),
        (lambda: (tmp_path / "nowhere/a.txt").touch(), "nowhere: it holds 1 entries such as a.txt; images .* .webp"),
    ]:
        make()
        with pytest.raises(DataError, match=message):
            ImageFolder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="a.txt is not a folder"):
        ImageFolder(tmp_path / "nowhere/a.txt")


def test_folder_that_cannot_be_listed(tree, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot list folder .*images/ \(Permission denied\)"):
        ImageFolder(tree)


def test_split_is_disjoint_complete_and_stable(tmp_path):
    for i in range(60):
        path = tmp_path / f"one/{'ab'[i % 2]}/{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    everything, train, val = (names(ImageFolder(tmp_path / "one", part, 0.1)) for part in ("all", "train", "val"))
    assert sorted(train + val) == sorted(everything) and not set(train) & set(val)
    assert val == VAL
    shutil.copytree(tmp_path / "one", tmp_path / "two")  # elsewhere, and with more files
    (tmp_path / "two/a/more.jpg").touch()
    assert set(names(ImageFolder(tmp_path / "two", "val", 0.1))) - {"a/more.jpg"} == set(val)
    assert set(val) < set(names(ImageFolder(tmp_path / "one", "val", 0.3)))
    with pytest.raises(DataError, match="share of 0 of the 60 images in .* leaves none for val"):
        ImageFolder(tmp_path / "one", "val", 0)
    with pytest.raises(DataError, match="leaves none for train"):
        ImageFolder(tmp_path / "one", "train", 1)


# what the split was when it was made: another would put pictures that a model was trained on among the held-out ones
VAL = ["a/012.jpg", "a/034.jpg", "a/054.jpg", "a/058.jpg", "b/013.jpg", "b/023.jpg", "b/035.jpg", "b/051.jpg"]


@pytest.mark.parametrize("style", ["{:05d}.jpg", "n0144{:04d}_{:d}.JPEG", "{:x}.png"])
def test_split_takes_its_share_of_numbered_names(style):
    files = "".join(style.format(i, 3 * i) + "/" for i in range(20_000)).encode()
    held_out = data._hashes({"train": files}) < 0.01 * 2**32
    assert 150 < held_out.sum() < 250
    assert min(half.sum() for half in np.split(held_out, 4)) > 20


# ---------------------------------------------------------------------------------------------------------------------
# Pixels


def two_steps(image: Image.Image, size: int, scale: tuple[float, float], resample) -> np.ndarray:
    """The definition: resize the whole picture, pad by reflection where it is short, cut out the centre."""
    ratio = min(image.size) / size
    width, height = (round(side * factor / ratio) for side, factor in zip(image.size, scale))
    resized = pixels(image.convert("RGB").resize((width, height), resample))
    across, down = max(0, size - width), max(0, size - height)
    padding = (down // 2, (down + 1) // 2), (across // 2, (across + 1) // 2), (0, 0)
    resized = np.pad(resized, padding, mode="reflect")
    top, left = (round((side - size) / 2) for side in resized.shape[:2])
    return resized[top : top + size, left : left + size]


@pytest.mark.parametrize("width, height", [(500, 375), (375, 500), (224, 224), (90, 61), (1000, 30), (1, 7)])
@pytest.mark.parametrize("scale", [(1, 1), (3.5, 3.5), (1.15, 0.87), (0.87, 1.15), (1.9, 1.5)])
def test_crop_equals_resizing_all_then_cropping(width, height, scale):
    image = smooth(width, height)
    for size, resample in ((96, BICUBIC), (81, BILINEAR)):
        crop = data.resized_crop(image, size, scale, resample)
        assert crop.size == (size, size) and crop.mode == "RGB"
        error = abs(pixels(crop) - two_steps(image, size, scale, resample))
        assert error.max() <= 2 and error.mean() < 0.1  # ties, rounded either way in each of two passes


def test_large_picture_is_reduced_first_to_the_same_result():
    image = smooth(1600, 1300)
    assert abs(pixels(data.resized_crop(image, 64, (1, 1), BICUBIC)) - two_steps(image, 64, (1, 1), BICUBIC)).max() <= 2


@pytest.mark.parametrize("scale, reduction", [((1, 1), 4), ((1.2, 0.9), 2), ((2, 2), 2), ((4, 4), 1), ((0.5, 0.5), 8)])
def test_jpeg_is_decoded_at_the_least_size_that_has_all_pixels(tmp_path, scale, reduction):
    smooth(1000, 752).save(tmp_path / "a.jpg", quality=95)
    image = Image.open(tmp_path / "a.jpg")
    crop = data.resized_crop(image, 160, scale, BICUBIC)
    assert image.size == (1000 // reduction, 752 // reduction)
    assert abs(pixels(crop) - two_steps(Image.open(tmp_path / "a.jpg"), 160, scale, BICUBIC)).mean() < 1


def test_turned_jpeg_is_decoded_at_the_least_size_too(tmp_path):
    upright, exif = smooth(1000, 752), Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.jpg", quality=95, exif=exif)
    image = Image.open(tmp_path / "a.jpg")
    crop = data.resized_crop(image, 160, (1.9, 0.9), BICUBIC)
    assert image.size == (376, 500)
    assert abs(pixels(crop) - two_steps(upright, 160, (1.9, 0.9), BICUBIC)).mean() < 1.5


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
@pytest.mark.parametrize("orientation", range(0, 10))
def test_exif_orientation(tmp_path, name, orientation):
    upright, exif = smooth(300, 200), Image.Exif()
    exif[0x0112] = orientation
    undo = {6: 8, 8: 6}.get(orientation, orientation)
    stored = upright.transpose(data.TURNS[undo]) if undo in data.TURNS else upright
    stored.save(tmp_path / name, exif=exif, **({"quality": 95} if name != "a.tif" else {}))
    crop = data.resized_crop(Image.open(tmp_path / name), 48, (1.2, 1.1), BICUBIC)
    assert abs(pixels(crop) - two_steps(upright, 48, (1.2, 1.1), BICUBIC)).mean() < 1.5


@pytest.mark.filterwarnings(r"ignore::UserWarning:PIL\.")
def test_damaged_exif_does_not_make_a_picture_unreadable(tmp_path):
    smooth(80, 60).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00\x2a\x00\x00\xff\xff\x01\x12garbage")
    assert data.resized_crop(Image.open(tmp_path / "a.jpg"), 32, (1, 1), BICUBIC).size == (32, 32)


def grey(image: Image.Image) -> np.ndarray:
    return pixels(image.convert("L"))[..., None]


def test_modes_become_rgb(tmp_path):
    image = smooth(80, 64)
    ramp = np.linspace(0, 65535, 64 * 80).reshape(64, 80)
    alpha = Image.fromarray(np.tile(np.arange(80, dtype=np.uint8) * 3, (64, 1)))
    transparent = image.copy()
    transparent.putalpha(alpha)
    palette = image.quantize(200)
    cases = {
        "rgb.png": (image, pixels(image)),
        "grey.jpg": (image.convert("L"), grey(image)),
        "one.png": (image.convert("1"), pixels(image.convert("1").convert("RGB"))),
        "cmyk.jpg": (image.convert("CMYK"), pixels(image.convert("CMYK").convert("RGB"))),
        "palette.png": (palette, pixels(palette.convert("RGB"))),
        "rgba.png": (transparent, pixels(image)),
        "la.png": (Image.merge("LA", [image.convert("L"), alpha]), grey(image)),
        "deep.png": (Image.fromarray(ramp.astype(np.uint16)), (ramp / 257)[..., None]),
        "deep.tif": (Image.fromarray(ramp.astype(np.uint16)), (ramp / 257)[..., None]),
        "big-endian.tif": (Image.fromarray(ramp.astype(">u2")), (ramp / 257)[..., None]),
        "int32.tif": (Image.fromarray(ramp.astype(np.int32)), (ramp / 257)[..., None]),
    }
    for name, (picture, expected) in cases.items():
        picture.save(tmp_path / name, **({"quality": 95, "subsampling": 0} if name.endswith("jpg") else {}))
        crop = data.resized_crop(Image.open(tmp_path / name), 64, (1, 1), BICUBIC)
        assert crop.mode == "RGB" and abs(pixels(crop) - expected[:, 8:72]).mean() < 1.5, name


def test_palette_with_transparency_warns_of_nothing(tmp_path):
    palette = smooth(40, 40).quantize(20)
    palette.save(tmp_path / "p.png", transparency=bytes(range(20)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("ignore", module=r"PIL\.")  # pytest resets what data.py sets on import
        crop = data.resized_crop(Image.open(tmp_path / "p.png"), 40, (1, 1), BICUBIC)
    assert not caught and abs(pixels(crop) - pixels(palette.convert("RGB"))).max() == 0


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
            + struct.pack(">I", 9) + b"IDAT")


def test_very_large_pictures():
    assert Image.open(io.BytesIO(png_header(15_000, 15_000))).size == (15_000, 15_000)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(png_header(30_000, 30_000)))


def test_to_tensor():
    image = smooth(20, 10)
    tensor = data.to_tensor(image)
    assert tensor.dtype == torch.uint8 and tensor.is_contiguous()
    assert torch.equal(tensor, torch.tensor(np.array(image)).permute(2, 0, 1))
    assert torch.equal(data.to_tensor(image, flip=True), tensor.flip(2))


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation


def test_augment_draws_the_papers_distribution():
    augment = Augment(224)
    draws = [augment.draw(data.generator("test", i)) for i in range(4000)]
    scale = np.array([scale for scale, _, _ in draws])
    area, aspect = 1 / scale.prod(1), scale[:, 0] / scale[:, 1]
    zoomed, stretched = abs(area - 1) > 1e-9, abs(aspect - 1) > 1e-9
    for share in (zoomed, stretched, [r == BICUBIC for _, r, _ in draws], [flip for _, _, flip in draws]):
        assert 0.47 < np.mean(share) < 0.53
    assert 0.23 < np.mean(zoomed & stretched) < 0.27
    quarters = np.quantile(area[zoomed], [0, 0.25, 0.5, 0.75, 1])
    assert np.allclose(quarters, [0.08, 0.31, 0.54, 0.77, 1], atol=0.03)
    quarters = np.quantile(np.log(aspect[stretched]) / np.log(4 / 3), [0, 0.25, 0.5, 0.75, 1])
    assert np.allclose(quarters, [-1, -0.5, 0, 0.5, 1], atol=0.06)


def test_augment_is_its_drawn_crop_mirrored_or_not():
    image, augment = smooth(300, 200), Augment(64)
    flips = set()
    for i in range(20):
        scale, resample, flip = augment.draw(data.generator("test", i))
        expected = two_steps(image, 64, scale, resample)
        expected = expected[:, ::-1] if flip else expected
        result = augment(image, data.generator("test", i))
        assert result.shape == (3, 64, 64) and result.dtype == torch.uint8
        assert abs(result.permute(1, 2, 0).numpy() - expected).max() <= 1
        flips.add(flip)
    assert flips == {True, False}


def test_randaugment():
    image, augment = smooth(120, 90), Augment(64, randaugment=True)
    results = [augment(image, data.generator("test", i)) for i in range(40)]
    plain = [Augment(64)(image, data.generator("test", i)) for i in range(40)]
    changed = sum(not torch.equal(a, b) for a, b in zip(results, plain))
    assert 20 <= changed <= 38  # 3 in 4 at least one operation
    assert torch.equal(results[7], augment(image, data.generator("test", 7)))


@pytest.mark.parametrize("level", [0.0, 0.55, 0.9, 0.97])
def test_randaugment_operations_are_timms(level):
    timm = pytest.importorskip("timm.data.auto_augment")
    image = smooth(64, 48)
    increasing = {name.replace("Increasing", ""): name for name in timm.rand_augment_choices("", increasing=True)}
    assert set(increasing) == set(data.OPERATIONS)
    for name in data.OPERATIONS:
        to_arguments, theirs = timm.LEVEL_TO_ARG[increasing[name]], set()
        for _ in range(20):  # their sign is random
            arguments = to_arguments(10 * level, {}) if to_arguments else ()
            changed = timm.NAME_TO_OP[increasing[name]](image, *arguments, resample=BICUBIC, fillcolor=(128, 128, 128))
            theirs.add(changed.tobytes())
        ours = {data.operation(name, image, sign * level, cubic=True).tobytes() for sign in (-1, 1)}
        assert ours == theirs, name


def test_every_operation_does_something():
    image = smooth(64, 48)
    for name in data.OPERATIONS:
        for level, cubic in ((1.0, True), (-1.0, False), (0.9, False)):
            result = data.operation(name, image, level, cubic)
            assert result.size == image.size and result.mode == "RGB"
            assert abs(pixels(result) - pixels(image)).mean() > 0.3, name


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mix_of_slices_is_the_slice_of_the_mix(kind):
    images = torch.rand(12, 3, 16, 24)
    whole = data.mix(images, kind, seed=3, update=5)
    assert whole.shape == images.shape and not torch.equal(whole, images)
    parts = [data.mix(images[first : first + 4], kind, seed=3, update=5, first=first) for first in (0, 4, 8)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(data.mix(images, kind, seed=3, update=6), whole)
    assert not torch.equal(data.mix(images, kind, seed=4, update=5), whole)
    for first, count in ((1, 4), (0, 3)):
        with pytest.raises(DataError, match=f"{kind} pairs neighbours, but a micro-batch has {count} images"):
            data.mix(images[:count], kind, 0, 0, first)


def test_mixup_blends_each_pair_with_itself():
    images = torch.stack([torch.full((3, 4, 4), float(i % 2)) for i in range(4000)])
    mixed = data.mix(images, "mixup", 0, 0)[:, 0, 0, 0]
    assert torch.allclose(mixed[0::2] + mixed[1::2], torch.ones(2000))  # both with the same share
    share = np.sort(mixed[1::2].numpy())  # Beta(0.5, 0.5): quarters at sin^2 of 22.5, 45, 67.5 degrees
    assert np.allclose(share[[500, 1000, 1500]], [0.1464, 0.5, 0.8536], atol=0.05)


def test_cutmix_pastes_a_box_from_the_partner():
    images = torch.stack([torch.full((3, 40, 40), float(i % 2)) for i in range(2000)])
    mixed = data.mix(images, "cutmix", 0, 0)
    assert torch.equal(mixed[0::2] + mixed[1::2], torch.ones(1000, 3, 40, 40))
    areas = []
    for pasted in mixed[0::2, 0].bool():
        rows, columns = pasted.any(1).sum(), pasted.any(0).sum()
        assert pasted.sum() == rows * columns  # one rectangle
        areas.append(pasted.float().mean().item())
    # a uniform area whose box, around a uniform centre, loses what lies outside: half to a third remains of the largest
    assert 0.20 < np.mean(areas) < 0.36 and max(areas) > 0.6 and min(areas) < 0.01


def test_unknown_mixing():
    with pytest.raises(DataError, match="unknown mixing 'blend': use mixup or cutmix"):
        data.mix(torch.rand(2, 3, 4, 4), "blend", 0, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Datasets and batches


@pytest.fixture
def folder(tmp_path):
    """Twelve photographs, of which 3, 4 and 7 cannot be read."""
    for i in range(12):
        smooth(90 + i, 60, seed=i).save(tmp_path / f"{i:02d}.jpg")
    whole = (tmp_path / "03.jpg").read_bytes()
    (tmp_path / "03.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "04.jpg").write_text("a text")
    (tmp_path / "07.jpg").write_bytes(b"")
    return tmp_path


def test_images_depend_on_seed_epoch_and_index_alone(folder):
    dataset, again = (Images(ImageFolder(folder), Augment(32), seed=1) for _ in range(2))
    expected = dataset[2, 5][0]
    assert torch.equal(again[2, 5][0], expected) and dataset[2, 5][1] == []
    others = [dataset[1, 5], dataset[2, 6], Images(ImageFolder(folder), Augment(32), seed=2)[2, 5]]
    assert not any(torch.equal(other[0], expected) for other in others)


def test_unreadable_files_are_replaced_and_named(folder):
    dataset = Images(ImageFolder(folder), Augment(32), seed=1)
    assert [i for i in range(12) if dataset[0, i][1]] == [3, 4, 7]
    for epoch in range(20):
        image, unreadable = dataset[epoch, 4]
        assert image.shape == (3, 32, 32) and unreadable[0] == "04.jpg"
        assert set(unreadable) <= {"03.jpg", "04.jpg", "07.jpg"}
        assert torch.equal(image, dataset[epoch, 4][0])
    assert any(len(dataset[epoch, 4][1]) > 1 for epoch in range(40))  # the replacement was unreadable too


@pytest.mark.parametrize("name", ["t.png", "t.webp", "t.bmp", "t.tif"])
def test_truncated_files_of_any_format_are_unreadable(tmp_path, name):
    smooth(64, 64).save(tmp_path / name)
    smooth(64, 64).save(tmp_path / "whole.png")
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) * 2 // 3])
    dataset = Images(ImageFolder(tmp_path), Augment(32), seed=0)
    index = names(dataset.source).index(name)
    assert set(dataset[0, index][1]) == {name}


def test_a_fault_elsewhere_does_not_pass_for_an_unreadable_file(folder):
    def prepare(image, rng):
        raise ValueError("a mistake in prepare")
    with pytest.raises(ValueError, match="^a mistake in prepare$"):
        Images(ImageFolder(folder), prepare, seed=0)[0, 5]


def test_a_removed_file_is_unreadable(folder):
    dataset = Images(ImageFolder(folder), Augment(32), seed=1)
    (folder / "05.jpg").unlink()
    assert dataset[0, 5][1][0] == "05.jpg"


def test_nothing_but_unreadable_files(tmp_path):
    (tmp_path / "a.jpg").write_text("no picture")
    dataset = Images(ImageFolder(tmp_path), Augment(32), seed=0)
    with pytest.raises(DataError, match=r"20 pictures in a row .* a.jpg \(UnidentifiedImageError: .*check the image"):
        dataset[0, 0]
    loader = DataLoader(dataset, batch_sampler=Batches(1, 1, 1, 0), collate_fn=collate, num_workers=1)
    with pytest.raises(DataError, match="^20 pictures in a row .*check the image files$"):  # from a worker too
        next(iter(loader))


def test_workers_change_nothing(folder):
    dataset = Images(ImageFolder(folder), Augment(32, randaugment=True), seed=0)
    batches = Batches(12, global_batch=5, epochs=2, seed=0)
    alone = list(DataLoader(dataset, batch_sampler=batches, collate_fn=collate))
    sent = pickle.loads(pickle.dumps(dataset))  # as to workers that are not forked
    together = list(DataLoader(sent, batch_sampler=batches, collate_fn=collate, num_workers=2, persistent_workers=True))
    assert len(alone) == len(together) == len(batches) == 4
    assert any(unreadable for _, unreadable in alone)
    for (images, unreadable), (others, also) in zip(alone, together):
        assert images.shape == (5, 3, 32, 32) and torch.equal(images, others) and unreadable == also


def test_batches_are_epochs_in_random_order():
    keys = [key for batch in Batches(103, global_batch=10, epochs=3, seed=0) for key in batch]
    assert len(keys) == 300 and len(set(keys)) == 300
    epochs = [[index for epoch, index in keys if epoch == e] for e in range(3)]
    assert all(len(epoch) == 100 and set(epoch) < set(range(103)) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    assert keys != [key for batch in Batches(103, 10, 3, seed=1) for key in batch]
    assert keys == [key for batch in Batches(103, 10, 3, seed=0) for key in batch]


@pytest.mark.parametrize("world, micro_batch", [(1, None), (1, 2), (2, None), (2, 3), (4, 1), (3, 4)])
def test_global_batches_are_the_same_for_any_ranks_and_micro_batches(world, micro_batch):
    expected = list(Batches(50, global_batch=12, epochs=2, seed=0))
    ranks = [Batches(50, 12, 2, 0, rank, world, micro_batch) for rank in range(world)]
    per_update = 12 // world // (micro_batch or 12 // world)
    for rank in ranks:
        assert rank.updates_per_epoch == 4 and rank.updates == 8
        assert len(rank) == len(list(rank)) == 8 * per_update
    slices = [list(rank) for rank in ranks]
    for update, batch in enumerate(expected):
        micros = slice(update * per_update, (update + 1) * per_update)
        assert [key for rank in slices for micro in rank[micros] for key in micro] == batch


def test_batches_continue_and_end_where_asked():
    every = list(Batches(50, 12, epochs=3, seed=0, micro_batch=6))
    for start in (0, 1, 4, 7, 12, 15):
        rest = Batches(50, 12, epochs=3, seed=0, micro_batch=6, start_update=start)
        assert list(rest) == every[2 * start :] and len(rest) == len(every[2 * start :])
    capped = Batches(50, 12, epochs=3, seed=0, micro_batch=6, start_update=3, updates=5)
    assert list(capped) == every[6:10] and len(capped) == 4
    assert list(Batches(50, 12, epochs=3, seed=0, updates=99)) == list(Batches(50, 12, epochs=3, seed=0))


@pytest.mark.parametrize("arguments, message", [
    (dict(count=7, global_batch=8), "only 7 images, fewer than one global batch of 8"),
    (dict(count=99, global_batch=8, world=3), "a global batch of 8 cannot be split over 3 ranks"),
    (dict(count=99, global_batch=8, world=2, micro_batch=3), "over 2 ranks into micro-batches of 3"),
    (dict(count=99, global_batch=8, micro_batch=16), "into micro-batches of 16"),
    (dict(count=99, global_batch=8, micro_batch=0), "into micro-batches of 0"),
    (dict(count=99, global_batch=2, world=4), "over 4 ranks"),
])
def test_impossible_batches(arguments, message):
    with pytest.raises(DataError, match=message):
        Batches(epochs=1, seed=0, **arguments)


def test_unreadable_names_each_file_once():
    lines = []
    counter = Unreadable(lines.append)
    for names_, seen in (([], 100), (["a", "b"], 100), (["a"], 100), (["c"], 100)):
        counter.add(names_, seen)
    assert [line.rsplit(" ", 1)[1] for line in lines] == ["a", "b", "c"]
    assert counter.state_dict() == {"seen": 400, "count": 4}


def test_unreadable_prints_to_stderr(capsys):
    Unreadable().add(["some/file.jpg"], 1)
    assert capsys.readouterr().err.endswith(": some/file.jpg\n")


def run_until_stopped(share: float, samples: int) -> int | None:
    """The sample at which a random share of unreadable files ends a run."""
    counter, rng = Unreadable(lambda line: None), np.random.default_rng(0)
    for sample in range(0, samples, 8):
        bad = [f"{sample}-{i}" for i in range(rng.binomial(8, share))]
        try:
            counter.add(bad, 8)
        except DataError as error:
            assert f"{counter.count} images could not be read (such as " in str(error) and "more than 1%" in str(error)
            return sample
    return None


def test_unreadable_limit():
    assert run_until_stopped(0.006, 40_000) is None
    assert run_until_stopped(0.02, 40_000) < 4000
    assert run_until_stopped(0.5, 40_000) <= 24  # a tiny folder of half-broken images
    counter, other = Unreadable(lambda line: None), Unreadable(lambda line: None)
    counter.add(["a"] * 5, 10)
    other.load_state_dict(counter.state_dict())
    with pytest.raises(DataError, match=r"6 images could not be read \(such as b\) in 11 samples"):
        other.add(["b"], 1)


# ---------------------------------------------------------------------------------------------------------------------
# Scenes

MANY = [Scenes(400, seed=0)[i] for i in range(400)]


def test_scenes_depend_on_seed_and_index_alone():
    first, again = Scenes(10, seed=0)[3], Scenes(1000, seed=0)[3]
    assert pixels(first.image).tobytes() == pixels(again.image).tobytes() and first.objects == again.objects
    assert np.array_equal(first.labels, again.labels) and first.conversations == again.conversations
    assert not np.array_equal(first.labels, Scenes(10, seed=1)[3].labels)
    assert not np.array_equal(first.labels, Scenes(10, seed=0)[4].labels)
    assert Scenes(10, 0).open(3).tobytes() == first.image.tobytes() and Scenes(10, 0).name(3) == first.name
    assert len(list(Scenes(10, 0))) == len(Scenes(10, 0)) == 10


def test_scene_labels_and_boxes_agree():
    shapes, colors = Scenes.SHAPES, Scenes.COLORS
    assert len(shapes) == 10 and len(colors) == 8
    for scene in MANY:
        shape, color = scene.labels
        assert scene.labels.dtype == np.uint8 and scene.labels.shape == (2, 64, 64)
        assert np.array_equal(shape > 0, color > 0)
        assert 2 <= len(scene.objects) <= 5
        kinds = {(thing.shape, thing.color) for thing in scene.objects}
        assert len(kinds) == len(scene.objects)
        assert kinds == {(shapes[s - 1], colors[c - 11]) for s, c in scene.labels.reshape(2, -1).T.tolist() if s}
        for thing in scene.objects:
            ys, xs = np.nonzero((shape == shapes.index(thing.shape) + 1) & (color == colors.index(thing.color) + 11))
            assert thing.box == [xs.min() / 64, ys.min() / 64, (xs.max() + 1) / 64, (ys.max() + 1) / 64]
            assert len(xs) >= 10
    assert {thing.shape for scene in MANY for thing in scene.objects} == set(shapes)
    assert {thing.color for scene in MANY for thing in scene.objects} == set(colors)
    assert {len(scene.objects) for scene in MANY} == {2, 3, 4, 5}


def test_scene_pixels_have_the_color_of_their_label():
    """Inside an object, the nearest color of the palette is its own; elsewhere the picture is dark."""
    palette = np.array(list(data.PALETTE.values()))
    palette = palette / np.linalg.norm(palette, axis=1, keepdims=True)
    right = total = 0
    for scene in MANY[:100]:
        color, rgb = scene.labels[1].astype(int), pixels(scene.image)
        neighbours = [np.roll(color, shift, axis) for shift in (-1, 1) for axis in (0, 1)]
        inner = np.all([color == other for other in neighbours], axis=0)
        nearest = np.argmax(rgb @ palette.T / np.linalg.norm(rgb, axis=-1, keepdims=True).clip(1), -1) + 11
        right, total = right + ((nearest == color) & inner & (color > 0)).sum(), total + (inner & (color > 0)).sum()
        assert rgb[inner & (color == 0)].max(-1).mean() < 90
    assert right / total > 0.97


def test_scenes_of_other_sizes():
    for size in (32, 100, 224):
        scene = Scenes(3, seed=0, size=size)[1]
        assert scene.image.size == (size, size) and scene.labels.shape == (2, size, size)
    with pytest.raises(IndexError):
        Scenes(3, seed=0)[3]


def questions(kind: str) -> list[tuple[data.Scene, str, str]]:
    return [(scene, row["conversations"][0]["value"].removeprefix("<image>\n"), row["conversations"][1]["value"])
            for scene in MANY for row in scene.conversations if row["kind"] == kind]


def things(scene: data.Scene, noun: str) -> list[data.Object]:
    """The objects that a noun such as "red ring", "ring", "red object" means."""
    words = noun.removeprefix("the ").removeprefix("The ").split()
    assert 1 <= len(words) <= 2 and set(words) <= {*Scenes.SHAPES, *Scenes.COLORS, "object"}
    return [o for o in scene.objects if set(words) <= {o.shape, o.color, "object"}]


def test_conversation_rows():
    kinds = {}
    for scene in MANY:
        rows = scene.conversations
        assert len({row["id"] for row in rows}) == len(rows) and all(row["image"] == scene.name for row in rows)
        for row in rows:
            question, answer = row["conversations"]
            assert question["from"] == "human" and question["value"].startswith("<image>\n") and answer["from"] == "gpt"
            kinds[row["kind"]] = kinds.get(row["kind"], 0) + 1
        json.dumps(rows)
    assert kinds["caption"] == kinds["count"] == kinds["refer"] == 400 and kinds["presence"] == 800
    assert kinds["color"] > 350 and kinds["relation"] > 350 and kinds["list"] == kinds["tally"] == 400


def test_captions_name_everything_from_left_to_right():
    for scene, _, answer in questions("caption"):
        phrases = answer.removeprefix("From left to right: ").removesuffix(".").replace(" and ", ", ").split(", ")
        assert len(phrases) == len(scene.objects)
        found = [things(scene, phrase.split(" ", 1)[1])[0] for phrase in phrases]
        centers = [o.box[0] + o.box[2] for o in found]
        assert centers == sorted(centers) and len({id(o) for o in found}) == len(found)
        assert all((phrase.split()[0] == "an") == (phrase.split()[1][0] in "aeiou") for phrase in phrases)


def test_counts_and_colors_are_true():
    zero = 0
    for scene, question, answer in questions("count"):
        noun = question.removeprefix("How many ").split(" are there?")[0]
        noun = noun.removesuffix("es") if noun.endswith("crosses") else noun.removesuffix("s")
        assert int(answer) == len(things(scene, noun))
        zero += answer == "0"
    assert 20 < zero < 120
    for scene, question, answer in questions("color"):
        (thing,) = things(scene, question.removeprefix("What color is the ").split("?")[0])
        assert answer == thing.color


def test_lists_are_true():
    for scene, _, answer in questions("list"):
        pairs = [tuple(pair.split()) for pair in answer.split(", ")]
        expected = sorted(scene.objects, key=lambda o: o.box[0] + o.box[2])
        assert pairs == [(o.shape, o.color) for o in expected]
    for scene, _, answer in questions("tally"):
        counts = {word: int(count) for word, count in (pair.split() for pair in answer.split(", "))}
        assert list(counts) == [*Scenes.COLORS, *Scenes.SHAPES]
        assert all(count == len(things(scene, word)) for word, count in counts.items())


def test_relations_are_as_stated():
    true = 0
    for scene, question, answer in questions("relation"):
        statement = question.split("? ", 1)[1].split(".\n")[0]
        (relation,) = [r for r in ("to the left of", "to the right of", "above", "below") if f" is {r} " in statement]
        (a,), (b,) = (things(scene, noun) for noun in statement.split(f" is {relation} "))
        axis, sign = {"to the left of": (0, 1), "to the right of": (0, -1), "above": (1, 1), "below": (1, -1)}[relation]
        distance = sign * (b.box[axis] + b.box[axis + 2] - a.box[axis] - a.box[axis + 2]) / 2
        assert abs(distance) >= 0.2 and answer == str(distance > 0)
        true += distance > 0
    assert 0.42 < true / len(questions("relation")) < 0.58


def test_presence_is_true_and_balanced():
    rows = questions("presence")
    for scene, question, answer in rows:
        noun = question.split(" in the image?")[0].removeprefix("Is there ").split(" ", 1)[1]
        assert answer == ("Yes" if things(scene, noun) else "No")
    assert sum(answer == "Yes" for _, _, answer in rows) * 2 == len(rows)


def test_referring_expressions_name_one_object_and_its_box():
    for scene, question, answer in questions("refer"):
        (thing,) = things(scene, question.split('"')[1])
        assert answer == "[" + ", ".join(f"{side:.2f}" for side in thing.box) + "]"


# ---------------------------------------------------------------------------------------------------------------------
# The rest


def test_grid():
    rows = [[smooth(20, 10), np.zeros((10, 20, 3), np.uint8)], [np.full((30, 10), 255, np.uint8), smooth(5, 5)]]
    plain = data.grid(rows)
    assert plain.size == (4 + 20 + 4 + 20 + 4, 4 + 10 + 4 + 30 + 4)
    assert np.array_equal(pixels(plain)[4:14, 4:24], pixels(rows[0][0])) and pixels(plain)[4:14, 28:48].max() == 0
    titled = data.grid(rows, titles=["a", "a very long title"], scale=2, gap=1)
    assert titled.width > 80 and titled.height > 2 * 40
    below = pixels(titled)[-2 * 40 - 2 :]
    assert np.array_equal(below[:20:2, 1:41:2], pixels(rows[0][0]))
    assert pixels(titled)[:-82].min() < 100  # there is text above


def test_works_when_copied_alone(tmp_path):
    shutil.copy(data.__file__, tmp_path)
    script = ("import warnings, data; d = data.Images(data.Scenes(9, 0), data.Augment(16), 0); "
              "assert any(f[0] == 'ignore' and f[3] and f[3].match('PIL.Image') for f in warnings.filters); "
              "print(*d[0, 1][0].shape, data.__file__)")
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["3", "16", "16", str(tmp_path / "data.py")]
