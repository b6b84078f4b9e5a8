"""New members of PEFT's list of methods, without which a saved adapter cannot name its own."""

from typing import cast

from peft import PeftType


def add_peft_type(name: str) -> PeftType:
    """Add a member to `peft.PeftType`, an enumeration that offers no way to; one that is there already is returned.

    Args:
        name: In upper case, e.g. `"SMORA"`; the member's value too.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    # What the metaclass does for each member of a class body, in its order: it refuses to set one that is listed.
    type.__setattr__(PeftType, name, member)
    members = cast(dict[str, PeftType], PeftType._member_map_)
    PeftType._member_names_.append(name)
    members[name] = member
    PeftType._value2member_map_[name] = member
    return member


SMORA = add_peft_type("SMORA")
MOLA = add_peft_type("MOLA")
