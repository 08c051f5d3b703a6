"""`torchrun -m xbm train`: files, output and resumption of a run with three processes.

Run as a script, this file is the command `xbm` with a fault injected into rank 1 after a step:
`test_train_ranks.py STEP FAULT train ...`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import xbm
from xbm.experiments import checkpoint, runs

RANKS, STEPS, SECONDS = 3, 12, 120
OPTIONS = ["--classes", "4", "--instances", "2", "--dim", "8", "--capacity", "20", "--warmup", "2", "--shift", "1"]
OPTIONS += ["--steps", str(STEPS), "--threads", "1", "--checkpoint-every", "4"]  # 8 pictures per step, split 3, 3, 2
FILES = {"checkpoint.safetensors", "config.json", "metrics.json", "report.html"}


def stopped():
    """Send SIGTERM to torchrun, which forwards it to all ranks; return once this rank has recorded it.

    Blocking the signal and waiting for it would fail: one of gloo's threads, which do not block it, may receive it.
    """
    stop = signal.getsignal(signal.SIGTERM).__self__
    os.kill(os.getppid(), signal.SIGTERM)
    while not stop.signal:
        time.sleep(0.01)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def befall(step, what):
    """Inject a fault into rank 1 after a step."""
    real = runs.shown

    def shown(*given):
        show = real(*given)

        def also(now):
            show(now)
            if now == step and os.environ["RANK"] == "1":
                what()

        return also

    runs.shown = shown


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory):
    """Return a function that runs `xbm` on three ranks and returns the exit code and each rank's (stdout, stderr)."""

    def run(*arguments, after=None):
        logs = tmp_path_factory.mktemp("logs")
        launcher = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(RANKS)]
        launcher += ["--shutdown-timeout", "10", "--log-dir", str(logs), "--redirects", "3"]
        program = [__file__, *map(str, after)] if after else ["-m", "xbm"]
        path = os.pathsep.join(filter(None, [str(Path(xbm.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *launcher, *program, *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            said = process.communicate(timeout=SECONDS)[1]
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun ends its ranks first
                process.wait()
        where = [next(logs.glob(f"*/attempt_0/{rank}"), logs) for rank in range(RANKS)]
        assert logs not in where, said
        return process.returncode, [((at / "stdout.log").read_text(), (at / "stderr.log").read_text()) for at in where]

    return run


@pytest.fixture(scope="module")
def whole(torchrun, data, tmp_path_factory):
    """Return the folder of an uninterrupted run, and its ranks' output."""
    out = tmp_path_factory.mktemp("ranks") / "whole"
    code, said = torchrun("train", data, "--out", out, *OPTIONS)
    assert code == 0, said
    return out, said


def test_rank_0_speaks_and_writes_for_all(whole, data, tmp_path, xbm_command):
    out, (first, *others) = whole
    assert {path.name for path in out.iterdir()} == FILES
    assert others == [("", "")] * (RANKS - 1)
    for words in ("5 classes        30 pictures\nValidation", "test classes", f"Report: {out / 'report.html'}"):
        assert first[0].count(words) == 1, first
    assert first[1] == ""
    metrics = json.loads((out / "metrics.json").read_text())
    evaluated = xbm_command("eval", out, "--data", data, "--threads", "1")
    assert evaluated.exit_code == 0, evaluated.output
    assert f" {metrics['test']['recall_at']['1']:.3f} " in evaluated.output

    alone = tmp_path / "alone"
    assert xbm_command("train", data, "--out", alone, *OPTIONS).exit_code == 0
    (tensors, values), (expected, expected_values) = (checkpoint.read(one / checkpoint.NAME) for one in (out, alone))
    assert {name: one.shape for name, one in tensors.items()} == {name: one.shape for name, one in expected.items()}
    for name in ("labels", "ids", "stored_at", "cursor", "count", "step", "skipped"):
        torch.testing.assert_close(tensors[f"xbm.{name}"], expected[f"xbm.{name}"], rtol=0, atol=0)
    # Values differ, since batch norm sees other pictures; but summed, not averaged, gradients would be 3 times larger.
    sizes = [sum(m.norm() for name, m in one.items() if name.endswith("exp_avg")) for one in (tensors, expected)]
    assert 0.5 < sizes[0] / sizes[1] < 2
    assert values["config"] == expected_values["config"]
    assert values["curves"]["recall_steps"] == expected_values["curves"]["recall_steps"]
    assert values["curves"]["recall"][0] == expected_values["curves"]["recall"][0]


def test_stopped_then_killed_it_ends_as_if_never_left(whole, torchrun, data, tmp_path, xbm_command):
    out, again = tmp_path / "run", ["train", "--out", tmp_path / "run", "--resume"]
    code, (first, *others) = torchrun("train", data, "--out", out, *OPTIONS, after=(3, "stopped"))
    assert code != 0
    advice = f"resume with: torchrun --nproc-per-node {RANKS} -m xbm train --out {out} --resume"
    assert f"Stopped after step 3 of {STEPS}; {advice}" in first[0]
    assert others == [("", "")] * (RANKS - 1)
    shutil.copytree(out, tmp_path / "alone")

    code, ranks = torchrun(*again, after=(10, "killed"))
    assert code != 0
    for rank in (0, 2):
        assert f"rank {rank} of {RANKS} stops, because another rank died" in ranks[rank][1]
    assert checkpoint.read(out / checkpoint.NAME)[1]["step"] == 8

    code, ranks = torchrun(*again)
    assert code == 0, ranks
    (tensors, values), (expected, expected_values) = (checkpoint.read(one / checkpoint.NAME) for one in (out, whole[0]))
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0, msg=name)
    assert values["curves"] == expected_values["curves"]

    alone = xbm_command("train", "--out", tmp_path / "alone", "--resume")
    assert alone.exit_code == 0, alone.output
    assert f"processes {RANKS}, resumed with" in alone.output


def test_what_rank_0_refuses_ends_all(whole, torchrun, data):
    before = {path: path.read_bytes() for path in whole[0].iterdir()}
    code, (first, *others) = torchrun("train", data, "--out", whole[0], *OPTIONS)
    assert code != 0
    assert first[1].startswith(f"Error: {whole[0]} already contains a run")
    assert first[1].count("\n") == 1
    assert others == [("", "")] * (RANKS - 1)
    assert {path: path.read_bytes() for path in whole[0].iterdir()} == before


if __name__ == "__main__":
    from xbm.__main__ import main

    befall(int(sys.argv.pop(1)), {"stopped": stopped, "killed": killed}[sys.argv.pop(1)])
    main()
