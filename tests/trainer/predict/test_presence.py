"""The threshold of presence: its choice, its effect on masks, the settings it belongs to, and exports that hold it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_export import write_golden_export
from runs import start
from thresholds import write_threshold
from trials import SEED, TRIALS

from flowmask.data_pipeline.config import DataSourceConfig
from flowmask.models.config import SamplerConfig
from flowmask.models.errors import ConfigError, UserError
from flowmask.trainer.predict.export import export
from flowmask.trainer.predict.inference import LoadedSegmenter, load_segmenter
from flowmask.trainer.predict.predict import Predictions, predict
from flowmask.trainer.predict.presence import RULE, Calibration, Judged, in_use, presence_in, presence_of, sweep
from flowmask.trainer.predict.show.overlay import read_mask
from flowmask.trainer.predict.weights import stored_settings
from flowmask.trainer.predict.windows.cut import WindowConfig

DRAWS = 60 * TRIALS

PROMPTS = ["a dog", "the red car", "two birds near the water"]
FORMATS = {"diffusers": "", "flowrvs": ".pth", "safetensors": ".safetensors", "lora": ""}


def accuracies(judged: list[Judged], threshold: float) -> tuple[float, float]:
    """N-acc and T-acc in percent, counted one by one."""
    said = [(one.has_target, one.answered and one.presence >= threshold) for one in judged]
    nothing, target = ([answer for kind, answer in said if kind == wanted] for wanted in (False, True))
    return 100 * (nothing.count(False) / len(nothing)), 100 * (target.count(True) / len(target))


def test_no_threshold_is_better_than_the_chosen_one_and_no_lower_one_is_as_good() -> None:
    random = np.random.default_rng(SEED)
    for _ in range(DRAWS):
        numbers = random.choice(np.arange(random.integers(1, 12)) / 12, random.integers(2, 40))
        kinds = random.random(len(numbers)) < random.random()
        kinds[:2] = True, False
        said = (numbers > 0) & (random.random(len(numbers)) < 0.9)
        judged = [Judged(*one) for one in zip(numbers.tolist(), said.tolist(), kinds.tolist(), strict=True)]
        threshold, *found = sweep(judged)
        assert found == pytest.approx(accuracies(judged, threshold))
        tried = [other for other in (*np.arange(-1, 30) / 24, *numbers) if other <= numbers.max()]
        means = {other: sum(accuracies(judged, other)) for other in tried}
        assert max(means.values()) <= sum(found) + 1e-9
        emptied = {one.presence for one in judged if one.presence < threshold}
        fewer = [other for other in tried if {one.presence for one in judged if one.presence < other} < emptied]
        assert all(means[other] < sum(found) - 1e-9 for other in fewer)


def test_a_threshold_that_was_planted_is_found_between_its_neighbours() -> None:
    random = np.random.default_rng(SEED)
    for _ in range(DRAWS):
        planted = random.uniform(0.01, 0.9)
        absent, present = random.uniform(0, planted, random.integers(1, 9)), random.uniform(planted, 1, 7)
        judged = [Judged(float(p), True, False) for p in absent] + [Judged(float(p), True, True) for p in present]
        random.shuffle(judged)  # type: ignore[arg-type]
        threshold, *found = sweep(judged)
        assert absent.max() < threshold <= present.min() and found == [100, 100]
    next_to_each_other = np.nextafter(0.5, 1)
    assert sweep([Judged(0.5, True, False), Judged(float(next_to_each_other), True, True)])[0] == next_to_each_other


def test_presence_is_the_mean_of_positive_logits_and_padding_counts_nothing() -> None:
    logits = torch.full((5, 4, 8), -0.5)
    assert presence_of(logits, frames=3) == 0
    logits[1, :2, :4], logits[2, 0, 0], logits[3:] = 0.25, 9, 77
    assert presence_of(logits, frames=3) == (8 * 0.25 + 9) / 96
    assert presence_of(logits, frames=4) > 9, "logits are not cut to -1..1"


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_golden_export(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("frames")
    y, x = np.mgrid[:46, :70]
    for i in range(7):
        shape = (y - 20) ** 2 + (x - 10 - 5 * i) ** 2 < 80
        Image.fromarray(np.stack([200 * shape, 3 * x, 5 * y], -1).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def of(checkpoint: object, **changes: Any) -> LoadedSegmenter:
    return load_segmenter(str(checkpoint), sampler=SamplerConfig(), precision="fp32", device="cpu", **changes)


def _predict(golden: Path, video: Path, out: Path, **changes: Any) -> Predictions:
    return predict(video, PROMPTS, checkpoint=str(golden), out=out, precision="fp32", device="cpu", **changes)


@pytest.mark.parametrize("window", [WindowConfig(), WindowConfig(frames=5, overlap=0)])
def test_a_prediction_empties_what_is_below_the_threshold_in_all_its_windows_and_leaves_the_rest(
    golden: Path, video: Path, tmp_path: Path, window: WindowConfig
) -> None:
    without = _predict(golden, video, tmp_path / "without", window=window)
    ranked = sorted(prompt.presence for prompt in without.prompts)
    assert len(set(ranked)) == 3 and {prompt.absent for prompt in without.prompts} == {None}
    threshold = write_threshold(tmp_path / "e", of(golden), (ranked[0] + ranked[1]) / 2)
    said: list[str] = []
    found = _predict(golden, video, tmp_path / "p", window=window, presence=str(threshold), say=said.append)
    assert [prompt.presence for prompt in found.prompts] == [prompt.presence for prompt in without.prompts]
    written = json.loads((tmp_path / "p" / "predictions.json").read_text())
    assert written["presence_threshold"] == (ranked[0] + ranked[1]) / 2
    for before, after, entry in zip(without.prompts, found.prompts, written["prompts"], strict=True):
        files = [{path.name: path.read_bytes() for path in one.masks.iterdir()} for one in (before, after)]
        assert after.absent == entry["absent"] == (before.presence == ranked[0])
        if after.absent:
            assert not any(read_mask(path).any() for path in after.masks.iterdir()) and after.area_px == [0] * 7
            assert files[0].keys() == files[1].keys() and any(repr(before.prompt) in line for line in said)
        else:
            assert files[0] == files[1] and before.overlay.read_bytes() == after.overlay.read_bytes()


def test_a_threshold_of_other_weights_conventions_sampler_or_box_is_refused_in_a_line_that_names_both(
    golden: Path, video: Path, tmp_path: Path
) -> None:
    loaded = of(golden)
    here: dict[str, Any] = {
        "checkpoint": "mine",
        "weights": loaded.weights,
        "conventions": loaded.conventions,
        "sampler": SamplerConfig(),
    }
    out = str(write_threshold(tmp_path / "e", loaded, 0.1))
    assert in_use(out, None, **here, box=loaded.box, say=print) == in_use(out, None, **here, box=None, say=print)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"weights": loaded.weights | {"dit": "f" * 64}}, f"dit {loaded.weights['dit'][:12]} there, {'f' * 12} here"),
        ({"weights": loaded.weights | {"mask_decoder": "vae"}}, "mask_decoder .* there, vae here"),
        ({"conventions": loaded.conventions | {"text_tokens": 7}}, "text_tokens [0-9]+ there, 7 here"),
        ({"sampler": SamplerConfig(steps=4)}, "sampler.steps 1 there, 4 here"),
        ({"box": loaded.box.model_copy(update={"height_px": 16})}, "box 32x48 .* there, 16x48 .* here"),
    ]
    for changed, message in cases:
        with pytest.raises(ConfigError, match=f"presence is from {out}, .*{message}.*--calibrate") as caught:
            in_use(out, None, **{**here, "box": loaded.box, **changed}, say=print)
        assert "\n" not in str(caught.value)
    (tmp_path / "older").mkdir()
    older = (tmp_path / "e/scores.json").read_text().replace(RULE, "older_rule")
    (tmp_path / "older/scores.json").write_text(older)
    with pytest.raises(ConfigError, match=f"rule older_rule there, {RULE} here"):
        in_use(str(tmp_path / "older"), None, **here, box=None, say=print)
    with pytest.raises(ConfigError, match=r"sampler\.steps 1 there, 4 here"):
        _predict(golden, video, tmp_path / "p", presence=out, sampler=SamplerConfig(steps=4))
    assert not list((tmp_path / "p").glob("[!.]*"))


def test_a_threshold_may_be_of_videos_only_where_dataset_and_split_have_its_names() -> None:
    on = Calibration(source="mevis", split="train", sentences=9, no_target=3, n_acc=100, t_acc=50)
    names = [(source, split) for source in ("mevis", "revos") for split in ("train", "valid")]
    found = [on.is_of(DataSourceConfig(source=source, root=Path("d"), split=split)) for source, split in names]
    assert found == [True, False, False, False]


def test_what_is_no_threshold_is_one_line_before_weights_are_loaded(
    golden: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowmask.trainer.predict.predict.load_segmenter", None)
    out = write_threshold(tmp_path / "e", of(golden), 0.1)
    whole = json.loads((out / "scores.json").read_text())
    changes: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (lambda scores: scores.update(presence=None), "has no threshold; make it with flowmask evaluate --calibrate"),
        (lambda scores: scores["presence"].update(threshold="high"), "is damaged"),
    ]
    for change, message in changes:
        scores = json.loads(json.dumps(whole))
        change(scores)
        (out / "scores.json").write_text(json.dumps(scores))
        with pytest.raises(UserError, match=message) as caught:
            _predict(golden, video, tmp_path / "p", presence=str(out))
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="does not exist; give the out of a calibrated evaluation"):
        _predict(golden, video, tmp_path / "p", presence=str(tmp_path))


@pytest.fixture(scope="module")
def trained(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA run, which every format can store, and a mask decoder."""
    folder = tmp_path_factory.mktemp("runs")
    common = {"train.steps": 2, "train.lr": 1e-2}
    assert start(lab, folder / "lora", common | {"lora": {"rank": 2}}) == 0
    assert start(lab, folder / "decoder", common | {"objective.kind": "mask_decoder"}) == 0
    return {name: folder / name for name in ("lora", "decoder")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_an_export_carries_the_threshold_and_brings_it_to_whoever_loads_it(
    trained: dict[str, Path], lab: Path, tmp_path: Path, format: str, dtype: torch.dtype
) -> None:
    run, suffix = str(trained["lora"]), FORMATS[format]
    out = write_threshold(tmp_path / "e", of(run), 0.125)
    first = export(run, format=format, out=tmp_path / f"a{suffix}", dtype=dtype, presence=str(out)).path
    options: dict[str, Any] = {"format": format, "dtype": dtype, "wan": lab / "wan"}
    second = export(str(first), out=tmp_path / f"b{suffix}", **options).path
    for path in (first, second):
        loaded = of(path, wan=lab / "wan")
        said: list[str] = []
        here: dict[str, Any] = {"checkpoint": str(path), "weights": loaded.weights, "sampler": SamplerConfig()}
        here["conventions"] = loaded.conventions
        found = in_use(None, loaded.presence, **here, box=loaded.box, say=said.append)
        assert found is not None and found.threshold == 0.125 and "0.125" in said[0] and len(said) == 1
        assert presence_in(stored_settings(str(path)), where=path) == found == loaded.presence
        assert in_use("none", loaded.presence, **here, box=loaded.box, say=said.append) is None
        with pytest.raises(ConfigError, match=r"sampler\.steps 1 there, 2 here.*presence=none"):
            in_use(None, found, **{**here, "sampler": SamplerConfig(steps=2)}, box=loaded.box, say=said.append)
    plain = export(str(first), out=tmp_path / f"c{suffix}", presence="none", **options).path
    assert of(plain, wan=lab / "wan").presence is None
    assert "presence" not in stored_settings(str(plain))


def test_an_export_takes_no_threshold_of_other_weights(
    trained: dict[str, Path], golden: Path, lab: Path, tmp_path: Path
) -> None:
    out = str(write_threshold(tmp_path / "e", of(golden), 0.1))
    for format, suffix in FORMATS.items():
        with pytest.raises(ConfigError, match=r"chosen for other settings: dit .* there, .* here"):
            export(str(trained["lora"]), format=format, out=tmp_path / f"x{suffix}", presence=out)
    with pytest.raises(ConfigError, match="a presence threshold belongs to a DiT"):
        export(str(trained["decoder"]), format="safetensors", out=tmp_path / "x.safetensors", presence=out)
    own = write_threshold(tmp_path / "own", of(trained["lora"]), 0.1)
    both = export(str(trained["lora"]), format="flowrvs", out=tmp_path / "both.pth", presence=str(own)).path
    assert of(both, wan=lab / "wan").presence is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.pth", "e", "own"]
