"""The page on memory says of well-known models what the plan chooses for them."""

import pytest
from tools.memory_table import BLOCK, DEVICES, PAGE, WORDS, rows, table

from photogram.cli.doctor import KNOWN_MODELS


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return rows(tmp_path_factory.mktemp("well-known"))


def test_the_table_of_the_page_is_what_the_plan_chooses(found):
    (block,) = BLOCK.finditer(PAGE.read_text())
    assert block[0] == f"{block[1]}{table(found)}\n{block[2]}", "run python -m tools.memory_table"


def test_the_networks_have_as_many_parameters_as_doctor_tells(found):
    billions = dict(KNOWN_MODELS)
    assert {name: count / 1e9 for name, (count, _) in found.items()} == {
        name: pytest.approx(billions[name], rel=0.005) for name in found
    }


def test_the_page_explains_every_word_of_the_table(found):
    page = PAGE.read_text()
    words = {word for _, cells in found.values() for cell in cells for word in cell.split(", ")}
    assert words <= {*WORDS.values(), "all", "does not fit"}
    assert all(f"- *{word}*:" in page for word in words)
    assert all(len(cells) == len(DEVICES) for _, cells in found.values())
