"""Text to token ids and back, and the one template that turns a dialogue into tokens.

Every turn is `[role] content [end of turn]` with nothing between turns; `<|endoftext|>` closes a complete dialogue.
The control tokens are only ever written by the template: content that spells one is encoded as plain text.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ssl_jax.dialogue import ROLES, Dialogue, Kind, Turn
from ssl_jax.errors import UserError

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
END_OF_TURN = "<|endofturn|>"
ROLE_TOKENS = {role: f"<|{role}|>" for role in ROLES}
CONTROL_TOKENS = (END_OF_TEXT, PAD, *ROLE_TOKENS.values(), END_OF_TURN)

MIN_PROMPT_TOKENS = 8

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|endofturn|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_ENCODE_CHUNK = 512
_MAX_TOKEN_CHARACTERS = 32


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedDialogue:
    """A dialogue as the model reads it.

    Attributes:
      id: the dialogue's id.
      tokens: int32[n], n >= 1.
      loss_mask: uint8[n], 1 where predicting this token counts. Labeled: the content and the end-of-turn of every
        assistant turn. Raw: every token. Prompt: none. The first token has no prediction and is always 0.
      reply_bytes: UTF-8 bytes of the assistant replies (raw: of the text; prompt: 0) as the source wrote them, before
        any cleaning. The denominator of reply_bits_per_byte.
    """

    id: str
    tokens: np.ndarray
    loss_mask: np.ndarray
    reply_bytes: int


def count_reply_bytes(dialogue: Dialogue) -> int:
    """UTF-8 bytes of what the loss mask of this dialogue covers: its replies, its raw text, or nothing (a prompt)."""
    scored = {"labeled": "assistant", "raw": "text", "prompt": None}[dialogue.kind]
    return sum(len(turn.content.encode()) for turn in dialogue.turns if turn.role == scored)


class DialogueTokenizer:
    """A Hugging Face fast tokenizer plus the control tokens and the template of this project.

    Attributes:
      vocab_size: number of ids, control tokens included; every id is below it.
      pad_id, end_of_text_id, end_of_turn_id: ids of the control tokens that belong to no role.
      role_ids: id that opens a turn of each role ("system", "user", "assistant", "text").
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Wraps `backend`, adding the control tokens it lacks.

        Raises:
          UserError: the backend turns text that spells a control token into that control token.
        """
        backend.add_special_tokens(
            [tokenizers.AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS]
        )
        backend.no_padding()
        backend.no_truncation()
        # With this switch a special token is recognized nowhere in the input, so content can never forge one.
        backend.encode_special_tokens = True
        self._backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        ids = {token: vocabulary[token] for token in CONTROL_TOKENS}
        self.vocab_size: int = 1 + max(vocabulary.values())
        self.pad_id: int = ids[PAD]
        self.end_of_text_id: int = ids[END_OF_TEXT]
        self.end_of_turn_id: int = ids[END_OF_TURN]
        self.role_ids: dict[str, int] = {role: ids[token] for role, token in ROLE_TOKENS.items()}
        self._control_ids = frozenset(ids.values())
        for token in CONTROL_TOKENS:
            if not self._control_ids.isdisjoint(self._encode_contents([token])[0]):
                raise UserError(f"this tokenizer reads the text {token!r} as a control token; choose another tokenizer")

    @classmethod
    def fit(cls, texts: Iterable[str], vocab_size: int) -> DialogueTokenizer:
        """Fits a byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2). The same texts give the same vocabulary.

        Args:
          texts: what to learn the merges from, in any order.
          vocab_size: upper bound on the ids, 256 bytes and the control tokens included.
        """
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
        backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(CONTROL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
            # Without a bound, one long run of a repeated character becomes tokens that are as long as the run.
            max_token_length=_MAX_TOKEN_CHARACTERS,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def load(cls, directory_or_name: str | Path) -> DialogueTokenizer:
        """Loads what `save` wrote, or any Hugging Face fast tokenizer (a directory or a hub name).

        Raises:
          UserError: there is no such tokenizer, or it has no fast version.
        """
        file = Path(directory_or_name) / "tokenizer.json"
        if file.is_file():
            try:
                return cls(tokenizers.Tokenizer.from_file(str(file)))
            except Exception as error:
                # The Rust library raises bare Exception, so anything but our own error is about the file.
                if isinstance(error, UserError):
                    raise
                raise UserError(f"{file}: not a tokenizer file: {error}") from None
        import transformers

        try:
            loaded = transformers.AutoTokenizer.from_pretrained(str(directory_or_name))
        except (OSError, ValueError) as error:
            detail = str(error).splitlines()[0]
            raise UserError(
                f"tokenizer.name_or_path {directory_or_name}: not a tokenizer directory and not on the hub ({detail})"
            ) from None
        if not loaded.is_fast:
            raise UserError(f"tokenizer.name_or_path {directory_or_name}: has no fast version (tokenizer.json)")
        return cls(tokenizers.Tokenizer.from_str(loaded.backend_tokenizer.to_str()))

    def save(self, directory: str | Path) -> None:
        """Writes a directory that `load`, `transformers.AutoTokenizer` and its chat template understand."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "pad_token": PAD,
            "additional_special_tokens": [*ROLE_TOKENS.values(), END_OF_TURN],
            "clean_up_tokenization_spaces": False,
            "chat_template": _CHAT_TEMPLATE,
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (directory / "tokenizer.json").write_text(self._backend.to_str(pretty=True), encoding="utf-8")

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the tokenizer's JSON: equal fingerprints mean equal ids for every text."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def __getstate__(self) -> str:
        return self._backend.to_str()

    def __setstate__(self, state: str) -> None:
        # Not the backend itself: it forgets when pickled that special tokens in the input are text.
        self.__init__(tokenizers.Tokenizer.from_str(state))

    def encode_text(self, text: str) -> np.ndarray:
        """int32[n] ids of plain text; never a control token, whatever the text spells."""
        return np.array(self._encode_contents([text])[0], np.int32)

    def encode(self, dialogue: Dialogue, reply_bytes: int | None = None) -> EncodedDialogue:
        """Applies the template to one dialogue.

        Args:
          dialogue: the dialogue, cleaned.
          reply_bytes: bytes of the replies before cleaning; absent: those of `dialogue` itself.
        """
        return self._assemble(dialogue, self._encode_turns(dialogue.turns), reply_bytes)

    def encode_all(self, dialogues: Iterable[tuple[Dialogue, int]]) -> Iterator[EncodedDialogue]:
        """Like `encode` for many `(dialogue, reply bytes before cleaning)`, in order, on all cores."""
        iterator = iter(dialogues)
        while chunk := list(itertools.islice(iterator, _ENCODE_CHUNK)):
            contents = iter(self._encode_contents([turn.content for dialogue, _ in chunk for turn in dialogue.turns]))
            for dialogue, reply_bytes in chunk:
                turns = [self._wrap(turn, next(contents)) for turn in dialogue.turns]
                yield self._assemble(dialogue, turns, reply_bytes)

    def encode_prompt(self, dialogue: Dialogue, max_tokens: int) -> np.ndarray:
        """The context to answer: the newest whole turns that fit, and the token that opens the assistant's turn.

        A leading system turn is kept. Where it leaves too little room for the newest turn it is cut to half of the
        room, and a newest turn that still does not fit is cut too; a cut turn loses its oldest content, never its role.

        Args:
          dialogue: the turns so far.
          max_tokens: upper bound on the result's length, at least `MIN_PROMPT_TOKENS`.

        Returns:
          int32[n], n <= max_tokens.
        """
        if max_tokens < MIN_PROMPT_TOKENS:
            raise ValueError(f"a prompt needs at least {MIN_PROMPT_TOKENS} tokens, got {max_tokens}")
        turns = self._encode_turns(dialogue.turns)
        room = max_tokens - 1
        system: list[int] = []
        if dialogue.turns[0].role == "system" and len(turns) > 1:
            system = _keep_newest(turns.pop(0), max(room - len(turns[-1]), room // 2))
            room -= len(system)
        kept = [_keep_newest(turns[-1], room)]
        room -= len(kept[0])
        for turn in reversed(turns[:-1]):
            if len(turn) > room:
                break
            kept.append(turn)
            room -= len(turn)
        return np.array([*system, *itertools.chain(*reversed(kept)), self.role_ids["assistant"]], np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids`; control tokens are skipped, bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(self._without_control(ids), skip_special_tokens=True)

    def decode_batch(self, batch: Iterable[Sequence[int] | np.ndarray]) -> list[str]:
        """`decode` of every row."""
        return self._backend.decode_batch([self._without_control(ids) for ids in batch], skip_special_tokens=True)

    def _without_control(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        return [token for token in map(int, ids) if token not in self._control_ids]

    def _encode_contents(self, contents: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(contents, add_special_tokens=False)]

    def _encode_turns(self, turns: Sequence[Turn]) -> list[list[int]]:
        contents = self._encode_contents([turn.content for turn in turns])
        return [self._wrap(turn, content) for turn, content in zip(turns, contents, strict=True)]

    def _wrap(self, turn: Turn, content: list[int]) -> list[int]:
        return [self.role_ids[turn.role], *content, self.end_of_turn_id]

    def _assemble(self, dialogue: Dialogue, turns: list[list[int]], reply_bytes: int | None) -> EncodedDialogue:
        kind = dialogue.kind
        tokens = list(itertools.chain(*turns))
        mask = list(
            itertools.chain(*(_turn_mask(kind, turn, ids) for turn, ids in zip(dialogue.turns, turns, strict=True)))
        )
        if kind != "prompt":
            tokens.append(self.end_of_text_id)
            mask.append(int(kind == "raw"))
        mask[0] = 0
        if reply_bytes is None:
            reply_bytes = count_reply_bytes(dialogue)
        return EncodedDialogue(dialogue.id, np.array(tokens, np.int32), np.array(mask, np.uint8), reply_bytes)


def _turn_mask(kind: Kind, turn: Turn, ids: list[int]) -> list[int]:
    if kind == "raw":
        return [1] * len(ids)
    if kind == "labeled" and turn.role == "assistant":
        return [0] + [1] * (len(ids) - 1)
    return [0] * len(ids)


def _keep_newest(turn: list[int], length: int) -> list[int]:
    """The role token and the last tokens of a turn, `length` in all."""
    if len(turn) <= length:
        return turn
    return [turn[0], *turn[len(turn) - length + 1 :]]
