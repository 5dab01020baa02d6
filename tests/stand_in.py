"""Small Hugging Face directories that stand in for the hub's models: same files, same formats, few parameters."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import jax
import tiny
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ssl_jax import huggingface, model

CHINESE = ("你好", "苹果是红色的吗?", "是的, 红色的苹果。", "灯是白色的吗?", "不是, 是黑色的灯。", "看了什么好电影?")
LATIN = "abcdefghijklmnopqrstuvwxyz"
DIALOGPT_TEMPLATE = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"


def gpt2(folder: Path, *, chat_template: str | None = None, n_positions: int = 64, seed: int = 0) -> Path:
    """As `gpt2`: a byte-level BPE whose only special token is <|endoftext|>, the last id."""
    folder.mkdir(parents=True)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    texts = [message["content"] for row in tiny.labeled() for message in row["messages"]]
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([tokenizers.AddedToken("<|endoftext|>", special=True)])
    backend.save(str(folder / "tokenizer.json"))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    settings = {"tokenizer_class": "GPT2Tokenizer", **special}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    size = backend.get_vocab_size()
    return _weights(folder, size, end=size - 1, n_positions=n_positions, seed=seed)


def dialogpt(folder: Path) -> Path:
    """As `microsoft/DialoGPT-small`: GPT-2's tokenizer with a template that ends every turn with <|endoftext|>."""
    return gpt2(folder, chat_template=DIALOGPT_TEMPLATE)


def chinese(folder: Path, texts: Iterable[str] = CHINESE) -> Path:
    """As `uer/gpt2-chinese-cluecorpussmall`: a vocabulary of characters for BertTokenizer, and nothing else."""
    folder.mkdir(parents=True)
    characters = sorted({char for text in texts for char in text if not char.isspace()}.difference(LATIN))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*special, *characters, *LATIN, *(f"##{letter}" for letter in LATIN)]
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary), encoding="utf-8")
    _weights(folder, len(vocabulary), end=3, n_positions=64, seed=0)
    path = folder / "config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**stored, "tokenizer_class": "BertTokenizer"}), encoding="utf-8")
    # As on the hub, where nobody wrote check sums.
    (folder / "SHA256SUMS").unlink()
    return folder


def _weights(folder: Path, vocab_size: int, *, end: int, n_positions: int, seed: int) -> Path:
    shape = model.GPT2(
        vocab_size=vocab_size, padded_vocab_size=vocab_size, n_positions=n_positions, n_embd=32, n_layer=2, n_head=2,
        n_inner=128,
    )  # fmt: skip
    written = folder.with_name(folder.name + ".weights")
    params = model.init(shape, jax.random.key(seed))
    huggingface.write(written, shape, params, end_ids=(end,), end_of_text_id=end, pad_id=end)
    for file in written.iterdir():
        file.rename(folder / file.name)
    written.rmdir()
    return folder
