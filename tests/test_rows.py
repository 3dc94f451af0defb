"""Data files of derive and eval: every form, slices and filters, and errors that name the line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from safepatch_core.errors import InputError, UsageError
from safepatch_core.language.rows import Row, read_rows

CSV = 'q,a,label\nfirst,1,safe\n"two\nlines",2,unsafe\nthird,3,safe\n'
RECORDS = [{"q": f"question {i}", "a": str(i), "n": i, "label": "even" if i % 2 == 0 else "odd"} for i in range(10)]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(folder: Path, records: Sequence[Mapping[str, object]] = RECORDS) -> Path:
    return write(folder, "rows.jsonl", "".join(json.dumps(r) + "\n" for r in records))


def test_csv_rows_know_the_line_they_start_on(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, "rows.csv", CSV), {"question": "q"})
    assert rows == [Row(2, {"question": "first"}), Row(3, {"question": "two\nlines"}), Row(5, {"question": "third"})]


def test_csv_of_spreadsheets(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.csv", b"\xef\xbb\xbfq,a\r\nx,1\r\ny,2\r\n\r\n")
    assert [r.values for r in read_rows(path, ["q", "a"])] == [{"q": "x", "a": "1"}, {"q": "y", "a": "2"}]


@pytest.mark.parametrize("mark", [";", "\t"])
def test_csv_with_another_separator(tmp_path: Path, mark: str) -> None:
    path = write(tmp_path, "rows.csv", f'q{mark}a\r\n"x, y"{mark}1,5\r\n')
    assert read_rows(path, ["q", "a"]) == [Row(2, {"q": "x, y", "a": "1,5"})]


def test_every_form_gives_the_same_rows(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(RECORDS), tmp_path / "rows.parquet")
    lines = ["q,a,n,label", *(f"{r['q']},{r['a']},{r['n']},{r['label']}" for r in RECORDS)]
    paths = [
        jsonl(tmp_path),
        write(tmp_path, "rows.json", json.dumps(RECORDS)),
        write(tmp_path, "rows.csv", "\n".join(lines)),
        tmp_path / "rows.parquet",
    ]
    for path in paths:
        found = read_rows(path, {"question": "q", "answer": "a"}, "1:4", {"label": "odd"})
        assert [r.values["answer"] for r in found] == ["3", "5", "7"], path
        assert [r.values for r in read_rows(path, ["q"], where={"n": "4"})] == [{"q": "question 4"}], path


def test_text_lines(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path, "a.txt", "one\r\ntwo\n\n"), ["text"]) == [
        Row(1, {"text": "one"}),
        Row(2, {"text": "two"}),
    ]


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.jsonl", '\n{"q": "x"}\n\n  \n{"q": "y"}\n\n', [2, 5]),
        ("a.ndjson", '{"q": "x"}\r\n\r\n{"q": "y"}', [1, 3]),
        ("a.csv", "q,a\nx,1\n\ny,2\n\n", [2, 4]),
        ("a.tsv", "q\ta\nx\t1,5\ny\t2\n", [2, 3]),
        ("a.txt", "x\n\n\ny\n", [1, 4]),
    ],
)
def test_blank_lines_are_no_rows(tmp_path: Path, name: str, content: str, lines: list[int]) -> None:
    rows = read_rows(write(tmp_path, name, content), {"q": "text" if name == "a.txt" else "q"})
    assert rows == [Row(lines[0], {"q": "x"}), Row(lines[1], {"q": "y"})]


def test_where_takes_numbers_and_booleans_however_the_file_spells_them(tmp_path: Path) -> None:
    records = [{"q": "a", "n": 1, "ok": True}, {"q": "b", "n": 2.5, "ok": False}, {"q": "c", "n": 1, "ok": False}]
    spelt = write(tmp_path, "a.csv", "q,n,ok\na,1,True\nb,2.50,no\nc,1.0,False\n")
    for path in (jsonl(tmp_path, records), spelt):

        def found(path: Path = path, **where: Any) -> str:
            return "".join(row.values["q"] for row in read_rows(path, ["q"], where=where))

        assert (found(n=1), found(n=2.5), found(ok=True), found(ok=False)) == ("ac", "b", "a", "bc")
        assert (found(n=[1, 2.5]), found(n=1, ok=False)) == ("abc", "c")
    assert [row.values["q"] for row in read_rows(jsonl(tmp_path, records), ["q"], where={"n": "1"})] == ["a", "c"]
    with pytest.raises(InputError, match="no row matches: expected n = True"):
        read_rows(jsonl(tmp_path, records), ["q"], where={"n": True})


def chat(*turns: tuple[str, object], keys: tuple[str, str] = ("role", "content")) -> list[dict[str, object]]:
    return [dict(zip(keys, turn, strict=True)) for turn in turns]


BOTH = {"question": "question", "answer": "answer"}
ASKED, SAID = ("user", "Why?"), ("assistant", "So.")
SHARED = chat(("human", "Why?"), ("gpt", "So."), keys=("from", "value"))


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"question": "Why?", "answer": "So.", "output": "x"}, None),
        ({"Question": "Why?", "answer": "So."}, "questions are in 'Question'"),
        ({"goal": "Why?", "target": "So."}, "questions are in 'goal', answers are in 'target'"),
        ({"messages": chat(ASKED, SAID)}, "questions are in 'messages', answers are in 'messages'"),
        ({"conversations": SHARED}, "questions are in 'conversations', answers are in 'conversations'"),
        ({"messages": chat(("user", [{"type": "text", "text": "Why?"}]), SAID)}, "questions are in 'messages', "),
        ({"messages": json.dumps(chat(ASKED, SAID))}, "questions are in 'messages', answers are in 'messages'"),
        ({"messages": chat(("Human", "Why?"), ("AI", "So."))}, "questions are in 'messages', "),
        (
            {"input": "Why?", "output": "So.", "system": "", "history": []},
            "questions are in 'input', answers are in ",
        ),
        ({"prompt": chat(ASKED), "completion": chat(SAID)}, "questions are in 'prompt', answers are in 'completion'"),
        ({"instruction": "Why?", "input": "", "output": "So."}, "questions are in 'instruction' and 'input', "),
    ],
)
def test_questions_and_answers_are_found_where_others_keep_them(
    tmp_path: Path, record: dict[str, object], told: str | None
) -> None:
    lines: list[str] = []
    path = jsonl(tmp_path, [record])
    assert read_rows(path, BOTH, tell=lines.append) == [Row(1, {"question": "Why?", "answer": "So."})]
    assert len(lines) == (told is not None)
    assert told is None or lines[0].startswith(f"{path}: {told}")


def test_an_input_belongs_to_its_instruction(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path,
        [{"instruction": "Say it.", "input": "Boo", "output": "Boo!"}, {"instruction": "Go.", "output": "No."}],
    )
    assert [row.values["question"] for row in read_rows(path, BOTH)] == ["Say it.\n\nBoo", "Go."]
    assert read_rows(path, {"question": "instruction"})[0].values == {"question": "Say it."}  # as it is named


def test_a_named_column_may_hold_a_chat(tmp_path: Path) -> None:
    pair = {"chosen": chat(ASKED, ("assistant", "No.")), "rejected": chat(ASKED, SAID)}
    path = jsonl(tmp_path, [pair])
    assert read_rows(path, {"question": "rejected", "answer": "rejected"})[0].values == {
        "question": "Why?",
        "answer": "So.",
    }
    assert read_rows(path, {"question": "chosen", "answer": "chosen"})[0].values["answer"] == "No."
    assert read_rows(jsonl(tmp_path, [{"m": chat(ASKED)}]), {"question": "m"})[0].values == {"question": "Why?"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"prompt": "Why?", "chosen": "No.", "rejected": "So."},
            "no column 'answer': found columns prompt, chosen, rejected, expected --answer-column to name one",
        ),
        (
            {"messages": chat(("system", "Hi"), ASKED, SAID)},
            "a system message: expected none; system_prompt gives one",
        ),
        (
            {"messages": chat(ASKED, SAID, ASKED, SAID)},
            "a conversation: found user, assistant, user, assistant, expected one question and one answer",
        ),
        ({"messages": chat(("developer", "Hi"), ASKED, SAID)}, "a system message: expected none"),
        ({"messages": chat(SAID, ASKED)}, "a conversation: found assistant, user, expected one question"),
        ({"messages": chat(ASKED, ("tool", "1"), SAID)}, "a conversation: found user, tool, assistant, expected"),
        ({"messages": str(chat(ASKED, SAID))}, "column 'messages': found messages that are not JSON"),
        (
            {"instruction": "Why?", "output": "So.", "history": [["Hi", "Ho"]]},
            "column 'history' holds earlier turns: expected rows without, or --question-column",
        ),
        ({"conversations": SHARED, "system": "Hi"}, "column 'system' holds a system message: expected rows without"),
        ({"messages": chat(ASKED)}, "a conversation: found user, expected one question and one answer"),
        ({"messages": chat(ASKED, ("assistant", None))}, "column 'messages': found null, expected text"),
        ({"question": "Why?", "answer": [1]}, "column 'answer': found list, expected text"),
    ],
)
def test_chats_that_are_no_question_with_an_answer_are_refused(
    tmp_path: Path, record: dict[str, object], message: str
) -> None:
    options = {"answer": "--answer-column"}
    with pytest.raises(InputError, match=rf"rows\.jsonl: line 1: {re.escape(message)}"):
        read_rows(jsonl(tmp_path, [record]), BOTH, options=options)


def test_records_under_a_key(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", json.dumps({"train": [{"question": "Why?"}], "test": [{"question": "How?"}]}))
    assert [row.values["question"] for row in read_rows(path, ["question"], where={"category": "test"})] == ["How?"]


def test_nested_json_has_categories(tmp_path: Path) -> None:
    tree = {"Theft": {"Cars": ["a", "b"], "Bikes": ["c"]}, "Fraud": {"Mail": ["d"]}}
    path = write(tmp_path, "tree.json", json.dumps(tree))
    columns = {"question": "text", "kind": "subcategory"}
    rows = read_rows(path, columns, where={"category": ["Theft", "Murder"]})
    assert [(r.line, *r.values.values()) for r in rows] == [(1, "a", "Cars"), (2, "b", "Cars"), (3, "c", "Bikes")]
    assert len(read_rows(write(tmp_path, "list.json", '["a", "b"]'), ["text"])) == 2


@pytest.mark.parametrize(
    ("rows", "expected"), [("8:10", [8, 9]), ("8:", [8, 9]), (":2", [0, 1]), ("::4", [0, 4, 8]), ("1:8:3", [1, 4, 7])]
)
def test_slices(tmp_path: Path, rows: str, expected: list[int]) -> None:
    assert [int(r.values["a"]) for r in read_rows(jsonl(tmp_path), ["a"], rows)] == expected


@pytest.mark.parametrize("rows", ["", "3", "a:b", "-1:", "1:2:3:4", "::0", "3:3", "5:2", "1 : 2", "\u0663:"])
def test_bad_slices(tmp_path: Path, rows: str) -> None:
    with pytest.raises(UsageError, match="slice of rows"):
        read_rows(jsonl(tmp_path), ["a"], rows)


@pytest.mark.parametrize("rows", ["0:11", "10:", "10:12"])
def test_a_slice_beyond_the_file_is_no_shorter_slice(tmp_path: Path, rows: str) -> None:
    with pytest.raises(InputError, match=f"rows {rows} asked for: found 10 rows"):
        read_rows(jsonl(tmp_path), ["a"], rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"q": "x"}\n{"q": \n', "line 2: not JSON"),
        ("a.jsonl", '{"q": "x"}\n[1]\n', "line 2: not a JSON object: found list"),
        ("a.jsonl", '{"q": "x"}\n{"a": "y"}\n', "line 2: no column 'q': found columns a"),
        ("a.jsonl", '{"q": "x"}\n{"q": 3}\n', "line 2: column 'q': found int, expected text"),
        ("a.jsonl", '{"q": null}\n', "line 1: column 'q': found null, expected text"),
        ("a.jsonl", '{"q": "x"}\n{"q": "  "}\n', "line 2: column 'q' is empty"),
        ("a.jsonl", '{"q": "\\ud800"}\n', "line 1: column 'q' holds half a surrogate pair"),
        ("a.jsonl", b'{"q": "x"}\n{"q": "\xff"}\n', "line 2: not UTF-8"),
        ("a.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", "", "no rows"),
        ("a.csv", 'q,a\n"x\ny",1\nz\n', "line 4: wrong number of fields: found 1, expected 2"),
        ("a.csv", 'q,a\nx,1\n"y,2\n', "line 3: not CSV"),
        ("a.csv", "q,q\nx,1\n", "line 1: a column name appears twice"),
        ("a.csv", "a,b\nx,1\n", "line 2: no column 'q': found columns a, b"),
        ("a.csv", "q,a\n", "no rows"),
        ("a.csv", b"q\nx\ny\n\xc3\n", "line 4: not UTF-8"),
        ("a.json", '[{"q": "x"},\n {"q": ]', "line 2: not JSON"),
        ("a.json", '{"A": {"B": {"C": ["x"]}}}', "JSON under A / B: found dict, expected a list of rows"),
        ("a.json", '{"A": ["x", 3]}', "item 2 under A: found int, expected text"),
        ("a.json", '{"q": {"0": "x"}}', "JSON under q / 0: found str, expected a list of rows (pandas writes one"),
        ("a.jsonl", '{\n"q": "x"\n}', "line 1: not JSON"),
        ("a.json", "3", "JSON at the top: found int, expected a list of rows"),
        ("a.parquet", b"PAR1 or not", "not a readable parquet file"),
        ("a.xlsx", b"", "unknown kind of data file: found .xlsx"),
    ],
)
def test_bad_files_are_refused_with_file_and_line(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(InputError) as caught:
        read_rows(path, ["text" if name in ("a.txt", "a.json") else "q"])
    assert str(caught.value).startswith(f"{path}: {message}")


def test_only_wanted_rows_are_checked(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"q": "x"}, {"q": ""}, {"q": 3}])
    assert len(read_rows(path, ["q"], ":1")) == 1


def test_a_filter_that_nothing_passes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no row matches: expected label = purple"):
        read_rows(jsonl(tmp_path), ["q"], where={"label": "purple"})


def test_what_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    (tmp_path / "folder").mkdir()
    messages = [("folder", "unknown kind of data file: found a folder"), ("org/name", "no such file")]
    for name, message in (
        *messages,
        ("folder.csv", "not a regular file"),
        ("none.csv", "no such"),
        ("loop.csv", "no such"),
    ):
        with pytest.raises(InputError, match=message):
            read_rows(tmp_path / name, ["q"])
