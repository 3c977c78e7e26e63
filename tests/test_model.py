"""AdaIN against equation (1) written out, the network against the layer table of the paper, written out in numpy."""
import math
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from torch import nn

import oracle
from adain import AdaIN, normalize
from model import Colorizer, ModelConfig
from train import PRESETS, Settings

CONFIGS = {"rgb": {}, "lab": dict(space="lab"), "plain": dict(use_style=False), "sigmoid": dict(sigmoid=True),
           "replicate": dict(padding="replicate")}


def build(awake=True, **settings):
    """A small network in evaluation mode. awake: with random numbers in all weights that start out as constants,
    the head's zeros, the scales of 1 and BatchNorm's statistics; an untrained network hides most mistakes."""
    torch.manual_seed(1)
    model = Colorizer(ModelConfig(**{"width": 4, "latent": 8, **settings})).eval()
    if awake:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, .5, 2)
                for t in (module.running_mean, module.bias):
                    nn.init.normal_(t, std=.2)
            if isinstance(module, AdaIN):
                nn.init.normal_(module.affine.weight, std=.5)
        nn.init.normal_(model.head.weight)
    return model


def pictures(model, batch, height=32, width=48):
    """gray and what the network sees of a style; no style for the plain U-Net."""
    torch.manual_seed(2)
    gray = torch.rand(batch, 1, height, width)
    channels = model.head.out_channels
    style = torch.rand(batch, channels, 40, 36) - .5 * (channels == 2)
    return gray, style if model.config.use_style else None


# ---- AdaIN ------------------------------------------------------------------------------------------------

def equation_1(x, z, weight, bias, eps):
    """y_s (x - mu) / sqrt(sigma^2 + eps) + y_b, pixel by pixel: numpy (B, C, H, W), (B, D) -> (B, C, H, W)."""
    B, C, H, W = x.shape
    out = np.empty_like(x)
    for b in range(B):
        for c in range(C):
            scale = sum(weight[c, d] * z[b, d] for d in range(z.shape[1])) + bias[c]
            shift = sum(weight[C + c, d] * z[b, d] for d in range(z.shape[1])) + bias[C + c]
            pixels = [x[b, c, i, j] for i in range(H) for j in range(W)]
            mu = sum(pixels) / len(pixels)
            variance = sum((p - mu) ** 2 for p in pixels) / len(pixels)
            for i in range(H):
                for j in range(W):
                    out[b, c, i, j] = scale * (x[b, c, i, j] - mu) / math.sqrt(variance + eps) + shift
    return out


def adain_case(size=(5, 7), spread=2.):
    torch.manual_seed(0)
    layer = AdaIN(3, 4)
    for p in layer.parameters():
        nn.init.normal_(p)
    x = spread * torch.randn(2, 3, *size) + spread * torch.tensor([0., 2., -8.])[:, None, None]
    return layer, x, torch.randn(2, 4)


@pytest.mark.parametrize("size, spread", [((5, 7), 2.), ((1, 6), 1.), ((4, 4), 1e-3)])  # 1e-3: there eps counts
def test_adain_is_equation_1(size, spread):
    layer, x, z = adain_case(size, spread)
    w, b = (p.detach().double().numpy() for p in (layer.affine.weight, layer.affine.bias))
    expected = equation_1(x.double().numpy(), z.double().numpy(), w, b, layer.eps)
    np.testing.assert_allclose(layer(x, z).detach(), expected, atol=1e-5)
    one_code = equation_1(x.double().numpy(), z[:1].expand(2, -1).double().numpy(), w, b, layer.eps)
    np.testing.assert_allclose(layer(x, z[:1]).detach(), one_code, atol=1e-5)


def test_adain_gradients_equal_those_of_the_formula_in_float64():
    layer, x, z = adain_case()
    torch.manual_seed(4)
    inputs = [x.requires_grad_(), z.requires_grad_(), *layer.parameters()]
    out = layer(x, z)
    along = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, along)

    X, Z, W, b = (t.detach().double().requires_grad_() for t in inputs)
    scale, shift = ((Z @ W.T + b)[:, part, None, None] for part in (slice(3), slice(3, 6)))
    mu = X.sum((2, 3), keepdim=True) / 35
    sigma = (((X - mu) ** 2).sum((2, 3), keepdim=True) / 35 + layer.eps) ** .5
    wanted = torch.autograd.grad(scale * (X - mu) / sigma + shift, [X, Z, W, b], along.double())
    for a, e in zip(found, wanted):
        np.testing.assert_allclose(a, e, atol=1e-5 * e.abs().max().item())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False])
def test_normalize_is_the_formula_of_each_channel_of_each_picture_with_its_gradient(layout, training):
    torch.manual_seed(0)
    x = (3 * torch.randn(4, 5, 6, 7) + torch.arange(20.).view(4, 5, 1, 1)).to(memory_format=layout).requires_grad_()
    along = torch.randn(4, 5, 6, 7)
    with torch.set_grad_enabled(training):
        found = normalize(x, 1e-3)
    X = x.detach().double().requires_grad_()
    wanted = (X - X.mean((2, 3), keepdim=True)) / (X.var((2, 3), correction=0, keepdim=True) + 1e-3).sqrt()
    np.testing.assert_allclose(found.detach(), wanted.detach(), atol=1e-5)
    if training:
        gradients = (torch.autograd.grad(y, t, a)[0] for y, t, a in [(found, x, along), (wanted, X, along.double())])
        np.testing.assert_allclose(*gradients, atol=1e-5)


def test_untrained_adain_with_the_code_0_is_plain_instance_normalization():
    torch.manual_seed(0)
    x = 3 * torch.randn(2, 5, 6, 4) + 1
    out = AdaIN(5, 8)(x, torch.zeros(1, 8)).detach()
    np.testing.assert_allclose(out, nn.functional.instance_norm(x), atol=1e-5)
    assert out.mean((2, 3)).abs().max() < 1e-5 and (out.std((2, 3), correction=0) - 1).abs().max() < 1e-4


@pytest.mark.parametrize("size", [(6, 6), (1, 1)])  # one pixel has no deviation either
def test_adain_turns_a_constant_channel_into_the_shift(size):
    layer, _, z = adain_case()
    x = torch.tensor([0., 1., -10.])[None, :, None, None].expand(2, 3, *size).clone().requires_grad_()
    out = layer(x, z)
    out.sum().backward()
    shift = (z @ layer.affine.weight.T + layer.affine.bias)[:, 3:, None, None].detach()
    np.testing.assert_allclose(out.detach(), shift.expand_as(out), atol=5e-3)  # 1 / sqrt(eps) times fp32's rounding
    assert x.grad.isfinite().all()


def test_adain_takes_its_statistics_in_fp32_under_autocast():
    layer, x, z = adain_case()
    plain = layer(x, z)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.affine(z).dtype == torch.bfloat16  # so autocast is at work here
        assert torch.equal(layer(x, z), plain)
        assert torch.equal(layer(x.bfloat16(), z), layer(x.bfloat16().float(), z))


# ---- settings ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, value", [
    ("space", "RGB"), ("space", "hsv"), ("space", None), ("space", ["lab"]), ("padding", ""), ("padding", "reflect"),
    ("width", 0), ("width", 257), ("width", -4), ("width", True), ("width", 16.), ("width", "16"), ("width", 10 ** 30),
    ("latent", 0), ("latent", 4097), ("latent", False), ("dropout", 1), ("dropout", True), ("dropout", -.1),
    ("dropout", .96), ("dropout", math.nan), ("dropout", math.inf), ("dropout", "0.2"), ("use_style", 1),
    ("use_style", "yes"), ("use_style", None), ("sigmoid", 0)])
def test_a_setting_of_a_wrong_type_or_out_of_bounds_is_refused_by_name(name, value):
    for wrong in (lambda: ModelConfig(**{name: value}).check(), lambda: ModelConfig.from_file({name: value})):
        with pytest.raises(ValueError) as raised:
            wrong()
        assert str(raised.value).startswith(name + " ") and len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("settings", [
    {}, dict(space="lab", padding="replicate"), dict(width=1, latent=1, dropout=0.),
    dict(width=256, latent=4096, dropout=.95), dict(use_style=False, sigmoid=True)])
def test_settings_within_bounds_pass_and_come_back(settings):
    config = ModelConfig(**settings)
    assert config.check() is config
    assert ModelConfig.from_file(asdict(config)) == config


def test_a_setting_that_a_file_lacks_gets_its_default():
    assert ModelConfig.from_file({}) == ModelConfig()
    assert ModelConfig.from_file({"width": 8}) == ModelConfig(width=8)


@pytest.mark.parametrize("value", [True, 0, 1, "", None, 2.5])
def test_an_unknown_setting_of_a_file_is_refused_by_its_name(value):
    with pytest.raises(ValueError, match="wavelets"):
        ModelConfig.from_file({"width": 8, "wavelets": value})


@pytest.mark.parametrize("off", [False, 0.])
def test_an_unknown_setting_that_is_off_is_passed_over(off):
    assert ModelConfig.from_file({"width": 8, "wavelets": off}) == ModelConfig(width=8)


@pytest.mark.parametrize("name", ["space", "padding", "width", "dropout", "use_style", "unknown"])
def test_the_value_of_a_file_is_never_printed(name):
    with pytest.raises(ValueError) as raised:
        ModelConfig.from_file({name: "\x1b[31msecret"})
    assert "secret" not in str(raised.value)


def test_the_name_of_an_unknown_setting_is_printed_short_and_harmless():
    with pytest.raises(ValueError) as raised:
        ModelConfig.from_file({"\x1b[31m\n" + "long" * 1000: 1})
    assert str(raised.value).isprintable() and len(str(raised.value)) < 200


def test_every_setting_of_the_network_is_one_of_a_run_with_the_same_default():
    run = {f.name: (f.type, f.default) for f in fields(Settings)}
    assert all(run[f.name] == (f.type, f.default) for f in fields(ModelConfig))


# ---- the number of parameters -----------------------------------------------------------------------------

def conv(i, o, kernel):
    return (i * kernel * kernel + 1) * o


def count_by_hand(width, latent, style, channels):
    """The layer table of the paper, summed up; a BatchNorm has 2 numbers a channel."""
    enc = [width, 2 * width, 4 * width, 8 * width, 8 * width]
    total, i = 0, 1
    for o, convs in zip(enc, [2, 2, 2, 4, 4]):
        total += conv(i, o, 3) + (convs - 1) * conv(o, o, 3) + convs * 2 * o
        i = o
    dec = [8 * width, 4 * width, 2 * width, width]
    for i, o in zip(dec, [4 * width, 2 * width, width, width]):
        total += conv(i, i, 4) + conv(2 * i, i, 1) + conv(i, o, 3) + 2 * conv(o, o, 3) + 3 * 2 * o
    total += conv(width + 1, channels, 1)                                       # the head; the gray photo joins
    if style:
        codes = [channels, 64, 128, 256, 512, latent]
        total += sum(conv(i, o, 3) for i, o in zip(codes, codes[1:]))
        total += sum((latent + 1) * 2 * c for c in enc + dec)                   # nine AdaIN layers
    return total


PINNED = {"final": 3_513_638, "unet": 28_333_830, "collapsed": 31_102_214, "combined": 31_102_214, "dual": 31_102_214,
          "lab": 3_513_044, "lpips-only": 3_513_638, "ours": 3_513_638}


@pytest.mark.parametrize("preset", PRESETS)
def test_parameter_count_of_each_preset(preset):
    """final: the 3,513,635 of the authors' network and 3 weights for the gray photo, which joins at the head."""
    s = Settings(**PRESETS[preset])
    with torch.device("meta"):  # no memory for networks of 30 million
        model = Colorizer(s)
    counted = sum(p.numel() for p in model.parameters())
    assert counted == count_by_hand(s.width, s.latent, s.use_style, {"rgb": 3, "lab": 2}[s.space]) == PINNED[preset]


# ---- the network, written out in numpy --------------------------------------------------------------------

def transposed(x, weight, bias):
    """A transposed 4x4 convolution of stride 2 and padding 1: each pixel (C, H, W) is stamped onto 4x4 others."""
    H, W = x.shape[1:]
    out = np.zeros((weight.shape[1], 2 * H + 2, 2 * W + 2))
    for i in range(4):
        for j in range(4):
            out[:, i:i + 2 * H:2, j:j + 2 * W:2] += np.tensordot(weight[:, :, i, j], x, axes=([0], [0]))
    return out[:, 1:-1, 1:-1] + bias[:, None, None]


def network_by_hand(model, gray, style):
    """Figure 1 in evaluation mode, float64: gray (1, H, W) with sides of multiples of 16, style (C, h, w) or None."""
    weights = {k: v.double().numpy() for k, v in model.state_dict().items()}
    config, edge = model.config, {"zeros": "constant", "replicate": "edge"}[model.config.padding]

    def layer(name):
        return weights[name + ".weight"], weights[name + ".bias"]

    def block(x, name, convs):
        for k in range(convs):
            x = np.maximum(oracle.convolve(x, *layer(f"{name}.{3 * k}"), edge), 0)
            mean, var = (weights[f"{name}.{3 * k + 2}.running_{s}"][:, None, None] for s in ("mean", "var"))
            scale, shift = (w[:, None, None] for w in layer(f"{name}.{3 * k + 2}"))
            x = scale * (x - mean) / np.sqrt(var + 1e-5) + shift
        return x

    def restyle(x, level):
        if not config.use_style:
            return x
        w, b = layer(f"adain.{level}.affine")
        return equation_1(x[None], z[None], w, b, 1e-5)[0]

    if config.use_style:
        for k in range(5):
            # Stride 2 is every second pixel of stride 1.
            style = oracle.convolve(style, *layer(f"style_encoder.convs.{k}"), "constant")[:, ::2, ::2]
            style = np.maximum(style, 0) if k < 4 else style
        z = style.mean((1, 2))
        z = 1 / (1 + np.exp(-z)) if config.sigmoid else z

    x, skips = gray, []
    for i, convs in enumerate([2, 2, 2, 4, 4]):
        if i:
            C, H, W = x.shape
            x = x.reshape(C, H // 2, 2, W // 2, 2).max((2, 4))
        x = restyle(block(x, f"encoder.{i}", convs), i)
        skips.append(x)
    assert skips.pop().shape == (32, gray.shape[1] // 16, gray.shape[2] // 16)        # the bottleneck
    for i in range(4):
        x = restyle(transposed(x, *layer(f"up.{i}")), 5 + i)
        w, b = layer(f"fuse.{i}")
        x = np.tensordot(w[:, :, 0, 0], np.concatenate([x, skips.pop()]), axes=1) + b[:, None, None]
        x = block(x, f"decoder.{i}", 3)
    w, b = layer("head")
    x = np.tensordot(w[:, :, 0, 0], np.concatenate([x, gray]), axes=1) + b[:, None, None]
    return x + gray if config.space == "rgb" else x


@pytest.mark.parametrize("config", CONFIGS)
def test_the_network_is_figure_1_written_out(config):
    model = build(**CONFIGS[config])
    gray, style = pictures(model, 1)
    with torch.no_grad():
        found = model(gray, style)[0]
    wanted = network_by_hand(model, gray[0].double().numpy(), None if style is None else style[0].double().numpy())
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_replicate_repeats_the_border_where_zeros_shows_it():
    """A flat gray picture stays flat under replicate padding; under zeros the border can be seen."""
    gray = torch.full((1, 1, 32, 48), .6)
    spread = {}
    for padding in ("zeros", "replicate"):
        model = build(padding=padding, use_style=False)
        for up in model.up:
            nn.init.zeros_(up.weight)  # these show the border under any padding
        with torch.no_grad():
            spread[padding] = model(gray).std((2, 3)).max().item()
    assert spread["replicate"] < 1e-5 < .01 < spread["zeros"]


def test_padding_has_no_weights():
    zeros, replicate = (build(padding=p) for p in ("zeros", "replicate"))
    replicate.load_state_dict(zeros.state_dict())
    gray, style = pictures(zeros, 1)
    with torch.no_grad():
        assert (zeros(gray, style) - replicate(gray, style)).abs().max() > .01


# ---- shapes -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", ["rgb", "lab"])
def test_the_gray_picture_itself_is_the_last_skip_connection(config):
    model = build(**CONFIGS[config])
    gray, style = pictures(model, 2)
    with torch.no_grad():
        model.head.weight[:, :-1] = 0  # only what joins last
        factors = model.head.weight[:, -1] + (config == "rgb")  # (3 or 2, 1, 1)
        np.testing.assert_allclose(model(gray, style), gray * factors, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", CONFIGS)
def test_untrained_network_answers_leave_it_gray(config, training):
    model = build(awake=False, **CONFIGS[config]).train(training)
    gray, style = pictures(model, 2)
    out = model(gray, style)
    assert torch.equal(out, torch.zeros(2, 2, 32, 48) if config == "lab" else gray.expand(-1, 3, -1, -1))


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (16, 17), (17, 33), (31, 9), (127, 129)])
@pytest.mark.parametrize("config", ["rgb", "lab", "plain", "replicate"])
def test_odd_sizes_are_padded_at_the_bottom_and_right_and_cut_back(config, size):
    model = build(**CONFIGS[config])
    gray, style = pictures(model, 1, *size)
    by_numpy = np.pad(gray.numpy(), [(0, 0), (0, 0), (0, -size[0] % 16), (0, -size[1] % 16)], mode="edge")
    with torch.no_grad():
        out, padded = model(gray, style), model(torch.from_numpy(by_numpy), style)
    assert out.shape == (1, 2 if config == "lab" else 3, *size) and out.isfinite().all()
    np.testing.assert_allclose(out, padded[:, :, :size[0], :size[1]], atol=1e-5)


# ---- style codes ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", CONFIGS)
def test_nothing_depends_on_the_rest_of_the_batch(config):
    model = build(**CONFIGS[config])
    gray, style = pictures(model, 3)
    with torch.no_grad():
        together = model(gray, style)
        alone = torch.cat([model(gray[i:i + 1], style[i:i + 1] if model.config.use_style else None) for i in range(3)])
        assert (together[0] - together[1]).abs().max() > .01
        np.testing.assert_allclose(together, alone, atol=1e-4)
        if model.config.use_style:
            codes = model.train().encode_style(style)  # the style encoder has no BatchNorm: in training too
            np.testing.assert_allclose(codes, torch.cat([model.encode_style(s[None]) for s in style]), atol=1e-5)


@pytest.mark.parametrize("config", ["rgb", "lab", "sigmoid"])
def test_forward_is_encode_style_then_colorize_and_one_code_may_serve_all(config):
    model = build(**CONFIGS[config])
    gray, style = pictures(model, 2)
    with torch.no_grad():
        z = model.encode_style(style)
        out = model(gray, style)
        assert z.shape == (2, 8)
        assert torch.equal(model.colorize(gray, z), out)
        np.testing.assert_allclose(model.colorize(gray, z[:1]), model.colorize(gray, z[:1].repeat(2, 1)), atol=1e-5)
        assert (model.colorize(gray, z.flip(0)) - out).abs().max() > .01


def test_dropout_is_active_in_training_only():
    model = build()
    gray, style = pictures(model, 2)
    with torch.no_grad():
        assert torch.equal(model(gray, style), model(gray, style))
        model.train()
        assert (model(gray, style) - model(gray, style)).abs().max() > .01
        without = build(dropout=0.).train()  # nothing else is random in training
        assert torch.equal(without(gray, style), without(gray, style))


def test_untrained_codes_already_tell_pictures_apart():
    colors = torch.eye(3)[:, :, None, None].expand(-1, -1, 128, 128)                 # red, green, blue
    with torch.no_grad():
        spread = build(awake=False, latent=32).encode_style(colors).std(0)
    assert .1 < spread.mean() < 10


def test_sigmoid_keeps_codes_in_0_1_and_without_it_they_may_be_negative():
    plain, squashed = build(), build(sigmoid=True)
    squashed.load_state_dict(plain.state_dict())
    style = pictures(plain, 4)[1]
    with torch.no_grad():
        z, q = plain.encode_style(style), squashed.encode_style(style)
    assert z.min() < 0 < z.max() and 0 < q.min() and q.max() < 1
    np.testing.assert_allclose(q, 1 / (1 + np.exp(-z.numpy())), atol=1e-6)


# ---- gradients --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_reach_every_parameter(config):
    """All but those that AdaIN takes back: it strips a channel of its mean and deviation, so the transposed
    convolutions' biases and the scale and shift of each encoder stage's last BatchNorm cannot matter."""
    model = build(**CONFIGS[config], dropout=0.).train()
    gray, style = pictures(model, 4)
    model(gray, style).square().mean().backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    last = [f"encoder.{i}.{3 * convs - 1}" for i, convs in enumerate([2, 2, 2, 4, 4])]
    batch_norms = {f"{name}.{p}" for name in last for p in ("weight", "bias")}
    taken_back = {f"up.{i}.bias" for i in range(4)} | batch_norms if model.config.use_style else set()
    assert all(math.isfinite(n) for n in norms.values())
    assert {name for name, n in norms.items() if n < 1e-4 * max(norms.values())} == taken_back
