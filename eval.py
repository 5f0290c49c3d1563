"""The benchmarks of figure 5 and table 8: what does a vision-language model see, and where?

    python eval.py                                           # the demo's model on the built-in scenes, in minutes
    python eval.py MODEL --data DIR --benchmarks vqav2,gqa   # without --benchmarks: all of the paper's
    torchrun --nproc-per-node 8 eval.py MODEL --data DIR     # each process answers its share of the questions
    python eval.py compare runs/eval/a runs/eval/b           # differences with intervals, z-scores, radar chart
    python eval.py score gqa answers.json --data DIR         # the answers of another program
    python eval.py list                                      # the benchmarks, and which files go where in DIR

Writes to --out: NAME.json of each benchmark with all answers and scores, results.md, and pictures of failures (--show).
The same command continues an interrupted evaluation. A new benchmark is one reader and one entry of BENCHMARKS.
"""

import argparse
import json
import re
import string
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import decode
import pictures
import run
import vlm
from data import read_json, read_text

MODEL, RESULTS = Path("runs/vlm"), Path("runs/eval")
Answer = str | list[float] | dict  # what it wrote; the probability of each choice; what it wrote and pointed at
Groups = list[np.ndarray]  # of questions, or of their scores, which are averaged in each group, then over the groups


# --- scores -----------------------------------------------------------------------------------------------------------

NUMBER = r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*"
NORMALIZATION = json.loads((Path(__file__).parent / "vqa_normalization.json").read_text(encoding="utf-8"))


def normalize(text: str, benchmark: str, truth: bool = False) -> str:
    """An answer as the official scorer of "vqav2", "vizwiz" or "textvqa" compares it; true ones differ."""
    tables = NORMALIZATION[benchmark]
    if truth and benchmark == "vizwiz":
        return text
    if benchmark == "textvqa":
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    if not (truth and benchmark == "vqav2"):
        text = text.replace("\n", " ").replace("\t", " ").strip()
    stripped, comma = text, re.search(tables["comma"], text) is not None
    for mark in tables["punctuation"]:
        stripped = stripped.replace(mark, "" if comma or mark + " " in text or " " + mark in text else " ")
    # at most 32 periods: the official scorers pass the flag re.UNICODE where the count belongs
    stripped = re.sub(tables["period"], "", stripped, count=int(re.UNICODE))
    if truth and benchmark == "vqav2":
        return stripped
    words = [tables["numbers"].get(word, word) for word in stripped.lower().split()]  # "two" -> "2"
    return " ".join(tables["contractions"].get(word, word) for word in words if word not in tables["articles"])


def vqa_accuracy(benchmark: str, answer: str, truths: Sequence[str], today: bool = False) -> float:
    """VQA accuracy: leave out each of the ten people in turn; an answer is right if three of the other nine gave it.

    today: as VQAv2's official program has had it since 2021. It drops articles and turns number words into digits in
        the true answers, too; where all ten agree, it compares unchanged answers. The paper used the one before."""
    if today and len({truth.strip() for truth in truths}) == 1:
        return float(answer.strip() == truths[0].strip())
    answer = normalize(answer, benchmark)
    equal, total = [normalize(truth, benchmark, truth=not today) == answer for truth in truths], 0.0
    for one in equal:  # not sum(), which newer Pythons round differently from the official scorers
        total += min(1, (sum(equal) - one) / 3)
    return total / len(equal)


def exact_match(answer: str, truth: str) -> float:
    """1 if both are equal except for case and punctuation."""
    answer, truth = (text.lower().translate(str.maketrans("", "", string.punctuation)) for text in (answer, truth))
    return float(answer.strip() == truth.strip())


def parse_box(text: str) -> list[float] | None:
    """[x1, y1, x2, y2] as fractions of width and height, from the upper left corner; None for any other text."""
    match = re.fullmatch(rf"\s*\[{','.join([NUMBER] * 4)},?\s*\]\s*", text)
    box = [float(number) for number in match.groups()] if match else []
    return box if box and 0 <= box[0] <= box[2] <= 1 and 0 <= box[1] <= box[3] <= 1 else None


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    width, height = (max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0) for i in (0, 1))  # of what both share
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union > 0 else 0.0


def concluded(answer: str, truth: str) -> float:
    """1 if both end with the same word."""
    return exact_match(*(text.split()[-1] if text.split() else "" for text in (answer, truth)))


def box_found(threshold: float, answer: str, truth: Sequence[float]) -> float:
    """1 if the answer is a box whose IoU with the true one reaches the threshold."""
    return float((box := parse_box(answer)) is not None and iou(box, truth) >= threshold)


def overlaps(answer: dict, truth: dict[str, list]) -> np.ndarray:
    """The intersections over unions of what an answer points at and the true places, [found, true]."""
    (unit, true), = truth.items()
    of = iou if unit == "box" else lambda a, b: (a & b).sum() / max(1, (a | b).sum())
    found = [one for one in answer["places"] if isinstance(one, dict) == (unit == "mask")]  # the others miss
    return np.array([[of(a, b) for b in pixels(true)] for a in pixels(found)]).reshape(-1, len(true))


def pixels(places: Sequence[list[float] | dict]) -> list:
    """Boxes as they are, masks from run lengths to bool [H, W]."""
    return [data.read_mask(one, one["size"][::-1]) if isinstance(one, dict) else one for one in places]


def pointed(threshold: float, answer: dict, truth: dict[str, list]) -> float:
    """1 if the answer points at one thing, and the IoU with the true place reaches the threshold; 0: that IoU."""
    ious = overlaps(answer, truth)
    value = float(ious[0, 0]) if len(ious) == 1 else 0.0
    return float(value >= threshold) if threshold else value


def pointed_all(answer: dict, truth: dict[str, list]) -> float:
    """F1 of the things that an answer points at: right are pairs of one found and one true whose IoU reaches 0.5."""
    ious = overlaps(answer, truth)
    right = np.pad(ious >= 0.5, [(0, max(ious.shape) - side) for side in ious.shape])
    pairs = decode.match(torch.from_numpy(-right.astype(float)))
    return 2 * float(right[range(len(pairs)), pairs].sum()) / sum(ious.shape)


def cumulative_iou(items: list["Item"], answers: list[dict]) -> float:
    """cIoU of masks: all intersections over all unions."""
    both, either = 0, 0
    for item, answer in zip(items, answers):
        (true,), found = pixels(item.truth["mask"]), pixels(answer["places"])
        found = found[0] if len(found) == 1 and np.ndim(found[0]) == 2 else np.zeros_like(true)
        both, either = both + (true & found).sum(), either + (true | found).sum()
    return both / max(1, either)


# --- questions --------------------------------------------------------------------------------------------------------

@dataclass
class Item:
    """One question, as a reader yields it; `questions` fills in the prompt and the choices."""

    id: str
    image: Path
    question: str
    truth: object  # text: the answer, or VQA's ten; box: [x1, y1, x2, y2]; choice: its index; places: {unit: places}
    options: Sequence[str] = ()  # what the letters A, B... stand for
    part: str = ""  # the split or kind that is reported separately
    regions: Sequence = ()  # for each <region> in the question (decode.region)
    as_stored: bool = False  # a true box that holds for the pixels as stored: no EXIF orientation may turn the image
    prompt: str = ""
    choices: Sequence[str] = ()

    def picture(self) -> Image.Image:
        """The decoded image. ValueError: it cannot be read."""
        return data.open_image(self.image, data.to_rgb if self.as_stored else data.upright)


@dataclass(frozen=True)
class Benchmark:
    """An entry of BENCHMARKS."""

    title: str
    read: Callable[[Path], Iterator[Item]]  # from the folder --data
    files: str  # what it reads there, and where to get that
    prompt: str  # {q}: the question, {options}: its options as lines "A. ..."
    score: Callable[[Answer, object], float] = exact_match  # (answer, truth) -> 0 to 1
    kind: str = "text"  # of answer: text, box (a text that gives one), choice (the most probable one), places
    choices: Sequence[str] = ()  # by default the letters of a question's options
    parts: Sequence[str] = ()  # what is reported separately
    headline: str = "all"  # figure 5 shows the mean over all questions, the mean of the parts, or the parts
    metrics: Callable[[list[Item], list[Answer]], dict[str, float]] = lambda items, answers: {}  # beside the score


def questions(name: str, root: str | Path, limit: int | None = None) -> list[Item]:
    """A benchmark's questions with their prompts: all, or `limit` random ones, the same every time."""
    benchmark, items, letters = BENCHMARKS[name], [], string.ascii_uppercase
    need = f"{benchmark.title} needs in --data {benchmark.files}"
    try:
        for item in benchmark.read(Path(root)):
            options = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, item.options))
            item.id, item.prompt = str(item.id), benchmark.prompt.format(q=item.question, options=options)
            item.choices = benchmark.choices or tuple(letters[: len(item.options)])
            if benchmark.kind == "choice" and item.truth not in range(len(item.choices)):
                raise ValueError(f"the right choice is number {item.truth} of {len(item.choices)}")
            items.append(item)
        if len({item.id for item in items}) < max(1, len(items)):
            raise ValueError("two questions have the same id" if items else "there are no questions")
    except Exception as e:  # a file in another format can fail in any way
        raise ValueError(f"{root}: question {len(items) + 1} is unreadable ({type(e).__name__}: {e}); {need}") from None
    if limit and limit < len(items):
        items = [items[i] for i in sorted(data.generator(f"questions of {name}").permutation(len(items))[:limit])]
    if missing := sorted(path for path in {item.image for item in items} if not path.exists()):
        raise ValueError(f"{missing[0]}: this image is missing; {need}")
    return items


def areas(positive: np.ndarray, score: np.ndarray) -> tuple[float, float]:
    """The area under the ROC curve (how often a positive [n] scores above a negative), and the average precision."""
    _, place, ties = np.unique(-score, return_inverse=True, return_counts=True)  # the highest score first
    found = np.bincount(place, positive)  # the positives of each score
    precision, above = found.cumsum() / ties.cumsum(), found.cumsum() - found / 2
    roc = ((ties - found) * above).sum() / (positive.sum() * (~positive).sum())
    return float(roc), float((found / positive.sum() * precision).sum())


def aucs(items: list[Item], answers: list[Answer]) -> dict[str, float]:
    """Areas of two choices, where the first is the positive class, or of more, as scikit-learn's "ovo" and "macro"."""
    truth, p = np.array([item.truth for item in items]), np.array(answers)  # [n], [n, choices]
    if len(right := np.unique(truth).tolist()) < 2:
        return {}  # undefined
    right, pairs = ([0], [(0, 1)]) if p.shape[1] == 2 else (right, [(a, b) for a in right for b in right if a != b])
    roc = np.mean([areas(truth[of] == a, p[of, a])[0] for a, b in pairs for of in [np.isin(truth, (a, b))]])
    return {"ROC AUC": float(roc), "AP": float(np.mean([areas(truth == a, p[:, a])[1] for a in right]))}


def unanswerable(items: list[Item], answers: list[Answer]) -> dict[str, float]:
    """VizWiz: how well the answer "unanswerable" detects the questions that are."""
    positive = np.array([item.part == "unanswerable" for item in items])
    said = np.array([normalize(answer, "vizwiz") == "unanswerable" for answer in answers])
    if positive.all() or not positive.any():
        return {}  # undefined
    f1 = float(2 * (positive & said).sum() / (positive.sum() + said.sum()))
    return {"unanswerable AP": areas(positive, said.astype(float))[1], "unanswerable F1": f1}


# --- readers, each of the files that a benchmark's authors distribute -------------------------------------------------

def read_vqav2(root: Path) -> Iterator[Item]:
    """VQAv2 val: questions and annotations in two files."""
    rows = read_json(root / "vqav2/v2_mscoco_val2014_annotations.json")["annotations"]
    truths = {row["question_id"]: [one["answer"] for one in row["answers"]] for row in rows}
    for row in read_json(root / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json")["questions"]:
        image = root / f"coco/val2014/COCO_val2014_{row['image_id']:012d}.jpg"
        yield Item(row["question_id"], image, row["question"], truths[row["question_id"]])


def read_gqa(root: Path) -> Iterator[Item]:
    """GQA testdev-balanced."""
    for key, row in read_json(root / "gqa/testdev_balanced_questions.json").items():
        yield Item(key, root / f"gqa/images/{row['imageId']}.jpg", row["question"], row["answer"])


def read_vizwiz(root: Path) -> Iterator[Item]:
    """VizWiz val; the image's name is the question's id."""
    for row in read_json(root / "vizwiz/val.json"):
        truths, part = [one["answer"] for one in row["answers"]], "answerable" if row["answerable"] else "unanswerable"
        yield Item(row["image"], root / "vizwiz/val" / row["image"], row["question"], truths, part=part)


def read_textvqa(ocr: bool, root: Path) -> Iterator[Item]:
    """TextVQA val, with or without the words that an OCR system read, from LLaVA's file, which has the same order."""
    rows = read_json(root / "textvqa/TextVQA_0.5.1_val.json")["data"]
    for row, other in zip(rows, read_json(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl", rows=True), strict=True):
        if Path(other["image"]).stem != row["image_id"]:
            raise ValueError(f"image {row['image_id']} here, {other['image']} in the file with OCR tokens")
        question = other["text"].rsplit("\n", 1)[0]  # the last line is LLaVA's instruction
        question = question if ocr else question.split("\nReference OCR token:")[0]
        yield Item(row["question_id"], root / f"textvqa/train_images/{row['image_id']}.jpg", question, row["answers"])


def read_refcoco(name: str, refs: str, root: Path, unit: str = "") -> Iterator[Item]:
    """RefCOCO, RefCOCO+, RefCOCOg val: a question for each sentence. Boxes that the model is to write are fractions of
    the sides; what it is to point at is in pixels."""
    for ref in (ref for ref in data.refs(root / name / refs) if ref.split == "val"):
        truth = [round(pixel / side, 2) for pixel, side in zip(ref.box, 2 * ref.size)]
        if unit:
            truth = {unit: [ref.box if unit == "box" else data.run_lengths(data.read_mask(ref.mask, ref.size))]}
        for key, sentence in ref.sentences.items():
            yield Item(key, root / "coco/train2014" / ref.image, sentence, truth, as_stored=True)


def read_ocid_ref(root: Path) -> Iterator[Item]:
    """OCID-Ref val; its parts are how cluttered the scene is."""
    for key, row in read_json(root / "ocid-ref/val_expressions.json").items():
        clutter = "minimum" if int(row["take_id"]) < 10 else "medium" if int(row["take_id"]) < 17 else "maximum"
        truth = [round(pixel / side, 2) for pixel, side in zip(json.loads(row["bbox"]), 2 * (640, 480))]
        image = root / "ocid-ref/OCID-dataset" / row["scene_path"]
        yield Item(key, image, row["sentence"], truth, part=clutter, as_stored=True)


def read_vsr(root: Path) -> Iterator[Item]:
    """VSR zero-shot test; the line's number, from 0, is the question's id."""
    for number, row in enumerate(read_json(root / "vsr/test.jsonl", rows=True)):
        yield Item(number, root / "vsr/images" / row["image"], row["caption"], (1, 0)[row["label"]])


def read_tallyqa(root: Path) -> Iterator[Item]:
    """TallyQA test: how many, from 0 to 15."""
    numbers = [str(number) for number in range(16)]
    for row in read_json(root / "tallyqa/test.json"):
        part = "simple" if row["issimple"] else "complex"
        yield Item(row["question_id"], root / "vg" / row["image"], row["question"], row["answer"], numbers, part)


def read_ai2d(root: Path) -> Iterator[Item]:
    """AI2D val and test: diagrams, four answers to choose from."""
    test = set(read_text(root / "ai2d/ai2d_test_ids.csv").split())
    for path in sorted((root / "ai2d/questions").glob("[!.]*.json")):
        diagram = read_json(path)
        image, part = root / "ai2d/images" / diagram["imageName"], "test" if path.name.split(".")[0] in test else "val"
        for question, row in diagram["questions"].items():
            yield Item(row["questionId"], image, question, row["correctAnswer"], row["answerTexts"], part)


def read_pope(root: Path) -> Iterator[Item]:
    """POPE, three splits; a question's id is "adversarial-1"."""
    for part in BENCHMARKS["pope"].parts:
        for row in read_json(root / f"pope/coco_pope_{part}.json", rows=True):
            image, truth = root / "coco/val2014" / row["image"], ("yes", "no").index(row["label"])
            yield Item(f"{part}-{row['question_id']}", image, row["text"], truth, part=part)


def read_scenes(kind: str, root: Path) -> Iterator[Item]:
    """The questions of one kind that demo/scenes.py wrote; a row is a conversation in LLaVA's format."""
    truth = {"presence": ("Yes", "No").index, "refer": parse_box}.get(kind, str)
    for row in (row for row in read_json(root / "questions.json") if row["kind"] == kind):
        question, answer = (turn["value"].replace("<image>", "").strip() for turn in row["conversations"])
        targets = row.get("targets", {})
        regions = pixels(targets.pop("region", ()))
        yield Item(row["id"], root / row["image"], question, targets or truth(answer), regions=regions)


# --- the benchmarks (table 8) -----------------------------------------------------------------------------------------

SHORT = "{q}\nAnswer the question using a single word or phrase."
VIZWIZ = SHORT.replace("\n", "\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n")
BOX = 'Please provide the bounding box coordinate of the region this sentence describes: "{q}"'
VSR = 'Based on the image, is this statement "True" or "False"? {q}\nRespond with "True" or "False" directly.'
LETTER = "{q}\n{options}\nAnswer with the option's letter from the given choices directly."
SCENES = "questions.json, images/test/ (python demo/scenes.py DIR)"
CHOICE = dict(kind="choice", metrics=aucs, score=lambda probabilities, truth: float(np.argmax(probabilities) == truth))
BOXES = dict(kind="box", metrics=lambda items, answers: {"readable": len([*filter(parse_box, answers)]) / len(items)})
YES, TRUE = dict(choices=("Yes", "No"), **CHOICE), dict(choices=("True", "False"), **CHOICE)
HALF = dict(score=partial(box_found, 0.5), **BOXES)
AT_BOX = dict(kind="places", score=partial(pointed, 0.5), metrics=lambda items, answers: {
    "at 0.75": float(np.mean([pointed(0.75, answer, item.truth) for item, answer in zip(items, answers)]))})
AT_MASK = dict(kind="places", score=partial(pointed, 0.0), metrics=lambda items, answers: {
    "cIoU": cumulative_iou(items, answers)})
ALL = dict(kind="places", score=pointed_all)
REFCOCO = (("refcoco", "RefCOCO", "refs(unc).p"), ("refcoco+", "RefCOCO+", "refs(unc).p"),
           ("refcocog", "RefCOCOg", "refs(umd).p"))
BENCHMARKS: dict[str, Benchmark] = {
    "vqav2": Benchmark(
        "VQAv2", read_vqav2, "vqav2/: v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json "
        "(visualqa.org); coco/val2014/ (cocodataset.org)", SHORT, partial(vqa_accuracy, "vqav2"),
        metrics=lambda items, answers: {"by today's program": float(np.mean([
            vqa_accuracy("vqav2", answer, item.truth, today=True) for item, answer in zip(items, answers)]))}),
    "gqa": Benchmark(
        "GQA", read_gqa, "gqa/: testdev_balanced_questions.json, images/ (cs.stanford.edu/people/dorarad/gqa)", SHORT),
    "vizwiz": Benchmark("VizWiz", read_vizwiz, "vizwiz/: val.json, val/ (vizwiz.org)", VIZWIZ,
                        partial(vqa_accuracy, "vizwiz"), parts=("answerable", "unanswerable"), metrics=unanswerable),
    **{name: Benchmark(
        title, partial(read_textvqa, ocr), "textvqa/: TextVQA_0.5.1_val.json, train_images/ (textvqa.org), "
        "llava_textvqa_val_v051_ocr.jsonl (github.com/haotian-liu/LLaVA)", SHORT, partial(vqa_accuracy, "textvqa"))
       for name, title, ocr in (("textvqa", "TextVQA", False), ("textvqa-ocr", "TextVQA + OCR", True))},
    **{name: Benchmark(
        title, partial(read_refcoco, name, refs), f"{name}/: instances.json, {refs} (github.com/lichengunc/refer); "
        "coco/train2014/ (cocodataset.org)", BOX, **HALF) for name, title, refs in REFCOCO},
    "ocid-ref": Benchmark(
        "OCID-Ref", read_ocid_ref, "ocid-ref/: val_expressions.json (github.com/lluma/OCID-Ref), OCID-dataset/ "
        "(acin.tuwien.ac.at)", BOX, partial(box_found, 0.25), parts=("minimum", "medium", "maximum"), **BOXES),
    "vsr": Benchmark("VSR", read_vsr, "vsr/: test.jsonl, images/ (github.com/cambridgeltl/visual-spatial-reasoning, "
                     "zero-shot)", VSR, **TRUE),
    "tallyqa": Benchmark(
        "TallyQA", read_tallyqa, "tallyqa/: test.json (github.com/manoja328/TallyQA_dataset); vg/: VG_100K/, "
        "VG_100K_2/ (visualgenome.org)", LETTER, parts=("simple", "complex"), headline="parts", **CHOICE),
    "ai2d": Benchmark("AI2D", read_ai2d, "ai2d/: questions/, images/, ai2d_test_ids.csv (prior.allenai.org/projects/"
                      "diagram-understanding)", LETTER, parts=("val", "test"), **CHOICE),
    "pope": Benchmark(
        "POPE", read_pope, "pope/: coco_pope_{adversarial,popular,random}.json (github.com/RUCAIBox/POPE, output/coco)"
        "; coco/val2014/ (cocodataset.org)", SHORT, headline="mean", parts=("adversarial", "popular", "random"), **YES),
    **{f"scenes-{kind}": Benchmark(title, partial(read_scenes, kind), SCENES, "{q}", **how) for kind, title, how in (
       ("presence", "presence", YES), ("count", "counting", {}), ("color", "color", {}),
       ("relation", "relation", dict(score=concluded)), ("where", "position", {}), ("at", "patch", {}),
       ("refer", "referring", HALF), ("caption", "caption", {}),
       ("refer-box", "referring by box", AT_BOX), ("refer-mask", "referring by mask", AT_MASK),
       ("all-box", "all of a kind by boxes", ALL), ("all-mask", "all of a kind by masks", ALL),
       ("region", "region", {}))},
}  # fmt: skip
BENCHMARKS |= {f"{name}-{unit}": Benchmark(f"{title}, {unit}", partial(read_refcoco, name, refs, unit=unit),
                                           BENCHMARKS[name].files, f"Where is {{q}}? Point with a {unit}.", **how)
               for name, title, refs in REFCOCO for unit, how in (("box", AT_BOX), ("mask", AT_MASK))}
# For models trained with --units; not the paper's
POINTING = [name for name, benchmark in BENCHMARKS.items() if benchmark.kind == "places"] + ["scenes-region"]
KEYS = {"text": "answer", "box": "answer", "choice": "probabilities", "places": "answer"}  # kind -> its name in files


# --- answers, report, comparison --------------------------------------------------------------------------------------

def results(folder: Path, names: Sequence[str] = tuple(BENCHMARKS)) -> dict[str, dict]:
    """The finished benchmarks in a folder: name -> the contents of its file."""
    found = {name: read_json(file) for name in names if (file := folder / f"{name}.json").exists()}
    for name, result in found.items():
        if not isinstance(result, dict) or not {"settings", "rows", "answers"} <= result.keys():
            raise ValueError(f"{folder / name}.json: was not written by eval.py; move it, or choose another --out")
    return found


def known_answers(out: Path, name: str, settings: dict) -> dict[str, Answer]:
    """Question -> answer, from a finished benchmark's file, or from the parts of an interrupted one."""
    rows = [row for result in results(out, [name]).values() for row in (result, *result["answers"])]
    for part in sorted(out.glob(f"{name}.rank-*.jsonl")):
        for line in part.read_text(encoding="utf-8").split("\n"):
            with suppress(ValueError):  # a killed process leaves an unfinished line, whose question is asked again
                rows.append(json.loads(line))
    for then in (row["settings"] for row in rows if "settings" in row):
        if other := " and ".join(key for key in sorted(then | settings) if then.get(key) != settings.get(key)):
            raise ValueError(f"{out}: its answers to {name} were made with other {other}; choose another --out")
    return {row["id"]: row[KEYS[BENCHMARKS[name].kind]] for row in rows if "id" in row}


def make_batches(items: list[Item], size: int) -> list[list[Item]]:
    """Batches that keep an image's questions together, the longest first, no matter what is answered already."""
    longest = {item.image: len(item.prompt) for item in sorted(items, key=lambda item: len(item.prompt))}
    order = sorted(items, key=lambda item: (-longest[item.image], item.image))
    return [order[start : start + size] for start in range(0, len(order), size)]


def ask(model: vlm.VLM, name: str, batches: list[list[Item]], settings: dict, file: Path, rank: int) -> None:
    """Ask the questions of a benchmark, and append each batch's answers to a file as soon as they are there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kind, bar = BENCHMARKS[name].kind, run.bar(BENCHMARKS[name].title, sum(map(len, batches)), rank, unit="question")
    with bar, open(file, "a", encoding="utf-8", buffering=1) as part, ThreadPoolExecutor(4) as readers:
        part.write("\n" + json.dumps({"settings": settings}) + "\n")  # a new line: the last one may be unfinished
        for batch in batches:
            items = {item.image: item for item in batch}
            opened = dict(zip(items, readers.map(Item.picture, items.values())))  # each image is read once
            images, prompts = [opened[item.image] for item in batch], [item.prompt for item in batch]
            regions = [item.regions for item in batch]
            if kind == "choice":
                answers = model.score(images, prompts, [item.choices for item in batch])
            elif kind == "places":
                answers = []
                for text, triplets in model.ground(images, prompts, 128, regions):
                    found = [x for triplet in triplets if triplet.places is not None for x in triplet.places.cpu()]
                    found = [x.tolist() if x.ndim == 1 else data.run_lengths(x.numpy()) for x in found]  # boxes, masks
                    answers.append({"text": text, "places": found})
            else:
                answers = model.generate(images, prompts, max_new_tokens=128, regions=regions)  # greedy
            part.write("".join(json.dumps({"id": item.id, KEYS[kind]: a}) + "\n" for item, a in zip(batch, answers)))
            bar.update(len(batch))


def rows_of(benchmark: Benchmark, parts: Sequence[str]) -> dict[str, Groups]:
    """What is reported, the headline first: a row's name -> its groups of questions, by their index."""
    each = {part: np.flatnonzero(np.array(parts) == part) for part in benchmark.parts if part in parts}
    rows = {f"{benchmark.title}, {part}": [places] for part, places in each.items()}
    whole = list(each.values()) if benchmark.headline == "mean" else [np.arange(len(parts))]
    return rows if benchmark.headline == "parts" else {benchmark.title: whole} | rows


def mean(groups: Groups) -> float:
    """The mean of the groups' means."""
    return float(np.mean([scores.mean() for scores in groups]))


def bootstrap(groups: Groups) -> list[float]:
    """The 95% interval of that mean, with questions drawn again from each group, by how often each score occurs."""
    rng, means, draws = data.generator("bootstrap"), 0.0, 10_000
    for scores in groups:
        values, counts = np.unique(scores, return_counts=True)
        means += rng.multinomial(len(scores), counts / len(scores), draws) @ values / len(scores)
    return np.quantile(means / len(groups), (0.025, 0.975)).tolist()


def report(name: str, items: list[Item], by_id: dict[str, Answer], settings: dict, out: Path, show: int | None) -> None:
    """Score a benchmark's answers, write its file, and draw `show` of the failures."""
    benchmark, answers, rows = BENCHMARKS[name], [by_id[item.id] for item in items], {}
    scores = np.array([benchmark.score(a, item.truth) for a, item in zip(answers, items)])
    for row, groups in rows_of(benchmark, [item.part for item in items]).items():
        places, of_row = np.concatenate(groups), [scores[group] for group in groups]
        metrics = benchmark.metrics([items[i] for i in places], [answers[i] for i in places])
        rows[row] = {"questions": len(places), "score": mean(of_row), "interval": bootstrap(of_row), "metrics": metrics}
    lines = [{"id": item.id, "part": item.part, KEYS[benchmark.kind]: a} for item, a in zip(items, answers)]
    lines = [json.dumps(line | {"score": score}) for line, score in zip(lines, scores.tolist())]
    text = json.dumps({"benchmark": name, "settings": settings, "rows": rows})[:-1] + ', "answers": [\n'
    run.write(out / f"{name}.json", text + ",\n".join(lines) + "\n]}\n")
    for part in out.glob(f"{name}.rank-*.jsonl"):
        part.unlink()
    if show and (scores < 0.5).any():
        wrong = sorted(data.generator("failures").permutation(np.flatnonzero(scores < 0.5))[:show])
        cards = [failure(benchmark.kind, items[i], answers[i]) for i in wrong]
        pictures.grid([cards[i : i + 4] for i in range(0, len(cards), 4)], gap=12).save(out / f"{name}-failures.png")


def failure(kind: str, item: Item, answer: Answer) -> Image.Image:
    """A picture of one wrong answer; of boxes and masks, the true ones are green and the model's red."""
    image, truth, names, places = item.picture(), item.truth, item.options or item.choices, []
    if kind == "choice":
        answer, truth = f"{names[int(np.argmax(answer))]} ({max(answer):.0%})", names[truth]
    elif kind == "box":
        boxes = ("lime", truth), ("red", parse_box(answer))
        places = [(color, [np.multiply(box, 2 * image.size)]) for color, box in boxes if box]
    elif kind == "places":
        places = [("lime", pixels(*truth.values())), ("red", pixels(answer["places"]))]
        answer, truth = answer["text"], ", ".join(truth)
    lines = [(item.question, "black"), (f"answer: {answer}", "red"), (f"truth: {truth}", "green")]
    return pictures.card(pictures.point(image, places), lines)


def conclude(out: Path) -> None:
    """Write results.md of all finished benchmarks in a folder; print its table and what comes next."""
    lines = []
    for name, row in (pair for result in results(out).values() for pair in result["rows"].items()):
        score, low, high = (f"{100 * value:.2f}" for value in (row["score"], *row["interval"]))
        more = ", ".join(f"{metric} {100 * value:.2f}" for metric, value in row["metrics"].items() if value is not None)
        lines.append([name, f"{row['questions']:,}", score, f"{low} to {high}", more])
    text = pictures.table(["benchmark", "questions", "score, %", "95% interval", "other metrics, %"], lines)
    run.write(out / "results.md", f"# {out.name}\n\n{text}\n")
    print(f"\n{text}\n\nresults         {out}\nnext            python eval.py compare {out} {out.parent / 'ANOTHER'}")


def paired(models: dict[str, dict[str, dict]]) -> dict[str, list[Groups]]:
    """The rows of the benchmarks that all models have -> each model's groups of scores, question by question."""
    rows, (first, *_) = {}, models.values()
    for name in [name for name in BENCHMARKS if all(name in found for found in models.values())]:
        groups = rows_of(BENCHMARKS[name], [row["part"] for row in first[name]["answers"]])
        for found in models.values():
            if found[name]["settings"]["questions"] != first[name]["settings"]["questions"]:
                raise ValueError(f"{name}: the models were asked other questions; give the same --data and --limit")
            scores = np.array([row["score"] for row in found[name]["answers"]])
            for row, of_row in groups.items():
                rows.setdefault(row, []).append([scores[places] for places in of_row])
    if not rows:
        raise ValueError(f"{', '.join(models)}: have no results in common; evaluate all on the same benchmarks")
    return rows


def compare(folders: Sequence[str], out: Path, each: int | None) -> None:
    """Tables of scores, differences and z-scores, and figure 5's radar charts, `each` models in a chart."""
    named = [(text if "=" in text else f"{Path(text).name}={text}").split("=", 1) for text in folders]
    models = {name: results(Path(folder)) for name, folder in named}
    if len(models) < len(named):
        raise ValueError(f"two of {', '.join(folders)} have the same name; give names, as NAME=FOLDER")
    names, rows, lines, clear = list(models), paired(models), [], set()
    for row, (base, *others) in rows.items():
        lines.append([row, *(f"{100 * mean(groups):.2f}" for groups in (base, *others))])
        for change in ([b - a for a, b in zip(base, groups)] for groups in others):
            low, high = bootstrap(change)
            lines[-1].append(f"{100 * mean(change):+.2f} ({100 * low:+.2f} to {100 * high:+.2f})")
            clear |= {row} if low > 0 or high < 0 else set()
    axes = {f"{b.title}, {part}" for b in BENCHMARKS.values() if b.headline == "parts" for part in b.parts}
    axes |= {b.title for b in BENCHMARKS.values() if b.headline != "parts"}
    pool = {row: np.array([mean(groups) for groups in models]) for row, models in rows.items() if row in axes}
    z = {row: (x - x.mean()) / x.std() if np.ptp(x) > 0 else 0 * x for row, x in pool.items()}  # [models] of each axis
    z_lines = [[row, *(f"{value:+.2f}" for value in x)] for row, x in [*z.items(), ("mean", np.mean([*z.values()], 0))]]
    text = pictures.table(["score, %", *names, *(f"{name} - {names[0]} (95% interval)" for name in names[1:])], lines)
    text += "\n\n" + pictures.table(["standard deviations above the mean", *names], z_lines)
    run.write(out / "compare.md", f"# {', '.join(names)}\n\n{text}\n")
    print(f"{text}\n\nresults         {out}")
    if len(z) > 2:  # a radar chart needs three axes
        axes = [f"{row}\n{100 * x.min():.1f} - {100 * x.max():.1f}" for row, x in pool.items()]
        faint = [axis for row, axis in zip(pool, axes) if row not in clear]  # no difference can be told
        reach, series = 0.5 * np.ceil(2 * np.abs([*z.values()]).max() + 1), dict(zip(names, zip(*z.values())))
        parts = [names[i : i + (each or len(names))] for i in range(0, len(names), each or len(names))]
        charts = [pictures.radar(axes, {name: series[name] for name in part}, reach, faint=faint) for part in parts]
        pictures.grid([charts]).save(out / "radar.png", dpi=(300, 300))


def read_answers(path: Path, name: str, items: list[Item]) -> dict[str, Answer]:
    """Another program's answers: a list of {"id", "answer"}, for choices {"id", "probabilities"}, or eval.py's file.
    (An answer that points is {"text", "places"}.)"""
    kind, rows = BENCHMARKS[name].kind, read_json(path)
    key, rows = KEYS[kind], rows.get("answers") if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) and {"id", key} <= row.keys() for row in rows):
        raise ValueError(f'{path}: give a list of {{"id", "{key}"}}')
    asked, given = Counter(item.id for item in items), Counter(str(row["id"]) for row in rows)
    if odd := (asked - given) | (given - asked):
        raise ValueError(f"{path}: id {min(odd)} lacks an answer, has two, or is no question's; is --limit the same?")
    answers = {str(row["id"]): row[key] for row in rows}
    for item in items:
        value, n, good, wanted = answers[item.id], len(item.choices), isinstance(answers[item.id], str), "a text"
        if kind == "choice":
            good = isinstance(value, list) and len(value) == n and all(type(p) in (int, float) for p in value)
            good = good and min(value) >= 0 and abs(sum(value) - 1) < 1e-3
            wanted = f"{n} probabilities with the sum 1"
        elif kind == "places":
            good, wanted = isinstance(value, dict) and {"text", "places"} <= value.keys(), '{"text", "places"}'
        if not good:
            raise ValueError(f"{path}, id {item.id}: give {wanted}")
    return answers


def main(argv: Sequence[str] | None = None) -> None:
    """Options, questions, answers, report; or the commands compare, score and list."""
    parser = argparse.ArgumentParser("eval.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("words", nargs="*", metavar="MODEL", help=f"train_vlm.py's --out (default: {MODEL}); or a command, as above")
    add("--benchmarks", help="separated by commas; default: all of the paper's with --data, else the built-in scenes'")
    add("--data", type=Path, help="the folder with the benchmarks' files, see `eval.py list`; default: built-in scenes")
    add("--limit", type=run.number(1), help="ask this many questions of each, the same random ones every time")
    add("--batch", type=run.number(1), default=32, help="questions in a batch (default: 32)")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 on a GPU that has it")
    add("--show", type=run.number(1), help="draw this many failures of each benchmark")
    add("--each", type=run.number(1), help="compare: models in each radar chart; default: all in one")
    add("--out", type=Path, help=f"where everything is written; default: a folder in {RESULTS}")
    o = parser.parse_args(argv)
    command = o.words.pop(0) if o.words and o.words[0] in ("compare", "score", "list") else "run"
    if len(o.words) not in {"run": (0, 1), "compare": range(2, 100), "score": (2,), "list": (0,)}[command]:
        parser.error("give MODEL, or compare FOLDER FOLDER ..., or score BENCHMARK ANSWERS, or list")
    if command == "list":
        rows = [[f"`{name}`", b.title, b.files] for name, b in BENCHMARKS.items()]
        return print(pictures.table(["name", "benchmark", "files in --data (from)"], rows))
    if command == "compare":
        return compare(o.words, o.out or RESULTS / "compare", o.each)
    default = [name for name in BENCHMARKS if name.startswith("scenes-") != bool(o.data) and name not in POINTING]
    names = o.words[:1] if command == "score" else o.benchmarks.split(",") if o.benchmarks else default
    for name in names:
        if name not in BENCHMARKS:
            parser.error(f"benchmark {name}: unknown; choose from {', '.join(BENCHMARKS)}")
        if not o.data and not name.startswith("scenes-"):
            parser.error(f"benchmark {name} needs in --data {BENCHMARKS[name].files}")

    # The questions, so that a missing file shows before the first answer
    rank, world, device = run.setup(timeout=timedelta(days=100))  # fast processes wait for the slowest
    if not o.data:
        from demo import scenes
        o.data = run.on_first(scenes.ensure)
    asked = {name: questions(name, o.data, o.limit) for name in names}

    # Who answers them: a model or a file
    path, model = Path(o.words[-1]) if o.words else MODEL, None
    if command == "score":
        title, made_with = path.stem, {"answers": str(path.resolve())}
    else:
        folder = (path / "model" if (path / "model").is_dir() else path).resolve()
        title, file = folder.parent.name if folder.name == "model" else folder.name, folder / "model.safetensors"
        if not file.exists():
            raise ValueError(f"{file}: missing; make it with python train_vlm.py, or give a folder that it wrote")
        torch.set_float32_matmul_precision("highest")  # no TF32: a score should not depend on the device
        torch.backends.cudnn.allow_tf32 = False
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if o.precision == "bf16" or o.precision == "auto" and native else torch.float32
        made_with = {"weights": [file.stat().st_size, file.stat().st_mtime_ns], "precision": str(dtype)}
    out = o.out or RESULTS / title

    # The answers: each process asks its share of the batches, and the first one reports
    for name, items in asked.items():
        text = json.dumps([(item.id, item.prompt, item.choices, item.truth) for item in items])
        settings = made_with | {"questions": zlib.crc32(text.encode())}
        answers = run.on_first(lambda: known_answers(out, name, settings))
        if command == "score":
            answers = read_answers(path, name, items)
        elif batches := [b for b in make_batches(items, o.batch) if any(item.id not in answers for item in b)]:
            model = model or vlm.load(folder, dtype, device)
            ask(model, name, batches[rank::world], settings, out / f"{name}.rank-{rank}.jsonl", rank)
            run.barrier()
            answers = run.on_first(lambda: known_answers(out, name, settings))
        run.on_first(lambda: report(name, items, answers, settings, out, o.show))
    run.on_first(lambda: conclude(out))


if __name__ == "__main__":
    with run.ended("eval.py"):
        main()
