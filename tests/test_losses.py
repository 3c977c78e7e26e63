"""LPIPS against the original package (make_lpips_fixture.py), the other losses and measures against numpy."""
import hashlib
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
from data import UserError, directions, sliced_wasserstein
from losses import LPIPS, color_loss, colourfulness, load_trunk, make_trunk, palette_distances, psnr, ssim

RANDOM = np.random.RandomState()


@pytest.fixture(autouse=True)
def same_numbers_whichever_tests_run():
    RANDOM.seed(5)


def rand(*shape, low=0., high=1.):
    return torch.from_numpy(RANDOM.uniform(low, high, shape)).float()


# ---- oracles: float64 numpy, written from the formulas ----------------------------------------------------
M = np.array([[.412453, .357580, .180423], [.212671, .715160, .072169], [.019334, .119193, .950227]])
WHITE = np.array([.95047, 1., 1.08883])


def np_lab(rgb):
    """sRGB (3, H, W) -> CIELAB (3, H, W)."""
    c = np.asarray(rgb, np.float64)
    linear = np.where(c > .04045, ((np.maximum(c, 0) + .055) / 1.055) ** 2.4, c / 12.92)
    t = np.einsum("ij,jhw->ihw", M, linear) / WHITE[:, None, None]
    f = np.where(t > .008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def np_rgb(lab):
    """CIELAB (3, H, W) -> sRGB (3, H, W), not clipped."""
    fy = (lab[0] + 16) / 116
    f = np.stack([fy + lab[1] / 500, fy, fy - lab[2] / 200])
    xyz = np.where(f > .2068966, f ** 3, (f - 16 / 116) / 7.787) * WHITE[:, None, None]
    c = np.einsum("ij,jhw->ihw", np.linalg.inv(M), xyz)
    return np.where(c > .0031308, 1.055 * np.maximum(c, .0031308) ** (1 / 2.4) - .055, 12.92 * c)


def np_wasserstein(ab, other, n, turn=0.):
    """Mean over n directions of the mean distance of the sorted projections of two (2, H, W) clouds."""
    total = 0
    for k in range(n):
        angle = (k + turn) * math.pi / n
        p, q = (np.sort(math.cos(angle) * x[0].ravel() + math.sin(angle) * x[1].ravel()) for x in (ab, other))
        total += np.abs(p - q).mean()
    return total / n


def np_ssim(x, y):
    """Two planes (H, W): weighted moments of each 11x11 window on its own."""
    g = np.array([[math.exp(-(i * i + j * j) / (2 * 1.5 ** 2)) for j in range(-5, 6)] for i in range(-5, 6)])
    g /= g.sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i:i + 11, j:j + 11], y[i:i + 11, j:j + 11]
            ma, mb = (g * a).sum(), (g * b).sum()
            va, vb, cov = (g * (a - ma) ** 2).sum(), (g * (b - mb) ** 2).sum(), (g * (a - ma) * (b - mb)).sum()
            values.append((2 * ma * mb + .01 ** 2) * (2 * cov + .03 ** 2)
                          / ((ma * ma + mb * mb + .01 ** 2) * (va + vb + .03 ** 2)))
    return np.mean(values)


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
                               "than the one that made lpips_fixture.npz: run tests/make_lpips_fixture.py again")
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
            layer.weight.data.abs_()  # black is below 0 after normalisation: no ReLU lets anything through
            layer.bias.data.zero_()
    net = LPIPS("alex", trunk)
    black, white = torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64)
    assert all((f == 0).all() for f in net.features(black))
    expected = sum((net.get_buffer(f"linear{i}") * f.square()).sum(1).mean() for i, f in enumerate(net.features(white)))
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
    ("alex", b"no torch file"), ("alex", "folder")])
def test_load_trunk_refuses_a_wrong_file_with_one_line(weights, net, content, tmp_path):
    file = tmp_path / "wrong.pth"
    if content == "folder":
        file.mkdir()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save({"weights": weights, "one missing": {k: v for k, v in weights.items() if k != "10.bias"},
                    "wrong shape": {**weights, "10.bias": torch.zeros(1)}, "list": [1, 2]}[content], file)
    with pytest.raises(UserError) as raised:
        load_trunk(net, file)
    text = one_line(raised)
    assert all(part in text for part in (str(file), f"does not hold the {net} weights", losses.URLS[net]))


def test_load_trunk_names_a_missing_file(tmp_path):
    with pytest.raises(UserError) as raised:
        load_trunk("alex", str(tmp_path / "none.pth"))
    assert one_line(raised) == f"--lpips-weights {tmp_path / 'none.pth'}: no such file"


def test_load_trunk_without_network_tells_what_to_fetch_and_where_to_put_it(no_network):
    with pytest.raises(UserError) as raised:
        load_trunk("alex")
    text = one_line(raised)
    assert all(part in text for part in (losses.URLS["alex"], str(no_network), "--lpips-weights", "--lpips 0"))
    assert list(no_network.iterdir()) == []


@pytest.mark.parametrize("honest", [True, False], ids=["right hash", "wrong hash"])
def test_downloaded_weights_are_kept_only_with_the_right_hash(weights, honest, no_network, monkeypatch, tmp_path):
    torch.save(weights, tmp_path / "served.pth")
    digest = hashlib.sha256((tmp_path / "served.pth").read_bytes()).hexdigest()[:8]
    name = f"alexnet-owt-{digest if honest else '00000000'}.pth"
    (tmp_path / "served.pth").rename(tmp_path / name)
    monkeypatch.setitem(losses.URLS, "alex", (tmp_path / name).as_uri())
    if honest:
        assert torch.equal(load_trunk("alex")[0].bias, weights["0.bias"])
    else:
        with pytest.raises(UserError) as raised:
            load_trunk("alex")
        assert "hash" in one_line(raised)
    assert [f.name for f in no_network.iterdir()] == ([name] if honest else [])


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


@pytest.mark.parametrize("shape", [(2, 3, 14, 13), (1, 1, 11, 11), (2, 2, 11, 16)])
def test_ssim_equals_a_loop_over_windows(shape):
    x = rand(*shape)
    y = (.7 * x + rand(*shape, high=.3)).clamp(0, 1)
    x[-1], y[-1] = x[-1] / 20, y[-1] / 20  # in the dark the two small constants count
    expected = [np.mean([np_ssim(p, q) for p, q in zip(a, b)]) for a, b in zip(x.double().numpy(), y.double().numpy())]
    assert ssim(x, y).tolist() == pytest.approx(expected, abs=1e-5)
    assert ssim(x, x).tolist() == pytest.approx([1] * shape[0], abs=1e-5)


def test_colourfulness_equals_its_formula_and_is_zero_for_gray():
    x = rand(2, 3, 6, 5)
    x[1] = x[1, :1]
    r, g, b = (255 * x[0].double().numpy()).reshape(3, -1)
    rg, yb = r - g, (r + g) / 2 - b
    expected = math.hypot(rg.std(), yb.std()) + .3 * math.hypot(rg.mean(), yb.mean())
    assert colourfulness(x).tolist() == pytest.approx([expected, 0], rel=1e-5, abs=1e-3)
    red = torch.tensor([1., 0, 0])[None, :, None, None].expand(1, 3, 4, 4)  # no spread: .3 |(255, 127.5)|
    assert colourfulness(red).item() == pytest.approx(.3 * 255 * math.sqrt(1.25), rel=1e-5)


@pytest.mark.parametrize("n, turn", [(8, 0.), (8, .37), (32, 0.), (1, .5)])
def test_sliced_wasserstein_equals_sorting_by_hand(n, turn):
    x, y = rand(3, 2, 4, 6, low=-50, high=80), rand(3, 2, 4, 6, low=-20, high=20)
    expected = [np_wasserstein(a.double().numpy(), b.double().numpy(), n, turn) for a, b in zip(x, y)]
    assert sliced_wasserstein(x, y, directions(n, turn=turn)).tolist() == pytest.approx(expected, rel=1e-5)


def test_moving_all_colours_by_one_vector_costs_its_mean_projection():
    x, move = rand(1, 2, 5, 5), torch.tensor([3., -4.])
    d = sliced_wasserstein(x, x + move[:, None, None], directions(32)).item()
    assert d == pytest.approx(5 * 2 / math.pi, rel=2e-3)  # mean |cos| is 2 / pi


def test_palette_distances_equal_32_directions_by_hand():
    out, style = rand(2, 3, 6, 7), rand(2, 3, 6, 7, high=.6)
    pairs = [(np_lab(a.numpy())[1:], np_lab(b.numpy())[1:]) for a, b in zip(out, style)]
    d, d_gray = palette_distances(out, style)
    assert d.tolist() == pytest.approx([np_wasserstein(a, b, 32) for a, b in pairs], rel=1e-4)
    assert d_gray.tolist() == pytest.approx([np_wasserstein(0 * a, b, 32) for a, b in pairs], rel=1e-4)


def test_palette_transfer_is_1_for_the_styles_own_pixels_in_another_order_and_0_for_gray():
    style = rand(2, 3, 8, 8)
    shuffled = style.flatten(2)[:, :, torch.from_numpy(RANDOM.permutation(64))].view_as(style)
    gray = rand(2, 1, 8, 8).expand(-1, 3, -1, -1)
    for out, transfer in [(shuffled, 1), (gray, 0)]:
        d, d_gray = palette_distances(out, style)
        assert (1 - d / d_gray).tolist() == pytest.approx([transfer] * 2, abs=1e-4)


@pytest.mark.parametrize("measure", [
    psnr, ssim, lambda x, y: colourfulness(x), lambda x, y: palette_distances(x, y)[0],
    lambda x, y: palette_distances(x, y)[1]], ids=["psnr", "ssim", "colourfulness", "palette", "palette of gray"])
def test_a_measure_of_one_picture_does_not_depend_on_its_batch(measure):
    x, y = rand(3, 3, 12, 12), rand(3, 3, 12, 12)
    alone = torch.cat([measure(x[i:i + 1], y[i:i + 1]) for i in range(3)])
    assert measure(x, y).tolist() == pytest.approx(alone.tolist(), rel=1e-5)
    assert len({round(v, 4) for v in alone.tolist()}) == 3


# ---- the training loss ------------------------------------------------------------------------------------

def distance(x, y):
    """Stands for LPIPS: smooth, and easy to repeat by hand."""
    return (x - y).pow(2).sum(1).mean((1, 2)) * 3


def batch(color, beyond=0.):
    """out, gray, rgb, style for color_loss. beyond: how far an RGB output may leave [0, 1]."""
    out = rand(2, 3, 6, 7, low=-beyond, high=1 + beyond) if color == "rgb" else rand(2, 2, 6, 7, low=-.05, high=.05)
    return out, rand(2, 1, 6, 7, low=.3, high=.7), rand(2, 3, 6, 7), rand(2, 3, 6, 7)


@pytest.mark.parametrize("color", ["rgb", "lab"])
def test_color_loss_is_the_weighted_sum_of_its_terms(color):
    tensors = batch(color, beyond=.2)
    out, gray, rgb, style = (t.double().numpy() for t in tensors)
    if color == "rgb":  # only the palette sees the output clamped: such a colour has no a and b
        shown, answer, ab = out, rgb, np.stack([np_lab(p.clip(0, 1))[1:] / 110 for p in out])
    else:
        L = np.stack([np_lab(np.repeat(p, 3, axis=0))[:1] for p in gray])  # a gray is (v, v, v)
        shown = np.stack([np_rgb(p) for p in np.concatenate([L, 110 * out], axis=1)])
        answer, ab = np.stack([np_lab(p)[1:] / 110 for p in rgb]), out
    # The output's means of 2x2 (an odd column is left out) against every second pixel of every second row.
    palettes = [np_wasserstein(a[:, :, :6].reshape(2, 3, 2, 3, 2).mean((2, 4)), np_lab(s)[1:, 1::2, 1::2] / 110, 8, .3)
                for a, s in zip(ab, style)]
    expected = {"mse": np.mean((out - answer) ** 2), "lpips": 3 * np.mean(np.sum((shown - rgb) ** 2, axis=1)),
                "palette": np.mean(palettes)}
    weights = {"mse": .7, "lpips": 2., "palette": .4}
    loss, terms = color_loss(*tensors, color, weights, distance, turn=.3)
    assert {k: v.item() for k, v in terms.items()} == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(sum(weights[k] * expected[k] for k in weights), rel=1e-4)


@pytest.mark.parametrize("color", ["rgb", "lab"])
@pytest.mark.parametrize("term", ["mse", "lpips", "palette"])
def test_one_term_alone_is_computed_and_its_gradient_is_the_slope(term, color, monkeypatch):
    """Terms of weight 0 must not even be touched: LPIPS is then None, the style missing."""
    if color == "lab" and term != "lpips":
        monkeypatch.setattr(losses, "network_to_rgb", None)  # nobody needs the way back to RGB
    out, gray, rgb, style = batch(color)
    rest = gray, None if term == "palette" else rgb, style if term == "palette" else None, color, {
        "mse": 0., "lpips": 0., "palette": 0., term: 2.}, distance if term == "lpips" else None
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
@pytest.mark.parametrize("color", ["rgb", "lab"])
def test_black_white_and_impossible_colours_give_finite_gradients(color, tone, value, alex):
    out = torch.full((1, {"rgb": 3, "lab": 2}[color], 64, 64), value).requires_grad_()
    gray, picture = torch.full((1, 1, 64, 64), tone), torch.full((1, 3, 64, 64), 1 - tone)
    picture[:, 0] = .2  # something to move towards
    loss, _ = color_loss(out, gray, picture, picture, color, {"mse": 1., "lpips": 1., "palette": 1.}, alex)
    loss.backward()
    assert loss.isfinite() and out.grad.isfinite().all() and out.grad.abs().max() > 0
