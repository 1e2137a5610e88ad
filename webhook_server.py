#!/usr/bin/env python3
"""Appointment webhook receiver: takes appointment events over HTTP and keeps each of them for good in SQLite.

    python3 webhook_server.py              serve on 127.0.0.1:8000 into appointments.db
    python3 webhook_server.py --help       every command and setting

    from webhook_server import Config, WebhookServer
    with WebhookServer(Config(port=0, database="events.db"), on_event=print) as server:
        print(server.url)

One file, the standard library, Python 3.9 or newer. It reads in the order in which an event flows; each
section uses only those above it:

    Config         settings: flags, environment and defaults out of one list
    JSON           bytes to a value, strictly by RFC 8259
    Formats        a text to whether it is a timestamp, a date, an address, a match of a pattern
    Schema         JSON Schema draft 2020-12, compiled once
    Events         a value to an AppointmentEvent, or to what is wrong with it
    Work           threads that loop, a clock for small jobs, the breaker
    System         the system's libraries: libcrypto
    At rest        personal columns encrypted with the operator's keys
    Files          the files of an SQLite database, and who else changes them
    Tables         rows of one transaction, and files of other versions that become ours
    SQLite         events in one file
    Store          one commit for all who wait, over any engine; who commits answers
    Ledger         who looked, and seals that show whether anything was changed since
    Log            lines without patients' data, written in the background
    HTTP           bytes to a head and a body, an answer to bytes
    Credentials    does a signature or a token prove what it says
    Access         who may do what: clients, keys, roles, tenants, networks, rates
    Endpoints      what each route answers, and which rules it is judged by
    TLS            certificates, and a connection over TLS that is used as a plain one
    Connections    sockets and threads: the poller that leads, limits
    Service        puts the parts together: tenants, start, reload, drain, stop
    Command line   serve, check, send, keygen, verify, purge, rekey, bench
"""
# mypy: ignore-errors
# (mypy reports nothing of our inside to a program that imports us; what such a program uses is typed.)
from __future__ import annotations

import sys

if sys.version_info < (3, 9) and __name__ == "__main__":
    sys.stderr.write("webhook_server.py: needs Python 3.9 or newer, this is %d.%d\n" % sys.version_info[:2])
    sys.exit(2)
try:
    import argparse
    import atexit
    import base64
    import binascii
    import bisect
    import builtins
    import contextlib
    import csv
    import dataclasses
    import difflib
    import email.utils
    import errno
    import functools
    import gc
    import getpass
    import hashlib
    import hmac
    import http.client
    import importlib
    import inspect
    import io
    import ipaddress
    import itertools
    import json
    import logging
    import math
    import operator
    import os
    import queue
    import re
    import secrets
    import select
    import selectors
    import shutil
    import signal
    import socket
    import sqlite3
    import struct
    import subprocess
    import tempfile
    import threading
    import time
    import traceback
    from array import array
    from collections import Counter, deque
    from datetime import datetime, timedelta, timezone
    from decimal import Decimal
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from json.encoder import encode_basestring_ascii
    from pathlib import Path, PurePath
    from typing import Any, Callable, Iterable, Iterator, NamedTuple, Optional, Sequence, Union
    from urllib.parse import quote_plus, unquote, unquote_to_bytes, urlencode, urljoin, urlsplit
except ImportError as error:            # Debian's python3-minimal, or a Python that was built without SQLite
    if __name__ != "__main__":
        raise
    sys.stderr.write(f"webhook_server.py: {sys.executable} lacks {error.name} of Python's standard library; "
                     "install all of it (on Debian and Ubuntu: apt install python3)\n")
    sys.exit(2)
try:
    import fcntl
    import resource
except ImportError:                     # Windows
    fcntl = resource = None
try:
    import ctypes
    import ctypes.util
except ImportError:                     # a Python that was built without libffi
    ctypes = None
try:
    import ssl
except ImportError:                     # a Python that was built without OpenSSL
    ssl = None

__version__ = "1.0.0"


class SetupError(Exception):
    """What the operator has to mend before the service can start: one line for who sits there, exit 2.

    One about a setting begins with its name, for which as_given() puts the flag or variable that was used.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, 2000))


def printable(text: str, longest: int = 200) -> str:
    """`text` for one line: shortened, and without what ends lines, moves cursors or turns text around."""
    if len(text) > longest:
        text = text[:longest] + "…"
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def reason_of(error: BaseException) -> str:
    """What an error says, without its number and file name: "No such file or directory"."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def advised_reason_of(error: BaseException) -> str:
    """reason_of(), and what the operator can do where the limit of open files is the reason."""
    is_limit = getattr(error, "errno", None) == errno.EMFILE
    return reason_of(error) + ": raise the limit of open files (ulimit -n)" * is_limit


# =============================================================================
# Config: every setting once; flags, environment, --help and defaults come from it. Knows none of its users.
# =============================================================================

DEFAULT_SCHEMA_FILE = Path(__file__).resolve().with_name("schema.json")
MOST = 2 ** 40                          # of a whole number whose setting names no limit

PathText = Union[str, "os.PathLike[str]"]


def _text(value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)) or not str(value) or "\0" in str(value):
        raise ValueError("must be text, not empty and without NUL")
    return str(value)


def _optional_text(value: Any) -> str:
    return "" if value == "" else _text(value)


def _host(value: Any) -> str:
    """A name or an address. One of IPv6 may stand in brackets, as it does in a URL."""
    text = _text(value)
    inside = re.fullmatch(r"\[([0-9A-Fa-f:.]+(%[\w.-]+)?)\]", text)
    return inside[1] if inside else text


def _whole(low: int, high: int = MOST) -> Callable[[Any], int]:
    expected = f"of at least {low}" if high == MOST else f"from {low} to {high}"

    def parse(value: Any) -> int:
        # int() alone would take "+5" and "1_0"
        is_number = re.fullmatch("[0-9]{1,19}", str(value)) and not isinstance(value, bool)
        if not is_number or not low <= int(value) <= high:
            raise ValueError(f"must be a whole number {expected}")
        return int(value)
    return parse


def _seconds(value: Any) -> float:
    is_number = re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", str(value))
    if isinstance(value, bool) or not is_number or float(value) <= 0:
        raise ValueError("must be a number of seconds above 0, such as 2 or 0.5")
    return float(value)


def _one_of(choices: str) -> Callable[[Any], str]:
    """`choices` are separated by "|"."""
    known = {choice.lower(): choice for choice in choices.split("|")}

    def parse(value: Any) -> str:
        choice = known.get(str(value).lower())
        if choice is None:
            raise ValueError(f"must be one of {', '.join(known.values())}")
        return choice
    return parse


def _yes_or_no(value: Any) -> bool:
    choice = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
    if str(value).lower() not in choice:
        raise ValueError("must be yes or no")
    return choice[str(value).lower()]


def _list_of(pattern: str, what: str) -> Callable[[Any], tuple]:
    def parse(value: Any) -> tuple:
        texts = [value] if isinstance(value, str) else value
        items = []
        for text in filter(None, texts):
            items += [item.strip().lower() for item in _text(text).split(",") if item.strip()]
        if not all(re.fullmatch(pattern, item) for item in items):
            raise ValueError(f"must be {what}")
        return tuple(items)
    return parse


def _networks(value: Any) -> tuple:
    items = _list_of(r"[0-9a-f.:]+(/[0-9]+)?", "a network such as 10.0.0.0/28")(value)
    for item in items:
        ipaddress.ip_network(item)
    return items


def checked(parse: Callable[[Any], Any], value: Any, where: str) -> Any:
    """parse(value). Raises SetupError that names `where` the value came from."""
    try:
        return parse(value)
    except (ValueError, TypeError) as error:
        raise SetupError(f"{where}: {error}") from None


def _setting(default: Any, help: str, parse: Callable[[Any], Any] = _text, metavar: str = "TEXT",
             group: str = "", **more: Any) -> Any:
    """A field of Config. `group` opens a group of --help, for this setting and those that follow."""
    return dataclasses.field(default=default, metadata={
        "help": help, "parse": parse, "metavar": metavar, "group": group, **more})


def _choice(default: str, choices: str, help: str) -> Any:
    return _setting(default, help, _one_of(choices), choices)


def _file(default: str, help: str, parse: Callable[[Any], str], group: str = "", unset: Optional[Path] = None,
          beside: Callable[[Config], Iterable[str]] = lambda config: (), kind: str = "") -> Any:
    """A setting that names a file; being declared so is what makes Config.check_files() look after it.

    `unset` is the file that counts where it is empty, `beside` gives the endings of files that go with it.
    Settings of one `kind` may name the same file.
    """
    return _setting(default, help, parse, "FILE", group, file=(unset, beside, kind))


def _rotated(config: Config) -> Iterable[str]:
    return [f".{number}" for number in range(1, config.log_backups + 1)]


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one service, checked when made. Seconds and bytes are plain numbers.

    Raises SetupError that names the setting and says what it must be.
    """
    host: str = _setting("127.0.0.1", "address to listen on; 0.0.0.0 is every IPv4 address, :: every address",
                         _host, group="where it listens")
    port: int = _setting(8000, "port to listen on; 0 takes a free one", _whole(0, 65535), "N")
    database: PathText = _file(
        "appointments.db", "SQLite file, made if missing; relative to the current folder", _text,
        group="events", beside=lambda config: ("-wal", "-shm", "-journal"))
    schema: PathText = _file(
        "", "JSON Schema of an event (default: schema.json beside the program)", _optional_text,
        unset=DEFAULT_SCHEMA_FILE)
    duplicates: str = _choice(
        "conflict", "conflict|ok",
        "answer to an event that comes again unchanged: 409 (conflict) or 200 (ok)")
    # Senders give up after 5 s or so: 2 s leaves them the time to hear the 503
    busy_timeout: float = _setting(
        2.0, "how long an event waits for a locked database, then it gets 503", _seconds, "SECONDS")
    log_file: PathText = _file(
        "", "write the log here instead of to stderr", _optional_text, group="log", beside=_rotated)
    log_max_bytes: int = _setting(
        10 * 1024 * 1024, "size at which the log file is rotated", _whole(4096), "BYTES")
    log_backups: int = _setting(5, "rotated log files to keep", _whole(1, 1000), "N")
    log_level: str = _choice("INFO", "DEBUG|INFO|WARNING|ERROR", "lowest level to log")
    log_payloads: str = _choice(
        "redacted", "redacted|full|none",
        "payloads in the log: without patients' data, whole (and texts of exceptions), or not at all")
    max_request_line: int = _setting(
        8192, "longest request line, a longer one gets 414; the default is Apache's", _whole(64), "BYTES",
        group="limits of size and number")
    max_header_bytes: int = _setting(
        16384, "largest header section, a larger one gets 431", _whole(256), "BYTES")
    max_header_fields: int = _setting(
        100, "most header fields, more get 431; the default is Apache's", _whole(1), "N")
    max_body: int = _setting(
        1024 * 1024, "largest request body, a larger one gets 413", _whole(1, 2 ** 30), "BYTES")
    max_connections: int = _setting(
        512, "most connections at once, further ones get 503", _whole(1, 100000), "N")
    max_connections_per_address: int = _setting(
        128, "most connections at once from one address, further ones get 503", _whole(1, 100000), "N")
    header_timeout: float = _setting(
        10.0, "time a sender has for the head of a request, then 408", _seconds, "SECONDS",
        group="limits of time")
    body_timeout: float = _setting(
        30.0, "time a sender has for a body, then 408; also for taking a piece of an answer",
        _seconds, "SECONDS")
    # Proxies keep an idle connection for 60 s (nginx, AWS), and it must be they who close it: where we do it
    # first, the request that is on its way just then is lost
    idle_timeout: float = _setting(
        75.0, "how long a connection may be idle between requests; must be longer than a proxy keeps it",
        _seconds, "SECONDS")
    shutdown_timeout: float = _setting(
        10.0, "how long a stop waits for requests in flight, and then for on_event", _seconds, "SECONDS")
    clients: PathText = _file(
        "", "who may do what: a JSON file, see README; without it everybody may do everything", _optional_text,
        group="who may send and read")
    tls_cert: PathText = _file(
        "", "serve HTTPS with this certificate (PEM, with those that lead to its authority)", _optional_text,
        kind="TLS")
    tls_key: PathText = _file(
        "", "its private key (default: in the certificate's file)", _optional_text, kind="TLS")
    tls_client_ca: PathText = _file(
        "", "ask for client certificates of these authorities; a client's entry names the one it takes",
        _optional_text, kind="TLS")
    trusted_proxy: Sequence[str] = _setting(
        (), "network of the proxies in front of us, such as 10.0.0.0/28: only these and this machine may "
        "connect, unless with --tls-cert, and they say whose request it is (repeat, or separate with commas)",
        _networks, "NETWORK")
    encryption_key_file: PathText = _file(
        "", "encrypt what is personal with the first key of this file; lines of ID:BASE64, made by keygen --encryption",
        _optional_text)
    retention_days: int = _setting(
        0, "remove events so many days after they came; 0 keeps all", _whole(0, 100000), "N")
    access_log_retention_days: int = _setting(
        0, "the same for the rows of the access log", _whole(0, 100000), "N")
    insecure: bool = _setting(
        False, "let other machines connect without --clients or without TLS (as a variable: yes)", _yes_or_no, "")
    rate_limit: int = _setting(
        0, "requests a second for one address that is no known client; 0 is no limit", _whole(0, 1000000), "N")
    allowed_host: Sequence[str] = _setting(
        (), "host name to answer to, beside local names and every IP address (repeat, or separate with "
        "commas); by default all names, but none while only this machine can connect",
        _list_of(r"[\w.-]+|\[[0-9a-f:.]+\]", "a host name without scheme or port"), "HOST")
    allowed_origin: Sequence[str] = _setting(
        (), "web origin whose pages may send requests, such as https://desk.example (repeat, or separate "
        "with commas)", _list_of(r"https?://[^/,\s]+", "an origin such as https://desk.example"), "ORIGIN")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = checked(field.metadata["parse"], getattr(self, field.name), field.name)
            object.__setattr__(self, field.name, value)

    @classmethod
    def read(cls, flags: dict, environment: dict) -> Config:
        """Settings out of flags ({name: text or None}), else WEBHOOK_NAME in the environment, else defaults.

        A variable that is empty counts as not set, and so does one that a container system made:
        strange_variables() tells of it. In the text of a SetupError, as_given() names the flag or variable.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        given = {name: _source_of(name, flags, environment)[1] for name in names}
        return cls(**{name: value for name, value in given.items() if value is not None})

    def check_files(self) -> None:
        """Each setting that names a file has one of its own, in a folder that exists. Raises SetupError.

        Looks, and opens and makes nothing. A log that is the database too would be written into it, and its
        rotation would move the database away.
        """
        owners = {_identity(__file__): "this program"}
        for field in dataclasses.fields(self):
            unset, beside, kind = field.metadata.get("file", (None, None, ""))
            path, name = str(getattr(self, field.name) or unset or ""), field.name
            if not path or beside is None:
                continue
            check_place(name, path)
            files, owner = _files_of(path, beside(self)), kind or f"the {name.replace('_', ' ')} ({path})"
            for identity, file in files.items():
                if owners.get(identity, owner) != owner:
                    raise SetupError(f"{name}: {file} belongs to {owners[identity]}; name another file")
            owners.update(dict.fromkeys(files, owner))


def _files_of(path: str, endings: Iterable[str]) -> dict:
    """{identity: path} of a file and of those that go with it.

    SQLite's lie beside what a link leads to, those of the log beside the link.
    """
    paths = [origin + ending for origin in (os.path.realpath(path), path) for ending in ("", *endings)]
    return {_identity(each): each for each in paths}


def _identity(path: str) -> tuple:
    """Equal for all names of one file, through links of both kinds, and for all names that it would get."""
    with contextlib.suppress(OSError):
        found = os.stat(path)
        if found.st_ino:                # 0 on file systems that number nothing
            return found.st_dev, found.st_ino
    return (os.path.normcase(os.path.realpath(path)),)


def check_place(name: str, path: str) -> None:
    """Raises SetupError where `path` is no file, or would lie in a folder that does not exist.

    A log may go to a pipe or a device, such as /dev/stderr. All else would wait there without end.
    """
    if os.path.isdir(path):
        raise SetupError(f"{name}: {path} is a folder and not a file")
    if name != "log_file" and os.path.exists(path) and not os.path.isfile(path):
        raise SetupError(f"{name}: {path} is a pipe or a device and no file")
    folder = os.curdir
    try:
        folder = os.path.dirname(os.path.realpath(path))    # fails in a folder that was removed
        os.stat(folder)
    except FileNotFoundError:
        raise SetupError(f"{name}: the folder {folder} does not exist; make it first") from None
    except OSError:                     # who opens the file says it better
        pass


def flag_of(name: str) -> str:
    """The flag of a setting: busy_timeout is --busy-timeout."""
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    """The environment variable of a setting: busy_timeout is WEBHOOK_BUSY_TIMEOUT."""
    return "WEBHOOK_" + name.upper()


def _source_of(name: str, flags: dict, environment: dict) -> tuple:
    """(flag or variable, value) of a setting: what was given, or (flag, None)."""
    variable = variable_of(name)
    value = environment.get(variable)
    if flags.get(name) is None and value and not LINK_VALUE.match(value):
        return variable, value
    return flag_of(name), flags.get(name)


def as_given(message: str, flags: dict, environment: dict) -> str:
    """The message of a SetupError with the flag or variable of the setting that it begins with."""
    name = re.match(r"\w*", message)[0]
    if name not in (field.name for field in dataclasses.fields(Config)):
        return message
    return _source_of(name, flags, environment)[0] + message[len(name):]


def did_you_mean(word: str, names: Iterable[str], spell: Callable[[str], str] = str) -> str:
    """Advice for who wrote `word`: which name begins so or is spelt nearly so, or where to find them."""
    near = [name for name in names if word and name.startswith(word)]
    near += difflib.get_close_matches(word, names, 1)
    if near:
        return f"did you mean {spell(near[0])}?"
    return "--help shows those that exist"


# For a service called "webhook" or "webhook-…" Kubernetes and Docker set variables in every container that
# look like ours: WEBHOOK_PORT=tcp://10.96.0.12:8000, WEBHOOK_PORT_8000_TCP_ADDR, WEBHOOK_SERVICE_HOST
LINK_VALUE = re.compile(r"(tcp|udp|sctp)://")
LINK_NAME = re.compile(r"WEBHOOK_(NAME|ENV_\w+|(\w+_)?SERVICE_(HOST|PORT(_\w+)?)|"
                       r"(\w+_)?PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")


def strange_variables(flags: dict, environment: dict) -> list[str]:
    """A warning for each WEBHOOK_… variable that does not count: misspelt, or made by a container system.

    What a container system made is no matter where a flag is given, which would win anyway.
    """
    names = [field.name for field in dataclasses.fields(Config)]
    warnings = []
    for variable, value in sorted(environment.items()):
        if not variable.upper().startswith("WEBHOOK_") or not value:
            continue
        # Without the beginning that all have in common, and that would make them all look alike
        name = variable[len("WEBHOOK_"):].lower()
        is_ours, is_link = name in names and variable == variable_of(name), LINK_VALUE.match(value)
        if is_ours and is_link and flags.get(name) is None:
            warnings.append(f"{variable}={value} is not taken: Kubernetes and Docker make such a variable "
                            f"for a service called webhook; use {flag_of(name)} to set it")
        if not is_ours and not is_link and not LINK_NAME.fullmatch(variable):
            warnings.append(f"the environment variable {variable} is no setting and is not read; "
                            f"{did_you_mean(name, names, variable_of)}")
    return warnings


# =============================================================================
# JSON: bytes to a value, strictly by RFC 8259. Knows nothing of schemas or events.
# =============================================================================

MAX_DEPTH = 64          # .NET's limit; the C scanner recurses, so this also keeps small thread stacks whole
# objects and arrays: a megabyte of them takes 20 MB and holds the interpreter for 100 ms
MAX_CONTAINERS = 10000
MAX_NUMBER = 100        # characters: int() of a million digits takes seconds

_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
# The closing quote is optional: a pattern that insisted on it would start again at every quote of a text
# without one, which takes minutes
_TOKEN = re.compile(r'"(?:[^"\\]+|\\.)*"?|[{}\[\]]|[-+.\w]+', re.DOTALL)
_MARK = re.compile(r'"(?:[^"\\]+|\\.)*"?|[{}\[\]]', re.DOTALL)
_SUSPECT = re.compile(r"\\u(?:0000|[dD][89a-fA-F])").search      # U+0000 or half of a surrogate pair, perhaps
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)


class JSONError(ValueError):
    """Text that is not JSON, or JSON that we do not take.

    `reason` never repeats the text; `line` and `column` count from 1.
    """

    def __init__(self, reason: str, text: str, position: int) -> None:
        self.reason = reason
        self.line = text.count("\n", 0, position) + 1
        self.column = position - (text.rfind("\n", 0, position) + 1) + 1
        super().__init__(f"Invalid JSON: {reason} at line {self.line} column {self.column}")


class _Fault(Exception):
    """The scanner met something that `inspect_json` will find and name."""


def _members(pairs: list) -> dict:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _Fault
    return members


def _integer(text: str) -> int:
    if len(text) > MAX_NUMBER:
        raise _Fault
    return int(text)


def _float(text: str) -> float:
    if len(text) > MAX_NUMBER or math.isinf(float(text)):
        raise _Fault
    return float(text)


def _constant(name: str) -> None:
    raise _Fault


_SCAN = json.JSONDecoder(object_pairs_hook=_members, parse_int=_integer, parse_float=_float,
                         parse_constant=_constant).scan_once


def parse_json(body: bytes, most: int = MAX_CONTAINERS) -> tuple:
    """(value, text) of a UTF-8 body that is one JSON value by RFC 8259.

    Refused beyond the grammar, with JSONError: duplicate names, U+0000 and lone surrogates in strings (no
    database keeps them faithfully), depth over 64, numbers over 100 characters or out of a double's range,
    and more than `most` objects and arrays.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        before = body[:error.start].decode()
        raise JSONError("the text is not UTF-8", before, len(before)) from None
    # The ordinary event has neither; what has is read by the slow reader first, before the C scanner recurses
    brackets = text.count("{") + text.count("[")
    if "\\u" in text and _SUSPECT(text) or brackets > MAX_DEPTH and _is_too_much(text, most):
        inspect_json(text, most)
    start = 0
    if text[:1] != "{":
        start = _SPACE.match(text).end()
    try:
        value, end = _SCAN(text, start)
    except StopIteration as stop:
        raise JSONError(_reason_of(text, "expecting a value"), text, stop.value) from None
    except json.JSONDecodeError as error:
        reason = error.msg.split(": ")[0].removesuffix(" at").removesuffix(" starting")
        raise JSONError(_reason_of(text, reason[:1].lower() + reason[1:]), text, error.pos) from None
    except _Fault:
        inspect_json(text, most)
        raise JSONError("something is not JSON", text, 0) from None
    if end != len(text):
        end = _SPACE.match(text, end).end()
        if end != len(text):
            raise JSONError("more text after the JSON value", text, end)
    return value, text


def _is_too_much(text: str, most: int) -> bool:
    """Whether there are more than `most` objects and arrays, or some deeper than MAX_DEPTH."""
    depth = 0
    for mark in _MARK.finditer(text):
        word = mark.group()
        if word in ("{", "["):
            depth, most = depth + 1, most - 1
            if depth > MAX_DEPTH or most < 0:
                return True
        elif depth and word in ("}", "]"):
            depth -= 1
    return False


def _reason_of(text: str, otherwise: str) -> str:
    """Why nothing of `text` can be read, where that is more than the scanner's word for it."""
    if not text.strip(" \t\n\r"):
        return "the text is empty, expected a JSON value"
    if text[0] == "\ufeff":
        return "the text starts with a byte order mark (BOM), expected plain UTF-8"
    if "\0" in text[:2]:
        return "the text seems to be UTF-16 or UTF-32, expected UTF-8"
    return otherwise


def inspect_json(text: str, most: int = MAX_CONTAINERS) -> None:
    """Raise JSONError for the first thing that parse_json refuses beyond the grammar. Slow."""
    containers: list = []                           # for each that is open its names so far, None in an array
    for token in _TOKEN.finditer(text):
        word, at = token.group(), token.start()
        if word in ("{", "["):
            containers.append({"{": set(), "[": None}[word])
            if len(containers) > MAX_DEPTH:
                raise JSONError(f"nested deeper than {MAX_DEPTH} levels", text, at)
            most -= 1
            if most < 0:
                raise JSONError("too many objects and arrays", text, at)
        elif word in ("}", "]"):
            if containers:
                containers.pop()
        elif word[0] == '"':
            _inspect_string(text, word, at)
            names = containers[-1] if containers else None
            if names is not None and text.startswith(":", _SPACE.match(text, token.end()).end()):
                _inspect_name(text, word, at, names)
        elif len(word) > 2:
            _inspect_word(text, word, at)


def _inspect_word(text: str, word: str, at: int) -> None:
    number = _NUMBER.match(word)
    if number and len(number.group()) > MAX_NUMBER:
        raise JSONError(f"a number longer than {MAX_NUMBER} characters", text, at)
    if number and math.isinf(float(number.group())):
        raise JSONError("a number out of range", text, at)
    if word.startswith(("NaN", "Infinity", "-Infinity")):
        raise JSONError("NaN and Infinity are not JSON", text, at)


def _inspect_name(text: str, word: str, at: int, names: set) -> None:
    try:
        name = json.loads(word) if "\\" in word else word[1:-1]
    except ValueError:                                  # the scanner will say it better
        return
    if name in names:
        raise JSONError("a member name that the object already has", text, at)
    names.add(name)


def _inspect_string(text: str, word: str, at: int) -> None:
    high = None                                         # where a high surrogate waits for its low one
    for escape in _ESCAPE.finditer(word) if "\\u" in word else ():
        code = int(escape.group(1), 16) if escape.group(1) else -1
        if high is not None and not (0xDC00 <= code <= 0xDFFF and escape.start() == high + 6):
            break
        if code == 0:
            raise JSONError("U+0000 in a string", text, at + escape.start())
        if high is None and 0xDC00 <= code <= 0xDFFF:
            high = escape.start()
            break
        high = escape.start() if 0xD800 <= code <= 0xDBFF else None
    if high is not None:
        raise JSONError("half of a surrogate pair in a string", text, at + high)


# =============================================================================
# Formats: timestamps, formats and regular expressions: a text to whether it is one. Knows nothing of JSON.
# =============================================================================

LONGEST_REGEX = 1000    # characters of one in a payload (format: regex): read at some 2 us a character

# -- timestamps

# Spellings that need no calendar: valid as they stand, and (the first) canonical as they stand
_SURE = (r"(?!000[01]|9999)[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])"
         r"T(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]")
_ORDINARY_TIMESTAMP = re.compile(_SURE + "Z").fullmatch
_VALID_TIMESTAMP = re.compile(_SURE + r"(?:\.[0-9]{1,9})?(?:Z|[-+](?:[01][0-9]|2[0-3]):[0-5][0-9])").fullmatch
_TIMESTAMP = re.compile(r"""
    (?P<year>[0-9]{4}) (?: -(?P<month>[0-9]{2})-(?P<day>[0-9]{2}) | (?P<month2>[0-9]{2})(?P<day2>[0-9]{2})
                         | -?W(?P<week>[0-9]{2})-?(?P<weekday>[1-7]) | -?(?P<ordinal>[0-9]{3}) )
    [Tt\ ]
    (?P<hour>[0-9]{2})
    (?: :(?P<minute>[0-9]{2}) (?: :(?P<second>[0-9]{2}) (?:[.,](?P<fraction>[0-9]{1,9}))? )?
      | (?P<minute2>[0-9]{2}) (?: (?P<second2>[0-9]{2}) (?:[.,](?P<fraction2>[0-9]{1,9}))? )? )?
    (?: [Zz] | (?P<sign>[-+])(?P<offset_hour>[0-9]{2})(?: :?(?P<offset_minute>[0-9]{2}) )? )?
    """, re.VERBOSE)


def canonical_timestamp(text: str) -> str:
    """The instant of an ISO 8601 date-time, in UTC, one spelling for each: 2025-01-10T14:00:00Z.

    Takes calendar, week and ordinal dates, extended or basic, T or a space, 1 to 9 fraction digits (trailing
    zeros are dropped), any offset (none is UTC), 24:00:00, and second 60 where UTC can have a leap second.
    Raises ValueError. Does not use datetime.fromisoformat, which takes other texts on each Python.
    Hot path: the ordinary spelling is recognised as a whole and is its own canonical form (0.3 against 4 us).
    """
    if _ORDINARY_TIMESTAMP(text):
        return text
    match = _TIMESTAMP.fullmatch(text)
    if not match:
        raise ValueError("not an ISO 8601 date-time")
    part = match.groupdict()
    hour, minute = int(part["hour"]), int(part["minute"] or part["minute2"] or 0)
    second = int(part["second"] or part["second2"] or 0)
    fraction = (part["fraction"] or part["fraction2"] or "").rstrip("0")
    offset_hour, offset_minute = int(part["offset_hour"] or 0), int(part["offset_minute"] or 0)
    midnight = hour == 24 and not minute and not second and not fraction
    if not (hour < 24 or midnight) or minute > 59 or second > 60 or offset_hour > 23 or offset_minute > 59:
        raise ValueError("not a time of day")
    offset = timedelta(hours=offset_hour, minutes=offset_minute)
    if part["sign"] == "-":
        offset = -offset
    try:
        moment = _date(part) + timedelta(hours=hour, minutes=minute, seconds=min(second, 59)) - offset
    except OverflowError:
        raise ValueError("outside the years 0001 to 9999") from None
    if second == 60 and (moment.hour, moment.minute) != (23, 59):
        raise ValueError("a leap second is only at 23:59:60 UTC")
    whole = (f"{moment.year:04d}-{moment.month:02d}-{moment.day:02d}"
             f"T{moment.hour:02d}:{moment.minute:02d}:{second:02d}")
    return f"{whole}.{fraction}Z" if fraction else whole + "Z"


def _date(part: dict) -> datetime:
    year = int(part["year"])
    if part["week"]:
        if not 1 <= int(part["week"]) <= 53:
            raise ValueError("no such week")
        day = datetime.strptime(f"{year:04d}-{part['week']}-{part['weekday']}", "%G-%V-%u")
        if day.isocalendar()[1] != int(part["week"]):
            raise ValueError("no such week in that year")
        return day
    if part["ordinal"]:
        day = datetime(year, 1, 1) + timedelta(days=int(part["ordinal"]) - 1)
        if day.year != year:
            raise ValueError("no such day in that year")
        return day
    return datetime(year, int(part["month"] or part["month2"]), int(part["day"] or part["day2"]))


# -- formats: text to whether it is one

_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOSTNAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")
_IPV4 = re.compile(r"(?:(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])(?:\.(?!\Z)|\Z)){4}")
_UUID = re.compile("[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}")
_BAD_TILDE = re.compile("~(?![01])").search
_BAD_PERCENT = re.compile("%(?![0-9A-Fa-f]{2})").search
_DURATION = re.compile(r"P(?!\Z)(?:[0-9]+W|(?:[0-9]+Y(?:[0-9]+M(?:[0-9]+D)?)?|[0-9]+M(?:[0-9]+D)?|[0-9]+D)?"
                       r"(?:T(?:[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?|[0-9]+M(?:[0-9]+S)?|[0-9]+S))?)")
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_EMAIL = re.compile(rf'(?:{_ATOM}(?:\.{_ATOM})*|"(?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\[\x20-\x7e])*")@'
                    r"(?:\[(?P<literal>[^\]]*)\]|(?P<host>[^@\[]*))")
# Single classes, with % looked at apart: a repeated group of a megabyte would take 200 MB of backtracking
_PLAIN = "A-Za-z0-9._~!$&'()*+,;=-"
_URI = re.compile(rf"[A-Za-z][A-Za-z0-9+.-]*:(?://(?:[%:{_PLAIN}]*@)?"
                  rf"(?:\[(?P<ip6>[0-9A-Fa-f:.]+)\]|\[[vV][0-9A-Fa-f]+\.[:{_PLAIN}]+\]|[%{_PLAIN}]*)"
                  rf"(?::[0-9]*)?(?:/[%:@/{_PLAIN}]*)?|(?!//)[%:@/{_PLAIN}]*)"
                  rf"(?:\?[%:@/?{_PLAIN}]*)?(?:#[%:@/?{_PLAIN}]*)?")
_DATE_TIME = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\\.[0-9]+)?"
                        "(?:[Zz]|[-+][0-9]{2}:[0-9]{2})")


def _raises_nothing(function: Callable, text: str) -> bool:
    try:
        function(text)
        return True
    except (ValueError, OverflowError):
        return False


def _is_iso8601(text: str) -> bool:
    return _VALID_TIMESTAMP(text) is not None or _raises_nothing(canonical_timestamp, text)


def _is_date_time(text: str) -> bool:
    """RFC 3339 section 5.6: a subset of ISO 8601 but for the number of fraction digits and the year 0000."""
    if _VALID_TIMESTAMP(text):
        return True
    if not _DATE_TIME.fullmatch(text) or text[11:13] == "24":
        return False
    # The same calendar, in years that no offset leaves
    shifted = str(int(text[:4]) % 400 + 2000) + text[4:]
    return _raises_nothing(canonical_timestamp, re.sub(r"\.[0-9]+", "", shifted))


def _is_ipv6(text: str) -> bool:
    return re.fullmatch("[0-9A-Fa-f:.]+", text) is not None and _raises_nothing(ipaddress.IPv6Address, text)


def _is_email(text: str) -> bool:
    if len(text) > 320:                                 # RFC 5321 section 4.5.3.1: 64 + @ + 255
        return False
    match = _EMAIL.fullmatch(text)
    if not match:
        return False
    literal = match.group("literal")
    if literal is None:
        return _HOSTNAME.fullmatch(match.group("host")) is not None
    if literal[:5].lower() == "ipv6:":
        return _is_ipv6(literal[5:])
    return _IPV4.fullmatch(literal) is not None


def _is_uri(text: str) -> bool:
    if _BAD_PERCENT(text):
        return False
    match = _URI.fullmatch(text)
    return match is not None and (match.group("ip6") is None or _is_ipv6(match.group("ip6")))


def _fullmatch(pattern: re.Pattern) -> Callable[[str], bool]:
    return lambda text: pattern.fullmatch(text) is not None


# name: (check, what a message asks for)
FORMATS = {
    "iso8601": (_is_iso8601, "an ISO 8601 date-time, for example 2025-01-10T14:00:00Z"),
    "date-time": (_is_date_time, "an RFC 3339 date-time with offset, for example 2025-01-10T14:00:00Z"),
    "date": (lambda text: _is_date_time(text + "T00:00:00Z"), "a date, for example 2025-01-10"),
    "time": (lambda text: _is_date_time("2000-06-30T" + text), "a time with offset, for example 14:00:00Z"),
    "duration": (_fullmatch(_DURATION), "an ISO 8601 duration, for example PT30M"),
    "email": (_is_email, "an e-mail address"),
    "uuid": (_fullmatch(_UUID), "a UUID"),
    "uri": (_is_uri, "a URI with scheme"),
    "ipv4": (_fullmatch(_IPV4), "an IPv4 address"),
    "ipv6": (_is_ipv6, "an IPv6 address"),
    "hostname": (_fullmatch(_HOSTNAME), "a host name"),
    "json-pointer": (lambda text: text[:1] in ("", "/") and not _BAD_TILDE(text), "a JSON Pointer"),
    "regex": (lambda text: len(text) <= LONGEST_REGEX and _raises_nothing(_Regex, text),
              f"an ECMA-262 regular expression of at most {LONGEST_REGEX} characters"),
}

# -- patterns: ECMA-262 with the flag u, told to Python's re

DEEPEST_GROUP = 50      # groups within groups of a regular expression
_ECMA_SPACE = "\\t-\\r \xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
_ECMA_NOT_SPACE = ("\\x00-\\x08\\x0e-\\x1f!-\x9f\xa1-\u167f\u1681-\u1fff\u200b-\u2027\u202a-\u202e"
                   "\u2030-\u205e\u2060-\u2fff\u3001-\ufefe\uff00-\U0010ffff")
_ECMA_GROUP = re.compile(r"\((?:\?(?:[:=!]|<[=!]|<(?P<name>[A-Za-z_$][A-Za-z0-9_$]*)>))?")
_ECMA_QUANTIFIER = re.compile(r"(?:[*+?]|\{(?P<low>[0-9]+)(?P<more>,(?P<high>[0-9]*))?\})\??")
_ECMA_ESCAPE = re.compile(
    r"\\(?:(?P<pair>u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})|u(?P<u>[0-9a-fA-F]{4})"
    r"|u\{(?P<point>0*[0-9a-fA-F]{1,6})\}|x(?P<x>[0-9a-fA-F]{2})|c(?P<control>[A-Za-z])"
    r"|k<(?P<name>[A-Za-z_$][A-Za-z0-9_$]*)>|(?P<property>[pP]\{[A-Za-z0-9_]+(?:=[A-Za-z0-9_]+)?\})"
    r"|(?P<number>[1-9][0-9]*)|(?P<nul>0(?![0-9]))|(?P<class>[dDwWsS])|(?P<border>[bB])|(?P<same>[fnrtv])"
    r"|(?P<sign>[^A-Za-z0-9]))", re.DOTALL)
_ECMA_SIGNS = {".": ("one", "[^\n\r\u2028\u2029]"), "^": ("start", "^"), "$": ("end", r"\Z")}


class _Term(NamedTuple):
    """A piece of a regular expression.

    `kind` is "one" (a character that `text`, in Python's words, matches), "again" (what the group called
    `text` has matched before), "in turn" and "either" (of all `parts`), "repeat" (of one part, `low` to
    `high` times), "look" (around), "start", "end" or "border" (places).
    """
    kind: str
    text: str = ""
    parts: tuple = ()
    low: int = 1
    high: float = 1


class _Regex:
    """One regular expression by ECMA-262 (flag u), read once.

    `text` is Python's for it, `term` what it consists of, `groups` are the terms of its groups by name and
    number. Nothing is compiled, so that a hostile one costs no more than its length. Raises ValueError.
    """

    def __init__(self, source: str) -> None:
        self._source, self._at = source, 0
        self._texts: list = []
        self._opened = 0                                # groups with a number, so far
        self._references: list = []                     # names and numbers of groups
        self.groups: dict = {}
        self.property = ""                              # the first \p{...}, which is valid and not supported
        self.term = self._read()
        for reference in self._references:
            if reference not in self.groups:
                raise ValueError(f"no group {printable(reference, 40)} to refer to")
        self.text = "".join(self._texts)

    def _read(self) -> _Term:
        open_groups: list = []                          # for each: its names, branches and terms around it
        branches: list = []
        terms: list = []
        while self._at < len(self._source):
            char = self._source[self._at]
            if char == "(":
                open_groups.append((self._open_group(), branches, terms))
                branches, terms = [], []
                if len(open_groups) > DEEPEST_GROUP:
                    raise ValueError(f"groups nested deeper than {DEEPEST_GROUP} levels")
            elif char == ")":
                if not open_groups:
                    raise ValueError("a ) without its (")
                group = _either([*branches, terms])
                names, branches, terms = open_groups.pop()
                if names is None:
                    group = _Term("look", parts=(group,))
                else:
                    self.groups.update(dict.fromkeys(names, group))
                terms.append(group)
                self._put(char, 1)
            elif char == "|":
                branches.append(terms)
                terms = []
                self._put(char, 1)
            elif _ECMA_QUANTIFIER.match(self._source, self._at):
                self._quantify(terms)
            elif char == "[":
                terms.append(self._class())
            elif char == "\\":
                terms.append(self._escape()[0])
            else:
                terms.append(_Term(*_ECMA_SIGNS.get(char, ("one", re.escape(char)))))
                self._put(terms[-1].text, 1)
        if open_groups:
            raise ValueError("a ( without its )")
        return _either([*branches, terms])

    def _put(self, text: str, length: int) -> None:
        """`text` stands for the next `length` characters of the source."""
        self._texts.append(text)
        self._at += length

    def _open_group(self) -> Optional[list]:
        """Its number and its name, as far as it has them; None where it only looks around."""
        match = _ECMA_GROUP.match(self._source, self._at)
        text, name = match.group(), match.group("name")
        if text == "(" and self._source.startswith("(?", self._at) or name in self.groups:
            raise ValueError("a group that ECMA-262 does not know")
        if name:
            text = f"(?P<{name.replace('$', '_dollar_')}>"
        self._put(text, match.end() - match.start())
        if text[-1] in "=!":
            return None
        names: list = []
        if text != "(?:":
            self._opened += 1
            names = [str(self._opened)] + [name] * bool(name)
        self.groups.update(dict.fromkeys(names))        # known, though not closed yet
        return names

    def _quantify(self, terms: list) -> None:
        match = _ECMA_QUANTIFIER.match(self._source, self._at)
        # What may be repeated; a*+ and a** are not ECMA-262
        if not terms or terms[-1].kind not in ("one", "again", "in turn", "either"):
            raise ValueError("nothing to repeat")
        low, high = {"*": (0, INFINITE), "+": (1, INFINITE), "?": (0, 1)}.get(match.group()[0], (0, 0))
        if match.group("low"):
            low = high = float(match.group("low"))
            if match.group("more"):
                high = float(match.group("high") or INFINITE)
        if low > high:
            raise ValueError("a repeat whose least number is above its most")
        terms[-1] = _Term("repeat", parts=(terms[-1],), low=low, high=high)
        self._put(match.group(), match.end() - match.start())

    def _class(self) -> _Term:
        start = len(self._texts)
        negated = self._source.startswith("[^", self._at)
        self._put("[^" if negated else "[", 1 + negated)
        while not self._source.startswith("]", self._at):
            first = self._class_character()
            if self._source.startswith("-", self._at) and not self._source.startswith("-]", self._at):
                self._put("-", 1)
                last = self._class_character()
                if first is None or last is None or first > last:
                    raise ValueError("a range whose ends are not two characters in order")
        if len(self._texts) == start + 1:               # nothing in it
            self._texts[start] = "[\\s\\S]" if negated else "(?!)"
            self._at += 1
        else:
            self._put("]", 1)
        return _Term("one", "".join(self._texts[start:]))

    def _class_character(self) -> Optional[str]:
        """Take one member of a class; None where it stands for several characters."""
        if self._at >= len(self._source):
            raise ValueError("a character class [ without its ]")
        char = self._source[self._at]
        if char == "\\":
            return self._escape(True)[1]
        self._put(re.escape(char), 1)
        return char

    def _escape(self, in_class: bool = False) -> tuple:
        """(term, the character that it stands for or None) of the escape that begins here."""
        match = _ECMA_ESCAPE.match(self._source, self._at)
        if not match:
            raise ValueError(f"the escape {printable(self._source[self._at:self._at + 2])} is not ECMA-262")
        kind, value, char = match.lastgroup, match.group(match.lastgroup), None
        if in_class and (kind in ("name", "number") or value == "B"):
            raise ValueError(f"the escape {printable(match.group())} is not allowed in a character class")
        if kind == "class":
            term = _Term("one", _class_escape(value, in_class))
        elif kind == "border" and not in_class:
            term = _Term("border", "\\" + value)
        elif kind == "property":
            self.property = self.property or match.group()
            term = _Term("one", ".")
        elif kind in ("name", "number"):
            self._references.append(value)
            text = f"(?:\\{value})"
            if kind == "name":
                text = f"(?P={value.replace('$', '_dollar_')})"
            self._put(text, len(match.group()))
            return _Term("again", value), None
        else:
            char = _escaped_character(kind, value)
            term = _Term("one", re.escape(char))
        self._put(term.text, match.end() - match.start())
        return term, char


INFINITE = float("inf")


def _either(branches: list) -> _Term:
    sequences = tuple(_Term("in turn", parts=tuple(terms)) for terms in branches)
    return _Term("either", parts=sequences)


def _class_escape(value: str, in_class: bool) -> str:
    if value in "sS":
        text = {"s": _ECMA_SPACE, "S": _ECMA_NOT_SPACE}[value]
        return text if in_class else f"[{text}]"
    return "\\" + value                                 # the same with re.ASCII


def _escaped_character(kind: str, value: str) -> str:
    if kind in ("same", "border"):                      # [\b] is a backspace
        return {"f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "b": "\b"}[value]
    if kind == "sign":
        return value
    if kind == "pair":
        return json.loads(f'"\\{value}"')
    if kind == "control":
        return chr(ord(value) % 32)
    if int(value, 16) > 0x10FFFF:
        raise ValueError("a code point above U+10FFFF")
    return chr(int(value, 16))


# -- patterns that may take for ever. Python's re tries every way through one before it says no. How many ways
# there can be is read off its position automaton (Glushkov): exponentially many where a state leads back to
# itself by one text in two ways, as in (a+)+; a power of the length where one loop leads to the next by what
# both take, as in \d+\d+ (Weber and Seidl, On the degree of ambiguity of finite automata, 1991). That tells
# how fast the steps grow; how many they are is counted on short texts.

MOST_STEPS = 2_000_000  # of re for one match, at 1 to 50 ns: what may hold the interpreter, 2 to 100 ms
LARGE_TEXT = 100_000    # characters: what takes fewer steps than MOST_STEPS with as many is not bounded
LONGEST_DOUBLING = 20   # characters, where each may double the steps: 2 ** 20 is half of MOST_STEPS
SHORT_TEXT = 300        # characters of the texts on which steps are counted
WRITTEN_OUT = 300       # states of a repeat that is looked at turn by turn; a larger one counts as endless
MOST_LOOKS = 500_000    # at states of one pattern: what takes more counts as dangerous
MOST_STATES = 5000
_BORDERS = "\x80\xa0\u1680\u2000\u200b\u2028\u202a\u202f\u205f\u3000\ufeff\uff00"
_REWRITES = {
    "exponential": "it repeats what is itself repeated or can be read in many ways, as in (a+)+ or (a|a)*; "
                   "write each repeat once, a+, or put between them what none of them takes, as in a+(-a+)*",
    "power": "repeats that take the same characters follow each other, as in .*.*x or \\d+\\d+$; "
             "make one of them, or put between them what none of them takes, as in [^@]+@[^@]+",
    "start": "it may begin anywhere with a repeat; begin it with ^",
    "large": "it is too large to be looked through; write several shorter ones into anyOf or allOf",
}


class _TooLarge(Exception):
    """More states than anybody wants to look at."""


class _Automaton:
    """The states of a regular expression: one for each character that it can take, in each of its places."""

    def __init__(self, regex: _Regex) -> None:
        # One character of each range that the pattern may tell from others: its ends and what is beside them
        codes = {*range(128), *map(ord, _BORDERS + regex.text)}
        self._alphabet = "".join(chr(code) for code in {code + step for code in codes for step in (-1, 0, 1)}
                                 if 0 <= code < 0x110000)
        self._groups = regex.groups
        self._sets: dict = {}
        self.takes: list = []           # for each state its characters, as bits
        self.follow: list = []          # the states that may come next, one as often as there are ways to it
        self._is_sure = True            # that nothing fails but for a character that is not there
        first, last, empty = self._add(regex.term)
        self.start = self._state((1 << len(self._alphabet)) - 1)        # search() may begin anywhere
        self.follow[self.start] = [self.start, *first]
        blind = {state for state, takes in enumerate(self.takes) if not takes}
        self.ends: set = set()          # states from which the search ends well: none of them is tried twice
        if self._is_sure:
            self.ends.update(last)
            if empty:
                blind.add(self.start)
        self.onward = [[after for after in states if after not in blind] for states in self.follow]
        self.follow = [[after for after in states if after not in self.ends] for states in self.onward]
        self.reach = self._reach(self.onward)
        self._looks = 0

    def _state(self, characters: int) -> int:
        self.takes.append(characters)
        self.follow.append([])
        if len(self.takes) > MOST_STATES:
            raise _TooLarge
        return len(self.takes) - 1

    def _characters(self, text: str) -> int:
        if text not in self._sets:
            found = set(re.findall(text, self._alphabet, re.ASCII))
            self._sets[text] = sum(1 << index for index, char in enumerate(self._alphabet) if char in found)
        return self._sets[text]

    def _add(self, term: _Term) -> tuple:
        """(first states, last states, in how many ways it can be empty: 0, 1 or 2) of a term."""
        if term.kind == "one":
            state = self._state(self._characters(term.text))
            return [state], [state], 0
        if term.kind == "again":
            self._is_sure = False
            first, last, _ = self._add(self._groups[term.text])         # the same again, or less
            return first, last, 1
        if term.kind == "start":                        # nothing leads here
            return [], [self._state(0)], 0
        if term.kind == "end":                          # and nothing is taken here
            state = self._state(0)
            return [state], [state], 0
        if term.kind in ("border", "look"):
            self._is_sure = False
            return self._in_turn(map(self._add, term.parts))[0], [], 1
        if term.kind == "either":
            first, last, empty = zip(*map(self._add, term.parts))
            return sum(first, []), sum(last, []), min(sum(empty), 2)
        if term.kind == "repeat":
            return self._repeat(term)
        return self._in_turn(map(self._add, term.parts))

    def _in_turn(self, parts: Iterable) -> tuple:
        first, last, empty = [], [], 1
        for next_first, next_last, next_empty in parts:
            for state in last:
                self.follow[state].extend(next_first)
            first = _at_most_twice(first + next_first * empty)
            last = _at_most_twice(last * next_empty + next_last)
            empty = min(empty * next_empty, 2)
        return first, last, empty

    def _repeat(self, term: _Term) -> tuple:
        """As many copies as there must be, then those that may be, or a loop."""
        body = term.parts[0]
        sure, more = _copies(term)
        copies = [self._add(body) for _ in range(sure)]
        rest: tuple = ([], [], 1)
        if more == INFINITE:
            first, last, empty = self._add(body)
            # re goes on after an empty turn only where it still must
            ways = 1 + bool(empty and term.low > sure)
            for state in last:
                self.follow[state].extend(first * ways)
            rest = first, last, min(empty + 1, 2)
        else:
            for _ in range(int(more)):
                first, last, empty = self._in_turn([self._add(body), rest])
                rest = first, last, min(empty + 1, 2)
        return self._in_turn([*copies, rest])

    def _reach(self, follow: list) -> list:
        """For each state those that can come later, as bits."""
        reach = [0] * len(follow)
        changed = True
        while changed:
            changed = False
            for state in reversed(range(len(follow))):
                found = reach[state]
                for after in set(follow[state]):
                    found |= 1 << after | reach[after]
                changed = changed or found != reach[state]
                reach[state] = found
        return reach

    def loops(self, follow: list) -> list:
        """The sets of states that lead to each other, the last ones first."""
        reach = self._reach(follow)
        loops = {frozenset(other for other, back in enumerate(reach) if there >> other & back >> state & 1)
                 for state, there in enumerate(reach)}
        return sorted(filter(None, loops), key=lambda loop: bin(reach[min(loop)]).count("1"))

    def _is_tired(self) -> bool:
        self._looks += 1
        return self._looks > MOST_LOOKS

    def is_exponential(self, loop: frozenset) -> bool:
        """Whether some text leads from a state of the loop back to it in two ways."""
        inside = {state: [after for after in self.follow[state] if after in loop] for state in loop}
        todo: list = []
        for ways in set(map(tuple, inside.values())):
            if len(set(ways)) < len(ways):
                return True
            todo += [(one, other) for one, other in itertools.combinations(ways, 2)
                     if self.takes[one] & self.takes[other]]
        known = set(todo)
        while todo:
            one, other = todo.pop()
            for pair in itertools.product(inside[one], inside[other]):
                if pair not in known and self.takes[pair[0]] & self.takes[pair[1]]:
                    if pair[0] == pair[1] or self._is_tired():
                        return True
                    known.add(pair)
                    todo.append(pair)
        return False

    def leads_on(self, loop: frozenset, later: frozenset) -> bool:
        """Whether some text keeps in one loop, leads from it to the later one, and keeps in that."""
        if loop == later or not self.reach[min(loop)] >> min(later) & 1:
            return False
        return any(self._is_way((state, state, other), (state, other, other), loop, later)
                   for state in loop for other in later if state != other)

    def _is_way(self, start: tuple, goal: tuple, loop: frozenset, later: frozenset) -> bool:
        todo, known = [start], {start}
        while todo:
            staying, leaving, arrived = todo.pop()
            for one in loop.intersection(self.onward[staying]):
                for other in later.intersection(self.follow[arrived]):
                    both = self.takes[one] & self.takes[other]
                    for between in self.onward[leaving] if both else ():
                        place = (one, between, other)
                        if place not in known and both & self.takes[between]:
                            if place == goal or self._is_tired():
                                return True
                            known.add(place)
                            todo.append(place)
        return False

    def steps(self) -> tuple:
        """(n, how many steps n characters make, how many of these the last one makes), at most.

        Counted on texts of one character repeated, from the worst state on, as others may have led there. n
        is large enough that only loops go on; smaller where the steps become more than MOST_STEPS.
        """
        longest, most, growth = max(SHORT_TEXT, len(self.takes)), 0, 0
        fitting = {sum((takes >> bit & 1) << state for state, takes in enumerate(self.takes))
                   for bit in range(len(self._alphabet))}
        for fits in fitting:
            if any(fits & other == fits != other for other in fitting):
                continue                                # another character goes wherever this one does
            follow = [[after for after in states if fits >> after & 1] for states in self.follow]
            length, steps, before = 0, [0] * len(follow), None
            while steps != before and length < longest and max(steps) <= MOST_STEPS:
                length, before = length + 1, steps
                steps = [sum(map(before.__getitem__, states), len(states)) for states in follow]
            if max(steps) > MOST_STEPS:
                longest = length - 1
            most, growth = max(most, *steps), max(growth, max(steps) - max(before))
        return longest, most, growth


def _at_most_twice(states: list) -> list:
    """Two ways to a state are as bad as any more."""
    return [state for state, count in Counter(states).items() for _ in range(min(count, 2))]


def _copies(term: _Term) -> tuple:
    """How many copies of its part a repeat becomes: (how many must be, how many more may be)."""
    size = _size(term.parts[0])
    sure, more = int(term.low), term.high - term.low
    if sure * size > WRITTEN_OUT:
        sure, more = 0, INFINITE
    elif (sure + more) * size > WRITTEN_OUT:
        more = INFINITE
    return sure, more


def _size(term: _Term) -> float:
    """How many states a term becomes."""
    inside = sum(map(_size, term.parts))
    if term.kind == "repeat":
        sure, more = _copies(term)
        return inside * (sure + (1 if more == INFINITE else more))
    return inside + (term.kind in ("one", "again"))


class Pattern(NamedTuple):
    """A pattern of a schema, ready to be tried.

    `search` is that of re; `longest` is the number of characters of the longest text that it may be tried on,
    or INFINITE; `advice` says what to write instead where there is a limit.
    """
    search: Callable
    longest: float = INFINITE
    advice: str = ""


def read_pattern(source: str) -> Pattern:
    """The Pattern whose search() finds what ECMA-262 (flag u) would find. Raises ValueError."""
    regex = _Regex(source)
    if regex.property:
        raise ValueError(f"{printable(regex.property, 40)} is not supported: write the characters out, "
                         r"as in [A-Za-z\u00c0-\u024f]")
    try:
        search = re.compile(regex.text, re.ASCII).search
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"not a usable regular expression: {getattr(error, 'msg', error)}") from None
    try:
        longest, kind = _longest_text(_Automaton(regex))
    except _TooLarge:
        longest, kind = 100, "large"
    if longest >= LARGE_TEXT:
        return Pattern(search)
    longest = int(longest)
    longest -= longest % 10 ** max(len(str(longest)) - 2, 0)           # two digits say enough
    return Pattern(search, longest, _REWRITES[kind])


def _longest_text(automaton: _Automaton) -> tuple:
    """(characters of the longest text that is searched in MOST_STEPS, what makes it so many steps)."""
    loops = automaton.loops(automaton.follow)
    length, steps, growth = automaton.steps()
    if any(map(automaton.is_exponential, loops)):
        return min(length, LONGEST_DOUBLING), "exponential"
    # Where the search may end it goes on once for each character; what it tries from there comes on top
    going_on = [loop for loop in automaton.loops(automaton.onward) if loop & automaton.ends]
    degrees: dict = {}              # for each loop: how many lead from one to the next from it on, at most
    for loop in loops + going_on:
        degrees[loop] = 1 + max((degrees[later] for later in degrees if later in loops
                                 and automaton.leads_on(loop, later)), default=0)
    degree = max(degrees.values(), default=0)
    kind = "power"
    if degree <= 2 and all(automaton.start in loop for loop in degrees if degrees[loop] == 2):
        kind = "start"
    if steps > MOST_STEPS:
        return length, kind
    if degree < 2:
        return MOST_STEPS / max(growth, 1), kind
    by_theory = (MOST_STEPS * math.factorial(degree)) ** (1 / degree)
    return min(by_theory, length * (MOST_STEPS / steps) ** (1 / degree)), kind


# =============================================================================
# Schema: JSON Schema draft 2020-12, compiled once. Knows nothing of HTTP, SQL or appointments.
# =============================================================================

MOST_PROBLEMS = 100     # of one value: a hostile megabyte must not come back as a hundred
LONGEST_NAME = 100      # characters of a member name in a message or a path

# -- values

def canonical_json(value: Any) -> str:
    """One text for all JSON values that are equal as JSON Schema sees it: 1 is 1.0, and order does not count.

    Text and not a tuple: in that true would be 1, and hashes of numbers can be made to collide.
    """
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        members = [f"{encode_basestring_ascii(name)}:{canonical_json(item)}" for name, item in value.items()]
        return "{" + ",".join(sorted(members)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical_json, value)) + "]"
    return repr(_plain_number(value))


def _plain_number(number: Any) -> Any:
    """The one that stands for all that are equal: below 2 ** 53 the int, else the float where there is one.

    The float, as 1e308 written out would make 50 MB of a megabyte of them.
    """
    if -2 ** 53 < number < 2 ** 53:
        whole = int(number)
        return whole if whole == number else number
    if isinstance(number, int) and abs(number) < 1e308 and float(number) == number:
        return float(number)
    return number


def json_equal(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal as JSON Schema sees it."""
    return canonical_json(one) == canonical_json(other)


TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_TYPE_OF = {dict: "object", list: "array", str: "string", int: "number", float: "number", bool: "boolean",
            type(None): "null"}


def _type_of(value: Any) -> str:
    """The JSON type of a value; every integer is a number."""
    return _TYPE_OF.get(value.__class__) or next(filter(None, map(_TYPE_OF.get, type(value).__mro__)), "")


def _is_integer(value: Any) -> bool:
    return _type_of(value) == "number" and value == value // 1


class Problem(NamedTuple):
    """One thing that is wrong: where (JSON Pointer, RFC 6901), by which keyword, and what was expected."""
    path: str
    rule: str
    message: str


class SchemaError(ValueError):
    """A schema that is not valid: `place` is a JSON Pointer into it, `reason` one line."""

    def __init__(self, place: str, reason: str) -> None:
        super().__init__(printable(f"at {place or '/'}: {reason}", 1000))
        self.place, self.reason = place, reason


def _short_name(name: Any) -> str:
    return printable(str(name), LONGEST_NAME)


def _escaped(name: str) -> str:
    """A member name as a step of a JSON Pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def _listed(values: list) -> str:
    texts = [value if isinstance(value, str) else json.dumps(value, allow_nan=False) for value in values]
    return printable(", ".join(texts), 500)


# -- checking. A check is check(value, here): it tells `here` what is wrong with the value, and which names or
# indexes of the value it has evaluated.

class _Misfit(Exception):
    """The first problem of a trial, of which nothing more need be known."""


class _Unjudged(Exception):
    """A value that takes too long to judge: it is refused, whatever `not` or `if` would make of it."""

    def __init__(self, here: _Here, rule: str, expected: str) -> None:
        self.problem = Problem(here.pointer(), rule, f"{here.subject()} {expected}")


class _Run:
    """The check of one whole value: counts the schemas that are applied, so that none goes round without end.

    A schema that refers to itself in several places can make 2 ** 64 checks of 1 KB. Each place of the value
    may meet each schema ten times; the places are counted only when it comes to that.
    """

    def __init__(self, value: Any, schemas: int) -> None:
        self._value, self._schemas = value, schemas
        self.left = 100_000

    def extend(self, here: _Here) -> None:
        """Go on where the value is large enough for that; else raise _Unjudged."""
        todo, places = [self._value], 0
        while todo and self._schemas:
            value = todo.pop()
            places += 1
            if isinstance(value, dict):
                todo.extend(value.values())
            elif isinstance(value, list):
                todo.extend(value)
        self.left = 10 * places * self._schemas - 100_000
        self._schemas = 0
        if self.left <= 0:
            raise _Unjudged(here, "$ref", "takes the schema too many steps")


TRIAL = ()              # instead of the list of problems, where only one thing counts: whether there are any


class _Here:
    """A place in the value that is checked, and what is known there.

    `above` and `step` lead to it, `problems` is the list of what was found wrong (or TRIAL: the first problem
    raises _Misfit), `scope` the tuple of resources entered (for $dynamicRef), `seen` the names or indexes
    that were evaluated (for unevaluated...).
    """
    __slots__ = ("above", "step", "run", "problems", "scope", "seen")

    def __init__(self, above: Optional[_Here], step: Any, run: _Run, problems: Any, scope: tuple,
                 seen: set) -> None:
        self.above, self.step, self.run = above, step, run
        self.problems, self.scope, self.seen = problems, scope, seen

    def below(self, step: Any) -> _Here:
        """The place of a member or item."""
        return _Here(self, step, self.run, self.problems, self.scope, set())

    def again(self, problems: Sequence) -> _Here:
        """The same place for a check that sees and evaluates apart from others."""
        return _Here(self.above, self.step, self.run, problems, self.scope, set())

    def within(self, resource: _Resource) -> _Here:
        """The same place, seen from a schema of another resource."""
        return _Here(self.above, self.step, self.run, self.problems, (*self.scope, resource), self.seen)

    def _steps(self) -> list:
        steps, here = [], self
        while here.above is not None:
            steps.append(here.step)
            here = here.above
        return steps[::-1]

    def pointer(self) -> str:
        """The place as a JSON Pointer."""
        return "".join("/" + _escaped(_short_name(step)) for step in self._steps())

    def name(self) -> str:
        """The place as people write it: address.lines[0]."""
        text = ""
        for step in self._steps():
            if isinstance(step, int):
                text += f"[{step}]"
            else:
                text += "." * bool(text) + (_short_name(step) or "(empty name)")
        return text

    def subject(self) -> str:
        """What a message calls the place."""
        return f"Field '{self.name()}'" if self.above else "The payload"

    def refuse(self, rule: str, expected: str) -> None:
        """Say what is wrong here."""
        if self.problems is TRIAL:
            raise _Misfit
        self.problems.append(Problem(self.pointer(), rule, f"{self.subject()} {expected}"))

    def miss(self, name: str, rule: str, why: str = "") -> None:
        """Say that a member is missing here."""
        if self.problems is TRIAL:
            raise _Misfit
        member = self.below(name)
        self.problems.append(Problem(member.pointer(), rule, f"Missing required field: {member.name()}{why}"))

    def is_full(self) -> bool:
        """Whether enough was found wrong."""
        return len(self.problems) >= MOST_PROBLEMS


def _check_nothing(value: Any, here: _Here) -> None:
    pass


def _check_false(value: Any, here: _Here) -> None:
    here.refuse("false", "is not allowed")


def _holds(check: Callable, value: Any, here: _Here) -> bool:
    """Whether `value` passes; what was evaluated counts only then."""
    trial = here.again(TRIAL)
    try:
        check(value, trial)
    except _Misfit:
        return False
    here.seen |= trial.seen
    return True


def _node(checks: list, last: list, resource: _Resource) -> Callable:
    """The check of a schema out of [(type that a keyword speaks of or "", its check)]."""
    plans = {name: [check for speaks_of, check in checks if speaks_of in ("", name)] for name in (*TYPES, "")}
    ends = {name: [check for speaks_of, check in last if speaks_of in ("", name)] for name in (*TYPES, "")}

    def check(value: Any, here: _Here) -> None:
        if len(here.problems) >= MOST_PROBLEMS:
            return
        run = here.run
        run.left -= 1
        if run.left < 0:
            run.extend(here)
        if here.scope[-1] is not resource:
            here = here.within(resource)
        kind = _type_of(value)
        if not ends[kind]:
            for one in plans[kind]:
                one(value, here)
            return
        # unevaluated... must not see what schemas around this one have evaluated
        own = here.again(here.problems)
        for one in plans[kind] + ends[kind]:
            one(value, own)
        here.seen |= own.seen
    return check


# -- keywords

class _Kind(NamedTuple):
    """A kind of value that keywords take: what a message calls it, and whether something is one."""
    text: str
    fits: Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value)) and len(set(value)) == len(value)


def _type_names(value: Any) -> list:
    return [value] if isinstance(value, str) else value


_SCHEMA = _Kind("a schema", lambda value: isinstance(value, (dict, bool)))
_SCHEMAS = _Kind("an array of schemas that is not empty",
                 lambda value: isinstance(value, list) and bool(value))
_SCHEMA_MAP = _Kind("an object of schemas", lambda value: isinstance(value, dict))
_COUNT = _Kind("a whole number of at least 0", lambda value: _is_integer(value) and value >= 0)
_NUMBER_KIND = _Kind("a number", lambda value: _type_of(value) == "number")
_DIVISOR = _Kind("a number above 0", lambda value: _type_of(value) == "number" and value > 0)
_TEXT = _Kind("text", _is_text)
_FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
_ANY = _Kind("anything", lambda value: True)
_ARRAY = _Kind("an array", lambda value: isinstance(value, list))
_NAMES = _Kind("an array of different texts", _is_names)
_NAME_MAP = _Kind("an object of arrays of texts",
                  lambda value: isinstance(value, dict) and all(map(_is_names, value.values())))
_TYPE_NAMES = _Kind(f"one of the types {', '.join(TYPES)}, or an array of them", lambda value:
                    bool(value) and _is_names(_type_names(value)) and set(_type_names(value)) <= set(TYPES))
# Core 8.2.1 and 8.2.2
_ID = _Kind("a URI reference without a fragment (a name for this place is $anchor)",
            lambda value: isinstance(value, str) and not value.partition("#")[2])
_ANCHOR = _Kind("a name: a letter or _, then letters, digits, - _ and .", lambda value:
                isinstance(value, str) and re.fullmatch("[A-Za-z_][-A-Za-z0-9._]*", value) is not None)

PII = "x-pii"
KEYWORDS = {            # keyword: the kind of value that it takes
    "$id": _ID, "$schema": _TEXT, "$ref": _TEXT, "$anchor": _ANCHOR, "$dynamicRef": _TEXT,
    "$dynamicAnchor": _ANCHOR, "$vocabulary": _ANY, "$comment": _TEXT, "$defs": _SCHEMA_MAP,
    "definitions": _SCHEMA_MAP,
    "prefixItems": _SCHEMAS, "items": _SCHEMA, "contains": _SCHEMA, "additionalProperties": _SCHEMA,
    "properties": _SCHEMA_MAP, "patternProperties": _SCHEMA_MAP, "dependentSchemas": _SCHEMA_MAP,
    "propertyNames": _SCHEMA, "if": _SCHEMA, "then": _SCHEMA, "else": _SCHEMA, "allOf": _SCHEMAS,
    "anyOf": _SCHEMAS, "oneOf": _SCHEMAS, "not": _SCHEMA, "unevaluatedItems": _SCHEMA,
    "unevaluatedProperties": _SCHEMA,
    "type": _TYPE_NAMES, "const": _ANY, "enum": _ARRAY, "multipleOf": _DIVISOR, "maximum": _NUMBER_KIND,
    "exclusiveMaximum": _NUMBER_KIND, "minimum": _NUMBER_KIND, "exclusiveMinimum": _NUMBER_KIND,
    "maxLength": _COUNT, "minLength": _COUNT, "pattern": _TEXT, "maxItems": _COUNT, "minItems": _COUNT,
    "uniqueItems": _FLAG, "maxContains": _COUNT, "minContains": _COUNT, "maxProperties": _COUNT,
    "minProperties": _COUNT, "required": _NAMES, "dependentRequired": _NAME_MAP,
    "format": _TEXT, "contentEncoding": _TEXT, "contentMediaType": _TEXT, "contentSchema": _SCHEMA,
    "title": _TEXT, "description": _TEXT, "default": _ANY, "deprecated": _FLAG, "readOnly": _FLAG,
    "writeOnly": _FLAG, "examples": _ARRAY,
    # Ours: what is there is a person's. Of any other value nobody could tell what it was meant to hide
    PII: _FLAG,
}
# Those of the vocabulary "validation", which a metaschema may leave out
VALIDATION_KEYWORDS = frozenset({
    "type", "const", "enum", "multipleOf", "maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum",
    "maxLength", "minLength", "pattern", "maxItems", "minItems", "uniqueItems", "maxContains", "minContains",
    "maxProperties", "minProperties", "required", "dependentRequired"})
# What other drafts and OpenAPI know and 2020-12 ignores: what to write instead
FOREIGN_KEYWORDS = {
    "nullable": 'write "null" into type, as in "type": ["string", "null"]',
    "dependencies": "write dependentRequired for names, dependentSchemas for schemas",
    "additionalItems": "write the array of schemas into prefixItems and this into items",
    "discriminator": "write oneOf whose schemas have a const each, or if and then",
    "id": "write $id",
    "divisibleBy": "write multipleOf",
    "$recursiveRef": "write $dynamicRef",
    "$recursiveAnchor": "write $dynamicAnchor",
}
# What other drafts allow and 2020-12 does not: (keyword, the type of its value): what to write instead
FOREIGN_VALUES = {
    ("required", "boolean"): "write the names of required fields into required of the object around them",
    ("exclusiveMinimum", "boolean"): "write the limit here and leave out minimum",
    ("exclusiveMaximum", "boolean"): "write the limit here and leave out maximum",
    ("items", "array"): "write the array into prefixItems",
}
DRAFT = "https://json-schema.org/draft/2020-12/schema"
VALIDATION_VOCABULARY = "https://json-schema.org/draft/2020-12/vocab/validation"
_IN_PLACE = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas")


class _Resource:
    """A schema with a URI of its own, and its anchors."""
    __slots__ = ("uri", "root", "anchors", "dynamic", "validates")

    def __init__(self, uri: str, root: Any, validates: bool) -> None:
        self.uri, self.root, self.validates = uri, root, validates
        self.anchors: dict = {}         # name: (schema, pointer)
        self.dynamic: set = set()       # those that $dynamicAnchor made


def _join(base: str, reference: str) -> str:
    """RFC 3986 resolution, also for urn: and tag:, of which urljoin knows nothing."""
    try:
        return base.partition("#")[0] + reference if reference[:1] in ("#", "") else urljoin(base, reference)
    except ValueError:                                  # http://[ is no URI; nothing will be found under it
        return reference


def _subschemas(schema: dict) -> Iterator[tuple]:
    """(keyword, pointer below, subschema) of every subschema of `schema`."""
    for keyword, value in schema.items():
        kind = KEYWORDS.get(keyword)
        if kind is _SCHEMA:
            yield keyword, "/" + keyword, value
        elif kind is _SCHEMAS and isinstance(value, list):
            for index, item in enumerate(value):
                yield keyword, f"/{keyword}/{index}", item
        elif kind is _SCHEMA_MAP and isinstance(value, dict):
            for name, item in value.items():
                yield keyword, f"/{keyword}/{_escaped(name)}", item


def _refuse_if_not_json(document: Any) -> None:
    try:
        json.dumps(document, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise SchemaError("", f"a schema must be JSON: {error}") from None


class Schema:
    """A JSON Schema (draft 2020-12: every vocabulary, `format` asserted), compiled once for many threads.

    `document` is the schema as JSON; `documents`, {uri: schema}, are others that it may refer to: nothing is
    fetched. Raises SchemaError. Unknown keywords are annotations. `notes` are lines for who wrote the schema:
    what it says and is ignored, and which patterns are not tried on long texts. `names` are all member names
    that it knows.
    """

    def __init__(self, document: Any, documents: Optional[dict] = None, assert_formats: bool = True) -> None:
        self._documents = documents or {}
        self.assert_formats = assert_formats
        self.notes: list = []
        self.names: set = set()
        self.resources: dict = {}       # URI: _Resource
        self.patterns: dict = {}        # source: Pattern
        self._nodes: dict = {}          # id of a schema: [its check]; the resources keep those schemas
        try:
            _refuse_if_not_json(document)
            if isinstance(document, dict) and "info" in document and document.keys() & {"openapi", "swagger"}:
                raise SchemaError("", "this is an OpenAPI document, which as a schema checks nothing: write "
                                      "the one schema out of it, with what it refers to in $defs")
            for uri, other in self._documents.items():
                self._index(other, self._resource(uri.rstrip("#"), other), "", False)
            self.root = self._resource("", document)
            self._index(document, self.root, "", True)
            self._check = self.compile(document, self.root, "")
            self._refuse_loops(document, self.root)
            self.accepts = _Accelerator(self, self.root).function(document)
        except RecursionError:
            raise SchemaError("", "nested too deeply") from None

    def errors(self, value: Any) -> list[Problem]:
        """The Problems of a JSON value, in the order of the schema; at most 100, none when it is valid.

        Hot path: `accepts` is the same schema as Python code, for the keywords that events need; it only ever
        says that a value is valid (0.6 against 8 us). What it does not accept is judged by the checks below.
        """
        if self.accepts(value):
            return []
        problems: list = []
        here = _Here(None, None, _Run(value, len(self._nodes)), problems, (self.root,), set())
        try:
            self._check(value, here)
        except RecursionError:
            return [Problem("", "$ref", "The schema refers to itself without end for this payload")]
        except _Unjudged as unjudged:
            problems.append(unjudged.problem)
        if len(problems) > MOST_PROBLEMS:               # what is cut off lies deepest: a missing field is not
            problems.sort(key=lambda problem: problem.path.count("/"))
        return problems[:MOST_PROBLEMS]

    # -- names

    def _resource(self, uri: str, root: Any) -> _Resource:
        validates = True
        metaschema = self._documents.get(str(root.get("$schema"))) if isinstance(root, dict) else None
        if isinstance(metaschema, dict) and isinstance(metaschema.get("$vocabulary"), dict):
            validates = VALIDATION_VOCABULARY in metaschema["$vocabulary"]
        resource = self.resources[uri] = _Resource(uri, root, validates)
        return resource

    def _index(self, schema: Any, resource: _Resource, pointer: str, own: bool) -> None:
        """Register every $id and anchor below `schema`."""
        if not isinstance(schema, dict):
            return
        identity = schema.get("$id")
        if isinstance(identity, str) and (resource.root is not schema or identity):
            uri = _join(resource.uri, identity).rstrip("#")
            if resource.root is schema:             # the document's own name, besides the one it was given
                resource.uri, self.resources[uri] = uri, resource
            else:
                inherited = resource.validates
                resource, pointer = self._resource(uri, schema), ""
                if "$schema" not in schema:
                    resource.validates = inherited
        for keyword in ("$anchor", "$dynamicAnchor"):
            if isinstance(schema.get(keyword), str):
                resource.anchors[schema[keyword]] = (schema, pointer)
        if isinstance(schema.get("$dynamicAnchor"), str):
            resource.dynamic.add(schema["$dynamicAnchor"])
        if own:
            self._look_at_keywords(schema, pointer)
        for _, below, item in _subschemas(schema):
            self._index(item, resource, pointer + below, own)

    def _look_at_keywords(self, schema: dict, pointer: str) -> None:
        """Note what is ignored, and the member names that are known."""
        place = printable(pointer) or "/"
        for keyword in ("properties", "required", "dependentRequired"):
            if KEYWORDS[keyword].fits(schema.get(keyword)):
                self.names.update(schema[keyword])
        if KEYWORDS["dependentRequired"].fits(schema.get("dependentRequired")):
            self.names.update(*schema["dependentRequired"].values())
        if isinstance(schema.get("format"), str) and schema["format"] not in FORMATS:
            self._note(f"the format {schema['format']} at {place} is not known and not checked")
        if "#/definitions/" in str(schema.get("$ref")):
            self._note("definitions is read as $defs, its name since 2019-09: write $defs, also in $ref")
        known = {name.lower(): name for name in KEYWORDS}
        for keyword in schema:
            if keyword in FOREIGN_KEYWORDS:
                self._note(f"the keyword {keyword} at {place} is not of draft 2020-12 and is ignored; "
                           f"{FOREIGN_KEYWORDS[keyword]}")
            elif keyword not in KEYWORDS:
                similar = known
                if keyword.startswith("x-"):        # for everybody's own; but a mark without effect leaks
                    similar = {PII: PII}
                for found in difflib.get_close_matches(keyword.lower(), similar, 1, 0.75):
                    self._note(f"the unknown keyword {keyword} at {place} is ignored; "
                               f"did you mean {known[found]}?")

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    def entered(self, schema: dict, resource: _Resource) -> _Resource:
        """The resource that `schema`, found in `resource`, belongs to: its own when it has an $id."""
        identity = schema.get("$id")
        if not isinstance(identity, str):
            return resource
        return self.resources.get(_join(resource.uri, identity).rstrip("#"), resource)

    def resolve(self, reference: str, resource: _Resource, place: str) -> tuple:
        """(schema, resource, pointer) that a $ref in `resource` leads to. Raises SchemaError at `place`."""
        nowhere = f"the reference {_short_name(reference)} leads nowhere"
        uri, _, fragment = _join(resource.uri, reference).partition("#")
        target = self.resources.get(uri)
        if target is None:
            raise SchemaError(place, f"{nowhere}: no document of that name")
        fragment = unquote(fragment)
        if fragment and fragment[0] != "/":
            if fragment not in target.anchors:
                raise SchemaError(place, f"{nowhere}: no such anchor")
            schema, pointer = target.anchors[fragment]
            return schema, target, pointer
        schema, pointer = target.root, ""
        for step in fragment.split("/")[1:]:
            name: Any = step.replace("~1", "/").replace("~0", "~")
            if isinstance(schema, list) and name.isdigit():
                name = int(name)
            try:
                schema = schema[name]
            except (KeyError, IndexError, TypeError):
                raise SchemaError(place, nowhere) from None
            pointer += "/" + step
            if isinstance(schema, dict) and isinstance(schema.get("$id"), str):
                target, pointer = self.entered(schema, target), ""
        return schema, target, pointer

    # -- checks

    def compile(self, schema: Any, resource: _Resource, place: str) -> Callable:
        """The check of one schema. Raises SchemaError."""
        if schema is True:
            return _check_nothing
        if schema is False:
            return _check_false
        if not isinstance(schema, dict):
            raise SchemaError(place, "a schema must be an object, true or false")
        node = self._nodes.get(id(schema))
        if node is not None:
            return lambda value, here: node[0](value, here)     # it may be in the making: a recursive schema
        node = self._nodes[id(schema)] = [None]
        resource = self.entered(schema, resource)
        known = [_Keyword(name, value, schema, resource, f"{place}/{name}", self)
                 for name, value in schema.items() if name in KEYWORDS]
        for keyword in known:                       # all of them first, as compilers look at their neighbours
            keyword.refuse_misfit()
        checks: list = []
        last: list = []
        for keyword in known:
            is_off = keyword.name in VALIDATION_KEYWORDS and not resource.validates
            if keyword.name not in COMPILERS or is_off:             # annotations and $defs: checked, not run
                for _, below, item in _subschemas({keyword.name: keyword.value}):
                    self.compile(item, resource, place + below)
                continue
            speaks_of, make = COMPILERS[keyword.name]
            check = make(keyword)
            if keyword.name.startswith("unevaluated"):
                last.append((speaks_of, check))
            else:
                checks.append((speaks_of, check))
        node[0] = _node(checks, last, resource)
        return node[0]

    def pattern(self, source: str, place: str) -> Pattern:
        """The Pattern of a keyword. Raises SchemaError; notes what is not tried on long texts."""
        if source not in self.patterns:
            try:
                self.patterns[source] = read_pattern(source)
            except ValueError as error:
                raise SchemaError(place, str(error)) from None
        pattern = self.patterns[source]
        if pattern.advice:
            self._note(f"the pattern at {printable(place)} may take for ever, so that texts of more than "
                       f"{pattern.longest} characters are refused untried: {pattern.advice}")
        return pattern

    def _refuse_loops(self, document: Any, resource: _Resource) -> None:
        """Refuse schemas that apply themselves to the same value again: they would never end."""
        finished: set = set()
        found = [(document, resource, "")]          # schemas to start from; grows by those for other values

        def visit(schema: Any, resource: _Resource, place: str, above: tuple) -> None:
            if not isinstance(schema, dict) or id(schema) in finished:
                return
            if id(schema) in above:
                raise SchemaError(place, "the schema refers to itself without end")
            resource = self.entered(schema, resource)
            above += (id(schema),)
            for keyword, below, item in _subschemas(schema):
                if keyword in _IN_PLACE:
                    visit(item, resource, place + below, above)
                else:
                    found.append((item, resource, place + below))
            for keyword in ("$ref", "$dynamicRef"):
                if keyword in schema:
                    visit(*self.resolve(schema[keyword], resource, f"{place}/{keyword}"), above)
            finished.add(id(schema))

        for start in found:
            visit(*start, ())


class Annotations:
    """What a schema says of a place in a value, whatever the value: by all of its branches, taken or not."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema

    def along(self, path: Iterable) -> list:
        """[[schema, ...], ...]: those (JSON objects) that may speak of the whole value, then of where each
        step of `path`, the name of a member or the index of an item, leads."""
        root = self._schema.root
        places = [self._applied([(root.root, root)])]
        for step in path:
            places.append(self._applied([(below, resource) for schema, resource in places[-1]
                                         for below in self._below(schema, step)]))
        return [[schema for schema, _ in place] for place in places]

    def _applied(self, waiting: list) -> list:
        """[(schema, resource)] with those that they apply to the same value."""
        found: dict = {}                # id of a schema: the pair
        while waiting:
            schema, resource = waiting.pop()
            if not isinstance(schema, dict) or id(schema) in found:
                continue
            resource = self._schema.entered(schema, resource)
            found[id(schema)] = schema, resource
            waiting += [(item, resource) for keyword, _, item in _subschemas(schema)
                        if keyword in _IN_PLACE or keyword == "contentSchema"]
            waiting += [self._schema.resolve(schema[keyword], resource, "")[:2]
                        for keyword in ("$ref", "$dynamicRef") if keyword in schema]
            anchor = schema.get("$dynamicRef", "").partition("#")[2]
            waiting += [(other.anchors[anchor][0], other) for other in self._schema.resources.values()
                        if anchor in other.dynamic]
        return list(found.values())

    def _below(self, schema: dict, step: Any) -> list:
        """The subschemas for a member or an item. Where it depends on values whether one speaks of it (such
        as unevaluatedProperties), it does."""
        if isinstance(step, int):
            found = schema.get("prefixItems", [])[step:step + 1]
            others = ["contains", "unevaluatedItems"] + ["items"] * (not found)
        else:
            patterns, properties = self._schema.patterns, schema.get("properties", {})
            found = [item for source, item in schema.get("patternProperties", {}).items()
                     if len(step) > patterns[source].longest or patterns[source].search(step)]
            if step in properties:
                found.append(properties[step])
            others = ["propertyNames"] + ["additionalProperties", "unevaluatedProperties"] * (not found)
        return found + [schema[keyword] for keyword in others if keyword in schema]


# -- compilers: each makes the check of one keyword

class _Keyword(NamedTuple):
    """A keyword in its place: what a compiler is given."""
    name: str
    value: Any
    around: dict                # the schema that it stands in
    resource: _Resource
    place: str
    schema: Schema

    def refuse_misfit(self) -> None:
        """Raise SchemaError where the value is of the wrong kind."""
        kind = KEYWORDS[self.name]
        if not kind.fits(self.value):
            advice = FOREIGN_VALUES.get((self.name, _type_of(self.value)), "")
            raise SchemaError(self.place, f"{self.name} must be {kind.text}{advice and '; ' + advice}")

    def check(self) -> Callable:
        """The check of its value, a schema."""
        return self.schema.compile(self.value, self.resource, self.place)

    def checks(self) -> list:
        """Those of its value, an array of schemas."""
        return [self.schema.compile(item, self.resource, f"{self.place}/{index}")
                for index, item in enumerate(self.value)]

    def members(self) -> list:
        """[(name, check)] of its value, an object of schemas."""
        return [(name, self.schema.compile(item, self.resource, f"{self.place}/{_escaped(name)}"))
                for name, item in self.value.items()]

    def patterns(self) -> list:
        """The Patterns of the schema's patternProperties."""
        place = self.place.rpartition("/")[0] + "/patternProperties"
        return [self.schema.pattern(source, f"{place}/{_escaped(source)}")
                for source in self.around.get("patternProperties", ())]


def _must(rule: str, expected: str, holds: Callable) -> Callable:
    """A check: `holds(value)`, or a problem that says what was expected."""
    def check(value: Any, here: _Here) -> None:
        if not holds(value):
            here.refuse(rule, "must " + expected)
    return check


def _compile_type(keyword: _Keyword) -> Callable:
    names = _type_names(keyword.value)
    whole = "integer" in names
    return _must("type", f"be of type {' or '.join(names)}",
                 lambda value: _type_of(value) in names or whole and _is_integer(value))


def _compile_enum(keyword: _Keyword) -> Callable:
    allowed = frozenset(map(canonical_json, keyword.value))
    expected = f"be one of: {_listed(keyword.value)}"
    return _must("enum", expected, lambda value: canonical_json(value) in allowed)


def _compile_const(keyword: _Keyword) -> Callable:
    wanted = canonical_json(keyword.value)
    return _must("const", f"be {_listed([keyword.value])}", lambda value: canonical_json(value) == wanted)


def _is_multiple(value: Any, divisor: Any) -> bool:
    if isinstance(value, int) and isinstance(divisor, int):
        return value % divisor == 0
    if value in (INFINITE, -INFINITE):
        return False
    (over, under), (times, parts) = (Decimal(repr(number)).as_integer_ratio() for number in (value, divisor))
    return over * parts % (under * times) == 0          # as written: 0.3 is three times 0.1


def _limit(expected: str, holds: Callable, of_one: str = "") -> Callable:
    """A compiler for keywords that compare: holds(value, limit).

    `expected` has a hole for the limit; `of_one` is said instead where the limit is 1.
    """
    def compile_keyword(keyword: _Keyword) -> Callable:
        limit = keyword.value
        text = expected.format(limit)
        if of_one and limit == 1:
            text = of_one
        return _must(keyword.name, text, lambda value: holds(value, limit))
    return compile_keyword


def _finds(pattern: Pattern, text: str, here: _Here, rule: str) -> bool:
    """Whether a text has what a pattern looks for. Raises _Unjudged where it is too long for that."""
    if len(text) > pattern.longest:
        raise _Unjudged(here, rule, f"is longer than the {pattern.longest} characters on which the schema's "
                                    "pattern is tried")
    return pattern.search(text) is not None


def _compile_pattern(keyword: _Keyword) -> Callable:
    pattern = keyword.schema.pattern(keyword.value, keyword.place)
    expected = f"must match the pattern {printable(keyword.value)}"

    def check(text: str, here: _Here) -> None:
        if not _finds(pattern, text, here, "pattern"):
            here.refuse("pattern", expected)
    return check


def _compile_format(keyword: _Keyword) -> Callable:
    if not keyword.schema.assert_formats or keyword.value not in FORMATS:
        return _check_nothing
    holds, expected = FORMATS[keyword.value]
    return _must("format", f"be {expected}", holds)


def _compile_unique(keyword: _Keyword) -> Callable:
    if not keyword.value:
        return _check_nothing
    return _must("uniqueItems", "not contain an item twice",
                 lambda items: len(set(map(canonical_json, items))) == len(items))


def _compile_required(keyword: _Keyword) -> Callable:
    def check(item: dict, here: _Here) -> None:
        for name in keyword.value:
            if name not in item:
                here.miss(name, "required")
    return check


def _compile_dependent_required(keyword: _Keyword) -> Callable:
    def check(item: dict, here: _Here) -> None:
        for name in filter(item.__contains__, keyword.value):
            for other in keyword.value[name]:
                if other not in item:
                    here.miss(other, "dependentRequired", f" (as there is {_short_name(name)})")
    return check


# -- compilers for keywords that apply further schemas to members and items

def _compile_properties(keyword: _Keyword) -> Callable:
    members = keyword.members()

    def check(item: dict, here: _Here) -> None:
        for name, one in members:
            if name in item:
                one(item[name], here.below(name))
                here.seen.add(name)
    return check


def _compile_pattern_properties(keyword: _Keyword) -> Callable:
    pairs = list(zip(keyword.patterns(), keyword.members()))

    def check(item: dict, here: _Here) -> None:
        for pattern, (_, one) in pairs:
            for name in item:
                below = here.below(name)
                if _finds(pattern, name, below, "patternProperties"):
                    one(item[name], below)
                    here.seen.add(name)
    return check


def _rest_of_object(rule: str, is_rest: Callable, one: Callable) -> Callable:
    """A check of the members for which is_rest(name, here)."""
    def check(item: dict, here: _Here) -> None:
        for name in [name for name in item if is_rest(name, here)]:
            if here.is_full():
                return
            if one is _check_false:
                here.below(name).refuse(rule, "is not a known field")
            else:
                one(item[name], here.below(name))
            here.seen.add(name)
    return check


def _compile_additional(keyword: _Keyword) -> Callable:
    known = frozenset(keyword.around.get("properties", ()))
    patterns = keyword.patterns()

    def is_rest(name: str, here: _Here) -> bool:
        return name not in known and not any(_finds(pattern, name, here.below(name), keyword.name)
                                             for pattern in patterns)
    return _rest_of_object(keyword.name, is_rest, keyword.check())


def _compile_unevaluated_properties(keyword: _Keyword) -> Callable:
    return _rest_of_object(keyword.name, lambda name, here: name not in here.seen, keyword.check())


def _compile_property_names(keyword: _Keyword) -> Callable:
    one = keyword.check()

    def check(item: dict, here: _Here) -> None:
        for name in item:
            if here.is_full():
                return
            below = here.below(name)
            if not _holds(one, name, below):
                below.refuse("propertyNames", "has a name that is not allowed")
    return check


def _compile_prefix_items(keyword: _Keyword) -> Callable:
    checks = keyword.checks()

    def check(items: list, here: _Here) -> None:
        for index, (one, item) in enumerate(zip(checks, items)):
            one(item, here.below(index))
            here.seen.add(index)
    return check


def _compile_rest_of_array(keyword: _Keyword) -> Callable:
    """`items` looks at all that come after prefixItems, unevaluatedItems at what nothing has evaluated."""
    one, first = keyword.check(), 0
    if keyword.name == "items":
        first = len(keyword.around.get("prefixItems", ()))

    def check(items: list, here: _Here) -> None:
        for index in range(first, len(items)):
            if keyword.name == "items" or index not in here.seen:
                if here.is_full():
                    return
                if one is _check_false:
                    here.below(index).refuse(keyword.name, "is one item too many")
                else:
                    one(items[index], here.below(index))
        here.seen.update(range(first, len(items)))
    return check


def _compile_contains(keyword: _Keyword) -> Callable:
    one = keyword.check()
    bounds = keyword.around if keyword.resource.validates else {}
    least, most = bounds.get("minContains", 1), bounds.get("maxContains", INFINITE)
    rule = "minContains" if "minContains" in bounds else "contains"

    def check(items: list, here: _Here) -> None:
        matching = [index for index, item in enumerate(items) if _holds(one, item, here.below(index))]
        here.seen.update(matching)
        if len(matching) < least:
            here.refuse(rule, f"must contain at least {least} items that match the schema's contains")
        if len(matching) > most:
            here.refuse("maxContains", f"must contain at most {most} items that match the schema's contains")
    return check


# -- compilers for keywords that apply further schemas to the same value

def _compile_all_of(keyword: _Keyword) -> Callable:
    checks = keyword.checks()

    def check(value: Any, here: _Here) -> None:
        for one in checks:
            one(value, here)
    return check


def _counting(expected: str, fits: Callable) -> Callable:
    """A compiler for keywords that count how many of their schemas hold."""
    def compile_keyword(keyword: _Keyword) -> Callable:
        checks = keyword.checks() if keyword.name != "not" else [keyword.check()]

        def check(value: Any, here: _Here) -> None:
            own = here.again(here.problems)
            if not fits(sum(_holds(one, value, own) for one in checks)):
                here.refuse(keyword.name, "must " + expected)
            if keyword.name != "not":
                here.seen |= own.seen
        return check
    return compile_keyword


def _compile_if(keyword: _Keyword) -> Callable:
    condition = keyword.check()
    base = keyword.place[:-len("/if")]
    then, otherwise = (
        keyword.schema.compile(keyword.around.get(name, True), keyword.resource, f"{base}/{name}")
        for name in ("then", "else"))

    def check(value: Any, here: _Here) -> None:
        if _holds(condition, value, here):
            then(value, here)
        else:
            otherwise(value, here)
    return check


def _compile_dependent_schemas(keyword: _Keyword) -> Callable:
    members = keyword.members()

    def check(item: dict, here: _Here) -> None:
        for name, one in members:
            if name in item:
                one(item, here)
    return check


def _compile_ref(keyword: _Keyword) -> Callable:
    return keyword.schema.compile(*keyword.schema.resolve(keyword.value, keyword.resource, keyword.place))


def _compile_dynamic_ref(keyword: _Keyword) -> Callable:
    """Core 8.2.3.2: like $ref, but where that leads to a $dynamicAnchor, the outermost one counts."""
    schema = keyword.schema
    target, home, pointer = schema.resolve(keyword.value, keyword.resource, keyword.place)
    plain = schema.compile(target, home, pointer)
    name = keyword.value.partition("#")[2]
    if name not in home.dynamic or home.anchors[name][0] is not target:
        return plain
    candidates = {other: schema.compile(other.anchors[name][0], other, other.anchors[name][1])
                  for other in set(schema.resources.values()) if name in other.dynamic}

    def check(value: Any, here: _Here) -> None:
        one = next((candidates[entered] for entered in here.scope if entered in candidates), plain)
        one(value, here)
    return check


def _is_at_most(value: Any, limit: Any) -> bool:
    return len(value) <= limit


def _is_at_least(value: Any, limit: Any) -> bool:
    return len(value) >= limit


COMPILERS = {           # keyword: (the type that it speaks of, "" for any; its compiler)
    "$ref": ("", _compile_ref), "$dynamicRef": ("", _compile_dynamic_ref),
    "type": ("", _compile_type), "enum": ("", _compile_enum), "const": ("", _compile_const),
    "multipleOf": ("number", _limit("be a multiple of {}", _is_multiple)),
    "maximum": ("number", _limit("be at most {}", operator.le)),
    "exclusiveMaximum": ("number", _limit("be less than {}", operator.lt)),
    "minimum": ("number", _limit("be at least {}", operator.ge)),
    "exclusiveMinimum": ("number", _limit("be more than {}", operator.gt)),
    "maxLength": ("string", _limit("have at most {} characters", _is_at_most)),
    "minLength": ("string", _limit("have at least {} characters", _is_at_least, "not be empty")),
    "pattern": ("string", _compile_pattern), "format": ("string", _compile_format),
    "maxItems": ("array", _limit("have at most {} items", _is_at_most)),
    "minItems": ("array", _limit("have at least {} items", _is_at_least, "not be empty")),
    "uniqueItems": ("array", _compile_unique), "contains": ("array", _compile_contains),
    "prefixItems": ("array", _compile_prefix_items), "items": ("array", _compile_rest_of_array),
    "unevaluatedItems": ("array", _compile_rest_of_array),
    "maxProperties": ("object", _limit("have at most {} fields", _is_at_most)),
    "minProperties": ("object", _limit("have at least {} fields", _is_at_least, "not be empty")),
    "required": ("object", _compile_required), "dependentRequired": ("object", _compile_dependent_required),
    "properties": ("object", _compile_properties), "propertyNames": ("object", _compile_property_names),
    "patternProperties": ("object", _compile_pattern_properties),
    "additionalProperties": ("object", _compile_additional),
    "unevaluatedProperties": ("object", _compile_unevaluated_properties),
    "dependentSchemas": ("object", _compile_dependent_schemas),
    "allOf": ("", _compile_all_of), "if": ("", _compile_if),
    "anyOf": ("", _counting("fit at least one of the schemas in anyOf", bool)),
    "oneOf": ("", _counting("fit exactly one of the schemas in oneOf", lambda count: count == 1)),
    "not": ("", _counting("not fit the schema in not", lambda count: count == 0)),
}


# -- the same as code

class _TooMuch(Exception):
    """A keyword that the accelerator leaves to the checks."""


class _Accelerator:
    """Writes a schema as one Python function that returns True for valid values, False for "ask the checks".

    What comes from the schema goes into the code only as named constants, so no schema can inject code.
    """
    SUPPORTED = frozenset({"type", "enum", "const", "required", "properties", "additionalProperties",
                           "minLength", "maxLength", "pattern", "format", "items", "minItems", "maxItems",
                           "minimum", "maximum"})
    CLASSES = {"object": "dict", "array": "list", "string": "str"}
    TESTS = {"object": "{0}.__class__ is dict", "array": "{0}.__class__ is list",
             "string": "{0}.__class__ is str", "null": "{0} is None", "boolean": "{0}.__class__ is bool",
             "number": "({0}.__class__ is int or {0}.__class__ is float)",
             "integer": "({0}.__class__ is int or {0}.__class__ is float and {0}.is_integer())"}

    def __init__(self, schema: Schema, resource: _Resource) -> None:
        self._schema, self._resource = schema, resource
        self._constants: dict = {}
        self._lines: list = []
        self._variables = itertools.count(1)

    def function(self, document: Any) -> Callable[[Any], bool]:
        """accepts(value)."""
        try:
            self._write(document, "v", 2)
        except _TooMuch:
            return lambda value: False
        names = "".join(f", {name}={name}" for name in self._constants)
        source = "\n".join([f"def accepts(v{names}):", "  try:", *self._lines, "    return True",
                            "  except KeyError:", "    return False"])
        namespace = dict(self._constants)
        exec(compile(source, "<schema>", "exec"), namespace)
        return namespace["accepts"]

    def _constant(self, value: Any) -> str:
        name = f"c{len(self._constants)}"
        self._constants[name] = value
        return name

    def _line(self, depth: int, text: str) -> None:
        self._lines.append("  " * depth + text)

    def _refuse(self, depth: int, condition: str) -> None:
        self._line(depth, f"if {condition}: return False")

    def _write(self, schema: Any, name: str, depth: int) -> None:
        if schema is True:
            return
        if schema is False or not self._resource.validates or depth > 18:       # Python nests 20 loops
            raise _TooMuch
        for keyword in schema:
            if keyword in COMPILERS and keyword not in self.SUPPORTED or keyword == "$id" and depth > 2:
                raise _TooMuch
        types = _type_names(schema.get("type", []))
        if types:
            self._refuse(depth, "not (" + " or ".join(self.TESTS[one].format(name) for one in types) + ")")
        self._write_values(schema, name, depth)
        for kind, write in (("string", self._write_string), ("object", self._write_object),
                            ("array", self._write_array)):
            speaks = any(COMPILERS[keyword][0] == kind for keyword in schema if keyword in COMPILERS)
            if types == [kind]:
                write(schema, name, depth)
            elif speaks and (not types or kind in types):
                # isinstance, not the class: nothing may slip past a check
                self._line(depth, f"if isinstance({name}, {self.CLASSES[kind]}):")
                write(schema, name, depth + 1)
                self._line(depth, "  pass")

    def _write_values(self, schema: dict, name: str, depth: int) -> None:
        for values in (schema.get("enum"), [schema["const"]] if "const" in schema else None):
            if values is not None:
                if not all(map(_is_text, values)):
                    raise _TooMuch
                allowed = self._constant(frozenset(values))
                self._refuse(depth, f"{name}.__class__ is not str or {name} not in {allowed}")
        for keyword, sign in (("minimum", ">="), ("maximum", "<=")):
            if keyword in schema:
                limit = self._constant(schema[keyword])
                self._refuse(depth, f"isinstance({name}, (int, float)) and {name}.__class__ is not bool and "
                                    f"not {name} {sign} {limit}")

    def _write_string(self, schema: dict, name: str, depth: int) -> None:
        if "maxLength" in schema:
            self._refuse(depth, f"not {self._constant(schema.get('minLength', 0))} <= len({name}) <= "
                                f"{self._constant(schema['maxLength'])}")
        elif schema.get("minLength"):
            self._refuse(depth, f"len({name}) < {self._constant(schema['minLength'])}")
        if "pattern" in schema:
            pattern = self._schema.patterns[schema["pattern"]]
            if pattern.advice:
                self._refuse(depth, f"len({name}) > {self._constant(pattern.longest)}")
            self._refuse(depth, f"{self._constant(pattern.search)}({name}) is None")
        if schema.get("format") in FORMATS and self._schema.assert_formats:
            self._refuse(depth, f"not {self._constant(FORMATS[schema['format']][0])}({name})")

    def _write_object(self, schema: dict, name: str, depth: int) -> None:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        for field in required:
            if field not in properties:
                self._refuse(depth, f"{self._constant(field)} not in {name}")
        for field, below in properties.items():
            member, key = f"v{next(self._variables)}", self._constant(field)
            inside = depth
            if field not in required:           # where it is, a KeyError ends it: cheaper than to ask first
                self._line(depth, f"if {key} in {name}:")
                inside = depth + 1
            self._line(inside, f"{member} = {name}[{key}]")
            self._write(below, member, inside)
        extra = schema.get("additionalProperties", True)
        if extra is False:
            self._refuse(depth, f"not {name}.keys() <= {self._constant(frozenset(properties))}")
        elif extra is not True:
            raise _TooMuch

    def _write_array(self, schema: dict, name: str, depth: int) -> None:
        for keyword, sign in (("minItems", "<"), ("maxItems", ">")):
            if keyword in schema:
                self._refuse(depth, f"len({name}) {sign} {self._constant(schema[keyword])}")
        if "items" in schema:
            item = f"v{next(self._variables)}"
            self._line(depth, f"for {item} in {name}:")
            self._write(schema["items"], item, depth + 1)
            self._line(depth, "  pass")


# =============================================================================
# Events: a JSON value to an AppointmentEvent, or to what is wrong with it. Knows nothing of HTTP or SQL.
# =============================================================================

# What a stored event must have, whatever schema.json says
REQUIRED_FIELDS = ("event_type", "appointment_id", "patient_id", "timestamp")
# What is about a person whatever schema.json says: never shown in full unless the operator asks for that
PERSONAL_FIELDS = frozenset({"patient_id", "notes"})
EVENT_SCHEMA = {
    "$schema": DRAFT,
    "title": "AppointmentEvent",
    "description": "What happened to an appointment. Further members are kept with the event.",
    "type": "object",
    "required": list(REQUIRED_FIELDS),
    "properties": {
        "event_type": {"type": "string", "enum": ["scheduled", "cancelled", "updated"]},
        "appointment_id": {"type": "string", "minLength": 1, "maxLength": 255},
        "patient_id": {"type": "string", "minLength": 1, "maxLength": 255, PII: True},
        "timestamp": {"type": "string", "format": "iso8601"},
        "notes": {"type": ["string", "null"], PII: True},
    },
}


class AppointmentEvent(NamedTuple):
    """One event. Its fields are the columns of the table; `id` is None until it is stored.

    `timestamp` is canonical UTC such as 2025-01-10T14:00:00Z, `payload` the JSON text as it came.
    """
    event_type: str
    appointment_id: str
    patient_id: str
    timestamp: str
    notes: Optional[str]
    received_at: str
    client: Optional[str]
    payload: str
    id: int = None      # always there for on_event and for who reads


class InvalidEvent(ValueError):
    """A value that is no valid event.

    `problems` is a list of Problem, the one that decides the message first; `for_log` is that one as the log
    may tell it: without any name that came with the value.
    """

    def __init__(self, problems: list, for_log: str) -> None:
        super().__init__(problems[0].message)
        self.problems, self.for_log = problems, for_log


def _stage(problem: Problem) -> int:
    """The stage a problem belongs to: the first stage that fails decides the message of the answer."""
    top_level = problem.path.count("/") <= 1
    if problem.rule == "required" and top_level:
        return 0
    if problem.rule == "type" and top_level:
        return 1
    if problem.path == "/event_type":
        return 2
    if problem.path == "/timestamp":
        return 3
    if problem.path in ("/appointment_id", "/patient_id") and problem.rule == "minLength":
        return 4
    return 5


def _refuse_if_never_text(document: Any) -> None:
    """Raise SchemaError where a required field may not be text: no event would suit both schema and table."""
    for name in REQUIRED_FIELDS:
        field = _properties(document).get(name)
        if isinstance(field, dict) and "string" not in _type_names(field.get("type", "string")):
            raise SchemaError(f"/properties/{name}/type", "must allow string, as the table keeps it")


def _properties(document: Any) -> dict:
    """Those of a valid schema."""
    return document.get("properties", {}) if isinstance(document, dict) else {}


def _is_named(step: Any, schemas: list, below: list) -> bool:
    """Whether schemas name a member; an item is named where there is anything `below` to speak of it."""
    if isinstance(step, int):
        return bool(below)
    return any(step in schema.get("properties", ()) or step in schema.get("required", ())
               for schema in schemas)


class Contract:
    """What events must be, by one schema: makes events out of JSON values.

    `field_names` are the members that the schema knows at the top, `event_types` its enum for that field,
    `personal_fields` the columns of the table that are a person's.
    """

    def __init__(self, document: Any) -> None:
        """Raises SchemaError for a document that is not a valid schema."""
        self.schema = Schema(document)
        _refuse_if_never_text(document)
        self._errors = self.schema.errors
        floor: dict = {name: {"type": "string"} for name in REQUIRED_FIELDS}
        floor["timestamp"]["format"] = "iso8601"
        self._floor = Schema({"type": "object", "required": list(REQUIRED_FIELDS), "properties": floor})
        self.field_names = frozenset(_properties(document))
        self.event_types: tuple = ()
        if isinstance(_properties(document).get("event_type"), dict):
            self.event_types = tuple(_properties(document)["event_type"].get("enum", ()))
        self._names = self.schema.names | set(REQUIRED_FIELDS)
        self._annotations = Annotations(self.schema)
        self.personal_fields = PERSONAL_FIELDS.union(
            name for name in REQUIRED_FIELDS if self.is_personal((name,)))

    def is_personal(self, path: Sequence) -> bool:
        """Whether what is at `path`, names of members and indexes of items from the top, is a person's: where
        it or something around it is marked x-pii, and where the schema does not name it."""
        if not path or path[0] in PERSONAL_FIELDS:
            return True
        places = self._annotations.along(path)
        if any(schema.get(PII) for place in places for schema in place):
            return True
        places[0].append({"required": REQUIRED_FIELDS})
        return not all(map(_is_named, path, places, places[1:]))

    def event(self, value: Any, payload: str, received_at: str,
              client: Optional[str] = None) -> AppointmentEvent:
        """The event that `value`, whose text is `payload`, describes. Raises InvalidEvent."""
        problems = self._errors(value)
        if not problems:
            try:
                event_type, appointment_id = value["event_type"], value["appointment_id"]
                patient_id, notes = value["patient_id"], value.get("notes")
                # strip() refuses what is not text and finds what is blank; both are ids nobody can look up
                if event_type.strip() and appointment_id.strip() and patient_id.strip():
                    if notes.__class__ is not str:
                        notes = None
                    return AppointmentEvent(event_type, appointment_id, patient_id,
                                            canonical_timestamp(value["timestamp"]),
                                            notes, received_at, client, payload)
            except (KeyError, TypeError, AttributeError, ValueError):
                pass                                # the schema is laxer than the table: say what is missing
        named = {problem.path for problem in problems}
        problems += [problem for problem in self._floor_problems(value) if problem.path not in named]
        problems.sort(key=_stage)
        raise InvalidEvent(problems, self._for_log(value, problems[0]))

    def _floor_problems(self, value: Any) -> list:
        problems = self._floor.errors(value)
        named = {problem.path for problem in problems}
        for name in REQUIRED_FIELDS if isinstance(value, dict) else ():
            if isinstance(value.get(name), str) and not value[name].strip() and "/" + name not in named:
                problems.append(Problem("/" + name, "minLength", f"Field '{name}' must not be empty"))
        return problems

    def _for_log(self, value: Any, problem: Problem) -> str:
        """The message of a problem whose path has only names of the schema; else what gives no name away."""
        steps = problem.path.split("/")[1:]
        for step in steps:
            name = step.replace("~1", "/").replace("~0", "~")
            if isinstance(value, list):
                value = value[int(name)]
            elif name in self._names:
                value = value.get(name)
            elif len(steps) > 1:
                return f"{problem.rule} at a member that the schema does not name, {len(steps)} levels deep"
            else:
                return f"{problem.rule} at a member that the schema does not name"
        return problem.message


# -- the content of an event, to compare

_LARGE_INTEGER = re.compile("[0-9]{16}").search         # 2 ** 53 has as many digits


def content_digest(payload: str) -> bytes:
    """32 bytes, equal for payloads that are equal as JSON, whatever the `timestamp` at their top says.

    Never raises: what is no JSON object, or nested deeper than parse_json takes, is compared as text. A
    megabyte takes 15 to 50 ms, of tiny objects 250: not to be called by who holds others up.
    """
    try:
        if payload.count("{") + payload.count("[") > MAX_DEPTH and _is_too_much(payload, sys.maxsize):
            raise ValueError("nested too deeply")
        # The same as canonical_json, by the C encoder; int() is enough for what is no float anyway
        parse_int = _plain_integer if _LARGE_INTEGER(payload) else int
        content = json.loads(payload, parse_int=parse_int, parse_float=_plain_float)
        if not isinstance(content, dict):
            raise ValueError("no object")
        content.pop("timestamp", None)
        text = json.dumps(content, sort_keys=True, allow_nan=False, separators=(",", ":"))
        return hashlib.sha256(b"json " + text.encode()).digest()
    except (ValueError, OverflowError, RecursionError):
        return hashlib.sha256(b"text " + payload.encode(errors="surrogatepass")).digest()


def _plain_integer(text: str) -> Any:
    return _plain_number(int(text))


def _plain_float(text: str) -> Any:
    return _plain_number(float(text))


# =============================================================================
# Work: threads that loop, a clock for small jobs, the breaker, checks that may hang. Knows threads and time.
# =============================================================================

STOP_SECONDS = 5.0              # a step that hangs longer than this is left behind: its thread is a daemon
CHECK_SECONDS = 1.0             # a check is made at most this often, however many ask
BREAKER_FAILURES = 5            # in a row: one more than a hiccup of the disk ever gave
BREAKER_SECONDS = (1.0, 30.0)   # from an opening to the first try, and the most that doubling makes of it


def _no_error(name: str) -> None:
    """Stands in for on_error where nobody listens."""


class Loop:
    """A daemon thread "webhook-NAME" that runs step() every `seconds` (None: never by itself), and at once
    when woken.

    A step that raises is told to on_error(name), which may look at the exception, and the loop goes on.
    """

    def __init__(self, name: str, step: Callable[[], Any], seconds: Optional[float] = None,
                 on_error: Callable[[str], Any] = _no_error) -> None:
        self.seconds = seconds
        self._name, self._step, self._on_error = name, step, on_error
        self._woken, self._stopping = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name=f"webhook-{name}", daemon=True)

    def start(self) -> None:
        """Start; the first step comes after `seconds`."""
        self._thread.start()

    def wake(self) -> None:
        """Run a step now, and once more when one is under way."""
        self._woken.set()

    def stop(self, wait: float = STOP_SECONDS) -> bool:
        """End the thread after the step under way; False when that takes longer than `wait` seconds."""
        self._stopping = True
        self._woken.set()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(wait)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            self._woken.wait(self.seconds)
            self._woken.clear()
            if self._stopping:          # looked at after clear(), which may have undone the set() of stop()
                return
            try:
                self._step()
            except BaseException:                       # not even a sys.exit() in it may end the loop
                self._on_error(self._name)


class Clock:
    """Small jobs that share the thread "webhook-clock". What can take over 0.1 s needs a Loop of its own."""

    def __init__(self, on_error: Callable[[str], Any] = _no_error,
                 now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._on_error = now, on_error
        self._jobs: list = []                           # [when it is due, seconds, name, step]
        self._loop = Loop("clock", self.run_due, on_error=on_error)
        self.start, self.stop = self._loop.start, self._loop.stop

    def every(self, seconds: float, name: str, step: Callable[[], Any]) -> None:
        """Run step() every `seconds` from now on; on_error(name) is told when it raises."""
        self._jobs.append([self._now() + seconds, seconds, name, step])
        self._loop.wake()

    def run_due(self) -> None:
        """Run each job that is due. What was missed meanwhile is not made up for."""
        for job in list(self._jobs):
            due, seconds, name, step = job
            if due <= self._now():
                try:
                    step()
                except BaseException:                   # its neighbours go on
                    self._on_error(name)
                job[0] = self._now() + seconds
        self._loop.seconds = max(0.0, min((job[0] for job in self._jobs), default=3600.0) - self._now())


class Breaker:
    """Spares what keeps failing: "closed", after 5 failures in a row "open", and "half-open" during its one
    try.

    The try comes 1 s after it opened, the next ones after 2, 4 … 30 s. Who was allowed to try says how it
    went.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.state = "closed"
        self._now, self._lock = now, threading.Lock()
        self._failures, self._pause, self._retry_at = 0, 0.0, 0.0

    def allows(self) -> bool:
        """Whether to try now."""
        with self._lock:
            if self.state == "open" and self._now() >= self._retry_at:
                self.state = "half-open"
                return True
            return self.state == "closed"

    def succeeded(self) -> None:
        """A try worked."""
        with self._lock:
            self.state, self._failures, self._pause = "closed", 0, 0.0

    def failed(self) -> None:
        """A try failed."""
        with self._lock:
            self._failures += 1
            if self.state == "half-open" or self.state == "closed" and self._failures >= BREAKER_FAILURES:
                first, longest = BREAKER_SECONDS
                self._pause = min(max(2 * self._pause, first), longest)
                self.state, self._retry_at = "open", self._now() + self._pause


class PerSecond:
    """A text about the current second, made once in it. For any thread: what is kept is replaced as one."""

    def __init__(self, make: Callable[[int], str]) -> None:
        self._make = make
        self._kept = (-1, "")

    def text(self, second: int) -> str:
        """make(second)."""
        kept = self._kept
        if kept[0] != second:
            kept = self._kept = (second, self._make(second))
        return kept[1]


class Turns:
    """A lock that goes to who waits for it: Python's own goes to who is quickest, who just had it."""

    def __init__(self) -> None:
        self._next, self._turn = threading.Lock(), threading.Lock()

    def acquire(self, wait: float = -1) -> bool:
        """Take the turn; False when it is not to be had within some `wait` seconds."""
        if not self._next.acquire(timeout=wait):
            return False
        try:
            return self._turn.acquire(timeout=wait)
        finally:
            self._next.release()

    def release(self) -> None:
        """Let the next one have its turn."""
        self._turn.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exception: Any) -> None:
        self.release()


class Checkup:
    """A check that may hang (a disk, say): made on a thread of its own, at most once a second."""

    def __init__(self, name: str, check: Callable[[], Any],
                 now: Callable[[], float] = time.monotonic) -> None:
        self._name, self._check, self._now = name, check, now
        self._ended = threading.Condition()
        self._begun, self._under_way = -CHECK_SECONDS, False
        self._said: Any = None
        self._error: Optional[BaseException] = None

    def result(self, wait: float) -> tuple:
        """(what the check says, 0.0), or after `wait` seconds (what it said last, for how many seconds it has
        been under way); None before it has said anything. Raises RuntimeError when the check raised."""
        with self._ended:
            if not self._under_way and self._now() - self._begun >= CHECK_SECONDS:
                # Only then under way: start() raises RuntimeError when the system gives no more threads
                threading.Thread(target=self._run, name=f"webhook-{self._name}", daemon=True).start()
                self._begun, self._under_way = self._now(), True
            if not self._ended.wait_for(lambda: not self._under_way, wait):
                return self._said, self._now() - self._begun
            if self._error is not None:
                raise RuntimeError(f"the check of {self._name} failed") from self._error
            return self._said, 0.0

    def _run(self) -> None:
        said, error = None, None
        try:
            said = self._check()
        except BaseException as raised:                 # whoever asks must not take it for good news
            error = raised
        with self._ended:
            self._said, self._error, self._under_way = said, error, False
            self._ended.notify_all()


# =============================================================================
# System: the system's libraries by ctypes: libcrypto's AES-GCM and signatures. Knows nothing of us.
# =============================================================================

# name: what a function gives, and takes: P a pointer, B bytes, I an int, L a long, Z a size, - nothing
_LIBCRYPTO = {
    "OpenSSL_version_num": "L", "ERR_clear_error": "-",
    "EVP_aes_256_gcm": "P", "EVP_CIPHER_CTX_new": "P", "EVP_CIPHER_CTX_free": "-P",
    "EVP_CIPHER_CTX_ctrl": "IPIIP", "EVP_CipherInit_ex": "IPPPBBI", "EVP_CipherUpdate": "IPPPBI",
    "EVP_CipherFinal_ex": "IPPP",
    "d2i_PUBKEY": "PPPL", "EVP_PKEY_free": "-P", "EVP_get_digestbyname": "PB",
    "EVP_MD_CTX_new": "P", "EVP_MD_CTX_free": "-P", "EVP_DigestVerifyInit": "IPPPPP",
    "EVP_PKEY_CTX_ctrl_str": "IPBB", "EVP_DigestVerify": "IPBZBZ",
}
# These take up to a millisecond and let other threads run meanwhile. For the others, which take less than one
# microsecond, giving the interpreter's lock away would cost more than the work
_SLOW = ("EVP_DigestVerify",)
_GET_TAG, _SET_TAG = 0x10, 0x11         # EVP_CTRL_AEAD_GET_TAG and …_SET_TAG of openssl/evp.h
NONCE_BYTES, TAG_BYTES = 12, 16         # NIST SP 800-38D: the sizes that need no thought
KEPT_BUFFER = 65536                     # bytes; a larger one is given back after its call
RSA_BITS = (2048, 8192)                 # RFC 7518 section 3.3; more would only keep a processor busy

# Names of JWS (RFC 7518 section 3.1, RFC 8037): the kind of key that each is for, and its digest
JWS_ALGORITHMS = {
    "RS256": ("RSA", b"SHA256"), "RS384": ("RSA", b"SHA384"), "RS512": ("RSA", b"SHA512"),
    "PS256": ("RSA", b"SHA256"), "PS384": ("RSA", b"SHA384"), "PS512": ("RSA", b"SHA512"),
    "ES256": ("P-256", b"SHA256"), "ES384": ("P-384", b"SHA384"), "EdDSA": ("Ed25519", None),
}
_CURVES = {"P-256": ("EC", 32), "P-384": ("EC", 48), "Ed25519": ("OKP", 32)}   # kty, bytes of a coordinate
# DER of the AlgorithmIdentifier of a public key (RFC 3279 section 2.3, RFC 5480, RFC 8410)
_KEY_KINDS = {kind: bytes.fromhex(text) for kind, text in {
    "RSA": "300d06092a864886f70d0101010500", "P-256": "301306072a8648ce3d020106082a8648ce3d030107",
    "P-384": "301006072a8648ce3d020106052b81040022", "Ed25519": "300506032b6570"}.items()}


def _libcrypto_names() -> Iterator[str]:
    """Where libcrypto may be: first the one that Python's own modules have loaded, found through them."""
    for module in ("_ssl", "_hashlib"):
        with contextlib.suppress(ImportError):
            yield getattr(importlib.import_module(module), "__file__", "")
    if sys.platform == "darwin":        # the one in /usr/lib ends every process that loads it
        for folder in ("/opt/homebrew", "/usr/local"):
            yield f"{folder}/opt/openssl@3/lib/libcrypto.3.dylib"
        return
    yield from ("libcrypto.so.3", "libcrypto.so.1.1", "libcrypto-3.dll", "libcrypto-3-x64.dll",
                "libcrypto-1_1.dll", "libcrypto-1_1-x64.dll")
    yield ctypes.util.find_library("crypto") or ""


class LibCrypto:
    """OpenSSL's libcrypto, 1.1.1 or 3, as the system has it: the functions of _LIBCRYPTO are its attributes.

    A call that fails leaves the reason in a queue of its thread, where the next call of the module ssl would
    take it for its own: whoever sees a failure calls ERR_clear_error().
    """

    def __init__(self, names: Callable[[], Iterable[str]] = _libcrypto_names) -> None:
        """Raises SetupError where there is none."""
        if ctypes is None:
            raise SetupError("libcrypto cannot be used, as this Python lacks ctypes of its standard library")
        for name in filter(None, names()):
            with contextlib.suppress(OSError, AttributeError):
                self._load(name)
                return
        raise SetupError("OpenSSL's libcrypto 1.1.1 or 3 was not found: install it (Debian, Ubuntu: apt "
                         "install openssl; RHEL: dnf install openssl-libs; macOS: brew install openssl@3)")

    def _load(self, path: str) -> None:
        """Raises OSError or AttributeError where it is not to be had or lacks something."""
        library = self._library = ctypes.PyDLL(path)
        slow = ctypes.CDLL(path, handle=library._handle)
        kinds = {"-": None, "P": ctypes.c_void_p, "B": ctypes.c_char_p, "I": ctypes.c_int, "L": ctypes.c_long,
                 "Z": ctypes.c_size_t}
        for name, signature in _LIBCRYPTO.items():
            function = getattr(slow if name in _SLOW else library, name)
            function.restype, *function.argtypes = [kinds[letter] for letter in signature]
            setattr(self, name, function)
        number = self.OpenSSL_version_num()
        if number >> 28 != 3 and number >> 12 != 0x10101:       # LibreSSL says 2.0
            raise AttributeError("version")

    def unchecked(self, name: str) -> Any:
        """A function that gives an int and takes ctypes' own objects for pointers: half as long a call as with
        declared types."""
        return self._library[name]


class _Cipher:
    """AES-256-GCM with a key in one direction: a context and a buffer, for one call at a time."""

    def __init__(self, crypto: LibCrypto, key: bytes, encrypt: int) -> None:
        self._crypto, self._size = crypto, -1
        self.context, self._length = ctypes.c_void_p(crypto.EVP_CIPHER_CTX_new()), ctypes.c_int()
        self.length_at = ctypes.c_void_p(ctypes.addressof(self._length))
        self.begin, self.update, self.end, self.control = map(crypto.unchecked, (
            "EVP_CipherInit_ex", "EVP_CipherUpdate", "EVP_CipherFinal_ex", "EVP_CIPHER_CTX_ctrl"))
        if not self.context or not crypto.EVP_CipherInit_ex(
                self.context, crypto.EVP_aes_256_gcm(), None, key, None, encrypt):
            crypto.ERR_clear_error()
            raise ValueError("this libcrypto has no AES-256-GCM")

    def __del__(self) -> None:
        self._crypto.EVP_CIPHER_CTX_free(self.context)

    def buffer(self, size: int) -> Any:
        """One of at least `size` bytes: a power of two, as ctypes keeps a type for each size for ever."""
        if size > self._size:
            self._size = 1 << max(10, size.bit_length())
            self._buffer = ctypes.create_string_buffer(self._size)
        return self._buffer


class AESGCM:
    """AES-256-GCM (NIST SP 800-38D) with one key, for any thread. A nonce must never come twice with a key.

    Hot path: 500 bytes take 2 us, half of it the calls.
    """

    def __init__(self, crypto: LibCrypto, key: bytes) -> None:
        """Raises ValueError for a key that is not 32 bytes long."""
        if len(key) != 32:
            raise ValueError("a key of AES-256 has 32 bytes")
        self._crypto, self._key = crypto, key
        self._idle: tuple = ([_Cipher(crypto, key, 0)], [_Cipher(crypto, key, 1)])      # to open, and to seal

    def seal(self, nonce: bytes, plaintext: bytes, data: bytes) -> bytes:
        """The ciphertext with its tag of 16 bytes. `data` is not in it, but opening it takes the same."""
        cipher, size = self._taken(1, nonce), len(plaintext)
        context, update, length_at, buffer = cipher.context, cipher.update, cipher.length_at, cipher.buffer(size + TAG_BYTES)
        if not (cipher.begin(context, None, None, None, nonce, -1)
                and (not data or update(context, None, length_at, data, len(data)))
                and update(context, buffer, length_at, plaintext, size)
                and cipher.end(context, buffer, length_at)
                and cipher.control(context, _GET_TAG, TAG_BYTES, ctypes.byref(buffer, size))):
            self._fail("libcrypto cannot encrypt this")
        return self._give_back(1, cipher, buffer[:size + TAG_BYTES])

    def open(self, nonce: bytes, ciphertext: bytes, data: bytes) -> bytes:
        """The plaintext. Raises ValueError unless all three are as they were sealed with this key."""
        cipher, size = self._taken(0, nonce), len(ciphertext) - TAG_BYTES
        if size < 0:
            raise ValueError("a ciphertext has a tag of 16 bytes at least")
        context, update, length_at, buffer = cipher.context, cipher.update, cipher.length_at, cipher.buffer(size)
        if not (cipher.begin(context, None, None, None, nonce, -1)
                and (not data or update(context, None, length_at, data, len(data)))
                and cipher.control(context, _SET_TAG, TAG_BYTES, ciphertext[size:])
                and update(context, buffer, length_at, ciphertext, size)
                and cipher.end(context, buffer, length_at)):
            self._fail("this was not encrypted with this key, or was changed")
        return self._give_back(0, cipher, buffer[:size])

    def _taken(self, encrypt: int, nonce: bytes) -> _Cipher:
        if len(nonce) != NONCE_BYTES:
            raise ValueError("a nonce has 12 bytes")
        try:
            return self._idle[encrypt].pop()            # one step, so that no two threads get the same
        except IndexError:
            return _Cipher(self._crypto, self._key, encrypt)

    def _give_back(self, encrypt: int, cipher: _Cipher, result: bytes) -> bytes:
        if len(result) < KEPT_BUFFER:
            self._idle[encrypt].append(cipher)
        return result

    def _fail(self, reason: str) -> None:
        """Its cipher is not given back: nobody gets one that is in the midst of something."""
        self._crypto.ERR_clear_error()
        raise ValueError(reason)


# -- signatures by public keys

def base64url_bytes(text: Any) -> bytes:
    """What base64url without padding means (RFC 7515 section 2). Raises ValueError for anything else, such as
    a second spelling of the same bytes, by unused bits that are set."""
    with contextlib.suppress(ValueError, TypeError):
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        if base64.urlsafe_b64encode(data).rstrip(b"=") == text.encode():
            return data
    raise ValueError("must be base64url without padding")


def _der(tag: int, *parts: bytes) -> bytes:
    """A value in DER (X.690 section 8.1): tag, length, content."""
    content = b"".join(parts)
    length = len(content).to_bytes((len(content).bit_length() + 7) // 8 or 1, "big")
    if len(content) > 127:
        length = bytes([0x80 | len(length)]) + length
    return bytes([tag]) + length + content


def _der_integers(*numbers: int) -> bytes:
    """A SEQUENCE of INTEGERs: an RSA key (RFC 8017 A.1.1), an ECDSA signature (RFC 3279 section 2.2.3)."""
    return _der(0x30, *(_der(2, number.to_bytes(number.bit_length() // 8 + 1, "big")) for number in numbers))


def _rsa_key(modulus: int, exponent: int) -> bytes:
    low, high = RSA_BITS
    if not low <= modulus.bit_length() <= high:
        raise ValueError(f"an RSA key must have {low} to {high} bits")
    if not (modulus % 2 and exponent % 2 and 3 <= exponent < 1 << 32):
        raise ValueError("an RSA key must have an odd modulus and an odd exponent from 3 on")
    return _der_integers(modulus, exponent)


class PublicKey:
    """A key that checks signatures, for any thread. `kind` is RSA, P-256, P-384 or Ed25519."""

    def __init__(self, crypto: LibCrypto, kind: str, key: bytes) -> None:
        """`key` as it stands in a SubjectPublicKeyInfo (RFC 5280 section 4.1). Raises ValueError where
        libcrypto does not take it, as of a point that is not on the curve."""
        self.kind, self._crypto = kind, crypto
        data = _der(0x30, _KEY_KINDS[kind], _der(3, b"\0", key))
        place = ctypes.c_char_p(data)                   # d2i_PUBKEY moves the pointer, not the bytes
        self._key = crypto.d2i_PUBKEY(None, ctypes.addressof(place), len(data))
        if not self._key:
            crypto.ERR_clear_error()
            raise ValueError(f"is no key of {kind}")

    def __del__(self) -> None:
        self._crypto.EVP_PKEY_free(self._key)

    @classmethod
    def from_jwk(cls, crypto: LibCrypto, jwk: dict) -> PublicKey:
        """The key in a JSON Web Key (RFC 7518 section 6, RFC 8037). Raises ValueError for one that is wrong,
        too small or of another kind. Private parts are not looked at."""
        if jwk.get("kty") == "RSA":
            numbers = (int.from_bytes(base64url_bytes(jwk.get(name)), "big") for name in ("n", "e"))
            return cls(crypto, "RSA", _rsa_key(*numbers))
        kind = str(jwk.get("crv"))
        kty, size = _CURVES.get(kind, ("", 0))
        if not kty or jwk.get("kty") != kty:
            raise ValueError("must be a key of RSA, EC with P-256 or P-384, or Ed25519")
        point = [base64url_bytes(jwk.get(name)) for name in ("x", "y")[:1 + (kty == "EC")]]
        if any(len(coordinate) != size for coordinate in point):
            raise ValueError(f"the coordinates of {kind} have {size} bytes")
        uncompressed = b"\4" * (kty == "EC")            # SEC 1 section 2.3.3
        return cls(crypto, kind, uncompressed + b"".join(point))

    def verify(self, alg: str, message: bytes, signature: bytes) -> bool:
        """Whether `signature` is this key's of `message` by an algorithm of JWS_ALGORITHMS; never by one that
        is for another kind of key."""
        kind, digest = JWS_ALGORITHMS.get(alg, ("", None))
        if kind != self.kind:
            return False
        if alg.startswith("ES"):
            signature = self._der_signature(signature)
        crypto, context = self._crypto, self._crypto.EVP_MD_CTX_new()
        try:
            if context and self._begin(context, alg, digest) and crypto.EVP_DigestVerify(
                    context, signature, len(signature), message, len(message)) == 1:
                return True
            crypto.ERR_clear_error()
            return False
        finally:
            crypto.EVP_MD_CTX_free(context)

    def _begin(self, context: int, alg: str, digest: Optional[bytes]) -> bool:
        crypto, settings = self._crypto, ctypes.c_void_p()
        algorithm = crypto.EVP_get_digestbyname(digest) if digest else None
        if crypto.EVP_DigestVerifyInit(context, ctypes.addressof(settings), algorithm, None, self._key) != 1:
            return False
        pss = ((b"rsa_padding_mode", b"pss"), (b"rsa_pss_saltlen", b"digest"), (b"rsa_mgf1_md", digest))
        return not alg.startswith("PS") or all(
            crypto.EVP_PKEY_CTX_ctrl_str(settings, name, value) == 1 for name, value in pss)

    def _der_signature(self, signature: bytes) -> bytes:
        """r and s of a JWS (RFC 7518 section 3.4) as libcrypto takes them; nothing, which is no signature,
        where the length is not theirs or one is 0."""
        size = _CURVES[self.kind][1]
        r, s = (int.from_bytes(half, "big") for half in (signature[:size], signature[size:]))
        return _der_integers(r, s) if r and s and len(signature) == 2 * size else b""


# =============================================================================
# At rest: personal columns encrypted with the operator's keys. Knows events; knows no SQL.
# =============================================================================

KEY_LINE = re.compile(r"([A-Za-z0-9._-]{1,64}):([A-Za-z0-9+/]{43}=)")
PATIENTS_KEPT = 16384                   # blind indexes in memory: a patient comes again
FORMAT = b"\x01"                        # of what is encrypted: this, length of the key's id, id, nonce, ciphertext


def read_encryption_keys(path: str) -> dict:
    """{id: 32 bytes} of a key file, in its order: a key in each line, ID:BASE64. Raises SetupError."""
    where, keys = f"encryption_key_file {path}", {}
    check_place("encryption_key_file", path)
    try:
        lines = Path(path).read_text("ascii").splitlines()
    except (OSError, ValueError) as error:
        raise SetupError(f"{where}: {reason_of(error)}") from None
    for number, line in enumerate(lines, 1):
        match = KEY_LINE.fullmatch(line.strip())
        if line.strip() and not match:
            raise SetupError(f"{where}: line {number} is not ID:BASE64 with a key of 32 bytes; keygen --encryption "
                             "makes one")
        if match and keys.setdefault(match[1], base64.b64decode(match[2])) != base64.b64decode(match[2]):
            raise SetupError(f"{where}: line {number} has the id of another key, {match[1]}")
    if not keys:
        raise SetupError(f"{where}: there is no key in it; keygen --encryption makes one")
    return keys


class Unreadable(AppointmentEvent):
    """An event of which something cannot be decrypted: changed by hand, or its key is gone."""


class Encryption:
    """Encrypts what is personal in a row, AES-256-GCM with a fresh nonce each: the first key encrypts, all decrypt.
    For any thread, and for as many databases as there are.

    Associated data are table, column and the row's key (appointment_id and timestamp: the id is not known before
    the INSERT), so that no value can be moved. A patient is looked up by index_of(patient_id), a keyed
    HMAC-SHA-256.
    """

    def __init__(self, keys: dict, crypto: Optional[LibCrypto] = None,
                 tell: Callable[[str], Any] = _no_error) -> None:
        """`keys` is {id: 32 bytes}; tell(text) hears of what cannot be decrypted. Raises SetupError without
        libcrypto."""
        crypto = crypto or LibCrypto()
        self._ciphers = {key_id: AESGCM(crypto, key) for key_id, key in keys.items()}
        self._indexes = [self._keyed(key, "blind index") for key in keys.values()]
        self._signers = {key_id: self._keyed(key, "seals") for key_id, key in keys.items()}
        self.key_id, self._tell, self._told = next(iter(keys)), tell, set()
        # NIST SP 800-38D section 8.2.1: no nonce comes twice within a run, and two runs have other beginnings
        self._run, self._count = secrets.token_bytes(7), itertools.count()
        name = self.key_id.encode()
        self.prefix = FORMAT + bytes([len(name)]) + name
        self._seal = self._ciphers[self.key_id].seal
        self.index_of = functools.lru_cache(PATIENTS_KEPT)(self._index_of)      # 0.1 against 2 us

    @staticmethod
    def _keyed(key: bytes, purpose: str) -> Any:
        """An HMAC with a key of its own for each purpose."""
        return hmac.new(hmac.digest(key, purpose.encode(), "sha256"), digestmod="sha256")

    # -- values

    def sealed(self, data: bytes, place: bytes) -> bytes:
        """`data` encrypted for one place."""
        nonce = self._run + next(self._count).to_bytes(5, "big")
        return self.prefix + nonce + self._seal(nonce, data, place)

    def opened(self, value: Any, place: bytes) -> bytes:
        """What sealed() got. Raises ValueError, without anything of the value in it."""
        if not isinstance(value, bytes) or value[:1] != FORMAT or len(value) < 2:
            raise ValueError("it is not encrypted")
        begin = 2 + value[1]
        cipher = self._ciphers.get(value[2:begin].decode("latin-1"))
        if cipher is None:
            raise ValueError(f"its key {printable(value[2:begin].decode('latin-1'))} is not in the key file")
        return cipher.open(value[begin:begin + NONCE_BYTES], value[begin + NONCE_BYTES:], place)

    def _index_of(self, text: str) -> bytes:
        """A keyed HMAC-SHA-256, by which equal texts are found."""
        return _hmac_of(self._indexes[0], text.encode())

    def indexes_of(self, text: str) -> list:
        """index_of() by every key: rows may be from before a change of keys."""
        return [_hmac_of(keyed, text.encode()) for keyed in self._indexes]

    # -- rows

    def row(self, event: AppointmentEvent, content_key: Any) -> tuple:
        """The columns of an event as they are stored, patient_hmac, and content_hmac by the database's key.

        Hot path: all that is personal is one ciphertext, in the column of the payload, as three would take three
        times as long. content_hmac stands for it in the seals, which need not decrypt it then.
        """
        event_type, appointment_id, patient_id, timestamp, notes, received_at, client, payload, _ = event
        patient, noted = patient_id.encode(), (notes or "").encode()
        data = b"%d:%d:%b%b%b" % (len(patient), -1 if notes is None else len(noted), patient, noted, payload.encode())
        return (event_type, appointment_id, "", timestamp, None, received_at, client,
                self.sealed(data, event_place(appointment_id, timestamp)), self.index_of(patient_id),
                _hmac_of(content_key, data))

    def personal_of(self, row: Sequence) -> tuple:
        """(patient_id, notes or None, payload) as UTF-8, of a row of the columns of an AppointmentEvent. Raises
        ValueError."""
        if row[2] != "" or row[4] is not None:
            raise ValueError("patient_id or notes are not encrypted")
        return self.parts_of(self.opened(row[7], event_place(row[1], row[3])))

    @staticmethod
    def parts_of(data: bytes) -> tuple:
        """The same, of what was encrypted."""
        patient_length, notes_length, text = data.split(b":", 2)
        notes_at = int(patient_length)
        payload_at = notes_at + max(0, int(notes_length))
        return text[:notes_at], text[notes_at:payload_at] if notes_length != b"-1" else None, text[payload_at:]

    def fits_row(self, row: Sequence, index: Any, content: Any, content_key: Any) -> bool:
        """Whether patient_hmac and content_hmac are those of a row. Raises ValueError where it is unreadable."""
        patient_id = self.personal_of(row)[0].decode()
        data = self.opened(row[7], event_place(row[1], row[3]))
        return index in self.indexes_of(patient_id) and content == _hmac_of(content_key, data)

    def event(self, row: Sequence) -> AppointmentEvent:
        """The event in a row as it is stored: an Unreadable one, of which it tells, where that cannot be."""
        stored = AppointmentEvent._make(row)
        try:
            patient_id, notes, payload = self.personal_of(row)
            return stored._replace(patient_id=patient_id.decode(), notes=notes if notes is None else notes.decode(),
                                   payload=payload.decode())
        except ValueError as error:
            self.tell_unreadable("the event", stored.id, error)
            return Unreadable(*stored._replace(patient_id=None, notes=None, payload="null"))

    def tell_unreadable(self, what: str, row_id: int, error: ValueError) -> None:
        """Tell of a row, once."""
        if (what, row_id) not in self._told and len(self._told) < 10000:
            self._told.add((what, row_id))
            self._tell(f"{what} with id {row_id} cannot be decrypted: {error}; if a key is missing, put it back into "
                       "the key file, else restore a backup of the row")

    # -- seals

    def sign(self, digest: bytes) -> bytes:
        """An HMAC-SHA-256 of a seal's digest, with the first key."""
        return _hmac_of(self._signers[self.key_id], digest)

    def fits(self, key_id: Optional[str], digest: bytes, signature: Optional[bytes]) -> Optional[bool]:
        """Whether sign() with that key gave the signature; None where the key is not there."""
        if key_id not in self._signers:
            return None
        return isinstance(signature, bytes) and hmac.compare_digest(_hmac_of(self._signers[key_id], digest), signature)


def _hmac_of(keyed: Any, data: bytes) -> bytes:
    keyed = keyed.copy()
    keyed.update(data)
    return keyed.digest()


def event_place(appointment_id: str, timestamp: str) -> bytes:
    """The associated data of what is encrypted of an event."""
    return f"appointment_events\0payload\0{appointment_id}\0{timestamp}".encode()


def conflict_place(event_id: int, received_at: str) -> bytes:
    """The associated data of a conflicting event's payload."""
    return f"conflicting_events\0payload\0{event_id}\0{received_at}".encode()


def access_place(at: str, action: str, address: str) -> bytes:
    """The associated data of the detail of an access."""
    return f"access_log\0detail\0{at}\0{action}\0{address}".encode()


KEY_PLACE = b"database_keys\0value\0database"


# =============================================================================
# Files: the files of an SQLite database, and who else changes them. Knows what SQLite writes, and no SQL.
# =============================================================================

class StoreUnavailable(Exception):
    """Nothing of this group is stored: the database is locked, full, read-only or broken.

    The text is the operator's and says what to do; `public` is what senders and who asks for health may hear.
    """

    def __init__(self, text: str, public: str = "") -> None:
        super().__init__(text)
        self.public = public or text


class StoreLocked(StoreUnavailable):
    """Another process holds the write lock; trying again is worth it."""


class FilesChanged(StoreUnavailable):
    """Somebody else has changed the files of the database."""

    def __init__(self, text: str) -> None:
        super().__init__(text, "somebody has changed the files of the database")


class _Unlinked(FilesChanged):
    """-wal or -shm has lost its name; what is in the open ones can still be moved into the main file."""


class _Replaced(FilesChanged):
    """The main file was deleted, or others have begun a new -shm for it. What is open can still be read, but
    to write it into a main file that others use would destroy that."""


class WALIndex(NamedTuple):
    """The head of -shm (sqlite.org/walformat.html): what SQLite's processes tell each other about the WAL.

    `change` counts commits; `pages` in the database and the `check`sum of the last of `frames` are those of
    the last one; `moved` frames are in the main file for good; as many as `tried` a checkpoint may have begun
    to move. `salt` names the WAL's generation.
    """
    change: int
    page: int                       # bytes; 1 stands for 65536
    frames: int
    pages: int
    check_1: int
    check_2: int
    salt: bytes
    moved: int
    tried: int

    def page_bytes(self) -> int:
        """How long a page is."""
        return self.page if self.page > 1 else 65536


class _Files:
    """The main file, -wal and -shm: notices when they are not what SQLite left, which SQLite itself does not.

    It goes on writing into files that were deleted, and moves its WAL over whatever was copied into the main
    file. So before each commit, and quickly after it:

    - Each name must lead to the file that is open.
    - The main file's size and time of change stay as they were, but for a checkpoint, which leaves its traces
      in -shm before it writes (`tried`) and after (`moved`). A change without them is somebody else's.
    - -wal must hold the last frame that -shm tells of, and the last one seen before.

    POSIX takes all locks of a process on a file when it closes ANY of its descriptors of it. So those here
    are closed after SQLite's, and not at all while -wal exists: then somebody else in this process may have
    the database open.
    """
    INDEX = struct.Struct("=8xI2xHIIII8s8x48xI28xI")
    FRAME = struct.Struct(">8x8sII")
    FRAME_HEAD, WAL_HEAD = 24, 32
    LIST_HEAD, LIST_BLOCK = 34, 4096    # entries of 4 bytes; the head takes the place of the first ones
    TICK = 20_000_000               # nanoseconds in which two changes may get the same time
    SHARED_LOCK = 0x40000002        # where in the main file SQLite's lock of those who have it open is

    def __init__(self, path: str) -> None:
        """Opens the main file, and makes it when there is none. Raises OSError."""
        self.main, real = path, os.path.realpath(path)
        self.wal, self.shm = real + "-wal", real + "-shm"
        self.is_watched = hasattr(os, "pread")  # not on Windows, where open files keep their names
        self.is_made = self.is_held = self.is_left = self.is_doubtful = False
        self._open: dict = {}                               # {path: descriptor}
        self._spare: list = []                              # descriptors of files that SQLite has made anew
        self._judging = threading.Lock()
        self._last = self._ids = self._change = self._moves = self._traces = None
        try:
            self._open[path] = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
        # patients' data: for the owner only; SQLite gives -wal and -shm the same rights
        except FileNotFoundError:
            self._open[path] = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
            self.is_made = True
        except PermissionError:
            self._open[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        if not self.is_watched:
            os.close(self._open.pop(path))

    def close(self) -> None:
        """Close the descriptors, after all connections are closed."""
        if self.is_held:
            self.hold(False)
        if self.is_made and not os.path.getsize(self.main):
            os.unlink(self.main)                            # opening has failed
        if not self.is_watched or not os.path.exists(self.wal):
            for descriptor in [*self._open.values(), *self._spare]:
                os.close(descriptor)
        self._open, self._spare = {}, []

    def watch(self) -> None:
        """From now on the files are those of the writer, which has just been opened. Raises OSError."""
        names = (self.main, self.wal, self.shm) if self.is_watched else (self.main,)
        for name in names[1:]:
            self._open_anew(name)
        self._ids = [os.stat(name)[1:3] for name in names]      # (inode, device)
        self.is_made = False                                    # and now it is in use
        if self.is_watched:
            self._change = self._moves = None
            self.check()

    def problem_of_left_wal(self) -> str:
        """Why -wal, which a crash left, cannot belong to the main file; "" when it may, or there is none."""
        if not self.is_watched:
            return ""
        for name in (self.wal, self.shm):
            with contextlib.suppress(FileNotFoundError):
                self._open_anew(name)
        problem = ""
        for pause in (0.0, 0.05, 0.2):  # another process may use it, and change it under our eyes
            time.sleep(pause)
            if self.wal in self._open:
                left = _LeftWAL(self._open[self.main], self._open[self.wal], self._open.get(self.shm))
                problem, self.is_left, self.is_doubtful = left.problem(), left.is_used(), left.is_doubtful()
            if not problem:
                break
        return problem

    def _open_anew(self, name: str) -> None:
        """Have the file open that has this name now."""
        descriptor = self._open.pop(name, None)
        if descriptor is not None:
            self._spare.append(descriptor)
        self._open[name] = os.open(name, os.O_RDONLY)

    def index(self) -> WALIndex:
        """What -shm says now. Raises StoreUnavailable when it says nothing."""
        data = os.pread(self._open[self.shm], self.INDEX.size, 0)
        for _ in range(100):
            if data[:48] == data[48:96]:                    # another process may write it just now
                break
            data = os.pread(self._open[self.shm], self.INDEX.size, 0)
        if len(data) < self.INDEX.size or not data[12]:
            raise FilesChanged(self._told(self.shm))
        return WALIndex._make(self.INDEX.unpack(data))

    def unmoved(self) -> int:
        """How many frames of the WAL are not in the main file yet, as of the last look."""
        return self._last.frames - self._last.moved

    def length(self) -> int:
        """How many frames the WAL has, as of the last look."""
        return self._last.frames

    def are_untouched(self) -> bool:
        """Whether nothing at all has happened to the files since the last check(): the quick half of it. A
        name that is given to another file changes the time of the one that loses it."""
        return self._traces is not None and self._traces == self._traces_now()

    def is_only_wal_longer(self) -> bool:
        """Whether what has happened since the last check() can be a commit of ours: its quick half, too."""
        if self._traces is None:
            return False
        before, now = self._traces, self._traces_now()
        (_, links, size), (_, links_now, size_now) = before[1], now[1]
        return before[::2] == now[::2] and links == links_now and size <= size_now

    def _traces_now(self) -> list:
        return [_trace(os.fstat(descriptor)) for descriptor in self._open.values()]

    def check(self) -> None:
        """Raises StoreUnavailable, which says what happened and what to do, unless all is well."""
        if self._ids is None:
            return
        if not self.is_watched:
            self._look_at_main()
            return
        self._traces = None
        # Others may checkpoint or commit between two looks, and the system may stop them in the middle
        for pause in (0.001, 0.004, 0.01, 0.03, None):
            try:
                self._look()
                break
            except (StoreUnavailable, OSError):
                if pause is None:
                    self.hold(True)
                    raise
                time.sleep(pause)
        if self.is_held:
            self.hold(False)

    def _look_at_main(self) -> os.stat_result:
        try:
            found = os.stat(self.main)
        except OSError:
            found = None
        if found is None or found[1:3] != self._ids[0]:
            if self.is_watched and not os.fstat(self._open[self.main]).st_nlink:
                raise _Replaced(f"{self.main} was deleted or replaced while it is in use")
            raise FilesChanged("the file was moved or deleted while it is in use; put it back before "
                               "the service is restarted")
        return found

    def _look(self) -> None:
        last = self._last
        index = self.index()  # before stat(): a checkpoint says so before it writes
        found = self._look_at_main()
        if (found.st_size, found.st_mtime_ns) != self._change:
            self._judge()
        else:
            self._moves = index.salt, index.moved, index.tried
        if index.frames:
            self._check_frame(index)
        if last is not None:
            self._check_progress(last, index)
        self._last = index
        shm, wal = self._stat_of(self.shm, self._ids[2]), self._stat_of(self.wal, self._ids[1])
        if max(found.st_ctime_ns, shm.st_ctime_ns) < time.time_ns() - self.TICK:
            self._traces = [_trace(found), _trace(wal), _trace(shm)]

    def _stat_of(self, name: str, identity: tuple) -> os.stat_result:
        try:
            found = os.stat(name)
        except OSError:
            found = None
        if found is None or found[1:3] != identity:
            kind = _Replaced if found is not None and name == self.shm else _Unlinked
            raise kind(f"{name} was moved, deleted or replaced while it is in use")
        return found

    def _check_frame(self, index: WALIndex) -> None:
        """The last frame of `index` must be in -wal, and its page in the list of them in -shm: a commit makes
        the head of -shm right again when an older -shm was copied over it, and not that list."""
        place = self.WAL_HEAD + (index.frames - 1) * (self.FRAME_HEAD + index.page_bytes())
        head = os.pread(self._open[self.wal], self.FRAME_HEAD, place)
        expected = (index.salt, index.check_1, index.check_2)
        if len(head) < self.FRAME_HEAD or self.FRAME.unpack(head) != expected:
            raise FilesChanged(self._told(self.wal))
        block, entry = divmod(index.frames - 1 + self.LIST_HEAD, self.LIST_BLOCK)
        listed = os.pread(self._open[self.shm], 4, block * 8 * self.LIST_BLOCK + 4 * entry)
        if int.from_bytes(listed, sys.byteorder) != int.from_bytes(head[:4], "big"):
            raise FilesChanged(self._told(self.shm))

    def _check_progress(self, last: WALIndex, index: WALIndex) -> None:
        """Commits are counted on, and a WAL only grows until it is started anew."""
        is_same = index.salt == last.salt
        if (index.change - last.change) % 2 ** 32 >= 2 ** 31 or is_same and index.frames < last.frames:
            raise FilesChanged(self._told(self.shm))
        if is_same and last.frames and index.frames > last.frames:
            self._check_frame(last)

    def _judge(self) -> None:
        """The main file has changed: raise StoreUnavailable unless a checkpoint has done that."""
        with self._judging:
            index = self.index()
            found = os.fstat(self._open[self.main])
            again = self.index()
            moves = index.salt, index.moved, index.tried
            foreign = moves == self._moves and index.moved == index.tried
            # All is moved: then nothing is missing either
            is_all_moved = index.frames == index.moved == index.tried
            short = is_all_moved and found.st_size < index.pages * index.page_bytes()
            if foreign or short or moves != (again.salt, again.moved, again.tried):
                raise FilesChanged(
                    f"{self.main} was overwritten or truncated while it is in use, and nothing more is "
                    f"written to it; stop the service, and if it is a restored copy move {self.wal} and "
                    f"{self.shm} away, else restore one")
            self._change, self._moves = (found.st_size, found.st_mtime_ns), moves

    def _told(self, name: str) -> str:
        return (f"{name} was overwritten or truncated while it is in use: restart the service; if events of "
                "the last seconds are missing then, let their senders repeat them")

    def hold(self, on: bool) -> None:
        """Keep SQLite from moving the WAL into the main file, and from deleting it, when the last connection
        is closed: it needs the file for itself then, and a lock of another open file description is in its
        way."""
        if on != self.is_held and hasattr(fcntl, "F_OFD_SETLK"):
            kind = fcntl.F_RDLCK if on else fcntl.F_UNLCK
            lock = struct.pack("hhqqi0q", kind, os.SEEK_SET, self.SHARED_LOCK, 1, 0)
            with contextlib.suppress(OSError):
                fcntl.fcntl(self._open[self.main], fcntl.F_OFD_SETLK, lock)
                self.is_held = on


def _trace(found: os.stat_result) -> tuple:
    """What changes with a file; our own commit may have given -wal the same time as what comes just after."""
    return found.st_ctime_ns, found.st_nlink, found.st_size


class _LeftWAL:
    """A -wal that a crash left, read as a file: does it belong to the main file beside it?

    SQLite does not ask: whoever restores a copy and leaves -wal gets the newer state back, or a mixture. A
    main file that belongs to the WAL is what was there before it, with some or all of what is in it moved
    over. So it cannot

    - be without WAL mode, or have another page size;
    - lack pages that the WAL does not hold either;
    - have a change counter from outside of the WAL's own, or the one before them (a transaction adds 0 or 1);
    - differ from the WAL in what -shm says is moved (of each page its last frame; one page is looked at);
    - be written long after the WAL was, other than by a checkpoint.

    What a copy of the folder does to dates and what a crash does to the last transaction must raise no alarm.
    """
    MAGIC = (0x377F0682, 0x377F0683)
    LATE = 60.0  # seconds; more where the main file is so large that copying it alone takes longer
    COPIED_A_SECOND = 5e6           # bytes

    def __init__(self, database: int, wal: int, shm: Optional[int]) -> None:
        """Takes open descriptors."""
        self._main, self._wal, self._shm = database, wal, shm
        self._head = os.pread(wal, 32, 0)
        self._frames: list = []     # page number of each frame up to the last commit
        self._pages = 0             # of the database after the last commit
        self._settled = self._page = 0
        if len(self._head) == 32 and int.from_bytes(self._head[:4], "big") in self.MAGIC:
            self._page = int.from_bytes(self._head[8:12], "big")
            self._read()

    def _read(self) -> None:
        numbers, ends = [], [0, 0]
        while True:
            head = os.pread(self._wal, 24, self._place(len(numbers)))
            if len(head) < 24 or head[8:16] != self._head[16:24]:
                break
            number, pages = struct.unpack_from(">II", head)
            numbers.append(number)
            if pages:
                self._pages = pages
                ends = [ends[1], len(numbers)]
        # What follows the last commit never was. The last one itself may be torn, if the machine crashed
        self._settled, self._frames = ends[0], numbers[:ends[1]]

    def _place(self, frame: int) -> int:
        return 32 + frame * (24 + self._page)

    def _content(self, frame: int) -> bytes:
        return os.pread(self._wal, self._page, self._place(frame) + 24)

    def is_used(self) -> bool:
        """Whether anything is in it."""
        return bool(self._frames)

    def problem(self) -> str:
        """What does not fit, "" when nothing is amiss."""
        if not self._frames:
            return ""
        head = os.pread(self._main, 100, 0)
        if len(head) < 100:
            return "the database is empty"
        page = int.from_bytes(head[16:18], "big")
        if head[18] != 2 or (65536 if page == 1 else page) != self._page:
            return "the database is of another kind"
        size = os.fstat(self._main).st_size // self._page
        if self._pages > size:
            missing = set(range(size + 1, self._pages + 1)).difference(self._frames)
            missing.discard(0x40000000 // self._page + 1)  # where SQLite's locks are there never is a page
            if missing:
                return "the database lacks pages that were there before"
        return self._problem_of_counter(int.from_bytes(head[24:28], "big")) or self._problem_of_content()

    def _problem_of_counter(self, counter: int) -> str:
        places = [frame for frame, number in enumerate(self._frames) if number == 1]
        if not places or places[0] >= self._settled and not self._is_whole(places[0]):
            return ""
        counters = [int.from_bytes(self._content(frame)[24:28], "big") for frame in places]
        if counter < counters[0] - 1:
            return "the database is older"
        if counter > max(counters):
            return "the database is newer"
        return ""

    def _is_whole(self, last: int) -> bool:
        """Whether the checksums are right up to this frame."""
        order = "<>"[self._head[3] & 1]
        sums = struct.unpack(">II", self._head[24:])
        for frame in range(last + 1):
            head = os.pread(self._wal, 24, self._place(frame))
            sums = self._checksum(order, head[:8] + self._content(frame), sums)
            if sums != struct.unpack(">II", head[16:]):
                return False
        return True

    @staticmethod
    def _checksum(order: str, data: bytes, sums: tuple) -> tuple:
        one, two = sums
        for first, second in struct.iter_unpack(order + "II", data):
            one = one + first + two & 0xFFFFFFFF
            two = two + second + one & 0xFFFFFFFF
        return one, two

    def _problem_of_content(self) -> str:
        index = self._index()
        found, wal = os.fstat(self._main), os.fstat(self._wal)
        moved = index.moved if index is not None else 0
        if found.st_mtime > wal.st_mtime + self.LATE + found.st_size / self.COPIED_A_SECOND:
            if index is None:
                moved = len(self._frames)
            elif not index.tried:
                return "the database was written by something else since"
        # A checkpoint that a reader keeps from the newest frame of a page does not move its older ones either
        newest = {number: frame for frame, number in enumerate(self._frames) if number <= self._pages}
        lowest = min((number for number, frame in newest.items() if frame < moved), default=0)
        if not lowest:
            return ""
        stored = os.pread(self._main, self._page, (lowest - 1) * self._page)
        if self._content(newest[lowest]) == stored:
            return ""
        return "the database was written by something else since"

    def is_doubtful(self) -> bool:
        """Whether the main file is newer, though no checkpoint has written it: as in a copy of the folder, or
        after a restore that came at once."""
        index = self._index()
        newer = os.fstat(self._main).st_mtime > os.fstat(self._wal).st_mtime
        return newer and index is not None and not index.tried and self.is_used()

    def _index(self) -> Optional[WALIndex]:
        """What -shm says of this WAL, None when it says nothing."""
        data = b""
        if self._shm is not None:
            data = os.pread(self._shm, _Files.INDEX.size, 0)
        if len(data) < _Files.INDEX.size or data[:48] != data[48:96] or data[32:40] != self._head[16:24]:
            return None
        index = WALIndex._make(_Files.INDEX.unpack(data))
        return index._replace(moved=min(index.moved, len(self._frames)))


# =============================================================================
# Tables: rows of one transaction, and files of other versions that become ours. Knows SQL; knows no threads.
# =============================================================================

DATA_VERSION = 3
COLUMNS = AppointmentEvent._fields[:-1]
LOCK_STEP = 0.1                 # seconds to wait for another thread of ours that writes
MOST_READ = 256 * 1024  # characters of payloads in one read: a reader that stalls keeps no more in memory
# a longer payload is compared outside of the transaction: everybody waits for what is in it
MOST_COMPARED = 8192
DAMAGED = "the file is damaged; restore a backup, or save what is left with sqlite3's .recover"

EVENTS_TABLE = """
CREATE TABLE {name} (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    event_type TEXT NOT NULL, appointment_id TEXT NOT NULL, patient_id TEXT NOT NULL,
    timestamp TEXT NOT NULL,      -- canonical UTC
    notes TEXT,
    received_at TEXT NOT NULL,    -- UTC
    client TEXT,                  -- who sent it
    payload TEXT NOT NULL,        -- the JSON as it came: no extra field is lost
    patient_hmac BLOB,            -- by which a patient is found where patient_id is encrypted
    content_hmac BLOB             -- what is sealed of what is encrypted
)"""
# The same unique index finds duplicates and looks up appointments; a second one would only cost writes
EVENTS_INDEX = ("CREATE UNIQUE INDEX idx_appointment_timestamp ON appointment_events "
                "(appointment_id, timestamp)")
CONFLICTS_TABLE = """
CREATE TABLE conflicting_events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id INTEGER NOT NULL,    -- the stored event that has the same key
    received_at TEXT NOT NULL, client TEXT,
    payload TEXT NOT NULL,
    digest BLOB                   -- SHA-256 of the content
)"""
ACCESS_TABLE = """
CREATE TABLE access_log (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at TEXT NOT NULL,             -- UTC
    client TEXT, address TEXT,    -- who, and from where
    action TEXT NOT NULL,
    detail TEXT,                  -- such as the filter of a read
    rows INTEGER
)"""
SEALS_TABLE = """
CREATE TABLE seals (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at TEXT NOT NULL,             -- UTC
    source TEXT NOT NULL,         -- the table
    first_id INTEGER NOT NULL, last_id INTEGER NOT NULL, rows INTEGER NOT NULL,
    content BLOB NOT NULL,        -- SHA-256 of what the rows mean
    digest BLOB NOT NULL,         -- SHA-256 of this seal and of the digest before
    hmac BLOB, key_id TEXT,       -- of the digest, with an encryption key
    purged TEXT                   -- UTC
)"""
KEYS_TABLE = """
CREATE TABLE database_keys (
    name TEXT PRIMARY KEY,
    value BLOB NOT NULL,          -- 32 random bytes, encrypted with key_id where there is one
    key_id TEXT
)"""
CONFLICTS_INDEX = "CREATE INDEX idx_conflicting_event_digest ON conflicting_events (event_id, digest)"


class Outcome(NamedTuple):
    """What became of one event: kind "stored", "duplicate" (event_id is then the one stored before) or
    "failed"; "done" is said of a work, "passed" of a mere mark in the queue. `identical` is None where
    contents were too large to compare in the transaction."""
    kind: str
    event_id: Optional[int] = None
    identical: Optional[bool] = False
    error: Optional[Exception] = None


class Filter(NamedTuple):
    """Which events to read. Times are the appointments', canonical UTC: since <= time < until."""
    appointment_id: Optional[str] = None
    patient_id: Optional[str] = None
    event_type: Optional[str] = None
    since: Optional[str] = None
    until: Optional[str] = None


def _insert_statement(rows: int, columns: tuple) -> str:
    row = "(" + ", ".join("?" * len(columns)) + ")"
    return (f"INSERT INTO appointment_events ({', '.join(columns)}) VALUES {', '.join([row] * rows)} "
            "ON CONFLICT (appointment_id, timestamp) DO NOTHING")


class Session:
    """One transaction of SQLite's writer; it ends with the `with` of SQLite.transaction()."""
    # Hot path: one statement for up to 64 rows gives the GIL away once, not 64 times, and SQLite works while
    # Python reads the next requests. One for each number of rows, as a group of 63 made of powers of two
    # would be six statements; 64 rows stay below SQLite's old limit of 999 values.
    MOST_ROWS = 64
    INSERTS = tuple(_insert_statement(rows, COLUMNS) for rows in range(MOST_ROWS + 1))
    ENCRYPTED_INSERTS = tuple(_insert_statement(rows, (*COLUMNS, "patient_hmac", "content_hmac"))
                              for rows in range(MOST_ROWS + 1))
    FIND = "SELECT id FROM appointment_events WHERE appointment_id = ? AND timestamp = ?"
    NEWEST = "SELECT id, appointment_id, timestamp FROM appointment_events ORDER BY id DESC LIMIT ?"
    # octet_length reads no overflow page; before SQLite 3.43 nothing else tells a text's length
    LENGTH = "SELECT octet_length(payload) FROM appointment_events WHERE id = ?"
    if sqlite3.sqlite_version_info < (3, 43):
        LENGTH = "SELECT length(CAST(payload AS BLOB)) FROM appointment_events WHERE id = ?"
    ROW = f"SELECT {', '.join(COLUMNS)}, id FROM appointment_events WHERE id = ?"
    # A repeated retry of the same content is kept once, or a stubborn sender would fill the disk
    KEEP = """
INSERT INTO conflicting_events (event_id, received_at, client, payload, digest)
SELECT :event_id, :received_at, :client, :payload, :digest WHERE NOT EXISTS (
    SELECT 1 FROM conflicting_events WHERE event_id = :event_id AND digest = :digest AND client IS :client)"""
    # What a value can be blamed for; all other errors are the disk's or the file's. ProgrammingError: of a
    # value that sqlite3 cannot bind, since Python 3.12
    ROW_ERRORS = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError, sqlite3.ProgrammingError,
                  ValueError, TypeError, OverflowError)

    def __init__(self, connection: sqlite3.Connection, encryption: Optional[Encryption] = None,
                 content_key: Any = None) -> None:
        """`content_key` goes with an `encryption`: that of the database for content_hmac."""
        self._connection, self._encryption, self._content_key = connection, encryption, content_key
        self.execute = connection.execute
        self._compared = 0              # bytes of stored payloads that this transaction has looked at

    @contextlib.contextmanager
    def savepoint(self, keep: bool = True) -> Iterator[None]:
        """What is done within is undone, and nothing else, when it raises or is not to be kept."""
        self.execute("SAVEPOINT work")
        try:
            yield
            if not keep:
                self.execute("ROLLBACK TO work")
        except BaseException:
            if self._connection.in_transaction:         # a full disk has rolled back all of it
                self.execute("ROLLBACK TO work")
                self.execute("RELEASE work")
            raise
        self.execute("RELEASE work")

    def rehearse(self) -> None:
        """All that storing an event takes, durably with the commit, but nothing is changed. Raises
        sqlite3.Error when an event could not be stored: a trigger's body, say, is only read when it fires."""
        tried = [AppointmentEvent("scheduled", "\x7ftry", "\x7ftry", "", None, "", None, "{}")]
        with self.savepoint(keep=False):
            if self._insert_rows(tried).rowcount != 1:
                raise sqlite3.IntegrityError("no event would be stored")
            if self._insert_rows(tried).rowcount:
                raise sqlite3.IntegrityError("duplicates would be stored")
        self.execute(f"PRAGMA user_version = {DATA_VERSION}")

    def insert(self, events: list) -> list:
        """Store events: an Outcome for each, in their order. Duplicates with other content are kept aside,
        but for those whose `identical` is None. Raises StoreUnavailable."""
        outcomes: list = []
        for at in range(0, len(events), self.MOST_ROWS):
            outcomes += self._insert(events[at:at + self.MOST_ROWS])
        return outcomes

    def _insert(self, chunk: list) -> list:
        """The outcomes of at most MOST_ROWS events."""
        # A work or a trigger has ended it: rows would be committed one by one
        if not self._connection.in_transaction:
            raise StoreUnavailable("the transaction is gone")
        try:
            cursor = self._insert_rows(chunk)
        except self.ROW_ERRORS as error:
            if len(chunk) == 1:
                return [Outcome("failed", error=error)]
            # One bad row must not fail its neighbours
            return [self._insert([event])[0] for event in chunk]
        if cursor.rowcount < len(chunk):
            return self._sort_out(chunk, cursor.rowcount)
        # AUTOINCREMENT counts up by one within a statement. Hot path: _make takes three times as long
        first, new = cursor.lastrowid - len(chunk) + 1, tuple.__new__
        ids = range(first, first + len(chunk))
        return [new(Outcome, ("stored", event_id, False, None)) for event_id in ids]

    def _insert_rows(self, events: list) -> sqlite3.Cursor:
        values: list = []
        encryption = self._encryption
        if encryption is None:
            for event in events:
                values += event[:-1]
            return self.execute(self.INSERTS[len(events)], values)
        for event in events:
            values += encryption.row(event, self._content_key)
        return self.execute(self.ENCRYPTED_INSERTS[len(events)], values)

    def _sort_out(self, chunk: list, stored: int) -> list:
        """All but `stored` of `chunk` were duplicates: tell which, and keep those with other content."""
        # AUTOINCREMENT never gives an id again or a lower one: the rows just stored have the highest
        new = {(row[1], row[2]): row[0] for row in self.execute(self.NEWEST, (stored,))}
        outcomes = []
        for event in chunk:
            event_id = new.pop((event.appointment_id, event.timestamp), None)  # the first of a key was stored
            outcomes.append(Outcome("stored", event_id) if event_id else self._duplicate(event))
        return outcomes

    def _duplicate(self, event: AppointmentEvent) -> Outcome:
        found = self.execute(self.FIND, (event.appointment_id, event.timestamp)).fetchone()
        if found is None:
            error = sqlite3.IntegrityError("a trigger of the database refused the row")
            return Outcome("failed", error=error)
        event_id = found[0]
        if len(event.payload) > MOST_COMPARED or self._compared > MOST_READ:
            return Outcome("duplicate", event_id, None)
        length = self.execute(self.LENGTH, found).fetchone()[0]
        self._compared += length
        if length > MOST_COMPARED:
            return Outcome("duplicate", event_id, None)
        stored = self._stored_payload(found)
        if stored == event.payload:
            return Outcome("duplicate", event_id, True)
        digest = content_digest(event.payload)
        identical = stored is not None and digest == content_digest(stored)
        if not identical:
            self.keep_conflict(event_id, event, digest)
        return Outcome("duplicate", event_id, identical)

    def _stored_payload(self, found: tuple) -> Optional[str]:
        """That of the event with the id in `found`; None where it cannot be decrypted."""
        row = self.execute(self.ROW, found).fetchone()
        stored = _event_of(row, self._encryption)
        return None if isinstance(stored, Unreadable) else stored.payload

    def keep_conflict(self, event_id: int, event: AppointmentEvent, digest: bytes) -> None:
        """Keep an event with the key of the stored one and other content: once for each client and digest."""
        payload: Any = event.payload
        if self._encryption is not None:
            # A digest without a key would tell who guesses the content that the guess is right
            payload = self._encryption.sealed(payload.encode(), conflict_place(event_id, event.received_at))
            digest = self._encryption.index_of(digest.hex())
        self.execute(self.KEEP, {"event_id": event_id, "received_at": event.received_at,
                                 "client": event.client, "payload": payload, "digest": digest})


# -- what sqlite3 and its errors mean

def _uri(path: PurePath, mode: str) -> str:
    """The file as SQLite takes it: it refuses a URI with a host, as Windows' //server/share would become."""
    uri = path.as_uri()
    if not uri.startswith("file:///"):
        uri = "file:////" + uri[len("file://"):]
    return f"{uri}?mode={mode}"


def _roll_back(connection: Optional[sqlite3.Connection]) -> None:
    # SQLite has itself rolled back some, such as a full disk
    if connection is not None and connection.in_transaction:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")


def _lenient_text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _unavailable(error: Exception, path: str) -> StoreUnavailable:
    text = reason_of(error)
    kind = StoreLocked if "locked" in text or "busy" in text else StoreUnavailable
    return kind(_reason(error, path), text)


def _reason(error: Exception, path: str) -> str:
    """An error of SQLite or the system about the database `path` in an operator's words, with what to do."""
    text = reason_of(error)
    vague = {"unable to open database file": "it cannot be opened",
             "attempt to write a readonly database": "it is read-only for this user",
             "Permission denied": text, "Too many open files": text}
    if text in vague:
        return _obstacle(path) or vague[text]
    hints = {"database disk image is malformed": DAMAGED,
             "file is not a database": "the file is not a SQLite database; it was not changed",
             "disk I/O error": "the system could not read or write the file (disk I/O error): look at the "
                               "disk and at limits of file size (ulimit -f)",
             "database or disk is full": "the disk is full"}
    return hints.get(text, text)


def _obstacle(path: str) -> str:
    """What keeps this user from the database, for which SQLite has the same words whatever it is."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return advised_reason_of(error)
    real = os.path.realpath(path)
    for name in (real, real + "-wal", real + "-shm", os.path.dirname(real)):
        may = os.access(name, os.R_OK | os.W_OK, effective_ids=os.access in os.supports_effective_ids)
        if os.path.exists(name) and not may:
            return f"{name} is read-only for this user, or not even readable: chmod or chown it"
    return ""


def _refuse_other_tables(connection: sqlite3.Connection, path: str, version: int) -> None:
    """Raise SetupError or sqlite3.Error unless the tables are those of our `version`, or can become them."""
    columns = _columns_of(connection)
    # Another program's file may have our version number, too
    missing = set(COLUMNS if version else REQUIRED_FIELDS if columns else ()) - set(columns)
    if missing:
        raise SetupError(f"database {path}: its table appointment_events is not ours, it lacks "
                         f"{', '.join(sorted(missing))}")
    if version:
        # These fail without the unique index, and without the other table
        connection.execute("EXPLAIN " + Session.INSERTS[1], [""] * len(COLUMNS))
        connection.execute("SELECT event_id, received_at, client, payload FROM conflicting_events "
                           "LIMIT 1")
    if version > 1:
        connection.execute("SELECT digest FROM conflicting_events LIMIT 1")
    if version > 2:
        connection.execute("SELECT patient_hmac, content_hmac FROM appointment_events LIMIT 1")
        connection.execute("SELECT at, client, address, action, detail, rows FROM access_log LIMIT 1")
        connection.execute("SELECT at, source, first_id, last_id, rows, content, digest, hmac, key_id, purged "
                           "FROM seals LIMIT 1")
        connection.execute("SELECT name, value, key_id FROM database_keys LIMIT 1")


def _problem_of_keys(connection: sqlite3.Connection, version: int, encryption: Optional[Encryption],
                     takes_over: bool) -> str:
    """Why the database cannot be used with these keys, or without any."""
    marks = {}
    if version > 2:
        marks = {name: (value, key_id) for name, value, key_id in
                 connection.execute("SELECT name, value, key_id FROM database_keys")}
    value, key_id = marks.get("database", (b"", None))
    if encryption is None:
        return f"it is encrypted, with the key {printable(str(key_id))}: --encryption-key-file is needed" * bool(key_id)
    if key_id:
        try:
            encryption.opened(value, KEY_PLACE)
        except ValueError as error:
            return f"the key file is not the one that it was encrypted with ({error})"
    rekey = "python3 webhook_server.py rekey with the same --database and --encryption-key-file"
    if "takeover" in marks and not takes_over:
        return f"it is encrypted only in part, as a rekey did not end: {rekey} goes on"
    if not key_id and not takes_over and _has_rows(connection, version):
        return f"it has rows that are not encrypted: {rekey} encrypts them"
    return ""


def _has_rows(connection: sqlite3.Connection, version: int) -> bool:
    tables = ["appointment_events"] * bool(_columns_of(connection))
    tables += ["conflicting_events"] * bool(version) + ["access_log"] * (version > 2)
    return any(connection.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() for table in tables)


def _encrypt_key(connection: sqlite3.Connection, encryption: Encryption) -> None:
    """Encrypt the random key of a database where it is not: from now on the database is an encrypted one."""
    value, key_id = connection.execute("SELECT value, key_id FROM database_keys WHERE name = 'database'").fetchone()
    if key_id is None:
        connection.execute("UPDATE database_keys SET value = ?, key_id = ? WHERE name = 'database'",
                           (encryption.sealed(value, KEY_PLACE), encryption.key_id))
        if _has_rows(connection, DATA_VERSION):
            connection.execute("INSERT INTO database_keys (name, value) VALUES ('takeover', x'')")


def database_secret(connection: sqlite3.Connection, encryption: Optional[Encryption]) -> bytes:
    """The random key of a database. Raises StoreUnavailable where it cannot be read."""
    value, = connection.execute("SELECT value FROM database_keys WHERE name = 'database'").fetchone()
    try:
        return bytes(value) if encryption is None else encryption.opened(value, KEY_PLACE)
    except ValueError as error:
        raise StoreUnavailable(f"the key of the database cannot be read: {error}") from None


def content_key_of(secret: bytes) -> Any:
    """An HMAC for content_hmac, with a key out of a database's random one: it stays when encryption keys change."""
    return hmac.new(hmac.digest(secret, b"content", "sha256"), digestmod="sha256")


def _columns_of(connection: sqlite3.Connection, table: str = "appointment_events") -> list:
    return [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]


def _event_of(row: Sequence, encryption: Optional[Encryption]) -> AppointmentEvent:
    return AppointmentEvent._make(row) if encryption is None else encryption.event(row)


# -- files of other versions

def _make_tables(engine: Any, connection: sqlite3.Connection) -> None:
    """From version 0: a new file, one of others without our table, or one with the plain table."""
    if _columns_of(connection):
        _PlainTable(engine, connection).take_over()
        _add_ledger(engine, connection)
        return
    engine.is_new = True
    connection.execute(EVENTS_TABLE.format(name="appointment_events"))
    connection.execute(EVENTS_INDEX)
    connection.execute(CONFLICTS_TABLE)
    connection.execute(CONFLICTS_INDEX)
    _add_ledger(engine, connection)


def _add_digests(engine: Any, connection: sqlite3.Connection) -> None:
    """From version 1, whose conflicting_events had no digests. A program of version 1 that still runs writes
    its number into a file that has them, so they may be there."""
    if "digest" not in _columns_of(connection, "conflicting_events"):
        connection.execute("ALTER TABLE conflicting_events ADD COLUMN digest BLOB")
    for name in ("idx_conflicting_event_id", "idx_conflicting_event_digest"):
        connection.execute(f"DROP INDEX IF EXISTS {name}")
    highest = connection.execute("SELECT max(id) FROM conflicting_events").fetchone()[0] or 0
    row = (0, "")
    while row[0] < highest:                             # one at a time: each may be a megabyte
        row = connection.execute("SELECT id, payload FROM conflicting_events WHERE id > ? "
                                 "ORDER BY id LIMIT 1", (row[0],)).fetchone()
        connection.execute("UPDATE conflicting_events SET digest = ? WHERE id = ?",
                           (content_digest(row[1]), row[0]))
    connection.execute(CONFLICTS_INDEX)


def _add_ledger(engine: Any, connection: sqlite3.Connection) -> None:
    """From version 2, which had no access log, no seals and nothing encrypted. A program of an older version that
    still runs writes its number into a file that has them, so they may be there."""
    for name in ("patient_hmac", "content_hmac"):
        if name not in _columns_of(connection):
            connection.execute(f"ALTER TABLE appointment_events ADD COLUMN {name} BLOB")
    for statement in (ACCESS_TABLE, SEALS_TABLE, KEYS_TABLE):
        connection.execute(statement.replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS"))
    connection.execute("INSERT OR IGNORE INTO database_keys (name, value) VALUES ('database', ?)",
                       (secrets.token_bytes(32),))


# Each brings a file from the version of its place to the next, but the first makes the newest at once
MIGRATIONS = (_make_tables, _add_digests, _add_ledger)


class _PlainTable:
    """Rebuilds a table of version 0 (no client, no payload, timestamps as the sender wrote them) as ours.

    Ids stay. Two rows that turn out to be one instant of one appointment: the first is kept in the table, the
    others in conflicting_events. Indexes and triggers are made again. A copy of the file as it was stays
    beside it.
    """
    PARTS = ("SELECT type, name, sql FROM sqlite_master WHERE tbl_name = 'appointment_events' COLLATE NOCASE "
             "AND type IN ('index', 'trigger') AND sql IS NOT NULL ORDER BY type, rowid")
    TOLD = 10                       # ids that a note names

    def __init__(self, engine: Any, connection: sqlite3.Connection) -> None:
        self._engine, self._connection = engine, connection
        self._execute = connection.execute
        self._columns = _columns_of(connection)
        self._kept = 0
        self._moved: list = []

    def take_over(self) -> None:
        """Raises SetupError when a row cannot be kept, or there is no room for the copy."""
        copy = self._copy()
        try:
            parts, views = self._execute(self.PARTS).fetchall(), self._working_views()
            self._rebuild()
            lost = [note for part in parts for note in self._make_again(*part)]
            lost += [f"the view {printable(name)} does not work any more: a column is missing"
                     for name in views if name not in self._working_views()]
        except ValueError as error:
            os.unlink(copy)
            raise SetupError(f"database {self._engine.path}: {error}; it was not changed") from None
        except BaseException:
            os.unlink(copy)
            raise
        self._engine.notes += [f"The plain table appointment_events was taken over: {self._summary()}",
                               f"The file as it was is kept as {copy}", *lost]

    def _summary(self) -> str:
        text = f"{self._kept} event{'s' * (self._kept != 1)} kept"
        if self._moved:
            ids = ", ".join(map(str, self._moved[:self.TOLD]))
            more = f" and {len(self._moved) - self.TOLD} more" * (len(self._moved) > self.TOLD)
            text += f", {len(self._moved)} moved to conflicting_events (id {ids}{more})"
        return text

    def _copy(self) -> str:
        """Its path, once it is on disk. Nothing has been changed yet, and the writer's lock keeps it so."""
        path = self._engine.path
        try:
            with contextlib.closing(sqlite3.connect(_uri(Path(path), "ro"), uri=True)) as source:
                return _copy_beside(source, path, "before-migration")
        except (OSError, sqlite3.Error) as error:
            raise SetupError(f"database {path}: its table has to be rebuilt, and a copy of the file could "
                             f"not be made beside it ({_reason(error, path)}); it was not changed") from None

    def _rebuild(self) -> None:
        key = "id" if "id" in self._columns else "rowid"
        names = ", ".join(map(_quoted, self._columns))
        execute = self._execute
        execute(EVENTS_TABLE.format(name="migrated_events"))
        execute("CREATE UNIQUE INDEX idx_migrated ON migrated_events (appointment_id, timestamp)")
        execute(CONFLICTS_TABLE)
        execute(CONFLICTS_INDEX)
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        highest = execute("SELECT max(seq) FROM sqlite_sequence "
                          "WHERE name = 'appointment_events'").fetchone()[0] or 0
        # ids must stay different
        self._connection.text_factory = lambda data: data.decode("utf-8", "backslashreplace")
        for event_id, *values in execute(f"SELECT {key}, {names} FROM appointment_events ORDER BY {key}"):
            self._move_row(event_id, _migrated_event(dict(zip(self._columns, values)), now))
            highest = max(highest, event_id if isinstance(event_id, int) else 0)
        self._connection.text_factory = _lenient_text
        # An id that was once given to a sender never means another event
        execute("DELETE FROM sqlite_sequence WHERE name = 'migrated_events'")
        execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('migrated_events', ?)", (highest,))
        execute("DROP TABLE appointment_events")
        execute("DROP INDEX idx_migrated")
        # The newer way of ALTER TABLE fails where a view reads the table that is missing just now
        execute("PRAGMA legacy_alter_table = ON")
        execute("ALTER TABLE migrated_events RENAME TO appointment_events")
        execute(EVENTS_INDEX)

    def _move_row(self, event_id: Any, event: AppointmentEvent) -> None:
        try:
            self._execute(f"INSERT INTO migrated_events (id, {', '.join(COLUMNS)}) "
                          f"VALUES (?{', ?' * len(COLUMNS)})", (event_id, *event[:-1]))
            self._kept += 1
        except sqlite3.IntegrityError as error:
            first = self._execute("SELECT id FROM migrated_events WHERE appointment_id = ? AND timestamp = ?",
                                  (event.appointment_id, event.timestamp)).fetchone()
            if first is None:
                told = printable(str(event_id))
                raise ValueError(f"the event with id {told} cannot be migrated ({error})") from None
            Session(self._connection).keep_conflict(first[0], event, content_digest(event.payload))
            self._moved.append(event_id)

    def _working_views(self) -> set:
        names = [row[0] for row in self._execute("SELECT name FROM sqlite_master WHERE type = 'view'")]
        return {name for name in names if self._works(f"SELECT * FROM {_quoted(name)} LIMIT 0")}

    def _works(self, statement: str) -> bool:
        try:
            self._execute(statement).fetchall()
        except sqlite3.Error:
            return False
        return True

    def _make_again(self, kind: str, name: str, statement: str) -> list:
        """Make an index or a trigger of the old table again: [] or why that could not be."""
        session = Session(self._connection)
        try:
            with session.savepoint():
                self._execute(statement)
                session.rehearse()
        except sqlite3.Error as error:
            return [f"The {kind} {printable(name)} of the old table could not be kept: "
                    f"{printable(str(error))}"]
        return []


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _copy_names(path: str, ending: str) -> Iterator[str]:
    yield f"{path}.{ending}"
    for number in itertools.count(2):
        yield f"{path}.{ending}-{number}"


def _saved_copy(path: str) -> str:
    """The newest of the copies that were saved of a database that was deleted, "" when there is none."""
    copies = itertools.takewhile(os.path.isfile, _copy_names(path, "saved"))
    return max(copies, key=os.path.getmtime, default="")


def _notes_of_saved(path: str) -> list:
    """Whoever has moved the files away, and not what was saved of them, may not know that it is there."""
    saved = _saved_copy(path)
    if not saved:
        return []
    return [f"A new database {path} was begun although {saved} is there, with all that was in one that was "
            f"deleted while it was in use: to go on with that, stop the service, move {path} away and "
            f"{saved} in its place, and start again"]


def _copy_beside(source: sqlite3.Connection, path: str, ending: str) -> str:
    """Copy a database beside itself. Returns the path, once all is on disk. Raises OSError, sqlite3.Error."""
    part = f"{path}.{ending}.part"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(part)                                 # of a copy that was interrupted
    try:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with contextlib.closing(sqlite3.connect(part, isolation_level=None)) as target:
                target.execute("PRAGMA synchronous = OFF")
                source.backup(target)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        name = next(name for name in _copy_names(path, ending) if not os.path.lexists(name))
        os.rename(part, name)
        _sync_folder(os.path.dirname(path))
        return name
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def _sync_folder(path: str) -> None:
    """Have the names in a folder on disk, where the system can."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _migrated_event(row: dict, now: str) -> AppointmentEvent:
    """The event in a row of the old table, {column: value}. What our table has no column for goes into the
    payload; NULL becomes an empty text where ours takes none; a timestamp that cannot be read stays as it
    is."""
    row = {name: _json_value(value) for name, value in row.items() if value is not None}
    payload = row.pop("payload", None)
    content = {name: value for name, value in row.items() if name not in ("id", "received_at", "client")}
    try:
        parsed = parse_json(str(payload).encode())[0]
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        payload = json.dumps({**content, "payload": payload} if payload is not None else content)
    elif not all(name in COLUMNS for name in content):
        payload = json.dumps({**content, **parsed})
    event_type, appointment_id, patient_id, timestamp = (str(row.get(name, "")) for name in REQUIRED_FIELDS)
    received_at = _canonical_or_same(str(row.get("received_at") or now))
    return AppointmentEvent(event_type, appointment_id, patient_id, _canonical_or_same(timestamp),
                            row.get("notes"), received_at, row.get("client"), payload)


def _json_value(value: Any) -> Any:
    """What a column holds as something that JSON has: bytes and infinities as text."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def _canonical_or_same(timestamp: str) -> str:
    try:
        return canonical_timestamp(timestamp)
    except ValueError:
        return timestamp


# =============================================================================
# SQLite: events in one file, over the watched ones: who writes, who reads, checkpoints. Knows nothing of HTTP.
# =============================================================================

class SQLite:
    """One SQLite file: a lock-guarded connection that writes, and two that read and never wait for it."""
    DATA_VERSION = DATA_VERSION
    CACHE_KIB = 65536               # for pages, in all connections together: a million scattered keys fit
    WAL_BYTES = 64 * 1024 * 1024    # what a WAL that had to grow longer is cut to when it is started anew
    FULL_CHECK_BYTES = 256 * 1024 * 1024  # larger files are not read whole at start: it would take seconds

    def __init__(self, path: str, cache_kib: int = CACHE_KIB, encryption: Optional[Encryption] = None,
                 takes_over: bool = False) -> None:
        """`takes_over`: opens a database that is not encrypted, or not yet wholly, all the same."""
        self._cache_kib, self.encryption, self._takes_over = cache_kib, encryption, takes_over
        self.path = os.path.abspath(path)   # connections are made later, too: chdir must not lead them astray
        self.notes: list = []               # what opening has to tell, line by line
        self.is_new = False
        self.files: Optional[_Files] = None
        self.lock = threading.Lock()        # the writer's
        self.writer: Optional[sqlite3.Connection] = None
        self.content_key: Any = None        # see Encryption.row()
        self._saved = ""                    # the copy of a file that was deleted while it is in use
        self.readers = _Readers(self)
        self.checkpoints = _Checkpoints(self)

    # -- opening

    def open(self) -> None:
        """Open, make or migrate the file. Raises SetupError, and then has changed nothing."""
        try:
            if os.path.isdir(self.path):
                raise SetupError(f"database {self.path}: it is a folder, not a file")
            if os.path.exists(self.path) and not os.path.isfile(self.path):
                raise SetupError(f"database {self.path}: it is a device or pipe, not a file")
            self.files = _Files(self.path)              # before any connection; see there
            problem = self.files.problem_of_left_wal()
            if problem and self.files.is_made:
                problem = f"{self.path} is missing"
            _refuse_left_wal(self.path, problem)
            if self.files.is_doubtful:
                self.notes.append(f"{self.files.wal}, left by a crash, is older than the database and was "
                                  "taken in: if you have restored a copy just now, what is in use is the "
                                  "state before that; README says how to restore")
            if os.path.getsize(self.path):
                self._inspect()
            self.writer = self.connect(self._cache_kib - self.readers.MOST * self.readers.CACHE_KIB)
            self._prepare(self.writer)
            self.content_key = content_key_of(database_secret(self.writer, self.encryption))
            if self.is_new:
                self.notes += _notes_of_saved(self.path)
            self.files.watch()
            self.checkpoints.start()
        except (OSError, sqlite3.Error, StoreUnavailable) as error:
            reason = _reason(error, self.path)          # asked before anything is closed
            self.close()
            raise SetupError(f"database {self.path}: {reason}") from None
        except BaseException:
            self.close()
            raise

    def connect(self, cache_kib: int) -> sqlite3.Connection:
        """A further connection. Raises sqlite3.Error."""
        connection = sqlite3.connect(_uri(Path(self.path), "rw"), uri=True, timeout=2, isolation_level=None,
                                     check_same_thread=False, cached_statements=Session.MOST_ROWS + 16)
        # Others may have written what is not UTF-8: sqlite3's own error would quote it, into answer and log
        connection.text_factory = _lenient_text
        connection.execute(f"PRAGMA cache_size = {-cache_kib}")
        connection.execute("PRAGMA wal_autocheckpoint = 0")         # see _Checkpoints
        if sys.platform == "darwin":        # a plain fsync leaves data in the drive's cache there
            connection.execute("PRAGMA fullfsync = 1")
            connection.execute("PRAGMA checkpoint_fullfsync = 1")
        return connection

    def _inspect(self) -> None:
        """Read what is there through a read-only connection, so that a file we refuse stays as it is."""
        # A journal that a crash left must be rolled back first, which a read-only connection could not
        mode = "rw" if os.path.exists(os.path.realpath(self.path) + "-journal") else "ro"
        uri = _uri(Path(self.path), mode)
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=2)) as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > self.DATA_VERSION:
                raise SetupError(f"database {self.path}: written by a newer version of this program (data "
                                 f"version {version}, this program knows {self.DATA_VERSION}); it was not "
                                 "changed")
            if self.is_small():
                found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
                if found != "ok":
                    raise SetupError(f"database {self.path}: {DAMAGED}; it was not changed "
                                     f"({found.splitlines()[-1]})")
                if version and self.files.is_left:
                    _refuse_left_wal(self.path, _problem_of_index(connection))
            _refuse_other_tables(connection, self.path, version)
            problem = _problem_of_keys(connection, version, self.encryption, self._takes_over)
            if problem:
                raise SetupError(f"database {self.path}: {problem}; it was not changed")

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA synchronous = FULL")         # an answered event outlives a power cut
        connection.execute("BEGIN IMMEDIATE")
        try:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            connection.execute(f"PRAGMA user_version = {version}")      # fails where nothing can be written
            if version < self.DATA_VERSION:
                for step in MIGRATIONS[version:] if version else MIGRATIONS[:1]:
                    step(self, connection)
                connection.execute(f"PRAGMA user_version = {self.DATA_VERSION}")
            if self.encryption is not None:
                _encrypt_key(connection, self.encryption)
            connection.execute("COMMIT")
        except BaseException:
            _roll_back(connection)
            raise
        # Only now, as this changes the file and a migration that fails must not
        if connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise SetupError(f"database {self.path}: SQLite's WAL mode does not work on this file system")
        connection.execute(f"PRAGMA journal_size_limit = {self.WAL_BYTES}")
        connection.execute("PRAGMA busy_timeout = 0")  # whoever tries again sleeps outside of all locks
        connection.execute("SELECT 1 FROM sqlite_master").fetchone()  # -shm says nothing before a first read

    # -- writing

    @contextlib.contextmanager
    def transaction(self, wait: float = LOCK_STEP) -> Iterator[Session]:
        """A Session whose work is on disk at the end of the `with`, or not at all when that raises.

        Waits up to `wait` seconds for another thread of ours, and never for another process. Raises
        StoreLocked, which is worth another try, or StoreUnavailable.
        """
        if not self.lock.acquire(timeout=wait):
            raise StoreLocked("the database is busy")
        connection = self.writer
        try:
            if connection is None:
                raise StoreUnavailable("the database is closed")
            if not self.files.are_untouched():
                self.check()
            # A deferred one that reads first gets SQLITE_BUSY at its first write, whatever the timeout
            connection.execute("BEGIN IMMEDIATE")
            yield Session(connection, self.encryption, self.content_key)
            connection.execute("COMMIT")
            if not self.files.is_only_wal_longer():
                self.check()
            self.checkpoints.committed()
        except (sqlite3.Error, OSError) as error:
            _roll_back(connection)
            raise _unavailable(error, self.path) from error
        except BaseException:
            _roll_back(connection)
            raise
        finally:
            self.lock.release()

    def tend(self) -> bool:
        """After a transaction, once its senders have their answers: the careful look at the files that the
        next one would begin with (20 us, which one sender alone would wait for). False when something is
        wrong; the next one says what."""
        if not self.lock.acquire(blocking=False):       # there is a next one already
            return True
        try:
            if self.writer is not None:
                self.check()
            return True
        except (StoreUnavailable, OSError):
            return False
        finally:
            self.lock.release()

    def check(self) -> None:
        """Raises StoreUnavailable unless the files are what SQLite left. For who has the writer's lock."""
        try:
            self.files.check()
        except _Unlinked as error:
            told = "events of the last seconds may be missing when the service is restarted"
            if self.checkpoints.save():
                told = "all that is stored was saved into the database: restart the service"
            raise FilesChanged(f"{error}; {told}") from None
        except _Replaced as error:
            self._save_aside()
            kept = self._saved or "no file any more"
            raise FilesChanged(f"{error}; all that was stored is in {kept}: stop whatever else uses the "
                               "database, put the right file in its place, and restart the service") from None

    def _save_aside(self) -> None:
        """Once, copy what is open and has its name no more."""
        with contextlib.suppress(sqlite3.Error, OSError):
            self._saved = self._saved or _copy_beside(self.writer, self.path, "saved")

    # -- reading

    def steps(self, wanted: Filter, after: int, up_to: Optional[int] = None,
              most: int = 100) -> Iterator[list]:
        """Events with id > after (and <= up_to) in order of id, in lists of at most `most`. Each list is one
        short read; it is empty where there was much to look through and nothing fitted. Raises
        StoreUnavailable."""
        scan = _TableScan if wanted.appointment_id is None else _AppointmentScan
        scanned = scan(self, wanted, after, up_to, most)
        for events in scanned.steps():
            yield events, scanned.after

    def event(self, event_id: int) -> Optional[AppointmentEvent]:
        """The event with this id, None when there is none. Raises StoreUnavailable."""
        with self.readers.reading() as connection:
            found = connection.execute(Session.ROW, (event_id,)).fetchone()
        return found and _event_of(found, self.encryption)

    def digest(self, event_id: int) -> bytes:
        """content_digest() of a stored payload, b"" where it cannot be decrypted. Raises StoreUnavailable, also
        when it is there no more."""
        found = self.event(event_id)
        if found is None:
            raise StoreUnavailable(f"the event with id {event_id} was deleted")
        if isinstance(found, Unreadable):
            return b""
        return content_digest(found.payload)

    def refuse_keys(self, encryption: Optional[Encryption]) -> None:
        """Raise SetupError unless the open file can be used with these keys."""
        with self.readers.reading() as connection:
            problem = _problem_of_keys(connection, self.DATA_VERSION, encryption, False)
        if problem:
            raise SetupError(f"database {self.path}: {problem}")

    def last_id(self) -> int:
        """The highest id, 0 when there is none. Raises StoreUnavailable."""
        with self.readers.reading() as connection:
            return connection.execute("SELECT max(id) FROM appointment_events").fetchone()[0] or 0

    def count(self) -> int:
        """How many events there are: counted in a file that is_small(), else the highest id, as counting
        would take long. Raises StoreUnavailable."""
        if not self.is_small():
            return self.last_id()
        with self.readers.reading() as connection:
            return connection.execute("SELECT count(*) FROM appointment_events").fetchone()[0]

    def empty_wal(self, seconds: float = 10.0) -> bool:
        """Move all that the WAL holds into the main file, and cut it: what was removed is in it, too. Whether that
        could be done: readers keep it."""
        ends_at = time.monotonic() + seconds
        while True:
            with self.lock, contextlib.suppress(sqlite3.Error):
                if not self.writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                    return True
            if time.monotonic() > ends_at:
                return False
            time.sleep(LOCK_STEP)

    def clear(self) -> None:
        """Write the file anew, so that nothing is left of what was deleted or replaced. For who is alone with it.
        Raises StoreUnavailable."""
        try:
            with self.lock:
                self.writer.execute("VACUUM")
                self.writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error as error:
            raise _unavailable(error, self.path) from error

    def is_small(self) -> bool:
        """Whether the file can be read whole within a second."""
        return os.path.getsize(self.path) <= self.FULL_CHECK_BYTES

    # -- closing

    def close(self) -> str:
        """Put everything into the main file and close, but write nothing over files that others changed.
        Returns what is wrong with them, "" when nothing is."""
        trouble = ""
        if self.files is None:
            return trouble
        self.checkpoints.loop.stop()
        with self.checkpoints.moving, self.readers.all_places() as places, self.lock:
            connections = [*places, self.checkpoints.connection, self.writer]
            connections = [one for one in connections if one is not None]
            places[:] = [None] * len(places)
            try:
                if self.writer is not None:
                    self.check()
                    with contextlib.suppress(sqlite3.Error):
                        self.writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            except (StoreUnavailable, OSError) as error:
                trouble = reason_of(error)
                if not self.files.is_held:
                    connections = _without_checkpoint(connections)
            self.writer = self.checkpoints.connection = None
            for connection in connections:
                connection.close()
        self.files.close()
        self.files = None
        return trouble


class _Readers:
    """The connections of an engine that read: so many places, each with a connection once somebody needed it.

    A snapshot of a reader keeps the WAL from being started anew. So each read is short, and where they
    overlap without end and the WAL has grown long, a checkpoint takes all places for a moment.
    """
    MOST = 2                        # at a time: more would only take the interpreter from who stores
    CACHE_KIB = 2048

    def __init__(self, engine: SQLite) -> None:
        self._engine = engine
        self._free: list = [None] * self.MOST
        self._are_wanted = False            # all places: who comes later has to wait
        lock = threading.Lock()
        self._is_free, self._are_back = threading.Condition(lock), threading.Condition(lock)

    def _take(self) -> Optional[sqlite3.Connection]:
        with self._is_free:
            while self._are_wanted or not self._free:
                self._is_free.wait()
            return self._free.pop()

    def _give_back(self, connection: Optional[sqlite3.Connection]) -> None:
        with self._is_free:
            self._free.append(connection)
            if self._are_wanted:
                self._are_back.notify()
            else:
                self._is_free.notify()

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection, for a query whose rows are all fetched before the end, so that no snapshot stays.
        Raises StoreUnavailable."""
        connection = self._take()
        try:
            if self._engine.writer is None:
                raise StoreUnavailable("the database is closed")
            # Or SQLite would replay our WAL into whatever file has its name now
            self._engine.files.check()
            if connection is None:
                connection = self._engine.connect(self.CACHE_KIB)
                connection.execute("PRAGMA query_only = 1")
            yield connection
        except (sqlite3.Error, OSError) as error:
            raise _unavailable(error, self._engine.path) from error
        finally:
            self._give_back(connection)

    @contextlib.contextmanager
    def all_places(self) -> Iterator[list]:
        """Wait until nobody reads, and keep it so: the connections, which may be taken out of the list. Only
        one at a time may ask for it: who has the lock of checkpoints. Reads wait for no lock of the
        writer."""
        with self._are_back:
            self._are_wanted = True
            while len(self._free) < self.MOST:
                self._are_back.wait()
        try:
            yield self._free
        finally:
            with self._are_back:
                self._are_wanted = False
                self._is_free.notify(self.MOST)


class _Checkpoints:
    """Moves what is in an engine's WAL into the main file.

    SQLite starts the WAL anew only when all of it is moved, which under load never happens by itself. So
    make(), which a job calls, moves the bulk beside the commits (2,000 frames in 5 to 15 ms), and the writer
    moves the few frames that came meanwhile with its next commit (40 in 1 ms). P99 at 64 connections: 11 ms,
    against 16 ms when the writer does it all.

    Nothing is moved beside a commit unless there surely is something to move: before SQLite 3.51.3 a
    checkpoint that finds all moved, beside a commit that starts the WAL anew, can damage the file
    (sqlite.org/wal.html, "the WAL-reset bug"). Who moves has the lock `moving` for it, so nobody else of ours
    can have moved it since.
    """
    BULK = 2000  # frames of the WAL, 8 MiB, that make it worth to move them beside the commits
    LONG = 8192  # frames, 32 MiB, from which on readers have to wait until it is started anew
    SECONDS = 5.0                   # how often fewer are moved

    def __init__(self, engine: SQLite) -> None:
        self._engine = engine
        self.connection: Optional[sqlite3.Connection] = None
        self.moving = threading.Lock()      # whoever has the writer's lock may only try for this one
        self._tried_at = 0                  # how long the WAL was at the last try
        self._rest_is_due = False
        self._changes = 0                   # of the writer, all of them moved; used where -shm cannot be read
        self.loop = Loop("checkpoint", self.make, self.SECONDS)

    def start(self) -> None:
        """Begin."""
        self.connection = self._engine.connect(0)
        self.loop.start()

    def are_due(self) -> bool:
        """Whether to make() them now, and not only every few seconds."""
        length = self._length()
        if length < self._tried_at:         # the WAL was started anew
            self._tried_at = 0
        return length - self._tried_at >= self.BULK

    def committed(self) -> None:
        """Called by the writer, which has its lock, after each commit."""
        if self._rest_is_due:
            self._move_rest()
        elif self.are_due():
            self.loop.wake()

    def make(self) -> None:
        """Move what is there. What fails (a full disk, a lock) is tried again with the next call."""
        with self.moving, contextlib.suppress(StoreUnavailable, sqlite3.Error, OSError):
            if self.connection is None:                 # closed
                return
            self._check()
            self._tried_at = self._length()
            unmoved = self._unmoved()
            if unmoved:
                self._move(self.connection)
                self._check()
            # The writer's next commit does the rest; after less it finds all moved, or goes on
            self._rest_is_due = unmoved >= self.BULK or self._tried_at > self.LONG

    def _check(self) -> None:
        """As the engine's, but waits for the writer only when there is something to save."""
        try:
            self._engine.files.check()
        except (_Unlinked, _Replaced):
            with self._engine.lock:
                self._engine.check()

    def save(self) -> bool:
        """Move all of a WAL that has lost its name. For who has the writer's lock; whether that worked."""
        try:
            return not self._unmoved() or self._move(self._engine.writer, "FULL")
        except sqlite3.Error:
            return False

    def _unmoved(self) -> int:
        """How much is surely not in the main file yet: frames, or at least changes that were made since."""
        if self._engine.files.is_watched:
            return self._engine.files.unmoved()
        return self._engine.writer.total_changes - self._changes

    def _length(self) -> int:
        """How long the WAL is: frames, or at least how long its file is."""
        if self._engine.files.is_watched:
            return self._engine.files.length()
        return os.path.getsize(self._engine.path + "-wal") // 4096

    def _move(self, connection: sqlite3.Connection, how: str = "PASSIVE") -> bool:
        """Whether all was moved that was there at the beginning. Raises sqlite3.Error."""
        changes = self._engine.writer.total_changes
        busy, frames, moved = connection.execute(f"PRAGMA wal_checkpoint({how})").fetchone()
        if busy or frames != moved:
            return False
        self._changes = changes
        return True

    def _move_rest(self) -> None:
        if self.moving.acquire(blocking=False):
            try:
                self._rest_is_due = False
                with contextlib.suppress(sqlite3.Error):
                    if self._length() > self.LONG:
                        with self._engine.readers.all_places():         # two short reads
                            self._move(self._engine.writer, "RESTART")
                    elif self._unmoved():
                        self._move(self._engine.writer)
                self._engine.check()
            finally:
                self.moving.release()


def _without_checkpoint(connections: list) -> list:
    """Those that can be closed without moving the WAL into the main file; the others stay open."""
    for connection in connections:
        if hasattr(connection, "setconfig"):            # Python 3.12
            connection.setconfig(sqlite3.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, True)
        else:  # nobody closes what a waiting thread holds, not even the end
            threading.Thread(target=lambda held: threading.Event().wait(), args=(connection,),
                             daemon=True).start()
    return [connection for connection in connections if hasattr(connection, "setconfig")]


# -- SQLite: reads in short steps

class _TableScan:
    """Walks along the table in order of id: each read looks at so many rows at most, fitting or not."""
    SELECT = f"SELECT {', '.join(COLUMNS)}, id FROM appointment_events"
    WINDOW = 5000                   # rows that one read looks at: some 5 ms
    WINDOW_END = "SELECT id FROM appointment_events WHERE id > ? ORDER BY id LIMIT 1 OFFSET ?"

    def __init__(self, engine: SQLite, wanted: Filter, after: int, up_to: Optional[int], most: int) -> None:
        self._reading, self._encryption = engine.readers.reading, engine.encryption
        self.after = after
        self._last = 2 ** 63 - 1 if up_to is None else up_to
        self._most = most
        self._clauses, self._values = _clauses(wanted, self._encryption)

    def steps(self) -> Iterator[list]:
        """The lists of SQLite.steps()."""
        while self.after < self._last:
            yield self._step()

    def _step(self) -> list:
        where = " AND ".join(["id > ?", "id <= ?", *self._clauses])
        query = f"{self.SELECT} WHERE {where} ORDER BY id LIMIT ?"
        with self._reading() as connection:
            end = self._window_end(connection)
            values = [self.after, end, *self._values, self._most]
            events, is_all = _fetched(connection.execute(query, values), self._encryption)
        if is_all and len(events) < self._most:
            self.after = end
        else:
            self.after = events[-1].id
        return events

    def _window_end(self, connection: sqlite3.Connection) -> int:
        if not self._clauses:                           # every row fits: LIMIT is the bound
            return self._last
        found = connection.execute(self.WINDOW_END, (self.after, self.WINDOW - 1)).fetchone()
        return self._last if found is None else min(found[0], self._last)


class _AppointmentScan(_TableScan):
    """The events of one appointment: its ids once out of the unique index, then rows by id.

    The index is in order of time, the answer in order of id. So what is kept of it is a bounded number of the
    lowest ids; when an appointment has more, the index is read again for those behind.
    """
    ENTRIES = 20000                 # of the index in one read: some 10 ms
    KEPT = 100000                   # ids, 800 KB
    INDEX = "SELECT id, timestamp FROM appointment_events WHERE appointment_id = ? ORDER BY timestamp LIMIT ?"
    INDEX_ON = INDEX.replace("ORDER", "AND timestamp > ? ORDER")

    def __init__(self, engine: SQLite, wanted: Filter, after: int, up_to: Optional[int], most: int) -> None:
        super().__init__(engine, wanted._replace(appointment_id=None), after, up_to, min(most, 500))
        self._appointment_id = wanted.appointment_id

    def steps(self) -> Iterator[list]:
        is_all = False
        while not is_all:
            ids = array("q")
            is_all = yield from self._collect(ids)
            while ids:
                yield self._rows(ids)

    def _collect(self, ids: array) -> Iterator[list]:
        """Put the lowest ids behind self.after into `ids`, with an empty list for each read. Returns whether
        these are all there are."""
        is_all, at = True, None
        while True:
            query, values = self.INDEX, [self._appointment_id, self.ENTRIES]
            if at is not None:
                query, values = self.INDEX_ON, [self._appointment_id, at, self.ENTRIES]
            with self._reading() as connection:
                found = connection.execute(query, values).fetchall()
            ids.extend(event_id for event_id, _ in found if self.after < event_id <= self._last)
            if len(ids) > self.KEPT:
                ids[:] = array("q", sorted(ids)[:self.KEPT])
                is_all = False
            if len(found) < self.ENTRIES:
                break
            at = found[-1][1]
            yield []
        ids[:] = array("q", sorted(ids))
        return is_all

    def _rows(self, ids: array) -> list:
        """The events of the first ids, which are taken out of `ids`."""
        chunk = ids[:self._most]
        where = " AND ".join([f"id IN ({', '.join('?' * len(chunk))})", *self._clauses])
        query = f"{self.SELECT} WHERE {where} ORDER BY id"
        with self._reading() as connection:
            events, is_all = _fetched(connection.execute(query, [*chunk, *self._values]), self._encryption)
        self.after = chunk[-1] if is_all else events[-1].id
        del ids[:bisect.bisect_right(ids, self.after)]
        return events


def _clauses(wanted: Filter, encryption: Optional[Encryption]) -> tuple:
    """(clauses, values) of a filter."""
    clauses, values = [], []
    if encryption is not None and wanted.patient_id is not None:
        values = encryption.indexes_of(wanted.patient_id)
        clauses.append(f"patient_hmac IN ({', '.join('?' * len(values))})")
        wanted = wanted._replace(patient_id=None)
    for clause, value in (("appointment_id = ?", wanted.appointment_id),
                          ("patient_id = ?", wanted.patient_id), ("event_type = ?", wanted.event_type),
                          # without the Z, "…:00" sorts before "…:00.5" as the instants do
                          ("rtrim(timestamp, 'Z') >= ?", wanted.since and wanted.since.rstrip("Z")),
                          ("rtrim(timestamp, 'Z') < ?", wanted.until and wanted.until.rstrip("Z"))):
        if value is not None:
            clauses.append(clause)
            values.append(value)
    return clauses, values


def _fetched(cursor: sqlite3.Cursor, encryption: Optional[Encryption]) -> tuple:
    """(events, whether these are all): no more than fill a read's share of memory."""
    events, size = [], 0
    for row in cursor:
        if size > MOST_READ:
            return events, False
        events.append(_event_of(row, encryption))
        size += len(events[-1].payload)
    return events, True


def _refuse_left_wal(path: str, problem: str) -> None:
    """Raise SetupError when there is a problem."""
    if problem:
        name = os.path.basename(os.path.realpath(path))     # there they are, where the path is a link
        saved = _saved_copy(path)
        raise SetupError(f"database {path}: {name}-wal does not belong to it ({problem}). If it is a "
                         f"restored copy, move {name}-wal and {name}-shm away and start again; nothing was "
                         "changed" + f"; what was in use last is in {saved}" * bool(saved))


def _problem_of_index(connection: sqlite3.Connection) -> str:
    """What quick_check does not find: pages of the index or the table are missing from an older main file."""
    counts = {connection.execute(f"SELECT count(*) FROM appointment_events {how}").fetchone()[0]
              for how in ("NOT INDEXED", "INDEXED BY idx_appointment_timestamp")}
    if len(counts) > 1:
        return "together they are not whole"
    return ""


# =============================================================================
# Store: one commit for all who wait, over any engine; who commits answers. Knows no SQL.
# =============================================================================

DIGESTS_KEPT = 1024             # of stored contents that were compared
GROUP = 512  # most events in one commit: bounds how long the first of them waits for the last
LEAD_WAIT = 0.02                # seconds that who leads waits for its turn: nobody is read meanwhile
LOCK_COUNTS = 1.0               # seconds in which a lock counts as one failure, if busy_timeout is shorter
LOCK_STEPS = (0.002, 0.1)       # seconds between tries for a locked database: the first, doubled to the last
PASSED = Outcome("passed")
SLOW_COMMIT = 0.05              # seconds of a commit after which the leader leaves it to the writer


class Submission:
    """One event, or work(session), on its way to the disk. The store calls done(outcome) once, after the
    commit.

    `arrived` is the time.monotonic() at which it was ready to be stored: from then on the busy timeout
    counts. `digest` may hold the content_digest of a large payload. Outcomes of one `lane`, such as a
    connection, come in the order in which they were submitted; without a lane it has an order with nobody.
    """
    __slots__ = ("event", "arrived")
    digest: Optional[bytes] = None
    lane: Any = None
    work: Optional[Callable[[Any], Any]] = None
    result: Any = None

    def done(self, outcome: Outcome) -> None:
        """Tell who waits, on the thread that found the outcome. Must not block, nor wait for the store."""
        raise NotImplementedError


class _Waiting(Submission):
    """A submission whose submitter waits for it; without event and work it only marks its place."""
    __slots__ = ("digest", "work", "result", "_outcome", "_ready")

    def __init__(self, event: Optional[AppointmentEvent] = None, digest: Optional[bytes] = None,
                 work: Optional[Callable[[Any], Any]] = None) -> None:
        self.event, self.digest, self.work, self.arrived = event, digest, work, time.monotonic()
        self._ready = threading.Event()

    def done(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._ready.set()

    def wait(self) -> Outcome:
        self._ready.wait()
        return self._outcome


class _Conflict(Submission):
    """The work of keeping what turned out, after the commit, to differ from the stored event."""
    __slots__ = ("work", "result", "_then", "_outcome")

    def __init__(self, event: AppointmentEvent, event_id: int, digest: bytes,
                 then: Callable[[Outcome], None]) -> None:
        self.event, self.arrived = None, time.monotonic()
        self.work = lambda session: session.keep_conflict(event_id, event, digest)
        self._then, self._outcome = then, Outcome("duplicate", event_id, False)

    def done(self, outcome: Outcome) -> None:
        # A sender that is told 409 will not come back: only once its content is kept
        self._then(outcome if outcome.kind == "failed" else self._outcome)


class _Lanes:
    """Tells outcomes, and finds out on a thread of its own those that the transaction left open: whether two
    contents that are too large to be compared while everybody waits are the same. Later outcomes of the same
    lane wait behind.
    """

    def __init__(self, store: Store, on_error: Callable[[str], Any]) -> None:
        self._store, self._on_error = store, on_error
        self.lock = threading.RLock()   # held to tell what does not go the ordinary way
        self._held: dict = {}           # lane: deque of (submission, outcome) behind the one being compared
        self._open: deque = deque()     # (submission, outcome) to compare
        self._loop = Loop("compare", self._compare, on_error=on_error)
        self.start, self.stop = self._loop.start, self._loop.stop
        # A stored payload never changes, and retries of one event come in crowds
        self._stored_digest = functools.lru_cache(DIGESTS_KEPT)(store.engine.digest)

    def tell(self, group: Iterable, outcomes: Iterable) -> None:
        """Tell each submission its outcome, or have it compared first."""
        held = self._held
        for submission, outcome in zip(group, outcomes):
            if held or outcome.identical is None:
                self._tell_in_lane(submission, outcome)
            else:
                self._done(submission, outcome)

    def settle(self) -> None:
        """Wait until all is told that is held now."""
        with self.lock:
            markers = [_Waiting() for _ in self._held]
            for marker, behind in zip(markers, self._held.values()):
                behind.append((marker, PASSED))
        for marker in markers:
            marker.wait()

    def _done(self, submission: Submission, outcome: Outcome) -> None:
        try:
            submission.done(outcome)
        except BaseException:                           # its neighbours get theirs all the same
            self._on_error("done")

    def _tell_in_lane(self, submission: Submission, outcome: Outcome) -> None:
        with self.lock:
            behind = self._held.get(_lane(submission))
            if behind is not None:
                behind.append((submission, outcome))
            elif outcome.identical is None:
                self._held[_lane(submission)] = deque()
                self._open.append((submission, outcome))
                self._loop.wake()
            else:
                self._done(submission, outcome)

    def _compare(self) -> None:
        """Decide all that is open."""
        while self._open:
            submission, outcome = self._open.popleft()
            decided = functools.partial(self._decided, submission)
            try:
                digest = submission.digest or content_digest(submission.event.payload)
                if digest == self._stored_digest(outcome.event_id):
                    decided(outcome._replace(identical=True))
                else:
                    self._store.submit(_Conflict(submission.event, outcome.event_id, digest, decided))
            except Exception as error:
                decided(Outcome("failed", error=error))

    def _decided(self, submission: Submission, outcome: Outcome) -> None:
        """Tell `submission`, and what is behind it in its lane up to the next one that is to be compared."""
        lane = _lane(submission)
        with self.lock:
            self._done(submission, outcome)
            behind = self._held[lane]
            while behind:
                submission, outcome = behind.popleft()
                if outcome.identical is None:
                    self._open.append((submission, outcome))
                    self._loop.wake()
                    return
                self._done(submission, outcome)
            del self._held[lane]                        # last: from now on tell() goes the quick way


def _lane(submission: Submission) -> Any:
    return submission if submission.lane is None else submission.lane


class _Committer:
    """Commits groups, one at a time, and calls on_stored in the order of the commits."""

    def __init__(self, engine: SQLite, on_stored: Optional[Callable[[AppointmentEvent], Any]],
                 on_error: Callable[[str], Any]) -> None:
        self._engine, self._on_stored, self._on_error = engine, on_stored, on_error
        self._turns = Turns()
        self.quick = False              # whether the last commit was: then the leader may make the next

    def commit(self, group: list, wait: float) -> list:
        """The outcomes of `group`, committed in one transaction. Raises StoreLocked when its turn or the
        engine's lock is not to be had in `wait` seconds, and StoreUnavailable: nothing of it is stored."""
        if not self._turns.acquire(wait):
            raise StoreLocked("another commit is still under way")
        try:
            began = time.monotonic()
            with self._engine.transaction(wait) as session:
                events = [submission.event for submission in group]
                outcomes = _carry_out(session, group) if None in events else session.insert(events)
            if self._on_stored is not None:
                self._tell_stored(events, outcomes)
            self.quick = time.monotonic() - began < SLOW_COMMIT
            return outcomes
        finally:
            self._turns.release()

    def works(self) -> bool:
        """Whether a commit works just now; no sender's event is risked for it."""
        try:
            outcome, = self.commit([_Waiting(work=_rehearse)], LOCK_STEPS[-1])
            return outcome.kind != "failed"
        except Exception:                               # why not is known since the breaker opened
            return False

    def _tell_stored(self, events: list, outcomes: list) -> None:
        for event, outcome in zip(events, outcomes):
            if outcome.kind == "stored":
                try:
                    self._on_stored(event._replace(id=outcome.event_id))
                except BaseException:                   # the event is stored, whatever who hears of it does
                    self._on_error("on_stored")


class Store:
    """Group commit over an engine: whoever commits tells each submission its outcome there and then, as
    waking a thread for each answer costs more than the disk does.

    Two threads commit, in turns. The poller *leads*: it commits what one look at its connections brought,
    then looks again. The *writer* commits the queue: what comes by other ways, and what the leader hands over
    because anything is not as it should be: the database locked or broken, the last commit slow, the turn not
    to be had soon. So only the writer ever waits or fails a submission; its next quick commit lets the leader
    lead again.

    A locked group is tried again until its submissions have waited for the busy timeout. When groups fail in
    a row the breaker opens: each submission fails at once, and the writer makes the tries.
    """

    def __init__(self, engine: SQLite, busy_timeout: float,
                 on_stored: Optional[Callable[[AppointmentEvent], Any]] = None,
                 on_trouble: Callable[[str], Any] = lambda text: None,
                 on_error: Callable[[str], Any] = _no_error) -> None:
        """`on_stored(event)` follows each commit in order and must not block; `on_trouble(text)` says when
        writing starts to fail or the breaker opens, "" when it works again; `on_error(name)` what raised."""
        self.engine = engine
        self.steps, self.event = engine.steps, engine.event
        self.last_id, self.count = engine.last_id, engine.count
        self._busy_timeout, self._on_trouble, self._on_error = busy_timeout, on_trouble, on_error
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._lanes = _Lanes(self, on_error)
        self._refusal = ""              # why each submission fails at once just now
        self._committer = _Committer(engine, on_stored, on_error)
        self._lead_lock = threading.Lock()              # held while lead() works, for settle()
        self._writer = threading.Thread(target=self._run, name="webhook-writer", daemon=True)
        self._pause, self._breaker = LOCK_STEPS[0], Breaker()
        self._lock_counted = -math.inf                  # when a lock last counted as a failure
        self._trouble = self._public = ""               # the operator's words, and everybody's
        self._checkup = Checkup("probe", self._probe)
        self._stop_lock, self._stopping, self._stopped = threading.Lock(), threading.Event(), False

    def open(self) -> None:
        """Open the engine. Raises SetupError, and then has changed nothing."""
        self.engine.open()

    def start(self) -> None:
        """Start writing."""
        self._lanes.start()
        self._writer.start()
        self._committer.quick = True

    def stop(self) -> None:
        """Commit what was submitted, tell all, end the threads, close the engine. Later submissions fail."""
        with self._stop_lock:
            if self._stopped:
                return
            self._stopped = True
            self._busy_timeout = 0.0            # who stops us has given senders time to wait for a lock
            if self._writer.ident is not None:
                self.settle()                           # what is being compared may still need the writer
                self._stopping.set()
                self.submit(_Waiting())                 # wakes the writer
                self._writer.join()
                self._lanes.stop()
            self._refuse("the store has stopped", "")
            trouble = self.engine.close()
            if trouble not in self._trouble:            # while nothing came nobody had to be told
                self._report(trouble, "")

    # -- submitting

    def submit(self, submission: Submission) -> None:
        """Leave it to the writer. While nothing can be stored it fails at once, after what came before it."""
        self._queue.put(submission)
        if self._refusal:               # it is set before the queue is emptied: nobody is left behind there
            self._refuse_queued()

    def lead(self, submissions: list) -> None:
        """Commit the events of `submissions` and tell each its outcome, or hand all to the writer.

        For one thread alone, and for lanes to which no outcome is owed: they would overtake what is queued.
        """
        with self._lead_lock:
            for at in range(0, len(submissions), GROUP):
                group = submissions[at:at + GROUP]
                if not (self._committer.quick and self._lead(group)):
                    for submission in submissions[at:]:
                        self.submit(submission)
                    return

    def add(self, event: AppointmentEvent, digest: Optional[bytes] = None) -> Outcome:
        """Store one event and wait. A "failed" outcome carries its error."""
        waiting = _Waiting(event, digest)
        self.submit(waiting)
        return waiting.wait()

    def do(self, work: Callable[[Any], Any]) -> Any:
        """Run work(session) in the writer's transaction, inside a savepoint; what it gives, once committed.

        Raises what `work` raises, and then keeps nothing of it; StoreUnavailable when nothing can be written.
        After a group that failed `work` may run again. It must not wait for the store.
        """
        waiting = _Waiting(work=work)
        self.submit(waiting)
        outcome = waiting.wait()
        if outcome.error is not None:
            raise outcome.error
        return waiting.result

    @property
    def breaker_state(self) -> str:
        """"closed", "open" or "half-open"."""
        return self._breaker.state

    def settle(self) -> None:
        """Wait until everything submitted before this call is done. Not for the threads that commit."""
        with self._lead_lock:
            marker = _Waiting()
        self.submit(marker)
        marker.wait()
        self._lanes.settle()

    def health(self, wait: float = 0.04) -> str:
        """What is wrong, or "": asked of the writer, which really writes. Answers within `wait` seconds, if
        need be with what was found last."""
        try:
            found, under_way = self._checkup.result(wait)
        except RuntimeError as error:                   # the system gives no more threads
            return str(error)
        if under_way > self._busy_timeout + 1:
            return f"the writer has not answered for {under_way:.0f} s"
        return found or self._public

    def _probe(self) -> str:
        try:
            self.do(_rehearse)
            return ""
        except Exception as error:
            return _public(error)

    # -- committing

    def _lead(self, group: list) -> bool:
        """Commit and tell `group`; False when the writer has to take it."""
        try:
            outcomes = self._committer.commit(group, LEAD_WAIT)
        except Exception:                               # the writer will meet it, too, and knows what to do
            self._committer.quick = False
            return False
        self._lanes.tell(group, outcomes)
        if not self.engine.tend():                      # the writer meets it, too, and tells of it
            self.submit(_Waiting(work=_rehearse))
        return True

    def _run(self) -> None:
        get, size = self._queue.get, self._queue.qsize
        group: list = []
        while True:
            if not group:
                group.append(get())
            for _ in range(min(size(), GROUP - len(group))):
                group.append(get())
            group = self._write(group)
            if self._breaker.state == "open":
                self._sit_out(group)
                group = []
            elif group:                                 # most locks are short, so the first sleeps are, too
                time.sleep(self._pause)
                self._pause = min(2 * self._pause, LOCK_STEPS[-1])
            if self._stopping.is_set() and not group and not size():
                return

    def _write(self, group: list) -> list:
        """Commit `group` and tell each its outcome. Returns those to try again: the database was locked."""
        outcomes: Iterable = itertools.repeat(PASSED)
        try:
            if any(one.event is not None or one.work is not None for one in group):
                outcomes = self._committer.commit(group, LOCK_STEPS[-1])
                if any(outcome.kind not in ("failed", "passed") for outcome in outcomes):
                    self._succeeded()
        except StoreLocked as error:
            return self._fail_the_late(group, error)
        except Exception as error:                      # whatever it is, nobody may wait for ever
            if len(group) > 1 and any(one.work is not None for one in group):
                return self._write_apart(group)
            self._report(reason_of(error), _public(error))
            self._breaker.failed()
            outcomes = itertools.repeat(Outcome("failed", error=error))
        self._lanes.tell(group, outcomes)
        return []

    def _write_apart(self, group: list) -> list:
        """As _write, but each work in a transaction of its own: it may be what broke the common one."""
        again: list = []
        for run in _runs(group):
            again += run if again else self._write(run)
        return again

    def _fail_the_late(self, group: list, error: StoreLocked) -> list:
        """Tell those who have waited for the busy timeout; returns the others."""
        now = time.monotonic()
        late = [one for one in group if now - one.arrived >= self._busy_timeout]
        if late:                                        # who only had to wait a little has no trouble
            self._report(str(error), error.public)
            # One lock fails many groups: it counts once in each busy timeout. So only one that lasts for five
            # of them opens the breaker, and the first event after any shorter one is stored
            if now - self._lock_counted >= max(self._busy_timeout, LOCK_COUNTS):
                self._lock_counted = now
                self._breaker.failed()
            self._lanes.tell(late, itertools.repeat(Outcome("failed", error=error)))
        return [one for one in group if now - one.arrived < self._busy_timeout]

    # -- trouble

    def _sit_out(self, group: list) -> None:
        """The breaker is open: fail `group` and all that comes at once, until a try works or stop() comes."""
        self._report(f"{self._trouble}; this failed {BREAKER_FAILURES} times in a row, so events are refused "
                     "at once until a try of our own works (breaker open)", self._public)
        self._refuse(self._trouble, self._public, group)
        while not self._stopping.wait(LOCK_STEPS[-1]):
            if not self._breaker.allows():
                continue
            if self._committer.works():
                with self._lanes.lock:                  # or who refuses just now would wait for what we take
                    self._refusal = ""
                self._succeeded()
                return
            self._breaker.failed()

    def _refuse(self, reason: str, public: str, group: Iterable = ()) -> None:
        """Fail `group`, what is queued and, from now on, each submission at once, in this order."""
        with self._lanes.lock:
            self._refusal, self._public, self._committer.quick = reason, public, False
            for submission in group:
                self._tell_refusal(submission)
            self._refuse_queued()

    def _refuse_queued(self) -> None:
        with self._lanes.lock:
            while self._refusal and self._queue.qsize():
                self._tell_refusal(self._queue.get())

    def _tell_refusal(self, submission: Submission) -> None:
        # An exception for each: one that is raised again and again grows with every traceback
        error = StoreUnavailable(self._refusal, self._public)
        self._lanes.tell([submission], [Outcome("failed", error=error)])

    def _succeeded(self) -> None:
        self._pause = LOCK_STEPS[0]
        self._breaker.succeeded()
        self._report("", "")

    def _report(self, trouble: str, public: str) -> None:
        self._public = public
        if trouble != self._trouble:
            self._trouble = trouble
            try:
                self._on_trouble(trouble)
            except BaseException:                       # the writer must go on
                self._on_error("on_trouble")


def _runs(group: list) -> list:
    """`group` in order, in lists: events that follow each other, and alone whatever is no event."""
    runs: list = []
    for one in group:
        if one.event is None or not runs or runs[-1][0].event is None:
            runs.append([])
        runs[-1].append(one)
    return runs


def _carry_out(session: Any, group: list) -> list:
    """The outcomes of events and works of `group`, in this order; a work that fails leaves nothing behind."""
    outcomes: list = []
    for run in _runs(group):
        if run[0].event is not None:
            outcomes += session.insert([one.event for one in run])
        else:
            outcomes.append(_work(session, run[0]))
    return outcomes


def _work(session: Any, submission: Submission) -> Outcome:
    if submission.work is None:
        return PASSED
    try:
        with session.savepoint():
            submission.result = submission.work(session)
        return Outcome("done")
    except BaseException as error:                      # of whoever asked for it, and told to them
        return Outcome("failed", error=error)


def _rehearse(session: Any) -> None:
    session.rehearse()


def _public(error: Exception) -> str:
    """What everybody may hear of an error."""
    return getattr(error, "public", "") or reason_of(error)


# =============================================================================
# Ledger: who looked, and seals that show whether anything was changed since. Knows SQL; nothing of HTTP.
# =============================================================================

SEAL_ROWS = 256                 # most rows of a block
SEAL_BYTES = 4 * 1024 * 1024    # of payloads; of larger ones a block has fewer
SEAL_BLOCKS = 64                # of one transaction
SEAL_SECONDS = 1.0              # from a row to its seal
TELL_SECONDS = 60.0             # between two lines with the newest digest
PURGE_BLOCKS = 16               # of one transaction: some 20 ms, in which nobody else writes


class Source(NamedTuple):
    """A table that is sealed, the column that says when a row came, and what of it is sealed. Columns that
    follow from these are not in it: they change with the encryption key."""
    table: str
    time: str
    columns: tuple


SOURCES = {source.table: source for source in (
    Source("appointment_events", "received_at", ("id", *COLUMNS)),
    Source("conflicting_events", "received_at", ("id", "event_id", "received_at", "client", "payload")),
    Source("access_log", "at", ("id", "at", "client", "address", "action", "detail", "rows")),
)}

# Of an encrypted event an HMAC of the content is sealed instead, so that a seal need not decrypt it
ENCRYPTED_EVENTS = Source("appointment_events", "received_at", (
    "id", "event_type", "appointment_id", "timestamp", "received_at", "client", "content_hmac"))


def canonical_row(values: Iterable) -> bytes:
    """Values of SQLite as bytes that mean these values only: type and length of each, then their texts."""
    kinds = {type(None): "null", int: "integer", float: "real", str: "text", bytes: "blob"}
    heads, texts = "", []
    for value in values:
        text = value if isinstance(value, bytes) else b"" if value is None else str(value).encode("utf-8", "replace")
        heads += f"{kinds[type(value)]}:{len(text)} "
        texts.append(text)
    return heads.encode() + b"".join(texts)


class Block(NamedTuple):
    """Rows that follow each other: how many, the last id, their first and last time, SHA-256 of what they mean:
    of lines with canonical_row() in hexadecimal."""
    rows: int
    last_id: int
    since: str
    until: str
    content: bytes


def _canonical_in_sql(columns: Sequence) -> tuple:
    """The expressions for the two parts of canonical_row(); a text with NUL would not go whole through printf()."""
    heads = ", ".join(f"typeof({name}), length(CAST({name} AS BLOB))" for name in columns)
    texts = " || ".join(f"ifnull({name}, '')" for name in columns)
    return f"printf('{'%s:%d ' * len(columns)}', {heads})", texts


def block_of(connection: sqlite3.Connection, encryption: Optional[Encryption], source: Source, after: int, up_to: int,
             most: int = SEAL_ROWS) -> Optional[Block]:
    """The first block behind an id, of what canonical_row() makes of its rows; None where nothing is.

    Hot path: SQLite makes one text of a block, so that the interpreter's lock is given away twice for 256 rows and
    not for each: that had cost a sixth of the requests per second. Other encrypted rows have to be decrypted here.
    """
    if source is ENCRYPTED_EVENTS:
        encryption = None
    heads, texts = _canonical_in_sql(source.columns)
    rows = (f"(SELECT id, {source.time} AS at, {heads} AS heads, {texts} AS texts FROM {source.table} "
            "WHERE id > ? AND id <= ? ORDER BY id LIMIT ?)")
    # In hexadecimal: before SQLite 3.40 group_concat() cuts a text at its first NUL
    parts = "'', group_concat(hex(heads || texts), char(10))"
    if encryption is not None:
        parts = "group_concat(heads, ''), group_concat(hex(texts), '')"
    *found, heads, data = connection.execute(f"SELECT count(*), max(id), min(at), max(at), {parts} FROM {rows}",
                                             (after, up_to, most)).fetchone()
    if not found[0]:
        return None
    if encryption is not None:
        rows = _decrypted_rows(encryption, source, heads, bytes.fromhex(data))
        data = "\n".join(row.hex().upper() for row in rows)
    return Block(*found, hashlib.sha256(data.encode()).digest())


def _decrypted_rows(encryption: Encryption, source: Source, heads: str, data: bytes) -> Iterator[bytes]:
    """canonical_row() of rows once decrypted, of which `heads` and `data` are the two parts of canonical_row() as
    they are stored; of what cannot be decrypted the stored one, behind a mark."""
    words, width, at = heads.split(" "), len(source.columns), 0
    for start in range(0, len(words) - 1, width):
        row_heads, texts = words[start:start + width], []
        for word in row_heads:
            end = at + int(word[word.index(":") + 1:])
            texts.append(data[at:end])
            at = end
        try:
            DECRYPTED[source.table](encryption, row_heads, texts)
        except ValueError as error:
            encryption.tell_unreadable(f"the row of {source.table}", int(texts[0]), error)
            row_heads.insert(0, "text:10")
            texts.insert(0, b"unreadable")
        yield f"{' '.join(row_heads)} ".encode() + b"".join(texts)


def _decrypt_event(encryption: Encryption, heads: list, texts: list) -> None:
    """Put what is decrypted in the place of what is stored. Raises ValueError."""
    if (heads[3], heads[5], heads[8][:5]) != ("text:0", "null:0", "blob:"):
        raise ValueError("patient_id, notes or payload are not encrypted")
    place = b"appointment_events\0payload\0%b\0%b" % (texts[2], texts[4])
    patient_id, notes, payload = encryption.parts_of(encryption.opened(texts[8], place))
    if notes is not None:
        heads[5], texts[5] = f"text:{len(notes)}", notes
    heads[3], heads[8], texts[3], texts[8] = f"text:{len(patient_id)}", f"text:{len(payload)}", patient_id, payload


def _decrypt_conflict(encryption: Encryption, heads: list, texts: list) -> None:
    payload = encryption.opened(texts[4], b"conflicting_events\0payload\0%b\0%b" % (texts[1], texts[2]))
    if heads[4][:5] != "blob:":
        raise ValueError("the payload is not encrypted")
    heads[4], texts[4] = f"text:{len(payload)}", payload


def _decrypt_access(encryption: Encryption, heads: list, texts: list) -> None:
    if heads[5] == "null:0":
        return
    address = b"None" if heads[3] == "null:0" else texts[3]
    detail = encryption.opened(texts[5], b"access_log\0detail\0%b\0%b\0%b" % (texts[1], texts[4], address))
    if heads[5][:5] != "blob:":
        raise ValueError("the detail is not encrypted")
    heads[5], texts[5] = f"text:{len(detail)}", detail


DECRYPTED = {"appointment_events": _decrypt_event, "conflicting_events": _decrypt_conflict,
             "access_log": _decrypt_access}


def rows_that_fit(connection: sqlite3.Connection, source: Source, after: int) -> int:
    """How many rows a block may have so that its text stays small."""
    size, = connection.execute(f"SELECT sum(length({source.columns[-1]})) FROM (SELECT {source.columns[-1]} FROM "
                               f"{source.table} WHERE id > ? ORDER BY id LIMIT ?)", (after, SEAL_ROWS)).fetchone()
    return SEAL_ROWS if (size or 0) < SEAL_BYTES else 1 + SEAL_ROWS * SEAL_BYTES // (16 * size)


class Seal(NamedTuple):
    """One row of seals: SHA-256 over a block of rows, chained to the seal before."""
    id: int
    at: str
    source: str
    first_id: int
    last_id: int
    rows: int
    content: bytes
    digest: bytes
    hmac: Optional[bytes] = None
    key_id: Optional[str] = None
    purged: Optional[str] = None

    def chained(self, before: bytes) -> bytes:
        """Its digest, behind a seal with the digest `before`."""
        return hashlib.sha256(canonical_row((before, *self[:7], self.key_id))).digest()


SEAL_COLUMNS = ", ".join(Seal._fields)


def first_digest(secret: bytes) -> bytes:
    """What the chain begins with: who has only a digest, out of a log, cannot try what it may be of."""
    return hmac.digest(secret, b"seals", "sha256")


def utc_now() -> str:
    """As received_at: UTC with microseconds."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class _Stale(Exception):
    """Another process has written to the ledger meanwhile."""


class Ledger:
    """Access log and seals of one store.

    Rows are sealed in the background: read and hashed by a reader, and only the seals go through the writer, a
    transaction for up to 64 blocks. A block covers all ids behind the one before it, so that a row that is put
    into a gap later belongs to a block, too.
    """

    def __init__(self, store: Store, tell: Callable[[str], Any], on_error: Callable[[str], Any] = _no_error) -> None:
        """tell(text) hears the newest digest, for a copy elsewhere."""
        self._store, self._engine, self._tell = store, store.engine, tell
        self._loop = Loop("ledger", self._step, SEAL_SECONDS, on_error)
        self._newest: Optional[Seal] = None
        self._sealed: dict = {}         # table: the id up to which it is sealed
        self._digest = self._secret = b""
        self._told_at, self._told = 0.0, 0

    def start(self) -> None:
        """Begin: what is there is sealed as it is found. Raises StoreUnavailable."""
        self._load()
        self._loop.start()
        self._loop.wake()

    def stop(self) -> None:
        """Seal the rest. The store must still work."""
        self._loop.stop()
        with contextlib.suppress(StoreUnavailable):
            self._seal()
            self._tell_newest()

    # -- who looked

    def record(self, action: str, client: Optional[str] = None, address: Optional[str] = None,
               detail: Optional[str] = None, rows: Optional[int] = None) -> None:
        """A row of the access log, on disk when this returns. Raises StoreUnavailable."""
        record = functools.partial(record_access, utc_now(), action, client, address, detail, rows)
        self._store.do(lambda session: record(session, self._engine.encryption))

    def hidden(self, text: str) -> str:
        """What stands for a personal value: the same for the same value, in this database only."""
        return "hmac:" + hmac.digest(self._secret, b"access\0" + text.encode(), "sha256")[:16].hex()

    # -- sealing

    def _load(self) -> None:
        with self._engine.readers.reading() as connection:
            self._secret = database_secret(connection, self._engine.encryption)
            newest = connection.execute(f"SELECT {SEAL_COLUMNS} FROM seals ORDER BY id DESC LIMIT 1").fetchone()
            sealed = connection.execute("SELECT source, max(last_id) FROM seals GROUP BY source").fetchall()
        self._newest = newest and Seal._make(newest)
        self._digest = self._newest.digest if newest else first_digest(self._secret)
        self._sealed = {**dict.fromkeys(SOURCES, 0), **dict(sealed)}

    def _step(self) -> None:
        with contextlib.suppress(StoreUnavailable):     # the store tells of it; the next step goes on from here
            self._seal()

    def _seal(self) -> None:
        """Seal all that is there. Raises StoreUnavailable."""
        while True:
            seals = self._next_seals()
            if seals:
                try:
                    self._store.do(functools.partial(self._keep, seals))
                except _Stale:
                    self._load()
                    continue
                self._newest, self._digest = seals[-1], seals[-1].digest
                self._sealed.update((seal.source, seal.last_id) for seal in seals)
            if len(seals) < SEAL_BLOCKS:
                break
        if time.monotonic() - self._told_at >= TELL_SECONDS:
            self._tell_newest()

    def _next_seals(self) -> list:
        """At most SEAL_BLOCKS seals of what is not sealed, each read by itself."""
        seals: list = []
        number, digest, signer = self._newest.id if self._newest else 0, self._digest, self._engine.encryption
        for source in SOURCES.values():
            last = self._sealed[source.table]
            form = ENCRYPTED_EVENTS if signer and source.table == "appointment_events" else source
            while len(seals) < SEAL_BLOCKS:
                with self._engine.readers.reading() as connection:
                    most = rows_that_fit(connection, source, last)
                    block = block_of(connection, signer, form, last, 2 ** 63 - 1, most)
                if block is None:
                    break
                number += 1
                seal = Seal(number, utc_now(), source.table, last + 1, block.last_id, block.rows, block.content, b"",
                            key_id=signer and signer.key_id)
                digest = seal.chained(digest)
                seals.append(seal._replace(digest=digest, hmac=signer and signer.sign(digest)))
                last = block.last_id
        return seals

    def _keep(self, seals: list, session: Session) -> None:
        newest = session.execute("SELECT id, digest FROM seals ORDER BY id DESC LIMIT 1").fetchone()
        if newest != (self._newest and (self._newest.id, self._newest.digest)):
            raise _Stale
        marks = ", ".join("?" * len(Seal._fields))
        for seal in seals:
            session.execute(f"INSERT INTO seals ({SEAL_COLUMNS}) VALUES ({marks})", seal)

    def _tell_newest(self) -> None:
        if self._newest is not None and self._newest.id != self._told:
            self._told_at, self._told = time.monotonic(), self._newest.id
            self._tell(f"seal {self._newest.id} sha256:{self._newest.digest.hex()}")


def record_access(at: str, action: str, client: Optional[str], address: Optional[str], detail: Optional[str],
                  rows: Optional[int], session: Session, encryption: Optional[Encryption]) -> None:
    """Put a row into the access log."""
    kept: Any = detail
    if encryption is not None and detail is not None:
        kept = encryption.sealed(detail.encode(), access_place(at, action, address))
    session.execute("INSERT INTO access_log (at, client, address, action, detail, rows) VALUES (?, ?, ?, ?, ?, ?)",
                    (at, client, address, action, kept, rows))


# -- verify

class Mismatch(Exception):
    """Something is not as it was sealed; the text says what."""


class Verification:
    """Recomputes all seals of a database, in short reads, beside whoever writes."""

    def __init__(self, connection: sqlite3.Connection, encryption: Optional[Encryption]) -> None:
        self._connection, self._encryption = connection, encryption
        secret = database_secret(connection, encryption)
        self._digest, self._content_key = first_digest(secret), content_key_of(secret)
        self._last: dict = dict.fromkeys(SOURCES, 0)
        self.rows: Counter = Counter()
        self.number, self.sealed_up_to, self.signed, self.unsigned = 0, "", 0, 0
        self._purged: list = []         # seals whose rows are gone

    def run(self, known: dict, on_seal: Callable[[int], Any] = lambda number: None) -> None:
        """Check all. `known` is {number: digest} out of logs. Raises Mismatch."""
        while self._check_next(known):
            on_seal(self.number)
        self._check_purges()

    def _check_next(self, known: dict) -> bool:
        """Check some seals in one snapshot: a purge takes rows and marks their seals at once."""
        self._connection.execute("BEGIN")
        try:
            rows = self._connection.execute(f"SELECT {SEAL_COLUMNS} FROM seals WHERE id > ? ORDER BY id LIMIT 100",
                                            (self.number,)).fetchall()
            for row in rows:
                self._check(Seal._make(row), known)
            used, = self._connection.execute("SELECT max(seq) FROM sqlite_sequence WHERE name = 'seals'").fetchone()
            if not rows and max([*known, used or 0]) > self.number:
                raise Mismatch(f"removed: seals behind number {self.number}")
            return bool(rows)
        finally:
            self._connection.execute("COMMIT")

    def _check(self, seal: Seal, known: dict) -> None:
        where = f"seal {seal.id} ({seal.source} {seal.first_id} to {seal.last_id}, sealed {seal.at})"
        if seal.id != self.number + 1:
            raise Mismatch(f"removed: seals between {self.number} and {seal.id}")
        try:
            is_whole = seal.chained(self._digest) == seal.digest and seal.first_id == self._last[seal.source] + 1
        except (KeyError, TypeError):
            is_whole = False
        if not is_whole:
            raise Mismatch(f"changed: {where} itself")
        if known.get(seal.id, seal.digest) != seal.digest:
            raise Mismatch(f"changed: history up to {where} was rewritten, as its digest was another one")
        self._check_signature(seal, where)
        self._check_rows(seal, where)
        self.number, self._digest, self._last[seal.source] = seal.id, seal.digest, seal.last_id
        self.sealed_up_to = max(self.sealed_up_to, seal.at)

    def _check_signature(self, seal: Seal, where: str) -> None:
        fits = None
        if self._encryption is not None and seal.key_id is not None:
            fits = self._encryption.fits(seal.key_id, seal.digest, seal.hmac)
        if fits is False or seal.key_id is None and seal.hmac is not None:
            raise Mismatch(f"changed: {where} is not signed by its key")
        if fits is None:
            self.unsigned += self._encryption is not None
            if self.signed:             # keys come and go in order: who cannot sign would only leave it out
                raise Mismatch(f"changed: {where} is signed with no key that is here, unlike those before it")
        else:
            self.signed += 1

    def _check_rows(self, seal: Seal, where: str) -> None:
        source = SOURCES[seal.source]
        if seal.key_id is not None and seal.source == "appointment_events":
            source = ENCRYPTED_EVENTS
        block = block_of(self._connection, self._encryption, source, seal.first_id - 1, seal.last_id,
                         seal.rows + SEAL_ROWS)
        if seal.purged is not None and block is None:
            self._purged.append(seal)
            return
        if block is None:
            raise Mismatch(f"removed: rows of {where}: no row is left, {seal.rows} were sealed")
        kind = ""
        if block.rows != seal.rows:
            kind = "removed" if block.rows < seal.rows else "put in"
        elif block.content != seal.content or seal.purged is not None or self._derived_misfits(source, seal):
            kind = "changed"
        if kind:
            raise Mismatch(f"{kind}: rows of {where}: {block.rows} are there (of {block.since} to {block.until}), "
                           f"{seal.rows} were sealed")
        self.rows[seal.source] += block.rows

    def _derived_misfits(self, source: Source, seal: Seal) -> bool:
        """Whether a column that is not sealed, as it follows from others, does not do so."""
        encryption, ids = self._encryption, (seal.first_id, seal.last_id)
        if source.table == "conflicting_events":
            found = self._connection.execute("SELECT event_id, received_at, payload, digest FROM conflicting_events "
                                             "WHERE id BETWEEN ? AND ?", ids)
            return any(not self._fits_digest(*row) for row in found)
        if source.table != "appointment_events":
            return False
        if encryption is None:
            return self._connection.execute(
                "SELECT 1 FROM appointment_events WHERE id BETWEEN ? AND ? AND (patient_hmac IS NOT NULL OR "
                "content_hmac IS NOT NULL) LIMIT 1", ids).fetchone() is not None
        for *row, index, content in self._connection.execute(
                f"SELECT {', '.join(COLUMNS)}, patient_hmac, content_hmac FROM appointment_events "
                "WHERE id BETWEEN ? AND ?", ids):
            try:
                if not encryption.fits_row(row, index, content, self._content_key):
                    return True
            except ValueError:          # what was not encrypted may have been sealed as such
                if source is ENCRYPTED_EVENTS:
                    return True
        return False

    def _fits_digest(self, event_id: int, received_at: str, payload: Any, digest: Any) -> bool:
        if self._encryption is None:
            return digest == content_digest(payload)
        try:
            payload = self._encryption.opened(payload, conflict_place(event_id, received_at)).decode()
        except ValueError:
            return True                                 # it was sealed as such
        return digest in self._encryption.indexes_of(content_digest(payload).hex())

    def _check_purges(self) -> None:
        """Rows are gone only where a row of the access log says so; unless that was purged itself."""
        told, oldest = set(), ""
        for at, action, address, value in self._connection.execute(
                "SELECT at, action, address, detail FROM access_log WHERE action = 'purge'"):
            try:
                detail = value if self._encryption is None else self._encryption.opened(
                    value, access_place(at, action, address)).decode()
                for first, end in json.loads(detail)["seals"]:
                    told.update(range(first, end))
            except (ValueError, KeyError, TypeError):
                raise Mismatch("changed: a purge in access_log") from None
        for seal in self._purged:
            if seal.source == "access_log":
                oldest = max(oldest, str(seal.purged))
        for seal in self._purged:
            if seal.id not in told and str(seal.purged) > oldest:
                raise Mismatch(f"removed: rows of seal {seal.id} ({seal.source} {seal.first_id} to {seal.last_id}), "
                               "and no purge in access_log tells of it")

    def summary(self) -> str:
        """What was found, when all is well."""
        rows = self.rows
        text = (f"ok: {rows['appointment_events']} events, {rows['conflicting_events']} conflicts, "
                f"{rows['access_log']} accesses, ")
        text += f"sealed up to {self.sealed_up_to}" if self.number else "nothing is sealed yet"
        if self._purged:
            text += f"; the rows of {len(self._purged)} seals were purged"
        if self.unsigned:
            text += f"; of {self.unsigned} seals only the chain was checked, as no key that is here has signed them"
        return text


# -- purge

PURGED_TABLES = ("appointment_events", "conflicting_events")


def purge_database(path: str, encryption: Optional[Encryption], before: str, tables: Iterable,
                   client: Optional[str] = None) -> int:
    """As purge(), of a file. Raises SetupError."""
    engine = SQLite(path, encryption=encryption)
    engine.open()
    try:
        return purge(engine, before, tables, client)
    except StoreUnavailable as error:
        raise SetupError(f"database {path}: {error}") from None
    finally:
        engine.close()


def patiently(engine: SQLite, work: Callable[[Session], Any], seconds: float = 60.0) -> Any:
    """work(session) in a transaction of an engine, waiting for locks of others; what it removes or replaces is
    overwritten. Raises StoreUnavailable."""
    ends_at = time.monotonic() + seconds
    while True:
        try:
            with engine.transaction() as session:
                session.execute("PRAGMA secure_delete = ON")
                return work(session)
        except StoreLocked:
            if time.monotonic() > ends_at:
                raise
            time.sleep(LOCK_STEP)


def purge(engine: SQLite, before: str, tables: Iterable, client: Optional[str] = None) -> int:
    """Remove whole sealed blocks whose every row came before a time (canonical UTC), from `tables`; how many rows.
    In short transactions, between which others write; their seals stay. Raises StoreUnavailable."""
    removed = 0
    for table in tables:
        step = functools.partial(_purge_blocks, SOURCES[table], before.rstrip("Z"), client, engine.encryption)
        last: Optional[int] = 0
        while last is not None:
            last, rows = patiently(engine, functools.partial(step, last))
            removed += rows
    engine.empty_wal()
    return removed


def _purge_blocks(source: Source, before: str, client: Optional[str], encryption: Optional[Encryption], last: int,
                  session: Session) -> tuple:
    """(number of the last seal that was looked at, None at the end; how many rows went) of one transaction."""
    seals = session.execute("SELECT id, first_id, last_id, rows FROM seals WHERE id > ? AND source = ? AND purged IS NULL "
                            "ORDER BY id LIMIT ?", (last, source.table, PURGE_BLOCKS)).fetchall()
    gone, removed, now = [], 0, utc_now()
    for number, first, end, rows in seals:
        count, newest = session.execute(f"SELECT count(*), max(rtrim({source.time}, 'Z')) FROM {source.table} "
                                        "WHERE id BETWEEN ? AND ?", (first, end)).fetchone()
        if count != rows:                               # who has changed it must not be covered up
            continue
        if newest >= before:
            seals = []                                  # what follows came later
            break
        removed += session.execute(f"DELETE FROM {source.table} WHERE id BETWEEN ? AND ?", (first, end)).rowcount
        session.execute("UPDATE seals SET purged = ? WHERE id = ?", (now, number))
        gone.append(number)
    if gone:
        detail = json.dumps({"table": source.table, "before": before + "Z", "seals": _number_runs(gone)})
        record_access(now, "purge", client, None, detail, removed, session, encryption)
    return (seals[-1][0] if len(seals) == PURGE_BLOCKS else None), removed


def _number_runs(numbers: list) -> list:
    """[[first, end]] of ranges that hold exactly `numbers`, which go up."""
    runs: list = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1][1] += 1
        else:
            runs.append([number, number + 1])
    return runs


# -- rekey

class Rekeying:
    """Encrypts with the first key what has another one, and in a database that was not encrypted all that is
    personal. In short transactions, between which a server beside it writes; it can be begun again."""
    STEP = 200                      # rows in a transaction

    def __init__(self, engine: SQLite) -> None:
        """`engine` is open, has an encryption, and `takes_over`."""
        self._engine, self._encryption = engine, engine.encryption
        self.moved, self.unreadable = 0, 0
        self._do = functools.partial(patiently, engine)
        self._takes_over = self._do(lambda session: session.execute(
            "SELECT 1 FROM database_keys WHERE name = 'takeover'").fetchone() is not None)

    def run(self, on_step: Callable[[str, int], Any]) -> None:
        """on_step(table, id) hears how far it is. Raises StoreUnavailable."""
        for table, step in (("appointment_events", self._move_events), ("conflicting_events", self._move_conflicts),
                            ("access_log", self._move_accesses)):
            last = 0
            while last is not None:
                last = self._do(functools.partial(step, last))
                on_step(table, last or 0)
        self._do(self._move_key)
        if self._takes_over and not self.unreadable:
            self._engine.clear()

    def _rows(self, session: Session, columns: str, table: str, last: int) -> list:
        return session.execute(f"SELECT {columns}, id FROM {table} WHERE id > ? ORDER BY id LIMIT ?",
                               (last, self.STEP)).fetchall()

    def _is_done(self, value: Any) -> bool:
        return isinstance(value, bytes) and value.startswith(self._encryption.prefix)

    def _opened(self, value: Any, place: bytes) -> Optional[str]:
        """A text, as it was or decrypted; None where that cannot be."""
        if isinstance(value, str) and self._takes_over:
            return value
        try:
            return self._encryption.opened(value, place).decode()
        except ValueError:
            self.unreadable += 1
            return None

    def _move_events(self, last: int, session: Session) -> Optional[int]:
        rows = self._rows(session, ", ".join(COLUMNS), "appointment_events", last)
        for row in rows:
            stored = AppointmentEvent._make(row)
            if self._is_done(stored.payload):
                continue
            if not (isinstance(stored.payload, str) and self._takes_over):
                stored = self._encryption.event(row)
            if isinstance(stored, Unreadable):
                self.unreadable += 1
                continue
            _, _, patient_id, _, notes, _, _, *hidden = self._encryption.row(stored, self._engine.content_key)
            session.execute("UPDATE appointment_events SET patient_id = ?, notes = ?, payload = ?, patient_hmac = ?, "
                            "content_hmac = ? WHERE id = ?", (patient_id, notes, *hidden, stored.id))
            self.moved += 1
        return rows[-1][-1] if rows else None

    def _move_conflicts(self, last: int, session: Session) -> Optional[int]:
        rows = self._rows(session, "event_id, received_at, payload", "conflicting_events", last)
        for event_id, received_at, value, row_id in rows:
            place = conflict_place(event_id, received_at)
            payload = None if self._is_done(value) else self._opened(value, place)
            if payload is not None:
                digest = self._encryption.index_of(content_digest(payload).hex())
                session.execute("UPDATE conflicting_events SET payload = ?, digest = ? WHERE id = ?",
                                (self._encryption.sealed(payload.encode(), place), digest, row_id))
                self.moved += 1
        return rows[-1][-1] if rows else None

    def _move_accesses(self, last: int, session: Session) -> Optional[int]:
        rows = self._rows(session, "at, action, address, detail", "access_log", last)
        for at, action, address, value, row_id in rows:
            place = access_place(at, action, address)
            detail = None if value is None or self._is_done(value) else self._opened(value, place)
            if detail is not None:
                session.execute("UPDATE access_log SET detail = ? WHERE id = ?",
                                (self._encryption.sealed(detail.encode(), place), row_id))
                self.moved += 1
        return rows[-1][-1] if rows else None

    def _move_key(self, session: Session) -> None:
        value, = session.execute("SELECT value FROM database_keys WHERE name = 'database'").fetchone()
        key = self._encryption.opened(value, KEY_PLACE)
        session.execute("UPDATE database_keys SET value = ?, key_id = ? WHERE name = 'database'",
                        (self._encryption.sealed(key, KEY_PLACE), self._encryption.key_id))
        if not self.unreadable:
            session.execute("DELETE FROM database_keys WHERE name = 'takeover'")


# =============================================================================
# Log: one line a request, without patients' data, written in the background. Knows nothing of sockets or SQL.
# =============================================================================

# A level is its name; the numbers are those of the module logging
DEBUG, INFO, WARNING, ERROR = "DEBUG", "INFO", "WARNING", "ERROR"
LEVELS = {DEBUG: 10, INFO: 20, WARNING: 30, ERROR: 40}
LOGGED_FIELDS = (*REQUIRED_FIELDS, "notes")     # all that a line of the log names; what is personal is masked
MASK = '"***"'
LONGEST_SHOWN = 255             # characters of an event_type or appointment_id, by contract
LOG_LINES = 20000               # lines that may wait; what comes on top is dropped and counted
LOG_BYTES = 8 * 1024 * 1024     # characters of them: with payloads shown in full a line can have a megabyte
LOG_WRITE = 65536               # bytes a write, at most: what a pipe holds
LOG_PAUSE = 0.05                # seconds between looks into the queue: nobody has to wake the log's thread
LOG_FLUSH_SECONDS = 5.0         # at the end: nobody may be reading the other end of a pipe
LOG_LOOK_SECONDS = 1.0          # how soon it is noticed that the log file was renamed or removed
FRAMES_KEPT = 1000              # see Log._frame
EXCEPTION_GROUP = getattr(builtins, "BaseExceptionGroup", ())   # Python 3.11
SPACES = {ord(char): " " for char in "\t\n\r"}
NOT_PRINTABLE = re.compile("[^ -~]+")


class Redactor:
    """Payloads as one line of printable ASCII for the log, by the setting --log-payloads.

    `redacted` shows event_type, appointment_id and timestamp, each only if valid, names and masks what is
    a person's, and only counts all else, as its names are the sender's, too: {"event_type": "scheduled",
    "appointment_id": "APT-1001", "patient_id": "***", "timestamp": "2025-01-10T14:00:00Z"} +2.
    `none` gives no text at all, `full` the whole payload.
    """

    def __init__(self, mode: str, personal: frozenset = PERSONAL_FIELDS) -> None:
        """`mode` is redacted, full or none; `personal` are the members to mask, as a Contract knows them."""
        self.mode, self._personal = mode, personal
        self._masks_more = bool(personal - PERSONAL_FIELDS)

    def event(self, event: AppointmentEvent) -> str:
        """A valid event; members that are no columns are not counted. Hot path: 0.3 us."""
        if self.mode == "none":
            return ""
        if self.mode == "full":
            return _one_line(event.payload)
        if self._masks_more:
            members = {name: item for name, item in event._asdict().items() if item is not None}
            return _shown_members(members, self._personal)
        event_type, appointment_id = _shown(event.event_type), _shown(event.appointment_id)
        text = f'{{"event_type": {event_type}, "appointment_id": {appointment_id}, "patient_id": "***", ' \
               f'"timestamp": "{event.timestamp}"'
        if event.notes is None:
            return text + "}"
        return text + ', "notes": "***"}'

    def invalid(self, value: Any, problems: list) -> str:
        """A JSON value that is no valid event, for these Problems."""
        if self.mode == "none":
            return ""
        if self.mode == "full":
            return json.dumps(value)
        if not isinstance(value, dict):
            return MASK
        wrong = set(self._personal)
        for problem in problems:
            wrong.update(problem.path.split("/")[1:2] or LOGGED_FIELDS)     # the whole is every member
        if len(problems) >= MOST_PROBLEMS:              # the list may have been cut
            wrong.update(LOGGED_FIELDS)
        further = len(value.keys() - LOGGED_FIELDS)
        return _shown_members(value, wrong) + (f" +{further}" if further else "")

    def unreadable(self, body: bytes) -> str:
        """A body that is no JSON."""
        if self.mode == "none":
            return ""
        if self.mode == "full":
            return ascii(body)[1:]
        return f"({len(body)} bytes)"


def _shown(text: str) -> str:
    """A text that the contract allows, quoted; a lax schema may allow longer ones than the contract."""
    return MASK if len(text) > LONGEST_SHOWN else encode_basestring_ascii(text)


def _shown_members(value: dict, masked: Iterable) -> str:
    parts = [f'"{name}": {_shown_member(name, value[name], name in masked)}'
             for name in LOGGED_FIELDS if name in value]
    return "{" + ", ".join(parts) + "}"


def _shown_member(name: str, value: Any, is_wrong: bool) -> str:
    try:
        if is_wrong:
            return MASK
        if name == "timestamp":
            value = canonical_timestamp(value)
        return _shown(value)
    except (TypeError, ValueError):                     # the schema is laxer than the contract
        return MASK


def _one_line(text: str) -> str:
    """JSON text in one line of printable ASCII, with the same meaning."""
    if text.isascii() and text.isprintable():
        return text
    return NOT_PRINTABLE.sub(lambda found: encode_basestring_ascii(found[0])[1:-1], text.translate(SPACES))


class Sink:
    """Where lines go. Called by the log's thread only, but for reopen(): it may block, and raise anything."""

    most = LOG_WRITE                # bytes that one write should have

    def write(self, data: bytes, level: str) -> None:
        """Write whole lines; `level` is that of the first."""
        raise NotImplementedError

    def tend(self) -> None:
        """Called at every look into the queue."""

    def reopen(self) -> None:
        """See Log.reopen."""

    def close(self) -> None:
        """Called at the end."""


def _open_log(path: str) -> Any:
    """The end of a file, unbuffered: a failed write leaves nothing behind that would be repeated.

    A pipe that nobody reads is an error and not waited for.
    """
    at_once = getattr(os, "O_NONBLOCK", 0)
    file = open(path, "ab", buffering=0, opener=lambda path, flags: os.open(path, flags | at_once, 0o600))
    if at_once:
        os.set_blocking(file.fileno(), True)
    return file


class FileSink(Sink):
    """Log lines to a file that is rotated by size. Where others rename or remove it, a new one is made."""

    def __init__(self, path: str, max_bytes: int, backups: int) -> None:
        """Raises SetupError."""
        self._path, self._max_bytes, self._backups = os.path.abspath(path), max_bytes, backups
        self.most = min(max_bytes, LOG_WRITE)
        self._look_at = 0.0
        try:
            self._file = _open_log(self._path)
        except OSError as error:
            reason = error.strerror
            if error.errno == errno.ENXIO:              # a pipe, mostly
                reason = "nobody is at its other end; start what reads it first"
            raise SetupError(f"log_file {path}: {reason}") from None
        # A pipe has no end to look at, and to rotate /dev/stderr would rename the system's
        self._is_file = os.path.isfile(path) and not self._path.startswith(("/dev/", "/proc/"))

    def write(self, data: bytes, level: str) -> None:
        """Append whole lines. Raises OSError."""
        self.tend()
        size = self._status().st_size                   # not tell(): others may have emptied the file
        if self._is_file and size and size + len(data) > self._max_bytes:
            self._rotate()
            size = self._status().st_size
        try:
            _write_all(self._file.write, data)
        except OSError:
            with contextlib.suppress(OSError):          # half a line would join the next one
                self._file.truncate(size)
            raise

    def tend(self) -> None:
        """Have a file open that has our name: ours may have been renamed or removed. Raises OSError."""
        now = time.monotonic()
        if self._file is not None and self._is_file and now >= self._look_at:
            self._look_at = now + LOG_LOOK_SECONDS      # first, so that no reopen() is lost
            if self._has_lost_its_name():
                self.close()
        if self._file is None:
            self._file = _open_log(self._path)

    def reopen(self) -> None:
        """Look at once whether the file still has its name. May be called in a signal handler."""
        self._look_at = 0.0

    def _has_lost_its_name(self) -> bool:
        try:
            return not os.path.samestat(os.stat(self._path), self._status())
        except (FileNotFoundError, NotADirectoryError):
            return True

    def _status(self) -> os.stat_result:
        return os.fstat(self._file.fileno())

    def _rotate(self) -> None:
        """Rename, the oldest first, or go on with the same file: a long log is better than none."""
        names = [self._path] + [f"{self._path}.{number}" for number in range(1, self._backups + 1)]
        self.close()                                    # Windows renames no open file
        with contextlib.suppress(OSError):
            for newer, older in reversed(list(zip(names, names[1:]))):
                if os.path.exists(newer):
                    os.replace(newer, older)
        self.tend()

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


class StreamSink(Sink):
    """Log lines to stderr, past Python's own buffers."""

    def __init__(self) -> None:
        self._stream = sys.stderr
        self._torn = b""                # a line end, when the last write broke off somewhere in a line

    def write(self, data: bytes, level: str) -> None:
        """Write whole lines. Raises OSError."""
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError, AttributeError):   # replaced by a program that embeds us, or none at all
            if self._stream is not None:
                self._stream.write(data.decode())
            return
        torn, self._torn = self._torn, b"\n"
        _write_all(lambda rest: os.write(descriptor, rest), torn + data)
        self._torn = b""


class LoggerSink(Sink):
    """Log lines to a logging.Logger of the program that embeds us, which adds its own time and level."""

    most = 0                            # one line a call

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def write(self, data: bytes, level: str) -> None:
        """One record a call; its message is ours without time, name and level."""
        self._logger.log(LEVELS[level], "%s", data.decode().rstrip("\n"))


def _write_all(write: Callable[[bytes], Optional[int]], data: bytes) -> None:
    while data:
        data = data[write(data) or 0:]


class Log:
    """Lines are made by whoever has something to say, queued, and written by a thread of the log's own.

    Nothing that happens to the sink ever stops or delays anybody else.
    """

    def __init__(self, sink: Sink, level: str = "INFO", mode: str = "redacted") -> None:
        """`level` is the lowest that is logged. `mode` is a Redactor's: `full` has texts of exceptions."""
        self._lowest = LEVELS[level]
        self._texts_of_exceptions = mode == "full"
        self._sink = sink
        self._has_time = not isinstance(sink, LoggerSink)
        self._second = PerSecond(lambda second: time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second)))
        self._frames: dict = {}         # see _frame
        self._queue: deque = deque()    # (level, line)
        # Characters queued or being written. Counted without a lock, so one may be missed in a great while,
        # and put right whenever the queue is empty
        self._waiting = 0
        self._dropped = 0               # lines not written since the last notice
        self._why = ""                  # ... and the reason, also of trouble that has cost no line yet
        self._dropping = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhook-log", daemon=True)

    def start(self) -> None:
        """Start writing. What is queued is written when the interpreter ends, too."""
        self._thread.start()
        atexit.register(self._flush)    # keeps nothing alive that its own thread does not

    def stop(self) -> None:
        """Write what is queued, within LOG_FLUSH_SECONDS, and close."""
        self._stop.set()
        atexit.unregister(self._flush)
        if self._thread.ident is not None:
            self._thread.join(LOG_FLUSH_SECONDS)
        if not self._thread.is_alive():
            self._sink.close()

    def _flush(self) -> None:
        """Wait until all that is queued is written: the log's thread will end with the interpreter."""
        deadline = time.monotonic() + LOG_FLUSH_SECONDS
        while (self._queue or self._waiting) and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)

    def reopen(self) -> None:
        """The log file was renamed or made anew (SIGHUP says so): look at once. Never blocks."""
        self._sink.reopen()

    def trouble(self) -> str:
        """"" or, for /health, what keeps lines from being written."""
        if self._dropped:
            return f"{self._dropped} log lines were dropped: {self._why}"
        return self._why

    # -- making lines, on any thread

    def request(self, level: str, moment: float, request_id: str, method: str, route: str, status: int,
                note: str, event_id: Optional[int], seconds: float, address: str, payload: str = "") -> None:
        """Queue the line of one request that came at `moment` and took `seconds`. Hot path: 2 us.

        `route` is a route's pattern or "-", `note` has nothing of the sender's, `payload` is a Redactor's.
        """
        if LEVELS[level] < self._lowest:
            return
        try:
            before, after = self._frames[method, route, status, note, address]
        except KeyError:
            before, after = self._frame(method, route, status, note, address)
        if event_id is not None:
            before = f"{before} event_id={event_id}"
        if payload:
            after = f"{after} payload={payload}"
        self._queue_line(level, moment, f"[{request_id}{before} {seconds * 1000:.1f}{after}\n")

    def line(self, level: str, message: str, request_id: str = "-", stack: str = "") -> None:
        """Queue one line; `stack` follows it, indented so that it cannot pass for a line of its own."""
        if LEVELS[level] >= self._lowest:
            lines = [f"[{request_id}] {printable(message, 2000)}"]
            lines += ["    " + printable(extra, 2000) for extra in stack.splitlines()]
            self._queue_line(level, time.time(), "\n".join(lines) + "\n")

    def exception(self, message: str, request_id: str = "-", error: Optional[BaseException] = None) -> None:
        """Queue an ERROR with the stack of `error`, or of the exception being handled."""
        if error is None:
            error = sys.exc_info()[1]
        if self._texts_of_exceptions:
            stack = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        else:
            stack = _stack_without_texts(error)
        self.line(ERROR, message, request_id, stack)

    def _frame(self, *parts: Any) -> tuple:
        """What stands in a line before and after the duration, in printable characters only.

        Kept, as most requests have the same.
        """
        method, route, status, note, address = (printable(str(part), 1000) for part in parts)
        frame = f"] {method} {route} {status} {note}", f"ms client={address}"
        if len(self._frames) >= FRAMES_KEPT:
            self._frames.clear()
        self._frames[parts] = frame
        return frame

    def _dated(self, level: str, moment: float, text: str) -> str:
        if not self._has_time:
            return text
        second = int(moment)
        return f"{self._second.text(second)},{int((moment - second) * 1000):03d} - webhook - {level} - {text}"

    def _queue_line(self, level: str, moment: float, text: str) -> None:
        text = self._dated(level, moment, text)
        length = len(text)
        if self._waiting + length <= LOG_BYTES and len(self._queue) < LOG_LINES:
            self._waiting += length
            self._queue.append((level, text))
        else:
            self._drop(1, "the queue was full")

    def _drop(self, lines: int, why: str) -> None:
        with self._dropping:
            self._dropped += lines
            self._why = why

    # -- writing them, on the log's thread

    def _run(self) -> None:
        while not self._stop.wait(LOG_PAUSE):
            self._write_queued()
        self._write_queued()

    def _write_queued(self) -> None:
        queue = self._queue
        self._write(INFO, [])
        while queue:
            level, text = queue.popleft()
            texts, size = [text], len(text)
            while queue and size + len(queue[0][1]) <= self._sink.most:
                texts.append(queue.popleft()[1])
                size += len(texts[-1])
            self._write(level, texts)
            self._waiting -= size
        self._waiting = 0

    def _write(self, level: str, texts: list) -> None:
        """Say what was dropped, then write lines; without lines, see whether the sink is well again."""
        try:
            self._sink.tend()
            self._tell_dropped()
            if texts:
                self._sink.write("".join(texts).encode("utf-8", "backslashreplace"), level)
        except BaseException as error:  # a closed pipe, a full disk, or foreign code that calls sys.exit()
            self._drop(len(texts), _reason_without_text(error))
            if self._stop.is_set():     # the last look: do not try 20,000 times
                self._queue.clear()

    def _tell_dropped(self) -> None:
        dropped, why = self._dropped, self._why
        if dropped:
            notice = self._dated(WARNING, time.time(), f"[-] {dropped} log lines were dropped: {why}\n")
            self._sink.write(notice.encode(), WARNING)
        if why:
            with self._dropping:
                self._dropped -= dropped
                if not self._dropped:
                    self._why = ""


def _stack_without_texts(error: Optional[BaseException]) -> str:
    """Types and stack frames of an exception and of all that it came of: texts may quote a person's data."""
    waiting, seen, text = [error], set(), ""
    while waiting:
        error = waiting.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        text += "Caused by:\nTraceback (most recent call last):\n"
        text += "".join(traceback.format_tb(error.__traceback__))
        text += f"{type(error).__module__}.{type(error).__qualname__}\n".replace("builtins.", "", 1)
        if isinstance(error, EXCEPTION_GROUP):
            waiting += error.exceptions
        waiting.append(error.__cause__)
        if not error.__suppress_context__:
            waiting.append(error.__context__)
    return text.replace("Caused by:\n", "", 1)


def _reason_without_text(error: BaseException) -> str:
    """What the system calls the error, such as No space left on device, or its type."""
    number = getattr(error, "errno", None)
    if isinstance(number, int) and number in errno.errorcode:
        return os.strerror(number)
    return type(error).__name__


# =============================================================================
# HTTP: bytes to a head and a body, an answer to bytes. Knows no socket, no thread and no route.
# =============================================================================

REASONS = {200: "OK", 204: "No Content", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden",
           404: "Not Found", 405: "Method Not Allowed", 406: "Not Acceptable", 408: "Request Timeout",
           409: "Conflict", 411: "Length Required", 413: "Payload Too Large", 414: "URI Too Long",
           415: "Unsupported Media Type", 417: "Expectation Failed", 429: "Too Many Requests",
           431: "Request Header Fields Too Large", 500: "Server Error", 501: "Not Implemented", 503: "Service Unavailable", 505: "HTTP Version Not Supported"}
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
RETRY_AFTER = {"Retry-After": "1"}

# RFC 9110 section 5.6.2 and RFC 9112 sections 3 and 5, byte for byte: no folding, no space before the colon,
# no bare CR or LF, no control but TAB in a value. A head is read as latin-1, so that a byte is a character.
_TCHAR = "[!#$%&'*+.^_`|~0-9A-Za-z-]"
_VALUE = "[\t\x20-\x7e\x80-\xff]*"
_REQUEST_LINE = re.compile(f"({_TCHAR}+) ([\x21-\x7e]+) HTTP/([0-9])\\.([0-9])")
# White space around a value is stripped afterwards: in the pattern it would cost the square of 16,000 spaces.
# The second branch swallows all that follows a line which is no field: else findall would try again at every
# character of it.
_FIELDS = re.compile(f"({_TCHAR}+):({_VALUE})\r\n|(.+)", re.DOTALL)
_TRAILER_LINE = re.compile(f"{_TCHAR}+:{_VALUE}".encode("latin-1"))
_BEGINS_LIKE_A_METHOD = re.compile(_TCHAR.encode())
_BARE_LF = re.compile(rb"(?<!\r)\n")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::[0-9]*)?")
_ABSOLUTE = re.compile(r"https?://([^/?#@]+)(/[^#]*|\?[^#]*)?", re.IGNORECASE)
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")
_EMPTY_LINES = re.compile(rb"(?:\r\n)*")
LONGEST_CHUNK_LINE = 256
_WEIGHT = re.compile(r"0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?")         # RFC 9110 section 12.4.2
_WHERE_READERS_DISAGREE = ("host", "content-length", "transfer-encoding")


class Refusal(Exception):
    """What a sender did wrong or cannot have now, as it is answered: a status, a message, further members and
    fields.

    What the sender wrote never stands in `message` itself: it fills the holes {} of it, out of `quoted`, in
    the answer; the log gets `note`, which has three dots in their place. `close`: the rest of the connection
    has not been read.
    """
    close = False

    def __init__(self, status: int, message: str, *quoted: str, note: str = "", close: bool = False,
                 fields: Optional[dict] = None, **members: Any) -> None:
        super().__init__(status)
        self.status, self.fields, self.members = status, fields or {}, members
        self.message, self.note = message, note or message
        if quoted:
            self.message = message.format(*(printable(text, 100) for text in quoted))
            self.note = message.format(*["..."] * len(quoted))
        if close:
            self.close = True


class Malformed(Refusal):
    """A request that cannot be read: nobody knows where the next one would begin, so the connection ends."""
    close = True


class Busy(Refusal):
    """A 503 because too much is under way: the sender's affair, and no trouble of ours."""

    def __init__(self, message: str, close: bool = False) -> None:
        super().__init__(503, message, close=close, fields=RETRY_AFTER)


class Limits(NamedTuple):
    """How much of a request is read: bytes, and a number of header fields."""
    request_line: int
    header_bytes: int
    header_fields: int
    body: int


class Head:
    """What the request line and the fields of a request say; of one that could not be read, what could."""
    method = target = path = "-"
    query = ""
    http11 = True
    host = ""                           # in lower case, without its port
    length: Optional[int] = None        # of the body, in bytes; None where no length is given
    chunked = keep_alive = expect_continue = False

    def __init__(self) -> None:
        self.fields: dict = {}

    def get(self, name: str, default: str = "") -> str:
        """The value of a field by its lower-case name; the values of a repeated one joined by commas."""
        return self.fields.get(name, default)


def find_head(buffer: bytes, limits: Limits) -> int:
    """Where the head in `buffer` ends, behind its empty line; -1 while more is needed. Raises Malformed."""
    end = buffer.find(b"\r\n\r\n")
    line = buffer.find(b"\r\n", 0, limits.request_line + 2)
    if line < 0 and len(buffer) > limits.request_line + 1:             # its LF may be still to come
        raise Malformed(414, f"The request line is longer than {limits.request_line} bytes")
    # From the line's CR LF on; as long as the end has not come, all but one byte of it may be there
    last = end if end >= 0 else len(buffer) - 3
    if 0 <= line < last - limits.header_bytes - 2:
        raise Malformed(431, f"The header section is longer than {limits.header_bytes} bytes")
    if end >= 0:
        return end + 4
    if buffer and buffer[0] != 13 and not _BEGINS_LIKE_A_METHOD.match(buffer):
        if buffer[0] == 0x16:
            raise Malformed(400, "This is not HTTP, it looks like TLS: use http://")
        raise Malformed(400, "This is not HTTP")
    if _BARE_LF.search(buffer) or b"\0" in buffer:
        raise Malformed(400, "Lines must end with CR LF and hold no NUL")
    return -1


def parse_head(data: bytes, head: Head, limits: Limits) -> None:
    """Fill `head` from complete bytes (RFC 9112), the empty line included. Raises Refusal; `head` then says
    what was understood before."""
    line, _, rest = data[:-2].decode("latin-1").partition("\r\n")
    _parse_request_line(line, head)
    _parse_fields(rest, head, limits)
    _parse_framing(head, limits)
    _parse_connection(head)
    _parse_host(head)


def _parse_request_line(line: str, head: Head) -> None:
    match = _REQUEST_LINE.fullmatch(line)
    if not match:
        raise Malformed(400, "The request line is not 'METHOD /path HTTP/1.1'")
    method, target, major, minor = match.groups()
    if major != "1":
        raise Malformed(505, "Only HTTP/1.0 and HTTP/1.1 are spoken here")
    head.method, head.target, head.http11 = method, target, minor != "0"
    if target[0] != "/" and not (method == "OPTIONS" and target == "*"):
        absolute = _ABSOLUTE.fullmatch(target)          # section 3.2.2
        if not absolute:
            raise Malformed(400, "The request target must be a path")
        head.host, target = absolute.group(1), absolute.group(2) or "/"
        if target[0] != "/":
            target = "/" + target
    if "#" in target or "%" in target and _BAD_PERCENT(target):
        raise Malformed(400, "The request target is not a valid path: '%' must be followed by two hex "
                             "digits, and '#' has no place in it")
    head.path, _, head.query = target.partition("?")


def _parse_fields(lines: str, head: Head, limits: Limits) -> None:
    """Hot path, where heads differ: one findall over all fields (5 against 12 us for a head of eight)."""
    found = _FIELDS.findall(lines)
    if len(found) > limits.header_fields:
        raise Malformed(431, f"More than {limits.header_fields} header fields")
    if found and found[-1][2]:
        raise Malformed(400, "A header line is not 'name: value'")
    fields = head.fields = {name.lower(): value.strip(" \t") for name, value, _ in found}
    if len(fields) < len(found):
        fields.clear()
        for name, value, _ in found:
            name, value = name.lower(), value.strip(" \t")
            if name in fields:
                if name in _WHERE_READERS_DISAGREE:
                    raise Malformed(400, f"More than one {name} header")
                value = fields[name] + ", " + value
            fields[name] = value


def _parse_framing(head: Head, limits: Limits) -> None:
    """Length of the body (RFC 9112 section 6). Where readers may disagree on it smuggling begins: refuse."""
    length, coding = head.fields.get("content-length"), head.fields.get("transfer-encoding")
    if coding is not None:
        if length is not None:
            raise Malformed(400, "Both Content-Length and Transfer-Encoding")
        if not head.http11:
            raise Malformed(400, "Transfer-Encoding in HTTP/1.0")
        if coding.lower() != "chunked":
            raise Malformed(501, "The only Transfer-Encoding known here is chunked")
        head.chunked = True
    elif length is not None:
        if not (length.isdigit() and length.isascii()):
            raise Malformed(400, "Content-Length must be digits only")
        head.length = int(length.lstrip("0")[:20] or 0)
        if head.length > limits.body:
            raise Malformed(413, f"The body is longer than {limits.body} bytes")


def _parse_connection(head: Head) -> None:
    """Whether more requests may follow (RFC 9112 section 9.3), and whether the sender waits for our 100 (RFC
    9110 section 10.1.1)."""
    head.keep_alive = head.http11
    if "connection" in head.fields:
        options = {option.strip().lower() for option in head.fields["connection"].split(",")}
        head.keep_alive = "close" not in options and (head.http11 or "keep-alive" in options)
    if "expect" in head.fields:
        head.expect_continue = head.http11
        if head.fields["expect"].lower() != "100-continue":
            raise Malformed(417, "The only expectation known here is 100-continue")


def _parse_host(head: Head) -> None:
    host = head.fields.get("host", "")
    if "host" not in head.fields and head.http11:
        raise Malformed(400, "The Host header is missing")
    if head.host and _HOST.fullmatch(host):
        host = head.fields["host"] = head.host  # RFC 9112 section 3.2.2: an absolute target goes before it
    match = _HOST.fullmatch(host)
    if not match or host and not match.group(1):        # RFC 9110 section 4.2.1: an http URI has a host
        raise Malformed(400, "The Host header is not valid")
    head.host = match.group(1).lower()


class ChunkedBody:
    """Decoder of a chunked body (RFC 9112 section 7.1): feed() bytes until `rest`, what follows, is there."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._buffer = bytearray()
        self._awaited = 0               # bytes of the current chunk with its CR LF; 0: a line is next
        self._in_trailer = False
        self._trailer = 0
        self.body = bytearray()
        self.rest: Optional[bytes] = None

    @property
    def kept(self) -> int:
        """How many bytes it holds: of the body, and of what is not decoded yet."""
        return len(self.body) + len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Take more bytes. Raises Malformed (400, 413, 431)."""
        buffer, at = self._buffer, 0
        buffer += data
        while self.rest is None:
            if self._awaited:
                end = at + self._awaited
                if len(buffer) < end:
                    break
                if buffer[end - 2:end] != b"\r\n":
                    raise Malformed(400, "A chunk of the body does not end with CR LF")
                self.body += buffer[at:end - 2]
                at, self._awaited = end, 0
                continue
            end = buffer.find(b"\r\n", at, at + LONGEST_CHUNK_LINE + 2)
            if end < 0:
                # its LF may be still to come
                if len(buffer) - at > LONGEST_CHUNK_LINE + 1 or b"\n" in buffer[at:]:
                    raise Malformed(400, "A line of the chunked body is too long or does not end with CR LF")
                break
            line, at = bytes(buffer[at:end]), end + 2
            if self._in_trailer:
                if not self._trailer_line(line):
                    self.rest, at = bytes(buffer[at:]), len(buffer)
            else:
                self._size_line(line)
        del buffer[:at]

    def _size_line(self, line: bytes) -> None:
        match = _CHUNK_SIZE.fullmatch(line)
        if not match:
            raise Malformed(400, "A chunk size of the body is not well-formed")
        size = int(match.group(1), 16)
        if len(self.body) + size > self._limits.body:
            raise Malformed(413, f"The body is longer than {self._limits.body} bytes")
        self._in_trailer = not size
        if size:
            self._awaited = size + 2

    def _trailer_line(self, line: bytes) -> bool:
        """Check one line; False for the empty one that ends the body. Trailers are not used for anything."""
        self._trailer += len(line) + 2
        if self._trailer > self._limits.header_bytes:
            raise Malformed(431, "The trailer section is too long")
        if line and not _TRAILER_LINE.fullmatch(line):
            raise Malformed(400, "A trailer line is not 'name: value'")
        return bool(line)


def query_pairs(query: str) -> Iterator[tuple]:
    """(name, value) of each parameter in a query string. Raises Refusal where it is not UTF-8."""
    for pair in filter(None, query.split("&")):
        name, _, value = pair.partition("=")
        try:
            name, value = (unquote_to_bytes(part.replace("+", " ")).decode() for part in (name, value))
        except UnicodeDecodeError:
            raise Refusal(400, "The query is not UTF-8") from None
        yield name, value


def parse_query(query: str, known: Iterable) -> dict:
    """Parameters of a query string, each at most once. Raises Refusal that names the wrong one."""
    values: dict = {}
    for name, value in query_pairs(query):
        if name not in known:
            raise Refusal(400, f"Unknown filter {{}}; known are {', '.join(known)}", name)
        if name in values:
            raise Refusal(400, f"Filter {name} is given twice")
        if not value or "\0" in value:
            raise Refusal(400, f"Filter {name} must not be empty or hold U+0000")
        values[name] = value
    return values


def wanted_type(accept: str, offered: Iterable) -> Optional[str]:
    """The media type that an Accept header likes best (RFC 9110 section 12.5.1); None if it takes none."""
    weights: dict = {}
    for part in (accept or "*/*").lower().split(","):
        pattern, *parameters = (piece.strip() for piece in part.split(";"))
        weight = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        weights.setdefault(pattern, float(weight) if _WEIGHT.fullmatch(weight) else 0.0)
    best, best_rank = None, (0.0, 0)
    for media_type in offered:
        patterns = ("*/*", media_type.partition("/")[0] + "/*", media_type)
        closeness = max((at for at, pattern in enumerate(patterns) if pattern in weights), default=0)
        rank = (weights.get(patterns[closeness], 0.0), closeness)
        if rank[0] and rank > best_rank:                # the closest pattern decides, also where it says no
            best, best_rank = media_type, rank
    return best


class Response:
    """An answer: status, body (bytes, or an iterator of them to be streamed) and what the log notes of it."""
    __slots__ = ("status", "body", "content_type", "fields", "note", "event_id", "close", "level")

    def __init__(self, status: int, body: Any, content_type: str = "application/json",
                 fields: Optional[dict] = None, note: str = "ok", event_id: Optional[int] = None,
                 close: bool = False) -> None:
        self.status, self.body, self.content_type, self.fields = status, body, content_type, fields or {}
        self.note, self.event_id, self.close = note, event_id, close
        self.level = level_of(status)

    @property
    def streamed(self) -> bool:
        """Whether the body is made while it is sent."""
        return not isinstance(self.body, bytes)


def level_of(status: int) -> str:
    """How loud the log is about an answer: what is ours to mend is an ERROR."""
    if status < 400:
        return "INFO"
    return "ERROR" if status in (500, 503) else "WARNING"          # a 501 or 505 is the sender's fault


def json_response(document: dict, status: int = 200, **parts: Any) -> Response:
    """A Response with `document` as its JSON body; `parts` as Response has them."""
    return Response(status, json.dumps(document, allow_nan=False).encode(), **parts)


def encode(response: Response, head: Head, request_id: str, date: str, fields: dict, close: bool) -> bytes:
    """The bytes of an answer to the request with `head`; with its body, if not streamed or not wanted."""
    lines = [f"HTTP/1.1 {response.status} {REASONS[response.status]}", "Server: webhook-server",
             f"Date: {date}"]
    if response.status != 204:
        lines.append(f"Content-Type: {response.content_type}")
        if not response.streamed:
            lines.append(f"Content-Length: {len(response.body)}")
        elif head.http11:
            lines.append("Transfer-Encoding: chunked")
    lines += [f"X-Request-ID: {request_id}", "X-Content-Type-Options: nosniff", "Cache-Control: no-store"]
    lines += [f"{name}: {value}" for name, value in {**response.fields, **fields}.items()]
    if close:
        lines.append("Connection: close")
    elif not head.http11:
        lines.append("Connection: keep-alive")
    data = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")
    if response.streamed or head.method == "HEAD":
        return data
    return data + response.body


def http_date(seconds: int) -> str:
    """Seconds since 1970 as a Date header (RFC 9110 section 5.6.7)."""
    return email.utils.formatdate(seconds, usegmt=True)


class RequestIds:
    """Ids of requests: UTC with microseconds, strictly increasing, so unique and sortable in a process."""

    def __init__(self, now: Callable[[], int] = time.time_ns) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._last = 0
        self._second = -1000000         # where the current second starts, in microseconds
        self._prefix = ""

    def next(self) -> tuple:
        """(id, time of receipt), such as 2025-01-10T14:23:15.123456 and the same with Z.

        The id runs ahead of the time where the clock was set back: it has to be sortable, and the time to be
        true. Hot path: the text of the current second is kept (0.5 against 1.1 us).
        """
        now = self._now() // 1000
        with self._lock:
            number = self._last = max(now, self._last + 1)
            micros = number - self._second
            if micros >= 1000000:
                micros = number % 1000000
                self._second = number - micros
                self._prefix = utc_seconds(number // 1000000)
            text = f"{self._prefix}.{micros:06d}"
        if number - now < 1000000:
            return text, text + "Z"
        return text, f"{utc_seconds(now // 1000000)}.{now % 1000000:06d}Z"


def utc_seconds(seconds: int) -> str:
    """Seconds since 1970 as 2025-01-10T14:23:15."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


# =============================================================================
# Credentials: does a signature or a token prove what it says? Knows no clients and no roles.
# =============================================================================

# -- signatures over the body

# How known senders sign, by HMAC-SHA-256 always: rows of the parameters that an entry can also set itself.
# Between several signatures stands `separator`, before each `prefix` (one of another version or algorithm is
# skipped), and before a time (Unix seconds) in the same header `timestamp_prefix`. Sources: the Standard
# Webhooks specification (v1a is Ed25519), W3C WebSub section 8 (whose sha1 is broken), the senders' pages.
SIGNATURE_PROFILES = {
    "standard": {"header": "webhook-signature", "id_header": "webhook-id",
                 "timestamp_header": "webhook-timestamp", "separator": " ", "prefix": "v1,",
                 "encoding": "base64", "template": "{id}.{timestamp}.{body}", "key": "whsec"},
    "github": {"header": "x-hub-signature-256", "prefix": "sha256=", "encoding": "hex", "template": "{body}"},
    "websub": {"header": "x-hub-signature", "prefix": "sha256=", "encoding": "hex", "template": "{body}"},
    "stripe": {"header": "stripe-signature", "separator": ",", "prefix": "v1=", "timestamp_prefix": "t=",
               "encoding": "hex", "template": "{timestamp}.{body}"},
    "zocdoc": {"header": "webhook-signature", "timestamp_header": "webhook-timestamp", "separator": ";",
               "prefix": ("v1:", "v2:"), "encoding": "base64", "template": "{timestamp}.{body}",
               "key": "base64"},
    "acuity": {"header": "x-acuity-signature", "encoding": "base64", "template": "{body}"},
    "calcom": {"header": "x-cal-signature-256", "encoding": "hex", "template": "{body}"},
}
_UNLESS_SET = {"id_header": "", "timestamp_header": "", "separator": "", "prefix": "", "timestamp_prefix": "",
               "key": "raw", "tolerance": 300}          # seconds: what the libraries of Stripe and Svix take
_FILLS = {"id_header": "id", "timestamp_header": "timestamp", "timestamp_prefix": "timestamp",
          "tolerance": "timestamp"}                     # the hole of a template that a parameter is for
_HOLE = re.compile(r"\{(\w*)\}")
# A rotation sends two or three. Without an end, 16 KiB of them would be compared with each secret
MOST_SIGNATURES = 16
LONGEST_TIMESTAMP = 12                  # digits; 13 are milliseconds
UNREADABLE = "the signature header cannot be read"

_FIELD_NAME = {"type": "string", "pattern": "^[0-9A-Za-z_-]{1,100}$"}
_BEFORE_VALUE = {"type": "string", "pattern": "^[ -~]{0,50}$"}
SIGNATURE_SCHEMA = {
    "type": "object", "required": ["secrets"], "additionalProperties": False,
    "properties": {
        "profile": {"enum": list(SIGNATURE_PROFILES)},
        "secrets": {"type": "array", "minItems": 1, "maxItems": 100, "uniqueItems": True,
                    "items": {"type": "string", "minLength": 1, "maxLength": 1000}},
        "header": _FIELD_NAME, "id_header": _FIELD_NAME, "timestamp_header": _FIELD_NAME,
        "separator": {"type": "string", "pattern": "^[^0-9A-Za-z+/=]{1,10}$"},      # nothing of a digest
        "prefix": _BEFORE_VALUE, "timestamp_prefix": {**_BEFORE_VALUE, "minLength": 1},
        "encoding": {"enum": ["hex", "base64"]},
        "template": {"type": "string", "maxLength": 200, "pattern": "^[\\x00-\\x7f]*$"},
        "key": {"enum": ["raw", "base64", "hex", "whsec"]},
        # A retry is signed anew by all of them; a week is for a sender that signs only once
        "tolerance": {"type": "integer", "minimum": 1, "maximum": 7 * 86400},
    },
}


def _base64_bytes(text: str) -> bytes:
    """What a secret in base64 means: padding may lack, unused bits be set (as in Zocdoc's example key)."""
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


# Length of an encoded digest, its encoder, and what makes equal the spellings that are. Texts are compared,
# so that no second one in base64 (unused bits, spaces, no padding) is the same signature; all of these pad.
_ENCODINGS = {"hex": (64, bytes.hex, str.lower),
              "base64": (44, lambda digest: base64.b64encode(digest).decode(), str)}
# How a secret becomes the key, and what it has to be. Standard Webhooks' own libraries take a bare base64 too
_KEYS = {"raw": (str.encode, "Unicode"), "base64": (_base64_bytes, "base64"),
         "hex": (binascii.unhexlify, "hex digits"),
         "whsec": (lambda text: _base64_bytes(text.removeprefix("whsec_")), "whsec_ and base64")}


def _keyed(secret: str, kind: str, place: str) -> Any:
    """An HMAC with the key that a secret stands for. Raises ValueError, which does not repeat the secret."""
    decode, form = _KEYS[kind]
    try:
        key = decode(secret)
    except ValueError:
        raise ValueError(f"{place}: must be {form}") from None
    if not key:
        raise ValueError(f"{place}: must not be an empty key")
    return hmac.new(key, digestmod="sha256")


def _completed(settings: dict) -> dict:
    """`settings` with profile and defaults. Raises ValueError for what the schema cannot say of them."""
    whole = {**_UNLESS_SET, **SIGNATURE_PROFILES.get(settings.get("profile"), {}), **settings}
    for name in ("header", "encoding", "template"):
        if name not in whole:
            raise ValueError(f"/{name}: is missing; a profile, or header, encoding and template are needed")
    holes = _HOLE.findall(whole["template"])
    whole.update((name, "") for name, hole in _FILLS.items() if hole not in holes and name not in settings)
    times = [name for name in ("timestamp_header", "timestamp_prefix") if whole[name]]
    known = {"id", "timestamp", "body"}
    rules = [("template", known.issuperset(holes), "knows {id}, {timestamp} and {body} only"),
             ("template", holes.count("body") == 1, "must have {body}, once"),
             *((name, not whole[name] or hole in holes, f"has no use: {{{hole}}} is not in the template")
               for name, hole in _FILLS.items()),       # would look safer than it is
             ("template", "id" not in holes or whole["id_header"], "{id} needs id_header"),
             ("template", "timestamp" not in holes or times,
              "{timestamp} needs timestamp_header or timestamp_prefix"),
             ("timestamp_header", len(times) < 2, "the time stands behind timestamp_prefix already"),
             ("timestamp_prefix", not whole["timestamp_prefix"] or whole["separator"], "needs a separator"),
             ("prefix", not whole["separator"] or whole["separator"] not in whole["prefix"],
              "must not hold the separator")]
    for name, holds, message in rules:
        if not holds:
            raise ValueError(f"/{name}: {message}")
    return whole


class SignatureScheme:
    """How one client signs its bodies. Nothing in it changes once it is made, so threads may share it.

    A signature proves a body (and id and time, where they are signed), not what was asked for: whoever uses
    it has to take it for posting only.
    """

    def __init__(self, settings: dict) -> None:
        """Of `settings` that are valid by SIGNATURE_SCHEMA. Raises ValueError for what that cannot say: its
        text begins with the place in them (JSON Pointer), and never repeats a secret."""
        whole = _completed(settings)
        self._length, self._encode, self._fold = _ENCODINGS[whole["encoding"]]
        self._separator, self._prefixes = whole["separator"], whole["prefix"]
        if isinstance(self._prefixes, str):
            self._prefixes = (self._prefixes,)
        self._timestamp_prefix, self._tolerance = whole["timestamp_prefix"], whole["tolerance"]
        self._names = tuple(whole[name].lower() for name in ("header", "id_header", "timestamp_header"))
        self._other_names = self._names
        if settings.get("profile") == "standard":       # Svix, where it comes from, sends names of its own
            self._other_names = tuple(name.replace("webhook-", "svix-", 1) for name in self._names)
        # For the % operator, which fills all holes at once: a value that looks like a hole stays as it is
        self._before, self._after = (_HOLE.sub(r"%(\1)s", part.replace("%", "%%"))
                                     for part in whole["template"].split("{body}"))
        # Keyed once, copied for each request: hmac.digest() takes 1.5 times as long, and gives the
        # interpreter's lock away in each call (a fifth of the requests per second)
        self._keyed = [_keyed(secret, whole["key"], f"/secrets/{at}")
                       for at, secret in enumerate(whole["secrets"])]

    def fingerprints(self) -> list:
        """A digest for each secret: equal where the keys are, however they are written."""
        return [keyed.digest() for keyed in self._keyed]

    def is_shown(self, head: Head) -> bool:
        """Whether a request has the header of such a signature, be it empty or garbage."""
        return self._names[0] in head.fields or self._other_names[0] in head.fields

    def problem(self, head: Head, body: bytes, now: float) -> str:
        """Why no signature in `head` proves `body` at `now` (Unix seconds), without anything that the sender
        wrote; "" where one does. Hot path, as each head is new: 3 us for a body of 300 bytes."""
        fields, names = head.fields, self._names
        if names[0] not in fields and self._other_names[0] in fields:
            names = self._other_names
        for name in names:
            if name and not fields.get(name):
                return f"{name} is missing"
        header, id_header, timestamp_header = names
        pieces = self._split(fields[header])
        candidates = self._candidates(pieces)
        if not candidates:
            return UNREADABLE
        values = {"id": fields.get(id_header), "timestamp": fields.get(timestamp_header)}
        prefix = self._timestamp_prefix
        if prefix:                              # of two times comes what cannot be read as one
            values["timestamp"] = ",".join(piece[len(prefix):] for piece in pieces if piece.startswith(prefix))
        if values["timestamp"] is not None:
            problem = self._problem_of_time(values["timestamp"], now)
            if problem:
                return problem
        data = (self._before % values).encode("latin-1") + body + (self._after % values).encode("latin-1")
        return "" if self._fits(candidates, data) else "no signature fits"

    def _split(self, value: str) -> list:
        """What stands between separators. Of a header that is there twice, joined to one by ", ", nothing: no
        sender sends two, so somebody on the way added one, and another reader may look at the other one."""
        if not self._separator:
            return [value]
        if ", " in value and ", " not in self._separator:
            return []
        return value.split(self._separator, MOST_SIGNATURES)[:MOST_SIGNATURES]

    def _candidates(self, pieces: list) -> list:
        """The encoded digests among `pieces`: ASCII, as compare_digest() asks of texts."""
        length, prefixes = self._length, self._prefixes
        return [self._fold(piece[-length:]) for piece in pieces
                if len(piece) >= length and piece[:-length] in prefixes and piece.isascii()]

    def _problem_of_time(self, text: str, now: float) -> str:
        if len(text) > LONGEST_TIMESTAMP or not (text.isascii() and text.isdigit()):
            return "the timestamp cannot be read"
        age = now - int(text)
        if age > self._tolerance:
            return f"the timestamp is {math.ceil(age)} s old"
        if -age > self._tolerance:
            return f"the timestamp is {math.ceil(-age)} s ahead"
        return ""

    def _fits(self, candidates: list, data: bytes) -> bool:
        """Whether one secret gives one of the candidates for `data`. Every pair is compared, also behind one that fits:
        how long it takes says how many there are, and not which."""
        fits = False
        for keyed in self._keyed:
            digest = keyed.copy()
            digest.update(data)
            expected = self._encode(digest.digest())
            for candidate in candidates:
                fits |= hmac.compare_digest(expected, candidate)
        return fits


# -- tokens

KEY_PREFIX = "whk_"             # of the keys that keygen makes; nothing that begins so is a token
LONGEST_TOKEN = 16384           # characters; identity providers stay below 4,000
TOKENS_KEPT = 10000             # what was found about how many of them is remembered, some 500 bytes each
JWKS_SECONDS = 3600.0           # from one fetch of the keys to the next
JWKS_RETRY_SECONDS = 1.0        # after one that failed; the breaker makes it 30 s in the end
NEW_KEY_SECONDS = 60.0          # a fetch for a key that is not known comes this often at most, whoever asks
FETCH_SECONDS, FETCH_BYTES = 5.0, 1024 * 1024           # for a whole answer
ACTIVE_SECONDS, INACTIVE_SECONDS = 60.0, 5.0            # how long an introspection is believed
UNTIL_IT_WORKS = "tokens are answered 503 until it works"
NO_KEYS = "has no key that can check signatures: RSA of 2048 bits or more, P-256, P-384, Ed25519"
_ADDRESS = re.compile('[!$-~]+')         # printable ASCII without " and #

_NOT_EMPTY = {"type": "string", "minLength": 1, "maxLength": 2000}
OAUTH_SCHEMA = {                        # of the member `oauth` of a document that says what a #/$defs/role is
    "type": "object", "required": ["issuer", "audience"], "additionalProperties": False,
    "properties": {
        "issuer": _NOT_EMPTY, "audience": _NOT_EMPTY, "jwks_file": _NOT_EMPTY, "jwks_url": _NOT_EMPTY,
        "introspection_url": _NOT_EMPTY, "client_id": _NOT_EMPTY, "client_secret_file": _NOT_EMPTY,
        "leeway": {"type": "number", "minimum": 0, "maximum": 600},
        "scopes": {"type": "object", "additionalProperties": {"$ref": "#/$defs/role"}},
    },
    "dependentRequired": {"introspection_url": ["client_id", "client_secret_file"],
                          "client_id": ["introspection_url"], "client_secret_file": ["introspection_url"]},
}
DEFAULT_SCOPES = {"appointments:write": "sender", "appointments:read": "reader",
                  "appointments:operate": "operator"}


class MustWait(Exception):
    """Whoever may not wait for the network hands the request over to a thread that may."""


class Verified(NamedTuple):
    """What a good token says: `client_id` and `subject`, "" where it does not, its scopes, and the Unix time
    from which on it has to be looked at anew."""
    client_id: str
    subject: str
    scopes: frozenset
    expires: float


class _Kept:
    """What was found about tokens, each until its time by `clock`. With too many the first ones go."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._found, self._lock = clock, {}, threading.Lock()

    def get(self, digest: bytes) -> Any:
        """What was put, or None."""
        until, what = self._found.get(digest, (0.0, None))
        return what if self._clock() < until else None

    def put(self, digest: bytes, until: float, what: Any) -> None:
        """Keep `what` of the token with this SHA-256 (the token itself is nowhere kept)."""
        with self._lock:
            if len(self._found) >= TOKENS_KEPT:
                del self._found[next(iter(self._found))]
            self._found[digest] = (until, what)


class Remote:
    """JSON from one address, over HTTPS or this machine's HTTP. For any thread; a breaker spares it while it
    fails. Proxies of the environment are not used and redirects not followed: a token or a secret goes to the
    address that the operator gave, or nowhere."""

    def __init__(self, name: str, url: str, tell: Callable[[str, str], Any],
                 ticks: Callable[[], float]) -> None:
        """Raises SetupError, which begins with the place `name`, for an address that cannot be used."""
        self.trouble, self.breaker = "", Breaker(ticks)
        self._where, self._tell, self._lock = f"{name.rpartition('/')[2]} {url}", tell, threading.Lock()
        try:
            self._parts = parts = urlsplit(url)
            self._port = parts.port or {"https": 443, "http": 80}[parts.scheme]
            is_good = parts.hostname and "@" not in parts.netloc and _ADDRESS.fullmatch(url)
        except (ValueError, KeyError):
            is_good = False
        if not is_good:
            raise SetupError(f"{name}: must be an address such as https://idp.example/keys")
        if parts.scheme == "http" and not _is_this_machine(parts.hostname):
            raise SetupError(f"{name}: must be https: on its way it could be read and changed")
        self._connection = http.client.HTTPConnection
        if parts.scheme == "https":
            if ssl is None:
                raise SetupError(f"{name}: this Python lacks ssl of its standard library")
            context = ssl.create_default_context()
            self._connection = functools.partial(http.client.HTTPSConnection, context=context)

    def ask(self, read: Callable[[Any], Any], meanwhile: str, body: Optional[str] = None,
            fields: Optional[dict] = None) -> Any:
        """read(value) of the JSON that it gives; `read` raises ValueError for what makes no sense. Raises
        Refusal 503 when nothing is to be had; `meanwhile` tells the operator what that means."""
        if not self.breaker.allows():
            raise _not_now(self.trouble)
        try:
            result = read(parse_json(self._fetch(body, fields or {}))[0])
        except BaseException as error:                  # whatever it is, the breaker has to hear of its try
            self.breaker.failed()
            trouble = f"{printable(reason_of(error))}; {meanwhile}"
            if self.breaker.state == "open":
                trouble += f"; asked less often after {BREAKER_FAILURES} failures in a row (breaker open)"
            self._report(trouble)
            # A RuntimeError says that the system gives no more threads
            if isinstance(error, (OSError, http.client.HTTPException, ValueError, RuntimeError)):
                raise _not_now(trouble) from None
            raise
        self.breaker.succeeded()
        self._report("")
        return result

    def say(self, level: str, text: str) -> None:
        """Tell the operator something about this address."""
        self._tell(level, f"{self._where}: {text}")

    def _report(self, trouble: str) -> None:
        with self._lock:
            changes, self.trouble = trouble != self.trouble, trouble
            if changes and trouble:
                self.say("ERROR", trouble)
            elif changes:
                self.say("INFO", "answers again")

    def _fetch(self, body: Optional[str], fields: dict) -> bytes:
        """Raises OSError, HTTPException or ValueError."""
        late = threading.Event()
        connection = self._connection(self._parts.hostname, self._port, timeout=FETCH_SECONDS)
        connection.connect()
        # A socket's own time limit begins anew with each byte that comes
        timer = threading.Timer(FETCH_SECONDS, _cut, (connection.sock, late))
        timer.daemon = True
        try:
            timer.start()
            target = self._parts.path or "/"
            if self._parts.query:
                target += "?" + self._parts.query
            fields = {"Accept": "application/json", "Connection": "close", **fields}
            connection.request("GET" if body is None else "POST", target, body, fields)
            response = connection.getresponse()
            if response.status != 200:
                raise ValueError(f"answered {response.status} instead of 200")
            data = response.read(FETCH_BYTES + 1)
        except (OSError, http.client.HTTPException):
            if not late.is_set():
                raise
        finally:
            timer.cancel()
            connection.close()
        if late.is_set():                               # what came may look whole to its reader
            raise TimeoutError(f"no whole answer in {FETCH_SECONDS:g} s")
        if len(data) > FETCH_BYTES:
            raise ValueError(f"answered more than {FETCH_BYTES} bytes")
        return data


def _cut(connection: socket.socket, late: threading.Event) -> None:
    """End a connection on which another thread waits."""
    late.set()
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _not_now(trouble: str) -> Refusal:
    return Refusal(503, "Tokens cannot be checked at the moment", note=trouble, fields=RETRY_AFTER)


# -- tokens: keys

class KeySet:
    """The keys of a JWK Set (RFC 7517 section 5) that can check signatures; others are skipped."""

    def __init__(self, crypto: LibCrypto, document: Any, clock: Callable[[], float]) -> None:
        """Raises ValueError for what is no such set."""
        self.document = document
        self.kept = _Kept(clock)                        # what was found with these keys goes with them
        self._keys: list = []                           # (kid or None, alg or None, PublicKey)
        jwks = document.get("keys") if isinstance(document, dict) else None
        if not isinstance(jwks, list):
            raise ValueError('is no JWK set: {"keys": [...]}')
        for jwk in jwks:
            with contextlib.suppress(ValueError):
                self._keys.append(self._usable(crypto, jwk))
        self.ids = {kid for kid, _, _ in self._keys}

    @staticmethod
    def _usable(crypto: LibCrypto, jwk: Any) -> tuple:
        """Raises ValueError for one that is not for us, or wrong."""
        if not isinstance(jwk, dict):
            raise ValueError("must be an object")
        operations = jwk.get("key_ops", ["verify"])
        if jwk.get("use", "sig") != "sig" or not isinstance(operations, list) or "verify" not in operations:
            raise ValueError("is not for signatures")
        kid = jwk.get("kid")
        return kid if isinstance(kid, str) else None, jwk.get("alg"), PublicKey.from_jwk(crypto, jwk)

    def fitting(self, kid: Optional[str], alg: str) -> list:
        """The keys that a token names. To one that names none there has to be no choice: a single one."""
        kind = JWS_ALGORITHMS[alg][0]
        found = [key for its_kid, its_alg, key in self._keys
                 if kid in (None, its_kid) and its_alg in (None, alg) and key.kind == kind]
        return found if kid is not None or len(found) == 1 else []


class KeyFile:
    """Keys out of a file, read once."""

    def __init__(self, keys: KeySet) -> None:
        self.keys = keys

    def of(self, kid: Optional[str], may_wait: bool) -> KeySet:
        """The key set in which to look for a key."""
        return self.keys


class KeyFetcher:
    """Keys from an address, fetched by a thread of its own: at start, every hour, and when a token names one
    that is not known. What it gave last serves while it is down."""

    def __init__(self, remote: Remote, read: Callable[[Any], KeySet], ticks: Callable[[], float],
                 on_error: Callable[[str], Any]) -> None:
        self.keys: Optional[KeySet] = None
        self._remote, self._read, self._ticks = remote, read, ticks
        self._loop = Loop("jwks", self._fetch, JWKS_SECONDS, on_error)
        self._asked_at = -math.inf                      # when it was last asked for because of a new key
        self._wanted = self._done = 0                   # fetches, numbered
        self._ended = threading.Condition()
        self.stop = self._loop.stop

    def start(self) -> None:
        """Begin with the first fetch; nobody waits for it but tokens."""
        self._wanted = 1
        self._loop.start()
        self._loop.wake()

    def of(self, kid: Optional[str], may_wait: bool) -> KeySet:
        """The key set in which to look for a key, if need be after a fetch. Raises MustWait, Refusal 503."""
        if not self._has(kid):
            self._wait(may_wait)
        if not self._has(kid) and (self.keys is None or self._remote.trouble):
            raise _not_now(self._remote.trouble or "the keys have not been fetched yet")
        return self.keys

    def _has(self, kid: Optional[str]) -> bool:
        return self.keys is not None and (kid is None or kid in self.keys.ids)

    def _wait(self, may_wait: bool) -> None:
        """Wait for a fetch, if one is under way or may be asked for."""
        with self._ended:
            may_ask = self.keys is not None and self._ticks() - self._asked_at >= NEW_KEY_SECONDS
            if not may_ask and self._done == self._wanted:
                return
            if not may_wait:
                raise MustWait
            if may_ask:
                self._asked_at = self._ticks()
                self._wanted += 1
                self._loop.wake()
            wanted = self._wanted
            self._ended.wait_for(lambda: self._done >= wanted, 2 * FETCH_SECONDS)

    def _fetch(self) -> None:
        """The step of the loop."""
        wanted = self._wanted
        self._loop.seconds = JWKS_RETRY_SECONDS
        meanwhile = UNTIL_IT_WORKS
        if self.keys is not None:
            meanwhile = "the keys that it gave last serve on"
        try:
            keys = self._remote.ask(self._read, meanwhile)
            self._loop.seconds = JWKS_SECONDS
            if self.keys is None or keys.document != self.keys.document:
                self.keys = keys
                if not keys.ids:                        # the issuer may have withdrawn them, so we do, too
                    self._remote.say("ERROR", NO_KEYS)
        except Refusal:                                 # the remote has told of it
            pass
        finally:
            with self._ended:
                self._done = wanted
                self._ended.notify_all()


# -- tokens: what they say

class _Claims:
    """What the claims of a token have to say (RFC 7519 section 4.1)."""

    def __init__(self, settings: dict, now: Callable[[], float]) -> None:
        self._issuer, self._audience, self._now = settings["issuer"], settings["audience"], now
        self._leeway = settings.get("leeway", 60)

    def verified(self, claims: dict, must_have: Sequence[str] = ()) -> Verified:
        """Who it is. Raises ValueError, which says why that is not proven."""
        for name in must_have:
            if name not in claims:
                raise ValueError(f"has no {name}")
        audience = claims.get("aud", self._audience)
        if claims.get("iss", self._issuer) != self._issuer:
            raise ValueError("is of another issuer")
        if audience != self._audience and not (isinstance(audience, list) and self._audience in audience):
            raise ValueError("is for another audience")
        expires = self._checked_times(claims)
        client_id, subject = (next((claims[name] for name in names if isinstance(claims.get(name), str)), "")
                              for names in (("client_id", "azp"), ("sub",)))
        return Verified(client_id, subject, _scopes_of(claims), expires)

    def _checked_times(self, claims: dict) -> float:
        """When it expires, the leeway included."""
        times = {name: claims[name] for name in ("exp", "nbf", "iat") if name in claims}
        for name, value in times.items():
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ValueError(f"has an {name} that is no number")
        now, expires = self._now(), times.pop("exp", math.inf) + self._leeway
        if now >= expires:
            raise ValueError(f"has expired {math.ceil(now - expires + self._leeway)} s ago")
        for name, value in times.items():
            if value - self._leeway > now:
                raise ValueError(f"has an {name} that is {math.ceil(value - now)} s ahead")
        return expires


def _scopes_of(claims: dict) -> frozenset:
    """RFC 8693 section 4.2: a text with spaces. Azure AD and Okta call it scp; there it may be a list."""
    scopes = claims.get("scope", claims.get("scp"))
    if isinstance(scopes, str):
        scopes = scopes.split(" ")
    if not isinstance(scopes, list):
        scopes = []
    return frozenset(scope for scope in scopes if isinstance(scope, str) and scope)


def _digest_of(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _part_of(text: str, what: str, read: Callable[[bytes], Any] = bytes) -> Any:
    try:
        return read(base64url_bytes(text))
    except ValueError:                                  # JSONError is one, too
        raise ValueError(f"has {what} that cannot be read") from None


def _object(data: bytes) -> dict:
    value = parse_json(data)[0]
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    return value


class SignedTokens:
    """JWTs (RFC 7519) with a signature (RFC 7515), checked here as RFC 8725 advises: the algorithm has to be
    one of ours and of the key's kind, and the key one of the issuer's; what a token says of keys (jku, jwk,
    x5u, x5c) is not looked at."""

    def __init__(self, source: Union[KeyFile, KeyFetcher], claims: _Claims) -> None:
        self._source, self._claims = source, claims

    def verified(self, token: str, may_wait: bool) -> Verified:
        """Raises ValueError, MustWait, Refusal 503."""
        digest, keys = _digest_of(token), self._source.keys
        kept = keys and keys.kept.get(digest)
        if kept:
            return kept
        parts = token.split(".")
        if len(parts) != 3:
            raise ValueError("is no JWT: it has not three parts")
        header, signature = _part_of(parts[0], "a header", _object), _part_of(parts[2], "a signature")
        alg, kid = header.get("alg"), header.get("kid")
        if not isinstance(alg, str) or alg not in JWS_ALGORITHMS:
            raise ValueError("is signed by an algorithm that is not taken")
        if "crit" in header:                            # we understand none (RFC 7515 section 4.1.11)
            raise ValueError("has extensions that must be understood")
        if "kid" in header and not isinstance(kid, str):
            raise ValueError("has a kid that is no text")
        keys = self._source.of(kid, may_wait)
        fitting = keys.fitting(kid, alg)
        if not fitting:
            raise ValueError("is of a key that is not known")
        signed = f"{parts[0]}.{parts[1]}".encode()
        if not any(key.verify(alg, signed, signature) for key in fitting):
            raise ValueError("has a signature that does not fit")
        verified = self._claims.verified(_part_of(parts[1], "claims", _object), ("iss", "aud", "exp"))
        keys.kept.put(digest, verified.expires, verified)
        return verified


class IntrospectedTokens:
    """Tokens of any form, of which their issuer says whether they are good (RFC 7662)."""

    def __init__(self, remote: Remote, client: tuple, claims: _Claims, now: Callable[[], float],
                 ticks: Callable[[], float]) -> None:
        """`client` is the id and secret by which the issuer knows us."""
        self._remote, self._claims, self._now, self._ticks = remote, claims, now, ticks
        # RFC 6749 section 2.3.1
        pair = ":".join(map(quote_plus, client)).encode()
        self._fields = {"Authorization": "Basic " + base64.b64encode(pair).decode(),
                        "Content-Type": "application/x-www-form-urlencoded"}
        # Apart: whoever invents tokens does not make us forget the good ones
        self._good, self._bad = _Kept(ticks), _Kept(ticks)

    def verified(self, token: str, may_wait: bool) -> Verified:
        """Raises ValueError, MustWait, Refusal 503."""
        digest = _digest_of(token)
        kept, problem = self._good.get(digest), self._bad.get(digest)
        if kept:
            return kept
        if problem:
            raise ValueError(problem)
        if not may_wait:
            raise MustWait
        body = urlencode({"token": token, "token_type_hint": "access_token"})
        answer = self._remote.ask(_introspection, UNTIL_IT_WORKS, body, self._fields)
        try:
            if not answer["active"]:
                raise ValueError("is not active")
            verified = self._claims.verified(answer)
        except ValueError as error:
            self._bad.put(digest, self._ticks() + INACTIVE_SECONDS, str(error))
            raise
        seconds = min(verified.expires - self._now(), ACTIVE_SECONDS)
        verified = verified._replace(expires=self._now() + seconds)
        self._good.put(digest, self._ticks() + seconds, verified)
        return verified


def _introspection(answer: Any) -> dict:
    if not isinstance(answer, dict) or not isinstance(answer.get("active"), bool):
        raise ValueError("answered no introspection (RFC 7662)")
    return answer


class Tokens:
    """Bearer tokens of one issuer, checked as the settings `oauth` of a clients file say. For any thread."""

    def __init__(self, settings: dict, folder: str, crypto: Optional[LibCrypto],
                 tell: Callable[[str, str], Any], now: Callable[[], float] = time.time,
                 ticks: Callable[[], float] = time.monotonic,
                 on_error: Callable[[str], Any] = _no_error) -> None:
        """`settings` are valid by OAUTH_SCHEMA; names of files in them begin in `folder`. tell(level, text)
        hears when the issuer cannot be asked, and when it can again. Without `crypto` it finds libcrypto
        itself, where it needs it. Raises SetupError."""
        self.settings, self.scopes = settings, settings.get("scopes", DEFAULT_SCOPES)
        self._folder, self._claims = Path(folder), _Claims(settings, now)
        self._remote: Optional[Remote] = None
        self._fetcher: Optional[KeyFetcher] = None
        ways = [name for name in ("jwks_file", "jwks_url", "introspection_url") if name in settings]
        if len(ways) != 1:
            raise SetupError("clients: /oauth: takes one of jwks_file, jwks_url and introspection_url")
        place = f"clients: /oauth/{ways[0]}"
        if ways != ["jwks_file"]:
            self._remote = Remote(place, settings[ways[0]], tell, ticks)
        if ways == ["introspection_url"]:
            client = (settings["client_id"], self._secret())
            self._checker: Any = IntrospectedTokens(self._remote, client, self._claims, now, ticks)
            return
        self._read = functools.partial(KeySet, crypto or LibCrypto(), clock=now)
        if ways == ["jwks_file"]:
            source: Any = KeyFile(self._keys_in_file(place))
        else:
            source = self._fetcher = KeyFetcher(self._remote, self._read, ticks, on_error)
        self._checker = SignedTokens(source, self._claims)

    def _keys_in_file(self, place: str) -> KeySet:
        path = self._folder / self.settings["jwks_file"]
        check_place(place, str(path))
        try:
            keys = self._read(parse_json(path.read_bytes())[0])
        except (OSError, ValueError) as error:
            raise SetupError(f"{place}: {path}: {reason_of(error)}") from None
        if not keys.ids:
            raise SetupError(f"{place}: {path}: {NO_KEYS}")
        return keys

    def _secret(self) -> str:
        place, path = "clients: /oauth/client_secret_file", self._folder / self.settings["client_secret_file"]
        check_place(place, str(path))
        try:
            secret = path.read_text("utf-8").rstrip("\r\n")
        except (OSError, ValueError) as error:
            raise SetupError(f"{place}: {path}: {reason_of(error)}") from None
        if not secret:
            raise SetupError(f"{place}: {path}: is empty")
        return secret

    def adopt(self, before: Tokens) -> None:
        """Before start(): begin with the keys that the same address gave those that a reload replaces."""
        if (self._fetcher is not None and before._fetcher is not None and before._fetcher.keys is not None
                and self.settings["jwks_url"] == before.settings["jwks_url"]):
            self._fetcher.keys = self._read(before._fetcher.keys.document)

    def start(self) -> None:
        """Begin to fetch keys, where they come from an address."""
        if self._fetcher is not None:
            self._fetcher.start()

    def stop(self) -> None:
        """Fetch no more."""
        if self._fetcher is not None:
            self._fetcher.stop()

    @property
    def trouble(self) -> str:
        """Why the issuer cannot be asked just now, or ""."""
        return self._remote.trouble if self._remote is not None else ""

    @property
    def breaker(self) -> str:
        """closed, open or half-open; "" where nobody is asked."""
        return self._remote.breaker.state if self._remote is not None else ""

    def verify(self, token: str, may_wait: bool) -> Verified:
        """Who it proves. Raises Refusal 401 whose note says why it proves nobody (and nothing of the token),
        Refusal 503 while the issuer cannot be asked, and MustWait where that takes time and it may not."""
        try:
            if token.startswith(KEY_PREFIX):            # a secret that the issuer must not see
                raise ValueError("is one of our keys, and not a known one")
            if len(token) > LONGEST_TOKEN:
                raise ValueError(f"is longer than {LONGEST_TOKEN} characters")
            return self._checker.verified(token, may_wait)
        except ValueError as error:
            raise Refusal(401, "This token proves nobody", note=f"the token {error}") from None


# =============================================================================
# Access: who may do what: clients and their keys, roles, networks and rates. Knows no socket and no route.
# =============================================================================

ROLES = ("sender", "reader", "operator", "admin")
ANYBODY = ""                    # the role of what needs none
MOST_SECRETS = 100              # of signatures: each that could be meant is tried with each signed request
ADDRESSES_KEPT = 10000          # of unknown senders, each with some 300 bytes
REFUSALS, REFUSALS_SECONDS = 20, 60.0   # wrong credentials of an address, after which it hears 429
CHALLENGE = 'Bearer realm="appointments"'                               # RFC 6750 section 3
_BEARER = re.compile(r"bearer +([!-~]+)", re.IGNORECASE)               # RFC 9110 section 11.4, RFC 6750 2.1

# RFC 7239 section 4, but for quoted pairs and separators in quotes, which no proxy writes and two readers may
# read in two ways; and an address with its port
_FORWARDED_PAIR = re.compile(r'([a-z]+)=("[^",;\\]*"|[^",;\s]+)')
_FORWARDED = re.compile(fr"({_FORWARDED_PAIR.pattern}(\s*[;,]\s*|$))+", re.IGNORECASE)
_NODE = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::[0-9]+)?|([0-9.]+):[0-9]+")

CLIENT_SCHEMA = {
    "type": "object",
    "required": ["name", "roles"],
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$"},
        "tenant": {"type": "string", "pattern": "^[a-z0-9][a-z0-9-]{0,62}$"},
        "roles": {"type": "array", "minItems": 1, "uniqueItems": True, "items": {"enum": list(ROLES)}},
        "key_sha256": {"type": "array", "minItems": 1, "uniqueItems": True,
                       "items": {"type": "string", "pattern": "^[0-9A-Fa-f]{64}$"}},
        "signature": SIGNATURE_SCHEMA,
        "certificate": {"type": "string", "minLength": 1, "maxLength": 1000},
        "oauth": {"type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": False,
                  "properties": {"subject": {"type": "string", "minLength": 1},
                                 "client_id": {"type": "string", "minLength": 1}}},
        "require": {"const": "all"},
        "disabled": {"type": "boolean"},
        "rate": {"type": "number", "exclusiveMinimum": 0, "maximum": 1000000},
        "burst": {"type": "number", "minimum": 1, "maximum": 1000000},
        "allow_from": {"type": "array", "minItems": 1, "items": {"type": "string"}},
    },
    "dependentRequired": {"burst": ["rate"]},
    "additionalProperties": False,
}
CLIENTS_SCHEMA = {
    "type": "object",
    "required": ["clients"],
    "properties": {"clients": {"type": "array", "items": CLIENT_SCHEMA}, "oauth": OAUTH_SCHEMA},
    "additionalProperties": False,
    "$defs": {"role": {"enum": list(ROLES)}},           # for OAUTH_SCHEMA
}


class Bucket:
    """A token bucket: `rate` requests a second, of which up to `burst` may come at once."""

    def __init__(self, rate: float, burst: Optional[float] = None,
                 now: Callable[[], float] = time.monotonic) -> None:
        """`burst` is twice the rate, and at least 1, unless it is given."""
        self.rate, self.burst = rate, burst or max(2 * rate, 1.0)
        self._left, self._now, self._lock = self.burst, now, threading.Lock()
        self._at = now()

    def wait(self) -> float:
        """0.0, and one request less is left; else the seconds until there is one.

        It reads a clock of its own: by a time that another thread took earlier it would refuse wrongly.
        """
        with self._lock:
            now = self._now()
            self._left = min(self.burst, self._left + (now - self._at) * self.rate)
            self._at = now
            if self._left >= 1:
                self._left -= 1
                return 0.0
            return (1 - self._left) / self.rate

    def take(self) -> None:
        """Use up one request. Raises Refusal 429 when there is none."""
        wait = self.wait()
        if wait:
            # draft-ietf-httpapi-ratelimit-headers-10: a quota, and the seconds in which all of it comes back
            policy = f'"requests";q={self.burst:.0f};w={math.ceil(self.burst / self.rate)}'
            seconds = str(math.ceil(wait))
            raise Refusal(429, "Too many requests", note="over the rate", fields={
                "Retry-After": seconds, "RateLimit-Policy": policy,
                "RateLimit": f'"requests";r=0;t={seconds}'})


class PerAddress:
    """Something for each sender's address, made when it is met; of IPv6 for each /64, as a sender has a whole
    one. The one that was met first is forgotten first."""

    def __init__(self, make: Callable[[], Any], most: int = ADDRESSES_KEPT) -> None:
        self._make, self._most = make, most
        self._kept: dict = {}
        self._lock = threading.Lock()

    def of(self, address: str) -> Any:
        """What there is for an address."""
        if ":" in address:
            with contextlib.suppress(ValueError):
                packed = ipaddress.IPv6Address(address.partition("%")[0]).packed
                address = packed[:8].hex()
        with self._lock:
            found = self._kept.get(address)
            if found is None:
                if len(self._kept) >= self._most:
                    del self._kept[next(iter(self._kept))]
                found = self._kept[address] = self._make()
            return found


class Strikes:
    """How often an address was refused in the minute that began with its first refusal."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._began, self._count = now, -REFUSALS_SECONDS, 0

    def left(self) -> float:
        """Count one more: 0.0, or when there were too many the seconds until the minute is over."""
        now = self._now()
        if now - self._began >= REFUSALS_SECONDS:
            self._began, self._count = now, 0
        self._count += 1
        return self._began + REFUSALS_SECONDS - now if self._count > REFUSALS else 0.0


class Caller(NamedTuple):
    """On whose behalf a request is done: the name of a client, "" where nobody is known, their store, and the
    ledger that says who has looked; None where nobody has a name."""
    name: str
    store: Any
    ledger: Any = None


NOBODY = Caller("", None)       # of a request that is refused before anybody looked who it is


class Client:
    """An entry of the clients file: who it is, by what it is known, and what it may do."""

    def __init__(self, entry: dict) -> None:
        """`entry` is valid by the schema. Raises ValueError that begins with the place in it, a JSON Pointer."""
        self.name, self.tenant, self.roles = entry["name"], entry.get("tenant", ""), frozenset(entry["roles"])
        self.keys = [bytes.fromhex(text) for text in entry.get("key_sha256", ())]
        self.certificate, self.oauth = entry.get("certificate", ""), entry.get("oauth", {})
        self.signature: Optional[SignatureScheme] = None
        if "signature" in entry:
            try:
                self.signature = SignatureScheme(entry["signature"])
            except ValueError as error:
                raise ValueError(f"/signature{error}") from None
        proofs = frozenset(PROOFS) & frozenset(entry)
        if not proofs:
            raise ValueError(f": needs one of {', '.join(PROOFS)}, by which the client is known")
        self._needs = proofs if "require" in entry else frozenset()
        self._disabled = entry.get("disabled", False)
        self._networks = networks_of(entry.get("allow_from", ()), "/allow_from")
        self._bucket = Bucket(entry["rate"], entry.get("burst")) if "rate" in entry else None
        self._admissions = {role: self._admission(role) for role in ROLES}

    def is_proven_by(self, proofs: set) -> bool:
        """Whether these kinds of proof are enough."""
        return self._needs <= proofs

    def admission(self, role: str) -> Optional[Check]:
        """What is still to be checked of a request for which the client needs a role; None when nothing."""
        return self._admissions[role]

    def _admission(self, role: str) -> Optional[Check]:
        steps = [self._check_network] * bool(self._networks)
        if self._bucket is not None:                    # what is refused counts: it fills the access log
            steps.append(lambda request: self._bucket.take())
        if self._disabled:
            steps.append(lambda request: _deny("This client is disabled"))
        elif not self.roles & {role, "admin"}:
            steps.append(lambda request: _deny_role(role))
        return _all_of(steps)

    def _check_network(self, request: Any) -> None:
        if not is_in(request.address, self._networks):
            _deny("This client may not come from this network")


# The members of an entry by which a client can be known, in the order in which they are looked at
PROOFS = ("key_sha256", "signature", "oauth", "certificate")
BY_SIGNATURE = frozenset({"signature"})
Check = Callable[[Any], None]           # of a request; raises Refusal (401, 403, 429, 503) or MustWait


def _deny_role(role: str) -> None:
    _deny(f"This takes the role {role}", "insufficient_scope")


def _say_unknown_tenant() -> None:
    raise Refusal(404, "There is no such tenant")


def _tenant_asked_for(head: Head, role: str) -> Optional[str]:
    """The tenant that a read names, None for that of who reads. Raises Refusal."""
    if role != "reader" or not head.query:
        return None
    return next((value for name, value in query_pairs(head.query) if name == "tenant"), None)


def _deny(reason: str, error: str = "") -> None:
    """Raise the 403 of a client that is known. Made anew each time: a raised one keeps its traceback."""
    fields = {"WWW-Authenticate": f'{CHALLENGE}, error="{error}"'} if error else {}
    raise Refusal(403, reason, fields=fields)


def _all_of(steps: list) -> Optional[Check]:
    """One check that makes all of `steps`, in order."""
    if len(steps) < 2:
        return steps[0] if steps else None

    def check(request: Any) -> None:
        for step in steps:
            step(request)
    return check


def networks_of(texts: Iterable, place: str = "") -> list:
    """The IP networks in a list. Raises ValueError with the place of the one that is none."""
    networks = []
    for index, text in enumerate(texts):
        try:
            networks.append(ipaddress.ip_network(text))
        except ValueError as error:
            raise ValueError(f"{place}/{index}: must be a network such as 203.0.113.0/24 "
                             f"({printable(str(error))})") from None
    return networks


def is_in(address: str, networks: Iterable) -> bool:
    """Whether an address is in one of the networks."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return any(parsed in network for network in networks)


def forwarded_address(head: Head, networks: Sequence) -> str:
    """Whose request it is by what proxies in `networks` have noted: the last address in X-Forwarded-For, or in
    Forwarded (RFC 7239), that is none of theirs; "" where nothing is noted. Raises Malformed, also where
    both headers are there and do not say the same: each reader would believe another one."""
    found = set()
    for name, nodes_of in (("x-forwarded-for", _listed_nodes), ("forwarded", _forwarded_nodes)):
        if name in head.fields:
            found.add(_last_foreign(nodes_of(head.fields[name]), networks, name))
    if len(found) > 1:
        raise Malformed(400, "X-Forwarded-For and Forwarded do not say the same")
    return found.pop() if found else ""


def _listed_nodes(value: str) -> list:
    return [node.strip() for node in value.split(",")]


def _forwarded_nodes(value: str) -> list:
    if not _FORWARDED.fullmatch(value):
        raise Malformed(400, "The field Forwarded cannot be read")
    elements = [dict(_FORWARDED_PAIR.findall(element.lower())) for element in value.split(",")]
    return [element.get("for", "").strip('"') for element in elements]


def _last_foreign(nodes: list, networks: Sequence, name: str) -> str:
    address = ""
    for node in reversed(nodes):
        parts = _NODE.fullmatch(node)
        try:
            address = str(ipaddress.ip_address((parts[1] or parts[2]) if parts else node))
        except ValueError:                              # what a proxy has hidden, or a sender made up
            raise Malformed(400, f"The field {name} names no address") from None
        if not is_in(address, networks):
            break
    return address


class OpenAccess:
    """Without a clients file: everybody may do everything, each address at the rate given."""

    def __init__(self, store: Any, rate_limit: float) -> None:
        self._everybody = Caller("", store)
        self._limit = _limit_of(rate_limit)

    def judge(self, head: Head, role: str) -> tuple:
        """As Access.judge()."""
        if _tenant_asked_for(head, role) is not None:
            _say_unknown_tenant()
        return self._everybody, self._limit, False


class Evidence(NamedTuple):
    """What a head shows of who sent it: `clients` whose key it has, `signers` whose signature it may have, a
    `token`; `is_guess`: something is shown, and `is_bearer`: in the field for tokens (RFC 6750)."""
    clients: list
    signers: list
    token: str
    is_guess: bool
    is_bearer: bool


class Access:
    """Who may do what, by a clients file."""

    def __init__(self, clients: list, tokens: Optional[Tokens], nobody_of: Callable[[str], Optional[Caller]],
                 rate_limit: float) -> None:
        """`nobody_of(tenant)` is a Caller of a tenant without a name, None where there is no such tenant;
        `rate_limit` requests a second for unknown addresses."""
        self._tokens, self._nobody_of = tokens, nobody_of
        self._nobody = nobody_of("")
        self._callers = {client: nobody_of(client.tenant)._replace(name=client.name) for client in clients}
        self._limit = _limit_of(rate_limit)
        # A look-up by a digest tells nobody by its time how near to a key a guess was
        self._by_key = {key: client for client in clients for key in client.keys}
        self._by_certificate = {client.certificate: client for client in clients if client.certificate}
        self._by_token = {item: client for client in clients for item in client.oauth.items()}
        self._signers = [client for client in clients if client.signature is not None]
        self._strikes = PerAddress(Strikes)

    def judge(self, head: Head, role: str) -> tuple:
        """(Caller, Check or None, whether it needs the body) for a head, of what needs a role. Where the head
        does not tell who it is, the check finds out, and sets `caller` of the request.

        What is given is kept with the head: it follows from it and from the clients file alone, and whatever
        depends on the sender's address, on the body or on the time is in the check.
        """
        if role == ANYBODY:
            return self._nobody, self._limit, False
        evidence = self._evidence(head)
        for client in evidence.clients:
            if client.is_proven_by({"key_sha256"}):
                return *self._admitted(client, role, head), False
        check = functools.partial(self._check, head, evidence, role)
        return self._nobody, check, bool(evidence.signers)

    def _admit(self, client: Client, role: str, head: Head, request: Any) -> None:
        request.caller, admission = self._admitted(client, role, head)
        if admission is not None:
            admission(request)

    def _admitted(self, client: Client, role: str, head: Head) -> tuple:
        """(Caller, Check or None) of a client that is known."""
        is_overseer = not client.tenant and "admin" in client.roles
        return self._in_tenant(self._callers[client], client.admission(role), is_overseer, role, head)

    def _in_tenant(self, caller: Caller, check: Optional[Check], is_overseer: bool, role: str, head: Head) -> tuple:
        """(Caller, Check or None) in the tenant that a read names, which takes an admin of the default one."""
        tenant = _tenant_asked_for(head, role)
        if tenant is None:
            return caller, check
        asked, steps = self._nobody_of(tenant), [check] * (check is not None)
        if not is_overseer:             # whether there is such a tenant is nobody else's business
            steps.append(lambda request: _deny("Only an admin of the default tenant may name another"))
        elif asked is None:
            steps.append(lambda request: _say_unknown_tenant())
        else:
            caller = asked._replace(name=caller.name)
        return caller, _all_of(steps)

    def _evidence(self, head: Head) -> Evidence:
        clients, token, bearer, shown = [], "", None, []
        if "authorization" in head.fields:
            bearer = _BEARER.fullmatch(head.fields["authorization"])
            shown = [bearer[1]] if bearer else []
        if head.get("x-api-key"):
            shown.append(head.fields["x-api-key"])
        for key in shown:
            client = self._by_key.get(hashlib.sha256(key.encode("latin-1")).digest())
            if client is not None:
                clients.append(client)
            elif bearer and key == bearer[1] and not key.startswith(KEY_PREFIX):
                token = key
        signers = []
        if head.method == "POST":                       # over no body it would be a password for ever
            signers = [client for client in self._signers if client.signature.is_shown(head)]
        return Evidence(clients, signers, token, bool(shown or signers), bearer is not None)

    def _check(self, head: Head, evidence: Evidence, role: str, request: Any) -> None:
        """Find out who it is by all that is shown, and whether they may."""
        if len(evidence.signers) == 1 and not (evidence.clients or evidence.token):     # nearly always
            client, = evidence.signers
            if client.is_proven_by(BY_SIGNATURE) and not client.signature.problem(head, request.body, time.time()):
                self._admit(client, role, head, request)
                return
        proofs: dict = {client: {"key_sha256"} for client in evidence.clients}
        note = self._prove_by_signature(head, evidence, request, proofs)
        verified, trouble = None, None
        if evidence.token and self._tokens is not None:
            try:
                verified = self._tokens.verify(evidence.token, request.may_wait)
            except Refusal as refusal:                  # what else is shown may be enough
                trouble, note = refusal, refusal.note
        entry = self._entry_of(verified)
        if entry is not None:
            proofs.setdefault(entry, set()).add("oauth")
        for name in request.connection.certificate_names:
            if name in self._by_certificate:
                proofs.setdefault(self._by_certificate[name], set()).add("certificate")
        for client, kinds in proofs.items():
            if client.is_proven_by(kinds):
                self._admit(client, role, head, request)
                return
        if verified is not None and entry is None:
            self._admit_by_scopes(verified, role, head, request)
        elif trouble is not None and trouble.status == 503:
            raise trouble
        else:
            self._refuse(evidence, note, request)

    def _prove_by_signature(self, head: Head, evidence: Evidence, request: Any, proofs: dict) -> str:
        """Add the clients that have signed the body to `proofs`. Returns what the log may say of others."""
        problems = []
        for client in evidence.signers:
            problem = client.signature.problem(head, request.body, time.time())
            if problem:
                problems.append(problem)
            else:
                proofs.setdefault(client, set()).add("signature")
        if problems:                            # where profiles share a header, who can read it tells
            return min(problems, key=UNREADABLE.__eq__)
        return "credentials that nobody has" if evidence.is_guess else "no credentials"

    def _entry_of(self, verified: Optional[Verified]) -> Optional[Client]:
        """The client that a token names."""
        if verified is None:
            return None
        by_id = self._by_token.get(("client_id", verified.client_id))
        return by_id or self._by_token.get(("subject", verified.subject))

    def _admit_by_scopes(self, verified: Verified, role: str, head: Head, request: Any) -> None:
        """A token that names no client: its scopes are its roles, in the default tenant."""
        # in a line of the log it must not look like further fields
        name = re.sub(r"[^\w.@:/+-]", "_", (verified.client_id or verified.subject)[:100], flags=re.ASCII)
        caller, check = self._nobody._replace(name="oauth:" + name), None
        roles = {self._tokens.scopes.get(scope) for scope in verified.scopes}
        if not roles & {role, "admin"}:
            check = lambda request: _deny_role(role)
        request.caller, check = self._in_tenant(caller, check, "admin" in roles, role, head)
        if check is not None:
            check(request)

    def _refuse(self, evidence: Evidence, note: str, request: Any) -> None:
        """Raise the refusal of somebody who is not known."""
        if self._limit is not None:
            self._limit(request)
        wait = self._strikes.of(request.address).left() if evidence.is_guess else 0.0
        if wait:
            raise Refusal(429, "Too many requests with wrong credentials",
                          fields={"Retry-After": str(math.ceil(wait))})
        fields = {"WWW-Authenticate": CHALLENGE + ', error="invalid_token"' * evidence.is_bearer}
        raise Refusal(401, "Who sends this is not known here", note=note, fields=fields)


def _limit_of(rate: float) -> Optional[Check]:
    """The check of a rate for each address, None without one."""
    if not rate:
        return None
    buckets = PerAddress(lambda: Bucket(rate))
    return lambda request: buckets.of(request.address).take()


class ClientsFile(NamedTuple):
    """What a clients file says: its Clients, and the settings of `oauth`, None without it."""
    clients: list
    oauth: Optional[dict]


def read_clients(path: str, takes_certificates: bool) -> ClientsFile:
    """Read a clients file. Raises SetupError that names file, place and reason."""
    where = f"clients {path}"
    check_place("clients", path)
    try:
        document = parse_json(Path(path).read_bytes(), sys.maxsize)[0]
    except (OSError, JSONError) as error:
        raise SetupError(f"{where}: {reason_of(error)}") from None
    for problem in Schema(CLIENTS_SCHEMA).errors(document):
        raise SetupError(f"{where}: {problem.path or '/'}: {problem.message}")
    try:
        clients = _clients_of(document["clients"])
    except ValueError as error:
        raise SetupError(f"{where}: /clients{error}") from None
    for index, client in enumerate(clients):
        if client.certificate and not takes_certificates:
            raise SetupError(f"{where}: /clients/{index}/certificate: needs the setting tls_client_ca")
        if client.oauth and "oauth" not in document:
            raise SetupError(f"{where}: /clients/{index}/oauth: needs oauth at the top of the file")
    return ClientsFile(clients, document.get("oauth"))


def _clients_of(entries: list) -> list:
    """The Clients of valid entries. Raises ValueError that begins with the place."""
    clients, owners, count = [], {}, 0
    for index, entry in enumerate(entries):
        try:
            client = Client(entry)
        except ValueError as error:
            raise ValueError(f"/{index}{error}") from None
        secrets_of = client.signature.fingerprints() if client.signature is not None else []
        count += len(secrets_of)
        if count > MOST_SECRETS:
            raise ValueError(f"/{index}/signature/secrets: more than {MOST_SECRETS} secrets in all")
        unique = [("name", client.name.lower()), ("certificate", client.certificate), *client.oauth.items(),
                  *(("key", key) for key in client.keys), *(("secret", mark) for mark in secrets_of)]
        for what, value in unique:
            if value and owners.setdefault((what, value), index) != index:
                raise ValueError(f"/{index}: has the {what} of /clients/{owners[what, value]}: who would it be?")
        clients.append(client)
    return clients


# =============================================================================
# Endpoints: what each route answers, and by which rules a request reaches it. Knows no socket.
# =============================================================================

LOOPBACK = re.compile(r"localhost|.*\.localhost|127\.[0-9.]+|\[?::1\]?", re.IGNORECASE)
MEDIA_TYPES = {"application/json": "application/json", "application/x-ndjson": "application/x-ndjson",
               "application/ndjson": "application/x-ndjson", "application/jsonl": "application/x-ndjson",
               "text/csv": "text/csv; charset=utf-8"}
# Bytes of a body that is read and checked beside others. A larger one waits for its turn in its connection's
# own thread: a megabyte takes 50 ms to check
ORDINARY_BODY = 8192
PAGE_BYTES = 1024 * 1024        # size at which a page of JSON ends, whatever its limit
PAGE_SECONDS = 2.0              # time after which it ends: `next` goes on where it looked last
ROWS_A_STEP = 100               # events of one look into the database: more are not faster
CSV_HEAD = (",".join(("id", *COLUMNS)) + "\r\n").encode()
READ_SECONDS = 3600.0           # time that a stream may take
DEFAULT_LIMIT, MAX_LIMIT = 100, 1000
HEADS_KEPT, HEAD_KEPT_BYTES = 1024, 2048
HEALTH_SECONDS = 0.04           # how long /health waits for its checks, then it tells what was found last


class Parameter(NamedTuple):
    """A parameter of a query: parse(text) raises ValueError that says what it must be."""
    parse: Callable[[str], Any]
    description: str


def _instant(text: str) -> str:
    # "+02:00" not percent-encoded arrives as " 02:00"; a space cannot stand there otherwise
    text = re.sub(r"\A([0-9W-]{7,10}[Tt ][0-9:.,]{2,18}) ([0-9]{2}:?[0-9]{2})\Z", r"\1+\2", text)
    try:
        return canonical_timestamp(text)
    except ValueError:
        raise ValueError("must be an ISO 8601 date-time, for example 2025-01-10T14:00:00Z") from None


PARAMETERS = {
    "appointment_id": Parameter(str, "events of this appointment"),
    "patient_id": Parameter(str, "events of this patient"),
    "event_type": Parameter(str, "events of this type"),
    "since": Parameter(_instant, "appointments at this time or later"),
    "until": Parameter(_instant, "appointments before this time"),
    "after": Parameter(_whole(0, 2 ** 63 - 1), "events with a higher id: where the last page ended"),
    "limit": Parameter(_whole(1), "how many events at most"),
    "tenant": Parameter(str, "events of this tenant, for an admin of the default one"),
}


class Request(Submission):
    """One request that has been read: by which ruling, its body, who sent it and when.

    An endpoint that takes an event leaves it in `event`; it is answered by answer_to_event() once it is on
    disk. `payload` is what the log shows of a body whose event was refused, and `redactor`, of the rules that it
    was read by, makes that of an event. `refusal` is one that waits for its turn among the answers of its
    connection; `endpoint` is known once it was admitted.
    """
    __slots__ = ("ruling", "body", "id", "received_at", "started", "address", "connection", "payload",
                 "digest", "caller", "refusal", "may_wait", "endpoint", "redactor")

    def __init__(self, ruling: Ruling, body: bytes, ids: tuple, connection: Any,
                 may_wait: bool = False) -> None:
        """`may_wait`: on this thread the check of who sends may wait for the network."""
        self.ruling, self.body, self.connection, self.may_wait = ruling, body, connection, may_wait
        self.id, self.received_at = ids
        self.address, self.caller = connection.address, ruling.caller
        if connection.is_proxy:
            self.address = ruling.forwarded or self.address
        self.started = self.arrived = time.monotonic()
        self.event = self.digest = self.refusal = self.endpoint = None
        self.payload = ""

    @property
    def lane(self) -> Any:
        """Outcomes for one connection come in order."""
        return self.connection

    def done(self, outcome: Outcome) -> None:
        """Have the connection answer: called by whoever committed the event."""
        self.connection.deliver(self, outcome)


class Account:
    """What the access log gets of one read, before the data goes out; nothing where nobody has a name."""

    def __init__(self, request: Request, asked: dict, personal: Iterable) -> None:
        """`asked` is what was asked for, {name: value}, of which the values of `personal` names are hidden."""
        self._ledger, self._client, self._address = request.caller.ledger, request.caller.name, request.address
        if self._ledger is not None:
            shown = {name: self._ledger.hidden(str(value)) if name in personal else value
                     for name, value in asked.items()}
            self._detail = json.dumps(shown)

    @property
    def is_kept(self) -> bool:
        """Whether anything is written."""
        return self._ledger is not None

    def note(self, action: str, rows: Optional[int]) -> None:
        """On disk when it returns. Raises StoreUnavailable: then nothing may go out."""
        if self._ledger is not None:
            self._ledger.record(action, self._client, self._address, self._detail, rows)


class Reading:
    """A read of stored events, in pieces. Each is made in a turn of its own, which ends before it is sent."""

    def __init__(self, store: Store, heavy: Turns, wanted: Filter, after: int, account: Account) -> None:
        self._store, self._heavy, self._wanted, self._after = store, heavy, wanted, after
        self._account = account
        self.rows = 0                                   # that have been made

    def page(self, limit: int, given: dict) -> Iterator[bytes]:
        """A page of JSON: `limit` events, fewer where they are large or take long to find; `next` goes on by
        the parameters `given`."""
        ends_at, count, size, after = time.monotonic() + PAGE_SECONDS, 0, 0, self._after
        text, following = '{"events": [', None
        for events, looked_at in self._store.steps(self._wanted, after, None, min(limit + 1, ROWS_A_STEP)):
            for event in events:
                if count == limit or size >= PAGE_BYTES:
                    following = after
                    break
                line = event_text(event)
                text += f", {line}" if count else line
                count, size, after = count + 1, size + len(line), event.id
                self.rows = count
            if following is None and time.monotonic() > ends_at:
                following = looked_at
            if following is not None:
                following = "/webhook/appointments?" + urlencode({**given, "after": following})
                break
            if text:
                yield text.encode()
            text = ""
        yield f'{text}], "next": {json.dumps(following)}}}'.encode()

    def stream(self, limit: Optional[int], lines: Callable, first: bytes = b"") -> Iterator[bytes]:
        """`first`, and lines(events) of all events that are stored by now."""
        ends_at, left = time.monotonic() + READ_SECONDS, limit or sys.maxsize
        if first:
            yield first
        for events, _ in self._store.steps(self._wanted, self._after, self._store.last_id(), ROWS_A_STEP):
            events = events[:left]
            left -= len(events)
            self.rows += len(events)
            if events:
                yield lines(events)
            if not left:
                return
            if time.monotonic() > ends_at:
                raise StoreUnavailable(f"it took longer than {READ_SECONDS:g} seconds; go on with after=")

    def response(self, pieces: Iterator[bytes], content_type: str) -> Response:
        """A Response of pieces: with its length where there is only one. Raises StoreUnavailable."""
        pieces = self._in_turns(pieces)
        if self._account.is_kept and content_type == MEDIA_TYPES["application/json"]:
            pieces = iter([b"".join(pieces)])           # a page, which is counted before it is sent
        first, second = next(pieces, b""), next(pieces, None)
        if second is None:
            if self.rows or not self._after:            # who asks again and again for what is new has seen nothing
                self._account.note("read", self.rows)
            return Response(200, first, content_type, note="read")
        self._account.note("read", None)
        pieces = itertools.chain((first, second), pieces)
        return Response(200, self._to_its_end(pieces), content_type, note="read")

    def _to_its_end(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        try:
            yield from pieces
        finally:
            with contextlib.suppress(StoreUnavailable): # that it began is written
                self._account.note("read-end", self.rows)

    def _in_turns(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        while True:
            with self._heavy:
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece


class Endpoints:
    """The endpoints, and what every answer shares. An endpoint takes a Request and gives a Response, or None
    when it has left an event in the request. `rules` may be exchanged at any time; `checks_of(store)` are
    those of /health for who uses that store."""

    def __init__(self, config: Config, log: Log, checks_of: Callable[[Any], dict]) -> None:
        self.rules: Rules = None
        self.warnings: list = []        # what /health tells beside its checks
        self.log, self._checks_of = log, checks_of
        self.ids, self._date = RequestIds(), PerSecond(http_date)
        self._identical_is_fine = config.duplicates == "ok"
        # Held by the one thread that works on a large body or a read: each more would have everybody wait
        # longer for the interpreter's lock (120 bodies of 1 MiB: a good sender's P99 was 550 ms, and is 100)
        self.heavy = Turns()
        self._stored = self._stored_template()

    def admit(self, request: Request) -> None:
        """Find out by whom a request may be made, once, and so its endpoint. Raises Refusal."""
        ruling = request.ruling
        if request.endpoint is not None:
            return
        try:
            reason = ruling.unclear
            if reason and request.connection.is_proxy:
                raise Malformed(400, reason)
            if ruling.check is not None:
                ruling.check(request)
            request.endpoint = ruling.endpoint
        except Refusal as refusal:
            if ruling.otherwise is None or refusal.status not in (401, 403, 503):
                raise
            request.endpoint = ruling.otherwise

    # -- taking events

    def receive_event(self, request: Request) -> None:
        """POST /webhook/appointments."""
        if len(request.body) <= ORDINARY_BODY:
            self._read_event(request)
            return
        with self.heavy:  # with the digest, so that the writer need not look into it
            self._read_event(request)
            request.digest = content_digest(request.event.payload)

    def _read_event(self, request: Request) -> None:
        rules = self.rules
        request.redactor = rules.redactor
        try:
            value, text = parse_json(request.body)
            request.body = b""  # its text is in the event: a megabyte need not be kept twice
            client = request.caller.name or request.address
            request.event = rules.contract.event(value, text, request.received_at, client)
        except JSONError as error:
            request.payload = rules.redactor.unreadable(request.body)
            problem = Problem("", "json", str(error))
            raise Refusal(400, problem.message, errors=[problem._asdict()]) from None
        except InvalidEvent as error:
            request.payload = rules.redactor.invalid(value, error.problems)
            raise Refusal(400, str(error), note=error.for_log,
                          errors=[problem._asdict() for problem in error.problems]) from None

    def answer_to_event(self, request: Request, outcome: Outcome) -> Response:
        """The answer to an event after its commit, or after what went wrong."""
        if request.refusal is not None:
            return self.refused(request, request.refusal)
        stored_id = outcome.event_id
        if outcome.kind == "stored":
            return stored_response(request.id, stored_id)
        if outcome.kind != "duplicate":
            return self.failed(request, outcome.error)
        if outcome.identical and self._identical_is_fine:
            response = json_response({"status": "duplicate", "message": "Event was already stored",
                                      "request_id": request.id, "event_id": stored_id}, note="duplicate",
                                     event_id=stored_id)
            response.level = "WARNING"
            return response
        message = "Duplicate event: this appointment_id and timestamp are already stored"
        if not outcome.identical:
            message += ", with other content; this one was kept separately"
        return self.refused(request, Refusal(409, message, event_id=stored_id, identical=outcome.identical))

    # -- reading events

    def show_event(self, request: Request, event_id: int) -> Response:
        """GET /webhook/appointments/{event_id}."""
        account = Account(request, {"id": event_id}, ())
        event = request.caller.store.event(event_id)
        account.note("read", int(event is not None))
        if event is None:
            raise Refusal(404, "There is no event with this id")
        return Response(200, event_text(event).encode(), note="read", event_id=event_id)

    def list_events(self, request: Request) -> Response:
        """GET /webhook/appointments: a page of JSON, or all as NDJSON or CSV."""
        head = request.ruling.head
        given = parse_query(head.query, PARAMETERS)
        media_type = wanted_type(head.get("accept"), MEDIA_TYPES)
        if media_type is None:
            raise Refusal(406, f"Events come as {', '.join(MEDIA_TYPES)}")
        values = self._values(given)
        wanted = Filter(*map(values.get, Filter._fields))
        account = Account(request, given, self.rules.contract.personal_fields)
        reading = Reading(request.caller.store, self.heavy, wanted, values.get("after", 0), account)
        limit = values.get("limit")
        if media_type == "application/json":
            if limit is not None and limit > MAX_LIMIT:
                raise Refusal(400, f"Filter limit must be a whole number from 1 to {MAX_LIMIT}")
            pieces = reading.page(limit or DEFAULT_LIMIT, given)
        elif media_type == "text/csv":
            pieces = reading.stream(limit, csv_lines, CSV_HEAD)
        else:
            pieces = reading.stream(limit, event_lines)
        return reading.response(pieces, MEDIA_TYPES[media_type])

    def _values(self, given: dict) -> dict:
        values = {}
        for name, text in given.items():
            try:
                values[name] = PARAMETERS[name].parse(text)
            except ValueError as error:
                raise Refusal(400, f"Filter {name} {error}") from None
        types = self.rules.contract.event_types
        if types and values.get("event_type", types[0]) not in types:
            raise Refusal(400, f"Filter event_type must be one of: {', '.join(map(str, types))}")
        return values

    # -- the rest

    def live(self, request: Request) -> Response:
        """GET /health/live."""
        return json_response({"status": "ok", "checks": {}})

    def ready(self, request: Request) -> Response:
        """GET /health/ready: whatever is needed to take events."""
        checks = self._checks_of(request.caller.store)
        return self._health({name: check for name, check in checks.items() if name in NEEDED})

    def health(self, request: Request) -> Response:
        """GET /health."""
        return self._health(self._checks_of(request.caller.store))

    def ready_status(self, request: Request) -> Response:
        """GET /health/ready for who may not see what is checked."""
        return _status_of(self.ready(request))

    def health_status(self, request: Request) -> Response:
        """GET /health for who may not see what is checked."""
        return _status_of(self.health(request))

    def _health(self, checks: dict) -> Response:
        ends_at, found = time.monotonic() + HEALTH_SECONDS, {}
        for check in checks.values():                   # all begin before the first is waited for
            check(0.0)
        for name, check in checks.items():
            found[name] = check(max(0.0, ends_at - time.monotonic()))
        more = {"warnings": self.warnings} if self.warnings else {}
        if all(one["status"] == "ok" for one in found.values()):
            return json_response({"status": "ok", "checks": found, **more})
        return json_response({"status": "failing", "checks": found, **more}, 503, fields=RETRY_AFTER,
                             note="failing")

    def show_schema(self, request: Request) -> Response:
        """GET /schema.json."""
        return Response(200, self.rules.schema_text, "application/schema+json")

    def options(self, request: Request) -> Response:
        """OPTIONS: what a path takes; the answer to a preflight of an allowed origin."""
        ruling = request.ruling
        routes = ROUTES
        if ruling.head.target != "*":
            routes = [route for route, _ in routes_at(ruling.head.path)]
        allow = allowed_methods(routes)
        fields = {"Allow": allow}
        if ruling.answer_fields:
            fields.update({"Access-Control-Allow-Methods": allow, "Access-Control-Max-Age": "600",
                           "Access-Control-Allow-Headers": "Content-Type"})
        return Response(204, b"", fields=fields)

    # -- what every answer shares

    def date(self) -> str:
        """The Date header of now."""
        return self._date.text(int(time.time()))

    def encoded(self, request: Request, response: Response, close: bool) -> bytes:
        """The bytes of an answer, without a body that is streamed."""
        ruling = request.ruling
        return encode(response, ruling.head, request.id, self.date(), ruling.answer_fields, close)

    def stored(self, request: Request, event_id: int) -> bytes:
        """The bytes of the answer to an event that is stored. Hot path: a template (1 against 9 us)."""
        number = str(event_id)
        text, length = self._stored
        return (text % (self.date(), length + len(number), request.id, request.id, number)).encode()

    def _stored_template(self) -> tuple:
        """(answer with holes for date, length, request id twice and event id; length without that id)."""
        response = stored_response("@id" + " " * 23, "@number")         # an id has 26 characters
        text = encode(response, Head(), "@id", "@date", {}, False).decode().replace("%", "%%")
        length = len(response.body)
        for hole, kind in ((f"Length: {length}", "Length: %d"), ('"@number"', "%s"), ("@id" + " " * 23, "%s"),
                           ("@id", "%s"), ("@date", "%s")):
            text = text.replace(hole, kind)
        return text, length - len('"@number"')

    def refused(self, request: Request, refusal: Refusal) -> Response:
        """The answer to a Refusal."""
        document = {"error": REASONS[refusal.status], "message": refusal.message, "request_id": request.id,
                    **refusal.members}
        response = json_response(document, refusal.status, fields=refusal.fields, note=refusal.note,
                                 event_id=refusal.members.get("event_id"), close=refusal.close)
        if isinstance(refusal, Busy):
            response.level = "WARNING"
        return response

    def failed(self, request: Request, error: Exception) -> Response:
        """The answer to an exception: a Refusal's own, 503 if the store cannot work now, else a bug's 500."""
        if isinstance(error, Refusal):
            if error.status == 403 and request.caller.name:
                self._record_refusal(request)
            return self.refused(request, error)
        if isinstance(error, StoreUnavailable):
            message = f"This cannot be done now: {error.public}; try again"
            return self.refused(request, Refusal(503, message, fields=RETRY_AFTER))
        self.log.exception("Unexpected error", request.id, error)
        message = "Unexpected error; see the log entry with this request id"
        return self.refused(request, Refusal(500, message, close=True))

    def _record_refusal(self, request: Request) -> None:
        """Who is known and tries what they may not do is in the access log."""
        caller, ruling = request.caller, request.ruling
        with contextlib.suppress(StoreUnavailable):     # the log has it, too
            caller.ledger.record("refused", caller.name, request.address, f"{ruling.method} {ruling.pattern}")

    def note(self, request: Request, status: int, level: str, note: str, event_id: Optional[int]) -> None:
        """The one place where a request ends: log it. Hot path."""
        ruling, event = request.ruling, request.event
        payload = request.payload
        if event is not None:
            payload = request.redactor.event(event)
        who = request.address
        if request.caller.name:
            who = f"{request.caller.name} address={who}"
        seconds = time.monotonic() - request.started
        self.log.request(level, time.time(), request.id, ruling.method, ruling.pattern, status, note,
                         event_id, seconds, who, payload)


NEEDED = ("database", "disk", "service")        # the checks of /health/ready


def _status_of(health: Response) -> Response:
    """A Response of /health without its checks."""
    status = json.loads(health.body)["status"]
    return json_response({"status": status}, health.status, fields=health.fields, note=health.note)


def stored_response(request_id: str, event_id: Any) -> Response:
    """The answer to an event that is stored."""
    document = {"status": "success", "message": "Event received and stored", "request_id": request_id,
                "event_id": event_id}
    return json_response(document, note="stored", event_id=event_id)


def event_text(event: AppointmentEvent) -> str:
    """An event as one line of JSON: the columns as members, the payload as it came.

    What other hands have put into the table, and is not what we put there, still comes out as RFC 8259.
    """
    columns = {"id": event.id, **event._asdict()}
    if isinstance(event, Unreadable):
        columns["unreadable"] = True
    payload = columns.pop("payload")
    try:
        parse_json(payload.encode())
    except (ValueError, AttributeError):
        payload = json.dumps(payload, default=_text_of_bytes)
    # Raw line breaks in JSON are white space between tokens, never part of a string
    payload = payload.replace("\n", " ").replace("\r", " ")
    line = json.dumps(columns, ensure_ascii=False, default=_text_of_bytes)
    return f'{line[:-1]}, "payload": {payload}}}'


def _text_of_bytes(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def event_lines(events: list) -> bytes:
    """Events as NDJSON."""
    return "".join(event_text(event) + "\n" for event in events).encode()


def csv_cell(value: Any) -> Any:
    """A cell that no spreadsheet runs as a formula (OWASP, CSV injection): an apostrophe stands in front."""
    if isinstance(value, str) and value.startswith(tuple("=+-@\t\r\n＝＋－＠")):
        return "'" + value
    return value


def csv_lines(events: list) -> bytes:
    """Events as CSV by RFC 4180."""
    text = io.StringIO()
    csv.writer(text).writerows(map(csv_cell, (event.id, *event[:-1])) for event in events)
    return text.getvalue().encode()


class Route(NamedTuple):
    """A row of the table of routes; {event_id} in a path stands for a number, given to the endpoint.

    `role` is what the caller needs, and `otherwise` the endpoint for who has not got it. `reads`: it reads
    events, of which only few are under way at once.
    """
    method: str
    path: str
    endpoint: str
    role: str
    summary: str
    reads: bool = False
    otherwise: str = ""


ROUTES = (
    Route("POST", "/webhook/appointments", "receive_event", "sender", "take one event"),
    Route("GET", "/webhook/appointments", "list_events", "reader", "stored events", reads=True),
    Route("GET", "/webhook/appointments/{event_id}", "show_event", "reader", "one stored event", reads=True),
    Route("GET", "/health", "health", "operator", "all that is checked: database, disk, on_event",
          otherwise="health_status"),
    Route("GET", "/health/live", "live", ANYBODY, "the process answers"),
    Route("GET", "/health/ready", "ready", "operator", "events can be taken", otherwise="ready_status"),
    Route("GET", "/schema.json", "show_schema", ANYBODY, "what an event looks like"),
)
OPTIONS = Route("OPTIONS", "*", "options", ANYBODY, "what a path takes")
UNMATCHED = Route("-", "-", "", ANYBODY, "what no route is for")
PATHS = tuple((route, re.compile(re.escape(route.path).replace(r"\{event_id\}", "([0-9]{1,18})")))
              for route in ROUTES)
# Hot path: most paths are these, letter by letter
LITERAL_PATHS = {path: [(route, ()) for route in ROUTES if route.path == path]
                 for path in {route.path for route in ROUTES if "{" not in route.path}}


def match_route(method: str, path: str) -> tuple:
    """(Route, arguments) of a request, HEAD as GET. Raises Refusal (400, 404, 405 with Allow)."""
    found = routes_at(path)
    for route, arguments in found:
        if route.method == method or route.method == "GET" and method == "HEAD":
            return route, arguments
    allow = allowed_methods([route for route, _ in found])
    raise Refusal(405, f"This path takes {allow}", fields={"Allow": allow})


def routes_at(path: str) -> list:
    """[(Route, arguments)] of a path, each segment of it decoded once. Raises Refusal (400, 404)."""
    if path in LITERAL_PATHS:
        return LITERAL_PATHS[path]
    if "%" in path:
        segments = map(unquote_to_bytes, path.split("/"))
        try:                                            # a slash that was encoded parts no segments
            path = "/".join(segment.decode().replace("/", "%2F") for segment in segments)
        except UnicodeDecodeError:
            raise Refusal(400, "The path is not UTF-8") from None
    matches = [(route, pattern.fullmatch(path)) for route, pattern in PATHS]
    found = [(route, tuple(map(int, match.groups()))) for route, match in matches if match]
    if not found:
        raise Refusal(404, "There is nothing at this path")
    return found


def allowed_methods(routes: Iterable) -> str:
    """The Allow field for routes."""
    methods = {route.method for route in routes} | {"OPTIONS"}
    if "GET" in methods:
        methods.add("HEAD")
    return ", ".join(sorted(methods))


class Ruling:
    """What we do with every request that has one head: its route and endpoint, or its refusal.

    A ruling follows from the bytes of the head and the Rules alone, since equal bytes from elsewhere get the
    same one. `check` is what has to be asked anew of each request, whose body it may need; `caller` is who
    sends it by the head alone; `otherwise` is the endpoint of who may not use `endpoint`. `ordinary`: a small
    event on a connection that stays open, which the poller may take. `forwarded` is whose request it is if a
    trusted proxy sends it, or `unclear` why that cannot be read. `method` and `pattern` are what the log says
    of the request: never what was sent.
    """
    route, arguments = UNMATCHED, ()
    forwarded = unclear = ""
    endpoint: Optional[Callable] = None
    otherwise: Optional[Callable] = None
    caller = NOBODY
    check: Optional[Check] = None
    check_needs_body = False
    refusal: Optional[Refusal] = None
    ordinary = False
    method = pattern = "-"

    def __init__(self, head: Head) -> None:
        self.head, self.answer_fields = head, {}


class Rules:
    """What an operator may change while we run: the contract, who may reach us. Exchanged as a whole."""

    def __init__(self, config: Config, contract: Contract, schema_text: bytes, redactor: Redactor,
                 access: Union[OpenAccess, Access], tls: Any, endpoints: Endpoints, loopback: bool) -> None:
        """`tls` is what connections begin with, None for plain ones; `loopback`: only this machine can reach
        us."""
        self.contract, self.schema_text, self.redactor = contract, schema_text, redactor
        self.access, self.tls = access, tls
        self.limits = Limits(config.max_request_line, config.max_header_bytes, config.max_header_fields,
                             config.max_body)
        self._config, self._endpoints, self._loopback = config, endpoints, loopback
        self._proxies = networks_of(config.trusted_proxy)
        self._kept: dict = {}
        self._met: set = set()          # hashes of heads that came once
        self._lock = threading.Lock()

    def ruling(self, data: bytes) -> Ruling:
        """The Ruling of a complete head. Never raises.

        Hot path: a sender writes the same head again and again, so equal bytes are judged once (0.1 against
        11 us). One that is signed, or came only once, is not kept: it never comes again, and would drive out
        those that do.
        """
        ruling = self._kept.get(data)
        if ruling is None:
            ruling = self._judge(data)
            if len(data) <= HEAD_KEPT_BYTES and not ruling.check_needs_body:
                self._keep(data, ruling)
        return ruling

    def _keep(self, data: bytes, ruling: Ruling) -> None:
        number = hash(data)
        with self._lock:
            if number in self._met:
                if len(self._kept) >= HEADS_KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[data] = ruling
            elif len(self._met) >= 4 * HEADS_KEPT:
                self._met.clear()
            self._met.add(number)

    def _judge(self, data: bytes) -> Ruling:
        head = Head()
        ruling = Ruling(head)
        try:
            find_head(data, self.limits)
            parse_head(data, head, self.limits)
            self._decide(ruling)
        except Refusal as refusal:
            if head.chunked or head.length:             # the body stays unread
                refusal.close = True
            ruling.refusal = refusal.with_traceback(None)
            with contextlib.suppress(Refusal):
                ruling.pattern = routes_at(head.path)[0][0].path
        if head.method in METHODS:
            ruling.method = head.method
        return ruling

    def _decide(self, ruling: Ruling) -> None:
        """Find what the head alone decides. Raises Refusal."""
        head = ruling.head
        if self._proxies:
            try:
                ruling.forwarded = forwarded_address(head, self._proxies)
            except Malformed as refusal:                # of anybody but a proxy these fields are ignored
                ruling.unclear = refusal.message
        self._check_site(ruling)
        if head.method == "OPTIONS":
            ruling.route = OPTIONS
        else:
            ruling.route, ruling.arguments = match_route(head.method, head.path)
        route, ruling.pattern = ruling.route, ruling.route.path
        ruling.endpoint = getattr(self._endpoints, route.endpoint)
        if route.otherwise:
            ruling.otherwise = getattr(self._endpoints, route.otherwise)
        ruling.caller, ruling.check, ruling.check_needs_body = self.access.judge(head, route.role)
        if head.method == "POST" and head.length is None and not head.chunked:
            # A sender who forgot the length may send a body all the same: it must not pass for a request
            raise Malformed(411, "Content-Length is missing")
        if head.get("content-encoding", "identity").lower() != "identity":
            raise Refusal(415, "The body must not be compressed", fields={"Accept-Encoding": "identity"})
        ruling.ordinary = (route.endpoint == "receive_event" and head.length is not None and
                           head.length <= ORDINARY_BODY and head.keep_alive and head.http11 and
                           not ruling.answer_fields and not ruling.unclear)

    def _check_site(self, ruling: Ruling) -> None:
        """Refuse pages of other sites (Origin, Fetch Metadata), and names that others point at us."""
        head, host = ruling.head, ruling.head.host
        if host and not self._is_ours(host):
            raise _forbidden("The Host {} is not served here", "--allowed-host adds one", host)
        origin = head.get("origin").lower()
        if origin and origin in self._config.allowed_origin:
            ruling.answer_fields = {"Access-Control-Allow-Origin": head.get("origin"), "Vary": "Origin",
                                    "Access-Control-Expose-Headers": "X-Request-ID"}
            return
        # An opaque origin, "null", belongs to no site, so also not to a request without Host
        is_foreign = origin and origin.partition("://")[1:] != ("://", head.get("host").lower())
        if is_foreign or head.get("sec-fetch-site", "none").lower() not in ("none", "same-origin"):
            raise _forbidden("Requests from pages of other sites are refused", "--allowed-origin adds a site")

    def _is_ours(self, host: str) -> bool:
        """Whether we answer to this name. A literal address cannot be pointed elsewhere; a name can."""
        config = self._config
        if LOOPBACK.fullmatch(host) or host == config.host.lower() or host in config.allowed_host:
            return True
        return is_address(host.strip("[]")) or not (self._loopback or config.allowed_host)


def _forbidden(message: str, advice: str, *quoted: str) -> Refusal:
    """A 403 whose sender hears what is refused; what to do about it is the operator's, and in the log."""
    refusal = Refusal(403, message, *quoted)
    refusal.note += "; " + advice
    return refusal


def is_address(text: str) -> bool:
    """Whether `text` is an IP address and no name."""
    try:
        ipaddress.ip_address(text)
        return True
    except ValueError:
        return False


NO_RULING = Ruling(Head())      # of a request whose head could not be read


# =============================================================================
# TLS: certificates, and a connection over TLS that is used as a plain one. Knows sockets, and nothing of HTTP.
# =============================================================================

RECORD = 16384          # bytes of plaintext in one record (RFC 8446 section 5.1)
# what OpenSSL may have to say before the peer takes it, as to one that only asks for new keys
MOST_UNSENT = 4 * RECORD
NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)


class PlainHTTP(Exception):
    """The peer speaks HTTP to a port that takes HTTPS."""


def load_tls(config: Config) -> Optional[ssl.SSLContext]:
    """What connections over TLS begin with; None where none is asked for. Raises SetupError."""
    for name in ("tls_key", "tls_client_ca"):
        if getattr(config, name) and not config.tls_cert:
            raise SetupError(f"{name}: goes with tls_cert")
    if not config.tls_cert:
        return None
    if ssl is None:
        raise SetupError("tls_cert: this Python has no ssl module, which HTTPS needs")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2    # RFC 9325 section 3.1.1
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(["http/1.1"])
    _load_certificate(context, config)
    if config.tls_client_ca:
        _look_into("tls_client_ca", config.tls_client_ca, b"CERTIFICATE-----")
        try:
            context.load_verify_locations(config.tls_client_ca)
        except ssl.SSLError as error:
            raise SetupError(f"tls_client_ca {config.tls_client_ca}: {_reason_of_ssl(error)}") from None
        context.verify_mode = ssl.CERT_OPTIONAL         # who shows none may be known by something else
    return context


def _load_certificate(context: ssl.SSLContext, config: Config) -> None:
    def refuse_passphrase() -> str:
        raise SetupError(f"tls_key {key}: it has a passphrase, and nobody to ask for it: "
                         "openssl pkey -in KEY -out KEY.plain makes one without")

    name = "tls_key" if config.tls_key else "tls_cert"
    key = config.tls_key or config.tls_cert
    _look_into("tls_cert", config.tls_cert, b"CERTIFICATE-----")
    _look_into(name, key, b"PRIVATE KEY-----")
    try:
        context.load_cert_chain(config.tls_cert, key, refuse_passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise SetupError(f"{name} {key}: is not the key of the certificate in {config.tls_cert}") from None
        raise SetupError(f"tls_cert {config.tls_cert}, key {key}: {_reason_of_ssl(error)}") from None


def _look_into(name: str, path: str, mark: bytes) -> None:
    """Raise SetupError unless the file holds what is asked for: OpenSSL's own words name neither."""
    check_place(name, path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise SetupError(f"{name} {path}: {reason_of(error)}") from None
    if mark not in data:
        what = mark.decode().rstrip("-").lower()
        raise SetupError(f"{name} {path}: there is no {what} in it, as PEM (-----BEGIN …)")


def _reason_of_ssl(error: ssl.SSLError) -> str:
    return (error.reason or "cannot be read").replace("_", " ").lower()


class TLSSocket:
    """A connection over TLS with the calls of a socket that we use, so that whoever serves plain ones serves
    it, too: one thread reads, while another may send.

    OpenSSL works on bytes in memory only, behind a lock that nobody holds who waits for the peer. The socket
    beneath never blocks; who has to wait polls. What is encrypted has to leave in that order, so all of it
    passes through `_unsent`.
    """

    def __init__(self, raw: socket.socket, context: ssl.SSLContext) -> None:
        """`raw` stays whoever made it to close."""
        raw.setblocking(False)
        self._raw, self._timeout = raw, None
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._lock = threading.Lock()   # of _tls, _outgoing and _unsent
        self._unsent = bytearray()      # what is encrypted
        self._ahead = 0                 # bytes of what follows that are in _unsent already
        self._early = b""               # what came right behind the handshake
        self.fileno, self.setsockopt = raw.fileno, raw.setsockopt

    def handshake(self) -> tuple:
        """Agree on keys; the names in the client's certificate. Waits for the peer. Raises PlainHTTP, OSError."""
        while True:
            try:
                with self._lock:
                    self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._send_unsent()
            except ssl.SSLError as error:
                with contextlib.suppress(OSError):
                    self._flush()                       # the alert, which tells the peer why
                if error.reason == "HTTP_REQUEST":
                    raise PlainHTTP from None
                raise
            self._wait(reading=True)
            with contextlib.suppress(BlockingIOError):
                self._take_in(2 * RECORD)
        self._send_unsent()
        self._early = self._decrypted() or b""
        return _names_in(self._tls.getpeercert())

    def settimeout(self, seconds: Optional[float]) -> None:
        """How long recv() waits; None for ever."""
        self._timeout = seconds

    def recv(self, size: int, flags: int = 0) -> bytes:
        """As a socket's, but for some bytes more than `size`. With MSG_DONTWAIT it raises BlockingIOError, also
        where what has come is no whole record."""
        while not self._early:
            try:
                self._take_in(size)
            except BlockingIOError:
                if flags:
                    raise
                self._wait(reading=True)
                continue
            data = self._decrypted()
            if data is not None:
                return data
        data, self._early = self._early, b""
        return data

    def send(self, data: bytes, flags: int = 0) -> int:
        """As a socket's with MSG_DONTWAIT: how many bytes have left. Those behind them have to be sent next, as
        some of them are encrypted already. Raises BlockingIOError."""
        with self._lock:
            if not self._flush():
                raise BlockingIOError
            at = self._ahead
            self._ahead = 0
            while at < len(data):
                piece = data[at:at + RECORD]
                self._tls.write(piece)
                if not self._flush():
                    self._ahead = len(piece)
                    return at
                at += len(piece)
            return at

    def sendall(self, data: bytes) -> None:
        """As a socket's: waits for the peer."""
        while len(data):
            try:
                data = data[self.send(data):]
            except BlockingIOError:
                pass
            self._send_unsent()

    def shutdown(self, how: int) -> None:
        """As a socket's; the end of what we send is said in TLS, too (RFC 8446 section 6.1)."""
        if how == socket.SHUT_WR:
            self.say_end()
        self._raw.shutdown(how)

    def say_end(self) -> None:
        """Tell the peer that nothing more is sent, if it takes it at once."""
        with self._lock, contextlib.suppress(OSError):
            with contextlib.suppress(ssl.SSLWantReadError):
                self._tls.unwrap()
            self._flush()

    def _take_in(self, size: int) -> None:
        """What has come, still encrypted. Raises BlockingIOError."""
        data = self._raw.recv(size)
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def _decrypted(self) -> Optional[bytes]:
        """All of what was taken in, so that nothing stays here of which epoll would not tell; b"" at the end,
        None where there is no whole record. Raises OSError for what is no TLS."""
        pieces = []
        with self._lock:
            try:
                while True:
                    piece = self._tls.read(RECORD)
                    if not piece:
                        return b"".join(pieces)
                    pieces.append(piece)
                    if not self._incoming.pending and not self._tls.pending():
                        break
            except ssl.SSLWantReadError:
                pass
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b"".join(pieces)
            if self._outgoing.pending and not self._flush() and len(self._unsent) > MOST_UNSENT:
                raise ConnectionAbortedError("the peer takes nothing")
        return b"".join(pieces) or None

    def _flush(self) -> bool:
        """Send what is encrypted; False where the peer does not take all of it now. For who has the lock."""
        if self._outgoing.pending:
            self._unsent += self._outgoing.read()
        while self._unsent:
            try:
                sent = self._raw.send(self._unsent, NO_SIGNAL)
            except BlockingIOError:
                return False
            del self._unsent[:sent]
        return True

    def _send_unsent(self) -> None:
        """Wait until all that is encrypted has left."""
        while True:
            with self._lock:
                if self._flush():
                    return
            self._wait(reading=False)

    def _wait(self, reading: bool) -> None:
        """Until the socket can be read, or written to. Raises TimeoutError."""
        if hasattr(select, "poll"):
            poll = select.poll()
            poll.register(self._raw, select.POLLIN if reading else select.POLLOUT)
            timeout = self._timeout
            if not poll.poll(timeout if timeout is None else timeout * 1000):
                raise TimeoutError
        else:                                           # Windows
            read, write = ([self._raw], []) if reading else ([], [self._raw])
            if not any(select.select(read, write, [], self._timeout)):
                raise TimeoutError


def _names_in(certificate: Optional[dict]) -> tuple:
    """DNS and URI names of a certificate as getpeercert() gives it, else its common name (RFC 9525 section
    6.3 would look at the former only)."""
    if not certificate:
        return ()
    names = tuple(value for kind, value in certificate.get("subjectAltName", ()) if kind in ("DNS", "URI"))
    parts = itertools.chain.from_iterable(certificate.get("subject", ()))
    return names or tuple(value for kind, value in parts if kind == "commonName")[:1]


# =============================================================================
# Connections: sockets and threads: the poller that leads, connection threads, limits. Knows no route, no SQL.
# =============================================================================

# What each thread may do to the socket of a connection:
#
#     thread        reads         sends                                    shuts down          closes
#     accept        -             a 503, to one too many                   that one            that one
#     connection    when awake    when nothing is owed                     to linger           at its end
#     poller        when parked   answers to what it has committed         -                   -
#     writer        -             answers to what it has committed         -                   -
#     late          -             what did not fit into the socket         -                   -
#     clock         -             -                                        what took too long  -
#     stop()        -             -                                        what is idle        -
#
# A connection is in one phase at a time, and a phase has its time limit:
#
#     CONNECTED  no byte has come               header_timeout
#     IDLE       parked, between requests       idle_timeout
#     HEAD       half a head has come           header_timeout
#     BODY       half a body has come           body_timeout
#     WORK       checking, storing, reading     none: that is our own affair
#     SEND       the peer takes an answer       body_timeout
#     LINGER     refused, may finish sending    LINGER_SECONDS
#
# What must hold, whoever does what:
#
# 1. One thread at a time reads a connection: its own, or while that is parked the poller. Handing over is one
#    release of a lock; there is no moment at which both may read.
# 2. Answers leave in the order of their requests. A submitted event is answered by whoever commits it; its
#    outbox counts how many are owed. The own thread sends only when none is (Outbox.settle), and the poller
#    commits or refuses only events of connections that owe nothing else: all others queue behind those.
# 3. Only the own thread closes a socket, when nothing is owed any more, as the number of a closed one is
#    given away anew.

# Windows has no non-blocking send on a blocking socket: there each connection's thread sends its answers
SENDS_AT_ONCE = hasattr(socket, "MSG_DONTWAIT")
SEND_AT_ONCE = getattr(socket, "MSG_DONTWAIT", 0) | getattr(socket, "MSG_NOSIGNAL", 0)
PIECE = 65536           # bytes of one recv, and of one piece of an answer: what a socket takes at once
LOOK = 256  # connections that the poller reads before it commits: the first of them waits for the last
MAX_PIPELINED = 32      # answers of one connection that may be outstanding before it is read on
READS = 32              # reads of events under way at once; half of them from one address
LARGE_BYTES = 32 * 1024 * 1024  # bytes of large bodies in memory at once; half of them from one address
DRAIN_GRACE = 0.01      # seconds that a new connection has for its first bytes while the service stops
# how long a refused sender may go on sending before we close, so that it can read our answer
LINGER_SECONDS = 2.0
LINGER_BYTES = 16 * 1024 * 1024
LINGERING = 128         # connections that do so at once; half of them from one address
REAP_SECONDS = 0.25     # between looks at the connections' times
REFUSED_KEPT = 128      # refused connections that may read their 503 at leisure
TELL_WAITING = 1.0      # seconds after which a stop says for whom it waits


class Phase:
    """What a connection waits for; most have a time limit, watched by the clock."""
    CONNECTED, IDLE, HEAD, BODY, WORK, SEND, LINGER = range(7)
    DOING = ("connected", "idle", "sending a head", "sending a body", "being served", "taking an answer",
             "refused")


class Budget:
    """How much of something may be in use at once: `most` in all, for one address `each`, or half of it."""

    def __init__(self, most: int, each: int = 0) -> None:
        self.used = 0
        self._most, self._each = most, each or (most + 1) // 2
        self._by_address: dict = {}
        self._lock = threading.Lock()

    def take(self, address: str, amount: int, each: float = 0) -> bool:
        """Use `amount` more, or False: it is too much. `each` goes before what is set for one address."""
        with self._lock:
            mine = self._by_address.get(address, 0) + amount
            if self.used + amount > self._most or mine > (each or self._each):
                return False
            self.used += amount
            self._by_address[address] = mine
            return True

    def give(self, address: str, amount: int) -> None:
        """Use `amount` less."""
        with self._lock:
            self.used -= amount
            self._by_address[address] -= amount
            if not self._by_address[address]:
                del self._by_address[address]


class Outbox:
    """What one connection owes its sender, in order. `owed` answers are still to be made by who commits their
    events.

    The reading thread counts up `promised`, and who commits counts up `sent`: each is written by one thread
    at a time. All that is owed is owed to one `store`, as the answers of two would overtake each other.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.promised = self.sent = 0
        self.store: Optional[Store] = None
        # held until nothing is owed, for a thread that waits for that
        self._settled: Optional[threading.Lock] = None
        self._late: Optional[bytearray] = None          # what did not fit into the socket's buffer
        self._late_lock = threading.Lock()
        self._late_thread: Optional[threading.Thread] = None
        self._late_since = 0.0                          # when its current piece began to be sent

    @property
    def is_full(self) -> bool:
        """Whether so much is outstanding that nothing more is read before it is sent."""
        return self.promised - self.sent > MAX_PIPELINED or self._late_thread is not None

    def promise(self, store: Store) -> None:
        """Count one answer more, which follows a commit of `store`. For the thread that reads, when nothing is
        owed to another store."""
        self.promised += 1
        self.store = store

    def is_stuck(self, now: float, seconds: float) -> bool:
        """Whether the peer has taken nothing of a late answer for `seconds`."""
        return 0.0 < self._late_since < now - seconds

    def send(self, data: bytes) -> None:
        """Called by who commits: send a promised answer, what does not fit by a thread; never blocks."""
        if self._late is None:
            try:
                sent = self._connection.socket.send(data, SEND_AT_ONCE)
            except BlockingIOError:
                sent = 0
            except OSError:                             # gone; its own thread will notice
                sent = len(data)
            data = data[sent:]
        if data:
            self._send_later(data)
        self.sent += 1
        settled = self._settled
        if settled is not None and self.sent == self.promised:
            self._settled = None
            settled.release()

    def settle(self) -> None:
        """Wait until all that is owed was sent. For the thread that reads: nothing is promised meanwhile."""
        if self.sent != self.promised:
            settled = threading.Lock()
            settled.acquire()
            self._settled = settled
            if self.sent != self.promised:  # looked at after it is set: send() sees it, or we see its count
                settled.acquire()
            self._settled = None
        late = self._late_thread
        if late is not None:
            late.join()
            self._late_thread = None

    def _send_later(self, data: bytes) -> None:
        with self._late_lock:
            if self._late is None:
                thread = threading.Thread(target=self._send_late, name="webhook-late", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the system gives no more threads: no answer, rather than half
                    self._connection.shut_down(reading_only=False)
                    return
                self._late, self._late_thread = bytearray(), thread
            self._late += data

    def _send_late(self) -> None:
        while True:
            with self._late_lock:
                data = bytes(self._late)
                if not data:
                    self._late = None
                    return
                del self._late[:]
            self._late_since = time.monotonic()
            try:
                self._connection.socket.sendall(data)
            except OSError:
                self._connection.close_connection = True
            self._late_since = 0.0


class Poller:
    """Reads ordinary events of all idle connections, and commits and answers what one look at them has
    brought.

    Hot path: a thread for each connection has to be woken by the system and then to wait for the
    interpreter's lock, for every request; a thread that only commits has to be woken and waited for, too.
    This one finds many requests ready at each look, and nobody else runs. What is not exactly one whole small
    event wakes the connection's own thread, which may wait for the rest of it; what would keep us waiting, a
    locked database, the store hands to its own thread.
    """

    def __init__(self, server: Server) -> None:
        self._server, self._endpoints = server, server.endpoints
        self._epoll = select.epoll()
        self._connections: dict = {}    # file descriptor: Connection
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._epoll.register(self._wake_receiver.fileno(), select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="webhook-poller", daemon=True)
        self._thread.start()

    def watch(self, connection: Connection) -> bool:
        """Read for `connection` until something comes that is for its own thread: then call its inbox's
        hand_over(). False where the system watches no more: its own thread then has to read."""
        descriptor = connection.socket.fileno()
        self._connections[descriptor] = connection
        try:
            self._epoll.register(descriptor, select.EPOLLIN)
        except OSError:
            del self._connections[descriptor]
            return False
        return True

    def stop(self) -> None:
        """End the thread. No connection may be watched any more."""
        self._wake_sender.close()
        self._thread.join()
        self._wake_receiver.close()
        self._epoll.close()

    def _run(self) -> None:
        poll, connections, take = self._epoll.poll, self._connections, self._take
        stop = self._wake_receiver.fileno()
        while True:
            groups: dict = {}           # {store: what it has to commit}
            for descriptor, _ in poll(-1, LOOK):
                if descriptor == stop:
                    return
                connection, data = connections[descriptor], b""
                try:
                    data = connection.socket.recv(PIECE, socket.MSG_DONTWAIT)
                    if take(connection, data, groups):
                        continue
                except BlockingIOError:
                    continue
                except Exception:       # the end, or a bug: its own thread meets it again and answers
                    pass
                self._epoll.unregister(descriptor)
                del connections[descriptor]
                connection.inbox.hand_over(data)
            for store, group in groups.items():
                try:
                    store.lead(group)
                except Exception:       # a bug: all other connections go on
                    self._endpoints.log.exception("Unexpected error while events were committed")

    def _take(self, connection: Connection, data: bytes, groups: dict) -> bool:
        """Put the one ordinary event in `data` into the group of its store, or refuse it; False for anything
        else."""
        endpoints, outbox = self._endpoints, connection.outbox
        end = data.find(b"\r\n\r\n") + 4
        if not 3 < end <= HEAD_KEPT_BYTES:
            return False
        ruling = endpoints.rules.ruling(data[:end])
        if not ruling.ordinary or len(data) - end != ruling.head.length:
            return False
        if self._server.draining or outbox.is_full:
            return False
        owes = outbox.promised != outbox.sent
        request = Request(ruling, data[end:], endpoints.ids.next(), connection)
        connection.since = request.started
        try:
            if ruling.check is not None:
                ruling.check(request)
            endpoints.receive_event(request)
        except Refusal as refusal:
            if refusal.status == 403:                   # goes into the access log, for which we may not wait
                return False
            request.refusal = refusal
        store = request.caller.store
        if owes and request.refusal is not None:
            store = outbox.store        # there it marks its place behind what came before
        elif owes and store is not outbox.store:
            return False
        outbox.promise(store)
        if owes:
            store.submit(request)
        elif request.refusal is not None:
            connection.deliver(request, PASSED)
        else:
            groups.setdefault(store, []).append(request)
        return True


class Inbox:
    """What comes in on one connection: takes one request after the other out of it."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._socket = connection, connection.socket
        self._server, self._endpoints = connection.server, connection.server.endpoints
        self._buffer = b""                              # what came behind the last request
        self.pipelined = False  # whether requests came before their predecessors were answered
        # While the poller reads for us
        self._parked = threading.Lock()
        self._parked.acquire()
        self._handed = b""

    def wait(self) -> bytes:
        """The first bytes of the next request; b"" where there will be none."""
        if self._buffer:
            return self._buffer
        connection = self._connection
        if connection.phase != Phase.CONNECTED:
            connection.enter(Phase.IDLE)
        # Looked at after the phase is set, as stop() sets `draining` before it looks at phases: one of us
        # sees the other
        if connection.timed_out:
            return b""
        if self._server.draining:                       # what has come already is still answered
            return self.recv_waiting(DRAIN_GRACE)
        poller = self._server.poller
        if connection.phase == Phase.IDLE and poller is not None and poller.watch(connection):
            self._parked.acquire()
            return self._handed
        return self.recv()

    def hand_over(self, data: bytes) -> None:
        """Called by the poller: have wait() go on with `data`, b"" when the peer has ended."""
        self._handed = data
        self._parked.release()

    def read(self, request: Request, buffer: bytes) -> None:
        """Read the request that begins with `buffer`, and keep what follows it. Raises Refusal.

        Hot path: head and body are found by position in what one recv gave, and the head is looked up among
        those seen before (against readline and email.parser: +43 %). What came in pieces goes the slow way.
        """
        end = buffer.find(b"\r\n\r\n") + 4
        if end == 3 or buffer[0] == 13:
            buffer, end = self._more_head(buffer)
        ruling = self._endpoints.rules.ruling(buffer[:end])
        request.ruling, request.caller, head = ruling, ruling.caller, ruling.head
        if self._connection.is_proxy:
            request.address = self._connection.sender = ruling.forwarded or request.address
        if ruling.refusal is not None:
            self._buffer = buffer[end:]
            return
        at = end + (head.length or 0)
        if head.chunked or len(buffer) < at:
            # A small body comes anyway, and behind it may be further requests
            is_small = not head.chunked and not head.expect_continue and head.length <= ORDINARY_BODY
            if not ruling.check_needs_body and not is_small:
                self._admit_early(request)
            request.body = self._more_body(head, buffer[end:])
        else:
            request.body, self._buffer = buffer[end:at], buffer[at:]
        if self._buffer:
            self.pipelined = True

    def _admit_early(self, request: Request) -> None:
        """Refuse who may not send before the body is read: what a stranger sends takes no place from others.
        Raises Refusal, which ends the connection."""
        self._connection.enter(Phase.WORK)
        try:
            self._endpoints.admit(request)
        except Refusal as refusal:
            refusal.close = True
            raise

    def recv(self) -> bytes:
        """What the peer sent, b"" when it ended, broke, or took too long."""
        try:
            return self._socket.recv(PIECE)
        except OSError:
            return b""

    def recv_in_turn(self) -> bytes:
        """As recv, for what may be much: a hundred threads with a piece each would want the interpreter."""
        if not SENDS_AT_ONCE:
            return self.recv()
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        while True:
            poll.poll()
            try:
                with self._endpoints.heavy:
                    return self._socket.recv(PIECE, socket.MSG_DONTWAIT)
            except BlockingIOError:                     # half a record of TLS
                continue
            except OSError:
                return b""

    def recv_waiting(self, seconds: float) -> bytes:
        """What has come already or comes within `seconds`, b"" when that is nothing."""
        with contextlib.suppress(OSError):
            if SENDS_AT_ONCE:  # a timeout would also be one for who sends our answers
                poll = select.poll()
                poll.register(self._socket, select.POLLIN)
                poll.poll(seconds * 1000)
                return self._socket.recv(PIECE, socket.MSG_DONTWAIT)
            self._socket.settimeout(seconds or 0.001)
            try:
                return self._socket.recv(PIECE)
            finally:
                self._socket.settimeout(None)
        return b""

    def _more_head(self, buffer: bytes) -> tuple:
        """(bytes, where the head in them ends), reading on as long as it takes. Raises Malformed."""
        connection = self._connection
        if connection.phase != Phase.CONNECTED:
            connection.since = time.monotonic()
        connection.phase = Phase.HEAD
        limits, piece, looked_at = self._endpoints.rules.limits, buffer, 0
        while True:
            if buffer[:2] == b"\r\n":                   # RFC 9112 section 2.2: empty lines before a request
                buffer = buffer[_EMPTY_LINES.match(buffer).end():]
            # Trickled bytes are looked at when a line ends, or it would cost the square of their number
            if b"\n" in piece or not looked_at or len(buffer) - looked_at > 1024:
                looked_at = len(buffer)
                end = find_head(buffer, limits)
                if end >= 0:
                    return buffer, end
            piece = self.recv()
            if not piece:
                raise self._ended("head", self._server.config.header_timeout)
            buffer += piece

    def _more_body(self, head: Head, begun: bytes) -> bytes:
        """The body, of which `begun` has come; keeps what follows it. Raises Refusal."""
        self._connection.enter(Phase.BODY)
        if head.expect_continue and not begun:
            self._connection.send(b"HTTP/1.1 100 Continue\r\n\r\n", Phase.BODY)
        if head.chunked:
            decoder = ChunkedBody(self._endpoints.rules.limits)
            self._decode(decoder, begun)
            while decoder.rest is None:
                self._decode(decoder, self._recv_body(decoder.kept))
            self._buffer = decoder.rest
            return bytes(decoder.body)
        body = bytearray(begun)
        while len(body) < head.length:
            body += self._recv_body(len(body))
            self._count(min(len(body), head.length))
        self._buffer = bytes(body[head.length:])
        return bytes(body[:head.length])

    def _recv_body(self, have: int) -> bytes:
        """More of a body of which we have `have` bytes."""
        # An ordinary event that comes in two packets waits for nobody's turn
        piece = self.recv() if have <= ORDINARY_BODY else self.recv_in_turn()
        if not piece:
            raise self._ended("body", self._server.config.body_timeout)
        return piece

    def _decode(self, decoder: ChunkedBody, data: bytes) -> None:
        """Decode more of a body; what is much may be very many chunks, and waits for its turn."""
        if decoder.kept + len(data) > ORDINARY_BODY:
            with self._endpoints.heavy:
                decoder.feed(data)
        else:
            decoder.feed(data)
        self._count(decoder.kept)

    def _count(self, have: int) -> None:
        """Count what we keep of a body beyond an ordinary one. Raises Busy."""
        if have > ORDINARY_BODY:
            self._connection.hold(self._server.large, have - ORDINARY_BODY,
                                  "Too many large bodies are being received; try again", close=True)

    def _ended(self, part: str, limit: float) -> Refusal:
        if self._connection.was_cut:
            return Busy("The service is stopping", close=True)
        if self._connection.timed_out:
            return Malformed(408, f"The {part} of the request took longer than {limit:g} seconds")
        return Malformed(400, f"The connection ended before the whole {part} had come")


class Connection(BaseHTTPRequestHandler):
    """One connection, in a thread of its own: reads requests strictly, has them answered, sends.

    Between requests the thread is parked and the poller reads; it wakes this thread for all but ordinary
    events.
    """

    def setup(self) -> None:
        """Called once, before handle(). Raises OSError when the peer is gone already."""
        # For the life of the connection
        self.socket, self.address = self.request, self.client_address[0]
        self.is_proxy = self.server.is_proxy(self.address)
        tls = self.server.endpoints.rules.tls
        if tls is not None:
            self.socket = TLSSocket(self.request, tls)
        self.certificate_names: tuple = ()
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.endpoints: Endpoints = self.server.endpoints
        self.inbox, self.outbox = Inbox(self), Outbox(self)
        self.close_connection = False
        self.lingers = False            # whether it lets the peer finish sending before it closes
        self.timed_out = self.was_cut = False  # set by the clock, or by stop(), which then end our recv
        # For the request that is being read
        self.sender = self.address      # for whom, which is another one where a proxy is the peer
        self.phase, self.since = Phase.CONNECTED, time.monotonic()
        self._held: dict = {}                           # Budget: how much it uses of it
        self.server.opened(self)

    def handle(self) -> None:
        """Requests until one side closes."""
        if self.socket is not self.request:
            self._shake_hands()
        while not self.close_connection:
            self.handle_one_request()
        if self.lingers and self.server.lingering.take(self.address, 1):
            try:
                self._linger()
            finally:
                self.server.lingering.give(self.address, 1)

    def _shake_hands(self) -> None:
        """Begin TLS."""
        try:
            self.certificate_names = self.socket.handshake()
        except PlainHTTP:
            self.socket = self.request
            request = Request(NO_RULING, b"", self.endpoints.ids.next(), self)
            refusal = Malformed(400, "This is HTTPS: use https://")
            self._respond(request, self.endpoints.refused(request, refusal))
        except OSError as error:
            self.close_connection = True
            reason = getattr(error, "reason", None) or reason_of(error)
            self.server.tell("INFO", f"no TLS with {self.address}: {reason.replace('_', ' ').lower()}")

    def finish(self) -> None:
        """Called after handle(), before the socket's number is given to another: nobody sends any more."""
        try:
            self.outbox.settle()
            if self.socket is not self.request:
                self.socket.say_end()
        finally:
            self.server.closed(self)

    def enter(self, phase: int) -> None:
        """From now on the connection waits for something else."""
        self.since, self.phase = time.monotonic(), phase    # in this order: expire() may look in between

    def handle_one_request(self) -> None:
        """Read one request and have it answered."""
        if self.outbox.is_full:
            self.outbox.settle()
        buffer = self.inbox.wait()
        if not buffer:
            self.close_connection = True
            return
        request = Request(NO_RULING, b"", self.endpoints.ids.next(), self, may_wait=True)
        try:
            response = self._answer_to(request, buffer)
            if response is not None:
                self._respond(request, response)
        finally:
            while self._held:
                budget, amount = self._held.popitem()
                budget.give(self.sender, amount)

    def _answer_to(self, request: Request, buffer: bytes) -> Optional[Response]:
        """As _serve, reading the request first; never raises."""
        try:
            self.inbox.read(request, buffer)
            self.phase = Phase.WORK
            return self._serve(request)
        except Exception as error:
            return self.endpoints.failed(request, error)
        finally:
            request.body = b""

    def _serve(self, request: Request) -> Optional[Response]:
        """The answer to a request; None when whoever commits its event will send it. Raises Refusal."""
        ruling = request.ruling
        if ruling.refusal is not None:
            return self.endpoints.refused(request, ruling.refusal)
        direct = ruling.ordinary and SENDS_AT_ONCE and not self.server.draining
        if not direct:
            self.outbox.settle()                        # a pipelined reader sees what was sent before it
        self.endpoints.admit(request)
        if ruling.route.reads:
            self.hold(self.server.reads, 1, "Too many reads are under way; try again")
        response = request.endpoint(request, *ruling.arguments)
        if response is not None:
            return response
        request.arrived = time.monotonic()
        store = request.caller.store
        if direct:
            if store is not self.outbox.store:
                self.outbox.settle()
            self.outbox.promise(store)
            store.submit(request)
            return None
        outcome = store.add(request.event, request.digest)
        return self.endpoints.answer_to_event(request, outcome)

    def hold(self, budget: Budget, amount: int, message: str, close: bool = False) -> None:
        """Use `amount` of a budget, all in all, until the request is answered. Raises Busy."""
        if not budget.take(self.sender, amount - self._held.get(budget, 0)):
            raise Busy(message, close)
        self._held[budget] = amount

    # -- answering

    def deliver(self, request: Request, outcome: Outcome) -> None:
        """Called by who has committed or refused an event: send and log its promised answer. Never blocks on
        a socket, never raises.

        Hot path: waking 64 threads, each to send its own answer, would halve the rate; the disk would not.
        """
        endpoints, sent = self.endpoints, self.outbox.sent
        try:
            if outcome.kind == "stored":
                self.outbox.send(endpoints.stored(request, outcome.event_id))
                endpoints.note(request, 200, "INFO", "stored", outcome.event_id)
            else:
                response = endpoints.answer_to_event(request, outcome)
                self.outbox.send(endpoints.encoded(request, response, False))
                endpoints.note(request, response.status, response.level, response.note, response.event_id)
        except Exception:                               # the others of the group must have their answers
            endpoints.log.exception("An answer could not be sent", request.id)
            if self.outbox.sent == sent:                # nor may anybody wait for this one
                self.shut_down(reading_only=False)
                self.outbox.send(b"")

    def _respond(self, request: Request, response: Response) -> None:
        """Send a Response from this thread, after all answers that are owed."""
        head = request.ruling.head
        close = response.close or not head.keep_alive or self.server.draining or self.timed_out
        if response.streamed and not head.http11:
            close = True                                # HTTP/1.0: the end of the connection ends the body
        note = response.note
        if self.send(self.endpoints.encoded(request, response, close)) and response.streamed:
            note = self._stream(request, response)
            close = close or note != response.note
        self.endpoints.note(request, response.status, response.level, note, response.event_id)
        if close:
            self.close_connection = True
            if response.close or self.inbox.pipelined or self.inbox.recv_waiting(0):  # more may be on its way
                self.lingers = True

    def _stream(self, request: Request, response: Response) -> str:
        """Send the pieces of a body as they are made. Returns the note for the log."""
        head = request.ruling.head
        if head.method == "HEAD":
            return response.note
        try:
            for made in response.body:
                for at in range(0, len(made), PIECE):
                    piece = made[at:at + PIECE]
                    if head.http11:
                        piece = b"%x\r\n%b\r\n" % (len(piece), piece)
                    if not self.send(piece):
                        return "cut by the stop" if self.was_cut else "receiver left"
            if head.http11:
                self.send(b"0\r\n\r\n")
        except Exception as error:  # the status is sent: a missing end tells that it went wrong
            self.endpoints.failed(request, error)
            self.close_connection = True
            return f"broken off: {error}" if isinstance(error, StoreUnavailable) else "broken off"
        return response.note

    def send(self, data: bytes, phase_after: int = Phase.WORK) -> bool:
        """Send all of `data` after what is owed; False when the peer is gone or does not read."""
        self.outbox.settle()
        view = memoryview(data)
        try:
            for at in range(0, len(data), PIECE):       # each has its time, so who reads slowly gets all
                self.enter(Phase.SEND)
                self.socket.sendall(view[at:at + PIECE])
        except OSError:
            self.close_connection = True
            return False
        self.enter(phase_after)
        return True

    def _linger(self) -> None:
        """Let the peer finish sending (RFC 9112 section 9.6): a close on unread bytes destroys our answer."""
        self.enter(Phase.LINGER)
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        size = 0
        while size < LINGER_BYTES and not self.timed_out:
            piece = self.inbox.recv_in_turn()
            if not piece:
                return
            size += len(piece)

    # -- ending, called on other threads

    def expire(self, now: float, limits: dict) -> None:
        """Called by the clock: end what has waited longer than limits[phase]; its thread closes."""
        phase, deaf = self.phase, self.outbox.is_stuck(now, limits[Phase.SEND])
        if deaf or phase in limits and now - self.since > limits[phase]:
            self.timed_out = True                       # again and again: who was slow may be deaf as well
            self.shut_down(reading_only=phase != Phase.SEND and not deaf)

    def end_if_idle(self) -> None:
        """Called by a stop: nothing more has to come."""
        if self.phase in (Phase.CONNECTED, Phase.IDLE):
            self.was_cut = True                         # a head may have begun just now
            self.shut_down(reading_only=True)

    def cut(self) -> None:
        """Called by a stop that has waited long enough."""
        self.was_cut = True
        self.shut_down(reading_only=False)

    def shut_down(self, reading_only: bool) -> None:
        """End what the peer sends, and unless `reading_only` what we send."""
        half = socket.SHUT_RDWR
        if reading_only and os.name == "posix":  # Windows does not wake a recv when only reading is shut down
            half = socket.SHUT_RD
        with contextlib.suppress(OSError):
            self.socket.shutdown(half)


class Server(ThreadingHTTPServer):
    """Accepts connections within the limits, watches their times, ends them."""

    request_queue_size = 1024       # connections that the system takes for us before we accept them
    STACK = 1024 * 1024  # bytes: 512 connections must not want 4 GiB; musl's 128 KiB is short
    STACK_LOCK = threading.Lock()

    def __init__(self, config: Config, endpoints: Endpoints) -> None:
        """Bind and listen. Raises SetupError."""
        self.config, self.endpoints = config, endpoints
        self.draining = False
        self.reads, self.large = Budget(READS), Budget(max(LARGE_BYTES, 2 * config.max_body))
        self.lingering = Budget(LINGERING)
        self._places = Budget(config.max_connections, config.max_connections_per_address)
        self._proxies = networks_of(config.trusted_proxy)
        self.poller: Optional[Poller] = None
        self._selector: Optional[selectors.BaseSelector] = None
        self._lock = threading.Lock()
        self._connections: set = set()
        self._refused: deque = deque()                  # (when to close it, socket)
        self._told_at: dict = {}                        # level: when something was told
        self._accepting = threading.Thread(target=self._accept, name="webhook-accept", daemon=True)
        super().__init__(("", 0), Connection, bind_and_activate=False)
        self.socket.close()                             # made by the base class, for one address
        self.listeners = _listeners(config, self.request_queue_size)
        self._wake_receiver, self._wake_sender = socket.socketpair()
        host, self.port = self.listeners[0].getsockname()[:2]
        self.loopback = all(LOOPBACK.fullmatch(one.getsockname()[0]) for one in self.listeners)
        if len(self.listeners) > 1:
            host = config.host
        host = f"[{host}]" if ":" in host else host
        self.url = f"{'https' if config.tls_cert else 'http'}://{host}:{self.port}"

    def start(self) -> None:
        """Accept from now on, in threads of our own; expire() has to be called every REAP_SECONDS."""
        if SENDS_AT_ONCE and getattr(select, "epoll", None):            # Linux
            self.poller = Poller(self)
        self._selector = selectors.DefaultSelector()    # made in the thread, it would fail where nobody hears
        self._accepting.start()

    # -- accepting

    def _accept(self) -> None:
        with self._selector as selector:
            for listener in self.listeners:
                listener.setblocking(False)
                selector.register(listener, selectors.EVENT_READ)
            selector.register(self._wake_receiver, selectors.EVENT_READ)
            while not self.draining:
                for key, _ in selector.select():
                    if key.fileobj is not self._wake_receiver:
                        self._accept_one(key.fileobj)
        for listener in self.listeners:  # closing the listener would reset what the system has accepted
            for _ in range(self.request_queue_size + 1):     # no more: others may come without end
                if not self._accept_one(listener):
                    break
            listener.close()

    def _accept_one(self, listener: socket.socket) -> bool:
        try:
            connection, address = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self.tell("WARNING", f"cannot accept connections: {advised_reason_of(error)}")
                time.sleep(0.05)                        # the connection stays in the queue; do not spin on it
            return error.errno == errno.ECONNABORTED    # that one is gone, more may wait
        connection.setblocking(True)
        host = address[0]
        if host.startswith("::ffff:"):                  # IPv4 on a listener that takes both
            host = host[7:]
        self.process_request(connection, (host,) + address[1:])
        return True

    def is_proxy(self, address: str) -> bool:
        """Whether this peer says whose requests it sends."""
        return bool(self._proxies) and is_in(address, self._proxies)

    def process_request(self, request: socket.socket, client_address: tuple) -> None:
        """Start a thread for a connection, or refuse it: there are too many, or only proxies may connect."""
        address = client_address[0]
        is_free, is_proxy = LOOPBACK.fullmatch(address) is not None, self.is_proxy(address)
        if self._proxies and not (is_free or is_proxy or self.config.tls_cert):
            self._refuse(request, address, 403, "Only trusted proxies may connect here")
            return
        reason = "There are too many connections"
        # a proxy has the connections of all its senders
        if self._places.take(address, 1, each=math.inf if is_proxy else 0):
            try:
                self._start_thread(request, client_address)
                return
            except RuntimeError:                        # the system gives no more threads
                self._places.give(address, 1)
        elif self._places.used < self.config.max_connections:
            reason += " from your address"
        self._refuse(request, address, 503, reason)

    def _start_thread(self, request: socket.socket, client_address: tuple) -> None:
        thread = threading.Thread(target=self.process_request_thread, args=(request, client_address),
                                  daemon=True)
        with self.STACK_LOCK:  # the size is the whole process's: for all services in it
            before = threading.stack_size(self.STACK)
            try:
                thread.start()
            finally:
                threading.stack_size(before)

    def _refuse(self, connection: socket.socket, address: str, status: int, reason: str) -> None:
        endpoints, head, request_id = self.endpoints, NO_RULING.head, self.endpoints.ids.next()[0]
        document = {"error": REASONS[status], "message": reason, "request_id": request_id}
        response = json_response(document, status, fields=RETRY_AFTER if status == 503 else {})
        with contextlib.suppress(OSError):
            connection.setblocking(False)
            if not self.config.tls_cert:
                connection.send(encode(response, head, request_id, endpoints.date(), {}, True))
            connection.shutdown(socket.SHUT_WR)
        self.tell("WARNING", f"{reason}: refused one from {address} ({self._places.used} are open)")
        self._refused.append((time.monotonic() + 1, connection))
        self._close_refused(0.0)

    def _close_refused(self, before: float) -> None:
        """Close the refused ones whose time ended `before`, and the oldest where there are too many."""
        with self._lock:
            while self._refused and (self._refused[0][0] < before or len(self._refused) > REFUSED_KEPT):
                self._refused.popleft()[1].close()

    def tell(self, level: str, message: str) -> None:
        """Log what befell a connection: once a second, as an attack must not fill the log."""
        if time.monotonic() - self._told_at.get(level, -1.0) > 1:
            self._told_at[level] = time.monotonic()
            self.endpoints.log.line(level, message)

    def process_request_thread(self, request: socket.socket, client_address: tuple) -> None:
        """A connection from setup to close, on its own thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.give(client_address[0], 1)

    def handle_error(self, request: Any, client_address: tuple) -> None:
        """A bug outside of any request, or a peer that was gone before setup."""
        if not isinstance(sys.exc_info()[1], OSError):
            self.endpoints.log.exception("Unexpected error on a connection")

    def opened(self, connection: Connection) -> None:
        """Called by a connection at its start."""
        with self._lock:
            self._connections.add(connection)

    def closed(self, connection: Connection) -> None:
        """Called by a connection at its end."""
        with self._lock:
            self._connections.discard(connection)

    @property
    def open_connections(self) -> list:
        """The connections that are open now."""
        with self._lock:
            return list(self._connections)

    # -- ending

    def expire(self) -> None:
        """Called every REAP_SECONDS: end what has taken too long."""
        config, now = self.config, time.monotonic()
        limits = {Phase.CONNECTED: config.header_timeout, Phase.IDLE: config.idle_timeout,
                  Phase.HEAD: config.header_timeout, Phase.BODY: config.body_timeout,
                  Phase.SEND: config.body_timeout, Phase.LINGER: LINGER_SECONDS}
        with self._lock:                                # so that none of them is closed meanwhile
            for connection in self._connections:
                connection.expire(now, limits)
        self._close_refused(now)

    def stop(self, seconds: float, on_wait: Callable[[str], None] = lambda text: None) -> int:
        """Accept no more, answer what has come, end idle connections; after `seconds` cut all. Returns how
        many were cut.

        `on_wait(text)` is told for whom a stop waits, when it does not end within a second.
        """
        began, told = time.monotonic(), False
        self.draining = True
        self._wake_sender.close()
        if self._accepting.ident is not None:
            self._accepting.join()
        self.server_close()
        while self._places.used and time.monotonic() < began + seconds:
            with self._lock:
                for connection in self._connections:
                    connection.end_if_idle()
            if not told and time.monotonic() > began + TELL_WAITING:
                told = True
                on_wait(self._waiting_for())
            time.sleep(0.01)
        with self._lock:
            for connection in self._connections:
                connection.cut()
            cut = len(self._connections)
        while self._places.used and time.monotonic() < began + seconds + 1:
            time.sleep(0.01)
        if self.poller is not None and not self._places.used:
            self.poller.stop()
        self._close_refused(math.inf)
        return cut

    def _waiting_for(self) -> str:
        waiting = [f"{one.address} ({Phase.DOING[one.phase]})" for one in self.open_connections]
        more = f" and {len(waiting) - 5} more" * (len(waiting) > 5)
        plural = "s" * (len(waiting) != 1)
        return f"{len(waiting)} connection{plural}: {', '.join(waiting[:5])}{more}"

    def server_close(self) -> None:
        """Close the listeners."""
        if self._selector is not None:
            self._selector.close()
        for listener in self.listeners:
            listener.close()
        self._wake_sender.close()
        self._wake_receiver.close()


def _listeners(config: Config, backlog: int) -> list:
    """A listener for each address of the host, all on one port: localhost is 127.0.0.1 and ::1."""
    listeners, port = [], config.port
    try:
        found = socket.getaddrinfo(config.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((one[0], one[4]) for one in found):
            try:
                listeners.append(_listener(family, (address[0], port) + address[2:], backlog))
                port = port or listeners[0].getsockname()[1]
            except OSError as error:
                # A name may have an address of a family that this machine does not speak
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) or len(found) == 1:
                    raise
        if not listeners:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    except (OSError, UnicodeError) as error:
        for listener in listeners:
            listener.close()
        reason = _why_not_listening(error)
        raise SetupError(f"cannot listen on {config.host} port {config.port}: {reason}") from None
    return listeners


def _listener(family: int, address: tuple, backlog: int) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_INET6:
            # "::" takes IPv4 too; beside other listeners each takes its own family
            with contextlib.suppress(OSError, AttributeError):
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address[0] != "::"))
        if os.name == "posix":                      # on Windows it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(backlog)
    except OSError:
        listener.close()
        raise
    return listener


def _why_not_listening(error: Exception) -> str:
    """What the operator can do about it."""
    number = getattr(error, "errno", None)
    if number == errno.EADDRINUSE:
        return "the port is in use by another program; choose another with --port"
    if number in (errno.EACCES, errno.EPERM):
        return "this user may not take a port below 1024; choose another with --port, or put a proxy in front"
    if number == errno.EADDRNOTAVAIL:
        return "no network interface of this machine has that address; 0.0.0.0 is all of them"
    if isinstance(error, socket.gaierror):
        return f"that name leads to no address ({error.strerror})"
    return advised_reason_of(error)


# =============================================================================
# Service: makes the parts, hands them to each other, starts and stops them. Two can live in one process.
# =============================================================================

class Callbacks:
    """Runs on_event for each stored event, in order, on a thread of its own.

    Commits never wait for it: at most 10,000 events do, or 64 MiB of them. What comes beyond is not handed
    over; the log names it, and trouble() tells of it.
    """
    WAITING = 10000                     # events: some 20 MB of ordinary ones
    WAITING_BYTES = 64 * 1024 * 1024    # of payloads: a sender may make them large
    LONG = 30.0                         # seconds: a call that lasts longer is trouble
    PAUSE = 1.0                         # seconds between lines about what was not handed over

    def __init__(self, on_event: Callable[[AppointmentEvent], object], log: Log,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._on_event, self._log, self._clock = on_event, log, clock
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._bytes = 0                         # of the payloads in the queue
        self._lock = threading.Lock()
        self._call: Optional[tuple] = None      # (id of the event, when it began) of the call under way
        self._lost = 0                          # events not handed over since it had caught up last
        self._first_lost = self._last_lost = 0  # the first and the last of them, ids
        self._untold = 0                        # those of them that no line has told of
        self._told_at = -self.PAUSE
        self._given_up = False
        self._thread = threading.Thread(target=self._run, name="webhook-callbacks", daemon=True)

    def start(self) -> None:
        """Start calling."""
        self._thread.start()

    def put(self, event: AppointmentEvent) -> None:
        """Hand an event over. Called by the thread that commits, so it never waits."""
        size = len(event.payload)
        with self._lock:
            fits = not self._bytes or self._bytes + size <= self.WAITING_BYTES
            if fits and self._queue.qsize() < self.WAITING:
                self._bytes += size
                self._queue.put(event)
                return
        self._lose(event)

    def stop(self, seconds: float, on_wait: Callable[[str], None]) -> None:
        """Call for what is queued, then end; after `seconds` give up and say in the log for what it waited.

        `on_wait(text)` is told for whom it waits, once that lasts longer than a moment.
        """
        if self._thread.ident is None:          # it never started
            return
        self._queue.put(None)
        moment = min(1.0, seconds)
        self._thread.join(moment)
        if self._thread.is_alive():
            on_wait(f"on_event, which has {self._work()}")
            self._thread.join(seconds - moment)
        if self._thread.is_alive():
            self._given_up = True
            lost = self._lost + max(0, self._queue.qsize() - 1)     # the last one is our None
            self._log.line("ERROR", f"Stop does not wait for on_event any longer, which has {self._work()}; "
                                    f"{were_not(lost)} handed to it")

    def trouble(self) -> str:
        """"" while all is well, else for /health: how long on_event has been busy, and how much it missed."""
        call, lost = self._call, self._lost
        if call is None or not lost and self._clock() - call[1] < self.LONG:
            return ""
        return f"on_event has {self._work()}" + (f"; {were_not(lost)} handed to it" if lost else "")

    def is_calling(self) -> bool:
        """Whether this code was called by on_event."""
        return threading.current_thread() is self._thread

    def _work(self) -> str:
        call = self._call
        if call is None:
            return "just been called"
        return f"been busy with event {call[0]} for {self._clock() - call[1]:.0f} s"

    def _lose(self, event: AppointmentEvent) -> None:
        with self._lock:
            if not self._lost:
                self._first_lost = event.id
            self._lost, self._last_lost = self._lost + 1, event.id
            self._untold += 1
            now = self._clock()
            if now - self._told_at < self.PAUSE:
                return
            untold, self._untold, self._told_at = self._untold, 0, now
        text = f"event {event.id} was not handed to it"
        if untold > 1:
            text = f"{were_not(untold)} handed to it since the last such line, the last is event {event.id}"
        waiting = self._queue.qsize()
        self._log.line("WARNING", f"on_event has {self._work()} while {waiting} events wait: {text}")

    def _run(self) -> None:
        for event in iter(self._queue.get, None):
            if self._given_up:
                return
            self._call = (event.id, self._clock())
            with self._lock:
                self._bytes -= len(event.payload)
            self._run_one(event)
            if self._queue.empty():
                self._caught_up()
        self._caught_up()

    def _run_one(self, event: AppointmentEvent) -> None:
        try:
            result = self._on_event(event)
            if inspect.iscoroutine(result):
                result.close()
                raise TypeError("it returned a coroutine, which nobody awaits")
        except BaseException:                   # foreign code: not even its sys.exit() may end this thread
            self._log.exception(f"on_event failed for event {event.id}")

    def _caught_up(self) -> None:
        self._call = None
        with self._lock:
            lost, self._lost, self._untold = self._lost, 0, 0
        if lost:
            self._log.line("WARNING", f"on_event has caught up; {were_not(lost)} handed to it, from id "
                                      f"{self._first_lost} to {self._last_lost}: read them in the database")


def were_not(events: int) -> str:
    """"1 event was not", "3 events were not"."""
    return "1 event was not" if events == 1 else f"{events} events were not"


def _refuse_parts(config: Any, on_event: Any, logger: Any) -> None:
    """Raises SetupError for what a program around us handed over and what could only fail later."""
    functions = (on_event, type(on_event).__call__)
    for is_fine, expected in (
            (isinstance(config, Config),
             f"config must be a Config, such as Config(port=8000), not a {type(config).__name__}"),
            (logger is None or callable(getattr(logger, "log", None)),
             f'logger must be a logger, such as logging.getLogger("webhook"), not a {type(logger).__name__}'),
            (on_event is None or callable(on_event),
             f"on_event must be a function that takes an event, not a {type(on_event).__name__}"),
            (not any(map(inspect.iscoroutinefunction, functions)) and
             not any(map(inspect.isasyncgenfunction, functions)),
             "on_event is an async def, which nobody would await: hand over a plain function "
             "such as lambda event: asyncio.run_coroutine_threadsafe(handle(event), loop)"),
            (not any(map(inspect.isgeneratorfunction, functions)),
             "on_event is a generator (it has a yield), which nobody would run: hand over a plain function")):
        if not is_fine:
            raise SetupError(expected)


def read_schema(path: str) -> tuple:
    """(Contract, text of the schema as bytes, warnings) of the file, or of schema.json beside the program.

    Raises SetupError that names file, place and reason. Where no `path` is named and no schema.json is there,
    the built-in schema stands in, with a warning.
    """
    file, warnings = path or str(DEFAULT_SCHEMA_FILE), []
    where = f"schema {file}"
    check_place("schema", file)
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        # One that is there and cannot be read was meant: to take another would be a surprise
        if path or not isinstance(error, FileNotFoundError):
            raise SetupError(f"{where}: {error.strerror}") from None
        warnings.append(f"{where} is missing: the built-in schema is used")
        data = json.dumps(EVENT_SCHEMA, indent=2, allow_nan=False).encode()
    try:
        document = parse_json(data, sys.maxsize)[0]
        contract = Contract(document)
    except (JSONError, SchemaError) as error:
        raise SetupError(f"{where}: {error}") from None
    notes = list(contract.schema.notes)
    if isinstance(document, dict) and document.get("$schema", DRAFT).rstrip("#") != DRAFT:
        notes.append(f"it says that it follows {document['$schema']}, but is read by draft 2020-12")
    missed = {problem.path for problem in contract.schema.errors({})}
    notes += [f"{name} is not required by it, but events without it are refused anyway"
              for name in REQUIRED_FIELDS if "/" + name not in missed]
    return contract, data, warnings + [f"{where}: {note}" for note in notes]


def check_of(trouble: str) -> dict:
    """A check of /health: well, or with its trouble."""
    return {"status": "failing", "message": trouble} if trouble else {"status": "ok"}


def check_disk(database: str) -> dict:
    """Write and delete a small file beside the database."""
    folder = os.path.dirname(database)
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(65536))
            probe.flush()
            os.fsync(probe.fileno())
        return {"status": "ok", "free_bytes": shutil.disk_usage(folder).free}
    except OSError as error:
        return check_of(reason_of(error))


def _disk_found(disk: Checkup, wait: float) -> dict:
    """What the disk's check says; a disk that hangs is one that fails."""
    found, under_way = disk.result(wait)
    if under_way > 2.0:
        return check_of(f"a write has not ended for {under_way:.0f} s")
    return found or check_of("")


class Stores:
    """The stores of all tenants, by name; "" is the default one. Each has a database and a writer of its own,
    so that no lock, no failure and no id of one shows in another. Once open they stay so until stop()."""
    TENANT_CACHE_KIB = 8192             # of pages: fifty tenants may have as many databases

    def __init__(self, config: Config, make: Callable[[SQLite, str], Store], tell: Callable[[str], Any],
                 on_error: Callable[[str], Any]) -> None:
        """`make(engine, tenant)` gives a Store that has not been opened; tell(text) hears the seals."""
        self._database, self._make, self._tell, self._on_error = config.database, make, tell, on_error
        self.default = make(SQLite(config.database), "")
        self._open: dict = {}           # tenant: Store
        self._ledgers: dict = {}        # tenant: its Ledger

    def open(self, tenants: Iterable, encryption: Optional[Encryption]) -> list:
        """Open and start those that are not, and have all use these keys. Returns what opening had to tell, line
        by line. Raises SetupError; then all is as before."""
        opened, ledgers, notes = {}, {}, []
        for store in self._open.values():
            store.engine.refuse_keys(encryption)
        try:
            for tenant in tenants:
                if tenant not in self._open and tenant not in opened:
                    store = self.default
                    if tenant:
                        engine = SQLite(database_of(self._database, tenant), self.TENANT_CACHE_KIB)
                        store = self._make(engine, tenant)
                    store.engine.encryption = encryption
                    store.open()
                    opened[tenant] = store
                    store.start()
                    notes += store.engine.notes
            for tenant, store in opened.items():
                ledgers[tenant] = Ledger(store, functools.partial(self._tell_seal, tenant), self._on_error)
                ledgers[tenant].start()
        except BaseException as error:
            for ledger in ledgers.values():
                ledger.stop()
            for store in opened.values():
                store.stop()
            if isinstance(error, StoreUnavailable):
                raise SetupError(f"database: {error}") from None
            raise
        self._open, self._ledgers = {**self._open, **opened}, {**self._ledgers, **ledgers}
        for store in self._open.values():
            store.engine.encryption = encryption
        return notes

    def nobody_of(self, tenant: str) -> Optional[Caller]:
        """A Caller of a tenant without a name; None where there is no such tenant."""
        if tenant not in self._open:
            return None
        return Caller("", self._open[tenant], self._ledgers[tenant])

    def _tell_seal(self, tenant: str, text: str) -> None:
        self._tell(text + f" of {tenant}" * bool(tenant))

    def purge(self, days: int, tables: Iterable) -> int:
        """Remove from all what came more than so many days ago; how many rows. Raises SetupError."""
        before = (datetime.now(timezone.utc) - timedelta(days=days)).strftime("%Y-%m-%dT%H:%M:%SZ")
        return sum(purge_database(store.engine.path, store.engine.encryption, before, tables)
                   for store in list(self._open.values()))

    def checks_for(self, store: Store) -> dict:
        """The checks of /health of the databases that may be seen by who uses `store`."""
        checks = {"database": functools.partial(_check_of_store, store)}
        if store is self.default:
            checks.update((f"database of {tenant}", functools.partial(_check_of_store, other))
                          for tenant, other in self._open.items() if tenant)
        return checks

    def stop(self) -> None:
        """Seal the rest, commit what was submitted, and close them all."""
        for ledger in self._ledgers.values():
            ledger.stop()
        for store in {self.default, *self._open.values()}:
            store.stop()


def database_of(path: str, tenant: str) -> str:
    """The file of a tenant, beside that of the default one: appointments.north.db beside appointments.db."""
    stem, suffix = os.path.splitext(path)
    return f"{stem}.{tenant}{suffix}"


def _check_of_store(store: Store, wait: float) -> dict:
    return {**check_of(store.health(wait)), "breaker": store.breaker_state}


class FilesRead(NamedTuple):
    """What the files say that an operator may change while the service runs; no `clients` in open mode."""
    contract: Contract
    schema_text: bytes
    clients: Optional[ClientsFile]
    tokens: Optional[Tokens]
    tls: Any
    encryption: Optional[Encryption]
    warnings: list

    @property
    def tenants(self) -> list:
        """The tenants that the clients belong to, the default one first."""
        clients = self.clients.clients if self.clients is not None else []
        return ["", *sorted({client.tenant for client in clients} - {""})]

    def begin(self, before: Optional[FilesRead] = None) -> None:
        """Have what runs by these files run; it goes on with what was found by those of `before`."""
        if self.tokens is not None:
            if before is not None and before.tokens is not None:
                self.tokens.adopt(before.tokens)
            self.tokens.start()

    def end(self) -> None:
        """End what begin() has begun."""
        if self.tokens is not None:
            self.tokens.stop()

    def checks(self) -> dict:
        """The checks of /health that follow from these files."""
        tokens = self.tokens
        if tokens is None or not tokens.breaker:
            return {}
        return {"oauth": lambda wait: {**check_of(tokens.trouble), "breaker": tokens.breaker}}

    def summary(self) -> str:
        """In a few words, for the log."""
        parts = ["schema"]
        if self.clients is not None:
            parts.append(f"{len(self.clients.clients)} clients")
        if self.tls is not None:
            parts.append("certificate")
        if self.encryption is not None:
            parts.append(f"encryption key {self.encryption.key_id}")
        return ", ".join(parts)


def read_files(config: Config, tell: Callable[[str, str], Any], on_error: Callable[[str], Any]) -> FilesRead:
    """All of them, or none. Raises SetupError that names file, place and reason. What runs by them later tells
    tell(level, text) and on_error(name) of its troubles."""
    contract, schema_text, warnings = read_schema(config.schema)
    clients = tokens = None
    if config.clients:
        clients = read_clients(config.clients, bool(config.tls_client_ca))
        warnings += warn_if_others_can_read("clients", config.clients)
        if clients.oauth is not None:
            folder = os.path.dirname(os.path.abspath(config.clients))
            tokens = Tokens(clients.oauth, folder, None, tell, on_error=on_error)
            if "client_secret_file" in clients.oauth:
                path = os.path.join(folder, clients.oauth["client_secret_file"])
                warnings += warn_if_others_can_read("clients: /oauth/client_secret_file", path)
    encryption = None
    if config.encryption_key_file:
        keys = read_encryption_keys(config.encryption_key_file)
        encryption = Encryption(keys, tell=lambda text: tell("ERROR", text))
        warnings += warn_if_others_can_read("encryption_key_file", config.encryption_key_file)
    return FilesRead(contract, schema_text, clients, tokens, load_tls(config), encryption, warnings)


def warn_if_others_can_read(name: str, path: PathText) -> list:
    """A warning, in a list, about a file with secrets that others than its owner can read."""
    if os.name != "posix" or not os.stat(path).st_mode & 0o077:
        return []
    return [f"{name} {path}: others than its owner can read or write it; chmod 600 {path}"]


def warnings_of_open_door(config: Config, loopback: bool) -> list:
    """What to warn of where other machines can connect. Raises SetupError where nothing says who of them may
    do what, and that was not asked for."""
    if loopback or config.clients and (config.tls_cert or config.trusted_proxy):
        return []
    if config.insecure:
        return ["Other machines can connect, and what they send is not kept from others, or nobody is asked who "
                "they are (insecure): use clients, with tls_cert or trusted_proxy"]
    raise SetupError(f"host {config.host}: other machines can connect to it, so it takes --clients FILE (who may "
                     "do what) with --tls-cert FILE (HTTPS) or --trusted-proxy NETWORK (a proxy that speaks it), "
                     "or else --insecure")


class WebhookServer:
    """The whole service, to be embedded or run by the command line.

        with WebhookServer(Config(port=0, database="events.db"), on_event=callback) as server:
            print(server.url)           # http://127.0.0.1:49152

    `on_event(event)` gets each AppointmentEvent after its commit, in order, on a thread of its own; stop()
    waits until it was called for all that was stored, for shutdown_timeout at most. `logger` takes the log
    instead of stderr or log_file. Starts once; raises SetupError when something keeps it from starting. It
    touches no signal: those are the affair of the program around it.
    """

    def __init__(self, config: Optional[Config] = None,
                 on_event: Optional[Callable[[AppointmentEvent], object]] = None,
                 logger: Union[logging.Logger, logging.LoggerAdapter[Any], None] = None) -> None:
        if config is None:
            config = Config()
        _refuse_parts(config, on_event, logger)
        config.check_files()
        # The readers open the file later: by then the program around us may be in another folder
        self.config = config = dataclasses.replace(config, database=os.path.abspath(config.database))
        self._files = self._read_files()
        self.warnings = self._files.warnings        # the log gets them at start
        self.log = Log(_sink_of(config, logger), config.log_level, config.log_payloads)
        self._callbacks: Optional[Callbacks] = None
        on_stored = None
        if on_event is not None:
            self._callbacks = Callbacks(on_event, self.log)
            on_stored = self._callbacks.put
        self._stores = Stores(config, lambda engine, tenant: Store(
            engine, config.busy_timeout, on_stored, functools.partial(self._tell_trouble, tenant), self._tell_bug),
            lambda text: self.log.line("INFO", text), self._tell_bug)
        self._checks = self._own_checks()
        self._endpoints = Endpoints(config, self.log, self._checks_of)
        self._clock = Clock(self._tell_bug)
        self._server: Optional[Server] = None
        self._lock = threading.RLock()              # a signal handler may call stop() in the midst of stop()
        self._started = False
        self._running = contextlib.ExitStack()      # what ends each part, the last one started on top
        self._running.callback(self.log.stop)

    @property
    def url(self) -> str:
        """Where it listens, such as http://127.0.0.1:8000. Known once it has started."""
        return self._bound().url

    @property
    def port(self) -> int:
        """The port that it has, also where 0 was asked for. Known once it has started."""
        return self._bound().port

    @property
    def store(self) -> Store:
        """That of the default tenant."""
        return self._stores.default

    def _bound(self) -> Server:
        if self._server is None:
            raise RuntimeError("this WebhookServer has not started")
        return self._server

    def start(self) -> WebhookServer:
        """Listen. Raises SetupError; then nothing runs, and nothing was made but perhaps the files named."""
        with self._lock:
            if self._started:
                raise RuntimeError("a WebhookServer starts once; make another one")
            self._started = True
            try:
                self._start_parts()
            except BaseException as error:
                self._running.close()
                # The system gives no more threads or files
                if isinstance(error, (RuntimeError, OSError, StoreUnavailable)):
                    raise SetupError(f"cannot start: {advised_reason_of(error)}") from None
                raise
        return self

    def _start_parts(self) -> None:
        running = self._running
        # the port first: a busy one must not touch the database
        server = Server(self.config, self._endpoints)
        running.callback(server.server_close)
        self._endpoints.warnings = warnings_of_open_door(self.config, server.loopback)
        running.callback(self._say_stopped)
        if self._callbacks is not None:
            running.callback(self._callbacks.stop, self.config.shutdown_timeout, self._tell_wait)
        running.callback(self._stores.stop)
        notes = self._stores.open(self._files.tenants, self._files.encryption)
        self._endpoints.rules = self._make_rules(self._files, server.loopback)
        self.log.start()
        running.callback(lambda: self._files.end())
        self._files.begin()
        for warning in self.warnings + self._endpoints.warnings + notes:
            self.log.line("WARNING", warning)
        if self._callbacks is not None:
            self._callbacks.start()
        if self.config.retention_days or self.config.access_log_retention_days:
            purging = Loop("retention", self._purge_old, 86400.0, self._tell_bug)
            running.callback(purging.stop)
            purging.start()
            purging.wake()
        self._clock.every(REAP_SECONDS, "reaper", server.expire)
        self._clock.start()
        running.callback(self._clock.stop)
        running.callback(self._drain, server)
        server.start()
        self._server = server
        self.log.line("INFO", f"Service started on {server.url}, database {self.config.database} "
                              f"({self._contents()})")

    def _read_files(self) -> FilesRead:
        return read_files(self.config, lambda level, text: self.log.line(level, text), self._tell_bug)

    def _make_rules(self, files: FilesRead, loopback: bool) -> Rules:
        access: Any = OpenAccess(self.store, self.config.rate_limit)
        if files.clients is not None:
            access = Access(files.clients.clients, files.tokens, self._stores.nobody_of, self.config.rate_limit)
        redactor = Redactor(self.config.log_payloads, files.contract.personal_fields)
        return Rules(self.config, files.contract, files.schema_text, redactor, access, files.tls,
                     self._endpoints, loopback)

    def reload(self) -> bool:
        """Read schema, clients file, certificates and encryption keys anew, all or none, and go on in a new log
        file where the old one was moved away. Whether they could be taken: what is wrong is an ERROR in the log,
        and the old ones go on."""
        self.log.reopen()
        server = self._bound()
        try:
            files = self._read_files()
            notes = self._stores.open(files.tenants, files.encryption)
        except SetupError as error:
            self.log.line("ERROR", f"Nothing was reloaded, the settings of before go on: {error}")
            return False
        for warning in files.warnings + notes:
            self.log.line("WARNING", warning)
        files.begin(self._files)
        self._endpoints.rules = self._make_rules(files, server.loopback)
        self._files, before = files, self._files
        before.end()
        self.log.line("INFO", f"Reloaded: {files.summary()}")
        if files.clients is not None:
            try:
                self._stores.nobody_of("").ledger.record("reload", detail=files.summary())
            except StoreUnavailable as error:
                self.log.line("ERROR", f"The reload is not in the access log: {error}")
        return True

    def _checks_of(self, store: Store) -> dict:
        """The checks of /health for who uses `store`."""
        return {**self._stores.checks_for(store), **self._checks, **self._files.checks()}

    def _own_checks(self) -> dict:
        """Those that are the same for all: each takes the seconds that it may wait."""
        disk = Checkup("disk", lambda: check_disk(self.config.database))
        checks = {"disk": lambda wait: _disk_found(disk, wait),
                  "log": lambda wait: check_of(self.log.trouble()),
                  "service": lambda wait: check_of(self._stopping())}
        if self._callbacks is not None:
            checks["on_event"] = lambda wait: check_of(self._callbacks.trouble())
        return checks

    def _stopping(self) -> str:
        return "stopping" if self._server is not None and self._server.draining else ""

    def _tell_bug(self, name: str) -> None:
        self.log.exception(f"Unexpected error in {name}")

    def _contents(self) -> str:
        tenants = "".join(f", tenant {tenant}" for tenant in self._files.tenants if tenant)
        if self.store.engine.is_new:
            return "new" + tenants
        count = self.store.count()
        return f"{count} event{'s' * (count != 1)}" + tenants

    def stop(self) -> None:
        """Accept no more, answer what is in flight, commit, call on_event for the rest, flush the log.

        It waits for those in flight and then for on_event, at most shutdown_timeout each; the log says for
        whom. May be called at any time, from any thread and more than once: a second call waits until all is
        done. Called by on_event itself it returns at once, as on_event has to return before all is done. A
        program of asyncio calls `await asyncio.to_thread(server.stop)`, so that its loop goes on meanwhile.
        """
        if self._callbacks is not None and self._callbacks.is_calling():
            threading.Thread(target=self.stop, name="webhook-stop").start()
            return
        with self._lock:
            self._started = True                        # one that was stopped does not start any more
            self._running.close()

    def reopen_log(self) -> None:
        """Go on in a new log file under the same name, after something else has moved the old one away."""
        self.log.reopen()

    def _say_stopped(self) -> None:
        if self._server is not None:                    # a start that failed has nothing to say
            self.log.line("INFO", "Service stopped")

    def _drain(self, server: Server) -> None:
        cut = server.stop(self.config.shutdown_timeout, self._tell_wait)
        if cut:
            self.log.line("WARNING", f"connections cut after {self.config.shutdown_timeout:g} seconds: {cut}")

    def _purge_old(self) -> None:
        """The daily removal of what is too old."""
        terms = ((self.config.retention_days, PURGED_TABLES, "events and conflicts"),
                 (self.config.access_log_retention_days, ("access_log",), "rows of the access log"))
        for days, tables, what in terms:
            if days:
                try:
                    self.log.line("INFO", f"Removed {self._stores.purge(days, tables)} {what} older than {days} days")
                except SetupError as error:
                    self.log.line("ERROR", f"What is older than {days} days could not be removed: {error}")

    def _tell_wait(self, whom: str) -> None:
        self.log.line("INFO", f"Stop waits for {whom}; {self.config.shutdown_timeout:g} s at most")

    def __enter__(self) -> WebhookServer:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _tell_trouble(self, tenant: str, trouble: str) -> None:
        whose = f"Events of {tenant}" if tenant else "Events"
        if trouble:
            self.log.line("ERROR", f"{whose} cannot be stored and are answered 503, so that senders try again: "
                                   f"{trouble}")
        else:
            self.log.line("INFO", f"{whose} are stored again")


def _sink_of(config: Config, logger: Any) -> Any:
    """Where log lines go. Raises SetupError."""
    if logger is not None:
        return LoggerSink(logger)
    if config.log_file:
        return FileSink(config.log_file, config.log_max_bytes, config.log_backups)
    return StreamSink()


# =============================================================================
# Command line: serve, check, send, keygen, verify, purge, rekey, bench. Knows terminals, signals and exit codes.
# =============================================================================

EXIT_FINE, EXIT_NO, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

EXAMPLES = """examples:
  python3 webhook_server.py             take events on http://127.0.0.1:8000
  python3 webhook_server.py --port 9000 --database /srv/events.db
  python3 webhook_server.py send        post a test event to the server above
  python3 webhook_server.py check FILE  would the events in FILE be taken?"""


class Parser(argparse.ArgumentParser):
    """Takes flags in full only, is at most 80 columns wide, and leaves the line for a mistake to main()."""

    def __init__(self, **options: Any) -> None:
        columns = min(80, shutil.get_terminal_size().columns)
        super().__init__(allow_abbrev=False, formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=32, width=columns - 2), **options)

    def error(self, message: str) -> None:
        raise SetupError(": ".join(self.prog.split()[1:] + [f"{message} (--help shows how)"]))

    def refuse(self, word: str) -> None:
        """Raises SetupError for a word that nothing takes."""
        flag = word.partition("=")[0]
        if not flag.startswith("-"):
            self.error(f"{word or repr(word)} is one word too many")
        known = [action.dest for action in self._actions if action.option_strings]
        name = flag.lstrip("-").replace("-", "_").lower()
        raise SetupError(f"{self.prog.split()[-1]} takes no {flag}; {did_you_mean(name, known, flag_of)}")


def _complain(message: str) -> int:
    """One line on stderr for the person at the keyboard; gives the exit code for it."""
    try:
        print(f"webhook_server.py: {printable(message, 1000)}", file=sys.stderr, flush=True)
    except OSError:
        _silence(sys.stderr)
    return EXIT_USAGE


def _silence(stream: Any) -> None:
    """Let what waits in a stream that cannot be written go nowhere: Python would try again, and exit 120."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# -- serve

SAME_SIGNAL = 0.1       # seconds: some supervisors signal a process and, a moment later, the group it leads
# Python's 5 ms are how long a thread that checks a megabyte keeps the interpreter from those that only answer
SWITCH_SECONDS = 0.001


def add_settings(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting of Config, in its groups."""
    group: Any = parser.add_argument_group("settings", "Each can also come from the environment, "
                                           "--busy-timeout as\nWEBHOOK_BUSY_TIMEOUT; a flag wins.")
    for field in dataclasses.fields(Config):
        about = field.metadata
        if about["group"]:
            group = parser.add_argument_group(about["group"])
        default, how = f" (default: {field.default})", {"metavar": about["metavar"]}
        if field.default is False:                      # a flag alone
            default, how = "", {"action": "store_const", "const": "yes"}
        elif field.default == ():
            default, how["action"] = "", "append"
        elif field.default == "":
            default = ""
        group.add_argument(flag_of(field.name), dest=field.name, **how,
                           help=(about["help"] + default).replace("%", "%%"))


def run_serve(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; a second one exits at once. SIGHUP reloads."""
    config = Config.read(vars(options), dict(os.environ))
    _raise_file_limit(config.max_connections)
    server = WebhookServer(config)
    server.warnings += strange_variables(vars(options), dict(os.environ))
    # An Event would not do: set() in a handler waits for ever for the lock that wait() around it may hold
    came, wake = [], queue.SimpleQueue()

    def on_stop(number: int, frame: Any) -> None:
        if not came:
            came.append(time.monotonic())
            wake.put("stop")
        elif time.monotonic() - came[0] > SAME_SIGNAL:
            os._exit(128 + number)

    _handle(("SIGTERM", "SIGINT", "SIGBREAK"), on_stop)
    _handle(("SIGHUP",), lambda number, frame: wake.put("reload"))
    with server:
        try:
            print(f"Listening on {server.url}", flush=True)
        except OSError:                                 # nobody is there to read it
            _silence(sys.stdout)
        sys.setswitchinterval(SWITCH_SECONDS)
        gc.collect()
        gc.freeze()                                     # no search for garbage in what lives as long as we
        while not came:
            with contextlib.suppress(queue.Empty):      # Windows takes no Ctrl-C in an endless wait
                if wake.get(timeout=1) == "reload":
                    server.reload()
    return EXIT_FINE


def _handle(names: tuple, handler: Callable[[int, Any], None]) -> None:
    """Handle the signals that exist, but none that we were started to ignore, as by nohup or a script's &."""
    for name in names:
        number = getattr(signal, name, None)
        if number is not None and (name == "SIGTERM" or signal.getsignal(number) != signal.SIG_IGN):
            signal.signal(number, handler)


def _raise_file_limit(connections: int) -> None:
    """Each connection is an open file; many systems start with 1,024 and allow more."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 256
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# -- check

def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="file to read; - is standard input")
    parser.add_argument("--schema", metavar="FILE",
                        help="JSON Schema of an event (default: WEBHOOK_SCHEMA, or schema.json beside the "
                             "program)")


def run_check(options: argparse.Namespace) -> int:
    """Print every problem of the events in files; 1 if there is any, 2 if a file cannot be read."""
    variable = variable_of("schema")
    config = Config.read({"schema": options.schema}, {variable: os.environ.get(variable, "")})
    contract, _, warnings = read_schema(config.schema)
    for warning in warnings:
        _complain(warning)
    code = EXIT_FINE
    for name in options.files:
        try:
            data = _read_input(name)
        except SetupError as error:
            code = _complain(str(error))
            continue
        shown = "<stdin>" if name == "-" else printable(name, 4096)
        for line, path, message in check_text(contract, data):
            code = max(code, EXIT_NO)
            print(f"{shown}:{line}: {printable(path) or '/'} {printable(message, 500)}")
    return code


def _read_input(name: str) -> bytes:
    try:
        if name == "-":
            return sys.stdin.buffer.read()
        return Path(name).read_bytes()
    except (OSError, ValueError) as error:              # ValueError: a NUL in the name
        raise SetupError(f"{name or 'a file without a name'}: {reason_of(error)}") from None


def check_text(contract: Contract, data: bytes) -> Iterator[tuple]:
    """(line, path, message) of every problem in JSON (an event, or an array of them) or NDJSON."""
    try:
        value, text = parse_json(data, sys.maxsize)
    except JSONError as error:
        yield from _check_lines(contract, data, error)
        return
    items = [(1 + text[:len(text) - len(text.lstrip())].count("\n"), "", value)]
    if isinstance(value, list):
        lines = _item_lines(text)
        items = [(line, f"/{index}", item) for index, (item, line) in enumerate(zip(value, lines))]
    for line, place, item in items:
        for problem in _problems(contract, item):
            yield line, place + problem.path, problem.message


def _check_lines(contract: Contract, data: bytes, error: JSONError) -> Iterator[tuple]:
    """The problems of text that is not one JSON value, as `error` says: of NDJSON, or `error` itself."""
    lines = [(number, _value_of(line)) for number, line in enumerate(data.splitlines(), 1) if line.strip()]
    broken = sum(isinstance(value, JSONError) for _, value in lines)
    # Lines that are JSON each for itself make NDJSON, whichever of them are broken
    if len(lines) < 2 or 2 * broken > len(lines):
        yield error.line, "", str(error)
        return
    for number, value in lines:
        if isinstance(value, JSONError):
            yield number, "", f"Invalid JSON: {value.reason} at column {value.column}"
            continue
        for problem in _problems(contract, value):
            yield number, problem.path, problem.message


def _value_of(line: bytes) -> Any:
    """The value of a line of JSON, or the JSONError that it is none."""
    try:
        return parse_json(line)[0]
    except JSONError as error:
        return error


def _problems(contract: Contract, value: Any) -> list:
    try:
        contract.event(value, "", "")
        return []
    except InvalidEvent as error:
        return error.problems


def _item_lines(text: str) -> Iterator[int]:
    """The line on which each item of the array `text` begins."""
    at, line, counted = text.index("[") + 1, 1, 0
    while True:
        at = _SPACE.match(text, at).end()
        if text[at] == "]":
            return
        line += text.count("\n", counted, at)
        counted = at
        yield line
        _, at = _SCAN(text, at)
        at = _SPACE.match(text, at).end()
        if text[at] == ",":
            at += 1


# -- send

def _add_send(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", metavar="FILE", help="what to send, as it is; - is standard input")
    parser.add_argument("--url", default="http://127.0.0.1:8000",
                        help="server to send to, with a path if it is not /webhook/appointments "
                             "(default: %(default)s)")
    for name in REQUIRED_FIELDS + ("notes",):
        parser.add_argument(flag_of(name), metavar="TEXT", help=f"{name} of the test event")


def run_send(options: argparse.Namespace) -> int:
    """Post one event; print status and body."""
    address = _address("--url", options.url)
    body = _body_to_send(options)
    try:
        status, text = _post(address, body)
    except (OSError, ValueError, http.client.HTTPException) as error:
        refused = isinstance(error, ConnectionRefusedError)
        hint = "; is it running? python3 webhook_server.py starts it" if refused else ""
        _complain(f"cannot send to {options.url}: {reason_of(error)}{hint}")
        return EXIT_NO
    print(status)
    print(text.decode("utf-8", "replace"))
    return EXIT_FINE if 200 <= status < 300 else EXIT_NO


def _body_to_send(options: argparse.Namespace) -> bytes:
    """What FILE holds, or a test event with the members that were given."""
    given = {name: getattr(options, name) for name in REQUIRED_FIELDS + ("notes",)
             if getattr(options, name) is not None}
    if options.file is not None:
        for name in given:
            raise SetupError(f"send: FILE is sent as it is, {flag_of(name)} cannot change it")
        return _read_input(options.file)
    now = datetime.now(timezone.utc)
    event = {"event_type": "scheduled", "appointment_id": f"TEST-{now:%Y%m%d%H%M%S%f}",
             "patient_id": "TEST-PATIENT", "timestamp": f"{now:%Y-%m-%dT%H:%M:%SZ}", "notes": "Test event"}
    return json.dumps({**event, **given}).encode()


def _address(flag: str, text: str) -> Any:
    """The parts of an http address. Raises SetupError."""
    with contextlib.suppress(ValueError):               # a port that is no number, brackets without IPv6
        parts = urlsplit(text)
        is_web = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        if is_web and parts.username is None and re.fullmatch("[!-~]+", text):
            return parts
    raise SetupError(f"{flag}: {printable(text)} is not an address such as http://127.0.0.1:8000")


def _post(address: Any, body: bytes) -> tuple:
    """(status, body) of the answer. Takes no proxy, which would see patients' data; follows no redirect."""
    kind = getattr(http.client, address.scheme.upper() + "Connection", None)
    if kind is None:                                    # HTTPSConnection is there only with the module ssl
        raise SetupError("this Python has no ssl module, which https:// needs")
    target = "/webhook/appointments"
    if address.path.strip("/"):
        target = address.path
    if address.query:
        target += "?" + address.query
    with contextlib.closing(kind(address.hostname, address.port, timeout=30)) as connection:
        connection.request("POST", target, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()


# -- keygen

def _add_keygen(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--client", metavar="NAME", help="print a key for this client, and its entry")
    parser.add_argument("--role", action="append", metavar="ROLE",
                        help=f"what the client may do: {', '.join(ROLES)} (repeat; default: sender)")
    parser.add_argument("--tenant", help="whose database the client uses")
    parser.add_argument("--signing", action="store_true", help="print a secret for the profile standard")
    parser.add_argument("--encryption", action="store_true", help="print a line for --encryption-key-file")


def run_keygen(options: argparse.Namespace) -> int:
    """Print a fresh secret, and for a client the entry of the clients file that goes with it."""
    wanted = [options.client is not None, options.signing, options.encryption]
    if sum(wanted) != 1:
        raise SetupError("keygen: takes one of --client NAME, --signing and --encryption")
    if options.client is None and (options.role or options.tenant):
        raise SetupError("keygen: --role and --tenant go with --client NAME")
    if options.signing:
        print(f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}")
    elif options.encryption:
        day = datetime.now(timezone.utc).strftime("%Y%m%d")
        print(f"key-{day}-{secrets.token_hex(2)}:{base64.b64encode(secrets.token_bytes(32)).decode()}")
    else:
        key = KEY_PREFIX + secrets.token_urlsafe(32)
        entry = {"name": options.client, "tenant": options.tenant, "roles": options.role or ["sender"],
                 "key_sha256": [hashlib.sha256(key.encode()).hexdigest()]}
        entry = {name: value for name, value in entry.items() if value is not None}
        for problem in Schema(CLIENT_SCHEMA).errors(entry):
            raise SetupError(f"keygen: {problem.message}")
        print(key)
        print(json.dumps(entry))
    return EXIT_FINE


# -- verify, purge

def _add_database(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--database", metavar="FILE", help="SQLite file (default: WEBHOOK_DATABASE, or appointments.db)")
    parser.add_argument("--encryption-key-file", metavar="FILE",
                        help="its keys (default: WEBHOOK_ENCRYPTION_KEY_FILE)")


def _database_of(options: argparse.Namespace) -> tuple:
    """(path, Encryption or None) of a command about a database that is there. Raises SetupError."""
    names = ("database", "encryption_key_file")
    environment = {variable_of(name): os.environ.get(variable_of(name), "") for name in names}
    config = Config.read({name: getattr(options, name) for name in names}, environment)
    if not os.path.isfile(config.database):
        raise SetupError(f"database {config.database}: there is no such file")
    encryption = None
    if config.encryption_key_file:
        encryption = Encryption(read_encryption_keys(config.encryption_key_file), tell=_complain)
    return config.database, encryption


def _operator() -> str:
    """Who is at the keyboard, for the access log."""
    try:
        return f"os:{printable(getpass.getuser(), 64)}"
    except (KeyError, OSError, ImportError):            # a user without a name
        return "os:?"


def _add_verify(parser: argparse.ArgumentParser) -> None:
    _add_database(parser)
    parser.add_argument("--seal", metavar="N:DIGEST", action="append", default=[],
                        help="a seal as the log has it: the history up to it must not be another one (repeat)")


def run_verify(options: argparse.Namespace) -> int:
    """Recompute all seals; 1 where something was changed."""
    known = {}
    for text in options.seal:
        match = re.fullmatch(r"([0-9]{1,18}):(?:sha256:)?([0-9a-fA-F]{64})", text)
        if not match:
            raise SetupError(f"--seal: {printable(text)} is not N:DIGEST, such as 1204:sha256:5f0a…")
        known[int(match[1])] = bytes.fromhex(match[2])
    path, encryption = _database_of(options)
    with _read_only(path, encryption) as connection:
        verification = Verification(connection, encryption)
        try:
            verification.run(known, lambda number: _show_progress("seal", number))
            text, code = verification.summary(), EXIT_FINE
        except Mismatch as error:
            text, code = str(error), EXIT_NO
    print(text)
    engine = SQLite(path, encryption=encryption)
    try:
        engine.open()
        record = functools.partial(record_access, utc_now(), "verify", _operator(), None, text, None)
        patiently(engine, lambda session: record(session, encryption))
    except (SetupError, StoreUnavailable) as error:     # such as a copy that can only be read
        _complain(f"the access log does not say that this was verified: {error}")
    finally:
        engine.close()
    return code


@contextlib.contextmanager
def _read_only(path: str, encryption: Optional[Encryption]) -> Iterator[sqlite3.Connection]:
    """A connection that changes nothing, to a database of our version. Raises SetupError."""
    try:
        uri = _uri(Path(os.path.abspath(path)), "ro")
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=5, isolation_level=None)) as connection:
            connection.text_factory = _lenient_text
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version != DATA_VERSION:
                raise SetupError(f"database {path}: it is of data version {version}, which has no seals; a start of "
                                 "the service brings an older one up to date")
            problem = _problem_of_keys(connection, version, encryption, False)
            if problem:
                raise SetupError(f"database {path}: {problem}")
            yield connection
    except sqlite3.Error as error:
        raise SetupError(f"database {path}: {_reason(error, path)}") from None
    except StoreUnavailable as error:
        raise SetupError(f"database {path}: {error}") from None


def _add_purge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--before", metavar="DATE", required=True,
                        help="what was received before this date, or date and time, is removed (UTC)")
    _add_database(parser)


def run_purge(options: argparse.Namespace) -> int:
    """Remove what is older than a date."""
    text = options.before
    try:
        before = canonical_timestamp(text if len(text) > 10 else text + "T00:00:00Z")
    except ValueError:
        raise SetupError(f"--before: {printable(text)} is no date such as 2020-01-31") from None
    path, encryption = _database_of(options)
    print(f"{purge_database(path, encryption, before, PURGED_TABLES, _operator())} rows removed")
    return EXIT_FINE


# -- rekey

def run_rekey(options: argparse.Namespace) -> int:
    """Encrypt all that is personal with the first key; 1 if something cannot be decrypted."""
    path, encryption = _database_of(options)
    if encryption is None:
        raise SetupError("rekey: --encryption-key-file is missing")
    _refuse_company(path)
    engine = SQLite(path, encryption=encryption, takes_over=True)
    engine.open()
    try:
        rekeying = Rekeying(engine)
        rekeying.run(_show_progress)
        told = f"{rekeying.moved} rows encrypted with {encryption.key_id}"
        record = functools.partial(record_access, utc_now(), "rekey", _operator(), None, told, rekeying.moved)
        patiently(engine, lambda session: record(session, encryption))
    except StoreUnavailable as error:
        raise SetupError(f"{error}; begin again: what is done stays done") from None
    finally:
        engine.close()
    print(told)
    if rekeying.unreadable:
        _complain(f"{rekeying.unreadable} rows cannot be decrypted and stayed as they are")
        return EXIT_NO
    return EXIT_FINE


def _refuse_company(path: str) -> None:
    """Raise SetupError where a database that is not encrypted is in use: whoever uses it would go on to write
    what is not encrypted."""
    with contextlib.closing(sqlite3.connect(_uri(Path(os.path.abspath(path)), "rw"), uri=True, timeout=1)) as connection:
        try:
            marks = connection.execute("SELECT key_id FROM database_keys WHERE name = 'database'").fetchone()
        except sqlite3.Error:                           # of an older version, or none of ours: who opens it says so
            marks = None
        if marks and marks[0]:
            return
        try:
            connection.execute("PRAGMA journal_mode = DELETE").fetchone()       # only who is alone may
        except sqlite3.OperationalError:
            raise SetupError(f"database {path}: something else has it open: stop the service first, as this "
                             "database is not encrypted yet") from None
        except sqlite3.DatabaseError:
            return


def _show_progress(table: str, last: int) -> None:
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"\r{table} {last} ", end="", file=sys.stderr, flush=True)


# -- bench

BENCH_HEAD = """\
Server and load share this machine ({cores} cores); senders elsewhere leave the server more of it.
Each connection posts its next event when it has the answer; each 200 waits for the disk.
Heads that differ have a header of their own in each request, as signatures and proxies make it.
A sync of 4 KiB in {folder} takes {sync:.2f} ms."""
BENCH_TITLES = ("connections", "heads", "requests/s", "P50 ms", "P95 ms", "P99 ms", "not 200", "rows = 200s")
BENCH_ROW = "{:>11} {:>6} {:>11} {:>8} {:>8} {:>8} {:>8} {:>12}"


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", default="3", help="time of each round (default: %(default)s)")
    parser.add_argument("--connections", metavar="N,N", default="1,16,64",
                        help="a round for each, and one more for the last (default: %(default)s)")
    parser.add_argument("--folder",
                        help="where the temporary database goes (default: the system's temporary folder)")


def run_bench(options: argparse.Namespace) -> int:
    """Measure a server of our own; 1 when rows and 200s differ, or not every answer was 200."""
    seconds = checked(_seconds, options.seconds, "--seconds")
    parse = _whole(1, 10000)
    levels = [checked(parse, level.strip(), "--connections") for level in options.connections.split(",")]
    folder = options.folder or tempfile.gettempdir()
    if not os.path.isdir(folder):
        raise SetupError(f"--folder: {folder} is not a folder")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)       # as Ctrl-C: our server ends with us
    _raise_file_limit(max(levels))
    print(BENCH_HEAD.format(cores=os.cpu_count(), folder=printable(folder), sync=_sync_milliseconds(folder)))
    print(BENCH_ROW.format(*BENCH_TITLES), flush=True)
    code = EXIT_FINE
    for level, heads in [(level, "same") for level in levels] + [(levels[-1], "differ")]:
        with tempfile.TemporaryDirectory(prefix="webhook-bench-", dir=folder) as database_folder:
            code = max(code, _bench_round(database_folder, level, heads, seconds))
    return code


def _sync_milliseconds(folder: str) -> float:
    """The median of 20: what the disk allows, whatever the server does."""
    times = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(20):
            began = time.perf_counter()
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - began)
    return sorted(times)[10] * 1000


def _bench_round(folder: str, connections: int, heads: str, seconds: float) -> int:
    """Print the row of one round; its exit code."""
    database = os.path.join(folder, "events.db")
    with contextlib.ExitStack() as opened:
        url = _start_server(opened, folder, database, connections)
        load = BenchLoad(opened, _address("bench", url), heads == "differ", connections)
        load.run(seconds)
    with contextlib.closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT count(*) FROM appointment_events").fetchone()[0]
    answered, times = len(load.times), sorted(load.times) or [0.0]
    verdict, code = "yes", EXIT_FINE
    if rows != answered:
        verdict = f"NO: {rows} rows, {answered} 200s"
    if rows != answered or load.failed:
        code = EXIT_NO
    waits = [f"{times[int(len(times) * part)] * 1000:.2f}" for part in (0.50, 0.95, 0.99)]
    rate = f"{answered / load.seconds:.0f}"
    print(BENCH_ROW.format(connections, heads, rate, *waits, load.failed, verdict), flush=True)
    return code


def _start_server(opened: contextlib.ExitStack, folder: str, database: str, connections: int) -> str:
    """The address of a server in a process of its own, which ends at the latest when `opened` is left."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WEBHOOK_")}
    server = subprocess.Popen(
        [sys.executable, "-S", "-I", os.path.abspath(__file__), "--port", "0", "--database", database,
         "--log-file", os.path.join(folder, "server.log"), "--max-connections", str(connections + 64),
         "--max-connections-per-address", str(connections + 64)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=environment)
    opened.callback(server.stdout.close)
    opened.callback(server.wait)
    opened.callback(server.terminate)
    url = server.stdout.readline().rpartition(" ")[2].strip()
    if not url:
        raise SetupError("bench: the server to measure did not start")
    return url


class BenchLoad:
    """Many connections in one thread, each of which posts its next event when it has the answer to the last.

    After run(): `times` of the 200s in seconds, `failed` is how many were none, `seconds` how long it took.
    """
    PATIENCE = 10                       # seconds without any answer, after which the rest counts as failed

    def __init__(self, opened: contextlib.ExitStack, address: Any, heads_differ: bool,
                 connections: int) -> None:
        """Connect, until `opened` is left. Raises SetupError."""
        self.times: list = []
        self.failed, self.seconds = 0, 1.0
        self._address, self._heads_differ = address, heads_differ
        self._numbers = itertools.count()
        self._selector = opened.enter_context(selectors.DefaultSelector())
        self._began: dict = {}          # {connection: when its request went out}
        try:
            for _ in range(connections):
                connection = socket.create_connection((address.hostname, address.port), timeout=10)
                self._began[opened.enter_context(connection)] = 0.0
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._selector.register(connection, selectors.EVENT_READ)
        except OSError as error:
            reason = reason_of(error)
            raise SetupError(f"bench: {connections} connections could not be made: {reason}") from None

    def run(self, seconds: float) -> None:
        """Post for `seconds`, and take the answers to what is on its way then."""
        begin = now = time.perf_counter()
        for connection in self._began:
            self._post(connection)
        while self._began:
            ready = self._selector.select(self.PATIENCE)
            if not ready:
                self.failed += len(self._began)
                break
            for key, _ in ready:
                answer, connection = b"", key.fileobj
                with contextlib.suppress(OSError):      # it is broken
                    answer = connection.recv(65536)     # ours come in one piece
                now = time.perf_counter()
                if answer.startswith(b"HTTP/1.1 200 "):
                    self.times.append(now - self._began[connection])
                else:
                    self.failed += 1
                if answer and now < begin + seconds:
                    self._post(connection)
                else:
                    self._selector.unregister(connection)
                    del self._began[connection]
        self.seconds = now - begin

    def _post(self, connection: socket.socket) -> None:
        number = next(self._numbers)
        own = f"Webhook-Id: msg_{number:024}\r\n" if self._heads_differ else ""
        body = (f'{{"event_type": "scheduled", "appointment_id": "BENCH-{number:09}", "patient_id": "PAT-'
                f'{number % 5000:04}", "timestamp": "2025-01-10T14:00:00Z", "notes": "Follow-up in room 4, '
                'bring earlier results."}')
        request = (f"POST /webhook/appointments HTTP/1.1\r\nHost: {self._address.netloc}\r\n{own}"
                   f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}")
        self._began[connection] = time.perf_counter()
        with contextlib.suppress(OSError):              # the next recv will tell
            connection.sendall(request.encode())


# -- which command

class Command(NamedTuple):
    """One command: `run(options)` gives the exit code, `help` is a line in --help, `description` the rest."""
    name: str
    run: Callable[[argparse.Namespace], int]
    help: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    usage: Optional[str] = None


COMMANDS = (
    Command("serve", run_serve, "take events; the command when none is given",
            "Take events until SIGTERM or Ctrl-C; what is in flight is still answered. A\n"
            "second one ends it at once. SIGHUP reads schema, clients file, certificates and\n"
            "encryption keys anew, and reopens the log file.",
            add_settings, "webhook_server.py [serve] [SETTINGS]"),
    Command("check", run_check, "tell which events in files would be refused, and why",
            "Validate events in JSON (one event, or an array of them) or NDJSON (one on\n"
            "each line); needs no server. Prints 'file:line: /path message' for each\n"
            "problem. Exit 0: all are valid, 1: some are not, 2: a file cannot be read.",
            _add_check),
    Command("send", run_send, "post one event and print the answer",
            "Post a test event, or the one in FILE, and print status and body of the\n"
            "answer. Exit 0: it was taken (2xx), 1: it was not.",
            _add_send),
    Command("keygen", run_keygen, "make a key for a client, a signing secret or an encryption key",
            "Print a fresh key for a client, which the client sends as 'Authorization:\n"
            "Bearer KEY', and the entry of the clients file that knows it by its SHA-256\n"
            "alone. Or a fresh secret. It is printed once and kept nowhere.",
            _add_keygen),
    Command("verify", run_verify, "prove that nothing was changed since it was sealed",
            "Recompute the seals over all events, conflicts and accesses, also beside a\n"
            "running service. Exit 0: all is as it was sealed, 1: something was changed,\n"
            "removed or put in, and the first such block is named.",
            _add_verify),
    Command("purge", run_purge, "remove old events",
            "Remove whole blocks of events and conflicts that were received before a date,\n"
            "also beside a running service. Their seals stay, so that verify still holds;\n"
            "up to 255 older rows may stay. The access log is not touched.",
            _add_purge),
    Command("rekey", run_rekey, "encrypt a database, or with a new key",
            "Encrypt what is personal with the first key of the key file: all of a database\n"
            "that was not encrypted (stop the service first), or what has an older key (a\n"
            "service that was reloaded may run beside it). Can be interrupted and started\n"
            "again. Exit 0: all is encrypted, 1: something cannot be decrypted.",
            _add_database),
    Command("bench", run_bench, "measure how fast it is on this machine",
            "Start a server on a temporary database, load it from another process, print\n"
            "requests a second and latencies, and compare the rows in the database with\n"
            "the answers 200.",
            _add_bench),
)


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = Parser(prog="webhook_server.py", usage="webhook_server.py [COMMAND] [SETTINGS]", epilog=EXAMPLES,
                    description="Takes appointment events over HTTP and keeps each for good in SQLite.")
    parser.add_argument("--version", action="version", version=f"webhook_server.py {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", prog="webhook_server.py",
                                     parser_class=Parser, title="commands",
                                     description="COMMAND --help tells more.")
    for command in COMMANDS:
        own = commands.add_parser(command.name, help=command.help, usage=command.usage,
                                  description=command.description)
        command.add_arguments(own)
        own.set_defaults(run=command.run, parser=own)
    return parser


def run_command(arguments: list) -> int:
    """Parse and run; gives the exit code."""
    if arguments and arguments[0] in ("-h", "--help", "help"):
        parser = make_parser()
        add_settings(parser)                            # serving is the default, so its settings belong here
        print(parser.format_help(), end="")
        return EXIT_FINE
    if not arguments or arguments[0].startswith("-") and arguments[0] != "--version":
        arguments.insert(0, "serve")
    names = [command.name for command in COMMANDS]
    if arguments[0] not in (*names, "--version"):
        said = arguments[0] or repr("")
        raise SetupError(f"there is no command {said}; {did_you_mean(arguments[0], names)}")
    try:
        options, unknown = make_parser().parse_known_args(arguments)
    except SystemExit as done:                          # argparse has printed help or version
        return done.code
    if unknown:
        options.parser.refuse(unknown[0])
    try:
        return options.run(options)
    except SetupError as error:
        raise SetupError(as_given(str(error), vars(options), dict(os.environ))) from None


def main(arguments: Optional[list] = None) -> int:
    """Run a command; gives the exit code. For a mistake there is one line on stderr, never a traceback."""
    _open_missing_streams()
    if hasattr(sys.stdout, "reconfigure"):              # a terminal may lack a letter of somebody's message
        sys.stdout.reconfigure(errors="backslashreplace")
    if arguments is None:
        arguments = sys.argv[1:]
    try:
        code = run_command(list(arguments))
        sys.stdout.flush()                              # what cannot be written shows here, and not after us
        return code
    except SetupError as error:
        return _complain(str(error))
    except BrokenPipeError:                             # the reader of our output left, as with | head
        _silence(sys.stdout)
        return EXIT_NO
    except OSError as error:
        _silence(sys.stdout)
        message = reason_of(error)
        if error.filename:
            message = f"{error.filename}: {message}"
        return _complain(message)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _open_missing_streams() -> None:
    """Started with a stream closed, open nothing there: the database would get the stream's number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


if __name__ == "__main__":
    sys.exit(main())
