"""Where a remote reward is and how patient its client is, and what no config may hold: secrets.

All of it is checked when a config is read: what a config holds ends in the run directory, the model
card and the log.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

import pydantic.dataclasses
from pydantic import Field, ValidationError

from tiltflow.core.paths import nearest
from tiltflow.core.settings import plain
from tiltflow.rewards.remote.limits import REQUEST_IMAGES

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Kind = TypeVar("Kind", bound="DataclassInstance")

REMOTE, JUDGE = "remote:", "judge:"
ELSEWHERE = (REMOTE, JUDGE)
"""How the names of rewards begin that another process computes."""
TOKEN_VARIABLE = "TILTFLOW_REWARD_TOKEN"
"""The environment variable of the token, for server and client: so that it is in no recipe, no
run directory and no list of processes."""
DAY = 86400.0
MOST_SERVERS = 100
"""Of a pool."""

_USER = re.compile(r"[a-z][a-z0-9+.-]*:/+[^/\s]*@", re.IGNORECASE)
_SECRET = "(?:[a-z]+[_-])?(?:token|api_?key|passw(?:or)?d|pwd|secret|credentials?|signature)"
_REMOTE = re.compile(r"remote:[^\s'\"]*[@?#]")
_QUERY = re.compile(rf"[?&;#]{_SECRET}=", re.IGNORECASE)
_OPTION = re.compile(
    "(?:access|auth|hf|bearer|client|api)?[_-]?(?:token|api_?key|password|passwd|secret)"
    "|credentials?|authorization",
    re.IGNORECASE,
)
_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9_.])?")
_HARMLESS = re.compile(r"[\w.:/\[\]-]{0,200}", re.ASCII)


def refuse_secrets(given: Any, key: str = "") -> None:
    """Passes settings (text, or mappings and lists of them) that hold no password and no token.

    Raises:
        ValueError: naming the key, and never the secret: an address with a user, a password or a
            token in it, or text under a key that is called like a secret.
    """
    if isinstance(given, str) and any(p.search(given) for p in (_USER, _QUERY, _REMOTE)):
        place = f" ({key})" if key else ""
        raise ValueError(
            f"an address in the settings{place} has a user, password or token in it, which the "
            f"run directory would keep; a reward server's token belongs in {TOKEN_VARIABLE}"
        )
    if isinstance(given, Mapping):
        for name, value in given.items():
            refuse_secrets(str(name), key)
            inner = f"{key}.{name}" if key else str(name)
            if isinstance(value, str) and _OPTION.fullmatch(str(name)):
                raise ValueError(
                    f"{inner} looks like a secret, which the run directory would keep: have it "
                    "read from an environment variable"
                )
            refuse_secrets(value, inner)
    if isinstance(given, list | tuple):
        for value in given:
            refuse_secrets(value, key)


@dataclass(frozen=True)
class Address:
    """The parts of `remote:http[s]://HOST[:PORT]/[…/]NAME`; `base` is what stands before NAME."""

    secure: bool
    host: str
    port: int | None
    base: str
    name: str

    @classmethod
    def of(cls, text: str) -> Address:
        """The parts of an address.

        Raises:
            ValueError: if it is none, or has more in it (a user, password, query): not repeated
                then, because it may hold a secret.
        """
        if any(mark in text for mark in "@?#"):
            raise ValueError(
                "the address of a remote reward is to be host, port and name alone "
                f"({REMOTE}http://HOST:PORT/NAME); a token belongs in the environment variable "
                f"{TOKEN_VARIABLE}"
            )
        shown = repr(text) if _HARMLESS.fullmatch(text) else "what is given"
        wrong = ValueError(
            f"{shown} is no address of a remote reward: write {REMOTE}http://HOST:PORT/NAME, or "
            f"{REMOTE}NAME with the option servers"
        )
        try:
            parts = urlsplit(text.removeprefix(REMOTE))
            host = parts.hostname or ""
        except ValueError:
            raise wrong from None
        try:
            port = parts.port
        except ValueError:
            port = 0
        base, _, last = parts.path.rpartition("/")
        name = unquote(last)
        if parts.scheme not in ("http", "https") or not _is_host(host):
            raise wrong
        if not name or not name.isprintable() or len(name) > 200 or not _HARMLESS.fullmatch(base):
            raise wrong
        if port == 0:
            raise ValueError(f"the port of remote reward {name!r} is to be 1 to 65535")
        return cls(parts.scheme == "https", host, port, base, name)

    @property
    def url(self) -> str:
        """The address without `remote:`, for messages."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port is None else f":{self.port}"
        return f"http{'s' if self.secure else ''}://{host}{port}{self.base}/{self.name}"


def column_of(name: str) -> str:
    """What a reward's scores stand under in an evaluation: of one behind a server its name there,
    without the address."""
    try:
        return Address.of(name).name if name.startswith(REMOTE) else name
    except ValueError:  # the name alone, of several servers
        return name.removeprefix(REMOTE)


def _is_host(host: str) -> bool:
    if ":" not in host:
        return bool(_HOST.fullmatch(host)) and ".." not in host
    try:
        return bool(ipaddress.IPv6Address(host))
    except ValueError:
        return False


@pydantic.dataclasses.dataclass(
    frozen=True, config=pydantic.ConfigDict(strict=True, allow_inf_nan=False)
)
class Settings:
    """How patient a client is.

    An attempt may take `timeout` seconds in all. `retries` more follow one that failed in spite
    of a server at the address. While there is none, the client waits, for at most `patience`
    seconds (None: without end). A request holds at most `batch` images. `servers` are those of a
    pool, each as http[s]://HOST[:PORT].

    Raises:
        ValueError: if a value makes no sense.
    """

    timeout: Annotated[float, Field(gt=0, le=DAY)] = 120.0
    retries: Annotated[int, Field(ge=0, le=1000)] = 3
    patience: Annotated[float, Field(ge=0, le=1000 * DAY)] | None = None
    batch: Annotated[int, Field(ge=1, le=REQUEST_IMAGES)] = 16
    servers: Annotated[list[str], Field(min_length=1, max_length=MOST_SERVERS)] | None = None


def remote_settings(name: str, options: Mapping[str, Any]) -> Settings:
    """The client's settings from a reward's options; `remote:NAME` has the option servers.

    Raises:
        ValueError: if the reward's name is no address of a server, or an option is unknown or
            makes no sense.
    """
    if "servers" not in options:
        Address.of(name)
    settings = options_of(Settings, name, options)
    if settings.servers is not None:
        pool_addresses(name, settings.servers)
    return settings


def options_of(
    kind: type[Kind], name: str, options: Mapping[str, Any], needs: Mapping[str, str] | None = None
) -> Kind:
    """A reward's options as a dataclass that pydantic checks; `needs` says what those are that must
    be there.

    Raises:
        ValueError: naming the first option that is unknown, missing or makes no sense.
    """
    known = [field.name for field in fields(kind)]
    for key in options:
        if key not in known:
            raise ValueError(f"reward {name!r} has no option {key!r}{nearest(key, known)}")
    for key, what in (needs or {}).items():
        if key not in options:
            raise ValueError(f"reward {name!r} needs the option {key}, {what}")
    try:
        return kind(**options)
    except ValidationError as error:
        first = error.errors()[0]
        wrong = plain(first["msg"]).replace("Input should", "must")
        raise ValueError(
            f"reward {name!r}: option {first['loc'][0]} is {first['input']!r}, but it {wrong}"
        ) from error


def pool_addresses(name: str, servers: Sequence[str]) -> list[Address]:
    """Where the reward `remote:NAME` of a pool is, a place a server.

    Raises:
        ValueError: if the name has an address in it, or a server is no address, or is given twice.
    """
    own = name.removeprefix(REMOTE)
    if not own or not own.isprintable() or len(own) > 200 or any(mark in own for mark in "/@?#"):
        raise ValueError(
            f"the reward that option servers is given for is to be named {REMOTE}NAME, and its "
            "servers' addresses stand in the option alone"
        )
    places: list[Address] = []
    for number, server in enumerate(servers, start=1):
        try:
            place = Address.of(f"{server.rstrip('/')}/{quote(own, safe=':')}")
        except ValueError:
            raise ValueError(
                f"reward {name!r}: option servers, number {number}, is to be host and port alone, "
                f"such as http://127.0.0.1:8000; a token belongs in {TOKEN_VARIABLE}"
            ) from None
        if place in places:
            raise ValueError(f"reward {name!r}: option servers has {place.url} twice")
        places.append(place)
    return places
