"""Make the demo's language model: a small Llama from scratch, and a tokenizer of the scenes' words and phrases.

    python demo/make_language.py FOLDER                           # a minute; demo/language is what it wrote

The folder receives config.json, model.safetensors (bfloat16) and tokenizer.model: a Llama for train_vlm.py --language.
"""

import argparse
import io
import json
import re
import sys
import tempfile
from pathlib import Path

import sentencepiece
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import llama
from demo import scenes

NAME = rf"(▁?(?:{'|'.join([*scenes.COLORS, *scenes.SHAPES, 'object'])})(?:es|s)?\b|▁?\d+)"  # or a number


def read_texts(count: int = 2000) -> list[str]:
    """What is tokenized in the conversations about some scenes: each question inside its prompt, each answer alone."""
    with tempfile.TemporaryDirectory() as folder:
        rows = json.loads((scenes.write(Path(folder) / "scenes", count, 0, 0) / "conversations.json").read_text())
    turns = [turn for row in rows for turn in row["conversations"]]
    questions = [turn["value"].removeprefix("<image>\n") for turn in turns if turn["from"] == "human"]
    return [f"In: {question}\nOut:" for question in questions] + [t["value"] for t in turns if t["from"] == "gpt"]


def train_tokenizer(texts: list[str]) -> bytes:
    """A sentencepiece model of Llama's kind: BPE, and bytes for what it does not know.

    Each word is a symbol, with the space before it ("▁red"). So is whatever stands between two names or numbers
    ("▁In:▁What▁color▁is▁the"), which makes a conversation a third as long, and each side of a box, with the punctuation
    before it ("▁[0.25", ",▁0.50"). Outside of these, the texts hold `letters` alone.
    """
    lines = [line for text in texts for line in text.split("\n")]
    plain = ["▁" + text.replace(" ", "▁") for text in sorted(set(texts)) if not text.startswith("[")]
    words = {word for text in plain for word in re.findall('▁?(?:\\w+|")', text)}
    phrases = {part for text in plain for part in re.split(NAME, text) if len(part) > 1}
    sides = {f"{start}{pixel / 64:.2f}" for pixel in range(65) for start in ("▁[", ",▁")}
    letters = "▁?.,:]"
    model, symbols = io.BytesIO(), sorted(words | phrases | sides)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", user_defined_symbols=symbols,
        vocab_size=3 + 256 + len(symbols) + len(letters), unk_id=0, bos_id=1, eos_id=2, byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@torch.no_grad()
def draw_weights(config: llama.LlamaConfig, seed: int = 0) -> llama.Llama:
    """First weights for a small model from scratch. The usual ones suit wide models.

    The embeddings have unit variance, and layers keep the variance of their input. The value and output projections
    start 3 times larger: at first, attention averages over a hundred tokens, in which a single one is hardly heard.
    """
    torch.manual_seed(seed)
    model, D = llama.Llama(config), config.hidden_size
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            std = 1.0 if "embed_tokens" in name else 3 * D**-0.5 if "v_proj" in name or "o_proj" in name else D**-0.5
            torch.nn.init.normal_(weight, std=std)
    return model.to(torch.bfloat16)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="must be new")
    folder = parser.parse_args(argv).folder
    if folder.exists():
        parser.error(f"{folder}: exists already; name a new folder")
    tokenizer = train_tokenizer(read_texts())
    words = sentencepiece.SentencePieceProcessor(model_proto=tokenizer).vocab_size()
    llama.save(draw_weights(llama.LlamaConfig(words, 128, 336, 4, 4, max_position_embeddings=1024)), folder)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    print(f"{folder}: {words} words")


if __name__ == "__main__":
    main()
