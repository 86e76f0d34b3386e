"""Error reports, the rotation audit, comparisons, pictures and pages."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from steradian.evaluation import plots
from steradian.evaluation.errors import ErrorReport, evaluate
from steradian.evaluation.report import FIGURES, Evaluated, compare, render_report, write_report
from steradian.evaluation.rotations import random_orthogonal, rotation_audit
from steradian.evaluation.tables import Table, format_number, format_percent
from steradian.units import KCAL_PER_MOL
from tests.unit.evaluation_fakes import PairPotential, molecules


@pytest.fixture(scope="module")
def structures():
    return molecules(30)


@pytest.fixture(scope="module")
def report(structures):
    return evaluate(PairPotential(), structures, batch=7, progress=False, name="pair")


# -------------------------------------------------------------------------------------------------------------- report


def test_totals_do_not_depend_on_the_batch(structures, report):
    other = evaluate(PairPotential(), structures, batch=30, progress=False)
    assert other.total == pytest.approx(report.total, rel=1e-12)


def test_parts_make_up_the_whole(structures, report):
    elements = report.per_element
    atoms = sum(found["num_atoms"] for found in elements.values())
    assert atoms == sum(len(structure.numbers) for structure in structures)
    mean = sum(found["num_atoms"] * found["forces_mae"] for found in elements.values()) / atoms
    assert mean == pytest.approx(report.total["forces_mae"])
    assert max(found["forces_max"] for found in elements.values()) == report.total["forces_max"]
    assert set(report.per_config_type) == {"cold", "warm", "hot"}
    kinds = report.per_config_type.values()
    mean = sum(found["num_structures"] * found["energy_mae"] for found in kinds) / 30
    assert mean == pytest.approx(report.total["energy_mae"])
    by_hand = evaluate(PairPotential(), [s for s in structures if s.config_type == "hot"], progress=False)
    assert report.per_config_type["hot"]["forces_q95"] == pytest.approx(by_hand.total["forces_q95"])


def test_worst_structure_names_the_atom(structures):
    spoiled = list(structures)
    forces = spoiled[11].forces.copy()
    forces[2] += [0.0, 3.0, 4.0]
    spoiled[11] = replace(spoiled[11], forces=forces)
    found = evaluate(PairPotential(), spoiled, progress=False, num_worst=3).worst
    assert len(found) == 3
    assert (found[0].index, found[0].atom, found[0].config_type) == (11, 2, structures[11].config_type)
    assert found[0].force_error == pytest.approx(5.0, abs=0.3)
    assert found[0].element == {1: "H", 6: "C", 8: "O"}[int(structures[11].numbers[2])]
    assert found[0].force_error > found[1].force_error > found[2].force_error


def test_units_of_the_dictionary(report):
    entry = json.loads(json.dumps(report.to_dict(), allow_nan=False))["total"]["forces_mae"]
    assert entry["value"] == report.total["forces_mae"]
    assert entry["meV/Å"] == pytest.approx(1e3 * entry["value"])
    assert entry["kcal/mol/Å"] == pytest.approx(entry["value"] * 23.060548, rel=1e-6)
    low, high = entry["interval_95"]
    assert low < entry["value"] < high


def test_tables_show_both_units(report):
    text = report.text()
    assert format_number(1e3 * report.total["forces_q99"]) in text
    assert format_number(report.total["energy_mae"] / KCAL_PER_MOL) in text
    for word in ("meV/Å", "kcal/mol/Å", "Q95", "Q99", "MAX", "configuration type", "worst structures"):
        assert word in text


def test_saved_errors_come_back(report, tmp_path):
    report.save(tmp_path / "errors.npz")
    again = ErrorReport.load(tmp_path / "errors.npz")
    assert again.to_dict() == report.to_dict()
    assert [path.name for path in tmp_path.iterdir()] == ["errors.npz"]
    (tmp_path / "other.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not an npz file, or damaged"):
        ErrorReport.load(tmp_path / "other.npz")
    stored = dict(np.load(tmp_path / "errors.npz"))
    for changed in (
        {"meta": np.array("{")},
        {"meta": np.array("[]")},
        {"meta": np.array('{"name": "x"}')},
        {"numbers": stored["numbers"][1:]},
        {"numbers": stored["numbers"] + 200},
        {"atom_counts": stored["atom_counts"] - 5},
        {"force_error": stored["force_error"][:, :2]},
        {"energy_error": stored["energy_error"] * np.nan},
        {"has_energy": stored["has_energy"].astype(float)},
        {"other": np.zeros(2), "stress_error": np.zeros(3)},
    ):
        np.savez(tmp_path / "other.npz", **stored | changed)
        with pytest.raises(ValueError, match="not a file of errors") as caught:
            ErrorReport.load(tmp_path / "other.npz")
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match="cannot be read"):
        ErrorReport.load(tmp_path / "none.npz")


def test_the_mode_of_the_potential_is_kept(structures):
    potential = PairPotential().train()
    evaluate(potential, structures[:2], progress=False)
    assert potential.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: [], "the set is empty"),
        (lambda s: [replace(x, forces=None) for x in s], "labelled with forces .it has energy."),
        (lambda s: [replace(x, forces=None, energy=None) for x in s], "labelled with energy .it has no labels."),
    ],
)
def test_sets_that_cannot_be_evaluated(structures, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        evaluate(PairPotential(), change(structures), progress=False)
    assert "\n" not in str(caught.value)


def test_energies_alone(structures):
    bare = [replace(structure, forces=None) for structure in structures]
    found = evaluate(PairPotential(), bare, progress=False, require=("energy",))
    assert "forces_mae" not in found.total
    assert found.worst[0].atom is None
    assert "force" not in found.total_table().text().replace("energy and forces", "")


def test_mixed_labels_are_counted_where_they_are(structures, report):
    mixed = [replace(s, forces=None) if index % 2 else s for index, s in enumerate(structures)]
    found = evaluate(PairPotential(), mixed, progress=False)
    assert found.total["energy_mae"] == pytest.approx(report.total["energy_mae"])
    half = evaluate(PairPotential(), structures[::2], progress=False)
    assert found.total["forces_max"] == half.total["forces_max"]


class Broken(PairPotential):
    def forward(self, graph, **kwargs):
        found = super().forward(graph, **kwargs)
        found.forces[graph.numbers == 8] = float("nan")
        return found


def test_nan_names_the_structure_and_the_atom(structures):
    first = next(index for index, structure in enumerate(structures) if 8 in structure.numbers)
    atom = int(np.flatnonzero(structures[first].numbers == 8)[0])
    with pytest.raises(ValueError, match=rf"forces on atom {atom} \(O\) .* structure {first} ") as caught:
        evaluate(Broken(), structures, progress=False)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------- rotations


def test_random_orthogonal_matrices_are_haar():
    for reflections, sign in ((False, 1.0), (True, -1.0)):
        found = random_orthogonal(4000, reflections=reflections, seed=2)
        unit = torch.eye(3, dtype=torch.float64).expand_as(found)
        assert torch.allclose(found @ found.transpose(1, 2), unit, atol=1e-12)
        assert torch.allclose(torch.linalg.det(found), torch.full((4000,), sign, dtype=torch.float64))
        # Haar: the mean vanishes, E[R_ij^2] = 1/3, and the trace of a rotation has mean 0 and variance 1
        assert found.mean(dim=0).abs().max() < 0.04
        assert (found.square().mean(dim=0) - 1 / 3).abs().max() < 0.02
        trace = found.diagonal(dim1=1, dim2=2).sum(dim=1)
        assert abs(float(trace.mean())) < 0.06
        assert float(trace.var()) == pytest.approx(1.0, abs=0.08)
    assert torch.equal(random_orthogonal(3, seed=5), random_orthogonal(3, seed=5))


def test_audit_passes_an_invariant_potential(structures):
    audit = rotation_audit(PairPotential(dtype=torch.float32), structures, num_rotations=4, max_structures=5)
    assert audit.exact
    assert audit.summary().startswith("Invariant")
    assert [(found.operation, found.dtype) for found in audit.figures] == [
        ("rotations", "float64"),
        ("reflections", "float64"),
        ("rotations", "float32"),
        ("reflections", "float32"),
    ]
    double, single = audit.figures[0], audit.figures[2]
    assert double.force_max < 1e-12
    assert 1e-9 < single.force_max < 1e-4
    assert double.count == 20
    assert audit.num_structures == 5


def test_audit_finds_a_potential_tied_to_the_laboratory(structures):
    small, large = (
        rotation_audit(PairPotential(tilt=tilt), structures, num_rotations=4, max_structures=5) for tilt in (1e-3, 1e-2)
    )
    assert not small.exact
    assert large.summary().startswith("Not invariant")
    assert len(large.figures) == 2  # own precision is float64 already
    for name in ("energy_mean", "energy_max", "force_mean", "force_max"):
        ratio = getattr(large.figures[0], name) / getattr(small.figures[0], name)
        assert ratio == pytest.approx(10, rel=0.01)  # the violation is linear in the tilt
    assert large.force_ratio == pytest.approx(large.figures[0].force_mean / large.force_error, rel=0.2)
    json.dumps(large.to_dict())


class Chiral(PairPotential):
    """Invariant under rotations only: feels the handedness of the first three neighbours of atom 0."""

    def forward(self, graph, **kwargs):
        found = super().forward(graph, **kwargs)
        vectors = graph.positions[1:4] - graph.positions[0]
        hand = torch.linalg.det(vectors)
        return replace(found, interaction_energy=found.interaction_energy + 1e-3 * hand.double())


def test_audit_tells_reflections_from_rotations():
    large = [structure for structure in molecules(20, seed=4) if len(structure.numbers) >= 5][:3]
    found = rotation_audit(Chiral(), large, num_rotations=3, batch=1).figures
    assert found[0].energy_max < 1e-12
    assert found[1].energy_max > 1e-5


def test_audit_does_not_touch_the_potential(structures):
    potential = PairPotential(dtype=torch.float32).train()
    rotation_audit(potential, structures[:2], num_rotations=2)
    assert potential.strength.dtype == torch.float32
    assert potential.training
    with pytest.raises(ValueError, match="at least one structure"):
        rotation_audit(potential, [])


# ------------------------------------------------------------------------------------------------------------- compare


def test_relative_differences_are_those_of_the_figures(structures, report):
    other = evaluate(PairPotential(1.05), structures, progress=False, name="better")
    found = compare(report, other, num_samples=200)
    for name in FIGURES:
        expected = other.total[name] / report.total[name] - 1
        assert found.differences[0][name].relative == pytest.approx(expected)
    assert found.differences[0]["forces_mae"].significant
    assert found.differences[0]["forces_mae"].high < 0
    assert found.differences[0]["forces_max"].significant is None
    assert format_percent(found.differences[0]["energy_mae"].relative) in found.table().text()
    assert compare(report, other, num_samples=50, seed=3) == compare(report, other, num_samples=50, seed=3)
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_difference_by_chance_is_not_called_significant(structures, report):
    generator = np.random.default_rng(5)
    swapped = generator.permutation(np.repeat([1.0, -1.0], 15))
    scale = 1 + 0.05 * swapped  # half of the structures worse, half better
    arrays = report.arrays
    noisy = replace(
        arrays,
        force_error=arrays.force_error * scale[arrays.structure_of_atom][:, None],
        energy_error=arrays.energy_error * scale,
    )
    other = replace(report, arrays=noisy, name="same")
    found = compare(report, other).differences[0]
    assert not found["forces_mae"].significant
    # paired: the same structures for both, so the interval is far narrower than that of either figure
    low, high = report.intervals["forces_mae"]
    width = found["forces_mae"].high - found["forces_mae"].low
    assert width < 0.5 * (high - low) / report.total["forces_mae"]


def test_a_model_does_not_differ_from_itself(report):
    found = compare(report, report, num_samples=20)
    assert all(each.relative == 0 and not each.significant for each in found.differences[0].values())
    assert "no difference beyond chance" in found.summary()[0]


def test_different_structures_are_not_compared(structures, report):
    other = evaluate(PairPotential(), structures[::-1], progress=False, name="reversed")
    with pytest.raises(ValueError, match="different structures"):
        compare(report, other)
    with pytest.raises(ValueError, match="at least two"):
        compare(report)


# --------------------------------------------------------------------------------------------------- pictures and pages


@pytest.fixture(scope="module")
def page_models(structures):
    logs = {"validation/forces_mae": (np.arange(20.0), np.geomspace(0.3, 0.02, 20))}
    models = []
    for name, strength, tilt in (("bare <host>", 1.0, 0.0), ("gated", 1.05, 0.01)):
        potential = PairPotential(strength, tilt)
        found = evaluate(potential, structures, progress=False, name=name)
        audit = rotation_audit(potential, structures, num_rotations=2, max_structures=3)
        models.append(Evaluated(found, audit, logs, {"parameters": "2"}, "model:\n  host: <pair>\n"))
    return models


def test_page_holds_everything_and_needs_no_network(page_models, tmp_path):
    write_report(tmp_path / "report.html", page_models, data="made up & small")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in ("bare &lt;host&gt;", "gated", "made up &amp; small", "Rotation audit", "Not invariant", "Training"):
        assert text in page
    for text in ("F Q99", "95 % interval", "parameters", "host: &lt;pair&gt;", "worst structures", "kcal/mol/Å"):
        assert text in page
    assert page.count("data:image/png;base64,") == 5
    assert "<script" not in page
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", page)
    assert not re.search(r"https?://|url\(|@import", page)
    assert page.count("<table>") == page.count("</table>") >= 8


def test_page_of_one_model_without_audit_or_training(structures):
    bare = [replace(structure, forces=None) for structure in structures]
    found = evaluate(PairPotential(), bare, progress=False, require=("energy",), name="only")
    page = render_report([Evaluated(found)])
    assert "Rotation audit" not in page
    assert "Training" not in page
    assert page.count("data:image/png;base64,") == 1
    with pytest.raises(ValueError, match="at least one"):
        render_report([])


@pytest.mark.parametrize("draw", [plots.parity, plots.violins, plots.cumulative_errors, plots.element_bars])
@pytest.mark.parametrize("count", [1, 3])
def test_pictures_label_models_and_units(report, draw, count, tmp_path):
    reports = [replace(report, name=f"model {index}") for index in range(count)]
    figure = draw(reports)
    plots.save(figure, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    words = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    assert any("meV" in word or "eV/Å" in word for word in words)
    for index in range(count):
        assert any(f"model {index}" in word for word in words)


def test_pictures_of_errors_that_are_all_zero(structures):
    perfect = [replace(s, config_type="x") for s in structures[:3]]
    found = evaluate(PairPotential(1.1), perfect, progress=False)
    arrays = replace(found.arrays, force_error=0 * found.arrays.force_error, energy_error=0 * found.arrays.energy_error)
    zero = replace(found, arrays=arrays)
    for draw in (plots.parity, plots.violins, plots.cumulative_errors, plots.element_bars):
        assert plots.png(draw([zero]))


def test_training_log_with_gaps(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,train/loss,validation/forces_mae\n0,3.0,\n0,,0.2\n1,1.5,\n1,,0.1\n")
    found = plots.read_metrics(path)
    assert found["validation/forces_mae"][0].tolist() == [0, 1]
    assert found["train/loss"][1].tolist() == [3.0, 1.5]
    figure = plots.learning_curves({"a": found, "b": {}})
    assert figure.axes[0].lines[0].get_ydata().tolist() == [200.0, 100.0]
    assert plots.png(figure)
    path.write_text("epoch\n")
    with pytest.raises(ValueError, match="holds no metrics"):
        plots.read_metrics(path)


def test_plotting_leaves_matplotlib_alone(report):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    plots.png(plots.violins([report]))
    assert dict(mpl.rcParams) == before


def test_numbers_and_tables():
    shown = [format_number(value) for value in (12.345, 1234.5, 0.00123, 0, -1.5, float("nan"), 3e-7, 2e8)]
    assert shown == ["12.3", "1234", "0.00123", "0", "−1.50", "–", "3.00e−07", "2.00e+08"]
    assert format_percent(-0.0614) == "−6.1 %"
    table = Table("t", ["name", "x"], [["[a]", "1"], ["b<", "22"]], note="n")
    assert "[a]    1" in table.text()
    assert "b&lt;" in table.html()
