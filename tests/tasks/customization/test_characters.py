"""Class tables and folder names."""

import pytest
import torch

from tasks.customization.characters import CHARACTERS, MERGED_CHARACTERS, folder_name, label_of_folder, merge


def test_merged_classes_are_those_of_bymerge() -> None:
    merged = merge(torch.arange(62))
    assert merged.unique().tolist() == list(range(47))
    for character in CHARACTERS:
        name = MERGED_CHARACTERS[merged[CHARACTERS.index(character)]]
        assert name == (character.upper() if character in "cijklmopsuvwxyz" else character)


def test_folder_names_survive_file_systems_without_case() -> None:
    names = [folder_name(label) for label in range(62)]
    assert len({name.lower() for name in names}) == 62
    assert [label_of_folder(name) for name in names] == list(range(62))


@pytest.mark.parametrize("name", ["a", "lower_A", "digit_10", "upper_a", "digit_٣"])
def test_other_folder_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="Allowed: digit_0"):
        label_of_folder(name)
