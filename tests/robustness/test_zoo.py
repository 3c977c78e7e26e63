"""Every kind of file that a folder of pictures may hold, through infer.py and through training.

The zoo is made here: every mode in every format that Pillow writes, each also under a wrong extension, and the
files that hurt: cut off, empty, headers that promise gigapixels, pipes, loops of links. Allowed are a picture or
one line that names the file; not allowed are a traceback, a program that waits, an input that has changed.

    python -m pytest tests/robustness/test_zoo.py
"""
import hashlib
import io
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageCms

import data
from data import draw_scene
from test_files import png_header
from test_infer import network

TOP = Path(data.__file__).parent
MODES = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX", "RGBa", "La", "I;16"]
ON_THE_WAY = {"La": "LA", "RGBa": "RGBA", "PA": "P", "I;16": "L"}  # Pillow converts to these from there only
UNREADABLE = ["PDF"]  # Pillow writes it, but does not read it
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of formats that Pillow will drop


def encoded(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def animals():
    """(name, bytes, whether it must become a picture: True, False, or None for either)."""
    scene = draw_scene(1, 48, 32)
    Image.init()
    in_lab = ImageCms.profileToProfile(scene, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")
    ending = {kind: e for e, kind in reversed(Image.registered_extensions().items())}
    for mode in MODES:
        picture = in_lab if mode == "LAB" else scene.convert(ON_THE_WAY.get(mode, "RGB")).convert(mode)
        for kind in sorted(set(Image.SAVE) - set(UNREADABLE)):
            try:
                content = encoded(picture, kind)
            except Exception:  # most modes fit into some formats only
                continue
            stem = f"{mode.replace(';', '')} in {kind.lower()}"
            yield stem + ending.get(kind, ".bin"), content, None
            if mode == "RGB":
                yield stem + " called jpeg.jpg", content, None
    jpeg, png = encoded(draw_scene(2), "JPEG"), encoded(draw_scene(3), "PNG")
    for n in (0, 1, 10, len(jpeg) // 2):
        yield f"first {n} bytes.jpg", jpeg[:n], False
        yield f"first {n} bytes.png", png[:n], False
    yield "text.png", b"GIF is a format.\n" * 50, False
    yield "noise.webp", b"RIFF\xff\xff\xff\x7fWEBPVP8 " + bytes(range(256)), False
    yield "bomb.png", png_header(20_000, 20_000), False
    yield "bomb.jpg", jpeg[:jpeg.index(b"\xff\xc0") + 5] + struct.pack(">2H", 20_000, 20_000) + \
        jpeg[jpeg.index(b"\xff\xc0") + 9:], False
    yield "thin bomb.png", png_header(2 ** 31 - 1, 1), False
    for size in [(1, 1), (1, 5000), (5000, 1), (2, 3), (17, 33)]:
        yield "{}x{}.png".format(*size), encoded(scene.resize(size), "PNG"), True
    frames = [draw_scene(n, 48, 32) for n in range(4)]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        yield f"animated.{kind.lower()}", encoded(frames[0], kind, save_all=True, append_images=frames[1:]), True
    adobe = encoded(scene.convert("CMYK"), "JPEG")
    yield "adobe cmyk.jpg", adobe, True
    yield "adobe ycck.jpg", adobe.replace(b"Adobe\0d\0\0\0\0\0", b"Adobe\0d\0\0\0\0\2"), True
    yield "broken exif.jpg", encoded(scene, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 40), True
    for name, profile in [("lab", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()), ("broken", b"\xff" * 99)]:
        yield f"{name} profile.jpg", encoded(scene, "JPEG", icc_profile=profile), True
        yield f"{name} profile.png", encoded(scene, "PNG", icc_profile=profile), True
    if os.name != "nt":
        for name in ["with space", "it's", 'say "no"', "two\nlines", "名前 🖼", "-dash", "%s {x} \\n", "\x1b[31mred"]:
            yield name + ".png", encoded(scene, "PNG"), True


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """The folder, {path: must it be readable}, and a fingerprint of it."""
    folder = tmp_path_factory.mktemp("zoo") / "cage"
    folder.mkdir()
    inmates = {}
    for name, content, readable in animals():
        (folder / name).write_bytes(content)
        inmates[folder / name] = readable
    (folder / "folder.jpg").mkdir()
    (folder / "empty folder").mkdir()
    if os.name != "nt":
        os.symlink(folder, folder / "round and round")
        os.symlink("loop b.png", folder / "loop a.png")
        os.symlink("loop a.png", folder / "loop b.png")
        os.mkfifo(folder / "pipe.png")
        inmates.update({folder / n: False for n in ("loop a.png", "loop b.png", "pipe.png")})
        if os.geteuid():  # root may read everything
            locked = folder / "locked.png"
            locked.write_bytes(encoded(draw_scene(1, 48, 32), "PNG"))
            locked.chmod(0)
            inmates[locked] = False
    return folder, inmates


def fingerprint(folder):
    return {p: (os.lstat(p).st_mtime_ns, hashlib.sha256(p.read_bytes()).digest() if p.is_file() and os.access(p, os.R_OK)
                else None) for p in sorted(folder.iterdir())}


def program(name, *arguments):
    """Run to the end, within minutes and without a traceback -> (exit code, lines on stdout, lines on stderr)."""
    done = subprocess.run([sys.executable, str(TOP / name), *map(str, arguments)], capture_output=True, timeout=400,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    out, err = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in err, err
    return done.returncode, out.splitlines(), err.splitlines()


def test_infer_answers_every_file_with_a_picture_or_one_line(zoo, tmp_path):
    folder, inmates = zoo
    before = fingerprint(folder)
    draw_scene(9).save(tmp_path / "style.png")
    network(tmp_path / "net.pt")
    paths = list(inmates)
    code, made, refused = program("infer.py", "--weights", tmp_path / "net.pt", "--output", tmp_path / "out", "--refine", 0, "--",
                                  *paths, tmp_path / "style.png")
    assert code == 1 and fingerprint(folder) == before
    assert len(made) + len(refused) == len(paths) + 1 > 150  # and a line that says what is a photo and what the style
    assert f"{len(paths)} photos" in refused[0] and "--styles" in refused[0]
    complaints = "\n".join(refused)
    for path, readable in inmates.items():
        refusal = f"infer.py: {data.printable(path)}:" in complaints
        assert readable is None or refusal != readable, (path, complaints)
    # Of the formats that everybody uses, no mode may be refused.
    for kind in ("jpeg", "png", "tiff", "webp", "bmp", "gif"):
        assert f" in {kind}" not in complaints, complaints
    results = sorted((tmp_path / "out").iterdir())
    assert len(results) == len(made)
    for path in results:
        with Image.open(path) as picture:
            picture.load()
            assert picture.mode == "RGB"


def test_training_leaves_out_what_it_cannot_use_and_runs(zoo, tmp_path):
    folder, _ = zoo
    before = fingerprint(folder)
    code, out, err = program("train.py", *("--steps 3 --size 32 --width 4 --latent 8 --batch-size 8 --lpips 0 --device cpu "
                             "--workers 1 --style-from other --output").split(), tmp_path / "run", "--data", folder)
    assert code == 0 and fingerprint(folder) == before
    assert any("unreadable" in line for line in err) and any("done:" in line for line in out)
