import pytest

from evaluation import scoring


@pytest.mark.parametrize(
    "metric, answer, expected, score",
    [
        ("string_match_all", " 1234, and 99", ["1234", "5678"], 0.5),
        ("string_match_all", "The Words: APPLE", ["apple"], 1),
        ("string_match_part", "Paris, of course", ["Lyon", "paris"], 1),
        ("string_match_part", "Nice", ["Lyon", "paris"], 0),
        ("substring_exact_match", "It is The  Eiffel-Tower!", ["Eiffel Tower", "a EiffelTower"], 1),
        ("qa_f1", "the red car", ["a red bus", "blue"], 0.5),
        ("qa_f1", "nothing", ["a red bus"], 0),
        ("qa_f1_first_line", "\nred bus\nblue car", ["a red bus"], 1),
        ("count", "5 or 6", ["5"], 0.5),
        ("count", "none", ["5"], 0),
        ("retrieval", "Paragraph 12, Paragraph 3", ["Paragraph 12"], 0.5),
        ("first_number", "The pass key is 00731.", ["00731"], 1),
        ("first_number", "731", ["00731"], 0),
        ("first_number", "it is 3.50", ["3.5"], 1),
        ("choice", "B. the second", ["the second", "B"], 1),
        ("choice", "The answer is: C", ["the second", "B"], 0),
        ("choice", "I think that the answer is B", ["the second", "B"], 1),
        ("choice", "", ["the second", "B"], 0),
    ],
)
def test_scores(metric, answer, expected, score):
    assert scoring.score(metric, answer, expected) == pytest.approx(score)


def test_a_class_name_inside_the_right_one_does_not_count():
    classes = ["Date", "Other number", "number", "City"]
    assert scoring.classification("Other number\nCity", ["Other number"], classes) == 1
    assert scoring.classification("Date or City", ["City"], classes) == 0.5
    assert scoring.classification("Date", ["City"], classes) == 0
