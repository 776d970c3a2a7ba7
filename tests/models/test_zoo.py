"""Every family has a model that the properties run on."""

from __future__ import annotations

import zoo

from yopo.models.registry import FAMILIES


def test_every_family_is_in_the_zoo() -> None:
    found = {zoo.build(entry).family.name for entry in zoo.all_entries()}
    assert found == {family.name for family in FAMILIES}
