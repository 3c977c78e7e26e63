"""Measure checkpoints against simple rivals.

    python benchmarks/measure.py PHOTOS PAINTINGS [--weights FILE ...] [--refine 0 1] [--blur .7] [--pairs 4]
                                                  [--limit N] [--large FOLDER] [--lpips-weights FILE]

Every photo (centre square, 128x128) is colored with its own colors and with some of the paintings, which take
turns. Every row of the table is made by the same code: pictures as infer.py gives them, with the photo's true L.

    own colors    psnr, lpips   against the photo (LPIPS with the AlexNet trunk)
                  edges         psnr at full size, of the photos in --large whose short side is 400 pixels or more
    paintings     transfer      palette transfer (losses.py, palette_distances)
                  corr a, b     correlation, over the pairs, of the mean a (b) of output and style
                  chroma        mean chroma of the outputs over that of the styles
                  hue           overlap of the hue histograms of output and style, 1 = the same
                  position      share of the variance of a, b that the place in the picture explains
                  mix           distance of pixels that should agree over distance of those that should not
                  wash          deviation of a, b within flat surfaces over the mean chroma
                  by lightness  share of the variance of a, b that L explains

The last four are about coherence: does one thing keep one color? What they should be stands in the row "the
photos", measured on the photos' own colors. Lower is not always better: a picture of one color has no wash.
Quotients are of sums over all pictures, so a nearly gray picture counts little.
"""
import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import infer  # noqa: E402
from data import (UserError, box_mean, crop_square, gray_of, lab_to_gamut, list_pictures, open_picture,  # noqa: E402
                  resize_short_side, rgb_to_lab, run_program, to_batch, to_picture)
from losses import LPIPS, load_trunk, palette_distances, psnr  # noqa: E402

SIZE = 128
LARGE = 400      # short side from which a photo shows whether colors stop at edges
SAMPLE = 1500    # pixels of a picture whose pairs are looked at: 1.1 million pairs
ENOUGH = 1000    # pairs below which a picture says nothing about mix
COLUMNS = ["psnr", "lpips", "transfer", "corr a", "corr b", "chroma", "hue", "position", "mix", "wash", "by lightness",
           "edges"]


# ---- measures of one picture ------------------------------------------------------------------------------
# lab, ab and L are tensors (1, 3, H, W), (1, 2, H, W) and (1, 1, H, W). Those that return two numbers return
# the numerator and the denominator of the measure.

def blur(x, sigma):
    """Gaussian blur of (1, C, H, W), cut off at 3 sigma; beyond the border the border repeats."""
    r = math.ceil(3 * sigma)
    kernel = torch.exp(-torch.arange(-r, r + 1.).square() / (2 * sigma ** 2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, -1)                     # (C, 1, 1, 2r+1)
    x = F.conv2d(F.pad(x, (r, r, 0, 0), mode="replicate"), kernel, groups=x.shape[1])
    return F.conv2d(F.pad(x, (0, 0, r, r), mode="replicate"), kernel.mT, groups=x.shape[1])


def hue_histogram(ab):
    """Share of the picture's chroma in each of 24 equal ranges of hue."""
    a, b = ab[0].double().numpy()
    counts, _ = np.histogram(np.arctan2(b, a), 24, (-math.pi, math.pi), weights=np.hypot(a, b))
    return counts / max(counts.sum(), 1e-9)


def by_position(ab):
    """The variance of a, b that a quadratic in x and y explains, and all of it, as sums of squares.

    It is high for colors that are laid across the picture and do not stand on its objects.
    """
    y, x = (t.flatten() for t in np.mgrid[-1:1:ab.shape[2] * 1j, -1:1:ab.shape[3] * 1j])
    basis, _ = np.linalg.qr(np.stack([x ** 0, x, y, x * x, x * y, y * y], axis=1))
    ab = ab[0].flatten(1).double().numpy().T                                          # (HW, 2)
    ab = ab - ab.mean(0)
    return ((basis.T @ ab) ** 2).sum(), (ab ** 2).sum()


def by_lightness(ab, L):
    """The variance of a, b that L explains, and all of it, as sums of squares.

    L is cut into 24 ranges that hold equally many pixels; what L explains is the variance between their means.
    """
    ab, L = ab[0].flatten(1).double().numpy(), L.flatten().double().numpy()           # (2, HW), (HW,)
    bins = np.searchsorted(np.quantile(L, np.arange(1, 24) / 24), L, side="right")
    ab = ab - ab.mean(1, keepdims=True)
    counts = np.bincount(bins, minlength=24)
    sums = np.stack([np.bincount(bins, plane, minlength=24) for plane in ab])         # (2, 24)
    return (sums ** 2 / counts.clip(1)).sum(), (ab ** 2).sum()


def pixel_pairs(lab):
    """Which pixels of a photo should keep one color, and which should not: (pixels, same, apart).

    lab: the photo's true colors, which are blurred 3x3 here, because noise is no color of its own. Of all pairs
    of the sampled pixels (in the order of F.pdist) `same` are those whose Lab is within 5, and `apart` those of
    equal lightness, within 3, but a, b at least 15 apart. The sample is the same for all pictures of one size.
    """
    lab = box_mean(lab, 1)
    n = lab[0, 0].numel()
    pixels = torch.from_numpy(np.random.default_rng(0).choice(n, min(n, SAMPLE), replace=False))
    lab = lab[0].flatten(1).T[pixels]                                                 # (N, 3)
    apart = (F.pdist(lab[:, :1]) <= 3) & (F.pdist(lab[:, 1:]) >= 15)                  # (N (N - 1) / 2,)
    return pixels, F.pdist(lab) <= 5, apart


def mix(ab, pairs):
    """Mean distance in a, b of pixels that should have one color, and of those that should not.

    A wash across one surface makes the first large; colors that merely follow lightness make the second small.
    A photo with too few such pairs says nothing: (0, 0).
    """
    pixels, same, apart = pairs
    if min(same.sum(), apart.sum()) < ENOUGH:
        return 0., 0.
    distance = F.pdist(ab[0].flatten(1).T[pixels])                                    # (N (N - 1) / 2,)
    return distance[same].mean().item(), distance[apart].mean().item()


def flat_regions(L):
    """Masks (H, W) of the connected flat surfaces of a photo: at least 3 % of it, without edges.

    Flat is where the slope of L, blurred a little, is below 1.5 a pixel; a pixel is taken off all around.
    """
    x = F.pad(blur(L, 1), (1, 1, 1, 1), mode="replicate")
    sobel = torch.tensor([[-1., 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    slope = F.conv2d(x, torch.stack([sobel, sobel.T])[:, None]).norm(dim=1, keepdim=True)  # (1, 1, H, W)
    flat = 1 - F.max_pool2d((slope >= 1.5).float(), 3, stride=1, padding=1)
    # Every pixel starts with a number of its own; the largest spreads to its neighbors until nothing changes.
    number, before = flat * torch.arange(1., flat.numel() + 1).view_as(flat), None
    while before is None or not torch.equal(number, before):
        before = number
        across, down = F.max_pool2d(number, (1, 3), 1, (0, 1)), F.max_pool2d(number, (3, 1), 1, (1, 0))
        number = flat * torch.maximum(across, down)
    numbers, areas = number[number > 0].unique(return_counts=True)
    return [number[0, 0] == n for n, area in zip(numbers, areas) if area >= .03 * flat.numel()]


def wash(ab, regions):
    """Deviation of a, b within the flat surfaces, weighted by their areas, and the picture's mean chroma.

    a, b are blurred, so noise and texture do not count. A photo without a flat surface says nothing: (0, 0).
    """
    if not regions:
        return 0., 0.
    smooth = blur(ab, 2)[0]                                                           # (2, H, W)
    deviations = torch.stack([smooth[:, r].var(dim=1, correction=0).sum().sqrt() for r in regions])
    areas = torch.stack([r.sum() for r in regions])
    return (areas * deviations).sum().item() / areas.sum().item(), ab.norm(dim=1).mean().item()


# ---- candidates: functions (PIL photo, PIL style) -> PIL picture ------------------------------------------

def leave_gray(photo, style):
    return infer.gray_version(photo)


def mean_color(photo, style):
    """Mean-and-deviation transfer (Reinhard et al. 2001) in a, b. The a, b of a gray photo have no deviation that
    could be scaled; what is left is the style's mean color everywhere."""
    lab = rgb_to_lab(to_batch(photo))
    lab[:, 1:] = rgb_to_lab(to_batch(style))[:, 1:].mean((2, 3), keepdim=True)
    return to_picture(lab_to_gamut(lab)[0])


def network(path, amount, blur=infer.BLUR):
    """What `infer.py photo style --size 128 --refine amount --weights path` gives, with another infer.BLUR."""
    model, _ = infer.load_model(path)
    if not model.config.use_style:
        raise UserError("a plain U-Net; it follows no style", path)

    def color(photo, style):
        infer.BLUR = blur  # infer.move reads it
        style = resize_short_side(style, SIZE)
        [(_, z, palettes)] = infer.make_looks([("", style, infer.encode(model, style))])
        gray = gray_of(resize_short_side(photo, SIZE))                                # (1, 1, h, w)
        return infer.join(photo, infer.color(model, gray, z, palettes, amount))
    return color


# ---- the table --------------------------------------------------------------------------------------------

def coherence(ab, photo):
    """The four measures of coherence of a coloring of a photo: {name: (numerator, denominator)}."""
    L, pairs, regions = photo
    return {"position": by_position(ab), "mix": mix(ab, pairs), "wash": wash(ab, regions),
            "by lightness": by_lightness(ab, L)}


def quotients(pictures):
    """Dictionaries as coherence gives them -> {name: sum of numerators / sum of denominators}."""
    sums = {name: np.sum([p[name] for p in pictures], axis=0) for name in pictures[0]}
    return {name: top / max(bottom, 1e-9) for name, (top, bottom) in sums.items()}


def tell(name, result):
    """Print one row of the table; "-" where there is nothing to measure."""
    cells = [f"{result[c]:.{2 if c in ('psnr', 'edges') else 3}f}" if c in result else "-" for c in COLUMNS]
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def measure(color, photos, facts, styles, pairs, large, lpips):
    """All measures of one candidate. facts: what coherence needs of each photo; pairs: of indices (photo, style)."""
    own, truth = torch.cat([to_batch(color(p, p)) for p in photos]), torch.cat([to_batch(p) for p in photos])
    result = {"psnr": psnr(own, truth).mean().item(),
              "lpips": np.mean([lpips(o, t).item() for o, t in zip(own.split(1), truth.split(1))])}
    if large:
        result["edges"] = np.mean([psnr(to_batch(color(p, p)), to_batch(p)).item() for p in large])
    distances, means, chroma, hue, coherent = [], [], [], [], []
    for i, k in pairs:
        out, style = to_batch(color(photos[i], styles[k])), to_batch(styles[k])
        distances.append([d.item() for d in palette_distances(out, style)])
        both = [rgb_to_lab(x)[:, 1:] for x in (out, style)]                           # 2 x (1, 2, H, W)
        means.append([ab[0, c].mean().item() for c in (0, 1) for ab in both])
        chroma.append([ab.norm(dim=1).mean().item() for ab in both])
        hue.append(np.minimum(*map(hue_histogram, both)).sum())
        coherent.append(coherence(both[0], facts[i]))
    (W, W_gray), (c_out, c_style) = np.sum(distances, axis=0), np.sum(chroma, axis=0)
    result |= {"transfer": 1 - W / W_gray, "chroma": c_out / c_style, "hue": np.mean(hue)}
    # What a gray picture has in a, b is rounding: nothing to correlate, and nothing that could be coherent.
    if c_out > .1 * len(pairs):
        result |= quotients(coherent)
        if len(pairs) > 1:
            corr = np.corrcoef(np.array(means).T)
            result |= {"corr a": corr[0, 1], "corr b": corr[2, 3]}
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("photos")
    parser.add_argument("paintings")
    parser.add_argument("--weights", nargs="*", default=[infer.OURS])
    parser.add_argument("--lpips-weights", default="")
    parser.add_argument("--refine", type=float, nargs="+", default=[0., infer.REFINE],
                        help="as in infer.py, a row each")
    parser.add_argument("--blur", type=float, nargs="+", default=[infer.BLUR],
                        help="values for BLUR of infer.py, a row each of what is refined")
    parser.add_argument("--pairs", type=int, default=4, help="paintings a photo")
    parser.add_argument("--limit", type=int, help="only so many photos, every second, third or so of the folder")
    parser.add_argument("--large", help="folder of photos for the column edges")
    args = parser.parse_args()
    if args.pairs < 1 or args.limit is not None and args.limit < 1:
        parser.error("--pairs and --limit must be 1 or more")
    if not all(0 <= amount <= 1 for amount in args.refine) or not all(0 < blur < math.inf for blur in args.blur):
        parser.error("--refine must be from 0 to 1, --blur above 0")
    candidates = {"left gray": leave_gray, "mean color": mean_color}
    for path in args.weights:
        for amount in args.refine:
            for blur in args.blur if amount else args.blur[:1]:  # what is not refined has no blur
                name = f"{path} --refine {amount:g}" + f" --blur {blur:g}" * (amount > 0 and len(args.blur) > 1)
                candidates[name] = network(path, amount, blur)
    photos = list_pictures(args.photos)
    if args.limit:  # spread over the list: files of one collection stand beside each other
        photos = photos[::max(1, len(photos) // args.limit)][:args.limit]
    photos = [crop_square(open_picture(p), SIZE) for p in photos]
    styles = [crop_square(open_picture(p), SIZE) for p in list_pictures(args.paintings)]
    large = [p for p in map(open_picture, list_pictures(args.large)) if min(p.size) >= LARGE] if args.large else []
    for what, folder, found in (("pictures", args.photos, photos), ("pictures", args.paintings, styles),
                                (f"photos of {LARGE} pixels", args.large, large or not args.large)):
        if not found:
            raise UserError(f"no {what} here", folder)
    pairs = [(i, (i * args.pairs + k) % len(styles)) for i in range(len(photos)) for k in range(args.pairs)]
    lpips = LPIPS("alex", load_trunk("alex", args.lpips_weights))
    print(f"{len(photos)} photos, {len(pairs)} pairs with {len(styles)} paintings, {len(large)} large photos\n")
    print(f"| | {' | '.join(COLUMNS)} |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    labs = [rgb_to_lab(to_batch(p)) for p in photos]
    facts = [(lab[:, :1], pixel_pairs(lab), flat_regions(lab[:, :1])) for lab in labs]
    tell("the photos", quotients([coherence(lab[:, 1:], fact) for lab, fact in zip(labs, facts)]))
    for name, color in candidates.items():
        tell(name, measure(color, photos, facts, styles, pairs, large, lpips))


if __name__ == "__main__":
    run_program(main)
