"""Draw the README's figures from examples/ and the checkpoints that ship.

    python benchmarks/figures.py [FOLDER]

writes sheet, two, strength, refine, blend and closeup (.jpg) and latents.png into FOLDER (figures/), and
tradeoff.png, which draws the table of figures/tradeoff.md.
"""
import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw

TOP = Path(__file__).parents[1]
sys.path.insert(0, str(TOP))
import infer  # noqa: E402
from data import gray_of, open_picture, resize_short_side, run_program  # noqa: E402

PHOTOS, STYLES = ["chelsea", "coffee", "rocket", "gray"], ["style", "garden", "harvest", "checks"]
GAP, LINE = 4, 20  # pixels between pictures; height of a caption


def strip(cells, side=220):
    """(caption, picture) pairs in a row: the centre square of each picture, its caption below."""
    page = Image.new("RGB", (len(cells) * (side + GAP) + GAP, side + GAP + LINE), "white")
    page.paste(infer.sheet([[picture for _, picture in cells]], side))
    pen = ImageDraw.Draw(page)
    for i, (caption, _) in enumerate(cells):
        pen.text((2 * GAP + i * (side + GAP), side + 2 * GAP), caption, fill="black")
    return page


def columns(captions, rows, side=140):
    """Rows of pictures (or None) under one line of captions: the centre square of each picture."""
    page = Image.new("RGB", (len(captions) * (side + GAP) + GAP, LINE + len(rows) * (side + GAP)), "white")
    page.paste(infer.sheet(rows, side), (0, LINE - GAP))
    pen = ImageDraw.Draw(page)
    for i, caption in enumerate(captions):
        pen.text((GAP + i * (side + GAP), GAP), caption, fill="black")
    return page


def tradeoff(table):
    """Rows that measure.py has printed, as points: transfer over mix. Those of one option become a curve."""
    curves = {"ours, --refine": [], "ours, --blur": [], "paper, --refine": []}
    for row in table.splitlines():
        name, *cells = (cell.strip() for cell in row.strip("| ").split("|"))
        if row.startswith("|") and " --refine " in name:
            option, value = name.split()[-2:]
            kind = f"{'paper' if 'paper.pt' in name else 'ours'}, {option}"
            curves[kind].append((value, float(cells[8]), float(cells[2])))              # mix, transfer
    page = Image.new("RGB", (640, 400), "white")
    pen = ImageDraw.Draw(page)

    def place(mix, transfer):
        """Mix from .36 to .64 goes to the right, transfer from .64 to .90 up."""
        return 60 + 560 * (mix - .36) / .28, 20 + 350 * (.90 - transfer) / .26

    pen.rectangle([place(.36, .90), place(.42, .87)], fill="honeydew")
    pen.text(place(.362, .898), "the aim", fill="green")
    for i in range(5):
        mix, transfer = .36 + .07 * i, .66 + .06 * i
        pen.line([place(mix, .90), place(mix, .64)], fill="gainsboro")
        pen.line([place(.36, transfer), place(.64, transfer)], fill="gainsboro")
        pen.text((place(mix, .64)[0] - 8, 374), f"{mix:.2f}", fill="gray")
        pen.text((30, place(.36, transfer)[1] - 6), f"{transfer:.2f}", fill="gray")
    pen.text((250, 386), "mix: lower is steadier", fill="black")
    pen.text((4, 4), "transfer: higher is nearer to the style's palette", fill="black")
    looks = [("steelblue", 5, 4), ("firebrick", -30, -6), ("gray", 5, 4)]  # color, and where labels stand
    for i, ((kind, curve), (color, right, down)) in enumerate(zip(curves.items(), looks)):
        points = [place(mix, transfer) for _, mix, transfer in curve]
        pen.line(points, fill=color, width=2)
        for (value, *_), (x, y) in zip(curve, points):
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=color)
            pen.text((x + right, y + down), value, fill=color)
        pen.text((440, 24 + 14 * i), kind, fill=color)
    return page


class Painter:
    """A checkpoint and the example pictures: colors a photo with a style, as infer.py does."""

    def __init__(self, weights, pictures):
        self.model, self.size = infer.load_model(weights)
        self.pictures = pictures

    def color(self, photo, *styles, amount=infer.REFINE, strength=1., blend=None):
        """A photo in the colors of a style, or of the blend of several; all are names."""
        small = [(name, resize_short_side(self.pictures[name], self.size)) for name in styles]
        [(_, z, palettes)] = infer.make_looks([(name, x, infer.encode(self.model, x)) for name, x in small], blend)
        gray = gray_of(resize_short_side(self.pictures[photo], self.size))               # (1, 1, h, w)
        return infer.join(self.pictures[photo], infer.color(self.model, gray, z, palettes, amount, strength))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=TOP / "figures")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: str(TOP / "examples" / f"{name}.jpg") for name in PHOTOS + STYLES}
    pictures = {name: open_picture(path) for name, path in files.items()}
    ours = Painter(infer.OURS, pictures)

    def save(page, name):
        page.save(folder / name, quality=90)
        print(folder / name)

    styles = [files[STYLES[0]], "--styles", *(files[name] for name in STYLES[1:])]
    infer.main([*(files[name] for name in PHOTOS), *styles, "--grid", "--output", str(folder / "sheet.jpg")])
    infer.main([*styles, "--latents", "--output", str(folder / "latents.png")])

    networks = [("the paper's", Painter(infer.PAPER, pictures), 0),  # the paper has no refining
                ("ours", ours, infer.REFINE)]
    some = [(style, *network) for style in STYLES[:2] for network in networks]
    rows = [[None] + [pictures[style] for style, *_ in some]]
    for photo in PHOTOS[:3]:
        rows.append([infer.gray_version(pictures[photo])] + [
            painter.color(photo, style, amount=amount) for style, _, painter, amount in some])
    save(columns(["the photo", *(f"{style}: {name}" for style, name, *_ in some)], rows), "two.jpg")

    save(tradeoff((TOP / "figures" / "tradeoff.md").read_text()), "tradeoff.png")

    style = ("the style", pictures["harvest"])
    save(strip([style] + [(f"--strength {s:g}", ours.color("chelsea", "harvest", strength=s)) for s in (0, .5, 1, 1.5)]),
         "strength.jpg")
    save(strip([style] + [(f"--refine {x:g}", ours.color("chelsea", "harvest", amount=x)) for x in (0, .5, 1)]), "refine.jpg")

    blends = [(f"--blend {a},{4 - a}", ours.color("gray", "garden", "harvest", blend=[a, 4 - a])) for a in (4, 3, 2, 1, 0)]
    save(strip([("style A", pictures["garden"]), *blends, ("style B", pictures["harvest"])], 180), "blend.jpg")

    result = ours.color("rocket", "style")
    box = (50, 310, 160, 420)  # the wires of the rocket's towers are a pixel wide
    closeups = [p.crop(box).resize((427, 427), Image.Resampling.NEAREST)
                for p in (infer.gray_version(pictures["rocket"]), result)]
    page = Image.new("RGB", (640 + 2 * 431, 427), "white")
    for x, picture in zip((0, 644, 644 + 431), (result, *closeups)):
        page.paste(picture, (x, 0))
    ImageDraw.Draw(page).rectangle(box, outline="white")
    save(page, "closeup.jpg")


if __name__ == "__main__":
    run_program(main)
