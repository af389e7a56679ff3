"""Atomic file writes, and checksums."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from darwinlm.errors import UserError

OTHER_CHECKSUM = "its checksum has changed"
_CHECKSUMS = "checksums.json"

_SEAL = "checksum"
_NEW_RUN = "start the run again in a new folder"
_UNREADABLE = "cannot be read"
_PLACE_FAULTS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
)
"""Errors of the output location, not of our code."""


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` atomically: a crash leaves the old file or the new one, never a part.

    Raises:
        UserError: if the disk is full or the folder cannot be written.
    """
    draft = path.with_name(path.name + ".draft")
    with naming_disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open_new(draft) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


def open_new(path: Path) -> BinaryIO:
    """Open a new file, replacing any existing one; if that is a link, its target is not touched."""
    path.unlink(missing_ok=True)
    return open(path, "xb")


def write_json(path: Path, payload: Mapping[str, Any], *, sealed: bool = False) -> None:
    """Write `payload` as JSON atomically; equal payloads give equal bytes.

    A `sealed` file ends with a checksum of its content, which `read_json` verifies.
    """
    if sealed:
        payload = {**payload, _SEAL: checksum(_as_text(payload).encode())}
    write_bytes(path, _as_text(payload).encode())


def read_json(path: Path, remedy: str = _NEW_RUN) -> dict[str, Any]:
    """Read a JSON object written by this package.

    Raises:
        UserError: if it is missing or damaged; the message ends with `remedy`, the action to take.
    """
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(payload, dict):
            raise ValueError("not a JSON object")
        seal = payload.pop(_SEAL, None)
        if seal is not None and seal != checksum(_as_text(payload).encode()):
            raise ValueError(OTHER_CHECKSUM)
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, error, remedy) from None
    return payload


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file written by this package. Raises UserError if it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise damaged(path, error) from None


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file written by this package. Raises UserError if it is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise damaged(path, error) from None


def checksum(content: bytes) -> str:
    """Return the checksum (BLAKE2b, 128 bits) of `content`; protects against damage, not against tampering."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def file_checksum(path: Path) -> str:
    """Return the `checksum` of a file of any size, in about a second per GB in the page cache. Raises OSError."""
    sums = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            sums.update(chunk)
    return sums.hexdigest()


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files in `folder` into it, for `find_fault`."""
    sums = {file.name: file_checksum(file) for file in sorted(folder.iterdir())}
    write_json(folder / _CHECKSUMS, sums, sealed=True)


def find_fault(folder: Path) -> str | None:
    """Describe the first file in `folder` that is damaged or missing since `write_checksums`; None if there is none.

    Raises:
        UserError: if a file exists but cannot be read.
    """
    index = folder / _CHECKSUMS
    try:
        sums = read_json(index)
    except UserError as error:
        if index.exists() and not os.access(index, os.R_OK):
            raise
        return str(error).removesuffix(f"; {_NEW_RUN}")
    for name, expected in sums.items():
        fault = fault_of(folder, name, expected)
        if fault is not None and fault.startswith(_UNREADABLE):
            raise UserError(f"{folder / name} {fault}; make it readable, or delete {folder}")
        if fault is not None:
            return f"{folder / name} {fault}"
    return None


def fault_of(folder: Path, name: str, expected: str) -> str | None:
    """Describe what is wrong with the file `name` in `folder`, given its expected checksum; None if nothing is."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return "is outside its folder"
    try:
        return None if file_checksum(folder / name) == expected else "is damaged"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"{_UNREADABLE} ({error.strerror or error})"


def _as_text(payload: Mapping[str, Any]) -> str:
    return json.dumps(payload, indent=1, allow_nan=False) + "\n"


def damaged(path: Path, reason: object, remedy: str = _NEW_RUN) -> UserError:
    """Return the error that `path` is damaged or missing, with its `reason`; `remedy` is the action to take."""
    if isinstance(reason, FileNotFoundError):
        return UserError(f"{path} is missing; {remedy}")
    return UserError(f"{path} is damaged ({reason}); {remedy}")


@contextmanager
def naming_disk_faults(path: Path) -> Iterator[None]:
    """Turn disk errors, such as a full disk or a read-only folder, into a UserError that names `path`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = _errno(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full while writing {path}; free some space and run the same command again"
            ) from None
        if number in _PLACE_FAULTS:
            raise UserError(f"{path} cannot be written: {os.strerror(number)}") from None
        raise


def _errno(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # safetensors reports disk errors only as text.
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a draft file that replaces `path` when the block succeeds, and is removed when it fails."""
    draft = path.with_name(path.name + ".draft")
    with naming_disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
            with open(draft, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a draft folder that replaces `path` when the block succeeds, and is removed when it fails."""
    draft = path.with_name(path.name + ".draft")
    with naming_disk_faults(path):
        shutil.rmtree(draft, ignore_errors=True)
        try:
            draft.mkdir(parents=True)
            yield draft
            for file in draft.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
            shutil.rmtree(path, ignore_errors=True)
            os.replace(draft, path)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise


def digest(*parts: bytes | str) -> str:
    """Return a short fingerprint of `parts`: 32 hex digits of SHA-256."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()[:32]
