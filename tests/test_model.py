"""AdaIN against equation (1) written out, the network against the layer table of the paper."""
import math

import numpy as np
import pytest
import torch
from torch import nn

from adain import AdaIN
from model import Colorizer, ModelConfig, reflect_pad, start_as_authors, upsampling
from train import PRESETS, Settings

CONFIGS = {"rgb": {}, "lab": dict(color="lab"), "plain": dict(style=False), "sigmoid": dict(sigmoid=True),
           "relu": dict(relu=True), "resize": dict(resize=True)}


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
    return gray, torch.rand(batch, channels, 40, 36) - .5 * (channels == 2) if model.config.style else None


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


def test_untrained_adain_with_the_code_0_is_plain_instance_normalisation():
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
    total += conv(width + 1, channels, 1)                                             # the head; the gray photo joins
    if style:
        codes = [channels, 64, 128, 256, 512, latent]
        total += sum(conv(i, o, 3) for i, o in zip(codes, codes[1:]))
        total += sum((latent + 1) * 2 * c for c in enc + dec)                         # nine AdaIN layers
    return total


PINNED = {"final": 3_513_638, "unet": 28_333_830, "collapsed": 31_102_214, "combined": 31_102_214, "dual": 31_102_214,
          "lab": 3_513_044, "lpips-only": 3_513_638, "hue-rotation": 3_513_044}


@pytest.mark.parametrize("preset", PRESETS)
def test_parameter_count_of_each_preset(preset):
    """final: the 3,513,635 of the authors' network and 3 weights for the gray photo, which joins at the head."""
    s = Settings(**PRESETS[preset])
    with torch.device("meta"):  # no memory for networks of 30 million
        model = Colorizer(ModelConfig(s.color, s.width, s.latent, s.dropout, s.style, s.sigmoid, s.relu, s.resize))
    counted = sum(p.numel() for p in model.parameters())
    assert counted == count_by_hand(s.width, s.latent, s.style, {"rgb": 3, "lab": 2}[s.color]) == PINNED[preset]


def test_the_default_model_is_the_final_one():
    s = Settings()
    assert ModelConfig() == ModelConfig(s.color, s.width, s.latent, s.dropout, s.style, s.sigmoid, s.relu, s.resize)
    assert count_by_hand(16, 32, True, 3) - 3 == 3_513_635


# ---- shapes -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", CONFIGS)
def test_128x128_passes_an_8x8_bottleneck_and_nine_adain_layers(config):
    model = build(**CONFIGS[config])
    sizes = {}
    for name, module in model.named_modules():
        if name.startswith(("encoder.", "adain.")) and name.count(".") == 1:
            module.register_forward_hook(lambda m, i, out, name=name: sizes.update({name: tuple(out.shape[1:])}))
    gray, style = pictures(model, 2, 128, 128)
    with torch.no_grad():
        assert model(gray, style).shape == (2, 2 if config == "lab" else 3, 128, 128)
    down = [(4, 128, 128), (8, 64, 64), (16, 32, 32), (32, 16, 16), (32, 8, 8)]
    up = [(32, 16, 16), (16, 32, 32), (8, 64, 64), (4, 128, 128)]
    expected = {f"encoder.{i}": shape for i, shape in enumerate(down)}
    if model.config.style:
        expected.update({f"adain.{i}": shape for i, shape in enumerate(down + up)})
    assert sizes == expected


def test_each_encoder_stage_takes_the_largest_of_2x2_styled_features():
    model = build()
    styled, taken = {}, {}
    for i in range(5):
        model.adain[i].register_forward_hook(lambda m, args, out, i=i: styled.update({i: out}))
        model.encoder[i].register_forward_pre_hook(lambda m, args, i=i: taken.update({i: args[0]}))
    gray, style = pictures(model, 2)
    with torch.no_grad():
        model(gray, style)
    assert torch.equal(taken[0], gray)
    for i in range(1, 5):
        B, C, H, W = styled[i - 1].shape
        blocks = styled[i - 1].numpy().reshape(B, C, H // 2, 2, W // 2, 2)
        np.testing.assert_array_equal(taken[i], blocks.max((3, 5)))


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


def test_resize_convolution_sees_every_feature_four_times():
    up = upsampling(3, resize=True)
    x = torch.randn(2, 3, 4, 5)
    enlarged = torch.from_numpy(x.numpy().repeat(2, 2).repeat(2, 3))
    with torch.no_grad():
        np.testing.assert_allclose(up(x), nn.functional.conv2d(enlarged, *up[1].parameters(), padding=1), atol=1e-6)
    assert up[1].weight.shape == (3, 3, 3, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3), (16, 17), (16, 32), (31, 9), (33, 50)])
@pytest.mark.parametrize("multiple", [16, 4])
def test_reflect_pad_is_numpys_at_the_bottom_and_right(size, multiple):
    torch.manual_seed(0)
    x = torch.rand(2, 3, *size)
    expected = x.numpy()
    for axis, n in zip((2, 3), size):
        # One pixel has nothing to reflect, and repeats.
        mode = "reflect" if n > 1 else "edge"
        expected = np.pad(expected, [(0, -n % multiple if a == axis else 0) for a in range(4)], mode=mode)
    np.testing.assert_array_equal(reflect_pad(x, multiple), expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (17, 33), (127, 129)])
@pytest.mark.parametrize("config", ["rgb", "lab", "plain"])
def test_odd_sizes_are_padded_by_reflection_and_cut_back(config, size):
    model = build(**CONFIGS[config])
    gray, style = pictures(model, 1, *size)
    with torch.no_grad():
        out, padded = model(gray, style), model(reflect_pad(gray, 16), style)
    assert out.shape == (1, 2 if config == "lab" else 3, *size) and out.isfinite().all()
    np.testing.assert_allclose(out, padded[:, :, :size[0], :size[1]], atol=1e-5)


# ---- style codes ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", CONFIGS)
def test_nothing_depends_on_the_rest_of_the_batch(config):
    model = build(**CONFIGS[config])
    gray, style = pictures(model, 3)
    with torch.no_grad():
        together = model(gray, style)
        alone = torch.cat([model(gray[i:i + 1], style[i:i + 1] if model.config.style else None) for i in range(3)])
        assert (together[0] - together[1]).abs().max() > .01
        np.testing.assert_allclose(together, alone, atol=1e-4)
        if model.config.style:
            codes = model.train().encode_style(style)  # the style encoder has no BatchNorm: in training too
            np.testing.assert_allclose(codes, torch.cat([model.encode_style(s[None]) for s in style]), atol=1e-5)


@pytest.mark.parametrize("config", ["rgb", "lab", "sigmoid"])
def test_forward_is_encode_style_then_colorize_and_codes_may_be_given_in_three_forms(config):
    model = build(**CONFIGS[config])
    gray, style = pictures(model, 2)
    with torch.no_grad():
        z = model.encode_style(style)
        out = model(gray, style)
        assert z.shape == (2, 8)
        assert torch.equal(model.colorize(gray, z), out)
        assert torch.equal(model.colorize(gray, z[:, None].repeat(1, 9, 1)), out)      # (B, 9, D)
        for one in (z[:1], z[:1, None].repeat(1, 9, 1)):                              # (1, D), (1, 9, D)
            np.testing.assert_allclose(model.colorize(gray, one), model.colorize(gray, z[:1].repeat(2, 1)), atol=1e-5)
        assert (model.colorize(gray, z.flip(0)) - out).abs().max() > .01


@pytest.mark.parametrize("level", range(9))
def test_the_code_of_a_level_reaches_this_adain_layer_and_those_behind_it_only(level):
    model = build()
    seen = []
    for layer in model.adain:
        layer.register_forward_hook(lambda m, i, out: seen.append(out))
    gray, style = pictures(model, 1)
    with torch.no_grad():
        z = model.encode_style(style)[:, None].repeat(1, 9, 1)
        out = model.colorize(gray, z)
        before, seen[:] = seen[:], []
        z[:, level] += 1
        changed = model.colorize(gray, z)
    same = [torch.equal(a, b) for a, b in zip(before, seen)]
    assert same == [True] * level + [False] * (9 - level)
    assert (changed - out).abs().max() > 1e-4


def test_dropout_is_active_in_training_only():
    model = build()
    gray, style = pictures(model, 2)
    with torch.no_grad():
        assert torch.equal(model(gray, style), model(gray, style))
        model.train()
        assert (model(gray, style) - model(gray, style)).abs().max() > .01
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.  # nothing else is random in training
        assert torch.equal(model(gray, style), model(gray, style))


def test_untrained_codes_already_tell_pictures_apart():
    colours = torch.eye(3)[:, :, None, None].expand(-1, -1, 128, 128)                 # red, green, blue
    with torch.no_grad():
        spread = build(awake=False, latent=32).encode_style(colours).std(0)
    assert .1 < spread.mean() < 10


def test_sigmoid_keeps_codes_in_0_1_and_without_it_they_may_be_negative():
    plain, squashed = build(), build(sigmoid=True)
    squashed.load_state_dict(plain.state_dict())
    style = pictures(plain, 4)[1]
    with torch.no_grad():
        z, q = 5 * plain.encode_style(style), squashed.encode_style(style)
        assert z.min() < 0 < z.max() and 0 < q.min() and q.max() < 1
        np.testing.assert_allclose(q, 1 / (1 + np.exp(-z.numpy() / 5)), atol=1e-6)


def test_with_relu_a_code_is_the_mean_of_what_is_positive():
    plain, clipped = build(), build(relu=True)
    clipped.load_state_dict(plain.state_dict())
    maps = []
    clipped.style_encoder.convs[-1].register_forward_hook(lambda m, i, out: maps.append(out.clone().numpy()))
    style = pictures(plain, 4)[1]
    with torch.no_grad():
        z, q = plain.encode_style(style), clipped.encode_style(style)
    np.testing.assert_allclose(z, maps[0].mean((2, 3)), atol=1e-6)
    np.testing.assert_allclose(q, np.where(maps[0] > 0, maps[0], 0).mean((2, 3)), atol=1e-6)
    assert (q >= 0).all() and (z < -.01).any()


@pytest.mark.parametrize("part, changed", [("ours", set()), ("scales", {"adain"}), ("encoder", {"style_encoder"}),
                                           ("both", {"adain", "style_encoder"})])
def test_the_authors_initial_weights(part, changed):
    """Their scales N(1, .02) and shifts N(0, .02), and torch's U(-1/sqrt(n), 1/sqrt(n)) for n inputs in the encoder."""
    model = build(awake=False, width=16, latent=32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    after = start_as_authors(model, part).state_dict()
    assert {k.split(".")[0] for k, v in after.items() if not torch.equal(v, before[k])} == changed
    if "adain" in changed:
        scale, shift = torch.cat([layer.affine.weight.reshape(2, -1) for layer in model.adain], 1).detach()
        np.testing.assert_allclose([scale.mean(), scale.std(), shift.mean(), shift.std()], [1, .02, 0, .02], atol=1e-3)
        assert all(torch.equal(after[k], before[k]) for k in after if k.endswith("affine.bias"))  # 1 and 0
    if "style_encoder" in changed:
        for conv in model.style_encoder.convs:
            limit = conv.weight[0].numel() ** -.5
            assert .95 * limit < conv.weight.abs().max() <= limit and 0 < conv.bias.abs().max() <= limit
            assert abs(conv.weight.std() - limit / 3 ** .5) < .05 * limit


# ---- gradients --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_reach_every_parameter(config):
    """All but those that AdaIN takes back: it strips a channel of its mean and deviation, so the transposed
    convolutions' biases and the scale and shift of each encoder stage's last BatchNorm cannot matter."""
    model = build(**CONFIGS[config], dropout=0.).train()
    gray, style = pictures(model, 4)
    model(gray, style).square().mean().backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    taken_back = {f"up.{i}.{'1.' * model.config.resize}bias" for i in range(4)} | {f"encoder.{i}.{3 * convs - 1}.{p}" for i, convs in enumerate(
        [2, 2, 2, 4, 4]) for p in ("weight", "bias")} if model.config.style else set()
    assert all(math.isfinite(n) for n in norms.values())
    assert {name for name, n in norms.items() if n < 1e-4 * max(norms.values())} == taken_back
