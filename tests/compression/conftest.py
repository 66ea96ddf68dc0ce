"""One small network, trained on digits, for every test of this folder."""

import pytest
from digits_network import FOLDER, Trained, accuracy

from fbnas.space import load_network
from fbnas.training.data import load_data


@pytest.fixture(scope="session")
def trained() -> Trained:
    """The shipped weights: trained on another machine they would be others, and margins too."""
    data = load_data("digits")
    network, card = load_network(FOLDER)
    assert accuracy(network, data) > 0.92
    return Trained(network.eval(), card, data)
