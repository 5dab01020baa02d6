"""Checkpoints: what is restored is what was saved, or it is not restored at all."""

import concurrent.futures
import errno
import gc
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ssl_jax import checkpoint, manifest
from ssl_jax.checkpoint import MANIFEST, Checkpoints
from ssl_jax.errors import UserError

ROOT = Path(__file__).parent.parent


class Moments(NamedTuple):
    """As optax keeps them: named tuples, empty tuples and scalars."""

    count: jax.Array
    mu: dict[str, Any]
    nothing: tuple[()]


def make_items(seed: int = 0) -> dict[str, Any]:
    """Every dtype that a state holds, with the values that a careless conversion would lose."""
    keys = jax.random.split(jax.random.key(seed), 3)
    special = jnp.array([jnp.nan, jnp.inf, -jnp.inf, -0.0, 1e-45], jnp.float32)
    params = {
        "wte": jax.random.normal(keys[0], (7, 5)),
        "ln.f": {"scale": jax.random.normal(keys[1], (3,), jnp.bfloat16)},
    }
    moments = Moments(jnp.int32(seed), {"wte": jnp.float32(0.1) * params["wte"], "special": special}, ())
    return {"params": params, "opt": (moments, [jax.random.key_data(keys[2])])}


def abstract(items: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), items)


def assert_identical(restored: Any, saved: Any) -> None:
    """Same structure, dtypes and bits."""
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for left, right in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def save_steps(directory: Path, *steps: int, limit: int = 9, metrics: dict[int, float] | None = None) -> None:
    checkpoints = Checkpoints(directory, save_total_limit=limit)
    for step in steps:
        checkpoints.save(step, make_items(step), {"position": step}, metric=(metrics or {}).get(step))
    checkpoints.close()


def overwrite(path: Path, content: bytes) -> None:
    """In place: some file systems flush a file that is truncated and written anew, which takes long."""
    with path.open("r+b") as stream:
        stream.write(content)


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 10 and 20, to be copied, never changed."""
    directory = tmp_path_factory.mktemp("two_steps")
    save_steps(directory, 10, 20, metrics={10: 2.0, 20: 1.0})
    return directory


@pytest.fixture
def directory(two_steps: Path, tmp_path: Path) -> Path:
    """Steps 10 and 20, to be damaged."""
    return Path(shutil.copytree(two_steps, tmp_path / "checkpoints"))


def test_state_comes_back_bit_for_bit(two_steps: Path) -> None:
    checkpoints = Checkpoints(two_steps)
    assert checkpoints.newest() == 20
    assert_identical(checkpoints.restore(20, abstract(make_items(20))), make_items(20))
    assert checkpoints.meta(20) == {"position": 20}


def test_the_newest_of_the_older_ones(directory: Path) -> None:
    checkpoints = Checkpoints(directory)
    assert [checkpoints.newest(at_most=step) for step in (9, 10, 19, 20)] == [None, 10, 10, 20]
    checkpoints.drop_after(10)
    assert checkpoints.steps() == [10] and not (directory / "20").exists()


def test_items_are_restored_one_by_one(two_steps: Path) -> None:
    wanted = {"params": make_items(10)["params"]}
    assert_identical(Checkpoints(two_steps).restore(10, abstract(wanted)), wanted)


def test_leaves_go_where_their_sharding_says(two_steps: Path) -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), make_items(10)["params"]
    )
    restored = Checkpoints(two_steps).restore(10, {"params": shapes})
    assert {leaf.sharding for leaf in jax.tree.leaves(restored)} == {sharding}


def test_arrays_may_be_donated_and_overwritten_as_soon_as_save_returns(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    bump = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    items = {"device": bump(jnp.zeros((1 << 20,), jnp.float32)), "host": np.ones((1 << 16,), np.float32)}
    expected = jax.tree.map(np.array, items)
    checkpoints.save(1, {"state": items}, {})
    items["host"] += 1
    for _ in range(3):
        items["device"] = bump(items["device"])
    checkpoints.close()
    assert_identical(checkpoints.restore(1, {"state": abstract(expected)})["state"], expected)


def test_training_goes_on_in_the_memory_that_it_has_while_a_save_reads_its_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An array that somebody else holds cannot be given to a step for its results: it would take fresh memory."""
    reads = threading.Semaphore(0)
    write = manifest.write
    monkeypatch.setattr(manifest, "write", lambda *a: (reads.acquire(timeout=60), write(*a)))
    checkpoints = Checkpoints(tmp_path)
    bump = jax.jit(lambda array: array + 1, donate_argnums=0)
    array = bump(jnp.zeros((1 << 20,), jnp.float32))
    checkpoints.reserve({"state": array})
    for step in (1, 2):
        place = array.unsafe_buffer_pointer()
        checkpoints.save(step, {"state": {"w": array}}, {})
        array = bump(array)
        assert array.unsafe_buffer_pointer() == place
        reads.release()
    checkpoints.close()
    saved = checkpoints.restore(2, {"state": {"w": jax.ShapeDtypeStruct(array.shape, array.dtype)}})
    np.testing.assert_array_equal(saved["state"]["w"], np.full(1 << 20, 2, np.float32))


def test_many_saves_leave_nothing_behind_in_the_process(tmp_path: Path) -> None:
    """TensorStore never frees what it is asked of its metrics: tens of lists with every save."""

    def count() -> int:
        gc.collect()
        return sum(type(found) is list for found in gc.get_objects())

    checkpoints, counts = Checkpoints(tmp_path, save_total_limit=1), []
    for step in range(1, 10):
        checkpoints.save(step, make_items(step), {})
        checkpoints.wait()
        counts.append(count())
    checkpoints.close()
    assert counts[-1] - counts[3] < 20


def test_meta_is_what_it_was_at_the_call(tmp_path: Path) -> None:
    meta = {"rounds": [1]}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_items(), meta)
    meta["rounds"].append(2)
    assert checkpoints.meta(1) == {"rounds": [1]}
    checkpoints.close()


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read for their digests from now on."""
    read: list[Path] = []
    digest = checkpoint.files.digest
    monkeypatch.setattr(checkpoint.files, "digest", lambda path: (read.append(path), digest(path))[1])
    return read


def declared(step: Path) -> list[Path]:
    """What a manifest guards."""
    return sorted(path for path in step.rglob("*") if path.is_file() and path.name != MANIFEST)


def test_whoever_resumes_reads_a_step_once_for_its_digests(directory: Path, digested: list[Path]) -> None:
    checkpoints = Checkpoints(directory)
    assert checkpoints.newest() == 20
    assert sorted(digested) == declared(directory / "20")
    checkpoints.restore(20, abstract(make_items(20)))
    checkpoints.save(20, make_items(20), {})
    assert sorted(digested) == declared(directory / "20"), "it has just verified, and looks as it did"


def test_a_verdict_does_not_outlive_a_change_nor_a_minute(
    directory: Path, digested: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(directory)
    assert checkpoints.newest() == 20
    damaged = next((directory / "20" / "params").glob("**/d/*"))
    content = damaged.read_bytes()
    overwrite(damaged, bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(UserError, match=damaged.name):
        checkpoints.restore(20, abstract(make_items(20)))
    overwrite(damaged, content)
    assert checkpoints.newest() == 20
    now = checkpoint.time.monotonic()
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now + 61)
    digested.clear()
    checkpoints.restore(20, abstract(make_items(20)))
    assert sorted(digested) == declared(directory / "20")


def test_a_save_reads_every_file_once_and_no_other_step(tmp_path: Path, digested: list[Path]) -> None:
    checkpoints = Checkpoints(tmp_path, save_total_limit=2)
    for step in (1, 2, 3, 4):
        digested.clear()
        checkpoints.save(step, make_items(step), {})
        checkpoints.wait()
        assert sorted(digested) == declared(tmp_path / str(step))
    assert checkpoints.steps() == [3, 4]
    checkpoints.close()


def test_a_step_damaged_since_it_verified_pushes_no_good_one_out(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, save_total_limit=2)
    for step in (1, 2):
        checkpoints.save(step, make_items(step), {})
    checkpoints.wait()
    damaged = next((tmp_path / "2" / "params").glob("**/d/*"))
    content = damaged.read_bytes()
    overwrite(damaged, bytes([content[0] ^ 1]) + content[1:])
    checkpoints.save(3, make_items(3), {})
    assert checkpoints.steps() == [1, 2, 3]
    corrupt_by("delete an item", tmp_path / "3")
    assert checkpoints.newest() == 1
    checkpoints.close()


def test_every_flipped_bit_is_noticed_and_the_older_step_used(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One bit in each file of the newest step in turn, at the start, the middle and the end of the file."""
    files = [path for path in (directory / "20").rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        for position in {0, len(content) // 2, len(content) - 1}:
            damaged = bytearray(content)
            damaged[position] ^= 1 << (position % 8)
            overwrite(path, bytes(damaged))
            caplog.clear()
            checkpoints = Checkpoints(directory)
            assert checkpoints.newest() == 10, path
            assert checkpoints.best() == 10, path
            assert str(path.relative_to(directory / "20")) in caplog.text
            with pytest.raises(UserError, match="checkpoint"):
                checkpoints.restore(20, abstract(make_items(20)))
        overwrite(path, content)
    assert Checkpoints(directory).newest() == 20


def test_no_byte_of_the_manifest_is_unguarded(directory: Path) -> None:
    """The metric in it decides which step is best, so its own digits are guarded as well."""
    path = directory / "20" / MANIFEST
    content = path.read_bytes()
    for position in range(len(content)):
        overwrite(path, content[:position] + bytes([content[position] ^ (1 << position % 7)]) + content[position + 1 :])
        with pytest.raises(UserError, match="damaged"):
            Checkpoints(directory).meta(20)


def corrupt_by(action: str, step: Path) -> None:
    largest = max((path for path in step.glob("*/**/*") if path.is_file()), key=lambda path: path.stat().st_size)
    match action:
        case "truncate a file":
            os.truncate(largest, largest.stat().st_size - 1)
        case "delete a file":
            next(step.rglob("_METADATA")).unlink()
        case "replace a file by a folder":
            (step / "_CHECKPOINT_METADATA").unlink()
            (step / "_CHECKPOINT_METADATA").mkdir()
        case "delete an item":
            shutil.rmtree(step / "opt")
        case "delete the manifest":
            (step / MANIFEST).unlink()
        case "empty the manifest":
            (step / MANIFEST).write_bytes(b"")
        case "replace the manifest by other JSON":
            (step / MANIFEST).write_text("[]")
        case "empty the step":
            shutil.rmtree(step)
            step.mkdir()
        case "rename an older step":
            shutil.rmtree(step)
            shutil.copytree(step.with_name("10"), step)


@pytest.mark.parametrize(
    "action",
    [
        "truncate a file",
        "delete a file",
        "replace a file by a folder",
        "delete an item",
        "delete the manifest",
        "empty the manifest",
        "replace the manifest by other JSON",
        "empty the step",
        "rename an older step",
    ],
)
def test_an_incomplete_step_never_wins_and_is_replaced_when_saved_again(
    action: str, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corrupt_by(action, directory / "20")
    checkpoints = Checkpoints(directory)
    assert checkpoints.newest() == 10
    assert f"{directory / '20'} is not used" in caplog.text
    checkpoints.save(20, make_items(20), {"position": 20})
    assert checkpoints.newest() == 20
    assert_identical(checkpoints.restore(20, abstract(make_items(20))), make_items(20))
    checkpoints.close()


def test_files_and_folders_that_are_no_steps_are_left_alone(directory: Path) -> None:
    for name in ("notes", "007", "-5", "1e9"):
        (directory / name).mkdir()
    (directory / "30").mkdir()
    (directory / "30" / "thesis.txt").write_text("mine")
    (directory / "40").write_text("a file")
    save_steps(directory, 25)
    checkpoints = Checkpoints(directory)
    assert checkpoints.newest() == 25
    assert checkpoints.steps() == [10, 20, 25]
    assert (directory / "30" / "thesis.txt").read_text() == "mine"
    assert (directory / "notes").is_dir()


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "absent")
    assert (checkpoints.newest(), checkpoints.best(), checkpoints.steps()) == (None, None, [])
    checkpoints.close()
    assert not (tmp_path / "absent").exists()


def test_reading_writes_and_deletes_nothing(directory: Path) -> None:
    corrupt_by("delete the manifest", directory / "20")
    (directory / "30.orbax-checkpoint-tmp").mkdir()
    before = snapshot(directory)
    checkpoints = Checkpoints(directory, save_total_limit=1)
    checkpoints.newest()
    checkpoints.best()
    checkpoints.restore(10, abstract(make_items(10)))
    checkpoints.close()
    assert snapshot(directory) == before
    assert (directory / "30.orbax-checkpoint-tmp").is_dir()


def test_a_file_that_changes_while_the_manifest_is_written_costs_no_older_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is kept for its files, not for having been the last to be written."""
    save_steps(tmp_path, 20)
    write = manifest.write

    def write_and_damage(folder: Path, body: dict[str, Any]) -> None:
        write(folder, body)
        corrupt_by("truncate a file", folder)

    monkeypatch.setattr(manifest, "write", write_and_damage)
    save_steps(tmp_path, 30, limit=1)
    assert Checkpoints(tmp_path).newest() == 20


@pytest.mark.parametrize("other", [10, 30])
def test_a_step_under_the_name_of_another_is_not_used(directory: Path, other: int, caplog: Any) -> None:
    shutil.rmtree(directory / "10")
    (directory / "20").rename(directory / str(other))
    assert Checkpoints(directory).newest() is None
    assert "manifest.json is that of step 20" in caplog.text


def test_a_damaged_item_does_not_hinder_the_others(directory: Path) -> None:
    """Talking to a model needs its weights; that the optimizer's state is lost is no reason to refuse."""
    shutil.rmtree(directory / "20" / "opt")
    wanted = {"params": make_items(20)["params"]}
    assert_identical(Checkpoints(directory).restore(20, abstract(wanted)), wanted)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda items: items["params"].pop("wte"), "leaf 'wte' is in it, but not expected"),
        (lambda items: items["params"].update(wpe=jnp.zeros(3)), "leaf 'wpe' is not in it"),
        (
            lambda items: items["params"].update(wte=jnp.zeros((7, 6))),
            "leaf 'wte' is float32[7,5], expected float32[7,6]",
        ),
        (lambda items: items["params"].update(wte=jnp.zeros((7, 5), jnp.bfloat16)), "expected bfloat16[7,5]"),
        (lambda items: items.update(ema=jnp.zeros(3)), "has no item 'ema'; it has opt, params"),
        (lambda items: items["params"].clear(), "leaf 'ln.f/scale' is in it, but not expected"),
    ],
)
def test_a_different_structure_is_named_leaf_by_leaf(
    change: Callable[[dict[str, Any]], Any], says: str, two_steps: Path
) -> None:
    items = make_items(20)
    change(items)
    with pytest.raises(UserError) as caught:
        Checkpoints(two_steps).restore(20, abstract(items))
    assert says in str(caught.value)


def test_a_step_that_is_not_there_is_named_with_those_that_are(two_steps: Path) -> None:
    with pytest.raises(UserError, match="steps there: 10, 20"):
        Checkpoints(two_steps).meta(15)
    with pytest.raises(UserError, match=r"checkpoint .*/15 is damaged: no manifest\.json"):
        Checkpoints(two_steps).restore(15, abstract(make_items()))


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    metrics = {1: 5.0, 2: 3.0, 3: 4.0, 4: 4.5, 6: float("nan")}
    save_steps(tmp_path, 1, 2, 3, 4, 5, 6, limit=2, metrics=metrics)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [2, 5, 6]
    assert (checkpoints.newest(), checkpoints.best()) == (6, 2)


def test_steps_of_the_runs_before_are_deleted_as_well(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3, metrics={1: 1.0})
    save_steps(tmp_path, 4, limit=2)
    assert Checkpoints(tmp_path).steps() == [1, 3, 4]


def test_an_evaluation_that_was_not_finite_is_never_the_best(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, metrics={1: float("nan"), 2: 3.0})
    assert Checkpoints(tmp_path).best() == 2


def test_a_file_that_changed_its_size_is_reported_with_both(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = directory / "20" / "_CHECKPOINT_METADATA"
    size = path.stat().st_size
    with path.open("ab") as stream:
        stream.write(b"!")
    assert Checkpoints(directory).newest() == 10
    assert f"_CHECKPOINT_METADATA has {size + 1} bytes instead of {size}\n" in caplog.text


def test_a_file_that_cannot_be_read_is_reported_with_the_reason(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = directory / "20" / "_CHECKPOINT_METADATA"
    path.unlink()
    path.mkdir()
    assert Checkpoints(directory).newest() == 10
    assert "_CHECKPOINT_METADATA cannot be read: it is a link that leads elsewhere, or no file\n" in caplog.text


BODY_OF_TODAY = {
    "items": {"params": {"array": "uint8[10]"}},
    "meta": {"position": 7, "name": "ä"},
    "metric": 1.5,
    "step": 3,
}
MANIFEST_OF_TODAY = r"""{
 "files": {
  "params/array": {
   "bytes": 10,
   "sha256": "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882"
  }
 },
 "items": {
  "params": {
   "array": "uint8[10]"
  }
 },
 "meta": {
  "name": "\u00e4",
  "position": 7
 },
 "metric": 1.5,
 "sha256": "c6860e5dd3588efc023e6b569d66ef165940ddb5b2da7fbe39cd9d6b00453383",
 "step": 3
}"""


def test_a_manifest_of_today_is_good_tomorrow(tmp_path: Path) -> None:
    """Its spelling is part of what is guarded, so that it must stay the same for checkpoints to stay readable."""
    (tmp_path / "3" / "params").mkdir(parents=True)
    (tmp_path / "3" / "params" / "array").write_bytes(b"0123456789")
    (tmp_path / "3" / MANIFEST).write_text(MANIFEST_OF_TODAY, encoding="utf-8")
    checkpoints = Checkpoints(tmp_path)
    assert (checkpoints.newest(), checkpoints.best()) == (3, 3)
    assert checkpoints.meta(3) == {"position": 7, "name": "ä"}
    manifest.write(tmp_path / "3", {key: BODY_OF_TODAY[key] for key in reversed(BODY_OF_TODAY)})
    assert (tmp_path / "3" / MANIFEST).read_text(encoding="utf-8") == MANIFEST_OF_TODAY


def test_without_metrics_there_is_no_best(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3, limit=1, metrics={})
    assert Checkpoints(tmp_path).best() is None
    assert Checkpoints(tmp_path).steps() == [3]


def test_damaged_steps_do_not_count_as_kept_ones(directory: Path) -> None:
    """With room for two, the damaged step 20 must not push out step 10, the only other good one."""
    corrupt_by("truncate a file", directory / "20")
    save_steps(directory, 30, limit=2)
    checkpoints = Checkpoints(directory)
    assert checkpoints.newest() == 30
    corrupt_by("truncate a file", directory / "30")
    assert checkpoints.newest() == 10


def test_a_damaged_step_is_reported_once_and_not_at_every_save(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corrupt_by("empty the manifest", directory / "20")
    checkpoints = Checkpoints(directory)
    for step in (30, 40):
        checkpoints.save(step, make_items(step), {})
    assert (checkpoints.newest(), checkpoints.best()) == (40, 10)
    checkpoints.close()
    assert caplog.text.count("is not used") == 1


def test_saving_a_good_step_again_changes_nothing(directory: Path) -> None:
    before = snapshot(directory)
    checkpoints = Checkpoints(directory)
    checkpoints.save(20, make_items(99), {"position": 99})
    checkpoints.close()
    assert snapshot(directory) == before


def test_a_process_killed_while_saving_leaves_the_older_step_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    program = f"""
import os, signal, sys
import jax.numpy as jnp
from ssl_jax import checkpoint, manifest
checkpoints = checkpoint.Checkpoints({str(tmp_path)!r})
state = {{"state": {{"w": jnp.arange(1 << 20, dtype=jnp.float32)}}}}
checkpoints.save(1, state, {{}})
checkpoints.wait()
if sys.argv[1] == "before the manifest":
    manifest.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
checkpoints.save(2, state, {{}})
if sys.argv[1] == "while writing":
    os.kill(os.getpid(), signal.SIGKILL)
checkpoints.wait()
"""
    expected = {"state": {"w": np.arange(1 << 20, dtype=np.float32)}}
    for moment in ("while writing", "before the manifest"):
        done = subprocess.run([sys.executable, "-c", program, moment], cwd=ROOT, stderr=subprocess.PIPE)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        checkpoints = Checkpoints(tmp_path)
        assert checkpoints.newest() == 1
        assert_identical(checkpoints.restore(1, abstract(expected)), expected)
    checkpoints.save(3, expected, {})
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """The kernel refuses to let a file grow beyond 64 KiB, as it would on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files_only")
@pytest.mark.parametrize("surfaces_in", ["wait", "save", "close"])
def test_a_disk_that_takes_no_more_is_a_user_error_and_the_older_step_stands(
    surfaces_in: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_items(1), {})
    checkpoints.save(2, {"state": jax.random.normal(jax.random.key(0), (1 << 16,))}, {})
    with pytest.raises(UserError, match="checkpoint 2 could not be written") as caught:
        checkpoints.save(3, make_items(3), {}) if surfaces_in == "save" else getattr(checkpoints, surfaces_in)()
    assert len(str(caught.value).splitlines()) == 2
    assert "Traceback" not in caplog.text, "Orbax logs what we raise"
    assert checkpoints.newest() == 1
    checkpoints.save(4, make_items(4), {})
    assert checkpoints.newest() == 4
    checkpoints.close()


def test_a_manifest_that_cannot_be_written_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(manifest, "write", refuse)
    checkpoints.save(1, make_items(), {})
    with pytest.raises(UserError, match="No space left on device"):
        checkpoints.wait()
    checkpoints.wait()
    assert checkpoints.newest() is None


def test_a_failed_save_is_noticed_without_waiting_for_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, writes = Checkpoints(tmp_path), threading.Event()

    def refuse(*_: Any) -> None:
        writes.wait(60)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(manifest, "write", refuse)
    checkpoints.check()
    checkpoints.save(1, make_items(), {})
    checkpoints.check()
    writes.set()
    assert checkpoints._pending is not None
    concurrent.futures.wait([checkpoints._pending[1]], 60)
    with pytest.raises(UserError, match=r"checkpoint 1 could not be written.*Input/output error"):
        checkpoints.check()
    checkpoints.check()
    checkpoints.close()


def test_a_run_ends_with_the_step_after_a_save_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a save after step 4; the next one would be after step 8."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def check(checkpoints: Checkpoints) -> None:
        if checkpoints._pending is not None:
            concurrent.futures.wait([checkpoints._pending[1]], 60)
        noticed(checkpoints)

    config, noticed = tiny.config_file(), Checkpoints.check
    monkeypatch.setattr(manifest, "write", refuse)
    monkeypatch.setattr(Checkpoints, "check", check)
    with pytest.raises(UserError, match="checkpoint 4 could not be written"):
        tiny.run_train(config, tmp_path / "run")
    assert max(line["step"] for line in tiny.metrics(tmp_path / "run")) == 4


def test_one_of_several_processes_warns_at_once_and_stops_with_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(manifest, "write", lambda *_: [][1])
    checkpoints.save(1, make_items(), {})
    assert checkpoints._pending is not None
    concurrent.futures.wait([checkpoints._pending[1]], 60)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        checkpoints.check()
        checkpoints.check()
    assert caplog.text.count("the run stops at the next save: list index out of range") == 1
    with pytest.raises(IndexError):
        checkpoints.wait()


def test_a_bug_while_saving_stays_a_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(manifest, "write", lambda *_: [][1])
    checkpoints.save(1, make_items(), {})
    with pytest.raises(IndexError):
        checkpoints.wait()
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(2, make_items(), {"array": jnp.zeros(3)})
    checkpoints.close()


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints")
    with pytest.raises(UserError, match="Not a directory"):
        checkpoints.save(1, make_items(), {})


def test_warnings_reach_a_person_without_any_setup(directory: Path) -> None:
    corrupt_by("delete the manifest", directory / "20")
    program = f"from ssl_jax.checkpoint import Checkpoints; print(Checkpoints({str(directory)!r}).newest())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "10\n"
    assert done.stderr.startswith(f"checkpoint {directory / '20'} is not used: no manifest.json")


def test_a_limit_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Checkpoints(tmp_path, save_total_limit=0)


@pytest.mark.multiprocess
def test_two_processes_save_and_agree_on_what_is_good(tmp_path: Path) -> None:
    """Each process holds half of an array; only the first one looks at files, and both restore the same step."""
    program = """
import sys
from pathlib import Path
import jax, numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from ssl_jax.checkpoint import Checkpoints
from ssl_jax.errors import UserError

mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
directory = Path(sys.argv[3])
checkpoints = Checkpoints(directory, save_total_limit=2)
for step in (1, 2, 3):
    whole = np.arange(8, dtype=np.float32) * step
    array = jax.make_array_from_callback((8,), sharding, lambda index: whole[index])
    checkpoints.save(step, {"state": {"w": array}}, {"step": step}, metric=float(step))
checkpoints.wait()
assert checkpoints.steps() == [1, 2, 3], checkpoints.steps()
assert (checkpoints.newest(), checkpoints.best()) == (3, 1)
if jax.process_index() == 0:
    (directory / "3" / "_CHECKPOINT_METADATA").write_text("damaged")
newest = checkpoints.newest()
wanted = {"state": {"w": jax.ShapeDtypeStruct((8,), np.float32, sharding=sharding)}}
restored = checkpoints.restore(newest, wanted)["state"]["w"]
for shard in restored.addressable_shards:
    np.testing.assert_array_equal(shard.data, (np.arange(8, dtype=np.float32) * 2)[shard.index])
try:
    checkpoints.restore(3, wanted)
except UserError as error:
    assert "_CHECKPOINT_METADATA" in str(error)
    print("agreed on", newest)
if jax.process_index() == 1:
    checkpoints._finish = lambda *_: [][1]
else:
    checkpoints._finish = lambda *_: None
checkpoints.save(4, {"state": {"w": array}}, {})
try:
    checkpoints.wait()
except (UserError, IndexError) as error:
    print("both stop:", type(error).__name__)
checkpoints.close()
"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, address, str(index), str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0].endswith("agreed on 2\nboth stop: UserError\n")
    assert outputs[1][0].endswith("agreed on 2\nboth stop: IndexError\n")
