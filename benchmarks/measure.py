"""Measure a checkpoint against simple rivals; not a test, pytest does not collect it.

    python tests/measure.py PHOTOS PAINTINGS [--weights FILE ...] [--refine 0 10] [--lpips-weights FILE] [--pairs 4]

Every photo (centre square, 128x128) is coloured with its own colours and with a few of the paintings, taken in
turn so that all of them serve. All rows get the photo's true L, as infer.py gives it, and go through this one code.

    psnr, lpips   own colours against the photo (LPIPS with the AlexNet trunk)
    transfer      palette transfer, paintings as styles (losses.py defines it)
    corr a, b     correlation over pairs of the mean a (b) of output and style
    chroma        mean chroma of the outputs over that of the styles
    hue           overlap of the chroma-weighted hue histograms of output and style: sum over 24 bins of the smaller
    position      share of the a, b variance that a quadratic in x and y explains: what is merely laid across the
                  picture, not placed on its objects; the row "the photos" says what real pictures have
"""
import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import infer  # noqa: E402
from data import list_pictures, lab_to_gamut, open_picture, rgb_to_lab, run, square, to_picture, to_tensor  # noqa: E402
from losses import LPIPS, load_trunk, palette_distances, psnr  # noqa: E402

SIZE = 128


def tensor(picture):
    return to_tensor(picture)[None] / 255                                             # (1, 3, H, W)


def leave_gray(photo, style):
    return infer.gray_version(photo)


def mean_color(photo, style):
    """Mean-and-deviation transfer (Reinhard et al. 2001) in a, b. A gray photo's a and b have the deviation 0, and
    nothing to scale: what is left is the style's mean colour everywhere."""
    lab = rgb_to_lab(tensor(photo))
    lab[:, 1:] = rgb_to_lab(tensor(style))[:, 1:].mean((2, 3), keepdim=True)
    return to_picture(lab_to_gamut(lab)[0])


def network(path, steps):
    model, _ = infer.load_model(path)

    def colour(photo, style):
        z = infer.encode(model, style, SIZE)
        return infer.colorize(model, photo, infer.refine(model, photo, style, z, SIZE, steps), SIZE)
    return colour


def hue_histogram(lab):
    a, b = lab[0, 1:].double().numpy()
    counts, _ = np.histogram(np.arctan2(b, a), 24, (-math.pi, math.pi), weights=np.hypot(a, b))
    return counts / max(counts.sum(), 1e-9)


def explained_by_position(lab):
    """(explained, total) sums of squares of a and b under a quadratic in x and y."""
    y, x = np.mgrid[-1:1:SIZE * 1j, -1:1:SIZE * 1j].reshape(2, -1)
    basis, _ = np.linalg.qr(np.stack([x ** 0, x, y, x * x, x * y, y * y], axis=1))
    ab = lab[0, 1:].flatten(1).double().numpy().T                                     # (HW, 2)
    ab = ab - ab.mean(0)
    return ((basis.T @ ab) ** 2).sum(), (ab ** 2).sum()


def measure(name, colour, photos, pairs, lpips):
    own = [tensor(colour(p, p)) for p in photos]
    truth = [tensor(p) for p in photos]
    result = [psnr(torch.cat(own), torch.cat(truth)).mean().item(),
              torch.cat([lpips(o, t) for o, t in zip(own, truth)]).mean().item()]
    W, W_gray, means, chroma, hue, explained, total = 0, 0, [], [0, 0], [], 0, 0
    for photo, style in pairs:
        out, style = tensor(colour(photo, style)), tensor(style)
        d, d_gray = palette_distances(out, style)
        W, W_gray = W + d.item(), W_gray + d_gray.item()
        labs = [rgb_to_lab(out), rgb_to_lab(style)]
        means.append([lab[0, c].mean().item() for lab in labs for c in (1, 2)])
        for i, lab in enumerate(labs):
            chroma[i] += lab[:, 1:].norm(dim=1).mean().item()
        hue.append(np.minimum(*(hue_histogram(lab) for lab in labs)).sum())
        e, t = explained_by_position(labs[0])
        explained, total = explained + e, total + t
    with np.errstate(all="ignore"):  # gray outputs have no deviation to correlate
        corr = np.corrcoef(np.array(means).T)
    result += [1 - W / W_gray, corr[0, 2], corr[1, 3], chroma[0] / chroma[1], np.mean(hue), explained / max(total, 1e-9)]
    print(f"| {name} | " + " | ".join(f"{v:.3f}" if i else f"{v:.2f}" for i, v in enumerate(result)) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos")
    parser.add_argument("paintings")
    parser.add_argument("--weights", nargs="*", default=[infer.SHIPPED])
    parser.add_argument("--lpips-weights", default="")
    parser.add_argument("--refine", type=int, nargs="*", default=[0, infer.REFINE_STEPS], help="as in infer.py, a row each")
    parser.add_argument("--pairs", type=int, default=4, help="paintings a photo")
    args = parser.parse_args()
    photos = [square(open_picture(p), SIZE) for p in list_pictures(args.photos)]
    styles = [square(open_picture(p), SIZE) for p in list_pictures(args.paintings)]
    pairs = [(p, styles[(i * args.pairs + k) % len(styles)]) for i, p in enumerate(photos) for k in range(args.pairs)]
    lpips = LPIPS("alex", load_trunk("alex", args.lpips_weights))
    print(f"{len(photos)} photos, {len(pairs)} pairs with {len(styles)} paintings\n")
    print("| | psnr | lpips | transfer | corr a | corr b | chroma | hue | position |\n" + "|---" * 9 + "|")
    real = [explained_by_position(rgb_to_lab(tensor(p))) for p in photos]
    print("| the photos | | | | | | | | " + f"{sum(e for e, _ in real) / sum(t for _, t in real):.3f} |")
    measure("left gray", leave_gray, photos, pairs, lpips)
    measure("mean colour", mean_color, photos, pairs, lpips)
    for path in args.weights:
        for steps in args.refine:
            measure(f"{Path(path).name} --refine {steps}", network(path, steps), photos, pairs, lpips)


if __name__ == "__main__":
    run(main)
