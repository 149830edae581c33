"""Pictures show all that they are made of: axes begin and end beyond the data, and nothing is told by color alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from made_runs import SGD, experiment, run

from perfedavg.methods import APFL, Ditto, FedAvg, FedPer, FedProx, FedRep, Reptile
from perfedavg.recording.runs import CurvePoint, FinishedRun
from perfedavg.settings import Phase, PhaseConfig, Population
from reporting.comparison import choose_reference
from reporting.figures import ACCURACY, Measure
from reporting.pictures.clients import draw_clients, in_order
from reporting.pictures.lines import draw_curves, draw_epochs
from reporting.pictures.methods import draw_methods
from reporting.pictures.theme import DARK, LIGHT, Theme, render, scale
from reporting.rows import Row, group_rows

METHODS = (FedAvg(), Ditto(), FedPer(), FedRep(), APFL(), FedProx())
LOSS = Measure("loss", "loss")


def rows_of(num_methods: int, fine_tuned: bool = False, num_seeds: int = 2) -> list[Row]:
    """Methods with some seeds and thirty clients a population, and a curve that rises to nearly 1."""
    runs = []
    for number, method in enumerate(METHODS[:num_methods]):
        for seed in range(num_seeds):
            generator = np.random.default_rng([number, seed])
            scores = [dict(enumerate(generator.uniform((0.1, 0.9), (0.6, 1.0), (30, 2)).tolist())) for _ in range(2)]
            fine_tune = Reptile() if fine_tuned and method.name == "fedavg" else None
            made = run(experiment(method, fine_tune, seed=seed), scores[0], scores[1], fingerprint=str(seed))
            points = [point(5 * n, 1 - 0.5**n, 1 - 0.1 * 0.5**n) for n in range(1, 5 if fine_tune else 3)]
            runs.append(dataclasses.replace(made, curve=tuple(points)))
    return group_rows(runs)


def point(round_number: int, initial: float, personalized: float) -> CurvePoint:
    phase = Phase.FEDAVG if round_number <= 10 else Phase.FINE_TUNE
    scores = [{"loss": 1.1 - value, "accuracy": value} for value in (initial, personalized)]
    return CurvePoint(phase, round_number, 30, *scores)


def drawn_outside(figure: Any) -> list[tuple[str, Any]]:
    """Lines of a figure with a point beyond their axes."""
    found = []
    for axes in figure.axes:
        (left, right), (bottom, top) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
        for line in axes.lines:
            if line.get_transform() != axes.transData:
                continue  # a guide from one end to the other
            x, y = (np.asarray(values, dtype=float) for values in line.get_data())
            inside = (x >= left) & (x <= right) & (y >= bottom) & (y <= top)
            found += [] if inside.all() else [(line.get_label(), line.get_data())]
    return found


def labels_of(figure: Any) -> set[str]:
    return {text.get_text() for legend in figure.legends for text in legend.get_texts()}


@pytest.mark.parametrize("num_methods", [1, 3, 6])
@pytest.mark.parametrize("measure", [ACCURACY, LOSS])
def test_curves_of_few_and_of_many_rows(num_methods: int, measure: Measure) -> None:
    """Of many, each has a panel of its own, with the others behind it."""
    rows = rows_of(num_methods, fine_tuned=True)
    draw = draw_curves(rows, measure)
    assert draw is not None
    figure = draw(LIGHT)
    assert drawn_outside(figure) == []
    if num_methods < 6:
        assert labels_of(figure) == {*(row.label for row in rows), "fine-tuning begins"}
        assert [axes.get_title() for axes in figure.axes] == ["initial", "personalized"]
    else:
        shown = [axes for axes in figure.axes if axes.axison]
        assert [axes.get_title(loc="left") for axes in shown] == [row.label for row in rows]
        assert {"initial", "personalized", "personalized, the other rows"} <= labels_of(figure)
        assert all(len({line.get_linestyle() for line in axes.lines}) > 1 for axes in shown), "also in grey print"


def test_lines_are_told_apart_without_color() -> None:
    draw = draw_curves(rows_of(5), ACCURACY)
    assert draw is not None
    styles = [(line.get_linestyle(), line.get_marker()) for line in draw(LIGHT).axes[0].lines]
    assert len(set(styles)) == len(styles) == 5


@pytest.mark.parametrize("num_methods", [1, 4])
def test_clients_stand_in_the_order_of_their_initial_scores(num_methods: int) -> None:
    rows = rows_of(num_methods)
    draw = draw_clients(rows, ACCURACY, Population.UNSEEN)
    assert draw is not None
    figure = draw(LIGHT)
    assert drawn_outside(figure) == []
    for axes, row in zip(figure.axes, rows, strict=True):
        better, worse, initial = axes.lines
        assert (np.diff(initial.get_ydata()) >= 0).all()
        assert len(better.get_ydata()) + len(worse.get_ydata()) == len(initial.get_ydata()) == 60
        (result,) = row.results_of(Population.UNSEEN).values()
        hurt = np.mean([one.fraction_hurt for one in result])
        assert len(worse.get_ydata()) == pytest.approx(60 * hurt)
        assert axes.get_title(loc="left").endswith(f": {100 * hurt:.1f} % worse")
        assert worse.get_marker() != better.get_marker()


def test_of_equal_initial_scores_the_personalized_decide() -> None:
    scores = np.array([[0.5, 0.2, 0.5, 0.5], [0.9, 0.1, 0.3, 0.6]])
    assert in_order(scores).tolist() == [[0.2, 0.5, 0.5, 0.5], [0.1, 0.3, 0.6, 0.9]]


def points_of(axes: Any) -> Sequence[tuple[float, float]]:
    return [tuple(pair) for line in axes.lines if line.get_marker() != "None" for pair in line.get_xydata().tolist()]


def test_methods_are_points_with_intervals() -> None:
    """Means over seeds and clients; the difference is of the same clients, and the reference has none."""
    rows = rows_of(3, fine_tuned=True)
    draw = draw_methods(rows, choose_reference(rows), ACCURACY)
    assert draw is not None
    figure = draw(LIGHT)
    initial, personalized, difference = figure.axes
    assert drawn_outside(figure) == []
    assert [text.get_text() for text in initial.get_yticklabels()] == [row.label for row in rows]
    bottom, top = initial.get_ylim()
    assert bottom > top, "the first row is on top"
    (place,) = [number for number, row in enumerate(rows) if row.label == "Ditto"]
    (results,) = rows[place].results_of(Population.UNSEEN).values()
    mean = np.mean([one.personalized["accuracy"] for one in results])
    found = [x for x, y in points_of(personalized) if y == pytest.approx(place - 0.2)]
    assert found == [pytest.approx(mean)]
    assert (len(points_of(initial)), len(points_of(personalized)), len(points_of(difference))) == (6, 6, 4)
    (reference,) = difference.texts
    assert (reference.get_text(), rows[int(reference.xy[1])].label) == ("reference", "FedAvg + Reptile")
    assert initial.get_xlim()[1] < 1.1, "no interval of two seeds ends above 100 %"
    assert labels_of(figure) == {"unseen clients, with 95 % interval", "clients that trained, with 95 % interval"}


def test_a_row_far_from_the_others_does_not_make_them_one_point() -> None:
    """Local training alone ends so far below, that all others would be drawn on top of each other: words say where."""
    alone = run(experiment(fedavg=PhaseConfig(0, 5, SGD, SGD)), dict.fromkeys(range(30), (0.1, 0.3)), fingerprint="0")
    rows = [*rows_of(2, fine_tuned=True, num_seeds=5), *group_rows([alone])]
    draw = draw_methods(rows, choose_reference(rows), ACCURACY)
    assert draw is not None
    _, personalized, difference = draw(LIGHT).axes
    assert personalized.get_xlim()[0] > 0.8
    assert [text.get_text() for text in personalized.texts] == ["\N{LEFTWARDS ARROW} 30.00 %"]
    assert [text.get_text()[:3] for text in difference.texts] == ["ref", "\N{LEFTWARDS ARROW} -"]


def test_a_single_client_is_a_point() -> None:
    rows = group_rows([run(experiment(method), {8: (0.5, 0.5)}) for method in (None, Ditto())])
    draw = draw_methods(rows, None, ACCURACY)
    assert draw is not None
    assert [len(points_of(axes)) for axes in draw(LIGHT).axes] == [2, 2]


def test_scores_by_epoch_come_after_what_the_run_did() -> None:
    """Nothing is trained before clients train alone."""
    alone = run(experiment(fedavg=PhaseConfig(0, 5, SGD, SGD)), {8: (0.1, 0.3)})
    ((phase, result),) = alone.results[Population.UNSEEN].items()
    by_epoch = ({"loss": 1.0, "accuracy": 0.1}, {"loss": 0.5, "accuracy": 0.3})
    measured = {Population.UNSEEN: {phase: dataclasses.replace(result, by_epoch=by_epoch)}}
    draw = draw_epochs(group_rows([dataclasses.replace(alone, results=measured)]), ACCURACY)
    assert draw is not None
    assert [axes.get_title() for axes in draw(LIGHT).axes] == ["after no training"]


def test_one_row_is_compared_with_nobody() -> None:
    assert draw_methods(rows_of(1), None, ACCURACY) is None


@pytest.mark.parametrize(
    ("values", "added"),
    [((0.2, 0.99), " (stretched towards 100 %)"), ((0.2, 1.0), " (stretched towards 100 %)"), ((0.93, 0.99), "")],
)
def test_an_axis_shows_how_accuracies_differ(values: tuple[float, float], added: str) -> None:
    """From a little below the least, not from 0; near 1, where they are high and far apart, in terms of errors."""
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    assert scale(axes, "y", np.array(values), ACCURACY, stretches=True) == added
    low, high = axes.get_ylim()
    assert low < values[0] < values[1] < high
    if not added:
        assert (values[0] - low, high - values[1]) == (pytest.approx(0.0024), pytest.approx(0.0024))
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert len(ticks) >= 4
    figure_places = axes.transData.transform([(0, tick) for tick in ticks])[:, 1]
    assert (np.diff(figure_places) > 8).all(), "numbers do not lie on each other"


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_all_are_drawn_for_light_and_dark_pages(theme: Theme) -> None:
    rows = rows_of(3, fine_tuned=True)
    draws = [
        draw_curves(rows, ACCURACY),
        draw_clients(rows, ACCURACY, Population.TRAINED),
        draw_methods(rows, choose_reference(rows), ACCURACY),
    ]
    for draw in draws:
        assert draw is not None
        assert render(draw, theme).startswith(b"\x89PNG")


def test_runs_whose_clients_are_not_known_have_no_such_pictures() -> None:
    bare: list[FinishedRun] = [dataclasses.replace(one, clients=None) for row in rows_of(2) for one in row.runs]
    rows = group_rows(bare)
    assert draw_clients(rows, ACCURACY, Population.UNSEEN) is None
    assert draw_methods(rows, None, ACCURACY) is None
