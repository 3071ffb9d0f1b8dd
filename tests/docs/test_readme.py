"""The README: one screen, and figures that are those of the results."""

import readme_table
from documents import ROOT

README = (ROOT / "README.md").read_text()


def test_it_has_at_most_120_lines():
    assert len(README.splitlines()) <= 120


def test_its_table_is_that_of_the_results():
    found = readme_table.PLACE.search(README)[0].splitlines()[1:-1]
    assert found == readme_table.markdown(list(readme_table.rows())).splitlines()
    assert len(found) == 2 + len(readme_table.MODELS) * len(readme_table.SCHEMES)


def test_cuda_is_said_to_be_untested_above_its_commands():
    section = README.partition("## Your own model, on a GPU")[2]
    assert section.index("CUDA untested") < section.index("```bash")
