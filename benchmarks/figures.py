"""Draw the README's figures from examples/ and the checkpoint that ships; not a test, pytest does not collect it.

    python tests/figures.py [FOLDER]         writes sheet, strength, blend and closeup (.jpg) and latents.png there
"""
import sys
from pathlib import Path

from PIL import Image, ImageDraw

TOP = Path(__file__).parents[1]
sys.path.insert(0, str(TOP))
import infer  # noqa: E402
from data import open_picture, run, square  # noqa: E402

PHOTOS, STYLES = ["chelsea", "coffee", "rocket", "gray"], ["style", "garden", "harvest", "checks"]


def strip(cells, side=220):
    """Pictures with captions in a row: the centre square of each."""
    page = Image.new("RGB", (len(cells) * (side + 4) + 4, side + 24), "white")
    pen = ImageDraw.Draw(page)
    for i, (caption, picture) in enumerate(cells):
        page.paste(square(picture, side), (4 + i * (side + 4), 4))
        pen.text((8 + i * (side + 4), side + 8), caption, fill="black")
    return page


def file(name):
    return str(TOP / "examples" / f"{name}.jpg")


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else TOP / "figures")
    folder.mkdir(parents=True, exist_ok=True)
    model, size = infer.load_model(infer.SHIPPED)
    pictures = {name: open_picture(file(name)) for name in PHOTOS + STYLES}

    def code(photo, name, steps=infer.REFINE_STEPS):
        return infer.refine(model, photo, pictures[name], infer.encode(model, pictures[name], size), size, steps)

    def save(page, name):
        page.save(folder / name, quality=90)
        print(folder / name)

    styles = [file(STYLES[0]), "--styles", *map(file, STYLES[1:])]
    infer.main([*map(file, PHOTOS), *styles, "--grid", "--output", str(folder / "sheet.jpg")])
    infer.main([*styles, "--latents", "--output", str(folder / "latents.png")])

    photo = pictures["chelsea"]
    z = code(photo, "harvest")
    save(strip([("the style", pictures["harvest"])] + [
        (f"--strength {s:g}", infer.colorize(model, photo, z, size, s)) for s in (0, .5, 1, 1.5)]), "strength.jpg")
    save(strip([("the style", pictures["harvest"])] + [
        (f"--refine {n}", infer.colorize(model, photo, code(photo, "harvest", n), size)) for n in (0, 10, 50)]), "refine.jpg")

    photo = pictures["gray"]
    A, B = code(photo, "garden"), code(photo, "harvest")
    save(strip([("style A", pictures["garden"])] + [
        (f"--blend {a},{4 - a}", infer.colorize(model, photo, (a * A + (4 - a) * B) / 4, size))
        for a in (4, 3, 2, 1, 0)] + [("style B", pictures["harvest"])], 180), "blend.jpg")

    photo = pictures["rocket"]  # the wires of its towers are a pixel wide
    result = infer.colorize(model, photo, code(photo, "style"), size)
    box = (50, 310, 160, 420)
    closeups = [p.crop(box).resize((427, 427), Image.Resampling.NEAREST) for p in (infer.gray_version(photo), result)]
    page = Image.new("RGB", (640 + 2 * 431, 427), "white")
    for x, picture in zip((0, 644, 644 + 431), (result, *closeups)):
        page.paste(picture, (x, 0))
    ImageDraw.Draw(page).rectangle(box, outline="white")
    save(page, "closeup.jpg")


if __name__ == "__main__":
    run(main)
