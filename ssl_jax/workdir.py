"""The files of a work directory that describe a run as a whole, and loading a model from one."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl_jax import files, manifest, storage
from ssl_jax.command_line import dump_yaml, read_yaml, validate
from ssl_jax.config import Config
from ssl_jax.errors import UserError
from ssl_jax.shown import shortened
from ssl_jax.storage import Place

CHECKPOINTS = "checkpoints"
PSEUDO_LABELS = "pseudo_labels"
BACK_TRANSLATIONS = "back_translations"
TOKENIZER = "tokenizer"
CONFIG = "config.yaml"
DATA = "data.json"
PLAN = "plan.json"

# The first line of a configuration that we wrote: a changed byte below it shows.
_SEAL = b"# sha256 of what follows: "

_MENDS = "the same training command writes it again (python -m ssl_jax.train)"
# What is shown of the summary of a run that is done.
_SHOWN = {"steps", "seconds", "split", "evaluation", "human", "tokens_by_stream", "checkpoint"}

_log = logging.getLogger(__name__)

# Fields that may differ when a run goes on: where things are, and on how many devices, not what they are. Rows of a
# device may, rows of a step may not, which whoever restores a checkpoint makes sure of.
FREE_FIELDS = (
    "workdir",
    "data.prepared_dir",
    "train.logging_steps",
    "train.save_total_limit",
    "train.hang_warning_seconds",
    "train.per_device_train_batch_size",
    "train.per_device_eval_batch_size",
    "train.gradient_accumulation_steps",
    "pseudo_labels.batch_size",
    "model.remat",
    "model.scan_unroll",
    "model.attn_implementation",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
)


def claim(place: Place, config: Config) -> None:
    """Makes the directory and writes `config.yaml`, or checks that the run there has the same configuration.

    A directory without checkpoints holds nothing that another configuration could spoil: whoever corrects a mistake
    goes on in the directory that the failed attempt left. Checkpoints know the configuration too (`fingerprint`), so
    that a damaged `config.yaml` can be written again.

    Raises:
      UserError: the run there differs, naming the fields; or the directory cannot be written.
    """
    place.check_writable()
    place.pull()
    directory, path = place.local, place.local / CONFIG
    for folder in directory.glob("*/round_*"):
        # A run that was killed while it sent a round to a bucket: the round is made again.
        if re.fullmatch(r"round_\d+", folder.name) and not (folder / "summary.json").is_file():
            shutil.rmtree(folder)
    has_begun = (directory / CHECKPOINTS).is_dir()
    if _is_damaged(path) or (has_begun and not path.is_file()):
        _warn_of(path)
    elif has_begun:
        differing = _differences(_flatten(read_yaml(path)), _flatten(config.model_dump(mode="json")))
        if differing:
            shown = "; ".join(differing[:3]) + (f"; and {len(differing) - 3} more" if len(differing) > 3 else "")
            raise UserError(
                f"{place.name} holds a run with another configuration ({shown}); name another --workdir or remove it"
            )
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        text = dump_yaml(config.model_dump(mode="json")).encode()
        with files.replacing(path) as stream:
            stream.write(_SEAL + hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
    except OSError as error:
        raise UserError(f"{place.name}: cannot be written: {error.strerror}; name another --workdir") from None
    place.push()


def claim_data(place: Place, summary: Mapping[str, Any]) -> None:
    """Writes the prepared data's summary to `data.json`, or checks that the run there has seen the same data.

    Raises:
      UserError: the data differ from those that the checkpoints were trained on.
    """
    path = place.local / DATA
    if (place.local / CHECKPOINTS).is_dir():
        if _read_data(path) is not None:
            check_data(place, summary)
            return
        _warn_of(path)
    with files.replacing(path) as stream:
        stream.write(manifest.encode(summary))
    place.push(DATA)


def check_data(place: Place, summary: Mapping[str, Any]) -> None:
    """Checks that prepared data are those of the run there, if one has begun: others may mean other things by an id.

    Raises:
      UserError: they are not, or what the run's were is not known any more.
    """
    path = place.local / DATA
    if not path.is_file():
        return
    stored = _read_data(path)
    if stored is None:
        raise UserError(f"{path} is damaged; {_MENDS}")
    if stored["content_hash"] != summary["content_hash"]:
        raise UserError(
            f"{place.name}: the files that `data` names have changed since the run began; "
            "restore them, or train in another --workdir"
        )


def check_tokenizer(place: Place, fingerprint: str) -> None:
    """Checks that a tokenizer is the one that the run's data were made with.

    Raises:
      UserError: it is not.
    """
    stored = _read_data(place.local / DATA)
    if stored is not None and stored.get("tokenizer", fingerprint) != fingerprint:
        raise UserError(f"{place.local / TOKENIZER} is not the tokenizer that the run was trained with; {_MENDS}")


def fingerprint(config: Config) -> str:
    """SHA-256 (hex) of all fields that may not differ when a run goes on."""
    fields = _flatten(config.model_dump(mode="json"))
    content = json.dumps({name: value for name, value in fields.items() if name not in FREE_FIELDS}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def find(name: str | Path | Place) -> Place:
    """The place of a run that may have begun, with the small files here that loading its model takes.

    Raises:
      UserError: it is in a bucket that cannot be read.
    """
    place = storage.place(name)
    place.pull(CONFIG, DATA, TOKENIZER)
    return place


def read_config(name: str | Path | Place) -> Config:
    """The configuration of the run in a work directory.

    Raises:
      UserError: the directory does not exist or holds no run.
    """
    place = find(name)
    path = place.local / CONFIG
    if not path.is_file():
        what = "is not a work directory (it has no config.yaml)" if place.local.is_dir() else "does not exist"
        raise UserError(f"--workdir {place.name} {what}; train one with python -m ssl_jax.train --config FILE")
    if _is_damaged(path):
        raise UserError(f"{path} is damaged, or was edited below its first line; {_MENDS}, or remove that line")
    return validate(Config, read_yaml(path), origin=str(path))


def read_summary(directory: Path) -> dict[str, Any] | None:
    """The summary of a run that has ended well, or None; of one that is damaged, the run's end is done again."""
    path = directory / "summary.json"
    if not path.is_file():
        return None
    try:
        summary = files.read_json(path)
    except ValueError:
        summary = None
    if not isinstance(summary, dict) or not summary.keys() >= _SHOWN:
        _log.warning("%s is damaged; it is made again", path)
        return None
    return summary


def _warn_of(path: Path) -> None:
    what = "is damaged" if path.exists() else "is not there"
    _log.warning("%s %s; it is written again, and compared with what the checkpoints know of it", path, what)


def _is_damaged(path: Path) -> bool:
    """Whether a configuration is there that is not what we wrote; one without our first line is a person's."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    first, _, rest = content.partition(b"\n")
    is_ours = first.startswith(_SEAL)
    return not content or (is_ours and first != _SEAL + hashlib.sha256(rest).hexdigest().encode())


def _read_data(path: Path) -> dict[str, Any] | None:
    """What `claim_data` wrote, or None if it is not there as it was written."""
    try:
        return manifest.decode(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; {_MENDS} when it is out of the way") from None


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix.removesuffix("."): values}
    return {path: leaf for name, value in values.items() for path, leaf in _flatten(value, f"{prefix}{name}.").items()}


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    fields = [name for name in {**there, **here} if name not in FREE_FIELDS]
    return [
        f"{name} is {shortened(there.get(name))} there, {shortened(here.get(name))} here"
        for name in fields
        if there.get(name) != here.get(name)
    ]
