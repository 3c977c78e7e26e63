"""Files of every kind: what cannot be read, written, fetched, unpacked or loaded gives one line and leaves no mess.

    python -m pytest tests/robustness/test_files.py
"""
import contextlib
import errno
import hashlib
import io
import os
import pickle
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import losses
from data import UserError, open_picture
from test_data import link, one_line, paint
from test_losses import Bomb

NOT_ON_WINDOWS = pytest.mark.skipif(os.name == "nt", reason="Windows has no such files, users or names")
NAME, PATH = "y" * 300 + ".jpg", "y/" * 2100 + "x.jpg"  # longer than a file system, and than the system, takes


def png_header(width, height):
    """A PNG of almost no bytes that claims to be huge; 1 bit a pixel."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b""))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks)


@pytest.fixture
def open_folder():
    """A folder that every user may read, and the test runs as a user whom permissions stop."""
    if os.name == "nt":
        pytest.skip("needs users and permissions")
    with tempfile.TemporaryDirectory() as folder:
        root = os.geteuid() == 0
        if root:
            os.chmod(folder, 0o755)
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)  # nobody
        try:
            yield Path(folder)
        finally:
            if root:
                os.seteuid(0)
            for path in (Path(folder), *Path(folder).iterdir()):
                path.chmod(0o700)


# ---- files: pictures of two halves whose values are known -------------------------------------------------

def halves(left, right, dtype=np.uint8):
    return np.repeat(np.array([[left, right]], dtype), 16, axis=1).repeat(16, axis=0)  # (16, 32, ...)


def over_white(color, alpha):
    return [255 + (c - 255) * alpha / 255 for c in color]


def indexed(transparency=None):
    picture = Image.fromarray(halves(0, 1))
    picture.putpalette([*RED, *BLUE])
    if transparency is not None:
        picture.info["transparency"] = transparency
    return picture


RED, BLUE, WHITE = (200, 60, 30), (20, 90, 180), (255, 255, 255)
TWO, GRAY = Image.fromarray(halves(RED, BLUE)), Image.fromarray(halves(40, 210))
ALPHA = Image.fromarray(halves((*RED, 255), (*BLUE, 100)))
INK = Image.merge("CMYK", [Image.fromarray(halves(*v)) for v in [(10, 200), (200, 90), (120, 20), (40, 70)]])
INK_RGB = [[(255 - c) * (255 - k) / 255 for c in cmy] for *cmy, k in [(10, 200, 120, 40), (200, 90, 20, 70)]]
FINE = dict(quality=100, subsampling=0)  # coarser color would blur the border between the halves
FILES = [  # name, picture, how to save it, color of the left half, of the right half, tolerance
    ("rgb.JPG", TWO, FINE, RED, BLUE, 4), ("rgb.png", TWO, {}, RED, BLUE, 0),
    ("rgb.WebP", TWO, dict(lossless=True), RED, BLUE, 0), ("rgb.bmp", TWO, {}, RED, BLUE, 0),
    ("rgb.tiff", TWO, {}, RED, BLUE, 0), ("lzw.tif", TWO, dict(compression="tiff_lzw"), RED, BLUE, 0),
    ("animated.gif", indexed(), dict(save_all=True, append_images=[TWO.rotate(180)]), RED, BLUE, 0),
    ("bits.png", GRAY.point(lambda v: v > 128, "1"), {}, [0] * 3, WHITE, 0),
    ("bits.tif", GRAY.point(lambda v: v > 128, "1"), {}, [0] * 3, WHITE, 0),
    ("gray.png", GRAY, {}, [40] * 3, [210] * 3, 0), ("gray.jpg", GRAY, FINE, [40] * 3, [210] * 3, 3),
    ("la.png", Image.fromarray(halves((40, 255), (210, 51)), "LA"), {}, [40] * 3, over_white([210] * 3, 51), 1),
    ("p.png", indexed(), {}, RED, BLUE, 0), ("p_key.png", indexed(0), {}, WHITE, BLUE, 0),
    ("p_key.gif", indexed(1), {}, RED, WHITE, 0),
    ("p_alpha.png", indexed(b"\x80\xff"), {}, over_white(RED, 128), BLUE, 1),
    ("rgb_key.png", TWO, dict(transparency=BLUE), RED, WHITE, 0),
    ("rgba.png", ALPHA, {}, RED, over_white(BLUE, 100), 1), ("rgba.tif", ALPHA, {}, RED, over_white(BLUE, 100), 1),
    ("rgba.webp", ALPHA, dict(lossless=True, exact=True), RED, over_white(BLUE, 100), 1),
    ("cmyk.jpg", INK, FINE, *INK_RGB, 4), ("cmyk.tif", INK, {}, *INK_RGB, 1),
    ("i16.png", Image.fromarray(halves(10_000, 50_000, np.uint16)), {}, [39] * 3, [195] * 3, 0),  # value / 257
    ("i16.tif", Image.fromarray(halves(10_000, 50_000, np.uint16)), {}, [39] * 3, [195] * 3, 0),
    ("i16_dark.png", Image.fromarray(halves(0, 255, np.uint16)), {}, [0] * 3, [1] * 3, 0),  # all but black, not white
    ("i32_of_16.tif", Image.fromarray(halves(10_000, 50_000, np.int32)), {}, [39] * 3, [195] * 3, 0),
    ("i32_of_8.tif", Image.fromarray(halves(40, 210, np.int32)), {}, [40] * 3, [210] * 3, 0),
    ("i32_of_32.tif", Image.fromarray(halves(10 ** 9, 2 * 10 ** 9, np.int32)), {}, [128] * 3, [255] * 3, 1),
    ("f_to_1.tif", Image.fromarray(halves(.2, .8, np.float32)), {}, [51] * 3, [204] * 3, 0),
    ("f_to_255.tif", Image.fromarray(halves(40, 210, np.float32)), {}, [40] * 3, [210] * 3, 0),
    ("f_above_1.tif", Image.fromarray(halves(.2, 1.4, np.float32)), {}, [51] * 3, [255] * 3, 0),
    ("f_inf.tif", Image.fromarray(halves(.2, np.inf, np.float32)), {}, [51] * 3, [255] * 3, 0),
    ("f_255_and_inf.tif", Image.fromarray(halves(100, np.inf, np.float32)), {}, [100] * 3, [100] * 3, 0),
    ("f_256.tif", Image.fromarray(halves(200, 256, np.float32)), {}, [200] * 3, [255] * 3, 0),
    ("f_minus_inf.tif", Image.fromarray(halves(-np.inf, .8, np.float32)), {}, [0] * 3, [204] * 3, 0),
    ("f_nan.tif", Image.fromarray(halves(np.nan, .8, np.float32)), {}, [0] * 3, [204] * 3, 0)]


@pytest.mark.filterwarnings("ignore:'mode' parameter:DeprecationWarning")
@pytest.mark.parametrize("name, picture, how, left, right, tolerance", FILES, ids=[f[0] for f in FILES])
def test_every_kind_of_file_comes_out_as_its_colors(tmp_path, name, picture, how, left, right, tolerance):
    picture.save(tmp_path / name, **how)
    result = open_picture(tmp_path / name)
    assert result.mode == "RGB"
    np.testing.assert_allclose(np.asarray(result, float), halves(left, right, float), atol=tolerance)


UPRIGHT = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1),
           6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90}


@pytest.mark.parametrize("ending, how", [("jpg", FINE), ("png", {}), ("tif", {}), ("webp", dict(lossless=True))])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_obeyed(tmp_path, orientation, ending, how):
    stored = np.random.default_rng(0).integers(0, 255, (3, 2, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(stored).save(tmp_path / f"x.{ending}", exif=exif, **how)
    result = np.asarray(open_picture(tmp_path / f"x.{ending}"), float)
    np.testing.assert_allclose(result, UPRIGHT[orientation](stored), atol=6 if ending == "jpg" else 0)


def exif_bytes(*tags):
    """A hand-made EXIF block of (tag, type, count, value as 4 bytes)."""
    rows = b"".join(struct.pack("<HHI4s", *tag) for tag in sorted(tags))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + rows + bytes(4)


SIDEWAYS = (274, 3, 1, b"\6\0\0\0")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("exif, turned", [
    (b"Exif\0\0nonsense", False), (b"Exif\0\0II*\0\xff\xff\xff\x7f", False),
    (exif_bytes((274, 3, 1, b"\x63\0\0\0")), False), (exif_bytes((274, 2, 4, b"abc\0")), False),
    (exif_bytes(SIDEWAYS, (34665, 4, 1, b"\xff\xff\0\0")), True), (exif_bytes(SIDEWAYS, (282, 2, 4, b"abc\0")), True),
    (exif_bytes(SIDEWAYS, (258, 4, 1, b"\0\0\0\1")), True),
], ids=["no tiff", "starts beyond the end", "orientation 99", "orientation abc", "continues beyond the end",
        "resolution abc", "bit depth 2^24"])
def test_broken_exif_costs_neither_the_pixels_nor_a_readable_orientation(tmp_path, exif, turned):
    TWO.save(tmp_path / "x.jpg", exif=exif, **FINE)
    wanted = np.rot90(np.asarray(TWO, float), -1 if turned else 0)
    np.testing.assert_allclose(np.asarray(open_picture(tmp_path / "x.jpg"), float), wanted, atol=4)


@pytest.mark.parametrize("at_least, size", [(None, (400, 300)), (200, (400, 300)), (150, (200, 150)), (100, (200, 150)),
                                            (75, (100, 75)), (30, (50, 38)), (1000, (400, 300))])
def test_at_least_decodes_smaller_but_never_below(tmp_path, at_least, size):
    assert open_picture(paint(tmp_path / "x.jpg", size=(400, 300)), at_least).size == size


def cut_short(ending, length):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file := io.BytesIO(), ending)
    return file.getvalue()[:length]


@pytest.mark.parametrize("name, content, reason", [
    ("empty.jpg", b"", "is empty"), ("notes.jpg", b"buy milk\n" * 9, "not a picture"),
    ("cut.jpg", cut_short("jpeg", 1500), "truncated"), ("cut.png", cut_short("png", 2000), "cannot be read"),
    ("cut.tif", cut_short("tiff", 2000), "cannot be read"), ("cut.webp", cut_short("webp", 500), "cannot be read"),
    ("bomb.png", png_header(20_000, 20_000), "128 megapixels"),
    ("more.png", png_header(12_000, 12_000), "128 megapixels"),  # Pillow's own limit is higher
    ("missing.jpg", None, "no such file"), ("y" * 300 + ".jpg", None, ""), ("two\nlines.jpg", None, "no such file"),
    pytest.param("two\nlines.jpg", b"text", "not a picture", marks=NOT_ON_WINDOWS)], ids=range(12))
def test_what_cannot_be_read_gives_one_line_that_names_it(tmp_path, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    text = one_line(open_picture, tmp_path / name)
    assert name.replace("\n", "\\n") in text and reason in text


@pytest.mark.parametrize("make", [os.mkdir, pytest.param(lambda p: os.mkfifo(p), marks=NOT_ON_WINDOWS)],
                         ids=["folder", "pipe"])
def test_a_folder_is_refused_and_a_pipe_is_not_waited_for(tmp_path, make):
    make(tmp_path / "x.jpg")
    said = []
    thread = threading.Thread(target=lambda: said.append(one_line(open_picture, tmp_path / "x.jpg")), daemon=True)
    thread.start()
    thread.join(20)  # a daemon: if it waits for ever the test still ends
    assert said and "x.jpg: not a file" in said[0]


def test_a_picture_that_vanishes_while_it_is_opened_gives_one_line(tmp_path, monkeypatch):
    path, opened = paint(tmp_path / "x.png"), Image.open

    def vanish(name):
        os.unlink(name)
        return opened(name)

    monkeypatch.setattr(Image, "open", vanish)
    assert "x.png" in one_line(open_picture, path)


def test_a_picture_without_permission_gives_one_line_that_says_so(open_folder):
    paint(open_folder / "x.png").chmod(0)
    text = one_line(open_picture, open_folder / "x.png")
    assert "x.png" in text and "Permission denied" in text


@pytest.mark.parametrize("name, content", [
    ("x.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400)),
    ("x.HEIF", b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(400)),
    ("x.pdf", b"%PDF-1.4\n" + b"1 0 obj\n" * 50), ("x.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>")])
def test_a_format_that_pillow_lacks_gives_one_line_with_the_cure(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    text = one_line(open_picture, tmp_path / name)
    assert name in text and "convert it to JPEG" in text


# ---- names that are too long ------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [NAME, PATH], ids=["name", "path"])
@pytest.mark.parametrize("call", [
    open_picture, lambda p: data.find_data(p, 0, 0, 0), lambda p: data.save_atomically(p, lambda part: part.touch()),
    lambda p: data.imagenette(p, "http://127.0.0.1:9/x.tgz"), lambda p: data.Photos([p], 8, 0, True)[0, 0],
    lambda p: data.download("http://127.0.0.1:9", p, "", "cure")],
    ids=["open", "find_data", "save", "imagenette", "Photos", "download"])
def test_a_name_that_is_too_long_gives_one_line(tmp_path, monkeypatch, call, name):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    one_line(call, tmp_path / name)
    assert list(tmp_path.glob("*")) == [] or name == PATH


@pytest.mark.parametrize("name", [NAME, PATH], ids=["name", "path"])
def test_a_name_that_is_too_long_is_no_picture_and_no_file_of_torch(tmp_path, name, capsys):
    assert data.list_pictures(tmp_path / name) == []
    assert data.drop_gray_and_broken([tmp_path / name], 10) == []
    assert len(capsys.readouterr().err.splitlines()) == 2
    with pytest.raises(ValueError, match="not a file of torch"):
        data.load_torch_file(tmp_path / name)


@NOT_ON_WINDOWS
def test_a_name_of_control_characters_is_printed_harmless(tmp_path):
    path = tmp_path / "two\nlines\x1b[31m.jpg"
    path.write_text("no picture")
    text = one_line(open_picture, path)
    assert text.isprintable() and "two\\nlines\\x1b[31m.jpg" in text


# ---- saving -----------------------------------------------------------------------------------------------

TARGET_ERRORS = [(OSError(errno.ENOSPC, "No space left"), True), (OSError(errno.EDQUOT, "Quota exceeded"), True),
                 (PermissionError(errno.EACCES, "Permission denied"), False), (OSError(errno.EIO, "I/O error"), False),
                 (OSError(errno.EROFS, "Read-only file system"), False), (ValueError("unknown format"), False),
                 (RuntimeError("failed at x.cc\nframe #0"), False), (OSError("encoder error -2"), False),
                 (SystemError("tile"), False)]


@pytest.mark.parametrize("error, full", TARGET_ERRORS, ids=lambda x: type(x).__name__)
def test_a_failed_save_leaves_the_old_file_and_speaks_of_space_only_when_it_is_full(tmp_path, error, full):
    path = tmp_path / "x.pt"
    path.write_text("old")

    def write(part):
        part.write_text("half")
        raise error

    text = one_line(data.save_atomically, path, write)
    assert "x.pt" in text and error.args[-1].splitlines()[0] in text
    assert ("free some space" in text) == full and "--output" in text
    assert os.listdir(tmp_path) == ["x.pt"] and path.read_text() == "old"


def test_what_is_no_fault_of_the_place_is_not_hidden_and_leaves_nothing(tmp_path):
    def write(part):
        part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.save_atomically(tmp_path / "x.pt", write)
    assert os.listdir(tmp_path) == []


def test_a_save_makes_the_folder_and_moves_the_finished_file_into_place(tmp_path):
    path, written = tmp_path / "a" / "b" / "x.png", []
    for picture in (GRAY, TWO):
        data.save_atomically(path, lambda part: (picture.save(part), written.append(part.stat().st_ino)))
    assert os.listdir(path.parent) == ["x.png"] and path.stat().st_ino == written[1]  # a copy could be met half
    np.testing.assert_array_equal(np.asarray(open_picture(path)), np.asarray(TWO))


@pytest.mark.parametrize("name", ["file/x.png", "folder", "y" * 252 + ".png"])
def test_a_place_that_cannot_be_written_gives_one_line(tmp_path, name):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder" / "full").mkdir(parents=True)
    text = one_line(data.save_atomically, tmp_path / name, lambda part: part.write_text("new"))
    assert name in text and "free some space" not in text
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_the_longest_name_that_the_file_system_takes_can_be_saved(tmp_path):
    data.save_atomically(tmp_path / ("y" * 251 + ".png"), TWO.save)
    assert os.listdir(tmp_path) == ["y" * 251 + ".png"]


@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_folder_without_permission_gives_one_line(open_folder, mode):
    open_folder.chmod(mode)
    text = one_line(data.save_atomically, open_folder / "x.png", TWO.save)
    assert "x.png" in text and "ermission" in text and "free some space" not in text


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Or a power cut may leave an empty one."""
    synced, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))

    def move(part, path):
        assert synced == [os.stat(part).st_ino]
        replace(part, path)
    monkeypatch.setattr(os, "replace", move)
    data.save_atomically(tmp_path / "x.txt", lambda part: part.write_text("new"))
    assert (tmp_path / "x.txt").read_text() == "new"


def test_a_second_writer_in_the_middle_of_the_first_tears_nothing(tmp_path):
    path = tmp_path / "x.txt"

    def first(part):
        with open(part, "w") as file:
            file.write("first " * 1000)
            file.flush()
            data.save_atomically(path, lambda other: other.write_text("second"))
            assert path.read_text() == "second"
            file.write("and last")

    data.save_atomically(path, first)
    assert path.read_text() == "first " * 1000 + "and last" and os.listdir(tmp_path) == ["x.txt"]


@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "folder"])
def test_what_has_the_look_of_a_temporary_file_is_not_touched(tmp_path, kind):
    outside, trap = tmp_path / "outside", tmp_path / "out" / ".part-x.png"
    trap.parent.mkdir()
    if kind == "folder":
        trap.mkdir()
    elif kind == "file":
        trap.write_text("mine")
    else:
        outside.write_text("mine")
        link(trap, outside)
        if kind == "dangling link":
            outside.unlink()
    data.save_atomically(tmp_path / "out" / "x.png", TWO.save)
    assert sorted(os.listdir(tmp_path / "out")) == [".part-x.png", "x.png"]
    if kind in ("file", "link"):
        assert trap.read_text() == "mine"
    assert outside.exists() == (kind == "link") and trap.is_symlink() == ("link" in kind)


def test_a_target_that_is_a_link_is_replaced_and_its_goal_stays(tmp_path):
    (tmp_path / "goal.png").write_text("precious")
    link(tmp_path / "x.png", tmp_path / "goal.png")
    data.save_atomically(tmp_path / "x.png", TWO.save)
    assert (tmp_path / "goal.png").read_text() == "precious" and not (tmp_path / "x.png").is_symlink()


@NOT_ON_WINDOWS
@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0o000, 0o666)])
def test_a_saved_file_has_the_rights_that_the_umask_leaves(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        data.save_atomically(tmp_path / "x.png", TWO.save)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.png").stat().st_mode) == mode


# ---- files of torch ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_torch_comes_back_as_it_was(tmp_path, zipped):
    content = {"tensor": torch.arange(6.).view(2, 3), "half": torch.ones(3).half(), "list": [1, 2.5, None, True, "x"]}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    loaded = data.load_torch_file(tmp_path / "x.pt")
    assert loaded["list"] == content["list"] and loaded["half"].dtype == torch.float16
    assert torch.equal(loaded["tensor"], content["tensor"])


def compressed(path):
    """A file of torch packed again with compression; a few bytes of such a file may become terabytes."""
    torch.save({"x": torch.zeros(100_000)}, path.with_suffix(".plain"))
    with zipfile.ZipFile(path.with_suffix(".plain")) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


def torn(path):
    torch.save({"x": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-500])


@pytest.mark.parametrize("make", [
    compressed, torn, lambda p: p.write_bytes(b""), lambda p: p.write_bytes(bytes(range(256)) * 20),
    lambda p: p.write_bytes(b"PK\x03\x04" + bytes(100)), lambda p: zipfile.ZipFile(p, "w").close(),
    lambda p: TWO.save(p, "png"), lambda p: p.write_bytes(pickle.dumps([1, 2], protocol=2)), lambda p: p.mkdir(),
    lambda p: None],
    ids=["compressed", "torn", "empty", "garbage", "zip head", "empty zip", "picture", "pickle", "folder", "missing"])
def test_what_is_no_file_of_torch_is_refused_with_one_text(tmp_path, make):
    make(tmp_path / "x.pt")
    with pytest.raises(ValueError) as raised:
        data.load_torch_file(tmp_path / "x.pt")
    assert str(raised.value) == "not a file of torch"


@pytest.mark.parametrize("form", ["torch", "old torch", "pickle"])
def test_no_code_of_a_file_is_ever_run(tmp_path, form):
    file, mark = tmp_path / "x.pt", tmp_path / "mark"
    if form == "pickle":
        file.write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    else:
        torch.save(Bomb(mark), file, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(ValueError):
        data.load_torch_file(file)
    assert not mark.exists()
    with contextlib.suppress(Exception):
        torch.load(file, weights_only=False)
    assert mark.exists()  # the bomb is live: a careless loader sets it off


# ---- downloads, from a server on this machine --------------------------------------------------------------

ARCHIVE = "imagenette2-160.tgz"
MEMBERS = {"imagenette2-160/train/n1/1.JPEG": b"one" * 500, "imagenette2-160/val/n1/2.JPEG": bytes(range(256)) * 9}


def tgz(*extra):
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w:gz") as tar:
        for name, content in [*MEMBERS.items(), *extra]:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            else:  # a link to this path
                member.type, member.linkname = tarfile.SYMTYPE, str(content)
                tar.addfile(member)
    return file.getvalue()


def contents(folder):
    return {p.relative_to(folder.parent).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server on this machine. body: what it sends; stop_after: bytes after which it hangs up; raw: another answer."""
    state = SimpleNamespace(body=b"", stop_after=None, raw=None, asked=0)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state.asked += 1
            if state.raw is not None:
                return self.wfile.write(state.raw)
            self.send_response(200)
            self.send_header("Content-Length", str(len(state.body)))
            self.end_headers()
            self.wfile.write(state.body[:state.stop_after])

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(.05,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    state.base = f"http://127.0.0.1:{http.server_port}"
    yield state
    http.shutdown()
    http.server_close()


class Imagenette:
    """The data set as something to fetch into a folder."""
    cure = "--data DIR", "--data synthetic"

    def __init__(self, server, folder, monkeypatch):
        self.server, self.folder = server, folder
        server.body = self.good = tgz()
        self.url, self.sha256 = f"{server.base}/{ARCHIVE}", hashlib.sha256(self.good).hexdigest()

    def fetch(self):
        target = data.imagenette(self.folder, self.url, self.sha256)
        assert target == self.folder / "imagenette2-160" and contents(target) == MEMBERS


class Trunk:
    """The weights of AlexNet as something to fetch into torch's cache."""
    cure = "--lpips-weights", "$COLORIZER_WEIGHTS", "--lpips 0"

    def __init__(self, server, folder, monkeypatch):
        self.server, self.folder = server, folder / "hub" / "checkpoints"
        torch.manual_seed(0)
        self.trunk = losses.make_trunk("alex")
        torch.save({k: v for k, v in self.trunk.state_dict().items()}, buffer := io.BytesIO())
        server.body = self.good = buffer.getvalue()
        self.url = f"{server.base}/alexnet-owt-{hashlib.sha256(self.good).hexdigest()[:8]}.pth"
        monkeypatch.setenv("TORCH_HOME", str(folder))
        monkeypatch.delenv("COLORIZER_WEIGHTS", raising=False)
        monkeypatch.setitem(losses.URLS, "alex", self.url)

    def fetch(self):
        losses.URLS["alex"] = self.url
        assert torch.equal(losses.load_trunk("alex")[0].bias, self.trunk[0].bias)


@pytest.fixture(params=[Imagenette, Trunk])
def wanted(request, server, tmp_path, monkeypatch):
    timeout = socket.getdefaulttimeout()
    yield request.param(server, tmp_path / "place", monkeypatch)
    socket.setdefaulttimeout(timeout)


def files(folder):
    return [p for p in folder.rglob("*") if p.is_file()]


def test_what_is_missing_is_fetched_once(wanted, server):
    wanted.fetch()
    wanted.fetch()
    assert server.asked == 1


@pytest.mark.parametrize("stop_after", [0, 100])
def test_a_broken_connection_gives_one_line_and_leaves_nothing_and_the_next_try_works(wanted, server, stop_after):
    server.stop_after = stop_after
    text = one_line(wanted.fetch)
    assert wanted.url in text and all(part in text for part in wanted.cure)
    assert files(wanted.folder) == []
    server.stop_after = None
    wanted.fetch()


def test_a_file_with_another_hash_is_not_kept_and_the_next_try_works(wanted, server):
    server.body = wanted.good[:-9] + bytes(9)
    text = one_line(wanted.fetch)
    assert "hash" in text and wanted.url in text and all(part in text for part in wanted.cure)
    assert files(wanted.folder) == []
    server.body = wanted.good
    wanted.fetch()


@pytest.mark.parametrize("answer", [
    None, b"HTTP/1.0 404 Not Found\r\n\r\n", b"HTTP/1.0 302 Found\r\nLocation: /round\r\n\r\n",
    b"this is not HTTP\r\n\r\n", b"",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\ncut",
    b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n"],
    ids=["nobody", "not found", "round and round", "no HTTP", "nothing", "cut", "no length", "too many headers"])
def test_without_a_good_server_one_line_says_what_to_do_instead(wanted, server, answer):
    if answer is None:
        with socket.socket() as closed:  # a port where nobody listens
            closed.bind(("127.0.0.1", 0))
            wanted.url = wanted.url.replace(server.base, f"http://127.0.0.1:{closed.getsockname()[1]}")
    server.raw = answer
    text = one_line(wanted.fetch)
    assert wanted.url in text and all(part in text for part in wanted.cure)
    assert files(wanted.folder) == []


def test_a_place_in_the_way_of_a_download_gives_one_line(wanted, tmp_path):
    (tmp_path / "place").write_text("in the way")
    assert wanted.url in one_line(wanted.fetch) and (tmp_path / "place").read_text() == "in the way"


# ---- archives ---------------------------------------------------------------------------------------------

def fetch(server, folder):
    return data.imagenette(folder, f"{server.base}/{ARCHIVE}", hashlib.sha256(server.body).hexdigest())


def test_an_archive_that_was_not_yet_unpacked_is_used(tmp_path, server):
    server.body = tgz()
    (tmp_path / ARCHIVE).write_bytes(server.body)
    assert contents(fetch(server, tmp_path)) == MEMBERS and server.asked == 0


def test_another_program_that_unpacks_at_the_same_time_does_no_harm(tmp_path, server, monkeypatch):
    unpack = shutil.unpack_archive

    def both(archive, scratch, **options):
        unpack(archive, scratch, **options)
        unpack(archive, tmp_path, **options)
    monkeypatch.setattr(shutil, "unpack_archive", both)
    server.body = tgz()
    assert contents(fetch(server, tmp_path)) == MEMBERS
    assert sorted(os.listdir(tmp_path)) == ["imagenette2-160", ARCHIVE]


def test_an_archive_that_cannot_be_unpacked_gives_one_line_that_says_to_delete_it(tmp_path, server):
    for broken in (tgz()[:200], b"no archive", b"", tgz().replace(tgz()[60:90], bytes(30))):
        (tmp_path / ARCHIVE).write_bytes(broken)
        text = one_line(fetch, server, tmp_path)
        assert ARCHIVE in text and "delete" in text and os.listdir(tmp_path) == [ARCHIVE]


@pytest.mark.parametrize("members", [
    [("../evil", b"!")], [("imagenette2-160/../../../outside/evil", b"!")], [("OUTSIDE/evil", b"!")],
    [("imagenette2-160/link", "OUTSIDE")], [("imagenette2-160/link", "../../../outside")],
    [("imagenette2-160/link", "OUTSIDE"), ("imagenette2-160/link/evil", b"!")],
], ids=["parent", "inner parent", "absolute", "absolute link", "relative link", "through a link"])
def test_a_hostile_archive_writes_nothing_outside(tmp_path, server, members):
    outside, folder = tmp_path / "outside", tmp_path / "data"
    outside.mkdir()
    server.body = tgz(*[[x.replace("OUTSIDE", str(outside)) if isinstance(x, str) else x for x in m] for m in members])
    if members[0][0].startswith("OUTSIDE"):  # tarfile takes the leading slash away, so it ends up inside and is dropped
        assert contents(fetch(server, folder)) == MEMBERS
    else:
        assert ARCHIVE in one_line(fetch, server, folder)
        assert os.listdir(folder) == [ARCHIVE]  # nothing half unpacked is left either
    assert sorted(os.listdir(tmp_path)) == ["data", "outside"] and os.listdir(outside) == []


# ---- typing errors ----------------------------------------------------------------------------------------

def parser():
    made = data.Parser(prog="prog.py")
    made.add_argument("photo")
    made.add_argument("--size", type=int)
    made.add_argument("--lpips-net", choices=["vgg", "alex"])
    made.add_argument("--lpips-weights")
    return made


def said(capsys, call, *arguments):
    """What a typing error prints on stderr: exit code 2 and one line."""
    with pytest.raises(SystemExit) as end:
        call(*arguments)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.count("\n") == 1 and err.endswith("\n")
    assert err.startswith("prog.py: error: ") and "--help" in err
    return err


@pytest.mark.parametrize("typed, hint", [
    ("--siez 3", "--size"), ("--siez=3", "--size"), ("--lpips_net vgg", "--lpips-net"), ("--weights x", "--lpips-weights"),
    ("--lpips-wieghts x", "--lpips-weights"), ("--qqq", ""), ("--qqq --siez", "")])
def test_an_unknown_option_gives_one_line_with_the_nearest_one(capsys, typed, hint):
    text = said(capsys, parser().parse_args, ["x.jpg", *typed.split()])
    assert typed.split("=")[0].split()[0] in text
    assert ("did you mean" in text) == bool(hint) and (not hint or f"did you mean {hint}?" in text)


@pytest.mark.parametrize("typed, part", [
    ("x.jpg --size many", "--size"), ("x.jpg --size", "--size"), ("x.jpg --lpips-net vgh", "vgh"), ("", "photo"),
    ("x.jpg --lpips x", "--lpips")])
def test_another_typing_error_gives_one_line_and_no_hint(capsys, typed, part):
    text = said(capsys, parser().parse_args, typed.split())
    assert part in text and "did you mean" not in text


def test_a_wrong_value_is_not_taken_for_a_wrong_name(capsys):
    """The programs check values themselves, and name the option at the beginning: it exists."""
    text = said(capsys, parser().error, "--size must be from 16 to 4096")
    assert "--size must be from 16 to 4096" in text and "did you mean" not in text


def test_control_characters_in_an_argument_are_printed_harmless(capsys):
    text = said(capsys, parser().parse_args, ["x.jpg", "--no\nsuch\x1b[31m"])
    assert text.rstrip("\n").isprintable()


# ---- the end of a program ---------------------------------------------------------------------------------

def fail(error):
    raise error


@pytest.mark.parametrize("main, code, text", [
    (lambda: 0, 0, ""), (lambda: 1, 1, ""), (lambda: None, None, ""), (lambda: fail(KeyboardInterrupt()), 130, ""),
    (lambda: fail(UserError("no such thing")), 1, "no such thing"), (lambda: fail(MemoryError()), 1, "memory"),
    (lambda: fail(RuntimeError("not enough memory: you tried to allocate")), 1, "memory"),
    (lambda: fail(torch.OutOfMemoryError("CUDA out of memory.")), 1, "memory"),
    (lambda: open("/no/such/file"), 1, "/no/such/file")], ids=range(9))
def test_what_a_person_or_the_machine_did_wrong_becomes_one_line(main, code, text):
    with pytest.raises(SystemExit) as end:
        data.run_program(main)
    if text:  # sys.exit prints a text to stderr, and the code is 1
        assert text in end.value.code and len(end.value.code.splitlines()) == 1
    else:
        assert end.value.code == code


@pytest.mark.parametrize("text", ["a bug", "CUDA error: an illegal memory access was encountered"])
def test_a_bug_is_not_hidden(text):
    with pytest.raises(RuntimeError, match=text):
        data.run_program(lambda: fail(RuntimeError(text)))


def test_a_name_that_the_terminal_cannot_print_is_printed_escaped(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit):
        data.run_program(lambda: print("\u540d"))
    assert terminal.buffer.getvalue() == b"\\u540d\n"


def program(body, redirected):
    """Run `body` as the main() of a program whose streams the shell has redirected -> (exit code, stderr)."""
    code = f"import sys, data\ndef main():\n    {body}\ndata.run_program(main)"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}  # it would hide what comes late
    shell = ["bash", "-c", f'"$@" {redirected}; exit ${{PIPESTATUS[0]}}', "bash"]
    done = subprocess.run([*shell, sys.executable, "-c", code], cwd=os.path.dirname(data.__file__), env=environment,
                          stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    return done.returncode, done.stderr


@NOT_ON_WINDOWS
def test_a_closed_stdout_stops_no_program():
    assert program("print('x'); print('y', file=sys.stderr); return 0", ">&-") == (0, "y\n")


def test_without_stderr_nothing_goes_to_stdout_instead(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) as end:
        data.run_program(lambda: print("x", file=sys.stderr) or 1)
    assert end.value.code == 1 and capsys.readouterr().out == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("last, words", [("return 0", "No space left"), ("raise data.UserError('no such thing')", "")])
def test_a_full_disk_behind_stdout_gives_one_line(last, words):
    """The line tells of the disk, or of what went wrong before."""
    code, err = program(f"print('x'); {last}", "> /dev/full")
    assert code == 1 and len(err.splitlines()) == 1 and words in err


@NOT_ON_WINDOWS
@pytest.mark.parametrize("last", ["return 0", "raise data.UserError('no such thing')"])
def test_a_reader_that_leaves_early_gives_no_traceback(last):
    code, err = program(f"print('x'); sys.stdin.read(); {last}", "< <(sleep 1) | true")
    assert code == 1 and len(err.splitlines()) == ("UserError" in last)
