"""Shared by the tests of hooked_recurrent."""

import jaxtyping
import pytest


@pytest.fixture
def as_users_run():
    """Switch the shape checks of the test run off: bad input then meets the library's own errors, as it does for users."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
