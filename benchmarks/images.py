"""MNIST's images, or random ones in their place."""

import numpy as np


def load(path: str | None, num_train: int, num_test: int) -> tuple[np.ndarray, np.ndarray]:
    """Return grey images of 28 x 28, 0 to 255, to train with and to test with.

    Args:
        path: an .npz with ``x_train`` and ``x_test``, as Keras publishes MNIST; None for images
            of independent pixels.
        num_train: at most so many.
        num_test: at most so many.
    """
    if path:
        with np.load(path) as file:
            return file["x_train"][:num_train], file["x_test"][:num_test]
    rng = np.random.default_rng(0)
    train, test = (
        np.uint8(255) * rng.binomial(1, 0.2, (number, 28, 28)).astype(np.uint8)
        for number in (num_train, num_test)
    )
    return train, test
