"""pyproject.toml, the requirements and CITATION.cff: what is said in two places is the same."""

import re
import tomllib

import yaml
from helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
NO_EXTRA = {"litgpt", "llama-cpp-python"}  # peers that are measured where they are installed; the tests need neither


def pins(name):
    """Every `package==version` of a file of requirements, without its comments and the file that it includes."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith("-r ")]


def test_every_version_is_pinned_once():
    for name in ("requirements.txt", "requirements-dev.txt"):
        assert all(re.fullmatch(r"[\w-]+==[\w.]+", pin) for pin in pins(name)), name
    packages = [pin.split("==")[0] for name in ("requirements.txt", "requirements-dev.txt") for pin in pins(name)]
    assert len(packages) == len(set(packages)) > 20


def test_extras_are_what_requirements_dev_has():
    """Name and version. Those of requirements.txt are read from there when the package is built."""
    everything, *developing = EXTRAS["dev"]
    others = [name for name in EXTRAS if name != "dev"]
    assert everything == f"llama-adapter[{','.join(others)}]"
    assert {pin for name in others for pin in EXTRAS[name]}.union(developing) == set(pins("requirements-dev.txt"))
    assert PROJECT["project"]["dynamic"] == ["dependencies"]
    assert PROJECT["tool"]["setuptools"]["dynamic"] == {"dependencies": {"file": ["requirements.txt"]}}


def test_what_messages_and_pages_say_to_install_has_an_extra():
    """In a virtual environment of the user's, so with a version that was tried."""
    known = {requirement.split("==")[0] for extra in EXTRAS.values() for requirement in extra} | NO_EXTRA
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/*.py"), *ROOT.glob("docs/examples/*.py")]
    said = {}
    for path in files:
        for words in re.findall(r"pip install ([a-z][\w -]*)", path.read_text(encoding="utf-8")):
            said |= dict.fromkeys(words.split(), path)
    assert {"peft", "ai-edge-litert", "pycocoevalcap"} <= set(said)
    assert {word: path for word, path in said.items() if word not in known} == {}


def test_no_module_is_installed():
    """Ours are named evaluate, data, train: in site-packages they would hide those of others."""
    assert PROJECT["tool"]["setuptools"]["packages"] == PROJECT["tool"]["setuptools"]["py-modules"] == []


def test_one_oldest_python():
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert f"Python {oldest} or later" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"


def test_citation():
    """The keys that the format requires, this version, and the same paper as in CONTRIBUTING.md."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation) and citation["cff-version"] == "1.2.0"
    assert citation["version"] == PROJECT["project"]["version"]
    assert citation["license"] == PROJECT["project"]["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")
    paper = citation["preferred-citation"]
    assert paper["type"] == "conference-paper" and len(paper["authors"]) == 8
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    bibtex = dict(re.findall(r"^  (\w+) = \{(.*)\},?$", text, re.MULTILINE))
    names = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert bibtex["author"] == " and ".join(names)
    assert bibtex["title"].replace("{", "").replace("}", "") == paper["title"]
    assert (bibtex["booktitle"], bibtex["year"]) == (paper["collection-title"], str(paper["year"]))
    assert bibtex["url"] == paper["url"]
