"""An evaluation with a protocol gives the same tables on several processes and after a stop, on every page."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_export import BOX, DATA, write_golden_export
from layouts import write_davis, write_grefs, write_long_rvos, write_refcoco, write_revos
from PIL import Image
from plugin import installed
from protocol_sets import leaves
from sparse_layouts import write_a2d, write_jhmdb

from flowmask.launch.progress import show_scores
from flowmask.models.errors import DataError
from flowmask.trainer.score.evaluate import evaluate, fingerprint_now
from flowmask.trainer.score.evaluate_config import EvaluateConfig

OWN = """
from flowmask.trainer.score.protocols.base import PerAnswer

class Answered(PerAnswer):
    conventions, sources = ("own",), ("mevis",)

    def of_answer(self, video, answer):
        return {"answered": answer.answered}

    def tables(self, entries):
        return {"own": {"all": {"answered": 100 * sum(entry["answered"] for entry in entries) / len(entries)}}}
"""


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_golden_export(tmp_path_factory.mktemp("golden"))


def _config(export: Path, out: Path, **changes: Any) -> EvaluateConfig:
    settings = {
        "out": out,
        "checkpoint": str(export),
        "data": {"source": "mevis", "root": DATA, "split": "valid_u"},
        "box": BOX,
        "precision": "fp32",
        "device": "cpu",
        "report_examples": 1,
    }
    return EvaluateConfig.model_validate(settings | changes)


def test_shared_out_or_resumed_the_tables_are_those_of_one_process(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = evaluate(_config(export, tmp_path / "alone", protocol="mevis"))
    assert alone is not None and alone.protocol is not None
    for world in (2, 3):
        config = _config(export, tmp_path / f"shared{world}", protocol="mevis")
        made = [evaluate(config, rank=rank, world=world) for rank in reversed(range(world))]
        assert [scores for scores in made if scores is not None] == [alone]

    def stop_at_second(_what: str, done: int, _total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    resumed = _config(export, tmp_path / "resumed", protocol="mevis")
    with pytest.raises(KeyboardInterrupt):
        evaluate(resumed, on_progress=stop_at_second)
    assert evaluate(resumed) == alone
    written = json.loads((tmp_path / "alone/scores.json").read_text())
    table = written["protocol"]["tables"]["all_expressions"]["all"]
    assert written["protocol"]["name"] == "mevis" and written["protocol"]["convention"] == "all_expressions"
    assert [table[name] for name in ("j", "f", "jf")] == pytest.approx([written[name] for name in ("j", "f", "jf")])
    assert (table["n_acc"], table["final"]) == (None, None)  # every sentence has a target
    page = (tmp_path / "alone/report.html").read_text()
    assert "Protocol mevis" in page and re.search(rf"<th>J&amp;F<td[^>]*>{table['jf']:.2f}", page)
    show_scores(alone, tmp_path / "alone")
    assert "convention all_expressions" in capsys.readouterr().out.replace("\n", " ")


def test_without_a_protocol_an_evaluation_is_called_as_before_and_masks_do_not_depend_on_it(
    export: Path, tmp_path: Path
) -> None:
    parts = {"weights": {"dit": "d", "mask_decoder": "m"}, "wan_files": "w"}
    plain, named = (_config(export, tmp_path / name, protocol=p) for name, p in (("a", None), ("b", "mevis")))
    assert fingerprint_now(plain, **parts) != fingerprint_now(named, **parts)
    one, other = evaluate(plain), evaluate(named)
    assert one is not None and other is not None and one.protocol is None
    assert json.loads((plain.out / "scores.json").read_text())["protocol"] is None
    pngs = [path.relative_to(plain.out) for path in sorted(plain.out.rglob("*.png"))]
    assert pngs and all((plain.out / png).read_bytes() == (named.out / png).read_bytes() for png in pngs)
    assert one.per_expression == other.per_expression


def test_a_dataset_without_masks_is_refused_before_any_weights_are_read(tmp_path: Path) -> None:
    shutil.copytree(DATA, tmp_path / "data")
    (tmp_path / "data/valid_u/mask_dict.json").unlink()
    data = {"source": "mevis", "root": tmp_path / "data", "split": "valid_u"}
    with pytest.raises(DataError, match=r"^protocol is 'mevis', which needs true masks; video vidA has none"):
        evaluate(_config(tmp_path / "no_such_weights", tmp_path / "e", data=data, protocol="mevis"))
    assert not (tmp_path / "e").exists()


def test_label_maps_of_ref_davis17_are_published_and_go_with_the_protocol(export: Path, tmp_path: Path) -> None:
    write_davis(tmp_path / "data")
    data = {"source": "ref_davis17", "root": tmp_path / "data", "split": "valid"}
    out = tmp_path / "e"
    scores = evaluate(_config(export, out, data=data, protocol="ref_davis17"))
    assert scores is not None and scores.protocol is not None
    assert list(scores.protocol["tables"]) == ["unsupervised", "semi_supervised", "per_expression"]
    assert scores.protocol["tables"]["per_expression"]["all"]["jf"] == pytest.approx(scores.totals["jf"])
    for annotator in range(4):
        for path in sorted((out / "labels/blackswan" / str(annotator)).iterdir()):
            masks = [
                np.asarray(Image.open(out / f"masks/blackswan/{4 * thing + annotator}" / path.name)) for thing in (0, 1)
            ]
            assert np.array_equal(np.asarray(Image.open(path)) > 0, (masks[0] > 0) | (masks[1] > 0))
    assert len(list(out.glob("labels/*/*/*.png"))) == 12
    evaluate(_config(export, out, data=data))
    assert not (out / "labels").exists()
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) == [
        *("masks", "overlays", "report.html", "scores.json")
    ]


LAYOUTS = {
    "revos": (write_revos, "revos", "valid", {"referring", "reason", "overall"}),
    "long_rvos": (write_long_rvos, "long_rvos", "valid", {"static", "dynamic", "hybrid", "overall"}),
    "refcoco": (write_refcoco, "refcoco", "refcoco/unc/val", {"all"}),
    "grefcoco": (lambda root: (write_refcoco(root), write_grefs(root)), "refcoco", "grefcoco/unc/train", {"all"}),
    "a2d_sentences": (write_a2d, "a2d_sentences", "train", {"all"}),
    "jhmdb_sentences": (write_jhmdb, "jhmdb_sentences", "test", {"all"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_dataset_in_its_published_layout_is_scored_by_its_protocol(name: str, export: Path, tmp_path: Path) -> None:
    write, source, split, rows = LAYOUTS[name]
    root = tmp_path / "data"
    root.mkdir()
    write(root)
    data = {"source": source, "root": root, "split": split}
    scores = evaluate(_config(export, tmp_path / "e", data=data, protocol=name, report_examples=0))
    assert scores is not None and scores.protocol is not None
    tables = json.loads((tmp_path / "e/scores.json").read_text())["protocol"]["tables"]
    assert all(table.keys() == rows for table in tables.values())
    known = [value for value in leaves(tables).values() if value is not None]
    assert known and all(0 <= value <= 100 for value in known)


@pytest.fixture
def package(tmp_path: Path) -> Iterator[None]:
    entry = {"name": "share", "value": "own_protocol:Answered"}
    with installed(tmp_path / "site", group="flowmask.protocols", source=OWN, **entry):
        yield


@pytest.mark.usefixtures("package")
def test_a_protocol_of_an_installed_package_is_one_class(export: Path, tmp_path: Path) -> None:
    scores = evaluate(_config(export, tmp_path / "e", protocol="share"))
    assert scores is not None and scores.protocol is not None
    assert scores.protocol["tables"] == {"own": {"all": {"answered": 100.0}}}
    assert "Protocol share" in (tmp_path / "e/report.html").read_text()
