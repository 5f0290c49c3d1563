"""What runs on a GPU alone: FlexAttention's kernel, compiled models, bf16, NCCL, FSDP2 there. Skipped without one.

Each test prints the fast path that it ran (`python -m pytest tests/test_cuda.py -s`); all of them take under 3 minutes.
Where float32 is compared with the CPU, TF32 is off; the commands have it on, so their losses agree less closely.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import llama
import maskembed
import train_align
import vit
import vlm
from conftest import ROOT, launch, losses

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


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


def command(script: str, *argv: object, **how: object) -> str:
    """A command's standard output; with ranks=1 under torchrun, where NCCL is used. It must succeed."""
    process = launch(script, *argv, **how)
    out, said = process.communicate()
    assert process.returncode == 0, said[-3000:]
    return out


def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cap: float) -> torch.Tensor:
    """Section C."""
    logits = cap * torch.tanh(q @ k.mT / q.shape[-1] ** 0.5 / cap)
    return logits.softmax(-1) @ v


@pytest.mark.parametrize("compiled", (False, True))
@pytest.mark.parametrize("dtype, most", ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)))
@pytest.mark.parametrize("shape", ((2, 4, 197, 64), (1, 2, 729, 72)))
def test_softcap(shape: tuple[int, ...], dtype: torch.dtype, most: float, compiled: bool):
    """The fused kernel against the formula in float64, forward and backward: 72 channels too."""
    torch.manual_seed(0)
    inputs = [3 * torch.randn(shape, device="cuda") for _ in range(3)]
    weight = torch.randn(shape, device="cuda")
    exact = [t.to(dtype).double().requires_grad_() for t in inputs]
    ours = [t.to(dtype).requires_grad_() for t in inputs]
    attention = torch.compile(vit.attention) if compiled else vit.attention
    out, expected = attention(*ours, 10.0), formula(*exact, 10.0)
    (out.double() * weight).sum().backward()
    (expected * weight).sum().backward()
    assert out.dtype == dtype and error(out, expected) < most
    for mine, theirs in zip(ours, exact):
        assert error(mine.grad, theirs.grad) < most
    print(f"ran: FlexAttention with the soft-cap, {dtype}, {'inside torch.compile' if compiled else 'eager'}, {shape}")


@pytest.mark.parametrize("name", ("clip-vit-b", "beit-vit-b", "eva02-vit-b"))
def test_backbone(name: str):
    """Each family in float32 as on the CPU; soft-capped at a bound that matters where the family can have one."""
    torch.manual_seed(0)
    config = replace(vit.BACKBONES[name], depth=2, softcap=0.5 if name == "clip-vit-b" else None)
    model = vit.ViT(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    images = torch.randn(2, 3, config.image_size, config.image_size)
    with torch.no_grad():
        expected = model(images)
        assert error(model.cuda()(images.cuda()), expected) < 1e-4
    print(f"ran: {name} by {'FlexAttention' if config.softcap else 'scaled_dot_product_attention'}")


def test_an_older_gpu_runs_the_formula(monkeypatch):
    """Below compute capability 8 bf16 is emulated, and FlexAttention's kernels cannot be counted on."""
    q, k, v = torch.randn(3, 1, 2, 9, 8, device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=7))
    monkeypatch.setattr(vit, "flex_softcap", None)
    assert error(vit.attention(q, k, v, 2.0), formula(q, k, v, 2.0)) < 1e-5


def test_an_update_waits_for_nothing():
    """From pixels to gradients the host never waits for the GPU."""
    config = vit.ViTConfig(image_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=2)
    torch.manual_seed(0)
    teacher = vit.ViT(config).cuda()
    student, options = maskembed.make_student(teacher).cuda(), argparse.Namespace(masks="uniform", views="3")
    pixels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8, device="cuda")
    for mode in ("default", "error"):  # the first time, kernels and constants are made
        torch.cuda.set_sync_debug_mode(mode)
        m = train_align.draw_masks(options, config.grid, 0, 0, range(4)).pin_memory().to("cuda", non_blocking=True)
        x = vit.normalize(pixels, config)
        with torch.autocast("cuda", torch.bfloat16):
            target = maskembed.teacher_targets(teacher, x, m)
            loss = maskembed.reconstruction_loss(student(x, m), target, m)
        loss.backward()
    torch.cuda.set_sync_debug_mode("default")


def align(weights: Path, scenes: Path, out: Path, *more: object, **how: object) -> list[float]:
    """The losses of six updates in two epochs."""
    files = f"--weights {weights} --data {scenes}/images/train --val {scenes}/images/val --out {out}"
    flags = f"--recipe own {files} --batch 8 --epochs 2 --updates 6 --lr 1e-3 --workers 2"
    command("train_align.py", *flags.split(), *more, **how)
    return losses(out)


def test_alignment(tiny_weights: Path, scenes: Path, tmp_path: Path):
    """On the GPU (TF32) as on the CPU; in bf16; compiled; and resumed."""
    expected = align(tiny_weights, scenes, tmp_path / "cpu", "--precision", "fp32", env={"CUDA_VISIBLE_DEVICES": ""})
    assert align(tiny_weights, scenes, tmp_path / "fp32", "--precision", "fp32") == pytest.approx(expected, rel=2e-3)
    nccl = align(tiny_weights, scenes, tmp_path / "nccl", "--precision", "fp32", ranks=1)
    assert nccl == pytest.approx(expected, rel=2e-3)
    assert align(tiny_weights, scenes, tmp_path / "bf16") == pytest.approx(expected, rel=3e-2)
    assert align(tiny_weights, scenes, tmp_path / "compiled", "--compile") == pytest.approx(expected, rel=3e-2)
    whole = align(tiny_weights, scenes, tmp_path / "parts", "--save-every", 3)
    (tmp_path / "parts" / "checkpoints" / "update-00000006.pt").unlink()
    assert align(tiny_weights, scenes, tmp_path / "parts", "--resume") == pytest.approx(whole, rel=1e-3)
    print("ran: alignment in fp32 (TF32), under NCCL, bf16 with FlexAttention, --compile, --resume")


def small_llama(**changes: object) -> llama.Llama:
    torch.manual_seed(0)
    sizes = dict(vocab_size=500, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4)
    model = llama.Llama(llama.LlamaConfig(**sizes | dict(max_position_embeddings=512) | changes))
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
        text = model.generate(i, mask=m, max_new_tokens=20)
        return [model(i, mask=m)[m.bool()].detach().cpu(), loss.detach().cpu(), *gradients, text]

    *expected, text = everything("cpu")
    *found, same = everything("cuda")
    assert all(error(a, b) < 1e-4 for a, b in zip(found, expected))
    assert same == text
    print(f"ran: Llama with {groups} heads of keys by scaled_dot_product_attention")


@pytest.mark.parametrize("mode", ("default", "reduce-overhead"))
def test_compiled_decoding(mode: str):
    """The step compiled once, as CUDA graphs too, gives the same text, each time."""
    model = small_llama().cuda()
    prompts = [torch.randint(3, 500, (4, 9), device="cuda") for _ in range(3)]
    expected = [model.generate(ids, max_new_tokens=40, stop=None) for ids in prompts]
    model.decode = torch.compile(model.decode, mode=mode)
    assert [model.generate(ids, max_new_tokens=40, stop=None) for ids in prompts] == expected
    print(f"ran: a decoding step compiled with mode {mode}, on a static KV cache")


@pytest.fixture(scope="module")
def parts(tiny_weights: Path, scenes: Path, tmp_path_factory) -> Path:
    """A folder with an aligned backbone, a language model with the demo's tokenizer, and conversations."""
    folder, tokenizer = tmp_path_factory.mktemp("parts"), ROOT / "demo" / "language" / "tokenizer.model"
    maskembed.save(maskembed.make_student(vit.load(tiny_weights)), folder / "aligned.safetensors")
    llama.save(small_llama(vocab_size=llama.Tokenizer(tokenizer).vocab_size), folder / "llama")
    (folder / "llama" / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    rows = json.loads((scenes / "conversations.json").read_text())
    rows += [{"conversations": row["conversations"]} for row in rows[:16]]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def test_vlm(parts: Path, scenes: Path, tmp_path: Path):
    """Alone and with FSDP2 under NCCL and recomputed activations the same losses; bf16 close to them; it answers."""

    def converse(name: str, *more: object, **how: object) -> list[float]:
        files = f"--weights {parts}/aligned.safetensors --language {parts}/llama --data {parts}/rows.json"
        flags = f"--recipe own {files} --images {scenes} --out {tmp_path / name} --batch 8 --epochs 5 --updates 8"
        command("train_vlm.py", *flags.split(), "--lr", 1e-3, "--workers", 2, *more, **how)
        return losses(tmp_path / name)

    expected = converse("alone", "--precision", "fp32")
    again = converse("fsdp", "--precision", "fp32", "--fsdp", "--checkpointing", ranks=1)
    assert again == pytest.approx(expected, rel=1e-4)
    assert converse("bf16") == pytest.approx(expected, rel=0.1)
    assert converse("bf16-fsdp", "--fsdp", ranks=1) == pytest.approx(expected, rel=0.1)
    images = [Image.open(scenes / "images" / "test" / "scene-000000.png"), None]
    questions = ["What color is the ring?", "What is a ring?"]
    model, on_cpu = (vlm.load(tmp_path / "alone" / "model", torch.float32, device) for device in ("cuda", "cpu"))
    together = model.generate(images, questions, max_new_tokens=12)
    assert together == on_cpu.generate(images, questions, max_new_tokens=12)
    vlm.load(tmp_path / "bf16" / "model", torch.bfloat16, "cuda").generate(images, questions, max_new_tokens=12)
    print("ran: train_vlm.py in fp32 and bf16, FSDP2 under NCCL with one process, recomputed activations, generation")


def test_pointing(parts: Path, scenes: Path, tmp_path: Path):
    """Boxes and masks: FSDP2 and bf16 as above, and the places are those that a CPU finds."""
    files = f"--weights {parts}/aligned.safetensors --language {parts}/llama --data {scenes}/pointing.json"
    flags = f"--recipe own --variant aligned-mlp {files} --units box,mask --pointer-width 32 --batch 8 --epochs 1"
    found = {}
    for name, how in {"fp32": {}, "bf16": {}, "bf16-fsdp": {"ranks": 1}}.items():
        more = ["--precision", name[:4], *["--fsdp"] * bool(how)]
        command("train_vlm.py", *flags.split(), "--lr", 1e-3, "--workers", 2, "--out", tmp_path / name, *more, **how)
        found[name] = sum((losses(tmp_path / name, key) for key in ("loss", "box", "mask")), [])
        assert found[name] == pytest.approx(found["fp32"], rel=0.1)
    image, answer = Image.open(scenes / "images" / "test" / "scene-000000.png"), []
    for device in ("cuda", "cpu"):
        model = vlm.load(tmp_path / "fp32" / "model", torch.float32, device)
        ids = model.tokenizer.encode("<Phrase>ring</Phrase>(<Unit>box</Unit>[0]<REF>)")
        model.language.generate = lambda **how: [ids]
        answer.append(model.ground([image], ["Where is the ring?"])[0][1][0].places.cpu())
    assert torch.allclose(*answer, atol=0.1)
    print("ran: train_vlm.py --units in fp32 and bf16, FSDP2, ground")
