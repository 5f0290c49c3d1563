"""What runs on a GPU only: FlexAttention's kernel and its gradients, compiled models, NCCL, FSDP2 there. Skipped without one.

Where float32 is compared with the CPU, TF32 is off; the commands have it on, so their losses agree less closely.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import data
import llama
import maskembed
import train_vlm
import vit
import vlm

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

ROOT = Path(vit.__file__).parent
TINY = dict(image_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, crop_pct=1.0)


@pytest.fixture(autouse=True)
def exact():
    """Products of float32 numbers in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, in units of the largest number."""
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return float((ours - theirs).abs().max() / theirs.abs().max())


def command(*argv: object, ranks: int = 0) -> str:
    """A command's standard output, run alone or under torchrun; it must succeed."""
    launcher = [sys.executable] + ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] * bool(ranks)
    done = subprocess.run([*launcher, *map(str, argv)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def logged(out: Path, key: str = "loss") -> list[float]:
    """A value of each line of log.jsonl that has it."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


# ----------------------------------------------------------------------------------------------------------------------
# Attention and the backbones


@pytest.mark.parametrize("compiled", (False, True))
@pytest.mark.parametrize("dtype, most", ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)))
@pytest.mark.parametrize("shape", ((2, 3, 65, 32), (2, 4, 197, 64), (1, 2, 729, 72)))
def test_softcap(shape: tuple[int, ...], dtype: torch.dtype, most: float, compiled: bool):
    """The fused kernel against the formula in float64, forward and backward: whole tiles or not, 72 channels too."""
    torch.manual_seed(0)
    inputs = [3 * torch.randn(shape, device="cuda") for _ in range(3)]
    weight = torch.randn(shape, device="cuda")
    exact = [t.to(dtype).double().requires_grad_() for t in inputs]
    ours = [t.to(dtype).requires_grad_() for t in inputs]
    attention = torch.compile(vit.attention) if compiled else vit.attention
    out, expected = attention(*ours, 10.0), vit.softcap_attention_plain(*exact, 10.0)
    (out.double() * weight).sum().backward()
    (expected * weight).sum().backward()
    assert out.dtype == dtype and error(out, expected) < most
    for mine, theirs in zip(ours, exact):
        assert error(mine.grad, theirs.grad) < most


@pytest.mark.parametrize("name", sorted({c.family: n for n, c in vit.BACKBONES.items()}.values()))
def test_backbone(name: str):
    """Each family in float32 as on the CPU, with a soft cap where the family can have one."""
    torch.manual_seed(0)
    config = replace(vit.BACKBONES[name], depth=2, softcap=30.0 if vit.BACKBONES[name].family == "vit" else None)
    model = vit.ViT(config).eval()
    images = torch.randn(2, 3, config.image_size, config.image_size)
    with torch.no_grad():
        expected = model(images)
        assert error(model.cuda()(images.cuda()), expected) < 1e-4


# ----------------------------------------------------------------------------------------------------------------------
# Alignment


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A tiny backbone's file."""
    torch.manual_seed(0)
    model = vit.ViT(vit.ViTConfig(**TINY))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    vit.save(model, path)
    return path


def align(tiny: Path, out: Path, *more: object, ranks: int = 0, device: bool = True) -> list[float]:
    """The losses of six updates: two epochs of three."""
    how = f"--weights {tiny} --out {out} --scenes 24 --batch 8 --epochs 2 --lr 1e-3 --val-images 8 --log-every 1 --workers 2"
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not device:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        command("train_align.py", *how.split(), *more, ranks=ranks)
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
    return logged(out)


def test_alignment(tiny: Path, tmp_path: Path):
    """On the GPU (TF32) as on the CPU; under torchrun with NCCL; in bf16; compiled."""
    expected = align(tiny, tmp_path / "cpu", "--precision", "fp32", device=False)
    found = align(tiny, tmp_path / "gpu", "--precision", "fp32")
    assert found == pytest.approx(expected, rel=2e-3)
    assert align(tiny, tmp_path / "nccl", "--precision", "fp32", ranks=1) == pytest.approx(found, rel=1e-4)
    assert align(tiny, tmp_path / "bf16") == pytest.approx(expected, rel=3e-2)
    assert align(tiny, tmp_path / "compiled", "--compile") == pytest.approx(expected, rel=3e-2)


def test_alignment_resumes_exactly(tiny: Path, tmp_path: Path):
    """In bf16 with the capped kernel: six updates at once, or three and three."""
    whole = align(tiny, tmp_path / "whole")
    align(tiny, tmp_path / "parts")
    half = sorted((tmp_path / "parts" / "checkpoints").glob("update-*"))[0]  # after the first epoch
    align(tiny, tmp_path / "parts", "--resume", half)
    assert logged(tmp_path / "parts") == pytest.approx(whole, rel=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# The language model


def small_llama(**changes: object) -> llama.Llama:
    torch.manual_seed(0)
    sizes = dict(vocab_size=500, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=256)
    model = llama.Llama(llama.LlamaConfig(**sizes | changes))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("groups", (4, 2))
def test_llama(groups: int):
    """Logits, loss and gradients, and greedy text of prompts of different lengths, as on the CPU in float32."""
    model = small_llama(num_key_value_heads=groups)
    ids, mask = llama.Tokenizer.pad([list(range(3, 3 + n)) for n in (5, 17, 9)])
    labels = ids.masked_fill(mask == 0, -100)

    def everything(device: str) -> list:
        model.to(device).zero_grad()
        i, m, y = ids.to(device), mask.to(device), labels.to(device)
        loss = model.loss(model.embed(i), y, m)
        loss.backward()
        gradients = [p.grad.cpu() for p in model.parameters()]
        return [model(i, mask=m)[m.bool()].detach().cpu(), loss.detach().cpu(), *gradients, model.generate(i, mask=m, max_new_tokens=20)]

    *expected, text = everything("cpu")
    *found, same = everything("cuda")
    assert all(error(a, b) < 1e-4 for a, b in zip(found, expected))
    assert same == text


@pytest.mark.parametrize("mode", ("default", "reduce-overhead"))
def test_compiled_decoding(mode: str):
    """The step compiled once, as CUDA graphs too, gives the same text, each time."""
    model = small_llama().cuda()
    prompts = [torch.randint(3, 500, (4, 9), device="cuda") for _ in range(3)]
    expected = [model.generate(ids, max_new_tokens=40, stop=None) for ids in prompts]
    model.decode = torch.compile(model.decode, mode=mode)
    assert [model.generate(ids, max_new_tokens=40, stop=None) for ids in prompts] == expected


# ----------------------------------------------------------------------------------------------------------------------
# The vision-language model


@pytest.fixture(scope="module")
def parts(tiny: Path, tmp_path_factory) -> Path:
    """A folder with an aligned backbone, a language model and conversations, most with images."""
    folder = tmp_path_factory.mktemp("parts")
    student = maskembed.make_student(vit.load(tiny))
    maskembed.save(student, folder / "aligned.safetensors")
    llama.save(small_llama(vocab_size=640), folder / "llama")
    train_vlm.train_tokenizer(folder / "llama" / "tokenizer.model")
    scenes, rows = data.Scenes(8, 0, 32), []
    (folder / "images").mkdir()
    for i in range(8):
        scenes[i].image.save(folder / "images" / scenes.name(i))
        rows += scenes[i].conversations[:5]
    rows += [{"conversations": row["conversations"]} for row in rows[:16]]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def converse(parts: Path, out: Path, *more: object, ranks: int = 0) -> list[float]:
    """The losses of ten updates."""
    how = f"--recipe own --weights {parts / 'aligned.safetensors'} --language {parts / 'llama'} --data {parts / 'rows.json'}"
    how += f" --images {parts / 'images'} --out {out} --batch 8 --epochs 5 --updates 10 --lr 1e-3 --log-every 1 --workers 2 --save-every 4"
    command("train_vlm.py", *how.split(), *more, ranks=ranks)
    return logged(out)


def test_vlm(parts: Path, tmp_path: Path):
    """Alone, with NCCL, with FSDP2, with activations computed again: the same losses; bf16 close to them. And a resumed
    run, also from an FSDP checkpoint without FSDP; the model in the folder answers."""
    expected = converse(parts, tmp_path / "alone", "--precision", "fp32")
    assert converse(parts, tmp_path / "nccl", "--precision", "fp32", ranks=1) == pytest.approx(expected, rel=1e-4)
    assert converse(parts, tmp_path / "fsdp", "--precision", "fp32", "--fsdp", ranks=1) == pytest.approx(expected, rel=1e-4)
    again = converse(parts, tmp_path / "again", "--precision", "fp32", "--fsdp", "--checkpointing", ranks=1)
    assert again == pytest.approx(expected, rel=1e-4)
    for flags in ((), ("--fsdp",), ("--fsdp", "--checkpointing")):
        out = tmp_path / "-".join(("bf16", *flags))
        assert converse(parts, out, *flags, ranks=int(bool(flags))) == pytest.approx(expected, rel=0.1)  # 4.6% was seen
    newest = tmp_path / "fsdp" / "checkpoints" / "update-00000008"
    assert converse(parts, tmp_path / "fsdp", "--precision", "fp32", "--resume", newest) == pytest.approx(expected, rel=1e-4)
    for dtype in (torch.float32, torch.bfloat16):
        model = vlm.load(tmp_path / "alone" / "model", dtype, "cuda")
        images = [data.Scenes(1, 5, 32)[0].image, None, data.Scenes(1, 6, 32)[0].image]
        questions = ["What color is the ring?", "What is a ring?", "Describe the image."]
        together = model.generate(images, questions, max_new_tokens=12)
        if dtype == torch.float32:
            assert together == [model.generate([i], [q], max_new_tokens=12)[0] for i, q in zip(images, questions)]
            on_cpu = vlm.load(tmp_path / "alone" / "model")
            assert together == on_cpu.generate(images, questions, max_new_tokens=12)


def test_probe_and_eval(tiny: Path, parts: Path, tmp_path: Path):
    """Both commands find the GPU and end with their tables."""
    flags = f"{tiny} --scenes 64 --val-images 16 --epochs 1 --batch 16 --out {tmp_path / 'probe'}"
    assert "recall" in command("probe.py", *flags.split())
    converse(parts, tmp_path / "vlm")
    assert "presence" in command("eval.py", tmp_path / "vlm", "--limit", 20, "--out", tmp_path / "eval")
