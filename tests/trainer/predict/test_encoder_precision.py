"""Text and video are encoded for evaluation as for training, and one place sets the use of TF32."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import cache_settings, start

from flowmask.data_pipeline.build.build import build
from flowmask.data_pipeline.config import CacheBuildConfig
from flowmask.data_pipeline.read.reader import CacheReader
from flowmask.models.config import Precision, SamplerConfig
from flowmask.models.text import clean
from flowmask.models.vae import latent_frames, normalise
from flowmask.trainer.predict.export import export
from flowmask.trainer.predict.inference import DTYPES, EncoderPrecision, load_segmenter
from flowmask.trainer.score.evaluate import fingerprint_now
from flowmask.trainer.score.evaluate_config import EvaluateConfig

DTYPE_OF: dict[Precision, str] = {"fp32": "float32", "bf16": "bfloat16"}


@pytest.fixture(scope="module")
def runs_of(lab: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Precision, Path]:
    """For each precision, a run of one step on a cache encoded in it and stored without rounding."""
    torch.set_num_threads(1)
    folder, runs = tmp_path_factory.mktemp("encoders"), {}
    for precision, dtype in DTYPE_OF.items():
        settings = cache_settings(lab) | {"out": folder / f"cache_{precision}"}
        settings["cache"] = settings["cache"] | {"views": 1, "encoder_dtype": dtype, "dtype": "float32"}
        build(CacheBuildConfig.model_validate(settings))
        runs[precision] = folder / f"run_{precision}"
        start(lab, runs[precision], {"data.cache": str(folder / f"cache_{precision}"), "train.steps": 1})
    return runs


@pytest.mark.parametrize("precision", DTYPE_OF)
@pytest.mark.parametrize("of_dit", DTYPE_OF)
def test_a_sentence_is_encoded_for_evaluation_to_the_bit_as_for_training(
    runs_of: dict[Precision, Path], precision: Precision, of_dit: Precision
) -> None:
    run, said = runs_of[precision], []
    loaded = load_segmenter(str(run), sampler=SamplerConfig(), precision=of_dit, device="cpu", say=said.append)
    reader = CacheReader(run.with_name(f"cache_{precision}"))
    for example in range(4):
        stored = reader.read(np.array([example]), needs={"text"}, text_tokens=256)["text"][0]
        found = loaded.segmenter.text_encoder(clean(reader.sentence(example), lowercase=True), max_tokens=256)
        assert torch.equal(found.float(), stored[: len(found)])
    assert not said and loaded.segmenter.vae.dtype == DTYPES[precision]
    assert next(loaded.segmenter.mask_decoder.parameters()).dtype == torch.float32


def test_a_clip_is_too_but_for_the_layout_of_its_convolutions(runs_of: dict[Precision, Path], lab: Path) -> None:
    clip, latents = torch.rand(1, 3, 5, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1, {}
    for precision, run in runs_of.items():
        loaded = load_segmenter(str(run), sampler=SamplerConfig(), device="cpu")
        latents[precision] = loaded.segmenter.encode_video(latent_frames(clip))
        vae = loaded.segmenter.vae
        again = normalise(loaded.segmenter.stats, vae.encode(clip.to(DTYPES[precision])).latent_dist.mean.float())
        assert torch.equal(latents[precision], again)
    assert not torch.equal(latents["fp32"], latents["bf16"])


@pytest.mark.parametrize("format", ["diffusers", "safetensors", "flowrvs"])
def test_an_export_knows_it_as_its_run_does(
    runs_of: dict[Precision, Path], lab: Path, tmp_path: Path, format: str
) -> None:
    out = tmp_path / {"flowrvs": "out.pth", "safetensors": "out.safetensors"}.get(format, "out")
    said: list[str] = []
    source = str(export(str(runs_of["bf16"]), format=format, out=out).path)
    loaded = load_segmenter(source, sampler=SamplerConfig(), precision="fp32", wan=lab / "wan", say=said.append)
    assert loaded.segmenter.text_encoder.encoder.model.dtype == loaded.segmenter.vae.dtype == torch.bfloat16
    assert not said


@pytest.mark.parametrize(
    ("trained", "asked", "otherwise", "used", "said"),
    [
        ("float32", None, "bf16", ("fp32", "fp32"), ""),
        ("bfloat16", None, "fp32", ("bf16", "bf16"), ""),
        ("float32", "fp32", "bf16", ("fp32", "fp32"), ""),
        ("float32", "bf16", "fp32", ("bf16", "bf16"), "encoded in bf16, but in training they were encoded in fp32"),
        ("bfloat16", "fp32", "bf16", ("fp32", "fp32"), "encoded in fp32, but in training they were encoded in bf16"),
        (None, "bf16", "fp32", ("bf16", "bf16"), ""),
        (None, None, "bf16", ("bf16", "fp32"), "the precision of the text and video encoders"),
        (None, None, "fp32", ("fp32", "fp32"), "the precision of the text and video encoders"),
    ],
)
def test_what_is_asked_for_comes_first_then_the_training_and_a_difference_is_said(
    trained: str | None, asked: Any, otherwise: Any, used: tuple[str, str], said: str
) -> None:
    found = EncoderPrecision.of({"encoder_dtype": trained}, asked=asked, otherwise=otherwise)
    assert (found.text, found.video) == used
    assert found.differs.startswith(("text and video are " if said.startswith("encoded") else "") + said)
    assert bool(found.differs) == bool(said) and "\n" not in found.differs


def test_scores_of_other_encoders_are_other_scores_and_those_of_before_keep_their_name(
    runs_of: dict[Precision, Path], lab: Path
) -> None:
    def name(run: Precision, **changes: Any) -> str:
        tree = {"out": "o", "checkpoint": str(runs_of[run]), "data": {"root": cache_settings(lab)["data"]["root"]}}
        tree["data"] |= {"split": "valid_u"}
        return fingerprint_now(EvaluateConfig.model_validate(tree | changes), weights={"dit": "w"}, wan_files="f")

    assert name("fp32", precision="fp32") == name("fp32", precision="fp32", encoder_precision="fp32")
    assert name("fp32", precision="fp32") != name("fp32", precision="fp32", encoder_precision="bf16")
    assert name("fp32", precision="bf16") != name("fp32", precision="bf16", encoder_precision="bf16")
    assert name("bf16", precision="fp32") != name("fp32", precision="fp32")
    assert name("fp32", tf32=True) != name("fp32")


@pytest.fixture
def flags() -> Any:
    """Whether fp32 products, and convolutions, may use TF32; torch's defaults are restored at the end."""
    yield lambda: (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True


@pytest.mark.parametrize(("tf32", "wanted"), [(True, (True, True)), (False, (False, False)), (None, (False, True))])
def test_every_kind_of_job_sets_tf32_as_its_config_says(
    runs_of: dict[Precision, Path], lab: Path, tmp_path: Path, flags: Any, tf32: bool | None, wanted: tuple[bool, bool]
) -> None:
    other = tf32 is not True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = other
    start(lab, tmp_path / "run", {"train.tf32": tf32, "train.steps": 1})
    assert flags() == wanted
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = other
    settings = cache_settings(lab) | {"out": tmp_path / "cache"}
    settings["cache"] = settings["cache"] | {"views": 1, "tf32": tf32}
    build(CacheBuildConfig.model_validate(settings))
    assert flags() == wanted
    fields = json.loads((tmp_path / "cache" / "manifest.json").read_text())["fingerprint"]["fields"]
    assert fields.get("cache.tf32", "not there") == ("not there" if tf32 is None else tf32)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = other
    load_segmenter(str(runs_of["fp32"]), sampler=SamplerConfig(), tf32=tf32, device="cpu")
    assert flags() == wanted
