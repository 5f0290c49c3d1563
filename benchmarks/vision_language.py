"""Aligned against baseline, in the demo's vision-language models: `python benchmarks/vision_language.py`.

Pairs of models on the teacher and on its aligned version, over paired seeds: a seed is that of the scenes, of the
alignment, of the order of the data and of new weights. The scenes and the aligned backbones are those of
benchmarks/locality.py: run that first. What an earlier call finished in runs/vision-language is kept. Prints a table
of the mean scores of each kind of question and of the differences, with standard errors; writes the first pair's radar
chart (radar.png), questions that one of its models answers right and the other one wrong (answers.png), and what the
models of "pointing" point at (pointing.png).
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from locality import OUT as LOCALITY
from locality import ROOT, backbone, command, error

sys.path.insert(0, str(ROOT))
import eval as evaluation
import pictures

OUT = Path("runs/vision-language")
PAIRS = {  # baseline, aligned
    "main": ("baseline-mlp", "aligned-decoder"),  # figure 5's
    "transformer": ("baseline-transformer", "aligned-decoder"),  # figure 11's, as are the next two
    "mlp": ("baseline-mlp", "aligned-mlp"),
    "truncated": ("baseline-truncated", "aligned-truncated"),
    "pointing": ("baseline-transformer-pointing", "aligned-decoder-pointing"),  # trained with --units box,mask
}
KINDS = [name for name in evaluation.BENCHMARKS if name.startswith("scenes-")]  # for models that point
PLAIN = [name for name in KINDS if name not in evaluation.POINTING]  # for the others


def train_and_ask(job: tuple[str, int]) -> None:
    """Train a model of a variant and a seed on one core, and ask it about the unseen scenes of the same seed."""
    variant, seed = job
    out, scenes = OUT / f"{variant}-{seed}", LOCALITY / f"scenes-{seed}"
    weights = backbone("teacher" if variant.startswith("baseline") else "maskembed", seed)
    if not (out / "model/config.json").exists():
        file = "pointing.json --units box,mask" if variant.endswith("pointing") else "conversations.json"
        flags = f"--variant {variant.removesuffix('-pointing')} --weights {weights} --data {scenes}/{file}"
        flags += f" --seed {seed} --out {out} --workers 0"
        flags += " --resume" * any(out.glob("checkpoints/update-*"))
        command(OUT / f"logs/train-{variant}-{seed}.txt", ROOT / "train_vlm.py", *flags.split())
    kinds = KINDS if variant.endswith("pointing") else PLAIN
    flags = f"{out} --data {scenes} --benchmarks {','.join(kinds)} --out {out}/eval"
    command(OUT / f"logs/eval-{variant}-{seed}.txt", ROOT / "eval.py", *flags.split())


def scores(variant: str, seeds: list[int]) -> dict[str, np.ndarray]:
    """Kind of question -> percent right of each seed."""
    found: dict[str, list[float]] = {}
    for seed in seeds:
        for result in evaluation.results(OUT / f"{variant}-{seed}/eval", KINDS).values():
            (title, row), *_ = result["rows"].items()
            found.setdefault(title, []).append(100 * row["score"])
    return {title: np.array(values) for title, values in found.items()}


def table(pairs: list[str], seeds: list[int]) -> str:
    """Means of the models, and of each pair's differences, with standard errors."""
    rows = {variant: scores(variant, seeds) for pair in pairs for variant in PAIRS[pair]}
    for base, aligned in (PAIRS[pair] for pair in pairs):
        rows[f"{aligned} - {base}"] = {title: rows[aligned][title] - rows[base][title] for title in rows[base]}
    titles = dict.fromkeys(title for row in rows.values() for title in row)
    lines = []
    for name, row in rows.items():
        sign = "+" if " - " in name else ""
        cells = {title: f"{values.mean():{sign}.1f} ± {error(values):.1f}" for title, values in row.items()}
        lines.append([name, *(cells.get(title, "") for title in titles)])
    return pictures.table(["percent right", *titles], lines)


def draw_answers(base: str, aligned: str, seed: int, each: int = 4) -> None:
    """Questions that the aligned model answers right and the baseline wrong (upper row), and the reverse (lower)."""
    rows, rng = ([], []), np.random.default_rng(0)
    models = [evaluation.results(OUT / f"{variant}-{seed}/eval", KINDS) for variant in (base, aligned)]
    for name in models[0]:
        items = {item.id: item for item in evaluation.questions(name, LOCALITY / f"scenes-{seed}")}
        key = evaluation.KEYS[evaluation.BENCHMARKS[name].kind]
        for one, other in zip(*(model[name]["answers"] for model in models)):
            if one["score"] != other["score"]:
                rows[other["score"] < one["score"]].append((items[one["id"]], one[key], other[key]))
    sheet = []
    for row, right in zip(rows, (aligned, base)):
        cards = []
        for i in rng.permutation(len(row))[:each]:
            item, *answers = row[i]
            lines = [(item.question, "black")]
            for who, answer in zip((base, aligned), answers):
                text = item.choices[int(np.argmax(answer))] if isinstance(answer, list) else answer
                lines.append((f"{who}: {text}", "green" if who == right else "red"))
            cards.append(pictures.card(item.picture(), lines, width=220))
        sheet.append(cards)
    pictures.grid(sheet, gap=12).save(OUT / "answers.png")


def draw_pointing(base: str, aligned: str, seed: int, each: int = 4) -> None:
    """What both models point at in random questions, boxes and masks: green is true, red what was found."""
    rows, rng = ([], []), np.random.default_rng(0)
    for name in ("scenes-refer-box", "scenes-refer-mask"):
        items = evaluation.questions(name, LOCALITY / f"scenes-{seed}")
        for i in rng.permutation(len(items))[:each]:
            for row, variant in zip(rows, (base, aligned)):
                found = evaluation.results(OUT / f"{variant}-{seed}/eval", [name])[name]["answers"][i]["answer"]
                places = evaluation.pixels(items[i].truth[name.split("-")[-1]]), evaluation.pixels(found["places"])
                ious = evaluation.overlaps(found, items[i].truth)
                text = f"{'teacher' if row is rows[0] else 'aligned'}: IoU {ious[0, 0] if len(ious) == 1 else 0:.2f}"
                image = pictures.point(items[i].picture(), list(zip(("lime", "red"), places)), 180)
                row.append(pictures.card(image, [(items[i].question, "black"), (text, "black")], width=180))
    pictures.grid(rows, gap=10).save(OUT / "pointing.png")


def main() -> None:
    """Train what is missing, print the table, draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    o = parser.parse_args()
    seeds = list(range(1, o.seeds + 1))
    with ThreadPoolExecutor(2) as pool:
        jobs = dict.fromkeys((variant, seed) for pair in o.pairs for seed in seeds for variant in PAIRS[pair])
        list(pool.map(train_and_ask, jobs))
    (OUT / "results.json").write_text(json.dumps({
        variant: {title: values.tolist() for title, values in scores(variant, seeds).items()}
        for pair in o.pairs for variant in PAIRS[pair]
    }))  # fmt: skip
    if "pointing" in o.pairs:
        draw_pointing(*PAIRS["pointing"], seeds[0])
    base, aligned = PAIRS[o.pairs[0]]
    folders = [f"{name}={OUT}/{name}-{seeds[0]}/eval" for name in (base, aligned)]
    subprocess.run([sys.executable, ROOT / "eval.py", "compare", *folders, "--out", OUT], check=True)
    draw_answers(base, aligned, seeds[0])
    print(table(o.pairs, seeds))


if __name__ == "__main__":
    main()
