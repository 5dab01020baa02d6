"""From a configuration to a prepared directory: read, check, clean, split, fit the tokenizer, encode, store.

The directory's name is a hash of everything that decides its content, so an equal request finds it and a changed
source makes another one. `data.prepared_dir` holds these directories, and copies of the `summary.json` and the
`rejected.jsonl` of the request that came last, where people and scripts look for them.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_jax import files
from ssl_jax.config import Config, Source
from ssl_jax.data import chitchat, formats, splits, store
from ssl_jax.data.clean import STEPS, Counts, clean, drop_duplicates, text_hash
from ssl_jax.data.formats import Expected, Rejected
from ssl_jax.data.store import Prepared, Record
from ssl_jax.data.tokenizer import DialogueTokenizer, count_reply_bytes
from ssl_jax.dialogue import Dialogue
from ssl_jax.errors import UserError

# What a tokenizer may be made of. Weights often lie beside it, and are no part of it.
_TOKENIZER_SUFFIXES = {".json", ".txt", ".jinja"}

# A dialogue and the bytes of its replies as the source wrote them.
_Item = tuple[Dialogue, int]


def prepare(config: Config, say: Callable[[str], None] = print) -> Prepared:
    """Prepares the data that `config` names, or finds it prepared.

    Args:
      config: the run's configuration; `data`, `tokenizer` and (for a split by fraction) `seed` decide the result.
      say: called with a line of progress for a person.

    Raises:
      UserError: a source that is missing or cannot be read, no labeled rows, no unlabeled rows although the
        configuration trains on them, or too many malformed rows.
    """
    sources = _resolve(config)
    content_hash = _content_hash(config, sources)
    directory = Path(config.data.prepared_dir) / content_hash[:16]
    if (directory / "summary.json").is_file():
        say(f"prepared data: {directory} (found)")
        prepared = Prepared.open(directory)
    else:
        prepared = _build(config, sources, directory, content_hash, say)
        say(f"prepared data: {directory}")
    for name in ("summary.json", "rejected.jsonl"):
        files.write_text(directory.parent / name, (directory / name).read_text(encoding="utf-8"))
    if config.train.unlabeled_ratio > 0 and not set(prepared.splits).intersection(store.UNLABELED_SPLITS):
        raise UserError(
            "data.unlabeled: no unlabeled dialogues, but train.unlabeled_ratio is "
            f"{config.train.unlabeled_ratio:g}; add a source or set train.unlabeled_ratio 0"
        )
    return prepared


@dataclasses.dataclass(frozen=True)
class _ResolvedSource:
    """A source, checked, and the files whose bytes decide what it yields."""

    expected: Expected
    source: Source
    files: tuple[Path, ...]

    @property
    def name(self) -> str:
        regime = f":{self.source.regime}" if self.source.regime else ""
        return f"{self.source.path or self.source.dataset}{regime}"


@dataclasses.dataclass
class _Gathered:
    """What the sources yielded, before cleaning."""

    labeled: dict[str, list[_Item]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    unsplit: list[_Item] = dataclasses.field(default_factory=list)
    unlabeled: list[_Item] = dataclasses.field(default_factory=list)
    rejected: list[Rejected] = dataclasses.field(default_factory=list)
    accepted: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


def _resolve(config: Config) -> list[_ResolvedSource]:
    """Finds every source's files, so that a mistake in any of them is reported before work begins."""
    if not config.data.labeled:
        raise UserError("data.labeled: no source; name a file of dialogues that end in an assistant turn")
    if not config.data.unlabeled and config.train.unlabeled_ratio > 0:
        raise UserError(
            f"data.unlabeled: no source, but train.unlabeled_ratio is {config.train.unlabeled_ratio:g}; "
            "add a source or set train.unlabeled_ratio 0"
        )
    resolved = []
    sections: tuple[tuple[Expected, Sequence[Source]], ...] = (
        ("labeled", config.data.labeled),
        ("unlabeled", config.data.unlabeled),
    )
    for expected, sources in sections:
        for source in sources:
            resolved.append(_ResolvedSource(expected, source, _source_files(expected, source)))
    if sum(1 for source in config.data.labeled if source.dataset) > 1:
        raise UserError("data.labeled: dataset chitchat is named twice")
    return resolved


def _source_files(expected: Expected, source: Source) -> tuple[Path, ...]:
    where = f"data.{expected}"
    if source.tfds:
        raise UserError(f"{where}: tfds {source.tfds!r} cannot be read yet; export it to JSON Lines and name the path")
    if source.dataset:
        allowed = (None, "labeled") if expected == "labeled" else ("logs", "turns", "prompts", "fragments")
        if source.regime not in allowed:
            names = ", ".join(name for name in allowed if name)
            raise UserError(f"{where}: dataset {source.dataset} with regime {source.regime!r}; use one of: {names}")
        return (chitchat.data_file(),)
    if source.regime:
        raise UserError(f"{where}: {source.path}: regime {source.regime!r} is for packaged data sets; remove it")
    try:
        return tuple(formats.find_files(source))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _content_hash(config: Config, sources: Sequence[_ResolvedSource]) -> str:
    """SHA-256 (hex) of all that decides the prepared content: bytes of the sources, settings, and our own version."""
    digests: dict[Path, str] = {}

    def file_hash(file: Path) -> str:
        if file not in digests:
            try:
                with open(file, "rb") as stream:
                    digests[file] = hashlib.file_digest(stream, "sha256").hexdigest()
            except OSError as error:
                raise UserError(f"{file}: cannot be read: {error.strerror}") from None
        return digests[file]

    tokenizer: Any = config.tokenizer.vocab_size
    if config.tokenizer.name_or_path:
        folder = Path(config.tokenizer.name_or_path)
        texts = sorted(f for f in folder.iterdir() if f.suffix in _TOKENIZER_SUFFIXES) if folder.is_dir() else []
        hashes = [[file.name, file_hash(file)] for file in texts]
        tokenizer = [config.tokenizer.name_or_path, config.tokenizer.template, hashes]
    ingredients = {
        "format_version": store.FORMAT_VERSION,
        "steps": [step.__name__ for step in STEPS],
        "data": config.data.model_dump(exclude={"prepared_dir"}),
        "seed": config.seed if config.data.split_by == "fraction" else None,
        "tokenizer": tokenizer,
        "sources": [
            [resolved.expected, [[file.name, file_hash(file)] for file in resolved.files]] for resolved in sources
        ],
    }
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def _build(
    config: Config,
    sources: Sequence[_ResolvedSource],
    directory: Path,
    content_hash: str,
    say: Callable[[str], None],
) -> Prepared:
    name = config.tokenizer.name_or_path
    pretrained = DialogueTokenizer.load(name, template=config.tokenizer.template) if name else None
    gathered = _gather(config, sources)
    rejected = [_rejected_row(row) for row in gathered.rejected]
    _check_rejected(config, gathered, directory, rejected)
    if not gathered.unsplit and not gathered.labeled["labeled_train"]:
        names = ", ".join(resolved.name for resolved in sources if resolved.expected == "labeled")
        raise UserError(
            f"data.labeled: no labeled dialogues in {names}; a row has messages that end in an assistant turn"
        )
    say(f"read {sum(gathered.accepted.values())} dialogues, rejected {len(rejected)} rows")

    counts = Counts()
    parts = _split_and_clean(config, gathered, counts)
    tokenizer = pretrained or _fit_tokenizer(config, parts)
    made = f", template {tokenizer.template}" if pretrained else ", fitted on the train text"
    say(f"tokenizer of {tokenizer.vocab_size} tokens{made}")
    summary = {
        "content_hash": content_hash,
        "rejected": dict(collections.Counter(row.reason for row in gathered.rejected)),
        "removed": dict(counts.removed),
        "changed": dict(counts.changed),
        "sources": dict(gathered.accepted),
    }
    records = {split: _records(items, tokenizer) for split, items in parts.items()}
    return store.write(directory, records, tokenizer, summary, rejected)


def _gather(config: Config, sources: Sequence[_ResolvedSource]) -> _Gathered:
    """Reads every source, in order."""
    gathered = _Gathered()
    names = _short_names([file for resolved in sources if resolved.source.path for file in resolved.files])
    seen: dict[Expected, dict[str, str]] = {"labeled": {}, "unlabeled": {}}
    packaged = [resolved for resolved in sources if resolved.source.dataset]
    _gather_chitchat(packaged, gathered)
    for resolved in sources:
        if resolved in packaged:
            continue
        accepted = 0
        target = gathered.unsplit if resolved.expected == "labeled" else gathered.unlabeled
        for row in formats.read(
            resolved.source, resolved.expected, config.data.max_turn_bytes, names, seen[resolved.expected]
        ):
            if isinstance(row, Rejected):
                gathered.rejected.append(row)
                continue
            target.append((row, count_reply_bytes(row)))
            accepted += 1
            if accepted == resolved.source.max_dialogues:
                break
        gathered.accepted[resolved.name] += accepted
    return gathered


def _gather_chitchat(packaged: Sequence[_ResolvedSource], gathered: _Gathered) -> None:
    """Adds the packaged data set's parts; what a label budget leaves goes to the unlabeled regimes."""
    if not packaged:
        return
    split = chitchat.split_by_time(chitchat.load(packaged[0].files[0]))
    labeled = [resolved for resolved in packaged if resolved.expected == "labeled"]
    taken = 0
    for resolved in labeled:
        parts = chitchat.labeled(split, resolved.source.max_dialogues)
        taken = len(parts["train"])
        for part, dialogues in parts.items():
            gathered.labeled[f"labeled_{part}"] += [(dialogue, count_reply_bytes(dialogue)) for dialogue in dialogues]
            gathered.accepted[resolved.name] += len(dialogues)
    for resolved in packaged:
        regime = resolved.source.regime
        if resolved.expected == "unlabeled" and regime is not None and regime != "labeled":
            dialogues = chitchat.unlabeled(split, regime, taken, resolved.source.max_dialogues)
            gathered.unlabeled += [(dialogue, count_reply_bytes(dialogue)) for dialogue in dialogues]
            gathered.accepted[resolved.name] += len(dialogues)


def _short_names(files: Sequence[Path]) -> dict[Path, str]:
    """File names without folders, which keep ids stable when data moves; the whole path where two would be equal."""
    folders = collections.defaultdict(set)
    for file in files:
        folders[file.name].add(file.parent)
    return {file: file.name if len(folders[file.name]) == 1 else str(file) for file in files}


def _check_rejected(config: Config, gathered: _Gathered, directory: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Stops when too many rows are malformed, leaving the list of them in `data.prepared_dir`."""
    total = len(rows) + sum(gathered.accepted.values())
    if not rows or len(rows) <= config.data.max_rejected_fraction * total:
        return
    path = directory.with_name("rejected.jsonl")
    store.make_folder(path.parent)
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    reasons = collections.Counter(row.reason for row in gathered.rejected).most_common()
    first = gathered.rejected[0]
    raise UserError(
        f"{len(rows)} of {total} rows are malformed ({', '.join(f'{reason}: {count}' for reason, count in reasons)}), "
        f"more than data.max_rejected_fraction {config.data.max_rejected_fraction:g}\n"
        f"first: {first.file}:{first.line}: {first.reason}{f' ({first.detail})' if first.detail else ''}; all: {path}"
    )


def _rejected_row(row: Rejected) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(row).items() if value != ""}


def _split_and_clean(config: Config, gathered: _Gathered, counts: Counts) -> dict[str, list[_Item]]:
    """Clean dialogues by split, none of them on two sides."""
    parts = {split: list(clean(gathered.labeled.get(split, ()), counts)) for split in store.LABELED_SPLITS}
    unsplit = list(clean(gathered.unsplit, counts))
    data = config.data
    sides = splits.assign(
        [dialogue for dialogue, _ in unsplit], data.split_by, data.test_size, data.dev_size, config.seed
    )
    for item, side in zip(unsplit, sides, strict=True):
        parts[f"labeled_{side}"].append(item)
    unlabeled = list(clean(gathered.unlabeled, counts))
    for split, kind in (("raw_train", "raw"), ("prompt_train", "prompt")):
        parts[split] = [item for item in unlabeled if item[0].kind == kind]

    def hashes(*names: str) -> set[bytes]:
        return {text_hash(dialogue) for name in names for dialogue, _ in parts[name]}

    test = hashes("labeled_test", "labeled_test_seen")
    parts["labeled_dev"] = list(drop_duplicates(parts["labeled_dev"], test, set(), counts))
    held_out = test | hashes("labeled_dev")
    parts["labeled_train"] = list(drop_duplicates(parts["labeled_train"], held_out, set(), counts))
    labeled = hashes("labeled_train")
    for split in store.UNLABELED_SPLITS:
        # A prompt may repeat raw text: the two are learned from in different ways.
        parts[split] = list(drop_duplicates(parts[split], held_out, set(labeled), counts))
    return parts


def _fit_tokenizer(config: Config, parts: Mapping[str, Sequence[_Item]]) -> DialogueTokenizer:
    """Fits a BPE on what may be learned from: no held-out text."""
    train = [parts[split] for split in ("labeled_train", *store.UNLABELED_SPLITS)]
    texts = (turn.content for items in train for dialogue, _ in items for turn in dialogue.turns)
    return DialogueTokenizer.fit(texts, config.tokenizer.vocab_size)


def _records(items: Sequence[_Item], tokenizer: DialogueTokenizer) -> Iterator[Record]:
    for (dialogue, _), encoded in zip(items, tokenizer.encode_all(items), strict=True):
        yield Record(encoded, dialogue)
