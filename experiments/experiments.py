"""The table and the figures of the paper's experiments, from finished runs.

    python experiments/experiments.py RUNS PHOTOS PAINTINGS [--figures FOLDER]

A row for each run in the folder RUNS. From the last row of its log.csv: pictures seen, losses, psnr, transfer, listens
(train.py, validate). Measured here with its last.pt, at the size it was trained at:

    spread   deviation of the style codes over the first 100 of PAINTINGS, mean over dimensions, as infer.py --latents
    alive    dimensions in which that deviation is above .01
    psnr L   of the first 100 of PHOTOS in their own colors, joined with the photo's L as infer.py does, in dB
    grid     what all outputs have in common at the same place of 4x4 pixels, in steps of 1/255: the difference of
             output and photo, averaged over pictures and 4x4 blocks (the outer quarters aside); its deviation.
             About .1 is chance at 64x64.

With --figures, from the pictures in examples/ alone: experiments.jpg, every run's own small output with the photo's
colors and four styles; codes.png; grid.png, a corner of the rocket's sky enlarged, its contrast stretched; and the curves
in TOGETHER. The logs of the long runs are kept in logs/: their curves can be drawn without any run, with none as RUNS.
"""
import argparse
import csv
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps

TOP = Path(__file__).parents[1]
LOGS = TOP / "experiments" / "logs"
sys.path[:0] = [str(TOP), str(TOP / "benchmarks")]
import infer  # noqa: E402
import variants  # noqa: E402 (beside this file)
from data import (UserError, crop_square, gray_of, lab_to_gamut, list_pictures, network_to_rgb, open_picture,  # noqa: E402
                  resize_short_side, run_program, to_batch, to_picture, to_tensor)
from figures import strip  # noqa: E402 (in benchmarks)
from losses import psnr  # noqa: E402

CODES = ["wide-32", "collapsed", "combined-authors", "combined-sigmoid", "final", "lab"]
CLOSEUPS = ["final", "mse-only", "lpips-only", "lpips-resize"]
# "What makes a style branch die?": which runs, and the color of each.
DYING = {"own": "steelblue", "own-loss": "mediumseagreen", "other": "darkorange", "other-loss": "firebrick",
         "authors-own": "gray"}
# Section 3.3: the same network in three widths.
WIDTHS = {"width16": "steelblue", "width32": "mediumseagreen", "width64": "darkorange"}
# Table 2, figure 5: three runs of the wide network, from the authors' initial weights twice and from ours.
WIDE = {"wide2000": "steelblue", "wide2000-seed1": "mediumseagreen", "collapsed2000": "darkorange"}
# Columns of one run: section 2.2 (longer training), table 1 (the U-Net alone), section 3.2 (a loss on the codes).
LONGEST = {"val_transfer": "darkorange", "train_loss": "steelblue", "val_loss": "firebrick"}
UNET = {"train_loss": "steelblue", "val_loss": "firebrick"}
COMBINED = {"color_loss": "steelblue", "style_loss": "firebrick", "val_spread": "gray"}
# Figures of several curves. A curve is its name, its run, the run's column of log.csv, and its color.
TOGETHER = {"listens": [(run, run, "val_listens", color) for run, color in DYING.items()],
            "spread": [(run, run, "val_spread", color) for run, color in DYING.items()],
            "scarcity": [(run, run, "val_transfer", color) for run, color in WIDTHS.items()],
            "longest": [(column, "final-long", column, color) for column, color in LONGEST.items()],
            "wide": [(run, run, "val_spread", color) for run, color in WIDE.items()],
            "unet": [(column, "unet-long", column, color) for column, color in UNET.items()],
            "combined": [(column, "combined-long", column, color) for column, color in COMBINED.items()],
            "solutions": [("combined", "combined-long", "val_listens", "steelblue"),
                          ("combined authors", "combined-authors-long", "val_listens", "darkorange"),
                          ("dual", "dual-long", "val_listens", "firebrick")],
            # "MSE and LPIPS together".
            "terms": [("both", "final-long", "val_transfer", "steelblue"),
                      ("MSE alone", "mse-long", "val_transfer", "darkorange"),
                      ("LPIPS alone", "lpips-long", "val_transfer", "firebrick")],
            # "32 numbers are best".
            "latents": [(f"{n} numbers", run, "val_transfer", color) for n, run, color in (
                (2, "latent2-long", "firebrick"), (8, "latent8-long", "goldenrod"),
                (16, "latent16-long", "mediumseagreen"), (32, "latent32-long-seed1", "steelblue"),
                (64, "latent64-long", "mediumpurple"), (128, "latent128-long", "black"))]}


def grid(out, truth):
    """(N, 3, S, S) twice, S a multiple of 16 -> the amplitude of the lattice that is the same in all of them."""
    edge = out.shape[2] // 4
    error = (out - truth)[:, :, edge:-edge, edge:-edge]
    N, C, S, _ = error.shape
    blocks = error.reshape(N, C, S // 4, 4, S // 4, 4).mean((0, 2, 4))                # (3, 4, 4)
    return 255 * blocks.flatten(1).std(1, correction=0).mean().item()


def read_log(path):
    """The rows of a log.csv, as dictionaries of texts."""
    with open(path) as file:
        return list(csv.DictReader(file))


def load(folder):
    """A run's network, changed as its variants.txt says, and the size it was trained at."""
    with variants.use(variants.of_run(folder)):
        return infer.load_model(folder / "last.pt")


@torch.no_grad()
def row(name, folder, photos, paintings):
    """Print a run's row of the table."""
    validated = [r for r in read_log(folder / "log.csv") if r.get("val_loss")]  # a stopped run's last row is not
    if not validated:
        return
    log = validated[-1]
    model, size = load(folder)
    space, use_style = model.config.space, model.config.use_style
    squares = [crop_square(p, size) for p in photos]
    truth = torch.stack([to_tensor(p) for p in squares]) / 255                  # (N, 3, S, S)
    grays = gray_of(truth).split(1)                                             # N x (1, 1, S, S)
    codes = [infer.encode(model, rgb) if use_style else None for rgb in truth.split(1)]

    raw = torch.cat([network_to_rgb(model.colorize(gray, z), gray, space) for gray, z in zip(grays, codes)])
    joined = [infer.join(p, infer.predict(model, gray, z)) for p, gray, z in zip(squares, grays, codes)]
    joined = torch.stack([to_tensor(p) for p in joined]) / 255
    transfer = spread = alive = heard = "-"
    if use_style:
        deviation = torch.cat([infer.encode(model, resize_short_side(p, size)) for p in paintings]).std(0, correction=0)
        transfer, heard = (f"{float(log[name]):.2f}" for name in ("val_transfer", "val_listens"))
        spread, alive = f"{deviation.mean():.3g}", f"{(deviation > .01).sum()} / {len(deviation)}"
    cells = [name, f"{sum(p.numel() for p in model.parameters()):,}", f"{int(log['pictures']):,}",
             f"{float(log['train_loss']):.4f}", f"{float(log['val_loss']):.4f}", f"{float(log['val_psnr']):.2f}",
             f"{psnr(joined, truth).mean():.2f}", transfer, spread, alive, heard, f"{grid(raw, truth):.2f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


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
            place(crop_square(examples[style], side), column, 0)
    for line, (name, run_folder) in enumerate(runs.items(), start=1):
        model, size = load(run_folder)
        pen.text((4, 30 + line * (side + 4)), name, fill="black")
        for k, photo in enumerate(("chelsea", "rocket")):
            photo = crop_square(examples[photo], size)
            gray = gray_of(to_batch(photo))                                     # (1, 1, size, size)
            for i, style in enumerate([photo] + [examples[s] for s in styles]):
                z = infer.encode(model, resize_short_side(style, size)) if model.config.use_style else None
                raw = to_picture(lab_to_gamut(infer.predict(model, gray, z))[0])
                place(raw.resize((side, side), Image.Resampling.NEAREST), 5 * k + i, line)
                if k and not i and name in CLOSEUPS:
                    crop = ImageOps.autocontrast(raw.crop((4, 4, 36, 36)), cutoff=2)
                    closeups.append((name, crop.resize((256, 256), Image.Resampling.NEAREST)))
        if model.config.use_style and name in CODES:
            z = torch.cat([infer.encode(model, resize_short_side(examples[s], size)) for s in styles])
            codes.append(infer.histograms(z, [f"{name}: {s}" for s in styles]))
    # Only what these runs give: other figures in the folder stay.
    if closeups:
        page.save(folder / "experiments.jpg", quality=90)
    logs = {p.stem: p for p in LOGS.glob("*.csv")} | {name: run / "log.csv" for name, run in runs.items()}
    for figure, curves in TOGETHER.items():
        rows = [{"step": row["step"], name: row[column]} for name, run, column, _ in curves if run in logs
                for row in read_log(logs[run])  # no validation where a run was interrupted
                if row.get("val_loss") and row.get(column)]
        if rows:
            infer.draw_curves(rows, {name: color for name, *_, color in curves}).save(folder / f"{figure}.png")
    for name, pictures, columns in (("codes", codes, 2), ("grid", [strip([cell], 256) for cell in closeups], 4)):
        if not pictures:
            continue
        w, h = (max(getattr(p, side) for p in pictures) for side in ("width", "height"))
        page = Image.new("RGB", (columns * w, -(-len(pictures) // columns) * h), "white")
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
    photos, paintings = ([open_picture(p) for p in list_pictures(folder)[:100]]
                         for folder in (args.photos, args.paintings))
    for what, place, found in (("runs", args.runs, runs), ("pictures", args.photos, photos),
                               ("pictures", args.paintings, paintings)):
        if not found:
            raise UserError(f"no {what} here", place)
    print("| run | parameters | pictures | train loss | val loss | psnr | psnr L | transfer | spread | alive | listens "
          "| grid |\n" + "|---" * 12 + "|")
    for name, folder in runs.items():
        row(name, folder, photos, paintings)


if __name__ == "__main__":
    run_program(main)
