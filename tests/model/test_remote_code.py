"""Remote code: a model folder loads through every Auto class in a process without this package."""

import sys

from scripts.compat import run_load_elsewhere, save_reference


def test_every_auto_class_loads_generates_trains_and_saves_without_the_package(tmp_path):
    save_reference(tmp_path)
    process = run_load_elsewhere(sys.executable, tmp_path)
    assert process.stdout.endswith("every Auto class loaded, all outputs equal\n"), process.stderr
