"""The reporter of the paper's experiments: what it measures, and that it reads what train.py leaves."""
import csv

import numpy as np
import torch
from PIL import Image

import experiments
import train


def test_grid_is_the_amplitude_of_a_lattice_that_all_pictures_share():
    truth = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    sign = torch.from_numpy((-1.) ** np.add.outer(np.arange(64), np.arange(64))).float()  # +1 -1 as on a chessboard
    assert abs(experiments.grid(truth + 3 / 255 * sign, truth) - 3) < 1e-3
    assert abs(experiments.grid((truth + 3 / 255 * sign)[..., :32, :32], truth[..., :32, :32]) - 3) < 1e-3
    dots = torch.zeros(64, 64)
    dots[::4, ::4] = 1                                                                 # one pixel of sixteen
    assert abs(experiments.grid(truth + 3 / 255 * dots, truth) - 3 * 15 ** .5 / 16) < 1e-3
    either = sign * (-1.) ** torch.arange(8)[:, None, None, None]
    assert experiments.grid(truth + 3 / 255 * either, truth) < 1e-3                    # other ones cancel
    assert experiments.grid(truth + .1, truth) < 1e-3                                  # one colour off is no lattice


def test_table_and_figures_of_a_run(tmp_path, monkeypatch, capsys):
    train.main(f"--data synthetic --train-size 20 --val-size 4 --size 32 --width 4 --latent 8 --batch-size 4 --steps 2 --lpips 0 "
               f"--workers 0 --device cpu --output {tmp_path / 'runs' / 'final'}".split())
    capsys.readouterr()
    examples = str(experiments.TOP / "examples")
    monkeypatch.setattr("sys.argv", ["experiments.py", str(tmp_path / "runs"), examples, examples])
    experiments.main()
    cells = [c.strip() for c in capsys.readouterr().out.splitlines()[-1].strip("|").split("|")]
    with open(tmp_path / "runs" / "final" / "log.csv") as file:
        log = list(csv.DictReader(file))[-1]
    assert cells[0] == "final" and cells[2] == "8" and cells[5] == f"{float(log['val_psnr']):.2f}"
    assert cells[3] == f"{float(log['train_loss']):.4f}" and cells[9].endswith("/ 8")
    monkeypatch.setattr("sys.argv", ["experiments.py", str(tmp_path / "runs"), "-", "-", "--figures", str(tmp_path / "f")])
    experiments.main()
    assert {p.name for p in (tmp_path / "f").iterdir()} == {"experiments.jpg", "codes.png", "grid.png", "curves-final.png"}
    assert Image.open(tmp_path / "f" / "codes.png").size == (840, 440)
