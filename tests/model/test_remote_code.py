"""A saved folder loads in a process that does not have this package, through every Auto class, and saves again."""

import sys

from scripts.compat import load, write


def test_a_process_without_the_package_loads_writes_trains_and_saves_every_class(tmp_path):
    write(tmp_path)
    done = load(sys.executable, tmp_path)
    assert done.stdout.endswith("all loaded, all equal\n"), done.stderr
