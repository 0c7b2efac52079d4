"""Pytest plugin of `mutants.py`: records the lines that each test executes, and enforces time limits."""

import json
import os
import signal
import time
from collections import defaultdict
from pathlib import Path

import pytest

RECORD = os.environ.get("MUTANTS_RECORD")
LIMITS = os.environ.get("MUTANTS_LIMITS")
SECONDS = json.loads(Path(LIMITS).read_text()) if LIMITS else {}

tests: dict[str, dict] = defaultdict(lambda: {"seconds": 0.0, "passed": True, "fixtures": [], "setup": {}})
setup: dict[str, float] = {}  # duration of each shared fixture, in seconds


def switch_context(name: str) -> None:
    if RECORD:
        import coverage

        coverage.Coverage.current().switch_context(name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    switch_context(item.nodeid)
    item.user_properties.append(("fixtures", [*item.fixturenames]))
    if LIMITS:
        # SIGALRM without a handler ends the process, so an endless loop of a mutant counts as a failure.
        signal.setitimer(signal.ITIMER_REAL, SECONDS.get(item.nodeid, 60))
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    """Attribute the lines that a shared fixture executes to every test that uses it, not only to the first."""
    if fixturedef.scope == "function":
        return (yield)
    switch_context(f"fixture {fixturedef.argname}")
    began = time.monotonic()
    try:
        return (yield)
    finally:
        setup[fixturedef.argname] = time.monotonic() - began
        switch_context(request._pyfuncitem.nodeid if hasattr(request, "_pyfuncitem") else "")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    if call.when == "teardown":
        item.user_properties.append(("setup", dict(setup)))
    return (yield)


def pytest_runtest_logreport(report):
    test = tests[report.nodeid]
    test["seconds"] += report.duration
    test["passed"] &= not report.failed
    test |= dict(report.user_properties)


def pytest_sessionfinish(session):
    if RECORD and not os.environ.get("PYTEST_XDIST_WORKER"):
        Path(RECORD).write_text(json.dumps([{"id": name, **test} for name, test in tests.items()]))
