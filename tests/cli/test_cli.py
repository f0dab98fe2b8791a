"""What a user of the command line would lose: exit codes, clean JSON, plain messages, light commands."""

from __future__ import annotations

import json

import pytest

COMMANDS = ("demo", "publish", "ls", "inspect", "verify", "ask", "audit", "env")
RUN = "from kvkern.cli import main; main()"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example__every_command(kv, command):
    result = kv(command, "--help")
    assert result.exit_code == 0
    assert f"Example: kvkern {command}" in result.stdout


@pytest.mark.parametrize("command", ["ls", "inspect", "verify", "env"])
def test_json_is_one_document__nothing_else_on_stdout(kv, small_store, command):
    where = [] if command == "env" else ["--store", small_store.root]
    what = [small_store.digest[:8]] if command == "inspect" else []
    result = kv(command, *what, *where, "--format", "json")
    assert result.exit_code == 0, result.stderr
    assert isinstance(json.loads(result.stdout), dict)
    assert result.stderr == ""


def test_ls_names_the_document__in_both_formats(kv, small_store):
    document = json.loads(kv("ls", "--store", small_store.root, "--format", "json").stdout)["documents"][0]
    assert document["digest"] == small_store.digest
    assert (document["tokens"], document["blocks"], document["spec"]["architecture"]) == (300, 2, "TinyForCausalLM")
    assert small_store.digest[:16] in kv("ls", "--store", small_store.root).stdout


def test_ls_warns_in_one_line__a_damaged_manifest(kv, small_store):
    (small_store.root / "manifests" / f"{small_store.digest}.json").write_text("{}")
    result = kv("ls", "--store", small_store.root, "--format", "json")
    assert json.loads(result.stdout)["documents"] == []
    assert result.stderr.startswith("kvkern: warning: left out of the list") and result.stderr.count("\n") == 1


def test_inspect_document__shows_spec_blocks_and_bytes_per_token(kv, small_store):
    data = json.loads(kv("inspect", small_store.digest, "--store", small_store.root, "--format", "json").stdout)
    assert data["bytes_per_token"] == 2 * 2 * 2 * 64 * 2
    assert data["spec"]["config"] == {"rope": {"rope_theta": 10000.0}}
    assert [(block["first"], block["tokens"]) for block in data["blocks"]] == [(0, 256), (256, 44)]
    sizes = {path.stem: path.stat().st_size for path in small_store.blocks}
    assert {block["id"]: block["bytes"] for block in data["blocks"]} == sizes


def test_inspect_document__a_missing_block_is_named(kv, small_store):
    small_store.blocks[0].unlink()
    assert "missing" in kv("inspect", small_store.digest, "--store", small_store.root).stdout


def test_inspect_shard__shows_what_a_safetensors_reader_sees(kv, small_store):
    path = max(small_store.blocks, key=lambda path: path.stat().st_size)
    data = json.loads(kv("inspect", path, "--format", "json").stdout)
    assert (data["first"], data["count"], data["payload_offset"] % 4096) == (0, 256, 0)
    assert data["is_named_by_sha256"] and data["sha256"] == path.stem
    shapes = {tensor["name"]: tensor["shape"] for tensor in data["tensors"]}
    assert shapes == {"tokens": [4, 64], "k": [4, 2, 2, 64, 64], "v": [4, 2, 2, 64, 64]}
    assert path.stat().st_size == data["payload_offset"] + sum(tensor["bytes"] for tensor in data["tensors"])


def test_inspect_shard__a_foreign_file_is_refused(kv, tmp_path):
    (tmp_path / "foreign.safetensors").write_bytes(b"no safetensors")
    result = kv("inspect", tmp_path / "foreign.safetensors")
    assert result.exit_code == 1 and "not a kvkern shard" in result.stderr


def test_verify_finds_nothing__an_intact_store(kv, small_store):
    result = kv("verify", "--store", small_store.root)
    assert result.exit_code == 0 and "every byte as published" in result.stdout


def test_verify_exits_2_and_names_the_file__one_flipped_bit(kv, small_store):
    path = small_store.damage()
    result = kv("verify", small_store.digest[:8], "--store", small_store.root, "--format", "json")
    assert result.exit_code == 2
    report = json.loads(result.stdout)
    assert not report["ok"]
    assert [defect["path"] for defect in report["defects"]] == [str(path)]
    assert len(list((small_store.root / "quarantine").iterdir())) == 1 and not path.exists()


def test_inspect_exits_2__a_damaged_manifest(kv, small_store):
    manifest = small_store.root / "manifests" / f"{small_store.digest}.json"
    manifest.write_text(manifest.read_text() + " ")
    result = kv("inspect", small_store.digest, "--store", small_store.root)
    assert result.exit_code == 2 and "SHA-256" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nonsense"], "No such command"),
        (["publish", "smollm2"], "FILE"),
        (["ls", "--format", "yaml"], "yaml"),
        (["verify", "00000000"], "is not in"),
        (["inspect", "xyz"], "hex digits"),
        (["publish", "smollm2", "/nowhere/book.txt"], "/nowhere/book.txt: No such file"),
        (["ask", "00000000", "Why?", "--model", "smollm2"], "is not in"),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, list) else "",
)
def test_user_errors_exit_1_with_a_message__no_traceback(kv, small_store, args, message):
    where = ["--store", small_store.root] if args[0] in ("verify", "inspect", "ask") else []
    result = kv(*args, *where)
    assert result.exit_code == 1
    assert message in result.stderr and "Traceback" not in result.stderr
    assert result.stdout == ""
    assert result.exception is None or isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("command", ["ls", "verify", "inspect 00000000", "ask 00000000 Why? --model x"])
def test_reading_leaves_no_directory_behind__a_mistyped_store(kv, tmp_path, command):
    result = kv(*command.split(), "--store", tmp_path / "typo")
    assert result.exit_code == 1 and "no store at" in result.stderr
    assert not (tmp_path / "typo").exists()


def test_publish_says_which_byte__a_file_that_is_not_utf8(kv, tmp_path):
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    result = kv("publish", "smollm2", tmp_path / "latin1.txt")
    assert result.exit_code == 1 and "not UTF-8 text" in result.stderr and "byte 3" in result.stderr


@pytest.mark.parametrize("command", ["ls", "inspect", "verify", "env"])
def test_light_commands_work__without_transformers(fresh, small_store, command):
    where = [] if command == "env" else ["--store", small_store.root]
    what = [small_store.digest] if command == "inspect" else []
    done = fresh(RUN, command, *what, *where, "--format", "json", blocked=("transformers",))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


def test_publish_names_the_extra__without_transformers(fresh, tmp_path):
    (tmp_path / "book.txt").write_text("a book")
    done = fresh(RUN, "publish", "smollm2", tmp_path / "book.txt", blocked=("transformers",))
    assert done.returncode == 1
    assert done.stderr.strip() == "kvkern: error: this command needs transformers: pip install 'kvkern[hf]'"


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_import_names_the_extra__without_typer_or_rich(fresh, package):
    done = fresh("import kvkern.cli", blocked=(package,))
    assert done.returncode == 1
    assert "pip install 'kvkern[cli]'" in done.stderr and "Traceback" not in done.stderr


def test_import_loads_no_torch__so_that_the_demo_can_choose_the_isa(fresh):
    done = fresh("import kvkern.cli; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_damage_exits_2_without_traceback__in_a_real_process(fresh, small_store):
    small_store.damage()
    done = fresh(RUN, "verify", "--store", small_store.root)
    assert done.returncode == 2
    assert "DAMAGED" in done.stdout and done.stderr == ""


def test_why_says_what_matches_and_which_field_does_not(kv, small_store, tmp_path):
    ids = [*range(280), 7, 8]
    (tmp_path / "ids.txt").write_text(str(ids))
    result = kv("why", tmp_path / "ids.txt", "--store", small_store.root)
    assert result.exit_code == 0 and "token_ids[280]: 280, 7" in result.stdout and "yes" in result.stdout
    data = json.loads(kv("why", "0,1 2", "--store", small_store.root, "--format", "json").stdout)
    (found,) = data["documents"]
    assert (found["digest"], found["matched"], found["usable"]) == (small_store.digest, 3, True)
    refused = kv("why", "one two", "--store", small_store.root)
    assert refused.exit_code == 1 and "TOKENS" in refused.stderr


def test_remove_and_gc_take_the_space_back_in_two_runs(kv, small_store):
    assert kv("gc", "--store", small_store.root).exit_code == 0
    removed = kv("remove", small_store.digest[:9], "--store", small_store.root)
    assert removed.exit_code == 0 and small_store.digest in removed.stdout
    assert "no documents" in kv("ls", "--store", small_store.root).stdout
    gc = ("gc", "--grace", "0", "--store", small_store.root, "--format", "json")
    assert json.loads(kv(*gc, "--dry-run").stdout)["blocks_condemned"] == 2 and len(small_store.blocks) == 2
    assert json.loads(kv(*gc).stdout)["blocks_condemned"] == 2 and small_store.blocks == []
    assert json.loads(kv(*gc).stdout)["blocks_deleted"] == 2
    assert kv("remove", small_store.digest, "--store", small_store.root).exit_code == 1


def test_verify_exits_2_until_a_damaged_manifest_is_published_again(kv, small_store):
    manifest = small_store.root / "manifests" / f"{small_store.digest}.json"
    manifest.write_text(manifest.read_text().replace("2", "3"))
    for _ in range(2):
        result = kv("verify", "--store", small_store.root)
        assert result.exit_code == 2 and small_store.digest[:16] in result.stdout
    assert kv("gc", "--store", small_store.root).exit_code == 1
