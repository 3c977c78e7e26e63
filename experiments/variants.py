"""Train a changed network: what only the paper's experiments need.

    python experiments/variants.py relu,scales,encoder -- --preset combined --output runs/combined-authors ...

    relu     a ReLU before the pooling that makes the style code, as in the authors' program
    scales   the weights that make AdaIN's scales from a code start near 1 (normal, deviation .02), and those that make
             its shifts near 0, as in the authors' program: a code scales all channels of a layer nearly alike
    encoder  the style encoder starts with torch's default weights, as in the authors' program
    resize   up-sampling by nearest neighbor and a 3x3 convolution instead of a transposed convolution
    hues     half of the training photos, style and all, have their hues turned by a random angle
    gradient --style-loss with the gradient of both codes; in the paper the result's code has none
    only-encoder  with gradient: that of the result's code ends at the result, so the U-Net gets none of it

The arguments behind -- are those of train.py. The names go into variants.txt in the run's folder, because the
checkpoint does not hold them: train.py and infer.py refuse one with relu or resize, and train.py --resume goes on with
one of the others without its changes. So resume with variants.py, too.
"""
import contextlib
import functools
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import infer  # noqa: E402
import train  # noqa: E402
from data import (Parser, Photos, UserError, lab_to_gamut, rgb_to_lab, run_program,  # noqa: E402
                  save_atomically)
from losses import code_of_result, style_loss  # noqa: E402
from model import Colorizer  # noqa: E402

NAMES, FILE = ("relu", "scales", "encoder", "resize", "hues", "gradient", "only-encoder"), "variants.txt"


class Variant(Colorizer):
    """The network of model.py with some of the changes above."""

    def __init__(self, config=None, names=()):
        super().__init__(config)
        if not self.config.use_style and set(names) & {"relu", "scales", "encoder"}:
            raise UserError("relu, scales and encoder change the style branch, and this network has none")
        if "scales" in names:
            for layer in self.adain:
                scale, shift = layer.affine.weight.data.chunk(2)                # 2 x (C, D)
                scale.normal_(1, .02)
                shift.normal_(0, .02)
        if "encoder" in names:
            for conv in self.style_encoder.convs:
                conv.reset_parameters()
        # Within a Sequential the weights have another name: so the plain network refuses the file, and does not
        # run it without the ReLU.
        if "relu" in names:
            self.style_encoder.convs[-1] = nn.Sequential(self.style_encoder.convs[-1], nn.ReLU())
        if "resize" in names:
            self.up = nn.ModuleList(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(
                up.in_channels, up.out_channels, 3, padding=1)) for up in self.up)


def rotate_hue(rgb, angle):
    """Turn the (a, b) plane of pictures (B, 3, H, W) by an angle in radians; L, and so the gray input, stays."""
    L, a, b = rgb_to_lab(rgb).unbind(1)
    cos, sin = math.cos(angle), math.sin(angle)
    return lab_to_gamut(torch.stack([L, cos * a - sin * b, sin * a + cos * b], dim=1))


class TurnedHues(Photos):
    """Photos whose hues are turned, style and all, in a random half of the items.

    One gray photo then has many right answers. To know which one is meant, a network must look at the style.
    """

    def __getitem__(self, key):
        pictures = super().__getitem__(key)  # photo and style, (3, S, S) uint8 each
        rng = np.random.default_rng([self.seed, *key, 1])  # the 1: other numbers than those of the crop
        if not self.train or rng.random() < .5:
            return pictures
        turned = rotate_hue(torch.stack(pictures) / 255, rng.uniform(-math.pi, math.pi))    # (2, 3, S, S)
        return tuple((255 * turned).round().to(torch.uint8))


def style_loss_of_both(model, gray, z, out, only_encoder):
    """losses.style_loss, with the gradient of the result's code, too."""
    return F.mse_loss(z.float(), code_of_result(model, gray, out.detach() if only_encoder else out))


def of_run(folder):
    """The names that a run's folder records."""
    path = Path(folder, FILE)
    return tuple(path.read_text().split()) if path.exists() else ()


@contextlib.contextmanager
def use(names):
    """Inside `with use(names):` train.py and infer.py build the changed network, and train.py takes the changed photos
    and loss: it replaces the names that these modules use, and puts them back.

    train.py also writes the names into the run's folder, when it has checked everything else and locked the folder.
    """
    lock = train.Run.lock

    def lock_and_note(run):
        lock(run)
        save_atomically(run.folder / FILE, lambda part: part.write_text(" ".join(names) + "\n"))
    train.Run.lock = lock_and_note
    train.Colorizer = infer.Colorizer = functools.partial(Variant, names=names) if names else Colorizer
    train.Photos = TurnedHues if "hues" in names else Photos
    both = functools.partial(style_loss_of_both, only_encoder="only-encoder" in names)
    train.style_loss = both if "gradient" in names else style_loss
    try:
        yield
    finally:
        train.Colorizer = infer.Colorizer = Colorizer
        train.Photos, train.style_loss, train.Run.lock = Photos, style_loss, lock


def main(argv=None):
    parser = Parser(prog="variants.py", usage="python experiments/variants.py NAME,NAME -- TRAIN-ARGUMENTS")
    parser.add_argument("names", help=f"of {', '.join(NAMES)}")
    parser.add_argument("arguments", nargs="*", help="of train.py")
    args = parser.parse_args(argv)
    names = tuple(args.names.split(","))
    if not set(names) <= set(NAMES):
        parser.error(f"the variants are {', '.join(NAMES)}")
    if "only-encoder" in names and "gradient" not in names:
        parser.error("only-encoder says how far gradient goes: gradient,only-encoder")
    preset, given, _, dry_run = train.parse(args.arguments)
    folder = Path(given.get("output") or f"runs/{preset or 'final'}")
    if not dry_run and (folder / "last.pt").exists() and set(of_run(folder)) != set(names):
        raise UserError("is a run of other variants; choose another --output", folder)
    with use(names):
        code = train.main(args.arguments)
    if {"relu", "resize"} & set(names):
        print("(But infer.py and train.py refuse this checkpoint; experiments.py reads it.)")
    return code


if __name__ == "__main__":
    run_program(main)
