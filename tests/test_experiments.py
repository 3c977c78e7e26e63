"""The paper's experiments: what the table measures, the changed networks, and that the table reads what they leave."""
import csv
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import experiments
import explode
import infer
import oracle
import train
import variants
from data import Photos, UserError
from model import Colorizer, ModelConfig

TINY = ("--data synthetic --train-size 20 --val-size 4 --size 32 --width 4 --latent 8 --batch-size 4 --lpips 0 "
        "--workers 0 --device cpu").split()


@pytest.fixture(autouse=True)
def ctrl_c_stays_with_pytest(monkeypatch):
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)


def build(*names, **config):
    torch.manual_seed(0)
    return variants.Variant(ModelConfig(**{"width": 4, "latent": 8, **config}), names).eval().requires_grad_(False)


# ---- the table --------------------------------------------------------------------------------------------


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
    assert experiments.grid(truth + .1, truth) < 1e-3                                  # one color off is no lattice


def table(runs, monkeypatch, capsys):
    """The rows that experiments.py prints for the pictures in examples/, as dictionaries."""
    capsys.readouterr()
    examples = str(experiments.TOP / "examples")
    monkeypatch.setattr("sys.argv", ["experiments.py", str(runs), examples, examples])
    experiments.main()
    head, _, *rows = ([c.strip() for c in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_table_and_figures_of_a_run(tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs"
    train.main([*TINY, "--steps", "2", "--output", str(runs / "final")])
    train.main([*TINY, "--steps", "2", "--no-use-style", "--output", str(runs / "unet")])
    final, unet = table(runs, monkeypatch, capsys)
    with open(runs / "final" / "log.csv") as file:
        log = list(csv.DictReader(file))[-1]
    assert (final["run"], final["pictures"]) == ("final", "8") and final["alive"].endswith("/ 8")
    assert final["train loss"] == f"{float(log['train_loss']):.4f}" and final["psnr"] == f"{float(log['val_psnr']):.2f}"
    assert {c for c, v in unet.items() if v == "-"} == {"transfer", "spread", "alive", "listens"}
    for name in ("own", "lpips-long-seed1"):  # both in experiments.jpg, one in codes.png, one in grid.png
        shutil.copytree(runs / "final", runs / "below" / name)
        shutil.copytree(runs / "final", runs / "below" / name / "dry-run")
    monkeypatch.setattr("sys.argv", ["experiments.py", str(runs), "--figures", str(tmp_path / "f")])
    experiments.main()
    curves = {f"{name}.png" for name in (*experiments.CURVES, "latents")}  # from the logs that are kept
    assert {p.name for p in (tmp_path / "f").iterdir()} == {"experiments.jpg", "codes.png", "grid.png"} | curves
    assert Image.open(tmp_path / "f" / "experiments.jpg").size == (130 + 10 * 68, 3 * 68)
    assert Image.open(tmp_path / "f" / "codes.png").size == (840, 440)


def test_the_curves_of_two_seeds_are_of_two_runs():
    assert experiments.seeds("column", {"x": "run"}) == {"x": ("run", "column", "steelblue"),
                                                         "x, seed 1": ("run-seed1", "column", "lightsteelblue")}


def test_curves_are_over_pictures_and_a_run_goes_on_where_the_one_before_ended(tmp_path, monkeypatch):
    for name, rows in (("a", "100,.5,.1\n200,.4,.2\n230,,"), ("b", "50,.3,.3"), ("latent8-long", "30,1,.4\n40000,1,.6"),
                       ("latent8-long-seed1", "40000,1,.7")):
        (tmp_path / f"{name}.csv").write_text(f"pictures,val_loss,val_transfer\n{rows}\n")
    drawn = {}

    class Page:
        def __init__(self, rows, colors, across):
            self.rows = rows, colors, across

        def save(self, path):
            drawn[path.name] = self.rows
    monkeypatch.setattr(experiments, "LOGS", tmp_path)
    monkeypatch.setattr(experiments, "CURVES", {"one": {"x": ("a+b", "val_transfer", "red")},
                                                "none": {"x": ("c", "val_transfer", "red")}})
    monkeypatch.setattr(infer, "draw_curves", Page)
    experiments.draw_logs({}, tmp_path)
    rows, colors, across = drawn["one.png"]
    assert rows == [{"pictures": n, "x": v} for n, v in ((100, ".1"), (200, ".2"), (250, ".3"))]
    assert (colors, across) == ({"x": "red"}, "pictures") and "none.png" not in drawn
    assert drawn["latents.png"][0] == [{"numbers": 8, "transfer": ".6"}, {"numbers": 8, "transfer, seed 1": ".7"}]


# ---- the changed networks ---------------------------------------------------------------------------------

def test_resize_convolution_sees_every_feature_four_times():
    up = build("resize").up[2]                                                           # of 8 channels
    x = torch.randn(2, 8, 4, 5)
    enlarged = torch.from_numpy(x.numpy().repeat(2, 2).repeat(2, 3))
    np.testing.assert_allclose(up(x), torch.nn.functional.conv2d(enlarged, *up[1].parameters(), padding=1), atol=1e-6)
    assert up[1].weight.shape == (8, 8, 3, 3)
    gray = torch.rand(1, 1, 32, 48)
    assert build("resize").colorize(gray, torch.zeros(1, 8)).shape == (1, 3, 32, 48)


def test_with_relu_a_code_is_the_mean_of_what_is_positive():
    plain, clipped = build(), build("relu")
    for a, b in zip(plain.parameters(), clipped.parameters(), strict=True):
        b.copy_(a)
    maps = []
    plain.style_encoder.convs[-1].register_forward_hook(lambda m, i, out: maps.append(out.numpy()))
    style = torch.rand(4, 3, 64, 64)
    z, q = plain.encode_style(style), clipped.encode_style(style)
    np.testing.assert_allclose(z, maps[0].mean((2, 3)), atol=1e-6)
    np.testing.assert_allclose(q, np.where(maps[0] > 0, maps[0], 0).mean((2, 3)), atol=1e-6)
    assert (q >= 0).all() and (z < -.01).any()


@pytest.mark.parametrize("names, changed", [([], set()), (["scales"], {"adain"}), (["encoder"], {"style_encoder"}),
                                            (["scales", "encoder"], {"adain", "style_encoder"})])
def test_the_authors_initial_weights(names, changed):
    """Their scales N(1, .02) and shifts N(0, .02), and torch's U(-1/sqrt(n), 1/sqrt(n)) for n inputs in the encoder."""
    torch.manual_seed(0)
    before = Colorizer(ModelConfig()).state_dict()
    model = build(*names, width=16, latent=32)
    after = model.state_dict()
    assert {k.split(".")[0] for k, v in after.items() if not torch.equal(v, before[k])} == changed
    if "adain" in changed:
        scale, shift = torch.cat([layer.affine.weight.reshape(2, -1) for layer in model.adain], 1)
        np.testing.assert_allclose([scale.mean(), scale.std(), shift.mean(), shift.std()], [1, .02, 0, .02], atol=1e-3)
        assert all(torch.equal(after[k], before[k]) for k in after if k.endswith("affine.bias"))  # 1 and 0
    if "style_encoder" in changed:
        for conv in model.style_encoder.convs:
            limit = conv.weight[0].numel() ** -.5
            assert .95 * limit < conv.weight.abs().max() <= limit and 0 < conv.bias.abs().max() <= limit
            assert abs(conv.weight.std() - limit / 3 ** .5) < .05 * limit


@pytest.mark.parametrize("angle", [-2.5, .5, 1.7, np.pi])
def test_rotate_hue_turns_the_color_and_keeps_the_lightness(angle):
    def rotate(rgb):  # (3, N) numpy
        return variants.rotate_hue(torch.tensor(rgb[None, :, :, None], dtype=torch.float32), angle)[0, :, :, 0].numpy()

    gamut = np.stack(np.meshgrid(*[np.linspace(0, 1, 9)] * 3), 0).reshape(3, -1)
    np.testing.assert_allclose(oracle.lab(rotate(gamut))[0], oracle.lab(gamut)[0], atol=.02)
    # So little chroma that no angle leaves what a screen can show.
    soft = oracle.rgb(np.stack(np.meshgrid([40., 60, 75], [-8., 9], [-7., 10]), 0).reshape(3, -1))
    before, after = ([1, 1j] @ oracle.lab(c)[1:] for c in (soft, rotate(soft)))
    np.testing.assert_allclose(after / before, np.exp(1j * angle), atol=1e-3)


def test_half_of_the_training_photos_are_turned_with_their_styles(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(4):  # soft colors, all different
        Image.fromarray(rng.integers(110, 150, (16, 16, 3)).astype(np.uint8)).resize((64, 64)).save(tmp_path / f"{i}.png")
    paths = sorted(tmp_path.iterdir())
    arguments = paths, 16, 0, True, "other"
    plain, turned = Photos(*arguments), variants.TurnedHues(*arguments)
    angles = []
    for epoch in range(200):
        before, after = (np.stack([oracle.lab(x.numpy().reshape(3, -1) / 255) for x in p[epoch, 1]]) for p in (plain, turned))
        assert abs(before[:, 0] - after[:, 0]).max() < .6                               # L, but for the rounding to bytes
        photo, style = (np.angle(([1, 1j] @ a[1:] * np.conj([1, 1j] @ b[1:])).sum()) for a, b in zip(after, before))
        assert abs(np.angle(np.exp(1j * (photo - style)))) < .02                        # both by the same angle
        angles.append(photo)
    angles = np.array(angles)
    angles = angles[abs(angles) > 1e-9]
    assert abs(len(angles) / 200 - .5) < 4 * .5 / 200 ** .5
    # All round the circle: the mean of n unit vectors is about 1 / sqrt(n) long.
    assert abs(np.exp(1j * angles).mean()) < 3 / len(angles) ** .5
    assert set(np.digitize(angles, [-np.pi / 2, 0, np.pi / 2])) == {0, 1, 2, 3}
    assert all(torch.equal(a, b) for a, b in zip(turned[5, 1], turned[5, 1]))
    validation = variants.TurnedHues(paths, 16, 0, False)
    assert all(torch.equal(a, Photos(paths, 16, 0, False)[0, i][0]) for i in range(4) for a in validation[0, i])


def test_hues_go_into_the_training_that_asks_for_them(tmp_path):
    runs = {}
    for names in ("hues", "encoder", "hues,encoder"):
        variants.main([names, "--", *TINY, "--steps", "1", "--output", str(tmp_path / names)])
        with open(tmp_path / names / "log.csv") as file:
            runs[names] = list(csv.DictReader(file))[0]["train_loss"]
    # The first answer is gray whatever the code is: so the loss of the first step tells which photos it saw.
    assert runs["hues"] == runs["hues,encoder"] != runs["encoder"] and train.Photos is Photos


def test_with_gradient_the_style_loss_moves_the_code_of_the_result_too():
    model = build().requires_grad_(True)
    gray, z = torch.rand(2, 1, 32, 32), torch.rand(2, 8)
    out = torch.rand(2, 3, 32, 32, requires_grad=True)
    with variants.use(("gradient",)):
        both = train.style_loss(model, gray, z, out)
    with variants.use(("gradient", "only-encoder")):
        encoder = train.style_loss(model, gray, z, out)
    assert torch.equal(encoder, both)
    [weight] = torch.autograd.grad(encoder, model.style_encoder.convs[0].weight, retain_graph=True)
    [same] = torch.autograd.grad(both, model.style_encoder.convs[0].weight, retain_graph=True)
    assert torch.equal(weight, same) and weight.abs().max() > 0
    assert torch.autograd.grad(encoder, out, allow_unused=True) == (None,)
    assert train.style_loss is variants.style_loss
    with pytest.raises(SystemExit, match="2"):
        variants.main(["only-encoder", "--", "--steps", "1"])
    plain = train.style_loss(model, gray, z, out)
    assert torch.equal(both, plain) and not plain.requires_grad
    # Along the gradient of the picture the loss changes by the square of that gradient's length.
    slope, = torch.autograd.grad(both, out)
    step = 1e-2 * slope / slope.norm()
    change = train.style_loss(model, gray, z, out.detach() + step) - train.style_loss(model, gray, z, out.detach() - step)
    assert change > 0 and abs(change / 2e-2 / slope.norm() - 1) < .05


def test_codes_grow_where_those_of_results_are_larger():
    """A code of two numbers, the mean red and the mean green; the result has half of the red and twice the green."""
    class Model:
        config = ModelConfig()

        def encode_style(self, style):
            return style[:, :2].mean((2, 3))

        def colorize(self, gray, s):
            red, green = s[:, :1] / 2, 2 * s[:, 1:]
            return torch.cat([red, green, red], 1)[:, :, None, None].expand(-1, -1, 8, 8)
    rgb = torch.rand(5, 3, 8, 8) / 2
    s = rgb[:, :2].numpy().mean((2, 3))
    found = explode.slopes(Model(), rgb, rgb)
    np.testing.assert_allclose(found, (s ** 2).mean(0) * [.5, -1], rtol=1e-4)


def test_explode_counts_the_signs(tmp_path, monkeypatch, capsys):
    for i in range(3):
        Image.new("RGB", (32, 32), (40 * i, 200, 90)).save(tmp_path / f"{i}.png")
    own = torch.tensor([-1., 2, 3, -.1, 5])
    monkeypatch.setattr(infer, "load_model", lambda _: (build(), 32))
    monkeypatch.setattr(explode, "slopes", lambda _, rgb, style: own if torch.equal(rgb, style) else -own)
    monkeypatch.setattr("sys.argv", ["explode.py", "last.pt", str(tmp_path)])
    explode.main()
    assert capsys.readouterr().out.splitlines() == ["its own style: 2 of 5 numbers grow, 3 shrink",
                                                    "the style of another photo: 3 of 5 numbers grow, 2 shrink"]


def test_variants_are_trained_saved_resumed_and_read_by_the_table(tmp_path, monkeypatch, capsys):
    run = tmp_path / "runs" / "authors"
    options = [*TINY, "--output", str(run)]
    variants.main(["relu,resize,scales,encoder", "--", *options, "--steps", "1", "--lr", "0"])
    assert variants.of_run(run) == ("relu", "resize", "scales", "encoder")
    scales = torch.load(run / "last.pt", weights_only=True)["weights"]["adain.0.affine.weight"][:4]
    assert abs(scales.mean() - 1) < .02  # of 32 numbers
    variants.main(["scales,encoder,relu,resize", "--", *options, "--steps", "3", "--lr", "1e-2", "--resume"])
    again = torch.load(run / "last.pt", weights_only=True)["weights"]["adain.0.affine.weight"][:4]
    assert 0 < (again - scales).abs().max() < .02  # went on, not started anew

    model, size = experiments.load(run)
    assert size == 32 and type(model.up[0]) is type(model.style_encoder.convs[4]) is torch.nn.Sequential
    assert table(tmp_path / "runs", monkeypatch, capsys)[0]["pictures"] == "12"

    # Without its variants nobody goes on with it, or takes it for the plain network.
    with pytest.raises(UserError, match="missing weight|unknown weight"):
        train.main([*options, "--steps", "4", "--resume"])
    with pytest.raises(UserError, match="other variants"):
        variants.main(["relu", "--", *options, "--steps", "4", "--resume"])
    assert train.Colorizer is infer.Colorizer is Colorizer


def test_a_mistake_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        variants.main(["rely", "--", "--steps", "1"])
    assert "relu, scales, encoder, resize, hues, gradient, only-encoder" in capsys.readouterr().err
    with pytest.raises(UserError, match="style branch"):
        variants.main(["relu", "--", *TINY, "--no-use-style", "--steps", "1", "--output", str(tmp_path / "run")])
    train.main([*TINY, "--steps", "1", "--output", str(tmp_path / "plain")])
    with pytest.raises(UserError, match="other variants"):
        variants.main(["relu", "--", *TINY, "--steps", "2", "--resume", "--output", str(tmp_path / "plain")])
    # A dry run leaves no mark that a plain run would find, and another one may follow.
    for name in ("relu", "scales"):
        variants.main([name, "--", *TINY, "--dry-run", "--output", str(tmp_path / "new")])
        assert variants.of_run(tmp_path / "new") == () and variants.of_run(tmp_path / "new" / "dry-run") == (name,)


def test_a_start_that_is_refused_leaves_no_names_behind(tmp_path, monkeypatch):
    run = tmp_path / "run"
    with pytest.raises(UserError, match="no folder"):
        variants.main(["relu", "--", *TINY, "--data", str(tmp_path / "none"), "--steps", "1", "--output", str(run)])
    assert variants.of_run(run) == ()
    # While another one is at work there, its names stay.
    run.mkdir()
    (run / "variants.txt").write_text("scales\n")

    def locked(self):
        raise UserError("another train.py is at work here")
    monkeypatch.setattr(train.Run, "lock", locked)
    with pytest.raises(UserError, match="at work"):
        variants.main(["relu", "--", *TINY, "--steps", "1", "--output", str(run)])
    assert variants.of_run(run) == ("scales",) and train.Run.lock is locked


def test_runs_that_were_stopped_show_their_last_validation_and_an_empty_folder_is_told(tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs"
    train.main([*TINY, "--steps", "1", "--output", str(runs / "one")])
    shutil.copytree(runs / "one", runs / "none")
    head, values = (runs / "one" / "log.csv").read_text().splitlines()
    stopped = ",".join(v if n in ("step", "pictures", "seconds", "train_loss") else "" for n, v in
                       zip(head.split(","), values.split(",")))
    (runs / "one" / "log.csv").write_text(f"{head}\n{values}\n{stopped}\n")
    (runs / "none" / "log.csv").write_text(f"{head}\n{stopped}\n")
    [row] = table(runs, monkeypatch, capsys)
    assert row["run"] == "one" and row["val loss"] == f"{float(dict(zip(head.split(','), values.split(',')))['val_loss']):.4f}"
    monkeypatch.setattr("sys.argv", ["experiments.py", str(tmp_path / "nothing"), "-", "-"])
    with pytest.raises(UserError, match="nothing: no runs here"):
        experiments.main()
    # Of a run that has a curve in a figure, but was stopped before its first validation, no curve is drawn.
    shutil.copytree(runs / "one", tmp_path / "stopped" / "own")
    (tmp_path / "stopped" / "own" / "log.csv").write_text("step,pictures,seconds,train_loss\n1,4,1.0,.5\n")
    for folder, given in (("with", [str(tmp_path / "stopped")]), ("without", [])):
        monkeypatch.setattr("sys.argv", ["experiments.py", *given, "--figures", str(tmp_path / folder)])
        experiments.main()
    same = {figure: (tmp_path / "with" / figure).read_bytes() == (tmp_path / "without" / figure).read_bytes()
            for figure in ("listens.png", "spread.png", "terms.png")}
    assert same == {"listens.png": False, "spread.png": False, "terms.png": True}
