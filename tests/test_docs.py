"""docs/the-papers-runs.md: every command is one that the programs take."""

import shlex

import pytest
from conftest import ROOT

import convert
import eval as evaluation
import probe
import train_align
import train_vlm

TEXT = (ROOT / "docs/the-papers-runs.md").read_text()
BLOCKS = "\n".join(TEXT.split("```")[1::2])
COMMANDS = [line for line in BLOCKS.splitlines() if line.startswith(("python ", "torchrun "))]


class Parsed(Exception):
    """The options were taken, and the work would begin."""


def test_the_commands_of_the_paper_parse(monkeypatch, tmp_path):
    def work(*args, **kwargs):
        raise Parsed

    monkeypatch.chdir(tmp_path)
    for module, name in ((evaluation, "questions"), (evaluation, "compare"), (convert, "convert_vit"),
                         (convert, "convert_conversations")):  # fmt: skip
        monkeypatch.setattr(module, name, work)
    parsers = {"train_align.py": train_align.options, "train_vlm.py": train_vlm.options, "probe.py": probe.parse}
    for command in COMMANDS:
        words = shlex.split(command)
        script = next(word for word in words if word.endswith(".py"))
        argv = words[words.index(script) + 1 :]
        if script in parsers:
            o = parsers[script](argv)
            if script == "train_align.py":
                assert (o[0].softcap == 0) == ("--softcap 0" in command) and o[0].batch == 1024
        else:
            with pytest.raises(Parsed):
                (evaluation if script == "eval.py" else convert).main(argv)


def test_the_page_holds_all_runs():
    rows = train_align.vit.BACKBONES.keys() - {"dinov2-vit-l"}
    assert len(COMMANDS) > 100 and all(f"--recipe {name} " in BLOCKS for name in rows)
    assert {v for v in train_vlm.VARIANTS if f"--variant {v} " not in BLOCKS} == set()
