"""The table of an evaluation: the worst kind is marked, few pairs are an interval."""

from __future__ import annotations

from test_report import make_plan, text_of

from yopo.evaluation.evaluate import Accuracy, Evaluation, Kept, Part
from yopo.evaluation.fidelity import Fidelity, PairFidelity
from yopo.report.evaluation import ENOUGH, evaluation_report


def part(pairs: int, same: int, kl: float, *, has_answers: bool = True) -> Part:
    each = PairFidelity(2 * kl, 2, 2)
    accuracy = Accuracy(pairs, same, pairs) if has_answers else None
    return Part(accuracy, same, Fidelity((each,) * pairs))


def evaluation(kinds: dict[str, Part]) -> Evaluation:
    pairs = tuple(pair for kind in kinds.values() for pair in kind.fidelity.by_pair)
    same = sum(kind.same_answers for kind in kinds.values())
    answered = [kind.accuracy for kind in kinds.values() if kind.accuracy is not None]
    accuracy = Accuracy(len(pairs), same, len(pairs)) if answered else None
    return Evaluation(make_plan(), Kept(accuracy, same, Fidelity(pairs), kinds), None)


def test_kinds_have_rows_and_the_worst_is_marked() -> None:
    kinds = {"color": part(ENOUGH, 99, 0.01), "reading": part(10, 8, 0.2), "few": part(2, 1, 9.0)}
    lines = text_of(evaluation_report(evaluation(kinds), "pairs.jsonl"))
    rows = {line.split()[0 if line[0] != ">" else 1]: line for line in lines if line}
    assert rows["color"].split()[1:] == ["100", "100", "99", "99", *"99.0 % 100.0 % 0.0100".split()]
    assert rows["reading"].startswith("> ") and "44-97 %" in rows["reading"]
    assert not rows["few"].startswith(">") and "1-99 %" in rows["few"]
    assert max(map(len, lines)) <= 80


def test_one_kind_needs_no_table_and_no_answers_no_columns() -> None:
    lines = "\n".join(text_of(evaluation_report(evaluation({"all": part(9, 9, 0.1)}), "pairs")))
    assert "worst" not in lines
    kinds = {name: part(9, 9, 0.1, has_answers=False) for name in ("one", "two")}
    lines = "\n".join(text_of(evaluation_report(evaluation(kinds), "pairs")))
    assert "worst" in lines and "right answers" not in lines and "accuracy" not in lines


def test_json_has_the_kinds_and_the_worst() -> None:
    kinds = {"color": part(ENOUGH, 99, 0.01), "reading": part(10, 8, 0.2)}
    document = evaluation(kinds).to_dict()
    assert document["worst_kind"] == "reading" and document["pairs"] == ENOUGH + 10
    reading = document["by_kind"]["reading"]
    assert reading["same_answers"] == 8 and reading["whole_answers"] == 10
    assert reading["same_answers_interval"] == [0.443905, 0.974789]
    assert reading["accuracy"] == {"dense": 10, "pruned": 8, "total": 10}
