"""The blocks between `# === shared: NAME (canonical copy: FILE) ===` and `# === end shared ===` are the same
text in every script that has them. `python tests/test_shared.py --fix` writes the canonical copy over all."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = re.compile(r"# === shared: (.+) \(canonical copy: (\w+\.py)\) ===$"), "# === end shared ==="


def blocks(text: str, file: str) -> dict[str, tuple[str, int, list[str]]]:
    """name -> (canonical file, line number of the marker, the lines between the markers)."""
    found, open_block = {}, None
    for number, line in enumerate(text.splitlines(), 1):
        match = BEGIN.match(line)
        if match or line == END:
            assert bool(match) == (open_block is None), f"{file}:{number}: marker out of place: {line}"
            open_block = match and match[1]
            if match:
                assert match[1] not in found, f"{file}:{number}: block '{match[1]}' stands twice"
                found[match[1]] = (match[2], number, [])
        elif line.startswith("# ===") and "shared" in line:
            raise AssertionError(f"{file}:{number}: not a marker of the agreed form: {line}")
        elif open_block:
            found[open_block][2].append(line)
    assert open_block is None, f"{file}: block '{open_block}' is not closed"
    return found


def differences(root: Path) -> list[str]:
    """One line, file:line: message, for each copy that differs from its canonical one."""
    scripts = {p.name: blocks(p.read_text(), p.name) for p in sorted(root.glob("*.py"))}
    messages = []
    for file, found in scripts.items():
        for name, (canonical, number, lines) in found.items():
            original = scripts.get(canonical, {}).get(name)
            if original is None:
                messages.append(f"{file}:{number}: {canonical} has no block '{name}'")
            elif lines != original[2]:
                pairs = enumerate(zip(lines + [None], original[2] + [None]), 1)
                at = number + next(i for i, (mine, theirs) in pairs if mine != theirs)
                messages.append(f"{file}:{at}: block '{name}' differs from its canonical copy in {canonical}")
    return messages


def fix(root: Path):
    for path in sorted(root.glob("*.py")):
        text = path.read_text()
        for name, (canonical, _, lines) in blocks(text, path.name).items():
            original = blocks((root / canonical).read_text(), canonical)[name][2]
            all_lines = text.splitlines()
            position = (
                next(i for i, x in enumerate(all_lines) if BEGIN.match(x) and BEGIN.match(x)[1] == name) + 1
            )
            if lines != original:
                print(f"{path.name}: block '{name}' overwritten with that of {canonical}")
            all_lines[position : position + len(lines)] = original
            text = "\n".join(all_lines) + "\n"
        path.write_text(text)


def test_shared_blocks_are_identical():
    assert not differences(ROOT), "\n" + "\n".join(differences(ROOT))


def test_the_checker_sees_and_mends_a_difference(tmp_path):
    block = "# === shared: x (canonical copy: a.py) ===\n{}\n# === end shared ===\n"
    (tmp_path / "a.py").write_text("import os\n" + block.format("one = 1\ntwo = 2"))
    (tmp_path / "b.py").write_text(block.format("one = 1\ntwo = 3\nthree = 3") + "tail = 1\n")
    assert differences(tmp_path) == ["b.py:3: block 'x' differs from its canonical copy in a.py"]
    fix(tmp_path)
    assert not differences(tmp_path)
    assert (tmp_path / "b.py").read_text() == block.format("one = 1\ntwo = 2") + "tail = 1\n"


def test_no_script_imports_another():
    names = [p.stem for p in ROOT.glob("*.py")]
    for path in ROOT.glob("*.py"):
        assert not re.search(rf"^\s*(from|import) ({'|'.join(names)})\b", path.read_text(), re.M), path


TWINS = {  # small parts of the algorithms, too small for a block and told again in each script
    "StackedLinear": ("cql_continuous", "sac"),
    "squashed_log_prob": ("cql_continuous", "sac"),
    "polyak": ("cql_continuous", "sac", "td3"),
    "Learner.minimise": ("cql_continuous", "sac", "td3"),
    "Agent.sample": ("ppo", "kfac_npg"),
    "Agent.mode": ("ppo", "kfac_npg"),
    "Agent.log_prob": ("ppo", "kfac_npg"),
    "Agent.entropy": ("ppo", "kfac_npg"),
}


def source(script: str, name: str) -> str:
    """The text of a class, a function, or Class.method."""
    text = (ROOT / f"{script}.py").read_text()
    body = ast.parse(text).body
    for part in name.split("."):
        (node,) = [x for x in body if getattr(x, "name", None) == part]
        body = getattr(node, "body", [])
    return ast.get_source_segment(text, node)


def test_what_is_written_twice_is_written_alike():
    for name, scripts in TWINS.items():
        first, *others = (source(script, name) for script in scripts)
        assert all(other == first for other in others), f"{name} differs among {scripts}"


def test_size_report(capsys):
    """Prints, for each script, its lines in all, those of its own, and those of each shared block."""
    with capsys.disabled():
        for path in sorted(ROOT.glob("*.py")):
            text = path.read_text()
            sizes = {name: len(lines) for name, (_, _, lines) in blocks(text, path.name).items()}
            total = len(text.splitlines())
            print(
                f"\n{path.name}: {total} lines, {total - sum(sizes.values())} of its own, shared {sizes}",
                end="",
            )
        print()


if __name__ == "__main__":
    if sys.argv[1:] == ["--fix"]:
        fix(ROOT)
    elif sys.argv[1:]:
        sys.exit("tests/test_shared.py [--fix]")
    found = differences(ROOT)
    print("\n".join(found) or "all shared blocks are identical")
    sys.exit(bool(found))
