"""Every format is told by its fields; what cannot be learned from is refused with its number and the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from camelid.errors import InputError
from camelid.finetune.read import read_file, read_files
from camelid.finetune.records import BadRow, record

ASKED, SAID = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}


@pytest.mark.parametrize(
    ("row", "format_", "roles"),
    [
        ({"messages": [ASKED, SAID]}, "messages", ["user", "assistant"]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
         "sharegpt", ["system", "user", "assistant"]),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca", ["user", "assistant"]),
        ({"instruction": "a", "output": "b", "history": [["q", "r"]], "system": "s"}, "alpaca",
         ["system", "user", "assistant", "user", "assistant"]),
        ({"prompt": "a", "completion": "b"}, "prompt and completion", ["user", "assistant"]),
        ({"prompt": [ASKED], "completion": [SAID]}, "prompt and completion", ["user", "assistant"]),
        ({"question": "a", "answer": "b"}, "question and answer", ["user", "assistant"]),
        ({"instruction": "a", "context": "", "response": "b"}, "dolly", ["user", "assistant"]),
        ({"instruction": "a", "input": float("nan"), "output": "b"}, "alpaca", ["user", "assistant"]),
        ({"instruction": "a", "input": [], "output": "b"}, "alpaca", ["user", "assistant"]),
        ({"prompt": "a", "completion": "b", "label": True}, "prompt and completion, judged", ["user", "assistant"]),
        ({"messages": [ASKED, SAID], "kto_tag": False}, "messages, judged", ["user", "assistant"]),
        ({"instruction": "a", "output": "b", "label": False}, "alpaca, judged", ["user", "assistant"]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "kto_tag": True},
         "sharegpt, judged", ["user", "assistant"]),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", ["user"]),
        ({"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"},
          "rejected": {"from": "gpt", "value": "c"}}, "preference", ["user"]),
        ({"chosen": [ASKED, SAID], "rejected": [ASKED, {"role": "assistant", "content": "c"}]}, "preference", ["user"]),
        ({"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                       {"role": "tool", "content": "2"}, SAID], "tools": [{"type": "function"}]},
         "messages", ["user", "assistant", "tool", "assistant"]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, SAID]}, "messages",
         ["user", "assistant"]),
        ({"text": "once"}, "text", []),
        # What other tools leave beside the fields of a format is not taken for the question.
        ({"prompt": "a", "messages": [ASKED, SAID], "chosen": [ASKED, SAID],
          "rejected": [ASKED, {"role": "assistant", "content": "c"}]}, "preference", ["user"]),
        ({"instruction": "a", "output": "b", "prompt": "Below is … b"}, "alpaca", ["user", "assistant"]),
    ],
)  # fmt: skip
def test_formats(row: dict[str, Any], format_: str, roles: list[str]) -> None:
    found = record(row)
    assert found.format == format_
    assert [m["role"] for m in found.messages] == roles
    if format_ == "preference":
        assert found.chosen == [SAID]
        assert found.rejected == [{"role": "assistant", "content": "c"}]
    if format_ == "alpaca":
        assert found.messages[-2]["content"] == "a"
    assert (found.good is not None) == format_.endswith("judged")
    if found.tools:
        assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"question": "a", "context": "x", "answer": "b"}, "x\n\na"),
        ({"question": "a", "passage": "x", "input": None, "answer": "b"}, "x\n\na"),
        ({"instruction": "a", "input": "x", "output": "b"}, "a\n\nx"),
        ({"instruction": "a", "context": "x", "response": "b"}, "a\n\nx"),
    ],
)
def test_what_a_question_is_about_is_read_with_it(row: dict[str, Any], asked: str) -> None:
    assert record(row).messages[0]["content"] == asked


def test_nulls_that_a_table_had_to_fill_in_are_no_fields(tmp_path: Path) -> None:
    """One function's parameters have the names of every other's."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}],
         "tools": [{"name": name, "parameters": {"properties": {name: {"type": "string"}}}}]}
        for name in ("city", "day")
    ]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    used, _ = read_file(tmp_path / "x.parquet", lambda r: r.tools)
    assert used == [row["tools"] for row in rows]


def test_lines_of_json_under_the_other_name(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert read_file(tmp_path / "x.json", lambda r: r.text)[0] == ["a", "b"]


@pytest.mark.parametrize("label", ["math", 3, 1, 0.5, None])
def test_a_label_that_is_no_verdict_is_of_something_else(label: object) -> None:
    found = record({"prompt": "a", "completion": "b", "label": label})
    assert (found.good, found.format) == (None, "prompt and completion")


def test_what_comes_before_a_pair_of_answers_is_kept() -> None:
    other = {"role": "assistant", "content": "c"}
    for row in (
        {"system": "Answer in French", "chosen": [ASKED, SAID], "rejected": [ASKED, other]},
        {"system": "Answer in French", "prompt": "a", "chosen": "b", "rejected": "c"},
    ):
        assert record(row).messages == [{"role": "system", "content": "Answer in French"}, ASKED]
    told = record({"instruction": "a", "history": [["x", "y"]], "system": "s", "chosen": "b", "rejected": "c"})
    assert [m["content"] for m in told.messages] == ["s", "x", "y", "a"]
    with pytest.raises(BadRow, match="no prompt"):
        record({"system": "s", "chosen": "b", "rejected": "c"})


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ([], "list"),
        ({"body": "x"}, "has the fields body"),
        ({"messages": [ASKED]}, "no assistant turn"),
        ({"messages": [SAID, ASKED]}, "begins with an assistant turn"),
        ({"messages": [ASKED, ASKED, SAID]}, "two user turns"),
        ({"messages": [ASKED, SAID, SAID]}, "two assistant turns"),
        ({"messages": [ASKED, {"role": "system", "content": "s"}, SAID]}, "put it first"),
        ({"messages": [ASKED, {"role": "tool", "content": "s"}, SAID]}, "no assistant turn called for"),
        ({"messages": [{"role": "narrator", "content": "s"}]}, "'narrator'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, SAID]}, "not text"),
        ({"messages": [{"role": "user", "content": 3}, SAID]}, "content is 3"),
        ({"messages": []}, "empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "same answer"),
        ({"chosen": "b", "rejected": "c"}, "no prompt"),
        ({"text": " "}, "empty text"),
        ({"prompt": "a", "completion": " "}, "empty answer"),
        ({"messages": [ASKED, SAID, ASKED], "label": True}, "ends with a user turn"),
        ({"messages": [ASKED, {"role": "assistant", "content": [{"type": "text"}]}]}, "not text"),
        ({"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": 3}]}, "not a list"),
        ({"instruction": "a", "output": "b", "history": 3}, "history"),
        ({"instruction": "a", "output": "b", "history": [["q", 3]]}, "history"),
        ({"instruction": "a", "input": ["x"], "output": "b"}, "has input .*no text"),
        ({"instruction": "a", "input": 3, "output": "b"}, "has input 3, which is no text"),
        ({"question": "a", "choices": ["x", "y"], "answer": "b"}, "has choices beside its question"),
        ({"question": "a", "context": {"t": "x"}, "answer": "b"}, "has context .*no text"),
        ({"question": "a", "options": ["x", "y"], "chosen": "b", "rejected": "c"}, "has options beside its question"),
        ({"text": "half \ud800"}, "surrogate"),
    ],
)
def test_bad_rows(row: Any, why: str) -> None:
    with pytest.raises(BadRow, match=why):
        record(row)


def test_bad_rows_are_counted_and_shown(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    good = json.dumps({"prompt": "a", "completion": "b"})
    path.write_text("\n".join([good] * 18 + ["{", '{"body": 1}', "", good]) + "\n", encoding="utf-8")
    used, found = read_file(path, lambda r: r)
    assert len(used) == 19
    assert [number for number, _ in found.bad] == [19, 20]
    assert "19 prompt and completion, 2 bad:" in found.said()
    assert "record 20 has the fields body" in found.said()
    with pytest.raises(InputError, match=r"more than 5%.*data\.max_bad_share"):
        read_files("data.files", [path], lambda r: r, 0.05)
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(InputError, match=r"record 1 has no assistant turn.*add the answer"):
        read_files("data.files", [path], lambda r: r, 0.5)


def test_json_parquet_and_damaged_files(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"instruction": f"q{n}", "input": "", "output": f"a{n}"} for n in range(5)]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    for name in ("x.json", "x.parquet"):
        used, found = read_file(tmp_path / name, lambda r: r.messages[0]["content"])
        assert used == [f"q{n}" for n in range(5)]
        assert found.formats == {"alpaca": 5}
    whole = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.json").write_text(json.dumps(rows)[:-3])
    (tmp_path / "latin.jsonl").write_bytes('{"text": "café"}'.encode("latin-1"))
    (tmp_path / "odd.csv").write_text("a,b")
    for name in ("cut.parquet", "cut.json", "latin.jsonl", "odd.csv", "none.jsonl"):
        with pytest.raises(InputError, match=name):
            read_file(tmp_path / name, lambda r: r)
