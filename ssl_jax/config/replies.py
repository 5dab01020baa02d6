"""Settings of what a model says: how replies are drawn, by a teacher and for an evaluation."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ssl_jax.config.methods import Noise
from ssl_jax.config.section import Section
from ssl_jax.shown import shortened

# Longest reply where nothing is said about it (tokens).
DEFAULT_NEW_TOKENS = 48

# Ids of tokens are below the largest vocabulary; a larger bias than this changes nothing, unless it is that of a ban.
_LARGEST_ID, _LARGEST_BIAS = 999_999, 1e6

Bias = Annotated[float, Field(allow_inf_nan=True)]
"""What is added to a logit; minus infinity bans the token."""


class Sampling(Section):
    """How replies are drawn, in `GenerationConfig`'s names and with its meaning. Texts are tokenized as they stand."""

    max_new_tokens: int | None = Field(
        default=None,
        ge=1,
        le=1_048_576,
        description="Longest reply, end token included (tokens); absent: 48, or what max_length leaves.",
    )
    max_length: int | None = Field(
        default=None,
        ge=2,
        le=1_048_576,
        description="Longest prompt and reply together (tokens); max_new_tokens goes before it.",
    )
    min_length: int = Field(
        default=0,
        ge=0,
        le=1_048_576,
        description="No end token before prompt and reply together have this many tokens.",
    )
    min_new_tokens: int = Field(
        default=0,
        ge=0,
        le=1_048_576,
        description="No end token before the reply has this many tokens; goes before min_length.",
    )
    do_sample: bool = Field(default=True, description="Draw from the distribution (else take the likeliest token).")
    temperature: float = Field(default=1.0, ge=1e-6, le=1_000_000, description="Logits are divided by this.")
    top_k: int = Field(default=0, ge=0, le=1_000_000, description="Keep the k likeliest tokens; 0 keeps all.")
    top_p: float = Field(default=0.95, gt=0, le=1, description="Keep the likeliest tokens that hold this probability.")
    min_p: float = Field(
        default=0.0, ge=0, le=1, description="Keep tokens at least this many times as likely as the likeliest one."
    )
    typical_p: float = Field(
        default=1.0, gt=0, le=1, description="Keep the tokens of most typical surprise that hold this probability."
    )
    repetition_penalty: float = Field(
        default=1.0,
        ge=0.001,
        le=1000,
        description="Makes tokens of the prompt and the reply so far less likely where above 1.",
    )
    no_repeat_ngram_size: int = Field(
        default=0,
        ge=0,
        le=1_048_576,
        description="No sequence of this many tokens occurs twice in prompt and reply; 0 allows all.",
    )
    bad_words: tuple[str, ...] = Field(default=(), description="Texts whose tokens never appear in a row in a reply.")
    sequence_bias: dict[str, Bias] = Field(
        default={}, description="Texts and what is added to the logit of the token that completes one's tokens (YAML)."
    )
    suppress_tokens: tuple[int, ...] = Field(default=(), description="Ids that never appear in a reply.")
    begin_suppress_tokens: tuple[int, ...] = Field(default=(), description="Ids that a reply does not begin with.")
    forced_bos_token_id: int | None = Field(
        default=None, ge=0, le=999_999, description="First token of the reply to a prompt of one token."
    )
    forced_eos_token_id: int | None = Field(
        default=None, ge=0, le=999_999, description="Last token of a reply that reaches its longest length."
    )
    stop: tuple[str, ...] = Field(default=(), description="Texts that end a reply and are cut off with what follows.")
    num_beams: int = Field(default=1, ge=1, le=256, description="Beams of a beam search; 1 is none.")
    length_penalty: float = Field(
        default=1.0,
        ge=-100,
        le=100,
        description="A beam's score is divided by its length to this power: above 0 favors long replies.",
    )
    early_stopping: bool | Literal["never"] = Field(
        default=False,
        description="When beams end: true, as soon as num_beams are complete; false, when better ones are unlikely; "
        "never, when there can be no better ones.",
    )

    @property
    def bounded_by_max_length(self) -> bool:
        """Whether `max_length` says how long a reply may be."""
        return self.max_length is not None and self.max_new_tokens is None

    @property
    def new_tokens(self) -> int:
        """Most tokens that a reply to a prompt of any length can have."""
        return self.max_new_tokens or self.max_length or DEFAULT_NEW_TOKENS

    @model_validator(mode="after")
    def _room_for_the_shortest(self) -> Sampling:
        if self.min_new_tokens > self.new_tokens:
            longest = next((name for name in ("max_new_tokens", "max_length") if getattr(self, name)), "the default of")
            raise ValueError(
                f"min_new_tokens {self.min_new_tokens} is more than {longest} {self.new_tokens}; raise max_new_tokens"
            )
        if self.max_length is not None and self.max_new_tokens is None and self.min_length > self.max_length:
            raise ValueError(f"min_length {self.min_length} is more than max_length {self.max_length}")
        return self

    @model_validator(mode="after")
    def _beams_are_not_drawn(self) -> Sampling:
        if self.num_beams > 1 and self.do_sample:
            raise ValueError(f"num_beams {self.num_beams} takes the likeliest replies; set do_sample to false with it")
        return self

    @model_validator(mode="after")
    def _possible_tokens(self) -> Sampling:
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            for number in getattr(self, name):
                if not 0 <= number <= _LARGEST_ID:
                    raise ValueError(f"{name} are token ids from 0 to {_LARGEST_ID}, got {shortened(number)}")
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            if (forced := getattr(self, name)) in self.suppress_tokens:
                raise ValueError(f"{name} {forced} is among suppress_tokens; drop it from one of them")
        return self

    @model_validator(mode="after")
    def _texts_and_biases(self) -> Sampling:
        for name in ("bad_words", "sequence_bias", "stop"):
            if "" in getattr(self, name):
                raise ValueError(f"{name} has an empty text; drop it")
        for text, bias in self.sequence_bias.items():
            if not (abs(bias) <= _LARGEST_BIAS or bias == -math.inf):
                raise ValueError(f"sequence_bias of {text!r:.80} is -.inf or between ±{_LARGEST_BIAS:,.0f}, got {bias}")
        return self


class PseudoLabels(Section):
    """Rounds in which a teacher answers prompts that have no reply."""

    rounds: tuple[float, ...] = Field(
        default=(), description="When rounds happen, as increasing fractions of the steps. Empty: no pseudo-labels."
    )
    teacher: Literal["ema", "snapshot"] = Field(
        default="ema", description="Who answers: the averaged weights or the current ones."
    )
    student: Literal["continued", "reinitialized"] = Field(
        default="continued",
        description="Who learns from a round: the student as it is, or a new one with a learning-rate schedule of its "
        "own.",
    )
    accumulate: bool = Field(
        default=True, description="Later rounds add to the earlier ones' labels (else replace them)."
    )
    prompts_per_round: int = Field(default=512, ge=1, le=1_000_000_000, description="Prompts answered in a round.")
    replies_per_round: int = Field(
        default=512,
        ge=1,
        le=1_000_000_000,
        description="Real replies that a round makes up contexts for (back-translation).",
    )
    num_return_sequences: int = Field(
        default=2, ge=1, le=64, description="Replies drawn per prompt; the best one is kept."
    )
    batch_size: int = Field(default=64, ge=1, le=65_536, description="Sequences sampled at a time per device.")
    max_prompt_tokens: int = Field(
        default=128, ge=8, le=1_048_576, description="Longest context shown to the teacher (newest turns kept)."
    )
    sampling: Sampling = Field(default=Sampling(), description="How the teacher draws replies.")
    min_reply_tokens: int = Field(default=3, ge=1, le=1_048_576, description="Shorter replies are rejected.")
    max_repetition: float = Field(default=0.2, ge=0, le=1, description="Largest share of repeated 4-grams in a reply.")
    max_copy: float = Field(
        default=0.8, ge=0, le=1, description="Largest share of a reply's 4-grams found in its context."
    )
    max_duplicates: int = Field(
        default=3, ge=1, le=1_000_000_000, description="How often the same reply may be accepted in a round."
    )
    prior_weight: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="The score of a reply is log p(reply | context) less this times log p(reply), per token: 0 is "
        "likelihood, 1 pointwise mutual information.",
    )
    backward_weight: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="The score also counts this times log p(context | reply) per token (train.backward_fraction).",
    )
    keep_fraction: float = Field(
        default=0.5, gt=0, le=1, description="Share kept by score within every length bucket, after the other filters."
    )
    length_buckets: int = Field(
        default=4, ge=1, le=10_000, description="Equal-sized buckets of reply length that the score is ranked in."
    )

    noise: Noise = Field(default=Noise(), description="Noise on the contexts that the student sees.")
    shuffle_replies: bool = Field(
        default=False, description="Give every accepted reply to another prompt: the control that methods must beat."
    )

    @model_validator(mode="after")
    def _rounds_in_order(self) -> PseudoLabels:
        if any(not 0 < at < 1 for at in self.rounds) or list(self.rounds) != sorted(set(self.rounds)):
            raise ValueError(f"rounds are increasing fractions between 0 and 1, got {shortened(self.rounds)}")
        return self


class Evaluation(Section):
    """How much is evaluated. During training only reply_bits_per_byte is computed, on dev."""

    dev_dialogues: int = Field(
        default=64, ge=1, le=1_000_000_000, description="Dev dialogues scored at every evaluation."
    )
    test_dialogues: int | None = Field(
        default=None, ge=1, le=1_000_000_000, description="Test dialogues scored at the end; absent: all."
    )
    recall_examples: int = Field(
        default=200, ge=0, le=1_000_000_000, description="Contexts ranked for recall_at_1_of_20 and mrr."
    )
    generated_replies: int = Field(
        default=500, ge=0, le=1_000_000_000, description="Replies drawn for distinct, entropy, length, repetition."
    )
    max_prompt_tokens: int = Field(
        default=128, ge=8, le=1_048_576, description="Longest context for ranking and replies (newest turns)."
    )
    coherence_examples: int = Field(
        default=40,
        ge=0,
        le=1_000_000_000,
        description="Replies of each number in a dialogue (1, 2, 3, 4, 5+) scored behind their own context and behind "
        "another's, for context_gain.",
    )
    coherence_rankings: int = Field(
        default=0,
        ge=0,
        le=1_000_000_000,
        description="Contexts ranked for recall_at_1_of_20 of each of these numbers; costs what as many "
        "recall_examples do.",
    )
    self_chats: int = Field(
        default=0,
        ge=0,
        le=1_000_000_000,
        description="Conversations of six turns that the model holds with itself, for self_chat_repetition.",
    )
    sampling: Sampling = Field(default=Sampling(), description="How the replies are drawn.")
    sample_prompts: tuple[str, ...] = Field(
        default=("hi, how are you?", "what do you do for fun?", "have you seen any good movies lately?"),
        description="Prompts answered at every evaluation, for samples.jsonl.",
    )
