"""What a run says before it begins: its methods, and what is likely to be a mistake."""

import pytest

from ssl_jax import description


@pytest.mark.parametrize(
    ("labeled", "unlabeled"),
    [
        ({"en": 0.9, "unknown": 0.1}, {"de": 0.8, "en": 0.1, "unknown": 0.1}),
        ({"zh": 1.0}, {"en": 1.0}),
        ({"en": 0.3, "unknown": 0.7}, {"fr": 0.3, "unknown": 0.7}),
    ],
)
def test_unlabeled_dialogues_in_another_language_are_named(labeled, unlabeled):
    (warning,) = description.warnings({"labeled": labeled, "unlabeled": unlabeled})
    assert warning.startswith("warning: most labeled dialogues are " + next(iter(labeled)))
    assert next(iter(unlabeled)) in warning and "data.cleaning" in warning


@pytest.mark.parametrize(
    ("labeled", "unlabeled"),
    [
        ({"en": 0.9, "unknown": 0.1}, {"en": 0.6, "de": 0.4}),
        ({"en": 0.3, "unknown": 0.7}, {"en": 0.9}),
        ({"unknown": 1.0}, {"en": 1.0}),
        ({"en": 1.0}, {}),
    ],
)
def test_the_same_language_or_none_that_was_told_is_no_warning(labeled, unlabeled):
    assert description.warnings({"labeled": labeled, "unlabeled": unlabeled}) == []
