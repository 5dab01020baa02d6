"""Data sets by name: of TensorFlow Datasets (read without TensorFlow) and of Hugging Face `datasets`.

Both are opened by random access from files on disk, so that memory does not grow with them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ssl_jax import files
from ssl_jax.config import Source
from ssl_jax.data import field_mapping
from ssl_jax.data.formats.rows import Accepted, BadRow, Expected, Rejected, finish
from ssl_jax.errors import UserError

# Hugging Face's names of what reads a file, by its suffix.
_FILE_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
# One call for many examples takes a third of the time that as many calls of TFDS take.
_READ_AT_ONCE = 256
_TFDS_ADVICE = "build it with file_format='array_record'"


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A part of a data set.

    Attributes:
      examples: by number; a `Sequence` that also has `__getitems__`, for several numbers at once.
      features: the library's description of an example.
      files: what the examples are read from.
    """

    examples: Any
    features: Mapping[str, Any]
    files: list[Path]


def data_files(source: Source) -> list[Path]:
    """The files that the data set's examples are read from; builds or downloads the data set if it is not there.

    Raises:
      UserError: there is no such data set, part or field, no field mapping, or a library is missing.
    """
    opened = _open(source)
    field_mapping.check(source.fields, opened.features, _place(source))
    return opened.files


def size(source: Source) -> int:
    """How many examples a source has.

    Raises:
      UserError: see `data_files`.
    """
    return len(_open(source).examples)


def read(
    source: Source, expected: Expected, max_turn_bytes: int, name: str, numbers: range
) -> Iterator[Accepted | Rejected]:
    """Reads examples of a source.

    Args:
      source: the data set and its field mapping.
      expected: what the source is for.
      max_turn_bytes: a longer turn (UTF-8) rejects its example.
      name: what the data set is called in the ids of its dialogues.
      numbers: of the examples, from 0.

    Yields:
      Dialogues, with their own id or `<name>:<number>` (from 1), and rejected examples, in the data set's order.

    Raises:
      UserError: see `data_files`; stored data that are damaged.
    """
    opened, fields = _open(source), source.fields
    field_mapping.check(fields, opened.features, _place(source))
    assert fields is not None
    labels = field_mapping.labels(opened.features)
    for number, example in enumerate(_examples(opened, _place(source), numbers), numbers.start + 1):
        try:
            row = field_mapping.to_row(example, number, fields, labels, source.split_lines)
            yield Accepted(finish(row, f"{name}:{number}", expected, max_turn_bytes, name), name, name, number)
        except BadRow as bad:
            yield Rejected(name, number, bad.reason, bad.detail)


def _place(source: Source) -> str:
    return f"tfds {source.tfds}" if source.tfds else f"huggingface {source.huggingface}"


def _examples(opened: _Opened, place: str, numbers: range) -> Iterator[Mapping[str, Any]]:
    for start in range(0, len(numbers), _READ_AT_ONCE):
        chunk = numbers[start : start + _READ_AT_ONCE]
        try:
            examples = opened.examples.__getitems__(list(chunk))
        except (OSError, RuntimeError, ValueError) as error:
            where = f"examples {chunk[0] + 1} to {chunk[-1] + 1}"
            raise UserError(f"{place}: {where} cannot be read, a file is damaged: {_line(error)}") from error
        yield from examples


def _open(source: Source) -> _Opened:
    return _open_tfds(source) if source.tfds else _open_huggingface(source)


def _open_tfds(source: Source) -> _Opened:
    import tensorflow_datasets as tfds

    place, split = _place(source), source.split or "train"
    builder = _tfds_builder(source)
    format = builder.info.file_format
    if format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(f"{place}: stored as {format and format.value}, which needs TensorFlow; {_TFDS_ADVICE}")
    try:
        examples = builder.as_data_source(split=split)
    except ValueError as error:
        raise UserError(f"{place}: split {split}: {_line(error)}") from None
    stored = [info for name, info in builder.info.splits.items() if name in split or split == "all"]
    folder = Path(str(builder.data_dir))
    files = [folder / "features.json", *(Path(str(path)) for info in stored for path in info.filepaths)]
    return _Opened(examples, builder.info.features, files)


def _tfds_builder(source: Source) -> Any:
    """The builder of a data set whose files are on disk."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    place, name = _place(source), str(source.tfds)
    folder = Path(name).expanduser()
    if folder.is_dir():
        versions = sorted(file.parent for file in folder.rglob("features.json"))
        if len(versions) != 1:
            found = ", ".join(map(str, versions)) or "nothing that TFDS has prepared"
            raise UserError(f"{place}: name the folder with features.json; found {found}")
        _check_feature_classes(versions[0])
        return tfds.builder_from_directory(str(versions[0]))
    data_dir = str(Path(source.data_dir).expanduser()) if source.data_dir else None
    if data_dir:
        for file in sorted(Path(data_dir, re.split("[/:]", name)[0]).rglob("features.json")):
            _check_feature_classes(file.parent)
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except DatasetNotFoundError:
        where = f" (nor is it in {data_dir})" if data_dir else "; its folder may be named, or data_dir"
        near = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), n=1)
        fix = f"; did you mean {near[0]}?" if near else where
        raise UserError(f"{place}: TFDS has no such data set{fix}") from None
    except ValueError as error:
        raise UserError(f"{place}: {_line(error)}") from None
    if not builder.is_prepared():
        _build(builder, place)
    return builder


def _build(builder: Any, place: str) -> None:
    """Lets TFDS download and convert a data set."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    except ModuleNotFoundError as error:
        if str(error.name).startswith("tensorflow"):
            fix = f"where that is installed, {_TFDS_ADVICE}, and name its folder"
        else:
            fix = "pip install 'ssl_jax[datasets]', or that package"
        raise UserError(f"{place}: cannot be built without the package {error.name}; {fix}") from None
    except Exception as error:
        # Every builder is somebody else's program, with errors of its own.
        message = f"{type(error).__name__}: {_line(error)}"
        raise UserError(f"{place}: cannot be built: {message}\nbuild it elsewhere and name its folder") from error


def _check_feature_classes(folder: Path) -> None:
    """TFDS imports the modules that `features.json` names: none but its own are let through.

    Raises:
      UserError: the file names another module, or is not JSON.
    """
    file = folder / "features.json"
    try:
        pending = [files.read_json(file)]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    while pending:
        match pending.pop():
            case dict() as features:
                for key, value in features.items():
                    if key in ("pythonClassName", "type") and isinstance(value, str) and "." in value:
                        if not value.startswith("tensorflow_datasets."):
                            raise UserError(f"{file}: names {value}, a class that is not of TFDS; it is not loaded")
                    else:
                        pending.append(value)
            case list() as features:
                pending += features


def _open_huggingface(source: Source) -> _Opened:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ModuleNotFoundError:
        raise UserError(f"{_place(source)} needs a package: pip install 'ssl_jax[datasets]'") from None

    datasets.disable_progress_bars()
    try:
        examples = _load_huggingface(source)
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"{_place(source)}: {_line(error.__cause__ or error)}") from None
    files = [Path(file["filename"]) for file in examples.cache_files]
    return _Opened(examples, examples.features, files)


def _load_huggingface(source: Source) -> Any:
    import datasets

    name, split = str(source.huggingface), source.split or "train"
    path = Path(name).expanduser()
    if path.is_file():
        if not (reader := _FILE_READERS.get(path.suffix)):
            raise ValueError(f"files of {', '.join(_FILE_READERS)} can be loaded")
        return datasets.load_dataset(reader, data_files={"train": str(path)}, split=split)
    if not any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
        return datasets.load_dataset(name, name=source.subset, split=split, revision=source.revision)
    saved = datasets.load_from_disk(str(path))
    parts = saved if isinstance(saved, dict) else {"train": saved}
    lengths = {part: len(examples) for part, examples in parts.items()}
    pieces = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    return datasets.concatenate_datasets(
        [parts[piece.splitname].select(range(piece.from_ or 0, min(piece.to or lengths[piece.splitname],
                                                                    lengths[piece.splitname]))) for piece in pieces]
    )  # fmt: skip


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
