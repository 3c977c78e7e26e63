"""LPIPS against the original package (benchmarks/make_lpips_fixture.py), other losses and measures against numpy."""
import math
import pickle
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from make_lpips_fixture import FIXTURE, SIZES, pictures, seeded_trunk, statistics
from PIL import Image
from torch import nn

import losses
import oracle
from data import UserError, rgb_to_network
from losses import (LPIPS, color_loss, load_trunk, make_trunk, pair_loss, palette_distances, palette_loss, psnr,
                    style_loss)
from model import Colorizer, ModelConfig

RANDOM = np.random.RandomState()


@pytest.fixture(autouse=True)
def same_numbers_whichever_tests_run():
    RANDOM.seed(5)


def rand(*shape, low=0., high=1.):
    return torch.from_numpy(RANDOM.uniform(low, high, shape)).float()


def numpy(x):
    return x.detach().double().numpy()


# ---- LPIPS ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def alex():
    return LPIPS("alex", seeded_trunk("alex"))


@pytest.mark.parametrize("layout, tolerance", [
    (torch.contiguous_format, 1e-5), (torch.channels_last, 3e-5)], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("net", SIZES)
def test_lpips_and_its_gradient_equal_the_package_to_1e_5(net, layout, tolerance):
    """Channels last, which training uses, sums in an order that rounds its gradient a little more."""
    with np.load(FIXTURE) as file:
        value, gradient, drawn = (file[f"{net}_{name}"] for name in ("value", "gradient", "statistics"))
    trunk = seeded_trunk(net)
    np.testing.assert_allclose(statistics(trunk), drawn, rtol=1e-5, err_msg="this torch draws other random weights "
                               "than the one that made lpips_fixture.npz: run benchmarks/make_lpips_fixture.py again")
    x, y = pictures(net)
    x.requires_grad_()
    ours = LPIPS(net, trunk).to(memory_format=layout)(x, y)
    assert ours.shape == (2,)
    ours.sum().backward()
    np.testing.assert_allclose(ours.detach(), value, rtol=1e-5)
    np.testing.assert_allclose(x.grad, gradient, rtol=0, atol=tolerance * np.abs(gradient).max())


def golden(folder, name):
    return torch.from_numpy(np.array(Image.open(folder / "lpips-golden" / f"{name}.png").convert("RGB"))
                            ).permute(2, 0, 1)[None] / 255


def test_lpips_gives_the_golden_values_of_the_lpips_repository(shared):
    net = LPIPS("alex", load_trunk("alex", shared / "weights" / "alexnet_features.pth"))
    ref, p0, p1 = (golden(shared, name) for name in ("ex_ref", "ex_p0", "ex_p1"))
    both = net(ref.expand(2, -1, -1, -1), torch.cat([p0, p1]))
    assert [round(v, 3) for v in both.tolist()] == [.722, .138]
    assert both.tolist() == pytest.approx([.72188, .13757], abs=1e-4)
    assert both.tolist() == pytest.approx([net(ref, p0).item(), net(ref, p1).item()], abs=1e-6)


def test_lpips_is_computed_in_fp32_inside_autocast(alex):
    x, y = pictures("alex")
    plain = alex(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert alex.trunk(x).dtype == torch.bfloat16  # so autocast does reach convolutions here
        half = alex(x, y)
        from_half = alex(x.bfloat16(), y.bfloat16())
    assert half.dtype == torch.float32 and torch.equal(half, plain)
    assert torch.equal(from_half, alex(x.bfloat16().float(), y.bfloat16().float()))


@pytest.mark.parametrize("size", [0., 1e-30])  # 1e-30: only its square is 0
def test_lpips_gradient_is_finite_where_all_features_are_zero(size):
    trunk = seeded_trunk("alex")
    for i, layer in enumerate(trunk):
        if isinstance(layer, nn.Conv2d):
            layer.weight.data.zero_()
            layer.bias.data.fill_(size)
        if isinstance(layer, nn.ReLU):
            trunk[i] = nn.Identity()  # the CPU's ReLU would hide a NaN: at 0 it answers 0, whatever comes
    x, y = pictures("alex")
    net = LPIPS("alex", trunk)
    assert all((f.abs() < 1e-20).all() for f in net.features(x))
    x.requires_grad_()
    d = net(x, y)
    d.sum().backward()
    assert d.tolist() == [0, 0] and (x.grad == 0).all()


def test_lpips_of_black_with_dead_features_is_the_size_of_the_others_features():
    trunk = seeded_trunk("alex")
    for layer in trunk:
        if isinstance(layer, nn.Conv2d):
            layer.weight.data.abs_()  # black is below 0 after normalization: no ReLU lets anything through
            layer.bias.data.zero_()
    net = LPIPS("alex", trunk)
    black, white = torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64)
    assert all((f == 0).all() for f in net.features(black))
    expected = sum((net.linear[i] * f.square()).sum(1).mean() for i, f in enumerate(net.features(white)))
    assert net(black, white).item() == pytest.approx(expected.item(), rel=1e-5) and expected > .01
    half = torch.cat([black[:, :, :32], white[:, :, 32:]], dim=2).requires_grad_()  # zero features beside others
    net(half, white).backward()
    assert half.grad.isfinite().all() and half.grad[:, :, 40:].abs().max() > 0


def test_lpips_of_a_picture_with_itself_is_zero(alex):
    x = pictures("alex")[0]
    assert alex(x, x).tolist() == [0, 0] and alex(x, x.flip(3)).min() > .001


def test_lpips_target_gets_no_gradient_and_keeps_no_graph(alex):
    x, y = (t.clone().requires_grad_() for t in pictures("alex"))
    assert not alex(x.detach(), y).requires_grad
    alex(x, y).sum().backward()
    assert y.grad is None and x.grad.abs().max() > 0
    assert not any(p.requires_grad for p in alex.parameters())


# ---- the trunk's weights ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(3)
    return make_trunk("alex").state_dict()


def torchvision_form(weights):
    return {**{f"features.{k}": v for k, v in weights.items()}, "classifier.1.weight": torch.zeros(4, 9),
            "classifier.1.bias": torch.zeros(4)}


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Nothing in the cache, no folder named, and a URL at which nobody answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("COLORIZER_WEIGHTS", raising=False)
    monkeypatch.setitem(losses.URLS, "alex", f"http://127.0.0.1:{port}/alexnet-owt-7be5be79.pth")
    return tmp_path / "torch" / "hub" / "checkpoints"


def one_line(raised):
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("form", [dict, torchvision_form], ids=["features", "torchvision"])
@pytest.mark.parametrize("place", ["path", "environment", "cache"])
@pytest.mark.parametrize("name", ["alexnet-owt-7be5be79.pth", "alexnet_features.pth"])
def test_load_trunk_finds_both_forms_in_each_place(weights, form, place, name, no_network, monkeypatch, tmp_path):
    folder = no_network if place == "cache" else tmp_path / "mine"
    folder.mkdir(parents=True)
    torch.save(form(weights), folder / name)
    if place == "environment":
        monkeypatch.setenv("COLORIZER_WEIGHTS", str(folder))
    loaded = load_trunk("alex", str(folder / name) if place == "path" else "").state_dict()
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[k], weights[k]) for k in weights)


def test_load_trunk_prefers_the_path_then_the_environment_then_the_cache(weights, no_network, monkeypatch, tmp_path):
    name = "alexnet_features.pth"
    places = [tmp_path / "file" / name, tmp_path / "folder" / name, no_network / name]
    for mark, file in enumerate(places):
        file.parent.mkdir(parents=True)
        torch.save({**weights, "0.bias": torch.full((64,), float(mark))}, file)
    monkeypatch.setenv("COLORIZER_WEIGHTS", str(tmp_path / "folder"))
    assert load_trunk("alex", str(places[0]))[0].bias[0] == 0
    assert load_trunk("alex")[0].bias[0] == 1
    monkeypatch.delenv("COLORIZER_WEIGHTS")
    assert load_trunk("alex")[0].bias[0] == 2


@pytest.mark.parametrize("net, content", [
    ("vgg", "weights"), ("alex", "one missing"), ("alex", "wrong shape"), ("alex", "list"), ("alex", b""),
    ("alex", b"no torch file")])
def test_load_trunk_refuses_a_wrong_file_with_one_line(weights, net, content, tmp_path):
    file = tmp_path / "wrong.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save({"weights": weights, "one missing": {k: v for k, v in weights.items() if k != "10.bias"},
                    "wrong shape": {**weights, "10.bias": torch.zeros(1)}, "list": [1, 2]}[content], file)
    with pytest.raises(UserError) as raised:
        load_trunk(net, file)
    text = one_line(raised)
    assert all(part in text for part in (str(file), f"does not hold the {net} weights", losses.URLS[net]))


@pytest.mark.parametrize("name", ["none.pth", "folder", "y" * 300, "y/" * 2100], ids=["none", "folder", "name", "path"])
def test_load_trunk_names_what_is_no_file(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError) as raised:
        load_trunk("alex", str(tmp_path / name))
    text = one_line(raised)
    assert str(tmp_path / name) in text and "--lpips-weights" in text


@pytest.mark.parametrize("folder", ["y" * 300, "y/" * 2100, ""], ids=["name", "path", "empty"])
def test_a_weights_folder_that_cannot_be_is_passed_over(weights, no_network, monkeypatch, folder):
    no_network.mkdir(parents=True)
    torch.save(weights, no_network / "alexnet_features.pth")
    monkeypatch.setenv("COLORIZER_WEIGHTS", folder)
    assert torch.equal(load_trunk("alex")[0].bias, weights["0.bias"])


def test_load_trunk_without_network_tells_what_to_fetch_and_where_to_put_it(no_network):
    with pytest.raises(UserError) as raised:
        load_trunk("alex")
    text = one_line(raised)
    assert all(part in text for part in (losses.URLS["alex"], str(no_network), "--lpips-weights", "--lpips 0"))
    assert list(no_network.iterdir()) == []


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_load_trunk_runs_no_code_of_a_malicious_pickle(form, tmp_path):
    file, mark = tmp_path / "bomb.pth", tmp_path / "mark"
    if form == "torch":
        torch.save(Bomb(mark), file)
    else:
        file.write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    with pytest.raises(UserError):
        load_trunk("alex", str(file))
    assert not mark.exists()
    try:
        torch.load(file, weights_only=False)
    except Exception:
        pass
    assert mark.exists()  # the bomb is live: a careless loader sets it off


# ---- measures ---------------------------------------------------------------------------------------------

def test_psnr_equals_its_formula():
    x, y = rand(3, 3, 5, 7), rand(3, 3, 5, 7)
    y[1], y[2] = x[1], x[2]
    y[1, :, 0, 0] += .3
    expected = [-10 * math.log10(np.mean((a.double() - b.double()).numpy() ** 2)) for a, b in zip(x[:2], y[:2])]
    assert psnr(x, y).tolist() == pytest.approx(expected + [100], abs=1e-4)  # equal pictures: 100 instead of infinity
    assert psnr(torch.full((1, 3, 4, 4), .6), torch.full((1, 3, 4, 4), .5)).item() == pytest.approx(20, abs=1e-4)


def test_palette_distances_equal_32_directions_by_hand():
    out, style = rand(2, 3, 6, 7), rand(2, 3, 6, 7, high=.6)
    pairs = [(oracle.lab(a)[1:], oracle.lab(b)[1:]) for a, b in zip(numpy(out), numpy(style))]
    d, d_gray = palette_distances(out, style)
    assert d.tolist() == pytest.approx([oracle.wasserstein(a, b, 32) for a, b in pairs], rel=1e-4)
    assert d_gray.tolist() == pytest.approx([oracle.wasserstein(0 * a, b, 32) for a, b in pairs], rel=1e-4)


def test_palette_transfer_is_1_for_the_styles_own_pixels_in_another_order_and_0_for_gray():
    style = rand(2, 3, 8, 8)
    shuffled = style.flatten(2)[:, :, torch.from_numpy(RANDOM.permutation(64))].view_as(style)
    gray = rand(2, 1, 8, 8).expand(-1, 3, -1, -1)
    for out, transfer in [(shuffled, 1), (gray, 0)]:
        d, d_gray = palette_distances(out, style)
        assert (1 - d / d_gray).tolist() == pytest.approx([transfer] * 2, abs=1e-4)


@pytest.mark.parametrize("measure", [
    psnr, lambda x, y: palette_distances(x, y)[0], lambda x, y: palette_distances(x, y)[1]],
    ids=["psnr", "palette", "palette of gray"])
def test_a_measure_of_one_picture_does_not_depend_on_its_batch(measure):
    x, y = rand(3, 3, 12, 12), rand(3, 3, 12, 12)
    alone = torch.cat([measure(x[i:i + 1], y[i:i + 1]) for i in range(3)])
    assert measure(x, y).tolist() == pytest.approx(alone.tolist(), rel=1e-5)
    assert len({round(v, 4) for v in alone.tolist()}) == 3


# ---- the color loss ---------------------------------------------------------------------------------------

def distance(x, y):
    """Stands for LPIPS: smooth, and easy to repeat by hand."""
    return (x - y).pow(2).sum(1).mean((1, 2)) * 3


def batch(space, beyond=0.):
    """out, gray, rgb for color_loss. beyond: how far an RGB output may leave [0, 1]."""
    out = rand(2, 3, 6, 7, low=-beyond, high=1 + beyond) if space == "rgb" else rand(2, 2, 6, 7, low=-.05, high=.05)
    return out, rand(2, 1, 6, 7, low=.3, high=.7), rand(2, 3, 6, 7)


def palette_by_hand(out, rgb, space, turn):
    """The output's means of 2x2 (an odd column is left out) against every second pixel of every second row."""
    total = 0
    for o, r in zip(numpy(out), numpy(rgb)):
        ab = o if space == "lab" else oracle.lab(o.clip(0, 1))[1:] / 110  # an impossible color has no a and b
        h, w = (n // 2 * 2 for n in ab.shape[1:])
        total += oracle.wasserstein(oracle.means_of_2x2(ab[:, :h, :w]), oracle.lab(r)[1:, 1::2, 1::2] / 110, 8, turn)
    return total / len(out)


@pytest.mark.parametrize("space", ["rgb", "lab"])
def test_color_loss_is_the_weighted_sum_of_its_terms(space):
    tensors = batch(space, beyond=.2)
    out, gray, rgb = map(numpy, tensors)
    if space == "rgb":
        shown, answer = out, rgb
    else:
        L = np.stack([oracle.lab(np.repeat(p, 3, axis=0))[:1] for p in gray])  # a gray is (v, v, v)
        shown = np.stack([oracle.rgb(p) for p in np.concatenate([L, 110 * out], axis=1)])
        answer = np.stack([oracle.lab(p)[1:] / 110 for p in rgb])
    expected = {"mse": np.mean((out - answer) ** 2), "lpips": 3 * np.mean(np.sum((shown - rgb) ** 2, axis=1)),
                "palette": palette_by_hand(tensors[0], tensors[2], space, .3)}
    weights = {"mse": .7, "lpips": 2., "palette": .4}
    loss, terms = color_loss(*tensors, space, weights, distance, offset=.3)
    assert {k: v.item() for k, v in terms.items()} == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(sum(weights[k] * expected[k] for k in weights), rel=1e-4)


def never(*_):
    raise AssertionError("a term of weight 0 was computed")


@pytest.mark.parametrize("space", ["rgb", "lab"])
@pytest.mark.parametrize("term", ["mse", "lpips", "palette"])
def test_one_term_alone_is_computed_and_its_gradient_is_the_slope(term, space):
    out, gray, rgb = batch(space)
    rest = gray, rgb, space, {"mse": 0., "lpips": 0., "palette": 0., term: 2.}, distance if term == "lpips" else never
    out.requires_grad_()
    loss, terms = color_loss(out, *rest)
    loss.backward()
    assert list(terms) == [term] and not terms[term].requires_grad
    along = out.grad / out.grad.norm()
    with torch.no_grad():
        up, down = (color_loss(out + h * along, *rest)[0].item() for h in (1e-2, -1e-2))
    assert (up - down) / 2e-2 == pytest.approx(out.grad.norm().item(), rel=.02) and up > down


@pytest.mark.parametrize("value", [-3., 0., 3.])
@pytest.mark.parametrize("tone", [0., .5, 1.])
@pytest.mark.parametrize("space", ["rgb", "lab"])
def test_black_white_and_impossible_colors_give_finite_gradients(space, tone, value, alex):
    out = torch.full((1, {"rgb": 3, "lab": 2}[space], 64, 64), value).requires_grad_()
    gray, picture = torch.full((1, 1, 64, 64), tone), torch.full((1, 3, 64, 64), 1 - tone)
    picture[:, 0] = .2  # something to move towards
    loss, _ = color_loss(out, gray, picture, space, {"mse": 1., "lpips": 1., "palette": 1.}, alex)
    loss.backward()
    assert loss.isfinite() and out.grad.isfinite().all() and out.grad.abs().max() > 0


# ---- the palette loss -------------------------------------------------------------------------------------

@pytest.mark.parametrize("turn", [0., .6])
@pytest.mark.parametrize("space", ["rgb", "lab"])
def test_palette_loss_is_the_distance_of_the_palettes_by_hand(space, turn):
    out = rand(3, 3, 8, 7, low=-.3, high=1.3) if space == "rgb" else rand(3, 2, 8, 7, low=-1, high=1)
    rgb = rand(3, 3, 8, 7)
    assert palette_loss(out, rgb, space, turn).item() == pytest.approx(palette_by_hand(out, rgb, space, turn), rel=1e-4)


def test_palette_loss_does_not_see_where_a_color_stands():
    blocks = rand(1, 3, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)       # each color fills 2x2 pixels
    moved = blocks.flip(2).transpose(2, 3)
    assert palette_loss(rgb_to_network(moved, "lab"), blocks, "lab").item() < 1e-5
    assert palette_loss(1 - blocks, blocks, "rgb").item() > .05


def test_a_checkerboard_of_two_colors_does_not_pass_for_their_palette():
    """Its 2x2 means are all of one color. Else a network could lower the loss by alternating pixels."""
    rgb = torch.zeros(1, 3, 8, 8)
    rgb[:, 0, :, :4], rgb[:, 2, :, 4:] = .8, .8                                     # half red, half blue
    ab = rgb_to_network(rgb, "lab")
    board = ab.clone()
    board[:, :, :, ::2], board[:, :, :, 1::2] = ab[:, :, :, :1], ab[:, :, :, -1:]
    assert palette_loss(ab, rgb, "lab").item() < 1e-6 and palette_loss(board, rgb, "lab").item() > .1


# ---- the pair loss ----------------------------------------------------------------------------------------

def pair_loss_by_hand(ab, lab, i):
    """The docstring of pair_loss in loops: ab (B, 2, H, W), lab (B, 3, H, W), i the pixels that were drawn."""
    ratios = []
    for out, true in zip(ab, lab):
        H, W = true.shape[1:]
        padded = np.pad(true, [(0, 0), (1, 1), (1, 1)], mode="edge")
        true = sum(padded[:, y:y + H, x:x + W] for y in range(3) for x in range(3)) / 9
        out, true = out.reshape(2, -1), true.reshape(3, -1)
        sums, weights = np.zeros(2), np.zeros(2)
        for p in i:
            for q in i:
                dL = true[0, p] - true[0, q]
                dC = math.hypot(*(true[1:, p] - true[1:, q]))
                same = math.exp(-(dL * dL + dC * dC) / 25)
                apart = math.exp(-dL * dL / 16) if dC > 12 else 0
                d = math.sqrt(((out[:, p] - out[:, q]) ** 2).sum() + 1e-6)
                sums += same * d, apart * d
                weights += same, apart
        if weights[1] > .002 * len(i) ** 2:
            near, far = sums / (weights + [0, 1e-6])
            ratios.append(min(near / (far + 1), 2))
    return np.mean(ratios) if ratios else 0.


def halves(size=24, L=(40, 60)):
    """L, a, b of a picture (1, 3, S, S): red beside blue, of the same lightness, which rises from top to bottom."""
    lab = torch.zeros(1, 3, size, size)
    lab[:, 0] = torch.linspace(*L, size)[:, None]
    lab[:, 1, :, :size // 2], lab[:, 2, :, size // 2:] = 40, -40
    return lab


def measured(ab, lab, pixels=384):
    torch.manual_seed(0)
    return pair_loss(ab, lab, pixels).item()


@pytest.mark.parametrize("pixels", [1, 30])
def test_pair_loss_equals_two_loops_over_the_same_pixels(pixels):
    lab = torch.cat([halves(12), halves(12, (10, 90)), rand(3, 3, 12, 12, low=-60, high=60), halves(12)])
    lab += rand(*lab.shape, low=-3, high=3)
    lab[4, 1:] = 20                                                                 # one color only: has no pairs
    ab = rand(6, 2, 12, 12, low=-50, high=50)
    ab[0] = lab[0, 1:]
    ab[5] = lab[5, :1] * torch.tensor([9., -4.])[:, None, None]
    ab[5, :, 6:] *= 50
    torch.manual_seed(7)
    i = torch.randint(144, (pixels,)).tolist()
    torch.manual_seed(7)
    found = pair_loss(ab, lab, pixels).item()
    assert found == pytest.approx(pair_loss_by_hand(numpy(ab), numpy(lab), i), rel=1e-4)


def test_pair_loss_caps_each_picture_at_2():
    """Below is one bright color that has become stripes; above are two colors that have become one."""
    lab, ab = halves(L=(50, 50)), torch.zeros(1, 2, 24, 24)
    lab[:, 0, 12:], lab[:, 1, 12:], lab[:, 2, 12:] = 90, 20, 20
    ab[:, 0, 14:, ::2] = 1000
    assert measured(ab, lab) == 2
    both = measured(torch.cat([ab, lab[:, 1:]]), lab.repeat(2, 1, 1, 1))
    assert both == pytest.approx(1, abs=.1)  # (2 + about 0) / 2


def test_pair_loss_of_the_true_colors_is_small():
    lab = halves()
    assert measured(lab[:, 1:], lab) < .05
    swapped = lab[:, 1:].flip(1)  # any other two colors will do as well
    assert measured(swapped, lab) < .05


def test_pair_loss_of_a_wash_across_one_true_color_is_about_1():
    lab = halves()
    wash = torch.linspace(-60, 60, 24)[:, None] * torch.tensor([1., -1.])[:, None, None].expand(1, 2, 24, 24)
    lab[:, 0] = 50  # the wash follows nothing that can be seen in the photo
    assert measured(wash, lab) == pytest.approx(1, abs=.1)
    noise = rand(1, 2, 24, 24, low=-60, high=60)
    assert measured(noise, lab) == pytest.approx(1, abs=.1)


def test_pair_loss_of_colors_that_follow_lightness_alone_is_about_1():
    """Pixels of one true color get nearly one color so, but so do pixels of two true colors."""
    lab = halves()
    by_lightness = 4 * (lab[:, :1] - 50) * torch.tensor([1., -1.])[:, None, None]   # (1, 2, S, S)
    assert measured(by_lightness, lab) == pytest.approx(1, abs=.25)
    assert measured(by_lightness, lab) > 10 * measured(lab[:, 1:], lab)


@pytest.mark.parametrize("lab", [
    torch.full((1, 3, 24, 24), 30.), halves()[:, :, :, :12], halves() * torch.tensor([1., .1, .1])[:, None, None]],
    ids=["flat", "one color", "two all but gray colors"])
def test_a_picture_without_pairs_to_keep_apart_adds_nothing_to_the_pair_loss(lab):
    ab = rand(1, 2, *lab.shape[2:], low=-50, high=50).requires_grad_()
    loss = pair_loss(ab, lab)
    loss.backward()
    assert loss.item() == 0 and (ab.grad == 0).all()


def test_the_pair_loss_of_a_batch_is_the_mean_over_the_pictures_that_have_pairs():
    full, flat = halves(), torch.full((1, 3, 24, 24), 30.)
    ab = rand(3, 2, 24, 24, low=-50, high=50)
    ab[2] = full[0, 1:] + ab[2] / 5
    both = (measured(ab[:1], full) + measured(ab[2:], full)) / 2
    assert measured(ab, torch.cat([full, flat, full])) == pytest.approx(both, rel=1e-5)


def test_lightness_that_jumps_between_two_colors_makes_no_pair():
    """A bright red beside a dark blue says nothing: lightness alone may tell them apart."""
    lab = halves()
    lab[:, 0, :, :12], lab[:, 0, :, 12:] = 75, 25
    assert measured(rand(1, 2, 24, 24, low=-50, high=50), lab) == 0


@pytest.mark.parametrize("value", [0., 30.])
def test_pair_loss_of_one_single_color_has_a_finite_gradient(value):
    ab = torch.full((2, 2, 24, 24), value).requires_grad_()
    loss = pair_loss(ab, torch.cat([halves(), halves()]))
    loss.backward()
    assert loss.isfinite() and ab.grad.isfinite().all()


def test_the_gradient_of_the_pair_loss_is_its_slope():
    lab = halves()
    ab = rand(1, 2, 24, 24, low=-30, high=30) + lab[:, 1:]
    ab.requires_grad_()
    torch.manual_seed(0)
    pair_loss(ab, lab).backward()
    along = ab.grad / ab.grad.norm()
    up, down = (measured(ab.detach() + h * along, lab) for h in (10., -10.))
    assert (up - down) / 20 == pytest.approx(ab.grad.norm().item(), rel=.05) and up > down


# ---- the style loss ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("space", ["rgb", "lab"])
def test_style_loss_compares_the_codes_of_style_and_result_and_moves_the_style_encoder_alone(space):
    torch.manual_seed(0)
    model = Colorizer(ModelConfig(width=4, latent=8, space=space))
    gray, style = rand(2, 1, 32, 32), rand(2, 3, 32, 32)
    out = rand(2, 3, 32, 32, low=-.2, high=1.2) if space == "rgb" else rand(2, 2, 32, 32, low=-.3, high=.3)
    out.requires_grad_()
    loss = style_loss(model, gray, model.encode_style(rgb_to_network(style, space)), out)
    loss.backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"style_encoder"} and out.grad is None

    shown = numpy(out)
    if space == "lab":
        L = [oracle.lab(np.repeat(g, 3, axis=0))[:1] for g in numpy(gray)]
        shown = np.stack([oracle.rgb(np.concatenate([l, 110 * o])) for l, o in zip(L, shown)])
    seen = [shown.clip(0, 1), numpy(style)]
    if space == "lab":
        seen = [np.stack([oracle.lab(p)[1:] / 110 for p in x]) for x in seen]
    with torch.no_grad():
        a, b = (model.encode_style(torch.from_numpy(x).float()) for x in seen)
    assert loss.item() == pytest.approx((a - b).square().mean().item(), rel=1e-3)
