"""Make the demo's language model: a small Llama trained on text about scenes, never on pictures, and its tokenizer.

    python demo/make_language.py runs/words                       # 40 minutes of one core
    python demo/make_language.py FOLDER --start runs/words --updates 800 --lr 1.5e-3    # 20 more; wrote demo/language

As Llama was trained on text before it met images, so is this one. Where an image's tokens will stand, each of the 64
patches is told in words: its embedding is the sum of those of the color and the shape that are there, and of a vector
for the place. Questions and answers follow. So the model learns what the questions mean, and to look things up, before
the first image. --start continues such a model, with triplets (decode.py) among the answers: its state at a <REF>
learns to match the patches that the phrase means.
The folder receives config.json, model.safetensors and tokenizer.model, for train_vlm.py --language.
"""

import argparse
import io
import math
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import decode
import llama
import run
import vlm
from demo import scenes

WARMUP, MAX_NORM, WEIGHT_DECAY = 100, 1.0, 0.1
SEED = 1_000_000_007  # of the scenes, which are none of those that any command shows
MOST = {"at": 14, "relation": 8, "where": 4, "color": 3, "count": 3, "presence": 3, "refer": 2, "caption": 1,
        "refer-box": 4, "refer-mask": 2, "all-box": 2, "all-mask": 1, "region": 0}  # questions about a scene
NAME = rf"(▁?(?:{'|'.join([*scenes.COLORS, *scenes.SHAPES, 'object'])})(?:es|s)?\b|▁?\d+)"  # or a number
NOTHING = "nothing"
Told = tuple[list[tuple[str, str]], list[tuple[str, str, str]]]  # two words a patch; kind, question, answer


def tell(index: int, pointing: bool = False) -> Told:
    """A scene in words, row by row: color and shape of the thing that covers most of a patch, "nothing" where things
    cover less than a third. And questions about it, in random order; also those that are answered by pointing."""
    scene, rng = scenes.make(SEED, index), np.random.default_rng((SEED, index))
    patches = scene.seen.reshape(scenes.GRID, -1, scenes.GRID, scenes.GRID).swapaxes(1, 2)  # [row, column, y, x]
    shares = np.stack([(patches == n + 1).mean((2, 3)).ravel() for n in range(len(scene.objects))])  # [things, N]
    largest = np.where(shares.max(0) < 1 / 3, -1, shares.argmax(0)).tolist()
    words = [(NOTHING, NOTHING) if n < 0 else (scene.objects[n].color, scene.objects[n].shape) for n in largest]
    asked: dict[str, tuple[str, str, str]] = {}
    asks = [scenes.questions] * 20 + [scenes.pointing] * 10 * pointing
    for kind, question, answer, *_ in (one for ask in asks for one in ask(scene, rng)):
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
    for i in range(len(told)):
        pointing = scenes.pointing(scenes.make(SEED, i), np.random.default_rng((SEED, i)))
        rows.append(scenes.conversation([pair for _, *pair, _ in pointing]))
    texts = [vlm.TEMPLATES["llama"].piece(turn["value"].removeprefix("<image>\n"), i)
             for row in rows for i, turn in enumerate(row)]  # fmt: skip
    texts = [part for text in texts for part in re.split("<[^>]+>", text)]  # without the added tokens of decode.py
    plain = ["▁" + text.replace(" ", "▁") for text in sorted(set(texts)) if not text.startswith("[")]
    words = {word for text in plain for word in re.findall('▁?(?:\\w+|")', text)}
    phrases = {part for text in plain for part in re.split(NAME, text) if len(part) > 1}
    sides = {f"{start}{pixel / 64:.2f}" for pixel in range(65) for start in ("▁[", ",▁")}
    refs = {f"▁[{i}]" for i in range(5)}
    letters = "▁?.,:]"
    model, symbols = io.BytesIO(), sorted(words | phrases | sides | refs)
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


def encode(tokenizer: llama.Tokenizer, told: Told) -> tuple[list[int], list[int], list[list[int]], list[list[bool]]]:
    """Ids and labels of the conversation, the two words of each patch, and for each <REF> which patches it means."""
    words, asked = told
    conversation = scenes.conversation([pair for _, *pair in asked])
    ids, labels = vlm.encode(tokenizer, vlm.TEMPLATES["llama"], conversation)
    names = [set(name.split()) for *_, text in asked for name, _, refs, _ in decode.read(text) for _ in refs]
    meant = [[name <= {*pair, "object"} and NOTHING not in pair for pair in words] for name in names]
    return ids, labels, [[tokenizer.encode(word)[0] for word in pair] for pair in words], meant


def read(model: llama.Llama, examples: list, places: Tensor, ref: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [B, S, E] at <s>, the patches and the conversations, labels [B, S], and the loss of what each <REF>
    means: the cross-entropy of its patches. places: [N, E]."""
    ids, mask = llama.Tokenizer.pad([ids for ids, *_ in examples], left=False)
    labels, _ = llama.Tokenizer.pad([labels for _, labels, *_ in examples], left=False)
    labels = labels.masked_fill(mask == 0, llama.IGNORE)
    patches = model.embed(torch.tensor([words for *_, words, _ in examples])).sum(2) * 0.5**0.5 + places  # [B, N, E]
    blank = labels.new_full((len(ids), len(places)), llama.IGNORE)
    x, labels = model.hidden(vlm.insert(model.embed(ids), patches)), vlm.insert(labels, blank)
    where = vlm.insert(ids == ref, blank == 0)  # [B, S]
    meant = torch.tensor([one for *_, meant in examples for one in meant]).view(-1, len(places)).float()  # [R, N]
    of = where.nonzero()[:, 0]
    logits = torch.einsum("re,rne->rn", x[where].float(), patches[of].float()) / patches.shape[2] ** 0.5
    loss = -(logits.log_softmax(1) * meant).sum(1) / meant.sum(1).clamp(min=1)
    return x, labels, loss.sum() / max(1, len(loss))


@torch.no_grad()
def measure(model: llama.Llama, tokenizer: llama.Tokenizer, told: list[Told], places: Tensor,
            ref: int) -> str:  # fmt: skip
    """The share of the questions of each kind that the model answers right, word for word."""
    right: dict[str, list[bool]] = {}
    for words, asked in told:
        x, labels, _ = read(model, [encode(tokenizer, (words, [one])) for one in asked], places, ref)
        found = (model.lm_head(x)[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == llama.IGNORE)
        for (kind, *_), good in zip(asked, found.all(1).tolist()):
            right.setdefault(kind, []).append(good)
    return ", ".join(f"{kind} {np.mean(good):.0%}" for kind, good in sorted(right.items()))


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="must be new")
    parser.add_argument("--count", type=int, default=24_000, help="scenes to read about")
    parser.add_argument("--unseen", type=int, default=100, help="scenes to be asked about")
    parser.add_argument("--updates", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--start", type=Path, help="go on from this folder, and read triplets as well")
    parser.add_argument("--batch", type=int, default=16)
    o = parser.parse_args(argv)
    if o.folder.exists():
        parser.error(f"{o.folder}: exists already; name a new folder")

    with ProcessPoolExecutor() as pool:
        told = pool.map(partial(tell, pointing=o.start is not None), range(o.count + o.unseen), chunksize=64)
        told = list(tqdm(told, "telling scenes", o.count + o.unseen, disable=None))
    told, unseen = told[: o.count], told[o.count :]
    file = o.folder.with_name(f".{o.folder.name}.tokenizer")
    file.write_bytes((o.start / "tokenizer.model").read_bytes() if o.start else train_tokenizer(told[:2000]))
    tokenizer = llama.Tokenizer(file, added=decode.ADDED if o.start else ())
    config = llama.LlamaConfig(tokenizer.vocab_size, 128, 336, 4, 4, max_position_embeddings=1024)
    model, rng, ref = draw_weights(config), np.random.default_rng(0), tokenizer.added.get(decode.REF, -1)
    rows, columns = 0.5 * torch.randn(2, scenes.GRID, config.hidden_size)
    places = (rows[:, None] + columns).flatten(0, 1)  # [N, E]
    if o.start:
        model = llama.load(o.start, least=tokenizer.vocab_size + len(tokenizer.added)).train()
    optimizer = torch.optim.AdamW(model.parameters(), o.lr, weight_decay=WEIGHT_DECAY, fused=True)
    epochs = math.ceil(o.updates * o.batch / o.count)
    order = np.concatenate([rng.permutation(o.count)[: o.count // o.batch * o.batch] for _ in range(epochs)])
    bar = tqdm(order[: o.updates * o.batch].reshape(o.updates, o.batch), unit=" updates", disable=None)
    for update, rows in enumerate(bar):
        rise, fall = min(1, (update + 1) / WARMUP), (1 + math.cos(math.pi * update / o.updates)) / 2
        optimizer.param_groups[0]["lr"] = o.lr * rise * fall
        with run.autocast("auto", places.device):
            x, labels, pointing = read(model, [encode(tokenizer, told[i]) for i in rows], places, ref)
            loss = model.summed_loss(x, labels) / (labels[:, 1:] != llama.IGNORE).sum()
        (loss + pointing).backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"loss {loss.item():.4f}, pointing {pointing.item():.4f}", refresh=False)
        if (update + 1) % 250 == 0 or update + 1 == o.updates:
            losses = f"loss {loss.item():.4f}, pointing {pointing.item():.4f}"
            tqdm.write(f"update {update + 1}: {losses}; {measure(model, tokenizer, unseen, places, ref)}")
    llama.save(model.to(torch.bfloat16), o.folder)
    file.rename(o.folder / "tokenizer.model")
    print(f"{o.folder}: {tokenizer.vocab_size} words")


if __name__ == "__main__":
    main()
