"""A small Hugging Face hub on 127.0.0.1, with the routes that huggingface_hub's downloads use.

    with Hub() as hub, Processes() as processes:
        hub.add("someone/tiny", folder)                    # branch main
        hub.add("someone/tiny", other, revision="step1")
        processes.run(code, *args, HF_ENDPOINT=hub.url, HF_HOME=cache)

HEAD and GET of /{repo}/resolve/{revision}/{file}, where a revision is a branch or the commit that a
branch is at; ETag, X-Repo-Commit, Content-Length, Range; the hub's X-Error-Code on 404.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent


class Hub:
    """`requests` lists (method, file, status) in order; `drop` makes connections break off."""

    def __init__(self):
        self.branches, self.commits = {}, {}               # (repo, branch) -> commit; (repo, commit) -> files
        self.requests, self.drops = [], {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        """From here on connections are refused."""
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo, folder, revision="main"):
        """A new commit on a branch, with the files of a folder."""
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        commit = hashlib.sha1(b"".join(name.encode() + files[name] for name in files)).hexdigest()
        self.branches[repo, revision], self.commits[repo, commit] = commit, files
        return commit

    def drop(self, file, times):
        """Close the connection in the middle of the next `times` downloads of a file."""
        self.drops[file] = times

    def find(self, repo, revision, file):
        """(commit, content), either None, and the hub's word for what is missing."""
        if not any(repo == known for known, _ in self.branches):
            return None, None, "RepoNotFound"
        commit = self.branches.get((repo, revision), revision)
        if (repo, commit) not in self.commits:
            return None, None, "RevisionNotFound"
        content = self.commits[repo, commit].get(file)
        return commit, content, "EntryNotFound" if content is None else None

    def fetched(self):
        """Names of the files that were downloaded, in order."""
        return [file for method, file, status in self.requests if method == "GET" and status < 300]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(send_body=False)

    def do_GET(self):
        self.answer(send_body=True)

    def log_message(self, *_):
        """Quiet."""

    def answer(self, send_body):
        repo, _, rest = unquote(urlsplit(self.path).path).strip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        commit, content, error = self.hub.find(repo, revision, file)
        begin = self.range_start()
        status = (401 if error == "RepoNotFound" else 404) if error else 206 if begin else 200
        self.hub.requests.append((self.command, file, status))             # the hub says 401 for no such repo
        body = b"" if error else content[begin:]
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
            self.send_header("X-Error-Message", f"{error}: {repo} {revision} {file}")
        else:
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("Accept-Ranges", "bytes")
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if send_body:
            self.send(file, body)

    def range_start(self):
        """First byte asked for: 0, or what "Range: bytes=100-" says."""
        wanted = self.headers.get("Range", "bytes=0-")
        return int(wanted.removeprefix("bytes=").partition("-")[0])

    def send(self, file, body):
        if self.hub.drops.get(file, 0) > 0:
            self.hub.drops[file] -= 1
            self.wfile.write(body[:len(body) // 2])
            self.wfile.flush()
            self.close_connection = True                   # fewer bytes than Content-Length promised
        else:
            self.wfile.write(body)


# Imports torch once; each job is a fork of it, which imports huggingface_hub for itself.
FORKS = """
import json, os, sys, traceback
import generate, load_weights, neo, neox, tokenizer
assert "huggingface_hub" not in sys.modules, "it reads its environment when imported, so it must come later"

def status_of(code):
    status = 0
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        for stream, path in ((1, job["out"]), (2, job["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
        os.environ.update(job["env"])
        sys.argv = ["-c", *job["args"]]
        os._exit(status_of(job["code"]))           # taking torch down in good order costs half a second
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Processes:
    """Runs code in processes of their own, like subprocess.run, without importing torch in each."""

    def __enter__(self):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        self.forks = subprocess.Popen([sys.executable, "-c", FORKS], cwd=ROOT, stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, text=True, env=env | {"OMP_NUM_THREADS": "1"})
        return self

    def __exit__(self, *_):
        self.forks.stdin.close()
        self.forks.wait()

    def run(self, code, *args, **env):
        """Exit status and text of a process with these arguments and environment variables."""
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            job = {"code": code, "args": [str(a) for a in args], "env": env, "out": str(out), "err": str(err)}
            print(json.dumps(job), file=self.forks.stdin, flush=True)
            status = int(self.forks.stdout.readline())
            return subprocess.CompletedProcess(args, status, out.read_text(), err.read_text())
