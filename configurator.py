"""Config files and --key=value over a script's own globals, checked.

A script's keys are the plain assignments at its top, up to the line that calls configure(). Config
files are plain assignments too: nothing in them is executed.
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
    """A binary file to write that gets its name once it is whole and on disk: path is whole or as it was
    before, and nothing is left beside it. OSError, which names the path, where that fails."""
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
    """[(key, value, comment, line number)] of the plain `key = literal  # comment` lines of a file;
    headings come as (None, heading, "", line number). ValueError for anything else, unless `until`
    names the call that ends the part to read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        body = ast.parse(text).body
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"config file {path} cannot be read: {e}") from None
    except SyntaxError as e:
        raise ValueError(f"{path}, line {e.lineno}: not a plain assignment: write `key = value`") from None
    lines, found = text.splitlines(), []
    for node in body:
        if until and until in ast.unparse(node):
            break
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) \
                or until and not isinstance(node, ast.Assign):
            continue  # docstring, or an import of the script itself
        above = lines[node.lineno - 2] if node.lineno > 1 else ""
        if until and above.startswith("# "):
            found.append((None, above[2:], "", node.lineno - 1))
        try:
            key, value = node.targets[0].id, ast.literal_eval(node.value)
            comment = lines[node.end_lineno - 1][node.end_col_offset:].strip().lstrip("# ")
        except (AttributeError, ValueError):
            raise ValueError(f"{path}, line {node.lineno}: not a plain assignment: "
                             f"write `key = value`") from None
        found.append((key, value, comment, node.lineno))
    return found


def cast(key, value, default, where):
    """value as the type of default: an int serves for a float, 1e5 for an int, true/false/1/0 for a bool."""
    want = type(default)
    if isinstance(value, str) and want is not str:
        try:
            value = ast.literal_eval({"true": "True", "false": "False"}.get(value.lower(), value))
        except (ValueError, SyntaxError):
            pass
    if want is bool and value in (0, 1) and isinstance(value, (bool, int)):
        return bool(value)
    if want is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if want is int and isinstance(value, float) and value == value and value.is_integer():
        return int(value)
    if type(value) is want:
        return value
    raise ValueError(f"{where}: {key} = {value!r} is not of type {want.__name__}, such as {default!r}")


def known(key, defaults, where):
    if key not in defaults:
        near = difflib.get_close_matches(key, defaults, 1, 0)
        raise ValueError(f"{where}: no key named {key}: did you mean {near[0]}? --help lists them all")


def resolve(script, args):
    """All keys of a script as {key: value}: its defaults, then config files and --key=value in
    order, later ones win. ValueError, in one line, for an unknown key, a wrong type or a file
    that is no config file."""
    defaults = {key: value for key, value, _, _ in assignments(script, "configure(") if key}
    config = dict(defaults)
    for arg in args:
        if arg.startswith("--"):
            key, eq, value = arg[2:].partition("=")
            known(key, defaults, arg)
            if not eq:
                raise ValueError(f"{arg}: write --{key}=VALUE")
            config[key] = cast(key, value, defaults[key], arg)
        else:
            path = find(arg)
            if not path.is_file():
                raise ValueError(f"{arg}: no such config file; arguments are config files and --key=value")
            for key, value, _, line in assignments(path):
                known(key, defaults, f"{path}, line {line}")
                config[key] = cast(key, value, defaults[key], f"{path}, line {line}")
    return config


def configure(script, args=None):
    """resolve() for a script's own command line: prints the keys and leaves on --help, ends
    in one line on an error."""
    args = sys.argv[1:] if args is None else args
    try:
        if "--help" in args or "-h" in args:
            print(f"usage: python {Path(script).name} [CONFIG_FILE ...] [--key=value ...]   (later ones win)")
            for key, value, comment, _ in assignments(script, "configure("):
                print(f"  --{f'{key}={value!r}':<34} {comment}" if key else f"\n{value}")
            sys.exit(0)
        return resolve(script, args)
    except ValueError as e:
        fail(e)
