"""Color gray photos with the palettes of style pictures, using a checkpoint that train.py made.

    python infer.py gray.jpg style.jpg                       writes gray_style.png
    python infer.py photos/ paintings/ --output results/     every photo with every painting
    python infer.py gray.jpg a.jpg --styles b.jpg --blend 2,1
    python infer.py photos/ paintings/ --grid --output sheet.png

The network only ever sees the photo at about the size that it was trained at. Around each pixel of its small
answer a line ab = slope * L + offset is fitted; slopes and offsets are enlarged and applied to the photo's
own L. So the result is as large and as sharp as the photo, whatever its size.

    style --resize_short_side--> (1, 3, h', w') --encode--> code z (1, D)
    photo --resize_short_side, gray_of--> (1, 1, h, w) --predict with z--> L, a, b (1, 3, h, w)
    L, a, b and the style's palette --refine--> L, a, b (1, 3, h, w)
    photo (H, W) and L, a, b --join--> picture (H, W)

In this file the paper's method comes first: a checkpoint is read; encode and predict color the photo; join
makes the large picture. Then refine, which is ours, makes surfaces steadier and wins back the colors that
this costs; then come drawings of several results, and last the command line. `main` ties all of it together:
for an overview read it first.
"""
import itertools
import math
import os
import sys
import time
from pathlib import Path

# data comes first: it imports torch, numpy and PIL, and here we can say which of them is missing.
try:
    from data import (EXTENSIONS, MIN_CHROMA, Parser, UserError, box_mean, crop_square, gray_of, lab_to_gamut,
                      list_pictures, load_torch_file, mean_chroma, network_to_lab, open_picture, printable,
                      resize_short_side, rgb_to_lab, rgb_to_network, run_program, save_atomically, to_batch,
                      to_picture)
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed: pip install -r requirements.txt")
except KeyboardInterrupt:  # Ctrl-C in the second that torch takes to load
    sys.exit(130)
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F

from model import Colorizer, ModelConfig

FORMAT = 2  # version of the checkpoint file; raise it when its contents change
OURS, PAPER = (Path(__file__).resolve().parent / "weights" / name for name in ("colorizer.pt", "paper.pt"))
TILE_PIXELS = 1 << 18   # pixels that are joined at a time; sets the memory beyond the decoded pictures
# The longest side that is safe in each format; the others have no limit that a picture of ours could reach.
MAX_SIDE = {".webp": 16383, ".avif": 16384} | dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".gif"), 65500)


# ---- checkpoints ------------------------------------------------------------------------------------------

def pick_device(name):
    """A name, or "auto" -> torch.device, CUDA made repeatable. Raises UserError if the device is missing."""
    # MPS is Apple's GPU. "auto" takes the first that is there, in this order of speed.
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    fitting = [device for device in there if there[device] and name in (device, "auto")]
    if not fitting:
        raise UserError(f"--device {name}: this machine or this build of torch has none; use --device cpu")
    torch.backends.cudnn.deterministic = True  # else CUDA adds in any order: the last bits would vary
    return torch.device(fitting[0])


def load_checkpoint(path):
    """Read a checkpoint of train.py: a dictionary of tensors and plain values. Raises UserError.

    A file may come from anywhere. So everything that is used is checked before anything is built from it,
    and no value of the file is printed here. Format 1 had other names for two settings.
    """
    if not os.path.isfile(path):
        raise UserError("no such checkpoint", path)
    # Is it a checkpoint at all?
    try:
        checkpoint = dict(load_torch_file(path))
        version, size = checkpoint["format"], checkpoint["settings"]["size"]
        config, weights = dict(checkpoint["model"]), dict(checkpoint["weights"])
    except Exception:  # whatever it is, the cure is the same
        raise UserError("not a checkpoint of train.py (it writes best.pt), or a damaged one", path) from None
    # Of a format that we know?
    if type(version) is not int or version not in (1, FORMAT):
        raise UserError(f"is not of checkpoint format {FORMAT}; update the program", path)
    renamed = {"color": "space", "style": "use_style"}  # in format 1
    config = {renamed.get(name, name): value for name, value in config.items()}
    # Does it describe a network, and are its weights those of that network?
    try:
        config = ModelConfig.from_file(config)
        if type(size) is not int or not 16 <= size <= 1024:  # a huge one would take all memory
            raise ValueError("size must be from 16 to 1024")
        check_weights(weights, config)
    except ValueError as error:
        raise UserError(f"not a network of this program ({error})", path) from None
    return checkpoint | {"model": vars(config), "weights": weights}


def check_weights(weights, config):
    """Raise ValueError unless the weights are those of this network: names, shapes, types, finite numbers."""
    with torch.device("meta"):  # shapes without memory
        expected = Colorizer(config).state_dict()
    for name in [*expected, *weights]:
        e, w = expected.get(name), weights.get(name)
        if e is None or w is None:
            raise ValueError(f"{'unknown' if e is None else 'missing'} weight {str(name)[:60]!a}")
        # A file can also hold sparse, quantized and storage-less tensors; none of them is a weight of ours.
        plain = type(w) is torch.Tensor and w.layout == torch.strided and w.device.type == "cpu"
        if not plain or w.dtype not in (e.dtype, torch.float16) or w.shape != e.shape:
            raise ValueError(f"weight {name} is of another shape or type")
        if not w.isfinite().all():
            raise ValueError(f"weight {name} holds nan or inf: its training had failed")


def load_model(path, device="cpu"):
    """A checkpoint file -> (the network, ready to use and its weights frozen; the size it was trained at)."""
    checkpoint = load_checkpoint(path)
    # The checkpoint alone says what to build: no option of the command line can contradict it.
    model = Colorizer(ModelConfig(**checkpoint["model"]))
    model.load_state_dict(checkpoint["weights"])  # shipped files hold half precision; here it becomes float32
    # eval(): else dropout would go on, and BatchNorm would normalize with the one picture that it gets.
    return model.to(device).eval().requires_grad_(False), checkpoint["settings"]["size"]


# ---- the paper's path: one code from the style, one answer for the photo ----------------------------------

@torch.no_grad()
def encode(model, style):
    """A small style picture (1, 3, h, w) in [0, 1] -> its code z (1, D)."""
    return model.encode_style(rgb_to_network(style.to(model.head.weight.device), model.config.space))


@torch.no_grad()
def predict(model, gray, z):
    """The network's answer to a small gray photo (1, 1, h, w): L, a, b (1, 3, h, w) on the CPU. z: (1, D)."""
    gray = gray.to(model.head.weight.device)
    # An RGB network also answers with a lightness. refine and guided_filter use it, and --raw shows it; join
    # puts the photo's own in its place.
    return network_to_lab(model.colorize(gray, z), gray, model.config.space).cpu()


GUIDE_RADIUS, GUIDE_EPS = 4, 50.  # a larger radius smooths more, and colors run further over edges


def guided_filter(ab, L):
    """Colors as a function of lightness: ab (B, 2, h, w), L (B, 1, h, w) -> slope, offset (B, 2, h, w) each.

    The guided filter (He, Sun and Tang 2013): in the box of 9x9 pixels around every pixel, a and b are fitted
    by a straight line, ab = slope * L + offset. With the small L, slope * L + offset is ab without speckle
    and without the checkerboard of the transposed convolutions. With the L of the large photo it is ab
    enlarged: colors change where the photo has an edge, and not in a soft band beside it. GUIDE_EPS is added
    to the variance of L: where L deviates by much less than 7, the root of GUIDE_EPS, the slope goes to 0
    and the box gets nearly one color.
    """
    planes = torch.cat([L, ab, L * L, L * ab], dim=1)                           # (B, 6, h, w)
    mean_L, mean_ab, mean_LL, mean_Lab = box_mean(planes, GUIDE_RADIUS).split([1, 2, 1, 2], dim=1)
    # The best line of each box, as in any linear regression: covariance over variance.
    slope = (mean_Lab - mean_L * mean_ab) / (mean_LL - mean_L * mean_L + GUIDE_EPS)     # (B, 2, h, w)
    # A pixel lies in many boxes: the mean of their lines.
    return box_mean(torch.cat([slope, mean_ab - slope * mean_L], dim=1), GUIDE_RADIUS).chunk(2, dim=1)


def join(photo, lab):
    """Give a PIL photo of any size the colors of a small picture lab (1, 3, h, w), and its own L.

    Joined in tiles, so that memory does not grow with the photo beyond the two pictures themselves. Pillow's
    `box` samples each tile as a part of the whole: the seams cannot be seen.
    """
    # Pillow can enlarge just a part of a picture, in 32-bit floats: so each plane becomes a picture.
    lines = torch.cat(guided_filter(lab[:, 1:], lab[:, :1]), dim=1)             # (1, 4, h, w)
    planes = [Image.fromarray(plane.numpy()) for plane in lines[0]]             # 4 x (h, w)
    (W, H), (w, h) = photo.size, planes[0].size
    result = Image.new("RGB", photo.size)
    # A tile is some whole rows of the photo, or a part of a row that is longer than a tile.
    columns = min(W, TILE_PIXELS)
    rows = TILE_PIXELS // columns
    for y, x in itertools.product(range(0, H, rows), range(0, W, columns)):
        right, bottom = min(x + columns, W), min(y + rows, H)
        tile = photo.crop((x, y, right, bottom))
        L = rgb_to_lab(to_batch(tile))[:, :1]                                   # (1, 1, rows, columns)
        box = (x * w / W, y * h / H, right * w / W, bottom * h / H)  # the tile, in pixels of the small planes
        large = [np.array(plane.resize(tile.size, Image.Resampling.BICUBIC, box=box)) for plane in planes]
        slope, offset = torch.from_numpy(np.stack(large))[None].chunk(2, dim=1)  # (1, 2, rows, columns) each
        # What no screen can show at this lightness loses chroma, never lightness.
        rgb = lab_to_gamut(torch.cat([L, slope * L + offset], dim=1))           # (1, 3, rows, columns)
        result.paste(to_picture(rgb[0]), (x, y))
    return result


# ---- refine, not in the paper: steadier surfaces, and then the style's colors once more -------------------

# How far apart places may be and still be alike, in y, x (pixels), L, roughness, a and b. A place that
# differs by so much in one of them weighs .6 of an equal one, one that differs by twice as much .14.
ALIKE = 40., 40., 6., 2., 20., 20.


def average_alike(ab, L):
    """The colors of a small picture, ab (1, 2, h, w), drawn to the mean color of places that are alike -> ab.

    A joint bilateral filter (Petschnigg et al. 2004) with a wide window. Alike is what is near, equally
    light, equally rough and of about the same color, whatever lies between. So the leaves of a tree, or a
    wall behind a fence, get one color; make_smooth, going from neighbor to neighbor, does not reach them.
    L: (1, 1, h, w), as predict gives it.
    """
    # All pairs of places are compared; so a place is 4x4 pixels, and 128x128 pixels are 32x32 places.
    rows, columns = (math.ceil(side / 4) for side in L.shape[2:])
    # Roughness is the deviation of L in 3x3 pixels: high in grass, low on a wall.
    variance = (box_mean(L * L, 1) - box_mean(L, 1).square()).clamp(min=0)
    planes = torch.cat([L, variance, ab], dim=1)                                # (1, 4, h, w)
    # Six numbers for each of the N = rows * columns places: where it is, and the mean of each plane there.
    yx = torch.cartesian_prod(4. * torch.arange(rows), 4. * torch.arange(columns))      # (N, 2)
    means = F.interpolate(planes, (rows, columns), mode="area")[0].flatten(1).T         # (N, 4)
    light, variance, old = means.split([1, 1, 2], dim=1)
    places = torch.cat([yx, light, variance.sqrt(), old], dim=1) / torch.tensor(ALIKE)  # (N, 6)
    # shares[i, j]: the weight of place j in the new color of place i. Every row adds up to 1.
    shares = (-torch.cdist(places, places).square() / 2).softmax(1)            # (N, N)
    change = (shares @ old - old).T.reshape(1, 2, rows, columns)
    return ab + F.interpolate(change, ab.shape[2:], mode="bilinear")            # (1, 2, h, w)


EDGE = .7     # a step of L (means of 3x3 pixels) by this leaves a third of the pull between two neighbors
# The pull between neighbors of equal L; that of the pixel's own old color is 1. So colors run about
# sqrt(SPREAD) = 300 pixels far, over all of a surface.
SPREAD = 1e5


def make_smooth(L):
    """For a small picture's L (1, 1, h, w): a function that spreads its colors, ab (1, 2, h, w) -> ab.

    The idea of Levin, Lischinski and Weiss (2004): neighbors of equal lightness have equal colors. x are the
    new colors: of all x we want those with the smallest sum of (x - ab)^2 over the pixels and of weight *
    (x - x of the neighbor)^2 over the neighbors. The weight is SPREAD where L stays the same, and nearly 0 at
    an edge: so the patches of a sky run together, and nothing runs across an edge. L: as predict gives it.
    """
    # Each row of pixels will need a matrix (w, w): a wide picture is turned, so that w is its short side.
    if L.shape[3] > L.shape[2]:
        upright = make_smooth(L.mT)
        return lambda ab: upright(ab.mT).mT
    # L is taken as means over 3x3 pixels: the grain of a lawn or of a rough wall is no edge.
    mean_L = box_mean(L, 1)[0, 0].double()                                      # (h, w)
    across, down = (SPREAD * torch.exp(-(mean_L.diff(dim=d) / EDGE).square()) for d in (1, 0))

    # The sum is smallest where its slope is 0. That is one equation for each pixel, for a and for b:
    #     own * x - the sum of weight * x of the neighbor, over its four neighbors = ab
    own = (1 + F.pad(across, (1, 0)) + F.pad(across, (0, 1))
           + F.pad(down, (0, 0, 1, 0)) + F.pad(down, (0, 0, 0, 1)))             # (h, w)
    # Gaussian elimination, a whole row of the picture at a time. The w equations of row i are
    #     M @ x[i] - down[i - 1] * x[i - 1] - down[i] * x[i + 1] = ab[i]
    # where the matrix M has own[i] on its diagonal and -across[i] beside it. Those of row 0 give x[0], once
    # x[1] is known. Put into those of row 1 they remove x[0] from them, which changes M and the right side;
    # and so on downwards. The changed M depend on L alone.
    inverses = []
    for i in range(len(own)):
        M = torch.diag(own[i]) - torch.diag(across[i], 1) - torch.diag(across[i], -1)   # (w, w)
        if i:
            M -= down[i - 1][:, None] * inverses[-1] * down[i - 1]
        inverses.append(torch.linalg.inv(M))

    def smooth(ab):
        # The right sides, downwards.
        x = ab[0].permute(1, 2, 0).to(torch.float64, copy=True)                 # (h, w, 2)
        pull = down[:, :, None]                                                 # (h - 1, w, 1)
        for i in range(1, len(x)):
            x[i] += pull[i - 1] * (inverses[i - 1] @ x[i - 1])
        # The last row has none below it: it is solved first, then the others, upwards. Each takes the place
        # of its right side.
        x[-1] = inverses[-1] @ x[-1]
        for i in reversed(range(len(x) - 1)):
            x[i] = inverses[i] @ (x[i] + pull[i] * x[i + 1])
        return x.permute(2, 0, 1)[None].float()
    return smooth


def palette_of(ab):
    """a, b of a small picture (1, 2, h, w) -> its palette (576, 2): the colors of 24x24 pixels of it.

    With repeats: a color that covers half of the picture is half of the rows.
    """
    return F.interpolate(ab, (24, 24))[0].flatten(1).T  # the nearest pixels: no colors are invented


def transport(source, target, colors, blur):
    """Optimal transport: where do colors (Q, 2) go when the palette source (N, 2) becomes target (N, 2)?

    A plan is a table P (N, N): P[i, j] says how much of color i becomes color j. Every row and column adds up
    to 1. The best plan has the smallest sum of P * distance^2: colors move as little as possible. But it
    can send two nearly equal colors far apart. So we take the blurred plan of Cuturi (2013): with blur 0 it
    is the best one, with a large blur every color goes to the mean of the target. It is
    P[i, j] = exp(f[i] + g[j] - cost[i, j]) with cost = distance^2 / (2 blur^2); the numbers f and g, one for
    each row and column, are found below.
    Returns (Q, 2): for each color the mean of all that it becomes.
    """
    def cost(x):
        return torch.cdist(x, target).square() / (2 * blur ** 2)                # (rows of x, N)

    # Sinkhorn's iterations. f makes every row add up to 1: exp(f[i]) is 1 / the sum of exp(g[j] - cost[i, j])
    # over j. g does so for the columns, which disturbs the rows a little less each time.
    costs, g = cost(source), torch.zeros(len(target))
    for _ in range(20):
        f = -(g - costs).logsumexp(1)                                           # (N,)
        g = -(f[:, None] - costs).logsumexp(0)                                  # (N,)
    # f is only the factor that makes a row's sum 1, and softmax finds it, too. So a row can be computed for
    # any color, and not only for those of the source.
    return (g - cost(colors)).softmax(1) @ target                               # (Q, N) @ (N, 2) -> (Q, 2)


BLUR = .7     # the blur of transport, as a share of the deviation of the style's colors
BOOST = 1.5   # how much the colors are strengthened at most, if they have become paler than the style's


def move(ab, source, palettes):
    """Move the colors of a small picture, a, b (1, 2, h, w), toward the style's palette -> (1, 2, h, w).

    A code of 32 numbers brings only a part of the style's colors to some photos. Here they are moved: for one
    photo and style, the new a, b of a pixel are a function of its old a, b and of nothing else. So what had
    one color before this step has one color after it.
    source: the palette (576, 2) that ab has; palettes: [(weight, palette of a style)], of weights that add
    up to 1.
    """
    # The function becomes a table of 65x65 colors, interpolated between them: to transport each of the 16,384
    # pixels or more would take three times as long.
    line = torch.linspace(-128, 128, 65)
    # (The colors of source come last; they are needed for their mean chroma alone.)
    colors = torch.cat([torch.cartesian_prod(line, line), source])              # (65 * 65 + 576, 2)
    shifts = torch.zeros_like(colors)
    for weight, target in palettes:
        # A color becomes a mean of style colors, of those within about `blur` of each other: a share of the
        # deviation of the style's colors, at least 6. With less blur the palette is reached more exactly, but
        # two parts of a thing easily get different colors; with more the result is paler.
        blur = max(6., BLUR * target.std(0).norm().item())
        # Blur pulls every color toward those around it: to_style = color + way to the style + pull. Transport
        # of the palette to itself has the pull alone: to_itself = color + pull. The difference is the way.
        to_style, to_itself = (transport(source, goal, colors, blur) for goal in (target, source))
        moved = colors + to_style - to_itself
        # Smoothing and means make colors paler. One factor, at most BOOST, brings the mean chroma back to the
        # style's.
        wanted, found = (x.norm(dim=1).mean() for x in (target, moved[-len(source):]))
        shifts += weight * (moved * (wanted / found.clamp(min=.1)).clamp(1, BOOST) - colors)
    table = shifts[:65 * 65].T.reshape(1, 2, 65, 65)                            # (1, a or b, old a, old b)
    # grid_sample interpolates a table, at places (column, row) = (old b, old a) from -1 to 1.
    places = ab.flip(1).permute(0, 2, 3, 1) / 128                               # (1, h, w, 2)
    return ab + F.grid_sample(table, places, padding_mode="border", align_corners=True)  # (1, 2, h, w)


REFINE = 1.   # how much of the refined colors is taken; 0 is the network's answer
SIDE = 128    # short side at which pictures are refined: the constants above belong to it, and it is fast


def refine(lab, palettes, amount=REFINE):
    """The network's answer lab (1, 3, h, w) with steadier surfaces -> the same.

    Average and smooth first, so that patches of a thing are not moved to different colors of the style; and
    smooth again, because moving pulls apart what is left of them. palettes: as move takes them; amount: 0
    leaves lab as it is, 1 goes the whole way.
    """
    if not amount:
        return lab
    # A larger picture gets the change of a small one, enlarged, and keeps its own detail.
    scale = min(1, SIDE / min(lab.shape[2:]))
    small = F.interpolate(lab, [round(scale * side) for side in lab.shape[2:]], mode="area")
    L, ab = small.split([1, 2], dim=1)
    smooth = make_smooth(L)
    once = smooth(average_alike(ab, L))
    # join will pass the result through guided_filter, which changes the palette a little: so the palette to
    # start from is taken behind the same filter.
    slope, offset = guided_filter(once, L)
    twice = smooth(move(once, palette_of(slope * L + offset), palettes))
    change = F.interpolate(twice - ab, lab.shape[2:], mode="bilinear")          # (1, 2, h, w)
    return torch.cat([lab[:, :1], lab[:, 1:] + amount * change], dim=1)


def color(model, gray, z, palettes, amount=REFINE, strength=1.):
    """predict, then refine: gray (1, 1, h, w) -> L, a, b (1, 3, h, w); a, b are multiplied by strength."""
    lab = refine(predict(model, gray, z), palettes, amount)
    return lab * torch.tensor([1., strength, strength])[:, None, None]


# ---- drawings ---------------------------------------------------------------------------------------------

def gray_version(picture):
    """A PIL RGB picture -> the gray one of the same lightness, as the network sees it but in mode RGB."""
    return to_picture(gray_of(to_batch(picture)).expand(-1, 3, -1, -1)[0])


def sheet(rows, size):
    """A sheet like the paper's figure 8, from rows of PIL pictures, None for an empty cell -> PIL picture.

    The center square of each is shown, at size x size.
    """
    step = size + 4
    page = Image.new("RGB", (len(rows[0]) * step + 4, len(rows) * step + 4), "white")
    for y, row in enumerate(rows):
        for x, cell in enumerate(row):
            if cell:  # an empty one stays white
                page.paste(crop_square(cell, size), (4 + x * step, 4 + y * step))
    return page


def histograms(codes, names):
    """Figures 5 and 7: one histogram for each code (N, D), all on the same axis. Returns a PIL picture."""
    top = max(codes.abs().max().item(), 1e-6)  # the axis goes from -top to top, in 40 bars
    counts = torch.stack([torch.histc(z, 40, -top, top) for z in codes])  # (N, 40)
    highest = counts.max().item()
    page = Image.new("RGB", (420, 110 * len(names)), "white")
    pen = ImageDraw.Draw(page)
    for row, (name, bars) in enumerate(zip(names, counts)):
        y = 110 * row + 88  # where the bars stand
        for i, n in enumerate(bars.tolist()):
            pen.rectangle([10 + 10 * i, y - 66 * n / highest, 18 + 10 * i, y], fill="steelblue")
        pen.text((10, y - 84), ascii(name)[1:-1][:60], fill="black")  # the font holds ASCII only
        for x, value in [(10, -top), (200, 0), (370, top)]:
            pen.text((x, y + 2), f"{value:.3g}", fill="gray")
    return page


def round_numbers(low, high):
    """About five round numbers from low to high: 0.2, 0.4, 0.6 and so on."""
    power = 10 ** math.floor(math.log10(high - low))
    step = next(s * power for s in (2, 1, .5, .2) if (high - low) / (s * power) >= 3)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def draw_curves(rows, colors, across="step"):
    """Figures 2, 4 and 6: columns of log.csv over its steps. Returns a PIL picture.

    rows: dictionaries, as csv.DictReader gives them; colors: {name of a column: color of its line}; across:
    the column of the horizontal axis. Values of 0 and less are left out.
    """
    curves = {name: [(float(row[across]), float(row[name])) for row in rows
                     if float(row.get(name) or 0) > 0] for name in colors}
    curves = {name: curve for name, curve in curves.items() if curve}
    xs, ys = zip(*(sum(curves.values(), []) or [(1, 1)]))  # an empty log gets one dummy point
    # The vertical axis is logarithmic where values differ by more than a factor of 100.
    scale = math.log10 if max(ys) > 100 * min(ys) else float
    right, low, high = max(xs), scale(min(ys)), scale(max(ys))
    margin = .05 * (high - low) or .05 * abs(high) or .05
    low, high = low - margin, high + margin
    page = Image.new("RGB", (640, 400), "white")
    pen = ImageDraw.Draw(page)

    def place(x, y):
        """A step and a scaled value -> the place on the page."""
        return 60 + 560 * x / right, 20 + 345 * (high - y) / (high - low)

    # The axes: horizontal lines with their values, and numbers of steps below.
    if scale is float:
        marks = [(y, f"{y:.6g}") for y in round_numbers(low, high)]
    else:
        marks = [(e, f"{10. ** e:g}") for e in range(math.ceil(low), math.floor(high) + 1)]
        marks = marks[::math.ceil(len(marks) / 7)]
    for y, text in marks:
        pen.line([place(0, y), place(right, y)], fill="gainsboro")
        pen.text((6, place(0, y)[1] - 6), text, fill="gray")
    for x in round_numbers(0, right):
        pen.text((place(x, 0)[0], 370), f"{x:.6g}", fill="gray", anchor="ma")
    pen.text((620, 384), across, fill="gray", anchor="ra")
    # The curves, their points as dots, and their names in the color of the line.
    left = 60
    for name, curve in curves.items():
        points = [place(x, scale(y)) for x, y in curve]
        pen.line(points, fill=colors[name], width=2)
        for x, y in points:
            pen.ellipse([x - 2, y - 2, x + 2, y + 2], fill=colors[name])
        pen.text((left, 4), name.replace("_", " "), fill=colors[name])
        left += pen.textlength(name) + 14
    return page


# ---- the command line -------------------------------------------------------------------------------------

def parse(argv):
    """The command line -> its options. Exits with code 2 and one line for a mistake.

    Photos come first and the style last, as in a sentence: color this one like that one.
    """
    def numbers(text):
        """"2,1" -> [2., 1.]"""
        return [float(w) for w in text.split(",")]

    parser = Parser(prog="infer.py", usage="python infer.py PHOTO... STYLE [options]",
                    description="Color gray photos with the palette of a style picture.")
    add = parser.add_argument
    add("pictures", nargs="+", metavar="PHOTO... STYLE",
        help="files (jpg png webp avif tif gif bmp) or folders; the last one is the style")
    add("--styles", nargs="+", default=[], metavar="FILE", help="more style pictures or folders")
    add("--output", default=".", help="a file, or a folder for PHOTO_STYLE.png (default: here)")
    add("--weights", default="ours", metavar="FILE", help="a checkpoint, or the word ours (default) or paper")
    add("--size", type=int, default=0, help="short side that the network sees (default: as trained)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--raw", action="store_true", help="the small colored picture, not joined with the photo")
    add("--grid", action="store_true", help="one sheet of squares as in figure 8: a row a photo, a column a style")
    add("--blend", type=numbers, metavar="W,W", help="mix all styles: a weight each (or --blend=-1,2)")
    add("--strength", type=float, default=1., help="of the colors: 0 is gray, 1 is what comes out (default)")
    add("--refine", type=float, default=REFINE, help="steadier surfaces: 0 not at all, 1 fully (default)")
    add("--latents", action="store_true", help="all pictures are styles: show the numbers in their codes")
    args = parser.parse_args(argv)
    for wrong, text in [
            # argparse cannot say these. Each is a pair: what would be wrong, and the line that explains it.
            (not args.latents and len(args.pictures) + len(args.styles) < 2,
             "a style picture is missing: name a photo, then a style, as in  python infer.py gray.jpg style.jpg"),
            (args.grid + args.raw + args.latents > 1, "--grid, --raw and --latents: only one at a time"),
            (args.latents and args.blend, "--latents shows each style's own code; leave out --blend"),
            (args.size and not 16 <= args.size <= 4096, "--size must be from 16 to 4096"),
            (not 0 <= args.strength <= 10, "--strength must be from 0 to 10"),
            (not 0 <= args.refine <= 1, "--refine must be from 0 to 1"),
            # (Weights are divided by their sum: near 0 it would make them huge.)
            (args.blend and not max(map(abs, args.blend)) / 100 < abs(sum(args.blend)) < 1e6,
             "--blend takes numbers with commas between them, as in 2,1; their sum must not be near 0")]:
        if wrong:
            parser.error(text)
    return args


class Files:
    """The files of one call: which of them could not be read, and where results go.

    A result never replaces an input, and two results never go to one file: nobody asked to lose a picture.

    output: as on the command line; inputs: paths that must not be overwritten; wanted: how many results
    will be saved. taken: keys of inputs and results; failures: how many pictures could not be read. Raises
    UserError for an impossible output.
    """

    def __init__(self, output, inputs, wanted):
        self.output, self.wanted, self.saved, self.failures = Path(output), wanted, 0, 0
        self.taken, self.started = set(map(self.key, inputs)), time.monotonic()
        # A name with an ending is a file, unless it is a folder already.
        self.is_file = self.output.suffix != "" and not (os.path.isdir(output) or str(output).endswith("/"))
        if self.is_file and wanted > 1:
            raise UserError(f"{wanted} pictures do not fit into one file; name a folder as --output", output)
        if self.is_file and self.key(output) in self.taken:
            raise UserError("is one of the inputs, and stays; choose another --output", output)
        if self.is_file and self.output.suffix.lower() not in EXTENSIONS:
            raise UserError(f"unknown picture format ({' '.join(sorted(EXTENSIONS))}); the name of a new "
                            "folder must end in /", output)

    @staticmethod
    def key(path):
        """The same for all names of a file: on many disks, Macs' too, Photo.png is photo.png."""
        return os.path.realpath(path).casefold()

    def open(self, paths):
        """(path, picture) of those that can be read; any other gets a line and counts as a failure."""
        for path in paths:
            try:
                yield path, open_picture(path)
            except UserError as error:
                print(f"infer.py: {error}", file=sys.stderr)
                self.failures += 1

    def save(self, picture, name):
        """Save as --output, or as `name`.png in that folder. Raises UserError."""
        path = self.output if self.is_file else self.output / f"{name}.png"
        # a/x.jpg and b/x.jpg would both become x_style.png: the second one becomes x_style_2.png. So does a
        # result that would replace an input.
        numbers = itertools.count(2)
        while self.key(path) in self.taken:
            path = self.output / f"{name}_{next(numbers)}.png"
        limit = MAX_SIDE.get(path.suffix.lower(), sys.maxsize)
        if max(picture.size) > limit:
            raise UserError(f"this format holds at most {limit} pixels a side; choose .png", path)
        # Color is what this is about. JPEG and AVIF would store it at half the size without 4:4:4; WebP does
        # so unless it loses nothing at all.
        options = dict(quality=95, subsampling="4:4:4", lossless=path.suffix.lower() == ".webp")
        save_atomically(path, lambda part: picture.save(part, **options))
        self.taken.add(self.key(path))
        self.saved += 1
        print(printable(path).ljust(40 * sys.stdout.isatty()))  # on a terminal, over the line of progress
        # On a terminal, how far it is; on stderr, so that it does not get into a list of the files.
        if sys.stderr.isatty() and self.saved < self.wanted:
            left = (time.monotonic() - self.started) * (self.wanted / self.saved - 1)
            print(f"{self.saved} of {self.wanted}, {left:.0f} s left ", end="\r", file=sys.stderr)


def find_pictures(arguments):
    """Files and folders -> files. What has no pictures inside stands for itself: a file, or an empty folder.

    (In a folder, files that are no pictures are passed over; a file that was named is tried, whatever it is.
    Opening an empty folder will fail, and say so.)
    """
    return [path for argument in arguments for path in list_pictures(argument) or [Path(argument)]]


def make_looks(styles, blend=None):
    """What to color with: [(name, code (1, D), [(weight, palette), ...])], for each style or for their blend.

    styles: [(name, small picture (1, 3, h, w), code)]. Codes are plain vectors: their weighted mean is a code
    as well. The palettes of a blend stay apart, and refine takes the mean of the ways to them.
    """
    palettes = [palette_of(rgb_to_lab(small)[:, 1:]) for _, small, _ in styles]
    if not blend:
        return [(name, z, [(1., target)]) for (name, _, z), target in zip(styles, palettes)]
    shares = [w / sum(blend) for w in blend]
    return [("blend", sum(w * z for w, (*_, z) in zip(shares, styles)), list(zip(shares, palettes)))]


def color_pairs(model, photos, styles, files, size, args):
    """Every photo with every style, or with their blend: PHOTO_STYLE.png or PHOTO_blend.png.

    photos: paths; styles: [(name, small picture (1, 3, h, w), code (1, D))]; size: of the short side that the
    network sees.
    """
    looks = make_looks(styles, args.blend)
    for path, photo in files.open(photos):
        gray = gray_of(resize_short_side(photo, size))  # (1, 1, h, w), made once for all styles
        for name, z, palettes in looks:
            lab = color(model, gray, z, palettes, args.refine, args.strength)  # (1, 3, h, w)
            # (No name for the result: it would keep the memory of a large picture while the next one is made.)
            files.save(join(photo, lab) if not args.raw else to_picture(lab_to_gamut(lab)[0]),
                       f"{path.stem}_{name}")
        del photo  # likewise


def color_grid(model, photos, styles, files, size, args):
    """One sheet: photos down, styles across. The photos' own colors come first, if any photo has some."""
    pictures = [crop_square(photo, size) for _, photo in files.open(photos)]
    own = any(mean_chroma(p) >= MIN_CHROMA for p in pictures)  # else that column would be all gray
    looks = make_looks(styles, args.blend)
    # Nothing over the gray photos and over their own colors, then the styles (a blend has no picture).
    rows = [[None] * (1 + own) + ([None] if args.blend else [to_picture(small[0]) for _, small, _ in styles])]
    for photo in pictures:
        small = to_batch(photo)                                                 # (1, 3, size, size)
        gray = gray_of(small)  # made once for all styles
        # A photo as its own style: with --refine 0 this is what the network was trained to restore.
        itself = make_looks([("", small, encode(model, small))]) if own else []
        rows.append([gray_version(photo)])
        for _, z, palettes in itself + looks:
            rows[-1].append(join(photo, color(model, gray, z, palettes, args.refine, args.strength)))
    if pictures:
        files.save(sheet(rows, size), "grid")


def show_codes(styles, files):
    """The numbers in the codes of all styles, as a table and as histograms (figures 5 and 7).

    If the numbers are the same for all styles, the network cannot tell styles apart.
    """
    codes = torch.cat([z for *_, z in styles]).cpu()                            # (N, D)
    print(f"Each style is a code of {codes.shape[1]} numbers. Their smallest, mean, largest, and deviation:")
    for (name, *_), z in zip(styles, codes):
        numbers = z.min(), z.mean(), z.max(), z.std(correction=0)
        print(f"{printable(name):40s}", *(f"{number:9.3f}" for number in numbers))
    if len(styles) > 1:
        spread = codes.std(0, correction=0)                                     # (D,)
        print(f"spread over styles: {spread.mean():.4f}, the mean deviation of a number from style to style")
    files.save(histograms(codes, [name for name, *_ in styles]), "latents")


def main(argv=None):
    """Which pictures, which network, which styles; then one of three ways to show them -> the exit code.

    The exit code is 0, or 1 if some picture could not be read; the others are made all the same, but a blend
    needs all of its styles.
    """
    args = parse(argv)
    # The last picture is the style; but with --styles a single one is the photo, and --latents has no photo.
    n = 0 if args.latents else max(1, len(args.pictures) - 1)
    photos, style_paths = find_pictures(args.pictures[:n]), find_pictures(args.pictures[n:] + args.styles)
    # Several files before the last one: somebody may have meant several styles.
    if n > 1 and not args.styles and not any(map(os.path.isdir, args.pictures)):
        style = printable(args.pictures[n])
        print(f"infer.py: {n} photos, and {style} as their style; more styles go behind --styles", file=sys.stderr)
    if args.blend and len(args.blend) != len(style_paths):
        raise UserError(f"--blend has {len(args.blend)} weights for {len(style_paths)} styles; more styles "
                        "go behind --styles")
    # What is often wrong is looked at before the first picture is made: to fail after an hour at the last of
    # a thousand photos would be worse than to fail now.
    weights = {"ours": OURS, "paper": PAPER}.get(args.weights, args.weights)
    wanted = 1 if args.grid or args.latents else len(photos) * (1 if args.blend else len(style_paths))
    files = Files(args.output, [*photos, *style_paths, weights], wanted)
    model, trained_size = load_model(weights, pick_device(args.device))
    if not model.config.use_style:
        raise UserError("a plain U-Net without style encoder; it cannot follow a style picture", weights)
    size = args.size or trained_size

    # Styles before photos. The code of a style depends on no photo, so each is read and encoded once.
    styles = []  # (name, small picture (1, 3, h, w), code (1, D))
    for path, picture in files.open(style_paths):
        small = resize_short_side(picture, size)
        styles.append((path.stem, small, encode(model, small)))
        if len(style_paths) == 1 and mean_chroma(picture) < 1 and not args.latents:
            print(f"infer.py: {printable(path)} is gray, and so will be the result; the style comes last",
                  file=sys.stderr)
        del picture
    if not styles or (args.blend and files.failures):
        return 1
    if args.latents:
        show_codes(styles, files)
    elif args.grid:
        color_grid(model, photos, styles, files, size, args)
    else:
        color_pairs(model, photos, styles, files, size, args)
    return min(files.failures, 1)


if __name__ == "__main__":
    run_program(main)
