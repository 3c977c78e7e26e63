"""Train the colorizer: the one loop, and the paper's experiments as presets.

    python train.py                                     the final model of the paper on Imagenette
    python train.py --device mps                        on an Apple chip
    python train.py --data DIR --lpips-net alex         your own photos, the cheap perceptual loss
    python train.py --data synthetic --minutes 5 --size 64 --lpips 0        nothing to download at all
    python train.py --output runs/final --resume        go on after an interruption
    torchrun --standalone --nproc_per_node=2 train.py   on two GPUs; --batch-size counts for each of them

    photo, style --(hue)--> gray --model(gray, style)--> out --color_loss--> backward, step

A run's folder (--output) holds last.pt, best.pt, log.csv, loss.png and samples/. Every random draw is a
function of (seed, step) or (seed, epoch, picture); so a resumed run needs no saved random state to go on
exactly as if nothing had happened.
"""
import argparse
import contextlib
import csv
import itertools
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.nn import functional as F
from torch.utils.data import DataLoader

from data import (Batches, Photos, UserError, find_data, gray_of, network_to_rgb, rgb_to_network, rotate_hue, run,
                  save_atomically, show, to_picture)
from infer import FORMAT, encode, load_checkpoint, pick_device, sheet
from losses import LPIPS, color_loss, load_trunk, palette_distances, psnr, ssim
from model import Colorizer, ModelConfig, start_as_authors


def opt(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Settings:
    """All settings of a run; the defaults are the paper's final model (table 3)."""
    data: str = opt("", "folder of photos, or the word synthetic; without it Imagenette is downloaded into data/")
    output: str = opt("", "the run's folder (runs/PRESET)")
    device: str = opt("auto", "auto takes CUDA, else MPS, else the CPU", ["auto", "cpu", "cuda", "mps"])
    seed: int = opt(0, "other seed, other run; same seed, same run")
    # how long
    epochs: int = opt(32, "passes over the training pictures; ignored where --steps or --minutes is given")
    steps: int = opt(0, "optimizer steps in all, 0: as --epochs says")
    minutes: float = opt(0., "time limit of the run, earlier sessions and validations counted, 0: none")
    # what it sees
    size: int = opt(128, "side of the square crops, a multiple of 16")
    batch_size: int = opt(16, "pictures a forward pass; halve it when memory runs out, and double --accumulate")
    accumulate: int = opt(1, "forward passes an optimizer step: batch 4 x accumulate 4 learns about as batch 16")
    train_size: int = opt(50_000, "at most so many training pictures, 0: all")
    val_size: int = opt(500, "at most so many validation pictures, 0: all")
    workers: int = opt(2, "processes that load pictures; changes the speed, never the result")
    hue_rotation: float = opt(0., "share of pictures whose colours are turned by a random angle, style and all")
    style_from: str = opt("same", "the style is the photo itself, another crop of it, turned, or another photo",
                          ["same", "crop", "other"])
    # the network (see model.py)
    color: str = opt("rgb", "what the network makes: rgb, or a and b beside the photo's own L", ["rgb", "lab"])
    width: int = opt(16, "channels of the first stage")
    latent: int = opt(32, "numbers in a style code")
    dropout: float = opt(.2, "after every block, in training only")
    style: bool = opt(True, "style encoder and AdaIN; without them it is the plain U-Net")
    sigmoid: bool = opt(False, "squash the style code into (0, 1)")
    relu: bool = opt(False, "a ReLU before the code's pooling, as the authors have it")
    resize: bool = opt(False, "enlarge by nearest neighbour and a convolution, not by a transposed convolution")
    start: str = opt("ours", "initial weights: ours, or the authors' of AdaIN's scales, the style encoder, or both",
                     ["ours", "scales", "encoder", "both"])
    # the loss (see losses.py)
    mse: float = opt(1., "weight of the mean squared error")
    lpips: float = opt(1., "weight of LPIPS, 0: not even loaded")
    lpips_net: str = opt("vgg", "LPIPS trunk; alex is many times cheaper and what the paper's authors ran", ["vgg", "alex"])
    lpips_weights: str = opt("", "file with the trunk's weights, else $COLORIZER_WEIGHTS, torch's cache, a download")
    palette: float = opt(0., "weight of the distance between the palettes of output and style")
    style_loss: str = opt("none", "section 3.2: one sum of both losses, or an optimizer each", ["none", "combined", "dual"])
    alpha: float = opt(.5, "combined: alpha * colour loss + (1 - alpha) * style loss")
    # the optimizer
    lr: float = opt(1e-4, "Adam's learning rate")
    weight_decay: float = opt(0., "decoupled weight decay (AdamW); 0 is plain Adam")
    warmup: int = opt(0, "steps over which the learning rate rises to --lr")
    schedule: str = opt("constant", "constant as in the paper, or down to 0 along a cosine", ["constant", "cosine"])
    clip: float = opt(0., "largest norm of the gradient, 0: any")
    # running
    val_every: int = opt(500, "steps between validations; each also writes last.pt")
    init: str = opt("", "checkpoint whose weights to start from, with a new optimizer: fine-tuning")
    amp: bool = opt(False, "autocast to half precision: CUDA and recent CPUs")
    compile: bool = opt(False, "torch.compile: a minute's wait, then faster; CUDA and CPU")


STOP_SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]  # Windows: no HUP
UNREDUCED = dict(width=64, latent=128, dropout=0.)  # the network before section 3.3 made it scarce
PRESETS = {
    "final": {},                                                                    # table 3, the default
    "unet": dict(UNREDUCED, style=False, train_size=2000, val_size=200, epochs=231, weight_decay=.01),  # table 1
    "collapsed": dict(UNREDUCED),                                                   # table 2
    "combined": dict(UNREDUCED, style_from="other", style_loss="combined"),         # section 3.2, solution 1
    "dual": dict(UNREDUCED, style_from="other", style_loss="dual"),                 # section 3.2, solution 2
    "lab": dict(color="lab"),                                                       # table 4
    "lpips-only": dict(mse=0.),                                                     # appendix A.1.1
    # Not in the paper: LAB made to work. Hues are turned, so colour cannot be guessed from the gray photo; the
    # palette loss works against the pale averages that MSE asks for, turned crops as styles against learning where
    # things were. Weights and rate were found by short trials.
    "hue-rotation": dict(color="lab", hue_rotation=.5, style_from="crop", lpips=.05, lpips_net="alex", palette=2.,
                         dropout=0., lr=1.5e-3, warmup=200, schedule="cosine", clip=1.),
}


def parse(argv):
    """Command line -> (preset, explicitly given settings, resume?, dry run?). The options are Settings' fields."""
    parser = argparse.ArgumentParser(prog="train.py", description="Train the colorizer.",
                                     formatter_class=lambda prog: argparse.HelpFormatter(prog, width=110))
    parser.add_argument("--preset", choices=PRESETS, default="final",
                        help="; ".join(f"{k}: {' '.join(f'{a}={b}' for a, b in v.items()) or 'the defaults below'}"
                                       for k, v in PRESETS.items()))
    parser.add_argument("--resume", action="store_true", help="go on from last.pt in --output; without one, start anew")
    parser.add_argument("--dry-run", action="store_true", help="one step, one validation batch, one sample strip")
    for f in fields(Settings):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else \
               {"type": f.type, "choices": f.metadata["choices"]}
        shown = "none" if f.default == "" else f.default
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} [{shown}]".replace("%", "%%"), **kind)
    given = vars(parser.parse_args(argv))
    preset, resume, dry_run = given.pop("preset"), given.pop("resume"), given.pop("dry_run")
    s = Settings(**{**PRESETS[preset], **given})
    for wrong, text in [
            (not all(math.isfinite(v) for v in vars(s).values() if isinstance(v, float)), "nan and inf are no settings"),
            (s.size < 32 or s.size % 16, "--size must be a multiple of 16, from 32"),
            (min(s.batch_size, s.accumulate, s.val_every, s.epochs) < 1, "--batch-size, --accumulate, --val-every and "
             "--epochs must be at least 1"),
            (not (1 <= s.width <= 256 and 1 <= s.latent <= 4096), "--width must be in [1, 256], --latent in [1, 4096]"),
            (s.seed >= 2 ** 31, "--seed must be below 2147483648"),
            (min(s.steps, s.minutes, s.train_size, s.val_size, s.workers, s.warmup, s.lr, s.clip, s.mse,
                 s.lpips, s.palette, s.weight_decay, s.seed) < 0, "no setting may be negative"),
            (not 0 <= s.dropout < 1, "--dropout must be in [0, 1)"),
            (not (0 <= s.hue_rotation <= 1 and 0 <= s.alpha <= 1), "--hue-rotation and --alpha must be in [0, 1]"),
            (not s.mse + s.lpips + s.palette, "--mse, --lpips and --palette are all 0: there is nothing to learn"),
            (not s.style and (s.style_loss != "none" or s.start != "ours"), "--style-loss and --start need a style encoder")]:
        if wrong:
            parser.error(text)
    return preset, given, resume, dry_run


# ---- pieces of the loop -----------------------------------------------------------------------------------

class Recipe:
    """The settings and the frozen networks that turn a batch into losses; the same for training and validation."""

    def __init__(self, s, device):
        self.s, self.device = s, device
        self.weights = {"mse": s.mse, "lpips": s.lpips, "palette": s.palette}
        self.lpips = LPIPS(s.lpips_net, load_trunk(s.lpips_net, s.lpips_weights)).to(device) if s.lpips else None
        if self.lpips and device.type != "mps":  # faster for convolutions alone; on MPS it has given wrong gradients
            self.lpips.to(memory_format=torch.channels_last)

    def prepare(self, batch):
        """uint8 crops from the loader -> gray (B, 1, S, S), rgb and style (B, 3, S, S) in [0, 1] on the device."""
        photo, style, angle = (t.to(self.device, non_blocking=True) for t in batch)
        same = self.s.style_from == "same"
        rgb = photo.float() / 255
        style = rgb if same else style.float() / 255
        if self.s.hue_rotation:
            turned = rotate_hue(rgb, angle)
            style = turned if same else rotate_hue(style, angle)
            rgb = turned
        return gray_of(rgb), rgb, style


def style_loss(model, gray, style, out, color):
    """Section 3.2: the code of the result should be the code of the style. As in the paper, the result's code is
    taken without gradient, so only the style encoder can answer, and does so by shrinking its codes."""
    with torch.no_grad():
        result = model.encode_style(rgb_to_network(network_to_rgb(out, gray, color).clamp(0, 1), color))
    return F.mse_loss(model.encode_style(rgb_to_network(style, color)), result)


def objective(s, k, color, style):
    """What optimizer k minimises, of the colour loss and the style loss (None where there is none)."""
    if s.style_loss == "combined":
        return s.alpha * color + (1 - s.alpha) * style
    return style if k else color


def learning_rate(s, step, progress):
    """At a step, and at a share of the whole run in [0, 1]."""
    lr = s.lr * min(1, (step + 1) / (s.warmup + 1))
    return lr * (1 + math.cos(math.pi * progress)) / 2 if s.schedule == "cosine" else lr


@torch.no_grad()
def validate(model, recipe, batches):
    """Measures over the validation set, as a dictionary of means.

    loss, mse, lpips, palette, psnr, ssim: each photo with its own colours. transfer: palette transfer with the
    next picture's colours instead. spread: deviation of the style codes over pictures, mean over dimensions.
    """
    s, totals, count, codes, W, W_gray = recipe.s, {}, 0, [], 0, 0
    model.eval()
    for batch in batches:
        gray, rgb, style = recipe.prepare(batch)
        seen = rgb_to_network(style, s.color)
        z = model.encode_style(seen) if s.style else None
        out = model.colorize(gray, z)
        shown = network_to_rgb(out, gray, s.color).clamp(0, 1)
        loss, terms = color_loss(out, gray, rgb, style, s.color, recipe.weights, recipe.lpips)
        terms.update(loss=loss, mse=terms.get("mse", F.mse_loss(out, rgb_to_network(rgb, s.color))),
                     psnr=psnr(shown, rgb).mean(), ssim=ssim(shown, rgb).mean())
        for name, value in terms.items():
            totals[name] = totals.get(name, 0) + value.item() * len(gray)
        count += len(gray)
        if s.style:
            other = network_to_rgb(model.colorize(gray, z.roll(1, 0)), gray, s.color).clamp(0, 1)
            d, d_gray = palette_distances(other, style.roll(1, 0))
            W, W_gray = W + d.sum().item(), W_gray + d_gray.sum().item()
            codes.append(z)
    model.train()
    result = {name: value / count for name, value in totals.items()}
    if s.style:
        result.update(transfer=1 - W / max(W_gray, 1e-6), spread=torch.cat(codes).std(0, correction=0).mean().item())
    return result


def peak_memory(device):
    """MB. On CUDA the peak that tensors took, on MPS what the driver holds now, else the process's peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e6
    try:
        import resource  # not on Windows
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    except ImportError:
        return math.nan


def draw_curves(rows, path):
    """loss.png: the losses over steps, logarithmic, from the rows of log.csv (figures 2, 4 and 6)."""
    series = [(name, colour, [(float(r["step"]), float(r[name])) for r in rows if r.get(name) and float(r[name]) > 0])
              for name, colour in [("train_loss", "steelblue"), ("val_loss", "darkorange"), ("color_loss", "seagreen"),
                                   ("style_loss", "crimson")]]
    series = [s for s in series if s[2]]
    points = [p for *_, s in series for p in s]
    if not points:
        return
    right = max(x for x, _ in points)
    low, high = min(math.log10(y) for _, y in points) - .02, max(math.log10(y) for _, y in points) + .02
    page = Image.new("RGB", (640, 400), "white")
    pen = ImageDraw.Draw(page)

    def place(x, y):
        return 60 + 560 * x / right, 20 + 350 * (high - math.log10(y)) / (high - low)
    for i in range(5):
        y = 10 ** (low + (high - low) * i / 4)
        pen.line([place(0, y), place(right, y)], fill="gainsboro")
        pen.text((6, place(0, y)[1] - 6), f"{y:.4g}", fill="gray")
        pen.text((place(right * i / 4, y)[0] - 12, 378), f"{right * i / 4:.0f}", fill="gray")
    for i, (name, colour, s) in enumerate(series):
        if len(s) > 1:
            pen.line([place(*p) for p in s], fill=colour, width=2)
        for x, y in (place(*p) for p in s):
            pen.ellipse([x - 2, y - 2, x + 2, y + 2], fill=colour)
        pen.text((60 + 100 * i, 4), name.replace("_", " "), fill=colour)
    save_atomically(path, page.save)


def write_log(rows, path):
    names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))

    def write(part):
        with open(part, "w", newline="") as file:
            table = csv.DictWriter(file, names)
            table.writeheader()
            table.writerows(rows)
    save_atomically(path, write)


def ignore_signals(_):
    """For the loading processes: signals to the whole group reach them too, but only the main process answers."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def join_processes(device):
    """This process's number and how many there are. torchrun sets these variables; without it we are alone."""
    if "RANK" not in os.environ:
        return 0, 1
    if device.type == "cuda":
        card = int(os.environ["LOCAL_RANK"])
        if card >= torch.cuda.device_count():
            raise UserError(f"{torch.cuda.device_count()} GPUs, but torchrun starts more processes: lower --nproc_per_node")
        torch.cuda.set_device(card)
    # gloo for tensors on the CPU, nccl for those on a GPU. The others wait as long as the first one validates.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    return dist.get_rank(), dist.get_world_size()


def average(tensors):
    """Give each tensor, in place, its mean over all processes. DistributedDataParallel does the same, only faster."""
    if dist.is_initialized():
        for t in tensors:
            dist.all_reduce(t)
            t /= dist.get_world_size()


# ---- the loop ---------------------------------------------------------------------------------------------

def train(preset, given, resume, dry_run):
    folder = Path(given.get("output") or f"runs/{preset}")
    last, saved = folder / "last.pt", None
    if last.exists() and not dry_run:
        if not resume:
            raise UserError(f"{show(folder)} already holds a run: add --resume to go on with it, or choose another --output")
        saved = load_checkpoint(last)
        if "optimizers" not in saved:
            raise UserError(f"{show(last)}: holds weights only; start from it with --init {show(last)} and another --output")
        types = {f.name: f.type for f in fields(Settings)}
        if saved["preset"] not in PRESETS or any(type(v) is not types.get(k) for k, v in saved["settings"].items()):
            raise UserError(f"{show(last)}: its preset or settings are not of this version of the program")
        preset = saved["preset"]
    # Later ones win: the defaults, the preset, what the interrupted run was started with, the command line.
    s = Settings(**{**PRESETS[preset], **(saved["settings"] if saved else {}), **given})
    device = pick_device(s.device)
    if device.type == "mps" and (s.amp or s.compile):
        raise UserError("--amp gives black or NaN pictures on MPS and --compile is unreliable there; leave them off")

    rank, world = join_processes(device)
    if rank:
        sys.stdout = open(os.devnull, "w")  # all decide alike; the first one tells, validates and writes
        dist.barrier()  # and downloads; the others go on when it has what it needs
    training, validation = find_data(s.data, s.train_size, s.val_size, s.seed)
    recipe = Recipe(s, device)
    if world > 1 and not rank:
        dist.barrier()
    torch.manual_seed(s.seed)
    config = ModelConfig(**{f.name: getattr(s, f.name) for f in fields(ModelConfig)})
    initial = saved or (load_checkpoint(s.init) if s.init else None)  # dropout has no weights and may differ
    if initial and initial["model"] | {"dropout": s.dropout} != asdict(config):
        differ = [f"{k} {v} (here {asdict(config)[k]})" for k, v in initial["model"].items() if v != asdict(config)[k]]
        raise UserError(f"the checkpoint is of preset {initial.get('preset')} and has another {', '.join(differ)}")
    model = start_as_authors(Colorizer(config), s.start).to(device)
    if initial:
        model.load_state_dict(initial["weights"])
    if s.compile:
        model.compile()
    # Solution 2 of section 3.2 has a second one, for the style loss, with a tenth of the learning rate.
    optimizers = [torch.optim.AdamW(model.parameters(), lr=s.lr, weight_decay=s.weight_decay)
                  for _ in range(2 if s.style_loss == "dual" else 1)]
    old_gpu = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    half = torch.float16 if old_gpu else torch.bfloat16  # fp16 rounds small gradients to 0 unless they are scaled
    scaler = torch.amp.GradScaler(device.type, enabled=s.amp and old_gpu)  # switched off, it does nothing

    step, seconds, best, rows = 0, 0., math.inf, []
    if saved:
        step, seconds, best, rows = saved["step"], saved["seconds"], saved["best"], saved["log"]
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        scaler.load_state_dict(saved["scaler"])
    photos = Photos(training, s.size, s.seed, True, s.hue_rotation, s.style_from)
    passes = s.accumulate * world  # forward passes a step, over all processes
    per_step = s.batch_size * passes
    if saved and rows[-1]["pictures"] != step * per_step:
        raise UserError(f"{show(last)}: its steps are of {rows[-1]['pictures'] // step} pictures, not {per_step}; choose "
                        "--batch-size and --accumulate so that their product, times the processes, is that")
    limit = s.steps or (sys.maxsize if s.minutes else math.ceil(s.epochs * len(photos) / per_step))
    loading = dict(num_workers=s.workers, worker_init_fn=ignore_signals, pin_memory=device.type == "cuda")
    loader = iter(DataLoader(photos, batch_sampler=Batches(len(photos), s.batch_size, s.seed, step * passes + rank, world), **loading))
    val_photos = Photos(validation, s.size, s.seed, False)
    val_keys = [[(0, i) for i in range(a, min(a + 16, len(validation)))] for a in range(0, len(validation), 16)]
    if dry_run:
        limit, step, val_keys = 1, 0, val_keys[:1]
        folder = folder / "dry-run"
    print(f"{preset}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(photos)} training and "
          f"{len(validation)} validation pictures, {device}" + (f", from step {step}" if saved else ""))

    def sample():
        """The strip of figure 8: some validation photos in their own colours and in those of others."""
        model.eval()
        pictures = [val_photos.load(i) for i in range(min(8, len(val_photos)))]
        styles = pictures[4:] if s.style else []
        others = [encode(model, p, s.size) for p in styles]
        page = sheet(model, pictures[:4], [None, *styles],
                     lambda photo: [encode(model, photo, s.size) if s.style else None, *others], s.size)
        model.train()
        save_atomically(folder / "samples" / f"{step:07d}.png", page.save)

    def checkpoint(name):
        save_atomically(folder / name, lambda part: torch.save({
            "format": FORMAT, "preset": preset, "model": asdict(config), "settings": asdict(s), "step": step,
            "seconds": before + time.monotonic() - start_time, "best": best, "log": rows, "weights": model.state_dict(),
            "optimizers": [o.state_dict() for o in optimizers], "scaler": scaler.state_dict()}, part))

    stop = []  # filled by Ctrl-C and its like; the step in hand is finished first

    def on_signal(number, _):
        if stop and world == 1:  # asked twice: at once, then. (torchrun passes on what has reached us already.)
            sys.exit(130)
        stop.append(number)
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup wants us to live on
            signal.signal(number, on_signal)

    if s.steps and step >= s.steps:
        print(f"nothing to do: this run has taken its {step} steps; give it more with --steps")
    if rank == 0:
        write_log(rows, folder / "log.csv")  # finds out now, and not after an hour, that the folder cannot be written
    autocast = torch.autocast(device.type, half) if s.amp else contextlib.nullcontext()
    line_every = 1 if sys.stdout.isatty() else 60  # seconds
    before, start_time = seconds, time.monotonic()  # before: of earlier sessions of this run
    first, window, sums, since = step, time.monotonic(), {}, 0
    model.train()
    while True:
        progress = max(step / limit, seconds / (60 * s.minutes) if s.minutes else 0)
        if progress >= 1:
            break
        batches = [recipe.prepare(next(loader)) for _ in range(s.accumulate)]
        losses = {}
        for k, optimizer in enumerate(optimizers):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(s, step, progress) / 10 ** k
            optimizer.zero_grad(set_to_none=True)
            for j, (gray, rgb, style) in enumerate(batches):
                # Dropout and directions are functions of the seed and the number of the forward pass.
                torch.manual_seed((s.seed << 32) + step * passes + j * world + rank)
                turn = torch.rand(()).item()  # of the directions along which the palette loss looks
                with autocast:
                    out = model(gray, rgb_to_network(style, s.color) if s.style else None)
                out = out.float()
                color, _ = color_loss(out, gray, rgb, style, s.color, recipe.weights, recipe.lpips, turn)
                of_codes = style_loss(model, gray, style, out, s.color) if s.style_loss != "none" else None
                loss = objective(s, k, color, of_codes)
                scaler.scale(loss / s.accumulate).backward()
                if k == 0:  # each item() makes a GPU wait, so every loss is read once, here
                    values = {"train_loss": loss.item()}
                    if of_codes is not None:
                        values.update(color_loss=color.item(), style_loss=of_codes.item())
                    losses = {n: losses.get(n, 0) + v / s.accumulate for n, v in values.items()}
            average([p.grad for p in model.parameters() if p.grad is not None])
            if s.clip:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
            scaler.step(optimizer)
            scaler.update()
        step += 1
        since += 1

        # All processes get the same losses and the same clock, so that they decide alike.
        told = torch.tensor([*losses.values(), bool(stop), before + time.monotonic() - start_time])
        average([told])
        *values, stopping, seconds = told.tolist()  # a signal from here on is answered after the next step
        if not math.isfinite(values[0]):
            kept = f"{show(last)} is still good" if last.exists() else "nothing was saved yet"
            raise UserError(f"the loss became {values[0]} at step {step - 1}: try a lower --lr "
                            f"(now {s.lr:g}){', no --amp' if s.amp else ''} or --clip 1; {kept}")
        sums = {n: sums.get(n, 0) + v for n, v in zip(losses, values)}
        if time.monotonic() - window > line_every or step == limit:
            rate = (step - first) * per_step / max(time.monotonic() - window, 1e-6)
            left = max(0, min((limit - step) * per_step / rate, 60 * s.minutes - seconds if s.minutes else math.inf))
            print(f"\rstep {step}  loss {sums['train_loss'] / since:.4f}  {rate:.1f} images/s  "
                  f"{f'{left / 60:.0f} min' if left > 120 else f'{left:.0f} s'} left  {peak_memory(device):.0f} MB ",
                  end="" if line_every == 1 else "\n", flush=True)
            first, window = step, time.monotonic()
        over = step >= limit or (s.minutes and seconds >= 60 * s.minutes)
        due = step % s.val_every == 0 or over or stopping
        if due:
            average([b for b in model.buffers() if b.is_floating_point()])  # BatchNorm's running statistics
        if due and rank == 0:
            print(end="\n" if line_every == 1 else "")
            row = {"step": step, "pictures": step * per_step, "seconds": round(seconds, 1),
                   "lr": optimizers[0].param_groups[0]["lr"], **{n: v / since for n, v in sums.items()}}
            if not stopping:
                result = validate(model, recipe, DataLoader(val_photos, batch_sampler=val_keys, **loading))
                row.update({f"val_{name}": value for name, value in result.items()})
                print("  ".join(f"{k} {v:.4f}" for k, v in row.items() if k not in ("step", "pictures", "seconds", "lr")))
                if not math.isfinite(row["val_loss"]):
                    raise UserError(f"the validation loss became {row['val_loss']} at step {step}: try a lower --lr")
                sample()
            rows.append(row)
            sums, since = {}, 0
            if row.get("val_loss", math.inf) < best:
                best = row["val_loss"]
                checkpoint("best.pt")
            checkpoint("last.pt")
            write_log(rows, folder / "log.csv")
            draw_curves(rows, folder / "loss.png")
            first, window = step, time.monotonic()
        if stopping:
            print(f"stopped at step {step}; --output {show(folder)} --resume goes on from here")
            return 130
    print(f"done: {show(folder)}/best.pt, as in  python infer.py PHOTO STYLE --weights {show(folder)}/best.pt")


def main(argv=None):
    arguments = parse(argv)
    try:
        code = train(*arguments)
    except torch.cuda.OutOfMemoryError:
        raise UserError("the GPU's memory is full: halve --batch-size and double --accumulate, add --amp, or take "
                        "--lpips-net alex") from None
    if dist.is_initialized():
        # All leave together: torchrun ends the others when one leaves with 130, and a process that leaves right after
        # its last average may crash, as gloo's threads still hold tensors of it.
        dist.barrier()
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    run(main)
