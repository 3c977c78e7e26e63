"""The formulas that the tests compare with, in float64 numpy, written from the text books and not from the code.

This file imports nothing of the project. Pictures are arrays with the channels first, (3, ...) -> (3, ...): one
color (3,), a list of colors (3, N), a picture (3, H, W). sRGB lies in [0, 1], L in [0, 100]. Nothing is clipped.
"""
import math

import numpy as np

RGB_TO_XYZ = np.array([[.412453, .357580, .180423], [.212671, .715160, .072169], [.019334, .119193, .950227]])
D65 = np.array([.95047, 1, 1.08883])


def mix(matrix, x):
    return np.tensordot(matrix, np.asarray(x, np.float64), axes=1)


def linear(c):
    """sRGB -> light (IEC 61966-2-1)."""
    c = np.asarray(c, np.float64)
    return np.where(c > .04045, ((np.maximum(c, .04045) + .055) / 1.055) ** 2.4, c / 12.92)


def gamma(c):
    """Light -> sRGB."""
    return np.where(c > .0031308, 1.055 * np.maximum(c, .0031308) ** (1 / 2.4) - .055, 12.92 * c)


def lab(rgb):
    """sRGB (3, ...) -> L, a, b (3, ...) (CIE 15)."""
    t = mix(RGB_TO_XYZ / D65[:, None], linear(rgb))
    x, y, z = np.where(t > .008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def rgb(lab):
    """L, a, b (3, ...) -> sRGB (3, ...)."""
    L, a, b = np.asarray(lab, np.float64)
    y = (L + 16) / 116
    f = np.stack([y + a / 500, y, y - b / 200])
    xyz = np.where(f > .2068966, f ** 3, (f - 16 / 116) / 7.787)
    return gamma(mix(np.linalg.inv(RGB_TO_XYZ) * D65, xyz))


def wasserstein(ab, other, n, turn=0.):
    """Sliced Wasserstein-1 distance of two clouds (2, ...) of equally many points -> a number.

    The mean over n directions of the mean distance of the sorted projections.
    """
    total = 0
    for k in range(n):
        angle = (k + turn) * math.pi / n
        p, q = (np.sort(math.cos(angle) * x[0].ravel() + math.sin(angle) * x[1].ravel())
                for x in (np.asarray(ab, np.float64), np.asarray(other, np.float64)))
        total += np.abs(p - q).mean()
    return total / n


def means_of_2x2(x):
    """(C, H, W) -> (C, H/2, W/2)."""
    C, H, W = x.shape
    return x.reshape(C, H // 2, 2, W // 2, 2).mean((2, 4))


def convolve(x, weight, bias, edge):
    """A 3x3 convolution of (C, H, W) whose border is padded by numpy: edge is "constant" (zeros) or "edge"."""
    H, W = x.shape[1:]
    x = np.pad(x, [(0, 0), (1, 1), (1, 1)], mode=edge)
    parts = [np.tensordot(weight[:, :, i, j], x[:, i:i + H, j:j + W], axes=1) for i in range(3) for j in range(3)]
    return sum(parts) + bias[:, None, None]


def guided(lab, radius, eps):
    """The guided filter (He, Sun and Tang 2013) with L as the guide: L, a, b (3, H, W) -> slope, offset (2, H, W) each.

    Window by window, as the paper writes it; beyond the border the border repeats.
    """
    size, (H, W) = 2 * radius + 1, lab.shape[1:]

    def windows(x):
        x = np.pad(x, [(0, 0), (radius, radius), (radius, radius)], mode="edge")
        return np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2)).reshape(len(x), H, W, -1)

    L, ab = windows(lab[:1]), windows(lab[1:])                                         # (1 or 2, H, W, windows' pixels)
    covariance = ((L - L.mean(-1, keepdims=True)) * (ab - ab.mean(-1, keepdims=True))).mean(-1)
    slope = covariance / (L.var(-1) + eps)
    offset = ab.mean(-1) - slope * L.mean(-1)
    return windows(slope).mean(-1), windows(offset).mean(-1)
