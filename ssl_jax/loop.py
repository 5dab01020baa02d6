"""The order of events in a run: steps, metrics, evaluations, checkpoints, pseudo-labeling rounds, signals."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from ssl_jax import (
    description,
    distributed,
    files,
    loading,
    model,
    objectives,
    plan,
    pretrained,
    programs,
    run_state,
    sharding,
    spikes,
    step,
    storage,
    teachers,
    workdir,
)
from ssl_jax.checkpoint import Checkpoints
from ssl_jax.config import Config
from ssl_jax.conversation import as_prompt
from ssl_jax.data.store import Prepared
from ssl_jax.data.streams import Batches, Phase
from ssl_jax.dialogue_model import DialogueModel
from ssl_jax.errors import Preempted, TrainingDiverged
from ssl_jax.evaluation import measure
from ssl_jax.forecast import limits
from ssl_jax.logbook import Logbook
from ssl_jax.progress import Progress, Window
from ssl_jax.pseudo_labels import rounds
from ssl_jax.pseudo_labels.candidates import Kind
from ssl_jax.pseudo_labels.make import Task, make_round
from ssl_jax.signals import SharedSignals, Signals
from ssl_jax.step_records import StepRecords
from ssl_jax.training_streams import ROUNDS, TrainingStreams
from ssl_jax.watchdog import Watchdog

DEV, TEST = "labeled_dev", "labeled_test"


class Run:
    """One training run in a work directory; `train` takes it from wherever it stands to its end."""

    def __init__(self, config: Config, prepared: Prepared, directory: Path | storage.Place, signals: Signals):
        """Makes the plan and the compiled functions; touches no file of the work directory.

        Raises:
          UserError: mesh, batch, data and configuration do not fit together.
        """
        self.config, self.prepared, self.place = config, prepared, storage.place(directory)
        self.directory = self.place.local
        self.mesh = sharding.make_mesh(config.mesh)
        self.signals = SharedSignals(signals, self.mesh)
        self.shape = model.GPT2.from_config(
            config.model, prepared.tokenizer.vocab_size, self.mesh, sequence_length=config.train.sequence_length
        )
        records = {split: len(prepared.lengths(split)) for split in prepared.splits}
        self.sources = TrainingStreams(config, prepared, self.directory)
        self.streams = self.sources.before_rounds()
        self.plan = plan.make_plan(
            config, records, self.streams["labeled"].rows_in_epoch(0), sharding.row_shards(self.mesh)
        )
        self.teachers = teachers.load(config.distillation, config.train, prepared.tokenizer, self.mesh)
        shapes = {name: teacher.shape for name, teacher in self.teachers.items()}
        self.programs = programs.make(config, self.plan, self.shape, self.mesh, shapes)
        limits.check(config, self.plan, self.shape, self.programs.abstract_state, self.mesh)
        self._key = jax.jit(jax.random.key, out_shardings=sharding.replicated(self.mesh))(config.seed)
        self.checkpoints = Checkpoints(
            self.place.path(workdir.CHECKPOINTS),
            save_total_limit=config.train.save_total_limit,
            # What a checkpoint goes on from, rounds and lines of metrics, is never less safe than itself.
            before_manifest=self.place.push,
        )
        self.rollbacks: list[spikes.Rollback] = []
        self.watchdog = Watchdog(config.train.hang_warning_seconds, self._say_aside)
        self.eval_rows = config.train.per_device_eval_batch_size * sharding.row_shards(self.mesh)

    def train(self) -> dict[str, Any]:
        """Trains to the end, evaluates, and writes `summary.json`.

        Returns:
          The summary.

        Raises:
          Preempted: a signal arrived; a checkpoint was saved.
          TrainingDiverged: too many steps in a row without a finite loss, or too many losses that jumped.
          UserError: the disk is full, a checkpoint does not fit the configuration, ….
        """
        with self.watchdog.watching(), self.place.sent_at_end():
            while True:
                try:
                    return self._go_on()
                except spikes.LossSpiked as spiked:
                    self._roll_back(spiked.spike)
                except TrainingDiverged as diverged:
                    raise TrainingDiverged(f"{diverged}\n{self._way_out()}") from None

    def _go_on(self) -> dict[str, Any]:
        """From the newest checkpoint to the end.

        Raises:
          LossSpiked: the run goes back; besides what `train` raises.
        """
        self.signals.saved(True)
        newest = self._newest_with_rounds()
        state, progress = self._restore(newest) if newest else (self.initial_state(), Progress())
        # A checkpoint knows those before it; this process knows those since.
        progress.rollbacks = self.rollbacks = max(progress.rollbacks, self.rollbacks, key=len)
        with (
            Logbook(
                self.directory,
                resume_step=newest or 0,
                resume_time=progress.seconds,
                total_steps=self.plan.total_steps,
                primary=distributed.is_primary(),
            ) as logbook,
            self.signals.ending(logbook.close),
        ):
            self.checkpoints.reserve(run_state.items(state))
            if newest:
                logbook.say(f"going on from checkpoint {newest}")
            logbook.table("plan", description.rows(self.config, self.plan, self.shape, self.mesh, self.streams))
            for warning in description.warnings(self.prepared.summary.get("languages", {})):
                logbook.say(warning)
            for phase in self._phases(newest or 0):
                state = self._phase(phase, state, progress, logbook)
            self._save(state, progress, logbook)
            self.checkpoints.wait()
            return self._finish(progress, logbook)

    def initial_state(self, at: int = 0) -> step.TrainState:
        """The state of a student before step `at + 1`, its first, with pretrained weights where there are some.

        Raises:
          UserError: the weights' files are damaged or do not fit the configuration.
        """
        # fold_in(key, n) is the key of step n, so what begins there needs another one.
        key = jax.random.fold_in(jax.random.fold_in(self._key, at), at) if at else self._key
        if self.config.model.init_from is None:
            return self.programs.init_state(key)
        return self.programs.init_state(key, pretrained.initial_params(self.config, self.shape, self.mesh))

    # Steps -----------------------------------------------------------------------------------------------------------

    def _phases(self, first: int) -> Iterator[Phase]:
        """The phases from `first` on, each planned when the rounds before it have been held."""
        start = first
        while start < self.plan.total_steps:
            phase = next(phase for phase in self.plan.phases(self._accepted()) if phase.start <= start < phase.stop)
            yield dataclasses.replace(phase, start=start, first_row=phase.drawn_before(start))
            start = phase.stop

    def _phase(self, phase: Phase, state: step.TrainState, progress: Progress, logbook: Logbook) -> step.TrainState:
        """Takes the steps of one phase; a round is held before the step that it belongs to."""
        if phase.start in self.plan.round_steps:
            self._hold_round(self.plan.round_steps.index(phase.start), phase.start, state, progress, logbook)
            phase = next(self._phases(phase.start))
            if phase.start in self.plan.born:
                state = dataclasses.replace(self.initial_state(phase.start), step=state.step)
        streams = self.streams
        held = sum(at <= phase.start for at in self.plan.round_steps)
        for name in ROUNDS:
            # Steps at the end that draw no pseudo-labels still log how often they were passed over.
            if name in dict(phase.rows) or phase.first_row[name]:
                stream = self.sources.of_rounds(name, held)
                assert stream is not None, f"rows of {name}, but no round has accepted any"
                streams = {**streams, name: stream}
        batches = Batches(
            phase,
            streams,
            objectives.STREAM_IDS,
            sequence_length=self.config.train.sequence_length,
            rows=sharding.local_rows(self.mesh, self.plan.rows),
        )
        self._enter(logbook, "train", ", ".join(f"{count} {name}" for name, count in phase.rows) + " rows a step")
        if phase.start in self.plan.edges:
            progress.losses.clear()
        passed_over = spikes.passed_over(self.rollbacks)
        train, window = self.config.train, Window(progress.unlogged)
        records = StepRecords(self.config, self.plan, self.shape, batches, window, progress, logbook)
        late: tuple[int, step.Metrics] | None = None
        known = tuple(teacher.params for teacher in self.teachers.values())
        for number, batch in enumerate(batches.read(), start=phase.start):
            done, metrics = number + 1, None
            self.watchdog.moved(f"train, step {done}")
            if done in passed_over:
                state = self.programs.pass_over(state)
            else:
                rows = sharding.put_rows(batch, self.mesh)
                with jax.transfer_guard("disallow"):
                    state, metrics = self.programs.train_step(state, rows, self._key, known)
            self.signals.saved(False)
            # The device is busy with this step while the host reads the metrics of the last one.
            if late is not None:
                records.note(*late)
            late = None if metrics is None else (done, metrics)
            if late is None:
                records.note_passed_over(done, passed_over[done])
            self.checkpoints.check()
            evaluates, saves = done % train.eval_steps == 0, done % train.save_steps == 0
            stops = self.signals.after_step() is not None
            if evaluates or saves or stops or done == phase.stop:
                if late is not None:
                    records.note(*late)
                    late = None
                metric = self._evaluate(done, state, progress, logbook) if evaluates else None
                if evaluates or saves or stops:
                    self._save(state, progress, logbook, metric)
                    self._stop_if_asked(done)
                window.restart()
        return state

    def _roll_back(self, spike: spikes.Spike) -> None:
        """Makes the run go on from its newest checkpoint before the batches that led to a spike, without these.

        Raises:
          TrainingDiverged: it has done so often enough.
        """
        if len(self.rollbacks) >= self.config.train.max_rollbacks:
            raise TrainingDiverged(
                f"{spike}, after {len(self.rollbacks)} rollbacks (train.max_rollbacks)\n{self._way_out()}"
            )
        first = max(1, spike.step + 1 - self.config.train.loss_spike_skip)
        # Which batches are passed over must not depend on when the run happened to be saved.
        checkpoint = self.checkpoints.newest(at_most=first - 1) or 0
        self.checkpoints.drop_after(checkpoint)
        rollback = spikes.Rollback(spike, checkpoint, (first, spike.step))
        self.rollbacks = [*self.rollbacks, rollback]
        self._say_aside(f"warning: {rollback}")

    # Events between steps --------------------------------------------------------------------------------------------

    def _evaluate(self, number: int, state: step.TrainState, progress: Progress, logbook: Logbook) -> float | None:
        """Dev likelihood and samples; returns the metric that decides which checkpoint is the best."""
        speaker = self._speaker(state)
        settings = self.config.evaluation
        metric = None
        if DEV in self.prepared.splits:
            self._enter(logbook, "evaluate")
            encoded, lengths = self.prepared.encoded(DEV), self.prepared.lengths(DEV)
            values = measure.quick(speaker, encoded, lengths, settings.dev_dialogues, rows=self.eval_rows)
            metric = values["reply_bits_per_byte"]
            if progress.best is None or metric < progress.best[0]:
                progress.best = (metric, number)
            logbook.metrics(number, {f"eval/{name}": value for name, value in values.items()})
        prompts = [as_prompt(prompt) for prompt in settings.sample_prompts]
        if prompts:
            replies = speaker.draw(prompts, settings.sampling, seed=self.config.seed)
            rows = [
                {"prompt": prompt, "reply": drawn[0].text}
                for prompt, drawn in zip(settings.sample_prompts, replies, strict=True)
            ]
            logbook.samples(number, rows)
        return metric

    def _save(self, state: step.TrainState, progress: Progress, logbook: Logbook, metric: float | None = None) -> None:
        self.watchdog.moved("save")
        progress.seconds = logbook.elapsed()
        meta = {**progress.to_meta(), "scan_layers": self.shape.scan_layers, **self._origin()}
        self.checkpoints.save(int(state.step), run_state.items(state), meta, metric=metric)

    def _hold_round(self, number: int, at: int, state: step.TrainState, progress: Progress, logbook: Logbook) -> None:
        """Holds the round before step `at + 1`, but for what an earlier process did of it, and logs it."""
        settings, saved = self.config.pseudo_labels, False
        for name, directory in self._rounds().items():
            summary, timing = rounds.read_summary(directory, number), {}
            if summary is None:
                if not saved:
                    self._save(state, progress, logbook)
                    self.checkpoints.wait()
                    self.signals.saved(True)
                    saved = True
                # What was drawn of it before an interruption, every process must find.
                self.place.share(f"{name} {number} goes on", directory.name)
                asked = self.sources.asked(name, number)
                kind: Kind = "replies" if name == "pseudo" else "contexts"
                self._enter(logbook, "pseudo-label", f"round {number}, {kind} for {len(asked)} dialogues")
                started = time.monotonic()
                summary = make_round(
                    Task(
                        kind=kind,
                        directory=directory,
                        round_number=number,
                        seed=self.config.seed,
                        step=at,
                        batch_size=settings.batch_size * sharding.row_shards(self.mesh),
                    ),
                    self._speaker(state) if settings.teacher == "ema" else self._dialogue_model(state.params),
                    asked,
                    settings,
                    between=functools.partial(self._between_pieces, at),
                )
                self.place.share(f"{name} {number} is made", directory.name)
                seconds = time.monotonic() - started
                rate = summary["generated_tokens"] / seconds
                timing = {f"{name}/seconds": seconds, f"{name}/tokens_per_sec": rate}
            counts = {f"{name}/{key}": summary[key] for key in ("round", "generated", "accepted", "accept_rate")}
            # A line of step n is dropped when a run resumes before n. The round's line is for the step that follows it,
            # so it is there exactly once, however often the round is come by.
            logbook.metrics(at + 1, {**counts, **timing})
            if not summary["accepted"]:
                reasons = ", ".join(f"{reason} {count}" for reason, count in summary["removed"].items() if count)
                logbook.say(
                    f"warning: round {number} accepted none of {summary['generated']} {summary['kind']} ({reasons}); "
                    "its rows go to other data; see the filters of pseudo_labels, or hold the round later"
                )

    def _between_pieces(self, at: int, _: int) -> None:
        self.watchdog.moved()
        self._stop_if_asked(at)

    def _finish(self, progress: Progress, logbook: Logbook) -> dict[str, Any]:
        """The final evaluation, with the best checkpoint or the last one."""
        chosen = loading.served_step(self.checkpoints, self.config.train)
        assert chosen is not None
        speaker = loading.load_checkpoint(self.place, step_number=chosen, mesh=self.mesh)
        split = TEST if TEST in self.prepared.splits else DEV
        self.signals.saved(True)
        self._enter(logbook, "evaluate", f"{split}, checkpoint {chosen}")

        def say(text: str) -> None:
            self._stop_if_asked(self.plan.total_steps)
            self._enter(logbook, "evaluate", text)

        result = {}
        if split in self.prepared.splits:
            result = measure.full(
                speaker,
                self.prepared.encoded(split),
                functools.partial(self.prepared.dialogue, split),
                self.config.evaluation,
                rows=self.eval_rows,
                say=say,
            )
            result = {"split": split, "checkpoint": chosen, **result}
            if distributed.is_primary():
                files.write_json(self.directory / f"eval_{split.removeprefix('labeled_')}.json", result)
        held = self._rounds()
        summary = {
            "exit": 0,
            "steps": self.plan.total_steps,
            "checkpoint": chosen,
            "best_dev_reply_bits_per_byte": progress.best[0] if progress.best else None,
            "tokens": sum(progress.tokens.values()),
            "tokens_by_stream": progress.tokens,
            "seconds": round(logbook.elapsed(), 1),
            "parameters": plan.parameter_count(self.shape),
            "train_step_compilations": self._compilations(),
            **{f"{place.name}_accepted": [one[name] for one in self._accepted()] for name, place in held.items()},
            "split": split,
            "evaluation": result.get("metrics", {}),
            "human": result.get("human", {}),
        }
        if distributed.is_primary():
            files.write_json(self.directory / "summary.json", summary)
        return summary

    def _stop_if_asked(self, number: int) -> None:
        """Stops if any process was told to; all of them come here at the same points."""
        if (name := self.signals.now()) is not None:
            self.watchdog.moved("save")
            self.checkpoints.wait()
            raise Preempted(f"{name} at step {number}; a checkpoint is saved, run the same command to go on")

    def _way_out(self) -> str:
        newest = self.checkpoints.newest()
        stands = f"the last good checkpoint is {newest}" if newest else "no checkpoint was saved yet"
        return f"{stands}; lower optimizer.learning_rate, or look at the dialogues"

    def _enter(self, logbook: Logbook, phase: str, detail: str = "") -> None:
        """Shows what the run does from now on."""
        self.watchdog.moved(f"{phase}: {detail}" if detail else phase)
        logbook.phase(phase, detail)

    def _say_aside(self, text: str) -> None:
        """What any process has to say, whether a logbook is open or not."""
        who = "" if distributed.is_primary() else f"process {jax.process_index()}: "
        print(f"{who}{text}", file=sys.stderr, flush=True)

    # Parts -----------------------------------------------------------------------------------------------------------

    def _rounds(self) -> dict[str, Path]:
        """Streams that are made of rounds, and where these are."""
        rows = {"pseudo": self.plan.pseudo_rows, "translated": self.plan.translated_rows}
        return {name: self.directory / ROUNDS[name] for name, number in rows.items() if number}

    def _newest_with_rounds(self) -> int | None:
        """The newest checkpoint whose rounds are there; those after a round that is lost go, which makes it again."""
        places, steps = list(self._rounds().values()), self.plan.round_steps
        event = f"mend rounds after {len(self.rollbacks)} rollbacks"
        whole = distributed.primary_first(event, lambda: rounds.mend(places, len(steps)))
        newest = self.checkpoints.newest()
        if newest is None or whole == len(steps) or newest <= steps[whole]:
            return newest
        self.checkpoints.drop_after(steps[whole])
        return self.checkpoints.newest()

    def _accepted(self) -> list[dict[str, int]]:
        """What each finished round accepted, by stream."""
        accepted = []
        for number in range(len(self.plan.round_steps)):
            by_name = {name: rounds.read_summary(place, number) for name, place in self._rounds().items()}
            held = {name: summary["accepted"] for name, summary in by_name.items() if summary is not None}
            if len(held) == len(by_name):
                accepted.append(held)
        return accepted

    def _speaker(self, state: step.TrainState) -> DialogueModel:
        """The model that is evaluated and that teaches: the averaged weights where there are any."""
        return self._dialogue_model(state.ema if state.ema is not None else state.params)

    def _dialogue_model(self, params: model.Params) -> DialogueModel:
        return DialogueModel(self.shape, params, self.prepared.tokenizer, self.mesh)

    def _restore(self, number: int) -> tuple[step.TrainState, Progress]:
        """The state and the progress of a checkpoint.

        Raises:
          UserError: it is of another run, or damaged.
        """
        meta = self.checkpoints.meta(number)
        name, shards = f"checkpoint {number} in {self.place.name}", sharding.row_shards(self.mesh)
        run_state.check_origin(meta, self._origin(), self.config, shards, name)
        return run_state.restore(self.checkpoints, number, self.programs.abstract_state), Progress.from_meta(meta)

    def _origin(self) -> dict[str, Any]:
        return run_state.origin(self.config, self.prepared.summary["content_hash"], self.plan)

    def _compilations(self) -> int:
        """How many programs the train step was compiled to: one, whatever the phases."""
        cache: Any = self.programs.train_step
        return cache._cache_size()
