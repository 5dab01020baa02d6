"""Parquet files: their rows are like JSON objects, in any of the formats that those have."""

from __future__ import annotations

import base64
import datetime
import decimal
import math
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssl_jax.config import Source
from ssl_jax.data.formats import json_rows, json_text
from ssl_jax.data.formats.rows import BadRow, Row, attempt
from ssl_jax.errors import UserError

_MAGIC = b"PAR1"
_BATCH_ROWS = 256
# A value may be as large as all that is stored of its row group, and every row may have it, for a few bytes each.
_BATCH_BYTES = 2**29


def is_parquet(file: Path) -> bool:
    """Whether a file is Parquet, by its first bytes."""
    with open(file, "rb") as stream:
        return stream.read(len(_MAGIC)) == _MAGIC


def read(file: Path, source: Source, format: str | None) -> Iterator[Row | BadRow]:
    """The rows of a file; `format` as in `json_rows.FORMATS`, None: what the names of the columns say.

    A row group that cannot be read is one rejected row that says how many it has.

    Raises:
      UserError: `pyarrow` is needed and not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError(f"{file}: Parquet needs a package: pip install 'ssl_jax[formats]'") from None
    # Damaged values can surface as errors of Python's own while they are made into objects.
    damage = (pyarrow.ArrowException, OSError, ValueError, OverflowError)
    try:
        table = pyarrow.parquet.ParquetFile(file)
        groups = [table.metadata.row_group(group) for group in range(table.num_row_groups)]
        sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    except damage as error:
        yield BadRow("not a Parquet file, or damaged", f"{error}"[:200].replace("\n", " "), 1)
        return
    with table:
        columns = dict.fromkeys(table.schema_arrow.names)
        format = format or json_rows.format_of(columns) or "messages"
        number = 0
        for group, (rows, size) in enumerate(sizes):
            start = number
            at_once = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(size, 1)))
            try:
                for batch in table.iter_batches(batch_size=at_once, row_groups=[group]):
                    for value in batch.to_pylist():
                        number += 1
                        yield attempt(number, lambda value=value, number=number: _row(number, value, format, source))
            except damage as error:
                lost = f"{start + rows - number} rows of row group {group}: {error}"
                yield BadRow("damaged Parquet data", lost[:200].replace("\n", " "), number + 1)
            number = start + rows


def _row(number: int, value: dict[str, Any], format: str, source: Source) -> Row:
    # A column that a row does not have is there, and null.
    present = {key: item for key, item in value.items() if item is not None}
    return json_rows.row(number, json_text.checked(_as_json(present)), format, source)


def _as_json(value: Any) -> Any:
    match value:
        case dict():
            return {str(key): _as_json(item) for key, item in value.items()}
        case list() | tuple():
            return [_as_json(item) for item in value]
        case float() if not math.isfinite(value):
            return None
        case bool() | int() | float() | str() | None:
            return value
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case datetime.timedelta():
            return value.total_seconds()
        case decimal.Decimal() | uuid.UUID():
            return str(value)
        case bytes():
            return base64.b64encode(value).decode()
        case _:
            raise BadRow("value that JSON has no form for", type(value).__name__)
