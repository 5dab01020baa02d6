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
from ssl_jax.objectives import STREAM_IDS

DEFAULT_STEPS = 1000

_NO_ROUNDS = "or set --pseudo-labels.rounds []"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Steps, rows and rounds of a run.

    Attributes:
      total_steps: optimizer steps.
      labeled_rows: rows of the labeled stream in a step's global batch.
      unlabeled_rows: rows of all other streams together.
      pseudo_rows: how many of them are pseudo-labeled replies once a round has accepted some.
      translated_rows: how many of them are replies behind made-up contexts once a round has accepted some.
      backward_rows: how many of them are read backwards.
      round_steps: steps before which a pseudo-labeling round happens.
      pretrain_until: step up to which all rows are raw text.
      labeled_only_from: step from which all rows are labeled.
      has_raw: whether there is raw text.
      taught: streams whose rows a teacher labels; these rows are the last of a batch.
      born: steps from which a new student learns, those of rounds.
    """

    total_steps: int
    labeled_rows: int
    unlabeled_rows: int
    pseudo_rows: int
    translated_rows: int
    backward_rows: int
    round_steps: tuple[int, ...]
    pretrain_until: int
    labeled_only_from: int
    has_raw: bool
    taught: tuple[str, ...] = ()
    born: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of a step's global batch."""
        return self.labeled_rows + self.unlabeled_rows

    @property
    def restarts(self) -> tuple[int, ...]:
        """Steps at which the learning rate begins anew: those of fine-tuning and of new students."""
        return tuple(sorted({*self.born, *((self.pretrain_until,) if self.pretrain_until else ())}))

    @property
    def taught_rows(self) -> int:
        """Most rows of a step that a teacher labels; labeled ones at the end of the run are taught in part."""
        mixed = [start for start in self.edges if start < max(1, self.labeled_only_from)]
        rows = [dict(self.rows_at(start, ())) for start in mixed]
        return max(sum(count for name, count in one.items() if name in self.taught) for one in rows)

    def rows_at(self, step: int, accepted: Sequence[Mapping[str, int]]) -> tuple[tuple[str, int], ...]:
        """Rows of every stream at `step`, those that a teacher labels last.

        Args:
          step: of the run.
          accepted: for each round held so far what it accepted, by stream (pseudo, translated).
        """
        if step < self.pretrain_until:
            return (("raw", self.rows),)
        if step >= self.labeled_only_from:
            return (("labeled", self.rows),)
        held = sum(at <= step for at in self.round_steps)
        rows = {"pseudo": self.pseudo_rows, "translated": self.translated_rows}
        for name in rows:
            # A round to come is counted on; one that accepted nothing leaves its rows to the other streams.
            if held <= len(accepted) and not any(one.get(name, 0) for one in accepted[:held]):
                rows[name] = 0
        rows["backward"] = self.backward_rows
        rest = self.unlabeled_rows - sum(rows.values())
        rows = {"labeled": self.labeled_rows, "raw": rest, **rows}
        if not self.has_raw:
            rows |= {"labeled": self.labeled_rows + rest, "raw": 0}
        ordered = sorted(rows.items(), key=lambda item: item[0] in self.taught)
        return tuple((name, count) for name, count in ordered if count)

    def phases(self, accepted: Sequence[Mapping[str, int]] = ()) -> list[Phase]:
        """The run as phases of constant rows; `accepted` as of `rows_at`."""
        phases = []
        next_row: dict[str, int] = dict.fromkeys(STREAM_IDS, 0)
        for start, stop in itertools.pairwise(self.edges):
            rows = self.rows_at(start, accepted)
            phases.append(Phase(start, stop, rows, next_row))
            next_row = phases[-1].drawn_before(stop)
        return phases

    @property
    def edges(self) -> list[int]:
        """Steps at which the rows of a step may become others, the first and the last one among them."""
        return sorted({0, *self.round_steps, self.pretrain_until, self.labeled_only_from, self.total_steps})


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
    train, rounds = config.train, config.pseudo_labels.rounds
    has_prompts = records.get("prompt_train", 0) > 0
    has_raw = records.get("raw_train", 0) > 0 or (has_prompts and train.prompts_as_text)
    labeled_rows = train.per_device_train_batch_size * row_shards
    unlabeled_rows = round(labeled_rows * train.unlabeled_ratio)
    if train.unlabeled_ratio and not unlabeled_rows:
        raise UserError(
            f"train.unlabeled_ratio {train.unlabeled_ratio:g} of {labeled_rows} labeled rows rounds to no unlabeled "
            "rows; raise it or set it to 0"
        )
    if train.pretrain_fraction and not has_raw:
        raise UserError(
            "train.pretrain_fraction: the data has no raw text; add a source to data.unlabeled or set it to 0"
        )
    backward_rows = _share(unlabeled_rows, train.backward_fraction, "backward_fraction")
    translated_rows = _share(unlabeled_rows, train.back_translation_fraction, "back_translation_fraction")
    if translated_rows and not records.get("raw_train", 0):
        raise UserError(
            "train.back_translation_fraction: the data has no raw text whose turns could be replies; add a source of "
            "it to data.unlabeled or set 0"
        )
    pseudo_rows = 0
    if rounds and has_prompts and not (translated_rows and not train.pseudo_label_fraction):
        wanted = train.pseudo_label_fraction if has_raw else 1.0 - train.backward_fraction
        pseudo_rows = round(unlabeled_rows * wanted)
        if not pseudo_rows:
            raise UserError(
                f"pseudo_labels.rounds: train.unlabeled_ratio {train.unlabeled_ratio:g} and "
                f"train.pseudo_label_fraction {train.pseudo_label_fraction:g} leave no rows for pseudo-labels; raise "
                f"them {_NO_ROUNDS}"
            )
    if rounds and not pseudo_rows and not translated_rows:
        raise UserError(
            "pseudo_labels.rounds: the data has no prompts to answer; add a source of prompts to data.unlabeled "
            + _NO_ROUNDS
        )
    if pseudo_rows + translated_rows + backward_rows > unlabeled_rows:
        raise UserError(
            f"train.pseudo_label_fraction, back_translation_fraction and backward_fraction ask for {pseudo_rows}, "
            f"{translated_rows} and {backward_rows} rows of {unlabeled_rows} unlabeled ones; lower one of them"
        )
    if unlabeled_rows and not has_raw and not (pseudo_rows or backward_rows):
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
    pretrain_until = round(train.pretrain_fraction * total)
    labeled_only_from = total - round(train.labeled_only_fraction * total)
    round_steps = tuple(max(1, round(at * total)) for at in rounds)
    if len(set(round_steps)) < len(round_steps):
        raise UserError(f"pseudo_labels.rounds: {len(rounds)} rounds do not fit into {total} steps")
    if round_steps and round_steps[-1] >= labeled_only_from:
        raise UserError(
            f"pseudo_labels.rounds: the round at step {round_steps[-1]} of {total} (train.steps) would teach nothing, "
            f"since from step {labeled_only_from} on only labeled dialogues are used (train.labeled_only_fraction)"
        )
    if round_steps and round_steps[0] < pretrain_until:
        raise UserError(
            f"pseudo_labels.rounds: the round at step {round_steps[0]} comes before the teacher has seen a label, at "
            f"step {pretrain_until} (train.pretrain_fraction); let it come later"
        )
    if pretrain_until > labeled_only_from:
        raise UserError("train.pretrain_fraction and train.labeled_only_fraction are more than all steps; lower one")
    made = Plan(
        total_steps=total,
        labeled_rows=labeled_rows,
        unlabeled_rows=unlabeled_rows,
        pseudo_rows=pseudo_rows,
        translated_rows=translated_rows,
        backward_rows=backward_rows,
        round_steps=round_steps,
        pretrain_until=pretrain_until,
        labeled_only_from=labeled_only_from,
        has_raw=has_raw,
        taught=config.distillation.streams if config.distillation.weight else (),
        born=round_steps if config.pseudo_labels.student == "reinitialized" else (),
    )
    if made.taught and not made.taught_rows:
        raise UserError(
            f"distillation.streams {', '.join(made.taught)}: the run has no such rows; name others, or set "
            "--distillation.weight 0"
        )
    return made


def _share(rows: int, fraction: float, name: str) -> int:
    """That fraction of the unlabeled rows, at least one where any is asked for."""
    share = round(rows * fraction)
    if fraction and not share:
        raise UserError(f"train.{name} {fraction:g} of {rows} unlabeled rows rounds to none; raise it or set it to 0")
    return share


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
