"""The command line's words -> a Config. The only file that knows Hydra.

Values of text keys (prompts, paths) never meet Hydra's grammar, which would refuse or change ordinary text: they are
taken out first and set as they were typed.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import NoReturn, cast

import yaml
from hydra import compose as hydra_compose
from hydra import initialize, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distllm.config import Config, keys, kind, suggest

SCHEMA = "schema"
MODULE = "distllm.conf"
PRIMARY = "config"
STOP = "sampling.stop"
FLAGS = ("--help", "--cfg", "--config-dir", "--config-name")
KEYS = {each.name: each for each in keys()}


class Words(argparse.ArgumentParser):
    """argparse, which speaks to the caller instead of the user."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help")


class PackagedFiles(SearchPathPlugin):  # type: ignore[misc]
    """Lets Hydra find distllm's own configuration files, after those of the user."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("distllm", f"pkg://{MODULE}")


def split_arguments(given: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Flags, and `key=value` words.

    Raises:
        ValueError: a word is neither.
    """
    parser = Words(add_help=False, allow_abbrev=False)
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--cfg", "-c", action="store_true")
    parser.add_argument("--config-dir", type=Path)
    parser.add_argument("--config-name", default=PRIMARY)
    parser.add_argument("words", nargs="*")
    flags, unknown = parser.parse_known_intermixed_args(given)
    for word in [*unknown, *flags.words]:
        _check_form(word)
    return flags, flags.words


def _check_form(word: str) -> None:
    """Refuses what is neither a flag nor key=value."""
    name = word.lstrip("-+~").split("=", 1)[0]
    if word.startswith("-") and name in KEYS:
        raise ValueError(f"{word}: keys are given without dashes: {name}=VALUE")
    if word.startswith("-"):
        near = suggest(word, list(FLAGS))
        raise ValueError(f"{word}: no such option{near}; there are --help, --cfg, --config-dir DIR, --config-name NAME")
    if word.startswith(("+", "~")):
        raise ValueError(f"{word}: keys cannot be added or removed, only set{suggest(name, list(KEYS))}; see --help")
    if "=" not in word:
        _refuse_section(word)
        if word in KEYS:
            raise ValueError(f"{word}: has no value; give it as {word}=VALUE")
        near = suggest(word, list(KEYS))
        raise ValueError(f'{word!r} is not key=value{near}; a value with spaces needs quotes: prompt="two words"')


def _refuse_section(key: str) -> None:
    section = [name for name in KEYS if name.startswith(f"{key}.")]
    if section:
        raise ValueError(f"{key}: is a section; set one of its keys, such as {section[0]}")


def compose(flags: argparse.Namespace, overrides: Sequence[str]) -> Config:
    """
    Raises:
        ValueError: a key is unknown, a value has the wrong type, or a configuration file is missing or broken.
    """
    if flags.config_dir is not None and not flags.config_dir.is_dir():
        raise ValueError(f"--config-dir {flags.config_dir}: no such folder")
    groups = _groups(flags.config_dir)
    typed: dict[str, str | list[str]] = {}
    words = []
    for word in overrides:
        key, value = word.split("=", 1)
        _check_key(key, value, groups)
        if key in KEYS and KEYS[key].text:
            typed[key] = _stops(value) if key == STOP else value
        else:
            words.append(word)
    try:
        config = _compose_with_hydra(flags, words, typed)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(_sentence(error, words, flags)) from error
    for key, text in typed.items():
        _set(config, key, text)
    return config


def _compose_with_hydra(
    flags: argparse.Namespace, words: Sequence[str], typed: Mapping[str, str | list[str]]
) -> Config:
    ConfigStore.instance().store(name=SCHEMA, node=Config)
    Plugins.instance().register(PackagedFiles)
    folder = flags.config_dir
    where = initialize(None, version_base="1.3") if folder is None else _initialize_in(folder)
    with where:
        composed = hydra_compose(flags.config_name.removesuffix(".yaml"), list(words))
    if OmegaConf.get_type(composed) is not Config:
        raise ValueError(_without_schema(flags))
    for key, value in typed.items():
        # So that ${prompts} in a user's file means what was typed.
        OmegaConf.update(composed, key, [_plain(each) for each in value] if isinstance(value, list) else _plain(value))
    return cast(Config, OmegaConf.to_object(composed))


def _initialize_in(folder: Path) -> initialize_config_dir:
    return initialize_config_dir(str(folder.resolve()), version_base="1.3")


def _plain(text: str) -> str:
    """As OmegaConf wants it so that it stands for itself; `???`, which it cannot hold, becomes empty."""
    return "" if text == "???" else re.sub(r"(\\*)\$\{", lambda found: rf"{found[1] * 2}\${{", text)


def _check_key(key: str, value: str, groups: Mapping[str, list[str]]) -> None:
    """Refuses a key that is not in the schema, and a group's file that does not exist."""
    if key in groups:
        if value not in groups[key]:
            near = suggest(value, groups[key]) or f"; there are {', '.join(groups[key])}"
            raise ValueError(f"{key}={value}: no such file of this group{near}")
    elif key not in KEYS:
        _refuse_section(key)
        raise ValueError(f"{key}={value}: no such key{suggest(key, [*KEYS, *groups])}; see --help")


def _groups(folder: Path | None) -> dict[str, list[str]]:
    """The groups of configuration files, and the names of the files in each."""
    found: dict[str, set[str]] = {}
    for each in (Path(str(files(MODULE))), *([folder] if folder else [])):
        for file in each.glob("*/*.yaml"):
            found.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(names) for group, names in sorted(found.items())}


def _set(config: Config, key: str, value: str | list[str]) -> None:
    *sections, name = key.split(".")
    section: object = config
    for each in sections:
        section = getattr(section, each)
    setattr(section, name, value)


def _stops(value: str) -> list[str]:
    """One stop string with its escapes decoded, or a JSON list of them; none if empty."""
    try:
        listed = json.loads(value)
    except ValueError:
        listed = None
    if isinstance(listed, list) and all(isinstance(each, str) for each in listed):
        return listed
    escapes = {"\\n": "\n", "\\t": "\t", "\\r": "\r", "\\\\": "\\"}
    return [re.sub(r"\\[ntr\\]", lambda found: escapes[found[0]], value)] if value else []


def _sentence(error: Exception, words: Sequence[str], flags: argparse.Namespace) -> str:
    """What Hydra, OmegaConf or YAML found wrong, in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, MissingConfigException):
        return _missing(error, flags)
    if isinstance(error, yaml.YAMLError | UnicodeDecodeError):
        return f"a configuration file in {flags.config_dir} cannot be read: {text}"
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    key = str(getattr(cause, "full_key", None) or "")
    word = _culprit(error, text, key, words)
    if word is not None:
        name = word.split("=", 1)[0]
        if name not in KEYS:
            return f"{word}: this group is not in the defaults list of {_primary(flags)}"
        return _without_schema(flags) if "Could not override" in text else f"{word}: it must be {_kind(name)}"
    # Not from the command line, so from a file, which Hydra names at the beginning.
    file = re.match(r"In '([^']*)'", text)
    where = ": ".join(part for part in (f"{file[1]}.yaml" if file else "", key) if part)
    if "not in" in text and key not in KEYS:
        return f"{where}: no such key{suggest(key, list(KEYS))}; see --help"
    reason = str(cause or error).strip().splitlines()[0]
    return f"{where}: {reason}" + (f"; it must be {_kind(key)}" if "Value" in reason and key in KEYS else "")


def _culprit(error: Exception, text: str, key: str, words: Sequence[str]) -> str | None:
    """The word of the command line that an error is about."""
    parsed = getattr(error, "override", None)
    for word in reversed(words):
        name = word.split("=", 1)[0]
        if word == parsed or name == key or word in text or f"Could not override '{name}'" in text:
            return word
    return None


def _kind(key: str) -> str:
    return kind(key, KEYS[key].type)


def _missing(error: MissingConfigException, flags: argparse.Namespace) -> str:
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    if group:
        options = list(error.options or [])
        return f"{group}: {name}: there is no such file{suggest(name, options)}"
    where = "" if flags.config_dir is None else f"{flags.config_dir} or "
    return f"--config-name {flags.config_name}: there is no {name}.yaml in {where}distllm's own configuration"


def _without_schema(flags: argparse.Namespace) -> str:
    return f"{_primary(flags)} does not build on distllm's keys; begin it with the line: defaults: [{SCHEMA}, _self_]"


def _primary(flags: argparse.Namespace) -> Path:
    name = flags.config_name.removesuffix(".yaml") + ".yaml"
    own = Path(flags.config_dir or ".", name)
    return own if own.is_file() else Path("conf", name)


class Quoted(yaml.SafeDumper):  # type: ignore[misc]
    """YAML that quotes every text that is not one plain word, for OmegaConf's idea of numbers is wider than YAML's."""


Quoted.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if text.isidentifier() and text.isascii() else '"'
    ),
)


def yaml_of(config: Config) -> str:
    """The whole configuration, as --cfg shows it."""
    return str(yaml.dump(asdict(config), Dumper=Quoted, sort_keys=False, allow_unicode=True))


def help_text(config_dir: Path | None = None) -> str:
    """Every key with its default and what it does."""
    groups = [f"  {group}={'|'.join(names)}" for group, names in _groups(config_dir).items()]
    width = max(len(name) for name in KEYS)
    lines = [f"  {each.name:<{width}}  {each.help} [{_shown(each.default)}]" for each in KEYS.values()]
    return "\n".join(
        [
            "Runs one causal language model across the ranks of a torchrun, or in this process alone.",
            "",
            '  python -m distllm.run prompt="Once upon a time"',
            "  torchrun --nproc-per-node 2 -m distllm.run [key=value ...]",
            "",
            "  --help              shows this and ends",
            "  --cfg               shows the configuration that the other words make, and ends",
            "  --config-dir DIR    takes configuration files from DIR first, then from distllm's own",
            "  --config-name NAME  begins with NAME.yaml instead of config.yaml",
            "",
            "Groups of configuration files:",
            *groups,
            "",
            "Keys, with their defaults in brackets:",
            *lines,
        ]
    )


def _shown(default: object) -> str:
    """A default as one would type it."""
    if default is None or default in ("", []):
        return "none"
    return default if isinstance(default, str) else json.dumps(default, separators=(",", ":")).replace('"', "")
