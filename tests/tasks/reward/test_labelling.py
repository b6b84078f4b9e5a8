"""Labels by a judge: both orders, what is kept, the cache, a server that fails in every way, files, the command."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tasks.reward import labelling
from tasks.reward.examples import Pair, read_pairs
from tasks.reward.labelling import (
    ASPECTS,
    MALFORMED_IN_A_ROW,
    AnswerCache,
    EndpointError,
    EndpointLabeller,
    Labels,
    MalformedAnswerError,
    label_pairs,
    main,
    read_cache,
    read_labels,
    read_reply,
    write_labels,
)
from zoo.errors import DataNotFoundError, UnknownNameError

PAIRS = [Pair(f"How long is {n}?", "long " * n, "short", "QA", f"p{n}") for n in range(2, 8)]
ALL = len(PAIRS)


def longer(prompt: str, first: str, second: str, capability: str) -> str:
    return "tie" if len(first) == len(second) else "first" if len(first) > len(second) else "second"


class Counting:
    """Passes questions on to a judge, and remembers them; gives up after so many."""

    def __init__(self, judge: Callable[..., str] = longer, until: int = 10**6) -> None:
        self.judge, self.until, self.asked = judge, until, []

    def __call__(self, *ask: str) -> str:
        if len(self.asked) == self.until:
            raise KeyboardInterrupt
        self.asked.append(ask)
        return self.judge(*ask)


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_every_pair_and_capability_is_asked_in_both_orders(workers: int) -> None:
    judge = Counting()
    labels = label_pairs(PAIRS, ["depth", "logic"], judge, workers=workers, progress=False)
    wanted = {(p.prompt, *answers, name) for p in PAIRS for name in ("depth", "logic")
              for answers in ((p.chosen, p.rejected), (p.rejected, p.chosen))}  # fmt: skip
    assert set(judge.asked) == wanted and len(judge.asked) == len(wanted) == 4 * ALL
    assert labels.preferences.dtype == np.int8 and labels.preferences.shape == (ALL, 2)
    assert (labels.preferences == 1).all() and labels.kept_ratio == {"depth": 1.0, "logic": 1.0}


def test_the_sign_says_which_answer_is_better_however_the_pair_is_written() -> None:
    turned = [Pair(p.prompt, p.rejected, p.chosen, p.category, p.id) for p in PAIRS]
    labels = [label_pairs(pairs, ["depth"], longer, progress=False).preferences for pairs in (PAIRS, turned)]
    assert (labels[0] == 1).all() and (labels[1] == -1).all()


@pytest.mark.parametrize("always", ["first", "second"])
def test_a_judge_that_goes_by_position_keeps_nothing(always: str) -> None:
    labels = label_pairs(PAIRS, ["depth"], lambda *_: always, progress=False)
    assert not labels.preferences.any() and labels.kept_ratio == {"depth": 0.0}
    assert labels.inconsistent == {"depth": ALL} and labels.ties == labels.malformed == {"depth": 0}


def test_kept_ratios_count_each_kind_exactly() -> None:
    """Of six pairs in `odd`: one tie in both orders, one in one order, one malformed, one by position, two kept."""

    def judge(prompt: str, first: str, second: str, capability: str) -> str:
        number = int(prompt.split()[-1][:-1])
        if capability == "odd" and number in (2, 3, 4, 5):
            if number == 4 and first == "short":
                raise MalformedAnswerError("nothing")
            return {2: "tie", 3: "tie" if first == "short" else "first", 5: "second"}.get(number, "first")
        return longer(prompt, first, second, capability)

    labels = label_pairs(PAIRS, ["odd", "even"], judge, progress=False)
    assert labels.preferences.tolist() == [[0, 1]] * 4 + [[1, 1]] * 2
    assert labels.kept_ratio == pytest.approx({"odd": 2 / 6, "even": 1})
    assert (labels.ties, labels.inconsistent, labels.malformed) == (
        {"odd": 1, "even": 0}, {"odd": 2, "even": 0}, {"odd": 1, "even": 0}
    )  # fmt: skip
    assert labels.rows()[0] == {
        "capability": "odd", "pairs": 6, "kept ratio": 2 / 6, "inconsistent": 2, "ties": 1, "malformed": 1
    }  # fmt: skip


def test_the_swap_filter_equals_a_loop_over_random_judgements() -> None:
    generator = np.random.default_rng(0)
    pairs = [Pair(str(n), f"a{n}", f"b{n}", "", str(n)) for n in range(200)]
    table = {(str(n), first): str(generator.choice(["first", "second", "tie"])) for n in range(200) for first in "ab"}
    labels = label_pairs(pairs, ["x"], lambda prompt, first, *_: table[prompt, first[0]], progress=False)
    for n, label in enumerate(labels.preferences[:, 0]):
        said = table[str(n), "a"], table[str(n), "b"]
        assert label == {("first", "second"): 1, ("second", "first"): -1}.get(said, 0)
    assert 0 < labels.kept_ratio["x"] < 1


def test_what_a_labeller_may_not_say_or_label() -> None:
    with pytest.raises(UnknownNameError, match=r"answer of the labeller 'A'.*first, second, tie"):
        label_pairs(PAIRS, ["depth"], lambda *_: "A", progress=False)
    with pytest.raises(ValueError, match="nothing to label: 0 pairs"):
        label_pairs([], ["depth"], longer)
    with pytest.raises(ValueError, match="0 capabilities"):
        label_pairs(PAIRS, [], longer)
    with pytest.raises(ValueError, match="workers=0"):
        label_pairs(PAIRS, ["depth"], longer, workers=0)


def test_a_judge_that_never_answers_is_stopped() -> None:
    def mute(*_: str) -> str:
        raise MalformedAnswerError("It said 'hm'.")

    judge = Counting(mute)
    many = [Pair(str(n), "a", "b", "", str(n)) for n in range(50)]
    with pytest.raises(ValueError, match=r"20 questions in a row.*It said 'hm'"):
        label_pairs(many, ["depth"], judge, progress=False)
    assert len(judge.asked) == MALFORMED_IN_A_ROW


# --- the cache -------------------------------------------------------------------------------------------------------


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    cache = tmp_path / "new" / "cache.jsonl"
    first = label_pairs(PAIRS[:4], ["depth"], Counting(), cache, "rule 1", progress=False)
    again = Counting()
    labels = label_pairs(PAIRS, ["depth", "logic"], again, cache, "rule 1", progress=False)
    assert (labels.preferences[:4, :1] == first.preferences).all() and labels.kept_ratio["logic"] == 1
    assert len(again.asked) == 2 * (2 * ALL - 4), "all but the four that were asked before"
    assert len(cache.read_text().splitlines()) == 4 * ALL
    other = Counting()
    label_pairs(PAIRS, ["depth"], other, cache, "rule 2", progress=False)
    assert len(other.asked) == 2 * ALL, "another judge answers for itself"
    changed = Counting()
    label_pairs([Pair("How long is 2?", "long long!", "short", "QA", "p2")], ["depth"], changed, cache, "rule 1")
    assert len(changed.asked) == 2, "the content counts, not the id"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, workers: int) -> None:
    cache = tmp_path / "cache.jsonl"
    with pytest.raises(KeyboardInterrupt):
        label_pairs(PAIRS, ["depth"], Counting(until=5), cache, "rule", workers, progress=False)
    kept = len(cache.read_text().splitlines())
    assert kept == 5 if workers == 1 else 0 < kept <= 5
    rest = Counting()
    labels = label_pairs(PAIRS, ["depth"], rest, cache, "rule", workers, progress=False)
    assert len(rest.asked) == 2 * ALL - kept and (labels.preferences == 1).all()


def test_the_bar_begins_where_the_cache_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[tuple[int, int]] = []
    cache = tmp_path / "cache.jsonl"
    label_pairs(PAIRS[:2], ["depth"], longer, cache, "rule", progress=False)
    assert capsys.readouterr() == ("", "")
    show = labelling._show

    def spy(answers: Any, total: int, done: int, progress: bool) -> Any:
        shown.append((total, done))
        return show(answers, total, done, progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labelling, "_show", spy)
        label_pairs(PAIRS, ["depth"], longer, cache, "rule")
    assert shown == [(12, 4)]
    printed = capsys.readouterr()
    assert printed.out == "" and "12/12" in printed.err and "0 malformed" in printed.err


def test_malformed_answers_are_not_kept(tmp_path: Path) -> None:
    def mute(*_: str) -> str:
        raise MalformedAnswerError("hm")

    cache = tmp_path / "cache.jsonl"
    assert label_pairs(PAIRS, ["depth"], mute, cache, "rule", progress=False).malformed == {"depth": ALL}
    again = Counting()
    assert label_pairs(PAIRS, ["depth"], again, cache, "rule", progress=False).malformed == {"depth": 0}
    assert len(again.asked) == 2 * ALL


def test_a_function_has_to_be_named_in_a_cache(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="say which one this is"):
        label_pairs(PAIRS, ["depth"], longer, tmp_path / "cache.jsonl")


@pytest.mark.parametrize("torn", [b'{"key": "k9", "ans', b'{"key": "k9", "answer": "first"}', b"\x00\x00\xff", b"[]\n"])
def test_a_damaged_last_line_is_reported_and_asked_again(tmp_path: Path, torn: bytes) -> None:
    cache = AnswerCache(tmp_path / "cache.jsonl")
    cache.add("k1", "first")
    cache.add("k2", "tie")
    whole = cache.path.read_bytes()
    cache.path.write_bytes(whole + torn)
    with pytest.warns(UserWarning, match=r"last line was incomplete.*2 answers are kept"):
        reopened = AnswerCache(cache.path)
    assert reopened.table == cache.table == {"k1": "first", "k2": "tie"} and cache.path.read_bytes() == whole
    reopened.add("k3", "second")
    assert read_cache(cache.path) == {"k1": "first", "k2": "tie", "k3": "second"}


@pytest.mark.parametrize("line", [b'{"key": "k9", "ans', b'{"key": "k9", "answer": "maybe"}', b'{"key": "k9"}', b""])
def test_damage_before_the_last_line_is_an_error(tmp_path: Path, line: bytes) -> None:
    cache = AnswerCache(tmp_path / "cache.jsonl")
    cache.add("k1", "first")
    cache.path.write_bytes(line + b"\n" + cache.path.read_bytes())
    with pytest.raises(ValueError, match=r"cache.jsonl, line 1 of 2: not a cached answer"):
        AnswerCache(cache.path)


# --- a server --------------------------------------------------------------------------------------------------------

Reply = tuple[int, dict[str, str], bytes]
HANG_UP: Reply = (0, {}, b"")


def says(text: Any) -> Reply:
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def prefers_longer(request: dict[str, Any]) -> Reply:
    """A model that reads the texts between the tags as it was told to."""
    asked = request["messages"][1]["content"]
    first, second = (asked.split(f"<answer_{x}>\n")[1].split(f"\n</answer_{x}>")[0] for x in "ab")
    return says({"first": "A", "second": "B", "tie": "TIE"}[longer("", first, second, "")])


class Server:
    """A local server; `script` gives its first replies, `model` all others."""

    def __init__(self) -> None:
        self.model: Callable[[dict[str, Any]], Reply] = prefers_longer
        self.script: list[Reply] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.requests.append(request)
                    server.headers.append(dict(self.headers))
                    server.paths.append(self.path)
                    status, headers, body = server.script.pop(0) if server.script else server.model(request)
                if status == 0:
                    return
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                # The client may be gone: it was killed, or did not wait.
                with suppress(ConnectionError):
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    running = Server()
    thread = threading.Thread(target=running.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.http.shutdown()
    running.http.server_close()
    thread.join()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited for, without waiting."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def ask(server: Server, **settings: Any) -> str:
    return EndpointLabeller(server.url, "tiny", **settings)("What?", "first one", "second", "depth")


@pytest.mark.parametrize("workers", [1, 4])
def test_an_endpoint_labels_pairs(server: Server, tmp_path: Path, workers: int) -> None:
    labeller, cache = EndpointLabeller(server.url, "tiny"), tmp_path / "cache.jsonl"
    labels = label_pairs(PAIRS, ["depth", "logic"], labeller, cache, workers=workers, progress=False)
    assert (labels.preferences == 1).all() and len(server.requests) == 4 * ALL
    label_pairs(PAIRS, ["depth", "logic"], labeller, cache, workers=workers, progress=False)
    assert len(server.requests) == 4 * ALL, "the cache answers"
    other = EndpointLabeller(server.url, "tiny", descriptions={"depth": "is deeper"})
    label_pairs(PAIRS, ["depth", "logic"], other, cache, workers=workers, progress=False)
    assert len(server.requests) == 6 * ALL, "only the capability with another wording is asked about again"


def test_a_model_that_goes_by_position_keeps_nothing(server: Server) -> None:
    server.model = lambda request: says("A")
    labels = label_pairs(PAIRS, ["depth"], EndpointLabeller(server.url, "tiny"), progress=False)
    assert labels.kept_ratio == {"depth": 0.0} and labels.inconsistent == {"depth": ALL}


def test_what_is_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", " secret\n")
    labeller = EndpointLabeller(
        server.url + "/chat/completions/", "tiny", "MY_KEY", {"tone": "is {kinder}"}, {"max_tokens": 5}, max_prompt=4
    )
    assert labeller("Who? What?", " {A}  ", "B  B\n", "tone") == "second" and server.paths == ["/v1/chat/completions"]
    (request,) = server.requests
    assert set(request) == {"model", "messages", "max_tokens"} and request["model"] == "tiny"
    question = request["messages"][1]["content"]
    assert "<conversation>\nhat?\n</conversation>" in question, "a prompt is cut from its left"
    assert '"tone": the better answer is {kinder}.' in question and "<answer_a>\n{A}\n</answer_a>" in question
    assert server.headers[0]["Authorization"] == "Bearer secret" and "secret" not in labeller.identity("tone")
    ask(server)
    assert "Authorization" not in server.headers[1] and server.requests[1]["temperature"] == 0


def test_failures_are_tried_again_with_growing_waits(server: Server, waits: list[float]) -> None:
    cut_off = (200, {"Content-Length": "9"}, b"{}")
    server.script = [(500, {}, b"oops"), HANG_UP, (429, {}, b"slow"), cut_off]
    assert ask(server, backoff=0.5) == "first"
    assert waits == [0.5, 1, 2, 4] and len(server.requests) == 5


@pytest.mark.parametrize(("value", "wait"), [("7", 7), ("0.1", 1), ("soon", 1), ("date", 90)])
def test_a_server_says_how_long_to_wait(server: Server, waits: list[float], value: str, wait: float) -> None:
    if value == "date":
        value = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    server.script = [(429, {"Retry-After": value}, b"")]
    assert ask(server) == "first" and waits == [pytest.approx(wait, abs=2 if wait > 7 else 0)]


def test_a_wait_that_is_too_long_is_left_to_the_user(server: Server, waits: list[float]) -> None:
    server.script = [(429, {"Retry-After": "86400"}, b"quota")]
    with pytest.raises(EndpointError, match=r"asks to wait 86400 s \(status 429 .*quota\): run again"):
        ask(server)
    assert not waits and len(server.requests) == 1


def test_after_the_last_attempt_the_error_is_clear(server: Server, waits: list[float], tmp_path: Path) -> None:
    server.script = [says("A"), says("B"), says("A")]
    server.model = lambda request: (503, {}, b"out of memory")
    cache = tmp_path / "cache.jsonl"
    with pytest.raises(EndpointError, match=r"/v1/chat/completions failed 3 times.*status 503 .*out of memory"):
        label_pairs(PAIRS, ["depth"], EndpointLabeller(server.url, "tiny", retries=2), cache, progress=False)
    assert waits == [1, 2] and len(server.requests) == 6
    server.model = prefers_longer
    labels = label_pairs(PAIRS, ["depth"], EndpointLabeller(server.url, "tiny"), cache, progress=False)
    assert len(server.requests) == 6 + 2 * ALL - 3 and (labels.preferences == 1).all()


def test_a_server_that_is_not_there(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}"
    with pytest.raises(EndpointError, match=r"failed 2 times.*refused.*Check that the URL is right"):
        EndpointLabeller(url, "tiny", retries=1)("What?", "one", "two", "depth")
    assert waits == [1]


def test_a_server_that_does_not_reply_in_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = threading.Event()

    def hang(request: dict[str, Any]) -> Reply:
        hanging.wait(5)
        return says("A")

    server.model = hang
    with pytest.raises(EndpointError, match=r"failed 1 times.*timed out"):
        ask(server, timeout=0.05, retries=0)
    hanging.set()


@pytest.mark.parametrize(
    ("status", "headers", "hint"),
    [
        (401, {}, "status 401 .* no key .*OPENAI_API_KEY to a valid key"),
        (404, {}, "refuses 'tiny' with status 404 .*URL, which mostly ends in /v1"),
        (400, {}, "status 400 .*fit its context"),
        (302, {"Location": "https://elsewhere/v1"}, "redirects to https://elsewhere/v1: name that URL"),
    ],
)
def test_refusals_are_not_tried_again(
    server: Server, waits: list[float], status: int, headers: dict[str, str], hint: str
) -> None:
    server.script = [(status, headers, b" no key ")]
    with pytest.raises(EndpointError, match=hint):
        ask(server)
    assert not waits and len(server.requests) == 1


MALFORMED = [
    says("I like both."), says(None), says(""), says("A or B"), (200, {}, b"<html>"), (200, {}, b'{"choices": []}'),
    (200, {}, b"[]"), (200, {}, b"\xff\xfe"),
]  # fmt: skip


@pytest.mark.parametrize("reply", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_replies_are_tried_again_then_counted(server: Server, waits: list[float], reply: Reply) -> None:
    server.script = [reply]
    assert ask(server) == "first" and len(server.requests) == 2
    server.script = [reply] * 3
    labels = label_pairs(PAIRS, ["depth"], EndpointLabeller(server.url, "tiny", retries=2), progress=False)
    assert labels.malformed == {"depth": 1} and labels.kept_ratio == {"depth": pytest.approx((ALL - 1) / ALL)}
    assert len(server.requests) == 2 + 3 + 2 * ALL - 1 and not waits


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("A", "first"), (" b.\n", "second"), ("**TIE**", "tie"), ("Answer: B", "second"), ("The first.\n\nA", "first"),
        ("<think>A is longer, but B</think>\nFinal answer: **B**", "second"), ("My choice is a", "first"),
    ],
)  # fmt: skip
def test_verdicts_that_are_understood(text: str, answer: str) -> None:
    assert read_reply(says(text)[2]) == answer


def test_arguments_that_cannot_be_right() -> None:
    for url in ("localhost:8000/v1", "file:///etc/passwd", "http:///v1"):
        with pytest.raises(ValueError, match="must begin with http:// or https://"):
            EndpointLabeller(url, "tiny")
    with pytest.raises(ValueError, match="retries=-1"):
        EndpointLabeller("http://localhost", "tiny", retries=-1)
    with pytest.raises(UnknownNameError, match=r"'dept'. Did you mean 'depth'.*NAME=WORDS"):
        EndpointLabeller("http://localhost", "tiny")("What?", "one", "two", "dept")


# --- files -----------------------------------------------------------------------------------------------------------


def made() -> Labels:
    preferences = np.array([[1, 0], [-1, 1], [0, -1]], dtype=np.int8)
    none = {"depth": 0, "logic": 0}
    return Labels(("depth", "logic"), preferences, none, none, none)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_labels_come_back_from_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new" / f"labels{suffix}"
    write_labels(path, PAIRS[:3], made())
    back = read_labels(path, PAIRS[:3], ["depth", "logic"])
    assert back.dtype == np.int8 and (back == made().preferences).all()
    some = read_labels(path, [PAIRS[5], PAIRS[1]], ["logic"])
    assert some.tolist() == [[0], [1]], "pairs without a label have 0, and other labels do not matter"


def test_files_that_cannot_be_right(tmp_path: Path) -> None:
    def read(rows: list[dict[str, Any]], names: tuple[str, ...] = ("depth",)) -> Any:
        path = tmp_path / "labels.csv"
        pd.DataFrame(rows).to_csv(path, index=False)
        return read_labels(path, PAIRS, names)

    row = {"id": "p2", "capability": "depth", "preferred": "chosen"}
    assert read([row, row])[:, 0].tolist() == [1, 0, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="row 2: contradicts an earlier row on 'depth' of pair 'p2'"):
        read([row, row | {"preferred": "tie"}])
    with pytest.raises(UnknownNameError, match=r"row 1\) 'A'.*chosen, rejected, tie"):
        read([row | {"preferred": "A"}])
    with pytest.raises(ValueError, match=r"no column preferred.*found id, capability"):
        read([{"id": "p2", "capability": "depth"}])
    with pytest.raises(ValueError, match=r"prefers no answer of these 6 pairs in logic.*labels for depth"):
        read([row], ("depth", "logic"))
    with pytest.raises(ValueError, match=r"pairs such as x2; asked for are p2, p3, p4"):
        read([row | {"id": "x2"}])
    with pytest.raises(DataNotFoundError, match=r"none\.csv"):
        read_labels(tmp_path / "none.csv", PAIRS, ["depth"])


# --- the command -----------------------------------------------------------------------------------------------------


def command(server: Server, tmp_path: Path, *more: str, out: str = "labels.parquet") -> list[str]:
    path = tmp_path / "pairs.parquet"
    pd.DataFrame(PAIRS).to_parquet(path)
    words = ["--file", str(path), "--url", server.url, "--model", "tiny", "--out", str(tmp_path / out)]
    return [*words, "--capability", "depth", *more]


def test_the_command_labels_a_file_and_goes_on(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], waits: list[float]
) -> None:
    main(command(server, tmp_path, "--limit", "2"))
    main(command(server, tmp_path, "--capability", "tone=is kinder"))
    printed = capsys.readouterr().out
    assert len(server.requests) == 4 * ALL, "the second run asks only what is new"
    assert "tone" in printed and "kept ratio" in printed and printed.splitlines()[-1].endswith("labels.parquet")
    assert (read_labels(tmp_path / "labels.parquet", PAIRS, ["depth", "tone"]) == 1).all()
    assert "tone" not in ASPECTS and any("is kinder" in str(request) for request in server.requests)


def test_a_command_that_is_killed_goes_on(server: Server, tmp_path: Path) -> None:
    stuck, killed = threading.Event(), threading.Event()

    def model(request: dict[str, Any]) -> Reply:
        if len(server.requests) == 6:
            stuck.set()
            killed.wait(60)
        return prefers_longer(request)

    server.model = model
    words = command(server, tmp_path, "--workers", "1")
    with subprocess.Popen([sys.executable, "-m", "tasks.reward.labelling", *words], stderr=subprocess.DEVNULL) as run:
        assert stuck.wait(60)
        run.kill()
        run.wait()
        killed.set()
    assert len((tmp_path / "labels.parquet.cache.jsonl").read_text().splitlines()) == 5
    assert not (tmp_path / "labels.parquet").exists()
    main(words)
    assert len(server.requests) == 6 + 2 * ALL - 5, "the question that was lost is asked again, and no other"
    assert (read_labels(tmp_path / "labels.parquet", PAIRS, ["depth"]) == 1).all()


def test_the_command_knows_the_development_data(server: Server, tmp_path: Path) -> None:
    words = command(server, tmp_path, out="labels.csv")
    table = pd.DataFrame(PAIRS).assign(goal="helpfulness", prompt_has_generation_leak=[True] + [False] * (ALL - 1))
    table.to_parquet(tmp_path / "pairs.parquet")
    main(words)
    assert pd.read_csv(tmp_path / "labels.csv").id.tolist() == [f"helpfulness/{pair.id}" for pair in PAIRS[1:]]


def test_the_command_gives_pairs_the_ids_that_training_gives_them(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(server, tmp_path, out="labels.csv")
    path = tmp_path / "own.csv"
    table = pd.DataFrame(PAIRS).drop(columns=["id", "category"]).assign(uid=[f"u{pair.id}" for pair in PAIRS])
    table.rename(columns={"chosen": "better"}).to_csv(path, index=False)
    columns = {"chosen": "better", "id": "uid"}
    main([*words, "--file", str(path), "--columns", json.dumps(columns)])
    pairs = read_pairs(path, columns)
    assert (read_labels(tmp_path / "labels.csv", pairs, ["depth"]) == 1).all() and pairs[0].id == f"u{PAIRS[0].id}"
    with pytest.raises(SystemExit):
        main([*words, "--file", str(path), "--columns", "chosen=better"])
    assert "a JSON object of names" in capsys.readouterr().err
    asked = []
    monkeypatch.setattr(labelling, "load_official", lambda *of: asked.append(of) or PAIRS)
    words = words[words.index("--url") :]
    main([*words, "--source", "ultrafeedback"])
    assert asked == [("ultrafeedback", "train")]
    assert pd.read_csv(tmp_path / "labels.csv", dtype=str).id.tolist() == [pair.id for pair in PAIRS]
    with pytest.raises(SystemExit):
        main([*words, "--source", "ultrafeedback", "--columns", json.dumps(columns)])
    assert "has no effect on ultrafeedback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--out", "labels.txt"], "format of labels '.txt'"),
        (["--capability", "dept"], "Did you mean 'depth'"),
        (["--file", "none.parquet"], "none.parquet"),
        (["--limit", "0"], "--limit 0: must be at least 1"),
        (["--url", "localhost"], "must begin with http"),
    ],
)
def test_the_command_says_what_is_wrong(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command(server, tmp_path, *change))
    assert stop.value.code == 2 and sentence in capsys.readouterr().err.splitlines()[-1]
    assert not server.requests


def test_the_command_reports_a_server_that_refuses(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.model = lambda request: (401, {}, b"")
    with pytest.raises(SystemExit):
        main(command(server, tmp_path))
    assert "Set the variable OPENAI_API_KEY" in capsys.readouterr().err
