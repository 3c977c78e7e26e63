"""The measures of benchmarks/measure.py on drawn pictures whose answer is known, and against loops over pixels."""
import itertools
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bench
import infer
import measure
import train
from data import UserError, draw_scene, rgb_to_lab
from losses import LPIPS, load_trunk
from model import Colorizer, ModelConfig


def picture(planes):
    """Planes (H, W) -> (1, C, H, W)."""
    return torch.from_numpy(np.stack(np.broadcast_arrays(*planes)).astype(np.float32))[None]


def quotient(pair):
    return pair[0] / pair[1]


def clamped(plane, y, x):
    """The pixel, or the nearest one where (y, x) lies outside."""
    return plane[min(max(y, 0), plane.shape[0] - 1), min(max(x, 0), plane.shape[1] - 1)]


def gaussian(plane, sigma):
    """A Gaussian blur by its definition, in two dimensions, pixel by pixel."""
    r, result = math.ceil(3 * sigma), np.zeros(plane.shape)
    near = itertools.product(range(-r, r + 1), repeat=2)
    weights = {(j, i): math.exp(-(i * i + j * j) / (2 * sigma ** 2)) for j, i in near}
    for y, x in np.ndindex(plane.shape):
        result[y, x] = sum(w * clamped(plane, y + j, x + i) for (j, i), w in weights.items()) / sum(weights.values())
    return result


Y, X = np.mgrid[:64, :64].astype(float)
SIDES = np.where(X < 32, 20., -20.)  # a red wall and a green one of the same lightness


def test_blur_is_the_gaussian_by_its_definition():
    planes = np.random.default_rng(0).normal(size=(2, 9, 14))
    for sigma in (1, 2):
        expected = [gaussian(p, sigma) for p in planes]
        np.testing.assert_allclose(measure.blur(picture(planes), sigma)[0], expected, atol=1e-6)


# ---- mix --------------------------------------------------------------------------------------------------

def test_mix_of_the_true_colors_is_zero_and_of_a_wash_one():
    pairs = measure.pixel_pairs(picture([50 + 0 * X, SIDES, 0 * X]))
    assert measure.mix(picture([SIDES, 0 * X]), pairs) == (0, pytest.approx(40))
    assert quotient(measure.mix(picture([Y, 0 * X]), pairs)) == pytest.approx(1, abs=.03)    # from top to bottom


def test_mix_of_colors_that_follow_lightness_is_one():
    L = 50 + np.random.default_rng(0).uniform(-3, 3, X.shape)
    pairs = measure.pixel_pairs(picture([L, SIDES, 0 * X]))
    assert quotient(measure.mix(picture([4 * L, -2 * L]), pairs)) == pytest.approx(1, abs=.03)


def test_mix_is_what_loops_over_all_pairs_find():
    random = np.random.default_rng(1)
    cells = random.integers(3, size=(4, 4)).repeat(3, 0).repeat(3, 1)                   # 144 pixels of three colors
    lab = np.array([[40, 20, 0], [41, -15, 9], [60, 0, 0]])[cells].transpose(2, 0, 1) + random.normal(0, 1, (3, 12, 12))
    out = random.normal(0, 20, (2, 12, 12))
    true = [np.array([sum(clamped(p, y + j, x + i) for i in (-1, 0, 1) for j in (-1, 0, 1)) / 9 for p in lab])
            for y, x in np.ndindex(12, 12)]
    same, apart = [], []
    for p in range(144):
        for q in range(p):
            d = math.dist(out[:, p // 12, p % 12], out[:, q // 12, q % 12])
            if math.dist(true[p], true[q]) <= 5:
                same.append(d)
            elif abs(true[p][0] - true[q][0]) <= 3 and math.dist(true[p][1:], true[q][1:]) >= 15:
                apart.append(d)
    assert len(same) > measure.ENOUGH < len(apart)
    found = measure.mix(picture(out), measure.pixel_pairs(picture(lab)))
    assert found == pytest.approx((np.mean(same), np.mean(apart)), rel=1e-4)


def test_mix_looks_at_the_same_pixels_every_time_and_leaves_pictures_of_one_color_out():
    lab = rgb_to_lab(measure.to_batch(draw_scene(3)))
    first, second = measure.pixel_pairs(lab), measure.pixel_pairs(lab)
    assert all(torch.equal(a, b) for a, b in zip(first, second)) and len(first[0].unique()) == measure.SAMPLE
    assert measure.mix(lab[:, 1:], measure.pixel_pairs(picture([0 * X, 0 * X, 0 * X]))) == (0, 0)


# ---- wash -------------------------------------------------------------------------------------------------

def test_a_flat_wall_of_one_color_has_no_wash_and_one_with_a_ramp_has_its_deviation():
    wall = measure.flat_regions(picture([50 + 0 * X]))
    assert len(wall) == 1 and wall[0].all()
    assert measure.wash(picture([20 + 0 * X, 0 * X]), wall) == pytest.approx((0, 20), abs=1e-4)
    deviation, chroma = measure.wash(picture([X, 0 * X]), wall)
    assert deviation == pytest.approx(gaussian(X[:1], 2).std(), rel=1e-4) and chroma == pytest.approx(31.5)
    assert deviation == pytest.approx(math.sqrt((64 ** 2 - 1) / 12), rel=.03)           # of 0, 1, ..., 63
    assert measure.wash(picture([X, X]), wall)[0] == pytest.approx(math.sqrt(2) * deviation)


def test_two_walls_may_have_two_colors_and_count_by_their_areas():
    walls = measure.flat_regions(picture([np.where(X < 24, 30., 70.)]))
    assert len(walls) == 2
    inner = [w & torch.from_numpy((X < 16) | (X >= 32)) for w in walls]                 # where no blur reaches
    assert sorted(w.sum().item() for w in inner) == [64 * 16, 64 * 32]
    assert measure.wash(picture([np.where(X < 24, 30, -30), 0 * X]), inner)[0] == pytest.approx(0, abs=1e-4)
    ramp = gaussian(Y[:, :1], 2).std()                                                  # in the smaller wall alone
    assert measure.wash(picture([np.where(X < 24, Y, 0), 0 * X]), inner)[0] == pytest.approx(ramp / 3, rel=1e-4)


def test_flat_regions_are_those_that_a_flood_fill_finds():
    random = np.random.default_rng(2)
    cells, sides = np.array([[80., 50, 20], [20, 80, 50], [50, 55, 80]]), [12, 20, 28]
    L = cells.repeat(sides, 0).repeat(sides, 1) + random.normal(0, 1, (60, 60))
    L[:20, 40:] = 30 + 20 * (np.arange(20) // 2 % 2)                                    # stripes: texture, nothing flat
    smooth, steep = gaussian(L, 1), np.zeros(L.shape, bool)
    sobel = {-1: 1, 0: 2, 1: 1}
    for y, x in np.ndindex(L.shape):
        dx = sum(w * (clamped(smooth, y + k, x + 1) - clamped(smooth, y + k, x - 1)) for k, w in sobel.items())
        dy = sum(w * (clamped(smooth, y + 1, x + k) - clamped(smooth, y - 1, x + k)) for k, w in sobel.items())
        steep[y, x] = math.hypot(dx, dy) / 8 >= 1.5
    flat = {(y, x) for y, x in np.ndindex(L.shape) if not steep[max(y - 1, 0):y + 2, max(x - 1, 0):x + 2].any()}
    found_all = []
    while flat:
        found, edge = set(), [flat.pop()]
        while edge:
            y, x = edge.pop()
            found.add((y, x))
            edge += [n for n in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)) if n in flat]
            flat.difference_update(edge)
        found_all.append(sorted(found))
    expected = [f for f in found_all if len(f) >= 108]                                  # 3 % of 3,600
    regions = measure.flat_regions(picture([L]))
    assert sorted(expected) == sorted(sorted(map(tuple, r.nonzero().tolist())) for r in regions)
    assert len(expected) > 2 and any(72 < len(f) < 108 for f in found_all)
    assert not any(r[2:18, 42:].any() for r in regions)


# ---- shares of the variance -------------------------------------------------------------------------------

def test_by_lightness_is_one_for_a_function_of_L_and_zero_for_what_is_independent_of_it():
    random = np.random.default_rng(3)
    L = random.integers(0, 4, X.shape) * 20.
    assert quotient(measure.by_lightness(picture([np.sin(L), np.cos(L)]), picture([L]))) == pytest.approx(1)
    ramp = random.uniform(0, 100, X.shape)
    assert quotient(measure.by_lightness(picture([ramp, -ramp]), picture([ramp]))) > .99
    noise = picture(random.normal(size=(2, 64, 64)))
    assert quotient(measure.by_lightness(noise, picture([ramp]))) < .015                # by chance: 23 / 4,095
    # Where L is the same everywhere it explains nothing, whatever stands where.
    assert measure.by_lightness(picture([X, Y]), picture([0 * X + 50]))[0] == pytest.approx(0, abs=1e-3)


def test_by_lightness_is_what_a_loop_over_24_groups_finds():
    random = np.random.default_rng(4)
    L, ab = random.permutation(96).reshape(8, 12), random.normal(size=(2, 8, 12)) + 3
    explained = total = 0
    for plane in ab:
        total += ((plane - plane.mean()) ** 2).sum()
        for group in range(24):                                                         # of four pixels each
            members = plane[(L >= 4 * group) & (L < 4 * group + 4)]
            explained += 4 * (members.mean() - plane.mean()) ** 2
    assert measure.by_lightness(picture(ab), picture([L])) == pytest.approx((explained, total), rel=1e-5)


def test_by_position_is_one_for_a_wash_and_zero_for_what_changes_from_pixel_to_pixel():
    assert quotient(measure.by_position(picture([3 * X - Y, X * Y + Y ** 2]))) == pytest.approx(1)
    assert quotient(measure.by_position(picture([(-1) ** (X + Y), (-1) ** X]))) < .01
    assert quotient(measure.by_position(picture([X[:20], Y[:20]]))) == pytest.approx(1)  # need not be square


def test_hue_histogram_counts_chroma():
    a = np.where(X < 16, 30., -10.)                                                     # 1/4 of hue 0, 3/4 of hue 180
    counts = measure.hue_histogram(picture([a, 0 * X + .01]))
    assert sorted(counts)[-2:] == pytest.approx([.5, .5], abs=1e-3) and counts.sum() == pytest.approx(1)
    assert measure.hue_histogram(picture([0 * X, 0 * X])).sum() == 0


# ---- the table --------------------------------------------------------------------------------------------

def checkpoint(path, **config):
    torch.manual_seed(1)
    model = Colorizer(ModelConfig(width=4, latent=8, space="lab", **config))
    torch.nn.init.normal_(model.head.weight, std=.3)
    torch.save({"format": infer.FORMAT, "model": asdict(model.config), "settings": {"size": 128},
                "weights": model.state_dict()}, path)
    return str(path)


def test_a_copy_of_the_photo_has_the_best_values_and_the_photos_own_coherence(random_alexnet):
    photos = [draw_scene(n).resize((128, 128)) for n in range(3)]
    labs = [rgb_to_lab(measure.to_batch(p)) for p in photos]
    facts = [(lab[:, :1], measure.pixel_pairs(lab), measure.flat_regions(lab[:, :1])) for lab in labs]
    lpips = LPIPS("alex", load_trunk("alex", random_alexnet))
    pairs = [(0, 0), (1, 1), (2, 2)]
    result = measure.measure(lambda photo, style: photo, photos, facts, photos, pairs, [draw_scene(4)], lpips)
    assert result["psnr"] == result["edges"] == pytest.approx(100)                      # psnr's upper bound
    assert result["lpips"] == result["transfer"] - 1 == pytest.approx(0, abs=1e-6)
    assert all(result[c] == pytest.approx(1) for c in ("corr a", "corr b", "chroma", "hue"))
    own = measure.quotients([measure.coherence(lab[:, 1:], f) for lab, f in zip(labs, facts)])
    assert {c: result[c] for c in own} == own and own["mix"] < .2
    gray = measure.measure(measure.leave_gray, photos, facts, photos, pairs, [], lpips)
    assert gray["transfer"] == pytest.approx(0, abs=.01) and gray.keys() == result.keys() - own.keys() - {"edges", "corr a", "corr b"}


@pytest.mark.parametrize("amount", [0, .5])
def test_a_network_is_measured_by_the_pictures_that_infer_writes(amount, tmp_path, capsys):
    weights = checkpoint(tmp_path / "net.pt")
    for n, name in [(1, "photo"), (2, "style")]:
        draw_scene(n, 200, 150).save(tmp_path / f"{name}.png")
    photo, style = (Image.open(tmp_path / f"{name}.png") for name in ("photo", "style"))
    infer.main([str(tmp_path / "photo.png"), str(tmp_path / "style.png"), "--weights", weights, "--refine", str(amount),
                "--device", "cpu", "--output", str(tmp_path / "out.png")])
    assert measure.network(weights, amount)(photo, style).tobytes() == Image.open(tmp_path / "out.png").tobytes()


def test_the_table(tmp_path, capsys, monkeypatch, random_alexnet):
    for n in range(3):
        (tmp_path / "photos").mkdir(exist_ok=True)
        draw_scene(n, 500, 150 + 125 * n).save(tmp_path / "photos" / f"{n}.png")        # short sides 150, 275, 400
    nets = [str(checkpoint(tmp_path / name)) for name in ("a.pt", "b.pt")]
    command = ["measure.py", str(tmp_path / "photos"), str(Path(infer.__file__).parent / "examples"), "--refine", "0",
               "--lpips-weights", random_alexnet, "--pairs", "1", "--weights", nets[0]]

    def rows(*more):
        monkeypatch.setattr("sys.argv", [*command, *more])
        measure.main()
        first, _, head, _, *lines = capsys.readouterr().out.splitlines()
        head, *lines = ([c.strip() for c in line.split("|")[1:-1]] for line in (head, *lines))
        return first, {line[0]: dict(zip(head[1:], line[1:], strict=True)) for line in lines}

    first, table = rows("--large", str(tmp_path / "photos"), "--weights", *nets)
    assert first == "3 photos, 3 pairs with 8 paintings, 1 large photos"
    assert list(table) == ["the photos", "left gray", "mean color", *(f"{net} --refine 0" for net in nets)]
    assert {c for c, v in table["the photos"].items() if v != "-"} == {"position", "mix", "wash", "by lightness"}
    assert {c for c, v in table["left gray"].items() if v == "-"} == {
        "corr a", "corr b", "position", "mix", "wash", "by lightness"}
    assert "-" not in table[f"{nets[0]} --refine 0"].values()
    _, again = rows("--large", str(tmp_path / "photos"))                                # with one network: every digit again
    assert len(again) == 4 and again == {name: table[name] for name in again}
    first, table = rows("--limit", "2")
    assert first.startswith("2 photos, 2 pairs") and table["mean color"]["edges"] == "-"
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("sys.argv", [command[0], command[1], str(tmp_path / "empty")])
    with pytest.raises(UserError, match="empty: no pictures"):
        measure.main()
    _, table = rows("--limit", "1")                                                     # one pair has no correlation
    assert table["mean color"]["corr a"] == "-" != table["mean color"]["by lightness"]
    unet = checkpoint(tmp_path / "unet.pt", use_style=False)
    monkeypatch.setattr("sys.argv", [*command[:-2], "--weights", str(unet)])
    with pytest.raises(UserError, match="unet.pt: a plain U-Net"):
        measure.main()
    monkeypatch.setattr("sys.argv", [*command, "--large", str(tmp_path / "none")])
    with pytest.raises(UserError, match="none: no photos of 400 pixels"):
        measure.main()
    for wrong in (["--pairs", "0"], ["--limit", "-1"], ["--refine", "2"], ["--refine"], ["--blur", "0"], ["--blur", "nan"]):
        monkeypatch.setattr("sys.argv", [*command, *wrong])
        with pytest.raises(SystemExit):
            measure.main()


@pytest.mark.parametrize("preset, optimizers", [("final", 1), ("dual", 2), ("unet", 1)])
def test_the_memory_benchmark_takes_three_steps_of_every_optimizer(preset, optimizers):
    small = dict(size=32, batch_size=2, width=4, latent=4, lpips=0.)
    s = train.Settings(**{**train.PRESETS[preset], **small}).check()
    found = bench.train_three_steps(s, torch.device("cpu"))
    steps = [{int(state["step"]) for state in optimizer.state.values()} for optimizer in found]
    assert steps == [{3}] * optimizers
