"""infer.py as a user meets it: pictures in, pictures out, and one clear line when something is wrong."""
import io
import itertools
import math
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import infer
import oracle
from data import (UserError, crop_square, draw_scene, gray_of, open_picture,
                  resize_short_side, rgb_to_lab, run_program, to_picture, to_tensor)
from losses import palette_distances
from model import Colorizer, ModelConfig

TOP = Path(infer.__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def network(path, **config):
    """A checkpoint of a small random network that gives color: its head is not zero."""
    torch.manual_seed(1)
    model = Colorizer(ModelConfig(**{"width": 4, "latent": 8, "space": "lab", **config}))
    torch.nn.init.normal_(model.head.weight, std=.3)
    for layer in model.adain if model.config.use_style else []:
        torch.nn.init.normal_(layer.affine.weight, std=.3)  # so that styles differ visibly
    torch.save({"format": infer.FORMAT, "model": vars(model.config), "settings": {"size": 32},
                "weights": model.state_dict()}, path)
    return path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder with a network, two photos (one gray, one in color) and two styles; made once, as it takes a while."""
    folder = tmp_path_factory.mktemp("prepared")
    network(folder / "net.pt")
    for name in ("photos", "styles"):
        (folder / name).mkdir()
    draw_scene(1).resize((90, 61)).convert("L").save(folder / "photos/gray.png")
    draw_scene(2).resize((33, 50)).save(folder / "photos/color.JPG", quality=95)
    draw_scene(3).save(folder / "styles/a.png")
    draw_scene(4).save(folder / "styles/b.webp")
    return folder


@pytest.fixture
def place(prepared, tmp_path, monkeypatch):
    """A copy of that folder to work in."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments):
    return infer.main([*map(str, arguments), "--weights", "net.pt", "--device", "cpu"])


def outcome(*arguments, capsys, program=infer):
    """The program as if called on the command line, in this process -> (exit code, stdout and stderr)."""
    with pytest.raises(SystemExit) as end:
        run_program(lambda: program.main([*map(str, arguments)]))
    captured = capsys.readouterr()
    message = f"{end.value.code}\n" if isinstance(end.value.code, str) else ""  # Python prints it when it exits
    return 1 if message else end.value.code or 0, captured.out + captured.err + message


def pixels(path):
    return to_tensor(Image.open(path).convert("RGB"))[None] / 255


def L(path):
    return rgb_to_lab(pixels(path))[:, 0]


def small(path, size=32):
    """A picture file as the network sees it: (1, 3, h, w)."""
    return resize_short_side(open_picture(path), size)


# ---- the result -------------------------------------------------------------------------------------------

def test_result_has_the_photos_size_and_lightness_and_is_named_after_both(place, capsys):
    assert not call("photos/gray.png", "styles/a.png")
    assert capsys.readouterr().out.strip() == "gray_a.png"
    assert Image.open("gray_a.png").size == (90, 61)
    assert (L("gray_a.png") - L("photos/gray.png")).abs().max() < 1  # 8-bit rounding of three channels
    assert rgb_to_lab(pixels("gray_a.png"))[:, 1:].norm(dim=1).mean() > 3  # and it is in color
    assert Image.open("photos/gray.png").mode == "L"


def test_of_a_color_photo_only_the_lightness_is_used(place):
    call("photos/color.JPG", "styles/a.png")
    gray = gray_of(pixels("photos/color.JPG")).expand(-1, 3, -1, -1)
    to_picture(gray[0]).save("gray_version.png")
    call("gray_version.png", "styles/a.png")
    assert (pixels("color_a.png") - pixels("gray_version_a.png")).abs().max() < 5 / 255


@pytest.mark.parametrize("pixels_at_a_time", [5 * 96, 50, 7], ids=["rows", "parts of rows", "a few pixels"])
def test_tiles_do_not_show(pixels_at_a_time, monkeypatch):
    photo = draw_scene(1).crop((0, 0, 96, 20))
    lab = 40 * torch.randn(1, 3, 7, 25, generator=torch.Generator().manual_seed(0))
    whole = infer.join(photo, lab)
    monkeypatch.setattr(infer, "TILE_PIXELS", pixels_at_a_time)
    tiles = infer.join(photo, lab)
    assert np.abs(np.asarray(whole, int) - np.asarray(tiles, int)).max() <= 1


def test_guide_is_the_guided_filter():
    lab = np.random.default_rng(0).normal(size=(3, 14, 21)) * [[[20]], [[9]], [[9]]] + [[[50]], [[12]], [[-9]]]
    L, ab = torch.from_numpy(lab).float()[None].split([1, 2], dim=1)
    found = infer.guided_filter(ab, L)
    for one, expected in zip(found, oracle.guided(lab, infer.GUIDE_RADIUS, infer.GUIDE_EPS)):
        np.testing.assert_allclose(one[0], expected, atol=1e-3)


def test_joined_colors_are_the_filtered_ones_without_their_checkerboard():
    """At the network's own size nothing is enlarged: joining gives the filter's lines, read off at the photo's L."""
    gray = np.random.default_rng(1).integers(90, 160, (32, 24), np.uint8)
    L = oracle.lab(gray[None].repeat(3, axis=0) / 255)[:1]
    ab = np.random.default_rng(0).normal(size=(2, 32, 24)) * 3 + [[[12]], [[-9]]]
    checkerboard = 9 * (-1.) ** np.add.outer(np.arange(32), np.arange(24))
    slope, offset = oracle.guided(np.concatenate([L, ab]), infer.GUIDE_RADIUS, infer.GUIDE_EPS)
    lab = torch.from_numpy(np.concatenate([L, ab + checkerboard])).float()[None]
    joined = oracle.lab(np.asarray(infer.join(Image.fromarray(gray).convert("RGB"), lab)).transpose(2, 0, 1) / 255)
    inside = (slice(None), slice(8, -8), slice(8, -8))  # at the border the checkerboard's own border shows
    assert np.abs(joined[1:] - slope * L - offset)[inside].max() < 2.5


def test_enlarged_colors_end_where_the_photo_has_an_edge():
    """A small answer of two colors, enlarged eight times: the bicubic band of eight pixels is not there."""
    small = np.zeros((3, 16, 16))
    small[:, :, :8], small[:, :, 8:] = np.array([40, 25, 0])[:, None, None], np.array([70, -25, 0])[:, None, None]
    photo = np.repeat(np.where(np.arange(128) < 64, 94, 171).astype(np.uint8)[None], 128, 0)  # L 40 and 70
    result = infer.join(Image.fromarray(photo).convert("RGB"), torch.from_numpy(small).float()[None])
    a = oracle.lab(np.asarray(result).transpose(2, 0, 1) / 255)[1, 64]
    assert a[61:64].min() > 15 and a[64:67].max() < -15


def test_strength_zero_is_gray_and_half_is_half(place):
    for name, strength in [("zero", 0), ("half", .5), ("one", 1)]:
        call("photos/gray.png", "styles/a.png", "--strength", strength, "--output", f"{name}.png")
    zero, half, one = (rgb_to_lab(pixels(f"{n}.png"))[:, 1:] for n in ("zero", "half", "one"))
    assert zero.abs().max() < .1
    pale = one.norm(dim=1, keepdim=True) < 20  # far from the border of the gamut
    assert ((half - one / 2).abs() * pale).max() < 1.5


def test_raw_is_the_networks_own_picture(place):
    call("photos/gray.png", "styles/a.png", "--raw")
    assert Image.open("gray_a.png").size == (47, 32)  # short side 32, shape kept
    call("photos/gray.png", "styles/a.png", "--raw", "--size", 16)
    assert Image.open("gray_a.png").size == (24, 16)


def test_folders_give_all_pairs_and_more_styles_stand_behind_styles(place):
    call("photos", "styles", "--output", "results")
    assert sorted(os.listdir("results")) == ["color_a.png", "color_b.png", "gray_a.png", "gray_b.png"]
    call("photos", "styles/a.png", "--styles", "styles/b.webp", "--output", "again")
    for name in os.listdir("results"):
        assert Path("results", name).read_bytes() == Path("again", name).read_bytes()


def test_equal_names_from_two_folders_do_not_overwrite_each_other(place):
    os.mkdir("more")
    draw_scene(9).save("more/gray.png")
    call("photos/gray.png", "more/gray.png", "styles/a.png")
    assert Path("gray_a.png").exists() and Image.open("gray_a_2.png").size == (192, 160)


def test_results_in_the_folder_of_the_photos_replace_no_photo(place):
    before = Path("photos/gray.png").read_bytes()
    for names in (["gray_a"], ["gray_a_2", "gray_a_a"]):  # the second time gray_a.png is a photo itself
        call("photos", "styles/a.png", "--output", "photos")
        assert all(Path("photos", f"{name}.png").exists() for name in names)
    assert Path("photos/gray.png").read_bytes() == before


def test_a_pair_is_what_the_functions_give_one_after_the_other(place):
    """The command does what the drawing in the file's head says: encode, predict, refine, join."""
    call("photos/gray.png", "styles/a.png")
    model, size = infer.load_model("net.pt")
    photo, style = open_picture("photos/gray.png"), small("styles/a.png")
    z, lab = infer.encode(model, style), rgb_to_lab(style)
    assert z.shape == (1, 8) and size == 32
    first = infer.predict(model, gray_of(small("photos/gray.png")), z)
    refined = infer.refine(first, [(1., infer.palette_of(lab[:, 1:]))])
    assert np.array_equal(np.asarray(infer.join(photo, refined)), np.asarray(Image.open("gray_a.png")))
    call("photos/gray.png", "styles/a.png", "--refine", 0, "--output", "plain.png")
    assert np.array_equal(np.asarray(infer.join(photo, first)), np.asarray(Image.open("plain.png")))


def test_blend_mixes_codes_and_the_ways_to_the_palettes(place):
    call("photos/gray.png", "styles", "--blend", "1,0", "--output", "first.png")
    call("photos/gray.png", "styles/a.png", "--output", "a.png")
    assert torch.equal(pixels("first.png"), pixels("a.png"))
    call("photos/gray.png", "styles", "--blend", "2,6", "--output", "mixed.png")
    call("photos/gray.png", "styles", "--blend", "2,6", "--refine", 0, "--output", "plain.png")
    model, size = infer.load_model("net.pt")
    photo, gray = open_picture("photos/gray.png"), gray_of(small("photos/gray.png"))
    styles = [small(p) for p in ("styles/a.png", "styles/b.webp")]
    codes = [infer.encode(model, style) for style in styles]
    first = infer.predict(model, gray, codes[0] / 4 + 3 * codes[1] / 4)
    near = [infer.refine(first, [(1., infer.palette_of(rgb_to_lab(style)[:, 1:]))]) for style in styles]
    for name, lab in [("plain.png", first), ("mixed.png", near[0] / 4 + 3 * near[1] / 4)]:
        assert np.abs(np.asarray(infer.join(photo, lab), int) - np.asarray(Image.open(name), int)).max() <= 1


def test_grid_shows_photos_down_and_styles_across(place):
    call("photos", "styles", "--grid", "--output", "sheet.png")
    sheet = Image.open("sheet.png")
    assert sheet.size == (4 * 36 + 4, 3 * 36 + 4)  # gray, own colors, two styles; the styles' row, two photos
    cell = to_tensor(sheet.crop((4, 40, 36, 72)))
    assert (cell[0] == cell[1]).all() and (cell[0] == cell[2]).all() and cell.float().std() > 5
    model, _ = infer.load_model("net.pt")
    photo, own = (crop_square(open_picture(f"photos/{n}"), 32) for n in ("gray.png", "color.JPG"))
    # Sorted: color.JPG is the first row, gray.png the second.
    for photo, style, box in [(photo, small("styles/b.webp"), (112, 76, 144, 108)),
                              (own, to_tensor(own)[None] / 255, (40, 40, 72, 72))]:
        lab = infer.predict(model, gray_of(to_tensor(photo)[None] / 255), infer.encode(model, style))
        lab = infer.refine(lab, [(1., infer.palette_of(rgb_to_lab(style)[:, 1:]))])
        assert np.array_equal(np.asarray(sheet.crop(box)), np.asarray(infer.join(photo, lab)))


def test_a_grid_of_gray_photos_has_no_column_of_own_colors(place):
    call("photos/gray.png", "styles", "--grid", "--output", "sheet.png")
    assert Image.open("sheet.png").size == (3 * 36 + 4, 2 * 36 + 4)


# ---- refining ---------------------------------------------------------------------------------------------

def test_transport_is_the_blurred_plan_of_least_cost():
    """Against numpy: 2,000 rounds of Sinkhorn's scaling of exp(-cost), whose rows and columns then add up."""
    rng, blur = np.random.default_rng(0), 7.
    cloud, target = rng.normal([20, -10], [12, 25], (40, 2)), rng.normal([-15, 20], [20, 9], (40, 2))
    kernel = np.exp(-((cloud[:, None] - target) ** 2).sum(2) / (2 * blur ** 2))
    v = np.ones(40)
    for _ in range(2000):
        u = 1 / (kernel @ v)
        v = 1 / (kernel.T @ u)
    plan = u[:, None] * kernel * v
    assert np.allclose(plan.sum(0), 1) and np.allclose(plan.sum(1), 1, atol=1e-6)
    expected = plan @ target
    found = infer.transport(*(torch.from_numpy(x).float() for x in (cloud, target, cloud)), blur).numpy()
    assert np.abs(found - expected).max() < 2 and np.abs(found - expected).mean() < .3
    assert np.abs(cloud - expected).max() > 50


def scene_lab(seed):
    """L, a, b (1, 3, 48, 48) of a drawn scene, and the palette of its filtered colors, as refine gives it to move."""
    lab = rgb_to_lab(resize_short_side(draw_scene(seed), 48)[..., :48, :48])
    slope, offset = infer.guided_filter(lab[:, 1:], lab[:, :1])
    return lab, infer.palette_of(slope * lab[:, :1] + offset)


def test_averaging_takes_the_mean_color_of_the_places_that_are_alike():
    """Against numpy, place by place, for a picture of 24x20, which has 6x5 places of 4x4 pixels."""
    rng = np.random.default_rng(0)
    L = np.kron(rng.uniform(40, 60, (6, 5)), np.ones((4, 4))) + rng.normal(0, 3, (24, 20))
    ab = rng.normal(0, 30, (2, 24, 20))
    around = np.pad(L, 1, mode="edge")
    boxes = np.stack([around[y:y + 24, x:x + 20] for y in range(3) for x in range(3)])
    places = [np.s_[..., y:y + 4, x:x + 4] for y in range(0, 24, 4) for x in range(0, 20, 4)]
    colors = np.stack([ab[p].mean((1, 2)) for p in places])                     # (30, 2)
    light, rough = (np.array([x[p].mean() for p in places]) for x in (L, boxes.var(0)))
    y, x = np.divmod(np.arange(30), 5) * np.array([[4], [4]])
    of_place = np.stack([y, x, light, np.sqrt(rough), *colors.T], axis=1) / infer.ALIKE
    expected = np.zeros((30, 2))
    for i in range(30):
        weight = np.exp(-((of_place - of_place[i]) ** 2).sum(1) / 2)
        expected[i] = (weight[:, None] * colors).sum(0) / weight.sum() - colors[i]
    change = infer.average_alike(*(torch.from_numpy(x[None]).float() for x in (ab, L[None]))).numpy()[0] - ab
    # The change is enlarged by straight lines between the places' centers. The pixels beside a center have 7/8 of
    # its change and 1/8 of that of the next place; so their mean is not quite the place's change.
    found = np.stack([change[p][:, 1:3, 1:3].mean((1, 2)) for p in places]).reshape(6, 5, 2)
    expected = np.pad(expected.reshape(6, 5, 2), ((1, 1), (1, 1), (0, 0)), mode="edge")
    for axis in (0, 1):
        before, here, after = (np.take(expected, range(k, expected.shape[axis] - 2 + k), axis) for k in range(3))
        expected = (before + 14 * here + after) / 16
    assert np.abs(found - expected).max() < 1e-3 and np.abs(found).max() > 5


def test_averaging_joins_what_something_else_separates_and_not_the_rough_with_the_even():
    L, ab = torch.full((1, 1, 40, 60), 60.), torch.zeros(1, 2, 40, 60)
    L[..., 28:32] = 10.                                                         # a pole; right of it another color
    ab[:, :1, :, 32:] = 15.
    L[..., 24:, :] += 20 * (torch.arange(60) % 2 * 2 - 1)                       # below: as light, but striped
    ab[:, :1, 24:] = -10.
    found = infer.average_alike(ab, L)
    assert (found[0, 0, 8, 4] - found[0, 0, 8, 56]).abs() < 10                  # 15 before
    assert (found[:, :1, 32:, 4:24] + 10).abs().max() < .1 and (found[:, 1] == 0).all()


def test_smoothing_solves_the_linear_equations_of_its_sum():
    """Against numpy: the matrix of all equations, written out pixel by pixel, for a picture of 8x7."""
    rng = np.random.default_rng(0)
    L, ab = rng.choice([40., 42., 44.], (8, 7)), rng.normal(0, 30, (2, 56))
    L[:, 4:] += 20
    around = np.pad(L, 1, mode="edge")
    mean = sum(around[y:y + 8, x:x + 7] for y in range(3) for x in range(3)) / 9
    matrix = np.eye(56)
    for y, x in itertools.product(range(8), range(7)):
        for y2, x2 in [(y + 1, x), (y, x + 1)]:
            if y2 < 8 and x2 < 7:
                i, j = 7 * y + x, 7 * y2 + x2
                weight = infer.SPREAD * math.exp(-((mean[y, x] - mean[y2, x2]) / infer.EDGE) ** 2)
                matrix[[i, j], [i, j]] += weight
                matrix[[i, j], [j, i]] -= weight
    expected = np.linalg.solve(matrix, ab.T).T.reshape(2, 8, 7)
    ab = torch.from_numpy(ab.reshape(1, 2, 8, 7)).float()
    found = infer.make_smooth(torch.from_numpy(L[None, None]).float())(ab)[0]
    assert np.abs(found.numpy() - expected).max() < .1 and (found - ab).abs().max() > 30


def test_smoothing_makes_a_patchy_surface_one_color_and_stops_at_an_edge():
    L, ab = torch.zeros(1, 1, 40, 60), torch.zeros(1, 2, 40, 60)
    L[..., 30:], ab[..., 30:] = 50., 40.
    ab[..., 10:20, 10:20] = 20.                                                 # 100 of 1,200 pixels: mean 1.7
    found = infer.make_smooth(L)(ab)
    assert found[..., :30].max() < 4 and (found[..., 30:] - 40).abs().max() < 1
    for flat in (torch.zeros(1, 2, 9, 9), torch.full((1, 2, 1, 1), 7.), torch.full((1, 2, 1, 20), 7.)):
        assert torch.equal(infer.make_smooth(flat[:, :1])(flat), flat)


def test_moving_to_a_shifted_palette_shifts_every_color():
    lab, own = scene_lab(1)
    shift = torch.tensor([12., -7.])
    moved = infer.move(lab[:, 1:], own, [(1., own + shift)]) - lab[:, 1:]
    assert (moved[0].flatten(1).mT - shift).abs().mean() < .25
    assert (infer.move(lab[:, 1:], own, [(1., own)]) - lab[:, 1:]).abs().mean() < .1  # its own palette: everything stays


def painting(seed):
    """The palette of a drawn scene, half as strong: about as far apart as the colors of a strong painting."""
    _, colors = scene_lab(seed)
    return (colors + colors.mean(0)) / 2


def test_moving_blurs_the_more_the_farther_apart_the_colors_of_the_style_lie():
    """The strong style has 18 in a and 24 in b, together 30, and .7 of it counts; the muted one 3, and 6 is the least."""
    strong = torch.cat([torch.zeros(288, 2), torch.tensor([[36., 48.]]).expand(288, 2)])
    muted, own = strong / 10, scene_lab(1)[1]
    corners = torch.tensor([[-40., 20.], [32., 8.], [0., 0.], [12., -60.]])     # entries of the table
    ab = corners.T.reshape(1, 2, 2, 2)
    for target, blur in ((strong, 21 * math.sqrt(576 / 575)), (muted, 6.)):
        to, stay = (infer.transport(own, goal, torch.cat([corners, own]), blur) for goal in (target, own))
        moved = torch.cat([corners, own]) + to - stay
        boost = target.norm(dim=1).mean() / moved[4:].norm(dim=1).mean()
        expected = moved[:4] * boost.clamp(1, 1.5)
        found = infer.move(ab, own, [(.25, target), (.75, own)]) - ab
        assert (found[0].flatten(1).T - (expected - corners) / 4).abs().max() < .01 < (expected - corners).abs().max()


def test_moved_colors_get_the_chroma_of_the_style_and_at_most_half_as_much_again(monkeypatch):
    own, wanted = scene_lab(1)[1], painting(3)
    far = 50 * torch.tensor([[1., 0.], [-1., 0.]]).repeat(288, 1)  # two colors; their mean, gray, has no chroma
    for source, target, capped in ((own, wanted, False), (own / 20, far, True)):
        ab = source.T.reshape(1, 2, 24, 24)
        moved = infer.move(ab, source, [(1., target)])
        with monkeypatch.context() as plain:
            plain.setattr(infer, "BOOST", 1.)
            weak = infer.move(ab, source, [(1., target)])
        assert weak.norm(dim=1).mean() < .95 * target.norm(dim=1).mean()
        if capped:
            assert torch.allclose(moved, 1.5 * weak, atol=1e-4)
        else:
            assert abs(moved.norm(dim=1).mean() / target.norm(dim=1).mean() - 1) < .01


def test_moving_gives_equal_colors_equal_colors_and_reaches_the_palette():
    lab, _ = scene_lab(1)
    ab = lab[:, 1:].clone()
    ab[0, :, 10, 10], ab[0, :, 40, 5] = ab[0, :, 25, 30], ab[0, :, 25, 30]
    wanted = painting(3)
    moved = infer.move(ab, infer.palette_of(ab), [(1., wanted)])
    assert torch.equal(moved[0, :, 10, 10], moved[0, :, 25, 30])
    assert torch.equal(moved[0, :, 40, 5], moved[0, :, 25, 30])
    before, after = (oracle.wasserstein(infer.palette_of(x).T.numpy(), wanted.T.numpy(), 8) for x in (ab, moved))
    assert after < .5 * before


def test_refining_averages_smooths_moves_and_smooths_again():
    lab, wanted = scene_lab(1)[0], painting(3)
    whole, half = (infer.refine(lab, [(1., wanted)], amount) for amount in (1., .5))
    assert torch.equal(infer.refine(lab, [(1., wanted)], 0), lab)
    L, ab = lab.split([1, 2], dim=1)
    once = infer.make_smooth(L)(infer.average_alike(ab, L))
    slope, offset = infer.guided_filter(once, L)                                # join will filter them, too
    moved = infer.move(once, infer.palette_of(slope * L + offset), [(1., wanted)])
    change = infer.make_smooth(L)(moved) - ab
    assert torch.equal(whole, torch.cat([L, ab + change], dim=1))
    assert (half - (lab + whole) / 2).abs().max() < 1e-4
    before, between, after = (oracle.wasserstein(infer.palette_of(x[:, 1:]).T.numpy(), wanted.T.numpy(), 8)
                              for x in (lab, half, whole))
    assert after < .5 * before and after < between < before


def test_a_large_picture_is_refined_at_128_pixels_and_keeps_its_own_detail():
    lab = rgb_to_lab(to_tensor(draw_scene(1).resize((300, 200)))[None] / 255)   # (1, 3, 200, 300)
    _, wanted = scene_lab(3)
    change = infer.refine(lab, [(1., wanted)])[:, 1:] - lab[:, 1:]
    small = torch.nn.functional.adaptive_avg_pool2d(lab, (128, 192))
    expected = infer.refine(small, [(1., wanted)])[:, 1:] - small[:, 1:]
    y, x = (torch.arange(n) * 128 // 200 for n in (200, 300))                   # where each pixel lies in the small one
    assert expected.abs().mean() > 5
    assert (change - expected[:, :, y][..., x]).abs().mean() < .1 * expected.abs().mean()


def test_moving_toward_two_palettes_is_the_mean_of_both_ways():
    lab, own = scene_lab(1)
    ab = lab[:, 1:]
    (_, a), (_, b) = scene_lab(3), scene_lab(4)
    both = infer.move(ab, own, [(.25, a), (.75, b)])
    single = [infer.move(ab, own, [(1., x)]) for x in (a, b)]
    assert (both - (single[0] / 4 + 3 * single[1] / 4)).abs().max() < 1e-3


def test_a_code_is_the_style_encoders_answer_in_the_networks_own_colors():
    """encode takes RGB in [0, 1]; the network of LAB must see a, b / 110."""
    style = torch.rand(1, 3, 20, 28, generator=torch.Generator().manual_seed(0))
    for space, seen in [("rgb", style), ("lab", torch.from_numpy(oracle.lab(style[0].numpy())[None, 1:] / 110).float())]:
        model = Colorizer(ModelConfig(space=space, width=4, latent=8)).eval()
        assert (infer.encode(model, style) - model.encode_style(seen)).abs().max() < 1e-4


# ---- the command line -------------------------------------------------------------------------------------

def test_latents_explains_and_prints_the_codes_and_draws_a_histogram_each(place, capsys):
    call("styles", "--latents")
    out = capsys.readouterr().out
    model, _ = infer.load_model("net.pt")
    codes = torch.cat([infer.encode(model, small(p)) for p in ("styles/a.png", "styles/b.webp")]).numpy()
    assert "a code of 8 numbers" in out and "deviation" in out and "from style to style" in out
    assert f"spread over styles: {codes.std(0).mean():.4f}" in out
    row = next(line for line in out.splitlines() if line.startswith("a "))
    z = codes[0]
    assert row.split()[1:] == [f"{v:.3f}" for v in (z.min(), z.mean(), z.max(), z.std())]
    assert Image.open("latents.png").size == (420, 220)


@pytest.mark.parametrize("ending", sorted(infer.EXTENSIONS))
def test_every_ending_that_the_help_names_is_written_in_its_format(place, ending):
    call("photos/gray.png", "styles/a.png", "--refine", 0, "--output", f"x{ending}")
    expected = {"jpg": "JPEG", "jpe": "JPEG", "jfif": "JPEG", "tif": "TIFF"}.get(ending[1:], ending[1:].upper())
    with Image.open(f"x{ending}") as picture:
        assert picture.format == expected and picture.size == (90, 61)
        # In color; gif has 256 colors.
        assert rgb_to_lab(to_tensor(picture.convert("RGB"))[None] / 255)[:, 1:].norm(dim=1).mean() > 3
    assert not list(Path().glob(".part*"))


@pytest.mark.parametrize("ending", [".jpg", ".webp", ".avif"])
def test_colors_are_stored_at_the_full_size_of_the_picture(tmp_path, monkeypatch, ending):
    """Red and green columns, a pixel wide: at half the size they would all become brown."""
    monkeypatch.chdir(tmp_path)
    columns = np.zeros((32, 32, 3), np.uint8)
    columns[:, ::2, 0], columns[:, 1::2, 1] = 200, 120
    infer.Files(f"x{ending}", [], 1).save(Image.fromarray(columns), "")
    assert np.abs(np.asarray(Image.open(f"x{ending}").convert("RGB")).astype(int) - columns).mean() < 12


def test_an_output_with_an_ending_in_capitals_is_a_file(place):
    call("photos/gray.png", "styles/a.png", "--refine", 0, "--output", "X.JPG")
    assert Image.open("X.JPG").format == "JPEG"


def test_a_bad_photo_among_good_ones_is_named_and_the_rest_is_done(place, capsys):
    Path("photos/bad.png").write_bytes(b"")
    assert call("photos", "styles/a.png", "--output", "out/") == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "bad.png" in captured.err and "empty" in captured.err
    assert sorted(os.listdir("out")) == ["color_a.png", "gray_a.png"]


def test_a_gray_style_is_told_only_where_it_is_the_one_style(place, capsys):
    call("photos/gray.png", "photos/gray.png", "--refine", 0)
    err = capsys.readouterr().err
    assert "gray.png is gray" in err and err.count("\n") == 1
    call("photos/color.JPG", "photos", "--refine", 0)
    call("styles", "--styles", "photos/gray.png", "--latents")
    assert "is gray" not in capsys.readouterr().err


def test_several_photos_before_the_style_are_told_and_where_more_styles_go(place, capsys):
    call("photos/gray.png", "styles/a.png", "styles/b.webp", "--refine", 0)
    err = capsys.readouterr().err
    assert "2 photos" in err and "styles/b.webp" in err and "--styles" in err and err.count("\n") == 1
    assert Path("gray_b.png").exists() and Path("a_b.png").exists()
    call("photos", "styles/a.png", "--refine", 0)  # a folder is meant as it is
    call("photos/gray.png", "styles/a.png", "styles/b.webp", "--styles", "styles/a.png", "--refine", 0)  # --styles is known
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match="2 weights for 1 styles.*--styles"):
        call("photos/gray.png", "styles/a.png", "styles/b.webp", "--blend", "2,1")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_a_folder_shows_how_far_it_is(place, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    call("photos", "styles", "--refine", 0, "--output", "out")
    shown = [part.strip() for part in sys.stderr.getvalue().split("\r") if part]
    assert [s.split(",")[0] for s in shown] == ["1 of 4", "2 of 4", "3 of 4"] and "s left" in shown[0]


def test_on_a_terminal_the_names_of_the_files_are_whole(place, monkeypatch, capsys):
    """Both streams go to one screen, on which \\r goes back to the start of the line and writes over it."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    call("photos", "styles", "--refine", 0, "--output", "o")
    lines = []
    for line in screen.getvalue().split("\n")[:-1]:
        on_screen = ""
        for part in line.split("\r"):
            on_screen = part + on_screen[len(part):]
        lines.append(on_screen.rstrip())
    assert sorted(lines) == sorted(str(path) for path in Path("o").iterdir()) and len(lines) == 4


def test_pictures_of_formats_that_cannot_be_read_are_counted_and_told_what_to_do(place, capsys):
    for name in ("a.HEIC", "b.heic", "c.pdf"):
        Path("photos", name).write_bytes(b"\0\0\0\x18ftypheic")
    assert call("photos", "styles/a.png", "--refine", 0) == 0
    err = capsys.readouterr().err
    assert "2 .heic" in err and "1 .pdf" in err and "JPEG" in err and err.count("\n") == 1
    assert call("photos/a.HEIC", "styles/a.png") == 1
    assert "convert it to JPEG" in capsys.readouterr().err


def test_weights_paper_is_the_shipped_network_of_the_paper(place, monkeypatch):
    os.mkdir("shipped")
    network("shipped/paper.pt", space="rgb")
    assert infer.PAPER == TOP / "weights" / "paper.pt"
    monkeypatch.setattr(infer, "PAPER", Path("shipped/paper.pt"))
    for name, weights in [("word.png", "paper"), ("file.png", "shipped/paper.pt")]:
        infer.main(["photos/gray.png", "styles/a.png", "--device", "cpu", "--weights", weights, "--output", name])
    call("photos/gray.png", "styles/a.png", "--output", "other.png")
    assert torch.equal(pixels("word.png"), pixels("file.png")) and not torch.equal(pixels("word.png"), pixels("other.png"))


@pytest.mark.parametrize("arguments, words", [
    ("photos/none.png styles/a.png", "no such file"),
    ("photos/gray.png none", "no such file"),
    ("empty styles/a.png", "empty: not a file"),
    ("net.pt styles/a.png", "not a picture"),
    ("photos/gray.png styles/a.png --output x.xyz", "unknown picture format"),
    ("photos styles/a.png --output x.png", "do not fit into one file"),
    ("photos/gray.png styles --blend 1,2,3", "3 weights for 2 styles"),
    ("photos/gray.png styles/a.png --output net.pt/", "cannot be written"),
    ("photos/gray.png styles/a.png --weights nothing.pt", "no such checkpoint"),
    ("photos/gray.png styles/a.png --weights photos/gray.png", "not a checkpoint"),
    ("photos/gray.png styles/a.png --weights torn.pt", "not a checkpoint"),
    ("photos/gray.png styles/a.png --weights packed.pt", "not a checkpoint"),
    ("photos/gray.png styles/a.png --weights new.pt", "update the program"),
    ("photos/gray.png styles/a.png --weights huge.pt", "width must be from 1 to 256"),
    ("photos/gray.png styles/a.png --weights shapes.pt", "weight encoder.0.0.weight is of another shape"),
    ("photos/gray.png styles/a.png --weights plain.pt", "without style encoder"),
])
def test_failures_are_one_line_with_exit_code_1_and_leave_nothing_behind(place, arguments, words, capsys):
    os.mkdir("empty")

    def pack(path):
        with zipfile.ZipFile("net.pt") as loose, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for name in loose.namelist():
                packed.writestr(name, loose.read(name))

    def change(path, form=infer.FORMAT, **model):
        good = torch.load("net.pt", weights_only=True)
        torch.save({**good, "format": form, "model": {**good["model"], **model}}, path)
    bad = {"torn.pt": lambda path: Path(path).write_bytes(Path("net.pt").read_bytes()[:5000]), "packed.pt": pack,
           "new.pt": lambda path: change(path, infer.FORMAT + 1), "huge.pt": lambda path: change(path, width=10 ** 6),
           "shapes.pt": lambda path: change(path, width=5), "plain.pt": lambda path: network(path, use_style=False)}
    for name in bad.keys() & set(arguments.split()):
        bad[name](name)
    before = sorted(Path().rglob("*"))
    code, err = outcome("--weights", "net.pt", *arguments.split(), capsys=capsys)
    assert code == 1 and err.count("\n") == 1 and words in err and "free some space" not in err
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("arguments, words", [
    ("", "PHOTO"), ("photos/gray.png", "a style picture is missing"),
    ("photos/gray.png styles/a.png --blend x", "--blend: invalid numbers value"),
    ("photos/gray.png styles/a.png --blend 1,-1", "--blend takes numbers"),
    ("photos/gray.png styles/a.png --blend 1,nan", "--blend takes numbers"),
    ("photos/gray.png styles/a.png --styles styles/a.png --blend 1000,-999", "--blend takes numbers"),
    ("styles --latents --raw", "--latents"), ("styles --latents --blend 1,1", "--latents"),
    ("photos/gray.png styles/a.png --size 2", "--size must be"),
    ("photos/gray.png styles/a.png --strength -1", "--strength must be"),
    ("photos/gray.png styles/a.png --strength nan", "--strength must be"),
    ("photos/gray.png styles/a.png --refine -1", "--refine must be"),
    ("photos/gray.png styles/a.png --grid --raw", "--grid"),
    ("styles --latents --grid", "--grid"),
    ("photos/gray.png styles/a.png --ouput x.png", "did you mean --output?"),
    ("photos/gray.png styles/a.png --wieghts=x.pt", "did you mean --weights?"),
    ("photos/gray.png styles/a.png --qqqq", "--qqqq"),
    ("photos/gray.png styles/a.png --size many", "--size"),
    ("photos/gray.png styles/a.png --devise\x1b[31m x", "--devise")])
def test_usage_errors_are_one_line_with_exit_code_2(arguments, words, capsys):
    code, text = outcome(*arguments.split(), capsys=capsys)
    assert code == 2 and text.count("\n") == 1 and words in text and "usage:" not in text and "\x1b" not in text


@pytest.mark.parametrize("low, high, expected", [
    (0, 9, [0, 2, 4, 6, 8]), (0, 2500, [0, 500, 1000, 1500, 2000, 2500]), (0, 100_000, [0, 20_000, 40_000, 60_000, 80_000, 100_000]),
    (.389, .7013, [.4, .5, .6, .7]), (.0493, .0907, [.05, .06, .07, .08, .09]), (0, 3, [0, 1, 2, 3]), (-1.5, 1.5, [-1, 0, 1])])
def test_an_axis_has_round_numbers(low, high, expected):
    np.testing.assert_allclose(infer.round_numbers(low, high), expected, atol=1e-12)


@pytest.mark.parametrize("values, middle", [((1, 3), 2), ((1e-5, 1e5), 1), ((.1, 9.9), 5), ((.01, 100), 1)])
def test_a_curve_is_straight_on_its_axis(values, middle):
    """Three points that are on one line when the axis is linear, or logarithmic for a factor of over 100."""
    rows = [{"pictures": x, "a": y} for x, y in ((10, values[0]), (20, middle), (30, values[1]))]
    rows += [{"pictures": 25, "a": 0}, {"pictures": 25, "a": ""}, {"pictures": 25, "b": "nan"}]     # left out
    page = np.asarray(infer.draw_curves(rows, {"a": "red", "b": "blue", "c": "lime"}, "pictures")).astype(int)
    assert page.shape == (400, 640, 3) and not (page == (0, 0, 255)).all(2).any()
    for strip in (page[20:370, :58], page[370:382], page[382:]):                         # numbers on both axes, a name
        assert (strip.max(2) < 160).any()
    y, x = np.nonzero((page == (255, 0, 0)).all(2)[20:370])
    centers = [np.array([x[near], y[near]]).mean(1) for near in (abs(x - 60 - 560 * k / 3) < 4 for k in (1, 2, 3))]
    np.testing.assert_allclose(centers[1], (centers[0] + centers[2]) / 2, atol=1)
    assert centers[0][1] - centers[2][1] > 300                                           # over the height of the page


# ---- checkpoints ------------------------------------------------------------------------------------------

class Trap:
    """A pickle that would write a file when it is loaded carelessly."""
    def __reduce__(self):
        return Path.touch, (Path("trapped"),)


def test_code_in_a_checkpoint_is_not_run(place):
    torch.save({"format": infer.FORMAT, "model": Trap()}, "evil.pt")
    with pytest.raises(UserError, match="not a checkpoint"):
        infer.load_checkpoint("evil.pt")
    assert not Path("trapped").exists()


def test_a_checkpoint_of_format_1_gives_the_same_pictures(place):
    """Format 1 had other names for two settings, and two that are gone, which were always off."""
    new = torch.load("net.pt", weights_only=True)
    config = {{"space": "color", "use_style": "style"}.get(k, k): v for k, v in new["model"].items() if k != "padding"}
    torch.save({**new, "format": 1, "model": {**config, "relu": False, "resize": False}}, "old.pt")
    old = infer.load_checkpoint("old.pt")
    assert old["model"] == new["model"] and infer.load_model("old.pt")[0].config == infer.load_model("net.pt")[0].config
    for name in ("net.pt", "old.pt"):
        infer.main(["photos/gray.png", "styles/a.png", "--device", "cpu", "--weights", name, "--output", f"{name}.png"])
    assert torch.equal(pixels("net.pt.png"), pixels("old.pt.png"))
    torch.save({**new, "format": 1, "model": {**config, "relu": True}}, "variant.pt")
    with pytest.raises(UserError, match="no setting 'relu'"):
        infer.load_checkpoint("variant.pt")


def test_a_checkpoint_without_the_newest_settings_gets_their_defaults(place):
    checkpoint = torch.load("net.pt", weights_only=True)
    del checkpoint["model"]["padding"], checkpoint["model"]["sigmoid"]
    torch.save(checkpoint, "old.pt")
    assert infer.load_model("old.pt")[0].config == infer.load_model("net.pt")[0].config


def test_a_setting_or_a_weight_that_is_unknown_or_missing_is_named(place):
    good = torch.load("net.pt", weights_only=True)

    def refusal(**parts):
        torch.save({**good, **parts}, "bad.pt")
        with pytest.raises(UserError) as caught:
            infer.load_checkpoint("bad.pt")
        return str(caught.value)
    assert "'magic'" in refusal(model={**good["model"], "magic": 1})
    assert "unknown weight 'extra'" in refusal(weights={**good["weights"], "extra": torch.ones(1)})
    less = dict(good["weights"])
    del less["head.bias"]
    assert "missing weight 'head.bias'" in refusal(weights=less)


def test_half_precision_weights_are_read_as_float32(place):
    good = torch.load("net.pt", weights_only=True)
    half = {k: v.half() if v.is_floating_point() else v for k, v in good["weights"].items()}
    torch.save({**good, "weights": half}, "half.pt")
    model, size = infer.load_model("half.pt")
    assert size == 32 and {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, half[k].to(v.dtype)) for k, v in model.state_dict().items())


# ---- the checkpoint that ships ----------------------------------------------------------------------------

def test_the_first_command_of_the_readme_colors_the_example(tmp_path):
    """In a folder of its own, without a network: the product works, and the result has the style's palette."""
    process = subprocess.run([sys.executable, TOP / "infer.py", TOP / "examples/gray.jpg", TOP / "examples/style.jpg"],
                             cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert (process.returncode, process.stdout.strip(), process.stderr) == (0, "gray_style.png", "")
    result, style = Image.open(tmp_path / "gray_style.png"), Image.open(TOP / "examples/style.jpg")
    assert result.size == Image.open(TOP / "examples/gray.jpg").size
    a, b = (to_tensor(p.resize((128, 128)))[None] / 255 for p in (result, style))
    distance, left_gray = palette_distances(a, b)
    assert 1 - distance / left_gray > .5


def test_the_shipped_network_gives_the_same_picture_twice(tmp_path):
    for name in ("a.png", "b.png"):
        infer.main([str(TOP / "examples/gray.jpg"), str(TOP / "examples/style.jpg"), "--output", str(tmp_path / name)])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_padding_hardly_moves_the_shipped_networks_colors():
    """A photo of 113x121, which is padded to 128x128, against the same part of the whole photo of 128x128."""
    model, size = infer.load_model(infer.OURS)
    photo = to_tensor(crop_square(open_picture(TOP / "examples/chelsea.jpg"), 128))[None] / 255
    z = infer.encode(model, small(TOP / "examples/harvest.jpg", size))
    whole, part = (infer.predict(model, gray_of(p), z)[:, 1:, :121, :113] for p in (photo, photo[:, :, :121, :113]))
    assert whole.norm(dim=1).mean() > 10 and (whole - part).norm(dim=1).mean() < 6


def test_the_shipped_network_answers_a_gray_style_with_a_gray_picture():
    model, size = infer.load_model(infer.OURS)
    style = small(TOP / "examples/gray.jpg", size)
    lab = infer.predict(model, gray_of(style), infer.encode(model, style))
    for ab in (lab[:, 1:], infer.refine(lab, [(1., infer.palette_of(rgb_to_lab(style)[:, 1:]))])[:, 1:]):
        assert ab.norm(dim=1).mean() < 3


def test_refining_stays_near_the_palette_and_makes_the_sky_smoother(monkeypatch):
    """Two photos with four styles, by the pictures that are shown and all of their pixels; and a sky.

    A sky of one color cannot have the style's palette, so only the cat and the cup are asked for it.
    """
    model, size = infer.load_model(infer.OURS)
    transfers, deviations = [], []
    for name, other in itertools.product(["chelsea", "coffee", "rocket"], ["style", "garden", "harvest", "checks"]):
        photo = crop_square(open_picture(TOP / f"examples/{name}.jpg"), 128)
        style = to_tensor(crop_square(open_picture(TOP / f"examples/{other}.jpg"), 128))[None] / 255
        gray = gray_of(to_tensor(photo)[None] / 255)
        [(_, z, palettes)] = infer.make_looks([(other, style, infer.encode(model, style))])
        labs = [infer.color(model, gray, z, palettes, amount) for amount in (0., infer.REFINE)]
        if name != "rocket":
            with monkeypatch.context() as still:  # refined, but nothing is moved
                still.setattr(infer, "move", lambda ab, source, palettes: ab)
                labs.append(infer.color(model, gray, z, palettes, infer.REFINE))
        shown = torch.cat([to_tensor(infer.join(photo, lab))[None] / 255 for lab in labs])
        if name == "rocket":  # its sky, left of the tower
            deviations.append(rgb_to_lab(shown)[:, 1:, 5:75, 5:50].flatten(2).std(2).norm(dim=1))
        else:
            W, W_gray = palette_distances(shown, style.expand(3, -1, -1, -1))
            transfers.append(1 - W / W_gray)
    # One color for one thing costs the cat and the cup some of the palette; moving wins it back.
    before, after, unmoved = torch.stack(transfers).T
    assert (after > unmoved).all() and after.mean() > unmoved.mean() + .1
    assert after.mean() > before.mean() > .7 and after.min() > .65 and (before - after).max() < .12
    before, after = torch.stack(deviations).T
    assert (after < .15 * before).all() and (after < 3).all()  # 2.3 can just be seen
