"""The zoo: every network × rule has the definition's gradients and no weight transport, or is refused in words."""

import pytest
from entries import RULES
from trials import ENTRIES, missing, outcome

pytestmark = [pytest.mark.unchecked, pytest.mark.filterwarnings("ignore")]  # warnings are the libraries'


def trials():
    """Every network × rule; two rules a network, in turn, are fast, and the rest slow."""
    for number, entry in enumerate(ENTRIES):
        for place, rule in enumerate(RULES):
            fast = not entry.slow and place in (number % len(RULES), (number + 2) % len(RULES))
            yield pytest.param(entry, rule, id=f"{entry.name}-{rule}", marks=[] if fast else [pytest.mark.slow])


@pytest.mark.parametrize(("entry", "rule"), list(trials()))
def test_the_definition_or_a_refusal_in_words(entry, rule):
    if missing(entry):
        pytest.skip(f"{entry.family} is not installed")
    words = entry.refused.get(rule)
    result, why = outcome(entry, rule)
    assert result == ("agrees" if words is None else "refused"), why
    assert words is None or words in why


def test_names_are_unique():
    names = [(entry.family, entry.name) for entry in ENTRIES]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)
