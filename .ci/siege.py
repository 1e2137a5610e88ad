#!/usr/bin/env python3
"""Besiege the receiver: is a good sender still served while others do their worst?

    python3 .ci/siege.py [FOLDER] [scenario ...] [--seconds N]

For each scenario the webhook_server.py of FOLDER (default: the folder above this file's) is started on a
temporary database, in a process of its own. Then three more processes work for some seconds: one good
sender, who posts a valid event about every 10 ms on one connection; one who asks for /health/live every 20
ms; and attackers, who come from another address (127.0.0.2) and have a lower priority, as they share the
processors with the server.

Prints a row for each scenario. Its times are those of single requests: who waits sends nothing meanwhile,
so "worst" tells more of one long stall than P99 does. Exit code 1 when an event answered 200 is not a row
in the database, or when the good sender got a 5xx; a target that is missed is only marked with "!". Needs
Linux (/proc) and Python 3.9.
"""
from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Optional

ATTACKERS = "127.0.0.2"
PATH = "/webhook/appointments"
TARGETS = {"P99 ms": 250.0, "RSS MiB": 300.0, "live P99": 100.0}
TITLES = ("scenario", "events", "P50 ms", "P99 ms", "worst", "not 200", "live P99", "live bad", "RSS MiB",
          "WAL MiB", "rows", "notes")
ROW = "{:<12} {:>6} {:>7} {:>8} {:>8} {:>7} {:>9} {:>8} {:>8} {:>8} {:>7}  {}"
PATIENCE = 30.0         # seconds for one answer, and for a stop
EVIL_PATTERNS = ("^(a+)+$", "^(a|aa)+$", "^a*a*a*$")
EMBEDDING = """\
import sys, threading
sys.path.insert(0, sys.argv[1])
from webhook_server import Config, WebhookServer
hang = lambda event: threading.Event().wait()
with WebhookServer(Config(port=0, database=sys.argv[2], log_file=sys.argv[3]), on_event=hang) as server:
    print("Listening on", server.url, flush=True)
    sys.stdin.read()
"""


class Plan(NamedTuple):
    """Where to send to, and when (time.monotonic(), which all processes share)."""
    port: int
    begin: float
    end: float


class Result(NamedTuple):
    """What senders saw: seconds of each answer, how many of each status, appointments answered 200."""
    times: list
    statuses: Counter
    stored: list


class Scenario(NamedTuple):
    """`attack(plan)` gives a Result; `rows(number)` makes the row of an event that is stored beforehand."""
    attack: Optional[Callable] = None
    rows: Optional[Callable] = None
    count: int = 0                      # of those rows
    log_to_pipe: bool = False           # that nobody reads
    schema_patterns: tuple = ()         # that notes must match
    embedding: bool = False
    alone: bytes = b""                  # a request that is timed before the siege begins


def connect(port: int, source: str) -> socket.socket:
    """A connection that comes from the address `source`."""
    connection = socket.create_connection(("127.0.0.1", port), PATIENCE, (source, 0))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class Client:
    """One connection, which is made anew when it is needed."""

    def __init__(self, port: int, source: str = "127.0.0.1") -> None:
        self._port, self._source = port, source
        self._socket: Any = None

    def ask(self, request: bytes) -> int:
        """The status of the answer, which is read whole; 0 if there is none."""
        try:
            if self._socket is None:
                self._socket = connect(self._port, self._source)
            self._socket.sendall(request)
            with contextlib.closing(HTTPResponse(self._socket)) as answer:
                answer.begin()
                while answer.read(65536):
                    pass
                if answer.will_close:
                    self.close()
                return answer.status
        except (OSError, HTTPException):
            self.close()
            return 0

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._socket is not None:
            self._socket.close()
        self._socket = None


# -- requests

def get(target: str, accept: str = "*/*") -> bytes:
    """A GET."""
    return f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: {accept}\r\n\r\n".encode()


def post(body: bytes) -> bytes:
    """A POST of an event."""
    head = (f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n")
    return head.encode() + body


def event(appointment_id: str, **members: Any) -> bytes:
    """The body of an event."""
    return json.dumps({"event_type": "scheduled", "appointment_id": appointment_id, "patient_id": "PAT-77",
                       "timestamp": "2025-01-10T14:00:00Z", **members}).encode()


# -- the good ones

def every(plan: Plan, seconds: float) -> Iterator[int]:
    """Count turns, `seconds` apart; those that were missed are not made up for."""
    due = plan.begin
    for turn in itertools.count():
        time.sleep(max(0.0, due - time.monotonic()))
        if time.monotonic() >= plan.end:
            return
        yield turn
        due = max(due + seconds, time.monotonic())


def asked(client: Client, request: bytes, result: Result, appointment_id: str = "") -> int:
    """Ask, and note in the result how that went; gives the status."""
    began = time.monotonic()
    status = client.ask(request)
    result.times.append(time.monotonic() - began)
    result.statuses[status] += 1
    if status == 200 and appointment_id:
        result.stored.append(appointment_id)
    return status


def post_good_events(plan: Plan) -> Result:
    """The good sender."""
    client, result = Client(plan.port), Result([], Counter(), [])
    for turn in every(plan, 0.010):
        appointment_id = f"GOOD-{turn:07}"
        asked(client, post(event(appointment_id)), result, appointment_id)
    return result


def ask_whether_live(plan: Plan) -> Result:
    """The probe."""
    client, result = Client(plan.port), Result([], Counter(), [])
    for _ in every(plan, 0.020):
        asked(client, get("/health/live"), result)
    return result


# -- the bad ones

def swarm(plan: Plan, senders: int, work: Callable) -> Result:
    """Run work(client, result, sender) over and over in so many threads; the sum of their results."""
    def run(sender: int) -> None:
        client = Client(plan.port, ATTACKERS)
        time.sleep(max(0.0, plan.begin - time.monotonic()))
        while time.monotonic() < plan.end:
            work(client, results[sender], sender)
        client.close()

    results = [Result([], Counter(), []) for _ in range(senders)]
    threads = [threading.Thread(target=run, args=(sender,)) for sender in range(senders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Result(sum((one.times for one in results), []), sum((one.statuses for one in results), Counter()),
                  sum((one.stored for one in results), []))


def repeat(plan: Plan, senders: int, requests: list) -> Result:
    """So many senders, who send the requests in turn."""
    turns = [itertools.count(sender) for sender in range(senders)]
    return swarm(plan, senders, lambda client, result, sender: (
        asked(client, requests[next(turns[sender]) % len(requests)], result)))


def attack_conflicts(plan: Plan) -> Result:
    """Retries of 600 KB of other content under a key that is stored."""
    Client(plan.port, ATTACKERS).ask(post(event("CLASH", notes="first")))
    return repeat(plan, 60, [post(event("CLASH", notes="x" * 600_000))])


def attack_new_conflicts(plan: Plan) -> Result:
    """The same, but each has a content of its own."""
    def work(client: Client, result: Result, sender: int) -> None:
        asked(client, post(event("CLASH", notes=f"{sender} {time.monotonic()} {filling}")), result)

    Client(plan.port, ATTACKERS).ask(post(event("CLASH", notes="first")))
    filling = "x" * 600_000
    return swarm(plan, 60, work)


def attack_take_nothing(plan: Plan) -> Result:
    """Readers who ask for big answers and take none; every 5 s they come anew."""
    def work(client: Client, result: Result, sender: int) -> None:
        with contextlib.suppress(OSError), socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.bind((ATTACKERS, 0))
            connection.connect(("127.0.0.1", plan.port))
            connection.sendall(requests[sender % len(requests)] * 16)
            result.statuses["left"] += 1
            time.sleep(max(0.0, min(5.0, plan.end - time.monotonic())))

    requests = [get(f"{PATH}?limit=1000"), get(PATH, "application/x-ndjson"), get(PATH, "text/csv")]
    return swarm(plan, 120, work)


def attack_bodies(plan: Plan) -> Result:
    """New valid events of 1 MiB: numbers, which take long to read."""
    def work(client: Client, result: Result, sender: int) -> None:
        own = f"BODY-{sender:04}-{next(turns):06}".encode()
        asked(client, post(body.replace(b"BODY-SENDER-TURN", own)), result)

    body = event("BODY-SENDER-TURN", extra=[0.5] * ((1024 * 1024 - 300) // len("0.5, ")))
    turns = itertools.count()
    return swarm(plan, 120, work)


def attack_pages(plan: Plan) -> Result:
    """Readers of the largest pages."""
    return repeat(plan, 120, [get(f"{PATH}?limit=1000&after={after}") for after in range(0, 49000, 7000)])


def attack_scans(plan: Plan) -> Result:
    """Reads through everything that find nothing."""
    filters = ("patient_id=NOBODY", "event_type=cancelled", "since=2900-01-01T00:00:00Z")
    return repeat(plan, 32, [get(f"{PATH}?{one}", accept) for one in filters
                             for accept in ("application/json", "application/x-ndjson")])


def attack_refused(plan: Plan) -> Result:
    """Events without a patient, 16 at once on each connection."""
    def run(client: Client, result: Result, sender: int) -> None:
        with contextlib.suppress(OSError), connect(plan.port, ATTACKERS) as connection:
            while time.monotonic() < plan.end:
                connection.sendall(request * 16)
                answers = piece = b"?"
                while piece and (answers.count(b"HTTP/1.1 ") < 16 or not answers.endswith(b"}")):
                    piece = connection.recv(65536)
                    answers += piece
                result.statuses.update(map(int, re.findall(rb"HTTP/1\.1 ([0-9]+)", answers)))
                if not piece:
                    return

    request = post(b'{"event_type": "scheduled", "appointment_id": "REFUSED", "timestamp": "2025-01-10"}')
    return swarm(plan, 8, run)


def attack_patterns(plan: Plan) -> Result:
    """Notes that nearly match: of 1 KB, and of lengths that may just be tried."""
    return repeat(plan, 16, [post(event("PATTERN", notes="a" * length + "!"))
                             for length in (1000, 19, 100, 30, 200)])


def attack_streams(plan: Plan) -> Result:
    """Readers of one appointment that has many events."""
    return repeat(plan, 8, [long_stream()])


def attack_callback(plan: Plan) -> Result:
    """64 senders of valid events."""
    def work(client: Client, result: Result, sender: int) -> None:
        appointment_id = f"CROWD-{sender}-{next(turns)}"
        asked(client, post(event(appointment_id)), result, appointment_id)

    turns = itertools.count()
    return swarm(plan, 64, work)


def long_stream() -> bytes:
    """The request for all events of one appointment."""
    return get(f"{PATH}?appointment_id=LONG", "application/x-ndjson")


# -- the server

def row_of(appointment_id: str, timestamp: str) -> tuple:
    """A row of the table."""
    payload = event(appointment_id, timestamp=timestamp).decode()
    return ("scheduled", appointment_id, "PAT-77", timestamp, None, timestamp, "127.0.0.1", payload)


def many_appointments(number: int) -> tuple:
    """Each event is of an appointment of its own."""
    return row_of(f"OLD-{number:07}", "2025-01-10T14:00:00Z")


def one_appointment(number: int) -> tuple:
    """Each event is of the same appointment."""
    return row_of("LONG", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(1_700_000_000 + number)))


SCENARIOS = {
    "none": Scenario(),
    "conflicts": Scenario(attack_conflicts),
    "newconflicts": Scenario(attack_new_conflicts),
    "takenothing": Scenario(attack_take_nothing, many_appointments, 50_000),
    "bodies": Scenario(attack_bodies),
    "pages": Scenario(attack_pages, many_appointments, 50_000),
    "scans": Scenario(attack_scans, many_appointments, 200_000),
    "refused": Scenario(attack_refused, log_to_pipe=True),
    "regex": Scenario(attack_patterns, schema_patterns=EVIL_PATTERNS),
    "stream": Scenario(attack_streams, one_appointment, 100_000, alone=long_stream()),
    "callback": Scenario(attack_callback, embedding=True),
}


class Server:
    """A server in a process of its own, on a database in `home`."""

    def __init__(self, folder: Path, home: Path, scenario: Scenario) -> None:
        self.database, self.log, self._scenario = home / "events.db", home / "server.log", scenario
        program = str(folder / "webhook_server.py")
        command = [sys.executable, program, "--port", "0", "--database", str(self.database)]
        if scenario.embedding:
            command = [sys.executable, "-c", EMBEDDING, str(folder), str(self.database), str(self.log)]
        elif not scenario.log_to_pipe:
            command += ["--log-file", str(self.log)]
        if scenario.schema_patterns:
            schema = json.loads((folder / "schema.json").read_text())
            schema["allOf"] = [{"properties": {"notes": {"pattern": pattern}}}
                               for pattern in scenario.schema_patterns]
            (home / "schema.json").write_text(json.dumps(schema))
            command += ["--schema", str(home / "schema.json")]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WEBHOOK_")}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
            stderr=subprocess.PIPE if scenario.log_to_pipe else None)
        line = self._process.stdout.readline().decode()
        if not line:
            raise SystemExit("siege: the server did not start")
        self.port = int(line.rpartition(":")[2])

    def peak_memory(self) -> float:
        """MiB that it had resident at most."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024

    def wal_size(self) -> float:
        """MiB of the -wal now."""
        with contextlib.suppress(OSError):
            return os.stat(f"{self.database}-wal").st_size / 2 ** 20
        return 0.0

    def health(self) -> str:
        """Status and body of /health."""
        with contextlib.closing(HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)) as connection:
            connection.request("GET", "/health")
            answer = connection.getresponse()
            checks = json.load(answer)["checks"].values()
            failing = [check["message"] for check in checks if "message" in check]
            return f"/health {answer.status} {failing or ''}".strip()

    def stop(self) -> str:
        """Stop it; tells how that went."""
        began = time.monotonic()
        self._process.stdin.close()
        if not self._scenario.embedding:
            self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
        return f"stopped in {time.monotonic() - began:.1f} s" + (f" WITH CODE {code}" if code else "")


def prepare(folder: Path, home: Path, scenario: Scenario) -> None:
    """Fill the database."""
    server = Server(folder, home, scenario)
    server.stop()
    with contextlib.closing(sqlite3.connect(server.database)) as database, database:
        database.executemany(
            "INSERT INTO appointment_events (event_type, appointment_id, patient_id, timestamp, notes, "
            "received_at, client, payload) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            map(scenario.rows, range(scenario.count)))


# -- the siege

def besiege(server: Server, scenario: Scenario, seconds: float) -> tuple:
    """(results of the good sender, the probe and the attackers, largest -wal in MiB)."""
    begin = time.monotonic() + 1.0
    plan, largest = Plan(server.port, begin, begin + seconds), 0.0
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, spawn) as good, ProcessPoolExecutor(1, spawn, os.nice, (10,)) as bad:
        work = [good.submit(post_good_events, plan), good.submit(ask_whether_live, plan)]
        if scenario.attack:
            work.append(bad.submit(scenario.attack, plan))
        while not all(one.done() for one in work):
            largest = max(largest, server.wal_size())
            time.sleep(0.05)
        results = [one.result() for one in work]
    return (*results, Result([], Counter(), []))[:3], largest


def percentile(times: list, part: float) -> float:
    """Milliseconds within which that part of the answers came."""
    ordered = sorted(times) or [0.0]
    return ordered[min(int(len(ordered) * part), len(ordered) - 1)] * 1000


def missing_rows(database: Path, stored: list) -> int:
    """How many of these appointments have no row."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        found = {row[0] for row in connection.execute("SELECT appointment_id FROM appointment_events")}
    return len(set(stored) - found)


def errors_of(log: Path) -> str:
    """How many errors the log has, with the first."""
    lines = [line for file in sorted(log.parent.glob(log.name + "*"))
             for line in file.read_text(errors="replace").splitlines() if " - ERROR - " in line]
    return f"{len(lines)} ERRORs: {lines[0][:150]}" if lines else ""


def run_scenario(folder: Path, name: str, seconds: float) -> bool:
    """Print the row of a scenario; False if an event is missing or the good sender got a 5xx."""
    scenario, notes = SCENARIOS[name], []
    with tempfile.TemporaryDirectory(prefix="webhook-siege-") as home:
        if scenario.rows:
            prepare(folder, Path(home), scenario)
        server = Server(folder, Path(home), scenario)
        try:
            if scenario.alone:
                began = time.monotonic()
                status = Client(server.port).ask(scenario.alone)
                notes.append(f"alone: {status} in {time.monotonic() - began:.2f} s")
            (good, live, bad), wal = besiege(server, scenario, seconds)
            answers = sorted(f"{status or 'none'}:{count}" for status, count in bad.statuses.items())
            notes += [server.health(), f"attackers {' '.join(answers) or 'none'}"]
            if bad.stored:
                notes.append(f"their P99 {percentile(bad.times, 0.99):.0f} ms")
            memory = server.peak_memory()
        finally:
            notes.append(server.stop())
        missing = missing_rows(server.database, good.stored + bad.stored)
        notes.append(errors_of(server.log))
    print_row(name, good, live, memory, wal, f"{missing} LOST" if missing else "all", notes)
    return not missing and not any(status >= 500 for status in good.statuses)


def print_row(name: str, good: Result, live: Result, memory: float, wal: float, rows: str,
              notes: list) -> None:
    """Print it; what misses its target has a "!"."""
    bad_answers = {status or "none": count for status, count in good.statuses.items() if status != 200}
    if bad_answers:
        notes.insert(0, f"good sender: {bad_answers}")
    measured = {"P99 ms": percentile(good.times, 0.99), "RSS MiB": memory,
                "live P99": percentile(live.times, 0.99)}
    shown = {title: f"{value:.1f}{'!' if value >= TARGETS[title] else ''}"
             for title, value in measured.items()}
    print(ROW.format(name, len(good.times), f"{percentile(good.times, 0.5):.1f}", shown["P99 ms"],
                     f"{percentile(good.times, 1.0):.1f}", sum(bad_answers.values()), shown["live P99"],
                     sum(live.statuses.values()) - live.statuses[200], shown["RSS MiB"], f"{wal:.1f}", rows,
                     "; ".join(filter(None, notes))), flush=True)


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description="Is a good sender still served while others do their worst?")
    parser.add_argument("words", nargs="*", metavar="FOLDER or scenario", help=", ".join(SCENARIOS))
    parser.add_argument("--seconds", type=float, default=8.0, help="time of each (default: %(default)s)")
    options = parser.parse_args()
    folders = [word for word in options.words if word not in SCENARIOS]
    if len(folders) > 1 or not all((Path(folder) / "webhook_server.py").is_file() for folder in folders):
        parser.error(f"{folders[-1]} is neither a scenario nor a folder with a webhook_server.py")
    folder = Path(folders[0]) if folders else Path(__file__).resolve().parent.parent
    names = [word for word in options.words if word in SCENARIOS] or list(SCENARIOS)
    targets = ", ".join(f"{title} < {most:g}" for title, most in TARGETS.items())
    print(f"Targets (what misses one has a !): {targets}")
    print(ROW.format(*TITLES), flush=True)
    fine = [run_scenario(folder.resolve(), name, options.seconds) for name in names]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
