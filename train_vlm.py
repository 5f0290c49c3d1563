"""VLM training, start to finish (section 5, appendix D): an aligned backbone learns to talk.

    python train_vlm.py                                          # the demo, after train_align.py: minutes on a laptop
    torchrun --nproc-per-node 8 train_vlm.py --recipe clip-vit-l-336 --variant aligned-decoder --weights aligned.safetensors \\
        --language Llama-2-7b-hf --data llava_v1_5_mix665k.json --images playground/data --fsdp     # the paper's
    python train_vlm.py ... --resume                             # continue, exactly, on any number of processes

Writes to --out: model/ (the VLM's folder), log.jsonl, checkpoints/, and without --data answers.json. The file reads from
top to bottom: options, recipes, set-up, one update, checkpoints, the loop, questions about scenes.

What an update sees depends on the seed and the update's number alone, and its loss is the mean over all the label
tokens of the global batch, so in float32 any number of processes and micro-batches trains the same model.
"""

import argparse
import functools
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import TextIO, get_args, get_origin

import sentencepiece
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import llama
import vit
import vlm
from llama import Llama, LlamaConfig
from vit import ViT
from vlm import VLM, Student


class RunError(RuntimeError):
    """The run cannot start or go on; the message says why and what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# Recipes

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

# Table 7, the same for both backbones, all variants and both data mixtures (LLaVA-1.5; LVIS-Instruct-4V and LRV added).
PAPER = {"epochs": 2, "batch": 128, "lr": 2e-5, "pretrained_lr": 1.0, "warmup": 0.03, "weight_decay": 0.1, "clip": 1.0}
RECIPES: dict[str, dict[str, object]] = {
    "clip-vit-l-336": PAPER,
    "siglip-so400m-384": PAPER,
    "own": PAPER,
    # A small language model from scratch learns in small batches at a high rate, which would undo the aligned decoder.
    "demo": PAPER | {"epochs": 1, "batch": 16, "lr": 1.5e-3, "pretrained_lr": 0.1},
}
DEMO_LANGUAGE = LlamaConfig(
    vocab_size=640, hidden_size=128, intermediate_size=336, num_hidden_layers=4, num_attention_heads=4,
    max_position_embeddings=1024,
)  # fmt: skip
DEMO_WEIGHTS = {  # by whether the backbone is aligned
    False: str(Path(__file__).parent / "demo" / "teacher.safetensors"),
    True: str(Path("runs") / "align" / "aligned.safetensors"),
}


# ----------------------------------------------------------------------------------------------------------------------
# Options


def option(default: object, text: str, least: float | None = None, free: bool = False, choices: tuple = ()) -> object:
    """A field of Options: its default and help, the least value allowed, whether a resumed run may change it."""
    return field(default=default, metadata={"help": text, "least": least, "free": free, "choices": choices})


@dataclass
class Options:
    """Each field is a flag. What is None comes from the recipe."""

    recipe: str = option("demo", "whose numbers, and which backbone; own: one not among these", choices=tuple(RECIPES))
    variant: str = option("aligned-decoder", "the adapter, and the kind of backbone", choices=tuple(VARIANTS))
    weights: str | None = option(None, "the backbone: aligned.safetensors of train_align.py, or a baseline", free=True)
    second: str | None = option(None, "dinov2-fusion: the weights of DINOv2 ViT-L with registers", free=True)
    language: str | None = option(None, "a folder with Llama's weights and tokenizer.model", free=True)
    data: tuple[str, ...] = option((), "conversations in LLaVA's format, one or several files; without it scenes", free=True)
    images: tuple[str, ...] = option((), "the folder that paths of images start from: one for all files, or one for each; "
                                     "if not given, that of each file", free=True)  # fmt: skip
    template: str = option("llama", "what is written around questions and answers", choices=tuple(vlm.TEMPLATES))
    max_text: int = option(2048, "text is cut at so many tokens", least=2)
    scenes: int = option(9300, "how many built-in scenes make an epoch", least=1)
    val_scenes: int = option(300, "ask about so many scenes at the end", least=1, free=True)
    out: str = option("runs/vlm", "where everything is written", free=True)
    resume: str | None = option(None, "continue from --out's newest checkpoint, or from the folder given", free=True)

    epochs: int | None = option(None, "passes over the data", least=1)
    updates: int | None = option(None, "end the schedule after at most so many updates", least=1)
    batch: int | None = option(None, "conversations per update, over all processes", least=1)
    lr: float | None = option(None, "peak learning rate", least=0, free=True)
    pretrained_lr: float | None = option(None, "the share of --lr that the adapter's pre-trained layers get", least=0, free=True)
    warmup: float | None = option(None, "the share of the updates in which the rate rises", least=0)
    weight_decay: float | None = option(None, "AdamW, not on biases and norms", least=0)
    clip: float | None = option(None, "largest norm of the gradient", least=1e-9, free=True)
    seed: int = option(0, "of scenes, order and new weights", least=0)

    fsdp: bool = option(False, "share out weights, gradients and optimizer state over the processes (FSDP2)", free=True)
    micro_batch: int | None = option(
        None, "conversations at once on a process; if not given, the largest divisor of its share up to 16", least=1,
        free=True,
    )  # fmt: skip
    precision: str = option("auto", "auto: bf16 where the device has it", free=True, choices=("auto", "bf16", "fp32"))
    checkpointing: bool = option(False, "recompute activations instead of keeping them", free=True)
    workers: int | None = option(None, "data processes of each rank; if not given, a core each, up to 8", least=0, free=True)
    save_every: int = option(1000, "updates between checkpoints", least=1, free=True)
    log_every: int = option(10, "updates between lines of log.jsonl", least=1, free=True)


def flag(name: str) -> str:
    """How a field of Options is written on the command line."""
    return "--" + name.replace("_", "-")


def parse(argv: list[str] | None = None) -> Options:
    """Flags -> Options, complete and checked. A mistake in the flags exits with status 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for f in fields(Options):
        text = f.metadata["help"] + ("" if f.default in (None, False, ()) else f" (default: {f.default})")
        kind = get_args(f.type)[0] if get_args(f.type) else f.type  # int | None -> int
        if kind is bool:
            parser.add_argument(flag(f.name), action="store_true", help=text)
        elif f.name == "resume":
            parser.add_argument(flag(f.name), nargs="?", const="newest", help=text)
        else:
            many = {"nargs": "+"} if get_origin(f.type) is tuple else {}
            choices = f.metadata["choices"] or None
            parser.add_argument(flag(f.name), type=kind, default=f.default, choices=choices, help=text, **many)
    options = Options(**vars(parser.parse_args(argv)))
    try:
        return complete(options)
    except ValueError as error:
        parser.error(str(error))


def complete(options: Options) -> Options:
    """Fill in the recipe, and check what can be checked before anything is read. Raises ValueError."""
    o = replace(options, data=tuple(options.data), images=tuple(options.images))
    adapter, aligned = VARIANTS[o.variant]
    if o.recipe == "demo":
        if o.data or o.language:
            raise ValueError("--data and --language go with --recipe clip-vit-l-336, siglip-so400m-384 or own")
        o.weights = o.weights or DEMO_WEIGHTS[aligned]
    elif not (o.weights and o.language and o.data):
        kind = "an aligned backbone" if aligned else "a pre-trained backbone"
        raise ValueError(f"--recipe {o.recipe} needs --weights ({kind}), --language (Llama's folder) and --data (LLaVA's JSON)")
    if (adapter == "fused-mlp") != (o.second is not None):
        raise ValueError("--second, the weights of DINOv2, goes with --variant dinov2-fusion")
    if o.images and not o.data:
        raise ValueError("--images goes with --data")
    if len(o.images) not in (0, 1, len(o.data)):
        raise ValueError(f"--images: {len(o.images)} folders for {len(o.data)} files; give one for all, or one for each")
    for f in fields(Options):
        value, least = getattr(o, f.name), f.metadata["least"]
        if value is not None and least is not None and not least <= value < math.inf:
            raise ValueError(f"{flag(f.name)} {value}: must be a number from {least:g} up")
    for name, value in RECIPES[o.recipe].items():
        if getattr(o, name) is None:
            setattr(o, name, value)
    if o.warmup >= 1:
        raise ValueError(f"--warmup {o.warmup}: must be below 1")
    return o


# ----------------------------------------------------------------------------------------------------------------------
# Set-up


class Machine:
    """This process among the others (one alone is a group as well), its device and precision."""

    def __init__(self, options: Options):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32
        else:
            vit.keep_freed_memory()
        if not dist.is_initialized():
            how = {} if self.world > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
            how["timeout"] = timedelta(hours=2)  # the others wait while the first process indexes the conversations
            dist.init_process_group("nccl" if cuda else "gloo", device_id=self.device if cuda else None, **how)
        has_bf16 = torch.cuda.is_bf16_supported() if cuda else vit.cpu_has_bf16()
        self.bf16 = options.precision == "bf16" or (options.precision == "auto" and has_bf16)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        fair = min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        self.workers = fair if options.workers is None else options.workers

    def autocast(self) -> torch.autocast:
        """bf16 autocast, or nothing."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def sum(self, *values: float) -> list[float]:
        """The sums of numbers over all processes, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def memory(self) -> float:
        """The most memory this process has held, in GiB: of the GPU, or of the whole process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)

    def agree(self, what: str, *values: float) -> None:
        """Raise RunError unless all processes have the same values."""
        same = self.sum(*values) == [value * self.world for value in values]
        if self.sum(float(same))[0] != self.world:
            raise RunError(f"the processes do not see the same {what}; all need one --out and one --data")


def load_vision(options: Options) -> ViT | Student:
    """The backbone, of the kind that the variant asks for."""
    o, aligned = options, VARIANTS[options.variant][1]
    if o.recipe == "demo" and not Path(o.weights).exists():
        raise RunError(f"{o.weights}: no such file; run python train_align.py first, which makes it")
    vision = vlm.load_vision(o.weights, vit.BACKBONES.get(o.recipe))
    if isinstance(vision, Student) != aligned:
        kinds = ("a pre-trained backbone, not aligned", "an aligned one with its head and decoder, as train_align.py writes")
        raise RunError(f"{o.weights}: is the wrong kind of backbone; --variant {o.variant} wants {kinds[aligned]}")
    return vision


def load_second(options: Options, size: int) -> ViT | None:
    """DINOv2 for fusion, at the input size of the first backbone."""
    if options.second is None:
        return None
    file = vit.WeightFile(options.second)
    config = vit.config_for(file, None) if "config" in file.metadata else vit.BACKBONES["dinov2-vit-l"]
    return vit.load(options.second, replace(config, image_size=size))


def load_language(options: Options, machine: Machine) -> tuple[Llama, llama.Tokenizer]:
    """The language model and its tokenizer; for FSDP without its values, which `shard` reads where they belong."""
    if not options.language:
        path = Path(options.out) / "tokenizer.model"
        if machine.rank == 0:
            train_tokenizer(path)
        dist.barrier()
        return Llama(DEMO_LANGUAGE), llama.Tokenizer(path)
    if not options.fsdp:
        language = llama.load(options.language)
    else:
        with torch.device("meta"):
            language = Llama(llama.Weights(options.language).config)
    return language, llama.Tokenizer(options.language, language.config.vocab_size)


def draw_small(model: VLM) -> None:
    """First weights for a small language model from scratch. The usual ones suit a wide one, or one that can talk.

    Words are of unit size, and layers keep what passes them at its size. What attention carries (values, output) starts
    3 times larger: at first it is an average over a hundred tokens, in which one of them is hardly heard. The adapter's
    last layer is not zero: what is not shown is not looked for, and what is not looked for is not shown.
    """
    D = model.config.language.hidden_size
    for name, weight in model.language.named_parameters():
        if weight.ndim == 2:
            size = 3 * D**-0.5 if "v_proj" in name or "o_proj" in name else D**-0.5
            nn.init.normal_(weight, std=1.0 if "embed_tokens" in name else size)
    for layer in model.adapter.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)


def train_tokenizer(path: Path) -> None:
    """The demo's tokenizer, of Llama's kind, from the text of some scenes; their words all become whole symbols."""
    scenes = data.Scenes(500, 0)
    texts = [turn["value"] for i in range(len(scenes)) for row in scenes[i].conversations for turn in row["conversations"]]
    lines = [line for text in texts for line in f"In: {text}\nOut:".replace("<image>\n", "").split("\n")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=DEMO_LANGUAGE.vocab_size,
        unk_id=0, bos_id=1, eos_id=2, byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, user_defined_symbols=[f"▁{count}" for count in range(6)], minloglevel=2,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(model.getvalue())
    temporary.replace(path)


def shard(model: VLM, options: Options, machine: Machine) -> None:
    """FSDP2: each process holds its rows of every trained weight in float32, and so of gradients and optimizer state; a
    layer's are brought together (in bf16) when it is needed. The frozen part is on every process as a whole."""
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32) if machine.bf16 else MixedPrecisionPolicy()
    how = {"mesh": init_device_mesh(machine.device.type, (machine.world,)), "mp_policy": policy}
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    for layer in model.language.model.layers:
        fully_shard(layer, **how)
    fully_shard(model, ignored_params=frozen, **how)  # the rest: adapter, word embedding, output layer
    if not options.language:
        return
    weights = llama.Weights(options.language)
    model.language.to_empty(device=machine.device)
    for name, parameter in model.language.named_parameters():
        rows = weights[name].chunk(machine.world)  # one tensor of the file in memory at a time
        if machine.rank < len(rows):
            parameter.detach().to_local().copy_(rows[machine.rank])


def ignore_signals(_: int) -> None:
    """In a data process: it is the trainer that answers Ctrl-C and SIGTERM, and that ends its data processes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def learning_rate(update: int, updates: int, options: Options) -> float:
    """A linear rise from 0 over the first share of the updates, then a cosine to 0 over the others."""
    warmup = int(options.warmup * updates)
    if update < warmup:
        return options.lr * update / warmup
    return options.lr * (1 + math.cos(math.pi * (update - warmup) / (updates - warmup))) / 2


# ----------------------------------------------------------------------------------------------------------------------
# The run

COUNTED = ("update", "skipped", "skipped_in_row")  # of a Run, in its checkpoints


class Run:
    """All that a run holds between updates: model, optimizer, data, counters."""

    def __init__(self, options: Options):
        self.options, self.machine = options, Machine(options)
        o, m = options, self.machine
        torch.manual_seed(o.seed)  # new weights: the same on every rank
        vision = load_vision(o)
        config = vision.encoder.config if isinstance(vision, Student) else vision.config
        second = load_second(o, config.image_size)
        frozen = [*vision.parameters(), *(second.parameters() if second else ())]
        self.fingerprint = sum(p.double().abs().sum().item() for p in frozen)
        language, tokenizer = load_language(o, m)
        self.vlm = vlm.build(vision, language, tokenizer, VARIANTS[o.variant][0], second, vlm.TEMPLATES[o.template], o.max_text)
        if not o.language:
            draw_small(self.vlm)
        for part in (self.vlm.language, *self.vlm.adapter.modules()):
            if hasattr(part, "checkpointing"):
                part.checkpointing = o.checkpointing
        self.model: nn.Module = self.vlm  # what is called; the VLM itself, or what DDP makes of it
        if o.fsdp:
            shard(self.vlm, o, m)
        self.vlm.to(m.device)
        if m.world > 1 and not o.fsdp:
            devices = [m.device] if m.device.type == "cuda" else None
            self.model = DistributedDataParallel(self.vlm, devices, gradient_as_bucket_view=True)
        self.trained = dict(self.vlm.trainable())
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}  # by weight decay and share of the learning rate
        for name, p in self.trained.items():
            new = name.removeprefix("adapter.").startswith(self.vlm.adapter.new) or not name.startswith("adapter.")
            groups.setdefault((o.weight_decay * (p.ndim > 1), 1.0 if new else o.pretrained_lr), []).append(p)
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "weight_decay": decay, "share": share} for (decay, share), group in groups.items()],
            o.lr, fused=True,
        )  # fmt: skip
        for p in self.trained.values():  # the state of before the first update, so that a checkpoint has where to go
            step = torch.zeros((), device=m.device)
            self.optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

        self.source = self.conversations()
        self.micro = o.micro_batch or next(d for d in range(min(16, o.batch), 0, -1) if o.batch // m.world % d == 0)
        plan = self.batches(0)
        self.per_epoch, self.updates = plan.updates_per_epoch, plan.updates
        self.bad_rows = data.BadRows(lambda line: self.say(line))
        self.update, self.skipped, self.skipped_in_row = 0, 0, 0
        self.saved = False  # nothing is lost by leaving now
        self.received = self.stop_signal = 0  # a signal that came to this process; one that all processes know of
        self.log: TextIO | None = None
        self.bar: tqdm | None = None

    def conversations(self) -> data.Conversations:
        """The training data. The first process indexes the files, the others read its index."""
        o, m, config = self.options, self.machine, self.vlm.config
        encode = functools.partial(vlm.encode, self.vlm.tokenizer, config.template, max_text=config.max_text)
        prepare = functools.partial(vlm.prepare, config=config.vision)
        if not o.data:
            return data.SceneConversations(data.Scenes(o.scenes, o.seed, config.vision.image_size), encode, prepare, m.workers)
        roots = o.images or [os.path.dirname(os.path.abspath(file)) for file in o.data]
        if m.rank > 0:
            dist.barrier()
        try:
            return data.Conversations(o.data, roots, encode, prepare, m.workers)
        finally:  # what is wrong with the files, the others find as well
            if m.rank == 0:
                dist.barrier()

    def batches(self, start: int) -> data.ConversationBatches:
        """The sampler of the run from an update on."""
        o, m = self.options, self.machine
        return data.ConversationBatches(self.source, o.batch, o.epochs, o.seed, m.rank, m.world, self.micro, start, o.updates)

    def loader(self) -> DataLoader:
        """The micro-batches from the next update on."""
        return DataLoader(
            self.source, batch_sampler=self.batches(self.update), num_workers=self.machine.workers,
            collate_fn=data.collate_conversations, worker_init_fn=ignore_signals,
            pin_memory=self.machine.device.type == "cuda",
        )  # fmt: skip

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.bar.write(text, file=sys.stderr) if self.bar else print(text, file=sys.stderr, flush=True)

    def record(self, **values: object) -> None:
        """A line of log.jsonl, on the first process."""
        if self.log:
            known = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in values.items()}
            print(json.dumps({"update": self.update, **known}), file=self.log)

    def train_update(self, micro_batches: list[dict[str, Tensor | None]]) -> dict[str, float]:
        """One update from this rank's micro-batches. The loss is the mean over the labels of the global batch: the sum
        of each micro-batch over the number of all labels, whoever has them."""
        o, m, count = self.options, self.machine, len(micro_batches)
        labels = max(1.0, m.sum(sum(int((batch["labels"] != llama.IGNORE).sum()) for batch in micro_batches))[0])
        lr = learning_rate(self.update, self.updates, o)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["share"]
        total = torch.zeros((), device=m.device)
        for i, batch in enumerate(micro_batches):
            batch = {k: v if v is None else v.to(m.device, non_blocking=True) for k, v in batch.items()}
            # DDP sends gradients once an update; FSDP each time, since whole ones would not fit
            alone = isinstance(self.model, DistributedDataParallel) and i < count - 1
            with self.model.no_sync() if alone else nullcontext():
                with m.autocast():
                    loss = self.model(**batch) / labels
                (loss * m.world).backward()  # both average the gradients over the processes
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.trained.values(), o.clip)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        loss, stop, bad = m.sum(total.item(), self.received, self.bad_rows.count)
        if stop:
            self.stop_signal = self.received or signal.SIGTERM
        if math.isfinite(norm) and math.isfinite(loss):
            self.optimizer.step()
            self.skipped_in_row = 0
        else:  # the same on every rank: the gradient and the loss are sums over all
            self.skipped, self.skipped_in_row = self.skipped + 1, self.skipped_in_row + 1
        self.optimizer.zero_grad(set_to_none=True)
        self.update += 1
        if self.skipped_in_row == 20:
            raise RunError(
                f"update {self.update}: the loss or gradient was not finite for 20 updates in a row; "
                f"resume from an earlier checkpoint with a lower --lr"
            )
        return {"loss": loss, "lr": lr, "grad_norm": norm, "labels": int(labels), "skipped": self.skipped, "bad_rows": int(bad)}

    def leave(self) -> None:
        """End after a signal; everything is saved."""
        done = f"stopped at update {self.update} of {self.updates}, saved; go on with the same command and --resume"
        if self.bar:
            self.bar.close()
        if self.machine.rank == 0:
            print(done if self.update else "stopped before the first update", file=sys.stderr, flush=True)
        sys.exit(128 + (self.stop_signal or self.received))

    # Checkpoints: folders of safetensors files, one from each process, and of run.json. Any number of processes reads them.

    def tensors(self) -> dict[str, Tensor]:
        """What is trained and what AdamW keeps of it, by name: the whole tensors, or with FSDP this process's rows."""
        named = {f"model.{name}": p.detach() for name, p in self.trained.items()}
        for key in ("exp_avg", "exp_avg_sq"):
            named |= {f"{key}.{name}": self.optimizer.state[p][key] for name, p in self.trained.items()}
        return named

    def save_checkpoint(self) -> None:
        """Write checkpoints/update-N whole or not at all, and keep the last two."""
        seen, bad = self.machine.sum(self.bad_rows.seen, self.bad_rows.count)
        folder = Path(self.options.out) / "checkpoints"
        path = folder / f"update-{self.update:08d}"
        temporary = folder / f".{path.name}"
        if self.machine.rank == 0:
            for stale in folder.glob(".update-*"):  # of a run that was killed
                shutil.rmtree(stale)
            temporary.mkdir(parents=True)
        dist.barrier()
        try:
            dcp.save(self.tensors(), storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True))
        except CheckpointException as error:  # raised on every process, whichever could not write
            reason, _ = next(iter(error.failures.values()))
            raise OSError(f"{path}: cannot be written ({str(reason).splitlines()[0]}); is the disk full?") from None
        if self.machine.rank == 0:
            state = {
                "options": asdict(self.options), "conversations": len(self.source), "tokens": int(self.source.lengths.sum()),
                "fingerprint": self.fingerprint, "files": len(list(temporary.iterdir())),
                "bad_rows": {"seen": int(seen), "count": int(bad)}, **{name: getattr(self, name) for name in COUNTED},
            }  # fmt: skip
            with open(temporary / "run.json", "w") as file:
                json.dump(state, file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():  # the same update, before a resumed run came to it again
                path.rename(folder / f".{path.name}.old")
            temporary.rename(path)
            for old in checkpoints(folder)[:-2]:
                shutil.rmtree(old.rename(folder / f".{old.name}"))
        dist.barrier()

    def load_checkpoint(self, path: Path) -> None:
        """Continue from a checkpoint; RunError when it is damaged or of another configuration."""
        others = [other for other in checkpoints(path.parent) if other != path]
        hint = f"continue with --resume {others[-1]}" if others else "start again in another --out"
        if not path.is_dir():
            raise RunError(f"{path}: no such checkpoint")
        try:
            state = json.loads((path / "run.json").read_text())
            theirs, counted = state["options"], {name: state[name] for name in COUNTED}
            if len(list(path.glob("*.safetensors"))) != state["files"]:
                raise FileNotFoundError
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: damaged or of another version ({type(error).__name__}); {hint}") from None
        self.check(path, theirs)
        for what, mine in (("conversations", len(self.source)), ("tokens", int(self.source.lengths.sum()))):
            if state[what] != mine:
                raise RunError(f"{path}: was made with {state[what]} {what}, not {mine}; give the same --data")
        if not math.isclose(state["fingerprint"], self.fingerprint, rel_tol=1e-9):
            raise RunError(f"{path}: was made from another backbone than {self.options.weights}; give the same --weights")
        try:
            dcp.load(self.tensors(), storage_reader=HuggingFaceStorageReader(str(path)))
        except (Exception, CheckpointException) as error:  # whatever a damaged file leads to
            raise RunError(f"{path}: damaged or of another version ({type(error).__name__}); {hint}") from None
        for name, value in counted.items():
            setattr(self, name, value)
        for kept in self.optimizer.state.values():
            kept["step"].fill_(self.update - self.skipped)
        if self.machine.rank == 0:  # it keeps the sums over all processes
            self.bad_rows.load_state_dict(state["bad_rows"])

    def check(self, path: Path, theirs: dict[str, object]) -> None:
        """That a checkpoint's options are those of this run, or differ where they may."""
        for f in fields(Options):
            now, then = getattr(self.options, f.name), theirs.get(f.name)
            if now != then and not f.metadata["free"]:
                raise RunError(f"{path}: was made with {flag(f.name)} {then}, not {now}; give the same, or another --out")
            if now != then and f.name in ("lr", "pretrained_lr", "clip", "precision") and self.machine.rank == 0:
                self.say(f"continuing with {flag(f.name)} {now}, until now it was {then}")

    def save_model(self) -> Path:
        """Write model/, the VLM's folder. With FSDP one weight after the other is brought together and moves to the
        first process's main memory, in bf16 where that is how it was used."""
        low = self.options.fsdp and self.machine.bf16
        state = {}
        for name, parameter in self.vlm.named_parameters():
            value = parameter.detach()
            if isinstance(value, DTensor):
                value = (value.bfloat16() if low else value).full_tensor()  # every process takes part
            if self.machine.rank == 0:
                state[name] = value.cpu()
        path = Path(self.options.out) / "model"
        try:
            if self.machine.rank == 0:
                vlm.save(self.vlm, path, state)
        finally:
            # Nobody leaves before the model is written: gloo's threads let go of what they gathered a moment after it is
            # there, and Python, when it ends meanwhile, aborts ("terminate called without an active exception").
            dist.barrier()
        return path


def checkpoints(folder: Path) -> list[Path]:
    """The numbered checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("update-*") if re.fullmatch(r"update-\d{8,}", path.name))


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def start_or_resume(run: Run) -> None:
    """Find out where to begin, and open log.jsonl, cut to what the checkpoint knows of."""
    o, out = run.options, Path(run.options.out)
    saved, log = checkpoints(out / "checkpoints"), out / "log.jsonl"
    kept = ""
    if o.resume:
        if o.resume == "newest" and not saved:
            raise RunError(f"--resume: {out / 'checkpoints'} holds no checkpoint; leave --resume out to start")
        run.load_checkpoint(saved[-1] if o.resume == "newest" else Path(o.resume))
        run.machine.agree("checkpoints", run.update)
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        kept = "".join(line for line in lines if line.endswith("}\n") and json.loads(line)["update"] <= run.update)
    elif saved:
        done = int(saved[-1].name.removeprefix("update-"))
        raise RunError(f"{out} holds a run at update {done}; continue it with --resume, or choose another --out")
    run.machine.agree("conversations", len(run.source), int(run.source.lengths.sum()))
    if run.machine.rank == 0:
        for path in saved:
            if int(path.name.removeprefix("update-")) > run.update:
                shutil.rmtree(path)  # of a course that was given up by going back
        out.mkdir(parents=True, exist_ok=True)
        (out / "options.json").write_text(json.dumps(asdict(o), indent=2))
        temporary = out / ".log.jsonl.tmp"
        temporary.write_text(kept)
        temporary.replace(log)
        run.log = open(log, "a", buffering=1)


def catch_signals(run: Run) -> None:
    """Ctrl-C and SIGTERM let the current update end and be saved; the second one ends the process at once."""

    def remember(number: int, _: object) -> None:
        run.received = number
        signal.signal(number, signal.SIG_DFL)
        if run.saved:
            run.leave()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, remember)


def introduce(run: Run) -> None:
    """Say what is trained on what, and which rows are left out."""
    o, m, source = run.options, run.machine, run.source
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (run.vlm.vision, run.vlm.adapter, run.vlm.language)]
    what = "{:.1f}M frozen parameters, {:.1f}M of the adapter, {:.1f}M of the language model".format(*sizes)
    how = f"{run.micro} at once, {m.world} processes{', FSDP' * o.fsdp}, lr {o.lr:g}, {'bf16' if m.bf16 else 'fp32'} on {m.device}"
    run.say(f"{o.recipe}, {o.variant}: {what}; {len(source):,} conversations, {run.updates:,} updates of {o.batch} ({how}), into {o.out}")
    for index in source.left_out[:20]:
        run.say(f"left out: {source.describe(index)}")
    if len(source.left_out) > 20:
        run.say(f"left out: {len(source.left_out) - 20} rows more")


def train(options: Options) -> Run:
    """The whole procedure: set up, update, save."""
    run = Run(options)
    o, m = options, run.machine
    start_or_resume(run)
    catch_signals(run)
    if m.rank == 0:
        introduce(run)
    run.bar = tqdm(
        total=run.updates, initial=run.update, desc="training", unit="update", disable=m.rank > 0,
        smoothing=0.05, mininterval=0.5 if sys.stderr.isatty() else 30,
    )  # fmt: skip
    loader, share, clock = iter(run.loader()), o.batch // m.world, time.perf_counter()
    while run.update < run.updates and not run.stop_signal:
        batches = [next(loader) for _ in range(share // run.micro)]
        run.bad_rows.add([name for _, names in batches for name in names], share)
        values = run.train_update([batch for batch, _ in batches])
        rate = o.batch / (time.perf_counter() - clock)
        skipped = f", {run.skipped} skipped" if run.skipped else ""
        state = f"loss {values['loss']:.4f}, {rate:.1f} conversations/s, {m.memory():.1f} GiB{skipped}"
        run.bar.set_postfix_str(state, refresh=False)
        run.bar.update()
        if run.update % o.log_every == 0 or run.update == run.updates:
            run.record(epoch=run.update / run.per_epoch, **values, conversations_per_s=round(rate, 1))
        if run.update % o.save_every == 0 or run.update == run.updates or run.stop_signal:
            run.save_checkpoint()
        clock = time.perf_counter()  # saving does not count
    run.bar.close()
    run.saved = True
    return run


# ----------------------------------------------------------------------------------------------------------------------
# Questions about scenes that were not in training


def ask(model: VLM, scenes: data.Scenes, at_once: int = 64) -> list[dict[str, object]]:
    """Each question about each scene, alone: its row with the picture, the answer, and whether that is right."""
    rows = []
    for i in range(len(scenes)):
        scene = scenes[i]
        for row in scene.conversations:
            question, truth = (turn["value"].removeprefix("<image>\n") for turn in row["conversations"])
            rows.append({"kind": row["kind"], "image": row["image"], "question": question, "truth": truth, "picture": scene.image})
    rows.sort(key=lambda row: row["kind"])  # stable; answers of one kind are about as long as each other
    for start in tqdm(range(0, len(rows), at_once), "asking", leave=False, disable=not sys.stderr.isatty()):
        part = rows[start : start + at_once]
        answers = model.generate([row["picture"] for row in part], [row["question"] for row in part], max_new_tokens=64)
        for row, answer in zip(part, answers):
            row |= {"answer": answer, "right": right(row["kind"], answer, row["truth"])}
    return rows


def right(kind: str, answer: str, truth: str) -> bool:
    """The same words; of a box, at least half of the two areas' union in common."""
    return iou(answer, truth) >= 0.5 if kind == "refer" else answer == truth


def iou(one: str, other: str) -> float:
    """Intersection over union of boxes "[x1, y1, x2, y2]"; 0 where one cannot be read."""
    boxes = [[float(number) for number in re.findall(r"\d*\.?\d+", text)] for text in (one, other)]
    if any(len(box) != 4 for box in boxes):
        return 0.0
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = boxes
    common = max(0.0, min(ax2, bx2) - max(ax1, bx1)) * max(0.0, min(ay2, by2) - max(ay1, by1))
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - common
    return common / union if union > 0 else 0.0


def report(rows: list[dict[str, object]]) -> str:
    """A question of each kind with answer and truth, and the share of right answers."""
    lines, table = [], ["", "| kind of question | number | right |", "| --- | --- | --- |"]
    for number, kind in enumerate(sorted({row["kind"] for row in rows})):
        of_kind = [row for row in rows if row["kind"] == kind]
        row = of_kind[number % len(of_kind)]  # of another picture each time, where there are enough
        lines += [f"{row['image']}: {row['question'].splitlines()[0]}", f"    answer {row['answer']}", f"    truth  {row['truth']}"]
        table.append(f"| {kind} | {len(of_kind)} | {sum(row['right'] for row in of_kind) / len(of_kind):.1%} |")
    return "\n".join(lines + table)


def finish(run: Run) -> None:
    """Write the model, ask it about scenes that it has not seen, and say what came out."""
    o, m, path = run.options, run.machine, run.save_model()
    if m.rank > 0:
        return
    if not o.data:
        cuda = m.device.type == "cuda"
        model = vlm.load(path, torch.bfloat16 if cuda else torch.float32, m.device, pack=not cuda and torch.backends.mkldnn.is_available())
        rows = ask(model, data.Scenes(o.val_scenes, 10**6, run.vlm.config.vision.image_size))  # the same for every seed
        answers = [{key: value for key, value in row.items() if key != "picture"} for row in rows]
        (Path(o.out) / "answers.json").write_text(json.dumps(answers, indent=1))
        print(report(rows))
    print(f"""
the model       {path}
ask it          python vlm.py {path} IMAGE "Describe the image."
for others      python vlm.py {path} --export FOLDER     (the language model, in transformers' layout)
next            python eval.py {path}""")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    options = parse(argv)
    try:
        run = train(options)
        if run.stop_signal:
            run.leave()
        finish(run)
    except (RunError, vlm.VLMError, llama.LlamaError, vit.WeightsError, data.DataError, OSError) as error:
        sys.exit(f"train_vlm.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit("train_vlm.py: the GPU's memory is full; give a smaller --micro-batch, --checkpointing or --fsdp")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
