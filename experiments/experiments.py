"""The table and the figures of the paper's experiments, from the runs that the README's loop leaves; not a test.

    python tests/experiments.py RUNS PHOTOS PAINTINGS [--figures FOLDER]

A row for each run in the folder RUNS. From its log.csv, last row: pictures seen, losses, psnr, transfer (train.py
says what they are). Measured here with its last.pt, at the size it was trained at:

    spread   deviation of the style codes over the first 100 of PAINTINGS, mean over dimensions, as infer.py --latents
    alive    dimensions in which that deviation is above .01
    psnr L   of the first 100 of PHOTOS in their own colours, joined with the photo's L as infer.py does, in dB
    grid     what all outputs have in common at the same place of 4x4 pixels, in steps of 1/255: the difference of
             output and photo, averaged over pictures and 4x4 blocks (the outer quarters aside); its deviation.
             About .1 is chance at 64x64.

With --figures, and of the pictures in examples/ alone: experiments.jpg, every run's own small output with the photo's
colours and four styles; codes.png; grid.png, a corner of the rocket's sky enlarged, its contrast stretched; curves.
"""
import argparse
import csv
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps

TOP = Path(__file__).parents[1]
sys.path.insert(0, str(TOP))
import infer  # noqa: E402
from data import gray_of, list_pictures, network_to_rgb, open_picture, rgb_to_network, run, square, to_tensor  # noqa: E402
from losses import psnr  # noqa: E402
from figures import strip  # noqa: E402 (beside this file)
from train import draw_curves  # noqa: E402

CODES = ["wide-32", "collapsed", "combined-authors", "combined-sigmoid", "final", "lab"]
CLOSEUPS = ["final", "mse-only", "lpips-only", "lpips-resize"]
CURVES = ["unet", "combined-authors", "final"]


def grid(out, truth):
    """(N, 3, S, S) twice, S a multiple of 16 -> the amplitude of the lattice that is the same in all of them."""
    edge = out.shape[2] // 4
    error = (out - truth)[:, :, edge:-edge, edge:-edge]
    N, C, S, _ = error.shape
    blocks = error.reshape(N, C, S // 4, 4, S // 4, 4).mean((0, 2, 4))                # (3, 4, 4)
    return 255 * blocks.flatten(1).std(1, correction=0).mean().item()


@torch.no_grad()
def row(name, folder, photos, paintings):
    with open(folder / "log.csv") as file:
        log = list(csv.DictReader(file))[-1]
    model, size = infer.load_model(folder / "last.pt")
    color, codes = model.config.color, None
    spread = alive = "-"
    if model.config.style:
        codes = torch.cat([infer.encode(model, p, size) for p in paintings]).std(0, correction=0)
        spread, alive = f"{codes.mean():.3g}", f"{(codes > .01).sum()} / {len(codes)}"
    truth = torch.stack([to_tensor(square(p, size)) for p in photos]) / 255
    raw, joined = [], []
    for rgb, photo in zip(truth.split(1), photos):
        seen = rgb_to_network(rgb, color) if model.config.style else None
        raw.append(network_to_rgb(model(gray_of(rgb), seen), gray_of(rgb), color))
        z = model.encode_style(seen) if model.config.style else None
        joined.append(to_tensor(infer.colorize(model, square(photo, size), z, size))[None] / 255)
    numbers = [sum(p.numel() for p in model.parameters()), int(log["pictures"])]
    print(f"| {name} | " + " | ".join(f"{n:,}" for n in numbers) + f" | {float(log['train_loss']):.4f} | "
          f"{float(log['val_loss']):.4f} | {float(log['val_psnr']):.2f} | {psnr(torch.cat(joined), truth).mean():.2f} | "
          + (f"{float(log['val_transfer']):.2f}" if codes is not None else "-")
          + f" | {spread} | {alive} | {grid(torch.cat(raw), truth):.2f} |", flush=True)


def draw(runs, folder):
    """The figures; runs: {name: folder}."""
    examples = {p.stem: open_picture(p) for p in list_pictures(TOP / "examples")}
    styles = ["style", "garden", "harvest", "checks"]
    side, left = 64, 110
    page = Image.new("RGB", (left + 10 * (side + 4), (side + 4) * (len(runs) + 1) + 4), "white")
    pen = ImageDraw.Draw(page)

    def place(picture, column, line):
        page.paste(picture, (left + column * (side + 4), 4 + line * (side + 4)))
    codes, closeups = [], []
    for i, style in enumerate(styles):
        for column in (1 + i, 6 + i):
            place(square(examples[style], side), column, 0)
    for line, (name, run_folder) in enumerate(runs.items(), start=1):
        model, size = infer.load_model(run_folder / "last.pt")
        pen.text((4, 30 + line * (side + 4)), name, fill="black")
        for k, photo in enumerate(("chelsea", "rocket")):
            photo = square(examples[photo], size)
            for i, style in enumerate([photo] + [examples[s] for s in styles]):
                z = infer.encode(model, style, size) if model.config.style else None
                raw = infer.colorize(model, photo, z, size, raw=True)
                place(raw.resize((side, side), Image.Resampling.NEAREST), 5 * k + i, line)
                if k and not i and name in CLOSEUPS:
                    crop = ImageOps.autocontrast(raw.crop((4, 4, 36, 36)), cutoff=2)
                    closeups.append((name, crop.resize((256, 256), Image.Resampling.NEAREST)))
        if model.config.style and name in CODES:
            z = torch.cat([infer.encode(model, examples[s], size) for s in styles])
            codes.append(infer.histograms(z, [f"{name}: {s}" for s in styles]))
        if name in CURVES:
            with open(run_folder / "log.csv") as file:
                draw_curves(list(csv.DictReader(file)), folder / f"curves-{name}.png")
    page.save(folder / "experiments.jpg", quality=90)
    for name, pictures, columns in (("codes", codes, 2), ("grid", [strip([cell], 256) for cell in closeups], 4)):
        w, h = (max([getattr(p, side) for p in pictures], default=1) for side in ("width", "height"))
        page = Image.new("RGB", (columns * w, -(-len(pictures) // columns) * h or 1), "white")
        for i, picture in enumerate(pictures):
            page.paste(picture, (i % columns * w, i // columns * h))
        page.save(folder / f"{name}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("photos")
    parser.add_argument("paintings")
    parser.add_argument("--figures", type=Path)
    args = parser.parse_args()
    runs = {p.parent.name: p.parent for p in sorted(args.runs.glob("*/last.pt"), key=lambda p: p.stat().st_mtime)}
    if args.figures:
        args.figures.mkdir(parents=True, exist_ok=True)
        return draw(runs, args.figures)
    photos, paintings = ([open_picture(p) for p in list_pictures(folder)[:100]] for folder in (args.photos, args.paintings))
    print("| run | parameters | pictures | train loss | val loss | psnr | psnr L | transfer | spread | alive | grid |\n"
          + "|---" * 11 + "|")
    for name, folder in runs.items():
        row(name, folder, photos, paintings)


if __name__ == "__main__":
    run(main)
