"""A repository of the Hugging Face Hub: its files at one commit, and without network the cached
ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from selfnpo_fast.runtime.console import say_once
from selfnpo_fast.runtime.errors import UserError, one_line


@dataclass(frozen=True)
class Repository:
    """The files of a repository at one commit."""

    name: str
    """OWNER/NAME."""
    field: str
    """The option that errors name."""
    commit: str
    """The commit that the revision named when the repository was opened."""
    files: frozenset[str]
    """Paths of its files."""

    def download(self, file: str) -> Path:
        """The path on this machine of one file. Raises UserError where it cannot be fetched."""
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self.name, file, revision=self.commit))
        except Exception as error:  # a lost connection surfaces as any of a dozen types
            raise UserError(
                f"{self.field}: cannot download {one_line(file)} of {self.name}: {one_line(error, 200)}"
            ) from error


def open_repository(name: str, revision: str | None, field: str, subject: str | None = None) -> Repository:
    """The repository OWNER/NAME at the commit that `revision`, by default its main branch, names.

    Without network, the files that were downloaded before. Raises UserError that names `field` and
    `subject`, by default the repository, where there are none.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        try:
            info = HfApi().model_info(name, revision=revision)
            commit, files = str(info.sha), [file.rfilename for file in info.siblings or ()]
        except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except Exception:  # offline, a timeout, a proxy: each is another type
            root = Path(snapshot_download(name, revision=revision, local_files_only=True))
            say_once(f"{name}: the Hub was not reached; what was downloaded before is used")
            commit = root.name
            # A link that leads nowhere counts as a file, which can then not be read.
            files = [path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()]
    except Exception as error:
        raise UserError(f"{field}: {subject or name} was not found on the Hub: {one_line(error, 200)}") from error
    return Repository(name, field, commit, frozenset(files))
