"""A value that is saved contains no secret. Its later use reports the missing secret."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowmask.models.errors import ConfigError
from flowmask.models.safe.secrets import (
    URI_VARIABLE,
    lacks,
    masked_line,
    masked_option,
    masked_uri,
    revealed,
    revealed_uri,
    without_secrets,
)

MARK = "Mark3r"
WORDS = st.text(alphabet="ab1:@/#?=&$%+ ", max_size=5).map(lambda rest: MARK + rest.replace(" ", ""))


@pytest.mark.parametrize("host", ["http://{}@h:5000", "https://{}@[::1]/a/b", "postgresql+psycopg2://{}@h/db"])
@given(user=st.sampled_from(["u", "", MARK]), password=st.text(alphabet="ab1:@%+!", max_size=4).map(MARK.__add__))
def test_no_uri_keeps_its_user_information(host: str, user: str, password: str) -> None:
    uri = host.format(f"{user}:{password}")
    shown = masked_uri(uri)
    assert MARK not in shown and masked_uri(shown) == shown and lacks(shown)
    assert shown == host.format("***")
    said = f"request to {uri}/api failed:\nConnection({uri!r}) for user {user}: refused by {password}"
    assert MARK not in without_secrets(said, uri=uri) and "\n" not in without_secrets(said, uri=uri)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://h/?token=Mark3r&b=Mark3r#Mark3r", "http://h/?token=***&b=***#***"),
        ("http://h/a?Mark3r", "http://h/a?***"),
        ("postgresql://u:Mark3r/x#@h/db?sslpassword=Mark3r", "postgresql://***@h/db?sslpassword=***"),
        ("${oc.env:X,http://u:Mark3r@h/?t=Mark3r}", "${oc.env:X,http://***@h/?t=***}"),
        ("http://Mark3r:${oc.env:P}Mark3r@h", "http://***@h"),
        ("http://u:${oc.env:P}@h/?t=${oc.env:T}", "http://u:${oc.env:P}@h/?t=${oc.env:T}"),
        ("http://${oc.env:U}:${oc.env:P}@h", "http://${oc.env:U}:${oc.env:P}@h"),
        ("sqlite:////data/50%?/a=b.db", "sqlite:////data/50%?/a=b.db"),
        ("http://h:5000/a", "http://h:5000/a"),
    ],
)
def test_a_uri_is_saved_with_references_and_without_values(uri: str, shown: str) -> None:
    assert masked_uri(uri) == shown == masked_uri(shown)


@pytest.mark.parametrize(
    ("line", "saved"),
    [
        ("export A=Mark3r B='Mark3r Mark3r' C=\"Mark3r $X\" d", "export A=*** B=*** C=*** d"),
        ("A=Mark3r\\ Mark3r;B=x'Mark3r'\"Mark3r\"&&run", "A=***;B=***&&run"),
        ("A=$(cat Mark3r Mark3r)", "A=***"),
        ("A=`cat Mark3r Mark3r` B=1", "A=***"),
        ("A='Mark3r Mark3r", "A=***"),
        ("A={\"token\":\"Mark3r\"} x", "A=*** x"),
        ("login --token Mark3r --api-key=Mark3r", "login --token *** --api-key=***"),
        ("curl -H 'Authorization: Bearer Mark3r' https://u:Mark3r@h", "curl -H 'Authorization: Bearer ***"),
        ("git clone https://u:Mark3r@h/x", "git clone https://***@h/x"),
        ("export A=${oc.env:A} B=\"${oc.env:B}\"", "export A=${oc.env:A} B=\"${oc.env:B}\""),
        ("export A=${oc.env:A,Mark3r}", "export A=***"),
        ("module load cuda/12.4", "module load cuda/12.4"),
        ("source ${HOME}/env", "source \\${HOME}/env"),
    ],
)  # fmt: skip
def test_a_line_of_setup_keeps_names_and_no_values(line: str, saved: str) -> None:
    assert masked_line(line) == saved == masked_line(saved)


@given(st.text(alphabet="a '\"`$(){}\\;&|=", max_size=12))
def test_no_quoting_lets_a_value_out(around: str) -> None:
    saved = masked_line(f"export A={MARK}{around}")
    assert MARK not in saved and saved.startswith("export A=***") and masked_line(saved) == saved


@pytest.mark.parametrize(
    ("option", "saved"),
    [
        ("--export=ALL,T=Mark3r,Mark3r", "--export=ALL,T=***"),
        ("ALL,A=${oc.env:A},B=Mark3r Mark3r", "ALL,A=${oc.env:A},B=***"),
        ("--container-image=docker://u:Mark3r@h/i", "--container-image=docker://***@h/i"),
        ("gpu:a100:2", "gpu:a100:2"),
        ("--cpu-bind=cores", "--cpu-bind=cores"),
        ("afterok:12:13", "afterok:12:13"),
    ],
)
def test_an_option_of_slurm_keeps_no_variables_value(option: str, saved: str) -> None:
    assert masked_option(option) == saved == masked_option(saved)


def test_a_reference_is_filled_in_where_it_is_used_and_one_line_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PW", "p")
    assert revealed("http://u:${oc.env:PW}@${oc.env:NOT_SET,h}/${HOME}", key="k") == "http://u:p@h/${HOME}"
    monkeypatch.delenv("PW")
    with pytest.raises(ConfigError, match=r"tracking\.uri is \$\{oc\.env:PW\}, but PW is not set here"):
        revealed_uri("${oc.env:PW}")
    with pytest.raises(ConfigError, match=r"give tracking\.uri again"):
        revealed_uri("http://***@h")
    monkeypatch.setenv(URI_VARIABLE, "http://u:p@other")
    with pytest.raises(ConfigError, match=r"give tracking\.uri again"):
        revealed_uri("http://***@h")
    monkeypatch.setenv(URI_VARIABLE, "http://u:p@h")
    assert revealed_uri("http://***@h") == "http://u:p@h"
