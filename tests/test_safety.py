"""Keys are read from the environment alone and shown nowhere; pages hold no code, whatever they show."""

import http.server
import json
import logging
import os
import pathlib
import re
import subprocess
import sys
import threading
import traceback

import jinja2
import pytest

from configs import base
from vigos_jax.config import to_json, validate
from vigos_jax.errors import InputError
from vigos_jax.grading.judge import Item, Judge
from vigos_jax.report import page as report
from vigos_jax.runtime import hub

ROOT = pathlib.Path(__file__).resolve().parent.parent
MARK = "MARKERkey0123456789"


class Refuse(http.server.BaseHTTPRequestHandler):
    """Answers everything with an error that quotes the key back, as careless servers do."""

    def answer(self):
        self.server.seen.append(self.headers.get("Authorization", ""))
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = json.dumps({"error": {"message": f"bad key {self.headers.get('Authorization')}"}}).encode()
        self.send_response(401)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Error-Message", f"bad key {self.headers.get('Authorization')}")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_POST = do_HEAD = do_PUT = answer

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    server.seen = []
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def address(server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def judge(server, **options) -> Judge:
    fixed = {"model": "m", "key_env": "JUDGE_KEY", "batch": 1, "concurrency": 1, "timeout": 2, "retries": 0}
    return Judge(**{"url": address(server) + "/v1"} | fixed | options)


# Keys.


def test_the_judges_key_is_sent_and_shown_nowhere(server, monkeypatch, caplog, capfd):
    monkeypatch.setenv("JUDGE_KEY", f"  {MARK}\n")  # as `export KEY=$(cat file)` and editors leave it
    there = judge(server)
    with caplog.at_level(logging.INFO):
        assert list(there.verdicts([Item("Q", "a", "a")])) == []  # a failed call is not a verdict
    assert server.seen and set(server.seen) == {f"Bearer {MARK}"}
    said = capfd.readouterr()
    assert MARK not in repr(vars(there)) + str(there) + caplog.text + said.out + said.err


BAD_KEYS = ["", " \n", f"{MARK}\x01", f"{MARK}\nX-Other: 1", f"{MARK}é", f"{MARK}\u2028x"]


@pytest.mark.parametrize("key", BAD_KEYS, ids=ascii)
def test_a_key_that_no_header_can_carry(server, monkeypatch, key):
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(InputError, match="'JUDGE_KEY': this environment variable must hold the key") as e:
        judge(server)
    assert MARK not in "".join(traceback.format_exception(e.value)) and not server.seen


def test_a_key_where_its_name_belongs_is_not_shown(capsys, tmp_path):
    (tmp_path / "mine.py").write_text("from configs import base\n\n\ndef get_config():\n    return base.get_config()\n")
    from vigos_jax import main

    for key in (f"sk-{MARK}", f"hf_{MARK}", MARK.lower()):
        arguments = [f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'run'}"]
        assert main.main(["vigos_jax", *arguments, f"--config.eval.judge.key_env={key}"]) == 2
        said = capsys.readouterr()
        assert "must be the name of an environment variable" in said.err and key not in said.err + said.out
    assert not (tmp_path / "run").exists()


def test_a_password_in_the_judges_address_is_refused_unseen(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "k")
    with pytest.raises(InputError, match="must hold no password") as e:
        judge(server, url=f"http://me:{MARK}@host/v1")
    assert MARK not in str(e.value)


TOKENS = [f"hf_{MARK}", f"hf_{MARK}\x01", f"hf_{MARK}é"]


@pytest.mark.slow
@pytest.mark.parametrize("token", TOKENS, ids=ascii)
def test_the_hubs_token_is_shown_nowhere(server, token):
    """Real calls of the command line to a hub that refuses and quotes what it was sent: model, data, task."""
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {"HF_TOKEN": token, "HF_ENDPOINT": address(server), "JAX_PLATFORMS": "cpu"}
    code = (
        "import sys\nfrom vigos_jax import session\nfrom vigos_jax.data import sources\n"
        "from vigos_jax.errors import InputError\nfrom vigos_jax.runtime import hub\n"
        "calls = [lambda: session.resolve_model('no/model'), lambda: sources.open_table('no/data', split='train'),\n"
        "         lambda: hub.push(__import__('pathlib').Path('.'), 'no/model')]\n"
        "for call in calls:\n"
        "    try:\n        call()\n"
        "    except InputError as e:\n        print(e)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = out.stdout.splitlines()
    assert out.returncode == 0 and len(lines) == 3, out.stderr
    assert all("no/" in line for line in lines)
    assert MARK not in out.stdout + out.stderr
    if token.isascii() and token.isprintable():
        assert f"Bearer {token}" in server.seen


@pytest.mark.parametrize("token", TOKENS, ids=ascii)
def test_a_token_in_an_errors_words_is_hidden(monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    for error in (ValueError(f"no {token}"), ValueError(repr(token)), ValueError(f"Illegal header {token.encode()!r}")):
        assert MARK not in hub.reason(error) and "***" in hub.reason(error)


def test_a_config_holds_no_key(monkeypatch):
    for name in ("HF_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, MARK)
    config = base.get_config()
    validate(config)
    assert MARK not in to_json(config) and config.eval.judge.key_env == "OPENAI_API_KEY"


# Pages.

OUT = (
    "</script><script>alert(1)</script>",
    "<!-- <script>",
    "]]>",
    "</style><img src=x onerror=alert(1)>",
    "</title><svg onload=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "' onmouseover='alert(1)' x='",
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "\u2028\u2029\x00\ud800&amp;&lt;",
)


@pytest.mark.parametrize("text", OUT, ids=ascii)
def test_nothing_shown_on_a_page_is_markup(tmp_path, text):
    """Wherever a text can stand: title, paragraph, table, note, question, token, what shows on hover."""
    tokens = [report.Token(text, (255, 0, 0), 0.5, text)]
    table = report.Table(text, [text, text], [[text, text]], note=text)
    sections = [report.Text([text]), table, report.Rollout(text, text, tokens)]
    report.write_page(tmp_path / "page.html", text, sections)
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    plain = [report.Token("x", (255, 0, 0), 0.5, "x")]
    table = report.Table("x", ["x", "x"], [["x", "x"]], note="x")
    harmless = report.render("x", [report.Text(["x"]), table, report.Rollout("x", "x", plain)])
    assert re.findall(r"<[^>]*", html_without(html, text)) == re.findall(r"<[^>]*", harmless)
    assert "<script" not in html and "49" not in re.sub(r"<style>.*</style>", "", html, flags=re.S)


def html_without(html: str, text: str) -> str:
    """The page with the escaped text taken out, as it would be with x in its place."""
    from markupsafe import escape

    shown = str(escape(text)).encode("utf-8", errors="replace").decode("utf-8")
    assert html.count(shown) == 13
    return html.replace(shown, "x")


def test_a_page_runs_no_script_but_its_own():
    """Data stands in one block of JSON, escaped; the page lets nothing run but page.js or compare.js, by its hash."""
    paths = sorted((ROOT / "vigos_jax").rglob("*.j2"))
    assert [path.name for path in paths] == ["chart.html.j2", "page.html.j2"]
    source = "\n".join(path.read_text() for path in paths)
    assert "Content-Security-Policy" in source and "default-src 'none'" in source
    assert re.findall(r"<script[^>]*>[^<]*", source) == [
        *(
            f'<script type="application/json" class="{kind}-data">{{{{ section.data()|tojson }}}}'
            for kind in ("browser", "comparison")
        ),
        "<script>{{ script }}",
    ]
    assert not re.search(r"\|\s*safe|autoescape|javascript:", source) and source.count("tojson") == 2
    assert report._template().environment.autoescape is True
    files = {path: path.read_text() for path in (ROOT / "vigos_jax").rglob("*.py")}
    assert [path.name for path, code in files.items() if re.search(r"\bMarkup\b", code)] == ["page.py"]
    code = "\n".join(files.values())
    assert not re.search(r"autoescape=False|select_autoescape", code)
    assert code.count("jinja2.Environment(") == code.count("jinja2.Environment(autoescape=True") == 1
    page = report.render("a page", [report.Text(["</script><script>alert(1)</script>"])])
    assert "script-src 'none'" in page and page.count("<script") == 0
    assert isinstance(report._template(), jinja2.Template)
