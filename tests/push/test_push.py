"""The requests of the real client to a double of the Hub, and what is told when it refuses."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import transformers
from architectures import Maker
from hub_double import ORGANISATION, USER, Asked, Hub, Repository
from huggingface_hub import metadata_load
from typer.testing import CliRunner, Result

import zqfp_convert
from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.source import hub as fetching
from zqfp_convert.cli.main import app, arguments
from zqfp_convert.errors import OptionError, OutputError, Stopped
from zqfp_convert.push import run as pushing
from zqfp_convert.push.run import push
from zqfp_convert.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's
NAME = f"{USER}/packed"
DEMO = Path(__file__).parents[2] / "zqfp_convert" / "demo" / "model"


def command(*words: str | Path) -> Result:
    return CliRunner().invoke(app, arguments([str(word) for word in words]))


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def out(converted: Maker, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted("llama", "best"), tmp_path / "private place" / "out"))


def test_what_is_asked_and_what_is_there(double: Hub, out: Path) -> None:
    before = hashes(out)
    (out / "notes.txt").write_text("mine")
    done = push(out, NAME, private=True)
    assert done.created
    assert done.left_out == ["notes.txt"]
    words = double.sequence()
    assert words[:3] == ["whoami", "create", "preupload"]
    assert words[-1] == "commit"
    assert words.index("create") < words.index("preupload") < words.index("batch")
    assert max(i for i, w in enumerate(words) if w == "put") < words.index("commit")
    made = json.loads(double.of("create")[0].body)
    assert made.get("visibility") == "private" or made.get("private") is True
    repository = double.repositories[NAME]
    assert repository.private
    shards = json.loads((out / layout.MANIFEST_FILE).read_text())["shards"]
    assert {a.path.rpartition("/")[2] for a in double.of("put")} >= {
        shard["sha256"] for shard in shards.values()
    }
    for path in set(before) - {"README.md"}:
        assert hashlib.sha256(repository.files[path]).hexdigest() == before[path]
    assert "notes.txt" not in repository.files
    assert repository.files["report.png"].startswith(b"\x89PNG")
    (out / "notes.txt").unlink()
    assert hashes(out) == before  # nothing is left in the checkpoint
    verify(out)


def test_a_token_is_in_headers_alone(
    double: Hub, out: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    done = command("push", out, NAME, "--private", "--debug")
    assert done.exit_code == 0, done.output
    double.answer = lambda asked: (403, f"no: {double.token}") if asked.what == "create" else None
    refused = command("push", out, f"{USER}/other", "--debug")
    assert isinstance(refused.exception, OutputError)
    assert "no: ***" in str(refused.exception)
    links: BaseException | None = refused.exception
    while links is not None:  # what a traceback shows
        assert double.token not in str(links)
        links = links.__cause__ or (None if links.__suppress_context__ else links.__context__)
    assert caplog.text  # of the client and of its transport
    assert double.token not in done.output + refused.output + caplog.text
    assert all(double.token.encode() not in asked.body for asked in double.asked)
    assert all(double.token not in asked.path for asked in double.asked)
    assert not [
        f for f in tmp_path.rglob("*") if f.is_file() and double.token.encode() in f.read_bytes()
    ]
    for repository in double.repositories.values():
        assert all(double.token.encode() not in data for data in repository.files.values())


@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_upload_sends_nothing_twice(
    double: Hub, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "AT_ONCE", 1)
    monkeypatch.setattr(pushing, "IN_A_COMMIT", 1)
    shards = json.loads((out / layout.MANIFEST_FILE).read_text())["shards"]
    assert len(shards) > 2
    double.answer = lambda asked: (403, "quota") if len(double.of("put")) == 3 else None
    with pytest.raises(OutputError) as raised:
        push(out, NAME, private=True)
    for word in (str(out), "is whole", f"zqfp-convert push '{out}' {NAME} --private", "quota"):
        assert word in str(raised.value)
    repository = double.repositories[NAME]
    assert [len(commit) for commit in repository.commits] == [1, 1]
    assert layout.CONFIG_FILE not in repository.files  # half of it cannot be loaded
    sent = set(double.blobs)
    double.asked.clear()
    double.answer = lambda asked: None
    done = push(out, NAME, private=True)
    assert not done.created
    again = {asked.path.rpartition("/")[2] for asked in double.of("put")}
    assert not again & sent
    named = b"".join(asked.body for asked in double.of("batch")).decode()
    assert not any(oid in named for oid in sent)  # not even asked for: the commits are known
    assert set(done.there) == {path for commit in repository.commits[:2] for path in commit}
    assert repository.commits[-1][-1] != layout.CONFIG_FILE
    assert layout.CONFIG_FILE in repository.commits[-1]
    double.asked.clear()
    done = push(out, NAME, private=True)
    assert (done.sent, double.of("preupload"), double.of("commit")) == ([], [], [])


@pytest.mark.usefixtures("undrawn")
def test_uploaded_but_not_committed(double: Hub, out: Path) -> None:
    double.answer = lambda asked: (503, "busy") if asked.what == "commit" else None
    with pytest.raises(OutputError, match="503"):
        push(out, NAME)
    sent = set(double.blobs)
    assert sent
    assert not double.repositories[NAME].commits
    double.asked.clear()
    double.answer = lambda asked: None
    push(out, NAME)
    assert not {asked.path.rpartition("/")[2] for asked in double.of("put")} & sent


@pytest.mark.usefixtures("undrawn")
def test_ctrl_c(double: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", pressed)
    with pytest.raises(Stopped, match=r"is whole.*Go on with") as raised:
        push(out, NAME)
    assert "zqfp-convert push" in str(raised.value)


def refusing(what: str, status: int, double: Hub) -> None:
    def answer(asked: Asked) -> tuple[int, str] | None:
        return (status, "You have no right to do this") if asked.what == what else None

    double.answer = answer


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no token", ["no token", "hf auth login", "HF_TOKEN"]),
        ("another token", ["401", "hf auth login", "is whole"]),
        ("reads only", ["may only read"]),
        ("another's", [f"no member of {ORGANISATION}x", f"Give {USER}/packed"]),
        ("no right", ["403", "You have no right", "is whole"]),
        ("taken", ["holds something else (pytorch_model.bin)", "--overwrite"]),
        ("public", ["exists and is public"]),
        ("offline", ["HF_HUB_OFFLINE", "is whole"]),
        ("gone", ["cannot be reached", "is whole", "zqfp-convert push"]),
    ],
)
def test_refusals(
    case: str, words: list[str], double: Hub, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, private = NAME, False
    match case:
        case "no token":
            monkeypatch.delenv("HF_TOKEN")
        case "another token":
            monkeypatch.setenv("HF_TOKEN", "hf_another")
        case "reads only":
            double.role = "read"
        case "another's":
            name = f"{ORGANISATION}x/packed"
        case "no right":
            refusing("create", 403, double)
        case "taken":
            double.repositories[NAME] = Repository(files={"pytorch_model.bin": b"x"})
        case "public":
            double.repositories[NAME], private = Repository(), True
        case "offline":
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
            huggingface_hub.close_session()
        case "gone":
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    before = hashes(out)
    with pytest.raises(OutputError) as raised:
        push(out, name, private=private)
    for word in words:
        assert word in str(raised.value)
    assert hashes(out) == before
    assert not double.of("put")
    assert not double.of("commit")


def test_names_and_folders(double: Hub, out: Path, tmp_path: Path) -> None:
    for wrong in ("packed", "a/b/c", "someone/..", "someone/pa cked", ""):
        with pytest.raises(OptionError, match="USER/NAME"):
            push(out, wrong)
    with pytest.raises(OptionError, match="no such folder"):
        push(tmp_path / "none", NAME)
    assert not double.asked


@pytest.mark.usefixtures("undrawn")
def test_a_manifest_that_names_files_outside(double: Hub, out: Path) -> None:
    (out.parent / "secret.txt").write_text("mine")
    manifest = json.loads((out / layout.MANIFEST_FILE).read_text())
    outside = ["../secret.txt", str(out.parent / "secret.txt"), "./../secret.txt"]
    manifest["files"] += outside
    (out / layout.MANIFEST_FILE).write_text(json.dumps(manifest))
    push(out, NAME)
    assert not [path for path in double.repositories[NAME].files if "secret" in path]


@pytest.mark.usefixtures("undrawn")
def test_replacing_what_is_there(double: Hub, out: Path, converted: Maker) -> None:
    push(converted("opt", "fast"), NAME)
    double.repositories[NAME].files["tf_model.h5"] = b"x"
    earlier = set(double.repositories[NAME].files)
    with pytest.raises(OutputError, match="--overwrite"):
        push(out, NAME)
    done = push(out, NAME, overwrite=True)
    assert done.removed == ["tf_model.h5"]
    held = set(double.repositories[NAME].files)
    assert held == earlier - set(done.removed) | {*done.sent, *done.there}
    assert ".gitattributes" in held


@pytest.mark.usefixtures("undrawn")
def test_a_stranger_loads_it(double: Hub, out: Path) -> None:
    push(out, NAME)
    assert len(verify(NAME).errors) == 0
    folder = fetching.fetch(NAME)
    assert double.of("file")
    mine, theirs = (zqfp_convert.load(place, device="cpu") for place in (out, folder))
    assert mine.state_dict().keys() == theirs.state_dict().keys()


def test_the_card(double: Hub, converted: Maker, tiny_model: Maker, tmp_path: Path) -> None:
    """Licence and base model come from the source's card and from its place in the Hub's cache."""
    revision = 40 * "a"
    source = tmp_path / "models--maker--model" / "snapshots" / revision
    shutil.copytree(tiny_model(), source)
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: makers-own\nlicense_link: LICENSE\nlanguage:\n- en\n"
        "widget: x\n---\nThe maker's words.\n"
    )
    config = json.loads((source / "config.json").read_text())
    config["_name_or_path"] = str(tmp_path / "home" / "me")
    (source / "config.json").write_text(json.dumps(config))
    zqfp_convert.convert(source, tmp_path / "out", recipe="fast", device="cpu")
    push(tmp_path / "out", NAME)
    files = double.repositories[NAME].files
    card = tmp_path / "card.md"
    card.write_bytes(files["README.md"])
    data = metadata_load(card)
    assert data["base_model"] == "maker/model"
    assert data["base_model_relation"] == "quantized"
    assert data["license_name"] == "makers-own"
    assert data["language"] == ["en"]
    assert data["library_name"] == "zqfp-convert"
    assert "widget" not in data
    text = card.read_text()
    for said in (
        f'zqfp_convert.load("{NAME}"', f'from_pretrained("{NAME}"', f"vllm serve {NAME}",
        "(report.png)", "makers-own", revision, "not been measured", zqfp_convert.__version__,
        "| recipe | fast |",
    ):  # fmt: skip
        assert said in text
    for path, content in files.items():
        assert str(tmp_path).encode() not in content, path
    push(tmp_path / "out", NAME, base_model="a/b", license_name="mit")
    card.write_bytes(files["README.md"])
    assert metadata_load(card)["license"] == "mit"
    assert metadata_load(card)["base_model"] == "a/b"
    assert "license_name" not in metadata_load(card)


@pytest.mark.usefixtures("undrawn")
def test_what_transformers_has_saved(double: Hub, out: Path, tmp_path: Path) -> None:
    """A tokenizer that was saved beside the model belongs to it, though no manifest names it."""
    saved = tmp_path / "saved"
    transformers.AutoModelForCausalLM.from_pretrained(out).save_pretrained(saved)
    transformers.AutoTokenizer.from_pretrained(out).save_pretrained(saved)
    (saved / "notes.txt").write_text("mine")
    assert push(saved, NAME).left_out == ["notes.txt"]
    files = double.repositories[NAME].files
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= files.keys()


@pytest.mark.usefixtures("undrawn")
def test_without_what_draws(double: Hub, out: Path) -> None:
    done = command("push", out, NAME)
    assert "[report]" in done.stdout
    files = double.repositories[NAME].files
    assert "report.png" not in files
    assert b"report.png" not in files["README.md"]


@pytest.mark.usefixtures("undrawn")
def test_converting_and_pushing(
    double: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [DEMO, tmp_path / "out", "--recipe", "fast", "--push-to-hub", NAME, "--private"]
    monkeypatch.delenv("HF_TOKEN")
    refused = command(*words)
    assert refused.exit_code == 2
    assert "no token" in refused.stderr
    assert not (tmp_path / "out").exists()  # before any work
    monkeypatch.setenv("HF_TOKEN", double.token)
    done = command(*words, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["pushed"]["url"].endswith(NAME)
    assert found["layers"] == 28
    assert double.repositories[NAME].private


@pytest.mark.usefixtures("undrawn")
def test_what_is_refused_is_not_downloaded(double: Hub, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in DEMO.iterdir()}
    double.repositories["maker/model"] = Repository(files=files, lfs={"model.safetensors"})

    def read() -> list[bool]:
        """Whether the weights' file was asked for in part, for each time that it was."""
        asked = [a for a in double.of("file") if a.path.endswith("model.safetensors")]
        return ["range" in one.headers for one in asked]

    words = ["maker/model", tmp_path / "out", "--recipe", "fast"]
    for _ in range(2):  # the first try leaves the other files in the cache
        before = len(read())
        refused = command(*words, "--ignore", "no_such_layer")
        assert refused.exit_code == 2
        assert "no_such_layer" in refused.stderr
        assert len(read()) > before
        assert all(read())
    done = command(*words)
    assert done.exit_code == 0, done.output
    before = len(read())
    assert command(*words, "--overwrite").exit_code == 0  # from the cache
    assert len(read()) == before


def test_a_dry_run_leaves_weights_there(double: Hub, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in DEMO.iterdir()}
    double.repositories["maker/model"] = Repository(files=files, lfs={"model.safetensors"})
    told = command("maker/model", tmp_path / "out", "--dry-run", "--json")
    assert told.exit_code == 0, told.output
    plan = json.loads(told.stdout)
    local = json.loads(command(DEMO, tmp_path / "out", "--dry-run", "--json").stdout)
    assert plan.pop("model").startswith("maker/model, revision c0ffee")
    local.pop("model")
    for one in (plan, local):  # these change from one moment to the next
        assert one.pop("estimated_seconds") > 0
        assert one["disk"].pop("free") > 0
    assert plan == local
    read = [a for a in double.of("file") if a.path.endswith("model.safetensors")]
    assert read
    assert all(asked.headers.get("range") for asked in read)
    cached = [path for path in tmp_path.rglob("*") if path.suffix == ".safetensors"]
    assert cached == []
    missing = command("maker/none", tmp_path / "out", "--dry-run")
    assert missing.exit_code == 2
    assert "spelling" in missing.stderr
