"""A tokenizer's own chat template, read as a layout: any Jinja template that writes contents as they are.

The template is rendered by `template_renderer`, with stand-ins for the contents. Where these come out is where
contents go, and control tokens are looked for in the rest only. A template that does more with a content than strip it,
or that puts no control token between two of them, is refused.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ssl_jax.data import template_renderer
from ssl_jax.data.templates import Content, Control, Layout, Part, Template, Text, kind_of
from ssl_jax.errors import UserError

# What templates change in a text (case, quotes, markup, lines, runs of spaces) is in every stand-in, so that a change
# cannot go unseen. The private characters at both ends keep stand-ins apart, and `strip` away from what is inside.
_STAND_IN = "\ue000{}\ue001 aZ é \"'\\<&>\n\t  {{}} ~\ue002"
_STAND_IN_FOUND = re.compile(re.escape(_STAND_IN.format("N")).replace("N", "([0-9]+)"))
# Stripped only by templates that strip all whitespace; no template writes it.
_ANY_SPACE = "\u2003"
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TemplateError(UserError):
    """The chat template cannot be used for these roles."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"the tokenizer's chat template {problem}; use another form, for example tokenizer.template role_tokens"
        )


class ChatTemplate:
    """A `Template` that a Jinja template decides.

    The loss is on the assistant's contents, each up to and with the first control token behind it. Where the template
    marks what the assistant says (`{% generation %}`), it is on exactly that.

    Args:
      source: the Jinja template.
      variables: the named tokens that it may write (`bos_token`, …).
      special_tokens: all control tokens, by their spelling.
      end_of_text: closes a dialogue whose last reply the template leaves open.
      raw: the form of dialogues without roles.

    Raises:
      UserError: the template cannot be read, or does not show a user's turn and its answer as they are.
    """

    def __init__(
        self,
        source: str,
        *,
        variables: Mapping[str, str],
        special_tokens: Mapping[str, Control],
        end_of_text: int,
        raw: Template,
    ) -> None:
        self.source = source
        self._variables: dict[str, Any] = dict(variables)
        self._special_tokens = special_tokens
        self._end_of_text = end_of_text
        self._raw = raw
        self._has_blocks = bool(_GENERATION_BLOCK.search(source))
        spellings = sorted((re.escape(token) for token in special_tokens), key=len, reverse=True)
        self._control = re.compile(f"({'|'.join(spellings) or '(?!)'})")
        opening, self._prompt_extra, self._reply_text = self._opening_of_replies()
        # Without a text before it, a reply needs some token to be predicted from.
        self.header: tuple[Part, ...] = (*self._split(opening + self._prompt_extra),) or (Control(end_of_text),)
        self.reply: tuple[Part, ...] = self._reply_parts()
        try:
            self.layout(("assistant", "user"), prompt=True)
            self.starts_anywhere = True
        except TemplateError:
            self.starts_anywhere = False

    def layout(self, roles: tuple[str, ...], *, prompt: bool) -> Layout:
        """As in `Template`."""
        if kind_of(roles) == "raw":
            return self._raw.layout(roles, prompt=prompt)
        parts = self._parts(roles, prompt=prompt)
        return Layout.of(parts, _system_parts(parts) if roles[0] == "system" else 0)

    def render(self, roles: Sequence[str], contents: Sequence[str], *, prompt: bool) -> str:
        """The text that the template makes of a dialogue.

        Raises:
          UserError: it refuses the roles, or fails.
        """
        return self._render(roles, contents, prompt)[0]

    def _render(self, roles: Sequence[str], contents: Sequence[str], prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        """The text, and where in it `{% generation %}` blocks lie."""
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            return template_renderer.render(
                self.source, messages, prompt=prompt, blocks=self._has_blocks, variables=self._variables
            )
        except template_renderer.RenderError as error:
            shown = ", ".join(roles[:4]) + (", …" if len(roles) > 4 else "")
            raise TemplateError(f"refuses turns of the roles {shown} ({error})") from None

    def _opening_of_replies(self) -> tuple[str, str, str]:
        """What opens a reply: what the template adds to a prompt, what we add to it, and what the model has to write.

        Where a complete dialogue opens its replies with more than a prompt ends in, we add what goes up to the last
        control token, since a model must never write one itself.
        """
        (*_, before), _ = self._literals(("user",), prompt=False)
        (*_, prompt), _ = self._literals(("user",), prompt=True)
        (_, between, _), _ = self._literals(("user", "assistant"), prompt=False)
        rest = between[len(prompt) :] if between.startswith(prompt) else ""
        split = max((match.end() for match in self._control.finditer(rest)), default=0)
        return prompt[len(before) :] if prompt.startswith(before) else "", rest[:split], rest[split:]

    def _reply_parts(self) -> tuple[Part, ...]:
        parts = self._parts(("user", "assistant"), prompt=False)
        place, content = next(
            (place, part) for place, part in enumerate(parts) if isinstance(part, Content) and part.turn == 1
        )
        end = next(place for place in range(place, len(parts)) if isinstance(parts[place], Control))
        before = (Text(self._reply_text, True),) if self._reply_text else ()
        opened = self.header[-1]
        left = None if isinstance(opened, Control) and opened.strips_right else content.left
        return *before, content._replace(turn=0, left=left), *parts[place + 1 : end + 1]

    def _literals(self, roles: tuple[str, ...], *, prompt: bool) -> tuple[list[str], list[tuple[int, int]]]:
        """What the template writes before, between and behind the contents, and the blocks in the text with stand-ins.

        Raises:
          UserError: a content is missing, changed, repeated or moved.
        """
        names = [_STAND_IN.format(turn) for turn in range(len(roles))]
        text, blocks = self._render(roles, names, prompt)
        return self._around(text, roles), blocks

    def _around(self, text: str, roles: tuple[str, ...]) -> list[str]:
        literals, start = [], 0
        for turn, found in enumerate(itertools.zip_longest(roles, _STAND_IN_FOUND.finditer(text))):
            role, match = found
            if role is None or match is None or int(match[1]) != turn:
                at = min(turn, len(roles) - 1)
                raise TemplateError(f"does not write the content of turn {at + 1} ({roles[at]}) once, unchanged")
            literals.append(text[start : match.start()])
            start = match.end()
        return [*literals, text[start:]]

    def _stripped(self, roles: tuple[str, ...], literals: list[str], prompt: bool) -> list[tuple[str | None, ...]]:
        """For every turn, what the template strips from the left and from the right of its content."""
        found: list[dict[str, list[str]]] = [{"left": [], "right": []} for _ in roles]
        for space, side in itertools.product((_ANY_SPACE, "\n", " ", "\t"), ("left", "right")):
            padded = [
                space + _STAND_IN.format(turn) if side == "left" else _STAND_IN.format(turn) + space
                for turn in range(len(roles))
            ]
            around = self._around(self.render(roles, padded, prompt=prompt), roles)
            for turn, role in enumerate(roles):
                place = turn if side == "left" else turn + 1
                kept = around[place] == (literals[place] + space if side == "left" else space + literals[place])
                if not kept and around[place] != literals[place]:
                    raise TemplateError(f"changes the content of turn {turn + 1} ({role})")
                if not kept:
                    found[turn][side].append(space)
        return [
            tuple(None if _ANY_SPACE in spaces else "".join(spaces) for spaces in (sides["left"], sides["right"]))
            for sides in found
        ]

    def _parts(self, roles: tuple[str, ...], *, prompt: bool) -> list[Part]:
        labeled = kind_of(roles) == "labeled"
        literals, blocks = self._literals(roles, prompt=prompt)
        strips = self._stripped(roles, literals, prompt)
        if prompt:
            literals[-1] += self._prompt_extra
        parts: list[Part] = []
        place, open_reply = 0, False
        for turn, literal in enumerate(literals):
            if turn and not self._control.search(literal) and (turn < len(roles) or prompt):
                raise TemplateError(
                    f"puts no special token behind the content of turn {turn} ({roles[turn - 1]}), so that a text "
                    "could forge the next turn"
                )
            last = turn == len(roles)
            if not labeled:
                parts += self._split(literal)
            elif self._has_blocks:
                parts += self._split_blocks(literal, place, blocks)
            else:
                opens = not last and roles[turn] == "assistant" and literal.endswith(self._reply_text)
                cut = len(literal) - len(self._reply_text) if opens else len(literal)
                parts += self._split(literal[:cut], closes=open_reply) + self._split(literal[cut:], loss=True)
            if last:
                break
            place += len(literal)
            stand_in = place + len(_STAND_IN.format(turn))
            loss = labeled and roles[turn] == "assistant"
            if labeled and self._has_blocks:
                if loss and not _inside(place, stand_in, blocks):
                    raise TemplateError(
                        f"leaves the content of turn {turn + 1} (assistant) out of its generation block"
                    )
                loss = _inside(place, stand_in, blocks)
            parts.append(Content(turn, loss, *strips[turn]))
            place, open_reply = stand_in, loss
        if labeled and not prompt and not self._control.search(literals[-1]):
            parts.append(Control(self._end_of_text, True))
        return parts

    def _split(self, literal: str, *, loss: bool = False, closes: bool = False) -> list[Part]:
        """The texts and control tokens of what the template writes.

        Args:
          literal: what it writes.
          loss: whether all of it is predicted.
          closes: whether it is predicted up to its first control token.
        """
        parts: list[Part] = []
        for number, piece in enumerate(self._control.split(literal)):
            if number % 2:
                parts.append(self._special_tokens[piece]._replace(loss=loss or closes))
                closes = False
            elif piece:
                parts.append(Text(piece, loss or closes))
        return parts

    def _split_blocks(self, literal: str, place: int, blocks: list[tuple[int, int]]) -> list[Part]:
        """The same where generation blocks say what is predicted; `place` is where `literal` starts."""
        parts: list[Part] = []
        edges = {edge - place for block in blocks for edge in block}
        position = 0
        for number, piece in enumerate(self._control.split(literal)):
            end = position + len(piece)
            inner = sorted(edge for edge in edges if position < edge < end) if number % 2 == 0 else []
            for start, stop in itertools.pairwise([position, *inner, end]):
                if start < stop:
                    loss = _inside(place + start, place + start + 1, blocks)
                    parts += self._split(literal[start:stop], loss=loss)
            position = end
        return parts


def _inside(start: int, stop: int, blocks: list[tuple[int, int]]) -> bool:
    return any(block[0] <= start and stop <= block[1] for block in blocks)


def _system_parts(parts: list[Part]) -> int:
    """How many parts show the system turn, which comes first: up to the control token behind it."""
    content = next(place for place, part in enumerate(parts) if isinstance(part, Content))
    end = next((place for place in range(content, len(parts)) if isinstance(parts[place], Control)), len(parts) - 1)
    # A line end between two control tokens belongs to the turn that it follows.
    if end + 2 < len(parts) and isinstance(parts[end + 1], Text) and isinstance(parts[end + 2], Control):
        end += 1
    return end + 1
