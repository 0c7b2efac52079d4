"""`make cluster`: the rows run in the longer tests; no cell claims more than was run."""

import json
import shutil

import cluster
import pytest


@pytest.mark.slow
def test_the_columns_that_are_not_requested_are_not_run(tmp_path, capsys):
    argv = ["--row", "process 1", "--column", "merge", "--steps", "4", "--output", str(tmp_path / "table.json")]
    assert cluster.main(argv) == 0
    (row,) = json.loads((tmp_path / "table.json").read_text())["rows"].values()
    assert (row.pop("merge"), row.pop("losses equal")) == ("whole", "reference")
    assert set(row.values()) == {"not run"}
    assert "| process 1" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_and_the_other_columns_are_not_run(tmp_path, capsys):
    argv = ["--row", "DDP 2", "--column", "losses equal", "--steps", "20", "--output", str(tmp_path / "table.json")]
    assert cluster.main(argv) == 0
    (row,) = json.loads((tmp_path / "table.json").read_text())["rows"].values()
    losses = row.pop("losses equal")
    assert losses == "equal" or 0 < float(losses.removeprefix("within ")) <= 1e-5
    assert set(row.values()) == {"not run"}
    assert f"| DDP 2 | {losses}" in capsys.readouterr().out


def test_the_cells_of_an_unsupported_engine_state_the_reason(tmp_path):
    engine = cluster.Engine("FSDP2", 2, unsupported="not supported on CPU")
    cells = cluster.examine(engine, tmp_path, cluster.COLUMNS, 20)
    assert cells == dict.fromkeys(cluster.COLUMNS, "not supported on CPU")


def test_two_hosts_without_the_command_ip_are_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    cells = cluster.examine(cluster.Engine("DDP", 2, hosts=2), tmp_path, cluster.COLUMNS, 20)
    assert cells == dict.fromkeys(cluster.COLUMNS, "not run: needs the command ip")


def write_log(run, losses: list[float]) -> None:
    run.mkdir()
    rows = [{"step": step, "loss": loss, "grad_norm": 1.0, "learning_rate": 0.1} for step, loss in enumerate(losses, 1)]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_difference_above_the_tolerance_fails(tmp_path):
    write_log(tmp_path / "one", [5.0, 4.0])
    write_log(tmp_path / "close", [5.0, 4.000009])
    write_log(tmp_path / "far", [5.0, 4.00002])
    write_log(tmp_path / "infinite", [5.0, float("nan")])
    assert cluster.difference(tmp_path / "one", tmp_path / "one") == "equal"
    assert cluster.difference(tmp_path / "close", tmp_path / "one") == "within 9.0e-06"
    for name in ("far", "infinite"):
        with pytest.raises(cluster.Failed):
            cluster.difference(tmp_path / name, tmp_path / "one")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ip") is None, reason="needs the command ip")
def test_two_network_namespaces_give_the_losses_of_one_process(tmp_path):
    file = str(tmp_path / "table.json")
    argv = ["--row", "DDP 2, 2 hosts", "--column", "losses equal", "--steps", "20", "--output", file]
    code = cluster.main(argv)
    (row,) = json.loads((tmp_path / "table.json").read_text())["rows"].values()
    if "cannot be created" in row["losses equal"]:
        pytest.skip(row["losses equal"])
    assert code == 0
    assert row["losses equal"] == "equal" or float(row["losses equal"].removeprefix("within ")) <= 1e-5
