"""The network of figure 1: a U-Net that colors a gray photo, steered by the code of a style picture.

    style (B, 3, H, W) --encode_style--> z (B, 32), which each AdaIN layer reads
    gray (B, 1, 128, 128) --encoder, 5 AdaIN--> (B, 128, 8, 8) --decoder, 4 AdaIN--> (B, 16, 128, 128)
         --head, with the gray picture once more--> (B, 3, 128, 128)

In RGB the style picture and the output have 3 channels in [0, 1]; in LAB they have 2, a and b divided by 110.
The gray input is in [0, 1] (data.py, gray_of). Count the parameters of the paper's final model:

    python -c "import model; print(sum(p.numel() for p in model.Colorizer().parameters()))"
"""
from dataclasses import dataclass, field, fields

import torch
from torch import nn
from torch.nn import functional as F

from adain import AdaIN

STRIDE = 16  # of the whole network, four halvings: inside of it every side must be a multiple of 16


# ---- settings (on a first reading the seven in ModelConfig are enough; go on at conv_block) ----------------

def setting(default, help, choices=(), low=0, high=2 ** 31 - 1):
    """A dataclass field that carries its own help text, choices and bounds.

    The command line, the check of a checkpoint and the check of --resume are all made from these fields:
    a new setting needs this one line, and its use.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high})


@dataclass
class ModelConfig:
    """All that is needed to build the network again; every checkpoint holds it as a plain dictionary."""
    space: str = setting("rgb", "what the network makes: rgb, or a and b for the photo's L", ("rgb", "lab"))
    width: int = setting(16, "channels of the first stage; 64 before \"scarcity\"", low=1, high=256)
    latent: int = setting(32, "numbers in a style code; the paper tried 16, 32, 64, 128", low=1, high=4096)
    dropout: float = setting(.2, "share of features set to 0 after every block, in training only", high=.95)
    use_style: bool = setting(True, "style encoder and AdaIN; without them it is the plain U-Net of table 1")
    sigmoid: bool = setting(False, "squash the style code into (0, 1), as tried in section 3.2")
    padding: str = setting("zeros", "what 3x3 convolutions of the U-Net see beyond a border", ("zeros", "replicate"))

    def check(self):
        """Raise ValueError for the first setting of a wrong type or outside its bounds; returns self.

        A value may come from a foreign file and be huge or hold control characters, so it is never printed.
        """
        for f in fields(self):
            value, rule = getattr(self, f.name), f.metadata
            if type(value) is not f.type:  # a bool is an int, but no width
                raise ValueError(f"{f.name} must be of type {f.type.__name__}")
            if rule["choices"] and value not in rule["choices"]:
                raise ValueError(f"{f.name} must be one of {', '.join(rule['choices'])}")
            if f.type in (int, float) and not rule["low"] <= value <= rule["high"]:  # this refuses nan, too
                raise ValueError(f"{f.name} must be from {rule['low']} to {rule['high']}")
        return self

    @classmethod
    def from_file(cls, values):
        """Settings from a dictionary that a file held. Raises ValueError that names what is wrong with it.

        A setting that the file lacks is newer than the file and gets its default. One that this program does
        not know is refused, unless it is False or 0.0: old files hold settings that are gone, and one that
        was off changes nothing.
        """
        known = {f.name for f in fields(cls)}
        for name, value in values.items():
            if name not in known and not (type(value) in (bool, float) and value == 0):
                raise ValueError(f"this program has no setting {str(name)[:40]!a}")
        return cls(**{k: v for k, v in values.items() if k in known}).check()


# ---- the parts --------------------------------------------------------------------------------------------

def conv_block(channels_in, channels_out, count, padding):
    """`count` times 3x3 convolution -> ReLU -> BatchNorm (the paper's order); the first changes the width.

    (B, channels_in, H, W) -> (B, channels_out, H, W). Each 3x3 convolution sees one pixel further in every
    direction, so two of them look at 5x5 pixels, with fewer weights than one convolution of 5x5.
    With zero padding a convolution can tell where the border is, and colors then depend on the place;
    "replicate" repeats the border's features, so that the border can hardly be told. (Transposed
    convolutions keep their zeros.)
    """
    layers = []
    for channels in [channels_in] + [channels_out] * (count - 1):  # what each convolution receives
        # BatchNorm normalizes each channel over the whole batch, so that the next layer gets numbers of one
        # size, whatever this one has learned. In use (eval) it takes averages kept from training instead.
        layers += [nn.Conv2d(channels, channels_out, 3, padding=1, padding_mode=padding),
                   nn.ReLU(inplace=True), nn.BatchNorm2d(channels_out)]
    return nn.Sequential(*layers)


class StyleEncoder(nn.Module):
    """Five 3x3 convolutions of stride 2, then the mean over the picture: a picture becomes one short code.

    style: (B, C, H, W) of any size -> z: (B, D). The mean adds up all places: a code can hold which colors a
    picture has and how strong they are, but not its shapes. (Where a color was is not lost altogether: the
    zeros beyond the border can be told, and a picture upside down has another code.)
    No ReLU follows the last convolution: with one, a number of the code could become 0 for every picture, and
    never learn again. No BatchNorm, so a code does not depend on the rest of its batch. The widths are the
    authors'; they did not shrink with the U-Net's.
    """

    def __init__(self, channels, latent):
        super().__init__()
        widths = [channels, 64, 128, 256, 512, latent]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, 2, padding=1) for i, o in zip(widths, widths[1:]))
        for conv in self.convs:
            # torch's own weights make the signal 2.4 times smaller in each layer. After five of them hardly
            # anything is left, and all codes would start alike.
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)

    def forward(self, x):
        for conv in self.convs[:-1]:
            x = F.relu(conv(x), inplace=True)                                   # (B, 512, H/16, W/16) at last
        return self.convs[-1](x).mean(dim=(2, 3))                             # (B, D), global average pooling


# ---- the network ------------------------------------------------------------------------------------------

class Colorizer(nn.Module):
    """U-Net + style encoder + AdaIN. `forward(gray, style)` is `colorize(gray, encode_style(style))`.

    A U-Net (Ronneberger et al. 2015) has two halves. The encoder makes the picture smaller and smaller and
    its features more and more: a pixel of the smallest map stands for 16x16 pixels and has seen far more, so
    there it can be known what a thing is. The decoder goes back to the full size. On the way down the exact
    place of every edge is lost; skip connections hand the encoder's map of the same size to the decoder.
    """

    def __init__(self, config=None):
        super().__init__()
        self.config = c = config or ModelConfig()
        w, out_channels = c.width, {"rgb": 3, "lab": 2}[c.space]
        downs = [w, 2 * w, 4 * w, 8 * w, 8 * w]                          # channels of the five encoder stages
        ups = [8 * w, 4 * w, 2 * w, w]                       # channels that the four decoder stages receive

        # Encoder. Channels double where sides are halved. The two deepest stages, whose maps are small, have
        # 4 convolutions, the others 2.
        self.encoder = nn.ModuleList(
            conv_block(i, o, n, c.padding) for i, o, n in zip([1] + downs, downs, [2, 2, 2, 4, 4]))
        # Decoder. A stage doubles the size, applies AdaIN, joins the skip connection, fuses both with a 1x1
        # convolution, and applies three 3x3 convolutions. The first of these narrows to the next width.
        # A 4x4 transposed convolution of stride 2 computes the four pixels of each 2x2 block with different
        # weights, so it can leave a checkerboard; the paper has it, and infer.py filters it out.
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, i, 4, stride=2, padding=1) for i in ups)
        self.fuse = nn.ModuleList(nn.Conv2d(2 * i, i, 1) for i in ups)
        self.decoder = nn.ModuleList(conv_block(i, o, 3, c.padding) for i, o in zip(ups, ups[1:] + [w]))
        # AdaIN normalizes every channel anew, so a bias or a positive scale of BatchNorm right before it has no
        # effect. Both stay, because the paper has them.
        if c.use_style:
            self.style_encoder = StyleEncoder(out_channels, c.latent)
            self.adain = nn.ModuleList(AdaIN(i, c.latent) for i in downs + ups)
        # Dropout is made here, so that train() and eval() switch it; made in forward() it would always be on.
        self.dropout = nn.Dropout(c.dropout)
        # The fifth skip connection is the gray picture itself, as one more channel of the head. A head of
        # zeros makes the untrained network answer "leave it gray": training starts there, not from noise.
        self.head = nn.Conv2d(w + 1, out_channels, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def encode_style(self, style):
        """Style pictures (B, 3 or 2, H, W) of any size -> codes (B, D), one a picture.

        Codes are plain vectors: they may be stored, averaged and blended.
        """
        z = self.style_encoder(style)
        return z.sigmoid() if self.config.sigmoid else z

    def restyle(self, x, z, layer):
        """AdaIN layer 0 to 8, five in the encoder and four in the decoder; the plain U-Net has none."""
        return self.adain[layer](x, z) if self.config.use_style else x

    def colorize(self, gray, z=None):
        """Color gray pictures with style codes.

        gray: (B, 1, H, W) in [0, 1], any size; z: (B, D), or (1, D) for all of them, or None for the plain U-Net.
        Returns (B, 3, H, W) RGB around [0, 1], not clamped, or (B, 2, H, W) a, b / 110.
        """
        # The last row and column are repeated up to a multiple of STRIDE, and cut off again at the end.
        H, W = gray.shape[2:]
        if H % STRIDE or W % STRIDE:
            gray = F.pad(gray, (0, -W % STRIDE, 0, -H % STRIDE), mode="replicate")

        # Encoder: five stages at the sizes H, H/2, ... H/16. Dropout sets random features to 0 in training,
        # so that no single one can be relied on.
        x, skips = gray, []
        for layer, block in enumerate(self.encoder):
            x = F.max_pool2d(x, 2) if layer else x                              # from the second stage on: half
            x = self.dropout(self.restyle(block(x), z, layer))                  # w, 2w, 4w, 8w, 8w channels
            skips.append(x)
        x = skips.pop()  # the deepest map is the bottleneck, (B, 8w, H/16, W/16), and no skip connection

        # Decoder: four stages, each at twice the size of the one before. pop() takes the encoder's maps in
        # reverse order, so the sizes meet.
        for layer, (up, fuse, block) in enumerate(zip(self.up, self.fuse, self.decoder), start=5):
            x = self.restyle(up(x), z, layer)                                   # (B, C, 2H, 2W)
            x = fuse(torch.cat([x, skips.pop()], dim=1))                        # (B, 2C, ...) -> (B, C, ...)
            x = self.dropout(block(x))                                          # (B, C/2, 2H, 2W), at last C
        # A 1x1 convolution makes the colors of each pixel from its w features and its gray value.
        out = self.head(torch.cat([x, gray], dim=1))                            # (B, 3 or 2, H, W)
        if self.config.space == "rgb":
            out = gray + out  # so the head makes only the difference from gray
        return out[:, :, :H, :W]

    def forward(self, gray, style=None):
        return self.colorize(gray, self.encode_style(style) if self.config.use_style else None)
