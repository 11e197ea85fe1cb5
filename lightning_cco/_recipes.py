"""Reading recipes: where they come from, as plain data that is not checked yet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_cco._yaml import check_interpolations, marked, parse_yaml
from lightning_cco.compat.omegaconf import root_of
from lightning_cco.errors import CCOError
from lightning_cco.names import nearest, printable, shown

_LARGEST = 32 * 2**20  # bytes of a recipe


def shipped_configs_dir() -> Path:
    """The folder of the shipped Hydra configs: in the package if it is installed, next to the package in a source tree.

    Raises:
        CCOError: Neither is there.

    Example:
        >>> (shipped_configs_dir() / "cco" / "w8a8.yaml").is_file()
        True
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "configs", here.parent / "configs"):
        if (folder / "cco").is_dir():
            return folder
    raise CCOError(f"The shipped configs are missing: expected {here / 'configs'}. Install lightning_cco again.")


def shipped_recipes() -> dict[str, Path]:
    """Path of each shipped recipe by its name."""
    return {path.stem: path for path in sorted((shipped_configs_dir() / "cco").glob("*.yaml"))}


def read(cfg: Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    """Any form of a recipe as a plain dict, not checked yet."""
    if cfg is None:
        return {}
    if isinstance(cfg, DictConfig):
        return dict(_resolved(cfg, "The recipe"))
    if isinstance(cfg, Mapping):
        return {key if isinstance(key, str) else shown(key): value for key, value in cfg.items()}
    if isinstance(cfg, (str, Path)):
        return _read_file(cfg)
    raise CCOError(
        "Expected a recipe (None, Settings, a mapping, a DictConfig, the path of a YAML file or the name of a shipped recipe), "
        f"got {type(cfg).__name__}. Write CCOCallback('w8a8') or CCOCallback({{'global_quantization_settings': {{'weights_num_bits': 8}}}})."
    )


def _read_file(cfg: str | Path) -> dict[str, Any]:
    path = Path(cfg)
    if not path.is_file():
        recipes = shipped_recipes()
        if str(cfg) in recipes:
            path = recipes[str(cfg)]
        elif path.suffix in (".yaml", ".yml") or path.parent != Path("."):
            raise CCOError(
                f"The recipe '{cfg}' is not a file. Give the path of a YAML file, or the name of a shipped recipe: {sorted(recipes)}."
            )
        else:
            raise CCOError(f"There is no recipe named '{cfg}'.{nearest(str(cfg), recipes)} The shipped ones are {sorted(recipes)}.")
    what = f"The recipe '{printable(cfg, 200)}'"
    try:
        if path.stat().st_size > _LARGEST:
            raise CCOError(f"{what}: expected a file of at most {_LARGEST:,} bytes, got one of {path.stat().st_size:,}.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CCOError(f"{what} can't be read: {printable(error, 300)}") from error
    content = parse_yaml(text, what)
    if isinstance(content, dict) and "${" in text:
        content = _resolved(content, f"{what} is not valid YAML")
    if not isinstance(content, dict):
        came = "nothing" if content is None else f"a {type(content).__name__}"
        raise CCOError(f"The recipe '{cfg}' holds {came}: expected a mapping with keys such as global_quantization_settings.")
    return {key if isinstance(key, str) else shown(key): value for key, value in content.items()}


def _resolved(cfg: Any, what: str) -> Any:
    """A recipe with its interpolations resolved, as plain data."""
    try:
        config = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(cfg)
        check_interpolations(OmegaConf.to_container(root_of(config)))
        return marked(OmegaConf.to_container(config, resolve=True), OmegaConf.to_container(config))
    except (OmegaConfBaseException, RecursionError, ValueError) as error:
        said = "they refer to themselves" if isinstance(error, RecursionError) else printable(error, 300)
        raise CCOError(f"{what}: its interpolations can't be resolved: {said}") from error
