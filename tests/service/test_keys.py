from __future__ import annotations

import hmac
import logging
import stat
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from service.errors import RateLimited, Unauthorized
from service.keyring import KeysError, add_key, digest_of, read_keys, read_rate, remove_key
from service.keys import Keys, find_key, read_token
from service.keys_cli import keys as command


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def test_the_file_has_no_token_and_is_its_owners_alone(file: Path) -> None:
    token = add_key(file, "alice", rate="100/second", admin=True)
    assert len(token) > 40
    assert token not in file.read_text()
    assert tomllib.loads(file.read_text()) == {
        "keys": {"alice": {"sha256": digest_of(token).hex(), "rate": "100/second", "admin": True}}
    }
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["keys.toml"]


def test_tokens_are_random_and_keys_keep_to_themselves(file: Path) -> None:
    tokens = {name: add_key(file, name, rate=None, admin=False) for name in ("a", "b", "c")}
    assert len(set(tokens.values())) == 3
    keys = Keys(file)
    assert {name: keys.check(token).name for name, token in tokens.items()} == {"a": "a", "b": "b", "c": "c"}


def test_what_people_wrote_into_the_file_stays(file: Path) -> None:
    add_key(file, "alice", rate=None, admin=False)
    file.write_text("# ask Bob before you change this\n" + file.read_text())
    add_key(file, "bob", rate=None, admin=False)
    remove_key(file, "alice")
    assert file.read_text().startswith("# ask Bob before you change this\n")
    assert [key.name for key in read_keys(file)] == ["bob"]


@pytest.mark.parametrize("token", [None, "", "x", "hbll_", "ä", "\udcff"])
def test_an_unknown_token_is_refused(file: Path, token: str | None) -> None:
    add_key(file, "alice", rate=None, admin=False)
    with pytest.raises(Unauthorized):
        Keys(file).check(token)


def test_a_file_without_keys_lets_nobody_in(file: Path) -> None:
    file.touch()
    with pytest.raises(Unauthorized):
        Keys(file).check("anything")


@pytest.mark.parametrize("which", ["first", "last", "none"])
def test_every_check_compares_all_keys(file: Path, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that neither whether a token is known nor whose it is shows in how long it takes."""
    tokens = {name: add_key(file, name, rate=None, admin=False) for name in ("first", "middle", "last")}
    digest = digest_of(tokens.get(which, "hbll_wrong"))
    compared = []
    original = hmac.compare_digest

    def counting(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return original(one, other)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    found = find_key(read_keys(file), digest)
    assert (found.name if found else "none") == which
    assert compared == [(32, 32)] * 3


def test_one_key_over_its_rate_leaves_the_others_alone(file: Path) -> None:
    few = add_key(file, "few", rate="3/hour", admin=False)
    many = add_key(file, "many", rate="100/hour", admin=False)
    keys = Keys(file)
    for _ in range(3):
        keys.check(few)
    for _ in range(2):
        with pytest.raises(RateLimited, match="the API key 'few' may ask 3 per 1 hour: ask again in") as caught:
            keys.check(few)
        assert 3500 < int(caught.value.headers["Retry-After"]) <= 3600
    for _ in range(100):
        assert keys.check(many).name == "many"
    with pytest.raises(RateLimited):
        keys.check(many)


def test_changes_of_the_file_are_taken_and_rates_remember(file: Path) -> None:
    alice = add_key(file, "alice", rate="1/hour", admin=False)
    keys = Keys(file)
    keys.check(alice)
    bob = add_key(file, "bob", rate=None, admin=False)
    with pytest.raises(Unauthorized):
        keys.check(bob)
    keys.refresh()
    assert keys.check(bob).name == "bob"
    with pytest.raises(RateLimited):
        keys.check(alice)
    remove_key(file, "bob")
    keys.refresh()
    with pytest.raises(Unauthorized):
        keys.check(bob)


@pytest.mark.parametrize("content", ["keys = ", "[keys.alice]\nsha256 = 'short'\n", None])
def test_a_broken_file_keeps_the_old_keys_and_says_so_once(
    file: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    alice = add_key(file, "alice", rate=None, admin=False)
    keys = Keys(file)
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    with caplog.at_level(logging.ERROR):
        keys.refresh()
        keys.refresh()
    (record,) = caplog.records
    assert record.getMessage().startswith(f"the API keys stay as they were: the keys file {file} ")
    assert keys.check(alice).name == "alice"


SHA = "0" * 64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[keys.a]", r"keys\.a\.sha256: Field required"),
        ("[keys.a]\nsha256 = 'xyz'", r"keys\.a\.sha256: String should match"),
        (f"[keys.a]\nsha256 = '{SHA}'\nrate = 'often'", r"keys\.a\.rate: expected one rate like 100/second .*got 'often'"),
        (f"[keys.a]\nsha256 = '{SHA}'\nrate = '99999/day'", "expected a rate of 1 to 10000 requests"),
        (f"[keys.a]\nsha256 = '{SHA}'\nadmin = 'no'", r"keys\.a\.admin: Input should be a valid boolean"),
        (f"[keys.a]\nsha256 = '{SHA}'\ntoken = 'x'", r"keys\.a\.token: Extra inputs are not permitted"),
        (f"[keys.'a b']\nsha256 = '{SHA}'", "String should match pattern"),
        (f"[keys.a]\nsha256 = '{SHA}'\n[keys.b]\nsha256 = '{SHA}'", "two keys have the same sha256"),
        ("keyz = 1", "keyz: Extra inputs are not permitted"),
        ("\x00", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused_and_says_where(file: Path, content: str, message: str) -> None:
    file.write_text(content)
    with pytest.raises(KeysError, match=message):
        read_keys(file)


@pytest.mark.parametrize("text", ["", "0/second", "-1/second", "10/fortnight", "1/second;2/minute", "10001/day"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        read_rate(text)


@pytest.mark.parametrize(
    ("authorization", "api_key", "token"),
    [
        ("Bearer abc", None, "abc"),
        ("bearer  abc ", None, "abc"),
        (None, "abc", "abc"),
        ("Bearer abc", "other", "abc"),
        ("Basic dXNlcg==", None, None),
        ("Basic dXNlcg==", "abc", "abc"),
        ("Bearer", None, None),
        ("Bearer ", " ", None),
        (None, None, None),
    ],
)
def test_tokens_are_a_bearers_or_in_a_header_of_their_own(
    authorization: str | None, api_key: str | None, token: str | None
) -> None:
    assert read_token(authorization, api_key) == token


def test_the_command_makes_lists_and_removes_keys(file: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(command, [*arguments, "--file", str(file)])
        return result.exit_code, result.output

    assert run("list") == (1, f"Error: the keys file {file} does not exist: `hbll keys add NAME --file {file}` makes it\n")
    status, token = run("add", "alice", "--rate", "100/second")
    assert status == 0
    assert run("add", "operator", "--admin")[0] == 0
    assert run("list") == (0, "alice\t100 per 1 second\noperator\tany rate\tadmin\n")
    assert Keys(file).check(token.strip()).name == "alice"
    for arguments, message in (
        (("add", "alice"), "has a key 'alice' already"),
        (("add", "bob", "--rate", "often"), "keys.bob.rate: expected one rate like 100/second"),
        (("add", "a b"), "String should match pattern"),
        (("remove", "bob"), "has no key 'bob': it has alice, operator"),
    ):
        status, output = run(*arguments)
        assert (status, message in output) == (1, True), output
    assert run("remove", "alice") == (0, "")
    assert run("list") == (0, "operator\tany rate\tadmin\n")
