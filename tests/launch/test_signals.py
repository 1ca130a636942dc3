import os
import signal

import pytest

from swamla_titan.launch.signals import STOP_SIGNALS, StopRequest


@pytest.fixture
def stop():
    request = StopRequest()
    yield request
    request.forget()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_while_there_is_nothing_to_save_a_signal_ends_the_process_with_75(stop, number):
    with pytest.raises(SystemExit) as ended:
        os.kill(os.getpid(), number)
    assert ended.value.code == 75


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_later_the_first_is_remembered_and_the_second_would_end_at_once(stop, number):
    stop.finish_step_first = True
    os.kill(os.getpid(), number)
    assert stop.received == number
    assert all(signal.getsignal(each) == signal.SIG_DFL for each in STOP_SIGNALS)


def test_the_handlers_from_before_come_back():
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    StopRequest().forget()
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before
