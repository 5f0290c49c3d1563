"""eval.py: the official scorers, each benchmark's files, whole evaluations by tiny models, refusals.

tests/data/eval/scorers.json: answers and boxes with the scores that the benchmarks' own programs give them;
benchmarks.json: files in the formats of their authors, two or three questions each, and what must come of them.
"""

import json
import os
import pickle
import signal
import time
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, launch, refusal
from PIL import Image, ImageDraw

import eval as evaluation  # `eval` is a function here
import llama
import pictures
import vit
import vlm
from eval import BENCHMARKS, Item

OFFICIAL = json.loads((ROOT / "tests/data/eval/scorers.json").read_text())
FILES = json.loads((ROOT / "tests/data/eval/benchmarks.json").read_text())
EXPECTED = FILES["expected"]
SCENES = [name for name in BENCHMARKS if name.startswith("scenes-")]


def command(*argv: object) -> None:
    evaluation.main([str(a) for a in argv])


def fails(*argv: object) -> str:
    """The sentence with which a command is refused."""
    with pytest.raises(ValueError) as caught:
        command(*argv)
    return str(caught.value)


@pytest.mark.parametrize("benchmark", ["vqav2", "textvqa", "vizwiz"])
def test_answers_score_as_officially(benchmark: str):
    cases = OFFICIAL["vqa"]
    scores = [evaluation.vqa_accuracy(benchmark, case["prediction"], case["answers"]) for case in cases]
    if benchmark == "vizwiz":  # given in percent, rounded
        assert [round(100 * score, 2) for score in scores] == [case["vizwiz_percent"] for case in cases]
        parts = ["unanswerable" if "unanswerable" in case["answers"] else "" for case in cases]
        items = [Item(str(i), Path(), "", None, part=part) for i, part in enumerate(parts)]
        ours = evaluation.unanswerable(items, [case["prediction"] for case in cases])
        theirs = OFFICIAL["vizwiz_unanswerability"]
        assert [round(100 * value, 2) for value in ours.values()] == [theirs["average_precision"], theirs["f1_score"]]
    else:
        assert scores == [case[benchmark] for case in cases]
    if benchmark != "textvqa":
        assert round(100 * np.mean(scores), 2) == OFFICIAL[f"{benchmark}_overall"]


def test_boxes_score_as_officially():
    for case in OFFICIAL["boxes"]:
        box = evaluation.parse_box(case["output"])
        assert box == case["parsed"], case
        assert (None if box is None else evaluation.iou(box, case["truth"])) == case["iou"], case
        right = case["iou"] is not None and case["iou"] >= 0.5
        assert evaluation.box_found(0.5, case["output"], case["truth"]) == right, case


def test_areas_are_scikit_learns():
    """Those of roc_auc_score (multi_class="ovo") and average_precision_score, macro averages, on the same numbers."""
    draw = np.random.default_rng(0)
    for n, choices, *theirs in FILES["areas of scikit-learn"]:
        truth = np.concatenate([np.arange(choices), draw.integers(0, choices, n - choices)])
        p = draw.random((n, choices)) + 0.3 * np.eye(choices)[truth]
        p = np.round(p, 1) + 0.1 if n > 100 else p  # with ties
        items = [Item(str(i), Path(), "", int(t)) for i, t in enumerate(truth)]
        ours = evaluation.aucs(items, (p / p.sum(1, keepdims=True)).tolist())
        assert (ours["ROC AUC"], ours["AP"]) == pytest.approx(tuple(theirs), abs=1e-12)
    assert evaluation.aucs([Item("", Path(), "", 1)] * 2, [[0.5, 0.5]] * 2) == {}  # undefined


def save(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content) if path.suffix != ".p" else ""
    path.write_bytes(text.encode() if text else pickle.dumps(content, protocol=2))


def tree(root: Path) -> Path:
    """A folder with the files of all benchmarks."""
    for name, content in FILES["files"].items():
        save(root / name, content)
    for name in FILES["images"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (200, 40, 40)).save(root / name)
    return root


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return tree(tmp_path_factory.mktemp("benchmarks"))


@pytest.mark.parametrize("name", EXPECTED)
def test_a_benchmark_is_read_and_prompted(name: str, files: Path):
    items, expected = evaluation.questions(name, str(files)), EXPECTED[name]
    assert [[item.id, item.prompt, item.truth] for item in items] == expected["questions"]
    assert [item.part for item in items] == expected["parts"]
    assert (items[-1].image, list(items[-1].choices)) == (files / expected["image"], expected["choices"])


def test_files_of_other_systems(tmp_path: Path):
    """A byte order mark, the hidden files of macOS, byte strings of Python 2: S'caf\\xc3\\xa9'."""
    root = tree(tmp_path)
    (root / "ai2d/questions/._0.png.json").write_bytes(b"\0\5\x16\7")
    (root / "vsr/test.jsonl").write_text((root / "vsr/test.jsonl").read_text(), encoding="utf-8-sig")
    assert len(evaluation.questions("ai2d", root)) == 2 and len(evaluation.questions("vsr", root)) == 3
    refs = b"(lp0\n(dp1\nS'split'\nS'val'\nsS'ann_id'\nI7\nsS'image_id'\nI581\nsS'sentences'\n(lp2\n(dp3\nS'sent_id'\n"
    (root / "refcoco/refs(unc).p").write_bytes(refs + b"I1\nsS'sent'\nS'caf\\xc3\\xa9'\nsasa.")
    assert [item.question for item in evaluation.questions("refcoco", root)] == ["café"]


def test_boxes_hold_for_the_pixels_as_stored(tmp_path: Path):
    """So the model must not see such an image turned by its EXIF data; other questions are about the upright one."""
    root, exif, image, seen = tree(tmp_path), Image.Exif(), Image.new("RGB", (200, 100), "white"), {}
    exif[0x0112] = 6
    ImageDraw.Draw(image).rectangle((10, 10, 59, 49), fill="red")
    for name in ("refcoco", "gqa"):
        item = evaluation.questions(name, root)[0]
        image.save(item.image, exif=exif, quality=95)
        pixels = vlm.prepare(item.picture(), vit.ViTConfig(**TINY | dict(image_size=64)))  # [3, 64, 64]
        seen[name] = [bool(pixels[1, y, x] < 60) for y, x in ((20, 12), (12, 44))]  # red at the left, at the right?
    assert seen == {"refcoco": [True, False], "gqa": [False, True]}


@pytest.mark.parametrize("name", SCENES)
def test_questions_about_scenes(name: str, scenes: Path):
    rows = [row for row in json.loads((scenes / "questions.json").read_text()) if f"scenes-{row['kind']}" == name]
    items = evaluation.questions(name, scenes)
    assert [item.id for item in items] == [str(row["id"]) for row in rows] and len(items) >= 4
    for item, row in zip(items, rows):
        question, answer = (turn["value"] for turn in row["conversations"])
        assert question == f"<image>\n{item.prompt}" and item.image == scenes / row["image"]
        answers = [float(choice == answer) for choice in item.choices] if item.choices else answer
        if BENCHMARKS[name].kind == "places":
            answers = {"places": next(iter(row["targets"].values()))}
        assert BENCHMARKS[name].score(answers, item.truth) == 1
    three, four = ([item.id for item in evaluation.questions(name, scenes, n)] for n in (3, 4))  # the same random ones
    assert set(three) < set(four) and four == [item.id for item in items if item.id in four]


class Oracle:
    """Stands for a model that knows the answers, but gets every third one wrong, or as asked; keeps the prompts."""

    def __init__(self, questions: list[list[Item]], wrong: int):
        asked = [(item, i % wrong == 0) for items in questions for i, item in enumerate(items)]
        self.known = {(item.prompt, item.picture().tobytes()): (item.truth, wrong) for item, wrong in asked}
        self.batches = []

    def ask(self, images, prompts) -> list[tuple[object, bool]]:
        self.batches.append(prompts)
        return [self.known[prompt, image.tobytes()] for image, prompt in zip(images, prompts, strict=True)]

    def generate(self, images, prompts, max_new_tokens, regions) -> list[str]:
        assert [len(each) for each in regions] == [0] * len(prompts)
        first = lambda truth: truth[0] if isinstance(truth[0], str) and isinstance(truth, list) else str(truth)
        return ["nonsense" if wrong else first(truth) for truth, wrong in self.ask(images, prompts)]

    def score(self, images, prompts, choices) -> list[list[float]]:
        best = [((truth + wrong) % len(c), len(c)) for (truth, wrong), c in zip(self.ask(images, prompts), choices)]
        return [[0.7 if i == right else 0.3 / (n - 1) for i in range(n)] for right, n in best]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with weights that no one reads."""
    (tmp_path / "a/model").mkdir(parents=True)  # train_vlm.py's --out has the model inside
    (tmp_path / "a/model/model.safetensors").write_bytes(b"weights")
    return tmp_path / "a"


def stand_in(monkeypatch, root: Path, *names: str, wrong: int = 3) -> Oracle:
    oracle = Oracle([evaluation.questions(name, root) for name in names], wrong)
    monkeypatch.setattr(vlm, "load", lambda *args: oracle)
    return oracle


def test_every_benchmark_is_answered_and_scored(files: Path, model: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "RESULTS", tmp_path)
    stand_in(monkeypatch, files, *EXPECTED)
    command(model / "model", "--data", files, "--out", tmp_path / "out")  # all of the paper's
    printed, table = capsys.readouterr().out, (tmp_path / "out/results.md").read_text()
    assert table.split("\n\n")[1].strip() in printed and "python eval.py compare" in printed
    for name, expected in EXPECTED.items():
        result = evaluation.results(tmp_path / "out")[name]
        assert [row["id"] for row in result["answers"]] == [row[0] for row in expected["questions"]]
        assert [row["score"] for row in result["answers"]] == [float(i % 3 > 0) for i in range(len(result["answers"]))]
        scores = {title: row["score"] for title, row in result["rows"].items()}
        assert list(scores) == list(expected["scores"]) and scores == pytest.approx(expected["scores"])
        assert all(f" | {100 * score:.2f} | " in table.split(f"| {title} |")[1][:20] for title, score in scores.items())
    assert evaluation.results(tmp_path / "out")["vsr"]["rows"]["VSR"]["metrics"] == {"ROC AUC": 0.5, "AP": 2 / 3}
    command(model, "--data", files, "--benchmarks", "gqa")
    assert (tmp_path / "a/results.md").exists()  # named after the model


def test_an_image_is_read_once_with_all_its_questions(scenes: Path, tmp_path: Path, monkeypatch):
    """And images with long questions come first."""
    items, read, picture = evaluation.questions("scenes-presence", scenes), [], Item.picture
    items = [*items[::2], *(Item(f"{i.id}b", i.image, "", 0, prompt=i.prompt + "!") for i in items), *items[1::2]]
    asked = [item for batch in evaluation.make_batches(items, 5) for item in batch]
    images = [list(group) for _, group in groupby(asked, key=lambda item: item.image)]
    longest = [max(len(item.prompt) for item in group) for group in images]
    assert len(images) == len({item.image for item in items}) and longest == sorted(longest, reverse=True)
    oracle = Oracle([items], 2)
    monkeypatch.setattr(Item, "picture", lambda item: read.append(item.image) or picture(item))
    monkeypatch.setattr(oracle, "score", lambda images, *_: [[1.0, 0.0]] * len({id(image) for image in images}) * 2)
    evaluation.ask(oracle, "scenes-presence", [items], {}, tmp_path / "part.jsonl", rank=0)
    assert len(read) == len(set(read)) and (tmp_path / "part.jsonl").read_text().count("[1.0, 0.0]") == len(items)


def test_an_interrupted_evaluation_continues(scenes: Path, model: Path, tmp_path: Path, monkeypatch):
    """An image is damaged, and a killed process leaves half a line. A finished benchmark is not asked again."""
    oracle, part = stand_in(monkeypatch, scenes, "scenes-count"), tmp_path / "parts/scenes-count.rank-0.jsonl"
    flags = (model, "--data", scenes, "--benchmarks", "scenes-count", "--batch", 3, "--out")
    command(*flags, tmp_path / "whole")
    whole, oracle.batches = oracle.batches, []
    damaged = next(i.image for i in evaluation.questions("scenes-count", scenes) if i.prompt == whole[2][0])
    content = damaged.read_bytes()
    damaged.write_bytes(b"no image")
    said = fails(*flags, tmp_path / "parts")
    damaged.write_bytes(content)
    before = len(oracle.batches)
    assert f"{damaged}: cannot be read" in said and 0 < before == part.read_text().count('"answer"') / 3 < len(whole)
    part.write_text(part.read_text() + '{"id": "scene-1", "answ\n{"settings": {"wei')
    command(*flags, tmp_path / "parts")
    command(*flags, tmp_path / "parts", "--show", 2)
    assert oracle.batches == whole and not part.exists()
    assert Image.open(tmp_path / "parts/scenes-count-failures.png").width == 2 * 320 + 3 * 12
    assert (tmp_path / "parts/scenes-count.json").read_bytes() == (tmp_path / "whole/scenes-count.json").read_bytes()


def test_intervals_are_those_of_plain_resampling():
    draw = np.random.default_rng(0)
    groups = [draw.choice([0, 0.3, 0.6, 0.9, 1], 200), draw.choice([0.0, 1.0], 90, p=[0.2, 0.8])]
    means = [np.mean([draw.choice(scores, len(scores)).mean() for scores in groups]) for _ in range(4000)]
    assert evaluation.bootstrap(groups) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.004)
    assert evaluation.bootstrap([np.ones(5)]) == [1.0, 1.0]


def test_comparison(files: Path, model: Path, tmp_path: Path, capsys, monkeypatch):
    pair, drawn = (tmp_path / "base", tmp_path / "aligned"), []
    for folder, wrong in zip(pair, (2, 3)):
        stand_in(monkeypatch, files, *EXPECTED, wrong=wrong)
        command(model, "--data", files, "--out", folder)
    scores = [[row["score"] for row in evaluation.results(folder)["ocid-ref"]["answers"]] for folder in pair]
    change, _ = np.subtract(*scores[::-1]), capsys.readouterr()
    low, high = 100 * np.array(evaluation.bootstrap([change]))
    command("compare", *pair, "--out", tmp_path / "both")
    printed = capsys.readouterr().out
    assert f"| OCID-Ref | 50.00 | 66.67 | {100 * change.mean():+.2f} ({low:+.2f} to {high:+.2f}) |" in printed
    assert "| OCID-Ref | -1.00 | +1.00 |" in printed  # of two, each is one standard deviation from the mean
    assert min(Image.open(tmp_path / "both/radar.png").size) > 800
    faint, blank = [], Image.new("RGB", (30, 20))
    monkeypatch.setattr(pictures, "radar", lambda *args, **more: drawn.append(args) or faint.append(more) or blank)
    command("compare", *(f"{i}={pair[i > 0]}" for i in range(4)), "--out", tmp_path / "both", "--each", 2)
    (axes, series, reach), (_, others, _) = drawn
    assert [list(series), list(others), reach] == [["0", "1"], ["2", "3"], 2.5]
    assert len(axes) == 14 and axes[8] == "OCID-Ref\n50.0 - 66.7"  # one for each benchmark, but two of TallyQA
    assert [axis.split("\n")[0] for axis in axes[9:12]] == ["VSR", "TallyQA, simple", "TallyQA, complex"]
    for interval, gray in (([-0.1, 0.2], 14), ([0.1, 0.2], 0), ([-0.2, -0.1], 0)):  # may it be chance?
        monkeypatch.setattr(evaluation, "bootstrap", lambda _, interval=interval: interval)
        command("compare", *pair, "--out", tmp_path / "both")
        assert len(faint[-1]["faint"]) == gray
    assert (series["0"][8], others["2"][8]) == pytest.approx((-(3**0.5), 3**-0.5))

    assert "have the same name; give names, as NAME=FOLDER" in fails("compare", pair[0], pair[0])
    assert "no results in common" in fails("compare", pair[0], tmp_path)
    command(model, "--data", files, "--benchmarks", "gqa", "--limit", 1, "--out", tmp_path / "few")
    assert "asked other questions" in fails("compare", pair[0], tmp_path / "few")


def test_answers_of_other_programs(files: Path, tmp_path: Path, capsys, monkeypatch):
    def score(name: str, answers: list[dict], *flags: object) -> str:
        save(tmp_path / "answers.json", answers)
        command("score", name, tmp_path / "answers.json", "--data", files, "--out", tmp_path / name, *flags)
        return capsys.readouterr().out

    printed = score("vqav2", [{"id": 393225000, "answer": "Yes"}, {"id": "262148000", "answer": "at table."}])
    assert "| VQAv2 | 2 | 100.00 |" in printed  # four of ten said so
    printed = score("vsr", [{"id": i, "probabilities": [p, 1 - p]} for i, p in enumerate((0.2, 0.9, 0.4))])
    assert "| VSR | 3 | 66.67 |" in printed and "ROC AUC 100.00, AP 100.00" in printed
    drawn, boxes = [], ("[0.16, 0.62, 0.37, 0.99]", "<box>(16, 62), (37, 99)</box>", "[0, 0, 640, 240]")
    monkeypatch.setattr(pictures, "point", lambda image, places: drawn.append(places) or image)
    monkeypatch.setattr(pictures, "card", lambda _, lines: drawn.append(lines) or Image.new("RGB", (9, 9)))
    printed = score("refcoco", [{"id": i, "answer": box} for i, box in zip((10, 11, 13), boxes)], "--show", 2)
    for ((color, (box,)),), true in zip(drawn[::2], ([0.16, 0.62, 0.37, 0.99], [0.0, 0.0, 1.0, 0.5])):
        assert color == "lime" and np.allclose(box, np.multiply(true, 2 * (8, 6)))
    assert drawn[1][1:] == [(f"answer: {boxes[1]}", "red"), ("truth: [0.16, 0.62, 0.37, 0.99]", "green")]
    assert "| RefCOCO | 3 | 33.33 |" in printed and "readable 33.33" in printed
    command("score", "vsr", tmp_path / "vsr/vsr.json", "--data", files, "--out", tmp_path / "again")
    assert evaluation.results(tmp_path / "vsr")["vsr"]["rows"] == evaluation.results(tmp_path / "again")["vsr"]["rows"]


@pytest.mark.parametrize("name, content, message", FILES["wrong answers"])
def test_wrong_answers_of_other_programs(name: str, content: object, message: str, files: Path, tmp_path: Path):
    save(tmp_path / "answers.json", content)
    said = fails("score", name, tmp_path / "answers.json", "--data", files, "--out", tmp_path / "out")
    assert "answers.json" in said and message in said and not (tmp_path / "out").exists()


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harm",)


PICKLES = [["refcoco", "refcoco/refs(unc).p", [x], "the pickle names"] for x in (Harmful(), np.int64(3))]


@pytest.mark.parametrize("name, file, content, message", FILES["wrong files"] + PICKLES)
def test_a_wrong_file_is_named(name: str, file: str, content: object, message: str, tmp_path: Path, monkeypatch):
    root = tree(tmp_path / "tree")
    monkeypatch.chdir(tmp_path)
    (root / file).unlink() if content is None else save(root / file, content)
    said = refusal(evaluation.questions, name, root)
    assert message in said and "needs in --data" in said and not (tmp_path / "harm").exists()


def test_results_of_something_else_are_kept(files: Path, model: Path, tmp_path: Path, monkeypatch):
    """Those to other questions, of another model, of another program, and a file of the user's own."""
    assert "model.safetensors: missing; make it with python train_vlm.py" in fails(tmp_path, "--data", files)
    stand_in(monkeypatch, files, "gqa")
    flags = (model, "--data", files, "--benchmarks", "gqa", "--out", tmp_path / "out")
    command(*flags)
    before = (tmp_path / "out/gqa.json").read_bytes()
    assert "its answers to gqa were made with other questions; choose another --out" in fails(*flags, "--limit", 1)
    (model / "model/model.safetensors").write_bytes(b"other weights")
    assert "were made with other weights" in fails(*flags)
    said = fails("score", "gqa", tmp_path / "out/gqa.json", "--data", files, "--out", tmp_path / "out")
    assert "were made with other answers and precision and weights" in said
    assert (tmp_path / "out/gqa.json").read_bytes() == before
    save(tmp_path / "out/gqa.json", [{"id": 1, "answer": "red"}])
    assert "gqa.json: was not written by eval.py" in fails(*flags)


@pytest.mark.parametrize("argv, message", FILES["wrong flags"])
def test_wrong_flags(argv: str, message: str, capsys):
    with pytest.raises(SystemExit) as caught:
        command(*argv.split())
    assert caught.value.code == 2 and message in capsys.readouterr().err
    command("list")
    printed = capsys.readouterr().out
    assert all(f"| `{name}` | {b.title} | {b.files} |" in printed for name, b in BENCHMARKS.items())


@pytest.fixture(scope="module")
def real(tmp_path_factory, tiny_weights: Path) -> Path:
    """A tiny backbone and a language model of the demo's size, with random weights."""
    folder, language = tmp_path_factory.mktemp("vlm") / "model", llama.load(ROOT / "demo/language")
    torch.manual_seed(0)
    for parameter in language.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    vlm.save(vlm.build(vit.load(tiny_weights), language, llama.Tokenizer(ROOT / "demo/language"), "mlp"), folder)
    return folder


def test_a_killed_evaluation_continues_with_two_processes(real: Path, scenes: Path, tmp_path: Path):
    """Killed while it answers, continued by two processes: its files are those of one that nothing interrupted."""
    names = "scenes-caption,scenes-presence"
    flags = (real, "--data", scenes, "--benchmarks", names, "--batch", 2, "--limit", 8, "--out")
    killed, part = launch("eval.py", *flags, tmp_path / "two"), tmp_path / "two/scenes-caption.rank-0.jsonl"
    while not (part.exists() and part.read_text().count("answer") >= 4):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    continued = launch("eval.py", *flags, tmp_path / "two", ranks=2)
    command(*flags, tmp_path / "one")
    printed, errors = continued.communicate()
    assert continued.returncode == 0, errors
    assert printed.count("| caption | 8 |") == 1
    for name in names.split(","):
        assert (tmp_path / f"two/{name}.json").read_bytes() == (tmp_path / f"one/{name}.json").read_bytes()
    assert not list(tmp_path.glob("*/*.jsonl"))
    model = vlm.load(real)  # and each answer is the one that its question gets alone
    for row in evaluation.results(tmp_path / "one")["scenes-caption"]["answers"][:2]:
        item = next(item for item in evaluation.questions("scenes-caption", scenes) if item.id == row["id"])
        assert row["answer"] == model.generate([item.picture()], [item.prompt], max_new_tokens=128)[0]


def test_vqav2_by_the_program_of_today():
    """Nine of ten people say "a dog": the paper's program takes the article out of the given answer alone."""
    truths, accuracy = ["a dog"] * 9 + ["dog"], partial(evaluation.vqa_accuracy, "vqav2")
    assert accuracy("a dog", truths) == pytest.approx(0.3) and accuracy("a dog", truths, today=True) == 1
    assert accuracy("2", ["two"] * 5 + ["2"] * 5, today=True) == 1
    assert accuracy("dog", ["a dog"] * 10, today=True) == 0  # where all agree, both are compared as they are
    items = [evaluation.Item(str(i), Path("x"), "?", truths) for i in range(2)]
    assert evaluation.BENCHMARKS["vqav2"].metrics(items, ["a dog", "cat"]) == {"by today's program": 0.5}


def test_a_whole_evaluation_asks_for_few_shapes(real: Path, scenes: Path, tmp_path: Path, monkeypatch):
    """Each number of images at once is another kernel of a compiled backbone: powers of two, whatever batches hold."""
    shapes, encode = [], vlm.VLM.encode_images
    seen = lambda self, images: shapes.append(len(images)) or encode(self, images)
    monkeypatch.setattr(vlm.VLM, "encode_images", seen)
    names = "scenes-presence,scenes-count,scenes-color,scenes-relation"
    command(real, "--data", scenes, "--benchmarks", names, "--batch", 11, "--out", tmp_path / "out")
    assert len(shapes) >= 7 and {1, 16} <= set(shapes) <= {1, 2, 4, 8, 16}
