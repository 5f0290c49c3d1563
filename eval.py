"""The benchmarks of figure 5 and table 8: what does a vision-language model see, and where?

    python eval.py                                                    # the demo's model on built-in scenes, minutes
    python eval.py MODEL --benchmarks vqav2,gqa --data DIR            # without --benchmarks: all that need files
    torchrun --nproc-per-node 8 eval.py MODEL --data DIR              # the questions are shared out
    python eval.py compare runs/eval/a runs/eval/b                    # differences with intervals, z-scores, radar chart
    python eval.py score gqa answers.json --data DIR                  # the answers of another program
    python eval.py list                                               # the benchmarks, and which files go where in DIR

Writes to --out: a file for each benchmark with all answers and scores, results.md, and pictures of failures (--show).
An evaluation that was interrupted goes on with the same command. The file reads from top to bottom: questions, scores,
readers, the table of benchmarks, answering, report, comparison, the commands. A new benchmark is a reader and an entry
of BENCHMARKS; `read_gqa` and "gqa" are the shortest to copy.
"""

import argparse
import ast
import json
import math
import os
import pickle
import re
import string
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import data
import vlm

MODEL, RESULTS = Path("runs") / "vlm", Path("runs") / "eval"
SCENES, SCENE_SEED = 500, 3_000_017  # scenes of 64 pixels that no training, alignment or probe has seen
Answer = str | list[float]  # what the model wrote, or the probability of each choice
Metrics = dict[str, float | None]  # None: there is nothing to measure


class EvalError(RuntimeError):
    """The evaluation cannot start or go on; the message says why and what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# Questions


@dataclass
class Item:
    """One question, as a reader gives it; `prompt` and `choices` are filled in from the benchmark's entry."""

    id: str | int
    image: Path | Image.Image
    question: str
    truth: object  # text: the answer, or the ten of VQA; box: [x1, y1, x2, y2]; choice: the number of the right one
    options: Sequence[str] = ()  # what the letters A, B... stand for
    part: str = ""  # the split or kind that is reported apart
    prompt: str = ""
    choices: Sequence[str] = ()

    @property
    def image_key(self) -> str | int:
        """What tells its image from others."""
        return id(self.image) if isinstance(self.image, Image.Image) else str(self.image)

    def picture(self) -> Image.Image:
        """The image. EvalError if it cannot be read."""
        try:
            image = self.image if isinstance(self.image, Image.Image) else Image.open(self.image)
            image.load()
            return image
        except Exception as error:  # on damaged files Pillow raises nearly every kind
            raise EvalError(f"{self.image}: cannot be read ({type(error).__name__}); download it again") from None


@dataclass(frozen=True)
class Benchmark:
    """An entry of BENCHMARKS."""

    title: str
    read: Callable[[Path], Iterator[Item]]  # from the folder --data
    prompt: str  # {q}: the question, {options}: "A. ..." and so on
    kind: str  # of answer: text, box (a text that reads as one), choice (the most probable)
    score: Callable[[Answer, object], float]  # (answer, truth) -> 0 to 1
    files: str = ""  # what is needed in --data
    source: str = ""  # where that comes from
    choices: Sequence[str] = ()  # none: the letters of the question's options
    parts: Sequence[str] = ()  # what is reported apart
    headline: str = "all"  # figure 5 shows the mean over all questions, the mean of the parts, or the parts
    metrics: Callable[[list[Item], list[Answer]], Metrics] = lambda items, answers: {}  # what else is measured

    @property
    def key(self) -> str:
        """How answers are called in files."""
        return "probabilities" if self.kind == "choice" else "answer"


def questions(name: str, root: str | None, limit: int | None) -> list[Item]:
    """The questions of a benchmark, complete; of more than `limit` the same random ones every time.

    EvalError: a file or an image is missing (which, and where to get it), or is not what it should be.
    """
    benchmark, items, letters = BENCHMARKS[name], [], string.ascii_uppercase
    need = f"{benchmark.title} needs {benchmark.files} in --data, from {benchmark.source}"
    try:
        for item in benchmark.read(Path(root or "")):
            options = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, item.options))
            choices = tuple(benchmark.choices or letters[: len(item.options)])
            if benchmark.kind == "choice" and item.truth not in range(len(choices)):
                raise ValueError(f"the right choice is number {item.truth} of {len(choices)}")
            prompt = benchmark.prompt.format(q=item.question, options=options)
            items.append(replace(item, id=str(item.id), prompt=prompt, choices=choices))
        if len({item.id for item in items}) < max(1, len(items)):
            raise ValueError("two questions have one id" if items else "there is none")
    except FileNotFoundError as error:
        raise EvalError(f"{error.filename}: is missing; {need}") from None
    except EvalError as error:
        raise EvalError(f"{error}; {need}") from None
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        what = f"{root}: question {len(items) + 1} of {benchmark.title} is not as distributed"
        raise EvalError(f"{what} ({type(error).__name__}: {error}); {need}") from None
    if limit and limit < len(items):
        items = [items[i] for i in sorted(data.generator(f"questions of {name}").permutation(len(items))[:limit])]
    for path in sorted({item.image for item in items if isinstance(item.image, Path)}):
        if not path.exists():
            raise EvalError(f"{path}: this image is missing; {need}")
    return items


# ----------------------------------------------------------------------------------------------------------------------
# Scores


@cache
def normalization(benchmark: str) -> dict:
    """The tables of the official scorer of "vqav2", "vizwiz" or "textvqa"."""
    return json.loads((Path(__file__).parent / "vqa_normalization.json").read_text(encoding="utf-8"))[benchmark]


def strip_punctuation(text: str, tables: dict) -> str:
    """Marks become nothing or a space, and periods that stand before no digit go; the official scorers' very steps."""
    result, numbers = text, re.search(tables["comma"], text) is not None
    for mark in tables["punctuation"]:
        result = result.replace(mark, "" if numbers or mark + " " in text or " " + mark in text else " ")
    # at most 32 periods: the official scorers pass the flag re.UNICODE in place of the count
    return re.sub(tables["period"], "", result, count=int(re.UNICODE))


def normalize(text: str, benchmark: str, truth: bool = False) -> str:
    """An answer as the benchmark's official scorer compares it. Each treats the true ones differently: VQAv2 takes their
    punctuation alone, VizWiz leaves them as they are, TextVQA treats them as it does the prediction."""
    tables = normalization(benchmark)
    if truth and benchmark != "textvqa":
        return strip_punctuation(text, tables) if benchmark == "vqav2" else text
    if benchmark == "textvqa":
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip(), tables)
    words = [tables["numbers"].get(word, word) for word in text.lower().split()]  # "two" -> "2"
    return " ".join(tables["contractions"].get(word, word) for word in words if word not in tables["articles"])


def vqa_accuracy(benchmark: str, answer: str, truths: Sequence[str]) -> float:
    """VQA accuracy: each of the ten people is left out in turn; three of the other nine make an answer right."""
    answer = normalize(answer, benchmark)
    equal, total = [normalize(truth, benchmark, truth=True) == answer for truth in truths], 0.0
    for one in equal:  # not sum(), which newer Pythons round differently from the official scorers
        total += min(1, (sum(equal) - one) / 3)
    return total / len(equal)


def exact_match(answer: str, truth: str) -> float:
    """1 where both are equal but for case and punctuation."""
    answer, truth = (text.lower().translate(str.maketrans("", "", string.punctuation)).strip() for text in (answer, truth))
    return float(answer == truth)


def parse_box(text: str) -> list[float] | None:
    """[x1, y1, x2, y2], shares of width and height from the upper left corner; None for anything else."""
    try:
        box = ast.literal_eval(text.strip()) if re.fullmatch(r"\s*\[[-+.\deE,\s]*\]\s*", text) else []
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # the latter two: of thousands of signs in a row
        return None
    return box if len(box) == 4 and 0 <= box[0] <= box[2] <= 1 and 0 <= box[1] <= box[3] <= 1 else None


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    both = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union > 0 else 0.0


def box_found(threshold: float, answer: str, truth: Sequence[float]) -> float:
    """1 where the answer is a box that overlaps the true one enough."""
    box = parse_box(answer)
    return float(box is not None and iou(box, truth) >= threshold)


def chosen(probabilities: Sequence[float], truth: int) -> float:
    """1 where the most probable choice is the right one."""
    return float(np.argmax(probabilities) == truth)


# Metrics beside the score


def roc_auc(positive: np.ndarray, score: np.ndarray) -> float | None:
    """Area under the ROC curve: how often a positive [n] scores above a negative one, ties counting half."""
    count = int(positive.sum())
    if count in (0, len(positive)):
        return None
    _, place, ties = np.unique(score, return_inverse=True, return_counts=True)
    ranks = np.cumsum(ties) - (ties - 1) / 2  # the mean rank of equal scores
    return float((ranks[place[positive]].sum() - count * (count + 1) / 2) / (count * (len(positive) - count)))


def average_precision(positive: np.ndarray, score: np.ndarray) -> float | None:
    """The mean over positives [n] of the precision at their own scores."""
    if positive.sum() in (0, len(positive)):
        return None
    _, place, ties = np.unique(-score, return_inverse=True, return_counts=True)  # the highest score first
    found = np.bincount(place, positive)
    return float((found / positive.sum() * found.cumsum() / ties.cumsum()).sum())


def aucs(items: list[Item], answers: list[Answer]) -> Metrics:
    """Two choices: the first one is the positive class. More: ROC one against one, precision one against the rest, the
    mean over (pairs of) choices that are right somewhere; scikit-learn's "ovo" and "macro"."""
    truth, p = np.array([item.truth for item in items]), np.array(answers)  # [n], [n, choices]
    there = [0] if p.shape[1] == 2 else np.unique(truth).tolist()
    pairs = [(0, 1)] if p.shape[1] == 2 else [(a, b) for a in there for b in there if a != b]
    among = [(np.isin(truth, pair), pair[0]) for pair in pairs]
    areas = [roc_auc(truth[rows] == a, p[rows, a]) for rows, a in among]
    precisions = [average_precision(truth == a, p[:, a]) for a in there]
    measured = bool(areas) and None not in areas + precisions
    return {"ROC AUC": float(np.mean(areas)) if measured else None, "AP": float(np.mean(precisions)) if measured else None}


def unanswerable(items: list[Item], answers: list[Answer]) -> Metrics:
    """VizWiz: how well the answer "unanswerable" finds the questions that are."""
    positive = np.array([item.part == "unanswerable" for item in items])
    said = np.array([normalize(answer, "vizwiz") == "unanswerable" for answer in answers])
    precision, both = average_precision(positive, said.astype(float)), (positive & said).sum()
    f1 = None if precision is None else float(2 * both / (positive.sum() + said.sum()))
    return {"unanswerable AP": precision, "unanswerable F1": f1}


def readable(items: list[Item], answers: list[Answer]) -> Metrics:
    """Boxes: the share of answers that read as one."""
    return {"readable": sum(parse_box(answer) is not None for answer in answers) / len(items)}


# ----------------------------------------------------------------------------------------------------------------------
# Readers, each of the files that a benchmark's authors distribute


def read_json(path: Path, line: str | None = None) -> dict | list:
    """The contents of a JSON file, or of a line of it."""
    try:
        return json.loads(path.read_text(encoding="utf-8") if line is None else line)
    except ValueError as error:
        where = f"{path}, {line[:40]!r}" if line else path
        raise EvalError(f"{where}: is no JSON ({error})") from None


def read_lines(path: Path) -> list[dict]:
    """The contents of a file with a JSON object on each line."""
    return [read_json(path, line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


class PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, strings and numbers. A pickle that names a class or function could run any code."""

    def find_class(self, module: str, name: str) -> object:
        """Refuses."""
        raise pickle.UnpicklingError(f"it names {module}.{name}, where plain lists, dicts, strings and numbers belong")


def read_pickle(path: Path) -> list[dict]:
    """The contents of a plain pickle, as Python 2 wrote it."""
    with open(path, "rb") as file:
        try:
            return PlainUnpickler(file, encoding="utf-8", errors="replace").load()
        except Exception as error:  # a damaged pickle can fail in any way
            raise EvalError(f"{path}: is refused ({error})") from None


def share_box(corners: Sequence[float], width: int, height: int) -> list[float]:
    """x1, y1, x2, y2 in pixels as shares of the sides, rounded as models are taught to write them."""
    return [round(side / whole, 2) for side, whole in zip(corners, (width, height, width, height))]


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
    """VizWiz val; a question is called as its image."""
    for row in read_json(root / "vizwiz/val.json"):
        part = "answerable" if row["answerable"] else "unanswerable"
        truths = [one["answer"] for one in row["answers"]]
        yield Item(row["image"], root / "vizwiz/val" / row["image"], row["question"], truths, part=part)


def read_textvqa(ocr: bool, root: Path) -> Iterator[Item]:
    """TextVQA val, with the words that an OCR system read, as LLaVA's file has them, or without."""
    rows = read_json(root / "textvqa/TextVQA_0.5.1_val.json")["data"]
    texts = read_lines(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl")  # in the same order
    for row, other in zip(rows, texts, strict=True):
        if Path(other["image"]).stem != row["image_id"]:
            raise ValueError(f"image {row['image_id']} here, {other['image']} in the file with OCR tokens")
        question = other["text"].rsplit("\n", 1)[0]  # the last line is LLaVA's instruction
        question = question if ocr else question.split("\nReference OCR token:")[0]
        yield Item(row["question_id"], root / f"textvqa/train_images/{row['image_id']}.jpg", question, row["answers"])


def read_refcoco(name: str, refs: str, root: Path) -> Iterator[Item]:
    """RefCOCO, RefCOCO+, RefCOCOg val: a question for each sentence."""
    instances = read_json(root / name / "instances.json")
    sizes = {image["id"]: (image["width"], image["height"]) for image in instances["images"]}
    boxes = {annotation["id"]: annotation["bbox"] for annotation in instances["annotations"]}
    for ref in read_pickle(root / name / refs):
        if ref["split"] == "val":
            x, y, width, height = boxes[ref["ann_id"]]
            truth = share_box((x, y, x + width, y + height), *sizes[ref["image_id"]])
            image = root / f"coco/train2014/COCO_train2014_{ref['image_id']:012d}.jpg"
            yield from (Item(sentence["sent_id"], image, sentence["sent"], truth) for sentence in ref["sentences"])


def read_ocid_ref(root: Path) -> Iterator[Item]:
    """OCID-Ref val, by the clutter of the scene."""
    for key, row in read_json(root / "ocid-ref/val_expressions.json").items():
        clutter = "minimum" if int(row["take_id"]) < 10 else "medium" if int(row["take_id"]) < 17 else "maximum"
        truth = share_box(json.loads(row["bbox"]), 640, 480)
        yield Item(key, root / "ocid-ref/OCID-dataset" / row["scene_path"], row["sentence"], truth, part=clutter)


def read_vsr(root: Path) -> Iterator[Item]:
    """VSR zero-shot test; a question is called by its line, from 0."""
    for number, row in enumerate(read_lines(root / "vsr/test.jsonl")):
        yield Item(number, root / "vsr/images" / row["image"], row["caption"], (1, 0)[row["label"]])


def read_tallyqa(root: Path) -> Iterator[Item]:
    """TallyQA test: how many, from 0 to 15."""
    numbers = [str(number) for number in range(16)]
    for row in read_json(root / "tallyqa/test.json"):
        part = "simple" if row["issimple"] else "complex"
        yield Item(row["question_id"], root / "vg" / row["image"], row["question"], row["answer"], numbers, part)


def read_ai2d(root: Path) -> Iterator[Item]:
    """AI2D, val and test: diagrams with four answers to choose from."""
    test = set((root / "ai2d/ai2d_test_ids.csv").read_text().split())
    for name in sorted(os.listdir(root / "ai2d/questions")):
        diagram = read_json(root / "ai2d/questions" / name)
        image, part = root / "ai2d/images" / diagram["imageName"], "test" if Path(diagram["imageName"]).stem in test else "val"
        for question, row in diagram["questions"].items():
            yield Item(row["questionId"], image, question, row["correctAnswer"], row["answerTexts"], part)


def read_pope(root: Path) -> Iterator[Item]:
    """POPE, three splits; a question is called "adversarial-1"."""
    for part in BENCHMARKS["pope"].parts:
        for row in read_lines(root / f"pope/coco_pope_{part}.json"):
            image, truth = root / "coco/val2014" / row["image"], ("yes", "no").index(row["label"])
            yield Item(f"{part}-{row['question_id']}", image, row["text"], truth, part=part)


@cache
def scenes() -> list[tuple[Image.Image, list[dict]]]:
    """Built-in scenes, held out, and what is asked about them."""
    source = data.Scenes(SCENES, SCENE_SEED)
    return [(scene.image, scene.conversations) for scene in (source[i] for i in range(SCENES))]


def read_scenes(kind: str, root: Path) -> Iterator[Item]:
    """The questions of one kind about scenes; their instructions are part of them. Needs no files."""
    truth = {"relation": ("True", "False").index, "presence": ("Yes", "No").index, "refer": parse_box}.get(kind, str)
    for image, rows in scenes():
        for row in (row for row in rows if row["kind"] == kind):
            question, answer = (turn["value"].replace("<image>", "").strip() for turn in row["conversations"])
            yield Item(row["id"], image, question, truth(answer))


# ----------------------------------------------------------------------------------------------------------------------
# The benchmarks (table 8)

SHORT = "{q}\nAnswer the question using a single word or phrase."
VIZWIZ = SHORT.replace("\n", "\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n")
BOX = 'Please provide the bounding box coordinate of the region this sentence describes: "{q}"'
VSR = 'Based on the image, is this statement "True" or "False"? {q}\nRespond with "True" or "False" directly.'
LETTER = "{q}\n{options}\nAnswer with the option's letter from the given choices directly."

COCO = "cocodataset.org/#download"
BENCHMARKS: dict[str, Benchmark] = {
    "vqav2": Benchmark(
        "VQAv2", read_vqav2, SHORT, "text", partial(vqa_accuracy, "vqav2"), source=f"visualqa.org/download.html, {COCO}",
        files="vqav2/: v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json; coco/val2014/"),
    "gqa": Benchmark(
        "GQA", read_gqa, SHORT, "text", exact_match, files="gqa/: testdev_balanced_questions.json, images/",
        source="cs.stanford.edu/people/dorarad/gqa/download.html"),
    "vizwiz": Benchmark(
        "VizWiz", read_vizwiz, VIZWIZ, "text", partial(vqa_accuracy, "vizwiz"), files="vizwiz/: val.json, val/",
        source="vizwiz.org/tasks-and-datasets/vqa", parts=("answerable", "unanswerable"), metrics=unanswerable),
    **{name: Benchmark(
        title, partial(read_textvqa, ocr), SHORT, "text", partial(vqa_accuracy, "textvqa"),
        files="textvqa/: TextVQA_0.5.1_val.json, llava_textvqa_val_v051_ocr.jsonl, train_images/",
        source="textvqa.org/dataset; the .jsonl: eval.zip of github.com/haotian-liu/LLaVA (docs/Evaluation.md)")
        for name, title, ocr in (("textvqa", "TextVQA", False), ("textvqa-ocr", "TextVQA + OCR", True))},
    **{name: Benchmark(
        title, partial(read_refcoco, name, refs), BOX, "box", partial(box_found, 0.5), metrics=readable,
        files=f"{name}/: instances.json, {refs}; coco/train2014/", source=f"github.com/lichengunc/refer, {COCO}")
        for name, title, refs in (("refcoco", "RefCOCO", "refs(unc).p"), ("refcoco+", "RefCOCO+", "refs(unc).p"),
                                  ("refcocog", "RefCOCOg", "refs(umd).p"))},
    "ocid-ref": Benchmark(
        "OCID-Ref", read_ocid_ref, BOX, "box", partial(box_found, 0.25), parts=("minimum", "medium", "maximum"),
        metrics=readable, files="ocid-ref/: val_expressions.json, OCID-dataset/",
        source="github.com/lluma/OCID-Ref; the images: www.acin.tuwien.ac.at (Object Clutter Indoor Dataset)"),
    "vsr": Benchmark(
        "VSR", read_vsr, VSR, "choice", chosen, choices=("True", "False"), metrics=aucs,
        files="vsr/: test.jsonl, images/", source="github.com/cambridgeltl/visual-spatial-reasoning (zero-shot split)"),
    "tallyqa": Benchmark(
        "TallyQA", read_tallyqa, LETTER, "choice", chosen, parts=("simple", "complex"), headline="parts", metrics=aucs,
        files="tallyqa/: test.json; vg/: VG_100K/, VG_100K_2/",
        source="github.com/manoja328/TallyQA_dataset; the images: homes.cs.washington.edu/~ranjay/visualgenome"),
    "ai2d": Benchmark(
        "AI2D", read_ai2d, LETTER, "choice", chosen, parts=("val", "test"), metrics=aucs,
        files="ai2d/: questions/, images/, ai2d_test_ids.csv", source="prior.allenai.org/projects/diagram-understanding"),
    "pope": Benchmark(
        "POPE", read_pope, SHORT, "choice", chosen, choices=("Yes", "No"), parts=("adversarial", "popular", "random"),
        headline="mean", metrics=aucs, source=f"github.com/RUCAIBox/POPE (output/coco), {COCO}",
        files="pope/: coco_pope_adversarial.json, coco_pope_popular.json, coco_pope_random.json; coco/val2014/"),
    "scenes-count": Benchmark("counting", partial(read_scenes, "count"), "{q}", "text", exact_match),
    "scenes-color": Benchmark("color", partial(read_scenes, "color"), "{q}", "text", exact_match),
    "scenes-relation": Benchmark("relation", partial(read_scenes, "relation"), "{q}", "choice", chosen,
                                 choices=("True", "False"), metrics=aucs),
    "scenes-presence": Benchmark("presence", partial(read_scenes, "presence"), "{q}", "choice", chosen,
                                 choices=("Yes", "No"), metrics=aucs),
    "scenes-refer": Benchmark("referring", partial(read_scenes, "refer"), "{q}", "box", partial(box_found, 0.5),
                              metrics=readable),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Answering


class Run:
    """This process among the others, its device, and the model, which is loaded when a question needs it."""

    def __init__(self, folder: str, precision: str):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda, inner = torch.cuda.is_available(), Path(folder) / "model"
        self.folder = inner if inner.is_dir() else Path(folder)  # train_vlm.py's --out, or the model in it
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=100))  # barriers alone, which wait for the slowest
        bf16 = precision == "bf16" or precision == "auto" and cuda and torch.cuda.is_bf16_supported()
        self.dtype, file = torch.bfloat16 if bf16 else torch.float32, self.folder / "model.safetensors"
        if not file.exists():
            hint = "make it with: python train_vlm.py" if folder == str(MODEL) else "give a folder that train_vlm.py wrote"
            raise EvalError(f"{file}: is not there; {hint}")
        self.made_with = {"weights": [file.stat().st_size, file.stat().st_mtime_ns], "precision": str(self.dtype)}
        whole = self.folder.resolve()
        self.name = whole.parent.name if whole.name == "model" else whole.name  # runs/vlm/model is called vlm

    @cached_property
    def model(self) -> vlm.VLM:
        """The model in evaluation mode."""
        pack = self.device.type == "cpu" and torch.backends.mkldnn.is_available()
        return vlm.load(self.folder, self.dtype, self.device, pack)


def fingerprint(items: list[Item]) -> dict[str, int]:
    """A number that another set of questions would not have."""
    text = json.dumps([(item.id, item.prompt, item.choices, item.truth) for item in items])
    return {"questions": zlib.crc32(text.encode())}


def same_settings(file: Path, then: dict, now: dict) -> None:
    """EvalError if a file of --out has answers of another model or to other questions."""
    if other := [name for name in sorted(now | then) if then.get(name) != now.get(name)]:
        raise EvalError(f"{file}: was made with other {' and '.join(other)}; remove it, or choose another --out")


def finished(out: Path, name: str) -> dict | None:
    """What an evaluation wrote of a benchmark in the end; None if it has not."""
    file = out / f"{name}.json"
    result = read_json(file) if file.exists() else None
    if result is not None and not (isinstance(result, dict) and {"settings", "rows", "answers"} <= result.keys()):
        raise EvalError(f"{file}: was not written by an evaluation; move it, or choose another --out")
    return result


def known_answers(out: Path, name: str, settings: dict) -> dict[str, Answer]:
    """What has been answered, by question: in the file of a finished evaluation, or in the parts of one that has not
    ended. A line that a killed process left unfinished is passed over: its question is asked again."""
    answers, key = {}, BENCHMARKS[name].key
    if result := finished(out, name):
        same_settings(out / f"{name}.json", result["settings"], settings)
        return {row["id"]: row[key] for row in result["answers"]}
    for file in sorted(out.glob(f"{name}.rank-*.jsonl")):
        for line in file.read_text(encoding="utf-8").split("\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if "settings" in row:
                same_settings(file, row["settings"], settings)
            else:
                answers[row["id"]] = row[key]
    return answers


def batches_of(items: list[Item], size: int) -> list[list[Item]]:
    """Batches in which an image's questions stand together, since the model reads it once for all of them, and images with
    long questions come first: memory that runs out does so at once.

    They do not depend on what is answered already, nor on the number of processes, so that rounding, which depends on what
    shares a batch, is the same in any case.
    """
    longest: dict[str | int, int] = {}  # of an image's questions
    for item in items:
        longest[item.image_key] = max(longest.get(item.image_key, 0), len(item.prompt))
    place = {key: n for n, key in enumerate(longest)}
    order = sorted(items, key=lambda item: (-longest[item.image_key], place[item.image_key]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def ask(run: Run, name: str, items: list[Item], out: Path, size: int) -> dict[str, Answer]:
    """Ask what has not been answered, each process its share of the batches, writing as it goes. Returns all answers on
    rank 0."""
    benchmark, settings = BENCHMARKS[name], run.made_with | fingerprint(items)
    known = known_answers(out, name, settings)
    if run.world > 1:
        dist.barrier()  # every process has read before any writes
    todo = [batch for batch in batches_of(items, size) if any(item.id not in known for item in batch)]
    if not todo:
        return known
    mine = todo[run.rank :: run.world]
    bar = tqdm(total=sum(map(len, mine)), desc=benchmark.title, unit="question", disable=run.rank > 0,
               mininterval=0.5 if sys.stderr.isatty() else 30)  # fmt: skip
    part = open(out / f"{name}.rank-{run.rank}.jsonl", "a", encoding="utf-8", buffering=1)
    with bar, part, ThreadPoolExecutor(4) as readers:
        part.write("\n" + json.dumps({"settings": settings}) + "\n")  # a new line: the last one may be unfinished
        for batch in mine:
            distinct = {item.image_key: item for item in batch}  # a batch reads, and the model sees, each image once
            opened = dict(zip(distinct, readers.map(Item.picture, distinct.values())))
            pictures, prompts = [opened[item.image_key] for item in batch], [item.prompt for item in batch]
            try:
                if benchmark.kind == "choice":
                    answers = run.model.score(pictures, prompts, [item.choices for item in batch])
                else:  # the likeliest word each time
                    answers = run.model.generate(pictures, prompts, max_new_tokens=128)
            except vlm.VLMError as error:
                raise EvalError(f"{benchmark.title}, in the batch of question {batch[0].id}: {error}") from None
            part.write("".join(json.dumps({"id": item.id, benchmark.key: a}) + "\n" for item, a in zip(batch, answers)))
            bar.update(len(batch))
    if run.world > 1:
        dist.barrier()
    return known_answers(out, name, settings) if run.rank == 0 else {}


# ----------------------------------------------------------------------------------------------------------------------
# Report

Groups = list[np.ndarray]  # of questions, or of their scores; what counts is the mean of the groups' means


def rows_of(benchmark: Benchmark, parts: Sequence[str]) -> dict[str, Groups]:
    """What is reported, the headline first: a row's name -> its groups of questions, by their places."""
    each = {part: np.flatnonzero(np.array(parts) == part) for part in benchmark.parts if part in parts}
    rows = {f"{benchmark.title}, {part}": [places] for part, places in each.items()}
    if benchmark.headline == "parts":
        return rows
    return {benchmark.title: list(each.values()) if benchmark.headline == "mean" else [np.arange(len(parts))]} | rows


def mean(groups: Groups) -> float:
    """The mean of the groups' means."""
    return float(np.mean([scores.mean() for scores in groups]))


def bootstrap(groups: Groups, draws: int = 10_000) -> list[float]:
    """The 95% interval of that mean, when questions are drawn anew from each group. As there are few different scores,
    a draw needs only to know how often each of them comes up."""
    rng, means = data.generator("bootstrap"), np.zeros(draws)
    for scores in groups:
        values, counts = np.unique(scores, return_counts=True)
        means += rng.multinomial(len(scores), counts / len(scores), draws) @ values / len(scores)
    return np.quantile(means / len(groups), (0.025, 0.975)).tolist()


def report(name: str, items: list[Item], by_id: dict[str, Answer], settings: dict, out: Path, show: int | None) -> None:
    """Score a benchmark's answers and write its file; draw failures if asked to."""
    benchmark, answers, rows = BENCHMARKS[name], [by_id[item.id] for item in items], {}
    scores = np.array([benchmark.score(a, item.truth) for a, item in zip(answers, items)])
    for row, groups in rows_of(benchmark, [item.part for item in items]).items():
        places, of_row = np.concatenate(groups), [scores[group] for group in groups]
        metrics = benchmark.metrics([items[i] for i in places], [answers[i] for i in places])
        rows[row] = {"questions": len(places), "score": mean(of_row), "interval": bootstrap(of_row), "metrics": metrics}
    lines = [json.dumps({"id": item.id, "part": item.part, benchmark.key: a, "score": score})
             for item, a, score in zip(items, answers, scores.tolist())]  # fmt: skip
    head = json.dumps({"benchmark": name, "settings": settings, "rows": rows})
    write(out / f"{name}.json", head[:-1] + ', "answers": [\n' + ",\n".join(lines) + "\n]}\n")
    for part in out.glob(f"{name}.rank-*.jsonl"):
        part.unlink()
    if show and (scores < 0.5).any():
        wrong = sorted(data.generator("failures").permutation(np.flatnonzero(scores < 0.5))[:show])
        cards = [failure(benchmark.kind, items[i], answers[i]) for i in wrong]
        data.grid([cards[i : i + 4] for i in range(0, len(cards), 4)], gap=12).save(out / f"{name}-failures.png")


def failure(kind: str, item: Item, answer: Answer) -> Image.Image:
    """A picture of one question, with the boxes where the answer is one."""
    truth, boxes = item.truth, []
    if kind == "choice":
        names = [f"{choice}. {text}" for choice, text in zip(item.choices, item.options)] or item.choices
        answer, truth = f"{names[int(np.argmax(answer))]} ({max(answer):.0%})", names[truth]
    elif kind == "box":
        boxes = [(box, color) for box, color in ((truth, "lime"), (parse_box(answer), "red")) if box]
    elif isinstance(truth, list):
        truth = ", ".join(f"{text} ({count})" for text, count in Counter(truth).most_common())
    return data.card(item.picture(), [(item.question, "black"), (f"answer: {answer}", "red"), (f"truth: {truth}", "green")], boxes)


def write(path: Path, text: str) -> None:
    """Make a file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def results(folder: Path) -> dict[str, dict]:
    """The finished benchmarks in a folder of results. EvalError if there are none."""
    found = {name: result for name in BENCHMARKS if (result := finished(folder, name))}
    if not found:
        raise EvalError(f"{folder}: holds no results; give a folder that an evaluation wrote, such as runs/eval/NAME")
    return found


def table(header: Sequence[str], rows: list[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def percent(value: float | None) -> str:
    """0.5 -> "50.00"."""
    return "-" if value is None else f"{100 * value:.2f}"


def conclude(out: Path) -> None:
    """Write results.md of all finished benchmarks in a folder; print its table and what comes next."""
    lines = []
    for name, row in (pair for result in results(out).values() for pair in result["rows"].items()):
        more = ", ".join(f"{metric} {percent(value)}" for metric, value in row["metrics"].items())
        lines.append([name, f"{row['questions']:,}", percent(row["score"]), " to ".join(map(percent, row["interval"])), more])
    text = table(["benchmark", "questions", "score, %", "95% interval", "other metrics, %"], lines)
    write(out / "results.md", f"# {out.name}\n\n{text}\n")
    print(f"\n{text}\n\nresults         {out / 'results.md'}; all answers: {out / 'BENCHMARK.json'}")
    if pictures := sorted(str(path) for path in out.glob("*-failures.png")):
        print(f"failures        {', '.join(pictures)}")
    print(f"next            python eval.py compare {out} {out.parent / 'ANOTHER'}")


# ----------------------------------------------------------------------------------------------------------------------
# Comparison


def paired(models: dict[str, Path]) -> dict[str, list[Groups]]:
    """Each row of the benchmarks that all models have -> for each model the groups of its scores, question by question.

    EvalError: no benchmark in common, or a model was asked other questions.
    """
    rows, found = {}, {model: results(folder) for model, folder in models.items()}
    first, *_ = found
    for name in [name for name in found[first] if all(name in result for result in found.values())]:
        parts = [row["part"] for row in found[first][name]["answers"]]
        for model, result in found.items():
            if result[name]["settings"]["questions"] != found[first][name]["settings"]["questions"]:
                raise EvalError(f"{models[model] / name}.json: has other questions than {models[first] / name}.json; "
                                "give both evaluations the same --data and --limit")  # fmt: skip
            scores = np.array([row["score"] for row in result[name]["answers"]])
            for row, groups in rows_of(BENCHMARKS[name], parts).items():
                rows.setdefault(row, []).append([scores[places] for places in groups])
    if not rows:
        raise EvalError(f"{', '.join(map(str, models.values()))}: no benchmark in common; evaluate all on the same ones")
    return rows


def z_scores(rows: dict[str, list[Groups]]) -> dict[str, np.ndarray]:
    """The axes of figure 5 -> [models]: by how many standard deviations of the pool each is above the pool's mean."""
    axes = [f"{b.title}, {part}" for b in BENCHMARKS.values() if b.headline == "parts" for part in b.parts]
    axes += [b.title for b in BENCHMARKS.values() if b.headline != "parts"]
    pool = {row: np.array([mean(groups) for groups in models]) for row, models in rows.items() if row in axes}
    return {row: (x - x.mean()) / x.std() if np.ptp(x) > 0 else 0 * x for row, x in pool.items()}


def compare(folders: list[str], out: Path, each: int) -> None:
    """Tables of scores, differences and z-scores, and the radar charts of figure 5, so many models in each."""
    split = [text.split("=", 1) if "=" in text and not Path(text).exists() else (Path(text).name, text) for text in folders]
    models = {name: Path(folder) for name, folder in split}
    if len(models) < len(split):
        raise EvalError(f"two of {', '.join(folders)} have one name; give names, as NAME=FOLDER")
    names, rows, lines = list(models), paired(models), []
    for row, (base, *others) in rows.items():
        changes = [[b - a for a, b in zip(base, groups)] for groups in others]
        spans = [" to ".join(f"{100 * end:+.2f}" for end in bootstrap(change)) for change in changes]
        cells = [f"{100 * mean(change):+.2f} ({span})" for change, span in zip(changes, spans)]
        lines.append([row, *(percent(mean(groups)) for groups in (base, *others)), *cells])
    z = z_scores(rows)
    over_pool = [[row, *(f"{value:+.2f}" for value in x)] for row, x in (z | {"mean": np.mean(list(z.values()), 0)}).items()]
    text = table(["score, %", *names, *(f"{name} - {names[0]} (95% interval)" for name in names[1:])], lines)
    text += "\n\n" + table(["standard deviations above the mean", *names], over_pool)
    out.mkdir(parents=True, exist_ok=True)
    write(out / "compare.md", f"# {', '.join(names)}\n\n{text}\n")
    print(f"{text}\n\ntables          {out / 'compare.md'}")
    if len(z) < 3:
        print("radar chart     none: it needs three benchmarks")
        return
    ranges = {row: sorted(100 * mean(groups) for groups in rows[row]) for row in z}
    axes = [f"{row}\n{low:.1f} - {high:.1f}" for row, (low, *_, high) in ranges.items()]  # a name, and the pool's scores
    reach = 0.5 * math.ceil(2 * np.abs(list(z.values())).max() + 1)
    series = {name: [x[i] for x in z.values()] for i, name in enumerate(names)}
    charts = [data.radar(axes, {name: series[name] for name in names[i : i + each]}, reach) for i in range(0, len(names), each)]
    data.grid([charts]).save(out / "radar.png", dpi=(300, 300))
    print(f"radar chart     {out / 'radar.png'}")


# ----------------------------------------------------------------------------------------------------------------------
# The commands


def read_answers(path: Path, name: str, items: list[Item]) -> dict[str, Answer]:
    """The answers of another program: a list of {"id", "answer"}, or {"id", "probabilities"} for choices, or a file that
    an evaluation wrote. EvalError, which names the entry, for anything else, and for answers too many or too few."""
    key, rows, wanted, answers = BENCHMARKS[name].key, read_json(path), {item.id: item for item in items}, {}
    rows = rows.get("answers") if isinstance(rows, dict) else rows
    if not isinstance(rows, list):
        raise EvalError(f'{path}: is no list; give one of {{"id", "{key}"}}')
    for number, row in enumerate(rows, 1):
        where = f"{path}, entry {number}"
        if not isinstance(row, dict) or not {"id", key} <= row.keys():
            raise EvalError(f'{where}: is no {{"id", "{key}"}}; {name} takes a list of those')
        identity, value = str(row["id"]), row[key]
        if identity not in wanted or identity in answers:
            why = "is answered twice" if identity in answers else "is no question's, or --limit leaves it out"
            raise EvalError(f"{where}: id {identity} {why}; {name} has {len(items)} questions, such as {items[0].id}")
        choices = wanted[identity].choices
        if key == "answer" and not isinstance(value, str):
            raise EvalError(f'{where}: is no text; give what the model wrote, a box as "[0.1, 0.2, 0.5, 0.6]"')
        numbers = isinstance(value, list) and len(value) == len(choices) and all(type(p) in (int, float) for p in value)
        if key == "probabilities" and not (numbers and min(value) >= 0 and abs(sum(value) - 1) < 1e-3):
            raise EvalError(f"{where}: give {len(choices)} numbers whose sum is 1, for {', '.join(choices)}")
        answers[identity] = value
    if missing := wanted.keys() - answers.keys():
        raise EvalError(f"{path}: lacks {len(missing)} of {len(items)} answers, such as {min(missing)}; give all of them")
    return answers


def positive(text: str) -> int:
    """A number from 1 up, for argparse."""
    if int(text) < 1:
        raise ValueError
    return int(text)


FLAGS: dict[str, tuple[str, dict]] = {  # which commands have it, and what argparse is told
    "model": ("run", dict(nargs="?", default=str(MODEL), help=f"a folder that train_vlm.py wrote (default: {MODEL})")),
    "benchmarks": ("score", dict(metavar="BENCHMARK", choices=list(BENCHMARKS), help="one of `python eval.py list`")),
    "answers": ("score", dict(help='a JSON list of {"id", "answer"}, for choices {"id", "probabilities"}')),
    "results": ("compare", dict(nargs="+", help="folders that evaluations wrote; NAME=FOLDER gives a name")),
    "--benchmarks": ("run", dict(help="separated by commas; default: all that need files with --data, else the scenes'")),
    "--data": ("run score", dict(help="the folder with the benchmarks' files; `python eval.py list` tells which")),
    "--limit": ("run score", dict(type=positive, help="ask so many of each, the same random ones every time")),
    "--show": ("run score", dict(type=positive, help="draw so many failures of each benchmark")),
    "--batch": ("run", dict(type=positive, default=32, help="questions at a time (default: 32)")),
    "--precision": ("run", dict(choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 on a GPU that has it")),
    "--each": ("compare", dict(type=positive, help="radar charts side by side, of so many models each; default: one of all")),
    "--out": ("run score compare", dict(type=Path, help=f"where everything is written; default: a folder in {RESULTS}")),
}  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    """The command and its options, complete and checked. A mistake in the flags exits with status 2."""
    command = argv[0] if argv and argv[0] in ("compare", "score", "list") else "run"
    parser = argparse.ArgumentParser("eval.py" if command == "run" else f"eval.py {command}", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    for flag, (commands, how) in FLAGS.items():
        if command in commands.split():
            parser.add_argument(flag, **how)
    o = parser.parse_args(argv[command != "run" :], argparse.Namespace(command=command))
    if command in ("run", "score"):
        default = ",".join(name for name, b in BENCHMARKS.items() if bool(b.files) == bool(o.data))
        o.benchmarks = list(dict.fromkeys((o.benchmarks or default).split(",")))
        for name in o.benchmarks:
            if name not in BENCHMARKS:
                parser.error(f"benchmark {name}: unknown; choose of {', '.join(BENCHMARKS)}")
            if BENCHMARKS[name].files and not o.data:
                parser.error(f"benchmark {name} needs --data, a folder with {BENCHMARKS[name].files}")
    if command == "compare" and len(o.results) < 2:
        parser.error("compare needs two folders of results or more")
    return o


def evaluate(o: argparse.Namespace) -> None:
    """Ask a model the questions of all benchmarks, and report."""
    run = Run(o.model, o.precision)
    out = o.out or RESULTS / run.name
    asked = {name: questions(name, o.data, o.limit) for name in o.benchmarks}  # what is missing shows before the first
    for name, items in asked.items():
        for choices in {item.choices for item in items if item.choices and not (out / f"{name}.json").exists()}:
            try:
                run.model.first_tokens(choices)
            except vlm.VLMError as error:
                raise EvalError(f"{name}: {error}, or leave {name} out of --benchmarks") from None
    out.mkdir(parents=True, exist_ok=True)
    for name, items in asked.items():
        answers = ask(run, name, items, out, o.batch)
        if run.rank == 0:
            report(name, items, answers, run.made_with | fingerprint(items), out, o.show)
    if run.rank == 0:
        conclude(out)


def score(o: argparse.Namespace) -> None:
    """Score the answers of another program."""
    (name,), path = o.benchmarks, Path(o.answers)
    if not path.exists():
        raise EvalError(f"{path}: no such file; give the answers as JSON")
    out, items = o.out or RESULTS / path.stem, questions(name, o.data, o.limit)
    answers, settings = read_answers(path, name, items), {"answers": str(path.resolve())} | fingerprint(items)
    if result := finished(out, name):
        same_settings(out / f"{name}.json", result["settings"], settings)
    out.mkdir(parents=True, exist_ok=True)
    report(name, items, answers, settings, out, o.show)
    conclude(out)


def main(argv: list[str] | None = None) -> None:
    """The commands."""
    o = parse(sys.argv[1:] if argv is None else argv)
    try:
        if o.command == "list":
            rows = [[f"`{name}`", b.title, b.files or "none", b.source or "built-in scenes"] for name, b in BENCHMARKS.items()]
            print(table(["name", "benchmark", "files in --data", "from"], rows))
        elif o.command == "compare":
            compare(o.results, o.out or RESULTS / "compare", o.each or len(o.results))
        else:
            (evaluate if o.command == "run" else score)(o)
    except (EvalError, vlm.VLMError, vlm.LlamaError, vlm.WeightsError, data.DataError, OSError) as error:
        sys.exit(f"eval.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit("eval.py: the GPU's memory is full; give a smaller --batch (what is answered stays)")
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
