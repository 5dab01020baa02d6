"""How a dialogue is laid out for a model: which control tokens and texts stand around the contents of its turns.

A template knows roles only, never contents: it says where each content goes, and there the tokenizer encodes it as
plain text. So no text can forge a control token, under any template. The template that reads a tokenizer's own chat
template is in `chat_template`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from ssl_jax.dialogue import Kind

# What a control token that strips takes along: Unicode's white space, as the tokenizers library has it.
_WHITE_SPACE = "".join(
    map(chr, (*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000))
)


class Control(NamedTuple):
    """A control token.

    Attributes:
      id: of the token.
      loss: whether predicting it counts.
      strips_left: whether it takes the whitespace before it along.
      strips_right: the same behind it.
    """

    id: int
    loss: bool = False
    strips_left: bool = False
    strips_right: bool = False


class Text(NamedTuple):
    """Text that the template writes; `loss` as in `Control`."""

    text: str
    loss: bool = False


class Content(NamedTuple):
    """Where the content of a turn goes.

    Attributes:
      turn: number of the turn.
      loss: whether predicting it counts.
      left: characters that the template strips from its beginning, as `str.lstrip` takes them (None: whitespace).
      right: the same at its end.
    """

    turn: int
    loss: bool = False
    left: str | None = ""
    right: str | None = ""


Part = Control | Text | Content


class Run(NamedTuple):
    """What stands between two control tokens; its text is encoded together.

    Attributes:
      parts: its texts and contents.
      uniform: whether one answer holds for all of it: is it predicted, is it of the system turn.
      loss: whether any of it is predicted.
      system_parts: how many of its parts show the leading system turn.
      strip_left: whether the control token before it takes its leading whitespace.
      strip_right: whether the control token behind it takes its trailing whitespace.
    """

    parts: tuple[Text | Content, ...]
    uniform: bool
    loss: bool
    system_parts: int
    strip_left: bool
    strip_right: bool

    def texts(self, contents: Sequence[str]) -> list[str]:
        """The text of every part."""
        texts = [
            contents[part.turn].lstrip(part.left).rstrip(part.right) if isinstance(part, Content) else part.text
            for part in self.parts
        ]
        if self.strip_left:
            first = next((place for place, text in enumerate(texts) if text.strip(_WHITE_SPACE)), len(texts) - 1)
            texts[: first + 1] = [*[""] * first, texts[first].lstrip(_WHITE_SPACE)]
        if self.strip_right:
            last = next((place for place in reversed(range(len(texts))) if texts[place].strip(_WHITE_SPACE)), 0)
            texts[last:] = [texts[last].rstrip(_WHITE_SPACE), *[""] * (len(texts) - last - 1)]
        return texts


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """The form of a dialogue.

    Attributes:
      parts: in order.
      pieces: the same, in runs.
      system_pieces: how many pieces, from the first, show no more than the leading system turn.
    """

    parts: tuple[Part, ...]
    pieces: tuple[Control | Run, ...]
    system_pieces: int

    @classmethod
    def of(cls, parts: Sequence[Part], system_parts: int = 0) -> Layout:
        """Groups what stands between two control tokens.

        Args:
          parts: in order.
          system_parts: how many of them, from the first, show a leading system turn.
        """
        pieces: list[Control | Run] = []
        system_pieces = start = 0
        while start < len(parts):
            part = parts[start]
            if isinstance(part, Control):
                pieces.append(part)
                start += 1
            else:
                texts = tuple(_before_control(parts[start:]))
                stop = start + len(texts)
                inside = min(max(system_parts - start, 0), len(texts))
                losses = {text.loss for text in texts}
                uniform = len(losses) == 1 and inside in (0, len(texts))
                before = parts[start - 1] if start else None
                behind = parts[stop] if stop < len(parts) else None
                strip_left = isinstance(before, Control) and before.strips_right
                strip_right = isinstance(behind, Control) and behind.strips_left
                pieces.append(Run(texts, uniform, True in losses, inside, strip_left, strip_right))
                start = stop
            if start <= system_parts:
                system_pieces = len(pieces)
        return cls(tuple(parts), tuple(pieces), system_pieces)


class Template(Protocol):
    """What the tokenizer asks of a template."""

    @property
    def source(self) -> str:
        """The Jinja template that renders the same for other tools."""
        ...

    @property
    def reply(self) -> tuple[Part, ...]:
        """How an assistant's turn continues a prompt: its content as turn 0, and its end token, which is last."""
        ...

    @property
    def header(self) -> tuple[Part, ...]:
        """What opens an assistant's turn where nothing was said before."""
        ...

    @property
    def starts_anywhere(self) -> bool:
        """Whether a dialogue may begin with a turn of any role (else: with the user's)."""
        ...

    def layout(self, roles: tuple[str, ...], *, prompt: bool) -> Layout:
        """The layout of a dialogue whose turns have these roles.

        Args:
          roles: of all turns.
          prompt: whether the assistant's turn is opened at the end.

        Raises:
          UserError: the template cannot show these roles.
        """
        ...


def _before_control(parts: Sequence[Part]) -> Iterator[Text | Content]:
    for part in parts:
        if isinstance(part, Control):
            return
        yield part


def kind_of(roles: Sequence[str]) -> Kind:
    """`Dialogue.kind` from the roles of its turns."""
    return "labeled" if roles[-1] == "assistant" else "raw" if roles[-1] == "text" else "prompt"


@dataclasses.dataclass(frozen=True, eq=False)
class RoleTokens:
    """Every turn is `[role] content [end of turn]`; end of text closes a complete dialogue.

    Attributes:
      role_ids: id of the token that opens a turn, by role.
      end_of_turn: the token that ends it.
      end_of_text: the token that ends a dialogue.
      end_of_text_token: how that token is spelled.
    """

    role_ids: dict[str, int]
    end_of_turn: int
    end_of_text: int
    end_of_text_token: str

    starts_anywhere = True

    @property
    def source(self) -> str:
        """As in `Template`."""
        return (
            "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|endofturn|>' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}"
            "{% elif messages[-1]['role'] == 'assistant' %}"
            f"{{{{ {self.end_of_text_token!a} }}}}"
            "{% endif %}"
        )

    @property
    def reply(self) -> tuple[Part, ...]:
        """As in `Template`."""
        return Content(0, True), Control(self.end_of_turn, True)

    @property
    def header(self) -> tuple[Part, ...]:
        """As in `Template`."""
        return (Control(self.role_ids["assistant"]),)

    def layout(self, roles: tuple[str, ...], *, prompt: bool) -> Layout:
        """As in `Template`."""
        kind = kind_of(roles)
        parts: list[Part] = []
        for turn, role in enumerate(roles):
            loss = kind == "raw" or (kind == "labeled" and role == "assistant")
            parts += [Control(self.role_ids[role], kind == "raw"), Content(turn, loss), Control(self.end_of_turn, loss)]
        if prompt:
            parts += self.header
        elif kind != "prompt":
            parts.append(Control(self.end_of_text, kind == "raw"))
        return Layout.of(parts, 3 if roles[0] == "system" else 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Joined:
    """Turns one after the other, their roles not marked: the forms that a plain language model knows.

    With a `separator`, the end of a text ends a complete dialogue only, and a prompt is its text as it is; the reply
    begins with the separator, which the model has to predict. (BERT's vocabularies have no token for a line end: there,
    turns joined by one run together.) Without a separator, the end-of-text token follows every turn: the form of
    DialoGPT (Zhang et al. 2020).

    Attributes:
      separator: text between two turns, or nothing.
      opening: the tokens before every text, such as BERT's [CLS]; mostly none.
      end_of_text: the token that ends a text.
      opening_token: how the opening tokens are spelled.
      end_of_text_token: how the end of a text is spelled.
    """

    separator: str
    opening: tuple[int, ...]
    end_of_text: int
    opening_token: str
    end_of_text_token: str

    starts_anywhere = True

    @property
    def source(self) -> str:
        """As in `Template`."""
        opening = f"{{{{ {self.opening_token!a} }}}}" if self.opening else ""
        end = f"{{{{ {self.end_of_text_token!a} }}}}"
        content = "{% for message in messages %}{{ message['content'] }}"
        if not self.separator:
            return f"{opening}{content}{end}{{% endfor %}}"
        between = f"{{% if not loop.last %}}{{{{ {self.separator!a} }}}}{{% endif %}}{{% endfor %}}"
        last = "{% if not add_generation_prompt and messages[-1]['role'] == 'assistant' %}"
        return f"{opening}{content}{between}{last}{end}{{% endif %}}"

    @property
    def reply(self) -> tuple[Part, ...]:
        """As in `Template`."""
        before = (Text(self.separator, True),) if self.separator else ()
        return *before, Content(0, True), Control(self.end_of_text, True)

    @property
    def header(self) -> tuple[Part, ...]:
        """As in `Template`."""
        return tuple(Control(token) for token in self.opening or (self.end_of_text,))

    def layout(self, roles: tuple[str, ...], *, prompt: bool) -> Layout:
        """As in `Template`."""
        kind = kind_of(roles)
        losses = [kind == "raw" or (kind == "labeled" and role == "assistant") for role in roles]
        parts: list[Part] = [Control(token) for token in self.opening]
        for turn, loss in enumerate(losses):
            if self.separator and turn:
                # It closes the turn before, and opens the reply that continues a prompt.
                parts.append(Text(self.separator, loss or losses[turn - 1]))
            parts.append(Content(turn, loss))
            if not self.separator:
                parts.append(Control(self.end_of_text, loss))
        if self.separator and kind != "prompt" and not prompt:
            parts.append(Control(self.end_of_text, losses[-1]))
        return Layout.of(parts, len(self.opening) + 2 if roles[0] == "system" else 0)
