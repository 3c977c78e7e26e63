"""Every operator of training and inference exists on Apple's MPS, and nothing is float64, which MPS has not.

The real programs run here on the CPU while each operator that reaches torch's dispatcher is noted, and then looked
up in native_functions.yaml, the table that comes with torch and names the devices of every operator's kernels.

What this cannot see: whether a kernel is right or takes the shape at hand; what goes on inside operators that torch
makes of others (convolution stands for both directions' MPS kernels); and the few places where torch itself takes
another way on MPS (dropout, linear and max-pooling without gradient have fused kernels there). Loading, and the
joining of strips in infer.py, happen on the CPU in any case; they are noted with the rest, which does no harm.
"""
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import infer
import train
from losses import make_trunk

torchgen = pytest.importorskip("torchgen", reason="the table of operators comes with torch's own wheels only")
TABLE = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
# A kernel for all devices, made of other operators: those below autograd are noted by themselves.
EVERYWHERE = {"CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"}
TINY = ("--data synthetic --dry-run --workers 0 --device cpu --size 32 --batch-size 2 --width 4 --latent 8 "
        "--train-size 4 --val-size 5 --hue-rotation 1 --clip 1 --weight-decay .01 --lpips-net alex").split()


class Recorder(TorchDispatchMode):
    """Notes the names of all operators called inside, and of those that met a float64 tensor."""

    def __init__(self):
        super().__init__()
        self.names, self.doubles = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        name = schema.name + ("." + schema.overload_name if schema.overload_name else "")
        self.names.add(name)
        if any(isinstance(t, torch.Tensor) and t.dtype in (torch.float64, torch.complex128)
               for t in tree_leaves((args, kwargs, result))):
            self.doubles.add(name)
        return result


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small only wait for their threads, for a hundred times as long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
        keys[name], field = set(), ""
        for line in entry.splitlines()[1:]:
            line = line.split("#")[0].rstrip()
            if found := re.match(r"  (\w+):\s*(.*)", line):
                field, value = found.groups()
                if field == "structured_delegate":
                    delegates[name] = "aten::" + value
                if field == "autogen":
                    generated.update({"aten::" + n: name for n in value.split(", ")})
            elif field == "dispatch" and (found := re.match(r"    ([\w, ]+):", line)):
                keys[name] |= set(found[1].split(", "))
    without = {name for name, found in keys.items() if not found and name not in delegates}
    for name in without:
        keys[name] = {"CompositeImplicitAutograd"}
    for name, target in delegates.items():
        keys[name] |= keys[target]
    return {**{name: {"CompositeExplicitAutograd"} for name in generated}, **keys}


def missing(names, table):
    return sorted(name for name in names if not table.get(name, set()) & (EVERYWHERE | {"MPS"}))


def check(recorder, table):
    assert not missing(recorder.names, table)
    assert not recorder.doubles


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    path = tmp_path_factory.mktemp("trunk") / "alexnet_features.pth"
    torch.save(make_trunk("alex").state_dict(), path)
    return str(path)


def record_training(trunk, folder, monkeypatch, *options):
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)  # Ctrl-C stays with pytest
    arguments = train.parse([*TINY, "--lpips-weights", trunk, "--output", str(folder), *options])
    with Recorder() as recorder:
        train.train(*arguments)
    return recorder


@pytest.mark.parametrize("preset", train.PRESETS)
def test_every_operator_of_training_has_an_mps_kernel(preset, table, trunk, tmp_path, monkeypatch):
    recorder = record_training(trunk, tmp_path, monkeypatch, "--preset", preset)
    wanted = {"aten::convolution_backward", "aten::native_batch_norm_backward", "aten::max_pool2d_with_indices_backward",
              "aten::addcdiv_", "aten::linalg_vector_norm"}
    if train.PRESETS[preset].get("style", True):
        wanted |= {"aten::var_mean.correction", "aten::addcmul", "aten::sort"}
    print(sorted(recorder.names)); assert recorder.names >= wanted  # forward, backward and AdamW were all seen
    check(recorder, table)


def test_every_operator_of_inference_has_an_mps_kernel(table, trunk, tmp_path, monkeypatch):
    record_training(trunk, tmp_path, monkeypatch)
    files = []
    for i, size in enumerate([(50, 37), (33, 70), (40, 40)]):  # odd ones, which are padded
        files.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(np.random.RandomState(i).randint(0, 256, (*size, 3), np.uint8)).save(files[-1])
    options = ["--device", "cpu", "--weights", str(tmp_path / "dry-run" / "last.pt"), "--output", str(tmp_path / "out"), "--styles", files[2]]
    with Recorder() as recorder:
        for more in ([], ["--raw"], ["--blend", "2,1"], ["--grid"], ["--strength", ".5"], ["--latents"]):
            assert infer.main([*files[:2], *options, *more]) == 0
    print(sorted(recorder.names))
    assert recorder.names >= {"aten::convolution", "aten::var_mean.correction", "aten::index_select"}
    check(recorder, table)
