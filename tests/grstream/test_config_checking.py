"""`grstream config check` names each fault with its line and what may be meant, and what is unwise."""

import pathlib
from collections.abc import Callable

import pytest

from grstream import cli
from grstream.config import (
    API_KEYS_VARIABLE,
    KAFKA_OAUTH_SECRET_VARIABLE,
    KAFKA_PASSWORD_VARIABLE,
    ConfigError,
    load,
    load_run,
)

ROOT = pathlib.Path(__file__).parents[2]
Check = Callable[[str], tuple[int, str, str]]
GOOD = "storage: /srv/x\nevents: {actions: [click]}\n"


@pytest.fixture(autouse=True)
def _no_secrets_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (API_KEYS_VARIABLE, KAFKA_PASSWORD_VARIABLE, KAFKA_OAUTH_SECRET_VARIABLE):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def check(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Check:
    """The exit status, what is printed, and what is said, of a file's text."""
    monkeypatch.chdir(tmp_path)

    def run(text: str) -> tuple[int, str, str]:
        pathlib.Path("x.yaml").write_text(text)
        status = cli.main(["config", "check", "x.yaml"])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def test_a_valid_file_is_one_line(check: Check) -> None:
    assert check(GOOD) == (0, "x.yaml: a system, valid\n", "")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            GOOD + "histories:\n  window: 8\n  chnk: 2\n",
            "histories.chnk (line 5): there is no such field; did you mean chunk?",
        ),
        (
            GOOD + "learning_rate: 1\n",
            "learning_rate (line 3): there is no such field here; did you mean train.learning_rate?",
        ),
        (
            GOOD
            + "kafka:\n  security:\n    colour: blue\n    oauth: {token_url: 'https://a', client_id: c}\n",
            "kafka.security.colour (line 5): there is no such field; known are protocol, ca_file,",
        ),
        (
            GOOD + "train: {xyz: 1}\n",
            "train.xyz (line 3): there is no such field; `grstream config docs` lists all",
        ),
        (
            GOOD + "replay:\n  columns:\n    user: u\n    item: i\n",
            "replay.columns.time (line 4): is required",
        ),
        (
            GOOD + "replay:\n  actions:\n  - action: click\n  - acton: click\n",
            "replay.actions.1.acton (line 6): there is no such field; did you mean action?",
        ),
        (
            GOOD + "model:\n  layout: both\n",
            "model.layout (line 4): Input should be 'fused' or 'interleaved'",
        ),
        (
            GOOD + "# a comment\nserve:\n\n  port: 70000\n",
            "serve.port (line 6): Input should be less than or equal to 65535",
        ),
        (
            GOOD + "histories: {window: 4, chunk: 8}\n",
            "histories (line 3): chunk must not be larger than window",
        ),
        (GOOD + "kafka: {items_topic: actions}\n", "kafka (line 3): topic is for events alone"),
        (
            GOOD + "kafka: {items_topic: actions.dead}\n",
            "kafka (line 3): items_topic must not be dead_letter",
        ),
        (GOOD + "forget_within_s: 1\n", "(top) (line 1): forget_within_s must be at least"),
        ("storage: /x\n", "events (line 1): is required"),
        ("- 1\n", "(top) (line 1): Input should be"),
    ],
)
def test_a_fault_is_told_with_its_line_and_what_may_be_meant(text: str, told: str, check: Check) -> None:
    status, out, err = check(text)
    assert (status, out) == (1, "")
    assert f"x.yaml: {told}" in err


def test_all_faults_are_told_in_the_order_of_their_lines(check: Check) -> None:
    _, _, err = check("trian: {}\nstorage: 5\nevents:\n  actions: [click]\n  unknown_fields: maybe\n")
    assert [line.split(":")[1].strip() for line in err.splitlines()] == [
        "trian (line 1)",
        "storage (line 2)",
        "events.unknown_fields (line 5)",
    ]


def test_a_secret_in_the_wrong_place_is_not_repeated(check: Check) -> None:
    _, _, err = check(GOOD + "kafka: {security: {protocol: SASL_SSL, password: hunter2}}\n")
    assert "did you mean password_file?" in err
    assert "hunter2" not in err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("storage: var/x\nevents: {actions: [click]}\n", "storage (line 1): is relative"),
        (
            GOOD + "serve: {host: 0.0.0.0}\n",
            "serve.host (line 3): is reached from elsewhere and there are no",
        ),
        (GOOD + "serve: {api_keys_file: absent}\n", "serve.api_keys_file (line 3): is not there"),
        (GOOD + "serve: {port: 1, port: 2}\n", "serve.port (line 3): is written twice"),
        (
            GOOD + "kafka: {bootstrap_servers: ['kafka:9092']}\n",
            "kafka.security.protocol (line 3): is PLAINTEXT: whoever is on the network reads",
        ),
        (
            GOOD + "kafka:\n  bootstrap_servers: ['kafka:9092']\n  security:\n    protocol: SASL_PLAINTEXT\n"
            "    mechanism: PLAIN\n    username: ann\n",
            "kafka.security.protocol (line 6): is SASL_PLAINTEXT",
        ),
        (
            GOOD + "kafka:\n  security:\n    protocol: SASL_SSL\n    mechanism: PLAIN\n    username: ann\n",
            "kafka.security.password_file (line 4): is not given, and GRSTREAM_KAFKA_PASSWORD is not in this",
        ),
        (
            GOOD + "kafka:\n  security:\n    protocol: SSL\n    ca_file: absent\n    check_hostname: false\n",
            "kafka.security.ca_file (line 6): is not there on this machine",
        ),
        (
            GOOD + "kafka: {security: {protocol: SSL, check_hostname: false}}\n",
            "kafka.security.check_hostname (line 3): is false: any host",
        ),
        (
            GOOD + "kafka: {security: {protocol: SASL_SSL, mechanism: OAUTHBEARER, oauth: {client_id: c,\n"
            "  token_url: 'https://a/t', client_secret_file: absent}}}\n",
            "kafka.security.oauth.client_secret_file (line 4): is not there",
        ),
    ],
)
def test_what_is_valid_and_unwise_is_a_warning(text: str, told: str, check: Check) -> None:
    status, out, err = check(text)
    assert (status, out) == (0, "x.yaml: a system, valid\n")
    assert f"x.yaml: warning: {told}" in err


def test_what_the_environment_gives_is_not_missed(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEYS_VARIABLE, "web=" + "w" * 16)
    monkeypatch.setenv(KAFKA_PASSWORD_VARIABLE, "x")
    text = (
        GOOD
        + "serve: {host: 0.0.0.0}\nkafka: {security: {protocol: SASL_SSL, mechanism: PLAIN, username: a}}"
    )
    assert check(text) == (0, "x.yaml: a system, valid\n", "")


def test_the_worst_file_decides_the_status(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in {"good": GOOD, "wrong": "storage: 1", "broken": "a: ["}.items():
        pathlib.Path(f"{name}.yaml").write_text(text)
    assert cli.main(["config", "check", "wrong.yaml", "good.yaml"]) == 1
    assert cli.main(["config", "check", "absent.yaml", "good.yaml"]) == 2
    assert cli.main(["config", "check", "good.yaml", "broken.yaml", "wrong.yaml"]) == 2
    said = capsys.readouterr()
    assert said.out.count("good.yaml: a system, valid") == 3
    assert "No such file or directory: 'absent.yaml'" in said.err
    assert "broken.yaml is not YAML" in said.err


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_of_the_project_is_valid(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.main(["config", "check", str(path.relative_to(ROOT))]) == 0, capsys.readouterr().err


def test_an_application_is_as_wrong_as_what_it_is_built_from(check: Check) -> None:
    text = "applications:\n- import_path: serve.app:build\n  args:\n    config: {storage: /x, evnts: {}}\n"
    status, _, err = check(text)
    assert status == 1
    assert (
        "x.yaml: applications.0.args.config (line 4): evnts: there is no such field; did you mean events?"
        in err
    )


def test_a_run_over_epochs_is_checked_as_one(check: Check) -> None:
    assert check("model: {}\nepochs: {epochs: 3}\n") == (0, "x.yaml: a run over epochs, valid\n", "")
    status, _, err = check("model: {}\nepochs: {epoch: 3}\n")
    assert status == 1
    assert "epochs.epoch (line 2): there is no such field; did you mean epochs?" in err


@pytest.mark.parametrize("reader", [load, load_run])
def test_whoever_reads_a_file_is_told_the_same(reader: Callable, tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.yaml").write_text("\nmodel: {layer: 3}\n")
    with pytest.raises(ConfigError, match=r"model\.layer \(line 2\): .*did you mean layers\?"):
        reader(tmp_path / "x.yaml")
