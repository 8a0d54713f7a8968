"""Who may come in: API keys for the service, admin keys for changing what it serves.

Invariant: keys are compared by their digests, in constant time, and none is kept or told: the log names one by how its
digest begins. An admin key opens all that an API key opens; no API key opens what takes an admin key.

    keys = Keys(choose_keys(given, API_VARIABLE, file, "api-key"), admin);  holder = keys.admit(header, admin=False)
"""

import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path

from trimtab.errors import Forbidden, InvalidRequest, Unauthorized

API_VARIABLE, ADMIN_VARIABLE = "TRIMTAB_API_KEY", "TRIMTAB_ADMIN_KEY"


def choose_keys(given: Sequence[str] | None, variable: str, file: Path | None, flag: str) -> list[str]:
    """The keys of the flags and the file, else those of the environment, which commas or spaces separate.

    An empty key is refused: it would let everybody in. So is an empty file, which would leave the door open, and a key
    that no header can bring: it would let nobody in.
    """
    keys = [key.strip() for key in given or ()]
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"--{flag}-file {file} cannot be read: {error}", flag) from error
        keys += [line for line in lines if line and not line.startswith("#")] or [""]
    elif not keys and variable in os.environ:
        keys = os.environ[variable].replace(",", " ").split() or [""]
    look = f"look at --{flag}, --{flag}-file and {variable}"
    if not all(keys):
        raise InvalidRequest(f"a key must not be empty: {look}", flag)
    if not all(key.isascii() and key.isprintable() for key in keys):
        raise InvalidRequest(f"a key must be printable ASCII, as it travels in a header: {look}", flag)
    return keys


class Keys:
    """No API keys: everybody is let in. No admin keys: nobody may change anything."""

    def __init__(self, api: Sequence[str] = (), admin: Sequence[str] = ()) -> None:
        self._api, self._admin = ([_digest(key) for key in keys] for keys in (api, admin))

    def admit(self, authorization: str, admin: bool) -> bytes | None:
        """What stands for the API key that was sent; None where that is none. admin: whether it takes an admin key.

        Raises Unauthorized, and Forbidden where no admin key is configured.
        """
        if admin and not self._admin:
            raise Forbidden("this server changes nothing at run time: it was started without an admin key")
        key = _bearer(authorization)
        given = _digest(key) if key else b""
        fits = [hmac.compare_digest(given, digest) for digest in self._admin]
        ours = [hmac.compare_digest(given, digest) for digest in self._api]
        if any(fits) or not (admin or self._api):
            return None
        if admin:
            raise Unauthorized("this takes the admin key: send `Authorization: Bearer ADMIN-KEY`")
        if not any(ours):
            raise Unauthorized("the API key is missing or wrong: send `Authorization: Bearer KEY`")
        return given


def name_of(authorization: str) -> str | None:
    """What the log calls the key in this header: the first of `printf %s KEY | sha256sum`; None where there is none."""
    key = _bearer(authorization)
    return _digest(key).hex()[:8] if key else None


def _bearer(authorization: str) -> str:
    scheme, _, key = authorization.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
