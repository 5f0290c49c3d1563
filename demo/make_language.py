"""Make the demo's language model: a small Llama that has read about scenes and never seen one, and its tokenizer.

    python demo/make_language.py FOLDER                           # half an hour of one core; wrote demo/language

As Llama was trained on text before it met images, so is this one. Where an image's tokens will stand, each of the 64
patches is told in words: its embedding is the sum of those of the color and the shape that are there, and of a vector
for the place. Questions and answers follow. So the model learns what the questions mean, and to look things up, before
the first image. The folder receives config.json, model.safetensors and tokenizer.model, for train_vlm.py --language.
"""

import argparse
import io
import math
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import llama
import run
import vlm
from demo import scenes

LR, WARMUP, MAX_NORM, WEIGHT_DECAY = 3e-3, 100, 1.0, 0.1
SEED = 1_000_000_007  # of the scenes, which are none of those that any command shows
MOST = dict(at=14, relation=8, where=4, color=3, count=3, presence=3, refer=2, caption=1)  # questions about a scene
NAME = rf"(▁?(?:{'|'.join([*scenes.COLORS, *scenes.SHAPES, 'object'])})(?:es|s)?\b|▁?\d+)"  # or a number
NOTHING = "nothing"
Told = tuple[list[tuple[str, str]], list[tuple[str, str, str]]]  # two words a patch; kind, question, answer


def tell(index: int) -> Told:
    """A scene in words, row by row: color and shape of the thing that covers most of a patch, "nothing" where things
    cover less than a third. And questions about it, in random order."""
    scene, rng = scenes.make(SEED, index), np.random.default_rng((SEED, index))
    patches = scene.seen.reshape(scenes.GRID, -1, scenes.GRID, scenes.GRID).swapaxes(1, 2)  # [row, column, y, x]
    shares = np.stack([(patches == n + 1).mean((2, 3)).ravel() for n in range(len(scene.objects))])  # [things, N]
    largest = np.where(shares.max(0) < 1 / 3, -1, shares.argmax(0)).tolist()
    words = [(NOTHING, NOTHING) if n < 0 else (scene.objects[n].color, scene.objects[n].shape) for n in largest]
    asked: dict[str, tuple[str, str, str]] = {}
    for kind, question, answer in (one for _ in range(20) for one in scenes.questions(scene, rng)):
        if sum(known == kind for known, *_ in asked.values()) < MOST[kind]:
            asked[question] = kind, question, answer
    return words, [list(asked.values())[i] for i in rng.permutation(len(asked))]


# --- the tokenizer ----------------------------------------------------------------------------------------------------

def train_tokenizer(told: list[Told]) -> bytes:
    """A sentencepiece model of Llama's kind: BPE, and bytes for what it does not know.

    Each word is a symbol, with the space before it ("▁red"). So is whatever stands between two names or numbers
    ("▁In:▁What▁color▁is▁the"), which makes a conversation a third as long, and each side of a box, with what
    is before it ("▁[0.25", ",▁0.50"). Outside of these, the texts hold `letters` alone.
    """
    rows = [scenes.conversation([pair for _, *pair in asked]) for _, asked in told]
    texts = [vlm.TEMPLATES["llama"].piece(turn["value"].removeprefix("<image>\n"), i)
             for row in rows for i, turn in enumerate(row)]  # fmt: skip
    plain = ["▁" + text.replace(" ", "▁") for text in sorted(set(texts)) if not text.startswith("[")]
    words = {word for text in plain for word in re.findall('▁?(?:\\w+|")', text)}
    phrases = {part for text in plain for part in re.split(NAME, text) if len(part) > 1}
    sides = {f"{start}{pixel / 64:.2f}" for pixel in range(65) for start in ("▁[", ",▁")}
    letters = "▁?.,:]"
    model, symbols = io.BytesIO(), sorted(words | phrases | sides)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n")), model_writer=model, model_type="bpe",
        user_defined_symbols=symbols, vocab_size=3 + 256 + len(symbols) + len(letters), unk_id=0, bos_id=1, eos_id=2,
        byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


# --- the model --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def draw_weights(config: llama.LlamaConfig, seed: int = 0) -> llama.Llama:
    """First weights for a small model from scratch. The usual ones suit wide models.

    The embeddings have unit variance, and layers keep the variance of their input. The value and output projections
    start 3 times larger: at first, attention averages over a hundred tokens, in which a single one is hardly heard.
    Queries and keys start alike, so that a word first looks for itself (mimetic initialization, Trockman and Kolter).
    """
    torch.manual_seed(seed)
    model, D = llama.Llama(config), config.hidden_size
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            std = 1.0 if "embed_tokens" in name else 3 * D**-0.5 if "v_proj" in name or "o_proj" in name else D**-0.5
            nn.init.normal_(weight, std=std)
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.add_(layer.self_attn.q_proj.weight).mul_(0.5**0.5)
    return model


def encode(tokenizer: llama.Tokenizer, told: Told) -> tuple[list[int], list[int], list[list[int]]]:
    """Ids and labels of the conversation, and the two words of each patch."""
    words, asked = told
    conversation = scenes.conversation([pair for _, *pair in asked])
    ids, labels = vlm.encode(tokenizer, vlm.TEMPLATES["llama"], conversation)
    return ids, labels, [[tokenizer.encode(word)[0] for word in pair] for pair in words]


def embed(model: llama.Llama, examples: list, places: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings [B, S, E] of <s>, the patches and the conversations, and labels [B, S]. places: [N, E]."""
    ids, mask = llama.Tokenizer.pad([ids for ids, *_ in examples], left=False)
    labels, _ = llama.Tokenizer.pad([labels for _, labels, _ in examples], left=False)
    labels = labels.masked_fill(mask == 0, llama.IGNORE)
    patches = model.embed(torch.tensor([words for *_, words in examples])).sum(2) * 0.5**0.5 + places  # [B, N, E]
    blank = labels.new_full((len(ids), len(places)), llama.IGNORE)
    return vlm.insert(model.embed(ids), patches), vlm.insert(labels, blank)


@torch.no_grad()
def measure(model: llama.Llama, tokenizer: llama.Tokenizer, told: list[Told], places: Tensor) -> str:
    """The share of the questions of each kind that the model answers right, word for word."""
    right: dict[str, list[bool]] = {}
    for words, asked in told:
        x, labels = embed(model, [encode(tokenizer, (words, [one])) for one in asked], places)
        found = (model(embeds=x)[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == llama.IGNORE)
        for (kind, *_), good in zip(asked, found.all(1).tolist()):
            right.setdefault(kind, []).append(good)
    return ", ".join(f"{kind} {np.mean(good):.0%}" for kind, good in sorted(right.items()))


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="must be new")
    parser.add_argument("--count", type=int, default=24_000, help="scenes to read about")
    parser.add_argument("--unseen", type=int, default=100, help="scenes to be asked about")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    o = parser.parse_args(argv)
    if o.folder.exists():
        parser.error(f"{o.folder}: exists already; name a new folder")

    with ProcessPoolExecutor() as pool:
        told = pool.map(tell, range(o.count + o.unseen), chunksize=64)
        told = list(tqdm(told, "telling scenes", o.count + o.unseen, disable=None))
    told, unseen = told[: o.count], told[o.count :]
    file = o.folder.with_name(f".{o.folder.name}.tokenizer")
    file.write_bytes(train_tokenizer(told[:2000]))
    tokenizer = llama.Tokenizer(file)
    config = llama.LlamaConfig(tokenizer.vocab_size, 128, 336, 4, 4, max_position_embeddings=1024)
    model, rng, updates = draw_weights(config), np.random.default_rng(0), o.count // o.batch * o.epochs
    rows, columns = 0.5 * torch.randn(2, scenes.GRID, config.hidden_size)
    places = (rows[:, None] + columns).flatten(0, 1)  # [N, E]
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=WEIGHT_DECAY, fused=True)
    order = np.concatenate([rng.permutation(o.count)[: o.count // o.batch * o.batch] for _ in range(o.epochs)])
    bar = tqdm(order.reshape(updates, o.batch), unit=" updates", disable=None)
    for update, rows in enumerate(bar):
        rise, fall = min(1, (update + 1) / WARMUP), (1 + math.cos(math.pi * update / updates)) / 2
        optimizer.param_groups[0]["lr"] = LR * rise * fall
        with run.autocast("auto", places.device):
            loss = model.loss(*embed(model, [encode(tokenizer, told[i]) for i in rows], places))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
        if (update + 1) % 250 == 0 or update + 1 == updates:
            tqdm.write(f"update {update + 1}: loss {loss.item():.4f}; {measure(model, tokenizer, unseen, places)}")
    llama.save(model.to(torch.bfloat16), o.folder)
    file.rename(o.folder / "tokenizer.model")
    print(f"{o.folder}: {tokenizer.vocab_size} words")


if __name__ == "__main__":
    main()
