"""What a module for a data set inside a Python package offers, and the forms that labeled dialogues can be reduced to.

Such a module knows where the package keeps its files and what the conversations in them look like; budgets of labels,
and what is left for the unlabeled sources, are its concern because only it sees all sources of the data set at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

from ssl_jax.config import Source
from ssl_jax.data.formats import Expected, Rejected
from ssl_jax.dialogue import Dialogue, Turn

Part = Literal["train", "dev", "test", "test_seen"]


@dataclasses.dataclass(frozen=True)
class ResolvedSource:
    """A source, checked, and the files whose bytes decide what it yields."""

    expected: Expected
    source: Source
    files: tuple[Path, ...]

    @property
    def name(self) -> str:
        """What people and `metadata["source"]` call it."""
        source = self.source
        details = [*source.language, source.subset, source.regime]
        if source.tfds or source.huggingface:
            details.append(source.split or "train")
        return ":".join([self.place, *(detail for detail in details if detail)])

    @property
    def place(self) -> str:
        """What the configuration names: files, or a data set."""
        place = self.source.path or self.source.dataset or self.source.tfds or self.source.huggingface
        assert place, "the configuration has one of them"
        return place


class Packaged(Protocol):
    """A packaged data set; a module with these names is one."""

    @property
    def UNLABELED_REGIMES(self) -> tuple[str, ...]:
        """The values of `regime` that an unlabeled source may have."""
        ...

    def data_files(self, source: Source) -> list[Path]:
        """The files that `source` reads.

        Raises:
          UserError: the package is not installed, or the source asks for what it does not have.
        """
        ...

    def dialogues(
        self, sources: Sequence[ResolvedSource]
    ) -> Iterator[tuple[ResolvedSource, Part | None, Dialogue | Rejected]]:
        """What all sources of the data set yield, the labeled ones first.

        Yields:
          The source, the part of the data set's own split (None: it has no split of its own, or the source is
          unlabeled), and a dialogue or what cannot be one.
        """
        ...


def without_roles(dialogue: Dialogue) -> Dialogue:
    """The complete dialogue as raw text: nobody is marked as a speaker."""
    return dataclasses.replace(dialogue, turns=tuple(Turn("text", turn.content) for turn in dialogue.turns))


def user_turns(dialogue: Dialogue) -> Iterator[Dialogue]:
    """Every turn of the user alone, as a prompt."""
    for number, turn in enumerate(dialogue.turns):
        if turn.role == "user":
            yield dataclasses.replace(dialogue, turns=(turn,), id=f"{dialogue.id}/prompt/{number}")
