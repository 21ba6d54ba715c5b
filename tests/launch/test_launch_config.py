"""The section `launch`: what people write is understood, or refused in one line with the fix."""

import pytest
from pydantic import ValidationError

from flowmask.launch.launch_config import LaunchConfig
from flowmask.launch.slurm.commands import unreachable


def refusal(**keys: object) -> str:
    """The messages of a refused section; each fault gives one."""
    with pytest.raises(ValidationError) as caught:
        LaunchConfig.model_validate({"cluster": "slurm", **keys})
    (only,) = caught.value.errors()
    return str(only["msg"])


@pytest.mark.parametrize("text", ["24:00:00", "24h", "1440 min"])
def test_a_time_limit_that_is_no_number_names_its_unit(text: str) -> None:
    assert f"launch.time_min is {text!r}; it is a number of minutes: 1440 for 24 hours" in refusal(time_min=text)


def test_a_time_limit_may_come_from_the_environment_as_text() -> None:
    assert LaunchConfig.model_validate({"time_min": "1440"}).time_min == 1440


@pytest.mark.parametrize("value", [8, 2.5, "8", True])
def test_a_number_is_an_option_s_value_as_it_is_written(value: object) -> None:
    found = LaunchConfig.model_validate({"sbatch_args": {"nice": value}}).sbatch_args["nice"]
    assert found is True if value is True else found == str(value)


@pytest.mark.parametrize(("value", "said"), [(False, "false"), (None, "empty"), (["KEY=hidden"], "a list")])
def test_an_option_with_another_value_is_one_fault_that_does_not_show_it(value: object, said: str) -> None:
    assert f"it is {said}; give a text or a number, or true for an option" in refusal(sbatch_args={"nice": value})


@pytest.mark.parametrize("name", ["no-requeue", "no_requeue"])
def test_what_would_end_requeueing_is_refused_with_the_keys_that_do_it(name: str) -> None:
    assert "launch.max_preemptions=0" in refusal(sbatch_args={name: True})


@pytest.mark.parametrize("key", ["partition", "account", "qos", "constraint"])
@pytest.mark.parametrize("name", ["a bc", " a", ""])
def test_a_name_with_a_space_is_refused(key: str, name: str) -> None:
    assert f"launch.{key} is {name!r}; it may hold no space" in refusal(**{key: name})


def test_a_controller_that_does_not_answer_is_told_from_a_refusal() -> None:
    said = "sbatch: error: res_nsearch error\nsbatch: fatal: Could not establish a configuration source"
    assert unreachable(said).startswith("no SLURM controller answers (Could not establish a configuration source): use")
    assert unreachable("sbatch: error: Batch job submission failed: Invalid account") == ""
