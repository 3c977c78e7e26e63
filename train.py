"""Train the colorizer: the one loop, and the paper's experiments as presets.

    python train.py                                     the final model of the paper, on Imagenette
    python train.py --device mps                        on an Apple chip
    python train.py --data DIR --lpips-net alex         your own photos, the cheap perceptual loss
    python train.py --data synthetic --minutes 5 --size 64 --lpips 0 --space lab --lr 1e-3 --output runs/drawn
                                                        drawn scenes, no download
    python train.py --output runs/final --resume        go on after an interruption
    torchrun --standalone --nproc_per_node=2 train.py   on two GPUs; --batch-size counts for each of them

    photo, style --prepare--> gray, rgb, style --encode_style, colorize--> out --color_loss--> backward, step

Read `Recipe.losses` and `train_step` first: they are all of the learning. `loop` calls them again and again.
The rest handles settings, files and processes: `Settings`, `Run` (a folder for the results, a log,
checkpoints) and `Processes` (several GPUs; with one process it does nothing). A run's folder (--output) holds
last.pt, best.pt, log.csv, loss.png and samples/. Every random number is a function of (seed, step) or (seed,
epoch, picture): so a resumed run needs no saved random state. On a CPU, in one process, with --steps or
--epochs, its weights are those of a run that never stopped, bit for bit. (With --minutes the machine's speed
decides how many steps there are; GPUs and several processes differ in the last bits.)
"""
import csv
import io
import math
import multiprocessing
import os
import signal
import sys
import time
import warnings
from argparse import SUPPRESS, BooleanOptionalAction
from dataclasses import asdict, dataclass, fields
from pathlib import Path

# infer comes first: it says which package is missing.
from infer import (FORMAT, draw_curves, encode, gray_version, join, load_checkpoint, pick_device, predict,
                   sheet)
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from data import (Parser, Photos, UserError, batch_order, crop_square, find_data, gray_of, network_to_lab,
                  network_to_rgb, photo_folders, printable, resize_short_side, rgb_to_lab, rgb_to_network,
                  run_program, save_atomically, sliced_wasserstein, to_batch)
from losses import LPIPS, color_loss, load_trunk, pair_loss, palette_distances, palette_loss, psnr, style_loss
from model import Colorizer, ModelConfig, setting


# ---- settings ---------------------------------------------------------------------------------------------

@dataclass
class Settings(ModelConfig):
    """All settings of a run: the network's (model.py) and these. The defaults are the paper's table 3.

    Each one is an option of the command line: batch_size is --batch-size. All of them are saved in the
    checkpoints, so that a run can be repeated and resumed. 0 or "" mostly means "off" or "no limit".
    To add a setting, add a line here and use it as s.NAME below. (If it changes the validation loss, name it
    in Run.restore, too: there the lowest loss so far is forgotten.)
    """
    data: str = setting("", "folder of photos, or the word synthetic; without it Imagenette is downloaded")
    output: str = setting("", "the run's folder (runs/PRESET)")
    device: str = setting("auto", "auto takes CUDA, else MPS, else the CPU", ("auto", "cpu", "cuda", "mps"))
    seed: int = setting(0, "another seed gives another run; the same seed gives the same run")
    # How long. The paper's run is 32 epochs of 50,000 pictures, or 100,000 steps. On one CPU core that is
    # days, and --minutes is the better way to say how long you are ready to wait.
    epochs: int = setting(32, "passes over the training pictures; not used with --steps or --minutes", low=1)
    steps: int = setting(0, "optimizer steps in all, 0: as --minutes or --epochs says")
    minutes: float = setting(0., "time limit, with validations and the time before a --resume, 0: none")
    # What it sees. Memory grows with size^2 x batch_size; when it runs out, halve batch_size and double
    # accumulate. --size 64 is four times as fast as 128 and good for a first look.
    size: int = setting(128, "side of the square crops, a multiple of 16", low=32, high=1024)
    batch_size: int = setting(16, "pictures a forward pass; halve it when memory runs out", low=1)
    accumulate: int = setting(1, "forward passes a step: 8 x accumulate 2 learns about as batch 16", low=1)
    train_size: int = setting(50_000, "at most so many training pictures, 0: all")
    val_size: int = setting(500, "at most so many validation pictures, 0: all")
    workers: int = setting(2 if sys.platform == "linux" else 0, "processes that load pictures, for speed")
    style_from: str = setting("same", "the style in training: the photo, or another one", ("same", "other"))
    # The loss (losses.py). mse keeps the result near the photo, lpips makes it look right, palette makes it
    # as colorful as the photo, pair keeps one thing in one color. Mind their sizes: after some training of
    # `ours` mse is about .002, lpips .07, palette .016, pair .4. style_loss is combined: added to the others,
    # or dual: with an optimizer of its own.
    mse: float = setting(1., "weight of the mean squared error")
    lpips: float = setting(1., "weight of LPIPS, 0: not even loaded")
    lpips_net: str = setting("vgg", "trunk of LPIPS; alex is cheaper and the authors'", ("vgg", "alex"))
    lpips_weights: str = setting("", "file with the trunk's weights; else looked for, else downloaded")
    palette: float = setting(0., "weight of the distance between the palettes of output and photo")
    pair: float = setting(0., "weight of the loss that keeps one thing in one color")
    style_loss: str = setting("none", "section 3.2: a loss on the codes", ("none", "combined", "dual"))
    alpha: float = setting(.5, "combined: alpha * color loss + (1 - alpha) * style loss", high=1)
    # The optimizer, Adam. If the loss jumps or becomes nan: a smaller lr, a warmup, or clip 1. 1e-4 is the
    # authors' for their long run; a short one learns more with 1e-3 and the cosine schedule.
    lr: float = setting(1e-4, "Adam's learning rate; higher learns faster, until the loss becomes nan")
    weight_decay: float = setting(0., "decoupled weight decay (AdamW); 0 is plain Adam")
    warmup: int = setting(0, "steps over which the learning rate rises to --lr; at most a tenth of the run")
    schedule: str = setting("constant", "constant as in the paper, or falling to 0", ("constant", "cosine"))
    clip: float = setting(0., "largest norm of the gradient, 0: any")
    val_every: int = setting(500, "steps between validations; with --minutes, about ten more a run", low=1)
    init: str = setting("", "checkpoint whose weights to start from, with a new optimizer: fine-tuning")
    amp: bool = setting(False, "compute in bfloat16 where it does no harm: faster on recent GPUs and CPUs")

    def check(self):
        """Raise ValueError, naming the setting, for values that cannot be used; returns self."""
        super().check()
        # The first word is the name of a setting; parse() makes an option of it, with - in place of _.
        for wrong, text in [
                (self.size % 16, "size must be a multiple of 16"),
                (self.mse + self.lpips + self.palette == 0, "lpips must not be 0 when mse and palette are"),
                (not self.use_style and self.style_loss != "none", "style_loss needs a style encoder"),
                (not self.use_style and self.pair, "pair needs a style encoder"),
                (self.pair and self.style_loss != "none", "pair does not go together with --style-loss")]:
            if wrong:
                raise ValueError(text)
        return self


# A preset is a few defaults changed; `--preset lab --latent 64` changes one more. Each but the last belongs
# to a place in the paper; experiments/README.md says what came out. The paper's story: a U-Net alone
# overfits; with AdaIN it ignores the style; a loss on the codes does not help; a small U-Net follows it.
UNREDUCED = dict(width=64, latent=128, dropout=0.)  # the network before section 3.3 made it scarce
PRESETS = {
    # Table 3, the default: a U-Net so small, says the paper, that it has to look at the style.
    "final": {},
    # Table 1: the U-Net alone, on few pictures and for long, until it overfits.
    "unet": dict(UNREDUCED, use_style=False, train_size=2000, val_size=200, epochs=231, weight_decay=.01),
    # Table 2: the wide U-Net with AdaIN. In the paper its codes go to zero.
    "collapsed": dict(UNREDUCED),
    # Section 3.2: a photo with a foreign style, and a loss on the codes. Solution 1: one sum of both losses.
    "combined": dict(UNREDUCED, style_from="other", style_loss="combined"),
    # Solution 2: two optimizers, one for each loss, the second with a tenth of the learning rate.
    "dual": dict(UNREDUCED, style_from="other", style_loss="dual"),
    # Table 4: only a and b are made, the photo keeps its own L. The losses do not compare with those in RGB.
    "lab": dict(space="lab"),
    # Appendix A.1.1: without MSE, a grid appears.
    "lpips-only": dict(mse=0.),
    # Not in the paper, and meant to go on from a network trained as `final`. The pair loss keeps one surface
    # in one color. Replicated borders keep colors from depending on the place. The palette loss keeps them
    # from becoming as pale as MSE alone makes them. The network that ships had --lr 7e-4 (weights/README.md).
    "ours": dict(padding="replicate", dropout=0., mse=4., lpips_net="alex", palette=1., pair=.2,
                 lr=1e-3, warmup=200, schedule="cosine", clip=1.),
}


def parse(argv):
    """Command line -> (preset or None, explicitly given settings, resume?, dry run?).

    The options are the fields of Settings. Exits with code 2 and one line for a mistake.
    """
    parser = Parser(prog="train.py", description="Train the colorizer.", usage="python train.py [options]")
    add = parser.add_argument
    changed = [f"{k}: {' '.join(f'{a}={b}' for a, b in v.items()) or 'nothing'}" for k, v in PRESETS.items()]
    # These options are not fields of Settings: they say what to do with a run.
    add("--preset", choices=PRESETS, help=f"changes of the defaults; {'; '.join(changed)}")
    add("--resume", action="store_true", help="go on from last.pt in --output; an empty folder starts anew")
    add("--dry-run", action="store_true", help="one step, one validation batch, one sheet of samples")
    for f in fields(Settings):
        # A bool becomes --name and --no-name. SUPPRESS: what is not typed is not there, so that --resume can
        # tell a setting that was asked for from one that merely has its default.
        kind = {"action": BooleanOptionalAction} if f.type is bool else \
               {"type": f.type, "choices": f.metadata["choices"] or None}
        text = f"{f.metadata['help']} [{'none' if f.default == '' else f.default}]"
        add("--" + f.name.replace("_", "-"), default=SUPPRESS, help=text.replace("%", "%%"), **kind)
    given = vars(parser.parse_args(argv))  # {"batch_size": 8, ...}, only what was typed
    preset, resume, dry_run = given.pop("preset"), given.pop("resume"), given.pop("dry_run")
    if resume and dry_run:
        parser.error("--dry-run begins anew; it does not go together with --resume")
    # The bounds of each setting, and what does not go together, before anything is read or built. (A resumed
    # run has settings of its own, which Run reads and checks.)
    try:
        if not resume:
            Settings(**{**PRESETS[preset or "final"], **given}).check()
    except ValueError as error:
        parser.error("--" + str(error).replace("_", "-"))
    return preset, given, resume, dry_run


def as_option(name, value):
    """A setting as one would type it: --batch-size 8, --sigmoid, --no-use-style."""
    option = ("--no-" if value is False else "--") + name.replace("_", "-")
    return option if type(value) is bool else f"{option} {value}"


# ---- learning ---------------------------------------------------------------------------------------------

def means(rows):
    """[{name: number}, ...], with the same names in each -> {name: its mean}."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


class Recipe:
    """The settings and the frozen LPIPS that turn a batch into losses, in training and in validation."""

    def __init__(self, s, device):
        self.s, self.device = s, device
        self.loss_weights = {"mse": s.mse, "lpips": s.lpips, "palette": s.palette}
        # LPIPS compares what a network sees that was trained to recognize things. It only measures: its
        # weights are frozen, and the gradient passes through it to the picture.
        net = s.lpips_net
        self.lpips = LPIPS(net, load_trunk(net, s.lpips_weights)).to(device) if s.lpips else None
        if s.lpips and device.type != "mps":  # this layout is faster; on MPS it has given wrong gradients
            self.lpips.to(memory_format=torch.channels_last)
        # bfloat16 has the range of float32: small gradients do not vanish in it, as they do in float16.
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=s.amp)

    def prepare(self, batch):
        """uint8 crops from the loader -> gray (B, 1, S, S), rgb and style (B, 3, S, S), all in [0, 1]."""
        # Pictures travel as bytes, a quarter of the size of floats. non_blocking: the copy to a GPU need not
        # wait until Adam's last step is done. (Not on MPS, which may read memory that is free by then.)
        cuda = self.device.type == "cuda"
        photo, style = (t.to(self.device, non_blocking=cuda) for t in batch)    # (B, 3, S, S)
        rgb = photo.float() / 255
        return gray_of(rgb), rgb, rgb if self.s.style_from == "same" else style.float() / 255

    def losses(self, model, batch, seed):
        """The losses of a batch: {"train_loss": what the optimizer minimizes, and others for the log}.

        batch: (gray, rgb, style) as prepare gives them; seed: of everything that is random in here.
        (The log's val_loss is the color loss alone. With pair or a style loss it does not compare with
        train_loss.)
        """
        s, (gray, rgb, style) = self.s, batch
        # Seeds dropout, the palette's directions and the pixels of the pairs. (Set anew before each forward
        # pass: so the state of torch's generator need not be saved to resume a run.)
        torch.manual_seed(seed)
        offset = torch.rand(()).item()

        # Forward. In the paper the style is the photo itself ("implicit training"): nothing but the wish to
        # restore the photo teaches the style encoder what to put into z.
        # Conversions of color and losses are computed in float32, outside of autocast.
        seen = rgb_to_network(style, s.space)                                   # (B, 3 or 2, S, S)
        with self.autocast:
            z = model.encode_style(seen) if s.use_style else None               # (B, D)
            out = model.colorize(gray, z).float()                               # (B, 3 or 2, S, S)
        color, _ = color_loss(out, gray, rgb, s.space, self.loss_weights, self.lpips, offset)
        losses = {"train_loss": color}

        # Ours: half of the batch again, in the colors of the next picture. There is no truth to compare with;
        # but one thing should keep one color, and the palette should be the next picture's.
        if s.pair:
            half = (len(gray) + 1) // 2
            with self.autocast:
                other = model.colorize(gray[:half], z.roll(-1, 0)[:half]).float()  # (B/2, 3 or 2, S, S)
            ab = network_to_lab(other, gray[:half], s.space)[:, 1:]             # (B/2, 2, S, S)
            pair = pair_loss(ab, rgb_to_lab(rgb[:half]))
            # (Half the weight for half of the batch. `color` has the palette loss in own colors already.)
            palette = palette_loss(other, style.roll(-1, 0)[:half], s.space, offset) / 2
            losses |= {"train_loss": color + s.pair * pair + s.palette * palette, "pair_loss": pair}

        # Section 3.2: a loss on the codes. Solution 1 adds both losses, solution 2 gives each an optimizer.
        if s.style_loss != "none":
            on_codes = style_loss(model, gray, z, out)
            total = s.alpha * color + (1 - s.alpha) * on_codes if s.style_loss == "combined" else color
            losses |= {"train_loss": total, "color_loss": color, "style_loss": on_codes}
        return losses


def train_step(model, recipe, optimizer, lr, batches, seeds, processes, minimized="train_loss"):
    """One step of an optimizer on one or more batches (--accumulate) -> the means of the losses, as numbers.

    lr: the learning rate; batches: (gray, rgb, style) as Recipe.prepare gives them; seeds: one for each;
    processes: averages the gradients of several GPUs, does nothing for one; minimized: the name of the loss
    that the step lowers, of those that Recipe.losses returns.
    """
    # Forward and backward. backward() adds to the gradients that are there: after the last batch they hold
    # the mean over the batches, as each loss was divided by their number. Then the mean over processes.
    optimizer.zero_grad()
    values = []
    for batch, seed in zip(batches, seeds):
        losses = recipe.losses(model, batch, seed)
        (losses[minimized] / len(batches)).backward()
        # item() waits for the GPU: so only here, after backward().
        values.append({name: loss.item() for name, loss in losses.items()})
    processes.average([p.grad for p in model.parameters() if p.grad is not None])

    # Clip. A gradient longer than --clip is shortened: one strange batch cannot throw the weights far off.
    if recipe.s.clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.s.clip)

    # Step: Adam moves every weight against its gradient, by about lr.
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    return means(values)


def learning_rate(s, step, progress):
    """The learning rate at a step. progress: share of the whole run that is done, in [0, 1].

    Adam's first steps rest on averages over few gradients, so a high rate is reached gradually. A rate that
    falls to 0 at the end lets the weights settle.
    """
    # Warm-up: it rises over the first steps, or over the first tenth of a short run.
    rise = min(1, max((step + 1) / (s.warmup + 1), 10 * progress))
    # Cosine: it falls from 1 to 0, slowly at both ends.
    fall = (1 + math.cos(math.pi * progress)) / 2 if s.schedule == "cosine" else 1
    return s.lr * rise * fall


@torch.no_grad()
def validate(model, recipe, batches):
    """Measures over the validation set, as a dictionary of means.

    loss, mse, lpips, palette, psnr: each photo with its own colors. transfer: palette transfer with another
    picture's colors instead (losses.py). listens: how much those other colors change the output's palette, as
    a share of how much the palettes of the two photos differ; 0 for a network that ignores the style. spread:
    deviation of the style codes over pictures, mean over dimensions; near 0, all pictures have the same code.
    """
    s, measures, codes, distances = recipe.s, [], [], torch.zeros(4, device=recipe.device)
    model.eval()  # no dropout; BatchNorm with its running statistics
    for batch in batches:
        # Every photo in its own colors: here there is a truth, the photo. (Without autocast, and with fixed
        # directions of the palette loss: so all validations compare.)
        gray, rgb, _ = recipe.prepare(batch)
        z = model.encode_style(rgb_to_network(rgb, s.space)) if s.use_style else None  # (B, D)
        out = model.colorize(gray, z)                                           # (B, 3 or 2, S, S)
        loss, terms = color_loss(out, gray, rgb, s.space, recipe.loss_weights, recipe.lpips)
        shown = network_to_rgb(out, gray, s.space).clamp(0, 1)                  # (B, 3, S, S)
        terms |= {"loss": loss, "psnr": psnr(shown, rgb).mean()}
        # The means of the batch, once for each of its pictures: so the mean over all pictures is right, also
        # if the last batch is smaller than the others.
        measures += [{name: value.item() for name, value in terms.items()}] * len(gray)
        # Does it listen? Every photo once more, with the code of the one before it in the batch (of a single
        # photo: with its own). No truth exists for this; so palettes are compared.
        if s.use_style:
            other = network_to_rgb(model.colorize(gray, z.roll(1, 0)), gray, s.space).clamp(0, 1)
            missed, from_gray = palette_distances(other, rgb.roll(1, 0))        # (B,), (B,)
            ab, ab_other, true = (rgb_to_lab(x)[:, 1:] for x in (shown, other, rgb))    # (B, 2, S, S) each
            changed = sliced_wasserstein(ab, ab_other, 32)                      # (B,)
            differ = sliced_wasserstein(true, true.roll(1, 0), 32)              # (B,)
            distances += torch.stack([missed, from_gray, changed, differ]).sum(1)   # (4,)
            codes.append(z)
    model.train()
    result = means(measures)
    if s.use_style:
        # Quotients of sums, and not means of quotients: a photo with hardly any color would have a wild one.
        missed, from_gray, changed, differ = distances.tolist()
        result["transfer"], result["listens"] = 1 - missed / max(from_gray, 1e-6), changed / max(differ, 1e-6)
        result["spread"] = torch.cat(codes).std(0, correction=0).mean().item()
    return result


# ---- the loop ---------------------------------------------------------------------------------------------

def build(run, device):
    """The network, its weights new or from a checkpoint, and its optimizers, new. Raises UserError.

    --init takes the weights of a checkpoint and nothing else of it; for --resume, Run.restore takes the rest.
    """
    s, saved = run.s, run.saved
    torch.manual_seed(s.seed)  # seeds the initial weights
    # Settings inherits the network's settings from ModelConfig; only those describe the network, and only
    # those go into the checkpoint's "model", from which infer.py builds it again.
    model = Colorizer(ModelConfig(**{f.name: getattr(s, f.name) for f in fields(ModelConfig)})).to(device)
    initial = saved or (load_checkpoint(s.init) if s.init else None)
    if initial:
        # Dropout and padding have no weights: they may differ.
        needed = [as_option(name, value) for name, value in initial["model"].items()
                  if name not in ("dropout", "padding") and value != getattr(s, name)]
        if needed:
            raise UserError(f"holds another network; add {' '.join(needed)}", run.folder if saved else s.init)
        model.load_state_dict(initial["weights"])
    # Section 3.2, solution 2: the second optimizer is for the style loss; `loop` gives it a tenth of the
    # rate. Weights that the style loss does not reach have no gradient, and it leaves them alone.
    optimizers = [torch.optim.AdamW(model.parameters(), lr=s.lr, weight_decay=s.weight_decay)
                  for _ in range(2 if s.style_loss == "dual" else 1)]
    return model.train(), optimizers


def train(preset, given, resume, dry_run):
    """All that the loop needs: data, networks, where to go on; then the loop. Returns the exit code.

    The order matters: what is quick to check and often wrong comes before what is slow, and nothing is
    written before everything is known to be right. run: the folder, the log, the counters (class Run, below);
    processes: means over several GPUs (class Processes); with one process its calls change nothing.
    """
    run = Run(preset, given, resume, dry_run)
    s, device = run.s, pick_device(run.s.device)
    no_bf16 = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if s.amp and (device.type == "mps" or no_bf16):
        raise UserError(f"--amp: this {device.type} device has no reliable bfloat16; leave it off")
    # Samples must not lie among the photos. (A run that goes on with the same --data has been checked.)
    places = photo_folders(s.data) if os.path.isdir(s.data) else []
    checked = run.saved and s.data == run.saved["settings"].get("data")
    if not checked and any(run.folder.resolve().is_relative_to(place.resolve()) for place in places):
        raise UserError("lies in --data: its samples would become photos; take another --output", run.folder)
    processes = Processes(device)
    model, optimizers = build(run, device)
    if run.saved:
        run.restore(preset, optimizers)

    # Data, and the trunk of LPIPS. The first process goes first and downloads what is missing; the others
    # wait here, until it has come to its own barrier(), and find everything ready.
    if processes.rank:
        dist.barrier()
    training, validation = find_data(s.data, s.train_size, s.val_size, s.seed)
    recipe = Recipe(s, device)
    if processes.world > 1 and not processes.rank:
        dist.barrier()

    run.plan(len(training), s.accumulate * processes.world)
    print(f"{run.preset}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(training)} training"
          f" and {len(validation)} validation pictures, {device}, from step {run.step}")
    if run.progress() >= 1:
        if not processes.rank and run.found:  # killed in its last report, a run lacks a row in log.csv
            run.lock()
            run.write_log()
        name = "minutes" if run.seconds >= 60 * s.minutes > 0 else "steps" if s.steps else "epochs"
        print(f"nothing to do: this run has had its {run.step} steps in {run.seconds / 60:.1f} minutes; give "
              f"it more with --{name} (now {getattr(s, name):g})")
        return 0

    # Endless training batches, every process taking its own.
    photos = Photos(training, s.size, s.seed, True, s.style_from)
    order = batch_order(len(photos), s.batch_size, s.seed, start=run.step * run.passes + processes.rank,
                    every=processes.world)

    # From here on Ctrl-C is answered, and the folder is ours. --workers processes load and crop the next
    # batches while the main process computes.
    stop = listen_for_stop()
    if not processes.rank:
        run.lock()  # a folder that cannot be written shows now, and not after an hour
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: only slower
    loading = dict(num_workers=s.workers, worker_init_fn=ignore_signals, pin_memory=device.type == "cuda")
    loader = iter(Loader(photos, batch_sampler=order, **loading))
    # (Always 16: the foreign styles come from the same batch, and other batches would be other pairs.)
    val_loader = Loader(Photos(validation, s.size, s.seed, False), batch_size=16,
                        sampler=[(0, i) for i in range(len(validation))], **loading)  # (epoch, index)
    return loop(run, model, recipe, optimizers, loader, val_loader, processes, stop)


def loop(run, model, recipe, optimizers, loader, val_loader, processes, stop):
    """Step after step, until the run has had its steps or its minutes, or until somebody stops it.

    stop: a list that a signal makes non-empty. Returns the exit code.
    """
    s, passes = run.s, run.passes
    # Seconds: a run of --minutes is validated about ten times.
    tenth = 60 * s.minutes / 10 if s.minutes else math.inf
    next_validation = run.seconds + tenth
    while (progress := run.progress()) < 1:
        # Load.
        batches = [recipe.prepare(next(loader)) for _ in range(s.accumulate)]   # gray, rgb, style each

        # Learn. Every batch of every process has a number, the same as in batch_order. Its seed: --seed above
        # the lowest 32 bits, this number in them. (The CPU's generator takes these 32 alone: there the n-th
        # batch has the same dropout under every --seed.)
        lr = learning_rate(s, run.step, progress)
        first = (s.seed << 32) + run.step * passes + processes.rank
        seeds = range(first, first + passes, processes.world)
        values = train_step(model, recipe, optimizers[0], lr, batches, seeds, processes)
        # Section 3.2, solution 2: a second step, for the style loss alone, at a tenth of the rate. (It
        # computes all losses again, with the new weights.)
        if s.style_loss == "dual":
            train_step(model, recipe, optimizers[1], lr / 10, batches, seeds, processes, "style_loss")
        run.step += 1

        # Look at the losses. All processes look at the same numbers, so all go the same way from here.
        *numbers, told, run.seconds = processes.mean([*values.values(), bool(stop), run.clock()])
        run.require_finite("the loss", numbers)
        run.recent.append(dict(zip(values, numbers)))
        # told: the share of processes that got a signal; one is enough. After the last step there is nothing
        # to stop.
        stopping = told > 0 and run.progress() < 1

        # Validate and save: every --val-every steps, every tenth of --minutes, and at the end. When stopped
        # in between, all of it but the validation, which is slow: somebody waits.
        due = run.step % s.val_every == 0 or run.seconds >= next_validation or run.progress() >= 1
        if due or stopping:
            now = report(run, model, recipe, optimizers, val_loader, processes, validating=due)
            # The next one comes after a tenth of the run or five times what this one took, whichever is more.
            next_validation = now + max(tenth, 5 * (now - run.seconds))
            run.seconds, run.recent, run.printed = now, [], (time.monotonic(), run.step)
        else:
            run.print_progress(recipe.device)
        if stopping:
            print(f"stopped at step {run.step}; --output {printable(run.folder)} --resume goes on from here")
            return 130
    best = printable(run.folder / "best.pt")
    print(f"done: {best}, as in  python infer.py PHOTO STYLE --weights {best}" if s.use_style else
          f"done: {best}; infer.py cannot use it, as it follows no style; look at the run's samples/")
    return 0


def report(run, model, recipe, optimizers, val_loader, processes, validating):
    """Validate, unless not validating; write the checkpoints, the log and a sheet of samples.

    best.pt is written first: if the run is killed between the two, last.pt must not remember a lowest loss
    whose best.pt was never written. Only the first process does this; the others wait. Returns the mean of
    their clocks after it.
    """
    processes.average([b for b in model.buffers() if b.is_floating_point()])  # BatchNorm's statistics
    if not processes.rank:
        result = validate(model, recipe, val_loader) if validating else {}
        # Check first: a network that has diverged must not overwrite good checkpoints.
        run.require_finite("the validation loss", result.values())
        run.require_finite("a weight", [w.float().abs().max() for w in model.state_dict().values()])
        run.add_row(optimizers[0].param_groups[0]["lr"], result)
        # best.pt has the lowest validation loss; without any validation so far, the first one is the best.
        if result.get("loss", math.inf) < run.best or not (run.folder / "best.pt").exists():
            run.best = result.get("loss", math.inf)
            run.save("best.pt", model, optimizers)
        run.save("last.pt", model, optimizers)
        # Numbers do not show whether the colors lie on the right things: look at the sheet.
        model.eval()
        page = sample(model, val_loader.dataset, run.s)
        model.train()
        save_atomically(run.folder / f"samples/{run.step:07d}.png", page.save)
        run.write_log()  # last, as it prints: that fails when the terminal has been closed
    if processes.world > 1:
        dist.barrier()  # the others wait here, and read their clocks after it
    run.kept = run.step
    return processes.mean([run.clock()])[0]


def sample(model, photos, s):
    """A sheet as in figure 8: some validation photos in their own colors and in those of others.

    Always the same pictures, so that the sheets of a run can be compared.
    """
    def code(picture):
        return encode(model, resize_short_side(picture, s.size)) if s.use_style else None  # (1, D)

    pictures = [photos.load(i) for i in range(min(8, len(photos)))]
    styles = pictures[4:] if s.use_style else []
    others, rows = [code(style) for style in styles], [[None, None, *styles]]
    for photo in (crop_square(picture, s.size) for picture in pictures[:4]):
        gray = gray_of(to_batch(photo))                                         # (1, 1, S, S)
        colored = [join(photo, predict(model, gray, z)) for z in [code(photo), *others]]
        rows.append([gray_version(photo), *colored])
    return sheet(rows, s.size)


# ---- a run and its folder ---------------------------------------------------------------------------------

class Run:
    """A run: its folder and settings, how far it has come, its log.

    folder, preset   where it is, and the name of its preset
    s                its settings
    step, seconds    how far it is, earlier sessions counted
    best             the lowest validation loss so far
    rows             those of log.csv, as dictionaries
    history          what its settings were before they were changed
    saved, source    the checkpoint that it goes on from, and its file; None for a new run
    recent           losses of the steps since the last row
    printed          when the last line was printed, and at which step
    found            when the last.pt in its folder was written, as it was found at the start
    kept             the step of last.pt, or 0
    passes, per_step, limit  forward passes and pictures in a step, steps of the whole run (plan sets them)
    """

    def __init__(self, preset, given, resume, dry_run):
        # preset and given: as parse() found them on the command line.
        self.folder = Path(given.get("output") or f"runs/{preset or 'final'}", "dry-run" if dry_run else "")
        self.preset, self.step, self.seconds, self.best = preset or "final", 0, 0., math.inf
        self.rows, self.history, self.recent, self.saved, self.source = [], [], [], None, None
        self.found, self.kept = self.last_saved(), 0
        # Any of these files means that a run was here, even if last.pt is lost: to start anew would overwrite
        # best.pt.
        there = [name for name in ("last.pt", "best.pt", "log.csv") if (self.folder / name).exists()]
        if there and not dry_run:
            if not resume:
                raise UserError("already holds a run: add --resume, or choose another --output", self.folder)
            # best.pt alone: killed between its first two checkpoints, which hold the same.
            self.source = self.folder / ("best.pt" if there == ["best.pt"] else "last.pt")
            self.saved = load_checkpoint(self.source)
        elif resume:
            print(f"{printable(self.folder)}: nothing to resume here; a new run begins", file=sys.stderr)
        # Later ones win: the defaults, then the preset or the settings in last.pt, then the command line. So
        # --resume needs no options, and those that are typed change the run from here on.
        try:
            before = vars(Settings.from_file(self.saved["settings"])) if self.saved else PRESETS[self.preset]
            self.s = Settings(**{**before, **given}).check()
        except ValueError as error:  # in the file; or the given ones do not go together with those of the run
            cure = "; or a new run with --init last.pt" if self.saved else ""
            raise UserError(f"cannot go on: {error}{cure}", self.folder) from None
        if dry_run:  # one step and one validation batch
            self.s.steps, self.s.val_size = 1, min(self.s.val_size or 16, 16)

    def last_saved(self):
        """When last.pt was written, in nanoseconds; None if there is none."""
        last = self.folder / "last.pt"
        return last.stat().st_mtime_ns if last.exists() else None

    def restore(self, preset, optimizers):
        """Go back to where the checkpoint ends. Raises UserError for no run of ours or another preset."""
        saved = self.saved
        try:
            # The network and the settings have been checked (load_checkpoint, __init__); here is the rest. An
            # assert that fails means a damaged file; `except` turns it into one line.
            self.preset, self.step, self.seconds = saved["preset"], saved["step"], saved["seconds"]
            self.best, self.rows, self.history = saved["best"], list(saved["log"]), list(saved["history"])
            numbers = [self.step, self.seconds, *(n for row in self.rows for n in row.values())]
            assert all(type(n) in (int, float) and math.isfinite(n) for n in numbers)
            assert self.rows and all(row.keys() >= {"step", "pictures"} for row in self.rows)
            assert self.preset in PRESETS and type(self.best) is float and not math.isnan(self.best)
            assert type(self.step) is int and 0 < self.step < 2 ** 31
            self.kept = self.step
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                # Only Adam's averages are taken from the file; rates and the like are those of the settings.
                optimizer.load_state_dict(optimizer.state_dict() | {"state": state["state"]})
                for p, of_p in optimizer.state.items():
                    shapes = {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
                    assert {k: v.shape for k, v in of_p.items()} == shapes
                    assert all(v.layout == torch.strided and v.isfinite().all() for v in of_p.values())
        except Exception:  # a file may hold anything
            raise UserError("no run of ours, or damaged; use it as the --init of a new run",
                            self.source) from None
        if preset not in (None, self.preset):
            raise UserError(f"a run of --preset {self.preset}, not {preset}; choose another --output",
                            self.source)
        old, new = saved["settings"], vars(self.s)
        if new["init"] not in ("", old.get("init", "")):
            raise UserError("has begun already; --init is for a new run, in another --output", self.folder)
        changed = [name for name in old if name in new and new[name] != old[name] and name != "output"]
        # The lowest validation loss so far does not compare with those of another loss, or of other photos.
        if {"mse", "lpips", "lpips_net", "palette", "size", "data", "val_size", "seed"} & set(changed):
            self.best = math.inf
        if changed:  # it is another run from here on; say so, and keep a note of it in the checkpoints
            changes = ", ".join(f"{name} {old[name]!r:.200} -> {new[name]!r:.200}" for name in changed)
            print(f"other settings from step {self.step} on: {changes}", file=sys.stderr)
            self.history.append({"until step": self.step, "settings": old})

    def lock(self):
        """Refuse a folder in which another run is at work. The lock ends with this process, in any case.

        (A file that merely exists would stay behind after a power cut, and lock the run out for ever.)
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock_file = open(self.folder / ".lock", "w")
        try:
            # lockf and not flock: the loaders, copies of this process, do not inherit it and cannot keep it.
            if hasattr(os, "lockf"):  # Windows has none, and so no lock
                os.lockf(self.lock_file.fileno(), os.F_TLOCK, 0)
        except (BlockingIOError, PermissionError):
            raise UserError("another train.py is at work here; use another --output", self.folder) from None
        except OSError:  # nor have some file systems of clusters
            pass
        # Another one may have trained here, and ended, while this one read its data.
        if self.last_saved() != self.found:
            raise UserError("another train.py was at work here until now; run again", self.folder)
        for part in [*self.folder.glob(".part-*"), *self.folder.glob("samples/.part-*")]:
            part.unlink()  # what a killed run was writing

    def plan(self, pictures, passes):
        """Start the clock, and set how long the run is. Refuse to go on with other batches.

        pictures: the size of the training set; passes: batches that a step takes.
        """
        # The clock goes on where it was when the run stopped. What was done until now, as a download, does
        # not count.
        self.started, self.printed = time.monotonic() - self.seconds, (time.monotonic(), self.step)
        s, self.passes, self.per_step = self.s, passes, self.s.batch_size * passes
        # --minutes without --steps has no limit but the clock; with both, what is reached first ends the run.
        self.limit = s.steps or (sys.maxsize if s.minutes else math.ceil(s.epochs * pictures / self.per_step))
        # The place in the data is step x pictures a step: so a resumed run must keep that number.
        if self.rows and self.rows[-1]["pictures"] != self.step * self.per_step:
            had = self.rows[-1]["pictures"] // self.step
            raise UserError(f"its steps are of {had} pictures, not {self.per_step}: --batch-size x "
                            "--accumulate x processes must stay the same", self.folder)

    def clock(self):
        """Seconds that the run has taken, earlier sessions counted."""
        return time.monotonic() - self.started

    def progress(self):
        """Share of the run that is done, by steps or by time, whichever is more."""
        return max(self.step / self.limit, self.seconds / (60 * self.s.minutes) if self.s.minutes else 0)

    def print_progress(self, device):
        """Once a minute, on a terminal once a second, say how it goes.

        A single batch's loss jumps up and down by a third, so the mean since the last row is shown.
        """
        now, (then, step), terminal = time.monotonic(), self.printed, sys.stdout.isatty()
        if now - then < (1 if terminal else 60):
            return
        left = self.seconds * (1 / self.progress() - 1) / 60  # minutes, if it goes on as it went
        peak = f"  {torch.cuda.max_memory_allocated() / 1e6:.0f} MB" if device.type == "cuda" else ""
        print(f"\rstep {self.step}  loss {means(self.recent)['train_loss']:.4f}  "
              f"{(self.step - step) * self.per_step / (now - then):.1f} images/s  {left:.1f} min left{peak} ",
              end="" if terminal else "\n", flush=True)
        self.printed = now, self.step

    def add_row(self, lr, result):
        """A row for log.csv: means of the losses since the last row, and the validation."""
        self.rows.append({"step": self.step, "pictures": self.step * self.per_step,
                          "seconds": round(self.seconds, 1), "lr": lr, **means(self.recent),
                          **{f"val_{name}": value for name, value in result.items()}})

    def write_log(self):
        """Write log.csv, draw loss.png, and print the losses and measures of the last row.

        The whole file is written each time: it is small, and its columns may change with the settings.
        """
        text = io.StringIO()
        # The columns: every name once, in the order in which they appear.
        table = csv.DictWriter(text, dict.fromkeys(name for row in self.rows for name in row))
        table.writeheader()
        table.writerows(self.rows)
        try:
            save_atomically(self.folder / "log.csv", lambda part: part.write_bytes(text.getvalue().encode()))
        except UserError as error:  # on Windows a spreadsheet that shows it keeps it from being replaced
            print(error, file=sys.stderr)
        colors = dict(train_loss="steelblue", val_loss="darkorange", color_loss="green", style_loss="red")
        save_atomically(self.folder / "loss.png", draw_curves(self.rows, colors).save)
        numbers = "  ".join(f"{k} {v:.4f}" for k, v in self.rows[-1].items() if "loss" in k or "val_" in k)
        if sys.stdout.isatty():
            print()  # leave the line of progress
        print(f"step {self.step}: {numbers}", flush=True)

    def save(self, name, model, optimizers):
        """Write a checkpoint: all that --resume needs. (report has made sure that its weights are finite.)

        The step stands for the random numbers and for the place in the data. Only the weights and Adam's
        averages cannot be computed again.
        """
        # "format", "model", "settings" and "weights" are what infer.py reads; the rest is for --resume. The
        # weights include BatchNorm's running statistics. Adam keeps two averages for each weight, so the file
        # is three times as large as the network.
        # Into memory first: then a full disk gives a clear OSError.
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, "preset": self.preset, "model": asdict(model.config), "step": self.step,
                    "settings": asdict(self.s), "seconds": self.clock(), "best": self.best, "log": self.rows,
                    "history": self.history, "weights": model.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, buffer)
        save_atomically(self.folder / name, lambda part: part.write_bytes(buffer.getbuffer()))

    def require_finite(self, what, numbers):
        """Raise UserError if one of the numbers is nan or inf: the training has diverged."""
        if not all(map(math.isfinite, numbers)):
            kept = f"last.pt of step {self.kept} is kept" if self.kept else "nothing was saved"
            raise UserError(f"{what} became nan or inf at step {self.step}: try a lower --lr (now "
                            f"{self.s.lr:g}) or --clip 1{', and no --amp' if self.s.amp else ''}; {kept}")


# ---- several processes, and signals -----------------------------------------------------------------------

class Processes:
    """The processes that torchrun has started. Without it there is one, and all of this does nothing.

    Each has a copy of the network and its own part of every batch. After backward() the gradients are
    averaged; so all take the same step, and the copies stay equal. Two processes with batch 8 learn what one
    learns with batch 8 and --accumulate 2 (but BatchNorm's running statistics take half as many steps).
    rank: the number of this process; world: how many there are.
    """

    def __init__(self, device):
        self.rank, self.world = 0, 1
        if not dist.is_torchelastic_launched():
            return
        if device.type == "cuda":
            card, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if card >= cards:
                raise UserError(f"{cards} GPUs for more processes: lower --nproc_per_node")
            torch.cuda.set_device(card)
        if device.type == "mps":
            raise UserError("several processes cannot share an Apple GPU; use one, without torchrun")
        # gloo for tensors on the CPU, nccl for those on a GPU. The others wait while the first one validates,
        # for 30 minutes at most: torch's default.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if self.rank:
            sys.stdout = open(os.devnull, "w")  # all do the same; the first one tells, validates and writes

    def average(self, tensors):
        """Give each tensor, in place, its mean over all processes.

        (DistributedDataParallel is faster, but expects one forward pass a step; the pair loss takes two.)
        """
        if self.world > 1:
            for t in tensors:
                dist.all_reduce(t)  # the sum
                t /= self.world

    def mean(self, numbers):
        """The mean of each number over all processes, the same for all of them: so they decide alike.

        If one stopped a step earlier, the others would wait for its gradients until the time limit.
        """
        shared = torch.tensor(numbers)
        self.average([shared])
        return shared.tolist()


# Those that this system has: Windows has no SIGHUP.
STOP_SIGNALS = [number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP")]


def listen_for_stop():
    """A list that Ctrl-C and similar signals fill; `loop` looks at it after each step.

    So a signal during a validation waits for its end and one more step. A second signal ends at once.
    Ctrl-C sends SIGINT, `kill` and a machine that shuts down SIGTERM, a closed terminal SIGHUP. An exception
    in the middle of a step, which is what Python makes of Ctrl-C, would lose all since the last checkpoint.
    """
    stop = []

    def on_signal(number, _):
        # (Not under torchrun, which passes on the Ctrl-C that its processes have got already.)
        if stop and not dist.is_initialized():
            sys.exit(130)
        stop.append(number)

    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup wants us to live on
            signal.signal(number, on_signal)
    return stop


def ignore_signals(_):
    """In a loading process: signals often go to the whole group; the main process alone answers them."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Loader(DataLoader):
    """A DataLoader whose processes ignore signals from their first moment on.

    ignore_signals alone comes late: torch first lets SIGTERM end the process, and the run would end with it.
    A process inherits which signals are blocked, so they are blocked while the processes start. (Where it is
    not forked, as on macOS, Python unblocks them once; there --workers is 0 unless it is given.)
    """
    def __iter__(self):
        if not hasattr(signal, "pthread_sigmask"):  # Windows, where no SIGTERM goes to a group
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def main(argv=None):
    """Parse, train, and say in one line what went wrong with processes. (data.run_program says the rest.)"""
    try:
        code = train(*parse(argv))
    except (RuntimeError, EOFError, ConnectionResetError, ConnectionRefusedError) as error:
        # Batches come through sockets: a loading process that ends while it sends one raises one of the last
        # three types. A RuntimeError can be anything; mostly only its text says where it comes from.
        if "DataLoader worker" in str(error) or not isinstance(error, RuntimeError):
            raise UserError("a loading process was ended, or memory ran out: use fewer --workers (0 is none)"
                            "; --resume goes on from the last checkpoint") from None
        if dist.is_initialized() and (isinstance(error, dist.DistBackendError) or "gloo" in str(error)):
            if dist.get_rank():
                sys.exit(1)  # the first process says it
            raise UserError("another process has ended, or has not answered for 30 minutes") from None
        raise
    finally:
        # Kill the loading processes, which only read. Python would send SIGTERM, which they ignore, and wait
        # for ever. (torch's handler of SIGCHLD would raise for each of them.)
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for loader in multiprocessing.active_children():
            loader.kill()
    if dist.is_initialized():
        # All exit together: torchrun kills the others when one exits with 130. And a process that exits right
        # after its last average may crash, because gloo's threads still use its tensors.
        dist.barrier()
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    run_program(main)
