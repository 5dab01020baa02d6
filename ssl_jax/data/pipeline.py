"""From a configuration to a prepared directory: read, check, clean, select, fit the tokenizer, encode, store.

The directory's name is a hash of everything that decides its content, so an equal request finds it and a changed
source makes another one. `data.prepared_dir` holds these directories, and copies of the `summary.json` and the
`rejected.jsonl` of the request that came last, where people and scripts look for them.

Texts are never in memory all at once. The sources are cut into pieces; each becomes clean dialogues in a spool on disk,
and a few numbers of every dialogue, from which it is decided what becomes of it. Then each shard is encoded from the
spool. Pieces and shards are independent of each other and complete or absent, so that several processes make them and
an interrupted call is continued.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import functools
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssl_jax import distributed, files, manifest, storage
from ssl_jax.config import Config, Data
from ssl_jax.data import (
    account,
    annotation,
    beam_runner,
    pieces,
    processes,
    selection,
    shards,
    sources,
    spool,
    store,
)
from ssl_jax.data.cleaning.apply import step_functions
from ssl_jax.data.formats import Rejected
from ssl_jax.data.packaged import ResolvedSource
from ssl_jax.data.selection import Selection
from ssl_jax.data.shards import Record
from ssl_jax.data.spool import Spool
from ssl_jax.data.store import Prepared
from ssl_jax.data.tokenizer import DialogueTokenizer
from ssl_jax.dialogue import Dialogue
from ssl_jax.errors import UserError

# Shards as large as this are made one after the other even where few would do.
_MIN_SHARD_BYTES = 2**22
_MAX_SHARD_BYTES = 2**30
_SHARDS = 64
_SECONDS_BETWEEN_NEWS = 10.0

_log = logging.getLogger(__name__)


def prepare(config: Config, say: Callable[[str], None] = print) -> Prepared:
    """Prepares the data that `config` names, or finds it prepared.

    Args:
      config: the run's configuration; `data`, `tokenizer` and (for a split by fraction) `seed` decide the result.
      say: called with a line of progress for a person.

    Raises:
      UserError: a source that is missing or cannot be read, no labeled rows, no unlabeled rows although the
        configuration trains on them, too many malformed rows, or a folder that cannot be written.
    """
    resolved = sources.resolve(config)
    content_hash = sources.content_hash(config, resolved)
    place = storage.place(config.data.prepared_dir, shared=True)
    directory = place.local / content_hash[:16]
    place.pull_complete(directory.name)
    damage = _damage(place, directory)
    if damage is None and directory.is_dir():
        say(f"prepared data: {directory} (found)")
        prepared = Prepared.open(directory)
    else:
        if damage is not None:
            _log.warning("prepared data %s is damaged: %s; it is made again from its sources", directory, damage)
        # What is missing is told before any work, and before anything that was begun is touched.
        step_functions(config.data.cleaning)
        if config.data.beam_options is not None:
            beam_runner.check(config.data.beam_options)
        place.check_writable()
        shards.make_folder(directory.parent)
        try:
            with _working_directory(directory, say) as working:
                prepared = _build(config, resolved, working, directory, content_hash, say)
        except processes.Killed:
            raise UserError(
                "a process that prepared data was killed (out of memory?) or could not start (in a script of your own, "
                "call prepare under if __name__ == '__main__')\n"
                "run the same again, with a smaller data.num_proc: it goes on where it stopped"
            ) from None
        except OSError as error:
            what = f"{error.filename}: " if error.filename else ""
            raise UserError(
                f"data.prepared_dir {directory.parent}: cannot be written: {what}{error.strerror or error}\n"
                "what is done is kept: make room, and run the same command again"
            ) from error
        say(f"prepared data: {directory}")
    for name in ("summary.json", "rejected.jsonl"):
        files.write_text(directory.parent / name, (directory / name).read_text(encoding="utf-8"))
    (place.push_complete if damage is None else place.push)(directory.name)
    place.push("summary.json", "rejected.jsonl")
    if config.train.unlabeled_ratio > 0 and not set(prepared.splits).intersection(store.UNLABELED_SPLITS):
        raise UserError(
            "data.unlabeled: no unlabeled dialogues, but train.unlabeled_ratio is "
            f"{config.train.unlabeled_ratio:g}; add a source or set train.unlabeled_ratio 0"
        )
    return prepared


def _damage(place: storage.Place, directory: Path) -> str | None:
    """What is wrong with a prepared directory, if there is one; of a bucket, after it was brought here once more.

    Where several processes see the same folder, the first one, which comes here first, looks for all.
    """
    if not directory.is_dir() or not (distributed.is_primary() or isinstance(place, storage.Bucket)):
        return None
    damage = store.problem(directory)
    if damage is not None and isinstance(place, storage.Bucket):
        shutil.rmtree(directory)
        place.pull_complete(directory.name)
        damage = store.problem(directory)
    return damage


def find(config: Config) -> Prepared | None:
    """The data that `config` names, if it is prepared already; its records are not verified.

    Raises:
      UserError: a source is missing or contradicts itself.
    """
    place = storage.place(config.data.prepared_dir, shared=True)
    directory = place.local / sources.content_hash(config, sources.resolve(config), remember=False)[:16]
    place.pull_complete(directory.name)
    return Prepared.open(directory) if store.problem(directory, with_records=False) is None else None


@contextlib.contextmanager
def _working_directory(directory: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """The folder in which `directory` is made, which other processes wait for; an interrupted call leaves it."""
    working = directory.with_name(f".{directory.name}.incomplete")
    while True:
        working.mkdir(exist_ok=True)
        with open(working / shards.LOCK, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another process prepares {directory}; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            # Whoever had the lock may have finished and moved the folder away.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(working / shards.LOCK)):
                    try:
                        yield working
                    except UserError:  # to be continued by nobody: what is fixed has another name
                        shutil.rmtree(working, ignore_errors=True)
                        raise
                    return


def _build(
    config: Config,
    resolved: Sequence[ResolvedSource],
    working: Path,
    directory: Path,
    content_hash: str,
    say: Callable[[str], None],
) -> Prepared:
    if directory.is_dir():
        if store.problem(directory) is None:  # made by whom we waited for
            shutil.rmtree(working, ignore_errors=True)
            return Prepared.open(directory)
        shutil.rmtree(directory)
    data = config.data
    name = config.tokenizer.name_or_path
    wanted = config.tokenizer
    try:
        pretrained = (
            DialogueTokenizer.load(name, wanted.template, direction_tokens=wanted.direction_tokens) if name else None
        )
    except UserError as error:
        raise UserError(f"tokenizer.name_or_path: {error}") from None
    spooled = _spool(data, resolved, working / "spool", say)
    chosen = selection.select(spooled, data, config.seed)
    rejected = [*spooled.rejected, *chosen.rejected]
    _check(data, resolved, chosen, rejected, directory)
    say(f"read {sum(chosen.sources.values()):,} dialogues, rejected {len(rejected):,} rows")
    tokenizer = _load_or_fit(config, working / "tokenizer", pretrained, spooled, chosen)
    made = f", template {tokenizer.template}" if pretrained else ", fitted on the train text"
    say(f"tokenizer of {tokenizer.vocab_size} tokens{made}")
    counts = _write_shards(data, working, spooled, chosen, say)

    summary = {"content_hash": content_hash, **account.summarize(data, resolved, spooled, chosen, rejected)}
    files.write_json(working / "examples.json", account.shown_examples(data, spooled, chosen))
    shutil.rmtree(working / "spool")
    (working / "tokenizer" / manifest.NAME).unlink()
    prepared = shards.complete(working, directory, counts, tokenizer, summary, map(_rejected_row, rejected))
    (directory / shards.LOCK).unlink(missing_ok=True)
    return prepared


def _rejected_row(row: Rejected) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(row).items() if value != ""}


def _spool(data: Data, resolved: Sequence[ResolvedSource], folder: Path, say: Callable[[str], None]) -> Spool:
    """Reads, cleans and annotates all sources."""
    folder.mkdir(exist_ok=True)
    cut = pieces.cut(resolved)
    _run("read", functools.partial(spool.write, folder, data), cut, [piece.size for piece in cut], folder, data, say)
    return Spool(folder, len(cut))


def _run(
    what: str, function: Any, tasks: Sequence[Any], sizes: Sequence[int], folder: Path, data: Data, say: Any
) -> None:
    """Runs tasks, and says how far they are every now and then; `folder` is for the time of it."""
    if data.beam_options is not None:
        beam_runner.run(function, tasks, folder, data.beam_options)
        say(f"{what} {sum(sizes) / 1e6:,.0f} MB on Apache Beam")
        return
    done, told = 0, time.monotonic()
    for size in processes.run(function, tasks, sizes, data.num_proc):
        done += size
        if time.monotonic() - told > _SECONDS_BETWEEN_NEWS:
            say(f"{what} {done / 1e6:,.0f} of {sum(sizes) / 1e6:,.0f} MB")
            told = time.monotonic()


def _check(
    data: Data,
    resolved: Sequence[ResolvedSource],
    chosen: Selection,
    rejected: Sequence[Rejected],
    directory: Path,
) -> None:
    """Stops when too many rows are malformed, or nothing is left to train on."""
    read = sum(chosen.sources.values())
    if rejected and len(rejected) > data.max_rejected_fraction * (len(rejected) + read):
        _refuse_rejected(data, rejected, read, directory.with_name("rejected.jsonl"))
    if not any(source.expected == "labeled" and chosen.sources.get(n) for n, source in enumerate(resolved)):
        names = ", ".join(source.name for source in resolved if source.expected == "labeled")
        raise UserError(
            f"data.labeled: no labeled dialogues in {names}; a row has messages that end in an assistant turn"
        )
    if not len(chosen.rows["labeled_train"]):
        removed = ", ".join(f"{step} {count}" for step, count in chosen.removed.most_common())
        raise UserError(
            f"data.labeled: nothing is left to train on; removed, unlabeled dialogues included: {removed or 'none'}\n"
            "let data.cleaning and data.keep_if remove less, or lower data.test_size and data.dev_size"
        )


def _refuse_rejected(data: Data, rejected: Sequence[Rejected], read: int, path: Path) -> None:
    """Stops because of malformed rows, and leaves the list of them."""
    files.write_text(path, "".join(json.dumps(_rejected_row(row)) + "\n" for row in rejected))
    reasons = collections.Counter(row.reason for row in rejected).most_common()
    first = rejected[0]
    raise UserError(
        f"{len(rejected)} of {len(rejected) + read} rows are malformed "
        f"({', '.join(f'{reason}: {count}' for reason, count in reasons)}), "
        f"more than data.max_rejected_fraction {data.max_rejected_fraction:g}\n"
        f"first: {first.file}:{first.line}: {first.reason}{f' ({first.detail})' if first.detail else ''}; all: {path}"
    )


def _load_or_fit(
    config: Config, directory: Path, pretrained: DialogueTokenizer | None, spooled: Spool, chosen: Selection
) -> DialogueTokenizer:
    """The tokenizer that an earlier call left in `directory`, the one that is given, or a new one; saved there."""
    if manifest.problem(directory) is None:
        return DialogueTokenizer.load(directory)
    shutil.rmtree(directory, ignore_errors=True)
    tokenizer = pretrained or _fit_tokenizer(config, spooled, chosen)
    partial = directory.with_name("tokenizer.partial")
    tokenizer.save(partial)
    manifest.write(partial, {})
    partial.rename(directory)
    return tokenizer


def _fit_tokenizer(config: Config, spooled: Spool, chosen: Selection) -> DialogueTokenizer:
    """Fits a BPE on what may be learned from: no held-out text."""
    rows = np.concatenate([chosen.rows[split] for split in ("labeled_train", *store.UNLABELED_SPLITS)])
    keys = spooled.keys[rows]
    if keys["size"].sum() > config.tokenizer.fit_bytes:
        drawn = np.argsort(keys["text"][:, 0], kind="stable")
        rows = rows[np.sort(drawn[np.cumsum(keys["size"][drawn]) <= config.tokenizer.fit_bytes])]
    texts = (turn.content for dialogue in spooled.dialogues(rows) for turn in dialogue.turns)
    wanted = config.tokenizer
    return DialogueTokenizer.fit(texts, wanted.vocab_size, direction_tokens=wanted.direction_tokens)


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A shard to be written: its file, and the file with the keys of its dialogues."""

    split: str
    path: Path
    keys: Path


def _write_shards(
    data: Data, working: Path, spooled: Spool, chosen: Selection, say: Callable[[str], None]
) -> dict[str, int]:
    """Encodes and writes what was chosen; returns the number of shards of every split."""
    tasks, task_sizes, counts = [], [], {}
    sizes = {split: int(spooled.keys["size"][rows].sum()) for split, rows in chosen.rows.items()}
    shard_bytes = min(max(sum(sizes.values()) // _SHARDS, _MIN_SHARD_BYTES), _MAX_SHARD_BYTES)
    for split, rows in chosen.rows.items():
        if len(rows) == 0:
            continue
        counts[split] = min(-(-sizes[split] // shard_bytes), len(rows))
        for number, part in enumerate(np.array_split(rows, counts[split])):
            path = shards.shard_path(working, split, number, counts[split])
            keys = working / "spool" / f"{split}-{number}.npy"
            np.save(keys, spooled.keys[part])
            tasks.append(_Shard(split, path, keys))
            task_sizes.append(int(spooled.keys["size"][part].sum()))
    function = functools.partial(_write_shard, working, data)
    _run("encoded", function, tasks, task_sizes, working / "spool", data, say)
    return counts


def _write_shard(working: Path, data: Data, shard: _Shard) -> None:
    if not shards.is_written(shard.path):
        shards.write_shard(shard.path, _records(working, data, shard))


def _records(working: Path, data: Data, shard: _Shard) -> Iterator[Record]:
    keys = np.load(shard.keys)
    # Never of a held-out dialogue, which the phrases would tell what its reply is about.
    phrases = data.keyword_prefix if shard.split == "labeled_train" else 0
    pending: collections.deque[tuple[bytes, int]] = collections.deque()  # read, not encoded yet: text and turns

    def dialogues() -> Iterator[tuple[Dialogue, int]]:
        lines = spool.read_lines(working / "spool", keys)
        for line, reply_bytes in zip(lines, keys["reply_bytes"].tolist(), strict=True):
            dialogue = store.from_json(line)
            if phrases:
                dialogue = annotation.keyword_prefix(dialogue, phrases, data.language)
                line = store.to_json(dialogue)
            pending.append((line, len(dialogue.turns)))
            yield dialogue, reply_bytes

    encoded = _tokenizer(working / "tokenizer").encode_all(dialogues())
    for tokens, source, text_hash in zip(encoded, keys["source"].tolist(), keys["text"].tolist(), strict=True):
        line, turns = pending.popleft()
        yield Record(tokens, line, tuple(text_hash), turns, source)


@functools.lru_cache(maxsize=1)
def _tokenizer(directory: Path) -> DialogueTokenizer:
    return DialogueTokenizer.load(directory)
