"""The rows of the published comparison: what each method is, as settings on one base.

A row has a recipe for every regime of unlabeled data that it applies to; rows that learn from labels alone have one
for `LABELS`. A recipe is a handful of settings by dotted path, and perhaps another row whose finished runs teach it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

Settings = Mapping[str, Any]

LABELS = "labels"
"""Stands in the place of a regime where no unlabeled data is used."""

REGIMES: Mapping[str, str] = {
    "logs": "complete dialogues without roles",
    "turns": "single turns in an order that has nothing to do with the dialogues",
    "prompts": "the turns of one of the two speakers, alone",
}

LABELED_SOURCE: Settings = {"dataset": "chitchat", "regime": "labeled"}
UNLABELED_SOURCES: Mapping[str, Settings] = {regime: {"dataset": "chitchat", "regime": regime} for regime in REGIMES}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a row changes.

    Attributes:
      settings: values by dotted path of `ssl_jax.config.Config`.
      teachers: the row whose runs, with every seed, are `distillation.teachers`; None where no run teaches.
    """

    settings: Settings
    teachers: str | None = None

    def __or__(self, other: Recipe) -> Recipe:
        """Both; where they disagree, the other one."""
        return Recipe({**self.settings, **other.settings}, other.teachers or self.teachers)


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A line of the table.

    Attributes:
      name: for the command line and for folders.
      title: for the table.
      description: what it is, in a sentence.
      recipes: by regime, or for `LABELS`.
      all_labels: whether it has every label whatever the budget.
      is_main: whether it is run at every budget and not only at the smallest one.
      is_repeated: whether it is run with every seed and not only with the first one.
    """

    name: str
    title: str
    description: str
    recipes: Mapping[str, Recipe]
    all_labels: bool = False
    is_main: bool = False
    is_repeated: bool = False


def dropout(share: float) -> Settings:
    """Dropout on the embeddings and on what blocks add to the residual stream."""
    return {"model.resid_pdrop": share, "model.embd_pdrop": share}


def _everywhere(*recipes: Recipe) -> dict[str, Recipe]:
    return dict.fromkeys(REGIMES, _combined(*recipes))


def _combined(*recipes: Recipe) -> Recipe:
    result = Recipe({})
    for recipe in recipes:
        result |= recipe
    return result


# A step has six unlabeled rows beside two labeled ones; this share of them is one row.
_ONE_OF_SIX = 0.17

_TUNED: Settings = {
    **dropout(0.3),
    "optimizer.weight_decay": 0.5,
    "optimizer.learning_rate": 2.0e-3,
    "train.token_replacement": 0.05,
}
_FLOOR = Recipe({"train.unlabeled_ratio": 0, **_TUNED})
# A student sees other noise than its teacher: that is what consistency asks for.
_STUDENT_NOISE: Settings = {**dropout(0.1), "train.token_replacement": 0.05}
_R_DROP: Settings = {"objectives.r_drop": 1.0}

_LM = Recipe({})
_ROLES = Recipe({"train.raw_roles": "alternate"})
_NOISE = Recipe({"train.token_replacement": 0.05})

_UNFILTERED = Recipe(
    {
        "train.pseudo_label_fraction": _ONE_OF_SIX,
        "pseudo_labels.rounds": [0.4],
        "pseudo_labels.prompts_per_round": 1024,
        "pseudo_labels.num_return_sequences": 1,
        "pseudo_labels.min_reply_tokens": 1,
        "pseudo_labels.max_repetition": 1.0,
        "pseudo_labels.max_copy": 1.0,
        "pseudo_labels.max_duplicates": 1_000_000,
        "pseudo_labels.keep_fraction": 1.0,
    }
)
_FILTERED = Recipe(
    {
        "train.pseudo_label_fraction": _ONE_OF_SIX,
        "pseudo_labels.rounds": [0.4],
        "pseudo_labels.prompts_per_round": 1024,
        "pseudo_labels.num_return_sequences": 2,
    }
)
_BY_MUTUAL_INFORMATION = Recipe(
    {
        "train.backward_fraction": _ONE_OF_SIX,
        "pseudo_labels.prior_weight": 0.5,
        "pseudo_labels.backward_weight": 0.5,
    }
)
_MADE_UP_CONTEXTS = Recipe(
    {
        "train.backward_fraction": _ONE_OF_SIX,
        "train.back_translation_fraction": _ONE_OF_SIX,
        "pseudo_labels.rounds": [0.4],
        "pseudo_labels.replies_per_round": 1024,
    }
)
_TWO_ROUNDS = Recipe({"pseudo_labels.rounds": [0.4, 0.65]})


def _taught(settings: Settings, teachers: str | None = None, labeled: bool = False) -> dict[str, Recipe]:
    """Soft labels for raw text; where there are prompts, for pseudo-labeled replies to them too."""
    first = ["labeled"] if labeled else []
    common = Recipe({**_STUDENT_NOISE, **settings}, teachers)
    raw = common | Recipe({"distillation.streams": [*first, "raw"]})
    with_replies = _FILTERED | common | Recipe({"distillation.streams": [*first, "raw", "pseudo"]})
    return {"logs": raw, "turns": raw, "prompts": with_replies}


_EMA_TEACHER: Settings = {"distillation.weight": 0.5}

# Every objective is a mean over its own tokens. With this weight a token counts about the same wherever it is from, so
# that a few labels, which are seen again and again, do not decide half of every step.
_TOKEN_WEIGHTS = Recipe({"objectives.supervised": 0.25})
_MORE_TEXT = Recipe({"train.unlabeled_ratio": 7, "train.labeled_only_fraction": 0.05})

FULL: Mapping[str, Mapping[str, Recipe]] = {
    regime: {"token_weights": _TOKEN_WEIGHTS, "more_text": _MORE_TEXT, "roles": _ROLES} for regime in REGIMES
}
"""The parts of the recommended method of each regime, by name; each is also left out once."""


def _full(without: str | None = None) -> dict[str, Recipe]:
    """The full method of every regime, or of those that have the part left out."""
    return {
        regime: _combined(*(recipe for name, recipe in parts.items() if name != without))
        for regime, parts in FULL.items()
        if without is None or without in parts
    }


def _full_minus() -> list[Row]:
    parts = dict.fromkeys(name for parts in FULL.values() for name in parts)
    return [
        Row(
            f"full_minus_{part}",
            f"full − {part.replace('_', ' ')}",
            f"The full method without {part.replace('_', ' ')}.",
            _full(without=part),
        )
        for part in parts
    ]


def _prompts_only(*recipes: Recipe) -> dict[str, Recipe]:
    return {"prompts": _combined(*recipes)}


ROWS: tuple[Row, ...] = (
    Row(
        "floor_untuned",
        "labels only, untuned",
        "No dropout, hardly any weight decay.",
        {LABELS: Recipe({"train.unlabeled_ratio": 0, "optimizer.weight_decay": 0.01})},
    ),
    Row(
        "floor",
        "**labels only, tuned: the floor**",
        "Dropout 0.3, weight decay 0.5, 5 % of the input tokens replaced, half of the learning rate.",
        {LABELS: _FLOOR},
        is_main=True,
        is_repeated=True,
    ),
    Row(
        "floor_r_drop",
        "labels only, R-Drop",
        "The floor, with two passes over every row whose predictions must agree.",
        {LABELS: _FLOOR | Recipe(_R_DROP)},
    ),
    Row(
        "floor_ensemble_kd",
        "labels only, student of an ensemble",
        "The floor, following the mean prediction of the floor's runs on labeled replies.",
        {LABELS: _FLOOR | Recipe({"distillation.weight": 1.0, "distillation.streams": ["labeled"]}, "floor")},
    ),
    Row(
        "pretrain",
        "LM, then labels",
        "Raw text for the first half of the steps, labeled dialogues for the second: the article's method.",
        _everywhere(Recipe({**dropout(0.1), "train.pretrain_fraction": 0.5, "train.labeled_only_fraction": 0.5})),
    ),
    Row(
        "lm",
        "LM, jointly",
        "Three rows of raw text beside each labeled row, labeled rows alone at the end.",
        _everywhere(_LM),
        is_main=True,
        is_repeated=True,
    ),
    Row(
        "lm_roles",
        "LM with imputed roles",
        "Raw text read as if user and assistant spoke in turn; prompts read as replies.",
        _everywhere(_ROLES),
    ),
    Row(
        "pseudo_unfiltered",
        "+ pseudo-replies, unfiltered",
        "The model's own replies to prompts, one each, all of them learned from.",
        _prompts_only(_UNFILTERED),
    ),
    Row(
        "pseudo_filtered",
        "+ pseudo-replies, by likelihood",
        "The likelier of two replies; half are kept, within buckets of length; repetitions and copies are rejected.",
        _prompts_only(_FILTERED),
        is_main=True,
    ),
    Row(
        "pseudo_mmi",
        "+ pseudo-replies, by mutual information",
        "The same, chosen by log p(reply | context) − ½ log p(reply) + ½ log p(context | reply).",
        _prompts_only(_FILTERED, _BY_MUTUAL_INFORMATION),
    ),
    Row(
        "fixmatch",
        "+ FixMatch",
        "The averaged model's likeliest token, where it is sure (0.95).",
        _taught({"distillation.weight": 0.5, "distillation.weighting": "fixmatch", "distillation.hard": True}),
    ),
    Row(
        "freematch",
        "+ FreeMatch",
        "The averaged model's likeliest token, where it is surer than it is on average.",
        _taught({"distillation.weight": 0.5, "distillation.weighting": "freematch", "distillation.hard": True}),
    ),
    Row(
        "softmatch",
        "+ SoftMatch",
        "The averaged model's likeliest token, weighted by how sure it is.",
        _taught({"distillation.weight": 0.5, "distillation.weighting": "softmatch", "distillation.hard": True}),
    ),
    Row(
        "ema",
        "+ EMA consistency",
        "The averaged model's distribution; the student sees noise, the teacher does not.",
        _taught(_EMA_TEACHER),
    ),
    Row(
        "ensemble_kd",
        "+ ensemble distillation",
        "The mean distribution of the runs of “LM, jointly” with every seed, weighted by their agreement.",
        _taught({"distillation.weight": 1.0, "distillation.weighting": "agreement"}, teachers="lm", labeled=True),
    ),
    Row(
        "back_translation",
        "+ back-translation",
        "Real turns behind contexts that the model, read backwards, made up for them.",
        dict.fromkeys(("logs", "turns"), _MADE_UP_CONTEXTS),
    ),
    Row(
        "r_drop",
        "+ R-Drop",
        "Two passes with other dropout over every row, whose predictions must agree; half as many rows.",
        _everywhere(Recipe({**dropout(0.1), **_R_DROP})),
    ),
    Row(
        "noise",
        "+ noise",
        "5 % of the input tokens replaced; words of pseudo-labeled contexts dropped, blanked and moved.",
        {
            "logs": _NOISE,
            "turns": _NOISE,
            "prompts": _FILTERED
            | _NOISE
            | Recipe(
                {
                    "pseudo_labels.noise.word_dropout": 0.2,
                    "pseudo_labels.noise.word_blank": 0.2,
                    "pseudo_labels.noise.word_shuffle": 3,
                }
            ),
        },
    ),
    Row(
        "full",
        "**full**",
        "Raw text with imputed roles, seven rows of it beside each labeled row, a labeled reply weighing a quarter.",
        _full(),
        is_main=True,
        is_repeated=True,
    ),
    *_full_minus(),
    Row(
        "shuffled",
        "control: pseudo-replies shuffled",
        "As “by likelihood”, but every reply is given to another prompt.",
        _prompts_only(_FILTERED, Recipe({"pseudo_labels.shuffle_replies": True})),
    ),
    Row(
        "second_round_accumulate",
        "+ a second round, added",
        "A second round of pseudo-replies beside those of the first.",
        _prompts_only(_FILTERED, _TWO_ROUNDS),
    ),
    Row(
        "second_round_replace",
        "+ a second round, replacing",
        "A second round of pseudo-replies in the place of the first.",
        _prompts_only(_FILTERED, _TWO_ROUNDS, Recipe({"pseudo_labels.accumulate": False})),
    ),
    Row(
        "reinitialized",
        "+ pseudo-replies, new student",
        "A new student begins with the pseudo-replies of its predecessor.",
        _prompts_only(_FILTERED, Recipe({"pseudo_labels.student": "reinitialized"})),
    ),
    Row(
        "oracle",
        "**every label: the oracle**",
        "Every dialogue with its roles.",
        {LABELS: Recipe({"train.unlabeled_ratio": 0})},
        all_labels=True,
        is_main=True,
        is_repeated=True,
    ),
)
"""In the order of the table."""

BY_NAME: Mapping[str, Row] = {row.name: row for row in ROWS}
