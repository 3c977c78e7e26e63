"""train.py when the machine, the files or a neighbor misbehave: it ends, says one line, and loses nothing.

Whatever may hang runs as a process of its own with a limit of time; a program that waits for ever fails here.
"""
import copy
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from data import UserError, draw_scene
from losses import make_trunk
from test_infer import outcome
from test_train import LIMIT, TINY, TOP, assert_same, command, go, log, saved, signals_stay_with_pytest, wait_for  # noqa: F401

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups and other signals")
LONG = "--steps 100000 --workers 2 --output".split()


def message(text):
    """The one line that a program may say when it fails."""
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) == 1 and "Traceback" not in text, text
    return lines[0]


def end(process, limit=LIMIT):
    """Wait for the end, not for ever -> (exit code, stdout, stderr)."""
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(true, process=None):
    last = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < last and (process is None or process.poll() is None)
        time.sleep(.02)


def finite(path):
    return all(v.isfinite().all() for v in torch.load(path, weights_only=True)["weights"].values())


@pytest.fixture
def album(tmp_path):
    """A folder of ten training pictures, in color."""
    (tmp_path / "album").mkdir()
    for n in range(10):
        draw_scene(n, 48, 40).save(tmp_path / "album" / f"{n}.png")
    return tmp_path / "album"


# ---- nothing hangs: loading processes ---------------------------------------------------------------------

@POSIX
def test_a_picture_that_vanishes_or_breaks_is_skipped_and_a_second_run_in_the_folder_is_refused(tmp_path, album, capsys):
    run = tmp_path / "run"
    with open(tmp_path / "said", "w+") as said:
        process = subprocess.Popen([sys.executable, str(TOP / "train.py"), *TINY, "--data", str(album), *LONG, str(run)],
                                   stdout=subprocess.DEVNULL, stderr=said, env=ENVIRONMENT, start_new_session=True)
        try:
            wait_for(run / "last.pt", process)
            # Another one in the same folder: from this process, as the lock is between processes.
            code, text = outcome(*TINY, "--output", run, "--resume", "--steps", 200_000, program=train, capsys=capsys)
            assert code == 1 and "another train.py is at work" in text.splitlines()[-1]
            used = sorted(album.iterdir())
            used[2].unlink()
            used[5].write_bytes(used[5].read_bytes()[:300])
            until(lambda: all(p.name in Path(said.name).read_text() for p in (used[2], used[5])), process)
            first = saved(run)["step"]
            until(lambda: saved(run)["step"] > first + 4, process)                     # and it goes on
            process.send_signal(signal.SIGTERM)
            assert process.wait(LIMIT) == 130
        finally:
            process.kill()
    lines = Path(said.name).read_text().splitlines()
    assert lines and all(line.endswith("the next picture is taken") for line in lines)
    assert all(used[2].name in line or used[5].name in line for line in lines)


@POSIX
def test_a_data_folder_that_vanishes_ends_the_run_with_one_line(tmp_path, album):
    process = command(*TINY, "--data", album, *LONG, tmp_path / "run", "--workers", 1, start_new_session=True)
    wait_for(tmp_path / "run" / "last.pt", process)
    shutil.rmtree(album)
    code, _, err = end(process)
    assert code == 1 and "Traceback" not in err, err
    last = [line for line in err.splitlines() if not line.endswith("the next picture is taken")]
    assert len(last) == 1 and "ten pictures in a row" in last[0]
    assert finite(tmp_path / "run" / "last.pt")


@LINUX
def test_a_loader_that_is_killed_ends_the_run_with_one_line(tmp_path):
    """As the kernel does when memory is full."""
    process = command(*TINY, *LONG, tmp_path / "run", "--val-every", 10_000, start_new_session=True)
    until(lambda: len(children(process.pid)) == 2, process)
    time.sleep(.5)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    code, _, err = end(process)
    assert code == 1 and "loading process" in message(err) and "--workers" in err and "--resume" in err


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "Connection reset by peer")])
def test_a_loader_that_ends_while_it_sends_a_batch_gives_the_same_line(tmp_path, monkeypatch, error):
    def broken(*_):
        raise error
    monkeypatch.setattr(train, "loop", broken)
    with pytest.raises(UserError, match="a loading process was ended"):
        go(*TINY, "--steps", 1, "--output", tmp_path / "run")


@LINUX
def test_kill_9_ends_the_loaders_too_and_releases_the_folder(tmp_path):
    run = tmp_path / "run"
    process = command(*TINY, *LONG, run, "--val-every", 2, start_new_session=True)
    wait_for(run / "last.pt", process)
    loaders = children(process.pid)
    assert len(loaders) >= 2
    process.kill()
    process.communicate(timeout=LIMIT)
    (run / ".part-0123.pt").write_bytes(b"half a checkpoint")  # what it was writing
    step = saved(run)["step"] + 1
    assert go(*TINY, "--output", run, "--resume", "--steps", step) == 0                # at once, whatever the loaders do
    assert saved(run)["step"] == step and not list(run.rglob(".part-*"))
    until(lambda: not any(map(alive, loaders)))


@POSIX
def test_an_exception_that_nobody_foresaw_ends_the_program(tmp_path):
    """The traceback must be followed by the end, with loading processes at work."""
    bug = "import sys, train; train.train_step = lambda *_: {}[0]; train.run_program(train.main)"
    process = subprocess.Popen([sys.executable, "-c", bug, *TINY, *LONG, str(tmp_path / "run")], cwd=TOP, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, start_new_session=True)
    code, _, err = end(process)
    assert code == 1 and "KeyError" in err


def test_a_learning_rate_that_breaks_the_network_ends_the_run_and_is_never_saved(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"try a lower --lr \(now 1e\+09\)") as caught:
        go(*TINY, "--steps", 1000, "--lr", "1e9", "--val-every", 1, "--output", run)
    for name in ("best.pt", "last.pt"):
        assert not (run / name).exists() or finite(run / name)
    if kept := re.search(r"last.pt of step (\d+) is kept", str(caught.value)):
        assert saved(run)["step"] == int(kept[1])
    else:
        assert not (run / "last.pt").exists()


def test_nan_weights_are_not_saved_even_when_the_losses_looked_well(tmp_path, monkeypatch):
    """Stopped right after a step that broke the network: no loss has shown it yet, and nothing is validated."""
    def breaking_step(model, *_):
        model.head.bias.data.fill_(float("nan"))
        return {"train_loss": 1.}
    run = tmp_path / "run"
    go(*TINY, "--steps", 1, "--output", run)
    before = {name: (run / name).read_bytes() for name in ("last.pt", "best.pt")}
    monkeypatch.setattr(train, "train_step", breaking_step)
    monkeypatch.setattr(train, "listen_for_stop", lambda: [signal.SIGINT])
    with pytest.raises(UserError, match="nan or inf at step 2.*last.pt of step 1 is kept"):
        go(*TINY, "--steps", 9, "--output", run, "--resume")
    assert {name: (run / name).read_bytes() for name in before} == before
    with pytest.raises(UserError, match="nan or inf at step 1.*nothing.*saved"):
        go(*TINY, "--steps", 9, "--output", tmp_path / "new")
    assert not list((tmp_path / "new").glob("*.pt"))


@POSIX
def test_a_closed_terminal_saves_though_nobody_reads_the_output_any_more(tmp_path):
    run = tmp_path / "run"
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    process = command(*TINY, *LONG, run, "--val-every", 100_000)
    signal.signal(signal.SIGHUP, before)
    until((run / ".lock").exists, process)
    time.sleep(1)
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    process.wait(LIMIT)
    assert saved(run)["step"] >= 1 and list((run / "samples").glob("*.png"))
    process.stderr.close()


@LINUX
def test_sigterm_to_the_group_during_validation_saves_the_step_in_hand(tmp_path):
    run = tmp_path / "run"
    process = command(*TINY, *LONG, run, "--val-every", 2, "--val-size", 120, start_new_session=True)
    until(lambda: len(children(process.pid)) == 4, process)                            # those of the validation as well
    time.sleep(.1)
    os.killpg(process.pid, signal.SIGTERM)
    code, out, err = end(process)
    assert code == 130 and not err and "stopped at step" in out, (out, err)
    assert saved(run)["step"] >= 1


@POSIX
def test_a_signal_to_the_group_while_the_loaders_start_ends_in_order(tmp_path):
    run = tmp_path / "run"
    process = command(*TINY, *LONG, run, start_new_session=True)
    until((run / ".lock").exists, process)                                             # the last thing before the loaders
    os.killpg(process.pid, signal.SIGTERM)
    code, out, err = end(process)
    assert code == 130 and "Traceback" not in err and "stopped at step" in out, (out, err)
    assert saved(run)["step"] >= 1


@POSIX
def test_a_loader_that_gets_a_signal_while_it_starts_lives_on():
    """As soon as torch has prepared the process for SIGTERM, and before it ignores it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    loader = train.Loader([1, 2, 3], num_workers=1, multiprocessing_context="fork",
                          worker_init_fn=lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert torch.cat(list(loader)).tolist() == [1, 2, 3]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before                      # the main process hears them again


@pytest.mark.filterwarnings("ignore")
def test_loaders_also_work_where_they_are_spawned(tmp_path):
    """As on Windows and macOS: all that a loader needs is pickled, and the pictures are the same."""
    import multiprocessing
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        go(*TINY, "--steps", 1, "--workers", 1, "--output", tmp_path / "spawned")
    finally:
        multiprocessing.set_start_method(before, force=True)
    go(*TINY, "--steps", 1, "--workers", 0, "--output", tmp_path / "plain")
    assert_same(saved(tmp_path / "spawned")["weights"], saved(tmp_path / "plain")["weights"])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
def test_more_workers_than_cores_bring_no_warning(tmp_path):
    """Two of them on one core: to this job schedulers bind a process."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            go(*TINY, "--steps", 1, "--workers", 2, "--output", tmp_path / "run")
    finally:
        os.sched_setaffinity(0, before)
    assert saved(tmp_path / "run")["step"] == 1


# ---- torchrun ---------------------------------------------------------------------------------------------

def torchrun(*arguments):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                             str(TOP / "train.py"), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=ENVIRONMENT, start_new_session=True)


@POSIX
def test_under_torchrun_a_users_mistake_is_told_once(tmp_path):
    """torch's own report of the failed process follows it."""
    code, out, err = end(torchrun(*TINY, "--data", tmp_path / "nowhere", "--output", tmp_path / "run"))
    assert code == 1 and err.count("is no folder") == 1 and "done:" not in out
    assert "train.py\", line" not in err                                               # no traceback of ours


@POSIX
def test_under_torchrun_sigterm_saves_the_step_in_hand(tmp_path):
    """torchrun passes it on to the programs and to their loading processes."""
    run = tmp_path / "run"
    process = torchrun(*TINY, "--steps", 100_000, "--workers", 1, "--output", run)
    wait_for(run / "last.pt", process)
    first = saved(run)["step"]
    process.send_signal(signal.SIGTERM)
    _, out, err = end(process)
    assert out.count("stopped at step") == 1, (out, err)
    assert saved(run)["step"] >= first and finite(run / "last.pt")


def test_rank_without_torchrun_is_a_single_process(tmp_path, monkeypatch):
    """Job schedulers set such variables for their own purposes."""
    for name, value in [("RANK", "1"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")]:
        monkeypatch.setenv(name, value)
    assert go(*TINY, "--steps", 1, "--output", tmp_path / "run") == 0
    assert saved(tmp_path / "run")["step"] == 1


# ---- streams and signals ----------------------------------------------------------------------------------

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_the_output_ends_the_run_with_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        process = subprocess.Popen([sys.executable, str(TOP / "train.py"), *TINY, *LONG, str(tmp_path / "run")],
                                   stdout=full, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True)
        code, _, err = end(process)
    assert code == 1 and "No space left" in message(err)


@POSIX
def test_closed_streams_do_not_matter(tmp_path):
    shell = ["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', sys.executable, str(TOP / "train.py"), *TINY, "--steps", "1",
             "--workers", "1", "--output", str(tmp_path / "run")]
    assert subprocess.run(shell, env=ENVIRONMENT, timeout=LIMIT).returncode == 0
    assert saved(tmp_path / "run")["step"] == 1 and log(tmp_path / "run")


@POSIX
@pytest.mark.parametrize("module", ["numpy", "torch"])
def test_ctrl_c_while_the_modules_load_gives_no_traceback(module):
    """The signal comes right after that module: python tells each import as it ends. (train.py imports infer first.)"""
    process = subprocess.Popen([sys.executable, "-X", "importtime", str(TOP / "infer.py"), "--help"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    rest = ""
    for line in process.stderr:
        if re.search(rf"\| +{module}$", line):
            process.send_signal(signal.SIGINT)
            break
    _, rest = process.communicate(timeout=LIMIT)
    said = [line for line in rest.splitlines() if not line.startswith("import time:")]
    assert process.returncode in (130, 0) and said == []                               # 0: the help was faster


# ---- the disk and its names -------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["x" * 300, "/".join(["x" * 200] * 30)], ids=["a name too long", "a path too long"])
@pytest.mark.parametrize("option", ["--output", "--init", "--data", "--lpips-weights"])
def test_names_that_the_file_system_does_not_take_are_one_line(tmp_path, capsys, option, name):
    output = [] if option == "--output" else ["--output", tmp_path / "run"]
    lpips = ["--lpips", 1] if option == "--lpips-weights" else []
    code, text = outcome(*TINY, "--steps", 1, *lpips, *output, option, tmp_path / name, program=train, capsys=capsys)
    assert code == 1 and "xxx" in text.splitlines()[-1] and sum("xxx" in line for line in text.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@POSIX
def test_folders_without_permission_are_one_line(capsys):
    """Root may do everything, so for a moment we are somebody else."""
    Image.init()  # Pillow's modules are read now, while we may
    with tempfile.TemporaryDirectory() as top:
        locked = Path(top, "locked")
        locked.mkdir()
        draw_scene(1).save(locked / "a.png")
        os.chmod(top, 0o755)
        locked.chmod(0)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            for option, more in [("--output", ""), ("--init", "x.pt"), ("--data", ""), ("--data", "deeper"),
                                 ("--lpips-weights", "alex.pth")]:
                output = [] if option == "--output" else ["--output", Path(top, "run")]
                code, text = outcome(*TINY, "--lpips", int("lpips" in option), "--steps", 1, *output, option, locked / more,
                                     program=train, capsys=capsys)
                assert code == 1 and "locked" in text.splitlines()[-1] and "free some space" not in text
                assert sum("locked" in line for line in text.splitlines()) == 1
        finally:
            if root:
                os.seteuid(0)
            locked.chmod(0o755)


# ---- files that somebody has altered ----------------------------------------------------------------------

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps, as a dictionary; without the style encoder, which has most of the weights."""
    run = tmp_path_factory.mktemp("finished") / "run"
    go(*TINY, "--no-use-style", "--steps", 2, "--output", run)
    return saved(run)


def without(name):
    return lambda c: c.pop(name)


def setting(**values):
    return lambda c: c["settings"].update(values)


def row(**values):
    return lambda c: c["log"][-1].update(values)


def change(**values):
    return lambda c: c.update(values)


def state(name, make):
    """Change one of Adam's tensors of the first parameter."""
    def alter(c):
        of_first = c["optimizers"][0]["state"][0]
        of_first[name] = make(of_first[name])
    return alter


ALTERED = {
    "no log": without("log"), "an empty log": change(log=[]), "a log of text": change(log="SECRET"),
    "a log of numbers": change(log=[1, 2]), "an empty row": change(log=[{}]), "a row of text": row(train_loss="SECRET"),
    "a row without step": lambda c: c["log"][-1].pop("step"), "a row without pictures": lambda c: c["log"][-1].pop("pictures"),
    "a row of fractions": row(pictures=8.5), "no step": without("step"), "a step of text": change(step="SECRET"),
    "step 0": change(step=0), "a step below 0": change(step=-2, log=[{"step": -2, "pictures": -8, "train_loss": 1.}]),
    "step true": change(step=True), "half a step": change(step=2.5), "a step of 30 digits":
    lambda c: (c.update(step=10 ** 30), row(pictures=4 * 10 ** 30)(c), setting(minutes=9.)(c)),
    "no seconds": without("seconds"), "seconds of text": change(seconds="SECRET"), "seconds nan":
    change(seconds=float("nan")), "no best": without("best"), "best of text": change(best="SECRET"), "best a list": change(best=[]),
    "no preset": without("preset"), "another preset": change(preset="SECRET"), "preset a list": change(preset=["final"]),
    "no settings": without("settings"), "settings a list": change(settings=[1]), "size of text": setting(size="32"),
    "an odd size": setting(size=40), "a huge size": setting(size=4096), "no batch": setting(batch_size=0), "lr nan":
    setting(lr=float("nan")), "lr huge": setting(lr=1e300), "steps below 0": setting(steps=-1), "workers below 0":
    setting(workers=-1), "epochs true": setting(epochs=True), "another device": setting(device="SECRET"), "val_every 0":
    setting(val_every=0), "data a number": setting(data=5), "a new setting": setting(magic=1), "amp a number": setting(amp=1),
    "nothing to learn": setting(mse=0.), "pair without style encoder": setting(use_style=False, pair=1.),
    "style_loss a list": setting(style_loss=["none"]), "another width": setting(width=8),
    "history a number": change(history=5), "no optimizers": without("optimizers"), "optimizers none": change(optimizers=None),
    "optimizers empty": change(optimizers=[]), "an optimizer of text": change(optimizers=["SECRET"]),
    "two optimizers": lambda c: c["optimizers"].append(c["optimizers"][0]),
    "an optimizer without groups": lambda c: c["optimizers"][0].pop("param_groups"),
    "an optimizer without state": lambda c: c["optimizers"][0].pop("state"),
    "an average of another shape": state("exp_avg", lambda t: torch.zeros(3)),
    "an average of one number": state("exp_avg", lambda t: torch.zeros(())),
    "an average of text": state("exp_avg", lambda t: "SECRET"), "a sparse average": state("exp_avg", lambda t: t.to_sparse()),
    "an average of integers": state("exp_avg", lambda t: t.int()), "an average of nan": state("exp_avg", lambda t: t * torch.nan),
    "no second average": lambda c: c["optimizers"][0]["state"][0].pop("exp_avg_sq"),
    "betas of text": lambda c: c["optimizers"][0]["param_groups"][0].update(betas=("SECRET", 1)),
    "a weight of nan": lambda c: c["weights"]["head.bias"].fill_(float("nan")), "no weights": without("weights"),
    "one weight less": lambda c: c["weights"].pop("head.bias"), "format a list": change(format=[1]),
    "format 1": lambda c: c.update(format=1, settings={"color": "rgb", "style": True, "size": 32, "relu": False}),
}


# What is not needed may also be passed over, as long as the run goes on well.
EITHER = ["an optimizer without groups", "an average of integers", "betas of text"]


@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_checkpoint_is_not_resumed_and_told_in_one_line(tmp_path, capsys, finished, name):
    checkpoint = copy.deepcopy(finished)
    ALTERED[name](checkpoint)
    run = tmp_path / "run"
    run.mkdir()
    torch.save(checkpoint, run / "last.pt")
    before = (run / "last.pt").read_bytes()
    code, text = outcome("--resume", "--steps", 3, "--output", run, program=train, capsys=capsys)
    lines = [line for line in text.splitlines() if not line.startswith(("other settings", "final:"))]
    if name in EITHER and code == 0:
        assert saved(run)["step"] == 3 and finite(run / "last.pt")
        return
    assert code == 1 and len(lines) == 1 and str(run) in lines[0] and "SECRET" not in text, text
    assert (run / "last.pt").read_bytes() == before and not (run / "best.pt").exists()


def test_settings_that_do_not_go_with_those_of_the_run_are_one_line(tmp_path, capsys, finished):
    """Each of both is fine, together they are not: the run has no style encoder, and now it shall have a style loss."""
    torch.save(finished, tmp_path / "last.pt")
    code, text = outcome("--resume", "--steps", 3, "--output", tmp_path, "--style-loss", "dual", program=train, capsys=capsys)
    assert code == 1 and "cannot go on" in message(text) and "style encoder" in text


def test_a_changed_weight_decay_is_the_one_that_counts_after_a_resume(tmp_path):
    """Not the one in the optimizer's own state: what is told to be used is used."""
    go(*TINY, "--steps", 1, "--output", tmp_path / "run")
    go("--resume", "--steps", 2, "--weight-decay", ".5", "--output", tmp_path / "run")
    assert saved(tmp_path / "run")["settings"]["weight_decay"] == .5
    assert saved(tmp_path / "run")["optimizers"][0]["param_groups"][0]["weight_decay"] == .5


def test_what_differs_is_told_in_a_line_of_bounded_length(tmp_path, capsys, finished):
    (tmp_path / "run").mkdir()
    torch.save({**finished, "settings": {**finished["settings"], "lpips_weights": "x" * 10 ** 5}}, tmp_path / "run" / "last.pt")
    go("--resume", "--steps", 3, "--lpips-weights", "", "--output", tmp_path / "run")
    err = capsys.readouterr().err
    assert "lpips_weights" in err and len(err) < 2000


# ---- memory and time from small files ---------------------------------------------------------------------

@POSIX
def test_a_pipe_or_a_bomb_as_lpips_weights_is_one_line(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.pth")
    torch.save(make_trunk("alex").state_dict(), tmp_path / "good.pth")
    with zipfile.ZipFile(tmp_path / "good.pth") as loose, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in loose.namelist()[:3]:
            bomb.writestr(name, loose.read(name))
        bomb.writestr("archive/data/99", bytes(10 ** 7))
    for name in ("pipe.pth", "bomb.pth"):
        code, text = outcome(*TINY, "--lpips", 1, "--lpips-net", "alex", "--lpips-weights", tmp_path / name,
                             "--output", tmp_path / "run", program=train, capsys=capsys)
        assert code == 1 and name in message(text)


@LINUX
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA itself fails with so few addresses")
def test_memory_that_does_not_suffice_is_one_line(tmp_path):
    limited = ("import resource, sys, train; used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize(); "
               "resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 10 ** 8,) * 2); sys.argv[0] = 'train.py'; train.run_program(train.main)")
    process = subprocess.Popen([sys.executable, "-c", limited, *TINY, "--size", "1024", "--batch-size", "64", "--width", "64",
                                "--output", str(tmp_path / "run")], cwd=TOP, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=ENVIRONMENT, start_new_session=True)
    code, _, err = end(process)
    assert code == 1 and "memory" in message(err) and "--batch-size" in err
