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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_jax import files
from ssl_jax.config import Config, Data, Source
from ssl_jax.data import annotation, chatterbot, chitchat, formats, named, splits, store
from ssl_jax.data.cleaning.apply import Counts, clean, step_functions
from ssl_jax.data.duplicates import drop_duplicates, drop_near_duplicates, refuse_leaks, text_hash
from ssl_jax.data.formats import Expected, Rejected
from ssl_jax.data.packaged import Packaged, Part, ResolvedSource
from ssl_jax.data.store import Prepared, Record
from ssl_jax.data.tokenizer import DialogueTokenizer, count_reply_bytes
from ssl_jax.dialogue import Dialogue
from ssl_jax.errors import UserError

# What a tokenizer may be made of. Weights often lie beside it, and are no part of it.
_TOKENIZER_SUFFIXES = {".json", ".txt", ".jinja"}

# The data sets that `Source.dataset` names.
_PACKAGED: Mapping[str, Packaged] = {"chitchat": chitchat, "chatterbot": chatterbot}

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


@dataclasses.dataclass
class _Gathered:
    """What the sources yielded, before cleaning."""

    labeled: dict[str, list[_Item]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    unsplit: list[_Item] = dataclasses.field(default_factory=list)
    unlabeled: list[_Item] = dataclasses.field(default_factory=list)
    rejected: list[Rejected] = dataclasses.field(default_factory=list)
    accepted: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


def _resolve(config: Config) -> list[ResolvedSource]:
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
            resolved.append(ResolvedSource(expected, source, _source_files(expected, source)))
    packaged = [(source.dataset, source.language) for source in config.data.labeled if source.dataset]
    for name, language in packaged:
        if packaged.count((name, language)) > 1:
            raise UserError(f"data.labeled: dataset {' '.join([name, *language])} is named twice")
    return resolved


def _source_files(expected: Expected, source: Source) -> tuple[Path, ...]:
    where = f"data.{expected}"
    try:
        if source.dataset:
            packaged = _PACKAGED[source.dataset]
            allowed = (None, "labeled") if expected == "labeled" else packaged.UNLABELED_REGIMES
            if source.regime not in allowed:
                names = ", ".join(name for name in allowed if name)
                raise UserError(f"dataset {source.dataset} with regime {source.regime!r}; use one of: {names}")
            return tuple(packaged.data_files(source))
        if source.regime:
            place = ResolvedSource(expected, source, ()).place
            raise UserError(f"{place}: regime {source.regime!r} is for packaged data sets; remove it")
        return tuple(formats.find_files(source) if source.path else named.data_files(source))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _content_hash(config: Config, sources: Sequence[ResolvedSource]) -> str:
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
    sources: Sequence[ResolvedSource],
    directory: Path,
    content_hash: str,
    say: Callable[[str], None],
) -> Prepared:
    step_functions(config.data.cleaning)  # a package that a step lacks is told before any work
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
    if config.data.annotate:
        summary["annotation"] = annotation.summarize(dialogue for items in parts.values() for dialogue, _ in items)
    records = {split: _records(items, tokenizer) for split, items in parts.items()}
    return store.write(directory, records, tokenizer, summary, rejected)


def _gather(config: Config, sources: Sequence[ResolvedSource]) -> _Gathered:
    """Reads every source: the packaged data sets, then the others in order."""
    gathered = _Gathered()
    for name in dict.fromkeys(resolved.source.dataset for resolved in sources if resolved.source.dataset):
        ours = [resolved for resolved in sources if resolved.source.dataset == name]
        for resolved, part, row in _PACKAGED[name].dialogues(ours):
            _add(gathered, resolved, row, part)
    in_order = [resolved for resolved in sources if not resolved.source.dataset]
    names = _short_names([file for resolved in in_order if resolved.source.path for file in resolved.files])
    places = _short_names([Path(resolved.place) for resolved in in_order if not resolved.source.path])
    seen: dict[Expected, dict[str, str]] = {"labeled": {}, "unlabeled": {}}
    for resolved in in_order:
        source, expected = resolved.source, resolved.expected
        limit = config.data.max_turn_bytes
        if source.path:
            rows = formats.read(source, expected, limit, names, seen[expected])
        else:
            name = resolved.name.replace(resolved.place, places[Path(resolved.place)], 1)
            rows = named.read(source, expected, limit, name, seen[expected])
        accepted = gathered.accepted[resolved.name]
        for row in rows:
            _add(gathered, resolved, row)
            if source.max_dialogues and gathered.accepted[resolved.name] - accepted == source.max_dialogues:
                break
    return gathered


def _add(gathered: _Gathered, resolved: ResolvedSource, row: Dialogue | Rejected, part: Part | None = None) -> None:
    """Puts a row where it goes, and says in its metadata where it came from unless it knows that itself."""
    if isinstance(row, Rejected):
        gathered.rejected.append(row)
        return
    item = dataclasses.replace(row, metadata={"source": resolved.name, **row.metadata}), count_reply_bytes(row)
    if part is not None:
        gathered.labeled[f"labeled_{part}"].append(item)
    else:
        (gathered.unsplit if resolved.expected == "labeled" else gathered.unlabeled).append(item)
    gathered.accepted[resolved.name] += 1


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
    data = config.data
    parts = {split: list(_kept(gathered.labeled.get(split, ()), data, counts)) for split in store.LABELED_SPLITS}
    unsplit = list(_kept(gathered.unsplit, data, counts))
    sides = splits.assign(
        _dialogues(unsplit), data.split_by, data.test_size, data.dev_size, config.seed, data.near_duplicate_threshold
    )
    for item, side in zip(unsplit, sides, strict=True):
        parts[f"labeled_{side}"].append(item)
    unlabeled = list(_kept(gathered.unlabeled, data, counts))
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
    if data.near_duplicate_threshold is not None:
        _drop_near_duplicates(parts, data.near_duplicate_threshold, counts)
    refuse_leaks(
        [dialogue for split in ("labeled_train", *store.UNLABELED_SPLITS) for dialogue in _dialogues(parts[split])],
        _dialogues(parts["labeled_test"] + parts["labeled_test_seen"] + parts["labeled_dev"]),
    )
    # Last, since it changes texts; and never to held-out dialogues, which it would tell what their reply is about.
    parts["labeled_train"] = [
        (annotation.keyword_prefix(dialogue, data.keyword_prefix, data.language), size)
        for dialogue, size in parts["labeled_train"]
    ]
    return parts


def _kept(items: Iterable[_Item], data: Data, counts: Counts) -> Iterator[_Item]:
    """Clean dialogues that meet the conditions, annotated."""
    for dialogue, size in clean(items, counts, data.cleaning):
        kept = annotation.select(dialogue, data)
        if kept is None:
            counts.add("keep_if", dialogue, None)
        else:
            yield kept, size


def _drop_near_duplicates(parts: dict[str, list[_Item]], threshold: float, counts: Counts) -> None:
    """Takes what nearly repeats out of `parts`, in the order in which `_split_and_clean` takes out repetitions."""
    held_out = _dialogues(parts["labeled_test"] + parts["labeled_test_seen"])
    parts["labeled_dev"] = drop_near_duplicates(parts["labeled_dev"], held_out, (), threshold, counts)
    held_out += _dialogues(parts["labeled_dev"])
    parts["labeled_train"] = drop_near_duplicates(parts["labeled_train"], held_out, (), threshold, counts)
    labeled = _dialogues(parts["labeled_train"])
    for split in store.UNLABELED_SPLITS:
        parts[split] = drop_near_duplicates(parts[split], held_out, labeled, threshold, counts)


def _dialogues(items: Sequence[_Item]) -> list[Dialogue]:
    return [dialogue for dialogue, _ in items]


def _fit_tokenizer(config: Config, parts: Mapping[str, Sequence[_Item]]) -> DialogueTokenizer:
    """Fits a BPE on what may be learned from: no held-out text."""
    train = [parts[split] for split in ("labeled_train", *store.UNLABELED_SPLITS)]
    texts = (turn.content for items in train for dialogue, _ in items for turn in dialogue.turns)
    return DialogueTokenizer.fit(texts, config.tokenizer.vocab_size)


def _records(items: Sequence[_Item], tokenizer: DialogueTokenizer) -> Iterator[Record]:
    for (dialogue, _), encoded in zip(items, tokenizer.encode_all(items), strict=True):
        yield Record(encoded, dialogue)
