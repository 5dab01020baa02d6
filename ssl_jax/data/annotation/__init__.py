"""Linguistic annotation of dialogues: words, parts of speech, keywords, entities, and what they are used for.

`annotate` records them as metadata, `keeps` filters by them, `select` does both as the settings say; `keyword_prefix`
and `steer` put key phrases where a model can follow them; `summarize` reports. Everything is a pure function of a
dialogue. The taggers are the extra `annotate`.
"""

from ssl_jax.data.annotation.conditions import keeps, needed_annotations, select
from ssl_jax.data.annotation.control import keyword_prefix, steer
from ssl_jax.data.annotation.language import Language, language_of
from ssl_jax.data.annotation.records import annotate, annotation_of
from ssl_jax.data.annotation.report import summarize

__all__ = [
    "Language", "annotate", "annotation_of", "keeps", "keyword_prefix", "language_of", "needed_annotations", "select",
    "steer", "summarize",
]  # fmt: skip
