"""decode.py: triplets as text, targets, losses and matching against formulas, pointing models, and wrong input."""

import functools
import itertools
import json
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, launch, losses, refusal
from PIL import Image
from test_train_vlm import parts, train  # noqa: F401 (a fixture)

import convert
import data
import decode
import eval as evaluation
import llama
import vit
import vlm

MASKS = json.loads((ROOT / "tests/data/decode/masks.json").read_text())  # made by pycocotools 2.0.11
TEXT = "A <Phrase>red ring</Phrase>(<Unit>box</Unit>[0]<REF>), <Phrase>bar</Phrase>(<Unit>mask</Unit>[0]<REF>[1]<REF>)."
CONFIG = decode.PointerConfig(("box", "mask"), vision=32, language=48, grid=4, width=32, depth=2)


def a_vlm(units: Sequence[str] = ("box", "mask")) -> vlm.VLM:
    """A tiny model that points."""
    torch.manual_seed(0)
    added = decode.ADDED if units else ()
    tokenizer = llama.Tokenizer(ROOT / "demo/language", added=added)
    config = llama.LlamaConfig(tokenizer.vocab_size + len(added), 48, 80, 2, 6, max_position_embeddings=512)
    shape = dict(width=32, depth=2) if units else {}
    model = vlm.build(vit.ViT(vit.ViTConfig(**TINY)), llama.Llama(config), tokenizer, "mlp", units=units, **shape)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def picture(seed: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8))


# --- text -------------------------------------------------------------------------------------------------------------

def test_triplets_as_text():
    ring, bar = decode.read(TEXT)
    assert (ring.name, ring.unit, ring.refs) == ("red ring", "box", range(1))
    assert (bar.name, bar.unit, bar.refs) == ("bar", "mask", range(1, 3))
    assert decode.write("bar", "mask", 2) in TEXT and decode.read("<REF>, </Phrase>(<Unit>box</Unit>[0]<REF>)") == []
    task = "<Task>\nUnit decode (True). Class name, target unit and number:\n- Name: bar Unit: mask Num: 2\n</Task>\n"
    assert decode.plan(two := decode.write("bar", "mask", 2)) == task + two
    assert decode.plan("Yes") == "<Task>\nUnit decode (False).\n</Task>\nYes"


def test_added_tokens():
    """Their ids lie behind the vocabulary, the text survives, and their rows start as the mean of the others."""
    plain = llama.Tokenizer(ROOT / "demo/language")
    tokenizer = llama.Tokenizer(ROOT / "demo/language", added=decode.ADDED)
    for text in (TEXT, "<REF>", "", decode.plan(TEXT), "no more"):
        assert tokenizer.decode(ids := tokenizer.encode(text)) == text == "".join(tokenizer.stream(ids))
        assert sum(i >= plain.vocab_size for i in ids) == sum(map(text.count, decode.ADDED))
    assert tokenizer.encode("red ring") == plain.encode("red ring")
    rows = llama.read_config(ROOT / "demo/language").vocab_size
    before, after = (llama.load(ROOT / "demo/language", least=n).state_dict() for n in (0, rows + 8))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old, new = after[name].split([rows, 8])
        assert torch.equal(old, before[name]) and torch.allclose(new, old.mean(0), atol=1e-6)


# --- targets ----------------------------------------------------------------------------------------------------------

def test_masks_are_read_as_coco_means_them(tmp_path: Path):
    for row in MASKS:
        size = tuple(row["size"][::-1])
        mask = data.read_mask(row, size)
        assert (mask.sum(1).tolist(), mask.sum(0).tolist()) == (row["rows"], row["columns"])
        assert np.array_equal(data.read_mask(data.run_lengths(mask), size), mask)
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "mask.png")
        assert np.array_equal(data.read_mask("mask.png", size, tmp_path), mask)
        if row["polygons"]:
            drawn = data.read_mask(row["polygons"], size)
            assert (drawn & mask).sum() / (drawn | mask).sum() > 0.98


def test_targets():
    mask = np.zeros((20, 40), bool)
    mask[10:, :10] = True
    conversation = [{"from": "human", "value": "What is in <region>?"}, {"from": "gpt", "value": TEXT}]
    targets = {"box": [[10, 0, 40, 10]], "mask": [mask, ~mask], "region": [mask]}
    (_, box), (_, masks) = (places := decode.encode(conversation, targets, (40, 20), CONFIG)).triplets
    assert [unit for unit, _ in places.triplets] == ["box", "mask"] and box.tolist() == [[0.625, 0.25, 0.75, 0.5]]
    assert masks.shape == (2, 16, 16) and masks[0].sum() == 8 * 4 == (1 - masks[1]).sum() and masks[0, 8:, :4].all()
    quarter = torch.zeros(4, 4)
    quarter[2:, 0] = 1
    for region in (mask, [0, 10, 9, 20], [[4, 11], [4, 19]], [5, 15]):
        found = decode.region(region, (40, 20), 4).view(4, 4)
        assert found.argmax() in (8, 12) and (region is not mask or torch.equal(found, quarter))
        assert found[:2].sum() < 0.3 and found.sum() > 0


@pytest.mark.parametrize(("text", "targets", "said"), [
    (TEXT, {"box": [[0, 0, 5, 5], [1, 1, 5, 5]], "mask": MASKS[13:14] * 2}, "more box targets than <REF>s"),
    (TEXT, {"box": [[0, 0, 5, 5]], "mask": MASKS[13:14]}, "fewer mask targets than <REF>s"),
    (TEXT.replace("mask", "line"), {"box": [[0, 0, 5, 5]]}, "the unit 'line', which is not one of box, mask"),
    (TEXT, {"box": [[0, 0, 9, 5]]}, "the box [0, 0, 9, 5] is empty or not inside its image, 7 x 5"),
    (TEXT, {"box": [[3, 3, 3, 5]]}, "is empty or not inside"),
    (TEXT, {"mask": MASKS[:1]}, "but its image 7 x 5"),
    (TEXT, {"mask": [{"size": [5, 7], "counts": [30, 6]}]}, "a mask is 36 x 1, but its image 7 x 5"),
    (TEXT, {"box": [None]}, "NoneType"),
    ("a <REF>", {"box": []}, "a <REF> stands outside of"),
    ("Yes", {"region": [[0, 0, 3, 3]]}, "it has 1 regions; it needs one for each <region> in questions"),
    ("See <region>.", {"region": [[0, 0, 3, 3]]}, "one for each <region> in questions, none in answers"),
    ("What is <region>?", {"region": [[50, 50]]}, "a region is empty or outside"),
])  # fmt: skip
def test_wrong_targets_get_one_sentence(text: str, targets: dict, said: str, tmp_path: Path):
    """As rows of a file: each is named, and the others are used."""
    question, answer = (text, "Yes") if text.endswith("?") else ("Where?", text)
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    turns += [{"from": "human", "value": "And <region>?"}]  # a last question without an answer is dropped
    picture(size=(7, 5)).save(tmp_path / "a.png")
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "a.png", "conversations": turns, "targets": targets}]))
    point = functools.partial(decode.encode, config=CONFIG)
    source = data.Conversations([tmp_path / "rows.json"], tmp_path, lambda turns: ([1, 2], [-100, 2]),
                                lambda image: torch.zeros(1), point=point)  # fmt: skip
    bad = source[0, 0].bad
    assert said in bad and bad.startswith(f"{tmp_path / 'rows.json'}, row 1: ") and "\n" not in bad


# --- losses -----------------------------------------------------------------------------------------------------------

def test_losses_are_their_formulas():
    torch.manual_seed(0)
    a, b = torch.rand(2, 3, 4), torch.rand(2, 3, 4)
    boxes = decode.box_cost(a, b)
    logits, true = 3 * torch.randn(2, 3, 8, 8), (torch.rand(2, 3, 8, 8) < 0.3).float()
    masks = decode.mask_cost(logits, true)
    for g, i, j in itertools.product(range(2), range(3), range(3)):
        pair = a[g, i], b[g, j]
        low, high = zip(*((box[:2] - box[2:] / 2, box[:2] + box[2:] / 2) for box in pair))
        both = (torch.minimum(*high) - torch.maximum(*low)).clamp(min=0).prod()
        hull = (torch.maximum(*high) - torch.minimum(*low)).prod()
        union = pair[0][2:].prod() + pair[1][2:].prod() - both
        giou = both / union - (hull - union) / hull
        assert torch.isclose(boxes[g, i, j], 5 * (pair[0] - pair[1]).abs().sum() + 2 * (1 - giou), rtol=1e-4)
        x, t = logits[g, i], true[g, j]
        p, entropy = x.sigmoid(), F.binary_cross_entropy_with_logits(x, t, reduction="none")
        focal = torch.where(t > 0, 0.25 * (1 - p) ** 2, 0.75 * p**2) * entropy
        dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
        assert torch.isclose(masks[g, i, j], 20 * focal.mean() + dice, rtol=1e-4)


@pytest.mark.parametrize("n", range(1, 7))
def test_matching_is_the_least_sum(n: int):
    for seed in range(60 if n < 6 else 10):
        cost = torch.rand(n, n, generator=torch.Generator().manual_seed(seed))
        cost = cost if seed % 2 else (3 * cost).round()  # also with ties
        pairs = decode.match(cost)
        least = min(sum(cost[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(n)))
        assert sorted(pairs) == list(range(n)) and torch.isclose(cost[range(n), pairs].sum(), least)


def test_the_order_in_a_triplet_is_free_and_padding_is_not_seen():
    torch.manual_seed(0)
    pointer, features = decode.Pointer(CONFIG), torch.randn(2, 16, 32)
    states, boxes = [torch.randn(3, 48), torch.randn(1, 48), torch.randn(2, 48)], torch.rand(6, 4)
    masks = (torch.rand(1, 16, 16) < 0.4).float()
    units = ["box", "mask", "box"]
    loss = pointer.loss(states, features, [0, 1, 1], units, [boxes[:3], masks, boxes[3:5]])
    turned = pointer.loss(states, features, [0, 1, 1], units, [boxes[[2, 0, 1]], masks, boxes[3:5].flip(0)])
    alone = sum(pointer.loss([states[g]], features, [i], [unit], [places]) for g, i, unit, places in (
        (0, 0, "box", boxes[:3]), (1, 1, "mask", masks), (2, 1, "box", boxes[3:5])))  # fmt: skip
    assert torch.allclose(loss, turned, rtol=1e-5) and torch.allclose(loss, alone, rtol=1e-5) and (loss > 0).all()


def test_a_region_is_nine_means_and_its_shape():
    pointer, features = decode.Pointer(CONFIG), torch.randn(2, 16, 32)
    regions = torch.zeros(2, 4, 4)
    regions[0, 1:, 1:] = 1  # 3 x 3 patches: each part is one of them
    regions[1, 0, 0] = 0.5  # one patch: the middle part alone
    tokens = pointer.prompts(regions.flatten(1), features) - pointer.order
    nine = features[0].view(4, 4, 32)[1:, 1:].reshape(9, 32)
    assert torch.allclose(tokens[0, :9], pointer.region(nine), atol=1e-5)
    only = torch.zeros(9, 32).index_put((torch.tensor([4]),), features[1, :1])
    assert torch.allclose(tokens[1, :9], pointer.region(only), atol=1e-5)
    assert torch.allclose(tokens[:, 9], pointer.outline(regions.flatten(1)), atol=1e-5)


# --- models -----------------------------------------------------------------------------------------------------------

def force(model: vlm.VLM, text: str, monkeypatch) -> list[int]:
    """Let the model generate a text, whatever it is asked."""
    ids = model.tokenizer.encode(text)
    monkeypatch.setattr(model.language, "generate", lambda **how: [ids] * len(how["embeds"]))
    return ids


def test_pointing_sees_the_states_of_training_and_of_generation(monkeypatch):
    model, images = a_vlm(), [picture(0), picture(1, (48, 40))]
    ids, states, prompts = force(model, TEXT, monkeypatch), [], ["Where is it?", "What is in <region>, red bar?"]
    real = model.pointer.find
    monkeypatch.setattr(model.pointer, "find", lambda t, x, *more: states.append(x) or real(t, x, *more))
    regions = [[], [[3, 4, 30, 31]]]
    found = model.ground(images, prompts, regions=regions)
    # in generation: token by token, from the cache
    embeds, mask = model.read(images, prompts, regions)
    cache = llama.Cache(model.language.config, 2, 256, torch.float32, embeds.device)
    steps = [model.language.hidden(embeds, mask, cache)]
    steps += [model.language.hidden(model.language.embed(torch.tensor([[i], [i]])), None, cache) for i in ids]
    refs = [n for n, i in enumerate(ids) if i == model.tokenizer.added["<REF>"]]
    generated = torch.cat(steps[1:], 1)[:, refs]
    assert torch.allclose(states[0], generated[0], atol=1e-4) and torch.allclose(states[2], generated[1], atol=1e-4)
    # in training
    turns = [{"from": "human", "value": prompts[1]}, {"from": "gpt", "value": TEXT}]
    targets = {"box": [[1, 2, 30, 20]], "mask": [np.eye(40, 48) > 0] * 2, "region": regions[1]}
    places, seen = decode.encode(turns, targets, (48, 40), model.config.pointer), []
    monkeypatch.setattr(model.pointer, "loss", lambda states, *more: seen.extend(states) or torch.zeros(2))
    batch = [torch.tensor([each]) for each in vlm.encode(model.tokenizer, model.config.template, turns)]
    model(*batch, vlm.prepare(images[1], model.config.vision)[None], places=[places])
    assert torch.allclose(torch.cat(seen), generated[1], atol=1e-4)
    # places in pixels; each answer is the one that the prompt gets alone
    for (text, triplets), image, *prompt in zip(found, images, prompts, regions):
        assert text == TEXT and [len(t.places) for t in triplets] == [1, 2]
        assert triplets[1].places.shape == (2, *image.size[::-1]) and triplets[1].places.dtype == torch.bool
        assert (triplets[0].places <= torch.tensor([*image.size] * 2)).all() and (triplets[0].places >= 0).all()
        (_, alone), = model.ground([image], prompt[:1], regions=prompt[1:])
        assert torch.allclose(alone[0].places, triplets[0].places, atol=1e-3)


def test_samples_do_not_change_each_other():
    """A batch's loss is the sum of its samples': one points, one has a region alone, one the tokens as mere text."""
    model, turns, batch, alone = a_vlm(), [], [], 0
    for question, answer, targets in (
        ("Where?", TEXT, {"box": [[1, 2, 30, 20]], "mask": [np.eye(32) > 0] * 2}),
        ("What is in <region>?", "bar", {"region": [[3, 4, 30, 31]]}),
        ("What is <region>, <REF>?", "A <REF>", None),
    ):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        places = decode.encode(turns, targets, (32, 32), model.config.pointer) if targets else None
        ids, labels = vlm.encode(model.tokenizer, model.config.template, turns)
        batch.append(data.Example(ids, labels, vlm.prepare(picture(len(batch)), model.config.vision), None, places))
        alone = alone + model(**data.collate_conversations(batch[-1:])[0])
    together = model(**data.collate_conversations(batch[::-1])[0])
    assert torch.allclose(together, alone, rtol=1e-4) and (alone > 0).all()


def test_an_answer_that_fills_the_context_keeps_its_places(monkeypatch):
    model = a_vlm()
    ids, prompt = force(model, TEXT, monkeypatch), model.read([picture()], ["Where?"])[0].shape[1]
    ids += ids[-1:] * (model.config.language.max_position_embeddings - prompt - len(ids))
    (text, triplets), = model.ground([picture()], ["Where?"])
    assert text.startswith(TEXT) and len(triplets) == 2 and triplets[1].places is not None


def test_models_that_point_are_saved_and_others_say_that_they_cannot(tmp_path: Path, monkeypatch):
    model = a_vlm()
    vlm.save(model, tmp_path / "model")
    again = vlm.load(tmp_path / "model")
    assert again.config == replace(model.config, pointer=replace(model.config.pointer, units=["box", "mask"]))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    texts = [force(each, TEXT, monkeypatch) and each.ground([picture()], ["Where?"])[0][1] for each in (model, again)]
    assert torch.equal(texts[0][0].places, texts[1][0].places)
    assert tuple(json.loads((tmp_path / "model/config.json").read_text())["added"]) == decode.ADDED
    force(again, "<Phrase>a</Phrase>(<Unit>line</Unit>[0]<REF>)", monkeypatch)
    assert again.ground([picture()], ["Where?"])[0][1][0].places is None  # of a unit that it has no decoder for
    assert "train one with train_vlm.py --units" in refusal(a_vlm(()).ground, [picture()], ["Where?"])
    picture().save(tmp_path / "a.png")
    argv = (tmp_path / "model", tmp_path / "a.png", "Where is it?", "--picture", tmp_path / "out.png")
    vlm.main([*map(str, argv), "--max-new-tokens", "4"])
    assert Image.open(tmp_path / "out.png").size == (320, 320)


# --- training, evaluation, conversion ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def base(parts: Path, scenes: Path, tmp_path_factory) -> list[str]:
    """Six updates of 8: conversations that point, with images, and others without images."""
    rows, texts = (json.loads((scenes / f"{name}.json").read_text()) for name in ("pointing", "conversations"))
    texts = [{"conversations": row["conversations"][:2]} for row in texts[:8]]
    (file := tmp_path_factory.mktemp("pointing") / "rows.json").write_text(json.dumps(rows[:16] + texts))
    argv = f"--recipe own --variant baseline-mlp --weights {parts / 'teacher.safetensors'} --images {scenes}"
    argv += f" --language {parts / 'llama'} --data {file} --batch 8 --epochs 2 --lr 1e-3 --workers 0"
    return f"{argv} --precision fp32 --units box,mask --pointer-width 32 --pointer-depth 1".split()


def test_processes_micro_batches_and_resuming_change_nothing(base: list[str], tmp_path: Path):
    jobs = {name: launch("train_vlm.py", *base, "--out", tmp_path / name, *how, ranks=2)
            for name, how in (("ddp", ["--micro-batch", 1]), ("fsdp", ["--fsdp", "--micro-batch", 2]),
                              ("bf16", ["--fsdp", "--precision", "bf16"]))}  # fmt: skip
    train(*base, "--out", tmp_path / "plan", "--plan")
    train(*base, "--out", tmp_path / "one")
    boxes = losses(tmp_path / "one", "box")
    assert len(boxes) == 6 and min(boxes) == 0 < max(boxes)  # an update without images
    assert losses(tmp_path / "plan")[0] != losses(tmp_path / "one")[0]
    train(*base, "--out", tmp_path / "half", "--cache-features", "--save-every", 3)
    for path in (tmp_path / "half/checkpoints").glob("*6.pt"):
        path.unlink()
    train("--out", tmp_path / "half", "--resume")
    for name, process in jobs.items():
        said = process.communicate()[1]
        assert process.returncode == 0, said
    for name in ("ddp", "fsdp", "half"):
        for key in ("loss", "box", "mask"):
            assert losses(tmp_path / name, key) == pytest.approx(losses(tmp_path / "one", key), rel=1e-5), name
    assert losses(tmp_path / "half")[3:] == losses(tmp_path / "one")[3:]
    assert losses(tmp_path / "bf16", "mask") == pytest.approx(losses(tmp_path / "one", "mask"), rel=0.02)


def test_scores_of_pointing():
    truth = {"box": [[0, 0, 10, 10]]}
    for places, half, more in (([[0, 0, 10, 8]], 1, 1), ([[0, 0, 10, 6]], 1, 0), ([[0, 0, 4, 4]], 0, 0), ([], 0, 0)):
        answer = {"text": "", "places": places}
        assert (evaluation.pointed(0.5, answer, truth), evaluation.pointed(0.75, answer, truth)) == (half, more)
    assert evaluation.pointed(0.5, {"places": 2 * [[0, 0, 10, 10]]}, truth) == 0  # one thing was asked for
    two = {"box": [[0, 0, 10, 10], [20, 20, 30, 30]]}
    box = [0, 0, 10, 10]
    for places, f1 in (([[20, 20, 30, 29], [0, 0, 9, 10]], 1), ([box], 2 / 3), ([box] * 3, 0.4), ([], 0)):
        assert evaluation.pointed_all({"places": places}, two) == pytest.approx(f1)
    small, large = (data.run_lengths(np.arange(24).reshape(4, 6) < n) for n in (12, 18))
    assert evaluation.pointed(0.0, {"places": [small]}, {"mask": [large]}) == pytest.approx(2 / 3)
    assert evaluation.pointed(0.0, {"places": [small]}, truth) == 0  # a mask, where a box was asked for
    assert evaluation.pointed_all({"places": [[0, 0, 4, 4]]}, {"mask": [large]}) == 0
    items = [evaluation.Item("", Path(), "", {"mask": [mask]}) for mask in (large, small)]
    assert evaluation.cumulative_iou(items, [{"places": [small]}, {"places": []}]) == pytest.approx(12 / 30)


def test_scenes_are_asked_to_point(base: list[str], scenes: Path, tmp_path: Path):
    assert "the text is cut off" in refusal(train, *base, "--out", tmp_path / "cut", "--max-text", 60)
    train(*base, "--out", tmp_path / "run", "--updates", 2)
    names = ",".join(name for name in evaluation.POINTING if name.startswith("scenes-"))
    evaluation.main([str(tmp_path / "run"), "--data", str(scenes), "--benchmarks", names, "--out", str(tmp_path / "e"),
                     "--show", "2"])  # fmt: skip
    found = evaluation.results(tmp_path / "e")
    assert set(found) == set(names.split(",")) and sum(len(one["answers"]) for one in found.values()) == 12 * 4
    truths = [item.truth for item in evaluation.questions("scenes-all-mask", scenes)]
    whole = [evaluation.pointed_all({"places": truth["mask"]}, truth) for truth in truths]
    assert whole == [1.0] * len(truths) and evaluation.questions("scenes-region", scenes)[0].regions


def test_refcoco_and_coco_become_rows(tmp_path: Path):
    square = [[2.0, 2.0, 12.0, 2.0, 12.0, 7.0, 2.0, 7.0]]
    thing = {"id": 5, "image_id": 9, "category_id": 3, "bbox": [2, 2, 10, 5], "segmentation": square, "iscrowd": 0}
    instances = {"images": [{"id": 9, "width": 20, "height": 10, "file_name": "9.jpg"}], "annotations": [thing],
                 "categories": [{"id": 3, "name": "cat"}]}  # fmt: skip
    (tmp_path / "refcoco").mkdir(), (tmp_path / "coco/train2014").mkdir(parents=True)
    (tmp_path / "refcoco/instances.json").write_text(json.dumps(instances))
    for split in ("train", "val"):
        ref = {"ann_id": 5, "image_id": 9, "split": split}
        ref |= {"sentences": [{"sent_id": 1, "sent": "the cat"}, {"sent_id": 2, "sent": "left"}]}
        (tmp_path / f"refcoco/refs({'unc' if split == 'val' else split}).p").write_bytes(pickle.dumps([ref]))
    for name in ("COCO_train2014_000000000009.jpg", "9.jpg"):
        picture(size=(20, 10)).save(tmp_path / "coco/train2014" / name)
    point = functools.partial(decode.encode, config=CONFIG)
    for source, units in (("refs(train).p", ["box", "mask"]), ("instances.json", ["box"])):
        convert.main(["conversations", str(tmp_path / "refcoco" / source), str(tmp_path / f"{len(units)}.json")])
        how = dict(encode=lambda turns: ([1, 2], [-100, 2]), prepare=lambda image: torch.zeros(1), point=point)
        rows = data.Conversations([tmp_path / f"{len(units)}.json"], tmp_path / "coco/train2014", **how)
        example = rows[0, 0]
        assert example.bad is None and [unit for unit, _ in example.places.triplets] == units
        assert torch.allclose(example.places.triplets[0][1], torch.tensor([[0.35, 0.45, 0.5, 0.5]]))
    boxes, masks = (evaluation.questions(f"refcoco-{unit}", tmp_path) for unit in ("box", "mask"))
    assert [item.prompt for item in boxes] == [f"Where is {who}? Point with a box." for who in ("the cat", "left")]
    assert boxes[0].truth == {"box": [[2, 2, 12, 7]]} and sum(masks[0].truth["mask"][0]["counts"][1::2]) == 50
