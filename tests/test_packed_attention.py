"""No token attends across dialogues: packed batches as training reads them, through the model.

Axes: B rows, T places of a row, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import model
from ssl_jax.data.streams import Batches, PackedStream, Phase
from ssl_jax.data.tokenizer import DialogueTokenizer, EncodedDialogue
from ssl_jax.dialogue import Dialogue, Turn

LENGTH, OVERLAP = 64, 8
WORDS = (
    "hi",
    "yes",
    "no",
    "what",
    "do you",
    "like",
    "tea",
    "the cat",
    "runs home",
    "maybe",
    "it is cold",
    "tonight",
    "good",
)


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a row holds of one dialogue."""

    row: int
    places: np.ndarray


def chats(number: int) -> list[Dialogue]:
    """Chats of short turns, every third of them behind instructions: most fit into a row, some need several."""
    rng = np.random.default_rng(0)

    def turn(role: Any) -> Turn:
        return Turn(role, " ".join(rng.choice(WORDS, rng.integers(1, 8))))

    return [
        Dialogue(
            (
                *([turn("system")] if index % 3 == 0 else []),
                *(turn(role) for _ in range(rng.choice([1, 1, 2, 6])) for role in ("user", "assistant")),
            ),
            id=str(index),
        )
        for index in range(number)
    ]


@pytest.fixture(scope="module")
def dialogues() -> list[EncodedDialogue]:
    texts = chats(24)
    tokenizer = DialogueTokenizer.fit([turn.content for dialogue in texts for turn in dialogue.turns], 320)
    return [tokenizer.encode(dialogue) for dialogue in texts]


@pytest.fixture(scope="module")
def batch(dialogues: list[EncodedDialogue]) -> dict[str, np.ndarray]:
    """An epoch in which every dialogue comes four times, so that some stand beside their own copies."""
    packed = PackedStream(
        dialogues,
        np.array([len(dialogue.tokens) for dialogue in dialogues]),
        prefix_lengths=np.array([dialogue.prefix_length for dialogue in dialogues]),
        weights=np.full(len(dialogues), 4.0),
        sequence_length=LENGTH,
        overlap=OVERLAP,
        seed=0,
    )
    phase = Phase(0, 1, (("labeled", packed.rows_in_epoch(0)),), {"labeled": 0})
    return Batches(phase, {"labeled": packed}, {"labeled": 0}, sequence_length=LENGTH)[0]


@pytest.fixture(scope="module")
def logits() -> Any:
    """Logits `[B, T, V]` of a batch under a model none of whose parameters is 0 or 1."""
    shape = model.GPT2(320, 320, LENGTH, 16, 2, 2, 24)
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(functools.partial(model.init, shape), jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.1, 0.2, leaf.shape), leaf.dtype), shapes)
    embedding_VD = model.output_embedding(params, shape.dtype)

    @jax.jit
    def compute(tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        return model.forward(shape, params, tokens_BT, positions_BT, segment_ids_BT) @ embedding_VD.T

    return lambda batch: np.asarray(compute(batch["tokens"], batch["positions"], batch["segment_ids"]))


def pieces(batch: dict[str, np.ndarray]) -> Iterator[Piece]:
    for row, segment_ids in enumerate(batch["segment_ids"]):
        for segment in range(1, segment_ids.max() + 1):
            yield Piece(row, np.flatnonzero(segment_ids == segment))


def is_later_window(tokens: np.ndarray, dialogue: EncodedDialogue) -> bool:
    """Whether tokens are the system turn of a dialogue and, behind it, a stretch from its middle."""
    prefix, size = dialogue.prefix_length, len(tokens) - dialogue.prefix_length
    starts = range(prefix + 1, len(dialogue.tokens) - size)
    return np.array_equal(tokens[:prefix], dialogue.tokens[:prefix]) and any(
        np.array_equal(tokens[prefix:], dialogue.tokens[start : start + size]) for start in starts
    )


def test_the_batch_has_what_the_other_tests_are_about(
    batch: dict[str, np.ndarray], dialogues: list[EncodedDialogue]
) -> None:
    """Rows of several dialogues, copies in one row, and later windows with and without a system turn."""
    whole = {dialogue.tokens[:-1].tobytes() for dialogue in dialogues}
    whole_ones, later, later_with_system_turn, copies = 0, 0, 0, 0
    texts: list[set[bytes]] = [set() for _ in batch["tokens"]]
    for piece in pieces(batch):
        tokens = batch["tokens"][piece.row, piece.places]
        copies += tokens.tobytes() in texts[piece.row]
        texts[piece.row].add(tokens.tobytes())
        whole_ones += tokens.tobytes() in whole
        owners = [dialogue for dialogue in dialogues if len(tokens) > 20 and is_later_window(tokens, dialogue)]
        later += any(not dialogue.prefix_length for dialogue in owners)
        later_with_system_turn += any(dialogue.prefix_length > 0 for dialogue in owners)
    assert min(whole_ones, later, later_with_system_turn, copies) >= 5
    assert (batch["segment_ids"].max(axis=1) > 1).sum() > 20


def test_every_dialogue_and_window_of_a_row_gives_what_it_gives_alone(batch: dict[str, np.ndarray], logits) -> None:
    together = logits(batch)
    found = list(pieces(batch))
    alone = {name: np.zeros((len(found), LENGTH), np.int32) for name in ("tokens", "positions", "segment_ids")}
    for number, piece in enumerate(found):
        size = len(piece.places)
        alone["tokens"][number, :size] = batch["tokens"][piece.row, piece.places]
        alone["positions"][number, :size] = np.arange(size)
        alone["segment_ids"][number, :size] = 1
    logits_alone = logits(alone)
    for number, piece in enumerate(found):
        np.testing.assert_allclose(
            together[piece.row, piece.places], logits_alone[number, : len(piece.places)], rtol=1e-5, atol=1e-5
        )


def test_changing_a_dialogue_changes_no_other_one_in_any_bit(batch: dict[str, np.ndarray], logits) -> None:
    """Every token of the first, second, … dialogue of each row is another one; padding too."""
    before = logits(batch)
    for segment in range(batch["segment_ids"].max() + 1):
        changed_BT = batch["segment_ids"] == segment
        assert changed_BT.any()
        after = logits({**batch, "tokens": np.where(changed_BT, (batch["tokens"] + 7) % 320, batch["tokens"])})
        assert np.array_equal(np.any(before != after, axis=-1), changed_BT)
