"""Tests of the receiver, section by section in the order of webhook_server.py: real sockets, real files, no fixed ports.

    python3 -m unittest                     all of them
    python3 test_webhook_server.py Store    the classes or tests whose name holds a word
"""
from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import ctypes
import ctypes.util
import dataclasses
import errno
import functools
import gc
import hashlib
import hmac
import http.client
import http.server
import inspect
import io
import itertools
import json
import logging
import os
import random
import re
import select
import shutil
import signal
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest
import urllib.parse
import warnings
import weakref
from collections import Counter
from http.server import BaseHTTPRequestHandler
from pathlib import Path, PureWindowsPath
from unittest import mock

import webhook_server as receiver
from webhook_server import (
    AppointmentEvent, Config, Contract, Filter, InvalidEvent, JSONError, Log, Outcome, Redactor,
    RequestIds, SQLite, Schema, SchemaError, SetupError, Store, StoreLocked, StoreUnavailable,
    Submission, WebhookServer, canonical_json, canonical_timestamp, content_digest, json_equal,
    parse_json, read_pattern)

try:
    import fcntl
    import resource
    import termios
except ImportError:             # Windows
    fcntl = resource = termios = None

HERE = Path(__file__).absolute().parent
PROGRAM = HERE / "webhook_server.py"
PATH = "/webhook/appointments"
WAIT = 180                     # seconds after which something awaited counts as not coming: a machine may be busy
POSIX = os.name == "posix"


# =============================================================================
# Helpers: what the tests of several sections use.
# =============================================================================

def event(**members):
    """A valid event; members given replace or add, those that are ... (Ellipsis) are left out."""
    whole = {"event_type": "scheduled", "appointment_id": "APT-1", "patient_id": "PAT-1",
             "timestamp": "2025-01-10T14:00:00Z", **members}
    return {name: value for name, value in whole.items() if value is not ...}


def until(condition, what="the awaited"):
    """Wait until condition() is true, and give what it gave; fails after WAIT seconds."""
    deadline = time.monotonic() + WAIT
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come in {WAIT} s")
        time.sleep(0.005)


class Answer:
    """What came back: status, headers (names in lower case), body as bytes and, where it is JSON, as `json`."""

    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        return json.loads(self.body)


def answer_of(response):
    """The Answer in a response of http.client."""
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, headers, response.read())


class FolderTest(unittest.TestCase):
    """A test with an empty folder of its own, self.folder (a Path), gone afterwards."""

    def setUp(self):
        temporary = tempfile.TemporaryDirectory(prefix="webhook-test-")
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        self.database = self.folder / "events.db"

    def program(self, *arguments, stdin=b"", environment=(), **options):
        """Run the command line to its end: (exit code, stdout, stderr) as text."""
        done = subprocess.run([sys.executable, "-S", "-I", str(PROGRAM), *map(str, arguments)], input=stdin,
                              capture_output=True, timeout=WAIT, cwd=self.folder,
                              env={**clean_environment(), **dict(environment)}, **options)
        return done.returncode, done.stdout.decode(), done.stderr.decode()


class ServerTest(FolderTest):
    """A test that talks to a server in this process."""

    def start(self, **settings):
        """A running WebhookServer on a free port with a database in self.folder, stopped after the test."""
        on_event, logger = settings.pop("on_event", None), settings.pop("logger", None)
        settings = {"port": 0, "database": str(self.database), "log_file": str(self.folder / "server.log"),
                    "shutdown_timeout": 2, **settings}
        server = WebhookServer(Config(**settings), on_event=on_event, logger=logger)
        server.start()
        self.addCleanup(server.stop)
        return server

    def connect(self, server):
        """A connected socket with a timeout, closed after the test."""
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT)
        self.addCleanup(connection.close)
        return connection

    def call(self, server, method="GET", path=PATH, body=None, **headers):
        """One request on a connection of its own; body may be bytes, or a value to be sent as JSON."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            return answer_of(connection.getresponse())
        finally:
            connection.close()

    def post(self, server, body=None, **headers):
        """POST one event."""
        return self.call(server, "POST", PATH, event() if body is None else body, **headers)

    def exchange(self, server, data):
        """Send bytes, close our sending half, give all that comes back until the server closes."""
        connection = self.connect(server)
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return read_all(connection)

    def log_text(self, server):
        """The log of a server that is stopped for it."""
        server.stop()
        return (self.folder / "server.log").read_text()


def read_all(connection):
    """All bytes until the other side closes; a reset counts as the end."""
    pieces = []
    with contextlib.suppress(ConnectionError):
        while True:
            piece = connection.recv(65536)
            if not piece:
                break
            pieces.append(piece)
    return b"".join(pieces)


def statuses(answers):
    """The status codes in the bytes of several answers."""
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)]


def post_bytes(body, *lines, version="1.1"):
    """The bytes of a POST of `body` (bytes, or a value sent as JSON) with further header lines."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [f"POST {PATH} HTTP/{version}", "Host: localhost", f"Content-Length: {len(body)}", *lines]
    return ("\r\n".join(head) + "\r\n\r\n").encode("latin-1") + body


def rows(database, query="SELECT count(*) FROM appointment_events"):
    """All rows of a query; the single value when there is just one of one column."""
    with contextlib.closing(sqlite3.connect(str(database), timeout=10)) as connection:
        found = connection.execute(query).fetchall()
    return found[0][0] if len(found) == 1 and len(found[0]) == 1 else found


def insert_rows(database, count, notes="'note ' || value"):
    """Put rows into the table beside the server."""
    with contextlib.closing(sqlite3.connect(str(database), timeout=10)) as connection, connection:
        connection.execute(f"""
            WITH RECURSIVE numbers (value) AS (
                SELECT 1 UNION ALL SELECT value + 1 FROM numbers WHERE value < {count})
            INSERT INTO appointment_events (event_type, appointment_id, patient_id, timestamp, notes, received_at,
                                            payload)
            SELECT 'scheduled', 'APT-' || value, 'PAT-' || (value % 7), '2025-01-10T14:00:00Z', {notes},
                   '2025-01-10T14:00:01Z', '{{"n": ' || value || '}}' FROM numbers""")


def clean_environment():
    """The environment without settings of ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith("WEBHOOK_")}


MEGABYTE = 1024 * 1024


def in_threads(count, work):
    """Run work() in `count` threads at once, and wait for all."""
    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive(), f"a thread did not end in {WAIT} s"


def lists(engine, *arguments):
    """The lists of events that the engine reads in steps."""
    for events, _ in engine.steps(*arguments):
        yield events


def write(engine, events):
    """Store events in one transaction: their outcomes."""
    with engine.transaction() as session:
        return session.insert(events)


def probe(engine):
    """Write something that changes nothing."""
    with engine.transaction() as session:
        session.rehearse()


def read(engine, wanted, after, limit, up_to=None):
    """The first `limit` events behind `after`."""
    steps = lists(engine, wanted, after, up_to, limit)
    return list(itertools.islice(itertools.chain.from_iterable(steps), limit))


def rules(schema, value):
    """The keywords that refuse a value, in the order of the schema."""
    return [problem.rule for problem in Schema(schema).errors(value)]


# =============================================================================
# Config
# =============================================================================

class ConfigTest(unittest.TestCase):

    def test_a_flag_wins_over_the_environment_and_that_over_the_default(self):
        environment = {"WEBHOOK_PORT": "9001", "WEBHOOK_HOST": "::1"}
        config = Config.read({"port": "9002", "host": None}, environment)
        self.assertEqual((config.port, config.host, config.max_body), (9002, "::1", MEGABYTE))

    def test_hosts_and_origins_that_could_never_match_are_refused(self):
        for name, bad, good in (("allowed_host", ("http://desk.example", "desk.example:80", "a b"),
                                 ("desk.example", "[::1]")),
                                ("allowed_origin", ("desk.example", "https://desk.example/", "null"),
                                 ("https://desk.example", "http://[::1]:8000"))):
            for value in bad:
                with self.subTest(value), self.assertRaisesRegex(SetupError, name):
                    Config(**{name: ["localhost" if name == "allowed_host" else "http://localhost", value]})
            for value in (",".join(good), [", ".join(good) + ","], list(good)):
                self.assertEqual(getattr(Config(**{name: value}), name), good)

    def test_every_setting_can_come_from_a_flag_the_environment_or_the_library(self):
        for field in dataclasses.fields(Config):
            with self.subTest(field.name):
                text = ",".join(field.default) if isinstance(field.default, tuple) else str(field.default)
                expected = getattr(Config(), field.name)
                self.assertEqual(getattr(Config.read({field.name: text}, {}), field.name), expected)
                variable = {"WEBHOOK_" + field.name.upper(): text}
                self.assertEqual(getattr(Config.read({}, variable), field.name), expected)
                self.assertEqual(getattr(Config(**{field.name: field.default}), field.name), expected)

    def test_every_setting_has_a_help_text(self):
        for field in dataclasses.fields(Config):
            self.assertGreater(len(field.metadata["help"]), 5, field.name)

    def test_an_empty_variable_counts_as_not_set(self):
        self.assertEqual(Config.read({}, {"WEBHOOK_PORT": ""}).port, 8000)
        self.assertEqual(receiver.strange_variables({}, {"WEBHOOK_PORT": "", "WEBHOOK_PROT": ""}), [])

    def test_what_kubernetes_and_docker_set_for_a_service_called_webhook_is_no_setting(self):
        links = {"WEBHOOK_PORT": "tcp://10.96.0.12:8000", "WEBHOOK_SERVICE_HOST": "10.96.0.12",
                 "WEBHOOK_SERVICE_PORT": "8000", "WEBHOOK_SERVICE_PORT_HTTP": "8000",
                 "WEBHOOK_PORT_8000_TCP": "tcp://10.96.0.12:8000", "WEBHOOK_PORT_8000_TCP_PROTO": "tcp",
                 "WEBHOOK_PORT_8000_TCP_PORT": "8000", "WEBHOOK_PORT_8000_TCP_ADDR": "10.96.0.12",
                 "WEBHOOK_PORT_53_UDP_ADDR": "10.96.0.12", "WEBHOOK_NAME": "/web/webhook",
                 "WEBHOOK_ENV_LANG": "C",
                 "WEBHOOK_LOG_PORT": "tcp://10.96.0.13:80", "WEBHOOK_LOG_SERVICE_HOST": "10.96.0.13"}
        self.assertEqual(Config.read({}, links), Config())
        self.assertEqual(Config.read({"port": "9000"}, links).port, 9000)
        warning, = receiver.strange_variables({}, links)
        for word in ("WEBHOOK_PORT=tcp://10.96.0.12:8000 is not taken", "Kubernetes", "--port"):
            self.assertIn(word, warning)
        self.assertEqual(receiver.strange_variables({"port": "9000"}, links), [])      # the flag wins anyway
        self.assertEqual(receiver.strange_variables({"port": None, "host": "::1"}, links), [warning])
        self.assertEqual(receiver.strange_variables({}, {"WEBHOOK_PORT": "9000"}), [])
        self.assertEqual(Config.read({}, {"WEBHOOK_PORT": "9000"}).port, 9000)
        for flags, environment in (({"port": "tcp://10.96.0.12:8000"}, {}),
                                   ({}, {"WEBHOOK_PORT": "x-tcp://1:8000"})):
            with self.subTest(flags=flags, environment=environment):
                self.assertRaises(SetupError, Config.read, flags, environment)

    def test_a_variable_that_is_misspelt_is_told_with_the_right_name_and_without_its_value(self):
        for name, words in (("WEBHOOK_PROT", "did you mean WEBHOOK_PORT?"),
                            ("WEBHOOK_DATABSE", "did you mean WEBHOOK_DATABASE?"),
                            ("Webhook_Log_Level", "did you mean WEBHOOK_LOG_LEVEL?"),
                            ("WEBHOOK_HOST_NAME", "did you mean WEBHOOK_HOST?"),
                            ("WEBHOOK_LOG", "did you mean WEBHOOK_LOG_FILE?"),
                            ("WEBHOOK_COLOUR_OF_MOON", "--help")):
            with self.subTest(name):
                warning, = receiver.strange_variables({}, {name: "secret"})
                self.assertIn(name, warning)
                self.assertIn(words, warning)
                self.assertNotIn("secret", warning)
        ours = {"WEBHOOK_" + field.name.upper(): "x" for field in dataclasses.fields(Config)}
        others = {"WEBHOOKS_PORT": "1", "PORT": "1", "PATH": "x"}
        self.assertEqual(receiver.strange_variables({}, {**ours, **others}), [])

    def test_a_wrong_value_is_refused_by_the_name_under_which_it_came(self):
        for flags, environment, name in (({"busy_timeout": "soon"}, {}, "--busy-timeout: "),
                                         ({}, {"WEBHOOK_MAX_BODY": "1MB"}, "WEBHOOK_MAX_BODY: ")):
            with self.subTest(name), self.assertRaises(SetupError) as caught:
                Config.read(flags, environment)
            told = receiver.as_given(str(caught.exception), flags, environment)
            self.assertTrue(told.startswith(name + "must be "), told)
        with self.assertRaisesRegex(SetupError, "^port: must be a whole number from 0 to 65535$"):
            Config(port=65536)

    def test_numbers_that_only_python_would_read_are_refused(self):
        for value in ("+5", "1_0", " 5", "5 ", "-1", "0x10", "1e3", "٣", "8000.0", "", "9" * 400, True, None,
                      [8000]):
            with self.subTest(repr(value)[:20]), self.assertRaises(SetupError):
                Config(port=value)
        self.assertEqual(Config(port="8080").port, 8080)

    def test_times_are_seconds_above_0(self):
        for value in ("0", "-1", "nan", "inf", "1e3", "2s", "", "9" * 400, True, None, float("inf"), 0.0):
            with self.subTest(repr(value)[:20]), self.assertRaises(SetupError):
                Config(busy_timeout=value)
        for value in ("0.5", 0.5):
            self.assertEqual(Config(busy_timeout=value).busy_timeout, 0.5)

    def test_a_choice_is_one_of_those_named_in_the_error_in_any_case(self):
        for value in ("maybe", "", "o k", None, 5):
            with self.subTest(value), self.assertRaisesRegex(SetupError,
                                                             "duplicates: must be one of conflict, ok"):
                Config(duplicates=value)
        self.assertEqual(Config(duplicates="OK", log_level="info", log_payloads="None").duplicates, "ok")
        self.assertEqual(Config.read({"log_level": "Warning"}, {}).log_level, "WARNING")

    def test_an_address_of_ipv6_may_stand_in_brackets(self):
        for value, host in (("[::1]", "::1"), ("::1", "::1"), ("[fe80::1%eth0]", "fe80::1%eth0"),
                            ("localhost", "localhost"), ("[localhost]", "[localhost]")):
            with self.subTest(value):
                self.assertEqual(Config(host=value).host, host)

    def test_a_list_is_separated_by_commas_and_knows_no_case(self):
        self.assertEqual(Config(allowed_host="A.example, b.example,").allowed_host,
                         ("a.example", "b.example"))
        self.assertEqual(Config(allowed_host=["A.example"]).allowed_host, ("a.example",))

    def test_a_path_may_be_an_object_but_never_empty_or_with_nul(self):
        for path in (Path("x.db"), PureWindowsPath(r"\\server\share\x.db")):
            self.assertEqual(Config(database=path).database, str(path))
        for value in ("", "a\0b", 5, None):
            with self.subTest(repr(value)), self.assertRaises(SetupError):
                Config(database=value)

    def test_settings_cannot_be_changed_afterwards(self):
        with self.assertRaises(dataclasses.FrozenInstanceError):
            Config().port = 1

    def test_idle_connections_outlive_the_60_seconds_of_proxies(self):
        self.assertGreater(Config().idle_timeout, 60)


class SettingFilesTest(FolderTest):
    """Two settings that name one file: the log would write into the database, its rotation move it away."""

    def config(self, **settings):
        (self.folder / "schema.json").write_text("{}")
        return Config(**{"database": self.database, "schema": self.folder / "schema.json",
                         "log_file": self.folder / "server.log", **settings})

    def assert_refused(self, config, *words):
        before = {path: path.read_bytes() for path in self.folder.iterdir() if path.is_file()}
        for make in (config.check_files, lambda: WebhookServer(config)):
            with self.assertRaises(SetupError) as caught:
                make()
            for word in words:
                self.assertIn(word, str(caught.exception))
            self.assertNotIn("\n", str(caught.exception))
        self.assertEqual({path: path.read_bytes() for path in self.folder.iterdir() if path.is_file()},
                         before)

    def test_files_that_differ_are_fine(self):
        self.config().check_files()
        self.config(log_file="").check_files()
        self.config(schema="", log_file=os.devnull).check_files()
        self.config(database=self.folder / "events", log_file=self.folder / "events.log").check_files()
        self.config(log_file=self.folder / "events", log_backups=3,
                    database=self.folder / "events.4").check_files()

    def test_a_log_that_is_the_database_or_belongs_to_it_is_refused(self):
        for ending in ("", "-wal", "-shm", "-journal"):
            with self.subTest(ending, exists=False):
                self.assert_refused(self.config(log_file=f"{self.database}{ending}"), "log_file", "database",
                                    ending)
        with self.subTest("another spelling"):
            (self.folder / "sub").mkdir()
            self.assert_refused(self.config(log_file=self.folder / "sub" / ".." / "events.db"), "log_file",
                                "database")
        for ending in ("", "-wal", "-shm", "-journal"):
            with self.subTest(ending, exists=True):
                Path(f"{self.database}{ending}").write_bytes(b"x")
                self.assert_refused(self.config(log_file=f"{self.database}{ending}"), "log_file", "database")

    def test_a_database_that_the_logs_rotation_would_write_over_is_refused(self):
        log = self.folder / "events"
        for number in (1, 5):
            with self.subTest(number):
                config = self.config(log_file=log, database=f"{log}.{number}")
                self.assert_refused(config, "log_file", "database", f"events.{number}")
        self.config(log_file=log, database=f"{log}.6").check_files()
        self.assert_refused(self.config(log_file=log, database=f"{log}.6", log_backups=6), "events.6")
        self.assert_refused(self.config(log_file=log, schema=f"{log}.1"), "events.1")

    def test_the_schema_and_the_program_are_no_place_for_a_log_or_a_database(self):
        for setting in ("log_file", "database"):
            self.assert_refused(self.config(**{setting: self.folder / "schema.json"}), setting, "schema")
            self.assert_refused(self.config(schema="", **{setting: receiver.DEFAULT_SCHEMA_FILE}), setting,
                                "schema")
            self.assert_refused(self.config(**{setting: PROGRAM}), setting, "this program")

    @unittest.skipUnless(POSIX, "links need no privilege")
    def test_links_of_both_kinds_hide_nothing(self):
        soft, hard = self.folder / "soft", self.folder / "hard"
        soft.symlink_to(self.database)
        self.assert_refused(self.config(log_file=soft), "log_file", "database")
        self.assert_refused(self.config(log_file=f"{self.database}-wal", database=soft), "log_file",
                            "database")
        self.database.write_bytes(b"")
        os.link(self.database, hard)
        self.assert_refused(self.config(log_file=hard), "log_file", "database")
        (self.folder / "folder").symlink_to(self.folder)
        self.assert_refused(self.config(log_file=self.folder / "folder" / "events.db-shm"), "log_file",
                            "database")
        other = self.folder / "other.log"
        other.symlink_to(self.folder / "elsewhere.log")
        self.config(log_file=other).check_files()

    def test_a_folder_is_no_file_and_a_folder_that_is_missing_is_named(self):
        for setting in ("database", "log_file", "schema"):
            with self.subTest(setting):
                self.assert_refused(self.config(**{setting: self.folder}), setting, str(self.folder),
                                    "is a folder")
                none = self.folder.resolve() / "none"
                self.assert_refused(self.config(**{setting: none / "x"}), setting,
                                    f"the folder {none} does not exist; make it first")
        (self.folder / "none").mkdir()
        self.config(database=self.folder / "none" / "x").check_files()
        self.config(database=self.folder / ("x" * 300) / "x").check_files()     # who opens it says it better

    @unittest.skipUnless(POSIX, "needs a named pipe")
    def test_a_pipe_that_nobody_serves_keeps_nobody_waiting(self):
        pipe = self.folder / "pipe"
        os.mkfifo(pipe)
        for setting in ("database", "schema"):
            for path in (pipe, os.devnull):
                self.assert_refused(self.config(**{setting: path}), f"{setting}: {path} is a pipe or a device and no file")
        with self.assertRaisesRegex(SetupError, "^log_file .*: nobody is at its other end; start what reads it first$"):
            WebhookServer(self.config(log_file=pipe))
        self.assertEqual(self.program("check", "--schema", pipe, "-"), (
            2, "", f"webhook_server.py: --schema: {pipe} is a pipe or a device and no file\n"))

    def test_a_setting_that_comes_later_is_looked_after_when_it_is_declared_a_file(self):
        @dataclasses.dataclass(frozen=True)
        class Later(Config):
            clients: str = receiver._file("", "who may send", receiver._optional_text,
                                          beside=lambda config: (".new",))
        Later(database=self.database, clients=self.folder / "clients").check_files()
        for wrong in (self.database, f"{self.database}-wal", self.folder):
            with self.subTest(str(wrong)), self.assertRaisesRegex(SetupError, "clients"):
                Later(database=self.database, clients=wrong).check_files()
        with self.assertRaisesRegex(SetupError, r"^clients: .*clients.new belongs to the log file \("):
            Later(log_file=self.folder / "clients.new", clients=self.folder / "clients").check_files()

    def test_the_person_at_the_keyboard_reads_flags(self):
        code, out, err = self.program("--database", "events.db", "--log-file", "events.db")
        self.assertEqual((code, out), (2, ""))
        self.assertEqual(err, "webhook_server.py: --log-file: events.db belongs to the database (events.db); "
                              "name another file\n")
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_a_mistake_in_a_file_is_told_by_the_flag_or_the_variable_that_named_it(self):
        (self.folder / "bad.json").write_text('{"type": "objekt"}')
        (self.folder / "bad.db").write_text("no database " * 1000)
        none = self.folder.resolve() / "none"
        for name, file, said in (
                ("schema", "none.json", " none.json: No such file or directory"),
                ("schema", "bad.json", " bad.json: at /type: "), ("schema", ".", ": . is a folder"),
                ("database", "bad.db", f" {self.folder.resolve() / 'bad.db'}: the file is not a SQLite"),
                ("database", "none/x", f": the folder {none} does not exist; make it first"),
                ("log_file", "x" * 300, f" {'x' * 300}: "), ("log_file", ".", ": . is a folder")):
            flag, variable = receiver.flag_of(name), receiver.variable_of(name)
            with self.subTest(flag, file=file):
                self.assertIn(f"webhook_server.py: {flag}{said}", self.program("--port", 0, flag, file)[2])
            environment = {variable: file}
            with self.subTest(variable, file=file):
                code, out, err = self.program("--port", 0, environment=environment)
                self.assertIn(f"webhook_server.py: {variable}{said}", err)
            if name == "schema" and file != ".":
                with self.subTest("check", file=file):
                    for arguments, first in (([flag, file], flag), ([], variable)):
                        err = self.program("check", *arguments, "-", environment=environment)[2]
                        self.assertIn(f"webhook_server.py: {first}{said}", err)
        # The library's user wrote neither
        with self.assertRaisesRegex(SetupError, "^schema none.json: No such file or directory$"):
            WebhookServer(self.config(schema="none.json"))


# =============================================================================
# JSON
# =============================================================================

class JSONTest(unittest.TestCase):

    def refusal(self, body):
        """What is said about a body: 'reason at line N column N'. It must be refused."""
        with self.assertRaises(JSONError) as caught:
            parse_json(body)
        error = caught.exception
        place = f"line {error.line} column {error.column}"
        self.assertEqual(str(error), f"Invalid JSON: {error.reason} at {place}")
        return str(error)[len("Invalid JSON: "):]

    def test_json_is_read_with_its_text(self):
        body = ' {"a": [1, -0.5e1, "é\\u00e9\\ud83d\\ude00", true, null]}\r\n'.encode()
        self.assertEqual(parse_json(body), ({"a": [1, -5.0, "éé😀", True, None]}, body.decode()))

    def test_what_python_would_take_and_the_rfc_does_not_is_refused_with_its_place(self):
        for body, said in (
                (b'{"a": NaN}', "NaN and Infinity are not JSON at line 1 column 7"),
                (b"[1,\n-Infinity]", "NaN and Infinity are not JSON at line 2 column 1"),
                (b"[Infinityx]", "NaN and Infinity are not JSON at line 1 column 2"),
                (b"\xef\xbb\xbf{}",
                 "the text starts with a byte order mark (BOM), expected plain UTF-8 at line 1 column 1"),
                ('{"a": 1}'.encode("utf-16"), "the text is not UTF-8 at line 1 column 1"),
                ('{"a": 1}'.encode("utf-16-le"),
                 "the text seems to be UTF-16 or UTF-32, expected UTF-8 at line 1 column 2"),
                ('{"a": 1}'.encode("utf-16-be"),
                 "the text seems to be UTF-16 or UTF-32, expected UTF-8 at line 1 column 1"),
                ('{"a": 1}'.encode("utf-32-be"),
                 "the text seems to be UTF-16 or UTF-32, expected UTF-8 at line 1 column 1"),
                (b'["\\ud83d"]', "half of a surrogate pair in a string at line 1 column 3"),
                (b'["\\ude00\\ud83d"]', "half of a surrogate pair in a string at line 1 column 3"),
                (b'["\\ud83d\\\\ude00"]', "half of a surrogate pair in a string at line 1 column 3"),
                (b'{"\\ud83d": 1}', "half of a surrogate pair in a string at line 1 column 3"),
                (b'["a\\u0000"]', "U+0000 in a string at line 1 column 4"),
                (b'{"a": 1,\n "a": 2}', "a member name that the object already has at line 2 column 2"),
                (b'{"A": 1, "\\u0041": 2}', "a member name that the object already has at line 1 column 10"),
                (b'{"a": {"b": 1, "c": [], "b": 1}}',
                 "a member name that the object already has at line 1 column 25"),
                (b"[1e999]", "a number out of range at line 1 column 2"),
                (b"[-1E+999x]", "a number out of range at line 1 column 2")):
            with self.subTest(body):
                self.assertEqual(self.refusal(body), said)

    def test_what_looks_like_it_and_is_json_is_taken(self):
        for body, value in ((b'["\\\\u0000", "\\\\ud83d"]', ["\\u0000", "\\ud83d"]), (b'["NaN"]', ["NaN"]),
                            (b"[1e-999]", [0.0]), (b'[{"a": 1}, {"a": 1}]', [{"a": 1}, {"a": 1}]),
                            (b'{"a": {"a": 1}}', {"a": {"a": 1}}), (b'{"A": 1, "a": 2}', {"A": 1, "a": 2}),
                            ("\ufeff".join('""').encode(), "\ufeff"), (b'"\x7f"', "\x7f")):
            with self.subTest(body):
                self.assertEqual(parse_json(body)[0], value)

    def test_text_that_is_not_json_is_refused_with_its_place(self):
        for body, said in ((b"", "the text is empty, expected a JSON value at line 1 column 1"),
                           (b" \n ", "the text is empty, expected a JSON value at line 2 column 2"),
                           (b"appointment", "expecting a value at line 1 column 1"),
                           (b"{'a': 1}",
                            "expecting property name enclosed in double quotes at line 1 column 2"),
                           (b'{"a" 1}', "expecting ':' delimiter at line 1 column 6"),
                           (b'{"a": 1', "expecting ',' delimiter at line 1 column 8"),
                           (b'{"a":\n tru}', "expecting a value at line 2 column 2"),
                           (b'["abc', "unterminated string at line 1 column 2"),
                           (b'["a\nb"]', "invalid control character at line 1 column 4"),
                           (b"{} {}", "more text after the JSON value at line 1 column 4"),
                           (b'{"\xc3\xa9": "\xff"}', "the text is not UTF-8 at line 1 column 8"),
                           (b'"\xed\xa0\x80"', "the text is not UTF-8 at line 1 column 2")):
            with self.subTest(body):
                self.assertEqual(self.refusal(body), said)
        for body in (b"01", b"1.", b".5", b"+1", b"1e", b"--1", b"0x1", b"[1,]", b'{"a":1,}', b"[,]", b"True",
                     b'"\\x41"', b'"\\u12"', b"/**/1", b"'a'", b"\xc2\xa01", b"1\x0b", b'"\t"', "١".encode(),
                     b"nul",
                     b"]", b"[}", b"{]"):
            with self.subTest(body):
                self.assertRegex(self.refusal(body), r" at line \d+ column \d+$")

    def test_a_refusal_never_repeats_the_text(self):
        for body in (b'{"secret": 1, "secret": 2}', b'["secret\\u0000"]', b'{"secret" 1}', b"secret",
                     b'["secret',
                     b'"\\secret"'):
            with self.subTest(body):
                self.assertNotIn("secret", self.refusal(body))

    def test_64_levels_are_read_and_one_more_is_refused(self):
        self.assertEqual(parse_json(b"[" * 64 + b"]" * 64)[1], "[" * 64 + "]" * 64)
        self.assertEqual(self.refusal(b"[" * 65 + b"]" * 65),
                         "nested deeper than 64 levels at line 1 column 65")

    def test_brackets_side_by_side_or_in_a_string_are_no_depth(self):
        for text in ("[" + "{}," * 1000 + "[]]", json.dumps("[" * 1000), json.dumps('"[' * 1000),
                     "[" + '"\\\\",[],' * 100 + "1]"):
            with self.subTest(text[:20]):
                self.assertEqual(parse_json(text.encode())[0], json.loads(text))

    def test_a_bomb_of_a_million_brackets_is_refused(self):
        for bomb in (b"[" * 1000000, b'{"a":' * 200000, b"{" * 1000000, b'{"\\u0000' + b"[" * 1000000,
                     b"[\n" * 500000):
            with self.subTest(bomb[:9]):
                self.assertRegex(self.refusal(bomb), "nested deeper than 64 levels|U.0000 in a string")

    def test_a_number_has_at_most_100_characters(self):
        self.assertEqual(parse_json(b"9" * 100)[0], int("9" * 100))
        for number in (b"9" * 101, b"9" * 1000000, b"-0." + b"9" * 1000000, b"1e" + b"9" * 1000000):
            with self.subTest(number[:4]):
                self.assertEqual(self.refusal(b"[0, " + number + b"]"),
                                 "a number longer than 100 characters at line 1 column 5")

    def test_a_megabyte_made_to_be_slow_is_read_or_refused(self):
        """A quadratic reader would take minutes for each."""
        def filled(start, piece, end):
            return start + piece * ((MEGABYTE - len(start)) // len(piece)) + end
        names = b",".join(b'"%x":1' % number for number in range(90000))
        for name, body, taken in (("backslashes", filled(b'["\\u0000', b"\\", b""), False),
                                  ("escaped quotes", filled(b'{"\\ud800', b'\\"', b""), False),
                                  ("names and no values", filled(b"{", b'"a":', b""), False),
                                  ("objects with a name", b"[" + b'{"a":1},' * 9990 + b'"\\ud83d\\ude00"]',
                                   True),
                                  ("spaces after each string",
                                   filled(b'["\\ud83d\\ude00"', b',""' + b" " * 50, b"]"),
                                   True), ("one name twice, far apart", b'{"z":1,' + names + b',"z":1}',
                                           False),
                                  ("as many names as go in", b"{" + names + b"}", True),
                                  ("surrogate pairs", filled(b'"', b"\\ud83d\\ude00", b'"'), True)):
            with self.subTest(name):
                if taken:
                    self.assertEqual(parse_json(body)[1], body.decode())
                else:
                    self.refusal(body)

    def test_random_bytes_are_read_as_json_does_or_refused_as_json(self):
        chance = random.Random(8259)
        pieces = [b"{", b"}", b"[", b"]", b",", b":", b'"', b'"a"', b'"b":', b"1", b"-", b"1e5", b"true",
                  b"null", b" ",
                  b"\n", b"\\", b"\\u0041", b"\\u0000", b"\\ud83d", b"NaN", b"1e999", b"\0", b"\xff",
                  b"\xef\xbb\xbf",
                  "é".encode(), b"9" * 101]
        taken = 0
        for _ in range(5000):
            body = b"".join(chance.choice(pieces) for _ in range(chance.randint(1, 7)))
            with contextlib.suppress(JSONError):
                value = parse_json(body)[0]
                self.assertEqual(value, json.loads(body.decode(), object_pairs_hook=self.without_twins))
                text = json.dumps(value, allow_nan=False, ensure_ascii=False)
                self.assertNotIn("\\u0000", text.encode().decode(),
                                 body)     # encode() refuses half surrogate pairs
                taken += 1
        self.assertGreater(taken, 100)

    def without_twins(self, pairs):
        self.assertEqual(len(dict(pairs)), len(pairs))
        return dict(pairs)


# =============================================================================
# Schema
# =============================================================================

class TimestampTest(unittest.TestCase):

    def test_spellings_of_one_instant_have_one_canonical_form(self):
        for text in ("2025-01-10T14:00:00Z", "2025-01-10t14:00:00z", "2025-01-10 14:00:00",
                     "2025-01-10T14:00",
                     "2025-01-10T14", "2025-01-10T14:00:00.000Z", "2025-01-10T14:00:00,0Z",
                     "2025-01-10T14:00:00+00:00",
                     "2025-01-10T14:00:00-00:00", "2025-01-10T16:00:00+02:00", "2025-01-10T16:00:00+02",
                     "2025-01-10T16:00:00+0200", "2025-01-10T09:30:00-04:30", "20250110T140000Z",
                     "2025-W02-5T14:00:00Z", "2025W025T1400", "2025-010T14:00:00Z", "2025010T14Z",
                     "2025-01-11T00:00:00+10:00"):
            with self.subTest(text):
                self.assertEqual(canonical_timestamp(text), "2025-01-10T14:00:00Z")

    def test_the_canonical_form_is_kept_as_it_is(self):
        for text in ("2025-01-10T14:00:00Z", "2024-02-29T23:59:59.123456789Z", "0001-01-01T00:00:00Z",
                     "9999-12-31T23:59:59Z"):
            self.assertEqual(canonical_timestamp(text), text)

    def test_up_to_9_fraction_digits_count_and_trailing_zeros_do_not(self):
        for fraction, expected in ((".25", ".25"), (".250000000", ".25"), (".000000001", ".000000001"),
                                   (",5", ".5"),
                                   (".0", "")):
            self.assertEqual(canonical_timestamp(f"2025-01-10T14:00:00{fraction}Z"),
                             f"2025-01-10T14:00:00{expected}Z")
        self.assertRaises(ValueError, canonical_timestamp, "2025-01-10T14:00:00.1234567890Z")

    def test_24_o_clock_is_the_next_day(self):
        self.assertEqual(canonical_timestamp("2024-12-31T24:00:00"), "2025-01-01T00:00:00Z")
        self.assertRaises(ValueError, canonical_timestamp, "2024-12-31T24:00:01")

    def test_a_leap_second_is_taken_where_utc_can_have_one(self):
        self.assertEqual(canonical_timestamp("2017-01-01T00:59:60.5+01:00"), "2016-12-31T23:59:60.5Z")
        self.assertRaises(ValueError, canonical_timestamp, "2016-12-31T23:59:60+01:00")

    def test_what_is_no_date_time_is_refused(self):
        for text in ("", "2025-01-10", "14:00:00", "2025-02-29T00:00Z", "2025-13-01T00:00",
                     "2025-00-10T00:00",
                     "2025-01-32T00:00", "2025-366T00:00", "2025-000T00:00", "2025-W53-1T00:00",
                     "2025-W00-1T00:00",
                     "2025-W02-8T00:00", "2025-01-10T25:00", "2025-01-10T14:60", "2025-01-10T14:00:61",
                     "2025-01-10T14:00+24:00", "2025-01-10T14:00+01:60", "2025-01-10T14:00 Z",
                     "2025-01-10T14:00:00.Z",
                     "2025-1-10T14:00", "25-01-10T14:00", "2025-01-10T14:00:00Z\n", " 2025-01-10T14:00:00Z",
                     "２025-01-10T14:00:00Z", "2025-01-10T1٤:00:00Z", "2025-01-10X14:00", "0000-01-01T00:00",
                     "1736517600", "now", "0001-01-01T00:00:00+00:01", "9999-12-31T23:59:59-00:01",
                     "9999-12-31T24:00",
                     "0000-W01-1T00", "9999-W53-1T00"):
            with self.subTest(text), self.assertRaises(ValueError):
                canonical_timestamp(text)


class FormatTest(unittest.TestCase):

    def test_every_format_takes_what_its_standard_takes(self):
        for name, good, bad in (
                ("iso8601", ["2025-01-10 14:00", "2025-01-10T14:00:00.5+02:00"],
                 ["2025-01-10", "tomorrow", "2025-02-30T00:00:00Z"]),
                ("date-time", ["2025-01-10T14:00:00Z", "2025-01-10t14:00:00.1234567890123+02:00",
                               "1998-12-31T15:59:60.1-08:00"],
                 ["2025-01-10T14:00:00", "2025-01-10 14:00:00Z", "2025-02-30T00:00:00Z",
                  "2025-01-10T24:00:00Z",
                  "2025-01-10T14:00Z"]),
                ("date", ["2024-02-29"], ["2025-02-29", "2025-1-10", "20250110", "2025-01-10T00:00:00Z", ""]),
                ("time", ["14:00:00Z", "23:59:60Z", "14:00:00.5-05:00"],
                 ["14:00:00", "24:00:00Z", "14:00Z", "22:59:60Z"]),
                ("duration", ["PT30M", "P1Y2M3DT4H5M6S", "P4W"],
                 ["P", "PT", "P1", "1D", "P1Y1W", "P1D2M", "PT1D",
                                                                  "P1Y2D"]),
                ("email", ["joe@example.com", '"joe b"@example.com', "a@[127.0.0.1]", "a@[IPv6:::1]"],
                 ["joe", "@x", "joe@", ".a@x.org", "a..b@x.org", "a b@x.org", "a@x@y", "a@[300.0.0.1]",
                  "a" * 320 + "@x.org"]),
                ("uuid", ["2eb8aa08-aa98-11ea-b4aa-73b441d16380"],
                 ["2eb8aa08aa9811eab4aa73b441d16380", "2eb8aa08-aa98-11ea-b4aa-73b441d1638g"]),
                ("uri", ["http://a.example:80/b?c=%20#d", "urn:isbn:1", "mailto:a@b.c", "http://[::1]/"],
                 ["/a", "a b:c", "http://a b", "http://%zz", "http://[::1", "http://[1:2]/", "a:b\\c", "1a:b",
                  ":b"]),
                ("ipv4", ["127.0.0.1"], ["256.0.0.1", "127.0.0", "127.0.0.01", "127.0.0.1.", "1२7.0.0.1"]),
                ("ipv6", ["::1", "::ffff:1.2.3.4"], [":::1", "1::2::3", "12345::", "::1%eth0", "1.2.3.4"]),
                ("hostname", ["a.example", "xn--4gbwdl.xn--wgbh1c"],
                 ["-a.example", "a_b", "a..b", "a" * 64, ".a", "",
                                                                      "a.b."]),
                ("json-pointer", ["", "/a~0b~1c/0", "/"], ["a", "/~", "/~2", "#/a"]),
                ("regex", ["^[a-z]+$", "\\p{L}{2}", "[\\p{Script=Greek}]", "(?<=a+)b", "[a-b-c]", "a{99999}",
                           "\\2()()"],
                 ["(", ")", "\\a", "a**", "(?=a)*", "[b-a]", "[\\d-x]", "a{2,1}", "\\1", "\\k<a>", "\\p",
                  "\\p{}",
                  "x" * 1001])):
            for text in good:
                with self.subTest(format=name, good=text):
                    self.assertEqual(rules({"format": name}, text), [])
            for text in bad:
                with self.subTest(format=name, bad=text[:30]):
                    self.assertEqual(rules({"format": name}, text), ["format"])

    def test_a_format_speaks_of_texts_only_and_an_unknown_one_of_nothing(self):
        self.assertEqual(rules({"format": "ipv4"}, 5), [])
        self.assertEqual(rules({"format": "zip-code"}, "x"), [])

    def test_a_megabyte_made_to_be_slow_is_just_refused(self):
        for name, start, piece, end in (("email", "", "a.", ""), ("email", '"', "\\a", ""),
                                        ("uri", "a://", "%41", "<"),
                                        ("uri", "a:/", "/", "<"), ("hostname", "", "a-", ""),
                                        ("duration", "P", "1", ""), ("json-pointer", "", "/", "~"),
                                        ("iso8601", "2025-01-10T14:00:00.", "1", "Z"), ("ipv6", "", ":", ""),
                                        ("date-time", "2025-01-10T14:00:00.", "1", ""), ("date", "", "1", ""),
                                        ("time", "14:00:00.", "1", ""), ("uuid", "", "a", ""),
                                        ("ipv4", "", "1.", ""),
                                        ("regex", "", "\\p{L}", "")):
            with self.subTest(name + " " + start + piece):
                began = time.thread_time()
                self.assertEqual(rules({"format": name}, start + piece * (MEGABYTE // len(piece)) + end),
                                 ["format"])
                self.assertLess(time.thread_time() - began, 1)

    def test_a_regular_expression_out_of_a_payload_costs_no_more_than_its_length(self):
        """It is read and not compiled: Python's own compiler takes seconds for some of these."""
        for piece in ("(", "()", "(a{9})", "(" * 49 + "a{9}" + "){9}" * 49, "[\\s\\S]", "\\S",
                      "[\u0100\u0200\u0300]",
                      "\\p{L}", "\\", "a{1,99}", "{", "\\u{0", "(?<a>", "\\k<a>", "\\1", "(?=", "|", "[",
                      "[^", "[a-",
                      "\\p{", "\\p{a="):
            with self.subTest(piece[:10]):
                began = time.thread_time()
                for start in ("", "(?<a>)"):
                    rules({"format": "regex"}, (start + piece * 1000)[:1000])
                self.assertLess(time.thread_time() - began, 0.1)


class PatternTest(unittest.TestCase):
    """Regular expressions mean what ECMA-262 says, also where Python's would mean something else."""

    def test_a_pattern_matches_what_ecma_262_matches(self):
        for pattern, good, bad in (("^a$", ["a"], ["a\n", "ba"]), ("a", ["bab"], ["b"]),
                                   ("^\\d$", ["5"], ["٥"]),
                                   ("^\\w$", ["a"], ["é"]), ("^\\D$", ["٥"], ["5"]), ("^\\W$", ["é"], ["a"]),
                                   ("^\\s$", [" ", "\u00a0", "\ufeff"], ["\x1c", "\x85"]),
                                   ("^\\S$", ["\x1c", "\x85"], ["\u2028", "\ufeff"]),
                                   ("^[^\\S]$", [" "], ["a"]),
                                   ("^.$", ["😀", "\x85"], ["\u2028", "\r"]), ("^[a-b-c]$", ["-", "c"], ["d"]),
                                   ("^(?<$a>a)\\k<$a>$", ["aa"], ["a"]), ("^[-a]$", ["-"], ["b"]),
                                   ("^(?<y>a)\\k<y>$", ["aa"], ["a"]), ("^(a|b)\\1$", ["bb"], ["ab"]),
                                   ("^\\u{1F600}$", ["😀"], ["u"]), ("^\\ud83d\\ude00$", ["😀"], ["a"]),
                                   ("^\\cJ\\x41\\u0042\\0$", ["\nAB\0"], ["JAB0"]), ("^[]$", [], ["", "]"]),
                                   ("^[^]$", ["]", "\n"], [""]), ("^a{,2}$", ["a{,2}"], ["aa"]),
                                   ("^[[]$", ["["], ["]"]), ("^\\/\\-$", ["/-"], ["\\/"]),
                                   ("^(?=a)a(?!b)", ["ac"], ["ab"]), ("(?<=a)b", ["ab"], ["cb"]),
                                   ("^[a\\-z]$", ["-"], ["b"]), ("^[\\b]$", ["\b"], ["b"]),
                                   ("^A-\\d{4}(-[A-Z])?$", ["A-0001", "A-0001-B"], ["A-1", "B-0001"])):
            search = read_pattern(pattern).search
            with self.subTest(pattern):
                self.assertEqual([text for text in good if not search(text)], [])
                self.assertEqual([text for text in bad if search(text)], [])

    def test_what_ecma_262_does_not_know_is_refused(self):
        for pattern in ("\\a", "\\A", "\\Z", "(?P<n>a)", "(?i)a", "(?i:a)", "(?#c)", "(?>a)", "a*+", "a**",
                        "(", ")",
                        "[", "[z-a]", "*", "\\p", "\\u{110000}", "\\", "(?<a>b)(?<a>c)",
                        "(" * 5000 + ")" * 5000, "\\2",
                        "a{99999999999999}", "[\\B]", "[\\k<a>]", "^*", "a|*"):
            with self.subTest(pattern[:20]), self.assertRaises(ValueError):
                read_pattern(pattern)

    def test_a_unicode_property_is_not_supported_and_the_error_says_what_to_write(self):
        for pattern in ("\\p{L}", "^[\\p{Lu}\\d]+$", "\\P{Script=Greek}"):
            with self.subTest(pattern), self.assertRaisesRegex(ValueError,
                                                               r"\\[pP]\{.*\} is not supported: write the"):
                read_pattern(pattern)
        with self.assertRaisesRegex(SchemaError, r"^at /properties/name/pattern: \\p\{L\} is not supported"):
            Schema({"properties": {"name": {"pattern": "^\\p{L}+$"}}})

    def test_a_pattern_of_catastrophic_form_is_bounded_and_what_to_write_instead_is_not(self):
        for form, instead in (("^(a+)+$", "^a+$"), ("^(a|a)*$", "^a*$"), ("^(a*)*$", "^a*$"),
                              ("^(a|aa)+$", "^a+$"),
                              ("^(\\w+\\s?)*$", "^\\w+(\\s\\w+)*$"), ("^([a-z]+-?)+$", "^[a-z]+(-[a-z]+)*$"),
                              ("\\d+\\d+\\d+$", "^\\d{3,}$"), (".*.*.*x", "x"), ("[a-z]+@", "^[a-z]+@"),
                              ("\\s+$", "\\s$"),
                              ("^\\S+@\\S+$", "^[^@\\s]+@[^@\\s]+$"), ("^.*foo.*$", "foo"),
                              ("^(a?){50}a{50}$", "^a{50,100}$"),
                              ("^" + "a?" * 30 + "a" * 30, "^a{30,60}"),
                              ("^(a{1,30}){1,30}$", "^a{1,900}$"), ("^(?:(a*)?b)*c", "^(?:a*b)*c"),
                              ("^(a+)x?\\1$", "^(a+)x\\1$"), ("foo[a-z]+$", "foo[a-z]+"),
                              ("^(.*a){12}$", "^([^a]*a){12}$"),
                              ("^([ab]+.*c+)?", "^([ab]+c+)?"), ("[ab]+.*c+|a*", "^([ab]+c+|a*)"),
                              ("\\d{1,200}x", "^\\d{1,200}x"), ("^a+(b+b+c)?", "^a+(b+c)?"),
                              ("^((b.*?b{2})a|b)+", "^((b+)a|b)"),
                              ("^(\\w+ ?){1,3}$", "^\\w+( \\w+){0,2}$")):
            with self.subTest(form):
                self.assertLess(read_pattern(form).longest, 30000)
                self.assertEqual(read_pattern(instead).advice, "", instead)

    def test_ordinary_patterns_are_never_bounded(self):
        for pattern in ("^PAT-\\d+$", "^A-\\d{4}(-[A-Z])?$", "^(\\d{1,3}\\.){3}\\d{1,3}$", "\\d{4}-\\d{2}",
                        "^\\s*\\S+\\s*$",
                        "^(\\d{4}|\\d{6})(,(\\d{4}|\\d{6}))*$", "^([a-z]+-)*[a-z]+$",
                        "^(?=.*\\d)(?=.*[a-z]).+$",
                        "^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\\.)+[a-z]{2,}$", "^\\+?[0-9 ]{7,15}$",
                        "@example\\.com$",
                        "^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$", "^-?\\d+(\\.\\d+)?([eE][+-]?\\d+)?$",
                        "^.{1,255}$",
                        "^(foo|bar|baz)(,(foo|bar|baz))*$", "^[A-Z][a-z]+( [A-Z][a-z]+)*$",
                        "^([^,]*,){5}[^,]*$",
                        "^https?://", "x-.*", "[a-z]+", "^.*foo", "^(a|b)*$", "^([\"'])[a-z]*\\1$", "", "^$",
                        "^(" + "|".join(f"w{number}x" for number in range(100)) + ")$"):
            with self.subTest(pattern):
                self.assertEqual(read_pattern(pattern)[1:], (float("inf"), ""))

    def test_no_match_on_a_text_that_is_not_too_long_holds_the_interpreter(self):
        for form, piece in (("^(a+)+$", "a"), ("^(a|a|a)*$", "a"), ("^((a+)+)+$", "a"), ("(a+)+$", "a"),
                            ("^(.*a){12}$", "a"),
                            ("\\d+\\d+\\d+$", "1"), ("^(\\w+\\s?)*$", "a"), ("^\\S+@\\S+\\.\\S+$", "@."),
                            ("[a-z]+@", "a"),
                            ("^(a|b)+(a|b)+(a|b)+$", "ab"), ("^.*foo.*$", "foo"), ("^(a?){50}a{50}$", "a"),
                            ("\\d{1,200}x", "1"), ("^(a|b|ab)*c", "ab"), ("^(a+)x?\\1$", "a"),
                            ("(x+x+)+y", "x")):
            pattern = read_pattern(form)
            end = "\n" if "." in form else "!"
            text = (piece * int(pattern.longest))[:int(pattern.longest) - 1] + end
            with self.subTest(form, longest=pattern.longest):
                began = time.thread_time()
                self.assertIsNone(pattern.search(text))
                self.assertLess(time.thread_time() - began, 0.4)           # 0.1 where nobody else computes

    def test_random_patterns_take_their_time_neither_bounded_nor_unbounded(self):
        chance = random.Random(1991)
        bounded = free = 0
        for _ in range(150):
            source = random_pattern(chance)
            pattern = read_pattern(source)
            length = int(min(pattern.longest, 10000))
            for end in ("", "!", "b!"):
                piece = "".join(chance.choice("aabc") for _ in range(chance.randint(1, 3)))
                began = time.thread_time()
                pattern.search((piece * length)[:max(length - len(end), 0)] + end)
                self.assertLess(time.thread_time() - began, 1.5, (source, pattern, piece, end))
            bounded += bool(pattern.advice)
            free += not pattern.advice
        self.assertGreater(min(bounded, free), 25)

    def test_a_long_text_for_a_dangerous_pattern_is_refused_and_says_so(self):
        schema = Schema({"properties": {"name": {"pattern": "^(a+)+$"}}})
        longest = read_pattern("^(a+)+$").longest
        self.assertEqual(schema.errors({"name": "a" * longest}), [])
        self.assertEqual(schema.errors({"name": "a" * (longest - 1) + "b"}), [
            ("/name", "pattern", "Field 'name' must match the pattern ^(a+)+$")])
        self.assertEqual(schema.errors({"name": "a" * (longest + 1)}), [
            ("/name", "pattern",
             f"Field 'name' is longer than the {longest} characters on which the schema's pattern is tried")])
        note, = schema.notes
        self.assertRegex(note, r"^the pattern at /properties/name/pattern may take for ever, so that texts "
                               rf"of more than {longest} characters are refused untried: .*; write each repeat once")

    def test_what_is_too_long_to_judge_is_refused_whatever_is_made_of_it(self):
        dangerous, long = {"pattern": "^(a+)+$"}, "a" * 1000 + "b"
        for schema in ({"not": dangerous}, {"if": dangerous, "else": True}, {"anyOf": [dangerous, True]},
                       {"oneOf": [dangerous, True]}, {"contains": dangerous, "minContains": 0}):
            value = [long] if "contains" in schema else long
            with self.subTest(schema):
                self.assertEqual([problem.rule for problem in Schema(schema).errors(value)], ["pattern"])
        for schema in ({"patternProperties": {"^(a+)+$": True}}, {"propertyNames": dangerous},
                       {"patternProperties": {"^(a+)+$": True}, "additionalProperties": False}):
            with self.subTest(schema):
                self.assertEqual(len(Schema(schema).notes), 1)
                self.assertEqual(Schema(schema).errors({"a": 1}), [])
                self.assertEqual(len(Schema(schema).errors({long: 1})), 1)


def random_pattern(chance, depth=0):
    """A regular expression of letters, groups and repeats, half of them anchored."""
    branches = []
    for _ in range(chance.choice([1, 1, 1, 2])):
        branch = ""
        for _ in range(chance.randint(1, 3)):
            if depth < 2 and chance.random() < 0.3:
                branch += f"({random_pattern(chance, depth + 1)})"
            else:
                branch += chance.choice(["a", "b", "c", ".", "[ab]"])
            branch += chance.choice(["", "", "", "*", "+", "?", "{2}", "{1,3}", "{0,9}", "*?"])
        branches.append(branch)
    whole = "|".join(branches)
    return whole if depth else chance.choice(["^(?:%s)$", "^(?:%s)x", "%sx", "%s$"]) % whole


class SchemaTest(unittest.TestCase):

    def test_errors_say_where_which_keyword_and_what_was_expected(self):
        for schema, value, expected in (
                ({"type": "object"}, [], ("", "type", "The payload must be of type object")),
                ({"required": ["a"]}, {}, ("/a", "required", "Missing required field: a")),
                ({"required": [""]}, {}, ("/", "required", "Missing required field: (empty name)")),
                ({"properties": {"a": {"required": ["b"]}}}, {"a": {}},
                 ("/a/b", "required", "Missing required field: a.b")),
                ({"dependentRequired": {"a": ["b"]}}, {"a": 1},
                 ("/b", "dependentRequired", "Missing required field: b (as there is a)")),
                ({"properties": {"a": {"type": ["string", "null"]}}}, {"a": 5},
                 ("/a", "type", "Field 'a' must be of type string or null")),
                ({"items": {"enum": ["x", 1]}}, ["x", "y"], ("/1", "enum",
                                                             "Field '[1]' must be one of: x, 1")),
                ({"const": None}, 1, ("", "const", "The payload must be null")),
                ({"minLength": 1}, "", ("", "minLength", "The payload must not be empty")),
                ({"maxLength": 2}, "abc", ("", "maxLength", "The payload must have at most 2 characters")),
                ({"minimum": 2}, 1, ("", "minimum", "The payload must be at least 2")),
                ({"multipleOf": 0.1}, 0.25, ("", "multipleOf", "The payload must be a multiple of 0.1")),
                ({"pattern": "^A"}, "b", ("", "pattern", "The payload must match the pattern ^A")),
                ({"format": "date"}, "b",
                 ("", "format", "The payload must be a date, for example 2025-01-10")),
                ({"uniqueItems": True}, [1, 1.0], ("", "uniqueItems",
                                                   "The payload must not contain an item twice")),
                ({"additionalProperties": False}, {"a/b~": 1},
                 ("/a~1b~0", "additionalProperties", "Field 'a/b~' is not a known field")),
                ({"propertyNames": {"maxLength": 1}}, {"ab": 1},
                 ("/ab", "propertyNames", "Field 'ab' has a name that is not allowed")),
                ({"not": {}}, 1, ("", "not", "The payload must not fit the schema in not")),
                (False, 1, ("", "false", "The payload is not allowed"))):
            with self.subTest(schema):
                self.assertEqual(Schema(schema).errors(value), [expected])

    def test_numbers_are_equal_as_in_mathematics_and_true_is_no_number(self):
        for one, other, same in ((1, 1.0, True), (0, -0.0, True), (1, True, False), (0, False, False),
                                 (10 ** 22, 1e22, True), (2 ** 53, 2.0 ** 53, True),
                                 (2 ** 53 + 1, 2.0 ** 53, False),
                                 (1e308, 1e308, True), ("1", 1, False), (None, False, False),
                                 ([1], [1.0], True),
                                 ({}, [], False), ({"a": 1, "b": [2]}, {"b": [2.0], "a": 1}, True),
                                 (["a", "b"], ["b", "a"], False), ({'a":1,"b': 1}, {"a": 1, "b": 1}, False)):
            with self.subTest(repr((one, other))):
                self.assertIs(json_equal(one, other), same)
                self.assertEqual(rules({"const": one}, other), [] if same else ["const"])
                self.assertEqual(rules({"enum": ["x", one]}, other), [] if same else ["enum"])
                self.assertEqual(rules({"uniqueItems": True}, [one, other]), ["uniqueItems"] if same else [])
        self.assertEqual(rules({"type": "integer"}, 1.0), [])
        self.assertEqual(rules({"type": "number"}, True), ["type"])

    def test_the_text_for_equality_does_not_blow_up_huge_numbers(self):
        self.assertLess(len(canonical_json([1e308] * 1000)), 10000)

    def test_a_multiple_is_meant_as_it_is_written(self):
        for value, divisor, fits in ((0.3, 0.1, True), (0.35, 0.1, False), (4, 2, True), (4.0, 2, True),
                                     (5, 2, False),
                                     (1e308, 0.5, True), (1, 1e-300, True), (1e-300, 1e300, False),
                                     (True, 2, True)):
            with self.subTest((value, divisor)):
                self.assertEqual(rules({"multipleOf": divisor}, value), [] if fits else ["multipleOf"])

    def test_a_hostile_value_comes_back_as_at_most_100_problems(self):
        many = {str(number): number for number in range(1000)}
        for schema, value in (({"items": {"type": "string"}}, [1] * 100000),
                              ({"additionalProperties": False}, many),
                              ({"propertyNames": {"maxLength": 0}}, many),
                              ({"patternProperties": {"": {"type": "null"}}}, many),
                              ({"unevaluatedProperties": False}, many),
                              ({"unevaluatedItems": False}, [1] * 100000)):
            with self.subTest(schema):
                self.assertEqual(len(Schema(schema).errors(value)), 100)

    def test_a_missing_field_is_told_even_after_a_hundred_other_problems(self):
        schema = Schema({"properties": {"a": {"items": {"type": "string"}}}, "required": ["b"]})
        problems = schema.errors({"a": [1] * 1000})
        self.assertIn("Missing required field: b", [problem.message for problem in problems])

    def test_names_in_messages_are_short_and_printable(self):
        problem, = Schema({"additionalProperties": False}).errors({"\x1b[2J\n" + "x" * 1000: 1})
        self.assertTrue(problem.message.isprintable() and problem.path.isprintable())
        self.assertLess(len(problem.message), 200)

    def test_references_lead_to_pointers_anchors_ids_and_further_documents(self):
        documents = {"http://x.example/text": {"type": "string",
                                               "$defs": {"n": {"$anchor": "number", "type": "number"}}}}
        for reference, bad in (("#/$defs/a~1b%20c", 1), ("#id", "x"), ("inner", "x"),
                               ("http://x.example/text", 1),
                               ("http://x.example/text#number", "x")):
            schema = {"$id": "http://y.example/all", "$ref": reference, "$defs": {
                "a/b c": {"type": "string"}, "i": {"$anchor": "id", "type": "integer"},
                "k": {"$id": "inner", "type": "null"}}}
            with self.subTest(reference):
                self.assertEqual([problem.rule for problem in Schema(schema, documents).errors(bad)],
                                 ["type"])

    def test_a_schema_may_describe_a_tree_by_itself(self):
        tree = {"type": "object", "properties": {"below": {"type": "array", "items": {"$ref": "#"}}},
                "required": ["name"]}
        self.assertEqual(rules(tree, {"name": 1, "below": [{"name": 2, "below": [{"name": 3}]}]}), [])
        self.assertEqual(Schema(tree).errors({"name": 1, "below": [{"name": 2, "below": [{}]}]})[0].path,
                         "/below/0/below/0/name")

    def test_a_schema_that_is_not_valid_is_refused_with_its_place(self):
        for schema, place in (
                ({"type": "strnig"}, "/type"), ({"properties": {"a": {"minLength": -1}}},
                                                "/properties/a/minLength"),
                ({"required": "a"}, "/required"),
                ({"required": ["a", "a"]}, "/required"), ({"items": [{}]}, "/items"),
                ({"allOf": []}, "/allOf"),
                ({"anyOf": [{}, 5]}, "/anyOf/1"),
                ({"$ref": "#/$defs/none"}, "/$ref"), ({"$ref": "#none"}, "/$ref"),
                ({"$ref": "http://x.example/"}, "/$ref"), ({"$ref": 5}, "/$ref"),
                ({"$id": "http://x.example/", "$ref": "http://["}, "/$ref"), ({"pattern": "("}, "/pattern"),
                ({"patternProperties": {"a/b(": {}}}, "/patternProperties/a~1b("),
                ({"additionalProperties": False, "patternProperties": 5}, "/patternProperties"),
                ({"additionalProperties": False, "properties": 5}, "/properties"),
                ({"items": {}, "prefixItems": 5}, "/prefixItems"),
                ({"contains": {}, "minContains": "x"}, "/minContains"), ({"if": {}, "then": 5}, "/then"),
                ({"$defs": {"a": {"enum": 5}}}, "/$defs/a/enum"), ({"multipleOf": 0}, "/multipleOf"),
                ({"maximum": float("inf")}, ""), ({"enum": [float("nan")]}, ""), ({"const": {1, 2}}, ""),
                ({"uniqueItems": 1}, "/uniqueItems"), ({"maximum": True}, "/maximum"),
                ({"$anchor": "a b"}, "/$anchor"), ({"$anchor": "1a"}, "/$anchor"),
                ({"$dynamicAnchor": ""}, "/$dynamicAnchor"),
                ({"$defs": {"a": {"$id": "#a"}}}, "/$defs/a/$id"), ({"$id": "http://x.example/#a"}, "/$id"),
                ({"$schema": []}, "/$schema"), ({"allOf": [{"$ref": "#"}]}, ""), ("text", ""), ([], ""),
                (None, ""),
                ({"dependentSchemas": {"a/b": 5}}, "/dependentSchemas/a~1b"),
                ({"examples": [1], "$ref": "#/examples/-1"}, "/$ref")):
            with self.subTest(schema):
                with self.assertRaises(SchemaError) as caught:
                    Schema(schema)
                error = caught.exception
                if place:
                    self.assertEqual(error.place, place)
                self.assertEqual(str(error), f"at {error.place or '/'}: {error.reason}")

    def test_an_anchor_that_is_a_name_and_an_id_with_an_empty_fragment_are_taken(self):
        for schema in ({"$anchor": "a"}, {"$anchor": "_a.b-1"}, {"$dynamicAnchor": "Z"},
                       {"$id": "http://x.example/#"},
                       {"$id": "x"}):
            with self.subTest(schema):
                self.assertEqual(rules(schema, 1), [])

    def test_what_other_drafts_take_and_this_one_does_not_is_refused_with_what_to_write(self):
        for schema, said in (
                ({"properties": {"a": {"type": "string", "required": True}}},
                 "at /properties/a/required: required must be an array of different texts; write the names "
                 "of required fields into required of the object around them"),
                ({"minimum": 0, "exclusiveMinimum": True},
                 "at /exclusiveMinimum: exclusiveMinimum must be a number; write the limit here and leave "
                 "out minimum"),
                ({"exclusiveMaximum": False},
                 "at /exclusiveMaximum: exclusiveMaximum must be a number; write the limit here and leave "
                 "out maximum"),
                ({"items": [{}]}, "at /items: items must be a schema; write the array into prefixItems"),
                ({"$id": "#a"},
                 "at /$id: $id must be a URI reference without a fragment (a name for this place is "
                 "$anchor)")):
            with self.subTest(schema):
                with self.assertRaises(SchemaError) as caught:
                    Schema(schema)
                self.assertEqual(str(caught.exception), said)

    def test_a_whole_openapi_document_is_refused_as_it_would_check_nothing(self):
        for document in ({"openapi": "3.1.0", "info": {}, "paths": {}, "components": {"schemas": {}}},
                         {"swagger": "2.0", "info": {}, "paths": {}}):
            with self.assertRaisesRegex(SchemaError, "write the one schema out of it, with what it refers to in"):
                Schema(document)
        self.assertEqual(rules({"openapi": "of the 3rd page", "type": "string"}, 1), ["type"])

    def test_what_other_drafts_know_and_this_one_ignores_is_noted_with_what_to_write(self):
        for schema, place, keyword, instead in (
                ({"properties": {"a": {"type": "string", "nullable": True}}}, "/properties/a", "nullable",
                 '"null" into type'),
                ({"dependencies": {"a": ["b"]}}, "/", "dependencies", "dependentRequired"),
                ({"prefixItems": [{}], "additionalItems": False}, "/", "additionalItems", "prefixItems"),
                ({"oneOf": [{}], "discriminator": {"propertyName": "kind"}}, "/", "discriminator", "const"),
                ({"id": "http://x.example/"}, "/", "id", "$id")):
            with self.subTest(keyword):
                note, = Schema(schema).notes
                self.assertIn(f"the keyword {keyword} at {place} is not of draft 2020-12 and is ignored; ",
                              note)
                self.assertIn(instead, note)
        for fine in ({"properties": {name: {} for name in receiver.FOREIGN_KEYWORDS}}, {"x-nullable": True},
                     {"enum": [{"nullable": True}]}, {"definitions": {"a": {"type": "string"}}}, True):
            with self.subTest(fine):
                self.assertEqual(Schema(fine).notes, [])

    def test_definitions_are_read_as_defs_and_named_where_something_refers_to_them(self):
        schema = Schema({"properties": {"a": {"$ref": "#/definitions/n"}, "b": {"$ref": "#/definitions/n"}},
                         "definitions": {"n": {"$anchor": "number", "type": "number"}},
                         "items": {"$ref": "#number"}})
        self.assertEqual([problem.rule for problem in schema.errors({"a": "x", "b": 1})], ["type"])
        self.assertEqual([problem.rule for problem in schema.errors(["x"])], ["type"])
        self.assertEqual(schema.notes,
                         ["definitions is read as $defs, its name since 2019-09: write $defs, also in $ref"])

    def test_a_schema_that_comes_back_to_a_value_again_and_again_refuses_it_in_time(self):
        """Without a count of its steps it would make 2 ** 60 of them."""
        below = {"properties": {"a": {"$ref": "#"}}}
        deep = {"a": 1}
        for _ in range(60):
            deep = {"a": deep}
        for keyword in ("allOf", "anyOf", "oneOf"):
            schema = {"type": ["object", "integer"], keyword: [{**below, "required": ["b"]},
                                                               {**below, "required": ["c"]}]}
            with self.subTest(keyword):
                began = time.thread_time()
                self.assertTrue(Schema(schema).errors(deep))
                self.assertLess(time.thread_time() - began, 10)
        tree = Schema({"anyOf": [{"type": "integer"}, {"type": "array", "items": {"$ref": "#"}}]})
        self.assertEqual(tree.errors([[[1] * 100] * 50] * 50), [])

    def test_a_megabyte_made_to_be_slow_is_judged_in_time(self):
        many = {f"{number:x}": number for number in range(90000)}
        for schema, value in (({"uniqueItems": True}, list(range(150000))), ({"enum": [1, {}]}, many),
                              ({"const": 1}, many),
                              ({"uniqueItems": True}, [[number] for number in range(120000)]),
                              ({"uniqueItems": True}, ["a" * 500 + str(number) for number in range(2000)]),
                              ({"propertyNames": {"pattern": "^[0-9a-f]+$"}}, many),
                              ({"patternProperties": {"^[0-9a-f]+$": True}, "unevaluatedProperties": False},
                               many),
                              ({"items": {"multipleOf": 1e-300}},
                               [1e308 + number for number in range(50000)]),
                              ({"items": {"oneOf": [{"type": "string"}, {"type": "integer"}]}},
                               [1] * 100000)):
            with self.subTest(schema):
                began = time.thread_time()
                Schema(schema).errors(value)
                self.assertLess(time.thread_time() - began, 10)

    def test_a_schema_error_is_one_line(self):
        with self.assertRaises(SchemaError) as caught:
            Schema({"properties": {"a\n\x1b[2J": {"type": 5}}})
        self.assertTrue(str(caught.exception).isprintable())

    def test_nothing_nested_without_end_breaks_the_compiler(self):
        for keyword, wrap in (("items", lambda schema: {"type": "array", "items": schema}),
                              ("properties", lambda schema: {"properties": {"a": schema}}),
                              ("not", lambda schema: {"not": schema})):
            with self.subTest(keyword):
                schema = {"type": "string"}
                for _ in range(30):
                    schema = wrap(schema)
                self.assertEqual(Schema(schema).errors("x") == [], keyword != "items")
                for _ in range(5000):
                    schema = wrap(schema)
                self.assertRaisesRegex(SchemaError, "nested too deeply", Schema, schema)

    def test_an_unknown_keyword_is_an_annotation_and_a_misspelt_one_is_listed(self):
        schema = Schema({"properties": {"a": {"maxlength": 1, "tpye": "string"}}, "x-owner": "desk",
                         "requird": ["b"],
                         "definitions": {}, "format": "zip"})
        self.assertEqual(schema.errors({"a": "long"}), [])
        self.assertEqual(sorted(schema.notes), [
            "the format zip at / is not known and not checked",
            "the unknown keyword maxlength at /properties/a is ignored; did you mean maxLength?",
            "the unknown keyword requird at / is ignored; did you mean required?",
            "the unknown keyword tpye at /properties/a is ignored; did you mean type?"])
        self.assertEqual(Schema({"properties": {"requird": {}, "lenght": True}}).notes, [])

    def test_all_member_names_that_a_schema_knows_are_its_names(self):
        schema = Schema({"properties": {"a": {"required": ["b"]}}, "dependentRequired": {"c": ["d"]},
                         "anyOf": [{"properties": {"e": True}}],
                         "$defs": {"f": {"properties": {"g": {"enum": ["h"]}}}}})
        self.assertEqual(schema.names, set("abcdeg"))

    def test_formats_can_be_left_to_be_annotations(self):
        self.assertEqual(Schema({"format": "date"}, assert_formats=False).errors("x"), [])

    def test_one_schema_serves_many_threads(self):
        schema = Schema({"items": {"anyOf": [{"type": "string"}, {"minimum": 2}]}, "uniqueItems": True})
        results = []

        def check():
            results.extend(len(schema.errors([1, 2, "a"])) for _ in range(100))

        threads = [threading.Thread(target=check) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        self.assertEqual(results, [1] * 400)

    def test_the_fast_way_accepts_only_what_every_check_accepts(self):
        chance = random.Random(2020)
        accepted = refused = 0
        for _ in range(1500):
            document = random_schema(chance)
            schema = Schema(document)
            for _ in range(12):
                value = random_value(chance, document if chance.random() < 0.7 else {})
                problems = slow_errors(schema, value)
                if schema.accepts(value):
                    self.assertEqual(problems, [], (document, value))
                    accepted += 1
                refused += bool(problems)
                self.assertEqual(bool(schema.errors(value)), bool(problems), (document, value))
        self.assertGreater(accepted, 1000)
        self.assertGreater(refused, 1000)

    def test_an_ordinary_event_takes_the_fast_way(self):
        self.assertTrue(Schema(receiver.EVENT_SCHEMA).accepts(event(notes=None, room=4)))
        schema = Schema({"type": "object", "additionalProperties": False, "properties": {
            "age": {"type": "integer", "minimum": 0},
            "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]+$"}, "minItems": 1}}})
        self.assertTrue(schema.accepts({"tags": ["a"], "age": 5}))

    def test_nothing_in_a_schema_becomes_code(self):
        name = "a'];import os;raise SystemExit;['\n\"\"\"\\"
        schema = {"properties": {name: {"enum": [name]}}, "required": [name, name + "2"],
                  "additionalProperties": False}
        self.assertEqual([problem.rule for problem in Schema(schema).errors({name: name, "x": 1})],
                         ["required", "additionalProperties"])


def slow_errors(schema, value):
    """What the checks say, which the fast way must agree with."""
    with mock.patch.object(schema, "accepts", lambda value: False):
        return schema.errors(value)


TEXTS = ["", "a", "ab", "2025-01-10T14:00:00Z", "é", "1"]
SCALARS = [None, True, False, 0, 1, 1.0, -1, 1.5, 2, 10 ** 30, *TEXTS]


def random_schema(chance, depth=0):
    """A schema of the keywords that the fast way knows, and sometimes of one that it does not."""
    if depth > 2 or chance.random() < 0.1:
        return chance.choice([True, {}, {"type": "string"}, {"type": "integer"}, False] if depth else [True,
                                                                                                       {}])
    schema = {}
    if chance.random() < 0.6:
        schema["type"] = chance.choice(["object", "array", "string", "number", "integer", "boolean", "null",
                                        ["string", "null"], ["object", "array"], ["integer", "string"],
                                        ["number", "boolean", "object"]])
    for keyword, make in (
            ("minLength", lambda: chance.randint(0, 2)), ("maxLength", lambda: chance.randint(0, 3)),
            ("pattern", lambda: chance.choice(["^a", "\\d", "^(a|a)*(.*){50}$"])),
            ("format", lambda: chance.choice(["iso8601", "date-time", "ipv4", "unknown"])),
            ("minimum", lambda: chance.choice([0, 1.0, 1.5])),
            ("maximum", lambda: chance.choice([1, 2.0, 10 ** 20])),
            ("enum", lambda: chance.sample(TEXTS if chance.random() < 0.5 else SCALARS, 3)),
            ("const", lambda: chance.choice(SCALARS)), ("required",
                                                        lambda: chance.sample("abc", chance.randint(0, 2))),
            ("minItems", lambda: chance.randint(0, 2)), ("maxItems", lambda: chance.randint(0, 3)),
            ("items", lambda: random_schema(chance, depth + 1)),
            ("properties", lambda: {name: random_schema(chance, depth + 1)
                                    for name in chance.sample("abc", chance.randint(0, 3))}),
            ("additionalProperties", lambda: chance.choice([True, False, False, {"type": "string"}])),
            ("uniqueItems", lambda: True), ("anyOf", lambda: [random_schema(chance,
                                                                            depth + 1) for _ in range(2)])):
        rare, common = ("enum", "const", "uniqueItems", "anyOf"), ("properties", "items")
        if chance.random() < (0.04 if keyword in rare else 0.35 if keyword in common else 0.15):
            schema[keyword] = make()
    return schema


def random_value(chance, schema, depth=0):
    """A value that has some chance to fit."""
    schema = schema if isinstance(schema, dict) else {}
    if chance.random() < 0.2 or depth > 3:
        return chance.choice(SCALARS)
    if "enum" in schema or "const" in schema:
        return chance.choice(schema.get("enum") or [schema.get("const")])
    kind = schema.get("type", chance.choice(["object", "array", "string", "number"]))
    kind = chance.choice(kind) if isinstance(kind, list) else kind
    if kind == "object":
        known = schema.get("properties", {})
        names = [name for name in "abcd" if chance.random() < {"d": 0.3}.get(name, 0.7)]
        return {name: random_value(chance, known.get(name, {}), depth + 1) for name in names}
    if kind == "array":
        return [random_value(chance, schema.get("items", {}), depth + 1) for _ in range(chance.randint(0, 3))]
    return chance.choice({"string": TEXTS, "number": [0, 1.5, 2, 10 ** 30], "integer": [0, 1, 2.0],
                          "boolean": [True, False]}.get(kind, [None]))


SUITE = os.environ.get("JSON_SCHEMA_TEST_SUITE", "")
SUITE_FORMATS = ("date-time", "date", "time", "duration", "email", "uuid", "uri", "ipv4", "ipv6", "hostname",
                 "json-pointer", "regex", "ecmascript-regex", "unknown")
UNICODE_PROPERTIES = ("patterns always use unicode semantics with pattern", "pattern with non-ASCII digits",
                      "patterns always use unicode semantics with patternProperties",
                      "patternProperties with non-ASCII digits")


@unittest.skipUnless(SUITE, "JSON_SCHEMA_TEST_SUITE does not name a folder with the official suite")
class SchemaSuiteTest(unittest.TestCase):
    """The official JSON-Schema-Test-Suite: a folder with tests/, remotes/ and metaschemas/."""

    @classmethod
    def setUpClass(cls):
        root = Path(SUITE)
        cls.tests, cls.documents = root / "tests" / "draft2020-12", {}
        for path in sorted((root / "remotes").rglob("*.json")):
            name = path.relative_to(root / "remotes").as_posix()
            if not name.startswith("draft") or name.startswith("draft2020-12/"):
                cls.documents["http://localhost:1234/" + name] = json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(path for path in (root / "metaschemas").rglob("*") if path.is_file()):
            document = json.loads(path.read_text(encoding="utf-8"))
            cls.documents[document["$id"]] = document

    def run_suite(self, paths, least, without=(), **options):
        count = 0
        for path in paths:
            for group in json.loads(path.read_text(encoding="utf-8")):
                if group["description"] in without:
                    self.assertRaisesRegex(SchemaError, without[group["description"]], Schema,
                                           group["schema"])
                    continue
                schema = Schema(group["schema"], self.documents, **options)
                for test in group["tests"]:
                    count += 1
                    with self.subTest(file=path.name, group=group["description"], test=test["description"]):
                        self.assertIs(schema.errors(test["data"]) == [], test["valid"])
        self.assertGreaterEqual(count, least)

    def test_every_required_test_of_draft_2020_12_passes(self):
        self.run_suite(sorted(self.tests.glob("*.json")), 1000, assert_formats=False)

    def test_every_format_that_is_asserted_passes_its_tests(self):
        folder = self.tests / "optional" / "format"
        paths = [folder / (name + ".json") for name in SUITE_FORMATS]
        self.run_suite([path for path in paths if path.exists()], 200)

    def test_patterns_pass_the_tests_of_ecma_262(self):
        folder = self.tests / "optional"
        # \\p{...} would take 0.2 s and 2,000 characters each, which nobody needs: it is refused with a word
        unicode_properties = dict.fromkeys(UNICODE_PROPERTIES, "is not supported")
        self.run_suite([folder / "ecmascript-regex.json", folder / "non-bmp-regex.json"], 50,
                       unicode_properties,
                       assert_formats=False)


# =============================================================================
# Events
# =============================================================================

UNNAMED = "{} at a member that the schema does not name"


class EventTest(unittest.TestCase):

    def setUp(self):
        self.contract = Contract(receiver.EVENT_SCHEMA)

    def read(self, value, contract=None):
        return (contract or self.contract).event(value, json.dumps(value), "2025-01-10T14:00:01.000000Z",
                                                 "desk")

    def problems(self, value, contract=None):
        """What is wrong with a value that must be refused, the problem that decides the message first."""
        with self.assertRaises(InvalidEvent) as caught:
            self.read(value, contract)
        self.assertEqual(str(caught.exception), caught.exception.problems[0].message)
        return caught.exception.problems

    @staticmethod
    def with_property(name, **changes):
        """A contract by the built-in schema with one property changed."""
        properties = receiver.EVENT_SCHEMA["properties"]
        changed = {**properties, name: {**properties.get(name, {}), **changes}}
        return Contract({**receiver.EVENT_SCHEMA, "properties": changed})

    def test_a_valid_value_becomes_an_event_with_its_payload_as_it_came(self):
        value = event(timestamp="2025-01-10 16:00:00.50+02:00", notes="bring results", room={"floor": 4})
        self.assertEqual(self.read(value), (
            "scheduled", "APT-1", "PAT-1", "2025-01-10T14:00:00.5Z", "bring results",
            "2025-01-10T14:00:01.000000Z",
            "desk", json.dumps(value), None))
        self.assertIsNone(self.read(event(notes=None)).notes)

    def test_the_first_stage_that_fails_decides_the_message(self):
        wrong = event(event_type="moved", appointment_id="", timestamp="soon", notes=5)
        stages = (("patient_id", ..., "PAT-1", "Missing required field: patient_id"),
                  ("notes", 5, None, "Field 'notes' must be of type string or null"),
                  ("event_type", "moved", "updated",
                   "Field 'event_type' must be one of: scheduled, cancelled, updated"),
                  ("timestamp", "soon", "2025-01-10T14:00:00Z",
                   "Field 'timestamp' must be an ISO 8601 date-time, for example 2025-01-10T14:00:00Z"),
                  ("appointment_id", "", "APT-1", "Field 'appointment_id' must not be empty"),
                  ("patient_id", "x" * 256, "PAT-1", "Field 'patient_id' must have at most 255 characters"))
        value = {**wrong, "patient_id": ...}
        for name, bad, good, message in stages:
            with self.subTest(name):
                value[name] = bad
                self.assertEqual(self.problems({key: item for key,
                                                item in value.items() if item is not ...})[0].message,
                                 message)
                value[name] = good
        self.assertEqual(self.read(value).appointment_id, "APT-1")

    def test_all_problems_are_told_at_once_with_path_and_rule(self):
        found = self.problems({"event_type": "moved", "appointment_id": "", "timestamp": 5})
        self.assertEqual([(problem.path, problem.rule) for problem in found],
                         [("/patient_id", "required"), ("/timestamp", "type"), ("/event_type", "enum"),
                          ("/appointment_id", "minLength")])

    def test_what_is_no_object_is_refused_by_its_type(self):
        for value in (None, True, 5, "text", [], [event()]):
            with self.subTest(repr(value)[:20]):
                problem, = self.problems(value)
                self.assertEqual(problem, ("", "type", "The payload must be of type object"))

    def test_a_message_never_repeats_a_value(self):
        contract = self.with_property("notes", maxLength=3, pattern="^a", format="email")
        for value in (event(event_type="secret"), event(appointment_id="secret" * 50),
                      event(patient_id=["secret"]),
                      event(timestamp="secret"), event(notes="secret"), event(notes={"secret": "secret"}),
                      "secret",
                      ["secret"]):
            with self.subTest(repr(value)[:60]):
                for problem in self.problems(value, contract):
                    self.assertNotIn("secret", "".join(problem))

    def test_an_id_of_spaces_is_empty(self):
        for name in ("appointment_id", "patient_id"):
            for blank in (" ", "\t\n", "\u3000"):
                with self.subTest(name=name, blank=blank):
                    self.assertEqual(self.problems(event(**{name: blank}))[0],
                                     ("/" + name, "minLength", f"Field '{name}' must not be empty"))

    def test_a_new_event_type_in_the_schema_is_taken(self):
        contract = self.with_property("event_type", enum=["scheduled", "no_show"])
        self.assertEqual(self.read(event(event_type="no_show"), contract).event_type, "no_show")
        self.assertEqual(self.problems(event(event_type="updated"), contract)[0].message,
                         "Field 'event_type' must be one of: scheduled, no_show")
        self.assertEqual(contract.event_types, ("scheduled", "no_show"))

    def test_a_new_required_field_in_the_schema_is_required(self):
        contract = Contract({**receiver.EVENT_SCHEMA, "required": [*receiver.EVENT_SCHEMA["required"],
                                                                   "clinic"]})
        self.assertEqual(self.problems(event(), contract)[0].message, "Missing required field: clinic")
        self.assertEqual(self.read(event(clinic="north"), contract).patient_id, "PAT-1")

    def test_a_new_pattern_for_ids_is_kept(self):
        contract = self.with_property("patient_id", pattern="^PAT-\\d+$")
        self.assertEqual(self.problems(event(patient_id="77"), contract)[0].message,
                         "Field 'patient_id' must match the pattern ^PAT-\\d+$")
        self.assertEqual(self.read(event(), contract).patient_id, "PAT-1")

    def test_a_schema_laxer_than_the_table_still_takes_only_what_the_table_can_hold(self):
        for document in (True, {}, {"type": "object"}, {"properties": {"timestamp": {"format": "date-time"}}},
                         {"properties": {"event_type": True}}):
            contract = Contract(document)
            with self.subTest(document):
                self.assertEqual(self.read(event(notes=["any"]), contract)[:5],
                                 ("scheduled", "APT-1", "PAT-1", "2025-01-10T14:00:00Z", None))
                for name in receiver.REQUIRED_FIELDS:
                    for bad, rule in ((..., "required"), (5, "type"), (None, "type"), ([], "type"),
                                      (" ", None)):
                        problem = self.problems(event(**{name: bad}), contract)[0]
                        self.assertEqual((problem.path, problem.rule), (
                            "/" + name, rule or ("format" if name == "timestamp" else "minLength")))
                for value in (None, [], "x", 5, True, [event()]):
                    self.assertEqual(self.problems(value, contract)[0].rule, "type")

    def test_a_time_that_the_schema_takes_and_no_database_column_can_hold_is_refused(self):
        contract = self.with_property("timestamp", format="date-time")
        for text in ("2025-01-10T14:00:00.1234567890Z", "0000-01-01T00:00:00Z", "9999-12-31T23:59:59-01:00"):
            with self.subTest(text):
                self.assertEqual(self.problems(event(timestamp=text), contract)[0].path, "/timestamp")

    def test_the_fields_that_the_schema_names_are_known(self):
        self.assertEqual(self.contract.field_names, {"event_type", "appointment_id", "patient_id",
                                                     "timestamp", "notes"})
        self.assertEqual((Contract(True).field_names, Contract({}).event_types), (frozenset(), ()))

    def test_a_schema_that_no_event_of_the_table_could_satisfy_makes_no_contract(self):
        said = "at /properties/timestamp/type: must allow string"
        for kind in ("integer", ["null", "integer"]):
            with self.subTest(kind), self.assertRaisesRegex(SchemaError, said):
                self.with_property("timestamp", type=kind)
        self.with_property("timestamp", type=["null", "string"])

    def test_all_that_is_wrong_is_told_at_once_also_what_only_the_table_asks_for(self):
        problems = self.problems(event(event_type="moved", appointment_id=" ", timestamp="soon"))
        self.assertEqual([problem.path for problem in problems],
                         ["/event_type", "/timestamp", "/appointment_id"])

    def test_a_document_that_is_no_schema_makes_no_contract(self):
        for document in (None, [], "x", {"type": 5}, {"properties": []},
                         {"properties": {"event_type": {"enum": "x"}}}):
            with self.subTest(document), self.assertRaises(SchemaError):
                Contract(document)

    def test_the_text_for_the_log_names_only_what_the_schema_names(self):
        open_contract = Contract({**receiver.EVENT_SCHEMA, "additionalProperties": {"type": "object",
                                                                                    "required": ["b"]}})
        closed = Contract({**receiver.EVENT_SCHEMA, "additionalProperties": False})
        lists = self.with_property("notes", type="array", items={"type": "string"})
        patterns = Contract({**receiver.EVENT_SCHEMA, "patternProperties": {"^X": {"type": "integer"}},
                             "propertyNames": {"maxLength": 20}})
        for contract, value, said in (
                (closed, event(appointment_id=...), "Missing required field: appointment_id"),
                (closed, event(timestamp="Jane Doe"),
                 "Field 'timestamp' must be an ISO 8601 date-time, for example 2025-01-10T14:00:00Z"),
                (closed, event(event_type="Jane Doe"),
                 "Field 'event_type' must be one of: scheduled, cancelled, updated"),
                (closed, event(patient_id=" "), "Field 'patient_id' must not be empty"),
                (closed, ["Jane Doe"], "The payload must be of type object"),
                (closed, event(**{"Jane Doe": 1}), UNNAMED.format("additionalProperties")),
                (closed, event(**{"4711": 1}), UNNAMED.format("additionalProperties")),
                (closed, event(**{"a~/b": 1}), UNNAMED.format("additionalProperties")),
                (closed, event(**{"": 1}), UNNAMED.format("additionalProperties")),
                (open_contract, event(**{"Jane Doe": {}}),
                 UNNAMED.format("required") + ", 2 levels deep"),
                (lists, event(notes=["a", 5]), "Field 'notes[1]' must be of type string"),
                (patterns, event(X4711="5"), UNNAMED.format("type")),
                (patterns, event(**{"Jane Doe" * 5: 1}), UNNAMED.format("propertyNames"))):
            with self.subTest(value):
                with self.assertRaises(InvalidEvent) as caught:
                    self.read(value, contract)
                self.assertEqual(caught.exception.for_log, said)

    def test_what_is_about_a_person_is_known_by_name(self):
        self.assertEqual(receiver.PERSONAL_FIELDS, {"patient_id", "notes"})

    # -- what the schema marks

    MARK = {"x-pii": True}
    # {name: (keywords of the schema, a path that the mark reaches, one beside it that it does not)}
    MARKED = {
        "a member": ({"properties": {"phone": MARK, "room": {}}}, ["phone"], ["room"]),
        "a nested member": ({"properties": {"visit": {"properties": {"doctor": MARK, "room": True}}}},
                            ["visit", "doctor"], ["visit", "room"]),
        "all beneath a member": ({"properties": {"a": {**MARK, "properties": {"b": {"items": {}}}},
                                                 "c": {"properties": {"b": {"items": {}}}}}},
                                 ["a", "b", 0], ["c", "b", 0]),
        "all beneath, whatever says no there": (
            {"properties": {"a": {**MARK, "properties": {"b": {"x-pii": False}}},
                            "c": {"properties": {"b": {"x-pii": False}}}}}, ["a", "b"], ["c", "b"]),
        "items": ({"properties": {"a": {"items": MARK}, "b": {"items": {}}}}, ["a", 5], ["b", 5]),
        "members of items": ({"properties": {"a": {"items": {"properties": {"b": MARK, "c": {}}}}}},
                             ["a", 0, "b"], ["a", 0, "c"]),
        "the first item": ({"properties": {"a": {"prefixItems": [MARK], "items": {}}}}, ["a", 0], ["a", 1]),
        "the items behind": ({"properties": {"a": {"prefixItems": [{}], "items": MARK}}}, ["a", 1], ["a", 0]),
        "contains": ({"properties": {"a": {"contains": MARK}, "b": {"contains": {}}}}, ["a", 0], ["b", 0]),
        "unevaluatedItems": ({"properties": {"a": {"items": {}, "unevaluatedItems": MARK},
                                             "b": {"items": {}}}},
                             ["a", 0], ["b", 0]),
        "$ref": ({"properties": {"a": {"$ref": "#/$defs/p"}, "b": {"$ref": "#/$defs/n"}},
                  "$defs": {"p": MARK, "n": {}}}, ["a"], ["b"]),
        "$ref to a $ref, by name": ({"properties": {"a": {"$ref": "#p"}, "b": {}},
                                     "$defs": {"x": {"$anchor": "p", "$ref": "other"},
                                               "y": {"$id": "other", "$ref": "#/$defs/z",
                                                     "$defs": {"z": MARK}}}},
                                    ["a"], ["b"]),
        "$ref beside others": ({"properties": {"a": {"$ref": "#/$defs/n", **MARK},
                                               "b": {"$ref": "#/$defs/n"}},
                                "$defs": {"n": {}}}, ["a"], ["b"]),
        "a schema that refers to itself": (
            {"properties": {"a": {"$ref": "#/$defs/person"}},
             "$defs": {"person": {"properties": {"name": MARK, "sees": {"$ref": "#/$defs/person"}}}}},
            ["a", "sees", "sees", "name"], ["a", "sees", "sees"]),
        "$dynamicRef": ({"properties": {"a": {"$dynamicRef": "#p"}, "b": {}},
                         "$defs": {"x": {"$dynamicAnchor": "p", **MARK}}}, ["a"], ["b"]),
        "a $dynamicRef that another resource fills": (
            {"properties": {"a": {"$ref": "list"}, "b": {}}, "$defs": {
                "x": {"$id": "list", "items": {"$dynamicRef": "#p"}, "$defs": {"y": {"$dynamicAnchor": "p"}}},
                "z": {"$id": "mine", "$ref": "list", "$defs": {"y": {"$dynamicAnchor": "p", **MARK}}}}},
            ["a", 0], ["b"]),
        "allOf": ({"properties": {"a": {"allOf": [{}, MARK]}, "b": {"allOf": [{}]}}}, ["a"], ["b"]),
        "allOf around": ({"allOf": [{"properties": {"a": MARK}}], "properties": {"a": {}, "b": {}}}, ["a"],
                         ["b"]),
        "anyOf": ({"properties": {"a": {"anyOf": [MARK, {}]}, "b": {}}}, ["a"], ["b"]),
        "oneOf around": ({"oneOf": [{"properties": {"a": MARK}}, {"required": ["b"]}]}, ["a"], ["b"]),
        "then": ({"if": {}, "then": {"properties": {"a": MARK, "b": {}}}}, ["a"], ["b"]),
        "else": ({"if": {}, "else": {"properties": {"a": MARK, "b": {}}}}, ["a"], ["b"]),
        "if": ({"if": {"properties": {"a": MARK, "b": {}}}}, ["a"], ["b"]),
        "not": ({"properties": {"a": {"not": MARK}, "b": {"not": {"type": "null"}}}}, ["a"], ["b"]),
        "dependentSchemas": ({"dependentSchemas": {"c": {"properties": {"a": MARK, "b": {}}}}}, ["a"], ["b"]),
        "patternProperties": ({"properties": {"home_phone": {}, "room": {}},
                               "patternProperties": {"phone$": MARK}},
                              ["home_phone"], ["room"]),
        "a pattern not tried on long names": (
            {"properties": {"a" * 200 + "c": {}, "b": {}}, "patternProperties": {"^(a+)+$": MARK}},
            ["a" * 200 + "c"], ["b"]),
        "additionalProperties": ({"required": ["a"], "properties": {"b": {}}, "additionalProperties": MARK},
                                 ["a"], ["b"]),
        "unevaluatedProperties": ({"required": ["a"], "properties": {"b": {}}, "unevaluatedProperties": MARK},
                                  ["a"], ["b"]),
        "propertyNames": ({"properties": {"a": {"properties": {"b": {}}, "propertyNames": MARK}, "b": {}}},
                          ["a", "b"], ["b"]),
        "contentSchema": ({"properties": {"a": {"contentSchema": MARK}, "b": {"contentSchema": {}}}}, ["a"],
                          ["b"]),
        "no name in the schema": ({"properties": {"a": {}}}, ["b"], ["a"]),
        "a name that only a pattern allows": (
            {"properties": {"a": {}}, "patternProperties": {"^b$": {}}}, ["b"], ["a"]),
        "a name that is allowed like any other": ({"properties": {"a": {}}, "additionalProperties": {}},
                                                  ["b"], ["a"]),
        "a name known elsewhere": ({"properties": {"a": {"properties": {"b": {}}}}}, ["b"], ["a", "b"]),
        "nothing said of what is below": ({"properties": {"a": {"type": "object"}}}, ["a", "b"], ["a"]),
        "nothing said of items": ({"properties": {"a": {"type": "array"}}}, ["a", 0], ["a"]),
        "a column of the table": ({"properties": {"appointment_id": MARK}}, ["appointment_id"],
                                  ["event_type"]),
        "a column that the schema does not name": ({}, ["patient_id"], ["appointment_id"]),
        "beneath a column": ({}, ["timestamp", "a"], ["timestamp"]),
        "beneath one that is always personal": ({"properties": {"notes": {"items": {}}, "a": {"items": {}}}},
                                                ["notes", 0], ["a", 0]),
        "what must not be unmarked": ({"properties": {"patient_id": {"x-pii": False}, "a": {"x-pii": False}}},
                                      ["patient_id"], ["a"]),
        "nor notes": ({"properties": {"notes": {"x-pii": False}, "a": {"x-pii": False}}}, ["notes"], ["a"]),
    }

    def test_a_mark_reaches_what_it_stands_at_and_all_beneath_and_nothing_beside(self):
        for name, (schema, personal, other) in self.MARKED.items():
            with self.subTest(name):
                contract = Contract(schema)
                self.assertEqual((contract.is_personal(personal), contract.is_personal(other)), (True, False))
        self.assertEqual([Contract(schema).is_personal(path) for schema, path in (
            ({}, []), (self.MARK, ["event_type"]), (True, ["event_type"]), (True, ["room"]))],
            [True, True, False, True])

    def test_a_mark_changes_nothing_of_what_is_valid_nor_how_fast_it_is_told(self):
        marked = self.with_property("appointment_id", **self.MARK)
        self.assertTrue(marked.schema.accepts(event(notes=None)))
        self.assertEqual(self.problems(event(appointment_id=""), marked),
                         self.problems(event(appointment_id="")))

    def test_the_columns_that_are_personal_are_two_and_those_that_are_marked(self):
        for schema, more in ((receiver.EVENT_SCHEMA, set()), (True, set()), ({}, set()),
                             ({"properties": {"patient_id": {"x-pii": False}, "notes": {"x-pii": False}}},
                              set()),
                             ({"properties": {"appointment_id": self.MARK, "room": self.MARK}},
                              {"appointment_id"}),
                             ({"patternProperties": {"_id$": self.MARK}}, {"appointment_id"}),
                             ({"properties": {"event_type": {}, "timestamp": {}},
                               "additionalProperties": self.MARK},
                              {"appointment_id"}),
                             (self.MARK, {"appointment_id", "event_type", "timestamp"})):
            with self.subTest(schema):
                self.assertEqual(Contract(schema).personal_fields, {"patient_id", "notes"} | more)

    def test_both_schemas_of_ours_mark_the_two(self):
        for schema in (receiver.EVENT_SCHEMA, json.loads((HERE / "schema.json").read_text())):
            self.assertEqual([name for name, one in schema["properties"].items() if one.get("x-pii")],
                             ["patient_id", "notes"])

    def test_a_mark_that_is_not_true_or_false_makes_no_schema_wherever_it_stands(self):
        for wrong in ("true", "yes", 1, 0, None, [], {}):
            for schema, place in (({"properties": {"a": {"x-pii": wrong}}}, "/properties/a/x-pii"),
                                  ({"x-pii": wrong}, "/x-pii"),
                                  ({"$defs": {"unused": {"items": {"x-pii": wrong}}}},
                                   "/$defs/unused/items/x-pii")):
                with self.subTest(schema), self.assertRaises(SchemaError) as caught:
                    Contract(schema)
                self.assertEqual(str(caught.exception), f"at {place}: x-pii must be true or false")

    def test_a_mark_is_a_known_keyword_and_what_looks_like_one_is_noted(self):
        for keyword in ("x-PII", "X-PII", "x-pi", "x-piii", "xpii", "x_pii", "pii"):
            note, = Contract({"properties": {"a": {keyword: True}}}).schema.notes
            self.assertEqual(note, f"the unknown keyword {keyword} at /properties/a is ignored; "
                                   "did you mean x-pii?")
        for keyword in ("x-pii", "x-nullable", "x-title", "x-order", "x-id"):
            self.assertEqual(Contract({"properties": {"a": {keyword: True}}}).schema.notes, [])


# =============================================================================
# Work
# =============================================================================

class FakeClock:
    """A clock that stands until it is told how late it is."""

    def __init__(self):
        self.time = 1000.0

    def __call__(self):
        return self.time


class WorkTest(unittest.TestCase):

    def loop(self, step, seconds=None, **options):
        loop = receiver.Loop("test", step, seconds, **options)
        self.addCleanup(loop.stop)
        loop.start()
        return loop

    def test_a_loop_steps_by_itself_and_a_daemon_thread_has_its_name(self):
        threads = []
        self.loop(lambda: threads.append(threading.current_thread()), 0.001)
        until(lambda: len(threads) > 2)
        self.assertEqual({(thread.name, thread.daemon) for thread in threads}, {("webhook-test", True)})

    def test_a_loop_that_is_woken_steps_at_once_and_again_when_woken_meanwhile(self):
        begun, go_on = threading.Semaphore(0), threading.Semaphore(0)
        loop = self.loop(lambda: (begun.release(), go_on.acquire()), 1e6)
        for _ in range(2):
            loop.wake()
            self.assertTrue(begun.acquire(timeout=WAIT))
            loop.wake()
            go_on.release()
            self.assertTrue(begun.acquire(timeout=WAIT))
            go_on.release()

    def test_a_step_that_raises_is_told_by_name_and_the_loop_goes_on(self):
        told, errors = [], [ValueError("a"), SystemExit(1)]

        def step():
            raise errors[len(told)]

        loop = self.loop(step, on_error=lambda name: told.append((name, sys.exc_info()[1])))
        for number, error in enumerate(errors, 1):
            loop.wake()
            until(lambda: len(told) == number)
            self.assertEqual(told[-1], ("test", error))

    def test_to_stop_a_loop_waits_for_its_step_but_not_for_ever(self):
        begun, go_on, ended = threading.Event(), threading.Event(), []
        loop = self.loop(lambda: (begun.set(), go_on.wait(), ended.append(True)))
        loop.wake()
        self.assertTrue(begun.wait(WAIT))
        self.assertFalse(loop.stop(0.01))
        go_on.set()
        self.assertTrue(loop.stop(WAIT))
        self.assertEqual(ended, [True])

    def test_a_loop_may_stop_itself_or_never_have_started(self):
        loop = self.loop(lambda: loop.stop())
        loop.wake()
        until(lambda: loop.stop())
        self.assertTrue(receiver.Loop("test", lambda: None).stop())

    def test_the_clock_runs_each_job_when_it_is_due_and_makes_up_for_nothing(self):
        now, ran = FakeClock(), []
        clock = receiver.Clock(now=now)
        clock.every(1, "second", lambda: ran.append(1))
        clock.every(60, "minute", lambda: ran.append(60))
        for late, expected in ((0.9, []), (0.2, [1]), (0.5, []), (0.5, [1]), (58, [1, 60]), (0.9, []), (0.2, [1])):
            now.time += late
            clock.run_due()
            self.assertEqual(ran, expected, now.time)
            ran.clear()

    def test_a_job_of_the_clock_that_raises_costs_the_others_nothing(self):
        now, ran, told = FakeClock(), [], []
        clock = receiver.Clock(told.append, now)
        clock.every(1, "bad", lambda: sys.exit())
        clock.every(1, "good", lambda: ran.append(now.time))
        for _ in range(2):
            now.time += 1
            clock.run_due()
        self.assertEqual((told, ran), (["bad", "bad"], [1001, 1002]))

    def test_the_clocks_thread_sleeps_until_the_next_job_and_hears_of_a_sooner_one(self):
        clock, ran = receiver.Clock(), threading.Event()
        self.addCleanup(clock.stop)
        clock.every(1e6, "later", lambda: None)
        clock.start()
        until(lambda: clock._loop.seconds is not None)
        clock.every(0.001, "sooner", ran.set)
        self.assertTrue(ran.wait(WAIT))

    def test_the_breaker_opens_after_five_failures_in_a_row_and_tries_later_and_later(self):
        now = FakeClock()
        breaker = receiver.Breaker(now)
        for _ in range(4):
            breaker.failed()
        breaker.succeeded()
        for number in range(5):
            self.assertEqual((breaker.state, breaker.allows()), ("closed", True), number)
            breaker.failed()
        for pause in (1, 2, 4, 8, 16, 30, 30):
            now.time += pause - 0.01
            self.assertEqual((breaker.allows(), breaker.state), (False, "open"), pause)
            now.time += 0.02
            self.assertEqual((breaker.allows(), breaker.state), (True, "half-open"), pause)
            self.assertFalse(breaker.allows(), "a second try")
            breaker.failed()
        now.time += 31
        self.assertTrue(breaker.allows())
        breaker.succeeded()
        for number in range(5):
            self.assertTrue(breaker.allows(), number)
            breaker.failed()
        now.time += 1.01
        self.assertTrue(breaker.allows(), "the first pause again")

    def test_a_turn_goes_to_who_waits_before_who_had_it_last(self):
        turns, order = receiver.Turns(), []

        def other():
            with turns:
                order.append("other")

        for _ in range(20):
            turns.acquire()
            thread = threading.Thread(target=other)
            thread.start()
            until(lambda: turns._next.locked())
            turns.release()
            with turns:
                order.append("again")
            thread.join()
        self.assertEqual(order, ["other", "again"] * 20)

    def test_a_turn_that_is_not_to_be_had_is_given_up_and_can_be_had_later(self):
        turns = receiver.Turns()
        self.assertTrue(turns.acquire())
        self.assertFalse(turns.acquire(0.001))
        turns.release()
        self.assertTrue(turns.acquire(0))

    def test_a_check_is_made_once_a_second_however_many_ask(self):
        now, made = FakeClock(), []
        checkup = receiver.Checkup("test", lambda: made.append(1) or len(made), now)
        self.assertEqual([checkup.result(WAIT) for _ in range(3)], [(1, 0.0)] * 3)
        now.time += 0.9
        self.assertEqual(checkup.result(WAIT), (1, 0.0))
        now.time += 0.2
        self.assertEqual([checkup.result(WAIT) for _ in range(3)], [(2, 0.0)] * 3)

    def test_who_asks_a_check_that_hangs_hears_what_it_said_last_and_for_how_long(self):
        now, made, go_on = FakeClock(), [], threading.Event()
        go_on.set()
        checkup = receiver.Checkup("test", lambda: made.append(1) or go_on.wait() and len(made), now)
        self.assertEqual(checkup.result(WAIT), (1, 0.0))
        go_on.clear()
        now.time += 2
        self.assertEqual(checkup.result(0), (1, 0.0))
        for seconds in (3, 7):
            now.time = 1002 + seconds
            self.assertEqual(checkup.result(0.001), (1, seconds))
        go_on.set()
        self.assertEqual(checkup.result(WAIT), (2, 0.0))
        self.assertEqual(len(made), 2)

    def test_a_check_that_raises_is_no_good_news(self):
        now, made = FakeClock(), []
        checkup = receiver.Checkup("disk", lambda: made.append(1) or 1 / (len(made) - 1), now)
        with self.assertRaisesRegex(RuntimeError, "disk"):
            checkup.result(WAIT)
        now.time += 2
        self.assertEqual(checkup.result(WAIT), (1, 0.0))
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("no threads")):
            now.time += 2
            with self.assertRaises(RuntimeError):
                checkup.result(WAIT)
        self.assertEqual(checkup.result(WAIT), (0.5, 0.0))


class DigestTest(unittest.TestCase):
    """The content of two payloads is compared as digests."""

    def test_equal_json_has_one_digest_and_the_timestamp_does_not_count(self):
        text = '{"a": [1, {"b": "é", "c": null}], "timestamp": "2025-01-10T14:00:00Z"}'
        for other in ('{"timestamp":"later","a":[1.0,{"c":null,"b":"\\u00e9"}]}',
                      '{"a": [1e0, {"b": "é", "c": null}]}',
                      ' {"a" :[1, {"b": "é", "c": null}], "timestamp": {"x": []}}\n'):
            with self.subTest(other):
                self.assertEqual(content_digest(other), content_digest(text))
        for other in ('{"a": [1, {"b": "e", "c": null}]}', '{"a": [true, {"b": "é", "c": null}]}', '{"a": 1}',
                      "{}", "[]",
                      '{"a": [1, {"b": "é", "c": null, "timestamp": "x"}]}',
                      '[{"a": [1, {"b": "é", "c": null}]}]'):
            with self.subTest(other):
                self.assertNotEqual(content_digest(other), content_digest(text))
        self.assertEqual(len(content_digest(text)), 32)

    def test_numbers_are_equal_as_in_mathematics(self):
        for one, other, same in (("1", "1.0", True), ("0", "-0.0", True), ("1e2", "100", True),
                                 ("1", "true", False),
                                 ("9007199254740993", "9007199254740992.0", False),
                                 ("1e22", "1" + "0" * 22, True),
                                 ("9007199254740992", "9007199254740992.0", True), ("1e-400", "0", True),
                                 ("9" * 100, "9" * 99 + "8", False),
                                 ("9007199254740991", "9007199254740991.0", True),
                                 ("1" + "0" * 99, "1e99", False), ('"1"', "1", False)):
            one, other = f'{{"n": {one}}}', f'{{"n": {other}}}'
            with self.subTest((one, other)):
                self.assertIs(content_digest(one) == content_digest(other), same)
                self.assertIs(json_equal(parse_json(one.encode())[0], parse_json(other.encode())[0]), same)

    def test_digests_of_random_values_agree_with_equality_as_the_schema_sees_it(self):
        chance = random.Random(8785)
        equal = 0
        for _ in range(3000):
            one = {name: random_value(chance, {}) for name in chance.sample("abc", chance.randint(0, 2))}
            other = disguised(chance, one) if chance.random() < 0.5 else {"a": random_value(chance, {})}
            texts = [json.dumps(value, ensure_ascii=chance.random() < 0.5, indent=chance.choice([None, 1]))
                     for value in (one, other)]
            self.assertIs(content_digest(texts[0]) == content_digest(texts[1]), json_equal(one, other), texts)
            equal += json_equal(one, other)
        self.assertGreater(equal, 1000)

    def test_what_is_no_json_object_is_compared_as_text_and_nothing_raises(self):
        odd = ["", "{", "null", "[1]", "5", '"timestamp"', "not JSON", '{"a": NaN}', '{"a": Infinity}',
               '{"a": 1e999}',
               "[" * 100000, '{"a":' * 100000, '{"timestamp": ' + "[" * 70 + "]" * 70 + "}", "\ud800",
               '{"a": "\ud800"}',
               '{"a": ' + "9" * 10000 + "}", "\0"]
        digests = {content_digest(text) for text in odd}
        self.assertEqual(len(digests), len(odd))
        for text in odd[:-2]:
            with self.subTest(text[:20]):
                self.assertEqual(content_digest(text), content_digest(text))

    def test_a_text_cannot_pass_for_an_object(self):
        self.assertNotEqual(content_digest("{}"), content_digest('{"a": NaN}'))
        self.assertNotEqual(content_digest('{"a":1}'), content_digest('"{\\"a\\":1}"'))

    def test_a_megabyte_takes_no_longer_than_it_must(self):
        many = ",".join(f'"{number:x}":{number}' for number in range(70000))
        for name, text in (("text", '{"notes": "' + "x" * MEGABYTE + '"}'), ("names", "{" + many + "}"),
                           ("integers", '{"a": [' + "1," * (MEGABYTE // 2) + "1]}"),
                           ("floats", '{"a": [' + "1.5," * (MEGABYTE // 4) + "1]}"),
                           ("long integers", '{"a": [' + ("9" * 99 + ",") * (MEGABYTE // 100) + "1]}"),
                           ("objects", '{"a": [' + '{"b":[]},' * (MEGABYTE // 9) + "1]}"),
                           ("escapes", '{"a": "' + "\\u00e9" * (MEGABYTE // 6) + '"}')):
            with self.subTest(name):
                began = time.thread_time()
                content_digest(text)
                self.assertLess(time.thread_time() - began, 1)


def disguised(chance, value):
    """An equal JSON value that looks different."""
    if isinstance(value, dict):
        members = [(name, disguised(chance, item)) for name, item in value.items()]
        chance.shuffle(members)
        return dict(members)
    if isinstance(value, list):
        return [disguised(chance, item) for item in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return chance.choice([int(value) if value == int(value) else value,
                              float(value) if float(value) == value else value])
    return value


# =============================================================================
# System
# =============================================================================

def base64url(value):
    """Bytes, a whole number, or a JSON value, in base64url without padding."""
    if isinstance(value, int):
        value = value.to_bytes((value.bit_length() + 7) // 8, "big")
    if not isinstance(value, bytes):
        value = json.dumps(value).encode()
    return base64.urlsafe_b64encode(value).decode().rstrip("=")


# Keys of examples, so that tests can sign: (private key as PKCS #8 in base64, public one as JWK)
KEY_PAIRS = {
    # RFC 7520 section 3.4
    "RSA": ("MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQCfgQ+0A4Jz0CWR5Ac/MdK2ABuCzttNkvBQFl1Hz8q4o8Q"
            "ct3isdVN5P475dXaNGiN02HElZMO813uepDRUSJlAfP8AmZIKkxokxEFIUqspvbCpXAZT82xg5gv5C2JY3aVvNwR7pcLR0C"
            "mvnJ1AuseqQceKDdEGit1pnoCP6gEeoUQdik97tOl7459V8d3UTpxLozUVlwPU00tgPmUUek8j1tPAmWx17e6EaoLRkK4Qe"
            "DyWHPA4eu0hBtLQVVtv2Tf61VNTh+D/cv++eJQUArC4IuoqdLYFjB2r+bNKdstjuH+qLGhHuOKDf/+RGG5rHBSRHPmJqJCS"
            "qBzmAd2s0/nPAgMBAAECggEAbWUC9B+EFRIo8kpGfh0ZuyGPvMNKvYWNtB/ikiH9k20eT+O1q/I78eiZkpXxXQ0UTEs2LsN"
            "RS+8uJbvQ+A1irkwMSMkK1J3XTGgdrhCku9gRldY7sNA/AKZGh+Q661/42rINLRCe8W+nZ34ui/qOfkLnK9QWDDqpaIsA+b"
            "MwWWSDFu2MUBYwkHTMEzLYGqOe04noqeq1hExBTHBOBdkMXiuFhUq1BU6l+DqEiWxqg82sXt2h+LMnT3046AOYJoRioz75t"
            "SUQfGCshWTBnP5uDjd18kKhyv07lhfSJdrPdM5Plyl21hsFf4L/mHCuoFau7gdsPfHPxxjVOcOpBrQzwQKBgQDdKXGD8PBN"
            "clxvrT3lGhfKBAIBnlGcC9mWejXKEe2dR7H9+nsBn/2dFo7sdf/5IV8ZB661qjZMOMMBZThW6mTyvD0lHQDNnQ3Z++4gCav"
            "9YKyYal42pCd6/VPsjISyeHxQy36fkJp+GSKTOESyuad0fovE6u9EmWw+npm/xtSrSQKBgQC4oTZ2H5xN/oREXiTh7+PLvw"
            "Z89hQhpTKhJIm4HOncK5uTc4KqzqCtPxtH9y7QObUxnBaa12oPIj3ketR6rcw/Xm8ww43yUdN5m7aWYq/CpbtqdXlTOEzWJ"
            "nvPjIyS5TAVagG/Jjz3wRe9EP6F2pHEeVKoBnX3bMHelUUnSzukVwKBgAfD1b15Lya49i/hmEO798va+isOYPUmoVwcLFlM"
            "6dfU1ZYCPmFfOatTSG9a8ULQ/iLF10d/k2p3r7kT0beTgTnYjBkKfKW7duoJY2HylPxPcZ/kVCx89PnnfRPYFyyg+FRp4Kc"
            "/j30P6tvaZOcVh6CadNPUH9R7woYsUV+fXoYpAoGACLDmDGduhylc9o7r84rEUVn7pzQ6PF83Y+iBZx5NT+TpnOZKF1pErA"
            "MVeKzFEl41DlHHqqBLSM0W1sOFbwTxYWZDm6sI6og5iTbwQGIC3gnJKbi/7k/vJgGHwHxgPaX2PnvP+zyEkDERuf+ry4c/Z"
            "11Cq9AqC2yeL6kdKT1cYF8CgYEA3PiqvXQN0zwMeE+sBvZgi289XP9XCQF3VWqPzMKnIgQp7/Tugo6+NZBKCQsMf3HaEGBj"
            "TVJs/jcK8+TRXvaKe+7ZMaQj8VfBdYkssbu0NKDDhjJ+GtiseaDVWt7dcH0cfwxgFUHpQh7FoCrjFJ6h6ZEpMF6xmujs4qM"
            "pPz8aaI4=",
            {"kty": "RSA", "e": "AQAB",
             "n": "n4EPtAOCc9AlkeQHPzHStgAbgs7bTZLwUBZdR8_KuKPEHLd4rHVTeT-O-XV2jRojdNhxJWTDvNd7nqQ0VEiZQHz_A"
                  "JmSCpMaJMRBSFKrKb2wqVwGU_NsYOYL-QtiWN2lbzcEe6XC0dApr5ydQLrHqkHHig3RBordaZ6Aj-oBHqFEHYpPe7"
                  "Tpe-OfVfHd1E6cS6M1FZcD1NNLYD5lFHpPI9bTwJlsde3uhGqC0ZCuEHg8lhzwOHrtIQbS0FVbb9k3-tVTU4fg_3L"
                  "_vniUFAKwuCLqKnS2BYwdq_mzSnbLY7h_qixoR7jig3__kRhuaxwUkRz5iaiQkqgc5gHdrNP5zw"}),
    # RFC 7515 appendix A.3
    "P-256": ("MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgjpsQnnGQmL+YBIffH1136cspYG6+0iY7X1fCE9+E9LKhR"
              "ANCAAR/zc4ncPbEXUGDy+5v20t7WAczNXvp7xO6z248e9FURcfxRM0bvZt+hyzf7bnuufSzaV1uqQskrYpGIyiFiOWt",
              {"kty": "EC", "crv": "P-256", "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
               "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}),
    # Made for these tests
    "P-384": ("MIG2AgEAMBAGByqGSM49AgEGBSuBBAAiBIGeMIGbAgEBBDCM+1Fmgfq1p7bLxpwS/yp7bm/fozzbMt6cKbiEwcB4Ml7ZR"
              "RFV7byAZW9uLZhHpRuhZANiAASBe0XVTp1Rc4RAMzuN5aECNSuIZbcLIlVYtdoCcv+DC4uxaO2u3pxx6aqy5/ztVhlcMC"
              "HpFEVD5gXCPBLsy+90Aw+gplNPdJdCA0/8FxQq3MjIjCQ7mUcV0JX9A/Gw47U=",
              {"kty": "EC", "crv": "P-384",
               "x": "gXtF1U6dUXOEQDM7jeWhAjUriGW3CyJVWLXaAnL_gwuLsWjtrt6ccemqsuf87VYZ",
               "y": "XDAh6RRFQ-YFwjwS7MvvdAMPoKZTT3SXQgNP_BcUKtzIyIwkO5lHFdCV_QPxsOO1"}),
    # RFC 8037 appendix A.1
    "Ed25519": ("MC4CAQAwBQYDK2VwBCIEIJ1hsZ3v/VpguoRK9JLsLMREScVpezJpGXA7rAMcrn9g",
                {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}),
}

# Signed examples: (RFC, algorithm, public key, token)
SIGNED_EXAMPLES = [
    ("RFC 7515 A.2", "RS256",
     {"kty": "RSA", "e": "AQAB",
      "n": "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4Ql"
           "L-yRT-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUs"
           "LA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoud"
           "F8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ"},
     "eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb"
     "290Ijp0cnVlfQ.cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W"
     "2Fp5jujGbds9uJdbF9CUAr7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe"
     "7K0GarZRmB_eSN9383LcOLn6_dO--xi12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgG"
     "Y9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe77Rw"),
    ("RFC 7515 A.3", "ES256", KEY_PAIRS["P-256"][1],
     "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb"
     "290Ijp0cnVlfQ.DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q"),
    ("RFC 7520 4.1", "RS256", KEY_PAIRS["RSA"][1],
     "eyJhbGciOiJSUzI1NiIsImtpZCI6ImJpbGJvLmJhZ2dpbnNAaG9iYml0b24uZXhhbXBsZSJ9.SXTigJlzIGEgZGFuZ2Vyb3VzIGJ1c"
     "2luZXNzLCBGcm9kbywgZ29pbmcgb3V0IHlvdXIgZG9vci4gWW91IHN0ZXAgb250byB0aGUgcm9hZCwgYW5kIGlmIHlvdSBkb24ndCB"
     "rZWVwIHlvdXIgZmVldCwgdGhlcmXigJlzIG5vIGtub3dpbmcgd2hlcmUgeW91IG1pZ2h0IGJlIHN3ZXB0IG9mZiB0by4.MRjdkly7_"
     "-oTPTS3AXP41iQIGKa80A0ZmTuV5MEaHoxnW2e5CZ5NlKtainoFmKZopdHM1O2U4mwzJdQx996ivp83xuglII7PNDi84wnB-BDkoBw"
     "A78185hX-Es4JIwmDLJK3lfWRa-XtL0RnltuYv746iYTh_qHRD68BNt1uSNCrUCTJDt5aAE6x8wW1Kt9eRo4QPocSadnHXFxnt8Is9"
     "UzpERV0ePPQdLuW3IS_de3xyIrDaLGdjluPxUAhb6L2aXic1U12podGU0KLUQSE_oI-ZnmKJ3F4uOZDnd6QZWJushZ41Axf_fcIe8u"
     "9ipH84ogoree7vjbU5y18kDquDg"),
    ("RFC 7520 4.2", "PS384", KEY_PAIRS["RSA"][1],
     "eyJhbGciOiJQUzM4NCIsImtpZCI6ImJpbGJvLmJhZ2dpbnNAaG9iYml0b24uZXhhbXBsZSJ9.SXTigJlzIGEgZGFuZ2Vyb3VzIGJ1c"
     "2luZXNzLCBGcm9kbywgZ29pbmcgb3V0IHlvdXIgZG9vci4gWW91IHN0ZXAgb250byB0aGUgcm9hZCwgYW5kIGlmIHlvdSBkb24ndCB"
     "rZWVwIHlvdXIgZmVldCwgdGhlcmXigJlzIG5vIGtub3dpbmcgd2hlcmUgeW91IG1pZ2h0IGJlIHN3ZXB0IG9mZiB0by4.cu22eBqkY"
     "DKgIlTpzDXGvaFfz6WGoz7fUDcfT0kkOy42miAh2qyBzk1xEsnk2IpN6-tPid6VrklHkqsGqDqHCdP6O8TTB5dDDItllVo6_1OLPpc"
     "bUrhiUSMxbbXUvdvWXzg-UD8biiReQFlfz28zGWVsdiNAUf8ZnyPEgVFn442ZdNqiVJRmBqrYRXe8P_ijQ7p8Vdz0TTrxUeT3lm8d9"
     "shnr2lfJT8ImUjvAA2Xez2Mlp8cBE5awDzT0qI0n6uiP1aCN_2_jLAeQTlqRHtfa64QQSUmFAAjVKPbByi7xho0uTOcbH510a6GYmJ"
     "UAfmWjwZ6oD4ifKo8DYM-X72Eaw"),
    ("RFC 8037 A.4", "EdDSA", KEY_PAIRS["Ed25519"][1],
     "eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc.hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dW"
     "bhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg"),
]

# (source, key, nonce, plaintext, data, ciphertext, tag), in hex
GCM_EXAMPLES = [
    ("McGrew and Viega, GCM, test case 13",
     "00" * 32,
     "00" * 12,
     "",
     "",
     "",
     "530f8afbc74536b9a963b4f1c4cb738b"),
    ("test case 14",
     "00" * 32,
     "00" * 12,
     "00" * 16,
     "",
     "cea7403d4d606b6e074ec5d3baf39d18",
     "d0d1c8a799996bf0265b98b5d48ab919"),
    ("test case 15",
     "feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308",
     "cafebabefacedbaddecaf888",
     "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525b16aed"
     "f5aa0de657ba637b391aafd255",
     "",
     "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3da7b08b1056828838c5f61e"
     "6393ba7a0abcc9f662898015ad",
     "b094dac5d93471bdec1a502270e3cc6c"),
    ("test case 16",
     "feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308",
     "cafebabefacedbaddecaf888",
     "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525b16aed"
     "f5aa0de657ba637b39",
     "feedfacedeadbeeffeedfacedeadbeefabaddad2",
     "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3da7b08b1056828838c5f61e"
     "6393ba7a0abcc9f662",
     "76fc6ece0f4e1768cddf8853bb2d551b"),
    ("NIST CAVP gcmEncryptExtIV256, data only",
     "78dc4e0aaf52d935c3c01eea57428f00ca1fd475f5da86a49c8dd73d68c8e223",
     "d79cf22d504cc793c3fb6c8a",
     "",
     "b96baa8c1c75a671bfb2d08d06be5f36",
     "",
     "3e5d486aa2e30b22e040b85723a06e76"),
    ("NIST CAVP gcmEncryptExtIV256",
     "83688deb4af8007f9b713b47cfa6c73e35ea7a3aa4ecdb414dded03bf7a0fd3a",
     "0b459724904e010a46901cf3",
     "33d893a2114ce06fc15d55e454cf90c3",
     "794a14ccd178c8ebfd1379dc704c5e208f9d8424",
     "cc66bee423e3fcd4c0865715e9586696",
     "0fb291bd3dba94a1dfd8b286cfb97ac5"),
]


class Signer:
    """Signs by the libcrypto that checks, which the program itself never does."""
    FUNCTIONS = {"d2i_AutoPrivateKey": "PPPL", "EVP_DigestSignInit": "IPPPPP", "EVP_DigestSign": "IPPPBZ",
                 "ERR_peek_error": "L"}

    def __init__(self):
        with mock.patch.dict(receiver._LIBCRYPTO, self.FUNCTIONS):
            self.crypto = receiver.LibCrypto()
        self._keys = {}
        for kind, (text, _) in KEY_PAIRS.items():
            data = base64.b64decode(text)
            place = ctypes.c_char_p(data)
            self._keys[kind] = self.crypto.d2i_AutoPrivateKey(None, ctypes.addressof(place), len(data))

    def sign(self, alg, message, **pss):
        """The signature of a JWS; settings of PSS may be given."""
        kind, digest = receiver.JWS_ALGORITHMS[alg]
        crypto, settings, size = self.crypto, ctypes.c_void_p(), ctypes.c_size_t(1024)
        context, room = crypto.EVP_MD_CTX_new(), ctypes.create_string_buffer(1024)
        algorithm = digest and crypto.EVP_get_digestbyname(digest)
        key = self._keys[kind]
        assert crypto.EVP_DigestSignInit(context, ctypes.addressof(settings), algorithm, None, key) == 1
        if alg.startswith("PS"):
            pss = {"rsa_padding_mode": "pss", "rsa_pss_saltlen": "digest", **pss}
        for name, value in pss.items():
            assert crypto.EVP_PKEY_CTX_ctrl_str(settings, name.encode(), value.encode()) == 1
        assert crypto.EVP_DigestSign(context, room, ctypes.addressof(size), message, len(message)) == 1
        crypto.EVP_MD_CTX_free(context)
        signature = room.raw[:size.value]
        return self._plain(signature, receiver._CURVES[kind][1]) if alg.startswith("ES") else signature

    @staticmethod
    def _plain(signature, size):
        r, s = signature[4:4 + signature[3]], signature[6 + signature[3]:]
        return b"".join(int.from_bytes(half, "big").to_bytes(size, "big") for half in (r, s))

    def public(self, kind):
        return receiver.PublicKey.from_jwk(self.crypto, KEY_PAIRS[kind][1])


class LibCryptoTest(FolderTest):

    @unittest.skipUnless(getattr(sys.modules.get("_ssl"), "__file__", ""), "OpenSSL is a part of this Python")
    def test_it_is_the_one_that_python_has_loaded(self):
        self.assertEqual(next(receiver._libcrypto_names()), sys.modules["_ssl"].__file__)
        self.assertEqual(receiver.LibCrypto().OpenSSL_version_num(), ssl.OPENSSL_VERSION_NUMBER)

    def test_where_it_is_missing_one_sentence_says_what_to_install(self):
        text = self.folder / "libcrypto.so.3"
        text.write_text("no library")
        for names in ([], [""], ["/none/libcrypto.so.3"], [str(text)], [ctypes.util.find_library("c") or ""]):
            with self.subTest(names), self.assertRaises(SetupError) as raised:
                receiver.LibCrypto(lambda: names)
            self.assertRegex(str(raised.exception), "libcrypto 1.1.1 or 3 was not found: install it .*apt")
            self.assertNotIn("\n", str(raised.exception))
        good = list(receiver._libcrypto_names())
        self.assertTrue(receiver.LibCrypto(lambda: ["/none", str(text), *good]).OpenSSL_version_num())

    def test_a_version_that_is_not_promised_is_not_used(self):
        for number, taken in (
                (0x1010100f, True), (0x1010117f, True), (0x30000000, True), (0x30500090, True),
                (0x1000214f, False), (0x1010007f, False), (0x20000000, False), (0x40000000, False)):
            library = mock.MagicMock()
            library.OpenSSL_version_num.return_value = number
            with self.subTest(hex(number)), mock.patch.multiple(
                    receiver.ctypes, PyDLL=lambda path: library, CDLL=lambda path, handle: library):
                if taken:
                    receiver.LibCrypto()
                else:
                    self.assertRaises(SetupError, receiver.LibCrypto)

    def test_one_that_lacks_a_function_is_not_used(self):
        with mock.patch.dict(receiver._LIBCRYPTO, {"EVP_of_tomorrow": "P"}):
            self.assertRaises(SetupError, receiver.LibCrypto)

    def test_without_ctypes_the_program_starts_and_only_what_needs_it_says_so(self):
        code = ("import sys; sys.modules['ctypes'] = None; sys.path.insert(0, sys.argv[1])\n"
                "import webhook_server as receiver\n"
                "receiver.Config()\n"
                "try: receiver.LibCrypto()\n"
                "except receiver.SetupError as error: print(error)")
        done = subprocess.run([sys.executable, "-S", "-I", "-c", code, str(HERE)], capture_output=True,
                              timeout=WAIT)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        self.assertIn(b"lacks ctypes", done.stdout)


class AESGCMTest(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.crypto = Signer().crypto

    def setUp(self):
        self.cipher, self.nonce = receiver.AESGCM(self.crypto, b"k" * 32), b"n" * 12

    def test_published_examples_are_sealed_as_published_and_opened(self):
        for name, *parts in GCM_EXAMPLES:
            with self.subTest(name):
                key, nonce, plaintext, data, ciphertext, tag = map(bytes.fromhex, parts)
                cipher = receiver.AESGCM(self.crypto, key)
                self.assertEqual(cipher.open(nonce, ciphertext + tag, data), plaintext)
                self.assertEqual(cipher.seal(nonce, plaintext, data), ciphertext + tag)

    def test_whatever_is_changed_is_noticed_and_leaves_no_trace(self):
        sealed = self.cipher.seal(self.nonce, b"of a patient", b"row 1")
        whole = (self.nonce, sealed, b"row 1")
        changed = [(*whole[:part], whole[part][:at] + bytes([whole[part][at] ^ 1]) + whole[part][at + 1:],
                    *whole[part + 1:]) for part in range(3) for at in range(len(whole[part]))]
        changed += [(self.nonce, sealed[:-1], b"row 1"), (self.nonce, sealed[1:], b"row 1"),
                    (self.nonce, sealed + b"\0", b"row 1"), (self.nonce, sealed, b""),
                    (self.nonce, sealed, b"row 1\0"), (self.nonce, sealed[-16:], b"row 1"),
                    (self.nonce, b"", b"row 1"), (self.nonce, sealed[:15], b"row 1")]
        for parts in changed:
            with self.subTest(parts), self.assertRaises(ValueError) as raised:
                self.cipher.open(*parts)
            self.assertNotIn("patient", str(raised.exception))
            self.assertEqual(self.cipher.open(*whole), b"of a patient")
        self.assertRaises(ValueError, receiver.AESGCM(self.crypto, b"j" * 32).open, *whole)
        self.assertEqual(self.crypto.ERR_peek_error(), 0)

    def test_sizes_from_nothing_to_a_megabyte_come_back(self):
        for size in (0, 1, 15, 16, 17, 1008, 1024, 65520, 65536, MEGABYTE):
            for data in (b"", b"d", b"d" * size):
                text = os.urandom(size)
                sealed = receiver.AESGCM(self.crypto, b"k" * 32).seal(self.nonce, text, data)
                self.assertEqual(len(sealed), size + 16)
                for cipher in (receiver.AESGCM(self.crypto, b"k" * 32), self.cipher):
                    self.assertEqual(cipher.open(self.nonce, sealed, data), text)
                    self.assertEqual(cipher.seal(self.nonce, text, data), sealed)

    def test_keys_and_nonces_of_another_size_are_refused(self):
        for size in (0, 16, 24, 31, 33):
            self.assertRaises(ValueError, receiver.AESGCM, self.crypto, b"k" * size)
        for size in (0, 8, 11, 13, 16):
            self.assertRaises(ValueError, self.cipher.seal, b"n" * size, b"x", b"")
            self.assertRaises(ValueError, self.cipher.open, b"n" * size, b"x" * 17, b"")

    def test_eight_threads_at_once_do_not_mix_what_they_seal(self):
        done = []

        def work():
            for number in range(300):
                text, nonce = os.urandom(number), os.urandom(12)
                sealed = self.cipher.seal(nonce, text, b"d")
                with contextlib.suppress(ValueError):
                    self.cipher.open(nonce, sealed, b"other")
                done.append(self.cipher.open(nonce, sealed, b"d") == text)

        in_threads(8, work)
        self.assertEqual((len(done), set(done)), (2400, {True}))

    def test_every_context_is_freed_also_after_a_failure(self):
        alive = Counter()
        crypto = receiver.LibCrypto()
        new, free = crypto.EVP_CIPHER_CTX_new, crypto.EVP_CIPHER_CTX_free

        def counted_new():
            alive["contexts"] += 1
            return new()

        def counted_free(context):
            alive["contexts"] -= 1
            free(context)

        crypto.EVP_CIPHER_CTX_new, crypto.EVP_CIPHER_CTX_free = counted_new, counted_free
        cipher = receiver.AESGCM(crypto, b"k" * 32)
        for _ in range(20):
            cipher.open(self.nonce, cipher.seal(self.nonce, b"x" * MEGABYTE, b""), b"")
            self.assertRaises(ValueError, cipher.open, self.nonce, b"x" * 20, b"")
        self.assertLessEqual(alive["contexts"], 2)
        with mock.patch.object(crypto, "EVP_CipherInit_ex", return_value=0):
            self.assertRaises(ValueError, receiver.AESGCM, crypto, b"k" * 32)
            self.assertRaises(ValueError, cipher.seal, self.nonce, b"x", b"")
        del cipher
        gc.collect()
        self.assertEqual(alive["contexts"], 0)


class PublicKeyTest(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.signer = Signer()
        cls.crypto = cls.signer.crypto

    def key(self, jwk):
        return receiver.PublicKey.from_jwk(self.crypto, jwk)

    def tearDown(self):
        self.assertEqual(self.crypto.ERR_peek_error(), 0)      # or the next call of ssl would raise it

    def test_published_examples_are_true_and_not_when_anything_is_changed(self):
        for name, alg, jwk, token in SIGNED_EXAMPLES:
            with self.subTest(name):
                message, _, text = token.rpartition(".")
                signature, key = receiver.base64url_bytes(text), self.key(jwk)
                self.assertTrue(key.verify(alg, message.encode(), signature))
                for at in range(len(signature)):
                    changed = signature[:at] + bytes([signature[at] ^ 1]) + signature[at + 1:]
                    self.assertFalse(key.verify(alg, message.encode(), changed))
                for changed in (signature[:-1], signature + b"\0", b"\0" + signature, b"", signature[1:]):
                    self.assertFalse(key.verify(alg, message.encode(), changed))
                self.assertFalse(key.verify(alg, message.encode() + b"x", signature))
                for other in set(receiver.JWS_ALGORITHMS) - {alg} | {"", "none", "HS256", alg.lower()}:
                    self.assertFalse(key.verify(other, message.encode(), signature))

    def test_each_algorithm_takes_signatures_of_its_own_and_of_no_other(self):
        for alg, (kind, _) in receiver.JWS_ALGORITHMS.items():
            signature = self.signer.sign(alg, b"message")
            for other in receiver.JWS_ALGORITHMS:
                for key in KEY_PAIRS:
                    with self.subTest(alg, other=other, key=key):
                        taken = self.signer.public(key).verify(other, b"message", signature)
                        self.assertEqual(taken, (other, key) == (alg, kind))

    def test_pss_takes_the_salt_and_the_mask_of_its_digest_only(self):
        key = self.signer.public("RSA")
        for pss, taken in (({}, True), ({"rsa_pss_saltlen": "32"}, True), ({"rsa_pss_saltlen": "20"}, False),
                           ({"rsa_pss_saltlen": "0"}, False), ({"rsa_pss_saltlen": "max"}, False),
                           ({"rsa_mgf1_md": "SHA256"}, True), ({"rsa_mgf1_md": "SHA1"}, False)):
            with self.subTest(pss):
                signature = self.signer.sign("PS256", b"message", **pss)
                self.assertEqual(key.verify("PS256", b"message", signature), taken)

    def test_signatures_of_curves_have_two_numbers_of_the_right_length_and_neither_is_0(self):
        for alg, kind, size in (("ES256", "P-256", 32), ("ES384", "P-384", 48)):
            key, signature = self.signer.public(kind), self.signer.sign(alg, b"message")
            r, s = signature[:size], signature[size:]
            self.assertTrue(key.verify(alg, b"message", r + s))
            nothing, one, most = bytes(size), bytes(size - 1) + b"\1", b"\xff" * size
            for forged in (nothing + nothing, r + nothing, nothing + s, one + one, most + most, s + r, b"",
                           b"\0" + r + b"\0" + s, r + s + b"\0", r[1:] + s, r + s[:-1],
                           receiver._der_integers(*(int.from_bytes(half, "big") for half in (r, s)))):
                with self.subTest(alg, forged=forged.hex()):
                    self.assertFalse(key.verify(alg, b"message", forged))

    def test_keys_that_are_no_good_are_refused_beside_ones_that_are(self):
        rsa, p256, ed = (KEY_PAIRS[kind][1] for kind in ("RSA", "P-256", "Ed25519"))
        number = int.from_bytes(receiver.base64url_bytes(rsa["n"]), "big")
        for reason, jwk in (
                ("2048", {**rsa, "n": base64url((number >> 1) | 1)}),
                ("8192", {**rsa, "n": base64url((1 << 8192) | 1)}),
                ("odd", {**rsa, "n": base64url(number - 1)}), ("exponent", {**rsa, "e": "AQ"}),
                ("exponent", {**rsa, "e": "AAAA"}), ("exponent", {**rsa, "e": "BA"}),
                ("exponent", {**rsa, "e": base64url((1 << 32) | 1)}), ("base64url", {**rsa, "e": "AQAB="}),
                ("base64url", {**rsa, "e": "AQ B"}), ("base64url", {**rsa, "n": 5}),
                ("base64url", {"kty": "RSA"}),
                ("no key of P-256", {**p256, "y": p256["x"]}), ("no key of P-256", {**p256, "x": "A" * 43}),
                ("32 bytes", {**p256, "x": p256["x"][:-2] + "A"}), ("48 bytes", {**p256, "crv": "P-384"}),
                ("base64url", {**p256, "y": None}), ("must be a key", {**p256, "crv": "P-521"}),
                ("must be a key", {**p256, "crv": "secp256k1"}),
                ("must be a key", {**p256, "crv": ["P-256"]}),
                ("must be a key", {**p256, "kty": "OKP"}), ("must be a key", {**ed, "kty": "EC"}),
                ("must be a key", {**ed, "crv": "X25519"}), ("must be a key", {**ed, "crv": "Ed448"}),
                ("32 bytes", {**ed, "x": "A" * 44}), ("must be a key", {"kty": "oct", "k": "c2VjcmV0"}),
                ("must be a key", {"kty": ["RSA"]}), ("must be a key", {})):
            with self.subTest(reason, jwk=jwk), self.assertRaisesRegex(ValueError, reason):
                self.key(jwk)
        for kind, (_, jwk) in KEY_PAIRS.items():
            self.assertEqual(self.key({**jwk, "d": "ignored", "kid": ["ignored"]}).kind, kind)

    def test_base64url_has_one_spelling(self):
        for text, data in (("", b""), ("AA", b"\0"), ("AAA", b"\0\0"), ("-_-_", b"\xfb\xff\xbf")):
            self.assertEqual(receiver.base64url_bytes(text), data)
        for text in ("A", "AB", "AAB", "AA==", "AA=", "A A", "AA\n", " AA", "+/+/", "AAAA=", "AAAAA",
                     "\xc4\x80A", "A\0", "\ud800A", None, 5, b"AA", ["AA"]):
            with self.subTest(text):
                self.assertRaises(ValueError, receiver.base64url_bytes, text)

    def test_eight_threads_at_once_check_with_the_same_keys(self):
        keys = {kind: self.signer.public(kind) for kind in KEY_PAIRS}
        signed = [(alg, kind, self.signer.sign(alg, b"message"))
                  for alg, (kind, _) in receiver.JWS_ALGORITHMS.items()]
        results = []

        def work():
            for _ in range(5):
                for alg, kind, signature in signed:
                    results.append((keys[kind].verify(alg, b"message", signature),
                                    keys[kind].verify(alg, b"massage", signature)))

        in_threads(8, work)
        self.assertEqual((len(results), set(results)), (8 * 5 * 9, {(True, False)}))

    def test_an_interrupted_check_frees_what_it_took(self):
        alive, key = Counter(), self.signer.public("RSA")
        new, free = self.crypto.EVP_MD_CTX_new, self.crypto.EVP_MD_CTX_free
        with mock.patch.multiple(
                self.crypto, EVP_MD_CTX_new=lambda: (alive.update(["new"]), new())[1],
                EVP_MD_CTX_free=lambda context: (alive.update(["free"]), free(context)),
                EVP_DigestVerify=mock.Mock(side_effect=[1, 0, -1, KeyboardInterrupt])):
            for expected in (True, False, False):
                self.assertEqual(key.verify("RS256", b"message", b"x" * 256), expected)
            self.assertRaises(KeyboardInterrupt, key.verify, "RS256", b"message", b"x" * 256)
        self.assertEqual(alive, {"new": 4, "free": 4})


# =============================================================================
# Store
# =============================================================================

PLAIN_TABLE = """CREATE TABLE appointment_events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, event_type TEXT NOT NULL, appointment_id TEXT NOT NULL,
    patient_id TEXT NOT NULL, timestamp TEXT NOT NULL, notes TEXT, received_at TEXT NOT NULL,
    UNIQUE(appointment_id, timestamp))"""
FORGERY = "x\r\n2025-01-10 14:23:15,123 - webhook - INFO - [-] forged\x1b[2J\u2028\u202e\x00\x85"


def stored_event(number=1, **columns):
    """An AppointmentEvent as the reader makes it; its payload says what its columns say, unless given."""
    members = event(appointment_id=f"APT-{number}", **{name: value for name, value in columns.items()
                                                      if name in ("appointment_id", "patient_id", "timestamp", "notes")})
    made = AppointmentEvent(members["event_type"], members["appointment_id"], members["patient_id"], members["timestamp"],
                            members.get("notes"), "2025-01-10T14:23:15.123456Z", "127.0.0.1", json.dumps(members))
    return made._replace(**columns)


def kinds(outcomes):
    return [(outcome.kind, outcome.event_id) for outcome in outcomes]


def write_rows(database, *statements):
    """Run SQL as another program would; (statement, values) or a statement alone."""
    with contextlib.closing(sqlite3.connect(str(database))) as connection, connection:
        for statement in statements:
            connection.execute(*((statement,) if isinstance(statement, str) else statement))


def files(folder):
    """{name: bytes} of all files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextlib.contextmanager
def without_root():
    """Give up the rights of root for a while: to it no file is read-only."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def rows_of(data, folder):
    """The events in a database that is given as bytes."""
    path = folder / "as-it-was.db"
    path.write_bytes(data)
    return rows(path, "SELECT * FROM appointment_events")


class EngineTest(FolderTest):
    """A test with an engine on self.database."""

    def engine(self):
        engine = SQLite(str(self.database))
        engine.open()
        self.addCleanup(engine.close)
        return engine

    def refused(self, words):
        """Opening must fail with these words; gives the message."""
        engine = SQLite(str(self.database))
        with self.assertRaises(SetupError) as caught:
            engine.open()
        self.assertIn(words, str(caught.exception))
        self.assertNotIn("\n", str(caught.exception))
        return str(caught.exception)


class SQLiteTest(EngineTest):

    def test_a_new_file_has_the_promised_tables_and_is_durable_and_private(self):
        engine = self.engine()
        names = [name for name, in rows(self.database, "SELECT name FROM pragma_table_info('appointment_events')")]
        self.assertEqual(names, ["id", "event_type", "appointment_id", "patient_id", "timestamp", "notes", "received_at",
                                 "client", "payload", "patient_hmac", "content_hmac"])
        self.assertEqual(rows(self.database, "PRAGMA journal_mode"), "wal")
        self.assertEqual(rows(self.database, "PRAGMA user_version"), SQLite.DATA_VERSION)
        self.assertEqual(engine.writer.execute("PRAGMA synchronous").fetchone()[0], 2)
        self.assertEqual(engine.writer.execute("PRAGMA journal_size_limit").fetchone()[0], SQLite.WAL_BYTES)
        if POSIX:
            self.assertEqual(self.database.stat().st_mode & 0o077, 0)

    def test_a_group_of_any_size_gets_consecutive_ids_in_order(self):
        engine, last = self.engine(), 0
        for size in (1, 2, 3, 63, 64, 65, 130):
            with self.subTest(size):
                outcomes = write(engine, [stored_event(last + number) for number in range(1, size + 1)])
                self.assertEqual(kinds(outcomes), [("stored", last + number) for number in range(1, size + 1)])
                for outcome in outcomes[:1] + outcomes[-1:]:
                    found, = read(engine, Filter(), outcome.event_id - 1, 1)
                    self.assertEqual((found.id, found.appointment_id), (outcome.event_id, f"APT-{outcome.event_id}"))
                last += size

    def test_duplicates_within_one_group_are_decided_there_and_the_first_wins(self):
        for size in (3, 80):
            with self.subTest(size):
                engine, base = self.engine(), size * 1000
                group = [stored_event(base + number) for number in range(size)]
                group[1:1] = [group[0], group[0]._replace(payload='{"other": 1}')]
                outcomes = write(engine, group + group[-1:])
                first, same, other, *rest, last = outcomes
                self.assertEqual((same.kind, same.event_id, same.identical), ("duplicate", first.event_id, True))
                self.assertEqual((other.kind, other.event_id, other.identical), ("duplicate", first.event_id, False))
                self.assertEqual((last.kind, last.event_id), ("duplicate", rest[-1].event_id))
                self.assertEqual({outcome.kind for outcome in [first] + rest}, {"stored"})
                for one, outcome in zip(group, outcomes):
                    self.assertEqual(read(engine, Filter(), outcome.event_id - 1, 1)[0].appointment_id,
                                     one.appointment_id)

    def test_ids_of_deleted_events_are_never_given_again(self):
        engine = self.engine()
        write(engine, [stored_event(number) for number in range(1, 6)])
        write_rows(self.database, "DELETE FROM appointment_events WHERE id > 1")
        outcomes = write(engine, [stored_event(1), stored_event(7), stored_event(8), stored_event(7)])
        self.assertEqual([outcome.kind for outcome in outcomes], ["duplicate", "stored", "stored", "duplicate"])
        self.assertEqual(outcomes[0].event_id, 1)
        self.assertGreater(outcomes[1].event_id, 5)
        self.assertEqual(dict(rows(self.database, "SELECT appointment_id, id FROM appointment_events")),
                         {"APT-1": 1, "APT-7": outcomes[1].event_id, "APT-8": outcomes[2].event_id})

    def test_one_bad_row_never_fails_its_neighbours(self):
        bad = {"NULL in a column that takes none": stored_event("bad", patient_id=None),
               "a lone surrogate": stored_event("bad", notes="\ud800"),
               "a value that no column takes": stored_event("bad")._replace(notes=object()),
               "a number too large": stored_event("bad")._replace(notes=2 ** 70)}
        for number, (name, row) in enumerate(bad.items()):
            with self.subTest(name):
                good = [stored_event(f"{number}-{at}") for at in range(4)]
                outcomes = write(self.engine(), good[:2] + [row] + good[2:] + good[:1])
                self.assertEqual([outcome.kind for outcome in outcomes],
                                 ["stored", "stored", "failed", "stored", "stored", "duplicate"])
                self.assertIsInstance(outcomes[2].error, Exception)
        self.assertEqual(rows(self.database), 4 * len(bad))
        self.assertEqual(write(self.engine(), [stored_event("bad")])[0].kind, "stored")

    def test_the_same_content_is_identical_however_it_is_written(self):
        engine = self.engine()
        stored = stored_event(1, payload='{"a": 1, "b": [1.0, true, "\\u00e9"], "timestamp": "2025-01-10T14:00:00Z"}')
        write(engine, [stored])
        cases = {'{"timestamp": "2025-01-10T15:00:00+01:00", "b": [1, true, "é"], "a": 1.0}': True,
                 '{"a": 1, "b": [1, 1, "é"]}': False, '{"a": 1, "b": [true, 1, "é"]}': False,
                 '{"a": 1}': False, "[]": False, "[" * 5000: False, "": False}
        for payload, identical in cases.items():
            with self.subTest(payload[:80]):
                outcome, = write(engine, [stored._replace(payload=payload)])
                self.assertEqual((outcome.kind, outcome.event_id, outcome.identical), ("duplicate", 1, identical))

    def test_a_stored_payload_nested_beyond_measure_fails_nobody(self):
        engine = self.engine()
        for depth in (900, 100000):
            key = stored_event(depth, payload='{"a":' * depth + "1" + "}" * depth)
            write(engine, [key])
            outcomes = write(engine, [key, stored_event(f"{depth}-next")])
            self.assertEqual([outcome.kind for outcome in outcomes], ["duplicate", "stored"])

    def test_other_content_under_a_stored_key_is_kept_in_the_same_commit(self):
        engine, statements = self.engine(), []
        write(engine, [stored_event(1)])
        engine.writer.set_trace_callback(statements.append)
        write(engine, [stored_event(1, payload='{"other": 1}', client="10.0.0.1"), stored_event(2)])
        engine.writer.set_trace_callback(None)
        words = [statement.split()[0] for statement in statements]
        self.assertLess(words.index("BEGIN"), words.index("INSERT"))
        self.assertEqual(words.count("COMMIT"), 1)
        self.assertGreater(words.index("COMMIT"), max(at for at, word in enumerate(words) if word == "INSERT"))
        self.assertEqual(rows(self.database, "SELECT event_id, received_at, client, payload FROM conflicting_events"),
                         [(1, "2025-01-10T14:23:15.123456Z", "10.0.0.1", '{"other": 1}')])

    def test_a_retry_of_conflicting_content_is_kept_once_for_each_sender(self):
        engine = self.engine()
        write(engine, [stored_event(1)])
        for client in ("10.0.0.1", "10.0.0.1", None, None, "10.0.0.2"):
            write(engine, [stored_event(1, payload='{"other": 1}', client=client)])
        write(engine, [stored_event(1, payload='{"other": 2}')])
        write(engine, [stored_event(1)])
        self.assertEqual(rows(self.database, "SELECT count(*) FROM conflicting_events"), 4)

    def test_content_is_kept_once_however_many_others_were_kept_since(self):
        engine = self.engine()
        write(engine, [stored_event(1)])
        others = [stored_event(1, payload=json.dumps({"other": number}), client="10.0.0.1") for number in range(30)]
        for _ in range(2):
            write(engine, others)
        write(engine, [others[0]._replace(payload='{ "other":0.0 }'), others[0]._replace(client="10.0.0.2")])
        self.assertEqual(rows(self.database, "SELECT count(*), count(DISTINCT digest) FROM conflicting_events"),
                         [(31, 30)])
        plan = engine.writer.execute("EXPLAIN QUERY PLAN " + receiver.Session.KEEP, dict.fromkeys(
            ("event_id", "received_at", "client", "payload", "digest"))).fetchall()
        self.assertIn("idx_conflicting_event_digest (event_id=? AND digest=?", str(plan))

    def test_large_content_is_compared_outside_of_the_transaction(self):
        engine, large = self.engine(), json.dumps({"a": "x" * 9000})
        write(engine, [stored_event(1), stored_event(2, payload=large), stored_event(3, payload="{}")])
        with mock.patch.object(receiver, "content_digest", side_effect=AssertionError("in the transaction")):
            outcomes = write(engine, [stored_event(1, payload=large), stored_event(2), stored_event(2, payload=large)])
        self.assertEqual([(one.kind, one.event_id, one.identical) for one in outcomes],
                         [("duplicate", 1, None), ("duplicate", 2, None), ("duplicate", 2, None)])
        self.assertEqual(write(engine, [stored_event(3, payload="{ }")])[0].identical, True)
        self.assertEqual(engine.digest(2), receiver.content_digest(large))
        self.assertEqual(rows(self.database, "SELECT count(*) FROM conflicting_events"), 0)
        other = stored_event(2)
        for _ in range(2):
            with engine.transaction() as session:
                session.keep_conflict(2, other, receiver.content_digest(other.payload))
        self.assertEqual(rows(self.database, "SELECT event_id, payload FROM conflicting_events"), [(2, other.payload)])

    def test_a_transaction_looks_at_a_bounded_amount_of_stored_content(self):
        engine = self.engine()
        write(engine, [stored_event(number, payload=json.dumps({"a": "x" * 400000})) for number in range(9)])
        lengths, group = [], [stored_event(number) for number in range(9)]
        engine.writer.set_trace_callback(lambda text: lengths.append(text) if "length(" in text else None)
        self.assertEqual({one.identical for one in write(engine, group)}, {None})
        self.assertLess(len(lengths), 5)

    def test_work_in_a_savepoint_is_undone_alone(self):
        engine = self.engine()
        with engine.transaction() as session:
            session.insert([stored_event(1)])
            with self.assertRaises(ZeroDivisionError), session.savepoint():
                session.insert([stored_event(2)])
                raise ZeroDivisionError
            with session.savepoint():
                session.execute("DELETE FROM appointment_events WHERE appointment_id = ?", ("APT-7",))
                session.insert([stored_event(3)])
        self.assertEqual(rows(self.database, "SELECT appointment_id FROM appointment_events"), [("APT-1",), ("APT-3",)])

    def test_a_transaction_that_raises_stores_nothing(self):
        engine = self.engine()
        with self.assertRaises(ZeroDivisionError), engine.transaction() as session:
            session.insert([stored_event(1)])
            raise ZeroDivisionError
        self.assertEqual(kinds(write(engine, [stored_event(2)])), [("stored", 1)])

    def test_nobody_waits_longer_for_the_writer_than_asked_and_never_in_sqlite(self):
        engine = self.engine()
        with engine.transaction(), self.assertRaises(StoreLocked), engine.transaction(wait=0):
            pass
        with contextlib.closing(sqlite3.connect(str(self.database), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            began = time.monotonic()
            for _ in range(20):
                with self.assertRaises(StoreLocked), engine.transaction():
                    pass
            self.assertLess(time.monotonic() - began, 2)
        engine.close()
        with self.assertRaisesRegex(StoreUnavailable, "closed"), engine.transaction():
            pass

    def test_a_trigger_that_takes_rows_away_fails_that_event_only(self):
        engine = self.engine()
        write_rows(self.database, "CREATE TRIGGER t BEFORE INSERT ON appointment_events WHEN NEW.notes = 'no' "
                   "BEGIN SELECT RAISE(IGNORE); END")
        outcomes = write(engine, [stored_event(1), stored_event(2, notes="no"), stored_event(3)])
        self.assertEqual([one.kind for one in outcomes], ["stored", "failed", "stored"])

    def test_a_trigger_that_would_let_a_duplicate_replace_the_stored_event_is_trouble(self):
        engine = self.engine()
        write_rows(self.database, "CREATE TRIGGER t BEFORE INSERT ON appointment_events BEGIN DELETE FROM "
                   "appointment_events WHERE appointment_id = NEW.appointment_id; END")
        with self.assertRaisesRegex(StoreUnavailable, "duplicates would be stored"):
            probe(engine)

    def test_a_trigger_that_ends_the_transaction_leaves_no_event_stored_that_is_answered_otherwise(self):
        engine = self.engine()
        write_rows(self.database, "CREATE TRIGGER t BEFORE INSERT ON appointment_events WHEN NEW.notes = 'no' "
                   "BEGIN SELECT RAISE(ROLLBACK, 'no'); END")
        with self.assertRaises(StoreUnavailable):
            write(engine, [stored_event(1), stored_event(2, notes="no"), stored_event(3)])
        self.assertEqual(rows(self.database), 0)

    def test_the_connections_share_one_bound_of_memory(self):
        engine = self.engine()
        read(engine, Filter(), 0, 1)
        with engine.readers.all_places() as places:
            connections = [one for one in (*places, engine.writer, engine.checkpoints.connection) if one]
            sizes = [one.execute("PRAGMA cache_size").fetchone()[0] for one in connections]
        self.assertLessEqual(max(sizes), 0)             # KiB, and not pages
        self.assertLessEqual(-sum(sizes), SQLite.CACHE_KIB)

    def test_macos_is_asked_to_empty_the_cache_of_the_drive(self):
        for platform, expected in (("darwin", 1), ("linux", 0)):
            with mock.patch.object(receiver.sys, "platform", platform):
                engine = self.engine()
            for pragma in ("fullfsync", "checkpoint_fullfsync"):
                self.assertEqual(engine.writer.execute(f"PRAGMA {pragma}").fetchone()[0], expected)

    def test_a_path_of_windows_becomes_a_uri_that_sqlite_takes(self):
        for path, uri in ((r"C:\data\my events.db", "file:///C:/data/my%20events.db?mode=rw"),
                          (r"\\server\share\events.db", "file:////server/share/events.db?mode=rw")):
            self.assertEqual(receiver._uri(PureWindowsPath(path), "rw"), uri)

    def test_a_lock_of_another_program_stores_nothing_and_passes(self):
        engine = self.engine()
        with contextlib.closing(sqlite3.connect(str(self.database), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with self.assertRaises(StoreLocked):
                write(engine, [stored_event(1)])
            with self.assertRaises(StoreLocked):
                probe(engine)
            self.assertEqual(engine.last_id(), 0)
            other.execute("ROLLBACK")
        probe(engine)
        self.assertEqual(kinds(write(engine, [stored_event(1)])), [("stored", 1)])

    def test_reading_never_waits_for_a_write_under_way(self):
        engine = self.engine()
        write(engine, [stored_event(1)])
        engine.writer.execute("BEGIN EXCLUSIVE")
        with engine.lock:
            self.assertEqual([one.id for one in read(engine, Filter(), 0, 10)], [1])
            self.assertEqual(engine.last_id(), 1)
            with self.assertRaises(StoreLocked):
                probe(engine)
        engine.writer.execute("ROLLBACK")

    def test_only_a_few_read_at_a_time_and_they_cannot_write(self):
        engine = self.engine()
        write(engine, [stored_event(1)])
        reading, most, found, lock = [], [], [], threading.Lock()

        def read_one():
            with engine.readers.reading() as connection:
                with lock:
                    reading.append(connection)
                    most.append(len(reading))
                found.append(connection.execute("SELECT max(id) FROM appointment_events").fetchone()[0])
                with lock:
                    reading.remove(connection)
        in_threads(20, read_one)
        self.assertEqual((found, max(most) <= receiver._Readers.MOST), ([1] * 20, True))
        with engine.readers.all_places() as places:
            self.assertEqual(len(places), receiver._Readers.MOST)
        with engine.readers.reading() as connection, self.assertRaises(sqlite3.OperationalError):
            connection.execute("DELETE FROM appointment_events")

    def test_filters_choose_and_pages_go_on_behind_the_last_id(self):
        engine = self.engine()
        times = ["2025-01-10T14:00:00Z", "2025-01-10T14:00:00.5Z", "2025-01-10T14:00:01Z", "2025-01-11T00:00:00Z"]
        write(engine, [stored_event(number % 2, timestamp=time_, patient_id=f"PAT-{number}")
                      for number, time_ in enumerate(times)])
        cases = [(Filter(), 0, 10, None, [1, 2, 3, 4]), (Filter(), 1, 2, None, [2, 3]), (Filter(), 0, 10, 2, [1, 2]),
                 (Filter(appointment_id="APT-1"), 0, 10, None, [2, 4]), (Filter(appointment_id="APT-1"), 2, 10, None, [4]),
                 (Filter(patient_id="PAT-2"), 0, 10, None, [3]), (Filter(event_type="cancelled"), 0, 10, None, []),
                 (Filter(since=times[1]), 0, 10, None, [2, 3, 4]), (Filter(until=times[2]), 0, 10, None, [1, 2]),
                 (Filter(since=times[0], until=times[0]), 0, 10, None, []), (Filter(since="x' OR 1=1 --"), 0, 9, None, [])]
        for wanted, after, limit, up_to, ids in cases:
            with self.subTest(wanted=wanted, after=after):
                self.assertEqual([one.id for one in read(engine, wanted, after, limit, up_to)], ids)

    def test_a_read_ends_where_payloads_have_filled_its_share_of_memory(self):
        engine = self.engine()
        write(engine, [stored_event(number, payload=json.dumps({"x": "x" * 200000})) for number in range(1, 6)])
        for wanted in (Filter(), Filter(patient_id="PAT-1")):
            found = [[one.id for one in events] for events in lists(engine, wanted, 0)]
            self.assertEqual(found, [[1, 2], [3, 4], [5]])

    def test_what_is_not_utf_8_is_read_and_never_quoted_in_an_error(self):
        engine = self.engine()
        write_rows(self.database, "INSERT INTO appointment_events VALUES (1, 'scheduled', 'APT-1', 'PAT-1', "
                   "'2025-01-10T14:00:00Z', CAST(x'4a6f686eff' AS TEXT), '2025-01-10T14:00:00Z', NULL, '{}', NULL, NULL)")
        self.assertEqual(read(engine, Filter(), 0, 10)[0].notes, "John\ufffd")
        self.assertEqual(write(engine, [stored_event(1, timestamp="2025-01-10T14:00:00Z")])[0].kind,
                         "duplicate")

    @unittest.skipUnless(POSIX, "Windows moves no open file")
    def test_nothing_is_said_to_be_stored_in_a_file_that_was_moved_away(self):
        engine = self.engine()
        write(engine, [stored_event(1)])
        self.database.rename(self.folder / "moved.db")
        self.database.write_bytes(b"")                  # as when a backup is put in its place
        for call in (lambda: write(engine, [stored_event(2)]), lambda: probe(engine), lambda: read(engine, Filter(), 0, 1)):
            with self.assertRaisesRegex(StoreUnavailable, "moved or deleted"):
                call()
        (self.folder / "moved.db").rename(self.database)
        probe(engine)
        self.assertEqual(write(engine, [stored_event(2)])[0].kind, "stored")

    def test_contents_that_are_equal_as_json_have_one_digest(self):
        for one, other, same in (('{"a": 1, "b": [2]}', '{"b": [2.0], "a": 1}', True),
                                 ('{"a": 1, "timestamp": "x"}', '{"timestamp": "y", "a": 1}', True),
                                 ('{"a": 1}', '{"a": true}', False), ("not JSON", "not JSON", True),
                                 (json.dumps({"a": "x" * 20000, "b": 1}), json.dumps({"b": 1, "a": "x" * 20000}), True),
                                 (json.dumps({"a": "x" * 20000, "b": 1}), json.dumps({"b": 2, "a": "x" * 20000}), False)):
            with self.subTest(one[:30]):
                self.assertEqual(receiver.content_digest(one) == receiver.content_digest(other), same)

    def test_an_appointment_is_looked_up_in_the_index_and_a_page_starts_at_its_id(self):
        engine = self.engine()
        write(engine, [stored_event(1), stored_event(2)])
        plans = []

        def explain(statement):
            if statement.startswith("SELECT"):
                plans.append(str(other.execute("EXPLAIN QUERY PLAN " + statement).fetchall()))
        with contextlib.closing(sqlite3.connect(str(self.database))) as other:
            with engine.readers.reading() as one, engine.readers.reading() as two:
                for connection in (one, two):
                    connection.set_trace_callback(explain)
            for wanted in (Filter(), Filter(patient_id="PAT-1"), Filter(appointment_id="APT-1")):
                list(lists(engine, wanted, 0))
        self.assertEqual(len(plans), 5)
        for plan in plans[:3] + plans[4:]:
            self.assertRegex(plan, r"USING INTEGER PRIMARY KEY \(rowid[>=]\?")
        self.assertIn("COVERING INDEX idx_appointment_timestamp (appointment_id=?)", plans[3])
        for plan in plans:
            self.assertNotIn("SCAN", plan)
            self.assertNotIn("TEMP B-TREE", plan)

    def test_a_path_means_the_same_file_after_the_program_changed_its_folder(self):
        other = self.folder / "other"
        other.mkdir()
        here = os.getcwd()
        self.addCleanup(os.chdir, here)
        os.chdir(self.folder)
        engine = SQLite("events.db")
        engine.open()
        self.addCleanup(engine.close)
        write(engine, [stored_event(1)])
        os.chdir(other)
        self.assertEqual(engine.last_id(), 1)
        self.assertEqual(list(other.iterdir()), [])
        os.chdir(here)

    def test_files_that_are_not_ours_are_refused_and_left_byte_for_byte(self):
        def garbage():
            self.database.write_bytes(b"This is a letter, not a database.\n" * 100)

        def filled():
            engine = self.engine()
            write(engine, [stored_event(number) for number in range(200)])
            engine.close()

        def damaged():
            filled()
            data = bytearray(self.database.read_bytes())
            data[4096:8192] = bytes(4096)
            self.database.write_bytes(data)

        def cut_off():
            filled()
            self.database.write_bytes(self.database.read_bytes()[:10000])

        def newer():
            write_rows(self.database, f"PRAGMA user_version = {SQLite.DATA_VERSION + 1}")

        def newer_in_wal_mode():
            write_rows(self.database, "PRAGMA journal_mode = WAL")
            write_rows(self.database, "PRAGMA user_version = 99")

        def of_another_program():
            write_rows(self.database, "CREATE TABLE songs (title)", "PRAGMA user_version = 1")

        def without_its_index():
            self.engine().close()
            write_rows(self.database, "DROP INDEX idx_appointment_timestamp")

        def with_a_table_that_lacks_columns():
            write_rows(self.database, "CREATE TABLE appointment_events (id INTEGER PRIMARY KEY, patient_id TEXT)")
        cases = [(garbage, "not a SQLite database"), (damaged, "damaged"), (cut_off, "damaged"), (newer, "newer version"),
                 (newer_in_wal_mode, "newer version"), (of_another_program, "not ours"), (without_its_index, "ON CONFLICT"),
                 (with_a_table_that_lacks_columns, "lacks appointment_id")]
        for make, words in cases:
            with self.subTest(make.__name__):
                make()
                before = self.database.read_bytes()
                self.assertIn(str(self.database), self.refused(words))
                self.assertEqual(self.database.read_bytes(), before)
                for path in self.folder.iterdir():
                    path.unlink()

    def test_a_path_that_cannot_be_opened_is_told_in_one_line(self):
        for path in (self.folder / "missing" / "events.db", self.folder):
            with self.subTest(path=path):
                with self.assertRaises(SetupError) as caught:
                    SQLite(str(path)).open()
                self.assertNotIn("\n", str(caught.exception))

    @unittest.skipUnless(POSIX, "rights of POSIX")
    def test_a_read_only_file_is_told_at_start_and_left_as_it_is(self):
        write_rows(self.database, PLAIN_TABLE)
        self.database.chmod(0o444)
        self.folder.chmod(0o755)
        before = self.database.read_bytes()
        with without_root():
            self.refused("read-only")
        self.assertEqual(self.database.read_bytes(), before)
        self.database.chmod(0o644)
        probe(self.engine())

    @unittest.skipUnless(POSIX, "rights of POSIX")
    def test_who_may_not_write_hears_at_start_which_file_it_is_and_what_to_do(self):
        engine = self.engine()
        write(engine, [stored_event(1)])
        crashed = files(self.folder)
        engine.close()
        for name in ("events.db", "events.db-wal", "events.db-shm", ""):
            for mode in (0o444, 0o000):
                with self.subTest(name, mode=oct(mode)):
                    for path in [*self.folder.iterdir(), self.folder]:
                        path.chmod(0o777)
                    for left, data in crashed.items():
                        (self.folder / left).write_bytes(data)
                    if not name:                        # a folder counts where files are still to be made
                        (self.folder / "events.db-wal").unlink()
                        (self.folder / "events.db-shm").unlink()
                    (self.folder / name).chmod(mode | 0o111 * (not name))
                    with without_root():
                        text = self.refused("chmod or chown it")
                    self.assertIn(f"{self.folder / name} is read-only for this user", text)

    @unittest.skipUnless(hasattr(resource, "RLIMIT_NOFILE"), "limits of a process")
    def test_too_few_open_files_are_not_blamed_on_the_folder(self):
        for most in (8, 10, 12):
            code, _, complaint = self.program("--port", "0", "--database", self.database, preexec_fn=lambda: (
                resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))))
            self.assertEqual((code, complaint.count("\n")), (2, 1))
            self.assertIn("raise the limit of open files", complaint)

    def test_closing_moves_all_into_the_one_file(self):
        engine = self.engine()
        write(engine, [stored_event(number) for number in range(10)])
        engine.close()
        self.assertEqual(list(files(self.folder)), ["events.db"])
        self.assertEqual(rows(self.database), 10)

    def test_closing_while_a_checkpoint_is_made_waits_for_it(self):
        engine, under_way, go_on = self.engine(), threading.Event(), threading.Event()
        move = engine.checkpoints._move

        def slowly(connection):
            under_way.set()
            go_on.wait(WAIT)
            return move(connection)
        write(engine, [stored_event(1)])
        with mock.patch.object(engine.checkpoints, "_move", slowly):
            engine.checkpoints.loop.wake()
            self.assertTrue(under_way.wait(WAIT))
            closing = threading.Thread(target=engine.close, daemon=True)
            closing.start()
            until(lambda: engine.checkpoints.loop._stopping, "the stop")
            go_on.set()
            closing.join(WAIT)
        self.assertFalse(closing.is_alive())
        self.assertEqual(list(files(self.folder)), ["events.db"])


class EncryptionTest(EngineTest):
    """What is personal, encrypted at rest."""
    KEYS = {"new": b"n" * 32, "old": b"o" * 32}
    PLANTED = ("PAT-planted-1", "notes that are planted", "a member that is planted", "conflict that is planted")

    def encryption(self, *names, tell=None):
        self.told = []
        return receiver.Encryption({name: self.KEYS[name] for name in names or ("new",)}, tell=tell or self.told.append)

    def encrypted(self, *names, **options):
        """An open engine with these keys."""
        engine = SQLite(str(self.database), encryption=self.encryption(*names), **options)
        engine.open()
        self.addCleanup(engine.close)
        return engine

    def event(self, number=1, **columns):
        payload = {"patient_id": self.PLANTED[0], "notes": self.PLANTED[1], "more": self.PLANTED[2]}
        return stored_event(number, **{"patient_id": self.PLANTED[0], "notes": self.PLANTED[1],
                                       "payload": json.dumps(payload), **columns})

    def fill(self, engine):
        """Two events and a conflict."""
        outcomes = write(engine, [self.event(1), self.event(2, notes=None), self.event(
            1, payload=json.dumps({"x": self.PLANTED[3]}))])
        self.assertEqual([one.kind for one in outcomes], ["stored", "stored", "duplicate"])

    def assert_nothing_planted(self):
        for name, data in files(self.folder).items():
            for text in self.PLANTED:
                self.assertNotIn(text.encode(), data, name)

    def test_nothing_personal_is_in_any_file_and_all_of_it_comes_out(self):
        engine = self.encrypted()
        self.fill(engine)
        self.assert_nothing_planted()
        found = read(engine, Filter(), 0, 9)
        self.assertEqual([one._replace(id=None) for one in found], [self.event(1), self.event(2, notes=None)])
        self.assertEqual(engine.event(2).patient_id, self.PLANTED[0])
        engine.close()
        self.assert_nothing_planted()
        self.assertEqual([one.notes for one in read(self.encrypted(), Filter(), 0, 9)], [self.PLANTED[1], None])

    def test_texts_of_every_kind_come_out_as_they_went_in(self):
        engine = self.encrypted()
        events = [self.event(number, patient_id=patient_id, notes=notes, payload=payload) for number, (
            patient_id, notes, payload) in enumerate([("ü:3:x", "", "{}"), ("1:2:", ":", '{"a": "\U0001f600"}'),
                                                      ("\U0001f600", None, "{}"), ("p" * 255, "n" * 5000, '{"n": "' + "x" * 200000 + '"}')])]
        write(engine, events)
        self.assertEqual([one._replace(id=None) for one in read(engine, Filter(), 0, 9)], events)

    def test_a_patient_is_found_by_an_index_that_tells_nothing_without_the_key(self):
        engine = self.encrypted()
        write(engine, [self.event(1), self.event(2, patient_id="other"), self.event(3)])
        for patient_id, ids in ((self.PLANTED[0], [1, 3]), ("other", [2]), ("none", [])):
            self.assertEqual([one.id for one in read(engine, Filter(patient_id=patient_id), 0, 9)], ids)
            self.assertEqual([one.id for one in read(engine, Filter(patient_id=patient_id, appointment_id="APT-1"), 0, 9)],
                             [1] * (1 in ids))
        index, = set(rows(self.database, "SELECT patient_hmac FROM appointment_events WHERE id <> 2"))
        self.assertEqual(len(index[0]), 32)
        for guess in (hashlib.sha256(self.PLANTED[0].encode()).digest(),
                      hmac.digest(self.KEYS["new"], self.PLANTED[0].encode(), "sha256")):
            self.assertNotEqual(index[0], guess)

    def test_duplicates_are_compared_as_without_encryption(self):
        engine = self.encrypted()
        write(engine, [self.event(1, payload='{"a": 1}')])
        found = write(engine, [self.event(1, payload='{"a": 1}'), self.event(1, payload='{"a":1.0}'),
                               self.event(1, payload='{"a": 2}'), self.event(1, payload='{"a": 2.0}')])
        self.assertEqual([one.identical for one in found], [True, True, False, False])
        self.assertEqual(rows(self.database, "SELECT count(*) FROM conflicting_events"), 1)
        self.assertEqual(engine.digest(1), receiver.content_digest('{"a": 1}'))

    def test_equal_values_never_look_alike(self):
        engine = self.encrypted()
        write(engine, [self.event(number, payload="{}") for number in range(50)])
        values = rows(self.database, "SELECT payload FROM appointment_events")
        nonces = {value[len(engine.encryption.prefix):][:12] for value, in values}
        self.assertEqual(len(nonces), 50)
        self.assertNotEqual(self.encryption()._run, self.encryption()._run)

    def test_no_value_can_be_moved_changed_or_put_in_and_only_its_event_is_unreadable(self):
        engine = self.encrypted()
        write(engine, [self.event(number) for number in (1, 2, 3)])
        first, second = (rows(self.database, f"SELECT payload FROM appointment_events WHERE id = {n}") for n in (1, 2))
        conflict = write(engine, [self.event(3, payload='{"x": 1}')]) and rows(
            self.database, "SELECT payload FROM conflicting_events")
        for column, value in (("payload", second), ("payload", "{}"), ("payload", b""), ("payload", first[:-1]),
                              ("payload", first[:40] + bytes([first[40] ^ 1]) + first[41:]), ("payload", conflict),
                              ("payload", b"\x01\xff"), ("payload", b"\x02" + first[1:]), ("patient_id", "PAT-9"),
                              ("patient_id", first), ("notes", "x"), ("appointment_id", "APT-9"),
                              ("timestamp", "2026-01-01T00:00:00Z")):
            with self.subTest(column, value=value[:8]):
                before = rows(self.database, f"SELECT {column} FROM appointment_events WHERE id = 1")
                write_rows(self.database, (f"UPDATE appointment_events SET {column} = ? WHERE id = 1", (value,)))
                found = read(engine, Filter(), 0, 9)
                self.assertEqual([isinstance(one, receiver.Unreadable) for one in found], [True, False, False])
                self.assertEqual((found[0].patient_id, found[0].notes, found[0].payload), (None, None, "null"))
                self.assertIs(json.loads(receiver.event_text(found[0]))["unreadable"], True)
                self.assertNotIn("unreadable", json.loads(receiver.event_text(found[1])))
                write_rows(self.database, (f"UPDATE appointment_events SET {column} = ? WHERE id = 1", (before,)))
        self.assertEqual(len(self.told), 1)             # once for each event
        self.assertRegex(self.told[0], "^the event with id 1 cannot be decrypted: ")
        self.assertEqual(read(engine, Filter(), 0, 9)[0].notes, self.PLANTED[1])

    def test_a_retry_of_an_event_that_cannot_be_read_is_kept_as_another(self):
        engine = self.encrypted()
        write(engine, [self.event(1)])
        write_rows(self.database, "UPDATE appointment_events SET payload = x'01'")
        self.assertEqual(write(engine, [self.event(1)])[0], Outcome("duplicate", 1, False))
        self.assertEqual(engine.digest(1), b"")
        self.assertEqual(rows(self.database, "SELECT count(*) FROM conflicting_events"), 1)

    def test_the_keys_have_to_be_there_and_the_file_is_untouched_without(self):
        engine = self.encrypted("old")
        self.fill(engine)
        engine.close()
        before = self.database.read_bytes()
        wrong = receiver.Encryption({"old": b"w" * 32})
        for encryption, words in ((None, "it is encrypted, with the key old: --encryption-key-file is needed"),
                                  (self.encryption("new"), "its key old is not in the key file"), (wrong, "was changed")):
            with self.subTest(words), self.assertRaises(SetupError) as caught:
                SQLite(str(self.database), encryption=encryption).open()
            self.assertIn(words, str(caught.exception))
            self.assertEqual(self.database.read_bytes(), before)
        self.assertEqual(len(read(self.encrypted("new", "old"), Filter(), 0, 9)), 2)

    def test_a_plain_database_with_rows_and_a_key_is_refused_and_one_without_rows_is_encrypted_from_now_on(self):
        self.engine().close()
        engine = self.encrypted()
        self.fill(engine)
        engine.close()
        self.assert_nothing_planted()
        self.database.unlink()
        self.engine_with_rows()
        before = self.database.read_bytes()
        with self.assertRaises(SetupError) as caught:
            self.encrypted()
        self.assertIn("python3 webhook_server.py rekey", str(caught.exception))
        self.assertEqual(self.database.read_bytes(), before)

    def engine_with_rows(self):
        """A plain database with rows, closed."""
        engine = self.engine()
        self.fill(engine)
        engine.close()
        write_rows(self.database, "INSERT INTO access_log (at, address, action, detail) VALUES ('x', 'y', 'read', "
                   f"'{self.PLANTED[2]}')")

    def rekey(self, *names):
        engine = self.encrypted(*names, takes_over=True)
        rekeying = receiver.Rekeying(engine)
        rekeying.run(lambda table, last: None)
        engine.close()
        return rekeying.moved, rekeying.unreadable

    def test_rekey_takes_a_plain_database_over_and_leaves_no_trace(self):
        self.engine_with_rows()
        self.assertIn(self.PLANTED[0].encode(), self.database.read_bytes())
        self.assertEqual(self.rekey("new"), (4, 0))
        self.assert_nothing_planted()
        self.assertEqual(self.rekey("new"), (0, 0))
        engine = self.encrypted()
        self.assertEqual([one._replace(id=None) for one in read(engine, Filter(patient_id=self.PLANTED[0]), 0, 9)],
                         [self.event(1), self.event(2, notes=None)])
        self.assertEqual(write(engine, [self.event(1, payload=json.dumps({"x": self.PLANTED[3]}))])[0].identical, False)
        self.assertEqual(rows(self.database, "SELECT count(*) FROM conflicting_events"), 1)      # kept once

    def test_rekey_that_was_interrupted_goes_on_and_until_then_nothing_else_opens_the_file(self):
        engine = self.engine()
        write(engine, [self.event(number) for number in range(20)])
        engine.close()

        class Killed(Exception):
            pass

        def stop(table, last):
            raise Killed
        engine = self.encrypted(takes_over=True)
        with mock.patch.object(receiver.Rekeying, "STEP", 7), self.assertRaises(Killed):
            receiver.Rekeying(engine).run(stop)
        engine.close()
        self.assertEqual(rows(self.database, "SELECT count(*) FROM appointment_events WHERE typeof(payload) = 'blob'"), 7)
        for encryption, words in ((self.encryption(), "encrypted only in part"), (None, "it is encrypted")):
            with self.assertRaises(SetupError) as caught:
                SQLite(str(self.database), encryption=encryption).open()
            self.assertIn(words, str(caught.exception))
        self.assertEqual(self.rekey(), (13, 0))
        self.assertEqual(len(read(self.encrypted(), Filter(patient_id=self.PLANTED[0]), 0, 99)), 20)
        self.assert_nothing_planted()

    def test_rekey_moves_rows_to_the_first_key_beside_a_store_that_writes(self):
        engine = self.encrypted("old")
        self.fill(engine)
        engine.encryption = self.encryption("new", "old")
        write(engine, [self.event(5)])
        self.assertEqual(self.rekey("new", "old"), (3, 0))
        write(engine, [self.event(6)])
        self.assertEqual(len(read(engine, Filter(patient_id=self.PLANTED[0]), 0, 9)), 4)
        engine.close()
        engine = self.encrypted("new")
        self.assertEqual([isinstance(one, receiver.Unreadable) for one in read(engine, Filter(), 0, 9)], [False] * 4)
        self.assertEqual(self.told, [])

    def test_rekey_leaves_what_it_cannot_read_and_takes_nothing_that_was_put_in_for_encrypted(self):
        engine = self.encrypted("old")
        self.fill(engine)
        engine.close()
        write_rows(self.database, "UPDATE appointment_events SET payload = '{}' WHERE id = 1",
                   "UPDATE conflicting_events SET payload = x'0102'")
        self.assertEqual(self.rekey("new", "old"), (1, 2))
        self.assertEqual([isinstance(one, receiver.Unreadable) for one in read(self.encrypted("new"), Filter(), 0, 9)],
                         [True, False])

    def test_a_key_file_that_is_no_good_is_one_line_that_does_not_show_it(self):
        path, good = self.folder / "keys", base64.b64encode(b"k" * 32).decode()
        for text, words in ((None, "No such file"), ("", "there is no key"), ("\n", "there is no key"), (good, "line 1"),
                            (f"a:{good}\nb:{good[:-5]}=\n", "line 2"), (f"a b:{good}", "line 1"), (f"a:{good}\na:{'A' * 43}=", "line 2"),
                            ("a:" + base64.b64encode(b"k" * 16).decode(), "line 1"), ("ü:" + good, "")):
            if text is not None:
                path.write_text(text, encoding="utf-8")
            with self.subTest(text), self.assertRaises(SetupError) as caught:
                receiver.read_encryption_keys(str(path))
            self.assertIn(words, str(caught.exception))
            self.assertNotIn(good[:8], str(caught.exception))
        path.write_text(f"a:{good}\n\nb:{'A' * 43}=\r\n")
        self.assertEqual(receiver.read_encryption_keys(str(path)), {"a": b"k" * 32, "b": bytes(32)})


class FilesTest(EngineTest):
    """What happens to the files of a database that is in use."""

    def used(self):
        """An engine with 20 events in the main file and 10 more in -wal."""
        engine = self.engine()
        write(engine, [stored_event(number) for number in range(20)])
        engine.close()
        shutil.copy2(self.database, self.folder / "old.db")
        engine = self.engine()
        write(engine, [stored_event(number) for number in range(20, 25)])
        engine.checkpoints.make()
        write(engine, [stored_event(number) for number in range(25, 30)])
        return engine

    def shell(self, command):
        subprocess.run(command, shell=True, check=True, cwd=self.folder)

    def sqlite(self, *statements):
        """What another program does with the database; in a process of its own, as locks are a process's."""
        program = ("import sqlite3, sys; c = sqlite3.connect('events.db', isolation_level=None);"
                   "[c.execute(s).fetchall() for s in sys.argv[1:]]")
        subprocess.run([sys.executable, "-c", program, *statements], check=True, cwd=self.folder)

    def troubled(self, command, words):
        """After `command` nothing is stored, read or moved any more, whoever asks. Gives engine and message."""
        engine = self.used()
        self.shell(command)
        for call in (lambda: write(engine, [stored_event("lost")]), lambda: read(engine, Filter(), 0, 1),
                     lambda: probe(engine)):
            with self.assertRaises(StoreUnavailable) as caught:
                call()
            self.assertNotIn("\n", str(caught.exception))
        engine.checkpoints.make()
        with self.assertRaisesRegex(StoreUnavailable, words) as caught:
            write(engine, [stored_event("lost")])
        return engine, str(caught.exception)

    def test_what_to_do_is_said_to_the_operator_and_not_to_senders(self):
        for text, advice in (("disk I/O error", "ulimit -f"), ("database disk image is malformed", "backup")):
            error = receiver._unavailable(sqlite3.OperationalError(text), "events.db")
            self.assertEqual(error.public, text)
            self.assertIn(advice, str(error))

    @unittest.skipUnless(POSIX, "Windows deletes and truncates no open file")
    def test_a_wal_that_loses_its_name_is_saved_into_the_main_file(self):
        for command in ("rm events.db-wal", "rm events.db-shm", "rm events.db-wal events.db-shm",
                        "mv events.db-wal elsewhere", "rm events.db-wal && touch events.db-wal",
                        "cp events.db-wal x && mv x events.db-wal"):
            with self.subTest(command):
                engine, text = self.troubled(command, "was moved, deleted or replaced")
                self.assertIn("saved into the database: restart the service", text)
                engine.close()
                self.assertEqual(self.engine().count(), 30)
                self.assertEqual(rows(self.database, "PRAGMA integrity_check"), "ok")
                self.doCleanups()
                self.setUp()

    @unittest.skipUnless(sys.platform == "linux", "elsewhere before Python 3.12 connections stay open instead")
    def test_over_a_main_file_that_others_changed_nothing_is_written_not_even_at_the_end(self):
        for command in ("truncate -s 0 events.db", "truncate -s 8192 events.db", "cp old.db events.db",
                        "cp -p old.db events.db", "dd if=/dev/zero of=events.db bs=4096 count=1 conv=notrunc status=none"):
            with self.subTest(command):
                engine, text = self.troubled(command, "was overwritten or truncated")
                self.assertIn("nothing more is written to it", text)
                before = files(self.folder)
                engine.close()
                self.assertEqual(files(self.folder), before)
                try:                                    # by what is in the WAL it can be whole again, else it is refused
                    self.assertEqual(self.engine().count(), 30)
                    self.assertEqual(rows(self.database, "PRAGMA integrity_check"), "ok")
                except SetupError:
                    self.assertEqual(files(self.folder)["events.db"], before["events.db"])
                self.doCleanups()
                self.setUp()

    @unittest.skipUnless(POSIX, "Windows deletes no open file")
    def test_what_was_in_a_main_file_that_was_deleted_is_kept_aside(self):
        for command in ("rm events.db", "mv old.db events.db"):
            with self.subTest(command):
                engine, text = self.troubled(command, "was deleted or replaced")
                self.assertIn(f"is in {self.database}.saved:", text)
                engine.close()
                self.assertEqual(rows(self.folder / "events.db.saved"), 30)
                self.assertEqual(list(self.folder.glob("*.saved-*")), [])
                self.doCleanups()
                self.setUp()

    def test_a_database_that_is_begun_anew_beside_saved_ones_tells_of_the_newest(self):
        self.engine().close()
        for name, age in (("events.db.saved", 60), ("events.db.saved-2", 0)):
            shutil.copy2(self.database, self.folder / name)
            os.utime(self.folder / name, (time.time() - age,) * 2)
        engine = self.engine()
        self.assertEqual(engine.notes, [])
        engine.close()
        self.database.unlink()
        note, = self.engine().notes
        self.assertIn(f"{self.database} was begun although {self.database}.saved-2 is there", note)
        self.doCleanups()

    @unittest.skipUnless(POSIX, "Windows truncates no open file")
    def test_a_wal_or_shm_that_was_written_over_is_noticed(self):
        for command, left in (("truncate -s 0 events.db-wal", 25), ("cp old.db events.db-wal", 25),
                              ("truncate -s 0 events.db-shm", 30),
                              ("head -c 32768 /dev/zero > z; cp z events.db-shm", 30)):
            with self.subTest(command):
                engine, text = self.troubled(command, "was overwritten or truncated")
                self.assertIn("let their senders repeat them", text)
                engine.close()
                self.assertEqual(self.engine().count(), left)
                self.doCleanups()
                self.setUp()

    def test_what_other_programs_may_do_with_the_database_disturbs_nobody(self):
        engine, at = self.used(), 30
        backup = "import sqlite3; sqlite3.connect('events.db').backup(sqlite3.connect('b.db'))"
        for what in (lambda: self.sqlite("SELECT count(*) FROM appointment_events"),
                     lambda: self.sqlite("CREATE TABLE IF NOT EXISTS other (a)", "INSERT INTO other VALUES (1)"),
                     lambda: self.sqlite("PRAGMA wal_checkpoint(PASSIVE)"),
                     lambda: self.sqlite("PRAGMA wal_checkpoint(RESTART)"),
                     lambda: self.sqlite("PRAGMA wal_checkpoint(TRUNCATE)"), lambda: self.sqlite("VACUUM"),
                     lambda: self.sqlite("VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"), engine.checkpoints.make,
                     lambda: os.chmod(self.database, 0o640), lambda: (self.folder / "other").write_text("x"),
                     lambda: subprocess.run([sys.executable, "-c", backup], check=True, cwd=self.folder)):
            for _ in range(2):
                what()
                at += 1
                self.assertEqual(kinds(write(engine, [stored_event(at)])), [("stored", at)])
                self.assertEqual(read(engine, Filter(), at - 1, 1)[0].id, at)

    def test_two_engines_write_one_file_in_turn(self):
        one, two = self.engine(), self.engine()
        for number in range(1, 101):
            self.assertEqual(kinds(write((one, two)[number % 2], [stored_event(number)])), [("stored", number)])
            if number % 10 == 0:
                (one, two)[number % 4 // 2].checkpoints.make()
        two.close()
        self.assertEqual(kinds(write(one, [stored_event(101)])), [("stored", 101)])
        self.sqlite("SELECT 1 FROM appointment_events")
        self.assertEqual(one.count(), 101)

    @unittest.skipUnless(POSIX, "Windows moves no open file")
    def test_files_that_change_during_a_transaction_are_noticed_before_anybody_is_told(self):
        for command in ("rm events.db-wal", "cp old.db events.db", "mv events.db elsewhere",
                        "dd if=old-shm of=events.db-shm conv=notrunc status=none"):
            for quick in (False, True):                 # which look at the files notices
                with self.subTest(command, quick=quick):
                    engine = self.used()
                    self.shell("cp events.db-shm old-shm")
                    write(engine, [stored_event("after the copy")])
                    if quick:
                        until(lambda: engine.check() or engine.files.are_untouched())
                    with self.assertRaises(StoreUnavailable):
                        with engine.transaction() as session:
                            session.insert([stored_event("new")])
                            self.shell(command)
                    self.doCleanups()
                    self.setUp()

    @unittest.skipUnless(POSIX, "Windows moves no open file")
    def test_files_that_are_put_back_as_they_were_are_used_and_closed_as_if_nothing_had_been(self):
        engine = self.used()
        self.shell("mv events.db-wal elsewhere")
        with self.assertRaises(StoreUnavailable):
            write(engine, [stored_event("lost")])
        self.shell("mv elsewhere events.db-wal")
        self.assertEqual(kinds(write(engine, [stored_event(31)])), [("stored", 31)])
        self.assertEqual(engine.close(), "")
        self.assertEqual(sorted(files(self.folder)), ["events.db", "old.db"])
        self.assertEqual(rows(self.database), 31)

    @unittest.skipUnless(POSIX, "Windows deletes no open file")
    def test_a_wal_without_a_name_that_a_reader_keeps_from_being_saved_is_not_said_to_be(self):
        engine = self.engine()
        write(engine, [stored_event(1)])
        other = subprocess.Popen([sys.executable, "-c", "import sqlite3; c = sqlite3.connect('events.db');"
                                  "c.execute('BEGIN'); c.execute('SELECT * FROM appointment_events').fetchone();"
                                  "print(flush=True); input()"],
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=self.folder)
        other.stdout.read(1)
        engine.checkpoints.loop.stop()
        write(engine, [stored_event(2)])
        self.shell("rm events.db-wal")
        with self.assertRaisesRegex(StoreUnavailable, "may be missing when the service is restarted"):
            write(engine, [stored_event("lost")])
        other.communicate(b"\n")
        with mock.patch.object(engine.checkpoints, "_move", side_effect=sqlite3.OperationalError("disk is full")), \
                self.assertRaisesRegex(StoreUnavailable, "may be missing when the service is restarted"):
            write(engine, [stored_event("lost")])
        with self.assertRaisesRegex(StoreUnavailable, "was saved into the database: restart"):
            write(engine, [stored_event("lost")])

    @unittest.skipUnless(POSIX, "Windows deletes no open file")
    def test_a_wal_is_not_saved_over_a_database_that_another_program_has_begun_to_use_anew(self):
        engine = self.used()
        self.shell("rm events.db-wal events.db-shm")
        other = subprocess.Popen([sys.executable, "-c", "import sqlite3; c = sqlite3.connect('events.db');"
                                  "c.execute('CREATE TABLE other (a)'); print(flush=True); input();"
                                  "c.execute('INSERT INTO other VALUES (1)'); c.commit()"],
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=self.folder)
        other.stdout.read(1)
        with self.assertRaisesRegex(StoreUnavailable, "events.db.saved: stop whatever else"):
            write(engine, [stored_event("lost")])
        other.communicate(b"\n")
        engine.close()
        self.assertEqual((other.returncode, rows(self.folder / "events.db.saved")), (0, 30))
        self.assertEqual((rows(self.database, "PRAGMA integrity_check"), rows(self.database)), ("ok", 25))

    @unittest.skipUnless(POSIX, "Windows looks at no file")
    def test_a_disk_that_cannot_even_be_looked_at_is_trouble_and_no_bug(self):
        engine = self.engine()
        with mock.patch.object(receiver.os, "pread", side_effect=OSError(errno.EIO, "Input/output error")):
            for call in (lambda: write(engine, [stored_event(1)]), lambda: read(engine, Filter(), 0, 1)):
                with self.assertRaisesRegex(StoreUnavailable, "^Input/output error$"):
                    call()
            self.assertFalse(engine.tend())
            engine.checkpoints.make()
        self.assertEqual(kinds(write(engine, [stored_event(1)])), [("stored", 1)])
        self.assertTrue(engine.tend())
        with mock.patch.object(receiver.os, "pread", side_effect=OSError(errno.EIO, "Input/output error")):
            self.assertEqual(engine.close(), "Input/output error")
        self.assertEqual(self.engine().count(), 1)


class LeftWALTest(EngineTest):
    """A -wal that was left by a crash."""
    CHILD = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import test_webhook_server as tests
engine = tests.SQLite(sys.argv[2])
engine.open()
exec(sys.argv[3])
os.kill(os.getpid(), signal.SIGKILL)
"""

    def crash(self, code):
        """A process that opens the database, does something, and is killed."""
        subprocess.run([sys.executable, "-c", self.CHILD, str(HERE), str(self.database), code], check=False)

    def store(self, *numbers):
        return f"tests.write(engine, [tests.stored_event(n) for n in range{numbers}])\n"

    def age(self, seconds):
        """Make -wal and -shm look older."""
        for name in ("events.db-wal", "events.db-shm"):
            then = time.time() - seconds
            os.utime(self.folder / name, (then, then))

    @unittest.skipUnless(POSIX, "kill -9")
    def test_a_copy_that_was_restored_beside_the_wal_of_a_newer_state_is_refused(self):
        engine = self.engine()
        write(engine, [stored_event(number) for number in range(10)])
        engine.close()
        first = self.database.read_bytes()
        self.crash(self.store(10, 100) + "engine.checkpoints.make()\n")
        self.engine().close()
        second = self.database.read_bytes()
        rollback = self.folder / "rollback.db"
        rollback.write_bytes(second)
        write_rows(rollback, "PRAGMA journal_mode = DELETE")
        self.crash(self.store(100, 140))
        crashed = {path.name: path.read_bytes() for path in self.folder.glob("events.db-*")}
        for content, words in ((first, "lacks pages"), (rollback.read_bytes(), "of another kind"),
                               (second, "was written by something else"), (b"", "is empty")):
            with self.subTest(words):
                for name, data in crashed.items():
                    (self.folder / name).write_bytes(data)
                self.database.write_bytes(content)
                self.age(600)
                before = files(self.folder)
                text = self.refused(words)
                self.assertIn("move events.db-wal and events.db-shm away", text)
                self.assertEqual(files(self.folder)["events.db"], before["events.db"])
                self.assertEqual(files(self.folder)["events.db-wal"], before["events.db-wal"])
                for name in crashed:
                    (self.folder / name).unlink()
                self.assertEqual(self.engine().count(), {first: 10, b"": 0}.get(content, 100))
                self.doCleanups()
                self.folder.mkdir(exist_ok=True)

    @unittest.skipUnless(POSIX, "kill -9")
    def test_a_database_that_is_missing_beside_its_wal_is_not_begun_anew_and_its_saved_copy_is_named(self):
        self.crash(self.store(0, 10))
        os.rename(self.database, self.folder / "events.db.saved")
        for _ in range(2):
            text = self.refused("events.db is missing")
            self.assertTrue(text.endswith(f"what was in use last is in {self.database}.saved"), text)
            self.assertFalse(self.database.exists())
        link, self.database = self.database, self.folder / "link.db"
        os.symlink(link, self.database)                 # what is to be moved lies beside the file itself
        self.refused("move events.db-wal and events.db-shm away")
        self.database = link
        os.rename(self.folder / "events.db.saved", self.database)
        self.assertEqual(self.engine().count(), 10)

    @unittest.skipUnless(POSIX, "kill -9")
    def test_a_copy_that_was_restored_at_once_beside_a_wal_is_told(self):
        self.crash(self.store(0, 10))
        self.age(-1)
        engine = self.engine()
        self.assertEqual(engine.notes, [])
        engine.close()
        self.crash(self.store(10, 20))
        self.age(10)
        os.utime(self.database)                         # as cp of a copy of the same state does
        note, = self.engine().notes
        self.assertIn("is older than the database and was taken in", note)

    @unittest.skipUnless(POSIX, "kill -9")
    def test_a_change_counter_from_outside_of_the_wal_is_noticed(self):
        self.crash(self.store(0, 5) + "engine.checkpoints.make()\n" + self.store(5, 100))
        for change, words in ((-2, "older"), (+50, "newer")):
            with self.subTest(words):
                data = bytearray(self.database.read_bytes())
                counter = int.from_bytes(data[24:28], "big")
                data[24:28] = (counter + change).to_bytes(4, "big")
                self.database.write_bytes(data)
                self.refused(words)
                data[24:28] = counter.to_bytes(4, "big")
                self.database.write_bytes(data)
        self.assertEqual(self.engine().count(), 100)

    def test_a_crash_while_a_reader_kept_a_checkpoint_from_the_newest_frames_raises_no_alarm(self):
        engine = self.engine()
        for number in range(5):
            write(engine, [stored_event(number)])
        with contextlib.closing(sqlite3.connect(str(self.database), isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM appointment_events").fetchall()
            for number in range(5, 10):
                write(engine, [stored_event(number)])
            busy, frames, moved = engine.writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            self.assertLess(moved, frames)
            crashed = self.folder / "crashed"
            crashed.mkdir()
            for ending in ("", "-shm", "-wal"):
                shutil.copy2(str(self.database) + ending, crashed)
        found = SQLite(str(crashed / "events.db"))
        found.open()
        self.addCleanup(found.close)
        self.assertEqual(found.count(), 10)

    @unittest.skipUnless(POSIX, "kill -9")
    def test_a_crash_at_any_moment_a_copy_of_the_folder_and_new_rights_raise_no_alarm(self):
        code = ("import random, threading\n"
                "engine.checkpoints.loop.seconds, tests.receiver._Checkpoints.BULK = 0.001, {bulk}\n"
                "engine.checkpoints.loop.wake()\n"
                "tests.receiver._Checkpoints.LONG = {long}\n"
                "threading.Timer({after}, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
                "for n in range({at}, 10 ** 6):\n"
                "    tests.write(engine, [tests.stored_event(f'{{n}}-{{m}}') for m in range({size})])\n"
                "    print(n, flush=True)")
        stored, at = 0, 0
        for turn in range(10):
            text = code.format(after=0.02 * (turn % 5) + 0.003 * turn, at=at, bulk=(1, 20, 2000)[turn % 3],
                               long=(5, 8192)[turn % 2], size=(1, 30)[turn % 2])
            out = subprocess.run([sys.executable, "-c", self.CHILD, str(HERE), str(self.database), text],
                                 stdout=subprocess.PIPE, check=False).stdout.split()
            stored += len(out) * (1, 30)[turn % 2]
            at += len(out) + 1
            if turn % 3 == 1:
                copy = self.folder / f"copy{turn}"
                copy.mkdir()
                subprocess.run(f"cp events.db* {copy}", shell=True, check=True, cwd=self.folder)
                self.database = copy / "events.db"
                self.folder = copy
            elif turn % 3 == 2:
                subprocess.run("chmod 660 events.db*", shell=True, check=True, cwd=self.folder)
            if turn % 4 == 3:
                engine = self.engine()
                self.assertGreaterEqual(engine.count(), stored)
                engine.close()
        self.assertGreaterEqual(self.engine().count(), stored)
        self.assertGreater(stored, 0)


class CheckpointTest(EngineTest):

    def frames(self, engine):
        """(frames in the WAL, those of them that are moved) by what -shm says."""
        index = engine.files.index()
        return index.frames, index.moved

    def test_what_is_committed_is_moved_and_the_wal_started_anew(self):
        engine = self.engine()
        for number in range(3):
            write(engine, [stored_event(f"{number}-{at}") for at in range(100)])
            frames, moved = self.frames(engine)
            self.assertEqual((frames > 0, moved), (True, 0))
            engine.checkpoints.make()
            self.assertEqual(self.frames(engine), (frames, frames))
        write(engine, [stored_event("anew")])
        self.assertLess(self.frames(engine)[0], frames)

    def test_a_checkpoint_is_due_when_enough_is_committed_and_comes_by_itself(self):
        engine = self.engine()
        with mock.patch.object(receiver._Checkpoints, "BULK", 10):
            self.assertFalse(engine.checkpoints.are_due())
            write(engine, [stored_event(number, payload="x" * 9000) for number in range(10)])
            until(lambda: self.frames(engine)[1] >= 10, "a checkpoint")
            self.assertFalse(engine.checkpoints.are_due())
            write(engine, [stored_event("rest")])
            until(lambda: self.frames(engine)[0] == self.frames(engine)[1] or not write(
                engine, [stored_event("rest")]), "the rest, moved by the writer")

    def test_nothing_is_moved_beside_a_commit_when_there_is_nothing_to_move(self):
        engine, statements = self.engine(), []
        engine.checkpoints.loop.stop()
        write(engine, [stored_event(1)])
        engine.checkpoints.connection.set_trace_callback(statements.append)
        engine.writer.set_trace_callback(statements.append)
        for _ in range(3):
            engine.checkpoints.make()
        self.assertEqual(statements, ["PRAGMA wal_checkpoint(PASSIVE)"])
        with engine.transaction():
            pass
        engine.checkpoints.make()
        engine.checkpoints._rest_is_due = True
        with engine.transaction():
            pass
        self.assertEqual(statements.count("PRAGMA wal_checkpoint(PASSIVE)"), 1)
        write(engine, [stored_event(2)])
        engine.checkpoints.make()
        self.assertEqual(statements.count("PRAGMA wal_checkpoint(PASSIVE)"), 2)

    def test_a_reader_of_another_program_holds_back_the_wal_and_nobody_turns_round_in_vain(self):
        engine = self.engine()
        write(engine, [stored_event(1)])
        with contextlib.closing(sqlite3.connect(str(self.database), isolation_level=None)) as other:
            other.execute("BEGIN")
            other.execute("SELECT * FROM appointment_events").fetchone()
            with mock.patch.multiple(receiver._Checkpoints, BULK=10, LONG=20):
                engine.checkpoints.loop.stop()
                for number in range(2, 60):
                    write(engine, [stored_event(number, payload="x" * 9000)])
                self.assertTrue(engine.checkpoints.are_due())
                engine.checkpoints.make()
                self.assertFalse(engine.checkpoints.are_due())
                self.assertLess(self.frames(engine)[1], self.frames(engine)[0])
        engine.checkpoints.make()
        frames, moved = self.frames(engine)
        self.assertEqual(frames, moved)

    def test_readers_that_overlap_without_end_do_not_let_the_wal_grow(self):
        engine, stop, largest = self.engine(), threading.Event(), 0
        begun = [threading.Event(), threading.Event()]

        def overlap(own, other):
            while not stop.is_set():
                with engine.readers.reading() as connection:
                    connection.execute("BEGIN")
                    connection.execute("SELECT * FROM appointment_events").fetchone()
                    other.clear()
                    own.set()
                    other.wait(0.01)                    # its snapshot begins before this one ends, if it is let
                    connection.execute("COMMIT")
        threads = [threading.Thread(target=overlap, args=pair, daemon=True) for pair in (begun, begun[::-1])]
        with mock.patch.multiple(receiver._Checkpoints, BULK=20, LONG=100):
            for thread in threads:
                thread.start()
            for number in range(250):
                write(engine, [stored_event(number, payload="x" * 9000)])
                largest = max(largest, self.frames(engine)[0])
            stop.set()
            for thread in threads:
                thread.join(WAIT)
        self.assertLess(largest, 600)                   # of more than 1,000 that were written

    def test_a_touch_is_written_and_changes_nothing(self):
        engine = self.engine()
        write(engine, [stored_event(1)])
        before, frames = rows(self.database, "SELECT * FROM appointment_events"), self.frames(engine)[0]
        probe(engine)
        self.assertGreater(self.frames(engine)[0], frames)
        self.assertEqual(rows(self.database, "SELECT * FROM appointment_events"), before)
        self.assertEqual(rows(self.database, "PRAGMA user_version"), SQLite.DATA_VERSION)


class ScanTest(EngineTest):

    def counted(self, engine, wanted):
        """(ids, how much SQLite had to do for each read, in thousands of its steps, all of it)."""
        ticks, all_ticks, found = [0], [], []
        with engine.readers.reading() as one, engine.readers.reading() as two:
            for connection in (one, two):
                connection.set_progress_handler(lambda: ticks.__setitem__(0, ticks[0] + 1), 1000)
        for events in lists(engine, wanted, 0):
            found += [event.id for event in events]
            all_ticks.append(ticks[0])
            ticks[0] = 0
        return found, max(all_ticks), sum(all_ticks)

    def test_a_filter_that_fits_nothing_looks_at_a_bounded_number_of_rows_in_each_read(self):
        engine = self.engine()
        write(engine, [stored_event(number) for number in range(20000)])
        for wanted in (Filter(patient_id="nobody"), Filter(event_type="none"), Filter(until="1999"),
                       Filter(since="3000")):
            steps = list(lists(engine, wanted, 0))
            self.assertEqual(steps, [[]] * 5)           # of 5,000 each, and one to see that there is no more
            found, most, _ = self.counted(engine, wanted)
            self.assertEqual(found, [])
            self.assertLess(most, 100)

    def test_gaps_between_ids_of_any_size_cost_nothing(self):
        engine = self.engine()
        write(engine, [stored_event(1)])
        write_rows(self.database, "UPDATE sqlite_sequence SET seq = 9000000000000000000")
        write(engine, [stored_event(2, patient_id="PAT-2")])
        steps = list(lists(engine, Filter(patient_id="PAT-2"), 0))
        self.assertEqual([[event.id for event in events] for events in steps], [[9000000000000000001]])

    def test_the_events_of_one_appointment_cost_in_proportion_to_their_number(self):
        engine, costs = self.engine(), []
        for number in (1000, 4000):
            write(engine, [stored_event(number, timestamp=f"{9999 - at}-01-01T00:00:00Z") for at in range(number)])
            found, _, cost = self.counted(engine, Filter(appointment_id=f"APT-{number}"))
            self.assertEqual((len(found), found), (number, sorted(found)))
            costs.append(cost)
        self.assertLess(costs[1], 6 * costs[0] + 20)

    def test_an_appointment_with_more_events_than_are_kept_at_a_time_comes_whole_and_in_order(self):
        engine = self.engine()
        write(engine, [stored_event(at % 2, timestamp=f"{9999 - at}-01-01T00:00:00Z",
                                    patient_id=f"PAT-{at % 3}") for at in range(1000)])
        whole = [event.id for event in read(engine, Filter(), 0, 2000) if event.appointment_id == "APT-1"]
        with mock.patch.multiple(receiver._AppointmentScan, ENTRIES=30, KEPT=70):
            for after, up_to in ((0, None), (100, 900)):
                wanted = [one for one in whole if after < one <= (up_to or 2000)]
                steps = list(lists(engine, Filter(appointment_id="APT-1"), after, up_to))
                self.assertEqual([event.id for events in steps for event in events], wanted)
            found = read(engine, Filter(appointment_id="APT-1", patient_id="PAT-1"), 0, 2000)
            self.assertEqual({event.patient_id for event in found}, {"PAT-1"})
            self.assertEqual(list(lists(engine, Filter(appointment_id="nobody"), 0)), [])

    def test_events_are_counted_while_the_file_is_small(self):
        engine = self.engine()
        self.assertEqual((engine.is_new, engine.count(), engine.last_id()), (True, 0, 0))
        write(engine, [stored_event(number) for number in range(5)])
        write_rows(self.database, "DELETE FROM appointment_events WHERE id = 2")
        self.assertEqual((engine.count(), engine.is_small()), (4, True))
        with mock.patch.object(SQLite, "FULL_CHECK_BYTES", 10):
            self.assertEqual((engine.count(), engine.is_small()), (5, False))
        self.assertFalse(self.engine().is_new)

    def test_one_event_is_read_by_its_id(self):
        engine = self.engine()
        write(engine, [stored_event(1)])
        self.assertEqual(engine.event(1), stored_event(1)._replace(id=1))
        self.assertIsNone(engine.event(2))


class Asked(Submission):
    """A submission that remembers its outcomes, and tells `told` of each: (appointment_id, kind)."""

    def __init__(self, made, arrived=None, lane=None, told=None, digest=None):
        self.event, self.arrived = made, time.monotonic() if arrived is None else arrived
        self.lane, self.digest, self.told = lane, digest, told
        self.outcomes, self.threads = [], []

    def done(self, outcome):
        self.threads.append(threading.current_thread())
        self.outcomes.append(outcome)
        if self.told is not None:
            self.told.append((self.event.appointment_id, outcome.kind))


def asked(*numbers, **options):
    """A submission for each number."""
    return [Asked(stored_event(number), **options) for number in numbers]


def large(number, text="x"):
    """An event whose payload is too large to be compared in a transaction."""
    return stored_event(number, payload=json.dumps({"notes": text * MEGABYTE}))


class StoreTest(EngineTest):

    def store(self, busy_timeout=0.3, started=True, **settings):
        store = Store(SQLite(str(self.database)), busy_timeout, **settings)
        store.open()
        self.addCleanup(store.stop)
        if started:
            store.start()
        return store

    def locked(self):
        """Another program that holds the write lock until it is closed."""
        other = sqlite3.connect(str(self.database), isolation_level=None)
        self.addCleanup(other.close)
        other.execute("BEGIN IMMEDIATE")
        return other

    def transactions(self, store):
        """Counts the transactions of a store from now on."""
        patch = mock.patch.object(store.engine, "transaction", wraps=store.engine.transaction)
        self.addCleanup(patch.stop)
        return patch.start()

    def broken(self, store, error):
        """Every transaction fails with `error` until stop() of what this gives is called."""
        patch = mock.patch.object(store.engine, "transaction", side_effect=error)
        patch.start()
        self.addCleanup(mock.patch.stopall)
        return patch

    def fails_in_turn(self, store, *errors):
        """The next transactions raise these, one each; None is one that works, as all do afterwards."""
        left, transaction = list(errors), store.engine.transaction

        def next_one(wait):
            error = left.pop(0) if left else None
            if error is not None:
                raise error
            return transaction(wait)
        patch = mock.patch.object(store.engine, "transaction", next_one)
        patch.start()
        self.addCleanup(patch.stop)

    def all_quick(self):
        """However busy this machine is, no commit counts as slow."""
        patch = mock.patch.object(receiver, "SLOW_COMMIT", WAIT)
        patch.start()
        self.addCleanup(patch.stop)

    def blocked(self, store):
        """The writer at work until the event that this gives is set."""
        begun, go_on = threading.Event(), threading.Event()
        thread = threading.Thread(target=store.do, args=(lambda session: (begun.set(), go_on.wait(WAIT)),))
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(go_on.set)
        self.assertTrue(begun.wait(WAIT))
        return go_on

    # -- the queue

    def test_all_that_wait_are_committed_at_once_and_told_in_order(self):
        store, told = self.store(started=False), []
        for number in range(100):
            one = Asked(stored_event(number))
            one.done = lambda outcome: told.append((outcome.event_id, rows(self.database)))
            store.submit(one)
        transactions = self.transactions(store)
        store.start()
        store.settle()
        self.assertEqual(told, [(number, 100) for number in range(1, 101)])
        self.assertEqual(transactions.call_count, 1)

    def test_a_group_has_at_most_512_events(self):
        store, group = self.store(started=False), asked(*range(1100))
        for one in group:
            store.submit(one)
        transactions = self.transactions(store)
        store.start()
        store.settle()
        self.assertEqual([one.outcomes for one in group], [[Outcome("stored", at)] for at in range(1, 1101)])
        self.assertEqual(transactions.call_count, 3)

    def test_add_waits_for_its_own_outcome(self):
        store = self.store()
        self.assertEqual(store.add(stored_event(1)), Outcome("stored", 1))
        self.assertEqual(store.add(stored_event(1)), Outcome("duplicate", 1, True))
        self.assertEqual(store.add(stored_event(2, patient_id=None)).kind, "failed")
        self.assertEqual(store.add(stored_event(2)).kind, "stored")

    def test_one_key_from_16_threads_is_stored_once(self):
        store, outcomes = self.store(), []

        def add():
            for number in range(20):
                outcomes.append(store.add(stored_event(number)))
        threads = [threading.Thread(target=add) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = [outcome.kind for outcome in outcomes]
        self.assertEqual((found.count("stored"), found.count("duplicate")), (20, 300))
        self.assertEqual(rows(self.database), 20)

    def test_settle_writes_nothing(self):
        store = self.store()
        transactions = self.transactions(store)
        store.settle()
        self.assertEqual(transactions.call_count, 0)

    def test_on_stored_follows_the_commit_in_order_and_only_for_what_is_new(self):
        heard = []
        store = self.store(on_stored=heard.append)
        outcomes = [store.add(stored_event(number)) for number in (1, 2, 1, 3)]
        store.lead(asked(4, 3, 5))
        self.assertEqual([(one.id, one.appointment_id) for one in heard][:3],
                         [(1, "APT-1"), (2, "APT-2"), (outcomes[3].event_id, "APT-3")])
        self.assertEqual([one.appointment_id for one in heard][3:], ["APT-4", "APT-5"])

    def test_on_stored_has_the_order_of_the_commits_whoever_makes_them(self):
        heard, led = [], itertools.count(1000)
        store = self.store(on_stored=lambda event: heard.append(event.id))
        adding = [threading.Thread(target=lambda base=base: [store.add(stored_event(base + number))
                                                              for number in range(50)]) for base in (0, 50)]
        for thread in adding:
            thread.start()
        while any(thread.is_alive() for thread in adding):
            store.lead(asked(next(led), next(led)))
        store.settle()
        self.assertEqual(heard, sorted(heard))
        self.assertEqual(len(heard), rows(self.database))

    def test_no_commit_overtakes_an_on_stored_that_takes_its_time(self):
        begun, go_on, heard = threading.Event(), threading.Event(), []
        self.addCleanup(go_on.set)
        store = self.store(WAIT, on_stored=lambda event: (begun.set(), go_on.wait(WAIT), heard.append(event.id)))
        leading = threading.Thread(target=store.lead, args=(asked(1),))
        leading.start()
        self.assertTrue(begun.wait(WAIT))
        store.submit(*asked(2))
        until(lambda: store._committer._turns._next.locked() or rows(self.database) == 2, "the writer")
        self.assertEqual(rows(self.database), 1)
        go_on.set()
        leading.join(WAIT)
        until(lambda: heard == [1, 2])

    # -- leading

    def test_who_leads_commits_once_and_tells_each_in_order_before_going_on(self):
        store, told = self.store(), []
        transactions = self.transactions(store)
        group = asked(1, 2, 1, 3, told=told)
        store.lead(group)
        self.assertEqual(told, [("APT-1", "stored"), ("APT-2", "stored"), ("APT-1", "duplicate"), ("APT-3", "stored")])
        self.assertEqual({thread for one in group for thread in one.threads}, {threading.current_thread()})
        self.assertEqual(transactions.call_count, 1)

    def test_who_leads_makes_several_groups_of_very_many(self):
        store, group = self.store(), asked(*range(600))
        self.all_quick()
        transactions = self.transactions(store)
        store.lead(group)
        self.assertEqual([one.outcomes for one in group], [[Outcome("stored", at)] for at in range(1, 601)])
        self.assertEqual(transactions.call_count, 2)

    def test_who_meets_a_lock_in_the_midst_hands_over_only_the_rest(self):
        self.all_quick()
        store, told = self.store(WAIT), []
        self.fails_in_turn(store, None, StoreLocked("locked"), StoreLocked("locked"))
        store.lead(asked(*range(1600), told=told))
        self.assertLessEqual(512, len(told))
        until(lambda: len(told) == 1600)
        self.assertEqual(told, [(f"APT-{number}", "stored") for number in range(1600)])

    def led_by_caller(self, store, number):
        """Whether a group is committed by who leads it (or, False, by the writer)."""
        one, = asked(number)
        store.lead([one])
        until(lambda: one.outcomes)
        self.assertEqual(one.outcomes[0].kind, "stored")
        return one.threads == [threading.current_thread()]

    def test_a_locked_database_is_left_to_the_writer_until_it_is_quick_again(self):
        self.all_quick()
        store, told = self.store(WAIT), []
        self.assertTrue(self.led_by_caller(store, 0))
        other = self.locked()
        store.lead(asked(1, 2, 3, told=told))
        tries, transaction = [], store.engine.transaction

        def noted(wait):
            tries.append(threading.current_thread())
            return transaction(wait)
        patch = mock.patch.object(store.engine, "transaction", noted)
        patch.start()
        self.addCleanup(patch.stop)
        store.lead(asked(4, 5, told=told))              # no further try of its own
        self.assertNotIn(threading.current_thread(), tries)
        store.submit(*asked(6, told=told))
        store.lead(asked(7, told=told))
        self.assertEqual(told, [])
        other.close()
        until(lambda: len(told) == 7)
        self.assertEqual(told, [(f"APT-{number}", "stored") for number in range(1, 8)])
        self.assertEqual(rows(self.database, "SELECT group_concat(appointment_id) FROM appointment_events"),
                         ",".join(f"APT-{number}" for number in range(8)))
        self.assertTrue(self.led_by_caller(store, 8))

    def test_a_slow_disk_is_left_to_the_writer_until_it_is_quick_again(self):
        store = self.store()
        with mock.patch.object(receiver, "SLOW_COMMIT", -1):
            self.assertTrue(self.led_by_caller(store, 1))
            self.assertFalse(self.led_by_caller(store, 2))
            self.assertFalse(self.led_by_caller(store, 3))
        self.all_quick()
        self.assertFalse(self.led_by_caller(store, 4))
        self.assertTrue(self.led_by_caller(store, 5))

    def test_who_leads_waits_a_moment_for_its_turn_and_else_goes_on_reading(self):
        self.all_quick()
        store, told = self.store(), []
        go_on = self.blocked(store)
        for number in range(1, 4):
            store.lead(asked(number, told=told))
        self.assertEqual(told, [])
        go_on.set()
        until(lambda: len(told) == 3)
        self.assertEqual(told, [(f"APT-{number}", "stored") for number in range(1, 4)])
        self.assertTrue(self.led_by_caller(store, 4))

    def test_what_breaks_for_who_leads_is_told_by_the_writer(self):
        self.all_quick()
        troubles = []
        store, group = self.store(on_trouble=troubles.append), asked(1, 2)
        broken = self.broken(store, StoreUnavailable("the disk is full"))
        store.lead(group)
        until(lambda: group[-1].outcomes)
        self.assertEqual([str(one.outcomes[0].error) for one in group], ["the disk is full"] * 2)
        self.assertNotIn(threading.current_thread(), group[0].threads)
        broken.stop()
        self.assertFalse(self.led_by_caller(store, 3))
        self.assertTrue(self.led_by_caller(store, 4))
        self.assertEqual(troubles, ["the disk is full", ""])

    def test_works_get_their_turn_between_groups_that_are_led_without_pause(self):
        store, numbers, ended = self.store(), itertools.count(), threading.Event()

        def lead():
            while not ended.is_set():
                store.lead(asked(next(numbers)))
        leading = threading.Thread(target=lead)
        leading.start()
        try:
            for number in range(50):
                self.assertEqual(store.do(lambda session, number=number: number), number)
        finally:
            ended.set()
            leading.join()

    # -- locks

    def test_a_short_lock_of_another_program_is_waited_for_and_is_no_trouble(self):
        troubles = []
        store, other = self.store(WAIT, started=False, on_trouble=troubles.append), self.locked()
        one, = asked(1)
        store.submit(one)
        transactions = self.transactions(store)
        store.start()
        until(lambda: transactions.call_count > 1, "a second try")
        other.close()
        self.assertEqual(until(lambda: one.outcomes), [Outcome("stored", 1)])
        self.assertEqual(troubles, [])

    def test_a_long_lock_fails_after_the_busy_timeout_and_service_comes_back(self):
        troubles = []
        store, other = self.store(0.2, on_trouble=troubles.append), self.locked()
        outcome = store.add(stored_event(1))
        self.assertEqual(outcome.kind, "failed")
        self.assertIsInstance(outcome.error, StoreLocked)
        self.assertIn("locked", store.health(WAIT))
        other.close()
        self.assertEqual(store.add(stored_event(1)), Outcome("stored", 1))
        until(lambda: store.health() == "")
        self.assertEqual([bool(trouble) for trouble in troubles], [True, False])

    def test_under_a_lock_only_those_who_waited_long_enough_are_failed(self):
        store, other = self.store(WAIT, started=False), self.locked()
        now = time.monotonic()
        old, new = Asked(stored_event(1), now - WAIT - 1), Asked(stored_event(2), now)
        store.submit(old)
        store.submit(new)
        transactions = self.transactions(store)
        store.start()
        self.assertIsInstance(until(lambda: old.outcomes)[0].error, StoreLocked)
        tries = transactions.call_count
        until(lambda: transactions.call_count > tries + 2)
        self.assertEqual(new.outcomes, [])
        other.close()
        self.assertEqual(until(lambda: new.outcomes), [Outcome("stored", 1)])

    def test_the_busy_timeout_may_be_long_and_counts_from_when_the_event_was_ready(self):
        for waited, kind in ((100, "stored"), (121, "failed")):
            with self.subTest(waited):
                store, other = self.store(120, started=False), self.locked()
                one = Asked(stored_event(waited), time.monotonic() - waited)
                store.submit(one)
                transactions = self.transactions(store)
                store.start()
                until(lambda: one.outcomes or transactions.call_count > 5)
                other.close()
                self.assertEqual(until(lambda: one.outcomes)[0].kind, kind)

    def test_a_group_that_met_a_lock_keeps_its_order_however_often_it_is_tried(self):
        store, other, told = self.store(WAIT), self.locked(), []
        transactions = self.transactions(store)
        for number in range(12):
            tries = transactions.call_count
            store.submit(*asked(number, told=told))
            until(lambda: transactions.call_count > tries)
        other.close()
        until(lambda: len(told) == 12)
        names = [f"APT-{number}" for number in range(12)]
        self.assertEqual([name for name, _ in told], names)
        self.assertEqual([name for name, in rows(self.database, "SELECT appointment_id FROM appointment_events "
                                                                "ORDER BY id")], names)
        self.assertEqual(store._pause, receiver.LOCK_STEPS[0], "the next lock finds short sleeps again")

    def test_no_lock_of_ours_is_held_between_two_tries(self):
        store, other = self.store(WAIT), self.locked()
        one, = asked(1)
        with mock.patch.object(receiver, "LOCK_STEPS", (WAIT, WAIT)):
            store._pause = WAIT                         # the writer sleeps as long as the test may take
            transactions = self.transactions(store)
            store.submit(one)
            until(lambda: transactions.call_count)
            other.close()
            store._committer.quick = True
            until(lambda: store.lead(asked(2)) or rows(self.database) == 1)
        self.assertEqual(one.outcomes, [])
        store._stopped = True                           # nobody waits for that sleep
        store.engine.close()

    # -- callbacks

    def test_an_answer_that_raises_costs_its_neighbours_nothing(self):
        for lead in (True, False):
            for error in (ValueError("a bug"), SystemExit(1)):
                with self.subTest(lead=lead, error=error):
                    told = []
                    store = self.store(on_error=told.append)
                    group = asked(*(f"{lead}-{error}-{number}" for number in range(3)))
                    group[1].done = mock.Mock(side_effect=error)
                    if lead:
                        store.lead(group)
                    else:
                        for one in group:
                            store.submit(one)
                    store.settle()
                    self.assertEqual([one.outcomes[0].kind for one in group[::2]], ["stored", "stored"])
                    self.assertEqual((told, group[1].done.call_count), (["done"], 1))
                    self.assertEqual(store.add(stored_event(f"{lead}-{error}")).kind, "stored")

    def test_callbacks_that_raise_stop_nobody(self):
        told = []
        store = self.store(0, on_stored=mock.Mock(side_effect=SystemExit(1)), on_error=told.append,
                           on_trouble=mock.Mock(side_effect=ValueError("a bug")))
        other = self.locked()
        self.assertEqual(store.add(stored_event(1)).kind, "failed")
        other.close()
        self.assertEqual(store.add(stored_event(1)), Outcome("stored", 1))
        store.lead(asked(2))
        store.settle()
        self.assertEqual(sorted(told), ["on_stored", "on_stored", "on_trouble", "on_trouble"])

    def test_whatever_breaks_nobody_waits_for_ever(self):
        for error in (StoreUnavailable("disk I/O error"), MemoryError(), RuntimeError("a bug")):
            with self.subTest(repr(error)):
                store = self.store()
                broken = self.broken(store, error)
                self.assertEqual(store.add(stored_event(repr(error))), Outcome("failed", error=error))
                with self.assertRaises(type(error)):
                    store.do(lambda session: None)
                self.assertIn(str(error), store.health(WAIT))
                broken.stop()
                self.assertEqual(store.add(stored_event(repr(error))).kind, "stored")

    # -- works

    def test_a_work_gives_its_result_once_it_is_on_disk(self):
        store = self.store()

        def work(session):
            session.execute("UPDATE appointment_events SET notes = ? WHERE id = ?", ("changed", 1))
            return "result"
        store.add(stored_event(1))
        self.assertEqual(store.do(work), "result")
        self.assertEqual(rows(self.database, "SELECT notes FROM appointment_events"), "changed")

    def test_works_and_events_keep_their_order_in_one_transaction(self):
        store, seen = self.store(started=False), []

        def count(session):
            seen.append(session.execute("SELECT count(*) FROM appointment_events").fetchone()[0])
        group = asked(1, 2, 3)
        group[1:1] = [receiver._Waiting(work=count), receiver._Waiting()]
        group.append(receiver._Waiting(work=count))
        for one in group:
            store.submit(one)
        transactions = self.transactions(store)
        store.start()
        group[-1].wait()
        self.assertEqual((seen, transactions.call_count, rows(self.database)), ([1, 3], 1, 3))

    def test_a_work_that_fails_leaves_nothing_behind_and_hurts_no_neighbour(self):
        def fail(session):
            session.execute("DELETE FROM appointment_events")
            raise ZeroDivisionError("of the work")

        def roll_back(session):
            session.execute("DELETE FROM appointment_events")
            session.execute("ROLLBACK")

        def exit(session):
            sys.exit(3)
        for number, (work, error) in enumerate(((fail, ZeroDivisionError), (roll_back, Exception),
                                                (exit, SystemExit))):
            with self.subTest(work.__name__):
                store, group = self.store(started=False), asked(*range(10 * number, 10 * number + 4))
                bad = receiver._Waiting(work=work)
                for one in group[:2] + [bad] + group[2:]:
                    store.submit(one)
                good = receiver._Waiting(work=lambda session: "good")
                store.submit(good)
                store.start()
                self.assertEqual((good.wait().kind, good.result), ("done", "good"))
                self.assertIsInstance(bad.wait().error, error)
                self.assertEqual([one.outcomes[0].kind for one in group], ["stored"] * 4)
                with self.assertRaises(error):
                    store.do(work)
                self.assertEqual(rows(self.database), 4 * number + 4)

    def test_a_lock_met_while_a_group_is_taken_apart_keeps_the_order(self):
        store, told = self.store(WAIT, started=False), []
        self.fails_in_turn(store, StoreUnavailable("the work's"), StoreLocked("locked"), StoreLocked("locked"))
        work = receiver._Waiting(work=lambda session: told.append("work"))
        first, last = asked(1, 2, lane="a", told=told)
        for one in (first, work, last):
            store.submit(one)
        store.start()
        store.settle()
        self.assertEqual(told, ["work", ("APT-1", "stored"), ("APT-2", "stored")])

    def test_works_wait_for_a_lock_as_events_do(self):
        store, other = self.store(0.2), self.locked()
        with self.assertRaises(StoreLocked):
            store.do(lambda session: None)
        other.close()
        self.assertEqual(store.do(lambda session: 1), 1)

    # -- large contents

    def test_large_contents_are_compared_after_the_commit_and_conflicts_kept(self):
        store = self.store()
        self.assertEqual(store.add(large(1)), Outcome("stored", 1))
        same = large(1)._replace(payload=large(1).payload.replace(": ", ":   "))
        self.assertEqual(store.add(same), Outcome("duplicate", 1, True))
        self.assertEqual(rows(self.database, "SELECT count(*) FROM conflicting_events"), 0)
        self.assertEqual(store.add(large(1, "y")), Outcome("duplicate", 1, False))
        self.assertEqual(rows(self.database, "SELECT event_id, payload FROM conflicting_events"),
                         [(1, large(1, "y").payload)])

    def test_the_stored_digest_is_made_once_and_the_senders_own_is_taken(self):
        with mock.patch.object(SQLite, "digest", return_value=b"stored") as stored:
            store = self.store()
            store.add(large(1))
            with mock.patch.object(receiver, "content_digest", return_value=b"other") as made:
                for text, digest, identical in (("y", b"stored", True), ("z", b"other", False), ("y", None, False)):
                    self.assertEqual(store.add(large(1, text), digest), Outcome("duplicate", 1, identical))
        self.assertEqual((stored.call_count, made.call_count), (1, 1))

    def comparing(self, store):
        """(an event that is set once a comparison has begun, one to be set so that it ends)"""
        begun, go_on, digest = threading.Event(), threading.Event(), receiver.content_digest
        self.addCleanup(go_on.set)

        def slow(payload):
            begun.set()
            go_on.wait(WAIT)
            return digest(payload)
        patch = mock.patch.object(receiver, "content_digest", slow)
        patch.start()
        self.addCleanup(patch.stop)
        return begun, go_on

    def test_nobody_waits_for_a_comparison_but_its_own_lane_which_keeps_its_order(self):
        self.all_quick()
        for lead in (True, False):
            with self.subTest(lead=lead):
                store, told, other = self.store(), [], []
                store.add(large(f"{lead}-0"))
                begun, go_on = self.comparing(store)
                lane = [Asked(large(f"{lead}-0", text), lane="a", told=told) for text in ("x ", "y")]
                lane[1:1] = asked(f"{lead}-1", lane="a", told=told)
                lane += asked(f"{lead}-2", f"{lead}-1", lane="a", told=told)
                if lead:
                    store.lead(lane[:2])
                else:
                    store.submit(lane[0])
                    store.submit(lane[1])
                for one in lane[2:]:
                    store.submit(one)
                self.assertTrue(begun.wait(WAIT))
                neighbours = asked(f"{lead}-3", lane="b", told=other) + asked(f"{lead}-4", told=other)
                store.lead(neighbours[:1])
                store.submit(neighbours[1])
                until(lambda: len(other) == 2)
                self.assertEqual(store.add(stored_event(f"{lead}-5")).kind, "stored")
                self.assertEqual(told, [])
                go_on.set()
                until(lambda: len(told) == 5)
                self.assertEqual(told, [(one.event.appointment_id, one.outcomes[0].kind) for one in lane])
                self.assertEqual([one.outcomes[0].kind for one in lane],
                                 ["duplicate", "stored", "duplicate", "stored", "duplicate"])
                mock.patch.stopall()
                self.assertEqual(until(lambda: not store._lanes._held), True)

    def test_each_of_several_large_contents_in_one_lane_is_compared_and_kept(self):
        store = self.store()
        store.add(large(1))
        begun, go_on = self.comparing(store)
        lane = [Asked(large(1, text), lane="a") for text in "yz"]
        for one in lane:
            store.submit(one)
        self.assertTrue(begun.wait(WAIT))
        store.add(stored_event(2))                      # so the second one is behind the first
        go_on.set()
        store.settle()
        until(lambda: lane[1].outcomes)
        self.assertEqual([one.outcomes for one in lane], [[Outcome("duplicate", 1, False)]] * 2)
        self.assertEqual(rows(self.database, "SELECT count(*) FROM conflicting_events"), 2)

    def test_settle_waits_for_comparisons_and_for_all_behind_them(self):
        store, told = self.store(), []
        store.add(large(1))
        begun, go_on = self.comparing(store)
        store.submit(Asked(large(1, "y"), lane="a", told=told))
        store.submit(*asked(2, lane="a", told=told))
        self.assertTrue(begun.wait(WAIT))
        settled = threading.Thread(target=store.settle)
        settled.start()
        store.add(stored_event(3))
        self.assertEqual((told, settled.is_alive()), ([], True))
        go_on.set()
        settled.join(WAIT)
        self.assertEqual((told, settled.is_alive()), ([("APT-1", "duplicate"), ("APT-2", "stored")], False))

    def test_settle_waits_for_what_is_led(self):
        store, begun, go_on, told = self.store(), threading.Event(), threading.Event(), []
        first, last = asked(1), asked(2, told=told)
        first[0].done = lambda outcome: (begun.set(), go_on.wait(WAIT))
        leading = threading.Thread(target=store.lead, args=(first + last,))
        leading.start()
        self.assertTrue(begun.wait(WAIT))
        settled = threading.Thread(target=lambda: (store.settle(), told.append("settled")))
        settled.start()
        store.add(stored_event(3))
        go_on.set()
        settled.join(WAIT)
        leading.join(WAIT)
        self.assertEqual(told, [("APT-2", "stored"), "settled"])

    def test_a_conflict_that_could_not_be_compared_or_kept_is_no_409(self):
        with mock.patch.object(SQLite, "digest", side_effect=StoreUnavailable("gone")):
            store = self.store()
            store.add(large(1))
            self.assertEqual(str(store.add(large(1, "y")).error), "gone")
        store = self.store()
        session = type(store.do(lambda session: session))
        with mock.patch.object(session, "keep_conflict", side_effect=ValueError("a bug")):
            outcome = store.add(large(1, "y"))
        self.assertEqual((outcome.kind, str(outcome.error)), ("failed", "a bug"))
        self.assertEqual(store.add(large(1, "y")), Outcome("duplicate", 1, False))
        self.assertEqual(rows(self.database, "SELECT count(*) FROM conflicting_events"), 1)

    # -- health

    def test_health_is_asked_of_the_writer_which_really_writes(self):
        store, now = self.store(), FakeClock()
        store._checkup = receiver.Checkup("probe", store._probe, now)
        with contextlib.closing(sqlite3.connect(str(self.database))) as other:
            def version():
                return other.execute("PRAGMA data_version").fetchone()[0]
            before, tables = version(), rows(self.database, "SELECT count(*) FROM sqlite_master")
            self.assertEqual(store.health(WAIT), "")
            self.assertNotEqual(version(), before)
            before = version()
            for _ in range(10):                         # at most once a second
                self.assertEqual(store.health(WAIT), "")
            self.assertEqual(version(), before)
            now.time += 1.1
            self.assertEqual(store.health(WAIT), "")
            self.assertNotEqual(version(), before)
        self.assertEqual(rows(self.database, "SELECT count(*) FROM sqlite_master"), tables)
        self.assertEqual(rows(self.database, "PRAGMA user_version"), SQLite.DATA_VERSION)

    def test_health_sees_a_database_that_takes_no_writes(self):
        store = self.store()
        store.do(lambda session: session.execute("PRAGMA query_only = 1"))
        self.assertIn("readonly", store.health(WAIT))

    def test_health_is_red_as_long_as_an_event_could_not_be_stored_whatever_else_works(self):
        troubles = []
        store = self.store(on_trouble=troubles.append)
        for breaks, mends, words in (
                ("ALTER TABLE appointment_events RENAME TO gone", "ALTER TABLE gone RENAME TO appointment_events",
                 "no such table"),
                ("CREATE TRIGGER t BEFORE INSERT ON appointment_events BEGIN SELECT RAISE(ABORT, 'no'); END",
                 "DROP TRIGGER t", "no"),
                ("CREATE TRIGGER t BEFORE INSERT ON appointment_events BEGIN SELECT RAISE(IGNORE); END",
                 "DROP TRIGGER t", "no event would be stored")):
            with self.subTest(words):
                write_rows(self.database, breaks)
                self.assertEqual(store.add(stored_event(words)).kind, "failed")
                store._checkup = receiver.Checkup("probe", store._probe)
                self.assertIn(words, store.health(WAIT))
                self.assertNotIn("", troubles)
                write_rows(self.database, mends)
                self.assertEqual(store.add(stored_event(words)).kind, "stored")
                troubles.clear()

    def test_what_everybody_may_ask_for_holds_no_advice_for_operators(self):
        store = self.store()
        self.broken(store, StoreUnavailable("advice", "disk I/O error"))
        for number in range(12):                        # in the end by an open breaker
            self.assertEqual(store.add(stored_event(number)).error.public, "disk I/O error")
            store._checkup = receiver.Checkup("probe", store._probe)
            self.assertEqual(store.health(WAIT), "disk I/O error")

    def test_health_never_waits_for_a_writer_that_hangs_and_says_for_how_long(self):
        store, now = self.store(5), FakeClock()
        store._checkup = receiver.Checkup("probe", store._probe, now)
        self.assertEqual(store.health(WAIT), "")
        go_on = self.blocked(store)
        for late, expected in ((2, ""), (5.9, ""), (0.2, "the writer has not answered for 6 s"),
                               (60, "the writer has not answered for 66 s")):
            now.time += late
            self.assertEqual(store.health(0), expected)
        go_on.set()
        self.assertEqual(store.health(WAIT), "")

    def test_health_knows_of_trouble_before_any_probe_has_met_it(self):
        store = self.store(0)
        self.assertEqual(store.health(WAIT), "")
        self.locked()
        self.assertEqual(store.add(stored_event(1)).kind, "failed")
        self.assertIn("locked", store.health(0))        # less than a second after the probe

    def test_health_answers_when_there_are_no_threads_left(self):
        store = self.store()
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("no threads")):
            self.assertEqual(store.health(), "no threads")

    # -- the breaker

    def opened(self, **settings):
        """(a store whose breaker is open, the breaker's clock, what makes it work again)"""
        store, now = self.store(**settings), FakeClock()
        store._breaker = receiver.Breaker(now)
        broken = self.broken(store, StoreUnavailable("the disk is full"))
        for number in range(5):
            self.assertEqual(str(store.add(stored_event(number)).error), "the disk is full")
        until(lambda: store._refusal)
        return store, now, broken

    def test_five_failures_open_the_breaker_and_a_try_of_its_own_closes_it(self):
        self.all_quick()
        troubles = []
        store, now, broken = self.opened(on_trouble=troubles.append)
        self.assertEqual(store.health(WAIT), "the disk is full")
        tries = self.transactions(store)
        for number in range(3):                         # at once, on the thread that asks
            one, = asked(number)
            (store.lead if number else lambda group: store.submit(*group))([one])
            self.assertIn("breaker open", str(one.outcomes[0].error))
            self.assertEqual(one.outcomes[0].error.public, "the disk is full")
            self.assertEqual(one.threads, [threading.current_thread()])
        with self.assertRaises(StoreUnavailable):
            store.do(lambda session: None)
        self.assertEqual(tries.call_count, 0)
        now.time += 1.01
        until(lambda: tries.call_count == 1)
        until(lambda: store._breaker.state == "open")
        broken.stop()
        tries = self.transactions(store)
        now.time += 1.9
        store.settle()
        self.assertEqual((tries.call_count, store.add(stored_event(1)).kind), (0, "failed"))
        now.time += 0.2
        until(lambda: not store._refusal)
        self.assertEqual((tries.call_count, rows(self.database)), (1, 0))
        self.assertEqual(store.add(stored_event(1)), Outcome("stored", 1))
        self.assertTrue(self.led_by_caller(store, 2))
        until(lambda: troubles[-1] == "")
        self.assertEqual([text.count("the disk is full") + 2 * text.count("breaker open") for text in troubles],
                         [1, 3, 0])
        until(lambda: store.health() == "")

    def test_only_failures_in_a_row_open_the_breaker_also_after_it_has_closed(self):
        store, now, broken = self.opened()
        broken.stop()
        now.time += 1.01
        until(lambda: not store._refusal)
        for number in range(3):
            broken = self.broken(store, StoreUnavailable("the disk is full"))
            for _ in range(4):
                self.assertEqual(str(store.add(stored_event(number)).error), "the disk is full")
            broken.stop()
            self.assertEqual(store.add(stored_event(number)).kind, "stored")

    def test_nothing_waits_while_the_breaker_tries_and_the_disk_hangs(self):
        store, now, broken = self.opened()
        broken.stop()
        begun, go_on, transaction = threading.Event(), threading.Event(), store.engine.transaction
        self.addCleanup(go_on.set)

        def hanging(wait):
            begun.set()
            go_on.wait(WAIT)
            return transaction(wait)
        with mock.patch.object(store.engine, "transaction", hanging):
            now.time += 1.01
            self.assertTrue(begun.wait(WAIT))
            self.assertEqual((store.add(stored_event(1)).kind, store._breaker.state), ("failed", "half-open"))
            store.settle()
            go_on.set()
        until(lambda: not store._refusal)
        self.assertEqual(store.add(stored_event(1)).kind, "stored")

    def test_what_is_queued_when_the_breaker_opens_is_told_before_what_comes_then(self):
        store, told = self.store(started=False), []
        self.broken(store, StoreUnavailable("the disk is full"))
        for number in range(3000):                      # six groups: the fifth opens it
            store.submit(*asked(number, told=told))
        store.start()
        until(lambda: store._refusal)
        for number in (3000, 3001):
            store.submit(*asked(number, told=told))
        self.assertEqual(told, [(f"APT-{number}", "failed") for number in range(3002)])

    def test_one_lock_counts_once_however_many_events_it_fails(self):
        store, other = self.store(0), self.locked()
        for number in range(12):
            self.assertIsInstance(store.add(stored_event(number)).error, StoreLocked)
        self.assertEqual(store._breaker.state, "closed")
        other.close()
        self.assertEqual(store.add(stored_event(1)), Outcome("stored", 1))

    def test_a_lock_that_lasts_for_five_busy_timeouts_opens_the_breaker(self):
        with mock.patch.object(receiver, "LOCK_COUNTS", 0):
            store, other, now = self.store(0), self.locked(), FakeClock()
            store._breaker = receiver.Breaker(now)
            for number in range(5):
                self.assertIsInstance(store.add(stored_event(number)).error, StoreLocked)
            until(lambda: store._refusal)
            other.close()
            now.time += 1.01
            until(lambda: not store._refusal)
            self.assertEqual(store.add(stored_event(1)), Outcome("stored", 1))

    def test_who_has_not_waited_long_when_a_lock_opens_the_breaker_is_refused_with_the_others_in_order(self):
        with mock.patch.object(receiver, "LOCK_COUNTS", 0):
            told = []
            store = self.store(WAIT, started=False,
                               on_trouble=lambda text: told or store.submit(*asked(3, told=told)))
            store._breaker, other = receiver.Breaker(FakeClock()), self.locked()
            for _ in range(4):
                store._breaker.failed()
            store.submit(*asked(1, arrived=time.monotonic() - WAIT - 1, told=told))
            store.submit(*asked(2, told=told))
            store.start()
            until(lambda: len(told) == 3)
            self.assertEqual(told, [(f"APT-{number}", "failed") for number in (1, 2, 3)])
            other.close()

    def test_a_try_whose_rehearsal_fails_does_not_close_the_breaker(self):
        store, now, broken = self.opened()
        write_rows(self.database, "CREATE TRIGGER t BEFORE INSERT ON appointment_events BEGIN SELECT missing; END")
        broken.stop()
        tries = self.transactions(store)
        now.time += 1.01
        until(lambda: tries.call_count)
        until(lambda: store._breaker.state != "half-open")
        self.assertEqual((store._breaker.state, store.add(stored_event(1)).kind), ("open", "failed"))

    # -- trouble with the files that nobody's event meets

    def test_trouble_that_comes_to_light_once_senders_have_their_answers_is_told_at_once(self):
        self.all_quick()
        troubles = []
        store = self.store(on_trouble=troubles.append)
        one, = asked(1)
        one.done = lambda outcome: os.rename(self.folder / "events.db-wal", self.folder / "away")
        store.lead([one])
        self.assertIn("events.db-wal was moved", until(lambda: troubles)[0])

    def test_trouble_that_only_the_stop_meets_is_told_once(self):
        for failures, told in ((0, 1), (1, 1), (5, 2)):         # the breaker that opens is told besides
            with self.subTest(failures=failures):
                troubles = []
                store = self.store(on_trouble=troubles.append)
                store.engine.checkpoints.loop.stop()
                self.database.unlink()
                for _ in range(failures):
                    self.assertEqual(store.add(stored_event(1)).kind, "failed")
                until(lambda: failures < 5 or store._refusal)
                store.stop()
                self.assertEqual(len(troubles), told)
                self.assertIn(f"was deleted or replaced while it is in use; all that was stored is in {self.database}",
                              troubles[0])
                for path in self.folder.iterdir():
                    path.unlink()

    # -- the end

    def test_a_stop_commits_all_that_was_submitted_and_closes_the_engine_once(self):
        store, group = self.store(started=False), asked(*range(700))
        for one in group:
            store.submit(one)
        store.start()
        with mock.patch.object(store.engine, "close", wraps=store.engine.close) as close:
            store.stop()
            store.stop()
        self.assertEqual((rows(self.database), close.call_count), (700, 1))
        self.assertEqual({len(one.outcomes) for one in group}, {1})
        self.assertFalse([thread for thread in threading.enumerate()
                          if thread.name in ("webhook-writer", "webhook-compare")])

    def test_what_comes_after_the_stop_fails_at_once(self):
        for started in (True, False):
            with self.subTest(started=started):
                store, early = self.store(started=False), asked(1)[0]
                store.submit(early)
                if started:
                    store.start()
                store.stop()
                self.assertEqual(early.outcomes[0].kind, "stored" if started else "failed")
                late = asked(2, 3)
                store.lead(late[:1])
                store.submit(late[1])
                self.assertEqual({str(one.outcomes[0].error) for one in late}, {"the store has stopped"})
                self.assertEqual(store.health(WAIT), "the store has stopped")
                store.settle()

    def test_a_stop_waits_for_what_is_being_compared(self):
        store = self.store()
        store.add(large(1))
        begun, go_on = self.comparing(store)
        one = Asked(large(1, "y"))
        store.submit(one)
        self.assertTrue(begun.wait(WAIT))
        stopping = threading.Thread(target=store.stop)
        stopping.start()
        go_on.set()
        stopping.join(WAIT)
        self.assertEqual(one.outcomes, [Outcome("duplicate", 1, False)])
        self.assertEqual(rows(self.database, "SELECT count(*) FROM conflicting_events"), 1)

    def test_who_had_looked_up_submit_before_the_stop_is_told_too(self):
        store = self.store()
        submit, (one,) = store.submit, asked(1)
        store.stop()
        submit(one)
        self.assertEqual([outcome.kind for outcome in one.outcomes], ["failed"])

    def test_a_stop_tells_what_a_lock_keeps_waiting_and_ends_an_open_breaker_at_once(self):
        store, other = self.store(1e6), self.locked()
        one, = asked(1)
        store.submit(one)
        stopping = threading.Thread(target=store.stop, daemon=True)
        stopping.start()
        stopping.join(WAIT)
        self.assertFalse(stopping.is_alive())
        self.assertIsInstance(one.outcomes[0].error, StoreLocked)
        other.close()
        store, now, broken = self.opened()
        store.stop()
        self.assertEqual(store._breaker.state, "open")


class LedgerTest(EngineTest):
    """Seals, verify and purge, over a store that runs."""
    KEYS = {"new": b"n" * 32, "old": b"o" * 32}

    def setUp(self):
        super().setUp()
        self.told, self.encryption = [], None

    def running(self, encryption=None, sealing=True):
        """(Store, Ledger) that run, until the end of the test or self.end()."""
        engine = SQLite(str(self.database), encryption=encryption)
        store = Store(engine, 1.0)
        store.open()
        store.start()
        ledger = receiver.Ledger(store, self.told.append)
        if sealing:
            ledger.start()
        self.encryption = encryption
        self.addCleanup(store.stop)
        return store, ledger

    def end(self, store, ledger):
        ledger.stop()
        store.stop()

    def filled(self, events=300, encryption=None):
        """A database with events, two conflicts and two accesses, sealed in blocks that are always the same, and closed."""
        store, ledger = self.running(encryption, sealing=False)
        for number in range(events):
            store.submit(receiver._Waiting(stored_event(number, received_at=f"2025-01-{1 + number % 9:02}T00:00:00Z")))
        store.settle()
        for payload in ('{"a": 1}', '{"a": 2}'):
            store.add(stored_event(0, payload=payload))
        ledger.record("read", "desk", "192.0.2.1", '{"patient_id": "x"}', 3)
        ledger.record("read", "desk", "192.0.2.1", None, None)
        ledger.start()
        self.end(store, ledger)

    def verify(self, *known, encryption=...):
        """What verify says: "" when all is well."""
        encryption = self.encryption if encryption is ... else encryption
        with contextlib.closing(sqlite3.connect(str(self.database), isolation_level=None)) as connection:
            verification = receiver.Verification(connection, encryption)
            try:
                verification.run(dict(known))
                self.summary = verification.summary()
                return ""
            except receiver.Mismatch as error:
                return str(error)

    def purge(self, before, *tables, **options):
        return receiver.purge_database(str(self.database), self.encryption, before, tables or receiver.PURGED_TABLES,
                                       **options)

    def seals(self, what="id, source, first_id, last_id, rows"):
        return rows(self.database, f"SELECT {what} FROM seals ORDER BY id")

    def test_blocks_cover_all_ids_of_three_tables_and_are_256_rows_at_most(self):
        self.filled(600)
        by_source = {}
        for _, source, first, last, count in self.seals():
            self.assertLessEqual(count, receiver.SEAL_ROWS)
            self.assertEqual(first, by_source.get(source, (0, 0))[0] + 1)
            by_source[source] = (last, by_source.get(source, (0, 0))[1] + count)
        self.assertEqual({source: count for source, (_, count) in by_source.items()},
                         {"appointment_events": 600, "conflicting_events": 2, "access_log": 2})
        self.assertEqual(self.verify(), "")
        self.assertRegex(self.summary, r"\Aok: 600 events, 2 conflicts, 2 accesses, sealed up to \d{4}-\d\d-\d\dT[\d:.]+Z\Z")

    def test_what_was_there_before_the_first_start_is_sealed_as_it_is_found(self):
        engine = self.engine()
        write(engine, [stored_event(number) for number in range(700)])
        engine.close()
        self.assertEqual(self.verify(), "")
        self.assertIn("nothing is sealed yet", self.summary)
        store, ledger = self.running()
        until(lambda: self.seals("max(last_id)") == 700, "all to be sealed")
        self.end(store, ledger)
        self.assertEqual(self.verify(), "")

    def test_what_comes_is_sealed_within_a_moment_and_nothing_is_written_while_nothing_comes(self):
        with mock.patch.object(receiver, "SEAL_SECONDS", 0.02):
            store, ledger = self.running()
            store.add(stored_event(1))
            until(lambda: self.seals("count(*)") == 1, "a seal")
            with mock.patch.object(store, "do", side_effect=AssertionError("wrote")) as done:
                read = []
                with mock.patch.object(ledger, "_next_seals", side_effect=lambda: read.append(1) or []):
                    until(lambda: len(read) > 5, "further steps")
                self.assertEqual(done.call_count, 0)

    def test_the_newest_digest_is_told_each_minute_when_it_is_new_and_at_stop(self):
        store, ledger = self.running()
        store.add(stored_event(1))
        until(lambda: self.told, "the first digest")
        self.assertEqual(self.told, [f"seal 1 sha256:{self.seals('digest').hex()}"])
        store.add(stored_event(2))
        until(lambda: self.seals("count(*)") == 2, "the second seal")
        self.assertEqual(len(self.told), 1)
        self.end(store, ledger)
        self.assertEqual(self.told[1][:7], "seal 2 ")
        self.end(*self.running())
        self.assertEqual(len(self.told), 3)             # a new run tells where it begins

    def test_the_same_rows_in_another_database_have_other_digests(self):
        """Or a digest out of a log would tell who guesses a patient that the guess is right."""
        digests = set()
        for _ in range(2):
            self.filled(1)
            digests.add(self.seals("digest")[0])
            self.database.unlink()
        self.assertEqual(len(digests), 2)

    def test_canonical_rows_are_the_same_from_sqlite_and_from_python(self):
        engine = self.engine()
        events = [stored_event(1), stored_event(2, notes=None), stored_event(3, notes="ü\U0001f600\n\0 behind NUL", payload='{"a": "\\u0000"}'),
                  stored_event(4, notes="")]
        write(engine, events)
        source = receiver.SOURCES["appointment_events"]
        block = receiver.block_of(engine.writer, None, source, 0, 99)
        lines = [receiver.canonical_row((number, *one[:-1])).hex().upper() for number, one in enumerate(events, 1)]
        self.assertEqual(block[:2] + block[4:], (4, 4, hashlib.sha256("\n".join(lines).encode()).digest()))
        self.assertIsNone(receiver.block_of(engine.writer, None, source, 4, 99))
        self.assertEqual(len({receiver.canonical_row(row) for row in (
            ("a", "b"), ("a b", ""), ("", "a b"), (None, ""), ("", None), (1, ""), ("1", ""), (b"1", ""))}), 8)

    def test_every_column_of_every_sealed_table_that_is_changed_by_hand_is_found(self):
        for encryption in (None, receiver.Encryption(self.KEYS)):
            self.filled(300, encryption)
            self.assertEqual(self.verify(), "")
            whole = self.database.read_bytes()
            for table in (*receiver.SOURCES, "seals"):
                for _, column, kind, *_ in rows(self.database, f"PRAGMA table_info({table})"):
                    for value in ("x'00'", "'y'", "17"):
                        with self.subTest(f"{table}.{column} = {value}", encrypted=encryption is not None):
                            try:
                                write_rows(self.database, f"UPDATE {table} SET {column} = {value} WHERE id = 2")
                            except sqlite3.IntegrityError:              # the id of another row
                                continue
                            told = self.verify()
                            self.assertRegex(told, "^(changed|removed|put in): ")
                            self.database.write_bytes(whole)
            self.assertEqual(self.verify(), "")
            self.database.unlink()

    def test_rows_that_are_removed_put_in_or_exchanged_are_found_with_their_ids_and_times(self):
        self.filled(300)
        whole = self.database.read_bytes()
        copy = "INSERT INTO appointment_events SELECT {}, event_type, 'X', patient_id, timestamp, notes, received_at, client, " \
               "payload, patient_hmac, content_hmac FROM appointment_events WHERE id = 5"
        for statements, words in (
                (["DELETE FROM appointment_events WHERE id = 7"], "removed: .*appointment_events 1 to 256.*255 are there"),
                (["DELETE FROM conflicting_events"], "removed: .*conflicting_events 1 to 2.*no row is left"),
                (["DELETE FROM appointment_events WHERE id = 7", copy.format(7)], "changed: .*appointment_events 1 to 256"),
                (["UPDATE appointment_events SET notes = 'x' WHERE id = 299"], "changed: .*257 to 300.*2025-01-0"),
                (["UPDATE appointment_events SET payload = payload || char(0) || 'x' WHERE id = 3"], "changed: "),
                (["UPDATE appointment_events SET payload = CAST(payload AS BLOB) WHERE id = 3"], "changed: "),
                (["DELETE FROM seals WHERE id = 2"], "removed: seals between 1 and 3"),
                (["DELETE FROM seals WHERE id = (SELECT max(id) FROM seals)"], "removed: seals behind"),
                (["DELETE FROM seals"], "removed: seals behind number 0"),
                (["UPDATE seals SET purged = '2026' WHERE id = 1"], "changed: "),
                (["DELETE FROM appointment_events WHERE id < 257", "UPDATE seals SET purged = '2026' WHERE id = 1"],
                 "removed: rows of seal 1 .*no purge")):
            with self.subTest(statements):
                write_rows(self.database, *statements)
                self.assertRegex(self.verify(), "^" + words)
                self.database.write_bytes(whole)

    def test_of_large_payloads_a_block_has_few(self):
        store, ledger = self.running()
        for number in range(12):
            store.submit(receiver._Waiting(stored_event(number, payload=json.dumps("x" * 1000000))))
        store.settle()
        self.end(store, ledger)
        self.assertLess(max(seal[4] for seal in self.seals()), 13)
        self.assertEqual(self.verify(), "")
        with contextlib.closing(sqlite3.connect(str(self.database))) as connection:
            self.assertLess(receiver.rows_that_fit(connection, receiver.SOURCES["appointment_events"], 0), 12)

    def test_a_row_that_is_put_into_a_gap_belongs_to_a_block(self):
        store, ledger = self.running()
        for number in (1, 1, 2):                        # a duplicate uses an id up
            store.add(stored_event(number))
        self.end(store, ledger)
        self.assertEqual(rows(self.database, "SELECT max(id) FROM appointment_events"), 3)
        write_rows(self.database, "INSERT INTO appointment_events SELECT 2, event_type, 'X', patient_id, timestamp, notes, "
                   "received_at, client, payload, NULL, NULL FROM appointment_events WHERE id = 1")
        self.assertRegex(self.verify(), r"^put in: .*[23] are there.*[12] were sealed")

    def test_rows_that_are_not_sealed_yet_are_no_fault(self):
        self.filled(10)
        engine = SQLite(str(self.database))
        engine.open()
        write(engine, [stored_event(99)])
        engine.close()
        self.assertEqual(self.verify(), "")
        self.assertIn("10 events", self.summary)

    def test_verify_beside_a_ledger_that_seals_finds_nothing_wrong(self):
        with mock.patch.object(receiver, "SEAL_SECONDS", 0.001):
            store, ledger = self.running()
            for number in range(150):
                store.add(stored_event(number))
                if number % 10 == 0:
                    self.assertEqual(self.verify(), "")
            self.end(store, ledger)
        self.assertEqual(self.verify(), "")

    def rewrite(self):
        """History as a forger without a key would rewrite it: a row is changed, and all seals are made anew."""
        write_rows(self.database, "UPDATE appointment_events SET notes = 'forged' WHERE id = 3",
                   "DELETE FROM seals", "DELETE FROM sqlite_sequence WHERE name = 'seals'")
        self.end(*self.running())

    def test_a_history_that_is_rewritten_as_a_whole_is_shown_by_a_digest_that_was_kept_elsewhere(self):
        self.filled(10)
        number, digest = self.seals("id, digest")[-1]
        self.assertEqual(self.verify((number, digest)), "")
        self.rewrite()
        self.assertEqual(self.verify(), "")
        self.assertRegex(self.verify((number, digest)), "rewritten|removed")

    def test_with_a_key_a_rewritten_history_is_not_signed(self):
        encryption = receiver.Encryption(self.KEYS)
        self.filled(10, encryption)
        self.assertEqual(self.verify(), "")
        self.assertNotIn("only the chain", self.summary)
        forger = receiver.Encryption({"new": b"f" * 32})
        secret = encryption.opened(rows(self.database, "SELECT value FROM database_keys"), receiver.KEY_PLACE)
        digest = receiver.first_digest(secret)
        for row in self.seals(receiver.SEAL_COLUMNS):
            seal = receiver.Seal._make(row)._replace(content=b"f" * 32)
            digest = seal.chained(digest)
            write_rows(self.database, ("UPDATE seals SET content = ?, digest = ?, hmac = ? WHERE id = ?",
                                       (seal.content, digest, forger.sign(digest), seal.id)))
        self.assertRegex(self.verify(), "^changed: seal 1 .*not signed")

    def test_who_has_no_key_cannot_leave_the_signature_out_either(self):
        encryption = receiver.Encryption(self.KEYS)
        for key_id in (None, "gone"):
            self.filled(300, encryption)
            write_rows(self.database, "DELETE FROM appointment_events WHERE id = 300")
            *_, last = [receiver.Seal._make(row) for row in self.seals(receiver.SEAL_COLUMNS) if row[2] == "appointment_events"]
            digest = rows(self.database, f"SELECT digest FROM seals WHERE id = {last.id - 1}")
            for row in self.seals(receiver.SEAL_COLUMNS)[last.id - 1:]:
                forged = receiver.Seal._make(row)._replace(key_id=key_id, hmac=None)
                if forged.id == last.id:
                    with contextlib.closing(sqlite3.connect(str(self.database))) as connection:
                        block = receiver.block_of(connection, encryption, receiver.SOURCES[last.source], last.first_id - 1,
                                                  last.last_id)
                    forged = forged._replace(rows=block.rows, content=block.content)
                digest = forged.chained(digest)
                write_rows(self.database, ("UPDATE seals SET rows = ?, content = ?, digest = ?, hmac = NULL, key_id = ? "
                                           "WHERE id = ?", (forged.rows, forged.content, digest, key_id, forged.id)))
            self.assertRegex(self.verify(), f"^changed: seal {last.id} .*no key that is here")
            self.database.unlink()

    def test_rekey_breaks_no_seal_and_a_key_that_is_gone_leaves_the_chain(self):
        self.filled(300)
        before = self.seals("digest")
        self.encryption = receiver.Encryption({"old": self.KEYS["old"]})
        for keys in (("old",), ("new", "old")):
            encryption = receiver.Encryption({name: self.KEYS[name] for name in keys})
            engine = SQLite(str(self.database), encryption=encryption, takes_over=True)
            engine.open()
            rekeying = receiver.Rekeying(engine)
            rekeying.run(lambda table, last: None)
            engine.close()
            self.assertEqual((rekeying.moved > 302, rekeying.unreadable), (True, 0))
            self.assertEqual(self.verify(encryption=encryption), "")
            store, ledger = self.running(encryption)
            store.add(stored_event(1000 + len(keys)))
            self.end(store, ledger)
        self.assertEqual(self.seals("digest")[:len(before)], before)
        self.assertEqual(self.verify(encryption=receiver.Encryption({"new": self.KEYS["new"]})), "")
        self.assertIn(f"of {len(before) + 1} seals only the chain was checked", self.summary)

    def test_a_store_that_cannot_write_does_not_end_the_ledger(self):
        with mock.patch.object(receiver, "SEAL_SECONDS", 0.02):
            store, ledger = self.running()
            with contextlib.closing(sqlite3.connect(str(self.database), isolation_level=None)) as other:
                store.add(stored_event(1))
                until(lambda: self.seals("count(*)") == 1, "a seal")
                other.execute("BEGIN IMMEDIATE")
                with self.assertRaises(StoreUnavailable):
                    ledger.record("read")
                other.execute("ROLLBACK")
            store.add(stored_event(2))
            until(lambda: self.seals("count(*)") == 2, "the next seal")

    # -- purge

    def test_purge_takes_whole_blocks_that_are_old_and_verify_still_holds(self):
        self.filled(600)
        self.assertEqual(self.purge("2025-01-05T00:00:00Z"), 0)         # each block has a younger row
        self.assertEqual(self.purge("2025-01-10T00:00:00Z"), 600)        # the conflicts came later
        self.assertEqual(self.purge("2030-01-10T00:00:00Z"), 2)
        self.assertEqual(rows(self.database, "SELECT count(*) FROM appointment_events"), 0)
        self.assertEqual(self.verify(), "")
        self.assertIn("ok: 0 events, 0 conflicts, 2 accesses", self.summary)
        self.assertIn("seals were purged", self.summary)
        store, ledger = self.running()
        self.assertGreater(store.add(stored_event(1)).event_id, 600)    # ids never fall back
        self.end(store, ledger)
        self.assertEqual(self.verify(), "")

    def test_nothing_of_what_was_purged_is_left_in_the_file_or_the_wal(self):
        store, ledger = self.running()
        for number in range(30):
            store.add(stored_event(number, notes="planted notes", received_at="2020-01-01T00:00:00Z"))
        until(lambda: self.seals("max(last_id)") == 30, "the seals")
        self.assertEqual(self.purge("2021-01-01T00:00:00Z"), 30)
        for name, data in files(self.folder).items():
            self.assertNotIn(b"planted notes", data, name)
        self.assertEqual(store.add(stored_event(31)).kind, "stored")    # beside a store that goes on
        self.end(store, ledger)
        self.assertEqual(self.verify(), "")

    def test_a_block_that_somebody_has_changed_is_left_for_verify_to_find(self):
        self.filled(300)
        write_rows(self.database, "DELETE FROM appointment_events WHERE id = 7")
        self.assertEqual(self.purge("2030-01-01T00:00:00Z"), 44 + 2)
        self.assertRegex(self.verify(), "^removed: .*appointment_events 1 to 256")

    def test_rows_that_are_put_back_into_a_purged_block_are_found(self):
        self.filled(10)
        row = rows(self.database, "SELECT * FROM appointment_events WHERE id = 3")[0]
        self.purge("2030-01-01T00:00:00Z")
        write_rows(self.database, (f"INSERT INTO appointment_events VALUES ({', '.join('?' * len(row))})", row))
        self.assertRegex(self.verify(), "^removed: |^changed: ")

    def test_a_purge_that_was_interrupted_goes_on(self):
        self.filled(1500)
        with mock.patch.object(receiver, "PURGE_BLOCKS", 1), mock.patch.object(
                receiver, "record_access", side_effect=[None, KeyboardInterrupt]), self.assertRaises(KeyboardInterrupt):
            self.purge("2030-01-01T00:00:00Z")
        left = rows(self.database, "SELECT count(*) FROM appointment_events")
        self.assertEqual(left, 1500 - 256)
        self.assertEqual(self.purge("2030-01-01T00:00:00Z"), left + 2)

    def test_the_access_log_has_a_term_of_its_own(self):
        self.filled(10)
        self.assertEqual(self.purge("2030-01-01T00:00:00Z"), 12)
        accesses = rows(self.database, "SELECT count(*) FROM access_log")
        self.end(*self.running())
        self.assertGreaterEqual(self.purge("2100-01-01T00:00:00Z", "access_log"), accesses)
        self.end(*self.running())
        self.assertEqual(self.verify(), "")

    def test_purge_works_on_an_encrypted_database(self):
        self.filled(300, receiver.Encryption(self.KEYS))
        self.assertEqual(self.purge("2030-01-01T00:00:00Z"), 302)
        self.assertEqual(self.verify(), "")


class MigrationTest(EngineTest):

    def seed(self, *events_, table=PLAIN_TABLE):
        """A database of the plain kind; events are dicts of columns."""
        write_rows(self.database, table, *(
            (f"INSERT INTO appointment_events ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})",
             tuple(columns.values())) for columns in events_))

    @staticmethod
    def old(number, **columns):
        return {"id": number, "event_type": "scheduled", "appointment_id": f"APT-{number}", "patient_id": "PAT-1",
                "timestamp": "2025-01-10T14:00:00", "received_at": "2025-01-10T14:23:15.123456", **columns}

    def test_events_of_the_plain_table_stay_with_their_ids_and_can_be_used(self):
        self.seed(self.old(3, notes="a note"), self.old(7, timestamp="2025-01-10T16:00:00+02:00"))
        engine = self.engine()
        first, second = read(engine, Filter(), 0, 10)
        self.assertEqual(first[:7], ("scheduled", "APT-3", "PAT-1", "2025-01-10T14:00:00Z", "a note",
                                     "2025-01-10T14:23:15.123456Z", None))
        self.assertEqual(json.loads(first.payload)["notes"], "a note")
        self.assertEqual((second.id, second.timestamp, second.notes), (7, "2025-01-10T14:00:00Z", None))
        self.assertEqual(rows(self.database, "PRAGMA user_version"), SQLite.DATA_VERSION)
        retry, new = write(engine, [stored_event(7, timestamp="2025-01-10T14:00:00Z"), stored_event(8)])
        self.assertEqual((retry.kind, retry.event_id, retry.identical, new.kind), ("duplicate", 7, True, "stored"))
        self.assertGreater(new.event_id, 7)

    def test_a_migrated_file_is_like_a_new_one_and_is_not_migrated_again(self):
        self.seed(self.old(1))
        self.engine().close()
        schema = "SELECT type, name, replace(sql, '\"', '') FROM sqlite_master WHERE name NOT LIKE 'sqlite_%' ORDER BY name"
        migrated = rows(self.database, schema)
        self.assertEqual(kinds(write(self.engine(), [stored_event(2)])), [("stored", 2)])
        new = SQLite(str(self.folder / "new.db"))
        new.open()
        new.close()
        self.assertEqual(migrated, rows(self.folder / "new.db", schema))

    def test_one_instant_in_two_spellings_is_kept_once_in_the_table_and_once_aside(self):
        self.seed(self.old(1, appointment_id="A", notes="first"),
                  self.old(2, appointment_id="A", timestamp="2025-01-10T15:00:00+01:00", notes="second"))
        self.engine()
        self.assertEqual(rows(self.database, "SELECT id, notes FROM appointment_events"), [(1, "first")])
        (event_id, payload), = rows(self.database, "SELECT event_id, payload FROM conflicting_events")
        self.assertEqual((event_id, json.loads(payload)["notes"]), (1, "second"))

    def test_an_id_that_was_once_given_never_means_another_event(self):
        self.seed(self.old(1), self.old(9))
        write_rows(self.database, "DELETE FROM appointment_events WHERE id = 9")
        self.assertEqual(kinds(write(self.engine(), [stored_event(5)])), [("stored", 10)])

    def test_no_event_is_lost_whatever_is_in_its_columns(self):
        table = """CREATE TABLE appointment_events (id INTEGER PRIMARY KEY, event_type TEXT, appointment_id TEXT,
            patient_id INTEGER, timestamp TEXT, notes TEXT, received_at TEXT, payload TEXT, "odd ""name" REAL)"""
        self.seed(
            self.old(1, patient_id=17, **{'"odd ""name"': 1.5}), self.old(2, appointment_id=None, patient_id=None),
            self.old(3, timestamp="next Tuesday"), self.old(4, timestamp=None, received_at=None),
            self.old(5, notes=b"\xff blob"), self.old(6, payload='{"room": 12}'), self.old(7, payload="no JSON"),
            self.old(8, payload='{"room": 12}', **{'"odd ""name"': 2.5}), self.old(9, payload='{"a": NaN}'), table=table)
        write_rows(self.database, "UPDATE appointment_events SET event_type = CAST(x'ff41' AS TEXT) WHERE id = 9")
        found = {one.id: one for one in read(self.engine(), Filter(), 0, 100)}
        self.assertEqual(sorted(found), list(range(1, 10)))
        payloads = {number: json.loads(one.payload, parse_constant=self.fail) for number, one in found.items()}
        self.assertEqual((found[1].patient_id, payloads[1]['odd "name']), ("17", 1.5))
        self.assertEqual((found[2].appointment_id, found[2].patient_id), ("", ""))
        self.assertEqual((found[3].timestamp, found[4].timestamp), ("next Tuesday", ""))
        self.assertEqual(found[5].notes, "\\xff blob")
        self.assertEqual((found[6].payload, payloads[7]["payload"]), ('{"room": 12}', "no JSON"))
        self.assertEqual(payloads[8], {**payloads[8], "room": 12, 'odd "name': 2.5})
        self.assertEqual((found[9].event_type, payloads[9]["payload"]), ("\\xffA", '{"a": NaN}'))

    def test_every_migrated_event_can_be_read_over_http(self):
        self.seed(self.old(1, notes=b"\xff"), self.old(2, timestamp="never"))
        server = ServerTest.start(self)
        answer = ServerTest.call(self, server)
        self.assertEqual([one["id"] for one in answer.json["events"]], [1, 2])

    def test_a_failure_in_the_middle_leaves_the_old_file_as_it_was(self):
        table = PLAIN_TABLE.replace("id INTEGER PRIMARY KEY AUTOINCREMENT", "id TEXT")
        self.seed(self.old(1), self.old("b7b4-no-number"), table=table)
        before = files(self.folder)
        self.refused("b7b4-no-number")
        self.assertEqual(files(self.folder), before)

    def test_a_copy_of_the_old_file_stays_beside_it_and_the_log_hears_what_was_done(self):
        self.seed(self.old(1), self.old(2, appointment_id="APT-1", timestamp="2025-01-10T15:00:00+01:00"),
                  self.old(3), self.old(4))
        (self.folder / "events.db.before-migration").write_text("an older one")
        before = self.database.read_bytes()
        engine = self.engine()
        copy = self.folder / "events.db.before-migration-2"
        self.assertEqual(engine.notes, ["The plain table appointment_events was taken over: 3 events kept, "
                                        "1 moved to conflicting_events (id 2)",
                                        f"The file as it was is kept as {copy}"])
        self.assertEqual(rows(copy, "SELECT * FROM appointment_events"), rows_of(before, self.folder))
        self.assertEqual((self.folder / "events.db.before-migration").read_text(), "an older one")
        if POSIX:
            self.assertEqual(copy.stat().st_mode & 0o777, 0o600)
        engine.close()
        self.assertEqual(self.engine().notes, [])
        self.assertEqual(list(self.folder.glob("*.part")), [])

    def test_what_an_interrupted_copy_left_is_in_nobodys_way_and_a_copy_gets_its_name_once_it_is_on_disk(self):
        self.seed(self.old(1))
        part = self.folder / "events.db.before-migration.part"
        part.write_text("cut")
        done = mock.Mock(fsync=mock.Mock(wraps=os.fsync), rename=mock.Mock(wraps=os.rename))
        with mock.patch.multiple(receiver.os, fsync=done.fsync, rename=done.rename):
            self.engine()
        self.assertEqual([call[0] for call in done.mock_calls][:2], ["fsync", "rename"])
        self.assertFalse(part.exists())

    def test_an_id_that_only_a_row_moved_aside_had_is_not_given_again(self):
        self.seed(self.old(1), self.old(2, appointment_id="APT-1", timestamp="2025-01-10T15:00:00+01:00"),
                  table=PLAIN_TABLE.replace(" AUTOINCREMENT", ""))
        self.assertEqual(kinds(write(self.engine(), [stored_event(3)])), [("stored", 3)])

    def test_without_room_for_the_copy_nothing_is_changed(self):
        self.seed(self.old(1))
        before = files(self.folder)
        full = sqlite3.OperationalError("database or disk is full")
        with mock.patch.object(receiver, "_sync_folder", side_effect=full):
            self.assertIn("the disk is full", self.refused("a copy of the file could not be made"))
        self.assertEqual(set(files(self.folder)), set(before) | {"events.db.before-migration"})
        self.assertEqual(files(self.folder)["events.db"], before["events.db"])

    @unittest.skipUnless(hasattr(resource, "RLIMIT_FSIZE"), "limits of a process")
    def test_a_start_without_room_for_the_copy_is_told_in_one_line(self):
        self.seed(*(self.old(number, notes="x" * 1000) for number in range(1, 200)))
        before = files(self.folder)

        def limit():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))
        code, _, complaint = self.program("--port", "0", "--database", self.database, preexec_fn=limit)
        self.assertEqual((code, complaint.count("\n")), (2, 1))
        self.assertIn("could not be made beside it", complaint)
        self.assertEqual(files(self.folder), before)

    def test_triggers_and_indexes_are_kept_where_they_can_be(self):
        table = PLAIN_TABLE.replace("notes TEXT,", "notes TEXT, extra TEXT,")
        self.seed(self.old(1), table=table)
        write_rows(
            self.database, "CREATE TABLE heard (id)", "CREATE INDEX by_patient ON appointment_events (patient_id)",
            "CREATE INDEX by_extra ON appointment_events (extra)",
            "CREATE UNIQUE INDEX same_key ON appointment_events (patient_id, notes)",
            "CREATE TRIGGER hears AFTER INSERT ON appointment_events BEGIN INSERT INTO heard VALUES (NEW.id); END",
            "CREATE TRIGGER reads_extra AFTER INSERT ON appointment_events BEGIN INSERT INTO heard VALUES (NEW.extra); "
            "END", "CREATE TRIGGER lost AFTER INSERT ON appointment_events BEGIN INSERT INTO gone VALUES (1); END",
            "CREATE TRIGGER refuses BEFORE INSERT ON appointment_events BEGIN SELECT RAISE(IGNORE); END",
            "CREATE VIEW extras AS SELECT extra FROM appointment_events",
            "CREATE VIEW patients AS SELECT patient_id FROM appointment_events")
        engine = self.engine()
        told = " ".join(engine.notes)
        for name in ("by_extra", "reads_extra", "lost", "refuses", "extras"):
            self.assertIn(name, told)
        for name in ("by_patient", "hears ", "patients"):
            self.assertNotIn(name, told)
        self.assertEqual(kinds(write(engine, [stored_event(8), stored_event(9)])), [("stored", 2), ("stored", 3)])
        self.assertEqual(rows(self.database, "SELECT id FROM heard"), [(2,), (3,)])
        self.assertEqual(write(engine, [stored_event(8)])[0].kind, "duplicate")
        self.assertEqual(rows(self.database, "SELECT name FROM sqlite_master WHERE name IN ('by_patient', 'lost')"),
                         "by_patient")

    def test_no_payload_that_we_make_is_other_than_json(self):
        table = PLAIN_TABLE.replace("notes TEXT,", "notes TEXT, weight REAL, payload TEXT,")
        self.seed(self.old(1, weight=float("inf")), self.old(2, weight=float("-inf"), payload='{"a": 1}'),
                  self.old(3, weight=1.5, payload="NaN"), table=table)
        found = [json.loads(one.payload, parse_constant=self.fail) for one in read(self.engine(), Filter(), 0, 9)]
        self.assertEqual([one["weight"] for one in found], ["Infinity", "-Infinity", 1.5])
        self.assertEqual((found[1]["a"], found[2]["payload"]), (1, "NaN"))

    def version_1(self):
        """A file of version 1 with one event and three conflicts, one of them kept twice."""
        engine = self.engine()
        write(engine, [stored_event(1)])
        engine.close()
        write_rows(self.database, "DROP TABLE conflicting_events",
                   "CREATE TABLE conflicting_events (id INTEGER PRIMARY KEY AUTOINCREMENT, event_id INTEGER NOT NULL, "
                   "received_at TEXT NOT NULL, client TEXT, payload TEXT NOT NULL)",
                   "CREATE INDEX idx_conflicting_event_id ON conflicting_events (event_id)",
                   *(("INSERT INTO conflicting_events (event_id, received_at, payload) VALUES (1, 'x', ?)", (payload,))
                     for payload in ('{"a": 1}', '{"a":1.0}', "no JSON")), "PRAGMA user_version = 1")

    def test_a_file_of_version_1_gets_digests(self):
        self.version_1()
        engine = self.engine()
        self.assertEqual(rows(self.database, "PRAGMA user_version"), SQLite.DATA_VERSION)
        kept = rows(self.database, "SELECT payload, digest FROM conflicting_events ORDER BY id")
        self.assertEqual([digest for _, digest in kept], [receiver.content_digest(payload) for payload, _ in kept])
        self.assertEqual(rows(self.database, "SELECT name FROM sqlite_master WHERE name LIKE 'idx_conf%'"),
                         "idx_conflicting_event_digest")
        write(engine, [stored_event(1, payload='{"a": 1}', client=None), stored_event(1, payload='{"b": 1}')])
        self.assertEqual(rows(self.database, "SELECT count(*) FROM conflicting_events"), 4)
        engine.close()
        # A program of version 1 that still runs has its health check write its number
        write_rows(self.database, "PRAGMA user_version = 1")
        self.assertEqual(self.engine().count(), 1)

    def test_a_file_of_version_2_gets_the_tables_of_the_ledger_and_keeps_its_rows(self):
        engine = self.engine()
        write(engine, [stored_event(1)])
        engine.close()
        table = re.sub(r",( +-- the JSON[^\n]*)\n +patient_hmac.*", r"\1)", receiver.EVENTS_TABLE, flags=re.DOTALL)
        write_rows(self.database, "ALTER TABLE appointment_events RENAME TO newer", table.format(name="appointment_events")
                   .replace("is lost)", "is lost\n)"),
                   f"INSERT INTO appointment_events SELECT id, {', '.join(receiver.COLUMNS)} FROM newer", "DROP TABLE newer",
                   receiver.EVENTS_INDEX, "DROP TABLE access_log", "DROP TABLE seals", "DROP TABLE database_keys",
                   "PRAGMA user_version = 2")
        for _ in range(2):
            engine = self.engine()
            self.assertEqual(rows(self.database, "PRAGMA user_version"), 3)
            self.assertEqual(rows(self.database, "SELECT patient_hmac FROM appointment_events"), None)
            self.assertEqual(len(rows(self.database, "SELECT value FROM database_keys")), 32)
            self.assertEqual(rows(self.database, "SELECT count(*) FROM access_log"), 0)
            self.assertEqual(write(engine, [stored_event(1)])[0].kind, "duplicate")
            engine.close()
            write_rows(self.database, "PRAGMA user_version = 2")       # by a program of then that still runs

    def test_a_file_of_version_1_that_cannot_be_brought_up_stays_as_it_was(self):
        self.version_1()
        before = rows(self.database, "SELECT type, name, sql FROM sqlite_master")
        with mock.patch.object(receiver, "content_digest", side_effect=sqlite3.OperationalError("disk I/O error")):
            self.refused("disk I/O error")
        self.assertEqual(rows(self.database, "SELECT type, name, sql FROM sqlite_master"), before)
        self.assertEqual(rows(self.database, "PRAGMA user_version"), 1)

    def test_views_of_the_old_table_go_on_working(self):
        self.seed(self.old(1))
        write_rows(self.database, "CREATE VIEW patients AS SELECT DISTINCT patient_id FROM appointment_events")
        self.engine()
        self.assertEqual(rows(self.database, "SELECT * FROM patients"), "PAT-1")

    @unittest.skipUnless(POSIX, "kill -9")
    def test_a_journal_left_by_a_crash_of_the_old_service_is_rolled_back(self):
        self.seed(self.old(1))
        crash = ("import sqlite3, os, signal, sys; c = sqlite3.connect(sys.argv[1]); c.execute('PRAGMA cache_size = 1');"
                 "c.executemany('INSERT INTO appointment_events SELECT NULL, event_type, ?, patient_id, timestamp, notes,"
                 " received_at FROM appointment_events WHERE id = 1', [(str(n),) for n in range(2000)]);"
                 "os.kill(os.getpid(), signal.SIGKILL)")
        subprocess.run([sys.executable, "-c", crash, str(self.database)], check=False)
        self.assertTrue((self.folder / "events.db-journal").exists())
        os.symlink(self.database, self.folder / "link.db")
        self.database = self.folder / "link.db"         # the journal lies beside the file itself
        self.assertEqual([one.id for one in read(self.engine(), Filter(), 0, 10)], [1])


class DurabilityTest(ServerTest):

    def launch(self, *arguments, **options):
        """A server in a process of its own: (process, port)."""
        process = subprocess.Popen(
            [sys.executable, "-S", str(PROGRAM), "--port", "0", "--database", str(self.database),
             "--log-file", str(self.folder / "server.log"), *arguments],
            stdout=subprocess.PIPE, env=clean_environment(), **options)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        line = process.stdout.readline().decode()
        self.assertIn("Listening on", line)
        return process, type("Address", (), {"port": int(line.rsplit(":", 1)[1])})

    @unittest.skipUnless(POSIX, "kill -9")
    def test_every_200_is_a_row_after_kill_9_under_load_from_16_clients(self):
        process, server = self.launch()
        answered, clients = [], []

        def load(client):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT)
            with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
                for number in range(100000):
                    key = f"{client}-{number}"
                    connection.request("POST", PATH, json.dumps(event(appointment_id=key)))
                    answer = answer_of(connection.getresponse())
                    answered.append((answer.status, answer.json.get("event_id"), key))
        for client in range(16):
            clients.append(threading.Thread(target=load, args=(client,)))
            clients[-1].start()
        until(lambda: len(answered) > 1000, "a load")
        process.send_signal(signal.SIGKILL)
        for client in clients:
            client.join()
        self.assertEqual({status for status, _, _ in answered}, {200})
        restarted = self.start()
        self.assertEqual(self.post(restarted, event(appointment_id="after")).status, 200)
        stored = set(rows(self.database, "SELECT id, appointment_id FROM appointment_events"))
        self.assertEqual({(number, key) for _, number, key in answered} - stored, set())

    def test_a_locked_database_is_503_with_retry_after_and_comes_back(self):
        server = self.start(busy_timeout=0.2)
        with contextlib.closing(sqlite3.connect(str(self.database), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            answer = self.post(server)
            self.assertEqual(answer.status, 503)
            self.assertGreaterEqual(int(answer.headers["retry-after"]), 1)
            self.assertEqual(self.call(server).json["events"], [])
            self.assertEqual(self.call(server, path="/health").status, 503)
        self.assertEqual(self.post(server).status, 200)
        until(lambda: self.call(server, path="/health").status == 200, "a green health")
        log = self.log_text(server)
        self.assertIn("- ERROR - [-] Events cannot be stored", log)
        self.assertIn("- INFO - [-] Events are stored again", log)

    def test_a_database_that_turns_read_only_is_503_and_comes_back(self):
        server = self.start()
        server.store.engine.writer.execute("PRAGMA query_only = 1")
        self.assertEqual(self.post(server).status, 503)
        self.assertEqual(self.call(server, path="/health/ready").status, 503)
        server.store.engine.writer.execute("PRAGMA query_only = 0")
        self.assertEqual(self.post(server).status, 200)
        self.assertIn("read-only", self.log_text(server))

    @unittest.skipUnless(hasattr(resource, "prlimit"), "limits of another process")
    def test_a_full_disk_is_503_and_an_error_and_red_and_service_comes_back_with_room(self):
        def limit():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        # The log goes to a pipe: the limit would also stop a file
        process, server = self.launch("--log-file", "", preexec_fn=limit, stderr=subprocess.PIPE)
        self.addCleanup(process.stderr.close)
        self.assertEqual(self.post(server, event(appointment_id="first")).status, 200)
        size = (self.folder / "events.db-wal").stat().st_size
        hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))
        self.assertEqual(self.post(server, event(appointment_id="lost", notes="x" * 9000)).status, 503)
        self.assertEqual(self.call(server, path="/health").status, 503)
        self.assertEqual(self.call(server).status, 200)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))
        self.assertEqual(self.post(server, event(appointment_id="second")).status, 200)
        until(lambda: self.call(server, path="/health").status == 200, "a green health")
        self.assertEqual(rows(self.database, "SELECT appointment_id FROM appointment_events ORDER BY id"),
                         [("first",), ("second",)])
        process.terminate()
        log = process.communicate(timeout=WAIT)[1].decode()
        self.assertEqual(process.returncode, 0)
        self.assertRegex(log, r"- ERROR - \[-\] Events cannot be stored[^\n]*disk")
        self.assertRegex(log, r"- INFO - \[-\] Events are stored again")

    @unittest.skipUnless(sys.platform == "linux", "files of a running service")
    def test_files_that_change_under_the_service_are_503_and_red_and_nothing_acknowledged_is_lost(self):
        for number, command in enumerate(("rm events.db-wal events.db-shm", "truncate -s 0 events.db",
                                          "cp empty.db events.db")):
            with self.subTest(command):
                self.database = self.folder / str(number) / "events.db"
                self.database.parent.mkdir()
                SQLite(str(self.database.parent / "empty.db")).open()
                process, server = self.launch()
                answered = [self.post(server, event(appointment_id=f"{at}")).status for at in range(51)]
                self.assertEqual(set(answered), {200})
                subprocess.run(command, shell=True, check=True, cwd=self.database.parent)
                refused = self.post(server, event(appointment_id="lost"))
                self.assertEqual((refused.status, refused.json["message"]), (
                    503, "This cannot be done now: somebody has changed the files of the database; try again"))
                self.assertEqual(self.call(server).status, 503)
                self.assertEqual(self.call(server, path="/health").status, 503)
                process.terminate()
                self.assertEqual(process.wait(), 0)
                self.assertTrue(self.database.exists())
                log = (self.folder / "server.log").read_text()
                self.assertRegex(log, r"- ERROR - \[-\] Events cannot be stored[^\n]*while it is in use")
                if command.startswith("truncate"):
                    code, _, complaint = self.program("--port", "0", "--database", self.database)
                    self.assertEqual((code, complaint.count("\n")), (2, 1))
                    self.assertIn("does not belong to it", complaint)
                else:                                   # the WAL holds all since the empty copy was made
                    self.assertEqual(self.call(self.start()).json["events"][-1]["id"], 51)
                    self.assertEqual(rows(self.database), 51)

    def test_a_refused_database_stops_the_start_with_one_line(self):
        self.database.write_bytes(b"no database at all, but long enough to be looked at" * 20)
        before = files(self.folder)
        code, _, complaint = self.program("--port", "0", "--database", self.database)
        self.assertEqual((code, complaint.count("\n")), (2, 1))
        self.assertIn("not a SQLite database", complaint)
        self.assertEqual(files(self.folder), before)


# =============================================================================
# Log
# =============================================================================

class RedactionTest(unittest.TestCase):
    MARK = "Mustermann"
    CONTRACT = Contract(receiver.EVENT_SCHEMA)

    def logged(self, mode, value, contract=CONTRACT):
        """What the log says of a JSON value, or of bytes that are none, as the receiver has it said."""
        redactor = Redactor(mode, contract.personal_fields)
        if isinstance(value, bytes):
            return redactor.unreadable(value)
        value, text = parse_json(json.dumps(value, ensure_ascii=False).encode())
        try:
            return redactor.event(contract.event(value, text, "now"))
        except InvalidEvent as error:
            return redactor.invalid(value, error.problems)

    def places(self):
        """{what: a value that holds the mark there}, every place that can hold a person's name."""
        mark = self.MARK
        nested = {"a list": [mark], "a value": {"a": mark}, "a name": {mark: 1},
                  "a deep name": [{"a": [{mark: mark}]}]}
        for name in ("event_type", "timestamp", "patient_id", "notes", "phone"):
            yield f"{name}, text", event(**{name: mark})
            yield f"{name}, text of a refused event", event(**{name: mark}, more={}, appointment_id="")
        for name in ("event_type", "appointment_id", "timestamp", "patient_id", "notes", "phone"):
            for what, value in nested.items():
                yield f"{name}, {what}", event(**{name: value})
        yield "a name", event(**{mark: 1})
        yield "a name in a refused event", event(**{mark: 1}, timestamp=...)
        yield "names like known ones", event(**{f"event_type/{mark}": 1, f"timestamp~{mark}": 1}, notes=7)
        yield "a long appointment_id", event(appointment_id=mark + "x" * 250)
        yield "behind a time", event(timestamp="2025-01-10T14:00:00Z" + mark)
        yield "alone", mark
        yield "in a list", [event(notes=mark)]
        yield "no JSON", b'{"notes": "' + mark.encode()

    def test_a_name_in_any_place_stays_out_of_the_log_in_every_mode_but_full(self):
        for what, value in self.places():
            for mode in ("redacted", "none", "full"):
                with self.subTest(what, mode=mode):
                    self.assertEqual(self.MARK in self.logged(mode, value), mode == "full")

    def test_a_valid_event_shows_what_is_no_persons_and_names_nothing_else(self):
        whole = '{"event_type": "scheduled", "appointment_id": "APT-1", "patient_id": "***", ' \
                '"timestamp": "2025-01-10T14:00:00Z"}'
        noted = whole[:-1] + ', "notes": "***"}'
        for members, text in (({}, whole), ({"notes": "a"}, noted), ({"notes": ""}, noted),
                              ({"a": 1, "b": {"c": 2, "d": 3}}, whole), ({"notes": "a", "b": 1}, noted),
                              ({"timestamp": "2025-01-10 15:00:00.0+01:00"}, whole)):
            with self.subTest(members):
                self.assertEqual(self.logged("redacted", event(**members)), text)

    def test_a_refused_event_shows_each_of_the_three_only_where_it_is_valid(self):
        whole = {"event_type": '"scheduled"', "appointment_id": '"APT-1"', "patient_id": '"***"',
                 "timestamp": '"2025-01-10T14:00:00Z"', "notes": '"***"'}
        for name, wrong in (("event_type", "booked"), ("appointment_id", ""), ("appointment_id", "x" * 256),
                            ("appointment_id", " "), ("timestamp", "today"), ("timestamp", 7), ("notes", 7)):
            with self.subTest(name, wrong=wrong):
                text = self.logged("redacted", event(**{"notes": "n", name: wrong}))
                shown = {**whole, name: '"***"'}
                parts = [f'"{name}": {value}' for name, value in shown.items()]
                self.assertEqual(text, "{" + ", ".join(parts) + "}")
        self.assertEqual(self.logged("redacted", {"timestamp": "2025-01-10T14:00Z", "b": 1, "a": [1, 2, 3]}),
                         '{"timestamp": "2025-01-10T14:00:00Z"} +2')
        self.assertEqual(self.logged("redacted", {}), "{}")
        for value in (7, [], None, "text"):
            self.assertEqual(self.logged("redacted", value), '"***"')
        self.assertEqual(self.logged("redacted", b"{no"), "(3 bytes)")

    def test_a_problem_above_or_below_a_member_is_one_of_the_member(self):
        redactor, shown = Redactor("redacted"), '"appointment_id": "APT-1"'
        for path, is_shown in (("/patient_id", True), ("/appointment_idx", True), ("/x/appointment_id", True),
                               ("/appointment_id", False), ("/appointment_id/a/0", False), ("", False)):
            with self.subTest(path):
                text = redactor.invalid(event(), [receiver.Problem("/notes", "type", ""),
                                                  receiver.Problem(path, "not", "")])
                self.assertEqual(shown in text, is_shown)

    def test_where_the_list_of_problems_may_have_been_cut_nothing_counts_as_valid(self):
        for number, is_shown in ((receiver.MOST_PROBLEMS - 1, True), (receiver.MOST_PROBLEMS, False)):
            problems = [receiver.Problem(f"/field{at}", "type", "") for at in range(number)]
            self.assertEqual("APT-1" in Redactor("redacted").invalid(event(), problems), is_shown)

    def test_a_schema_that_allows_more_than_the_contract_does_not_widen_the_log(self):
        lax = Contract({"type": "object"})
        for number, shown in ((255, True), (256, False)):
            for name in ("appointment_id", "event_type"):
                with self.subTest(name, number=number):
                    value = event(**{name: "x" * number})
                    self.assertEqual("xxx" in self.logged("redacted", value, lax), shown)
                    value["patient_id"] = ""
                    self.assertEqual("xxx" in self.logged("redacted", value, lax), shown)
        for name in ("appointment_id", "event_type", "timestamp"):
            for value in (7, True, None, [self.MARK], {self.MARK: 1}, "\u0661"):
                text = Redactor("redacted").invalid({name: value}, [receiver.Problem("/notes", "type", "")])
                self.assertEqual(self.MARK in text, False)
                masked = name == "timestamp" or not isinstance(value, str)
                self.assertEqual(text == f'{{"{name}": "***"}}', masked)

    def test_what_the_schema_marks_is_masked_beside_what_is_always_masked(self):
        whole = {"event_type": '"scheduled"', "appointment_id": '"APT-1"', "patient_id": '"***"',
                 "timestamp": '"2025-01-10T14:00:00Z"', "notes": '"***"'}
        for name in ("event_type", "appointment_id", "timestamp"):
            marked = EventTest.with_property(name, **{"x-pii": True})
            for members, more in (({}, ""), ({"patient_id": "", "b": 1}, " +1")):
                with self.subTest(name, refused=bool(more)):
                    shown = {**whole, name: '"***"'}
                    parts = [f'"{name}": {value}' for name, value in shown.items()]
                    self.assertEqual(self.logged("redacted", event(notes="n", **members), marked),
                                     "{" + ", ".join(parts) + "}" + more)
        marked = EventTest.with_property("appointment_id", **{"x-pii": True})
        self.assertEqual(self.logged("redacted", event(), marked),
                         '{"event_type": "scheduled", "appointment_id": "***", "patient_id": "***", '
                         '"timestamp": "2025-01-10T14:00:00Z"}')
        self.assertIn("APT-1", self.logged("full", event(), marked))
        self.assertEqual(self.logged("none", event(), marked), "")

    def test_full_shows_the_payload_as_it_came_and_none_nothing_of_it(self):
        text = '{"event_type":\t"scheduled",\r\n"more": 1.50, "notes": "\u00e9 \U0001f600 \x7f \\n"}'
        one = self.CONTRACT.event(event(), text, "now")
        self.assertEqual(Redactor("full").event(one), '{"event_type": "scheduled",  "more": 1.50, '
                                                      '"notes": "\\u00e9 \\ud83d\\ude00 \\u007f \\n"}')
        value = event(timestamp="today", more=[1, {"a": None}], notes="\x7f")
        self.assertEqual(json.loads(self.logged("full", value)), value)
        self.assertEqual(self.logged("full", b"\xff\n{"), "'\\xff\\n{'")
        for anything in (event(), value, b"\xff", [], "text"):
            self.assertEqual(self.logged("none", anything), "")

    def test_every_mode_gives_one_line_of_printable_ascii(self):
        hostile = FORGERY.replace("\x00", "") + "\x7f\x9b"
        names = ("appointment_id", "event_type", "timestamp", "notes", hostile)
        values = [event(**{name: hostile}) for name in names]
        values += [hostile, [hostile], hostile.encode() + b"\x9b"]
        values.append(event(appointment_id=hostile, timestamp=""))
        for mode in ("redacted", "full", "none"):
            for value in values:
                with self.subTest(value, mode=mode):
                    text = self.logged(mode, value)
                    self.assertTrue(text.isascii() and text.isprintable(), text)


class Sink(receiver.Sink):
    """Keeps what is written; raises `error` while that is set, hangs while `let_go` is clear."""

    def __init__(self):
        self.text, self.error, self.closed = "", None, False
        self.entered, self.let_go = threading.Event(), threading.Event()
        self.let_go.set()

    def write(self, data, level):
        self.entered.set()
        self.let_go.wait(WAIT)
        if self.error:
            raise self.error
        self.text += data.decode()

    def close(self):
        self.closed = True


def record(**parts):
    """What Log.request() takes."""
    return {"level": "INFO", "moment": 1736518995.125, "request_id": "2025-01-10T14:23:15.123456",
            "method": "POST", "route": PATH, "status": 200, "note": "stored", "event_id": 12, "seconds": 0.00123,
            "address": "127.0.0.1", **parts}


def numbers(text):
    """The numbers of the lines `line N.` in a log."""
    return [int(number) for number in re.findall(r"line (\d+)\.", text)]


LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - webhook - (DEBUG|INFO|WARNING|ERROR) - "
                  r"\[[-0-9T:.]+\] \S.*")


class LogTest(ServerTest):

    def log(self, level="INFO", mode="redacted", sink=None, start=True):
        sink = sink or Sink()
        log = Log(sink, level, mode)
        if start:
            log.start()
            self.addCleanup(log.stop)
        return log, sink

    def hanging_log(self):
        """A log whose thread hangs in a write until sink.let_go is set."""
        log, sink = self.log()
        self.addCleanup(sink.let_go.set)
        sink.let_go.clear()
        log.line("INFO", "into a pipe that nobody reads")
        self.assertTrue(sink.entered.wait(WAIT))
        return log, sink

    def test_one_line_holds_all_of_a_request(self):
        log, sink = self.log()
        log.request(**record(payload='{"event_type": "scheduled"} +1'))
        log.request(**record(moment=1736518995.9999, event_id=None, status=404, level="WARNING", note="Not here",
                           method="GET"))
        log.stop()
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(1736518995))
        self.assertEqual(sink.text.splitlines(), [
            f"{clock},125 - webhook - INFO - [2025-01-10T14:23:15.123456] POST {PATH} 200 stored event_id=12 "
            '1.2ms client=127.0.0.1 payload={"event_type": "scheduled"} +1',
            f"{clock},999 - webhook - WARNING - [2025-01-10T14:23:15.123456] GET {PATH} 404 Not here 1.2ms "
            "client=127.0.0.1"])

    def test_lines_that_differ_in_one_thing_differ_in_it(self):
        log, sink = self.log()
        changes = [{}, {"method": "GET"}, {"route": "/health"}, {"status": 409}, {"note": "duplicate"},
                   {"address": "::1"}, {"event_id": 7}, {"seconds": 1}, {"payload": "{}"},
                   {"request_id": "-"}]
        for change in changes + [{}]:
            log.request(**record(**change))
        log.stop()
        lines = [line.partition(" - [")[2] for line in sink.text.splitlines()]
        self.assertEqual((lines[0], len(set(lines))), (lines[-1], len(changes)))

    def test_every_line_keeps_its_own_second_and_words_whatever_other_threads_say(self):
        log, sink = self.log()

        def talk(number):
            for at in range(300):
                log.request(**record(moment=1000.25 + number + at % 2 * 10, note=f"note {number} {at % 2}",
                                   address=f"{number}.{at % 2}"))
        switching = sys.getswitchinterval()
        self.addCleanup(sys.setswitchinterval, switching)
        sys.setswitchinterval(1e-6)
        threads = [threading.Thread(target=talk, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        log.stop()
        seconds = {}
        for number in range(4):
            for late in range(2):
                moment = time.localtime(1000 + number + late * 10)
                seconds[time.strftime("%Y-%m-%d %H:%M:%S", moment)] = f"{number} {late}"
        lines = sink.text.splitlines()
        self.assertEqual(len(lines), 1200)
        for line in lines:
            match = re.fullmatch(r"(.{19}),250 - .* 200 note (\d \d) event_id=12 1.2ms client=\S+", line)
            clock, words = match.groups()
            self.assertEqual(seconds[clock], words)
            self.assertTrue(line.endswith("=" + words.replace(" ", ".")), line)

    def test_another_thread_between_keeping_and_giving_a_second_changes_nothing(self):
        class Overtaken(receiver.PerSecond):
            def __setattr__(self, name, value):
                super().__setattr__(name, (value[0] + 1, "another") if name == "_kept" else value)
        self.assertEqual(Overtaken(str).text(5), "5")

    def test_times_out_of_order_keep_their_own_second(self):
        log, sink = self.log()
        moments = (100.25, 99.75, 101.0, 100.5)
        for moment in moments:
            log.request(**record(moment=moment))
        log.stop()
        self.assertEqual([line[:23] for line in sink.text.splitlines()], [
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(int(moment))) + f",{int(moment % 1 * 1000):03d}"
            for moment in moments])

    def test_a_level_leaves_out_what_is_below(self):
        levels = ["DEBUG", "INFO", "WARNING", "ERROR"]
        for at, level in enumerate(levels):
            with self.subTest(level):
                log, sink = self.log(level)
                for name in levels:
                    log.line(name, "a line")
                    log.request(**record(level=name))
                log.stop()
                self.assertEqual(re.findall("webhook - ([A-Z]+) ", sink.text),
                                 [name for name in levels[at:] for _ in range(2)])

    def test_no_input_forges_a_line_or_moves_the_cursor(self):
        log, sink = self.log(mode="full")
        for part in ("method", "route", "note", "address"):
            log.request(**record(**{part: FORGERY}))
        log.line("ERROR", FORGERY, stack="Traceback\n  " + FORGERY)
        log.stop()
        heads = [line for line in sink.text.split("\n") if line and not line.startswith("    ")]
        self.assertEqual(len(heads), 5)
        for line in sink.text.split("\n"):
            self.assertTrue(line.isprintable(), repr(line))
        for line in heads:
            self.assertRegex(line, LINE)

    def test_what_is_kept_for_speed_is_bounded(self):
        log, sink = self.log()
        for number in range(3000):
            log.request(**record(note=f"line {number}." + "x" * 5000))
        log.stop()
        self.assertEqual(numbers(sink.text), list(range(3000)))
        self.assertLessEqual(len(log._frames), receiver.FRAMES_KEPT)
        self.assertLess(len(sink.text), 3000 * 1200)
        with mock.patch.object(log, "_frame", wraps=log._frame) as make:
            for number in range(5):
                log.request(**record(event_id=number, request_id=str(number), moment=number, seconds=number,
                                   payload="{}"))
        self.assertEqual(make.call_count, 1)

    # -- exceptions

    def broken(self):
        """An exception that came of another one, which came of a third; all quote a person."""
        def look_up(name):
            try:
                return {}[name]
            except KeyError as error:
                error.__dict__["__notes__"] = [name]
                raise LookupError(name)
        person = "\n".join(["Muster" + "mann", "2025-01-10 14:23:15,123 - webhook - INFO - " + "for" + "ged"])
        try:
            try:
                look_up(person)
            except LookupError as error:
                raise ValueError(person) from error
        except ValueError as error:
            return error

    def logged(self, mode, error, handled=True):
        log, sink = self.log(mode=mode)
        try:
            if handled:
                raise error
            log.exception("It broke", "2025-01-10T14:23:15.123456", error)
        except type(error):
            log.exception("It broke", "2025-01-10T14:23:15.123456")
        log.stop()
        return sink.text.splitlines()

    def test_an_exception_comes_with_its_stack_and_causes_indented_and_without_its_text(self):
        for mode in ("redacted", "none", "full"):
            for handled in (True, False):
                with self.subTest(mode, handled=handled):
                    first, *rest = self.logged(mode, self.broken(), handled)
                    self.assertRegex(first, r"- ERROR - \[2025-01-10T14:23:15.123456\] It broke$")
                    self.assertTrue(all(line.startswith("    ") for line in rest))
                    text = "\n".join(rest)
                    self.assertEqual("Mustermann" in text, mode == "full")
                    self.assertEqual("forged" in text, mode == "full")
                    for part in ("    Traceback (most recent call last):", " in broken",
                                 'test_webhook_server.py", line ', "return {}[name]", " in look_up",
                                 "ValueError", "LookupError", "KeyError"):
                        self.assertIn(part, text)

    def test_a_stack_without_texts_names_types_and_order(self):
        kinds = [line.strip() for line in self.logged("redacted", self.broken()) if re.match(r" {4}\w", line)]
        head = "Traceback (most recent call last):"
        self.assertEqual(kinds, [head, "ValueError", "Caused by:", head, "LookupError", "Caused by:", head,
                                 "KeyError"])
        error = json.JSONDecodeError("Mustermann", "{", 0)
        self.assertIn("    json.decoder.JSONDecodeError", self.logged("none", error))

    def test_what_an_exception_suppresses_is_not_its_cause_and_circles_end(self):
        one, other = ValueError("Mustermann"), KeyError("Mustermann")
        one.__context__ = other
        self.assertIn("    KeyError", self.logged("redacted", one))
        one.__cause__ = None                            # as `from None` does
        self.assertNotIn("    KeyError", self.logged("redacted", one))
        one.__cause__, other.__cause__ = other, one
        self.assertEqual(len([line for line in self.logged("redacted", one) if line.endswith("Error")]), 2)

    @unittest.skipIf(sys.version_info < (3, 11), "ExceptionGroup")
    def test_the_members_of_a_group_are_told_by_type(self):
        members = [KeyError("Mustermann"), TypeError("Mustermann")]
        group = ExceptionGroup("Mustermann", members)                                       # noqa: F821
        lines = self.logged("redacted", group)
        self.assertTrue({"    ExceptionGroup", "    KeyError", "    TypeError"} <= set(lines), lines)
        self.assertNotIn("Mustermann", "".join(lines))

    def test_an_exception_that_is_false_is_an_exception(self):
        class Empty(Exception):
            def __len__(self):
                return 0
        one = ValueError()
        one.__cause__ = Empty()
        self.assertIn("Empty", "".join(self.logged("redacted", one, handled=False)))
        self.assertIn("Empty", "".join(self.logged("redacted", Empty(), handled=False)))

    # -- what the sink does

    def test_a_sink_that_fails_stops_nobody_and_what_was_dropped_is_said(self):
        log, sink = self.log()
        self.assertEqual(log.trouble(), "")
        sink.error = OSError(28, "Mustermann")
        for number in range(100):
            log.line("INFO", f"lost {number}")
        why = "100 log lines were dropped: No space left on device"
        until(lambda: log.trouble() == why, "100 dropped lines")
        sink.error = None
        until(lambda: log.trouble() == "", "the notice, also without a further line")
        log.line("INFO", "back")
        log.stop()
        notice, back = sink.text.splitlines()
        self.assertRegex(notice, rf"- WARNING - \[-\] {why}$")
        self.assertRegex(notice, LINE)
        self.assertIn("back", back)
        self.assertTrue(sink.closed)

    def test_what_is_dropped_while_the_notice_is_written_is_said_in_the_next_one(self):
        log, sink = self.log(start=False)
        log._drop(5, "the first reason")
        write = sink.write

        def drop_and_write(data, level):
            sink.write = write
            log._drop(2, "the second reason")
            write(data, level)
        sink.write = drop_and_write
        log._write("INFO", [])
        self.assertEqual(log.trouble(), "2 log lines were dropped: the second reason")
        log._write("INFO", [])
        self.assertEqual(log.trouble(), "")
        self.assertEqual(re.findall(r"(\d) log lines were dropped: the (\w+)", sink.text),
                         [("5", "first"), ("2", "second")])

    def test_what_is_being_written_counts_as_waiting_and_a_wrong_count_heals(self):
        log, sink = self.hanging_log()
        for number in range(1000):
            log.request(**record(payload="x" * 1000))
        being_written = log._dated("INFO", 0, "[-] into a pipe that nobody reads\n")
        self.assertEqual(log._waiting, sum(len(text) for _, text in log._queue) + len(being_written))
        sizes, write = [], Sink.write

        def look(data, level):
            sizes.append((log._waiting, len(data) + sum(len(text) for _, text in log._queue)))
            write(sink, data, level)
        sink.write = look
        log._waiting += 12345                           # as if lines had been counted twice
        sink.let_go.set()
        until(lambda: log._waiting == 0, "the count of an empty queue")
        log.stop()
        self.assertGreater(len(sizes), 10)
        self.assertEqual({waiting - there for waiting, there in sizes}, {12345})

    def test_no_error_of_a_foreign_sink_ends_the_log_or_is_quoted(self):
        log, sink = self.log()
        for error in (ValueError("Mustermann"), SystemExit("Mustermann")):
            sink.error = error
            log.line("INFO", "lost")
            until(lambda: log.trouble() == f"1 log lines were dropped: {type(error).__name__}", error)
            sink.error = None
            until(lambda: log.trouble() == "", "the notice")
        log.stop()
        self.assertNotIn("Mustermann", sink.text)
        self.assertEqual(sink.text.count("were dropped"), 2)

    def test_a_full_queue_drops_and_says_so(self):
        log, sink = self.log(start=False)
        with mock.patch.object(receiver, "LOG_LINES", 10):
            for number in range(15):
                log.line("INFO", f"line {number}")
                log.request(**record())
        self.assertEqual(log.trouble(), "20 log lines were dropped: the queue was full")
        log.start()
        log.stop()
        self.assertIn("20 log lines were dropped: the queue was full", sink.text)
        self.assertEqual(len(sink.text.splitlines()), 11)

    def test_what_waits_for_a_sink_that_hangs_is_bounded_in_bytes_and_the_rest_is_counted(self):
        for size, lines in ((200, receiver.LOG_LINES), (4000, receiver.LOG_BYTES // 4000)):
            with self.subTest(size):
                log, sink = self.hanging_log()
                for number in range(24000):
                    log.request(**record(level="WARNING", status=400, payload="x" * size))
                waiting = sum(len(text) for _, text in log._queue)
                self.assertLessEqual(waiting, receiver.LOG_BYTES)
                self.assertGreater(len(log._queue), lines * 0.9)
                dropped = 24000 - len(log._queue)
                self.assertEqual(log.trouble(), f"{dropped} log lines were dropped: the queue was full")
                sink.let_go.set()
                until(lambda: log.trouble() == "" and not log._waiting, "all that waited")
                log.line("INFO", "there is room again")
                log.stop()
                self.assertEqual(sink.text.count("payload=xxx"), 24000 - dropped)
                self.assertIn(f"{dropped} log lines were dropped", sink.text)
                self.assertIn("there is room again", sink.text)

    def test_one_line_larger_than_all_that_may_wait_is_dropped_and_its_neighbour_is_not(self):
        log, sink = self.log(start=False)
        log.request(**record(payload="x" * receiver.LOG_BYTES))
        log.request(**record(payload="y" * (receiver.LOG_BYTES - 1000)))
        log.start()
        log.stop()
        counts = [sink.text.count(part) for part in ("1 log lines were dropped", "=xxx", "=yyy")]
        self.assertEqual(counts, [1, 0, 1])

    def test_lines_are_written_in_order_and_in_few_writes_of_bounded_size(self):
        log, sink = self.log(start=False)
        sizes, write = [], sink.write
        sink.write = lambda data, level: (sizes.append(len(data)), write(data, level))
        for number in range(5000):
            log.line("INFO", f"line {number}.")
        log.start()
        log.stop()
        self.assertEqual(numbers(sink.text), list(range(5000)))
        self.assertLessEqual(max(sizes), receiver.LOG_WRITE)
        self.assertLess(len(sizes), 10)

    def test_a_sink_that_never_returns_does_not_keep_the_service_from_ending(self):
        log, sink = self.hanging_log()
        with mock.patch.object(receiver, "LOG_FLUSH_SECONDS", 0.05):
            log.stop()
        self.assertFalse(sink.closed)
        sink.let_go.set()
        log._thread.join(WAIT)

    def test_the_last_look_at_a_sink_that_fails_tries_once(self):
        log, sink = self.log(start=False)
        sink.write = mock.Mock(side_effect=OSError(32, ""))
        with mock.patch.object(sink, "most", 0):
            for number in range(500):
                log.line("INFO", "lost")
            log._stop.set()
            log.start()
            log.stop()
        self.assertEqual(sink.write.call_count, 1)

    def test_what_was_queued_is_written_when_the_interpreter_ends_without_a_stop(self):
        slow = "write = sink.write; sink.write = lambda *some: (time.sleep(0.3), write(*some))"
        for name, code, text in (("a program that ends", "", "0 1 2"), ("sys.exit", "sys.exit(0)", "0 1 2"),
                                 ("an exception", "raise KeyError", "0 1 2"), ("a slow sink", slow, "0 1 2"),
                                 ("after stop()", "log.stop()", "0 1 2"),
                                 ("a sink that hangs", "sink.write = lambda *_: time.sleep(3600)", "")):
            with self.subTest(name):
                path = self.folder / "at exit.log"
                path.write_text("")
                script = ("import sys, time; import webhook_server as w;"
                          "w.LOG_FLUSH_SECONDS = float(sys.argv[2]);"
                          "sink = w.FileSink(sys.argv[1], 100000, 1); log = w.Log(sink); log.start();"
                          f"[log.line('INFO', f'line {{number}}.') for number in range(3)]\n{code}")
                limit = WAIT if text else 0.2
                done = subprocess.run([sys.executable, "-c", script, str(path), str(limit)],
                                      timeout=WAIT, capture_output=True, text=True,
                                      env={**clean_environment(), "PYTHONPATH": str(PROGRAM.parent)})
                self.assertEqual(done.returncode, int(name == "an exception"), done.stderr)
                self.assertEqual(" ".join(map(str, numbers(path.read_text()))), text)

    def test_a_program_that_ends_without_stopping_the_service_has_its_last_lines_in_the_log(self):
        script = ("import http.client, sys; from webhook_server import Config, WebhookServer;"
                  "server = WebhookServer(Config(port=0, database='e.db', log_file='e.log')).start();"
                  "sender = http.client.HTTPConnection('127.0.0.1', server.port);"
                  f"sender.request('POST', '{PATH}', sys.argv[1]); sender.getresponse().read()")
        subprocess.run([sys.executable, "-c", script, json.dumps(event())], check=True, timeout=WAIT,
                       cwd=self.folder, env={**clean_environment(), "PYTHONPATH": str(PROGRAM.parent)})
        self.assertIn("200 stored event_id=1", (self.folder / "e.log").read_text())

    def test_a_log_that_was_stopped_is_kept_alive_by_nobody(self):
        log, _ = self.log(start=False)
        log.start()
        log.stop()
        gone = weakref.ref(log)
        del log
        gc.collect()
        self.assertIsNone(gone())

    def test_a_line_after_a_torn_one_starts_on_a_line_of_its_own(self):
        sink, written = receiver.StreamSink(), []
        sink._stream = mock.Mock(**{"fileno.return_value": 99})
        answers = iter([5, BlockingIOError(11, "not now"), None])

        def write(descriptor, data):
            answer = next(answers)
            if isinstance(answer, OSError):
                raise answer
            written.append(bytes(data[:answer]))
            return len(written[-1])
        with mock.patch.object(os, "write", write):
            with self.assertRaises(BlockingIOError):
                sink.write(b"a torn line\n", 20)
            sink.write(b"a whole line\n", 20)
        self.assertEqual(b"".join(written).splitlines(), [b"a tor", b"a whole line"])

    @unittest.skipUnless(POSIX and os.path.exists("/dev/full"), "/dev/full")
    def test_a_stderr_that_takes_nothing_never_stops_the_service(self):
        reader, closed = os.pipe()
        os.close(reader)
        reader, unread = os.pipe()
        self.addCleanup(os.close, reader)
        os.set_blocking(unread, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(unread, bytes(4096))
        os.set_blocking(unread, True)
        full = os.open("/dev/full", os.O_WRONLY)
        code = "import sys, webhook_server as w; w.LOG_FLUSH_SECONDS = 0.2; sys.exit(w.main())"
        for name, stderr in (("a closed pipe", closed), ("a full device", full), ("an unread pipe", unread)):
            with self.subTest(name):
                process = subprocess.Popen([sys.executable, "-S", "-c", code, "--port", "0", "--database",
                                            str(self.database)], stdout=subprocess.PIPE, stderr=stderr,
                                           env={**clean_environment(), "PYTHONPATH": str(PROGRAM.parent)})
                os.close(stderr)
                with process:
                    try:
                        port = int(process.stdout.readline().rsplit(b":", 1)[1])
                        server = type("Address", (), {"port": port})
                        self.assertEqual(self.post(server, event(appointment_id=name)).status, 200)
                        process.terminate()
                        self.assertEqual(process.wait(WAIT), 0)
                    finally:
                        process.kill()

    def test_two_services_in_one_process_have_logs_of_their_own(self):
        one = self.start(log_file=str(self.folder / "one.log"), database=str(self.folder / "one.db"))
        two = self.start(log_file=str(self.folder / "two.log"), database=str(self.folder / "two.db"))
        self.post(one, event(appointment_id="APT-of-one"))
        self.post(two, event(appointment_id="APT-of-two"))
        one.stop(), two.stop()
        logs = [(self.folder / name).read_text() for name in ("one.log", "two.log")]
        self.assertEqual([("APT-of-one" in log, "APT-of-two" in log) for log in logs],
                         [(True, False), (False, True)])

    def test_a_logger_of_the_embedding_program_takes_the_lines_with_their_levels(self):
        logger = logging.Logger("theirs")
        handler = logging.StreamHandler(io.StringIO())
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        logger.addHandler(handler)
        server = self.start(logger=logger, log_file=str(self.folder / "o.log"))
        self.post(server, event(notes="secret"))
        self.post(server, event(notes="secret"))
        server.stop()
        text = handler.stream.getvalue()
        self.assertRegex(text, r"INFO \[\S+\] POST /webhook/appointments 200 stored event_id=1")
        self.assertRegex(text, r"WARNING \[\S+\] POST /webhook/appointments 409 ")
        self.assertNotIn("secret", text)

    def test_what_a_running_service_logs_has_the_format_line_by_line(self):
        server = self.start()
        self.post(server)
        self.post(server)
        self.post(server, event(patient_id=...))
        self.post(server, b"{")
        with mock.patch.object(receiver.Session, "insert", side_effect=RuntimeError("a bug")):
            self.assertEqual(self.post(server, event(appointment_id="APT-9")).status, 500)
        lines = self.log_text(server).splitlines()
        heads = [line for line in lines if not line.startswith("    ")]
        for line in heads:
            self.assertRegex(line, LINE)
        found = re.findall(r" - webhook - ([A-Z]+) - \[\S+\] POST \S+ (\d{3}) ", "\n".join(heads))
        # Threads log what they have answered after the answer, so in any order
        self.assertEqual(sorted(found), [("ERROR", "500"), ("INFO", "200"), ("WARNING", "400"),
                                         ("WARNING", "400"), ("WARNING", "409")])
        self.assertIn("Service started", heads[0])
        self.assertIn("Service stopped", heads[-1])
        self.assertIn("    Traceback (most recent call last):", lines)

class LogFileTest(ServerTest):

    def setUp(self):
        super().setUp()
        self.path = self.folder / "logs" / "small.log"
        self.path.parent.mkdir()

    def log(self, max_bytes=1000000, backups=20):
        log = Log(receiver.FileSink(str(self.path), max_bytes, backups))
        log.start()
        self.addCleanup(log.stop)
        return log

    def say(self, log, *some):
        """Have lines written, and wait until they are."""
        for number in some:
            log.line("INFO", f"line {number}.")
        until(lambda: not log._waiting, "the lines")

    def look_seldom(self):
        patch = mock.patch.object(receiver, "LOG_LOOK_SECONDS", 3600)
        patch.start()
        self.addCleanup(patch.stop)

    @unittest.skipUnless(POSIX, "needs a named pipe")
    def test_a_log_file_that_is_no_file_is_written_and_never_rotated(self):
        pipe = self.folder / "pipe"
        os.mkfifo(pipe)
        reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        self.addCleanup(os.close, reading)
        sink = receiver.FileSink(str(pipe), 4096, 1)
        self.addCleanup(sink.close)
        for _ in range(3):
            sink.write(b"x" * 3000 + b"\n", "INFO")
            self.assertEqual(os.read(reading, 65536), b"x" * 3000 + b"\n")
        os.rename(pipe, self.folder / "moved")
        sink.reopen()
        sink.write(b"y\n", "INFO")
        self.assertEqual(os.read(reading, 65536), b"y\n")
        self.assertEqual(sorted(path.name for path in self.folder.iterdir()), ["logs", "moved"])

    def test_a_file_is_rotated_by_size_and_loses_no_line(self):
        log = self.log(max_bytes=4096)
        for number in range(400):
            log.line("INFO", f"line {number}.")
        log.stop()
        pieces = sorted(self.path.parent.glob("small.log*"),
                        key=lambda piece: -int(piece.suffix[1:] if piece != self.path else 0))
        self.assertGreater(len(pieces), 5)
        self.assertTrue(all(piece.stat().st_size <= 4096 for piece in pieces))
        self.assertEqual(numbers("".join(piece.read_text() for piece in pieces)), list(range(400)))
        if POSIX:
            self.assertEqual(self.path.stat().st_mode & 0o777, 0o600)

    def test_a_rotation_that_fails_half_way_does_not_silence_the_log_for_ever(self):
        sink = receiver.FileSink(str(self.path), 4096, 2)
        self.addCleanup(sink.close)
        sink.write(b"x" * 4000 + b"\n", "INFO")
        with mock.patch.object(receiver, "_open_log", side_effect=OSError(24, "Too many open files")):
            for _ in range(2):
                with self.assertRaisesRegex(OSError, "Too many open files"):
                    sink.write(b"y" * 4000 + b"\n", "INFO")
        sink.write(b"z\n", "INFO")
        self.assertEqual(self.path.read_text(), "z\n")

    def test_a_file_that_cannot_be_rotated_is_written_on(self):
        log = self.log(max_bytes=4096)
        with mock.patch.object(os, "replace", side_effect=PermissionError(13, "Permission denied")):
            for number in range(200):
                log.line("INFO", f"line {number}.")
            log.stop()
        self.assertEqual(numbers(self.path.read_text()), list(range(200)))

    @unittest.skipUnless(POSIX, "renames an open file")
    def test_a_file_that_was_renamed_is_left_and_a_new_one_made_within_a_second(self):
        log, moved = self.log(), self.path.with_name("moved")
        self.say(log, 0, 1)
        os.rename(self.path, moved)
        until(self.path.exists, "a new file, also without a line to write")
        self.say(log, 2)
        self.assertEqual((numbers(moved.read_text()), numbers(self.path.read_text())), ([0, 1], [2]))
        self.assertEqual(self.path.stat().st_mode & 0o777, 0o600)

    @unittest.skipUnless(POSIX, "renames an open file")
    def test_lines_said_while_files_are_renamed_are_each_written_once(self):
        log = self.log()
        with mock.patch.object(receiver, "LOG_LOOK_SECONDS", 0.001):
            for turn in range(20):
                self.say(log, *range(turn * 10, turn * 10 + 5))
                os.rename(self.path, self.path.with_name(f"moved.{turn:02}"))
                for number in range(turn * 10 + 5, turn * 10 + 10):
                    log.line("INFO", f"line {number}.")
                until(self.path.exists, "the new file")
            log.stop()
        pieces = [*sorted(self.path.parent.glob("moved.*")), self.path]
        self.assertEqual(numbers("".join(piece.read_text() for piece in pieces)), list(range(200)))

    @unittest.skipUnless(POSIX, "renames an open file")
    def test_the_file_that_somebody_made_anew_is_gone_on_in_at_once_when_asked(self):
        self.look_seldom()
        log, moved = self.log(), self.path.with_name("moved")
        self.say(log, 0)
        os.rename(self.path, moved)
        self.path.write_text("made by logrotate\n")
        self.say(log, 1)                                # nobody has said so: still to the old one
        log.reopen()
        self.say(log, 2)
        self.assertEqual((numbers(moved.read_text()), numbers(self.path.read_text())), ([0, 1], [2]))
        self.assertEqual(self.path.read_text().splitlines()[0], "made by logrotate")
        inode = self.path.stat().st_ino
        log.reopen()                                    # a file in its place stays open
        self.say(log, 3)
        self.assertEqual((numbers(self.path.read_text()), self.path.stat().st_ino), ([2, 3], inode))

    @unittest.skipUnless(POSIX, "removes an open file")
    def test_a_file_that_was_removed_is_made_anew(self):
        log = self.log()
        self.say(log, 0)
        os.remove(self.path)
        until(self.path.exists, "a new file")
        self.say(log, 1)
        self.assertEqual(numbers(self.path.read_text()), [1])

    @unittest.skipUnless(POSIX, "renames the folder of an open file")
    def test_a_folder_that_is_gone_is_an_error_until_it_is_back(self):
        log, folder = self.log(), self.path.parent
        self.say(log, 0)
        os.rename(folder, self.folder / "gone")
        until(log.trouble, "trouble, also without a line to write")
        self.assertEqual(log.trouble(), "No such file or directory")
        self.say(log, 1, 2)
        self.assertEqual(log.trouble(), "2 log lines were dropped: No such file or directory")
        folder.mkdir()
        until(lambda: log.trouble() == "", "recovery")
        self.say(log, 3)
        self.assertEqual(numbers((self.folder / "gone" / "small.log").read_text()), [0])
        notice, line = self.path.read_text().splitlines()
        self.assertIn("2 log lines were dropped: No such file or directory", notice)
        self.assertEqual(numbers(line), [3])

    def test_the_file_is_looked_at_once_a_second_at_most(self):
        self.look_seldom()
        sink = receiver.FileSink(str(self.path), 1000000, 2)
        self.addCleanup(sink.close)
        with mock.patch.object(sink, "_has_lost_its_name", return_value=False) as look:
            for _ in range(50):
                sink.tend()
                sink.write(b"x\n", "INFO")
        self.assertEqual(look.call_count, 1)

    @unittest.skipUnless(POSIX, "removes the name of an open file")
    def test_a_look_that_the_system_refuses_changes_nothing(self):
        sink = receiver.FileSink(str(self.path), 1000000, 2)
        self.addCleanup(sink.close)
        sink.write(b"x\n", "INFO")
        for number, error in ((13, PermissionError), (5, OSError)):
            with mock.patch.object(os, "stat", side_effect=OSError(number, "refused")):
                sink.reopen()
                self.assertRaises(error, sink.write, b"y\n", "INFO")
        sink.write(b"z\n", "INFO")
        self.assertEqual(self.path.read_text(), "x\nz\n")

    @unittest.skipUnless(POSIX, "an open file is changed")
    def test_a_file_that_was_copied_and_emptied_is_not_rotated_too_early(self):
        sink = receiver.FileSink(str(self.path), 4096, 2)
        self.addCleanup(sink.close)
        for _ in range(3):
            sink.write(b"x" * 3000 + b"\n", "INFO")
            os.truncate(self.path, 0)
        sink.write(b"y\n", "INFO")
        self.assertEqual(self.path.read_text(), "y\n")
        self.assertEqual(os.listdir(self.path.parent), ["small.log"])

    def test_a_line_longer_than_a_file_may_be_is_written_and_no_empty_file_is_kept(self):
        sink = receiver.FileSink(str(self.path), 4096, 5)
        self.addCleanup(sink.close)
        for _ in range(2):
            sink.write(b"x" * 5000 + b"\n", "INFO")
        self.assertEqual(sorted(path.stat().st_size for path in self.path.parent.iterdir()), [5001, 5001])

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "Linux")
    def test_a_file_of_the_system_is_not_rotated_whatever_is_behind_it(self):
        with open(self.path, "ab") as file:
            sink = receiver.FileSink(f"/proc/self/fd/{file.fileno()}", 4096, 2)
            self.addCleanup(sink.close)
            with mock.patch.object(sink, "_rotate") as rotate:
                for _ in range(3):
                    sink.write(b"x" * 3000, "INFO")
        self.assertEqual((rotate.call_count, self.path.stat().st_size), (0, 9000))

    @unittest.skipUnless(POSIX, "renames an open file")
    def test_the_file_that_is_left_is_closed(self):
        sink = receiver.FileSink(str(self.path), 4096, 2)
        self.addCleanup(sink.close)
        left = sink._file
        os.rename(self.path, self.path.with_name("moved"))
        sink.reopen()
        sink.tend()
        self.assertTrue(left.closed)

    @unittest.skipUnless(resource, "limits of POSIX")
    def test_a_full_disk_leaves_no_half_line_behind(self):
        script = """if True:
            import resource, signal, sys, webhook_server
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            sink = webhook_server.FileSink(sys.argv[1], 100000, 2)
            sink.write(b"first line\\n", "INFO")
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (15, hard))
            try:
                sink.write(b"second line\\n", "INFO")
            except OSError:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
                sink.write(b"third line\\n", "INFO")
        """
        subprocess.run([sys.executable, "-c", script, str(self.path)], check=True, timeout=WAIT,
                       env={**clean_environment(), "PYTHONPATH": str(PROGRAM.parent)})
        self.assertEqual(self.path.read_text(), "first line\nthird line\n")


# =============================================================================
# HTTP
# =============================================================================

LIMITS = receiver.Limits(request_line=8192, header_bytes=16384, header_fields=100, body=1024 * 1024)


def head_bytes(*lines, first="GET /health HTTP/1.1", host="Host: localhost"):
    """The bytes of a head with further header lines."""
    return "\r\n".join(filter(None, (first, host, *lines))).encode("latin-1") + b"\r\n\r\n"


def cut(data, *places):
    """`data` in pieces, cut at the places."""
    edges = [0, *sorted(places), len(data)]
    return [data[start:end] for start, end in zip(edges, edges[1:])]


def read_head(pieces, limits=LIMITS):
    """What a head that comes in pieces says, as a dict; the status of its refusal; None when its end never came."""
    buffer = b""
    try:
        for piece in pieces:
            buffer += piece
            end = receiver.find_head(buffer, limits)
            if end >= 0:
                head = receiver.Head()
                receiver.parse_head(buffer[:end], head, limits)
                return {name: getattr(head, name) for name in (*receiver.Head.__annotations__, "fields", "method", "target",
                        "path", "query", "http11", "host", "chunked", "keep_alive", "expect_continue")}
    except receiver.Refusal as refusal:
        assert refusal.close, "a head that is not understood must end the connection"
        return refusal.status
    return None


def read_chunked(pieces, limits=LIMITS):
    """(body, what follows it) of a chunked body that comes in pieces; the status of its refusal; None without end."""
    decoder = receiver.ChunkedBody(limits)
    following = b""
    try:
        for piece in pieces:
            if decoder.rest is None:
                decoder.feed(piece)
            else:
                following += piece
    except receiver.Refusal as refusal:
        return refusal.status
    return None if decoder.rest is None else (bytes(decoder.body), decoder.rest + following)


def answers_in(data, *methods):
    """Every answer in `data`; fails when one is cut short. `methods` of the requests; those not given are GET."""
    answers, file, methods = [], io.BytesIO(data), list(methods)
    while file.tell() < len(data):
        head, found, _ = data[file.tell():].partition(b"\r\n\r\n")
        assert found, "half an answer"
        file.seek(len(head) + 4, io.SEEK_CUR)
        first, *lines = head.decode("latin-1").split("\r\n")
        version, status, _ = first.split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        status, body = int(status), b""
        if status == 100:
            answers.append(Answer(status, headers, body))
            continue
        method = methods.pop(0) if methods else "GET"
        if "content-length" in headers and method != "HEAD":
            body = file.read(int(headers["content-length"]))
            assert len(body) == int(headers["content-length"]), "half an answer"
        elif "transfer-encoding" in headers and method != "HEAD":
            whole = read_chunked([data[file.tell():]], LIMITS._replace(body=2 ** 40))
            assert whole, "half an answer"
            body = whole[0]
            file.seek(len(data) - len(whole[1]))
        elif status != 204 and method != "HEAD":
            assert headers["connection"] == "close", "an answer whose end cannot be told"
            body = file.read()
        assert version == "HTTP/1.1"
        answers.append(Answer(status, headers, body))
    return answers


class HTTPTest(ServerTest):
    """A test that looks at whole answers."""

    def proper(self, answer):
        """What every answer must have; gives the answer."""
        if answer.status == 100:
            return answer
        self.assertRegex(answer.headers["x-request-id"], r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\Z")
        self.assertEqual(answer.headers["x-content-type-options"], "nosniff")
        self.assertEqual(answer.headers["cache-control"], "no-store")
        self.assertEqual(answer.headers["server"], "webhook-server")
        self.assertRegex(answer.headers["date"], r"\A\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT\Z")
        if answer.status >= 400 and answer.body and "status" not in answer.json:
            self.assertLessEqual({"error", "message", "request_id"}, set(answer.json))
            self.assertEqual(answer.headers["x-request-id"], answer.json["request_id"])
            self.assertEqual(answer.json["error"], receiver.REASONS[answer.status])
            self.assertEqual(answer.headers["content-type"], "application/json")
        return answer

    def call(self, *arguments, **options):
        return self.proper(super().call(*arguments, **options))

    def talk(self, server, data, *methods):
        """Send bytes, end our sending half, give all answers, each looked at."""
        return [self.proper(answer) for answer in answers_in(self.exchange(server, data), *methods)]

    def talk_statuses(self, server, data, *methods):
        return [answer.status for answer in self.talk(server, data, *methods)]

    def read_answer(self, connection, method="GET"):
        """One answer from a connection that stays open; what has come behind it already is lost."""
        response = http.client.HTTPResponse(connection, method=method)
        response.begin()
        return self.proper(answer_of(response))


class RequestIdTest(unittest.TestCase):

    def ids(self, *microseconds):
        clock = iter(microseconds)
        return RequestIds(lambda: next(clock) * 1000 + 999)

    def test_an_id_is_utc_with_microseconds_and_the_time_is_the_same_with_z(self):
        ids = self.ids(1736518995123456, 1736518996000000, 1736518995999999)
        self.assertEqual([ids.next(), ids.next(), ids.next()], [(text, text + "Z") for text in (
            "2025-01-10T14:23:15.123456", "2025-01-10T14:23:16.000000", "2025-01-10T14:23:16.000001")])

    def test_ids_rise_also_when_the_clock_stands_or_is_set_back(self):
        ids = self.ids(*[1736518995999998] * 5, 1736510000000000, 1736518999000000)
        made = [ids.next()[0] for _ in range(7)]
        self.assertEqual(made, sorted(set(made)))
        self.assertEqual(made[2:4], ["2025-01-10T14:23:16.000000", "2025-01-10T14:23:16.000001"])

    def test_after_a_clock_that_was_wrong_the_time_is_the_time_and_the_id_still_rises(self):
        ids = self.ids(4102444799000000, 1736518995123456, 1736518995123457, 1736519000000000)
        made = [ids.next() for _ in range(4)]
        self.assertEqual([text for _, text in made],
                         ["2099-12-31T23:59:59.000000Z", "2025-01-10T14:23:15.123456Z", "2025-01-10T14:23:15.123457Z",
                          "2025-01-10T14:23:20.000000Z"])
        self.assertEqual([number for number, _ in made], sorted({number for number, _ in made}))

    def test_threads_never_share_an_id(self):
        ids, made = RequestIds(), []
        in_threads(8, lambda: made.extend([ids.next()[0] for _ in range(2000)]))
        self.assertEqual(len(set(made)), 16000)


class RefusalTest(unittest.TestCase):
    """What is answered, and what the log may have of it."""

    def test_what_the_sender_wrote_is_in_the_answer_and_not_in_the_log(self):
        refusal = receiver.Refusal(400, "Unknown filter {}; {} is known", "John\r\n", "a")
        self.assertEqual((refusal.message, refusal.note),
                         ("Unknown filter John\\r\\n; a is known", "Unknown filter ...; ... is known"))
        self.assertEqual((receiver.Refusal(400, "plain {}").message, receiver.Refusal(400, "a", note="b").note),
                         ("plain {}", "b"))

    def test_no_message_in_the_program_is_made_of_anything_else_but_names_of_ours(self):
        """A text of the sender can get into a message only as one of `quoted`."""
        ours = {"limits", "self", "known", "name", "part", "limit", "allow", "MEDIA_TYPES", "MAX_LIMIT", "types", "error",
                "map", "str", "message", "reason", "problem"}
        seen = 0
        for node in ast.walk(ast.parse(PROGRAM.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Refusal", "Malformed", "Busy"):
                message = node.args[node.func.id != "Busy"]
                self.assertLessEqual({name.id for name in ast.walk(message) if isinstance(name, ast.Name)}, ours)
                seen += 1
        self.assertGreater(seen, 40)


class HeadTest(unittest.TestCase):
    """Bytes to the head of a request, by RFC 9112."""

    # Each bad head, and the good one beside it
    REFUSED = (
        ("2.2: a line ended by a bare LF", b"GET / HTTP/1.1\nHost: a\r\n\r\n", 400,
         b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
        ("2.2: a field ended by a bare LF", b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n", 400,
         b"GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n\r\n"),
        ("2.2: a bare CR in a value", head_bytes("X: a\rContent-Length: 5"), 400, head_bytes("X: a Content-Length: 5")),
        ("2.2: a bare CR in the request line", head_bytes(first="GET /\r HTTP/1.1"), 400, head_bytes()),
        ("2.2: white space before the first field", head_bytes(host=" Host: localhost"), 400, head_bytes()),
        ("2.3: HTTP/2 spoken to an HTTP/1 server", head_bytes(first="GET / HTTP/2.0"), 505, head_bytes()),
        ("2.3: a version with more digits", head_bytes(first="GET / HTTP/1.10"), 400,
         head_bytes(first="GET / HTTP/1.9")),
        ("2.3: a version in lower case", head_bytes(first="GET / http/1.1"), 400, head_bytes()),
        ("3: no version, as HTTP/0.9", head_bytes(first="GET /"), 400, head_bytes(first="GET / HTTP/1.0")),
        ("3: two spaces", head_bytes(first="GET  / HTTP/1.1"), 400, head_bytes()),
        ("3: a tab for a space", head_bytes(first="GET\t/ HTTP/1.1"), 400, head_bytes()),
        ("3: a space in the target", head_bytes(first="GET /a b HTTP/1.1"), 400,
         head_bytes(first="GET /a%20b HTTP/1.1")),
        ("3: a space at the end", head_bytes(first="GET / HTTP/1.1 "), 400, head_bytes()),
        ("3: a space at the start", head_bytes(first=" GET / HTTP/1.1"), 400, head_bytes()),
        ("3.1: a method that is no token", head_bytes(first="G(T / HTTP/1.1"), 400, head_bytes(first="PUT / HTTP/1.1")),
        ("3.2: a target that is no path", head_bytes(first="GET health HTTP/1.1"), 400, head_bytes()),
        ("3.2: raw bytes beyond ASCII in the target", head_bytes(first="GET /\xe9 HTTP/1.1"), 400,
         head_bytes(first="GET /%C3%A9 HTTP/1.1")),
        ("3.2: a fragment", head_bytes(first="GET /#a HTTP/1.1"), 400, head_bytes(first="GET /%23a HTTP/1.1")),
        ("3.2: half an escape", head_bytes(first="GET /%4 HTTP/1.1"), 400, head_bytes(first="GET /%41 HTTP/1.1")),
        ("3.2: an escape that is not hex", head_bytes(first="GET /?a=%zz HTTP/1.1"), 400,
         head_bytes(first="GET /?a=%5a HTTP/1.1")),
        ("3.2.2: another scheme", head_bytes(first="GET ftp://a/ HTTP/1.1"), 400,
         head_bytes(first="GET http://a/ HTTP/1.1")),
        ("3.2.2: a user in the target", head_bytes(first="GET http://u@a/ HTTP/1.1"), 400,
         head_bytes(first="GET http://a:80/ HTTP/1.1")),
        ("3.2.2: no host in the target", head_bytes(first="GET http:///a HTTP/1.1"), 400,
         head_bytes(first="GET HTTP://a HTTP/1.1")),
        ("3.2.2: only a port in the target", head_bytes(first="GET http://:80/ HTTP/1.1"), 400,
         head_bytes(first="GET http://[::1]:80/ HTTP/1.1")),
        ("3.2.3: a tunnel", head_bytes(first="CONNECT a:443 HTTP/1.1"), 400, head_bytes(first="GET /a:443 HTTP/1.1")),
        ("3.2.4: * for another method", head_bytes(first="GET * HTTP/1.1"), 400,
         head_bytes(first="OPTIONS * HTTP/1.1")),
        ("3.2: no Host", head_bytes(host=""), 400, head_bytes(host="", first="GET / HTTP/1.0")),
        ("3.2: two Hosts", head_bytes("Host: localhost"), 400, head_bytes("Hosts: localhost")),
        ("3.2: a list of Hosts", head_bytes(host="Host: a, b"), 400, head_bytes(host="Host: a,b")),
        ("3.2: a Host with a path", head_bytes(host="Host: a/b"), 400, head_bytes(host="Host: a")),
        ("3.2: a Host with a user", head_bytes(host="Host: u@a"), 400, head_bytes(host="Host: a:8000")),
        ("3.2: a port that is no number", head_bytes(host="Host: a:b"), 400, head_bytes(host="Host: a:")),
        ("3.2: a port without a host", head_bytes(host="Host: :80"), 400, head_bytes(host="Host:")),
        ("3.2: an address left open", head_bytes(host="Host: [::1"), 400, head_bytes(host="Host: [::1]")),
        ("5.1: a space before the colon", head_bytes("Content-Length : 5"), 400, head_bytes("Content-Length: 5")),
        ("5.1: a tab before the colon", head_bytes("X\t: 5"), 400, head_bytes("X:\t5\t")),
        ("5.1: a name that is no token", head_bytes("X[]: 5"), 400, head_bytes("X_!: 5")),
        ("5.1: no name", head_bytes(": 5"), 400, head_bytes("X: :5")),
        ("5: no colon, which would hide all that follows", head_bytes("X", "Content-Length: 5"), 400, head_bytes("X:")),
        ("5.2: a folded value", head_bytes("X: a", " b"), 400, head_bytes("X: a b")),
        ("5.2: a value folded with a tab", head_bytes("X: a", "\tb"), 400, head_bytes("X: a\tb")),
        ("9110 5.5: a NUL in a value", head_bytes("X: a\0b"), 400, head_bytes("X: a\xffb")),
        ("9110 5.5: a control in a value", head_bytes("X: a\x1bb"), 400, head_bytes("X: a[b")),
        ("9110 5.5: DEL in a value", head_bytes("X: a\x7fb"), 400, head_bytes("X: a~b")),
        ("6.1: length and coding", head_bytes("Content-Length: 5", "Transfer-Encoding: chunked"), 400,
         head_bytes("Transfer-Encoding: chunked")),
        ("6.1: two codings", head_bytes("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), 400,
         head_bytes("Transfer-Encoding: Chunked")),
        ("6.1: chunked below another coding", head_bytes("Transfer-Encoding: chunked, gzip"), 501,
         head_bytes("Transfer-Encoding: \tchunked ")),
        ("6.1: identity", head_bytes("Transfer-Encoding: identity"), 501, head_bytes("TE: identity")),
        ("6.1: a coding that only looks like it", head_bytes("Transfer-Encoding: xchunked"), 501, head_bytes()),
        ("6.1: an empty coding", head_bytes("Transfer-Encoding:"), 501, head_bytes()),
        ("6.1: chunked in HTTP/1.0", head_bytes("Transfer-Encoding: chunked", first="POST / HTTP/1.0"), 400,
         head_bytes("Content-Length: 5", first="POST / HTTP/1.0")),
        ("6.2: two lengths", head_bytes("Content-Length: 5", "Content-Length: 5"), 400,
         head_bytes("Content-Length: 5")),
        ("6.2: a list of lengths", head_bytes("Content-Length: 5, 5"), 400, head_bytes("Content-Length: 55")),
        ("6.2: a plus", head_bytes("Content-Length: +5"), 400, head_bytes("Content-Length: 05")),
        ("6.2: a minus", head_bytes("Content-Length: -5"), 400, head_bytes("Content-Length: 0")),
        ("6.2: Python's underscore", head_bytes("Content-Length: 1_0"), 400, head_bytes("Content-Length: 10")),
        ("6.2: a space inside", head_bytes("Content-Length: 1 0"), 400, head_bytes("Content-Length:  10 ")),
        ("6.2: hex", head_bytes("Content-Length: 0x5"), 400, head_bytes("Content-Length: 5")),
        ("6.2: a fraction", head_bytes("Content-Length: 5.0"), 400, head_bytes("Content-Length: 5")),
        ("6.2: digits of another script", head_bytes("Content-Length: \xb2"), 400, head_bytes("Content-Length: 2")),
        ("6.2: white space of another script", head_bytes("Content-Length: 5\xa0"), 400, head_bytes("Content-Length: 5\t")),
        ("6.2: empty", head_bytes("Content-Length:"), 400, head_bytes("Content-Length: 0")),
        ("6.2: more than fits", head_bytes("Content-Length: " + "9" * 4000), 413,
         head_bytes("Content-Length: " + "0" * 4000)),
        ("6.2: a byte too many", head_bytes("Content-Length: 1048577"), 413, head_bytes("Content-Length: 1048576")),
        ("9110 10.1.1: another expectation", head_bytes("Expect: a-pony"), 417, head_bytes("Expect: 100-Continue")),
        ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, head_bytes()),
        ("a NUL before the end has come", b"GET / HTTP/1.1\r\nX: \0", 400, head_bytes()),
    )

    def test_each_rule_of_the_rfc_refuses_what_breaks_it_and_takes_its_neighbour(self):
        for rule, bad, status, good in self.REFUSED:
            with self.subTest(rule):
                self.assertEqual(read_head([bad]), status)
                self.assertIsInstance(read_head([good]), dict)

    def test_a_refused_head_is_never_taken_when_it_comes_byte_by_byte(self):
        for rule, bad, _, good in self.REFUSED:
            with self.subTest(rule):
                self.assertIsInstance(read_head(cut(bad, *range(1, len(bad)))), int)
                self.assertEqual(read_head(cut(good, *range(1, len(good)))), read_head([good]))

    def test_a_head_says_what_the_request_is(self):
        head = read_head([head_bytes("X-A:  one ", "x-a:two", "Connection: Keep-Alive",
                                     first="POST /a%20b?c=d?e HTTP/1.1",
                                     host="Host: LocalHost:8000") + b"body"])
        self.assertEqual(tuple(head[name] for name in ("method", "path", "query", "host", "length", "chunked",
                                                       "keep_alive", "expect_continue")),
                         ("POST", "/a%20b", "c=d?e", "localhost", None, False, True, False))
        self.assertEqual(head["fields"]["x-a"], "one, two")

    def test_an_absolute_target_goes_before_the_host_header(self):
        for target, host, path, query in (("http://a.example/b?c", "a.example", "/b", "c"),
                                          ("https://A:1", "a", "/", ""), ("http://a?c", "a", "/", "c"),
                                          ("HTTP://[::1]:8/", "[::1]", "/", "")):
            with self.subTest(target):
                head = read_head([head_bytes(first=f"GET {target} HTTP/1.1", host="Host: other.example")])
                self.assertEqual((head["host"], head["path"], head["query"]), (host, path, query))
                self.assertNotIn("other", head["fields"]["host"])

    def test_who_keeps_the_connection_open(self):
        for version, lines, stays in (("1.1", (), True), ("1.1", ("Connection: close",), False),
                                      ("1.1", ("Connection: x, CLOSE",), False), ("1.1", ("Connection: closed",), True),
                                      ("1.1", ("Connection: x", "Connection: close"), False), ("1.0", (), False),
                                      ("1.0", ("Connection: Keep-Alive",), True),
                                      ("1.0", ("Connection: keep-alive, close",), False)):
            with self.subTest(version=version, lines=lines):
                self.assertEqual(read_head([head_bytes(*lines, first=f"GET / HTTP/{version}")])["keep_alive"], stays)

    def test_only_http_1_1_waits_for_our_100(self):
        for version, waits in (("1.1", True), ("1.0", False)):
            head = read_head([head_bytes("Expect: 100-continue", first=f"POST / HTTP/{version}")])
            self.assertEqual(head["expect_continue"], waits)

    def test_limits_hold_to_the_byte_however_the_head_is_cut(self):
        limits = receiver.Limits(request_line=100, header_bytes=300, header_fields=5, body=10)
        for what, make, most, status in (
                ("request line", lambda size: head_bytes(first="GET /" + "a" * (size - 14) + " HTTP/1.1"), 100, 414),
                ("headers", lambda size: head_bytes("X: " + "a" * (size - 20)), 300, 431),
                ("fields", lambda size: head_bytes(*["X: a"] * (size - 1)), 5, 431)):
            for size, wanted in ((most, dict), (most + 1, status)):
                data = make(size)
                with self.subTest(what, size=size):
                    for place in range(1, len(data)):
                        result = read_head(cut(data, place), limits)
                        self.assertEqual(result if isinstance(result, int) else type(result), wanted, f"cut at {place}")

    def test_a_short_header_limit_says_nothing_about_the_request_line(self):
        data = head_bytes(first="GET /" + "a" * 1000 + " HTTP/1.1")
        limits = LIMITS._replace(header_bytes=256)
        self.assertEqual(read_head(cut(data, 900), limits), read_head([data], limits))
        self.assertIsInstance(read_head([data], limits), dict)

    def test_an_endless_line_is_refused_as_soon_as_it_is_too_long(self):
        self.assertEqual(read_head([b"GET /" + b"a" * 8192]), 414)
        self.assertEqual(read_head([b"GET /" + b"a" * 8189]), 414)
        self.assertIsNone(read_head([b"GET /" + b"a" * 8188]))         # its CR may have come
        self.assertEqual(read_head([b"GET / HTTP/1.1\r\nX: " + b"a" * 16390]), 431)
        self.assertIsNone(read_head([b"GET / HTTP/1.1\r\nX: " + b"a" * 16000]))

    def test_stalling_with_a_line_of_blanks_costs_the_attacker_more_than_us(self):
        blanks = head_bytes("X:" + " " * 16000 + "\x01")
        ordinary = head_bytes("X:" + "a" * 16000 + "\x01")

        def cost(data):
            start = time.thread_time()
            self.assertEqual(read_head([data]), 400)
            return time.thread_time() - start
        self.assertLess(min(cost(blanks) for _ in range(3)), 100 * min(cost(ordinary) for _ in range(3)) + 0.05)

    def test_any_bytes_are_taken_alike_however_they_are_cut_or_refused_by_a_refusal(self):
        chance = random.Random(9112)
        seeds = [good for _, _, _, good in self.REFUSED] + [bad for _, bad, _, _ in self.REFUSED if len(bad) < 500]
        scraps = [b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\0", b" ", b"\t", b":", b",", b"\xff", b"Content-Length: 3\r\n",
                  b"Transfer-Encoding: chunked\r\n", b"Host: b\r\n", b"%", b"HTTP/1.1", b"/"]
        taken = 0
        for _ in range(3000):
            data = bytearray(chance.choice(seeds))
            for _ in range(chance.randrange(4)):
                at = chance.randrange(len(data) + 1)
                data[at:at + chance.choice((0, 0, 1, 3))] = chance.choice(scraps)
            data = bytes(data)
            whole = read_head([data])
            pieces = read_head(cut(data, *(chance.randrange(len(data) + 1) for _ in range(3))))
            if whole is None or isinstance(whole, dict):
                self.assertEqual(pieces, whole, data)
                taken += whole is not None
            else:
                self.assertIsInstance(pieces, int, data)
        self.assertGreater(taken, 300)


class ChunkedTest(unittest.TestCase):
    """Chunked bodies, RFC 9112 section 7.1."""

    TAKEN = (
        ("one chunk", b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
        ("several, sizes in either case and with zeros", b"A\r\n0123456789\r\n00a\r\nabcdefghij\r\n000\r\n\r\n",
         b"0123456789abcdefghij"),
        ("no bytes at all", b"0\r\n\r\n", b""),
        ("line ends within the data", b"4\r\n\r\n\r\n\r\n0\r\n\r\n", b"\r\n\r\n"),
        ("extensions, which are ignored", b"5;a=b;c=\"d;e\"\r\nhello\r\n0 ; x\r\n\r\n", b"hello"),
        ("trailers, which are ignored", b"5\r\nhello\r\n0\r\nContent-Length: 3\r\nX: y\r\n\r\n", b"hello"),
    )
    REFUSED = (
        ("a size with 0x", b"0x5\r\nhello\r\n0\r\n\r\n", 400),
        ("a negative size", b"-5\r\nhello\r\n0\r\n\r\n", 400),
        ("a size with a plus", b"+5\r\nhello\r\n0\r\n\r\n", 400),
        ("a size with an underscore", b"1_0\r\nhello\r\n0\r\n\r\n", 400),
        ("a blank before the size", b" 5\r\nhello\r\n0\r\n\r\n", 400),
        ("a blank behind the size", b"5 \r\nhello\r\n0\r\n\r\n", 400),
        ("no size", b"\r\nhello\r\n0\r\n\r\n", 400),
        ("no hex", b"g\r\nhello\r\n0\r\n\r\n", 400),
        ("a size of more bytes than there are", b"ffffffffffffffff\r\nhello\r\n0\r\n\r\n", 400),
        ("a size beyond the limit", b"100001\r\nhello\r\n0\r\n\r\n", 413),
        ("a size line ended by LF", b"5\nhello\r\n0\r\n\r\n", 400),
        ("a size line ended by CR", b"5\rhello\r\n0\r\n\r\n", 400),
        ("LF hidden in an extension", b"5;\nx\r\nhello\r\n0\r\n\r\n", 400),
        ("NUL in an extension", b"5;\0\r\nhello\r\n0\r\n\r\n", 400),
        ("a chunk longer than its size", b"4\r\nhello\r\n0\r\n\r\n", 400),
        ("a chunk shorter than its size", b"6\r\nhello\r\n0\r\n\r\n", 400),
        ("a chunk ended by LF", b"5\r\nhello\n0\r\n\r\n", 400),
        ("a chunk ended by anything else", b"5\r\nhello000\r\n\r\n", 400),
        ("a trailer without a colon", b"0\r\nabc\r\n\r\n", 400),
        ("a folded trailer", b"0\r\nX: y\r\n z\r\n\r\n", 400),
        ("a trailer ended by LF", b"0\r\nX: y\n\r\n", 400),
        ("a long extension", b"5;" + b"x" * 300 + b"\r\nhello\r\n0\r\n\r\n", 400),
        ("endless trailers", b"0\r\n" + b"X: 12345678\r\n" * 1300, 431),
    )

    def test_a_chunked_body_is_put_together(self):
        for what, data, body in self.TAKEN:
            with self.subTest(what):
                self.assertEqual(read_chunked([data]), (body, b""))

    def test_what_follows_the_body_is_given_back_wherever_the_bytes_are_cut(self):
        for what, data, body in self.TAKEN:
            data += b"GET / HTTP/1.1\r\n"
            with self.subTest(what):
                for place in range(len(data)):
                    self.assertEqual(read_chunked(cut(data, place)), (body, b"GET / HTTP/1.1\r\n"))
                self.assertEqual(read_chunked(cut(data, *range(len(data)))), (body, b"GET / HTTP/1.1\r\n"))

    def test_what_two_readers_could_take_differently_is_refused(self):
        for what, data, status in self.REFUSED:
            with self.subTest(what):
                self.assertEqual(read_chunked([data]), status)
                self.assertIsInstance(read_chunked(cut(data, *range(1, len(data)))), int)

    def test_limits_hold_to_the_byte_however_the_body_is_cut(self):
        small = LIMITS._replace(body=20)
        for data, wanted in ((b"a\r\n0123456789\r\na\r\n0123456789\r\n0\r\n\r\n", (b"0123456789" * 2, b"")),
                             (b"a\r\n0123456789\r\nb\r\n0123456789x\r\n0\r\n\r\n", 413),
                             (b"1;" + b"x" * 254 + b"\r\nz\r\n0\r\n\r\n", (b"z", b"")),
                             (b"1;" + b"x" * 255 + b"\r\nz\r\n0\r\n\r\n", 400)):
            with self.subTest(data[:30], wanted=wanted):
                for place in range(1, len(data)):
                    self.assertEqual(read_chunked(cut(data, place), small), wanted, f"cut at {place}")

    def test_a_body_without_its_end_is_not_a_body(self):
        for what, data, _ in self.TAKEN:
            for place in range(len(data)):
                self.assertIsNone(read_chunked([data[:place]]), what)

    def test_any_bytes_give_the_same_body_however_they_are_cut_or_a_refusal(self):
        chance = random.Random(71)
        for _ in range(3000):
            data = bytearray(chance.choice(self.TAKEN)[1])
            for _ in range(chance.randrange(3)):
                at = chance.randrange(len(data) + 1)
                data[at:at + chance.choice((0, 1))] = chance.choice((b"\r", b"\n", b"\r\n", b"0", b"f", b";", b" "))
            data = bytes(data)
            whole = read_chunked([data])
            pieces = read_chunked(cut(data, *(chance.randrange(len(data)) for _ in range(4))))
            if isinstance(whole, int):
                self.assertIsInstance(pieces, int, data)
            else:
                self.assertEqual(pieces, whole, data)


# =============================================================================
# Credentials
# =============================================================================

SENT_AT = 1750000000            # the present in the tests of signatures, in Unix seconds
BODY = json.dumps(event()).encode()
STANDARD_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def base64_of(data):
    return base64.b64encode(data).decode()


def hmac_of(key, *parts):
    """Written apart from the product: keyed anew, over one whole message."""
    return hmac.new(key, b"".join(parts), hashlib.sha256).digest()


def signed_standard(key, body, at, names="webhook"):
    digest = hmac_of(key, b"msg_1.%d." % at, body)
    return {f"{names}-id": "msg_1", f"{names}-timestamp": str(at), f"{names}-signature": "v1," + base64_of(digest)}


def signed_zocdoc(key, body, at, version="v1"):
    digest = hmac_of(key, b"%d." % at, body)
    return {"webhook-timestamp": str(at), "webhook-signature": f"{version}:{base64_of(digest)}"}


def signed_stripe(key, body, at, header="stripe-signature"):
    return {header: f"t={at},v1={hmac_of(key, b'%d.' % at, body).hex()}"}


def signed_v0(key, body, at, header, time_header):
    return {time_header: str(at), header: "v0=" + hmac_of(key, b"v0:%d:" % at, body).hex()}


SLACK = {"header": "X-Slack-Signature", "timestamp_header": "X-Slack-Request-Timestamp", "prefix": "v0=",
         "encoding": "hex", "template": "v0:{timestamp}:{body}"}
ZOOM = {**SLACK, "header": "x-zm-signature", "timestamp_header": "x-zm-request-timestamp"}

# How each sender signs: settings without secrets, a key as a secret, and the fields of a request with a signature
SENDERS = {
    "standard": ({"profile": "standard"}, lambda key: "whsec_" + base64_of(key), signed_standard),
    "svix": ({"profile": "standard"}, lambda key: "whsec_" + base64_of(key),
             functools.partial(signed_standard, names="svix")),
    "github": ({"profile": "github"}, bytes.decode,
               lambda key, body, at: {"x-hub-signature-256": "sha256=" + hmac_of(key, body).hex()}),
    "websub": ({"profile": "websub"}, bytes.decode,
               lambda key, body, at: {"x-hub-signature": "sha256=" + hmac_of(key, body).hex()}),
    "stripe": ({"profile": "stripe"}, bytes.decode, signed_stripe),
    "calendly": ({"profile": "stripe", "header": "Calendly-Webhook-Signature"}, bytes.decode,
                 functools.partial(signed_stripe, header="calendly-webhook-signature")),
    "zocdoc": ({"profile": "zocdoc"}, base64_of, signed_zocdoc),
    "zocdoc's second": ({"profile": "zocdoc"}, base64_of, functools.partial(signed_zocdoc, version="v2")),
    "acuity": ({"profile": "acuity"}, bytes.decode,
               lambda key, body, at: {"x-acuity-signature": base64_of(hmac_of(key, body))}),
    "calcom": ({"profile": "calcom"}, bytes.decode,
               lambda key, body, at: {"x-cal-signature-256": hmac_of(key, body).hex()}),
    "slack": (SLACK, bytes.decode,
              functools.partial(signed_v0, header="x-slack-signature", time_header="x-slack-request-timestamp")),
    "zoom": (ZOOM, bytes.decode,
             functools.partial(signed_v0, header="x-zm-signature", time_header="x-zm-request-timestamp")),
    "hex key, body first": ({"header": "x-sig", "timestamp_header": "x-time", "encoding": "base64", "key": "hex",
                             "template": "{body}\n{timestamp}%"}, bytes.hex,
                            lambda key, body, at: {"x-time": str(at), "x-sig": base64_of(
                                hmac_of(key, body, b"\n%d%%" % at))}),
}


class SignatureTest(unittest.TestCase):
    schema = Schema(receiver.SIGNATURE_SCHEMA)

    def scheme(self, *secrets, **settings):
        """A scheme whose settings the schema takes as well."""
        settings["secrets"] = list(secrets)
        self.assertEqual(self.schema.errors(settings), [])
        return receiver.SignatureScheme(settings)

    def head(self, fields):
        head = receiver.Head()
        head.fields = fields
        return head

    def problem(self, scheme, fields, body=BODY, now=SENT_AT):
        return scheme.problem(self.head(fields), body, now)

    def each_sender(self):
        """(name, secret_of, sign, new scheme(*secrets)) of all, each as a subTest."""
        for name, (settings, secret_of, sign) in SENDERS.items():
            with self.subTest(name):
                yield name, secret_of, sign, functools.partial(self.scheme, **settings)

    # -- what senders themselves publish

    def test_the_example_of_standard_webhooks(self):
        for names in ("webhook", "svix"):
            fields = {f"{names}-id": "msg_p5jXN8AQM9LWM0D4loKWxJek", f"{names}-timestamp": "1614265330",
                      f"{names}-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="}
            scheme = self.scheme(STANDARD_SECRET, profile="standard")
            self.assertEqual(self.problem(scheme, fields, b'{"test": 2432232314}', 1614265330), "")
            self.assertEqual(self.problem(scheme, fields, b'{"test": 2432232315}', 1614265330), "no signature fits")

    def test_the_example_of_github(self):
        fields = {"x-hub-signature-256":
                  "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"}
        scheme = self.scheme("It's a Secret to Everybody", profile="github")
        self.assertEqual(self.problem(scheme, fields, b"Hello, World!"), "")
        self.assertEqual(self.problem(scheme, fields, b"Hello, world!"), "no signature fits")

    def test_the_example_of_slack(self):
        body = (b"token=xyzz0WbapA4vBCDEFasx0q6G&team_id=T1DC2JH3J&team_domain=testteamnow&channel_id=G8PSS9T3V"
                b"&channel_name=foobar&user_id=U2CERLKJA&user_name=roadrunner&command=%2Fwebhook-collect&text="
                b"&response_url=https%3A%2F%2Fhooks.slack.com%2Fcommands%2FT1DC2JH3J%2F397700885554%2F"
                b"96rGlfmibIGlgcZRskXaIFfN&trigger_id=398738663015.47445629121.803a0bc887a14d10d2c447fce8b6703c")
        fields = {"x-slack-request-timestamp": "1531420618", "x-slack-signature":
                  "v0=a2114d57b48eac39b9ad189dd8316235a7b4a8d21a10bd27519666489c69b503"}
        scheme = self.scheme("8f742231b10e8888abcd99yyyzzz85a5", **SLACK)
        self.assertEqual(self.problem(scheme, fields, body, 1531420618), "")
        self.assertEqual(self.problem(scheme, fields, body + b"&", 1531420618), "no signature fits")

    def test_the_example_key_of_zocdoc_whose_last_bits_a_strict_decoder_would_refuse(self):
        secret = "g9Y9hjTUk9KKH7ffBRbtRmJYo2OISsdMK4flbfDa3zR="
        fields = signed_zocdoc(base64.b64decode(secret), BODY, SENT_AT)
        self.assertEqual(self.problem(self.scheme(secret, profile="zocdoc"), fields), "")

    # -- every sender

    def test_every_senders_signature_is_taken_and_no_change_of_it(self):
        for name, secret_of, sign, new_scheme in self.each_sender():
            scheme, fields = new_scheme(secret_of(b"k" * 24)), sign(b"k" * 24, BODY, SENT_AT)
            self.assertEqual(self.problem(scheme, fields), "")
            self.assertEqual(self.problem(scheme, fields, bytearray(BODY)), "")
            for body in (BODY + b" ", BODY[:-1], b"", BODY.replace(b"PAT-1", b"PAT-2")):
                self.assertEqual(self.problem(scheme, fields, body), "no signature fits")
            self.assertEqual(self.problem(new_scheme(secret_of(b"K" * 24)), fields), "no signature fits")
            for field, value in fields.items():
                for at in range(len(value)):
                    changed = {**fields, field: value[:at] + chr(ord(value[at]) ^ 1) + value[at + 1:]}
                    self.assertNotEqual(self.problem(scheme, changed), "", changed)
                    self.assertNotEqual(self.problem(scheme, {**fields, field: value[:at] + value[at + 1:]}), "")

    def test_a_part_that_is_missing_is_named(self):
        for name, secret_of, sign, new_scheme in self.each_sender():
            fields = sign(b"k" * 24, BODY, SENT_AT)
            for field in fields:
                others = {other: value for other, value in fields.items() if other != field}
                found = self.problem(new_scheme(secret_of(b"k" * 24)), others)
                self.assertEqual(found.replace("svix", "webhook"), f"{field} is missing".replace("svix", "webhook"))
                self.assertEqual(self.problem(new_scheme(secret_of(b"k" * 24)), {**others, field: ""}),
                                 f"{field} is missing")

    def test_another_version_or_algorithm_is_no_signature(self):
        good = {name: sign(b"k" * 24, BODY, SENT_AT) for name, (_, _, sign) in SENDERS.items()}
        for name, wrong in (("standard", "v1a,"), ("standard", "v2,"), ("standard", "V1,"), ("standard", ""),
                            ("github", "sha1="), ("websub", "sha1="), ("websub", "sha512="), ("github", "sha256:"),
                            ("stripe", "v0="), ("zocdoc", "v3:"), ("slack", "v1="), ("acuity", "v1,"),
                            ("calcom", "sha256=")):
            with self.subTest(name, prefix=wrong):
                settings, secret_of, _ = SENDERS[name]
                scheme = self.scheme(secret_of(b"k" * 24), **settings)
                prefix = scheme._prefixes[0]
                fields = {field: value.replace(prefix, wrong) if prefix else wrong + value
                          for field, value in good[name].items()}
                self.assertEqual(self.problem(scheme, fields), "the signature header cannot be read")
        sha1 = {"x-hub-signature": "sha1=" + hmac.new(b"k", BODY, hashlib.sha1).hexdigest()}
        self.assertEqual(self.problem(self.scheme("k", profile="websub"), sha1),
                         "the signature header cannot be read")
        self.assertEqual(self.problem(self.scheme("k", profile="calcom"), {"x-cal-signature-256": "no-secret-provided"}),
                         "the signature header cannot be read")

    def test_while_a_secret_is_changed_the_old_and_the_new_one_both_fit(self):
        for name, secret_of, sign, new_scheme in self.each_sender():
            scheme = new_scheme(secret_of(b"old" * 9), secret_of(b"new" * 9))
            for key, wanted in ((b"old" * 9, ""), (b"new" * 9, ""), (b"odd" * 9, "no signature fits")):
                self.assertEqual(self.problem(scheme, sign(key, BODY, SENT_AT)), wanted)

    def test_a_signature_is_taken_for_300_seconds_both_ways_where_the_time_is_signed(self):
        for name, secret_of, sign, new_scheme in self.each_sender():
            scheme, fields = new_scheme(secret_of(b"k" * 24)), sign(b"k" * 24, BODY, SENT_AT)
            is_timed = str(SENT_AT) in str(fields)
            for now, problem in ((300, ""), (-300, ""), (301, "the timestamp is 301 s old"),
                                 (300.01, "the timestamp is 301 s old"), (-301, "the timestamp is 301 s ahead"),
                                 (10 ** 8, "the timestamp is 100000000 s old")):
                self.assertEqual(self.problem(scheme, fields, now=SENT_AT + now), problem * is_timed)
            if is_timed:
                patient = new_scheme(secret_of(b"k" * 24), tolerance=86400)
                self.assertEqual(self.problem(patient, fields, now=SENT_AT + 86400), "")
                self.assertEqual(self.problem(patient, fields, now=SENT_AT + 86401), "the timestamp is 86401 s old")

    def test_a_time_is_digits_and_nothing_else(self):
        scheme = self.scheme("k", **SLACK)
        for text in (f"+{SENT_AT}", f"-{SENT_AT}", f"{SENT_AT}.0", "1.75e9", "nan", "inf", "0x684ee180", f" {SENT_AT}",
                     "1_750_000_000", "1750000000, 1750000000", "²", "1²", "\xb9750000000", "x", "9" * 13, "9" * 9000,
                     f"{SENT_AT}000", "١٧٥٠٠٠٠٠٠٠"):
            with self.subTest(text[:30]):
                digest = hmac_of(b"k", f"v0:{text}:".encode(), BODY)
                fields = {"x-slack-request-timestamp": text, "x-slack-signature": "v0=" + digest.hex()}
                self.assertEqual(self.problem(scheme, fields), "the timestamp cannot be read")
        last = {"x-slack-request-timestamp": "9" * 12, "x-slack-signature": "v0=" + "0" * 64}
        self.assertEqual(self.problem(scheme, last), "the timestamp is 998249999999 s ahead")
        leading = signed_v0(b"k", BODY, SENT_AT, "x-slack-signature", "x-slack-request-timestamp")
        leading = {**leading, "x-slack-request-timestamp": f"0{SENT_AT}"}
        self.assertEqual(self.problem(scheme, leading), "no signature fits")

    # -- several signatures

    def test_one_of_several_signatures_is_enough(self):
        good, other = (base64_of(hmac_of(key, b"msg_1.%d." % SENT_AT, BODY)) for key in (b"k" * 24, b"o" * 24))
        scheme = self.scheme("whsec_" + base64_of(b"k" * 24), profile="standard")
        fields = signed_standard(b"k" * 24, BODY, SENT_AT)
        ed25519 = base64_of(bytes(64))
        for value, problem in ((f"v1,{other} v1,{good}", ""), (f"v1,{good} v1,{other}", ""),
                               (f"v1a,{ed25519} v1,{good}", ""), (f"v1,{good} v1a,{ed25519}", ""),
                               (f"v2,x v1,{good} garbage", ""), (f"  v1,{good} ", ""),
                               (f"v1,{other} v1,{other}", "no signature fits"),
                               (f"v1a,{ed25519}", "the signature header cannot be read"),
                               (f"v1,{good};v1,{other}", "the signature header cannot be read")):
            with self.subTest(value):
                self.assertEqual(self.problem(scheme, {**fields, "webhook-signature": value}), problem)

    def test_stripes_list_has_its_time_and_signatures_in_any_order(self):
        scheme, good, other = self.scheme("k", profile="stripe"), hmac_of(b"k", b"%d." % SENT_AT, BODY).hex(), "0" * 64
        time_part = f"t={SENT_AT}"
        unreadable = "the signature header cannot be read"
        for value, problem in ((f"{time_part},v1={good},v0={other}", ""), (f"v1={good},{time_part}", ""),
                               (f"v0={other},v1={other},{time_part},v1={good}", ""), (f"{time_part},v1={good.upper()}", ""),
                               (f"{time_part},v0={good}", unreadable), (time_part, unreadable),
                               (f"{time_part},v1={other}", "no signature fits"),
                               (f"v1={good}", "the timestamp cannot be read"),
                               (f"t=,v1={good}", "the timestamp cannot be read"),
                               (f"{time_part},{time_part},v1={good}", "the timestamp cannot be read"),
                               (f"t=17500,t=00000,v1={good}", "the timestamp cannot be read"),
                               (f"T={SENT_AT},v1={good}", "the timestamp cannot be read"),
                               (f"t={SENT_AT + 1},v1={good}", "no signature fits")):
            with self.subTest(value):
                self.assertEqual(self.problem(scheme, {"stripe-signature": value}), problem)

    def test_a_signature_header_that_somebody_added_is_not_read_past(self):
        for name, secret_of, sign, new_scheme in self.each_sender():
            scheme, fields = new_scheme(secret_of(b"k" * 24)), sign(b"k" * 24, BODY, SENT_AT)
            lines = [f"{field}: {value}" for field, value in fields.items()]
            header = next(field for field in fields if "signature" in field or field == "x-sig")
            for count, problem in ((1, ""), (2, "the signature header cannot be read")):
                data = head_bytes(*lines, *[f"{header}: {fields[header]}"] * (count - 1))
                head = receiver.Head()
                receiver.parse_head(data, head, LIMITS)
                self.assertEqual(scheme.problem(head, BODY, SENT_AT), problem)
        spaced = self.scheme("k", header="x-sig", separator=", ", prefix="s=", encoding="hex", template="{body}")
        self.assertEqual(self.problem(spaced, {"x-sig": "a=1, s=" + hmac_of(b"k", BODY).hex()}), "")

    def test_no_more_than_16_signatures_are_looked_at(self):
        scheme, good = self.scheme("k", profile="stripe"), "v1=" + hmac_of(b"k", b"%d." % SENT_AT, BODY).hex()
        for before, problem in ((14, ""), (15, "no signature fits"), (16000 // 68, "no signature fits")):
            value = ",".join([f"t={SENT_AT}"] + ["v1=" + "0" * 64] * before + [good])
            self.assertEqual(self.problem(scheme, {"stripe-signature": value}), problem)

    def test_every_secret_is_compared_with_every_signature_whichever_fits(self):
        scheme = self.scheme("a", "b", "c", profile="stripe")
        for key in (b"a", b"b", b"c", b"d"):
            digest = hmac_of(key, b"%d." % SENT_AT, BODY).hex()
            fields = {"stripe-signature": f"t={SENT_AT},v1={digest},v1={'0' * 64}"}
            with mock.patch.object(receiver.hmac, "compare_digest", wraps=hmac.compare_digest) as compare:
                self.problem(scheme, fields)
            self.assertEqual(compare.call_count, 6)

    # -- spellings

    def test_hex_may_be_in_either_case_and_base64_has_one_spelling(self):
        digest = hmac_of(b"k", BODY)
        scheme = self.scheme("k", profile="calcom")
        for text in (digest.hex(), digest.hex().upper()):
            self.assertEqual(self.problem(scheme, {"x-cal-signature-256": text}), "")
        scheme, text = self.scheme("k", profile="acuity"), base64_of(digest)
        self.assertEqual(self.problem(scheme, {"x-acuity-signature": text}), "")
        alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
        sibling = text[:42] + alphabet[alphabet.index(text[42]) + 1] + "="
        self.assertEqual(base64.b64decode(sibling), digest)
        for other in (sibling, text[:-1], text + "=", text.rstrip("=") + " ", text.replace("=", "\xa0"),
                      base64.urlsafe_b64encode(digest).decode() + "-", text[:20] + " " + text[20:], digest.hex()):
            self.assertNotEqual(self.problem(scheme, {"x-acuity-signature": other}), "", other)

    def test_an_id_is_signed_as_it_stands_whatever_it_looks_like(self):
        key = base64.b64decode(STANDARD_SECRET[6:])
        for name in ("{timestamp}", "{body}", "%(timestamp)s", "%s", "a.b", "\xe9\xff", "x" * 8000, "a, b"):
            with self.subTest(name[:20]):
                digest = hmac_of(key, name.encode("latin-1"), b".%d." % SENT_AT, BODY)
                fields = {"webhook-id": name, "webhook-timestamp": str(SENT_AT),
                          "webhook-signature": "v1," + base64_of(digest)}
                scheme = self.scheme(STANDARD_SECRET, profile="standard")
                self.assertEqual(self.problem(scheme, fields), "")
                self.assertEqual(self.problem(scheme, {**fields, "webhook-id": name + "x"}), "no signature fits")

    def test_a_template_is_text_around_its_holes(self):
        fields = {"x-time": str(SENT_AT), "x-id": "7"}
        for template, message in (("%(body)s{body}", b"%(body)s[]"), ("100%{id}{{body}}", b"100%7{[]}"),
                                  ("{body}", b"[]"), ("{body}%s{id}{id}", b"[]%s77"),
                                  ("{timestamp}\n{body}\r\n", b"1750000000\n[]\r\n"), ("{ {body} }", b"{ [] }")):
            with self.subTest(template):
                extra = {"id_header": "X-Id"} if "{id}" in template else {}
                extra.update({"timestamp_header": "X-Time"} if "{timestamp}" in template else {})
                scheme = self.scheme("k", header="X-Sig", encoding="hex", template=template, **extra)
                self.assertEqual(self.problem(scheme, {**fields, "x-sig": hmac_of(b"k", message).hex()}, b"[]"), "")

    def test_the_same_key_in_every_form_of_a_secret(self):
        key = b"\xfb\xef" * 13
        for kind, secret in (("base64", base64_of(key)), ("base64", base64_of(key).rstrip("=")), ("hex", key.hex()),
                             ("hex", key.hex().upper()), ("whsec", "whsec_" + base64_of(key)),
                             ("whsec", "whsec_" + base64_of(key).rstrip("=")), ("whsec", base64_of(key))):
            with self.subTest(secret):
                scheme = self.scheme(secret, profile="github", key=kind)
                fields = {"x-hub-signature-256": "sha256=" + hmac_of(key, BODY).hex()}
                self.assertEqual(self.problem(scheme, fields), "")
        for secret in ("whsec_5Z", "pässwörd", " with spaces "):            # as they are, whatever they look like
            fields = {"x-hub-signature-256": "sha256=" + hmac_of(secret.encode(), BODY).hex()}
            self.assertEqual(self.problem(self.scheme(secret, profile="github"), fields), "")

    def test_a_profile_may_be_changed_in_part(self):
        scheme = self.scheme("k", profile="github", header="X-Mine", prefix="")
        self.assertEqual(self.problem(scheme, {"x-mine": hmac_of(b"k", BODY).hex()}), "")
        untimed = self.scheme("whsec_a2tr", profile="standard", template="{body}")
        fields = {"webhook-signature": "v1," + base64_of(hmac_of(b"kkk", BODY)), "webhook-timestamp": "1"}
        self.assertEqual(self.problem(untimed, fields), "")

    # -- is it there

    def test_a_signature_counts_as_shown_by_its_header_alone(self):
        for name, secret_of, sign, new_scheme in self.each_sender():
            scheme, fields = new_scheme(secret_of(b"k" * 24)), sign(b"k" * 24, BODY, SENT_AT)
            header = next(field for field in fields if "signature" in field or field == "x-sig")
            for shown, wanted in ((fields, True), ({header: ""}, True), ({header: "\xff"}, True), ({}, False),
                                  ({"authorization": "Bearer x", "x-signature": "v1"}, False),
                                  ({field: "1" for field in fields if field != header}, False)):
                self.assertIs(scheme.is_shown(self.head(shown)), wanted)

    def test_svix_names_are_those_of_the_standard_only(self):
        standard = self.scheme(STANDARD_SECRET, profile="standard")
        self.assertEqual(self.problem(standard, {}), "webhook-signature is missing")
        key = base64.b64decode(STANDARD_SECRET[6:])
        fields = signed_standard(key, BODY, SENT_AT, names="svix")
        mixed = {**fields, "webhook-signature": "v1,"}              # the standard's own names go first, and none are mixed
        self.assertEqual(self.problem(standard, mixed), "webhook-id is missing")
        self.assertEqual(self.problem(standard, {**mixed, **signed_standard(key, BODY, SENT_AT)}), "")
        zocdoc = self.scheme(base64_of(key), profile="zocdoc")
        fields = {name.replace("webhook", "svix"): value for name, value in signed_zocdoc(key, BODY, SENT_AT).items()}
        self.assertFalse(zocdoc.is_shown(self.head(fields)))
        self.assertEqual(self.problem(zocdoc, fields), "webhook-signature is missing")

    # -- attacks

    def test_garbage_is_refused_in_words_of_our_own_and_never_raises(self):
        chance = random.Random(20250110)
        words = ("v1,", "v1=", "t=", "v1:", "sha256=", ",", " ", ";", ", ", "=", str(SENT_AT), "0" * 64, "A" * 43 + "=",
                 "\xff" * 44, "\xb2", "%s", "{body}", "\t", "whsec_", "", "x" * 64, "é" * 64)
        schemes = [self.scheme(secret_of(b"k" * 24), **settings) for settings, secret_of, _ in SENDERS.values()]
        names = sorted({name for scheme in schemes for name in scheme._names + scheme._other_names if name})
        own = re.compile(r"no signature fits|the signature header cannot be read|the timestamp cannot be read|"
                         r"the timestamp is \d+ s (old|ahead)|[a-z0-9-]+ is missing")
        for _ in range(4000):
            fields = {name: "".join(chance.choices(words, k=chance.randrange(8))) for name in names
                      if chance.random() < 0.9}
            if chance.random() < 0.1:
                fields[chance.choice(names)] = bytes(chance.choices(range(32, 256), k=70)).decode("latin-1")
            body = bytes(chance.choices(range(256), k=chance.randrange(40)))
            scheme = chance.choice(schemes)
            found = scheme.problem(self.head(fields), body, SENT_AT + chance.random())
            self.assertTrue(own.fullmatch(found), (found, fields))
            if found.endswith("is missing"):
                self.assertIn(found.split(" ")[0], names)

    def test_headers_of_16_kib_are_refused_after_a_bounded_number_of_comparisons(self):
        for name, secret_of, sign, new_scheme in self.each_sender():
            scheme = new_scheme(*(secret_of(b"%024d" % number) for number in range(100)))
            fields = sign(b"k" * 24, BODY, SENT_AT)
            for filler in (" ", ",", ";", "v1=", "t=", "v1," + "A" * 43 + "= ", "v1=" + "0" * 64 + ","):
                long = {field: (filler * 16000)[:16000] for field in fields}
                for field in fields:
                    self.assertNotEqual(self.problem(scheme, {**fields, field: long[field]}), "")
            with mock.patch.object(receiver.hmac, "compare_digest", wraps=hmac.compare_digest) as compare:
                self.problem(scheme, {**fields, **{field: (fields[field] + " ,;") * 100 for field in fields}})
            self.assertLessEqual(compare.call_count, 1600)

    def test_threads_may_share_a_scheme(self):
        scheme = self.scheme(STANDARD_SECRET, profile="standard")
        key, wrong = base64.b64decode(STANDARD_SECRET[6:]), []

        def check(thread):
            for number in range(300):
                body = b"%d %d" % (thread, number) * (1 + number % 2 * 500)
                fields = signed_standard(key, body, SENT_AT)
                if self.problem(scheme, fields, body) or not self.problem(scheme, fields, body + b"x"):
                    wrong.append((thread, number))

        threads = [threading.Thread(target=check, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        self.assertEqual(wrong, [])

    # -- settings

    def test_the_schema_tells_what_is_wrong_with_settings(self):
        good = {"profile": "github", "secrets": ["x"]}
        self.assertEqual(self.schema.errors(good), [])
        for changes, path, message in (
                ({"secrets": ...}, "/secrets", "Missing required field: secrets"),
                ({"secrets": []}, "/secrets", "Field 'secrets' must not be empty"),
                ({"secrets": "x"}, "/secrets", "Field 'secrets' must be of type array"),
                ({"secrets": ["x", ""]}, "/secrets/1", "Field 'secrets[1]' must not be empty"),
                ({"secrets": [str(number) for number in range(101)]}, "/secrets",
                 "Field 'secrets' must have at most 100 items"),
                ({"secret": "x"}, "/secret", "Field 'secret' is not a known field"),
                ({"profile": "gitlab"}, "/profile", "Field 'profile' must be one of: standard, github, websub, stripe, "
                                                    "zocdoc, acuity, calcom"),
                ({"header": "X Sig"}, "/header", "Field 'header' must match the pattern ^[0-9A-Za-z_-]{1,100}$"),
                ({"header": "X-Sig:"}, "/header", "Field 'header' must match the pattern ^[0-9A-Za-z_-]{1,100}$"),
                ({"encoding": "base32"}, "/encoding", "Field 'encoding' must be one of: hex, base64"),
                ({"key": "text"}, "/key", "Field 'key' must be one of: raw, base64, hex, whsec"),
                ({"separator": "v"}, "/separator", "Field 'separator' must match the pattern ^[^0-9A-Za-z+/=]{1,10}$"),
                ({"timestamp_prefix": ""}, "/timestamp_prefix", "Field 'timestamp_prefix' must not be empty"),
                ({"template": "é{body}"}, "/template", "Field 'template' must match the pattern ^[\\x00-\\x7f]*$"),
                ({"tolerance": 0}, "/tolerance", "Field 'tolerance' must be at least 1"),
                ({"tolerance": 10 ** 9}, "/tolerance", "Field 'tolerance' must be at most 604800"),
                ({"tolerance": "300"}, "/tolerance", "Field 'tolerance' must be of type integer")):
            with self.subTest(changes):
                settings = {name: value for name, value in {**good, **changes}.items() if value is not ...}
                found = [(problem.path, problem.message) for problem in self.schema.errors(settings)]
                self.assertEqual(found, [(path, message)])

    def test_settings_that_cannot_work_are_told_by_their_place(self):
        plain = {"header": "x-sig", "encoding": "hex", "template": "{body}"}
        timed = {**plain, "template": "{timestamp}.{body}"}
        needed = "is missing; a profile, or header, encoding and template are needed"
        for settings, message in (
                ({}, f"/header: {needed}"),
                ({"header": "x-sig"}, f"/encoding: {needed}"),
                ({"header": "x-sig", "encoding": "hex"}, f"/template: {needed}"),
                ({**plain, "template": ""}, "/template: must have {body}, once"),
                ({**plain, "template": "body"}, "/template: must have {body}, once"),
                ({**plain, "template": "{body}{body}"}, "/template: must have {body}, once"),
                ({**plain, "template": "{url}{body}"}, "/template: knows {id}, {timestamp} and {body} only"),
                ({**plain, "template": "{}{body}"}, "/template: knows {id}, {timestamp} and {body} only"),
                ({**plain, "template": "{id}{body}"}, "/template: {id} needs id_header"),
                (timed, "/template: {timestamp} needs timestamp_header or timestamp_prefix"),
                ({**timed, "timestamp_prefix": "t="}, "/timestamp_prefix: needs a separator"),
                ({"profile": "stripe", "timestamp_header": "x-time"},
                 "/timestamp_header: the time stands behind timestamp_prefix already"),
                ({**plain, "timestamp_header": "x-time"},
                 "/timestamp_header: has no use: {timestamp} is not in the template"),
                ({**plain, "id_header": "x-id"}, "/id_header: has no use: {id} is not in the template"),
                ({"profile": "github", "tolerance": 60}, "/tolerance: has no use: {timestamp} is not in the template"),
                ({"profile": "stripe", "prefix": "v1,"}, "/prefix: must not hold the separator")):
            with self.subTest(settings):
                with self.assertRaises(ValueError) as caught:
                    self.scheme("x", **settings)
                self.assertEqual(str(caught.exception), message)

    def test_a_secret_that_is_no_key_is_told_by_its_place_and_never_repeated(self):
        for kind, secret, message in (
                ("base64", "hunter2 hunter2", "must be base64"), ("base64", "aGk*", "must be base64"),
                ("base64", "aGk=\n", "must be base64"), ("base64", "a", "must be base64"), ("base64", "é", "must be base64"),
                ("base64", "aG=k", "must be base64"), ("base64", "-_-_", "must be base64"),
                ("base64", "=", "must be base64"), ("base64", "aGk====", "must be base64"),
                ("hex", "hunter2", "must be hex digits"), ("hex", "abc", "must be hex digits"),
                ("hex", "ab cd", "must be hex digits"), ("hex", "ſé", "must be hex digits"),
                ("whsec", "whsec_hunter2 !", "must be whsec_ and base64"),
                ("whsec", "whpk_aGk=", "must be whsec_ and base64"),
                ("whsec", "whsec_", "must not be an empty key"), ("raw", "\ud800", "must be Unicode")):
            with self.subTest(secret, kind=kind):
                with self.assertRaises(ValueError) as caught:
                    receiver.SignatureScheme({"profile": "github", "secrets": ["aGk=" if kind != "hex" else "aa", secret],
                                              "key": kind})
                self.assertEqual(str(caught.exception), f"/secrets/1: {message}")
                shown = "".join(traceback.format_exception(None, caught.exception, None))
                self.assertEqual(shown, f"ValueError: /secrets/1: {message}\n")    # no decoder's error before it

    def test_a_scheme_shows_no_secret_and_no_key(self):
        scheme = self.scheme("hunter2", profile="github")
        self.assertNotIn("hunter2", repr(vars(scheme)))

    def test_every_profile_is_a_row_of_parameters_that_the_schema_knows(self):
        for name, row in receiver.SIGNATURE_PROFILES.items():
            with self.subTest(name):
                self.assertLessEqual(set(row), set(receiver.SIGNATURE_SCHEMA["properties"]))
                for prefix in [row.get("prefix", "")] if name != "zocdoc" else row["prefix"]:
                    settings = {**row, "prefix": prefix, "secrets": ["aGk="]}
                    self.assertEqual(self.schema.errors(settings), [])
                self.assertIn(name, SENDERS)


OFFICIAL_CLIENTS = os.environ.get("OFFICIAL_CLIENTS")


@unittest.skipUnless(OFFICIAL_CLIENTS, "OFFICIAL_CLIENTS does not name a Python with standardwebhooks, svix and stripe")
class OfficialSenderTest(unittest.TestCase):
    """What the official libraries sign and how they judge, next to what we say of it."""

    PROGRAM = '''
import datetime, json, sys
import standardwebhooks, stripe, svix.webhooks

asked = json.load(sys.stdin)

def verdict(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception:
        return False
    return True

def sign(library, secret, body, at):
    if library == "stripe":
        signed = stripe.WebhookSignature._compute_signature(f"{at}.{body}", secret)
        return {"stripe-signature": f"t={at},v1={signed}"}
    webhook = {"standardwebhooks": standardwebhooks.Webhook, "svix": svix.webhooks.Webhook}[library](secret)
    names = "svix" if library == "svix" else "webhook"
    signature = webhook.sign("msg_1", datetime.datetime.fromtimestamp(at, datetime.timezone.utc), body)
    return {f"{names}-id": "msg_1", f"{names}-timestamp": str(at), f"{names}-signature": signature}

def takes(library, secret, body, fields):
    if library == "stripe":
        return verdict(stripe.WebhookSignature.verify_header, body, fields["stripe-signature"], secret, 300)
    return verdict({"standardwebhooks": standardwebhooks.Webhook, "svix": svix.webhooks.Webhook}[library](secret).verify,
                   body, fields)

json.dump([globals()[name](*arguments) for name, *arguments in asked], sys.stdout)
'''
    LIBRARIES = {"standardwebhooks": "standard", "svix": "standard", "stripe": "stripe"}
    SECRET = {"standardwebhooks": STANDARD_SECRET, "svix": STANDARD_SECRET, "stripe": "whsec_abc123"}
    BODIES = (BODY.decode(), "{}", '{"notes": "Zoë\\u2028 € 😀"}', '{"a": "' + "x" * 5000 + '"}')

    def ask(self, questions):
        """The answers of PROGRAM's functions: [(name, *arguments)] to a list of what they gave."""
        done = subprocess.run([OFFICIAL_CLIENTS, "-c", self.PROGRAM], input=json.dumps(questions).encode(),
                              capture_output=True, timeout=WAIT)
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        return json.loads(done.stdout)

    def problem(self, library, fields, body, now):
        head = receiver.Head()
        head.fields = fields
        settings = {"profile": self.LIBRARIES[library], "secrets": [self.SECRET[library]]}
        return receiver.SignatureScheme(settings).problem(head, body.encode(), now)

    def test_what_they_sign_is_taken_unchanged(self):
        cases = [(library, body) for library in self.LIBRARIES for body in self.BODIES]
        answers = self.ask([("sign", library, self.SECRET[library], body, SENT_AT) for library, body in cases])
        for (library, body), fields in zip(cases, answers):
            with self.subTest(library, body=body[:30]):
                self.assertEqual(self.problem(library, fields, body, SENT_AT), "")
                self.assertEqual(self.problem(library, fields, body + " ", SENT_AT), "no signature fits")

    def test_they_judge_what_we_judge_in_the_same_way(self):
        now = int(time.time())
        changes = [(library, at, other, edit) for library in self.LIBRARIES for at in (now, now - 280, now - 320)
                   for other in (False, True) for edit in range(6)]
        signed = self.ask([("sign", library, self.SECRET[library], BODY.decode() + " " * other, at)
                           for library, at, other, _ in changes])
        cases = []
        for (library, at, other, edit), fields in zip(changes, signed):
            header = next(name for name in fields if name.endswith("signature"))
            separator, prefix = {"stripe": (",", "v1=")}.get(library, (" ", "v1,"))
            stranger = prefix + {"stripe": "0" * 64}.get(library, base64_of(bytes(32)))
            value = fields[header]
            fields[header] = (value, stranger + separator + value, value + separator + stranger,
                              value.replace(prefix, "v2" + prefix[-1]), value[:-9] + value[-8:],
                              value.replace(prefix, "v0" + prefix[-1]) + separator + stranger)[edit]
            cases.append((library, fields))
        theirs = self.ask([("takes", library, self.SECRET[library], BODY.decode(), fields) for library, fields in cases])
        for (library, fields), taken in zip(cases, theirs):
            with self.subTest(library, fields=fields):
                self.assertEqual(not self.problem(library, fields, BODY.decode(), time.time()), taken)
        self.assertEqual(sum(theirs), 18)       # three libraries, two times, three edits: nothing else passes


LOCALHOST_PEM = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgXMbWP9r/tOzp50dG
R3lT6csMXIIF5W2QPjbFT7qJ03ChRANCAAQWhdDdl5mqXMr3CYqmVk3HfiICGJ27
bj9gCCb4VK+gTIByu1CluirAfSXs+cZn2nL7QQKq/OOt9kka9/SrbIIm
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBeDCCAR2gAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABBaF0N2XmapcyvcJ
iqZWTcd+IgIYnbtuP2AIJvhUr6BMgHK7UKW6KsB9Jez5xmfacvtBAqr84632SRr3
9KtsgiajXjBcMBoGA1UdEQQTMBGCCWxvY2FsaG9zdIcEfwAAATAPBgNVHRMBAf8E
BTADAQH/MA4GA1UdDwEB/wQEAwIChDAdBgNVHQ4EFgQUKVqYk7u5EUYq+46cO0RG
dldnDaYwCgYIKoZIzj0EAwIDSQAwRgIhAOSN9U5/WcsqDkfwGNbJNPmEuctVwxT8
pslIS3d4ZS5dAiEAlQJKJzTbtWjKc133/jdVxdIL/nLQBVJxcIYtEH4LZXY=
-----END CERTIFICATE-----
"""             # made for these tests: a key and its certificate, until 2120


class Issuer:
    """An identity provider on a free port, over HTTPS with a folder for its certificate; answer(handler) answers
    each request, with the JSON `document` unless a test replaces it."""

    def __init__(self, test, document=None, folder=None):
        self.document, self.requests, issuer = document, [], self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                issuer.requests.append((self.command, self.path, dict(self.headers), body))
                issuer.answer(self)

            do_POST = do_GET

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, scheme = True, "http"
        self.server.handle_error = lambda *arguments: None
        if folder is not None:
            scheme, path = "https", folder / "localhost.pem"
            path.write_text(LOCALHOST_PEM)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(path)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True,
                                                     do_handshake_on_connect=False)
        self.url = f"{scheme}://127.0.0.1:{self.server.server_port}/keys"
        thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        test.addCleanup(thread.join)
        test.addCleanup(self.server.server_close)
        test.addCleanup(self.server.shutdown)

    def answer(self, handler):
        self.send(handler, 200, json.dumps(self.document).encode())

    def send(self, handler, status, body, **fields):
        with contextlib.suppress(OSError):              # who asks may have gone
            handler.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **fields}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(body)


class OauthTest(FolderTest):
    """What the tests of tokens use: a signer, two clocks, tokens that are good but for what is changed."""
    NOW = 1700000000
    SETTINGS = {"issuer": "https://idp.example", "audience": "appointments"}

    @classmethod
    def setUpClass(cls):
        cls.signer = Signer()

    def setUp(self):
        super().setUp()
        self.clock, self.ticks, self.told = FakeClock(), FakeClock(), []
        self.clock.time = self.NOW

    @staticmethod
    def jwk(kind, **members):
        """The public key of a kind, which is its kid, too; members that are ... are left out."""
        whole = {"kid": kind, **KEY_PAIRS[kind][1], **members}
        return {name: value for name, value in whole.items() if value is not ...}

    def tokens(self, **settings):
        """Tokens with keys of all kinds in a file, or whatever the settings say."""
        if not {"jwks_url", "introspection_url"} & set(settings):
            keys = settings.pop("keys", [self.jwk(kind) for kind in KEY_PAIRS])
            settings["jwks_file"] = "jwks.json"
            (self.folder / "jwks.json").write_text(json.dumps({"keys": keys}))
        tokens = receiver.Tokens({**self.SETTINGS, **settings}, str(self.folder), self.signer.crypto,
                                 lambda level, text: self.told.append((level, text)), self.clock, self.ticks)
        self.addCleanup(tokens.stop)
        return tokens

    def claims(self, **members):
        whole = {"iss": "https://idp.example", "aud": "appointments", "exp": self.NOW + 300, "sub": "robot",
                 **members}
        return {name: value for name, value in whole.items() if value is not ...}

    def token(self, alg="EdDSA", header=(), **claims):
        """A signed token; `header` has further members, claims that are ... are left out."""
        whole = {"alg": alg, "kid": receiver.JWS_ALGORITHMS[alg][0], **dict(header)}
        return self.signed({name: value for name, value in whole.items() if value is not ...},
                           self.claims(**claims), alg)

    def signed(self, header, claims, alg="EdDSA"):
        """A token of two values, or of the bytes that stand for them."""
        message = f"{base64url(header)}.{base64url(claims)}"
        return f"{message}.{base64url(self.signer.sign(alg, message.encode()))}"

    def refuses(self, tokens, token, note, may_wait=False):
        with self.assertRaises(receiver.Refusal) as raised:
            tokens.verify(token, may_wait)
        self.assertEqual(raised.exception.status, 401, raised.exception.note)
        self.assertRegex(raised.exception.note, note)
        for part in filter(None, token.split(".")):
            self.assertNotIn(part, raised.exception.note + raised.exception.message)

    def has_no_keys(self, tokens, token, may_wait=True):
        with self.assertRaises(receiver.Refusal) as raised:
            tokens.verify(token, may_wait)
        refusal = raised.exception
        self.assertEqual((refusal.status, "Retry-After" in refusal.fields), (503, True), refusal.note)
        return refusal.note


class OauthSettingsTest(OauthTest):

    def read(self, oauth):
        path = self.folder / "clients.json"
        path.write_text(json.dumps({"clients": [], "oauth": oauth}))
        return receiver.read_clients(str(path), False).oauth

    def test_what_is_wrong_in_the_clients_file_is_named(self):
        good = {**self.SETTINGS, "jwks_file": "jwks.json"}
        asked = {**self.SETTINGS, "introspection_url": "https://x", "client_id": "a",
                 "client_secret_file": "b"}
        for oauth in (good, asked, {**good, "leeway": 0}, {**good, "scopes": {"x": "admin"}},
                      {**good, "scopes": {}}):
            self.assertEqual(self.read(oauth), oauth)
        for oauth, place in (([], "/oauth"), ({"issuer": "x"}, "/oauth/audience"),
                             ({**good, "issuer": ""}, "/oauth/issuer"),
                             ({**good, "audience": ["a"]}, "/oauth/audience"),
                             ({**good, "leeway": -1}, "/oauth/leeway"),
                             ({**good, "leeway": "60"}, "/oauth/leeway"),
                             ({**good, "jwk_file": "x"}, "/oauth/jwk_file"),
                             ({**good, "scopes": {"x": "boss"}}, "/oauth/scopes/x"),
                             ({**good, "client_id": "a"}, "/oauth/introspection_url"),
                             ({**asked, "client_secret_file": 5}, "/oauth/client_secret_file"),
                             ({**self.SETTINGS, "introspection_url": "https://x"}, "/oauth/client_id")):
            with self.subTest(oauth), self.assertRaises(SetupError) as raised:
                self.read(oauth)
            self.assertIn(place + ":", str(raised.exception))

    def test_keys_come_from_one_place(self):
        for ways in ({}, {"jwks_file": "a", "jwks_url": "https://x"}):
            with self.assertRaisesRegex(SetupError, "one of jwks_file, jwks_url and introspection_url"):
                receiver.Tokens({**self.SETTINGS, **ways}, ".", self.signer.crypto, print)

    def test_a_file_of_keys_that_is_no_good_is_one_line_with_its_name(self):
        path = self.folder / "jwks.json"
        for text, reason in ((None, "No such file"), ("{", "Invalid JSON"), ("[]", "no JWK set"),
                             ('{"keys": {}}', "no JWK set"),
                             ('{"keys": []}', "no key that"), ('{"keys": [{"kty": "oct", "k": "AAAA"}]}',
                                                               "no key that"),
                             ('{"keys": [], "keys": []}', "already has")):
            if text is not None:
                path.write_text(text)
            with self.subTest(text), self.assertRaises(SetupError) as raised:
                receiver.Tokens({**self.SETTINGS, "jwks_file": "jwks.json"}, str(self.folder),
                                self.signer.crypto, print)
            self.assertRegex(str(raised.exception), f"^clients: /oauth/jwks_file: .*jwks.json: .*{reason}")
            self.assertNotIn("\n", str(raised.exception))
        with self.assertRaisesRegex(SetupError, "folder"):
            receiver.Tokens({**self.SETTINGS, "jwks_file": "."}, str(self.folder), self.signer.crypto, print)

    def test_a_secret_that_is_missing_or_empty_is_one_line_that_does_not_show_it(self):
        settings = {"introspection_url": "https://idp.example/", "client_id": "us",
                    "client_secret_file": "secret"}
        for data, reason in ((None, "No such file"), (b"", "is empty"), (b"\r\n", "is empty"),
                             (b"s3cr\xff", "decode")):
            if data is not None:
                (self.folder / "secret").write_bytes(data)
            with self.subTest(data), self.assertRaises(SetupError) as raised:
                self.tokens(**settings)
            self.assertRegex(str(raised.exception), f"^clients: /oauth/client_secret_file: .*{reason}")
            self.assertNotIn("s3cr", str(raised.exception))
        (self.folder / "secret").write_bytes(b"s3cret\n")
        self.tokens(**settings)

    def test_addresses_are_https_or_of_this_machine(self):
        for url in ("https://idp.example", "https://idp.example:8443/a?b=c", "http://localhost:1/",
                    "http://127.0.0.9/",
                    "http://[::1]:8080/keys"):
            self.tokens(jwks_url=url)
        for url, reason in (("http://idp.example/", "must be https"),
                            ("http://localhost.example/", "must be https"),
                            ("http://10.0.0.1/", "must be https"), ("ftp://idp.example/", "such as"),
                            ("idp.example", "such as"),
                            ("https://", "such as"), ("https://a:b@idp.example/", "such as"),
                            ("file:///etc/keys", "such as"),
                            ("https://idp.example:port/", "such as"), ("https://idp.example/#a", "such as"),
                            ("https://idp.example/a\nb", "such as"), ("https://[::1/", "such as"),
                            ("https://idp.example/a b", "such as"), ("https://idp.example/\xfc", "such as")):
            with self.subTest(url), self.assertRaisesRegex(SetupError,
                                                           "^clients: /oauth/jwks_url: .*" + reason):
                self.tokens(jwks_url=url)


class OauthTokenTest(OauthTest):
    """Tokens that are checked with keys."""

    def test_a_token_of_each_algorithm_is_taken_and_not_when_a_byte_of_it_is_changed(self):
        tokens = self.tokens()
        for alg in receiver.JWS_ALGORITHMS:
            with self.subTest(alg):
                token = self.token(alg)
                self.assertEqual(tokens.verify(token, False).subject, "robot")
                head, claims, signature = token.split(".")
                other = self.token(alg, sub="robin").split(".")
                self.refuses(tokens, f"{head}.{other[1]}.{signature}", "signature")
                self.refuses(tokens, f"{head}.{claims}.{other[2]}", "signature")
                other_head = self.token(alg, {"a": 1}).split(".")[0]
                self.refuses(tokens, f"{other_head}.{claims}.{signature}", "signature")
                self.refuses(tokens, f"{head}.{claims}.{signature[:-4]}", "signature")
                self.refuses(tokens, f"{head}.{claims}.", "signature")

    def test_it_says_who_it_is_and_what_they_may(self):
        tokens = self.tokens()
        for claims, client_id, subject, scopes in (
                ({}, "", "robot", ""), ({"client_id": "c", "azp": "a"}, "c", "robot", ""),
                ({"azp": "a", "sub": ...}, "a", "", ""),
                ({"client_id": 5, "azp": ["a"], "sub": {}}, "", "", ""),
                ({"scope": "x:1 y"}, "", "robot", "x:1 y"),
                ({"scope": " x  y "}, "", "robot", "x y"), ({"scp": "x y"}, "", "robot", "x y"),
                ({"scp": ["x", "y z", "", 5]}, "", "robot", "x|y z"),
                ({"scope": "x", "scp": "y"}, "", "robot", "x"),
                ({"scope": "x\u00a0y"}, "", "robot", "x\u00a0y"), ({"scope": 5}, "", "robot", ""),
                ({"scp": {"x": 1}}, "", "robot", "")):
            with self.subTest(claims):
                scopes = frozenset(filter(None, scopes.split("|" if "|" in scopes else " ")))
                self.assertEqual(tokens.verify(self.token(**claims), False),
                                 (client_id, subject, scopes, self.NOW + 360))

    def test_scopes_are_roles_by_the_settings_or_by_default(self):
        self.assertEqual(self.tokens().scopes, {"appointments:write": "sender", "appointments:read": "reader",
                                                "appointments:operate": "operator"})
        self.assertEqual(self.tokens(scopes={"x": "admin"}).scopes, {"x": "admin"})
        self.assertLessEqual(set(receiver.DEFAULT_SCOPES.values()), set(receiver.ROLES))

    def test_no_algorithm_but_ours_is_taken_whatever_key_it_names(self):
        tokens = self.tokens()
        for alg in ("none", "None", "NONE", "", "HS256", "HS384", "HS512", "rs256", "RS256 ", "RS1", "ES512",
                    "ES256K",
                    "RSA-OAEP", "dir", None, 5, True, ["RS256"], {"alg": "RS256"}, ...):
            for kid in ("RSA", ...):
                header = {"alg": alg, "kid": kid}
                header = {name: value for name, value in header.items() if value is not ...}
                message = f"{base64url(header)}.{base64url(self.claims())}"
                for signature in ("", "AAAA", base64url(self.signer.sign("RS256", message.encode()))):
                    with self.subTest(header, signature=signature[:4]):
                        self.refuses(tokens, f"{message}.{signature}", "algorithm")

    def test_a_public_key_is_no_secret_of_an_hmac(self):
        tokens = self.tokens()
        data = base64.b64decode(KEY_PAIRS["RSA"][0])
        for secret in (KEY_PAIRS["RSA"][1]["n"].encode(), receiver.base64url_bytes(KEY_PAIRS["RSA"][1]["n"]),
                       json.dumps(self.jwk("RSA")).encode(), b"", data):
            for kid in ("RSA", ...):
                header = {"alg": "HS256"} if kid is ... else {"alg": "HS256", "kid": kid}
                message = f"{base64url(header)}.{base64url(self.claims())}"
                digest = hmac.new(secret, message.encode(), "sha256").digest()
                self.refuses(tokens, f"{message}.{base64url(digest)}", "algorithm")

    def test_a_token_goes_with_the_key_that_it_names_and_with_no_other(self):
        tokens = self.tokens()
        tokens.verify(self.token(), False)
        for kid in ("ed25519", "Ed25519 ", "", "../../../dev/null", "/dev/null", "' OR 1=1 --",
                    "http://evil.example/key",
                    "P-256", "RSA", "\u0000".join("ab"), "x" * 3000):
            with self.subTest(kid):
                self.refuses(tokens, self.token(header={"kid": kid}), "key that is not known|header")
        for kid in (None, 5, True, ["Ed25519"], {"kid": "Ed25519"}):
            with self.subTest(kid):
                self.refuses(tokens, self.token(header={"kid": kid}), "kid that is no text")

    def test_a_token_that_names_no_key_is_taken_where_there_is_no_choice(self):
        tokens = self.tokens(keys=[self.jwk("Ed25519", kid=...), self.jwk("RSA"),
                                   self.jwk("RSA", kid="other")])
        tokens.verify(self.token(header={"kid": ...}), False)
        self.refuses(tokens, self.token("RS256", {"kid": ...}), "key that is not known")
        tokens.verify(self.token("RS256", {"kid": "other"}), False)
        self.refuses(tokens, self.token(), "key that is not known")     # it names one, and that has no name
        self.refuses(tokens, self.token("ES256", {"kid": ...}), "key that is not known")

    def test_keys_that_a_token_brings_along_are_not_looked_at(self):
        issuer = Issuer(self, {"keys": [self.jwk("P-256")]})
        tokens = self.tokens(keys=[self.jwk("RSA")])
        brought = {"jku": issuer.url, "x5u": issuer.url, "jwk": self.jwk("P-256"), "x5c": ["MIIB"],
                   "x5t": "AA"}
        for kid in ("P-256", "RSA", ...):
            self.refuses(tokens, self.token("ES256", {**brought, "kid": kid}), "key that is not known")
        self.assertEqual(tokens.verify(self.token("RS256", brought), False).subject, "robot")
        self.assertEqual(issuer.requests, [])

    def test_extensions_that_must_be_understood_are_not(self):
        tokens = self.tokens()
        for crit in (["b64"], ["exp"], [], None, "b64"):
            self.refuses(tokens, self.token(header={"crit": crit, "b64": False, "exp": 5}), "extensions")
        for header in ({"b64": True}, {"typ": "at+jwt"}, {"typ": "anything"}, {"cty": "x"}, {"exp": 5}):
            tokens.verify(self.token(header=header), False)

    def test_it_is_taken_from_its_beginning_to_its_end_and_a_leeway_around(self):
        now = self.NOW
        for leeway, exp, nbf, iat, note in (
                (60, 1, 0, 0, ""), (60, -59, 0, 0, ""), (60, -60, 0, 0, "expired 60 s ago"),
                (60, -3600, 0, 0, "expired 3600 s ago"),
                (0, 1, 0, 0, ""), (0, 0, 0, 0, "expired"), (60, 1, 60, 0, ""),
                (60, 1, 61, 0, "nbf that is 61 s ahead"),
                (60, 1, 0, 60, ""), (60, 1, 0, 61, "iat that is 61 s ahead"), (0, 1, 1, 0, "nbf"),
                (0, 1, 0, 1, "iat"),
                (60, 10 ** 9, -10 ** 9, -10 ** 9, ""), (60, -59.5, 0.5, 59.5, ""), (0.5, 0, 0, 0.5, "")):
            with self.subTest(leeway=leeway, exp=exp, nbf=nbf, iat=iat):
                tokens = self.tokens(leeway=leeway)
                token = self.token(exp=now + exp, nbf=now + nbf, iat=now + iat)
                if note:
                    self.refuses(tokens, token, note)
                else:
                    self.assertEqual(tokens.verify(token, False).expires, now + exp + leeway)

    def test_times_are_numbers(self):
        tokens = self.tokens()
        text = json.dumps(self.claims(exp="EXP", nbf="NBF", iat="IAT"))
        for exp, nbf, iat in (("1700000300", "0", "0"), ("1.7000003e9", "-1", "0.5"),
                              ("1" + "0" * 90, "-1e300", "-0.0")):
            claims = text.replace('"EXP"', exp).replace('"NBF"', nbf).replace('"IAT"', iat).encode()
            self.assertEqual(tokens.verify(self.signed({"alg": "EdDSA", "kid": "Ed25519"}, claims),
                                           False).subject, "robot")
        for bad in ('"1700000300"', "true", "false", "null", "[1700000300]", "{}", "NaN", "Infinity",
                    "-Infinity", "1e400",
                    "1" + "0" * 101, "01700000300", "+1700000300", "1700000300.", "0x6553f1dc", "1e", ""):
            for name in ("EXP", "NBF", "IAT"):
                claims = text.replace(f'"{name}"', bad)
                claims = claims.replace('"EXP"', "1700000300").replace('"NBF"', "0").replace('"IAT"',
                                                                                             "0").encode()
                with self.subTest(bad, name=name):
                    self.refuses(tokens, self.signed({"alg": "EdDSA", "kid": "Ed25519"}, claims),
                                 "that is no number|claims that cannot be read")

    def test_it_is_for_us_and_from_the_issuer_that_we_trust(self):
        tokens = self.tokens()
        for claims, note in (
                ({"iss": ...}, "has no iss"), ({"aud": ...}, "has no aud"), ({"exp": ...}, "has no exp"),
                ({"iss": "https://idp.example/"}, "another issuer"),
                ({"iss": "https://evil.example"}, "another issuer"),
                ({"iss": "HTTPS://idp.example"}, "another issuer"),
                ({"iss": ["https://idp.example"]}, "another issuer"),
                ({"iss": None}, "another issuer"), ({"aud": "appointment"}, "another audience"),
                ({"aud": "appointments "}, "another audience"), ({"aud": []}, "another audience"),
                ({"aud": ["a", "b"]}, "another audience"), ({"aud": [["appointments"]]}, "another audience"),
                ({"aud": {"appointments": 1}}, "another audience"), ({"aud": None}, "another audience"),
                ({"aud": True}, "another audience")):
            with self.subTest(claims):
                self.refuses(tokens, self.token(**claims), note)
        for aud in ("appointments", ["appointments"], ["other", 5, "appointments"]):
            tokens.verify(self.token(aud=aud), False)

    def test_header_and_claims_are_strict_json_objects(self):
        tokens = self.tokens()
        good = json.dumps(self.claims()).encode()
        head = b'{"alg": "EdDSA", "kid": "Ed25519"}'
        self.assertEqual(tokens.verify(self.signed(head, good), False).subject, "robot")
        self.assertEqual(tokens.verify(self.signed(b" \n" + head, good + b"\t"), False).subject, "robot")
        for bad in (b'{"alg": "none", "alg": "EdDSA", "kid": "Ed25519"}',
                    b'{"alg": "EdDSA", "kid": "RSA", "kid": "Ed25519"}',
                    b'{"alg": "EdDSA", "\\u0061lg": "none", "kid": "Ed25519"}', b"[]", b'"EdDSA"', b"null",
                    b"", head + head,
                    head[:-1], b"\xef\xbb\xbf" + head, head.decode().encode("utf-16"), b"\xff",
                    b"{" * 70 + b"}" * 70,
                    b'{"alg": "EdDSA", "kid": "Ed25519", "x": NaN}'):
            with self.subTest(bad):
                self.refuses(tokens, self.signed(bad, good), "header that cannot be read")
        for bad in (good[:-1] + b', "sub": "admin"}', good[:-1] + b', "exp": 9999999999}', b"[" + good + b"]",
                    b'"x"', b"", good + b"x",
                    good.replace(b"robot", b"\xff"), good.replace(b"robot", b"\\ud800")):
            with self.subTest(bad):
                self.refuses(tokens, self.signed(head, bad), "claims that cannot be read")

    def test_a_token_has_one_spelling(self):
        tokens = self.tokens()
        token = self.token()
        head, claims, signature = token.split(".")
        tokens.verify(token, False)
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
        other_bits = signature[:-1] + letters[letters.index(signature[-1]) | 1]
        self.assertEqual(base64.urlsafe_b64decode(other_bits + "=="),
                         base64.urlsafe_b64decode(signature + "=="))
        for variant in (token + "=", token + "==", token + "\n", " " + token, token + " ", token + ".",
                        "." + token, f"{head}.{claims}",
                        f"{head}.{claims}.{signature}.x", f"{head}..{signature}", f".{claims}.{signature}",
                        "", ".", "..", "...",
                        f"{head}.{claims}.{other_bits}", f"{head}=.{claims}.{signature}",
                        f"{head}.{claims[:9]}\n{claims[9:]}.{signature}",
                        f"{head}.{claims}.{signature[:9]} {signature[9:]}",
                        f"{head}.{claims}.+/{signature[2:]}",
                        f"{head}.{claims}.\u00e4{signature[1:]}", f"{head}\u2024{claims}.{signature}",
                        token.upper(), "\ud800",
                        json.dumps({"payload": claims, "protected": head, "signature": signature})):
            with self.subTest(variant):
                self.refuses(tokens, variant, "^the token ")

    def test_one_without_end_is_not_even_hashed(self):
        with mock.patch.object(receiver.hashlib, "sha256", side_effect=AssertionError):
            self.refuses(self.tokens(), "x" * 20000, "longer than 16384")

    def test_keys_of_ours_are_never_taken_for_tokens(self):
        self.refuses(self.tokens(), "whk_" + self.token(), "one of our keys")

    def test_keys_that_are_not_for_this_are_skipped_beside_those_that_are(self):
        good = self.jwk("Ed25519")
        self.tokens(keys=[good, 5, None, "x", [], {}, {"kty": "oct", "k": "c2VjcmV0",
                                                       "kid": "Ed25519"}]).verify(self.token(), False)
        for members in ({"use": "enc"}, {"use": ["sig"]}, {"key_ops": ["sign"]}, {"key_ops": []},
                        {"key_ops": "verify"},
                        {"kty": "RSA"}, {"x": good["x"] + "="}, {"crv": "Ed448"}, {"alg": "ES256"},
                        {"alg": 5}, {"kid": 5}):
            with self.subTest(members):
                tokens = self.tokens(keys=[self.jwk("Ed25519", **members), self.jwk("RSA")])
                self.refuses(tokens, self.token(), "key that is not known")
        for members in ({"use": "sig"}, {"key_ops": ["sign", "verify"]}, {"alg": "EdDSA"},
                        {"x5c": 5, "other": 5}):
            self.tokens(keys=[self.jwk("Ed25519", **members)]).verify(self.token(), False)
        tokens = self.tokens(keys=[self.jwk("RSA", alg="PS256")])
        tokens.verify(self.token("PS256"), False)
        self.refuses(tokens, self.token("RS256"), "key that is not known")

    def test_several_keys_of_one_name_are_all_tried(self):
        keys = [self.jwk("RSA", kid="a", n=SIGNED_EXAMPLES[0][2]["n"]), self.jwk("RSA", kid="a"),
                self.jwk("Ed25519", kid="a")]
        tokens = self.tokens(keys=keys)
        for alg in ("RS256", "EdDSA"):
            self.assertEqual(tokens.verify(self.token(alg, {"kid": "a"}), False).subject, "robot")
        self.refuses(tokens, self.token("ES256", {"kid": "a"}), "key that is not known")

    def test_what_was_verified_is_remembered_until_it_expires_and_refusals_are_not(self):
        tokens, token = self.tokens(), self.token()
        with mock.patch.object(receiver.PublicKey, "verify", return_value=True) as verify:
            for _ in range(3):
                tokens.verify(token, False)
            self.assertEqual(verify.call_count, 1)
            self.clock.time += 359
            tokens.verify(token, False)
            self.assertEqual(verify.call_count, 1)
            self.clock.time += 1
            self.refuses(tokens, token, "expired")
            self.assertEqual(verify.call_count, 2)
        self.clock.time -= 360
        for _ in range(2):
            self.refuses(tokens, token[:-4], "signature")

    def test_however_many_tokens_come_only_so_many_are_remembered(self):
        with mock.patch.object(receiver, "TOKENS_KEPT", 10):
            kept = receiver._Kept(self.clock)
            for number in range(1000):
                kept.put(b"%d" % number, self.NOW + 1, number)
            self.assertEqual([kept.get(b"%d" % number) for number in (0, 989, 990, 999)],
                             [None, None, 990, 999])
            self.assertEqual(len(kept._found), 10)
            self.clock.time += 1
            self.assertIsNone(kept.get(b"999"))

    def test_eight_threads_at_once_get_what_their_own_tokens_say(self):
        tokens, results = self.tokens(), []
        signed = [(str(number), self.token(sub=str(number))) for number in range(20)]

        def work():
            for subject, token in signed:
                results.append(tokens.verify(token, False).subject == subject)
                with contextlib.suppress(receiver.Refusal):
                    results.append(tokens.verify(token[:-4] + "AAAA", False))

        in_threads(8, work)
        self.assertEqual((len(results), set(results)), (160, {True}))


class OauthFetchTest(OauthTest):
    """Keys that are fetched."""

    def start_with(self, *keys, **settings):
        """(Tokens whose keys are fetched, their Issuer)."""
        issuer = Issuer(self, {"keys": [self.jwk(kind) for kind in keys]})
        tokens = self.tokens(jwks_url=issuer.url, **settings)
        tokens.start()
        return tokens, issuer

    def fetched(self, tokens, token):
        """Wait until a token is taken without waiting."""
        def taken():
            with contextlib.suppress(receiver.Refusal, receiver.MustWait):
                return tokens.verify(token, False)
        return until(taken)

    def test_keys_are_fetched_at_start_and_tokens_wait_for_them_where_they_may(self):
        go_on = threading.Event()
        issuer = Issuer(self, {"keys": [self.jwk("Ed25519")]})
        at_once = issuer.answer
        issuer.answer = lambda handler: go_on.wait(WAIT) and at_once(handler)
        tokens = self.tokens(jwks_url=issuer.url)
        tokens.start()
        self.assertRaises(receiver.MustWait, tokens.verify, self.token(), False)
        waiting = threading.Thread(target=tokens.verify, args=(self.token(), True))
        waiting.start()
        go_on.set()
        self.assertEqual(tokens.verify(self.token(), True).subject, "robot")
        waiting.join(WAIT)
        self.assertEqual(tokens.verify(self.token(), False).subject, "robot")
        (method, path, headers, body), = issuer.requests
        self.assertEqual((method, path, headers["Accept"], body), ("GET", "/keys", "application/json", b""))
        self.assertEqual((self.told, tokens.trouble, tokens.breaker), ([], "", "closed"))

    def test_before_it_starts_nothing_is_fetched_and_tokens_get_503(self):
        issuer = Issuer(self, {"keys": []})
        self.assertIn("not been fetched", self.has_no_keys(self.tokens(jwks_url=issuer.url), self.token()))
        self.assertEqual(issuer.requests, [])

    def test_while_it_was_never_there_tokens_get_503_and_the_first_answer_ends_that(self):
        issuer = Issuer(self, {"keys": [self.jwk("Ed25519")]})
        at_once = issuer.answer
        issuer.answer = lambda handler: issuer.send(handler, 500, b"{}")
        with mock.patch.object(receiver, "JWKS_RETRY_SECONDS", 0.01):
            tokens = self.tokens(jwks_url=issuer.url)
            tokens.start()
            until(lambda: tokens.breaker == "open")
            note = self.has_no_keys(tokens, self.token())
            self.assertIn("answered 500", note)
            self.has_no_keys(tokens, self.token(header={"kid": "other"}))
            self.refuses(tokens, self.token()[:-4] + "A.", "three parts",
                         True)     # what is no token at all is told so
            self.assertEqual(len(issuer.requests), 5)
            issuer.answer = at_once
            self.ticks.time += 1
            self.fetched(tokens, self.token())
        levels = [level for level, _ in self.told]
        self.assertEqual(levels, ["ERROR", "ERROR", "INFO"])
        self.assertRegex(self.told[0][1], "^jwks_url http.*: answered 500 .*; tokens are answered 503")
        self.assertIn("breaker open", self.told[1][1])
        self.assertIn("answers again", self.told[2][1])
        self.assertEqual((tokens.trouble, tokens.breaker), ("", "closed"))

    def test_what_it_gave_last_serves_while_it_is_down(self):
        with mock.patch.object(receiver, "JWKS_RETRY_SECONDS", 0.01), mock.patch.object(receiver,
                                                                                        "JWKS_SECONDS", 0.01):
            tokens, issuer = self.start_with("Ed25519")
            self.fetched(tokens, self.token())
            issuer.answer = lambda handler: issuer.send(handler, 503, b"")
            until(lambda: tokens.breaker == "open")
            self.assertIn("serve on", tokens.trouble)
            self.assertEqual(tokens.verify(self.token(sub="new"), False).subject, "new")
            self.has_no_keys(tokens, self.token("ES256"))       # its key may have come since
            self.refuses(tokens, self.token("RS256", {"kid": "Ed25519"}), "key that is not known")

    def test_a_new_key_is_fetched_when_a_token_names_it_at_most_once_a_minute(self):
        tokens, issuer = self.start_with("Ed25519")
        tokens.verify(self.token(), True)
        issuer.document = {"keys": [self.jwk("Ed25519"), self.jwk("P-256")]}
        self.assertRaises(receiver.MustWait, tokens.verify, self.token("ES256"), False)
        self.assertEqual(len(issuer.requests), 1)
        self.assertEqual(tokens.verify(self.token("ES256"), True).subject,
                         "robot")     # the fetch at start counts not
        self.assertEqual(len(issuer.requests), 2)
        issuer.document = {"keys": [self.jwk("RSA")]}
        for may_wait in (False, True):
            self.refuses(tokens, self.token("RS256"), "key that is not known", may_wait)
        self.ticks.time += 59.9
        self.refuses(tokens, self.token("RS256"), "key that is not known", True)
        self.ticks.time += 0.1
        self.assertEqual(tokens.verify(self.token("RS256"), True).subject, "robot")
        self.assertEqual(len(issuer.requests), 3)

    def test_a_hundred_thousand_invented_keys_cause_one_fetch(self):
        tokens, issuer = self.start_with("Ed25519")
        tokens.verify(self.token(), True)
        numbers, claims = itertools.count(), base64url(self.claims())

        def work():
            for _ in range(12500):
                header = base64url(b'{"alg":"EdDSA","kid":"%d"}' % next(numbers))
                with contextlib.suppress(receiver.Refusal):
                    tokens.verify(f"{header}.{claims}.AAAA", True)
                    self.fail("it was taken")

        in_threads(8, work)
        self.assertEqual((next(numbers), len(issuer.requests)), (100000, 2))
        self.assertEqual(tokens.verify(self.token(), False).subject, "robot")

    def test_keys_are_fetched_anew_by_themselves_and_one_withdrawn_is_forgotten_with_what_it_proved(self):
        with mock.patch.object(receiver, "JWKS_SECONDS", 0.01):
            tokens, issuer = self.start_with("Ed25519", "P-256")
            self.assertEqual(tokens.verify(self.token(), True).subject, "robot")
            issuer.document = {"keys": [self.jwk("P-256")]}
            until(lambda: "Ed25519" not in tokens._fetcher.keys.ids)
        self.ticks.time -= 1e6                              # no fetch for the key that is gone
        tokens._fetcher._asked_at = self.ticks.time
        self.refuses(tokens, self.token(), "key that is not known", True)
        self.assertEqual(tokens.verify(self.token("ES256"), True).subject, "robot")

    def test_an_issuer_that_withdraws_all_of_its_keys_is_believed_and_that_is_told(self):
        with mock.patch.object(receiver, "JWKS_SECONDS", 0.01):
            tokens, issuer = self.start_with("Ed25519")
            tokens.verify(self.token(), True)
            issuer.document = {"keys": []}
            until(lambda: self.told)
        self.assertRegex(self.told[0][1], "^jwks_url http.* has no key that can check")
        tokens._fetcher._asked_at = self.ticks.time
        self.refuses(tokens, self.token(), "key that is not known", True)

    def test_answers_that_make_no_sense_count_as_none(self):
        tokens, issuer = self.start_with("Ed25519")
        tokens.verify(self.token(), True)
        elsewhere = Issuer(self, {"keys": [self.jwk("P-256")]})
        cases = (
            ("redirect", lambda handler: issuer.send(handler, 302, b"", Location=elsewhere.url),
             "answered 302"),
            ("garbage", lambda handler: issuer.send(handler, 200, b"<html>"), "Invalid JSON"),
            ("another document", lambda handler: issuer.send(handler, 200, b'{"keys": {}}'), "no JWK set"),
            ("duplicate members", lambda handler: issuer.send(handler, 200, b'{"keys": [], "keys": []}'),
             "already has"),
            ("not found", lambda handler: issuer.send(handler, 404, b"{}"), "answered 404"),
            ("half of it", lambda handler: issuer.send(handler, 200, b'{"keys": ',
                                                       **{"Content-Length": "500"}), "Invalid JSON"),
            ("too much", lambda handler: issuer.send(handler, 200, b'{"keys": ["' + b"x" * 2 ** 20 + b'"]}'),
             "more than 1048576"),
            ("no HTTP", lambda handler: handler.wfile.write(b"\x16\x03\x01\r\n\r\n"), "."),
            ("a line without end", lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"y" * 70000),
             "header line"))
        for name, answer, reason in cases:
            with self.subTest(name):
                issuer.answer = answer
                tokens._fetcher._remote.breaker.succeeded()
                before = len(issuer.requests)
                self.ticks.time += 60
                self.has_no_keys(tokens, self.token("ES256"))
                self.assertEqual(len(issuer.requests), before + 1)
                self.assertRegex(tokens.trouble, reason)
                self.assertEqual(tokens.verify(self.token(), False).subject, "robot")
        self.assertEqual(elsewhere.requests, [])

    def test_an_issuer_that_hangs_or_never_ends_is_left_after_its_time(self):
        gone = threading.Event()

        def trickle(handler):
            handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
            while not gone.wait(0.01):
                handler.wfile.write(b"X: y\r\n"[:1])

        def flood(handler):
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\n")
            while not gone.is_set():
                handler.wfile.write(b" " * 65536)

        def slow_body(handler):
            handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            while not gone.wait(0.01):
                handler.wfile.write(b" ")

        for name, answer, reason in (("silent", lambda handler: gone.wait(WAIT), "time|no whole answer"),
                                     ("trickle", trickle, "no whole"),
                                     ("flood", flood, "more than 1048576"),
                                     ("slow body", slow_body, "no whole|Invalid JSON")):
            with self.subTest(name), mock.patch.object(receiver, "FETCH_SECONDS", 0.3):
                issuer = Issuer(self)
                issuer.answer = functools.partial(quietly, answer)
                self.addCleanup(gone.set)
                tokens = self.tokens(jwks_url=issuer.url)
                tokens.start()
                until(lambda: tokens.trouble)
                self.assertRegex(tokens.trouble, reason)
                self.assertTrue(tokens._fetcher.stop(WAIT))

    def test_nobody_there_is_one_error_until_it_changes(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        with mock.patch.object(receiver, "JWKS_RETRY_SECONDS", 0.01):
            tokens = self.tokens(jwks_url=f"http://127.0.0.1:{port}/")
            tokens.start()
            until(lambda: tokens.breaker == "open")
        self.assertEqual([level for level, _ in self.told], ["ERROR", "ERROR"])
        self.assertIn("refused", self.told[0][1])

    def test_https_is_spoken_with_those_whose_certificate_is_known(self):
        issuer = Issuer(self, {"keys": [self.jwk("Ed25519")]}, self.folder)
        with mock.patch.dict(os.environ, {"SSL_CERT_FILE": str(self.folder / "localhost.pem")}):
            trusting = self.tokens(jwks_url=issuer.url)
        stranger = self.tokens(jwks_url=issuer.url)
        trusting.start()
        self.assertEqual(trusting.verify(self.token(), True).subject, "robot")
        stranger.start()
        self.assertIn("certificate", self.has_no_keys(stranger, self.token()))
        self.assertEqual(len(issuer.requests), 1)

    def test_proxies_of_the_environment_are_not_used(self):
        proxy = Issuer(self, {"keys": []})
        with mock.patch.dict(os.environ, {"http_proxy": proxy.url, "HTTP_PROXY": proxy.url,
                                          "ALL_PROXY": proxy.url}):
            tokens, _ = self.start_with("Ed25519")
            self.assertEqual(tokens.verify(self.token(), True).subject, "robot")
        self.assertEqual(proxy.requests, [])

    def test_a_reload_begins_with_the_keys_of_before_if_they_are_of_the_same_address(self):
        tokens, issuer = self.start_with("Ed25519")
        tokens.verify(self.token(), True)
        after = self.tokens(jwks_url=issuer.url, issuer="https://other.example")
        after.adopt(tokens)
        self.assertEqual(after.verify(self.token(iss="https://other.example"), False).subject, "robot")
        self.refuses(after, self.token(), "another issuer")         # although it was remembered before
        for other in (self.tokens(jwks_url=issuer.url + "2"), self.tokens()):
            other.adopt(tokens)
            after.adopt(other)
        self.has_no_keys(self.tokens(jwks_url=issuer.url + "2"), self.token())


def quietly(function, *arguments):
    """Call it; that the other side has gone is its own affair."""
    with contextlib.suppress(OSError):
        function(*arguments)


class OauthIntrospectionTest(OauthTest):
    """Tokens of which their issuer is asked."""

    def start_with(self, us=("us", "s3cret"), **answer):
        """(Tokens of which an issuer is asked, that Issuer)."""
        issuer = Issuer(self, {"active": True, **answer})
        (self.folder / "secret").write_text(us[1] + "\n", "utf-8")
        return self.tokens(introspection_url=issuer.url, client_id=us[0], client_secret_file="secret"), issuer

    def test_the_issuer_is_asked_as_the_standard_says(self):
        tokens, issuer = self.start_with(("us & them", "p+ä:w"), client_id="c", sub="robot", scope="a b")
        self.assertEqual(tokens.verify("an/opaque+token&x=y", True),
                         ("c", "robot", {"a", "b"}, self.NOW + 60))
        (method, path, headers, body), = issuer.requests
        self.assertEqual((method, path, headers["Content-Type"]),
                         ("POST", "/keys", "application/x-www-form-urlencoded"))
        self.assertEqual(body, b"token=an%2Fopaque%2Btoken%26x%3Dy&token_type_hint=access_token")
        self.assertEqual(base64.b64decode(headers["Authorization"].partition("Basic ")[2]),
                         b"us+%26+them:p%2B%C3%A4%3Aw")

    def test_an_answer_is_believed_for_a_minute_or_until_the_token_expires(self):
        for exp, seconds in ((None, 60), (self.NOW + 3600, 60), (self.NOW - 40, 20)):
            with self.subTest(exp):
                tokens, issuer = self.start_with(**({} if exp is None else {"exp": exp}))
                self.assertEqual(tokens.verify("opaque", True).expires, self.NOW + seconds)
                self.ticks.time += seconds - 0.1
                self.assertEqual(tokens.verify("opaque", False).expires, self.NOW + seconds)
                tokens.verify("another", True)
                self.assertEqual(len(issuer.requests), 2)
                self.ticks.time += 0.2
                self.assertRaises(receiver.MustWait, tokens.verify, "opaque", False)
                tokens.verify("opaque", True)
                self.assertEqual(len(issuer.requests), 3)

    def test_a_token_that_is_not_active_is_asked_for_again_after_5_seconds(self):
        tokens, issuer = self.start_with()
        issuer.document = {"active": False, "sub": "robot"}
        self.assertRaises(receiver.MustWait, tokens.verify, "opaque", False)
        for may_wait in (True, True, False):
            self.refuses(tokens, "opaque", "not active", may_wait)
        self.assertEqual(len(issuer.requests), 1)
        self.ticks.time += 5
        issuer.document = {"active": True}
        tokens.verify("opaque", True)
        self.assertEqual(len(issuer.requests), 2)

    def test_what_it_answers_is_checked_as_far_as_it_says(self):
        tokens, issuer = self.start_with()
        now = self.NOW
        for answer, note in (({"iss": "https://evil.example"}, "another issuer"),
                             ({"aud": "x"}, "another audience"),
                             ({"aud": ["x", "y"]}, "another audience"), ({"exp": now - 60}, "expired"),
                             ({"exp": "1"}, "exp"),
                             ({"exp": True}, "exp"), ({"nbf": now + 61}, "nbf"), ({"iat": now + 61}, "iat"),
                             ({"active": False}, "not active")):
            with self.subTest(answer):
                issuer.document = {"active": True, **answer}
                self.refuses(tokens, json.dumps(answer), note, True)
        for answer in ({}, {"iss": "https://idp.example", "aud": ["appointments"], "exp": now + 1, "iat": now,
                            "nbf": now}):
            issuer.document = {"active": True, **answer}
            tokens.verify(json.dumps(answer) + "good", True)
        self.assertEqual(tokens.trouble, "")

    def test_while_it_does_not_answer_it_is_503_and_after_five_times_it_is_spared(self):
        tokens, issuer = self.start_with()
        tokens.verify("known", True)
        tokens.verify("soon gone", True)
        elsewhere = Issuer(self, {"active": True})
        at_once = issuer.answer
        answers = [lambda handler: issuer.send(handler, 401, b'{"error": "invalid_client"}'),
                   lambda handler: issuer.send(handler, 307, b"", Location=elsewhere.url),
                   lambda handler: issuer.send(handler, 200, b'{"active": "true"}'),
                   lambda handler: issuer.send(handler, 200, b'[{"active": true}]'),
                   lambda handler: issuer.send(handler, 200, b"{}")]
        for number, issuer.answer in enumerate(answers):
            self.assertRegex(self.has_no_keys(tokens, f"opaque-{number}"),
                             "answered (401|307|no introspection)")
        self.assertEqual((tokens.breaker, len(issuer.requests), elsewhere.requests), ("open", 7, []))
        self.has_no_keys(tokens, "opaque-0")
        self.assertEqual((len(issuer.requests), tokens.verify("known", False).client_id), (7, ""))
        self.assertNotIn("opaque", str(self.told))
        self.assertNotIn("s3cret", str(self.told))
        issuer.answer = at_once
        self.ticks.time += 1
        tokens.verify("opaque-0", True)
        self.assertEqual((tokens.breaker, tokens.trouble, self.told[-1][0]), ("closed", "", "INFO"))

    def test_our_own_keys_never_leave_the_house(self):
        tokens, issuer = self.start_with()
        self.refuses(tokens, "whk_" + "x" * 43, "one of our keys", True)
        self.assertEqual(issuer.requests, [])

    def test_invented_tokens_do_not_push_out_the_good_ones(self):
        with mock.patch.object(receiver, "TOKENS_KEPT", 5):
            tokens, issuer = self.start_with()
            tokens.verify("good", True)
            issuer.document = {"active": False}
            for number in range(20):
                self.refuses(tokens, f"invented-{number}", "not active", True)
            tokens.verify("good", False)


@unittest.skipUnless(OFFICIAL_CLIENTS, "OFFICIAL_CLIENTS does not name a Python with PyJWT and jwcrypto")
class OfficialTokenTest(OauthTest):
    """What PyJWT and jwcrypto sign and how PyJWT judges, next to what we say of it."""

    PROGRAM = '''
import json, sys
import jwt
from jwcrypto import jwk, jws

asked = json.load(sys.stdin)
settings = {"RSA": {"kty": "RSA", "size": 2048}, "RSA-4096": {"kty": "RSA", "size": 4096},
            "P-256": {"kty": "EC", "crv": "P-256"}, "P-384": {"kty": "EC", "crv": "P-384"},
            "Ed25519": {"kty": "OKP", "crv": "Ed25519"}}
keys = {kid: jwk.JWK.generate(kid=kid, **members) for kid, members in settings.items()}
tokens, verdicts = [], []
for library, kid, header, claims in asked["tokens"]:
    if library == "PyJWT":
        key = jwt.PyJWK(keys[kid].export(as_dict=True), header["alg"]).key
        tokens.append(jwt.encode(claims, key, header["alg"], header))
    else:
        token = jws.JWS(json.dumps(claims))
        token.add_signature(keys[kid], None, json.dumps(header))
        tokens.append(token.serialize(compact=True))
for (library, kid, header, claims), token in zip(asked["tokens"], tokens):
    try:
        key = jwt.PyJWK(keys[kid].export_public(as_dict=True), header["alg"]).key
        jwt.decode(token, key, asked["algorithms"], leeway=60, audience="appointments",
                   issuer="https://idp.example", options={"require": ["exp", "iss", "aud"]})
        verdicts.append(True)
    except jwt.InvalidTokenError:
        verdicts.append(False)
json.dump([[key.export_public(as_dict=True) for key in keys.values()], tokens, verdicts], sys.stdout)
'''

    def ask(self, asked):
        """(public keys, tokens, whether PyJWT takes them) of [(library, kid, header, claims)]."""
        question = json.dumps({"tokens": asked, "algorithms": list(receiver.JWS_ALGORITHMS)})
        done = subprocess.run([OFFICIAL_CLIENTS, "-c", self.PROGRAM], input=question.encode(),
                              capture_output=True, timeout=WAIT)
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        return json.loads(done.stdout)

    def takes(self, tokens, token):
        try:
            return bool(tokens.verify(token, False))
        except receiver.Refusal:
            return False

    def test_what_they_sign_is_taken_with_each_algorithm(self):
        self.clock.time = int(time.time())
        kinds = {"RSA": ("RSA", "RSA-4096")}
        asked = [(library, kid, {"alg": alg, "kid": kid}, self.claims(exp=self.clock.time + 300))
                 for library in ("PyJWT", "jwcrypto") for alg, (kind, _) in receiver.JWS_ALGORITHMS.items()
                 for kid in kinds.get(kind, (kind,))]
        keys, signed, verdicts = self.ask(asked)
        tokens = self.tokens(keys=keys)
        for question, token, verdict in zip(asked, signed, verdicts):
            with self.subTest(question):
                self.assertEqual((self.takes(tokens, token), verdict), (True, True))
                message, _, signature = token.rpartition(".")
                self.assertFalse(self.takes(tokens, f"{message}.{signature[4:]}{signature[:4]}"))

    def test_they_judge_claims_as_we_do(self):
        now = self.clock.time = int(time.time())
        changes = [{}, {"exp": now - 30}, {"exp": now - 90}, {"exp": ...}, {"nbf": now + 30},
                   {"nbf": now + 90}, {"iat": now + 30},
                   {"iat": now + 90}, {"iss": "x"}, {"iss": ...}, {"aud": "x"},
                   {"aud": ["x", "appointments"]}, {"aud": ["x"]},
                   {"aud": ...}, {"aud": []}, {"exp": "soon"}, {"nbf": "soon"}, {"iat": "soon"},
                   {"scope": "a b"}]
        asked = [("jwcrypto", "P-256", {"alg": "ES256", "kid": "P-256"},
                  self.claims(**{"exp": now + 300, **change})) for change in changes]
        keys, signed, verdicts = self.ask(asked)
        tokens = self.tokens(keys=keys)
        for change, token, verdict in zip(changes, signed, verdicts):
            with self.subTest(change):
                self.assertEqual(self.takes(tokens, token), verdict)
        self.assertEqual(sum(verdicts), 6)


# =============================================================================
# Access
# =============================================================================

class BucketTest(unittest.TestCase):
    """How often somebody may come."""

    def test_a_burst_is_used_up_and_comes_back_at_the_rate(self):
        clock = FakeClock()
        bucket = receiver.Bucket(2, 3, clock)
        self.assertEqual([bucket.wait() for _ in range(4)], [0.0, 0.0, 0.0, 0.5])
        clock.time += 0.5
        self.assertEqual([bucket.wait(), bucket.wait()], [0.0, 0.5])
        clock.time += 3600
        self.assertEqual([bucket.wait() for _ in range(4)], [0.0, 0.0, 0.0, 0.5])

    def test_without_a_burst_it_is_twice_the_rate_and_at_least_one(self):
        for rate, burst in ((50, 100), (0.5, 1), (0.1, 1)):
            self.assertEqual(receiver.Bucket(rate).burst, burst)

    def test_who_is_over_the_rate_is_told_when_to_come_again(self):
        bucket = receiver.Bucket(0.5, 1, FakeClock())
        bucket.take()
        with self.assertRaises(receiver.Refusal) as raised:
            bucket.take()
        self.assertEqual((raised.exception.status, raised.exception.fields), (429, {
            "Retry-After": "2", "RateLimit-Policy": '"requests";q=1;w=2', "RateLimit": '"requests";r=0;t=2'}))

    def test_addresses_have_one_each_those_of_ipv6_one_for_each_64(self):
        kept = receiver.PerAddress(object)
        self.assertIs(kept.of("192.0.2.1"), kept.of("192.0.2.1"))
        self.assertIsNot(kept.of("192.0.2.1"), kept.of("192.0.2.2"))
        self.assertIs(kept.of("2001:db8::1"), kept.of("2001:db8::ffff:0:0:1"))
        self.assertIs(kept.of("fe80::1%eth0"), kept.of("fe80::2%eth1"))
        self.assertIsNot(kept.of("2001:db8::1"), kept.of("2001:db8:0:1::1"))

    def test_however_many_addresses_come_only_so_many_are_kept(self):
        kept = receiver.PerAddress(object, 10)
        first = kept.of("0.0.0.0")
        for number in range(100):
            kept.of(f"192.0.2.{number}")
        self.assertEqual(len(kept._kept), 10)
        self.assertIsNot(kept.of("0.0.0.0"), first)

    def test_twenty_refusals_in_a_minute_are_heard_and_then_it_is_too_many(self):
        clock = FakeClock()
        strikes = receiver.Strikes(clock)
        clock.time += 1
        self.assertEqual([strikes.left() for _ in range(receiver.REFUSALS)], [0.0] * receiver.REFUSALS)
        clock.time += 10
        self.assertEqual(strikes.left(), 50.0)
        clock.time += 50
        self.assertEqual(strikes.left(), 0.0)


KEYS = {name: f"whk_{name:-<43}" for name in ("sender", "reader", "operator", "admin", "none", "both")}


def key_entry(name, *roles, **members):
    """An entry of the clients file for a client with KEYS[name]."""
    digest = hashlib.sha256(KEYS[name].encode()).hexdigest()
    return {"name": name, "roles": list(roles or [name]), "key_sha256": [digest], **members}


class ClientsTest(FolderTest):
    """The clients file."""

    def read(self, document):
        path = self.folder / "clients.json"
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        return receiver.read_clients(str(path), False).clients

    def test_what_is_wrong_is_named_with_file_place_and_what_was_expected(self):
        good = key_entry("sender")
        other = {**key_entry("reader"), "name": "other"}
        for document, place, expected in (
                ("{", "line 1 column 2", "expecting"),
                ('{"clients": [], "clients": []}', "line 1", "already has"),
                ([], "/", "object"), ({}, "/clients", "Missing"),
                ({"clients": [], "client": []}, "/client", "not a known field"),
                ({"clients": [{**good, "rols": []}]}, "/clients/0/rols", "not a known field"),
                ({"clients": [{**good, "roles": ["sendr"]}]}, "/clients/0/roles/0", "sender, reader, operator, admin"),
                ({"clients": [{**good, "roles": []}]}, "/clients/0/roles", "empty"),
                ({"clients": [{"name": "x", "key_sha256": good["key_sha256"]}]}, "/clients/0/roles", "Missing"),
                ({"clients": [{**good, "name": "a b"}]}, "/clients/0/name", "pattern"),
                ({"clients": [{**good, "tenant": "North"}]}, "/clients/0/tenant", "pattern"),
                ({"clients": [{**good, "tenant": "../x"}]}, "/clients/0/tenant", "pattern"),
                ({"clients": [{**good, "key_sha256": [KEYS["sender"]]}]}, "/clients/0/key_sha256/0", "pattern"),
                ({"clients": [{**good, "key_sha256": []}]}, "/clients/0/key_sha256", "empty"),
                ({"clients": [{**good, "rate": 0}]}, "/clients/0/rate", "more than 0"),
                ({"clients": [{**good, "rate": "5"}]}, "/clients/0/rate", "number"),
                ({"clients": [{**good, "burst": 5}]}, "/clients/0/rate", "Missing"),
                ({"clients": [{**good, "disabled": "no"}]}, "/clients/0/disabled", "boolean"),
                ({"clients": [{**good, "require": "any"}]}, "/clients/0/require", "all"),
                ({"clients": [{**good, "allow_from": ["10.0.0.1/8"]}]}, "/clients/0/allow_from/0", "host bits"),
                ({"clients": [{**good, "allow_from": ["home"]}]}, "/clients/0/allow_from/0", "203.0.113.0/24"),
                ({"clients": [{"name": "x", "roles": ["sender"]}]}, "/clients/0", "needs one of key_sha256"),
                ({"clients": [good, {**other, "name": "SENDER"}]}, "/clients/1", "has the name of /clients/0"),
                ({"clients": [good, {**good, "name": "other"}]}, "/clients/1", "has the key of /clients/0")):
            with self.subTest(document=document), self.assertRaises(SetupError) as raised:
                self.read(document)
            text = str(raised.exception)
            self.assertTrue(text.startswith(f"clients {self.folder / 'clients.json'}: "), text)
            self.assertIn(place, text)
            self.assertIn(expected, text)
            self.assertNotIn("\n", text)
        self.assertEqual([client.name for client in self.read({"clients": [good, other]})], ["sender", "other"])

    def test_what_is_wrong_with_a_signature_is_named_with_its_place_and_without_a_secret(self):
        whsec = "whsec_" + base64_of(b"k" * 24)

        def signer(name, *secrets, **settings):
            return {"name": name, "roles": ["sender"],
                    "signature": {"profile": "standard", **settings, "secrets": list(secrets)}}
        many = [f"secret{number}" for number in range(101)]
        for entries, place, expected in (
                ([signer("a", whsec), signer("b", whsec)], "/clients/1", "has the secret of /clients/0"),
                ([signer("a", whsec), signer("b", whsec[6:])], "/clients/1", "has the secret of /clients/0"),
                ([signer("a", whsec), signer("b", "k" * 24, profile="github")], "/clients/1",
                 "has the secret of /clients/0"),
                ([signer("a", "x1x1", whsec, whsec)], "/clients/0/signature/secrets", "twice"),
                ([signer("a", *many, profile="github")], "/clients/0/signature/secrets", "100"),
                ([signer("a", *many[:60], profile="github"), signer("b", *many[60:], profile="github")],
                 "/clients/1/signature/secrets", "more than 100 secrets in all"),
                ([signer("a", "no base64!")], "/clients/0/signature/secrets/0", "base64"),
                ([signer("a")], "/clients/0/signature/secrets", "empty"),
                ([signer("a", whsec, profile="githup")], "/clients/0/signature/profile", "github"),
                ([signer("a", whsec, tolerence=5)], "/clients/0/signature/tolerence", "not a known field"),
                ([signer("a", whsec, profile="github", tolerance=5)], "/clients/0/signature/tolerance",
                 "has no use"),
                ([signer("a", whsec, template="{timestamp}")], "/clients/0/signature/template", "{body}")):
            with self.subTest(entries=entries), self.assertRaises(SetupError) as raised:
                self.read({"clients": entries})
            text = str(raised.exception)
            self.assertTrue(text.startswith(f"clients {self.folder / 'clients.json'}: {place}: "), text)
            self.assertIn(expected, text)
            for secret in (whsec[6:], "x1x1", "no base64!", "secret1"):
                self.assertNotIn(secret, text)
        fine = [signer("a", *many[:60], profile="github"), signer("b", *many[60:100], profile="calcom"),
                key_entry("sender")]
        self.assertEqual(len(self.read({"clients": fine})), 3)

    def test_a_file_that_cannot_be_read_keeps_it_from_starting(self):
        (self.folder / "cut").write_bytes(b"\xff")
        for path, expected in ((self.folder, "folder"), (self.folder / "none", "No such file"),
                               (self.folder / "cut", "UTF-8")):
            with self.subTest(path):
                code, out, err = self.program("--clients", path, "--database", self.database, "--port", 0)
                self.assertEqual((code, out, err.count("\n")), (2, "", 1))
                self.assertIn("--clients", err)
                self.assertIn(expected, err)
                self.assertFalse(self.database.exists())

    def test_a_key_may_be_written_in_capitals_of_hex(self):
        entry = key_entry("sender")
        entry["key_sha256"] = [entry["key_sha256"][0].upper()]
        self.assertEqual(self.read({"clients": [entry]})[0].keys, self.read({"clients": [key_entry("sender")]})[0].keys)

    @unittest.skipUnless(POSIX, "needs POSIX modes")
    def test_a_file_that_others_can_read_is_a_warning(self):
        path = self.folder / "clients.json"
        path.write_text('{"clients": []}')
        for mode, warnings in ((0o600, 0), (0o640, 1), (0o604, 1), (0o620, 1)):
            path.chmod(mode)
            self.assertEqual(len(receiver.warn_if_others_can_read("clients", path)), warnings)


class KeygenTest(FolderTest):

    def test_a_key_is_printed_once_with_the_entry_that_knows_it(self):
        code, out, err = self.program("keygen", "--client", "north", "--role", "sender", "--role", "reader",
                                      "--tenant", "north")
        key, entry = out.splitlines()
        self.assertRegex(key, "^whk_[A-Za-z0-9_-]{43}$")
        self.assertEqual(json.loads(entry), {
            "name": "north", "tenant": "north", "roles": ["sender", "reader"],
            "key_sha256": [hashlib.sha256(key.encode()).hexdigest()]})
        self.assertEqual((code, err, out.count(key)), (0, "", 1))
        self.assertNotEqual(self.program("keygen", "--client", "north")[1].split()[0], key)

    def test_secrets_are_of_the_form_that_takes_them(self):
        code, out, _ = self.program("keygen", "--signing")
        self.assertRegex(out, "^whsec_[A-Za-z0-9+/]{43}=\n$")
        code, out, _ = self.program("keygen", "--encryption")
        self.assertRegex(out, "^key-[0-9]{8}-[0-9a-f]{4}:[A-Za-z0-9+/]{43}=\n$")

    def test_what_makes_no_sense_is_refused_in_one_line(self):
        for arguments in ([], ["--client", "a b"], ["--client", "x", "--role", "boss"], ["--signing", "--encryption"],
                          ["--client", "x", "--signing"], ["--signing", "--role", "sender"], ["--tenant", "x"],
                          ["--client", "x", "--tenant", "X"]):
            code, out, err = self.program("keygen", *arguments)
            self.assertEqual((code, out, err.count("\n")), (2, "", 1), arguments)


class ClientsServerTest(HTTPTest):
    """A test of a server with a clients file."""

    def start_with(self, *entries, **settings):
        path = self.folder / "clients.json"
        path.write_text(json.dumps({"clients": list(entries)}))
        path.chmod(0o600)
        return self.start(clients=str(path), **settings)


class AccessTest(ClientsServerTest):
    """Who may do what."""

    def start_roles(self, **settings):
        entries = [key_entry(name) for name in receiver.ROLES]
        return self.start_with(*entries, key_entry("both", "sender", "reader"), **settings)

    def test_each_route_takes_the_role_of_its_row_and_admin_and_no_other(self):
        server = self.start_roles()
        self.assertEqual(self.post(server, X_API_Key=KEYS["sender"]).status, 200)
        for route in receiver.ROUTES:
            for name in [*receiver.ROLES, "none", ""]:
                with self.subTest(f"{route.method} {route.path} as {name or 'nobody'}"):
                    headers = {"Authorization": "Bearer " + KEYS[name]} if name else {}
                    body = event(appointment_id=name) if route.method == "POST" else None
                    answer = self.call(server, route.method, route.path.replace("{event_id}", "1"), body, **headers)
                    if route.role in ("", name) or name == "admin":
                        self.assertEqual(answer.status, 200)
                        if route.otherwise:
                            self.assertEqual(set(answer.json), {"status", "checks"})
                    elif route.otherwise:
                        self.assertEqual((answer.status, answer.json), (200, {"status": "ok"}))
                    elif name in receiver.ROLES:
                        self.assertEqual(answer.status, 403)
                        self.assertEqual(answer.headers["www-authenticate"],
                                         'Bearer realm="appointments", error="insufficient_scope"')
                    else:
                        self.assertEqual(answer.status, 401)
                        self.assertEqual(answer.headers["www-authenticate"], 'Bearer realm="appointments"' +
                                         ', error="invalid_token"' * bool(name))
        self.assertEqual(rows(self.database), 3)

    def test_a_key_counts_in_either_header_and_any_spelling_of_bearer(self):
        server = self.start_roles()
        key, wrong = KEYS["both"], KEYS["none"]
        for headers, status in (({"Authorization": f"bearer {key}"}, 200), ({"Authorization": f"BEARER   {key}"}, 200),
                                ({"X_API_Key": key}, 200), ({"X_API_Key": key, "Authorization": "Basic eA=="}, 200),
                                ({"X_API_Key": key, "Authorization": f"Bearer {wrong}"}, 200),
                                ({"Authorization": key}, 401), ({"Authorization": f"Bearer {key} x"}, 401),
                                ({"Authorization": f"Bearer {key}, Bearer {key}"}, 401), ({"X_API_Key": key[:-1]}, 401),
                                ({"Authorization": f"Basic {key}"}, 401), ({"Authorization": "Bearer"}, 401),
                                ({"X_API_Key": key.upper()}, 401), ({"Cookie": f"key={key}"}, 401)):
            with self.subTest(headers):
                self.assertEqual(self.call(server, **headers).status, status)
        self.assertEqual(self.call(server, path=f"{PATH}?key={key}").status, 401)

    def test_the_row_and_the_log_name_the_client_and_never_its_key(self):
        server = self.start_roles()
        self.post(server, X_API_Key=KEYS["both"])
        self.post(server, X_API_Key=KEYS["none"])
        self.call(server, path="/health", Authorization="Bearer " + KEYS["reader"])
        self.assertEqual(rows(self.database, "SELECT client FROM appointment_events"), "both")
        log = self.log_text(server)
        self.assertIn("client=both address=127.0.0.1 payload=", log)
        self.assertRegex(log, r"WARNING - \[.*\] POST /webhook/appointments 401 credentials that nobody has .*client=127")
        for key in KEYS.values():
            self.assertNotIn(key, log)
            self.assertNotIn(hashlib.sha256(key.encode()).hexdigest(), log)

    def test_unknown_and_wrong_and_none_get_the_same_body(self):
        server = self.start_roles()
        bodies = {json.dumps({**self.post(server, **headers).json, "request_id": ""}) for headers in (
            {}, {"X_API_Key": KEYS["none"]}, {"X_API_Key": KEYS["sender"] + "x"}, {"Authorization": "Basic eA=="})}
        self.assertEqual(len(bodies), 1, bodies)
        self.assertIn('"error": "Unauthorized"', bodies.pop())

    def test_a_disabled_client_is_known_and_refused(self):
        server = self.start_with(key_entry("sender", disabled=True), key_entry("both", "sender"))
        answer = self.post(server, X_API_Key=KEYS["sender"])
        self.assertEqual((answer.status, answer.json["message"]), (403, "This client is disabled"))
        self.assertEqual(self.post(server, X_API_Key=KEYS["both"]).status, 200)
        self.assertIn(" 403 This client is disabled ", self.log_text(server))

    def test_a_client_may_come_from_its_networks_only(self):
        server = self.start_with(key_entry("sender", allow_from=["203.0.113.0/24", "2001:db8::/32"]),
                                 key_entry("both", "sender", allow_from=["203.0.113.0/24", "127.0.0.0/8"]))
        self.assertEqual(self.post(server, X_API_Key=KEYS["sender"]).status, 403)
        self.assertEqual(self.post(server, X_API_Key=KEYS["both"]).status, 200)
        for address, inside in (("203.0.113.7", True), ("203.0.114.1", False), ("2001:db8::1", True), ("::1", False),
                                ("fe80::1%eth0", False), ("no address", False)):
            networks = receiver.networks_of(["203.0.113.0/24", "2001:db8::/32"])
            self.assertEqual(receiver.is_in(address, networks), inside)

    def test_who_is_over_the_rate_gets_429_and_the_others_do_not(self):
        server = self.start_with(key_entry("sender", rate=0.001, burst=2), key_entry("both", "sender"))
        answers = [self.post(server, event(appointment_id=str(number)), X_API_Key=KEYS["sender"]) for number in range(3)]
        self.assertEqual([answer.status for answer in answers], [200, 200, 429])
        self.assertEqual(answers[2].headers["retry-after"], "1000")
        self.assertEqual(answers[2].headers["ratelimit-policy"], '"requests";q=2;w=2000')
        self.assertEqual(self.post(server, X_API_Key=KEYS["both"]).status, 200)

    def test_the_rate_for_addresses_counts_all_who_are_not_known(self):
        server = self.start_with(key_entry("both", "sender", "reader"), rate_limit=1)
        found = [self.call(server, path="/health/live").status for _ in range(2)]
        found += [self.call(server).status, self.call(server, path="/health/live").status]
        self.assertIn(found, ([200, 200, 429, 429], [200, 200, 401, 429]))
        for _ in range(5):
            self.assertEqual(self.call(server, X_API_Key=KEYS["both"]).status, 200)

    def test_the_rate_holds_for_the_status_of_health_too_and_what_is_refused_counts(self):
        server = self.start_with(key_entry("sender", rate=0.001, burst=2), key_entry("operator"), rate_limit=1)
        self.assertIn(429, [self.call(server, path="/health").status for _ in range(9)])
        self.assertEqual(self.call(server, path="/health", X_API_Key=KEYS["operator"]).status, 200)
        self.assertEqual([self.call(server, X_API_Key=KEYS["sender"]).status for _ in range(4)], [403, 403, 429, 429])

    def test_without_clients_the_rate_holds_for_every_address(self):
        server = self.start(rate_limit=1)
        self.assertIn(429, [self.post(server).status for _ in range(9)])

    def test_ten_thousand_wrong_keys_are_refused_and_the_right_one_is_not(self):
        server = self.start_roles()
        found = Counter()
        for part in range(20):
            found.update(statuses(self.exchange(server, b"".join(
                post_bytes(event(), f"X-API-Key: {KEYS['none']}{part}-{number}") for number in range(500)))))
        self.assertEqual(found, {401: receiver.REFUSALS, 429: 10000 - receiver.REFUSALS})
        self.assertEqual(self.post(server, X_API_Key=KEYS["sender"]).status, 200)
        answer = self.post(server, X_API_Key=KEYS["none"])
        self.assertEqual((answer.status, answer.json["error"]), (429, "Too Many Requests"))
        self.assertLessEqual(int(answer.headers["retry-after"]), 60)
        self.assertEqual(self.post(server).status, 401)         # who shows nothing does not guess

    def test_a_stranger_whose_small_body_comes_in_pieces_does_not_end_the_connection(self):
        server = self.start_roles()
        connection = self.connect(server)
        refused = post_bytes(event(), "X-API-Key: " + KEYS["none"])
        connection.sendall(refused[:-5])
        until(lambda: [one.phase for one in server._server.open_connections] == [receiver.Phase.BODY], "the body")
        connection.sendall(refused[-5:] + post_bytes(event(), "X-API-Key: " + KEYS["sender"]))
        connection.shutdown(socket.SHUT_WR)
        self.assertEqual(statuses(read_all(connection)), [401, 200])

    def test_the_same_bytes_from_elsewhere_get_no_more_than_they_may(self):
        server = self.start_with(key_entry("sender", allow_from=["127.0.0.2/32"]))
        request = post_bytes(event(), "X-API-Key: " + KEYS["sender"])
        for source, status in (("127.0.0.2", 200), ("127.0.0.2", 409), ("127.0.0.1", 403), ("127.0.0.3", 403),
                               ("127.0.0.2", 409)):
            with socket.create_connection(("127.0.0.1", server.port), WAIT, (source, 0)) as connection:
                connection.sendall(request)
                connection.shutdown(socket.SHUT_WR)
                self.assertEqual(statuses(read_all(connection)), [status])

    def test_pipelined_requests_with_and_without_a_key_are_answered_in_order(self):
        server = self.start_roles()
        pieces, expected = [], []
        for number in range(30):
            name, status = (("sender", 200), ("none", 401), ("reader", 403))[number % 3]
            pieces.append(post_bytes(event(appointment_id=str(number)), "X-API-Key: " + KEYS[name]))
            expected.append(status)
        self.assertEqual(self.talk_statuses(server, b"".join(pieces)), expected)

    def test_a_reload_takes_the_new_clients_and_a_broken_file_keeps_the_old(self):
        server = self.start_with(key_entry("sender"))
        path = self.folder / "clients.json"
        path.write_text(json.dumps({"clients": [key_entry("both", "sender")]}))
        self.assertTrue(server.reload())
        self.assertEqual([self.post(server, X_API_Key=KEYS[name]).status for name in ("both", "sender")], [200, 401])
        for text in ("{", '{"clients": [{}]}', ""):
            path.write_text(text)
            self.assertFalse(server.reload())
            self.assertEqual([self.post(server, X_API_Key=KEYS[name]).status for name in ("both", "sender")], [409, 401])
        path.unlink()
        self.assertFalse(server.reload())
        self.assertEqual(self.post(server).status, 401)
        log = self.log_text(server)
        self.assertIn("Reloaded: schema, 1 clients", log)
        self.assertIn(f"ERROR - [-] Nothing was reloaded, the settings of before go on: clients {path}: ", log)

    def test_a_connection_that_is_open_lives_under_the_new_rules(self):
        server = self.start_with(key_entry("sender"))
        request = post_bytes(event(), "X-API-Key: " + KEYS["sender"])
        connection = self.connect(server)
        for status in (b"200", b"409"):
            connection.sendall(request)
            self.assertIn(b" " + status + b" ", connection.recv(65536))
        (self.folder / "clients.json").write_text('{"clients": []}')
        self.assertTrue(server.reload())
        connection.sendall(request)
        self.assertIn(b" 401 ", connection.recv(65536))


class SignedEventTest(ClientsServerTest):
    """Who signs is known by it: over the body that came, now, and for posting only."""

    KEY, OTHER = b"k" * 24, b"o" * 24

    def entry(self, name="north", key=KEY, sender="standard", **members):
        """An entry of the clients file for a client that signs."""
        settings, secret_of, _ = SENDERS[sender]
        return {"name": name, "roles": ["sender"], "signature": {**settings, "secrets": [secret_of(key)]},
                **members}

    def signed(self, body=None, key=KEY, sender="standard", late=0, **changed):
        """The bytes of a POST that was signed `late` seconds ago; fields `changed`, or left out with None."""
        body = json.dumps(event() if body is None else body).encode()
        fields = SENDERS[sender][2](key, body, int(time.time()) - late)
        fields.update((name.replace("_", "-"), value) for name, value in changed.items())
        return post_bytes(body, *[f"{name}: {value}" for name, value in fields.items() if value is not None])

    def through(self, server, data):
        """[status] of a request that comes each way: alone, read by the poller, in pieces, chunked."""
        whole = self.talk_statuses(server, data)
        kept, (head, _, body) = self.connect(server), data.partition(b"\r\n\r\n")
        kept.sendall(head_bytes(first="GET /health/live HTTP/1.1"))
        self.read_answer(kept)
        kept.sendall(data)
        whole.append(self.read_answer(kept).status)
        connection = self.connect(server)
        connection.sendall(head + b"\r\n\r\n" + body[:9])
        until(lambda: [one for one in server._server.open_connections if one.phase == receiver.Phase.BODY] or
              select.select([connection], [], [], 0)[0], "the first piece")
        connection.sendall(body[9:])
        whole.append(self.read_answer(connection).status)
        for one in (kept, connection):
            one.close()
        head = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", head)
        pieces = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in cut(body, 5, 20) if piece)
        return whole + self.talk_statuses(server, head + b"\r\n\r\n" + pieces + b"0\r\n\r\n")

    def assert_stored(self, *clients):
        self.assertEqual(rows(self.database,
                              "SELECT client FROM appointment_events ORDER BY id"),
                         clients[0] if len(clients) == 1 else [(client,) for client in clients])

    def test_a_signed_event_is_stored_under_the_name_of_its_client_whichever_way_it_comes(self):
        server = self.start_with(self.entry(), key_entry("sender"))
        self.assertEqual(self.through(server, self.signed()), [200, 409, 409, 409])
        kept = self.connect(server)
        for number in range(3):                         # the second and third are read by the poller
            kept.sendall(self.signed(event(appointment_id=str(number))))
            self.assertEqual(self.read_answer(kept).status, 200)
        self.assert_stored(*["north"] * 4)
        self.assertIn("client=north address=127.0.0.1 payload=", self.log_text(server))

    def test_every_senders_way_to_sign_is_taken_and_no_other_body_under_it(self):
        for name in SENDERS:
            with self.subTest(name):
                file = name.replace(" ", "-")
                server = self.start_with(self.entry(sender=name), database=str(self.folder / f"{file}.db"),
                                         log_file=str(self.folder / f"{file}.log"))
                data = self.signed(sender=name)
                self.assertEqual(self.talk_statuses(server, data.replace(b"PAT-1", b"PAT-2")), [401])
                self.assertEqual(self.talk_statuses(server, data), [200])

    def test_what_is_forged_old_or_broken_is_a_401_each_way_and_nothing_is_stored(self):
        server = self.start_with(self.entry(), self.entry("zocdoc", self.OTHER, "zocdoc"),
                                 key_entry("sender"))
        good = self.signed()
        signature, = re.findall(rb"webhook-signature: (.*)\r\n", good)
        twice = good.replace(b"webhook-signature", b"webhook-signature: %b\r\nwebhook-signature" % signature)
        cases = {"another secret": self.signed(key=b"x" * 24),
                 "the secret of another": self.signed(key=self.OTHER),
                 "another body": good.replace(b"PAT-1", b"PAT-2"), 
                 "replayed later": self.signed(late=301), "from the future": self.signed(late=-310),
                 "an old one with a new time": self.signed(late=1000, webhook_timestamp=int(time.time())),
                 "another id": self.signed(webhook_id="msg_2"), "no id": self.signed(webhook_id=None),
                 "no time": self.signed(webhook_timestamp=None),
                 "no number": self.signed(webhook_timestamp="now"),
                 "milliseconds": self.signed(webhook_timestamp=int(time.time() * 1000)),
                 "an endless number": self.signed(webhook_timestamp="9" * 1000),
                 "no signature": self.signed(webhook_signature=None),
                 "an empty one": self.signed(webhook_signature=""),
                 "a header twice": twice,
                 "a header twice, one of them garbage": twice.replace(signature, b"x", 1),
                 "another version": good.replace(b"v1,", b"v1a,"),
                 "in hex": self.signed(webhook_signature="v1," + "0" * 64),
                 "garbage": self.signed(webhook_signature="\xff\xfe,=;v1,\t" * 50),
                 "sixteen thousand": self.signed(webhook_signature="v1, " * 2000),
                 "a time of two": self.signed(webhook_timestamp="1, 2")}
        for what, data in cases.items():
            with self.subTest(what):
                server._endpoints.rules.access._strikes = receiver.PerAddress(receiver.Strikes)
                self.assertEqual(self.through(server, data), [401] * 4)
        self.assertEqual(rows(self.database), 0)
        self.assertEqual(self.through(server, good), [200, 409, 409, 409])
        log = self.log_text(server)
        for note in ("no signature fits", "the timestamp is 30[0-9] s old", "the timestamp cannot be read",
                     "no credentials", "webhook-id is missing", "webhook-timestamp is missing",
                     "the signature header cannot be read"):
            self.assertTrue(re.search(f"WARNING - .* 401 {note} ", log), note)
        for secret in (*map(base64_of, (self.KEY, self.OTHER)), signature.decode(), "msg_"):
            self.assertNotIn(secret, log)

    def test_a_signature_is_good_for_posting_only(self):
        server = self.start_with(self.entry(roles=["admin"]))
        empty = SENDERS["standard"][2](self.KEY, b"", int(time.time()))
        for method, path in (("GET", PATH), ("GET", PATH + "/1"), ("HEAD", PATH)):
            self.assertEqual(self.call(server, method, path, **empty).status, 401)
        self.assertEqual(self.call(server, path="/health", **empty).json, {"status": "ok"})
        self.assertEqual(self.call(server, "POST", PATH, b"", **empty).status, 400)
        body = json.dumps(event()).encode()
        signed = SENDERS["standard"][2](self.KEY, body, int(time.time()))
        self.assertEqual(self.call(server, "GET", PATH, body, **signed).status, 401)
        self.assertEqual(self.call(server, "POST", PATH, body, **signed).status, 200)

    def test_of_several_that_could_be_meant_the_one_whose_secret_fits_is_the_sender(self):
        server = self.start_with(*[self.entry(f"clinic-{number}", b"%024d" % number) for number in range(5)],
                                 self.entry("zocdoc", self.OTHER, "zocdoc"))
        for number in range(5):
            data = self.signed(event(appointment_id=str(number)), b"%024d" % number)
            self.assertEqual(self.talk_statuses(server, data), [200])
        self.assertEqual(self.talk_statuses(server, self.signed(key=self.OTHER, sender="zocdoc")), [200])
        self.assert_stored("clinic-0", "clinic-1", "clinic-2", "clinic-3", "clinic-4", "zocdoc")

    def test_each_secret_of_a_rotation_counts_until_it_is_taken_out(self):
        entry = self.entry()
        entry["signature"]["secrets"].append("whsec_" + base64_of(self.OTHER))
        server = self.start_with(entry)
        for key, status in ((self.KEY, 200), (self.OTHER, 409)):
            self.assertEqual(self.talk_statuses(server, self.signed(key=key)), [status])
        del entry["signature"]["secrets"][0]
        (self.folder / "clients.json").write_text(json.dumps({"clients": [entry]}))
        self.assertTrue(server.reload())
        for key, status in ((self.KEY, 401), (self.OTHER, 409)):
            self.assertEqual(self.talk_statuses(server, self.signed(key=key)), [status])

    def test_a_retry_with_its_old_id_is_an_ordinary_retry(self):
        for duplicates, status in (("conflict", 409), ("ok", 200)):
            with self.subTest(duplicates):
                server = self.start_with(self.entry(), duplicates=duplicates,
                                         database=str(self.folder / f"{duplicates}.db"))
                self.assertEqual(self.talk_statuses(server, self.signed(late=200)), [200])
                retry, = self.talk(server, self.signed())
                self.assertEqual((retry.status, retry.json["event_id"]), (status, 1))
                other, = self.talk(server, self.signed(event(notes="other")))
                self.assertEqual((other.status, other.json["identical"]), (409, False))

    def test_who_signs_is_held_to_role_network_and_rate_and_may_be_disabled(self):
        for members, found in (({"roles": ["reader"]}, [403, 403]), ({"disabled": True}, [403, 403]),
                               ({"allow_from": ["203.0.113.0/24"]}, [403, 403]),
                               ({"roles": ["admin"]}, [200, 409]),
                               ({"rate": 0.001, "burst": 1}, [200, 429])):
            with self.subTest(members):
                file = str(self.folder / f"{len(os.listdir(self.folder))}.db")
                server = self.start_with(self.entry(**members), database=file)
                self.assertEqual([self.talk_statuses(server, self.signed())[0] for _ in range(2)], found)

    def test_where_all_is_required_key_and_signature_each_alone_are_refused(self):
        entry = self.entry("both", require="all", key_sha256=key_entry("both")["key_sha256"])
        server = self.start_with(entry, key_entry("sender"), self.entry("zocdoc", self.OTHER, "zocdoc"))
        both, alone = self.signed(x_api_key=KEYS["both"]), self.signed()
        wrong = {"the key alone": post_bytes(event(), "X-API-Key: " + KEYS["both"]),
                 "the signature alone": alone,
                 "another's key": self.signed(x_api_key=KEYS["none"]),
                 "a key and another's signature": self.signed(key=b"x" * 24, x_api_key=KEYS["both"]),
                 "a key and an old signature": self.signed(late=400, x_api_key=KEYS["both"])}
        for what, data in wrong.items():
            with self.subTest(what):
                self.assertEqual(self.through(server, data), [401] * 4)
        self.assertEqual(self.through(server, both), [200, 409, 409, 409])
        self.assertEqual(self.talk_statuses(server, self.signed(event(appointment_id="2"),
                                                                x_api_key=KEYS["sender"])), [200])
        self.assertEqual(self.talk_statuses(server, self.signed(
            event(appointment_id="3"), self.OTHER, "zocdoc", x_api_key=KEYS["both"])), [200])
        self.assert_stored("both", "sender", "zocdoc")      # of two, the one that has shown all that it needs

    def test_after_twenty_wrong_signatures_in_a_minute_it_is_429_and_right_ones_still_pass(self):
        server = self.start_with(self.entry(), key_entry("sender"))
        wrong = b"".join(self.signed(key=b"%024d" % number) for number in range(200))
        self.assertEqual(Counter(self.talk_statuses(server, wrong)),
                         {401: receiver.REFUSALS, 429: 200 - receiver.REFUSALS})
        self.assertEqual(self.through(server, self.signed(key=b"x" * 24)), [429] * 4)
        self.assertEqual(self.through(server, self.signed()), [200, 409, 409, 409])
        self.assertEqual(self.through(server, post_bytes(event(), "X-API-Key: " + KEYS["sender"])), [409] * 4)
        self.assertEqual(self.through(server, post_bytes(event())), [401] * 4)

    def test_a_stranger_is_refused_before_a_body_is_read_or_asked_for(self):
        server = self.start_with(self.entry(), key_entry("sender"), key_entry("reader"), body_timeout=2)
        first, key = f"POST {PATH} HTTP/1.1", "X-API-Key: " + KEYS["sender"]
        for credentials, status in ((["X: y"], 401), (["X-API-Key: " + KEYS["none"]], 401),
                                    (["Authorization: Bearer x"], 401),
                                    (["X-API-Key: " + KEYS["reader"]], 403)):
            for lines in (["Content-Length: 50000"], ["Transfer-Encoding: chunked"],
                          ["Content-Length: 50000", "Expect: 100-continue"],
                          ["Content-Length: 10", "Expect: 100-continue"],
                          ["Transfer-Encoding: chunked", "Expect: 100-continue"]):
                with self.subTest(credentials, lines=lines):
                    connection = self.connect(server)
                    connection.sendall(head_bytes(*lines, *credentials, first=first))   # and no body
                    answer, = answers_in(read_all(connection))
                    self.assertEqual((self.proper(answer).status, answer.headers["connection"]),
                                     (status, "close"))
        fields = SENDERS["standard"][2](self.KEY, BODY, int(time.time()))
        for lines in ([key], [f"{name}: {value}" for name, value in fields.items()]):
            connection = self.connect(server)
            connection.sendall(head_bytes(f"Content-Length: {len(BODY)}", "Expect: 100-continue", *lines,
                                          first=first))
            self.assertEqual(connection.recv(65536), b"HTTP/1.1 100 Continue\r\n\r\n")
            connection.sendall(BODY)
            self.assertIn(self.read_answer(connection).status, (200, 409))

    def test_large_bodies_of_strangers_take_no_place_from_others(self):
        server = self.start_with(key_entry("sender"))
        body, key = event(notes="n" * 200000), "X-API-Key: " + KEYS["sender"]
        chunked = head_bytes("Transfer-Encoding: chunked",
                             first=f"POST {PATH} HTTP/1.1") + b"fa00\r\n" + b" " * 60000
        server._server.large = receiver.Budget(0)
        for data in (post_bytes(body), post_bytes(body)[:20000], post_bytes(body, "X-API-Key: x"), chunked):
            self.assertEqual(self.talk_statuses(server, data), [401])
        self.assertEqual(self.talk_statuses(server, post_bytes(body, key)[:-1]), [503])
        server._server.large = receiver.Budget(1000000)
        self.assertEqual(self.talk_statuses(server, post_bytes(body, key)), [200])

    def test_ten_thousand_wrong_keys_and_signatures_are_not_kept(self):
        server = self.start_with(self.entry(), key_entry("sender"))
        for part in range(5):
            data = b"".join(self.signed(webhook_id=f"{part}-{number}",
                                        x_api_key=f"{part}-{number}") for number in range(500))
            self.assertLessEqual(set(statuses(self.exchange(server, data))), {401, 429, 200, 409})
            rules = server._endpoints.rules
            self.assertLessEqual(len(rules._kept), receiver.HEADS_KEPT)
            self.assertLessEqual(len(rules._met), 4 * receiver.HEADS_KEPT + 1)
            self.assertLessEqual(len(rules.access._strikes._kept), 1)


class TokenAccessTest(OauthTest, ClientsServerTest):
    """Who is known by a token, through a running server."""
    NOW = int(time.time())

    def start_oauth(self, *entries, **oauth):
        if not {"jwks_url", "introspection_url"} & set(oauth):
            (self.folder / "jwks.json").write_text(json.dumps({"keys": [self.jwk(kind) for kind in KEY_PAIRS]}))
            oauth["jwks_file"] = "jwks.json"
        path = self.folder / "clients.json"
        path.write_text(json.dumps({"clients": list(entries), "oauth": {**self.SETTINGS, **oauth}}))
        path.chmod(0o600)
        return self.start(clients=str(path))

    def bearer(self, **claims):
        return {"Authorization": "Bearer " + self.token(**claims)}

    def test_the_scopes_of_a_token_are_its_roles_in_the_default_tenant(self):
        server = self.start_oauth({"name": "north", "roles": ["sender"], "tenant": "north", "key_sha256": ["a" * 64]})
        for scope, expected in (("appointments:write", [200, 403]), ("appointments:read", [403, 200]),
                                ("appointments:write appointments:read x", [409, 200]), ("x", [403, 403]), ("", [403, 403])):
            with self.subTest(scope):
                headers = self.bearer(scope=scope, client_id="robot\r\nx y=z")
                self.assertEqual([self.post(server, **headers).status, self.call(server, **headers).status], expected)
        self.assertEqual(rows(self.database, "SELECT client FROM appointment_events"), "oauth:robot__x_y_z")
        answer = self.call(server, **self.bearer(scope="x"))
        self.assertEqual(answer.headers["www-authenticate"], 'Bearer realm="appointments", error="insufficient_scope"')

    def test_a_token_names_a_tenant_only_where_its_scope_is_that_of_an_admin(self):
        server = self.start_oauth({"name": "north", "roles": ["sender"], "tenant": "north", "key_sha256": [
            hashlib.sha256(KEYS["sender"].encode()).hexdigest()]}, scopes={"read": "reader", "all": "admin"})
        self.post(server, X_API_Key=KEYS["sender"])
        for scope, tenant, status in (("read", "north", 403), ("read", "none", 403), ("all", "north", 200), ("all", "none", 404),
                                      ("x", "north", 403)):
            with self.subTest(scope, tenant=tenant):
                answer = self.call(server, path=f"{PATH}?tenant={tenant}", **self.bearer(scope=scope))
                self.assertEqual(answer.status, status)
        answer = self.call(server, path=PATH + "?tenant=north", **self.bearer(scope="all"))
        self.assertEqual(len(answer.json["events"]), 1)

    def test_a_token_that_names_a_client_gets_its_tenant_roles_and_rate(self):
        server = self.start_oauth(
            {"name": "north", "tenant": "north", "roles": ["sender"], "oauth": {"client_id": "robot"}, "rate": 0.001,
             "burst": 2},
            {"name": "desk", "roles": ["reader"], "oauth": {"subject": "anna"}})
        robot = self.bearer(client_id="robot", sub="anna", scope="appointments:read")
        self.assertEqual([self.post(server, event(appointment_id=str(n)), **robot).status for n in range(3)], [200, 200, 429])
        self.assertEqual(self.call(server, **self.bearer(sub="anna")).json["events"], [])
        self.assertEqual(self.post(server, **self.bearer(sub="anna", scope="appointments:write")).status, 403)
        self.assertEqual(rows(self.database.with_name("events.north.db"), "SELECT DISTINCT client FROM appointment_events"),
                         "north")

    def test_a_token_that_proves_nobody_is_a_401_whose_reason_only_the_log_hears(self):
        server = self.start_oauth()
        good = self.token(scope="appointments:write")
        for token in (self.token(exp=self.NOW - 100), self.token(aud="other"), self.token(iss="https://evil.example"),
                      good[:-4] + "AAAA", good + "x", "a.b.c", "eyJhbGciOiJub25lIn0.e30.", "whk_" + "x" * 43):
            with self.subTest(token):
                answer = self.post(server, Authorization="Bearer " + token)
                self.assertEqual((answer.status, answer.json["message"]), (401, "Who sends this is not known here"))
                self.assertEqual(answer.headers["www-authenticate"], 'Bearer realm="appointments", error="invalid_token"')
        self.assertEqual(self.post(server, Authorization="Bearer " + good).status, 200)
        log = self.log_text(server)
        self.assertIn("401 the token ", log)
        for part in good.split("."):
            self.assertNotIn(part, log)

    def test_a_token_is_for_the_poller_too_and_each_request_on_a_connection_is_judged(self):
        server = self.start_oauth()
        data = [post_bytes(event(appointment_id=str(number)), "Authorization: Bearer " + token) for number, token in
                enumerate((self.token(scope="appointments:write"), self.token(scope="x"), "a.b.c") * 5)]
        connection = self.connect(server)
        for number, request in enumerate(data):
            connection.sendall(request)
            self.assertEqual(self.read_answer(connection).status, (200, 403, 401)[number % 3])

    def test_one_that_ends_is_refused_from_then_on_with_the_same_bytes(self):
        server = self.start_oauth(leeway=0)
        headers = self.bearer(scope="appointments:write", exp=int(time.time()) + 2)
        self.assertEqual(self.post(server, **headers).status, 200)
        until(lambda: self.post(server, **headers).status == 401, "the end of the token")

    def test_while_the_issuer_is_not_there_tokens_get_503_and_keys_still_pass(self):
        issuer = Issuer(self, {"keys": [self.jwk("Ed25519")]})
        at_once = issuer.answer
        issuer.answer = lambda handler: issuer.send(handler, 500, b"{}")
        with mock.patch.object(receiver, "JWKS_RETRY_SECONDS", 0.01):
            server = self.start_oauth(key_entry("admin"), jwks_url=issuer.url)
            answer = self.post(server, **self.bearer(scope="appointments:write"))
            self.assertEqual((answer.status, "retry-after" in answer.headers), (503, True))
            self.assertEqual(self.post(server, X_API_Key=KEYS["admin"]).status, 200)
            check = self.call(server, path="/health", X_API_Key=KEYS["admin"]).json["checks"]["oauth"]
            self.assertEqual((check["status"], check["breaker"] in ("closed", "open", "half-open")), ("failing", True))
            self.assertEqual(self.call(server, path="/health/ready").status, 200)
            issuer.answer = at_once
            until(lambda: self.post(server, **self.bearer(scope="appointments:write")).status == 409, "the keys")

    def test_a_reload_goes_on_with_the_keys_that_were_fetched(self):
        issuer = Issuer(self, {"keys": [self.jwk("Ed25519")]})
        server = self.start_oauth(jwks_url=issuer.url)
        self.assertEqual(self.post(server, **self.bearer(scope="appointments:write")).status, 200)
        issuer.answer = lambda handler: issuer.send(handler, 500, b"{}")
        self.assertTrue(server.reload())
        self.assertEqual(self.post(server, **self.bearer(scope="appointments:write")).status, 409)
        path = self.folder / "clients.json"
        path.write_text(json.dumps({"clients": [], "oauth": {**self.SETTINGS, "jwks_file": "none.json"}}))
        self.assertFalse(server.reload())
        self.assertEqual(self.post(server, **self.bearer(scope="appointments:write")).status, 409)

    def test_introspection_asks_once_and_never_of_our_keys(self):
        (self.folder / "secret").write_text("s3cret")
        issuer = Issuer(self, {"active": True, "client_id": "robot", "scope": "appointments:write"})
        server = self.start_oauth(introspection_url=issuer.url, client_id="us", client_secret_file="secret")
        for _ in range(3):
            self.assertIn(self.post(server, Authorization="Bearer opaque").status, (200, 409))
        self.assertEqual(self.post(server, Authorization="Bearer " + KEYS["none"]).status, 401)
        self.assertEqual(len(issuer.requests), 1)
        self.assertIn("client_secret_file", self.log_text(server))       # others can read it


class EncryptedServerTest(ServerTest):
    """A running server with a key file, and the commands around it."""

    def key_file(self, *names):
        path = self.folder / "keys"
        path.write_text("".join(f"{name}:{base64.b64encode(name[:1].encode() * 32).decode()}\n" for name in names))
        path.chmod(0o600)
        return str(path)

    def test_events_are_stored_found_and_compared_and_no_file_shows_them(self):
        server = self.start(encryption_key_file=self.key_file("first"))
        sent = event(patient_id="PAT-planted", notes="planted notes")
        self.assertEqual(self.post(server, sent).status, 200)
        self.assertEqual(self.post(server, sent).json["identical"], True)
        self.assertEqual(self.post(server, event(patient_id="PAT-planted", notes="planted otherwise")).status, 409)
        self.assertEqual(self.post(server, event(patient_id="PAT-planted", notes="planted" * 3000)).status, 409)
        found = self.call(server, path=PATH + "?patient_id=PAT-planted").json["events"]
        self.assertEqual([(one["patient_id"], one["notes"], one["payload"]) for one in found],
                         [("PAT-planted", "planted notes", sent)])
        self.assertEqual(self.call(server, path="/health").status, 200)
        server.stop()
        for name, data in files(self.folder).items():
            self.assertNotIn(b"planted", data, name)

    def test_one_that_cannot_be_read_is_an_error_in_the_log_and_no_affair_of_the_others(self):
        server = self.start(encryption_key_file=self.key_file("first"))
        for number in range(3):
            self.post(server, event(appointment_id=str(number)))
        write_rows(self.database, "UPDATE appointment_events SET payload = x'01' WHERE id = 2")
        found = self.call(server).json["events"]
        self.assertEqual([one.get("unreadable") for one in found], [None, True, None])
        self.assertEqual((found[1]["patient_id"], found[1]["payload"], found[1]["appointment_id"]), (None, None, "1"))
        self.assertEqual(self.call(server, path=PATH, Accept="text/csv").status, 200)
        self.assertIs(self.call(server, path=PATH + "/2").json["unreadable"], True)
        self.assertEqual(self.log_text(server).count("ERROR - [-] the event with id 2 cannot be decrypted"), 1)

    def test_a_reload_takes_a_new_key_and_one_without_the_old_is_refused(self):
        server = self.start(encryption_key_file=self.key_file("old"))
        self.post(server)
        self.key_file("new")
        self.assertFalse(server.reload())
        self.assertEqual(self.call(server).json["events"][0]["patient_id"], event()["patient_id"])
        path = self.key_file("new", "old")
        self.assertTrue(server.reload())
        self.post(server, event(appointment_id="2"))
        code, out, err = command("rekey", "--database", self.database, "--encryption-key-file", path)
        self.assertEqual((code, out, err), (0, "1 rows encrypted with new\n", ""))
        self.assertEqual(self.post(server, event(appointment_id="3")).status, 200)
        self.key_file("new")
        self.assertTrue(server.reload())
        self.assertEqual([one.get("unreadable") for one in self.call(server).json["events"]], [None] * 3)

    def test_rekey_refuses_a_plain_database_that_is_in_use_and_takes_it_once_it_is_not(self):
        server = self.start()
        self.post(server)
        path = self.key_file("first")
        arguments = ("rekey", "--database", self.database, "--encryption-key-file", path)
        code, out, err = command(*arguments)
        self.assertEqual((code, out, err.count("\n")), (2, "", 1))
        self.assertIn("stop the service first", err)
        self.assertEqual(self.post(server, event(appointment_id="2")).status, 200)
        server.stop()
        with self.assertRaises(SetupError) as caught:
            self.start(encryption_key_file=path)
        self.assertIn("rekey", str(caught.exception))
        self.assertEqual(command(*arguments), (0, "2 rows encrypted with first\n", ""))
        server = self.start(encryption_key_file=path)
        self.assertEqual(len(self.call(server).json["events"]), 2)

    def engine_file(self):
        """A database that is there."""
        engine = SQLite(str(self.database))
        engine.open()
        engine.close()

    def test_what_rekey_cannot_do_is_one_line_and_exit_2(self):
        path = self.key_file("first")
        self.engine_file()
        for arguments, word in ((("--database", self.database), "--encryption-key-file"),
                                (("--encryption-key-file", path), "no such file"),
                                (("--encryption-key-file", self.folder / "none"), "none"),
                                (("--encryption-key-file", path, "--database", path), "not a SQLite database")):
            with self.subTest(arguments), mock.patch.dict(os.environ, {}):
                arguments = ("--database", self.folder / "none.db", *arguments)
                code, out, err = command("rekey", *arguments)
                self.assertEqual((code, out, err.count("\n")), (2, "", 1))
                self.assertIn(word, err)

    def test_without_libcrypto_it_does_not_start_and_touches_nothing(self):
        with mock.patch.object(receiver.LibCrypto, "_load", side_effect=OSError), self.assertRaises(SetupError) as caught:
            self.start(encryption_key_file=self.key_file("first"))
        self.assertIn("libcrypto", str(caught.exception))
        self.assertFalse(self.database.exists())

    def test_a_key_file_that_others_can_read_is_warned_of(self):
        path = self.key_file("first")
        os.chmod(path, 0o644)
        self.assertIn(f"WARNING - [-] encryption_key_file {path}: others than its owner can read",
                      self.log_text(self.start(encryption_key_file=path)))


class AccessLogTest(ClientsServerTest):
    """Who looked, through a running server, and the commands that prove it."""

    def start_all(self, **settings):
        return self.start_with(*(key_entry(name) for name in receiver.ROLES), **settings)

    def accesses(self, database=None):
        found = rows(database or self.database, "SELECT action, client, address, detail, rows FROM access_log ORDER BY id")
        return found if isinstance(found, list) else [found]

    def read(self, server, query="", **headers):
        return self.call(server, path=PATH + query, X_API_Key=KEYS["reader"], **headers)

    def test_every_read_is_written_with_who_what_and_how_many(self):
        server = self.start_all()
        for number in range(3):
            self.post(server, event(appointment_id=str(number)), X_API_Key=KEYS["sender"])
        self.read(server)
        self.read(server, "?appointment_id=1&limit=5")
        self.read(server, "/2")
        self.read(server, "/99")
        self.assertEqual(self.accesses(), [
            ("read", "reader", "127.0.0.1", "{}", 3),
            ("read", "reader", "127.0.0.1", '{"appointment_id": "1", "limit": "5"}', 1),
            ("read", "reader", "127.0.0.1", '{"id": 2}', 1), ("read", "reader", "127.0.0.1", '{"id": 99}', 0)])

    def test_a_stream_is_written_at_its_start_and_counted_at_its_end(self):
        server = self.start_all()
        for number in range(250):
            server.store.add(stored_event(number))
        answer = self.read(server, Accept="application/x-ndjson")
        self.assertEqual(answer.body.count(b"\n"), 250)
        until(lambda: len(self.accesses()) == 2, "the end of the stream")
        self.assertEqual([(one[0], one[4]) for one in self.accesses()], [("read", None), ("read-end", 250)])

    def test_a_personal_value_is_hidden_and_the_same_one_looks_the_same(self):
        server = self.start_all()
        self.post(server, event(patient_id="PAT-planted"), X_API_Key=KEYS["sender"])
        for _ in range(2):
            self.read(server, "?patient_id=PAT-planted")
        self.read(server, "?patient_id=PAT-other")
        details = [one[3] for one in self.accesses()]
        self.assertRegex(details[0], r'\A\{"patient_id": "hmac:[0-9a-f]{32}"\}\Z')
        self.assertEqual(details[0], details[1])
        self.assertNotEqual(details[0], details[2])

    def test_polling_for_what_is_new_fills_nothing(self):
        server = self.start_all()
        self.post(server, X_API_Key=KEYS["sender"])
        for _ in range(3):
            self.assertEqual(self.read(server, "?after=1").json["events"], [])
            self.assertEqual(self.read(server, "?after=1", Accept="text/csv").status, 200)
        self.assertEqual(self.accesses(), [])
        self.read(server, "?after=0")
        self.assertEqual(len(self.accesses()), 1)

    def test_a_read_that_cannot_be_written_down_is_a_503_and_gives_nothing(self):
        server = self.start_all(busy_timeout=0.1)
        self.post(server, X_API_Key=KEYS["sender"])
        with contextlib.closing(sqlite3.connect(str(self.database), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for path in ("", "/1", "?limit=1"):
                answer = self.read(server, path)
                self.assertEqual((answer.status, b"APT-1" in answer.body), (503, False))
            answer = self.read(server, Accept="application/x-ndjson")
            self.assertEqual(answer.status, 503)
            other.execute("ROLLBACK")
        self.assertEqual(self.read(server).status, 200)

    def test_what_a_known_client_may_not_is_written_and_what_a_stranger_tries_is_not(self):
        server = self.start_all()
        self.post(server, X_API_Key=KEYS["reader"])
        self.call(server, X_API_Key=KEYS["sender"])
        self.call(server, X_API_Key=KEYS["none"])
        self.call(server, Origin="https://evil.example", X_API_Key=KEYS["sender"])
        connection = self.connect(server)
        connection.sendall(post_bytes(event(), "X-API-Key: " + KEYS["sender"]))
        self.assertEqual(self.read_answer(connection).status, 200)
        connection.sendall(post_bytes(event(), "X-API-Key: " + KEYS["reader"]))     # by the poller's way
        self.assertEqual(self.read_answer(connection).status, 403)
        self.assertEqual([one[:4] for one in self.accesses()], [
            ("refused", "reader", "127.0.0.1", "POST /webhook/appointments"),
            ("refused", "sender", "127.0.0.1", "GET /webhook/appointments"),
            ("refused", "reader", "127.0.0.1", "POST /webhook/appointments")])

    def test_a_reload_is_written_and_without_clients_nothing_is(self):
        server = self.start_all()
        self.assertTrue(server.reload())
        self.assertEqual(self.accesses(), [("reload", None, None, "schema, 4 clients", None)])
        server.stop()
        self.database.unlink()
        server = self.start()
        self.post(server)
        self.call(server)
        server.reload()
        self.assertEqual(self.accesses(), [])

    def test_a_read_of_a_tenant_is_in_that_tenants_table(self):
        server = self.start_with(key_entry("admin"), key_entry("reader", tenant="north"))
        self.call(server, path=PATH + "?tenant=north", X_API_Key=KEYS["admin"])
        self.read(server)
        self.assertEqual(self.accesses(), [])
        self.assertEqual([one[1] for one in self.accesses(self.database.with_name("events.north.db"))], ["admin", "reader"])

    def test_filters_are_encrypted_where_there_is_a_key(self):
        keys = self.folder / "keys"
        keys.write_text("first:" + base64.b64encode(b"k" * 32).decode())
        server = self.start_all(encryption_key_file=str(keys))
        self.post(server, X_API_Key=KEYS["sender"])
        self.read(server, "?appointment_id=APT-1")
        (_, _, _, detail, count), = self.accesses()
        self.assertEqual((type(detail), count), (bytes, 1))
        self.assertNotIn(b"APT-1", detail)
        server.stop()
        code, out, err = command("verify", "--database", self.database, "--encryption-key-file", keys)
        self.assertRegex(out, r"\Aok: 1 events, 0 conflicts, 1 accesses, sealed up to [^;]*\n\Z")
        self.assertEqual((code, "others than its owner" in err), (0, False))

    # -- the commands

    def test_verify_and_purge_work_beside_a_running_server_and_are_written_themselves(self):
        with mock.patch.object(receiver, "SEAL_SECONDS", 0.02):
            server = self.start()
            for number in range(20):
                server.store.add(stored_event(number, received_at="2020-01-01T00:00:00Z"))
            until(lambda: rows(self.database, "SELECT max(last_id) FROM seals") == 20, "the seals")
            code, out, err = command("verify", "--database", self.database)
            self.assertRegex(out, r"\Aok: 20 events, 0 conflicts, 0 accesses, ")
            self.assertEqual((code, err), (0, ""))
            code, out, err = command("purge", "--database", self.database, "--before", "2021-01-01")
            self.assertEqual((code, out, err), (0, "20 rows removed\n", ""))
            self.assertEqual(self.post(server).status, 200)
            found = self.accesses()
            self.assertEqual([one[0] for one in found], ["verify", "purge"])
            self.assertTrue(all(one[1].startswith("os:") for one in found))
            self.assertIn('"before": "2021-01-01T00:00:00Z"', found[1][3])
            self.assertEqual(self.call(server, path="/health").status, 200)
        server.stop()
        self.assertEqual(command("verify", "--database", self.database)[0], 0)

    def test_verify_tells_the_first_block_that_does_not_fit_and_exits_1(self):
        server = self.start()
        self.post(server)
        log = self.log_text(server)
        number, digest = re.search(r"seal (\d+) (sha256:[0-9a-f]{64})", log).groups()
        self.assertEqual(command("verify", "--database", self.database, "--seal", f"{number}:{digest}")[0], 0)
        self.assertEqual(command("verify", "--database", self.database, "--seal", f"{number}:{digest[7:]}")[0], 0)
        code, out, _ = command("verify", "--database", self.database, "--seal", f"{number}:{'0' * 64}")
        self.assertRegex(out, r"\Achanged: history up to seal 1 .* was rewritten")
        write_rows(self.database, "UPDATE appointment_events SET notes = 'x'")
        code, out, err = command("verify", "--database", self.database)
        self.assertRegex(out, r"\Achanged: rows of seal 1 \(appointment_events 1 to 1, sealed .*\): 1 are there \(.*\), 1 were ")
        self.assertEqual((code, err), (1, ""))

    def test_a_copy_that_can_only_be_read_is_verified_and_an_older_file_has_no_seals(self):
        server = self.start()
        self.post(server)
        server.stop()
        with mock.patch.object(SQLite, "open", side_effect=SetupError("it is read-only")):
            code, out, err = command("verify", "--database", self.database)
        self.assertEqual((code, out[:13], err.count("\n")), (0, "ok: 1 events,", 1))
        self.assertIn("read-only", err)
        before = self.database.read_bytes()
        write_rows(self.database, "PRAGMA user_version = 2")
        code, out, err = command("verify", "--database", self.database)
        self.assertEqual((code, out, err.count("\n")), (2, "", 1))
        self.assertIn("data version 2, which has no seals", err)
        self.assertEqual(len(self.database.read_bytes()), len(before))

    def test_what_verify_and_purge_cannot_do_is_one_line_and_exit_2(self):
        (self.folder / "text").write_text("no database, but long enough to be looked at " * 99)
        for arguments, word in ((("verify", "--database", self.folder / "none"), "there is no such file"),
                                (("verify", "--database", self.folder / "text"), "not a SQLite database"),
                                (("verify", "--seal", "x"), "--seal"), (("verify", "--seal", "1:abc"), "--seal"),
                                (("purge", "--before", "soon"), "--before"), (("purge",), "--before"),
                                (("purge", "--before", "2020-01-01", "--database", self.folder / "none"), "no such file"),
                                (("purge", "--before", "2020-13-01"), "--before")):
            with self.subTest(arguments):
                code, out, err = command(*arguments)
                self.assertEqual((code, out, err.count("\n")), (2, "", 1))
                self.assertIn(word, err)

    def test_what_is_older_than_the_retention_goes_by_itself(self):
        server = self.start()
        for number in range(20):
            server.store.add(stored_event(number, received_at="2020-01-01T00:00:00Z"))
        server.stop()
        server = self.start(retention_days=30, access_log_retention_days=3650)
        until(lambda: not rows(self.database, "SELECT count(*) FROM appointment_events"), "the purge")
        self.assertEqual(self.post(server).status, 200)
        self.assertIn("Removed 20 events and conflicts older than 30 days", self.log_text(server))
        self.assertEqual(command("verify", "--database", self.database)[0], 0)

    @unittest.skipUnless(POSIX, "kills with a signal")
    def test_a_kill_in_the_midst_of_load_leaves_seals_that_fit(self):
        for _ in range(3):
            process, port = self.spawn()
            with contextlib.suppress(OSError, AssertionError), socket.create_connection(("127.0.0.1", port), WAIT) as connection:
                for number in range(300):
                    connection.sendall(post_bytes(event(appointment_id=f"{port}-{number}")))
                    assert connection.recv(65536)
            process.kill()
            process.wait()
            code, out, _ = command("verify", "--database", self.database)
            self.assertEqual(code, 0, out)

    def spawn(self):
        process = subprocess.Popen([sys.executable, str(PROGRAM), "--port", "0", "--database", str(self.database),
                                    "--log-file", str(self.folder / "log")], stdout=subprocess.PIPE, env=clean_environment())
        self.addCleanup(process.stdout.close)
        return process, int(process.stdout.readline().rsplit(b":", 1)[1])


class TenantTest(HTTPTest):
    """One receiver, and nothing of one tenant is seen by another."""

    def start_tenants(self, **settings):
        entries = [key_entry("sender", *receiver.ROLES[:3], tenant="north"),
                   key_entry("reader", *receiver.ROLES[:3], tenant="south"), key_entry("admin"),
                   key_entry("operator", "sender", "reader", "operator"), key_entry("both", "admin", tenant="north")]
        path = self.folder / "clients.json"
        path.write_text(json.dumps({"clients": entries}))
        path.chmod(0o600)
        server = self.start(clients=str(path), **settings)
        self.as_ = {"north": {"X_API_Key": KEYS["sender"]}, "south": {"X_API_Key": KEYS["reader"]},
                    "default": {"X_API_Key": KEYS["operator"]}, "admin": {"X_API_Key": KEYS["admin"]},
                    "north admin": {"X_API_Key": KEYS["both"]}}
        return server

    def file_of(self, tenant):
        return self.database.with_name(f"{self.database.stem}.{tenant}{self.database.suffix}")

    def test_a_tenant_has_a_file_beside_the_database_that_is_made_at_start(self):
        self.start_tenants()
        self.assertTrue(self.file_of("north").exists() and self.file_of("south").exists())
        for path, expected in (("a/appointments.db", "a/appointments.north.db"), ("events", "events.north"),
                               ("a.b/events", "a.b/events.north"), ("x.y.sqlite", "x.y.north.sqlite")):
            self.assertEqual(receiver.database_of(path, "north"), expected)

    def test_the_same_event_is_new_to_each_tenant_and_has_an_id_of_its_own(self):
        server = self.start_tenants()
        for who in ("north", "south", "default"):
            answer = self.post(server, event(notes=who), **self.as_[who])
            self.assertEqual((answer.status, answer.json["event_id"]), (200, 1))
            self.assertEqual(self.post(server, event(notes=who), **self.as_[who]).json["identical"], True)
        for tenant in ("north", "south"):
            self.assertEqual(rows(self.file_of(tenant), "SELECT notes FROM appointment_events"), tenant)
        self.assertEqual(rows(self.database, "SELECT notes FROM appointment_events"), "default")

    def test_no_filter_id_or_cursor_gives_another_tenants_events(self):
        server = self.start_tenants()
        for number in range(3):
            self.post(server, event(appointment_id=f"N{number}", patient_id="P"), **self.as_["north"])
        self.post(server, event(appointment_id="S0", patient_id="P"), **self.as_["south"])
        for query in ("", "?patient_id=P", "?appointment_id=N0", "?after=0", "?limit=1000", "?event_type=scheduled"):
            with self.subTest(query):
                answer = self.call(server, path=PATH + query, **self.as_["south"])
                self.assertEqual({one["appointment_id"] for one in answer.json["events"]} - {"S0"}, set())
        self.assertEqual([self.call(server, path=f"{PATH}/{number}", **self.as_["south"]).status for number in (1, 2, 3)],
                         [200, 404, 404])
        page = self.call(server, path=PATH + "?limit=1", **self.as_["north"]).json["next"]
        self.assertEqual(self.call(server, path=page, **self.as_["south"]).json["events"], [])

    def test_only_an_admin_of_the_default_tenant_names_another(self):
        server = self.start_tenants()
        for number in range(2):
            self.post(server, event(appointment_id=f"N{number}"), **self.as_["north"])
        for who, tenant, status in (("admin", "north", 200), ("admin", "south", 200), ("admin", "none", 404),
                                    ("default", "north", 403), ("default", "none", 403), ("north admin", "south", 403),
                                    ("north admin", "north", 403), ("south", "north", 403), ("north", "", 403)):
            for path in (f"{PATH}?tenant={tenant}", f"{PATH}?%74enant={tenant}", f"{PATH}/1?tenant={tenant}"):
                with self.subTest(who, path=path):
                    is_there = "/1?" not in path or (who, tenant) != ("admin", "south")
                    self.assertEqual(self.call(server, path=path, **self.as_[who]).status, status if is_there else 404)
        page = self.call(server, path=PATH + "?tenant=north&limit=1", **self.as_["admin"]).json
        self.assertEqual([one["appointment_id"] for one in page["events"]], ["N0"])
        page = self.call(server, path=page["next"], **self.as_["admin"]).json
        self.assertEqual([one["appointment_id"] for one in page["events"]], ["N1"])
        self.assertEqual(self.call(server, path=PATH + "?tenant=north&tenant=south", **self.as_["admin"]).status, 400)
        self.assertEqual(self.post(server, event(), **self.as_["admin"]).status, 200)
        self.assertEqual(self.call(server, "POST", PATH + "?tenant=north", event(), **self.as_["admin"]).status, 409)

    def test_a_disabled_admin_hears_nothing_of_tenants(self):
        path = self.folder / "clients.json"
        path.write_text(json.dumps({"clients": [key_entry("admin", disabled=True), key_entry("sender", tenant="north")]}))
        server = self.start(clients=str(path))
        for tenant in ("north", "none"):
            answer = self.call(server, path=f"{PATH}?tenant={tenant}", X_API_Key=KEYS["admin"])
            self.assertEqual((answer.status, answer.json["message"]), (403, "This client is disabled"))

    def test_without_clients_there_are_no_tenants(self):
        self.assertEqual(self.call(self.start(), path=PATH + "?tenant=north").status, 404)

    def test_a_locked_database_of_one_is_no_affair_of_the_others(self):
        server = self.start_tenants(busy_timeout=0.2)
        with contextlib.closing(sqlite3.connect(str(self.file_of("north")), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            self.assertEqual(self.post(server, **self.as_["north"]).status, 503)
            for who in ("south", "default"):
                self.assertEqual(self.post(server, **self.as_[who]).status, 200)
                checks = self.call(server, path="/health", **self.as_[who]).json["checks"]
                self.assertEqual(checks["database"]["status"], "ok")
            other.execute("ROLLBACK")
        self.assertEqual(self.post(server, **self.as_["north"]).status, 200)
        log = self.log_text(server)
        self.assertIn("Events of north cannot be stored", log)
        self.assertIn("Events of north are stored again", log)
        self.assertNotIn("Events cannot be stored", log)

    def test_health_shows_a_tenant_its_own_database_and_the_default_one_all(self):
        server = self.start_tenants()
        for who, more in (("north", set()), ("default", {"database of north", "database of south"})):
            answer = self.call(server, path="/health", **self.as_[who])
            self.assertEqual(set(answer.json["checks"]), {"database", "disk", "log", "service"} | more)
            self.assertEqual(answer.json["checks"]["database"], {"status": "ok", "breaker": "closed"})

    def test_the_breaker_of_one_tenant_opens_alone_and_health_says_so(self):
        server = self.start_tenants(busy_timeout=0.05)
        self.file_of("north").unlink()
        for _ in range(receiver.BREAKER_FAILURES):
            self.assertEqual(self.post(server, **self.as_["north"]).status, 503)
        self.assertEqual(self.call(server, path="/health", **self.as_["north"]).json["checks"]["database"]["breaker"], "open")
        self.assertEqual(self.call(server, path="/health", **self.as_["south"]).json["checks"]["database"]["breaker"],
                         "closed")

    def test_a_reload_opens_the_database_of_a_new_tenant_and_one_that_cannot_be_opened_keeps_the_old_rules(self):
        server, path = self.start_tenants(), self.folder / "clients.json"
        self.file_of("west").write_text("no database at all, but a text that is long enough to be looked at" * 20)
        entries = [key_entry("sender", tenant="west"), key_entry("reader", tenant="east")]
        path.write_text(json.dumps({"clients": entries}))
        self.assertFalse(server.reload())
        self.assertEqual(self.post(server, **self.as_["north"]).status, 200)
        self.file_of("west").unlink()
        self.assertTrue(server.reload())
        self.assertEqual(self.post(server, X_API_Key=KEYS["sender"]).status, 200)
        self.assertEqual(rows(self.file_of("west")), 1)
        self.assertIn("ERROR - [-] Nothing was reloaded", self.log_text(server))

    def test_pipelined_events_of_two_tenants_are_answered_in_order_each_from_its_own_store(self):
        server = self.start_tenants()
        names = ["sender", "operator", "sender", "operator", "operator", "sender"] * 5
        data = b"".join(post_bytes(event(appointment_id=str(number)), "X-API-Key: " + KEYS[name])
                        for number, name in enumerate(names))
        answers = self.talk(server, data)
        self.assertEqual([answer.status for answer in answers], [200] * len(names))
        self.assertEqual([answer.json["event_id"] for answer in answers],
                         [names[:at + 1].count(name) for at, name in enumerate(names)])

    def test_a_stop_closes_all_and_on_event_hears_of_all(self):
        heard = []
        server = self.start_tenants(on_event=heard.append)
        for who in ("north", "south", "default"):
            self.post(server, event(notes=who), **self.as_[who])
        server.stop()
        self.assertEqual(sorted(one.notes for one in heard), ["default", "north", "south"])
        self.assertEqual([name for name in files(self.folder) if name.endswith(("-wal", "-shm"))], [])


# =============================================================================
# TLS and proxies
# =============================================================================

# For 127.0.0.1 and localhost, until 2125; the authority's key is nowhere any more
AUTHORITY = """\
-----BEGIN CERTIFICATE-----
MIIBmTCCAT+gAwIBAgIURTFrxt2O4VFQxg+Jr6vS+bMF6WIwCgYIKoZIzj0EAwIw
GTEXMBUGA1UEAwwOVGVzdCBhdXRob3JpdHkwIBcNMjUwMTAxMDAwMDAwWhgPMjEy
NTAxMDEwMDAwMDBaMBkxFzAVBgNVBAMMDlRlc3QgYXV0aG9yaXR5MFkwEwYHKoZI
zj0CAQYIKoZIzj0DAQcDQgAEDrWKOFK4wp/deFlQOG9B0UeRkha8ncNeSACg/ZIU
fX5kX4sh1DPWp6l4bhXgUvASYvkmxAOeggwMVRe0K96cmaNjMGEwDwYDVR0TAQH/
BAUwAwEB/zAdBgNVHQ4EFgQU6fQ94tobV+JDdjW6dZWA0xSX7tIwHwYDVR0jBBgw
FoAU6fQ94tobV+JDdjW6dZWA0xSX7tIwDgYDVR0PAQH/BAQDAgGGMAoGCCqGSM49
BAMCA0gAMEUCIQCmp+tK3YCgVL4+RIL4GbuS1xd6KRrWzQN5xbkA/jRgHAIgO5SE
SSIrqeHOiIgDN7Q55T/KRh+KWUd5DDo3GsfoMdA=
-----END CERTIFICATE-----
"""
SERVER_CERT = """\
-----BEGIN CERTIFICATE-----
MIIBwTCCAWegAwIBAgIUbWBnNrBgSHl9AjWICCUAEQNXeZ0wCgYIKoZIzj0EAwIw
GTEXMBUGA1UEAwwOVGVzdCBhdXRob3JpdHkwIBcNMjUwMTAxMDAwMDAwWhgPMjEy
NTAxMDEwMDAwMDBaMBQxEjAQBgNVBAMMCWxvY2FsaG9zdDBZMBMGByqGSM49AgEG
CCqGSM49AwEHA0IABOnm0Mk7dS7eXpoul2KrncG0FZ/akVXZGs88hbwjRm3HzsE8
jRCbT1UoE+3CImuMfY7vAS7nrLzpXJ90MAH+ebmjgY8wgYwwLAYDVR0RBCUwI4IJ
bG9jYWxob3N0hwR/AAABhxAAAAAAAAAAAAAAAAAAAAABMAwGA1UdEwEB/wQCMAAw
HQYDVR0OBBYEFKIvvpwzjG635HTekiPRVhtSSkhhMB8GA1UdIwQYMBaAFOn0PeLa
G1fiQ3Y1unWVgNMUl+7SMA4GA1UdDwEB/wQEAwIHgDAKBggqhkjOPQQDAgNIADBF
AiB9PVYBP/r31vMQRCs+b+VsoYQ8gSSV02V00jTVYB+GIwIhAMrGlQqCkB6eSBTZ
o7/iYjzNzjpiBzNDpdHQAbGVEkNH
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg6UBifM8E2uqgl/Ph
zZkgpqYL1Y/t/xo1TgK2KYPVnQ2hRANCAATp5tDJO3Uu3l6aLpdiq53BtBWf2pFV
2RrPPIW8I0Ztx87BPI0Qm09VKBPtwiJrjH2O7wEu56y86VyfdDAB/nm5
-----END PRIVATE KEY-----
"""
LOCKED_KEY = """\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIH0MF8GCSqGSIb3DQEFDTBSMDEGCSqGSIb3DQEFDDAkBBBqBLn0wAbZgv4nYc7G
G1f9AgIIADAMBggqhkiG9w0CCQUAMB0GCWCGSAFlAwQBKgQQTvQiC6zDzc/Virbg
ZkwfpASBkPNsW0CwNuzOoH7EVCPCMo+X3u+Lz8l2qUmCPRiiBXE0GwOhrTbUdkWQ
187Dyd2e1sD+le+kgDNIv5wGXy1oZZ9UFlE069t3sdGSldL2ODr2lw7RxnvLLkyL
a3dcCuUbZWB1buFPuriu8cpFu8cRstWgmzoDlCQTkHR3jECshzeIVeB1UikABEwh
EHrpHZOZEw==
-----END ENCRYPTED PRIVATE KEY-----
"""
GATEWAY = """\
-----BEGIN CERTIFICATE-----
MIIB1TCCAXugAwIBAgIUU20+0iJjuq8LpqhA+qvq6k1Rt0cwCgYIKoZIzj0EAwIw
GTEXMBUGA1UEAwwOVGVzdCBhdXRob3JpdHkwIBcNMjUwMTAxMDAwMDAwWhgPMjEy
NTAxMDEwMDAwMDBaMBgxFjAUBgNVBAMMDW5vdCBsb29rZWQgYXQwWTATBgcqhkjO
PQIBBggqhkjOPQMBBwNCAARCF3Qn1SUIWkTENKqV/pLc+IuU18tlqBjw508TRhjI
FgggYj2LaHH22WVKu71Wydp+kOHbZAJzZ9J9T0t7QEUQo4GfMIGcMDwGA1UdEQQ1
MDOCE2dhdGV3YXkubGFiLmV4YW1wbGWGHHNwaWZmZTovL2xhYi5leGFtcGxlL2dh
dGV3YXkwDAYDVR0TAQH/BAIwADAdBgNVHQ4EFgQU0LuOTSb6uASySth0E6qNDLwO
06gwHwYDVR0jBBgwFoAU6fQ94tobV+JDdjW6dZWA0xSX7tIwDgYDVR0PAQH/BAQD
AgeAMAoGCCqGSM49BAMCA0gAMEUCIQCz55slM0Er6lRId81av4otOulCgrZCBP2H
NYfRgFGb8QIgEV0hdHYB4wao8EFiwiwAbd3xwVQn64xFJGs2eDw3Z/c=
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgKJn7ko3acNgCGLit
FhkzTblC8WgMqEfkW+4W6iMQc/qhRANCAARCF3Qn1SUIWkTENKqV/pLc+IuU18tl
qBjw508TRhjIFgggYj2LaHH22WVKu71Wydp+kOHbZAJzZ9J9T0t7QEUQ
-----END PRIVATE KEY-----
"""
OLD_GATEWAY = """\
-----BEGIN CERTIFICATE-----
MIIBlDCCATmgAwIBAgIUSYlet7OyEwwdK4ICy1+2TzdDKfowCgYIKoZIzj0EAwIw
GTEXMBUGA1UEAwwOVGVzdCBhdXRob3JpdHkwIBcNMjUwMTAxMDAwMDAwWhgPMjEy
NTAxMDEwMDAwMDBaMBYxFDASBgNVBAMMC29sZC1nYXRld2F5MFkwEwYHKoZIzj0C
AQYIKoZIzj0DAQcDQgAEuPzajZ88uQy7yUauf0nEjNaqHqshnD4E2QiApML2dDrX
aHaDn7z88nzHEASBLv7y8Ocvz+52+/ie5w3nrf30m6NgMF4wDAYDVR0TAQH/BAIw
ADAdBgNVHQ4EFgQUJSWc1t3LqfCfs8HRXEO7Vv4b/qkwHwYDVR0jBBgwFoAU6fQ9
4tobV+JDdjW6dZWA0xSX7tIwDgYDVR0PAQH/BAQDAgeAMAoGCCqGSM49BAMCA0kA
MEYCIQC3njiCEb9pKhjTQM+MKcSB9Z2/hOTGZaK8QtRBIRz55gIhAN7SfZZBAEJH
DVnrZU/LyXbHxQf3SAUgu/vgdxaP5nto
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgImADoHylgO0TuBFj
ggvO3cuowUtKMKvdjUIvwKxiHPqhRANCAAS4/NqNnzy5DLvJRq5/ScSM1qoeqyGc
PgTZCICkwvZ0OtdodoOfvPzyfMcQBIEu/vLw5y/P7nb7+J7nDeet/fSb
-----END PRIVATE KEY-----
"""
FOREIGN = """\
-----BEGIN CERTIFICATE-----
MIIBoTCCAUagAwIBAgIUHJIoxc9xgGOaUJtBog8MOOKBvZgwCgYIKoZIzj0EAwIw
HjEcMBoGA1UEAwwTZ2F0ZXdheS5sYWIuZXhhbXBsZTAgFw0yNTAxMDEwMDAwMDBa
GA8yMTI1MDEwMTAwMDAwMFowHjEcMBoGA1UEAwwTZ2F0ZXdheS5sYWIuZXhhbXBs
ZTBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABMVh24stUkKvQx5W7mFJPFuY/TJO
3W36BfxjeBWxZhKbcJysJXtyX9QVCpwkuqhj44J/nsQ7Gb9uD2dLR2mpUqujYDBe
MAwGA1UdEwEB/wQCMAAwHQYDVR0OBBYEFAaGAASRwPHuoeI2hd7hkiOh4OXZMB8G
A1UdIwQYMBaAFAaGAASRwPHuoeI2hd7hkiOh4OXZMA4GA1UdDwEB/wQEAwIHgDAK
BggqhkjOPQQDAgNJADBGAiEA9yZAZ44DhLwQM3uJg/ZdCxOJ4HtIleCkcBKdoPlw
McMCIQDycqPQIhyup4OXY8pvqbXMGg+LDL+igHzkXfzpTtfDaQ==
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgDE5WVlV6rky8cZ+N
GGKSrgRImWOtRfV1OWeWjJfDPVGhRANCAATFYduLLVJCr0MeVu5hSTxbmP0yTt1t
+gX8Y3gVsWYSm3CcrCV7cl/UFQqcJLqoY+OCf57EOxm/bg9nS0dpqVKr
-----END PRIVATE KEY-----
"""
ENDED = """\
-----BEGIN CERTIFICATE-----
MIIBmTCCAT+gAwIBAgIUI2EgxMZKdJndUhpbWAzA11gCiAowCgYIKoZIzj0EAwIw
GTEXMBUGA1UEAwwOVGVzdCBhdXRob3JpdHkwHhcNMjUwMTAxMDAwMDAwWhcNMjUw
MjAxMDAwMDAwWjAeMRwwGgYDVQQDDBNnYXRld2F5LmxhYi5leGFtcGxlMFkwEwYH
KoZIzj0CAQYIKoZIzj0DAQcDQgAEK3QRRTNFxxJ0cwqepf4yyq4prnKxvyRUmAjf
q6kmDmrgeMBmHVo02yqhn7CFvLWyy5dALr91pjOSLg/kxzva/aNgMF4wDAYDVR0T
AQH/BAIwADAdBgNVHQ4EFgQUvObUagbN6GxAGzjYSmuO7adiZfswHwYDVR0jBBgw
FoAU6fQ94tobV+JDdjW6dZWA0xSX7tIwDgYDVR0PAQH/BAQDAgeAMAoGCCqGSM49
BAMCA0gAMEUCIAZcHxAsPdKJn9KXICGu7MbF3zs385u6DKt/+drm3/ohAiEAvqG4
t5JckLGoToXCI7+5hStYKQflgSmwMzPu/4UV/Ps=
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgjaFTmrYGiT+QzNOw
H07PP+J4BKw7FoZdFTwYDNV5WFChRANCAAQrdBFFM0XHEnRzCp6l/jLKrimucrG/
JFSYCN+rqSYOauB4wGYdWjTbKqGfsIW8tbLLl0Auv3WmM5IuD+THO9r9
-----END PRIVATE KEY-----
"""


def unread(connection):
    """Bytes that the system has taken of us and the peer has not read."""
    return struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, b"\0" * 4))[0]


class TLSTest(HTTPTest):
    """HTTPS, and clients by their certificates."""

    def start_tls(self, *entries, **settings):
        for name, text in (("server.pem", SERVER_CERT), ("authority.pem", AUTHORITY), ("gateway.pem", GATEWAY),
                           ("old.pem", OLD_GATEWAY), ("foreign.pem", FOREIGN), ("ended.pem", ENDED)):
            (self.folder / name).write_text(text)
        if entries:
            path = self.folder / "clients.json"
            path.write_text(json.dumps({"clients": list(entries)}))
            settings = {"clients": str(path), "tls_client_ca": str(self.folder / "authority.pem"), **settings}
        return self.start(tls_cert=str(self.folder / "server.pem"), **settings)

    def context(self, certificate=None):
        context = ssl.create_default_context(cadata=AUTHORITY)
        if certificate is not None:
            context.load_cert_chain(str(self.folder / certificate))
        return context

    def secure(self, server, certificate=None, context=None):
        """A connection over TLS, closed after the test."""
        context = context or self.context(certificate)
        connection = context.wrap_socket(self.connect(server), server_hostname="localhost")
        self.addCleanup(connection.close)
        return connection

    def ask(self, server, data, certificate=None):
        """The status of the answer to one request on a connection of its own."""
        with self.secure(server, certificate) as connection:
            connection.sendall(data)
            return self.read_answer(connection).status

    def test_events_come_over_https_and_many_on_one_connection(self):
        server = self.start_tls()
        self.assertEqual(server.url, f"https://127.0.0.1:{server.port}")
        connection = self.secure(server)
        self.assertEqual(connection.selected_alpn_protocol(), None)
        for number in range(20):
            connection.sendall(post_bytes(event(appointment_id=str(number))))
            self.assertEqual(self.read_answer(connection).status, 200)
        self.assertEqual(rows(self.database), 20)

    def test_requests_in_any_pieces_pipelined_and_large_ones_are_read_as_over_a_plain_connection(self):
        server = self.start_tls()
        whole = b"".join(post_bytes(event(appointment_id=str(number))) for number in range(200))
        connection = self.secure(server)
        connection.sendall(whole)
        connection.sendall(post_bytes(event(appointment_id="large", notes="n" * 500000)))
        connection.sendall(b"GET /webhook/appointments?limit=1000 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answers = answers_in(read_all(connection))
        self.assertEqual([answer.status for answer in answers], [200] * 202)
        self.assertEqual(len(answers[-1].json["events"]), 201)
        connection = self.secure(server)
        for byte in post_bytes(event(appointment_id="trickled")):
            connection.sendall(bytes([byte]))
        self.assertEqual(self.read_answer(connection).status, 200)

    @unittest.skipUnless(fcntl, "asks the system what was read")
    def test_a_record_in_pieces_is_waited_for(self):
        """By the poller, too, which must not wait itself."""
        server = self.start_tls()
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls, raw = self.context().wrap_bio(incoming, outgoing, server_hostname="localhost"), self.connect(server)

        def step(function, *arguments):
            while True:
                try:
                    return function(*arguments)
                except ssl.SSLWantReadError:
                    raw.sendall(outgoing.read())
                    incoming.write(raw.recv(65536))
        step(tls.do_handshake)
        for number in range(3):
            tls.write(post_bytes(event(appointment_id=str(number))))
            data = outgoing.read()
            for piece in (data[:3], data[3:100], data[100:-1], data[-1:]):
                raw.sendall(piece)
                until(lambda: unread(raw) == 0, "the piece to be read")
                self.assertEqual(self.post_secure(server, f"beside {number} {len(piece)}"), 200)
            self.assertIn(b"200 OK", step(tls.read, 65536))

    def post_secure(self, server, appointment_id):
        return self.ask(server, post_bytes(event(appointment_id=appointment_id)))

    def test_an_answer_that_its_receiver_takes_late_keeps_nobody_and_comes_whole(self):
        server = self.start_tls()
        for number in range(40):
            server.store.add(stored_event(number, payload=json.dumps({"n": "x" * 100000})))
        slow = self.secure(server)
        slow.sendall(b"GET /webhook/appointments HTTP/1.1\r\nHost: localhost\r\nAccept: application/x-ndjson\r\n"
                     b"Connection: close\r\n\r\n")
        for number in range(5):
            self.assertEqual(self.post_secure(server, f"while {number}"), 200)
        answer, = answers_in(read_all(slow))
        self.assertGreaterEqual(answer.body.count(b"\n"), 40)

    def test_answers_that_do_not_fit_into_the_socket_follow_in_order(self):
        server = self.start_tls()
        connection = self.secure(server)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        pieces = [post_bytes(event(appointment_id=str(number), notes="n" * 100)) for number in range(400)]
        thread = threading.Thread(target=connection.sendall, args=(b"".join(pieces),))
        thread.start()
        ids = []
        with connection.makefile("rb") as file:
            for _ in pieces:
                head = iter(file.readline, b"\r\n")
                length, = [int(line.split(b":")[1]) for line in head if line.lower().startswith(b"content-length")]
                ids.append(json.loads(file.read(length))["event_id"])
        thread.join()
        self.assertEqual(ids, list(range(1, len(pieces) + 1)))

    def test_plain_http_hears_that_this_is_https(self):
        server = self.start_tls()
        answer, = self.talk(server, post_bytes(event()))
        self.assertEqual((answer.status, answer.json["message"]), (400, "This is HTTPS: use https://"))
        self.assertEqual(self.ask(server, post_bytes(event())), 200)
        self.assertEqual(rows(self.database), 1)

    def test_garbage_a_silent_peer_and_one_that_leaves_in_the_midst_keep_no_connection(self):
        server = self.start_tls(header_timeout=0.3)
        silent, half = self.connect(server), self.connect(server)
        half.sendall(b"\x16\x03\x01")
        for data in (b"\0" * 1000, b"\x16\x03\x01\x40\x00" + b"x" * 1000, b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00"):
            self.assertNotIn(b"HTTP", self.exchange(server, data))
        for connection in (silent, half):
            self.assertIn(read_all(connection)[:1], (b"", b"\x15"))     # nothing, or an alert
        broken = self.secure(server)
        broken.sendall(post_bytes(event()))
        self.assertEqual(self.read_answer(broken).status, 200)
        socket.socket.sendall(broken, b"\x17\x03\x03\x00\x20" + b"x" * 32)      # no record of ours
        self.assertEqual(self.post_secure(server, "after"), 200)
        until(lambda: not server._server.open_connections, "the end of all connections")
        self.assertIn("INFO - [-] no TLS with 127.0.0.1: ", self.log_text(server))

    def test_older_versions_of_tls_are_refused(self):
        server = self.start_tls()
        for version, is_taken in ((ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True),
                                  (ssl.TLSVersion.TLSv1_3, True)):
            context = self.context()
            with self.subTest(version), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    context.set_ciphers("ALL:@SECLEVEL=0")
                    context.minimum_version = ssl.TLSVersion.TLSv1
                    context.maximum_version = version
                    taken = self.secure(server, context=context).version() is not None
                except (ssl.SSLError, ValueError, ConnectionError):
                    taken = False
                self.assertEqual(taken, is_taken)

    def test_a_client_is_known_by_a_name_in_its_certificate(self):
        server = self.start_tls({"name": "lab", "roles": ["sender"], "certificate": "gateway.lab.example"},
                                {"name": "old", "roles": ["reader"], "certificate": "old-gateway"})
        post, get = post_bytes(event()), b"GET /webhook/appointments HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for certificate, expected in (("gateway.pem", [200, 403]), ("old.pem", [403, 200]), (None, [401, 401]),
                                      ("server.pem", [401, 401])):
            with self.subTest(certificate):
                self.assertEqual([self.ask(server, data, certificate) for data in (post, get)], expected)
        self.assertEqual(rows(self.database, "SELECT client FROM appointment_events"), "lab")

    def test_a_uri_name_counts_and_the_common_name_only_where_there_is_no_other(self):
        server = self.start_tls({"name": "lab", "roles": ["sender"], "certificate": "spiffe://lab.example/gateway"},
                                {"name": "common", "roles": ["sender"], "certificate": "not looked at"})
        self.assertEqual(self.ask(server, post_bytes(event()), "gateway.pem"), 200)
        self.assertEqual(rows(self.database, "SELECT client FROM appointment_events"), "lab")

    def test_certificates_of_nobody_we_trust_and_ended_ones_get_no_connection(self):
        server = self.start_tls({"name": "lab", "roles": ["sender"], "certificate": "gateway.lab.example"})
        for certificate in ("foreign.pem", "ended.pem"):
            with self.subTest(certificate), self.assertRaises((ssl.SSLError, OSError, http.client.HTTPException)):
                self.ask(server, post_bytes(event()), certificate)
        self.assertEqual(self.ask(server, post_bytes(event()), "gateway.pem"), 200)
        self.assertEqual(rows(self.database), 1)

    def test_the_same_head_over_a_connection_without_the_certificate_is_refused(self):
        server = self.start_tls({"name": "lab", "roles": ["sender"], "certificate": "gateway.lab.example"})
        expected = [200, 401, 409, 401, 409]
        found = [self.ask(server, post_bytes(event()), name)
                 for name in ("gateway.pem", None, "gateway.pem", None, "gateway.pem")]
        self.assertEqual(found, expected)

    def test_require_all_asks_for_key_and_certificate(self):
        entry = key_entry("sender", certificate="gateway.lab.example", require="all")
        server = self.start_tls(entry)
        with_key = post_bytes(event(), "X-API-Key: " + KEYS["sender"])
        for data, certificate, status in ((with_key, "gateway.pem", 200), (with_key, None, 401),
                                          (post_bytes(event()), "gateway.pem", 401)):
            self.assertEqual(self.ask(server, data, certificate), status)

    def test_a_reload_takes_the_new_certificate_and_one_that_does_not_fit_keeps_the_old(self):
        server = self.start_tls()
        path = self.folder / "server.pem"
        open_before = self.secure(server)
        before = open_before.getpeercert(True)
        gateway = GATEWAY.split("-----BEGIN PRIVATE KEY")
        path.write_text(SERVER_CERT.split("-----BEGIN PRIVATE")[0] + "-----BEGIN PRIVATE KEY" + gateway[1])
        self.assertFalse(server.reload())
        self.assertEqual(self.secure(server).getpeercert(True), before)
        path.write_text(GATEWAY)
        self.assertTrue(server.reload())
        context = self.context()
        context.check_hostname = False
        self.assertNotEqual(self.secure(server, context=context).getpeercert(True), before)
        open_before.sendall(post_bytes(event()))
        self.assertEqual(self.read_answer(open_before).status, 200)
        log = self.log_text(server)
        self.assertIn(f"tls_cert {path}: is not the key of the certificate in {path}", log)
        self.assertIn("Reloaded: schema, certificate", log)

    def test_what_cannot_be_served_is_one_line(self):
        files = {"cert": SERVER_CERT.split("-----BEGIN PRIVATE")[0], "whole": SERVER_CERT, "locked": LOCKED_KEY,
                 "other": GATEWAY, "text": "hello", "broken": "-----BEGIN CERTIFICATE-----\nxxx\n"
                 "-----END CERTIFICATE-----\n-----BEGIN PRIVATE KEY-----\nxxx\n-----END PRIVATE KEY-----\n"}
        for name, text in files.items():
            (self.folder / name).write_text(text)
        for settings, word in (({"tls_key": "whole"}, "tls_key: goes with tls_cert"),
                               ({"tls_client_ca": "cert"}, "tls_client_ca: goes with tls_cert"),
                               ({"tls_cert": "cert"}, "there is no private key in it"),
                               ({"tls_cert": "text"}, "there is no certificate in it"),
                               ({"tls_cert": "none"}, "No such file"),
                               ({"tls_cert": "cert", "tls_key": "locked"}, "it has a passphrase"),
                               ({"tls_cert": "cert", "tls_key": "other"}, "is not the key of the certificate"),
                               ({"tls_cert": "broken"}, "tls_cert"),
                               ({"tls_cert": "whole", "tls_client_ca": "text"}, "there is no certificate in it"),
                               ({"tls_cert": "whole", "tls_client_ca": "broken"}, "tls_client_ca")):
            given = {name: str(self.folder / value) for name, value in settings.items()}
            with self.subTest(settings), self.assertRaises(SetupError) as caught:
                WebhookServer(Config(port=0, database=str(self.database), **given))
            self.assertIn(word, str(caught.exception))
            self.assertNotIn("\n", str(caught.exception))
        self.assertEqual(self.start(tls_cert=str(self.folder / "whole"), tls_key=str(self.folder / "whole"),
                                    tls_client_ca=str(self.folder / "whole")).url[:5], "https")

    def test_a_certificate_in_an_entry_needs_an_authority(self):
        with self.assertRaises(SetupError) as caught:
            self.start_tls({"name": "lab", "roles": ["sender"], "certificate": "x"}, tls_client_ca="")
        self.assertIn("/clients/0/certificate: needs the setting tls_client_ca", str(caught.exception))

    def test_a_stop_answers_what_has_come_and_says_the_end(self):
        server = self.start_tls()
        connection = self.secure(server)
        connection.sendall(post_bytes(event()))
        self.assertEqual(self.read_answer(connection).status, 200)
        connection.sendall(post_bytes(event(appointment_id="2")))
        until(lambda: rows(self.database) == 2, "the second event")
        server.stop()
        self.assertEqual(statuses(read_all(connection)), [200])     # an end that TLS does not say would raise

    def test_send_speaks_https(self):
        server = self.start_tls()
        with mock.patch.dict(os.environ, {"SSL_CERT_FILE": str(self.folder / "authority.pem")}):
            code, out, err = command("send", "--url", server.url)
        self.assertEqual((code, out[:4], err), (0, "200\n", ""))
        code, out, err = command("send", "--url", server.url)
        self.assertEqual((code, out, err.count("\n")), (1, "", 1))


class ProxyTest(HTTPTest):
    """Whose request it is that a proxy sends."""

    def test_the_last_address_that_is_no_proxy_counts(self):
        networks = receiver.networks_of(["10.0.0.0/8", "fd00::/8"])
        for fields, expected in (
                ({}, ""), ({"x-forwarded-for": "203.0.113.7"}, "203.0.113.7"),
                ({"x-forwarded-for": "6.6.6.6, 203.0.113.7"}, "203.0.113.7"),
                ({"x-forwarded-for": "6.6.6.6, 203.0.113.7,10.0.0.1 , 10.2.3.4"}, "203.0.113.7"),
                ({"x-forwarded-for": "unknown, 203.0.113.7"}, "203.0.113.7"),
                ({"x-forwarded-for": "10.0.0.9, 10.0.0.1"}, "10.0.0.9"),
                ({"x-forwarded-for": "2001:db8::7"}, "2001:db8::7"), ({"x-forwarded-for": "[2001:db8::7]:99"}, "2001:db8::7"),
                ({"x-forwarded-for": "203.0.113.7:4711"}, "203.0.113.7"), ({"x-forwarded-for": "2001:DB8:0::7"}, "2001:db8::7"),
                ({"forwarded": "for=203.0.113.7"}, "203.0.113.7"),
                ({"forwarded": 'For="[2001:db8:cafe::17]:4711";proto=https'}, "2001:db8:cafe::17"),
                ({"forwarded": "for=6.6.6.6, for=203.0.113.7;by=10.0.0.1, for=10.0.0.2"}, "203.0.113.7"),
                ({"forwarded": "for=203.0.113.7", "x-forwarded-for": "203.0.113.7"}, "203.0.113.7")):
            head = receiver.Head()
            head.fields = fields
            with self.subTest(fields):
                self.assertEqual(receiver.forwarded_address(head, networks), expected)

    def test_what_has_two_readings_or_none_is_refused(self):
        for fields in ({"x-forwarded-for": ""}, {"x-forwarded-for": "unknown"}, {"x-forwarded-for": "203.0.113.7, "},
                       {"x-forwarded-for": "1.2.3"}, {"x-forwarded-for": "203.0.113.7 6.6.6.6"},
                       {"x-forwarded-for": "<script>"}, {"forwarded": ""}, {"forwarded": "203.0.113.7"},
                       {"forwarded": "for=unknown"}, {"forwarded": "for=_hidden"}, {"forwarded": "proto=https"},
                       {"forwarded": 'for="6.6.6.6, for=203.0.113.7'}, {"forwarded": 'for="a,b"'},
                       {"forwarded": "for=6.6.6.6 for=203.0.113.7"},
                       {"forwarded": "for=6.6.6.6", "x-forwarded-for": "203.0.113.7"}):
            head = receiver.Head()
            head.fields = fields
            with self.subTest(fields), self.assertRaises(receiver.Malformed) as caught:
                receiver.forwarded_address(head, receiver.networks_of(["10.0.0.0/8"]))
            self.assertEqual(caught.exception.status, 400)

    def start_behind(self, *entries, **settings):
        path = self.folder / "clients.json"
        path.write_text(json.dumps({"clients": list(entries)}))
        return self.start(clients=str(path), trusted_proxy="127.0.0.2", **settings)

    def ask(self, server, data, source):
        with socket.create_connection(("127.0.0.1", server.port), WAIT, (source, 0)) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return [self.proper(answer) for answer in answers_in(read_all(connection))]

    def test_only_the_proxy_says_whose_request_it_is(self):
        server = self.start_behind(key_entry("sender", allow_from=["203.0.113.0/24"]))
        key = "X-API-Key: " + KEYS["sender"]
        for field, source, status in (("X-Forwarded-For: 203.0.113.7", "127.0.0.2", 200),
                                      ("X-Forwarded-For: 203.0.113.7", "127.0.0.1", 403),
                                      ("X-Forwarded-For: 203.0.113.7", "127.0.0.2", 409),
                                      ("X-Forwarded-For: 203.0.113.7, 6.6.6.6", "127.0.0.2", 403),
                                      ("Forwarded: for=203.0.113.7", "127.0.0.2", 409),
                                      ("X-Forwarded-For: nonsense", "127.0.0.2", 400),
                                      ("X-Forwarded-For: nonsense", "127.0.0.1", 403), ("X-Other: 1", "127.0.0.2", 403)):
            with self.subTest(field, source=source):
                answer, = self.ask(server, post_bytes(event(), key, field), source)
                self.assertEqual(answer.status, status)
        log = self.log_text(server)
        self.assertIn("client=sender address=203.0.113.7 ", log)
        self.assertIn("client=sender address=6.6.6.6\n", log)

    def test_rates_are_of_the_address_behind_the_proxy(self):
        server = self.start(trusted_proxy="127.0.0.2", rate_limit=1)
        data = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: 203.0.113.%d\r\n\r\n"
        found = [self.ask(server, data % number, "127.0.0.2")[0].status for number in range(30)]
        self.assertEqual(found, [200] * 30)
        self.assertIn(429, [self.ask(server, data % 1, "127.0.0.2")[0].status for number in range(9)])

    def test_other_machines_are_refused_at_the_door_unless_we_speak_tls(self):
        server = self.start_behind(key_entry("sender"))
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.settimeout(WAIT)
            server._server.process_request(ours, ("203.0.113.9", 4711))
            answer, = answers_in(read_all(theirs))
        self.assertEqual((answer.status, answer.json["message"]), (403, "Only trusted proxies may connect here"))
        self.assertIn("Only trusted proxies may connect here: refused one from 203.0.113.9", self.log_text(server))

    def test_a_proxy_may_have_more_connections_than_one_address(self):
        server = self.start_behind(key_entry("sender"), max_connections_per_address=2, max_connections=10)
        self.addCleanup(server.stop)
        for source, expected in (("127.0.0.2", 6), ("127.0.0.1", 2)):
            opened = [socket.create_connection(("127.0.0.1", server.port), WAIT, (source, 0)) for _ in range(6)]
            for connection in opened:
                self.addCleanup(connection.close)
                connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            found = [connection.recv(65536)[9:12] for connection in opened]
            self.assertEqual(found.count(b"200"), expected)
            for connection in opened:
                connection.close()
            until(lambda: not server._server.open_connections, "the end of all connections")

    def test_where_other_machines_can_connect_clients_need_tls_or_a_proxy(self):
        (self.folder / "clients.json").write_text(json.dumps({"clients": []}))
        (self.folder / "server.pem").write_text(SERVER_CERT)
        clients, tls = {"clients": str(self.folder / "clients.json")}, {"tls_cert": str(self.folder / "server.pem")}
        proxy, insecure = {"trusted_proxy": "10.0.0.0/28"}, {"insecure": True}
        for given, starts, is_warned in (({}, False, False), (clients, False, False), (tls, False, False),
                                         (proxy, False, False), ({**clients, **tls}, True, False),
                                         ({**clients, **proxy}, True, False), (insecure, True, True)):
            config = Config(host="0.0.0.0", port=0, database=str(self.database), **given)
            with self.subTest(list(given)):
                if not starts:
                    with self.assertRaises(SetupError) as caught:
                        receiver.warnings_of_open_door(config, False)
                    self.assertRegex(str(caught.exception), "--clients .*--tls-cert .*--trusted-proxy .*--insecure")
                else:
                    self.assertEqual(bool(receiver.warnings_of_open_door(config, False)), is_warned)
            self.assertEqual(receiver.warnings_of_open_door(config, True), [])

    def test_nonsense_for_a_network_is_refused(self):
        for value in ("x", "10.0.0.1/8", "10.0.0.0/99", "1.2.3", "example.org"):
            with self.subTest(value), self.assertRaises(SetupError) as caught:
                Config(trusted_proxy=value)
            self.assertTrue(str(caught.exception).startswith("trusted_proxy: "))
        self.assertEqual(Config(trusted_proxy="10.0.0.0/8, ::1").trusted_proxy, ("10.0.0.0/8", "::1"))


# =============================================================================
# Endpoints and Connections
# =============================================================================

class RoutingTest(unittest.TestCase):
    """A request to its route; queries; Accept; Date."""

    def refusal(self, function, *arguments):
        with self.assertRaises(receiver.Refusal) as caught:
            function(*arguments)
        return caught.exception

    def test_every_route_of_the_table_is_found_and_heads_like_it_gets(self):
        for route in receiver.ROUTES:
            path = route.path.replace("{event_id}", "57")
            with self.subTest(path, method=route.method):
                wanted = (route, (57,) if path != route.path else ())
                self.assertEqual(receiver.match_route(route.method, path), wanted)
                if route.method == "GET":
                    self.assertEqual(receiver.match_route("HEAD", path), wanted)

    def test_a_path_is_decoded_once(self):
        for path, found in (("/health", True), ("/%68ealth", True), ("/%2568ealth", False), ("/health%2Flive", False),
                            ("/health/live", True), ("/webhook/appointments/%35", True), ("/Health", False)):
            with self.subTest(path):
                if found:
                    receiver.match_route("GET", path)
                else:
                    self.assertEqual(self.refusal(receiver.match_route, "GET", path).status, 404)

    def test_no_other_spelling_reaches_a_route(self):
        for path in ("//health", "/health/", "/./health", "/x/../health", "/%2e%2e/health", "/health/..", "/health;a=b",
                     "/health%00", "/webhook/appointments/", "/webhook/appointments/-1", "/webhook/appointments/+1",
                     "/webhook/appointments/1_0", "/webhook/appointments/1e3", "/webhook/appointments/%20 1",
                     "/webhook/appointments/%D9%A1", "/webhook/appointments/1%0A", "/webhook/appointments/" + "9" * 19,
                     "/webhook/appointments/{event_id}", "/webhook/appointments/%7Bevent_id%7D",
                     "/webhook%2Fappointments", "/webhook/appointments%2F1", "/schemaxjson"):
            with self.subTest(path):
                self.assertEqual(self.refusal(receiver.match_route, "GET", path).status, 404)

    def test_an_overlong_or_broken_utf_8_path_is_a_400(self):
        for path in ("/%c0%afhealth", "/%ff", "/health/%ed%a0%80"):
            with self.subTest(path):
                self.assertEqual(self.refusal(receiver.match_route, "GET", path).status, 400)
        self.assertEqual(self.refusal(receiver.match_route, "GET", "/%c3%a9").status, 404)

    def test_another_method_is_told_which_ones_there_are(self):
        for method, path, allow in (("DELETE", "/webhook/appointments", "GET, HEAD, OPTIONS, POST"),
                                    ("POST", "/health", "GET, HEAD, OPTIONS"),
                                    ("TRACE", "/health", "GET, HEAD, OPTIONS")):
            with self.subTest(method, path=path):
                refusal = self.refusal(receiver.match_route, method, path)
                self.assertEqual((refusal.status, refusal.fields), (405, {"Allow": allow}))

    def test_a_query_is_decoded_once_and_each_name_is_taken_once(self):
        for query, values in (("", {}), ("a=1&b=2", {"a": "1", "b": "2"}), ("a=1&", {"a": "1"}),
                              ("a=x+y%2B", {"a": "x y+"}),
                              ("a=%2541", {"a": "%41"}), ("a=b=c", {"a": "b=c"}), ("%61=%C3%A9", {"a": "é"})):
            with self.subTest(query):
                self.assertEqual(receiver.parse_query(query, ("a", "b")), values)

    def test_a_wrong_query_is_told_which_name_is_wrong(self):
        for query, named in (("c=1", "c"), ("a=1&a=1", "a"), ("a=", "a"), ("a", "a"), ("A=1", "A"), ("a=%ff", "UTF-8"),
                             ("%0d%0aX=1", r"\\r\\nX")):
            with self.subTest(query):
                refusal = self.refusal(receiver.parse_query, query, ("a", "b"))
                self.assertEqual(refusal.status, 400)
                self.assertRegex(refusal.message, rf"\b{named}\b" if named.isalnum() else named)
        self.assertNotRegex(self.refusal(receiver.parse_query, "%0d%0aX=1", ()).message, r"[\r\n]")

    def test_accept_chooses_by_weight_and_then_by_closeness(self):
        for accept, chosen in (("", "application/json"), ("*/*", "application/json"), ("text/csv", "text/csv"),
                               ("application/*", "application/json"), ("text/*", "text/csv"),
                               ("text/csv, */*", "text/csv"), ("text/csv;q=0.1, */*;q=0.2", "application/json"),
                               ("application/json;q=0.5, application/x-ndjson;q=0.9", "application/x-ndjson"),
                               ("application/json;q=0, */*", "application/x-ndjson"), ("TEXT/CSV ; Q=1.0", "text/csv"),
                               ("application/json; charset=utf-8", "application/json"),
                               ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "application/json"),
                               ("text/html", None), ("text/csv;q=0", None), ("*/*;q=0", None),
                               ("text/csv;q=0.0000", None),
                               ("text/csv;q=7", None), ("text/csv;q=1.5", None), ("text/csv;q=nan", None),
                               ("csv", None)):
            with self.subTest(accept):
                self.assertEqual(receiver.wanted_type(accept, receiver.MEDIA_TYPES), chosen)

    def test_the_date_is_that_of_the_rfc_in_every_second(self):
        for second in (1, 951782400, 951782400 + 86399, 1736518995, 4102444799):
            self.assertEqual(receiver.http_date(second), BaseHTTPRequestHandler.date_time_string(None, second))


class RulesTest(unittest.TestCase):
    """The ruling of a head: what equal heads share."""

    def rules(self, loopback=True, **settings):
        config = Config(**settings)
        endpoints = receiver.Endpoints(config, None, None)
        access = receiver.OpenAccess(None, 0)
        endpoints.rules = receiver.Rules(config, None, b"", None, access, None, endpoints, loopback)
        return endpoints.rules

    def test_a_head_that_comes_again_is_judged_once_and_one_that_does_not_is_not_kept(self):
        rules = self.rules()
        again = head_bytes()
        first, second = rules.ruling(again), rules.ruling(again)
        self.assertIsNot(first, second)
        self.assertIs(rules.ruling(again), second)
        for number in range(20 * receiver.HEADS_KEPT):
            rules.ruling(head_bytes(f"webhook-id: {number}"))
        self.assertIs(rules.ruling(again), second)
        self.assertLessEqual(len(rules._met), 4 * receiver.HEADS_KEPT)

    def test_however_many_heads_come_again_only_so_many_are_kept(self):
        rules = self.rules()
        heads = [head_bytes(f"X: {number}") for number in range(2 * receiver.HEADS_KEPT + 9)]
        for head in heads:
            rules.ruling(head)
            rules.ruling(head)
        self.assertEqual(len(rules._kept), receiver.HEADS_KEPT)
        self.assertIs(rules.ruling(heads[-1]), rules.ruling(heads[-1]))

    def test_a_large_head_is_never_kept(self):
        rules, large = self.rules(), head_bytes("X: " + "a" * receiver.HEAD_KEPT_BYTES)
        rulings = [rules.ruling(large) for _ in range(3)]
        self.assertEqual(len(set(map(id, rulings))), 3)

    def test_it_never_raises_and_says_what_was_understood(self):
        rules = self.rules()
        for rule, bad, status, good in HeadTest.REFUSED:
            with self.subTest(rule):
                self.assertEqual(rules.ruling(bad).refusal.status, status)
                self.assertNotEqual(getattr(rules.ruling(good).refusal, "status", 200), status)
        ruling = rules.ruling(head_bytes("no colon", first=f"POST {PATH}?patient_id=P HTTP/1.1"))
        self.assertEqual((ruling.method, ruling.pattern, ruling.refusal.status), ("POST", PATH, 400))

    def test_the_log_gets_the_route_and_never_what_was_sent(self):
        rules = self.rules()
        for first, method, pattern in ((f"GET {PATH}/57 HTTP/1.1", "GET", PATH + "/{event_id}"),
                                       ("GET /JOHN HTTP/1.1", "GET", "-"), (f"JOHN {PATH} HTTP/1.1", "-", PATH),
                                       ("GET /%4a HTTP/1.1", "GET", "-"), ("GET /%68ealth HTTP/1.1", "GET", "/health")):
            ruling = rules.ruling(head_bytes(first=first))
            self.assertEqual((ruling.method, ruling.pattern), (method, pattern))

    def test_what_is_ordinary(self):
        rules = self.rules(allowed_origin="https://desk.example")
        post = f"POST {PATH} HTTP/1.1"
        size = f"Content-Length: {receiver.ORDINARY_BODY}"
        self.assertTrue(rules.ruling(head_bytes(size, first=post)).ordinary)
        for lines in ([f"Content-Length: {receiver.ORDINARY_BODY + 1}"], ["Transfer-Encoding: chunked"], [],
                      [size, "Connection: close"], [size, "Origin: https://desk.example"], [size, "Origin: http://evil"],
                      [size, "Content-Encoding: gzip"], [size, "Expect: a-pony"]):
            with self.subTest(lines):
                self.assertFalse(rules.ruling(head_bytes(*lines, first=post)).ordinary)
        self.assertFalse(rules.ruling(head_bytes(size, first=f"POST {PATH} HTTP/1.0")).ordinary)
        self.assertFalse(rules.ruling(head_bytes(size, "Connection: keep-alive", first=f"POST {PATH} HTTP/1.0")).ordinary)
        self.assertFalse(rules.ruling(head_bytes(size, first="POST /health HTTP/1.1")).ordinary)

    def test_small_limits_hold_for_every_head(self):
        rules = self.rules(max_request_line=64, max_header_bytes=256)
        for head, status in ((head_bytes(first=f"GET /{'a' * 64} HTTP/1.1"), 414), (head_bytes("X: " + "a" * 300), 431),
                             (head_bytes(), None)):
            self.assertEqual(getattr(rules.ruling(head).refusal, "status", None), status)

    def test_an_address_is_always_ours_and_a_name_only_where_it_is_named(self):
        for settings, loopback, host, served in (
                ({}, True, "10.244.0.5:8000", True), ({}, True, "[fd00::5]:8000", True), ({}, True, "clinic.example", False),
                ({"allowed_host": "clinic.example"}, False, "10.244.0.5:8000", True),
                ({"allowed_host": "clinic.example"}, False, "clinic.example", True),
                ({"allowed_host": "clinic.example"}, False, "evil.example", False),
                ({"host": "0.0.0.0"}, False, "evil.example", True), ({}, True, "127.0.0.1.evil.example", False),
                ({}, True, "1.2.3.4.5", False), ({}, True, "0x7f000001", False), ({}, True, "2130706433", False)):
            with self.subTest(host, **settings):
                ruling = self.rules(loopback, **settings).ruling(head_bytes(host="Host: " + host))
                self.assertEqual(ruling.refusal is None, served)


    def test_a_sender_hears_what_is_refused_and_only_the_log_hears_what_to_do_about_it(self):
        for line, flag in (("Host: evil.example", "--allowed-host"), ("Origin: http://evil.example", "--allowed-origin"),
                           ("Sec-Fetch-Site: cross-site", "--allowed-origin")):
            with self.subTest(line):
                host = "" if line.startswith("Host") else "Host: localhost"
                refusal = self.rules().ruling(head_bytes(line, host=host)).refusal
                self.assertNotIn("--", refusal.message)
                self.assertIn(flag, refusal.note)
                self.assertNotIn("evil", refusal.note)


class ReceiveTest(HTTPTest):
    """POST /webhook/appointments."""

    def test_an_event_is_answered_with_its_id_and_is_in_the_table(self):
        server = self.start()
        answer = self.post(server, event(notes="Grüße", room=4))
        self.assertEqual(answer.status, 200)
        self.assertEqual(answer.json, {"status": "success", "message": "Event received and stored", "event_id": 1,
                                       "request_id": answer.headers["x-request-id"]})
        self.assertRegex(answer.json["request_id"], r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\Z")
        found = rows(self.database, "SELECT event_type, appointment_id, patient_id, timestamp, notes, client, "
                                    "payload LIKE '%\"room\": 4%' FROM appointment_events")
        self.assertEqual(found, [("scheduled", "APT-1", "PAT-1", "2025-01-10T14:00:00Z", "Grüße", "127.0.0.1", 1)])

    def test_the_first_stage_that_fails_decides_the_message(self):
        server = self.start()
        for body, path, rule, message in (
                (b"{", "", "json", "Invalid JSON: expecting property name enclosed in double quotes at line 1 column 2"),
                (event(patient_id=..., event_type=7), "/patient_id", "required", "Missing required field: patient_id"),
                (event(event_type="moved", patient_id=7), "/patient_id", "type",
                 "Field 'patient_id' must be of type string"),
                (event(event_type="moved", timestamp="soon"), "/event_type", "enum",
                 "Field 'event_type' must be one of: scheduled, cancelled, updated"),
                (event(timestamp="soon", patient_id=""), "/timestamp", "format",
                 "Field 'timestamp' must be an ISO 8601 date-time, for example 2025-01-10T14:00:00Z"),
                (event(patient_id=""), "/patient_id", "minLength", "Field 'patient_id' must not be empty"),
                (event(patient_id="x" * 256), "/patient_id", "maxLength",
                 "Field 'patient_id' must have at most 255 characters")):
            with self.subTest(message):
                answer = self.post(server, body)
                self.assertEqual((answer.status, answer.json["error"]), (400, "Bad Request"))
                self.assertEqual(answer.json["message"], message)
                self.assertEqual(answer.json["errors"][0], {"path": path, "rule": rule, "message": message})
        self.assertEqual(rows(self.database), 0)

    def test_a_duplicate_is_a_409_that_names_the_stored_event_and_whether_it_is_the_same(self):
        server = self.start()
        self.assertEqual(self.post(server).status, 200)
        for again, identical in ((event(), True), (event(timestamp="2025-01-10 15:00:00.0+01:00"), True),
                                 (event(notes="another"), False)):
            with self.subTest(again):
                answer = self.post(server, again)
                self.assertEqual((answer.status, answer.json["error"]), (409, "Conflict"))
                self.assertEqual((answer.json["event_id"], answer.json["identical"]), (1, identical))
        self.assertEqual(rows(self.database), 1)
        self.assertEqual(json.loads(rows(self.database, "SELECT payload FROM conflicting_events")),
                         event(notes="another"))
        self.assertEqual(self.log_text(server).count(" - WARNING - "), 3)

    def test_with_duplicates_ok_an_identical_retry_is_a_200_and_other_content_still_a_409(self):
        server = self.start(duplicates="ok")
        self.assertEqual(self.post(server).json["status"], "success")
        answer = self.post(server)
        self.assertEqual((answer.status, answer.json["status"], answer.json["event_id"]), (200, "duplicate", 1))
        self.assertEqual(self.post(server, event(notes="another")).status, 409)
        self.assertRegex(self.log_text(server), "WARNING - .* 200 duplicate event_id=1 ")

    def test_the_answer_out_of_the_template_is_the_one_that_any_other_way_would_make(self):
        endpoints = receiver.Endpoints(Config(), None, None)
        request, date = mock.Mock(id="2025-01-10T14:23:15.123456"), "Fri, 10 Jan 2025 14:23:15 GMT"
        for event_id in (1, 9, 10, 12345, 2 ** 63 - 1):
            response = receiver.stored_response(request.id, event_id)
            with self.subTest(event_id), mock.patch.object(endpoints, "date", return_value=date):
                self.assertEqual(endpoints.stored(request, event_id).decode(),
                                 receiver.encode(response, receiver.Head(), request.id, date, {}, False).decode())

    def test_the_busy_timeout_counts_from_when_an_event_is_ready_to_be_stored(self):
        """However long its body took to come."""
        server, made = self.start(busy_timeout=WAIT), receiver.Request.__init__

        def made_long_ago(request, *arguments, **named):
            made(request, *arguments, **named)
            request.started -= 2 * WAIT
            request.arrived -= 2 * WAIT
        connection, data = self.connect(server), post_bytes(event())
        with mock.patch.object(receiver.Request, "__init__", made_long_ago):
            connection.sendall(data[:-5])
            until(lambda: [one.phase for one in server._server.open_connections] == [receiver.Phase.BODY], "the body")
            with contextlib.closing(sqlite3.connect(str(self.database), isolation_level=None)) as other, \
                    mock.patch.object(server.store._committer, "commit", wraps=server.store._committer.commit) as tries:
                other.execute("BEGIN IMMEDIATE")
                connection.sendall(data[-5:])
                until(lambda: tries.call_count > 1, "a second try, behind the lock")
                other.execute("ROLLBACK")
            self.assertEqual(self.read_answer(connection).status, 200)

    def test_a_large_body_comes_to_the_store_with_its_digest(self):
        server = self.start()
        with mock.patch.object(server.store, "add", wraps=server.store.add) as added:
            self.post(server, event(notes="n" * 9000))
        (stored, digest), _ = added.call_args
        self.assertEqual(digest, content_digest(stored.payload))

    def test_a_large_body_that_fails_leaves_its_turn_to_the_next_one(self):
        server = self.start()
        large = event(notes="n" * 9000)
        for body in (b"{" + b" " * 9000, {**large, "event_type": "moved"}):
            self.assertEqual([self.post(server, body).status for _ in range(2)], [400, 400])
        with mock.patch.object(server._endpoints.rules.contract, "event", side_effect=RuntimeError("a bug")):
            self.assertEqual(self.post(server, large).status, 500)
        self.assertEqual(self.post(server, large).status, 200)

    def test_a_bug_is_a_500_whose_stack_is_in_the_log_under_the_request_id(self):
        server = self.start()
        with mock.patch.object(server._endpoints.rules.contract, "event", side_effect=RuntimeError("a bug")):
            answer = self.post(server)
        self.assertEqual((answer.status, answer.json["error"], answer.headers["connection"]),
                         (500, "Server Error", "close"))
        self.assertEqual(self.post(server).status, 200)
        self.assertRegex(self.log_text(server), r"ERROR - \[" + re.escape(answer.json["request_id"]) +
                         r"\] Unexpected error\n    Traceback[^\0]*\n    RuntimeError\n")

    def test_of_16_clients_that_send_the_same_events_each_event_is_taken_once(self):
        server = self.start()
        answers, numbers = [], itertools.count()

        def client():
            number, connection = next(numbers), http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT)
            for step in range(40):
                key = f"A{(number * 7 + step) % 40}"
                connection.request("POST", PATH, json.dumps(event(appointment_id=key)).encode())
                answer = answer_of(connection.getresponse())
                answers.append((answer.status, key, answer.json["event_id"]))
            connection.close()

        in_threads(16, client)
        taken = [answer[1:] for answer in answers if answer[0] == 200]
        refused = {answer[1:] for answer in answers if answer[0] == 409}
        self.assertEqual((len(answers), len(taken), len(refused)), (640, 40, 40))
        self.assertEqual(refused, set(taken))
        self.assertEqual(set(rows(self.database, "SELECT appointment_id, id FROM appointment_events")), set(taken))


class PageTest(HTTPTest):
    """Reading what is stored."""

    def fill(self, server, count, notes="'note ' || value"):
        """Put rows into the table beside the server."""
        insert_rows(self.database, count, notes)

    def table(self, server):
        """All events as rows of CSV."""
        text = self.call(server, Accept="text/csv").body.decode()
        return list(receiver.csv.reader(io.StringIO(text, newline="")))

    def ids(self, server, query):
        """The ids of one page."""
        answer = self.call(server, path=PATH + query)
        self.assertEqual(answer.status, 200, answer.body)
        return [one["id"] for one in answer.json["events"]]

    def test_an_event_is_read_back_with_its_columns_and_its_payload_as_it_came(self):
        server = self.start()
        body = b'{"event_type": "updated", "appointment_id": "A", "patient_id": "P", \r\n "timestamp": ' \
               b'"2025-01-10T15:00:00+01:00", "notes": "\\u00e9\\n", "extra": [1.50, 1e2]}'
        sent = self.post(server, body)
        one = self.call(server, path=f"{PATH}/{sent.json['event_id']}")
        self.assertEqual(one.json, {"id": 1, "event_type": "updated", "appointment_id": "A", "patient_id": "P",
                          "timestamp": "2025-01-10T14:00:00Z", "notes": "é\n", "client": "127.0.0.1",
                          "received_at": sent.json["request_id"] + "Z", "payload": json.loads(body)})
        self.assertIn(b"1.50, 1e2", one.body)
        self.assertNotIn(b"\n", one.body)
        self.assertEqual(self.call(server, path=PATH).json, {"events": [one.json], "next": None})
        self.assertEqual(self.call(server, path=PATH + "/2").status, 404)

    def test_each_filter_finds_its_events_and_filters_add_up(self):
        server = self.start()
        for number, (kind, appointment, patient, timestamp) in enumerate((
                ("scheduled", "A", "P", "2025-01-10T14:00:00Z"), ("updated", "A", "P", "2025-01-10T14:00:00.5Z"),
                ("cancelled", "A", "Q", "2025-01-10T14:00:01Z"),
                ("scheduled", "B é&=+%", "Q", "2025-01-11T00:00:00Z")), 1):
            sent = self.post(server, event(event_type=kind, appointment_id=appointment, patient_id=patient,
                                           timestamp=timestamp))
            self.assertEqual(sent.json["event_id"], number)
        for query, ids in (("", [1, 2, 3, 4]), ("appointment_id=A", [1, 2, 3]), ("patient_id=Q", [3, 4]),
                           ("event_type=scheduled", [1, 4]), ("appointment_id=A&event_type=scheduled", [1]),
                           ("appointment_id=B+%C3%A9%26%3D%2B%25", [4]), ("appointment_id=C", []),
                           ("since=2025-01-10T14:00:00Z", [1, 2, 3, 4]), ("since=2025-01-10T14:00:00.1Z", [2, 3, 4]),
                           ("until=2025-01-10T14:00:00Z", []), ("until=2025-01-10T14:00:00.5Z", [1]),
                           ("until=2025-01-10T14:00:01", [1, 2]), ("since=2025-01-10T16:00:01%2B02:00", [3, 4]),
                           ("since=2025-01-10T16:00:01+02:00", [3, 4]), ("since=2025-01-10+14:00:01+0000", [3, 4]),
                           ("since=2025-01-10+14:00", [1, 2, 3, 4]),
                           ("since=2026-01-01T00:00Z&until=2025-01-01T00:00Z", []),
                           ("after=2", [3, 4]), ("after=0", [1, 2, 3, 4]), ("after=9223372036854775807", []),
                           ("limit=2", [1, 2]), ("after=1&limit=1&appointment_id=A", [2]),
                           ("limit=1000", [1, 2, 3, 4])):
            with self.subTest(query):
                self.assertEqual(self.ids(server, "?" + query if query else ""), ids)

    def test_a_wrong_filter_is_a_400_that_names_it(self):
        server = self.start()
        for query, name in (("limit=0", "limit"), ("limit=1001", "limit"), ("limit=-1", "limit"),
                            ("limit=%2B5", "limit"),
                            ("limit=1_0", "limit"), ("limit=%D9%A1", "limit"), ("limit=1&limit=1", "limit"),
                            ("after=x", "after"), ("after=9223372036854775808", "after"), ("after=", "after"),
                            ("since=yesterday", "since"), ("until=2025-13-01T00:00:00Z", "until"),
                            ("since=" + "T" * 8000, "since"),
                            ("since=2025-01-10T14:00:00Z%0A", "since"), ("event_type=moved", "event_type"),
                            ("patient=P", "patient"), ("appointment_id=%00", "appointment_id")):
            with self.subTest(query[:40]):
                answer = self.call(server, path=f"{PATH}?{query}")
                self.assertEqual(answer.status, 400)
                self.assertRegex(answer.json["message"], rf"\b{name}\b")

    def test_the_cursor_walks_through_all_and_keeps_the_filters(self):
        server = self.start()
        self.fill(server, 250)
        seen, path, pages = [], PATH + "?patient_id=PAT-3&limit=10", 0
        while path:
            page = self.call(server, path=path).json
            seen += [one["id"] for one in page["events"]]
            path, pages = page["next"], pages + 1
        self.assertEqual(seen, [number for number in range(1, 251) if number % 7 == 3])
        self.assertEqual(pages, 4)

    def test_a_page_has_a_hundred_events_unless_asked_otherwise_and_next_only_when_there_is_more(self):
        server = self.start()
        self.fill(server, 101)
        self.assertEqual(len(self.ids(server, "")), 100)
        self.assertEqual(self.call(server, path=PATH).json["next"], PATH + "?after=100")
        self.assertIsNone(self.call(server, path=PATH + "?limit=101").json["next"])

    def test_the_form_follows_accept(self):
        server = self.start()
        self.post(server, event(notes='say "hi",\r\nthen go'))
        for accept, content_type in (("application/json", "application/json"), ("*/*", "application/json"),
                                     ("application/x-ndjson", "application/x-ndjson"),
                                     ("application/jsonl", "application/x-ndjson"),
                                     ("text/csv", "text/csv; charset=utf-8")):
            with self.subTest(accept):
                answer = self.call(server, Accept=accept)
                self.assertEqual((answer.status, answer.headers["content-type"]), (200, content_type))
        self.assertEqual(json.loads(self.call(server, Accept="application/x-ndjson").body)["payload"],
                         event(notes='say "hi",\r\nthen go'))
        table = self.table(server)
        self.assertEqual(table[0], ["id", *receiver.COLUMNS])
        self.assertEqual(table[1][:6],
                         ["1", "scheduled", "APT-1", "PAT-1", "2025-01-10T14:00:00Z", 'say "hi",\r\nthen go'])
        refused = self.call(server, Accept="image/png")
        self.assertEqual(refused.status, 406)
        self.assertIn("text/csv", refused.json["message"])

    def test_a_formula_in_a_cell_is_not_run_by_the_one_who_opens_the_table(self):
        server = self.start()
        formulas = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1", "＋1", "－1", "＠1")
        for number, text in enumerate(formulas):
            self.post(server, event(appointment_id=f"{text}{number}", patient_id=text, notes=text))
        self.post(server, event(patient_id="a=1", notes=""))
        table = self.table(server)[1:]
        for text, row in zip(formulas, table):
            self.assertEqual([row[3], row[5]], ["'" + text] * 2)
            self.assertTrue(row[2].startswith("'" + text))
        self.assertEqual([table[-1][3], table[-1][5]], ["a=1", ""])

    def test_head_answers_like_get_without_the_body(self):
        server = self.start()
        self.post(server)
        for path, accept in ((PATH, "*/*"), (PATH, "text/csv"), (PATH + "/1", "*/*"), (PATH + "/9", "*/*"),
                             ("/health/live", "*/*"), ("/schema.json", "*/*"), (PATH + "?limit=x", "*/*")):
            with self.subTest(path, accept=accept):
                get = self.call(server, "GET", path, Accept=accept)
                head = self.call(server, "HEAD", path, Accept=accept)
                self.assertEqual((head.status, head.body), (get.status, b""))
                for name in ("content-type", "content-length", "transfer-encoding"):
                    self.assertEqual(head.headers.get(name), get.headers.get(name))

    def test_many_rows_are_streamed_in_order(self):
        server = self.start()
        self.fill(server, 12000)
        lines = self.call(server, Accept="application/x-ndjson").body.splitlines()
        self.assertEqual([json.loads(line)["id"] for line in lines], list(range(1, 12001)))
        some = self.call(server, path=PATH + "?after=700&limit=1200", Accept="application/x-ndjson").body.splitlines()
        self.assertEqual([json.loads(some[0])["id"], json.loads(some[-1])["id"], len(some)], [701, 1900, 1200])

    def test_a_reader_that_stalls_in_a_stream_holds_up_nobody(self):
        server = self.start()
        self.fill(server, 20000, "printf('%01000d', value)")
        slow = self.connect(server)
        slow.sendall(head_bytes("Accept: application/x-ndjson", first=f"GET {PATH} HTTP/1.1"))
        self.assertIn(b" 200 ", slow.recv(100))
        for number in range(20):
            self.assertEqual(self.post(server, event(appointment_id=f"other-{number}")).status, 200)
        with contextlib.closing(sqlite3.connect(str(self.database), timeout=10)) as connection:
            self.assertEqual(connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0], 0)

    def test_a_page_of_huge_events_ends_early_and_goes_on_behind_its_next(self):
        server = self.start()
        self.fill(server, 60, "printf('%0300000d', value)")
        seen, path, pages = [], PATH + "?limit=1000", 0
        while path:
            page = self.call(server, path=path)
            self.assertLess(len(page.body), receiver.PAGE_BYTES + 1000000)
            seen += [one["id"] for one in page.json["events"]]
            path, pages = page.json["next"], pages + 1
        self.assertEqual((seen, pages > 1), (list(range(1, 61)), True))

    def test_a_store_that_cannot_be_read_is_a_503_in_every_form(self):
        server = self.start()
        self.post(server)
        gone = receiver.StoreUnavailable("the disk is gone")
        for path, accept in ((PATH, "application/json"), (PATH, "text/csv"), (PATH + "/1", "*/*")):
            with mock.patch.multiple(server.store, steps=mock.Mock(side_effect=gone), last_id=mock.Mock(side_effect=gone),
                                     event=mock.Mock(side_effect=gone)):
                answer = self.call(server, path=path, Accept=accept)
            self.assertEqual((answer.status, answer.headers["retry-after"]), (503, "1"))
            self.assertEqual(self.call(server, path=path, Accept=accept).status, 200)
        self.assertEqual(len(re.findall(" - ERROR - .* 503 .*the disk is gone", self.log_text(server))), 3)

    def test_a_page_that_takes_long_to_find_ends_early_and_goes_on_where_it_looked(self):
        server = self.start()
        self.fill(server, 20000)
        with mock.patch.object(receiver, "PAGE_SECONDS", 0.0):
            path, seen, pages = PATH + "?patient_id=PAT-3&event_type=scheduled&limit=1000", [], 0
            while path:
                answer = self.call(server, path=path)
                self.assertEqual(answer.status, 200, answer.body)
                seen += [one["id"] for one in answer.json["events"]]
                path, pages = answer.json["next"], pages + 1
        self.assertEqual(seen, [number for number in range(1, 20001) if number % 7 == 3])
        self.assertGreater(pages, 3)

    def test_a_stream_that_takes_too_long_is_broken_off_and_says_how_to_go_on(self):
        server = self.start()
        self.fill(server, 1200)
        with mock.patch.object(receiver, "READ_SECONDS", 0.0):
            data = self.exchange(server, head_bytes("Accept: text/csv", first=f"GET {PATH} HTTP/1.1"))
        self.assertFalse(data.endswith(b"0\r\n\r\n"))
        self.assertIn("go on with after=", self.log_text(server))

    def test_a_stream_ends_with_what_was_stored_when_it_began(self):
        """Or one reader could read for ever, while others send."""
        server = self.start()
        self.post(server)
        steps = server.store.steps

        def more_come(*arguments):
            for number, step in enumerate(steps(*arguments)):
                yield step
                self.post(server, event(appointment_id=f"later {number}"))
        with mock.patch.object(server.store, "steps", more_come):
            lines = self.call(server, Accept="application/x-ndjson").body.splitlines()
        self.assertEqual([json.loads(line)["id"] for line in lines], [1])

    def test_what_other_hands_put_into_the_table_comes_out_as_json_all_the_same(self):
        server = self.start()
        odd = ("{\"a\": Infinity}", "{\"a\": NaN}", "", "{\"a\": 1", "not json", "\"\ud83d\"", "{\"a\":\n1}")
        with contextlib.closing(sqlite3.connect(str(self.database), timeout=10)) as connection, connection:
            for number, payload in enumerate(odd):
                connection.execute("INSERT INTO appointment_events (event_type, appointment_id, patient_id, timestamp, notes, "
                                   "received_at, payload) VALUES ('scheduled', ?, 9e999, 'x', x'ff00', '', CAST(? AS TEXT))",
                                   (f"A{number}", payload.encode("utf-8", "surrogatepass")))
        strict = {"parse_constant": self.fail}
        page = json.loads(self.call(server).body, **strict)["events"]
        lines = [json.loads(line, **strict) for line in self.call(server, Accept="application/x-ndjson").body.splitlines()]
        self.assertEqual(page, lines)
        self.assertEqual([one["payload"] for one in page][:5] + [page[6]["payload"]], [*odd[:5], {"a": 1}])
        self.assertEqual(len(self.table(server)), len(odd) + 1)
        self.assertEqual(self.call(server, path=PATH + "/1").json["payload"], odd[0])

    def test_answers_are_sent_in_pieces_that_a_socket_takes(self):
        server = self.start()
        for number in range(15):
            self.post(server, event(appointment_id=f"A{number}", notes="n" * 100000))
        connection = self.connect(server)
        connection.sendall(head_bytes("Connection: close", first=f"GET {PATH} HTTP/1.1"))
        sizes = re.findall(rb"\r\n([0-9a-f]+)\r\n", read_all(connection))
        self.assertGreater(len(sizes), 10)
        self.assertLessEqual(max(int(size, 16) for size in sizes), receiver.PIECE)

    def test_an_http_1_0_reader_gets_a_stream_that_ends_with_the_connection(self):
        server = self.start()
        self.fill(server, 700)
        answer, = self.talk(server, head_bytes("Accept: text/csv", first=f"GET {PATH} HTTP/1.0"))
        self.assertNotIn("transfer-encoding", answer.headers)
        self.assertEqual(len(answer.body.splitlines()), 701)

    def test_a_stream_that_breaks_off_never_looks_whole(self):
        server = self.start()
        self.fill(server, 1200)
        steps = server.store.steps

        def breaking(*arguments):
            for number, step in enumerate(steps(*arguments)):
                if number == 3:
                    raise receiver.StoreUnavailable("the disk is gone")
                yield step
        with mock.patch.object(server.store, "steps", breaking):
            data = self.exchange(server, head_bytes("Accept: application/x-ndjson", first=f"GET {PATH} HTTP/1.1"))
        self.assertEqual(statuses(data), [200])
        self.assertFalse(data.endswith(b"0\r\n\r\n"))
        self.assertIn("broken off", self.log_text(server))


class HealthTest(HTTPTest):
    """/health, /health/live, /health/ready."""

    def test_health_tells_of_each_part(self):
        server = self.start()
        until(lambda: "free_bytes" in self.call(server, path="/health").json["checks"]["disk"], "the first check of the disk")
        answer = self.call(server, path="/health")
        self.assertEqual((answer.status, answer.json["status"]), (200, "ok"))
        self.assertEqual(set(answer.json["checks"]), {"database", "disk", "log", "service"})
        self.assertEqual({check["status"] for check in answer.json["checks"].values()}, {"ok"})
        self.assertGreater(answer.json["checks"]["disk"]["free_bytes"], 0)
        for path in ("/health/live", "/health/ready"):
            self.assertEqual((self.call(server, path=path).status, self.call(server, path=path).json["status"]),
                             (200, "ok"))

    def test_a_locked_database_is_seen_and_health_comes_back_by_itself(self):
        server = self.start(busy_timeout=0.2)
        with contextlib.closing(sqlite3.connect(str(self.database), isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            until(lambda: self.call(server, path="/health").status == 503, "the trouble")
            answer = self.call(server, path="/health")
            self.assertEqual((answer.status, answer.json["status"], answer.json["checks"]["database"]["status"]),
                             (503, "failing", "failing"))
            self.assertIn("retry-after", answer.headers)
            self.assertTrue(answer.json["checks"]["database"]["message"])
            self.assertEqual(self.call(server, path="/health/ready").status, 503)
            self.assertEqual(self.call(server, path="/health/live").status, 200)
            other.execute("ROLLBACK")
        until(lambda: self.call(server, path="/health").status == 200, "health")

    def test_a_disk_that_takes_nothing_is_seen(self):
        server = self.start()
        full = OSError(28, "No space left on device")
        with mock.patch.object(receiver.tempfile, "TemporaryFile", side_effect=full):
            until(lambda: self.call(server, path="/health").status == 503, "the trouble")
            answer = self.call(server, path="/health")
        self.assertEqual((answer.status, answer.json["checks"]["disk"]),
                         (503, {"status": "failing", "message": "No space left on device"}))
        self.assertEqual(answer.json["checks"]["database"]["status"], "ok")

    def test_asking_all_the_time_does_not_wear_the_disk(self):
        server = self.start()
        with mock.patch.object(receiver.tempfile, "TemporaryFile", side_effect=OSError(28, "full")) as written:
            for _ in range(50):
                self.call(server, path="/health")
        self.assertIn(written.call_count, range(1, 10))

    def test_all_checks_begin_before_one_is_waited_for_and_all_together_for_a_moment_at_most(self):
        asked = []

        def check(name, wait):
            asked.append((name, wait))
            return {"status": "ok"}
        checks = {name: functools.partial(check, name) for name in ("database", "disk", "log", "on_event")}
        endpoints = receiver.Endpoints(Config(), None, lambda store: checks)
        self.assertEqual(endpoints.health(mock.Mock()).status, 200)
        self.assertEqual(asked[:4], [(name, 0.0) for name in checks])
        self.assertEqual([name for name, _ in asked[4:]], list(checks))
        self.assertLessEqual(max(wait for _, wait in asked), 0.05)

    def test_it_answers_at_once_whatever_store_and_disk_do(self):
        server, hangs = self.start(busy_timeout=2 * WAIT), threading.Event()
        self.addCleanup(hangs.set)
        self.assertEqual(self.call(server, path="/health").status, 200)
        with contextlib.closing(sqlite3.connect(str(self.database), isolation_level=None)) as other, \
                mock.patch.object(receiver.tempfile, "TemporaryFile", side_effect=lambda **_: hangs.wait()), \
                mock.patch.object(receiver, "CHECK_SECONDS", 0.0):
            other.execute("BEGIN EXCLUSIVE")
            answer = self.call(server, path="/health")      # who waited for the busy timeout would wait too long
            until(lambda: self.call(server, path="/health").json["checks"]["disk"]["status"] == "failing", "the hanging disk")
            self.assertIn(answer.status, (200, 503))
            hangs.set()
            other.execute("ROLLBACK")
        until(lambda: self.call(server, path="/health").status == 200, "health")

    def test_a_log_that_cannot_be_written_is_red_in_health_and_events_are_still_taken(self):
        server = self.start()
        with mock.patch.object(server.log, "trouble", return_value="5 log lines were dropped: the queue was full"):
            answer = self.call(server, path="/health")
            self.assertEqual((answer.status, answer.json["checks"]["log"]["status"]), (503, "failing"))
            self.assertEqual(self.call(server, path="/health/ready").status, 200)

    def test_the_contract_is_served_as_it_is_on_disk(self):
        answer = self.call(self.start(), path="/schema.json")
        self.assertEqual(answer.body, (HERE / "schema.json").read_bytes())
        self.assertEqual(answer.headers["content-type"], "application/schema+json")


class PollerTest(HTTPTest):
    """The poller is for speed alone: with and without it a sender sees the same."""

    def test_it_leaves_large_bodies_to_their_own_threads(self):
        server = self.start()
        for size, ordinary in ((receiver.ORDINARY_BODY, True), (receiver.ORDINARY_BODY + 1, False)):
            head = server._endpoints.rules.ruling(head_bytes(f"Content-Length: {size}", first=f"POST {PATH} HTTP/1.1"))
            self.assertEqual(head.ordinary, ordinary)
        self.assertEqual(self.post(server, event(notes="n" * 100000)).status, 200)
        self.assertRegex(self.log_text(server), 'payload=.*"patient_id": "\\*{3}".*"notes": "\\*{3}"')

    STEPS = (post_bytes(event()), post_bytes(event()), post_bytes(event(notes="x")), post_bytes(b"{"), post_bytes(b"{"),
             post_bytes(b"["), post_bytes(event(patient_id=...)), post_bytes(event(patient_id=...)),
             post_bytes(event(patient_id="")), post_bytes(event(appointment_id="A2"), "Connection: keep-alive"),
             post_bytes(event(appointment_id="A5"), "Expect: 100-continue"),
             b"\r\n" + post_bytes(event(appointment_id="A6")),
             post_bytes(event(appointment_id="A7", notes="n" * 70000)), post_bytes(b""),
             f"GET {PATH} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(),
             post_bytes(event(appointment_id="A8"), "Origin: http://elsewhere"))

    def conversation(self, server):
        """[(status, fields, body)] of all steps on one connection, without what differs from run to run."""
        connection, heard = self.connect(server), []
        for step in self.STEPS:
            connection.sendall(step)
            answer = self.read_answer(connection)
            fields = {name: value for name, value in answer.headers.items() if name not in ("date", "x-request-id")}
            heard.append((answer.status, fields, re.sub(rb"\d{4}-\d\d-\d\dT[0-9:]{8}\.\d{6}", b"-", answer.body)))
        return heard, read_all(connection)

    def start_with_poller(self):
        server = self.start()
        if server._server.poller is None:
            self.skipTest("this system has no epoll, so there is no poller")
        return server

    def parked(self, server):
        """A connection that has sent an event and for which the poller reads now, and its handler."""
        before = set(server._server.open_connections)
        connection = self.connect(server)
        connection.sendall(post_bytes(event(appointment_id=f"first of {len(before)}")))
        self.read_answer(connection)
        handler, = set(server._server.open_connections) - before
        until(lambda: handler in server._server.poller._connections.values(), "the poller")
        return connection, handler

    def test_with_and_without_it_the_answers_are_the_same(self):
        server = self.start_with_poller()
        heard, rest = self.conversation(server)
        for name, module, attribute in (("without epoll", receiver.select, "epoll"),
                                        ("and without a send that does not block", receiver, "SENDS_AT_ONCE")):
            with self.subTest(name), mock.patch.object(module, attribute, None):
                other = self.start(database=str(self.folder / f"{attribute}.db"),
                                   log_file=str(self.folder / f"{attribute}.log"))
                self.assertIsNone(other._server.poller)
                self.assertEqual(self.conversation(other), (heard, rest))
        self.assertEqual([status for status, _, _ in heard],
                         [200, 409, 409, *[400] * 6, 200, 200, 200, 200, 400, 200, 403])

    def test_it_wakes_the_own_thread_of_a_connection_only_for_what_is_not_ordinary(self):
        server = self.start_with_poller()
        connection = self.connect(server)
        connection.sendall(post_bytes(event(appointment_id="first")))       # a first one is read by the own thread
        self.read_answer(connection)
        hand_over = receiver.Inbox.hand_over
        with mock.patch.object(receiver.Inbox, "hand_over", autospec=True, side_effect=hand_over) as handed:
            for number in range(20):
                connection.sendall(post_bytes(event(appointment_id=f"AP{number:03}")))
                self.assertEqual(self.read_answer(connection).status, 200)
            for number in range(20):                                        # heads that never come again
                connection.sendall(post_bytes(event(appointment_id=f"AQ{number:03}"), f"webhook-id: {number}"))
                self.assertEqual(self.read_answer(connection).status, 200)
            self.assertEqual(handed.call_count, 0)
            for body, turns in ((b"{", 0), (b"[", 0), (b"n" * 10000, 1)):   # refused, refused, large
                before = handed.call_count
                connection.sendall(post_bytes(body))
                self.assertEqual(self.read_answer(connection).status, 400)
                self.assertEqual(handed.call_count - before, turns)

    def test_an_event_that_it_has_read_begins_the_idle_time_anew(self):
        server = self.start_with_poller()
        connection, handler = self.parked(server)
        sent_at = time.monotonic()
        connection.sendall(post_bytes(event()))
        self.assertEqual(self.read_answer(connection).status, 200)
        self.assertGreaterEqual(handler.since, sent_at)

    def test_while_the_service_drains_it_leaves_all_to_the_own_threads_which_say_that_they_end(self):
        server = self.start_with_poller()
        connections = [self.parked(server)[0] for _ in range(2)]
        server._server.draining = True                  # as stop() sets it
        for connection, body, status in zip(connections, (event(appointment_id="A2"), b"{"), (200, 400)):
            connection.sendall(post_bytes(body))
            answer = self.read_answer(connection)
            self.assertEqual((answer.status, answer.headers.get("connection")), (status, "close"))

    def test_an_answer_that_cannot_be_made_ends_its_connection_and_no_other(self):
        server = self.start_with_poller()
        (bad, _), (good, _) = self.parked(server), self.parked(server)
        stored = server._endpoints.stored

        def stored_or_bug(request, event_id):
            if event_id == 3:
                raise RuntimeError("a bug")
            return stored(request, event_id)
        with mock.patch.object(server._endpoints, "stored", stored_or_bug):
            bad.sendall(post_bytes(event(appointment_id="A3")))
            self.assertEqual(read_all(bad), b"")
            good.sendall(post_bytes(event(appointment_id="A4")))
            self.assertEqual(self.read_answer(good).status, 200)
        until(lambda: len(server._server.open_connections) == 1, "the end of the other")
        self.assertEqual(rows(self.database), 4)
        self.assertRegex(self.log_text(server), r"ERROR - \[\d.*\] An answer could not be sent\n")

    def test_a_refusal_that_cannot_be_written_ends_its_connection_and_no_other(self):
        server = self.start_with_poller()
        (bad, _), (good, _) = self.parked(server), self.parked(server)
        with mock.patch.object(server._endpoints, "encoded", side_effect=RuntimeError("a bug")):
            bad.sendall(post_bytes(b"{"))
            self.assertEqual(read_all(bad), b"")
        good.sendall(post_bytes(b"{"))
        self.assertEqual(self.read_answer(good).status, 400)
        until(lambda: len(server._server.open_connections) == 1, "the end of the other")

    def test_a_store_that_raises_does_not_end_it(self):
        server = self.start_with_poller()
        (bad, _), (good, _), engine = self.parked(server), self.parked(server), server.store.engine
        with mock.patch.object(engine, "tend", side_effect=OSError(errno.EIO, "a bug")) as tend:
            bad.sendall(post_bytes(event(appointment_id="A3")))
            self.assertEqual(self.read_answer(bad).status, 200)
            until(lambda: tend.called, "the look at the files")
        good.sendall(post_bytes(event(appointment_id="A4")))
        self.assertEqual(self.read_answer(good).status, 200)
        until(lambda: "Unexpected error while events were committed" in self.log_text(server), "the line")

    def test_where_the_system_watches_no_more_the_own_thread_reads(self):
        server = self.start_with_poller()
        with mock.patch.object(server._server.poller, "_epoll") as epoll:
            epoll.register.side_effect = OSError(errno.ENOSPC, "max_user_watches")
            connection = self.connect(server)
            for number in range(3):
                connection.sendall(post_bytes(event(appointment_id=f"A{number}")))
                self.assertEqual(self.read_answer(connection).status, 200)

    def test_an_event_does_not_overtake_one_that_is_committed_but_not_answered_yet(self):
        server = self.start_with_poller()
        (connection, handler), store = self.parked(server), server.store
        tell, told, go_on = store._lanes.tell, threading.Event(), threading.Event()
        self.addCleanup(go_on.set)

        def tell_late(*arguments):
            if threading.current_thread() is store._writer:
                told.set()
                go_on.wait(WAIT)
            tell(*arguments)
        with mock.patch.object(store._lanes, "tell", tell_late):
            for piece in cut(post_bytes(event(appointment_id="A2")), 50):
                connection.sendall(piece)               # in two pieces: it goes the way over the writer
                until(lambda: handler.phase != receiver.Phase.IDLE, "the first piece")
            told.wait(WAIT)
            until(lambda: handler in server._server.poller._connections.values(), "the poller")
            connection.sendall(post_bytes(event(appointment_id="A3")))
            until(lambda: store._queue.qsize() or handler.outbox.sent > 1, "the second event")
            go_on.set()
            connection.shutdown(socket.SHUT_WR)
            self.assertEqual([one.json["event_id"] for one in answers_in(read_all(connection))], [2, 3])

    def test_it_reads_on_only_while_not_too_many_answers_are_owed(self):
        server = self.start_with_poller()
        connection, handler = self.parked(server)
        most, watched = receiver.MAX_PIPELINED, server._server.poller._connections
        with contextlib.closing(sqlite3.connect(str(self.database), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for number in range(2 * most):              # each in a look of its own
                connection.sendall(post_bytes(event(appointment_id=f"A{number}")))
                until(lambda: handler.outbox.promised > number + 1 or handler not in watched.values(), "the event")
            self.assertLessEqual(handler.outbox.promised - handler.outbox.sent, most + 2)
            other.execute("ROLLBACK")
        connection.shutdown(socket.SHUT_WR)
        self.assertEqual(statuses(read_all(connection)), [200] * 2 * most)

    def test_a_refused_event_is_not_answered_before_those_that_wait(self):
        server = self.start_with_poller()
        connection, handler = self.parked(server)
        with contextlib.closing(sqlite3.connect(str(self.database), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            connection.sendall(post_bytes(event(appointment_id="waits")))
            until(lambda: handler.outbox.promised == 2, "the event")
            with mock.patch.object(server._server.endpoints, "receive_event", wraps=server._server.endpoints.receive_event) as read:
                connection.sendall(post_bytes(b"{"))
                until(lambda: read.called, "the second request")
            other.execute("ROLLBACK")
        connection.shutdown(socket.SHUT_WR)
        self.assertEqual(statuses(read_all(connection)), [200, 400])

    def test_events_that_wait_behind_a_lock_are_answered_in_order_when_it_is_gone(self):
        server = self.start_with_poller()
        connection, handler = self.parked(server)
        with contextlib.closing(sqlite3.connect(str(self.database), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for number in range(10):                    # each in a look of its own
                connection.sendall(post_bytes(event(appointment_id=f"A{number}")))
                until(lambda: handler.outbox.promised == number + 2, "the event")
            self.assertEqual(self.call(server, path="/health/live").status, 200)
            other.execute("ROLLBACK")
        connection.shutdown(socket.SHUT_WR)
        self.assertEqual([answer.json["event_id"] for answer in answers_in(read_all(connection))], list(range(2, 12)))
        self.assertEqual(rows(self.database, "SELECT appointment_id FROM appointment_events WHERE id > 1 ORDER BY id"),
                         [(f"A{number}",) for number in range(10)])


@unittest.skipUnless(receiver.SENDS_AT_ONCE, "here each connection's own thread sends its answers")
class OutboxTest(unittest.TestCase):
    """Answers that do not fit into the socket: whatever comes behind them waits."""

    LARGE = 4 * MEGABYTE                                # more than the buffers of a socket take

    def setUp(self):
        ours, self.theirs = socket.socketpair()
        for one in (ours, self.theirs):
            self.addCleanup(one.close)
        self.connection = mock.Mock(socket=ours, close_connection=False)
        self.outbox = receiver.Outbox(self.connection)

    def send(self, data):
        self.outbox.promised += 1
        self.outbox.send(data)

    def test_later_answers_do_not_overtake_a_late_one(self):
        self.send(b"x" * self.LARGE)
        data = self.theirs.recv(65536)
        for number in range(1000):                      # whenever the buffer has room again
            self.send(b"%04d" % number)
            data += self.theirs.recv(1024)
        while len(data) < self.LARGE + 4000:
            data += self.theirs.recv(65536)
        self.assertEqual(data.lstrip(b"x"), b"".join(b"%04d" % number for number in range(1000)))

    def test_it_is_settled_when_a_late_answer_is_all_sent(self):
        self.send(b"x" * self.LARGE)
        self.assertTrue(self.outbox.is_full)

        def settle():
            self.outbox.settle()
            self.connection.socket.sendall(b"end")
        settling = threading.Thread(target=settle)
        settling.start()
        data = b""
        while len(data) < self.LARGE + 3:
            data += self.theirs.recv(65536)
        settling.join(WAIT)
        self.assertEqual(data.lstrip(b"x"), b"end")
        self.assertFalse(self.outbox.is_full)

    def test_a_peer_that_takes_nothing_of_a_late_answer_is_stuck_until_it_takes_it(self):
        self.assertFalse(self.outbox.is_stuck(time.monotonic() + WAIT, 1))
        self.send(b"x" * self.LARGE)
        until(lambda: self.outbox.is_stuck(time.monotonic() + WAIT, 1), "the late answer")
        size = 0
        while size < self.LARGE:
            size += len(self.theirs.recv(65536))
        self.outbox.settle()
        self.assertFalse(self.outbox.is_stuck(time.monotonic() + WAIT, 1))

    def test_a_connection_whose_late_answer_cannot_be_sent_ends(self):
        self.send(b"x" * self.LARGE)
        self.theirs.close()
        self.outbox.settle()
        self.assertTrue(self.connection.close_connection)


class ConnectionTest(HTTPTest):
    """Requests and answers on real sockets."""

    def test_one_connection_serves_many_requests(self):
        server = self.start()
        connection = self.connect(server)
        for number in range(5):
            connection.sendall(post_bytes(event(appointment_id=f"A{number}")))
            self.assertEqual(self.read_answer(connection).json["event_id"], number + 1)
            connection.sendall(head_bytes())
            self.assertEqual(self.read_answer(connection).status, 200)
            connection.sendall(post_bytes(b"{"))
            self.assertEqual(self.read_answer(connection).json["errors"][0]["rule"], "json")

    def test_pipelined_requests_of_all_kinds_are_answered_in_order(self):
        server = self.start()
        requests, methods, wanted = [], [], []
        for number in range(20):
            list_it = head_bytes(first=f"GET {PATH}?appointment_id=A{number} HTTP/1.1")
            for data, method, status in ((post_bytes(event(appointment_id=f"A{number}")), "POST", 200),
                                         (post_bytes(event(appointment_id=f"A{number}")), "POST", 409),
                                         (list_it, "GET", 200),
                                         (post_bytes(b"[]"), "POST", 400),
                                         (head_bytes(first="HEAD /health/live HTTP/1.1"), "HEAD", 200),
                                         (head_bytes(first="GET /nowhere HTTP/1.1"), "GET", 404)):
                requests.append(data)
                methods.append(method)
                wanted.append(status)
        answers = self.talk(server, b"".join(requests), *methods)
        self.assertEqual([answer.status for answer in answers], wanted)
        stored = [answer.json["event_id"] for answer in answers[::6]]
        self.assertEqual([answer.json["event_id"] for answer in answers[1::6]], stored)
        self.assertEqual([[one["id"] for one in answer.json["events"]] for answer in answers[2::6]],
                         [[number] for number in stored])
        ids = [answer.headers["x-request-id"] for answer in answers]
        self.assertEqual(sorted(set(ids)), ids)

    def test_many_pipelined_events_are_all_stored_and_answered_in_order(self):
        server = self.start()
        answers = self.talk(server, b"".join(post_bytes(event(appointment_id=f"A{number}")) for number in range(500)))
        self.assertEqual([answer.json["event_id"] for answer in answers], list(range(1, 501)))

    def test_a_request_may_be_cut_anywhere(self):
        server = self.start()
        connection = self.connect(server)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        size = len(post_bytes(event(appointment_id="A100")))
        for place in range(1, size):
            for piece in cut(post_bytes(event(appointment_id=f"A{place + 100}")), place):
                connection.sendall(piece)
            self.assertEqual(self.read_answer(connection).json["event_id"], place)

    def test_a_request_may_come_byte_by_byte_with_the_next_one_behind_it(self):
        server = self.start()
        connection = self.connect(server)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        chunked = head_bytes("Transfer-Encoding: chunked", first=f"POST {PATH} HTTP/1.1")
        body = json.dumps(event(appointment_id="A2")).encode()
        for byte in post_bytes(event()) + chunked + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) + head_bytes():
            connection.sendall(bytes((byte,)))
        connection.shutdown(socket.SHUT_WR)
        first, second, third = answers_in(read_all(connection))
        self.assertEqual((first.json["event_id"], second.json["event_id"], third.status), (1, 2, 200))

    def test_empty_lines_before_a_request_are_passed_over(self):
        self.assertEqual(self.talk_statuses(self.start(), b"\r\n" + head_bytes() + b"\r\n\r\n" + post_bytes(event())),
                         [200, 200])

    def test_who_asks_first_is_told_to_continue(self):
        server = self.start()
        connection = self.connect(server)
        body = json.dumps(event()).encode()
        for number, framing in enumerate((f"Content-Length: {len(body)}", "Transfer-Encoding: chunked")):
            connection.sendall(head_bytes(framing, "Expect: 100-continue", first=f"POST {PATH} HTTP/1.1"))
            interim = b""
            while not interim.endswith(b"\r\n\r\n"):
                interim += connection.recv(1)
            self.assertEqual(interim, b"HTTP/1.1 100 Continue\r\n\r\n")
            connection.sendall(body if not number else b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
            self.assertEqual(self.read_answer(connection).status, (200, 409)[number])

    def test_who_asks_first_is_refused_before_the_body_is_sent(self):
        server = self.start(max_body=100)
        for status, first, line in ((413, f"POST {PATH} HTTP/1.1", "Content-Length: 101"),
                                    (404, "POST /nowhere HTTP/1.1", "Content-Length: 10"),
                                    (405, "PUT /health HTTP/1.1", "Content-Length: 10")):
            with self.subTest(status):
                connection = self.connect(server)
                connection.sendall(head_bytes(line, "Expect: 100-continue", first=first))
                answer, = answers_in(read_all(connection))
                self.assertEqual((self.proper(answer).status, answer.headers["connection"]), (status, "close"))

    def test_who_asks_first_and_sends_all_the_same_is_not_told_to_continue(self):
        server, data = self.start(), post_bytes(event(), "Expect: 100-continue")
        connection = self.connect(server)
        connection.sendall(data[:-5])
        until(lambda: [one.phase for one in server._server.open_connections] == [receiver.Phase.BODY], "the body")
        connection.sendall(data[-5:])
        connection.shutdown(socket.SHUT_WR)
        self.assertEqual(statuses(read_all(connection)), [200])
        self.assertEqual(self.talk_statuses(server, data), [409])

    def test_heads_that_never_come_again_do_not_fill_the_memory(self):
        server = self.start()
        requests = (head_bytes(f"X: {number}", first="HEAD /health/live HTTP/1.1")
                    for number in range(receiver.HEADS_KEPT + 100))
        self.assertEqual(set(self.talk_statuses(server, b"".join(requests), *["HEAD"] * 2000)), {200})
        self.assertLessEqual(len(server._endpoints.rules._kept), receiver.HEADS_KEPT)

    def test_a_refusal_that_is_kept_does_not_grow_however_often_it_is_answered(self):
        server = self.start()
        for request in (head_bytes(first="GET /nowhere HTTP/1.1"), head_bytes("no colon")):
            for _ in range(3):
                self.talk(server, request * 3)
            refusal = server._endpoints.rules.ruling(request).refusal
            self.assertIs(refusal, server._endpoints.rules.ruling(request).refusal)
            self.assertIsNone(refusal.__traceback__)

    def test_http_1_0_gets_one_answer_unless_it_asks_for_more(self):
        server = self.start()
        answer, = self.talk(server, post_bytes(event(), version="1.0") + head_bytes())
        self.assertEqual((answer.status, answer.headers["connection"]), (200, "close"))
        first, second = self.talk(server, post_bytes(event(), "Connection: keep-alive", version="1.0") + head_bytes())
        self.assertEqual((first.status, first.headers["connection"], second.status), (409, "keep-alive", 200))

    def test_what_was_sent_behind_the_last_request_does_not_destroy_its_answer(self):
        """As closing on bytes that are still on their way would do."""
        server, last = self.start(), head_bytes("Connection: close")
        lingers = mock.patch.object(receiver.Connection, "_linger", autospec=True, side_effect=receiver.Connection._linger)
        for behind, count in ((b"", 0), (head_bytes(), 1)):
            with self.subTest(behind), lingers as linger:
                self.assertEqual(self.talk_statuses(server, last + behind), [200])
                until(lambda: not server._server.open_connections, "the end")
                self.assertEqual(linger.call_count, count)

    def test_connection_close_is_the_last_request(self):
        server = self.start()
        answer, = self.talk(server, post_bytes(event(), "Connection: close") + post_bytes(event(appointment_id="late")))
        self.assertEqual((answer.status, answer.headers["connection"]), (200, "close"))
        self.assertEqual(rows(self.database), 1)

    def test_a_chunked_body_is_an_event_like_any_other(self):
        server = self.start()
        body = json.dumps(event()).encode()
        pieces = cut(body, 1, 10, 50)
        chunked = b"".join(b"%x;note=x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\nX: y\r\n\r\n"
        head = head_bytes("Transfer-Encoding: chunked", first=f"POST {PATH} HTTP/1.1")
        self.assertEqual(self.talk_statuses(server, head + chunked + head + chunked + head_bytes()), [200, 409, 200])

    def test_a_chunked_body_that_is_too_long_or_broken_ends_the_connection(self):
        server = self.start(max_body=1000)
        head = head_bytes("Transfer-Encoding: chunked", first=f"POST {PATH} HTTP/1.1")
        for status, body in ((413, b"200\r\n" + b"a" * 512 + b"\r\n" + b"200\r\n" + b"a" * 512 + b"\r\n0\r\n\r\n"),
                             (400, b"5\r\nhellooo\r\n0\r\n\r\n"), (400, b"5\r\nhel")):
            with self.subTest(body[:10]):
                self.assertEqual(self.talk_statuses(server, head + body + head_bytes()), [status])

    def test_options_tells_what_a_path_takes(self):
        server = self.start()
        for path, allow in ((PATH, "GET, HEAD, OPTIONS, POST"), ("/health", "GET, HEAD, OPTIONS"),
                            ("*", "GET, HEAD, OPTIONS, POST")):
            answer, following = self.talk(server, head_bytes(first=f"OPTIONS {path} HTTP/1.1") + head_bytes())
            self.assertEqual((answer.status, answer.headers["allow"], answer.body, following.status),
                             (204, allow, b"", 200))
            self.assertNotIn("content-length", answer.headers)
            self.assertNotIn("access-control-allow-methods", answer.headers)
        self.assertEqual(self.call(server, "OPTIONS", "/nowhere").status, 404)

    # The status, the request, whether the connection goes on
    STATUSES = (
        (404, head_bytes(first="GET /nowhere HTTP/1.1"), True),
        (404, head_bytes("Content-Length: 2", first="POST /nowhere HTTP/1.1") + b"{}", False),
        (405, head_bytes(first=f"DELETE {PATH} HTTP/1.1"), True),
        (405, head_bytes("Content-Length: 2", first=f"PUT {PATH} HTTP/1.1") + b"{}", False),
        (406, head_bytes("Accept: image/png", first=f"GET {PATH} HTTP/1.1"), True),
        (411, head_bytes(first=f"POST {PATH} HTTP/1.1"), False),
        (413, head_bytes("Content-Length: 1048577", first=f"POST {PATH} HTTP/1.1") + b"a" * 1048577, False),
        (414, head_bytes(first=f"GET /{'a' * 8192} HTTP/1.1"), False),
        (415, post_bytes(event(), "Content-Encoding: gzip"), False),
        (417, post_bytes(event(), "Expect: a-pony"), False),
        (431, head_bytes("X: " + "a" * 16384), False),
        (431, head_bytes(*["X: a"] * 100), False),
        (405, head_bytes(first=f"BREW {PATH} HTTP/1.1"), True),
        (404, head_bytes(first="BREW /nowhere HTTP/1.1"), True),
        (501, head_bytes("Transfer-Encoding: gzip", first=f"POST {PATH} HTTP/1.1") + b"a", False),
        (505, head_bytes(first="GET /health HTTP/3.0"), False),
        (400, post_bytes(b"{"), True),
        (400, head_bytes("Content-Length: 9", first=f"POST {PATH} HTTP/1.1") + b"{}", False),
    )

    def test_whatever_is_refused_has_its_status_and_with_a_body_unread_it_closes(self):
        server = self.start()
        for status, request, goes_on in self.STATUSES:
            with self.subTest(status, request=request[:50]):
                answers = self.talk(server, request + (head_bytes() if status != 400 or goes_on else b""))
                self.assertEqual([answer.status for answer in answers], [status, 200] if goes_on else [status])
                self.assertEqual(answers[0].headers.get("connection"), None if goes_on else "close")
                if status == 405:
                    self.assertEqual(answers[0].headers["allow"], "GET, HEAD, OPTIONS, POST")
                if status == 415:
                    self.assertEqual(answers[0].headers["accept-encoding"], "identity")

    def test_who_is_still_sending_a_large_body_can_read_why_it_was_refused(self):
        server = self.start()
        size = 8 * 1024 * 1024
        for status, first in ((413, f"POST {PATH} HTTP/1.1"), (413, "POST /nowhere HTTP/1.1"),
                              (405, "PUT /health HTTP/1.1")):
            length = size if status == 413 else 1024 * 1024
            with self.subTest(status, first=first):
                connection = self.connect(server)
                connection.sendall(head_bytes(f"Content-Length: {length}", first=first))
                connection.sendall(b"a" * length)
                answer, = answers_in(read_all(connection))
                self.assertEqual(self.proper(answer).status, status)

    def test_the_log_names_method_and_path_of_what_was_refused_by_its_head(self):
        server = self.start()
        for line in ("Content-Length: 1048577", "Content-Length: +1", "Expect: a-pony", "no colon"):
            self.talk(server, head_bytes(line, first=f"POST {PATH}?patient_id=PAT-1 HTTP/1.1"))
        text = self.log_text(server)
        self.assertEqual(re.findall(rf"WARNING - \[.*\] POST {PATH} (\d+) ", text), ["413", "400", "417", "400"])
        self.assertNotIn("PAT-1", text)

    def test_head_gets_no_body_also_when_its_head_is_refused(self):
        answer, = self.talk(self.start(), head_bytes("no colon", first="HEAD /health HTTP/1.1"), "HEAD")
        self.assertEqual((answer.status, answer.body), (400, b""))
        self.assertGreater(int(answer.headers["content-length"]), 0)

    def test_a_read_sees_the_events_that_were_sent_before_it_on_the_same_connection(self):
        server = self.start()
        for number in range(1, 21):
            read = head_bytes(first=f"GET {PATH}/{number} HTTP/1.1")
            self.assertEqual(self.talk_statuses(server, post_bytes(event(appointment_id=f"A{number}")) + read),
                             [200, 200])

    def test_a_body_of_the_greatest_size_is_taken(self):
        server = self.start(max_body=4096)
        body = json.dumps(event()).encode()
        self.assertEqual(self.talk_statuses(server, post_bytes(body + b" " * (4096 - len(body)))), [200])
        self.assertEqual(self.talk_statuses(server, post_bytes(body + b" " * (4097 - len(body)))), [413])

    def test_any_content_type_is_read_as_json(self):
        server = self.start()
        for number, kind in enumerate(("application/x-www-form-urlencoded", "text/plain; charset=utf-16", "nonsense")):
            self.assertEqual(self.post(server, event(appointment_id=f"A{number}"), Content_Type=kind).status, 200)

    @unittest.skipUnless(receiver.SENDS_AT_ONCE, "here each connection's own thread sends its answers")
    def test_without_a_thread_for_late_answers_a_connection_ends_and_the_service_goes_on(self):
        server = self.start()
        connection = self.connect(server)
        connection.sendall(post_bytes(event()))
        self.read_answer(connection)
        handler, = server._server.open_connections
        with mock.patch.object(receiver.threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
            handler.outbox.promised += 1
            handler.outbox.send(b"x" * 50000000)       # more than any socket's buffer takes
        self.assertTrue(set(read_all(connection)) <= {ord("x")})
        until(lambda: not server._server.open_connections, "the end of the connection")
        self.assertEqual(self.post(server, event(appointment_id="A2")).status, 200)

    def test_who_never_reads_answers_loses_only_its_own(self):
        server = self.start()
        deaf = self.connect(server)
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.settimeout(0.5)
        with contextlib.suppress(OSError):
            deaf.sendall(head_bytes(first="GET /schema.json HTTP/1.1") * 20000)
        for number in range(20):
            self.assertEqual(self.post(server, event(appointment_id=f"A{number}")).status, 200)

    def test_a_sender_that_leaves_after_its_event_has_still_delivered_it(self):
        server = self.start()
        connection = self.connect(server)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                              struct.pack("ii", 1, 0) if POSIX else struct.pack("hh", 1, 0))
        connection.sendall(post_bytes(event()))
        until(lambda: rows(self.database) == 1, "the event")
        connection.close()
        self.assertEqual(self.post(server).status, 409)


class LimitTest(HTTPTest):
    """Limits on connections and on time."""

    def await_place(self, server):
        """Wait until one more connection is served."""
        def served():
            with contextlib.suppress(OSError, http.client.HTTPException):
                return self.call(server, path="/health").status == 200
        until(served, "a free place")

    def test_one_connection_too_many_is_told_so_and_the_others_are_unharmed(self):
        server = self.start(max_connections=3)
        good = [self.connect(server) for _ in range(3)]
        for number, connection in enumerate(good):
            connection.sendall(post_bytes(event(appointment_id=f"A{number}")))
            self.assertEqual(self.read_answer(connection).status, 200)
        for number in range(6):
            refused = self.connect(server)
            if number % 2:
                refused.sendall(post_bytes(event(appointment_id="refused")))
            answer, = answers_in(read_all(refused))
            self.assertEqual((self.proper(answer).status, answer.headers["connection"],
                                                   answer.headers["retry-after"]), (503, "close", "1"))
        for connection in good:
            connection.sendall(head_bytes())
            self.assertEqual(self.read_answer(connection).status, 200)
        good[0].close()
        self.await_place(server)

    @unittest.skipUnless(sys.platform == "linux", "only Linux has all of 127.0.0.0/8")
    def test_one_address_cannot_take_the_place_of_another(self):
        server = self.start(max_connections=10, max_connections_per_address=2)
        greedy = [self.connect(server) for _ in range(2)]
        for connection in greedy:
            connection.sendall(head_bytes())
            self.read_answer(connection)
        answer, = answers_in(read_all(self.connect(server)))
        self.assertEqual(answer.status, 503)
        self.assertIn("address", answer.json["message"])
        other = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT, source_address=("127.0.0.2", 0))
        self.addCleanup(other.close)
        other.sendall(head_bytes())
        self.assertEqual(self.read_answer(other).status, 200)

    def test_a_head_that_does_not_come_to_its_end_is_a_408(self):
        server = self.start(header_timeout=0.3)
        connections = [self.connect(server) for _ in range(3)]
        for connection, begun in zip(connections, (b"G", b"GET /health HTTP/1.1\r\nX", head_bytes()[:-2])):
            connection.sendall(begun)
        for connection in connections:
            answer, = answers_in(read_all(connection))
            self.assertEqual((self.proper(answer).status, answer.headers["connection"]), (408, "close"))

    def trickle(self, connection, byte):
        """Send a byte again and again until the other side ends; give what it answered."""
        connection.settimeout(0.02)
        deadline, data = time.monotonic() + WAIT, b""
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < deadline:
                with contextlib.suppress(socket.timeout):
                    piece = connection.recv(65536)
                    if not piece:
                        return data
                    data += piece
                    continue
                connection.sendall(byte)
        return data

    def test_trickling_keeps_nobody_beyond_the_time_of_the_whole(self):
        server = self.start(header_timeout=0.4, body_timeout=0.4)
        for begun, byte in ((b"GET /health HTTP/1.1\r\nX: ", b"a"),
                            (head_bytes("Content-Length: 100000", first=f"POST {PATH} HTTP/1.1"), b" "),
                            (head_bytes("Transfer-Encoding: chunked", first=f"POST {PATH} HTTP/1.1"), b"1\r\n \r\n")):
            with self.subTest(begun[:30]):
                connection = self.connect(server)
                connection.sendall(begun)
                answer, = answers_in(self.trickle(connection, byte))
                self.assertEqual(self.proper(answer).status, 408)

    def test_the_time_of_a_head_begins_with_the_connection_or_with_its_first_byte(self):
        server = self.start()
        connection = self.connect(server)
        handler = until(lambda: server._server.open_connections, "the connection")[0]
        began = handler.since
        connection.sendall(b"GET /health HT")
        until(lambda: handler.phase == receiver.Phase.HEAD, "the first head")
        self.assertEqual(handler.since, began)
        connection.sendall(b"TP/1.1\r\nHost: localhost\r\n\r\n")
        self.read_answer(connection)
        until(lambda: handler.phase == receiver.Phase.IDLE, "the end of the first request")
        sent_at = time.monotonic()
        connection.sendall(b"GET /health HT")
        until(lambda: handler.phase == receiver.Phase.HEAD, "the second head")
        self.assertGreaterEqual(handler.since, sent_at)

    def test_trickling_a_second_head_is_watched_too(self):
        server = self.start(header_timeout=0.4)
        connection = self.connect(server)
        connection.sendall(head_bytes() + b"GET /health HT")
        data = self.trickle(connection, b"T")
        self.assertEqual([answer.status for answer in answers_in(data)], [200, 408])

    def test_idle_connections_are_ended_without_a_word(self):
        server = self.start(idle_timeout=0.3, header_timeout=0.3)
        used, unused = self.connect(server), self.connect(server)
        used.sendall(post_bytes(event()))
        self.assertEqual(self.read_answer(used).status, 200)
        self.assertEqual(read_all(used), b"")
        self.assertEqual(read_all(unused), b"")

    def test_each_piece_of_a_large_answer_has_its_own_time(self):
        """Else who reads slowly, but reads, would never get a large event."""
        data = bytes(range(256)) * 1000
        connection = mock.Mock(close_connection=False)
        self.assertTrue(receiver.Connection.send(connection, data))
        sent = [call.args[0] for call in connection.socket.sendall.call_args_list]
        self.assertEqual(b"".join(sent), data)
        self.assertLessEqual(max(map(len, sent)), receiver.PIECE)
        self.assertEqual([call.args for call in connection.enter.call_args_list],
                         [(receiver.Phase.SEND,)] * len(sent) + [(receiver.Phase.WORK,)])

    def test_a_reader_that_takes_nothing_is_let_go(self):
        server = self.start(body_timeout=0.3, max_connections=1)
        deaf = self.connect(server)
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.settimeout(0.3)
        with contextlib.suppress(OSError):
            deaf.sendall(head_bytes(first="GET /schema.json HTTP/1.1") * 20000)
        self.await_place(server)

    def test_a_budget_is_counted_in_all_and_half_of_it_for_each_address(self):
        budget = receiver.Budget(4)
        self.assertEqual([budget.take("a", 1), budget.take("a", 1), budget.take("a", 1), budget.take("b", 2),
                          budget.take("c", 1)], [True, True, False, True, False])
        budget.give("a", 1)
        self.assertEqual([budget.take("b", 1), budget.take("c", 1), budget.take("a", 1)], [False, True, False])
        for address, amount in (("a", 1), ("b", 2), ("c", 1)):
            budget.give(address, amount)
        self.assertEqual([budget.take("a", 2), budget.take("b", 2)], [True, True])

    def test_one_read_too_many_is_told_to_come_again_and_events_are_still_taken(self):
        with mock.patch.object(receiver, "READS", 4):
            server = self.start()
        insert_rows(self.database, 3000, "printf('%03000d', value)")
        deaf = [self.connect(server) for _ in range(2)]
        for connection in deaf:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(head_bytes("Accept: text/csv", first=f"GET {PATH} HTTP/1.1"))
            connection.recv(1)
        answer = self.call(server, path=PATH)
        self.assertEqual((answer.status, answer.headers["retry-after"]), (503, "1"))
        self.assertEqual([self.post(server, event(appointment_id="A")).status, self.call(server, path="/health").status],
                         [200, 200])
        for connection in deaf:
            connection.close()
        until(lambda: self.call(server, path=PATH).status == 200, "the end of the reads")
        self.assertRegex(self.log_text(server), "WARNING - .* 503 Too many reads are under way")

    def test_one_large_body_too_many_is_told_to_come_again_and_small_ones_are_taken(self):
        server = self.start(max_body=100000)
        server._server.large = receiver.Budget(200000)
        begun = post_bytes(event(notes="n" * 60000))
        slow = self.connect(server)
        slow.sendall(begun[:1000])
        until(lambda: [one.phase for one in server._server.open_connections] == [receiver.Phase.BODY], "the first body")
        slow.sendall(begun[1000:60000])
        until(lambda: server._server.large.used >= 59000 - receiver.ORDINARY_BODY, "the rest of it")
        chunked = head_bytes("Transfer-Encoding: chunked", first=f"POST {PATH} HTTP/1.1") + b"ea60\r\n"
        for head, body in ((begun[:1000], begun[1000:]), (chunked, b" " * 60000)):
            connection = self.connect(server)
            connection.sendall(head)
            until(lambda: [one.phase for one in server._server.open_connections].count(receiver.Phase.BODY) == 2, "its head")
            connection.sendall(body)
            answer, = answers_in(read_all(connection))
            self.assertEqual((answer.status, answer.headers["retry-after"], answer.headers["connection"]),
                             (503, "1", "close"))
        self.assertEqual(self.post(server, event(appointment_id="small")).status, 200)
        slow.sendall(begun[60000:])
        self.assertEqual(self.read_answer(slow).status, 200)
        until(lambda: not server._server.large.used, "what was held")
        self.assertEqual(self.talk_statuses(server, begun), [409])

    def test_what_is_kept_of_a_large_body_is_counted_however_it_comes_and_nothing_else(self):
        server = self.start(max_body=100000)
        chunked = head_bytes("Transfer-Encoding: chunked", first=f"POST {PATH} HTTP/1.1")
        with mock.patch.object(receiver, "PIECE", 4000):                # bytes of one recv
            slow = self.connect(server)
            slow.sendall(chunked + b"186a0\r\n" + b" " * 99000)         # half a chunk
            until(lambda: server._server.large.used > 90000, "what it keeps")
            slow.close()
            until(lambda: not server._server.large.used, "what was held")
            server._server.large = receiver.Budget(200000)              # half of it is one body of the greatest size
            body = json.dumps(event()).encode().ljust(100000)
            pieces = b"".join(b"a\r\n%b\r\n" % body[at:at + 10] for at in range(0, len(body), 10))
            self.assertEqual(self.talk_statuses(server, chunked + pieces + b"0\r\n\r\n"), [200])
        server._server.large = receiver.Budget(0)
        connection, data = self.connect(server), post_bytes(event(appointment_id="small"))
        connection.sendall(data[:-5])
        until(lambda: [one.phase for one in server._server.open_connections] == [receiver.Phase.BODY], "the body")
        connection.sendall(data[-5:] + head_bytes() * 1000)             # what follows it is not its body
        connection.shutdown(socket.SHUT_WR)
        self.assertEqual(statuses(read_all(connection)), [200] * 1001)

    def test_very_many_chunks_are_decoded_in_turn_and_a_few_wait_for_nobody(self):
        server, feed, in_turn = self.start(), receiver.ChunkedBody.feed, []

        def watched(decoder, data):
            in_turn.append((len(data) + decoder.kept > receiver.ORDINARY_BODY, server._endpoints.heavy._turn.locked()))
            feed(decoder, data)
        head = head_bytes("Transfer-Encoding: chunked", first=f"POST {PATH} HTTP/1.1")
        body = json.dumps(event()).encode()
        with mock.patch.object(receiver.ChunkedBody, "feed", watched):
            for size, status in ((len(body), 200), (100000, 409)):
                pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in body.ljust(size))
                self.assertEqual(self.talk_statuses(server, head + pieces + b"0\r\n\r\n"), [status])
        self.assertEqual(set(in_turn), {(False, False), (True, True)})

    def test_whatever_ends_a_request_gives_back_what_it_used_of_a_budget(self):
        server = self.start(max_body=200000, header_timeout=WAIT, body_timeout=0.2)
        insert_rows(self.database, 3000, "printf('%03000d', value)")
        large = post_bytes(event(appointment_id="large", notes="n" * 150000), "Connection: close")
        chunked = head_bytes("Transfer-Encoding: chunked", first=f"POST {PATH} HTTP/1.1") + b"186a0\r\n" + b" " * 100000
        get, close = f"GET {PATH}%s HTTP/1.1", "Connection: close"
        for what, request, status in (
                ("an event", large, [200]), ("a duplicate", large, [409]),
                ("no event", post_bytes(b"[" + b" " * 150000, close), [400]),
                ("a body that is too long", chunked + b"\r\n186a1\r\n", [413]),
                ("a broken body", chunked + b"xx", [400]),
                ("a read", head_bytes(close, first=get % "?limit=1"), [200]),
                ("a HEAD", head_bytes(close, "Accept: text/csv", first=f"HEAD {PATH} HTTP/1.1"), [200]),
                ("no such event", head_bytes(close, first=get % "/99999"), [404]),
                ("a wrong filter", head_bytes(close, first=get % "?limit=x"), [400]),
                ("two on one connection", head_bytes(first=get % "/1") + head_bytes(close, first=get % "/1"), [200, 200])):
            with self.subTest(what), self.using_a_budget(server):
                self.assertEqual(statuses(self.exchange(server, request)), status)
        stream = head_bytes("Accept: text/csv", first=get % "")
        for what, request in (("a sender that leaves", large[:100000]), ("a reader that leaves", stream)):
            with self.subTest(what), self.using_a_budget(server) as taken, self.connect(server) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.sendall(request)
                until(lambda: taken.called, "its use")
        for what, request in (("a sender that stalls", large[:100000]), ("a reader that stalls", stream)):
            with self.subTest(what), self.using_a_budget(server) as taken:
                connection = self.connect(server)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.sendall(request)
                until(lambda: taken.called, "its use")
                until(lambda: not server._server.open_connections, "the end of its time")

    @contextlib.contextmanager
    def using_a_budget(self, server):
        """Fails unless some of a budget is used meanwhile, and all is given back once no connection is open any more."""
        with mock.patch.object(receiver.Budget, "take", autospec=True, side_effect=receiver.Budget.take) as taken:
            yield taken
        until(lambda: not server._server.open_connections, "the end of the connection")
        self.assertTrue(taken.called)
        for budget in (server._server.reads, server._server.large):
            self.assertEqual((budget.used, budget._by_address), (0, {}))

    def test_a_sender_that_pipelines_without_end_waits_for_its_answers(self):
        """Else its answers would pile up in the store."""
        server = self.start()
        with contextlib.closing(sqlite3.connect(str(self.database), isolation_level=None)) as other:
            connection = self.connect(server)
            connection.sendall(post_bytes(event()))
            self.read_answer(connection)
            handler, = server._server.open_connections
            other.execute("BEGIN IMMEDIATE")
            most = 0
            sending = threading.Thread(target=connection.sendall, args=(b"".join(
                post_bytes(event(appointment_id=f"B{number}")) for number in range(2000)),))
            sending.start()
            until(lambda: handler.outbox.is_full, "the limit")
            for _ in range(200):
                most = max(most, handler.outbox.promised - handler.outbox.sent)
                time.sleep(0.0005)
            other.execute("ROLLBACK")
        self.assertLessEqual(most, receiver.MAX_PIPELINED + 1)
        reading = threading.Thread(target=lambda: (sending.join(), connection.shutdown(socket.SHUT_WR)))
        reading.start()
        found = statuses(read_all(connection))
        reading.join()
        self.assertEqual((len(found), set(found) - {503}), (2000, {200}))

    def deaf(self, server):
        """A sender to whom an answer is late that it does not take, and its connection in the server."""
        connection = self.connect(server)
        connection.sendall(post_bytes(event()))
        self.read_answer(connection)
        handler, = server._server.open_connections
        handler.outbox.promised += 1
        handler.outbox.send(b"x" * 50000000)            # more than any socket's buffer takes
        return connection, handler

    @unittest.skipUnless(receiver.SENDS_AT_ONCE, "here each connection's own thread sends its answers")
    def test_a_late_answer_that_nobody_takes_ends_its_connection(self):
        server = self.start(body_timeout=0.3)
        _, handler = self.deaf(server)
        until(lambda: not server._server.open_connections, "the end of the connection")
        self.assertTrue(handler.timed_out)
        self.assertEqual(self.post(server, event(appointment_id="A2")).status, 200)

    @unittest.skipUnless(receiver.SENDS_AT_ONCE, "here each connection's own thread sends its answers")
    def test_who_takes_too_long_to_send_and_reads_no_answer_is_let_go_all_the_same(self):
        server = self.start(header_timeout=0.3, body_timeout=1)
        connection, handler = self.deaf(server)
        connection.sendall(b"GET /hea")                 # its 408 has to wait for what nobody takes
        until(lambda: handler.timed_out, "the end of its time")
        until(lambda: not server._server.open_connections, "the end of the connection")

    @unittest.skipUnless(POSIX, "needs 600 open files in one process")
    def test_300_slow_senders_are_not_felt_by_a_good_one(self):
        server = self.start(max_connections_per_address=400, header_timeout=60)
        slow = [self.connect(server) for _ in range(300)]
        for number, connection in enumerate(slow):
            connection.sendall((b"POST /webhook/appointments HTTP/1.1\r\nX: ", post_bytes(event())[:-1])[number % 2])
        good = self.connect(server)
        for number in range(100):
            good.sendall(post_bytes(event(appointment_id=f"good-{number}")))
            self.assertEqual(self.read_answer(good).status, 200)
        for connection in slow[:150]:
            connection.sendall(b"y")
        self.assertEqual(self.call(server, path="/health").status, 200)
        self.assertEqual(rows(self.database), 100)
        for connection in slow:
            connection.close()


class ListenTest(HTTPTest):
    """Where the service listens, and who is said to have sent."""

    def test_localhost_is_listened_to_on_every_family_that_the_machine_has(self):
        server = self.start(host="localhost")
        both = len(server._server.listeners) > 1        # some machines have no IPv6, or no name for it
        self.assertEqual(server.url, f"http://{'localhost' if both else '127.0.0.1'}:{server.port}")
        for address in {listener.getsockname()[0] for listener in server._server.listeners}:
            self.assertEqual(self.live_at(address, server.port), [200], address)
        self.assertTrue(server._server.loopback)

    def live_at(self, address, port):
        """The statuses that an address of ours answers with."""
        with socket.create_connection((address, port), timeout=WAIT) as connection:
            connection.sendall(head_bytes("Connection: close", first="GET /health/live HTTP/1.1"))
            return statuses(read_all(connection))

    @unittest.skipUnless(sys.platform == "linux", "only Linux has all of 127.0.0.0/8")
    def test_each_address_of_a_name_is_accepted_on(self):
        addresses = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]
        with mock.patch.object(receiver.socket, "getaddrinfo", return_value=found):
            server = self.start(host="clinic.example")
        for address in (*addresses, *addresses):
            self.assertEqual(self.live_at(address, server.port), [200], address)

    def test_an_address_of_the_other_family_of_a_name_may_be_missing(self):
        both = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::1", 0, 0, 0)),
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]
        with mock.patch.object(receiver.socket, "getaddrinfo", return_value=both):
            server = self.start(host="clinic.example")
        self.assertEqual(len(server._server.listeners), 1)
        self.assertEqual(self.post(server).status, 200)
        with mock.patch.object(receiver.socket, "getaddrinfo", return_value=both[:1]), \
                self.assertRaisesRegex(SetupError, "no network interface of this machine has that address"):
            self.start(host="clinic.example", database=str(self.folder / "other.db"))

    def test_a_sender_by_ipv4_is_known_by_its_ipv4_address(self):
        try:
            server = self.start(host="::")
        except SetupError:
            self.skipTest("this machine has no IPv6")
        self.assertEqual(self.post(server).status, 200)
        self.assertEqual(rows(self.database, "SELECT client FROM appointment_events"), "127.0.0.1")
        self.assertIn("client=127.0.0.1", self.log_text(server))

    def test_what_keeps_it_from_listening_says_what_to_do(self):
        for number, words in ((13, "may not take a port below 1024"), (98, "choose another with --port"),
                              (99, "no network interface")):
            number = {13: receiver.errno.EACCES, 98: receiver.errno.EADDRINUSE, 99: receiver.errno.EADDRNOTAVAIL}[number]
            with self.subTest(words), mock.patch.object(receiver, "_listener", side_effect=OSError(number, "x")), \
                    self.assertRaisesRegex(SetupError, words):
                WebhookServer(Config(port=80, database=str(self.database))).start()


class SiteTest(HTTPTest):
    """Browsers that other sites send here."""

    def test_a_page_of_another_site_cannot_post_or_read(self):
        server = self.start()
        own = f"http://127.0.0.1:{server.port}"
        for status, headers in ((200, {}), (200, {"Origin": own}),
                                (200, {"Origin": own, "Sec_Fetch_Site": "same-origin"}),
                                (200, {"Sec_Fetch_Site": "none"}), (403, {"Origin": "http://evil.example"}),
                                (403, {"Origin": "null"}), (403, {"Origin": "http://127.0.0.1:1"}),
                                (403, {"Origin": own + ".evil.example"}),
                                (403, {"Origin": f"http://x@127.0.0.1:{server.port}"}),
                                (403, {"Sec_Fetch_Site": "cross-site"}), (403, {"Sec_Fetch_Site": "same-site"}),
                                (403, {"Origin": own, "Sec_Fetch_Site": "cross-site"})):
            with self.subTest(headers):
                before = rows(self.database)
                sent = self.post(server, event(appointment_id=str(headers)), **headers)
                self.assertEqual([sent.status, self.call(server, path=PATH, **headers).status], [status, status])
                self.assertEqual(rows(self.database), before + (status == 200))
                self.assertNotIn("access-control-allow-origin", sent.headers)

    def test_an_opaque_origin_is_foreign_also_where_no_host_is_named(self):
        server = self.start()
        for host, version in (("", "1.0"), ("Host:", "1.1")):
            head = f"GET {PATH} HTTP/{version}"
            self.assertEqual(self.talk_statuses(server, head_bytes("Origin: null", first=head, host=host)), [403])
            self.assertEqual(self.talk_statuses(server, head_bytes(first=head, host=host)), [200])

    def test_a_foreign_name_that_leads_to_this_machine_is_refused(self):
        server = self.start()
        for host, status in (("localhost", 200), ("LOCALHOST:1", 200), ("127.0.0.1", 200), ("127.9.9.9", 200),
                             ("[::1]:8000", 200),
                             ("desk.localhost", 200), ("evil.example", 403), ("localhost.evil.example", 403),
                             ("127.0.0.1.evil.example", 403), ("evil-localhost", 403), ("[::2]", 200), ("10.244.0.5:8000", 200),
                             ("10.244.0.5.evil.example", 403), ("0x7f.1", 403), ("[::2].evil.example", 400),
                             ("%6cocalhost", 403)):
            with self.subTest(host):
                self.assertEqual(self.call(server, path=PATH, Host=host).status, status)

    def test_the_name_in_an_absolute_target_counts_not_the_host_header(self):
        server = self.start()
        for target, host, status in (("http://localhost/health", "evil.example", 200),
                                     ("http://evil.example/health", "localhost", 403)):
            request = head_bytes(first=f"GET {target} HTTP/1.1", host="Host: " + host)
            self.assertEqual(self.talk_statuses(server, request), [status])
        self.assertEqual(self.talk_statuses(server, head_bytes(
            "Origin: http://evil.example", first="GET http://localhost/health HTTP/1.1", host="Host: evil.example")), [403])

    def test_allowed_hosts_are_answered_besides_the_local_ones(self):
        server = self.start(allowed_host="clinic.example,other.example")
        for host, status in (("Clinic.Example:8000", 200), ("other.example", 200), ("localhost", 200),
                             ("x.clinic.example", 403)):
            self.assertEqual(self.call(server, path=PATH, Host=host).status, status, host)

    def test_every_name_is_answered_where_others_can_reach_us_unless_some_are_named(self):
        server = self.start(host="0.0.0.0", insecure=True)
        self.assertEqual(self.call(server, path=PATH, Host="clinic.example").status, 200)
        named = self.start(host="0.0.0.0", insecure=True, allowed_host="clinic.example", database=str(self.folder / "2.db"))
        for host, status in (("clinic.example", 200), ("b.example", 403)):
            self.assertEqual(self.call(named, path=PATH, Host=host).status, status, host)

    def test_pages_of_an_allowed_origin_may_send_and_read_the_answer(self):
        server = self.start(allowed_origin="https://desk.example")
        headers = {"Origin": "https://desk.example", "Sec_Fetch_Site": "cross-site"}
        for answer in (self.post(server, **headers), self.post(server, **headers),
                       self.call(server, path="/nowhere", **headers),
                       self.call(server, path=PATH, **headers)):
            self.assertEqual(answer.headers["access-control-allow-origin"], "https://desk.example")
            self.assertIn("X-Request-ID", answer.headers["access-control-expose-headers"])
        for origin in ("http://desk.example", "https://desk.example:444", "https://desk.example.evil.example"):
            answer = self.post(server, Origin=origin)
            self.assertEqual((answer.status, answer.headers.get("access-control-allow-origin")), (403, None), origin)

    def test_a_preflight_is_granted_to_an_allowed_origin_only(self):
        server = self.start(allowed_origin="https://desk.example")
        preflight = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "content-type"}
        granted = self.call(server, "OPTIONS", PATH, Origin="https://desk.example", **preflight)
        self.assertEqual((
            granted.status, granted.headers["access-control-allow-origin"],
            granted.headers["access-control-allow-headers"]), (204, "https://desk.example", "Content-Type"))
        self.assertIn("POST", granted.headers["access-control-allow-methods"])
        refused = self.call(server, "OPTIONS", PATH, Origin="https://evil.example", **preflight)
        self.assertEqual(refused.status, 403)
        self.assertFalse([name for name in refused.headers if name.startswith("access-control")])


class PrivacyTest(HTTPTest):
    """Nothing of a person in the log, wherever it is put into a request."""

    MARK = "Zaphod"

    def bodies(self):
        """Bodies that hold the mark somewhere: no JSON, no event, not valid, valid."""
        mark = self.MARK
        yield mark.encode()
        yield b'{"' + mark.encode() + b'": '
        yield b'{"a": "' + mark.encode() + b'", "a": "\xff"}'
        yield json.dumps(mark).encode()
        yield json.dumps([mark, {mark: mark}]).encode()
        yield json.dumps({mark: mark}).encode()
        for name in (*receiver.REQUIRED_FIELDS, "notes"):
            for value in ({mark: mark}, [mark], mark * 50 if name != "notes" else [[mark]], {"a": {"b": mark}}):
                yield json.dumps(event(**{name: value, "patient_id" if name != "patient_id" else "event_type": 7})).encode()
        yield json.dumps(event(event_type=mark)).encode()
        yield json.dumps(event(timestamp=mark)).encode()
        yield json.dumps(event(timestamp=mark, **{mark: mark})).encode()
        yield json.dumps(event(appointment_id="A-1", patient_id=mark, notes=mark, room=mark, **{mark: {mark: [mark]}})).encode()
        yield json.dumps(event(appointment_id="A-1", patient_id=mark, notes=mark + "2", **{mark: 1})).encode()
        yield json.dumps(event(appointment_id="A-2", notes=mark * 10000)).encode()
        yield json.dumps(event(appointment_id="A-2", notes=mark * 10001)).encode()
        yield json.dumps(event(appointment_id="A-3", short=mark)).encode()
        yield json.dumps(event(appointment_id="A-4", tags={mark: "x"})).encode()

    def requests(self):
        """Bytes of requests that hold the mark somewhere."""
        mark = self.MARK
        for body in self.bodies():
            yield post_bytes(body)
            yield post_bytes(body, "Connection: close")
        escaped = "".join(f"%{byte:02x}" for byte in mark.encode())
        for route in receiver.ROUTES:
            path = route.path.replace("{event_id}", "1")
            for first in (f"{mark} {path} HTTP/1.1", f"{mark.upper()} /{mark} HTTP/1.1", f"GET {path}/{mark} HTTP/1.1",
                          f"GET {path}/{escaped} HTTP/1.1", f"GET {path};{mark} HTTP/1.1", f"GET {path}?{mark} HTTP/1.1",
                          f"GET {path}?{mark}={mark} HTTP/1.1", f"GET {path}?{escaped}=1 HTTP/1.1",
                          f"GET {path}?patient_id%3D{mark} HTTP/1.1", f"GET {path}?patient_id={mark} HTTP/1.1",
                          f"GET {path}?patient_id={mark}&patient_id={mark} HTTP/1.1", f"GET {path}?since={mark} HTTP/1.1",
                          f"GET {path}?limit={mark} HTTP/1.1", f"GET {path}?event_type={mark} HTTP/1.1",
                          f"GET {path}?after={mark} HTTP/1.1", f"GET {path}#{mark} HTTP/1.1", f"GET {mark} HTTP/1.1",
                          f"GET http://{mark}{path} HTTP/1.1", f"OPTIONS {path}?{mark} HTTP/1.1", f"GET {path} HTTP/{mark}",
                          f"DELETE {path}?{mark} HTTP/1.1", f"GET {path} {mark} HTTP/1.1"):
                yield head_bytes("Content-Length: 0", first=first)
            for line in (f"Host: {mark}", f"Origin: http://{mark}", f"Accept: {mark}/{mark}", f"{mark}: {mark}", f"{mark}",
                         f"Expect: {mark}", f"Content-Length: {mark}", f"Transfer-Encoding: {mark}", f"Cookie: {mark}",
                         f"Content-Encoding: {mark}", f"Sec-Fetch-Site: {mark}", f"Connection: {mark}", f"User-Agent: {mark}",
                         f"Referer: {mark}", f"{mark} : x", f"X-Request-ID: {mark}", f"Authorization: Bearer {mark}"):
                host = "" if line.startswith("Host") else "Host: localhost"
                yield head_bytes(line, first=f"{route.method} {path} HTTP/1.1", host=host)
        chunked = head_bytes("Transfer-Encoding: chunked", first=f"POST {PATH} HTTP/1.1")
        for body in (mark, f"2;{mark}\r\n{{}}\r\n0\r\n{mark}: {mark}\r\n\r\n", f"2\r\n{{}}\r\n0\r\n{mark}\r\n\r\n"):
            yield chunked + body.encode()
        yield mark.encode() + b"\0\r\n\r\n"

    def test_a_mark_in_any_place_of_a_request_is_in_no_line_of_the_log(self):
        schema = json.loads((HERE / "schema.json").read_text())
        schema["properties"].update(short={"type": "string", "maxLength": 3, "pattern": "^[a-z]+$"},
                                    tags={"type": "object", "propertyNames": {"maxLength": 2}})
        (self.folder / "schema.json").write_text(json.dumps(schema))
        for mode in ("redacted", "none", "full"):
            with self.subTest(mode):
                log = self.folder / f"{mode}.log"

                def on_event(stored):
                    raise KeyError(stored.payload)
                server = self.start(log_payloads=mode, log_file=str(log), database=str(self.folder / f"{mode}.db"),
                                    schema=str(self.folder / "schema.json"), log_level="DEBUG", on_event=on_event)
                answers = [self.exchange(server, request) for request in self.requests()]
                seen = {status for answer in answers for status in statuses(answer)}
                inside = rb" --[a-z]|WEBHOOK_|[.](db|py|log)\b|" + re.escape(str(self.folder)).encode()
                self.assertEqual([answer for answer in answers if re.search(inside, answer)], [])
                with mock.patch.object(server._endpoints.rules.contract, "event", side_effect=ValueError(self.MARK)):
                    self.assertEqual(self.post(server).status, 500)
                server.stop()
                self.assertLessEqual({200, 400, 403, 404, 405, 406, 409, 411, 415, 417, 501}, seen)
                text = log.read_text()
                if mode == "full":              # what the operator asked for: payloads, and texts of exceptions
                    lines = [re.sub(" payload=.*", "", line) for line in text.splitlines() if not line.startswith("    ")]
                    text = "\n".join(lines)
                for mark in (self.MARK, self.MARK.upper(), self.MARK.lower()):
                    found = [line for line in text.splitlines() if mark in line]
                    self.assertEqual(found, [], mode)
                self.assertIn("POST /webhook/appointments 200 stored", text)

    def test_what_may_be_shown_is_shown_where_it_is_valid(self):
        server = self.start()
        self.post(server, event(appointment_id="A-77", patient_id=..., room="x"))
        self.post(server, event(appointment_id=5, event_type="moved"))
        # threads log what they have answered after the answer, so in any order
        lines = sorted(line.partition("payload=")[2] for line in self.log_text(server).splitlines()
                       if " 400 " in line)[::-1]
        self.assertEqual([json.loads(line.partition("} +")[0].rstrip("}") + "}") for line in lines],
                         [{"event_type": "scheduled", "appointment_id": "A-77", "timestamp": "2025-01-10T14:00:00Z"},
                          {"event_type": "***", "appointment_id": "***", "patient_id": "***",
                           "timestamp": "2025-01-10T14:00:00Z"}])


class LeakTest(HTTPTest):
    """Every place of a request has a mark of its own, to be looked for in all that the service says."""

    VISIT = {"type": "object", "unevaluatedProperties": False, "properties": {
        "room": {"type": "string", "pattern": "^[A-Z]-[0-9]+$"},
        "doctor": {"type": "string", "maxLength": 3, "x-pii": True},
        "codes": {"type": "array", "items": {"type": "integer", "maximum": 99}},
        "kind": {"enum": ["first", "later"]},
        "tags": {"type": "object", "propertyNames": {"maxLength": 2}},
        "scores": {"type": "object", "patternProperties": {"^Mk": {"type": "integer", "maximum": 99}}},
        "parts": {"type": "array", "prefixItems": [{"required": ["id"], "additionalProperties": False,
                                                    "properties": {"id": {"format": "uuid"}}}]}}}
    PROPERTIES = {**receiver.EVENT_SCHEMA["properties"], "visit": VISIT,
                  "closed": {"type": "object", "additionalProperties": False}}
    # One whose ids and times are a person's, too, and one in which they are not
    OPEN = {**receiver.EVENT_SCHEMA, "properties": PROPERTIES, "dependentRequired": {"closed": ["visit"]}}
    MARKED = {**OPEN, "allOf": [{"properties": {"appointment_id": {"x-pii": True},
                                                "timestamp": {"x-pii": True}}}]}

    def setUp(self):
        super().setUp()
        self.planted = {}               # mark: (where it stands, whether it is a name)
        self.numbers = itertools.count(1)

    def value(self, where):
        return self.plant(f"Mk{next(self.numbers):05}q", where, False)

    def name(self, where):
        return self.plant(f"Mk{next(self.numbers):05}q", where, True)

    def number(self, where):
        return int(self.plant(f"90210{next(self.numbers):05}", where, False))

    def time(self, where):
        return self.plant(f"{2100 + next(self.numbers)}-05-06T07:08:09Z", where, False)

    def plant(self, mark, where, is_name):
        self.planted[mark] = where, is_name
        return mark

    def wrong_values(self, where):
        """Values of each type, most of which no member takes."""
        yield self.value(where)
        yield self.value(where) * 100
        yield self.value(where) + "\r\n\x1b[31m\u2028"
        yield self.number(where)
        yield self.number(where) + 0.5
        yield [self.value(where), [self.number(where)]]
        yield {self.name(where): self.value(where), "a": {self.name(where): [{self.name(where): True}]}}

    def bodies(self, is_marked):
        """Bodies full of marks: valid ids and times only where the schema marks them, or they are shown."""
        for member in (*receiver.REQUIRED_FIELDS, "notes", "visit", "closed"):
            for wrong in self.wrong_values(member):
                if member == "appointment_id" and isinstance(wrong, str) and not is_marked:
                    wrong = wrong * 40                                      # longer than 255
                yield event(**{"appointment_id": "Shown-1", "notes": self.value("notes"), member: wrong})
        for member in (*self.VISIT["properties"], self.name("an unknown member of a closed one")):
            for wrong in self.wrong_values("visit/" + member):
                yield event(visit={member: wrong, "doctor": self.value("a marked one, too long")})
        yield event(closed={self.name("a closed one"): self.value("its value")},
                    patient_id=self.value("beside it"))
        yield event(visit={"parts": [{self.name("in an item"): self.value("its value")}]})
        yield event(visit={"tags": {self.name("too long a name"): 1}})
        yield event(visit={"scores": {self.name("a name by pattern"): self.number("its value")}})
        yield event(**{self.name("at the top, refused"): self.value("its value"), "patient_id": ""})
        yield event(**{self.name("like a pointer") + "/0/~1": self.value("its value"), "timestamp": 1})
        yield {self.name("alone"): self.value("its value")}
        yield [self.value("in a list"), event(notes=self.value("in an event in a list"))]
        yield self.value("a text alone")
        for last in ("first", "other", "third"):        # stored, and conflicts of other content
            yield event(appointment_id="Shown-2", patient_id=self.value(last), notes=self.value(last),
                        **{self.name(last): {self.name(last): [self.value(last), self.number(last)]}})
        yield event(appointment_id="Shown-3", visit={"doctor": "Dr.",
                                                     "room": "A-" + str(self.number("a good one"))})
        if is_marked:
            for _ in range(2):
                yield event(appointment_id=self.value("a marked id"), timestamp=self.time("a marked time"))
                yield event(appointment_id=self.value("a marked id"), timestamp=self.time("a marked time"),
                            notes=5)

    def broken_bodies(self):
        """Bytes that are no JSON, or too much of it."""
        for text in ('{"%s": ', '{"%s" "%s"}', '{"a": "%s', '["%s", tru%s]', "%s", '{"%s": NaN}',
                     '{"%s": 1e999}',
                     '{"a": "%s\\u0000"}', '{"%s": "\\ud800"}', '{"a": "\\%s"}', '{"a": "%s"} %s', '{%s: 1}',
                     "\ufeff%s",
                     "[" * 65 + '"%s"', '{"a": [' + "{}," * 10001 + '"%s"]}', '{"a": "%s\n"}'):
            yield (text % tuple(self.value("no JSON") for _ in range(text.count("%s")))).encode()
        mark = self.name("a name that comes twice")
        yield json.dumps({mark: 1, "x": 2}).replace('"x"', f'"{mark}"').encode()
        yield b'{"a": "' + self.value("before what is no UTF-8").encode() + b'\xff"}'
        yield json.dumps(self.value("UTF-16")).encode("utf-16")

    def heads(self):
        """Bytes of requests with marks in their heads."""
        for first in ("{n} /health HTTP/1.1", "GET /{v} HTTP/1.1", f"GET {PATH}/{{v}} HTTP/1.1",
                      "GET {v} HTTP/1.1",
                      f"GET {PATH}/%2e%2e/{{v}} HTTP/1.1", f"GET {PATH};{{v}} HTTP/1.1",
                      "GET /health?{n}={v} HTTP/1.1",
                      f"GET {PATH}?{{n}}={{v}} HTTP/1.1", f"GET {PATH}?{{n}} HTTP/1.1",
                      f"GET {PATH}?patient_id={{v}} HTTP/1.1",
                      f"GET {PATH}?patient_id={{v}}&patient_id={{v}} HTTP/1.1",
                      f"GET {PATH}?since={{v}} HTTP/1.1",
                      f"GET {PATH}?until={{v}} HTTP/1.1", f"GET {PATH}?limit={{v}} HTTP/1.1",
                      f"GET {PATH}?after={{v}} HTTP/1.1", f"GET {PATH}?event_type={{v}} HTTP/1.1",
                      f"GET {PATH}?appointment_id={{v}}%00 HTTP/1.1",
                      f"GET {PATH}?patient_id={{v}}%ff HTTP/1.1",
                      f"POST {PATH}?{{n}}={{v}} HTTP/1.1", f"PUT {PATH}?{{n}}={{v}} HTTP/1.1",
                      "OPTIONS /{v}?{n} HTTP/1.1", "GET /health HTTP/{v}", "GET /health {v} HTTP/1.1",
                      "GET http://{n}/health HTTP/1.1", "GET http://user:{v}@localhost/health HTTP/1.1",
                      "CONNECT {v}:443 HTTP/1.1", "GET /health#{v} HTTP/1.1", "GET /health%{v} HTTP/1.1"):
            first = re.sub("{v}", lambda _: self.value(first), first)
            yield head_bytes("Content-Length: 0", first=re.sub("{n}", lambda _: self.name(first), first))
        for name in ("Accept", "Accept-Encoding", "Authorization", "Connection", "Content-Encoding",
                     "Content-Length",
                     "Content-Type", "Cookie", "Expect", "Forwarded", "From", "If-None-Match", "Origin",
                     "Range", "Referer",
                     "Sec-Fetch-Site", "Svix-Signature", "Traceparent", "Transfer-Encoding", "Upgrade",
                     "User-Agent", "Via",
                     "Webhook-Id", "Webhook-Signature", "X-API-Key", "X-Forwarded-For", "X-Request-ID"):
            for first in ("GET /health HTTP/1.1", f"GET {PATH}/1234 HTTP/1.1", f"POST {PATH} HTTP/1.1"):
                yield head_bytes(f"{name}: {self.value(name)}", first=first)
        yield head_bytes(host=f"Host: {self.name('Host')}.example")
        yield head_bytes(host=f"Host: {self.value('a Host that is none')} {self.value('Host')}")
        yield head_bytes(f"{self.name('a field')}: {self.value('its value')}")
        yield head_bytes(f"{self.name('no field')}")
        yield head_bytes(f" {self.value('a folded line')}")
        chunked = head_bytes("Transfer-Encoding: chunked", first=f"POST {PATH} HTTP/1.1")
        for body in ("5;{v}={v}\r\n[],{v}\r\n", "2\r\n[]\r\n0\r\n{n}: {v}\r\n\r\n", "{v}\r\n",
                     "2\r\n[]\r\n0\r\n{v}\r\n\r\n"):
            body = re.sub("{v}", lambda _: self.value("a chunk"), body)
            yield chunked + re.sub("{n}", lambda _: self.name("a trailer"), body).encode()
        yield self.value("no HTTP").encode() + b"\0\r\n\r\n"

    def large_requests(self):
        """Bytes of requests that are too large somewhere."""
        mark = self.value("a body that is too large").encode()
        yield post_bytes(b'{"notes": "' + mark * 10000 + b'"}')
        yield head_bytes("Transfer-Encoding: chunked",
                         first=f"POST {PATH} HTTP/1.1") + b"fffff\r\n" + mark * 10000
        yield post_bytes(b'{"notes": "' + self.value("a large one that is cut").encode() * 2000 + b'"}')[:-1]
        yield post_bytes(event(appointment_id="Shown-4",
                               notes=self.value("a large one that is stored") * 2000))
        yield head_bytes(first="GET /" + self.value("a request line") * 1000 + " HTTP/1.1")
        yield head_bytes(f"X: {self.value('a header section') * 1500}" + "x" * 9000)
        yield head_bytes(*[f"{self.name('one of many fields')}: 1" for _ in range(101)])

    def find(self, text, names=False):
        """What was planted and stands in a text; names only on demand."""
        marks = set(re.findall("mk[0-9]{5}q|90210[0-9]{5}|[0-9]{4}-05-06t07:08:09z", text.lower()))
        return [(mark, *place) for mark, place in self.planted.items()
                if mark.lower() in marks and (names or not place[1])]

    def attack(self, server, is_marked):
        """Send it all: that no answer repeats a value, or a name of another request."""
        kept = self.connect(server)
        requests = [post_bytes(body) for body in self.bodies(is_marked)]
        requests += map(post_bytes, self.broken_bodies())
        for request in requests:                        # one connection: mostly read by the poller
            known = set(self.planted)
            kept.sendall(request)
            self.look_at(self.read_answer(kept), request, known)
        for request in itertools.chain(requests, self.heads(), self.large_requests()):
            for answer in answers_in(self.exchange(server, request)):
                self.look_at(self.proper(answer), request, known)

    def look_at(self, answer, request, known):
        self.assertNotEqual(answer.status, 500)
        text = repr((answer.headers, answer.body.decode("latin-1")))
        if answer.status == 200 and answer.body.startswith(b'{"events"'):
            return                                      # what was asked for
        self.assertEqual(self.find(text), [], request[:300])
        for mark, where, _ in self.find(text, names=True):
            self.assertIn(mark.encode(), request, where)

    def test_what_is_planted_anywhere_is_found_nowhere_but_names_in_the_answer_to_who_sent_them(self):
        for mode, (sink, is_marked) in itertools.product(("redacted", "none"), (
                ("stderr", True), ("file", False), ("logger", True))):
            with self.subTest(mode, sink=sink):
                self.attack_and_search(mode, sink, is_marked)

    def attack_and_search(self, mode, sink, is_marked):
        name = f"{mode}-{sink}"
        schema, logged, err = self.folder / f"{name}.json", io.StringIO(), io.StringIO()
        schema.write_text(json.dumps(self.MARKED if is_marked else self.OPEN))
        settings = {"schema": str(schema), "database": str(self.folder / f"{name}.db"), "max_body": 60000,
                    "log_file": str(self.folder / f"{name}.log") * (sink == "file"), "log_payloads": mode,
                    "log_level": "DEBUG"}
        if sink == "logger":
            settings["logger"] = logging.Logger(name)
            settings["logger"].addHandler(logging.StreamHandler(logged))

        def on_event(stored):
            raise ValueError(stored.payload)
        with contextlib.redirect_stderr(err):
            server = self.start(on_event=on_event, **settings)
            self.attack(server, is_marked)
            health = self.call(server, path="/health")
            bug = self.value("the text of an exception")
            with mock.patch.object(receiver.Contract, "event", side_effect=ValueError(bug)):
                self.assertEqual(self.find(self.post(server).body.decode(), names=True), [])
            server.stop()
        text = logged.getvalue() + err.getvalue()
        if sink == "file":
            self.assertEqual(text, "")
            text = Path(settings["log_file"]).read_text()
        self.assertEqual(self.find(text, names=True), [])
        self.assertEqual(self.find(health.body.decode(), names=True), [])
        # The neighbour: what may be shown is shown
        self.assertIn("] POST /webhook/appointments 400 Field 'patient_id' must ", text)
        self.assertIn("] POST /webhook/appointments 200 stored event_id=1 ", text)
        self.assertEqual('"event_type": "scheduled"' in text, mode == "redacted")
        self.assertEqual('"appointment_id": "Shown-2"' in text, mode == "redacted" and not is_marked)
        self.assertEqual('"appointment_id": "***", "patient_id": "***", "timestamp": "***"' in text,
                         mode == "redacted" and is_marked)

    def test_marks_follow_a_reload(self):
        schema = self.folder / "schema.json"
        server = None
        for number, (document, is_taken) in enumerate(((self.OPEN, True), (self.MARKED, True),
                                                       (self.OPEN, True),
                                                       ({**self.MARKED, "x-pii": "yes"}, False))):
            schema.write_text(json.dumps(document))
            if server is None:
                server = self.start(schema=str(schema))
            else:
                self.assertEqual(server.reload(), is_taken)
            for body in (event(appointment_id=f"Id-{number}"), event(appointment_id=f"Id-{number}", notes=5)):
                self.assertEqual(self.post(server, body).status, 400 if "notes" in body else 200)
        log = self.log_text(server)
        self.assertEqual([log.count(f'"Id-{number}"') for number in range(4)], [2, 0, 2, 2])
        self.assertIn("at /x-pii: x-pii must be true or false", log)

    def test_an_event_is_logged_by_the_marks_that_it_was_read_by(self):
        """A reload that takes marks away shows nothing of those that are not stored yet."""
        schema = self.folder / "schema.json"
        schema.write_text(json.dumps(self.MARKED))
        server, waiting = self.start(schema=str(schema), busy_timeout=WAIT), None
        with contextlib.closing(sqlite3.connect(str(self.database), isolation_level=None)) as other, \
                mock.patch.object(server.store._committer, "commit", wraps=server.store._committer.commit) as tries:
            other.execute("BEGIN IMMEDIATE")
            waiting = self.connect(server)
            waiting.sendall(post_bytes(event(appointment_id="Id-0")))
            until(lambda: tries.call_count, "the event to be read")
            schema.write_text(json.dumps(self.OPEN))
            self.assertTrue(server.reload())
        self.assertEqual(self.read_answer(waiting).status, 200)
        self.assertEqual(self.post(server, event(appointment_id="Id-1")).status, 200)
        log = self.log_text(server)
        self.assertEqual([log.count(f'"Id-{number}"') for number in range(2)], [0, 1])


class HostileTest(HTTPTest):
    """What attackers try on the wire."""

    def test_a_second_request_cannot_be_smuggled_behind_the_first(self):
        server = self.start()
        hidden = post_bytes(event(appointment_id="SMUGGLED"))
        first = f"POST {PATH} HTTP/1.1"
        whole = b"2\r\n{}\r\n0\r\n\r\n"
        for what, lines, body in (
                ("both lengths", ("Content-Length: 4", "Transfer-Encoding: chunked"), b"0\r\n\r\n"),
                ("both lengths, turned", ("Transfer-Encoding: chunked", "Content-Length: 4"), b"0\r\n\r\n"),
                ("two lengths", ("Content-Length: 0", f"Content-Length: {len(hidden)}"), b""),
                ("a list of lengths", (f"Content-Length: 0, {len(hidden)}",), b""),
                ("a plus", ("Content-Length: +0",), b""),
                ("an underscore", ("Content-Length: 0_0",), b""),
                ("a space before the colon", ("Transfer-Encoding : chunked", "Content-Length: 0"), b""),
                ("a folded line", ("X: y", " Transfer-Encoding: chunked", "Content-Length: 0"), b""),
                ("a folded coding", ("Transfer-Encoding:", " chunked"), b"0\r\n\r\n"),
                ("a bare CR", ("X: y\rTransfer-Encoding: chunked", "Content-Length: 0"), b""),
                ("a bare LF", ("X: y\nContent-Length: 0",), b""),
                ("a NUL", ("Content-Length: 0\0",), b""),
                ("a form feed", ("Transfer-Encoding: \x0cchunked",), b"0\r\n\r\n"),
                ("no colon", ("Content-Length 5", "Content-Length: 0"), b""),
                ("a coding under another", ("Transfer-Encoding: gzip, chunked",), b"0\r\n\r\n"),
                ("a coding that looks alike", ("Transfer-Encoding: chunke\xe4",), b"0\r\n\r\n"),
                ("two codings", ("Transfer-Encoding: identity", "Transfer-Encoding: chunked"), b"0\r\n\r\n"),
                ("no length", (), b""),
                ("a chunk of negative size", ("Transfer-Encoding: chunked",), b"-1\r\n" + whole),
                ("a chunk with 0x", ("Transfer-Encoding: chunked",), b"0x0\r\n\r\n" + whole),
                ("a chunk of huge size", ("Transfer-Encoding: chunked",), b"fffffffffffffffff\r\n" + whole),
                ("a chunk size that wraps to 0", ("Transfer-Encoding: chunked",), b"10000000000000000\r\n\r\n"),
                ("a chunk extension with LF", ("Transfer-Encoding: chunked",), b"2;\n" + whole),
                ("a chunk that is too long", ("Transfer-Encoding: chunked",), b"1\r\n{}\r\n0\r\n\r\n")):
            with self.subTest(what):
                answers = self.talk(server, head_bytes(*lines, first=first) + body + hidden)
                self.assertEqual([answer.status in (400, 411, 501, 413) for answer in answers], [True])
                self.assertEqual(answers[0].headers["connection"], "close")
        self.assertEqual(rows(self.database), 0)
        self.assertEqual(self.talk_statuses(server, post_bytes(b"{}") + hidden), [400, 200])

    def test_a_body_that_looks_like_a_request_stays_a_body(self):
        server = self.start()
        hidden = post_bytes(event(appointment_id="SMUGGLED"))
        self.assertEqual(self.talk_statuses(server, post_bytes(hidden) + head_bytes()), [400, 200])
        self.assertEqual(self.talk_statuses(
            server, head_bytes(f"Content-Length: {len(hidden)}") + hidden + head_bytes()), [200, 200])
        self.assertEqual(rows(self.database), 0)

    def test_answers_cannot_be_split_and_no_script_gets_into_them(self):
        server = self.start(allowed_origin="https://desk.example")
        for request in (head_bytes(first="GET /%0d%0aSet-Cookie:a=b HTTP/1.1"),
                        head_bytes(first=f"GET {PATH}?%0d%0aSet-Cookie:a=b HTTP/1.1"),
                        head_bytes(first=f"GET {PATH}?%3Cscript%3E=1 HTTP/1.1"),
                        head_bytes("Origin: https://desk.example%0d%0aX: y")):
            answer, = self.talk(server, request)
            self.assertNotIn("set-cookie", answer.headers)
            self.assertNotIn(b"\r", answer.body)
            self.assertEqual(answer.headers["content-type"], "application/json")

    def test_the_log_cannot_be_forged_from_the_request_line(self):
        server = self.start()
        self.talk(server, head_bytes(first="GET /%0a2025-01-10%20FORGED HTTP/1.1"))
        self.talk(server, head_bytes(first=f"GET {PATH}?%0aFORGED%1b[2J=1 HTTP/1.1"))
        self.talk(server, head_bytes(first=f"GET {PATH}?patient_id=PAT-SECRET HTTP/1.1"))
        text = self.log_text(server)
        self.assertEqual([line for line in text.splitlines() if not re.match(r"\d{4}-.* - webhook - ", line)], [])
        self.assertNotIn("\x1b", text)
        self.assertNotIn("PAT-SECRET", text)

    def test_tls_spoken_to_us_is_answered_in_words(self):
        answer, = self.talk(self.start(), bytes.fromhex("1603010200010001fc0303") + bytes(range(100)))
        self.assertEqual(answer.status, 400)
        self.assertIn("TLS", answer.json["message"])

    def test_random_bytes_never_make_a_500_or_stop_the_service(self):
        server = self.start()
        chance = random.Random(20250110)
        seeds = [request for _, request, _ in ConnectionTest.STATUSES if len(request) < 5000] + [
            post_bytes(event()),
            head_bytes("Transfer-Encoding: chunked", first=f"POST {PATH} HTTP/1.1") + b"2\r\n{}\r\n0\r\n\r\n",
            head_bytes(first=f"GET {PATH}?limit=5&since=2025-01-10T14:00:00Z HTTP/1.1"), bytes(range(256)),
            b"\r\n" * 50]
        for _ in range(150):
            data = bytearray(chance.choice(seeds) + chance.choice(seeds))
            for _ in range(chance.randrange(6)):
                at = chance.randrange(len(data))
                data[at:at + chance.randrange(3)] = chance.choice((b"\r\n", b"\0", b"%", b"\xff", b":", b" ", b"0",
                                                                   b"{", b"\n",
                                                                   bytes(chance.randrange(256) for _ in range(5))))
            found = statuses(self.exchange(server, bytes(data)))
            self.assertLessEqual(set(found), set(receiver.REASONS) | {100}, data)
            self.assertNotIn(500, found, data)
            self.assertNotIn(503, found, data)
        self.assertEqual(self.call(server, path="/health").status, 200)
        self.assertEqual([line for line in self.log_text(server).splitlines() if " - ERROR - " in line], [])


class InjectionTest(HTTPTest):
    """What attackers hope that somebody executes: it is data, in and out."""

    HOSTILE = ("' OR '1'='1", "'; DROP TABLE appointment_events; --", '" OR ""="',
               "1; ATTACH DATABASE 'x.db' AS x; --",
               "') UNION SELECT sql, 1, 1, 1, 1, 1, 1, 1, 1 FROM sqlite_master --", "%", "_%", "*", "[a-z]",
               "\\'", "a\tb",
               "<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "javascript:alert(1)",
               "{{7*7}}", "${7*7}",
               "${jndi:ldap://127.0.0.1:9/a}", "%s%n%x", "$(touch injected)", "`touch injected`",
               "| touch injected",
               "__import__('os').system('touch injected')", "../../etc/passwd", "file:///etc/passwd",
               "a\r\nX-Injected: 1",
               "=cmd|'/c calc'!A1", "\u202e\u2028\ufeff", "{\"$gt\": \"\"}")

    def test_code_of_any_language_in_an_event_is_stored_read_back_and_found_by_filters_as_it_is(self):
        server = self.start()
        for text in self.HOSTILE:
            with self.subTest(text):
                sent = event(appointment_id=text, patient_id=text, notes=text, **{text: {text: [text]}})
                event_id = self.post(server, sent).json["event_id"]
                answer = self.call(server, path=f"{PATH}/{event_id}", Accept="text/html")
                self.assertEqual(answer.headers["content-type"], "application/json")
                self.assertEqual(answer.json["payload"], sent)
                for name in ("appointment_id", "patient_id"):
                    found = self.call(server, path=f"{PATH}?{urllib.parse.urlencode({name: text})}")
                    self.assertEqual([one["id"] for one in found.json["events"]], [event_id])
                retry = self.post(server, sent)
                self.assertEqual((retry.status, retry.json["identical"]), (409, True))
        self.assertEqual(rows(self.database, "SELECT patient_id FROM appointment_events ORDER BY id"),
                         [(text,) for text in self.HOSTILE])
        for name in ("event_type", "since", "until", "after", "limit"):
            for text in self.HOSTILE:
                answer = self.call(server, path=f"{PATH}?{urllib.parse.urlencode({name: text})}")
                self.assertEqual((answer.status, text in answer.json["message"]), (400, False), (name, text))
        self.assertEqual(sorted(path.name for path in self.folder.iterdir() if "inject" in path.name), [])
        self.assertEqual([name for name in os.listdir() if name.startswith("injected")], [])

    def test_operators_of_other_databases_are_no_values_and_no_filters(self):
        server = self.start()
        self.assertEqual(self.post(server).status, 200)
        for operator in ("$ne", "$gt", "$regex", "$where", "$in", "__proto__", "constructor"):
            for name in receiver.REQUIRED_FIELDS:
                answer = self.post(server, event(**{name: {operator: ""}}))
                self.assertEqual((answer.status, answer.json["errors"][0]["rule"]), (400, "type"))
            for query in (f"patient_id[{operator}]=x", f"patient_id%5B{operator}%5D=x", f"{operator}=x",
                          "patient_id[]=x",
                          "patient_id=PAT-1&patient_id=PAT-2"):
                self.assertEqual(self.call(server, path=f"{PATH}?{query}").status, 400, query)
            found = self.call(server, path=f"{PATH}?patient_id={operator}")
            self.assertEqual((found.status, found.json["events"]), (200, []))
        self.assertEqual(self.post(server, event(appointment_id="A-2", __proto__={"admin": True})).status,
                         200)

    def test_no_spelling_of_a_line_end_in_a_field_makes_a_field_or_an_answer_more(self):
        server = self.start(allowed_origin="https://desk.example", allowed_host="desk.example")
        ends = ("\r", "\n", "\r\n ", "\n\t", "%0d%0a", "%0D%0A%20", "\\r\\n", "\x85", "\x0b", "\x0c", "\x00",
                "\u560a\u560d",
                "\u2028", "%E5%98%8A%E5%98%8D")
        for name, good in (("Host", "desk.example"), ("Origin", "https://desk.example"),
                           ("Accept", "text/csv"),
                           ("X-Request-ID", "a"), ("Traceparent", "00-1"), ("Content-Type", "text/plain"),
                           ("Access-Control-Request-Method", "POST"), ("Webhook-Id", "msg_1"),
                           ("Connection", "close")):
            for end, method in itertools.product(ends, ("GET", "OPTIONS")):
                with self.subTest(name, end=end, method=method):
                    line = f"{name}: {good}{end}X-Injected: 1{end}{end}HTTP/1.1 200 OK"
                    host = "Host: desk.example" if name != "Host" else ""
                    data = head_bytes(first=f"{method} {PATH} HTTP/1.1",
                                      host=host)[:-2] + line.encode() + b"\r\n\r\n"
                    answer, = self.talk(server, data, method)
                    self.assertLess(answer.status, 500)
                    self.assertNotIn("x-injected", answer.headers)
                    self.assertNotIn("desk.example" + end, repr(answer.headers))
        answer, = self.talk(server, head_bytes("Origin: https://desk.example", host="Host: desk.example"))
        self.assertEqual((answer.status, answer.headers["access-control-allow-origin"]),
                         (200, "https://desk.example"))

    def test_no_spelling_of_a_path_leads_to_a_file_or_past_a_route(self):
        server = self.start()
        for path in ("/../schema.json", "/%2e%2e/schema.json", "/%2e%2e%2fschema.json", "/..%5cschema.json",
                     "//schema.json",
                     "/schema.json/", "/schema.json/..", "/schema.json%00", "/schema.json%00.html",
                     "/./schema.json",
                     "/schema.json;x=y", "/schema.json%20", "/schema.json.", "/SCHEMA.JSON",
                     "/schema%252ejson", "/\\schema.json",
                     "/..;/schema.json", "/webhook_server.py", "/events.db", "/%2fetc%2fpasswd",
                     "//etc/passwd",
                     "/etc/passwd", "/..%c0%af..%c0%afetc/passwd", "/%uff0e%uff0e/etc/passwd",
                     "/....//etc/passwd",
                     "///", "/%", "/%zz", "/\x7f", "/.git/config", PATH + "/1/../2", PATH + "/1%2f..%2f2",
                     PATH + "%2f1",
                     PATH + "//1", PATH + "/0x1", PATH + "/1%00", PATH + "/%2d1",
                     PATH + "/99999999999999999999", "*",
                     "http://localhost/../schema.json", "localhost/schema.json", "?/schema.json"):
            with self.subTest(path):
                answer, = self.talk(server, head_bytes(first=f"GET {path} HTTP/1.1"))
                self.assertIn(answer.status, (400, 404))
                self.assertEqual(set(answer.json), {"error", "message", "request_id"})
        self.assertEqual(self.talk_statuses(server, head_bytes(first="GET /schema%2Ejson HTTP/1.1")), [200])


class BombTest(HTTPTest):
    """What is small to send and dear to read. A reader that is not made for it takes minutes, or dies."""

    def bombs(self):
        """{what: (bytes, the status that it gets)}"""
        whole = json.dumps(event())[:-1].encode()
        filled = MEGABYTE - 1000
        # Their hashes are all 0: in a set of numbers each would be compared with each
        collide = [number * (2 ** 61 - 1) for number in range(1, 30000)]
        yield "deep lists", whole + b', "a": ' + b"[" * filled, 400
        yield "deep objects", whole + b', "a": ' + b'{"a":' * (filled // 5), 400
        yield "as deep as it may be", whole + b', "a": ' + b"[" * 63 + b"]" * 63 + b"}", 200
        yield "many containers", whole + b', "a": [' + b"[]," * (filled // 3) + b"1]}", 400
        yield "as many as there may be", whole + b', "a": [' + b"{}," * 9990 + b"1]}", 200
        yield "a long number", whole + b', "a": ' + b"9" * filled + b"}", 400
        yield "a long fraction", whole + b', "a": 0.' + b"1" * filled + b"}", 400
        yield "a large exponent", whole + b', "a": 1e999999999}', 400
        yield "many large numbers", whole + b', "a": [' + (b"9" * 100 + b",") * 9000 + b"1]}", 200
        yield "a long string", whole + b', "notes": "' + b"\\\\" * (filled // 2) + b'"}', 200
        yield "a long id", whole[:-1] + b', "appointment_id": "' + b"9" * filled + b'"}', 400
        yield "a long name", whole + b', "' + b"a" * filled + b'": 1}', 200
        yield "many members", whole + b"".join(b', "%x": 1' % number for number in range(70000)) + b"}", 200
        unknown = b",".join(b'"a%x":1' % number for number in range(70000))
        yield "members that are all unknown", b"{" + unknown + b"}", 400
        yield "one member again and again", whole + b', "a": 1' * (filled // 8) + b"}", 400
        yield "numbers that collide", whole + b', "unique": ' + json.dumps(collide).encode() + b"}", 200
        twice = json.dumps(collide + collide[:1]).encode()
        yield "numbers that collide, one twice", whole + b', "unique": ' + twice + b"}", 400
        yield "blanks", b" " * filled + whole + b"}", 200
        yield "line ends", b"\r\n" * (filled // 2) + b"{", 400
        yield "commas", b"[" + b"," * filled, 400
        yield "quotes", b'"' * filled, 400

    def test_each_is_taken_or_refused_in_time_and_the_next_event_is_taken(self):
        schema = self.folder / "schema.json"
        properties = {**receiver.EVENT_SCHEMA["properties"], "unique": {"uniqueItems": True}}
        schema.write_text(json.dumps({**receiver.EVENT_SCHEMA, "properties": properties}))
        server = self.start(schema=str(schema))
        for number, (what, body, status) in enumerate(self.bombs()):
            body = body.replace(b'"APT-1"', b'"APT-%d"' % number)
            with self.subTest(what):
                began = time.process_time()
                for again in (status, 409 if status == 200 else status):
                    answer = self.post(server, body)
                    self.assertEqual(answer.status, again)
                    self.assertLess(len(answer.body), 100000)
                self.assertLess(time.process_time() - began, 20)
                self.assertEqual(self.post(server, event(appointment_id=f"good-{number}")).status, 200)
        self.assertEqual(self.call(server, path="/health").status, 200)
        self.assertNotIn(" - ERROR - ", self.log_text(server))


class ShutdownTest(HTTPTest):
    """What stop() does to connections."""

    def closed(self, server):
        """Whether nothing is accepted any more."""
        try:
            socket.create_connection(("127.0.0.1", server.port), timeout=WAIT).close()
        except ConnectionError:
            return True
        return False

    def stopping(self, server):
        """Begin to stop in a thread; gives it once nothing more is accepted."""
        thread = threading.Thread(target=server.stop)
        thread.start()
        self.addCleanup(thread.join)
        until(lambda: self.closed(server), "the end of accepting")
        return thread

    def test_a_request_that_is_half_sent_is_answered_and_stored(self):
        server = self.start(shutdown_timeout=WAIT)
        in_body, in_head, in_chunk = (self.connect(server) for _ in range(3))
        data = post_bytes(event())
        chunked = head_bytes("Transfer-Encoding: chunked", first=f"POST {PATH} HTTP/1.1")
        body = json.dumps(event(appointment_id="A2")).encode()
        in_body.sendall(data[:-5])
        in_head.sendall(data[:40])
        in_chunk.sendall(chunked + b"%x\r\n" % len(body))
        self.call(server, path="/health")
        stop = self.stopping(server)
        for connection, rest, status in ((in_body, data[-5:], 200), (in_chunk, body + b"\r\n0\r\n\r\n", 200),
                                         (in_head, data[40:], 409)):
            connection.sendall(rest)
            answer, = answers_in(read_all(connection))
            self.assertEqual((self.proper(answer).status, answer.headers["connection"]), (status, "close"))
        stop.join(WAIT)
        self.assertFalse(stop.is_alive())
        self.assertEqual(rows(self.database), 2)

    def test_idle_connections_end_and_nothing_is_accepted_after(self):
        server = self.start(shutdown_timeout=WAIT)
        used, unused = self.connect(server), self.connect(server)
        used.sendall(post_bytes(event()))
        self.assertEqual(self.read_answer(used).status, 200)
        server.stop()
        self.assertEqual([read_all(used), read_all(unused)], [b"", b""])
        self.assertTrue(self.closed(server))

    def test_a_connection_that_the_system_took_for_us_is_still_answered(self):
        server = self.start(shutdown_timeout=WAIT)
        accept, held, go_on = server._server._accept_one, threading.Event(), threading.Event()

        def accept_late(listener):
            held.set()
            go_on.wait()
            return accept(listener)
        with mock.patch.object(server._server, "_accept_one", accept_late):
            waiting = [self.connect(server)]
            held.wait()
            waiting.insert(0, self.connect(server))
            waiting[0].sendall(post_bytes(event()))
            stop = threading.Thread(target=server.stop)
            stop.start()
            until(lambda: server._server.draining, "the stop")
            go_on.set()
            stop.join()
        answer, = answers_in(read_all(waiting[0]))
        self.assertEqual(self.proper(answer).status, 200)

    def test_who_connects_without_end_does_not_keep_the_service_from_stopping(self):
        server = self.start(shutdown_timeout=WAIT)
        with mock.patch.object(server._server, "_accept_one", return_value=True) as accept:
            self.connect(server)                        # wakes the thread that accepts
            until(lambda: accept.called, "the connection")
            server.stop()
        self.assertGreater(accept.call_count, server._server.request_queue_size)       # all that the system has taken for us

    def test_a_connection_that_is_gone_before_it_is_accepted_does_not_hide_those_behind_it(self):
        server = self.start()
        gone = mock.Mock(accept=mock.Mock(side_effect=OSError(errno.ECONNABORTED, "gone")))
        empty = mock.Mock(accept=mock.Mock(side_effect=BlockingIOError(errno.EAGAIN, "empty")))
        self.assertEqual([server._server._accept_one(listener) for listener in (gone, empty)], [True, False])

    def test_to_look_for_what_has_come_leaves_no_timeout_behind_that_would_cut_an_answer(self):
        for by_writer in sorted({receiver.SENDS_AT_ONCE, False}):
            with self.subTest(by_writer), mock.patch.object(receiver, "SENDS_AT_ONCE", by_writer):
                ours, theirs = socket.socketpair()
                self.addCleanup(ours.close)
                self.addCleanup(theirs.close)
                inbox = receiver.Inbox(mock.Mock(socket=ours))
                self.assertEqual((inbox.recv_waiting(0.001), ours.gettimeout()), (b"", None))
                theirs.sendall(b"GET")
                self.assertEqual((inbox.recv_waiting(WAIT), ours.gettimeout()), (b"GET", None))

    def test_who_pipelines_on_while_the_service_drains_can_read_its_last_answer(self):
        server = self.start()
        connection = self.connect(server)
        connection.sendall(post_bytes(event()))
        self.assertEqual(self.read_answer(connection).status, 200)
        server._server.draining = True             # as stop() sets it before it looks at connections
        connection.sendall(post_bytes(event(appointment_id="A2")) * 500)
        connection.shutdown(socket.SHUT_WR)
        data = b""
        while True:
            piece = connection.recv(65536)              # a reset would raise here
            if not piece:
                break
            data += piece
        answer, = answers_in(data)
        self.assertEqual((answer.status, answer.headers["connection"]), (200, "close"))

    def test_a_second_stop_is_harmless(self):
        server = self.start()
        server.stop()
        server.stop()
        self.assertEqual((self.folder / "server.log").read_text().count("Service stopped"), 1)

    def test_who_will_not_finish_is_cut_after_the_time_allowed(self):
        server = self.start(shutdown_timeout=0.3)
        stuck = self.connect(server)
        stuck.sendall(post_bytes(event())[:-1])
        self.call(server, path="/health")
        server.stop()
        read_all(stuck)
        self.assertEqual(rows(self.database), 0)
        self.assertIn("connections cut after 0.3 seconds: 1", (self.folder / "server.log").read_text())

    def test_what_we_cut_is_not_blamed_on_its_sender(self):
        server = self.start()
        chunked = head_bytes("Transfer-Encoding: chunked", first=f"POST {PATH} HTTP/1.1")
        for begun in (post_bytes(event())[:-1], b"GET /health HTT", b"POST / HTT", chunked + b"5\r\nab"):
            connection = self.connect(server)
            connection.sendall(begun)
            handler = until(lambda: server._server.open_connections, "the connection")[0]
            until(lambda: handler.phase in (receiver.Phase.HEAD, receiver.Phase.BODY), "what has come")
            if begun.startswith(b"GET"):                # what a stop may have seen just before
                handler.phase = receiver.Phase.IDLE
                handler.end_if_idle()
            else:
                handler.cut()
            until(lambda: not server._server.open_connections, "its end")
        self.assertEqual(re.findall(r" (\d{3}) (The \w+)", self.log_text(server)), [("503", "The service")] * 4)

    def test_no_answer_is_lost_or_halved_when_a_load_is_stopped(self):
        server = self.start(shutdown_timeout=WAIT)
        answered, running, numbers = [], threading.Barrier(5), itertools.count()

        def load():
            client = next(numbers)
            if client == 4:
                running.wait(WAIT)
                server.stop()
                return
            connection, data = self.connect(server), b""
            with contextlib.suppress(ConnectionError):
                for number in range(100000):
                    connection.sendall(post_bytes(event(appointment_id=f"{client}-{number}")))
                    piece = connection.recv(65536)
                    data += piece
                    if number == 20:
                        running.wait(WAIT)
                    if not piece:
                        break
            answered.extend(answer.status for answer in answers_in(data))
        in_threads(5, load)
        self.assertEqual(set(answered), {200})
        self.assertEqual(len(answered), rows(self.database))

    def test_waiting_pipelined_events_are_answered_before_the_end(self):
        server = self.start(shutdown_timeout=WAIT)
        connection = self.connect(server)
        connection.sendall(b"".join(post_bytes(event(appointment_id=f"A{number}")) for number in range(200)))
        until(lambda: rows(self.database), "the first event")
        server.stop()
        answers = answers_in(read_all(connection))
        self.assertEqual({answer.status for answer in answers}, {200})
        self.assertEqual(len(answers), rows(self.database))


# =============================================================================
# Service
# =============================================================================

PARTS = ("Config", "JSON", "Formats", "Schema", "Events", "Work", "System", "At rest", "Files", "Tables",
         "SQLite", "Store", "Ledger", "Log", "HTTP", "Credentials", "Access", "Endpoints", "TLS", "Connections", "Service", "Command line")


def can_connect(port):
    """Whether somebody listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def our_threads():
    """The names of the service's threads in this process."""
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("webhook-"))


def open_files():
    """How many files this process has open, 0 where the system does not tell."""
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def command(*arguments, stdin=b"", environment=()):
    """Run the command line in this process: (exit code, stdout, stderr) as text."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin))), mock.patch.object(signal, "signal"), \
            mock.patch.dict(os.environ, {**clean_environment(), **dict(environment)}, clear=True), \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = receiver.main(list(map(str, arguments)))
    return code, out.getvalue(), err.getvalue()


class RunningTest(ServerTest):
    """A test that runs the program in processes of its own."""

    def run_program(self, *arguments, environment=(), **options):
        """The program, running; killed after the test if it still does."""
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
                   **options}
        process = subprocess.Popen([sys.executable, "-S", "-I", str(PROGRAM), *map(str, arguments)],
                                   cwd=self.folder,
                                   env={**clean_environment(), **dict(environment)}, **options)

        def end():
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        self.addCleanup(end)
        return process

    def serve(self, *arguments, **options):
        """A server that listens, with its `port`."""
        process = self.run_program("--port", 0, "--database", self.database, *arguments, **options)
        process.line = process.stdout.readline().decode()
        process.port = int(process.line.rpartition(":")[2])
        return process

    def begin_event(self, port):
        """A connection whose event the server has begun to read, and the bytes that are left to send."""
        head, body = post_bytes(event(), "Expect: 100-continue").split(b"\r\n\r\n")
        connection = socket.create_connection(("127.0.0.1", port), timeout=WAIT)
        self.addCleanup(connection.close)
        connection.sendall(head + b"\r\n\r\n")
        self.assertTrue(connection.recv(100).startswith(b"HTTP/1.1 100 "))
        return connection, body


class EmbeddingTest(RunningTest):

    def config(self, **settings):
        return Config(**{"port": 0, "database": str(self.database),
                         "log_file": str(self.folder / "server.log"),
                         "shutdown_timeout": 2, **settings})

    def test_a_with_block_starts_and_stops_the_service(self):
        with WebhookServer(self.config()) as server:
            self.assertEqual(server.url, f"http://127.0.0.1:{server.port}")
            self.assertEqual(self.post(server).status, 200)
        self.assertFalse(can_connect(server.port))
        self.assertEqual(our_threads(), [])
        self.assertEqual(rows(self.database), 1)

    def test_on_event_gets_what_is_on_disk_already(self):
        seen = []
        server = self.start(on_event=lambda stored: seen.append((stored, rows(self.database))))
        self.post(server, event(notes="first"))
        stored, count = until(lambda: seen and seen[0], "the call")
        self.assertEqual((stored.id, stored.appointment_id, stored.notes, count), (1, "APT-1", "first", 1))

    def test_on_event_is_called_once_for_each_stored_event_in_order_of_id(self):
        seen = []
        server = self.start(on_event=lambda stored: seen.append((stored.id, stored.appointment_id)))
        for number in (1, 2, 2, 3):
            self.post(server, event(appointment_id=f"APT-{number}"))
        self.post(server, event(appointment_id="APT-4", patient_id=...))
        server.stop()
        self.assertEqual([appointment for _, appointment in seen], ["APT-1", "APT-2", "APT-3"])
        stored = rows(self.database, "SELECT id, appointment_id FROM appointment_events ORDER BY id")
        self.assertEqual(seen, stored)

    def test_what_could_never_work_is_refused_before_a_file_is_made(self):
        async def later(stored):
            pass

        async def many_later(stored):
            yield

        def many(stored):
            yield

        class Later:
            async def __call__(self, stored):
                pass
        for arguments, word in (({"on_event": later}, "async def"), ({"on_event": many_later}, "async def"),
                                ({"on_event": functools.partial(later)}, "async def"),
                                ({"on_event": Later()}, "async def"),
                                ({"on_event": many}, "generator"), ({"on_event": "print"}, "not a str"),
                                ({"logger": "webhook"}, "getLogger"), ({"logger": ""}, "not a str"),
                                ({"config": {"port": 0}}, "not a dict"),
                                ({"config": "events.db"}, "not a str")):
            with self.subTest(arguments):
                with self.assertRaises(SetupError) as caught:
                    WebhookServer(**{"config": self.config(), **arguments})
                self.assertIn(word, str(caught.exception))
                self.assertIn(next(iter(arguments)), str(caught.exception))
        self.assertEqual(list(self.folder.iterdir()), [])
        adapter = logging.LoggerAdapter(logging.Logger("mine"), {})
        for arguments in ({"on_event": functools.partial(print, end="")}, {"on_event": [].append},
                          {"logger": adapter}):
            with self.subTest(arguments):
                WebhookServer(self.config(), **arguments).stop()

    def test_an_on_event_that_gives_back_a_coroutine_is_told_that_nobody_awaits_it(self):
        made = []

        async def later(stored):
            pass

        def on_event(stored):
            made.append(later(stored))
            return made[-1]
        server = self.start(on_event=on_event)
        for number in range(2):
            self.post(server, event(appointment_id=f"APT-{number}"))
        log = self.log_text(server)
        self.assertEqual({inspect.getcoroutinestate(one) for one in made}, {inspect.CORO_CLOSED})
        for number in (1, 2):
            self.assertIn(f"on_event failed for event {number}", log)
        self.assertIn("TypeError", log)

    def test_an_on_event_that_raises_or_exits_gets_the_next_event_all_the_same(self):
        seen = []

        def on_event(stored):
            seen.append(stored.id)
            raise (ValueError("mine"), SystemExit(3))[stored.id % 2]
        server = self.start(on_event=on_event)
        for number in range(3):
            self.assertEqual(self.post(server, event(appointment_id=f"APT-{number}")).status, 200)
        log = self.log_text(server)
        self.assertEqual(seen, [1, 2, 3])
        self.assertIn("ERROR - [-] on_event failed for event 2", log)
        self.assertIn("ValueError", log)

    def test_a_slow_on_event_keeps_no_sender_waiting_and_stop_waits_for_it(self):
        go_on, seen = threading.Event(), []

        def on_event(stored):
            go_on.wait(WAIT)
            seen.append(stored.id)
        server = self.start(on_event=on_event, shutdown_timeout=WAIT)
        self.addCleanup(go_on.set)
        for number in range(5):
            self.assertEqual(self.post(server, event(appointment_id=f"APT-{number}")).status, 200)
        self.assertEqual(seen, [])
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        until(lambda: not can_connect(server.port), "the end of listening")
        self.assertTrue(stopping.is_alive())
        go_on.set()
        stopping.join(WAIT)
        self.assertEqual(seen, [1, 2, 3, 4, 5])
        self.assertNotIn("not handed", (self.folder / "server.log").read_text())

    def test_stop_waits_for_on_event_no_longer_than_shutdown_timeout_and_says_what_it_missed(self):
        go_on, seen = threading.Event(), []

        def on_event(stored):
            seen.append(stored.id)
            go_on.wait(WAIT)
        self.addCleanup(go_on.set)
        server = self.start(on_event=on_event, shutdown_timeout=0.2)
        for number in range(3):
            self.post(server, event(appointment_id=f"APT-{number}"))
        until(lambda: seen, "the first call")
        caller = next(thread for thread in threading.enumerate() if thread.name == "webhook-callbacks")
        log = self.log_text(server)
        self.assertRegex(log, r"INFO - \[-\] Stop waits for on_event, which has been busy with event 1 for "
                              r"\d+ s; 0.2 s at most\n")
        self.assertRegex(log, r"ERROR - \[-\] Stop does not wait for on_event any longer, which has been "
                              r"busy with event 1 for \d+ s; 2 events were not handed to it\n")
        self.assertIn("Service stopped", log)
        go_on.set()
        caller.join(WAIT)
        self.assertFalse(caller.is_alive())
        self.assertEqual(seen, [1])                     # what was told as not handed over stays so

    def test_a_stop_that_waits_for_a_request_says_so(self):
        server = self.start(shutdown_timeout=WAIT)
        connection, rest = self.begin_event(server.port)
        until(lambda: [one.phase for one in server._server.open_connections] == [receiver.Phase.BODY], "the body")
        stopping = threading.Thread(target=server.stop)
        with mock.patch.object(receiver, "TELL_WAITING", 0.0):
            stopping.start()
            text = until(lambda: re.search("Stop waits for .*", (self.folder / "server.log").read_text()),
                         "the line")[0]
        self.assertEqual(text, f"Stop waits for 1 connection: 127.0.0.1 (sending a body); {WAIT} s at most")
        connection.sendall(rest)
        stopping.join(WAIT)
        self.assertEqual(statuses(read_all(connection)), [200])

    def test_an_on_event_that_waits_for_the_loop_that_leaves_the_block_does_not_hang_it(self):
        handled = []

        async def handle(stored):
            handled.append(stored.id)

        async def block(leave):
            loop = asyncio.get_running_loop()
            server = WebhookServer(self.config(shutdown_timeout=0.2), on_event=lambda stored: (
                asyncio.run_coroutine_threadsafe(handle(stored), loop).result(WAIT)))
            with server:
                self.post(server, event(appointment_id=f"APT-{len(handled)}"))
                if leave is not None:
                    await leave(server.stop)
        if hasattr(asyncio, "to_thread"):               # the way that README shows
            asyncio.run(block(asyncio.to_thread))
            self.assertEqual(handled, [1])
        self.database.unlink()
        asyncio.run(block(None))
        self.assertIn("Stop does not wait for on_event any longer", (self.folder / "server.log").read_text())
        until(lambda: our_threads() == [], "the end of all threads")

    def test_stop_ends_the_store_first_so_that_on_event_gets_what_it_commits_last(self):
        ended = []

        def recording(kind):
            stop = kind.stop

            def record(part, *arguments):
                ended.append(kind.__name__)
                stop(part, *arguments)
            return mock.patch.object(kind, "stop", record)
        with recording(receiver.Store), recording(receiver.Callbacks), recording(receiver.Log):
            with WebhookServer(self.config(), on_event=print):
                pass
        self.assertEqual(ended, ["Store", "Callbacks", "Log"])

    def test_what_opening_the_database_has_to_tell_is_in_the_log(self):
        opened = receiver.SQLite.open

        def tell(engine):
            opened(engine)
            engine.notes = ["3 events kept, 1 moved"]
        with mock.patch.object(receiver.SQLite, "open", tell):
            log = self.log_text(self.start())
        self.assertIn("WARNING - [-] 3 events kept, 1 moved\n", log)

    def test_the_log_can_be_reopened_after_it_was_moved_away(self):
        server, log, moved = self.start(), self.folder / "server.log", self.folder / "server.log.moved"
        self.post(server)
        until(lambda: "200 stored" in log.read_text(), "the first line")
        log.rename(moved)
        server.reopen_log()
        self.post(server)
        self.assertIn(" 409 ", self.log_text(server))
        self.assertNotIn(" 409 ", moved.read_text())

    def test_the_start_line_says_whether_the_database_is_new_or_what_it_holds(self):
        for number, said in enumerate(("(new)", "(1 event)", "(2 events)")):
            server = self.start()
            self.post(server, event(appointment_id=f"APT-{number}"))
            line = [line for line in self.log_text(server).splitlines() if "Service started" in line][-1]
            self.assertTrue(line.endswith(f"database {self.database} {said}"), line)

    def test_on_event_may_stop_the_service(self):
        with WebhookServer(self.config(), on_event=lambda stored: server.stop()) as server:
            self.assertEqual(self.post(server).status, 200)
            until(lambda: not can_connect(server.port), "the end of listening")
        until(lambda: our_threads() == [], "the end of all threads")
        self.assertIn("Service stopped", (self.folder / "server.log").read_text())

    def test_a_logger_gets_the_log_and_no_file_is_made(self):
        logger, records = logging.Logger("mine"), []
        handler = logging.Handler()
        handler.emit = records.append
        logger.addHandler(handler)
        with WebhookServer(self.config(), logger=logger) as server:
            self.post(server, event(event_type="nonsense"))
        self.assertEqual([record.levelname for record in records], ["INFO", "WARNING", "INFO"])
        self.assertIn("Service started", records[0].getMessage())
        self.assertIn(f"POST {PATH} 400", records[1].getMessage())
        self.assertFalse((self.folder / "server.log").exists())

    def test_two_services_in_one_process_know_nothing_of_each_other(self):
        one, other = self.start(), self.start(database=str(self.folder / "other.db"), duplicates="ok",
                                              log_file=str(self.folder / "other.log"))
        self.assertEqual([self.post(server).status for server in (one, other, one, other)],
                         [200, 200, 409, 200])
        one.stop()
        self.assertEqual(self.call(other, path="/health").status, 200)
        self.assertEqual((rows(self.database), rows(self.folder / "other.db")), (1, 1))

    def test_stop_may_come_before_start_and_again_and_from_many_threads(self):
        early = WebhookServer(self.config())
        early.stop()
        self.assertRaises(RuntimeError, early.start)
        server = self.start(database=str(self.folder / "other.db"))
        in_threads(5, server.stop)
        server.stop()
        self.assertEqual(our_threads(), [])
        self.assertEqual((self.folder / "server.log").read_text().count("Service stopped"), 1)

    def test_it_starts_only_once_and_says_so(self):
        server = WebhookServer(self.config())
        with self.assertRaisesRegex(RuntimeError, "has not started"):
            server.url
        with server, self.assertRaisesRegex(RuntimeError, "starts once"):
            server.start()
        with self.assertRaisesRegex(RuntimeError, "starts once"):
            server.start()

    def test_a_start_that_fails_leaves_nothing_running_and_no_file_open(self):
        for part, name in ((receiver.SQLite, "open"), (receiver.Log, "start"), (receiver.Callbacks, "start"),
                           (receiver.Store, "start"), (receiver.Server, "start")):
            with self.subTest(fails=f"{part.__name__}.{name}"):
                before = open_files()
                server = WebhookServer(self.config(), on_event=print)
                with mock.patch.object(part, name, side_effect=RuntimeError("can't start new thread")):
                    self.assertRaisesRegex(SetupError, "new thread", server.start)
                self.assertEqual(our_threads(), [])
                self.assertNotIn("Service stopped", (self.folder / "server.log").read_text())
                self.assertEqual(open_files(), before)
        full = OSError(errno.EMFILE, "Too many open files")
        for part, name, error in ((receiver.select, "epoll", full), (receiver.selectors, "DefaultSelector", full),
                                  (WebhookServer, "_contents", receiver._unavailable(full, str(self.database)))):
            with self.subTest(fails=name), mock.patch.object(part, name, side_effect=error, create=True), \
                    mock.patch.object(receiver, "SENDS_AT_ONCE", True):
                words = "cannot start: Too many open files" + r": raise .*\(ulimit -n\)" * isinstance(error, OSError)
                self.assertRaisesRegex(SetupError, words, WebhookServer(self.config()).start)
                self.assertEqual((our_threads(), open_files()), ([], before))
        with WebhookServer(self.config(), on_event=print) as server:
            self.assertEqual(self.call(server, path="/health").status, 200)

    def test_what_keeps_it_from_starting_is_named_in_one_line(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            files = {"text.db": "no database " * 100, "cut.json": '{"type":\n "object"',
                     "kind.json": '{"properties": {"a": {"type": 5}}}',
                     "lost.json": '{"$ref": "#/$defs/none"}',
                     "pattern.json": '{"properties": {"a\\nb": {"pattern": "("}}}'}
            for name, text in files.items():
                (self.folder / name).write_text(text)
            for settings, words in (
                    ({"port": taken.getsockname()[1]}, ["port", "in use"]),
                    ({"host": "203.0.113.1"}, ["203.0.113.1"]),
                    ({"host": "no such host"}, ["no such host"]),
                    ({"host": "ü" * 100}, ["cannot listen on"]),
                    ({"database": self.folder / "none" / "events.db"},
                     ["none", "does not exist; make it first"]),
                    ({"log_file": self.folder / "none" / "log"}, ["none", "does not exist; make it first"]),
                    ({"database": self.folder}, [str(self.folder)]),
                    ({"database": self.folder / "text.db"}, ["text.db", "database"]),
                    ({"schema": self.folder / "none.json"}, ["none.json", "No such file"]),
                    ({"schema": self.folder}, [str(self.folder), "folder"]),
                    ({"schema": self.folder / "cut.json"}, ["cut.json", "line 2"]),
                    ({"schema": self.folder / "kind.json"}, ["kind.json", "/properties/a/type"]),
                    ({"schema": self.folder / "lost.json"}, ["lost.json", "/$ref", "#/$defs/none"]),
                    ({"schema": self.folder / "pattern.json"}, ["pattern.json", "/pattern"]),
                    ({"log_file": self.folder}, [str(self.folder), "folder"])):
                with self.subTest(settings=settings):
                    before = open_files()
                    with self.assertRaises(SetupError) as caught:
                        WebhookServer(self.config(**settings)).start()
                    for word in words:
                        self.assertIn(word, str(caught.exception))
                    self.assertNotIn("\n", receiver.printable(str(caught.exception), 1000))
                    self.assertEqual((our_threads(), open_files()), ([], before))
        self.assertEqual((self.folder / "text.db").read_text(), files["text.db"])

    def test_a_port_or_an_address_that_cannot_be_had_is_told_with_what_to_do(self):
        for number, words in ((errno.EACCES, "below 1024"), (errno.EADDRINUSE, "choose another with --port"),
                              (errno.EADDRNOTAVAIL, "has that address"), (errno.EIO, os.strerror(errno.EIO))):
            with self.subTest(errno.errorcode[number]), \
                    mock.patch.object(receiver.socket.socket, "bind",
                                      side_effect=OSError(number, os.strerror(number))):
                with self.assertRaisesRegex(SetupError, f"^cannot listen on 127.0.0.1 port 80: .*{words}"):
                    WebhookServer(self.config(port=80)).start()

    @unittest.skipUnless(POSIX and os.geteuid() != 0,
                         "root may read everything" if POSIX else "needs POSIX permissions")
    def test_files_that_may_not_be_touched_are_named(self):
        for setting, name in (("database", "locked.db"), ("schema", "locked.json"),
                              ("log_file", "locked.log")):
            with self.subTest(setting):
                (self.folder / name).write_bytes(b"x")
                (self.folder / name).chmod(0)
                with self.assertRaisesRegex(SetupError, name):
                    WebhookServer(self.config(**{setting: self.folder / name})).start()

    def test_a_busy_port_leaves_the_database_unmade(self):
        with WebhookServer(self.config(database=self.folder / "first.db")) as first:
            self.assertRaises(SetupError, WebhookServer(self.config(port=first.port)).start)
        self.assertFalse(self.database.exists())

    def test_without_schema_json_the_built_in_one_serves_with_a_warning(self):
        with mock.patch.object(receiver, "DEFAULT_SCHEMA_FILE", self.folder / "schema.json"):
            server = self.start()
        self.assertEqual([self.post(server).status, self.post(server, event(notes=5)).status], [200, 400])
        self.assertEqual(self.call(server, path="/schema.json").json, receiver.EVENT_SCHEMA)
        missing = self.folder / "schema.json"
        self.assertIn(f"WARNING - [-] schema {missing} is missing: the built-in schema is used",
                      self.log_text(server))

    def test_formats_and_drafts_that_are_not_checked_are_told_at_start(self):
        document = json.loads(json.dumps(receiver.EVENT_SCHEMA))
        document["$schema"] = "http://json-schema.org/draft-07/schema#"
        document["properties"]["timestamp"]["format"] = "iso-8601"
        own = self.folder / "own.json"
        own.write_text(json.dumps(document))
        log = self.log_text(self.start(schema=str(own)))
        self.assertIn(f"{own}: the format iso-8601 at /properties/timestamp is not known and not checked",
                      log)
        self.assertIn("it says that it follows http://json-schema.org/draft-07/schema#, but is read by draft "
                      "2020-12", log)
        self.assertEqual(len(re.findall("WARNING", log)), 2)

    def test_who_opens_it_to_other_machines_is_told_what_that_means(self):
        with self.assertRaisesRegex(SetupError, "^host 0.0.0.0: .*--clients .*--tls-cert .*--trusted-proxy .*--insecure"):
            self.start(host="0.0.0.0")
        server = self.start(host="0.0.0.0", insecure=True)
        warning, = self.call(server, path="/health").json["warnings"]
        self.assertIn(f"WARNING - [-] {warning}", self.log_text(server))
        self.assertIn("Other machines can connect", warning)
        os.remove(self.folder / "server.log")
        self.assertNotIn("WARNING", self.log_text(self.start()))

    def test_a_schema_json_that_is_there_and_cannot_be_read_is_not_passed_over(self):
        (self.folder / "schema.json").mkdir()
        with mock.patch.object(receiver, "DEFAULT_SCHEMA_FILE", self.folder / "schema.json"):
            with self.assertRaisesRegex(SetupError, "schema.json"):
                WebhookServer(self.config())

    def test_a_schema_that_looks_misspelt_or_too_lax_starts_with_a_warning(self):
        document = {"required": ["patient_id"], "properties": {"notes": {"maxLenght": 5}}}
        (self.folder / "own.json").write_text(json.dumps(document))
        log = self.log_text(self.start(schema=str(self.folder / "own.json")))
        own = self.folder / "own.json"
        self.assertIn(f"WARNING - [-] schema {own}: the unknown keyword maxLenght at /properties/notes", log)
        self.assertIn("did you mean maxLength?", log)
        self.assertIn("appointment_id is not required by it", log)
        self.assertNotIn("patient_id is not", log)
        (self.folder / "own.json").write_text(json.dumps({"allOf": [{"required": receiver.REQUIRED_FIELDS}]}))
        self.assertEqual(receiver.read_schema(str(self.folder / "own.json"))[2], [])
        plain = self.start(database=str(self.folder / "other.db"), log_file=str(self.folder / "other.log"))
        plain.stop()
        self.assertNotIn("WARNING", (self.folder / "other.log").read_text())

    def test_an_edited_schema_changes_what_is_taken(self):
        schema = json.loads(json.dumps(receiver.EVENT_SCHEMA))
        schema["properties"]["event_type"]["enum"].append("moved")
        schema["properties"]["room"] = {"type": "string", "pattern": "^R[0-9]+$"}
        schema["required"].append("room")
        (self.folder / "own.json").write_text(json.dumps(schema))
        server = self.start(schema=self.folder / "own.json")
        self.assertEqual(self.post(server, event(event_type="moved", room="R4")).status, 200)
        self.assertEqual(self.post(server, event(event_type="moved")).json["message"],
                         "Missing required field: room")
        self.assertEqual(self.post(server, event(room="4")).json["errors"][0]["path"], "/room")

    def test_the_program_around_may_go_to_another_folder(self):
        before = os.getcwd()
        self.addCleanup(os.chdir, before)
        os.chdir(self.folder)
        server = self.start(database="events.db")
        os.chdir(before)
        self.post(server)
        self.assertEqual(len(self.call(server).json["events"]), 1)
        self.assertEqual(self.call(server, path="/health").status, 200)

    def test_a_database_called_memory_is_a_file_like_any_other(self):
        before = os.getcwd()
        self.addCleanup(os.chdir, before)
        os.chdir(self.folder)
        server = self.start(database=":memory:")
        os.chdir(before)
        self.post(server)
        server.stop()
        self.assertEqual(rows(self.folder / ":memory:"), 1)


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class CallbacksTest(unittest.TestCase):
    """Handing events to on_event: never in the way of the writer, and nothing is lost without a word."""

    def callbacks(self, on_event=None, waiting=3):
        """Callbacks whose on_event waits for self.go_on, the lines of their log, and their clock."""
        self.go_on, self.seen, lines, clock = threading.Event(), [], [], Clock()
        self.addCleanup(self.go_on.set)

        def hold(stored):
            self.seen.append(stored.id)
            self.go_on.wait(WAIT)
        log = mock.Mock(line=lambda level, text: lines.append(f"{level} {text}"))
        callbacks = receiver.Callbacks(on_event or hold, log, clock)
        callbacks.WAITING = waiting
        callbacks.start()
        self.addCleanup(callbacks.stop, WAIT, lambda text: None)
        self.addCleanup(self.go_on.set)
        return callbacks, lines, clock

    def put(self, callbacks, *numbers):
        for number in numbers:
            callbacks.put(stored_event(number)._replace(id=number))

    def test_a_hung_on_event_stops_no_writer_and_what_it_misses_is_named_and_counted(self):
        callbacks, lines, clock = self.callbacks()
        self.put(callbacks, 1)
        until(lambda: self.seen, "the call")
        self.put(callbacks, 2, 3, 4)
        self.assertEqual(lines, [])
        self.put(callbacks, *range(5, 10))
        self.assertEqual(lines, ["WARNING on_event has been busy with event 1 for 0 s while 3 events wait: "
                                 "event 5 was not handed to it"])
        clock.now += 0.9
        self.put(callbacks, 10)
        self.assertEqual(len(lines), 1)
        clock.now += 0.1
        self.put(callbacks, 11)
        self.assertEqual(lines[1:], [
            "WARNING on_event has been busy with event 1 for 1 s while 3 events wait: 6 events were not "
            "handed to it since the last such line, the last is event 11"])
        self.assertEqual(callbacks.trouble(),
                         "on_event has been busy with event 1 for 1 s; 7 events were not handed to it")
        self.go_on.set()
        until(lambda: len(lines) > 2, "the last line")
        self.assertEqual(lines[2:], ["WARNING on_event has caught up; 7 events were not handed to it, from id 5 to 11: read "
                                     "them in the database"])
        self.assertEqual((self.seen, callbacks.trouble()), ([1, 2, 3, 4], ""))
        self.put(callbacks, 12)
        until(lambda: self.seen[-1] == 12, "the next event")

    def test_a_long_call_is_trouble_though_nothing_is_missed_yet(self):
        callbacks, lines, clock = self.callbacks()
        self.assertEqual(callbacks.trouble(), "")
        self.put(callbacks, 5, 6)
        until(lambda: self.seen, "the call")
        clock.now += 29
        self.assertEqual(callbacks.trouble(), "")
        clock.now += 11
        self.assertEqual(callbacks.trouble(), "on_event has been busy with event 5 for 40 s")
        self.go_on.set()
        until(lambda: callbacks.trouble() == "", "the end of trouble")
        self.assertEqual(lines, [])

    def test_one_event_that_is_missed_is_counted_as_one(self):
        callbacks, lines, clock = self.callbacks(waiting=1)
        self.put(callbacks, 1)
        until(lambda: self.seen, "the call")
        self.put(callbacks, 2, 3)
        self.assertEqual(callbacks.trouble(),
                         "on_event has been busy with event 1 for 0 s; 1 event was not handed to it")

    def test_ten_thousand_events_may_wait_but_no_more_than_64_mib_of_them(self):
        self.assertEqual(receiver.Callbacks.WAITING, 10000)
        callbacks, lines, _ = self.callbacks(waiting=1000)
        self.put(callbacks, 1)
        until(lambda: self.seen, "the call")
        text = "x" * MEGABYTE
        for number in range(2, 80):
            callbacks.put(stored_event(number)._replace(id=number, payload=text))
        self.assertEqual(callbacks.trouble(),
                         "on_event has been busy with event 1 for 0 s; 14 events were not handed to it")
        self.assertIn("while 64 events wait: event 66 was not handed to it", lines[0])
        self.go_on.set()
        until(lambda: len(lines) == 2, "the end of it")
        self.go_on.clear()
        self.put(callbacks, 80)
        until(lambda: self.seen[-1] == 80, "the next call")
        callbacks.put(stored_event(81)._replace(id=81, payload=text * 65))       # one that is larger than all
        self.assertEqual(callbacks.trouble(), "")

    def test_it_has_not_caught_up_while_events_wait(self):
        turns, seen = threading.Semaphore(0), []

        def on_event(stored):
            seen.append(stored.id)
            turns.acquire(timeout=WAIT)
        callbacks, lines, _ = self.callbacks(on_event, waiting=2)
        self.addCleanup(lambda: [turns.release() for _ in range(9)])
        self.put(callbacks, 1)
        until(lambda: seen == [1], "the first call")
        self.put(callbacks, 2, 3, 4)
        turns.release()
        until(lambda: seen == [1, 2], "the second call")
        self.assertEqual((len(lines), callbacks.trouble()),
                         (1, "on_event has been busy with event 2 for 0 s; 1 event was not handed to it"))
        turns.release()
        turns.release()
        until(lambda: len(lines) == 2, "the end of it")
        self.assertIn("on_event has caught up; 1 event was not handed to it", lines[1])

    def test_a_stop_that_waits_says_for_what(self):
        callbacks, lines, clock = self.callbacks()
        self.put(callbacks, 5)
        until(lambda: self.seen, "the call")
        clock.now += 7
        told = []
        stopping = threading.Thread(target=callbacks.stop, args=(WAIT, told.append))
        stopping.start()
        until(lambda: told, "the word")
        self.assertEqual((told, stopping.is_alive()), (["on_event, which has been busy with event 5 for 7 s"],
                                                       True))
        self.go_on.set()
        stopping.join(WAIT)
        self.assertEqual((told[1:], lines, stopping.is_alive()), ([], [], False))

    def test_stop_hands_over_all_that_waits(self):
        callbacks, lines, _ = self.callbacks(on_event=lambda stored: self.seen.append(stored.id), waiting=99)
        self.put(callbacks, *range(50))
        callbacks.stop(WAIT, lambda text: None)
        self.assertEqual((self.seen, lines), (list(range(50)), []))

    def test_what_it_missed_is_named_also_when_it_catches_up_during_the_stop(self):
        callbacks, lines, _ = self.callbacks(waiting=1)
        self.put(callbacks, 1)
        until(lambda: self.seen, "the call")
        self.put(callbacks, *range(2, 6))
        stopping = threading.Thread(target=callbacks.stop, args=(WAIT, lambda text: self.go_on.set()))
        stopping.start()
        stopping.join(WAIT)
        self.assertEqual((self.seen, lines[1:]), ([1, 2], [
            "WARNING on_event has caught up; 3 events were not handed to it, from id 3 to 5: read them in the database"]))

    def test_stop_before_start_has_nothing_to_do(self):
        receiver.Callbacks(print, mock.Mock()).stop(WAIT, self.fail)


# =============================================================================
# Command line
# =============================================================================

class ServeTest(RunningTest):

    def test_the_first_line_says_where_it_listens_and_the_log_goes_to_stderr(self):
        server = self.serve()
        self.assertEqual(server.line, f"Listening on http://127.0.0.1:{server.port}\n")
        self.assertEqual(self.post(server).status, 200)
        server.terminate()
        out, err = server.communicate(timeout=WAIT)
        self.assertEqual((server.returncode if POSIX else 0, out), (0, b""))
        self.assertIn(b"INFO - [-] Service started on", err)

    @unittest.skipUnless(POSIX, "Windows ends a process without asking it")
    def test_a_signal_ends_it_with_everything_on_disk_and_exit_0(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number.name):
                self.database = self.folder / f"{number.name}.db"
                server = self.serve()
                self.post(server)
                self.assertTrue(Path(f"{self.database}-wal").exists())
                server.send_signal(number)
                err = server.communicate(timeout=WAIT)[1].decode()
                self.assertEqual(server.returncode, 0)
                self.assertFalse(Path(f"{self.database}-wal").exists())
                self.assertEqual(rows(self.database), 1)
                self.assertRegex(err, r"200 stored event_id=1 .*\n.* seal 1 sha256:\w{64}\n.*Service stopped\n\Z")

    @unittest.skipUnless(POSIX, "Windows knows no SIGHUP")
    def test_a_hang_up_goes_on_in_a_new_log_file_and_ends_nothing(self):
        log, moved = self.folder / "server.log", self.folder / "server.log-20250110"
        server = self.serve("--log-file", log)
        for status in (200, 409):
            log.rename(moved)
            server.send_signal(signal.SIGHUP)
            self.assertEqual(self.post(server).status, status)
            until(lambda: self.post(server) and log.exists() and " 409 " in log.read_text(), "the new file")
        server.terminate()
        self.assertEqual(server.wait(WAIT), 0)
        self.assertIn("Service stopped", log.read_text())

    @unittest.skipUnless(os.path.exists("/proc/self/status"), "needs Linux's /proc")
    def test_a_signal_that_was_ignored_before_stays_so(self):
        def masks(server):
            text = Path(f"/proc/{server.pid}/status").read_text()
            return [int(re.search(rf"{name}:\s+(\w+)", text)[1], 16) for name in ("SigIgn", "SigCgt")]
        for number in (signal.SIGINT, signal.SIGHUP):
            bit = 1 << number - 1
            self.database = self.folder / f"{number.name}.db"
            with self.subTest(number.name, inherited="ignored"):
                server = self.serve(preexec_fn=lambda: signal.signal(number, signal.SIG_IGN))
                ignored, caught = masks(server)
                self.assertEqual((bool(ignored & bit), bool(caught & bit)), (True, False))
                server.terminate()
                self.assertEqual(server.wait(WAIT), 0)
            with self.subTest(number.name, inherited="default"):
                server = self.serve(preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
                ignored, caught = masks(server)
                self.assertEqual((bool(ignored & bit), bool(caught & bit)), (False, True))

    def test_variables_that_do_not_count_are_told_at_start(self):
        server = self.serve("--log-file", "server.log", environment={
            "WEBHOOK_HOST": "tcp://10.96.0.12:8000", "WEBHOOK_PROT": "9000",
            "WEBHOOK_PORT": "tcp://10.96.0.12:8000",            # --port is given, as the advice says
            "WEBHOOK_SERVICE_HOST": "10.96.0.12"})
        self.assertEqual(self.post(server).status, 200)
        log = (self.folder / "server.log")
        text = until(lambda: "Service started" in log.read_text() and log.read_text(), "the log")
        self.assertEqual(text.count("WARNING"), 2)
        self.assertIn("WARNING - [-] WEBHOOK_HOST=tcp://10.96.0.12:8000 is not taken", text)
        self.assertIn("did you mean WEBHOOK_PORT?", text)

    @unittest.skipUnless(POSIX, "Windows ends a process without asking it")
    def test_a_request_in_flight_is_answered_before_it_exits(self):
        server = self.serve()
        connection, rest = self.begin_event(server.port)
        server.terminate()
        until(lambda: not can_connect(server.port), "the end of listening")
        connection.sendall(rest)
        self.assertEqual(statuses(read_all(connection)), [200])
        server.communicate(timeout=WAIT)
        self.assertEqual((server.returncode, rows(self.database)), (0, 1))

    @unittest.skipUnless(POSIX, "Windows ends a process without asking it")
    def test_a_second_signal_exits_at_once(self):
        server = self.serve("--shutdown-timeout", 600)
        self.begin_event(server.port)
        server.terminate()
        until(lambda: not can_connect(server.port), "the end of listening")
        self.assertIsNone(server.poll())
        until(lambda: server.poll() is not None or server.terminate(),
              "the end")       # the same one, twice, is one
        server.communicate()
        self.assertEqual(server.returncode, 128 + signal.SIGTERM)

    def test_a_busy_port_is_exit_2_and_one_line(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            code, out, err = self.program("serve", "--port", port, "--database", self.database)
        self.assertEqual((code, out), (2, ""))
        self.assertEqual(err, f"webhook_server.py: cannot listen on 127.0.0.1 port {port}: the port is in "
                              "use by another program; choose another with --port\n")
        self.assertFalse(self.database.exists())

    def test_the_environment_sets_and_flags_win(self):
        server = self.serve("--duplicates", "conflict", environment={
            "WEBHOOK_DATABASE": "env.db", "WEBHOOK_DUPLICATES": "ok", "WEBHOOK_MAX_BODY": "300",
            "WEBHOOK_IDLE_TIMEOUT": "",
            "WEBHOOK_LOG_FILE": "env.log"})
        self.assertEqual([self.post(server).status for _ in range(2)], [200, 409])
        self.assertEqual(self.post(server, event(notes="x" * 300)).status, 413)
        self.assertFalse((self.folder / "env.db").exists())
        self.assertTrue((self.folder / "env.log").exists())

    @unittest.skipUnless(POSIX, "needs a pipe without a reader and /dev/full")
    def test_nobody_has_to_read_what_it_prints(self):
        read_end, write_end = os.pipe()
        os.close(read_end)
        self.addCleanup(os.close, write_end)
        full = open("/dev/full" if os.path.exists("/dev/full") else os.devnull, "w")
        self.addCleanup(full.close)
        for name, streams in (("a pipe without a reader", {"stdout": write_end, "stderr": write_end}),
                              ("a full disk", {"stdout": full, "stderr": full}),
                              ("closed", {"preexec_fn": lambda: [os.close(number) for number in (0, 1, 2)]})):
            with self.subTest(name):
                log = self.folder / f"{name}.log"
                server = self.run_program("--port", 0, "--database", self.database, "--log-file", log,
                                          **streams)
                text = until(lambda: log.exists() and log.read_text(), "the log")
                server.port = int(re.search(r"http://127\.0\.0\.1:([0-9]+)", text)[1])
                self.assertIn(self.post(server).status, (200, 409))
                server.terminate()
                self.assertEqual(server.wait(WAIT), 0)
                self.assertEqual(rows(self.database), 1)


class KeyboardTest(RunningTest):
    """What the person at the keyboard can get wrong: one line that names it, exit 2, never a traceback."""

    def assert_usage(self, result, *words):
        code, out, err = result
        self.assertEqual((code, out), (2, ""))
        self.assertRegex(err, r"\Awebhook_server\.py: [^\n]+\n\Z")
        for word in words:
            self.assertIn(word, err)

    def test_wrong_words_and_flags(self):
        for arguments, word in (
                (["nonsense"], "no command nonsense; --help"), ([""], "no command ''; --help"),
                (["serv"], "no command serv; did you mean serve?"),
                (["--prot", 1], "serve takes no --prot; did you mean --port?"),
                (["--prot=1"], "serve takes no --prot; did you mean --port?"),
                (["--por", 1], "did you mean --port?"), (["-p", 1], "did you mean --port?"),
                (["--busy_timeout", 1], "did you mean --busy-timeout?"),
                (["--log", "x"], "did you mean --log-file?"), (["--colour-of-moon"], "; --help shows"),
                (["send", "--patient", 1], "send takes no --patient; did you mean --patient-id?"),
                (["bench", "--secs", 1], "bench takes no --secs; did you mean --seconds?"),
                (["--port"], "--port"), (["serve", "extra"], "extra"), (["--port", 0, "check"], "check"),
                (["--a\nb"], r"--a\nb"), (["--\udcff"], r"\udcff"), (["--", "serve"], "serve"),
                (["check"], "check: "), (["check", "--nonsense", "x"], "--nonsense"),
                (["check", "none.json"], "none.json"),
                (["check", self.folder], str(self.folder)), (["check", ""], "."), (["check", "x\0y"], "x"),
                (["check", "--schema", "none.json", "-"], "none.json"),
                (["check", "--schema", self.folder, "-"], "schema"),
                (["send", "one", "two"], "two"), (["send", "none.json"], "none.json"),
                (["send", self.folder], str(self.folder)),
                (["send", "--nonsense"], "--nonsense"), (["send", "-", "--notes", "x"], "--notes"),
                (["bench", "extra"], "extra"), (["bench", "--seconds", "0"], "--seconds"),
                (["bench", "--seconds", "nan"], "--seconds"),
            (["bench", "--seconds", "9" * 400], "--seconds"),
                (["bench", "--connections", ""], "--connections"),
                (["bench", "--connections", "1,,2"], "--connections"),
                (["bench", "--connections", "-1"], "--connections"),
                (["bench", "--connections", "9" * 400], "--connections"),
                (["bench", "--folder", self.folder / "none"], "none")):
            with self.subTest(arguments):
                self.assert_usage(command(*arguments), word)

    def test_every_number_and_choice_refuses_nonsense_and_names_flag_or_variable(self):
        for field in dataclasses.fields(Config):
            if field.metadata["metavar"] in ("TEXT", "FILE", "HOST", "ORIGIN", "NETWORK"):
                continue
            if field.default is False:          # a flag without a value
                self.assert_usage(command("--port", 0, environment={"WEBHOOK_" + field.name.upper(): "maybe"}),
                                  "WEBHOOK_" + field.name.upper())
                continue
            flag, variable = receiver.flag_of(field.name), "WEBHOOK_" + field.name.upper()
            for value in ("-1", "+5", "1_0", "0x10", "1e3", "nan", "9" * 5000, "\u0663", "ü\u202e\n", " 5",
                          "x\0y",
                          str(self.folder)):
                with self.subTest(flag, value=value[:20]):
                    self.assert_usage(command(flag, value), flag)
                    self.assert_usage(command(environment={variable: value.replace("\0", "0x")}), variable)
            with self.subTest(flag, value=""):
                self.assert_usage(command(flag, ""), flag)
            Config(**{field.name: field.default})

    def test_texts_that_lead_nowhere(self):
        database = ["--port", 0, "--database", self.database]
        for arguments in ([*database, "--host", ""], [*database, "--host", "no such host"],
                          [*database, "--host", "ü" * 300],
                          [*database, "--host", "x\0y"], [*database, "--log-file", self.folder],
                          [*database, "--log-file", self.folder / "none" / "log"],
                          [*database, "--log-file", "x" * 5000],
                          [*database, "--schema", self.folder], [*database, "--schema", "x" * 5000],
                          ["--port", 0, "--database", ""], ["--port", 0, "--database", "x\0y"],
                          ["--port", 0, "--database", self.folder],
                          ["--port", 0, "--database", self.folder / "x" / "y"],
                          ["--port", 0, "--database", self.folder / ("x" * 5000)]):
            with self.subTest([str(argument)[:30] for argument in arguments[2:]]):
                self.assert_usage(command(*arguments))

    def test_help_and_version_are_exit_0(self):
        for arguments in (["--help"], ["-h"], ["help"], ["serve", "--help"], ["check", "--help"], ["send", "-h"],
                          ["bench", "-h"],
                          ["--version"], ["--port", "1", "--help"], ["--help", "nonsense"]):
            with self.subTest(arguments):
                code, out, err = command(*arguments)
                self.assertEqual((code, err), (0, ""))
                self.assertIn("webhook_server.py", out)

    def test_help_fits_a_terminal_of_80_columns_and_makes_use_of_no_more(self):
        for name in (None, *(row.name for row in receiver.COMMANDS)):
            for columns in ("80", "200", "60"):
                with self.subTest(name, columns=columns):
                    arguments = [name, "--help"] if name else ["--help"]
                    code, out, err = command(*arguments, environment={"COLUMNS": columns})
                    self.assertEqual([line for line in out.splitlines() if len(line) > 80], [])

    def test_a_python_without_all_modules_is_one_line_that_says_what_to_install(self):
        hide = ("import runpy, sys; sys.modules[{!r}] = None; sys.argv = ['x', '--help']; "
                "runpy.run_path({!r}, run_name={!r})")
        for module in ("sqlite3", "email.utils", "http.client", "selectors"):
            with self.subTest(module):
                done = subprocess.run([sys.executable, "-c", hide.format(module, str(PROGRAM), "__main__")],
                                      capture_output=True, timeout=WAIT)
                self.assertEqual((done.returncode, done.stdout), (2, b""))
                self.assertRegex(done.stderr.decode(),
                                 rf"\Awebhook_server.py: .+ lacks {module} of .+apt install python3\)\s*\Z")
        done = subprocess.run([sys.executable, "-c", hide.format("sqlite3", str(PROGRAM), "webhook_server")],
                              capture_output=True, timeout=WAIT)
        self.assertIn(b"ModuleNotFoundError", done.stderr)      # who imports it gets an error to catch
        self.assertEqual(done.returncode, 1)

    def test_a_python_that_is_too_old_is_one_line(self):
        old = "import runpy, sys; sys.version_info = (3, 8, 1); runpy.run_path({!r}, run_name='__main__')"
        done = subprocess.run([sys.executable, "-c", old.format(str(PROGRAM))], capture_output=True,
                              timeout=WAIT)
        self.assertEqual((done.returncode, done.stderr.decode().splitlines()),
                         (2, ["webhook_server.py: needs Python 3.9 or newer, this is 3.8"]))

    def test_a_console_that_lacks_a_letter_gets_its_code(self):
        (self.folder / "ü.json").write_text(json.dumps(event(patient_id=...)))
        for encoding in ("ascii", "cp437"):
            with self.subTest(encoding):
                done = subprocess.run([sys.executable, str(PROGRAM), "check", "ü.json", "łost.json"],
                                      capture_output=True,
                                      cwd=self.folder, timeout=WAIT,
                                      env={**clean_environment(), "PYTHONIOENCODING": encoding,
                                           "PYTHONUTF8": "1"})
                shown = "ü" if encoding == "cp437" else "\\xfc"
                self.assertEqual(done.stdout.decode(encoding).splitlines(),
                                 [f"{shown}.json:1: /patient_id Missing required field: patient_id"])
                self.assertEqual(done.stderr.decode(encoding).splitlines(),
                                 ["webhook_server.py: \\u0142ost.json: No such file or directory"])
                self.assertEqual(done.returncode, 2)

    @unittest.skipUnless(POSIX, "needs /dev/full and pipes without a reader")
    def test_output_that_cannot_be_written_is_no_traceback(self):
        (self.folder / "bad.ndjson").write_text('{"a": 1}\n' * 200)
        read_end, write_end = os.pipe()
        os.close(read_end)
        self.addCleanup(os.close, write_end)
        for arguments in (["--help"], ["check", "--help"], ["check", "bad.ndjson"], ["--version"]):
            with self.subTest(arguments, stdout="a pipe without a reader"):
                process = self.run_program(*arguments, stdout=write_end)
                self.assertEqual((process.communicate(timeout=WAIT)[1], process.returncode), (b"", 1))
            if os.path.exists("/dev/full"):
                with self.subTest(arguments, stdout="/dev/full"), open("/dev/full", "w") as full:
                    process = self.run_program(*arguments, stdout=full)
                    self.assertEqual((process.communicate(timeout=WAIT)[1], process.returncode),
                                     (b"webhook_server.py: No space left on device\n", 2))
        if os.path.exists("/dev/full"):
            with open("/dev/full", "w") as full:
                self.assertEqual(self.run_program("nonsense", stdout=full, stderr=full).wait(WAIT), 2)

    @unittest.skipUnless(os.path.exists("/proc/self/stat"),
                         "needs to see whether a process sleeps, as in Linux's /proc")
    def test_ctrl_c_is_exit_130_without_a_word(self):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            sending = self.run_program("send", "--url", f"http://127.0.0.1:{silent.getsockname()[1]}")
            reading = self.run_program("check", "-", stdin=subprocess.PIPE)
            silent.settimeout(WAIT)
            connection = silent.accept()[0]
            with connection:
                received = b""
                while b"Test event" not in received:
                    received += connection.recv(65536)
                reading.stdin.write(b"[" * 1000000)         # more than a pipe holds: it has begun to read
                reading.stdin.flush()
                for process in (sending, reading):
                    stat = Path(f"/proc/{process.pid}/stat")
                    until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "S")
                    process.send_signal(signal.SIGINT)
                    self.assertEqual((process.wait(WAIT), process.stdout.read(), process.stderr.read()),
                                     (130, b"", b""))


class CheckTest(FolderTest):
    GOOD, BAD = json.dumps(event()), json.dumps(event(patient_id=...))
    MISSING = "Missing required field: patient_id"

    def check(self, data, *arguments):
        """Exit code and output of check for one file, the file's name left out."""
        file = self.folder / "events.json"
        file.write_bytes(data if isinstance(data, bytes) else data.encode())
        code, out, err = command("check", file, *arguments)
        self.assertEqual(err, "")
        return code, [line.replace(f"{file}:", "") for line in out.splitlines()]

    def test_valid_events_are_exit_0_and_silence(self):
        for name, data in (("one event", self.GOOD), ("pretty", json.dumps(event(), indent=2)),
                           ("array", f"[{self.GOOD}, {self.GOOD}]"),
                           ("empty array", "[]"), ("NDJSON", f"{self.GOOD}\n{self.GOOD}\n"),
                           ("one line", self.GOOD + "\n"),
                           ("CRLF", f"{self.GOOD}\r\n{self.GOOD}\r\n"),
                           ("empty lines", f"\n{self.GOOD}\n\n \n{self.GOOD}\n\n")):
            with self.subTest(name):
                self.assertEqual(self.check(data), (0, []))

    def test_each_problem_is_a_line_with_its_place(self):
        many = json.dumps(event(event_type="x", patient_id=5))
        for name, data, lines in (
                ("one event", self.BAD, [f"1: /patient_id {self.MISSING}"]),
                ("after empty lines", f"\n\n{self.BAD}", [f"3: /patient_id {self.MISSING}"]),
                ("array", f"[{self.GOOD},\n{self.BAD},\n{self.GOOD}]", [f"2: /1/patient_id {self.MISSING}"]),
                ("pretty array", json.dumps([event(), event(patient_id=...)], indent=1),
                 [f"8: /1/patient_id {self.MISSING}"]),
                ("NDJSON", f"{self.GOOD}\n\n{self.BAD}\n", [f"3: /patient_id {self.MISSING}"]),
                ("CRLF", f"{self.GOOD}\r\n{self.BAD}\r\n", [f"2: /patient_id {self.MISSING}"])):
            with self.subTest(name):
                self.assertEqual(self.check(data), (1, lines))
        code, lines = self.check(many)
        self.assertEqual((code, [line.split(" ")[1] for line in lines]), (1, ["/patient_id", "/event_type"]))

    def test_text_that_is_not_json_is_shown_with_line_and_column(self):
        for name, data, start in (
                ("empty", "", "1: / "), ("blank", " \n ", "2: / "), ("cut short", '{"a":\n', "2: / "),
                ("words", "hello", "1: / "),
                ("a BOM", b"\xef\xbb\xbf" + self.GOOD.encode(), "1: / "),
                ("UTF-16", self.GOOD.encode("utf-16"), "1: / "),
                ("not UTF-8", b'{"a": "\xff"}', "1: / "), ("pretty", '{\n "a": 1,\n "b": nope\n}', "3: / "),
                ("NaN", "[NaN]", "1: / "),
                ("a nesting bomb", "[" * 100000, "1: / ")):
            with self.subTest(name):
                code, lines = self.check(data)
                self.assertEqual((code, len(lines)), (1, 1))
                self.assertTrue(lines[0].startswith(start), lines)
                self.assertIn("Invalid JSON", lines[0])

    def test_one_broken_line_of_ndjson_hides_no_other(self):
        for name, data, numbers in (("first", "{broken\n" + f"{self.GOOD}\n{self.BAD}\n", [1, 3]),
                                    ("middle", f"{self.BAD}\n" + '{"a": 1,}\n' + self.GOOD, [1, 2]),
                                    ("last, cut short", f"{self.GOOD}\n" + '{"event_type": "sche', [2])):
            with self.subTest(name):
                code, lines = self.check(data)
                self.assertEqual((code, sorted({int(line.split(":")[0]) for line in lines})), (1, numbers))

    def test_what_is_no_object_is_a_problem_at_the_root(self):
        for data, place in (("5", "1: / "), ("null", "1: / "), ('"x"', "1: / "), ("[5]", "1: /0 ")):
            with self.subTest(data):
                code, lines = self.check(data)
                self.assertEqual(code, 1)
                self.assertTrue(lines[0].startswith(place), lines)

    def test_no_value_and_no_forged_line_comes_out(self):
        own = self.folder / "own.json"
        own.write_text(json.dumps({"required": receiver.REQUIRED_FIELDS,
                                   "additionalProperties": {"maxLength": 30}}))
        code, lines = self.check(json.dumps(event(**{"a\n1: / forged\x1b[2J\u202e": "Secret" * 9})),
                                 "--schema", own)
        self.assertEqual((code, len(lines)), (1, 1))
        self.assertTrue(lines[0].isprintable())
        self.assertNotIn("Secret", lines[0])

    def test_many_files_are_read_and_one_that_is_missing_does_not_hide_the_others(self):
        (self.folder / "good.json").write_text(self.GOOD)
        (self.folder / "bad.json").write_text(self.BAD)
        code, out, err = self.program("check", "none.json", "good.json", "bad.json")
        self.assertEqual((code, out), (2, f"bad.json:1: /patient_id {self.MISSING}\n"))
        self.assertEqual(err, "webhook_server.py: none.json: No such file or directory\n")
        self.assertEqual(self.program("check", "good.json"), (0, "", ""))

    def test_standard_input_is_read_for_a_dash(self):
        self.assertEqual(self.program("check", "-", stdin=self.BAD.encode()),
                         (1, f"<stdin>:1: /patient_id {self.MISSING}\n", ""))
        self.assertEqual(command("check", "-", stdin=self.GOOD.encode()), (0, "", ""))

    def test_the_schema_can_be_named_by_flag_or_environment(self):
        (self.folder / "own.json").write_text('{"properties": {"room": {"maximum": 5}}}')
        environment = {"WEBHOOK_SCHEMA": str(self.folder / "own.json")}
        data = json.dumps(event(room=9)).encode()
        self.assertEqual(command("check", "-", stdin=data), (0, "", ""))
        self.assertEqual(command("check", "-", stdin=data, environment=environment)[0], 1)
        self.assertEqual(command("check", "-", stdin=data, environment={"WEBHOOK_PORT": "nonsense"}),
                         (0, "", ""))
        code, out, err = command("check", "--schema", self.folder / "own.json", "-", stdin=data)
        self.assertEqual((code, out.split(" ")[1]), (1, "/room"))
        self.assertIn("event_type is not required by it", err)

    @unittest.skipUnless(POSIX and sys.platform != "darwin", "file names are any bytes only on Linux")
    def test_a_file_name_of_any_bytes_can_be_printed(self):
        name = os.fsdecode(b"\xff\xfe.json")
        (self.folder / name).write_text(self.BAD)
        code, out, err = self.program("check", name)
        self.assertEqual((code, out), (1, f"\\udcff\\udcfe.json:1: /patient_id {self.MISSING}\n"))


class SendTest(ServerTest):

    def test_a_test_event_is_posted_and_status_and_body_are_printed(self):
        server = self.start()
        code, out, err = command("send", "--url", server.url)
        status, body = out.splitlines()
        self.assertEqual((code, status, json.loads(body)["event_id"], err), (0, "200", 1, ""))
        self.assertEqual(rows(self.database, "SELECT event_type, notes FROM appointment_events"),
                         [("scheduled", "Test event")])
        self.assertEqual(command("send", "--url", server.url + "/")[0], 0)

    def test_members_can_be_given_and_what_is_refused_is_exit_1(self):
        server = self.start()
        given = ["--url", server.url, "--appointment-id", "APT-ü", "--timestamp", "2025-01-10T14:00:00Z"]
        self.assertEqual(command("send", *given, "--event-type", "cancelled", "--notes", "")[0], 0)
        stored = rows(self.database, "SELECT event_type, appointment_id, notes FROM appointment_events")
        self.assertEqual(stored, [("cancelled", "APT-ü", "")])
        code, out, _ = command("send", *given)
        self.assertEqual((code, out.splitlines()[0]), (1, "409"))
        code, out, _ = command("send", "--url", server.url, "--patient-id", "")
        self.assertEqual((code, out.splitlines()[0]), (1, "400"))

    def test_a_file_is_sent_as_it_is(self):
        server, file = self.start(), self.folder / "event.json"
        file.write_text(json.dumps(event(extra="kept"), indent=3))
        self.assertEqual(command("send", "--url", server.url, file)[0], 0)
        self.assertEqual(rows(self.database, "SELECT payload FROM appointment_events"), file.read_text())
        code, out, _ = command("send", "--url", server.url, "-", stdin=b"{nonsense")
        self.assertEqual((code, out.splitlines()[0]), (1, "400"))

    def test_a_path_in_the_address_is_taken(self):
        server = self.start()
        code, out, _ = command("send", "--url", f"{server.url}/nowhere?x=1")
        self.assertEqual((code, out.splitlines()[0]), (1, "404"))
        self.assertEqual(command("send", "--url", server.url + PATH)[0], 0)

    def test_no_proxy_sees_the_event(self):
        server = self.start()
        self.assertEqual(command("send", "--url", server.url, environment={
            "http_proxy": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1"})[0], 0)

    def test_a_wrong_address_is_exit_2(self):
        for url in ("", "nonsense", "ftp://127.0.0.1", "http://", "http://[::1", "http://127.0.0.1:x",
                    "http://127.0.0.1:99999",
                    "http://127.0.0.1:0", "http://me:secret@127.0.0.1", "http://127.0.0.1/ü",
                    "http://127.0.0.1/a b",
                    "http://127.0.0.1/\r\nX: y", "file:///etc/passwd", "http://" + "\udcff"):
            with self.subTest(url):
                code, out, err = command("send", "--url", url)
                self.assertEqual((code, out), (2, ""))
                self.assertRegex(err, r"\Awebhook_server\.py: --url: [^\n]+\n\Z")

    def answer_once(self, data):
        """The address of a server that answers one request with `data` and closes."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)

        def answer():
            with listener.accept()[0] as connection:
                connection.recv(65536)
                connection.sendall(data)
        thread = threading.Thread(target=answer)
        thread.start()
        self.addCleanup(thread.join)
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    def test_no_answer_or_a_strange_one_is_one_line_and_exit_1(self):
        with socket.create_server(("127.0.0.1", 0)) as closed:
            nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for url, word in ((nobody, "refused"), ("http://" + "x" * 70, "cannot send"),
                          (self.answer_once(b""), "closed"), (self.answer_once(b"220 mail\r\n"),
                                                              "cannot send"),
                          (self.answer_once(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"),
                           "cannot send")):
            with self.subTest(word):
                code, out, err = command("send", "--url", url)
                self.assertEqual((code, out), (1, ""))
                self.assertRegex(err, r"\Awebhook_server\.py: cannot send to [^\n]+\n\Z")
                self.assertIn(word, err.replace("reset", "closed"))
                self.assertEqual("is it running? python3 webhook_server.py starts it" in err, url == nobody)

    def test_a_redirect_is_not_followed(self):
        server = self.start()
        url = self.answer_once(b"HTTP/1.1 302 Found\r\nLocation: " + server.url.encode() +
                               b"/health\r\nContent-Length: 0\r\n\r\n")
        code, out, _ = command("send", "--url", url)
        self.assertEqual((code, out.splitlines()[0]), (1, "302"))


class BenchTest(RunningTest):

    def test_a_short_run_prints_a_row_for_each_round_and_rows_equal_200s(self):
        code, out, err = self.program("bench", "--seconds", "0.2", "--connections", "1, 16", "--folder",
                                      self.folder)
        self.assertEqual(code, 0, err)
        *head, titles, one, sixteen, differ = out.splitlines()
        self.assertIn(f"{os.cpu_count()} cores", head[0])
        for title in ("heads", "requests/s", "P50 ms", "P95 ms", "P99 ms", "rows = 200s"):
            self.assertIn(title, titles)
        for row, start in ((one, ["1", "same"]), (sixteen, ["16", "same"]), (differ, ["16", "differ"])):
            number, heads, rate, p50, p95, p99, not_200, verdict = row.split()
            self.assertEqual(([number, heads], not_200, verdict), (start, "0", "yes"))
            self.assertGreater(int(rate), 0)
            self.assertTrue(0 < float(p50) <= float(p95) <= float(p99))
        self.assertEqual((err, list(self.folder.iterdir())), ("", []))

    def heads_sent(self, heads_differ):
        """The heads that three requests of a load on one connection have, apart from their length."""
        heads = []
        with socket.create_server(("127.0.0.1", 0)) as listener:
            def answer():
                with listener.accept()[0] as connection:
                    for text in ("200 OK", "200 OK", "409 Conflict"):
                        heads.append(connection.recv(65536).split(b"\r\n\r\n")[0])
                        connection.sendall(f"HTTP/1.1 {text}\r\nContent-Length: 0\r\n\r\n".encode())
                    connection.recv(65536)
            thread = threading.Thread(target=answer)
            thread.start()
            address = receiver._address("", f"http://127.0.0.1:{listener.getsockname()[1]}")
            with contextlib.ExitStack() as opened:
                load = receiver.BenchLoad(opened, address, heads_differ, 1)
                load.run(WAIT)
            thread.join(WAIT)
        self.assertEqual((len(load.times), load.failed), (2, 2))        # a strange answer, and the end
        return heads

    def test_heads_are_the_same_or_all_differ_and_what_is_no_200_is_counted(self):
        self.assertEqual([len(set(self.heads_sent(differ))) for differ in (False, True)], [1, 3])

    def test_a_row_too_few_is_said_and_exit_1(self):
        with mock.patch.object(receiver.BenchLoad, "run", autospec=True, side_effect=lambda load, seconds: (
                load.times.append(0.001))):
            code, out, err = command("bench", "--seconds", "0.2", "--connections", "1", "--folder",
                                     self.folder)
        self.assertEqual((code, err), (1, ""))
        self.assertIn("NO: 0 rows, 1 200s", out)

    def test_without_words_it_measures_at_1_16_and_64(self):
        options = receiver.make_parser().parse_args(["bench"])
        self.assertEqual((options.connections, options.seconds), ("1,16,64", "3"))

    @unittest.skipUnless(POSIX, "sends signals")
    def test_a_run_that_is_ended_early_leaves_nothing_behind(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(number.name):
                bench = self.run_program("bench", "--seconds", 600, "--connections", 1, "--folder",
                                         self.folder)
                def log():
                    return "".join(path.read_text() for path in self.folder.glob("*/server.log"))
                until(lambda: " 200 stored" in log(), "the load")
                port = int(re.search(r"http://127\.0\.0\.1:([0-9]+)", log())[1])
                self.assertTrue(can_connect(port))
                bench.send_signal(number)
                bench.communicate(timeout=WAIT)
                self.assertEqual(bench.returncode, 130)
                self.assertFalse(can_connect(port))
                self.assertEqual(list(self.folder.iterdir()), [])

    @unittest.skipUnless(POSIX, "needs ulimit")
    def test_connections_that_cannot_be_made_are_one_line(self):
        done = subprocess.run([sys.executable, str(PROGRAM), "bench", "--seconds", "0.2", "--connections",
                               "100"],
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=WAIT,
                              env=clean_environment(),
                              preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40)))
        self.assertEqual(done.returncode, 2)
        self.assertNotIn(b"Traceback", done.stderr)
        self.assertIn(b"100 connections could not be made", done.stderr)


# =============================================================================
# Documents: what they say is so.
# =============================================================================

def settings_table():
    """The table of settings as README.md must have it, a line for each setting."""
    lines = ["| flag | environment | default | what it does |", "|---|---|---|---|"]
    for field in dataclasses.fields(Config):
        default = "" if field.default in ("", ()) or field.default is False else f"`{field.default}`"
        text = field.metadata["help"].replace("|", "\\|")
        lines.append(f"| `{receiver.flag_of(field.name)}` | `WEBHOOK_{field.name.upper()}` | {default} | {text} |")
    return lines


MYPY = os.environ.get("MYPY") or shutil.which("mypy")


@unittest.skipUnless(MYPY, "needs mypy, on the PATH or as MYPY=/path/to/mypy")
class TypingTest(FolderTest):
    """What `mypy --strict` says of a program beside our file: nothing of our inside, all of its mistakes."""

    GOOD = '''
import logging
from pathlib import Path
from webhook_server import (
    AppointmentEvent, Config, Contract, JSONError, Problem, Schema, SchemaError, SetupError, WebhookServer, parse_json)

seen: list[int] = []

def keep(event: AppointmentEvent) -> int:
    seen.append(event.id)
    return event.id

config = Config(host="::1", port=0, database=Path("events.db"), schema="", log_file=Path("log"),
                idle_timeout=75, allowed_host=["a.example"],
                allowed_origin="https://a.example, http://b.example")
port: int = config.port
with WebhookServer(config, on_event=keep, logger=logging.getLogger("mine")) as server:
    url: str = server.url + str(server.port)
    server.reopen_log()
with WebhookServer(on_event=print):
    pass
WebhookServer(Config(), on_event=lambda event: event.patient_id, logger=None).start().stop()
try:
    problems: list[Problem] = Schema({"type": "object"}).errors({})
    messages: list[str] = [problem.path + problem.rule + problem.message for problem in problems]
except SchemaError as error:
    place: str = error.place
except (SetupError, JSONError):
    pass
notes: str = AppointmentEvent("a", "b", "c", "d", None, "e", None, "{}").notes or ""
value = parse_json(b"{}")[0]
'''
    BAD = '''
from webhook_server import AppointmentEvent, Config, Contract, Schema, WebhookServer
Config(port=[])
Config(database=5)
Config(allowed_host=[5])
Config(nonsense=5)
WebhookServer("events.db")
WebhookServer(on_event="print")
WebhookServer(logger="webhook")
WebhookServer(on_event=lambda event: event.nonsense)
WebhookServer().port + "x"
WebhookServer().url + 5
Schema({}).errors(5)[0].nonsense
def on_event(event: AppointmentEvent) -> str:
    return event.id
'''

    def errors(self, program):
        """What mypy reports for a program: {(file, line)}, and its whole text."""
        shutil.copy(PROGRAM, self.folder)
        (self.folder / "program.py").write_text(program.lstrip())
        done = subprocess.run([MYPY, "--strict", "--cache-dir", str(self.folder / "cache"), "program.py"],
                              capture_output=True, cwd=self.folder, timeout=WAIT)
        text = done.stdout.decode() + done.stderr.decode()
        return {(file, int(line)) for file, line in re.findall(r"(?m)^([^:\n]+):(\d+): error", text)}, text

    def test_a_program_that_uses_us_as_meant_hears_nothing(self):
        found, text = self.errors(self.GOOD)
        self.assertEqual(found, set(), text)
        self.assertIn("Success", text)

    def test_a_program_with_mistakes_hears_of_each_of_them_and_of_nothing_else(self):
        found, text = self.errors(self.BAD)
        lines = self.BAD.lstrip().splitlines()
        wrong = {("program.py", number) for number, line in enumerate(lines, 1)
                 if not line.startswith(("from", "def"))}
        self.assertEqual(found, wrong, text)


class DocumentTest(ServerTest):
    source = PROGRAM.read_text(encoding="utf-8")

    def test_the_program_starts_on_the_bare_standard_library(self):
        code, out, err = self.program("--help")
        self.assertEqual((code, err), (0, ""))
        self.assertIn("--busy-timeout SECONDS", out)

    def test_nothing_is_imported_from_outside_the_standard_library(self):
        if not hasattr(sys, "stdlib_module_names"):
            self.skipTest("this Python cannot name its standard library")
        names = set()
        for node in ast.walk(ast.parse(self.source)):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
        self.assertIn("sqlite3", names)
        self.assertEqual(names - set(sys.stdlib_module_names), set())

    def test_help_names_every_setting_with_its_default_and_every_command(self):
        text = " ".join(command("--help")[1].split())
        for field in dataclasses.fields(Config):
            with self.subTest(field.name):
                flag, metavar = receiver.flag_of(field.name), field.metadata["metavar"]
                self.assertIn(" ".join(filter(None, (flag, metavar, field.metadata["help"]))), text)
                if field.default not in ("", ()) and field.default is not False:
                    self.assertIn(f"{field.metadata['help']} (default: {field.default})", text)
        for row in receiver.COMMANDS:
            self.assertIn(f" {row.name} {row.help}", text)

    def test_readme_has_a_row_for_every_setting(self):
        readme = (HERE / "README.md").read_text(encoding="utf-8").splitlines()
        table = settings_table()
        missing = [line for line in table[2:] if line not in readme]
        self.assertEqual(missing, [], "README.md needs this table:\n\n" + "\n".join(table) + "\n")

    @staticmethod
    def blocks():
        """[(language, text)] of what README shows in blocks."""
        return re.findall(r"```(\w*)\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.DOTALL)

    def block(self, word):
        """The one block that holds a word, with this Python."""
        found, = (text for _, text in self.blocks() if word in text)
        return found.replace("python3 -", f"'{sys.executable}' -")

    @unittest.skipUnless(POSIX, "needs a shell")
    def test_a_backup_is_made_and_restored_as_the_readme_says(self):
        for word in (".backup(", "mv appointments.db*"):
            server = self.start(database=str(self.folder / "appointments.db"))
            for name in ("APT-1", word):
                self.post(server, event(appointment_id=name))
            if word != ".backup(":
                server.stop()
                (self.folder / "appointments.db-wal").write_bytes(b"stale")
            subprocess.run(["sh", "-c", self.block(word)], cwd=self.folder, check=True, timeout=WAIT)
            server.stop()
        self.assertEqual(rows(self.folder / "before" / "appointments.db"), 3)
        self.assertEqual((self.folder / "appointments.db").stat().st_mode & 0o77, 0)
        self.assertFalse((self.folder / "appointments.db-wal").exists())
        server = self.start(database=str(self.folder / "appointments.db"))
        self.assertEqual([one["appointment_id"] for one in self.call(server).json["events"]],
                         ["APT-1", ".backup("])

    def test_the_quotes_for_windows_make_the_same_event_as_those_for_a_shell(self):
        words = ("curl -d '", "curl -d \"", "Invoke-RestMethod")
        shell, cmd, powershell = (next(text for _, text in self.blocks() if word in text) for word in words)
        expected = json.loads(re.search("'(.*)'", shell)[1])
        self.assertEqual(json.loads(re.search(' "(.*)"', cmd)[1].replace('\\"', '"')), expected)
        self.assertEqual(json.loads(re.search("'(.*)'", powershell)[1]), expected)

    def test_the_programs_in_the_readme_run(self):
        for word, stdin, output in (("import asyncio", b"", r"\A\Z"),
                                    ("input(", b"\n", r"\Ahttp://127.0.0.1:\d+\n.*\Z")):
            with self.subTest(word):
                text = self.block(word).replace("sleep(3600)", "sleep(0)")
                done = subprocess.run([sys.executable, "-c", text], cwd=self.folder, input=stdin,
                                      capture_output=True,
                                      timeout=WAIT, env={**clean_environment(), "PYTHONPATH": str(HERE)})
                self.assertEqual(done.returncode, 0, done.stderr)
                self.assertRegex(done.stdout.decode().replace("\r", ""), output)

    @unittest.skipUnless(POSIX and shutil.which("curl") and shutil.which("openssl"), "needs a shell, curl and openssl")
    def test_the_ten_steps_of_the_readme_give_what_it_says(self):
        for path in (PROGRAM, PROGRAM.with_name("schema.json")):
            shutil.copy(path, self.folder)
        (self.folder / "bin").mkdir()
        (self.folder / "bin" / "python3").symlink_to(sys.executable)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        script, expected = "", []
        for kind, text in self.blocks():
            if kind == "console":
                for line in text.replace("8443", port).splitlines(keepends=True):
                    if line.startswith("$ "):
                        script += f"echo '-- {len(expected)}'\n{line[2:]}"
                        expected.append("")
                    else:
                        expected[-1] += line
        environment = {**clean_environment(), "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}
        done = subprocess.run(["sh", "-c", script], stdout=subprocess.PIPE, cwd=self.folder, env=environment, timeout=WAIT)
        found = re.split(r"(?m)^-- \d+\n", done.stdout.decode())[1:]
        self.assertEqual((len(found), len(expected) > 12), (len(expected), True))

        def masked(text):
            for pattern in (r"whk_[\w-]{43}", r"[0-9a-f]{64}", r"key-\d{8}-\w{4}", r":[\w+/]{43}=",
                            r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}", r"seal \d+ "):
                text = re.sub(pattern, "*", text)
            return text
        for got, wanted in zip(found, expected):
            with self.subTest(wanted[:60]):
                self.assertEqual(masked(got), masked(wanted))

    def test_the_entries_of_senders_in_the_readme_are_valid(self):
        found = [json.loads(text) for kind, text in self.blocks() if kind == "json" and text.startswith('{"clients"')]
        clients = receiver._clients_of(found[0]["clients"])
        self.assertEqual(len(clients), 10)
        self.assertLessEqual(set(receiver.SIGNATURE_PROFILES), {one["signature"].get("profile") for one in found[0]["clients"]})
        self.assertEqual(list(Schema(receiver.CLIENTS_SCHEMA).errors(found[1])), [])

    @unittest.skipUnless(POSIX and shutil.which("curl"), "needs a shell and curl")
    def test_every_answer_in_the_readme_is_what_comes_back(self):
        server = self.start(database=str(self.folder / "appointments.db"))
        blocks, tried = self.blocks(), 0
        for (kind, commands), (answer_kind, expected) in zip(blocks, blocks[1:]):
            if kind != "sh" or answer_kind == "sh" or commands.startswith("./run.sh"):
                continue
            commands = commands.replace("http://127.0.0.1:8000", server.url).replace(
                "python3 webhook_server.py", f"'{sys.executable}' -S -I '{PROGRAM}'").replace(
                "python3 -", f"'{sys.executable}' -")
            done = subprocess.run(["sh", "-c", commands], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                  timeout=WAIT,
                                  cwd=self.folder, env=clean_environment())
            with self.subTest(commands[:80]):
                self.assertEqual(self.without_times(done.stdout.decode()), self.without_times(expected))
            tried += 1
        self.assertEqual(tried, 6)                      # a new example counts; none is lost unseen

    @unittest.skipUnless(POSIX and shutil.which("curl"), "needs a shell and curl")
    def test_the_log_lines_in_the_readme_are_what_is_logged(self):
        server = self.start(database=str(self.folder / "appointments.db"), log_file=str(self.folder / "log"))
        for _, commands in self.blocks()[1:4]:
            if commands.startswith("curl"):
                subprocess.run(["sh", "-c", commands.replace("http://127.0.0.1:8000", server.url)], check=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=WAIT)
        server.stop()
        logged = self.without_times((self.folder / "log").read_text()).splitlines()
        shown, = (text for _, text in self.blocks() if " - webhook - " in text)
        for line in self.without_times(shown).splitlines():
            with self.subTest(line):
                self.assertIn(line, logged)

    def test_the_readme_names_every_status_that_refuses(self):
        rows = re.findall(r"(?m)^\| ([0-9, ]+) \|", (HERE / "README.md").read_text(encoding="utf-8"))
        named = {int(status) for row in rows for status in row.split(", ")}
        # 204 answers OPTIONS; 417, 500, 501 and 505 are for a sender, or a server, that is broken altogether
        self.assertEqual(set(receiver.REASONS) - named - {204, 417, 500, 501, 505}, set())

    def test_the_numbers_in_the_readme_are_those_of_the_program(self):
        readme = " ".join((HERE / "README.md").read_text(encoding="utf-8").split())
        most, large = receiver.READS, receiver.LARGE_BYTES // 2 ** 20
        waiting = receiver.Callbacks.WAITING
        for text in (f"reads ({most}; {most // 2})", f"({large} MiB in all; {large // 2} MiB)",
                     f"connections ({Config().max_connections}; {Config().max_connections_per_address} from",
                     f"bodies of more than {receiver.ORDINARY_BODY // 1024} KiB",
                     f"{receiver.MAX_DEPTH} levels deep", f"at most {receiver.MAX_CONTAINERS:,} objects and arrays",
                     f"numbers of at most {receiver.MAX_NUMBER} characters",
                     f"({receiver.PAGE_BYTES // 2 ** 20} MiB) or rare ({receiver.PAGE_SECONDS:g} s)",
                     f"({receiver.DEFAULT_LIMIT}, at most {receiver.MAX_LIMIT})",
                     f"{waiting:,} events do, or {receiver.Callbacks.WAITING_BYTES // 2 ** 20} MiB",
                     f"the version of the data, now {len(receiver.MIGRATIONS)}",
                     f"rotated at {Config().log_max_bytes // 2 ** 20} MiB with {Config().log_backups} old files"):
            with self.subTest(text):
                self.assertIn(text, readme)
        self.assertEqual((receiver.READ_SECONDS, receiver.LOG_LOOK_SECONDS), (3600, 1))

    def test_what_the_readme_says_of_schemas_is_said_at_start(self):
        readme = (HERE / "README.md").read_text(encoding="utf-8")
        for word, part in (("`nullable`", {"nullable": True}), ("`dependencies`", {"dependencies": {}}),
                           ("`discriminator`", {"discriminator": {}}), ("`^(a+)+$`", {"pattern": "^(a+)+$"})):
            with self.subTest(word):
                self.assertIn(word, readme)
                self.assertEqual(len(receiver.Schema(part).notes), 1)
        self.assertIn(r"`\p{…}`", readme)
        with self.assertRaises(receiver.SchemaError):
            receiver.Schema({"pattern": r"\p{L}"})

    @staticmethod
    def without_times(text):
        text = re.sub(r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}|\b\d+\.\dms\b", "(time)", text)
        text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}", "(now)", text.replace("\r\n", "\n"))
        return text.strip()

    def test_readme_has_no_place_left_to_fill_in(self):
        self.assertNotRegex((HERE / "README.md").read_text(encoding="utf-8"),
                            r"BENCH_OUTPUT|SETTINGS_TABLE|TODO")

    def test_readme_names_no_flag_that_does_not_exist(self):
        known = set()
        for row in receiver.COMMANDS:
            known |= set(re.findall(r"--[a-z][a-z0-9-]*", command(row.name, "--help")[1]))
        readme = (HERE / "README.md").read_text(encoding="utf-8")
        written = set(re.findall(r"`(--[a-z][a-z0-9-]*)", readme))
        self.assertEqual(written - known, set())
        self.assertEqual(set(re.findall(r"WEBHOOK_[A-Z_]+[A-Z]", readme)) - {
            "WEBHOOK_" + field.name.upper() for field in dataclasses.fields(Config)} - {"WEBHOOK_NAME"},
                         set())

    def test_the_built_in_schema_is_schema_json(self):
        self.assertEqual(json.loads((HERE / "schema.json").read_text(encoding="utf-8")),
                         receiver.EVENT_SCHEMA)

    def test_the_table_of_contents_is_true(self):
        listed = re.findall(r"(?m)^    ([A-Z][A-Za-z ]*?)  +\S", receiver.__doc__)
        banners = re.findall(r"(?m)^# ={77}\n# ([A-Z][A-Za-z ]*): .+\n# ={77}$", self.source)
        self.assertEqual(listed, banners)
        self.assertEqual(listed, list(PARTS))

    @unittest.skipUnless(POSIX, "a script for sh")
    def test_run_sh_starts_what_it_is_told_from_any_folder(self):
        if not (HERE / "run.sh").exists():
            self.skipTest("run.sh is not here")
        environment = {**clean_environment(), "PYTHON": sys.executable}

        def run(*arguments, **changes):
            done = subprocess.run([str(HERE / "run.sh"), *arguments], stdin=subprocess.DEVNULL,
                                  capture_output=True,
                                  cwd=self.folder, timeout=WAIT, env={**environment, **changes})
            return done.returncode, done.stdout.decode(), done.stderr.decode()
        self.assertIn("examples:", run("help")[1])
        self.assertEqual(run("--version"), (0, f"webhook_server.py {receiver.__version__}\n", ""))
        self.assertIn("--seconds", run("bench", "--seconds", "x")[2])
        (self.folder / "an event.json").write_text(json.dumps(event()))
        self.assertEqual(run("check", "an event.json"), (0, "", ""))
        link = self.folder / "link"
        link.symlink_to(HERE / "run.sh")
        done = subprocess.run([str(link), "--version"], capture_output=True, timeout=WAIT, env=environment)
        self.assertEqual(done.stdout.decode(), f"webhook_server.py {receiver.__version__}\n")

    @unittest.skipUnless(POSIX, "a script for sh")
    def test_run_sh_says_what_is_wrong_with_a_python_and_takes_the_first_that_works(self):
        if not (HERE / "run.sh").exists():
            self.skipTest("run.sh is not here")
        tools = self.folder / "tools"
        tools.mkdir()
        for name in ("dirname", "readlink", "sh"):
            (tools / name).symlink_to(shutil.which(name))

        def python(name, lines):
            (tools / name).write_text(f"#!{shutil.which('sh')}\n{lines}\n")
            (tools / name).chmod(0o755)

        def run(**changes):
            done = subprocess.run([str(HERE / "run.sh"), "--version"], stdin=subprocess.DEVNULL,
                                  capture_output=True,
                                  timeout=WAIT, env={"PATH": str(tools), **changes})
            return done.returncode, done.stdout.decode(), done.stderr.decode()
        for words, name, lines in (
                ("python3 is not here; install Python 3.9 or newer; ", None, ""),
                ("python3 is no Python that works; install 3.9 or newer; ", "python3", "exit 1"),
                ("python3 is no Python that works; install 3.9 or newer; ", "python3", "exit 0"),
                ("python3 is no Python that works; install 3.9 or newer; ", "python3", 'echo "$@"'),
                ("python3 is Python 3.6; ", "python3", 'echo "is Python 3.6; install 3.9 or newer"')):
            with self.subTest(words):
                if name:
                    python(name, lines)
                code, out, err = run()
                self.assertEqual((code, out, err.count("\n")), (2, "", 1))
                self.assertTrue(err.startswith("run.sh: " + words), err)
        # The real question, asked of this Python with a module taken away
        (self.folder / "sqlite3.py").write_text("raise ImportError(name='sqlite3')")
        code, out, err = run(PYTHON=sys.executable, PYTHONPATH=str(self.folder))
        self.assertEqual((code, out), (2, ""))
        self.assertIn("lacks sqlite3 of its standard library; install all of it", err)
        python("python3.9", f'exec "{sys.executable}" "$@"')
        self.assertEqual(run(), (0, f"webhook_server.py {receiver.__version__}\n", ""))


# =============================================================================
# Running them: whole classes side by side, in as many processes as there are cores and one more.
# =============================================================================

def setUpModule():
    """A program that is started with nohup, or by a script in the background, inherits signals as ignored."""
    for name, default in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
            signal.signal(getattr(signal, name), default)


def chosen_tests(words):
    """{name of a class: its tests}, all of them or those whose id holds one of the words."""
    chosen = {}
    for name, kind in list(globals().items()):
        if isinstance(kind, type) and issubclass(kind, unittest.TestCase) and kind.__module__ == __name__:
            names = unittest.defaultTestLoader.getTestCaseNames(kind)
            names = [test for test in names if not words or any(word.lower() in f"{name}.{test}".lower() for word in words)]
            if names:
                chosen[name] = unittest.TestSuite(map(kind, names))
    return chosen


def work(words):
    """A worker: run the classes named on stdin, a line of JSON on stdout for each."""
    chosen, out = chosen_tests(words), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                           # what a test prints is no result
    setUpModule()
    for line in sys.stdin:
        text = io.StringIO()
        result = unittest.TextTestRunner(stream=text, verbosity=0).run(chosen[line.strip()])
        print(json.dumps({"ran": result.testsRun, "skipped": len(result.skipped), "failures": len(result.failures) +
                          len(result.unexpectedSuccesses), "errors": len(result.errors),
                          "text": "" if result.wasSuccessful() else text.getvalue().rpartition("-" * 70)[0]}),
              file=out, flush=True)


class Worker:
    """A process that runs classes one after the other. A class that kills its process counts as an error of its own."""

    def __init__(self, words):
        self._command = [sys.executable, str(HERE / "test_webhook_server.py"), "--worker", *words]
        self._process = None

    def run(self, name):
        if self._process is None:
            self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code, self._process = self._process.wait(), None
            return {"ran": 1, "skipped": 0, "failures": 0, "errors": 1, "text": f"ERROR: {name} ended its process: {code}\n"}
        return json.loads(line)

    def end(self):
        if self._process is not None:
            self._process.communicate()


def main():
    """All tests, or those whose name holds one of the words given; the summary is unittest's."""
    words = sys.argv[1:]
    if words[:1] == ["--worker"]:
        return work(words[1:])
    classes = sorted(chosen_tests(words).items(), key=lambda item: item[1].countTestCases())
    if not classes:
        sys.exit("no test has such a name")
    waiting, lock = [name for name, _ in classes], threading.Lock()
    totals, began = {"ran": 0, "skipped": 0, "failures": 0, "errors": 0}, time.monotonic()

    def serve():
        worker = Worker(words)
        while True:
            with lock:
                if not waiting:
                    break
                name = waiting.pop()        # those with the most tests first
            result = worker.run(name)
            with lock:
                print(result.pop("text") or f"{name}: {result['ran']} tests", file=sys.stderr, flush=True)
                for key in totals:
                    totals[key] += result[key]
        worker.end()

    threads = [threading.Thread(target=serve) for _ in range(min(len(classes), (os.cpu_count() or 1) + 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bad = totals["failures"] + totals["errors"]
    notes = ", ".join(f"{key}={totals[key]}" for key in ("failures", "errors", "skipped") if totals[key])
    print("-" * 70 + f"\nRan {totals['ran']} tests in {time.monotonic() - began:.3f}s\n\n"
          f"{'FAILED' if bad else 'OK'}{f' ({notes})' if notes else ''}", file=sys.stderr)
    return sys.exit(bool(bad))


if __name__ == "__main__":
    main()
