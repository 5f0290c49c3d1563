"""The house's arrows: files that stand alone work when they are copied alone, and each imports what it may, no more."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

TINY = "image_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2"
COPIES = {  # files -> what is done with them in an empty folder
    "masks": "assert masks.uniform(2, 9).shape == (2, 9)",
    "vit": f"m = vit.ViT(vit.ViTConfig({TINY})); vit.save(m, 'm.safetensors'); vit.load('m.safetensors')",
    "llama": "c = llama.LlamaConfig(99, 32, 64, 1, 2); llama.save(llama.Llama(c), 'm'); llama.load('m')",
    "data": "from PIL import Image; Image.new('RGB', (9, 9)).save('a.png'); assert len(data.ImageFolder('.')) == 1",
    "pictures": "import numpy as np; assert pictures.grid([[np.zeros((9, 9, 3), np.uint8)]]).width > 9",
    "run": "assert run.setup()[:2] == (0, 1) and run.all_sum(2) == [2]",
    "demo/scenes": "assert scenes.write('s', 2, 1, 1, size=32, workers=0).is_dir()",
    "maskembed vit": f"s = maskembed.make_student(vit.ViT(vit.ViTConfig({TINY}))); maskembed.save(s, 's.safetensors')",
    "decode": "assert decode.read(decode.write('ring', 'box', 2))[0].refs == range(2)",
    "vlm vit maskembed llama decode": "assert len(vlm.ADAPTERS) == 5 and vlm.TEMPLATES['llama'].piece('What?', 0)",
}
MAY_IMPORT = {
    "masks": "", "vit": "", "llama": "", "data": "", "pictures": "", "run": "", "demo/scenes": "",
    "maskembed": "vit", "vlm": "vit maskembed llama decode pictures", "decode": "",
    "convert": "vit llama maskembed data",
    "probe": "vit data pictures run demo", "train_align": "masks vit maskembed data pictures run demo",
    "train_vlm": "vlm vit llama decode data run demo", "eval": "vlm decode data pictures run demo",
}  # fmt: skip


@pytest.mark.parametrize("files", COPIES)
def test_works_when_copied_alone(files: str, tmp_path: Path):
    names = [Path(file).name for file in files.split()]
    for file, name in zip(files.split(), names):
        shutil.copy(ROOT / f"{file}.py", tmp_path / f"{name}.py")
    code = f"import {', '.join(names)}; {COPIES[files]}"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={"PATH": "", "OMP_NUM_THREADS": "1"})


def test_files_import_what_the_design_says():
    ours = {Path(file).name for file in MAY_IMPORT} | {"demo"}
    assert {path.stem for path in ROOT.glob("*.py")} == MAY_IMPORT.keys() - {"demo/scenes"}
    for file, allowed in MAY_IMPORT.items():
        found = set()
        for node in ast.walk(ast.parse((ROOT / f"{file}.py").read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
        assert found & ours <= set(allowed.split()), file
