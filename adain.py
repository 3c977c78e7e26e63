"""Adaptive instance normalization with a learned scale and shift: equation (1) of the paper.

    AdaIN(x_i, y) = y_{s,i} * (x_i - mu(x_i)) / sigma(x_i) + y_{b,i}

(The printed equation has lost its minus sign; Karras et al. 2019, which it quotes, has it.)
x_i is channel i of a feature map. The style does not come as a picture but as a short code z: a linear layer
turns z into one scale and one shift for every channel, y = (y_s, y_b) = A z + c. The style reaches the
network only through these two numbers a channel.

See it normalize (the deviation of each channel becomes 1):

    python -c "import torch, adain; print(adain.AdaIN(4, 8)(torch.rand(1, 4, 99, 99), torch.zeros(1, 8)).std((2, 3)))"
"""
import torch
from torch import nn


def normalize(x, eps):
    """(x - mu) / sigma for each channel of each picture: (B, C, H, W) -> (B, C, H, W).

    torch does it about three times as fast as the formula written out: inside, it views (B, C, H, W) as one
    picture of B*C channels, (1, B*C, H, W), and takes batch normalization of that. (F.instance_norm is the
    same, but refuses maps of 1x1. torch asks for cudnn_enabled; here its value changes nothing.)
    """
    return torch.instance_norm(x, weight=None, bias=None, running_mean=None, running_var=None,
                               use_input_stats=True, momentum=0., eps=eps, cudnn_enabled=False)


class AdaIN(nn.Module):
    """Adaptive instance normalization whose scale and shift are read from a style code.

    x: (B, C, H, W) features; z: (B, D) style codes, or (1, D) for the whole batch -> (B, C, H, W).
    First every channel loses its own mean and deviation, then it gets the scale and shift computed from z.
    mu and sigma are taken over one picture, so the result never depends on what else is in the batch.
    """

    def __init__(self, channels, latent, eps=1e-5):
        super().__init__()
        self.eps = eps  # added to sigma^2: a constant channel (sigma = 0) becomes 0 instead of 0 / 0
        self.affine = nn.Linear(latent, 2 * channels)
        # The code z = 0 gives scale 1 and shift 0, and the weights are small: training starts from plain
        # instance normalization, the same for every style. With weights of the usual size each style would
        # start with its own random rescaling of every channel, which the first steps would have to undo.
        nn.init.normal_(self.affine.weight, std=0.01)
        with torch.no_grad():
            self.affine.bias.copy_(torch.cat([torch.ones(channels), torch.zeros(channels)]))

    def forward(self, x, z):
        # bfloat16, which train.py --amp computes in, has two to three digits: too few to subtract a mean.
        with torch.autocast(x.device.type, enabled=False):
            y = self.affine(z.float())[:, :, None, None]                        # (B, 2C, 1, 1)
            scale, shift = y.chunk(2, dim=1)                                    # y_s, y_b: (B, C, 1, 1)
            return scale * normalize(x.float(), self.eps) + shift               # equation (1)
