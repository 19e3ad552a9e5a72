"""Fixtures for the tests of sweeps and recommendations."""

from collections.abc import Iterator

import pytest

from ablations.analysis import prediction_cache


@pytest.fixture(scope="session", autouse=True)
def own_prediction_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No prediction that this user has kept is read, and none is left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction_cache, "FOLDER", tmp_path_factory.mktemp("predictions"))
        yield
