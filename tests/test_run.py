"""run.py on a model of one parameter: processes, signals, options of a resumed run, checkpoints, the log."""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import run
from conftest import ROOT, log_of, refusal

SCRIPT = """
import sys, time
from pathlib import Path
import torch, run
import argparse
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--fail", default="")
    o, state = run.parse(parser, None, ["seconds"])
    rank, world, device = run.setup()
    w, update = (state["w"], state["update"]) if state else (torch.ones(1), 0)
    log, stop = run.Log(o.out / "log.jsonl", rank, update), run.CatchSignals()
    while update < o.updates:
        w = w * 1.5 + update
        update += 1
        time.sleep(o.seconds)
        total, stopped = run.all_sum(w.item(), stop.asked)
        log.record(update=update, w=total / world)
        log.once("met", ["x"])
        if update % 10 == 0 or stopped:
            run.save(o.out / "checkpoints", update, {"options": run.plain(o), "w": w, "update": update})
        if stopped:
            run.leave(update, o.updates, stop.asked)
    def last():
        if o.fail:
            raise OSError(o.fail)
    run.on_first(last)
with run.ended("script.py"):
    main()
"""


def start(folder: Path, *argv: object, ranks: int = 1) -> subprocess.Popen:
    """The script above, in one process or in two under torchrun."""
    (folder / "script.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{SCRIPT}")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, str(folder / "script.py"), "--out", str(folder / "out"), *map(str, argv)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for(folder: Path, lines: int, process: subprocess.Popen) -> None:
    """Until the log has that many lines."""
    for _ in range(600):
        assert process.poll() is None, process.stderr.read()
        if (folder / "out" / "log.jsonl").exists() and len(log_of(folder / "out")) >= lines:
            return
        time.sleep(0.05)
    raise AssertionError("the script does not start")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_resumes_exactly(number: signal.Signals, tmp_path: Path):
    process = start(tmp_path, "--seconds", 0.1)
    wait_for(tmp_path, 12, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    if number == signal.SIGKILL:
        assert run.checkpoints(tmp_path / "out" / "checkpoints")[-1].name == "update-00000010.pt"
    else:  # it ends after its update, saved
        assert process.returncode == 128 + number and "--resume" in said
        assert run.load(tmp_path / "out" / "checkpoints")["update"] == log_of(tmp_path / "out")[-1]["update"] >= 12
    assert start(tmp_path, "--resume", "--seconds", 0).wait(30) == 0
    w = 1.0
    for line, update in zip(log_of(tmp_path / "out"), range(30), strict=True):
        w = w * 1.5 + update
        assert line["update"] == update + 1 and line["w"] == pytest.approx(w, rel=1e-6)
    assert [path.stem[-2:] for path in run.checkpoints(tmp_path / "out" / "checkpoints")] == ["20", "30"]


def test_two_processes(tmp_path: Path):
    """What fails on the first ends both with the same sentence; a name is told once by each."""
    process = start(tmp_path, "--fail", "no room on the disk", ranks=2)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and said.count("script.py: no room on the disk") == 2
    assert 'script.py", line' not in said and said.count("met: x") == 2
    assert [line["update"] for line in log_of(tmp_path / "out")] == list(range(1, 31))


def test_the_second_signal_of_any_kind_ends_the_process():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    stop = run.CatchSignals()
    signal.raise_signal(signal.SIGINT)
    assert stop.asked == signal.SIGINT
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == [signal.SIG_DFL] * 2
    signal.signal(signal.SIGTERM, before[0]), signal.signal(signal.SIGINT, before[1])


def parser(folder: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=folder)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--lr", type=run.number(0, float), default=1.0)
    parser.add_argument("--seed", type=run.number(0), default=0)
    return parser


def test_a_resumed_run_has_its_own_options(tmp_path: Path, capsys):
    with pytest.raises(ValueError, match="holds no checkpoint; leave --resume out"):
        run.parse(parser(tmp_path), ["--resume"], ["lr"])
    o, state = run.parse(parser(tmp_path), ["--lr", "0.5", "--seed", "3"], ["lr"])
    assert state is None
    run.save(tmp_path / "checkpoints", 1, {"options": run.plain(o)})
    with pytest.raises(ValueError, match="holds a run; continue it with --resume"):
        run.parse(parser(tmp_path), [], ["lr"])
    o, state = run.parse(parser(tmp_path), ["--resume"], ["lr"])
    assert (o.lr, o.seed) == (0.5, 3) and state["options"]["seed"] == 3
    assert run.parse(parser(tmp_path), ["--resume", "--lr", "0.1", "--seed", "3"], ["lr"])[0].lr == 0.1
    with pytest.raises(SystemExit) as caught:
        run.parse(parser(tmp_path), ["--resume", "--seed", "4"], ["lr"])
    assert caught.value.code == 2 and "--seed: the run in" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["-1", "nan"])
def test_numbers_out_of_range_are_usage_errors(text: str, tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as caught:
        parser(tmp_path).parse_args([f"--lr={text}"])
    assert caught.value.code == 2 and "argument --lr:" in capsys.readouterr().err


def test_a_checkpoint_is_whole_or_absent(tmp_path: Path, monkeypatch):
    """A full disk loses nothing, and a damaged file is named."""
    for update in (1, 2):
        run.save(tmp_path, update, {"update": update})

    def full(state: dict, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert "update-00000003.pt: cannot be written" in refusal(run.save, tmp_path, 3, {"update": 3})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["update-00000001.pt", "update-00000002.pt"]
    assert run.load(tmp_path)["update"] == 2
    (tmp_path / "update-00000002.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match="update-00000002.pt: is damaged"):
        run.load(tmp_path)


def test_the_log_is_cut_to_the_checkpoint(tmp_path: Path, capsys):
    path = tmp_path / "log.jsonl"
    path.write_text('{"update": 1}\n{"update": 2}\n{"update": 3}\n{"upd')
    log = run.Log(path, 0, 2)
    log.record(update=3, loss=float("nan"))
    assert path.read_text() == '{"update": 1}\n{"update": 2}\n{"update": 3, "loss": null}\n'
    log.once("broken", ["a", "b", "a"]), log.once("broken", ["b"])
    assert capsys.readouterr().err.splitlines() == ["broken: a", "broken: b"]


class Failing(torch.utils.data.Dataset):
    """Items 0 to 3, of which one cannot be had."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> int:
        if i == 2:
            raise ValueError("image 2 is broken: remove it")
        return i


def test_an_error_of_a_data_worker_is_one_sentence():
    with pytest.raises(SystemExit) as caught, run.ended("probe.py"):
        list(torch.utils.data.DataLoader(Failing(), num_workers=1))
    assert str(caught.value) == "probe.py: image 2 is broken: remove it"


def test_micro_batches():
    assert [run.micro_batch(share, 64) for share in (1024, 100, 7, 127)] == [64, 50, 7, 1]
    assert [run.micro_batch(share, 64, multiple=2) for share in (1024, 100, 66)] == [64, 50, 22]


def test_a_message_never_shares_the_bars_line(capsys):
    with pytest.raises(SystemExit), run.ended("probe.py"):
        bar = run.bar("training", 10, 0)
        bar.update(3)
        raise ValueError("image 2 is broken")
    assert capsys.readouterr().err.endswith("\n") and bar.disable
