"""What the commands share: one process among others that can be stopped and resumed. Needs torch and tqdm; copy it.

    rank, world, device = run.setup()                     # torchrun's environment; NCCL on GPUs, gloo on CPUs
    log, stop = run.Log(out / "log.jsonl", rank, update), run.CatchSignals()
    while update < updates:
        ...                                               # one update
        loss, stopped = run.all_sum(loss, stop.asked)     # over all processes
        if update % 1000 == 0 or stopped:
            run.save(out / "checkpoints", update, state)  # whole or not at all; the newest two stay
        if stopped:
            run.leave(update, updates, stop.asked)        # SIGTERM or Ctrl-C has come
"""

import argparse
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm


# --- processes --------------------------------------------------------------------------------------------------------

def setup(timeout: timedelta = timedelta(hours=2)) -> tuple[int, int, torch.device]:
    """This process's rank, the number of processes, and its device.

    timeout: how long the processes wait for each other, at the longest while the first one lists millions of files."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32
    if (world > 1 or dist.is_torchelastic_launched()) and not dist.is_initialized():
        cuda = device.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout, device_id=device if cuda else None)
    return rank, world, device


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to use bf16, by `--precision`: bf16, fp32, or auto, which asks if the device multiplies it natively."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """bf16 autocast where `use_bf16` says so, else a context that changes nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(precision, device))


def all_sum(*values: float) -> list[float]:
    """The sum of each number over all processes, in float64."""
    if not dist.is_initialized():
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(total)
    return total.tolist()


def on_first(function: Callable[[], object]) -> object:
    """What function() returns on the first process, or the error it raises there, on every process. The others wait,
    and all end with the same sentence when it fails."""
    if not dist.is_initialized():
        return function()
    result = [None]
    if dist.get_rank() == 0:
        try:
            result = [function()]
        except (ValueError, OSError) as error:
            result = [ValueError(str(error))]
    dist.broadcast_object_list(result)
    if isinstance(result[0], ValueError):
        raise result[0]
    return result[0]


def barrier() -> None:
    """Wait for all processes. None may exit early: gloo aborts one that does while it finishes a transfer."""
    if dist.is_initialized():
        dist.barrier()


def workers() -> int:
    """Data workers for this process: one for each of its cores, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def micro_batch(share: int, most: int, multiple: int = 1) -> int:
    """The largest divisor of a process's share of the batch up to `most`, of which `multiple` is a divisor."""
    sizes = range(multiple, max(most, multiple) + 1, multiple)
    return max((size for size in sizes if share % size == 0), default=share)


def bar(what: str, total: int, rank: int, done: int = 0, unit: str = "update") -> tqdm:
    """A progress bar, on the first process."""
    return tqdm(total=total, initial=done, desc=what, unit=unit, disable=rank > 0, smoothing=0.05,
                mininterval=0.5 if sys.stderr.isatty() else 30)


# --- signals and errors -----------------------------------------------------------------------------------------------

class CatchSignals:
    """From here on the first SIGTERM or Ctrl-C only sets `asked` to its number; a second one ends the process."""

    def __init__(self):
        self.asked = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.remember)

    def remember(self, number: int, _: object) -> None:
        """Remember the first signal; the next one ends the process."""
        self.asked = number
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)


def ignore_signals(_: int) -> None:
    """For data workers (`worker_init_fn`): the main process answers signals and ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def leave(update: int, updates: int, number: int) -> None:
    """End after signal `number` (0: another process got it), once all is saved, with the exit status shells expect."""
    barrier()
    if int(os.environ.get("RANK", 0)) == 0:
        text = f"stopped at update {update} of {updates}; continue with the same command and --resume"
        tqdm.write(text, file=sys.stderr)  # above the bar
    sys.exit(128 + (number or signal.SIGTERM))


def check_finite(in_row: int, update: int) -> None:
    """ValueError after 20 updates in a row that were skipped because their loss or gradient was not finite."""
    if in_row >= 20:
        raise ValueError(f"update {update}: the loss or gradient was not finite for 20 updates in a row; continue from "
                       "the last checkpoint with --resume and a lower --lr")


@contextmanager
def ended(name: str) -> Iterator[None]:
    """Around a command: an error that its user can fix ends it with one sentence and exit status 1."""
    hasattr(sys.stdout, "reconfigure") and sys.stdout.reconfigure(errors="backslashreplace")  # for any terminal
    done = False
    try:
        yield
        barrier()
        done = True
    except (ValueError, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
        text = re.sub(r"Caught .*\n\w+: ", "", text, flags=re.DOTALL)  # what torch adds to a data worker's error
        sys.exit(f"{name}: {text.strip()}")
    except torch.OutOfMemoryError:
        sys.exit(f"{name}: the GPU's memory is full; give a smaller batch or micro-batch, or --checkpointing")
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        if "by peer" not in str(error):  # of gloo, when a process has ended
            raise
        sys.exit(f"{name}: another process has ended; its own message says why")
    finally:
        for bar in list(tqdm._instances):  # so that no message lands on its line
            bar.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        if done and dist.is_torchelastic_launched():  # at once: gloo's last threads can abort a Python that ends
            sys.stdout.flush(), sys.stderr.flush(), os._exit(0)


# --- options ----------------------------------------------------------------------------------------------------------

def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None,
          free: Sequence[str]) -> tuple[argparse.Namespace, dict | None]:
    """The options and, with --resume, the newest checkpoint, whose own options are the defaults then.

    free: the options that a resumed run may change; another value for any other option is refused (exit status 2).
    ValueError: --out holds a run that --resume was not given for."""
    o = parser.parse_args(argv)
    if not o.resume and checkpoints(o.out / "checkpoints"):
        raise ValueError(f"{o.out} holds a run; continue it with --resume, or choose another --out")
    if not o.resume:
        return o, None
    state = load(o.out / "checkpoints")
    parser.set_defaults(**state["options"] | {"out": o.out})
    o = parser.parse_args(argv)
    for name, value in state["options"].items():
        if name not in ("out", "resume", *free) and str(getattr(o, name)) != str(value):
            parser.error(f"--{name.replace('_', '-')}: the run in {o.out} has {value}; leave it out, or start anew")
    return o, state


def number(least: float, kind: type = int, below: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a number of that kind, at least `least` and below `below`."""

    def read(text: str) -> float:
        value = kind(text)
        if not least <= value < below:
            limit = f" and below {below:g}" if below < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} must be at least {least:g}{limit}")
        return value

    read.__name__ = kind.__name__
    return read


def plain(o: argparse.Namespace) -> dict[str, object]:
    """Options as JSON and checkpoints keep them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(o).items()}


# --- files ------------------------------------------------------------------------------------------------------------

def write(path: Path, content: str | Callable[[Path], object]) -> None:
    """Write a text, or call content(temporary path); the file appears whole or not at all. OSError: it cannot be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(content, encoding="utf-8") if isinstance(content, str) else content(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:  # torch.save turns a full disk into this
        raise OSError(f"{path}: cannot be written ({str(error).splitlines()[0]}); is the disk full?") from None
    finally:
        temporary.unlink(missing_ok=True)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(folder.glob("update-*"))


def save(folder: Path, update: int, state: dict) -> None:
    """Write a checkpoint on the first process, and remove all but the newest two."""

    def first() -> None:
        write(folder / f"update-{update:08d}.pt", lambda temporary: torch.save(state, temporary))
        for old in checkpoints(folder)[:-2]:
            old.unlink()

    on_first(first)


def load(folder: Path) -> dict:
    """The newest checkpoint of a run. ValueError: there is none, or it is damaged."""
    if not checkpoints(folder):
        raise ValueError(f"--resume: {folder} holds no checkpoint; leave --resume out to start")
    path = checkpoints(folder)[-1]
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f"{path}: is damaged ({type(error).__name__}); remove it to use the one before") from None


# --- log --------------------------------------------------------------------------------------------------------------

class Log:
    """log.jsonl, on the first process, and lines above the progress bar."""

    def __init__(self, path: Path, rank: int, update: int):
        """update: where the run begins; later lines of an interrupted run are dropped."""
        self.path, self.rank, self.told = path, rank, set()
        if rank == 0:
            lines = path.read_text().splitlines(keepends=True) if path.exists() and update else []
            kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["update"] <= update]
            write(path, "".join(kept))
            self.file = open(path, "a", buffering=1)

    def record(self, **values: float | None) -> None:
        """Write a line; what is not finite becomes null."""
        if self.rank == 0:
            known = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in values.items()}
            try:
                print(json.dumps(known), file=self.file)
            except OSError as error:
                raise OSError(f"{self.path}: cannot be written ({error.strerror})") from None

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.rank == 0:
            tqdm.write(text, file=sys.stderr)

    def once(self, what: str, names: Sequence[str]) -> None:
        """Print each name once, from whichever process met it: a broken image, a bad row."""
        for name in dict.fromkeys(names):
            if name not in self.told:
                tqdm.write(f"{what}: {name}", file=sys.stderr)
        self.told.update(names)
