"""What a run is going to do, in lines for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from ssl_jax.config import Config
from ssl_jax.data.languages import UNKNOWN
from ssl_jax.data.mixture import describe_weights
from ssl_jax.data.streams import PackedStream
from ssl_jax.logbook import format_count
from ssl_jax.model import GPT2
from ssl_jax.plan import Plan, parameter_count


def rows(
    config: Config, plan: Plan, shape: GPT2, mesh: jax.sharding.Mesh, streams: Mapping[str, PackedStream]
) -> list[tuple[str, str]]:
    """Names and values of the plan's table."""
    source = f", from {config.model.init_from}" if config.model.init_from else ""
    drawn = plan.phases()[-1].drawn_before(plan.total_steps)
    weights = describe_weights(config.data)
    long = ", ".join(f"{name} {_long_dialogues(stream)}" for name, stream in streams.items())
    return [
        ("model", f"{parameter_count(shape) / 1e6:.1f}M parameters, {shape.n_layer} × {shape.n_embd}{source}"),
        ("devices", f"{jax.device_count()} {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}"),
        *step_rows(config, plan),
        ("epoch", "; ".join(f"{name} {_epoch(stream, drawn[name])}" for name, stream in streams.items())),
        *([("weights", f"{weights} (times that an epoch shows a dialogue)")] if weights else []),
        ("packing", ", ".join(f"{name} {stream.fill():.1%} full" for name, stream in streams.items())),
        ("long dialogues", f"{long}; overlap {config.train.window_overlap} tokens"),
    ]


def step_rows(config: Config, plan: Plan) -> list[tuple[str, str]]:
    """Names and values of what the steps of a run are, without its data."""
    pretrain = f"raw text alone up to {plan.pretrain_until}, " if plan.pretrain_until else ""
    methods = _methods(config, plan)
    return [
        (
            "batch",
            f"{plan.rows} rows × {config.train.sequence_length} tokens, {plan.labeled_rows} labeled and "
            f"{plan.unlabeled_rows} unlabeled",
        ),
        ("steps", f"{plan.total_steps}, {pretrain}labeled only from {plan.labeled_only_from}"),
        ("rounds", ", ".join(f"step {at}" for at in plan.round_steps) or "none"),
        *([("methods", methods)] if methods else []),
    ]


def warnings(languages: Mapping[str, Any]) -> list[str]:
    """What is likely to be a mistake in the data, a line each.

    Args:
      languages: shares of the dialogues by language, `labeled` and `unlabeled`, as in the data's summary.
    """
    labeled, unlabeled = (
        {code: share for code, share in languages.get(kind, {}).items() if code != UNKNOWN}
        for kind in ("labeled", "unlabeled")
    )
    if not labeled or not unlabeled:
        return []
    shared = sum(min(share, labeled.get(code, 0.0)) for code, share in unlabeled.items())
    # Identification errs on short texts, so what the two have in common is held against what was identified at all.
    if shared >= 0.5 * min(sum(labeled.values()), sum(unlabeled.values())):
        return []
    told = [f"{max(one, key=one.__getitem__)} ({max(one.values()):.0%})" for one in (labeled, unlabeled)]
    return [
        f"warning: most labeled dialogues are {told[0]}, most unlabeled ones {told[1]}; another language teaches "
        "little; the step language of data.cleaning removes it"
    ]


def _methods(config: Config, plan: Plan) -> str:
    """What is on beyond labels, raw text and pseudo-labels."""
    settings, train = config.distillation, config.train
    found = []
    if settings.weight:
        label = "hard" if settings.hard else "soft"
        weighting = "" if settings.weighting == "none" else f", {settings.weighting}"
        rows = f"{plan.taught_rows} rows of {', '.join(settings.streams)}"
        found.append(
            f"{label} labels of {', '.join(settings.teachers)} on {rows} (weight {settings.weight:g}{weighting})"
        )
    if config.objectives.r_drop:
        found.append(f"R-Drop {config.objectives.r_drop:g}, every row fed twice")
    if plan.backward_rows:
        found.append(f"{plan.backward_rows} rows read backwards")
    if plan.translated_rows:
        found.append(f"{plan.translated_rows} rows of back-translation")
    if train.raw_roles == "alternate":
        found.append("raw text read as user and assistant in turn")
    if plan.born:
        found.append("a new student after every round")
    return "; ".join(found)


def _epoch(stream: PackedStream, drawn: int) -> str:
    """What an epoch of a stream is and how many of them `drawn` rows are, for people."""
    rows = stream.rows_in_epoch(0)
    passes = f", {drawn / rows:.1f} times" if rows else ""
    return f"{format_count(stream.tokens_in_epoch(0))} tokens in {rows} rows{passes}"


def _long_dialogues(stream: PackedStream) -> str:
    """How many dialogues are longer than a row, for people."""
    dialogues, windows = stream.long_dialogues()
    return f"{dialogues} cut into {windows} windows" if dialogues else "none"
