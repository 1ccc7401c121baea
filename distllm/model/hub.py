"""Checkpoints of the Hugging Face Hub: of the weights, a rank downloads only the files that hold its own tensors.

Small files (configuration, tokenizer, index) come first, then the headers of the weights, by ranges; they tell what is
where. All goes through the Hub's own cache and client, so that tokens, mirrors and offline use are set as everywhere.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.asyncio import tqdm

from distllm.model.files import SMALL_FILES, Headers, LocalFiles, TensorInfo, check_infos

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HEADERS = "distllm-headers"


class HubFiles(LocalFiles):
    """A repository of the Hub at one revision.

    Args:
        revision: branch, tag or commit; None takes the main branch.
        headers: folder in which headers of weights that are not downloaded are kept.

    Raises:
        ValueError: there is no such repository or revision, it is closed to the user, or it cannot be reached.
    """

    def __init__(self, repository: str, revision: str | None, headers: Path) -> None:
        from huggingface_hub import snapshot_download

        self._repository = repository
        with _sentences(repository, revision):
            found = snapshot_download(
                repository, revision=revision, allow_patterns=list(SMALL_FILES), tqdm_class=_telling(lambda: None)
            )
        super().__init__(Path(found))
        self.commit = self.folder.name
        self._headers = headers / repository.replace("/", "--") / self.commit

    def has(self, name: str) -> bool:
        """Whether the repository has such a file of weights; its header is kept, for it is wanted next."""
        from huggingface_hub.errors import EntryNotFoundError

        if super().has(name) or self._kept(name).exists():
            return True
        try:
            self._keep(name)
        except EntryNotFoundError:
            return False
        return True

    def header(self, name: str) -> Headers:
        if super().has(name):
            return super().header(name)
        if not self._kept(name).exists():
            self._keep(name)
        kept = json.loads(self._kept(name).read_text())
        infos = {tensor: TensorInfo(name, tuple(shape), dtype) for tensor, (shape, dtype) in kept.items()}
        check_infos(self.folder / name, infos)
        return infos

    def _kept(self, name: str) -> Path:
        return self._headers / f"{name}.json"

    def _keep(self, name: str) -> None:
        content = json.dumps(self._download_header(name))
        self._headers.mkdir(parents=True, exist_ok=True)
        part = self._headers / f"{name}.{os.getpid()}.part"
        part.write_text(content)
        part.rename(self._kept(name))

    def _download_header(self, name: str) -> dict[str, tuple[list[int], str]]:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import SafetensorsParsingError

        try:
            with _sentences(self._repository, self.commit):
                found = HfApi().parse_safetensors_file_metadata(self._repository, name, revision=self.commit)
        except SafetensorsParsingError as error:
            raise ValueError(f"{self._repository}: {name} is not a safetensors file: {error}") from error
        return {tensor: (list(info.shape), str(info.dtype)) for tensor, info in found.tensors.items()}

    def fetch(self, names: Iterable[str], alive: Callable[[], None]) -> None:
        """Downloads what is not in the cache yet; a download that broke off goes on where it stopped.

        Raises:
            ValueError: the Hub cannot be reached, or there is no room on the disk.
        """
        from huggingface_hub import hf_hub_download

        missing = [name for name in names if not super(HubFiles, self).has(name)]
        if missing:
            logger.info("downloading %d files of %s", len(missing), self._repository)
        for name in missing:
            with _sentences(self._repository, self.commit):
                hf_hub_download(self._repository, name, revision=self.commit, tqdm_class=_telling(alive))


def _telling(alive: Callable[[], None]) -> type[tqdm[Any]]:
    """A bar for the Hub's client that draws nothing and tells that the download goes on."""

    class Telling(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **named: Any) -> None:
            named.pop("name", None)  # the client's own
            super().__init__(*args, **named | {"disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            alive()
            return bool(super().update(n))

    return Telling


@contextmanager
def _sentences(repository: str, revision: str | None) -> Iterator[None]:
    """What the Hub's client raises, as a sentence that says what to do."""
    from huggingface_hub import errors

    at = f" at revision {revision}" if revision else ""
    try:
        yield
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ValueError(
            f"{repository}{at}: no such folder here, not whole in the Hub's cache, and the Hub cannot be reached; "
            "download it while online, or say model.path=FOLDER"
        ) from error
    except errors.EntryNotFoundError:
        raise
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{repository}: its owner lets in only those who asked; accept its terms on the Hub, "
            "then log in by `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{repository}: has no revision {revision}") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ValueError(
            f"{repository}: is neither a folder here nor a model of the Hub that you may see; "
            "check the name, or log in by `hf auth login`"
        ) from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # that of the client's own HTTP library
        raise ValueError(f"{repository}: cannot be downloaded: {str(error).strip().splitlines()[0]}") from error
