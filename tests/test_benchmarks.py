"""Every benchmark of training runs at its smallest size and writes figures that belong together."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ssl_jax.errors import UserError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import checkpoint_overhead  # noqa: E402
import memory  # noqa: E402
import performance_table  # noqa: E402
import scaling  # noqa: E402
import soak  # noqa: E402
import start_up  # noqa: E402
import store  # noqa: E402
import train_throughput  # noqa: E402
from alternate import Player, spread, take_turns  # noqa: E402
from workload import workload  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_fast")

# A contestant that needs no time: it says which turn it is, and it fails when it is asked to.
ECHO = """
from alternate import Turns
turns = Turns()
print("what libraries print")
turns.ready({"what": "echo"})
number = 0
while (amount := turns.wait()) is not None:
    if amount < 0:
        raise SystemExit(3)
    number += 1
    turns.answer({"number": number, "seconds": amount})
"""


def echo(name: str) -> Player:
    root = BENCHMARKS.parent
    return Player(name, [sys.executable, "-c", ECHO], {"PYTHONPATH": f"{root}:{BENCHMARKS}"})


def run(script: Any, output: Path, *arguments: str) -> dict[str, Any]:
    """The file that a script writes."""
    script.main([*arguments, "--size", "tiny", "--output", str(output)])
    return json.loads(output.read_text())


def renamed(written: dict[str, Any], before: str, after: str) -> dict[str, Any]:
    """A file's content as if it were of another size or workload: the README's table has no row of the smallest."""
    return {key.replace(before, after): value for key, value in written.items()}


def test_contestants_take_turns_until_the_context_ends():
    with echo("one") as one, echo("other") as other:
        for player in (one, other):
            player.get_ready()
        answers = take_turns([one, other], {"one": 5, "other": 7}, 3)
    assert one.description == {"what": "echo"}
    assert [answer["number"] for answer in answers["one"]] == [1, 2, 3]
    assert {answer["seconds"] for answer in answers["other"]} == {7}
    assert all(answer["cpu_seconds_asleep"] < 0.5 for answer in answers["one"])


def test_a_contestant_that_ends_early_is_named_with_its_exit_code():
    with pytest.raises(UserError, match="one: its process ended with exit code 3"), echo("one") as one:
        one.get_ready()
        one.play(-1)


def test_spread_of_several_values_and_of_one():
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {
        "min": 1.0, "lower_quartile": 2.0, "median": 3.0, "upper_quartile": 4.0, "max": 5.0,
    }  # fmt: skip
    assert set(spread([2.0]).values()) == {2.0}


def test_rows_that_cannot_be_shared_out_are_refused():
    assert workload("tiny", unlabeled_ratio=3).labeled_rows == 1
    with pytest.raises(UserError, match="4 rows cannot hold 2 unlabeled rows per labeled one"):
        workload("tiny", unlabeled_ratio=2)


def test_train_throughput_alone_keeps_other_workloads_figures(tmp_path, capsys):
    output = tmp_path / "train_throughput.json"
    output.write_text('{"another workload": {}}')
    written = run(train_throughput, output, "--peers", "--rounds", "2", "--turn-seconds", "0.01")
    assert list(written) == ["another workload", "tiny, cpu, 4 × 32, dropout 0.1"]
    result = written["tiny, cpu, 4 × 32, dropout 0.1"]
    assert result["commit"] is None or len(result["commit"]) == 40
    rates = result["tokens_per_sec"]["ssl_jax"]
    assert len(rates) == 2
    flops = result["model_flops"]["ssl_jax"]
    assert flops == pytest.approx(sum(rates) / 2 * result["contestants"]["ssl_jax"]["flops_per_token"])
    assert 0 < result["mfu"]["ssl_jax"] < 1
    assert 0 < result["data_share"] < 1
    del written["another workload"]
    shown = {"train_throughput": renamed(written, "tiny, cpu, 4 × 32", "quickstart, cpu, 16 × 128")}
    row = performance_table.training(shown, "quickstart", "cpu", 0.1, "a goal")
    assert row[1:3] == (f"{sum(rates) / 2:,.0f} tokens/s", "not measured")
    assert performance_table.waiting(shown)[1] == f"{result['data_share']:.2%} of the time"
    assert "ssl_jax" in capsys.readouterr().out


def test_scaling_measures_every_point_against_the_first(tmp_path):
    options = ("--axes", "unlabeled", "--ratios", "0", "3", "--rounds", "1", "--turn-seconds", "0.01")
    written = run(scaling, tmp_path / "scaling.json", *options)
    points = written["tiny, cpu, unlabeled"]["points"]
    assert list(points) == ["0 to 1", "3 to 1"]
    assert len({point["flops_per_token"] for point in points.values()}) == 1
    costs = [point["ms_per_ktoken"][0] for point in points.values()]
    ratios = [point["cost_ratio"]["median"] for point in points.values()]
    assert ratios == pytest.approx([cost / costs[0] for cost in costs])
    row = performance_table.unlabeled({"scaling": renamed(written, "tiny", "quickstart")})
    assert row[1] == f"{costs[1]:,.0f} µs"


def test_memory_of_our_loss_is_below_that_of_all_logits(tmp_path):
    options = ("--lengths", "64", "--rows", "32", "--vocabularies", "--steps", "0", "--dropout", "0")
    written = run(memory, tmp_path / "memory.json", *options)
    (point,) = written.values()
    assert point["workload"]["sequence_length"] == 64
    mine, naive = (point[name]["compiler_bytes"] for name in ("ours", "naive"))
    assert 0 < mine < naive
    shown = renamed(written, "tiny, cpu, 32 × 64, vocabulary 512", "gpt2, cpu, 8 × 1024, vocabulary 50257")
    assert performance_table.memory({"memory": shown}, "cpu")[3] == f"{naive / mine:.2f} ×"


def test_start_up_of_every_column_and_goal(tmp_path):
    options = ("--peers", "--repeats", "1", "--goals", "import", "token")
    written = run(start_up, tmp_path / "start_up.json", *options)
    seconds = written["tiny, cpu"]["seconds"]
    assert list(seconds) == ["cold", "warm"]
    for column in seconds.values():
        assert 0 < column["import"][0] < column["token"][0]
    row = performance_table.start({"start_up": renamed(written, "tiny", "quickstart")}, "token", "a title", "a goal")
    assert row[1:3] == (f"{seconds['warm']['token'][0]:.1f} s", "not measured")


def test_versions_of_the_peers_packages_stand_beside_every_result(tmp_path):
    for key in ("one", "other"):
        store.add_result(str(tmp_path / "result.json"), key, {"value": key})
    written = json.loads((tmp_path / "result.json").read_text())
    assert [result["value"] for result in written.values()] == ["one", "other"]
    assert written["one"]["versions"].keys() >= {"torch", "accelerate", "jax"}
    assert isinstance(written["one"]["gpus"], list)


def test_checkpoint_overhead_of_all_kinds_of_saves(tmp_path, capsys):
    options = ("--averaged", "true", "--saves", "2", "--rounds", "2", "--turn_seconds", "0.3")
    written = run(checkpoint_overhead, tmp_path / "checkpoint_overhead.json", *options)
    (result,) = written.values()
    assert result["state_bytes"] == pytest.approx(4 * sum_of_parameters(result["workload"]) * 4, rel=0.03)
    assert [turn["mode"] for turn in result["turns"]] == ["no saves", "Orbax alone", "ours"] * 2
    assert all(turn["steps"] > 0 and turn["seconds"] >= 0.3 for turn in result["turns"])
    for save in result["saves"]:
        assert save["manifest_cpu"] > 0 and 0 < save["manifest"] < save["background"]
    summary = result["summary"]
    assert summary["blocked_seconds"]["min"] >= summary["call_seconds"]["min"] > 0
    cpu = sorted(save["manifest_cpu"] for save in result["saves"])
    assert summary["manifest_share_of_processors"] == pytest.approx(sum(cpu) / 2 / 0.3 / result["cores"])
    assert summary["steps_ratio"].keys() == {"Orbax alone ÷ no saves", "ours ÷ no saves", "ours ÷ Orbax alone"}
    assert "blocked: the call of save" in capsys.readouterr().out


def sum_of_parameters(described: dict[str, Any]) -> int:
    """Of a model whose tables are padded to a multiple of 128 words."""
    width, words = described["n_embd"], -(-described["vocab_size"] // 128) * 128
    return (words + described["n_positions"] + 12 * width * described["n_layer"]) * width


def test_soak_sees_a_whole_run_from_outside(tmp_path, capsys):
    output = tmp_path / "soak.json"
    options = ("--logging_steps", "5", "--eval_steps", "200", "--save_steps", "100", "--rounds", "2")
    soak.main(["--steps", "1200", *options, "--sample_seconds", "0.02", "--output", str(output)])
    (result,) = json.loads(output.read_text()).values()
    assert result["train_step_compilations"] == 1 and len(result["pseudo_accepted"]) == 2
    rows = result["rows"]
    assert list(rows)[:2] == ["resident memory, MB", "open files"]
    assert rows["resident memory, MB"]["first"] > 100 and rows["open files"]["first"] >= 3
    assert rows["records, bytes a step"]["last"] > 0
    last = dict(zip(result["sample_fields"], result["samples"][-1], strict=True))
    assert last["step"] > 1000 and last["cpu_seconds"] > 0
    assert "resident memory, MB" in capsys.readouterr().out


def test_tenths_show_what_grows_and_what_does_not():
    grows = [{"step": step, "value": 100 + step / 100} for step in range(0, 1000, 10)]
    tenths = soak.in_tenths(grows, lambda record: record["step"])
    assert [len(tenth) for tenth in tenths] == [10] * 10
    compared = soak.compare(soak.median_of(tenths, lambda record: record["value"]))
    assert compared["change"] == pytest.approx(compared["last"] / compared["first"] - 1) == pytest.approx(9 / 100.45)
    assert compared["trend"] == pytest.approx(9 / 104.95)
    assert soak.compare([7.0] * 10) == {"first": 7.0, "last": 7.0, "change": 0.0, "trend": 0.0}
    with pytest.raises(UserError, match="too few values for ten parts"):
        soak.in_tenths(grows[:15], lambda record: record["step"])
