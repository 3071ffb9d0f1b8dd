import os

import pytest
from maca_serve.doctor.forking import in_a_fork


def test_what_changes_there_does_not_change_here():
    here = []

    def change():
        here.append(1)
        return here, os.getpid()

    there, pid = in_a_fork(change)
    assert there == [1] and here == [] and pid != os.getpid()


def test_an_error_is_raised_here_and_shown_there(capfd):
    def fail():
        raise KeyError("the culprit")

    with pytest.raises(ChildProcessError, match="exit code 1"):
        in_a_fork(fail)
    assert "the culprit" in capfd.readouterr().err


def test_a_process_that_dies_is_an_error():
    with pytest.raises(ChildProcessError, match="exit code 7"):
        in_a_fork(lambda: os._exit(7))
