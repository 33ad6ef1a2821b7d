"""The folder of a saved posterior: written whole or not at all, and checked when it is read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from numpyro_vae.saving.codec import Json

__all__ = ["SavedPosteriorError"]

FORMAT = 2
KIND = "numpyro_vae.Posterior"
MANIFEST, ARRAYS = "manifest.json", "arrays.safetensors"


class SavedPosteriorError(ValueError):
    """A folder is no saved posterior, or has been changed, or is of a later version."""


def write_folder(path: Path, content: dict[str, Json], arrays: dict[str, np.ndarray]) -> None:
    """Write a folder that does not exist yet, with one file of arrays.

    Args:
        path: the folder; those above it are made.
        content: of the manifest.
        arrays: by name.

    Raises:
        FileExistsError: if it exists.
        PermissionError: if it may not be written.
    """
    write_files(path, {"kind": KIND, "format": FORMAT, **content}, {ARRAYS: save_arrays(arrays)})


def write_files(
    path: Path, content: dict[str, Json], files: Mapping[str, bytes]
) -> dict[str, Json]:
    """Write files into a folder that does not exist yet, and a manifest with their fingerprints.

    Args:
        path: the folder; those above it are made.
        content: of the manifest.
        files: what is in the others, by name.

    Returns:
        The manifest.

    Raises:
        FileExistsError: if it exists.
        PermissionError: if it may not be written.
    """
    require_new(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # renamed when it is complete
    manifest = {**content, "fingerprints": {name: _hash(data) for name, data in files.items()}}
    manifest["fingerprints"][MANIFEST] = _hash_of_manifest(manifest)
    text = json.dumps(manifest, indent=1, allow_nan=False)
    try:
        part.mkdir(parents=True)
        for name, data in files.items():
            _write(part / name, data)
        _write(part / MANIFEST, text.encode())
        os.rename(part, path)
    except PermissionError as error:
        raise PermissionError(
            f"{path} cannot be written: {error.strerror}. Save into a folder of your own."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return manifest


def require_new(path: Path) -> None:
    """Raise FileExistsError if a folder exists."""
    if path.exists():
        raise FileExistsError(
            f"{path} exists, and nothing is overwritten. Save into another folder, or remove it."
        )


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_folder(path: Path) -> tuple[dict[str, Json], dict[str, np.ndarray]]:
    """Return the content of the manifest, and the arrays.

    Raises:
        FileNotFoundError: if there is no such folder.
        SavedPosteriorError: if it is not as it was written, or not by this version or an older one.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}. Pass the folder that Posterior.save wrote.")
    manifest = _parse(path, _read(path, MANIFEST))
    known, data = manifest["fingerprints"], _read(path, ARRAYS)
    if _hash(data) != known[ARRAYS]:
        raise _changed(path / ARRAYS)
    try:
        return manifest, load_arrays(data)
    except SafetensorError as error:
        raise _changed(path / ARRAYS) from error


def _read(path: Path, name: str) -> bytes:
    try:
        return (path / name).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise SavedPosteriorError(
            f"{path} has no file {name}, so it is not a saved posterior, or not all of one. Pass a "
            "folder that Posterior.save wrote."
        ) from None


def _parse(path: Path, data: bytes) -> dict[str, Json]:
    """Return the manifest, if it is one."""
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _changed(path / MANIFEST) from error
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise SavedPosteriorError(
            f"{path / MANIFEST} is not that of a saved posterior. Pass a folder that Posterior.save"
            " wrote."
        )
    version = manifest.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise SavedPosteriorError(
            f"{path} has format {version}, of a later version of numpyro_vae; this version reads "
            f"formats up to {FORMAT}. Upgrade numpyro_vae."
        )
    known = manifest.get("fingerprints")
    if not isinstance(known, dict) or known.get(MANIFEST) != _hash_of_manifest(manifest):
        raise _changed(path / MANIFEST)
    return manifest


def _changed(path: Path) -> SavedPosteriorError:
    return SavedPosteriorError(
        f"{path} is cut short, or has been changed since it was saved. Copy the folder again from "
        "where it is whole, or save the posterior once more."
    )


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _hash_of_manifest(manifest: dict[str, Any]) -> str:
    """Return the fingerprint of all of a manifest but this fingerprint."""
    known = {name: x for name, x in manifest["fingerprints"].items() if name != MANIFEST}
    text = json.dumps({**manifest, "fingerprints": known}, sort_keys=True)
    return _hash(text.encode())
