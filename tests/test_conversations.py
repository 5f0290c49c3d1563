"""Conversations: files in LLaVA's format, their index, bad rows, batches by modality and length, scenes."""

import functools
import json
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data


def encode(turns: list[dict], shift: int = 0, log: str = "") -> tuple[list[int], list[int]]:
    """An id for each character; answers are labels. A path `log` gets a byte for each call."""
    if log:
        with open(log, "a") as file:
            file.write(".")
    ids, labels = [1], [-100]
    for turn in turns:
        part = [ord(character) + shift for character in turn["value"]]
        ids += part
        labels += part if turn["from"] == "gpt" else [-100] * len(part)
    return ids[:300], labels[:300]


def prepare(image: Image.Image) -> torch.Tensor:
    return data.to_tensor(image.convert("RGB").resize((8, 8)))


def row(question: str, answer: str, image: str | None = None, **more: object) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": question, "conversations": turns} | ({"image": image} if image else {}) | more


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two image folders with one picture each."""
    for name, color in (("one", "red"), ("two", "blue")):
        (tmp_path / name / "sub").mkdir(parents=True)
        Image.new("RGB", (20, 10), color).save(tmp_path / name / "sub" / "a.png")
    return tmp_path


def write(path: Path, rows: object, **how: object) -> Path:
    path.write_text(json.dumps(rows, **how), encoding="utf-8")
    return path


def open_files(files: list[Path] | Path, root: object, encode=encode, **how) -> data.Conversations:
    return data.Conversations(files if isinstance(files, list) else [files], root, encode, prepare, **how)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def test_rows_are_found_however_they_are_written(folder: Path):
    """Lists and lines, compact and indented, with characters of one to four bytes, in any mixture of files."""
    rows = [row(f"question {i} é 漢 😀 \\ \" {{[", f"answer\n{i}", "sub/a.png" if i % 3 else None) for i in range(700)]
    files = [
        write(folder / "a.json", rows),
        write(folder / "b.json", rows, indent=2, ensure_ascii=False),
        folder / "c.jsonl",
    ]
    lines = [json.dumps(r, ensure_ascii=False) for r in rows]
    files[2].write_text("\n" + "\r\n".join(lines) + "\n\n", encoding="utf-8")
    source = open_files(files, [folder / "one", folder / "two", folder / "one"], workers=2)
    assert len(source) == 2100 and source.name(705) == f"{files[1]}, row 6"
    for i in (0, 1, 699, 700, 1399, 1400, 2099):
        assert source.row(i) == rows[i % 700]
        ids, labels = encode(rows[i % 700]["conversations"])
        assert source.lengths[i] == len(ids) and source.has_image[i] == ("image" in rows[i % 700])
        example = source[0, i]
        assert (example.ids, example.labels, example.bad) == (ids, labels, None)
    assert source[0, 1].image[0].min() == 255 and source[0, 701].image[2].min() == 255  # red, and of the other root blue
    assert source[0, 0].image is None


def test_a_question_without_an_answer_is_dropped(folder: Path):
    rows = [row("Q", "A")]
    rows[0]["conversations"].append({"from": "human", "value": "and then"})
    source = open_files(write(folder / "a.json", rows), folder)
    assert source[0, 0].ids == encode(row("Q", "A")["conversations"])[0] and source.lengths[0] == 3


def test_files_are_indexed_once(folder: Path, monkeypatch):
    """The index is kept; another file, another tokenizer or a damaged index makes a new one."""
    path, log = write(folder / "a.json", [row("Q" * (1 + i), "A") for i in range(30)]), folder / "calls"
    counted = functools.partial(encode, log=str(log))

    def calls(**how: object) -> int:
        before = log.stat().st_size if log.exists() else 0
        source = open_files(path, folder, functools.partial(counted, **how))
        assert source.lengths.tolist() == [3 + i for i in range(len(source))]
        return (log.stat().st_size if log.exists() else 0) - before

    assert (calls(), calls()) == (30, 0)
    assert (calls(shift=1), calls(shift=1), calls()) == (30, 0, 0)
    write(path, [row("Q" * (1 + i), "A") for i in range(31)])
    assert (calls(), calls()) == (31, 0)
    for index in folder.glob(".a.json.*.npz"):
        index.write_bytes(index.read_bytes()[:-50])
    assert (calls(), calls()) == (31, 0)
    real = os.replace  # a folder that cannot be written: the user's cache takes the index
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    write(path, [row("Q" * (1 + i), "A") for i in range(32)])

    def replace(source: str, target: str) -> None:
        if "cache" not in target:
            raise PermissionError
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    assert (calls(), calls()) == (32, 0)
    assert len(list((folder / "cache").rglob("*.npz"))) == 1 and not list(folder.glob("*.tmp"))


# ----------------------------------------------------------------------------------------------------------------------
# What goes wrong


@pytest.mark.parametrize(
    "text, line, what",
    [
        ('[{"a": 1},\n {"b": }]', 2, "Expecting value"),
        ('[{"a": 1}\n {"b": 2}]', 2, "delimiter"),
        ('[{"a": 1},\n\n {"b": "cut', 3, "Unterminated string"),
        ('[\n{"a": 1},\n', 3, "does not end"),
        ('[{"a": 1}]\nmore', 2, "Extra data"),
        ('{"a": 1}\n{"b": 2\n', 3, "delimiter"),
        ('{"a": 1}\nnot JSON\n', 2, "Expecting value"),
    ],
)
def test_broken_json_names_its_line(text: str, line: int, what: str, folder: Path):
    (folder / "a.json").write_text(text)
    with pytest.raises(data.DataError, match=rf"a\.json, line {line}: is no JSON \(.*{what}"):
        open_files(folder / "a.json", folder)


@pytest.mark.parametrize("text", ["", "\n", "[]", " [ ] "])
def test_empty_files(text: str, folder: Path):
    (folder / "a.json").write_text(text)
    with pytest.raises(data.DataError, match="a.json: holds no conversations"):
        open_files(folder / "a.json", folder)


def test_missing_files_and_folders(folder: Path):
    path = write(folder / "a.json", [row("Q", "A")])
    with pytest.raises(data.DataError, match="none.json: cannot be read"):
        open_files(folder / "none.json", folder)
    with pytest.raises(data.DataError, match="nowhere is not a folder"):
        open_files(path, folder / "nowhere")
    with pytest.raises(data.DataError, match="2 image folders for 3 files"):
        open_files([path] * 3, [folder, folder])


BAD = [
    ({"id": 1}, "has no conversation"),
    ({"conversations": []}, "has no conversation"),
    ("text", "has no conversation"),
    (row("Q", "A") | {"conversations": [{"from": "human", "value": "Q"}]}, "has no conversation"),
    (row("Q", "A") | {"conversations": row("Q", "A")["conversations"][::-1]}, 'message 1 is not {"from": "human"'),
    (row("Q", "A") | {"conversations": [{"from": "human", "value": "Q"}, {"from": "human", "value": "Q"}]}, "message 2"),
    (row("Q", "A") | {"conversations": [{"from": "human", "value": 5}, {"from": "gpt", "value": "A"}]}, "message 1"),
    (row("Q", "A", image=["a.png"]), "its image is no path"),
    (row("Q" * 400, "A"), "cut off before its first answer"),
    (row("Q \ud83d", "A"), "message 1 is no valid Unicode"),  # half of an emoji
]


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_that_cannot_be_used_are_left_out(workers: int, folder: Path):
    """They are told apart and named, and no batch has them."""
    rows = [row("Q", "A") for _ in range(1000)]
    for i, (bad, _) in enumerate(BAD):
        rows[100 * i + 7] = bad
    source = open_files(write(folder / "a.json", rows), folder, workers=workers)
    assert source.left_out.tolist() == [100 * i + 7 for i in range(len(BAD))]
    for i, (_, reason) in enumerate(BAD):
        assert reason in source.describe(100 * i + 7) and f"row {100 * i + 8}:" in source.describe(100 * i + 7)
    order = data.ConversationBatches(source, 4, 1, 0).order(0).tolist()
    assert len(order) == 1000 - len(BAD) - (1000 - len(BAD)) % 4 and not set(order) & set(source.left_out.tolist())


def test_too_many_unusable_rows_end_the_run(folder: Path):
    rows = [row("Q", "A")] * 100 + [BAD[0][0]] * 7  # more than 1% and 5 to spare
    with pytest.raises(data.DataError, match=r"7 of 107 conversations cannot be used, such as .*row 101: it has no conv"):
        open_files(write(folder / "a.json", rows), folder)
    assert len(open_files(write(folder / "a.json", rows[:-1]), folder).left_out) == 6
    with pytest.raises(data.DataError, match="1 of 1 conversations cannot be used"):
        open_files(write(folder / "b.json", {"questions": []}), folder)


def test_missing_and_damaged_images(folder: Path):
    """The example stays in its batch without a label, and is named."""
    (folder / "one" / "broken.png").write_bytes((folder / "one" / "sub" / "a.png").read_bytes()[:40])
    (folder / "one" / "text.jpg").write_text("text")
    rows = [row("Q", "A", name) for name in ("sub/a.png", "none.png", "broken.png", "text.jpg")]
    source = open_files(write(folder / "a.json", rows), folder / "one")
    examples = [source[0, i] for i in range(4)]
    assert [example.bad is None for example in examples] == [True, False, False, False]
    assert "a.json, row 2: none.png is missing" in examples[1].bad and "broken.png is damaged" in examples[2].bad
    batch, bad = data.collate_conversations(examples)
    assert (batch["labels"] != -100).any(1).tolist() == [True, False, False, False] and len(bad) == 3
    assert batch["images"].shape == (4, 3, 8, 8) and batch["rows"] is None
    lines = []
    rows = data.BadRows(lines.append)
    rows.add(bad, 4)
    assert lines[0].startswith("left out: ") and len(lines) == 3
    with pytest.raises(data.DataError, match=r"6 conversations could not be read \(such as .* in 8 samples"):
        rows.add(bad, 4)


def test_a_fault_in_prepare_is_not_blamed_on_the_image(folder: Path):
    source = open_files(write(folder / "a.json", [row("Q", "A", "sub/a.png")]), folder / "one")
    source.prepare = lambda image: 1 / 0
    with pytest.raises(ZeroDivisionError):
        source[0, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Batches


@pytest.fixture
def mixed(folder: Path) -> data.Conversations:
    """450 rows with an image, 150 without, of lengths 3 to 202."""
    chance = random.Random(0)
    rows = [row("Q" * chance.randint(1, 200), "A", "sub/a.png" if i % 4 else None) for i in range(600)]
    return open_files(write(folder / "a.json", rows), folder / "one")


def test_batches_have_one_modality_and_similar_lengths(mixed: data.Conversations):
    batches = data.ConversationBatches(mixed, 16, 2, 0)
    assert batches.updates_per_epoch == 450 // 16 + 150 // 16
    order = batches.order(0).view(-1, 16).numpy()
    assert len(order) == batches.updates_per_epoch
    assert len(set(order.ravel())) == order.size  # each row once
    with_image = mixed.has_image[order]
    assert (with_image.all(1) | ~with_image.any(1)).all() and 0 < with_image.all(1).sum() < len(order)
    spread = np.ptp(mixed.lengths[order], axis=1)
    assert spread.max() < 40 and spread.mean() < 12  # of 200
    kinds = with_image[:, 0].astype(int)
    assert (np.diff(kinds) != 0).sum() > 5  # shuffled, not one kind after the other
    assert abs(np.corrcoef(np.arange(len(order)), mixed.lengths[order].mean(1))[0, 1]) < 0.5
    assert not torch.equal(batches.order(0), batches.order(1)) and torch.equal(batches.order(1), batches.order(1))
    assert not torch.equal(batches.order(0), data.ConversationBatches(mixed, 16, 2, 1).order(0))


def test_stages_come_one_after_the_other(mixed: data.Conversations):
    """Each in batches of its own; one stage alone changes nothing."""
    whole = data.ConversationBatches(mixed, 16, 2, 0).order(0)
    mixed.stage[:] = 7
    assert torch.equal(data.ConversationBatches(mixed, 16, 2, 0).order(0), whole)
    mixed.stage = np.where(np.arange(600) % 5 == 0, 1, 4)
    order = data.ConversationBatches(mixed, 16, 2, 0).order(0).view(-1, 16).numpy()
    stages, with_image = mixed.stage[order], mixed.has_image[order]
    counts = [(mixed.has_image[mixed.stage == stage].sum(), (~mixed.has_image[mixed.stage == stage]).sum()) for stage in (1, 4)]
    early, late = [sum(int(count) // 16 for count in pair) for pair in counts]
    assert stages[:, 0].tolist() == [1] * early + [4] * late and (stages == stages[:, :1]).all()
    assert (with_image.all(1) | ~with_image.any(1)).all() and len(set(order.ravel())) == order.size
    mixed.stage = np.where(np.arange(600) < 3, 0, 1)  # too few for a batch
    assert data.ConversationBatches(mixed, 16, 2, 0).order(0).min() >= 3


def test_batches_do_not_depend_on_ranks_and_micro_batches(mixed: data.Conversations):
    """Each update has the same rows on any machine; ranks have micro-batches of similar lengths at the same time."""

    def updates(world: int, micro: int, start: int = 0) -> list[list[list]]:
        """For each update, each rank's micro-batches."""
        of_rank = [list(data.ConversationBatches(mixed, 16, 2, 0, rank, world, micro, start)) for rank in range(world)]
        steps = 16 // world // micro
        return [[list(b[i : i + steps]) for b in of_rank] for i in range(0, len(of_rank[0]), steps)]

    expected = [sorted(key for rank in u for batch in rank for key in batch) for u in updates(1, 16)]
    assert len(expected) == 74 and expected[0][0][0] == 0 and expected[-1][0][0] == 1
    for world, micro in ((1, 4), (2, 8), (2, 2), (4, 2), (8, 1)):
        got = updates(world, micro)
        assert [sorted(key for rank in u for batch in rank for key in batch) for u in got] == expected
        if micro < 16 // world:
            first, last = got[0][0][0], got[0][-1][-1]
            longest = max(mixed.lengths[i] for _, i in first), max(mixed.lengths[i] for _, i in last)
            of_step = [[max(mixed.lengths[i] for _, i in rank[s]) for rank in got[0]] for s in range(len(got[0][0]))]
            assert longest[0] <= longest[1]
            assert all(max(a) <= min(b) or np.ptp(a) == 0 for a, b in zip(of_step, of_step[1:]))
    assert updates(2, 4)[29:] == updates(2, 4, start=29)


def test_too_few_conversations(mixed: data.Conversations):
    with pytest.raises(data.DataError, match="450 conversations about images and 150 without: neither fills"):
        data.ConversationBatches(mixed, 451, 1, 0)
    with pytest.raises(data.DataError, match="cannot be split over 3 ranks"):
        data.ConversationBatches(mixed, 16, 1, 0, 0, 3)
    assert data.ConversationBatches(mixed, 400, 1, 0).updates == 1  # those without images fill none and are left out


def test_collation(mixed: data.Conversations):
    with_image, without = np.flatnonzero(mixed.has_image)[:2], np.flatnonzero(~mixed.has_image)[:2]
    chosen = [with_image[0], without[0], with_image[1], without[1]]
    batch, bad = data.collate_conversations([mixed[0, int(i)] for i in chosen])
    assert batch["rows"].tolist() == [0, 2] and batch["images"].shape == (2, 3, 8, 8) and bad == []
    for i, index in enumerate(chosen):
        ids, labels = encode(mixed.row(index)["conversations"])
        assert batch["ids"][i].tolist() == ids + [0] * (batch["ids"].shape[1] - len(ids))
        assert batch["labels"][i].tolist() == labels + [-100] * (batch["ids"].shape[1] - len(ids))
    batch, _ = data.collate_conversations([mixed[0, int(i)] for i in without])
    assert batch["images"] is None and batch["rows"] is None


# ----------------------------------------------------------------------------------------------------------------------
# Scenes


def test_scenes_as_conversations():
    """Three conversations about a scene ask its questions, drawn several times, each once, in another order each epoch."""
    scenes = data.Scenes(12, seed=3)
    source = data.SceneConversations(scenes, encode, prepare)
    assert len(source) == 36 and source.has_image.all() and len(source.left_out) == 0
    for index in (15, 16, 17):
        kinds, draws = source.PARTS[index % 3]
        drawn = [row for draw in range(draws) for row in replace(scenes[5], key=(3, 5, draw)).conversations]
        answers = {}  # by the question as it is asked after the first
        for row in drawn:
            question, answer = (turn["value"] for turn in row["conversations"])
            answers[question.removeprefix("<image>\n").removesuffix(data.SHORT)] = row["kind"], answer
        pairs = []
        for epoch in (0, 0, 1, 2):
            turns = source.row(index, epoch)["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert turns[0]["value"].startswith("<image>\n") and turns[0]["value"].endswith(data.SHORT) == (index == 15)
            turns[0]["value"] = turns[0]["value"].removeprefix("<image>\n").removesuffix(data.SHORT)
            pairs.append([(q["value"], a["value"]) for q, a in zip(turns[::2], turns[1::2])])
            assert all(answers[q][1] == a and answers[q][0] in kinds for q, a in pairs[-1])
        assert pairs[0] == pairs[1] and any(pairs[0] != other for other in pairs) and sorted(pairs[0]) == sorted(pairs[2])
        asked = [question for question, _ in pairs[0]]
        assert len(set(asked)) == len(asked)
        wanted = {question for question, (kind, _) in answers.items() if kind in kinds}
        missing = wanted - set(asked)
        assert all(answers[question][0] == "presence" for question in missing) and (len(missing) > 0) == ("presence" in kinds)
        assert torch.equal(source[0, index].image, prepare(scenes[5].image))
        assert source.lengths[index] == len(encode(source.row(index)["conversations"])[0])


def test_lists_of_the_first_scenes_come_first():
    source = data.SceneConversations(data.Scenes(40, seed=3), encode, prepare)
    order = data.ConversationBatches(source, 6, 1, 0).order(0).tolist()
    assert sorted(order[:18]) == [3 * scene + 1 for scene in range(18)]  # 45% of 40
    assert len(set(order)) == 120 and {index % 3 for index in order[18:]} == {0, 1, 2}
    few = data.SceneConversations(data.Scenes(6, seed=3), encode, prepare)  # 3 lists first, and 15 more
    with pytest.raises(data.DataError, match="18 conversations about images and 0 without: neither fills a global batch of 16 in any stage"):
        data.ConversationBatches(few, 16, 1, 0)


def test_presence_in_scene_conversations():
    """Of the two questions for presence that are drawn together, one with yes and one with no, either is asked."""
    scenes = data.Scenes(40, seed=0)
    source = data.SceneConversations(scenes, encode, prepare)
    answers = [[a for _, a in source.ask(scenes[i], ("presence",), draw)] for i in range(40) for draw in range(4)]
    assert all(len(answer) == 1 for answer in answers) and 50 < answers.count(["Yes"]) < 110


def test_scene_conversations_in_workers():
    """Any number of data processes gives the same batches."""
    source = data.SceneConversations(data.Scenes(12, seed=3), encode, prepare)
    batches = data.ConversationBatches(source, 4, 1, 0)
    loaders = [DataLoader(source, batch_sampler=batches, collate_fn=data.collate_conversations, num_workers=w) for w in (0, 2)]
    for (a, _), (b, _) in zip(*loaders, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in ("ids", "labels", "images"))
