"""The commands about reports in docs/."""

from reading import Reader, under


@under("docs/reports.md", "HTML report")
def test_report(reader: Reader, typed: list[list[str]]):
    reader.type(typed[0])
    assert (reader.fitted[-1] / "report.html").is_file()
    (reader.fitted[-1] / "report.html").unlink()
    assert "report.html" in reader.type(typed[1])
