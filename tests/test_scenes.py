"""demo/scenes.py: the pictures, their truth, and each kind of question; the demo's language model and its teacher."""

import hashlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, refusal
from PIL import Image

import decode
import llama
import vit
from demo import make_language, make_teacher, scenes as world

SCENES = [world.make(0, i) for i in range(300)]
SHORT, RESPOND = "\nAnswer the question using a single word or phrase.", '\nSay where both are, then "True" or "False".'
KINDS = {  # the question, what answers start with, how many of them do
    "presence": (f"Is there (?:a|an(?= [aeiou])) (.+) in the image\\?{SHORT}", "Yes", 0.5),
    "count": (f"How many (.+?)(?:(?<=cross)e)?s are there\\?{SHORT}", "1", 0.45),
    "color": (f"What color is the (\\w+)\\?{SHORT}", "red", 0.12),
    "relation": (f'Based on .*\\? The (\\w+ \\w+) is (.+) the (\\w+ \\w+)\\.{RESPOND}', "3", 0.2),
    "where": ("Where is the (.+)\\?", "center", 0.2),
    "at": ("What is at ([0-7]), ([0-7])\\?", "nothing", 0.3),
    "refer": ('Please provide .* describes: "the (.+)"', "[0.", 1),
    "caption": ("Describe the image\\.", "From left", 1),
}


POINTING = ("refer-box", "refer-mask", "all-box", "all-mask", "region")


def test_files_are_the_same_on_any_number_of_workers_and_agree_with_each_other(scenes, tmp_path):
    world.main([str(tmp_path / "a"), *"--count 48 --val 24 --test 12 --size 32 --workers 2".split()])
    files, again = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*.*")} for f in (scenes, tmp_path / "a"))
    assert files == again and len(files) == 2 * 48 + 2 * 24 + 12 + 6
    lines = (scenes / "labels.txt").read_text().splitlines()
    names = [line.split(": ")[1] for line in lines if not line.startswith("#")]
    boxes = json.loads((scenes / "boxes.json").read_text())
    for entry in boxes["train"] + boxes["val"]:
        labels = np.array(Image.open(scenes / entry["image"].replace("images", "labels")))
        for thing in entry["objects"]:
            y, x = np.nonzero((labels == [names.index(thing["shape"]), names.index(thing["color"]), 0]).all(-1))
            assert thing["box"] == [x.min() / 32, y.min() / 32, (x.max() + 1) / 32, (y.max() + 1) / 32]
            labels[y, x] = 0
        assert not labels.any()
    assert hashlib.sha256(SCENES[0].image.tobytes()).hexdigest()[:16] == "f901c3295cb7a03c"  # as the teacher saw it


def test_conversations_are_rows_of_llava(scenes):
    rows, single = (json.loads((scenes / f"{name}.json").read_text()) for name in ("conversations", "questions"))
    for row in rows:
        asked = [turn["value"] for turn in row["conversations"][::2]]
        assert [t["from"] for t in row["conversations"]] == ["human", "gpt"] * len(asked)
        assert len(set(asked)) == len(asked) > 5 and asked[0][:8] == "<image>\n" and (scenes / row["image"]).is_file()
        assert "".join(asked).count("<image>") == "".join(asked).count(SHORT) == 1 >= "".join(asked).count(RESPOND)
    assert len(rows) == 48 and len({row["conversations"][2]["value"].split()[0] for row in rows}) == 7  # in any order
    assert {row["kind"] for row in single} == {*KINDS, *POINTING}
    assert len({row["id"] for row in single}) == len(single) > 80


def right(scene: world.Scene, kind: str, answer: str, *found: str) -> bool:
    """Whether an answer is true, for what was found in the question (here also in a caption)."""
    if kind == "caption":
        found = re.split(", an? | and an? ", re.fullmatch("From left to right: an? (.*)\\.", answer)[1])
    names = [set(name.split()) for name in (*found, answer)]  # "red ring", "ring" or "red object"
    first, *rest = [[o for o in scene.objects if name <= {o.color, o.shape, "object"}] for name in names]
    simple = {"presence": "Yes" if first else "No", "count": str(len(first)), "color": "".join(o.color for o in first)}
    if kind in simple:
        return answer == simple[kind]
    if kind == "relation":
        axis, sign = {"to the left of": (0, 1), "to the right of": (0, -1), "above": (1, 1), "below": (1, -1)}[found[1]]
        distance = sign * (rest[1][0].center[axis] - first[0].center[axis])
        columns = [int(8 * thing.center[axis]) for (thing,) in (first, rest[1])]  # or rows
        return abs(distance) >= 0.2 and answer == "{} and {}: ".format(*columns) + str(distance > 0)
    if kind == "where":
        place = ("right" in answer) - ("left" in answer), ("bottom" in answer) - ("top" in answer)
        return np.abs(3 * np.subtract(first[0].center, 0.5) - place).max() <= 0.4
    if kind == "at":
        patch = scene.seen.reshape(8, 8, 8, 8)[int(found[1]), :, int(found[0])]
        number = 1 + scene.objects.index(rest[1][0]) if answer != "nothing" else 0
        return (patch == number).mean() >= (0.5 if number else 1)
    if kind == "refer":
        return np.allclose(json.loads(answer), [thing.box for thing in first], atol=0.006)
    x = [thing.center[0] for (thing,) in (first, *rest[:-1])]
    return x == sorted(x) and len(set(found)) == len(scene.objects)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_true(kind):
    (question, start, share), rng = KINDS[kind], np.random.default_rng(0)
    asked = [(scene, q, a) for scene in SCENES for k, q, a in world.questions(scene, rng) if k == kind]
    assert all(right(scene, kind, a, *re.fullmatch(question, q).groups()) for scene, q, a in asked) and len(asked) > 270
    assert abs(np.mean([answer.startswith(start) for *_, answer in asked]) - share) < 0.1


def test_a_folder_appears_whole_or_not_at_all_and_only_where_nothing_is(scenes, tmp_path, monkeypatch):
    for options, said in (({"count": 0}, "--count 0"), ({"size": 60}, "multiple of 8"), ({}, "something else")):
        assert said in refusal(world.write, scenes, **options)
    monkeypatch.setattr(world, "conversation", lambda asked: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        world.write(tmp_path / "scenes", 2, 0, 0, workers=0)
    assert not list(tmp_path.iterdir())
    assert world.ensure(scenes) == world.write(scenes, 48, 24, 12, size=32) == scenes  # complete: not written again


def test_the_language_model_and_the_teacher_are_made_so(scenes, tmp_path):
    model = llama.load(ROOT / "demo/language")
    tokenizer = llama.Tokenizer(ROOT / "demo/language", model.config.vocab_size, decode.ADDED)
    rows = [row for name in ("conversations", "pointing") for row in json.loads((scenes / f"{name}.json").read_text())]
    turns = [turn for row in rows for turn in row["conversations"]]
    texts = [turn["value"].removeprefix("<image>\n") for turn in turns]
    prompts = [f"In: {text}\nOut:" if turn["from"] == "human" else text for turn, text in zip(turns, texts)]
    for text, ids in zip(prompts, map(tokenizer.encode, prompts)):  # words and phrases, no bytes
        assert tokenizer.decode(ids) == text, text
        assert not any(tokenizer.pieces.is_byte(i) for i in ids if i < tokenizer.vocab_size), text
    assert sum(map(len, map(tokenizer.encode, prompts))) < sum(len(text.split()) for text in prompts)
    how = "--count 64 --unseen 2 --updates 4 --batch 16".split()
    make_language.main([str(tmp_path / "words"), *how])
    make_language.main([str(tmp_path / "language"), "--start", str(tmp_path / "words"), *how])
    words = llama.Tokenizer(tmp_path / "language").vocab_size
    assert llama.load(tmp_path / "language").config == replace(model.config, vocab_size=words + len(decode.ADDED))
    assert model.config.vocab_size == tokenizer.vocab_size + len(decode.ADDED)
    make_teacher.main([str(tmp_path / "t.safetensors"), *"--count 16 --unseen 8 --epochs 1 --batch 8".split()])
    assert vit.load(tmp_path / "t.safetensors").config == vit.load(ROOT / "demo/teacher.safetensors").config
