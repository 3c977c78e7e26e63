"""What the network is trained on, and what its results are measured with.

    training loss = mse * MSE + lpips * LPIPS [+ palette * sliced Wasserstein]          (section 2.2)

LPIPS (Zhang et al. 2018, version 0.1) is written out here: a frozen VGG16 or AlexNet looks at both pictures,
and the distance is taken between what it sees. Pictures are RGB in [0, 1] everywhere in this file.

    python -c "import torch, losses; print(losses.LPIPS('alex')(*torch.rand(2, 1, 3, 64, 64)))"
"""
import http.client
import os
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from data import (UserError, directions, network_to_rgb, reason, rgb_to_lab, rgb_to_network, show,
                  sliced_wasserstein)

# ---- LPIPS ------------------------------------------------------------------------------------------------
# (channels, kernel, stride, padding) of each convolution; "pool" with (kernel, stride). Layers keep the
# numbers they have in torchvision's `features`, so that published weight files fit as they are.
TRUNKS = {
    "vgg": [(64, 3, 1, 1), (64, 3, 1, 1), (2, 2), (128, 3, 1, 1), (128, 3, 1, 1), (2, 2),
            (256, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1), (2, 2), (512, 3, 1, 1), (512, 3, 1, 1), (512, 3, 1, 1),
            (2, 2), (512, 3, 1, 1), (512, 3, 1, 1), (512, 3, 1, 1)],
    "alex": [(64, 11, 4, 2), (3, 2), (192, 5, 1, 2), (3, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)],
}
TAPS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}  # the ReLUs whose output is compared
URLS = {"vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
        "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"}  # name ends in the SHA-256's start
LINEAR_WEIGHTS = Path(__file__).parent / "weights" / "lpips_linear.pt"


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


def trunk_file(net, path=""):
    """Where the trunk's weights are: `path`, else the folder COLORIZER_WEIGHTS, else torch's hub cache.

    If none has them they are downloaded into the cache, with progress and hash check. Raises UserError.
    """
    name = URLS[net].rsplit("/", 1)[-1]
    if path:
        return Path(path)
    cache = Path(torch.hub.get_dir(), "checkpoints")
    for folder in [os.environ.get("COLORIZER_WEIGHTS"), cache]:
        for candidate in [name, {"vgg": "vgg16", "alex": "alexnet"}[net] + "_features.pth"]:
            if folder and Path(folder, candidate).is_file():
                return Path(folder, candidate)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URLS[net], str(cache / name), hash_prefix=name.split("-")[-1][:8])
    except (OSError, RuntimeError, http.client.HTTPException) as error:  # no network; wrong hash; cut off
        raise UserError(f"cannot download the weights of LPIPS ({reason(error)}): fetch {URLS[net]} "
                        f"on another machine and put it into {show(cache)} or the folder $COLORIZER_WEIGHTS, or name "
                        "it with --lpips-weights FILE; --lpips 0 trains without") from None
    return cache / name


def load_trunk(net, path=""):
    """The trunk with its published weights: torchvision's whole network or its `features` alone.

    Only the convolutions are kept. Raises UserError for a file that is not this network's.
    """
    path = trunk_file(net, path)
    trunk = make_trunk(net)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {k.removeprefix("features."): v for k, v in state.items() if not k.startswith("classifier.")}
        trunk.load_state_dict(state)
    except FileNotFoundError:
        raise UserError(f"--lpips-weights {show(path)}: no such file") from None
    except Exception:  # not a torch file, not a dict, other keys or other shapes: one cure for all
        raise UserError(f"{show(path)}: does not hold the {net} weights; fetch {URLS[net]}") from None
    return trunk


class LPIPS(nn.Module):
    """Learned perceptual distance of two batches of pictures, both RGB (B, 3, H, W) in [0, 1] -> (B,).

    `target` gets no gradient and keeps no graph. Always computed in fp32, also under autocast: half
    precision rounds away the small differences that it is made of.
    """

    def __init__(self, net="vgg", trunk=None):
        super().__init__()
        self.trunk = trunk if trunk is not None else load_trunk(net)
        self.taps = TAPS[net]
        linear = torch.load(LINEAR_WEIGHTS, map_location="cpu", weights_only=True)[net]
        for i, w in enumerate(linear):                                                # (1, C, 1, 1), all >= 0
            self.register_buffer(f"linear{i}", w)
        # The trunk was trained on normalised photos; these constants come with LPIPS and expect [-1, 1].
        self.register_buffer("shift", torch.tensor([-.030, -.088, -.188])[None, :, None, None])
        self.register_buffer("scale", torch.tensor([.458, .448, .450])[None, :, None, None])
        self.requires_grad_(False)

    def features(self, x):
        """Unit-length features at the five taps."""
        x = (2 * x - 1 - self.shift) / self.scale
        found = []
        for i, layer in enumerate(self.trunk):
            # The next ReLU works in place on its own convolution's output only, never on what was kept.
            x = layer(x)
            if i in self.taps:
                # The small number stands inside the root: outside, as in the original, an all-zero
                # feature vector has a NaN gradient, and flat dark areas can produce such vectors.
                found.append(x * torch.rsqrt(x.square().sum(1, keepdim=True) + 1e-10))
        return found

    def forward(self, x, target):
        with torch.autocast(x.device.type, enabled=False):
            with torch.no_grad():
                wanted = self.features(target.float())
            distance = 0
            for i, (a, b) in enumerate(zip(self.features(x.float()), wanted)):
                distance = distance + F.conv2d((a - b).square(), self.get_buffer(f"linear{i}")).mean((1, 2, 3))
        return distance                                                               # (B,)


# ---- the training loss ------------------------------------------------------------------------------------

def color_loss(out, gray, rgb, style, color, weights, lpips=None, turn=0.):
    """The colourisation loss of section 2.2.

    out: the network's answer to gray (B, 1, H, W); rgb: the photo it should be; style: the style picture.
    color: "rgb" or "lab": MSE is taken on RGB or on a, b / 110, LPIPS always on RGB.
    weights: {"mse": w, "lpips": w, "palette": w}, a zero leaves the term out; the palette term compares the
    (a, b) cloud of the output with the style's, along 8 directions that `turn` of their spacing rotates.
    Returns the weighted sum and a dictionary of the terms (means over the batch, without graph).
    """
    terms = {}
    if weights["mse"]:
        terms["mse"] = F.mse_loss(out, rgb_to_network(rgb, color))
    if weights["lpips"]:
        terms["lpips"] = lpips(network_to_rgb(out, gray, color), rgb).mean()
    if weights["palette"]:
        ab = out if color == "lab" else rgb_to_network(out.clamp(0, 1), "lab")
        # A quarter of the pixels is cloud enough. The output's are means of 2x2, so that the network gains nothing by
        # mixing its colours in a lattice of dots, to which its transposed convolutions lend themselves.
        terms["palette"] = sliced_wasserstein(F.avg_pool2d(ab, 2), rgb_to_network(style, "lab")[:, :, 1::2, 1::2],
                                              directions(8, out.device, turn)).mean()
    return sum(weights[k] * v for k, v in terms.items()), {k: v.detach() for k, v in terms.items()}


# ---- measures of a result ---------------------------------------------------------------------------------

def psnr(x, y):
    """Peak signal-to-noise ratio in dB of pictures (B, 3, H, W) in [0, 1] -> (B,)."""
    return -10 * (x - y).square().mean((1, 2, 3)).clamp(min=1e-10).log10()


def ssim(x, y):
    """Structural similarity (Wang et al. 2004), (B, C, H, W) in [0, 1] -> (B,), at most 1.

    11x11 Gaussian window, sigma 1.5, K1 .01, K2 .03, only where the whole window fits; needs H, W >= 11.
    """
    i = torch.arange(11, device=x.device) - 5.
    g = torch.exp(-i.square() / (2 * 1.5 ** 2))
    C = x.shape[1]
    window = (g[:, None] * g / g.sum() ** 2).expand(C, 1, 11, 11)

    def blur(x):
        return F.conv2d(x, window, groups=C)
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = .01 ** 2, .03 ** 2
    return ((2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean((1, 2, 3))


def palette_distances(out, style):
    """The two sums that palette transfer is made of, RGB (B, 3, H, W) in [0, 1] twice -> (B,), (B,).

    W(out, style) and W(gray, style), sliced Wasserstein distances in CIELAB a, b along 32 directions, gray
    being a cloud of zeros. Palette transfer of a set is 1 - sum of the first / sum of the second:
    0 = as far away as a gray picture, 1 = exactly the style's palette.
    """
    a, b = rgb_to_lab(out)[:, 1:], rgb_to_lab(style)[:, 1:]
    along = directions(32, out.device)
    return sliced_wasserstein(a, b, along), sliced_wasserstein(torch.zeros_like(a), b, along)


def colourfulness(x):
    """Hasler & Suesstrunk 2003 on the 0-255 scale, RGB (B, 3, H, W) in [0, 1] -> (B,); 0 for gray."""
    r, g, b = (x * 255).flatten(2).unbind(1)                                          # 3 x (B, HW)
    rg, yb = r - g, (r + g) / 2 - b
    spread = (rg.var(1, correction=0) + yb.var(1, correction=0)).sqrt()
    return spread + .3 * (rg.mean(1).square() + yb.mean(1).square()).sqrt()
