"""The plan gives every step its rows and every impossible wish an error that names the field."""

import dataclasses
import functools
import math

import jax
import pytest

from ssl_jax import model, objectives, plan
from ssl_jax.config import Config
from ssl_jax.errors import UserError

ALL = {"labeled_train": 100, "raw_train": 1000, "prompt_train": 1000}


def make(records=None, *, rounds=(), shards=1, rows_per_epoch=50, distillation=None, student="continued", **train):
    config = Config.model_validate(
        {
            "tokenizer": {"direction_tokens": True},
            "distillation": distillation or {},
            "train": {
                "per_device_train_batch_size": 4,
                "unlabeled_ratio": 3.0,
                "pseudo_label_fraction": 0.25,
                "labeled_only_fraction": 0.1,
                **({} if "num_train_epochs" in train else {"steps": 100}),
                **train,
            },
            "pseudo_labels": {"rounds": rounds, "student": student},
        }
    )
    return plan.make_plan(config, ALL if records is None else records, rows_per_epoch, shards)


def mixes(made, accepted=()):
    held = [{"pseudo": count} for count in accepted]
    return [(phase.start, phase.stop, dict(phase.rows)) for phase in made.phases(held)]


def test_raw_text_alone_is_mixed_in_until_the_labeled_tail():
    assert mixes(make()) == [(0, 90, {"labeled": 4, "raw": 12}), (90, 100, {"labeled": 16})]


def test_pseudo_labels_take_their_share_of_the_unlabeled_rows_from_the_first_round_on():
    assert mixes(make(rounds=[0.3, 0.6])) == [
        (0, 30, {"labeled": 4, "raw": 12}),
        (30, 60, {"labeled": 4, "raw": 9, "pseudo": 3}),
        (60, 90, {"labeled": 4, "raw": 9, "pseudo": 3}),
        (90, 100, {"labeled": 16}),
    ]


def test_without_raw_text_pseudo_labels_take_all_unlabeled_rows():
    made = make({"labeled_train": 100, "prompt_train": 50}, rounds=[0.5], prompts_as_text=False)
    assert mixes(made) == [(0, 50, {"labeled": 16}), (50, 90, {"labeled": 4, "pseudo": 12}), (90, 100, {"labeled": 16})]


def test_labeled_dialogues_alone_need_no_unlabeled_rows():
    made = make({"labeled_train": 100}, unlabeled_ratio=0)
    assert mixes(made) == [(0, 90, {"labeled": 4}), (90, 100, {"labeled": 4})]


def test_no_labeled_tail_when_not_asked_for():
    assert mixes(make(labeled_only_fraction=0)) == [(0, 100, {"labeled": 4, "raw": 12})]


@pytest.mark.parametrize(
    ("accepted", "pseudo"),
    [((), (3, 3)), ((0,), (0, 3)), ((0, 5), (0, 3)), ((5, 0), (3, 3)), ((0, 0), (0, 0)), ((7, 2), (3, 3))],
)
def test_a_round_that_accepted_nothing_leaves_its_rows_to_raw_text(accepted, pseudo):
    phases = mixes(make(rounds=[0.3, 0.6]), accepted)
    assert tuple(rows.get("pseudo", 0) for _, _, rows in phases[1:3]) == pseudo
    assert tuple(rows["raw"] for _, _, rows in phases[1:3]) == tuple(12 - count for count in pseudo)
    assert all(sum(rows.values()) == 16 for _, _, rows in phases), "the batch keeps its size"


def test_a_round_that_accepted_nothing_leaves_its_rows_to_labels_where_there_is_no_raw_text():
    made = make({"labeled_train": 100, "prompt_train": 50}, rounds=[0.5], prompts_as_text=False)
    assert all(rows == {"labeled": 16} for _, _, rows in mixes(made, (0,)))


@pytest.mark.parametrize("accepted", [(), (0,), (4, 4)])
def test_phases_cover_the_run_and_streams_go_on_where_they_stopped(accepted):
    made = make(rounds=[0.3, 0.6])
    accepted = [{"pseudo": count} for count in accepted]
    phases = made.phases(accepted)
    assert [phase.start for phase in phases] == [0, *(phase.stop for phase in phases[:-1])]
    assert phases[-1].stop == made.total_steps
    drawn: dict[str, int] = dict.fromkeys(objectives.STREAM_IDS, 0)
    for phase in phases:
        assert dict(phase.first_row) == drawn
        assert all(made.rows_at(at, accepted) == phase.rows for at in (phase.start, phase.stop - 1))
        for name, count in phase.rows:
            drawn[name] += count * (phase.stop - phase.start)


@pytest.mark.parametrize(("epochs", "shards", "steps"), [(1, 1, 13), (2, 1, 25), (0.01, 1, 1), (2, 2, 13)])
def test_epochs_become_steps_over_the_labeled_rows(epochs, shards, steps):
    """50 labeled rows an epoch, 4 a step and shard."""
    assert make(num_train_epochs=epochs, shards=shards).total_steps == steps


def test_rows_are_per_device_that_sees_other_rows():
    made = make(shards=8, rounds=[0.5])
    assert (made.labeled_rows, made.unlabeled_rows, made.pseudo_rows, made.rows) == (32, 96, 24, 128)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (dict(records={"labeled_train": 9, "raw_train": 9}, rounds=[0.5]), "rounds: the data has no prompts"),
        (dict(rounds=[0.5], unlabeled_ratio=0), "train.unlabeled_ratio 0 and .* leave no rows"),
        (
            dict(records={"labeled_train": 9, "prompt_train": 9}, prompts_as_text=False),
            "the data has prompts but no raw text to learn from",
        ),
        (dict(per_device_train_batch_size=1, unlabeled_ratio=0.5, shards=4), "give 6 rows a step, .* 4 devices"),
        (dict(per_device_train_batch_size=5, gradient_accumulation_steps=3), "3 does not divide the 20 rows"),
        (dict(shards=2, per_device_train_batch_size=1, gradient_accumulation_steps=8), "8 does not divide the 4 rows"),
        (dict(rounds=[0.2, 0.21], steps=10), "pseudo_labels.rounds: 2 rounds do not fit into 10 steps"),
        (dict(rounds=[0.9], steps=1), r"the round at step 1 of 1 \(train\.steps\) would teach nothing"),
        (
            dict(rounds=[0.95]),
            r"the round at step 95 of 100 \(train\.steps\) would teach nothing, since from step 90 on",
        ),
        (dict(rounds=[0.5], pseudo_label_fraction=0.0), "pseudo_label_fraction 0 leave no rows"),
        (dict(unlabeled_ratio=0.02), "rounds to no unlabeled rows"),
        (dict(records={"labeled_train": 9}), "the data has no unlabeled dialogues to learn from; add a source"),
        (dict(records={"labeled_train": 9}, pretrain_fraction=0.5), "pretrain_fraction: the data has no raw text"),
        (dict(pretrain_fraction=0.95), "are more than all steps"),
        (dict(pretrain_fraction=0.5, rounds=[0.4]), "step 40 comes before the teacher has seen a label, at step 50"),
        (dict(backward_fraction=0.01), "train.backward_fraction 0.01 of 12 unlabeled rows rounds to none"),
        (dict(backward_fraction=0.5, pseudo_label_fraction=0.75, rounds=[0.5]), "ask for 9, 0 and 6 rows of 12"),
        (
            dict(
                records={"labeled_train": 9, "prompt_train": 9},
                back_translation_fraction=0.5,
                backward_fraction=0.25,
                rounds=[0.5],
            ),
            "back_translation_fraction: the data has no raw text whose turns could be replies",
        ),
        (dict(distillation={"weight": 1, "streams": ["pseudo"]}), "streams pseudo: the run has no such rows"),
    ],
)
def test_what_cannot_be_is_refused_with_the_name_of_the_field(case, message):
    with pytest.raises(UserError, match=message):
        make(**case)


def test_prompts_count_as_raw_text_unless_told_otherwise():
    records = {"labeled_train": 100, "prompt_train": 50}
    assert mixes(make(records)) == [(0, 90, {"labeled": 4, "raw": 12}), (90, 100, {"labeled": 16})]
    assert mixes(make(records, rounds=[0.5]))[1] == (50, 90, {"labeled": 4, "raw": 9, "pseudo": 3})


def test_pretraining_reads_raw_text_alone_and_fine_tuning_begins_a_schedule_of_its_own():
    made = make(pretrain_fraction=0.5, unlabeled_ratio=0)
    assert mixes(made)[:2] == [(0, 50, {"raw": 4}), (50, 90, {"labeled": 4})]
    assert made.restarts == (50,)
    assert make().restarts == ()


def test_rows_read_backwards_and_back_translated_take_their_shares():
    made = make(rounds=[0.3], backward_fraction=0.25, back_translation_fraction=0.25)
    first, second = made.phases([{"pseudo": 1, "translated": 1}])[:2]
    assert dict(first.rows) == {"labeled": 4, "raw": 9, "backward": 3}
    assert dict(second.rows) == {"labeled": 4, "raw": 3, "pseudo": 3, "translated": 3, "backward": 3}
    none = made.phases([{"pseudo": 1, "translated": 0}])[1]
    assert dict(none.rows) == {"labeled": 4, "raw": 6, "pseudo": 3, "backward": 3}


def test_back_translation_alone_needs_no_prompts():
    records = {"labeled_train": 100, "raw_train": 50}
    made = make(records, rounds=[0.3], backward_fraction=0.25, back_translation_fraction=0.25)
    assert (made.pseudo_rows, made.translated_rows) == (0, 3)


def test_rows_with_a_teacher_come_last_and_are_counted():
    made = make(rounds=[0.3], distillation={"weight": 1.0, "streams": ["labeled", "pseudo"]})
    assert made.phases()[1].rows == (("raw", 9), ("labeled", 4), ("pseudo", 3))
    assert made.taught_rows == 7
    assert make(unlabeled_ratio=0, distillation={"weight": 1.0, "streams": ["labeled"]}).taught_rows == 4
    assert make(rounds=[0.3]).taught == ()


def test_a_new_student_is_born_at_every_round():
    made = make(rounds=[0.3, 0.6], student="reinitialized")
    assert made.born == made.restarts == made.round_steps


@pytest.mark.parametrize("case", [dict(gradient_accumulation_steps=4), dict(shards=2, gradient_accumulation_steps=8)])
def test_accumulation_that_divides_each_devices_rows_is_accepted(case):
    assert make(**case).rows % case["gradient_accumulation_steps"] == 0


def test_rounds_never_fall_before_the_first_step():
    assert make(rounds=[0.001], steps=100).round_steps == (1,)


# Costs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_parameter_count_is_the_sum_of_all_leaves(scan_layers, tied):
    shape = model.GPT2(61, 61, 24, 16, 3, 2, 40, scan_layers=scan_layers, tie_word_embeddings=tied)
    leaves = jax.tree.leaves(jax.eval_shape(functools.partial(model.init, shape), jax.random.key(0)))
    assert plan.parameter_count(shape) == sum(math.prod(leaf.shape) for leaf in leaves)


def test_gpt2_has_its_published_parameter_count_padding_not_counted():
    assert plan.parameter_count(model.GPT2(50257, 50304, 1024, 768, 12, 12, 3072)) == 124_439_808


def test_flops_count_parameters_and_causal_attention():
    shape = model.GPT2(50257, 50304, 1024, 768, 12, 12, 3072)
    assert plan.flops_per_token(shape, 1024) == 6 * 124_439_808 + 6 * 12 * 768 * 1024


def test_an_untied_head_costs_memory_but_no_operations():
    """Tied or not, one table is multiplied with and one is looked up."""
    tied = model.GPT2(50257, 50304, 1024, 768, 12, 12, 3072)
    untied = dataclasses.replace(tied, tie_word_embeddings=False)
    assert plan.parameter_count(untied) == plan.parameter_count(tied) + 50257 * 768
    assert plan.flops_per_token(untied, 1024) == plan.flops_per_token(tied, 1024)
