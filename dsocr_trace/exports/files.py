"""Files that other tools read: written aside and renamed, and read back."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import cattrs
import yaml
from cattrs.preconf.json import make_converter

from analytic.errors import DsocrTraceError, InputError
from dsocr_trace.exports.analytic_report import SCHEMA_VERSION, AnalyticModelReport
from dsocr_trace.exports.builder import run_report
from dsocr_trace.exports.callgraph_dot import call_graph_dot
from dsocr_trace.exports.csv_tables import csv_archive
from dsocr_trace.exports.perfetto import perfetto_trace
from dsocr_trace.exports.speedscope import speedscope_profiles

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dsocr_trace.runs.store import Run


def _converter() -> cattrs.Converter:
    """A converter that takes nothing for something else: no missing or unknown fields, no text for a number."""
    converter = make_converter(forbid_extra_keys=True)
    for kind in (int, float, str, bool):
        converter.register_structure_hook(kind, _exactly(kind))
    return converter


def _exactly(kind: type) -> Callable[[Any, Any], Any]:
    accepted = (int, float) if kind is float else (kind,)

    def check(value: Any, _: Any) -> Any:
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"{value!r} is not of type {kind.__name__}")
        return kind(value)

    return check


_CONVERTER: Final = _converter()
# The C versions where libyaml is there: the same text in a tenth of the time.
_YAML_DUMPER: Final = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_YAML_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _to_json(plain: Any) -> str:
    return json.dumps(plain, indent=1) + "\n"


def _to_yaml(plain: Any) -> str:
    text: str = yaml.dump(plain, Dumper=_YAML_DUMPER, sort_keys=False, allow_unicode=True)
    return text


#: Formats of an analytic report, by name and by the endings of their files.
REPORT_FORMATS: Final[Mapping[str, Callable[[Any], str]]] = {"json": _to_json, "yaml": _to_yaml}
_ENDINGS: Final = {".json": "json", ".yaml": "yaml", ".yml": "yaml"}


def report_text(report: AnalyticModelReport, report_format: str) -> str:
    """The report in one of `REPORT_FORMATS`."""
    return REPORT_FORMATS[report_format](_CONVERTER.unstructure(report))


def _run_writer(report_format: str) -> Callable[[Run], str]:
    return lambda run: report_text(run_report(run), report_format)


#: What a run can be exported as, by name of the format. A format of bytes has no place on a terminal.
RUN_FORMATS: Final[Mapping[str, Callable[..., str | bytes]]] = {
    **{name: _run_writer(name) for name in REPORT_FORMATS},
    "perfetto": perfetto_trace,
    "speedscope": speedscope_profiles,
    "dot": call_graph_dot,
    "csv": csv_archive,
}


def save_report(report: AnalyticModelReport, path: str | Path, *, force: bool = False) -> Path:
    """Write a report in the format that the file's ending names.

    Parameters
    ----------
    report
        What to write.
    path
        File ending in ``.json``, ``.yaml`` or ``.yml``.
    force
        Whether to replace an existing file.

    Raises
    ------
    InputError
        If the ending is another one, the file exists, or its directory does not.
    DsocrTraceError
        If it cannot be written.
    """
    path = Path(path)
    return write_file(path, report_text(report, format_of(path)), force=force)


def format_of(path: Path) -> str:
    """Format of a report that the ending of a file names.

    Raises
    ------
    InputError
        If it names none.
    """
    try:
        return _ENDINGS[path.suffix.lower()]
    except KeyError:
        raise InputError(f"{path} must end in one of {', '.join(_ENDINGS)}; give the file another name") from None


def check_free(path: Path, *, force: bool) -> None:
    """Refuse to write over a file.

    Raises
    ------
    InputError
        If there is a file and `force` is not set, or its directory is missing.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: it must be a file in an existing directory")
    if path.exists() and not force:
        raise InputError(f"{path} exists and is left as it is; choose another name, or replace it with --force")


def write_file(path: Path, content: str | bytes, *, force: bool) -> Path:
    """Write a file aside and rename it, so that nothing half-written is ever seen under its name.

    Raises
    ------
    InputError
        If the file exists and `force` is not set, or its directory is missing.
    DsocrTraceError
        If it cannot be written.
    """
    check_free(path, force=force)
    aside = None
    try:
        descriptor, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        Path(aside).chmod(0o644)
        Path(aside).replace(path)
    except OSError as error:
        raise DsocrTraceError(
            f"cannot write {path}: {error.strerror or error}; nothing is left behind, choose another place"
        ) from error
    finally:
        if aside is not None:
            Path(aside).unlink(missing_ok=True)
    return path


def load_report(path: str | Path) -> AnalyticModelReport:
    """Read a report back; it is equal to the one that was written.

    Parameters
    ----------
    path
        File that ``dsocr-trace export``, ``dsocr-trace predict --export`` or `save_report` has written.

    Raises
    ------
    InputError
        If the file cannot be read, is no such report, or has another schema version.
    """
    path = Path(path)
    raw = _parsed(path)
    if not isinstance(raw, dict) or "schema_version" not in raw:
        raise InputError(f"{path} is no analytic report: it has no schema_version; export one with dsocr-trace export")
    version = raw["schema_version"]
    if type(version) is not int or version != SCHEMA_VERSION:
        raise InputError(
            f"{path} has schema version {version!r}, this dsocr-trace reads {SCHEMA_VERSION}; "
            "export it again, or read it with the version that wrote it"
        )
    try:
        return _CONVERTER.structure(raw, AnalyticModelReport)
    except cattrs.BaseValidationError as error:
        problems = cattrs.transform_error(error, format_exception=_problem)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise InputError(f"{path} is no analytic report: {problems[0]}{more}; export it again") from error


def _parsed(path: Path) -> Any:
    report_format = format_of(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"report {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        if report_format == "json":
            return json.loads(text)
        return yaml.load(text, Loader=_YAML_LOADER)  # noqa: S506  a safe loader, as its name says
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"report {path} is not valid {report_format.upper()}: {reason}") from error


def _problem(error: BaseException, kind: type | None) -> str:
    if isinstance(error, KeyError):
        return f"field {error} is missing"
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        return f"unknown fields {', '.join(sorted(error.extra_fields))}"
    if isinstance(error, AttributeError) or "not iterable" in str(error):  # what comes of another type of JSON value
        return f"not of type {getattr(kind, '__name__', kind)}"
    return str(error)
