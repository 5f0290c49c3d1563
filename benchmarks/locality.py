"""The probing table and bar chart: `python benchmarks/locality.py`, two and a half hours on two AVX2 cores.

MaskEmbed and the baselines of its family against the demo's teacher, over three paired seeds: a seed is that of the
scenes, of the alignment and of the probes. "penultimate" is the teacher without its last block, which is what MaskEmbed
reconstructs. What an earlier call finished in runs/locality is kept; remove it when the teacher changes. Prints a table
of the teacher's mean and the differences from it with their standard errors (standard deviation / sqrt of the seeds),
and writes bars.png, the means with standard errors.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import data
import pictures
import probe
import vit

OUT, TEACHER = Path("runs/locality"), ROOT / "demo/teacher.safetensors"
NAMES = ("teacher", "penultimate", "maskembed", "additive", "average", "crop")
Found = dict[str, np.ndarray]  # column -> recall, F1 or share in percent, or leakage, of each seed


def command(log: Path, *argv: object) -> None:
    """Run a command of this project on one core, its output in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *map(str, argv)], env=environment, stdout=file, stderr=file, check=True)


def backbone(objective: str, seed: int) -> Path:
    """The file of a backbone."""
    return TEACHER if objective in ("teacher", "penultimate") else OUT / f"{objective}-{seed}/align/aligned.safetensors"


def align_and_probe(job: tuple[str, int]) -> None:
    """Align the teacher by an objective (or take it as it is), and probe what comes out."""
    (objective, seed), (out, scenes) = job, (OUT / "{}-{}".format(*job), OUT / f"scenes-{job[1]}")
    if not (file := backbone(objective, seed)).exists():
        flags = f"--objective {objective} --seed {seed} --out {out}/align --workers 0 --data {scenes}/images/train"
        flags += f" --val {scenes}/images/val" + " --resume" * any((out / "align").glob("checkpoints/update-*"))
        command(OUT / f"logs/align-{objective}-{seed}.txt", ROOT / "train_align.py", *flags.split())
    flags = f"{file} --data {scenes} --tasks local,global,leakage --heads transformer,linear --seed {seed}"
    flags += f" --out {out}/probe --workers 0 --resume" + " --skip-blocks 1" * (objective == "penultimate")
    command(OUT / f"logs/probe-{objective}-{seed}.txt", ROOT / "probe.py", *flags.split())


@torch.no_grad()
def patch_tokens(objective: str, seed: int, pixels: Tensor, norm: bool = True) -> Tensor:
    """A backbone's tokens of the patches of images [M, 3, H, W]: [M, N, D]."""
    model, skip = vit.load(backbone(objective, seed)), int(objective == "penultimate")
    batches = (vit.normalize(x, model.config) for x in pixels.split(100))
    tokens = torch.cat([model(x, skip_blocks=skip, norm=norm) for x in batches])
    return tokens[:, model.config.num_prefix :]


def converged(objective: str, seed: int) -> float:
    """Local recall, in percent, of a linear head trained to the end on 2,000 scenes' tokens, each channel standardized:
    what a token says of its patch, however softly. (The paper's probe takes the channels as they are for five epochs,
    in which it does not find what has a small share of their variance.)"""
    tokens, targets = [], []
    for part in ("train", "val"):
        source = data.PatchLabels(data.Segmentation(OUT / f"scenes-{seed}", part, 64), 8, most=2000)
        pixels, patches, _ = map(torch.stack, zip(*(source[i] for i in range(len(source)))))
        tokens.append(patch_tokens(objective, seed, pixels))
        targets.append(data.unpack(patches, len(source.source.names)))
    std, mean = torch.std_mean(tokens[0], (0, 1))
    train, val = ((x - mean) / std for x in tokens)
    torch.manual_seed(seed)
    head = nn.Linear(train.shape[2], targets[0].shape[2])
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = probe.loss_of(head(train), targets[0])
        value.backward()
        return value

    optimizer.step(loss)
    return 100 * probe.metrics(probe.tally(head(val), targets[1]), val.shape[1])["recall"]


def between_things(objective: str, seed: int) -> tuple[float, float]:
    """How much of the colors in train_align.py's pictures tells what is at a patch: the share of the colors' variance,
    in percent, that lies between patches of different things; and the same where empty background is one more thing.
    The axes are those of the teacher and an aligned backbone together (for the teacher and its part: MaskEmbed's)."""
    source = data.Segmentation(OUT / f"scenes-{seed}", "val", 64)
    shown = [source[i] for i in range(0, len(source), 4)]
    kinds = [[data.majority(maps[i : i + 1], 8, 20) for i in (0, 1)] for _, maps in shown]  # shape and color of a patch
    names, things = np.unique(np.concatenate(kinds, 1), axis=1, return_inverse=True)  # [2, things], [images * N]
    pixels = torch.stack([data.to_tensor(image) for image, _ in shown])
    own = objective in ("teacher", "penultimate")
    pair = (objective, "maskembed") if own else ("teacher", objective)
    tokens = [F.layer_norm(x, x.shape[2:]) for x in (patch_tokens(name, seed, pixels, norm=False) for name in pair)]
    colors = pictures.token_colors(*tokens, 8)[0 if own else 1].reshape(-1, 3).astype(float)
    shares = []
    for counted in (names[0, things] > 0, slice(None)):
        of, color = np.unique(things[counted], return_inverse=True)[1], colors[counted]
        means = np.stack([np.bincount(of, channel) / np.bincount(of) for channel in color.T], 1)
        shares.append(100 * means[of].var(0).sum() / color.var(0).sum())
    return tuple(shares)


def found_by(objective: str, seeds: list[int]) -> Found:
    """What was found of one objective's backbones."""
    columns: dict[str, list[float]] = {}
    for seed in seeds:
        for result in json.loads((OUT / f"{objective}-{seed}/probe/results.json").read_text())["results"]:
            best, kind = result["best"], result["probe"]
            title = ", ".join(kind[k] for k in ("task", "head") if kind[k])
            columns.setdefault(title, []).append(best["leakage"] if "leakage" in best else 100 * best["recall"])
            if title.startswith("local"):  # recall does not count what is named where it is not; F1, at the end, does
                for name, metric in (("F1", "f1"), ("colors", "recall_colors"), ("shapes", "recall_shapes")):
                    columns.setdefault(f"{title}: {name}", []).append(100 * result["epochs"][-1][metric])
        among, all_patches = between_things(objective, seed)
        columns.setdefault("local, linear, converged", []).append(converged(objective, seed))
        columns.setdefault("color variance between things", []).append(among)
        columns.setdefault("with the background", []).append(all_patches)
    return {title: np.array(values) for title, values in columns.items()}


def error(values: np.ndarray) -> float:
    """The standard error of the mean; a single value has none (nan)."""
    return values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan


def table(found: dict[str, Found]) -> str:
    """The teacher's means, and the differences from them."""
    teacher, rows = found["teacher"], []
    for name, columns in found.items():
        rows.append([name])
        for title, values in columns.items():
            digits, change = (3 if title == "leakage" else 1), values - teacher[title]
            text = f"{teacher[title].mean():.{digits}f}"
            rows[-1].append(text if name == "teacher" else f"{change.mean():+.{digits}f} ± {error(change):.{digits}f}")
    return pictures.table(["macro recall, %", *teacher], rows)


def bars(found: dict[str, Found]) -> Image.Image:
    """Figure 4: a group of bars for each column of recall, a bar for each objective, with its standard error."""
    titles = [title for title in found["teacher"] if title.startswith(("local", "global")) and ":" not in title]
    low = min(columns[title].min() for columns in found.values() for title in titles) // 10 * 10
    fine, bar, height, left, top = 3, 26, 260, 44, 34  # drawn 3 times as large, then averaged
    group, colors = max(bar * (len(found) + 1), 130), pictures.LINES  # wide enough for the names below
    first = (group - bar * len(found)) / 2
    sheet = Image.new("RGB", (fine * (left + group * len(titles) + 10), fine * (top + height + 26)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(fine * 12)

    def at(x: float, value: float) -> tuple[float, float]:
        return fine * x, fine * (top + height * (100 - value) / (100 - low))

    for value in np.arange(low, 101, 10):
        draw.line([at(left, value), at(left + group * len(titles), value)], pictures.FAINT, fine)
        draw.text(at(left - 6, value), f"{value:.0f}", "black", font, "rm")
    for i, title in enumerate(titles):
        for j, (columns, color) in enumerate(zip(found.values(), colors)):
            x, mean = left + group * i + first + bar * j, columns[title].mean()
            se = np.nan_to_num(error(columns[title]))
            draw.rectangle([at(x + 2, mean), at(x + bar - 2, low)], color)
            draw.line([at(x + bar / 2, mean - se), at(x + bar / 2, mean + se)], "black", 2 * fine)
            for end in (mean - se, mean + se):
                draw.line([at(x + bar / 2 - 4, end), at(x + bar / 2 + 4, end)], "black", 2 * fine)
        draw.text((fine * (left + group * (i + 0.5)), fine * (top + height + 14)), title, "black", font, "mm")
    for j, (name, color) in enumerate(zip(found, colors)):
        x = fine * (left + 100 * j)
        draw.rectangle([x, fine * 8, x + fine * 12, fine * 20], color)
        draw.text((x + fine * 18, fine * 14), name, "black", font, "lm")
    return sheet.reduce(fine)


def main() -> None:
    """Write the scenes, run what is missing, print the table, draw the chart."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--objectives", nargs="+", choices=NAMES, default=NAMES)
    o = parser.parse_args()
    seeds = list(range(1, o.seeds + 1))
    names = [name for name in NAMES if name in ("teacher", "penultimate", "maskembed", *o.objectives)]
    for seed in seeds:
        if not (OUT / f"scenes-{seed}").exists():
            command(OUT / f"logs/scenes-{seed}.txt", ROOT / "demo/scenes.py", OUT / f"scenes-{seed}", "--seed", seed)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(align_and_probe, [(name, seed) for name in names for seed in seeds]))
    found = {name: found_by(name, seeds) for name in names}
    print(table(found))
    bars(found).save(OUT / "bars.png")


if __name__ == "__main__":
    main()
