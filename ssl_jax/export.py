"""Writes a model for other programs: `python -m ssl_jax.export --workdir DIR --output DIR [--check]`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from ssl_jax import command_line, storage
from ssl_jax.config import Sampling, Served
from ssl_jax.config.paths import check_path
from ssl_jax.errors import UserError

if TYPE_CHECKING:
    from ssl_jax.dialogue_model import DialogueModel
    from ssl_jax.export_check import Check

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMG]?I?B)", re.IGNORECASE)


class Export(Served):
    """Which model, where to, and in which form."""

    output: str = Field(description="Directory to write; it must be new, empty or an earlier export.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="Type of the weights.")
    max_shard_size: str = Field(
        default="5GB", description="Weights are cut into files up to this size, such as 500MB or 2GiB."
    )
    check: bool = Field(
        default=False, description="Load the result with transformers and compare logits and token ids (needs PyTorch)."
    )
    overwrite: bool = Field(default=False, description="Replace an earlier export.")

    _paths = field_validator("output")(check_path)

    @field_validator("max_shard_size")
    @classmethod
    def _is_a_size(cls, value: str) -> str:
        if _bytes(value) < 1:
            raise ValueError(f"a size is a number and a unit, such as 500MB or 2GiB, got {value!r}")
        return value


def main(arguments: Sequence[str]) -> None:
    """Loads the model, writes the directory, says what is in it and, if asked, verifies it."""
    command = command_line.parse(Export, arguments, program="python -m ssl_jax.export", summary=(__doc__ or "").strip())

    from ssl_jax import export_check, huggingface, loading

    # What would stop the export at its end is found before its beginning.
    if storage.is_url(command.output):
        raise UserError(f"--output {command.output}: is written to a folder of this machine; copy it from there")
    output = Path(command.output)
    huggingface.check_output(output, overwrite=command.overwrite)
    if command.check:
        export_check.require_reference()
    model = loading.load_named(command.workdir, command.model, command.template)
    huggingface.write(
        output,
        model.shape,
        model.params,
        dtype=command.dtype,
        max_shard_bytes=_bytes(command.max_shard_size),
        end_ids=model.tokenizer.end_ids,
        end_of_text_id=model.tokenizer.end_of_text_id,
        pad_id=model.tokenizer.pad_id,
        generation=_generation(command),
        add_files=model.tokenizer.save,
        overwrite=command.overwrite,
    )
    _describe(output, model, command.dtype)
    if command.check:
        _report(export_check.compare(output, model, command.dtype))


def _bytes(size: str) -> int:
    """Bytes of a size as Hugging Face spells it; 0 if it is none. KB are thousands, KiB 1024."""
    match = _SIZE.fullmatch(size.strip())
    return int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0


def _generation(command: Export) -> dict[str, Any]:
    """How replies are drawn by default: as the run was evaluated, or as the model came."""
    from ssl_jax import huggingface, workdir

    if command.workdir is None:
        assert command.model is not None
        return huggingface.read_generation(huggingface.locate(command.model))
    return generation_settings(workdir.read_config(command.workdir).evaluation.sampling)


def generation_settings(sampling: Sampling) -> dict[str, Any]:
    """Sampling options as `transformers.GenerationConfig` has them: what is not neutral, and all that defines a draw.

    Texts are left out, since that class holds token ids in their place.
    """
    drawing = ("temperature", "top_k", "top_p", "min_p", "typical_p")
    values = sampling.model_dump(
        mode="json",
        exclude_defaults=True,
        exclude={*drawing, "max_length", "bad_words", "sequence_bias", "stop"},
    )
    values |= {"do_sample": sampling.do_sample, "max_new_tokens": sampling.new_tokens}
    if sampling.do_sample:
        values |= sampling.model_dump(include={"temperature", "top_k", "top_p"})
        values |= sampling.model_dump(include={"min_p", "typical_p"}, exclude_defaults=True)
    return values


def _describe(output: Path, model: DialogueModel, dtype: str) -> None:
    """Prints what was written and how to load it."""
    from ssl_jax.plan import parameter_count

    sizes = {path.name: path.stat().st_size for path in sorted(output.iterdir())}
    megabytes = sum(sizes.values()) / 1e6
    parameters = parameter_count(model.shape)
    print(f"{output}: {parameters:,} parameters, {dtype}, {megabytes:,.1f} MB in {len(sizes)} files")
    for name, size in sizes.items():
        print(f"  {name}  {size:,} bytes")
    print(f"load it with transformers.GPT2LMHeadModel.from_pretrained({str(output)!r})")


def _report(checks: Sequence[Check]) -> None:
    for check in checks:
        print(f"check: {check}")
    failed = [check for check in checks if not check.passed]
    if failed:
        raise UserError(f"{failed[0]}; the exported model is not the one that was loaded")


if __name__ == "__main__":
    command_line.run(main)
