"""The plan of a run: everything that follows from the configuration and the data before a device is touched."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from ssl_jax.config import Config
from ssl_jax.data.streams import Phase
from ssl_jax.errors import UserError
from ssl_jax.model import GPT2

DEFAULT_STEPS = 1000

# Dense bfloat16 peaks by `jax.Device.device_kind`, FLOP/s (vendors' data sheets).
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Steps, rows and rounds of a run.

    Attributes:
      total_steps: optimizer steps.
      labeled_rows: rows of the labeled stream in a step's global batch.
      unlabeled_rows: rows of all unlabeled streams together.
      pseudo_rows: how many of them are pseudo-labeled once a round has accepted something.
      round_steps: steps before which a pseudo-labeling round happens.
      labeled_only_from: step from which all rows are labeled.
      has_raw: whether there is raw text.
    """

    total_steps: int
    labeled_rows: int
    unlabeled_rows: int
    pseudo_rows: int
    round_steps: tuple[int, ...]
    labeled_only_from: int
    has_raw: bool

    @property
    def rows(self) -> int:
        """Rows of a step's global batch."""
        return self.labeled_rows + self.unlabeled_rows

    def rows_at(self, step: int, accepted: Sequence[int]) -> tuple[tuple[str, int], ...]:
        """Rows of every stream at `step`; `accepted` counts the pseudo-labels of each round held so far."""
        held = sum(at <= step for at in self.round_steps)
        # A round that is yet to come is counted on; one that accepted nothing leaves its rows to the other streams.
        has_pseudo = any(count > 0 for count in (*accepted[:held], *(1,) * max(0, held - len(accepted))))
        pseudo = self.pseudo_rows if has_pseudo else 0
        raw = self.unlabeled_rows - pseudo if self.has_raw else 0
        if step >= self.labeled_only_from:
            pseudo = raw = 0
        rows = {"labeled": self.rows - raw - pseudo, "raw": raw, "pseudo": pseudo}
        return tuple((name, count) for name, count in rows.items() if count)

    def phases(self, accepted: Sequence[int] = ()) -> list[Phase]:
        """The run as phases of constant rows."""
        edges = sorted({0, *self.round_steps, self.labeled_only_from, self.total_steps})
        phases = []
        next_row = {"labeled": 0, "raw": 0, "pseudo": 0}
        for start, stop in itertools.pairwise(edges):
            rows = self.rows_at(start, accepted)
            phases.append(Phase(start, stop, rows, next_row))
            next_row = phases[-1].drawn_before(stop)
        return phases


def make_plan(config: Config, records: Mapping[str, int], labeled_rows_per_epoch: int, row_shards: int) -> Plan:
    """Resolves epochs, ratios and fractions to steps and rows.

    Args:
      config: the configuration.
      records: dialogues per split of the prepared data.
      labeled_rows_per_epoch: packed rows of an epoch of the labeled stream, weights of sources counted.
      row_shards: devices that see different rows.

    Raises:
      UserError: a stream that the configuration asks for has no data, or rows do not divide.
    """
    has_raw, has_prompts = records.get("raw_train", 0) > 0, records.get("prompt_train", 0) > 0
    train, rounds = config.train, config.pseudo_labels.rounds
    labeled_rows = train.per_device_train_batch_size * row_shards
    unlabeled_rows = round(labeled_rows * train.unlabeled_ratio)
    no_rounds = "or set --pseudo-labels.rounds []"
    if rounds and not has_prompts:
        raise UserError(
            "pseudo_labels.rounds: the data has no prompts to answer; add a source of prompts to data.unlabeled "
            + no_rounds
        )
    if train.unlabeled_ratio and not unlabeled_rows:
        raise UserError(
            f"train.unlabeled_ratio {train.unlabeled_ratio:g} of {labeled_rows} labeled rows rounds to no unlabeled "
            "rows; raise it or set it to 0"
        )
    pseudo_rows = 0
    if rounds:
        pseudo_rows = round(unlabeled_rows * train.pseudo_label_fraction) if has_raw else unlabeled_rows
        if not pseudo_rows:
            raise UserError(
                f"pseudo_labels.rounds: train.unlabeled_ratio {train.unlabeled_ratio:g} and "
                f"train.pseudo_label_fraction {train.pseudo_label_fraction:g} leave no rows for pseudo-labels; raise "
                f"them {no_rounds}"
            )
    if unlabeled_rows and not has_raw and not rounds:
        found = "prompts but no raw text" if has_prompts else "no unlabeled dialogues"
        advice = "set --pseudo-labels.rounds 0.5" if has_prompts else "add a source to data.unlabeled"
        raise UserError(
            f"train.unlabeled_ratio is {train.unlabeled_ratio:g}, but the data has {found} to learn from; {advice} "
            "or set --train.unlabeled-ratio 0"
        )
    rows = labeled_rows + unlabeled_rows
    if rows % row_shards:
        raise UserError(
            f"train.per_device_train_batch_size and train.unlabeled_ratio give {rows} rows a step, which do not "
            f"divide over {row_shards} devices"
        )
    if rows // row_shards % train.gradient_accumulation_steps:
        raise UserError(
            f"train.gradient_accumulation_steps {train.gradient_accumulation_steps} does not divide the "
            f"{rows // row_shards} rows of each device"
        )
    total = train.steps or DEFAULT_STEPS
    if train.num_train_epochs is not None:
        total = max(1, math.ceil(train.num_train_epochs * labeled_rows_per_epoch / labeled_rows))
    labeled_only_from = total - round(train.labeled_only_fraction * total)
    round_steps = tuple(max(1, round(at * total)) for at in rounds)
    if len(set(round_steps)) < len(round_steps):
        raise UserError(f"pseudo_labels.rounds: {len(rounds)} rounds do not fit into {total} steps")
    if round_steps and round_steps[-1] >= labeled_only_from:
        raise UserError(
            f"pseudo_labels.rounds: the round at step {round_steps[-1]} would teach nothing, since from step "
            f"{labeled_only_from} on only labeled dialogues are used (train.labeled_only_fraction)"
        )
    return Plan(
        total_steps=total,
        labeled_rows=labeled_rows,
        unlabeled_rows=unlabeled_rows,
        pseudo_rows=pseudo_rows,
        round_steps=round_steps,
        labeled_only_from=labeled_only_from,
        has_raw=has_raw,
    )


def parameter_count(shape: GPT2) -> int:
    """Parameters as Hugging Face counts them: a tied output embedding once, no vocabulary padding."""
    width, inner = shape.n_embd, shape.n_inner
    block = 4 * width * width + 2 * width * inner + 9 * width + inner
    rows = shape.vocab_size * (1 if shape.tie_word_embeddings else 2) + shape.n_positions
    return rows * width + shape.n_layer * block + 2 * width


def flops_per_token(shape: GPT2, sequence_length: int) -> int:
    """Floating-point operations of training one token: 6 N + 6 L D T, causal attention counted (as llm.c counts).

    N holds one vocabulary: that of the output. The table of an untied input is only looked up.
    """
    multiplied = parameter_count(dataclasses.replace(shape, tie_word_embeddings=True))
    return 6 * multiplied + 6 * shape.n_layer * shape.n_embd * sequence_length


def device_peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 peak of a device, FLOP/s, or None where it is not known (a CPU)."""
    matches = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None
