"""Where a correction that is loaded at run time comes from: a folder of this machine, a store, a model hub, an upload.

Invariant: whatever comes is read as JSON and safetensors, never unpickled, and no name that a caller sent becomes a
path, save that of a folder, which lies inside the root where there is one. What is wrong with it is an InvalidRequest.

    correction = read_named("runs/mine", "mine", root);  correction = read_files({"correction.json": file, ...}, None)
"""

import dataclasses
import logging
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from trimtab.errors import CorrectionError, InvalidRequest
from trimtab.steering.adapter import CONFIG_FILE, WEIGHTS_FILE
from trimtab.steering.correction import Correction
from trimtab.steering.folder import JSON_FILE, TENSORS_FILE, load

log = logging.getLogger(__name__)

FILES = (JSON_FILE, TENSORS_FILE, CONFIG_FILE, WEIGHTS_FILE)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def read_named(path: str, name: str | None, root: Path | None) -> Correction:
    """name: None for its own. path: a folder, which must lie inside the root where there is one, or a hub id.

    Without a root it may also be a URL that fsspec reads, where the package for its store is installed: s3://bucket/folder.
    """
    if not path.strip():
        raise InvalidRequest("path is empty: name a correction's folder", "path")
    if root is None and "://" in path:
        return _read_url(path, name)
    try:
        folder = Path(path).expanduser() if root is None else root / path
        inside = root is None or folder.resolve().is_relative_to(root.resolve())
        there = folder.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise InvalidRequest(f"path: {path} is no folder: {error}", "path") from error
    if not inside:
        raise InvalidRequest(f"path: {path} is outside of the folder that --corrections-root names", "path")
    if not there:
        if _HUB_ID.fullmatch(path) is None:
            raise InvalidRequest(f"path: there is no folder {path}", "path")
        folder = _download(path)
    return _read(folder, name, path)


def read_files(files: Mapping[str, IO[bytes]], name: str | None) -> Correction:
    """files: by their name in the folder, open at their start."""
    unknown = sorted(files.keys() - set(FILES))
    if unknown or not files:
        what = f"{unknown[0]!r} is none of them" if unknown else "none came"
        raise InvalidRequest(f"an upload's files are {', '.join(FILES)}: {what}", unknown[0] if unknown else None)
    if name is None and JSON_FILE not in files:
        raise InvalidRequest(f"name: an adapter without {JSON_FILE} has none of its own", "name")
    with tempfile.TemporaryDirectory(prefix="trimtab-upload-") as folder:
        for file in FILES:
            if file in files:
                with (Path(folder) / file).open("wb") as target:
                    shutil.copyfileobj(files[file], target)
        return _read(Path(folder), name, "the upload")


def rename(correction: Correction, name: str) -> Correction:
    """Raises InvalidRequest for what is no name."""
    try:
        return dataclasses.replace(correction, name=name)
    except CorrectionError as error:
        raise InvalidRequest(str(error), "name") from error


def _read(folder: Path, name: str | None, called: str) -> Correction:
    """called: what the caller knows the folder as."""
    try:
        correction = load(folder)
    except CorrectionError as error:
        raise InvalidRequest(str(error).replace(str(folder), called), "correction") from error
    except Exception as error:  # libraries raise what they like for files that somebody made up
        log.warning("a correction's files cannot be read", exc_info=error)
        raise InvalidRequest(f"{called} cannot be read: {type(error).__name__}", "correction") from error
    return correction if name is None else rename(correction, name)


def _read_url(url: str, name: str | None) -> Correction:
    import fsspec

    with tempfile.TemporaryDirectory(prefix="trimtab-fetch-") as folder:
        try:
            store, base = fsspec.url_to_fs(url)
            for file in FILES:
                if store.exists(f"{base}/{file}"):
                    store.get_file(f"{base}/{file}", f"{folder}/{file}")
        except Exception as error:  # each store raises what it likes
            raise InvalidRequest(f"path: {url} cannot be fetched: {error}", "path") from error
        return _read(Path(folder), name, url)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(FILES)))
    except Exception as error:  # the same
        message = f"path: there is no folder {hub_id}, and it cannot be fetched from the model hub: {error}"
        raise InvalidRequest(message, "path") from error
