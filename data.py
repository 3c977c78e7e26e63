"""From files to tensors: RGB <-> LAB, palettes, pictures of every format, crops, data sets.

    a folder --list_pictures, drop_gray_and_broken--> paths --Photos--> uint8 crops --DataLoader--> train.py
    a file   --open_picture--> an 8-bit RGB picture, whatever its format was

This file imports no network; it makes the tensors that a network takes, and pictures of what it answers.
Color comes first; the plumbing, messages and safe writing of files, stands at the end. Look at a drawn scene,
and count what a training folder holds:

    python -c "import data; data.draw_scene(1).show()"
    python -c "import data; print(len(data.drop_gray_and_broken(data.list_pictures('examples'), 100)))"
"""
import argparse
import contextlib
import difflib
import errno
import functools
import logging
import math
import os
import shutil
import socket
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch.nn import functional as F

# ---- color: sRGB <-> CIELAB -------------------------------------------------------------------------------
# CIELAB describes a color by its lightness L in [0, 100] and two numbers: a (green to red) and b (blue to
# yellow). sqrt(a^2 + b^2) is its chroma, the direction of (a, b) its hue. The a, b of sRGB colors lie in
# [-86.2, 98.2] and [-107.9, 94.5]. White is daylight, D65, as in sRGB. In this section pictures are float32
# tensors (B, 3, H, W); below it a "picture" is one of Pillow's (PIL).
#
# torch.where back-propagates through both of its branches. x ** (1/3) has an infinite slope at 0, and
# 0 * inf = NaN: so every fractional power below is taken of a clamped value.

RGB_TO_XYZ = np.array([[.412453, .357580, .180423], [.212671, .715160, .072169], [.019334, .119193, .950227]])
WHITE = np.array([.95047, 1., 1.08883])
AB_SCALE = 110.  # the network sees and makes a, b divided by this: about [-1, 1]


def apply_matrix(matrix, x):
    """Multiply the three channels of x (B, 3, H, W) by a 3x3 numpy matrix, or by one row of it."""
    matrix = torch.from_numpy(matrix.astype(np.float32)).to(x.device)  # float64 does not exist on MPS
    return torch.einsum("ij,bjhw->bihw", matrix, x)


def srgb_to_linear(c):
    """Undo the gamma curve of sRGB: [0, 1] -> light, [0, 1]."""
    return torch.where(c > .04045, ((c.clamp(min=.04045) + .055) / 1.055) ** 2.4, c / 12.92)


def linear_to_srgb(c):
    """Light -> sRGB, the inverse of srgb_to_linear."""
    return torch.where(c > .0031308, 1.055 * c.clamp(min=.0031308) ** (1 / 2.4) - .055, 12.92 * c)


def lab_curve(t):
    """The curve f in the definition of CIELAB (CIE 15): a cube root with a straight piece near black."""
    return torch.where(t > .008856, t.clamp(min=.008856) ** (1 / 3), 7.787 * t + 16 / 116)


def rgb_to_lab(rgb):
    """sRGB (B, 3, H, W) in [0, 1] -> L, a, b (B, 3, H, W)."""
    fx, fy, fz = lab_curve(apply_matrix(RGB_TO_XYZ / WHITE[:, None], srgb_to_linear(rgb))).unbind(1)
    return torch.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], dim=1)  # (B, 3, H, W)


def lab_to_linear(lab):
    """L, a, b (B, 3, H, W) -> linear RGB (B, 3, H, W), the light that a screen would have to send."""
    L, a, b = lab.unbind(1)
    fy = (L + 16) / 116
    f = torch.stack([fy + a / 500, fy, fy - b / 200], dim=1)                    # (B, 3, H, W)
    # .2068966 is the cube root of .008856: where the curve has its straight piece.
    xyz = torch.where(f > .2068966, f.clamp(min=.2068966) ** 3, (f - 16 / 116) / 7.787)
    return apply_matrix(np.linalg.inv(RGB_TO_XYZ) * WHITE, xyz)


def lab_to_rgb(lab):
    """L, a, b (B, 3, H, W) -> sRGB (B, 3, H, W), outside [0, 1] where no screen can show the color.

    Nothing is clipped, so that a loss on the result can still pull such a color back.
    """
    return linear_to_srgb(lab_to_linear(lab))


def lab_to_gamut(lab):
    """L, a, b (B, 3, H, W) -> sRGB in [0, 1] of exactly the same L; impossible colors lose chroma instead.

    Clipping each channel would change the lightness, that is, draw into the photo. In linear light the
    straight line from a color to the gray of the same luminance keeps L; we go along it until the last
    channel is inside [0, 1]. t = 1 is the color itself, t = 0 the gray.
    """
    rgb = lab_to_linear(lab)
    luminance = apply_matrix(RGB_TO_XYZ[1:2], rgb).clamp(0, 1)                  # (B, 1, H, W), the gray
    wish = rgb - luminance                                                      # from the gray to the color
    room = torch.where(wish > 0, 1 - luminance, luminance)  # from the gray to the border, in each channel
    t = (room / wish.abs().clamp(min=1e-6)).amin(dim=1, keepdim=True).clamp(max=1)  # (B, 1, H, W)
    return linear_to_srgb(luminance + t * wish).clamp(0, 1)


def gray_of(rgb):
    """The network's input: sRGB (B, 3, H, W) -> gray (B, 1, H, W) in [0, 1].

    This is the v of the neutral color (v, v, v) that has the L of the pixel: a gray photo is its own gray
    version, and L can be computed back from it. (Pillow's "L" is something else: pure red has L 53, but its
    luma, 76 of 255, has L 32. A network trained on luma would see its training photos too dark.)
    """
    return linear_to_srgb(apply_matrix(RGB_TO_XYZ[1:2], srgb_to_linear(rgb))).clamp(0, 1)


def lightness(gray):
    """gray (B, 1, H, W) in [0, 1] -> L (B, 1, H, W) in [0, 100]."""
    return 116 * lab_curve(srgb_to_linear(gray)) - 16


def rgb_to_network(rgb, space):
    """What the network sees as a style and should answer, in its space: "rgb" as it is, "lab" a, b / 110."""
    return rgb if space == "rgb" else rgb_to_lab(rgb)[:, 1:] / AB_SCALE


def network_to_lab(out, gray, space):
    """The network's answer as L, a, b (B, 3, H, W). gray: (B, 1, H, W), its input."""
    if space == "rgb":
        return rgb_to_lab(out.clamp(0, 1))
    return torch.cat([lightness(gray), out * AB_SCALE], dim=1)  # the photo keeps its L


def network_to_rgb(out, gray, space):
    """The network's answer as RGB (B, 3, H, W), not clamped, for losses."""
    return out if space == "rgb" else lab_to_rgb(network_to_lab(out, gray, space))


def sliced_wasserstein(ab, other, n, offset=0.):
    """Sliced Wasserstein-1 distance of two palettes, (a, b) values (B, 2, H, W) twice -> (B,).

    A palette is a cloud of points in the (a, b) plane; where a color stands in the picture does not matter.
    The distance of two sets of numbers is the mean difference of the sorted numbers. For points in the plane,
    this is taken along n evenly spaced directions and averaged; an offset of .5 turns all of them by half of
    the angle between two neighbors. Both palettes need equally many pixels.
    """
    angle = (torch.arange(n, device=ab.device) + offset) * (math.pi / n)
    along = torch.stack([angle.cos(), angle.sin()])                             # (2, n)

    def project(x):
        """Where the colors of x stand along each direction, in order: (B, n, HW)."""
        x = torch.einsum("bchw,cn->bnhw", x, along).flatten(2)
        if x.requires_grad or x.device.type != "cpu":
            return x.sort(dim=2).values
        return torch.from_numpy(np.sort(x.numpy(), axis=2))  # the same, some ten times as fast

    return (project(ab) - project(other)).abs().mean((1, 2))                    # (B, n, HW) -> (B,)


def box_mean(x, radius):
    """The mean of the (2 radius + 1)^2 pixels around each: (B, C, H, W) -> the same; the border is repeated."""
    return F.avg_pool2d(F.pad(x, [radius] * 4, mode="replicate"), 2 * radius + 1, stride=1)


# ---- files -> pictures ------------------------------------------------------------------------------------

EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"}
# Pillow knows none of these. In a folder they are counted, so that nobody wonders where they are.
CONVERT_FIRST = {".heic", ".heif", ".pdf", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".svg"}
MAX_PIXELS = 128_000_000   # a larger header is taken for a decompression bomb; cameras stay below
MIN_CHROMA = 4.0                                            # mean chroma under which a picture counts as gray

Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2           # Pillow refuses above twice this, and warns above it
warnings.filterwarnings("ignore", module="PIL")    # of large pictures, and of every odd EXIF tag
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # some decoders log what they then raise


def open_picture(path, at_least=None):
    """Read a picture file as 8-bit RGB: upright (EXIF), transparency over white, first frame of several.

    at_least: decode a JPEG at the smallest of 1/1, 1/2, 1/4, 1/8 whose sides are not below this: much faster.
    Returns a PIL picture of mode RGB. Raises UserError, naming the file, for anything that cannot be read.
    """
    if not os.path.isfile(path):  # a folder, or a pipe that would wait for ever
        what = "not a file, nor a folder with pictures" if os.path.exists(path) else "no such file"
        raise UserError(what, path)
    try:
        with Image.open(path) as file:
            if at_least:  # only JPEG can; the others ignore it
                file.draft("RGB", (at_least, at_least))
            file.load()
            # Broken EXIF is common, and no reason to refuse the pixels. Pillow turns the picture before it
            # looks at any other tag than the orientation: what fails after that is not needed.
            with contextlib.suppress(Exception):
                ImageOps.exif_transpose(file, in_place=True)
            return to_rgb(file)
    except Exception as error:  # each of Pillow's decoders raises whatever it likes on broken bytes
        known = {Image.DecompressionBombError: f"more than {MAX_PIXELS // 10 ** 6} megapixels; make it smaller",
                 Image.UnidentifiedImageError: "not a picture that Pillow knows; convert it to JPEG first"}
        why = known.get(type(error)) or first_line(error)
        if os.path.isfile(path) and not os.path.getsize(path):
            why = "the file is empty"
        raise UserError(f"cannot be read ({why})", path) from None


def to_rgb(picture):
    """A PIL picture of any mode -> mode RGB; what is transparent becomes white."""
    if picture.mode == "F" or picture.mode.startswith("I"):
        # Pillow would cut these off at 255. Which value is white? 65535 with 16 bits ("I;16" and the like); a
        # plain "I" may hold 8, 16 or 32 bits, and floats mostly go to 1 or to 255, or a little above.
        x = np.asarray(picture).astype(np.float32)
        # What is infinite becomes white.
        x = np.nan_to_num(x, posinf=np.max(x, initial=1, where=np.isfinite(x)), neginf=0)
        most = x.max()
        top = max(65535, most)
        if picture.mode == "F" and most < 1000 or picture.mode == "I" and most <= 255:
            top = 1 if picture.mode == "F" and most < 10 else 255
        picture = Image.fromarray((x / top * 255).round().clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    return picture.convert("RGB")


def to_tensor(picture):
    """PIL RGB picture -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()    # (3, H, W)


def to_batch(picture):
    """PIL RGB picture -> a batch of one, (1, 3, H, W) in [0, 1]."""
    return to_tensor(picture)[None] / 255


def to_picture(rgb):
    """(3, H, W) in [0, 1] -> PIL RGB picture, clamped and rounded; uint8(x * 256) would make white black."""
    x = (rgb.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(x.permute(1, 2, 0).cpu().numpy())                    # (H, W, 3)


def resize_short_side(picture, size):
    """Scale a PIL picture so that its short side is `size`; its shape is kept.

    Returns (1, 3, h, w) in [0, 1]. (The long side is at most 4 x size: a very long strip is squashed.)
    """
    W, H = picture.size
    w, h = (min(4 * size, max(1, round(side * size / min(W, H)))) for side in (W, H))
    return to_batch(picture.resize((w, h), Image.Resampling.BICUBIC, reducing_gap=3))   # (1, 3, h, w)


def crop_square(picture, size, rng=None):
    """A size x size cut of a PIL picture; nothing is squashed.

    With rng (training): a random square of 80-100 % of the short side, mirrored half of the time.
    Without (validation): the center square.
    """
    W, H = picture.size
    side, x, y, mirror = min(W, H), .5, .5, False
    if rng is not None:
        side, x, y, mirror = side / rng.uniform(1, 1.25), rng.random(), rng.random(), rng.random() < .5
    x, y = x * (W - side), y * (H - side)
    picture = picture.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
    return ImageOps.mirror(picture) if mirror else picture


def mean_chroma(picture):
    """Mean sqrt(a^2 + b^2) of a PIL picture, seen at 32x32: 0 for gray, 10 to 30 for most photos."""
    lab = rgb_to_lab(to_batch(picture.resize((32, 32), Image.Resampling.BOX)))  # (1, 3, 32, 32)
    return lab[:, 1:].square().sum(1).sqrt().mean().item()


# ---- data sets --------------------------------------------------------------------------------------------

def list_pictures(folder):
    """All picture files below a folder, any depth, any letter case, sorted; hidden files are passed over.

    Says on stderr how many pictures of formats that cannot be read were left out.
    """
    found, seen = [], set()  # seen: real folders
    for root, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in seen:  # a link that leads back up would be followed for ever
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found += [Path(root, f) for f in files if not f.startswith(".")]
    endings = [f.suffix.lower() for f in found]
    other = ", ".join(f"{endings.count(e)} {e}" for e in sorted(CONVERT_FIRST) if e in endings)
    if other:
        print(f"{printable(folder)}: left out {other}; convert them to JPEG first", file=sys.stderr)
    return sorted(f for f in found if f.suffix.lower() in EXTENSIONS)


def drop_gray_and_broken(paths, limit):
    """The first `limit` readable pictures that are not gray; says on stderr what was left out.

    Gray photos in training teach one thing only, to answer gray; in validation they reward it. (About a
    millisecond a picture: a JPEG is decoded at an eighth of its size.)
    """
    kept, gray, broken = [], [], []
    for path in paths:
        try:
            chroma = mean_chroma(open_picture(path, at_least=32))
            (gray if chroma < MIN_CHROMA else kept).append(path)
        except UserError as error:
            broken.append(str(error))
        if len(kept) == limit:  # a small limit need not read the whole folder; an iterator keeps the rest
            break
    if gray:
        print(f"left out {len(gray)} gray pictures (mean chroma below {MIN_CHROMA:g})", file=sys.stderr)
    if broken:
        some = "\n  ".join(broken[:10] + [f"and {len(broken) - 10} more"] * (len(broken) > 10))
        print(f"left out {len(broken)} unreadable pictures:\n  {some}", file=sys.stderr)
    return kept


def photo_folders(source):
    """The folders that are read: train/ and val/ of source if it has both, else source itself."""
    parts = [Path(source, name) for name in ("train", "val")]
    return parts if all(map(os.path.isdir, parts)) else [Path(source)]


def find_data(source, train_size, val_size, seed):
    """Two lists of pictures, for training and for validation.

    source: a folder, with train/ and val/ inside or simply full of pictures; "synthetic" for drawn scenes
    (then the lists hold numbers); "" for Imagenette, downloaded once. Sizes are upper limits, 0 means all.
    The same seed gives the same split. Raises UserError if one of the lists stays empty.
    """
    train_size, val_size = train_size or sys.maxsize, val_size or sys.maxsize
    if source == "synthetic":
        return list(range(min(train_size, 10_000))), list(range(10_000, 10_000 + min(val_size, 500)))
    folder = Path(source or imagenette())
    if not os.path.isdir(folder):
        raise UserError("is no folder; --data takes a folder of pictures or the word synthetic", folder)
    lists = [list_pictures(part) for part in photo_folders(folder)]
    split = len(lists) == 2
    rng = np.random.default_rng(seed)
    for paths in lists:  # a limited train_size is a random choice, and not the first folder's pictures
        rng.shuffle(paths)
    if split:
        train, val = lists
    else:  # one iterator for both: what validation takes from it, a fifth at most, training no longer finds
        train = val = iter(lists[0])
        val_size = min(val_size, math.ceil(len(lists[0]) / 5))
    val = drop_gray_and_broken(val, val_size)  # validation comes first
    train = drop_gray_and_broken(train, train_size)
    for name, found in [("train", train), ("val", val)]:
        if not found:
            raise UserError(f"needs {'one readable picture' if split else 'two readable pictures'} in color "
                            f"({' '.join(sorted(EXTENSIONS))})", folder / name if split else folder)
    return train, val


class Photos(torch.utils.data.Dataset):
    """Training or validation crops. Items are asked for as (epoch, index).

    Everything random about an item is drawn from (seed, epoch, index) alone, so the number of workers and
    the moment of a restart change nothing.
    Returns photo and style, (3, S, S) uint8 each. style_from: "same" - the style is the photo itself (the
    paper's implicit training); "other" - in training it is a random picture (section 3.2).
    """

    def __init__(self, pictures, size, seed, train, style_from="same"):
        self.pictures, self.size, self.seed, self.train = pictures, size, seed, train
        self.style_from = style_from

    def __len__(self):
        return len(self.pictures)

    def load(self, index):
        """Picture number `index`; for one that has vanished or broken since the start, the next one."""
        for i in range(index, index + 10):
            picture = self.pictures[i % len(self)]
            if isinstance(picture, int):
                return draw_scene(picture)
            try:
                return open_picture(picture, at_least=self.size * 5 // 4)  # crop_square may take 80 %
            except UserError as error:
                print(f"{error}; the next picture is taken", file=sys.stderr)
        raise UserError("ten pictures in a row could not be read; is the --data folder still there?")

    def __getitem__(self, key):
        epoch, index = key
        rng = np.random.default_rng([self.seed, epoch, index]) if self.train else None
        photo = style = to_tensor(crop_square(self.load(index), self.size, rng))        # (3, S, S)
        if self.train and self.style_from == "other":
            style = to_tensor(crop_square(self.load(int(rng.integers(len(self)))), self.size, rng))
        return photo, style


@functools.lru_cache(1)
def shuffled(n, seed, epoch):
    """The order of n pictures in an epoch: another one in each, made from (seed, epoch) alone."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch_order(n, batch_size, seed, start, every=1):
    """DataLoader's batch_sampler: endless lists of (epoch, index), for batches start, start + every, ...

    (Two processes take every second batch each.) Pictures are counted over all epochs. They follow each other
    without a gap, so all batches are full, also for a set that is smaller than one batch.
    """
    for first in range(start * batch_size, sys.maxsize, every * batch_size):
        yield [(i // n, int(shuffled(n, seed, i // n)[i % n])) for i in range(first, first + batch_size)]


def draw_scene(number, width=192, height=160):
    """Picture `number` of an endless series: shapes in a few colors, drawn from the number alone.

    Lightness and color are drawn independently (only what no screen can show gets paler): the gray version
    shows shapes, but no palette. A network that colors it well has looked at the style. Returns a PIL RGB
    picture.
    """
    rng = np.random.default_rng([7, number])
    colors = int(rng.integers(2, 5))
    hue, chroma = rng.uniform(0, 2 * math.pi, colors), rng.uniform(25, 70, colors)
    palette = np.stack([chroma * np.cos(hue), chroma * np.sin(hue)], axis=1)    # (colors, 2)

    # That is the palette. Now a picture of shape numbers: 0 the sky, 1 the ground, then all kinds of shapes.
    labels = Image.new("I", (width, height), 0)
    pen = ImageDraw.Draw(labels)
    shapes = int(rng.integers(6, 14))
    pen.rectangle([0, int(height * rng.uniform(.3, .8)), width, height], fill=1)
    for shape in range(2, shapes):
        x, y, w, h = rng.random(4) * [width, height, width * .3, height * .3] + [0, 0, 8, 8]
        corners = [(x + w * rng.uniform(-1, 1), y + h * rng.uniform(-1, 1)) for _ in range(3)]
        box = [x - w, y - h, x + w, y + h]
        draw, place = [(pen.polygon, corners), (pen.ellipse, box), (pen.rectangle, box)][rng.integers(3)]
        draw(place, fill=shape)
    labels = np.asarray(labels)                                                 # (H, W)

    # Then a lightness, with waves and a little noise, and a color for each shape.
    y, x = np.mgrid[:height, :width] / height
    waves = 8 * np.sin(rng.uniform(3, 12) * (x * rng.normal() + y * rng.normal()) + rng.uniform(0, 6))
    L = rng.uniform(30, 80, shapes)[labels] + waves + rng.normal(0, 1.5, labels.shape)  # (H, W)
    ab = palette[rng.integers(colors, size=shapes)][labels]                     # (H, W, 2)
    lab = torch.from_numpy(np.dstack([L, ab]).astype(np.float32)).permute(2, 0, 1)  # (3, H, W)
    return to_picture(lab_to_gamut(lab[None])[0])


# ---- files from the net -----------------------------------------------------------------------------------

IMAGENETTE = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz"
IMAGENETTE_SHA256 = "64d0c4859f35a461889e0147755a999a48b49bf38a7e0f9bd27003f10db02fe5"


def download(url, path, sha256, cure):
    """Fetch url into the file `path`, with progress. Only a file with the right SHA-256 is kept.

    sha256: the hash, or its first digits. Raises UserError that ends in `cure`.
    """
    socket.setdefaulttimeout(60)  # give up after 60 s without data; torch sets no limit
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except Exception as error:  # no network; a wrong hash; a header that is no number; cut off in the middle
        raise UserError(f"cannot download {url} ({first_line(error)}): {cure}") from None


def imagenette(folder="data", url=IMAGENETTE, sha256=IMAGENETTE_SHA256):
    """The folder of Imagenette2-160 (9,469 + 3,925 photos, 99 MB), downloaded and unpacked on first use.

    Ten classes of ImageNet at a short side of 160 pixels: enough to learn from, small enough for a laptop.
    Raises UserError.
    """
    archive = Path(folder, url.rsplit("/", 1)[-1])
    target = archive.with_suffix("")
    if os.path.isdir(target):
        return target
    if not os.path.exists(archive):
        download(url, archive, sha256, "run again; --data DIR and --data synthetic work offline")
    # Unpacked beside it and then moved: a folder of that name is always complete.
    try:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            shutil.unpack_archive(archive, scratch, filter="data")  # nothing can land, or link, outside of it
            os.replace(Path(scratch, target.name), target)
    except Exception as error:  # broken bytes make tarfile and zlib raise many kinds
        if os.path.isdir(target):  # another program was faster
            return target
        raise UserError(f"unpacking failed ({first_line(error)}); delete it and run again", archive) from None
    return target


def load_torch_file(path):
    """torch.load for a file that somebody else made: tensors and plain values, no code of it is ever run.

    Raises ValueError for whatever is not a file of torch.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type for entry in archive.infolist()):
                    raise ValueError  # torch never compresses; a compressed file may hold terabytes
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a torn zip, a foreign pickle, a picture
        raise ValueError("not a file of torch") from None


# ---- messages and saving ----------------------------------------------------------------------------------

class UserError(Exception):
    """A mistake that a person can mend, and the file it is about. The programs print it as one line and exit
    with code 1; a traceback means a bug."""

    def __init__(self, text, path=None):
        super().__init__(text if path is None else f"{printable(path)}: {text}")


class Parser(argparse.ArgumentParser):
    """argparse, but a typing error gives one line with the nearest option instead of a page of usage."""

    def error(self, message):
        typed = message.partition("unrecognized arguments: ")[2].split(" ")[0].split("=")[0]
        near = difflib.get_close_matches(typed, self._option_string_actions, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        self.exit(2, f"{self.prog}: error: {printable(message)}{hint}; --help lists all options\n")


def printable(path):
    """A path for a message: one printable line, whatever characters the name is made of."""
    return str(path) if str(path).isprintable() else ascii(str(path))


def first_line(error):
    """What an exception says, on one line: torch and web servers use several."""
    text = str(getattr(error, "strerror", None) or getattr(error, "reason", None) or error)
    return (text.splitlines() or [type(error).__name__])[0]


def save_atomically(path, write):
    """Call write(temporary path), then move the file into place: a reader never meets half a file.

    The temporary name is new, so two writers cannot meet in one file; it keeps the ending, because Pillow
    takes the format from it. Raises UserError.
    """
    path = Path(path)
    part = path.with_name(f".part-{os.urandom(8).hex()}{path.suffix}")
    try:
        os.makedirs(path.parent, exist_ok=True)
        write(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())  # onto the disk before it gets its name: a power cut may come
        os.replace(part, path)
    except (OSError, RuntimeError, ValueError, SystemError) as error:  # Pillow's encoders raise any of these
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        cure = "free some space or choose another --output" if full else "choose another --output"
        raise UserError(f"cannot be written ({first_line(error)}); {cure}", path) from None
    finally:
        with contextlib.suppress(OSError):  # gone already when all went well
            part.unlink()


def run_program(main):
    """Run a program's main(); what a person or the machine did wrong becomes one line and exit code 1.

    A UserError, a full disk, a full memory and Ctrl-C (130) are such; any other exception is a bug of ours,
    and its traceback is what somebody needs to mend it.
    """
    # A stream that the caller has closed, as `>&-` does, is None. (stderr escapes odd characters by itself.)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    sys.stdout.reconfigure(errors="backslashreplace")  # for names that the terminal cannot print
    try:
        code = main()
        sys.stdout.flush()  # or a full disk behind `>` would be found only after the end
    except KeyboardInterrupt:
        code = 130
    except UserError as error:  # from a loading process it comes with a traceback before it
        code = str(error).strip().splitlines()[-1].removeprefix("data.UserError: ")
    except OSError as error:  # without a file it is stdout: full, or its reader has left as `| head` does
        where = printable(error.filename or "output")
        code = 1 if isinstance(error, BrokenPipeError) else f"{where}: {first_line(error)}"
    except (MemoryError, RuntimeError) as error:
        texts = "out of memory", "enough memory", "allocate"  # torch's, of its many kinds
        if isinstance(error, RuntimeError) and not any(text in str(error).lower() for text in texts):
            raise
        code = ("the memory is full: a smaller --size or picture needs less; in training, halve --batch-size "
                "and double --accumulate, add --amp, or take --lpips-net alex")
    try:
        sys.stdout.flush()
    except OSError:  # nobody takes what is left: Python would try again, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(f"{Path(sys.argv[0]).name}: {code}" if isinstance(code, str) else code)
