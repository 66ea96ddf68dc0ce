"""What the tests of commands measure, they measure once, however busy the machine is."""

from collections.abc import Iterator

import pytest

from fbnas.latency import calibration, devices


@pytest.fixture(scope="module", autouse=True)
def measured_once() -> Iterator[None]:
    """Under two workers it is always busy, and no result here is nearer to the truth for four."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (calibration, devices):
            patch.setattr(module, "QUIET_ATTEMPTS", 1)
        yield
