"""The network of figure 1: a U-Net that colours a gray photo, steered by the code of a style picture.

    style (B, 3, H, W) --encode_style--> z (B, 32) --.
                                                     |  nine AdaIN layers
    gray  (B, 1, 128, 128) --encoder--> (B, 128, 8, 8) --decoder--> + head --> (B, 3, 128, 128)

In RGB the style picture and the output have 3 channels in [0, 1]; in LAB they have 2, a and b divided by 110.
The gray input is in [0, 1] (data.py says how it is made). Count the parameters of the final model:

    python -c "import model; print(sum(p.numel() for p in model.Colorizer().parameters()))"
"""
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from adain import AdaIN

STRIDE = 16  # four halvings: every side must be a multiple of 16 inside the network


@dataclass
class ModelConfig:
    """Everything that is needed to build the network again; saved in each checkpoint."""
    color: str = "rgb"      # "rgb": 3 channels out; "lab": only a and b, the photo keeps its own L
    width: int = 16         # channels of the first stage: 16 in the final model, 64 before its "scarcity"
    latent: int = 32        # numbers in a style code; the paper tried 16, 32, 64, 128
    dropout: float = 0.2    # after every block, in training only; 0 switches it off
    style: bool = True      # False: no style encoder, no AdaIN, the plain U-Net of table 1
    sigmoid: bool = False   # squash the code into (0, 1), as tried in section 3.2
    relu: bool = False      # a ReLU before the pooling that makes the code, as in the authors' program
    resize: bool = False    # up-sample by nearest neighbour and a 3x3 convolution, not by a transposed convolution


def reflect_pad(x, multiple):
    """Pad (B, C, H, W) at the bottom and the right to multiples of `multiple` by reflection.

    F.pad(mode="reflect") refuses to pad by as much as the picture is large. Counting back and forth,
    0 1 2 3 2 1 0 1 ..., has no such limit: a 1x1 picture simply repeats its one pixel.
    """
    for dim in (2, 3):
        n = x.shape[dim]
        if n % multiple:
            i = torch.arange(n + -n % multiple, device=x.device) % max(2 * (n - 1), 1)
            x = x.index_select(dim, torch.minimum(i, 2 * (n - 1) - i))
    return x


def conv_block(channels_in, channels_out, convs):
    """`convs` times 3x3 convolution -> ReLU -> BatchNorm (the paper's order); the first changes the width."""
    layers = []
    for _ in range(convs):
        layers += [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.ReLU(inplace=True),
                   nn.BatchNorm2d(channels_out)]
        channels_in = channels_out
    return nn.Sequential(*layers)


def upsampling(channels, resize):
    """Doubles the size of a feature map. The 4x4 kernel of a transposed convolution overlaps itself evenly, but its
    four phases have weights of their own, and so can paint a lattice; an enlarged map has no phases to tell apart."""
    if resize:
        return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels, 3, padding=1))
    return nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)


class StyleEncoder(nn.Module):
    """Five 3x3 convolutions of stride 2, then global average pooling: a picture becomes one short code.

    style: (B, C, H, W) of any size -> z: (B, D). No ReLU stands before the pooling unless `relu` asks for it, so
    a code may be negative and a dimension cannot die; no BatchNorm, so a code does not depend on its batch. Its
    widths are the authors', and did not shrink with the U-Net's.
    """

    def __init__(self, channels, latent, sigmoid=False, relu=False):
        super().__init__()
        widths = [channels, 64, 128, 256, 512, latent]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in zip(widths, widths[1:]))
        self.sigmoid, self.relu = sigmoid, relu
        for conv in self.convs:
            # torch's default lets the signal fade by a factor of about 2.4 a layer: all codes would start alike.
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)

    def forward(self, x):
        for conv in self.convs[:-1]:
            x = F.relu(conv(x), inplace=True)
        x = self.convs[-1](x)
        z = (F.relu(x) if self.relu else x).mean(dim=(2, 3))                          # (B, D)
        return torch.sigmoid(z) if self.sigmoid else z


class Colorizer(nn.Module):
    """U-Net + style encoder + AdaIN. `forward(gray, style)` is `colorize(gray, encode_style(style))`."""

    def __init__(self, config=None):
        super().__init__()
        self.config = c = config or ModelConfig()
        out_channels = {"rgb": 3, "lab": 2}[c.color]
        w = c.width
        widths = [w, 2 * w, 4 * w, 8 * w, 8 * w]                                      # of the five encoder stages
        # The two deepest stages, whose maps are small and cheap, hold four convolutions, the others two.
        self.encoder = nn.ModuleList(
            conv_block(i, o, convs) for i, o, convs in zip([1] + widths, widths, [2, 2, 2, 4, 4]))
        # A decoder stage: double the size, normalise, join the skip, fuse with a 1x1 convolution, three 3x3
        # convolutions of which the first narrows to the next stage's width.
        # (AdaIN takes away again what the bias or the BatchNorm just before it adds. The paper has both; the
        # BatchNorm still keeps the features within reason on their way, such a bias is idle.)
        ups = [8 * w, 4 * w, 2 * w, w]
        narrow = ups[1:] + [w]                                                        # [4w, 2w, w, w]
        self.up = nn.ModuleList(upsampling(i, c.resize) for i in ups)
        self.fuse = nn.ModuleList(nn.Conv2d(2 * i, i, 1) for i in ups)
        self.decoder = nn.ModuleList(conv_block(i, o, 3) for i, o in zip(ups, narrow))
        self.levels = len(widths) + len(ups)                                          # nine AdaIN layers
        if c.style:
            self.style_encoder = StyleEncoder(out_channels, c.latent, c.sigmoid, c.relu)
            self.adain = nn.ModuleList(AdaIN(i, c.latent) for i in widths + ups)
        # Made once, here: train() and eval() then switch it. Made inside forward() it would always be active.
        self.dropout = nn.Dropout(c.dropout)
        # The fifth skip connection is the gray picture itself. A head of zeros makes the untrained network
        # answer "leave it gray"; training then starts from there and not from noise.
        self.head = nn.Conv2d(w + 1, out_channels, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def encode_style(self, style):
        """Style pictures (B, 3 or 2, H, W) of any size -> codes (B, D), one a picture.

        Codes may be stored, averaged and blended: they are plain vectors.
        """
        return self.style_encoder(style)

    def colorize(self, gray, z=None):
        """Colour gray pictures with style codes.

        gray: (B, 1, H, W) in [0, 1], any size; z: (B, D) or (1, D), or one such code for each of the nine
        AdaIN levels as (B, 9, D), encoder first; None for the plain U-Net.
        Returns (B, 3, H, W) RGB around [0, 1], not clamped, or (B, 2, H, W) a, b / 110.
        """
        B, _, H, W = gray.shape
        if z is not None and z.dim() == 2:
            z = z[:, None].expand(-1, self.levels, -1)                                # (B, 9, D)
        gray = reflect_pad(gray, STRIDE)

        x, skips = gray, []
        for i, block in enumerate(self.encoder):
            if i:
                x = F.max_pool2d(x, 2)                                                # (B, ., H/2, W/2)
            x = self.dropout(self.restyle(block(x), z, i))
            skips.append(x)
        x = skips.pop()                                                               # (B, 8w, H/16, W/16)
        for i, (up, fuse, block) in enumerate(zip(self.up, self.fuse, self.decoder)):
            x = self.restyle(up(x), z, len(self.encoder) + i)                         # (B, ., 2H, 2W)
            x = fuse(torch.cat([x, skips.pop()], dim=1))
            x = self.dropout(block(x))
        out = self.head(torch.cat([x, gray], dim=1))                                  # (B, 3 or 2, H, W)
        if self.config.color == "rgb":
            out = gray + out  # learn the colour, not the picture
        return out[:, :, :H, :W]

    def restyle(self, x, z, level):
        """Normalise features with the code of this level; the plain U-Net passes them on."""
        return self.adain[level](x, z[:, level]) if self.config.style else x

    def forward(self, gray, style=None):
        return self.colorize(gray, self.encode_style(style) if self.config.style else None)


def start_as_authors(model, part):
    """Give an untrained network initial weights of the authors' program, to see what they do to the style codes.

    part: "scales": AdaIN's scales start at 1 + (1 + .02 n) z, n normal: nearly the same for all channels of a layer,
    its shifts at .02 n z; "encoder": the style encoder starts as torch makes it; "both"; "ours": all stays.
    Returns the model.
    """
    if part in ("scales", "both"):
        for layer in model.adain:
            scale, shift = layer.affine.weight.data.chunk(2)                          # 2 x (C, D)
            scale.normal_(1, .02)
            shift.normal_(0, .02)
    if part in ("encoder", "both"):
        for conv in model.style_encoder.convs:
            conv.reset_parameters()
    return model
