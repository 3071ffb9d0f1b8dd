import inspect

from maca_llmc.signatures import same_parameters_as


def original(one: int, *, other: str = "a") -> list[int]:
    return [one]


@same_parameters_as(original)
def shown(one: int, **options) -> str:
    return f"{one} {options}"


def test_parameters_are_those_of_the_other_and_the_result_its_own():
    assert str(inspect.signature(shown)) == "(one: int, *, other: str = 'a') -> str"
    assert shown(1, other="b") == "1 {'other': 'b'}"
