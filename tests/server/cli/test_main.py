"""The command, in real processes. `counting_engine.py` stands in for a model."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from engine.ipc.messages import EXIT_CODES
from server.cli.main import flagged_settings, layers, main, make_parser, option_names
from server.settings import ConfigError, load_config
from server.telemetry.console import process_begun_at
from tests import ROOT
from tests.support import counting_engine

COUNTING = [sys.executable, counting_engine.__file__]
PEREGRINE = [sys.executable, "-m", "server.cli"]
FLAGS_OF_VLLM = [
    "--host",
    "--port",
    "--served-model-name",
    "--api-key",
    "--max-model-len",
    "--max-num-seqs",
    "--max-num-batched-tokens",
    "--dtype",
    "--seed",
    "--quantization",
    "--speculative-config",
    "--gpu-memory-utilization",
    "--kv-cache-dtype",
    "--shutdown-timeout",
    "--no-enable-prefix-caching",
]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": "/nonexistent/cache"}


def run(command: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=60, check=False
    )


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    return result.stderr.rstrip("\n").rpartition("\n")[2]


@dataclass
class Running:
    process: subprocess.Popen[str]
    url: str
    log: Path

    @property
    def engine(self) -> psutil.Process:
        [engine] = self.children("engine.process")
        return engine

    def children(self, module: str) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if any(part.endswith(module) for part in child.cmdline())]

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        return self.process.wait(30)

    def wait_until_ready(self) -> None:
        wait_for(lambda: httpx.get(self.url + "/readyz").status_code == 200)


def wait_for(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.TransportError):
            if condition():
                return
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@contextlib.contextmanager
def serving(tmp_path: Path, *arguments: str, ready: bool = True, output: str | None = None) -> Iterator[Running]:
    """output: a file to write to instead of a log"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = Path(output) if output is not None else tmp_path / "log"
    with log.open("w") as stream:
        command = [*COUNTING, *arguments, "--port", str(port), "--served-model-name", "tiny"]
        process = subprocess.Popen(command, stdout=stream, stderr=stream, text=True, cwd=ROOT, env=environment())
    running = Running(process, f"http://127.0.0.1:{port}", log)
    try:
        if ready:
            running.wait_until_ready()
        yield running
    finally:
        process.kill()
        process.wait()


def parse(*arguments: str):
    return load_config(layers(make_parser().parse_fully(["serve", *arguments])))


def test_every_flag_of_the_common_ones_is_there():
    flags = {name for setting in flagged_settings() for name in option_names(setting)}
    assert set(FLAGS_OF_VLLM) <= flags


def test_flags_set_what_they_are_named_for():
    loaded = parse(
        "some/model", "--host", "::1", "--port", "9", "--served-model-name", "a", "b", "--api-key", "k1",
        "--api-key", "k2", "--max-model-len", "512", "--max-num-seqs", "3", "--max-num-batched-tokens", "64",
        "--dtype", "float32", "--seed", "7", "--quantization", "int8", "--gpu-memory-utilization", "0.5",
        "--kv-cache-dtype", "float16",
        "--shutdown-timeout", "1.5", "--no-enable-prefix-caching", "--speculative-config",
        '{"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_max": 5, "prompt_lookup_min": 3}',
    )  # fmt: skip
    config = loaded.config
    assert config.model.path == "some/model"
    assert (config.server.host, config.server.port, config.server.shutdown_timeout) == ("::1", 9, 1.5)
    assert (config.server.served_model_name, config.server.api_keys) == (["a", "b"], ["k1", "k2"])
    assert (config.model.max_model_len, config.model.dtype, config.model.quantization) == (512, "float32", "int8")
    assert (config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens) == (3, 64)
    assert (config.kv_cache.memory, config.kv_cache.dtype, config.kv_cache.prefix_caching) == ("0.5", "float16", False)
    speculation = config.speculation
    assert (speculation.method, speculation.num_drafts, speculation.ngram_max, speculation.ngram_min) == (
        "ngram",
        6,
        5,
        3,
    )
    assert config.seed == 7
    assert loaded.sources["model.path"] == "MODEL"
    assert loaded.sources["speculation.num_drafts"] == "--speculative-config"


def test_flags_that_are_not_given_leave_the_defaults():
    assert parse().config == load_config([]).config
    assert parse().sources == {}


def test_stronger_places_win(tmp_path, monkeypatch):
    file = tmp_path / "a.yaml"
    file.write_text("server: {port: 1, api_keys: [from-file]}\nlimits: {max_n: 2}\nseed: 5\n")
    monkeypatch.setenv("PEREGRINE_API_KEY", "from-environment, second")
    loaded = parse("--config", str(file), "--port", "2", "--seed", "6", "--set", "seed=7")
    assert (loaded.config.server.port, loaded.config.limits.max_n, loaded.config.seed) == (2, 2, 7)
    assert loaded.config.server.api_keys == ["from-environment", "second"]
    assert loaded.sources == {
        "server.port": "--port",
        "limits.max_n": str(file),
        "seed": "--set",
        "server.api_keys": "PEREGRINE_API_KEY",
    }


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"method": ', "--speculative-config: not valid JSON"),
        ("[1]", "must be a JSON object with keys of method"),
        ('{"num_speculative_token": 4}', "did you mean num_speculative_tokens?"),
        ('{"num_speculative_tokens": 0}', "--speculative-config: speculation.num_drafts: must be greater"),
        ('{"prompt_lookup_min": 9}', "ngram_min (9) must not be above ngram_max (4)"),
        ('{"draft_tensor_parallel_size": 2}', "draft_tensor_parallel_size must be 1: a draft model runs on one device"),
        ('{"draft_tensor_parallel_size": "1"}', "leave it out or set it to 1"),
        ('{"method": "ngram", "parallel_drafting": true}', "the method ngram makes drafts without a pass"),
        (
            '{"method": "draft_model", "parallel_drafting": true}',
            "parallel_drafting is true, but the method draft_model",
        ),
        ('{"method": "medusa", "parallel_drafting": false}', "the method medusa makes all drafts in one pass"),
        ('{"draft_tensor_parallel_size": true}', "draft_tensor_parallel_size must be 1"),
    ],
)
def test_the_speculative_config_is_checked(text, complaint):
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        parse("--speculative-config", text)


def test_keys_of_vllm_that_are_true_of_us_are_taken():
    for given in ({"method": "eagle3", "parallel_drafting": True}, {"method": "medusa", "parallel_drafting": True}):
        assert parse("--speculative-config", json.dumps(given)).config.speculation.parallel_drafting is True
    given = {"method": "draft_model", "model": "m", "draft_tensor_parallel_size": 1, "parallel_drafting": False}
    loaded = parse("--speculative-config", json.dumps(given))
    assert loaded.config.speculation.model == "m"
    assert loaded.sources.keys() == {f"speculation.{name}" for name in ("method", "model", "parallel_drafting")}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["serve", "--max-num-seq", "4"], "did you mean --max-num-seqs?"),
        (["serve", "--prot", "4"], "did you mean --port?"),
        (["serve", "--port", "http"], "--port: server.port: must be a valid integer"),
        (["serve", "--set", "limits.max_nn=3"], "did you mean limits.max_n?"),
        (["serve", "--config", "/nonexistent.yaml"], "/nonexistent.yaml: cannot be read: No such file"),
        (["serve", "--dtype", "int3"], "--dtype: model.dtype: must be 'auto', 'float32'"),
        (["surf"], "surf"),
        ([], "COMMAND"),
    ],
)
def test_a_wrong_command_line_ends_with_the_fix_and_code_2(arguments, complaint, capsys):
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    assert code == EXIT_CODES["config"]
    line = capsys.readouterr().err.rstrip("\n").rpartition("\n")[2]
    assert complaint in line
    assert line.startswith("peregrine: ")


def test_the_command_itself_ends_so():
    result = run(PEREGRINE, "serve", "--set", "limits.max_nn=3")
    assert result.returncode == EXIT_CODES["config"]
    assert (
        result.stderr == "peregrine: config: --set: there is no setting 'limits.max_nn'; did you mean limits.max_n?\n"
    )
    assert result.stdout == ""


def test_version_and_help_are_told_quickly():
    started_at = time.monotonic()
    assert re.fullmatch(r"peregrine \S+\n", run(PEREGRINE, "--version").stdout)
    text = run(PEREGRINE, "serve", "--help").stdout
    assert all(flag in text for flag in FLAGS_OF_VLLM)
    assert time.monotonic() - started_at < 30


@pytest.mark.parametrize("kind", ["config", "memory", "model"])
def test_a_failed_start_ends_with_its_root_cause_and_a_code_by_kind(kind):
    result = run(COUNTING, f"counting?fail={kind}", "--port", "0")
    assert result.returncode == EXIT_CODES[kind]
    assert last_line(result) == f"peregrine: {kind}: a failure of the {kind} was ordered; use another MODEL"


def test_an_engine_that_dies_while_it_starts_ends_the_server():
    result = run(COUNTING, "counting?fail=crash", "--port", "0")
    assert result.returncode == EXIT_CODES["internal"]
    assert "exit code 9 while it started" in last_line(result)


def test_an_engine_that_keeps_dying_ends_the_server_with_a_code_of_its_own(tmp_path):
    with serving(tmp_path, "--set", "supervision.max_deaths=2") as server:
        for _ in range(2):
            server.wait_until_ready()
            answered = httpx.post(
                server.url + "/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 1}
            )
            assert answered.status_code == 200  # a kill of a process that has computed nothing would not count
            engine = server.engine
            engine.kill()
            wait_for(lambda gone=engine: not gone.is_running())
        assert server.end() == EXIT_CODES["crash_loop"]
        assert server.log.read_text().rstrip().rpartition("\n")[2].startswith("peregrine: crash_loop: ")


def test_a_full_disk_under_the_log_costs_the_log_only(tmp_path):
    with serving(tmp_path, output="/dev/full") as server:
        engine = server.engine
        engine.kill()  # which is told in lines that cannot be written
        wait_for(lambda: not engine.is_running())
        server.wait_until_ready()
        answered = httpx.post(server.url + "/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 2})
        assert answered.status_code == 200
        server.send(signal.SIGTERM)
        assert server.end() == 0


def test_a_failure_has_its_exit_code_where_it_cannot_be_told():
    with open("/dev/full", "w") as full:
        command = [*COUNTING, "counting?fail=memory", "--port", "0"]
        result = subprocess.run(command, stdout=full, stderr=full, cwd=ROOT, env=environment(), timeout=60, check=False)
    assert result.returncode == EXIT_CODES["memory"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "command", ["server.cli plan", "server.cli doctor", "server.cli plan --help", "server.settings", "loadtest --help"]
)
def test_a_command_ends_quietly_when_nobody_reads_it_any_more(command, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run(
            [sys.executable, "-m", *command.split()],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment() | {"PYTHONUNBUFFERED": unbuffered},
            timeout=120,
            check=False,
        )
    finally:
        os.close(writer)
    assert result.stderr == ""
    assert result.returncode in (0, 128 + signal.SIGPIPE)


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        (["--enable-lora"], "merge the adapter into its base model"),
        (["--lora-modules", "a=b"], "merge the adapter into its base model"),
        (["--tensor-parallel-size=2"], "one device"),
        (["--trust-remote-code"], "never run"),
    ],
)
def test_flags_of_others_that_have_no_counterpart_say_what_to_do(flags, advice):
    result = run(PEREGRINE, "serve", *flags)
    assert result.returncode == EXIT_CODES["config"]
    assert f"{flags[0].partition('=')[0]} is not supported: " in last_line(result)
    assert advice in last_line(result)


def test_a_port_in_use_is_told_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run(COUNTING, "--port", str(port))
    assert result.returncode == EXIT_CODES["config"]
    assert f"port {port} on 127.0.0.1 is in use" in last_line(result)
    assert "--port" in last_line(result)
    assert "weights" not in result.stdout


@pytest.mark.parametrize("host", ["203.0.113.7", "no-such-host.invalid"])
def test_an_address_of_others_is_refused(host):
    result = run(COUNTING, "--host", host)
    assert result.returncode == EXIT_CODES["config"]
    assert "not an address of this machine" in last_line(result)


def test_a_start_shows_its_phases_and_a_curl_that_works(tmp_path):
    loaded = tmp_path / "loaded"
    with serving(tmp_path, f"counting?load_until={loaded}", ready=False) as server:
        wait_for(lambda: httpx.get(server.url + "/readyz").status_code == 503)
        assert httpx.get(server.url + "/livez").status_code == 200
        refused = httpx.post(server.url + "/v1/completions", json={"model": "tiny", "prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "starting")
        assert int(refused.headers["retry-after"]) >= 1
        loaded.touch()
        server.wait_until_ready()
        wait_for(lambda: "curl" in server.log.read_text())
        text = server.log.read_text()
        assert re.search(r"^ *\d+\.\d\d s  weights    none at all$", text, re.MULTILINE)
        command = re.search(r"^  try +(curl .*)$", text, re.MULTILINE)[1]
        answer = subprocess.run(f"{command} -s", shell=True, capture_output=True, text=True, check=True).stdout
        assert json.loads(answer)["choices"][0]["text"].startswith("0123456789")
        server.send(signal.SIGTERM)
        assert server.end() == 0
        assert server.log.read_text().endswith("stopped\n")


def test_who_renders_chats_starts_beside_the_model_and_ends_with_the_server(tmp_path):
    loaded = tmp_path / "loaded"
    with serving(tmp_path, f"counting?load_until={loaded}", ready=False) as server:
        wait_for(lambda: len(server.children("server.text.template_worker")) == 2)
        workers = server.children("server.text.template_worker")
        server.send(signal.SIGKILL)
        server.end()
        wait_for(lambda: not any(worker.is_running() for worker in workers))


def stream(url: str, events: list[str], *, max_tokens: int) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": max_tokens, "stream": True}
    with httpx.stream("POST", url + "/v1/completions", json=body, timeout=30) as response:
        assert response.status_code == 200
        events += [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]


def start_stream(url: str, events: list[str], *, max_tokens: int) -> threading.Thread:
    thread = threading.Thread(target=stream, args=(url, events), kwargs={"max_tokens": max_tokens})
    thread.start()
    wait_for(lambda: 'requests_running{model_name="tiny"} 1.0' in httpx.get(url + "/metrics").text)
    return thread


def test_sigterm_refuses_new_requests_and_lets_running_ones_finish(tmp_path):
    with serving(tmp_path, "counting?delay=0.02") as server:
        events: list[str] = []
        thread = start_stream(server.url, events, max_tokens=100)
        server.send(signal.SIGTERM)
        wait_for(lambda: httpx.get(server.url + "/readyz").status_code == 503)
        assert httpx.get(server.url + "/readyz").json()["state"] == "draining"
        refused = httpx.post(server.url + "/v1/completions", json={"model": "tiny", "prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        thread.join()
        text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
        assert text == "0123456789" * 10
        assert events[-1] == "[DONE]"
        assert server.end() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_drain_is_seen_before_requests_are_refused(tmp_path, number):
    """Told to end, the server is not ready at once, serves until the delay is over, and only then refuses."""
    with serving(tmp_path, "counting?delay=0.02", "--drain-delay", "1.5") as server:
        events: list[str] = []
        thread = start_stream(server.url, events, max_tokens=150)  # longer than the delay
        server.send(number)
        wait_for(lambda: httpx.get(server.url + "/readyz").status_code == 503)
        codes = []

        def is_refused() -> bool:
            answer = httpx.post(server.url + "/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 1})
            codes.append(answer.status_code)
            return answer.status_code == 503

        wait_for(is_refused)
        assert set(codes[:-1]) == {200}, "requests that come while the drain is announced are served"
        thread.join()
        assert events[-1] == "[DONE]"
        assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == "0123456789" * 15
        assert server.end() == 0


def test_an_interrupt_does_not_wait_for_a_load_balancer(tmp_path):
    with serving(tmp_path, "--drain-delay", "3600") as server:
        server.send(signal.SIGINT)
        assert server.end() == 0
        assert "draining" not in server.log.read_text()


def test_a_server_that_was_never_ready_does_not_announce_its_end(tmp_path):
    with serving(tmp_path, "counting?load_until=never", "--drain-delay", "3600", ready=False) as server:
        wait_for(lambda: httpx.get(server.url + "/livez").status_code == 200)
        server.send(signal.SIGTERM)
        assert server.end() == 0


WAITS_BEFORE_THE_FIRST_LIBRARY = """
import importlib.abc, os, sys, time

class Waiting(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "pydantic":
            open(os.environ["PAUSED"], "w").close()
            time.sleep(60)

sys.meta_path.insert(0, Waiting())
"""


def test_sigterm_is_not_lost_while_the_first_process_of_a_container_imports(tmp_path):
    """As process 1 of a namespace: a signal that it has no handler for yet would be dropped by the kernel."""
    namespace = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine makes no namespaces of processes")
    (tmp_path / "sitecustomize.py").write_text(WAITS_BEFORE_THE_FIRST_LIBRARY)
    paused = tmp_path / "paused"
    env = environment() | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PAUSED": str(paused)}
    with subprocess.Popen([*namespace, *PEREGRINE, "serve", "--port", "0"], cwd=ROOT, env=env) as outer:
        try:
            wait_for(paused.exists)
            [first] = psutil.Process(outer.pid).children()
            first.send_signal(signal.SIGTERM)
            assert outer.wait(30) == 0
        finally:
            outer.kill()


def handled_signals(pid: int) -> set[int]:
    mask = int(re.search(r"SigCgt:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def test_requests_that_outlast_the_shutdown_end_with_an_error_and_done(tmp_path):
    with serving(tmp_path, "counting?delay=0.02", "--shutdown-timeout", "0.3") as server:
        events: list[str] = []
        thread = start_stream(server.url, events, max_tokens=4000)
        engine = server.engine
        server.send(signal.SIGTERM)
        thread.join()
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["error"]["type"] == "service_unavailable"
        assert server.end() == 0
        assert not engine.is_running()


def test_a_second_interrupt_ends_the_process_at_once(tmp_path):
    with serving(tmp_path, "counting?delay=0.02", "--shutdown-timeout", "60") as server:
        engine = server.engine
        body = {"model": "tiny", "prompt": "a", "max_tokens": 4000, "stream": True}
        with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=30):
            server.send(signal.SIGINT)
            wait_for(lambda: httpx.get(server.url + "/readyz").status_code == 503)
            server.send(signal.SIGINT)
            assert server.end() == 128 + signal.SIGINT
        wait_for(lambda: not engine.is_running())


def test_times_are_counted_from_the_begin_of_the_process():
    age = time.time() - psutil.Process().create_time()  # which is right to a second
    assert time.monotonic() - process_begun_at() == pytest.approx(age, abs=1.5)


def test_sigterm_during_the_start_ends_it(tmp_path):
    with serving(tmp_path, "counting?load_until=never", ready=False) as server:
        wait_for(lambda: httpx.get(server.url + "/livez").status_code == 200)
        server.send(signal.SIGTERM)
        assert server.end() == 0


def test_json_is_all_that_a_server_writes_if_it_is_asked_for(tmp_path):
    with serving(tmp_path, "--log-format", "json", "--set", "access.log=false") as server:
        wait_for(lambda: "curl" in server.log.read_text())
        httpx.post(server.url + "/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 1})
        server.send(signal.SIGTERM)
        assert server.end() == 0
        lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert {"time", "level", "logger"} <= set.intersection(*(set(line) for line in lines))
    assert lines[-1]["message"] == "stopped"
    assert "peregrine.access" not in {line["logger"] for line in lines}


def test_sighup_reads_the_key_file_again_and_a_broken_one_is_told_at_the_start(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("acme first\n")
    with serving(tmp_path, "--api-key-file", str(keys)) as server:

        def status(key: str) -> int:
            return httpx.get(server.url + "/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

        assert (status("first"), status("second")) == (200, 401)
        keys.write_text("acme second\n")
        server.send(signal.SIGHUP)
        wait_for(lambda: status("second") == 200)
        assert status("first") == 401
        assert server.process.poll() is None
    keys.write_text("acme\n")
    result = run(COUNTING, "--api-key-file", str(keys), "--port", "0")
    assert result.returncode == EXIT_CODES["config"]
    assert "line 1: has one word; write NAME KEY" in last_line(result)


def test_the_settings_of_an_image_are_below_those_of_who_runs_it(tmp_path, monkeypatch):
    image, own = tmp_path / "image.yaml", tmp_path / "own.yaml"
    image.write_text("server: {host: 0.0.0.0, port: 1, drain_delay: 5}\n")
    own.write_text("server: {port: 2}\n")
    monkeypatch.setenv("PEREGRINE_CONFIG", str(image))
    server = parse("--config", str(own)).config.server
    assert (server.host, server.port, server.drain_delay) == ("0.0.0.0", 2, 5)
    monkeypatch.setenv("PEREGRINE_CONFIG", str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match=re.escape("none.yaml: cannot be read")):
        parse()


def test_a_container_asks_the_port_that_its_server_listens_at(tmp_path):
    """The server has the name of the command, and an engine without a model."""
    counting = counting_engine.__file__
    run_it = f"runpy.run_path({counting!r}, run_name='__main__')"
    (tmp_path / "peregrine").write_text(f"import runpy, sys\nsys.argv = [{counting!r}, *sys.argv[2:]]\n{run_it}\n")
    loaded, log = tmp_path / "loaded", tmp_path / "log"
    command = [sys.executable, str(tmp_path / "peregrine"), "serve", f"counting?load_until={loaded}"]
    with (
        log.open("w") as output,
        subprocess.Popen(
            [*command, "--host", "0.0.0.0", "--port", "0"], cwd=ROOT, env=environment(), stdout=output, stderr=output
        ) as process,
    ):
        check = [sys.executable, "-m", "server.cli.health", "--process", str(process.pid)]
        try:
            wait_for(lambda: "GET /readyz" in log.read_text())
            port = re.search(r"127\.0\.0\.1:(\d+)", log.read_text())[1]
            wait_for(lambda: run(check).returncode == 0)
            alive, ready = run(check), run(check, "--ready")
            assert f"port {port}: 200" in alive.stdout
            assert (ready.returncode, f"port {port}: 503" in ready.stdout) == (1, True)
            loaded.touch()
            wait_for(lambda: run(check, "--ready").returncode == 0)
        finally:
            process.kill()
        process.wait()
        gone = run(check)
        assert (gone.returncode, gone.stderr) == (1, "no server listens here\n")


def test_shells_complete_commands_flags_and_values(tmp_path):
    script = run(PEREGRINE, "completion", "bash").stdout
    (tmp_path / "completion").write_text(script)
    ask = f'source {tmp_path}/completion; COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); _peregrine; echo "${{COMPREPLY[@]}}"'

    def completed(*words: str) -> list[str]:
        result = subprocess.run(["bash", "-c", ask, "bash", *words], capture_output=True, text=True, check=True)
        return result.stdout.split()

    assert completed("peregrine", "s") == ["serve"]
    assert completed("peregrine", "serve", "--max-m") == ["--max-model-len"]
    assert completed("peregrine", "serve", "--log-level", "") == ["debug", "info", "warning", "error"]
    assert completed("peregrine", "train-heads", "--outpu") == ["--output"]
    assert "-l log-level -x -a 'debug info warning error'" in run(PEREGRINE, "completion", "fish").stdout
    assert run(PEREGRINE, "completion", "zsh").stdout.endswith(script)
    assert "invalid choice: 'csh'" in run(PEREGRINE, "completion", "csh").stderr


def test_doctor_and_plan_answer_without_tracebacks(monkeypatch):
    monkeypatch.setenv("PEREGRINE_CACHE", "/dev/null/cache")  # where nothing can be, whoever runs this
    doctor = run(PEREGRINE, "doctor")
    assert doctor.returncode == 0, doctor.stderr
    assert re.search(r"^cpu +\S", doctor.stdout, re.MULTILINE)
    assert "linear layers" in doctor.stdout
    assert "not fetched yet" in doctor.stdout
    missing = run(PEREGRINE, "plan", "/nonexistent/model")
    assert missing.returncode == EXIT_CODES["model"]
    assert last_line(missing).startswith("peregrine: model: ")
    assert "Traceback" not in doctor.stderr + missing.stderr


def test_plan_says_what_fits_and_what_would_help(tmp_path):
    shape = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
        "max_position_embeddings": 512, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    fits = run(PEREGRINE, "plan", str(tmp_path), "--set", "model.load_format=dummy")
    assert fits.returncode == 0, fits.stderr
    assert re.search(r"^concurrent tokens +[\d,]+", fits.stdout, re.MULTILINE)
    small = ("--max-model-len", "512", "--set", "kv_cache.memory=64tokens", "--set", "model.load_format=dummy")
    tight = run(PEREGRINE, "plan", str(tmp_path), *small)
    assert tight.returncode == 2
    assert last_line(tight).startswith("peregrine: does not fit: ")
    assert "kv_cache.memory" in last_line(tight) or "max_model_len" in last_line(tight)
