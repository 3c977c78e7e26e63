"""Kill a short training run 25 times at random moments, and compare it with one that nobody touched.

    python benchmarks/survive.py [--kills 25] [--seed 0]

Each session is killed with SIGKILL up to a second and a half after its first checkpoint, so some die while they
write the next one. Every checkpoint that is left must be readable. A half-written file (.part-*) may be left,
and the next session must remove it. In the end weights, optimizer and log must equal the other run's bit for bit.
"""
import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

TOP = Path(__file__).parents[1]
sys.path[:0] = [str(TOP), str(TOP / "tests")]
from data import run_program  # noqa: E402
from test_train import TINY, assert_same, command, saved  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.kills < 1:
        parser.error("--kills must be 1 or more")
    rng, torn, steps = random.Random(args.seed), 0, []
    with tempfile.TemporaryDirectory() as folder:
        killed, whole = Path(folder, "killed"), Path(folder, "whole")
        options = [*TINY, "--val-every", 2, "--dropout", ".2", "--workers", 1]
        for n in range(args.kills):
            before = (killed / "last.pt").stat().st_mtime_ns if n else 0
            process = command(*options, "--steps", 1_000_000, "--output", killed, "--resume")
            while not (killed / "last.pt").exists() or (killed / "last.pt").stat().st_mtime_ns == before:
                assert process.poll() is None, process.communicate()
                time.sleep(.005)
            time.sleep(rng.uniform(0, 1.5))
            process.kill()
            process.wait()
            steps.append(saved(killed)["step"])  # raises if it cannot be read
            torch.load(killed / "best.pt", weights_only=True)
            torn += any(killed.rglob(".part-*"))
            print(f"kill {n + 1}: the checkpoint is of step {steps[-1]}", flush=True)
        end = steps[-1] + 3
        for more in ([killed, "--resume"], [whole]):
            process = command(*options, "--steps", end, "--output", *more)
            process.communicate()
            assert process.returncode == 0
        assert not [*killed.rglob(".part-*")]  # the last session was not killed
        a, b = saved(killed), saved(whole)
        for part in ("weights", "optimizers", "best"):
            assert_same(a[part], b[part])
        for x, y in zip(a["log"], b["log"], strict=True):
            assert_same({**x, "seconds": 0}, {**y, "seconds": 0})
    print(f"{args.kills} kills in {end} steps, {torn} of them while a file was being written; "
          "all is equal, bit for bit")


if __name__ == "__main__":
    run_program(main)
