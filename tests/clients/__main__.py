"""`python -m tests.clients [NAME ...]`: installs clients below build/clients, runs their examples against a server,
prints a table of what worked, and writes it to docs/clients.md.

It needs a package index and, for the clients in JavaScript, node and npm with a registry; without these they are left
out. A name, such as `anthropic`, runs those clients alone; the others' rows stay as they were last seen.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from tests import ROOT
from tests.clients.page import Outcome, write_page
from tests.support.server_process import Server, free_port

BUILD, EXAMPLES = ROOT / "build" / "clients", Path(__file__).parent / "examples"
MODEL = "smollm2-135m-instruct"
SECONDS = 900  # of one client's examples


@dataclass(frozen=True)
class Client:
    """One client. package: by which its version is known; script: in `examples`"""

    name: str
    api: str
    package: str
    script: str
    others: tuple[str, ...] = ()
    is_npm: bool = False

    @property
    def folder(self) -> Path:
        return BUILD / self.script.partition(".")[0].replace("_example", "")

    @property
    def is_program(self) -> bool:
        """Whether it is a command of npm's, which an example in Python starts."""
        return self.is_npm and self.script.endswith(".py")


CLIENTS = (
    Client("openai (Python)", "chat, responses", "openai", "openai_python.py"),
    Client("openai (JavaScript)", "chat, responses", "openai", "openai_npm.mjs", is_npm=True),
    Client("anthropic (Python)", "messages", "anthropic", "anthropic_python.py"),
    Client("@anthropic-ai/sdk (JavaScript)", "messages", "@anthropic-ai/sdk", "anthropic_npm.mjs", is_npm=True),
    Client("langchain-openai", "chat, responses", "langchain-openai", "langchain_example.py"),
    Client("litellm", "chat, messages", "litellm", "litellm_example.py"),
    Client("instructor", "chat", "instructor", "instructor_example.py"),
    Client(
        "pydantic-ai",
        "chat, responses, messages",
        "pydantic-ai-slim",
        "pydantic_ai_example.py",
        ("pydantic-ai-slim[openai,anthropic]",),
    ),
    Client("llm", "chat", "llm", "llm_example.py"),
    Client("Codex CLI", "responses", "@openai/codex", "codex_cli.py", is_npm=True),
    Client("Claude Code", "messages", "@anthropic-ai/claude-code", "claude_code.py", is_npm=True),
)


def install(client: Client) -> str:
    """Makes the client's environment, if it is not there. Returns its version; raises CalledProcessError."""
    client.folder.mkdir(parents=True, exist_ok=True)
    done = client.folder / "done"
    if client.is_npm:
        if shutil.which("npm") is None:
            raise FileNotFoundError("npm is not on this machine")
        manifest = client.folder / "node_modules" / client.package / "package.json"
        if not done.exists():
            npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(client.folder)]
            _run([*npm, client.package])
            done.touch()
        return str(json.loads(manifest.read_text())["version"])
    python = client.folder / "bin" / "python"
    if not done.exists():
        _run([sys.executable, "-m", "venv", "--clear", str(client.folder)])
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run([*pip, *(client.others or (client.package,))])
        done.touch()
    code = f"import importlib.metadata as m; print(m.version({client.package!r}))"
    return _run([str(python), "-c", code]).strip()


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command[:4])} ...: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


def examine(client: Client, url: str) -> list[dict]:
    """The outcomes of a client's checks."""
    environment = os.environ | {"PEREGRINE_URL": url, "PEREGRINE_MODEL": MODEL, "PYTHONUNBUFFERED": "1"}
    environment.pop("PYTHONPATH", None)
    if client.script.endswith(".mjs"):
        for file in EXAMPLES.glob("*.mjs"):  # modules are looked for beside the file that names them
            shutil.copy(file, client.folder)
        command = ["node", str(client.folder / client.script)]
    else:
        python = Path(sys.executable) if client.is_program else client.folder / "bin" / "python"
        command = [str(python), str(EXAMPLES / client.script)]
        environment["CLIENT_BIN"] = str(client.folder / "node_modules" / ".bin")
    log = client.folder / "log"
    with log.open("w") as file:
        try:
            subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            print(f"{client.name} took more than {SECONDS} s", file=file)
    lines = log.read_text().splitlines()
    checks = [json.loads(line) for line in lines if line.startswith('{"check"')]
    return checks or [{"check": "text", "ok": False, "detail": (lines or ["it said nothing"])[-1][:300]}]


def remember(outcomes: list[Outcome]) -> list[Outcome]:
    """Keeps the newest outcome of each client in a file, and returns all of them in the table's order."""
    file = BUILD / "outcomes.json"
    known = {one["name"]: one for one in json.loads(file.read_text())} if file.exists() else {}
    known |= {outcome.name: asdict(outcome) for outcome in outcomes}
    file.write_text(json.dumps(list(known.values()), indent=1))
    return [Outcome(**known[client.name]) for client in CLIENTS if client.name in known]


def start_server(folder: Path) -> Server:
    port, log = free_port(), folder / "server.log"
    command = [sys.executable, "-m", "server.cli", "serve", "--port", str(port), "--served-model-name", MODEL]
    command += ["--set", "limits.max_stored_responses=100"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=log.open("w"), stderr=subprocess.STDOUT, text=True)
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        server.wait_until_ready(600)
    except BaseException:
        server.stop()
        raise
    return server


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of the names of clients; all, if there are none")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "clients.md")
    options = parser.parse_args(arguments)
    chosen = [one for one in CLIENTS if not options.names or any(name in one.name.lower() for name in options.names)]
    outcomes: list[Outcome] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server ends with it
    with tempfile.TemporaryDirectory() as folder:
        server = start_server(Path(folder))
        try:
            for client in chosen:
                begun = time.monotonic()
                try:
                    found = install(client)
                except OSError as error:
                    outcomes.append(Outcome(client.name, client.api, "", [], str(error)))
                    print(f"{client.name}: not installed: {error}", flush=True)
                    continue
                checks = examine(client, server.url)
                outcomes.append(Outcome(client.name, client.api, found, checks))
                seconds = time.monotonic() - begun
                told = ", ".join(f"{one['check']} {'ok' if one['ok'] else 'FAILED ' + one['detail']}" for one in checks)
                print(f"{client.name} {found} ({seconds:.0f} s): {told}", flush=True)
        finally:
            server.stop(60)
    rows = remember(outcomes)
    write_page(options.page, rows, peregrine=version("peregrine"), model=MODEL)
    return int(any(not check["ok"] for outcome in outcomes for check in outcome.checks))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
