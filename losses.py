"""The losses that training minimizes, and the measures of a result.

    color loss = mse * MSE + lpips * LPIPS              (section 2.2)
                 + palette * sliced Wasserstein         (ours, optional)

train.py adds two more losses for some presets: pair_loss, and style_loss (section 3.2).

LPIPS (Zhang et al. 2018, version 0.1) is written out here: a frozen VGG16 or AlexNet, the "trunk", computes
features of both pictures, and LPIPS is the distance of these features, with a learned weight for each of
their channels. Pictures are RGB in [0, 1] unless a docstring says otherwise.

    python -c "import torch, losses; x = torch.rand(4, 3, 64, 64); print(losses.psnr(x, x / 2))"
"""
import os
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from data import (UserError, box_mean, download, load_torch_file, network_to_rgb, printable, rgb_to_lab,
                  rgb_to_network, sliced_wasserstein)

# ---- LPIPS ------------------------------------------------------------------------------------------------
# (channels, kernel, stride, padding) of each convolution, (kernel, stride) of each max-pooling. Layers keep
# the numbers they have in torchvision's `features`, so that published weight files fit as they are.
TRUNKS = {"vgg": [(64, 3, 1, 1)] * 2 + [(2, 2)] + [(128, 3, 1, 1)] * 2 + [(2, 2)] + [(256, 3, 1, 1)] * 3
                 + [(2, 2)] + [(512, 3, 1, 1)] * 3 + [(2, 2)] + [(512, 3, 1, 1)] * 3,
          "alex": [(64, 11, 4, 2), (3, 2), (192, 5, 1, 2), (3, 2), (384, 3, 1, 1)] + [(256, 3, 1, 1)] * 2}
TAPS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}  # the ReLUs whose output is compared
URLS = {"vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
        "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"}  # names hold 8 digits of SHA-256
FEATURE_FILES = {"vgg": "vgg16_features.pth", "alex": "alexnet_features.pth"}  # the convolutions alone
LINEAR_WEIGHTS = Path(__file__).resolve().parent / "weights" / "lpips_linear.pt"


def make_trunk(net):
    """The convolutional part of VGG16 or AlexNet with torch's random weights: an nn.Sequential."""
    layers, channels = [], 3
    for spec in TRUNKS[net]:
        if len(spec) == 2:
            layers.append(nn.MaxPool2d(*spec))
        else:
            layers += [nn.Conv2d(channels, *spec), nn.ReLU(inplace=True)]
            channels = spec[0]
    return nn.Sequential(*layers)


def trunk_file(net):
    """Where the trunk's weights are: in the folder $COLORIZER_WEIGHTS, else in torch's cache.

    If neither has them they are downloaded into the cache, with progress and hash check. Raises UserError.
    """
    name, cache = URLS[net].rsplit("/", 1)[-1], Path(torch.hub.get_dir(), "checkpoints")
    for folder in (os.environ.get("COLORIZER_WEIGHTS"), cache):
        for candidate in (name, FEATURE_FILES[net]):
            if folder and os.path.isfile(Path(folder, candidate)):
                return Path(folder, candidate)
    download(URLS[net], cache / name, name.split("-")[-1][:8],
             f"fetch it on another machine and put it into {printable(cache)} or $COLORIZER_WEIGHTS, or name "
             "it with --lpips-weights FILE; train.py --lpips 0 works without")
    return cache / name


def load_trunk(net, path=""):
    """The trunk with its published weights, from `path` or where trunk_file finds them.

    The file holds torchvision's whole network or its `features` alone; only the convolutions are kept.
    Raises UserError for a file that is not this network's.
    """
    path = path or trunk_file(net)
    if not os.path.isfile(path):
        raise UserError("no such file for --lpips-weights", path)
    trunk = make_trunk(net)
    try:
        trunk.load_state_dict({k.removeprefix("features."): v for k, v in load_torch_file(path).items()
                               if not k.startswith("classifier.")})
    except Exception:  # not a torch file, not a dict, other keys or other shapes: one cure for all
        raise UserError(f"does not hold the {net} weights; fetch {URLS[net]}", path) from None
    return trunk


class LPIPS(nn.Module):
    """Learned perceptual distance of two batches of pictures, both RGB (B, 3, H, W) in [0, 1] -> (B,).

    `target` gets no gradient and keeps no graph. Always computed in float32, also under autocast: half
    precision rounds away the small differences that this distance is made of. (Convolutions on an RTX 30 or
    newer round their input to 10 bits, as torch lets them: to TF32.)
    """

    def __init__(self, net, trunk):
        super().__init__()
        self.trunk, self.taps = trunk, TAPS[net]
        self.linear = nn.ParameterList(torch.load(LINEAR_WEIGHTS, weights_only=True)[net])  # 5 x (1, C, 1, 1), >= 0
        # The trunk was trained on normalized photos; these constants come with LPIPS and expect [-1, 1].
        self.register_buffer("shift", torch.tensor([-.030, -.088, -.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([.458, .448, .450])[None, :, None, None])
        self.requires_grad_(False)

    def features(self, x):
        """Features of unit length at the five taps: five times (B, C, H', W')."""
        x = (2 * x - 1 - self.shift) / self.scale
        found = []
        for i, layer in enumerate(self.trunk):
            x = layer(x)  # (an in-place ReLU overwrites the convolution's answer, which nobody else reads)
            if i in self.taps:
                # The small number stands inside the root. Outside, as in the original, a feature vector of
                # zeros has a NaN gradient, and flat dark areas can produce such vectors.
                found.append(x * torch.rsqrt(x.square().sum(1, keepdim=True) + 1e-10))
        return found

    def forward(self, x, target):
        with torch.autocast(x.device.type, enabled=False):
            with torch.no_grad():
                wanted = self.features(target.float())
            return sum(F.conv2d((f - g).square(), w).mean((1, 2, 3))            # (B,)
                       for f, g, w in zip(self.features(x.float()), wanted, self.linear))


# ---- training losses --------------------------------------------------------------------------------------

def color_loss(out, gray, rgb, space, loss_weights, lpips=None, offset=0.):
    """The colorization loss of section 2.2.

    out: the network's answer to gray (B, 1, H, W); rgb: the photo it should be, (B, 3, H, W).
    space: "rgb" or "lab": MSE is taken on RGB or on a, b / 110, LPIPS always on RGB.
    loss_weights: {"mse": w, "lpips": w, "palette": w}; a zero leaves the term out. lpips: an LPIPS module, if
    its weight is not 0; offset: turns the directions of the palette loss.
    Returns the weighted sum and a dictionary of the terms (means over the batch, without graph).
    """
    terms = {}
    if loss_weights["mse"]:
        terms["mse"] = F.mse_loss(out, rgb_to_network(rgb, space))
    if loss_weights["lpips"]:
        terms["lpips"] = lpips(network_to_rgb(out, gray, space), rgb).mean()
    if loss_weights["palette"]:
        terms["palette"] = palette_loss(out, rgb, space, offset)
    loss = sum(loss_weights[k] * v for k, v in terms.items())
    return loss, {k: v.detach() for k, v in terms.items()}


def palette_loss(out, rgb, space, offset=0.):
    """Distance between the palettes of the network's answer and of a picture; not in the paper.

    Where a color is in doubt, MSE's best answer is the mean of all likely ones, which is pale. A pale palette
    is simply far from a strong one. The distance is taken along 8 directions; offset turns them (data.py,
    sliced_wasserstein). Training draws it from [0, 1] for each batch, so that in time all directions count. A
    quarter of the pixels is enough: every second row and column of the picture, and for the output the means
    of 2x2 pixels, so that the network gains nothing by mixing colors in a checkerboard.
    """
    ab = out if space == "lab" else rgb_to_network(out.clamp(0, 1), "lab")
    wanted = rgb_to_network(rgb, "lab")[:, :, 1::2, 1::2]  # (B, 2, H/2, W/2), as avg_pool2d makes it
    return sliced_wasserstein(F.avg_pool2d(ab, 2), wanted, 8, offset).mean()


def pair_loss(ab, lab, pixels=384):
    """One thing keeps one color: within / (between + 1), two mean distances of pixels of the output.

    within: of pixels that had one true color in the photo. They should have one color now, under any style,
    for which no other truth exists. between: of pixels of equal lightness that had different colors; they
    should differ. (Without it, coloring by lightness alone would do.) All pairs of some random pixels are
    looked at; pictures with too few pairs for `between` are left out. (An all gray answer makes this loss
    small, too. The palette loss is there against that.)
    ab: the output's a, b (B, 2, H, W); lab: the photo's true L, a, b (B, 3, H, W); both in the units of LAB.
    """
    chosen = torch.randint(ab[0, 0].numel(), (pixels,), device=ab.device)

    def distances(x):
        """Between all pairs of the chosen pixels, in LAB; the eye just sees a difference of 2.3."""
        x = x.flatten(2)[:, :, chosen]                                          # (B, C, N)
        return ((x[:, :, :, None] - x[:, :, None]).square().sum(1) + 1e-6).sqrt()  # (B, N, N)

    # Every pair gets two weights. same: near 1 if the true colors agree, falling off at a distance of about
    # 5. apart: near 1 if the lightness agrees, falling off at about 4, and a, b differ by more than 12.
    true = box_mean(lab, 1)  # 3x3 means, against noise
    same = torch.exp(-(distances(true) / 5).square())                          # (B, N, N), 1 = the same color
    apart = torch.exp(-(distances(true[:, :1]) / 4).square()) * (distances(true[:, 1:]) > 12)
    d = distances(ab)
    within, between = ((w * d).sum((1, 2)) / (w.sum((1, 2)) + 1e-6) for w in (same, apart))  # (B,), (B,)
    # The 1 keeps the quotient small where both are near 0. Above 2 it is clamped, so that no single photo
    # decides the step: a constant has no gradient.
    ratio = within / (between + 1)
    enough = (apart.mean((1, 2)) > .002).float()                                # (B,), mean over all pairs
    return (ratio.clamp(max=2) * enough).sum() / enough.sum().clamp(min=1)


def code_of_result(model, gray, out):
    """The style code (B, D) of a result, out (B, 3 or 2, H, W) as the network gives it."""
    space = model.config.space
    return model.encode_style(rgb_to_network(network_to_rgb(out, gray, space).clamp(0, 1), space))


def style_loss(model, gray, z, out):
    """Section 3.2, the attempt that failed: the code of the result should be the code z (B, D) of the style.

    As in the paper, the result's code is taken without gradient. So only the style encoder can lower this
    loss, and nothing fixes the scale of its codes: with foreign styles they shrink to zero, with the photo's
    own they explode, but not with that gradient (experiments/README.md). Returns a scalar tensor.
    """
    with torch.no_grad():
        result = code_of_result(model, gray, out)
    return F.mse_loss(z.float(), result)


# ---- measures of a result ---------------------------------------------------------------------------------

def psnr(x, y):
    """Peak signal-to-noise ratio in dB of pictures (B, 3, H, W) in [0, 1] -> (B,)."""
    return -10 * (x - y).square().mean((1, 2, 3)).clamp(min=1e-10).log10()


def palette_distances(out, style):
    """Two distances for each picture, RGB (B, 3, H, W) in [0, 1] twice -> (B,), (B,).

    W(out, style) and W(gray, style), sliced Wasserstein distances in CIELAB a, b along 32 directions; gray is
    a cloud of zeros. Palette transfer of a set is 1 - sum of the first / sum of the second:
    0 = as far away as a gray picture, 1 = exactly the style's palette.
    """
    found, wanted = rgb_to_lab(out)[:, 1:], rgb_to_lab(style)[:, 1:]            # (B, 2, H, W) each
    return sliced_wasserstein(found, wanted, 32), sliced_wasserstein(torch.zeros_like(found), wanted, 32)
