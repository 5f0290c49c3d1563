"""The probing table of docs/experiments.md: `python benchmarks/locality.py`, more than an hour of two cores.

MaskEmbed and the baselines of its family against the demo's teacher, over three paired seeds: a seed is that of the
scenes, of the alignment and of the probes. What an earlier call finished in runs/locality is kept. Differences from the
teacher: mean and standard error (standard deviation / sqrt 3).
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
SEEDS, OUT = (1, 2, 3), Path("runs/locality")
NAMES = ("teacher", "maskembed", "additive", "average", "crop")


def command(log: Path, *argv: object) -> None:
    """Run a command of this project on one core, its output in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *map(str, argv)], env=environment, stdout=file, stderr=file, check=True)


def align_and_probe(job: tuple[str, int]) -> None:
    """Align the teacher by an objective ("teacher": not at all), and probe what comes out."""
    objective, seed = job
    backbone, out, scenes = ROOT / "demo/teacher.safetensors", OUT / f"{objective}-{seed}", OUT / f"scenes-{seed}"
    if objective != "teacher":
        backbone = out / "align/aligned.safetensors"
        if not backbone.exists():
            flags = f"--objective {objective} --seed {seed} --out {out}/align --workers 0 --data {scenes}/images/train"
            flags += f" --val {scenes}/images/val" + " --resume" * any((out / "align").glob("checkpoints/update-*"))
            command(OUT / f"logs/align-{objective}-{seed}.txt", ROOT / "train_align.py", *flags.split())
    flags = f"{backbone} --data {scenes} --tasks local,global,leakage --heads transformer,linear --seed {seed}"
    flags += f" --out {out}/probe --workers 0 --resume"
    if objective in ("teacher", "maskembed"):  # as in figure 9, right
        flags += " --interventions none,cls-only,anonymous"
    command(OUT / f"logs/probe-{objective}-{seed}.txt", ROOT / "probe.py", *flags.split())


def found_by(objective: str) -> dict[str, np.ndarray]:
    """What the probes found: column -> recall in percent, or leakage, of each seed."""
    columns: dict[str, list[float]] = {}
    for seed in SEEDS:
        for result in json.loads((OUT / f"{objective}-{seed}/probe/results.json").read_text())["results"]:
            best, kind = result["best"], result["probe"]
            title = ", ".join(kind[k] for k in ("task", "head", "intervention") if kind[k] not in ("", "none"))
            columns.setdefault(title, []).append(best["leakage"] if "leakage" in best else 100 * best["recall"])
    return {title: np.array(values) for title, values in columns.items()}


def main() -> None:
    """Write the scenes, run what is missing, print the table."""
    for seed in SEEDS:
        if not (OUT / f"scenes-{seed}").exists():
            command(OUT / f"logs/scenes-{seed}.txt", ROOT / "demo/scenes.py", OUT / f"scenes-{seed}", "--seed", seed)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(align_and_probe, [(name, seed) for seed in SEEDS for name in NAMES]))
    found = {name: found_by(name) for name in NAMES}
    titles = list(found["teacher"])
    print("| macro recall, % | " + " | ".join(titles) + " |\n| --- |" + " --- |" * len(titles))
    for name in NAMES:
        cells = []
        for title in titles:
            digits, teacher = (4 if title == "leakage" else 2), found["teacher"][title]
            if name == "teacher":
                cells.append(f"{teacher.mean():.{digits}f}")
            elif title in found[name]:
                change = found[name][title] - teacher
                cells.append(f"{change.mean():+.{digits}f} ± {change.std(ddof=1) / len(SEEDS) ** 0.5:.{digits}f}")
            else:
                cells.append("")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
