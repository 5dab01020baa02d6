"""Text to token ids and back, and dialogues to token ids by a template.

Contents are encoded as plain text, whatever they spell: control tokens come from the template only (`templates`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast, get_args

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ssl_jax.config import TemplateName
from ssl_jax.data import prompts, tokenizer_files, word_cache
from ssl_jax.data.assembly import Assembled, assemble
from ssl_jax.data.chat_template import ChatTemplate, TemplateError
from ssl_jax.data.prompts import Prompt
from ssl_jax.data.templates import Content, Control, Joined, Layout, RoleTokens, Template
from ssl_jax.data.tokenizer_files import TokenizerFiles
from ssl_jax.data.word_cache import Encode
from ssl_jax.dialogue import ROLES, Dialogue, Turn
from ssl_jax.errors import UserError

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
END_OF_TURN = "<|endofturn|>"
ROLE_TOKENS = {role: f"<|{role}|>" for role in ROLES}
CONTROL_TOKENS = (END_OF_TEXT, PAD, *ROLE_TOKENS.values(), END_OF_TURN)
BACKWARD = "<|backward|>"
SYNTHETIC = "<|synthetic|>"
DIRECTION_TOKENS = (BACKWARD, SYNTHETIC)

_ENCODE_CHUNK = 512
_MAX_TOKEN_CHARACTERS = 32
# Every byte that UTF-8 uses: whoever gives this text back has a token for every byte.
_ALL_BYTES = "".join(map(chr, (*range(0x801), *range(0x1000, 0xD000, 0x1000), 0xD7FF, 0xE000, 0xF000)))
_ALL_BYTES += "".join(map(chr, (0x10000, 0x40000, 0x80000, 0xC0000, 0x100000)))
# Chinese characters as BERT's tokenizer separates them, and the punctuation written with them.
_CHINESE = "\u3000-\u303f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0002fa1f"
_SPACE_AT_CHINESE = re.compile(f"(?<=[{_CHINESE}]) | (?=[{_CHINESE}])")


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedDialogue:
    """A dialogue as the model reads it.

    Attributes:
      id: the dialogue's id.
      tokens: int32[n], n >= 1.
      loss_mask: uint8[n], 1 where predicting this token counts. Labeled: the content and the end of every assistant
        turn. Raw: every token. Prompt: none. The first token has no prediction and is always 0.
      reply_bytes: UTF-8 bytes of the assistant replies (raw: of the text; prompt: 0) as the source wrote them, before
        any cleaning. The denominator of reply_bits_per_byte.
      prefix_length: tokens of a leading system turn, 0 without one.
      unknown_bytes: UTF-8 bytes of the text under the loss mask, spaces aside, that the tokenizer cannot express: they
        became the unknown token or none at all. Their likelihood is not in the tokens.
    """

    id: str
    tokens: np.ndarray
    loss_mask: np.ndarray
    reply_bytes: int
    prefix_length: int = 0
    unknown_bytes: int = 0


def count_reply_bytes(dialogue: Dialogue) -> int:
    """UTF-8 bytes of what the loss mask of this dialogue covers: its replies, its raw text, or nothing (a prompt)."""
    scored = {"labeled": "assistant", "raw": "text", "prompt": None}[dialogue.kind]
    return sum(len(turn.content.encode()) for turn in dialogue.turns if turn.role == scored)


class DialogueTokenizer:
    """A Hugging Face fast tokenizer and the template by which it reads dialogues.

    Attributes:
      template: its name: role_tokens, end_of_text, chat_template or plain.
      vocab_size: number of ids, control tokens included; every id is below it.
      base_vocab_size: the same before control tokens were added here.
      pad_id, end_of_text_id: the tokenizer's own where it has them.
      end_ids: tokens that end an assistant's turn; the first one is what the template writes.
      suppressed_ids: all other control tokens; they have no place in a reply.
      backward_id: what a dialogue that is read from its last turn to its first begins with; None without direction
        tokens.
      synthetic_id: what a dialogue begins with whose context a model made up; None without direction tokens.
      reply_start: int32[n], n >= 1: what opens an assistant's turn where nothing was said before.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        template: TemplateName = "role_tokens",
        named_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        direction_tokens: bool = False,
    ) -> None:
        """Wraps `backend`, adding the control tokens that `template` needs and it lacks.

        Args:
          backend: text to ids; changed.
          template: how to read dialogues.
          named_tokens: spelling of the control tokens that have a part: `eos_token`, `pad_token`, ….
          chat_template: for the template of that name, the Jinja template.
          direction_tokens: add the tokens of `backward_id` and `synthetic_id`; a vocabulary that has them keeps them.

        Raises:
          UserError: the backend turns text that spells a control token into that control token, the chat template
            cannot be used, or direction tokens are to go with another template than role_tokens.
        """
        if direction_tokens and template != "role_tokens":
            raise UserError(
                f"tokenizer.template {template}: tokenizer.direction_tokens needs turns that begin with a token for "
                "their role; set tokenizer.template role_tokens, or tokenizer.direction_tokens false"
            )
        backend.no_padding()
        backend.no_truncation()
        self.base_vocab_size = _vocab_size(backend)
        named = {name: token for name, token in (named_tokens or {}).items() if token}
        end_of_text = named.get("eos_token") or named.get("sep_token")
        if end_of_text is None:
            end_of_text = named["eos_token"] = END_OF_TEXT
            named.setdefault("bos_token", END_OF_TEXT)
        added = []
        if template == "role_tokens":
            named.setdefault("pad_token", PAD)
            added = [*ROLE_TOKENS.values(), END_OF_TURN, *(DIRECTION_TOKENS if direction_tokens else ())]
        elif template == "chat_template":
            added = _markers(backend, chat_template or "")
        _add_control_tokens(backend, [*named.values(), *added])
        # With this switch a special token is recognized nowhere in the input, so content can never forge one.
        backend.encode_special_tokens = True
        self._backend = backend
        self._named_tokens = named
        self.template: TemplateName = template
        self.vocab_size = _vocab_size(backend)

        special = {
            token.content: Control(number, strips_left=token.lstrip, strips_right=token.rstrip)
            for number, token in backend.get_added_tokens_decoder().items()
            if token.special
        }
        ids = {name: special[token].id for name, token in named.items()}
        self._special = special
        writes_unknown = backend.token_to_id(getattr(backend.model, "unk_token", None) or "")
        self._unknown_id = ids.get("unk_token", writes_unknown)
        unknown = () if self._unknown_id is None else (self._unknown_id,)
        self._control_ids = frozenset((*(token.id for token in special.values()), *unknown))
        # A normalizer that changes nothing, and a token for every byte: then nothing is ever unknown.
        ids_of_all = backend.encode(_ALL_BYTES, add_special_tokens=False).ids
        self._lossless = backend.decode(ids_of_all, skip_special_tokens=False) == _ALL_BYTES
        self.end_of_text_id: int = special[end_of_text].id
        self.pad_id: int = ids.get("pad_token", self.end_of_text_id)
        self.backward_id: int | None = self._direction_id(BACKWARD)
        self.synthetic_id: int | None = self._direction_id(SYNTHETIC)
        self._check_text_is_text(writes_unknown)

        self._template = self._make_template(end_of_text, chat_template)
        self._layout = functools.lru_cache(maxsize=4096)(self._template.layout)
        if isinstance(self._template, ChatTemplate):
            self._check_chat_template(self._template)

        end = self._template.reply[-1]
        assert isinstance(end, Control)
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys((end.id, self.end_of_text_id)))
        self.suppressed_ids: tuple[int, ...] = tuple(sorted(self._control_ids.difference(self.end_ids)))
        header = self._assemble([(Layout.of(self._template.header), ())])[0]
        self.reply_start: np.ndarray = header.tokens

    @classmethod
    def fit(cls, texts: Iterable[str], vocab_size: int, *, direction_tokens: bool = False) -> DialogueTokenizer:
        """Fits a byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2), with the template role_tokens.

        The same texts give the same vocabulary.

        Args:
          texts: what to learn the merges from, in any order.
          vocab_size: upper bound on the ids, 256 bytes and the control tokens included.
          direction_tokens: as in `__init__`.
        """
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
        backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[*CONTROL_TOKENS, *(DIRECTION_TOKENS if direction_tokens else ())],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
            # Without a bound, one long run of a repeated character becomes tokens that are as long as the run.
            max_token_length=_MAX_TOKEN_CHARACTERS,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend, direction_tokens=direction_tokens)

    @classmethod
    def load(
        cls,
        directory_or_name: str | Path,
        template: str = "auto",
        fallback: TemplateName = "role_tokens",
        *,
        direction_tokens: bool = False,
    ) -> DialogueTokenizer:
        """Loads what `save` wrote, or any Hugging Face fast tokenizer (a directory or a hub name).

        Args:
          directory_or_name: where it is.
          template: how to read dialogues. auto: what `save` recorded; else role_tokens if the vocabulary has their
            tokens; else the tokenizer's own chat template; else `fallback`.
          fallback: where nothing says how.
          direction_tokens: as in `__init__`.

        Raises:
          UserError: there is no such tokenizer, a file is missing, it has no fast version, or it does not go with the
            template.
        """
        wanted = _template_name(template)
        if wanted is None and template != "auto":
            raise UserError(f"tokenizer.template {template}: use one of auto, {', '.join(get_args(TemplateName))}")
        files = tokenizer_files.read(directory_or_name)
        resolved = wanted or _recorded(files) or fallback
        return cls(
            files.backend,
            template=resolved,
            named_tokens=files.named_tokens,
            chat_template=files.chat_template,
            direction_tokens=direction_tokens,
        )

    @property
    def role_ids(self) -> Mapping[str, int]:
        """Id of the token that opens a turn, by role.

        Raises:
          UserError: the template does not mark turns by such tokens.
        """
        return self._role_tokens.role_ids

    @property
    def end_of_turn_id(self) -> int:
        """Id of the token that ends every turn; `role_ids` says when there is one."""
        return self._role_tokens.end_of_turn

    def end_also_with(self, ids: Iterable[int]) -> None:
        """Adds tokens that end an assistant's turn, where a model was trained to write others than the template's."""
        self.end_ids = tuple(dict.fromkeys((*self.end_ids, *ids)))
        self.suppressed_ids = tuple(token for token in self.suppressed_ids if token not in self.end_ids)

    def save(self, directory: str | Path) -> None:
        """Writes a directory that `load`, `transformers.AutoTokenizer` and its chat template understand."""
        named = self._named_tokens
        tokenizer_files.write(
            directory,
            TokenizerFiles(self._backend, named, self._template.source, self.template),
            control_tokens=[token for token in self._special if token not in named.values()],
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that decides ids: equal fingerprints mean equal ids for every dialogue."""
        content = [self._backend.to_str(), self.template, self._template.source, sorted(self._named_tokens.items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def __getstate__(self) -> tuple[str, TemplateName, dict[str, str], str, int]:
        source = self._template.source if self.template == "chat_template" else ""
        return self._backend.to_str(), self.template, self._named_tokens, source, self.base_vocab_size

    def __setstate__(self, state: tuple[str, TemplateName, dict[str, str], str, int]) -> None:
        # Not the backend itself: it forgets when pickled that special tokens in the input are text.
        backend, template, named, source, base_vocab_size = state
        self.__init__(
            tokenizers.Tokenizer.from_str(backend), template=template, named_tokens=named, chat_template=source or None
        )
        self.base_vocab_size = base_vocab_size

    def encode_text(self, text: str) -> np.ndarray:
        """int32[n] ids of plain text; never a control token, whatever the text spells."""
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, np.int32)

    def encode(self, dialogue: Dialogue, reply_bytes: int | None = None) -> EncodedDialogue:
        """Applies the template to one dialogue.

        Args:
          dialogue: the dialogue, cleaned.
          reply_bytes: bytes of the replies before cleaning; absent: those of `dialogue` itself.

        Raises:
          UserError: the chat template refuses the roles of the turns.
        """
        reply_bytes = count_reply_bytes(dialogue) if reply_bytes is None else reply_bytes
        return next(self.encode_all([(dialogue, reply_bytes)]))

    def encode_all(self, dialogues: Iterable[tuple[Dialogue, int]]) -> Iterator[EncodedDialogue]:
        """Like `encode` for many `(dialogue, reply bytes before cleaning)`, in order, on all cores."""
        iterator = iter(dialogues)
        while chunk := list(itertools.islice(iterator, _ENCODE_CHUNK)):
            laid_out = [self._laid_out(dialogue.turns, prompt=False) for dialogue, _ in chunk]
            for (dialogue, reply_bytes), ids in zip(chunk, self._assemble(laid_out, self._encode_many), strict=True):
                ids.mask[0] = 0
                yield EncodedDialogue(
                    dialogue.id, ids.tokens, ids.mask, reply_bytes, ids.system_length, ids.unknown_bytes
                )

    def encode_reply(self, text: str) -> np.ndarray:
        """int32[n] ids of a reply and its end token, as they continue a prompt."""
        return self._assemble([(Layout.of(self._template.reply), (text,))])[0].tokens

    def encode_prompt(self, dialogue: Dialogue, max_tokens: int, reply_prefix: str = "") -> Prompt:
        """The context to answer, up to the beginning of the reply; see `prompts.fit` for what is left out.

        Args:
          dialogue: the turns so far.
          max_tokens: upper bound on the prompt's length.
          reply_prefix: how the reply begins.

        Raises:
          UserError: there is no room, or the chat template refuses the roles of the turns.
        """

        def encode(turns: Sequence[Turn]) -> list[int]:
            layout, contents = self._laid_out(turns, prompt=True)
            if reply_prefix:
                begun = self._template.reply[: self._content_of_reply + 1]
                moved = [
                    part._replace(turn=len(turns), right="") if isinstance(part, Content) else part for part in begun
                ]
                layout, contents = Layout.of([*layout.parts, *moved]), (*contents, reply_prefix)
            return self._assemble([(layout, contents)])[0].tokens.tolist()

        return prompts.fit(dialogue.turns, max_tokens, encode, starts_anywhere=self._template.starts_anywhere)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids`; control tokens are skipped, bytes that are not UTF-8 become U+FFFD."""
        return self.decode_batch([ids])[0]

    def decode_batch(self, batch: Iterable[Sequence[int] | np.ndarray]) -> list[str]:
        """`decode` of every row."""
        texts = self._backend.decode_batch([self._without_control(ids) for ids in batch], skip_special_tokens=True)
        if isinstance(self._backend.model, models.WordPiece):
            # BERT's decoder puts a space between any two words, and every Chinese character is one.
            return [_SPACE_AT_CHINESE.sub("", text) for text in texts]
        return texts

    def spell(self, ids: Sequence[int] | np.ndarray) -> str:
        """`ids` as text for people, control tokens spelled out."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=False)

    @functools.cached_property
    def _content_of_reply(self) -> int:
        return next(place for place, part in enumerate(self._template.reply) if isinstance(part, Content))

    @property
    def _role_tokens(self) -> RoleTokens:
        if not isinstance(self._template, RoleTokens):
            raise UserError(
                f"tokenizer.template {self.template}: its turns have no tokens that tell one from the next, which "
                "train.raw_roles alternate and train.backward_fraction go by; use tokenizer.template role_tokens"
            )
        return self._template

    def _direction_id(self, token: str) -> int | None:
        known = self.template == "role_tokens" and token in self._special
        return self._special[token].id if known else None

    def _without_control(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        return [token for token in map(int, ids) if token not in self._control_ids]

    def _laid_out(self, turns: Sequence[Turn], *, prompt: bool) -> tuple[Layout, tuple[str, ...]]:
        layout = self._layout(tuple(turn.role for turn in turns), prompt=prompt)
        return layout, tuple(turn.content for turn in turns)

    @functools.cached_property
    def _encode_many(self) -> Encode:
        return word_cache.make_encode(self._backend)

    def _encode_few(self, texts: Sequence[str]) -> list[bytes]:
        return word_cache.encode(self._backend, texts)

    def _assemble(
        self, laid_out: Sequence[tuple[Layout, tuple[str, ...]]], encode: Encode | None = None
    ) -> list[Assembled]:
        encode = encode or self._encode_few
        return assemble(self._backend, laid_out, encode=encode, unknown_id=self._unknown_id, lossless=self._lossless)

    def _make_template(self, end_of_text: str, chat_template: str | None) -> Template:
        opening = _opening(self._backend)
        joined = Joined(
            separator="" if self.template == "end_of_text" else "\n",
            opening=opening,
            end_of_text=self.end_of_text_id,
            opening_token="".join(self._backend.id_to_token(token) or "" for token in opening),
            end_of_text_token=end_of_text,
        )
        if self.template == "role_tokens":
            role_ids = {role: self._special[token].id for role, token in ROLE_TOKENS.items()}
            return RoleTokens(role_ids, self._special[END_OF_TURN].id, self.end_of_text_id, end_of_text)
        if self.template == "chat_template":
            if not chat_template:
                raise UserError("tokenizer.template chat_template: the tokenizer has none; use role_tokens or plain")
            return ChatTemplate(
                chat_template,
                variables=self._named_tokens,
                special_tokens=self._special,
                end_of_text=self.end_of_text_id,
                raw=joined,
            )
        return joined

    def _check_text_is_text(self, writes_unknown: int | None) -> None:
        """Refuses a vocabulary that makes control tokens of text, but for `writes_unknown` where it has no other."""
        forbidden = self._control_ids
        if not self._lossless and writes_unknown is not None:
            if writes_unknown == self.end_of_text_id:
                raise UserError(
                    "this tokenizer reads text that it cannot express as its end of text; choose another tokenizer"
                )
            forbidden = forbidden - {writes_unknown}
        for token in self._special:
            if not forbidden.isdisjoint(self._backend.encode(token, add_special_tokens=False).ids):
                raise UserError(f"this tokenizer reads the text {token!r} as a control token; choose another tokenizer")

    def _check_chat_template(self, template: ChatTemplate) -> None:
        """Compares our reading of a chat template with its own text, read as other tools read it."""
        contents = ("Hi there! Is it 12 o'clock?", "Yes, it's noon.", "Thanks")
        for roles, prompt in (("user", "assistant"), False), (("user", "assistant", "user"), True):
            text = template.render(roles, contents[: len(roles)], prompt=prompt)
            self._backend.encode_special_tokens = False
            expected = self._backend.encode(text, add_special_tokens=False).ids
            self._backend.encode_special_tokens = True
            tokens = self._assemble([(self._layout(roles, prompt=prompt), contents)])[0].tokens.tolist()
            if tokens[: len(expected)] != expected:
                raise TemplateError("gives other tokens when it is read in pieces, or changes what turns say")


def _vocab_size(backend: tokenizers.Tokenizer) -> int:
    return 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)


def _add_control_tokens(backend: tokenizers.Tokenizer, spellings: Iterable[str]) -> None:
    """Makes these texts special tokens; those that are one already keep their id and how they treat spaces."""
    present = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens(
        [
            tokenizers.AddedToken(
                text,
                lstrip=text in present and present[text].lstrip,
                rstrip=text in present and present[text].rstrip,
                normalized=False,
                special=True,
            )
            for text in dict.fromkeys(spellings)
        ]
    )


def _markers(backend: tokenizers.Tokenizer, chat_template: str) -> list[str]:
    """The added tokens that a chat template writes: control tokens, even where the tokenizer does not say so."""
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    return [token for token in added if not token.isspace() and token in chat_template]


def _opening(backend: tokenizers.Tokenizer) -> tuple[int, ...]:
    """What the tokenizer itself puts before a text, such as BERT's [CLS]; for GPT-2 nothing."""
    alone = backend.encode("a", add_special_tokens=False).ids
    dressed = backend.encode("a").ids
    start = next((i for i in range(len(dressed)) if dressed[i : i + len(alone)] == alone), 0)
    return tuple(dressed[:start])


def _template_name(name: str | None) -> TemplateName | None:
    return cast(TemplateName, name) if name in get_args(TemplateName) else None


def _recorded(files: TokenizerFiles) -> TemplateName | None:
    """The template that a tokenizer was made for, where its files say so."""
    if name := _template_name(files.template):
        return name
    vocabulary = files.backend.get_vocab(with_added_tokens=True)
    if {*ROLE_TOKENS.values(), END_OF_TURN} <= vocabulary.keys():
        return "role_tokens"
    return "chat_template" if files.chat_template else None
