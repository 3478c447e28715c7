"""The client of an OpenAI-compatible endpoint, against a real HTTP server on loopback."""

from __future__ import annotations

import json
import pickle
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest

from openrlhf_gopo.config import LlmConfig
from openrlhf_gopo.endpoint import MAX_BODY, Answer, Endpoint
from openrlhf_gopo.endpoint import post as module
from openrlhf_gopo.errors import ConfigError, DialogueError

from ..http_server import Reply, completion

KEY = "sk-test-0123456789abcdef"
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def ask(endpoint: Endpoint, seed: int = 1, seconds: float = 10.0) -> Answer:
    return endpoint.chat(MESSAGES, seed, time.monotonic() + seconds)


def open_endpoint(server, **settings) -> Endpoint:
    server.answer = lambda body: f"answer {len(server.bodies)}"
    return Endpoint("--gopo.user llm", "small", server.url, LlmConfig(**settings))


# ------------------------------------------------------------------------------------------------------- requests


def test_a_request_holds_what_it_should(server, monkeypatch):
    endpoint = open_endpoint(server, temperature=0.3, max_new_tokens=9, extra_body='{"top_p": 0.5, "max_tokens": null}')
    assert ask(endpoint, seed=5) == Answer("answer 1", cut=False)
    expected = {"model": "small", "messages": MESSAGES, "seed": 5, "temperature": 0.3, "top_p": 0.5}
    assert server.bodies == [expected]
    assert "authorization" not in server.headers[0]
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    ask(endpoint, seed=6)
    assert server.headers[1]["authorization"] == f"Bearer {KEY}"
    ask(open_endpoint(server, max_new_tokens=9))
    assert server.bodies[2]["max_tokens"] == 9


def test_a_text_cut_at_the_cap_says_so(server):
    server.script.append(Reply(body=completion("I would like to", finish="length")))
    assert ask(open_endpoint(server)) == Answer("I would like to", cut=True)


def test_tokens_and_requests_are_counted(server):
    endpoint = open_endpoint(server)
    server.script.extend([Reply(503), Reply(body=completion("a", prompt_tokens=20, completion_tokens=4))])
    ask(endpoint)
    ask(endpoint)
    usage = endpoint.usage
    assert (usage.requests, usage.prompt_tokens, usage.completion_tokens, usage.cached) == (2, 20, 4, 1)
    assert usage.tokens == 24


# -------------------------------------------------------------------------------------------------------- retries


def test_busy_and_broken_servers_are_asked_again(server):
    server.script.extend([Reply(429, "slow down"), Reply(500, "oops"), Reply(502)])
    assert ask(open_endpoint(server)).text == "answer 4"


def test_waits_grow_between_tries(server, monkeypatch):
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.1)
    monkeypatch.setattr("random.uniform", lambda low, high: high)  # tenacity's jitter: always the longest
    server.script.extend([Reply(500)] * 3)
    ask(open_endpoint(server))
    waits = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    for wait, least in zip(waits, (0.1, 0.2, 0.4), strict=True):
        assert least <= wait < least + 5.0


def test_retry_after_is_kept(server):
    server.script.append(Reply(429, headers={"Retry-After": "1"}))
    ask(open_endpoint(server))
    assert 1.0 <= server.times[1] - server.times[0] < 10.0
    server.script.append(Reply(429, headers={"Retry-After": "60"}))
    started = time.monotonic()
    with pytest.raises(DialogueError, match=r"429.* after 1 try;"):
        ask(open_endpoint(server), seconds=40.0)  # no use waiting for it
    assert time.monotonic() - started < 20.0


def test_tries_come_to_an_end(server):
    server.script.extend([Reply(500, "still broken")] * 9)
    with pytest.raises(
        DialogueError, match=r"llm:small@http.*status 500: 'still broken' after 3 tries; .*llm\.attempts"
    ):
        ask(open_endpoint(server, attempts=3))
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        (400, r"--gopo\.llm\.extra_body"),
        (401, r"\$?OPENAI_API_KEY \(--gopo\.llm\.api_key_env\)"),
        (403, "OPENAI_API_KEY may not"),
        (404, "mostly in /v1"),
        (408, "no luck"),
        (422, "no luck"),
        (302, "no luck"),
    ],
)
def test_what_will_not_change_is_not_asked_again(server, status, hint):
    server.script.extend([Reply(status, "no luck", {"Location": "http://127.0.0.1:9/"})] * 3)
    with pytest.raises(DialogueError, match=rf"status {status}: 'no luck'.*{hint}|status {status}: '{hint}'"):
        ask(open_endpoint(server))
    assert len(server.bodies) == 1


def test_a_slow_server_is_asked_again_then_given_up(server):
    server.script.extend([Reply(delay=1.0), Reply(body=completion("at last"))])
    assert ask(open_endpoint(server, timeout=0.3)).text == "at last"
    server.script.extend([Reply(delay=1.5)] * 9)
    started = time.monotonic()
    with pytest.raises(DialogueError, match=r"ReadTimeout .* after [234] tries; --gopo\.llm\.timeout"):
        ask(open_endpoint(server, timeout=0.3, attempts=99), seconds=1.0)
    assert time.monotonic() - started < 15.0  # 99 tries would take 30


def test_a_dripping_server_does_not_hold_the_line(server):
    server.script.append(Reply(body=completion("x" * 2000), drip=0.02))  # each byte is in time
    started = time.monotonic()
    with pytest.raises(DialogueError, match=r"no whole answer in 0\.3 s after 1 try; --gopo\.llm\.timeout"):
        ask(open_endpoint(server, timeout=0.3, attempts=1))
    assert time.monotonic() - started < 20.0  # the whole answer takes 40


def test_nobody_there(server):
    endpoint = Endpoint("--gopo.user llm", "small", "http://127.0.0.1:9/v1", LlmConfig(attempts=2))
    with pytest.raises(DialogueError, match=r"llm:small@http://127\.0\.0\.1:9/v1: ConnectError .* after 2 tries"):
        ask(endpoint)


# --------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("body", ["", "<html>", "[]", "{}", '{"choices": []}', '{"choices": [{"message": "x"}]}'])
def test_what_is_no_chat_completion_is_refused(server, body):
    server.script.append(Reply(body=body))
    with pytest.raises(DialogueError, match="not a chat completion"):
        ask(open_endpoint(server))


def test_an_answer_without_text_is_refused(server):
    server.script.append(Reply(body=completion(None)))
    with pytest.raises(DialogueError, match="a chat completion without text"):
        ask(open_endpoint(server))


def test_a_huge_answer_is_not_read_to_its_end(server):
    server.script.append(Reply(body=completion("x" * (3 * MAX_BODY))))
    with pytest.raises(DialogueError, match=rf"an answer of more than {MAX_BODY} bytes \(endpoint\.MAX_BODY\)"):
        ask(open_endpoint(server))


# ------------------------------------------------------------------------------------------------ limits and budgets


def test_no_more_requests_at_once_than_allowed(server):
    server.script.extend(Reply(delay=0.1, body=completion("x")) for _ in range(12))
    endpoint = open_endpoint(server, concurrency=3)
    with ThreadPoolExecutor(12) as pool:
        assert len(list(pool.map(lambda seed: ask(endpoint, seed), range(12)))) == 12
    assert server.peak == 3


def test_who_waits_too_long_for_a_turn_is_told(server):
    server.script.append(Reply(delay=1.0, body=completion("x")))
    endpoint = open_endpoint(server, concurrency=1)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, endpoint, 1)
        while not server.bodies:
            time.sleep(0.01)
        with pytest.raises(DialogueError, match=r"--gopo\.llm\.concurrency 1 requests in the time that its caller has"):
            ask(endpoint, 2, seconds=0.2)
        assert first.result().text == "x"


def test_a_budget_of_requests_counts_tries(server):
    endpoint = open_endpoint(server, budget_requests=3)
    server.script.append(Reply(500))
    ask(endpoint, 1)
    ask(endpoint, 2)
    with pytest.raises(DialogueError, match=r"--gopo\.llm\.budget_requests 3 is spent .* \(3 requests, 20 tokens\)"):
        ask(endpoint, 3)
    assert len(server.bodies) == 3
    assert ask(endpoint, 2).text == "answer 3"  # from the cache, for nothing


def test_a_budget_of_tokens(server):
    endpoint = open_endpoint(server, budget_tokens=15)
    ask(endpoint, 1)
    ask(endpoint, 2)
    with pytest.raises(DialogueError, match=r"--gopo\.llm\.budget_tokens 15 is spent .* \(2 requests, 20 tokens\)"):
        ask(endpoint, 3)
    assert len(server.bodies) == 2


def test_a_budget_of_tokens_needs_an_endpoint_that_counts(server):
    server.script.append(Reply(body=completion("x", prompt_tokens=0, completion_tokens=0)))
    with pytest.raises(DialogueError, match=r"does not count tokens, .*use --gopo\.llm\.budget_requests"):
        ask(open_endpoint(server, budget_tokens=15))


# ----------------------------------------------------------------------------------------------------------- cache


def test_equal_requests_are_answered_once(server, tmp_path):
    endpoint = open_endpoint(server)
    assert [ask(endpoint, seed).text for seed in (1, 2, 1)] == ["answer 1", "answer 2", "answer 1"]
    other = open_endpoint(server, temperature=0.1)
    assert ask(other).text == "answer 3"


def test_a_cache_file_outlives_the_process(server, tmp_path):
    path = str(tmp_path / "answers.sqlite")
    server.script.append(Reply(body=completion("cut off", finish="length")))
    first = ask(open_endpoint(server, cache=path))
    later = open_endpoint(server, cache=path, budget_requests=1)
    assert ask(later) == first == Answer("cut off", cut=True)
    assert (later.usage.requests, len(server.bodies)) == (0, 1)


def test_of_two_processes_with_one_file_the_first_answer_counts(server, tmp_path):
    path = str(tmp_path / "answers.sqlite")
    both = [open_endpoint(server, cache=path) for _ in range(2)]
    server.script.extend([Reply(delay=0.3, body=completion("late")), Reply(body=completion("early"))])
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(ask, both[0])
        while not server.bodies:
            time.sleep(0.01)
        assert ask(both[1]).text == "early"
        assert slow.result().text == "early"
    assert len(server.bodies) == 2


def test_a_cache_that_cannot_be_is_an_error_of_the_flag(server, tmp_path):
    (tmp_path / "notes.txt").write_text("not a data base " * 100)
    for name in ("notes.txt", "no/such/folder.sqlite", ""):
        with pytest.raises(ConfigError, match=r"--gopo\.llm\.cache .*cannot keep answers in .*name a new file"):
            open_endpoint(server, cache=str(tmp_path / name))
    assert (tmp_path / "notes.txt").read_text().startswith("not a data base")


# ------------------------------------------------------------------------------------------------------------- key


def test_the_key_shows_nowhere(server, tmp_path, monkeypatch, caplog):
    """The server gives it away in answers and errors; it must be in no text, pickle, file, log or reachable object."""
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level(0)
    endpoint = open_endpoint(server, api_key_env="MY_KEY", cache=str(tmp_path / "answers.sqlite"), attempts=1)
    server.script.append(Reply(body=completion(f"your key is {KEY}")))
    assert ask(endpoint, 0).text == "your key is [key]"
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    errors = []
    for reply in (Reply(401, f"bad key {KEY}"), Reply(500, KEY), Reply(delay=0.5), Reply(body=f"<{KEY}>")):
        server.script.append(reply)
        with pytest.raises(DialogueError) as caught:
            ask(
                Endpoint(
                    "--gopo.user llm", "small", server.url, LlmConfig(api_key_env="MY_KEY", attempts=1, timeout=0.2)
                ),
                len(errors),
            )
        errors.append(caught.value)
    shown = [repr(endpoint), str(vars(endpoint)), caplog.text, str(pickle.dumps(endpoint)), str(pickle.dumps(errors))]
    shown += ["".join(traceback.format_exception(error)) for error in errors]
    shown += [path.read_bytes().decode("latin-1") for path in tmp_path.iterdir()]
    assert len(shown) == 10
    assert not [text for text in shown if KEY in text]
    for error in errors:
        assert error.__context__ is None or "Authorization" not in str(vars(error.__context__))
    late = next(error for error in errors if "ReadTimeout" in str(error))
    assert late.__context__ is None  # httpx's error would hold the request
    restored = pickle.loads(pickle.dumps(endpoint))
    assert ask(restored, 0).text == "your key is [key]"  # the cache file still works, and so would requests


@pytest.mark.parametrize("bad", ["sk-one two-secret", "sk-secret\x7f", "sk-sécret"])
def test_a_key_that_cannot_be_one_is_not_shown(server, bad, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", bad)
    with pytest.raises(ConfigError, match=r"--gopo\.llm\.api_key_env OPENAI_API_KEY: .*cannot be a key") as caught:
        open_endpoint(server)
    assert "sk-" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- URL


@pytest.mark.parametrize(
    "url", ["http://me:secret@host/v1", "https://host/v1?api-key=secret", "https://host/v1#secret"]
)
def test_a_url_holds_no_secret(url):
    with pytest.raises(ConfigError, match=r"llm:small@URL: the URL has a user, a query or a fragment") as caught:
        Endpoint("--gopo.user llm", "small", url, LlmConfig())
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["ftp://host/v1", "http://", "http://host:port/v1"])
def test_a_url_must_be_one(url):
    with pytest.raises(ConfigError, match=r"--gopo\.user llm:small@.*: not a URL; write one as in http://localhost"):
        Endpoint("--gopo.user llm", "small", url, LlmConfig())


def test_a_closing_slash_does_not_matter(server):
    endpoint = Endpoint("--gopo.user llm", "small", server.url + "/", LlmConfig())
    server.answer = lambda body: json.dumps("fine")
    assert ask(endpoint).text == '"fine"'
