"""pyproject.toml, the requirements and CITATION.cff agree with each other and with the documentation."""

import re
import tomllib

import yaml
from helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
NO_EXTRA = {"litgpt", "llama-cpp-python"}  # benchmarked only if they are installed


def pins(name):
    """Return every `package==version` of a requirements file, without comments and `-r` lines."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith("-r ")]


def test_every_version_is_pinned_once():
    for name in ("requirements.txt", "requirements-dev.txt"):
        assert all(re.fullmatch(r"[\w-]+==[\w.]+", pin) for pin in pins(name)), name
    packages = [pin.split("==")[0] for name in ("requirements.txt", "requirements-dev.txt") for pin in pins(name)]
    assert len(packages) == len(set(packages)) > 20


def test_extras_equal_requirements_dev():
    """The packages of all extras, with their versions, are those of requirements-dev.txt."""
    all_extras, *dev_tools = EXTRAS["dev"]
    others = [name for name in EXTRAS if name != "dev"]
    assert all_extras == f"llama-adapter[{','.join(others)}]"
    assert {pin for name in others for pin in EXTRAS[name]}.union(dev_tools) == set(pins("requirements-dev.txt"))
    assert PROJECT["project"]["dynamic"] == ["dependencies"]
    assert PROJECT["tool"]["setuptools"]["dynamic"] == {"dependencies": {"file": ["requirements.txt"]}}


def test_packages_to_install_are_in_an_extra():
    """Each `pip install` in a module or on a page names only packages that are in an extra or in NO_EXTRA."""
    known = {requirement.split("==")[0] for extra in EXTRAS.values() for requirement in extra} | NO_EXTRA
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
    files += ROOT.glob("docs/examples/*.py")
    named = {}
    for path in files:
        for packages in re.findall(r"pip install ([a-z][\w -]*)", path.read_text(encoding="utf-8")):
            named |= dict.fromkeys(packages.split(), path)
    assert {"peft", "ai-edge-litert", "pycocoevalcap"} <= set(named)
    assert {package: path for package, path in named.items() if package not in known} == {}


def test_no_module_is_installed():
    """Installed modules named evaluate, data or train would conflict with third-party modules of these names."""
    assert PROJECT["tool"]["setuptools"]["packages"] == PROJECT["tool"]["setuptools"]["py-modules"] == []


def test_minimum_python_version_is_consistent():
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert f"Python {oldest} or later" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"


def test_citation_file_is_consistent():
    """CITATION.cff has the required keys, the project's version and license, and the paper of CONTRIBUTING.md."""
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
