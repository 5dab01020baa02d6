"""Checkpoints that are complete, verified and small in number.

Orbax writes the arrays, asynchronously and from every host at once. What it does not do is notice a flipped bit, a
lost file or a directory that only looks like a checkpoint. So a step counts only once its `manifest.json` stands: the
size and SHA-256 of every file, written last, atomically, and with a digest of itself. Nothing is read without it.

What this costs is one reading of a step's files when they are written, and one before they are restored. Files that
look as they did when they verified (size, times, inode; the version of an object) are not read again to decide what is
kept, nor within a minute to be restored.

    <directory>/<step>/<item>/…         Orbax's files (OCDBT), one folder per item
    <directory>/<step>/manifest.json    step, metric, meta, leaves of every item, files

Only one process group at a time may write into a directory; any number may read from it. It may be one of a bucket.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ssl_jax import ending, files, manifest, orbax_metrics, orbax_s3, step_manifest, storage
from ssl_jax.errors import UserError
from ssl_jax.staging import Staging

PyTree = Any

MANIFEST = manifest.NAME

# Orbax creates this file first in every checkpoint: a folder with it, but without a manifest, is a save cut off.
_ORBAX_MARK = "_CHECKPOINT_METADATA"

# How TensorStore spells what the operating system refused.
_STORAGE_FAILURE = re.compile(
    r"RESOURCE_EXHAUSTED|PERMISSION_DENIED|FAILED_PRECONDITION|NOT_FOUND|UNAVAILABLE|OS error|os_error"
)

# How long a step that has verified may be restored without being read once more.
_VERDICT_SECONDS = 60.0

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run.

    With several processes, every one of them makes the same calls in the same order. The primary process decides which
    steps are good, writes manifests and deletes; the others learn its verdict.

    Nothing is created, written or deleted before the first `save`.
    """

    def __init__(
        self, directory: Any, *, save_total_limit: int = 2, before_manifest: Callable[[], None] | None = None
    ) -> None:
        """Looks at nothing yet.

        Args:
          directory: where steps lie, as `storage.Place.path` gives it; need not exist yet. On several hosts: a file
            system that they share, or a bucket.
          save_total_limit: newest verified steps that are kept, besides the best one; at least 1.
          before_manifest: called by the primary process before a step counts, in a thread; what it raises stops that.
        """
        if save_total_limit < 1:
            raise ValueError(f"save_total_limit is at least 1, got {save_total_limit}")
        self._directory = directory if storage.is_url(directory) else Path(directory).absolute()
        self._before_manifest = before_manifest
        self._save_total_limit = save_total_limit
        self._checkpointer: Any = None
        self._background: concurrent.futures.ThreadPoolExecutor | None = None
        self._pending: tuple[int, concurrent.futures.Future[None]] | None = None
        self._staging = Staging()
        self._known_good: dict[int, _Verdict] = {}
        self._warned: set[tuple[int, str]] = set()

    def reserve(self, items: Mapping[str, PyTree]) -> None:
        """Takes the memory that a save of such items copies them to, so that the first one need not wait for it."""
        import jax

        jax.block_until_ready(
            self._staging.copy({name: step_manifest.leaves_by_path(item) for name, item in items.items()})
        )

    def save(
        self, step: int, items: Mapping[str, PyTree], meta: Mapping[str, Any], *, metric: float | None = None
    ) -> None:
        """Starts to save `items` as `step`; returns once the arrays are copied to the host, so they may be donated.

        A step that exists and verifies is left as it is; one that does not verify is replaced.

        Args:
          step: at least 0.
          items: pytrees of arrays by name. Names can be restored one by one.
          meta: JSON values, stored as they are now.
          metric: lower is better; the lowest one marks the best step. None or not finite: no candidate.

        Raises:
          UserError: this save or the one before could not be written; earlier steps stand.
        """
        self.wait()
        leaves = {name: step_manifest.leaves_by_path(item) for name, item in items.items()}
        body = step_manifest.body(step, leaves, meta, metric)
        try:
            if not _agree(lambda: self._why_saved(step)):
                return
            self._start_writing(leaves)
            import orbax.checkpoint as ocp

            staged = self._staging.copy(leaves)
            arguments = {name: ocp.args.PyTreeSave(item) for name, item in staged.items()}  # pyright: ignore
            self._checkpointer.save(self._path(step), args=ocp.args.Composite(**arguments), force=True)
        except Exception as error:
            self._staging.clear()
            raise self._explain(step, error) from error
        assert self._background is not None
        self._pending = (step, self._background.submit(self._finish, step, body))

    def wait(self) -> None:
        """Returns when every save is on disk with its manifest.

        Raises:
          UserError: the last save could not be written; earlier steps stand.
        """
        if self._pending is None:
            return
        step, future = self._pending
        self._pending = None
        error = future.exception()
        elsewhere = _agree(lambda: "", own=str(error) if error else "")
        if error is not None:
            # Whatever has failed may still read its copies.
            self._staging.clear()
            raise self._explain(step, error) from error
        if elsewhere:
            raise UserError(f"checkpoint {step} could not be written by another process: {elsewhere}")

    def check(self) -> None:
        """Raises as `wait` does if the last save has failed by now; never waits.

        Of several processes the one that failed only warns: all of them stop together, at the next save.
        """
        import jax

        if self._pending is None or not self._pending[1].done():
            return
        if jax.process_count() == 1:
            self.wait()
            return
        step, future = self._pending
        if (error := future.exception()) is not None:
            self._warn(step, f"it could not be written, and the run stops at the next save: {error}")

    def steps(self) -> list[int]:
        """Steps that have a manifest, in ascending order; whether they verify is for `newest` and `best` to say."""
        self.wait()
        return self._steps()

    def newest(self, *, at_most: int | None = None) -> int | None:
        """The newest step that verifies, none of those after `at_most`; warns of every newer one that does not."""
        self.wait()

        def find() -> str:
            steps = [step for step in self._step_folders() if at_most is None or step <= at_most]
            return _text(self._first_good(sorted(steps, reverse=True)))

        with self._explained("read"):
            verdict = _agree(find)
        return int(verdict) if verdict else None

    def best(self) -> int | None:
        """The step with the lowest metric among those that verify; of equals, the earliest."""
        self.wait()
        with self._explained("read"):
            verdict = _agree(lambda: _text(self._first_good(self._by_metric())))
        return int(verdict) if verdict else None

    def meta(self, step: int) -> dict[str, Any]:
        """What `save` was given as `meta`.

        Raises:
          UserError: there is no such step, or its manifest is damaged.
        """
        self.wait()
        return self._manifest(step)["meta"]

    def restore(self, step: int, abstract_items: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Reads the named items, after verifying their files.

        Args:
          step: one that `newest`, `best` or `steps` returned.
          abstract_items: pytrees of `jax.ShapeDtypeStruct`; each leaf goes where its sharding says, or to the first
            local device if it has none. Items that are not named are not read.

        Raises:
          UserError: no such step, a file of it is damaged, or an item's leaves differ from `abstract_items`.
        """
        import jax
        import orbax.checkpoint as ocp

        self.wait()
        if problem := _agree(lambda: self._why_not_restored(step, abstract_items)):
            raise UserError(f"checkpoint {self._path(step)} is damaged: {problem}")
        stored = self._manifest(step)["items"]
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        arguments = {}
        for name, abstract in abstract_items.items():
            wanted = step_manifest.leaves_by_path(abstract)
            step_manifest.check_leaves(f"checkpoint {self._path(step)}", stored, name, wanted)
            placed = {
                path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default)
                for path, leaf in wanted.items()
            }
            arguments[name] = ocp.args.StandardRestore(placed)  # pyright: ignore[reportCallIssue]
        orbax_s3.enable(self._directory)
        with self._explained("read"), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(self._path(step), args=ocp.args.Composite(**arguments))
        return {
            name: jax.tree.unflatten(
                jax.tree.structure(abstract), [restored[name][path] for path in step_manifest.leaves_by_path(abstract)]
            )
            for name, abstract in abstract_items.items()
        }

    def drop_after(self, step: int) -> None:
        """Removes all later steps, good or not: what they went on from is lost, so that they cannot be gone on from."""
        self.wait()

        def drop() -> str:
            for later in [other for other in self._step_folders() if other > step]:
                if (self._path(later) / MANIFEST).exists():
                    (self._path(later) / MANIFEST).unlink()
                files.remove_folder(self._path(later))
                self._known_good.pop(later, None)
            return ""

        with self._explained("write"):
            _agree(drop)

    def close(self) -> None:
        """Waits for the last save and frees the threads; raises as `wait` does."""
        try:
            self.wait()
        finally:
            if self._checkpointer is not None:
                self._checkpointer.close()
                self._checkpointer = None
            if self._background is not None:
                self._background.shutdown()
                self._background = None
            self._staging.clear()

    def _start_writing(self, names: Iterable[str]) -> None:
        if self._background is not None:
            return
        import orbax.checkpoint as ocp

        self._directory.mkdir(parents=True, exist_ok=True)
        # Orbax logs every exception of its threads with a traceback and then raises it; `wait` reports it once.
        logging.getLogger("absl").addFilter(_is_not_raised_as_well)
        orbax_s3.enable(self._directory)
        orbax_metrics.stop_counting()
        # A bucket cannot rename a folder. Nothing reads a step without our manifest, so that it need not appear whole.
        mode = ocp.options.AtomicityMode
        atomicity = ocp.options.AtomicityOptions(
            mode=mode.COMMIT_FILE if storage.is_url(self._directory) else mode.AUTO
        )
        # Compression takes 8 % off a state, and a third more processor time, of which the steps beside it have less.
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        for name in names:
            handlers.add(name, ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(use_compression=False))
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                handler_registry=handlers, composite_options=ocp.CompositeOptions(atomicity_options=atomicity)
            ),
            atomicity_options=atomicity,
        )
        self._background = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def _finish(self, step: int, body: dict[str, Any]) -> None:
        """In the background: waits for Orbax, then makes the step count and drops those no longer needed."""
        import jax

        self._checkpointer.wait_until_finished()
        if jax.process_index() == 0:
            if self._before_manifest is not None:
                self._before_manifest()
            written = storage.identities_below(self._path(step))
            manifest.write(self._path(step), body)
            found = storage.identities_below(self._path(step))
            # What else has changed since it was read is for `_delete_superfluous` to verify.
            if all(found.get(name) == identity for name, identity in written.items()):
                self._known_good[step] = _Verdict(found)
            self._delete_superfluous()

    def _delete_superfluous(self) -> None:
        """Keeps the newest verified steps and the best one; removes the other verified ones and saves cut off.

        A damaged step with a manifest is left for a person to look at until the same step is saved again. One that was
        damaged after it had verified is found out by the looks of its files, before an older one goes in its favor.
        """
        for step in self._steps():
            if not self._looks_good(step):
                self._verify(step)
        good = [step for step in self._steps() if step in self._known_good]
        best = [step for step in self._by_metric() if step in good][:1]
        for step in set(good[: -self._save_total_limit]).difference(best):
            # Without its manifest a half-deleted step is recognized as such.
            (self._path(step) / MANIFEST).unlink()
            files.remove_folder(self._path(step))
            del self._known_good[step]
        for folder in self._directory.iterdir():
            is_ours = re.fullmatch(r"\d+(\.orbax-checkpoint-tmp.*)?", folder.name) and (folder / _ORBAX_MARK).exists()
            if is_ours and not (folder / MANIFEST).exists():
                files.remove_folder(folder)

    def _why_saved(self, step: int) -> str:
        """Why a step is to be saved, if it is; of a bucket, what there is of it goes: Orbax would need more rights."""
        if self._looks_good(step):
            return ""
        problem = self._verify(step) or ""
        if problem and storage.is_url(self._directory):
            files.remove_folder(self._path(step))
        return problem

    def _why_not_restored(self, step: int, items: Mapping[str, Any]) -> str:
        """What is wrong with the files of these items; they are read unless all of the step has just verified."""
        if self._looks_good(step) and time.monotonic() - self._known_good[step].at < _VERDICT_SECONDS:
            return ""
        return step_manifest.problem(self._path(step), items) or ""

    def _verify(self, step: int) -> str | None:
        """Why a step cannot be trusted, or None; reads all its files, and remembers how those of a good one look."""
        # As they were before they are read: what changes meanwhile shows later.
        found = storage.identities_below(self._path(step))
        problem = step_manifest.problem(self._path(step))
        if problem is None:
            self._known_good[step] = _Verdict(found)
        else:
            self._known_good.pop(step, None)
        return problem

    def _looks_good(self, step: int) -> bool:
        """Whether a step has verified and its files still look as they did then; reads none of them."""
        verdict = self._known_good.get(step)
        return verdict is not None and verdict.identities == storage.identities_below(self._path(step))

    def _first_good(self, candidates: list[int]) -> int | None:
        for step in candidates:
            problem = self._verify(step)
            if problem is None:
                return step
            self._warn(step, problem)
        return None

    def _warn(self, step: int, problem: str) -> None:
        """Says once what is wrong with a step, however often it is passed over."""
        if (step, problem) not in self._warned:
            self._warned.add((step, problem))
            _log.warning("checkpoint %s is not used: %s", self._path(step), problem)

    def _by_metric(self) -> list[int]:
        metrics = {}
        for step in self._steps():
            try:
                metrics[step] = step_manifest.read(self._path(step))["metric"]
            except ValueError as error:
                self._warn(step, str(error))
        return sorted((s for s, metric in metrics.items() if metric is not None), key=lambda s: (metrics[s], s))

    def _steps(self) -> list[int]:
        return sorted(step for step in self._step_folders() if (self._path(step) / MANIFEST).exists())

    def _step_folders(self) -> list[int]:
        """Every folder named like a step, whatever is in it."""
        # Not asked whether it is there first: of a bucket that may not be read, the answer is no.
        try:
            names = [path.name for path in self._directory.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [int(name) for name in names if re.fullmatch(r"0|[1-9]\d*", name)]

    def _path(self, step: int) -> Any:
        return self._directory / str(step)

    def _manifest(self, step: int) -> dict[str, Any]:
        try:
            return step_manifest.read(self._path(step))
        except ValueError as error:
            known = ", ".join(map(str, self._steps())) or "none"
            raise UserError(f"checkpoint {self._path(step)}: {error} (steps there: {known})") from None

    def _explain(self, step: int, error: BaseException) -> BaseException:
        """What the operating system refused is for the user to fix; a lost process or a bug stays what it is."""
        if not ending.is_loss(error) and (storage.is_refusal(error) or _STORAGE_FAILURE.search(str(error))):
            reason = " ".join(str(error).split())[:300]
            return UserError(
                f"checkpoint {step} could not be written to {self._directory}: {reason}\n"
                "earlier checkpoints stand; make room or set permissions, then run the same command again"
            )
        return error

    def _explained(self, verb: str) -> contextlib.AbstractContextManager[None]:
        if storage.is_url(self._directory):
            return storage.explained(str(self._directory), verb)
        return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class _Verdict:
    """That a step has verified.

    Attributes:
      identities: what told its files from others of their names, as `storage.identities_below` gives it.
      at: when, of the monotonic clock (seconds).
    """

    identities: Mapping[str, str]
    at: float = dataclasses.field(default_factory=time.monotonic)


def _agree(decide: Callable[[], str], own: str = "") -> str:
    """The same text on every process: the first non-empty one among `decide()` on the primary and each one's `own`."""
    import jax

    text = (decide() if jax.process_index() == 0 else "") or own
    if jax.process_count() == 1:
        return text
    import numpy as np
    from jax.experimental import multihost_utils

    padded = np.zeros(1024, np.uint8)
    encoded = np.frombuffer(text.encode()[:1024], np.uint8)
    padded[: len(encoded)] = encoded
    everyone = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in multihost_utils.process_allgather(padded)]
    return next((said for said in everyone if said), "")


def _text(step: int | None) -> str:
    return "" if step is None else str(step)


def _is_not_raised_as_well(record: logging.LogRecord) -> bool:
    return not record.exc_info or f"{os.sep}orbax{os.sep}" not in record.pathname
