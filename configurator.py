"""Config files and --key=value over a script's own globals, checked.

A script's keys are the plain assignments at its top, up to the line that calls configure(). Config files are
plain assignments too: nothing in them is executed.
"""
import ast
import contextlib
import difflib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def fail(message):
    """End the script with one line on stderr and status 1."""
    sys.exit(f"error: {' '.join(str(message).split())}")


def find(path):
    """path as seen from the current folder, else from the project's: scripts work from any folder."""
    path = Path(path).expanduser()
    return path if path.exists() or path.is_absolute() or not (ROOT / path).exists() else ROOT / path


@contextlib.contextmanager
def whole_file(path):
    """A binary file to write that gets its name once it is whole and on disk: path is whole or as it was before,
    and nothing is left beside it. OSError, which names the path, where that fails."""
    aside = Path(f"{path}.tmp")
    try:
        with open(aside, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except BaseException as e:
        aside.unlink(missing_ok=True)
        # a full disk does not say which file, and torch.save turns it into a RuntimeError
        if isinstance(e, RuntimeError) or isinstance(e, OSError) and not e.filename:
            why = isinstance(e, RuntimeError) and e.__context__ or e
            raise OSError(f"cannot write {path}: {why}") from e
        raise


def assignments(path, until=None):
    """[(key, value, line number)] of the plain `key = literal` lines of a file. ValueError for anything else,
    unless `until` names the call that ends the part to read."""
    try:
        body = ast.parse(Path(path).read_text(encoding="utf-8")).body
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"config file {path} cannot be read ({e}): give config files and --key=value") from None
    except SyntaxError as e:
        raise ValueError(f"{path}, line {e.lineno}: not a plain assignment: write `key = value`") from None
    found = []
    for node in body:
        if until and until in ast.unparse(node):
            break
        if until and not isinstance(node, ast.Assign):
            continue  # the docstring or an import of the script itself
        try:
            found.append((node.targets[0].id, ast.literal_eval(node.value), node.lineno))
        except (AttributeError, ValueError):
            raise ValueError(f"{path}, line {node.lineno}: not a plain assignment: write `key = value`") from None
    return found


def checked(key, value, defaults, where):
    """value as the type of the key's default: an int serves for a float, 1e5 for an int, true/false/1/0 for a bool."""
    if key not in defaults:
        near = difflib.get_close_matches(key, defaults, 1, 0)
        raise ValueError(f"{where}: no key named {key}: did you mean {near[0]}? --help lists them all")
    want = type(defaults[key])
    if isinstance(value, str) and want is not str:
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval({"true": "True", "false": "False"}.get(value.lower(), value))
    kind = type(value)
    fits = {bool: kind is int and value in (0, 1), int: kind is float and value.is_integer(), float: kind is int}
    if kind is not want and not fits.get(want):
        raise ValueError(f"{where}: {key} = {value!r} is not of type {want.__name__}, such as {defaults[key]!r}")
    return value if kind is want else want(value)


def resolve(script, args):
    """All keys of a script as {key: value}: its defaults, then config files and --key=value in order, later ones
    win. ValueError, in one line, for an unknown key, a wrong type or a file that is no config file."""
    defaults = {key: value for key, value, _ in assignments(script, "configure(")}
    config = dict(defaults)
    for arg in args:
        if arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            if not equals:
                raise ValueError(f"{arg}: write {arg}=VALUE")
            given = [(key, value, arg)]
        else:
            path = find(arg)
            given = [(key, value, f"{path}, line {line}") for key, value, line in assignments(path)]
        for key, value, where in given:
            config[key] = checked(key, value, defaults, where)
    return config


def configure(script):
    """resolve() for a script's own command line: prints the script's keys, as they stand there with their
    comments, and leaves on --help; ends in one line on an error."""
    try:
        if "--help" in sys.argv or "-h" in sys.argv:
            print(f"usage: python {Path(script).name} [CONFIG_FILE ...] [--key=value ...]   (later ones win)\n")
            lines = [line for _, _, line in assignments(script, "configure(")]
            print(*Path(script).read_text().splitlines()[lines[0] - 2:lines[-1]], sep="\n")
            sys.exit(0)
        return resolve(script, sys.argv[1:])
    except ValueError as e:
        fail(e)
