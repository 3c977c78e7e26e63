"""infer.py as a user meets it: pictures in, pictures out, and one clear line when something is wrong."""
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import infer
from data import UserError, draw_scene, gray_of, network_to_lab, rgb_to_lab, to_tensor
from losses import palette_distances
from model import Colorizer, ModelConfig

TOP = Path(infer.__file__).parent


def network(path, **config):
    """A checkpoint of a small random network that does colour: its head is not zero."""
    torch.manual_seed(1)
    model = Colorizer(ModelConfig(**{"width": 4, "latent": 8, "color": "lab", **config}))
    torch.nn.init.normal_(model.head.weight, std=.3)
    for layer in model.adain if model.config.style else []:
        torch.nn.init.normal_(layer.affine.weight, std=.3)  # so that styles differ visibly
    torch.save({"format": 1, "model": vars(model.config), "settings": {"size": 32}, "weights": model.state_dict()}, path)
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with a network, two photos (one gray, one in colour) and two styles."""
    monkeypatch.chdir(tmp_path)
    network("net.pt")
    for folder in ("photos", "styles"):
        os.mkdir(folder)
    draw_scene(1).resize((90, 61)).convert("L").save("photos/gray.png")
    draw_scene(2).resize((33, 50)).save("photos/colour.JPG", quality=95)
    draw_scene(3).save("styles/a.png")
    draw_scene(4).save("styles/b.webp")
    return tmp_path


def call(*arguments):
    return infer.main([*map(str, arguments), "--weights", "net.pt", "--device", "cpu"])


def pixels(path):
    return to_tensor(Image.open(path).convert("RGB"))[None] / 255


def L(path):
    return rgb_to_lab(pixels(path))[:, 0]


def test_result_has_the_photos_size_and_lightness_and_is_named_after_both(place, capsys):
    assert not call("photos/gray.png", "styles/a.png")
    assert capsys.readouterr().out.strip() == "gray_a.png"
    assert Image.open("gray_a.png").size == (90, 61)
    assert (L("gray_a.png") - L("photos/gray.png")).abs().max() < 1  # 8-bit rounding of three channels
    assert rgb_to_lab(pixels("gray_a.png"))[:, 1:].norm(dim=1).mean() > 3  # and it is in colour
    assert Image.open("photos/gray.png").mode == "L"


def test_of_a_colour_photo_only_the_lightness_is_used(place):
    call("photos/colour.JPG", "styles/a.png")
    gray = gray_of(pixels("photos/colour.JPG")).expand(-1, 3, -1, -1)
    infer.to_picture(gray[0]).save("gray_version.png")
    call("gray_version.png", "styles/a.png")
    assert (pixels("colour_a.png") - pixels("gray_version_a.png")).abs().max() < 5 / 255


def test_strips_do_not_show(place, monkeypatch):
    model, size = infer.load_model("net.pt")
    z = infer.encode(model, draw_scene(3), size)
    photo = draw_scene(1)
    whole = infer.colorize(model, photo, z, size)
    monkeypatch.setattr(infer, "STRIP_PIXELS", 5 * photo.width)
    strips = infer.colorize(model, photo, z, size)
    assert np.abs(np.asarray(whole, int) - np.asarray(strips, int)).max() <= 1


def test_enlarged_colours_are_the_networks_own_without_their_checkerboard(place):
    """At the network's own size nothing is enlarged: joining must give its a, b after the filter [1 2 1] / 4."""
    model, _ = infer.load_model("net.pt")
    photo = Image.fromarray(np.full((32, 32, 3), 128, np.uint8))
    photo.paste((150, 150, 150), (0, 0, 16, 32))
    z = infer.encode(model, draw_scene(3), 32)
    with torch.no_grad():
        ab = model.colorize(gray_of(to_tensor(photo)[None] / 255), z) * 110
    padded = np.pad(ab.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    ab = torch.from_numpy(sum(w * v * padded[:, :, i:i + 32, j:j + 32] / 16
                              for i, w in enumerate([1, 2, 1]) for j, v in enumerate([1, 2, 1])))
    joined = rgb_to_lab(to_tensor(infer.colorize(model, photo, z, 32))[None] / 255)
    inside = ab.norm(dim=1) < 25  # colours that a screen can show at this lightness
    assert inside.any() and ((joined[:, 1:] - ab).abs().amax(1)[inside]).max() < 1


def test_strength_zero_is_gray_and_half_is_half(place):
    for name, strength in [("zero", 0), ("half", .5), ("one", 1)]:
        call("photos/gray.png", "styles/a.png", "--strength", strength, "--output", f"{name}.png")
    zero, half, one = (rgb_to_lab(pixels(f"{n}.png"))[:, 1:] for n in ("zero", "half", "one"))
    assert zero.abs().max() < .1
    small = one.norm(dim=1, keepdim=True) < 20  # far from the border of the gamut
    assert ((half - one / 2).abs() * small).max() < 1.5


def test_raw_is_the_networks_own_picture(place):
    call("photos/gray.png", "styles/a.png", "--raw")
    assert Image.open("gray_a.png").size == (47, 32)  # short side 32, shape kept
    call("photos/gray.png", "styles/a.png", "--raw", "--size", 16)
    assert Image.open("gray_a.png").size == (24, 16)


def test_folders_give_all_pairs_and_each_style_is_encoded_once(place, monkeypatch, capsys):
    encoded = []
    encode = infer.encode
    monkeypatch.setattr(infer, "encode", lambda *a: encoded.append(1) or encode(*a))
    call("photos", "styles", "--output", "results")
    assert sorted(os.listdir("results")) == ["colour_a.png", "colour_b.png", "gray_a.png", "gray_b.png"]
    assert len(encoded) == 2
    call("photos", "styles/a.png", "--styles", "styles/b.webp", "--output", "again")
    for name in os.listdir("results"):
        assert Path("results", name).read_bytes() == Path("again", name).read_bytes()


def test_equal_names_from_two_folders_do_not_overwrite_each_other(place):
    os.mkdir("more")
    draw_scene(9).save("more/gray.png")
    call("photos/gray.png", "more/gray.png", "styles/a.png")
    assert Path("gray_a.png").exists() and Image.open("gray_a_2.png").size == (192, 160)


def test_blend_mixes_codes(place):
    call("photos/gray.png", "styles", "--blend", "1,0", "--output", "first.png")
    call("photos/gray.png", "styles/a.png", "--output", "a.png")
    assert torch.equal(pixels("first.png"), pixels("a.png"))
    call("photos/gray.png", "styles", "--blend", "2,6", "--output", "mixed.png")
    call("photos/gray.png", "styles", "--blend", "2,6", "--refine", 0, "--output", "plain.png")
    model, size = infer.load_model("net.pt")
    photo = Image.open("photos/gray.png").convert("RGB")
    styles = [Image.open(p).convert("RGB") for p in ("styles/a.png", "styles/b.webp")]
    for name, codes in [("plain.png", [infer.encode(model, s, size) for s in styles]),
                        ("mixed.png", [infer.refine(model, photo, s, infer.encode(model, s, size), size) for s in styles])]:
        expected = infer.colorize(model, photo, codes[0] / 4 + 3 * codes[1] / 4, size)
        assert np.abs(np.asarray(expected, int) - np.asarray(Image.open(name), int)).max() <= 1


def test_grid_shows_photos_down_and_styles_across(place):
    call("photos", "styles", "--grid", "--output", "sheet.png")
    sheet = Image.open("sheet.png")
    assert sheet.size == (4 * 36 + 4, 3 * 36 + 4)  # gray, own colours, two styles; the styles' row, two photos
    cell = to_tensor(sheet.crop((4, 40, 36, 72)))
    assert (cell[0] == cell[1]).all() and (cell[0] == cell[2]).all() and cell.float().std() > 5
    model, _ = infer.load_model("net.pt")
    photo = infer.square(Image.open("photos/gray.png").convert("RGB"), 32)
    style, own = infer.open_picture("styles/b.webp"), infer.square(infer.open_picture("photos/colour.JPG"), 32)
    # Sorted: colour.JPG is the first row, gray.png the second.
    for photo, style, box in [(photo, style, (112, 76, 144, 108)), (own, own, (40, 40, 72, 72))]:
        z = infer.refine(model, photo, style, infer.encode(model, style, 32), 32)
        assert np.array_equal(np.asarray(sheet.crop(box)), np.asarray(infer.colorize(model, photo, z, 32)))


@pytest.mark.parametrize("color", ["lab", "rgb"])
def test_refining_moves_the_code_downhill(place, color):
    """One step of Adam is .03 units against the sign of the slope; the slope by finite differences, in numpy."""
    model, size = infer.load_model(network("net.pt", color=color))
    photo, style = Image.open("photos/gray.png").convert("RGB"), draw_scene(3)
    z = infer.encode(model, style, size)
    moved = infer.refine(model, photo, style, z, size, 1)
    assert moved.shape == (1, 9, 8)
    wanted = rgb_to_lab(infer.fit(style, size))[0, 1:]
    gray = gray_of(infer.fit(photo, size))
    wanted = torch.nn.functional.interpolate(wanted[None], gray.shape[2:])[0].flatten(1).numpy().astype(float)
    L = rgb_to_lab(gray.expand(-1, 3, -1, -1))[:, :1]
    angles = np.arange(8) * np.pi / 8
    along = np.stack([np.cos(angles), np.sin(angles)])

    def distance(z):
        ab = network_to_lab(model.colorize(gray, z), gray, color)[:, 1:]
        ab = rgb_to_lab(infer.lab_to_gamut(torch.cat([L, ab], dim=1)))[0, 1:].flatten(1).numpy().astype(float)
        return np.abs(np.sort(along.T @ ab) - np.sort(along.T @ wanted)).mean()
    unit, levels = z.abs().mean(), z[:, None].repeat(1, 9, 1)
    slopes = np.zeros((9, 8))
    for index in np.ndindex(9, 8):
        h = torch.zeros_like(levels)
        h[0][index] = .01 * unit
        slopes[index] = (distance(levels + h) - distance(levels - h)) / .02
    steps = ((moved - levels) / unit)[0].numpy()
    clear = np.abs(slopes) > .2 * np.abs(slopes).max()
    assert clear.sum() > 4
    np.testing.assert_allclose(steps[clear], -.03 * np.sign(slopes[clear]), rtol=1e-3)


def test_refining_leaves_the_network_and_the_first_code_alone(place):
    model, size = infer.load_model("net.pt")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    z = infer.encode(model, draw_scene(3), size)
    first = z.clone()
    infer.refine(model, draw_scene(1), draw_scene(3), z, size)
    assert torch.equal(z, first) and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert infer.refine(model, draw_scene(1), draw_scene(3), z, size, 0).eq(z[:, None]).all()


def test_latents_prints_the_codes_and_draws_a_histogram_each(place, capsys):
    call("styles", "--latents")
    out = capsys.readouterr().out
    model, size = infer.load_model("net.pt")
    codes = torch.cat([infer.encode(model, infer.open_picture(p), size) for p in ("styles/a.png", "styles/b.webp")])
    assert f"spread over styles: {codes.numpy().std(0).mean():.4f}" in out and f"{codes[0].max():.3f}" in out
    assert Image.open("latents.png").size == (420, 220)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.tif", "x.bmp", "x.gif"])
def test_the_output_format_follows_the_ending(place, name):
    call("photos/gray.png", "styles/a.png", "--output", name)
    expected = {"jpg": "JPEG", "tif": "TIFF"}.get(name[2:], name[2:].upper())
    assert Image.open(name).format == expected and not list(Path().glob(".part*"))


def test_inputs_are_never_overwritten(place):
    before = Path("photos/gray.png").read_bytes()
    with pytest.raises(UserError, match="is one of the inputs"):
        call("photos/gray.png", "styles/a.png", "--output", "photos/gray.png")
    with pytest.raises(UserError, match="is one of the inputs"):
        call("photos/gray.png", "styles/a.png", "--output", "./photos/../styles/a.png")
    assert Path("photos/gray.png").read_bytes() == before


def test_a_bad_photo_among_good_ones_is_named_and_the_rest_is_done(place, capsys):
    Path("photos/bad.png").write_bytes(b"")
    assert call("photos", "styles/a.png", "--output", "out/") == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "bad.png" in captured.err and "empty" in captured.err
    assert sorted(os.listdir("out")) == ["colour_a.png", "gray_a.png"]


@pytest.mark.parametrize("arguments, words", [
    ("photos/none.png styles/a.png", "no such file"),
    ("photos/gray.png none", "no such file"),
    ("empty styles/a.png", "no picture in this folder"),
    ("net.pt styles/a.png", "not a picture"),
    ("photos/gray.png styles/a.png --output x.xyz", "unknown picture format"),
    ("photos styles/a.png --output x.png", "do not fit into one file"),
    ("photos/gray.png styles --blend 1,2,3", "3 weights for 2 styles"),
    ("photos/gray.png styles/a.png --output net.pt/", "cannot be written"),
    ("photos/gray.png styles/a.png --weights nothing.pt", "no such checkpoint"),
    ("photos/gray.png styles/a.png --weights photos/gray.png", "not a checkpoint"),
    ("photos/gray.png styles/a.png --weights torn.pt", "not a checkpoint"),
    ("photos/gray.png styles/a.png --weights packed.pt", "not a checkpoint"),
    ("photos/gray.png styles/a.png --weights new.pt", "format 2"),
    ("photos/gray.png styles/a.png --weights huge.pt", "do not describe a network"),
    ("photos/gray.png styles/a.png --weights shapes.pt", "do not describe a network"),
    ("photos/gray.png styles/a.png --weights plain.pt", "without style encoder"),
])
def test_failures_are_one_line_with_exit_code_1_and_leave_nothing_behind(place, arguments, words):
    os.mkdir("empty")
    good = torch.load("net.pt", weights_only=True)
    Path("torn.pt").write_bytes(Path("net.pt").read_bytes()[:5000])
    with zipfile.ZipFile("net.pt") as loose, zipfile.ZipFile("packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in loose.namelist():
            packed.writestr(name, loose.read(name))
    torch.save({**good, "format": 2}, "new.pt")
    torch.save({**good, "model": {**good["model"], "width": 10**6}}, "huge.pt")
    torch.save({**good, "model": {**good["model"], "width": 5}}, "shapes.pt")
    network("plain.pt", style=False)
    before = sorted(Path().rglob("*"))
    process = subprocess.run([sys.executable, TOP / "infer.py", "--weights", "net.pt", *arguments.split()],
                             capture_output=True, text=True)
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr.count("\n") == 1 and words in process.stderr
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("arguments", ["", "photos/gray.png", "photos/gray.png styles/a.png --blend x",
                                       "photos/gray.png styles/a.png --size 2", "photos/gray.png styles/a.png --strength -1",
                                       "photos/gray.png styles/a.png --refine -1"])
def test_usage_errors_exit_with_2(place, arguments, capsys):
    with pytest.raises(SystemExit) as error:
        call(*arguments.split())
    assert error.value.code == 2 and "usage: python infer.py PHOTO... STYLE" in capsys.readouterr().err


class Trap:
    """A pickle that would write a file when it is loaded carelessly."""
    def __reduce__(self):
        return Path.touch, (Path("trapped"),)


def test_a_checkpoint_older_than_the_newest_settings_is_read(place):
    checkpoint = torch.load("net.pt", weights_only=True)
    del checkpoint["model"]["relu"], checkpoint["model"]["resize"]
    torch.save(checkpoint, "old.pt")
    old, new = infer.load_model("old.pt")[0], infer.load_model("net.pt")[0]
    assert old.config == new.config and infer.load_checkpoint("old.pt")["model"] == vars(new.config)


def test_code_in_a_checkpoint_is_not_run(place):
    torch.save({"format": 1, "model": Trap()}, "evil.pt")
    with pytest.raises(UserError, match="not a checkpoint"):
        infer.load_checkpoint("evil.pt")
    assert not Path("trapped").exists()


# ---- the checkpoint that ships ----------------------------------------------------------------------------

def test_the_first_command_of_the_readme_colours_the_example(tmp_path):
    """In a folder of its own, without a network: the product works, and the result has the style's palette."""
    process = subprocess.run([sys.executable, TOP / "infer.py", TOP / "examples/gray.jpg", TOP / "examples/style.jpg"],
                             cwd=tmp_path, capture_output=True, text=True)
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


def test_padding_hardly_moves_the_shipped_networks_colours():
    """A photo of 113x121, which is padded to 128x128, against the same part of the whole photo of 128x128."""
    model, size = infer.load_model(infer.SHIPPED)
    photo = infer.square(Image.open(TOP / "examples/chelsea.jpg"), 128)
    z = infer.encode(model, Image.open(TOP / "examples/harvest.jpg"), size)
    whole, part = (network_to_lab(model.colorize(gray_of(to_tensor(p)[None] / 255), z).detach(),
                                  gray_of(to_tensor(p)[None] / 255), "lab")[:, 1:, :121, :113]
                   for p in (photo, photo.crop((0, 0, 113, 121))))
    assert whole.norm(dim=1).mean() > 10 and (whole - part).norm(dim=1).mean() < 6


def test_the_shipped_network_answers_a_gray_style_with_a_gray_picture():
    model, size = infer.load_model(infer.SHIPPED)
    style = Image.open(TOP / "examples/gray.jpg").convert("RGB")
    z = infer.encode(model, style, size)
    for code in (z, infer.refine(model, style, style, z, size)):
        lab = rgb_to_lab(to_tensor(infer.colorize(model, style, code, size))[None] / 255)
        assert lab[:, 1:].norm(dim=1).mean() < 3


def test_refining_brings_the_shipped_networks_palette_nearer():
    """On each of two photos with each of two styles, by 32 directions where refining looks along 8."""
    model, size = infer.load_model(infer.SHIPPED)
    transfers = []
    for name in ("chelsea", "rocket"):
        photo = infer.square(infer.open_picture(TOP / f"examples/{name}.jpg"), 128)
        for other in ("garden", "harvest"):
            style = infer.square(infer.open_picture(TOP / f"examples/{other}.jpg"), 128)
            z = infer.encode(model, style, size)
            shown = [to_tensor(infer.colorize(model, photo, code, size))[None] / 255
                     for code in (z, infer.refine(model, photo, style, z, size))]
            W, W_gray = palette_distances(torch.cat(shown), (to_tensor(style)[None] / 255).expand(2, -1, -1, -1))
            transfers.append(1 - W / W_gray)
    before, after = torch.stack(transfers).T
    assert (after > before).all() and after.mean() > before.mean() + .05
