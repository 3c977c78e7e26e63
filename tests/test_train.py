"""The training loop as a user meets it: as a command, killed, resumed, misused."""
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import infer
import train
from data import Photos, UserError, draw_scene, gray_of, rgb_to_lab, rgb_to_network, network_to_rgb, to_tensor
from model import Colorizer, ModelConfig

TOP = Path(train.__file__).parent
TINY = ("--data synthetic --train-size 24 --val-size 4 --size 32 --width 4 --latent 8 --batch-size 4 --val-every 4 "
        "--device cpu --workers 0 --lpips 0 --hue-rotation 0.5").split()


@pytest.fixture(autouse=True)
def ctrl_c_stays_with_pytest(monkeypatch):
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)


def command(*arguments, **options):
    return subprocess.Popen([sys.executable, str(TOP / "train.py"), *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def saved(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
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


def test_kill_9_and_resume_equal_an_uninterrupted_run_bit_for_bit(tmp_path):
    a, b = tmp_path / "killed", tmp_path / "whole"
    process = command(*TINY, "--steps", 100_000, "--output", a)
    wait_for(a / "last.pt", process)
    process.kill()
    process.wait()
    end = saved(a)["step"] + 6  # two more validations' worth, and not a multiple of anything
    # The second session even loads with two processes: they must not matter.
    assert command(*TINY, "--steps", end, "--output", a, "--resume", "--workers", 2).wait() == 0
    assert command(*TINY, "--steps", end, "--output", b).wait() == 0
    a, b = saved(a), saved(b)
    assert a["step"] == b["step"] == end
    for part in ("weights", "optimizers", "best"):
        assert_same(a[part], b[part])
    drop = ("seconds",)
    assert [{k: v for k, v in r.items() if k not in drop} for r in a["log"]] == \
           [{k: v for k, v in r.items() if k not in drop} for r in b["log"]]


def test_two_processes_learn_what_one_learns_with_twice_the_batch(tmp_path):
    """--accumulate 2 is the oracle: the same pictures, each half normalised by itself, the gradients' mean."""
    def losses(folder):
        with open(folder / "log.csv") as file:
            return [float(row["train_loss"]) for row in csv.DictReader(file)]
    one, two = tmp_path / "one", tmp_path / "two"
    options = [*TINY, "--palette", ".1", "--dropout", ".2"]
    assert command(*options, "--steps", 12, "--accumulate", 2, "--output", one).wait() == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(TOP / "train.py")]
    process = subprocess.run([*torchrun, *options, "--steps", "8", "--output", str(two)], capture_output=True, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("done:") == 1  # one of them tells, and writes
    assert losses(two) == pytest.approx(losses(one)[:2], rel=1e-5)
    with pytest.raises(UserError, match="its steps are of 8 pictures, not 4"):
        train.main([*options, "--steps", "12", "--output", str(two), "--resume"])
    train.main([*options, "--steps", "12", "--accumulate", "2", "--output", str(two), "--resume"])
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.parametrize("group", [False, True], ids=["the program", "its whole process group"])
def test_sigterm_saves_the_step_in_hand_and_says_how_to_go_on(tmp_path, group):
    """`timeout` and job schedulers send it to the loading processes as well."""
    process = command(*TINY, "--workers", 2, "--steps", 100_000, "--output", tmp_path / "run", start_new_session=True)
    wait_for(tmp_path / "run" / "last.pt", process)
    first = saved(tmp_path / "run")["step"]
    (os.killpg if group else os.kill)(process.pid, signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 130 and "--resume" in out and not err
    assert saved(tmp_path / "run")["step"] >= first


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit for the size of a file")
def test_a_full_disk_stops_with_advice_and_leaves_the_checkpoint(tmp_path):
    import resource
    run = tmp_path / "run"
    train.main([*TINY, "--steps", "4", "--output", str(run)])
    before = (run / "last.pt").read_bytes()
    limit = len(before) // 2
    process = command(*TINY, "--steps", 8, "--output", run, "--resume",
                      preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    out, err = process.communicate()
    assert process.returncode == 1 and err.count("\n") == 1 and "free some space" in err, err
    assert (run / "last.pt").read_bytes() == before and not list(run.rglob(".part-*"))
    train.main([*TINY, "--steps", "8", "--output", str(run), "--resume"])
    assert saved(run)["step"] == 8


def test_a_non_finite_loss_stops_with_advice_and_leaves_the_checkpoint(tmp_path, capsys):
    run = tmp_path / "run"
    train.main([*TINY, "--steps", "4", "--output", str(run)])
    before = (run / "last.pt").read_bytes()
    with pytest.raises(UserError, match=r"at step \d+: try a lower --lr"):
        train.main([*TINY, "--steps", "50", "--lr", "1e30", "--output", str(run), "--resume"])
    assert (run / "last.pt").read_bytes() == before


def test_the_authors_start_and_layers_are_trained_saved_and_resumed(tmp_path):
    options = [*TINY, "--relu", "--resize", "--start", "both", "--output", str(tmp_path / "run")]
    train.main([*options, "--steps", "1", "--lr", "0"])
    scales = saved(tmp_path / "run")["weights"]["adain.0.affine.weight"][:4]
    assert abs(scales.mean() - 1) < .02  # of 32 numbers
    train.main([*options, "--steps", "3", "--lr", "1e-2", "--resume"])  # one for the zero head, one for the rest
    again = saved(tmp_path / "run")
    assert again["model"]["relu"] and again["model"]["resize"]
    assert 0 < (again["weights"]["adain.0.affine.weight"][:4] - scales).abs().max() < .02  # went on, not started anew
    model, _ = infer.load_model(tmp_path / "run" / "last.pt")
    assert model.config.relu and model.config.resize


@pytest.mark.parametrize("preset", train.PRESETS)
def test_every_preset_passes_a_dry_run(preset, tmp_path, random_alexnet):
    run = tmp_path / "run"
    small = "--data synthetic --size 32 --width 4 --latent 8 --batch-size 4 --workers 0 --device cpu".split()
    train.main(["--preset", preset, *small, "--lpips-net", "alex", "--lpips-weights", random_alexnet,
                "--dry-run", "--output", str(run)])
    checkpoint = saved(run / "dry-run")
    assert checkpoint["step"] == 1 and checkpoint["preset"] == preset
    own_colours_only = 2 if preset == "unet" else 6
    assert Image.open(run / "dry-run" / "samples" / "0000001.png").size == (36 * own_colours_only + 4, 36 * 5 + 4)


def test_log_and_curves_have_one_row_a_validation_also_after_a_resume(tmp_path):
    run = str(tmp_path / "run")
    train.main([*TINY, "--steps", "8", "--output", run])
    train.main([*TINY, "--steps", "12", "--accumulate", "1", "--output", run, "--resume"])
    with open(tmp_path / "run" / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [r["step"] for r in rows] == ["4", "8", "12"] and rows[-1]["pictures"] == "48"
    assert all(np.isfinite(float(r[k])) for r in rows for k in
               ("train_loss", "val_loss", "val_mse", "val_psnr", "val_ssim", "val_transfer", "val_spread"))
    assert Image.open(tmp_path / "run" / "loss.png").size == (640, 400)


def test_validation_of_a_network_that_answers_gray():
    """The untrained network: its measures are those of the gray pictures, which numpy can compute."""
    settings = train.Settings(data="synthetic", size=32, lpips=0, batch_size=2, latent=8, width=4)
    recipe = train.Recipe(settings, torch.device("cpu"))
    photos = Photos([1, 2, 3], 32, 0, train=False)
    loader = [tuple(torch.stack(t) for t in zip(*[photos[0, i] for i in batch])) for batch in ([0, 1], [2])]
    model = Colorizer(ModelConfig(latent=8, width=4))
    result = train.validate(model, recipe, loader)
    x = np.stack([photos[0, i][0].numpy() for i in range(3)]) / 255.
    linear = np.where(x > .04045, ((x + .055) / 1.055) ** 2.4, x / 12.92)
    y = np.einsum("c,bchw->bhw", [.212671, .715160, .072169], linear)
    gray = np.where(y > .0031308, 1.055 * y ** (1 / 2.4) - .055, 12.92 * y)
    mse = ((x - gray[:, None]) ** 2).mean((1, 2, 3))
    assert result["mse"] == pytest.approx(mse.mean(), rel=1e-4)
    assert result["psnr"] == pytest.approx((-10 * np.log10(mse)).mean(), rel=1e-4)
    assert result["transfer"] == pytest.approx(0, abs=1e-3)
    codes = model.encode_style(torch.tensor(x, dtype=torch.float32)).detach().numpy()
    assert result["spread"] == pytest.approx(codes.std(0).mean(), rel=1e-4)
    assert model.training  # validation hands the network back as it was


@pytest.mark.parametrize("step, progress, expected", [(0, 0., .25), (3, .5, .5), (100, 1., 0.)])
def test_learning_rate_rises_and_falls(step, progress, expected):
    settings = train.Settings(lr=1., warmup=3, schedule="cosine")
    assert train.learning_rate(settings, step, progress) == pytest.approx(expected)
    settings = train.Settings(lr=1., warmup=0)
    assert train.learning_rate(settings, step, progress) == 1.


def test_the_style_loss_can_only_move_the_style_encoder():
    torch.manual_seed(0)
    model = Colorizer(ModelConfig(width=4, latent=8))
    gray, style = torch.rand(2, 1, 32, 32), torch.rand(2, 3, 32, 32)
    train.style_loss(model, gray, style, torch.rand(2, 3, 32, 32), "rgb").backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"style_encoder"}


def test_combined_and_dual_objectives():
    assert train.objective(train.Settings(), 0, 2., None) == 2.
    assert train.objective(train.Settings(style_loss="combined", alpha=.75), 0, 2., 10.) == 4.
    assert [train.objective(train.Settings(style_loss="dual"), k, 2., 10.) for k in (0, 1)] == [2., 10.]


def test_overfitting_eight_scenes_and_swapping_their_styles_swaps_the_colours(tmp_path):
    """Eight synthetic pictures. Their colours cannot be guessed from their gray versions, so whoever gets them
    right has read the style codes; then photo A with style B must have the colours of B."""
    run = tmp_path / "run"
    train.main(f"--data synthetic --train-size 8 --val-size 4 --size 32 --color lab --lpips 0 --dropout 0 --lr 2e-3 "
               f"--width 8 --steps 150 --val-every 150 --batch-size 8 --clip 1 --workers 0 --device cpu --hue-rotation 0 "
               f"--schedule cosine --output {run}".split())
    model = Colorizer(ModelConfig(color="lab", width=8, dropout=0.))
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


@pytest.mark.parametrize("arguments", ["--size 100", "--batch-size 0", "--lr -1", "--preset nonsense", "--dropout 1",
                                       "--mse 0 --lpips 0", "--no-style --style-loss dual", "--no-style --start both", "--epochs many",
                                       "--epochs 0", "--lr nan", "--minutes inf", "--width 1000", "--seed 99999999999"])
def test_usage_errors_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        train.main(arguments.split())
    assert error.value.code == 2 and "error:" in capsys.readouterr().err


def test_help_lists_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for f in train.fields(train.Settings):
        assert "--" + f.name.replace("_", "-") in text and f.metadata["help"] + " [" in text


def test_errors_of_a_run_are_one_line(tmp_path):
    run = tmp_path / "run"
    train.main([*TINY, "--steps", "1", "--output", str(run)])

    def message(*arguments):
        process = command(*arguments)
        out, err = process.communicate()
        assert process.returncode == 1 and err.count("\n") == 1, (out, err)
        return err
    assert "--resume" in message(*TINY, "--steps", 2, "--output", run)
    assert "is no folder" in message("--data", tmp_path / "nowhere", "--lpips", 0, "--output", tmp_path / "x")
    assert "no such file" in message(*TINY, "--lpips", 1, "--lpips-weights", tmp_path / "nothing.pth",
                                     "--output", tmp_path / "x")
    assert "latent" in message(*TINY, "--latent", 9, "--init", run / "last.pt", "--output", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    for settings in ({"size": "32"}, {"magic": 1}):  # a file made by another version, or by an enemy
        (tmp_path / "foreign").mkdir(exist_ok=True)
        torch.save({**saved(run), "settings": saved(run)["settings"] | settings}, tmp_path / "foreign" / "last.pt")
        assert "not of this version" in message(*TINY, "--resume", "--output", tmp_path / "foreign")


def test_init_starts_from_the_weights_alone(tmp_path):
    train.main([*TINY, "--steps", "2", "--output", str(tmp_path / "a")])
    train.main([*TINY, "--steps", "1", "--lr", "0", "--init", str(tmp_path / "a/last.pt"), "--output", str(tmp_path / "b")])
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b")
    learned = [k for k, _ in Colorizer(ModelConfig(width=4, latent=8)).named_parameters()]
    assert all(torch.equal(a["weights"][k], b["weights"][k]) for k in learned) and b["step"] == 1


def test_scenes_keep_their_gray_under_the_hue_rotation_of_the_loop():
    """What the loop feeds: gray is that of the unturned photo, photo and style are turned together."""
    recipe = train.Recipe(train.Settings(lpips=0, hue_rotation=1.), torch.device("cpu"))
    photo = to_tensor(draw_scene(3).resize((32, 32)))[None]
    gray, rgb, style = recipe.prepare((photo, photo, torch.tensor([2.])))
    assert torch.equal(rgb, style)
    assert (gray - gray_of(photo / 255)).abs().max() < 1e-5
    before, after = rgb_to_lab(photo / 255)[:, 1:], rgb_to_lab(rgb)[:, 1:]
    assert (before - after).abs().mean() > 10
    assert network_to_rgb(rgb_to_network(rgb, "lab"), gray, "lab").sub(rgb).abs().max() < 1e-3
