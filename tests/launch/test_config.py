"""A config is valid, or one line gives the key, its value and the allowed values."""

import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import ValidationError

import flowmask.launch.curriculum.stages  # noqa: F401 - the sections that the jobs do not import
from flowmask.launch.config import load_job, split_override
from flowmask.launch.jobs import CacheJob, EvaluateJob, TrainJob
from flowmask.models.config import Section
from flowmask.models.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
TRAIN = {
    "out": "runs/a",
    "model": {"wan": "weights/wan"},
    "data": {"cache": "caches/a"},
    "train": {"steps": 10, "global_batch": 8, "micro_batch": 2},
}

OURS = {
    "kind": "flow_matching",
    "boundary_bias": False,
    "boundary_probability": 0.5,
    "start_point_augmentation": True,
    "video_injection": True,
}

NOT_KNOWN_THEN = {"start", "predicts", "weights_seed"}


@pytest.fixture
def train_file(tmp_path: Path) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(TRAIN))
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cache_mevis", CacheJob),
        ("cache_refcoco", CacheJob),
        ("cache_refcoco_all", CacheJob),
        ("train_mevis", TrainJob),
        ("train_mixed", TrainJob),
        ("train_mask_decoder", TrainJob),
        ("train_light_mask_decoder", TrainJob),
        ("evaluate_mevis", EvaluateJob),
        ("demo/cache", CacheJob),
        ("demo/decoder", TrainJob),
        ("demo/dit", TrainJob),
        ("demo/evaluate", EvaluateJob),
    ],
)
def test_every_shipped_config_is_valid_and_opens_with_its_command(name: str, kind: type) -> None:
    path = CONFIGS / f"{name}.yaml"
    load_job(path, kind)
    assert "flowmask " in path.read_text().partition("\nout:")[0]


def test_the_command_line_is_stronger_than_the_file(train_file: Path) -> None:
    job = load_job(train_file, TrainJob, ["train.lr=1e-4", "out=elsewhere"])
    assert job.train.lr == 1e-4
    assert job.out == Path("elsewhere")


def test_an_override_may_name_other_keys_and_reach_into_a_section_that_is_not_there(
    train_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLACE", "there")
    job = load_job(train_file, TrainJob, ["out=${oc.env:PLACE}/${data.cache}", "lora.rank=4", "data={cache: b}"])
    assert job.out == Path("there/b") and job.lora is not None and job.lora.rank == 4
    train_file.write_text(train_file.read_text() + "lora: null\n")
    assert load_job(train_file, TrainJob, ["lora.rank=4"]).lora == job.lora
    said = load_job(train_file, TrainJob, ["launch.sbatch_args.kill-on-invalid-dep='yes'", "launch.setup=['a=b c']"])
    assert said.launch.sbatch_args == {"kill-on-invalid-dep": "yes"} and said.launch.setup == ("a=b c",)


def test_a_number_in_an_override_is_a_place_in_a_list() -> None:
    file = CONFIGS / "cache_refcoco_all.yaml"
    job = load_job(file, CacheJob, ["data.1.root=elsewhere", "out=here"])
    assert [str(source.root) for source in job.sources] == ["datasets/refcoco", "elsewhere", "datasets/refcoco"]
    assert load_job(file, CacheJob, ["data=[{root: x, source: videos}]"]).sources[0].source == "videos"
    mixed = load_job(CONFIGS / "train_mixed.yaml", TrainJob, ["data.mix.0.weight=2.5"])
    assert [entry.weight for entry in mixed.data.mix] == [2.5, 1.0]
    for wrong in ("data.root=x", "data.7.root=x", "data.one.root=x", "data.1.root.deep=x", "data.x=1"):
        with pytest.raises(ConfigError) as raised:
            load_job(file, CacheJob, [wrong])
        assert "data" in str(raised.value) and "\n" not in str(raised.value)


def test_a_resolved_config_read_again_is_the_same_job(train_file: Path, tmp_path: Path) -> None:
    job = load_job(train_file, TrainJob)
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    assert load_job(again, TrainJob) == job


def test_a_config_saved_when_kinds_shared_their_keys_is_read_and_overrides_are_judged(tmp_path: Path) -> None:
    others = {"latent_noise_std": 0.0, "focal_weight": 9.0, "focal_alpha": 0.25, "focal_gamma": 2.0, "dice_weight": 4.0}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(TRAIN | {"objective": OURS | others}))
    assert load_job(path, TrainJob).objective.model_dump(exclude=NOT_KNOWN_THEN) == OURS
    with pytest.raises(ConfigError, match=r"unknown key objective\.focal_weight"):
        load_job(path, TrainJob, ["objective.focal_weight=9.0"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.learning_rate=1", ["train.learning_rate"]),
        ("train.stepz=1", ["train.stepz", "did you mean train.steps"]),
        ("trian.lr=1", ["unknown key trian", "train"]),
        ("lr=1", ["unknown key lr", "train.lr"]),
        ("train.steps=many", ["train.steps is 'many'", "integer"]),
        ("train.steps=0", ["train.steps is 0", "greater than or equal to 1"]),
        ("train.zero_stage=4", ["train.zero_stage is 4", "less than or equal to 3"]),
        ("train.precision=fp8", ["train.precision is 'fp8'", "bf16"]),
        ("train.micro_batch=3", ["train.global_batch is 8", "Nearest: 6 or 9"]),
        ("launch.processes_per_node=3", ["train.global_batch is 8", "3 processes = 6"]),
        ("train.sequence_parallel=2", ["train.sequence_parallel is 2", "number of processes, 1: 1"]),
        ("launch.nodes=2", ["launch.nodes is 2"]),
        ("launch.array=16", ["launch.array is 16", "launch.cluster=slurm", "launch.processes_per_node"]),
        ("objective.boundary_bias=maybe", ["objective.boundary_bias is 'maybe'"]),
        ("objective.boundary_probability=2", ["objective.boundary_probability is 2", "less than or equal to 1"]),
        ("objective.focal_weight=2", ["unknown key objective.focal_weight", "flow_matching knows boundary_bias, "]),
        (
            "objective.kind=gan",
            ["objective.kind is 'gan'; known: flow_matching, light_mask_decoder, mask_decoder, text_to_video"],
        ),
        ("objective=fast", ["objective is 'fast'"]),
        ("train=fast", ["train is 'fast'"]),
    ],
)
def test_a_wrong_value_is_one_line_that_names_key_value_and_rule(
    train_file: Path, override: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(train_file, TrainJob, [override])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "", "a: b: c"])
def test_a_file_that_is_no_mapping_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml") as caught:
        load_job(path, TrainJob)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_missing_key_are_named(train_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        load_job(tmp_path / "nowhere.yaml", TrainJob)
    train_file.write_text(yaml.safe_dump({key: value for key, value in TRAIN.items() if key != "model"}))
    with pytest.raises(ConfigError, match=r"key model is missing"):
        load_job(train_file, TrainJob)


def test_an_override_without_a_value_is_named(train_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"'train\.lr' is not KEY=VALUE"):
        load_job(train_file, TrainJob, ["train.lr"])


def test_the_ablation_is_the_papers_rows_and_every_combination_of_its_techniques() -> None:
    files = sorted((CONFIGS / "ablation").glob("*.yaml"))
    trained = {path.stem: load_job(path, TrainJob) for path in files if not path.stem.startswith("evaluate_")}
    full = load_job(CONFIGS / "train_mevis.yaml", TrainJob)
    switches = {"bbs": "boundary_bias", "spa": "start_point_augmentation", "dvi": "video_injection"}
    combinations = ["none", *("_".join(some) for n in (1, 2, 3) for some in itertools.combinations(switches, n))]
    rows: dict[str, dict[str, Any]] = {
        name: {switches[part]: part in name.split("_") for part in switches} for name in combinations
    }
    rows |= {f"bbs_p{percent}": rows["bbs"] | {"boundary_probability": percent / 100} for percent in (25, 75)}
    rows["one_step_velocity"] = rows["bbs"] | {"boundary_probability": 1.0}
    rows["one_step_mask"] = rows["one_step_velocity"] | {"predicts": "mask"}
    rows["noise_to_mask"] = rows["dvi"] | {"start": "noise"}
    rows["random_weights"] = rows["bbs_spa_dvi"] | {"weights_seed": 0}
    rows["decoder_frozen"] = rows["bbs_spa_dvi"]
    assert trained.keys() == rows.keys()
    for stem, job in trained.items():
        assert job.objective == full.objective.model_copy(update=rows[stem]), stem
        decoder = "vae" if stem == "decoder_frozen" else full.model.mask_decoder
        model = full.model.model_copy(update={"mask_decoder": decoder})
        out = Path("runs/ablation") / stem
        assert job == full.model_copy(update={"out": out, "objective": job.objective, "model": model})
        assert f"flowmask train configs/ablation/{stem}.yaml" in (CONFIGS / "ablation" / f"{stem}.yaml").read_text()
    evaluations = {path.stem: load_job(path, EvaluateJob) for path in files if path.stem.startswith("evaluate_")}
    assert {stem: job.sampler.steps for stem, job in evaluations.items()} == {
        "evaluate_steps_1": 1,
        "evaluate_steps_4": 4,
    }


def test_the_first_line_of_an_ablation_says_the_published_number_or_that_there_is_none() -> None:
    for path in (CONFIGS / "ablation").glob("*.yaml"):
        head = path.read_text().splitlines()[0]
        published = re.search(r"\d\d\.\d J&F", head) and "arXiv 2510.06139" in head
        assert published or "Not in the table" in head, path


def test_a_config_may_stand_on_another_one_but_not_on_itself(tmp_path: Path, train_file: Path) -> None:
    top = tmp_path / "top.yaml"
    top.write_text("base: train.yaml\ntrain:\n  lr: 3.0e-4\n")
    job = load_job(top, TrainJob, ["train.steps=12"])
    assert (job.train.lr, job.train.steps, job.train.global_batch) == (3e-4, 12, 8)
    for said, why in (("base: top.yaml", "is based on itself"), ("base: gone.yaml", "does not exist")):
        top.write_text(f"{said}\nout: x\n")
        with pytest.raises(ConfigError, match=f"top.yaml: {said}".replace(": ", ".*") + f".*{why}"):
            load_job(top, TrainJob)


def test_a_base_that_is_no_file_there_is_the_bundled_config_of_this_name_and_a_file_of_theirs_comes_first(
    tmp_path: Path, train_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    top = tmp_path / "top.yaml"
    for base in ("train_mevis", "configs/train_mevis.yaml"):
        top.write_text(f"base: {base}\ntrain:\n  lr: 3.0e-4\n")
        assert load_job(top, TrainJob).train.decay_factor == 0.9 and load_job(top, TrainJob).train.lr == 3e-4
        assert f"{base} does not exist here; using the bundled configs/train_mevis.yaml" in capsys.readouterr().err
    shutil.copy(train_file, tmp_path / "train_mevis.yaml")
    top.write_text("base: train_mevis.yaml\n")
    assert load_job(top, TrainJob) == load_job(train_file, TrainJob)


NOT_FINITE = (".inf", "-.inf", ".nan", "inf", "-nan", "1e999", "Infinity")


def sections(of: type[Section] = Section) -> Iterator[type[Section]]:
    """Every config section of jobs, rooms, objectives and curricula."""
    yield of
    for section in of.__subclasses__():
        yield from sections(section)


def floats_of(annotation: Any) -> list[Any]:
    """For each float in a field, a function that puts a value into the nesting around it; [] without floats."""
    if annotation is float:
        return [lambda value: value]
    inner = [make for argument in get_args(annotation) for make in floats_of(argument)]
    if get_origin(annotation) is tuple:
        return [lambda value, make=make: [make(value)] * 2 for make in inner]
    return inner


@pytest.mark.parametrize("text", NOT_FINITE)
def test_no_float_of_any_section_is_nan_or_infinite_however_it_is_written(text: str) -> None:
    value, tried = split_override(f"x={text}")[1], 0
    for section in sections():
        for name, field in section.model_fields.items():
            for make in floats_of(field.annotation):
                with pytest.raises(ValidationError) as caught:
                    section.model_validate({name: make(value)})
                kinds = {error["type"] for error in caught.value.errors() if error["loc"][0] == name}
                assert kinds == {"finite_number"}, (section, name, kinds)
                tried += 1
    assert tried >= 25


@pytest.mark.parametrize("key", ["train.lr", "train.eps", "train.grad_clip", "guard.grad_norm_spike", "ema.decay"])
@pytest.mark.parametrize("text", NOT_FINITE)
def test_it_is_one_line_that_names_the_key(train_file: Path, key: str, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} is .*: input should be a finite number") as caught:
        load_job(train_file, TrainJob, [f"{key}={text}"])
    assert "\n" not in str(caught.value)
