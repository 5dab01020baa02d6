"""Forum threads: posts as JSON objects (Reddit's dumps, ConvoKit's utterances, …), each naming the one it answers.

A thread is a tree; each way from its first post to one that nobody answered is a dialogue. A thread with many ends
gives its `Source.max_paths` longest, and one rejected row that counts the rest. Posts need not be in order. They are
kept in memory until the file ends. metadata: `group` is the thread; `speakers` and `times` have one value for each turn
(consecutive posts of one author are one turn), `time` is that of the first post.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_jax.config import Source
from ssl_jax.config.data import PostFields
from ssl_jax.data.formats.chat import utc
from ssl_jax.data.formats.json_rows import values
from ssl_jax.data.formats.lines import MAX_DOCUMENT_BYTES
from ssl_jax.data.formats.rows import BadRow, Row, attempt, speaking_turns, told, told_keys
from ssl_jax.errors import UserError

_USUAL_NAMES: Mapping[str, tuple[str, ...]] = {
    "id": ("id", "post_id", "comment_id", "message_id"),
    "parent": ("parent_id", "parent", "reply_to", "in_reply_to"),
    "thread": ("thread_id", "thread", "link_id", "conversation_id", "message_tree_id", "root"),
    "text": ("body", "text", "content", "message", "selftext"),
    "author": ("author", "user", "username", "speaker"),
    "time": ("created_utc", "created_at", "timestamp", "time", "date"),
}
# Reddit writes what kind of thing an id is of, except where the thing tells its own.
_KIND_OF_ID = re.compile(r"^t[1-6]_")


@dataclasses.dataclass(frozen=True, slots=True)
class _Post:
    number: int
    id: str
    parent: str | None
    thread: str | None
    text: str
    author: str
    time: str | None


def read(file: Path, source: Source) -> Iterator[Row | BadRow]:
    """The dialogues of a file of posts.

    Raises:
      UserError: the posts do not fit into memory.
    """
    posts: dict[str, _Post] = {}
    size = 0
    for number, value in values(file, lambda item: is_post(item, source.posts)):
        post = (
            value.at(number)
            if isinstance(value, BadRow)
            else attempt(number, lambda value=value, number=number: _post(number, value, source.posts))
        )
        if isinstance(post, BadRow):
            yield post
        elif post.id in posts:
            yield BadRow("duplicate id", f"post {post.id!r:.80} is also at {posts[post.id].number}", number)
        else:
            posts[post.id] = post
            size += len(post.text)
            if size > MAX_DOCUMENT_BYTES:
                raise UserError(
                    f"{file}: has posts of more than {MAX_DOCUMENT_BYTES >> 20} million characters, which must be in "
                    "memory together; divide it into files by thread"
                )
    yield from _threads(posts, source)


def is_post(value: Mapping[str, Any], fields: PostFields) -> bool:
    """Whether an object is surely a post: it has an id, a text, and says which one it answers, be it none."""
    return all(_field(value, fields, name)[0] for name in ("id", "parent", "text"))


def _threads(posts: Mapping[str, _Post], source: Source) -> Iterator[Row | BadRow]:
    answers: dict[str, list[_Post]] = defaultdict(list)
    first_posts = []
    for post in posts.values():
        # The parent of a thread's first post is the thread itself, nothing, or was not exported.
        if post.parent is None or post.parent not in posts or post.parent == post.id:
            first_posts.append(post)
        else:
            answers[post.parent].append(post)
    reached: set[str] = set()
    for first in first_posts:
        yield from _thread(first, answers, posts, reached, source)
    for post in posts.values():
        if post.id not in reached:
            # The first of a circle in the file is as good a beginning as any.
            yield BadRow("posts answer each other in a circle", f"post {post.id!r:.80}", post.number)
            yield from _thread(post, answers, posts, reached, source)


def _thread(
    first: _Post,
    answers: Mapping[str, Sequence[_Post]],
    posts: Mapping[str, _Post],
    reached: set[str],
    source: Source,
) -> Iterator[Row | BadRow]:
    """The rows of one thread; the ids of its posts are added to `reached`."""
    depths, ends = _depths(first, answers)
    reached.update(depths)
    kept = sorted(ends, key=lambda post: (-depths[post.id], post.number))[: source.max_paths]
    shown: set[str] = set()
    for end in sorted(kept, key=lambda post: post.number):
        path = _path(end, first, posts)
        shown.update(post.id for post in path)
        yield _row(path, first, len(ends), source)
    if len(ends) > len(kept):
        detail = f"{len(kept)} of {len(ends)} paths kept, {len(depths) - len(shown)} of {len(depths)} posts left out"
        yield BadRow("thread has more than max_paths", detail, first.number)


def _depths(first: _Post, answers: Mapping[str, Sequence[_Post]]) -> tuple[dict[str, int], list[_Post]]:
    """How far every post of a thread is from the first, by id, and those that nobody answered."""
    depths: dict[str, int] = {}
    ends, level, depth = [], [first], 0
    while level:
        depth += 1
        depths.update((post.id, depth) for post in level)
        following = []
        for post in level:
            new = [answer for answer in answers.get(post.id, ()) if answer.id not in depths]
            following += new
            if not new:
                ends.append(post)
        level = following
    return depths, ends


def _path(end: _Post, first: _Post, posts: Mapping[str, _Post]) -> list[_Post]:
    path = [end]
    while path[-1] is not first:
        path.append(posts[str(path[-1].parent)])
    return path[::-1]


def _row(path: Sequence[_Post], first: _Post, paths: int, source: Source) -> Row | BadRow:
    written = [post for post in path if post.text.strip()]
    if not written:
        return BadRow("empty text", f"no post of the path to {path[-1].id!r:.80} has text", path[-1].number)
    turns, starts = speaking_turns([(post.author, post.text) for post in written], source.assistant)
    metadata: dict[str, Any] = {"group": first.thread or first.id, "paths": paths}
    if first.time is not None:
        metadata["time"] = first.time
    per_turn = {
        "speakers": [written[start].author for start in starts],
        "times": [written[start].time for start in starts],
    }
    return Row(path[-1].number, turns, f"{metadata['group']}/{path[-1].id}", metadata, is_log=True, per_turn=per_turn)


def _post(number: int, value: Any, fields: PostFields) -> _Post:
    if not isinstance(value, dict):
        raise BadRow("not an object", f"found {type(value).__name__}")
    id = _identifier(value, fields, "id")
    if id is None:
        raise BadRow("post without id", f"found {told_keys(value)}")
    text = _field(value, fields, "text")[1]
    title = value.get("title")
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise BadRow("content is not text", f"post has {type(text).__name__}")
    if isinstance(title, str) and title.strip() and title.strip() != text.strip():
        text = f"{title}\n\n{text}" if text.strip() else title
    author = _field(value, fields, "author")[1]
    if isinstance(author, dict):  # ConvoKit's speakers
        author = author.get("id") or author.get("name")
    time = _field(value, fields, "time")[1]
    return _Post(
        number,
        id,
        _identifier(value, fields, "parent"),
        _identifier(value, fields, "thread"),
        text,
        "" if author is None else str(author),
        None if time is None or time == "" else utc(time).isoformat(timespec="seconds"),
    )


def _identifier(value: Mapping[str, Any], fields: PostFields, name: str) -> str | None:
    found = _field(value, fields, name)[1]
    if found is None or found == "" or isinstance(found, bool):
        return None
    if not isinstance(found, str | int):
        raise BadRow("id is not text", f"{name} is {told(found)}")
    return _KIND_OF_ID.sub("", str(found))


def _field(value: Mapping[str, Any], fields: PostFields, name: str) -> tuple[bool, Any]:
    """Whether a post has a field, and what is in it."""
    chosen = getattr(fields, name)
    if chosen is not None:
        return chosen in value, value.get(chosen)
    for usual in _USUAL_NAMES[name]:
        for spelled in (usual, usual.replace("_", "-")):
            if spelled in value:
                return True, value[spelled]
    return False, None
