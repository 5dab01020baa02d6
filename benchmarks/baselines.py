"""Baselines that a neural model has to beat: a byte n-gram for reply_bits_per_byte, TF-IDF for retrieval.

    python benchmarks/baselines.py --config configs/quickstart.yaml --output benchmarks/results/baselines.json

Both are fitted once on the labeled training dialogues and once on those and the unlabeled ones. Neither sees roles, so
where the unlabeled part is complete dialogues the second fit is also the oracle: what all labels would give.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from provenance import provenance
from pydantic import Field

from ssl_jax import command_line
from ssl_jax.config import Config
from ssl_jax.dialogue import Dialogue
from ssl_jax.errors import UserError
from ssl_jax.metrics import frozen_candidates, paired_bootstrap, ranking, words

if TYPE_CHECKING:
    from ssl_jax.data.store import Prepared

# Ends a turn and pads the beginning of a dialogue. UTF-8 never contains this byte, so no text can spell it; a newline,
# the usual choice, may occur within a turn.
END_OF_TURN = 0xFF

ALPHABET = 256
NUM_CANDIDATES = 20
TEST_SPLIT = "labeled_test"

_BYTE = np.uint64(8)

Bytes = NDArray[np.uint8]
Codes = NDArray[np.uint64]
Positions = NDArray[np.int64]


class Options(Config):
    """A run's configuration, of which `data`, `tokenizer` and `evaluation` matter here, and where the result goes."""

    output: str = Field("benchmarks/results/baselines.json", description="File that receives the result as JSON.")


@dataclasses.dataclass(frozen=True, slots=True)
class _Order:
    """The n-grams of one length, as sorted codes, and the two terms of their interpolated probability.

    An n-gram's code holds its bytes, the newest one lowest, so that `code >> _BYTE` is its context.

    Attributes:
      grams: uint64[G].
      discounted: float64[G], the n-gram's discounted count ÷ its context's count.
      contexts: uint64[H].
      backoff: float64[H], the mass that the discounts free for the next shorter length.
    """

    grams: Codes
    discounted: NDArray[np.float64]
    contexts: Codes
    backoff: NDArray[np.float64]

    @classmethod
    def from_counts(cls, grams: Codes, counts: NDArray[np.int64]) -> _Order:
        contexts, starts = np.unique(grams >> _BYTE, return_index=True)
        sizes = np.diff(np.append(starts, len(grams)))
        totals = np.add.reduceat(counts, starts)
        discounts = _discounts(counts)[np.minimum(counts, 3)]
        return cls(
            grams=grams,
            discounted=(counts - discounts) / np.repeat(totals, sizes),
            contexts=contexts,
            backoff=np.add.reduceat(discounts, starts) / totals,
        )

    def interpolate(self, grams: Codes, shorter: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probabilities of the last bytes of `grams`, given those under the next shorter length."""
        return _lookup(self.grams, self.discounted, grams, 0.0) + shorter * _lookup(
            self.contexts, self.backoff, grams >> _BYTE, 1.0
        )


@dataclasses.dataclass(frozen=True, slots=True)
class ByteNgram:
    """A byte n-gram with interpolated modified Kneser-Ney smoothing (Chen and Goodman 1999, section 4.1).

    On chitchat's dev part order 6 gives 1.93 reply bits per byte after all 2,270 training dialogues and 2.34 after
    the first 100; Witten-Bell smoothing gives 2.03 and 2.66.
    """

    orders: tuple[_Order, ...]

    @classmethod
    def fit(cls, dialogues: Iterable[Dialogue], order: int = 6) -> ByteNgram:
        """Counts every turn of the dialogues, whoever speaks.

        Args:
          dialogues: training text, at least one dialogue.
          order: longest n-gram in bytes, 1 to 8.

        Raises:
          ValueError: no dialogues, or an order that does not fit into 64 bits.
        """
        if not 1 <= order <= 8:
            raise ValueError(f"a byte n-gram has order 1 to 8, got {order}")
        rendered = [b"".join(_pieces(dialogue, order)) for dialogue in dialogues]
        if not rendered:
            raise ValueError("a byte n-gram needs at least one dialogue")
        stream = np.frombuffer(b"".join(rendered), np.uint8)
        # Padding is context, never a target.
        is_target = np.ones(len(stream), bool)
        starts = np.cumsum([0, *map(len, rendered[:-1])])
        is_target[(starts[:, None] + np.arange(order - 1)).ravel()] = False

        grams, counts = np.unique(_codes(stream, np.flatnonzero(is_target), order), return_counts=True)
        orders = [_Order.from_counts(grams, counts)]
        for length in range(order - 1, 0, -1):
            # Below the top a count is the number of distinct bytes that come before the n-gram (Kneser-Ney).
            grams, counts = np.unique(grams & _mask(length), return_counts=True)
            orders.append(_Order.from_counts(grams, counts))
        return cls(tuple(reversed(orders)))

    def log2_probabilities(self, stream: Bytes, targets: Positions) -> NDArray[np.float64]:
        """log2 p(byte | bytes before it) at some positions.

        Args:
          stream: uint8[L].
          targets: int64[M], positions in `stream`, none within the first order - 1.
        """
        longest = _codes(stream, targets, len(self.orders))
        probabilities = np.full(len(targets), 1 / ALPHABET)
        for length, order in enumerate(self.orders, start=1):
            probabilities = order.interpolate(longest & _mask(length), probabilities)
        return np.log2(probabilities)

    def reply_bits(self, dialogue: Dialogue) -> float:
        """-Σ log2 p(byte | everything before it) over the bytes and the ends of the assistant's turns.

        Divided by the UTF-8 bytes of those turns, which do not count the ends, it compares to a model's
        reply_bits_per_byte.
        """
        pieces = _pieces(dialogue, len(self.orders))
        stream = np.frombuffer(b"".join(pieces), np.uint8)
        is_reply = np.repeat([False, *(turn.role == "assistant" for turn in dialogue.turns)], list(map(len, pieces)))
        return -float(np.sum(self.log2_probabilities(stream, np.flatnonzero(is_reply))))


class TfIdf:
    """Cosine of TF-IDF vectors of words, with sublinear term frequency (Salton and Buckley 1988).

    A word's weight in a text is (1 + ln count) · (1 + ln((1 + documents) ÷ (1 + documents with the word))).
    """

    def __init__(self, documents: Iterable[str]) -> None:
        """Fits the inverse document frequencies.

        Raises:
          ValueError: no documents.
        """
        document_frequency: Counter[str] = Counter()
        num_documents = 0
        for document in documents:
            document_frequency.update(set(words(document)))
            num_documents += 1
        if not num_documents:
            raise ValueError("TF-IDF needs at least one document")
        self._unknown = 1 + math.log(1 + num_documents)
        self._idf = {word: self._unknown - math.log(1 + count) for word, count in document_frequency.items()}

    def vector(self, text: str) -> dict[str, float]:
        """Weights of the text's words, of unit length; empty for a text without words."""
        weights = {
            word: (1 + math.log(count)) * self._idf.get(word, self._unknown)
            for word, count in Counter(words(text)).items()
        }
        norm = math.hypot(*weights.values())
        return {word: weight / norm for word, weight in weights.items()}

    def score(self, context: str, candidate: str) -> float:
        """Cosine between 0 and 1; 0 where they share no word."""
        return _dot(self.vector(context), self.vector(candidate))

    def scores(self, contexts: Sequence[str], replies: Sequence[str], candidates_NC: Positions) -> NDArray[np.float64]:
        """`score(contexts[n], replies[candidates_NC[n, c]])` for all n and c: float64[N, C]."""

        @functools.cache
        def reply_vector(position: int) -> dict[str, float]:
            return self.vector(replies[position])

        context_vectors = map(self.vector, contexts)
        return np.array(
            [
                [_dot(context_vector, reply_vector(position)) for position in row]
                for context_vector, row in zip(context_vectors, candidates_NC.tolist(), strict=True)
            ]
        )


def measure(
    training: Mapping[str, Sequence[Dialogue]],
    test: Sequence[Dialogue],
    reply_bytes: ArrayLike,
    recall_examples: int,
) -> list[dict[str, Any]]:
    """Fits every baseline on every training set and scores the test dialogues.

    Args:
      training: dialogues by the name of the training set. Gains are against the first one.
      test: T labeled dialogues; every assistant turn counts for bits per byte, the last one is ranked.
      reply_bytes: int[T], UTF-8 bytes of each dialogue's replies before cleaning.
      recall_examples: replies ranked among 20; 0 leaves TF-IDF out.

    Returns:
      One JSON object per system and training set, with `seconds` of fitting and scoring. `gain` is the first training
      set's bits per byte minus this one's, with a bootstrap interval over dialogues.

    Raises:
      UserError: too few distinct replies to rank among 20.
    """
    rows: list[dict[str, Any]] = []
    first_bits = None
    for name, dialogues in training.items():
        start = time.perf_counter()
        ngram = ByteNgram.fit(dialogues)
        bits = np.array([ngram.reply_bits(dialogue) for dialogue in test])
        row = _row(f"byte {len(ngram.orders)}-gram", name, dialogues, start)
        row["reply_bits_per_byte"] = float(bits.sum() / np.sum(reply_bytes))
        if first_bits is None:
            first_bits = bits
        else:
            row["gain"] = dataclasses.asdict(paired_bootstrap(first_bits, reply_bytes, bits, reply_bytes))
        rows.append(row)
    if not recall_examples:
        return rows

    contexts, replies = zip(*map(_last_reply, test), strict=True)
    if len(set(replies)) < NUM_CANDIDATES:
        raise UserError(
            f"{TEST_SPLIT}: ranking among {NUM_CANDIDATES} needs as many distinct replies, found {len(set(replies))}; "
            "hold out more with data.test_size or set evaluation.recall_examples 0"
        )
    examples, candidates_NC = frozen_candidates(replies, min(recall_examples, len(test)), NUM_CANDIDATES)
    for name, dialogues in training.items():
        start = time.perf_counter()
        tf_idf = TfIdf(map(_text, dialogues))
        scores_NC = tf_idf.scores([contexts[example] for example in examples], replies, candidates_NC)
        rows.append(_row("TF-IDF", name, dialogues, start) | {"examples": len(examples)} | ranking(scores_NC))
    return rows


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `measure` as aligned text."""
    lines = [f"{'system':<12}{'trained on':<28}{'dialogues':>10}{'bits/byte':>11}{'R@1/20':>8}{'MRR':>7}{'seconds':>9}"]
    for row in rows:
        bits, recall, mrr = (
            f"{row[key]:.3f}" if key in row else "-"
            for key in ("reply_bits_per_byte", f"recall_at_1_of_{NUM_CANDIDATES}", "mrr")
        )
        lines.append(
            f"{row['system']:<12}{row['trained_on']:<28}{row['training_dialogues']:>10}{bits:>11}{recall:>8}{mrr:>7}"
            f"{row['seconds']:>9.1f}"
        )
        if gain := row.get("gain"):
            lines.append(f"{'':<12}gain {gain['value']:.3f} bits/byte, 95 % {gain['low']:.3f} to {gain['high']:.3f}")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Prepares the data, measures, prints a table and writes the JSON file."""
    options = command_line.parse(
        Options, arguments, program="python benchmarks/baselines.py", summary="Measures baselines on the test part."
    )
    # Preparing imports the data libraries, which `--help` and a mistyped flag should not wait for.
    from ssl_jax.data.pipeline import prepare

    prepared = prepare(options)
    if TEST_SPLIT not in prepared.splits:
        raise UserError(f"data.labeled: no {TEST_SPLIT} part was held out; add dialogues or raise data.test_size")
    encoded = prepared.encoded(TEST_SPLIT)
    tested = range(len(encoded))[: options.evaluation.test_dialogues]
    reply_bytes = np.array([encoded[index].reply_bytes for index in tested])
    test = [prepared.dialogue(TEST_SPLIT, index) for index in tested]
    labeled = _read(prepared, "labeled_train")
    training = {"labeled_train": labeled}
    if "raw_train" in prepared.splits:
        training["labeled_train + raw_train"] = labeled + _read(prepared, "raw_train")

    rows = measure(training, test, reply_bytes, options.evaluation.recall_examples)
    print(format_table(rows))
    result = {
        "split": TEST_SPLIT,
        "dialogues": len(test),
        "reply_bytes": int(reply_bytes.sum()),
        "rows": rows,
        "provenance": provenance(),
    }
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {output}")


def _read(prepared: Prepared, split: str) -> list[Dialogue]:
    return [prepared.dialogue(split, index) for index in range(len(prepared.lengths(split)))]


def _row(system: str, trained_on: str, dialogues: Sequence[Dialogue], start: float) -> dict[str, Any]:
    return {
        "system": system,
        "trained_on": trained_on,
        "training_dialogues": len(dialogues),
        "seconds": round(time.perf_counter() - start, 2),
    }


def _dot(left: Mapping[str, float], right: Mapping[str, float]) -> float:
    # fsum does not depend on the order of the words, so the cosine is symmetric to the last bit.
    return math.fsum(weight * left[word] for word, weight in right.items() if word in left)


def _text(dialogue: Dialogue) -> str:
    return "\n".join(turn.content for turn in dialogue.turns)


def _last_reply(dialogue: Dialogue) -> tuple[str, str]:
    """All turns before the last one, joined, and the last one."""
    return "\n".join(turn.content for turn in dialogue.turns[:-1]), dialogue.turns[-1].content


def _pieces(dialogue: Dialogue, order: int) -> list[bytes]:
    """The padding before the first turn, then every turn with its end."""
    end = bytes([END_OF_TURN])
    return [end * (order - 1), *(turn.content.encode() + end for turn in dialogue.turns)]


def _codes(stream: Bytes, targets: Positions, order: int) -> Codes:
    """The `order` bytes that end at each target, packed with the target lowest: uint64[M]."""
    codes = np.zeros(len(targets), np.uint64)
    for back in range(order):
        codes |= stream[targets - back].astype(np.uint64) << 8 * back
    return codes


def _mask(length: int) -> np.uint64:
    """Keeps the newest `length` bytes of a code."""
    return np.uint64((1 << 8 * length) - 1)


def _discounts(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """What is taken from n-grams seen 0, 1, 2 and at least 3 times: float64[4] (Chen and Goodman 1999, eq. 17)."""
    once, twice, thrice, four_times = (int(np.sum(counts == count)) for count in (1, 2, 3, 4))
    if once and twice and thrice:
        share = once / (once + 2 * twice)
        estimate = np.array(
            [0, 1 - 2 * share * twice / once, 2 - 3 * share * thrice / twice, 3 - 4 * share * four_times / thrice]
        )
        if np.all(estimate >= 0):
            return estimate
    # Few or oddly distributed n-grams, as single bytes are, have no estimate; any values below the counts are valid.
    return np.array([0, 0.5, 1, 1.5])


def _lookup(keys: Codes, values: NDArray[np.float64], queries: Codes, missing: float) -> NDArray[np.float64]:
    """`values` where `keys`, which are sorted, hold the query, else `missing`."""
    found_at = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[found_at] == queries, values[found_at], missing)


if __name__ == "__main__":
    command_line.run(main)
