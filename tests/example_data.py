"""Small simulated files in the forms in which the examples read their data."""

import pathlib

import numpy as np
from scipy.io import savemat
from scipy.sparse import csr_matrix

RNG = np.random.default_rng(0)


def radon(path: pathlib.Path) -> None:
    """200 houses in 12 counties, of which the last has one."""
    county = np.append(RNG.integers(0, 11, 199), 11)
    floor = RNG.integers(0, 2, 200)
    level = RNG.normal(1.4, 0.4, 12)[county] - 0.6 * floor + RNG.normal(0, 0.7, 200)
    names = np.array([f"County {number}" for number in range(12)])
    np.savez(path, county=county, floor=floor, log_radon=level, county_names=names)


amortize_check_repair = compare_radon = radon


def deep_markov(path: pathlib.Path) -> None:
    """Chorales of 20 to 60 chords."""
    parts = {}
    for name, number in (("train", 16), ("valid", 4), ("test", 4)):
        rolls = np.empty((1, number), object)
        for place in range(number):
            rolls[0, place] = (RNG.random((RNG.integers(20, 60), 88)) < 0.05).astype(np.uint8)
        parts[f"{name}data"] = rolls
    savemat(path, parts)


def single_cell(path: pathlib.Path) -> None:
    """100 cells of two kinds, 80 genes of which 60 vary, 12 proteins."""
    kind = RNG.integers(0, 2, 100)
    means = np.exp(RNG.normal(size=(2, 80)))[kind] * RNG.gamma(5, 0.5, (100, 1))
    protein = RNG.poisson(20 + 30 * kind[:, None] * np.ones(12))
    np.savez(path, counts=RNG.poisson(means), protein=protein, hvg=np.arange(80) < 60)


def topics(path: pathlib.Path) -> None:
    """500 documents of 60 words out of 80, on two topics."""
    words = RNG.dirichlet(np.full(80, 0.5), 2) * 0.9 + 0.1 / 80
    shares = RNG.beta(0.5, 0.5, (500, 1)) * (words[0] - words[1]) + words[1]
    counts = csr_matrix(np.stack([RNG.multinomial(60, p / p.sum()) for p in shares]))
    parts = {"data": counts.data, "indices": counts.indices, "indptr": counts.indptr}
    vocab = np.array([f"word{number}" for number in range(80)])
    np.savez(path, **parts, shape=np.array(counts.shape), vocab=vocab)


def item_response(path: pathlib.Path) -> None:
    """150 people and 5 questions."""
    right = RNG.normal(size=(150, 1)) + RNG.normal(size=5) + RNG.logistic(size=(150, 5)) > 0
    np.savetxt(path, right, fmt="%d", delimiter=",", header=",".join("ABCDE"), comments="")


def tutorial_cvae(path: pathlib.Path) -> None:
    """Grey images of 28 x 28 pixels with a bright square, 128 to train and 64 to test with."""
    images = RNG.integers(0, 100, (192, 28, 28), dtype=np.uint8)
    for image, (row, column) in zip(images, RNG.integers(2, 18, (192, 2)), strict=True):
        image[row : row + 8, column : column + 8] = 250
    parts = {"x_train": images[:128], "x_test": images[128:]}
    np.savez(path, **parts, y_test=RNG.integers(0, 10, 64))
