"""The command line's words -> a Config. The only file that knows Hydra.

Values of text keys (prompts, paths) never meet Hydra's grammar, which would refuse or change ordinary text: they are
taken out first and set as they were typed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

from distllm.config import Config, keys, suggest

SCHEMA = "schema"
MODULE = "distllm.conf"


def split_arguments(given: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Flags, and `key=value` words.

    Raises:
        ValueError: a word is neither.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--help", "-h", action="store_true")
    parser.add_argument("--cfg", "-c", action="store_true")
    parser.add_argument("--config-dir", type=Path)
    parser.add_argument("--config-name", default="config")
    flags, overrides, rest = argparse.Namespace(), [], []
    words = iter(given)
    for word in words:
        (overrides if not word.startswith("-") and "=" in word else rest).append(word)
    try:
        flags = parser.parse_args(rest)
    except (argparse.ArgumentError, SystemExit) as error:
        raise ValueError(
            f"cannot read the command line near {' '.join(rest)!r}; give key=value words, see --help"
        ) from error
    return flags, overrides


def compose(flags: argparse.Namespace, overrides: Sequence[str]) -> Config:
    """
    Raises:
        ValueError: a key is unknown, a value has the wrong type, or a configuration file is missing or broken.
    """
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    text_keys = {each.name for each in keys() if each.text}
    words = [word.split("=", 1) for word in overrides]
    texts = [(key, value) for key, value in words if key in text_keys]
    for key, _ in words:
        _check_key(key, flags.config_dir)
    try:
        composed = _compose_with_hydra(flags, [word for word in overrides if word.split("=", 1)[0] not in text_keys])
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_sentence(error)) from error
    assert isinstance(config, Config)
    for key, value in texts:
        _set_text(config, key, value)
    return config


def _compose_with_hydra(flags: argparse.Namespace, overrides: list[str]) -> object:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir, initialize_config_module
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name=SCHEMA, node=Config)
    if flags.config_dir is None:
        with initialize_config_module(MODULE, version_base="1.3"):
            return hydra_compose(flags.config_name, overrides)
    if not flags.config_dir.is_dir():
        raise ValueError(f"--config-dir {flags.config_dir}: no such folder")
    with initialize_config_dir(str(flags.config_dir.resolve()), version_base="1.3"):
        return hydra_compose(flags.config_name, [f"hydra.searchpath=[pkg://{MODULE}]", *overrides])


def _check_key(key: str, config_dir: Path | None) -> None:
    """Refuses a key that is neither in the schema nor a group of configuration files."""
    known = [each.name for each in keys()]
    if key in known or key in _groups(config_dir):
        return
    if key[:1] in "+~":
        raise ValueError(f"{key}: keys cannot be added or removed; see --help for those there are")
    section = [name for name in known if name.startswith(f"{key}.")]
    if section:
        raise ValueError(f"{key}: is a section; set one of its keys, such as {section[0]}")
    raise ValueError(f"{key}: no such key{suggest(key, [*known, *_groups(config_dir)])}; see --help")


def _groups(config_dir: Path | None) -> set[str]:
    folders = [Path(str(files(MODULE))), *([config_dir] if config_dir and config_dir.is_dir() else [])]
    return {each.name for folder in folders for each in folder.iterdir() if each.is_dir() and any(each.glob("*.yaml"))}


def _set_text(config: Config, key: str, value: str) -> None:
    *sections, name = key.split(".")
    section: object = config
    for each in sections:
        section = getattr(section, each)
    setattr(section, name, _stops(value) if key == "sampling.stop" else value)


def _stops(value: str) -> list[str]:
    """One stop string with its escapes decoded, or a JSON list of them."""
    try:
        listed = json.loads(value)
    except json.JSONDecodeError:
        listed = None
    if isinstance(listed, list) and all(isinstance(each, str) for each in listed):
        return listed
    escapes = {"\\n": "\n", "\\t": "\t", "\\r": "\r"}
    parts = value.split("\\\\")
    for escape, character in escapes.items():
        parts = [part.replace(escape, character) for part in parts]
    return ["\\".join(parts)]


def _sentence(error: Exception) -> str:
    """What Hydra or OmegaConf found wrong, in one line, with the nearest name if a file's is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Could not find '"):
        wanted = lines[0].split("'")[1]
        options = [line for line in lines[2:] if not line.endswith(":")]
        group, _, name = wanted.rpartition("/")
        return f"{group or '--config-name'}={name}: no such configuration{suggest(name, options)}"
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), None)
    return f"{key}: {lines[0]}" if key else " ".join(lines[:2]) or type(error).__name__


def yaml_of(config: Config) -> str:
    """The whole configuration, as --cfg shows it."""
    import yaml

    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def help_text() -> str:
    """Every key with its default and what it does."""
    folder = Path(str(files(MODULE)))
    groups = [
        f"  {group}={'|'.join(sorted(each.stem for each in (folder / group).glob('*.yaml')))}"
        for group in sorted(_groups(None))
    ]
    listed = list(keys())
    width = max(len(each.name) for each in listed)
    lines = [
        f"  {each.name:<{width}}  {each.help} [{'none' if each.default is None else json.dumps(each.default)}]"
        for each in listed
    ]
    return "\n".join(
        [
            "Runs one causal language model across the ranks of a torchrun, or in this process alone.",
            "",
            "  torchrun --nproc-per-node 2 -m distllm.run [key=value ...]",
            "  --cfg               shows the configuration and ends",
            "  --config-dir DIR    takes configuration files from DIR first; --config-name NAME begins with DIR/NAME.yaml",
            "",
            "Groups of configuration files:",
            *groups,
            "",
            "Keys, with their defaults:",
            *lines,
        ]
    )
