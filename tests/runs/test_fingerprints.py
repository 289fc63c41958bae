"""Fingerprints of a method's code."""

from pathlib import Path

from exitkit.runs import fingerprints


def test_editing_a_file_that_a_method_imports_changes_its_digest(monkeypatch):
    before = {name: fingerprints.code_digest(name) for name in ("ge", "boostnet", "joint", "imta")}
    read = Path.read_bytes
    edited = lambda path: read(path) + b"#" * (path.name == "ge.py")  # noqa: E731
    monkeypatch.setattr(Path, "read_bytes", edited)
    after = {name: fingerprints.code_digest(name) for name in before}
    assert {name for name in before if before[name] != after[name]} == {"ge", "boostnet", "imta"}


def test_a_method_of_a_package_has_the_digest_of_the_package(tmp_path, monkeypatch):
    import sys

    package = tmp_path / "someones"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tools.py").write_text("FACTOR = 2\n")
    (package / "method.py").write_text("from . import tools\nfrom exitkit.strategy import TrainingStrategy\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import someones.method  # noqa: F401

    found = fingerprints._source_files("someones.method", "someones")
    assert {path.name for path in found} >= {"method.py", "tools.py"}
    assert all(path.is_relative_to(tmp_path) for path in found)
    for name in [name for name in sys.modules if name.startswith("someones")]:
        monkeypatch.delitem(sys.modules, name)
