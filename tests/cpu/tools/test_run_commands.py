"""Commands of pages, run in a copy of the checkout."""

import sys

from tools import run_commands
from tools.commands import ROOT, Code


def test_a_command_runs_in_a_copy_with_the_model(capfd):
    lines = [
        Code("page", "sh", 'python -c \'open("left", "w").write("MODEL")\''),
        Code("page", "sh", 'test "$(cat left)" = /the/model && test -s FILE && test -f README.md'),
        Code("page", "sh", f'test "$(command -v python)" -ef {sys.executable}'),
        Code("page", "sh", "make nothing"),
    ]
    assert list(run_commands.run_all(lines, "/the/model")) == []
    assert not (ROOT / "left").exists()
    said = capfd.readouterr().out.splitlines()
    assert said[-1] == "left out, makes an environment, or needs another one: make nothing"


def test_a_command_that_fails_says_what_it_said_last(monkeypatch):
    line = Code("page", "sh", "seq 20; exit 3")
    ((code, fault),) = run_commands.run_all([line], "M")
    assert code == line and fault.splitlines() == ["ended with 3:", *map(str, range(9, 21))]
    monkeypatch.setattr(run_commands, "SECONDS", 1)
    ((_, fault),) = run_commands.run_all([Code("page", "sh", "sleep 60")], "M")
    assert fault == "took longer than 1 s"


def test_a_server_runs_until_a_command_that_is_not_curl(monkeypatch):
    servers, alive = [], {}
    monkeypatch.setattr(run_commands, "is_ready", lambda server: servers.append(server) or True)
    monkeypatch.setattr(run_commands, "ended", lambda line, *_: alive.update({line: servers[-1].poll() is None}) or "")
    lines = ["exec sleep 60 # serve M", "curl x", "true", "exec sleep 60 # serve N", "curl y"]
    assert list(run_commands.run_all([Code("page", "sh", line) for line in lines], "M")) == []
    assert alive == {"curl x": True, "true": False, "curl y": True}
    assert all(server.poll() is not None for server in servers)


def test_a_server_that_ends_says_what_it_said_last():
    ((_, fault),) = run_commands.run_all([Code("page", "sh", "echo port in use; exit 1 # serve M")], "M")
    assert fault == "did not serve:\nport in use"
