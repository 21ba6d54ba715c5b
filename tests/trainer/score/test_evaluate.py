"""Evaluation: scores, masks, how often inputs are read, and results after a stop or with another checkpoint."""

import errno
import json
import os
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from disturbed import contents
from golden_export import BOX, DATA, PARITY, write_golden_export
from PIL import Image
from safetensors.torch import load_file, save_file
from seals import rewrite

from flowmask.data_pipeline.config import DataSourceConfig
from flowmask.data_pipeline.formats.names import same_file
from flowmask.data_pipeline.sources import open_source
from flowmask.models import segment
from flowmask.models.errors import CheckpointError, ConfigError, WeightsError
from flowmask.models.mask_decoder import MaskDecoder
from flowmask.models.segment import Segmenter
from flowmask.models.text import TextEncoder
from flowmask.models.vae import latent_frames
from flowmask.trainer.predict import inference
from flowmask.trainer.score.evaluate import _offer, evaluate
from flowmask.trainer.score.evaluate_config import EvaluateConfig
from flowmask.trainer.score.judging import shuffled_partners
from flowmask.trainer.score.store import EvaluationStore
from flowmask.trainer.state.run_folder import RunFolder
from flowmask.trainer.track import spool

OLDER = Path(__file__).parents[2] / "golden" / "older"
EXPECTED = json.loads((PARITY / "e2e" / "expected.json").read_text())


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_golden_export(tmp_path_factory.mktemp("golden"))


def _config(export: Path, out: Path, **changes: Any) -> EvaluateConfig:
    return EvaluateConfig.model_validate(
        {
            "out": out,
            "checkpoint": str(export),
            "data": {"source": "mevis", "root": DATA, "split": "valid_u"},
            "box": BOX,
            "precision": "fp32",
            "device": "cpu",
        }
        | changes
    )


def _masks(out: Path) -> dict[str, np.ndarray]:
    return {
        str(path.relative_to(out / "masks")): np.asarray(Image.open(path))
        for path in sorted((out / "masks").rglob("*.png"))
    }


def _encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Collects the shapes of all videos that are encoded from now on."""
    seen: list[tuple[int, ...]] = []
    encode = Segmenter.encode_video

    def counted(self: Segmenter, pieces: Iterable[torch.Tensor]) -> torch.Tensor:
        whole = torch.cat(list(pieces), dim=2)
        seen.append(tuple(whole.shape))
        return encode(self, latent_frames(whole))

    monkeypatch.setattr(Segmenter, "encode_video", counted)
    return seen


@pytest.mark.parametrize("steps", [1, 4])
def test_scores_are_those_of_the_recorded_evaluation(export: Path, tmp_path: Path, steps: int) -> None:
    scores = evaluate(_config(export, tmp_path / "e", sampler={"steps": steps}))
    assert scores is not None
    wanted = EXPECTED[f"steps_{steps}"]
    assert scores.per_expression.keys() == wanted["per_expression"].keys()
    for key, entry in wanted["per_expression"].items():
        got = scores.per_expression[key]
        assert got["j"] == pytest.approx(100 * entry["J"], abs=0.2)
        assert got["f"] == pytest.approx(100 * entry["F"], abs=0.2)
        assert got["jf"] == pytest.approx((got["j"] + got["f"]) / 2)
    assert scores.totals["jf"] == pytest.approx(np.mean([e["jf"] for e in scores.per_expression.values()]))


def test_equal_sentences_of_two_videos_keep_two_scores(export: Path, tmp_path: Path) -> None:
    source = open_source(DataSourceConfig(source="mevis", root=DATA, split="valid_u"))
    texts = [expression.text for video in source.videos() for expression in video.expressions]
    assert len(set(texts)) < len(texts)
    scores = evaluate(_config(export, tmp_path / "e"))
    assert scores is not None and len(scores.per_expression) == scores.expressions == len(texts)


def test_each_video_is_encoded_once_whatever_its_number_of_sentences(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = _encoded(monkeypatch)
    evaluate(_config(export, tmp_path / "e", shuffled_text=True))
    assert encoded == [(1, 3, 9, 32, 32), (1, 3, 9, 32, 16)]


def test_windows_as_long_as_the_videos_score_as_the_whole_and_shorter_ones_are_another_evaluation(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(_config(export, tmp_path / "whole"))
    one = evaluate(_config(export, tmp_path / "one", window={"frames": 9, "overlap": 4}))
    assert whole is not None and one is not None
    assert one.per_expression == whole.per_expression and one.presences == whole.presences
    assert contents(tmp_path / "one" / "masks") == contents(tmp_path / "whole" / "masks")
    encoded, out = _encoded(monkeypatch), tmp_path / "cut"
    texts, embed = list[str](), TextEncoder.__call__
    monkeypatch.setattr(TextEncoder, "__call__", lambda self, text, **of: texts.append(text) or embed(self, text, **of))
    several = evaluate(_config(export, out, window={"frames": 5, "overlap": 0}))
    assert len(texts) == len({*texts}) > 1, "no sentence is encoded again for the next window"
    assert several is not None and len({found.fingerprint for found in (whole, one, several)}) == 3
    assert encoded == [(1, 3, 5, 32, 32)] * 2 + [(1, 3, 5, 32, 16)] * 2
    assert several.per_expression.keys() == whole.per_expression.keys() and several.totals != whole.totals
    assert _masks(out).keys() == _masks(tmp_path / "whole").keys()


def test_a_protocol_that_needs_the_logits_of_whole_videos_refuses_windows(tmp_path: Path) -> None:
    data = {"source": "ref_davis17", "root": tmp_path, "split": "valid"}
    fine = {"protocol": "ref_davis17", "data": data, "window": {"overlap": 4}}
    assert _config(tmp_path, tmp_path / "e", **fine).window.frames is None
    with pytest.raises(ConfigError, match=r"logits of the whole video, and window\.frames is 9; set window"):
        _config(tmp_path, tmp_path / "e", **fine | {"window": {"frames": 9, "overlap": 4}})


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The recorded videos with more sentences, some of them equal; equal ones of a video name different objects."""
    root = tmp_path_factory.mktemp("spoken") / "data"
    shutil.copytree(DATA, root)
    path = root / "valid_u" / "meta_expressions.json"
    meta = json.loads(path.read_text())
    for entry in meta["videos"].values():
        first, second = entry["expressions"].values()
        said = [first, second, {**first, "anno_id": second["anno_id"]}, {**second, "exp": "a red square"}, second]
        entry["expressions"] = {str(number): one for number, one in enumerate(said)}
    path.write_text(json.dumps(meta))
    return {"source": "mevis", "root": root, "split": "valid_u"}


def _results(out: Path) -> dict[str, bytes]:
    """The bytes of masks and scores."""
    return {name: found for name, found in contents(out).items() if name.startswith("masks/") or name == "scores.json"}


def test_neither_processes_nor_what_waits_changes_a_byte_of_masks_and_scores(
    export: Path, tmp_path: Path, spoken: dict[str, Any]
) -> None:
    found = {}
    for world, waiting in ((1, 1), (1, 2), (1, 5), (2, 4), (3, 2)):
        config = _config(
            export, tmp_path / f"{world}_{waiting}", data=spoken, sentences_per_batch=waiting, shuffled_text=True
        )
        for rank in reversed(range(world)):
            evaluate(config, rank=rank, world=world)
        found[world, waiting] = _results(config.out)
    wanted = found.pop((1, 1))
    assert all(results == wanted for results in found.values())
    alike = [{name for name in wanted if name.startswith(f"masks/vidA/{exp_id}/")} for exp_id in "02"]
    assert all(wanted[one] == wanted[other] for one, other in zip(*map(sorted, alike))) and len(alike[0]) == 6


def test_sentences_of_a_video_share_passes_of_the_models_and_equal_ones_share_their_latent(
    export: Path, tmp_path: Path, spoken: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five sentences, three of them different; the DiT takes two in a pass, the decoder one."""
    seen: dict[str, list[int]] = {"dit": [], "decoder": []}
    velocity, decode = segment.velocity, MaskDecoder.forward

    def counted(dit: Any, *, x_t: torch.Tensor, **more: Any) -> torch.Tensor:
        seen["dit"].append(len(x_t))
        return velocity(dit, x_t=x_t, **more)

    def decoded(self: MaskDecoder, latents: torch.Tensor) -> torch.Tensor:
        seen["decoder"].append(len(latents))
        return decode(self, latents)

    monkeypatch.setattr(segment, "velocity", counted)
    monkeypatch.setattr(MaskDecoder, "forward", decoded)
    config = _config(export, tmp_path / "e", data=spoken, max_videos=1, sampler={"steps": 2}, box=BOX)
    evaluate(config)
    assert seen == {"dit": [3, 3], "decoder": [3]}
    monkeypatch.setattr(inference, "sampled_together", lambda latent, text_tokens: 2)
    monkeypatch.setattr(inference, "decoded_together", lambda latent: 1)
    for kept in seen.values():
        kept.clear()
    evaluate(config.model_copy(update={"out": tmp_path / "again"}))
    assert seen == {"dit": [2, 2, 1, 1], "decoder": [1, 1, 1]}


def test_another_size_than_that_of_the_training_is_said_with_the_key_that_takes_it(tmp_path: Path) -> None:
    trained = {"height_px": 32, "width_px": 64}
    for number, (box, differs) in enumerate([(None, 0), (trained, 0), (trained | {"width_px": 80}, 1)]):
        said: list[str] = []
        config = {"mask_decoder": "vae", "model": {"wan": OLDER / "wan"}, "box": box, "max_videos": 1}
        evaluate(_config(OLDER / "run", tmp_path / f"{number}", **config), say=said.append)
        lines = [line for line in said if "resized" in line]
        assert len(lines) == differs
        assert all(line.endswith("resized into 32x64; to score at that size: box=null") for line in lines)


def test_an_archive_of_some_videos_is_said_to_be_one(export: Path, tmp_path: Path) -> None:
    said: list[str] = []
    evaluate(_config(export, tmp_path / "some", archive="mevis", max_videos=1), say=said.append)
    assert sum("submission.zip will hold the first 1 videos only" in line for line in said) == 1
    evaluate(_config(export, tmp_path / "all", archive="mevis"), say=said.append)
    assert sum("submission.zip will hold" in line for line in said) == 1


def test_masks_are_grey_pngs_of_the_videos_size_named_as_its_frames(export: Path, tmp_path: Path) -> None:
    evaluate(_config(export, tmp_path / "e"))
    masks = _masks(tmp_path / "e")
    source = open_source(DataSourceConfig(source="mevis", root=DATA, split="valid_u"))
    wanted = {
        f"{video.video_id}/{expression.exp_id}/{name}.png": video.size
        for video in source.videos()
        for expression in video.expressions
        for name in video.frame_names
    }
    assert {key: mask.shape for key, mask in masks.items()} == wanted
    assert {value for mask in masks.values() for value in np.unique(mask)} <= {0, 255}


def test_the_results_hold_nothing_of_an_earlier_evaluation(export: Path, tmp_path: Path) -> None:
    out = tmp_path / "e"
    evaluate(_config(export, out))
    both = set(_masks(out))
    scores = evaluate(_config(export, out, max_videos=1, sampler={"steps": 4}))
    assert scores is not None and scores.videos == 1
    assert set(_masks(out)) == {key for key in both if key.startswith("vidA/")}
    assert json.loads((out / "scores.json").read_text())["videos"] == 1


def test_an_evaluation_that_was_stopped_goes_on_and_ends_as_if_it_never_was(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_at_second(_what: str, done: int, _total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    whole = evaluate(_config(export, tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        evaluate(_config(export, tmp_path / "e"), on_progress=stop_at_second)
    assert not (tmp_path / "e" / "scores.json").exists()
    encoded = _encoded(monkeypatch)
    assert evaluate(_config(export, tmp_path / "e")) == whole
    assert len(encoded) == 1
    assert _masks(tmp_path / "e").keys() == _masks(tmp_path / "whole").keys()


def test_masks_of_other_settings_are_not_taken_for_finished_work(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_at_second(_what: str, done: int, _total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(_config(export, tmp_path / "e", sampler={"steps": 4}), on_progress=stop_at_second)
    encoded = _encoded(monkeypatch)
    evaluate(_config(export, tmp_path / "e"))
    assert len(encoded) == 2


def test_results_that_could_not_be_published_leave_the_older_ones_and_need_no_computing_again(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "e"
    evaluate(_config(export, out))
    wanted = evaluate(_config(export, tmp_path / "whole", sampler={"steps": 4}))
    for why in (errno.ENOSPC, errno.ENAMETOOLONG):
        before = {name: content for name, content in contents(out).items() if not name.startswith(".evaluate/")}
        with monkeypatch.context() as patched:
            refused = Mock(side_effect=OSError(why, os.strerror(why)))
            patched.setattr("flowmask.trainer.score.report.overlays.OverlayVideo", refused)
            with pytest.raises(ConfigError, match=os.strerror(why)):
                evaluate(_config(export, out, sampler={"steps": 4}))
        assert before.items() <= contents(out).items()
    encoded = _encoded(monkeypatch)
    assert evaluate(_config(export, out, sampler={"steps": 4})) == wanted
    assert not encoded


@pytest.mark.parametrize(
    "name",
    ["masks/mine.png", "masks/a/0/mine.png", "overlays/x.mp4", "config.yaml", "report.html", "scores.json", "dog"],
)
def test_a_folder_that_holds_something_else_is_refused_and_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match="not an evaluation but holds"):
        EvaluationStore(tmp_path, "0" * 16)
    assert contents(tmp_path) == {name: b"mine"}


def test_the_folder_of_a_run_is_no_place_for_an_evaluation(export: Path, tmp_path: Path) -> None:
    RunFolder(tmp_path).close()
    (tmp_path / "config.yaml").write_text("train: {}")
    with pytest.raises(ConfigError, match="is a run, not an evaluation"):
        evaluate(_config(export, tmp_path))
    assert (tmp_path / "config.yaml").read_text() == "train: {}"


def test_two_processes_share_the_videos_and_the_last_one_publishes(export: Path, tmp_path: Path) -> None:
    alone = evaluate(_config(export, tmp_path / "alone"))
    config = _config(export, tmp_path / "shared")
    assert evaluate(config, rank=1, world=2) is None
    assert not (tmp_path / "shared" / "scores.json").exists()
    assert evaluate(config, rank=0, world=2) == alone


def test_without_masks_the_predictions_are_written_and_no_score_is_claimed(export: Path, tmp_path: Path) -> None:
    shutil.copytree(DATA, tmp_path / "data")
    (tmp_path / "data" / "valid_u" / "mask_dict.json").unlink()
    data = {"source": "mevis", "root": tmp_path / "data", "split": "valid_u"}
    scores = evaluate(_config(export, tmp_path / "e", data=data, shuffled_text=True, decoder_score=True))
    assert scores is not None
    assert (scores.totals, scores.per_expression) == ({"j": None, "f": None, "jf": None}, {})
    assert scores.intervals is None and scores.slices is None
    assert "no score is possible" in scores.note
    assert "no score is possible" in (tmp_path / "e" / "report.html").read_text()
    assert len(_masks(tmp_path / "e")) == sum(
        len(video["frames"]) * len(video["expressions"])
        for video in json.loads((DATA / "valid_u" / "meta_expressions.json").read_text())["videos"].values()
    )


def test_a_wrong_sentence_names_no_object_of_the_right_one_and_is_always_the_same(tmp_path: Path) -> None:
    shutil.copytree(DATA, tmp_path / "data")
    meta_path = tmp_path / "data" / "valid_u" / "meta_expressions.json"
    meta = json.loads(meta_path.read_text())
    masks = list(json.loads((tmp_path / "data" / "valid_u" / "mask_dict.json").read_text()))
    video = meta["videos"]["vidA"]
    own = sorted({str(a) for e in video["expressions"].values() for a in e["anno_id"]})
    assert len(own) > 1, masks
    named = {"a": own[:1], "b": own[1:2], "c": own[:2], "d": own[:1]}
    video["expressions"] = {key: {"exp": f"thing {key}", "obj_id": [0], "anno_id": ids} for key, ids in named.items()}
    meta_path.write_text(json.dumps(meta))
    source = open_source(DataSourceConfig(source="mevis", root=tmp_path / "data", split="valid_u"))
    opened = source.videos()[0]
    chosen = [shuffled_partners(opened, seed=seed) for seed in range(20)]
    assert all(partners.keys() == {"a", "b", "d"} for partners in chosen), "c shares an object with all"
    assert all(partners["a"] == partners["d"] == "b" for partners in chosen)
    assert {partners["b"] for partners in chosen} == {"a", "d"}
    assert shuffled_partners(opened, seed=3) == chosen[3]


def test_the_score_of_wrong_sentences_is_over_the_same_expressions_as_the_right_ones(
    export: Path, tmp_path: Path
) -> None:
    scores = evaluate(_config(export, tmp_path / "e", shuffled_text=True, decoder_score=True))
    assert scores is not None and scores.shuffled_text is not None and scores.decoder is not None
    source = open_source(DataSourceConfig(source="mevis", root=DATA, split="valid_u"))
    partners = {
        f"{video.video_id}/{exp_id}" for video in source.videos() for exp_id in shuffled_partners(video, seed=0)
    }
    assert scores.shuffled_text["expressions"] == len(partners) > 0
    right = np.mean([scores.per_expression[key]["jf"] for key in partners])
    assert scores.shuffled_text["jf_right"] == pytest.approx(right)
    assert scores.shuffled_text["jf_shuffled"] != scores.shuffled_text["jf_right"]
    assert 0 <= scores.decoder["jf"] <= 100


def test_the_video_is_encoded_by_the_encoder_of_the_flowrvs_decoder_file(export: Path, tmp_path: Path) -> None:
    other = evaluate(_config(export, tmp_path / "e", mask_decoder="vae"))
    assert other is not None
    assert other.weights["mask_decoder"] == "vae"
    recorded = EXPECTED["steps_1"]["per_expression"]
    assert any(abs(other.per_expression[key]["j"] - 100 * recorded[key]["J"]) > 0.5 for key in recorded)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"wan": "/moved/wan"}, r"/moved/wan.*model\.wan"), ({"mask_decoder": "/moved/d"}, "/moved/d.*mask_decoder")],
)
def test_a_path_that_moved_is_one_line_that_names_the_override(
    export: Path, tmp_path: Path, changed: dict[str, str], message: str
) -> None:
    moved = tmp_path / "export"
    shutil.copytree(export, moved)
    rewrite(moved / "flowmask.json", lambda settings: settings.update(changed))
    with pytest.raises(CheckpointError, match=message) as caught:
        evaluate(_config(moved, tmp_path / "e"))
    assert "\n" not in str(caught.value)


def test_an_output_that_cannot_be_written_is_one_line(export: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file.*can't be written"):
        evaluate(_config(export, tmp_path / "file" / "e"))


HOSTILE = {"vidA": ["a/b", "a_b", "x" * 220], "vidB": ["a", "A", "e." * 60 + "/" + "y" * 200, "cafe\u0301"]}


def test_any_ids_end_in_results_that_are_kept_apart_and_lead_back_to_them(export: Path, tmp_path: Path) -> None:
    """The ids could mix up the expressions of two videos."""
    videos = json.loads((DATA / "valid_u" / "meta_expressions.json").read_text())["videos"]
    meta, folder = {}, tmp_path / "data" / "valid_u"
    for name, hostile in HOSTILE.items():
        for number, video_id in enumerate(hostile):
            (folder / "JPEGImages" / video_id).parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(
                DATA / "valid_u" / "JPEGImages" / name, folder / "JPEGImages" / video_id, dirs_exist_ok=True
            )
            entry = next(iter(videos[name]["expressions"].values()))
            ids = ["c", "b_c", "../x", "z" * 300][number:][:2]
            meta[video_id] = {"frames": videos[name]["frames"], "expressions": dict.fromkeys(ids, entry)}
    (folder / "meta_expressions.json").write_text(json.dumps({"videos": meta}))
    shutil.copy(DATA / "valid_u" / "mask_dict.json", folder)
    out, data = tmp_path / "e", {"source": "mevis", "root": tmp_path / "data", "split": "valid_u"}
    scores = evaluate(_config(export, out, data=data, archive="mevis", report_examples=50))
    assert scores is not None
    pairs = {(video_id, exp_id) for video_id, entry in meta.items() for exp_id in entry["expressions"]}
    told = json.loads((out / "scores.json").read_text())
    ids = {key: tuple(pair) for key, pair in told["ids"].items()}
    assert {ids.get(key) or tuple(key.split("/")) for key in told["per_expression"]} == pairs
    assert len(list((out / "overlays").iterdir())) == len(pairs) == len(scores.per_expression)
    folders = {str(path.parent.relative_to(out / "masks")) for path in (out / "masks").rglob("*.png")}
    assert folders == scores.per_expression.keys()
    with zipfile.ZipFile(out / "submission.zip") as archive:
        assert {name.rpartition("/")[0] for name in archive.namelist()} == folders
    assert len({same_file(key) for key in folders}) == len(pairs)


def test_without_a_box_the_frames_have_the_sides_of_the_training(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = _encoded(monkeypatch)
    evaluate(_config(export, tmp_path / "e", box=None))
    assert encoded == [(1, 3, 9, 32, 32), (1, 3, 9, 32, 16)]


def test_weights_that_diverged_are_refused_and_not_scored_as_empty_masks(export: Path, tmp_path: Path) -> None:
    broken = tmp_path / "export"
    shutil.copytree(export, broken)
    file = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.bias"][0] = float("nan")
    save_file(weights, file)
    with pytest.raises(WeightsError, match=r"proj_out\.bias has a number that is not finite"):
        evaluate(_config(broken, tmp_path / "e"))
    assert not (tmp_path / "e" / "scores.json").exists()


def test_the_report_shows_every_score_and_as_many_examples_as_asked(export: Path, tmp_path: Path) -> None:
    scores = evaluate(_config(export, tmp_path / "e", report_examples=3))
    assert scores is not None
    page = (tmp_path / "e" / "report.html").read_text()
    assert page.count("<figure>") == 3
    assert all(f"<td>{key}<td>" in page for key in scores.per_expression)


def test_scores_overlay_videos_and_the_report_are_left_for_the_mlflow_run_of_the_checkpoint(
    export: Path, tmp_path: Path
) -> None:
    import av

    run = tmp_path / "run"
    shutil.copytree(export, run)
    spool.write_plan(run, spool.TrackingPlan(key="k", uri="http://127.0.0.1:1", experiment="e", name="n"))
    scores = evaluate(_config(run, tmp_path / "e", report_examples=2))
    assert scores is not None
    notes = spool.Outbox(run, offset=0).take()
    place = f"test/mevis/valid_u/{scores.fingerprint}"
    assert [(note.artifact, note.to) for note in notes] == [
        (tmp_path / "e" / "scores.json", place),
        (tmp_path / "e" / "report.html", place),
        (tmp_path / "e" / "overlays", place),
    ], "weights that are no run's have no step"
    made = sorted((tmp_path / "e" / "overlays").iterdir())
    assert len(made) == 2 and {f.stem for f in made} <= {k.replace("/", "_") for k in scores.per_expression}
    for file in made:
        video, expression = file.stem.rsplit("_", 1)
        with av.open(str(file)) as container:
            shown = sum(1 for _ in container.decode(video=0))
        assert shown == len(list((tmp_path / "e" / "masks" / video / expression).iterdir()))


def test_the_scores_of_every_evaluation_are_left_for_mlflow_under_its_split_at_the_step_of_the_checkpoint(
    export: Path, tmp_path: Path
) -> None:
    run, known = tmp_path / "run", {"j": 1.0, "f": 3.0, "jf": 2.0}
    run.mkdir()
    spool.write_plan(run, spool.TrackingPlan(key="k", uri="http://127.0.0.1:1", experiment="e", name="n"))
    scores = Mock(totals=known, nothing={"n_acc": None, "final": 4.0}, protocol=None, fingerprint="first")
    for fingerprint, more in (("first", {}), ("first", {}), ("another", {}), ("part", {"max_videos": 1})):
        scores.fingerprint = fingerprint
        _offer(_config(run / "checkpoints" / "step_00000007", tmp_path / "e", **more), scores, step=7)
    points = [note.point for note in spool.Outbox(run, offset=0).take() if note.point is not None]
    whole, part = "test/mevis/valid_u", "test/mevis/valid_u_first_1"
    wanted = [{f"{group}/{n}": v for n, v in (known | {"final": 4.0}).items()} for group in (whole, whole, part)]
    assert [(point.step, point.metrics) for point in points if point.metrics] == [(7, one) for one in wanted]
