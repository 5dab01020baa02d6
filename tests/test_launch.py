"""The files of launch/: what they say is valid and agrees, and the scripts do what they promise, without a network."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPT = LAUNCH / "until_done.sh"

# A stand-in for `python` that notes its arguments and ends with the next of the given codes.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "$@" >> "$0.calls"
trap 'exit 75' TERM
if [[ "{codes}" == hang ]]; then touch "$0.started"; while true; do sleep 0.05; done; fi
codes=({codes})
exit "${{codes[$(($(wc -l < "$0.calls") - 1))]}}"
"""


def start(folder: Path, codes: str) -> subprocess.Popen:
    python = folder / "python"
    python.write_text(FAKE_PYTHON.format(codes=codes), encoding="utf-8")
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.Popen([str(SCRIPT), "--config", "a b.yaml"], env=environment, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize(("codes", "end", "calls"), [("0", 0, 1), ("75 0", 0, 2), ("75 3", 3, 2), ("2", 2, 1)])
def test_a_preempted_run_goes_on_and_any_other_end_is_passed_on(
    tmp_path: Path, codes: str, end: int, calls: int
) -> None:
    assert start(tmp_path, codes).wait(timeout=20) == end
    lines = (tmp_path / "python.calls").read_text(encoding="utf-8").splitlines()
    assert lines == ["-m ssl_jax.train --config a b.yaml"] * calls


def test_a_signal_is_passed_on_and_nothing_is_started_again(tmp_path: Path) -> None:
    process = start(tmp_path, "hang")
    for _ in range(200):
        if (tmp_path / "python.started").exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75
    assert len((tmp_path / "python.calls").read_text(encoding="utf-8").splitlines()) == 1


@pytest.mark.parametrize("script", ["until_done.sh", "tpu_vm.sh", "slurm.sbatch"])
def test_shellcheck_has_nothing_to_say(script: str) -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not on PATH; the dev extra has it")
    done = subprocess.run(["shellcheck", str(LAUNCH / script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_has_nothing_to_say() -> None:
    if not shutil.which("hadolint"):
        pytest.skip("hadolint is not on PATH; the dev extra has it")
    done = subprocess.run(["hadolint", str(LAUNCH / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_the_jobset_has_a_pod_for_each_host_of_its_slice() -> None:
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text(encoding="utf-8"))
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    across, down = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["completions"] == job["parallelism"] == int(across) * int(down) // chips
    assert (job["completionMode"], job["backoffLimit"], pod["restartPolicy"]) == ("Indexed", 0, "Never")
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2, 3]}
    assert container["command"] == ["python", "-m", "ssl_jax.train"]
    assert (LAUNCH.parent / container["args"][container["args"].index("--config") + 1]).is_file()
    (mount,) = container["volumeMounts"]
    assert container["args"][container["args"].index("--workdir") + 1].startswith(mount["mountPath"])
    assert [volume["name"] for volume in pod["volumes"]] == [mount["name"]]


def test_the_skypilot_task_writes_to_its_mount_on_a_spot_machine() -> None:
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text(encoding="utf-8"))
    assert set(task) == {"name", "resources", "num_nodes", "workdir", "file_mounts", "setup", "run"}
    assert task["resources"]["use_spot"] is True
    (mount,) = task["file_mounts"]
    command = task["run"].splitlines()[-1].split()
    assert (LAUNCH.parent / command[0]).is_file()
    assert (LAUNCH.parent / command[command.index("--config") + 1]).is_file()
    assert command[command.index("--workdir") + 1].startswith(mount + "/")


# A stand-in for `gcloud`: notes its arguments, and answers a question after the state or the training with the next
# line of a file.
FAKE_GCLOUD = """#!/usr/bin/env bash
here=$(dirname "$0")
printf '%s\\n' "${*//$'\\n'/ }" >> "$here/calls"
next() { head -n 1 "$here/$1"; sed -i 1d "$here/$1"; }
case "$*" in
  *queued-resources\\ list*) next states ;;
  *queued-resources\\ create*) [[ ! -f "$here/quota" ]] || { echo "Quota exceeded" >&2; exit 1; } ;;
  *ssl_jax-end=*) for end in $(next ends); do echo "ssl_jax-end=$end"; done ;;
esac
"""


def drive(folder: Path, action: str, states: list[str], ends: list[str]) -> tuple[int, list[str]]:
    """Runs tpu_vm.sh with a gcloud that answers from these lists; returns its exit code and what gcloud was told."""
    gcloud = folder / "gcloud"
    gcloud.write_text(FAKE_GCLOUD, encoding="utf-8")
    gcloud.chmod(0o755)
    (folder / "states").write_text("".join(f"{state}\n" for state in states), encoding="utf-8")
    (folder / "ends").write_text("".join(f"{end}\n" for end in ends), encoding="utf-8")
    options = ["--zone", "z", "--type", "v6e-8", "--runtime", "r", "--spot", "--poll", "0"]
    command = [str(LAUNCH / "tpu_vm.sh"), action, "slice", *options, "--", "--config", "a b.yaml"]
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, (folder / "calls").read_text(encoding="utf-8").splitlines()


def kinds(calls: list[str]) -> list[str]:
    """What each call that changes something was for."""
    words = {"queued-resources create": "create", "queued-resources delete": "delete", "tpu-vm scp": "copy"}
    words |= {"uv pip install": "install", "until_done.sh": "train"}
    return [kind for call in calls for word, kind in words.items() if word in call]


def test_a_preempted_slice_is_asked_for_again_until_the_training_is_done(tmp_path: Path) -> None:
    states = ["", "", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE", "SUSPENDED", "SUSPENDED", "", "ACTIVE", "ACTIVE"]
    code, calls = drive(tmp_path, "train", states, ["running running", "0 0"])
    assert code == 0
    once = ["create", "copy", "install", "train"]
    assert kinds(calls) == [*once, "delete", *once]
    create = next(call for call in calls if "queued-resources create" in call)
    assert "create slice --node-id slice --zone z" in create
    assert create.endswith("--accelerator-type v6e-8 --runtime-version r --spot")
    assert all("--worker=all" in call for call in calls if "tpu-vm ssh" in call or "tpu-vm scp" in call)
    assert (tmp_path / "states").read_text(encoding="utf-8") == ""


@pytest.mark.parametrize(("ends", "code"), [("running 2", 2), ("3 3", 3), ("0 1", 1), ("0 137", 1)])
def test_an_end_that_is_no_preemption_is_not_tried_again(tmp_path: Path, ends: str, code: int) -> None:
    end, calls = drive(tmp_path, "train", ["", "", "ACTIVE", "ACTIVE"], [ends])
    assert end == code
    assert kinds(calls) == ["create", "copy", "install", "train"]


def test_a_training_that_is_going_on_is_attached_to(tmp_path: Path) -> None:
    end, calls = drive(tmp_path, "train", ["ACTIVE", "ACTIVE"], ["running running", "0 0"])
    assert (end, kinds(calls)) == (0, [])


def test_a_training_that_was_told_to_stop_starts_again_on_the_slice(tmp_path: Path) -> None:
    end, calls = drive(tmp_path, "train", ["ACTIVE"] * 5, ["none none", "75 1", "0 0"])
    assert (end, kinds(calls)) == (0, ["copy", "install", "train"] * 2)


def test_a_refused_quota_ends_it_after_one_try(tmp_path: Path) -> None:
    (tmp_path / "quota").touch()
    end, calls = drive(tmp_path, "train", ["", ""], [])
    assert (end, kinds(calls)) == (1, ["create"])


def test_a_request_that_failed_before_there_was_a_slice_is_not_repeated(tmp_path: Path) -> None:
    end, calls = drive(tmp_path, "create", ["", "FAILED"], [])
    assert (end, kinds(calls)) == (1, ["create"])


def test_delete_gives_the_slice_back(tmp_path: Path) -> None:
    end, calls = drive(tmp_path, "delete", [], [])
    assert (end, kinds(calls)) == (0, ["delete"])
    assert "--force" in calls[0]
