"""The training loop as a user meets it: as a command, killed, resumed, misused."""
import csv
import errno
import functools
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import infer
import oracle
import train
from data import Photos, UserError, draw_scene, gray_of, network_to_rgb, rgb_to_network, to_tensor
from model import Colorizer, ModelConfig
from test_infer import network, outcome

TOP = Path(train.__file__).parent
TINY = ("--data synthetic --train-size 24 --val-size 4 --size 32 --width 4 --latent 8 --batch-size 4 --val-every 4 "
        "--device cpu --workers 0 --lpips 0").split()
LIMIT = 240  # seconds for a program that takes ten: whoever waits for ever fails and does not stop the tests


@pytest.fixture(autouse=True)
def signals_stay_with_pytest():
    numbers = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
    before = [signal.getsignal(n) for n in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def command(*arguments, **options):
    """train.py as a process of its own, with pipes for what it prints."""
    return subprocess.Popen([sys.executable, str(TOP / "train.py"), *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def go(*arguments):
    """train.py in this process -> its exit code."""
    return train.main([*map(str, arguments)])


def saved(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)


def log(folder):
    with open(folder / "log.csv") as file:
        return list(csv.DictReader(file))


def wait_for(path, process):
    """Until a running program has written a file."""
    end = time.monotonic() + LIMIT
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=9)
        time.sleep(.01)


def assert_same(a, b):
    """Two trees of plain values and tensors, equal bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for pair in zip(a, b):
            assert_same(*pair)
    else:
        assert a == b


# ---- runs: the same whatever interrupts them --------------------------------------------------------------

def test_kill_9_and_resume_equal_an_uninterrupted_run_bit_for_bit(tmp_path):
    a, b = tmp_path / "killed", tmp_path / "whole"
    process = command(*TINY, "--steps", 100_000, "--output", a)
    wait_for(a / "last.pt", process)
    process.kill()
    process.communicate(timeout=LIMIT)
    end = saved(a)["step"] + 6  # two more validations' worth, and not a multiple of anything
    # The second session even loads with two processes: they must not matter.
    assert go(*TINY, "--steps", end, "--output", a, "--resume", "--workers", 2) == 0
    assert go(*TINY, "--steps", end, "--output", b) == 0
    a, b = saved(a), saved(b)
    assert a["step"] == b["step"] == end
    for part in ("weights", "optimizers", "best"):
        assert_same(a[part], b[part])
    assert [{**row, "seconds": 0} for row in a["log"]] == [{**row, "seconds": 0} for row in b["log"]]


def test_two_processes_learn_what_one_learns_with_twice_the_batch(tmp_path):
    """--accumulate 2 is the oracle: the same pictures, each half normalized by itself, the gradients' mean."""
    def losses(folder):
        return [float(row["train_loss"]) for row in log(folder)]
    one, two = tmp_path / "one", tmp_path / "two"
    options = [*TINY, "--palette", ".1", "--pair", ".2", "--dropout", ".2"]
    go(*options, "--steps", 12, "--accumulate", 2, "--output", one)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(TOP / "train.py")]
    process = subprocess.run([*torchrun, *options, "--steps", "8", "--output", str(two)], capture_output=True, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=LIMIT)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("done:") == 1  # one of them tells, and writes
    assert losses(two) == pytest.approx(losses(one)[:2], rel=1e-5)
    with pytest.raises(UserError, match="its steps are of 8 pictures, not 4"):
        go(*options, "--steps", 12, "--output", two, "--resume")
    go(*options, "--steps", 12, "--accumulate", 2, "--output", two, "--resume")
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)


def test_sigterm_saves_the_step_in_hand_and_says_how_to_go_on(tmp_path):
    """To the whole process group: `timeout` and job schedulers send it to the loading processes as well."""
    process = command(*TINY, "--workers", 2, "--steps", 100_000, "--output", tmp_path / "run", start_new_session=True)
    wait_for(tmp_path / "run" / "last.pt", process)
    first = saved(tmp_path / "run")["step"]
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 130 and "--resume" in out and not err, (out, err)
    told = int(out.rpartition("stopped at step ")[2].split(";")[0])
    assert saved(tmp_path / "run")["step"] == told >= first


def test_ctrl_c_before_the_first_validation_leaves_a_checkpoint_and_a_sample(tmp_path, capsys):
    run = tmp_path / "run"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs us in the background ignores it

    def interrupt():
        while not (run / ".lock").exists():  # written when the handlers are in place
            time.sleep(.01)
        time.sleep(.3)
        os.kill(os.getpid(), signal.SIGINT)
    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert go(*TINY, "--steps", 100_000, "--val-every", 100_000, "--output", run) == 130
    thread.join()
    step = saved(run)["step"]
    assert f"stopped at step {step}" in capsys.readouterr().out and step > 0
    assert saved(run, "best.pt")["step"] == step and (run / "samples" / f"{step:07d}.png").exists()
    assert log(run)[-1]["step"] == str(step)
    # The next validation finds a better one: what was never validated is not the best.
    assert go(*TINY, "--steps", step + 1, "--output", run, "--resume") == 0
    assert saved(run, "best.pt")["step"] == step + 1 and math.isfinite(saved(run)["best"])


def test_ctrl_c_in_the_step_of_a_validation_does_not_lose_it(tmp_path, monkeypatch, capsys):
    """Stopped after step 4, with --val-every 4, and resumed: the same rows as in one go."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert go(*TINY, "--steps", 8, "--output", whole) == 0

    class AfterStepFour:
        def __bool__(self):
            return next(steps) == 4
    steps = iter(range(1, 100))
    with monkeypatch.context() as once:
        once.setattr(train, "listen_for_stop", AfterStepFour)
        assert go(*TINY, "--steps", 8, "--output", run) == 130
    assert "stopped at step 4" in capsys.readouterr().out
    assert go(*TINY, "--steps", 8, "--output", run, "--resume") == 0
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in log(folder)] for folder in (whole, run)]
    assert rows[0] == rows[1] and len(rows[0]) == 2


def test_ctrl_c_in_the_last_step_has_nothing_to_stop(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "listen_for_stop", lambda: [signal.SIGINT])
    assert go(*TINY, "--steps", 1, "--output", tmp_path / "run") == 0
    assert "done" in capsys.readouterr().out and float(log(tmp_path / "run")[-1]["val_loss"]) > 0


def test_a_run_that_ended_before_its_first_checkpoint_can_be_started_again(tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.raises(UserError, match="try a lower --lr .*nothing was saved"):
        go(*TINY, "--steps", 3, "--lr", 2e9, "--output", run)
    assert go(*TINY, "--steps", 1, "--output", run) == 0


def test_a_run_killed_between_its_first_two_checkpoints_goes_on(tmp_path, monkeypatch):
    save = train.Run.save

    def killed(run, name, *arguments):
        if name == "last.pt":
            raise SystemExit
        save(run, name, *arguments)
    with monkeypatch.context() as once:
        once.setattr(train.Run, "save", killed)
        with pytest.raises(SystemExit):
            go(*TINY, "--steps", 2, "--val-every", 1, "--output", tmp_path / "run")
    assert not (tmp_path / "run" / "last.pt").exists()
    go("--steps", 1, "--output", tmp_path / "run", "--resume")                          # nothing to do
    go("--steps", 2, "--output", tmp_path / "run", "--resume")
    go(*TINY, "--steps", 2, "--val-every", 1, "--output", tmp_path / "whole")
    assert_same(saved(tmp_path / "run")["weights"], saved(tmp_path / "whole")["weights"])
    assert len(log(tmp_path / "run")) == 2


def test_a_run_killed_in_its_last_report_gets_the_last_row_of_its_log(tmp_path, monkeypatch):
    def killed(*_):
        raise SystemExit
    with monkeypatch.context() as once:
        once.setattr(train, "sample", killed)
        with pytest.raises(SystemExit):
            go(*TINY, "--steps", 1, "--output", tmp_path)
    assert saved(tmp_path)["step"] == 1 and not (tmp_path / "log.csv").exists()
    go("--output", tmp_path, "--resume")
    assert [row["step"] for row in log(tmp_path)] == ["1"] and (tmp_path / "loss.png").exists()


@pytest.mark.skipif(not hasattr(os, "lockf"), reason="this system has no locks")
def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(os, "lockf", refuse)
    assert go(*TINY, "--steps", 1, "--output", tmp_path) == 0


def test_on_mps_no_batch_is_copied_while_its_memory_may_become_free():
    """A copy that does not wait is for CUDA, whose pinned memory is kept until it is done."""
    class Batch:
        def to(self, device, non_blocking):
            copies.append((device.type, non_blocking))
            return torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    copies, recipe = [], train.Recipe(train.Settings(lpips=0.), torch.device("cpu"))
    for kind in ("mps", "cuda", "cpu"):
        recipe.device = torch.device(kind)
        recipe.prepare((Batch(), Batch()))
    assert copies == [("mps", False)] * 2 + [("cuda", True)] * 2 + [("cpu", False)] * 2


def test_a_log_that_cannot_be_replaced_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    """As on Windows while a spreadsheet shows it. The next report writes all rows."""
    save = train.save_atomically

    def refuse(path, write):
        if path.name == "log.csv" and not (tmp_path / "loss.png").exists():
            raise UserError("cannot be written", path)
        save(path, write)
    monkeypatch.setattr(train, "save_atomically", refuse)
    assert go(*TINY, "--steps", 2, "--val-every", 1, "--output", tmp_path) == 0
    out, err = capsys.readouterr()
    assert err.splitlines() == [f"{tmp_path / 'log.csv'}: cannot be written"] and "step 1: train_loss" in out
    assert [row["step"] for row in log(tmp_path)] == ["1", "2"] and saved(tmp_path)["step"] == 2


def test_several_processes_on_an_apple_gpu_are_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(UserError, match="Apple GPU"):
        train.Processes(torch.device("mps"))


def test_init_is_for_new_runs(tmp_path, capsys):
    run, first = tmp_path / "run", tmp_path / "first"
    go(*TINY, "--steps", 1, "--output", first)
    go(*TINY, "--steps", 1, "--init", first / "last.pt", "--output", run, "--resume")   # an empty folder starts anew
    assert go(*TINY, "--steps", 2, "--init", first / "last.pt", "--output", run, "--resume") == 0
    assert go(*TINY, "--steps", 2, "--init", "", "--output", run, "--resume") == 0
    with pytest.raises(UserError, match="has begun already; --init is for a new run"):
        go(*TINY, "--steps", 3, "--init", run / "best.pt", "--output", run, "--resume")


def test_an_output_among_the_photos_is_refused(tmp_path):
    for n in range(4):
        draw_scene(n).save(tmp_path / f"{n}.png")
    for output in (tmp_path / "runs" / "x", tmp_path):
        with pytest.raises(UserError, match="lies in --data"):
            go(*TINY, "--data", tmp_path, "--steps", 1, "--output", output)
    assert len(list(tmp_path.iterdir())) == 4
    for part in ("train", "val"):  # only these two are read then
        (tmp_path / part).mkdir()
        draw_scene(5).save(tmp_path / part / "5.png")
    assert go(*TINY, "--data", tmp_path, "--steps", 1, "--output", tmp_path / "runs" / "x") == 0
    with pytest.raises(UserError, match="lies in --data"):
        go(*TINY, "--data", tmp_path, "--steps", 1, "--output", tmp_path / "train" / "x")
    with pytest.raises(UserError, match="lies in --data"):  # also when the folder comes later
        go(*TINY, "--data", tmp_path / "runs", "--steps", 2, "--output", tmp_path / "runs" / "x", "--resume")


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path, capsys):
    run = tmp_path / "run"
    go(*TINY, "--steps", 1, "--output", run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for rest in (["last.pt", "best.pt", "log.csv"], ["best.pt", "log.csv"], ["log.csv"]):
        for name in {"last.pt", "best.pt", "log.csv"} - set(rest):
            (run / name).unlink(missing_ok=True)
        with pytest.raises(UserError, match="already holds a run: add --resume"):
            go(*TINY, "--steps", 2, "--output", run)
        if "last.pt" not in rest:
            with pytest.raises(UserError, match="last.pt: no such checkpoint"):
                go(*TINY, "--steps", 2, "--output", run, "--resume")
        assert all((run / name).read_bytes() == before[run / name] for name in rest)


def test_resume_in_an_empty_folder_starts_anew_and_says_so(tmp_path, capsys):
    assert go(*TINY, "--steps", 1, "--output", tmp_path / "run", "--resume") == 0
    assert saved(tmp_path / "run")["step"] == 1
    assert "nothing to resume here; a new run begins" in capsys.readouterr().err


def test_resume_names_the_settings_that_differ_and_keeps_the_old_ones(tmp_path, capsys):
    run = tmp_path / "run"
    go(*TINY, "--steps", 2, "--output", run)
    go(*TINY, "--steps", 3, "--output", run, "--resume", "--seed", 5, "--lr", ".01")
    lines = [line for line in capsys.readouterr().err.splitlines() if "other settings" in line]
    assert len(lines) == 1 and "step 2" in lines[0]
    for change in ("seed 0 -> 5", "lr 0.0001 -> 0.01", "steps 2 -> 3"):
        assert change in lines[0]
    assert "size" not in lines[0] and "width" not in lines[0]
    go("--steps", 4, "--output", run, "--resume")  # what is not given stays as it was
    checkpoint = saved(run)
    assert checkpoint["settings"]["seed"] == 5 and checkpoint["settings"]["lr"] == .01 and checkpoint["step"] == 4
    first, second = checkpoint["history"]
    assert first["until step"] == 2 and first["settings"]["seed"] == 0 and first["settings"]["lr"] == 1e-4
    assert second["until step"] == 3 and second["settings"]["seed"] == 5
    capsys.readouterr()
    go("--output", run, "--resume")
    assert "other settings" not in capsys.readouterr().err


def test_a_run_that_is_used_up_says_so_and_stays_as_it_is(tmp_path, capsys):
    run = tmp_path / "run"
    go(*TINY, "--train-size", 8, "--epochs", 1, "--output", run)                       # 4 pictures a step
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    capsys.readouterr()
    for more, limit in [([], "--epochs (now 1)"), (["--steps", 1], "--steps (now 1)"), (["--steps", 2], "--steps (now 2)"),
                        (["--epochs", 1], "--epochs (now 1)"), (["--minutes", "1e-6"], "--minutes (now 1e-06)")]:
        assert go("--output", run, "--resume", *more) == 0
        out = capsys.readouterr().out
        assert "nothing to do" in out and "2 steps" in out and "done:" not in out and out.rstrip().endswith(limit)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    go("--output", run, "--resume", "--epochs", 2)
    assert saved(run)["step"] == 4


@pytest.mark.parametrize("change, best", [
    (["--val-every", 5], 1), (["--lr", ".01"], 1), (["--mse", 1000], 2), (["--palette", 1], 2), (["--val-size", 5], 2),
    (["--seed", 1], 2)])
def test_after_a_change_of_what_is_measured_the_best_checkpoint_is_chosen_anew(tmp_path, monkeypatch, change, best):
    """The validation losses are 1 and then 2: the second is the best of those that compare, or it is not."""
    losses = iter([1., 2.])
    monkeypatch.setattr(train, "validate", lambda *_: {"loss": next(losses)})
    go(*TINY, "--no-use-style", "--steps", 1, "--output", tmp_path)
    go("--output", tmp_path, "--resume", "--steps", 2, *change)
    assert saved(tmp_path)["best"] == best and saved(tmp_path, "best.pt")["step"] == best


def test_a_run_that_went_on_while_this_one_read_its_data_is_not_overwritten(tmp_path, monkeypatch):
    run = tmp_path / "run"
    go(*TINY, "--steps", 1, "--output", run)
    find_data = train.find_data

    def and_another_one_trains(*arguments):
        monkeypatch.setattr(train, "find_data", find_data)
        go("--output", run, "--resume", "--steps", 3)
        return find_data(*arguments)
    for options in (["--resume"], []):
        monkeypatch.setattr(train, "find_data", and_another_one_trains)
        with pytest.raises(UserError, match="until now; run again|already holds a run"):
            go(*TINY, "--steps", 9, "--output", run, *options)
        assert saved(run)["step"] == 3


def test_what_a_killed_run_was_writing_is_removed_and_nothing_else(tmp_path):
    run = tmp_path / "run"
    for name in (".part-1.pt", "samples/.part-2.png", "mine/.part-notes.txt"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")
    go(*TINY, "--steps", 1, "--output", run)
    assert [p.name for p in run.rglob(".part-*")] == [".part-notes.txt"]


def test_resume_is_judged_by_the_settings_of_the_run(tmp_path):
    run = tmp_path / "run"
    go(*TINY, "--palette", 1, "--steps", 1, "--output", run)
    go("--output", run, "--resume", "--mse", 0, "--steps", 2)                          # palette alone is left
    assert saved(run)["step"] == 2
    with pytest.raises(UserError, match="must not be 0 when mse and palette are"):
        go("--output", run, "--resume", "--palette", 0, "--steps", 3)


def test_resume_with_another_preset_is_refused(tmp_path):
    run = tmp_path / "run"
    go(*TINY, "--preset", "lab", "--steps", 1, "--output", run)
    with pytest.raises(UserError, match="--preset lab.*final"):
        go(*TINY, "--preset", "final", "--steps", 2, "--output", run, "--resume")
    go(*TINY, "--preset", "lab", "--steps", 2, "--output", run, "--resume")
    assert saved(run)["step"] == 2 and saved(run)["model"]["space"] == "lab"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit for the size of a file")
def test_a_full_disk_stops_with_advice_and_leaves_the_checkpoint(tmp_path, capsys):
    import resource
    run = tmp_path / "run"
    go(*TINY, "--steps", 4, "--output", run)
    before = (run / "last.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        code, text = outcome(*TINY, "--steps", 8, "--output", run, "--resume", program=train, capsys=capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = text.splitlines()[-1]
    assert code == 1 and "best.pt" in message and "File too large" in message and "free some space" in message
    assert "inline_container" not in text and "Traceback" not in text
    assert (run / "last.pt").read_bytes() == before and not list(run.rglob(".part-*"))
    go(*TINY, "--steps", 8, "--output", run, "--resume")
    assert saved(run)["step"] == 8


def test_a_non_finite_loss_stops_with_advice_and_leaves_the_checkpoint(tmp_path):
    run = tmp_path / "run"
    go(*TINY, "--steps", 4, "--output", run)
    before = (run / "last.pt").read_bytes()
    with pytest.raises(UserError, match=r"at step \d+: try a lower --lr.*last.pt of step 4 is kept"):
        go(*TINY, "--steps", 50, "--val-every", 50, "--lr", "1e9", "--output", run, "--resume")
    assert (run / "last.pt").read_bytes() == before


# ---- what a run leaves ------------------------------------------------------------------------------------

@pytest.mark.parametrize("preset", train.PRESETS)
def test_every_preset_passes_a_dry_run(preset, tmp_path, random_alexnet):
    run = tmp_path / "run"
    little = "--data synthetic --size 32 --width 4 --latent 8 --batch-size 4 --workers 0 --device cpu".split()
    go("--preset", preset, *little, "--lpips-net", "alex", "--lpips-weights", random_alexnet, "--dry-run", "--output", run)
    checkpoint = saved(run / "dry-run")
    assert checkpoint["step"] == 1 and checkpoint["preset"] == preset and checkpoint["format"] == infer.FORMAT
    own_colors_only = 2 if preset == "unet" else 6
    assert Image.open(run / "dry-run" / "samples" / "0000001.png").size == (36 * own_colors_only + 4, 36 * 5 + 4)
    infer.load_model(run / "dry-run" / "last.pt")


def test_the_last_line_of_a_run_recommends_what_can_be_done_with_it(tmp_path, capsys):
    go(*TINY, "--steps", 1, "--output", tmp_path / "styled")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("done:") and "infer.py PHOTO STYLE --weights" in last
    go(*TINY, "--preset", "unet", "--steps", 1, "--output", tmp_path / "plain")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("done:") and "PHOTO STYLE" not in last and "--weights" not in last and "samples" in last


def test_log_and_curves_have_one_row_a_validation_also_after_a_resume(tmp_path, capsys):
    run = tmp_path / "run"
    go(*TINY, "--steps", 8, "--output", run)
    go(*TINY, "--steps", 12, "--output", run, "--resume")
    rows = log(run)
    assert [r["step"] for r in rows] == ["4", "8", "12"] and rows[-1]["pictures"] == "48"
    assert all(np.isfinite(float(r[k])) for r in rows for k in
               ("train_loss", "val_loss", "val_mse", "val_psnr", "val_transfer", "val_spread"))
    assert Image.open(run / "loss.png").size == (640, 400)
    out = capsys.readouterr().out
    assert all(f"step {n}: train_loss " in out for n in (4, 8, 12))  # each line says its step


def test_a_process_that_writes_nothing_knows_which_step_is_kept(tmp_path):
    """All processes of torchrun report what diverged; only the first has the rows of the log."""
    run = train.Run(None, {"output": str(tmp_path / "run")}, False, False)
    run.step, run.clock = 4, lambda: 0.
    second = SimpleNamespace(rank=1, world=1, average=lambda _: None, mean=lambda numbers: numbers)
    train.report(run, train.Colorizer(run.s), None, [], None, second, False)
    run.step = 5
    with pytest.raises(UserError, match="at step 5.*last.pt of step 4 is kept"):
        run.require_finite("the loss", [math.nan])


def test_with_minutes_a_run_is_validated_about_ten_times(tmp_path, monkeypatch):
    """The clock is one that goes on by half a second whenever somebody looks at it. Nothing is computed."""
    monkeypatch.setattr(train, "train_step", lambda *_: {"train_loss": 1.})
    monkeypatch.setattr(train, "validate", lambda *_: {"loss": 1.})
    monkeypatch.setattr(train, "sample", lambda *_: Image.new("RGB", (1, 1)))
    ticks = iter(np.arange(1e6) / 2)
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    go(*TINY, "--batch-size", 1, "--val-size", 1, "--minutes", 2, "--val-every", 100_000, "--output", tmp_path / "run")
    assert 6 <= len(log(tmp_path / "run")) <= 12


def test_minutes_do_not_count_what_comes_before_the_first_step(tmp_path, monkeypatch):
    """The same clock; to find the data takes an hour."""
    clock, find_data = [0.], train.find_data

    def look(seconds=.5):
        clock[0] += seconds
        return clock[0]

    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=look))
    monkeypatch.setattr(train, "find_data", lambda *args: look(3600) and find_data(*args))
    go(*TINY, "--batch-size", 1, "--val-size", 1, "--minutes", .2, "--val-every", 100_000, "--output", tmp_path / "run")
    assert saved(tmp_path / "run")["step"] > 3 and saved(tmp_path / "run")["seconds"] < 60


def test_a_run_whose_time_ends_in_a_validation_ends_with_it(tmp_path, monkeypatch):
    """The same clock; a validation takes 110 of the 120 seconds, and the first one is due after 12."""
    clock, validate = [0.], train.validate

    def look(seconds=.5):
        clock[0] += seconds
        return clock[0]

    def slowly(*args):
        look(110)
        return validate(*args)

    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=look))
    monkeypatch.setattr(train, "validate", slowly)
    go(*TINY, "--batch-size", 1, "--val-size", 1, "--minutes", 2, "--val-every", 100_000, "--output", tmp_path / "run")
    assert len(log(tmp_path / "run")) == 1 and 120 < clock[0] < 130


def test_validation_of_a_network_that_answers_gray():
    """The untrained network: its measures are those of the gray pictures, which numpy can compute."""
    settings = train.Settings(data="synthetic", size=32, lpips=0., batch_size=2, latent=8, width=4)
    recipe = train.Recipe(settings, torch.device("cpu"))
    photos = Photos([1, 2, 3], 32, 0, train=False)
    loader = [tuple(torch.stack(t) for t in zip(*[photos[0, i] for i in batch])) for batch in ([0, 1], [2])]
    model = Colorizer(ModelConfig(latent=8, width=4))
    result = train.validate(model, recipe, loader)
    x = np.stack([photos[0, i][0].numpy() for i in range(3)]) / 255.
    gray = np.stack([oracle.gamma(oracle.mix(oracle.RGB_TO_XYZ[1:2], oracle.linear(picture))) for picture in x])
    mse = ((x - gray) ** 2).mean((1, 2, 3))
    assert result["mse"] == pytest.approx(mse.mean(), rel=1e-4) and result["loss"] == pytest.approx(mse.mean(), rel=1e-4)
    assert result["psnr"] == pytest.approx((-10 * np.log10(mse)).mean(), rel=1e-4)
    assert result["transfer"] == pytest.approx(0, abs=1e-3) and result["listens"] == 0
    codes = model.encode_style(torch.tensor(x, dtype=torch.float32)).detach().numpy()
    assert result["spread"] == pytest.approx(codes.std(0).mean(), rel=1e-4)
    assert model.training  # validation hands the network back as it was


class Repeats(torch.nn.Module):
    """In place of a network: its code is the picture itself, and it answers with a part of it, turned upside down."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def encode_style(self, style):
        return style

    def colorize(self, gray, z):
        return self.share * z.flip(2)


@pytest.mark.parametrize("share", [0., .3, 1.])
def test_listening_is_the_share_of_the_photos_differences_that_a_network_repeats(share):
    recipe = train.Recipe(train.Settings(size=32, lpips=0., space="lab"), torch.device("cpu"))
    # Lightness 60 and weak colors: no share of them leaves what a screen can show.
    ab = 10 * np.random.default_rng(0).normal(size=(3, 2, 1, 1)) + np.random.default_rng(1).normal(size=(3, 2, 32, 32))
    lab = np.concatenate([np.full((3, 1, 32, 32), 60.), ab], axis=1)
    photos = torch.from_numpy((255 * np.stack([oracle.rgb(x) for x in lab])).round().clip(0, 255).astype(np.uint8))
    result = train.validate(Repeats(share), recipe, [(photos, photos)])
    assert result["listens"] == pytest.approx(share, rel=1e-3)
    true = [oracle.lab(x / 255.)[1:] for x in photos.numpy()]
    d = [[oracle.wasserstein(share * true[i - 1], true[i - 1], 32), oracle.wasserstein(0 * true[i], true[i - 1], 32)]
         for i in range(3)]
    missed, from_gray = np.sum(d, axis=0)
    assert result["transfer"] == pytest.approx(1 - missed / from_gray, abs=1e-4)


@pytest.mark.parametrize("space", ["rgb", "lab"])
def test_a_network_whose_style_branch_is_cut_listens_0(space):
    """The same network listens as long as the weights that read the code are there."""
    recipe = train.Recipe(train.Settings(size=32, lpips=0., space=space), torch.device("cpu"))
    torch.manual_seed(0)
    model = Colorizer(ModelConfig(space=space, width=4, latent=8, dropout=0.))
    torch.nn.init.normal_(model.head.weight, std=.3)
    loader = [(torch.stack([Photos([1, 2, 3], 32, 0, False)[0, i][0] for i in range(3)]),) * 2]
    for layer in model.adain:
        layer.affine.weight.data *= 1000
    assert train.validate(model, recipe, loader)["listens"] > .02
    for layer in model.adain:
        layer.affine.weight.data.zero_()
    assert train.validate(model, recipe, loader)["listens"] == 0


# ---- learning ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("step, progress, expected", [(0, 0., .25), (3, .5, .5), (100, 1., 0.)])
def test_learning_rate_rises_and_falls(step, progress, expected):
    settings = train.Settings(lr=1., warmup=3, schedule="cosine")
    assert train.learning_rate(settings, step, progress) == pytest.approx(expected)
    settings = train.Settings(lr=1., warmup=0)
    assert train.learning_rate(settings, step, progress) == 1.


def test_warmup_takes_at_most_a_tenth_of_the_run():
    settings = train.Settings(lr=1., warmup=200)
    rates = [train.learning_rate(settings, step, step / 100) for step in range(100)]
    assert rates[0] == 1 / 201 and rates[5] == pytest.approx(.5) and set(rates[10:]) == {1.}


def learner(**settings):
    """A small recipe, a network whose answer is not gray, and two prepared batches."""
    recipe = train.Recipe(train.Settings(**{"size": 32, "lpips": 0., **settings}), torch.device("cpu"))
    torch.manual_seed(0)
    model = Colorizer(ModelConfig(width=4, latent=8, dropout=0.))
    torch.nn.init.normal_(model.head.weight, std=.3)
    photos = Photos([1, 2, 3, 4], 32, 0, train=True, style_from=recipe.s.style_from)
    batches = [recipe.prepare(tuple(torch.stack(t) for t in zip(*[photos[0, i] for i in pair]))) for pair in ([0, 1], [2, 3])]
    return recipe, model, batches


ALONE = SimpleNamespace(average=lambda tensors: None)  # a single process averages nothing


def test_combined_and_dual_objectives():
    losses = {}
    for kind in ("none", "combined", "dual"):
        recipe, model, batches = learner(style_loss=kind, alpha=.75, style_from="other")
        losses[kind] = {k: v.item() for k, v in recipe.losses(model, batches[0], seed=3).items()}
    assert list(losses["none"]) == ["train_loss"]
    color, style = losses["combined"]["color_loss"], losses["combined"]["style_loss"]
    assert color == pytest.approx(losses["none"]["train_loss"]) and style > 0
    assert losses["combined"]["train_loss"] == pytest.approx(.75 * color + .25 * style)
    assert losses["dual"] == pytest.approx({"train_loss": color, "color_loss": color, "style_loss": style})


def test_a_step_for_the_style_loss_moves_the_style_encoder_alone_and_in_a_dual_run_at_a_tenth_of_the_rate(tmp_path):
    recipe, model, batches = learner(style_loss="dual", style_from="other")
    before = {k: v.clone() for k, v in model.named_parameters()}
    (sum(recipe.losses(model, batches[i], i)["style_loss"] for i in (0, 1)) / 2).backward()
    wanted = {k: before[k] if p.grad is None else before[k] - .5 * p.grad for k, p in model.named_parameters()}
    train.train_step(model, recipe, torch.optim.SGD(model.parameters(), lr=9.), .5, batches, (0, 1), ALONE, "style_loss")
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), wanted[name].detach(), rtol=1e-4, atol=1e-6)
    moved = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"style_encoder"}
    go(*TINY, "--style-loss", "dual", "--lr", .004, "--steps", 1, "--output", tmp_path / "run")
    assert [o["param_groups"][0]["lr"] for o in saved(tmp_path / "run")["optimizers"]] == [.004, .0004]


def test_a_step_on_two_batches_follows_the_mean_of_their_gradients():
    def step(chosen):
        recipe, model, batches = learner()
        before = torch.nn.utils.parameters_to_vector(model.parameters()).clone()
        values = train.train_step(model, recipe, torch.optim.SGD(model.parameters(), lr=9.), 1.,
                                  [batches[i] for i in chosen], chosen, ALONE)
        return values["train_loss"], (torch.nn.utils.parameters_to_vector(model.parameters()) - before).detach()
    (loss, moved), (first, a), (second, b) = step([0, 1]), step([0]), step([1])
    assert loss == pytest.approx((first + second) / 2) and (moved - (a + b) / 2).norm() < 1e-4 * moved.norm()


def test_with_pair_and_foreign_styles_the_palette_is_that_of_the_style_whose_code_is_used(monkeypatch):
    recipe, model, batches = learner(pair=.1, palette=1., style_from="other")
    asked, (_, rgb, style) = [], batches[0]
    monkeypatch.setattr(train, "palette_loss", lambda out, wanted, *_: asked.append(wanted) or out.mean())
    recipe.losses(model, batches[0], seed=0)
    assert torch.equal(asked[-1], style[1:]) and not torch.equal(asked[-1], rgb[1:])   # two pictures; half is one


@pytest.mark.parametrize("minimized", ["train_loss", "style_loss"])
def test_clip_shortens_a_long_gradient_and_leaves_a_short_one(minimized):
    def length(clip):
        recipe, model, batches = learner(clip=clip, style_loss="dual", style_from="other")
        before = torch.nn.utils.parameters_to_vector(model.parameters()).clone()
        train.train_step(model, recipe, torch.optim.SGD(model.parameters(), lr=9.), 1., batches, (0, 1), ALONE, minimized)
        return (torch.nn.utils.parameters_to_vector(model.parameters()) - before).norm().item()
    free = length(0.)
    assert length(free / 3) == pytest.approx(free / 3, rel=1e-3) and length(free * 3) == pytest.approx(free, rel=1e-4)


def test_random_numbers_of_a_step_come_from_its_seed_alone():
    recipe, model, batches = learner(palette=1., pair=.5)
    first = {k: v.item() for k, v in recipe.losses(model, batches[0], seed=7).items()}
    torch.rand(100)
    again, other = ({k: v.item() for k, v in recipe.losses(model, batches[0], seed).items()} for seed in (7, 8))
    assert first == again and "pair_loss" in first and other != first


def test_a_scene_can_be_made_again_from_what_the_loop_feeds():
    recipe = train.Recipe(train.Settings(lpips=0., style_from="other"), torch.device("cpu"))
    photo, other = (to_tensor(draw_scene(n).resize((32, 32)))[None] for n in (3, 4))
    gray, rgb, style = recipe.prepare((photo, other))
    assert torch.equal(gray, gray_of(photo / 255)) and torch.equal(rgb, photo / 255) and torch.equal(style, other / 255)
    assert network_to_rgb(rgb_to_network(rgb, "lab"), gray, "lab").sub(rgb).abs().max() < 1e-3


def test_bfloat16_learns_about_what_float32_learns(tmp_path):
    """amp changes the rounding of each step and nothing else."""
    for name, more in [("float32", []), ("bfloat16", ["--amp"])]:
        go(*TINY, "--steps", 4, "--dropout", 0, "--output", tmp_path / name, *more)
    a, b = (float(log(tmp_path / name)[0]["train_loss"]) for name in ("float32", "bfloat16"))
    assert a != b and b == pytest.approx(a, rel=.02)
    assert all(v.dtype in (torch.float32, torch.int64) for v in saved(tmp_path / "bfloat16")["weights"].values())


def test_overfitting_eight_scenes_and_swapping_their_styles_swaps_the_colors(tmp_path, monkeypatch):
    """Eight synthetic pictures. Their colors cannot be guessed from their gray versions, so whoever gets them
    right has read the style codes; then photo A with style B must have the colors of B."""
    run = tmp_path / "run"
    monkeypatch.setattr(data, "draw_scene", functools.cache(data.draw_scene))  # drawing takes as long as learning
    go(*("--data synthetic --train-size 8 --val-size 4 --size 32 --space lab --lpips 0 --dropout 0 --lr 2e-3 --width 8 "
         f"--steps 150 --val-every 150 --batch-size 8 --clip 1 --workers 0 --device cpu --schedule cosine").split(),
       "--output", run)
    model = Colorizer(ModelConfig(space="lab", width=8, dropout=0.))
    model.load_state_dict(saved(run)["weights"])
    model.eval()
    rgb = torch.stack([Photos([i], 32, 0, train=False)[0, 0][0] for i in range(8)]) / 255
    ab = rgb_to_network(rgb, "lab")
    with torch.no_grad():
        z = model.encode_style(ab)
        own, swapped = model.colorize(gray_of(rgb), z), model.colorize(gray_of(rgb), z.roll(1, 0))
    left_gray = ab.square().mean().item()
    assert (own - ab).square().mean().item() < .35 * left_gray  # .15 to .2, as the machine rounds
    # Mean a and b of the swapped results lie nearer to the new style's than to the photo's own.
    mean, new, old = swapped.mean((2, 3)), ab.roll(1, 0).mean((2, 3)), ab.mean((2, 3))
    assert ((mean - new).norm(dim=1) < (mean - old).norm(dim=1)).sum() >= 7


# ---- the command line -------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, words", [
    ("--size 100", "--size must be a multiple of 16"), ("--batch-size 0", "--batch-size"), ("--lr -1", "--lr"),
    ("--lr 1e38", "--lr"), ("--lr nan", "--lr"), ("--minutes inf", "--minutes"), ("--width 1000", "--width"),
    ("--seed 99999999999", "--seed"), ("--epochs many", "--epochs"), ("--epochs 0", "--epochs"),
    ("--dropout 1", "--dropout"), ("--preset nonsense", "--preset"), ("--mse 0 --lpips 0", "--lpips must not be 0"),
    ("--no-use-style --style-loss dual", "needs a style encoder"), ("--preset unet --pair 1", "needs a style encoder"),
    ("--style_loss dual", "did you mean --style-loss?"), ("--ouput runs/x", "did you mean --output?"),
    ("--preset hue-rotation", "ours"), ("runs/x", "runs/x"), ("--resume --dry-run", "--dry-run")])
def test_usage_errors_are_one_line_with_exit_code_2(arguments, words, capsys):
    code, text = outcome(*arguments.split(), program=train, capsys=capsys)
    assert code == 2 and text.count("\n") == 1 and words in text and "usage:" not in text


def test_help_lists_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for f in train.fields(train.Settings):
        assert "--" + f.name.replace("_", "-") in text and f.metadata["help"] + " [" in text
    assert all(preset + ": " in text for preset in train.PRESETS)


def test_errors_of_a_run_are_one_line_and_make_no_folder(tmp_path, capsys):
    run = tmp_path / "run"
    go(*TINY, "--steps", 1, "--output", run)
    network(tmp_path / "plain.pt", space="rgb", use_style=False)
    network(tmp_path / "sigmoid.pt", space="rgb", sigmoid=True)
    (tmp_path / "split" / "val").mkdir(parents=True)
    (tmp_path / "split" / "train").mkdir()
    draw_scene(1).save(tmp_path / "split" / "train" / "a.png")
    capsys.readouterr()

    def message(*arguments):
        code, text = outcome(*arguments, "--output", tmp_path / "x", program=train, capsys=capsys)
        assert code == 1 and text.count("\n") == 1, text
        assert not (tmp_path / "x").exists()
        return text
    assert "is no folder" in message("--data", tmp_path / "nowhere", "--lpips", 0)
    empty_val = message("--data", tmp_path / "split", "--lpips", 0)
    assert str(tmp_path / "split" / "val") in empty_val and "one" in empty_val and "two" not in empty_val
    assert "no such file" in message(*TINY, "--lpips", 1, "--lpips-weights", tmp_path / "nothing.pth")
    # A wrong --init names what to add, in words that the command line takes.
    assert "--latent 8" in message(*TINY, "--latent", 9, "--init", run / "last.pt")
    assert "--no-use-style" in message(*TINY, "--init", tmp_path / "plain.pt")
    wrong = message(*TINY, "--init", tmp_path / "sigmoid.pt")
    assert "--sigmoid" in wrong and "True" not in wrong
    assert "no such checkpoint" in message(*TINY, "--init", tmp_path / "none.pt")


def test_init_starts_from_the_weights_alone(tmp_path):
    go(*TINY, "--steps", 2, "--output", tmp_path / "a")
    go(*TINY, "--steps", 1, "--lr", 0, "--init", tmp_path / "a/last.pt", "--output", tmp_path / "b")
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b")
    learned = [k for k, _ in Colorizer(ModelConfig(width=4, latent=8)).named_parameters()]
    assert all(torch.equal(a["weights"][k], b["weights"][k]) for k in learned) and b["step"] == 1
    assert len(log(tmp_path / "b")) == 1 and b["optimizers"][0]["state"][0]["step"] == 1


def test_init_takes_a_network_of_another_padding_and_dropout(tmp_path):
    """Neither has weights."""
    network(tmp_path / "net.pt", space="rgb")
    go(*TINY, "--steps", 1, "--lr", 0, "--padding", "replicate", "--dropout", ".5", "--init", tmp_path / "net.pt",
       "--output", tmp_path / "run")
    assert saved(tmp_path / "run")["model"]["padding"] == "replicate"
    assert torch.equal(saved(tmp_path / "run")["weights"]["head.weight"], saved(tmp_path, "net.pt")["weights"]["head.weight"])


def test_init_takes_a_checkpoint_of_format_1(tmp_path):
    """Written before two settings got other names; its runs cannot go on, but its weights serve."""
    checkpoint = saved(tmp_path, network(tmp_path / "new.pt", space="lab").name)
    config = {{"space": "color", "use_style": "style"}.get(k, k): v for k, v in checkpoint["model"].items() if k != "padding"}
    torch.save({**checkpoint, "format": 1, "model": {**config, "relu": False, "resize": False}}, tmp_path / "old.pt")
    go(*TINY, "--preset", "lab", "--steps", 1, "--lr", 0, "--init", tmp_path / "old.pt", "--output", tmp_path / "run")
    assert torch.equal(saved(tmp_path / "run")["weights"]["head.weight"], checkpoint["weights"]["head.weight"])


def test_with_amp_the_style_encoder_sees_the_exact_colors():
    """In LAB they are computed: bfloat16 would be wrong by up to 2 units of a and b."""
    class Model(Colorizer):
        def encode_style(self, style):
            self.seen = style
            return super().encode_style(style)

    s = train.Settings(space="lab", amp=True, lpips=0., size=32, width=4, latent=8)
    recipe, model = train.Recipe(s, torch.device("cpu")), Model(ModelConfig(space="lab", width=4, latent=8))
    picture = to_tensor(draw_scene(1).resize((32, 32)))[None]
    recipe.losses(model, recipe.prepare((picture, picture)), 0)
    assert model.seen.dtype == torch.float32
    np.testing.assert_allclose(model.seen[0], oracle.lab(picture[0].numpy() / 255)[1:] / 110, atol=1e-4)
