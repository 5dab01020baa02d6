"""The record that flows through the whole program: a dialogue and its turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

Role = Literal["system", "user", "assistant", "text"]
Kind = Literal["labeled", "prompt", "raw"]

ROLES: tuple[str, ...] = get_args(Role)


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """One contribution to a dialogue.

    `role` is "text" where nobody said who speaks: a line of an unlabeled log, a paragraph.
    """

    role: Role
    content: str


@dataclasses.dataclass(frozen=True, slots=True)
class Dialogue:
    """An immutable conversation.

    Attributes:
      turns: in order of time; never empty.
      id: unique within a prepared data set.
      metadata: everything else the source knew (speaker, time, rating, …), as JSON values.
    """

    turns: tuple[Turn, ...]
    id: str = ""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.turns:
            raise ValueError("a dialogue needs at least one turn")
        roles = {turn.role for turn in self.turns}
        if unknown := roles.difference(ROLES):
            raise ValueError(f"unknown role {sorted(unknown)[0]!r}; expected one of {', '.join(ROLES)}")
        if "text" in roles and len(roles) > 1:
            raise ValueError("a dialogue marks the speaker of every turn or of none")

    @property
    def kind(self) -> Kind:
        """`labeled` ends in a reply, `prompt` waits for one, `raw` does not say who speaks."""
        match self.turns[-1].role:
            case "assistant":
                return "labeled"
            case "text":
                return "raw"
            case _:
                return "prompt"

    def to_messages(self) -> list[dict[str, str]]:
        """The turns in the message form of chat APIs: `[{"role": …, "content": …}, …]`."""
        return [{"role": turn.role, "content": turn.content} for turn in self.turns]

    @classmethod
    def from_messages(
        cls, messages: Sequence[Mapping[str, Any]], id: str = "", metadata: Mapping[str, Any] | None = None
    ) -> Dialogue:
        """Builds a dialogue from chat messages.

        Raises:
          ValueError: a message lacks `role` or `content`, has an unknown role or content that is not text; the
            message says which.
        """
        turns = []
        for position, message in enumerate(messages):
            if not isinstance(message, Mapping):
                raise ValueError(f"message {position} is not an object with role and content")
            role, content = message.get("role"), message.get("content")
            if role not in ROLES:
                raise ValueError(f"message {position} has role {role!r}; expected one of system, user, assistant")
            if not isinstance(content, str):
                raise ValueError(f"message {position} ({role}) has no text in 'content'")
            turns.append(Turn(role, content))
        return cls(tuple(turns), id=id, metadata=metadata or {})
