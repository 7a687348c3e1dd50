"""The explorer as a person uses it: in JupyterLab, in Chromium."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import nbformat
import pytest
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")

CELL = """import gipip
gipip.explore(gipip.load_dataset("cifar10"), gipip.load_prior().with_offset(0))"""
RUN_ALL = """async () => {
    const app = window.jupyterapp;
    await app.restored;
    const panel = app.shell.currentWidget;
    await panel.context.ready;
    await panel.sessionContext.ready;
    await panel.sessionContext.session.kernel.info;
    await app.commands.execute("notebook:run-all-cells");
}"""
TOKEN = "only-for-this-test"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def jupyterlab(folder):
    """The address of a server of its own, with no setting of the user's."""
    port = free_port()
    names = ["CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR"]
    own = {f"JUPYTER_{name}": str(folder / name) for name in names}
    own |= {f"JUPYTERLAB_{name}": str(folder / name) for name in ("SETTINGS_DIR", "WORKSPACES_DIR")}
    own |= {"IPYTHONDIR": str(folder / "ipython"), "JUPYTER_TOKEN": TOKEN, "GIPIP_HEADLESS": "0"}
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    options += ["--expose-app-in-browser", f"--ServerApp.root_dir={folder}"]
    (folder / "CONFIG_DIR" / "labconfig").mkdir(parents=True)
    quiet = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (folder / "CONFIG_DIR" / "labconfig" / "page_config.json").write_text(json.dumps(quiet))
    command = [sys.executable, "-m", "jupyterlab", *options]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=os.environ | own, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for_answer(f"{address}/api?token={TOKEN}", server)
        yield address
    finally:
        server.terminate()
        server.wait(20)


def wait_for_answer(address, server):
    deadline = time.monotonic() + 40
    while True:
        try:
            return urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, folder / "explorer.ipynb")
    with jupyterlab(folder) as address, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(60_000)
        page.goto(f"{address}/lab/tree/explorer.ipynb?token={TOKEN}&reset")
        page.wait_for_selector(".jp-NotebookPanel .jp-Cell")
        page.evaluate(RUN_ALL)
        page.get_by_role("button", name="Start", exact=True).wait_for()
        yield page, folder
        browser.close()


def upload(page, path):
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="or your own, below 10 MB").click()
    chooser.value.set_files(path)


def shown(page):
    """The addresses of the three pictures."""
    return [image.get_attribute("src") for image in page.locator("img.widget-image").all()]


def test_a_person_attacks_an_own_picture_sees_it_recovered_and_saves_it(page, tmp_path):
    page, folder = page
    Image.new("RGB", (90, 60), "red").save(tmp_path / "red.png")
    page.get_by_label("client's model").select_option("lenet")
    page.get_by_label("client's defence").select_option("noise 0.001")
    page.get_by_label("attack").select_option("FeatureInversion")
    page.get_by_label("iterations").fill("20")
    page.get_by_label("iterations").press("Tab")
    before = shown(page)
    upload(page, tmp_path / "red.png")
    page.get_by_role("button", name="or your own, below 10 MB (1)").wait_for()
    page.get_by_role("button", name="Start", exact=True).click()
    page.get_by_text("PSNR").wait_for()
    assert all(old != new for old, new in zip(before, shown(page), strict=True))
    page.get_by_role("button", name="Save", exact=True).click()
    page.get_by_text("saved in").wait_for()
    (saved,) = (folder / "results" / "explorer").iterdir()
    about = json.loads((saved / "result.json").read_text())
    assert about["attack"]["name"] == "FeatureInversion" and about["pictures"] == ["red.png"]
    assert about["scenario"]["model"] == "lenet" and about["attack"]["iterations"] == 20
    assert Image.open(saved / "private.png").convert("RGB").getpixel((99, 99)) == (255, 0, 0)
    assert Image.open(saved / "reconstruction.png").size == (256, 256)


def test_a_text_file_as_picture_is_refused_in_words(page, tmp_path):
    page, _ = page
    (tmp_path / "notes.txt").write_text("no picture")
    upload(page, tmp_path / "notes.txt")
    page.get_by_text("notes.txt cannot be read as an image").wait_for()
    assert "Traceback" not in page.content()


def test_a_running_attack_can_be_stopped(page):
    page, _ = page
    page.get_by_label("attack").select_option("GIPIP")
    page.get_by_label("iterations").fill("10000")
    page.get_by_label("iterations").press("Tab")
    page.get_by_role("button", name="Start", exact=True).click()
    page.get_by_text("iterations, cost").wait_for()
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_text("stopped by the user").wait_for()
