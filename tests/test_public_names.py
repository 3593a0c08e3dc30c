import pytest

import fastsched as fs


@pytest.mark.parametrize(
    ("misspelt", "meant"), [("optimal_schedul", "optimal_schedule"), ("Schedul", "Schedule"), ("mesure", "measure")]
)
def test_misspelt_names_suggest(misspelt, meant):
    with pytest.raises(AttributeError, match=f"no attribute '{misspelt}'; did you mean '{meant}'"):
        getattr(fs, misspelt)


def test_names_that_are_like_none_suggest_nothing():
    with pytest.raises(AttributeError, match=r"no attribute 'xyz'$"):
        fs.xyz  # noqa: B018 - the access is what is tested
