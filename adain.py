"""Adaptive instance normalisation with learned statistics: equation (1) of the paper.

    AdaIN(x_i, y) = y_{s,i} * (x_i - mu(x_i)) / sigma(x_i) + y_{b,i}

(The printed equation has lost the minus sign; Karras et al. 2019, which it quotes, has it.)
x_i is channel i of a feature map. The style does not come as an image but as a short code z; a linear layer
turns z into a scale and a shift for every channel, y = (y_s, y_b) = A z + c. That is all the style can say.

See it normalise:

    python -c "import torch, adain; print(adain.AdaIN(4, 8)(torch.rand(1, 4, 9, 9), torch.zeros(1, 8)).std(correction=0))"
"""
import torch
from torch import nn


class AdaIN(nn.Module):
    """Adaptive instance normalisation whose scale and shift are read from a style code.

    x: (B, C, H, W) features; z: (B, D) style code, or (1, D) for the whole batch -> (B, C, H, W).
    Every channel is first stripped of its own mean and deviation, then given the ones the style asks for.
    The statistics are per picture, so this layer's result never depends on what else is in the batch.
    """

    def __init__(self, channels, latent, eps=1e-5):
        super().__init__()
        self.eps = eps  # keeps a constant channel (sigma = 0) at zero instead of 0/0
        self.affine = nn.Linear(latent, 2 * channels)
        # Scale 1 and shift 0 for the code z = 0, and small weights: training starts from plain instance
        # normalisation, the same for every style. Were the weights as large as usual, the first steps
        # would have to undo a random rescaling of every channel, another one for each style.
        nn.init.normal_(self.affine.weight, std=0.01)
        with torch.no_grad():
            self.affine.bias.copy_(torch.cat([torch.ones(channels), torch.zeros(channels)]))

    def forward(self, x, z):
        B, C, H, W = x.shape
        # Half precision would lose the variance of large maps; statistics are always taken in fp32.
        with torch.autocast(x.device.type, enabled=False):
            scale, shift = self.affine(z.float()).expand(B, -1).chunk(2, dim=1)       # 2 x (B, C)
            # To normalise each channel of each picture by itself is a batch normalisation of one picture that has
            # all these channels. torch does it, scale, shift and gradients in one go: several times as fast as the
            # formula written out. None: no running statistics (and so no momentum); True: always those of x.
            x = torch.batch_norm(x.float().reshape(1, B * C, H, W), scale.flatten(), shift.flatten(),
                                 None, None, True, 0., self.eps, False)
        return x.view(B, C, H, W)
