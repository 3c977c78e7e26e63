"""Train a changed network: what only the paper's experiments need.

    python experiments/variants.py relu,scales,encoder -- --preset combined --output runs/combined-authors ...

    relu     a ReLU before the pooling that makes the style code, as in the authors' program
    scales   AdaIN's scales start at 1 + (1 + .02 n) z and its shifts at .02 n z, n normal, as in the authors' program:
             nearly the same numbers for all channels of a layer
    encoder  the style encoder starts with torch's default weights, as in the authors' program
    resize   up-sampling by nearest neighbor and a 3x3 convolution instead of a transposed convolution

The arguments behind -- are those of train.py. The names go into variants.txt in the run's folder, because the
checkpoint does not hold them: train.py and infer.py refuse one with relu or resize.
"""
import contextlib
import functools
import sys
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import infer  # noqa: E402
import train  # noqa: E402
from data import Parser, UserError, run_program, save_atomically  # noqa: E402
from model import Colorizer  # noqa: E402

NAMES, FILE = ("relu", "scales", "encoder", "resize"), "variants.txt"


class Variant(Colorizer):
    """The network of model.py with some of the changes above."""

    def __init__(self, config=None, names=()):
        super().__init__(config)
        if not self.config.use_style and set(names) - {"resize"}:
            raise UserError("relu, scales and encoder change the style branch, and this network has none")
        for layer in self.adain if "scales" in names else ():
            scale, shift = layer.affine.weight.data.chunk(2)                    # 2 x (C, D)
            scale.normal_(1, .02)
            shift.normal_(0, .02)
        for conv in self.style_encoder.convs if "encoder" in names else ():
            conv.reset_parameters()
        if "relu" in names:  # as a layer: its weights get a name that the plain network refuses
            self.style_encoder.convs[-1] = nn.Sequential(self.style_encoder.convs[-1], nn.ReLU())
        if "resize" in names:
            self.up = nn.ModuleList(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(
                up.in_channels, up.out_channels, 3, padding=1)) for up in self.up)


def of_run(folder):
    """The names that a run's folder records."""
    path = Path(folder, FILE)
    return tuple(path.read_text().split()) if path.exists() else ()


@contextlib.contextmanager
def use(names):
    """Inside `with use(names):` train.py and infer.py build the changed network."""
    train.Colorizer = infer.Colorizer = functools.partial(Variant, names=names) if names else Colorizer
    try:
        yield
    finally:
        train.Colorizer = infer.Colorizer = Colorizer


def main(argv=None):
    parser = Parser(prog="variants.py", usage="python experiments/variants.py NAME,NAME -- TRAIN-ARGUMENTS")
    parser.add_argument("names", help=f"of {', '.join(NAMES)}")
    parser.add_argument("arguments", nargs="*", help="of train.py")
    args = parser.parse_args(argv)
    names = tuple(args.names.split(","))
    if not set(names) <= set(NAMES):
        parser.error(f"the variants are {', '.join(NAMES)}")
    preset, given, *_ = train.parse(args.arguments)
    folder = Path(given.get("output") or f"runs/{preset or 'final'}")
    if (folder / "last.pt").exists() and set(of_run(folder)) != set(names):
        raise UserError("is a run of other variants; choose another --output", folder)
    save_atomically(folder / FILE, lambda part: part.write_text(" ".join(names) + "\n"))
    with use(names):
        return train.main(args.arguments)


if __name__ == "__main__":
    run_program(main)
