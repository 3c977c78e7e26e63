"""From files to tensors: pictures, RGB <-> LAB, distance of palettes, crops, augmentation, the default data set.

    a folder --list_pictures, usable--> paths --Photos--> uint8 crops --DataLoader--> train.py
    a file   --open_picture--> an 8-bit RGB picture whatever its format was

This file knows nothing of networks. Look at a drawn scene, and at what a training folder holds:

    python -c "import data; data.draw_scene(1).show()"
    python -c "import data; print(len(data.usable(data.list_pictures('examples'), 100)))"
"""
import contextlib
import hashlib
import http.client
import math
import os
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import Dataset


class UserError(Exception):
    """A mistake that a person can mend. The programs print it as one line and exit; a traceback means a bug."""


def run(main):
    """Run a program's main() and turn what a person did wrong into one line and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a file name may hold what the terminal cannot print
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does; say no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


# ---- colour: sRGB <-> CIELAB ------------------------------------------------------------------------------
# D65 white, 2 degree observer. Pictures are (B, 3, H, W) fp32. L is in [0, 100]; a, b of sRGB colours lie in
# [-86.2, 98.2] and [-107.9, 94.5]. Every fractional power is taken of a clamped value: its slope at 0 is
# infinite, and one NaN gradient in the branch that torch.where does not take still ruins the training.

RGB_TO_XYZ = np.array([[.412453, .357580, .180423], [.212671, .715160, .072169], [.019334, .119193, .950227]])
WHITE = np.array([.95047, 1., 1.08883])
AB_SCALE = 110.  # the network sees and makes a, b divided by this: about [-1, 1]


def mix(matrix, x):
    """Multiply the three channels of x (B, 3, H, W) with a 3x3 numpy matrix."""
    matrix = torch.from_numpy(matrix.astype(np.float32)).to(x.device)  # float64 does not exist on MPS
    return torch.einsum("ij,bjhw->bihw", matrix, x)


def srgb_to_linear(c):
    return torch.where(c > .04045, ((c.clamp(min=.04045) + .055) / 1.055) ** 2.4, c / 12.92)


def linear_to_srgb(c):
    return torch.where(c > .0031308, 1.055 * c.clamp(min=.0031308) ** (1 / 2.4) - .055, 12.92 * c)


def lab_curve(t):
    """f of CIE 15: a cube root with a straight piece near black."""
    return torch.where(t > .008856, t.clamp(min=.008856) ** (1 / 3), 7.787 * t + 16 / 116)


def rgb_to_lab(rgb):
    """sRGB (B, 3, H, W) in [0, 1] -> L, a, b (B, 3, H, W)."""
    fx, fy, fz = lab_curve(mix(RGB_TO_XYZ / WHITE[:, None], srgb_to_linear(rgb))).unbind(1)
    return torch.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], dim=1)


def lab_to_linear(lab):
    L, a, b = lab.unbind(1)
    fy = (L + 16) / 116
    f = torch.stack([fy + a / 500, fy, fy - b / 200], dim=1)
    xyz = torch.where(f > .2068966, f.clamp(min=.2068966) ** 3, (f - 16 / 116) / 7.787)
    return mix(np.linalg.inv(RGB_TO_XYZ) * WHITE, xyz)


def lab_to_rgb(lab):
    """L, a, b (B, 3, H, W) -> sRGB (B, 3, H, W), outside [0, 1] where no screen can show the colour.

    Nothing is clipped, so that a loss on the result can still pull such a colour back.
    """
    return linear_to_srgb(lab_to_linear(lab))


def lab_to_gamut(lab):
    """L, a, b (B, 3, H, W) -> sRGB in [0, 1] of exactly the same L; impossible colours lose chroma instead.

    Clipping each channel would change the lightness, that is, draw into the photo. In linear light the
    straight line from a colour to the gray of the same luminance g keeps L; we walk along it until the
    last channel is inside. t = 1 is the colour itself, t = 0 the gray.
    """
    rgb = lab_to_linear(lab)
    g = mix(RGB_TO_XYZ[1:2], rgb).clamp(0, 1)                                         # (B, 1, H, W)
    room = torch.where(rgb > g, 1 - g, g)           # how far each channel may go, and how far it wants to go
    t = (room / (rgb - g).abs().clamp(min=1e-6)).amin(dim=1, keepdim=True).clamp(max=1)  # (B, 1, H, W)
    return linear_to_srgb(g + t * (rgb - g)).clamp(0, 1)


def gray_of(rgb):
    """The network's input: (B, 3, H, W) sRGB -> (B, 1, H, W) in [0, 1].

    It is the value v of the neutral colour (v, v, v) with the L of the pixel: a gray photo is its own gray
    version, and L can be had back from it. (Pillow's "L" is another thing: pure red has L 53 but luma 76 of
    255, that is L 32. A network trained on luma would see its own training colours in the wrong brightness.)
    """
    return linear_to_srgb(mix(RGB_TO_XYZ[1:2], srgb_to_linear(rgb))).clamp(0, 1)


def lightness(gray):
    """gray (B, 1, H, W) in [0, 1] -> L (B, 1, H, W) in [0, 100]."""
    return 116 * lab_curve(srgb_to_linear(gray)) - 16


def rgb_to_network(rgb, color):
    """What the network sees as a style and should give as a result: RGB itself, or a, b / 110."""
    return rgb if color == "rgb" else rgb_to_lab(rgb)[:, 1:] / AB_SCALE


def network_to_lab(out, gray, color):
    """The network's answer as L, a, b (B, 3, H, W). gray: (B, 1, H, W), its input."""
    return rgb_to_lab(out.clamp(0, 1)) if color == "rgb" else torch.cat([lightness(gray), out * AB_SCALE], dim=1)


def network_to_rgb(out, gray, color):
    """The network's answer as RGB (B, 3, H, W), not clamped, for losses."""
    return out if color == "rgb" else lab_to_rgb(network_to_lab(out, gray, color))


def rotate_hue(rgb, angle):
    """Turn the (a, b) plane of each picture by its angle (B,) in radians; L, and so the gray input, stays.

    One gray photo then has many right answers, and the only way to know which is to look at the style.
    """
    L, a, b = rgb_to_lab(rgb).unbind(1)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]                 # (B, 1, 1)
    return lab_to_gamut(torch.stack([L, cos * a - sin * b, sin * a + cos * b], dim=1))


def directions(n, device=None, turn=0.):
    """n evenly spaced directions of the (a, b) plane, turned by `turn` of their spacing: (2, n)."""
    angle = (torch.arange(n, device=device) + turn) * (math.pi / n)
    return torch.stack([angle.cos(), angle.sin()])


def sliced_wasserstein(ab, other, along):
    """Sliced Wasserstein-1 distance of two clouds of (a, b) values: (B, 2, H, W) twice, (2, n) -> (B,).

    In one dimension, moving one heap onto another costs least when both are sorted; a cloud is moved along
    many directions and the mean taken. Where the colours stand in the picture does not matter.
    """
    def project(x):
        return torch.einsum("bchw,cn->bnhw", x, along).flatten(2).sort(dim=2).values  # (B, n, HW)
    return (project(ab) - project(other)).abs().mean((1, 2))                          # (B,)


# ---- files -> pictures ------------------------------------------------------------------------------------

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"}
MAX_PIXELS = 128_000_000   # a larger header is taken for a decompression bomb; cameras stay below
MIN_CHROMA = 4.0           # mean sqrt(a^2 + b^2) under which a picture counts as gray

# EXIF's orientation -> how to turn. (ImageOps.exif_transpose gives up when any other tag of the file is broken.)
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}

Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2        # Pillow refuses above twice this, and before that only
warnings.filterwarnings("ignore", module="PIL")  # warns, as it does of every odd EXIF tag


def show(path):
    """A path for a message: one printable line whatever characters the name is made of."""
    return str(path) if str(path).isprintable() else ascii(str(path))


def reason(error):
    """What an exception says, on one line: torch and web servers use several."""
    text = str(getattr(error, "strerror", None) or getattr(error, "reason", None) or error)
    return (text.splitlines() or [type(error).__name__])[0]


def open_picture(path, at_least=None):
    """Read a picture file as 8-bit RGB: upright (EXIF), transparency over white, first frame of several.

    at_least: decode a JPEG at the smallest of 1/1, 1/2, 1/4, 1/8 whose sides are not below this: much faster.
    Returns a PIL picture of mode RGB. Raises UserError, naming the file, for anything that cannot be read.
    """
    if not os.path.exists(path):  # Path.exists() would raise for a name that is too long
        raise UserError(f"{show(path)}: no such file")
    if not os.path.isfile(path):  # a folder, or a pipe that would wait for ever
        raise UserError(f"{show(path)}: not a file")
    try:
        with Image.open(path) as file:
            if at_least:
                file.draft("RGB", (at_least, at_least))
            file.load()
            try:
                turn = UPRIGHT.get(file.getexif().get(274))
            except Exception:  # broken EXIF is common, and no reason to refuse the pixels
                turn = None
            return to_rgb(file.transpose(turn) if turn is not None else file)
    except Image.DecompressionBombError:
        raise UserError(f"{show(path)}: more than {MAX_PIXELS / 1e6:.0f} megapixels; make it smaller first") from None
    except Exception as error:  # each of Pillow's decoders raises whatever it likes on broken bytes
        why = reason(error)
        if isinstance(error, Image.UnidentifiedImageError):
            why = "not a picture format that Pillow knows" if os.path.getsize(path) else "the file is empty"
        if isinstance(error, PermissionError):
            why = "no permission to read it"
        raise UserError(f"{show(path)}: cannot be read ({why})") from None


def to_rgb(picture):
    """A PIL picture of any mode -> mode RGB."""
    if picture.mode == "F" or picture.mode.startswith("I"):
        # Pillow would cut these off at 255. 16-bit pictures have values to 65535, float ones usually to 1.
        x = np.nan_to_num(np.asarray(picture).astype(np.float32))
        top = 1 if picture.mode == "F" and x.max() <= 1 else 255 if x.max() <= 255 and picture.mode in "FI" else 65535
        picture = Image.fromarray((x / top * 255).round().clip(0, 255).astype(np.uint8))
    if "A" in picture.getbands() or "a" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def to_tensor(picture):
    """PIL RGB picture -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()          # (3, H, W)


def to_picture(rgb):
    """(3, H, W) in [0, 1] -> PIL RGB picture. Rounded and clamped: `uint8(x * 256)` would turn white black."""
    x = (rgb.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(x.permute(1, 2, 0).cpu().numpy())                          # (H, W, 3)


def save_atomically(path, write):
    """Call write(temporary path), then move the file into place: a reader never meets half a file.

    The temporary name keeps the ending, because Pillow takes the format from it. Raises UserError.
    """
    path = Path(path)
    part = path.with_name(f".part-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise UserError(f"{show(path)}: cannot be written ({reason(error)}); "
                        "free some space or choose another --output") from None
    finally:
        with contextlib.suppress(OSError):  # gone already when all went well
            part.unlink()


def list_pictures(folder):
    """All picture files below a folder, any depth, any letter case, sorted; hidden files are passed over."""
    found, seen = [], set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = [] if real in seen else sorted(f for f in folders if not f.startswith("."))
        if real not in seen:  # a link that leads back up would go round for ever
            found += [Path(root, f) for f in files if not f.startswith(".") and Path(f).suffix.lower() in EXTENSIONS]
        seen.add(real)
    return sorted(found)


def square(picture, size, rng=None):
    """A size x size cut of a PIL picture; nothing is squashed.

    With rng (training): a random square of 80-100 % of the short side, flipped half of the time.
    Without (validation): the centre square.
    """
    W, H = picture.size
    side, x, y, flip = min(W, H), .5, .5, False
    if rng is not None:
        side, x, y, flip = side / rng.uniform(1, 1.25), rng.random(), rng.random(), rng.random() < .5
    x, y = x * (W - side), y * (H - side)
    picture = picture.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
    return ImageOps.mirror(picture) if flip else picture


# ---- data sets --------------------------------------------------------------------------------------------

def mean_chroma(picture):
    lab = rgb_to_lab(to_tensor(picture.resize((32, 32), Image.Resampling.BOX))[None] / 255)
    return lab[:, 1:].square().sum(1).sqrt().mean().item()


def usable(paths, limit):
    """The first `limit` readable pictures that are not gray; tells on stderr what it left out.

    Gray photos in training teach one thing only, to answer gray; in validation they reward it.
    """
    def check(path):
        try:
            return mean_chroma(open_picture(path, at_least=32))
        except UserError as error:
            return str(error)

    kept, gray, broken = [], 0, []
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), 256):  # in pieces: a small limit need not read the whole folder
            if len(kept) >= limit:
                break
            chunk = paths[start:start + 256]
            for path, chroma in zip(chunk, pool.map(check, chunk)):
                if isinstance(chroma, str):
                    broken.append(chroma)
                elif chroma < MIN_CHROMA:
                    gray += 1
                else:
                    kept.append(path)
    if gray:
        print(f"left out {gray} gray pictures (mean chroma below {MIN_CHROMA:g})", file=sys.stderr)
    if broken:
        shown = "\n  ".join(broken[:10] + [f"and {len(broken) - 10} more"] * (len(broken) > 10))
        print(f"left out {len(broken)} unreadable pictures:\n  {shown}", file=sys.stderr)
    return kept[:limit]


def find_data(source, train_size, val_size, seed):
    """Two lists of pictures, for training and for validation.

    source: a folder, with train/ and val/ inside or simply full of pictures; "synthetic" for drawn scenes
    (then the lists hold numbers); "" for Imagenette, downloaded once. Sizes are upper limits, 0 means all.
    The same seed gives the same split. Raises UserError if one of the lists stays empty.
    """
    train_size, val_size = train_size or sys.maxsize, val_size or sys.maxsize
    if source == "synthetic":
        n = min(train_size, 10_000)
        return list(range(n)), list(range(10_000, 10_000 + min(val_size, 500)))
    folder = Path(source) if source else imagenette()
    if not os.path.isdir(folder):
        raise UserError(f"--data {show(folder)}: is no folder; give a folder of pictures or the word synthetic")
    rng = np.random.default_rng(seed)
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        train, val = list_pictures(folder / "train"), list_pictures(folder / "val")
        rng.shuffle(train)
        rng.shuffle(val)
    else:
        train = list_pictures(folder)
        rng.shuffle(train)
        n = min(val_size, math.ceil(len(train) / 5))  # at most a fifth is held back for validation
        train, val = train[n:], train[:n]
    train, val = usable(train, train_size), usable(val, val_size)
    for name, found in [("training", train), ("validation", val)]:
        if not found:
            raise UserError(f"--data {show(folder)}: no usable {name} picture; it needs at least two colour pictures "
                            f"({' '.join(sorted(EXTENSIONS))})")
    return train, val


class Photos(Dataset):
    """Training or validation crops. Items are asked for as (epoch, index).

    Everything random about an item is drawn from (seed, epoch, index) alone, so the number of workers and
    the moment of a restart change nothing.
    Returns photo (3, S, S) uint8, style (3, S, S) uint8 and the hue angle, 0 for "as it is".
    style_from: "same" - the style is the photo itself (the paper's implicit training); "crop" - another
    random crop of it, turned by a random multiple of 90 degrees; "other" - another picture of the set (section 3.2).
    """

    def __init__(self, pictures, size, seed, train, hue_rotation=0., style_from="same"):
        self.pictures, self.size, self.seed, self.train = pictures, size, seed, train
        self.hue_rotation, self.style_from = hue_rotation, style_from

    def __len__(self):
        return len(self.pictures)

    def load(self, index):
        picture = self.pictures[index]
        if isinstance(picture, int):
            return draw_scene(picture)
        return open_picture(picture, at_least=self.size * 5 // 4)  # square() may enlarge by that much

    def __getitem__(self, key):
        epoch, index = key
        rng = np.random.default_rng([self.seed, epoch, index]) if self.train else None
        picture = self.load(index)
        photo = to_tensor(square(picture, self.size, rng))
        style, angle = photo, 0.
        if self.train:
            if self.style_from == "crop":
                # Turned as well: else the code would tell what was above and what below, and the result would
                # follow the style's layout and not the photo's objects.
                style = to_tensor(square(picture, self.size, rng).rotate(90 * int(rng.integers(4))))
            elif self.style_from == "other":
                style = to_tensor(square(self.load(int(rng.integers(len(self)))), self.size, rng))
            if rng.random() < self.hue_rotation:
                angle = rng.uniform(-math.pi, math.pi)
        return photo, style, torch.tensor(angle, dtype=torch.float32)


class Batches:
    """Yields lists of (epoch, index) without end, every `every`th from batch number `start` on: DataLoader's batch_sampler.

    Every epoch is a new shuffle made from (seed, epoch); they follow each other without a gap, so all batches
    are full, also for a set that is smaller than one batch.
    """

    def __init__(self, n, batch_size, seed, start, every=1):
        self.n, self.batch_size, self.seed, self.start, self.every = n, batch_size, seed, start, every

    def __iter__(self):
        at, epoch, order = self.start * self.batch_size, None, None
        while True:
            batch = []
            for i in range(at, at + self.batch_size):
                if i // self.n != epoch:
                    epoch = i // self.n
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.n)
                batch.append((epoch, int(order[i % self.n])))
            at += self.batch_size * self.every
            yield batch


def draw_scene(number, width=192, height=160):
    """Picture `number` of an endless series: shapes in a few colours, drawn from the number alone.

    Lightness and colour are drawn independently, so the gray version shows shapes, but no palette: whoever
    colours it well has looked at the style. Returns a PIL RGB picture.
    """
    rng = np.random.default_rng([7, number])
    colours = int(rng.integers(2, 5))
    hue, chroma = rng.uniform(0, 2 * math.pi, colours), rng.uniform(25, 70, colours)
    palette = np.stack([chroma * np.cos(hue), chroma * np.sin(hue)], axis=1)          # (colours, 2)

    labels = Image.new("I", (width, height), 0)
    pen = ImageDraw.Draw(labels)
    shapes = int(rng.integers(6, 14))
    pen.rectangle([0, int(height * rng.uniform(.3, .8)), width, height], fill=1)      # a ground under a sky
    for shape in range(2, shapes):
        x, y, w, h = rng.random(4) * [width, height, width * .3, height * .3] + [0, 0, 8, 8]
        corners = [(x + w * rng.uniform(-1, 1), y + h * rng.uniform(-1, 1)) for _ in range(3)]
        kind = rng.integers(3)
        if kind == 0:
            pen.polygon(corners, fill=shape)
        else:
            (pen.ellipse if kind == 1 else pen.rectangle)([x - w, y - h, x + w, y + h], fill=shape)
    labels = np.asarray(labels)                                                       # (H, W)
    y, x = np.mgrid[:height, :width] / height
    shade = 8 * np.sin(rng.uniform(3, 12) * (x * rng.normal() + y * rng.normal()) + rng.uniform(0, 6))
    L = rng.uniform(30, 80, shapes)[labels] + shade + rng.normal(0, 1.5, labels.shape)  # (H, W)
    ab = palette[rng.integers(colours, size=shapes)][labels]                          # (H, W, 2)
    lab = torch.from_numpy(np.dstack([L, ab]).astype(np.float32)).permute(2, 0, 1)    # (3, H, W)
    return to_picture(lab_to_gamut(lab[None])[0])


# ---- the default data set ---------------------------------------------------------------------------------

IMAGENETTE = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz"
IMAGENETTE_SHA256 = "64d0c4859f35a461889e0147755a999a48b49bf38a7e0f9bd27003f10db02fe5"


def imagenette(folder="data", url=IMAGENETTE, sha256=IMAGENETTE_SHA256):
    """The folder of Imagenette2-160 (9,469 + 3,925 photos, 99 MB), downloaded and unpacked on first use.

    A broken download is continued at the next call; an archive with the wrong SHA-256 is deleted; members
    that would land outside the folder are refused. Raises UserError.
    """
    archive = Path(folder, url.rsplit("/", 1)[-1])
    target = archive.with_suffix("")
    if target.is_dir():
        return target
    if not archive.exists():
        part = archive.with_name(archive.name + ".part")
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            download(url, part)
            os.replace(part, archive)
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            raise UserError(f"cannot download {url} ({reason(error)}); run again to go on where it "
                            "stopped, or use --data DIR or --data synthetic, which need no network") from None
    if hashlib.sha256(archive.read_bytes()).hexdigest() != sha256:
        archive.unlink()
        raise UserError(f"{show(archive)}: wrong SHA-256, deleted; run again to download it anew, or use --data DIR")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(scratch, filter="data")  # nothing can land, or link, outside of scratch
            os.replace(Path(scratch, target.name), target)
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"{show(archive)}: cannot be unpacked ({error}); delete it and run again") from None
    return target


def download(url, part):
    """Fetch url into the file `part`, going on where an earlier try stopped, with a progress line."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # "range not satisfiable": we have it all
            return
        raise
    with response, open(part, "ab" if response.status == 206 else "wb") as file:
        have = file.tell()
        total = have + int(response.headers.get("Content-Length", 0))
        while piece := response.read(1 << 20):
            file.write(piece)
            have += len(piece)
            print(f"\r{part.name}: {have / 1e6:.0f} of {total / 1e6:.0f} MB", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    if have < total:
        raise OSError(f"the connection ended after {have} of {total} bytes")
