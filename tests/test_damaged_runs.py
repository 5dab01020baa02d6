"""What is damaged in the work directory of an interrupted run: the same command mends it or says what to do."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
from test_resume import assert_same_result

from ssl_jax import loading, manifest, storage, workdir
from ssl_jax.errors import Preempted, UserError
from ssl_jax.logbook import Logbook


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The work directory of a run that was stopped in its second half, after its round."""
    tiny.finished()
    place = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        write = Logbook.metrics

        def watched(self: Logbook, step: int, values: dict[str, float]) -> None:
            write(self, step, values)
            if step == 9 and "loss" in values:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(Logbook, "metrics", watched)
        with pytest.raises(Preempted):
            tiny.run_train(tiny.config_file(), place)
    assert (place / "pseudo_labels" / "round_0").is_dir()
    yield place


@pytest.fixture
def run(interrupted: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


def flip(path: Path) -> None:
    """Flips a bit amid a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_round_that_is_lost_with_its_copy_is_made_again(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Checkpoints after it go: none of them can be gone on from without it."""
    for name in ("round_0", "copy_of_round_0"):
        flip(run / "pseudo_labels" / name / "labels-00000.array_record")
    tiny.run_train(tiny.config_file(), run)
    assert "round_0 and its copy are damaged: labels-00000.array_record differs" in caplog.text
    assert_same_result(run)
    assert (run / "pseudo_labels" / "damaged_round_0").is_dir()


@pytest.mark.parametrize("name", ["config.yaml", "data.json"])
@pytest.mark.parametrize("damage", [flip, lambda path: os.truncate(path, 40), Path.unlink])
def test_a_damaged_file_that_says_what_the_run_is_is_written_again(
    run: Path, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    before = (run / name).read_bytes()
    config, data = workdir.read_config(run), manifest.decode((run / "data.json").read_bytes())
    assert data is not None
    damage(run / name)
    workdir.claim(storage.place(run), config)
    workdir.claim_data(storage.place(run), data)
    assert (run / name).read_bytes() == before
    assert len(caplog.messages) == 1 and f"{run / name} is " in caplog.text


@pytest.mark.parametrize("content", [b"", b"# sha256 of what follows: 0\n", None])
def test_without_its_configuration_a_run_is_still_not_taken_over(run: Path, content: bytes | None) -> None:
    """The checkpoints know what they were made with."""
    (run / "config.yaml").unlink()
    if content is not None:
        (run / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint \d+ in .* was made with another configuration"):
        tiny.run_train(tiny.config_file(), run, "--optimizer.learning-rate", "0.5")


def test_without_its_data_summary_a_run_does_not_go_on_with_other_data(run: Path, tmp_path: Path) -> None:
    (run / "data.json").unlink()
    source = tiny.config_file().with_name("labeled.jsonl")
    before = source.read_bytes()
    try:
        tiny.write_jsonl(source, tiny.read_jsonl(source)[:-1])
        with pytest.raises(UserError, match=r"checkpoint \d+ in .* was made with other data"):
            tiny.run_train(tiny.config_file(), run, "--data.prepared-dir", str(tmp_path / "prepared"))
    finally:
        source.write_bytes(before)


def test_a_damaged_tokenizer_is_not_spoken_with(tmp_path: Path) -> None:
    """One that reads as a tokenizer, but of other ids."""
    copy = tiny.copy_of_finished(tmp_path)
    path = copy / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"t"', '"T"', 1), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"tokenizer is not the tokenizer that the run was trained with|not a tokenizer"
    ):
        loading.load_checkpoint(copy)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"steps"', b"\xff"])
def test_a_damaged_summary_is_made_again(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "summary.json").write_bytes(content)
    assert workdir.read_summary(tmp_path) is None


def test_an_edited_configuration_is_not_read_as_the_run_s(tmp_path: Path) -> None:
    """A head more or less changes no shape, so that nothing else would notice."""
    copy = tiny.copy_of_finished(tmp_path)
    text = (copy / "config.yaml").read_text(encoding="utf-8")
    (copy / "config.yaml").write_text(text.replace("n_head: 2", "n_head: 4"), encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.yaml is damaged, or was edited below its first line"):
        workdir.read_config(copy)
    (copy / "config.yaml").write_text(text.partition("\n")[2].replace("n_head: 2", "n_head: 4"), encoding="utf-8")
    assert workdir.read_config(copy).model.n_head == 4, "without that line it is a person's"
