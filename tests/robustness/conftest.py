import warnings
from typing import NamedTuple

import pytest


class Result(NamedTuple):
    """What a command line ended with."""

    code: int
    out: str
    errors: str

    def refused(self, *says):
        """Check that it was refused in one line that has these words."""
        lines = self.errors.strip().splitlines()
        assert self.code == 2, (self.code, self.errors)
        assert len(lines) == 1 and lines[0].startswith("exitkit: "), self.errors
        for words in says:
            assert words in lines[0], lines[0]


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    """Run a command line in an empty folder, in this process; anything but an orderly end fails the test."""
    from exitkit.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as end, warnings.catch_warnings():
            main(list(arguments))
        captured = capsys.readouterr()
        return Result(end.value.code, captured.out, captured.err)

    return run
