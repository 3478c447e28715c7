"""The user simulator that replays human dialogues."""

from openrlhf_gopo.users.replay import Pool, ReplayUser, Said, line


def test_borrowed_words_carry_this_goals_values():
    values = [("Day", "Monday"), ("Time", "3 pm")]
    assert line("On Monday at 3 pm", values).adapted({"Day": "Friday", "Time": "Monday"}) == "On Friday at Monday"
    assert line("On Monday at 3 pm", values).adapted({"Day": "Friday"}) is None
    assert line("On Monday, room 7", values).adapted({"Day": "Friday"}) is None


def test_the_user_falls_back_from_own_words_to_the_bare_value():
    pool, said = Pool(), [Said("It is for Ann.", "ask_name", 0, frozenset({"Name"}))]
    replay = ReplayUser(said, pool, Pool(), "0")
    assert replay.tell("ask_who", ("Name",), {"Name": "Ann"}).text == "It is for Ann."
    stranger = ReplayUser([], pool, Pool(), "0")
    assert stranger.tell("ask_name", ("Name",), {"Name": "Bo"}).source == "value"
    pool.add(said[0], [("Name", "Ann")])
    assert stranger.tell("ask_name", ("Name",), {"Name": "Bo"}).text == "It is for Bo."


def test_reactions_come_from_humans_of_the_task_then_of_all_tasks():
    mine, everyone = Pool(), Pool()
    everyone.add(Said("ok thanks", "ask_name", 0), [])
    everyone.add(Said("No, that's all.", "anything_else", 0), [])
    everyone.add(Said("I already told you my name!", "ask_name", 0), [])
    mine.add(Said("Great!", "ask_name", 0), [])
    replay = ReplayUser([], mine, everyone, "0")
    assert replay.acknowledge().text == "Great!"
    assert replay.closing("anything_else", 0).text == "No, that's all."
    assert replay.complain().text == "I already told you my name!"


def test_own_words_are_said_once_and_in_their_segment():
    said = [Said("Is it full?", "report", 1), Said("And at 9?", "report", 1)]
    replay = ReplayUser(said, Pool(), Pool(), "0")
    assert replay.react("report", 0, {}).source == "generic"
    assert [replay.react("report", 1, {}).text for _ in range(2)] == ["Is it full?", "And at 9?"]
    assert replay.react("report", 1, {}).source == "generic"
    assert replay.go_on("report", 1, {}).text == "And at 9?"


def test_what_own_words_leave_out_follows_as_bare_values():
    said = [Said("I am Ann.", "ask_name", 0, frozenset({"Name"}))]
    replay = ReplayUser(said, Pool(), Pool(), "0")
    answer = replay.tell("ask_all", ("Name", "Id"), {"Name": "Ann", "Id": "X7"})
    assert (answer.text, answer.tells) == ("I am Ann., X7", {"Name", "Id"})


def test_a_turn_that_fits_is_acknowledged_and_own_words_are_said_once():
    said = [Said("Hello there.", "greet", 0)]
    replay = ReplayUser(said, Pool(), Pool(), "0")
    assert replay.react("look", 0, {}, fits=True).text == "Okay."
    assert replay.react("look", 0, {}).text == "Sorry, what?"
    assert replay.once("Hello there.").source == "own"
    assert replay.once("Hello there.") is None


def test_equal_keys_borrow_the_same_words_whatever_was_said_between():
    pool = Pool()
    for number in range(40):
        pool.add(Said(f"Number {chr(97 + number % 26)}{chr(97 + number // 26)} please.", "ask_what", 0), [])
        pool.add(Said(f"Make it {chr(97 + number % 26)}{chr(97 + number // 26)}.", "offer", 0), [])

    def words(key, strategies):
        replay = ReplayUser([], pool, Pool(), key)
        return [replay.react(strategy, 0, {}).text for strategy in strategies]

    short, long = words("g/1", ["offer", "offer"]), words("g/1", ["ask_what", "offer", "ask_what", "offer"])
    assert short == [long[1], long[3]]
    assert len({tuple(words(f"g/{seed}", ["offer", "offer"])) for seed in range(20)}) > 15
