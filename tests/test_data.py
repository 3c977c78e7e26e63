"""Colors against float64 formulas, folders and splits, crops, the order of batches.

What files of every kind do to the program is in robustness/test_files.py.
"""
import math
import os
import pickle
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

import data
import oracle
from data import Photos, UserError, open_picture


def one_line(call, *args, **kwargs):
    """The text of the UserError that the call must raise, which must be one line."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def paint(path, color=(200, 60, 30), size=(16, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def link(path, target):
    try:
        path.symlink_to(target, target_is_directory=os.path.isdir(target))
    except OSError:
        pytest.skip("this system does not let us make links")


# ---- color: lists of colors are numpy arrays (3, N), as in oracle.py --------------------------------------

def pixels(x):
    """(C, N) numpy -> (1, C, N, 1) float32."""
    return torch.tensor(np.asarray(x), dtype=torch.float32)[None, :, :, None]


def table(x):
    """(1, C, N, 1) tensor -> (C, N) float64 numpy."""
    return x[0, :, :, 0].double().numpy()


def cube(*axes):
    """All combinations of the values of three axes: (3, N)."""
    return np.stack(np.meshgrid(*axes, indexing="ij")).reshape(3, -1)


# All of the gamut with its corners, and the dark corner again, where the curves change to straight lines.
GAMUT = np.concatenate([cube(*[np.linspace(0, 1, 18)] * 3), cube(*[np.linspace(0, .1, 11)] * 3)], axis=1)
IMPOSSIBLE = cube([.5, 20, 50, 80, 99.5], [-150, -60, 0, 90, 150], [-150, -70, 10, 150])


def test_primaries_white_and_black_have_their_published_lab_values():
    rgb = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0]]).T
    lab = np.array([[53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86], [100, 0, 0], [0, 0, 0]]).T
    np.testing.assert_allclose(table(data.rgb_to_lab(pixels(rgb))), lab, atol=.05)
    np.testing.assert_allclose(oracle.lab(rgb), lab, atol=.05)  # the oracle must pass its own test
    np.testing.assert_allclose(oracle.rgb(oracle.lab(GAMUT)), GAMUT, atol=1e-3)


def test_rgb_to_lab_follows_the_formula_over_the_whole_gamut():
    np.testing.assert_allclose(table(data.rgb_to_lab(pixels(GAMUT))), oracle.lab(GAMUT), atol=1e-3)


def test_lab_to_rgb_follows_the_formula_and_clips_nothing():
    np.testing.assert_allclose(table(data.lab_to_rgb(pixels(oracle.lab(GAMUT)))), GAMUT, atol=1e-3)
    wanted = oracle.rgb(IMPOSSIBLE)
    assert wanted.min() < -1 and wanted.max() > 1.5
    np.testing.assert_allclose(table(data.lab_to_rgb(pixels(IMPOSSIBLE))), wanted, atol=1e-3)
    np.testing.assert_allclose(table(data.lab_to_rgb(data.rgb_to_lab(pixels(GAMUT)))), GAMUT, atol=1e-3)


def test_gradient_of_rgb_to_lab_is_the_slope_of_the_formula():
    points, weights = np.random.default_rng(0).uniform(.05, .95, (3, 50)), np.array([1, .3, -.7])
    steps = 1e-5 * np.eye(3)[:, :, None]
    slope = [weights @ (oracle.lab(points + e) - oracle.lab(points - e)) / 2e-5 for e in steps]
    x = pixels(points).requires_grad_()
    (data.rgb_to_lab(x) * pixels(weights[:, None])).sum().backward()
    np.testing.assert_allclose(table(x.grad), np.stack(slope), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("convert, values", [
    (data.rgb_to_lab, [[0, 0, 0], [1, 1, 1], [-.2, 1.3, -.2], [1.3, -.2, .5], [0, 0, 1], [.04045] * 3]),
    (data.lab_to_rgb, [[0, 0, 0], [100, 0, 0], [50, 150, -150], [-5, 0, 0], [110, 0, 0], [0, 150, 150]]),
    (data.lab_to_gamut, [[0, 0, 0], [100, 0, 0], [50, 150, -150], [-5, 9, 9], [110, 9, 9], [50, 0, 0]])])
def test_gradients_are_finite_everywhere(convert, values):
    x = pixels(np.array(values).T).requires_grad_()
    y = convert(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


def test_lab_to_gamut_keeps_the_lightness_of_impossible_colors():
    rgb = table(data.lab_to_gamut(pixels(IMPOSSIBLE)))
    assert rgb.min() >= 0 and rgb.max() <= 1
    np.testing.assert_allclose(oracle.lab(rgb)[0], IMPOSSIBLE[0], atol=.01)
    beyond = table(data.lab_to_gamut(pixels([[-20, 130], [30, 30], [0, 0]])))  # no screen is darker or brighter
    np.testing.assert_allclose(beyond, [[0, 1]] * 3, atol=1e-4)


def test_lab_to_gamut_leaves_possible_colors_alone():
    np.testing.assert_allclose(table(data.lab_to_gamut(pixels(oracle.lab(GAMUT)))), GAMUT, atol=1e-4)


def test_gray_of_has_the_lightness_of_the_color_and_leaves_grays_alone():
    v = table(data.gray_of(pixels(GAMUT)))                                            # (1, N)
    np.testing.assert_allclose(oracle.lab(v.repeat(3, axis=0))[0], oracle.lab(GAMUT)[0], atol=1e-2)
    red = data.gray_of(pixels([[1], [0], [0]]))
    assert oracle.lab([red.item()] * 3)[0] == pytest.approx(53.24, abs=.01)
    assert data.lightness(red).item() == pytest.approx(53.24, abs=.01)
    gray = np.linspace(0, 1, 256)[None]
    np.testing.assert_allclose(table(data.gray_of(pixels(gray.repeat(3, axis=0)))), gray, atol=1e-5)


def test_lightness_is_the_l_of_gray_pixels():
    v = np.linspace(0, 1, 256)[None]
    np.testing.assert_allclose(table(data.lightness(pixels(v)))[0], oracle.lab(v.repeat(3, axis=0))[0], atol=1e-3)


@pytest.mark.parametrize("space, channels", [("rgb", 3), ("lab", 2)])
def test_what_the_network_sees_can_be_had_back_as_rgb_and_as_lab(space, channels):
    x = pixels(GAMUT)
    seen = data.rgb_to_network(x, space)
    assert seen.shape[1] == channels and -1 < seen.min() and seen.max() <= 1
    np.testing.assert_allclose(table(seen), GAMUT if space == "rgb" else oracle.lab(GAMUT)[1:] / 110, atol=1e-5)
    np.testing.assert_allclose(table(data.network_to_rgb(seen, data.gray_of(x), space)), GAMUT, atol=1e-3)
    np.testing.assert_allclose(table(data.network_to_lab(seen, data.gray_of(x), space)), oracle.lab(GAMUT), atol=.02)


# ---- palettes ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, turn", [(8, 0.), (8, .37), (32, 0.), (1, .5)])
def test_sliced_wasserstein_equals_sorting_by_hand(n, turn):
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-50, 80, (3, 2, 4, 6)), rng.uniform(-20, 20, (3, 2, 4, 6))
    expected = [oracle.wasserstein(a, b, n, turn) for a, b in zip(x, y)]
    found = data.sliced_wasserstein(torch.from_numpy(x).float(), torch.from_numpy(y).float(), n, turn)
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_moving_all_colors_by_one_vector_costs_its_mean_projection():
    x, move = torch.rand(1, 2, 5, 5), torch.tensor([3., -4.])
    d = data.sliced_wasserstein(x, x + move[:, None, None], 32).item()
    assert d == pytest.approx(5 * 2 / math.pi, rel=2e-3)  # mean |cos| is 2 / pi


def test_the_distance_of_palettes_does_not_see_where_the_colors_stand():
    x = torch.rand(2, 2, 6, 6)
    assert data.sliced_wasserstein(x, x.flip(3).transpose(2, 3), 8).abs().max() < 1e-6
    y = x.clone()
    y[1] += 1
    assert data.sliced_wasserstein(x, y, 8)[1] > .5


# ---- pictures and tensors ---------------------------------------------------------------------------------

def test_tensors_become_pictures_and_back_without_wrapping():
    rgb = torch.tensor([[-.5, 0, .5 / 255 - 1e-4, .5 / 255 + 1e-4, .6, 1, 1.5]]).repeat(3, 1, 1)   # (3, 1, 7)
    assert np.asarray(data.to_picture(rgb))[0, :, 0].tolist() == [0, 0, 0, 1, 153, 255, 255]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8))
    x = data.to_tensor(picture)
    assert x.shape == (3, 16, 32) and x[:, 3, 5].tolist() == list(picture.getpixel((5, 3)))
    np.testing.assert_array_equal(np.asarray(data.to_picture(x / 255)), np.asarray(picture))


@pytest.mark.parametrize("size, expected", [((300, 200), (48, 32)), ((200, 300), (32, 48)), ((32, 32), (32, 32)),
                                            ((10, 15), (32, 48)), ((1, 1), (32, 32)), ((999, 3), (128, 32)),
                                            ((1, 50_000), (32, 128))])
def test_resize_short_side_keeps_the_shape_and_bounds_the_long_side(size, expected):
    x = data.resize_short_side(Image.new("RGB", size, (255, 51, 0)), 32)
    assert x.shape == (1, 3, *expected[::-1]) and x.dtype == torch.float32
    np.testing.assert_allclose(x, torch.tensor([1, .2, 0])[None, :, None, None].expand_as(x), atol=1e-6)


def test_resize_short_side_leaves_a_picture_of_that_size_as_it_is():
    picture = data.draw_scene(1, 48, 32)
    assert torch.equal(data.resize_short_side(picture, 32), data.to_tensor(picture)[None] / 255)


# ---- folders ----------------------------------------------------------------------------------------------

def test_list_pictures_finds_any_depth_and_case_but_nothing_hidden(tmp_path, capsys):
    top = tmp_path / "top"
    for name in ["b/c/D.PNG", "a.JPeG", ".hidden.jpg", "b/.cache/x.jpg", "b/notes.txt", "folder.jpg/e.gif", "c.bmp"]:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).touch()
    assert data.list_pictures(top) == [top / name for name in ["a.JPeG", "b/c/D.PNG", "c.bmp", "folder.jpg/e.gif"]]
    assert data.list_pictures(tmp_path / "missing") == []
    assert capsys.readouterr() == ("", "")


def test_list_pictures_tells_how_many_of_each_unreadable_format_it_left_out(tmp_path, capsys):
    kept = paint(tmp_path / "a.png")
    for name in ["1.heic", "2.HEIC", "sub/3.heic", "paper.pdf", "notes.txt", ".hidden.heic", "sub/.cache/4.pdf"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert data.list_pictures(tmp_path) == [kept]
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path}: ") and said.count("\n") == 1
    assert "3 .heic, 1 .pdf" in said and "convert" in said and "txt" not in said


def test_list_pictures_follows_links_but_not_round_in_circles(tmp_path):
    paint(tmp_path / "elsewhere" / "x.TIF")
    paint(tmp_path / "top" / "sub" / "y.jpg")
    link(tmp_path / "top" / "linked", tmp_path / "elsewhere")
    link(tmp_path / "top" / "sub" / "loop", tmp_path / "top")
    assert data.list_pictures(tmp_path / "top") == [tmp_path / "top" / n for n in ("linked/x.TIF", "sub/y.jpg")]


def colors(n):
    """n colors far from gray and from each other in red."""
    return [(int(255 - 255 * i / n), 255 if i % 2 else 0, 128) for i in range(n)]


def test_a_plain_folder_is_split_by_seed_alone(tmp_path):
    names = {paint(tmp_path / f"{i % 3}" / f"{i}.png", c) for i, c in enumerate(colors(21))}
    train, val = data.find_data(tmp_path, 0, 0, seed=1)
    assert len(val) == 5 and set(train) | set(val) == names and not set(train) & set(val)  # a fifth, rounded up
    assert data.find_data(str(tmp_path), 0, 0, seed=1) == (train, val)
    assert set(data.find_data(tmp_path, 0, 0, seed=2)[1]) != set(val)
    few, two = data.find_data(tmp_path, 4, 2, seed=1)
    assert two == val[:2] and len(few) == 4 and not set(few) & set(two)


def test_gray_pictures_do_not_stand_in_for_those_held_back(tmp_path):
    names = {paint(tmp_path / f"{i}.png", c) for i, c in enumerate(colors(6))}
    for i in range(6, 40):
        paint(tmp_path / f"{i}.png", (90, 90, 90))
    for seed in range(20):  # 34 of 40 are gray: the first one is mostly one of them
        train, val = data.find_data(tmp_path, 0, 1, seed)
        assert len(val) == 1 and not set(val) & set(train) and set(train + val) <= names and train
        assert data.find_data(tmp_path, 2, 1, seed)[1] == val


def test_train_and_val_folders_are_taken_as_they_are(tmp_path, monkeypatch):
    folder = tmp_path / "data" / "imagenette2-160"
    for i, color in enumerate(colors(6)):
        paint(folder / ("train" if i < 4 else "val") / "class" / f"{i}.JPEG", color)
    train, val = data.find_data(folder, 0, 0, seed=0)
    assert sorted(p.name for p in train) == ["0.JPEG", "1.JPEG", "2.JPEG", "3.JPEG"]
    assert sorted(p.name for p in val) == ["4.JPEG", "5.JPEG"]
    assert [len(x) for x in data.find_data(folder, 3, 1, seed=0)] == [3, 1]
    monkeypatch.chdir(tmp_path)  # "" is the default data set, which is there already
    assert [p.resolve() for p in data.find_data("", 0, 0, seed=0)[0]] == [p.resolve() for p in train]


def test_gray_and_broken_pictures_are_left_out_and_told(tmp_path, capsys):
    near, faint = (120, 124, 120), (120, 132, 118)
    chroma = [math.hypot(*oracle.lab(np.array(c) / 255)[1:]) for c in (near, faint)]
    assert chroma[0] < data.MIN_CHROMA < chroma[1]
    kept = [paint(tmp_path / "train" / "faint.png", faint), paint(tmp_path / "train" / "red.png")]
    paint(tmp_path / "train" / "gray.png", (90, 90, 90))
    paint(tmp_path / "train" / "near.png", near)
    (tmp_path / "train" / "broken.jpg").write_text("no picture")
    paint(tmp_path / "val" / "gray.png", (90, 90, 90))
    blue = paint(tmp_path / "val" / "blue.png", (30, 60, 200))
    train, val = data.find_data(tmp_path, 0, 0, seed=0)
    told = capsys.readouterr().err
    assert sorted(train) == kept and val == [blue]
    for part in ("left out 2 gray pictures", "left out 1 gray pictures", "left out 1 unreadable", "broken.jpg"):
        assert part in told


def test_only_ten_of_many_unreadable_pictures_are_named(tmp_path, capsys):
    paths = [tmp_path / f"{i}.png" for i in range(13)]
    assert data.drop_gray_and_broken(paths, 100) == []
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 12 and "13" in told[0] and told[-1].strip() == "and 3 more"


def test_drop_gray_and_broken_keeps_the_first_ones_in_order(tmp_path):
    paths = [paint(tmp_path / f"{i}.png", (90, 90, 90) if i in (0, 3) else (200, 60, i)) for i in range(9)]
    assert data.drop_gray_and_broken(paths, 4) == [paths[i] for i in (1, 2, 4, 5)]
    assert data.drop_gray_and_broken([], 4) == []


@pytest.mark.parametrize("names, where, needed", [
    ([], "", "two"), (["only.png"], "", "two"), (["train/a.png", "val/gray.png"], "val", "one"),
    (["train/gray.png", "val/a.png"], "train", "one"), (["gray/1.png", "gray/2.png", "gray/3.png"], "", "two")])
def test_too_few_pictures_give_one_line_that_names_the_folder_and_what_is_needed(tmp_path, names, where, needed):
    for name in names:
        paint(tmp_path / name, (99, 99, 99) if "gray" in name else (200, 60, 30))
    text = one_line(data.find_data, tmp_path, 0, 0, 0)
    assert f"{tmp_path / where}: " in text and f" {needed} " in text and ".jpg" in text


@pytest.mark.parametrize("sizes, found", [((0, 0), (10_000, 500)), ((50, 7), (50, 7)), ((10 ** 6,) * 2, (10_000, 500))])
def test_synthetic_data_are_numbers_that_training_and_validation_do_not_share(sizes, found):
    train, val = data.find_data("synthetic", *sizes, seed=0)
    assert (len(set(train)), len(set(val))) == found and not set(train) & set(val)


# ---- crops and items --------------------------------------------------------------------------------------

def disc(size, radius):
    picture = Image.new("RGB", size, "white")
    x, y = size[0] / 2, size[1] / 2
    ImageDraw.Draw(picture).ellipse([x - radius, y - radius, x + radius, y + radius], fill="black")
    return picture


def extent(picture):
    """Left, top, width, height of what is dark."""
    dark = np.asarray(picture.convert("L")) < 128
    x, y = np.flatnonzero(dark.any(axis=0)), np.flatnonzero(dark.any(axis=1))
    return x[0], y[0], x[-1] - x[0] + 1, y[-1] - y[0] + 1


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (60, 40)])
def test_the_center_square_squashes_nothing_and_is_always_the_same(size):
    picture = disc(size, .4 * min(size))
    cut = data.crop_square(picture, 100)
    x, y, width, height = extent(cut)
    assert cut.size == (100, 100) and abs(width - height) <= 1
    assert width == pytest.approx(80, abs=3) and x == pytest.approx(10, abs=2) and y == pytest.approx(10, abs=2)
    assert cut.tobytes() == data.crop_square(picture, 100).tobytes()


def test_the_random_square_is_80_to_100_percent_of_the_short_side_and_squashes_nothing():
    picture = disc((300, 200), 15)
    boxes = [extent(data.crop_square(picture, 256, np.random.default_rng(i))) for i in range(80)]
    whole = np.array([b for b in boxes if b[0] > 0 and b[0] + b[2] < 256])  # where the disc was not cut by the edge
    width, height = whole[:, 2], whole[:, 3]
    assert len(whole) > 50 and abs(width - height).max() <= 2
    side = 256 * 31 / width  # an ellipse from -15 to 15 is 31 pixels wide
    assert 155 < side.min() < 166 and 194 < side.max() < 206
    assert np.ptp(whole[:, 0]) > 80 and np.ptp(whole[:, 1]) > 20  # it lies here and there


def test_the_random_square_depends_on_the_generator_alone_and_is_mirrored_half_of_the_time():
    ramp = Image.fromarray(np.linspace(0, 255, 300).round().astype(np.uint8)[None].repeat(200, 0)).convert("RGB")

    def cut(seed):
        return np.asarray(data.crop_square(ramp, 32, np.random.default_rng(seed)), float)[16, :, 0]

    cuts = [cut(i) for i in range(200)]
    assert np.array_equal(cut(7), cuts[7]) and not np.array_equal(cut(7), cuts[8])
    assert 72 <= sum(c[0] > c[-1] for c in cuts) <= 128  # 100, give or take four standard deviations


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_training_item_depends_on_seed_epoch_and_index_alone():
    def photos(seed=3):
        return Photos(list(range(5)), 24, seed, True, style_from="other")

    keys = [(e, i) for e in range(2) for i in range(5)]
    first, other = photos(), photos()
    items = {key: first[key] for key in keys}
    assert all(same(items[key], other[key]) for key in reversed(keys))
    assert not same(items[0, 2], items[1, 2]) and not same(items[0, 2], photos(seed=4)[0, 2])
    photo, style = items[0, 0]
    assert photo.shape == style.shape == (3, 24, 24) and photo.dtype == style.dtype == torch.uint8


def test_a_validation_item_is_the_center_square_in_every_epoch(tmp_path):
    data.draw_scene(0).save(tmp_path / "x.png")
    photos = Photos([tmp_path / "x.png"], 24, 0, False, style_from="other")
    photo, style = photos[0, 0]
    assert len(photos) == 1 and same(photos[0, 0], photos[9, 0]) and torch.equal(photo, style)
    assert torch.equal(photo, data.to_tensor(data.crop_square(data.draw_scene(0), 24)))


def test_a_jpeg_that_is_decoded_smaller_loses_no_sharpness(tmp_path):
    data.draw_scene(0, 100, 80).save(tmp_path / "x.jpg", quality=95)
    wanted = data.to_tensor(data.crop_square(open_picture(tmp_path / "x.jpg"), 24))
    difference = Photos([tmp_path / "x.jpg"], 24, 0, False)[0, 0][0].float() - wanted.float()
    assert difference.abs().mean() < 2  # of 255; decoded at 1/8 the mean is 8


def test_style_is_the_photo_or_another_picture(tmp_path):
    paths = some_photos(tmp_path, 6)

    def owners(style_from):  # of 40 items of picture 2: whose styles these are, how many are the photo itself
        items = [Photos(paths, 16, 0, True, style_from=style_from)[epoch, 2] for epoch in range(40)]
        photos, styles = ({colors(6).index(tuple(x[:, 8, 8].tolist())) for x in xs} for xs in zip(*items))
        assert photos == {2}
        return styles, sum(torch.equal(photo, style) for photo, style in items)

    assert owners("same") == ({2}, 40)
    assert owners("other")[0] == set(range(6))


def some_photos(folder, n=4):
    return [paint(folder / f"{i}.png", c) for i, c in enumerate(colors(n))]


@pytest.mark.parametrize("broken", ["vanished", "torn"])
def test_for_a_picture_that_is_gone_the_next_one_is_taken_and_told(tmp_path, capsys, broken):
    paths = some_photos(tmp_path)
    photos = Photos(paths, 8, 0, False)
    for path in (paths[1], paths[3]):
        path.unlink() if broken == "vanished" else path.write_bytes(path.read_bytes()[:40])
    items = [photos[0, i][0][:, 4, 4].tolist() for i in range(4)]
    assert items == [list(colors(4)[i]) for i in (0, 2, 2, 0)]  # after the last one comes the first one
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and str(paths[1]) in said[0] and str(paths[3]) in said[1] and "next" in said[0]
    assert [photos[5, i][0][:, 4, 4].tolist() for i in range(4)] == items  # and so in every epoch


def test_a_vanished_picture_changes_no_other_item(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        data.draw_scene(i, 24, 20).save(path)
    photos = Photos(paths, 16, 1, True)
    before = [photos[2, i] for i in range(4)]
    paths[1].unlink()
    after = [photos[2, i] for i in range(4)]
    assert [same(a, b) for a, b in zip(before, after)] == [True, False, True, True]
    assert same(after[1], photos[2, 1])


def test_a_style_that_has_vanished_is_replaced_too(tmp_path):
    paths = some_photos(tmp_path, 6)
    for path in paths[1:]:
        path.unlink()
    photos = Photos(paths, 8, 0, True, style_from="other")
    assert all(photos[epoch, 0][1][:, 4, 4].tolist() == list(colors(6)[0]) for epoch in range(8))


@pytest.mark.parametrize("n", [1, 10, 30])
def test_when_all_pictures_have_vanished_ten_are_tried_and_one_line_tells(tmp_path, capsys, n):
    photos = Photos([tmp_path / f"{i}.png" for i in range(n)], 8, 0, True)
    text = one_line(photos.__getitem__, (0, 0))
    assert "--data" in text and len(capsys.readouterr().err.splitlines()) == 10


@pytest.mark.parametrize("workers", [0, 1])
def test_a_program_whose_pictures_have_all_vanished_ends_with_one_line(tmp_path, workers):
    """torch puts the traceback of a loading process into the exception's text; it must not reach the reader."""
    photos = Photos([tmp_path / "gone.png"], 8, 0, True)
    loader = DataLoader(photos, batch_sampler=data.batch_order(1, 1, 0, 0), num_workers=workers)
    with pytest.raises(SystemExit) as end:
        data.run_program(lambda: next(iter(loader)))
    assert len(end.value.code.splitlines()) == 1 and "--data" in end.value.code


# ---- batches ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, batch", [(7, 3), (8, 4), (1, 4), (3, 10)])
def test_every_epoch_is_a_permutation_and_every_batch_is_full(n, batch):
    batches = list(islice(data.batch_order(n, batch, 5, 0), 4 * n))
    assert all(len(b) == batch for b in batches)
    keys = [key for b in batches for key in b]
    for epoch in range(len(keys) // n):
        part = keys[epoch * n:(epoch + 1) * n]
        assert {e for e, _ in part} == {epoch} and sorted(i for _, i in part) == list(range(n))


def test_a_series_taken_up_later_is_the_tail_of_the_whole_and_no_two_epochs_are_alike():
    whole = list(islice(data.batch_order(7, 3, 5, 0), 20))
    for start in (1, 2, 5, 13):
        assert list(islice(data.batch_order(7, 3, 5, start), 20 - start)) == whole[start:]
    orders = [tuple(i for _, i in b) for seed in (0, 1) for b in islice(data.batch_order(20, 20, seed, 0), 5)]
    assert len(set(orders)) == 10


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_share_the_batches_of_one(processes):
    whole = list(islice(data.batch_order(7, 3, 5, 4), 12))
    shares = [list(islice(data.batch_order(7, 3, 5, 4 + rank, every=processes), 12 // processes)) for rank in range(processes)]
    assert [share[i] for i in range(12 // processes) for share in shares] == whole


def test_the_number_of_workers_and_a_restart_change_nothing(tmp_path):
    for n in range(6):
        data.draw_scene(n, 24, 20).save(tmp_path / f"{n}.png")
    photos = Photos(data.list_pictures(tmp_path), 16, 1, True, style_from="other")

    def take(workers, start, n):
        return list(islice(DataLoader(photos, batch_sampler=data.batch_order(6, 4, 1, start), num_workers=workers), n))

    whole, resumed = take(0, 0, 5), take(2, 2, 3)
    assert whole[0][0].shape == (4, 3, 16, 16) and not same(whole[0], whole[1])
    assert all(same(a, b) for a, b in zip(whole[2:], resumed, strict=True))


def test_photos_can_be_pickled(tmp_path):
    photos = Photos(some_photos(tmp_path), 8, 3, True, style_from="other")
    assert same(pickle.loads(pickle.dumps(photos))[1, 2], photos[1, 2])


# ---- drawn scenes -----------------------------------------------------------------------------------------

def test_a_scene_is_given_by_its_number():
    scenes = [data.draw_scene(n) for n in (0, 1, 10_000)]
    assert all(s.size == (192, 160) and s.mode == "RGB" for s in scenes) and len({s.tobytes() for s in scenes}) == 3
    assert data.draw_scene(1).tobytes() == scenes[1].tobytes()


def test_the_gray_version_of_a_scene_does_not_give_the_palette_away():
    """Knowing L must explain hardly anything of a and b. Not nothing: bright reds and dark greens do not exist in sRGB.

    The measure is the correlation ratio, the variance between ten classes of L over the whole: it sees bent
    relations too. 400 scenes hold some 1,000 independent colors, so chance alone gives about 1 %.
    """
    rgb = np.concatenate([np.asarray(data.draw_scene(n, 48, 40))[::4, ::4].reshape(-1, 3) for n in range(400)])
    L, a, b = oracle.lab(rgb.T / 255)
    group = np.digitize(L, np.quantile(L, np.arange(.1, 1, .1)))

    def explained(x):
        return np.array([x[group == g].mean() for g in range(10)])[group].var() / x.var()

    assert explained(a) < .025 and explained(b) < .025
    assert explained(L) > .9  # the measure does see what is there
    assert np.hypot(a, b).mean() > data.MIN_CHROMA * 5
