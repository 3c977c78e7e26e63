"""Why codes explode or shrink under the paper's style loss: the sign of its slope, for each number of the code.

    python experiments/explode.py RUN/last.pt PHOTOS

s is a number of the style's code, o the same number of the result's code. The paper takes o as fixed. Then a step
against the slope of (s - o)^2 makes the number larger if the mean of s (s - o) over many photos is negative, and smaller
if it is positive. This counts both, with each photo's own style and with that of the photo before it.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import infer  # noqa: E402
from data import (UserError, crop_square, gray_of, list_pictures, open_picture, rgb_to_network,  # noqa: E402
                  run_program, to_batch)
from losses import code_of_result  # noqa: E402


@torch.no_grad()
def slopes(model, rgb, style):
    """The mean of s (s - o) over photos, for each number of the code: (D,). rgb, style: (N, 3, S, S) in [0, 1]."""
    gray = gray_of(rgb)
    s = model.encode_style(rgb_to_network(style, model.config.space))           # (N, D)
    o = code_of_result(model, gray, model.colorize(gray, s))                    # (N, D)
    return (s * (s - o)).mean(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("photos")
    args = parser.parse_args()
    model, size = infer.load_model(args.checkpoint)
    if not model.config.use_style:
        raise UserError("this network follows no style", args.checkpoint)
    photos = [to_batch(crop_square(open_picture(p), size)) for p in list_pictures(args.photos)[:100]]
    if not photos:
        raise UserError("no pictures here", args.photos)
    rgb = torch.cat(photos)                                                     # (N, 3, size, size)
    for name, style in (("its own style", rgb), ("the style of another photo", rgb.roll(1, 0))):
        found = slopes(model, rgb, style)
        print(f"{name}: {(found < 0).sum()} of {len(found)} numbers grow, {(found > 0).sum()} shrink")


if __name__ == "__main__":
    run_program(main)
