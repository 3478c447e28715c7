import csv

import pytest

from openrlhf_gopo.evaluation.summary import Interval, summarise
from openrlhf_gopo.evaluation.tables import Table, cell, markdown, slice_grid, write_text
from openrlhf_gopo.types import Goal, StopReason, Trajectory, Turn


def dialogue(goal_id, tse, intent="return", stop=StopReason.COMPLETED, persona=None):
    goal = Goal(goal_id, intent, "context", {"solve": 1.0}, persona=persona or {})
    turn = Turn("hello", ("a", "b"), "a", "hi", completed=("solve",), engagement=0.5)
    return Trajectory(goal, 0, 7, [turn], stop, rewards={"tse": tse, "gre": float("nan")})


def table():
    before = [dialogue("a", 10), dialogue("b", 30), dialogue("c", 50)]
    after = [dialogue("a", 30), dialogue("b", 50), dialogue("c", 70), dialogue("d", 0)]
    worse = [dialogue("a", 0), dialogue("b", 0), dialogue("c", 0)]
    other = [dialogue("z", 1), dialogue("z", 0, stop=StopReason.FAILED)]
    phases = {"before": before, "after": after, "worse": worse, "other": other}
    return Table.of({name: summarise(found) for name, found in phases.items()})


def test_the_markdown_has_policies_intervals_differences_and_p_values():
    text, stops = table().text().split("Stop reasons")
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in text.splitlines() if "|" in line}
    assert rows["policy"][1:5] == ["goals", "dialogues", "failed", "TSE (0-100)"]
    assert rows["before"][1:4] == ["3", "3", "0"]
    assert rows["before"][4].startswith("30.0 [")
    # a constant gain over three goals: no width, p = 2 / 8, twice that for the first of two policies
    assert rows["after - before"][1:5] == ["3", "", "", "+20.0 [+20.0, +20.0] p=0.500"]
    assert rows["worse - before"][4].startswith("-30.0 [")
    assert rows["other"][1:5] == ["1", "1", "1", "1.0 [n/a]"]
    assert "other - before" not in rows
    assert "| before | 100.0% |" in stops
    assert "GRE" not in text  # NaN everywhere: not measured


def test_the_notes_say_what_was_compared_with_what():
    text = table().text()
    assert "Holm-corrected over the 2 policies compared" in text
    assert "after and before: 1 goals are in one of them only" in text
    assert "other stands alone, without a difference to before: cannot pair 3 goals with 1" in text
    assert "ifference" not in Table.of({"only": summarise([dialogue("a", 1)])}).text()


def test_rows_are_compared_within_their_decoding():
    """Holm's family is the rows that are compared with the same one: two of sampled, one of greedy."""
    gains = {"before, sampled": 0, "after, sampled": 20, "other, sampled": 10, "before, greedy": 0, "after, greedy": 40}
    results = {name: summarise([dialogue(goal, 10 + gain) for goal in "abc"]) for name, gain in gains.items()}
    compared = {name: f"before, {name.split(', ')[1]}" for name in results if not name.startswith("before")}
    text = Table.of(results, compared).text()
    assert "| after, sampled - before, sampled | 3 |  |  | +20.0 [+20.0, +20.0] p=0.500 |" in text
    assert "| after, greedy - before, greedy | 3 |  |  | +40.0 [+40.0, +40.0] p=0.250 |" in text
    assert "before, greedy - " not in text
    assert "Holm-corrected over the policies compared with the same one." in text


def test_the_csv_has_plain_numbers(tmp_path):
    with table().write_csv(tmp_path / "table.csv").open(newline="") as file:
        rows = {row["policy"]: row for row in csv.DictReader(file)}
    assert float(rows["before"]["tse"]) == 30.0
    assert 10.0 <= float(rows["before"]["tse_low"]) < 30.0 < float(rows["before"]["tse_high"]) <= 50.0
    assert (rows["before"]["tse_p"], rows["other"]["tse_low"]) == ("", "")
    gain = rows["after - before"]
    assert [float(gain[f"tse{part}"]) for part in ("", "_low", "_p", "_p_holm")] == [20.0, 20.0, 0.25, 0.5]


def test_names_cannot_break_the_tables(tmp_path):
    found = Table.of({"a|b\n<b> ![x](http://y) \ud800": summarise([dialogue("a", 1)])})
    text = write_text(tmp_path / "table.md", found.text()).read_text(encoding="utf-8")
    assert "| a\\|b &lt;b> ![x]\\(http://y) \\ud800 | 1 |" in text
    with found.write_csv(tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        assert next(csv.DictReader(file))["policy"] == "a|b\n<b> ![x](http://y) \\ud800"


def test_a_backslash_does_not_undo_the_escape_of_a_bar():
    assert markdown((["a", "b"], [[r"x\|y", "z"]])).splitlines()[2] == r"| x\\\|y | z |"


def test_a_file_is_replaced_in_one_move(tmp_path):
    path = write_text(tmp_path / "table.md", "old")
    (tmp_path / "table.md.tmp").mkdir()  # in the way of the new text, as a full disk is
    with pytest.raises(IsADirectoryError):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_policies_are_sliced_by_the_same_keys():
    """Who played the customers gives slices when it differs anywhere, not only within one policy."""

    def by(user, goal):
        played = dialogue(goal, 10)
        played.user = user
        return played

    _, cells = slice_grid({"one": [by("agenda", "a")], "two": [by("llm", "a")]})
    assert [row[:2] for row in cells if "user" in row[0]] == [["user: agenda", "one"], ["user: llm", "two"]]


def test_a_table_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one policy"):
        Table.of({})


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (None, "0.000 [0.000, 0.000]"),
        (0.04, "+0.000 [+0.000, +0.000] p=0.040"),
        (9e-4, "+0.000 [+0.000, +0.000] p<0.001"),
    ],
)
def test_floating_point_noise_has_no_sign(p, expected):
    assert cell(Interval(-1e-12, -2e-12, 1e-12, 5), "gre", p) == expected


def test_slices_have_the_same_order_for_all_policies_and_no_empty_rows():
    tone = {"tone": "terse"}
    phases = {
        "one": [dialogue("a", 10, "return"), dialogue("b", 20, "cancel", persona=tone)],
        "two": [dialogue("c", 30, "advice", persona=tone), dialogue("b", 40, "cancel", persona=tone)],
    }
    header, cells = slice_grid(phases)
    assert header == ["slice", "policy", "goals", "dialogues", "TSE (0-100)", "success", "turns"]
    assert [row[:5] for row in cells] == [
        ["intent: advice", "two", "1", "1", "30.0 [n/a]"],
        ["intent: cancel", "one", "1", "1", "20.0 [n/a]"],
        ["intent: cancel", "two", "1", "1", "40.0 [n/a]"],
        ["intent: return", "one", "1", "1", "10.0 [n/a]"],
        ["persona tone: terse", "one", "1", "1", "20.0 [n/a]"],
        ["persona tone: terse", "two", "2", "2", "35.0 [30.0, 40.0]"],
        ["length: 1 turn", "one", "2", "2", "15.0 [10.0, 20.0]"],
        ["length: 1 turn", "two", "2", "2", "35.0 [30.0, 40.0]"],
    ]
