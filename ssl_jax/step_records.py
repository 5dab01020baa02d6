"""What a run notes of its steps: means, counts and rates, updates that were skipped, losses that jumped."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from ssl_jax import hardware, objectives, plan, spikes, step
from ssl_jax.config import Config
from ssl_jax.data.streams import Batches
from ssl_jax.errors import TrainingDiverged
from ssl_jax.logbook import Logbook
from ssl_jax.model import GPT2
from ssl_jax.progress import Progress, Window


class StepRecords:
    """The records of one phase's steps."""

    def __init__(
        self,
        config: Config,
        run_plan: plan.Plan,
        shape: GPT2,
        batches: Batches,
        window: Window,
        progress: Progress,
        logbook: Logbook,
    ) -> None:
        self._config, self._plan, self._shape = config, run_plan, shape
        self._batches, self._window, self._progress, self._logbook = batches, window, progress, logbook

    def note(self, number: int, device_metrics: step.Metrics) -> None:
        """Counts a step and, where a line of metrics is due, writes it.

        Args:
          number: the step's, from 1; every step is noted once, in order.
          device_metrics: what the step returned; waits for it.

        Raises:
          LossSpiked: its loss has jumped.
          TrainingDiverged: too many updates in a row were skipped.
          UserError: the files of records cannot be written.
        """
        metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
        fed = {name: int(metrics.pop(f"fed/{name}")) for name in objectives.STREAM_IDS}
        for name, count in fed.items():
            self._progress.tokens[name] += count
        if metrics["skipped"]:
            self._note_skipped(number, metrics)
        elif self._config.train.loss_spike_threshold is not None:
            self._look_for_spike(number, metrics["loss"])
        self._window.add(metrics, sum(fed.values()))
        self._write_if_due(number)

    def note_passed_over(self, number: int, spike: spikes.Spike) -> None:
        """Writes down a step that learned nothing, and, where a line of metrics is due, that of the steps before it."""
        self._logbook.skipped(number, f"passed over: {spike}", self._batches.dialogue_ids(number - 1))
        if len(self._window):
            self._write_if_due(number)

    def _write_if_due(self, number: int) -> None:
        if number % self._config.train.logging_steps and number != self._plan.total_steps:
            return
        values: dict[str, float] = self._window.means()
        rate, tokens = self._window.tokens_per_second(), self._progress.tokens
        values |= {"tokens": sum(tokens.values()), "tokens_per_sec": rate}
        values |= {f"tokens/{name}": count for name, count in tokens.items()}
        values |= {f"epoch/{name}": passes for name, passes in self._batches.passes(number).items()}
        chip = hardware.chip_of(jax.devices()[0].device_kind)
        if chip is not None:
            flops = plan.flops_per_token(self._shape, self._config.train.sequence_length)
            values["mfu"] = rate * flops / (chip.peak * jax.device_count())
        self._logbook.metrics(number, values)
        self._window.clear()

    def _note_skipped(self, number: int, metrics: dict[str, float]) -> None:
        """Says which step made no update and which dialogues it was fed."""
        dialogues = self._batches.dialogue_ids(number - 1)
        reason = f"not finite: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
        self._logbook.skipped(number, reason, dialogues)
        fed = "; ".join(f"{name}: {_some(ids)}" for name, ids in dialogues.items())
        self._logbook.say(f"step {number}: loss or gradient is not finite; the update is skipped (dialogues of {fed})")
        if metrics["skipped"] >= self._config.train.max_nonfinite_steps:
            raise TrainingDiverged(
                f"loss or gradient was not finite {int(metrics['skipped'])} times in a row, up to step {number}, with "
                f"dialogues of {fed} (all of them: skipped.jsonl)"
            )

    def _look_for_spike(self, number: int, loss: float) -> None:
        """Compares a loss with those before, and remembers it."""
        train, losses = self._config.train, self._progress.losses
        assert train.loss_spike_threshold is not None
        window = train.loss_spike_window
        spike = spikes.find(number, loss, losses, window=window, threshold=train.loss_spike_threshold)
        if spike is not None:
            raise spikes.LossSpiked(spike)
        losses.append(loss)
        del losses[:-window]


def _some(names: Sequence[str], shown: int = 3) -> str:
    """The first few of them."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
