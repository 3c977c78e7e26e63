"""Colour gray photos with the palettes of style pictures, using a checkpoint that train.py made.

    python infer.py gray.jpg style.jpg                       writes gray_style.png
    python infer.py photos/ paintings/ --output results      every photo with every painting
    python infer.py gray.jpg a.jpg --styles b.jpg --blend 2,1
    python infer.py photos/ paintings/ --grid --output sheet.png

The network only ever sees the photo at about its training size. Its answer, the a and b planes, is enlarged
to the size of the photo and joined with the photo's own L: as sharp as the input, whatever its size.

    style --fit, encode--> z (1, D) --refine--.
    photo --fit, gray_of--> (1, 1, h, w) --colorize--> a, b (h, w) --enlarge, join L--> picture (H, W)
"""
import argparse
import os
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F

from data import (EXTENSIONS, MIN_CHROMA, UserError, directions, gray_of, lab_to_gamut, lightness, list_pictures,
                  mean_chroma, network_to_lab, open_picture, rgb_to_lab, rgb_to_network, run, save_atomically, show,
                  sliced_wasserstein, square, to_picture, to_tensor)
from model import Colorizer, ModelConfig

FORMAT = 1  # of checkpoints; a program that reads more than before counts on
SHIPPED = Path(__file__).parent / "weights" / "colorizer.pt"
REFINE_STEPS = 10  # more reach more of the palette, and begin to paint washes into the sky
STRIP_PIXELS = 1 << 18  # pixels that are joined at a time; sets the memory beyond the decoded pictures


# ---- checkpoints ------------------------------------------------------------------------------------------

def pick_device(name):
    """"auto", "cpu", "cuda" or "mps" -> torch.device. Raises UserError for one that is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(d for d in ("cuda", "mps", "cpu") if there[d])
    if not there[name]:
        raise UserError(f"--device {name}: this machine or this build of torch has none; use --device cpu")
    return torch.device(name)


def load_checkpoint(path):
    """Read a checkpoint of train.py: a dictionary of tensors and plain values. Raises UserError.

    weights_only=True: a checkpoint is data, and no code that somebody put into it is ever run.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{show(path)}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not compress; a compressed one may hold terabytes
            if any(entry.compress_type for entry in archive.infolist()):
                raise ValueError
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        version, config, weights = checkpoint["format"], dict(checkpoint["model"]), dict(checkpoint["weights"])
        size = int(checkpoint["settings"]["size"])
    except Exception:  # a torn zip, a foreign pickle, a picture: the cure is the same
        raise UserError(f"{show(path)}: not a checkpoint of this program, or a damaged one; train.py writes them "
                        "as last.pt and best.pt") from None
    if version != FORMAT:
        raise UserError(f"{show(path)}: checkpoint format {version}, but this program reads format {FORMAT}; "
                        "update the program")
    # Checked before anything is built: a width of a million would ask for terabytes.
    sane = {"color": lambda v: v in ("rgb", "lab"), "width": lambda v: isinstance(v, int) and 1 <= v <= 256,
            "latent": lambda v: isinstance(v, int) and 1 <= v <= 4096, "dropout": lambda v: isinstance(v, float) and 0 <= v < 1,
            **{k: lambda v: isinstance(v, bool) for k in ("style", "sigmoid", "relu", "resize")}}
    config = checkpoint["model"] = asdict(ModelConfig()) | config  # an older file does not know the newest settings
    fits = 16 <= size <= 4096 and config.keys() == sane.keys() and all(sane[k](v) for k, v in config.items())
    if fits:
        with torch.device("meta"):  # shapes without memory
            expected = Colorizer(ModelConfig(**config)).state_dict()
        fits = {k: v.shape for k, v in expected.items()} == {k: getattr(v, "shape", None) for k, v in weights.items()}
    if not fits:
        raise UserError(f"{show(path)}: its settings and its weights do not describe a network of this program")
    return checkpoint


def load_model(path, device="cpu"):
    """A checkpoint file -> (the network in evaluation mode, its weights frozen; the size it was trained at)."""
    checkpoint = load_checkpoint(path)
    model = Colorizer(ModelConfig(**checkpoint["model"]))
    model.load_state_dict(checkpoint["weights"])  # the shipped file is in half precision; this makes it fp32
    return model.to(device).eval().requires_grad_(False), int(checkpoint["settings"]["size"])


# ---- pictures in, pictures out ----------------------------------------------------------------------------

def fit(picture, size):
    """Scale a PIL picture so that its short side is `size`, its shape kept; the long one at most 4 x size.

    Returns (1, 3, h, w) in [0, 1].
    """
    W, H = picture.size
    scale = size / min(W, H)
    w, h = (min(4 * size, max(1, round(side * scale))) for side in (W, H))
    small = picture.resize((w, h), Image.Resampling.BICUBIC, reducing_gap=3)
    return to_tensor(small)[None] / 255                                               # (1, 3, h, w)


@torch.no_grad()
def encode(model, picture, size):
    """A PIL style picture -> its code z (1, D)."""
    device = next(model.parameters()).device
    return model.encode_style(rgb_to_network(fit(picture, size).to(device), model.config.color))


def refine(model, photo, style, z, size, steps=REFINE_STEPS):
    """Fit the code of a style to one photo by a few steps of Adam on the code alone: (1, D) -> (1, 9, D).

    photo, style: PIL pictures. The encoder has never seen the photo, and the same code gives one photo all of the
    style's colours and another half of them. So we look at the result: its palette is compared with the style's, by
    the distance that the network was trained with, and the code, one for each AdaIN layer now, moves against the
    slope. The weights stay as they are. (StyleGAN's users fit codes to pictures in the same way.) 0 steps return z.
    """
    if not steps:
        return z
    gray = gray_of(fit(photo, size).to(z.device))                                     # (1, 1, h, w)
    wanted = rgb_to_lab(fit(style, size).to(z.device))[:, 1:]
    wanted = F.interpolate(wanted, gray.shape[2:])                                    # as many pixels as the photo has
    z = z[:, None].repeat(1, model.levels, 1)                                         # (1, 9, D)
    unit = z.abs().mean()  # of a step: codes of one network are a hundred times as large as another's
    change = torch.zeros_like(z, requires_grad=True)
    adam = torch.optim.Adam([change], lr=.03)
    for step in range(steps):
        lab = network_to_lab(model.colorize(gray, z + unit * change), gray, model.config.color)
        shown = rgb_to_lab(lab_to_gamut(torch.cat([lightness(gray), lab[:, 1:]], dim=1)))
        # Other directions in each step: their spacing times the golden section, so that no two steps agree.
        distance = sliced_wasserstein(shown[:, 1:], wanted, directions(8, z.device, step * .618 % 1)).mean()
        change.grad, = torch.autograd.grad(distance, change)
        adam.step()
    return (z + unit * change).detach()


@torch.no_grad()
def colorize(model, picture, z, size, strength=1., raw=False):
    """Colour a PIL photo of any size with the code z (1, D), or a code a layer (1, 9, D); returns a PIL picture.

    Of a colour photo only the L is used. strength scales the chroma: 0 gray, 1 as the network says.
    raw: the network's own small picture instead of the photo's L with enlarged colours.
    """
    device = next(model.parameters()).device
    gray = gray_of(fit(picture, size).to(device))                                     # (1, 1, h, w)
    lab = network_to_lab(model.colorize(gray, z), gray, model.config.color).cpu()     # (1, 3, h, w)
    lab[:, 1:] *= strength
    if raw:
        return to_picture(lab_to_gamut(lab)[0])

    # Transposed convolutions can leave a checkerboard of single pixels, which enlarging would turn into dots. The
    # filter [1 2 1] / 4 in both directions, as two passes of [1 1] / 2, takes out just that frequency.
    ab = F.pad(lab[:, 1:], (1, 1, 1, 1), mode="replicate")
    ab = F.avg_pool2d(F.avg_pool2d(ab, 2, stride=1), 2, stride=1)                     # (1, 2, h, w)

    # Joined in strips of rows, so that memory does not grow with the photo beyond the two pictures
    # themselves. Pillow's `box` samples each strip as a part of the whole: the seams cannot be seen.
    W, H = picture.size
    planes = [Image.fromarray(plane.numpy()) for plane in ab[0]]                      # mode F, (h, w)
    result = Image.new("RGB", (W, H))
    rows = max(1, STRIP_PIXELS // W)
    for y in range(0, H, rows):
        end = min(y + rows, H)
        strip = to_tensor(picture.crop((0, y, W, end)))[None] / 255                   # (1, 3, rows, W)
        box = (0, y * ab.shape[2] / H, ab.shape[3], end * ab.shape[2] / H)
        large = [np.array(p.resize((W, end - y), Image.Resampling.BICUBIC, box=box)) for p in planes]
        strip = torch.cat([rgb_to_lab(strip)[:, :1], torch.from_numpy(np.stack(large))[None]], dim=1)
        result.paste(to_picture(lab_to_gamut(strip)[0]), (0, y))
    return result


def gray_version(picture):
    """A PIL RGB picture -> the gray one of the same lightness, as the network sees it but in mode RGB."""
    return to_picture(gray_of(to_tensor(picture)[None] / 255).expand(-1, 3, -1, -1)[0])


def sheet(model, photos, styles, codes, size, strength=1.):
    """The figure 8 of some photos: a row each, with the gray photo and its colourings.

    photos: PIL pictures; styles: PIL pictures for the first row, or None for an empty cell; codes: a function that
    gives for a photo's centre square the codes of its colourings, one a style, in their order. Returns a PIL picture.
    """
    cells = {(0, column): square(style, size) for column, style in enumerate(styles, start=1) if style}
    for row, photo in enumerate(photos, start=1):
        photo = square(photo, size)
        cells[row, 0] = gray_version(photo)
        for column, z in enumerate(codes(photo), start=1):
            cells[row, column] = colorize(model, photo, z, size, strength)
    page = Image.new("RGB", ((len(styles) + 1) * (size + 4) + 4, (len(photos) + 1) * (size + 4) + 4), "white")
    for (row, column), cell in cells.items():
        page.paste(cell, (4 + column * (size + 4), 4 + row * (size + 4)))
    return page


def histograms(codes, names):
    """Figures 5 and 7: one histogram for each code (N, D), all on the same axis. Returns a PIL picture."""
    top = max(codes.abs().max().item(), 1e-6)
    counts = torch.stack([torch.histc(z, 40, -top, top) for z in codes])              # (N, 40)
    page = Image.new("RGB", (420, 110 * len(names)), "white")
    pen = ImageDraw.Draw(page)
    for row, (name, bars) in enumerate(zip(names, counts)):
        y = 110 * row + 88
        for i, n in enumerate(bars.tolist()):
            pen.rectangle([10 + 10 * i, y - 66 * n / counts.max().item(), 18 + 10 * i, y], fill="steelblue")
        pen.text((10, y - 84), ascii(name)[1:-1][:60], fill="black")
        for x, value in [(10, -top), (200, 0), (370, top)]:
            pen.text((x, y + 2), f"{value:.3g}", fill="gray")
    return page


# ---- the command line -------------------------------------------------------------------------------------

def pictures_of(arguments):
    """Files and folders -> files."""
    found = []
    for argument in arguments:
        inside = list_pictures(argument) if Path(argument).is_dir() else [Path(argument)]
        if not inside:
            raise UserError(f"{show(argument)}: no picture in this folder ({' '.join(sorted(EXTENSIONS))})")
        found += inside
    return found


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="infer.py", usage="python infer.py PHOTO... STYLE [options]    (python infer.py --help lists them)",
        description="Colour gray photos with the palette of a style picture.")
    parser.add_argument("pictures", nargs="+", metavar="PHOTO... STYLE", help="files or folders; the last is the style")
    parser.add_argument("--styles", nargs="+", default=[], metavar="FILE", help="more style pictures or folders")
    parser.add_argument("--output", default=".", help="a file, or a folder for PHOTO_STYLE.png (default: here)")
    parser.add_argument("--weights", default=SHIPPED, metavar="FILE", help="a checkpoint (default: the one that ships)")
    parser.add_argument("--size", type=int, default=0, help="short side that the network sees (default: as trained)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--raw", action="store_true", help="the network's own small output, not joined with the photo")
    parser.add_argument("--grid", action="store_true", 
                        help="one sheet as in figure 8: a row a photo, gray, in its own colours if it has any, a column a style")
    parser.add_argument("--blend", metavar="W1,W2,...", help="mix all styles into one, a weight each")
    parser.add_argument("--strength", type=float, default=1., help="0 leaves the photo gray, 1 is the style (default)")
    parser.add_argument("--refine", type=int, default=REFINE_STEPS, metavar="STEPS",
                        help="fit the code to each photo; 0: take it as it is, several times faster (default: %(default)s)")
    parser.add_argument("--latents", action="store_true",
                        help="all pictures are styles: print their codes' statistics and draw histograms")
    args = parser.parse_args(argv)
    if not args.latents and len(args.pictures) + len(args.styles) < 2:
        parser.error("a style picture is missing: name a photo and then a style, as in  python infer.py gray.jpg style.jpg")
    if args.raw and args.grid:
        parser.error("--raw and --grid do not go together")
    if args.size and not 16 <= args.size <= 4096:
        parser.error("--size must be between 16 and 4096")
    if not 0 <= args.strength <= 10:
        parser.error("--strength must be between 0 and 10")
    if not 0 <= args.refine <= 1000:
        parser.error("--refine must be between 0 and 1000")
    if args.blend:
        try:
            args.blend = [float(w) for w in args.blend.split(",")]
        except ValueError:
            args.blend = []
        if not all(abs(w) < 1e6 for w in args.blend) or abs(sum(args.blend)) < 1e-6:
            parser.error("--blend takes numbers with commas between them that do not add up to 0, as in 2,1")
    return args


def main(argv=None):
    args = parse(argv)
    # With --styles, a single picture is the photo; with --latents there is no photo.
    n = 0 if args.latents else max(1, len(args.pictures) - 1)
    photos, style_paths = pictures_of(args.pictures[:n]), pictures_of(args.pictures[n:] + args.styles)
    if args.blend and len(args.blend) != len(style_paths):
        raise UserError(f"--blend has {len(args.blend)} weights for {len(style_paths)} styles")
    output = Path(args.output)
    one_file = output.suffix != "" and not output.is_dir() and not args.output.endswith("/")
    if args.grid or args.latents:
        wanted = 1
    else:
        wanted = len(photos) * (1 if args.blend else len(style_paths))
    if one_file and wanted > 1:
        raise UserError(f"--output {show(output)}: {wanted} pictures do not fit into one file; name a folder")
    if one_file and output.suffix.lower() not in EXTENSIONS:
        raise UserError(f"--output {show(output)}: unknown picture format ({' '.join(sorted(EXTENSIONS))}); "
                        "a folder that is not there yet must end in /")

    device = pick_device(args.device)
    model, size = load_model(args.weights, device)
    size = args.size or size
    if not model.config.style:
        raise UserError(f"{show(args.weights)}: a plain U-Net without style encoder; it cannot follow a style picture")

    failed = 0
    inputs = {os.path.realpath(p) for p in photos + style_paths}
    taken = set()

    def save(picture, name):
        """Save under --output, or under `name` in that folder. An input is never overwritten."""
        path = output if one_file else output / f"{name}.png"
        for n in range(2, 10_000):  # a/x.jpg and b/x.jpg would both become x_style.png
            if path not in taken:
                break
            path = output / f"{name}_{n}.png"
        if os.path.realpath(path) in inputs:
            raise UserError(f"{show(path)}: is one of the inputs, and stays; choose another --output")
        taken.add(path)
        save_atomically(path, lambda part: picture.save(part, quality=95, subsampling=0))
        print(show(path))

    def readable(paths):
        """(path, picture) of those that can be opened; the others get their line and count as failures."""
        nonlocal failed
        for path in paths:
            try:
                yield path, open_picture(path)
            except UserError as error:
                print(f"infer.py: {error}", file=sys.stderr)
                failed += 1

    styles = []  # (name, small picture, code): a style file is read and encoded once, for all photos
    for path, picture in readable(style_paths):
        styles.append((path.stem, to_picture(fit(picture, size)[0]), encode(model, picture, size)))
        if mean_chroma(picture) < 1 and not args.latents:
            print(f"infer.py: {show(path)} is gray, and so will be the result; the style comes last", file=sys.stderr)
    if not styles or (args.blend and failed):
        return 1
    if args.latents:
        codes = torch.cat([z for *_, z in styles]).cpu()                              # (N, D)
        print(f"{'style':40s} {'min':>8s} {'mean':>8s} {'max':>8s} {'deviation':>9s}")
        for (name, *_), z in zip(styles, codes):
            print(f"{show(name):40s} {z.min():8.3f} {z.mean():8.3f} {z.max():8.3f} {z.std(correction=0):9.3f}")
        if len(styles) > 1:
            spread = codes.std(0, correction=0)
            print(f"spread over styles: {spread.mean():.4f}, {(spread > .01).sum()} of {len(spread)} dimensions alive")
        save(histograms(codes, [name for name, *_ in styles]), "latents")
        return min(failed, 1)
    names, thumbnails = [name for name, *_ in styles], [picture for _, picture, _ in styles]
    if args.blend:
        names, thumbnails = ["blend"], [None]

    def codes(photo, own=False):
        """The codes that this photo is coloured with, one after the other: its own, then one a style, or their mean."""
        photo = to_picture(fit(photo, size)[0])  # once, for all styles; to fit it again changes nothing
        if own:
            yield refine(model, photo, photo, encode(model, photo, size), size, args.refine)
        fitted = (refine(model, photo, picture, z, size, args.refine) for _, picture, z in styles)
        if args.blend:
            yield sum(w * z for w, z in zip(args.blend, fitted)) / sum(args.blend)
        else:
            yield from fitted

    if args.grid:
        pictures = [square(picture, size) for _, picture in readable(photos)]
        own = any(mean_chroma(p) >= MIN_CHROMA for p in pictures)
        if pictures:
            page = sheet(model, pictures, [None] * own + thumbnails, lambda photo: codes(photo, own), size, args.strength)
            save(page, "grid")
        return min(failed, 1)
    for path, picture in readable(photos):
        for name, z in zip(names, codes(picture)):
            save(colorize(model, picture, z, size, args.strength, args.raw), f"{path.stem}_{name}")
    return min(failed, 1)


if __name__ == "__main__":
    run(main)
