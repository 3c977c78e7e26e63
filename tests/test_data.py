"""Colour against float64 formulas, files of every kind, splits, crops, the order of batches, the download."""
import hashlib
import io
import math
import os
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

import data
from data import Batches, Photos, UserError, open_picture

NOT_ON_WINDOWS = pytest.mark.skipif(os.name == "nt", reason="Windows has no such file names")


def one_line(call, *args, **kwargs):
    """The text of the UserError that the call must raise, which must be one line."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def paint(path, colour=(200, 60, 30), size=(16, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def link(path, target):
    try:
        path.symlink_to(target, target_is_directory=True)
    except OSError:
        pytest.skip("this system does not let us make links")


# ---- colour: the oracle is the textbook formula in float64, (N, 3) arrays ----------------------------------

M = np.array([[.412453, .357580, .180423], [.212671, .715160, .072169], [.019334, .119193, .950227]])
D65 = np.array([.95047, 1, 1.08883])


def oracle_lab(rgb):
    rgb = np.asarray(rgb, np.float64)
    t = np.where(rgb > .04045, ((rgb + .055) / 1.055) ** 2.4, rgb / 12.92) @ M.T / D65
    x, y, z = np.where(t > .008856, np.cbrt(t), 7.787 * t + 16 / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def oracle_rgb(lab):
    y = (lab[:, 0] + 16) / 116
    f = np.stack([y + lab[:, 1] / 500, y, y - lab[:, 2] / 200], axis=1)
    xyz = np.where(f > .2068966, f ** 3, (f - 16 / 116) / 7.787) * D65
    linear = np.linalg.solve(M, xyz.T).T
    return np.where(linear > .0031308, 1.055 * np.abs(linear) ** (1 / 2.4) - .055, 12.92 * linear)


def pixels(x):
    """(N, 3) numpy -> (1, 3, N, 1) float32."""
    return torch.tensor(np.asarray(x), dtype=torch.float32).T[None, :, :, None]


def table(x):
    """(1, C, N, 1) tensor -> (N, C) float64 numpy."""
    return x[0, :, :, 0].T.double().numpy()


def cube(*axes):
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)


# All of the gamut with its corners, and the dark corner again, where the curves change to straight lines.
GAMUT = np.concatenate([cube(*[np.linspace(0, 1, 18)] * 3), cube(*[np.linspace(0, .1, 11)] * 3)])
IMPOSSIBLE = cube([.5, 20, 50, 80, 99.5], [-150, -60, 0, 90, 150], [-150, -70, 10, 150])


def test_primaries_white_and_black_have_their_published_lab_values():
    rgb = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0]]
    lab = [[53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86], [100, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(table(data.rgb_to_lab(pixels(rgb))), lab, atol=.05)
    np.testing.assert_allclose(oracle_lab(rgb), lab, atol=.05)  # the oracle must pass its own test


def test_rgb_to_lab_follows_the_formula_over_the_whole_gamut():
    np.testing.assert_allclose(table(data.rgb_to_lab(pixels(GAMUT))), oracle_lab(GAMUT), atol=1e-3)


def test_lab_to_rgb_follows_the_formula_and_clips_nothing():
    np.testing.assert_allclose(table(data.lab_to_rgb(pixels(oracle_lab(GAMUT)))), GAMUT, atol=1e-3)
    wanted = oracle_rgb(IMPOSSIBLE)
    assert wanted.min() < -1 and wanted.max() > 1.5
    np.testing.assert_allclose(table(data.lab_to_rgb(pixels(IMPOSSIBLE))), wanted, atol=1e-3)
    np.testing.assert_allclose(table(data.lab_to_rgb(data.rgb_to_lab(pixels(GAMUT)))), GAMUT, atol=1e-3)


def test_gradient_of_rgb_to_lab_is_the_slope_of_the_formula():
    points, weights = np.random.default_rng(0).uniform(.05, .95, (50, 3)), np.array([1, .3, -.7])
    slope = [(oracle_lab(points + e) - oracle_lab(points - e)) @ weights / 2e-5 for e in 1e-5 * np.eye(3)]
    x = pixels(points).requires_grad_()
    (data.rgb_to_lab(x) * pixels(weights[None])).sum().backward()
    np.testing.assert_allclose(table(x.grad), np.stack(slope, axis=1), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("convert, values", [
    (data.rgb_to_lab, [[0, 0, 0], [1, 1, 1], [-.2, 1.3, -.2], [1.3, -.2, .5], [0, 0, 1], [.04045] * 3]),
    (data.lab_to_rgb, [[0, 0, 0], [100, 0, 0], [50, 150, -150], [-5, 0, 0], [110, 0, 0], [0, 150, 150]]),
    (data.lab_to_gamut, [[0, 0, 0], [100, 0, 0], [50, 150, -150], [-5, 9, 9], [110, 9, 9], [50, 0, 0]])])
def test_gradients_are_finite_everywhere(convert, values):
    x = pixels(values).requires_grad_()
    y = convert(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


def test_lab_to_gamut_keeps_the_lightness_of_impossible_colours():
    rgb = table(data.lab_to_gamut(pixels(IMPOSSIBLE)))
    assert rgb.min() >= 0 and rgb.max() <= 1
    np.testing.assert_allclose(oracle_lab(rgb)[:, 0], IMPOSSIBLE[:, 0], atol=.01)
    beyond = table(data.lab_to_gamut(pixels([[-20, 30, 0], [130, 30, 0]])))  # no screen is darker or brighter
    np.testing.assert_allclose(beyond, [[0] * 3, [1] * 3], atol=1e-4)


def test_lab_to_gamut_leaves_possible_colours_alone():
    np.testing.assert_allclose(table(data.lab_to_gamut(pixels(oracle_lab(GAMUT)))), GAMUT, atol=1e-4)


def test_gray_of_has_the_lightness_of_the_colour_and_leaves_grays_alone():
    v = table(data.gray_of(pixels(GAMUT)))                                            # (N, 1)
    np.testing.assert_allclose(oracle_lab(v.repeat(3, axis=1))[:, 0], oracle_lab(GAMUT)[:, 0], atol=1e-2)
    red = data.gray_of(pixels([[1, 0, 0]]))
    assert oracle_lab(np.full((1, 3), red.item()))[0, 0] == pytest.approx(53.24, abs=.01)
    assert data.lightness(red).item() == pytest.approx(53.24, abs=.01)
    gray = np.linspace(0, 1, 256)[:, None]
    np.testing.assert_allclose(table(data.gray_of(pixels(gray.repeat(3, axis=1)))), gray, atol=1e-5)


@pytest.mark.parametrize("color, channels", [("rgb", 3), ("lab", 2)])
def test_what_the_network_sees_can_be_had_back_as_rgb(color, channels):
    x = pixels(GAMUT)
    seen = data.rgb_to_network(x, color)
    assert seen.shape[1] == channels and -1 < seen.min() and seen.max() <= 1
    np.testing.assert_allclose(table(data.network_to_rgb(seen, data.gray_of(x), color)), GAMUT, atol=1e-3)


@pytest.mark.parametrize("angle", [-2.5, .5, 1.7, math.pi])
def test_rotate_hue_turns_the_colour_and_keeps_the_gray(angle):
    x = pixels(GAMUT)
    turned = data.rotate_hue(x, torch.tensor([angle]))
    np.testing.assert_allclose(oracle_lab(table(turned))[:, 0], oracle_lab(GAMUT)[:, 0], atol=.02)
    np.testing.assert_allclose(table(data.gray_of(turned)), table(data.gray_of(x)), atol=1e-3)
    soft = oracle_rgb(cube([40, 60, 75], [-8, 9], [-7, 10]))  # so little chroma that no angle leaves the gamut
    result = table(data.rotate_hue(pixels(soft), torch.tensor([angle])))
    before, after = (oracle_lab(c)[:, 1:] @ [1, 1j] for c in (soft, result))
    np.testing.assert_allclose(after / before, np.exp(1j * angle), atol=1e-3)


def test_rotate_hue_takes_one_angle_per_picture_and_zero_changes_nothing():
    x = pixels([[.8, .5, .5]]).repeat(2, 1, 1, 1)
    still, turned = data.rotate_hue(x, torch.tensor([0, math.pi]))
    np.testing.assert_allclose(still, x[0], atol=1e-4)
    assert turned[0] < turned[2]  # red has become a blue green
    np.testing.assert_allclose(table(data.rotate_hue(pixels(GAMUT), torch.zeros(1))), GAMUT, atol=1e-4)


# ---- files: pictures of two halves whose values are known ---------------------------------------------------

def halves(left, right, dtype=np.uint8):
    return np.repeat(np.array([[left, right]], dtype), 16, axis=1).repeat(16, axis=0)  # (16, 32, ...)


def over_white(colour, alpha):
    return [255 + (c - 255) * alpha / 255 for c in colour]


def indexed(transparency=None):
    picture = Image.fromarray(halves(0, 1))
    picture.putpalette([*RED, *BLUE])
    if transparency is not None:
        picture.info["transparency"] = transparency
    return picture


RED, BLUE, WHITE = (200, 60, 30), (20, 90, 180), (255, 255, 255)
TWO, GRAY = Image.fromarray(halves(RED, BLUE)), Image.fromarray(halves(40, 210))
ALPHA = Image.fromarray(halves((*RED, 255), (*BLUE, 100)))
INK = Image.merge("CMYK", [Image.fromarray(halves(*v)) for v in [(10, 200), (200, 90), (120, 20), (40, 70)]])
INK_RGB = [[(255 - c) * (255 - k) / 255 for c in cmy] for *cmy, k in [(10, 200, 120, 40), (200, 90, 20, 70)]]
FINE = dict(quality=100, subsampling=0)  # coarser colour would blur the border between the halves
FILES = [  # name, picture, how to save it, colour of the left half, of the right half, tolerance
    ("rgb.JPG", TWO, FINE, RED, BLUE, 4), ("rgb.png", TWO, {}, RED, BLUE, 0),
    ("rgb.WebP", TWO, dict(lossless=True), RED, BLUE, 0), ("rgb.bmp", TWO, {}, RED, BLUE, 0),
    ("rgb.tiff", TWO, {}, RED, BLUE, 0), ("lzw.tif", TWO, dict(compression="tiff_lzw"), RED, BLUE, 0),
    ("animated.gif", indexed(), dict(save_all=True, append_images=[TWO.rotate(180)]), RED, BLUE, 0),
    ("bits.png", GRAY.point(lambda v: v > 128, "1"), {}, [0] * 3, WHITE, 0),
    ("bits.tif", GRAY.point(lambda v: v > 128, "1"), {}, [0] * 3, WHITE, 0),
    ("gray.png", GRAY, {}, [40] * 3, [210] * 3, 0), ("gray.jpg", GRAY, FINE, [40] * 3, [210] * 3, 3),
    ("la.png", Image.fromarray(halves((40, 255), (210, 51)), "LA"), {}, [40] * 3, over_white([210] * 3, 51), 1),
    ("p.png", indexed(), {}, RED, BLUE, 0), ("p_key.png", indexed(0), {}, WHITE, BLUE, 0),
    ("p_key.gif", indexed(1), {}, RED, WHITE, 0),
    ("p_alpha.png", indexed(b"\x80\xff"), {}, over_white(RED, 128), BLUE, 1),
    ("rgb_key.png", TWO, dict(transparency=BLUE), RED, WHITE, 0),
    ("rgba.png", ALPHA, {}, RED, over_white(BLUE, 100), 1), ("rgba.tif", ALPHA, {}, RED, over_white(BLUE, 100), 1),
    ("rgba.webp", ALPHA, dict(lossless=True, exact=True), RED, over_white(BLUE, 100), 1),
    ("cmyk.jpg", INK, FINE, *INK_RGB, 4), ("cmyk.tif", INK, {}, *INK_RGB, 1),
    ("i16.png", Image.fromarray(halves(10_000, 50_000, np.uint16)), {}, [39] * 3, [195] * 3, 0),  # value / 257
    ("i16.tif", Image.fromarray(halves(10_000, 50_000, np.uint16)), {}, [39] * 3, [195] * 3, 0),
    ("i16_dark.png", Image.fromarray(halves(0, 255, np.uint16)), {}, [0] * 3, [1] * 3, 0),  # all but black, not white
    ("i32_of_16.tif", Image.fromarray(halves(10_000, 50_000, np.int32)), {}, [39] * 3, [195] * 3, 0),
    ("i32_of_8.tif", Image.fromarray(halves(40, 210, np.int32)), {}, [40] * 3, [210] * 3, 0),
    ("f_to_1.tif", Image.fromarray(halves(.2, .8, np.float32)), {}, [51] * 3, [204] * 3, 0),
    ("f_to_255.tif", Image.fromarray(halves(40, 210, np.float32)), {}, [40] * 3, [210] * 3, 0),
    ("f_nan.tif", Image.fromarray(halves(np.nan, .8, np.float32)), {}, [0] * 3, [204] * 3, 0)]


@pytest.mark.filterwarnings("ignore:'mode' parameter:DeprecationWarning")
@pytest.mark.parametrize("name, picture, how, left, right, tolerance", FILES, ids=[f[0] for f in FILES])
def test_every_kind_of_file_comes_out_as_its_colours(tmp_path, name, picture, how, left, right, tolerance):
    picture.save(tmp_path / name, **how)
    result = open_picture(tmp_path / name)
    assert result.mode == "RGB"
    np.testing.assert_allclose(np.asarray(result, float), halves(left, right, float), atol=tolerance)


UPRIGHT = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1),
           6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90}


@pytest.mark.parametrize("ending, how", [("jpg", FINE), ("png", {}), ("tif", {}), ("webp", dict(lossless=True))])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_obeyed(tmp_path, orientation, ending, how):
    stored = np.random.default_rng(0).integers(0, 255, (3, 2, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(stored).save(tmp_path / f"x.{ending}", exif=exif, **how)
    result = np.asarray(open_picture(tmp_path / f"x.{ending}"), float)
    np.testing.assert_allclose(result, UPRIGHT[orientation](stored), atol=6 if ending == "jpg" else 0)


def exif_bytes(*tags):
    """A hand-made EXIF block of (tag, type, count, value as 4 bytes)."""
    rows = b"".join(struct.pack("<HHI4s", *tag) for tag in sorted(tags))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + rows + bytes(4)


SIDEWAYS = (274, 3, 1, b"\6\0\0\0")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("exif, turned", [
    (b"Exif\0\0nonsense", False), (b"Exif\0\0II*\0\xff\xff\xff\x7f", False),
    (exif_bytes((274, 3, 1, b"\x63\0\0\0")), False), (exif_bytes((274, 2, 4, b"abc\0")), False),
    (exif_bytes(SIDEWAYS, (34665, 4, 1, b"\xff\xff\0\0")), True), (exif_bytes(SIDEWAYS, (282, 2, 4, b"abc\0")), True),
    (exif_bytes(SIDEWAYS, (258, 4, 1, b"\0\0\0\1")), True),
], ids=["no tiff", "starts beyond the end", "orientation 99", "orientation abc", "continues beyond the end",
        "resolution abc", "bit depth 2^24"])
def test_broken_exif_costs_neither_the_pixels_nor_a_readable_orientation(tmp_path, exif, turned):
    TWO.save(tmp_path / "x.jpg", exif=exif, **FINE)
    wanted = np.rot90(np.asarray(TWO, float), -1 if turned else 0)
    np.testing.assert_allclose(np.asarray(open_picture(tmp_path / "x.jpg"), float), wanted, atol=4)


@pytest.mark.parametrize("at_least, size", [(None, (400, 300)), (200, (400, 300)), (150, (200, 150)), (100, (200, 150)),
                                            (75, (100, 75)), (30, (50, 38)), (1000, (400, 300))])
def test_at_least_decodes_smaller_but_never_below(tmp_path, at_least, size):
    assert open_picture(paint(tmp_path / "x.jpg", size=(400, 300)), at_least).size == size


def png_header(width, height):
    """A PNG of almost no bytes that claims to be huge; 1 bit a pixel."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b""))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks)


def cut_short(ending, length):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file := io.BytesIO(), ending)
    return file.getvalue()[:length]


@pytest.mark.parametrize("name, content, reason", [
    ("empty.jpg", b"", "is empty"), ("notes.jpg", b"buy milk\n" * 9, "not a picture"),
    ("cut.jpg", cut_short("jpeg", 1500), "truncated"), ("cut.png", cut_short("png", 2000), "cannot be read"),
    ("cut.tif", cut_short("tiff", 2000), "cannot be read"), ("cut.webp", cut_short("webp", 500), "cannot be read"),
    ("bomb.png", png_header(20_000, 20_000), "128 megapixels"),
    ("twice.png", png_header(16_001, 16_000), "128 megapixels"),  # the least that Pillow itself calls an error
    ("missing.jpg", None, "no such file"), ("y" * 300 + ".jpg", None, ""), ("two\nlines.jpg", None, "no such file"),
    pytest.param("two\nlines.jpg", b"text", "not a picture", marks=NOT_ON_WINDOWS)], ids=range(12))
def test_what_cannot_be_read_gives_one_line_that_names_it(tmp_path, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    text = one_line(open_picture, tmp_path / name)
    assert name.replace("\n", "\\n") in text and reason in text


@pytest.mark.parametrize("make", [os.mkdir, pytest.param(lambda p: os.mkfifo(p), marks=NOT_ON_WINDOWS)],
                         ids=["folder", "pipe"])
def test_a_folder_is_refused_and_a_pipe_is_not_waited_for(tmp_path, make):
    make(tmp_path / "x.jpg")
    said = []
    thread = threading.Thread(target=lambda: said.append(one_line(open_picture, tmp_path / "x.jpg")), daemon=True)
    thread.start()
    thread.join(20)  # a daemon: if it waits for ever the test still ends
    assert said and "x.jpg: not a file" in said[0]


def test_tensors_become_pictures_and_back_without_wrapping():
    rgb = torch.tensor([[-.5, 0, .5 / 255 - 1e-4, .5 / 255 + 1e-4, .6, 1, 1.5]]).repeat(3, 1, 1)   # (3, 1, 7)
    assert np.asarray(data.to_picture(rgb))[0, :, 0].tolist() == [0, 0, 0, 1, 153, 255, 255]
    x = data.to_tensor(TWO)
    assert x.shape == (3, 16, 32) and x[:, 3, 5].tolist() == list(RED)
    np.testing.assert_array_equal(np.asarray(data.to_picture(x / 255)), np.asarray(TWO))


# ---- saving ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("error", [OSError(28, "No space left"), RuntimeError("failed at x.cc\nframe #0")])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "x.pt"
    path.write_text("old")

    def write(part):
        part.write_text("half")
        raise error

    text = one_line(data.save_atomically, path, write)
    assert "x.pt" in text and error.args[-1].splitlines()[0] in text
    assert os.listdir(tmp_path) == ["x.pt"] and path.read_text() == "old"


def test_a_save_makes_the_folder_and_moves_the_finished_file_into_place(tmp_path):
    path, written = tmp_path / "a" / "b" / "x.png", []
    for picture in (GRAY, TWO):
        data.save_atomically(path, lambda part: (picture.save(part), written.append(part.stat().st_ino)))
    assert os.listdir(path.parent) == ["x.png"] and path.stat().st_ino == written[1]  # moved: a copy could be met half
    np.testing.assert_array_equal(np.asarray(open_picture(path)), np.asarray(TWO))


@pytest.mark.parametrize("name", ["file/x.png", "folder", "y" * 250 + ".png"])
def test_a_place_that_cannot_be_written_gives_one_line(tmp_path, name):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder" / "full").mkdir(parents=True)
    assert name in one_line(data.save_atomically, tmp_path / name, lambda part: part.write_text("new"))
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a user whom permissions stop")
@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_folder_without_permission_gives_one_line(tmp_path, mode):
    tmp_path.chmod(mode)
    try:
        text = one_line(data.save_atomically, tmp_path / "x.png", TWO.save)
    finally:
        tmp_path.chmod(0o700)
    assert "x.png" in text and "ermission" in text


# ---- folders -----------------------------------------------------------------------------------------------

def test_list_pictures_finds_any_depth_and_case_but_nothing_hidden(tmp_path):
    top = tmp_path / "top"
    for name in ["b/c/D.PNG", "a.JPeG", ".hidden.jpg", "b/.cache/x.jpg", "b/notes.txt", "folder.jpg/e.gif", "c.bmp"]:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).touch()
    assert data.list_pictures(top) == [top / name for name in ["a.JPeG", "b/c/D.PNG", "c.bmp", "folder.jpg/e.gif"]]
    assert data.list_pictures(tmp_path / "missing") == []


def test_list_pictures_follows_links_but_not_round_in_circles(tmp_path):
    paint(tmp_path / "elsewhere" / "x.TIF")
    paint(tmp_path / "top" / "sub" / "y.jpg")
    link(tmp_path / "top" / "linked", tmp_path / "elsewhere")
    link(tmp_path / "top" / "sub" / "loop", tmp_path / "top")
    assert data.list_pictures(tmp_path / "top") == [tmp_path / "top" / n for n in ("linked/x.TIF", "sub/y.jpg")]


def colours(n):
    """n colours far from gray and from each other in red."""
    return [(int(255 - 255 * i / n), 255 if i % 2 else 0, 128) for i in range(n)]


def test_a_plain_folder_is_split_by_seed_alone(tmp_path):
    names = {paint(tmp_path / f"{i % 3}" / f"{i}.png", c) for i, c in enumerate(colours(21))}
    train, val = data.find_data(tmp_path, 0, 0, seed=1)
    assert len(val) == 5 and set(train) | set(val) == names and not set(train) & set(val)  # a fifth, rounded up
    assert data.find_data(str(tmp_path), 0, 0, seed=1) == (train, val)
    assert set(data.find_data(tmp_path, 0, 0, seed=2)[1]) != set(val)
    few, two = data.find_data(tmp_path, 4, 2, seed=1)
    assert two == val[:2] and len(few) == 4 and not set(few) & set(two)


def test_train_and_val_folders_are_taken_as_they_are(tmp_path, monkeypatch):
    folder = tmp_path / "data" / "imagenette2-160"
    for i, colour in enumerate(colours(6)):
        paint(folder / ("train" if i < 4 else "val") / "class" / f"{i}.JPEG", colour)
    train, val = data.find_data(folder, 0, 0, seed=0)
    assert sorted(p.name for p in train) == ["0.JPEG", "1.JPEG", "2.JPEG", "3.JPEG"]
    assert sorted(p.name for p in val) == ["4.JPEG", "5.JPEG"]
    assert [len(x) for x in data.find_data(folder, 3, 1, seed=0)] == [3, 1]
    monkeypatch.chdir(tmp_path)  # "" is the default data set, which is there already
    assert [p.resolve() for p in data.find_data("", 0, 0, seed=0)[0]] == [p.resolve() for p in train]


def test_gray_and_broken_pictures_are_left_out_and_told(tmp_path, capsys):
    near, faint = (120, 124, 120), (120, 132, 118)
    chroma = [math.hypot(*oracle_lab(np.array([c]) / 255)[0, 1:]) for c in (near, faint)]
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
    assert "left out 2 gray pictures" in told and "left out 1 gray pictures" in told and "left out 1 unreadable" in told and "broken.jpg" in told


@pytest.mark.parametrize("names", [[], ["only.png"], ["train/a.png"], ["gray/1.png", "gray/2.png", "gray/3.png"]])
def test_too_few_pictures_give_one_line_that_names_the_folder(tmp_path, names):
    for name in names:
        paint(tmp_path / name, (99, 99, 99) if "gray" in name else (200, 60, 30))
    assert str(tmp_path) in one_line(data.find_data, tmp_path, 0, 0, 0)


@pytest.mark.parametrize("name", ["missing", "y" * 300], ids=["missing", "too long"])
def test_a_folder_that_is_not_there_gives_one_line(tmp_path, name):
    assert f"{name}: is no folder" in one_line(data.find_data, tmp_path / name, 0, 0, 0)


@pytest.mark.parametrize("sizes, found", [((0, 0), (10_000, 500)), ((50, 7), (50, 7)), ((10 ** 6,) * 2, (10_000, 500))])
def test_synthetic_data_are_numbers_that_training_and_validation_do_not_share(sizes, found):
    train, val = data.find_data("synthetic", *sizes, seed=0)
    assert (len(set(train)), len(set(val))) == found and not set(train) & set(val)


def test_usable_counts_what_is_fit_for_training_and_decodes_no_bomb(tmp_path):
    """In a process of its own, so that no setting of Pillow's that another test has touched can help."""
    paint(tmp_path / "red.png")
    paint(tmp_path / "gray.png", (90, 90, 90))
    (tmp_path / "bomb.png").write_bytes(png_header(12_000, 12_000))
    code = "import sys, data; print(len(data.usable(data.list_pictures(sys.argv[1]), 100)))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=os.path.dirname(data.__file__),
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "1")
    assert "bomb.png: more than 128 megapixels" in done.stderr and "left out 1 gray" in done.stderr


# ---- crops and items ---------------------------------------------------------------------------------------

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
def test_the_centre_square_squashes_nothing_and_is_always_the_same(size):
    picture = disc(size, .4 * min(size))
    cut = data.square(picture, 100)
    x, y, width, height = extent(cut)
    assert cut.size == (100, 100) and abs(width - height) <= 1
    assert width == pytest.approx(80, abs=3) and x == pytest.approx(10, abs=2) and y == pytest.approx(10, abs=2)
    assert cut.tobytes() == data.square(picture, 100).tobytes()


def test_the_random_square_is_80_to_100_percent_of_the_short_side_and_squashes_nothing():
    picture = disc((300, 200), 15)
    boxes = [extent(data.square(picture, 256, np.random.default_rng(i))) for i in range(80)]
    whole = np.array([b for b in boxes if b[0] > 0 and b[0] + b[2] < 256])  # where the disc was not cut by the edge
    width, height = whole[:, 2], whole[:, 3]
    assert len(whole) > 50 and abs(width - height).max() <= 2
    side = 256 * 31 / width  # an ellipse from -15 to 15 is 31 pixels wide
    assert 155 < side.min() < 166 and 194 < side.max() < 206
    assert np.ptp(whole[:, 0]) > 80 and np.ptp(whole[:, 1]) > 20  # it lies here and there


def test_the_random_square_depends_on_the_generator_alone_and_is_flipped_half_of_the_time():
    ramp = Image.fromarray(np.linspace(0, 255, 300).round().astype(np.uint8)[None].repeat(200, 0)).convert("RGB")
    cuts = [np.asarray(data.square(ramp, 32, np.random.default_rng(i)), float)[16, :, 0] for i in range(200)]
    again = np.asarray(data.square(ramp, 32, np.random.default_rng(7)), float)[16, :, 0]
    assert np.array_equal(again, cuts[7]) and not np.array_equal(again, cuts[8])
    assert 72 <= sum(cut[0] > cut[-1] for cut in cuts) <= 128  # 100, give or take four standard deviations


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_training_item_depends_on_seed_epoch_and_index_alone():
    def photos(seed=3):
        return Photos(list(range(5)), 24, seed, True, hue_rotation=.7, style_from="other")

    keys = [(e, i) for e in range(2) for i in range(5)]
    first, other = photos(), photos()
    items = {key: first[key] for key in keys}
    assert all(same(items[key], other[key]) for key in reversed(keys))
    assert not same(items[0, 2], items[1, 2]) and not same(items[0, 2], photos(seed=4)[0, 2])
    photo, style, angle = items[0, 0]
    assert photo.shape == style.shape == (3, 24, 24) and photo.dtype == style.dtype == torch.uint8
    assert angle.shape == () and angle.dtype == torch.float32


def test_a_validation_item_is_the_centre_square_in_every_epoch(tmp_path):
    data.draw_scene(0).save(tmp_path / "x.png")
    photos = Photos([tmp_path / "x.png"], 24, 0, False, hue_rotation=1, style_from="other")
    photo, style, angle = photos[0, 0]
    assert len(photos) == 1 and same(photos[0, 0], photos[9, 0]) and torch.equal(photo, style) and angle == 0
    assert torch.equal(photo, data.to_tensor(data.square(data.draw_scene(0), 24)))


def test_a_jpeg_that_is_decoded_smaller_loses_no_sharpness(tmp_path):
    data.draw_scene(0, 100, 80).save(tmp_path / "x.jpg", quality=95)
    wanted = data.to_tensor(data.square(open_picture(tmp_path / "x.jpg"), 24))
    difference = Photos([tmp_path / "x.jpg"], 24, 0, False)[0, 0][0].float() - wanted.float()
    assert difference.abs().mean() < 2  # of 255; decoded at 1/8 the mean is 8


def test_style_comes_from_the_photo_a_crop_of_it_or_another_picture(tmp_path):
    paths = []
    for i, colour in enumerate(colours(6)):  # a colour for each picture, and a white edge to tell crops apart
        picture = Image.new("RGB", (48, 32), colour)
        picture.paste("white", (0, 0, 48, 10))
        picture.save(tmp_path / f"{i}.png")
        paths.append(tmp_path / f"{i}.png")

    def owners(style_from):  # of 40 items of picture 2: whose styles these are, how many are the photo itself
        items = [Photos(paths, 16, 0, True, style_from=style_from)[epoch, 2][:2] for epoch in range(40)]
        photos, styles = ({colours(6).index(tuple(x[:, 8, 8].tolist())) for x in xs} for xs in zip(*items))
        assert photos == {2}
        # The white edge is cut off now and then; else it is on one side: 0 above, 1 left, 2 below, 3 right.
        sides = {side for _, x in items for side, edge in enumerate([x[:, 0, 8], x[:, 8, 0], x[:, -1, 8], x[:, 8, -1]])
                 if (edge == 255).all()}
        return styles, sum(torch.equal(photo, style) for photo, style in items), sides

    assert owners("same") == ({2}, 40, {0})
    who, identical, sides = owners("crop")
    assert who == {2} and identical < 10 and sides == {0, 1, 2, 3}
    assert owners("other")[0] == set(range(6))


@pytest.mark.parametrize("share", [0., .5, 1.])
def test_hue_rotation_is_the_share_of_items_that_get_an_angle(tmp_path, share):
    photos = Photos([paint(tmp_path / "x.png")], 8, 0, True, hue_rotation=share)
    angles = np.array([photos[epoch, 0][2].item() for epoch in range(400)])
    turned = angles[angles != 0]
    assert abs(len(turned) / 400 - share) <= 4 * math.sqrt(share * (1 - share) / 400)
    if share:  # all round the circle: the mean of n unit vectors is about 1 / sqrt(n) long
        assert abs(turned).max() <= math.pi and abs(np.exp(1j * turned).mean()) < 3 / math.sqrt(len(turned))
        assert set(np.digitize(turned, [-math.pi / 2, 0, math.pi / 2])) == {0, 1, 2, 3}


# ---- batches -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, batch", [(7, 3), (8, 4), (1, 4), (3, 10)])
def test_every_epoch_is_a_permutation_and_every_batch_is_full(n, batch):
    batches = list(islice(Batches(n, batch, 5, 0), 4 * n))
    assert all(len(b) == batch for b in batches)
    keys = [key for b in batches for key in b]
    for epoch in range(len(keys) // n):
        part = keys[epoch * n:(epoch + 1) * n]
        assert {e for e, _ in part} == {epoch} and sorted(i for _, i in part) == list(range(n))


def test_a_series_taken_up_later_is_the_tail_of_the_whole_and_no_two_epochs_are_alike():
    whole = list(islice(Batches(7, 3, 5, 0), 20))
    for start in (1, 2, 5, 13):
        assert list(islice(Batches(7, 3, 5, start), 20 - start)) == whole[start:]
    orders = [tuple(i for _, i in b) for seed in (0, 1) for b in islice(Batches(20, 20, seed, 0), 5)]
    assert len(set(orders)) == 10


def test_the_number_of_workers_and_a_restart_change_nothing(tmp_path):
    for n in range(6):
        data.draw_scene(n, 24, 20).save(tmp_path / f"{n}.png")
    photos = Photos(data.list_pictures(tmp_path), 16, 1, True, hue_rotation=.5, style_from="other")

    def take(workers, start, n):
        return list(islice(DataLoader(photos, batch_sampler=Batches(6, 4, 1, start), num_workers=workers), n))

    whole, resumed = take(0, 0, 5), take(2, 2, 3)
    assert whole[0][0].shape == (4, 3, 16, 16) and not same(whole[0], whole[1])
    assert all(same(a, b) for a, b in zip(whole[2:], resumed, strict=True))


# ---- drawn scenes ------------------------------------------------------------------------------------------

def test_a_scene_is_given_by_its_number():
    scenes = [data.draw_scene(n) for n in (0, 1, 10_000)]
    assert all(s.size == (192, 160) and s.mode == "RGB" for s in scenes) and len({s.tobytes() for s in scenes}) == 3
    assert data.draw_scene(1).tobytes() == scenes[1].tobytes()


def test_the_gray_version_of_a_scene_does_not_give_the_palette_away():
    """Knowing L must explain hardly anything of a and b. Not nothing: bright reds and dark greens do not exist in sRGB.

    The measure is the correlation ratio, the variance between ten classes of L over the whole: it sees bent
    relations too. 400 scenes hold some 1,000 independent colours, so chance alone gives about 1 %.
    """
    lab = np.concatenate([np.asarray(data.draw_scene(n, 48, 40))[::4, ::4].reshape(-1, 3) for n in range(400)])
    lab = oracle_lab(lab / 255)
    group = np.digitize(lab[:, 0], np.quantile(lab[:, 0], np.arange(.1, 1, .1)))

    def explained(x):
        return np.array([x[group == g].mean() for g in range(10)])[group].var() / x.var()

    assert explained(lab[:, 1]) < .025 and explained(lab[:, 2]) < .025
    assert explained(lab[:, 0]) > .9  # the measure does see what is there
    assert np.hypot(*lab[:, 1:].T).mean() > data.MIN_CHROMA * 5


# ---- the download, from a server on this machine -----------------------------------------------------------

ARCHIVE = "imagenette2-160.tgz"
MEMBERS = {"imagenette2-160/train/n1/1.JPEG": b"one" * 500, "imagenette2-160/val/n1/2.JPEG": bytes(range(256)) * 9}


def tgz(*extra):
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w:gz") as tar:
        for name, content in [*MEMBERS.items(), *extra]:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            else:  # a link to this path
                member.type, member.linkname = tarfile.SYMTYPE, str(content)
                tar.addfile(member)
    return file.getvalue()


@pytest.fixture
def server(monkeypatch):
    state = SimpleNamespace(body=tgz(), stop_after=None, can_resume=True, raw=None, ranges=[])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers["Range"]
            state.ranges.append(wanted)
            if state.raw:
                return self.wfile.write(state.raw)
            start = int(wanted[len("bytes="):-1]) if wanted and state.can_resume else 0
            if start and start >= len(state.body):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(state.body) - start))
            self.end_headers()
            self.wfile.write(state.body[start:][:state.stop_after])

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(.05,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    state.url = f"http://127.0.0.1:{http.server_port}/{ARCHIVE}"
    yield state
    http.shutdown()
    http.server_close()


def fetch(server, folder):
    return data.imagenette(folder, server.url, hashlib.sha256(server.body).hexdigest())


def contents(folder):
    return {p.relative_to(folder.parent).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_default_data_are_fetched_once(tmp_path, server):
    folder = fetch(server, tmp_path / "data")
    assert folder == tmp_path / "data" / "imagenette2-160" and contents(folder) == MEMBERS
    assert fetch(server, tmp_path / "data") == folder and server.ranges == [None]


@pytest.mark.parametrize("can_resume", [True, False])
def test_a_broken_download_goes_on_where_it_stopped_or_starts_anew(tmp_path, server, can_resume):
    server.stop_after, server.can_resume = 100, can_resume
    text = one_line(fetch, server, tmp_path)
    assert f"100 of {len(server.body)} bytes" in text and "run again" in text
    server.stop_after = None
    assert contents(fetch(server, tmp_path)) == MEMBERS and server.ranges == [None, "bytes=100-"]


@pytest.mark.parametrize("name, requests", [(f"{ARCHIVE}.part", 1), (ARCHIVE, 0)])
def test_a_download_that_was_complete_but_not_yet_unpacked_is_used(tmp_path, server, name, requests):
    (tmp_path / name).write_bytes(server.body)
    assert contents(fetch(server, tmp_path)) == MEMBERS and len(server.ranges) == requests


def test_a_corrupted_archive_is_deleted_and_the_next_try_is_clean(tmp_path, server):
    good, server.body = server.body, server.body[:-9] + bytes(9)
    assert "SHA-256" in one_line(data.imagenette, tmp_path, server.url, hashlib.sha256(good).hexdigest())
    assert list(tmp_path.iterdir()) == []
    server.body = good
    assert contents(fetch(server, tmp_path)) == MEMBERS and server.ranges == [None, None]


@pytest.mark.parametrize("members", [
    [("../evil", b"!")], [("imagenette2-160/../../../outside/evil", b"!")], [("OUTSIDE/evil", b"!")],
    [("imagenette2-160/link", "OUTSIDE")], [("imagenette2-160/link", "../../../outside")],
    [("imagenette2-160/link", "OUTSIDE"), ("imagenette2-160/link/evil", b"!")],
], ids=["parent", "inner parent", "absolute", "absolute link", "relative link", "through a link"])
def test_a_hostile_archive_writes_nothing_outside(tmp_path, server, members):
    outside, folder = tmp_path / "outside", tmp_path / "data"
    outside.mkdir()
    server.body = tgz(*[[x.replace("OUTSIDE", str(outside)) if isinstance(x, str) else x for x in m] for m in members])
    if members[0][0].startswith("OUTSIDE"):  # tarfile takes the leading slash away, so it ends up inside and is dropped
        assert contents(fetch(server, folder)) == MEMBERS
    else:
        assert ARCHIVE in one_line(fetch, server, folder)
        assert os.listdir(folder) == [ARCHIVE]  # nothing half unpacked is left either
    assert sorted(os.listdir(tmp_path)) == ["data", "outside"] and os.listdir(outside) == []


@pytest.mark.parametrize("answer", [None, b"HTTP/1.0 404 Not Found\r\n\r\n", b"this is not HTTP\r\n\r\n",
                                    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\ncut"],
                         ids=["nobody", "not found", "no HTTP", "cut"])
def test_without_a_server_one_line_says_what_to_do_instead(tmp_path, server, answer):
    if answer is None:
        with socket.socket() as closed:  # a port where nobody listens
            closed.bind(("127.0.0.1", 0))
            server.url = f"http://127.0.0.1:{closed.getsockname()[1]}/{ARCHIVE}"
    server.raw = answer
    text = one_line(fetch, server, tmp_path)
    assert server.url in text and "--data DIR" in text and "--data synthetic" in text
