"""Speed and memory on a GPU, in about five minutes: `python benchmarks/gpu.py`.

Each line is printed as soon as it is measured. What is compared runs in turns; timm and transformers join in where they
are installed.
"""

import importlib.util
import os
import time
from collections.abc import Callable

import torch
from torch import nn

from bench import compare_updates, interleave  # first: it puts the project on the path

import llama
import vit

START, LIMIT = time.perf_counter(), 300.0


def say(text: str) -> None:
    """A line, at once, after the seconds since the start."""
    print(f"[{time.perf_counter() - START:5.0f} s] {text}", flush=True)


def peak(function: Callable[[], object]) -> float:
    """The GPU memory that a call needs above what is held before, in MiB."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def plain_softcap(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The formula of section C, as a CPU runs it."""
    logits = 30 * torch.tanh(q @ k.mT / q.shape[-1] ** 0.5 / 30)
    return logits.softmax(-1) @ v


def softcap() -> None:
    """Soft-capped attention, forward and backward: 16 x 729 tokens, 16 heads of 72 channels, bf16."""
    q, k, v = (torch.randn(16, 16, 729, 72, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    grad = torch.randn_like(q)
    ways = {"formula": plain_softcap, "fused": lambda q, k, v: vit.attention(q, k, v, 30.0), "uncapped": vit.attention}
    steps = {name: lambda way=way: torch.autograd.grad(way(q, k, v), (q, k, v), grad) for name, way in ways.items()}
    memory, took = {name: peak(step) for name, step in steps.items()}, interleave(steps, 20)
    for name in ("fused", "uncapped"):
        share = memory[name] / memory["formula"]
        say(f"soft-cap {name}: {took[name] / took['formula']:.2f} of the formula's time, {share:.2f} of its memory")


def updates() -> None:
    """Whole updates of ViT-B/16 @224 and ViT-L/14 @336, eager, compiled and with timm's modules."""
    for name, images in (("in1k-vit-b", 64), ("clip-vit-l-336", 32)):
        for row in compare_updates(vit.BACKBONES[name], images, True, "cuda", 8192, 5):
            say(row)
        torch.cuda.empty_cache()


def both_llamas(config: llama.LlamaConfig, dtype: torch.dtype) -> tuple[llama.Llama, nn.Module]:
    """The same random weights in our model and in transformers'."""
    import transformers

    torch.manual_seed(0)
    with torch.device("cuda"):
        ours = llama.Llama(config).to(dtype)
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_transformers())).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def training() -> None:
    """A training step of 1.2 billion parameters in bf16 autocast: 8 x (576 image tokens, 60 of text, 12 of answer)."""
    sizes = dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=20, num_attention_heads=16)
    ours, theirs = both_llamas(llama.LlamaConfig(**sizes), torch.float32)
    embeds, labels = torch.randn(8, 648, 2048, device="cuda") * 0.02, torch.full((8, 648), -100, device="cuda")
    labels[:, -12:] = torch.randint(0, 32000, (8, 12), device="cuda")

    def step(model: nn.Module, loss: Callable[[], torch.Tensor]) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss().backward()
        model.zero_grad(set_to_none=False)

    steps = {
        "ours": lambda: step(ours, lambda: ours.loss(embeds, labels)),
        "theirs": lambda: step(theirs, lambda: theirs(inputs_embeds=embeds, labels=labels).loss),
    }
    memory, took = {name: peak(function) for name, function in steps.items()}, interleave(steps, 5)
    say(f"Llama training step: {took['theirs'] / took['ours']:.2f} times as fast as transformers', "
        f"{memory['ours'] / memory['theirs']:.2f} of its extra memory")


def generation() -> None:
    """64 tokens of Llama 2 7B after a prompt of 640, bf16; the limit is reading all weights once a token."""
    ours, theirs = both_llamas(llama.LlamaConfig(), torch.bfloat16)
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target, compiled = torch.empty_like(source), torch.compile(ours.decode, mode="reduce-overhead")
    ids = torch.randint(3, 32000, (1, 640), device="cuda")
    how = dict(max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0)
    how["attention_mask"] = torch.ones_like(ids)

    def fast() -> None:
        ours.decode = compiled
        ours.generate(ids, max_new_tokens=64, stop=None)
        del ours.decode

    took = interleave({
        "eager": lambda: ours.generate(ids, max_new_tokens=64, stop=None), "compiled": fast,
        "transformers": lambda: theirs.generate(ids, **how), "copy": lambda: target.copy_(source),
    }, 3)
    limit = 64 * sum(p.nbytes for p in ours.parameters()) / (2 * source.nbytes / took["copy"])
    for name in ("eager", "compiled"):
        say(f"Llama 7B generation, {name}: {took['transformers'] / took[name]:.2f} times as fast as transformers', "
            f"{limit / took[name]:.2f} of the memory-bandwidth limit")


if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
    torch.set_float32_matmul_precision("high")
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    parts = [softcap, updates] + [training, generation] * bool(importlib.util.find_spec("transformers"))
    for part in parts:
        if time.perf_counter() - START > LIMIT - 60:
            say(f"{part.__name__}: left out, the five minutes are over")
            continue
        part()
        torch.cuda.empty_cache()
