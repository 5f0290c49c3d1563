"""VLM training, start to finish (section 5, appendix D): a language model learns to read an aligned backbone's tokens.

    python train_vlm.py                                         # the demo, after train_align.py; minutes on a laptop
    torchrun --nproc-per-node 8 --shutdown-timeout 900 train_vlm.py --recipe clip-vit-l-336 --fsdp \\
        --weights aligned.safetensors --language Llama-2-7b-hf \\
        --data llava_v1_5_mix665k.json --images playground/data --checkpointing                 # the paper's
    python train_vlm.py ... --resume                            # continue exactly, on any number of processes

Writes to --out: model/ (the VLM), log.jsonl, options.json, checkpoints/. What an update sees depends on the seed and
its number alone, and its loss is the mean over all answer tokens of the global batch, so in float32 any number of
processes and micro-batches trains the same model. A checkpoint is one file, from which any number of processes can
continue, with or without FSDP; the first one gathers it in main memory (81 GB for 7B weights and their AdamW moments).
"""

import argparse
import functools
import json
import math
import os
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

import data
import decode
import llama
import run
import vit
import vlm

# --- options: the paper's numbers are the defaults --------------------------------------------------------------------

# Figures 5, 11, 12 and 13: the adapter, and whether the backbone is locality-aligned.
VARIANTS: dict[str, tuple[str, bool]] = {
    "baseline-mlp": ("mlp", False),
    "aligned-mlp": ("mlp", True),
    "aligned-decoder": ("decoder", True),  # the paper's
    "baseline-transformer": ("transformer", False),
    "baseline-truncated": ("truncated", False),
    "aligned-truncated": ("truncated", True),
    "dinov2-fusion": ("fused-mlp", False),
}
# Table 7: the same numbers for both backbones, all variants and both data mixtures. They fill in what was not typed.
PAPER = {"variant": "aligned-decoder", "epochs": 2, "batch": 128, "lr": 2e-5, "warmup": 0.03, "weight_decay": 0.1,
         "pointer_width": 256}
HERE = Path(__file__).parent
RECIPES: dict[str, dict[str, object]] = {
    "clip-vit-l-336": PAPER,
    "siglip-so400m-384": PAPER,
    "own": PAPER,
    "demo": PAPER | {
        "epochs": 3, "batch": 32, "lr": 1.5e-3, "cache_features": True, "language": f"{HERE}/demo/language",
        "aligned": "runs/align/aligned.safetensors", "baseline": f"{HERE}/demo/teacher.safetensors",
        "aligned scale": 1.13, "baseline scale": 0.27, "pointing": {"pointer_width": 128, "epochs": 2},
    },
}  # fmt: skip
MAX_NORM = 1.0  # gradient norm (table 7)
POINTING = 0.5  # weight of each unit's loss beside the language model's
FREE = "weights second language data images lr micro_batch precision checkpointing workers save_every fsdp".split()


def options(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict | None]:
    """The options, complete, and with --resume the newest checkpoint. A mistake in the flags exits with status 2."""
    parser = argparse.ArgumentParser(description="Train a vision-language model on a frozen backbone, aligned or not.")
    add, count, rate = parser.add_argument, run.number(1), run.number(0, float)
    switch = {"action": argparse.BooleanOptionalAction, "default": False}
    add("--recipe", default="demo", choices=RECIPES, help="whose numbers, and which backbone; own: another backbone")
    add("--variant", choices=VARIANTS, help="the adapter and the kind of backbone; default: the recipe's")
    add("--weights", help="the backbone: an aligned.safetensors of train_align.py, or a baseline")
    add("--second", help="dinov2-fusion: the weights of DINOv2 ViT-L with registers")
    add("--language", help="a folder with Llama's weights in transformers' layout and its tokenizer.model")
    add("--data", nargs="+", help="conversations in LLaVA's format, one or more files; without it the demo's scenes")
    add("--images", nargs="+", help="the folder that image paths start from, one for all files or one for each; "
        "default: the folder of the file")
    add("--out", type=Path, default=Path("runs/vlm"), help="where everything is written")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --out, with its options")
    # the text
    add("--template", choices=vlm.TEMPLATES, default="llama", help="the text around questions and answers")
    add("--feature-scale", type=rate, help="multiplies the features, in the demo to unit variance; default: 1")
    add("--max-text", type=run.number(2), default=2048, help="cut each conversation to this many tokens")
    # pointing
    add("--units", type=lambda text: text.split(","), default=[], help="learn to point with these: box, mask, box,mask")
    add("--plan", **switch, help="answers begin with REF-VLM's list of what they point at")
    add("--pointer-width", type=run.number(32), help="of the decoder of places, a multiple of 32; default: 256")
    add("--pointer-depth", type=count, default=3, help="its blocks")
    # the numbers of training; the defaults are the recipe's
    add("--epochs", type=count, help="passes over the data")
    add("--updates", type=count, help="end the schedule after at most this many updates")
    add("--batch", type=count, help="conversations per update, over all processes")
    add("--lr", type=rate, help="peak learning rate")
    add("--warmup", type=run.number(0, float, below=1), help="share of the updates in which the learning rate rises")
    add("--weight-decay", type=rate, help="AdamW's; biases and norms have none")
    add("--seed", type=run.number(0), default=0, help="of the order of the data and of new weights")
    # the machine
    add("--fsdp", **switch, help="shard weights, gradients and optimizer over the processes (FSDP2)")
    add("--micro-batch", type=count, default=16, help="conversations at a time on a process, at most")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where the device has it")
    add("--checkpointing", **switch, help="recompute activations instead of keeping them")
    add("--cache-features", action=argparse.BooleanOptionalAction,
        help="run the frozen backbone once for each row, not in each epoch; the features of all rows lie in --out")
    add("--workers", type=run.number(0), default=run.workers(), help="data workers of each process")
    add("--save-every", type=count, default=1000, help="updates between checkpoints")
    o, state = run.parse(parser, argv, FREE)

    recipe = RECIPES[o.recipe] | (RECIPES[o.recipe].get("pointing", {}) if o.units else {})
    for name, value in recipe.items():
        if getattr(o, name, "") is None:
            setattr(o, name, value)
    adapter, aligned = VARIANTS[o.variant]
    kind = "aligned" if aligned else "baseline"
    o.weights = o.weights or recipe.get(kind)
    scale = recipe.get(f"{kind} scale", 1.0) if adapter in ("mlp", "transformer") else 1.0  # new layers
    o.feature_scale = o.feature_scale or scale
    if o.recipe != "demo" and not (o.weights and o.language and o.data):
        parser.error(f"--recipe {o.recipe} needs --weights (backbone: {kind}), --language (Llama's folder) and --data")
    if (adapter == "fused-mlp") != (o.second is not None):
        parser.error("--second, the weights of DINOv2, goes with --variant dinov2-fusion")
    if not set(o.units) <= set(decode.UNITS):
        parser.error(f"--units {','.join(o.units)}: choose from {', '.join(decode.UNITS)}")
    if o.images and not (o.data and len(o.images) in (1, len(o.data))):
        parser.error("--images: goes with --data; give one folder for all of its files, or one for each")
    return o, state


def learning_rate(update: int, updates: int, warmup: float, peak: float) -> float:
    """A linear rise from 0 over the share `warmup` of the updates, then a cosine to 0."""
    rise = int(warmup * updates)
    if update < rise:
        return peak * update / rise
    return peak * (1 + math.cos(math.pi * (update - rise) / (updates - rise))) / 2


# --- the model --------------------------------------------------------------------------------------------------------

def build_model(o: argparse.Namespace, empty: bool) -> vlm.VLM:
    """The VLM of its pre-trained parts. empty: the language model has no values yet, `shard` reads them."""
    adapter, aligned = VARIANTS[o.variant]
    if o.recipe == "demo" and not Path(o.weights).exists():
        raise ValueError(f"{o.weights}: no such file; run train_align.py first, which writes it")
    torch.manual_seed(o.seed)  # new weights: the same on every process
    vision = vlm.load_vision(o.weights, o.recipe if o.recipe in vit.BACKBONES else None)
    if isinstance(vision, vlm.Student) != aligned:
        kinds = "a pre-trained backbone that is not aligned", "an aligned backbone with its decoder (train_align.py)"
        raise ValueError(f"{o.weights}: is the wrong kind of backbone; --variant {o.variant} needs {kinds[aligned]}")
    second = None
    if o.second:  # at the image size of the first
        size = (vision.encoder if aligned else vision).config.image_size
        own = vit.read_config(vit.read_tensors(o.second)[1], o.second) or vit.BACKBONES["dinov2-vit-l"]
        second = vit.load(o.second, replace(own, image_size=size))
    added = decode.ADDED if o.units else ()
    tokenizer = llama.Tokenizer(o.language, llama.read_config(o.language).vocab_size + len(added), added)
    tokens = tokenizer.vocab_size + len(added)
    if empty:
        with torch.device("meta"):
            language = llama.Llama(llama.read_config(o.language, tokens))
    else:
        language = llama.load(o.language, least=tokens)
    model = vlm.build(vision, language, tokenizer, adapter, second, vlm.TEMPLATES[o.template], o.max_text,
                      o.feature_scale, o.units, width=o.pointer_width, depth=o.pointer_depth)
    for part in (model.language, *model.adapter.modules()):
        if hasattr(part, "checkpointing"):
            part.checkpointing = o.checkpointing
    return model


def shard(model: vlm.VLM, folder: str, device: torch.device, bf16: bool) -> None:
    """FSDP2: each process holds its rows of each trained weight, its gradient and its optimizer state, in float32. The
    weights of a layer are gathered (in bf16) when it runs. Each process has all of the frozen backbone."""
    precision = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False)
    how = {"mesh": init_device_mesh(device.type, (dist.get_world_size(),)), "mp_policy": precision}
    for layer in model.language.model.layers:
        fully_shard(layer, **how)
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    fully_shard(model, ignored_params=frozen, **how)  # the rest: adapter, word embeddings, last layer
    model.language.to_empty(device=device)
    llama.fill(model.language, folder)


def make_optimizer(trained: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW, without weight decay on biases and norms. A checkpoint needs its state even before its first step."""
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay}]
    groups += [{"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr, fused=True)
    for p in trained:
        step = torch.zeros((), device=p.device)
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def keep_features(o: argparse.Namespace, rank: int, world: int, model: vlm.VLM, source: data.Conversations) -> None:
    """Run the frozen backbone once for each row; from then on `source` gives the features in place of the pixels. They
    lie in a file in --out that all processes share; it loses its name at once, and goes with them."""
    device, size = next(model.parameters()).device, model.config.vision.image_size
    rows, file = np.flatnonzero(source.has_image & (source.lengths > 0))[rank::world], o.out / "features.bin"
    loader = DataLoader(Subset(source, [(0, i) for i in rows.tolist()]), 64, num_workers=o.workers,
                        worker_init_fn=run.ignore_signals, collate_fn=data.collate_conversations)
    file.parent.mkdir(parents=True, exist_ok=True)
    with run.autocast(o.precision, device), run.bar("making features", len(rows), rank, unit="image") as bar:
        one = model.features(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device))  # [1, M, D]
        kept = torch.from_file(str(file), True, len(source) * one.numel(), dtype=one.dtype).view(-1, *one.shape[1:])
        run.barrier()
        file.unlink(missing_ok=True)  # all processes hold it, also without its name
        for part, (batch, bad) in zip(torch.from_numpy(rows).split(64), loader):
            if bad:
                raise ValueError(f"{bad[0]}; --cache-features needs every image: leave the row out")
            kept[part] = model.features(batch["images"].to(device)).cpu()
            bar.update(len(part))
    run.barrier()
    source.features = kept


def save_model(model: vlm.VLM, folder: Path, rank: int, dtype: torch.dtype) -> None:
    """Write the VLM's folder on the first process. Sharded weights are gathered there one at a time, as `dtype`."""
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().to(dtype if parameter.requires_grad else parameter.dtype)
        if isinstance(value, DTensor):
            value = value.full_tensor()  # all processes take part
        if rank == 0:
            state[name] = value.cpu()
    run.on_first(lambda: vlm.save(model, folder, state))


# --- the run, top to bottom -------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> None:
    """Options, model, optimizer, data, begin or continue, the loop, save."""
    o, state = options(argv)
    rank, world, device = run.setup()
    bf16, autocast = run.use_bf16(o.precision, device), run.autocast(o.precision, device)

    # the model: the backbone is frozen, the adapter and the language model are trained; DDP or FSDP2 on many processes
    sharded = o.fsdp and dist.is_initialized()
    model = build_model(o, empty=sharded)
    if bf16:  # the frozen part is rounded once, as when it is loaded for evaluation
        for backbone in filter(None, (model.vision, model.second)):
            backbone.bfloat16()
    if sharded:
        shard(model, o.language, device, bf16)
    model.to(device)
    parallel = model
    if world > 1 and not sharded:
        devices = [device] if device.type == "cuda" else None
        parallel = DistributedDataParallel(model, devices, gradient_as_bucket_view=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trained, o.lr, o.weight_decay)

    # data: the first process lists the conversations for all
    files, roots = o.data, o.images
    if files is None:
        from demo import scenes

        roots = [run.on_first(scenes.ensure)]
        files = [roots[0] / ("pointing.json" if o.units else "conversations.json")]
    roots = roots or [os.path.dirname(os.path.abspath(file)) for file in files]
    encode = functools.partial(vlm.encode, model.tokenizer, model.config.template, max_text=model.config.max_text,
                               plan=o.plan)
    prepare = functools.partial(vlm.prepare, config=model.config.vision)
    point = functools.partial(decode.encode, config=model.config.pointer) if o.units else None
    source = run.on_first(lambda: data.Conversations(files, roots, encode, prepare, o.workers, point))
    if o.cache_features:
        keep_features(o, rank, world, model, source)
    share = o.batch // world
    micro = run.micro_batch(share, o.micro_batch)
    start = state["update"] if state else 0
    batches = data.ConversationBatches(source, o.batch, o.epochs, o.seed, rank, world, micro, start, o.updates)
    loader = iter(DataLoader(source, batch_sampler=batches, num_workers=o.workers, worker_init_fn=run.ignore_signals,
        collate_fn=data.collate_conversations, pin_memory=device.type == "cuda"))  # fmt: skip

    # begin, or continue from the checkpoint
    update, updates, skipped, skipped_in_row, bad_rows = start, batches.updates, 0, 0, 0
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)
    if state:
        if state["conversations"] != len(source):
            counts = f"{len(source)} conversations, not {state['conversations']} as in the run in {o.out}"
            raise ValueError(f"--data: has {counts}; give the same files")
        values = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        try:
            set_state_dict(model, optimizer, **values, options=whole)
        except RuntimeError:  # tensors of other shapes
            raise ValueError(f"{o.out}: its checkpoint is of other models; give its --weights and --language") from None
        skipped, skipped_in_row, bad_rows = state["skipped"], state["skipped_in_row"], state["bad_rows"]
        del state, values
    run.on_first(lambda: run.write(o.out / "options.json", json.dumps(run.plain(o), indent=2)))
    log, stop = run.Log(o.out / "log.jsonl", rank, update), run.CatchSignals()
    size = sum(p.numel() for p in trained) / 1e6
    how = f"{micro} at a time on each of {world} processes, {'bf16' if bf16 else 'fp32'} on {device}"
    log.say(f"{o.variant}: {size:,.1f}M trained parameters, {len(source):,} conversations, {updates:,} updates ({how})")
    for i in source.left_out[:20]:
        log.say(f"left out: {source.describe(i)}")
    if len(source.left_out) > 20:
        log.say(f"left out: {len(source.left_out) - 20} more rows")
    bar = run.bar("training", updates, rank, update)
    weights = torch.tensor([1.0] + [POINTING] * len(o.units), device=device)

    while update < updates:
        # 1. one update: the mean loss of all answer tokens, and of all places, in micro-batches on all processes
        clock = time.perf_counter()
        lr = learning_rate(update, updates, o.warmup, o.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        drawn = [next(loader) for _ in range(share // micro)]
        places = [triplet for batch, _ in drawn for one in batch["places"] if one for triplet in one.triplets]
        mine = [sum((batch["labels"] != llama.IGNORE).sum().item() for batch, _ in drawn)]
        mine += [sum(len(each) for other, each in places if other == unit) for unit in o.units]
        counts = torch.tensor(run.all_sum(*mine), device=device)  # in the global batch
        total = torch.zeros(len(counts), device=device)
        for i, (batch, _) in enumerate(drawn):
            batch = {k: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for k, x in batch.items()}
            alone = parallel is not model and i + 1 < len(drawn)  # DDP sends gradients once an update
            with parallel.no_sync() if alone else nullcontext():
                with autocast:
                    losses = parallel(**batch) / counts.clamp(min=1)  # <s> image text -> the answers' tokens, places
                ((losses @ weights) * world).backward()  # DDP and FSDP average over the processes
            total += losses.detach()
        norm = nn.utils.clip_grad_norm_(trained, MAX_NORM)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        bad = [name for _, names in drawn for name in names]
        loss, *pointing, stopped, count = run.all_sum(*total.tolist(), stop.asked, len(bad))
        if math.isfinite(norm) and math.isfinite(loss + sum(pointing)):
            optimizer.step()
            skipped_in_row = 0
        else:  # on all processes alike
            skipped, skipped_in_row = skipped + 1, skipped_in_row + 1
        optimizer.zero_grad(set_to_none=True)
        update, bad_rows = update + 1, bad_rows + int(count)

        # 2. log, and end a run that makes no progress
        rate = o.batch / (time.perf_counter() - clock)
        values = {"epoch": update / batches.updates_per_epoch, "loss": loss} | dict(zip(o.units, pointing))
        values |= {"lr": lr, "grad_norm": norm, "labels": int(counts[0]), "skipped": skipped, "bad_rows": bad_rows}
        log.record(update=update, **values, conversations_per_s=round(rate, 1))
        shown = [f"{name} {value:.4f}" for name, value in zip(("loss", *o.units), (loss, *pointing))]
        bar.set_postfix_str(f"{', '.join(shown)}, {rate:.1f} conversations/s", refresh=False)
        bar.update()
        log.once("left out", bad)
        data.check_unreadable(bad_rows, update * o.batch, "conversations")
        run.check_finite(skipped_in_row, update)

        # 3. keep a checkpoint, leave if asked to
        if update % o.save_every == 0 or update == updates or stopped:
            model_state, optimizer_state = get_state_dict(model, optimizer, options=whole)
            run.save(o.out / "checkpoints", update, {
                "options": run.plain(o), "update": update, "skipped": skipped, "skipped_in_row": skipped_in_row,
                "bad_rows": bad_rows, "conversations": len(source), "model": model_state, "optimizer": optimizer_state,
            })
        if stopped:
            run.leave(update, updates, stop.asked)
    bar.close()

    save_model(model, o.out / "model", rank, torch.bfloat16 if bf16 else torch.float32)
    if rank == 0:
        print(f"\nask it: python vlm.py {o.out / 'model'} IMAGE \"Describe the image.\"\nnext: python eval.py {o.out}")


if __name__ == "__main__":
    with run.ended("train_vlm.py"):
        main()
