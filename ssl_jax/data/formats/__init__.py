"""Rows of files to dialogues. A row that cannot be one is returned as `Rejected`, never raised.

| family | formats | module |
|---|---|---|
| JSON objects (lines, or one array) | messages, prompt_completion, sharegpt, alpaca | `json_rows` |
| | forum; review | modules of these names |
| plain lines | text, log, parlai | `plain` |
| tables | parquet | `parquet` |
| messengers | whatsapp, telegram, discord, slack | modules of these names, over `chat` |

`lines` decompresses and splits, `json_text` parses, `rows` has what all readers make, `paths` finds files and `detect`
tells formats. Lines are streamed. A JSON array and a messenger's JSON export are parsed in memory, up to
`lines.MAX_DOCUMENT_BYTES`.
"""

from ssl_jax.data.formats.paths import find_files
from ssl_jax.data.formats.reading import Unit, cut, read, read_unit, units
from ssl_jax.data.formats.rows import Accepted, Expected, Rejected, duplicate_id, merge_consecutive

__all__ = [
    "Accepted", "Expected", "Rejected", "Unit", "cut", "duplicate_id", "find_files", "merge_consecutive", "read",
    "read_unit", "units",
]  # fmt: skip
