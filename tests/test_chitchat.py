"""The packaged data set is what its documentation says, and every regime lacks exactly what it should."""

import collections
import itertools
import json
import sys

import pytest

from ssl_jax.data import chitchat
from ssl_jax.errors import UserError


@pytest.fixture(scope="module")
def conversations():
    pytest.importorskip("chitchat_dataset")
    return chitchat.load(chitchat.data_file())


@pytest.fixture(scope="module")
def split(conversations):
    return chitchat.split_by_time(conversations)


def test_usable_conversations_and_turns_are_the_published_numbers(conversations):
    usable = [conversation for conversation in conversations if conversation.is_usable]
    assert len(conversations) == 7168
    assert len(usable) == 3243
    assert sum(len(conversation.turns) for conversation in usable) == 133_818


def test_time_split_has_the_documented_sizes_and_never_looks_ahead(split):
    assert [len(part) for part in (split.train, split.dev, split.test, split.test_seen)] == [2270, 324, 394, 255]
    newest_train = max(conversation.start for conversation in split.train)
    first_dev = min(conversation.start for conversation in split.dev)
    first_test = min(conversation.start for conversation in (*split.test, *split.test_seen))
    assert newest_train <= first_dev <= first_test
    assert all(fragment.start < first_dev for fragment in split.fragments)


def test_headline_test_shares_no_speaker_with_anything_trained_or_tuned_on(split):
    earlier = frozenset().union(*(c.senders for c in (*split.train, *split.dev, *split.fragments)))
    assert not any(conversation.senders & earlier for conversation in split.test)
    assert all(conversation.senders & earlier for conversation in split.test_seen)


def test_labeled_dialogues_start_with_the_user_and_end_with_a_reply(split):
    for part in chitchat.labeled(split).values():
        for dialogue in part:
            assert [turn.role for turn in dialogue.turns] == ["user", "assistant"] * (len(dialogue.turns) // 2)
            assert all(turn.content.strip() for turn in dialogue.turns)


def test_smaller_label_budget_is_part_of_a_larger_one_and_not_the_oldest(split):
    small, large = ([dialogue.id for dialogue in chitchat.labeled(split, budget)["train"]] for budget in (100, 300))
    assert large[:100] == small
    assert set(small) != {conversation.id for conversation in split.train[:100]}
    assert small != [dialogue.id for dialogue in chitchat.labeled(split, 100, seed=1)["train"]]


def test_logs_are_the_conversations_that_the_budget_left(split):
    labeled = {dialogue.id for dialogue in chitchat.labeled(split, 300)["train"]}
    logs = chitchat.unlabeled(split, "logs", skip=300)
    assert {dialogue.kind for dialogue in logs} == {"raw"}
    assert len(logs) == 1970
    assert labeled | {dialogue.id for dialogue in logs} == {conversation.id for conversation in split.train}


def test_turns_are_the_turns_of_the_logs_in_an_unrelated_order(split):
    logs = chitchat.unlabeled(split, "logs", max_dialogues=50)
    alone = chitchat.unlabeled(split, "turns", max_dialogues=50)
    assert all(len(dialogue.turns) == 1 and dialogue.kind == "raw" for dialogue in alone)
    assert collections.Counter(dialogue.turns[0].content for dialogue in alone) == collections.Counter(
        turn.content for dialogue in logs for turn in dialogue.turns
    )
    conversations = [dialogue.id.split("/")[0] for dialogue in alone]
    neighbours = sum(a == b for a, b in itertools.pairwise(conversations))
    assert neighbours < 0.2 * len(alone)
    assert len({dialogue.id for dialogue in alone}) == len(alone)


def test_prompts_hold_no_word_of_the_second_speaker(split):
    prompts = chitchat.unlabeled(split, "prompts", max_dialogues=50)
    replies = {conversation.id: conversation for conversation in split.train}
    assert {dialogue.kind for dialogue in prompts} == {"prompt"}
    for dialogue in prompts:
        conversation = replies[dialogue.id.split("/")[0]]
        first = conversation.turns[0][0]
        assert dialogue.turns[0].content in {text for sender, text in conversation.turns if sender == first}


def test_fragments_are_one_prompt_each(split):
    fragments = chitchat.unlabeled(split, "fragments", skip=300)
    assert all(len(dialogue.turns) == 1 and dialogue.kind == "prompt" for dialogue in fragments)
    assert 2000 < len(fragments) <= len(split.fragments)


def test_no_sender_is_passed_on_and_the_rest_is_kept(split):
    dialogue = chitchat.labeled(split, 1)["train"][0]
    conversation = next(c for c in split.train if c.id == dialogue.id)
    stored = json.dumps([dialogue.to_messages(), dialogue.id, dialogue.metadata])
    assert not any(sender in stored for sender in conversation.senders)
    assert set(dialogue.metadata) <= {"start", "ratings", "prompt"}
    assert dialogue.metadata["start"] == conversation.start


def test_missing_package_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "chitchat_dataset", None)
    with pytest.raises(UserError, match=r"pip install 'ssl_jax\[demo\]'"):
        chitchat.data_file()
