"""What settings of both stages have in common: values that are allowed, and others that are refused."""

import pytest

from autoencoder.common.config import UserError


def check_bounds(section, others, name, allowed, refused):
    """`section`, a dataclass, made with `others` and a value of `name`: takes those allowed, refuses the others."""
    for value in allowed:
        assert getattr(section(**others | {name: value}), name) == value
    for value in refused:
        with pytest.raises(UserError):
            section(**others | {name: value})
