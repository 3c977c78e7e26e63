"""Every operator of training and inference exists on Apple's MPS, and nothing is float64, which MPS has not.

The real programs run here on the CPU while each operator that reaches torch's dispatcher is noted, and then looked
up in native_functions.yaml, the table that comes with torch and names the devices of every operator's kernels.

What this cannot see: whether a kernel is right, or takes the shape at hand; the inside of operators that torch
makes of others, but for those in INSIDE; other routes that torch has on MPS, such as a fused dropout. Loading, and
refining and joining in infer.py, happen on the CPU in any case; but for the smoothing they are noted with the rest,
which does no harm.
"""
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import infer
import train
from test_infer import network

torchgen = pytest.importorskip("torchgen", reason="the table of operators comes with torch's own wheels only")
TABLE = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
# A kernel for all devices, made of other operators.
EVERYWHERE = {"CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"}
INSIDE = {  # what does the work on MPS where the CPU shows another name
    "aten::convolution": ["_mps_convolution", "_mps_convolution_transpose"],
    "aten::convolution_backward": ["mps_convolution_backward", "mps_convolution_transpose_backward"],
    "aten::max_pool2d_with_indices": ["max_pool2d", "max_pool2d_backward"],
    "aten::addmm": ["linear", "linear_backward"],
    "aten::sort": ["sort.stable"],
}
TINY = ("--data synthetic --dry-run --workers 0 --device cpu --size 32 --batch-size 2 --width 4 --latent 8 "
        "--train-size 4 --val-size 5 --clip 1 --weight-decay .01 --lpips-net alex").split()


class Recorder(TorchDispatchMode):
    """Notes the names of all operators called inside, and of those that met a float64 tensor."""

    def __init__(self):
        super().__init__()
        self.names, self.doubles = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = str(func).replace(".", "::", 1).removesuffix(".default")
        if not name.startswith("profiler::"):  # marks in the optimizer, no work on tensors
            self.names.add(name)
        if any(isinstance(t, torch.Tensor) and t.dtype in (torch.float64, torch.complex128)
               for t in tree_leaves([args, kwargs, result])):
            self.doubles.add(name)
        return result


@pytest.fixture(scope="module")
def table():
    """{operator: the dispatch keys of its kernels}, an operator without any being made of others.

    Only the few lines needed are read, of a file that is indented by two for fields and four for kernels:
        - func: add_.Tensor(Tensor(a!) self, ...) -> Tensor(a!)
          structured_delegate: add.out
          dispatch:
            CPU, MPS: some_kernel
    """
    keys, delegates, generated = {}, {}, {}
    for entry in re.split(r"^- func: ", TABLE.read_text(), flags=re.MULTILINE)[1:]:
        name = "aten::" + entry.split("(")[0]
        kernels, field = None, ""
        for line in entry.splitlines()[1:]:
            line = line.split("#")[0].rstrip()
            if found := re.fullmatch(r"  (\w+):\s*(.*)", line):
                field, value = found.groups()
                if field == "dispatch":
                    kernels = set()
                if field == "structured_delegate":
                    delegates[name] = "aten::" + value
                if field == "autogen":
                    generated.update({f"aten::{n.strip()}": {"CompositeExplicitAutograd"} for n in value.split(",")})
            elif field == "dispatch" and (found := re.match(r"    ([\w, ]+):", line)):
                kernels |= set(found[1].split(", "))
        keys[name] = {"CompositeImplicitAutograd"} if kernels is None and name not in delegates else kernels or set()
    for name, target in delegates.items():
        keys[name] |= keys[target]
    return generated | keys


def missing(names, table):
    inside = {f"aten::{n}" for name in names for n in INSIDE.get(name, [])}
    return sorted({n for n in names if not table.get(n, set()) & (EVERYWHERE | {"MPS"})}
                  | {n for n in inside if "MPS" not in table.get(n, set())})


def record_training(random_alexnet, folder, monkeypatch, *options):
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)  # Ctrl-C stays with pytest
    arguments = train.parse([*TINY, "--lpips-weights", random_alexnet, "--output", str(folder), *options])
    with Recorder() as recorder:
        train.train(*arguments)
    return recorder


# These have the operators of `final`, dual those of `combined`; `ours` comes in the next test, with all switches.
SUBSETS = ("unet", "collapsed", "lpips-only", "dual", "ours")


@pytest.mark.parametrize("preset", [p for p in train.PRESETS if p not in SUBSETS])
def test_every_operator_of_training_has_an_mps_kernel(preset, table, random_alexnet, tmp_path, monkeypatch):
    recorder = record_training(random_alexnet, tmp_path, monkeypatch, "--preset", preset)
    seen = {"convolution", "convolution_backward", "native_batch_norm", "native_batch_norm_backward", "addmm",
            "max_pool2d_with_indices_backward", "addcdiv_", "linalg_vector_norm"}
    if train.Settings(**train.PRESETS[preset]).dropout:
        seen |= {"bernoulli_.float"}
    assert recorder.names >= {f"aten::{n}" for n in seen}  # forward, backward, the optimizer and validation
    assert missing(recorder.names, table) == []
    assert recorder.doubles == set()


def test_every_operator_of_the_preset_ours_and_of_all_switches_has_an_mps_kernel(table, random_alexnet, tmp_path, monkeypatch):
    """The pair loss and the palette loss come with the preset; the rest is what no preset uses.

    (Without a gradient, numpy sorts the palettes, but on the CPU only; here torch does, with one.)
    """
    recorder = record_training(random_alexnet, tmp_path, monkeypatch, "--preset", "ours", "--sigmoid", "--style-from", "other",
                               "--dropout", ".2", "--accumulate", "2")
    assert recorder.names >= {"aten::sigmoid", "aten::sort", "aten::randint", "aten::exp", "aten::bernoulli_.float",
                              "aten::replication_pad2d", "aten::replication_pad2d_backward", "aten::avg_pool2d_backward"}
    assert missing(recorder.names, table) == [] and recorder.doubles == set()


def unnoted(function):
    """The same function, and if it returns another one this too, without its operators being noted."""
    def call(*args):
        with _disable_current_modes():
            result = function(*args)
        return unnoted(result) if callable(result) else result
    return call


@pytest.mark.parametrize("preset", ["final", "ours"])
def test_every_operator_of_inference_has_an_mps_kernel(preset, table, tmp_path, monkeypatch):
    weights = network(tmp_path / "net.pt", space="rgb", padding=train.Settings(**train.PRESETS[preset]).padding)
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    for file, size in zip(files, [(50, 37), (33, 70), (40, 40)]):  # odd ones, which are padded
        Image.fromarray(np.random.RandomState(0).randint(0, 256, (*size, 3), np.uint8)).save(file)
    options = ["--styles", files[2], "--device", "cpu", "--weights", str(weights),
               "--output", str(tmp_path / "out"), "--refine", ".5"]
    # Smoothing works on the CPU in any case, where predict brings its answer, and in float64.
    monkeypatch.setattr(infer, "make_smooth", unnoted(infer.make_smooth))
    modes = {"final": [["--raw"]], "ours": [["--blend", "2,1"], ["--grid"], ["--latents"]]}
    with Recorder() as recorder:
        for more in modes[preset]:
            assert infer.main([*files[:2], *options, *more]) == 0
    seen = {"convolution", "native_batch_norm", "replication_pad2d", "logsumexp", "grid_sampler_2d"}
    assert recorder.names >= {f"aten::{n}" for n in seen | ({"histc"} if preset == "ours" else set())}
    assert missing(recorder.names, table) == []
    assert recorder.doubles == set()


# ---- the checker itself -----------------------------------------------------------------------------------

def test_the_table_is_read_as_it_is_written(table):
    assert len(table) > 2500
    assert {"CPU", "CUDA", "MPS"} <= table["aten::index_select"]                       # a line each
    assert {"CPU", "CUDA", "MPS"} <= table["aten::bernoulli_.float"]                   # joined by commas
    assert {"CPU", "MPS"} <= table["aten::addcmul_"] & table["aten::addcmul.out"]      # through structured_delegate
    assert {"CompositeImplicitAutograd", "MPS"} <= table["aten::linear"]
    assert table["aten::layer_norm"] == {"CompositeImplicitAutograd"}                  # no kernels named
    assert table["aten::native_dropout.out"] == {"CompositeExplicitAutograd"}          # made by autogen
    assert table["aten::cudnn_convolution"] == {"CUDA"}


@pytest.mark.parametrize("call, name", [
    (lambda: torch.geqrf(torch.eye(2)), "aten::geqrf"),
    (lambda: torch.linalg.eig(torch.eye(2)), "aten::linalg_eig")])
def test_an_operator_without_mps_kernel_is_caught(call, name, table):
    with Recorder() as recorder:
        torch.ones(2) + 1
        call()
    assert missing(recorder.names, table) == [name]


@pytest.mark.parametrize("call, caught", [
    (lambda: torch.ones(2, dtype=torch.float64), True),
    (lambda: torch.ones(2).to(torch.float64), True),
    (lambda: torch.from_numpy(np.ones(2)) * torch.ones(2), True),
    (lambda: torch.from_numpy(np.ones(2, np.float32)) * 2. ** .5 + torch.tensor(.1), False)],
    ids=["made", "converted to", "from numpy", "none"])
def test_a_float64_tensor_is_caught(call, caught):
    with Recorder() as recorder:
        call()
    assert bool(recorder.doubles) == caught
