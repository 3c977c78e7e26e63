"""The table and the figures of the paper's experiments, from finished runs.

    python experiments/experiments.py RUNS PHOTOS PAINTINGS
    python experiments/experiments.py [RUNS] --figures FOLDER

The table has a row for each run in RUNS, or in a folder of RUNS (of equal names, the newest). From the last row of its
log.csv: pictures seen, losses, psnr, transfer, listens (train.py, validate). Measured here with its last.pt, at the size
it was trained at:

    spread   deviation of the style codes over the first 100 of PAINTINGS, mean over dimensions, as infer.py --latents
    alive    dimensions in which that deviation is above .01
    psnr L   of the first 100 of PHOTOS in their own colors, joined with the photo's L as infer.py does, in dB
    grid     what all outputs have in common at the same place of 4x4 pixels, in steps of 1/255: the difference of
             output and photo, averaged over pictures and 4x4 blocks (the outer quarters aside); its deviation.
             About .1 is chance at 64x64.

The figures: the curves in CURVES, from the log.csv of runs in RUNS and the logs of earlier ones that are kept in logs/;
and from RUNS and the pictures in examples/ alone: experiments.jpg, the small outputs of the runs in PICTURED with the
photo's own colors and four styles; codes.png; grid.png, a corner of the rocket's sky enlarged, its contrast stretched.
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
                  resize_short_side, run_program, to_batch, to_picture)
from figures import STYLES, strip  # noqa: E402 (in benchmarks)
from losses import psnr  # noqa: E402

# The runs in experiments.jpg, in codes.png and in grid.png.
PICTURED = ["other", "own-loss", "combined-long-seed1", "authors-own", "own", "mse-long-seed1", "lpips-long-seed1",
            "final-long-seed1", "lab-long-seed1"]
CODES = ["combined-long-seed1", "sigmoid", "authors-own", "own"]
CLOSEUPS = ["final-long-seed1", "lpips-long-seed1", "mse-long-seed1", "resize-long-seed1"]


def seeds(column, runs):
    """Curves of a column of log.csv: for each run its own, and in a paler color that of the same with another seed.

    runs: {what the figure calls it: run}; the other run has -seed1 behind its name.
    """
    colors = ("steelblue", "lightsteelblue"), ("firebrick", "lightcoral"), ("seagreen", "mediumaquamarine")
    return {name + seed: (run + folder, column, color) for (name, run), pair in zip(runs.items(), colors)
            for seed, folder, color in zip(("", ", seed 1"), ("", "-seed1"), pair)}


DYING = {"own": "steelblue", "own-loss": "mediumseagreen", "own-loss-encoder": "mediumpurple", "other": "darkorange",
         "other-loss": "firebrick", "authors-own": "gray"}
SOLUTION = {"color_loss": "steelblue", "style_loss": "firebrick", "val_spread": "gray"}
LONGEST, PAPER = "final-long+final-longer", "paper-1+paper-2+paper"
# {figure: {curve: (its run, a column of log.csv, color)}}. A + joins runs of which one goes on with the network of the
# other.
CURVES = {"unet": {"training": ("unet-long", "train_loss", "steelblue"),
                   "training, seed 1": ("unet-long-seed1", "train_loss", "lightsteelblue"),
                   "validation": ("unet-long", "val_loss", "firebrick"),
                   "validation, seed 1": ("unet-long-seed1", "val_loss", "lightcoral")},
          "wide": seeds("val_transfer", {"authors' weights": "wide2000", "our weights": "collapsed2000"}),
          "combined": {name: ("combined-long", name, color) for name, color in SOLUTION.items()},
          "dual": {name: ("dual-long", name, color) for name, color in SOLUTION.items()},
          "listens": {run: (run, "val_listens", color) for run, color in DYING.items()},
          "spread": {run: (run, "val_spread", color) for run, color in DYING.items()},
          "scarcity": seeds("val_transfer", {"width 16": "width16", "width 32": "width32", "width 64": "width64"}),
          "longest": {"64x64": (LONGEST, "val_transfer", "steelblue"), "paper": (PAPER, "val_transfer", "firebrick")},
          "losses": {"64x64, training": (LONGEST, "train_loss", "lightsteelblue"),
                     "64x64, validation": (LONGEST, "val_loss", "steelblue"),
                     "paper, training": (PAPER, "train_loss", "lightcoral"),
                     "paper, validation": (PAPER, "val_loss", "firebrick")},
          "terms": seeds("val_transfer", {"both": "final-long", "MSE alone": "mse-long", "LPIPS alone": "lpips-long"}),
          "lab": seeds("val_transfer", {"RGB": "final-long", "LAB": "lab-long"})}
# latents.png: the runs of footnote 4, by the numbers in their codes, at this many pictures.
SIZES, AT = {n: "final-long" if n == 32 else f"latent{n}-long" for n in (2, 8, 16, 32, 64, 128)}, "40000"


def grid(out, truth):
    """(N, 3, S, S) twice, S a multiple of 16 -> the amplitude of the lattice that is the same in all of them."""
    edge = out.shape[2] // 4
    error = (out - truth)[:, :, edge:-edge, edge:-edge]
    N, C, S, _ = error.shape
    blocks = error.reshape(N, C, S // 4, 4, S // 4, 4).mean((0, 2, 4))                # (3, 4, 4)
    return 255 * blocks.flatten(1).std(1, correction=0).mean().item()


def read_log(path):
    """The validated rows of a log.csv, as dictionaries of texts. (The last row of a stopped run is not validated.)"""
    with open(path) as file:
        return [row for row in csv.DictReader(file) if row.get("val_loss")]


def load(folder):
    """A run's network, changed as its variants.txt says, and the size it was trained at."""
    with variants.use(variants.of_run(folder)):
        return infer.load_model(folder / "last.pt")


@torch.no_grad()
def row(name, folder, photos, paintings):
    """Print a run's row of the table."""
    validated = read_log(folder / "log.csv")
    if not validated:
        return
    log = validated[-1]
    model, size = load(folder)
    space, use_style = model.config.space, model.config.use_style
    squares = [crop_square(p, size) for p in photos]
    truth = torch.cat([to_batch(p) for p in squares])                           # (N, 3, S, S)
    grays = gray_of(truth).split(1)                                             # N x (1, 1, S, S)
    codes = [infer.encode(model, rgb) if use_style else None for rgb in truth.split(1)]

    raw = torch.cat([network_to_rgb(model.colorize(gray, z), gray, space) for gray, z in zip(grays, codes)])
    joined = [infer.join(p, infer.predict(model, gray, z)) for p, gray, z in zip(squares, grays, codes)]
    joined = torch.cat([to_batch(p) for p in joined])
    transfer = spread = alive = heard = "-"
    if use_style:
        deviation = torch.cat([infer.encode(model, resize_short_side(p, size)) for p in paintings]).std(0, correction=0)
        transfer, heard = (f"{float(log[name]):.2f}" for name in ("val_transfer", "val_listens"))
        spread, alive = f"{deviation.mean():.3g}", f"{(deviation > .01).sum()} / {len(deviation)}"
    cells = [name, f"{sum(p.numel() for p in model.parameters()):,}", f"{int(log['pictures']):,}",
             f"{float(log['train_loss']):.4f}", f"{float(log['val_loss']):.4f}", f"{float(log['val_psnr']):.2f}",
             f"{psnr(joined, truth).mean():.2f}", transfer, spread, alive, heard, f"{grid(raw, truth):.2f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


@torch.no_grad()
def small(model, size, photo, style):
    """The network's own small answer to a photo in the colors of a style, all PIL pictures."""
    z = infer.encode(model, resize_short_side(style, size)) if model.config.use_style else None
    return to_picture(lab_to_gamut(infer.predict(model, gray_of(to_batch(crop_square(photo, size))), z))[0])


def draw_pictures(runs, folder):
    """experiments.jpg, codes.png and grid.png; runs: {name: folder}. What these runs do not give is not written."""
    examples = {p.stem: open_picture(p) for p in list_pictures(TOP / "examples")}

    # experiments.jpg: a row a run; two photos, each in its own colors and in those of four styles.
    shown = [name for name in PICTURED if name in runs]
    cell, left = 68, 130
    page = Image.new("RGB", (left + 10 * cell, cell * (len(shown) + 1)), "white")
    pairs = [(photo, style) for photo in ("chelsea", "rocket") for style in [photo] + STYLES]
    for x, (photo, style) in enumerate(pairs):
        if photo != style:
            page.paste(crop_square(examples[style], 64), (left + x * cell, 2))
    for y, name in enumerate(shown, start=1):
        ImageDraw.Draw(page).text((4, 28 + y * cell), name, fill="black")
        model, size = load(runs[name])
        for x, (photo, style) in enumerate(pairs):
            picture = small(model, size, examples[photo], examples[style])
            page.paste(picture.resize((64, 64), Image.Resampling.NEAREST), (left + x * cell, 2 + y * cell))
    if shown:
        page.save(folder / "experiments.jpg", quality=90)

    # codes.png: the codes of the four styles, as histograms. grid.png: a corner of the rocket's sky.
    codes, skies = [], []
    for name in [name for name in CODES if name in runs]:
        model, size = load(runs[name])
        if not model.config.use_style:
            raise UserError("has no codes to draw", runs[name])
        z = torch.cat([infer.encode(model, resize_short_side(examples[s], size)) for s in STYLES])
        codes.append(infer.histograms(z, [f"{name}: {s}" for s in STYLES]))
    for name in [name for name in CLOSEUPS if name in runs]:
        sky = small(*load(runs[name]), examples["rocket"], examples["rocket"]).crop((4, 4, 36, 36))
        sky = ImageOps.autocontrast(sky, cutoff=2).resize((256, 256), Image.Resampling.NEAREST)
        skies.append(strip([(name, sky)], 256))
    for figure, pictures in (("codes", codes), ("grid", skies)):
        if pictures:
            w, h = pictures[0].size
            page = Image.new("RGB", (2 * w, -(-len(pictures) // 2) * h), "white")
            for i, picture in enumerate(pictures):
                page.paste(picture, (i % 2 * w, i // 2 * h))
            page.save(folder / f"{figure}.png")


def draw_logs(runs, folder):
    """The figures with curves; runs: {name: folder}, besides those whose logs are kept."""
    logs = {p.stem: p for p in LOGS.glob("*.csv")} | {name: run / "log.csv" for name, run in runs.items()}

    def points(run, column, name):
        """Rows for infer.draw_curves. The pictures of a run that goes on with another's network are added to those."""
        before = 0
        for log in [read_log(logs[part]) for part in run.split("+") if part in logs]:
            yield from ({"pictures": before + int(row["pictures"]), name: row.get(column)} for row in log)
            before += int(log[-1]["pictures"]) if log else 0
    for figure, curves in CURVES.items():
        rows = [row for name, (run, column, _) in curves.items() for row in points(run, column, name)]
        if rows:
            colors = {name: color for name, (*_, color) in curves.items()}
            infer.draw_curves(rows, colors, "pictures").save(folder / f"{figure}.png")
    rows = [{"numbers": n, f"transfer{seed}": row.get("val_transfer")} for n, run in SIZES.items()
            for seed, log in (("", run), (", seed 1", f"{run}-seed1")) if log in logs
            for row in read_log(logs[log]) if row["pictures"] == AT]
    if rows:
        colors = {"transfer": "steelblue", "transfer, seed 1": "firebrick"}
        infer.draw_curves(rows, colors, "numbers").save(folder / "latents.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="?")
    parser.add_argument("photos", nargs="?")
    parser.add_argument("paintings", nargs="?")
    parser.add_argument("--figures", type=Path)
    args = parser.parse_args()
    if not args.figures and not args.paintings:
        parser.error("give RUNS PHOTOS PAINTINGS, or --figures FOLDER")
    if args.figures and args.photos:
        parser.error("--figures needs RUNS alone; without it the table is printed")
    found = [*args.runs.glob("*/last.pt"), *args.runs.glob("*/*/last.pt")] if args.runs else []
    runs = {p.parent.name: p.parent for p in sorted(found, key=lambda p: p.stat().st_mtime)
            if p.parent.name != "dry-run" and (p.parent / "log.csv").exists()}  # last.pt is written before the log
    if args.runs and not runs:
        raise UserError("no runs here", args.runs)
    if args.figures:
        args.figures.mkdir(parents=True, exist_ok=True)
        draw_pictures(runs, args.figures)
        return draw_logs(runs, args.figures)
    photos, paintings = ([open_picture(p) for p in list_pictures(folder)[:100]]
                         for folder in (args.photos, args.paintings))
    for folder, pictures in ((args.photos, photos), (args.paintings, paintings)):
        if not pictures:
            raise UserError("no pictures here", folder)
    print("| run | parameters | pictures | train loss | val loss | psnr | psnr L | transfer | spread | alive | listens "
          "| grid |\n" + "|---" * 12 + "|")
    for name, folder in runs.items():
        row(name, folder, photos, paintings)


if __name__ == "__main__":
    run_program(main)
