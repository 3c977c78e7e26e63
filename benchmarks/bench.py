"""How fast and how large.

    pip install --no-deps lpips==0.1.4
    python benchmarks/bench.py lpips        ours against the package lpips 0.1.4, the same random trunk weights
    python benchmarks/bench.py adain        one AdaIN layer, forward and backward, against equation (1) as it is written
    python benchmarks/bench.py step         a training step against a plain one
    python benchmarks/bench.py profile      where a training step spends its time
    python benchmarks/bench.py gpu          peak memory of training steps on a CUDA card, with a limit
    python benchmarks/bench.py infer        infer.py on photos of 0.3 to 48 megapixels, and on a folder of 100

Candidates run in turn in one process, A B A B ..., because a machine is not equally fast all the time; what
counts is the ratio. Peak memory is that of a separate process. --threads N is torch's number of threads (1).
"""
import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import torch

TOP = Path(__file__).parents[1]
sys.path[:0] = [str(TOP), str(Path(__file__).parent)]
from adain import AdaIN  # noqa: E402
from data import UserError, draw_scene, gray_of, rgb_to_network, run_program  # noqa: E402
from losses import LPIPS, color_loss  # noqa: E402
from make_lpips_fixture import original_package, seeded_trunk  # noqa: E402
from model import Colorizer, ModelConfig  # noqa: E402

SIZE, BATCH = 128, 16


def in_turn(candidates, rounds):
    """{name: function} -> {name: median seconds}, and the median ratio of the first's time to each."""
    for call in candidates.values():
        call()
    times = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    first = next(iter(times.values()))
    return {name: (statistics.median(t), statistics.median(a / b for a, b in zip(first, t)))
            for name, t in times.items()}


def peak(*arguments):
    """Peak memory in MB, and seconds, of a Python process of its own."""
    # A process inherits the peak of the one that starts it; so a small one stands between.
    small = ("import os, subprocess, sys; p = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL); "
             "_, status, usage = os.wait4(p.pid, 0); print(usage.ru_maxrss); sys.exit(status != 0)")
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-S", "-c", small, sys.executable, *map(str, arguments)],
                          capture_output=True, text=True, check=True)
    return int(done.stdout) / (1e6 if sys.platform == "darwin" else 1e3), time.perf_counter() - start


# ---- LPIPS ------------------------------------------------------------------------------------------------

def distance(net, which):
    """A function that computes distance and gradient for a batch."""
    torch.manual_seed(0)
    x, y = torch.rand(2, BATCH, 3, SIZE, SIZE)
    if which == "package":
        model = original_package(seeded_trunk).LPIPS(net=net, verbose=False)
    else:
        model = LPIPS(net, seeded_trunk(net)).to(memory_format=torch.channels_last)

    def call():
        z = x.clone().requires_grad_()
        d = model(z, y, normalize=True) if which == "package" else model(z, y)
        d.sum().backward()
        return d.flatten().detach(), z.grad
    return call


def bench_lpips(args):
    print("| trunk | | seconds | times as fast | peak MB |\n|---|---|---|---|---|")
    for net in ("alex", "vgg"):
        candidates = {which: distance(net, which) for which in ("package", "ours")}
        (d, g), (e, h) = (c() for c in candidates.values())
        # The gradients need not be equal everywhere: where a max-pooling has a tie, either pixel may get it.
        assert torch.allclose(d, e, rtol=1e-4) and (g - h).norm() < .01 * g.norm()
        for which, (seconds, ratio) in in_turn(candidates, args.rounds).items():
            mb, _ = peak(__file__, "one", "--net", net, "--which", which)
            print(f"| {net} | {which} | {seconds:.3f} | {ratio:.2f} | {mb:.0f} |", flush=True)


class PlainAdaIN(AdaIN):
    """Equation (1) written out, one operation after the other."""

    def forward(self, x, z):
        scale, shift = self.affine(z)[:, :, None, None].chunk(2, dim=1)
        var, mu = torch.var_mean(x, dim=(2, 3), correction=0, keepdim=True)
        return scale * (x - mu) / torch.sqrt(var + self.eps) + shift


def bench_adain(args):
    print("| features | | milliseconds | times as fast |\n|---|---|---|---|")
    for shape in [(BATCH, 16, 128, 128), (BATCH, 64, 32, 32)]:
        torch.manual_seed(0)
        x, g, z = torch.randn(shape), torch.randn(shape), torch.randn(BATCH, 32)

        def calls(layer):
            return lambda: layer(x.clone().requires_grad_(), z).backward(g)
        candidates = {"written out": calls(PlainAdaIN(shape[1], 32)), "ours": calls(AdaIN(shape[1], 32))}
        for which, (seconds, ratio) in in_turn(candidates, 4 * args.rounds).items():
            print(f"| {'x'.join(map(str, shape))} | {which} | {1e3 * seconds:.1f} | {ratio:.2f} |", flush=True)


# ---- a training step --------------------------------------------------------------------------------------

def training_step(which, net="alex"):
    """Forward, loss, backward and Adam of the paper's final model.

    plain: with equation (1) written out and the LPIPS of the package.
    """
    torch.manual_seed(0)
    rgb = torch.rand(BATCH, 3, SIZE, SIZE)
    model = Colorizer(ModelConfig()).train()
    if which == "plain":
        for layer in model.adain:
            layer.__class__ = PlainAdaIN
        package = original_package(seeded_trunk).LPIPS(net=net, verbose=False)

        def lpips(a, b):
            return package(a, b, normalize=True)
    else:
        lpips = LPIPS(net, seeded_trunk(net)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def call():
        gray = gray_of(rgb)
        out = model(gray, rgb_to_network(rgb, "rgb"))
        loss, _ = color_loss(out, gray, rgb, "rgb", {"mse": 1, "lpips": 1, "palette": 0}, lpips)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return call


def bench_step(args):
    print("| step | seconds | times as fast |\n|---|---|---|")
    candidates = {which: training_step(which) for which in ("plain", "ours")}
    for which, (seconds, ratio) in in_turn(candidates, args.rounds).items():
        print(f"| {which} | {seconds:.3f} | {ratio:.2f} |", flush=True)


def bench_profile(args):
    call = training_step("ours")
    call()
    with torch.profiler.profile(record_shapes=args.shapes) as profile:
        for _ in range(args.rounds):
            call()
    table = profile.key_averages(group_by_input_shape=args.shapes)
    print(table.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40,
                      max_shapes_column_width=70))


def train_three_steps(s, device):
    """Three steps of training on a random picture -> the optimizers. (Adam's averages come with the first step.)"""
    import train  # here, and not above: the peaks that bench_lpips measures are of a process without it
    recipe, processes = train.Recipe(s, device), train.Processes(device)
    model, optimizers = train.build(types.SimpleNamespace(s=s, saved=None), device)
    picture = torch.randint(256, (s.batch_size, 3, s.size, s.size), dtype=torch.uint8)
    for k in range(3):
        batches = [recipe.prepare((picture, picture))]
        for optimizer, minimized in zip(optimizers, ("train_loss", "style_loss")):
            train.train_step(model, recipe, optimizer, s.lr, batches, [k], processes, minimized)
    return optimizers


def bench_gpu(args):
    """Peak memory of train_step on a CUDA card, which may take no more than --limit GB of it.

    The limit binds what torch takes; the driver's own part, a few hundred MB, comes on top. The trunk's weights are
    random: they need as much memory as the real ones.
    """
    import train
    if not torch.cuda.is_available():
        raise UserError("gpu needs a CUDA card")
    device = train.pick_device("cuda")
    torch.cuda.set_per_process_memory_fraction(min(1, args.limit * 1e9 / torch.cuda.get_device_properties(0).total_memory))
    print("| preset | size | batch | LPIPS trunk | --amp | in use by tensors, MB | reserved by torch, MB |\n"
          + "|---" * 7 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for net in ("alex", "vgg"):
            torch.save(seeded_trunk(net).state_dict(), f"{folder}/{net}.pth")
        for preset, size, batch, net, amp in [
                ("final", 128, 16, "vgg", False), ("final", 128, 16, "vgg", True), ("final", 128, 16, "alex", False),
                ("final", 128, 8, "vgg", False), ("final", 256, 16, "vgg", False), ("final", 256, 8, "vgg", False),
                ("ours", 128, 16, "alex", False), ("collapsed", 128, 16, "vgg", False),
                ("dual", 128, 16, "vgg", False), ("unet", 128, 16, "vgg", False)]:
            changed = dict(size=size, batch_size=batch, lpips_net=net, lpips_weights=f"{folder}/{net}.pth", amp=amp)
            s = train.Settings(**{**train.PRESETS[preset], **changed})
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            try:
                train_three_steps(s, device)
                peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
                cells = [f"{n / 1e6:.0f}" for n in peaks]
            except torch.OutOfMemoryError:
                cells = ["does not fit", ""]
            print(f"| {preset} | {size} | {batch} | {net} | {'yes' if amp else 'no'} | {' | '.join(cells)} |", flush=True)


# ---- infer.py ---------------------------------------------------------------------------------------------

def bench_infer(args):
    torch_mb, torch_s = peak("-c", "import torch")
    _, help_s = peak(TOP / "infer.py", "--help")
    print(f"import torch: {torch_mb:.0f} MB, {torch_s:.1f} s; infer.py --help: {help_s - torch_s:.1f} s more\n")
    print("| photo | seconds | peak MB | over import torch | bytes a pixel beyond the decoded photo |\n"
          + "|---" * 5 + "|")
    with tempfile.TemporaryDirectory() as folder:
        def infer(photos, *more):
            return peak(TOP / "infer.py", photos, TOP / "examples" / "style.jpg", "--device", "cpu", "--output",
                        folder + "/out/", *more)
        small = None
        for width, height in [(640, 480), (4000, 3000), (8000, 6000)]:
            path = f"{folder}/{width}.jpg"
            draw_scene(1).resize((width, height)).save(path, quality=90)
            mb, s = infer(path)
            pixels = width * height
            small = small or (mb, pixels)
            grown = (mb - small[0]) * 1e6 / (pixels - small[1]) - 3 if pixels > small[1] else float("nan")
            print(f"| {pixels / 1e6:.1f} MP | {s:.1f} | {mb:.0f} | {mb - torch_mb:.0f} | {grown:.1f} |", flush=True)
        os.mkdir(f"{folder}/many")
        for n in range(100):
            draw_scene(n).resize((640, 480)).save(f"{folder}/many/{n}.jpg")
        for more in ([], ["--refine", "0"]):
            mb, s = infer(f"{folder}/many", *more)
            print(f"| folder of 100 x 0.3 MP {' '.join(more)} | {s:.1f} | {mb:.0f} | {mb - torch_mb:.0f} | |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["lpips", "adain", "step", "profile", "gpu", "infer", "one"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=3.4, help="gpu: GB that torch may take")
    parser.add_argument("--shapes", action="store_true", help="profile: a row for each shape of the inputs")
    parser.add_argument("--net", default="alex", help=argparse.SUPPRESS)
    parser.add_argument("--which", default="ours", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads < 1 or args.rounds < 1:
        parser.error("--threads and --rounds must be 1 or more")
    torch.set_num_threads(args.threads)
    if args.what == "one":  # the process whose memory peak() measures
        call = distance(args.net, args.which)
        for _ in range(3):
            call()
    else:
        globals()["bench_" + args.what](args)


if __name__ == "__main__":
    run_program(main)
