"""Train the bundled model in mistral/bundled/, through the library's own Transformer.

    python -m tools.train_bundled CORPUS OUT [--steps 4500] [--batch 16] [--seed 1] [--device cpu]

CORPUS is a folder of plain-text books, one paragraph a line. OUT gets params.json,
consolidated.safetensors (bf16), tokenizer.model, training.json (what the card quotes), and
state.pt, from which the same command resumes. The held-out story never enters the tokenizer's
training nor the model's; it is written to OUT/held_out.txt.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import random
import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import sentencepiece as spm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from mistral.model import ModelArgs, Transformer

HELD_OUT = "THE HISTORY OF DWARF LONG NOSE"
NOT_STORIES = {"PREFACE", "CONTENTS", "INTRODUCTION", "TO THE FRIENDLY READER"}
LENGTH = 256
ARGS = ModelArgs(
    dim=256,
    n_layers=6,
    head_dim=32,
    hidden_dim=704,
    n_heads=8,
    n_kv_heads=2,
    norm_eps=1e-5,
    vocab_size=4096,
    sliding_window=64,
    rope_theta=1e4,
)


def stories(book: str) -> list[tuple[str, list[str]]]:
    """(title, paragraphs) of each story: a title is a short line in capitals, with no full stop."""
    found: list[tuple[str, list[str]]] = []
    for line in book.splitlines():
        line = line.strip()
        if not line or re.match(r"[\[(]|From |Adapted from |Translated from ", line):
            continue
        capitals = all(word[0].isupper() for word in re.findall(r"[A-Za-z]{4,}", line))
        if len(line) < 64 and line[-1].isalpha() and capitals:
            found.append((line, []))
        elif found:
            found[-1][1].append(line)
    return [(t, p) for t, p in found if t.upper() not in NOT_STORIES and sum(map(len, p)) > 1500]


def train_tokenizer(texts: list[str], path: Path) -> None:
    """A SentencePiece BPE model in the style of Mistral's v1: byte fallback, bos 1, eos 2."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.splitlines() if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=ARGS.vocab_size,
        byte_fallback=True,
        character_coverage=0.9999,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        max_sentence_length=100_000,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def samples(texts: list[str], sp: spm.SentencePieceProcessor) -> Tensor:
    """[N, LENGTH + 1] ids: bos, then the text from one paragraph's start on; -1 after a story's eos."""
    rows = []
    for text in texts:
        starts = [0, *(m.end() for m in re.finditer("\n\n", text))]
        pieces = [text[s : s + 8 * LENGTH] for s in starts]
        for piece, start in zip(sp.encode(pieces), starts, strict=True):
            ids = [sp.bos_id(), *piece]
            if start + 8 * LENGTH >= len(text):
                ids.append(sp.eos_id())
            ids = ids[: LENGTH + 1]
            rows.append(ids + [-1] * (LENGTH + 1 - len(ids)))
    return torch.tensor(rows)


def loss_of(model: Transformer, batch: Tensor) -> Tensor:
    """Mean negative log-likelihood a token, in nats, of [N, length + 1] ids; -1 does not count."""
    inputs, targets = batch[:, :-1].clamp(min=0), batch[:, 1:]
    logits = model(inputs.flatten(), seqlens=[inputs.shape[1]] * len(inputs))
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-1)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 200 steps, constant, then a linear fall to zero over the last 30%."""
    return peak * min(1.0, (step + 1) / 200, (steps - step) / (0.3 * steps))


def held_out_loss(model: Transformer, text: str, sp: spm.SentencePieceProcessor) -> float:
    """Nats a token of the held-out story, read as one sequence."""
    ids = torch.tensor([sp.bos_id(), *sp.encode(text), sp.eos_id()], device=model.device)
    with torch.inference_mode():
        return loss_of(model, ids[None]).item()


def initialise(model: Transformer) -> None:
    for name, p in model.named_parameters():
        if p.dim() == 2:
            scale = math.sqrt(2 * len(model.layers)) if name.endswith(("wo.weight", "w2.weight")) else 1.0
            torch.nn.init.normal_(p, std=0.02 / scale)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast to bf16")
    return parser.parse_args()


def read_corpus(folder: Path) -> tuple[list[str], str, dict[str, str]]:
    """The stories to learn from, the one that is held out, and the digest of each book."""
    books = sorted(folder.glob("*.txt"))
    sha256 = {b.name: hashlib.sha256(b.read_bytes()).hexdigest() for b in books}
    told = [s for b in books for s in stories(b.read_text(encoding="utf-8"))]
    texts = ["\n\n".join(paragraphs) for title, paragraphs in told if title != HELD_OUT]
    (held_out,) = ["\n\n".join(paragraphs) for title, paragraphs in told if title == HELD_OUT]
    return texts, held_out, sha256


def optimizer_of(model: Transformer, lr: float) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def batch_of(data: Tensor, step: int, options: argparse.Namespace) -> Tensor:
    """The samples of a step: every epoch has an order of its own."""
    epoch, place = divmod(step, len(data) // options.batch)
    order = list(range(len(data)))
    random.Random(f"{options.seed}:{epoch}").shuffle(order)
    return data[order[place * options.batch : (place + 1) * options.batch]].to(options.device)


def train(model: Transformer, data: Tensor, options: argparse.Namespace, evaluate: Callable[[], float]) -> float:
    """Train to the last step, from the first or from the state that was saved; return the seconds of all of them."""
    optimizer = optimizer_of(model, options.lr)
    first, seconds = 0, 0.0
    state_file = options.out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
    autocast = torch.autocast(options.device, torch.bfloat16) if options.bf16 else nullcontext()
    began, recent = time.time() - seconds, []
    for step in range(first, options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps, options.lr)
        with autocast:
            loss = loss_of(model, batch_of(data, step, options))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} loss {sum(recent) / len(recent):.3f} seconds {time.time() - began:.0f}", flush=True)
            recent.clear()
        if (step + 1) % 250 == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save({**state, "seconds": time.time() - began}, state_file)
            print(f"step {step + 1} held-out {evaluate():.4f}", flush=True)
    return time.time() - began


def write_model(model: Transformer, out: Path) -> None:
    """Shape and weights, which are rounded to bf16; the model is left with what was written."""
    model.to("cpu", torch.bfloat16)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out / "consolidated.safetensors")
    (out / "params.json").write_text(json.dumps(ARGS.to_params(), indent=2) + "\n")
    model.float()


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    texts, held_out, sha256 = read_corpus(options.corpus)
    (options.out / "held_out.txt").write_text(held_out + "\n", encoding="utf-8")
    tokenizer = options.out / "tokenizer.model"
    if not tokenizer.exists():
        train_tokenizer(texts, tokenizer)
    sp = spm.SentencePieceProcessor(model_file=str(tokenizer))
    data = samples(texts, sp)
    print(f"{len(texts)} stories, {sum(map(len, texts))} characters, {len(data)} samples", flush=True)

    torch.manual_seed(options.seed)
    model = Transformer(ARGS)
    initialise(model)
    model.to(options.device)
    seconds = train(model, data, options, lambda: held_out_loss(model, held_out, sp))
    write_model(model, options.out)
    record = {
        "command": f"python -m tools.train_bundled CORPUS OUT --steps {options.steps} --batch {options.batch} "
        f"--lr {options.lr} --seed {options.seed}" + (" --bf16" if options.bf16 else ""),
        "torch": torch.__version__,
        "device": options.device,
        "seconds": round(seconds),
        "parameters": sum(p.numel() for p in model.parameters()),
        "samples": len(data),
        "epochs": round(options.steps / (len(data) // options.batch), 2),
        "held_out_story": HELD_OUT,
        "held_out_nats_per_token": round(held_out_loss(model, held_out, sp), 4),
        "held_out_tokens": len(sp.encode(held_out)) + 1,
        "held_out_characters": len(held_out),
        "sha256": sha256,
    }
    (options.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
