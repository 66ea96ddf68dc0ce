import os
import signal
import threading

import pytest

from fbnas.training.interrupt import stop_on_signal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_sets_the_flag_and_the_second_interrupts(number: int) -> None:
    before = signal.getsignal(number)
    reached = []
    with pytest.raises(KeyboardInterrupt), stop_on_signal() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        reached.append("after the first signal")
        os.kill(os.getpid(), number)
        reached.append("after the second signal")
    assert reached == ["after the first signal"]
    assert signal.getsignal(number) is before


def test_a_signal_nobody_asked_about_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt), stop_on_signal():
        os.kill(os.getpid(), signal.SIGINT)


def test_works_outside_the_main_thread() -> None:
    seen = []

    def body() -> None:
        with stop_on_signal() as stop:
            seen.append(stop())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [False]
