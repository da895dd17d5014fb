import pytest

from lm_lightning.cli import saved_help


def test_help_is_saved_until_the_code_changes(tmp_path, monkeypatch, capsys):
    """A change of the code or of the terminal makes a new one, and an error is not saved."""
    made = []

    def make():
        made.append(1)
        print(f"help number {len(made)}")
        raise SystemExit(0)

    def printed():
        try:
            saved_help.print_help("fit", make)
        except SystemExit as end:
            assert not end.code
        return capsys.readouterr().out

    monkeypatch.setattr(saved_help, "FOLDER", str(tmp_path / "help"))
    monkeypatch.setenv("COLUMNS", "80")
    assert [printed(), printed()] == ["help number 1\n", "help number 1\n"]
    monkeypatch.setattr(saved_help, "code", lambda: iter(["changed.py 1 2"]))
    assert [printed(), printed()] == ["help number 2\n", "help number 2\n"]
    monkeypatch.setenv("COLUMNS", "60")
    assert printed() == "help number 3\n"

    def fail():
        raise SystemExit(2)

    monkeypatch.setattr(saved_help, "code", lambda: iter(["changed.py 3 4"]))
    with pytest.raises(SystemExit):
        saved_help.print_help("fit", fail)
    monkeypatch.setenv("COLUMNS", "80")
    assert printed() == "help number 4\n"
