"""infer.py when the machine, the files or a neighbor misbehave: a picture or one line, and no input is ever changed."""
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import infer
from data import UserError, draw_scene, open_picture
from test_infer import TOP, call, network, outcome, place, prepared  # noqa: F401

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
LIMIT = 240  # seconds for a program that takes ten
POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has no such files and streams")


def message(text):
    """The one line that the program may say."""
    assert text.count("\n") == 1 and "Traceback" not in text, text
    return text


# ---- checkpoints that nobody should use -------------------------------------------------------------------

def alter(name, value):
    """Replace the entry a/b/c of a checkpoint."""
    def change(c):
        *path, last = name.split("/")
        for key in path:
            c = c[key]
        c[last] = value(c.get(last)) if callable(value) else value
    return change


def shared(depth):
    """A list of lists of lists that is small in a file and takes 2 ** depth steps to print."""
    x = []
    for _ in range(depth):
        x = [x, x]
    return x


WEIGHT = "weights/head.weight"
ODD = {
    "width a tensor": alter("model/width", torch.tensor(4)), "width a nested list": alter("model/width", shared(40)),
    "a huge latent": alter("model/latent", 10 ** 9), "space unknown": alter("model/space", "SECRET"),
    "space a nested list": alter("model/space", shared(40)), "an unknown setting": alter("model/magic", "SECRET"),
    "an unknown setting, nested": alter("model/magic", shared(40)), "a setting without a name": lambda c: c["model"].update({7: 7}),
    "model none": alter("model", None), "model a list": alter("model", [1, 2]), "model nested":
    alter("model", {"model": {"width": 4}}), "model a tensor": alter("model", torch.ones(3)),
    "weights none": alter("weights", None), "weights a list": alter("weights", list), "weights nested":
    alter("weights", lambda w: {"weights": w}), "weights of text": alter("weights", {"head.weight": "SECRET"}),
    "a weight of text": alter(WEIGHT, "SECRET"), "a weight a nested list": alter(WEIGHT, shared(40)), "a weight none":
    alter(WEIGHT, None), "a weight nested": alter(WEIGHT, lambda w: {"w": w}), "a meta weight":
    alter(WEIGHT, lambda w: w.to("meta")), "a sparse weight": alter(WEIGHT, lambda w: w.to_sparse()), "a complex weight":
    alter(WEIGHT, lambda w: w.to(torch.complex64)), "a weight of integers": alter(WEIGHT, lambda w: w.int()),
    "a weight of truths": alter(WEIGHT, lambda w: w > 0), "a weight of another shape": alter(WEIGHT, lambda w: w[:1]),
    "a quantized weight": alter(WEIGHT, lambda w: torch.quantize_per_tensor(w, .1, 0, torch.qint8)),
    "a weight of 8 bits": alter(WEIGHT, lambda w: w.to(torch.float8_e4m3fn)),
    "a weight of nan": alter(WEIGHT, lambda w: w * torch.nan), "one infinite weight":
    alter(WEIGHT, lambda w: torch.cat([w[:1] * torch.inf, w[1:]])), "a statistic of nan":
    alter("weights/encoder.0.2.running_var", lambda w: w * torch.nan),
    "a weight without a name": lambda c: c["weights"].update({7: torch.ones(1)}),
    "format a tensor": alter("format", torch.tensor(infer.FORMAT)), "format a large tensor": alter("format", torch.ones(99, 99)),
    "format true": alter("format", True), "format of text": alter("format", "SECRET"), "format a fraction":
    alter("format", float(infer.FORMAT)), "format a nested list": alter("format", shared(40)), "format 0": alter("format", 0),
    "no format": lambda c: c.pop("format"), "settings none": alter("settings", None), "no size": lambda c: c["settings"].clear(),
    "size true": alter("settings/size", True), "size of text": alter("settings/size", "32"), "size a tensor":
    alter("settings/size", torch.tensor(32)), "size 4096": alter("settings/size", 4096), "size huge": alter("settings/size", 10 ** 12),
    "size 0": alter("settings/size", 0), "size a nested list": alter("settings/size", shared(40)),
}


@pytest.mark.filterwarnings("ignore")  # torch's own, of quantized tensors
@pytest.mark.parametrize("name", ODD)
def test_a_checkpoint_of_odd_types_is_one_line_without_its_values(place, name, capsys):  # noqa: F811
    checkpoint = torch.load("net.pt", weights_only=True)
    ODD[name](checkpoint)
    torch.save(checkpoint, "odd.pt")
    code, text = outcome("photos/gray.png", "styles/a.png", "--weights", "odd.pt", capsys=capsys)
    assert code == 1 and "odd.pt: " in message(text) and "SECRET" not in text and "[[" not in text and len(text) < 300
    assert not Path("gray_a.png").exists()
    if name.startswith("a weight of") or "weight" in name and ("sparse" in name or "meta" in name or "infinite" in name):
        assert "head.weight" in text


@pytest.mark.parametrize("whole", [[], None, torch.ones(3), "SECRET", {"format": 1}, shared(40)],
                         ids=["a list", "none", "a tensor", "text", "a format alone", "a nested list"])
def test_a_file_of_torch_that_is_no_checkpoint_is_one_line(place, whole, capsys, recwarn):  # noqa: F811
    torch.save(whole, "odd.pt")
    code, text = outcome("photos/gray.png", "styles/a.png", "--weights", "odd.pt", capsys=capsys)
    assert code == 1 and "not a checkpoint" in message(text) and "SECRET" not in text and len(text) < 300
    assert not recwarn.list  # a warning would be printed as well


@POSIX
def test_a_pipe_as_checkpoint_photo_or_style_does_not_wait(place, capsys):  # noqa: F811
    os.mkfifo("pipe.png")
    for arguments in (["photos/gray.png", "styles/a.png", "--weights", "pipe.png"], ["pipe.png", "styles/a.png", "--weights", "net.pt"],
                      ["photos/gray.png", "pipe.png", "--weights", "net.pt"]):
        code, text = outcome(*arguments, "--device", "cpu", capsys=capsys)
        assert code == 1 and "pipe.png" in message(text)


# ---- inputs stay ------------------------------------------------------------------------------------------

def contents():
    return {p: p.read_bytes() for p in Path().rglob("*") if p.is_file() and p.parts[0] in ("photos", "styles", "net.pt")}


def test_inputs_and_the_checkpoint_are_never_overwritten(place):  # noqa: F811
    network("net.png")
    before = contents() | {Path("net.png"): Path("net.png").read_bytes()}
    # (On many disks photos/GRAY.png is that file, too.)
    for output in ("photos/gray.png", "./photos/../styles/a.png", "photos/GRAY.png"):
        with pytest.raises(UserError, match="is one of the inputs"):
            call("photos/gray.png", "styles/a.png", "--output", output)
    with pytest.raises(UserError, match="net.png: is one of the inputs"):
        infer.main(["photos/gray.png", "styles/a.png", "--device", "cpu", "--weights", "net.png", "--output", "net.png"])
    assert contents() | {Path("net.png"): Path("net.png").read_bytes()} == before


@POSIX
def test_links_to_inputs_are_not_written_through(place):  # noqa: F811
    before = contents()
    os.symlink("photos/gray.png", "soft.png")
    os.link("photos/gray.png", "hard.png")
    with pytest.raises(UserError, match="is one of the inputs"):
        call("photos/gray.png", "styles/a.png", "--output", "soft.png")
    call("photos/gray.png", "styles/a.png", "--output", "hard.png")                    # the name gets a new file
    assert Path("hard.png").read_bytes() != before[Path("photos/gray.png")]
    assert contents() == before


def test_a_result_finds_a_free_name_beside_ten_thousand_inputs(place):  # noqa: F811
    files = infer.Files("out", [Path("out", f"x{end}.png") for end in ["", *(f"_{n}" for n in range(2, 10_003))]], 3)
    for name in ("x", "x", "X"):  # on many disks X.png is x.png
        files.save(Image.new("RGB", (2, 2)), name)
    assert sorted(os.listdir("out")) == ["X_10005.png", "x_10003.png", "x_10004.png"]


def write_again_and_again(color):
    """For a process of its own."""
    for _ in range(60):
        infer.save_atomically("out.png", Image.new("RGB", (400, 300), color).save)


@POSIX
def test_two_programs_that_write_one_file_never_tear_it(place):  # noqa: F811
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write_again_and_again, args=(color,)) for color in ("red", "blue")]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers) or not seen:
        if os.path.exists("out.png"):
            picture = open_picture("out.png")                                          # raises for half a file
            seen.add(tuple(color for _, color in picture.getcolors()))
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen <= {((255, 0, 0),), ((0, 0, 255),)} and not list(Path().glob(".part*"))


# ---- names, formats, disks --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["x" * 300 + ".png", "/".join(["x" * 200] * 30) + ".png"], ids=["a name", "a path"])
@pytest.mark.parametrize("where", ["photo", "style", "--styles", "--output", "--weights"])
def test_names_that_the_file_system_does_not_take_are_one_line(place, capsys, name, where):  # noqa: F811
    arguments = {"photo": [name, "styles/a.png"], "style": ["photos/gray.png", name]}.get(where, ["photos/gray.png", "styles/a.png"])
    options = {"--weights": "net.pt", "--device": "cpu"} | ({where: name} if where.startswith("--") else {})
    code, text = outcome(*arguments, *[x for pair in options.items() for x in pair], capsys=capsys)
    lines = [line for line in text.splitlines() if not line.startswith("gray_")]       # a good style's result
    assert code == 1 and len(lines) == 1 and "xxx" in lines[0] and "free some space" not in text


def test_one_bad_name_among_three_photos_does_not_stop_the_others(place, capsys):  # noqa: F811
    code, text = outcome("photos/gray.png", "x" * 300 + ".png", "photos/color.JPG", "styles/a.png", "--weights", "net.pt",
                         "--device", "cpu", "--refine", 0, capsys=capsys)
    assert code == 1 and Path("gray_a.png").exists() and Path("color_a.png").exists() and text.count("xxx.png: ") == 1


def test_names_that_are_too_long_together_are_one_line(place, capsys):  # noqa: F811
    draw_scene(1, 40, 30).save(f"{'p' * 200}.png")
    draw_scene(2, 40, 30).save(f"{'s' * 200}.png")
    code, text = outcome(f"{'p' * 200}.png", f"{'s' * 200}.png", "--weights", "net.pt", "--device", "cpu", capsys=capsys)
    assert code == 1 and "too long" in message(text) and "--output" in text and "free some space" not in text
    assert not list(Path().glob(".part*"))


@POSIX
def test_paths_without_permission_are_one_line(capsys):
    """Root may do everything, so for a moment we are somebody else."""
    Image.init()  # Pillow's modules are read now, while we may
    with tempfile.TemporaryDirectory() as top:
        top, root = Path(top), os.geteuid() == 0
        network(top / "net.pt")
        (top / "locked").mkdir()
        for path in (top / "style.png", top / "unreadable.png", top / "locked" / "a.png"):
            draw_scene(1, 40, 30).save(path)
        (top / "unreadable.png").chmod(0)
        (top / "net.pt").chmod(0o644)
        (top / "locked").chmod(0)
        top.chmod(0o755)
        good, style, net = top / "style.png", top / "style.png", top / "net.pt"
        if root:
            os.seteuid(65534)
        try:
            for photo, weights, output in [
                    (top / "unreadable.png", net, top / "x.png"), (top / "locked" / "a.png", net, top / "x.png"),
                    (top / "locked", net, top / "x.png"), (good, top / "locked" / "net.pt", top / "x.png"),
                    (good, net, top / "locked" / "x.png"), (good, net, top / "locked" / "new" / "x.png"),
                    (good, net, top / "locked")]:
                code, text = outcome(photo, style, "--weights", weights, "--output", output, "--device", "cpu", "--refine", 0,
                                     capsys=capsys)
                text = "".join(line + "\n" for line in text.splitlines() if "is gray" not in line)
                assert code == 1 and ("locked" in message(text) or "unreadable" in text) and "free some space" not in text
        finally:
            if root:
                os.seteuid(0)
            (top / "locked").chmod(0o755)


@pytest.mark.parametrize("ending, limit", [(".webp", 16383), (".avif", 16384), *(
    (ending, 65500) for ending in (".jpg", ".jpeg", ".jpe", ".jfif", ".gif"))])
def test_formats_are_written_up_to_their_limit_and_refused_beyond_with_advice(place, ending, limit):  # noqa: F811
    files = infer.Files(f"x{ending}", [], 1)
    for size in [(limit, 2), (2, limit)]:
        picture = Image.new("RGB", size, "teal")
        picture.paste("orange", (0, 0, 1, 1))
        files.taken.clear()
        files.save(picture, "x")
        assert open_picture(f"x{ending}").size == size
    before = Path(f"x{ending}").read_bytes()
    for size in [(limit + 1, 2), (2, limit + 1)]:
        files.taken.clear()
        with pytest.raises(UserError, match=f"{limit} pixels.*choose .png") as caught:
            files.save(Image.new("RGB", size), "x")
        assert "free some space" not in str(caught.value)
    assert Path(f"x{ending}").read_bytes() == before


def test_every_other_ending_holds_a_long_picture(place):  # noqa: F811
    for ending in sorted(infer.EXTENSIONS - set(infer.MAX_SIDE)):
        infer.Files(f"x{ending}", [], 1).save(Image.new("RGB", (70_000, 2), "teal"), "x")
        assert open_picture(f"x{ending}").size == (70_000, 2)


def test_a_very_long_photo_as_webp_is_one_line(place, capsys):  # noqa: F811
    Image.new("RGB", (20_000, 10), "gray").save("photos/long.png")
    code, text = outcome("photos/long.png", "styles/a.png", "--weights", "net.pt", "--device", "cpu", "--refine", 0,
                         "--output", "long.webp", capsys=capsys)
    assert code == 1 and "16383" in message(text) and ".png" in text
    call("photos/long.png", "styles/a.png", "--refine", 0, "--output", "long.png")
    assert Image.open("long.png").size == (20_000, 10)


@POSIX
def test_a_full_disk_is_one_line_with_advice_and_leaves_no_file(place, capsys):  # noqa: F811
    import resource
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        code, text = outcome("photos/gray.png", "styles/a.png", "--weights", "net.pt", "--device", "cpu", "--refine", 0, capsys=capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and "free some space" in message(text)
    assert not Path("gray_a.png").exists() and not list(Path().glob(".part*"))


# ---- memory -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(300_000, 1), (1, 300_000), (300_000, 2)])
def test_a_thin_picture_is_joined_in_tiles_of_bounded_size(size, monkeypatch):
    pixels = []
    to_batch = infer.to_batch

    def watch(picture):
        pixels.append(picture.width * picture.height)
        return to_batch(picture)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0]), np.uint8)
    photo = Image.fromarray(noise).convert("RGB")
    lab = 30 * torch.randn(1, 3, *(min(n, 60) for n in size[::-1]), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(infer, "to_batch", watch)
    tiles = infer.join(photo, lab)
    assert len(pixels) > 1 and max(pixels) <= infer.TILE_PIXELS and sum(pixels) == size[0] * size[1]
    monkeypatch.setattr(infer, "TILE_PIXELS", 1 << 40)
    assert np.abs(np.asarray(infer.join(photo, lab), int) - np.asarray(tiles, int)).max() <= 1


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA itself fails with so few addresses")
def test_memory_that_does_not_suffice_is_one_line(place):  # noqa: F811
    limited = (f"import sys; sys.path.insert(0, {str(TOP)!r}); import resource, infer; "
               "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize(); "
               "resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 10 ** 8,) * 2); sys.argv[0] = 'infer.py'; infer.run_program(infer.main)")
    done = subprocess.run([sys.executable, "-c", limited, "photos/gray.png", "styles/a.png", "--size", "4096", "--weights", "net.pt",
                           "--device", "cpu"], capture_output=True, text=True, env=ENVIRONMENT, timeout=LIMIT)
    assert done.returncode == 1 and "memory" in message(done.stderr) and "--size" in done.stderr


# ---- streams and packages ---------------------------------------------------------------------------------

@POSIX
def test_closed_streams_do_not_matter(place):  # noqa: F811
    arguments = "photos/gray.png styles/a.png --weights net.pt --device cpu --refine 0".split()
    done = subprocess.run(["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', sys.executable, str(TOP / "infer.py"), *arguments],
                          env=ENVIRONMENT, timeout=LIMIT)
    assert done.returncode == 0 and Image.open("gray_a.png").size == (90, 61)


def test_a_missing_package_is_named_with_what_to_do(place):  # noqa: F811
    for name in ("infer.py", "train.py"):
        done = subprocess.run([sys.executable, "-S", str(TOP / name)], capture_output=True, text=True,
                              env={k: v for k, v in ENVIRONMENT.items() if k != "PYTHONPATH"}, timeout=LIMIT)
        assert done.returncode == 1 and "is not installed: pip install -r requirements.txt" in message(done.stderr)
