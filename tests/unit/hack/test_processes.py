"""Processes of ours: recognised after the caller has gone, never mistaken for somebody else's."""

import json
import os
import subprocess
import sys
from pathlib import Path

from local_cluster import processes
from local_cluster.settings import Settings


def test_a_process_is_ours_only_with_its_start_time_and_boot(settings: Settings) -> None:
    folder = settings.run / "pids"
    folder.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        ticks = processes.start_ticks(child.pid)
        assert ticks is not None
        written = {"pid": child.pid, "start_ticks": ticks, "boot_id": processes.boot_id(), "inputs": "x"}
        cases: list[tuple[dict[str, object], bool]] = [
            ({}, True),
            ({"start_ticks": ticks + 1}, False),
            ({"boot_id": "earlier"}, False),
        ]
        for change, ours in cases:
            (folder / "etcd.json").write_text(json.dumps({**written, **change}))
            assert (processes.find_running(settings, "etcd") is not None) is ours
        child.communicate(b"\n")
    (folder / "etcd.json").write_text(json.dumps(written))
    assert processes.find_running(settings, "etcd") is None


def test_a_record_cut_short_is_no_process(settings: Settings) -> None:
    (settings.run / "pids").mkdir(parents=True)
    (settings.run / "pids" / "etcd.json").write_text('{"pid": 1')
    assert processes.find_running(settings, "etcd") is None
    assert processes.start_ticks(os.getpid()) is not None


def test_a_changed_file_or_command_changes_the_inputs(tmp_path: Path) -> None:
    file = tmp_path / "config"
    file.write_text("a")
    first = processes.inputs_digest(["etcd"], {}, [file])
    assert processes.inputs_digest(["etcd"], {}, [file]) == first
    file.write_text("b")
    assert len({first, processes.inputs_digest(["etcd"], {}, [file]), processes.inputs_digest(["x"], {}, [])}) == 3
