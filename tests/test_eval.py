"""eval.py: the official scorers, each benchmark's files, whole evaluations by tiny models, wrong input.

tests/data/eval/scorers.json: answers and boxes with the scores that the benchmarks' own programs give them.
"""

import io
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import chain, groupby
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image

import data
import eval as evaluation  # `eval` is a function here
import llama
import vit
import vlm
from eval import BENCHMARKS, Item

ROOT = Path(evaluation.__file__).parent
OFFICIAL = json.loads((ROOT / "tests/data/eval/scorers.json").read_text())
SCENE_TASKS = [name for name in BENCHMARKS if name.startswith("scenes-")]


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(evaluation, "SCENES", 8)
    evaluation.scenes.cache_clear()


def run(*argv: object) -> None:
    evaluation.main([str(a) for a in argv])


def fails(*argv: object) -> str:
    """What a command that must fail says: one sentence, exit status 1."""
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    message = str(caught.value)
    assert message.startswith("eval.py: ") and "\n" not in message
    return message


def answers_in(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


# ----------------------------------------------------------------------------------------------------------------------
# Scores


@pytest.mark.parametrize("benchmark", ["vqav2", "textvqa", "vizwiz"])
def test_answers_score_as_officially(benchmark: str):
    for case in OFFICIAL["vqa"]:
        ours = evaluation.vqa_accuracy(benchmark, case["prediction"], case["answers"])
        if benchmark == "vizwiz":  # given in percent, rounded
            assert round(100 * ours, 2) == case["vizwiz_percent"], case
        else:
            assert ours == case[benchmark], case


def test_means_are_the_official_ones():
    for benchmark in ("vqav2", "vizwiz"):
        scores = [evaluation.vqa_accuracy(benchmark, c["prediction"], c["answers"]) for c in OFFICIAL["vqa"]]
        assert round(100 * np.mean(scores), 2) == OFFICIAL[f"{benchmark}_overall"]
    parts = ["unanswerable" if "unanswerable" in c["answers"] else "answerable" for c in OFFICIAL["vqa"]]
    items = [Item(i, Path(), "", None, part=part) for i, part in enumerate(parts)]
    ours = evaluation.unanswerable(items, [c["prediction"] for c in OFFICIAL["vqa"]])
    theirs = OFFICIAL["vizwiz_unanswerability"]
    assert round(100 * ours["unanswerable AP"], 2) == theirs["average_precision"]
    assert round(100 * ours["unanswerable F1"], 2) == theirs["f1_score"]


def test_boxes_score_as_officially():
    for case in OFFICIAL["boxes"]:
        box = evaluation.parse_box(case["output"])
        assert box == case["parsed"], case
        assert (None if box is None else evaluation.iou(box, case["truth"])) == case["iou"], case
        for threshold in (0.25, 0.5):
            right = case["iou"] is not None and case["iou"] >= threshold
            assert evaluation.box_found(threshold, case["output"], case["truth"]) == right, case


def test_boxes_without_area():
    assert evaluation.iou([0.2, 0.2, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2]) == 0.0
    assert evaluation.iou([0.0, 0.0, 0.1, 0.1], [0.5, 0.5, 1.0, 1.0]) == 0.0
    assert evaluation.box_found(0.5, "[0.2, 0.2, 0.2, 0.2]", [0.0, 0.0, 1.0, 1.0]) == 0.0


def strange_texts(count: int) -> list[str]:
    draw = random.Random(0)
    pieces = [*"aA1.,?!'\"`-_/\\[](){}<>@;:=+\n\t \r", "the", "ten", "dont", "é", "中", "\U0001f600", "\ud800", "\0", "\u2028", "1,0", "'s"]
    return ["".join(draw.choices(pieces, k=draw.randrange(12))) for _ in range(count)]


@pytest.mark.parametrize("benchmark", ["vqav2", "textvqa", "vizwiz"])
def test_no_text_breaks_a_normalization(benchmark: str):
    for text in strange_texts(1000):
        for truth in (False, True):
            assert isinstance(evaluation.normalize(text, benchmark, truth), str)
        assert 0 <= evaluation.vqa_accuracy(benchmark, text, [text] * 10) <= 1


def test_no_text_breaks_the_other_scorers(recwarn):
    for text in [*strange_texts(1000), "[" * 5000, "[" + 3000 * "-" + "1,1,1,1]", "[" + 7000 * "-" + "1,1,1,1]", "[" + "9" * 5000 + ",0,1,1]", "[0,0,1,1" + "," * 9 + "]", "[1 if 1]", '"\\d"', "[1e,0,1,1]"]:
        assert evaluation.exact_match(text, text) == 1
        assert evaluation.box_found(0.5, text, [0.0, 0.0, 1.0, 1.0]) == 0
    assert not recwarn.list


def test_exact_match():
    assert evaluation.exact_match("Yes.", "yes") == evaluation.exact_match(" T-shirt\n", "tshirt") == 1
    assert evaluation.exact_match("yes", "no") == evaluation.exact_match("", "no") == 0


@pytest.mark.parametrize("ties", [False, True])
def test_areas_are_scikit_learns(ties: bool):
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    for n, choices in ((30, 2), (200, 2), (40, 4), (300, 4), (400, 16)):
        truth = np.concatenate([np.arange(choices), draw.integers(0, choices, n - choices)])
        p = draw.random((n, choices)) + 0.3 * np.eye(choices)[truth]
        p = np.round(p, 1) + 0.1 if ties else p
        p /= p.sum(1, keepdims=True)
        ours = evaluation.aucs([Item(i, Path(), "", int(t)) for i, t in enumerate(truth)], p.tolist())
        if choices == 2:
            area, precision = metrics.roc_auc_score(truth == 0, p[:, 0]), metrics.average_precision_score(truth == 0, p[:, 0])
        else:
            area = metrics.roc_auc_score(truth, p, multi_class="ovo", average="macro")
            precision = metrics.average_precision_score(truth, p, average="macro")
        assert ours == {"ROC AUC": pytest.approx(area, abs=1e-12), "AP": pytest.approx(precision, abs=1e-12)}


def test_areas_by_their_definitions():
    """ROC: over all pairs, ties half. Precision: at each positive's score, the share of positives at or above it."""
    draw = np.random.default_rng(1)
    positive, score = draw.random(60) < 0.4, np.round(draw.random(60), 1)
    above = (score[positive][:, None] > score[~positive]) + 0.5 * (score[positive][:, None] == score[~positive])
    assert evaluation.roc_auc(positive, score) == pytest.approx(above.mean(), abs=1e-12)
    precision = np.mean([positive[score >= s].mean() for s in score[positive]])
    assert evaluation.average_precision(positive, score) == pytest.approx(precision, abs=1e-12)


@pytest.mark.parametrize("truth, choices", [([0, 0], 2), ([1, 1], 2), ([3, 3], 4)])
def test_areas_of_a_single_class_are_none(truth: list[int], choices: int):
    items = [Item(i, Path(), "", t) for i, t in enumerate(truth)]
    assert evaluation.aucs(items, [[1 / choices] * choices] * 2) == {"ROC AUC": None, "AP": None}


# ----------------------------------------------------------------------------------------------------------------------
# Each benchmark's files


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (200, 40, 40)).save(path)


def save(path: Path, content: object, lines: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, content)) + "\n" if lines else json.dumps(content))


def ten(*answers: str) -> list[dict]:
    return [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(answers, 1)]


def tree(root: Path) -> Path:
    """All benchmarks' files in the formats of their authors, two or three questions each."""
    for image in (262148, 393225):
        picture(root / f"coco/val2014/COCO_val2014_{image:012d}.jpg")
    picture(root / "coco/train2014/COCO_train2014_000000000581.jpg")
    answers = {262148000: ten(*["down"] * 6, *["at table"] * 4), 393225000: ten(*["yes"] * 10)}
    kinds = {"question_type": "what", "answer_type": "other"}
    save(root / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", {"info": {}, "questions": [
        {"image_id": key // 1000, "question": f"Where is he {{{key}}}?", "question_id": key} for key in answers]})
    save(root / "vqav2/v2_mscoco_val2014_annotations.json", {"annotations": [
        {"question_id": key, "image_id": key // 1000, "multiple_choice_answer": "down", "answers": a, **kinds}
        for key, a in reversed(answers.items())]})

    picture(root / "gqa/images/n161313.jpg")
    save(root / "gqa/testdev_balanced_questions.json", {
        "201307251": {"imageId": "n161313", "question": "Is it overcast?", "answer": "no", "fullAnswer": "No, it is not."},
        "201640614": {"imageId": "n161313", "question": "Who is wearing the dress?", "answer": "woman", "fullAnswer": "The woman."}})

    for i, row in enumerate(rows := [
        {"question": "What is this?", "answers": ten(*["can"] * 8, "tin", "food")[:10], "answer_type": "other", "answerable": 1},
        {"question": "Can you read it?", "answers": ten(*["unanswerable"] * 9, "no"), "answer_type": "unanswerable", "answerable": 0}]):
        row["image"] = f"VizWiz_val_{i:08d}.jpg"
        picture(root / "vizwiz/val" / row["image"])
        for one in row["answers"]:
            del one["answer_id"]
    save(root / "vizwiz/val.json", rows)

    picture(root / "textvqa/train_images/003a8ae2ef43b901.jpg")
    questions = ["what is the brand of this camera?", "what does the small white text spell?"]
    save(root / "textvqa/TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [
        {"question_id": 34602 + i, "image_id": "003a8ae2ef43b901", "question": question, "answers": ["dakota"] * 8 + ["nous", "clos"]}
        for i, question in enumerate(questions)]})
    save(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl", [
        {"question_id": "003a8ae2ef43b901", "image": "003a8ae2ef43b901.jpg", "text": f"{question.capitalize()}\nReference OCR token: DAKOTA, DIGITAL"
         "\nAnswer the question using a single word or phrase.", "category": "default"} for question in questions], lines=True)

    for name, refs in (("refcoco", "refs(unc).p"), ("refcoco+", "refs(unc).p"), ("refcocog", "refs(umd).p")):
        save(root / name / "instances.json", {
            "images": [{"id": 581, "width": 640, "height": 480, "file_name": "COCO_train2014_000000000581.jpg"}],
            "annotations": [{"id": 7, "image_id": 581, "bbox": [103.93, 299.99, 134.22, 177.42]},
                            {"id": 8, "image_id": 581, "bbox": [0, 0, 640, 240]}]})
        (root / name / refs).write_bytes(pickle.dumps([
            {"ref_id": 1, "ann_id": 7, "image_id": 581, "split": "val", "sent_ids": [10, 11],
             "sentences": [{"sent_id": 10, "sent": "left \"bowl\""}, {"sent_id": 11, "sent": "bowl with carrots"}]},
            {"ref_id": 2, "ann_id": 8, "image_id": 581, "split": "testA", "sentences": [{"sent_id": 12, "sent": "the top"}]},
            {"ref_id": 3, "ann_id": 8, "image_id": 581, "split": "val", "sentences": [{"sent_id": 13, "sent": "upper half"}]}], protocol=2))

    picture(root / "ocid-ref/OCID-dataset/ARID20/table/top/seq12/rgb/result_1.png")
    save(root / "ocid-ref/val_expressions.json", {str(i): {
        "scene_path": "ARID20/table/top/seq12/rgb/result_1.png", "bbox": "[64, 48, 320, 240]", "sentence": f"the {i} box", "take_id": take}
        for i, take in enumerate(("0", 9, 10, 16, 17, 20))})

    picture(root / "vsr/images/000000085637.jpg")
    save(root / "vsr/test.jsonl", [
        {"image": "000000085637.jpg", "caption": f"The cat is {relation} the car.", "label": label, "relation": relation, "subj": "cat", "obj": "car"}
        for relation, label in (("above", 0), ("under", 1), ("behind", 1))], lines=True)

    picture(root / "vg/VG_100K/1.jpg"), picture(root / "vg/VG_100K_2/2.jpg")
    save(root / "tallyqa/test.json", [
        {"image": "VG_100K_2/2.jpg", "answer": 3, "issimple": True, "question": "How many giraffes are there?", "question_id": 30000001},
        {"image": "VG_100K/1.jpg", "answer": 0, "issimple": False, "question": "How many dogs have tails?", "question_id": 30000002},
        {"image": "VG_100K/1.jpg", "answer": 15, "issimple": False, "question": "How many beads?", "question_id": 30000003}])

    for number in (0, 1):
        picture(root / f"ai2d/images/{number}.png")
        save(root / f"ai2d/questions/{number}.png.json", {"imageName": f"{number}.png", "questions": {
            f"What does label {number} show?": {"abcLabel": False, "answerTexts": ["root", "stem", "leaf", "fruit"], "correctAnswer": 2 + number,
                                                "questionId": f"{number}.png-0"}}})
    (root / "ai2d/ai2d_test_ids.csv").write_text("1\n17\n")

    for part in ("adversarial", "popular", "random"):
        save(root / f"pope/coco_pope_{part}.json", [
            {"question_id": i + 1, "image": "COCO_val2014_000000262148.jpg", "text": f"Is there a {part} {thing} in the image?", "label": label}
            for i, (thing, label) in enumerate((("snowboard", "yes"), ("dining table", "no")))], lines=True)
    return root


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return tree(tmp_path_factory.mktemp("benchmarks"))


SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
BOX = 'Please provide the bounding box coordinate of the region this sentence describes: "{}"'
NUMBERS = ("\nA. 0\nB. 1\nC. 2\nD. 3\nE. 4\nF. 5\nG. 6\nH. 7\nI. 8\nJ. 9\nK. 10\nL. 11\nM. 12\nN. 13\nO. 14\nP. 15")
SIXTEEN = tuple("ABCDEFGHIJKLMNOP")
BOWL, UPPER = [0.16, 0.62, 0.37, 0.99], [0.0, 0.0, 1.0, 0.5]
REFER = [("10", BOX.format('left "bowl"'), BOWL), ("11", BOX.format("bowl with carrots"), BOWL), ("13", BOX.format("upper half"), UPPER)]
COCO1, COCO2 = "coco/val2014/COCO_val2014_000000262148.jpg", "coco/val2014/COCO_val2014_000000393225.jpg"
DAKOTA = ["dakota"] * 8 + ["nous", "clos"]
# benchmark -> for each question id, prompt, truth; the last one's image, part and choices
EXPECTED = {
    "vqav2": ([("262148000", "Where is he {262148000}?" + SHORT, ["down"] * 6 + ["at table"] * 4),
               ("393225000", "Where is he {393225000}?" + SHORT, ["yes"] * 10)], COCO2, "", ()),
    "gqa": ([("201307251", "Is it overcast?" + SHORT, "no"), ("201640614", "Who is wearing the dress?" + SHORT, "woman")],
            "gqa/images/n161313.jpg", "", ()),
    "vizwiz": ([("VizWiz_val_00000000.jpg", "What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT,
                 ["can"] * 8 + ["tin", "food"]),
                ("VizWiz_val_00000001.jpg", "Can you read it?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT,
                 ["unanswerable"] * 9 + ["no"])], "vizwiz/val/VizWiz_val_00000001.jpg", "unanswerable", ()),
    "textvqa": ([("34602", "What is the brand of this camera?" + SHORT, DAKOTA),
                 ("34603", "What does the small white text spell?" + SHORT, DAKOTA)],
                "textvqa/train_images/003a8ae2ef43b901.jpg", "", ()),
    "textvqa-ocr": ([("34602", "What is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL" + SHORT, DAKOTA),
                     ("34603", "What does the small white text spell?\nReference OCR token: DAKOTA, DIGITAL" + SHORT, DAKOTA)],
                    "textvqa/train_images/003a8ae2ef43b901.jpg", "", ()),
    **{name: (REFER, "coco/train2014/COCO_train2014_000000000581.jpg", "", ()) for name in ("refcoco", "refcoco+", "refcocog")},
    "ocid-ref": ([(str(i), BOX.format(f"the {i} box"), [0.1, 0.1, 0.5, 0.5]) for i in range(6)],
                 "ocid-ref/OCID-dataset/ARID20/table/top/seq12/rgb/result_1.png", "maximum", ()),
    "vsr": ([(str(i), f'Based on the image, is this statement "True" or "False"? The cat is {relation} the car.\n'
              'Respond with "True" or "False" directly.', truth) for i, (relation, truth) in enumerate((("above", 1), ("under", 0), ("behind", 0)))],
            "vsr/images/000000085637.jpg", "", ("True", "False")),
    "tallyqa": ([("30000001", "How many giraffes are there?" + NUMBERS + LETTER, 3), ("30000002", "How many dogs have tails?" + NUMBERS + LETTER, 0),
                 ("30000003", "How many beads?" + NUMBERS + LETTER, 15)], "vg/VG_100K/1.jpg", "complex", SIXTEEN),
    "ai2d": ([(f"{i}.png-0", f"What does label {i} show?\nA. root\nB. stem\nC. leaf\nD. fruit" + LETTER, 2 + i) for i in (0, 1)],
             "ai2d/images/1.png", "test", SIXTEEN[:4]),
    "pope": ([(f"{part}-{i}", f"Is there a {part} {thing} in the image?" + SHORT, i - 1) for part in ("adversarial", "popular", "random")
              for i, thing in ((1, "snowboard"), (2, "dining table"))], COCO1, "random", ("Yes", "No")),
}


def test_the_tree_has_every_benchmark_that_needs_files():
    assert EXPECTED.keys() == {name for name, benchmark in BENCHMARKS.items() if benchmark.files}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_benchmark_is_read_and_prompted(name: str, files: Path):
    items = evaluation.questions(name, str(files), None)
    rows, image, part, choices = EXPECTED[name]
    assert [(item.id, item.prompt, item.truth) for item in items] == rows
    assert (items[-1].image, items[-1].part, items[-1].choices) == (files / image, part, choices)
    assert all(item.picture().size == (8, 6) for item in items)


def test_parts(files: Path):
    parts = {name: [item.part for item in evaluation.questions(name, str(files), None)] for name in ("ocid-ref", "tallyqa", "ai2d", "vizwiz")}
    assert parts["ocid-ref"] == ["minimum", "minimum", "medium", "medium", "maximum", "maximum"]
    assert parts["tallyqa"] == ["simple", "complex", "complex"] and parts["ai2d"] == ["val", "test"]
    assert parts["vizwiz"] == ["answerable", "unanswerable"]


def test_python_2_pickles_are_read(tmp_path: Path):
    """Protocol 0, byte strings of UTF-8: S'caf\\xc3\\xa9'."""
    (tmp_path / "refs.p").write_bytes(b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xc3\\xa9'\np3\nsS'ref_id'\np4\nI7\nsa.")
    assert evaluation.read_pickle(tmp_path / "refs.p") == [{"sent": "café", "ref_id": 7}]


@pytest.mark.parametrize("name", SCENE_TASKS)
def test_scene_tasks(name: str):
    """Truths and prompts are the scenes' own, of pictures that no training sees."""
    items = evaluation.questions(name, None, None)
    assert len(items) >= 6 and all(str(evaluation.SCENE_SEED) in item.id for item in items)
    source = data.Scenes(8, evaluation.SCENE_SEED)
    rows = {row["id"]: (row, scene) for scene in (source[i] for i in range(8)) for row in scene.conversations}
    for item in items:
        (question, answer), scene = (turn["value"] for turn in rows[item.id][0]["conversations"]), rows[item.id][1]
        assert question == f"<image>\n{item.prompt}"
        assert np.array_equal(item.image, scene.image)
        if item.choices:
            assert item.choices[item.truth] == answer
        else:
            assert BENCHMARKS[name].score(answer, item.truth) == 1
            assert BENCHMARKS[name].score("nonsense", item.truth) == 0


def test_limit_takes_the_same_random_questions(files: Path):
    whole, five, ten = ([item.id for item in evaluation.questions("scenes-presence", None, n)] for n in (None, 5, 10))
    assert set(five) < set(ten) < set(whole) and (len(five), len(ten)) == (5, 10)
    assert ten == [i for i in whole if i in ten] and ten != whole[:10]
    assert five == [item.id for item in evaluation.questions("scenes-presence", None, 5)]


# ----------------------------------------------------------------------------------------------------------------------
# Evaluations by a stand-in for the model


class Oracle:
    """Stands for a model: it knows the answers, and gets every third one wrong, or as asked; keeps the prompts."""

    def __init__(self, items: list[Item], wrong: int = 3):
        self.known = {(item.prompt, item.picture().tobytes()): (item.truth, i % wrong == 0) for i, item in enumerate(items)}
        self.batches = []

    def first_tokens(self, choices) -> list[int]:
        return list(range(len(choices)))

    def ask(self, images, prompts) -> list[tuple[object, bool]]:
        self.batches.append(prompts)
        return [self.known[prompt, image.tobytes()] for image, prompt in zip(images, prompts, strict=True)]

    def generate(self, images, prompts, max_new_tokens) -> list[str]:
        assert max_new_tokens == 128
        text = lambda truth: truth if isinstance(truth, str) else str(truth) if isinstance(truth[0], float) else truth[0]
        return ["nonsense" if wrong else text(truth) for truth, wrong in self.ask(images, prompts)]

    def score(self, images, prompts, choices) -> list[list[float]]:
        result = []
        for (truth, wrong), options in zip(self.ask(images, prompts), choices, strict=True):
            best = (truth + 1) % len(options) if wrong else truth
            result.append([0.7 if i == best else 0.3 / (len(options) - 1) for i in range(len(options))])
        return result


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with weights that no one reads."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(b"weights")
    return tmp_path / "model"


def stand_in(monkeypatch, *names: str, root: Path | None = None, **options) -> Oracle:
    items = chain(*(evaluation.questions(name, root and str(root), None) for name in names))
    oracle = Oracle(list(items), **options)
    monkeypatch.setattr(vlm, "load", lambda *args: oracle)
    return oracle


METRICS = {  # of the headline row, with every third answer wrong
    "vsr": {"ROC AUC": 0.5, "AP": 2 / 3}, "pope": {"ROC AUC": 2 / 3}, "vizwiz": {"unanswerable AP": 1.0, "unanswerable F1": 1.0},
    "refcoco": {"readable": 2 / 3}, "ocid-ref": {"readable": 2 / 3},
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_a_benchmark_is_answered_and_scored(name: str, files: Path, model: Path, tmp_path: Path, monkeypatch):
    stand_in(monkeypatch, name, root=files)
    run(model, "--data", files, "--benchmarks", name, "--out", tmp_path / "out")
    result, n = answers_in(tmp_path / "out", name), len(EXPECTED[name][0])
    wrong = [i for i in range(n) if i % 3 == 0]
    assert [row["id"] for row in result["answers"]] == [row[0] for row in EXPECTED[name][0]]
    assert [row["score"] for row in result["answers"]] == [0.0 if i in wrong else 1.0 for i in range(n)]
    titles, benchmark = list(result["rows"]), BENCHMARKS[name]
    assert titles == [benchmark.title] * (name != "tallyqa") + [f"{benchmark.title}, {part}" for part in benchmark.parts]
    first = result["rows"][titles[0]]
    if name == "pope":  # the mean of the splits' means; of two questions each, numbers 0 and 3 of six are wrong
        assert [result["rows"][t]["score"] for t in titles] == [pytest.approx(2 / 3), 0.5, 0.5, 1.0]
    elif name == "tallyqa":
        assert [result["rows"][t]["score"] for t in titles] == [0.0, 1.0]
    else:
        assert first["questions"] == n and first["score"] == pytest.approx(1 - len(wrong) / n)
    for metric, value in METRICS.get(name, {}).items():
        assert first["metrics"][metric] == pytest.approx(value, abs=1e-12)
    table = (tmp_path / "out/results.md").read_text()
    assert all(f"| {title} | {row['questions']} | {100 * row['score']:.2f} |" in table for title, row in result["rows"].items())


def test_a_question_is_asked_once_beside_those_about_its_image(model: Path, tmp_path: Path, monkeypatch):
    """And images with long questions come first."""
    oracle = stand_in(monkeypatch, "scenes-presence")
    run(model, "--benchmarks", "scenes-presence", "--out", tmp_path / "out", "--batch", 5)
    items = evaluation.questions("scenes-presence", None, None)
    assert sorted(chain(*oracle.batches)) == sorted(item.prompt for item in items)
    assert {len(batch) for batch in oracle.batches[:-1]} == {5}
    asked = [item for batch in evaluation.batches_of(items[::2] + items[1::2], 5) for item in batch]  # an image's are apart
    images = [list(group) for _, group in groupby(asked, key=lambda item: item.image_key)]
    assert len(images) == len({item.image_key for item in items}) < len(items)
    longest = [max(len(item.prompt) for item in group) for group in images]
    assert longest == sorted(longest, reverse=True) and len(set(longest)) > 1


def test_a_batch_reads_an_image_once(files: Path, model: Path, tmp_path: Path, monkeypatch):
    """Its questions share what was read."""
    oracle, ask, read, shared = stand_in(monkeypatch, "gqa", root=files), Oracle.ask, [], []
    picture = Item.picture
    monkeypatch.setattr(Item, "picture", lambda item: read.append(item.image) or picture(item))
    monkeypatch.setattr(Oracle, "ask", lambda self, images, prompts: shared.append(len(set(map(id, images)))) or ask(self, images, prompts))
    run(model, "--data", files, "--benchmarks", "gqa", "--out", tmp_path / "out")
    assert [len(batch) for batch in oracle.batches] == [2] and len(read) == 1 and shared == [1]


def test_a_finished_benchmark_is_not_asked_again(model: Path, tmp_path: Path, monkeypatch, capsys):
    oracle = stand_in(monkeypatch, *SCENE_TASKS)
    run(model, "--benchmarks", "scenes-color", "--out", tmp_path / "out")
    asked, content = len(oracle.batches), (tmp_path / "out/scenes-color.json").read_bytes()
    run(model, "--out", tmp_path / "out", "--show", 3)  # all scene tasks
    assert not any("What color" in prompt for batch in oracle.batches[asked:] for prompt in batch)
    assert (tmp_path / "out/scenes-color.json").read_bytes() == content and (tmp_path / "out/scenes-color-failures.png").exists()
    printed = capsys.readouterr().out
    assert all(f"| {title} |" in printed for title in ("counting", "color", "relation", "presence", "referring"))
    assert "python eval.py compare" in printed


@pytest.mark.parametrize("torn", ["", '{"id": "scene', '{"id": "scene-1", "probab', '{"settings": {"wei'])
def test_an_evaluation_that_breaks_off_goes_on(torn: str, model: Path, tmp_path: Path, monkeypatch):
    """The third batch fails; a killed process may also leave half a line."""
    oracle = stand_in(monkeypatch, "scenes-presence")
    flags = ("--benchmarks", "scenes-presence", "--batch", 3, "--out")
    run(model, *flags, tmp_path / "whole")
    whole, score = oracle.batches, oracle.score

    def breaks(*args):
        if len(oracle.batches) == 2:
            raise KeyboardInterrupt
        return score(*args)

    oracle.batches, oracle.score = [], breaks
    with pytest.raises(SystemExit) as caught:
        run(model, *flags, tmp_path / "parts")
    assert caught.value.code == 130
    part = tmp_path / "parts/scenes-presence.rank-0.jsonl"
    assert part.read_text().count('"probabilities"') == 6
    with open(part, "a") as file:
        file.write(torn)
    oracle.batches, oracle.score = [], score
    run(model, *flags, tmp_path / "parts")
    assert oracle.batches == whole[2:]
    assert (tmp_path / "parts/scenes-presence.json").read_bytes() == (tmp_path / "whole/scenes-presence.json").read_bytes()
    assert not part.exists()


def test_a_half_written_batch_is_asked_as_a_whole(model: Path, tmp_path: Path, monkeypatch):
    """Rounding depends on what shares a batch."""
    oracle = stand_in(monkeypatch, "scenes-count")
    items = evaluation.questions("scenes-count", None, None)
    batches = evaluation.batches_of(items, 4)
    known = {"weights": [7, os.stat(model / "model.safetensors").st_mtime_ns], "precision": "torch.float32"}
    (tmp_path / "out").mkdir()
    save(tmp_path / "out/scenes-count.rank-3.jsonl", [{"settings": known | evaluation.fingerprint(items)}, {"id": batches[0][0].id, "answer": "9"},
                                                      *({"id": item.id, "answer": "8"} for item in batches[1])], lines=True)
    run(model, "--benchmarks", "scenes-count", "--batch", 4, "--out", tmp_path / "out")
    assert oracle.batches == [[item.prompt for item in batch] for i, batch in enumerate(batches) if i != 1]
    answers = {row["id"]: row["answer"] for row in answers_in(tmp_path / "out", "scenes-count")["answers"]}
    assert {answers[item.id] for item in batches[1]} == {"8"}


def test_the_folder_of_results_is_called_after_the_model(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(evaluation, "RESULTS", tmp_path / "results")
    for folder in ("vlm/model", "llava"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "model.safetensors").write_bytes(b"")
    for folder, name in (("vlm/model", "vlm"), ("vlm", "vlm"), ("llava", "llava")):  # train_vlm.py's --out has the model inside
        assert evaluation.Run(str(tmp_path / folder), "auto").name == name
        stand_in(monkeypatch, "scenes-color")
        run(tmp_path / folder, "--benchmarks", "scenes-color")
        assert (tmp_path / "results" / name / "results.md").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Report


def test_intervals_are_those_of_plain_resampling():
    draw = np.random.default_rng(0)
    groups = [draw.choice([0, 0.3, 0.6, 0.9, 1], 200), draw.choice([0.0, 1.0], 90, p=[0.2, 0.8])]
    means = [np.mean([draw.choice(scores, len(scores)).mean() for scores in groups]) for _ in range(4000)]
    assert evaluation.bootstrap(groups) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.004)
    assert evaluation.bootstrap([np.ones(5)]) == [1.0, 1.0]
    assert evaluation.bootstrap(groups) == evaluation.bootstrap(groups)


@pytest.mark.parametrize("name", ["scenes-refer", "scenes-relation", "scenes-count"])
def test_pictures_of_failures(name: str, model: Path, tmp_path: Path, monkeypatch):
    stand_in(monkeypatch, name, wrong=2)
    drawn = []
    monkeypatch.setattr(data, "card", lambda image, lines, boxes=(): drawn.append((image, lines, boxes)) or Image.new("RGB", (50, 60)))
    run(model, "--benchmarks", name, "--show", 3, "--out", tmp_path / "out")
    items = {(item.question, item.image.tobytes()): item for item in evaluation.questions(name, None, None)}
    assert len(drawn) == 3 and Image.open(tmp_path / f"out/{name}-failures.png").size == (3 * 50 + 4 * 12, 60 + 2 * 12)
    for image, ((question, _), (answer, red), (truth, green)), boxes in drawn:
        item = items[question, image.tobytes()]
        assert (red, green) == ("red", "green")
        if name == "scenes-refer":
            assert answer == "answer: nonsense" and boxes == [(item.truth, "lime")]
        elif name == "scenes-relation":
            assert answer == f"answer: {item.choices[1 - item.truth]} (70%)" and truth == f"truth: {item.choices[item.truth]}"
        else:
            assert answer == "answer: nonsense" and truth == f"truth: {item.truth}"


def test_a_card_shows_picture_boxes_and_wrapped_text():
    lines = [("one two three " * 8 + "end", "black"), ("x\ny", "red")]
    card = data.card(Image.new("RGBA", (40, 20), "blue"), lines, [([0.25, 0.5, 0.75, 1.0], "lime")], 200)
    pixels = np.asarray(card)
    assert card.width == 200 and 100 + 9 * 17 > card.height > 100 + 5 * 17
    rows, columns = np.nonzero((pixels == (0, 255, 0)).all(-1))
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == pytest.approx((50, 149, 50, 99), abs=1)
    text = pixels[100:]
    assert (text[-34:-17, :, 0] > 200).all() and (text[-34:, :, 1] < 128).any()  # the last two lines are red


# ----------------------------------------------------------------------------------------------------------------------
# Comparison


@pytest.fixture
def pair(model: Path, tmp_path: Path, monkeypatch) -> tuple[Path, Path]:
    for name, wrong in (("base", 2), ("aligned", 5)):
        stand_in(monkeypatch, *SCENE_TASKS, wrong=wrong)
        run(model, "--out", tmp_path / name)
    return tmp_path / "base", tmp_path / "aligned"


def test_comparison(pair: tuple[Path, Path], tmp_path: Path, capsys):
    run("compare", *pair, "--out", tmp_path / "both")
    printed = capsys.readouterr().out
    for name in SCENE_TASKS:
        base, aligned = (np.array([row["score"] for row in answers_in(folder, name)["answers"]]) for folder in pair)
        change = aligned - base
        low, high = 100 * np.array(evaluation.bootstrap([change]))
        assert (f"| {BENCHMARKS[name].title} | {100 * base.mean():.2f} | {100 * aligned.mean():.2f} | "
                f"{100 * change.mean():+.2f} ({low:+.2f} to {high:+.2f}) |") in printed
        assert f"| {BENCHMARKS[name].title} | -1.00 | +1.00 |" in printed  # of two, each is one deviation from the mean
    assert "| mean | -1.00 | +1.00 |" in printed and printed.startswith((tmp_path / "both/compare.md").read_text().split("\n\n")[1])
    chart = Image.open(tmp_path / "both/radar.png")
    assert min(chart.size) > 800 and chart.info["dpi"] == pytest.approx((300, 300), abs=0.1)


def test_charts_side_by_side_and_names(pair: tuple[Path, Path], tmp_path: Path, monkeypatch):
    drawn = []
    monkeypatch.setattr(data, "radar", lambda axes, series, reach: drawn.append((axes, series, reach)) or Image.new("RGB", (30, 20)))
    models = [f"{i}={folder}" for i, folder in enumerate((pair[0], pair[1], pair[1], pair[1]))]
    run("compare", *models, "--out", tmp_path / "out", "--each", 2)
    assert [list(series) for _, series, _ in drawn] == [["0", "1"], ["2", "3"]]
    assert drawn[0][1]["0"] == pytest.approx([-3**0.5] * 5) and drawn[1][1]["2"] == pytest.approx([3**-0.5] * 5)
    assert drawn[0][2] == 2.5 and len(drawn[0][0]) == 5
    scores = [100 * answers_in(folder, "scenes-count")["rows"]["counting"]["score"] for folder in pair]
    assert drawn[0][0][0] == f"counting\n{scores[0]:.1f} - {scores[1]:.1f}"


def test_headlines_of_figure_5(files: Path, model: Path, tmp_path: Path, monkeypatch):
    """One axis a benchmark, but two of TallyQA."""
    for name, wrong in (("a", 2), ("b", 3)):
        stand_in(monkeypatch, *EXPECTED, root=files, wrong=wrong)
        run(model, "--data", files, "--out", tmp_path / name)
    rows = evaluation.paired({"a": tmp_path / "a", "b": tmp_path / "b"})
    assert list(evaluation.z_scores(rows)) == [
        "VQAv2", "GQA", "VizWiz", "TextVQA", "TextVQA + OCR", "RefCOCO", "RefCOCO+", "RefCOCOg", "OCID-Ref", "VSR",
        "TallyQA, simple", "TallyQA, complex", "AI2D", "POPE"]  # fmt: skip
    assert "POPE, popular" in rows and "OCID-Ref, medium" in rows


def test_a_radar_chart_has_its_lines_where_the_values_are():
    series = {"grey, as text": [0] * 4, "one": [1] * 4, "two": [-1, 0, -1, 9]}
    chart = np.asarray(data.radar(["north\nof all", "east", "south", "west"], series, reach=2, radius=200)).astype(int)
    one, two = (np.argwhere(abs(chart - color).sum(-1) < 30) for color in data.LINES[1:3])
    top = one[:, 0].min()
    one, two = (points[points[:, 0] < top + 310] for points in (one, two))  # without the legend below
    middle = (one.min(0) + one.max(0)) / 2
    assert one.max(0) - middle == pytest.approx([150, 150], abs=8)  # 1 is at 3/4 of the radius
    assert middle[1] - two[:, 1].min() == pytest.approx(200, abs=8)  # values beyond the rim end there
    assert two[:, 1].max() - middle[1] == pytest.approx(100, abs=8)
    assert middle[0] - two[:, 0].min() == pytest.approx(50, abs=8)


# ----------------------------------------------------------------------------------------------------------------------
# Answers of other programs


def test_answers_of_other_programs(files: Path, tmp_path: Path, capsys):
    save(tmp_path / "llava.json", [{"id": 393225000, "answer": "Yes"}, {"id": "262148000", "answer": "at table."}])
    run("score", "vqav2", tmp_path / "llava.json", "--data", files, "--out", tmp_path / "out")
    assert "| VQAv2 | 2 | 100.00 |" in capsys.readouterr().out  # four of ten said so
    save(tmp_path / "p.json", [{"id": i, "probabilities": [p, 1 - p]} for i, p in enumerate((0.2, 0.9, 0.4))])
    run("score", "vsr", tmp_path / "p.json", "--data", files, "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "| VSR | 3 | 66.67 |" in printed and "ROC AUC 100.00, AP 100.00" in printed
    run("score", "vsr", tmp_path / "out/vsr.json", "--data", files, "--out", tmp_path / "again")  # what an evaluation wrote
    assert answers_in(tmp_path / "out", "vsr")["rows"] == answers_in(tmp_path / "again", "vsr")["rows"]


@pytest.mark.parametrize("name, content, message", [
    ("gqa", [{"id": "7", "answer": "no"}], "entry 1: id 7 is no question's"),
    ("gqa", [{"id": 201307251, "answer": "no"}] * 2, "entry 2: id 201307251 is answered twice"),
    ("gqa", [{"id": 201307251, "answer": "no"}], "lacks 1 of 2 answers, such as 201640614"),
    ("gqa", [{"id": 201307251, "text": "no"}], 'entry 1: is no {"id", "answer"}'),
    ("gqa", ["no"], 'entry 1: is no {"id", "answer"}'),
    ("gqa", 7, "is no list"),
    ("refcoco", [{"id": 10, "answer": [1, 2, 3, 4]}], 'a box as "[0.1, 0.2, 0.5, 0.6]"'),
    ("vsr", [{"id": 0, "answer": "True"}], 'entry 1: is no {"id", "probabilities"}'),
    ("vsr", [{"id": 0, "probabilities": [0.5, 0.6]}], "give 2 numbers whose sum is 1, for True, False"),
    ("vsr", [{"id": 0, "probabilities": [1.0]}], "give 2 numbers"),
    ("vsr", [{"id": 0, "probabilities": [2.0, -1.0]}], "give 2 numbers"),
    ("vsr", [{"id": 0, "probabilities": ["1", "0"]}], "give 2 numbers"),
    ("vsr", [{"id": 0, "probabilities": [float("nan"), 1.0]}], "give 2 numbers"),
])  # fmt: skip
def test_wrong_answers_of_other_programs(name: str, content: object, message: str, files: Path, tmp_path: Path):
    save(tmp_path / "answers.json", content)
    said = fails("score", name, tmp_path / "answers.json", "--data", files, "--out", tmp_path / "out")
    assert "answers.json" in said and message in said
    assert not (tmp_path / "out").exists()


def test_boxes_in_another_format_are_wrong_and_counted(files: Path, tmp_path: Path, capsys):
    save(tmp_path / "boxes.json", [{"id": 10, "answer": str(BOWL)}, {"id": 11, "answer": "<box>(16, 62), (37, 99)</box>"},
                                   {"id": 13, "answer": "[0, 0, 640, 240]"}])
    run("score", "refcoco", tmp_path / "boxes.json", "--data", files, "--out", tmp_path / "out")
    assert "| RefCOCO | 3 | 33.33 |" in (printed := capsys.readouterr().out) and "readable 33.33" in printed


def test_no_such_answers(files: Path, tmp_path: Path):
    assert "none.json: no such file" in fails("score", "gqa", tmp_path / "none.json", "--data", files, "--out", tmp_path)
    (tmp_path / "text.json").write_text("hello")
    assert "text.json: is no JSON" in fails("score", "gqa", tmp_path / "text.json", "--data", files, "--out", tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Wrong input


@pytest.mark.parametrize("name, file, where", [
    ("vqav2", "vqav2/v2_mscoco_val2014_annotations.json", "visualqa.org"), ("gqa", "gqa/testdev_balanced_questions.json", "cs.stanford.edu"),
    ("vizwiz", "vizwiz/val.json", "vizwiz.org"), ("textvqa", "textvqa/llava_textvqa_val_v051_ocr.jsonl", "LLaVA"),
    ("refcoco", "refcoco/refs(unc).p", "github.com/lichengunc/refer"), ("refcocog", "refcocog/instances.json", "github.com/lichengunc/refer"),
    ("ocid-ref", "ocid-ref/val_expressions.json", "OCID-Ref"), ("vsr", "vsr/test.jsonl", "visual-spatial-reasoning"),
    ("tallyqa", "tallyqa/test.json", "TallyQA_dataset"), ("ai2d", "ai2d/questions", "allenai.org"), ("ai2d", "ai2d/ai2d_test_ids.csv", "allenai.org"),
    ("pope", "pope/coco_pope_random.json", "POPE"), ("pope", COCO1, "cocodataset.org"), ("gqa", "gqa/images/n161313.jpg", "cs.stanford.edu"),
])  # fmt: skip
def test_a_missing_file_is_named_with_its_source(name: str, file: str, where: str, files: Path, model: Path, tmp_path: Path):
    shutil.copytree(files, tmp_path / "tree")
    path = tmp_path / "tree" / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    said = fails(model, "--data", tmp_path / "tree", "--benchmarks", name, "--out", tmp_path / "out")
    assert f"{path}: " in said and "missing" in said and where in said


GQA, OCR, POPE = "gqa/testdev_balanced_questions.json", "textvqa/llava_textvqa_val_v051_ocr.jsonl", "pope/coco_pope_random.json"
ONE_OF_POPE = '{"question_id": 1, "image": "COCO_val2014_000000262148.jpg", "text": "x", "label": "no"}\n'


@pytest.mark.parametrize("name, file, content, message", [
    ("gqa", GQA, "{", "is no JSON"),
    ("gqa", GQA, '{"1": {"imageId": "n161313", "question": "What?"}}', "question 1 of GQA is not as distributed (KeyError: 'answer')"),
    ("gqa", GQA, "{}", "there is none"), ("gqa", GQA, "[]", "is not as distributed"),
    ("vsr", "vsr/test.jsonl", '{"image": "000000085637.jpg"\n', "vsr/test.jsonl, '{\"image\": \"000000085637.jpg\"': is no JSON"),
    ("vsr", "vsr/test.jsonl", '{"image": "000000085637.jpg", "caption": "x", "label": 2}\n', "is not as distributed"),
    ("tallyqa", "tallyqa/test.json", '[{"image": "VG_100K/1.jpg", "answer": 16, "issimple": true, "question": "How many?", "question_id": 1}]',
     "number 16 of 16"),
    ("textvqa", OCR, '{"image": "x.jpg", "text": "What?\\nReference OCR token: \\nAnswer."}\n', "x.jpg in the file with OCR tokens"),
    ("textvqa", OCR, '{"image": "003a8ae2ef43b901.jpg", "text": "What?\\nReference OCR token: \\nAnswer."}\n', "shorter"),
    ("pope", POPE, ONE_OF_POPE.replace("no", "maybe"), "not as distributed"), ("pope", POPE, ONE_OF_POPE * 2, "two questions have one id"),
    ("ocid-ref", "ocid-ref/val_expressions.json", '{"0": {"scene_path": "x", "bbox": "64 48", "sentence": "x", "take_id": 0}}', "not as distributed"),
])  # fmt: skip
def test_a_file_of_another_kind_is_named(name: str, file: str, content: str, message: str, files: Path, model: Path, tmp_path: Path):
    shutil.copytree(files, tmp_path / "tree")
    (tmp_path / "tree" / file).write_text(content)
    assert message in fails(model, "--data", tmp_path / "tree", "--benchmarks", name, "--out", tmp_path / "out")


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harm",)


@pytest.mark.parametrize("content", [
    pickle.dumps([{"ref_id": Harmful()}]), pickle.dumps(Path("x"), protocol=0), pickle.dumps([np.int64(3)]), pickle.dumps([1, 2])[:-3], b"", b"hello",
])  # fmt: skip
def test_a_pickle_with_a_class_is_refused(content: bytes, files: Path, model: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(files, tmp_path / "tree")
    (tmp_path / "tree/refcoco/refs(unc).p").write_bytes(content)
    said = fails(model, "--data", tmp_path / "tree", "--benchmarks", "refcoco", "--out", tmp_path / "out")
    assert "refs(unc).p: is refused" in said and "github.com/lichengunc/refer" in said and not (tmp_path / "harm").exists()


def test_a_damaged_image_ends_the_evaluation_and_loses_nothing(files: Path, model: Path, tmp_path: Path, monkeypatch):
    shutil.copytree(files, tmp_path / "tree")
    damaged = tmp_path / "tree" / COCO2
    oracle = stand_in(monkeypatch, "gqa", "vqav2", root=tmp_path / "tree")
    damaged.write_bytes(b"no image")
    flags = (model, "--data", tmp_path / "tree", "--benchmarks", "gqa,vqav2", "--batch", 1, "--out", tmp_path / "out")
    assert f"{damaged}: cannot be read" in fails(*flags)
    assert (tmp_path / "out/gqa.json").exists() and '"down"' in (tmp_path / "out/vqav2.rank-0.jsonl").read_text()
    shutil.copy(files / COCO2, damaged)
    asked = len(oracle.batches)
    run(*flags)
    assert oracle.batches[asked:] == [[EXPECTED["vqav2"][0][1][1]]]


def test_results_of_something_else_are_kept(files: Path, model: Path, tmp_path: Path, monkeypatch):
    """Another model's, other questions', another program's."""
    stand_in(monkeypatch, "scenes-color", "gqa", root=files)
    flags = (model, "--benchmarks", "scenes-color", "--out", tmp_path / "out")
    run(*flags)
    before = (tmp_path / "out/scenes-color.json").read_bytes()
    assert "scenes-color.json: was made with other questions; remove it, or choose another --out" in fails(*flags, "--limit", 2)
    (model / "model.safetensors").write_bytes(b"other weights")
    assert "scenes-color.json: was made with other weights" in fails(*flags)
    save(tmp_path / "x.json", [{"id": item.id, "answer": "red"} for item in evaluation.questions("scenes-color", None, None)])
    assert "was made with other answers and precision and weights" in fails("score", "scenes-color", tmp_path / "x.json", "--out", tmp_path / "out")
    assert (tmp_path / "out/scenes-color.json").read_bytes() == before


def test_a_file_of_the_users_own_is_kept(model: Path, tmp_path: Path):
    save(tmp_path / "scenes-color.json", [{"id": 1, "answer": "red"}])
    flags = ("--benchmarks", "scenes-color", "--out", tmp_path)
    assert "scenes-color.json: was not written by an evaluation" in fails(model, *flags)
    assert json.loads((tmp_path / "scenes-color.json").read_text()) == [{"id": 1, "answer": "red"}]


def test_comparing_what_cannot_be_compared(pair: tuple[Path, Path], model: Path, tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'}: holds no results" in fails("compare", pair[0], tmp_path / "empty")
    assert "have one name; give names, as NAME=FOLDER" in fails("compare", pair[0], pair[0])
    stand_in(monkeypatch, *SCENE_TASKS)
    run(model, "--benchmarks", "scenes-color", "--limit", 3, "--out", tmp_path / "few")
    assert "other questions than" in fails("compare", pair[0], tmp_path / "few")
    for name in SCENE_TASKS[1:]:
        (pair[0] / f"{name}.json").unlink()
    (pair[1] / f"{SCENE_TASKS[0]}.json").unlink()
    assert "no benchmark in common" in fails("compare", *pair)
    run("compare", f"a={pair[1]}", f"b={pair[1]}", "--out", tmp_path / "same")  # nothing differs
    assert "+0.00 (+0.00 to +0.00)" in capsys.readouterr().out


@pytest.mark.parametrize("argv, message", [
    (["x", "--benchmarks", "vqa"], "benchmark vqa: unknown"), (["x", "--benchmarks", "gqa"], "benchmark gqa needs --data, a folder with gqa/"),
    (["score", "vqa", "x.json"], "invalid choice"), (["score", "gqa", "x.json"], "needs --data"), (["compare", "x"], "two folders"),
    (["x", "--limit", "0"], "invalid positive value"), (["compare", "x", "y", "--each", "no"], "invalid positive value"), (["score"], "required"),
])  # fmt: skip
def test_wrong_flags(argv: list[str], message: str, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_no_model(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "make it with: python train_vlm.py" in fails()
    assert "give a folder that train_vlm.py wrote" in fails(tmp_path)


def test_the_list_names_every_file(capsys):
    run("list")
    printed = capsys.readouterr().out
    assert all(f"| `{name}` | {b.title} | {b.files or 'none'} |" in printed for name, b in BENCHMARKS.items())


# ----------------------------------------------------------------------------------------------------------------------
# A real, tiny model


def tiny(folder: Path, letters: bool = True) -> Path:
    """A model of random weights; its tokenizer knows the words of scenes, and letters if asked for."""
    scenes = data.Scenes(60, 0)
    lines = [turn["value"] for i in range(60) for row in scenes[i].conversations for turn in row["conversations"]]
    model, symbols = io.BytesIO(), [f"\u2581{word}" for word in ("True", "False", "Yes", "No", *(SIXTEEN if letters else ()))]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(lines).split("\n")), model_writer=model, model_type="bpe", vocab_size=420, unk_id=0, bos_id=1, eos_id=2,
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
        user_defined_symbols=symbols, minloglevel=2)  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = llama.Tokenizer(folder)
    torch.manual_seed(0)
    language = llama.Llama(llama.LlamaConfig(tokenizer.vocab_size, 32, 64, 2, 2, max_position_embeddings=512))
    backbone = vit.ViT(vit.ViTConfig(image_size=32, patch_size=16, embed_dim=16, depth=2, num_heads=2))
    for parameter in chain(language.parameters(), backbone.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    (folder / "tokenizer.model").unlink()
    vlm.save(vlm.build(backbone, language, tokenizer, "mlp"), folder)
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    return tiny(tmp_path_factory.mktemp("vlm") / "model")


def start(*argv: object, ranks: int = 1, **options) -> subprocess.Popen:
    launcher = [sys.executable]
    if ranks > 1:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={s.getsockname()[1]}"]
    return subprocess.Popen([*launcher, str(ROOT / "eval.py"), *map(str, argv)], env=os.environ | {"OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)  # fmt: skip


def test_a_killed_evaluation_goes_on_with_two_processes(real: Path, tmp_path: Path):
    """Killed with SIGKILL while it answers, continued by two processes: the files are those of one uninterrupted one."""
    names = "scenes-count,scenes-presence"
    flags = ("--benchmarks", names, "--limit", 26, "--batch", 4, "--out")
    killed, part = start(real, *flags, tmp_path / "two"), tmp_path / "two/scenes-count.rank-0.jsonl"
    while not (part.exists() and part.read_text().count("answer") >= 8):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "two/results.md").exists()
    continued = start(real, *flags, tmp_path / "two", ranks=2)
    evaluation.SCENES = 500  # as the other processes have it
    evaluation.scenes.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the other processes have it, too: it changes roundings
    try:
        run(real, *flags, tmp_path / "one")
    finally:
        torch.set_num_threads(threads)
    printed, errors = continued.communicate()
    assert continued.returncode == 0, errors
    assert printed.count("| counting | 26 |") == 1
    for name in names.split(","):
        assert (tmp_path / f"two/{name}.json").read_bytes() == (tmp_path / f"one/{name}.json").read_bytes()
    assert not list(tmp_path.glob("*/*.jsonl"))


def test_a_real_model_answers_as_it_does_one_by_one(real: Path, tmp_path: Path):
    run(real, "--out", tmp_path / "out", "--batch", 3, "--limit", 6, "--benchmarks", "scenes-color,scenes-relation")
    model = vlm.load(real)
    for name in ("scenes-color", "scenes-relation"):
        rows = {row["id"]: row for row in answers_in(tmp_path / "out", name)["answers"]}
        for item in evaluation.questions(name, None, 6)[:4]:
            if name == "scenes-color":
                assert rows[item.id]["answer"] == model.generate([item.image], [item.prompt], max_new_tokens=128)[0]
            else:
                alone = model.score([item.image], [item.prompt], [["True", "False"]])[0]
                assert rows[item.id]["probabilities"] == pytest.approx(alone, abs=1e-5)


def test_a_question_too_long_for_the_context(real: Path, files: Path, tmp_path: Path):
    shutil.copytree(files, tmp_path / "tree")
    save(tmp_path / "tree/gqa/testdev_balanced_questions.json", {
        str(i): {"imageId": "n161313", "question": "Is it red? " * n, "answer": "no"} for i, n in enumerate((1, 1, 200))})
    flags = (real, "--data", tmp_path / "tree", "--benchmarks", "gqa", "--batch", 2, "--out", tmp_path / "out")
    said = fails(*flags)
    assert "GQA, in the batch of question 2: " in said and "context of 512" in said


def test_a_vocabulary_without_the_letters(tmp_path: Path, files: Path):
    """Nothing is asked before it shows."""
    model = tiny(tmp_path / "model", letters=False)
    vlm_ = vlm.load(model)
    assert len(vlm_.first_tokens(["True", "False"])) == 2
    said = fails(model, "--data", files, "--benchmarks", "gqa,tallyqa", "--out", tmp_path / "out")
    assert "tallyqa: the choices" in said and "leave tallyqa out of --benchmarks" in said
    assert not (tmp_path / "out").exists()
