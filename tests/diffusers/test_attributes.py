import pytest

pytest.importorskip("diffusers", reason="needs the extra fastsched[diffusers]")

from fastsched.diffusers.attributes import attributes_set


class Owner:
    of_class = "class"

    def __init__(self):
        self.own = "own"


def changed_and_failing(owner):
    with attributes_set(owner, own=1, of_class=2, new=3):
        assert (owner.own, owner.of_class, owner.new) == (1, 2, 3)
        owner.own = 4  # as a pipeline may do
        del owner.new
        raise KeyError


def test_attributes_are_as_before_also_after_an_error():
    owner = Owner()
    before = dict(vars(owner))
    with pytest.raises(KeyError):
        changed_and_failing(owner)
    assert vars(owner) == before
    assert owner.of_class == "class"


def test_properties_are_set_and_restored():
    class Inner:
        value = 1

    class Outer:
        inner = Inner()
        value = property(lambda self: self.inner.value, lambda self, new: setattr(self.inner, "value", new))

    outer = Outer()
    with attributes_set(outer, value=2):
        assert outer.inner.value == 2
    assert outer.inner.value == 1


def test_those_of_a_class_too():
    with attributes_set(Owner, of_class="other", new=1):
        assert Owner().of_class == "other"
    assert Owner.of_class == "class"
    assert not hasattr(Owner, "new")
