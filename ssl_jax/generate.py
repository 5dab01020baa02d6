"""Answers prompts, or chats: `python -m ssl_jax.generate --workdir DIR --prompt TEXT [TEXT …] [--json]`.

Started once on every host, as training is, it draws on all their devices; the first one prints the replies.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from ssl_jax import agreement, command_line, distributed
from ssl_jax.config import Reranking, Sampling, Served, ServedWeights
from ssl_jax.errors import UserError

if TYPE_CHECKING:
    from ssl_jax.conversation import Messages
    from ssl_jax.dialogue import Dialogue
    from ssl_jax.dialogue_model import DialogueModel
    from ssl_jax.replies import Reply


class Generate(Sampling, Reranking, Served, ServedWeights):
    """What to say, to whom, and how to draw the answer."""

    prompt: tuple[str, ...] = Field(default=(), description="What the user says; several prompts are answered in turn.")
    chat: bool = Field(default=False, description="Read what the user says line by line and keep the conversation.")
    system: str | None = Field(default=None, description="Text of a system turn before the conversation.")
    reply_prefix: str = Field(default="", description="How every reply begins.")
    num_return_sequences: int = Field(default=1, ge=1, le=1024, description="Replies to each prompt.")
    seed: int = Field(default=0, ge=0, lt=2**31, description="Decides the draw: the same seed gives the same replies.")
    stream: bool = Field(default=False, description="Print a reply while it is drawn (always so in a chat).")
    json_lines: bool = Field(default=False, alias="json", description="Print one JSON object a line.")
    token_logprobs: bool = Field(default=False, description="With json: log p of every token of the reply (nats).")

    @model_validator(mode="after")
    def _one_thing_to_do(self) -> Generate:
        if self.chat and (self.prompt or self.json_lines or self.num_return_sequences > 1):
            raise ValueError("--chat reads prompts from the input; drop --prompt, --json and --num-return-sequences")
        if not self.chat and not self.prompt:
            raise ValueError("--prompt needs a text (or --chat)")
        if self.stream and (self.json_lines or self.num_return_sequences > 1):
            raise ValueError("--stream prints one reply as text; drop --json and --num-return-sequences")
        if (self.stream or self.chat) and self.num_beams > 1:
            raise ValueError("--stream and --chat: num_beams: a beam search has nothing to show before its end")
        if (self.stream or self.chat) and self.candidates > 1:
            raise ValueError("--stream and --chat: candidates: nothing can be shown before all are drawn; use 1")
        return self


def main(arguments: Sequence[str]) -> None:
    """Loads the model and prints its replies."""
    with distributed.before_joining():
        command = command_line.parse(
            Generate, arguments, program="python -m ssl_jax.generate", summary=(__doc__ or "").strip()
        )
    distributed.join()
    agreement.check(command.model_dump(mode="json"))
    if command.chat and distributed.process_count() > 1:
        raise UserError(
            f"--chat reads the input of one process, and this is one of {distributed.process_count()}; "
            "give --prompt, or start it on one host that has its devices to itself"
        )
    # The others take part in drawing, and have nothing to say.
    silence = contextlib.nullcontext() if distributed.is_primary() else contextlib.redirect_stdout(io.StringIO())
    with silence:
        _generate(command)


def _generate(command: Generate) -> None:
    """Loads the model and answers."""
    from ssl_jax import compilation_cache, loading
    from ssl_jax.conversation import as_prompt

    compilation_cache.enable()
    opening = [] if command.system is None else [{"role": "system", "content": command.system}]
    prompts = [as_prompt([*opening, {"role": "user", "content": text}] if opening else text) for text in command.prompt]
    model = loading.load_named(command.workdir, command.model, command.template, command.weights)
    options = command.model_dump(include=set(Sampling.model_fields))
    if command.chat:
        _chat(model, opening, options, command)
    elif command.stream:
        for text, prompt in zip(command.prompt, prompts, strict=True):
            if len(prompts) > 1:
                print(f"> {text}")
            _print_stream(model, prompt.to_messages(), options, command)
    else:
        _answer(model, prompts, options, command)


def _answer(model: DialogueModel, prompts: Sequence[Dialogue], options: dict[str, Any], command: Generate) -> None:
    """Prints the replies to every prompt, as text or as JSON Lines."""
    from ssl_jax.dialogue_model import describe_dropped

    drawn = model.draw(
        prompts,
        Sampling.model_validate(options),
        num_return_sequences=command.num_return_sequences,
        seed=command.seed,
        reply_prefix=command.reply_prefix,
        reranking=Reranking.model_validate(command.model_dump(include=set(Reranking.model_fields))),
    )
    for text, replies in zip(command.prompt, drawn, strict=True):
        if replies[0].dropped_tokens and distributed.is_primary():
            print(f"note: {describe_dropped(replies[0].dropped_turns, replies[0].dropped_tokens)}", file=sys.stderr)
        if not command.json_lines and len(drawn) > 1:
            print(f"> {text}")
        for reply in replies:
            print(_json_line(text, reply, command) if command.json_lines else reply.text)


def _json_line(prompt: str, reply: Reply, command: Generate) -> str:
    line: dict[str, Any] = {
        "prompt": prompt,
        "reply": reply.text,
        "tokens": reply.tokens,
        "logprob": reply.logprob,
        "finish_reason": reply.finish_reason,
    }
    if reply.dropped_tokens:
        line |= {"dropped_turns": reply.dropped_turns, "dropped_tokens": reply.dropped_tokens}
    if command.token_logprobs:
        line |= {"token_ids": reply.token_ids, "token_logprobs": reply.token_logprobs}
    return json.dumps(line, ensure_ascii=False)


def _chat(model: DialogueModel, opening: Messages, options: dict[str, Any], command: Generate) -> None:
    """Answers line by line until the input ends; every reply has a seed of its own."""
    if sys.stdin.isatty():
        print("say something; an empty line or Ctrl-D ends the conversation", file=sys.stderr)
    messages = list(opening)
    for turn in itertools.count():
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        said = sys.stdin.readline().strip()
        if not said:
            return
        messages.append({"role": "user", "content": said})
        reply = _print_stream(model, messages, options, command, seed=(command.seed + turn) % 2**31)
        messages.append({"role": "assistant", "content": reply})


def _print_stream(
    model: DialogueModel, messages: Messages, options: dict[str, Any], command: Generate, seed: int | None = None
) -> str:
    """Prints a reply while it is drawn; returns it."""
    pieces = []
    seed = command.seed if seed is None else seed
    for piece in model.stream_response(messages, seed=seed, reply_prefix=command.reply_prefix, **options):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print(flush=True)
    return "".join(pieces)


if __name__ == "__main__":
    command_line.run(main)
