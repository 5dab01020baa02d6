"""Answers prompts: `python -m ssl_jax.generate --workdir DIR --prompt TEXT [TEXT …] [--json]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from ssl_jax import command_line
from ssl_jax.config import Sampling
from ssl_jax.errors import UserError


class Generate(Sampling):
    """What to say, to whom, and how to draw the answer."""

    workdir: str = Field(description="Work directory of a run.")
    prompt: tuple[str, ...] = Field(description="What the user says; several prompts are answered in turn.")
    num_return_sequences: int = Field(default=1, ge=1, le=1024, description="Replies to each prompt.")
    seed: int = Field(default=0, ge=0, lt=2**31, description="Decides the draw: the same seed gives the same replies.")
    json_lines: bool = Field(default=False, alias="json", description="Print one JSON object a line.")


def main(arguments: Sequence[str]) -> None:
    """Loads the newest good model of the run and prints its replies."""
    command = command_line.parse(
        Generate, arguments, program="python -m ssl_jax.generate", summary=(__doc__ or "").strip()
    )
    if not command.prompt:
        raise UserError("--prompt needs a text")

    from ssl_jax import dialogue_model

    prompts = [dialogue_model.as_prompt(text) for text in command.prompt]
    model = dialogue_model.load(Path(command.workdir))
    settings = Sampling.model_validate(command.model_dump(include=set(Sampling.model_fields)))
    limit = model.prompt_limit(settings)
    for prompt in prompts:
        if (tokens := len(model.tokenizer.encode(prompt).tokens) + 1) > limit:
            print(
                f"note: a prompt of {tokens} tokens is longer than the {limit} that model.n_positions "
                f"{model.shape.n_positions} leaves; its newest tokens are read",
                file=sys.stderr,
            )
    drawn = model.draw(prompts, settings, num_return_sequences=command.num_return_sequences, seed=command.seed)
    for text, replies in zip(command.prompt, drawn, strict=True):
        if not command.json_lines and len(drawn) > 1:
            print(f"> {text}")
        for reply in replies:
            if command.json_lines:
                line = {
                    "prompt": text,
                    "reply": reply.text,
                    "tokens": reply.tokens,
                    "logprob": reply.logprob,
                    "finish_reason": reply.finish_reason,
                }
                print(json.dumps(line, ensure_ascii=False))
            else:
                print(reply.text)


if __name__ == "__main__":
    command_line.run(main)
