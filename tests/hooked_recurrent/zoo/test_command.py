import pytest

from hooked_recurrent.zoo.command import run_command


def test_bad_input_ends_in_one_sentence(monkeypatch, capsys):
    def command(number: int) -> None:
        raise ValueError(f"got {number}")

    monkeypatch.setattr("sys.argv", ["command", "3"])
    with pytest.raises(SystemExit) as caught:
        run_command(command)
    assert caught.value.code == 1 and capsys.readouterr().err == "error: got 3\n"


def test_a_fault_of_ours_keeps_its_frames(monkeypatch):
    def command() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.raises(ZeroDivisionError):
        run_command(command)
