from benchmarks.soak import log_errors

PREFIX = "(EngineCore pid=7) ERROR 01-02 03:04:05 [core.py:12]"
REQUESTS = """\
(APIServer pid=6) INFO 01-02 03:04:04 [async_llm.py:611] Request cmpl-1 aborted.
(APIServer pid=6) INFO:     127.0.0.1:5 - "POST /v1/completions HTTP/1.1" 200 OK
(APIServer pid=6) WARNING 01-02 03:04:04 [x.py:1] No error here
"""


def test_requests_that_clients_aborted_are_no_errors():
    assert log_errors(REQUESTS) == []


def test_a_message_of_several_lines_is_one_error():
    log = f"{REQUESTS}{PREFIX} failed\n{PREFIX} Traceback (most recent call last):\n{PREFIX} ValueError\n{REQUESTS}"
    assert log_errors(log) == [f"{PREFIX} failed"]
    assert log_errors(log + "Traceback (most recent call last):\n  File x\n" + log) == [
        f"{PREFIX} failed",
        "Traceback (most recent call last):",
        f"{PREFIX} failed",
    ]
